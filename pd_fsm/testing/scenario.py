"""Scenarios as readable text: what happens, what the sessions did about it, and what must hold.

    # B001: a late abort must not bring a cleared room back
    # https://... (thread); invariants 2, 3
    P open 1
      P room 1: BOOTSTRAPPING
    ...
    expect P 1 FAILED cause=timeout

A line without indentation is a command, or a comment. Three comments have a meaning: `# invariants N, N` says what the scenario
is about, `# runtime FILE::TEST` names a test that replays it on real sockets and processes (it is run with the scenario), and
`# border TEXT` says how the layer's border survives what lies outside of it. The indented lines after it are what the world
logged, and are compared word for word: `rewrite` replaces them, so a change of behaviour shows as a diff to be understood.
`expect` lines are the law and are never rewritten.

Commands, with A for an actor, R for a room number, W for a write such as P:1:

    world [P P2 D ...] [vouch] [notify] [NAME=VALUE ...]                   first line: actors and settings; default `world P D`
                                                                           names of Deadlines and Limits, and residual_ms;
                                                                           D.NAME=VALUE is for that actor alone;
                                                                           prefill actors are data-parallel ranks, unless
          [tp]                                                             actors of a role are tensor-parallel ranks, or
          [writers]                                                        each decode room has all prefill actors as its writers
    world explored SCOPE [NAME=VALUE ...]                                  a schedule of the explorer: see pd_fsm/testing/story.py
    A open R [pages=1,2] [aux=N] [prefix=N] [tokens=N] [dp=N] [readers=N]  decode: pages, none is `pages=`, later is no `pages`
    A grant R pages=1,2 [aux=N] [prefix=N] [tokens=N]                      the pages of a room that was opened without
    A chunk R 0..32 pages=1,2 [last] [aux=N]
    A abort R TEXT | A cancel R TEXT | A clear R | A drain TEXT | A shutdown TEXT | A goodbye
    A crash | A restart | A freeze | A thaw | A sees B gone | A sees B broken | A sees B full      full: of messages to it
    A restart [kv.page_size=N ...] [without=aux] [transport=NAME]          with another layout or transport
    ranks A B ... [rows_max=N] | agree A | A declines R TEXT               a group of ranks; one collective of A's group; A will not
                                                                           open R
    W done | W failed TEXT | W unknown TEXT | W settled | W landed         how a write ends; landed: bytes of a dead process arrive;
                                                                           of one that has ended: a late second report
    lose|hold|duplicate KIND [from A] [N times] | release [KIND] | end rules
    cut A B | heal                                                         nothing passes between A and B
    wait 10s | wait 50ms
    rendezvous down | up | empty | lists A [at B] | slow | answers         slow: no answer until `answers`; at: B's address
    A receives HEX                                                         bytes from nowhere
    refused: COMMAND                                                       the command must raise LocalProtocolError
    expect A R PHASE [cause=C] [reason~TEXT] | expect A R gone
    expect A R memory free|held | expect A R lease STATE | expect A R bytes N
    expect W 7,8 -> 2,3 [aux 1 -> 4]                                       what an open write copies
    expect agreed A none | expect agreed A 1:FAILED 2:SUCCESS              what the last collective decided, in this order
    expect A peer B STATE | expect A peer B gone
    expect A sent KIND N                                                   messages since the beginning
    expect A count NAME [N] | expect A table NAME N                        tables: rooms, peers, links, ops, leases, early,
    tombstones expect writes none | expect writes P:1 P:2 | expect idle
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable
from pathlib import Path

import attrs
import msgspec

from pd_fsm.core import events as ev
from pd_fsm.core.settings import Deadlines, Limits
from pd_fsm.errors import LocalProtocolError
from pd_fsm.machines import Phase
from pd_fsm.testing.ranks import Group
from pd_fsm.testing.story import Replay, scope_of
from pd_fsm.testing.world import Actor, Rule, Violation, World, pages


class ScenarioError(AssertionError):
    """A scenario does not hold, or makes no sense; says the line."""


@attrs.define(eq=False)
class Line:
    """One command or comment with what followed it in the file."""

    number: int
    text: str
    logged: list[str] = attrs.field(factory=list)


def parse(text: str) -> list[Line]:
    lines: list[Line] = []
    for number, raw in enumerate(text.splitlines(), 1):
        if raw.startswith("  "):
            if not lines:
                raise ScenarioError(f"line {number}: a log line before the first command")
            lines[-1].logged.append(raw[2:].rstrip())
        else:
            lines.append(Line(number, raw.rstrip()))
    return lines


def folded(lines: list[str]) -> list[str]:
    """Repetitions, of which there are many while a message is not answered, as one line."""
    counted = [(line, len(list(same))) for line, same in itertools.groupby(lines)]
    return [line if count == 1 else f"{line} ({count} times)" for line, count in counted]


def run(path: Path, *, rewrite: bool = False) -> World:
    """Replay a scenario file. Raises ScenarioError naming file and line; with `rewrite` the logged lines are brought up to date."""
    lines = parse(path.read_text())
    scenario = Scenario()
    for line in lines:
        try:
            happened = scenario.execute(line.text)
        except (Violation, ScenarioError, LocalProtocolError, KeyError, ValueError, IndexError, TypeError) as error:
            story = "\n  ".join(scenario.world.log[-20:]) if scenario.begun else ""
            raise ScenarioError(f"{path.name}:{line.number}: {line.text}\n  {type(error).__name__}: {error}\n  {story}") from error
        if not rewrite and happened != folded(line.logged):
            expected, got = "\n  ".join(line.logged), "\n  ".join(happened)
            raise ScenarioError(f"{path.name}:{line.number}: {line.text}\nexpected\n  {expected}\ngot\n  {got}")
        line.logged = happened
    if not scenario.expectations and not any(line.text.startswith("# runtime ") for line in lines):
        raise ScenarioError(f"{path.name}: expects nothing and names no runtime test, so it cannot fail")
    if rewrite:
        text = "".join(line.text + "\n" + "".join(f"  {logged}\n" for logged in line.logged) for line in lines)
        path.write_text(text)
    return scenario.world


class Scenario:
    """The interpreter of one file."""

    def __init__(self) -> None:
        self.world = World()
        self.groups: dict[str, Group] = {}  # by actor
        self.begun = False
        self.expectations = 0
        self.replay: Replay | None = None

    def execute(self, text: str) -> list[str]:
        """One line. Returns what the world logged."""
        if not text or text.startswith("#"):
            return []
        words = shlex.split(text)
        if words[0] == "world" and words[1:2] == ["explored"]:
            self.replay = Replay(scope_of(words[2:]))
            return []
        if self.replay is not None:
            return self._explored(self.replay, text)
        if words[0] == "world":
            self._make_world(words[1:])
            return []
        if not self.begun:
            self._make_world(["P", "D"])
        self.world.log.clear()
        if words[0] == "refused:":
            try:
                self._command(words[1:])
            except LocalProtocolError as error:
                return [f"refused: {error}"]
            raise ScenarioError("this was not refused")
        self._command(words)
        if words[0] not in ("expect", "hold", "lose", "duplicate", "cut"):
            self.world.settle()
        return folded(self.world.log)

    def _explored(self, replay: Replay, text: str) -> list[str]:
        if not text.startswith("expect "):
            return replay.act(text)
        self.expectations += 1
        if text != "expect rest":
            raise ScenarioError("of a schedule of the explorer only `expect rest` can be asked; its properties hold in every step")
        if not replay.at_rest():
            raise ScenarioError("the world is not at rest")
        return []

    def _make_world(self, words: list[str]) -> None:
        given = _options(words)
        policy = {"on_quarantine_full": given.pop("on_quarantine_full")} if "on_quarantine_full" in given else {}
        residual_ms = float(given.pop("residual_ms", "0"))
        own: dict[str, dict[str, int]] = {}  # deadlines of single actors
        for key in [key for key in given if "." in key]:
            name, _, setting = key.partition(".")
            own.setdefault(name, {})[setting] = int(given.pop(key))
        numbers = {key: int(value) for key, value in given.items()}
        deadlines = {key: value for key, value in numbers.items() if hasattr(Deadlines(), key)}
        limits = {key: value for key, value in numbers.items() if hasattr(Limits(), key)}
        unknown = set(numbers) - set(deadlines) - set(limits)
        if unknown or self.begun:
            raise ScenarioError(f"unknown settings {sorted(unknown)}" if unknown else "the world exists already")
        self.begun = True
        self.world = World(Deadlines(**deadlines), Limits(**limits, **policy))  # type: ignore[arg-type]
        self.world.residual_ms = residual_ms
        names = [word for word in words if "=" not in word and word not in ("vouch", "notify", "tp", "writers")] or ["P", "D"]
        prefills = [name for name in names if name.startswith("P")]
        for name in names:
            same_role = [other for other in names if other[0] == name[0]]
            rank, size = same_role.index(name), len(same_role)
            tp_rank, tp_size = (rank, size) if "tp" in words else (0, 1)
            data_parallel = name in prefills and "tp" not in words and "writers" not in words
            dp_rank, dp_size = (rank, size) if data_parallel else (0, 1)
            clocks = Deadlines(**(deadlines | own.get(name, {})))
            self.world.add(
                name,
                dp_rank=dp_rank,
                dp_size=dp_size,
                vouches="vouch" in words,
                notifies="notify" in words,
                deadlines=clocks,
                tp_rank=tp_rank,
                tp_size=tp_size,
            )

    def _command(self, words: list[str]) -> None:
        first, rest = words[0], words[1:]
        if first in self.world.actors:
            self._actor_command(self.world.actors[first], rest)
        elif first in self.world.writes:
            self.world.end_write(first, rest[0], " ".join(rest[1:]) or "as scripted")
        elif first in self.world.ended:
            self.world.report_again(first, rest[0])
        elif first in _WORLD_COMMANDS:
            _WORLD_COMMANDS[first](self, rest)
        else:
            known = [*self.world.actors, *self.world.writes, *_WORLD_COMMANDS]
            raise ScenarioError(f"{first!r} is neither an actor, an open write nor a command; known: {', '.join(known)}")

    # --- what actors do --------------------------------------------------------------------------------------------------

    def _actor_command(self, actor: Actor, words: list[str]) -> None:
        command = _ACTOR_COMMANDS.get(words[0])
        if command is None:
            raise ScenarioError(f"{actor.name} cannot {words[0]!r}; known: {', '.join(_ACTOR_COMMANDS)}")
        command(self, actor, words[1:])

    def _local(self, actor: Actor, event: ev.Event) -> None:
        self.world.apply(actor, actor.alive.step(event, self.world.now_ms))

    def _open(self, actor: Actor, words: list[str]) -> None:
        room, options = int(words[0]), _options(words[1:])
        if actor.role == "prefill":
            self._local(actor, ev.OpenSend(room, int(options.get("readers", "1"))))
            return
        dp = options.get("dp")
        self._local(
            actor,
            ev.OpenReceive(
                room,
                pages(_indices(options["pages"])) if "pages" in options else None,
                int(options.get("aux", "-1")),
                int(options.get("prefix", "0")),
                "world",
                int(dp) if dp is not None else None,
                int(options["tokens"]) if "tokens" in options else None,
            ),
        )

    def _grant(self, actor: Actor, words: list[str]) -> None:
        options = _options(words[1:])
        event = ev.GrantPages(
            self._generation(actor, words[0]),
            pages(_indices(options["pages"])),
            int(options.get("aux", "-1")),
            int(options.get("prefix", "0")),
            int(options["tokens"]) if "tokens" in options else None,
        )
        self._local(actor, event)

    def _chunk(self, actor: Actor, words: list[str]) -> None:
        begin, _, end = words[1].partition("..")
        options = _options(words[2:])
        event = ev.ChunkReady(
            self._generation(actor, words[0]),
            int(begin),
            int(end),
            pages(_indices(options["pages"])),
            "last" in words,
            int(options.get("aux", "-1")),
        )
        self._local(actor, event)

    def _generation(self, actor: Actor, room: str) -> int:
        """The room's generation, also if it was cleared; of one that never was, one that nothing has."""
        return max((g for g, number in actor.rooms.items() if number == int(room)), default=1 << 40)

    def _abort(self, actor: Actor, words: list[str]) -> None:
        self._local(actor, ev.AbortRequested(self._generation(actor, words[0]), " ".join(words[1:]) or "client left"))

    def _clear(self, actor: Actor, words: list[str]) -> None:
        self._local(actor, ev.ClearRequested(self._generation(actor, words[0])))

    def _cancel(self, actor: Actor, words: list[str]) -> None:
        self._local(actor, ev.CancelRequested(int(words[0]), " ".join(words[1:]) or "client left"))

    def _drain(self, actor: Actor, words: list[str]) -> None:
        self._local(actor, ev.DrainRequested(" ".join(words) or "the engine is being drained"))

    def _shutdown(self, actor: Actor, words: list[str]) -> None:
        self._local(actor, ev.ShutdownRequested(" ".join(words) or "closed"))

    def _goodbye(self, actor: Actor, words: list[str]) -> None:
        self._local(actor, ev.GoodbyeRequested(" ".join(words) or "closed"))

    def _crash(self, actor: Actor, _: list[str]) -> None:
        self.world.crash(actor)

    def _restart(self, actor: Actor, words: list[str]) -> None:
        if actor.core is not None:
            self.world.crash(actor)
        options = _options(words)
        actor.transport = options.pop("transport", actor.transport)
        without = options.pop("without", "")
        components = {component.name: component for component in actor.components if component.name != without}
        for key, value in options.items():
            name, _, field = key.partition(".")
            changed = tuple(_indices(value)) if field == "item_bytes" else int(value) if value.isdecimal() else value
            components[name] = msgspec.structs.replace(components[name], **{field: changed})
        actor.components = tuple(components.values())
        self.world.start(actor)

    def _freeze(self, actor: Actor, _: list[str]) -> None:
        actor.frozen = True

    def _thaw(self, actor: Actor, _: list[str]) -> None:
        self.world.thaw(actor)

    def _sees(self, actor: Actor, words: list[str]) -> None:
        other = self.world.actors[words[0]]
        if words[1] == "full":
            self.world.overflows(actor, other)
        else:
            self.world.sees(actor, other, dead={"gone": True, "broken": False}[words[1]])

    def _receives(self, actor: Actor, words: list[str]) -> None:
        self.world.receive(actor, bytes.fromhex("".join(words)))

    # --- what the world does ---------------------------------------------------------------------------------------------

    def _rule(self, action: str, words: list[str]) -> None:
        source = words[words.index("from") + 1] if "from" in words else ""
        left = int(words[words.index("times") - 1]) if "times" in words else -1
        self.world.rules.append(Rule(action, words[0], source, left))

    def _release(self, words: list[str]) -> None:
        self.world.release(words[0] if words else "*")

    def _end(self, _: list[str]) -> None:
        self.world.rules.clear()

    def _cut(self, words: list[str]) -> None:
        self.world.cuts |= {(words[0], words[1]), (words[1], words[0])}

    def _heal(self, _: list[str]) -> None:
        self.world.cuts.clear()

    def _wait(self, words: list[str]) -> None:
        text = words[0]
        self.world.wait(float(text[:-2]) if text.endswith("ms") else float(text.removesuffix("s")) * 1_000)

    def _rendezvous(self, words: list[str]) -> None:
        if words[0] == "empty":
            self.world.registry.clear()
        elif words[0] == "slow":
            self.world.rendezvous_slow = True
        elif words[0] == "answers":
            self.world.answer_lookups()
        elif words[0] == "lists":
            self.world.register(self.world.actors[words[1]], self.world.actors[words[3]] if words[2:3] == ["at"] else None)
        else:
            self.world.rendezvous_up = {"up": True, "down": False}[words[0]]

    def _ranks(self, words: list[str]) -> None:
        actors = [self.world.actors[word] for word in words if "=" not in word]
        group = Group(self.world, actors, int(_options(words).get("rows_max", "128")))
        self.groups |= {actor.name: group for actor in actors}

    def _agree(self, words: list[str]) -> None:
        self.groups[words[0]].tick()

    def _declines(self, actor: Actor, words: list[str]) -> None:
        self.groups[actor.name].refuse(actor, int(words[0]), " ".join(words[1:]) or "could not be opened")

    # --- what must hold --------------------------------------------------------------------------------------------------

    def _expect(self, words: list[str]) -> None:
        self.expectations += 1
        if words == ["idle"]:
            problems = self.world.idle_problems()
            if problems:
                raise ScenarioError("not idle: " + "; ".join(problems))
        elif words[0] == "writes":
            wanted = [] if words[1:] == ["none"] else words[1:]
            if sorted(self.world.writes) != sorted(wanted):
                raise ScenarioError(f"open writes are {sorted(self.world.writes)}")
        elif words[0] == "agreed":
            decided = " ".join(f"{made.room}:{made.phase.name}" for made in self.groups[words[1]].decided) or "none"
            if decided != " ".join(words[2:]):
                raise ScenarioError(f"the group decided {decided}")
        elif words[0] in self.world.writes:
            copies = self.world.describe_write(words[0])
            if copies != " ".join(words[1:]):
                raise ScenarioError(f"{words[0]} copies {copies}")
        else:
            actor = self.world.actors[words[0]]
            about = {"peer": self._expect_peer, "count": self._expect_count, "table": self._expect_table, "sent": self._expect_sent}
            if words[1] in about:
                about[words[1]](actor, words[2:])
            else:
                self._expect_room(actor, words[1:])

    def _expect_room(self, actor: Actor, words: list[str]) -> None:
        number, what = int(words[0]), words[1]
        room = actor.room(number)
        if what == "gone":
            if room is not None:
                raise ScenarioError(f"room {number} is {room.state.name}")
        elif what == "memory":
            latest = max((g for g, its_room in actor.rooms.items() if its_room == number), default=0)
            if not latest:
                raise ScenarioError(f"room {number} was never opened")
            free = latest in actor.released
            if free != (words[2] == "free"):
                raise ScenarioError(f"memory of room {number} is {'free' if free else 'held'}")
        elif room is None:
            raise ScenarioError(f"room {number} does not exist")
        elif what == "bytes":
            if room.bytes_moved != int(words[2]):
                raise ScenarioError(f"room {number} moved {room.bytes_moved} bytes")
        elif what == "lease":
            if room.lease.state.name != words[2]:
                raise ScenarioError(f"lease of room {number} is {room.lease.state.name}")
        else:
            self._expect_phase(number, room.state, room.failure, words[1:])

    @staticmethod
    def _expect_phase(number: int, phase: Phase, failure: ev.Failure | None, words: list[str]) -> None:
        if phase.name != words[0]:
            raise ScenarioError(f"room {number} is {phase.name}" + (f" ({failure.cause}: {failure.reason})" if failure else ""))
        for word in words[1:]:
            if word.startswith("cause=") and (failure is None or failure.cause != word[6:]):
                raise ScenarioError(f"cause is {failure.cause if failure else None}")
            if word.startswith("reason~") and (failure is None or word[7:] not in failure.reason):
                raise ScenarioError(f"reason is {failure.reason if failure else None!r}")

    def _expect_peer(self, actor: Actor, words: list[str]) -> None:
        found = [peer for peer in actor.alive.peers.values() if peer.name == words[0]]
        if words[1] == "gone":
            if found:
                raise ScenarioError(f"peer {words[0]} is {found[-1].state.name}")
        elif not found or found[-1].state.name != words[1]:
            raise ScenarioError(f"peer {words[0]} is {found[-1].state.name if found else 'unknown'}")

    def _expect_sent(self, actor: Actor, words: list[str]) -> None:
        sent = self.world.sent[actor.name, words[0]]
        if sent != int(words[1]):
            raise ScenarioError(f"{actor.name} sent {sent} of {words[0]}")

    def _expect_count(self, actor: Actor, words: list[str]) -> None:
        count = actor.alive.counts[words[0]]
        if count != int(words[1]) if len(words) > 1 else count == 0:
            raise ScenarioError(f"{words[0]} is {count}; counters are {dict(actor.alive.counts)}")

    def _expect_table(self, actor: Actor, words: list[str]) -> None:
        core = actor.alive
        sizes = {
            "rooms": len(core.registry.by_room),
            "peers": len(core.peers),
            "links": len(core.links),
            "ops": len(core.ops),
            "leases": len(core.leases),
            "early": core.registry.early_count,
            "tombstones": len(core.registry.tombstones),
        }
        if sizes[words[0]] != int(words[1]):
            raise ScenarioError(f"{words[0]} has {sizes[words[0]]} entries")


