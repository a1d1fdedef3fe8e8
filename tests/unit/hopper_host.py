"""The Hopper kernels of a case, compiled as host C++ and run as launch_sm90.py would.

wgmma_on_host.hpp plays what only the card has: barriers, copies, products from descriptors. All
else is the shipped source: gathers, swizzle, zeros beyond the rows, masks, softmax, stores.
memory_on_host.hpp follows which accesses to shared memory barriers and proxy fences order: a kernel
that leaves two without order fails, however its threads took turns.
"""

import ctypes
import re
import struct

import host_build
import numpy as np
import pytest
from once import shared_folder
from scfa_core.backends.cupy_raw import launch_sm90, nvrtc, shapes_sm90
from scfa_core.backends.cupy_raw.tensor_maps import NO_MAPS

import scfa_core as scfa
from scfa_core import testing
from scfa_core.arrays import DeviceArray
from scfa_core.plan import PlanArrays
from scfa_core.problem import Problem
from scfa_core.testing import Part, Results

PLAYED_BY = ("cuda_on_host.hpp", "ptx_on_host.hpp", "wgmma_on_host.hpp")
PLAYED = (  # functions of the shipped headers that the host has its own of
    *("copy_chunk", "copy_word", "exp2_fast", "log2_fast", "pack_pair", "unpack_pair"),
    *("wgmma_fence", "wgmma_commit", "wgmma_wait", "pin", "wgmma_shared", "wgmma_issue"),
    *("wgmma_registers", "load_acquire", "store_release", "wait_until", "global_proxy_fence"),
    *("count_release",),
    *("start_sum", "wait_until_read", "wait_until_added", "fetch_sum", "shared_store_four"),
    *("load_sum_four", "row_address", "shared_address", "barrier_init", "barrier_init_done"),
    *("barrier_arrive", "barrier_try_wait", "named_barrier_sync", "named_barrier_arrive"),
    *("named_barrier_any", "give_registers", "take_registers", "uniform", "shared_load"),
    *("shared_store", "shared_load_pair", "shared_load_words", "copy_run"),
)
INSTRUCTIONS = {  # of the functions that are left, as the host plays them
    "fence.proxy.async.shared::cta;": "memory::proxy_fence();",
    "cp.async.wait_all;": "wait_for_copies();",
    "trap;": "std::abort();",
    "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];": "arrive_when_copied(barrier);",
}
DRIVER = """
extern "C" int run(const Params* p, int blocks, int threads, int shared_bytes, int order) {
  std::vector<char> shared(shared_bytes + 1024);
  dynamic_shared = (char*)(((size_t)shared.data() + 1023) / 1024 * 1024);
  memory::faults = host::stuck_blocks = 0;
  host::counts_stuck_blocks = true;
  READS_IN_VAIN
  gridDim = {(unsigned)blocks, 1, 1};
  blockDim = {(unsigned)threads, 1, 1};
  for (int x = 0; x < blocks && !host::stuck_blocks; ++x) {
    for (size_t i = 0; i < shared.size(); ++i) shared[i] = i % 2 ? 0x7f : 0xff;  // NaN
    host::start_block(threads, shared_bytes);
    blockIdx = {(unsigned)x, 0, 0};
    host::body = [&] { KERNEL(*p); };
    host::run_block(threads, order);
    host::end_block();
  }
  host::end_grid();
  return host::stuck_blocks ? -1 : memory::faults;
}
"""
# The first step of a tile multiplies dS of the tile before, or of nothing, and forgets the product.
READS_IN_VAIN = {
    "bwd_fused128_sm90": "memory::in_vain = kChangeBase, memory::in_vain_end = kSumBase;"
}
TYPES = """
typedef unsigned short u16;
typedef unsigned int u32;
constexpr bool kIsBf16 = SCFA_BFLOAT16;
constexpr bool kIsTf32 = false;
constexpr int kElementBytes = 2;
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const unsigned long long* values = host::exchange_all(value);
  for (int lane = 0; lane < 32; ++lane) value |= (unsigned)values[lane];
  return value;
}
"""


