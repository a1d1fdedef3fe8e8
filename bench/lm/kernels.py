"""Where a step's GPU time goes: kernels by time, from torch.profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 12
NAME = 60  # characters shown
_GROUPS = (  # the first whose word is in a kernel's name
    ("scfa", ("scfa_",)),
    ("dense attention", ("fmha", "flash", "cudnn", "sdpa")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "splitk")),
    ("compiled pointwise", ("triton_",)),
    ("memory", ("memcpy", "memset")),
    ("optimiser", ("multi_tensor", "adam")),
)


def group_of(name: str) -> str:
    """Which part of a step a kernel belongs to."""
    lower = name.lower()
    return next((group for group, words in _GROUPS if any(w in lower for w in words)), "other")


def profile_steps(step: Callable[[], Any], steps: int = 2) -> dict[str, Any]:
    """Run `steps` steps under the profiler.

    Returns
    -------
    facts : dict
        ``kernels``: (name, milliseconds a step, launches a step) by time; ``groups``: milliseconds
        a step by group; ``total``: of all.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = [
        (event.key, event.self_device_time_total / 1e3 / steps, event.count / steps)
        for event in record.key_averages()
        if event.device_type == DeviceType.CUDA
    ]
    kernels.sort(key=lambda kernel: -kernel[1])
    groups: dict[str, float] = {}
    for name, ms, _ in kernels:
        groups[group_of(name)] = groups.get(group_of(name), 0.0) + ms
    return {"kernels": kernels, "groups": groups, "total": sum(groups.values())}


def lines(facts: dict[str, Any]) -> list[str]:
    """The profile in words, to be printed."""
    words = ", ".join(
        f"{group} {ms:.2f}" for group, ms in sorted(facts["groups"].items(), key=lambda x: -x[1])
    )
    rows = [f"  GPU busy {facts['total']:.1f} ms a step: {words}"]
    for name, ms, count in facts["kernels"][:SHOWN]:
        rows.append(f"  {ms:8.3f} ms {count:6.0f} x  {name[:NAME]}")
    return rows
