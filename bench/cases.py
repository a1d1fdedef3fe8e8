"""Named problems: the rows of every table. A case is sizes and a pattern recipe, no arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

# Methods that compute dense causal attention whatever the case's pattern is.
DENSE_ONLY = (
    "sdpa-cudnn",
    "sdpa-flash",
    "sdpa-math",
    "flash-attn",
    "flash-attn-2",
    "flash-attn-3",
    "flash-attn-4",
    "flash-attn-4-deterministic",
    "cudnn-frontend",
    "xformers",
)


@dataclass(frozen=True)
class Case:
    """One row: sizes, element type, device kind, and the name of a pattern recipe.

    `pattern` is ``dense``, ``hash<buckets>`` (q and k hashed apart), ``samehash<buckets>``,
    ``qk<percent dropped>``, ``window<keys>``, ``docs<documents>`` or ``ranges<keys>``.
    """

    name: str
    batch: int
    heads: int
    heads_kv: int
    seqlen: int
    head_dim: int
    pattern: str
    dtype: str = "bfloat16"
    device: str = "cuda"

    @property
    def kind(self) -> str:
        """The recipe without its number."""
        return self.pattern.rstrip("0123456789")

    @property
    def number(self) -> int:
        """The recipe's number, 0 if it has none."""
        return int(self.pattern[len(self.kind) :] or 0)

    @property
    def rows(self) -> int:
        """Query rows: batch * heads * seqlen."""
        return self.batch * self.heads * self.seqlen


