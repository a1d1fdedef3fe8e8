"""What problems gave: one finding for each seed, and counts of them for the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scfa_core import testing


@dataclass(frozen=True)
class Finding:
    """What one seed gave: no `complaints` if all is well.

    `worst` is error over allowed error, `apart` the same of the difference of two backends.
    """

    seed: int
    spec: testing.Spec
    worst: float
    complaints: tuple[str, ...]
    fatal: bool = False  # nothing after it can run in this process
    apart: float = 0.0
    tf32: bool = False  # held to the rule for TF32 products


class Summary:
    """Counts of findings as they come in."""

    def __init__(self) -> None:
        self.done = 0
        self.tf32 = 0  # held to the rule for TF32 products
        self.worst = self.apart = 0.0  # of those that did not fail
        self.longest = 0  # seqlen
        self.seeds: tuple[int, int] | None = None  # first and last
        self.failed: list[Finding] = []
        self.kinds: dict[str, dict[str, tuple[int, float]]] = {"dtypes": {}, "patterns": {}}

    def add(self, finding: Finding) -> None:
        """Take in one finding; they come in the order of their seeds."""
        self.done += 1
        self.tf32 += finding.tf32
        self.seeds = (self.seeds[0] if self.seeds else finding.seed, finding.seed)
        self.longest = max(self.longest, finding.spec.seqlen_q, finding.spec.seqlen_k)
        if finding.complaints:
            self.failed.append(finding)
            return
        self.worst = max(self.worst, finding.worst)
        self.apart = max(self.apart, finding.apart)
        for kind, name in (
            ("dtypes", "tf32" if finding.tf32 else finding.spec.dtype),
            ("patterns", finding.spec.parts[0].kind),
        ):
            count, worst = self.kinds[kind].get(name, (0, 0.0))
            self.kinds[kind][name] = count + 1, max(worst, finding.worst)

    def as_json(self) -> dict[str, Any]:
        """What ``scfa verify --json`` writes."""
        return {
            "problems": self.done,
            "held to the rule for TF32": self.tf32,
            "seeds": self.seeds,
            "failed": [
                {"seed": x.seed, "spec": str(x.spec), "complaints": x.complaints}
                for x in self.failed
            ],
            "largest error of the allowed": round(self.worst, 3),
            "largest difference of the allowed": round(self.apart, 3),
            "longest seqlen": self.longest,
        } | {
            kind: {
                name: {"passed": count, "largest error of the allowed": round(worst, 3)}
                for name, (count, worst) in sorted(found.items())
            }
            for kind, found in self.kinds.items()
        }
