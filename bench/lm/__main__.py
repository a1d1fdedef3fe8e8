"""`python -m bench.lm train | quality | speed | images | coverage | report`: the paper's model."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import time
from pathlib import Path
from typing import Any

from bench.lm import bpe, coverage, images, quality, report, speed
from bench.lm.config import PRESETS, Config
from bench.lm.data import Corpus, as_words, load_corpus
from bench.lm.places import by_place
from bench.lm.train import Trainer, World, log_line, world
from scfa_core.terminal import Terminal


def _options(parser: argparse.ArgumentParser, preset: str, *set_by_command: str) -> None:
    """Add every field of `Config` as an option over a preset."""
    parser.add_argument("--preset", choices=PRESETS, default=preset)
    parser.add_argument("--text", type=Path, help="a file or folder instead of installed sources")
    for field in dataclasses.fields(Config):
        if field.name in set_by_command:
            continue
        kind: Any = type(field.default) if field.default is not None else str
        name = f"--{field.name.replace('_', '-')}"
        if field.name == "softmax_scale":
            kind = float
        if kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=None)
        else:
            parser.add_argument(name, type=kind, default=None)


def _config(args: argparse.Namespace) -> Config:
    given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(Config)}
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(PRESETS[args.preset], **chosen)


def _train(args: argparse.Namespace, where: World) -> None:
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
    trainer.warm_up()
    begin = time.monotonic()

    def time_is_left() -> bool:
        if args.minutes == math.inf:
            return True
        return where.agree(time.monotonic() - begin) < args.minutes * 60

    terminal = Terminal() if where.leads else Terminal(io.StringIO())
    with terminal.progress(config.attention, config.steps - trainer.step) as bar:
        words = ""
        while trainer.share() < 1 and time_is_left():
            loss = trainer.train_step()
            if trainer.step % quality.SAMPLED_EVERY == 0:
                nats = float(loss)
                rate = trainer.step * config.tokens_per_step / max(trainer.seconds, 1e-9)
                words = f"loss {nats:.4f}  {nats / math.log(2):.4f} bits  {rate:,.0f} tokens/s"
            if where.leads:
                bar.advance(words)
                if trainer.step % args.every == 0:
                    validation = trainer.validate()
                    log_line(log, step=trainer.step, seconds=trainer.seconds, train=float(loss),
                             validation=validation)  # fmt: skip
                    trainer.save(checkpoint)
    if where.leads:
        validation = trainer.validate()
        trainer.save(checkpoint)
        print(f"{folder}: step {trainer.step}, validation {validation:.4f} nats")


def _commit(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the sources in a result."""
    parser.add_argument("--commit", help="name of the sources, where git cannot tell")


