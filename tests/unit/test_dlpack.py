"""Arrays of any library that speaks DLPack, on the host."""

import numpy as np
import pytest

import scfa_core as scfa

RNG = np.random.default_rng(0)


class Foreign:
    """An array of a library that this package has never heard of."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def foreign(*arrays):
    return [Foreign(x) for x in arrays]


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("backend", ["numba-cpu", "reference"])
def test_results_are_those_of_numpy(backend):
    q, k, v, dout = (floats(1, 2, 30, 16) for _ in range(4))
    hashes = RNG.integers(0, 3, (1, 2, 30))
    keep = RNG.random((1, 2, 30)) < 0.7
    mine = scfa.HashSparse(hashes, hashes) & scfa.QKSparse(keep, keep)
    theirs = scfa.HashSparse(*foreign(hashes, hashes)) & scfa.QKSparse(*foreign(keep, keep))
    right = scfa.attention(q, k, v, mine, return_lse=True, backend=backend)
    got = scfa.attention(*foreign(q, k, v), theirs, return_lse=True, backend=backend)
    for one, other in zip(right, got, strict=True):
        assert np.array_equal(one, other)
    grads = scfa.attention_backward(*foreign(dout, q, k, v, *got), theirs, backend=backend)
    right = scfa.attention_backward(dout, q, k, v, *right, mine, backend=backend)
    for one, other in zip(right, grads, strict=True):
        assert np.array_equal(one, other)


def test_the_callers_pattern_stays_as_it_is():
    q = floats(1, 1, 6, 16)
    (hashes,) = foreign(np.zeros((1, 1, 6), np.int64))
    pattern = scfa.HashSparse(hashes, hashes)
    assert scfa.make_plan(pattern, *foreign(q, q)).density() == 21 / 36
    scfa.validate(pattern & scfa.Causal(), *foreign(q, q))
    assert pattern.q_hash is hashes
    assert pattern.k_hash is hashes


def test_arrays_that_may_not_be_written():
    """As some libraries export them."""
    arrays = [floats(1, 1, 20, 16) for _ in range(3)]
    ids = np.arange(20)[None] // 7
    for x in (*arrays, ids):
        x.flags.writeable = False
    got = scfa.attention(*arrays, scfa.Documents(ids), backend="numba-cpu")
    right = scfa.attention(*arrays, scfa.Documents(ids), backend="reference")
    np.testing.assert_allclose(got, right, atol=1e-5)
