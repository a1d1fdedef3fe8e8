"""What ``scfa demo`` does, in order: text, warm-up, training, comparison with truth, pictures."""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from dataclasses import replace
from pathlib import Path

import torch

import scfa_core as scfa
from scfa_core.demo import training
from scfa_core.demo.model import (
    LanguageModel,
    Size,
    Variant,
    sparse_attend,
    torch_dense,
    variants,
)
from scfa_core.demo.text import read_text
from scfa_core.terminal import Terminal

CPU_SIZES = [Size(seqlen) for seqlen in (8192, 4096, 2048)]
GPU_SIZES = [Size(seqlen, batch=2, layers=4, heads=8) for seqlen in (16384, 8192, 4096)]
GROWTH = 3.0  # a step's time, at most, when seqlen doubles: dense attention alone would make it 4
WORTHWHILE_STEPS, MOST_STEPS = 30, 200  # a longer seqlen is not worth fewer; more are not needed
TRAINING_SHARE = 0.8  # of the time budget, warm-up included; the rest is for the comparison
BASELINE_STEPS = 8
WARM_UP = 3
MARKS = 6  # columns of the table of losses
BASELINE = "torch dense"


def choose_device(backend: str | None) -> str:
    """The GPU if torch and a backend of ours can use it, else the CPU."""
    states = scfa.backends()
    on_gpu = [name for name in ("cupy", "numba-cuda") if states[name] == "available"]
    if backend is not None:
        if states[backend] != "available":
            raise scfa.BackendUnavailable(f"--backend {backend}: {states[backend]}")
        device = "cuda" if backend in ("cupy", "numba-cuda") else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise scfa.BackendUnavailable(f"--backend {backend}: this torch finds no GPU")
        return device
    return "cuda" if on_gpu and torch.cuda.is_available() else "cpu"


