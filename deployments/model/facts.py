"""What the ingress needs to know of an adapter, told by the one who validated it."""

from __future__ import annotations

from adapters.artifact import Artifact
from deployments.rows import Facts


def to_facts(artifact: Artifact, max_length: int) -> Facts:
    """Describe an adapter as plain data; max_length, in tokens, is the base's."""
    spec, rules = artifact.spec, artifact.rules
    guessed = []
    if rules.labels is None and spec.labels is None:
        guessed.append("labels")
    if rules.problem_type is None and spec.problem_type is None:
        guessed.append("problem_type")
    trained_length = rules.max_length or artifact.training_length
    if trained_length is None:
        guessed.append("max_length")
    # True is transformers' name for its default, False for none.
    strategy: str | None = "longest_first" if rules.truncation is True else rules.truncation or None
    targets = spec.matching.target_modules
    return Facts(
        task=artifact.task,
        version=artifact.version,
        labels=list(artifact.labels),
        problem_type=artifact.problem_type,
        threshold=rules.threshold,
        max_length=min(trained_length or max_length, max_length),
        truncation=strategy,
        pair=rules.pair,
        guessed=guessed,
        method=spec.method,
        rank=spec.rank,
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        num_bytes=artifact.num_bytes,
    )
