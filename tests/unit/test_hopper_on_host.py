"""The Hopper kernels, compiled as host C++ and run on fibers, against the truth.

wgmma_on_host.hpp plays what only the card has: barriers, copies, products from descriptors. All
else is the shipped source: gathers, swizzle, zeros beyond the rows, masks, softmax, stores.
"""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scfa_core.backends.cupy_raw import launch_sm90, nvrtc

import scfa_core as scfa
from scfa_core import testing
from scfa_core.arrays import DeviceArray
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem
from scfa_core.testing import Part, Results, Spec

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
PLAYED = (  # functions of the shipped headers that the host has its own of
    *("copy_chunk", "copy_word", "exp2_fast", "log2_fast", "pack_pair", "unpack_pair"),
    *("wgmma_fence", "wgmma_commit", "wgmma_wait", "pin", "wgmma_shared", "wgmma_issue"),
    *("wgmma_registers", "load_acquire", "store_release", "wait_until", "global_proxy_fence"),
    *("start_sum", "wait_until_read", "wait_until_added", "fetch_sum", "shared_store_four"),
    *("load_sum_four", "row_address"),
)
DRIVER = """
extern "C" void run(const Params* p, int blocks, int threads, int shared_bytes, int order) {
  std::vector<char> shared(shared_bytes + 1024);
  dynamic_shared = (char*)(((size_t)shared.data() + 1023) / 1024 * 1024);
  gridDim = {(unsigned)blocks, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (int x = 0; x < blocks; ++x) {
    for (size_t i = 0; i < shared.size(); ++i) shared[i] = i % 2 ? 0x7f : 0xff;  // NaN
    host::start_block(threads);
    blockIdx = {(unsigned)x, 0, 0};
    host::body = [&] { KERNEL(*p); };
    host::run_block(threads, order);
  }
}
"""
TYPES = """
typedef unsigned short u16;
typedef unsigned int u32;
constexpr bool kIsBf16 = SCFA_BFLOAT16;
inline unsigned __reduce_or_sync(unsigned lanes, unsigned value) {
  for (int other = 1; other < 32; other *= 2) value |= __shfl_xor_sync(lanes, value, other);
  return value;
}
"""
TILES_DRIVER = """
// Which keys of its blocks the gathering warpgroup takes for seen, tile by tile.
template <int kRows, int kBlock>
void visit(const Params& p, int keys_of_tile, KeyUnion* unions, char* seen) {
  const TileData<kRows> data{64};
  const int thread = threadIdx.x, own = gather_owned_row(thread, 0);
  for (int tile = 0; tile < p.tiles; ++tile) {
    const KeyUnion keys = load_tile_rows(p, data, 0, locate_query_tile<kRows>(p, tile), thread);
    if (thread == 0) unions[tile] = keys;
    for (int first = keys.first; first < keys.end; first += kBlock) {
      const int key = first + min(own, kBlock - 1);
      const bool sees = seen_by_tile<kBlock>(data, keys, first, key, thread);
      if (own < kBlock) seen[tile * keys_of_tile + key] = sees;
    }
    __syncthreads();
  }
}

extern "C" void run(const int* starts, const int* ends, const int* indices, int rows, int tiles,
                    int keys_of_tile, KeyUnion* unions, char* seen, int order) {
  std::vector<char> shared(64 + TileData<SCFA_ROWS>::kBytes);
  dynamic_shared = shared.data();
  blockDim = {kGatherThreads, 1, 1};
  Params p{};
  p.key_start = starts, p.key_end = ends, p.q_index = indices;
  p.seqlen_q = rows, p.tiles = p.tiles_per_head = tiles;
  host::start_block(kGatherThreads);
  host::body = [&] { visit<SCFA_ROWS, SCFA_BLOCK_N>(p, keys_of_tile, unions, seen); };
  host::run_block(kGatherThreads, order);
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++ or clang++) here")


def without_function(text, name):
    """Cut every definition of a function, with its template line."""
    head = rf"(?:template <[^{{}};]*?>\n)?__device__ __forceinline__ [\w ]+ {name}\("
    while found := re.search(head, text):
        end = text.index("{\n", found.end()) + 1
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: found.start()] + text[end:]
    return text


def for_the_host(name, text):
    """A shipped source with the instructions of the card taken out."""
    text = text.replace("extern __shared__ char dynamic[]", "char* dynamic = dynamic_shared")
    for function in PLAYED:
        text = without_function(text, function)
    text = re.sub(r'asm volatile\("(prefetch|" : "\+[lr]")[^;]*(;"[^;]*)?;', "", text)
    fragment = r'asm volatile\("ldmatrix.*?: "=r"\((.*?)\)\s*: "r"\(address\)\s*: "memory"\);'
    registers = r"load_matrices_of(\1, address);"
    text = re.sub(fragment, registers, text, flags=re.S)
    text = re.sub(r'\), "=r"\(|\),\s+"=r"\(', ", ", text)
    fragment = r'asm volatile\("stmatrix.*?: ?"r"\(address\),\s*(.*?)\s*: "memory"\);'
    text = re.sub(fragment, r"store_matrices(address, \1);", text, flags=re.S)
    text = re.sub(r'"r"\((a\[4 \* step[^)]*\])\)', r"\1", text)
    words = r'asm volatile\("ld\.shared\.v4\.u32[^:]*: "=r"\((\w+)\[0\].*?: "r"\(([^)]*)\)\);'
    text = re.sub(words, r"load_words(\1, \2);", text, flags=re.S)
    assert "asm volatile" not in re.sub(r"^#define.*?[^\\]$", "", text, flags=re.S | re.M), name
    return text


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return (headers, driver, defines) -> the compiled function `run`."""
    folder = tmp_path_factory.mktemp("hopper")
    for name, text in nvrtc.read_sources().items():
        if re.search("sm90|wgmma", name):
            (folder / name).write_text(for_the_host(name, text))
    (folder / "types.cuh").write_text(TYPES)
    (folder / "mbarrier.cuh").write_text("#pragma once\n")
    played = ("cuda_on_host.hpp", "ptx_on_host.hpp", "wgmma_on_host.hpp")
    for name in played:
        shutil.copy(HERE / name, folder)
    built = {}

    def library(headers, driver, constants):
        if (driver, constants) not in built:
            source = folder / f"driver-{len(built)}.cpp"
            lines = [f'#include "{header}"' for header in (*played, *headers)]
            source.write_text("\n".join([*lines, driver]))
            defines = [f"-DSCFA_{key}={value}" for key, value in constants]
            options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-ffp-contract=off"]
            options += ["-fsanitize=signed-integer-overflow,shift,bounds"]
            options += ["-fsanitize-undefined-trap-on-error"]
            target = source.with_suffix(".so")
            command = [COMPILER, *options, *defines, "-o", str(target), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:4000]
            built[driver, constants] = ctypes.CDLL(str(target)).run
        return built[driver, constants]

    return library


