"""The page and its plots from stored JSON alone: what was run, on what, for how long."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lm import curves, pictures
from bench.lm.speed import BOUND, label, table
from bench.looks import COLORS, picture

HEAD = """\
# The paper's language model

Training speed at equal quality was the claim of the paper (arXiv 2306.01160). `python -m bench.lm`
trains its model: a decoder whose keys are the normalised queries, so that query and key of a token
share a bucket, hashed with fresh directions at every step; a token does not see itself in hash
mode. Variants differ by attention alone: `dense` (torch SDPA, on a GPU cuDNN's kernel),
`hash<buckets>`, `drop<percent>` (random queries and keys dropped), `window<keys>`, `blocks<keys>`,
`hash...+window...` (keys of the same bucket and the nearest ones), `...,window<keys>x<heads>` (the
last so many heads see a window, the others what stands before the comma),
`hash...,blocks<keys>x<heads>` (the last heads see the earlier rows of their block of so many,
blocks of each head beginning elsewhere: groups like buckets, so that one call does for all heads),
`chosen<rows>x<top>` (MoBA: the row's block of so many as far as itself, and those before it whose
mean key it scores highest), `naive` (masked, all scores in memory), `reformer<buckets>`, and
`none`: attention replaced by the sum of queries, keys and values, which nothing can beat in speed.
`densek`, `window<keys>k`, `blocks<keys>k`, `chosen<rows>x<top>k`, `drop<percent>k` and
`hash<buckets>k` (`ek`, `rk`; before a comma, too) project keys of their own, and hash them apart
from the queries, by the same directions; the others share the paper's projections. Of these a row
sees itself, as with `dense`, unless the name ends with "o" for others (`denseo`, by this package's
kernels, `window<keys>o`, `drop<percent>o`), as hash and blocks hide it.

The queries of a layer have much in common, so that an angular hash puts most of them into few
buckets, and the more so the deeper the layer: the work is then a multiple of what even buckets
would cost. `hash<buckets>c` hashes queries about the running mean of earlier steps, and
`hash<buckets>w` divides by their covariance as well. From step to step that mean moves by a good
part of the queries' spread, so that both come too late. `hash<buckets>r` subtracts the mean of
the earlier rows of the same sequence (by blocks of 64 rows; the last step's mean counts as 16 rows
more, to begin with) and divides by the covariance, of earlier steps, of what is left.
`hash<buckets>e` does that and gives less to buckets that those rows filled. None looks at later
rows of the sequence. The tables name the multiple (bucket cost; 1 is even, the number of
buckets is dense attention). Queries that rotary positions turn before they are hashed fill buckets
nearly evenly without any of this (the last section).

Text is the standard library of Python and the installed packages of the machine, by bytes,
deduplicated, split by file; a run records the hash of its corpus. Packages copy from each other, so
validation files are not strangers to training: read losses against each other, not against those of
other corpora. `--tokens bpe` takes a byte-pair tokeniser trained on the training split instead.
Steps are timed on the same text by words hashed to the model's vocabulary, so that their
frequencies, and with them the buckets, are like a tokeniser's. Where variants took turns, the card
is warm: a step without attention, which is at the card's power limit, then takes 55 ms where a cool
one gives 52, and one with hashing 60 for 58.

This page is made by `python -m bench.lm report` from stored JSON (`bench/results/`, where the files
of earlier kernels lie as well; the log tells of them). In order: the paper's 12 layers at T=8192 to
32768, beside an H100 with earlier kernels; the same as one CUDA graph a step, which leaves the host
little to do (`--graph` of the other commands trains so); quality by tokens at T=16384, 165 seconds
each, to be called again until a file holds all seeds; the paper's model with checkpoints, resumed
where it stopped; images; pairs that the Reformer keeps; this page.

```text
python -m bench.lm speed --rounds 5 --json speed.json
python -m bench.lm speed --graph --lengths 16384
python -m bench.lm quality --seconds 165 --layers 12 --tokens bpe --vocabulary 16384 \\
    --bpe-folder tokens --seqlen 16384 --micro-batch 2 --graph \\
    --variants dense densek window128k hash16e hash16ek,blocks256x6 --json quality.json
python -m bench.lm train --attention hash16 --out runs
python -m bench.lm images --seconds 60 --json images.json
python -m bench.lm coverage --json coverage.json
python -m bench.lm report speed.json quality.json ... --page page.md --plots img
```"""
NO_GPU = (
    "**Not from a GPU.** This ran on a CPU that other work shared, a small model for a short time: "
    "it shows that the trainer works and how buckets crowd. It says nothing about the paper's "
    "claim, and its seconds are no measure of speed."
)
SPEED = """\
What 92 % of the bound, the aim, would take: of the paper's model, attention over 16 even buckets is
1.1, 2.2 and 4.3 times 10^12 flop a step at T=8192, 16384 and 32768 (visible pairs, forward and
backward), and 92 % leave 4.5 ms for it, for hashing and for planning. That is 240, 490 and
960 TFLOP/s. An H200 multiplies matrices at 720 to 790 here: at T=32768 no kernel can reach it.
Where three of twelve heads are hashed and nine see blocks of 256 neighbours, 94, 93 and 90 % are
reached, and the 1.6, 2.2 and 3.5 times the speed of dense attention that were aimed at.

Two patterns a layer, or four, cost as many calls (third table): a hash and a window, whose
buckets held 5 to 7 times the pairs of even ones, and `chosen256x3`, the own block of 256 rows and
the three earlier ones that a query scores highest."""
QUALITY = """\
By tokens on one H200; rows are turned by their places (rotary positions) before they are hashed, as
in the layers of `scfa_core.nn`. First T=16384 and 165 seconds each:

- The paper's attention, 16 buckets in all heads and keys that are the normalised queries, ends at
  2.141 and 2.247 nats (`hash16`, two seeds), dense attention over the same projections at 3.109 and
  3.150: it takes 2.5 times as long for a step. At equal steps the hash is 0.10 ± 0.03 behind (step
  1550), and 0.13 at the end of a schedule of as many steps (`hash16e` 3.241 after 2060, second
  table, dense 3.109 after 2064).
- A hash that follows the past (`hash16e`, 2.234) is no better, but keeps its buckets even: a plain
  hash costs 1.3 to 1.4 times even buckets by the end, 1.1 at first. The longer the training, the
  more that is worth.
- With keys of their own, as models without a hash have, both end lower: `hash16ek` at 2.022,
  `densek` at 2.422. At step 1520 the hash is behind by 0.68: it gains in seconds, not in steps.
- Two hashed heads and six that see blocks of neighbours end lowest: `hash16k,blocks256x6` at 1.736,
  `hash16ek,blocks256x6` at 1.783 and 1.836 (two seeds). They need no more steps for it than dense
  attention: 2.385 after 2060 (second table), `densek` 2.422 after 2024.
- Blocks that queries choose (`chosen256x3k`, own block and three of 256 rows, as MoBA does) end at
  2.009: below dense attention and buckets alone, above a window of 128 keys.
- Far rows of a bucket add something to near ones: a window alone (`window128k`) ends at 1.862 and
  1.877, 0.04 to 0.13 above, though it takes 4 to 5 % more steps in that time. By place the
  difference to the better hash is 0.06 in the first 1024 tokens, 0.13 beyond 8192. Seeds differ by
  0.01 to 0.11.

At T=8192, 60 seconds each, every sparse variant ends below dense attention (3.484), one seed: 8, 16
and 32 buckets at 2.792, 2.793 and 2.865, of queries and keys dropped at random 30, 50 and 70 % at
3.339, 3.263 and 3.361. At equal steps (780) they are above: hashes by 0.05 to 0.07, dropping by
0.13 to 0.22. The Reformer with 16 buckets takes 4.9 times as long for a step as exact attention
over 16 buckets, and ends at 4.553; at T=16384 two sequences a pass did not fit the card.

What decides for a hash is that rows are turned first. Until 2026-11-30 they were hashed before, so
that nothing told a bucket where its rows lie: buckets alone ended at 3.535 at T=16384, above dense
attention (`bench/results/lm-quality-h200-tokens.json`). There is also what a row is worth to
itself: a hash and blocks hide it, a window does not unless it is told to, and where keys are the
normalised queries a row's own key is the nearest of all (`window128` 2.202, `window128o` 2.036
there).

