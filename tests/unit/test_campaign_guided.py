"""Guided problems: recipes draw what they say, coverage sees what is there, failures replay."""

import hashlib
import io
from types import SimpleNamespace

import numpy as np
import pytest
from scfa_core.reference.masks import dense_mask

from scfa_core import campaign, cli, testing, verify
from scfa_core import patterns as pt
from scfa_core.campaign_coverage import features
from scfa_core.campaign_guided import MOST_ROWS, recipes, verify_recipe
from scfa_core.campaign_recipes import STEPS, Recipe, draw
from scfa_core.errors import ScfaError

FLOAT = ("float32",)
SMALL = {"most_rows": 60, "dtypes": FLOAT}


def reached(drawn):
    return features(drawn.spec, drawn.pattern, verify.reference_fields(drawn))


def seen_by(pattern, **sizes):
    return reached(SimpleNamespace(spec=testing.Spec(**sizes), pattern=pattern))


def digest(drawn):
    plan = verify.reference_fields(drawn)
    parts = [str(drawn.spec).encode(), *(plan[name].tobytes() for name in verify.PLAN_FIELDS)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# Recipes -----------------------------------------------------------------------------------------


def test_recorded_seeds_are_the_problems_that_they_were():
    """Campaigns are recorded by their seeds: this digest must never change."""
    seeds = range(40)
    drawn = [campaign.draw_pattern(x, most_rows=200, dtypes=verify.HOST_DTYPES) for x in seeds]
    whole = hashlib.sha256("".join(map(digest, drawn)).encode()).hexdigest()
    assert whole[:16] == "2482f770b8558bf7"


@pytest.mark.parametrize("seed", range(7))
def test_a_recipe_without_steps_is_its_seed(seed):
    mine = campaign.fill(draw(Recipe(seed, 60, FLOAT)))
    right = campaign.draw(seed, **SMALL)
    assert mine.case.spec == right.case.spec
    assert mine.views == right.views
    for name in ("q", "k", "v", "dout", "mask"):
        np.testing.assert_array_equal(getattr(mine.case, name), getattr(right.case, name))


@pytest.mark.parametrize("step", STEPS)
def test_every_step_makes_other_problems_that_are_computed_right(step):
    """On every family, and again from the line that was printed."""
    changed = 0
    for seed in range(len(campaign.FAMILIES)):
        recipe = Recipe(seed, 60, FLOAT, ((step, 2 * seed + 1), (step, 5)))
        drawn, again = draw(recipe), draw(Recipe.of(str(recipe)))
        assert digest(drawn) == digest(again)
        spec, base = drawn.spec, draw(Recipe(seed, 60, FLOAT))
        plain = testing.Spec(**vars(spec) | {"parts": base.spec.parts})
        changed += plain != base.spec or not np.array_equal(drawn.mask, base.mask)
        sizes = (spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
        np.testing.assert_array_equal(drawn.mask, dense_mask(drawn.pattern, *sizes))
        finding = verify_recipe(recipe, backend="reference")
        assert not finding.complaints
        assert finding.recipe == str(recipe)
    assert changed >= 2


def test_steps_bring_lengths_beside_tiles_and_other_heads():
    specs = [draw(Recipe(0, 300, FLOAT, (("length", x), ("heads", x)))).spec for x in range(60)]
    assert {1, 63} <= {spec.seqlen_q % 64 for spec in specs}
    assert {1, 63} <= {spec.seqlen_k % 64 for spec in specs}
    assert {1, 2, 3, 4, 5, 8} <= {spec.heads // spec.heads_kv for spec in specs}
    assert max(spec.seqlen_q for spec in specs) <= 300


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"seed": 1, "rows": 9, "dtypes": ["float32"]}',
        '{"seed": 1, "rows": 9, "dtypes": ["float32"], "steps": [["lenght", 2]]}',
    ],
)
def test_what_is_no_recipe_is_refused(line):
    with pytest.raises(ScfaError, match="recipe"):
        Recipe.of(line)


# Coverage ----------------------------------------------------------------------------------------


def test_a_lone_row_and_a_lone_key_are_seen():
    """65 queries that all see 65 keys: a tile of one row, a last key tile of one key."""
    lone = ("query tile", 64, 64, "rows", 1, "last key tile", 1)
    assert lone in seen_by(pt.SlidingWindow(65, causal=False), seqlen_q=65, seqlen_k=65)
    assert lone not in seen_by(pt.SlidingWindow(64, causal=False), seqlen_q=64, seqlen_k=64)
    assert lone not in seen_by(pt.SlidingWindow(65, causal=False), seqlen_q=66, seqlen_k=65)


def test_a_head_that_alone_sees_a_tile_is_seen():
    end = np.full((1, 4, 70), 60)
    ranges = pt.KeyRanges(np.zeros_like(end), end)
    sizes = {"heads": 4, "seqlen_q": 70, "seqlen_k": 128}
    alone = ("key tile", 64, 64, "queries", 1, "heads", 1)
    assert alone not in seen_by(ranges, **sizes)
    end[0, 2, 69] = 65
    assert alone in seen_by(ranges, **sizes)


