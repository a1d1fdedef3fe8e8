"""Plant each fault of faults.py in a copy of the sources and see whether a test fails.

    python tests/mutation/run.py             all of them, into results.json; takes long
    python tests/mutation/run.py NAME ...    these only; the other results stay

Nothing is ever planted in the checkout. Tests that failed are run once more on clean sources, where
they must pass: otherwise their failure said nothing about the fault. Exit code 1: a fault survived.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fault import SUITES, Fault
from faults import FAULTS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
LIMIT = 900  # seconds of one fault; a hang is a failure too
HOMES = {"backends/": "scfa_core/backends/", "reference/": "scfa_core/reference/"}
# Finding a failure is enough: shrinking it to the smallest one would take minutes.
NO_SHRINKING = """
from hypothesis import Phase
phases = [Phase.explicit, Phase.generate]
settings.register_profile("faults", settings.get_profile("ci"), phases=phases)
settings.load_profile("faults")
"""


class Copy:
    """The sources, laid out as installed, with the tests beside them, in a temporary folder."""

    def __init__(self, folder: Path, limit: float = LIMIT) -> None:
        self.limit = limit
        self.site, self.work, self.folder = folder / "site", folder / "work", folder
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "scfa_core", self.site / "scfa_core", ignore=skip)
        for home, installed in HOMES.items():
            shutil.copytree(ROOT / home, self.site / installed, ignore=skip)
        shutil.copytree(ROOT / "tests", self.work / "tests", ignore=skip)
        shutil.copy(ROOT / "pyproject.toml", self.work)
        with (self.work / "tests/conftest.py").open("a") as conftest:
            conftest.write(NO_SHRINKING)
        where = self.python("-c", "import scfa_core.backends as b; print(b.__file__)").stdout
        if str(self.site) not in where:
            raise SystemExit(f"the copy is not what Python imports: {where}")

    def path(self, file: str) -> Path:
        """Where a file of the repository lies in the copy."""
        for home, installed in HOMES.items():
            if file.startswith(home):
                return self.site / installed / file.removeprefix(home)
        return self.site / file

    def python(self, *arguments: str, cache: str = "cache") -> subprocess.CompletedProcess[str]:
        """Run Python on the copy; `cache` names the folder for compiled code."""
        environment = os.environ | {
            "PYTHONPATH": str(self.site),
            "PYTHONSAFEPATH": "1",  # Python 3.10 does not know it, and finds nothing of ours there
            "PYTHONDONTWRITEBYTECODE": "1",
            "NUMBA_CACHE_DIR": str(self.folder / cache),
        }
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=self.limit,
            check=False,
        )

    def run_tests(self, *tests: str, cache: str = "cache") -> subprocess.CompletedProcess[str]:
        """Run pytest up to the first failure."""
        options = ("-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", "--tb=line")
        return self.python(*options, *tests, cache=cache)


def what_happened(fault: Fault, done: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """How the tests ended that did not pass, and the first that failed."""
    found = re.search(r"^(?:FAILED|ERROR) (tests/[^\n]*?)(?: - |$)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and found:
        return "failed", found.group(1)
    if done.returncode < 0:  # a crash: the last test begun
        begun = re.findall(
            r"^(tests/.+?::.+?)(?: (?:PASSED|SKIPPED).*)?$", done.stdout, re.MULTILINE
        )
        return "crashed", begun[-1].strip() if begun else ""
    raise SystemExit(f"{fault.name}: pytest gave {done.returncode}\n{done.stdout[-3000:]}")


def judge(copy: Copy, fault: Fault) -> dict[str, str]:
    """Plant `fault`, run its tests, take it out again; say what happened."""
    path = copy.path(fault.file)
    clean = path.read_text()
    times = path.stat()
    if clean.count(fault.old) != 1:
        raise SystemExit(f"{fault.name}: its old text is there {clean.count(fault.old)} times")
    outcome, caught_by = "survived", ""
    # Sources of numba-cpu are part of the key of its compiled code: keep the clean code apart.
    cache = "cache-of-fault" if "numba_cpu" in fault.file else "cache"
    try:
        path.write_text(clean.replace(fault.old, fault.new))
        for stage in SUITES[fault.suite]:
            done = copy.run_tests(*stage, cache=cache)
            if done.returncode != 0:
                outcome, caught_by = what_happened(fault, done)
                break
    except subprocess.TimeoutExpired:
        outcome = "hung"
    finally:
        path.write_text(clean)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        shutil.rmtree(copy.folder / "cache-of-fault", ignore_errors=True)
    return {"name": fault.name, "outcome": outcome, "caught_by": caught_by}


def write_results(results: dict[str, dict[str, str]]) -> None:
    """The table, in the order of the list."""
    rows = []
    for fault in FAULTS:
        if fault.name in results:
            rows.append({"file": fault.file, "breaks": fault.breaks} | results[fault.name])
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def check_on_clean_sources(copy: Copy, results: list[dict[str, str]]) -> bool:
    """Whether the tests that caught something pass where nothing is planted."""
    tests = sorted({result["caught_by"] for result in results} - {""})
    if not tests:
        return True
    done = copy.run_tests(*tests)
    if done.returncode != 0:
        print(f"on clean sources the same tests fail:\n{done.stdout[-3000:]}")
    return done.returncode == 0


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="faults to plant (default: all)")
    names = parser.parse_args().names
    unknown = set(names) - {fault.name for fault in FAULTS}
    if unknown:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    known = json.loads(RESULTS.read_text()) if names and RESULTS.exists() else []
    results = {row["name"]: {k: row[k] for k in ("name", "outcome", "caught_by")} for row in known}
    done = []
    with tempfile.TemporaryDirectory(prefix="scfa-faults-") as folder:
        copy = Copy(Path(folder))
        for fault in FAULTS:
            if names and fault.name not in names:
                continue
            begin = time.monotonic()
            result = results[fault.name] = judge(copy, fault)
            done.append(result)
            write_results(results)
            seconds = time.monotonic() - begin
            print(
                f"{result['outcome']:9}{fault.name:26}{seconds:5.0f} s  {result['caught_by']}",
                flush=True,
            )
        trusted = check_on_clean_sources(copy, done)
    survivors = [result["name"] for result in done if result["outcome"] == "survived"]
    print(f"{len(done)} faults, {len(survivors)} survived", *survivors)
    return 0 if trusted and not survivors else 1


if __name__ == "__main__":
    sys.exit(main())
