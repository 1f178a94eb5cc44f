"""What the manifests are checked with: Kubernetes' own schemas, and KubeRay's RayService.

KubeRay's schema is not in any package. This one was written from the fields that its API reference
documents for ray.io/v1 (KubeRay 1.6), and is as strict as an API server: a field that it does not
have is an error. What it embeds of Kubernetes (pods, variables, resources) is validated as such.
"""

from typing import Any

import jsonschema
import kubernetes_validate

KUBERNETES = "1.31"  # the oldest that is still in wide use; schemas are in the package

_TEXT, _WHOLE, _FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_ANY = {"type": "object"}  # validated apart, in a pod


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


_CREDENTIAL = _object(value=_TEXT, valueFrom=_ANY)
_GROUP = {
    "rayStartParams": _TEXTS,
    "template": _ANY,
    "resources": _TEXTS,
    "labels": _TEXTS,
}
_AUTOSCALER = _object(
    version=_one_of("v1", "v2"),
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=_WHOLE,
    image=_TEXT,
    imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
    resources=_ANY,
    securityContext=_ANY,
    env={"type": "array"},
    envFrom={"type": "array"},
    volumeMounts={"type": "array"},
)
_CLUSTER = _object(
    ("headGroupSpec",),
    rayVersion=_TEXT,
    suspend=_FLAG,
    managedBy=_TEXT,
    enableInTreeAutoscaling=_FLAG,
    autoscalerOptions=_AUTOSCALER,
    headServiceAnnotations=_TEXTS,
    authOptions=_object(
        mode=_one_of("disabled", "token"), secretName=_TEXT, enableK8sTokenAuth=_FLAG
    ),
    gcsFaultToleranceOptions=_object(
        ("redisAddress",),
        redisAddress=_TEXT,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=_TEXT,
    ),
    upgradeStrategy=_object(type=_one_of("Recreate", "None")),
    headGroupSpec=_object(
        ("template",),
        **_GROUP,
        headService=_ANY,
        enableIngress=_FLAG,
        serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer"),
    ),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            ("groupName", "minReplicas", "maxReplicas", "template"),
            **_GROUP,
            groupName=_TEXT,
            replicas=_WHOLE,
            minReplicas=_WHOLE,
            maxReplicas=_WHOLE,
            idleTimeoutSeconds=_WHOLE,
            numOfHosts=_WHOLE,
            suspend=_FLAG,
            scaleStrategy=_object(workersToDelete={"type": "array", "items": _TEXT}),
        ),
    },
)
RAY_SERVICE = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayService"},
    metadata=_object(("name",), name=_TEXT, namespace=_TEXT, labels=_TEXTS, annotations=_TEXTS),
    spec=_object(
        ("rayClusterConfig",),
        serveConfigV2=_TEXT,
        rayClusterConfig=_CLUSTER,
        serveService=_ANY,
        excludeHeadPodFromServeSvc=_FLAG,
        rayClusterDeletionDelaySeconds=_WHOLE,
        upgradeStrategy=_object(
            type=_one_of("NewCluster", "NewClusterWithIncrementalUpgrade", "None"),
            clusterUpgradeOptions=_ANY,
        ),
    ),
)


def validate(manifest: dict[str, Any]) -> None:
    """Hold a manifest of Kubernetes' own kinds against its schema; no unknown field passes."""
    kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    """Return the pod that a template makes."""
    metadata = {"name": "pod", **template.get("metadata", {})}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def validate_ray_service(manifest: dict[str, Any]) -> None:
    """Hold a RayService against KubeRay's schema, and all that it embeds against Kubernetes'."""
    jsonschema.Draft202012Validator(RAY_SERVICE).validate(manifest)
    cluster = manifest["spec"]["rayClusterConfig"]
    for template in templates(manifest):
        validate(as_pod(template))
    redis = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
    own = ("resources", "securityContext", "env", "envFrom", "volumeMounts", "imagePullPolicy")
    given = cluster.get("autoscalerOptions", {})
    container = {"name": "autoscaler", "image": "x", **{k: given[k] for k in own if k in given}}
    container["env"] = [*container.get("env", []), {"name": "REDIS_PASSWORD", **redis}]
    validate(as_pod({"spec": {"containers": [container]}}))


def templates(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pod templates of a RayService: the head's, then the workers'."""
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]
