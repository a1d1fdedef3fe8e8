"""Instructions that Python has no name for, as LLVM: conversions, tensor cores, async copies.

Register operands are places in local arrays: with constant places, and every loop around them of
constant length, LLVM unrolls the loops and keeps the arrays in registers. Offsets into shared
memory count elements of the array given; offsets into global memory count bytes.
`twins` has the simulator's side of each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.cuda import libdevice
from numba.cuda.extending import intrinsic

exp2_float = libdevice.exp2f
exp_double = libdevice.exp
exp_float = libdevice.expf
maximum = libdevice.fmaxf
times_double = libdevice.dmul_rn  # never fused with a later addition
times_float = libdevice.fmul_rn

_HALF = ir.HalfType()
_FLOAT = ir.FloatType()
_BYTE = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_SHARED = 3  # LLVM's address space


def _data(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    """Pointer to an array's first element."""
    return context.make_array(array_type)(context, builder, array).data


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any, add: int) -> Any:
    """Pointer to array[index + add]."""
    index = builder.add(index, ir.Constant(index.type, add))
    return builder.gep(_data(context, builder, array_type, array), [index])


def _load(context: Any, builder: Any, kind: Any, array: Any, index: Any, count: int) -> list[Any]:
    return [builder.load(_place(context, builder, kind, array, index, add)) for add in range(count)]


def _store(
    context: Any, builder: Any, kind: Any, array: Any, index: Any, values: list[Any]
) -> None:
    for add, value in enumerate(values):
        builder.store(value, _place(context, builder, kind, array, index, add))


def _shared_address(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """32-bit shared-memory address of array[offset]."""
    data = builder.bitcast(_data(context, builder, kind, array), _BYTE.as_pointer())
    base = builder.ptrtoint(builder.addrspacecast(data, _BYTE.as_pointer(_SHARED)), _I32)
    size = ir.Constant(_I32, kind.dtype.bitwidth // 8)
    narrow = builder.trunc(offset, _I32) if offset.type.width > 32 else offset
    return builder.add(base, builder.mul(narrow, size))


def _global_address(context: Any, builder: Any, kind: Any, array: Any, offset: Any) -> Any:
    """64-bit address `offset` bytes into a global array."""
    base = builder.ptrtoint(_data(context, builder, kind, array), _I64)
    wide = builder.sext(offset, _I64) if offset.type.width < 64 else offset
    return builder.add(base, wide)


def _assemble(
    builder: Any, result: Any, text: str, constraints: str, operands: list[Any], pure: bool = False
) -> Any:
    """Emit inline assembly; only a `pure` one may be moved, merged or dropped."""
    kind = ir.FunctionType(result, [x.type for x in operands])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=not pure), operands)


def _unpack(builder: Any, result: Any, count: int) -> list[Any]:
    return [builder.extract_value(result, i) for i in range(count)]


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


@intrinsic
def exp2_fast(typingctx, x):
    """Two to the power of x by one instruction; relative error about 2**-22."""

    def codegen(context, builder, signature, args):
        text = "ex2.approx.ftz.f32 $0, $1;"
        return _assemble(builder, _FLOAT, text, "=f,f", [args[0]], pure=True)

    return types.float32(types.float32), codegen


def _packer(element: str) -> Any:
    @intrinsic
    def pack(typingctx, low, high):
        """Round two floats to 16 bits each, `low` in the lower half."""

        def codegen(context, builder, signature, args):
            text = f"cvt.rn.{element}x2.f32 $0, $2, $1;"
            return _assemble(builder, _I32, text, "=r,f,f", list(args), pure=True)

        return types.uint32(types.float32, types.float32), codegen

    return pack


pack_bfloat16 = _packer("bf16")
pack_float16 = _packer("f16")


def _multiplier(element: str) -> Any:
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{element}.{element}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )

    @intrinsic
    def mma(typingctx, acc, i, a, j, b, k):
        """acc[i:i+4] += a[j:j+4] x b[k:k+2]: 16 x 8 of a warp's product over 16 columns."""

        def codegen(context, builder, signature, args):
            acc_kind, _, a_kind, _, b_kind, _ = signature.args
            acc, i, a, j, b, k = args
            operands = (
                _load(context, builder, a_kind, a, j, 4)
                + _load(context, builder, b_kind, b, k, 2)
                + _load(context, builder, acc_kind, acc, i, 4)
            )
            result = _assemble(
                builder,
                ir.LiteralStructType([_FLOAT] * 4),
                text,
                "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                operands,
            )
            _store(context, builder, acc_kind, acc, i, _unpack(builder, result, 4))
            return context.get_dummy_value()

        return types.void(acc, i, a, j, b, k), codegen

    return mma


mma_bfloat16 = _multiplier("bf16")
mma_float16 = _multiplier("f16")


def _matrix_loader(suffix: str) -> Any:
    @intrinsic
    def ldmatrix(typingctx, fragment, i, tile, offset):
        """fragment[i:i+4] = four 8 x 8 matrices; lanes 8n..8n+7 give the rows of matrix n."""

        def codegen(context, builder, signature, args):
            fragment_kind, _, tile_kind, _ = signature.args
            fragment, i, tile, offset = args
            address = _shared_address(context, builder, tile_kind, tile, offset)
            result = _assemble(
                builder,
                ir.LiteralStructType([_I32] * 4),
                f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {{$0,$1,$2,$3}}, [$4];",
                "=r,=r,=r,=r,r,~{memory}",
                [address],
            )
            _store(context, builder, fragment_kind, fragment, i, _unpack(builder, result, 4))
            return context.get_dummy_value()

        return types.void(fragment, i, tile, offset), codegen

    return ldmatrix


