"""The verbs of backends as torch's calls run them, whichever way these take."""

import pytest


@pytest.fixture
def runs(monkeypatch):
    """Names of the verbs, in order."""
    from scfa_core import torch_bridge, torch_ops, torch_union_ops

    seen = []
    for module in (torch_bridge, torch_ops, torch_union_ops):
        for verb in ("run_forward", "run_backward"):
            plain = getattr(module, verb)

            def run(*arguments, plain=plain, verb=verb):
                seen.append(verb.removeprefix("run_"))
                return plain(*arguments)

            monkeypatch.setattr(module, verb, run)
    return seen
