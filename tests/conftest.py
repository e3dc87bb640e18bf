"""Fixtures that several test modules share."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.needs import lacking
from tests.pair import Pair, met


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
