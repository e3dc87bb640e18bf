"""Recorded runs of the code as runs of the specification.

A trace lists the rows that sessions took. Cut down to one room and one process of each role, it must be a run of the specification:
some order of messages, repetitions and writes explains every row, in the recorded order. The specification is bound to traces as
text: each rule may only fire where the next rows of its side are the rows of its name, and no earlier than rows of the other side
that came first. A trace that cannot be followed to its end is rejected, and the first row that cannot be explained is named.

Many traces are checked at once: they stand one after another in one table, and a run of the model follows any of them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import attrs
import msgspec

from pd_fsm.testing import spec_rumur
from pd_fsm.testing.scenario import run as run_scenario
from pd_fsm.testing.spec import rows_of

SIDES = ("P", "D")
_AT_THE_END = spec_rumur.Watch(("next_P", "next_D"), ("trace",))
SIZE_MAX = 4
"""Lives at prefill times lives at decode times chunks: more take minutes to be followed."""
_END = 0
_ADVANCE = """procedure advance_SIDE(rows: 0..16);
begin
  place_SIDE := place_SIDE + rows;
  next_SIDE := row_SIDE(place_SIDE);
  when_SIDE := at_SIDE(place_SIDE);
end;

"""


@attrs.frozen
class Line:
    """One row of a trace: by which life of which process, when (any rising number), and of which room."""

    role: str
    process: str
    at: float
    row: str
    room: int
    generation: int


@attrs.frozen
class Trace:
    """One room between one process of each role. `rows` are (side, row), in order of time."""

    name: str
    rows: tuple[tuple[str, str], ...]

    def of(self, side: str) -> list[tuple[int, str]]:
        return [(place, row) for place, (whose, row) in enumerate(self.rows) if whose == side]

    def size(self) -> tuple[int, int, int]:
        """How many lives at prefill and decode, and chunks of one life, its run needs."""
        lives = Counter(side for side, row in self.rows if row == "open")
        chunks = most = 0
        for side, row in self.rows:
            if side == "P":
                chunks = 0 if row == "open" else chunks + row.startswith("lease.expose:")
                most = max(most, chunks)
        return max(lives["P"], 1), max(lives["D"], 1), max(most, 1)


# --- where traces come from --------------------------------------------------------------------------------------------------


def of_files(paths: Sequence[Path]) -> list[Line]:
    """The lines of traces that sessions on one host wrote (`open_session(trace=...)`).

    Several files are merged by time; one that several sessions share, as in the simulator, whose hosts have clocks of their own, is
    in order already.
    """
    lines = []
    lives: Counter[str] = Counter()
    for path in paths:
        for raw in path.read_bytes().splitlines():
            record = msgspec.json.decode(raw)
            session = record["session"]
            if record["machine"] == "session":
                lives[session] += record["event"] == "open"
            elif "room" in record and record["machine"] != "peer":
                process = f"{session}.{lives[session]}"
                lines.append(Line(record["role"], process, record["t_ms"], record["row"], record["room"], record["generation"]))
    return sorted(lines, key=lambda line: line.at) if len(paths) > 1 else lines


def of_scenario(path: Path) -> list[Line]:
    """The lines that the sessions of a scenario file would have written."""
    roles = {"P": "prefill", "D": "decode"}
    return [
        Line(roles[taken.actor[0]], f"{taken.actor}.{taken.life}", at, taken.row, taken.room, taken.generation)
        for at, taken in enumerate(run_scenario(path).rows)
        if taken.room >= 0
    ]


def rooms_of(name: str, lines: Sequence[Line]) -> Iterator[tuple[Trace, str]]:
    """Each room of a recording as a trace, with the reason why the specification does not cover it, or ""."""
    by_room: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        by_room[line.room].append(line)
    for room, own in by_room.items():
        processes = {(line.role, line.process) for line in own}
        roles = Counter(role for role, _ in processes)
        trace = Trace(f"{name} room {room}", tuple((line.role[0].upper(), line.row) for line in own))
        several = any(count > 1 for count in roles.values())
        # A generation of decode's that was bound to an earlier life of prefill's process is another peer's.
        tried_again = len({line.generation for line in own if line.role == "decode"}) > 1
        restarted = tried_again and len({line.process for line in lines if line.role == "prefill"}) > 1
        yield trace, "several processes of a role have the room" if several or restarted else _left_out(trace)


def _left_out(trace: Trace) -> str:
    """What of a trace the specification does not speak of."""
    sending, receiving = ([row for _, row in trace.of(side)] for side in SIDES)
    granted = False
    for side, row in trace.rows:
        granted = granted or (side == "D" and row.startswith(("lease.expose", "room.peer_ready:BOOTSTRAPPING[all")))
        if side == "P" and row.startswith("room.peer_ready") and not granted:
            return "decode rejects a room that it has not opened, or its trace is not there"
    if _ungranted(receiving, "room.peer_ready:BOOTSTRAPPING[all_peers_known]"):
        return "decode reserves its pages when prefill is done"
    if math.prod(trace.size()) > SIZE_MAX:
        return "it has more lives and chunks than can be followed quickly"
    settled = sum(row.startswith("room.part_settled") for row in receiving)
    written = sum(row.startswith("lease.expose") for row in sending)
    if settled > written or _ungranted(sending, "room.start:WAITING_FOR_INPUT"):
        return "a chunk has nothing to move, or does not fit the grant"
    return ""


def _ungranted(rows: Sequence[str], row: str) -> bool:
    """Whether `row` is taken without memory being exposed next."""
    return any(one == row and not after.startswith("lease.expose") for one, after in itertools.pairwise([*rows, ""]))


# --- the specification, bound to traces --------------------------------------------------------------------------------------


def bind(model: str, traces: Sequence[Trace], *, every_row: bool = False, repeats: bool = True) -> str:
    """`model` with rules that follow one of `traces`, whose number is in `trace`; both `next_` are 0 when it is at its end.

    With `every_row`, there is a cover property for each row, so that a rejected trace tells how far it could be followed.
    """
    names = sorted({row for trace in traces for _, row in trace.rows})
    number = {row: index for index, row in enumerate(names, 1)}
    tables: dict[str, list[tuple[int, int]]] = {side: [] for side in SIDES}
    starts: dict[str, list[int]] = {side: [] for side in SIDES}
    covers = []
    for index, trace in enumerate(traces):
        for side in SIDES:
            starts[side].append(len(tables[side]))
            for count, (place, row) in enumerate(trace.of(side)):
                if every_row:
                    covers.append(f'cover "{index} {side} {count}" place_{side} > {len(tables[side])};')
                tables[side].append((number[row], place))
            tables[side].append((_END, len(trace.rows)))
    text = model[: model.index("\ninvariant ")] + "\n" + "\n".join(covers) + "\n"
    rooms = sum(len(trace.rows) for trace in traces)
    places = "".join(
        f"  place_{s}: 0..{len(tables[s]) - 1};\n  next_{s}: 0..{len(names)};\n  when_{s}: 0..{rooms};\n" for s in SIDES
    )
    text = text.replace("\nvar\n", f"\nvar\n  trace: 0..{len(traces)};\n{places}", 1)
    functions = ""
    for side, table in tables.items():
        functions += _table(f"row_{side}", [row for row, _ in table]) + _table(f"at_{side}", [at for _, at in table])
        functions += _table(f"first_{side}", starts[side]) + _ADVANCE.replace("SIDE", side)
    start = text.index("startstate")
    head, rest = text[:start] + functions, text[start:]
    rest = _starts(rest, len(traces))
    return head + re.sub(
        r'rule "([^"]+)"(.*?)==> begin', lambda rule: _follow(rule[1], rule[2], number, repeats=repeats), rest, flags=re.DOTALL
    )


def _table(name: str, values: Sequence[int]) -> str:
    cases = "".join(f"    case {place}: return {value};\n" for place, value in enumerate(values[:-1]))
    head = f"function {name}(i: 0..{len(values)}): 0..{max(values) + 1};\nbegin\n  switch i\n"
    return f"{head}{cases}    else return {values[-1]};\n  end;\nend;\n\n"


def _starts(text: str, count: int) -> str:
    """A first state for each trace."""
    end = text.index("\nend;") + len("\nend;")
    places = "".join(f"  place_{s} := first_{s}(number);\n  advance_{s}(0);\n" for s in SIDES)
    start = text[:end].replace("begin\n", f"begin\n  trace := number;\n{places}", 1)
    return f"ruleset number: 0..{count - 1} do\n{start}\nend;{text[end:]}"


def _follow(name: str, guard: str, number: dict[str, int], *, repeats: bool) -> str:
    side, other = (name[0], "D" if name[0] == "P" else "P") if name[:2] in ("P.", "D.") else ("", "")
    event = name.split(" ", maxsplit=1)[0][2:]
    rows = (event,) * (event in ("open", "clear")) + tuple(row for row in rows_of(name) if not row.startswith("peer."))
    if not repeats and event.startswith("repeat_"):
        return f'rule "{name}" false ==> begin'
    if not side or not rows:  # free, as long as there are rows to be explained
        return f'rule "{name}" (next_P != {_END} | next_D != {_END}) & ({guard.strip()}) ==> begin'
    if any(row not in number for row in rows):
        return f'rule "{name}" false ==> begin'
    ahead = "".join(f" & row_{side}(place_{side} + {place}) = {number[row]}" for place, row in enumerate(rows) if place)
    turn = f"next_{side} = {number[rows[0]]} & when_{side} <= when_{other}"
    return f'rule "{name}" {turn} & ({guard.strip()}){ahead} ==> begin\n    advance_{side}({len(rows)});'


@attrs.frozen
class Verdict:
    """Whether a trace is a run of the specification; if not, the first row of each side that no run explains."""

    accepted: bool
    peers_are_lost: bool = False
    failing: str = ""


@attrs.define
class Checked:
    """What came of checking traces: a verdict for each list of rows."""

    verdicts: dict[tuple[tuple[str, str], ...], Verdict]
    states: int
    seconds: float


def constants(size: tuple[int, int, int], *, peers_are_lost: bool = False) -> dict[str, int]:
    """The constants with which the specification can follow any trace of that size.

    Rows do not say why a room failed or how a write of a concluded room ended, so an engine that gives up at any time stands for
    deadlines, cancellations, failed writes and unknown ones alike, and a late message for one that was lost and repeated.
    """
    lives, gens, chunks = size
    return {
        "LIVES": lives,
        "GENS": gens,
        "CHUNKS": chunks,
        "ANY_LAST": 1,
        "P_ABORTS": lives,
        "D_ABORTS": gens,
        "DEADLINES": 0,
        "VOUCHES": 2,
        "NOTIFIES": 2,
        "LOOKUPS": 1,
        "EXPIRY": int(peers_are_lost),
        "P_DEATHS": int(peers_are_lost),
        "D_DEATHS": int(peers_are_lost),
        "SILENCES": int(peers_are_lost),
    }


def check(model: str, traces: Sequence[Trace], *, explain: bool = True) -> Checked:
    """Whether each of `traces` is a run of `model`. Equal ones are checked once.

    What is not a run in which both processes stay is tried as one in which they die, give each other up and forget.
    """
    checked = Checked({}, 0, 0.0)
    rest = list({trace.rows: trace for trace in traces}.values())
    for peers_are_lost in (False, True):
        groups: dict[tuple[int, int, int], list[Trace]] = defaultdict(list)
        for trace in rest:
            lives, gens, chunks = trace.size()
            groups[lives, gens, max(chunks, 3) if lives == gens == 1 else chunks].append(trace)
        for size, group in groups.items():
            _check(model, size, group, checked, peers_are_lost=peers_are_lost)
        rest = [trace for trace in rest if not checked.verdicts[trace.rows].accepted]
    for trace in rest if explain else ():
        checked.verdicts[trace.rows] = Verdict(accepted=False, failing=_failing(model, trace))
    return checked


def _check(model: str, size: tuple[int, int, int], group: Sequence[Trace], checked: Checked, *, peers_are_lost: bool) -> None:
    sized = spec_rumur.with_constants(model, constants(size, peers_are_lost=peers_are_lost))
    run = spec_rumur.run(bind(sized, group, repeats=peers_are_lost), watch=_AT_THE_END, optimise="-O0")
    if run.broken:
        raise AssertionError(f"the specification, bound to traces of size {size}, fails by itself: {run.broken}")
    missed = set(range(len(group))) - {values[0] for values in run.watched}
    checked.states += run.states
    checked.seconds += run.seconds
    for index, trace in enumerate(group):
        checked.verdicts[trace.rows] = Verdict(accepted=index not in missed, peers_are_lost=peers_are_lost)


def _failing(model: str, trace: Trace) -> str:
    """The first row of each side that no run explains."""
    sized = spec_rumur.with_constants(model, constants(trace.size(), peers_are_lost=True))
    run = spec_rumur.run(bind(sized, [trace], every_row=True), optimise="-O0")
    words = []
    for side in SIDES:
        missed = [int(count) for count in re.findall(rf'cover "0 {side} (\d+)" not hit', run.output)]
        if missed:
            words.append(f"{side} row {min(missed) + 1} of {len(trace.of(side))}: {trace.of(side)[min(missed)][1]}")
    return "; ".join(words) or "each side can be followed to its end, but not both"


def spoilt(traces: Sequence[Trace]) -> list[Trace]:
    """Traces that must be rejected, each made from one of `traces` by what a wrong session might do."""
    plain = [trace for trace in traces if trace.size() == (1, 1, 1)]
    kinds = {
        "whole": [trace for trace in plain if ("D", "room.part_settled:TRANSFERRING[all_confirmed]") in trace.rows],
        "stopped": [trace for trace in plain if ("D", "lease.settled:REVOKING[no_holder]") in trace.rows],
    }
    return [
        Trace(f"{trace.name}, {name}", tuple(spoil(list(trace.rows)))) for name, kind, spoil in _SPOILS for trace in kinds[kind][:1]
    ]


_Rows: TypeAlias = list[tuple[str, str]]


def _without(row: tuple[str, str]) -> Callable[[_Rows], _Rows]:
    return lambda rows: [one for one in rows if one != row]


def _first(side: str) -> Callable[[_Rows], _Rows]:
    """All rows of `side` come before those of the other one, but for its first."""

    def spoil(rows: _Rows) -> _Rows:
        other = [one for one in rows if one[0] != side]
        return [*other[:1], *(one for one in rows if one[0] == side), *other[1:]]

    return spoil


_SPOILS: tuple[tuple[str, str, Callable[[_Rows], _Rows]], ...] = (
    ("decode succeeds before a write", "whole", _first("D")),
    ("prefill never opens its room", "whole", lambda rows: [one for one in rows if one[0] != "P"]),
    ("decode's memory comes back without a revocation", "stopped", _without(("D", "lease.conclude:EXPOSED[!no_holder]"))),
    ("prefill writes without a reader", "whole", _without(("P", "room.peer_ready:BOOTSTRAPPING[all_peers_known]"))),
    ("a room is cleared while it is live", "whole", lambda rows: [*rows[:1], (rows[0][0], "clear"), *rows[1:]]),
    ("a success follows a failure", "stopped", lambda rows: [*rows, ("D", "room.part_settled:TRANSFERRING[all_confirmed]")]),
)