ldmatrix = _matrix_loader("")
ldmatrix_transposed = _matrix_loader(".trans")


def _async_copier(size: int, cache: str) -> Any:
    @intrinsic
    def copy_async(typingctx, tile, offset, x, byte_offset, is_there):
        """Start copying `size` bytes of global x to tile[offset:]; zeros unless `is_there`."""

        def codegen(context, builder, signature, args):
            tile_kind, _, x_kind, _, _ = signature.args
            tile, offset, x, byte_offset, is_there = args
            target = _shared_address(context, builder, tile_kind, tile, offset)
            source = _global_address(context, builder, x_kind, x, byte_offset)
            count = builder.select(is_there, ir.Constant(_I32, size), ir.Constant(_I32, 0))
            text = f"cp.async.{cache}.shared.global [$0], [$1], {size}, $2;"
            operands = [target, source, count]
            _assemble(builder, ir.VoidType(), text, "r,l,r,~{memory}", operands)
            return context.get_dummy_value()

        return types.void(tile, offset, x, byte_offset, types.boolean), codegen

    return copy_async


copy_async_16 = _async_copier(16, "cg")
copy_async_4 = _async_copier(4, "ca")


@intrinsic
def copy_row_piece(typingctx, tile, offset, x, start, row, row_bytes):
    """Start copying 16 bytes of global x to tile[offset:], those from start + row * row_bytes on.

    The address is one multiplication of 32-bit numbers, of which the compiler would make several.
    """

    def codegen(context, builder, signature, args):
        tile_kind, _, x_kind, _, _, _ = signature.args
        tile, offset, x, start, row, row_bytes = args
        target = _shared_address(context, builder, tile_kind, tile, offset)
        source = _global_address(context, builder, x_kind, x, start)
        text = (
            "{ .reg .b64 a; mad.wide.s32 a, $2, $3, $1; cp.async.cg.shared.global [$0], [a], 16; }"
        )
        operands = [target, source, row, row_bytes]
        _assemble(builder, ir.VoidType(), text, "r,l,r,r,~{memory}", operands)
        return context.get_dummy_value()

    return types.void(tile, offset, x, start, types.int32, types.int32), codegen


@intrinsic
def commit_copies(typingctx):
    """Close the group of copies started so far."""

    def codegen(context, builder, signature, args):
        _assemble(builder, ir.VoidType(), "cp.async.commit_group;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def wait_copies(typingctx):
    """Wait for this thread's copies; a barrier must follow before others read them."""

    def codegen(context, builder, signature, args):
        _assemble(builder, ir.VoidType(), "cp.async.wait_all;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def store_16(typingctx, x, byte_offset, tile, offset):
    """Copy 16 bytes of shared memory to global x."""

    def codegen(context, builder, signature, args):
        x_kind, _, tile_kind, _ = signature.args
        x, byte_offset, tile, offset = args
        source = _shared_address(context, builder, tile_kind, tile, offset)
        target = _global_address(context, builder, x_kind, x, byte_offset)
        text = (
            "{ .reg .b32 w<4>; ld.shared.v4.b32 {w0,w1,w2,w3}, [$0];"
            " st.global.v4.b32 [$1], {w0,w1,w2,w3}; }"
        )
        _assemble(builder, ir.VoidType(), text, "r,l,~{memory}", [source, target])
        return context.get_dummy_value()

    return types.void(x, byte_offset, tile, offset), codegen


def _quad_reducer(operation: str) -> Any:
    @intrinsic
    def reduce(typingctx, x):
        """Combine x over the four lanes that share a row of a fragment."""

        def codegen(context, builder, signature, args):
            text = (
                "{ .reg .f32 t; shfl.sync.bfly.b32 t, $1, 1, 31, -1;"
                f" {operation}.f32 t, t, $1;"
                " shfl.sync.bfly.b32 $0, t, 2, 31, -1;"
                f" {operation}.f32 $0, $0, t; }}"
            )
            return _assemble(builder, _FLOAT, text, "=&f,f", [args[0]])

        return types.float32(types.float32), codegen

    return reduce


quad_max = _quad_reducer("max")
quad_sum = _quad_reducer("add")


@intrinsic
def any_lane(typingctx, condition):
    """Whether the condition holds in any lane of the warp; all of them must ask."""

    def codegen(context, builder, signature, args):
        text = (
            "{ .reg .pred p; setp.ne.b32 p, $1, 0;"
            " vote.sync.any.pred p, p, -1; selp.b32 $0, 1, 0, p; }"
        )
        found = _assemble(builder, _I32, text, "=r,r", [builder.zext(args[0], _I32)])
        return builder.icmp_unsigned("!=", found, ir.Constant(_I32, 0))

    return types.boolean(types.boolean), codegen


def _vector_loader(count: int) -> Any:
    @intrinsic
    def load(typingctx, values, array, place):
        """values[:count] = array[place:place + count] in one load; aligned to its size."""

        def codegen(context, builder, signature, args):
            values_kind, array_kind, _ = signature.args
            values, array, place = args
            element = context.get_data_type(array_kind.dtype)
            pointer = _place(context, builder, array_kind, array, place, 0)
            vector = ir.VectorType(element, count)
            loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
            loaded.align = count * 4
            parts = [builder.extract_element(loaded, ir.Constant(_I32, i)) for i in range(count)]
            start = ir.Constant(_I64, 0)
            _store(context, builder, values_kind, values, start, parts)
            return context.get_dummy_value()

        return types.void(values, array, place), codegen

    return load


load_2 = _vector_loader(2)
load_4 = _vector_loader(4)
