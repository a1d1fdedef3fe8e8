"""What layers refuse by their own names: options that nobody knows, inputs of another dtype."""

import re

import numpy as np
import pytest

import scfa_core as scfa

torch = pytest.importorskip("torch", reason="these are torch modules")

from torch import nn as torch_nn  # noqa: E402

from scfa_core import nn  # noqa: E402

WIDTH, HEADS = 32, 2


class Derived(nn.WindowSelfAttention):
    """A layer of somebody else's."""


LAYERS = {
    "SparseSelfAttention": lambda **o: nn.SparseSelfAttention(WIDTH, HEADS, **o),
    "DenseSelfAttention": lambda **o: nn.DenseSelfAttention(WIDTH, HEADS, **o),
    "WindowSelfAttention": lambda **o: nn.WindowSelfAttention(WIDTH, HEADS, 3, **o),
    "HashSelfAttention": lambda **o: nn.HashSelfAttention(WIDTH, HEADS, 4, **o),
    "DropSelfAttention": lambda **o: nn.DropSelfAttention(WIDTH, HEADS, how="top-k", **o),
    "Derived": lambda **o: Derived(WIDTH, HEADS, 3, **o),
}


@pytest.mark.parametrize("name", LAYERS)
def test_unknown_options_name_the_layer_that_was_called(name):
    with pytest.raises(scfa.OptionError, match=rf"^{name} takes no option 'foo'; .* heads_kv, .*"):
        LAYERS[name](foo=1)
    with pytest.raises(TypeError, match=rf"^{name} takes no option 'dropout', 'kv'; "):
        LAYERS[name](kv=1, dropout=0.5, bias=True)


@pytest.mark.parametrize("name", LAYERS)
def test_a_backend_of_no_name_is_refused_when_the_layer_is_made(name):
    with pytest.raises(scfa.UnknownBackend, match=r"backend must be one of .* got 'numba'"):
        LAYERS[name](backend="numba")


def test_the_options_told_are_those_there_are():
    with pytest.raises(scfa.OptionError) as caught:
        nn.DenseSelfAttention(WIDTH, HEADS, foo=1)
    told = re.search(r"all layers take (.*)", str(caught.value)).group(1).split(", ")
    code = nn.SparseSelfAttention.__init__.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    assert told == list(code.co_varnames[3:count])


@pytest.mark.parametrize(
    "flag", [True, np.True_, torch.tensor(True)], ids=lambda x: type(x).__name__
)
def test_flags_are_no_sizes(flag):
    with pytest.raises(scfa.ShapeError, match="heads must be an int"):
        nn.DenseSelfAttention(WIDTH, flag)


def test_whatever_counts_is_a_size():
    class Two:
        def __index__(self):
            return 2

    assert nn.DenseSelfAttention(WIDTH, Two())(torch.ones(1, 5, WIDTH)).shape == (1, 5, WIDTH)
    for make in (scfa.SlidingWindow, lambda n: scfa.Causal(lag=n)):
        with pytest.raises(scfa.PatternError, match="must be an int"):
            make(torch.tensor(3, device="meta"))


def test_the_reformer_is_told_as_well():
    layer = nn.ReformerAttention(WIDTH, HEADS, buckets=4, chunk=4)
    for x in (torch.ones(1, 8, WIDTH, dtype=torch.float64), torch.ones(1, 8, WIDTH).long()):
        for call in (layer, layer.coverage):
            with pytest.raises(scfa.DTypeError, match=r"^x must be float32 like the layer's"):
                call(x)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    ("weights", "given"),
    [("float32", "int64"), ("float32", "float64"), ("float32", "bfloat16"), ("float64", "float32")],
)
def test_an_input_of_another_dtype_is_told_what_to_do(name, weights, given):
    layer = LAYERS[name](backend="reference").to(getattr(torch, weights))
    x = torch.ones(1, 5, WIDTH).to(getattr(torch, given))
    words = f"x must be {weights} like the layer's weights, got {given}; "
    words += "embed" if given == "int64" else "cast x"
    with pytest.raises(scfa.DTypeError, match=f"^{words}"):
        layer(x)
    right = layer(x.to(getattr(torch, weights)))
    assert right.dtype == getattr(torch, weights)


