"""Instructions as LLVM: conversions by bits. `twins` has the simulator's side of each."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.cuda import libdevice
from numba.cuda.extending import intrinsic

exp2_float = libdevice.exp2f
exp2_double = libdevice.exp2

_HALF = ir.HalfType()
_FLOAT = ir.FloatType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)


@intrinsic
def bits_to_float(typingctx, bits):
    """Reinterpret 32 bits as a float."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def float_to_bits(typingctx, x):
    """Reinterpret a float as 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def half_to_float(typingctx, bits):
    """Widen the bits of a float16."""

    def codegen(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], _HALF), _FLOAT)

    return types.float32(types.uint16), codegen


@intrinsic
def float_to_half(typingctx, x):
    """Round to the bits of a float16."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.fptrunc(args[0], _HALF), _I16)

    return types.uint16(types.float32), codegen
