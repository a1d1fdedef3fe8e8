"""What `merge_attention` refuses: each mistake is named, none comes as a library's own error."""

import re

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core.merging import merge_attention

OUT, LSE = np.zeros((1, 2, 3, 16), np.float32), np.zeros((1, 2, 3), np.float32)


@pytest.mark.parametrize("dtype", [object, str, "S4", "datetime64[s]", bool, np.int64, complex])
def test_what_holds_no_numbers(dtype):
    """Objects and words reached NumPy's own functions."""
    for outs, lses, name in (
        ([OUT, OUT.astype(dtype)], [LSE, LSE], "outs"),
        ([OUT, OUT], [LSE.astype(dtype), LSE], "lses"),
    ):
        with pytest.raises(scfa.DTypeError, match=f"{name} must be floating-point"):
            merge_attention(outs, lses)


def test_parts_of_several_dtypes():
    """The first one's dtype was taken, and the others were narrowed or widened without a word."""
    torch = pytest.importorskip("torch", reason="bfloat16 is torch's")
    out, lse = torch.from_numpy(OUT), torch.from_numpy(LSE)
    for outs, lses, words in (
        ([OUT, OUT.astype(np.float16)], [LSE, LSE], "outs must share a dtype, got float32 and fl"),
        ([OUT, OUT], [LSE, LSE.astype(np.float64)], "lses must share a dtype, got float32 and fl"),
        (
            [out.bfloat16(), out],
            [lse, lse],
            "outs must share a dtype, got torch.bfloat16 and torch",
        ),
        ([out, out], [lse.double(), lse], "lses must share a dtype, got torch.float64 and torch"),
    ):
        with pytest.raises(scfa.DTypeError, match=words):
            merge_attention(outs, lses)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, "bfloat16"])
def test_outs_of_any_one_dtype_merge(kind):
    if kind == "bfloat16":
        kind = pytest.importorskip("ml_dtypes", reason="bfloat16 for NumPy").bfloat16
    out, lse = merge_attention([OUT.astype(kind)] * 2, [LSE, LSE])
    assert (out.dtype, lse.dtype) == (np.dtype(kind), np.float32)


def test_parts_on_several_devices():
    torch = pytest.importorskip("torch", reason="NumPy has one device")
    out, lse = torch.from_numpy(OUT), torch.from_numpy(LSE)
    for outs, lses, words in (
        ([out, out.to("meta")], [lse, lse], "got outs[0] on cpu, outs[1] on meta"),
        ([out, out], [lse, lse.to("meta")], "got outs[0] on cpu, lses[1] on meta"),
        ([out.to("meta")], [lse], "got outs[0] on meta, lses[0] on cpu"),
    ):
        with pytest.raises(scfa.DeviceError, match=re.escape(words)):
            merge_attention(outs, lses)
