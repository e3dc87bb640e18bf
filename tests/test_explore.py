"""The explorer: exact counts of small worlds, and that it finds what is broken, on a shortest way, as a story that replays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

from pd_fsm.core import events as ev
from pd_fsm.core import peers, receiver, sender, wire
from pd_fsm.core import session as core
from pd_fsm.machines import MACHINES, Phase
from pd_fsm.testing import explore, scenario, story
from pd_fsm.testing.model import Model
from pd_fsm.testing.scopes import SCOPES
from pd_fsm.testing.snapshot import clone, freeze
from tests.pair import Pair

NAMED = {scope.name: scope for scope in SCOPES}
QUICK = ("smallest", "notify", "vouch", "crash")


@pytest.mark.parametrize("name", QUICK)
def test_everything_holds_in_exactly_these_states(name: str) -> None:
    report = explore.explore(NAMED[name])
    assert report.counterexample is None, report.counterexample
    assert (report.states, report.edges) == (NAMED[name].states, NAMED[name].edges)


def test_every_scope_is_pinned() -> None:
    assert [scope.name for scope in SCOPES if not (scope.states and scope.edges)] == []
    assert len({scope.name for scope in SCOPES}) == len(SCOPES)


# --- planted bugs ------------------------------------------------------------------------------------------------------------


def drained_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill answers an Abort at once, as if nothing were outstanding."""
    real = sender.on_abort

    def on_abort(session: core.SessionCore, source: bytes, message: wire.Abort) -> None:
        real(session, source, message)
        session.emit(ev.Send(source, wire.Drained(message.room, message.generation)))

    monkeypatch.setattr(sender, "on_abort", on_abort)


def a_timeout_frees_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    real = core.SessionCore.doubt

    def doubt(session: core.SessionCore, room: Any) -> None:
        for holder in list(room.lease.holders):
            session.settle(room, holder)
        real(session, room)

    monkeypatch.setattr(core.SessionCore, "doubt", doubt)


def abort_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is repeated: what a network loses is lost."""
    real = core.SessionCore.repeat

    def repeat(session: core.SessionCore, kind: str, peer: bytes, generation: int, message: Any) -> None:
        real(session, kind, peer, generation, message)
        if kind == "abort":
            session.answered(kind, peer, generation)

    monkeypatch.setattr(core.SessionCore, "repeat", repeat)


def success_without_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any part counts as all parts."""
    real = receiver._confirmed

    def confirmed(session: core.SessionCore, link: Any, *, complete: bool) -> None:
        real(session, link, complete=True)

    monkeypatch.setattr(receiver, "_confirmed", confirmed)


def a_late_part_revives(monkeypatch: pytest.MonkeyPatch) -> None:
    """A confirmation makes a room succeed that has failed."""
    real = sender.on_write_done

    def on_write_done(session: core.SessionCore, event: ev.WriteDone) -> None:
        op = session.ops.get(event.op)
        real(session, event)
        if op is not None and op.link.room.state is Phase.FAILED:
            op.link.room.state = Phase.SUCCESS
            session.publish(op.link.room)

    monkeypatch.setitem(core._HANDLERS, ev.WriteDone, on_write_done)


def a_message_opens_a_room(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sender.on_offer

    def on_offer(session: core.SessionCore, peer: Any, offer: wire.Offer, *, waited: bool = False) -> None:
        if offer.room not in session.registry.by_room:
            sender.on_open(session, ev.OpenSend(offer.room))
        real(session, peer, offer, waited=waited)

    monkeypatch.setitem(peers._SENDER_MESSAGES, wire.Offer, on_offer)


def a_spent_generation_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """An offer that is late binds a second time."""
    monkeypatch.setattr("pd_fsm.core.ledger.Peer.spend", lambda *_: None)


def a_late_message_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_part(session: core.SessionCore, peer: Any, message: wire.Part) -> None:
        link = session.links[peer.incarnation, message.generation]
        receiver._confirmed(session, link, complete=True)

    monkeypatch.setitem(peers._RECEIVER_MESSAGES, wire.Part, on_part)


BUGS: list[tuple[Callable[[pytest.MonkeyPatch], None], dict[str, Any], str]] = [
    (drained_too_early, {"aborts": (0, 1)}, "drained is true"),
    (a_timeout_frees_memory, {"aborts": (0, 1)}, "released memory is not touched"),
    (abort_is_said_once, {"aborts": (0, 1), "losses": 1}, "every wait has an end"),
    (success_without_looking, {"chunks": 2}, "success is complete"),
    (a_late_part_revives, {"aborts": (1, 0)}, "terminal is absorbing"),
    (a_message_opens_a_room, {}, "only the owner opens"),
    (a_spent_generation_is_forgotten, {"opens": (2, 1), "duplicates": 1}, "released memory is not touched"),
    (a_late_message_raises, {"duplicates": 1}, "no event may raise"),
]


@pytest.mark.parametrize(("plant", "settings", "broken"), BUGS, ids=[plant.__name__ for plant, _, _ in BUGS])
def test_a_planted_bug_is_found_and_told(
    plant: Callable[[pytest.MonkeyPatch], None],
    settings: dict[str, Any],
    broken: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    scope = attrs.evolve(NAMED["smallest"], name="", aborts=(0, 0), states=0, edges=0)
    scope = attrs.evolve(scope, **settings)
    with monkeypatch.context() as patch:
        plant(patch)
        found = explore.explore(scope).counterexample
        assert found is not None
        assert found.wrong.startswith(broken), found
        text = story.write("F001", found.wrong, scope, found.actions)
        assert "VIOLATION" in text
    # Without the bug the same schedule is harmless, and as a scenario file it stays to say so.
    path = tmp_path / "F001-planted.txt"
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith("  ")) + "\nexpect rest\n")
    commands = path.read_text().splitlines()
    replay = story.Replay(story.scope_of(commands[1].split()[2:]))
    for command in commands[2:-2]:  # the last action may not be possible where the bug is not
        replay.act(command)


