"""The pytest plugin of the conformance kit: which transport is tested, which tests apply to it, and what it says about the rest.

A test that does not apply is not collected, and the terminal summary says why; nothing is skipped silently. Without
`--pd-fsm-transport` the plugin does nothing.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pd_fsm.errors import PdError
from pd_fsm.testing.conformance.target import PORT, Capabilities, Target, parse_options, resolve

FOLDER = Path(__file__).parent
TARGET = pytest.StashKey[Target]()
CAPABILITIES = pytest.StashKey[Capabilities]()
_NOT_APPLICABLE = pytest.StashKey["Counter[str]"]()

NEEDS: dict[str, tuple[str, Callable[[Capabilities], bool]]] = {
    "peer": ("it plays the other side itself (reach 'itself')", lambda can: can.reach != "itself"),
    "processes": ("its sessions must be in one process (reach 'process')", lambda can: can.reach not in ("itself", "process")),
    "vouches": ("its revoke() returns False: nobody promises that nothing lands afterwards", lambda can: can.vouches),
    "descriptor": ("its descriptor is empty: a writer needs to know nothing", lambda can: can.described),
    "fixed_port": (
        f'none of its options is "{PORT}": no session can be found at the address of another',
        lambda can: can.fixed_port,
    ),
}
"""What a test may need (`pytest.mark.pd_fsm_needs(...)`), and why it does not apply to a transport without it."""
TWO_PROCESSES = "one session a process (--pd-fsm-two-processes)"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pd-fsm", "conformance of a pd-fsm transport")
    group.addoption(
        "--pd-fsm-transport", metavar="MODULE:FACTORY", help="the transport under test, or the name of an installed one"
    )
    group.addoption(
        "--pd-fsm-transport-options",
        metavar="JSON",
        default="{}",
        help=f'its options; "{{directory}}" stands for an empty folder, "{PORT}" for the prefill session\'s port',
    )
    group.addoption(
        "--pd-fsm-two-processes",
        action="store_true",
        help="the library cannot have both roles in one process: run only the tests that give each role its own",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"pd_fsm_needs(*names): what the transport under test must be able to do: {', '.join(NEEDS)}"
    )
    named = config.getoption("--pd-fsm-transport")
    if named is None:
        return
    try:
        config.stash[TARGET] = Target(resolve(named), parse_options(config.getoption("--pd-fsm-transport-options")))
    except PdError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    if TARGET not in config.stash:
        return []
    return [f"pd-fsm transport under test: {config.getoption('--pd-fsm-transport')}"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if FOLDER in item.path.parents]
    if not ours:
        return
    if TARGET not in config.stash:
        raise pytest.UsageError("the conformance kit tests one transport: give --pd-fsm-transport=module:factory")
    try:
        with tempfile.TemporaryDirectory() as folder:
            can = config.stash[TARGET].probe(Path(folder))
    except Exception as error:
        named = config.getoption("--pd-fsm-transport")
        raise pytest.UsageError(f"transport {named} cannot be made on loopback with host memory: {error!r}") from error
    config.stash[CAPABILITIES] = can
    reasons = {item: lack(item, can, config.getoption("--pd-fsm-two-processes")) for item in ours}
    left_out = [item for item in ours if reasons[item]]
    if left_out:
        config.stash[_NOT_APPLICABLE] = Counter(reasons[item] for item in left_out)
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not reasons.get(item)]


def lack(item: pytest.Item, can: Capabilities, two_processes: bool) -> str:
    """Why a test does not apply, "" when it does."""
    needs = [name for mark in item.iter_markers("pd_fsm_needs") for name in mark.args]
    for name in needs:
        reason, has = NEEDS[name]
        if not has(can):
            return reason
    return TWO_PROCESSES if two_processes and "peer" in needs and "processes" not in needs else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in summary(config):
        terminalreporter.write_line(line)


def summary(config: pytest.Config) -> Iterator[str]:
    if CAPABILITIES not in config.stash:
        return
    can = config.stash[CAPABILITIES]
    yield (
        f"pd-fsm transport: reach {can.reach!r}, notifies {can.notifies}, revoke vouches {can.vouches}, "
        f"residual {can.residual_ms:g} ms, descriptor {can.described}"
    )
    for reason, count in config.stash.get(_NOT_APPLICABLE, Counter()).items():
        yield f"not applicable: {count} tests: {reason}"
