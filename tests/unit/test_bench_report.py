"""From stored JSON: tables, plots, pages, the README's section, and the regression check."""

import json

import bench_call
import pytest

from_the_checkout = bench_call.from_the_checkout
bench = bench_call.bench


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
    rows.append(timed("A-hash16-2k", "scfa-cupy", 0.1, mode="planned") | {"host_us": 32.4})
    rows.append(timed("A-hash16-16k", "scfa-cupy", 9000.0, mode="jit-cold"))
    rows.append({"case": "A-hash16-16k", "method": "original", "mode": "-", "reason": "no file"})
    facts = {"card": "SYNTHETIC", "torch": "0", "commit": "abc", "date": "2026-01-01T00:00"}
    return {"machine": facts, "rows": rows}


def test_paper_figure_adds_forward_and_backward_at_its_shape_only():
    from bench.plots import PAPER, paper

    hashes, drops = PAPER

    record = synthetic_h100()
    for case in ("B-dense-16k", "A-hash2-16k"):  # another shape, and one length alone
        record["rows"] += [timed(case, "scfa-cupy", 1.0, mode=m) for m in ("forward", "backward")]
    series = paper(record, hashes)
    assert set(series) == {"scfa-cupy, hash16", "sdpa-cudnn, dense"}
    assert [(x, row["ms"]) for x, row in series["scfa-cupy, hash16"]] == [
        (8192, 28.0),
        (16384, 56.0),
        (32768, 112.0),
    ]
    assert paper(record, "forward") == {}
    assert paper(record, drops) == {}, "dense lines alone are no figure"


def test_paper_figure_borrows_the_dense_peer_of_another_run_and_says_so():
    from bench.pages import with_dense
    from bench.plots import PAPER, paper

    whole = synthetic_h100()
    alone = {"rows": [row for row in whole["rows"] if row["method"] == "scfa-cupy"]}
    hashes, _ = PAPER
    assert set(paper(alone, hashes)) == {"scfa-cupy, hash16"}
    beside = with_dense(alone, whole)
    assert set(paper(beside, hashes)) == {"scfa-cupy, hash16", "sdpa-cudnn, dense (another run)"}
    assert with_dense(whole, whole) is whole