def without_function(text, name):
    """Cut every definition of a function, with its template line."""
    head = rf"(?:template <[^{{}};]*?>\n)?__device__ __forceinline__ [\w ]+ {name}\("
    while found := re.search(head, text):
        end = text.index("{", found.end()) + 1
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: found.start()] + text[end:]
    return text


def for_the_host(name, text):
    """A shipped source with the instructions of the card taken out."""
    dynamic = r"extern __shared__ (__align__\(\d+\) )?char dynamic\[\]"
    text = re.sub(dynamic, "char* dynamic = dynamic_shared", text)
    for function in PLAYED:
        text = without_function(text, function)
    for instruction, played in INSTRUCTIONS.items():
        text = re.sub(rf'asm volatile\("{re.escape(instruction)}"[^;]*;', played, text)
    text = re.sub(r'asm volatile\("(prefetch|" : "\+[lr]")[^;]*(;"[^;]*)?;', "", text)
    fragment = r'asm volatile\("ldmatrix.*?: "=r"\((.*?)\)\s*: "r"\(address\)\s*: "memory"\);'
    registers = r"load_matrices_of(\1, address);"
    text = re.sub(fragment, registers, text, flags=re.S)
    text = re.sub(r'\), "=r"\(|\),\s+"=r"\(', ", ", text)
    fragment = r'asm volatile\("stmatrix.*?: ?"r"\(address\),\s*(.*?)\s*: "memory"\);'
    text = re.sub(fragment, r"store_matrices(address, \1);", text, flags=re.S)
    text = re.sub(r'"r"\((a\[4 \* step[^)]*\])\)', r"\1", text)
    assert "asm volatile" not in re.sub(r"^#define.*?[^\\]$", "", text, flags=re.S | re.M), name
    return text


# What locates tiles and finds out which keys they see.
TILE_HEADERS = ("products_sm90.cuh", "params_sm90.cuh", "gather_sm90.cuh", "tiles_sm90.cuh")


def source_of(headers, driver):
    """Text of a source that has the played headers, then the shipped ones, then `driver`."""
    return "\n".join([*(f'#include "{header}"' for header in (*PLAYED_BY, *headers)), driver])


class Kernels(host_build.HostCompiler):
    """What the shipped sources of Hopper are on the host."""

    def __init__(self, folder):
        sources = {"types.cuh": TYPES}
        for name, text in nvrtc.read_sources().items():
            if re.search("sm90|wgmma|mbarrier", name):
                sources[name] = for_the_host(name, text)
        super().__init__(folder, sources)

    def kernel(self, name, dtype, head_dim, shape, monotone=True, mapped=True,
               sanitize=False, fences=True):  # fmt: skip
        """Promise of the function that runs a kernel."""
        constants = (("BFLOAT16", int(dtype == "bfloat16")),)
        if name == "bwd_choose_sm90":
            constants += overheard_constants("_choose_kernel", head_dim, monotone)
        elif shape is not None:
            of_kernel = (dtype, head_dim, shape, monotone, mapped)
            constants = overheard_constants("_kernel", *of_kernel, name=name)
        driver = DRIVER.replace("KERNEL", f"scfa_{name}")
        driver = driver.replace("READS_IN_VAIN", READS_IN_VAIN.get(name, ""))
        source = source_of((f"{name}.cu",), driver)
        build = ("SANITIZE", int(sanitize)), ("PROXY_FENCE", int(fences))
        return self.start(source, (*constants, *build))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    kernels = Kernels(shared_folder(tmp_path_factory))
    yield kernels
    kernels.close()


def overheard_constants(maker, *arguments, name=None):
    """What a function of launch_sm90 asks the loader for; `name`: of its kernels, where several."""
    asked = []
    which = (0,) if name is None else (name, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            launch_sm90, "get_kernel", lambda *request, arch_suffix: asked.append(request)
        )
        getattr(launch_sm90, maker).__wrapped__(*which, *arguments)
    return asked[0][2]