def test_a_leak_is_found_that_no_single_step_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drained gets lost and is not repeated: each step is right, but the pages never come back."""
    real = core.SessionCore._repeat_due
    monkeypatch.setattr(core.SessionCore, "_repeat_due", lambda session, key: None if key[0] == "abort" else real(session, key))
    scope = attrs.evolve(NAMED["smallest"], aborts=(0, 1), losses=1)
    found = explore.explore(scope).counterexample
    assert found is not None
    assert found.wrong.startswith(explore.ENDLESS)
    assert "D holds the memory of room 1 (REVOKING)" in found.wrong


def test_a_rude_environment_finds_what_no_honest_peer_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "_asked", lambda session, source, message: True)
    found = explore.explore(attrs.evolve(NAMED["smallest"], aborts=(0, 1), rude=True)).counterexample
    assert found is not None
    assert found.wrong.startswith("every wait has an end")
    assert "Drained(room=2" in found.wrong


def test_a_scope_that_is_too_large_says_so() -> None:
    with pytest.raises(explore.TooManyStates, match="more than 100 states; make it smaller"):
        explore.Exploration(NAMED["smallest"], states_max=100).run()


# --- stories -----------------------------------------------------------------------------------------------------------------


def test_a_story_replays_as_a_scenario(tmp_path: Path) -> None:
    exploration = explore.Exploration(attrs.evolve(NAMED["smallest"], aborts=(0, 0)))
    assert exploration.run() is None
    done = max(
        (n for n, state in enumerate(exploration.states) if exploration.model.at_rest(state)),
        key=lambda n: len(exploration.way_to(n)),
    )
    path = tmp_path / "F002-to-rest.txt"
    path.write_text(story.write("F002", "to rest", exploration.scope, exploration.way_to(done)) + "expect rest\n")
    scenario.run(path)
    path.write_text(path.read_text().replace("-> D part", "-> D verdict", 1))
    with pytest.raises(scenario.ScenarioError, match="expected"):
        scenario.run(path)


def test_words_name_one_action_each() -> None:
    model = Model(NAMED["handshake"])
    exploration = explore.Exploration(attrs.evolve(NAMED["handshake"], crashes=(0, 0)))
    assert exploration.run() is None
    model = exploration.model
    for state in itertools.islice(exploration.states, 0, None, 7):
        words = [explore.action_in_words(model, action) for action in model.actions(state)]
        assert len(set(words)) == len(words)


def test_what_cannot_happen_is_refused_with_what_can() -> None:
    replay = story.Replay(NAMED["smallest"])
    with pytest.raises(ValueError, match="'P clear 1#1' cannot happen here; what can: P open 1"):
        replay.act("P clear 1#1")


@pytest.mark.parametrize("words", [["nothing"], ["smallest", "aborts"], ["smallest", "name=x"]])
def test_a_scope_that_there_is_not_is_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="there are"):
        story.scope_of(words)


def test_the_command_tells_and_saves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "found.txt"
    with monkeypatch.context() as patch:
        success_without_looking(patch)
        assert explore.main(["smallest", "chunks=2", "aborts=0,0", "--jobs", "1", "--save", str(saved)]) == 1
        printed = capsys.readouterr().out
        assert "BROKEN" in printed
        assert str(saved) in printed
        assert explore.main(["--replay", str(saved)]) == 1
        assert "VIOLATION success is complete" in capsys.readouterr().out
    assert explore.main(["--replay", str(saved)]) == 0
    assert explore.main(["no-such-scope"]) == 2
    assert "no scope 'no-such-scope'" in capsys.readouterr().err


# --- snapshots ---------------------------------------------------------------------------------------------------------------


def test_a_copy_goes_its_own_way(pair: Pair) -> None:
    sender_room, _ = pair.transferring(7)
    for side in (pair.p, pair.d):
        side.core.trace = None
        copy = clone(side.core)
        assert freeze(copy) == freeze(side.core)
    before = freeze(pair.p.core)
    copy = clone(pair.p.core)
    copy.step(ev.AbortRequested(sender_room.generation, "in the copy"), 0.0)
    assert freeze(copy) != before
    assert freeze(pair.p.core) == before
    assert sender_room.live


def test_time_and_counters_are_no_part_of_a_state(pair: Pair) -> None:
    pair.transferring(7)
    copy = clone(pair.d.core)
    copy.counts["seen"] += 1
    copy.registry.by_room[7].deadline_ms += 1_000
    assert freeze(copy) == freeze(pair.d.core)


def test_what_is_new_in_the_core_is_noticed(pair: Pair) -> None:
    class Something:
        pass

    pair.d.core.directory["somewhere", None] = Something()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Something is unknown"):
        clone(pair.d.core)
    with pytest.raises(TypeError, match="Something is unknown"):
        freeze(pair.d.core)


def test_rows_taken_are_rows_of_the_machines() -> None:
    taken = set(explore.explore(NAMED["smallest"]).rows)
    assert taken <= {row.id for table in MACHINES.values() for row in table.rows()}
    assert "room.fail:TRANSFERRING" in taken
