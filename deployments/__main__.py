"""`python -m deployments serve_config.yaml`: serve until a signal comes.

Ray's processes must outlive the signal that stops them: a raylet that gets the same SIGTERM (a
group's, as from `timeout` or a service manager) dies first, and Serve then waits 30 s for it. So
all of Ray runs in a session of its own, and this process only passes signals on.
"""

import os
import signal
import sys
import threading


def main() -> int:
    """Run `deployments.run` in a session of its own; return its exit status."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)  # nothing runs yet that must be stopped
    mine, theirs = os.pipe()  # never written to: it closes when this process ends, however it ends
    child = os.fork()
    if child == 0:
        os.close(theirs)
        return _serve(mine)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: os.kill(child, signum))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def _serve(parent: int) -> int:
    os.setsid()
    from deployments import run

    threading.Thread(target=_stop_after, args=(parent,), daemon=True).start()
    return run.main(sys.argv[1:])


def _stop_after(parent: int) -> None:
    os.read(parent, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