def described(x, dtype):
    strides = tuple(stride // x.itemsize for stride in x.strides)
    return DeviceArray(x.ctypes.data, x.shape, strides, dtype, 0)


def maps_of(*arrays):
    """Tensor maps as wgmma_on_host.hpp reads them."""
    maps = [
        struct.pack("<8Q", x.ctypes.data, *reversed(x.shape), *reversed(x.strides[:3]))
        for x in arrays
    ]
    return b"".join(one.ljust(len(NO_MAPS) // 2, b"\0") for one in maps)


def passes(spec, fused, monotone=True):
    """Kernels of one call: name, shape, tiles of one head and of all, heads, blocks, threads.

    `blocks` is None where any number will do.
    """
    per_query, per_key = (spec.seqlen_q, spec.heads), (spec.seqlen_k, spec.heads_kv)
    head_dim = spec.head_dim
    backward = (
        ("bwd_prepare_sm90", shapes_sm90.FUSED, *per_key),
        (shapes_sm90.FUSED_KERNELS.get(head_dim), shapes_sm90.FUSED, *per_key),
    )
    if not fused:
        backward = (
            ("bwd_dq_sm90", shapes_sm90.DQ, *per_query),
            ("bwd_dkdv_sm90", shapes_sm90.DKDV, *per_key),
        )
    if not monotone and not fused:
        lists = spec.batch * spec.heads
        yield "bwd_envelope_sm90", None, (1, lists), spec.heads, 2 * lists, 1024
    for kernel, shapes, rows, heads in (("fwd_sm90", shapes_sm90.FORWARD, *per_query), *backward):
        shape = shapes_sm90.shape_of(shapes, head_dim, monotone)
        tiles = shapes_sm90.tiles_of(rows, 64 * shape.warpgroups, spec.batch * heads)
        if kernel == "bwd_prepare_sm90":
            yield kernel, shapes_sm90.PREPARE[head_dim], tiles, heads, None, 256
        else:
            yield kernel, shape, tiles, heads, None, shapes_sm90.threads_of(kernel, shape)


def run(
    kernels,
    case,
    order=0,
    blocks=1,
    fused=False,
    slots=None,
    sanitize=False,
    any_order=False,
    fences=True,
    mapped=True,
    in_turn=0,
    ways=None,
    watch=None,
):
    """Results of one case; `slots` query heads have room for sums of dq, all by default.

    With `any_order` the kernels are not told of ranges that are in order; without `fences` their
    products look at copied rows through no proxy fence; unless `mapped` they have no tensor maps.
    With `in_turn` the fused kernel takes tiles of 2**in_turn heads in turn, if ranges are short.
    `ways` are those of the key heads, 0 split and 1 fused; without them all go the fused way or
    none does. With `watch` the kernels are not told of ranges that are in order, and the shipped
    one chooses the ways; watch(kernel, ways, gradients) is called after each.
    """
    spec = case.spec
    problem = Problem(
        *(spec.batch, spec.heads, spec.heads_kv, spec.seqlen_q, spec.seqlen_k),
        *(spec.head_dim, spec.head_dim_v, spec.dtype, "cpu", case.softmax_scale),
    )
    like = [np.zeros(x.shape, np.float32) for x in (case.q, case.k)]
    made = scfa.make_plan(case.pattern, *like, backend="reference")
    monotone = made.monotone and not any_order and watch is None
    lists = [made.q_index, made.q_count, made.k_index, made.k_count, made.key_start, made.key_end]
    lists = [np.ascontiguousarray(x) for x in lists]
    plan = PlanArrays.of([*(described(x, "int32") for x in lists), None], monotone)
    q, k, v, dout = (host_build.aligned_copy(x) for x in (case.q, case.k, case.v, case.dout))
    lse = np.full(q.shape[:3], np.nan, np.float32)
    out, dq, dk, dv = (host_build.aligned_copy(np.full_like(x, 0x7FFF)) for x in (dout, q, k, v))
    arrays = tuple(described(x, spec.dtype) for x in (q, k, v, out, dout, dq, dk, dv))
    statistics = np.full(2 * lse.size + 1, np.nan, np.float32)
    at = statistics.ctypes.data + 4
    slots = slots or spec.batch * spec.heads
    query_tiles = shapes_sm90.tiles_of(spec.seqlen_q, 64, 1)[0]
    added = np.full(spec.batch * spec.heads * query_tiles, -1, np.int32)
    sum_of_dq = np.full((slots, query_tiles, 64, spec.head_dim), np.nan, np.float32)
    sums = launch_sm90.Sums(sum_of_dq.ctypes.data, added.ctypes.data, slots, query_tiles)
    envelopes = np.full((2, lse.size), -7, np.int32)
    envelopes_at = (envelopes[0].ctypes.data, envelopes[1].ctypes.data)
    key_tiles = spec.batch * spec.heads_kv * -(-spec.seqlen_k // 128)
    records = np.full(key_tiles * launch_sm90._record_words(problem), -7, np.int32)
    launches = list(passes(spec, fused, monotone))
    if ways is not None or watch is not None:
        launches = [*passes(spec, False, monotone), *list(passes(spec, True, monotone))[1:]]
    # choice_sm90.cuh: some heads go either way
    words = np.array([2, 2, 0, 0, 0, 0, 0, 0, *(ways or ())], np.int32)
    counters = {}  # those among these words
    if watch is not None:
        key_heads = spec.batch * spec.heads_kv
        key_tiles_of = shapes_sm90.tiles_of(spec.seqlen_k, 128, key_heads)
        chooses = (None, key_tiles_of, spec.heads_kv, -(-key_heads // 4), 32)
        launches.insert(1, ("bwd_choose_sm90", *chooses))
        # nothing is known before it is found out
        words = np.full(8 + key_heads + 2 * spec.batch * spec.heads, -7, np.int32)
        counted = {"bwd_dq_sm90": 2, "bwd_dkdv_sm90": 3}
        counters = {x: words[counted.get(x, 4) :] for x, *_ in launches[3:]}
    choice = 0 if ways is None and watch is None else words.ctypes.data
    how = {"mapped": mapped, "sanitize": sanitize, "fences": fences}
    compiled = [  # all begin to compile before the first one runs
        kernels.kernel(kernel, spec.dtype, spec.head_dim, shape, monotone, **how)
        for kernel, shape, *_ in launches
    ]
    for_turns = 0  # the word after the counter, from the kernel that prepares on
    for (kernel, shape, tiles, heads, least, threads), function in zip(
        launches, compiled, strict=True
    ):
        counter = counters.get(kernel, np.array([0, for_turns], np.int32))
        params = launch_sm90._params(
            *(problem, plan, arrays, described(lse, "float32")),
            *((at, at + 4 * lse.size), counter.ctypes.data, tiles, heads, sums),
            *(choice, envelopes_at),
            records.ctypes.data,
            maps_of(*((k, v) if kernel == "fwd_sm90" else (q, dout))),
            launch_sm90._in_turn(spec.batch * spec.heads) if kernel == "fwd_sm90" else in_turn,
        )
        shared = 0 if shape is None else shapes_sm90.SHARED[kernel](spec.head_dim, shape)
        # As in a kernel's arguments: struct Params holds what is aligned to 64 bytes.
        held = host_build.aligned_copy(np.frombuffer(params, np.uint8), 64)
        at_params = ctypes.c_void_p(held.ctypes.data)
        number = least or blocks + (kernel == "bwd_prepare_sm90")  # which needs two
        faults = function.result()(at_params, number, threads, shared, order)
        assert faults >= 0, f"{kernel}: every thread waits for another"
        assert not faults, f"{kernel}: {faults} unordered accesses to memory, see stderr"
        for_turns = counter[1]
        if watch is not None:
            watch(kernel, words[8 : 8 + spec.batch * spec.heads_kv].tolist(), (dq, dk, dv))
    wide = (testing.widen(x, spec.dtype) for x in (out, dq, dk, dv))
    out, dq, dk, dv = wide
    return Results(out, lse, dq, dk, dv)


def check(kernels, spec, **how):
    check_case(kernels, testing.build(spec), **how)


def check_case(kernels, case, **how):
    got = run(kernels, case, **how)
    bad = [verdict for verdict in testing.judge(case, got) if not verdict.ok]
    assert not bad, f"{case.spec}: {bad}"


HASH = (Part("hash", "uniform", 2),)
WINDOW = (Part("window", number=70),)
IN_ONE_PASS = {
    "hash": HASH,
    "all together": (*HASH, Part("keep", "uniform", 80), Part("window", number=90)),
    "window": WINDOW,
    "keep none": (Part("keep", "none"),),
}
