"""Hypothesis profiles and what every test shares."""

import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, settings

sys.path.append(str(Path(__file__).parent / "unit"))  # helpers that several test files import

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]

# ci: what every change pays for; deep: a fuzz campaign by hand (SCFA_HYPOTHESIS=deep).
settings.register_profile(
    "ci", max_examples=25, deadline=None, suppress_health_check=_QUIET, derandomize=True
)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("SCFA_HYPOTHESIS", "ci"))