def run(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run the demo; the exit code is 0 unless a deviation is beyond what the dtype explains."""
    began = time.perf_counter()
    device = choose_device(options.backend)
    folder = Path(options.out)
    if importlib.util.find_spec("matplotlib") is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise scfa.ScfaError(f"--out {folder}: cannot be made a folder: {error}") from error
    text, source = read_text(options.text, options.seed)
    terminal.print(f"text      {source}")
    _introduce_backend(terminal, device, options.backend)
    sizes = CPU_SIZES if device == "cpu" else GPU_SIZES
    if options.seqlen:
        sizes = [replace(sizes[0], seqlen=options.seqlen)]

    deadline = began + TRAINING_SHARE * options.time_budget
    shortest = training.Corpus(text, sizes[-1], device, options.seed)
    size, planned = sizes[0], options.steps
    if planned is None:
        size, planned = _affordable(terminal, shortest, sizes, deadline, options)
    else:
        deadline = math.inf
    corpus = training.Corpus(text, size, device, options.seed)
    terminal.print(
        f"model     {size.layers} layers of {size.heads} heads of {size.head_dim}, "
        f"{size.batch} x {size.seqlen} bytes a step, up to {planned} steps; keys are normalised "
        "queries, no byte sees itself\n"
    )
    kinds = variants(size)
    trainers = _train(terminal, corpus, kinds, planned, deadline, options)
    runs, models = [t.run for t in trainers[:-1]], [t.model for t in trainers[:-1]]
    baseline = trainers[-1].run
    _report(terminal, size, runs, baseline)
    fine = _compare(terminal, corpus, kinds, models, options.backend)
    _draw(terminal, folder, runs, kinds[0], models[0], corpus, options.backend)
    terminal.print(f"\ntotal {time.perf_counter() - began:.0f} s")
    return 0 if fine else 1


def _introduce_backend(terminal: Terminal, device: str, backend: str | None) -> None:
    probe = torch.zeros((1, 1, 16, 64), device=device)
    plan = scfa.make_plan(scfa.Causal(), probe, probe, backend=backend)
    where = "CPU, float32" if device == "cpu" else torch.cuda.get_device_name() + ", bfloat16"
    terminal.print(f"backend   {plan.backend} ({where}, {torch.get_num_threads()} CPU threads)")


def _affordable(
    terminal: Terminal,
    shortest: training.Corpus,
    sizes: list[Size],
    deadline: float,
    options: argparse.Namespace,
) -> tuple[Size, int]:
    """The longest sequences, of `sizes` from long to short, that leave time for enough steps.

    Measured on the shortest, after its kernels are compiled, and taken to grow by `GROWTH`.
    """
    first, later = 0.0, 0.0
    for kind in variants(shortest.size):
        attend = sparse_attend(kind, options.backend)
        probe = training.Trainer(kind.name, attend, shortest, WARM_UP)
        for _ in range(WARM_UP):
            probe.step()
        first += probe.run.seconds[0]
        later += min(probe.run.seconds[1:])
    terminal.print(
        f"warm-up   first steps {first:.1f} s (kernels are compiled once and kept on disk), then "
        f"{later:.2f} s for a step of each at seqlen {shortest.size.seqlen}"
    )
    left = deadline - time.perf_counter()
    for size in sizes:
        expected = later * GROWTH ** math.log2(size.seqlen / shortest.size.seqlen)
        steps = int(left / expected)
        if steps >= WORTHWHILE_STEPS:
            break
    return size, min(max(steps, 1), MOST_STEPS)


def _train(
    terminal: Terminal,
    corpus: training.Corpus,
    kinds: list[Variant],
    planned: int,
    deadline: float,
    options: argparse.Namespace,
) -> list[training.Trainer]:
    """Train all variants in turn, step by step: whatever else the machine does, all feel it alike.

    All take as many steps, fewer than planned if the deadline comes first. torch's own dense
    attention, the last, takes only the first few: it is there for its speed and its losses.
    """
    trainers = [
        training.Trainer(kind.name, sparse_attend(kind, options.backend), corpus, planned)
        for kind in kinds
    ]
    baseline = training.Trainer(BASELINE, torch_dense, corpus, planned)
    with terminal.progress("training", planned) as progress:
        for step in range(planned):
            if step and time.perf_counter() > deadline:
                break
            losses = [f"{trainer.run.name} {trainer.step():.3f}" for trainer in trainers]
            if step < BASELINE_STEPS:
                baseline.step()
            progress.advance("loss: " + ", ".join(losses))
    for trainer in trainers:
        trainer.run.held_out = training.held_out_loss(trainer.model, corpus)
    return [*trainers, baseline]


def _report(
    terminal: Terminal, size: Size, runs: list[training.Run], baseline: training.Run
) -> None:
    """Losses along the way, speed, and the dense variant against torch."""
    from scfa_core.demo.pictures import smoothed

    steps = len(runs[0].losses)
    marks = sorted({1 + round(i * (steps - 1) / (MARKS - 1)) for i in range(MARKS)})
    terminal.print("\nloss, nats per byte (mean of 9 steps around)")
    rows = []
    for done in runs:
        curve = smoothed(done.losses)
        rows.append([done.name, *(f"{curve[m - 1]:.3f}" for m in marks), f"{done.held_out:.3f}"])
    terminal.table(("attention", *(f"step {m}" for m in marks), "held out"), rows)

    tokens = size.batch * size.seqlen
    reference_speed = tokens / baseline.step_seconds()
    rows = []
    for done in [*runs, baseline]:
        speed = tokens / done.step_seconds()
        rows.append([done.name, f"{speed:,.0f}", f"{speed / reference_speed:.2f}x"])
    terminal.print(f"\nspeed of whole training steps at seqlen {size.seqlen}")
    terminal.table(("attention", "tokens/s", f"against {BASELINE}"), rows)
    dense = next(done for done in runs if done.name == "dense")
    pairs = zip(dense.losses, baseline.losses, strict=False)
    gap = max(abs(a - b) for a, b in pairs)
    terminal.print(
        f"dense against {BASELINE}: losses of the first {len(baseline.losses)} steps "
        f"differ by at most {gap:.1e}"
    )


def _compare(
    terminal: Terminal,
    corpus: training.Corpus,
    kinds: list[Variant],
    models: list[LanguageModel],
    backend: str | None,
) -> bool:
    """Hold each variant against the float64 reference on tensors of its own trained model."""
    limit = 1e-4 if corpus.device == "cpu" else 5e-2
    rows, largest = [], 0.0
    for kind, model in zip(kinds, models, strict=True):
        tensors = training.captured_tensors(model, corpus)
        found = training.deviations(kind, tensors, backend)
        largest = max(largest, *found.values())
        rows.append([kind.name, kind.meaning, *(f"{x:.1e}" for x in found.values())])
    terminal.print(
        f"\nlargest deviation from the float64 reference, over the largest entry "
        f"(one trained head, {tensors[0].shape[2]} rows)"
    )
    terminal.table(("attention", "sees", "out", "dq", "dk", "dv"), rows)
    terminal.print(f"largest deviation of all: {largest:.1e} (accepted: {limit:.0e})")
    return largest <= limit


def _draw(
    terminal: Terminal,
    folder: Path,
    runs: list[training.Run],
    kind: Variant,
    model: LanguageModel,
    corpus: training.Corpus,
    backend: str | None,
) -> None:
    """Write the pictures, or say what would."""
    if importlib.util.find_spec("matplotlib") is None:
        terminal.print("\nno pictures: matplotlib is not installed; pip install 'scfa-core[plot]'")
        return
    from scfa_core.demo.pictures import draw_losses

    draw_losses(runs, folder / "losses.png")
    q, k, _ = training.captured_tensors(model, corpus)
    plan = scfa.make_plan(kind.pattern_of(q), q, k, backend=backend)
    plan.plot().savefig(folder / "pattern.png", dpi=120)
    terminal.print(f"\npictures: {folder / 'losses.png'}, {folder / 'pattern.png'}")
