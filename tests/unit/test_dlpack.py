"""Arrays of any library that speaks DLPack, on the host."""

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import hashing

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
    if np.lib.NumpyVersion(np.__version__) < "1.25.0":
        keep = keep.astype(np.uint8)  # its DLPack has no bool
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


def test_rows_of_any_library_are_hashed():
    rows, directions = floats(2, 4, 30, 16), hashing.random_directions(2, 16, 8, rounds=2)
    center = floats(4, 16)
    right = hashing.angular_hash(rows, directions, center)
    got = hashing.angular_hash(*foreign(rows, directions, center))
    assert np.array_equal(got, right)
    balance = hashing.bucket_balance(*foreign(right), 8)
    assert np.array_equal(balance.counts, hashing.bucket_balance(right, 8).counts)
    theirs = hashing.disjoint_rounds(*foreign(right, right), 8)
    for one, other in zip(theirs, hashing.disjoint_rounds(right, right, 8), strict=True):
        assert np.array_equal(one.q_hash, other.q_hash)


class Bfloat16:
    """An array of a library whose bfloat16 NumPy's DLPack refuses."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **options):
        raise BufferError("Unsupported dtype in DLTensor.")

    def __dlpack_device__(self):
        return 1, 0


class SeenBfloat16(Bfloat16):
    """One that makes an ml_dtypes array of itself when NumPy asks, as JAX's on a CPU."""

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_bfloat16_that_numpy_does_not_take_through_dlpack():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has no bfloat16 of its own")
    arrays = [floats(1, 2, 20, 16).astype(ml_dtypes.bfloat16) for _ in range(3)]
    right = scfa.attention(*arrays, scfa.Causal(), backend="reference")
    got = scfa.attention(*map(SeenBfloat16, arrays), scfa.Causal(), backend="reference")
    assert got.dtype == right.dtype
    assert np.array_equal(got, right)
    with pytest.raises(
        scfa.DTypeError, match=r"dtype bfloat16 through DLPack .*convert it to float"
    ):
        scfa.attention(*map(Bfloat16, arrays), scfa.Causal(), backend="reference")


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_jax_arrays_on_the_host(name):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    (device, *_) = jax.devices("cpu")
    arrays = [jax.device_put(floats(1, 2, 20, 16), device).astype(name) for _ in range(3)]
    got = scfa.attention(*arrays, scfa.Causal(), backend="numba-cpu")
    assert got.dtype.name == name
    seen = [np.asarray(x).astype(np.float32) for x in arrays]
    right = scfa.attention(*seen, scfa.Causal(), backend="reference")
    np.testing.assert_allclose(got.astype(np.float32), right, atol=2e-2)


def test_the_papers_function_takes_any_head_dim():
    pytest.importorskip("torch", reason="the paper's functions need torch")
    from scfa_core import compat

    q, k, v = (floats(1, 30, 2, 20) for _ in range(3))
    hashes = RNG.integers(0, 3, (1, 30, 2))
    right = compat.dynamic_sparse_attention(q, k, v, hashes, hashes)
    got = compat.dynamic_sparse_attention(*foreign(q, k, v, hashes, hashes))
    assert np.array_equal(got, right)


def test_queries_at_the_end_of_their_keys():
    from scfa_core.decoding import at_end

    q, k = floats(1, 2, 3, 16), floats(1, 2, 9, 16)
    got, right = (at_end(scfa.SlidingWindow(3), *x).mask(3, 9) for x in (foreign(q, k), (q, k)))
    assert np.array_equal(got, right)
