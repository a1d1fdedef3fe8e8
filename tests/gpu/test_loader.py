"""The loader on a real card: launches are cheap, the disk cache is used, damage is survived."""

import logging
import struct
import time

import pytest

SOURCE, NAME = "plan_identity.cu", "scfa_plan_identity"


@pytest.fixture
def loader(torch):
    pytest.importorskip("cupy")
    from scfa_core.backends.cupy_raw import loader

    return loader


@pytest.fixture
def fresh(loader, tmp_path, monkeypatch):
    """An empty disk cache and no kernel in memory."""
    monkeypatch.setenv("SCFA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(loader, "_kernels", {})
    return tmp_path


def test_second_process_reads_the_disk(loader, fresh, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "scfa_core")
    loader.get_kernel(NAME, SOURCE, (), 0)
    assert "compiling plan_identity.cu" in caplog.text
    assert len(list(fresh.glob("*.cubin"))) == 1
    caplog.clear()
    monkeypatch.setattr(loader, "_kernels", {})
    loader.get_kernel(NAME, SOURCE, (), 0)
    assert "compiling" not in caplog.text


def test_a_launch_is_cheap(torch, loader, request):
    from scfa_core.backends.cupy_raw.planner import _RANGE_TAIL

    kernel = loader.get_kernel(NAME, SOURCE, (), 0)
    room = torch.zeros(6, 64, dtype=torch.int32, device="cuda")
    pointers = [room[i].data_ptr() for i in range(6)]
    params = bytes(32 * 40) + _RANGE_TAIL.pack(
        0, 1, *pointers, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0
    )
    stream = torch.cuda.current_stream().cuda_stream
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            kernel.launch((2, 1, 1), 256, 0, stream, params)
        best = min(best, (time.perf_counter() - start) / 100)
    torch.cuda.synchronize()
    request.node.user_properties.append(("time", ("launch, us", best * 1e6)))
    assert best < 20e-6
    assert room[1, 0] == 1  # q_count: one row


def test_a_refused_launch_leaves_the_process_usable(torch, loader):
    kernel = loader.get_kernel(NAME, SOURCE, (), 0)
    with pytest.raises(RuntimeError, match="while launching scfa_plan_identity"):
        kernel.launch((1, 1, 1), 5000, 0, 0, struct.pack("<1392x"))
    assert float(torch.ones(3, device="cuda").sum()) == 3.0
