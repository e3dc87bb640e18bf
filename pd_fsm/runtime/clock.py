"""The local clock that every deadline, lease and trace is measured on."""

from __future__ import annotations

import time


def now_ms() -> float:
    """CLOCK_MONOTONIC in milliseconds. All processes of one host share it; across hosts it means nothing."""
    return time.monotonic_ns() / 1e6
