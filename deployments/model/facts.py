"""What the ingress needs to know of an adapter, told by the one who validated it."""

from __future__ import annotations

from adapters.artifact import Artifact
from adapters.rules import Rules
from deployments.rows import Facts


def to_facts(artifact: Artifact, max_length: int) -> Facts:
    """Describe an adapter as plain data; max_length, in tokens, is the base's."""
    spec, rules = artifact.spec, artifact.rules
    of_tokens = artifact.problem_type == "token_classification"
    guessed = []
    if rules.labels is None and spec.labels is None:
        guessed.append("labels")
    if rules.problem_type is None and spec.problem_type is None and not of_tokens:
        guessed.append("problem_type")
    trained_length = rules.max_length or artifact.training_length
    if trained_length is None:
        guessed.append("max_length")
    max_length = min(trained_length or max_length, max_length)
    overflow = rules.overflow or ("refuse" if rules.truncation is False else "truncate")
    windows = overflow == "window"
    targets = spec.matching.target_modules
    return Facts(
        task=artifact.task,
        version=artifact.version,
        labels=list(artifact.labels),
        problem_type=artifact.problem_type,
        threshold=rules.threshold,
        max_length=max_length,
        truncation=None if overflow == "refuse" else _strategy(rules, windows),
        overflow=overflow,
        # A quarter: what stands across two windows is whole in one of them if it is no longer.
        stride=(max_length // 4 if rules.stride is None else rules.stride) if windows else None,
        window_scores=(rules.window_scores or "max") if windows and not of_tokens else None,
        negative_label=rules.negative_label,
        aggregation=(rules.aggregation or "simple") if of_tokens else None,
        pair=rules.pair,
        priority=rules.priority or "normal",
        latency_target_ms=rules.latency_target_ms,
        guessed=guessed,
        rules=rules.revision,
        method=spec.method,
        rank=spec.rank,
        targets=[targets] if isinstance(targets, str) else sorted(targets),
        num_bytes=artifact.num_bytes,
    )


def _strategy(rules: Rules, windows: bool) -> str:
    """Name how a long input is cut: true is transformers' name for its default."""
    if isinstance(rules.truncation, str):
        return rules.truncation
    return "only_first" if windows and rules.pair else "longest_first"
