"""What a stranger tries: each gives the right answer, or an error that says what to do instead."""

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import scfa_core as scfa
from scfa_core import cli

RNG = np.random.default_rng(0)
X = RNG.standard_normal((1, 2, 20, 16)).astype(np.float32)
IDS = RNG.integers(0, 4, (1, 2, 20))
BUCKETS = scfa.HashSparse(IDS, IDS)
WINDOW = scfa.SlidingWindow(5)


class Strided(scfa.HashSparse):
    """Every so many rows form a class."""

    def __init__(self, stride, like):
        row = np.arange(20).reshape(1, 1, -1) % stride
        row = row if isinstance(like, np.ndarray) else like.new_tensor(row)
        super().__init__(row, row)


class Homemade(scfa.Pattern):
    """Derived from nothing that says who sees what."""


class Masked(scfa.SlidingWindow):
    """A window whose mask is its own; kernels would not know."""

    def mask(self, *sizes, **options):
        return super().mask(*sizes, **options) & False


def attend(x=X, pattern=None, **options):
    return scfa.attention(x, x, x, pattern, backend="reference", **options)


MISTAKES = {
    "and in words": (scfa.PatternError, "write a & b", lambda: BUCKETS and WINDOW),
    "a pattern for a flag": (scfa.PatternError, "`pattern is not None`", lambda: not WINDOW),
    "a union": (scfa.PatternError, "attention_over(q, k, v, [a, b])", lambda: BUCKETS | WINDOW),
    "a union with an array": (
        scfa.PatternError,
        "attention_over(q, k, v, [a, b])",
        lambda: IDS | WINDOW,
    ),
    "a complement": (scfa.PatternError, "say what is seen", lambda: ~WINDOW),
    "a plan narrowed": (
        scfa.PatternError,
        "intersect the patterns, then make the plan",
        lambda: scfa.make_plan(BUCKETS, X, X, backend="reference") & WINDOW,
    ),
    "a pattern narrowed by a plan": (
        scfa.PatternError,
        "intersect the patterns, then make the plan",
        lambda: WINDOW & scfa.make_plan(BUCKETS, X, X, backend="reference"),
    ),
    "a list for an intersection": (
        scfa.PatternError,
        "got list; of a list Intersection(*patterns)",
        lambda: scfa.Intersection([BUCKETS, WINDOW]),
    ),
    "a pattern class of one's own": (
        scfa.PatternError,
        "Homemade is no pattern of scfa_core: build yours of HashSparse",
        lambda: attend(pattern=Homemade() & WINDOW),
    ),
    "a mask of one's own": (
        scfa.PatternError,
        "Masked is no pattern of scfa_core: build yours of HashSparse",
        lambda: attend(pattern=Masked(9)),
    ),
    "its mask": (scfa.PatternError, "it is none of Causal", lambda: Homemade().mask(3, 3)),
    "a mask of negative size": (
        scfa.ShapeError,
        "seqlen_q must be at least 0, got -1",
        lambda: WINDOW.mask(-1, 3),
    ),
    "a mask of half a row": (
        scfa.ShapeError,
        "seqlen_k must be an int, got 2.5",
        lambda: WINDOW.mask(3, 2.5),
    ),
    "a mask of uneven heads": (
        scfa.ShapeError,
        "heads_kv must divide heads",
        lambda: WINDOW.mask(3, 3, heads=3, heads_kv=2),
    ),
    "a mask without its heads": (
        scfa.ShapeError,
        "mask takes batch=, heads= and heads_kv=",
        lambda: BUCKETS.mask(20, 20),
    ),
    "a masked array": (
        scfa.DTypeError,
        "q must be a plain array, got a masked one",
        lambda: attend(np.ma.masked_less(X, 0)),
    ),
    "masked hashes": (
        scfa.DTypeError,
        "must be a plain array, got a masked one",
        lambda: attend(pattern=scfa.HashSparse(np.ma.masked_equal(IDS, 0), IDS)),
    ),
    "an int beyond any float": (
        scfa.ScaleError,
        "softmax_scale must be finite",
        lambda: attend(softmax_scale=-(10**400)),
    ),
    "more rows than int32 counts": (
        scfa.ShapeError,
        "seqlen_q + seqlen_k must be at most 2147483647",
        lambda: attend(np.broadcast_to(X[:, :, :1], (1, 2, 1 << 30, 16))),
    ),
    "integers": (scfa.DTypeError, "cast it", lambda: attend(X.astype(np.int64))),
    "complex numbers": (scfa.DTypeError, "cast it", lambda: attend(X.astype(np.complex64))),
    "flags for hashes": (
        scfa.DTypeError,
        "flags of kept rows are QKSparse's",
        lambda: attend(pattern=scfa.HashSparse(IDS > 1, IDS > 1)),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    error, words, call = MISTAKES[name]
    with pytest.raises(error, match=re.escape(words)):
        call()


def test_empty_intersection_and_nested_ones():
    nested = scfa.Intersection(BUCKETS & WINDOW, scfa.Causal())
    assert len(nested.parts) == 3
    assert (attend(pattern=nested) == attend(pattern=BUCKETS & WINDOW)).all()
    assert scfa.Intersection().mask(3, 4).all()
    assert scfa.make_plan(scfa.Intersection(), X, X, backend="reference").density() == 1


def test_a_class_derived_from_a_pattern_is_that_pattern():
    mine, plain = Strided(4, X), scfa.HashSparse(*[np.arange(20).reshape(1, 1, -1) % 4] * 2)
    assert (mine.mask(20, 20) == plain.mask(20, 20)).all()
    assert (attend(pattern=mine & WINDOW) == attend(pattern=plain & WINDOW)).all()


@pytest.mark.parametrize(
    "pattern", [BUCKETS, WINDOW, BUCKETS & WINDOW, scfa.Causal(lag=3)], ids=repr
)
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_patterns_and_plans_are_copied_and_pickled(pattern, duplicate):
    other = duplicate(pattern)
    assert repr(other) == repr(pattern)
    plan = scfa.make_plan(pattern, X, X, backend="reference")
    assert (attend(pattern=other) == attend(pattern=pattern)).all()
    assert (attend(pattern=duplicate(plan)) == attend(pattern=plan)).all()


def test_backward_takes_no_pattern_for_causal_as_attention_does():
    out, lse = attend(return_lse=True)
    none, causal = (
        scfa.attention_backward(out, X, X, X, out, lse, pattern, backend="reference")
        for pattern in (None, scfa.Causal())
    )
    assert all((a == b).all() for a, b in zip(none, causal, strict=True))


@pytest.mark.parametrize("name", ["missing/x.png", "."])
def test_a_picture_that_cannot_be_written(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", "hash", "--out", str(tmp_path / name)])
    assert ended.value.code == 2
    assert "must be a file that can be written" in capsys.readouterr().err


def test_a_picture_of_no_kind(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws (extra 'plot')")
    path = tmp_path / "x.nonsense"
    assert cli.main(["show", "hash", "--out", str(path)]) == 2
    assert f"scfa show: cannot write {path}" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "known"), [("numba_cpu", False), ("reference", True)])
def test_info_says_that_the_variable_names_no_backend(name, known, monkeypatch, capsys):
    monkeypatch.setenv("SCFA_BACKEND", name)
    assert cli.main(["info"]) == 0
    assert ("which is no backend" in capsys.readouterr().out) is not known


def test_a_checkout_that_hides_the_installed_package_says_so(tmp_path):
    home = Path(scfa.__file__).parent
    ignored = shutil.ignore_patterns("backends", "reference", "__pycache__")
    shutil.copytree(home, tmp_path / "scfa_core", ignore=ignored)
    libraries = Path(np.__file__).parents[1]  # without -S an editable install mends the checkout
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import scfa_core"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(libraries)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(r"ImportError: .*scfa_core is a source checkout.*pip install -e", done.stderr)


class TestTorch:
    """The same with tensors, and what only torch can ask."""

    @pytest.fixture(autouse=True)
    def tensors(self):
        self.torch = pytest.importorskip("torch", reason="about torch tensors (extra 'torch')")
        self.x = self.torch.from_numpy(X)
        self.ids = self.torch.from_numpy(IDS)
        # Or variants that other tests compiled count against the limit of this function's.
        self.torch._dynamo.reset()

    @pytest.mark.parametrize(
        ("dtype", "error"), [("int64", scfa.DTypeError), ("complex64", scfa.DTypeError)]
    )
    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_wrong_dtypes_keep_their_error_when_compiled(self, dtype, error, fullgraph):
        call = self.torch.compile(scfa.attention, fullgraph=fullgraph, backend="eager")
        wrong = self.x.to(getattr(self.torch, dtype))
        with pytest.raises(error, match=f"q must be one of .* got {dtype}; cast it"):
            call(wrong, wrong, wrong)

    @pytest.mark.parametrize("fullgraph", [False, True])
    def test_wrong_head_dims_keep_their_error_when_compiled(self, fullgraph):
        call = self.torch.compile(scfa.attention, fullgraph=fullgraph, backend="eager")
        wrong = self.torch.zeros(1, 1, 5, 17)
        with pytest.raises(scfa.ShapeError, match="multiple of 8 from 16 to 256, got 17"):
            call(wrong, wrong, wrong)

    def test_derived_patterns_compile(self):
        mine = Strided(4, self.ids)
        call = self.torch.compile(scfa.attention, fullgraph=True, backend="eager")
        got = call(self.x, self.x, self.x, mine)
        assert self.torch.equal(got, scfa.attention(self.x, self.x, self.x, mine))

    def test_a_homemade_pattern_in_a_compiled_function(self):
        call = self.torch.compile(scfa.attention, backend="eager")
        with pytest.raises(scfa.PatternError, match="Homemade is no pattern"):
            call(self.x, self.x, self.x, Homemade())

    def test_libraries_and_devices_say_how_to_mend(self):
        x = self.x
        with pytest.raises(scfa.DeviceError, match=r"torch\.from_numpy"):
            scfa.attention(x, X, x)
        with pytest.raises(scfa.DeviceError, match=r"torch\.from_numpy"):
            scfa.attention(x, x, x, BUCKETS)
        elsewhere = self.ids.to("meta")
        with pytest.raises(scfa.DeviceError, match="move it there before the pattern is made"):
            scfa.attention(x, x, x, scfa.HashSparse(elsewhere, elsewhere))

    def test_nested_tensors_are_told_to_be_packed(self):
        parts = [self.torch.zeros(2, n, 16) for n in (5, 5)]
        nested = self.torch.nested.nested_tensor(parts, layout=self.torch.jagged)
        with pytest.raises(scfa.LayoutError, match="pack the sequences into one"):
            scfa.attention(nested, nested, nested)

    def test_symbolic_tracing_is_told_to_wrap(self):
        with pytest.raises(scfa.DTypeError, match=r"torch\.fx\.wrap"):
            self.torch.fx.symbolic_trace(lambda q: scfa.attention(q, q, q))

    def test_modules_that_hold_patterns(self):
        torch = self.torch
        q_ids = self.ids

        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.project = torch.nn.Linear(16, 16)
                self.pattern = scfa.HashSparse(q_ids, q_ids) & WINDOW

            def forward(self, x):
                return scfa.attention(self.project(x), x, x, self.pattern)

        layer = Layer()
        assert sorted(layer.state_dict()) == ["project.bias", "project.weight"]
        twin = copy.deepcopy(layer)
        assert torch.equal(twin(self.x), layer(self.x))
