"""Views of one very large buffer: every offset must be 64 bits wide, and so every stride."""

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import testing
from scfa_core.patterns.base import map_arrays
from scfa_core.testing import Part, Results, Spec

pytestmark = pytest.mark.alone  # buffers of 4 to 8 GiB

ROWS, KEYS = 5, 4
FAR = 2**31 + 64  # elements: beyond int32, and as bytes beyond what one multiply spans
STRIDES = {  # of (batch, heads, rows) in elements
    "heads": (2**30, FAR, 256),
    "batches": (FAR, 2**21, 256),
    "rows": (2**16, 2**12, FAR),
    "rows of odd addresses": (2**16, 2**12, FAR + 1),
    "rows that add up": (2**16, 2**12, 2**30),  # a stride fits int32, an offset does not
}
COLUMNS = {"q": 0, "dout": 64, "k": 128, "v": 192}  # where each begins in a row of the buffer


def room_for(torch, size, dtype):
    """A buffer of so many elements, if the card has it."""
    need = size * dtype.itemsize
    free, _ = torch.cuda.mem_get_info()
    if free < need + 2**30:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")
    return torch.empty(size, dtype=dtype, device="cuda")


@pytest.mark.parametrize("name", STRIDES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_strides_beyond_32_bits(torch, backend, hold, name, dtype):
    """q, k, v and dout lie between each other in one buffer; held against float64."""
    steps = STRIDES[name]
    spec = Spec(2, 4, 2, ROWS, KEYS, 64, 32, dtype, parts=(Part("hash", number=2),), seed=21)
    case = testing.build(spec)
    reach = steps[0] + 3 * steps[1] + (ROWS - 1) * steps[2] + 256
    buffer = room_for(torch, reach, getattr(torch, dtype))
    views = {}
    for which, column in COLUMNS.items():
        x = getattr(case, which)
        last = sum((n - 1) * step for n, step in zip(x.shape, steps, strict=False))
        assert last >= 2**31
        views[which] = buffer.as_strided(x.shape, (*steps, 1), column)
        if dtype == "bfloat16":
            views[which].copy_(torch.from_numpy(x.view(np.int16)).view(torch.bfloat16))
        else:
            views[which].copy_(torch.from_numpy(x))
    pattern = map_arrays(case.pattern, lambda x: torch.from_numpy(x.copy()).cuda())
    q, k, v, dout = (views[which] for which in ("q", "k", "v", "dout"))
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=backend)
    grads = scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend=backend)
    torch.cuda.synchronize()
    hold(case, Results(*(x.double().cpu().numpy() for x in (out, lse, *grads))))


@pytest.mark.parametrize("stride", [2**29, 2**31 + 1])
def test_strides_of_hashes_beyond_32_bits(torch, backend, stride):
    """One id a row, rows of them far apart."""
    buffer = room_for(torch, 4 * stride + 32, torch.int32)
    ids = buffer.as_strided((1, 2, 5), (16, 8, stride), 0)
    ids.copy_(torch.tensor([[[3, 1, 3, 1, 3], [2, 2, 1, 1, 2]]], dtype=torch.int32))
    q = torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16, device="cuda")
    plan = scfa.make_plan(scfa.HashSparse(ids, ids), q, q, backend=backend)
    mask = scfa.HashSparse(*(ids.cpu().numpy() for _ in range(2))).mask(5, 5, heads=2)
    np.testing.assert_array_equal(plan.to_dense(), mask)