def test_skipped_tiles_and_steps_back_are_seen():
    start = np.zeros((1, 1, 64), np.int64)
    start[..., 20] = 200
    found = seen_by(pt.KeyRanges(start, start + 5), seqlen_q=64, seqlen_k=256)
    assert ("query tile", 64, 64, "steps back", 3, "gap", 3) in found
    start[..., 20:] = 200
    found = seen_by(pt.KeyRanges(start, start + 5), seqlen_q=64, seqlen_k=256)
    assert ("query tile", 64, 64, "steps back", 0, "gap", 3) in found


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_problems_without_tiles_have_features_too(sizes):
    assert seen_by(pt.Causal(), seqlen_q=sizes[0], seqlen_k=sizes[1])


# Guidance ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_guided_problems_reach_more_than_as_many_seeds():
    count, guided, plain = 400, set(), set()
    found = list(recipes(0, count, **SMALL, seen=guided))
    for seed in range(count):
        plain |= reached(campaign.draw_pattern(seed, **SMALL))
    assert len(guided) > len(plain)
    assert found == list(recipes(0, count, **SMALL))
    changed = [recipe for recipe in found if recipe.steps]
    assert count / 10 < len(changed) < count
    for spec in (draw(recipe).spec for recipe in changed):
        assert spec.batch * spec.heads * spec.seqlen_q <= MOST_ROWS


def test_what_was_reached_before_does_not_count():
    """Nothing new: every problem is a seed's own, there is nothing to begin with."""
    known = set()
    list(recipes(0, 20, **SMALL, seen=known))
    before = len(known)
    assert all(not recipe.steps for recipe in list(recipes(0, 2, **SMALL, seen=known)))
    assert len(known) == before


# Command -----------------------------------------------------------------------------------------


def test_command_line(capsys):
    options = ["--plain", "verify", "--deep", "--guided", "--backend", "reference", "--rows", "40"]
    assert cli.main([*options, "--dtype", "float32", "--count", "12"]) == 0
    known = set()
    list(recipes(0, 12, most_rows=40, dtypes=FLOAT, seen=known))
    printed = capsys.readouterr().out
    assert "12 problems from seed 0, 0 failed; largest" in printed
    assert f"; {len(known)} features reached" in printed


def test_a_failure_prints_a_recipe_that_fails_again(capsys, monkeypatch, tmp_path):
    right = campaign.run

    def run(problem, backend):
        if any(part.style == "guided" for part in problem.case.spec.parts):
            raise ArithmeticError(f"{problem.case.mask.sum()} pairs")
        return right(problem, backend)

    monkeypatch.setattr(campaign, "run", run)
    options = ["--plain", "verify", "--backend", "reference"]
    written = tmp_path / "found.json"
    more = ["--deep", "--guided", "--rows", "40", "--count", "30", "--json", str(written)]
    assert cli.main([*options, *more]) == 1
    printed = capsys.readouterr().out.splitlines()
    complaint = next(line for line in printed if "ArithmeticError" in line)
    line = next(line for line in printed if line.startswith("  recipe: ")).removeprefix(
        "  recipe: "
    )
    assert f"  reproduce: echo '{line}' | scfa verify --backend reference --replay -" in printed
    assert '"recipe"' in written.read_text()

    kept = tmp_path / "recipes"
    kept.write_text(f"\n{line}\n")
    assert cli.main([*options, "--replay", str(kept)]) == 1
    assert complaint in capsys.readouterr().out.splitlines()
    monkeypatch.setattr("sys.stdin", io.StringIO(line))
    assert cli.main([*options, "--replay", "-"]) == 1
    monkeypatch.setattr(campaign, "run", right)
    assert cli.main([*options, "--replay", str(kept)]) == 0
    assert f"1 problems of {kept}, 0 failed" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_run_the_same_recipes():
    options = {"rows": 30, "dtype": "float32", "deep": True, "guided": True, "count": 6}
    apart = [x.recipe for x in verify.verify("reference", workers=2, **options)]
    assert apart == [x.recipe for x in verify.verify("reference", **options)]
    assert apart == [str(x) for x in recipes(0, 6, most_rows=30, dtypes=FLOAT)]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"guided": True}, "--deep"),
        ({"guided": True, "deep": True, "long": 5}, "none is long"),
        ({"guided": True, "deep": True, "warm": True, "workers": 2}, "--warm goes with seeds"),
        ({"replay": [Recipe(0, 9, ("float16", "float128"))]}, "recipes may draw"),
    ],
)
def test_what_does_not_go_together_is_refused(options, reason):
    with pytest.raises(ScfaError, match=reason):
        next(verify.verify("reference", **options))


def test_a_missing_file_is_told(capsys):
    assert cli.main(["verify", "--replay", "/no/such/file"]) == 2
    assert "cannot read recipes from /no/such/file" in capsys.readouterr().err
