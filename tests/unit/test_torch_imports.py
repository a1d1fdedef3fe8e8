"""What importing the torch side drags in: nothing that the process has only promised to import."""

import sys

import pytest
from scripts import python

pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

# A module in the manner of importlib.util.LazyLoader: it counts the looks that would import it.
PROMISED = """
import sys, types
import torch, numpy

class Promised(types.ModuleType):
    looks = 0

    def __getattribute__(self, name):
        if name not in ("__class__", "__dict__"):
            Promised.looks += 1
        return super().__getattribute__(name)

sys.modules["promised"] = Promised("promised")
"""


@pytest.mark.parametrize(
    "module", ["torch_bridge", "torch_union_ops", "torch_hashing", "hf_directions"]
)
def test_operators_are_registered_without_a_look_at_modules_that_import_when_looked_at(module):
    assert python(f"{PROMISED}\nimport scfa_core.{module}\nprint(Promised.looks)").split() == ["0"]


def test_the_promised_module_counts_what_inspect_does():
    code = "import inspect\ninspect.getmodule(sys._getframe())\nprint(Promised.looks > 0)"
    assert python(f"{PROMISED}\n{code}").split() == ["True"]


def test_a_first_call_imports_neither_another_package_nor_torchs_compiler():
    code = """
import sys, torch
import scfa_core as scfa
rows = torch.randn(1, 2, 24, 16, requires_grad=True)
before = set(sys.modules)
scfa.attention(rows, rows, rows, scfa.Causal(), backend="reference").sum().backward()
print(*sorted(set(sys.modules) - before))
"""
    found = python(code).split()
    assert "scfa_core.torch_bridge" in found
    expected = {"scfa_core", "torch", *sys.stdlib_module_names}
    assert [name for name in found if name.partition(".")[0] not in expected] == []
    assert not any(name.startswith(("torch._dynamo", "torch._inductor")) for name in found)
