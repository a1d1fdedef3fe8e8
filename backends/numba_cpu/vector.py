"""What Python cannot say to LLVM: one matrix micro-kernel, bit casts, an atomic counter.

The micro-kernel holds a block of the product in vector registers over its whole inner loop, which
a loop vectoriser cannot be talked into. It is written in LLVM's portable vector types, so the same
few lines become AVX-512, AVX2 or NEON code. Nothing here knows what attention is.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,import-untyped"
# numba infers the types of compiled functions from their arguments.

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

__all__ = [
    "REGISTER_BYTES",
    "REGISTER_COLUMNS",
    "ROWS",
    "address_of",
    "as_bits",
    "as_float",
    "atomic_next",
    "load_int8",
    "load_int32",
    "load_int64",
    "multiply_block",
    "multiply_column",
]

ROWS = 4  # rows of the product in one register block; rows of a tile are padded to a multiple of it
_CONTRACT = ("contract",)  # a * b + c may become one fused operation; nothing else is relaxed


def _features() -> set[str]:
    """Instruction sets numba compiles for: this machine's, unless its settings say otherwise."""
    chosen = config.CPU_FEATURES
    if chosen is not None:
        return {name[1:] for name in chosen.split(",") if name.startswith("+")}
    return {name for name, there in llvm.get_host_cpu_features().items() if there}


def _register_bytes() -> int:
    """Width of a vector register, in bytes."""
    features = _features()
    if "avx512f" in features:
        return 64
    return 32 if "avx" in features else 16


def _register_columns() -> int:
    """Vectors per row of a register block: four where there are 32 registers, else two."""
    return 4 if _features() & {"avx512f", "neon"} else 2


REGISTER_BYTES = _register_bytes()
REGISTER_COLUMNS = _register_columns()


