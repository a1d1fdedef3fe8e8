"""The list of planted faults cannot rot: each old text is there once, each result is recorded."""

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

import faults_gpu  # noqa: E402
import faults_hopper  # noqa: E402
from fault import SUITES  # noqa: E402
from faults import FAULTS  # noqa: E402

if not (ROOT / "backends").exists():
    pytest.skip("the tests run outside a source tree", allow_module_level=True)


@pytest.mark.parametrize("fault", FAULTS + faults_gpu.FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_planted(fault):
    assert (ROOT / fault.file).read_text().count(fault.old) == 1
    assert fault.new != fault.old
    for stage in SUITES[fault.suite]:
        tests = stage[: stage.index("-k")] if "-k" in stage else stage
        assert all((ROOT / test.partition("::")[0]).exists() for test in tests), stage


def test_names_tell_faults_apart():
    names = [fault.name for fault in FAULTS + faults_gpu.FAULTS]
    assert len(set(names)) == len(names)
    assert len(FAULTS) >= 25


def test_every_fault_was_caught():
    """results.json speaks of this list and of no survivor; run.py beside it writes it."""
    results = json.loads((HERE / "results.json").read_text())
    assert [result["name"] for result in results] == [fault.name for fault in FAULTS]
    assert [result["name"] for result in results if result["outcome"] == "survived"] == []


def test_what_a_card_does_not_show_has_a_reason():
    """results_gpu.json speaks of that list; what survived is named in NOT_SEEN, nothing else is."""
    path = HERE / "results_gpu.json"
    if not path.exists():
        pytest.skip("run_gpu.py has not been run on a card yet")
    results = {row["name"]: row["outcome"] for row in json.loads(path.read_text())["faults"]}
    assert list(results) == [fault.name for fault in faults_gpu.FAULTS]
    survived = {name for name, outcome in results.items() if outcome == "survived"}
    assert survived == set(faults_gpu.NOT_SEEN)


def test_what_a_card_does_not_show_is_planted_on_the_cpu():
    """And is caught there, as all of that list is."""
    planted = {fault.name: fault for fault in FAULTS}
    for fault in faults_gpu.FAULTS:
        if fault.name in faults_hopper.ONLY_ON_A_CARD:
            assert fault.name not in faults_gpu.NOT_SEEN
            continue
        here = planted[faults_hopper.on_cpu(fault.name)]
        assert (here.file, here.old, here.new) == (fault.file, fault.old, fault.new)
