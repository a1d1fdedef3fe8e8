"""The wheel holds everything and nothing else, and works where it is installed."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import scfa_core

try:
    import tomllib
except ImportError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HOMES = {
    "scfa_core": "scfa_core",
    "scfa_core.backends": "backends",
    "scfa_core.reference": "reference",
}
NOT_SOURCE = {".git", ".venv", "build", "dist", "demo-out", "__pycache__", ".hypothesis"}

if not (ROOT / "pyproject.toml").exists():
    pytest.skip("the tests run outside a source tree", allow_module_level=True)

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command, cwd, **environment):
    # PYTHONPATH would let the checkout in; warnings of other packages are not ours to judge.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SCFA_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=env | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the sdist, built from a copy so that no stale build folder gets in."""
    source = tmp_path_factory.mktemp("source") / "checkout"
    shutil.copytree(ROOT, source, ignore=lambda _, names: [n for n in names if n in NOT_SOURCE])
    code = "import setuptools.build_meta as b; b.build_wheel('out'); b.build_sdist('out')"
    run(sys.executable, "-c", code, cwd=source)
    (wheel,) = (source / "out").glob("*.whl")
    (sdist,) = (source / "out").glob("*.tar.gz")
    return wheel, sdist


def test_every_package_is_listed():
    found = set()
    for package, home in HOMES.items():
        for init in (ROOT / home).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / home).parts
            found.add(".".join((package, *inner)))
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == found


def test_every_folder_with_modules_is_a_package():
    for home in HOMES.values():
        for module in (ROOT / home).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module.parent


def test_one_version():
    assert SETTINGS["project"]["version"] == scfa_core.__version__
    assert f"## {scfa_core.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_base_dependencies_are_numpy_and_numba_alone():
    names = [d.split(">")[0] for d in SETTINGS["project"]["dependencies"]]
    assert names == ["numpy", "numba"]


def test_pins_stay_out_of_the_package():
    extras = SETTINGS["project"]["optional-dependencies"].values()
    wanted = [*SETTINGS["project"]["dependencies"], *(d for extra in extras for d in extra)]
    requirements = [d.partition(";")[0] for d in wanted]
    assert [r for r in requirements if "==" in r or "<" in r] == []


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"scfa_core", f"scfa_core-{scfa_core.__version__}.dist-info"}
    expected = {"scfa_core/py.typed"}
    for package, home in HOMES.items():
        for path in (ROOT / home).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh"):
                inner = path.relative_to(ROOT / home).as_posix()
                expected.add(f"{package.replace('.', '/')}/{inner}")
    held = {name for name in names if name.startswith("scfa_core/")}
    assert held == expected


@pytest.mark.slow
def test_wheel_metadata(built):
    wheel, _ = built
    archive = zipfile.ZipFile(wheel)
    (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    fields = email.message_from_bytes(archive.read(name))
    assert fields["Name"] == "scfa-core"
    assert fields["License-Expression"] == "MIT"
    assert fields["Requires-Python"] == ">=3.10"
    extras = {"torch", "cuda12", "cuda13", "plot", "cli", "hf", "test", "dev", "docs"}
    assert set(fields.get_all("Provides-Extra")) == extras


@pytest.mark.slow
def test_sdist_holds_tests_and_benchmarks(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("tests", "bench", "docs", "backends", "reference", "constraints"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh", ".md", ".txt"):
                assert path.relative_to(ROOT).as_posix() in names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile"} <= names


OUTSIDE = """
import importlib.resources, sys
import numpy as np
import scfa_core as scfa
from scfa_core.reference.attention import attention as truth

home = sys.argv[1]
assert scfa.__file__.startswith(home), scfa.__file__
rng = np.random.default_rng(0)
q, k, v = rng.standard_normal((3, 1, 2, 70, 16)).astype(np.float32)
ids = rng.integers(0, 3, (1, 2, 70))
pattern = scfa.HashSparse(ids, ids)
out = scfa.attention(q, k, v, pattern)
right, _ = truth(*(x.astype(np.float64) for x in (q, k, v)), pattern.mask(70, 70, heads=2), 0.25)
assert abs(out - right).max() < 1e-5, abs(out - right).max()
for name in ("backends", "reference"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit(f"`import {name}` works: a generic name reached site-packages")
print("fine", scfa.make_plan(pattern, q, k).backend)
"""


@pytest.mark.slow
def test_wheel_runs_attention_in_a_fresh_environment(built, tmp_path):
    wheel, _ = built
    home = tmp_path / "fresh"
    venv.create(home, with_pip=False)
    places = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    site = Path(places["purelib"])
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    # Its dependencies come from here; a plain path brings no editable install along.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    python = Path(places["scripts"]) / Path(sys.executable).name
    script = tmp_path / "outside.py"
    script.write_text(OUTSIDE)
    assert run(python, script, home, cwd=tmp_path).startswith("fine numba-cpu")
    assert "numba-cpu   available" in run(python, "-m", "scfa_core", "info", cwd=tmp_path)


def test_import_is_light(tmp_path):
    code = (
        "import sys, scfa_core\n"
        "heavy = {'torch', 'cupy', 'numba', 'matplotlib', 'rich', 'transformers', 'hypothesis'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "scfa_core.backends.__name__\n"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


def test_numpy_calls_import_no_framework(tmp_path):
    code = (
        "import sys, numpy as np, scfa_core as scfa\n"
        "x = np.ones((1, 1, 20, 16), np.float32)\n"
        "scfa.attention(x, x, x, backend='numba-cpu')\n"
        "print(sorted({'torch', 'cupy', 'matplotlib', 'rich'} & set(sys.modules)))\n"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"


def test_torch_calls_import_no_compiler_of_torch(tmp_path):
    """All of dynamo and what it imports would take more than a second of a first call."""
    code = (
        "import sys, torch, scfa_core as scfa\n"
        "x = torch.ones((1, 1, 20, 16), requires_grad=True)\n"
        "ids = torch.zeros((1, 1, 20), dtype=torch.int32)\n"
        "scfa.attention(x, x, x, scfa.HashSparse(ids, ids)).sum().backward()\n"
        "compilers = {'torch._dynamo', 'torch._inductor', 'sympy', 'triton'}\n"
        "print(sorted(compilers & set(sys.modules)))\n"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "[]"
