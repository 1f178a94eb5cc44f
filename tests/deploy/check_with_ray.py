"""Run by test_ray.py in a process of its own: Ray reads its environment at import.

Prints, as JSON, what Ray's own parsers make of the files in deploy/.
"""

import json
import sys
from pathlib import Path
from typing import Any

import click
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from deployments.config import Args

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {
    "base_model": str(ROOT / "examples" / "base"),
    "adapter_store": str(ROOT / "examples" / "store"),
}


def serve_config(text: str) -> dict[str, Any]:
    """Read a Serve config as `serve deploy` does, and its arguments as the application does.

    The folders of a cluster are not here: those of the example stand in for them.
    """
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    args = Args.model_validate({**application.args, **EXAMPLES})
    return {
        "import_path": application.import_path,
        "keys": sorted(application.args),
        "device": args.device,
        "gpus": args.gpus,
        "deployments": sorted(d.name for d in application.deployments),
        "policies": [
            AutoscalingConfig(**d.autoscaling_config).policy.get_policy().__qualname__
            for d in application.deployments
            if isinstance(d.autoscaling_config, dict)
        ],
        "port": config.http_options.port,
    }


def ray_start(arguments: list[str]) -> dict[str, Any]:
    """Read the arguments of `ray start` without starting anything."""
    context: click.Context = start.make_context("start", arguments)
    return context.params


def main() -> None:
    manifest = yaml.safe_load((ROOT / "deploy" / "rayservice.yaml").read_text())
    cluster = manifest["spec"]["rayClusterConfig"]
    starts = {}
    for name, group in (
        ("head", cluster["headGroupSpec"]),
        ("gpu", cluster["workerGroupSpecs"][0]),
    ):
        given = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        starts[name] = ray_start(["--head", *given] if name == "head" else given)
    prepared = prepare_config(yaml.safe_load((ROOT / "deploy" / "cluster.yaml").read_text()))
    validate_config(prepared)
    for name in ("head", "worker"):
        command = prepared[f"{name}_start_ray_commands"][-1].split("ray start ")[1]
        starts[f"ray up, {name}"] = ray_start(command.split())
    refused = ""
    try:
        validate_config({**prepared, "worker_start_commands": []})
    except Exception as error:
        refused = str(error)
    kept = ("num_cpus", "object_store_memory", "dashboard_host", "metrics_export_port")
    print(
        json.dumps(
            {
                "own": serve_config((ROOT / "deploy" / "serve_config.yaml").read_text()),
                "embedded": serve_config(manifest["spec"]["serveConfigV2"]),
                "starts": {n: {k: p[k] for k in kept} for n, p in starts.items()},
                "commands": {
                    key: value for key, value in prepared.items() if key.endswith("commands")
                },
                "workers": prepared["max_workers"],
                "refused": refused,
            }
        )
    )


if __name__ == "__main__":
    sys.exit(main())
