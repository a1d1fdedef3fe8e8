"""The list of planted faults cannot rot: each old text is there once, each result is recorded."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from fault import SUITES  # noqa: E402
from faults import FAULTS  # noqa: E402

if not (ROOT / "backends").exists():
    pytest.skip("the tests run outside a source tree", allow_module_level=True)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_planted(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    for test in (test for stage in SUITES[fault.suite] for test in stage):
        assert (ROOT / test.partition("::")[0]).exists(), test


def test_names_tell_faults_apart():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 25


def test_every_fault_was_caught():
    """results.json speaks of this list and of no survivor; run.py beside it writes it."""
    results = json.loads((HERE / "results.json").read_text())
    assert [result["name"] for result in results] == [fault.name for fault in FAULTS]
    assert [result["name"] for result in results if result["outcome"] == "survived"] == []
