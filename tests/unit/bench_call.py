"""`python -m bench ...` without a new interpreter for each command."""

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


def bench(*arguments, code=0):
    """Run the command line in this process; what it wrote to stdout."""
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        warnings.catch_warnings(),
    ):
        patch.syspath_prepend(str(ROOT))
        patch.chdir(ROOT)
        patch.setattr(os, "environ", dict(os.environ))
        patch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        patch.delitem(sys.modules, "bench.__main__", raising=False)
        warnings.simplefilter("default")  # as in a process of its own
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("bench", run_name="__main__")
    assert (ended.value.code or 0) == code, said.getvalue()
    return said.getvalue()
