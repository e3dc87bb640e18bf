"""Searches the layers of the release whose environment this process runs in, and prints what it found as one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
import warnings

import attrs


def main(layers: list[str]) -> int:
    """`layers` are BACKEND/SIDE, for example mooncake/sender."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    from pd_fsm.testing.peer_layers.search import search  # noqa: PLC0415 - after the logs of what it imports were silenced
    from pd_fsm.testing.peer_layers.sglang import SglangLayer  # noqa: PLC0415

    results = [attrs.asdict(search(SglangLayer(*layer.split("/")))) for layer in layers]
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
