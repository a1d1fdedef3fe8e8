"""What random problems reach: an option that no generator draws is an option that no fuzz tests."""

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core.testing import GROUP_STYLES, KEEP_STYLES, RANGE_STYLES, build, random_spec

OPTIONS = {  # attributes of a pattern -> what must come up
    scfa.Causal: {"include_self": {True, False}, "align": {"top-left", "bottom-right"}},
    scfa.HashSparse: {"causal": {True, False}, "include_self": {True, False}},
    scfa.QKSparse: {"causal": {True, False}},
    scfa.Documents: {"causal": {True, False}},
    scfa.SlidingWindow: {"causal": {True, False}},
    scfa.KeyRanges: {},
}


@pytest.fixture(scope="module")
def drawn():
    """Many problems, and each atomic pattern with its problem."""
    specs = [random_spec(seed, most_rows=60) for seed in range(300)]
    return specs, [(spec, part) for spec in specs for part in build(spec).pattern.parts]


def test_every_option_of_every_pattern_is_drawn(drawn):
    for kind, options in OPTIONS.items():
        mine = [part for _, part in drawn[1] if type(part) is kind]
        assert len(mine) >= 10, kind
        for name, values in options.items():
            assert {getattr(part, name) for part in mine} == values, (kind, name)


def test_lags_are_drawn(drawn):
    lags = [(spec, part) for spec, part in drawn[1] if getattr(part, "lag", 0) > 1]
    assert {part.align for _, part in lags} == {"top-left", "bottom-right"}
    assert any(part.lag < spec.seqlen_q for spec, part in lags)
    assert any(part.lag >= spec.seqlen_q for spec, part in lags)
    assert any(len(spec.parts) > 1 for spec, _ in lags)


def test_every_style_and_size_is_drawn(drawn):
    specs, _ = drawn
    for kind, all_styles in (
        ("hash", GROUP_STYLES),
        ("documents", GROUP_STYLES),
        ("keep", KEEP_STYLES),
        ("ranges", RANGE_STYLES),
    ):
        styles = {part.style for spec in specs for part in spec.parts if part.kind == kind}
        assert styles == set(all_styles), kind
    assert {spec.layout for spec in specs} == {"bhtd", "bthd"}
    assert {spec.heads // spec.heads_kv for spec in specs} == {1, 2, 4}
    assert {spec.poison for spec in specs} == {True, False}
    assert any(spec.seqlen_q != spec.seqlen_k for spec in specs)
    assert any(spec.head_dim != spec.head_dim_v for spec in specs)


def test_hypothesis_finds_a_lag():
    hypothesis = pytest.importorskip("hypothesis", reason="draws by hypothesis")
    from scfa_core.strategies import specs

    def shows_far_keys_only(spec):
        parts = build(spec).pattern.parts
        return any(getattr(part, "lag", 0) > 1 for part in parts)

    found = hypothesis.find(specs(most_rows=60), shows_far_keys_only)
    assert len(found.parts) == 1


def test_a_lag_of_a_recipe_is_what_it_says():
    """Its number of keys, from 5 on; smaller ones choose the alignment alone."""
    from scfa_core.testing import Part, Spec

    for number, align, lag in ((0, "top-left", 0), (1, "bottom-right", 0), (5, "bottom-right", 5)):
        case = build(Spec(seqlen_q=12, seqlen_k=12, parts=(Part("causal", number=number),)))
        want = scfa.Causal(align=align, lag=lag)
        np.testing.assert_array_equal(case.mask, want.mask(12, 12))


def test_deep_problems_draw_lags():
    from scfa_core.campaign import draw

    seeds = [seed for seed in range(400) if seed % 11 in (7, 8, 9)]
    problems = [draw(seed, most_rows=330, dtypes=("float32",)) for seed in seeds]
    parts = [part for problem in problems for part in problem.case.pattern.parts]
    assert {part.lag for part in parts if type(part) is scfa.Causal} >= {2, 65}
