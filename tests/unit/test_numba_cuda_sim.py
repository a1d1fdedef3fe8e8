"""The CUDA kernels, run as plain Python in numba's simulator: no GPU, no GPU package.

The simulator must be chosen before numba is imported, so this file runs itself in a process of its
own, which works through all cases and prints what it found.
"""

import json

import pytest
from once import made_once
from simulated import by_turns, report_of

from scfa_core.testing import Part, Spec

# Tiles of the portable kernels are 16 rows by 8 here, of the tensor-core kernels (16-bit dtypes)
# 32 by 64 to 128: every case has ragged tiles. Hidden NaN (poison) sends the latter to the former.
CASES = {
    "causal": Spec(seqlen_q=19, seqlen_k=19),
    "causal-aligned-right": Spec(seqlen_q=9, seqlen_k=21, parts=(Part("causal", number=1),)),
    "hash": Spec(
        heads=2, seqlen_q=21, seqlen_k=18, parts=(Part("hash", number=3),), poison=True, seed=1
    ),
    "hash-extreme": Spec(seqlen_q=17, seqlen_k=17, parts=(Part("hash", "extreme"),), seed=2),
    "hash-disjoint": Spec(seqlen_q=9, seqlen_k=9, parts=(Part("hash", "disjoint"),), poison=True),
    "keep": Spec(seqlen_q=20, seqlen_k=20, parts=(Part("keep", number=50),), poison=True, seed=3),
    "keep-twice": Spec(
        seqlen_q=18, seqlen_k=12, parts=(Part("keep", number=80), Part("keep", number=80)), seed=4
    ),
    "documents": Spec(
        seqlen_q=20, seqlen_k=20, head_dim=24, parts=(Part("documents", causal=False),), seed=5
    ),
    "window": Spec(
        batch=2, seqlen_q=17, seqlen_k=17, head_dim_v=24, parts=(Part("window", number=5),)
    ),
    "ranges": Spec(
        seqlen_q=18, seqlen_k=23, parts=(Part("ranges", "random"),), poison=True, seed=6
    ),
    "ranges-outside": Spec(
        seqlen_q=11, seqlen_k=9, parts=(Part("ranges", "outside"), Part("ranges", "narrow")), seed=7
    ),
    "two-groups": Spec(
        seqlen_q=19,
        seqlen_k=19,
        parts=(Part("hash", number=2), Part("documents", number=2), Part("window", number=9)),
        seed=8,
    ),
    "tensor-cores": Spec(
        seqlen_q=35, seqlen_k=67, dtype="bfloat16", parts=(Part("hash", number=2),), seed=9
    ),
    "tensor-cores-complete-tile": Spec(  # whose rows, as wide as the tile, are gathered unchecked
        seqlen_q=5,
        seqlen_k=67,
        head_dim=32,
        head_dim_v=32,
        dtype="float16",
        parts=(Part("causal", number=1),),
        seed=11,
    ),
    "tensor-cores-one-side-narrower": Spec(
        seqlen_q=5,
        seqlen_k=67,
        head_dim=32,
        head_dim_v=24,
        dtype="bfloat16",
        parts=(Part("causal", number=1),),
        seed=12,
    ),
    "tensor-cores-everything": Spec(
        heads=2,
        heads_kv=1,
        seqlen_q=13,
        seqlen_k=17,
        head_dim=24,
        head_dim_v=32,
        dtype="float16",
        layout="bthd",
        softmax_scale=-0.3,
        parts=(Part("hash", number=2), Part("keep", number=80), Part("ranges", "sorted")),
        poison=True,
        seed=10,
    ),
    "tensor-cores-not-for-scale-0": Spec(
        seqlen_q=5, seqlen_k=1, dtype="float16", softmax_scale=0.0
    ),
    "float64": Spec(seqlen_q=9, seqlen_k=11, dtype="float64", parts=(Part("hash", number=2),)),
}
PLAN_FIELDS = ("q_index", "q_count", "k_index", "k_count", "key_start", "key_end")


def run_case(spec):
    """Run one case: plan fields that differ from the reference, and what is not exact."""
    import numpy as np

    from scfa_core.testing import build, judge, run_numpy

    case = build(spec)
    got, plan = run_numpy(case, "numba-cuda")
    _, right = run_numpy(case, "reference")
    differing = [x for x in PLAN_FIELDS if not np.array_equal(getattr(plan, x), getattr(right, x))]
    return {"plan": differing, "inexact": [str(v) for v in judge(case, got) if not v.ok]}


