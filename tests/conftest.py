"""Fixtures that several test modules share."""

from __future__ import annotations

import pytest

from tests.pair import Pair, met


@pytest.fixture
def pair() -> Pair:
    """A prefill and a decode core that have met; a module that needs another beginning defines its own."""
    return met()
