"""Changed problems are what the seeds say and computed right; coverage sees what is there."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from scfa_core.reference.masks import dense_mask

from scfa_core import campaign, campaign_changes, cli, cli_verify, lowering, testing, verify
from scfa_core import patterns as pt
from scfa_core.campaign_changes import MOST_ROWS, STEPS
from scfa_core.campaign_coverage import covered, features
from scfa_core.errors import ScfaError
from scfa_core.verify_warm import kind_of

FLOAT = ("float32",)
SMALL = {"most_rows": 60, "dtypes": FLOAT}


def seen_by(pattern, **sizes):
    drawn = SimpleNamespace(spec=testing.Spec(**sizes), pattern=pattern)
    return features(drawn.spec, drawn.pattern, verify.reference_fields(drawn))


def digest(drawn):
    plan = verify.reference_fields(drawn)
    parts = [str(drawn.spec).encode(), *(plan[name].tobytes() for name in verify.PLAN_FIELDS)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


# Changes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draw", "right"),
    [
        (campaign.draw_pattern, "2482f770b8558bf7"),
        (campaign_changes.draw_pattern, "ca7372434d54469d"),
    ],
)
def test_recorded_seeds_are_the_problems_that_they_were(draw, right, monkeypatch):
    """Campaigns are recorded by their seeds: these digests must never change.

    They are of plans with queries in the order of groups alone, as it was when they were recorded.
    """
    monkeypatch.setattr(lowering, "ROWS_IN_ANY_ORDER", 2**31)
    drawn = [draw(seed, most_rows=200, dtypes=verify.HOST_DTYPES) for seed in range(40)]
    whole = hashlib.sha256("".join(map(digest, drawn)).encode()).hexdigest()
    assert whole[:16] == right


@pytest.mark.parametrize("step", STEPS)
def test_every_step_makes_other_problems_with_the_mask_of_their_clauses(step):
    changed = 0
    for seed in range(2 * len(campaign.FAMILIES)):
        base = campaign.draw_pattern(seed, **SMALL)
        drawn = campaign_changes.draw_pattern(seed, **SMALL, steps=(step,))
        spec = drawn.spec
        plain = testing.Spec(**vars(spec) | {"parts": base.spec.parts})
        changed += plain != base.spec or not np.array_equal(drawn.mask, base.mask)
        sizes = (spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k)
        np.testing.assert_array_equal(drawn.mask, dense_mask(drawn.pattern, *sizes))
    assert changed >= 4


@pytest.mark.parametrize("seed", range(14))
def test_changed_problems_are_computed_right(seed):
    dtypes = ("float32", "float64", "float16", "bfloat16")
    finding = campaign.verify_deep("reference", seed, most_rows=90, dtypes=dtypes, changed=True)
    assert not finding.complaints
    assert any(part.style == "changed" for part in finding.spec.parts)


def test_changed_problems_keep_to_their_limits_and_show_something():
    for seed in range(140):
        base = campaign.draw_pattern(seed, **SMALL).spec
        drawn = campaign_changes.draw_pattern(seed, **SMALL)
        spec = drawn.spec
        assert drawn.mask.any() or spec.parts[0].kind == "empty", seed
        assert 1 <= spec.seqlen_q <= 60
        assert 1 <= spec.seqlen_k <= 60
        most = max(MOST_ROWS, base.batch * base.heads * 60)
        assert spec.batch * spec.heads * max(spec.seqlen_q, spec.seqlen_k) <= most
        assert spec.heads % spec.heads_kv == 0


def test_no_step_leads_beyond_the_most_rows(monkeypatch):
    monkeypatch.setattr(campaign_changes, "MOST_ROWS", 1)
    for seed in range(20):
        base = campaign.draw_pattern(seed, **SMALL).spec
        spec = campaign_changes.draw_pattern(seed, **SMALL, steps=("heads", "length")).spec
        assert spec.batch * spec.heads * spec.seqlen_q <= base.batch * base.heads * 60
        assert campaign_changes._rows_of(spec) <= campaign_changes._rows_of(base)


def test_steps_bring_lengths_beside_tiles_and_other_heads():
    steps = ("length", "heads")
    limits = {"most_rows": 300, "dtypes": FLOAT}
    specs = [campaign_changes.draw_pattern(x, **limits, steps=steps).spec for x in range(100)]
    assert {1, 63} <= {spec.seqlen_q % 64 for spec in specs}
    assert {1, 63} <= {spec.seqlen_k % 64 for spec in specs}
    assert {1, 2, 3, 4, 5, 8} <= {spec.heads // spec.heads_kv for spec in specs}


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


def test_changed_problems_reach_more_than_as_many_seeds():
    """Heads, lengths and combinations that no family draws."""
    options = {"rows": 60, "dtypes": FLOAT}
    *_, plain = covered(range(100), **options, changed=False)
    *_, changed = covered(range(100), **options, changed=True)
    for kind in ("problem", "query tile", "key tile"):
        assert changed[kind] > 1.05 * plain[kind]


# Command -----------------------------------------------------------------------------------------


def test_command_line(capsys):
    options = ["verify", "--deep", "--changed", "--backend", "reference", "--rows", "40"]
    assert cli.main([*options, "--dtype", "float32", "--count", "3"]) == 0
    assert "3 problems from seed 0, 0 failed" in capsys.readouterr().out
    parsed = cli.build_parser().parse_args(options)
    assert cli_verify.reproduction(parsed, 5).endswith(
        "--seed 5 --count 1 --deep --changed --rows 40"
    )


def test_a_failure_is_that_of_the_changed_problem(monkeypatch):
    seen = []

    def run(problem, backend):
        seen.append(problem.case.spec)
        raise ArithmeticError

    monkeypatch.setattr(campaign, "run", run)
    (finding,) = verify.verify("reference", seed=7, count=1, rows=40, deep=True, changed=True)
    assert "ArithmeticError" in finding.complaints[0]
    right = campaign_changes.draw_pattern(7, most_rows=40, dtypes=verify.HOST_DTYPES).spec
    assert seen == [finding.spec] == [right]


def test_coverage_is_counted_without_a_run(capsys, monkeypatch):
    monkeypatch.setattr(campaign, "run", lambda *_: 1 / 0)
    options = ["--plain", "verify", "--deep", "--rows", "40", "--dtype", "float32", "--count", "4"]
    assert cli.main([*options, "--coverage", "--seed", "3", "--changed"]) == 0
    *_, right = covered(range(3, 7), rows=40, dtypes=FLOAT, changed=True)
    printed = capsys.readouterr().out
    for kind, count in right.items():
        assert f"{kind} " in printed
        assert str(count) in printed


def test_kernels_made_beforehand_are_those_of_changed_problems():
    for seed in range(20):
        options = {"rows": 40, "dtypes": ("float16", "float32"), "deep": True, "long": 0}
        kind = kind_of(seed, **options, changed=True)
        problem = campaign.draw(seed, most_rows=40, dtypes=options["dtypes"], changed=True)
        spec = problem.case.spec
        assert kind[:3] == (spec.dtype, spec.head_dim, spec.head_dim_v)
        assert kind.group * spec.heads_kv == spec.heads


def test_only_structured_problems_are_changed_and_covered(capsys):
    with pytest.raises(ScfaError, match="--deep"):
        next(verify.verify("reference", changed=True))
    assert cli.main(["verify", "--coverage"]) == 2
    assert cli.main(["verify", "--deep", "--long", "3", "--coverage"]) == 2
    assert "(--deep), none of them long" in capsys.readouterr().err