def test_many_lines_look_different_and_their_names_hide_none_of_them(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from bench import looks, plots

    rows = [
        timed(f"A-{pattern}-{n}k", method, 1.0 + n, mode=mode)
        for pattern in ("hash2", "hash16", "hash128", "qk10", "qk50", "qk90")
        for n in (1, 4, 16)
        for method in ("original", "scfa-cupy", "scfa-numba-cuda")
        for mode in plots.MODES
    ]
    series = plots.by_length({"rows": rows}, "forward", growth=False)
    styles = looks.lines(series)
    assert len(styles) == 18
    assert len({str(sorted(look.items())) for look in styles.values()}) == 18
    ours = {look["linestyle"] for name, look in styles.items() if name.startswith("scfa-cupy")}
    assert ours == {"-"}

    figure, axes = pyplot.subplots(1, 2, figsize=(9.6, 4))
    for axis in axes:
        plots._times(axis, series, "black", styles)
    looks.legend(figure, list(axes))
    figure.canvas.draw()
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == set(series)
    named, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= named.x0
    assert named.x1 <= whole.x1
    assert whole.y0 <= named.y0
    assert all(axis.get_legend() is None for axis in axes)
    assert all(named.y1 < axis.get_tightbbox().y0 for axis in axes)
    pyplot.close(figure)


def test_page_of_a_card_has_every_plot_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import report

    path, page = tmp_path / "card.json", tmp_path / "page.md"
    path.write_text(json.dumps(synthetic_h100()))
    report.main([str(path), "--plots", str(tmp_path / "img"), "--page", str(page)])
    text = page.read_text()
    for name in ("length", "paper", "rate", "floor", "memory", "host", "jit"):
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


def test_a_plot_shows_useful_and_executed_rates_and_memory_less_results():
    from bench import plots
    from bench.details import executed

    pyplot = pytest.importorskip("matplotlib.pyplot")
    record = synthetic_h100()
    lines = {}
    for name in ("rate", "floor", "memory"):
        _, find, paint = plots.PLOTS[name]
        figure, axis = pyplot.subplots()
        paint(axis, find(record, "forward"), "black")
        lines[name] = {x.get_label(): list(x.get_ydata()) for x in axis.get_lines()}
        pyplot.close(figure)
    ours = "scfa-cupy, hash16"
    assert lines["rate"][ours] == [100.0] * 3
    assert lines["rate"][f"{ours}: executed"] == [150.0] * 3
    assert "sdpa-cudnn, dense: executed" not in lines["rate"]
    assert executed({"tflops": 1.0, "pairs": 1}) is None
    assert lines["floor"][f"{ours}: bytes"] == [50.0] * 3
    assert lines["floor"][f"{ours}: flops"] == [25.0] * 3
    assert lines["memory"][ours] == [2048 - 768 * n / 4 for n in (1, 2, 4)]


def test_compare_flags_faster_slower_and_what_no_longer_runs(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    names = ("A-hash16-8k", "A-hash16-16k", "A-hash16-32k", "A-dense-8k", "A-dense-16k")
    before = [timed(name, "scfa-cupy", 10.0) | {"low": 9.5, "high": 10.5} for name in names]
    after = [
        timed(names[0], "scfa-cupy", 10.9) | {"low": 10.4, "high": 11.0},  # within both spreads
        timed(names[1], "scfa-cupy", 5.0),
        {"case": names[3], "method": "scfa-cupy", "mode": "-", "reason": "wrong", "failed": True},
    ]  # names[2] and names[4] were not tried
    old.write_text(json.dumps({"machine": {"card": "X"}, "rows": before}))
    new.write_text(json.dumps({"machine": {"card": "Y"}, "rows": after}))
    out = bench("compare", old, new, code=1)
    assert "faster  0.50x  A-hash16-16k" in out
    assert "MISSING        A-dense-8k scfa-cupy forward: wrong" in out
    assert "2 rows in both: 0 slower, 1 missing" in out
    assert "two cards: X, Y" in out
    for name in (names[0], names[2], names[4]):
        assert name not in out
    after[2] = timed(names[3], "scfa-cupy", 10.6)
    new.write_text(json.dumps({"machine": {"card": "X"}, "rows": after}))
    assert "SLOWER  1.06x  A-dense-8k" in bench("compare", old, new, code=1)
    new.write_text(json.dumps({"machine": {"card": "X"}, "rows": after[:2]}))
    assert "0 slower, 0 missing" in bench("compare", old, new)
    new.write_text(json.dumps({"machine": {"card": "X"}, "rows": []}))
    assert "0 rows in both" in bench("compare", old, new, code=1), "nothing compared is no pass"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "has no rows"),
        ('{"rows": [{"what": "attention", "ms": 1}]}', "not times of cases"),
        ('{"kind": "accuracy", "rows": [{"backend": "cupy"}]}', "holds accuracy"),
    ],
)
def test_a_file_that_is_no_record_of_times_is_named_with_what_was_wanted(tmp_path, text, why):
    from bench import report

    path = tmp_path / "wrong.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=f"wrong.json.*{why}.*want a file that"):
        report.compare([str(path), str(path)])


def test_stored_pages_and_the_readme_are_what_stored_results_make():
    assert bench("pages", "--check") == ""


def test_pages_check_names_a_page_that_was_edited_by_hand(tmp_path, monkeypatch, capsys):
    from bench import pages

    for page in pages.PAGES:
        (tmp_path / f"{page.name}.md").write_text((pages.PERF / f"{page.name}.md").read_text())
    (tmp_path / "cpu.md").write_text("by hand")
    monkeypatch.setattr(pages, "PERF", tmp_path)
    monkeypatch.setattr(pages, "HOME", tmp_path / "bench")
    (tmp_path / "README.md").write_text((bench_call.ROOT / "README.md").read_text())
    assert pages.main(["--check"]) == 1
    assert capsys.readouterr().out == "differs: cpu.md\n"
    assert (tmp_path / "cpu.md").read_text() == "by hand"
    pages.main(["--no-plots"])
    assert "| cpu-hash16-4k |" in (tmp_path / "cpu.md").read_text()
    assert pages.main(["--check"]) == 0


