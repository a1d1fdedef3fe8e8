"""What one rank alone refuses is raised on both, and both go on afterwards."""

import os
import re
import sys

import pytest
from once import made_once
from ranks import run_ranks

torch = pytest.importorskip("torch", reason="distributed attention needs torch")
if not torch.distributed.is_available():
    pytest.skip("this torch has no distributed package", allow_module_level=True)

import torch.distributed as dist  # noqa: E402
from sharded import SEQLEN, draw, patterns  # noqa: E402

import scfa_core as scfa  # noqa: E402
from scfa_core import distributed  # noqa: E402

RANKS, WRONG = 2, 1  # the second rank errs
ULYSSES, GATHERED = distributed.ulysses_attention, distributed.gathered_attention


def fail(q, k):
    raise KeyError("no such table")


def short(x):
    return x[:, :, 1:]


HASH = patterns()["hash"]
TOO_SHORT = scfa.HashSparse(HASH.q_hash[..., 1:], HASH.k_hash[..., 1:])
ROWS = torch.arange(SEQLEN)
# name: function, what the wrong rank gives, the error and what is said on both ranks
MISTAKES = {
    "shorter": (
        lambda q, k, v: (short(q), short(k), short(v)),
        HASH,
        {},
        scfa.ShapeError,
        r"equal shares, got q \(2, 4, 12, 16\) float64, .* on rank 0 and q \(2, 4, 11, 16\) float6"
        r"4, k \(2, 2, 11, 16\) float64, .* on rank 1; fill the sequence up to a multiple",
    ),
    "shorter keys": (
        lambda q, k, v: (q, short(k), short(v)),
        HASH,
        {},
        scfa.ShapeError,
        r"k \(2, 2, 12, 16\).* on rank 0 and .*k \(2, 2, 11, 16\).* on rank 1",
    ),
    "another dtype": (
        lambda q, k, v: (q.float(), k.float(), v.float()),
        HASH,
        {},
        scfa.ShapeError,
        r"float64 on rank 0 and q \(2, 4, 12, 16\) float32",
    ),
    "another device": (
        lambda q, k, v: (q.to("meta"), k.to("meta"), v.to("meta")),
        HASH,
        {},
        scfa.ShapeError,
        r"float64 on rank 0 and q \(2, 4, 12, 16\) float64 on meta",
    ),
    "a dtype of no name": (
        lambda q, k, v: (q + 0j, k + 0j, v + 0j),
        HASH,
        {},
        scfa.ShapeError,
        r"float64 on rank 0 and q \(2, 4, 12, 16\) another dtype",
    ),
    "a gradient": (
        lambda q, k, v: (q, k.requires_grad_(), v),
        HASH,
        {},
        scfa.ShapeError,
        r"k \(2, 2, 12, 16\) float64, v .* on rank 0 and .* k \(2, 2, 12, 16\) float64, grad, v",
    ),
    "axes": (
        lambda q, k, v: (q[0], k, v),
        HASH,
        {},
        scfa.ShapeError,
        "q must have 4 axes",
    ),
    "array": (
        lambda q, k, v: (q.numpy(), k, v),
        HASH,
        {},
        scfa.DTypeError,
        "q must be a torch tensor",
    ),
    "pattern of a share": (lambda *x: x, TOO_SHORT, {}, scfa.ShapeError, r"2[34]\b.* got .*23\)"),
    "no pattern": (lambda *x: x, 3, {}, scfa.PatternError, "got int"),
    "option": (lambda *x: x, HASH, {"layout": "bthd"}, scfa.OptionError, "it has no layout"),
    "scale": (lambda *x: x, HASH, {"softmax_scale": "a"}, scfa.ScaleError, "finite number"),
}
CASES = {
    (name, attend.__name__): (attend, *mistake)
    for name, mistake in MISTAKES.items()
    for attend in (ULYSSES, GATHERED)
}
CASES["function", "ulysses_attention"] = (ULYSSES, lambda *x: x, fail, {}, KeyError, "no such tab")
CASES["forgot", "ulysses_attention"] = (
    ULYSSES,
    lambda *x: x,
    lambda q, k: None,
    {},
    scfa.PatternError,
    "function must return .* got NoneType",
)
CASES["rows", "gathered_attention"] = (
    GATHERED,
    lambda *x: x,
    HASH,
    {"rows": ROWS[:5]},
    scfa.ShapeError,
    "rows must name the 12 rows of q, got 5",
)


