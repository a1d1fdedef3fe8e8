"""From stored JSON: tables, plots, pages, the README's section, and the regression check."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_checkout(monkeypatch):
    """`bench` is not installed: it is imported from the root of the checkout."""
    monkeypatch.syspath_prepend(str(ROOT))


def bench(*arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def timed(case, method, ms, density=0.5, mode="forward"):
    spread = {"ms": ms, "low": ms, "high": ms, "density": density}
    return {"case": case, "method": method, "mode": mode, **spread}


def test_crossover_and_growth_are_where_the_lines_say():
    from bench.plots import by_length, crossover, exponent, speedups

    rows = []
    for case, density, ms in (
        ("cpu-dense-4k", 0.5, 200),
        ("cpu-hash2-4k", 0.25, 100 * 2**0.5),
        ("cpu-hash8-4k", 0.0625, 100 / 2**0.5),
        ("cpu-hash32-4k", 0.015625, 10),
    ):
        rows += [timed(case, "scfa-numba-cpu", ms, density), timed(case, "sdpa-flash", 100)]
    ((name, points),) = speedups({"rows": rows}, "forward").items()
    assert "hash, T=4096" in name
    assert [round(row["speedup"], 2) for _, row in points] == [10, 1.41, 0.71, 0.5]
    assert abs(crossover(points) - 0.25) < 1e-3
    assert crossover(points[:2]) is None

    grown = [timed(f"growth-{n}k", "scfa-cupy", 2.0 * n) for n in (64, 128)]
    ((_, points),) = by_length({"rows": grown}, "forward", growth=True).items()
    assert abs(exponent(points) - 1) < 1e-9
    assert not by_length({"rows": grown}, "forward", growth=False)


def test_report_draws_both_themes_and_fills_only_its_section(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import report

    rows = [timed(f"cpu-hash16-{n}k", "scfa-numba-cpu", n) for n in (1, 4)]
    facts = {
        "card": "none",
        "torch": "0",
        "commit": "abc",
        "date": "2026-01-01T00:00",
        "threads": 1,
    }
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}))
    page = tmp_path / "page.md"
    report.main([str(path), "--plots", str(tmp_path / "img"), "--page", str(page)])
    for theme in ("light", "dark"):
        assert (tmp_path / "img" / f"few-length-{theme}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"img/few-length-{theme}.png" in page.read_text()

    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme("| new |", readme)
    assert readme.read_text() == f"before\n{report.BEGIN}\n| new |\n{report.END}\nafter\n"


def synthetic_h100():
    """Rows of invented times, which every plot and table of a card's page can be drawn from."""
    rows = []
    for seqlen in (8, 16, 32):
        for case, method, rate in (
            (f"A-hash16-{seqlen}k", "scfa-cupy", 1.0),
            (f"A-dense-{seqlen}k", "sdpa-cudnn", 4.0),
        ):
            for mode, factor in (("forward", 1.0), ("backward", 2.5)):
                rows.append(
                    timed(case, method, rate * factor * seqlen, 0.1, mode)
                    | {"tflops": 100.0, "floor_ms": 0.5, "floor_by": "bytes", "floor_share": 0.5}
                    | {"floor_bytes_share": 0.5, "floor_flops_share": 0.25}
                    | {"extra_bytes": 2**31, "host_us": None, "pairs": 100}
                    | {"tile_pairs": 150 if method == "scfa-cupy" else None}
                )
    rows += [timed("growth-64k", "scfa-cupy", 10.0), timed("growth-128k", "scfa-cupy", 21.0)]
    rows.append(timed("A-hash16-1k", "scfa-cupy", 0.1, mode="planned") | {"host_us": 31.4})
    rows.append(timed("A-hash16-16k", "scfa-cupy", 9000.0, mode="jit-cold"))
    rows.append({"case": "A-hash16-16k", "method": "original", "mode": "-", "reason": "no file"})
    facts = {"card": "SYNTHETIC", "torch": "0", "commit": "abc", "date": "2026-01-01T00:00"}
    return {"machine": facts, "rows": rows}


def test_paper_figure_adds_forward_and_backward_at_its_shape_only():
    from bench.plots import paper

    record = synthetic_h100()
    for case in ("B-dense-16k", "A-hash2-16k"):  # another shape, and one length alone
        record["rows"] += [timed(case, "scfa-cupy", 1.0, mode=m) for m in ("forward", "backward")]
    series = paper(record, "forward")
    assert set(series) == {"scfa-cupy, hash16", "sdpa-cudnn, dense"}
    assert [(x, row["ms"]) for x, row in series["scfa-cupy, hash16"]] == [
        (8192, 28.0),
        (16384, 56.0),
        (32768, 112.0),
    ]
    assert paper(record, "backward") == {}


def test_page_of_a_card_has_every_plot_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import report

    path, page = tmp_path / "card.json", tmp_path / "page.md"
    path.write_text(json.dumps(synthetic_h100()))
    report.main([str(path), "--plots", str(tmp_path / "img"), "--page", str(page)])
    text = page.read_text()
    for name in ("length", "paper", "rate", "floor", "memory"):
        for theme in ("light", "dark"):
            assert (tmp_path / "img" / f"card-{name}-{theme}.png").exists(), name
            assert f"img/card-{name}-{theme}.png" in text
    assert "| A-hash16-32k | scfa-cupy | forward | 100 | 150 | 0.5 | bytes | 50 | 25 |" in text
    assert "| A-dense-32k | sdpa-cudnn | forward | 100 | - | 0.5 | bytes | 50 | 25 |" in text
    assert "| scfa-cupy | forward | 64k | 128k | 2.10x |" in text
    # 4 * 48 * 32768 rows of 128 bytes are 768 MiB: 2048 MiB less one result forward
    assert "| A-hash16-32k | scfa-cupy | forward | 1280.0 | 213.3 |" in text
    assert "| A-hash16-8k | scfa-cupy | backward | 1472.0 | 981.3 |" in text
    assert "| A-hash16-1k | scfa-cupy | planned | 31 |" in text
    assert "| A-hash16-16k | scfa-cupy | jit-cold | 9.00 |" in text
    assert "- original: no file (A-hash16-16k)" in text
