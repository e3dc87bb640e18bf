"""What a test needs of its machine. Continuous integration has it all: there, a lack fails instead of being skipped."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip the test, saying what the machine lacks; with CI set in the environment, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"continuous integration must have it: {what}")
    pytest.skip(what)
