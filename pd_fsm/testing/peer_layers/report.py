"""`make peers-race`: search the released layers of others, print a table, and say whether what must be found was found.

The proof that the search finds bugs that engineers shipped: `EXPECTED` are defects of releases that their own tracker tells of,
each with its thread. The search knows nothing of that list; a release in which one of them is not found fails the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pd_fsm.testing.peer_layers import environments
from pd_fsm.testing.peer_layers.adapter import FAILED
from pd_fsm.testing.peer_layers.environments import SGLANG, Release
from pd_fsm.testing.peer_layers.pd_fsm_layer import PdFsmLayer
from pd_fsm.testing.peer_layers.search import (
    ABORT_FAILS,
    ABSORBING,
    CLEAR_IS_COMPLETE,
    NO_CALL_RAISES,
    NO_RETURN,
    PROPERTIES,
    REFUSED_STAYS,
    search,
)

LAYERS = ("fake/sender", "fake/receiver", "mooncake/sender", "mooncake/receiver")
SEARCH_S_MAX = 300
_TRACKER = "https://github.com/sgl-project/sglang/pull/"
EXPECTED = (
    ("0.5.11", "mooncake sender", NO_RETURN[FAILED], _TRACKER + "24539"),
    ("0.5.11", "fake sender", NO_CALL_RAISES, _TRACKER + "25599"),
    ("0.5.11", "fake receiver", ABORT_FAILS, _TRACKER + "25599"),
    ("0.5.11", "mooncake receiver", REFUSED_STAYS, _TRACKER + "24772"),
    ("0.5.11", "mooncake receiver", CLEAR_IS_COMPLETE, _TRACKER + "24601"),
    ("0.5.12", "mooncake receiver", CLEAR_IS_COMPLETE, _TRACKER + "24601"),
    ("0.5.13", "mooncake sender", ABSORBING, _TRACKER + "19205"),
)
"""(release, layer, property, public thread) of defects that must be found."""


def search_release(folder: Path, python: Path, release: Release) -> list[dict[str, Any]]:
    """Results of all layers of one release, from a process of its own. Raises RuntimeError with its last words when it fails."""
    source = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{environments.path_of(folder, release).resolve()}{os.pathsep}{source}"}
    command = [str(python), "-m", "pd_fsm.testing.peer_layers.child", *LAYERS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SEARCH_S_MAX, check=False)
    if done.returncode:
        raise RuntimeError(f"{release.package} {release.version} could not be searched:\n{done.stderr[-2_000:]}")
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


def rows_of(name: str, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each layer and property."""
    threads = {(release, layer, broken): thread for release, layer, broken, thread in EXPECTED}
    rows = []
    for result in results:
        found = {finding["property"]: finding for finding in result["findings"]}
        for broken in PROPERTIES:
            finding = found.get(broken)
            rows.append(
                {
                    "release": name,
                    "layer": result["layer"],
                    "property": broken,
                    "found": finding is not None,
                    "what": finding["what"] if finding else "",
                    "schedule": list(finding["schedule"]) if finding else [],
                    "thread": threads.get((name.rsplit(maxsplit=1)[-1], result["layer"], broken), ""),
                    "states": result["states"],
                }
            )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when everything in EXPECTED was found and pd-fsm's own layer breaks nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m pd_fsm.testing.peer_layers.report", description="Search the session layers of others."
    )
    parser.add_argument("--folder", type=Path, default=Path("out/peers"), help="environments (default %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("out/peers-race.json"), help="(default %(default)s)")
    args = parser.parse_args(argv)
    import attrs  # noqa: PLC0415 - only here

    python = environments.prepare(args.folder, SGLANG)
    rows: list[dict[str, Any]] = []
    for release in SGLANG:
        rows += rows_of(f"{release.package} {release.version}", search_release(args.folder, python, release))
    own = [attrs.asdict(search(PdFsmLayer(side))) for side in ("sender", "receiver")]
    rows += rows_of("pd-fsm", own)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(rows, indent=1) + "\n")
    _print(rows)
    missing = [wanted for wanted in EXPECTED if not _was_found(rows, *wanted[:3])]
    for version, layer, broken, thread in missing:
        print(f"NOT FOUND: {version}, {layer}: {broken} ({thread})")
    ours = [row for row in rows if row["release"] == "pd-fsm" and row["found"]]
    return 1 if missing or ours else 0


def _was_found(rows: Sequence[dict[str, Any]], release: str, layer: str, broken: str) -> bool:
    return any(r["found"] and r["release"].endswith(release) and (r["layer"], r["property"]) == (layer, broken) for r in rows)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    for release in dict.fromkeys(row["release"] for row in rows):
        for layer in dict.fromkeys(row["layer"] for row in rows if row["release"] == release):
            own = [row for row in rows if (row["release"], row["layer"]) == (release, layer)]
            found = [row for row in own if row["found"]]
            print(f"{release}, {layer}: {len(found)} of {len(own)} properties broken, {own[0]['states']} states")
            for row in found:
                thread = f" [{row['thread']}]" if row["thread"] else ""
                print(f"    {row['property']}: {row['what']}{thread}\n        {'; '.join(row['schedule'])}")


if __name__ == "__main__":
    sys.exit(main())
