"""Very many steps whose patterns and lengths change: what ``scfa soak`` runs.

Three things must hold still meanwhile: the memory of host and device, the number of compiled
kernels, and the bits of a few fixed problems. On a GPU, one captured graph is then replayed with
hashes and values of its own each time, and held against the same calls made eagerly. Answers are
not judged here, `verify` does that.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scfa_core import patterns as pt
from scfa_core.api import attention, attention_backward, make_plan
from scfa_core.dispatch import check_name, load_backend, unavailable_reason
from scfa_core.errors import BackendUnavailable, UnknownBackend
from scfa_core.soak_memory import Marks

PATTERNS = ("hash", "wide-hash", "keep", "causal", "window", "documents", "ranges", "hash-window")
PROBE_EVERY = 50  # steps between two looks at memory and at the fixed problems


@dataclass(frozen=True)
class Sizes:
    """One kind of problem; lengths and patterns vary, these do not."""

    dtype: str
    head_dim: int
    batch: int = 2
    heads: int = 4
    heads_kv: int = 2


HOST_SIZES = (Sizes("float32", 32, 1), Sizes("bfloat16", 16, 1))
HOST_ROWS, CUDA_ROWS = 128, 1024
HOST_STEPS, CUDA_STEPS = 25_000, 100_000
CUDA_SIZES = (Sizes("bfloat16", 64), Sizes("float16", 128), Sizes("float32", 64))
# Fixed problems of their own, causal: ranges so long that backward goes another way on Hopper.
CUDA_LONG = (Sizes("bfloat16", 64, 1, 2, 1), Sizes("float16", 128, 1, 2, 1))
CUDA_LONG_ROWS = 16384


def compiled_kernels(backend: str) -> int:
    """Kernels in the memory of this process: compiled here, or loaded from disk."""
    if backend == "cupy":
        from scfa_core.backends.cupy_raw.loader import Kernel

        return sum(type(x) is Kernel for x in gc.get_objects())
    if backend == "numba-cuda":
        from scfa_core.backends.numba_cuda.driver import Entry

        return sum(type(x) is Entry for x in gc.get_objects())
    if backend == "numba-cpu":
        from numba.core.dispatcher import Dispatcher

        home = "scfa_core.backends.numba_cpu."
        found = [x for x in gc.get_objects() if issubclass(type(x), Dispatcher)]
        return sum(len(x.overloads) for x in found if x.py_func.__module__.startswith(home))
    return 0


class Soak:
    """One run on one backend; `random` makes lengths and patterns, torch the values.

    Parameters
    ----------
    backend : str
        Name of one backend, not ``auto``.
    rows : int, optional
        Longest seqlen drawn.
    seed : int
        Of everything drawn.

    Raises
    ------
    UnknownBackend, BackendUnavailable
        No such backend, or it cannot run here; or torch is not installed.
    """

    def __init__(self, backend: str, rows: int | None = None, seed: int = 0) -> None:
        check_name(backend)
        if backend == "auto":
            raise UnknownBackend("soak needs the name of one backend, got 'auto'")
        reason = unavailable_reason(backend)
        if reason is not None:
            raise BackendUnavailable(f"backend {backend!r} cannot run here: {reason}")
        if importlib.util.find_spec("torch") is None:
            raise BackendUnavailable(
                "soak trains with torch, which is not installed; pip install 'scfa-core[torch]'"
            )
        import torch

        self.torch: Any = torch
        self.backend = backend
        self.cuda = getattr(load_backend(backend), "memory", "host") == "cuda"
        self.rows = rows or (CUDA_ROWS if self.cuda else HOST_ROWS)
        self.device = "cuda" if self.cuda else "cpu"
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.sizes = CUDA_SIZES if self.cuda else HOST_SIZES
        self.pools = [self._pool(sizes, 2 * self.rows) for sizes in self.sizes]
        self.drawn: Counter[str] = Counter()
        self.lengths: set[tuple[int, int]] = set()
        self.marks = Marks(self.cuda)
        self.done = self.compared = self.changed = 0
        self.kernels: int | None = None  # after the warm-up
        self.began: float | None = None
        self.graph: dict[str, Any] = {}

    def _pool(self, sizes: Sizes, rows: int) -> tuple[Any, ...]:
        """q, k, v and dout, so many rows of each: problems are windows into them."""
        dtype = getattr(self.torch, sizes.dtype)
        return tuple(
            self.torch.randn((sizes.batch, heads, rows, sizes.head_dim), device=self.device).to(
                dtype
            )
            for heads in (sizes.heads, sizes.heads_kv, sizes.heads_kv, sizes.heads)
        )

    def ids(self, shape: tuple[int, ...], groups: int, dtype: str = "int32") -> Any:
        """Random group ids."""
        kind = getattr(self.torch, dtype)
        return self.torch.randint(0, groups, shape, device=self.device, dtype=kind)

    def pattern(self, name: str, sizes: Sizes, seqlen_q: int, seqlen_k: int) -> pt.Pattern:
        """Draw a pattern."""
        q_shape = (sizes.batch, sizes.heads, seqlen_q)
        k_shape = (sizes.batch, sizes.heads_kv, seqlen_k)
        groups = self.random.choice((1, 2, 5, 16, 100))
        if name in ("hash", "wide-hash", "hash-window"):
            dtype = "int64" if name == "wide-hash" else "int32"
            hashes = [self.ids(shape, groups, dtype) for shape in (q_shape, k_shape)]
            pattern: pt.Pattern = pt.HashSparse(*hashes)
            window = pt.SlidingWindow(self.random.randint(1, self.rows))
            return pattern & window if name == "hash-window" else pattern
        if name == "keep":
            share = self.random.random()
            keeps = [
                self.torch.rand(shape, device=self.device) < share for shape in (q_shape, k_shape)
            ]
            return pt.QKSparse(*keeps)
        if name == "window":
            return pt.SlidingWindow(self.random.randint(1, self.rows))
        if name == "documents":
            ids = [self.ids((s[0], s[2]), groups).sort().values for s in (q_shape, k_shape)]
            return pt.Documents(*ids)
        if name == "ranges":
            start = self.ids(q_shape, seqlen_k)
            return pt.KeyRanges(start, start + self.random.randint(0, seqlen_k))
        return pt.Causal()

    def step(self, number: int, seqlen_q: int, seqlen_k: int) -> None:
        """One step of training: forward and backward through autograd, all memory given back."""
        kind = number % len(self.sizes)
        name = PATTERNS[number // len(self.sizes) % len(PATTERNS)]
        sizes = self.sizes[kind]
        first = self.random.randint(0, self.rows)
        q, k, v, dout = (
            x[:, :, first : first + length]
            for x, length in zip(
                self.pools[kind], (seqlen_q, seqlen_k, seqlen_k, seqlen_q), strict=True
            )
        )
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        pattern = self.pattern(name, sizes, seqlen_q, seqlen_k)
        out = attention(q, k, v, pattern, backend=self.backend)
        self.torch.autograd.grad(out, (q, k, v), dout)
        self.drawn[name] += 1
        self.lengths.add((seqlen_q, seqlen_k))

    def draw_lengths(self) -> tuple[int, int]:
        """Lengths of queries and keys; equal ones half of the time."""
        seqlen_q, seqlen_k = (self.random.randint(1, self.rows) for _ in "qk")
        return (seqlen_q, seqlen_q) if self.random.random() < 0.5 else (seqlen_q, seqlen_k)

    def warm_up(self) -> None:
        """Meet every pattern and kind of problem, with the shortest and the longest lists."""
        try:
            for lengths in ((self.rows, self.rows), (1, self.rows), (self.rows, 1)):
                for number in range(len(self.sizes) * len(PATTERNS)):
                    self.step(number, *lengths)
        finally:
            self.drawn.clear()
            self.lengths.clear()

    def fixed_problems(self) -> list[Callable[[], tuple[Any, ...]]]:
        """Calls whose results, plans included, must never change by a bit."""
        fixed = [
            self._fixed(pool, self.rows, self.pattern(name, sizes, self.rows, self.rows))
            for sizes, pool in zip(self.sizes, self.pools, strict=True)
            for name in ("hash", "ranges")
        ]
        for sizes in CUDA_LONG if self.cuda else ():
            pool = self._pool(sizes, CUDA_LONG_ROWS)
            fixed.append(self._fixed(pool, CUDA_LONG_ROWS, pt.Causal()))
        return fixed

    def _fixed(
        self, pool: tuple[Any, ...], rows: int, pattern: pt.Pattern
    ) -> Callable[[], tuple[Any, ...]]:
        q, k, v, dout = (x[:, :, :rows] for x in pool)

        def run() -> tuple[Any, ...]:
            plan = make_plan(pattern, q, k, backend=self.backend)
            out, lse = attention(q, k, v, plan, return_lse=True, backend=self.backend)
            grads = attention_backward(dout, q, k, v, out, lse, plan, backend=self.backend)
            return plan.q_index, plan.k_index, plan.key_start, plan.key_end, out, lse, *grads

        return run

    def same_bits(self, left: tuple[Any, ...], right: tuple[Any, ...]) -> Any:
        """A tensor on the device, true if all is equal bit by bit."""
        words = {2: self.torch.int16, 4: self.torch.int32}
        equal = [
            (a.view(words[a.element_size()]) == b.view(words[b.element_size()])).all()
            for a, b in zip(left, right, strict=True)
        ]
        return self.torch.stack(equal).all()

    def run_steps(self, steps: int, deadline: float) -> None:
        """Take the steps."""
        fixed = self.fixed_problems()
        self.warm_up()
        right = [run() for run in fixed]
        self.kernels, self.began = compiled_kernels(self.backend), time.monotonic()
        while self.done < steps and time.monotonic() < deadline:
            self.step(self.done, *self.draw_lengths())
            self.done += 1
            if self.done % PROBE_EVERY == 0 or self.done == steps:
                self.marks.look(self.done)
                for run, expected in zip(fixed, right, strict=True):
                    self.changed += not self.same_bits(run(), expected)
                    self.compared += 1

    def seen(self) -> dict[str, Any]:
        """What was seen in the steps taken so far, with the complaints."""
        kernels = compiled_kernels(self.backend) if self.kernels is None else self.kernels
        added = compiled_kernels(self.backend) - kernels
        complaints = self.marks.complaints()
        if self.changed:
            text = f"{self.changed} of {self.compared} results of fixed problems changed"
            complaints.append(text)
        if added:
            complaints.append(f"{added} kernels more than the {kernels} after the warm-up")
        return {
            "steps": self.done,
            "seconds": 0.0 if self.began is None else round(time.monotonic() - self.began, 1),
            "pairs of lengths": len(self.lengths),
            "patterns": dict(self.drawn),
            "fixed problems": {"compared": self.compared, "changed": self.changed},
            "kernels": {"after the warm-up": kernels, "added": added},
            "memory": self.marks.as_json(),
            "growth is judged": self.marks.judged,
            "complaints": complaints,
        }

    def run_graph(self, replays: int, deadline: float) -> None:
        """Replay one captured step with new hashes and values, each time held against eager."""
        torch, start = self.torch, time.monotonic()
        sizes = self.sizes[0]
        tensors = tuple(x[:, :, : self.rows].contiguous() for x in self.pools[0])
        hashes = [
            self.ids((sizes.batch, heads, self.rows), 5) for heads in (sizes.heads, sizes.heads_kv)
        ]
        run = self._fixed(tensors, self.rows, pt.HashSparse(*hashes))
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        different = torch.zeros((), dtype=torch.int64, device=self.device)
        done = 0

        def note() -> None:
            count = int(different)
            self.graph = {
                "replays": done,
                "seconds": round(time.monotonic() - start, 1),
                "different from eager": count,
                "complaints": [f"{count} of {done} replays differ from eager"] if count else [],
            }

        try:
            while done < replays and time.monotonic() < deadline:
                groups = self.random.randint(1, 64)
                for x in hashes:
                    x.random_(0, groups)
                tensors[done % 4].normal_()
                for x in captured:
                    x.fill_(7)
                graph.replay()
                different += ~self.same_bits(run(), captured)
                done += 1
                if done % 256 == 0:
                    torch.cuda.synchronize()  # the clock counts work done, not work asked for
        except KeyboardInterrupt:
            note()
            raise
        note()


def soak(
    backend: str,
    *,
    steps: int | None = None,
    rows: int | None = None,
    replays: int = 10_000,
    seconds: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Run it all and return what was seen; ``["complaints"]`` is empty if all is well.

    Ctrl-C ends it as its time does: what was seen until then is returned, as ``["interrupted"]``.

    Parameters
    ----------
    backend : str
        Name of one backend, not ``auto``.
    steps : int, optional
        Of training; by default 100,000 on a GPU and 25,000 on the host.
    rows : int, optional
        Longest seqlen drawn; by default 1024 on a GPU and 128 on the host.
    replays : int
        Of a captured graph, which only a GPU has.
    seconds : float, optional
        No replay is begun after a fifth of them, no step after all.
    seed : int
        Of everything drawn.

    Returns
    -------
    found : dict
        Plain values, as JSON takes them.

    Raises
    ------
    UnknownBackend, BackendUnavailable
        No such backend, or it cannot run here; or torch is not installed.
    """
    start = time.monotonic()
    run = Soak(backend, rows, seed)
    if steps is None:
        steps = CUDA_STEPS if run.cuda else HOST_STEPS
    found: dict[str, Any] = {"backend": backend, "rows": run.rows, "seed": seed}
    found["interrupted"] = False
    if run.cuda:
        found["card"] = run.torch.cuda.get_device_name()
    end = start + (float("inf") if seconds is None else seconds)
    try:
        if run.cuda and replays:  # first, as they take seconds: steps have all the time left
            run.run_graph(replays, start + (end - start) / 5)
        run.run_steps(steps, end)
    except KeyboardInterrupt:
        found["interrupted"] = True
    found |= run.seen()
    if not run.done and not found["interrupted"]:
        text = "no step was taken: the warm-up had all the time, give more seconds"
        found["complaints"].append(text)
    graph = dict(run.graph)
    found["complaints"] += graph.pop("complaints", [])
    return found | ({"graph": graph} if graph else {})
