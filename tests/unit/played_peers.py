"""Packages under the names of peers, which compute by torch: what is tested is how they are met."""

import sys
import types

import pytest
import torch

FLASH_SOURCE = """
from torch.nn import functional

asked = []

def flash_attn_func(q, k, v, causal, deterministic=False):
    asked.append(deterministic)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(*rows, is_causal=causal, enable_gqa=True)
    return WRAP(out.transpose(1, 2))
"""
XFORMERS_SOURCE = """
from torch.nn import functional

class LowerTriangularMask:
    pass

def memory_efficient_attention(q, k, v, attn_bias):
    assert isinstance(attn_bias, LowerTriangularMask)
    rows = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)
"""
CUDNN_SOURCE = """
import torch
from torch.nn import functional

streams = {}

class cudnnGraphNotSupportedError(RuntimeError):
    pass

class data_type:
    BFLOAT16, HALF, FLOAT = "bfloat16", "float16", "float32"

class heur_mode:
    A = FALLBACK = object()

def create_handle():
    streams.clear()
    return "a handle"

def set_stream(handle, stream):
    streams[handle] = stream

class Tensor:
    def __init__(self, x=None):
        self.like = x
    def set_output(self, value):
        return self
    def set_data_type(self, kind):
        self.kind = kind
        return self
    def set_dim(self, sizes):
        self.sizes = sizes
        return self
    def set_stride(self, strides):
        self.strides = strides
        return self

def attended(q, k, v, scale):
    group = {"is_causal": True, "scale": scale, "enable_gqa": True}
    return functional.scaled_dot_product_attention(q, k, v, **group)

class pygraph:
    def __init__(self, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert handle == "a handle"
        assert intermediate_data_type == compute_data_type == data_type.FLOAT
        self.built = False
    def tensor_like(self, x):
        return Tensor(x)
    def sdpa(self, name, q, k, v, generate_stats, attn_scale, use_causal_mask):
        assert use_causal_mask and generate_stats
        self.given, self.scale = (q, k, v), attn_scale
        self.made = Tensor(), Tensor()
        return self.made
    def sdpa_backward(self, name, q, k, v, o, dO, stats, attn_scale, use_causal_mask):
        assert use_causal_mask
        assert stats.like.dtype == torch.float32 and stats.like.shape == (*q.like.shape[:3], 1)
        self.given, self.scale = (q, k, v, o, dO, stats), attn_scale
        self.made = Tensor(), Tensor(), Tensor()
        return self.made
    def validate(self): pass
    def build_operation_graph(self): pass
    def create_execution_plans(self, modes): pass
    def check_support(self): REFUSAL
    def build_plans(self): self.built = True
    def get_workspace_size(self): return 0
    def execute(self, filled, work, handle):
        assert self.built and work.numel() and streams[handle] == "torch's"
        for tensor in self.made:
            x = filled[tensor]
            assert str(x.dtype) == f"torch.{tensor.kind}"
            assert (list(x.shape), list(x.stride())) == (tensor.sizes, tensor.strides)
        q, k, v, *rest = (filled[name] for name in self.given)
        if not rest:
            filled[self.made[0]].copy_(attended(q, k, v, self.scale))
            filled[self.made[1]].fill_(1)
            return
        o, dout, stats = rest
        assert o.any() and (stats == 1).all(), "of a forward"
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad(attended(*leaves, self.scale), leaves, dout)
        for name, x in zip(self.made, grads):
            filled[name].copy_(x)
"""


@pytest.fixture
def fake_peers(tmp_path, monkeypatch):
    """Packages under the peers' names that compute by torch: what is tested is how they are met."""
    files = {
        "flash_attn/__init__.py": FLASH_SOURCE.replace("WRAP", ""),
        "flash_attn/cute/__init__.py": FLASH_SOURCE.replace("WRAP", "(lambda x: (x, None))"),
        "flash_attn_interface.py": FLASH_SOURCE.replace("WRAP", ""),
        "xformers/__init__.py": "",
        "xformers/ops/__init__.py": XFORMERS_SOURCE,
        "cudnn/__init__.py": CUDNN_SOURCE.replace("REFUSAL", "pass"),
    }
    written(tmp_path, files)
    monkeypatch.syspath_prepend(str(tmp_path))
    stream = types.SimpleNamespace(cuda_stream="torch's")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)


def written(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def no_peer_stays():
    """What a test imported under a peer's name is forgotten after it."""
    yield
    peers = ("flash_attn", "flash_attn_interface", "xformers", "cudnn")
    for name in [x for x in sys.modules if x.split(".")[0] in peers]:
        del sys.modules[name]
