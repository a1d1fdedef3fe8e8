"""`python -m bench ...`, `python -m bench.lm ...` without a new interpreter for each command."""

import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    """`bench` is not installed: it is imported from the root of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))


def bench(*arguments, code=0, module="bench"):
    """Run the command line of a module in this process; what it wrote to stdout."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        warnings.catch_warnings(),
    ):
        patch.syspath_prepend(str(ROOT))
        patch.chdir(ROOT)
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        patch.delitem(sys.modules, f"{module}.__main__", raising=False)
        warnings.simplefilter("default")  # as in a process of its own
        ended: int | str = 0
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            ended = stop.code or 0
    assert ended == code, said.getvalue()
    return said.getvalue()
