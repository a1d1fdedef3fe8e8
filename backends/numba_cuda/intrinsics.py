"""Instructions that Python has no name for; the simulator gets a plain twin of each."""

from scfa_core.backends.numba_cuda.compiling import SIMULATED

if SIMULATED:
    from scfa_core.backends.numba_cuda.twins import (
        bits_to_float,
        exp2_double,
        exp2_float,
        float_to_bits,
        float_to_half,
        half_to_float,
    )
else:
    from scfa_core.backends.numba_cuda.ptx import (
        bits_to_float,
        exp2_double,
        exp2_float,
        float_to_bits,
        float_to_half,
        half_to_float,
    )

__all__ = [
    "bits_to_float",
    "exp2_double",
    "exp2_float",
    "float_to_bits",
    "float_to_half",
    "half_to_float",
]
