"""Two Ray nodes in a process of its own, which does what it is told on its standard input.

`told` where everything runs, `lose` the second node, `add` another one; each is answered by a line
of JSON. `ray.cluster_utils.Cluster` holds a process's only connection to Ray, hence the process.
"""

import json
import os
import signal
import sys
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.serve._private.constants import SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

NODE = {"num_cpus": 4, "object_store_memory": 100 * 2**20, "include_dashboard": False}


def told(cluster: Cluster) -> dict[str, Any]:
    """Of every replica that runs, its deployment, node and process."""
    client = _get_global_client()
    (application,) = client.get_serve_details()["applications"].values()
    return {
        "nodes": {node["NodeID"]: node["Alive"] for node in ray.nodes()},
        "head": cluster.head_node.node_id,
        "replicas": [
            {"name": name, "node": replica["node_id"], "pid": replica["pid"]}
            for name, deployment in application["deployments"].items()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ],
    }


def lose(cluster: Cluster) -> dict[str, Any]:
    """Kill the second node as a power cut does: its raylet and all that it has started, at once."""
    (second,) = cluster.worker_nodes
    started = [info.process.pid for infos in second.all_processes.values() for info in infos]
    below = [child.pid for pid in started for child in psutil.Process(pid).children(recursive=True)]
    for pid in (*started, *below):
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(second, allow_graceful=False)
    return {"lost": second.node_id, "killed": [*started, *below]}


def main(home: str, config: str) -> None:
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"temp_dir": f"{home}/ray"})
    cluster.add_node(**NODE)
    ray.init(address=cluster.address, namespace=SERVE_NAMESPACE, log_to_driver=False)
    from ray import serve

    schema = ServeDeploySchema.model_validate(json.loads(config))
    options = schema.http_options.model_dump(include={"host", "port"})
    serve.start(proxy_location="HeadOnly", http_options=options)
    _get_global_client().deploy_apps(schema, _blocking=True)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        match line.strip():
            case "told":
                answer = told(cluster)
            case "lose":
                answer = lose(cluster)
            case "add":
                answer = {"added": cluster.add_node(**NODE).node_id}
            case other:
                raise ValueError(other)
        print(json.dumps(answer), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
