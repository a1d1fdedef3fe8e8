"""Which blocks of the portable numba-cuda kernels have a marked tile, against counting them."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="about numba-cuda's device functions")

SCRIPT = """
import numpy as np
from scfa_core.backends.numba_cuda.schedule import any_is_wanted, tile_is_wanted

rng = np.random.default_rng(0)
found = {0: 0, 1: 0}
for _ in range(400):
    rows, times = int(rng.choice([8, 16, 32])), int(rng.choice([1, 2, 4]))
    flag_rows, seqlen = int(rng.choice([0, rows * times])), int(rng.integers(1, 300))
    heads, blocks, threads = (int(x) for x in rng.integers(1, (4, 9, 9)))
    tiles = -(-seqlen // rows)
    flags = np.zeros(heads * -(-seqlen // max(flag_rows, 1)), np.int32)
    flags[rng.integers(0, len(flags), int(rng.integers(0, 3)))] = 1
    last_first, every = bool(rng.integers(2)), heads * tiles
    for block in range(blocks):
        mine = [
            tile_is_wanted(flags, flag_rows, tile // tiles, rows * place, seqlen)
            for tile in range(block, every, blocks)
            for place in [tiles - 1 - tile % tiles if last_first else tile % tiles]
        ]
        told = max(
            any_is_wanted(flags, flag_rows, rows, tiles, block + thread * blocks, every,
                          threads * blocks, last_first, seqlen)
            for thread in range(threads)
        )
        assert told >= any(mine)  # no marked tile is passed over
        assert flag_rows == 0 or told == any(mine)
        found[told] += 1
assert min(found.values()) > 100
print("done")
"""


def test_a_block_with_a_marked_tile_is_never_passed_over():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.endswith("done\n"), done.stderr
