"""Which scores the forward kernel masks, and which it does not make at all (softmax_sm90.cuh)."""

import ctypes

import hopper_host
import host_build
import numpy as np
import pytest
from hopper_host import check, source_of

from scfa_core.testing import Part, Spec

pytestmark = host_build.NEEDS_COMPILER
kernels = hopper_host.kernels

HEADERS = ("products_sm90.cuh", "softmax_sm90.cuh")
DRIVER = """
extern "C" void run(int first, int count, unsigned* found) {
  for (int i = 0; i < count; ++i) found[i] = columns_before(first + i);
}
"""


def test_columns_before(kernels):
    """Of eight columns a thread holds the first two, as many bits from the lowest on."""
    function = kernels.start(source_of(HEADERS, DRIVER), (("BFLOAT16", 1),))
    columns = np.arange(-300, 400)
    found = np.zeros(columns.size, np.uint32)
    function.result()(int(columns[0]), columns.size, ctypes.c_void_p(found.ctypes.data))
    held = np.array([8 * (i // 2) + i % 2 for i in range(32)])
    right = (held < columns[:, None]) @ (1 << np.arange(32, dtype=np.uint64))
    np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 66, 127, 128, 129, 192, 193, 257])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_keys_that_end_in_either_half_of_a_block(kernels, head_dim, keys):
    spec = Spec(1, 1, 1, 70, keys, head_dim, head_dim, "bfloat16", poison=True, seed=keys)
    check(kernels, spec, order=keys % 3)


@pytest.mark.parametrize(
    ("head_dim", "length"),
    [*((64, n) for n in (5, 64, 65, 100, 128, 190)), *((128, n) for n in (65, 100, 128))],
)
def test_ranges_that_start_and_end_in_a_block(kernels, head_dim, length):
    """Two heads of a few tiles, so that rows of one are on their way while another is made."""
    parts = (Part("window", number=length),)
    sizes = (1, 2, 2, 410, 410, head_dim, head_dim, "float16")
    check(kernels, Spec(*sizes, parts=parts, poison=True, seed=length), order=length % 3)
