"""What the explorer does and what comes of it, in words: `P open 1`, `D -> P offer 1#2`, `P:1 done`. `1#2` is room 1, generation 2.

Different actions of one state have different words, so that a story can be replayed from its words alone.
"""

from __future__ import annotations

from pd_fsm.core import events as ev
from pd_fsm.core import wire
from pd_fsm.machines import Phase
from pd_fsm.testing.cores import ROOM, Outcome, Stimulus, name_of
from pd_fsm.testing.model import Action, Edge, Model


def action_in_words(model: Model, action: Action) -> str:
    kind, *args = action
    match kind:
        case "call":
            return f"{model.cast.names[args[0]]} {_call(args[1])}"
        case "deliver":
            return _frame(model, args[0])
        case "repeat":
            return f"{_frame(model, args[0])} again"
        case "lose":
            return f"lose {_frame(model, args[0])}"
        case "end":
            write = model.writes[args[0]]
            life = f".{write.life}" if write.life > 1 else ""
            return f"{model.cast.names[write.process]}{life}:{write.submit.op} {args[1]}"
    return f"{model.cast.names[args[0]]} {kind}"


def _call(stimulus: Stimulus) -> str:
    match stimulus:
        case ("open",):
            return f"open {ROOM}"
        case ("chunk", generation, index):
            return f"chunk {ROOM}#{generation} part {index}"
        case ("timer", ("drain", _, generation)):
            return f"drain deadline {ROOM}#{generation}"
        case ("timer", (kind, peer, generation)):
            to = f" for {name_of(peer)}" if peer else ""
            what = "residual" if kind == "residual" else f"repeats {kind}"
            return f"{what} {ROOM}#{generation}{to}"
        case ("silence", peer, _):
            return f"hears nothing of {name_of(peer)}"
        case ("gone", peer):
            return f"sees {name_of(peer)} gone"
        case ("lapse",):
            return "forgets what is oldest"
    kind, generation = stimulus
    return f"{kind} {ROOM}#{generation}"


def _frame(model: Model, number: int) -> str:
    frame = model.frames[number]
    generation = getattr(frame.message, "generation", 0)
    to = name_of(frame.destination) if frame.destination != wire.NOBODY else model.cast.names[frame.target]
    words = [name_of(frame.sender), "->", to, frame.kind, *([f"{ROOM}#{generation}"] if generation else [])]
    match frame.message:
        case wire.Part(chunk=chunk):
            words.append(f"part {chunk}" + (" by the data plane" if frame.sure else ""))
        case wire.Verdict(success=success, cause=cause):
            words.append("success" if success else cause)
        case wire.Abort(cause=cause):
            words.append(cause)
        case wire.Offer(pages=pages) if not pages:
            words.append("without pages")
        case wire.Stranger(addressed=addressed):
            words.append(name_of(addressed))
    return " ".join(words)


def edge_in_words(model: Model, edge: Edge) -> list[str]:
    """What an action did, one line each."""
    lines: list[str] = []
    for process, _, outcome in edge.steps:
        name = model.cast.names[process]
        if outcome.step.error is not None:
            lines.append(f"refused: {outcome.step.error}")
        for row in outcome.rows:
            machine, _, rest = row.partition(".")
            if machine != "room":  # a room's rows show as what it publishes
                lines.append(f"{name} {machine} {rest}")
        lines += [f"{name} {line}" for effect in outcome.effects if (line := _effect(outcome, effect))]
    return lines


def _effect(outcome: Outcome, effect: ev.Effect) -> str:
    match effect:
        case ev.Publish(room=room, generation=generation, phase=phase):
            entry = outcome.step.after.registry.by_generation.get(generation)
            failure = entry.failure if entry is not None and phase == Phase.FAILED else None
            why = f" ({failure.cause}: {failure.reason})" if failure is not None else ""
            return f"room {room}#{generation}: {Phase(phase).name}{why}"
        case ev.Send(peer=peer, message=message):
            return f"-> {name_of(peer)} {message.__struct_config__.tag}"
        case ev.Submit(op=op):
            return f"writes :{op}"
        case ev.Cancel(op=op):
            return f"cancels :{op}"
        case ev.ReleasePages(room=room, generation=generation):
            return f"room {room}#{generation}: memory free"
    return ""
