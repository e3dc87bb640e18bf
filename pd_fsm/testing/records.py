"""All scenario files of a folder: replay them, run the runtime tests that they name, say how many hold, and list them in the docs.

    python -m pd_fsm.testing.records tests/scenarios            replay all; report in out/scenarios.json
    python -m pd_fsm.testing.records tests/scenarios --rewrite  bring the logged lines up to date; read the diff
    python -m pd_fsm.testing.records tests/scenarios --docs docs/records.md [--check]

A file is named after its record: `B009-late-registration.txt`; its first line is `# B009: what goes wrong`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs

from pd_fsm.testing.scenario import ScenarioError, run

RUNTIME_TESTS_S_MAX = 900


@attrs.frozen
class Record:
    """One scenario file, by its header."""

    path: Path
    name: str
    title: str
    thread: str
    invariants: tuple[int, ...]
    runtime: tuple[str, ...]
    border: str
    commands: int


def read(path: Path) -> Record:
    """The header of a scenario file. Raises ScenarioError when it lacks one."""
    lines = path.read_text().splitlines()
    head = re.match(r"# ([A-Z]\d+): (.+)", lines[0]) if lines else None
    if head is None or not path.name.startswith(head[1] + "-"):
        raise ScenarioError(f"{path.name}: the first line must be '# {path.name.split('-')[0]}: what goes wrong'")
    comments = [line[2:] for line in lines if line.startswith("# ")]
    invariants = [c for c in comments if c.startswith("invariants ")]
    return Record(
        path,
        head[1],
        head[2],
        next((c for c in comments if c.startswith("https://")), ""),
        tuple(sorted({int(n) for c in invariants for n in re.findall(r"\d+", c)})),
        tuple(c.removeprefix("runtime ") for c in comments if c.startswith("runtime ")),
        " ".join(c.removeprefix("border ") for c in comments if c.startswith("border ")),
        sum(1 for line in lines if line and not line.startswith(("#", " "))),
    )


def replay(records: Sequence[Record], *, rewrite: bool) -> dict[str, str]:
    """Failures by file name: of the replay on the core, and of the runtime tests that the files name."""
    failures: dict[str, str] = {}
    for record in records:
        try:
            run(record.path, rewrite=rewrite)
        except ScenarioError as error:
            failures[record.path.name] = str(error)
    nodes = sorted({node for record in records for node in record.runtime})
    failed = _failed_tests(nodes) if nodes else {}
    for record in records:
        bad = [f"{node}: {failed[node]}" for node in record.runtime if node in failed]
        if bad:
            failures[record.path.name] = "\n".join(filter(None, [failures.get(record.path.name), *bad]))
    return failures


def _failed_tests(nodes: list[str]) -> dict[str, str]:
    """Which of the pytest tests did not pass, and why. A name that no test has is a failure, too."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", *nodes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUNTIME_TESTS_S_MAX, check=False)
    passed = set(re.findall(r"^PASSED (\S+)", done.stdout, re.MULTILINE))
    failed = {}
    for node in nodes:
        runs = [name for name in passed if name == node or name.startswith(node + "[")]
        broken = re.findall(rf"^(?:FAILED|ERROR) {re.escape(node)}.*$", done.stdout, re.MULTILINE)
        if broken or not runs:
            failed[node] = broken[0] if broken else "did not run: " + (done.stdout + done.stderr).strip().splitlines()[-1]
    return failed


def table(records: Sequence[Record]) -> str:
    """The page that maps record, scenario and invariants."""
    lines = [
        "# Records",
        "",
        "Races and failures that real systems of this kind have had, each as a scenario that runs against the session layer.",
        "This page is generated from the files' headers by `make docs`; `make scenarios` replays them all.",
        "",
        "| record | what goes wrong | scenario | invariants | on the real runtime | outside of the layer |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        name = f"[{record.name}]({record.thread})" if record.thread else record.name
        scenario = f"[{record.path.name}](../{record.path.as_posix()})"
        runtime = "<br>".join(f"`{node}`" for node in record.runtime)
        invariants = ", ".join(map(str, record.invariants))
        lines.append(f"| {name} | {record.title} | {scenario} | {invariants} | {runtime} | {record.border} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything holds, 1 when something does not, 2 for a folder without scenarios."""
    parser = argparse.ArgumentParser(prog="python -m pd_fsm.testing.records", description="Replay scenario files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rewrite", action="store_true", help="bring the logged lines up to date instead of comparing them")
    parser.add_argument("--docs", type=Path, help="write the table of records instead of replaying")
    parser.add_argument("--check", action="store_true", help="with --docs: fail when the table is stale instead of writing it")
    parser.add_argument("--report", type=Path, default=Path("out/scenarios.json"))
    args = parser.parse_args(argv)
    paths = sorted(args.folder.glob("*.txt"))
    if not paths:
        print(f"no scenarios in {args.folder}", file=sys.stderr)
        return 2
    try:
        records = [read(path) for path in paths]
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return 1
    if args.docs:
        return _docs(args.docs, table(records), check=args.check)
    failures = replay(records, rewrite=args.rewrite)
    for name, why in failures.items():
        print(f"FAIL {name}\n{why}\n")
    names = {record.name for record in records}  # a record may have several scenarios
    failed = {record.name for record in records if record.path.name in failures}
    report = {
        "records": len(names),
        "passed": len(names - failed),
        "failed": len(failed),
        "scenarios": len(records),
        "failures": failures,
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=2) + "\n")
    runtime = len({node for record in records for node in record.runtime})
    print(
        f"{len(names)} records in {len(records)} scenarios, which name {runtime} runtime tests: "
        f"{len(names - failed)} records passed, {len(failed)} failed"
    )
    return 1 if failures else 0


def _docs(path: Path, text: str, *, check: bool) -> int:
    if not check:
        path.write_text(text)
    elif not path.exists() or path.read_text() != text:
        print(f"{path} is stale; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