@pytest.mark.parametrize("name", LAYERS)
def test_what_autocast_makes_right_is_taken(name):
    layer = LAYERS[name]()
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            assert layer(x.to(dtype)).dtype == torch.bfloat16
        for wrong in (x.double(), x.long()):
            with pytest.raises(scfa.DTypeError, match="x must be float32 like the layer's weights"):
                layer(wrong)


def test_what_a_projection_or_its_hooks_make_right_is_taken():
    """As quantized layers do, and wrappers that keep weights in another dtype than they use."""

    class Casting(torch_nn.Linear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = nn.DenseSelfAttention(WIDTH, HEADS)
    right = layer(x.float())
    for name in ("query", "key"):
        casting = Casting(WIDTH, WIDTH, bias=False)
        casting.load_state_dict(getattr(layer, name).state_dict())
        setattr(layer, name, casting)
    layer.value.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    assert torch.equal(layer(x), right)


def test_other_failures_of_a_projection_stay_what_they_are():
    layer = nn.DenseSelfAttention(WIDTH, HEADS)
    layer.query = torch_nn.Linear(WIDTH + 1, WIDTH)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        layer(torch.ones(1, 5, WIDTH))
    assert not isinstance(caught.value, scfa.ScfaError)


@pytest.mark.slow
def test_a_compiled_layer_takes_what_an_eager_one_takes():
    layer = nn.WindowSelfAttention(WIDTH, HEADS, 3)
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_head_dim_that_attention_refuses_is_told_when_the_layer_is_made(name):
    for head_dim in (8, 20, 264):
        with pytest.raises(scfa.ShapeError, match=f"16 to 256, got {head_dim} .width=32, heads=2"):
            LAYERS[name](head_dim=head_dim)
    with pytest.raises(scfa.ShapeError, match=r"got 15 .width=60, heads=4.; take other heads, or"):
        nn.DenseSelfAttention(60, 4)


@pytest.mark.parametrize("name", LAYERS)
def test_documents_and_keep_are_named_where_they_do_not_fit(name):
    layer, x = LAYERS[name](backend="reference"), torch.ones(2, 5, WIDTH)
    for option, rows in (("documents", (2, 6)), ("keep", (3, 5))):
        words = rf"^{option} must be \(batch, seqlen\) = \(2, 5\) like x, got {option}.shape="
        with pytest.raises(scfa.ShapeError, match=words):
            layer(x, **{option: torch.ones(rows, dtype=torch.long)})
    assert layer(x, documents=torch.ones(1, 5, dtype=torch.long)).shape == x.shape


PLAN = scfa.make_plan(scfa.Causal(), *(torch.zeros(1, HEADS, 5, 16),) * 2)


@pytest.mark.parametrize("returned", [scfa.Causal(), None, [], 3, PLAN, [None]], ids=repr)
def test_what_is_no_list_of_patterns_is_told_by_its_maker(returned):
    class Careless(nn.SparseSelfAttention):
        def make_patterns(self, q, k):
            return returned

    with pytest.raises(scfa.PatternError, match="make_patterns of Careless must return a list"):
        Careless(WIDTH, HEADS)(torch.ones(1, 5, WIDTH))


def test_a_generator_of_patterns_is_a_list():
    class Generating(nn.SparseSelfAttention):
        def make_patterns(self, q, k):
            yield scfa.SlidingWindow(2)
            yield scfa.Causal(lag=2)

    torch.manual_seed(0)
    layer, x = Generating(WIDTH, HEADS), torch.randn(1, 5, WIDTH)
    dense = nn.DenseSelfAttention(WIDTH, HEADS)
    dense.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), dense(x))


def test_a_plan_from_pattern_is_told_where_it_goes():
    layer = nn.SparseSelfAttention(
        WIDTH, HEADS, pattern=lambda q, k: scfa.make_plan(scfa.Causal(), q, k)
    )
    with pytest.raises(scfa.PatternError, match=r"got Plan; .* layer\(x, plan=plan\)"):
        layer(torch.ones(1, 5, WIDTH))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("scale", ["1", float("nan"), torch.nn.Parameter(torch.ones(()))], ids=repr)
def test_a_scale_that_attention_refuses_is_told_when_the_layer_is_made(name, scale):
    with pytest.raises(scfa.ScaleError, match=r"^softmax_scale must be"):
        LAYERS[name](softmax_scale=scale)
    assert LAYERS[name](softmax_scale=0).softmax_scale == 0
