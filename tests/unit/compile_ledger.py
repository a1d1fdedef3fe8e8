"""Which variants were compiled from these very sources and found clean: compiled.json.

    python tests/unit/compile_ledger.py [--again]

compiles what is not recorded (with --again everything: some ten minutes on two cores) and writes
the record; exit code 1 where one is not clean. `make test` compiles a spread of all variants and
whatever is not recorded, so a change of a source is compiled in full, once. A record is of one
NVRTC, by version; under another one all is compiled.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from cuda_builds import Build, every_build, faults_of, stack_of
from scfa_core.backends.cupy_raw import nvrtc

RECORD = Path(__file__).with_name("compiled.json")
Found = tuple[Build, int, list[str]]  # bytes of its stack, what is wrong with it


@cache
def _text_of(source: str) -> str:
    """A source with all that it includes, each file once."""
    sources, seen, found = nvrtc.read_sources(), [source], []
    for name in seen:  # it grows
        found.append(f"{name}\0{sources[name]}")
        headers = re.findall(r'^ *#include "(.*?)"', sources[name], re.MULTILINE)
        seen += [header for header in headers if header not in seen]
    return "\0".join(found)


def key_of(build: Build, version: tuple[int, int]) -> str:
    """Digest of all that shapes a build's code."""
    options = nvrtc.compile_options(build.constants, build.arch)
    parts = (_text_of(build.source), *options, str(version))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def load(path: Path = RECORD) -> dict[str, int]:
    """Keys of builds that were clean, with the bytes of their stack."""
    known: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    return known


def compile_all(builds: Iterable[Build], compiler: nvrtc.Compiler) -> Iterator[Found]:
    """Compile on all cores; in whatever order they end."""

    def one(build: Build) -> Found:
        made = nvrtc.compile_to_cubin(build.source, build.constants, build.arch, compiler)
        return build, stack_of(made.log), faults_of(build, made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for job in as_completed([pool.submit(one, build) for build in builds]):
            yield job.result()


def renew(
    known: dict[str, int],
    compiler: nvrtc.Compiler,
    told: Callable[[list[Build], Iterator[Found]], Iterable[Found]],
) -> tuple[dict[str, int], list[str]]:
    """Compile what `known` lacks; return all that is clean, and what is not in words."""
    keys = {build: key_of(build, compiler.version()) for build in every_build()}
    missing = [build for build, key in keys.items() if key not in known]
    clean = {key: known[key] for key in keys.values() if key in known}
    faults = []
    for build, stack, wrong in told(missing, compile_all(missing, compiler)):
        if wrong:
            faults.append(f"{build.label}: {'; '.join(wrong)}")
        else:
            clean[keys[build]] = stack
    return clean, faults


def main() -> int:
    """Renew the record."""
    from rich.progress import track

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="compile what is recorded as well")
    again = parser.parse_args().again

    def told(missing: list[Build], found: Iterator[Found]) -> Iterable[Found]:
        return track(found, f"{len(missing)} variants", total=len(missing))

    clean, faults = renew({} if again else load(), nvrtc.wheel_compiler(), told)
    lines = ",\n".join(f'"{key}": {stack}' for key, stack in sorted(clean.items()))
    RECORD.write_text("{\n" + lines + "\n}\n")
    print(*faults, f"{len(clean)} variants are clean, {len(faults)} are not", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
