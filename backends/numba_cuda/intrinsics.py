"""Instructions that Python has no name for: `ptx` on a card, its plain twin in the simulator."""

from scfa_core.backends.numba_cuda.compiling import SIMULATED

if SIMULATED:
    from scfa_core.backends.numba_cuda import twins as _home
else:
    from scfa_core.backends.numba_cuda import ptx as _home  # type: ignore[no-redef]

any_lane = _home.any_lane
bits_to_float = _home.bits_to_float
commit_copies = _home.commit_copies
copy_async_4 = _home.copy_async_4
copy_async_16 = _home.copy_async_16
copy_row_piece = _home.copy_row_piece
exp_double = _home.exp_double
exp2_fast = _home.exp2_fast
exp2_float = _home.exp2_float
exp_float = _home.exp_float
float_to_bits = _home.float_to_bits
float_to_half = _home.float_to_half
half_to_float = _home.half_to_float
ldmatrix = _home.ldmatrix
ldmatrix_transposed = _home.ldmatrix_transposed
load_2 = _home.load_2
load_4 = _home.load_4
maximum = _home.maximum
mma_bfloat16 = _home.mma_bfloat16
mma_float16 = _home.mma_float16
pack_bfloat16 = _home.pack_bfloat16
pack_float16 = _home.pack_float16
quad_max = _home.quad_max
quad_sum = _home.quad_sum
store_16 = _home.store_16
times_double = _home.times_double
times_float = _home.times_float
wait_copies = _home.wait_copies
