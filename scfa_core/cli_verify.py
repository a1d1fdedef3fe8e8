"""``scfa verify`` and ``scfa soak``: run, print, and write what was found as JSON."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import time
from importlib.util import find_spec
from typing import Any

from scfa_core import __version__
from scfa_core.dispatch import load_backend
from scfa_core.errors import ScfaError
from scfa_core.terminal import Terminal
from scfa_core.versions import PACKAGES, version_of

INTERRUPTED, CUT_SHORT = 130, 141  # as a shell has them: Ctrl-C, a broken pipe


def run_verify(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run random problems; 1 if one failed, 130 if Ctrl-C ended them."""
    if options.coverage:
        return run_coverage(options, terminal)
    from scfa_core.verify import verify
    from scfa_core.verify_findings import Summary

    findings = verify(
        options.backend,
        against=options.against,
        seed=options.seed,
        count=options.count,
        rows=options.rows,
        dtype=options.dtype,
        time_budget=options.time_budget,
        deep=options.deep,
        long=options.long,
        workers=options.workers,
        warm=options.warm,
        changed=options.changed,
        repeat=options.repeat,
    )
    seen, start, interrupted = Summary(), time.monotonic(), False
    name = options.backend + (f" against {options.against}" if options.against else "")
    with terminal.progress(f"verify {name}", options.count) as progress:
        try:
            for finding in findings:
                seen.add(finding)
                progress.advance(
                    f"{len(seen.failed)} failed, largest error {seen.worst:.2f} of the allowed"
                )
        except KeyboardInterrupt:
            interrupted = True
    for finding in seen.failed:
        terminal.print(f"FAILED {finding.spec}")
        for complaint in finding.complaints:
            terminal.print(f"  {complaint}")
        terminal.print(f"  reproduce: {reproduction(options, finding.seed)}")
    terminal.print(
        f"{name}: {seen.done} problems from seed {options.seed}, {len(seen.failed)} failed; "
        f"largest error of the others {seen.worst:.2f} of the allowed"
        + (f", largest difference {seen.apart:.2f}" if options.against else "")
        + (f"; {seen.tf32} held to the rule for TF32" if seen.tf32 else "")
    )
    if options.json:
        content = {
            "command": reproduction(options, None),
            "backend": options.backend,
            "against": options.against,
            "card": card_name(options.backend)
            or (card_name(options.against) if options.against else None),
            "seconds": round(time.monotonic() - start, 1),
            "interrupted": interrupted,
        }
        write_json(options.json, content | seen.as_json())
    return ended(terminal, interrupted, bool(seen.failed))


def ended(terminal: Terminal, interrupted: bool, failed: bool) -> int:
    """The exit code; an interruption is told in a last line."""
    if interrupted:
        terminal.print("interrupted: this is what was done until then")
        return INTERRUPTED
    return int(failed)


def run_coverage(options: argparse.Namespace, terminal: Terminal) -> int:
    """Print how many features the plans of deep problems hold."""
    from scfa_core.campaign_coverage import covered
    from scfa_core.verify import drawn_dtypes

    if not options.deep or options.long:
        raise ScfaError("features are counted of structured problems (--deep), none of them long")
    dtypes = (options.dtype,) if options.dtype else drawn_dtypes(options.backend)
    seeds = range(options.seed, options.seed + options.count)
    with terminal.progress("coverage", options.count) as progress:
        for found in covered(seeds, rows=options.rows, dtypes=dtypes, changed=options.changed):
            progress.advance(f"{sum(found.values())} features")
    terminal.table(("of", "features"), sorted(found.items()))
    return 0


def card_name(backend: str) -> str | None:
    """The card that a GPU backend ran on, if torch is there to tell."""
    if getattr(load_backend(backend), "memory", "host") == "host" or not find_spec("torch"):
        return None
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def write_json(path: str, content: dict[str, Any]) -> None:
    """Write a result together with the versions that it came from.

    Raises
    ------
    ScfaError
        The file cannot be written; the message holds the result.
    """
    import json

    versions = {name: version_of(name) for name in PACKAGES}
    content["versions"] = {"scfa_core": __version__, "python": platform.python_version()} | {
        name: found for name, found in versions.items() if found != "not installed"
    }
    text = json.dumps(content, indent=1) + "\n"
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ScfaError(f"cannot write {path} ({error}); this was to go there:\n{text}") from error


def reproduction(options: argparse.Namespace, seed: int | None) -> str:
    """The one line that runs one problem of `scfa verify` again; all of them if `seed` is None."""
    first, count = (options.seed, options.count) if seed is None else (seed, 1)
    line = _settings(options.backend, options.against)
    line += f"scfa verify --backend {options.backend}"
    line += f" --against {options.against}" if options.against else ""
    line += f" --seed {first} --count {count}"
    line += " --deep" if options.deep else ""
    line += " --changed" if options.changed else ""
    line += f" --long {options.long}" if options.long else ""
    line += f" --repeat {options.repeat}" if options.repeat else ""
    line += f" --rows {options.rows}" if options.rows else ""
    return line + (f" --dtype {options.dtype}" if options.dtype else "")


def _settings(*backends: str | None) -> str:
    """Variables that choose the kernels of `cupy`, as a shell takes them before a command."""
    names = sorted(name for name in os.environ if name.startswith("SCFA_CUPY_"))
    if "cupy" not in backends:
        return ""
    return "".join(f"{name}={shlex.quote(os.environ[name])} " for name in names)


def run_soak(options: argparse.Namespace, terminal: Terminal) -> int:
    """Run many steps; 1 if something did not hold still, 130 if Ctrl-C ended them."""
    from scfa_core.soak import soak

    found = soak(
        options.backend,
        steps=options.steps,
        rows=options.rows,
        replays=options.replays,
        seconds=options.seconds,
        seed=options.seed,
    )
    fixed, kernels = found["fixed problems"], found["kernels"]
    terminal.print(
        f"{options.backend}: {found['steps']} steps in {found['seconds']} s, "
        f"{found['pairs of lengths']} pairs of lengths; {fixed['compared']} results of fixed "
        f"problems, {fixed['changed']} changed; {kernels['after the warm-up']} kernels, "
        f"{kernels['added']} added"
    )
    if "graph" in found:
        graph = found["graph"]
        terminal.print(
            f"{graph['replays']} replays of a graph in {graph['seconds']} s, "
            f"{graph['different from eager']} differ from eager"
        )
    rows = [
        (name, *(held[key] for key in ("first", "highest", "last", "growth")))
        for name, held in found["memory"].items()
    ]
    terminal.table(("memory", "first", "highest", "last", "growth"), rows)
    for complaint in found["complaints"]:
        terminal.print(f"FAILED {complaint}")
    if options.json:
        write_json(options.json, found)
    return ended(terminal, found["interrupted"], bool(found["complaints"]))
