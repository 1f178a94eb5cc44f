"""What a patch makes of a record, and all that is wrong with that. No IO."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from adapters.rules import Rules, read_rules
from deployments.errors import BadInput
from deployments.snapshot import TaskPatch, TaskRecord

MAX_RULES_BYTES = 64 * 2**10
"""Of one task: every revision of the catalog holds the rules of all."""
_MAX_UNKNOWN = 64


def patched(moved: TaskRecord, record: TaskRecord, patch: TaskPatch) -> TaskRecord:
    """Return a record as a patch makes it.

    Args:
        moved: The record with the patch's active version, where the task has that.
        record: The record as it was.
        patch: What is given of it counts, null too.

    Raises:
        BadInput: What would come of it is wrong; with all problems.
    """
    given = patch.model_fields_set
    update: dict[str, Any] = {
        name: getattr(patch, name)
        for name in ("shadow", "fallback", "pinned", "max_error_rate")
        if name in given
    }
    if "traffic" in given:
        shares = patch.traffic or {}
        update["traffic"] = {v: share for v, share in shares.items() if share > 0}
        update["traffic"].pop(moved.active, None)
    if "rules" in given:
        update["rules"] = _merged(record.rules, patch.rules)
    result = moved.model_copy(update=update)
    problems = [
        *_version_problems(record, patch),
        *_share_problems(moved.active, patch.traffic or {}),
        *_role_problems(result, record, patch),
        *_rules_problems(result.rules, patch.rules),
    ]
    if problems:
        raise BadInput("; ".join(problems))
    return result


def _version_problems(record: TaskRecord, patch: TaskPatch) -> list[str]:
    problems = []
    if "active" in patch.model_fields_set and patch.active is None:
        problems.append("active must name a version")
    named: dict[str, list[str | None]] = {
        "active": [patch.active],
        "traffic": [*(patch.traffic or {})],
        "shadow": [None if patch.shadow is None else patch.shadow.version],
        "fallback": [patch.fallback],
    }
    for field, versions in named.items():
        for version in versions:
            if version in record.doomed:
                problems.append(f"{field} names {version}, which is being deleted")
            elif version is not None and version not in record.versions:
                problems.append(f"{field} names {version}, which is no version of this task")
    return problems


def _share_problems(active: str, shares: Mapping[str, float]) -> list[str]:
    """Say what is wrong with shares; the active version's must be what the others leave."""
    together = math.fsum(shares.values())
    if together > 1 + 1e-9:
        return ["the shares of traffic are over 1 together"]
    if active in shares and together < 1 - 1e-9:
        return [
            f"traffic gives {active} a share of {shares[active]:g}, which is the active version "
            "and gets what the others leave: leave it out, or let all shares be 1 together"
        ]
    return []


def _role_problems(result: TaskRecord, record: TaskRecord, patch: TaskPatch) -> list[str]:
    """Say which versions would stand in for themselves, or be compared with themselves."""
    problems, given, active = [], patch.model_fields_set, result.active
    if patch.fallback == active and "fallback" in given:
        problems.append(f"fallback names {active}, which is the active version itself")
    if record.fallback == active and "fallback" not in given:
        problems.append(
            f"active names {active}, which is the fallback; "
            "give another fallback beside it, or null"
        )
    if patch.shadow is not None and patch.shadow.version == active:
        problems.append(f"shadow names {active}, which is the active version itself")
    return problems


def _merged(rules: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {**rules, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def _rules_problems(rules: dict[str, Any], changes: dict[str, Any]) -> list[str]:
    if not changes:
        return []
    problems: list[str] = []
    # A key that is taken back must be known too.
    unknown = [key for key in changes if key not in Rules.model_fields]
    left_out = set(unknown)
    known = {key: value for key, value in rules.items() if key not in left_out}
    read_rules({**dict.fromkeys(unknown[:_MAX_UNKNOWN]), **known}, problems)
    if len(unknown) > _MAX_UNKNOWN:
        problems.append(f"and {len(unknown) - _MAX_UNKNOWN} more that are not known")
    # Only of rules that are valid can the size be told.
    if not problems and len(orjson.dumps(rules)) > MAX_RULES_BYTES:
        problems.append(f"they have more than {MAX_RULES_BYTES} bytes as JSON")
    return [f"rules: {problem.removeprefix('task.json: ')}" for problem in problems]