Minutes of training are far from an end; the corpus is 57 million tokens, which a window reads three
times in 165 seconds, dense attention once. Equal seconds are the user's; where runs differ in steps
taken, the table at equal steps says what a step is worth."""
SMALL_MODEL = (
    "**The model is small and was trained on a CPU for a short time.** Counts do not depend on the "
    "device, but on how far training has crowded the buckets."
)
EQUAL_STEPS = (
    "The same runs at equal steps, before the learning rate falls (it does in the last fifth of a "
    "run); between two validations on the line through them:"
)
PLACES = (
    "Validation, nats, by the tokens that a sequence holds before: what later tokens cost less is "
    "what a variant makes of the text that it reaches."
)
IMAGES = """\
Pixels in reading order, each one of the grey levels, predicted from those before; the paper did
this with MNIST. A sequence is many images at random, one after the other, so that length can grow
with the images as they are. One image in twenty is kept for validation. The data are small: a long
run learns them by heart, so the lowest validation loss on the way stands beside the last. Pictures
are the model's own, drawn pixel by pixel from an empty sequence, below some of validation.

On an H200, 600 steps each, dense attention ends at 1.90 bits a pixel and 16 buckets in all heads,
where a row sees a sixteenth of its sequence, at 2.08 (those that follow the past, 2.22). The
Reformer with 16 buckets ends at 2.30 and takes 2.4 times the time."""
COVERAGE = """\
Exact hash attention computes all earlier keys of a query's bucket. The Reformer (arXiv 2001.04451)
sorts rows by bucket, cuts them into chunks of equal size and looks at a row's own chunk and the one
before, so that what a bucket holds beyond is lost. (Where its chunks end depends on later rows of
the sequence too; what a row of a hash variant sees does not.) Counted here: pairs kept over pairs
that share a bucket, for one round of hashing with fresh directions, with chunks of twice the mean
bucket (2T/n for n buckets, its paper's rule) and of 64 rows, whatever T. `normal` are random normal
queries, whose buckets are nearly even; the others those of a model on validation text, over all
layers, before and after training, hashed without regard to their mean.

Queries that are turned by their places before they are hashed (first table) fill buckets nearly
evenly, so that chunks of twice the mean bucket lose little; where learned positions are added to
the text (second table) half of a trained model's pairs and more are lost, and the work of exact
hash attention grows. Chunks of 64 rows lose most pairs either way, more with each doubling of T."""


def _machine(facts: dict[str, Any]) -> str:
    """Where and with what."""
    threads = f" ({facts['threads']} threads)" if "threads" in facts else ""
    cuda = f", CUDA {facts['cuda']}" if "cuda" in facts else ""
    return f"{facts['card']}{threads}, torch {facts['torch']}{cuda}"


def _sittings(machines: Sequence[dict[str, Any]]) -> str:
    """Commits and days of what was run."""
    commits = dict.fromkeys(
        facts["commit"] + (" with uncommitted changes" if facts.get("changed") else "")
        for facts in machines
        if facts.get("commit")
    )
    days = " and ".join(sorted({facts["date"][:10] for facts in machines}))
    return f"commit {', '.join(commits)}, {days}" if commits else days


def _unless_gpu(machines: Sequence[dict[str, Any]]) -> list[str]:
    """A warning where nothing ran on a GPU."""
    return [] if any("cuda" in facts for facts in machines) else [NO_GPU]


def _speed_key(record: dict[str, Any], row: dict[str, Any]) -> tuple[Any, ...]:
    """What rows of one table share; sources of other commits are other kernels."""
    facts, config = record["machine"], record.get("config", {})
    model = tuple(config.get(name) for name in ("layers", "heads", "head_dim"))
    scope = row["compile"], row["tokens_per_step"], row.get("steps"), row.get("rounds")
    return (facts["card"], facts["torch"], facts.get("commit"), model, *scope)


def speed_sections(records: Sequence[dict[str, Any]]) -> list[str]:
    """A table of milliseconds for each setting, sittings merged."""
    groups: dict[tuple[Any, ...], dict[int, list[dict[str, Any]]]] = {}
    for nth, record in enumerate(records):
        for row in record["rows"]:
            if "ms" in row:
                group = groups.setdefault(_speed_key(record, row), {})
                group.setdefault(nth, []).append(row)
    parts = []
    for (*_, model, scope, tokens, steps, rounds), sittings in groups.items():
        machines = [records[nth]["machine"] for nth in sittings]
        text = (
            f"Whole steps (forward, backward, clipping, AdamW), median, {tokens} tokens a step, "
            f"compiled: {scope}. In brackets the speed-up over dense and the share of the bound "
            f"`{BOUND}` that is reached, within a sitting. {_machine(machines[0])}, "
            f"{_sittings(machines)}."
        )
        text += " {} layers of {} heads of {}.".format(*model) if all(model) else ""
        text += f" Timed in the last of {steps} steps of training." if steps else ""
        text += f" The variants of a length took turns, {rounds} rounds." if rounds else ""
        if any(row.get("graph") for rows in sittings.values() for row in rows):
            text += " (graph): each step is replayed as one CUDA graph."
        if len(sittings) > 1:
            text += f" {len(sittings)} sittings, medians where several timed the same."
        costs = [
            f"{label(row)} {row['bucket_cost']:.2f} (T={row['seqlen']})"
            for rows in sittings.values()
            for row in rows
            if "bucket_cost" in row
        ]
        if costs:
            text += (
                " Same-bucket pairs over those of even buckets, after the steps of the "
                f"measurement: {', '.join(costs)}."
            )
        parts += [*_unless_gpu(machines), "\n".join(table(list(sittings.values()))), text]
    failed = [
        f"{label(row)} at T={row['seqlen']} ({row['error']})"
        for record in records
        for row in record["rows"]
        if "error" in row
    ]
    return [*parts, *(["Failed: " + "; ".join(failed) + "."] if failed else [])]


PLACED = {
    "learned": "learned positions",
    "rotary": "rotary positions",
    "rotary-first": "rotary positions before rows are hashed",
}


def _setting_words(runs: Sequence[dict[str, Any]]) -> str:
    """What the runs of one table share, and where they were made."""
    done = [run for run in runs if run["done"]]
    first, config = done[0], done[0]["config"]
    equal = f"{config['seconds']:g} seconds of training each"
    data = f"Corpus {first['corpus'][:12]}"
    if "images" in first:
        height, width = first["shape"]
        data = f"{first['images']}, {height}x{width} pixels, {first['levels']} grey levels"
    elif first.get("unit") == "token":
        data += f", by {config['vocabulary']} tokens of {first['bytes_per_token']:.2f} bytes"
    sizes = sorted({f"{run['parameters'] / 1e6:.1f}" for run in done}, key=float)
    text = (
        f"{' or '.join(sizes)} million parameters, {config['layers']} layers of "
        f"{config['heads']} heads of {config['head_dim']}, T={config['seqlen']}, "
        f"{PLACED[config.get('positions', 'learned')]}, {config['tokens_per_step']} tokens a step, "
        f"{'each replayed as one CUDA graph, ' if config.get('graph') else ''}"
        f"{equal if config['seconds'] else 'equal steps'}, {config['schedule']} schedule "
        f"(compilation and validation not counted). ±: standard deviation over seeds. Bucket cost: "
        f"same-bucket pairs over those of even buckets, at the end. {data}. "
        f"{_machine(first['machine'])}, {_sittings([run['machine'] for run in done])}."
    )
    passes = {run["config"]["attention"]: run["config"].get("micro_batch") for run in done}
    usual = statistics.mode(passes.values())
    others = [f"{name} {count}" for name, count in passes.items() if count != usual]
    text += f" Sequences of one pass: {', '.join([str(usual), *others])}." if others else ""
    missing = curves.unfinished(runs)
    return text + (f" Not finished: {'; '.join(missing)}." if missing else "")


def curve_sections(
    groups: Sequence[list[dict[str, Any]]], word: str, plots: Path, home: str
) -> list[str]:
    """Table at the end, table at equal steps and plot of every setting; pictures of images."""
    parts = []
    for nth, runs in enumerate(groups):
        stem = f"lm-{word}-{nth}"
        pictures.save(curves.painter(runs), plots, stem, 2, (9.6, 4.0))
        parts += _unless_gpu([run["machine"] for run in runs])
        parts += ["\n".join(curves.end_table(runs)), _setting_words(runs)]
        for words, more in (
            (EQUAL_STEPS, curves.steps_table(runs)),
            (PLACES, curves.places_table(runs)),
        ):
            parts += [words, "\n".join(more)] if more else []
        parts.append(picture(f"{home}/{stem}", "Validation loss against seconds and steps"))
        first = next((run for run in runs if run["done"] and "samples" in run), None)
        if first is not None:
            rows = {"validation": first["real"]}
            rows |= {
                variant: same[0]["samples"]
                for variant, same in curves.by_variant(runs).items()
                if "samples" in same[0]
            }
            paint = pictures.mosaic(rows, first["shape"], first["levels"])
            pictures.save(paint, plots, f"{stem}-samples", 1, (9.6, 0.55 * len(rows) + 0.3))
            parts.append(picture(f"{home}/{stem}-samples", "Images drawn by each variant"))
    return parts


def coverage_section(record: dict[str, Any], plots: Path, home: str, stem: str) -> list[str]:
    """Share of pairs kept, by queries, buckets and chunks against length."""
    rows, config = record["coverage"], record["config"]
    lengths = sorted({row["seqlen"] for row in rows})
    lines: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["queries"], row["buckets"], row["rule"]
        lines.setdefault(key, {})[row["seqlen"]] = row
    out = ["| queries | buckets | chunk | " + " | ".join(f"T={x}" for x in lengths) + " | cost |"]
    out.append("|" + "---|" * (len(lengths) + 4))
    for (source, buckets, rule), found in lines.items():
        cells = [f"{100 * found[x]['coverage']:.1f} %" if x in found else "-" for x in lengths]
        cost = found[max(found)]["bucket_cost"]
        out.append(f"| {source} | {buckets} | {rule} | {' | '.join(cells)} | {cost:.2f} |")
    sources = list(dict.fromkeys(row["queries"] for row in rows))

    def paint(axes: Any) -> None:
        for axis, source in zip(axes, sources, strict=True):
            colors = dict(zip(sorted({row["buckets"] for row in rows}), COLORS, strict=False))
            for (queries, buckets, rule), found in lines.items():
                if queries != source:
                    continue
                axis.plot(
                    list(found),
                    [100 * row["coverage"] for row in found.values()],
                    "o-" if rule.startswith("2T") else "o--",
                    markersize=3,
                    linewidth=1.3,
                    color=colors[buckets],
                    label=f"{buckets} buckets, chunk {rule}",
                )
            axis.set_xscale("log")
            axis.set_xticks(lengths, [f"{x / 1024:g}k" for x in lengths])
            axis.minorticks_off()
            axis.set_ylim(0, 103)
            axis.grid(True, linewidth=0.6)
            axis.set_title(f"{source} queries")
            axis.set_xlabel("sequence length T")
        axes[0].set_ylabel("same-bucket pairs kept, %")
        axes[0].legend(fontsize=7)

    pictures.save(paint, plots, stem, len(sources), (3.6 * len(sources), 3.8))
    text = (
        f"Pairs kept, of those that exact hash attention computes. {config['heads']} heads of "
        f"{config['head_dim']}, {record['draws']} draws of directions; cost: same-bucket pairs "
        "over those of even buckets, at the longest T."
    )
    if "loss" in record:
        text += (
            f" Model: {record['parameters'] / 1e6:.1f} million parameters, {config['layers']} "
            f"layers, `{config['attention']}`, trained at T={config['seqlen']} for "
            f"{config['steps']} steps of {config['tokens_per_step']} tokens, last training loss "
            f"{record['loss']:.3f} nats. Corpus {record['corpus'][:12]}."
        )
    facts = record["machine"]
    text += f" {_machine(facts)}, {_sittings([facts])}."
    warning = [] if "cuda" in facts else [SMALL_MODEL]
    plot = picture(f"{home}/{stem}", "Share of pairs kept against length")
    return [*warning, "\n".join(out), text, plot]


def write(records: Sequence[dict[str, Any]], page: Path, plots: Path) -> None:
    """Write the page; pictures are linked relative to it."""
    home = Path(os.path.relpath(plots, page.parent)).as_posix()
    parts = [HEAD]
    timed = [record for record in records if "rows" in record]
    if timed:
        parts += ["## Speed", SPEED, *speed_sections(timed)]
    groups = curves.merge([run for record in records for run in record.get("runs", ())])
    text, pixels = (
        [runs for runs in groups if (runs[0].get("unit") == "pixel") == wanted]
        for wanted in (False, True)
    )
    if text:
        parts += ["## Quality", QUALITY, *curve_sections(text, "quality", plots, home)]
    if pixels:
        parts += ["## Images, pixel by pixel", IMAGES]
        parts += curve_sections(pixels, "images", plots, home)
    counted = [record for record in records if "coverage" in record]
    if counted:
        parts += ["## Pairs that the Reformer keeps", COVERAGE]
    for nth, record in enumerate(counted):
        parts += coverage_section(record, plots, home, f"lm-coverage-{nth}")
    page.write_text("\n\n".join(parts) + "\n")
