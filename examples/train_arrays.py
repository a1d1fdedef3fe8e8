"""Train one attention layer on CuPy arrays, by hand: no torch, no autograd.

python examples/train_arrays.py

The task: a word from each bucket, and the answer is the mean of the earlier words of that bucket.
Runs on a GPU where CuPy sees one, else on NumPy.
"""

import argparse

import scfa_core as scfa
from scfa_core.hashing import angular_hash, random_directions

BATCH, HEADS, SEQLEN, HEAD_DIM, BUCKETS = 2, 2, 256, 32, 8


def array_module():
    """CuPy on a GPU, NumPy elsewhere."""
    import numpy

    try:
        import cupy
    except ImportError:
        return numpy
    try:
        return cupy if cupy.cuda.is_available() else numpy
    except cupy.cuda.runtime.CUDARuntimeError:
        return numpy


def main():
    """Fit the projection of values, and print the first and the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--backend", default=None)
    args = parser.parse_args()

    xp = array_module()
    rng = xp.random.default_rng(0)
    words = rng.standard_normal((BATCH, HEADS, SEQLEN, HEAD_DIM), dtype=xp.float32)
    directions = xp.asarray(random_directions(HEADS, HEAD_DIM, BUCKETS, seed=0))
    (bucket,) = angular_hash(words, directions)
    q, k = xp.zeros_like(words), xp.zeros_like(words)  # equal scores: the mean
    options = {"backend": args.backend}
    plan = scfa.make_plan(scfa.HashSparse(bucket, bucket), q, k, **options)  # once for all steps
    target = scfa.attention(q, k, words, plan, **options)

    weight = xp.zeros((HEADS, HEAD_DIM, HEAD_DIM), dtype=xp.float32)  # of values: learns to be one
    for step in range(args.steps):
        v = words @ weight
        out, lse = scfa.attention(q, k, v, plan, return_lse=True, **options)
        error = out - target
        if step in (0, args.steps - 1):
            print(f"step {step}: loss {float(xp.square(error).mean()):.4f} ({xp.__name__})")
        _, _, dv = scfa.attention_backward(error, q, k, v, out, lse, plan, **options)
        slope = (words.swapaxes(2, 3) @ dv).mean(axis=0)
        weight = weight - slope / SEQLEN


if __name__ == "__main__":
    main()