def _length(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def workload_a(pattern: str, seqlen: int) -> Case:
    """Batch 4, heads 48, head_dim 64: the paper's shape."""
    return Case(f"A-{pattern}-{_length(seqlen)}", 4, 48, 48, seqlen, 64, pattern)


def workload_b(pattern: str, seqlen: int, head_dim: int = 128) -> Case:
    """Batch 2, heads 16, head_dim 128: a language model of today."""
    suffix = "" if head_dim == 128 else f"-d{head_dim}"
    heads = 16 * 128 // head_dim
    return Case(
        f"B-{pattern}-{_length(seqlen)}{suffix}", 2, heads, heads, seqlen, head_dim, pattern
    )


def workload_c(pattern: str, seqlen: int) -> Case:
    """Attention of one layer of the paper's language model: 12 heads of 64, 32768 tokens a step.

    Keys share the hash of their queries. Its whole training step is timed by ``bench.lm speed``.
    """
    name = f"C-{pattern}-{_length(seqlen)}"
    return Case(name, 32768 // seqlen, 12, 12, seqlen, 64, pattern)


def _cpu(pattern: str, seqlen: int) -> Case:
    return Case(f"cpu-{pattern}-{_length(seqlen)}", 1, 4, 4, seqlen, 64, pattern, "float32", "cpu")


def _goal() -> Iterator[Case]:
    """The rows of the table of targets."""
    for seqlen in (8192, 16384, 32768):
        yield workload_a("hash16", seqlen)
    yield workload_a("qk50", 16384)
    yield workload_a("dense", 16384)
    yield workload_b("dense", 16384)


def _buckets() -> Iterator[Case]:
    for buckets in (2, 4, 8, 16, 32, 64, 128):
        yield workload_a(f"hash{buckets}", 16384)


def _drops() -> Iterator[Case]:
    for percent in range(10, 100, 20):
        yield workload_a(f"qk{percent}", 16384)


def _lengths() -> Iterator[Case]:
    for seqlen in (1024, 2048, 4096, 8192, 16384, 32768):
        yield workload_a("hash16", seqlen)
        yield workload_a("dense", seqlen)
    for seqlen in (1024, 4096):  # where sparsity has least to save
        yield workload_a("hash2", seqlen)


def _paper() -> Iterator[Case]:
    """The lines of the paper's runtime figures, long lengths first."""
    for seqlen in (16384, 8192, 32768, 4096, 2048, 1024):
        yield workload_a("dense", seqlen)
        for buckets in (16, 4, 64, 2, 8, 32):
            yield workload_a(f"hash{buckets}", seqlen)
        for percent in (50, 30, 70):
            yield workload_a(f"qk{percent}", seqlen)


def _corners() -> Iterator[Case]:
    """The extreme buckets and drops, where the paper's figures have none."""
    for seqlen in (16384, 32768, 4096, 1024):
        for pattern in ("hash128", "qk90", "qk10"):
            yield workload_a(pattern, seqlen)


def _growth() -> Iterator[Case]:
    """Buckets of 1024 keys, whatever the length: the time should double with it."""
    for seqlen in (65536, 131072):
        yield Case(f"growth-{_length(seqlen)}", 1, 12, 12, seqlen, 64, f"hash{seqlen // 1024}")


def _language_model() -> Iterator[Case]:
    for seqlen in (8192, 16384, 32768):
        for pattern in ("samehash16", "qk50", "dense"):
            yield workload_c(pattern, seqlen)


def _shapes() -> Iterator[Case]:
    for pattern in ("dense", "hash16"):
        yield workload_b(pattern, 16384, 256)
    yield workload_b("hash16", 16384)
    yield Case("A-hash16-16k-fp16", 4, 48, 48, 16384, 64, "hash16", "float16")
    yield Case("B-hash16-16k-gqa8", 2, 16, 2, 16384, 128, "hash16")
    yield workload_a("samehash16", 16384)
    for pattern in ("window1024", "docs8", "ranges1024"):
        yield workload_a(pattern, 16384)


def _gpu() -> Iterator[Case]:
    """Every GPU case, what decides first: a sweep that a budget ends holds the goals at least."""
    for make in (_goal, _buckets, _drops, _lengths, _growth, _shapes, _language_model):
        yield from make()


def _cpu_cases() -> Iterator[Case]:
    for seqlen in (1024, 4096, 8192):
        yield _cpu("dense", seqlen)
        yield _cpu("hash16", seqlen)


def _cpu_buckets() -> Iterator[Case]:
    for buckets in (2, 4, 8, 16, 32, 64):
        yield _cpu(f"hash{buckets}", 4096)


def _cpu_drops() -> Iterator[Case]:
    for percent in range(10, 100, 20):
        yield _cpu(f"qk{percent}", 4096)


def _cpu_growth() -> Iterator[Case]:
    """Buckets of 256 keys, whatever the length."""
    for seqlen in (4096, 8192, 16384):
        name = f"growth-cpu-{_length(seqlen)}"
        yield Case(name, 1, 4, 4, seqlen, 64, f"hash{seqlen // 256}", "float32", "cpu")


def _smoke() -> Iterator[Case]:
    """Every CPU recipe at a size that takes no time; part of the tests."""
    for pattern in ("dense", "hash4", "samehash4", "qk50", "window32", "docs3", "ranges32"):
        yield Case(f"smoke-{pattern}", 1, 2, 1, 256, 32, pattern, "float32", "cpu")


SETS: dict[str, Callable[[], Iterator[Case]]] = {
    "goal": _goal,
    "buckets": _buckets,
    "drops": _drops,
    "lengths": _lengths,
    "growth": _growth,
    "shapes": _shapes,
    "language-model": _language_model,
    "gpu": _gpu,
    "paper": _paper,
    "corners": _corners,
    "cpu": _cpu_cases,
    "cpu-buckets": _cpu_buckets,
    "cpu-drops": _cpu_drops,
    "cpu-growth": _cpu_growth,
    "smoke": _smoke,
}


def every_case() -> dict[str, Case]:
    """Return all cases of all sets by name."""
    return {case.name: case for make in SETS.values() for case in make()}


def select(names: list[str]) -> list[Case]:
    """Return the cases of the named sets, or single cases by their name, each once."""
    every = every_case()
    chosen: dict[str, Case] = {}
    for name in names:
        if name in SETS:
            chosen.update({case.name: case for case in SETS[name]()})
        elif name in every:
            chosen[name] = every[name]
        else:
            raise SystemExit(
                f"no such case or set: {name!r}; sets: {', '.join(SETS)}; cases: {', '.join(every)}"
            )
    return list(chosen.values())
