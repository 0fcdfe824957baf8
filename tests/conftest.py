"""What no test may depend on: a busy machine, and the tests that ran before it."""

import sys

import pytest
from hypothesis import HealthCheck, settings

# An example's 200 ms are soon over where another process has the core.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Which files share a process, and so what they draw before, is by chance."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
