"""Documents by their bounds: what users of variable-length kernels have at hand."""

import numpy as np
import pytest

import scfa_core as scfa

BOUNDS = np.array([0, 3, 3, 4, 9])  # the second document is empty


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", ">i4"])
@pytest.mark.parametrize("rows", [9, 12, 2, 0])
def test_ids_count_documents_from_their_first_row_on(dtype, rows):
    pattern = scfa.Documents.from_cu_seqlens(BOUNDS.astype(dtype), rows, causal=False)
    assert pattern.q_ids.shape == (1, rows)
    assert pattern.q_ids[0].tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 3, 4, 4, 4][:rows]
    assert not pattern.causal


def test_a_masked_array_is_refused():
    with pytest.raises(scfa.ScfaError, match="mask"):
        scfa.Documents.from_cu_seqlens(np.ma.array([0, 2, 5], mask=[0, 1, 0]), 5)


@pytest.mark.parametrize("bounds", [[20, 20, 10], [2, 4], [0, 5, 2], [0, 9, 9, 0]])
def test_lengths_are_not_taken_for_bounds(bounds):
    with pytest.raises(scfa.PatternError, match=r"begin with 0 and never fall.*cumsum"):
        scfa.Documents.from_cu_seqlens(np.array(bounds), 50)
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    with pytest.raises(scfa.PatternError, match=r"begin with 0 and never fall.*cumsum"):
        scfa.Documents.from_cu_seqlens(torch.tensor(bounds), 50)


def test_no_bounds_are_no_mistake():
    ids = scfa.Documents.from_cu_seqlens(np.array([], np.int32), 2).q_ids
    assert ids.tolist() == [[-1, -1]]


class Mine(scfa.Documents):
    """A derived pattern."""


def test_a_derived_class_makes_its_own():
    assert type(Mine.from_cu_seqlens(BOUNDS, 9)) is Mine


@pytest.mark.parametrize(
    ("bounds", "rows", "error", "words"),
    [
        ([0, 3], 3, scfa.PatternError, "cu_seqlens must be an array"),
        (np.array([0.0, 3.0]), 3, scfa.DTypeError, "cu_seqlens must be integers, got float64"),
        (np.array([[0, 3]]), 3, scfa.ShapeError, "cumsum after a 0"),
        (BOUNDS, 9.0, scfa.PatternError, "rows must be an int >= 0 .a number of rows., got 9.0"),
        (BOUNDS, -1, scfa.PatternError, "rows must be an int"),
    ],
)
def test_mistakes_are_named(bounds, rows, error, words):
    with pytest.raises(error, match=words):
        scfa.Documents.from_cu_seqlens(bounds, rows)


def test_packed_tensors_agree_with_each_alone():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    bounds = torch.from_numpy(BOUNDS).int()
    q, k, v = torch.randn(3, 1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    packed = scfa.attention(q, k, v, scfa.Documents.from_cu_seqlens(bounds, q.shape[2]))
    for start, end in ((0, 3), (3, 4), (4, 9)):
        alone = scfa.attention(*(x[:, :, start:end] for x in (q, k, v)))
        torch.testing.assert_close(packed[:, :, start:end], alone)


def test_strided_bounds_are_read_without_a_warning():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    strided = torch.from_numpy(BOUNDS).repeat_interleave(2)[::2]
    ids = scfa.Documents.from_cu_seqlens(strided, 9).q_ids
    assert ids.tolist() == [[0, 0, 0, 2, 3, 3, 3, 3, 3]]


@pytest.mark.slow
def test_one_graph_serves_all_bounds_and_lengths():
    torch = pytest.importorskip("torch", reason="tensors are torch's")
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def packed(x, bounds):
        return scfa.attention(x, x, x, scfa.Documents.from_cu_seqlens(bounds, x.shape[2]))

    compiled = torch.compile(packed, backend=counted, fullgraph=True, dynamic=True)
    for rows, bounds in ((9, [0, 3, 9]), (12, [0, 3, 4, 12]), (20, [0, 20])):
        x, bounds = torch.randn(1, 2, rows, 16), torch.tensor(bounds)
        torch.testing.assert_close(compiled(x, bounds), packed(x, bounds))
    assert len(graphs) == 1
