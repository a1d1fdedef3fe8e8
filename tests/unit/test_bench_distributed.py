"""The runs on many processes, in small: all checks hold, and a broken exchange does not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="distributed attention needs torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench" / "distributed").exists():
    pytest.skip("the tests run outside a source tree", allow_module_level=True)

pytestmark = pytest.mark.slow
LIMIT = 120  # seconds until all processes of a run are killed

BROKEN = """
import sys
from bench.distributed import __main__
from scfa_core import distributed_exchange

right = distributed_exchange._exchange_for_rows

def wrong(tensors, group):  # heads of ranks change places on the way back
    return tuple(x.flip(1) for x in right(tensors, group))

distributed_exchange._exchange_for_rows = wrong
sys.argv[1:] = ["check", "--device", "cpu", "--only", "all-to-all: causal", *sys.argv[1:]]
__main__.main()
"""

ONE_FAILS = """
import sys
from bench.distributed import group

with group.join("cpu") as where:
    if where.rank == 1:
        raise RuntimeError("rank 1 fell over")
    group.anywhere(True, where)
"""


def launch(*arguments, ranks=2):
    """Run under torchrun; (exit code, output). All its processes end with it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), *map(str, arguments)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"not done in {LIMIT} s:\n{output}")
    return process.returncode, output


def test_all_checks_hold_on_two_processes(tmp_path):
    kept = tmp_path / "check.json"
    code, output = launch("-m", "bench.distributed", "check", "--device", "cpu", "--json", kept)
    assert code == 0, output
    record = json.loads(kept.read_text())
    assert record["ranks"] == 2
    assert record["failed"] == []
    assert "running" not in record
    names = " ".join(row["check"] for row in record["rows"])
    for word in ("DDP", "FSDP2", "batch, DTensor", "heads, DTensor", "all-to-all", "zigzag"):
        assert word in names
    assert all(row["repeats"] and row["error"] < 1e-12 for row in record["rows"])


def test_scaling_on_two_processes_is_recorded_and_drawn(tmp_path):
    kept = tmp_path / "scale.json"
    sizes = ["--preset", "tiny", "--lengths", "128", "--buckets", "0", "--longest", "256"]
    code, output = launch(
        "-m", "bench.distributed", "scale", "--device", "cpu", *sizes, "--json", kept
    )
    assert code == 0, output
    rows = json.loads(kept.read_text())["rows"]
    times = {(r["what"], r["way"], r["seqlen"]): r for r in rows if "ms" in r}
    for what in ("attention", "model"):
        alone, half = times[what, "alone", 128], times[what, "alone", 64]
        for way in ("all-to-all", "all-gather"):
            row = times[what, way, 128]
            assert row["strong"] == pytest.approx(alone["ms"] / (2 * row["ms"]))
            assert row["weak"] == pytest.approx(half["ms"] / row["ms"])
            assert row["comm_share"] == pytest.approx(row["comm_ms"] / row["ms"])
            assert row["tokens_per_s"] == pytest.approx(1e3 * 128 / row["ms"])
        assert row["low"] <= row["ms"] <= row["high"]
    longest = [row for row in rows if row["what"] == "longest"]
    assert [(row["seqlen"], row["stopped_by"]) for row in longest] == [(256, "limit")] * 2

    pytest.importorskip("matplotlib", reason="plots need the extra plot")
    page = subprocess.run(
        [sys.executable, "-m", "bench.distributed", "report", kept, "--plots", tmp_path],
        cwd=ROOT, text=True, capture_output=True, timeout=LIMIT,
    )  # fmt: skip
    assert page.returncode == 0, page.stderr
    assert f"{times['model', 'all-to-all', 128]['ms']:.2f}" in page.stdout
    assert "256" in page.stdout
    for theme in ("light", "dark"):
        assert (tmp_path / f"scale-2-{theme}.png").stat().st_size > 1000


def test_a_wrong_exchange_is_named_and_fails_the_run(tmp_path):
    script, kept = tmp_path / "broken.py", tmp_path / "check.json"
    script.write_text(BROKEN)
    code, output = launch(script, "--json", kept)
    assert code != 0
    assert "failed: sequence, all-to-all: causal" in output
    assert json.loads(kept.read_text())["failed"] == ["sequence, all-to-all: causal"]


def test_a_rank_that_fails_alone_ends_the_run(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ONE_FAILS)
    code, output = launch(script)
    assert code != 0
    assert "rank 1 fell over" in output


def test_example_learns_the_same_however_sharded():
    """Batches are divided, not changed: losses are those of any number of processes."""
    found = []
    for sharding, ranks in (("ddp", 2), ("fsdp2", 4)):
        script = ROOT / "examples" / "train_many.py"
        code, output = launch(script, "--sharding", sharding, ranks=ranks)
        assert code == 0, output
        found.append([float(x.split()[-1]) for x in output.splitlines() if "loss" in x])
    first, last = found[0]
    assert last < first / 2
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-3)
