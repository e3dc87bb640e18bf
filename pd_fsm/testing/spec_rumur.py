"""Runs the specification through `rumur`, the model checker: Murphi to C, C to a program, the program's output to values.

`rumur` (Debian and Ubuntu: `apt install rumur`) writes a C program that visits every state of a model; a C compiler turns it into
something that runs. Two small additions to that program, at its one place that meets every step, print what it does not print by
itself: which rules ever fired, and, when asked, every state and every step. This module knows nothing about what the model says.
"""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import attrs

from pd_fsm.errors import ConfigError

_INSERT = "static bool set_insert(struct state *NONNULL s, size_t *NONNULL count) {\n"
_INSERTED = "      /* Success */\n"
_NOTE_RULE = """
static bool rule_seen[1 << 16];
static long first_states;
static long first_state = -1;
"""
_NOTE_RULE_CALL = """
  if (state_previous_get(s) == NULL && first_state >= 0 && first_states++ != first_state) {
    return false;
  }
  if (state_previous_get(s) != NULL && !rule_seen[state_rule_taken_get(s) & 0xffff]) {
    rule_seen[state_rule_taken_get(s) & 0xffff] = true;
    put("F ");
    print_transition(s);
  }
"""
_DUMP = """
static void put_state(const struct state *s) {
  for (size_t i = 0; i < sizeof(s->data); i++) {
    static const char digits[] = "0123456789abcdef";
    const char pair[] = {digits[s->data[i] >> 4], digits[s->data[i] & 15], 0};
    put(pair);
  }
}
"""
_DUMP_STEP = """
  if (state_previous_get(s) != NULL) {
    put("E ");
    put_state(state_previous_get(s));
    put(" ");
    put_state(s);
    put(" ");
    print_transition(s);
  }
"""
_DUMP_STATE = """
      put("S ");
      put_state(s);
      put("\\n");
      state_print(NULL, s);
      put("\\n.\\n");
"""
_RULE = re.compile(r'Rule "([^"]*)"')
_MAIN = "int main(void) {\n"
_MAIN_FIRST = "int main(int argc, char **argv) {\n  if (argc > 1) {\n    first_state = strtol(argv[1], NULL, 10);\n  }\n"
_BROKEN = re.compile(r'error trace for the error:\n\n\t(.*)|\t(liveness property ".*" violated)|\t(cover ".*" not hit)')
_COUNTED = re.compile(r"(\d+) states, (\d+) rules fired")


@attrs.frozen
class Watch:
    """Tell the values of `show` in each state in which all variables of `when` are 0; all are numbers from 0 on."""

    when: tuple[str, ...]
    show: tuple[str, ...]


@attrs.frozen
class Run:
    """What a model checker's run came to. `story` is the counterexample: rules, with the variables that each changed."""

    states: int
    seconds: float
    broken: str
    story: tuple[str, ...]
    fired: frozenset[str]
    watched: frozenset[tuple[int, ...]]
    output: str = attrs.field(repr=False)

    @property
    def ok(self) -> bool:
        return not self.broken


