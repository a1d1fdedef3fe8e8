"""Documents: several documents packed in one sequence, none sees another."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np

from scfa_core.errors import DTypeError, PatternError, ShapeError
from scfa_core.patterns.base import (
    Pattern,
    describe_array,
    require_arrays,
    require_bool,
    require_count,
)


class Documents(Pattern):
    """Key j is visible to query i iff both are of the same document, and causally if `causal`.

    Parameters
    ----------
    q_ids : integer array, (batch, seqlen_q)
        Document of each query; ids need be neither sorted nor contiguous. Batch 1 broadcasts.
    k_ids : integer array, (batch, seqlen_k), optional
        Document of each key; the same array as `q_ids` by default.
    causal : bool
        Also require ``j <= i``.

    Raises
    ------
    PatternError
        Ids that are not arrays, or nested tensors.
    """

    __slots__ = ("causal", "k_ids", "q_ids")

    def __init__(self, q_ids: Any, k_ids: Any = None, *, causal: bool = True) -> None:
        k_ids = q_ids if k_ids is None else k_ids
        require_arrays("Documents", q_ids=q_ids, k_ids=k_ids)
        self.q_ids = q_ids
        self.k_ids = k_ids
        self.causal = require_bool("causal", causal)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Any, rows: int, *, causal: bool = True) -> Documents:
        """Documents packed end to end, by their bounds, as variable-length kernels take them.

        >>> import numpy as np
        >>> Documents.from_cu_seqlens(np.array([0, 2, 5]), 6).q_ids.tolist()
        [[0, 0, 1, 1, 1, 2]]

        Parameters
        ----------
        cu_seqlens : integer array, (documents + 1,)
            Where each document starts, and where the last one ends; an empty one is no harm.
        rows : int
            Length of the packed sequence, e.g. ``q.shape[2]``. Rows past the last bound, padding,
            are a document of their own.
        causal : bool
            See above.

        Returns
        -------
        pattern : Documents
            Of ids (1, rows) on the device of `cu_seqlens`: torch's for a torch tensor, NumPy's or
            CuPy's for any other array.

        Raises
        ------
        PatternError, DTypeError, ShapeError
            What is no array of integers of one axis, or rows that are no int of at least 0. Bounds
            on the host that do not begin with 0 or that fall, as lengths taken for bounds do.

        Notes
        -----
        Values on a GPU are not read; it is not waited for.
        """
        from scfa_core.array_kinds import adopt, dtype_name, framework_of, is_torch_tensor
        from scfa_core.arrays import INT_DTYPES
        from scfa_core.merging import namespace

        require_arrays("Documents", cu_seqlens=cu_seqlens)
        rows = require_count("Documents: rows", rows, "rows")
        bounds = adopt(cu_seqlens)
        framework_of("cu_seqlens", bounds)
        if dtype_name(bounds) not in INT_DTYPES:
            raise DTypeError(f"cu_seqlens must be integers, got {dtype_name(bounds)}; cast it")
        if len(bounds.shape) != 1:
            raise ShapeError(
                f"cu_seqlens must be (documents + 1,), got shape {tuple(bounds.shape)}; lengths of "
                "documents become bounds by a cumsum after a 0"
            )
        xp = namespace(bounds)
        _refuse_lengths(bounds)
        if is_torch_tensor(bounds):
            places = xp.arange(rows, device=bounds.device)
            ids = xp.searchsorted(bounds.long().contiguous(), places, right=True) - 1
        else:
            with nullcontext() if xp.__name__ == "numpy" else bounds.device:
                places = xp.arange(rows)
                ids = xp.searchsorted(bounds.astype("int64"), places, side="right") - 1
        return cls(ids[None], causal=causal)

    def __repr__(self) -> str:
        return (
            f"Documents(q_ids={describe_array(self.q_ids)}, k_ids={describe_array(self.k_ids)}, "
            f"causal={self.causal})"
        )


def _refuse_lengths(bounds: Any) -> None:
    """Raise where bounds on the host do not begin with 0 or fall: they may be lengths."""
    from scfa_core.array_kinds import is_torch_tensor

    if is_torch_tensor(bounds):
        from scfa_core.torch_meta import is_traced

        if is_traced(bounds) or bounds.device.type != "cpu":
            return
        values = bounds.tolist()
    elif isinstance(bounds, np.ndarray):
        values = bounds.tolist()
    else:
        return
    if values and (values[0] != 0 or any(b < a for a, b in pairwise(values))):
        raise PatternError(
            "cu_seqlens must begin with 0 and never fall, got "
            f"{np.array2string(np.array(values), threshold=8, separator=', ')}; lengths of "
            "documents become bounds by a cumsum after a 0"
        )
