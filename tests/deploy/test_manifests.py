"""What Kubernetes is given: schemas first, then what schemas cannot see."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.validators import templates, validate, validate_ray_service

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SECRETS = {"onebase-ray", "onebase-admin", "onebase-redis"}
Read = Callable[[str], list[dict[str, Any]]]


def containers(manifest: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Pod spec and Ray container of each group of a RayService."""
    for template in templates(manifest):
        (container,) = template["spec"]["containers"]
        yield template["spec"], container


def environment(container: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}


def ray_env() -> dict[str, str]:
    lines = (DEPLOY / "ray.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def secrets(node: Any) -> Iterator[tuple[str, str]]:
    """Name and key of every secret that a manifest refers to."""
    if isinstance(node, dict):
        if "secretKeyRef" in node:
            yield node["secretKeyRef"]["name"], node["secretKeyRef"]["key"]
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from secrets(inner)


def test_the_ray_service_has_no_field_that_kuberay_does_not_know(
    ray_service: dict[str, Any],
) -> None:
    validate_ray_service(ray_service)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "serveConfig"), "x"),
        (("spec", "rayClusterConfig", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplica"), 1),
        (("spec", "rayClusterConfig", "gcsFaultToleranceOptions"), {"redisPassword": {}}),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, tuple) else "",
)
def test_the_schema_of_kuberay_refuses(
    path: tuple[Any, ...], value: Any, ray_service: dict[str, Any]
) -> None:
    node: Any = ray_service
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_ray_service(ray_service)


