"""A module whose library is not installed says so, and what to install."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import {module}
except ModuleNotFoundError as error:
    print(error, error.name)
"""


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("scfa_core.compat", "torch", "torch"),
        ("scfa_core.distributed", "torch", "torch"),
        ("scfa_core.dropping", "torch", "torch"),
        ("scfa_core.hf", "torch", "torch"),
        ("scfa_core.hf", "transformers", "hf"),
        ("scfa_core.nn", "torch", "torch"),
        ("scfa_core.torch_flash", "torch", "torch"),
        ("scfa_core.torch_flops", "torch", "torch"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(module, library, extra):
    if library == "transformers":
        pytest.importorskip("torch", reason="hf needs torch first")
    code = BLOCKED.format(module=module, library=library)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert f"{module} needs {library}" in done.stdout
    assert f"which is not installed; pip install 'scfa-core[{extra}]'" in done.stdout
    assert done.stdout.split()[-1] == library


def test_a_library_that_is_too_old_is_told_from_one_that_is_not_there():
    from scfa_core.extras import missing

    error = ImportError("cannot import name 'output_capturing'", name="transformers.utils")
    words = str(missing("scfa_core.hf", "hf", error, "transformers 5.24 or newer"))
    assert "needs transformers 5.24 or newer, and what is installed" in words
    assert "output_capturing" in words
    assert "pip install --upgrade 'scfa-core[hf]'" in words
