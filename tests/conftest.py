"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, settings

from tests.needs import lacking
from tests.pair import Pair, met

_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("dev", max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=_SLOW)
settings.register_profile("ci", settings.get_profile("dev"), max_examples=150, derandomize=True, print_blob=True)
settings.register_profile("nightly", settings.get_profile("dev"), max_examples=5_000, stateful_step_count=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture
def pair() -> Pair:
    """A prefill and a decode core that have met; a module that needs another beginning defines its own."""
    return met()


@pytest.fixture
def nixl_library() -> None:
    """For tests over the real library."""
    if find_spec("nixl") is None:
        lacking("NIXL, which `make setup-transports` installs")


@pytest.fixture
def mooncake_library() -> None:
    """For tests over the real library."""
    if find_spec("mooncake") is None:
        lacking("Mooncake, which `make setup-transports` installs")
