"""`python -m bench.lm train ...` trains and resumes; `python -m bench.lm speed ...` times steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.lm.config import PRESETS, Config
from bench.lm.data import load_corpus
from bench.lm.train import Trainer, World, log_line, world


def _options(parser: argparse.ArgumentParser) -> None:
    """Add every field of `Config` as an option over a preset."""
    parser.add_argument("--preset", choices=PRESETS, default="paper")
    parser.add_argument("--text", type=Path, help="a file or folder instead of installed sources")
    for field in dataclasses.fields(Config):
        kind: Any = type(field.default) if field.default is not None else str
        name = f"--{field.name.replace('_', '-')}"
        if field.name == "softmax_scale":
            kind = float
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(name, type=kind, default=None)


def _config(args: argparse.Namespace, **changes: Any) -> Config:
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config)}
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(PRESETS[args.preset], **(chosen | changes))


def train(args: argparse.Namespace, where: World) -> None:
    """Train to the end of the schedule or of the time given; resume if there is a checkpoint."""
    config = _config(args)
    corpus = load_corpus(args.text)
    trainer = Trainer(config, corpus, where)
    folder = args.out / f"{config.attention}-{config.fingerprint()}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / "checkpoint.pt", folder / "log.jsonl"
    if checkpoint.exists():
        trainer.resume(checkpoint)
    if where.leads and not log.exists():
        log_line(log, config=dataclasses.asdict(config), corpus=corpus.sha256, files=corpus.files)
    begin = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not where.leads) as progress:
        bar = progress.add_task(config.attention, total=config.steps, completed=trainer.step)
        while trainer.step < config.steps and time.monotonic() - begin < args.minutes * 60:
            loss = trainer.train_step()
            bits = loss / math.log(2)
            speed = trainer.step * config.tokens_per_step / max(trainer.seconds, 1e-9)
            words = f"{config.attention}  loss {loss:.4f}  {bits:.4f} bits  {speed:,.0f} tokens/s"
            progress.update(bar, completed=trainer.step, description=words)
            if where.leads and trainer.step % args.every == 0:
                validation = trainer.validate()
                log_line(log, step=trainer.step, seconds=trainer.seconds, train=loss,
                         validation=validation, tokens_per_second=speed)  # fmt: skip
                trainer.save(checkpoint)
    if where.leads:
        trainer.save(checkpoint)
        print(f"{folder}: step {trainer.step}, validation {trainer.validate():.4f} nats")


def speed(args: argparse.Namespace, where: World) -> None:
    """Time whole training steps of several variants in one process, dense and bound beside ours."""
    corpus = load_corpus(args.text, limit=4_000_000)
    rows = []
    for seqlen in args.lengths:
        for name in args.variants:
            config = _config(args, attention=name, seqlen=seqlen, steps=10**6)
            config = dataclasses.replace(config, micro_batch=config.tokens_per_step // seqlen)
            torch.compiler.reset()
            trainer = Trainer(config, corpus, where)
            times = []
            for step in range(args.warm + args.repeats):
                begin = time.perf_counter()
                trainer.train_step()
                if where.device.startswith("cuda"):
                    torch.cuda.synchronize()
                if step >= args.warm:
                    times.append(1e3 * (time.perf_counter() - begin))
            row = {"seqlen": seqlen, "variant": name, "ms": statistics.median(times)}
            rows.append(row)
            print(f"T={seqlen:6d} {name:18s} {row['ms']:8.1f} ms/step", flush=True)
            del trainer
            if where.device.startswith("cuda"):
                torch.cuda.empty_cache()
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.lm", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train", help=train.__doc__)
    _options(one)
    one.add_argument("--out", type=Path, default=Path("lm-runs"))
    one.add_argument("--minutes", type=float, default=math.inf)
    one.add_argument("--every", type=int, default=50, help="steps between validations")
    one.set_defaults(run=train)
    two = commands.add_parser("speed", help=speed.__doc__)
    _options(two)
    two.add_argument("--lengths", nargs="+", type=int, default=[8192])
    two.add_argument("--variants", nargs="+", default=["dense", "hash16", "none"])
    two.add_argument("--warm", type=int, default=4)
    two.add_argument("--repeats", type=int, default=10)
    two.add_argument("--json", type=Path)
    two.set_defaults(run=speed)
    args = parser.parse_args()
    with world() as where:
        args.run(args, where)


if __name__ == "__main__":
    main()
