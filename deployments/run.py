"""`serve run`, made for people.

The configuration is checked before Ray starts, and a start that fails says why and ends. SIGTERM
stops as Ctrl-C does, and nothing is left behind.
"""

from __future__ import annotations

import _thread
import logging
import re
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click
import ray
import yaml
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema
from ray.serve.scripts import cli

from deployments.config import Args, ConfigError, set_unless_said
from deployments.internals import last_cluster_is_dead

_BUILDER = "deployments.app:build"
# HAProxy ends connections to an ingress that it could use again once it has a quarter of what it
# may have, and to open them anew costs an ingress more than to refuse a request. It wants 5 open
# files for 2 connections, and does not start where it cannot have them.
_CONNECTIONS = "RAY_SERVE_HAPROXY_MAXCONN"
_MOST_CONNECTIONS = 16_384
_FILES = resource.RLIMIT_NOFILE
# A Python traceback's last line: the error's class, then what it says.
_SAID = re.compile(r"^[\w.]+(?:Error|Exception|Unavailable): (.+)$", re.MULTILINE)


def main(arguments: list[str]) -> int:
    """Serve a configuration file until a signal comes; return the exit status."""
    if len(arguments) != 1:
        return _complain("usage: python -m deployments serve_config.yaml")
    try:
        config = read_config(Path(arguments[0]))
    except ConfigError as error:
        return _complain(f"{arguments[0]}: {error}")
    names = [application.name for application in config.applications]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    failed, ending = threading.Event(), threading.Event()
    http: Any = config.http_options
    address = f"http://{http.host}:{http.port}"
    set_unless_said(_CONNECTIONS, str(connections(resource.getrlimit(_FILES)[1])))
    watch = threading.Thread(target=_watch, args=(names, address, failed, ending), daemon=True)
    try:
        ray.init(
            "local" if last_cluster_is_dead() else None,
            namespace="serve",
            logging_level=logging.WARNING,
        )
        signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which sets its own
        watch.start()
        cli.main(["run", arguments[0]], standalone_mode=False)
    except SystemExit:
        pass  # it has shut Serve down itself
    except (KeyboardInterrupt, click.Abort):  # the latter from the command's own first steps
        if ray.is_initialized():
            serve.shutdown()
    finally:
        # Another signal must not cut the stop short: it would leave processes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Whoever asks Serve something after ray.shutdown starts another Ray.
        ending.set()
        if watch.is_alive():
            watch.join(5)
        ray.shutdown()
    return 1 if failed.is_set() else 0


def connections(max_files: int) -> int:
    """Return how many connections HAProxy may have where a process may open so many files."""
    if max_files == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(1, min(_MOST_CONNECTIONS, (max_files - 100) * 2 // 5))


def read_config(path: Path) -> ServeDeploySchema:
    """Read a Serve configuration file and validate its arguments for `deployments.app:build`.

    Raises:
        ConfigError: It cannot be read, or something in it is wrong.
    """
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ConfigError(error.strerror or str(error)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    for application in config.applications:
        if application.import_path == _BUILDER:
            Args.model_validate(application.args)
    return config


def _watch(
    names: list[str], address: str, failed: threading.Event, ending: threading.Event
) -> None:
    """Say when every application runs; end the process if one cannot."""
    while not ending.wait(0.5):
        try:
            statuses = serve.status().applications
        except (RayError, RayServeException):  # Serve is being shut down under it
            continue
        for name in names:
            status = statuses.get(name)
            if status is not None and status.status == ApplicationStatus.DEPLOY_FAILED:
                _complain(f"{name}: {_reason(status)}")
                failed.set()
                _thread.interrupt_main()
                return
        running = ApplicationStatus.RUNNING
        if all(name in statuses and statuses[name].status == running for name in names):
            print(f"{', '.join(names)}: ready at {address} (Ctrl-C stops it)", flush=True)
            return


def _reason(status: ApplicationStatusOverview) -> str:
    """Find the sentence that was raised in the tracebacks that Serve keeps."""
    told = [status.message, *(deployment.message for deployment in status.deployments.values())]
    said = [sentence for message in told for sentence in _SAID.findall(message)]
    return str(said[-1] if said else " ".join(told))


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _complain(sentence: str) -> int:
    print(sentence, file=sys.stderr, flush=True)
    return 1