def missing() -> str:
    """What is not installed that is needed here, as a sentence that says what to do; empty when nothing is."""
    for tool, package in (("rumur", "rumur"), ("cc", "gcc")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed: on Debian or Ubuntu run `apt install {package}`"
    return ""


def with_constants(model: str, constants: Mapping[str, int]) -> str:
    """`model` with other values of its constants. Raises ConfigError for a constant that it does not have."""
    for name, value in constants.items():
        model, found = re.subn(rf"(?m)^(  {name}:) \d+;", rf"\1 {value};", model)
        if found != 1:
            raise ConfigError(f"the specification has {found} constants {name}")
    return model


def rule_names(model: str) -> list[str]:
    """The names of all rules, in order of the text; a name can occur more than once."""
    return re.findall(r'(?m)^\s*rule "([^"]+)"', model)


@contextlib.contextmanager
def program(
    model: str, *, dump: bool = False, watch: Watch | None = None, optimise: str = "-O1", timeout_s: float = 600
) -> Iterator[Callable[[int], Run]]:
    """A checker of `model`, to be run as often as wanted, each time from one first state by its number, or from all (-1).

    With `dump`, the output has every state and step: see `states_of` and `steps_of`. Raises ConfigError when a tool is missing or
    the model is no Murphi.
    """
    if lacking := missing():
        raise ConfigError(lacking)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pd-fsm-spec-") as folder:
        source, checker, made = Path(folder, "model.m"), Path(folder, "model.c"), Path(folder, "model")
        source.write_text(model)
        _tool(["rumur", "--threads", "1", "--deadlock-detection", "off", "--quiet", "--output", str(checker), str(source)])
        checker.write_text(_instrumented(checker.read_text(), dump=dump, watch=watch))
        flags = ["-std=c11", "-w", optimise, *(["-mcx16"] if platform.machine() in ("x86_64", "AMD64") else [])]
        _tool(["cc", *flags, str(checker), "-o", str(made), "-lpthread", "-latomic"])

        def run_from(first: int) -> Run:
            nonlocal start
            command = [str(made), *([str(first)] if first >= 0 else [])]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603
            except subprocess.TimeoutExpired as error:
                raise ConfigError(f"the checker found nothing in {timeout_s:.0f} s") from error
            seconds, start = time.perf_counter() - start, time.perf_counter()
            return _parsed(done.stdout, done.returncode, seconds)

        yield run_from


def run(model: str, *, dump: bool = False, watch: Watch | None = None, optimise: str = "-O1", timeout_s: float = 600) -> Run:
    """Check `model` once, from all of its first states."""
    with program(model, dump=dump, watch=watch, optimise=optimise, timeout_s=timeout_s) as run_from:
        return run_from(-1)


def _tool(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ConfigError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[:2_000]}")


def _instrumented(checker: str, *, dump: bool, watch: Watch | None) -> str:
    if any(checker.count(place) != 1 for place in (_INSERT, _INSERTED, _MAIN)):
        raise ConfigError(
            "this rumur writes another program than the one known here (2022.08.20); see pd_fsm/testing/spec_rumur.py"
        )
    before, inside, added = _NOTE_RULE, _NOTE_RULE_CALL, ""
    if dump:
        before, inside, added = before + _DUMP, inside + _DUMP_STEP, _DUMP_STATE
    if watch is not None:
        added += _watching(checker, watch)
    checker = checker.replace(_MAIN, _MAIN_FIRST)
    return checker.replace(_INSERT, before + _INSERT + inside).replace(_INSERTED, _INSERTED + added)


def _watching(checker: str, watch: Watch) -> str:
    """C that tells what is watched of a new state. A variable is stored as its value and 1; 0 is undefined."""

    def value(name: str) -> str:
        found = re.search(rf"ru_{name} __attribute__\(\(unused\)\) = state_handle\(s, (\d+)ull, (\d+)ull\)", checker)
        if found is None:
            raise ConfigError(f"the checker has no variable {name}")
        return f"handle_read_raw(s, state_handle(s, {found[1]}, {found[2]}))"

    shown = ' put(" "); '.join(f"put_uint({value(name)} - 1);" for name in watch.show)
    return f'      if ({" && ".join(f"{value(name)} == 1" for name in watch.when)}) {{ put("W "); {shown} put("\\n"); }}\n'


def _parsed(output: str, status: int, seconds: float) -> Run:
    counted = _COUNTED.search(output)
    fired = frozenset(_RULE.findall("\n".join(line for line in output.splitlines() if line.startswith("F "))))
    watched = frozenset(tuple(map(int, line[2:].split())) for line in output.splitlines() if line.startswith("W "))
    if status == 0 and counted and "No error found." in output:
        return Run(int(counted[1]), seconds, "", (), fired, watched, output)
    story = []
    where = output.find("Startstate")
    for block in output[where:].split("----------") if where >= 0 else ():
        lines = [line for line in block.strip().splitlines() if line and line[:2] not in ("F ", "E ")]
        rule = next((line for line in lines if line.startswith("Rule ")), "")
        if rule:
            story.append(f"{rule.removesuffix(' fired.')}: {', '.join(lines[lines.index(rule) + 1 :])}")
    broken = _BROKEN.search(output)
    said = next((group for group in broken.groups() if group), "") if broken else f"the checker ended with status {status}"
    return Run(int(counted[1]) if counted else 0, seconds, said, tuple(story), fired, watched, output)


def states_of(run: Run) -> dict[str, frozenset[str]]:
    """Every state of a dump: its name, and its variables as "name:value"."""
    found: dict[str, frozenset[str]] = {}
    lines = iter(run.output.splitlines())
    for line in lines:
        if line.startswith("S "):
            variables = []
            for variable in lines:
                if variable == ".":
                    break
                if variable:
                    variables.append(variable)
            found[line[2:]] = frozenset(variables)
    return found


def steps_of(run: Run) -> set[tuple[str, str, str]]:
    """Every step of a dump: the names of the states before and after it, and its rule."""
    return set(steps_in_order(run))


def steps_in_order(run: Run) -> Iterator[tuple[str, str, str]]:
    """The same, in the order in which the checker took them: the first step into a state is on a shortest way."""
    for line in run.output.splitlines():
        if line.startswith("E "):
            before, after, rule = line[2:].split(" ", 2)
            yield before, after, _RULE.findall(rule)[0]