def _options(words: list[str]) -> dict[str, str]:
    return {key: value for key, equals, value in (word.partition("=") for word in words) if equals}


def _indices(text: str) -> list[int]:
    """`1,2,5` or `1..4`, or nothing."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dots, last = part.partition("..")
        found += range(int(first), int(last) + 1) if dots else [int(first)]
    return found


_ACTOR_COMMANDS: dict[str, Callable[[Scenario, Actor, list[str]], None]] = {
    "open": Scenario._open,  # noqa: SLF001 - the class's own tables
    "chunk": Scenario._chunk,  # noqa: SLF001
    "abort": Scenario._abort,  # noqa: SLF001
    "cancel": Scenario._cancel,  # noqa: SLF001
    "drain": Scenario._drain,  # noqa: SLF001
    "grant": Scenario._grant,  # noqa: SLF001
    "clear": Scenario._clear,  # noqa: SLF001
    "shutdown": Scenario._shutdown,  # noqa: SLF001
    "goodbye": Scenario._goodbye,  # noqa: SLF001
    "crash": Scenario._crash,  # noqa: SLF001
    "restart": Scenario._restart,  # noqa: SLF001
    "freeze": Scenario._freeze,  # noqa: SLF001
    "thaw": Scenario._thaw,  # noqa: SLF001
    "sees": Scenario._sees,  # noqa: SLF001
    "receives": Scenario._receives,  # noqa: SLF001
    "declines": Scenario._declines,  # noqa: SLF001
}
_WORLD_COMMANDS: dict[str, Callable[[Scenario, list[str]], None]] = {
    "lose": lambda scenario, words: scenario._rule("lose", words),  # noqa: SLF001
    "hold": lambda scenario, words: scenario._rule("hold", words),  # noqa: SLF001
    "duplicate": lambda scenario, words: scenario._rule("duplicate", words),  # noqa: SLF001
    "release": Scenario._release,  # noqa: SLF001
    "end": Scenario._end,  # noqa: SLF001
    "cut": Scenario._cut,  # noqa: SLF001
    "heal": Scenario._heal,  # noqa: SLF001
    "wait": Scenario._wait,  # noqa: SLF001
    "rendezvous": Scenario._rendezvous,  # noqa: SLF001
    "ranks": Scenario._ranks,  # noqa: SLF001
    "agree": Scenario._agree,  # noqa: SLF001
    "expect": Scenario._expect,  # noqa: SLF001
}