@pytest.fixture(scope="module")
def build(library):
    """Return (kernel, dtype, head_dim, shape, monotone, sanitize) -> its compiled host function."""

    def build(kernel, dtype, head_dim, shape, monotone=True, sanitize=False):
        constants = (("BFLOAT16", int(dtype == "bfloat16")),)
        if shape is not None:
            constants = overheard_constants(kernel, dtype, head_dim, shape, monotone)
        driver = f"#define KERNEL scfa_{kernel}{DRIVER}"
        return library((f"{kernel}.cu",), driver, (*constants, ("SANITIZE", int(sanitize))))

    return build


def overheard_constants(kernel, dtype, head_dim, shape, monotone):
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch_sm90, "get_kernel", lambda *request, arch_suffix: asked.append(request)
        )
        launch_sm90._kernel.__wrapped__(kernel, 0, dtype, head_dim, shape, monotone)
    return asked[0][2]


def aligned_copy(x):
    """Copy whose data begin on a 16-byte boundary."""
    room = np.empty(x.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    y = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def described(x, dtype):
    strides = tuple(stride // x.itemsize for stride in x.strides)
    return DeviceArray(x.ctypes.data, x.shape, strides, dtype, 0)


def passes(spec, fused, monotone=True):
    """Kernels of one call: name, shape, tiles of one head and of all, heads, blocks, threads.

    `blocks` is None where any number will do.
    """
    per_query, per_key = (spec.seqlen_q, spec.heads), (spec.seqlen_k, spec.heads_kv)
    head_dim = spec.head_dim
    backward = (
        ("bwd_prepare_sm90", launch_sm90._FUSED, *per_key),
        (launch_sm90._FUSED_KERNELS.get(head_dim), launch_sm90._FUSED, *per_key),
    )
    if not fused:
        backward = (
            ("bwd_dq_sm90", launch_sm90._DQ, *per_query),
            ("bwd_dkdv_sm90", launch_sm90._DKDV, *per_key),
        )
    if not monotone:
        lists = spec.batch * spec.heads
        yield "bwd_envelope_sm90", None, (1, lists), spec.heads, 2 * lists, 1024
    for kernel, shapes, rows, heads in (("fwd_sm90", launch_sm90._FORWARD, *per_query), *backward):
        shape = shapes[head_dim]
        tiles = launch_sm90._tiles(rows, 64 * shape.warpgroups, spec.batch * heads)
        if kernel == "bwd_prepare_sm90":
            yield kernel, launch_sm90._PREPARE[head_dim], tiles, heads, None, 256
        else:
            yield kernel, shape, tiles, heads, None, launch_sm90._threads(kernel, shape)


def run(build, case, order=0, blocks=1, fused=False, slots=None, sanitize=False, any_order=False):
    """Results of one case; `slots` query heads have room for sums of dq, all by default.

    With `any_order` the kernels are not told of ranges that are in order.
    """
    spec = case.spec
    problem = Problem(
        *(spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k),
        *(spec.head_dim, spec.head_dim_v, spec.dtype, "cpu", case.softmax_scale),
    )
    like = [np.zeros(x.shape, np.float32) for x in (case.q, case.k)]
    made = scfa.make_plan(case.pattern, *like, backend="reference")
    monotone = made.monotone and not any_order
    lists = [made.q_index, made.q_count, made.k_index, made.k_count, made.key_start, made.key_end]
    lists = [np.ascontiguousarray(x) for x in lists]
    plan = PlanArrays.of([*(described(x, "int32") for x in lists), None], monotone)
    q, k, v, dout = (aligned_copy(x) for x in (case.q, case.k, case.v, case.dout))
    lse = np.full(q.shape[:3], np.nan, np.float32)
    out, dq, dk, dv = (aligned_copy(np.full_like(x, 0x7FFF)) for x in (dout, q, k, v))
    arrays = tuple(described(x, spec.dtype) for x in (q, k, v, out, dout, dq, dk, dv))
    statistics = np.full(2 * lse.size + 1, np.nan, np.float32)
    at = statistics.ctypes.data + 4
    slots = slots or spec.batch * spec.heads
    query_tiles = launch_sm90._tiles(spec.seqlen_q, 64, 1)[0]
    added = np.full(spec.batch * spec.heads * query_tiles, -1, np.int32)
    sum_of_dq = np.full((slots, query_tiles, 64, spec.head_dim), np.nan, np.float32)
    sums = launch_sm90.Sums(sum_of_dq.ctypes.data, added.ctypes.data, slots, query_tiles)
    envelopes = np.full((2, lse.size), -7, np.int32)
    envelopes_at = (envelopes[0].ctypes.data, envelopes[1].ctypes.data)
    for kernel, shape, tiles, heads, least, threads in passes(spec, fused, monotone):
        counter = np.zeros(1, np.int32)
        params = launch_sm90._params(
            *(problem, plan, arrays, described(lse, "float32")),
            *((at, at + 4 * lse.size), counter.ctypes.data, tiles, heads, sums, 0, envelopes_at),
        )
        shared = 0 if shape is None else launch_sm90._SHARED[kernel](spec.head_dim, shape)
        function = build(kernel, spec.dtype, spec.head_dim, shape, monotone, sanitize)
        function(params, least or blocks, threads, shared, order)
    wide = (testing.widen(x, spec.dtype) for x in (out, dq, dk, dv))
    out, dq, dk, dv = wide
    return Results(out, lse, dq, dk, dv)


def check(build, spec, **how):
    check_case(build, testing.build(spec), **how)


def check_case(build, case, **how):
    got = run(build, case, **how)
    bad = [verdict for verdict in testing.judge(case, got) if not verdict.ok]
    assert not bad, f"{case.spec}: {bad}"


HASH = (Part("hash", "uniform", 2),)
WINDOW = (Part("window", number=70),)


@pytest.mark.parametrize("head_dim", [16, 40, 96, 120])
def test_narrow_rows(build, head_dim):
    spec = Spec(1, 2, 1, 140, 200, head_dim, head_dim, "bfloat16", parts=HASH, poison=True, seed=1)
    check(build, spec)


@pytest.mark.parametrize("head_dim", [136, 192, 256])
def test_wide_rows(build, head_dim):
    spec = Spec(1, 2, 1, 130, 200, head_dim, head_dim, "bfloat16", parts=HASH, poison=True, seed=2)
    check(build, spec)


@pytest.mark.parametrize("head_dim", [32])
def test_a_window_in_float16(build, head_dim):
    spec = Spec(1, 1, 1, 200, 200, head_dim, head_dim, "float16", parts=WINDOW, seed=3)
    check(build, spec, order=2, blocks=2)


def test_weights_that_outgrow_what_came_before(build):
    """Maxima of later blocks far above those of the first: sums and outputs shrink on the way."""
    sizes = (1, 2, 1, 330, 330, 128, 128, "bfloat16")
    check(build, Spec(*sizes, softmax_scale=4.0, parts=(Part("causal", number=0),), seed=6))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_far_below_those_of_another_block(build, head_dim):
    """Half of the keys at -1e6: differences of the other scores survive that."""
    sizes = (1, 1, 1, 300, 300, head_dim, head_dim, "float16")
    case = testing.build(Spec(*sizes, softmax_scale=1.0, parts=(Part("hash", "uniform", 1),)))
    rng = np.random.default_rng(0)
    q, k = np.zeros(case.q.shape), np.zeros(case.k.shape)
    q[..., 0], q[..., 1] = 100.0, 2.0
    k[..., 1] = rng.standard_normal(k.shape[:3]) * 2
    k[:, :, 150:, 0] = -1e4
    case.q[...], case.k[...] = q, k
    got, right = run(build, case), testing.truth(case)
    rows = case.mask[:, :, :, :150].sum(-1) > 1
    assert np.abs(got.lse - right.lse)[rows].max() < 1e-5
    assert all(verdict.ok for verdict in testing.judge(case, got))


@pytest.mark.parametrize("head_dim", sorted(launch_sm90._FUSED))
@pytest.mark.parametrize("seqlen", [1, 63, 64, 65, 127, 129, 331])
def test_causal_in_one_pass(build, head_dim, seqlen):
    causal = (Part("causal", number=0),)
    spec = Spec(1, 1, 1, seqlen, seqlen, head_dim, head_dim, "bfloat16", parts=causal, seed=seqlen)
    check(build, spec, fused=True, order=seqlen % 3)


IN_ONE_PASS = {
    "hash": HASH,
    "all together": (*HASH, Part("keep", "uniform", 80), Part("window", number=90)),
    "window": WINDOW,
    "keep none": (Part("keep", "none"),),
}


@pytest.mark.parametrize("head_dim", sorted(launch_sm90._FUSED))
@pytest.mark.parametrize("name", IN_ONE_PASS)
def test_patterns_in_one_pass(build, head_dim, name):
    """Grouped heads, and sums of dq whose room is used again."""
    sizes = (1, 4, 2, 150, 277, head_dim, head_dim, "float16")
    spec = Spec(*sizes, parts=IN_ONE_PASS[name], poison=True, seed=5)
    check(build, spec, fused=True, order=2, blocks=2, slots=2)


@pytest.mark.parametrize(("head_dim", "fused"), [(64, False), (64, True), (128, True)])
def test_the_build_for_the_sanitizer(build, head_dim, fused):
    """It has arrivals, copies and sums of its own."""
    parts = (Part("window", number=200),)
    spec = Spec(1, 2, 2, 270, 270, head_dim, head_dim, "bfloat16", parts=parts, seed=6)
    check(build, spec, fused=fused, order=1, slots=1, sanitize=True)


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("style", ["random", "narrow", "reversed", "outside", "empty"])
def test_ranges_in_any_order(build, head_dim, style):
    """Grouped heads, and more rows in the last tile than there are queries."""
    parts = (Part("ranges", style),)
    sizes = (1, 4, 2, 210, 333, head_dim, head_dim, "bfloat16")
    check(build, Spec(*sizes, parts=parts, poison=True, seed=head_dim), order=1, blocks=2)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["hash", "all together", "window"])
def test_where_there_is_order_both_kinds_of_kernels_give_the_same_bits(build, head_dim, name):
    """The envelopes of ranges in order are the ranges, and no block is passed over."""
    sizes = (1, 2, 1, 210, 277, head_dim, head_dim, "bfloat16")
    case = testing.build(Spec(*sizes, parts=IN_ONE_PASS[name], seed=9))
    for got, right in zip(run(build, case, any_order=True), run(build, case), strict=True):
        np.testing.assert_array_equal(got, right)


def test_ranges_in_any_order_in_the_build_for_the_sanitizer(build):
    parts = (Part("ranges", "random"),)
    spec = Spec(1, 2, 2, 150, 170, 64, 64, "bfloat16", parts=parts, poison=True, seed=6)
    check(build, spec, order=1, sanitize=True)


@pytest.mark.parametrize("seed", range(3))
def test_ranges_in_any_order_within_groups(build, seed):
    parts = (*HASH, Part("ranges", "random"), Part("keep", "uniform", 80))
    sizes = (2, 2, 1, 260, 300, 64, 64, "float16")
    check(build, Spec(*sizes, parts=parts, poison=True, seed=seed), order=seed)


def envelopes_of(build, start, end, order):
    """What the kernel makes of the lists (heads, rows)."""
    heads, rows = start.shape
    problem = Problem(1, heads, heads, rows, 8, 64, 64, "bfloat16", "cpu", 0.1)
    start, end = (np.ascontiguousarray(x, np.int32) for x in (start, end))
    lists = [described(x, "int32") for x in (start, start, start, start, start, end)]
    made = np.full((2, heads, rows), -7, np.int32)
    at = (made[0].ctypes.data, made[1].ctypes.data)
    params = launch_sm90._params(
        *(problem, PlanArrays.of([*lists, None], False), (None,) * 8, None, (0, 0), 0),
        *((1, heads), heads),
        envelopes=at,
    )
    build("bwd_envelope_sm90", "bfloat16", 64, None)(params, 2 * heads, 1024, 0, order)
    return made


@pytest.mark.parametrize("rows", [1, 5, 127, 129, 4095, 4096, 4097, 8193, 12301])
def test_envelopes(build, rows):
    """Nondecreasing bounds of rows that see anything; a head of each style."""
    rng = np.random.default_rng(rows)
    styles = ("random", "falling", "two places", "mostly empty", "one", "rising")
    given = [ranges_of(style, rng, rows, 900) for style in styles]
    given.append((np.full(rows, 5), np.full(rows, 5)))  # nobody sees anything
    start, end = (np.stack(x) for x in zip(*given, strict=True))
    sees = start < end
    made_start, made_end = envelopes_of(build, start, end, rows % 3)
    right = np.maximum.accumulate(np.where(sees, end, 0), -1)
    np.testing.assert_array_equal(made_end, right)
    right = np.where(sees, start, 2**31 - 1)[:, ::-1]
    right = np.minimum.accumulate(right, -1)[:, ::-1]
    np.testing.assert_array_equal(made_start, right)


def check_ranges(build, sizes, start, end, dtype="bfloat16", **how):
    """Ranges given row by row, the same for every head; rows that take no part hold NaN and Inf."""
    spec = Spec(*sizes, dtype, parts=(Part("ranges", "random"),), poison=True, seed=4)
    given = (1, sizes[1], sizes[3])
    ranges = [np.broadcast_to(np.asarray(x), given).copy() for x in (start, end)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "build_part", lambda *_: scfa.KeyRanges(*ranges))
        case = testing.build(spec)
    check_case(build, case, **how)


SAWTOOTH, NESTED, FAR_APART, ROWS_APART = "sawtooth", "nested", "far apart", 1000


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("style", [SAWTOOTH, NESTED, FAR_APART])
def test_gradients_where_blocks_of_queries_see_nothing_of_a_tile(build, head_dim, style):
    """Between blocks that do, more of them than there are buffers; edges beside those of tiles."""
    rows = ROWS_APART if style == FAR_APART else 400
    row = np.arange(rows)
    if style == SAWTOOTH:  # each 100 queries see the keys 0 to 199 again
        start = 2 * (row % 100) - 1 + row // 100
        end = start + 3
    elif style == NESTED:  # ever shorter, then ever longer
        start = np.minimum(row, rows - 1 - row)
        end = 399 - start
        start, end = np.where(row % 2, start, 200), np.where(row % 3, end, 201)
    else:  # the first and the last queries see the first keys, one of a group each
        start = np.full(rows, 256)
        end = start + 1
        edge = [0, 63, 64, rows - 65, rows - 1]
        start[edge] = [63, 0, 127, 64, 0]
        end[edge] = [64, 1, 129, 65, 260]
        start[400:480] = 300  # of no keys
    sizes = (1, 1, 1, rows, 400, head_dim, head_dim)
    check_ranges(build, sizes, np.clip(start, 0, 400), np.clip(end, 0, 400), order=2)


@pytest.mark.parametrize("odd", [-1, 0, 1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ranges_that_begin_and_end_beside_blocks(build, head_dim, odd):
    """A head for each pair of bounds; row 75 is off by one, and rows 30 and 110 see nothing."""
    sizes = (1, 9, 3, 190, 420, head_dim, head_dim, "float16")
    case = testing.build(Spec(*sizes, parts=(Part("ranges", "random"),), seed=8))
    start, end = np.zeros((2, 1, 9, 190), np.int64)
    begin_off, end_off = np.mgrid[-1:2, -1:2].reshape(2, 1, 9, 1)
    start[..., 64:] = 128 + begin_off
    end[..., :64], end[..., 64:] = 400, 256 + end_off
    start[..., 75] += odd
    end[..., 75] -= odd
    start[..., [30, 110]], end[..., [30, 110]] = 390, [[390, 129]]
    key = np.arange(420)
    mask = (start[..., None] <= key) & (key < end[..., None])
    check_case(build, replace(case, pattern=scfa.KeyRanges(start, end), mask=mask))


def ranges_of(style, rng, rows, keys):
    """Ranges [start, end) of `rows` queries among `keys` keys."""
    row = np.arange(rows)
    start, end = rng.integers(0, keys + 1, (2, rows))
    length = rng.integers(0, 200, rows)
    if style == "short":
        end = start + rng.integers(1, 40, rows)
    elif style == "of few keys":
        end = start + rng.integers(0, 3, rows)
    elif style == "neighbours overlap":
        start = row * keys // rows + rng.integers(-30, 31, rows)
        end = start + 61 + length
    elif style == "neighbours touch":  # up and down, some with a key between them
        cuts = np.cumsum(rng.integers(-40, 41, rows + 1)) + keys // 2
        cuts = cuts + np.linspace(0, rng.integers(-200, 201), rows + 1).astype(int)
        start, end = np.minimum(cuts[:-1], cuts[1:]), np.maximum(cuts[:-1], cuts[1:])
        start = start + (rng.random(rows) < 0.1)
    elif style.startswith("one key between"):
        cuts = np.linspace(0, keys, rows + 1).astype(int)
        start, end = cuts[:-1], cuts[1:].copy()
        at = rng.integers(0, min(rows, 64))
        end[at] = max(end[at] - 1, start[at])
        if style.endswith("falling"):
            start, end = start[::-1], end[::-1]
    elif style == "falling":
        start = np.sort(start)[::-1]
        end = start + length
    elif style == "two places":
        start = np.where(rng.random(rows) < 0.5, 5, keys - 210) + rng.integers(0, 9, rows)
        end = start + length
    elif style == "mostly empty":
        end = np.where(rng.random(rows) < 0.05, end, start - rng.integers(0, 2, rows))
    elif style == "edges of blocks":
        start, end = 16 * rng.integers(0, 6, (2, rows)) + rng.integers(-1, 2, (2, rows))
        start, end = start + 1, end + 64
    elif style == "one":
        end[:] = start[:] = keys // 2
        at = rng.integers(0, rows)
        start[at], end[at] = 0, keys
    elif style == "rising":
        start = np.sort(start)
        end = np.maximum(np.sort(np.minimum(start + length // 4, keys)), start)
    start, end = np.clip(start, 0, keys), np.clip(end, 0, keys)
    return np.ascontiguousarray(start, np.int32), np.ascontiguousarray(end, np.int32)


TILES_IN_ANY_ORDER = (
    *("random", "short", "of few keys", "neighbours overlap", "neighbours touch", "falling"),
    *("two places", "mostly empty", "edges of blocks", "one", "rising"),
    *("one key between, rising", "one key between, falling"),
)
TILE_HEADERS = ("products_sm90.cuh", "params_sm90.cuh", "gather_sm90.cuh", "tiles_sm90.cuh")


def visited(library, shape, start, end, keys, monotone, order=0):
    """What each tile visits of its keys, and what of them it takes for seen."""
    rows_of_tile, block = shape
    constants = (("ROWS", rows_of_tile), ("BLOCK_N", block), ("MONOTONE", int(monotone)))
    run = library(TILE_HEADERS, TILES_DRIVER, (*constants, ("BFLOAT16", 1)))
    rows = start.size
    tiles, room = -(-rows // rows_of_tile), keys + block
    unions, seen = np.full((tiles, 4), -7, np.int32), np.full((tiles, room), -1, np.int8)
    index = np.arange(rows, dtype=np.int32)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (start, end, index, unions, seen)]
    run(*pointers[:3], rows, tiles, room, *pointers[3:], order)
    return unions[::-1], seen[::-1]  # the last rows are the first tile


def check_visits(library, shape, start, end, keys, monotone, what, order=0):
    """Compare with the definition; returns what is said of gaps, tile by tile."""
    unions, seen = visited(library, shape, start, end, keys, monotone, order)
    for tile, (first, last, *_) in enumerate(unions):
        of_tile = slice(tile * shape[0], (tile + 1) * shape[0])
        key = np.arange(keys)
        sees = ((start[of_tile, None] <= key) & (key < end[of_tile, None])).any(0)
        some = np.flatnonzero(sees)
        assert (first, last) == ((some[0], some[-1] + 1) if some.size else (0, 0)), what
        beyond = first - (first - last) // shape[1] * shape[1]
        assert (seen[tile, :first] == -1).all(), what
        assert (seen[tile, last:beyond] == 0).all(), what
        assert (seen[tile, beyond:] == -1).all(), what
        np.testing.assert_array_equal(seen[tile, first:last], sees[first:last], what)
    return unions[:, 2:]


TILE_SHAPES = pytest.mark.parametrize("shape", [(192, 128), (128, 96), (128, 80), (64, 48)])


@TILE_SHAPES
@pytest.mark.parametrize("style", TILES_IN_ANY_ORDER)
def test_keys_that_a_tile_sees(library, shape, style):
    """Each key that a row of the tile sees, and no other; and doubt only where there are gaps."""
    rng = np.random.default_rng(len(style))
    for trial, rows in enumerate((1, 2, 63, 65, 191, 192, 193, 300, 400)):
        keys = int(rng.choice([1, 47, 128, 129, 400, 900])) if trial < 8 else 900
        ranges = ranges_of(style, rng, rows, keys)
        for monotone in (False, True) if style.endswith("rising") else (False,):
            what = f"{style}, {rows} rows, {keys} keys"
            gaps = check_visits(library, shape, *ranges, keys, monotone, what, trial % 3)
            if style == "neighbours overlap":
                assert (gaps[:, 0] >= gaps[:, 1]).all(), what  # no key need be asked about


@TILE_SHAPES
@pytest.mark.parametrize("falling", [False, True])
def test_a_gap_beside_the_edge_of_a_block(library, shape, falling):
    for at in range(shape[1] - 2, shape[1] + 2):
        for width in (1, 2):
            start, end = np.array([[5, 5 + at + width], [5 + at, 333]], np.int32)
            if falling:
                start, end = start[::-1].copy(), end[::-1].copy()
            for monotone in (False,) if falling else (False, True):
                check_visits(library, shape, start, end, 400, monotone, f"{at}, {width}")