def test_what_is_written_by_hand_leads_its_page_and_ends_the_readme(tmp_path, monkeypatch):
    from bench import pages

    (tmp_path / "cpu.md").write_text("# By hand\n\nWhy.\n")
    (tmp_path / "readme.md").write_text("More.\n")
    monkeypatch.setattr(pages, "INTROS", tmp_path)
    page = next(page for page in pages.PAGES if page.name == "cpu")
    assert pages.text_of(page, pages.stored(page)).startswith("# By hand\n\nWhy.\n\nMade by")
    assert pages.readme_text().endswith("\n\nMore.")


def test_every_picture_of_a_stored_page_is_stored_in_both_themes():
    import re

    from bench import pages

    for page in pages.PAGES:
        text = (pages.PERF / f"{page.name}.md").read_text()
        for name in re.findall(r"img/[\w-]+\.png", text):
            assert (pages.PERF / name).exists(), name


def test_floors_of_rows_that_were_timed_before_the_ceilings_were_known():
    from bench import pages

    row = timed("A-hash16-8k", "scfa-cupy", 1.0) | {"pairs": 402727281}
    record = {"machine": {}, "rows": [row, {"case": "A-hash16-8k", "reason": "none"}]}
    (floored, _) = pages.with_floors(record, {"gbps": 3020.0, "tflops": 772.0})["rows"]
    assert floored["floor_ms"] == 0.26874  # as stored for this case by a run that knew them
    assert pages.with_floors(record, None) is record


def test_speed_claims_of_the_readme_are_stored_results():
    """Pairs "forward / backward" and factors of the language model, as the Speed section says."""
    import re

    from bench import report
    from bench.lm.report import speed_sections
    from bench.records import read

    section = (
        (bench_call.ROOT / "README.md").read_text().split("## Speed")[1].split(report.BEGIN)[0]
    )
    results = bench_call.ROOT / "bench" / "results"
    pairs = set()
    for path in results.glob("h[12]00*.json"):
        rows = {
            (row["case"], row["method"], row["mode"]): row["ms"]
            for row in read(path)["rows"]
            if "ms" in row
        }
        pairs |= {
            (ms, rows[case, method, "backward"])
            for (case, method, mode), ms in rows.items()
            if mode == "forward" and (case, method, "backward") in rows
        }

    def stored(first, second):
        def like(said, true):
            return abs(float(said) - true) <= 0.5 * 10 ** -len(said.partition(".")[2]) + 1e-9

        return any(like(first, x) and like(second, y) for x, y in pairs)

    number = r"(\d+(?:\.\d+)?)"
    said = re.findall(rf"{number} / {number}(?! ?%)", section)
    said += re.findall(rf"{number} ms forward[^.]*? and {number} ms", section)
    said += re.findall(rf"(?:cuDNN's dense|the original's) {number} and {number}", section)
    assert said, "the section makes no claim that this test can read"
    for first, second in said:
        assert stored(first, second), f"{first} / {second} is in no stored result"

    speedups = set()  # as the page's tables have them, which are made of the stored results
    records = [read(path) for path in sorted(results.glob("lm-speed-h[12]00*.json"))]
    for lines in (part.splitlines() for part in speed_sections(records) if part.startswith("|")):
        lengths = [int(x) for x in re.findall(r"T=(\d+)", lines[0])]
        for line in lines[2:]:
            for seqlen, cell in zip(lengths, line.strip("| ").split(" | ")[1:], strict=True):
                speedups |= {(seqlen, factor) for factor in re.findall(r"\((\d\.\d\d)x", cell)}
    assert speedups
    for factor, seqlen in re.findall(r"(\d\.\d\d)(?: times)? \((?:T=)?(\d+)\)", section):
        assert (int(seqlen), factor) in speedups, f"{factor} at {seqlen} is in no stored result"


def test_a_line_against_length_is_of_one_shape():
    from bench.plots import by_length

    record = synthetic_h100()
    before = by_length(record, "forward", growth=False)
    for case in ("B-hash16-16k", "B-hash16-16k-d256", "B-hash16-16k-gqa8", "A-hash16-16k-fp16"):
        record["rows"].insert(0, timed(case, "scfa-cupy", 1.0))
    assert by_length(record, "forward", growth=False) == before
    assert [x for x, _ in before["scfa-cupy, hash16"]] == [8192, 16384, 32768]