def sum_many_tiles():
    """Errors of a thread's sums over 500 tiles, in roundings of the root of the squares' sum."""
    import numpy as np
    from scfa_core.backends.numba_cuda.tiles import Shape, tile_functions

    functions = tile_functions("float32", Shape(1, 1, 1, 8))
    rng = np.random.default_rng(0)
    width = 64
    out, lost, tile = (np.zeros(width, np.float32) for _ in range(3))
    weights, seen = np.ones((1, 8), np.float32), np.ones((1, 8), np.uint8)
    values = rng.standard_normal((500, 8, width), np.float32)
    for some in values:
        functions.accumulate(out, lost, tile, width, weights, seen, some, width, 0, 0)
    terms = values.reshape(-1, width).astype(float)
    errors = (out - terms.sum(axis=0)) / np.linalg.norm(terms, axis=0) * 2.0**24
    functions.add_with_loss(out, lost, 0, np.float32(np.inf))
    functions.add_with_loss(out, lost, 0, np.float32(1))
    for _ in range(4):  # of finite terms that no float32 can hold the sum of
        functions.add_with_loss(out, lost, 1, np.float32(3e38))
    infinite = bool(np.isposinf(out[:2]).all())
    return {"roundings": float((errors**2).mean() ** 0.5), "infinite": infinite}


def merged_parts():
    """Worst difference of gradients, two parts' under the merged lse added, from the whole's."""
    import numpy as np

    import scfa_core as scfa
    from scfa_core.merging import merge_attention

    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 1, 9, 16))
    parts = (scfa.SlidingWindow(3), scfa.Causal(lag=3))
    near, far = (scfa.attention(q, k, v, x, return_lse=True) for x in parts)
    out, lse = merge_attention(*zip(near, far, strict=True))
    grads = (scfa.attention_backward(dout, q, k, v, out, lse, x) for x in parts)
    whole = scfa.attention(q, k, v, return_lse=True)
    right = scfa.attention_backward(dout, q, k, v, *whole)
    summed = map(sum, zip(*grads, strict=True))
    return max(float(np.abs(x - y).max()) for x, y in zip(summed, right, strict=True))


def sharp_only_keys():
    """Whether out and dv are copies, where a row has one key and scores are of thousands."""
    import numpy as np

    import scfa_core as scfa

    rng = np.random.default_rng(1)
    q, k, v, dout = rng.standard_normal((4, 1, 1, 18, 16)).astype(np.float32)
    q, k = q * np.float32(1000), k * np.float32(30)
    # A power of 2 as softmax_scale would let every score come back from base 2 unharmed.
    call = {"pattern": scfa.SlidingWindow(1), "softmax_scale": 0.3}
    out, lse = scfa.attention(q, k, v, return_lse=True, **call)
    _, _, dv = scfa.attention_backward(dout, q, k, v, out, lse, **call)
    return bool(np.array_equal(out, v) and np.array_equal(dv, dout))


def lse_of_which():
    """For pairs of an own and a given lse, whether the own one was taken."""
    import numpy as np
    from scfa_core.backends.numba_cuda.softmax import refined_lse

    own = 10 / 3
    near = np.nextafter(np.float32(own), np.float32(9))
    given = {"its rounding": np.float32(own), "neighbour": near, "further": near + 8 * (near - own)}
    given |= {"infinite": np.float32(np.inf), "NaN": np.float32(np.nan)}
    taken = {name: bool(refined_lse(own, x) == own) for name, x in given.items()}
    taken["both -inf"] = bool(np.isneginf(refined_lse(-np.inf, np.float32(-np.inf))))
    return taken


def main():
    import warnings

    from scfa_core import use_backend
    from scfa_core.dispatch import unavailable_reason

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # Inf and NaN are among the data
    by_turns()
    report = {"availability": unavailable_reason("numba-cuda")}
    for name, spec in CASES.items():
        report[name] = run_case(spec)
    report["long sums"] = sum_many_tiles()
    report["lse"] = lse_of_which()
    with use_backend("numba-cuda"):
        report["merged parts"] = merged_parts()
        report["sharp"] = sharp_only_keys()
    print(json.dumps(report))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return made_once(tmp_path_factory, "numba_cuda_sim", lambda _: report_of(__file__))


def test_simulator_is_available(report):
    assert report["availability"] is None


@pytest.mark.parametrize("name", CASES)
def test_plan_equals_reference(report, name):
    assert report[name]["plan"] == []


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_are_exact(report, name):
    assert report[name]["inexact"] == []


def test_float32_sums_over_many_tiles(report):
    """Two roundings are allowed beyond what the plain formula takes; row by row it were 25."""
    assert report["long sums"]["roundings"] < 2
    assert report["long sums"]["infinite"]


def test_float64_gradients_of_parts_under_the_merged_lse(report):
    assert report["merged parts"] < 1e-5


def test_the_weight_of_an_only_key_is_one(report):
    """In base 2 the rounding of another factor parts lse from the score."""
    assert report["sharp"] is True


def test_another_lse_is_taken_as_it_is(report):
    own = {"its rounding", "neighbour", "both -inf"}
    assert {name for name, taken in report["lse"].items() if taken} == own


if __name__ == "__main__":
    main()