@pytest.mark.parametrize("where", ["pod", "autoscaler", "redis"])
def test_what_is_embedded_is_held_against_kubernetes_own_schema(
    where: str, ray_service: dict[str, Any]
) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    if where == "pod":
        templates(ray_service)[1]["spec"]["containers"][0]["readinesProbe"] = {}
    elif where == "autoscaler":
        cluster["autoscalerOptions"]["securityContext"]["runAsNonRoot"] = "yes"
    else:
        reference = cluster["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]
        reference["secretKeyRef"] = {"secret": "onebase-redis", "key": "password"}
    # Pods share what YAML's anchors name, so one change may be found in several of them.
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_ray_service(ray_service)


@pytest.mark.parametrize("name", ["networkpolicy.yaml", "redis.yaml", "volume.yaml"])
def test_other_manifests_are_valid(name: str, read: Read) -> None:
    documents = read(name)
    assert documents
    for manifest in documents:
        validate(manifest)
        broken = copy.deepcopy(manifest)
        broken["spec"]["nonsense"] = 1
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(broken)


def test_the_pod_monitor_is_one_for_prometheus_operator(read: Read) -> None:
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    (manifest,) = read("podmonitor.yaml")
    endpoints = manifest["spec"]["podMetricsEndpoints"]
    # Made from the operator's own CRD. It ignores what it does not know, so nothing may be lost.
    for field, known in (("port", True), ("prot", False)):
        endpoints[0][field] = endpoints[0].pop("port")
        understood = PodMonitor.model_validate(manifest)
        told = understood.model_dump(by_alias=True, exclude_unset=True, mode="json")
        assert (told == manifest) is known


def test_every_node_has_the_flags_without_which_it_would_break_the_others(
    ray_service: dict[str, Any],
) -> None:
    expected = ray_env()
    assert expected["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert expected["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert expected["RAY_AUTH_MODE"] == "token"
    for _, container in containers(ray_service):
        assert expected.items() <= environment(container).items()
        assert ("onebase-admin", "token") in secrets(container["env"])


def test_no_secret_stands_in_a_file(read: Read) -> None:
    found = set()
    for path in sorted(DEPLOY.glob("*.yaml")):
        documents = read(path.name)
        assert not [d for d in documents if d.get("kind") == "Secret"], path
        found |= {name for name, _ in secrets(documents)}
    (manifest,) = read("rayservice.yaml")
    cluster = manifest["spec"]["rayClusterConfig"]
    found.add(cluster["authOptions"]["secretName"])
    assert found == SECRETS
    assert "value" not in cluster["gcsFaultToleranceOptions"]["redisPassword"]
    told = (DEPLOY / "README.md").read_text()
    assert all(f"create secret generic {name} " in told for name in SECRETS)


def test_nothing_runs_as_root_or_may_write_but_where_it_must(
    ray_service: dict[str, Any], read: Read
) -> None:
    redis = next(d for d in read("redis.yaml") if d["kind"] == "StatefulSet")
    pod = redis["spec"]["template"]["spec"]
    for spec, container in [*containers(ray_service), (pod, pod["containers"][0])]:
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert own["seccompProfile"] == {"type": "RuntimeDefault"}
    options = ray_service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert options["securityContext"]["readOnlyRootFilesystem"]


def test_mounts_have_volumes_and_ray_may_write_below_tmp(ray_service: dict[str, Any]) -> None:
    options = ray_service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    for spec, container in containers(ray_service):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) <= volumes.keys()
        assert "emptyDir" in volumes[mounts["/tmp"]]
        assert environment(container)["HOME"] == "/tmp"
        assert {mount["name"] for mount in options["volumeMounts"]} <= volumes.keys()


def test_selectors_select(ray_service: dict[str, Any], read: Read) -> None:
    kuberay_s = {"ray.io/is-ray-node": "yes"}
    monitor = read("podmonitor.yaml")[0]["spec"]
    ports = set()
    for template in templates(ray_service):
        labels = template["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= (labels | kuberay_s).items()
        (container,) = template["spec"]["containers"]
        ports |= {port["name"] for port in container["ports"]}
    assert {endpoint["port"] for endpoint in monitor["podMetricsEndpoints"]} <= ports
    policies = {p["metadata"]["name"]: p["spec"] for p in read("networkpolicy.yaml")}
    assert policies["onebase"]["podSelector"]["matchLabels"].items() <= labels.items()
    service, redis = read("redis.yaml")
    own = redis["spec"]["template"]["metadata"]["labels"]
    assert policies["onebase-redis"]["podSelector"]["matchLabels"] == own
    assert service["spec"]["selector"] == redis["spec"]["selector"]["matchLabels"] == own
    options = ray_service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    address = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert options["redisAddress"] == address
    claims = {d["metadata"]["name"] for d in read("volume.yaml")}
    for spec, _ in containers(ray_service):
        asked = [v["persistentVolumeClaim"] for v in spec["volumes"] if "emptyDir" not in v]
        assert {claim["claimName"] for claim in asked} == claims


def test_all_nodes_have_one_image_and_the_version_of_ray_that_is_locked(
    ray_service: dict[str, Any],
) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    assert len({container["image"] for _, container in containers(ray_service)}) == 1
    assert f"\nray=={cluster['rayVersion']} " in (DEPLOY.parent / "requirements.lock").read_text()


def test_a_worker_holds_a_model_replica_and_the_head_none(ray_service: dict[str, Any]) -> None:
    cluster = ray_service["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    deployments = {d["name"]: d for d in config["applications"][0]["deployments"]}
    scaling = deployments["Model"]["autoscaling_config"]
    assert (group["minReplicas"], group["maxReplicas"]) == (
        scaling["min_replicas"], scaling["max_replicas"],
    )  # fmt: skip
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert config["applications"][0]["args"]["device"] == "cuda"


def test_the_probes_ask_where_something_answers(ray_service: dict[str, Any]) -> None:
    config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    head, worker = (container for _, container in containers(ray_service))
    node = {"path": "/api/healthz", "port": 52365}
    served = {"path": "/-/healthz", "port": config["http_options"]["port"]}
    for container in (head, worker):
        assert container["startupProbe"]["httpGet"] == node
        assert container["livenessProbe"]["httpGet"] == node
    # The application is deployed when the head is ready, so that cannot wait for the application.
    assert head["readinessProbe"]["httpGet"] == node
    assert worker["readinessProbe"]["httpGet"] == served
    assert config["proxy_location"] == "EveryNode"
    assert config["http_options"]["host"] == "0.0.0.0"


def test_the_serve_config_within_is_the_one_beside(ray_service: dict[str, Any], read: Read) -> None:
    assert yaml.safe_load(ray_service["spec"]["serveConfigV2"]) == read("serve_config.yaml")[0]
