"""The main job on real text: a small byte-level language model, once per kind of attention.

``scfa demo`` runs it. `run`, `model` and `training` need torch; `require_torch` says so.
"""

from __future__ import annotations

import importlib.util

from scfa_core.errors import ScfaError


def require_torch() -> None:
    """Raise with the cure if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise ScfaError(
            "the demo trains with torch, which is not installed; pip install 'scfa-core[torch]'"
        )
