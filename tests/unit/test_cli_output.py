"""The command line where its output cannot go, or not as it is."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scfa_core import cli, soak
from scfa_core.terminal import Terminal

SHOW = [sys.executable, "-m", "scfa_core", "show", "window", "--window", "3", "--seqlen", "4"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


def run(command, **options):
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)
    assert "Traceback" not in done.stderr
    return done


def test_blocks_become_signs_that_the_stream_has():
    done = run(SHOW, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert done.stdout.splitlines()[-2:] == ["#.", "'##."]


def test_a_closed_output_is_no_error():
    assert run(["sh", "-c", '"$@" >&-', "sh", *SHOW]).returncode == 0


@needs_full
def test_a_full_disk_is_told():
    with FULL.open("w") as full:
        done = run(SHOW, stdout=full)
    assert done.returncode == 2
    assert "scfa show: " in done.stderr


def test_a_pipe_that_breaks_is_no_success():
    reading, writing = os.pipe()
    os.close(reading)
    done = run(SHOW, stdout=writing)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


@needs_full
def test_a_result_that_cannot_be_written_is_not_lost(capsys):
    options = ["--backend", "reference", "--count", "1", "--rows", "4", "--json", str(FULL)]
    assert cli.main(["verify", *options]) == 2
    told = capsys.readouterr().err
    begin = told.index("{")
    assert told.startswith(f"scfa verify: cannot write {FULL}")
    assert json.loads(told[begin:])["backend"] == "reference"


def test_a_file_without_the_right_to_write_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write there
    with pytest.raises(SystemExit) as ended:
        cli.main(["verify", "--json", str(tmp_path / "x.json")])
    assert ended.value.code == 2
    assert "must be a file that can be written" in capsys.readouterr().err


def test_an_empty_name_of_a_picture_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["show", "causal", "--out", ""])
    assert "must be a file that can be written, got ''" in capsys.readouterr().err


def test_a_soak_without_a_step_fails():
    found = soak.soak("reference", rows=4, steps=5, seconds=1e-6)
    assert found["steps"] == 0
    assert [text for text in found["complaints"] if "no step was taken" in text]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_shows_the_count_and_the_time(width):
    pytest.importorskip("rich", reason="bars are rich's (extra 'cli')")
    from rich.console import Console

    stream = io.StringIO()
    terminal = Terminal(stream, plain=False)
    terminal._console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    with terminal.progress("verify numba-cpu", 500) as bar:
        for _ in range(500):
            bar.advance("0 failed, largest error 0.31 of the allowed")
    last = [line for line in stream.getvalue().splitlines() if "verify" in line][-1]
    assert "500/500" in last
    assert "0:00:0" in last