CASES["rows of one rank", "gathered_attention"] = (
    GATHERED,
    lambda *x: x,
    HASH,
    {"rows": ROWS[12:]},
    scfa.ShapeError,
    r"float64, no rows on rank 0 and .*, rows \(12,\) int64 on rank 1",
)


def work(rank, folder):
    """One process: every case, and what came of it; a right call after each."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    q, k, v = (x.chunk(RANKS, 2)[rank] for x in draw()[:3])
    found = {}
    for name, (attend, change, pattern, options, *_) in CASES.items():
        q, k, v = (x.detach() for x in (q, k, v))
        mine = change(q, k, v) if rank == WRONG else (q, k, v)
        options = options if rank == WRONG else {}
        if name[0] == "rows" and rank != WRONG:
            options = {"rows": ROWS.chunk(RANKS)[rank]}
        try:
            attend(*mine, pattern if rank == WRONG else HASH, **options)
        except Exception as error:
            found[name] = type(error).__name__, str(error)
        found[name, "next"] = attend(*(x.detach() for x in (q, k, v)), HASH)
    others = dist.new_group([0])
    if rank == WRONG:
        try:
            GATHERED(q, k, v, HASH, group=others)
        except scfa.OptionError as error:
            found["stranger"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["OFF", "INFO"])
def found(tmp_path_factory, request):
    """What each rank got, as a user has it and as one who looks for a mistake."""

    def run(folder):
        run_ranks(__file__, RANKS, folder, timeout=120, TORCH_DISTRIBUTED_DEBUG=request.param)
        return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]

    return made_once(tmp_path_factory, f"mistakes_{request.param}", run)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES, ids=" ".join)
def test_all_ranks_raise_what_one_refuses(found, name):
    *_, error, words = CASES[name]
    for rank, of_rank in enumerate(found):
        kind, text = of_rank[name]
        if issubclass(error, scfa.ScfaError) or rank == WRONG:
            assert kind == error.__name__
        else:
            assert kind == "ScfaError"
            assert error.__name__ in text
        assert re.search(words, text)
        if "equal shares" not in text and rank != WRONG:
            assert text.startswith("rank 1 of 2 cannot go on, and so none can: ")
        torch.testing.assert_close(
            of_rank[name, "next"],
            scfa.attention(*draw()[:3], HASH).chunk(RANKS, 2)[rank],
            rtol=0,
            atol=1e-13,
        )


@pytest.mark.slow
def test_a_group_of_others(found):
    assert found[WRONG]["stranger"].startswith("rank 1 is not in the group")


def test_gpus_are_not_waited_for(monkeypatch):
    """Ranks on GPUs tell each other only where torch debugs distributed work."""
    from scfa_core.distributed_agreement import is_checked

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)

    class OnGpu:
        device = torch.device("cuda:0")

    for backend, level, host, gpu in (
        ("nccl", dist.DebugLevel.OFF, False, False),
        ("cpu:gloo,cuda:nccl", dist.DebugLevel.OFF, True, False),
        ("undefined", dist.DebugLevel.OFF, True, False),
        ("gloo", dist.DebugLevel.OFF, True, True),
        ("nccl", dist.DebugLevel.INFO, True, True),
        ("nccl", dist.DebugLevel.DETAIL, True, True),
    ):
        monkeypatch.setattr(dist, "get_backend", lambda group, b=backend: b)
        monkeypatch.setattr(dist, "get_debug_level", lambda x=level: x)
        assert is_checked(torch.zeros(1), None) is host
        assert is_checked(OnGpu(), None) is gpu


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2])
    os._exit(0)  # a thread of gloo that wants the GIL while Python finalizes aborts the process
