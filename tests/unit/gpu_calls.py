"""Inputs on the GPU and all results of a call, for tests of more than one file."""

import scfa_core as scfa


def inputs(torch, shape=(2, 4, 700, 64), heads_kv=None, dtype=None, buckets=5, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    kv_shape = (shape[0], heads_kv or shape[1], *shape[2:])

    def draw(size):
        return torch.randn(size, device="cuda", generator=generator).to(dtype or torch.bfloat16)

    tensors = draw(shape), draw(kv_shape), draw(kv_shape), draw(shape)
    hashes = [
        torch.randint(0, buckets, size[:3], device="cuda", generator=generator)
        for size in (shape, kv_shape)
    ]
    return tensors, hashes


def assert_same(torch, left, right):
    for mine, other in zip(left, right, strict=True):
        assert torch.equal(mine, other)


def everything(backend, tensors, pattern):
    q, k, v, dout = tensors
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=backend)
    return out, lse, *scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend=backend)
