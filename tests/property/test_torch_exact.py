"""Random problems through torch against float64, by the same rule as NumPy's."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch bridge needs torch (extra 'torch')")

from hypothesis import given, settings  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core.strategies import specs  # noqa: E402
from scfa_core.testing import Results, Spec, build, judge, run_numpy  # noqa: E402

BACKEND = "numba-cpu"
DTYPES = ("float32", "float64", "float16", "bfloat16")


def tensor(x, dtype, layout):
    """Make a tensor of NumPy (batch, heads, seqlen, dim) bits, laid out as the layout says."""
    x = torch.from_numpy(x.copy())
    x = x.view(torch.bfloat16) if dtype == "bfloat16" else x
    return x.transpose(1, 2).contiguous() if layout == "bthd" else x


def to_torch(pattern):
    """Rebuild a pattern of NumPy arrays with tensors."""
    parts = []
    for part in pattern.parts:
        fields = {name: getattr(part, name) for name in type(part).__slots__}
        fields = {
            name: torch.from_numpy(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x
            for name, x in fields.items()
        }
        parts.append(type(part)(**fields))
    return scfa.Intersection(*parts)


def run_torch(case):
    spec = case.spec
    q, k, v, dout = (
        tensor(x, spec.dtype, spec.layout) for x in (case.q, case.k, case.v, case.dout)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = scfa.attention(
        *inputs,
        to_torch(case.pattern),
        softmax_scale=spec.softmax_scale,
        layout=spec.layout,
        return_lse=True,
        backend=BACKEND,
    )
    grads = torch.autograd.grad(out, inputs, dout)
    wide = [
        (x.transpose(1, 2) if spec.layout == "bthd" else x).detach().double().numpy()
        for x in (out, *grads)
    ]
    return Results(wide[0], lse.double().detach().numpy(), *wide[1:])


@given(spec=specs(dtypes=DTYPES))
def test_random_problems(spec: Spec):
    case = build(spec)
    got = run_torch(case)
    bad = [verdict for verdict in judge(case, got) if not verdict.ok]
    assert not bad, f"{spec}: {bad}"


@given(spec=specs(most_rows=70, dtypes=DTYPES))
@settings(max_examples=15)
def test_torch_and_numpy_give_the_same_bits(spec: Spec):
    case = build(spec)
    for mine, true in zip(run_torch(case), run_numpy(case, BACKEND)[0], strict=True):
        np.testing.assert_array_equal(mine, true)
