"""The language model's tables: sittings merged, seeds with spread, equal steps beside seconds."""

import bench_call
import pytest

pytest.importorskip("torch", reason="the language model needs torch (extra 'torch')")
from_the_checkout = bench_call.from_the_checkout


def run(attention, seed=0, *, rate=10, loss=0.0, seconds=100.0, done=True, **config):
    """A run of `rate` steps a second whose validation loss is 5 - step / 500 + `loss`."""
    curve = [
        {"step": rate * at, "tokens": 0, "seconds": at, "validation": 5 - rate * at / 500 + loss}
        for at in range(10, 101 if done else 41, 10)
    ]  # fmt: skip
    settings = {
        "attention": attention, "seed": seed, "seqlen": 8192, "seconds": seconds, "warmup": 10,
        "steps": 10**6, "schedule": "trapezoid", "layers": 8, "heads": 8, "head_dim": 64,
        "tokens_per_step": 32768,
    } | config  # fmt: skip
    machine = {"card": "a card", "torch": "2.11", "cuda": "13", "date": "2026-11-28T05:00"}
    return {"config": settings, "corpus": "c0", "machine": machine, "curve": curve, "done": done,
            "parameters": 30_000_000, "bucket_cost": 0.0}  # fmt: skip


def test_sittings_are_merged_by_setting_and_the_run_that_got_furthest_counts():
    from bench.lm.curves import by_variant, merge, unfinished

    runs = [
        run("hash16", done=False),
        run("dense"),
        run("hash8"),
        run("dense", seed=1),
        run("hash16", loss=0.5),
        run("hash16", done=False),
        run("dense", seqlen=16384),
        run("reformer16", micro_batch=2),  # a step of more passes is the same step
        run("drop50", done=False) | {"error": "out of memory"},
        run("naive", seqlen=999, done=False),
    ]
    first, second = merge(runs)
    assert {k: len(v) for k, v in by_variant(first).items()} == {
        "dense": 2,
        "hash8": 1,
        "hash16": 1,
        "reformer16": 1,
    }
    assert list(by_variant(first)) == ["dense", "hash8", "hash16", "reformer16"]
    assert by_variant(first)["hash16"][0]["curve"][-1]["validation"] == pytest.approx(3.5)
    assert unfinished(first) == ["drop50 seed 0 (out of memory, step 400)"]
    assert [x["config"]["seqlen"] for x in second] == [16384]


def test_losses_at_the_end_have_mean_spread_and_difference():
    from bench.lm.curves import end_table

    runs = [run("dense"), run("dense", seed=1, loss=0.2)]
    runs += [run("hash16", loss=0.1), run("hash16", seed=1, loss=0.1), run("drop50", seed=3)]
    rows = {row.split(" | ")[0]: row.strip(" |").split(" | ") for row in end_table(runs)[2:]}
    assert rows["| dense"][1:6] == ["2", "1000", "0", "3.1000 ± 0.1414", "-"]
    # seed by seed: +0.1 and -0.1
    assert rows["| hash16"][4:6] == ["3.1000 ± 0.0000", "+0.0000 ± 0.1414"]
    assert rows["| drop50"][4:6] == ["3.0000", "-0.1000"]


def test_equal_steps_end_before_the_rate_falls_and_lie_between_validations():
    from bench.lm.curves import comparable, loss_at, merge, shared_step, steps_table

    dense, fast, slow = run("dense"), run("hash16", rate=13, loss=0.1), run("reformer16", rate=3)
    assert [point["seconds"] for point in comparable(dense)][-1] == 80
    assert shared_step([dense, fast]) == 800
    assert loss_at(fast, 800) == pytest.approx(5 - 800 / 500 + 0.1)
    assert loss_at(dense, 801) != loss_at(dense, 801), "beyond the comparable points"
    (group,) = merge([dense, fast, slow])
    table = steps_table(group)
    assert table[0].startswith("| variant | at step 240 | last step shared with dense |")
    assert "| hash16 | 4.6200 | 800 | 3.5000 | 3.4000 | +0.1000 |" in table
    assert "| reformer16 | 4.5200 | 240 | 4.5200 | 4.5200 | +0.0000 |" in table
    by_steps = run("dense", steps=500)  # its rate falls after 402 steps, before 80 seconds
    assert comparable(by_steps)[-1]["step"] == 400


