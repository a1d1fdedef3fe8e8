"""Memory of host and device at one look after another, and how much of it may be left behind."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

# Caches of calls are bounded and emptied when full: before they have been, memory does grow. There
# are more of them on a GPU, and thirds of a short run do not meet the same of their highest marks.
JUDGED_FROM = {"host": 20_000, "cuda": 60_000}  # steps
ALLOWED = {  # growth of the highest mark from the middle to the last third of the steps
    "host bytes": 32 << 20,
    "host objects": 50_000,
    "torch allocated bytes": 16 << 20,  # the smallest block of every other step
    "torch reserved bytes": 64 << 20,
    "cupy pool bytes": 0,
}


@dataclass
class Marks:
    """Memory at one look after another."""

    cuda: bool = False  # whether a GPU's memory is looked at too
    steps: list[int] = field(default_factory=list)
    values: dict[str, list[int]] = field(default_factory=dict)

    @property
    def judged(self) -> bool:
        """Whether the run was long enough for its growth to say anything."""
        return bool(self.steps) and self.steps[-1] >= JUDGED_FROM["cuda" if self.cuda else "host"]

    def look(self, step: int) -> None:
        """Take down where memory stands."""
        self.steps.append(step)
        for name, value in memory(self.cuda).items():
            self.values.setdefault(name, []).append(value)

    def growth(self, name: str) -> int:
        """How much higher the highest mark of the last third is than that of the middle third."""
        marks = self.values[name]
        third = len(marks) // 3
        return max(marks[-third:]) - max(marks[third : len(marks) - third]) if third else 0

    def as_json(self) -> dict[str, dict[str, int]]:
        """First, highest and last mark of each kind, and its growth."""
        return {
            name: {
                "first": values[0],
                "highest": max(values),
                "last": values[-1],
                "growth": self.growth(name),
            }
            for name, values in self.values.items()
        }

    def complaints(self) -> list[str]:
        """What grew by more than it may; nothing is said of a run too short for that."""
        if not self.judged:
            return []
        return [
            f"{name} grew by {self.growth(name)} in the last {self.steps[-1] // 3} steps"
            for name in self.values
            if self.growth(name) > ALLOWED[name]
        ]


def memory(cuda: bool) -> dict[str, int]:
    """Bytes and objects that this process holds, as far as this system tells."""
    held = {"host objects": sys.getallocatedblocks()}
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            held["host bytes"] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # only Linux tells
        pass
    if cuda:
        import torch

        held["torch allocated bytes"] = torch.cuda.memory_allocated()
        held["torch reserved bytes"] = torch.cuda.memory_reserved()
        if "cupy" in sys.modules:
            held["cupy pool bytes"] = sys.modules["cupy"].get_default_memory_pool().total_bytes()
    return held