def _pointer(context, builder, array_type, array, offset):
    """Pointer to element `offset` of the flat array."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    return builder.gep(data, [offset])


def _emit_micro_kernel(module, scalar, columns_wide, name):
    """Emit c[r, :] = c[r, :] * keep[:] + sum_k a[r, k] b[k, :], `columns_wide` vectors wide."""
    lanes = REGISTER_BYTES // (8 if isinstance(scalar, ir.DoubleType) else 4)
    vector = ir.VectorType(scalar, lanes)
    index = ir.IntType(64)
    pointer = scalar.as_pointer()
    signature = ir.FunctionType(
        ir.VoidType(), [pointer, index, index, pointer, index, pointer, index, pointer, index]
    )
    function = ir.Function(module, signature, name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    function.attributes.add("nounwind")
    a, a_row, a_k, b, b_k, c, c_row, keep, depth = function.args
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    zero = ir.Constant(vector, [0.0] * lanes)
    align = scalar_align = 8 if isinstance(scalar, ir.DoubleType) else 4

    def load(address):
        return builder.load(builder.bitcast(address, vector.as_pointer()), align=align)

    def broadcast(address):
        value = builder.load(address, align=scalar_align)
        single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, index(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), mask)

    def multiply_add(x, y, z):
        return builder.fadd(builder.fmul(x, y, flags=_CONTRACT), z, flags=_CONTRACT)

    entry = builder.block
    loop = function.append_basic_block("loop")
    done = function.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(index)
    step.add_incoming(index(0), entry)
    sums = [[builder.phi(vector) for _ in range(columns_wide)] for _ in range(ROWS)]
    b_at = builder.gep(b, [builder.mul(step, b_k)])
    columns = [load(builder.gep(b_at, [index(j * lanes)])) for j in range(columns_wide)]
    a_at = builder.gep(a, [builder.mul(step, a_k)])
    for r in range(ROWS):
        factor = broadcast(builder.gep(a_at, [builder.mul(a_row, index(r))]))
        for j in range(columns_wide):
            updated = multiply_add(factor, columns[j], sums[r][j])
            sums[r][j].add_incoming(zero, entry)
            sums[r][j].add_incoming(updated, loop)
            sums[r][j] = updated
    following = builder.add(step, index(1))
    step.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)

    builder.position_at_end(done)
    null = builder.icmp_unsigned("==", builder.ptrtoint(keep, index), index(0))
    store_block = function.append_basic_block("store")
    update_block = function.append_basic_block("update")
    builder.cbranch(null, store_block, update_block)
    for block, update in ((store_block, False), (update_block, True)):
        builder.position_at_end(block)
        for r in range(ROWS):
            for j in range(columns_wide):
                target = builder.gep(
                    c, [builder.add(builder.mul(c_row, index(r)), index(j * lanes))]
                )
                value = sums[r][j]
                if update:
                    value = multiply_add(
                        load(target), load(builder.gep(keep, [index(j * lanes)])), value
                    )
                builder.store(value, builder.bitcast(target, vector.as_pointer()), align=align)
        builder.ret_void()
    return function


def _multiply(columns_wide):
    """Make the intrinsic that writes a register block of ROWS rows and `columns_wide` vectors."""

    @intrinsic
    def multiply(typing, a, a_at, a_row, a_k, b, b_at, b_k, c, c_at, c_row, keep, keep_at, depth):
        """Write sum_k a[r, k] b[k, :], plus keep[:] * c[r, :] if keep_at >= 0."""
        number = types.int64
        signature = types.void(
            a, number, number, number, b, number, number, c, number, number, keep, number, number
        )

        def codegen(context, builder, signature, args):
            a, a_at, a_row, a_k, b, b_at, b_k, c, c_at, c_row, keep, keep_at, depth = args
            array_type = signature.args[0]
            scalar = context.get_value_type(array_type.dtype)
            name = f"scfa_micro_kernel_{array_type.dtype}_{columns_wide}"
            function = builder.module.globals.get(name)
            if function is None:
                function = _emit_micro_kernel(builder.module, scalar, columns_wide, name)
            keep_pointer = _pointer(context, builder, signature.args[10], keep, keep_at)
            unused = builder.icmp_signed("<", keep_at, ir.Constant(keep_at.type, 0))
            nothing = ir.Constant(keep_pointer.type, None)
            pointers = (
                _pointer(context, builder, signature.args[0], a, a_at),
                _pointer(context, builder, signature.args[4], b, b_at),
                _pointer(context, builder, signature.args[7], c, c_at),
                builder.select(unused, nothing, keep_pointer),
            )
            builder.call(
                function,
                [pointers[0], a_row, a_k, pointers[1], b_k, pointers[2], c_row, pointers[3], depth],
            )
            return context.get_dummy_value()

        return signature, codegen

    return multiply


multiply_block, multiply_column = _multiply(REGISTER_COLUMNS), _multiply(1)
_BITS_OF = {types.float32: types.int32, types.float64: types.int64}
_FLOAT_OF = {bits: real for real, bits in _BITS_OF.items()}


@intrinsic
def as_bits(typing, value):
    """Reinterpret a float as the integer with the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _BITS_OF[value](value), codegen


@intrinsic
def as_float(typing, value):
    """Reinterpret an int32 or int64 as the float with the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return _FLOAT_OF[value](value), codegen


@intrinsic
def address_of(typing, array):
    """Address of the first element, to align workspaces."""

    def codegen(context, builder, signature, args):
        proxy = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
        return builder.ptrtoint(proxy.data, ir.IntType(64))

    return types.int64(array), codegen


@intrinsic
def atomic_next(typing, counter):
    """Take the next number from an int64 counter that several threads share."""

    def codegen(context, builder, signature, args):
        proxy = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0])
        return builder.atomic_rmw("add", proxy.data, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(counter), codegen


def _load(bits):
    """Make an intrinsic that reads a signed integer at an address; alignment is not assumed."""

    @intrinsic
    def load(typing, address):
        def codegen(context, builder, signature, args):
            kind = ir.IntType(bits)
            pointer = builder.inttoptr(args[0], kind.as_pointer())
            value = builder.load(pointer, align=1)
            return builder.sext(value, ir.IntType(64)) if bits < 64 else value

        return types.int64(types.int64), codegen

    return load


load_int8, load_int32, load_int64 = _load(8), _load(32), _load(64)