def test_losses_by_place_are_of_the_runs_that_were_asked_for_them():
    from bench.lm.curves import places_table

    told = {"by_place": {"ends": [512, 1024], "loss": [3.5, 3.0]}}
    other = {"by_place": {"ends": [512, 1024], "loss": [3.7, 2.8]}}
    head, _, *rows = places_table([
        run("dense"), run("window64") | told, run("hash16") | told, run("hash16", seed=1) | other
    ])  # fmt: skip
    assert head == "| variant | 0 to 512 | 512 to 1024 | first minus last |"
    assert sorted(rows) == [
        "| hash16 | 3.6000 ± 0.1414 | 2.9000 ± 0.1414 | 0.7000 ± 0.2828 |",
        "| window64 | 3.5000 | 3.0000 | 0.5000 |",
    ]
    assert places_table([run("dense")]) == []


@pytest.mark.parametrize("change", [{"schedule": "cosine"}, {"seconds": 0.0}])
def test_equal_steps_need_a_rate_that_does_not_know_the_end(change):
    from bench.lm.curves import comparable, steps_table

    runs = [run("dense", **change), run("hash16", **change)]
    assert steps_table(runs) == []
    assert bool(comparable(runs[0])) == (change == {"seconds": 0.0})


def test_speed_is_compared_within_a_sitting():
    from bench.lm.speed import table

    def rows(dense, hash16):
        return [
            {"seqlen": 8192, "variant": "dense", "ms": dense},
            {"seqlen": 8192, "variant": "none", "ms": 50.0},
            {"seqlen": 8192, "variant": "hash16", "ms": hash16},
            {"seqlen": 16384, "variant": "hash16", "error": "no"},
        ]

    last = table([rows(100.0, 80.0), rows(120.0, 60.0)])
    assert last[-1] == "| hash16 | 70.0 (1.62x, 73 %) |"
    assert table([rows(100.0, 80.0)])[2:4] == ["| dense | 100.0 |", "| none | 50.0 (2.00x) |"]
    assert table([rows(100.0, 80.0)[1:]])[2:] == ["| none | 50.0 |", "| hash16 | 80.0 (62 %) |"]
    assert table([[{"seqlen": 4, "variant": "hash16", "ms": 1.0}]])[-1] == "| hash16 | 1.0 |"


def test_page_of_several_records(tmp_path):
    pytest.importorskip("matplotlib", reason="the page has plots (extra 'plot')")
    from bench.lm.report import write

    machine = run("dense")["machine"]
    speed = {"machine": machine, "rows": [
        {"seqlen": 8192, "variant": v, "ms": 9.0, "compile": "blocks", "tokens_per_step": 1}
        for v in ("dense", "none")
    ]}  # fmt: skip
    counted = {
        "machine": machine, "config": {"heads": 8, "head_dim": 64}, "draws": 2, "coverage": [
            {"queries": q, "seqlen": t, "buckets": 8, "rule": "64", "chunk": 64, "coverage": 0.5,
             "bucket_cost": 1.5}
            for q in ("normal", "trained") for t in (1024, 2048)
        ],
    }  # fmt: skip
    wide = run("densek") | {"parameters": 34_000_000}
    placed = {"by_place": {"ends": [512, 8192], "loss": [3.5, 3.0]}}
    sittings = [
        {"runs": [run("dense"), run("hash16", rate=12) | placed]},
        {"runs": [run("dense", seed=1), wide]},
    ]
    page = tmp_path / "page.md"
    write([speed, *sittings, counted, speed], page, tmp_path / "img")
    text = page.read_text()
    assert text.count("| dense | 9.0 |") == 1, "sittings of speed are not merged"
    assert "2 sittings" in text
    assert "| dense | 2 | 1000 |" in text
    assert "| hash16 | 3.5000 | 3.0000 | 0.5000 |" in text
    assert "| trained | 8 | 64 | 50.0 % | 50.0 % | 1.50 |" in text
    assert "equal steps" in text
    assert "30.0 or 34.0 million parameters" in text
    assert "Not from a GPU" not in text
    pictures = {path.name for path in (tmp_path / "img").iterdir()}
    stems = ("lm-quality-0", "lm-coverage-0")
    assert pictures == {f"{stem}-{theme}.png" for stem in stems for theme in ("light", "dark")}
