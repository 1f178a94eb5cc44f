"""What is counted of a version: by each ingress as it answers, and summed in the catalog."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter

from deployments.snapshot import Name, Version


@dataclass(slots=True)
class Usage:
    """What was counted of one version over some time.

    Attributes:
        num_rows: Rows that it was asked for; a row is an input of a request, whatever windows it
            has.
        num_errors: Of those, rows that it could not answer, for no caller's fault.
        last_used_s: When the last of them came, in seconds since the epoch.
        num_shadowed: Rows that it ran as a shadow.
        num_agreed: Of those, with the prediction that was answered.
        score_shift: Sum over those of the largest difference of a score.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    task: Name
    version: Version
    num_rows: int = 0
    num_errors: int = 0
    last_used_s: float = 0.0
    num_shadowed: int = 0
    num_agreed: int = 0
    score_shift: float = 0.0

    def add(self, other: Usage) -> None:
        """Count what another one of the same version has counted, too."""
        self.num_rows += other.num_rows
        self.num_errors += other.num_errors
        self.last_used_s = max(self.last_used_s, other.last_used_s)
        self.num_shadowed += other.num_shadowed
        self.num_agreed += other.num_agreed
        self.score_shift += other.score_shift


USAGES = TypeAdapter(list[Usage])
"""Validates what an ingress tells: `Usage` as plain data."""