def _tokens(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a token is."""
    parser.add_argument("--tokens", choices=["byte", "bpe"], default="byte")
    parser.add_argument(
        "--bpe-folder", type=Path, help="keeps the tokeniser and the tokens of --tokens bpe"
    )


def _by_tokens(args: argparse.Namespace, corpus: Corpus) -> tuple[Config, Corpus]:
    """Configuration and corpus by bytes or by the tokens asked for."""
    config = _config(args)
    if args.tokens == "byte":
        return config, corpus
    if args.bpe_folder is None:
        raise SystemExit("--tokens bpe needs --bpe-folder, where the tokeniser is kept")
    vocabulary = args.vocabulary or bpe.VOCABULARY
    corpus = bpe.as_bpe(corpus, vocabulary, args.bpe_folder)
    return dataclasses.replace(config, vocabulary=vocabulary), corpus


def _quality(args: argparse.Namespace, where: World) -> None:
    """Train several variants for equal seconds or steps, with validation losses on the way."""
    begin = time.perf_counter()
    corpus = load_corpus(args.text, limit=args.corpus_bytes)
    size = (len(corpus.train) + len(corpus.validation)) / 1e6
    print(f"corpus: {size:.0f} MB of {corpus.files} files, {time.perf_counter() - begin:.1f} s")
    config, corpus = _by_tokens(args, corpus)
    if args.tokens != "byte":
        took = time.perf_counter() - begin
        print(f"tokens: {corpus.bytes_per_token:.2f} bytes each, after {took:.1f} s")
    quality.run(
        config,
        corpus,
        where,
        finish=lambda trainer: {"by_place": by_place(trainer, quality.VALIDATION_BATCHES)},
        **_run_options(args),
    )


def _images(args: argparse.Namespace, where: World) -> None:
    """Train variants on images as sequences of pixels; keep images that each draws."""
    found = images.load_images(args.data)
    config = _config(args)
    sequences = args.micro_batch or max(config.tokens_per_step // config.seqlen, 1)
    config = dataclasses.replace(config, vocabulary=found.levels + 1, micro_batch=sequences)
    quality.run(
        config,
        found.corpus,
        where,
        finish=lambda trainer: images.facts(found, trainer),
        **_run_options(args),
    )


def _coverage(args: argparse.Namespace, where: World) -> None:
    """Count which pairs of a bucket the Reformer's chunks keep, for random and real queries."""
    coverage.run(
        _config(args),
        load_corpus(args.text, limit=args.corpus_bytes),
        where,
        lengths=args.lengths,
        buckets=args.buckets,
        chunks=args.chunks,
        draws=args.draws,
        json_path=args.json,
        commit=args.commit,
    )


def _speed(args: argparse.Namespace, where: World) -> None:
    """Time whole training steps of several variants in one process, dense and bound beside ours."""
    base = _config(args)
    corpus = as_words(load_corpus(args.text, limit=4_000_000), base.vocabulary)
    speed.run(
        base,
        corpus,
        where,
        lengths=args.lengths,
        variants=args.variants,
        warm=args.warm,
        repeats=args.repeats,
        rounds=args.rounds,
        profiled=args.lengths if args.profile == [] else args.profile or [],
        graph=args.modes,
        budget=args.budget,
        json_path=args.json,
        commit=args.commit,
    )


def _report(args: argparse.Namespace, where: World) -> None:
    """Write the page and its plots from stored JSON."""
    records = [json.loads(path.read_text()) for path in args.records]
    report.write(records, args.page, args.plots)


def _runs(parser: argparse.ArgumentParser, json_path: Path) -> None:
    """Add the options of a command that trains variants and seeds into one file."""
    parser.add_argument("--variants", nargs="+", default=["dense", "hash16", "drop50"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--points", type=int, default=12, help="validations of a run")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds of this sitting")
    parser.add_argument("--json", type=Path, default=json_path, help="results; runs are added")
    parser.add_argument(
        "--checkpoints", type=Path, help="folder from which runs go on where a sitting stopped"
    )
    _commit(parser)


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `quality.run` takes of the options that `_runs` adds."""
    names = ("variants", "seeds", "points", "budget", "checkpoints", "commit")
    return {name: getattr(args, name) for name in names} | {"json_path": args.json}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.lm", description=__doc__)
    commands = parser.add_subparsers(required=True)

    one = commands.add_parser("train", help=_train.__doc__)
    _options(one, "paper")
    one.add_argument("--out", type=Path, default=Path("lm-runs"))
    one.add_argument("--minutes", type=float, default=math.inf, help="of this sitting")
    one.add_argument("--every", type=int, default=50, help="steps between validations")
    one.set_defaults(run=_train)

    two = commands.add_parser("quality", help=_quality.__doc__)
    _options(two, "small", "attention", "seed")
    _tokens(two)
    _runs(two, Path("lm-quality.json"))
    two.add_argument("--corpus-bytes", type=int, default=200_000_000)
    two.set_defaults(run=_quality)

    three = commands.add_parser("speed", help=_speed.__doc__)
    _options(three, "paper", "attention", "seqlen", "micro_batch", "steps", "seconds", "graph")
    three.add_argument("--lengths", nargs="+", type=int, default=[16384, 8192, 32768])
    three.add_argument("--variants", nargs="+", default=["dense", "none", "hash16"])
    three.add_argument("--warm", type=int, default=3)
    three.add_argument("--repeats", type=int, default=8)
    three.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="2 or more: variants of a length in memory together, timed in turn",
    )
    three.add_argument(
        "--profile", nargs="*", type=int, help="kernels by time, at these lengths or at all"
    )
    three.add_argument(
        "--graph",
        dest="modes",
        nargs="?",
        const="both",
        default="no",
        choices=speed.MODES,
        help="time steps replayed as CUDA graphs beside those enqueued as usual, or only them",
    )
    three.add_argument("--budget", type=float, default=math.inf, help="seconds")
    three.add_argument("--json", type=Path)
    _commit(three)
    three.set_defaults(run=_speed)

    four = commands.add_parser("images", help=_images.__doc__)
    _options(four, "digits", "attention", "seed", "vocabulary", "packed")
    _runs(four, Path("lm-images.json"))
    four.add_argument("--data", type=Path, help="an .npz with 'images', not scikit-learn's digits")
    four.set_defaults(run=_images)

    five = commands.add_parser("coverage", help=_coverage.__doc__)
    _options(five, "small", "seqlen")
    five.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192, 16384])
    five.add_argument("--buckets", nargs="+", type=int, default=[8, 16, 32])
    five.add_argument(
        "--chunks",
        nargs="+",
        type=int,
        default=[coverage.TWICE, 64],
        help="rows of a chunk; 0: twice the mean bucket",
    )
    five.add_argument("--draws", type=int, default=4, help="of directions, averaged")
    five.add_argument("--corpus-bytes", type=int, default=20_000_000)
    five.add_argument("--json", type=Path)
    _commit(five)
    five.set_defaults(run=_coverage)

    six = commands.add_parser("report", help=_report.__doc__)
    six.add_argument("records", nargs="+", type=Path)
    six.add_argument("--page", type=Path, required=True)
    six.add_argument("--plots", type=Path, required=True)
    six.set_defaults(run=_report)

    args = parser.parse_args()
    with world() as where:
        args.run(args, where)


if __name__ == "__main__":
    main()
