"""A few small calls of every kernel, for compute-sanitizer: `check.py --sanitize` runs it."""

import os

import torch

import scfa_core as scfa


def call(backend, heads, heads_kv, rows, head_dim, dtype, pattern):
    """Plan, forward and backward once, all inputs written."""
    q, dout = (torch.randn(1, heads, rows, head_dim, device="cuda").to(dtype) for _ in range(2))
    k, v = (torch.randn(1, heads_kv, rows, head_dim, device="cuda").to(dtype) for _ in range(2))
    out, lse = scfa.attention(q, k, v, pattern, return_lse=True, backend=backend)
    scfa.attention_backward(dout, q, k, v, out, lse, pattern, backend=backend)
    torch.cuda.synchronize()


def main():
    """Two head counts, ragged rows, every family of pattern."""
    for backend in os.environ.get("SCFA_GPU_BACKENDS", "cupy").split(","):
        for dtype in (torch.bfloat16, torch.float32):
            for head_dim in (64, 128):
                q_hash, k_hash = (torch.randint(0, 3, (1, h, 150), device="cuda") for h in (2, 1))
                call(backend, 2, 1, 150, head_dim, dtype, scfa.HashSparse(q_hash, k_hash))
            keep = torch.rand(1, 2, 150, device="cuda") < 0.6
            call(backend, 2, 2, 150, 64, dtype, scfa.QKSparse(keep, keep))
            start = torch.randint(0, 100, (1, 2, 150), device="cuda")
            call(backend, 2, 2, 150, 64, dtype, scfa.KeyRanges(start, start + 40))
            call(backend, 2, 2, 150, 64, dtype, scfa.Causal())


if __name__ == "__main__":
    main()
