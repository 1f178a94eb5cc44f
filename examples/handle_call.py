"""Calls the running application from another process, without HTTP.

    python examples/handle_call.py [TASK [TEXT]]

The process needs ray[serve] alone: none of the code here, no torch.
"""

import os
import sys

# Good for the server, but a process that has it can use a handle in an event loop only.
os.environ.pop("RAY_SERVE_THROUGHPUT_OPTIMIZED", None)

import ray
from ray import serve

task = sys.argv[1] if len(sys.argv) > 1 else "sentiment"
text = sys.argv[2] if len(sys.argv) > 2 else "I absolutely loved this product!"

ray.init(address="auto", logging_level="WARNING", log_to_driver=False)
onebase = serve.get_app_handle("onebase")
try:
    print(onebase.predict.remote(task, [text], return_scores=True).result(timeout_s=60))
except (LookupError, ValueError, RuntimeError) as error:  # Unknown task, bad input, not ready.
    sys.exit(f"{type(error.cause).__name__}: {error.cause}")
