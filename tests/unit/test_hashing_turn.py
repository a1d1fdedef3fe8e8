"""The turn of a whitening hash makes the common covariance of queries and keys one."""

import pytest

torch = pytest.importorskip("torch", reason="layers are torch's")

from scfa_core.nn import AngularHash  # noqa: E402 - torch may be absent


def test_turned_rows_are_white():
    """Of correlated rows far from 0, queries a hundred times as large as keys."""
    torch.manual_seed(0)
    mix, heads, rows, size = torch.randn(2, 2, 16, 16), 2, 4000, 16
    q, k = (5 + torch.randn(1, heads, rows, size) @ mix[at] for at in range(2))
    q = 100 * q
    made = AngularHash(heads, size, 8, adapt="whiten")
    made(q, k)
    made.move_centers(1.0)
    common = torch.zeros(heads, size, size, dtype=torch.float64)
    for x in (q, k):
        left = x[0].double() - x[0].double().mean(1, keepdim=True)
        spread = left.mT @ left / rows
        common += spread / spread.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    common /= common.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    one = torch.eye(size, dtype=torch.float64)
    turn = made._turn().double()
    white = turn.mT @ (common + 0.01 * one) @ turn
    torch.testing.assert_close(white, one.expand(heads, -1, -1), rtol=0, atol=1e-4)
