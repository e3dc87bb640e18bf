"""Gaps: the specification with one guard taken out must fail, or its properties would be worth nothing.

Each gap names a guard by its text and what stands there instead. All gaps of a scope are put into one model, each behind a number
that the first state chooses, so that one program can be run with any of them. A guard that is not where it is looked for, or whose
loss the checker does not notice, fails the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from pd_fsm.errors import ConfigError
from pd_fsm.testing import spec_rumur


@attrs.frozen
class Gap:
    """In the model's only `where`, `guard` becomes `instead`: "true", "false", another condition, or "" for a statement."""

    name: str
    where: str
    guard: str
    instead: str = "true"


_TIMEOUT_S = 60
_HANDS_OVER = {"GENS": 2, "LIVES": 2, "CHUNKS": 2, "P_ABORTS": 1, "D_ABORTS": 1, "DEADLINES": 0}
_LOSES = {
    "GENS": 1,
    "LIVES": 1,
    "CHUNKS": 2,
    "P_ABORTS": 1,
    "D_ABORTS": 1,
    "DOUBTS": 1,
    "LOSSES": 1,
    "DUPLICATES": 1,
    "DEADLINES": 0,
}
_GIVES_UP = {"GENS": 1, "LIVES": 1, "CHUNKS": 1, "P_ABORTS": 1, "D_ABORTS": 1, "P_DEATHS": 1, "SILENCES": 1}
_ALONE = {"GENS": 1, "LIVES": 1, "CHUNKS": 1, "P_ABORTS": 1, "D_ABORTS": 0, "DEADLINES": 0}

_ABORT_OF_UNKNOWN = "    unpark(g);\n    spent[g] := true;\n    net_drained[g] := true;"
_BINDS = "return !is_bound(g) & !spent[g] & exists n: Life do p[n].open & p[n].phase = Bootstrapping end;"
_ENDED = "  p[n].write[c] := None;\n  if !writing(n) then\n    p[n].lease := Quiesced;"

GAPS: tuple[tuple[Mapping[str, int], tuple[Gap, ...]], ...] = (
    (
        _HANDS_OVER,
        (
            Gap("an offer opens a transfer that has concluded", _BINDS, "!spent[g]"),
            Gap("an offer binds a second time", _BINDS, "!is_bound(g)"),
            Gap("an offer binds a room that has its reader", _BINDS, "p[n].phase = Bootstrapping", "live(p[n].phase)"),
            Gap("an offer of a concluded transfer waits", "    elsif spent[g] then", "spent[g]", "false"),
            Gap("an offer waits though the room is open", "    elsif p_is_open() then\n      for", "p_is_open()", "false"),
            Gap("a refused offer waits on", "procedure refuse(g: Gen);\nbegin\n  unpark(g);", "unpark(g);", ""),
            Gap("a refused transfer may open", "  unpark(g);\n  spent[g] := true;\n  net_failure", "spent[g] := true;", ""),
            Gap("a forgotten transfer may open again", "  spent[p[n].gen] := true;", "spent[p[n].gen] := true;", ""),
            Gap("an abort leaves the offer that waits", _ABORT_OF_UNKNOWN, "unpark(g);", ""),
            Gap("Drained of a transfer that may still open", _ABORT_OF_UNKNOWN, "spent[g] := true;", ""),
            Gap("Drained of a live room", "bound(n, g) & !live(p[n].phase)", "!live(p[n].phase)"),
            Gap("Drained with a write under way, as the room fails", "if p[n].linked & !writing(n) then", "!writing(n)"),
            Gap("Drained with a write under way, asked later", "if !p[n].drain_asked & !writing(n) then", "!writing(n)"),
            Gap("Drained with a write under way, repeated", "& p[n].drain_asked & !writing(n)\n  ==>", "!writing(n)"),
            Gap("Drained though nobody asked", "& p[n].drain_asked & !writing(n)\n  ==>", "p[n].drain_asked"),
            Gap("a verdict of a live room", "p[n].linked & concluded(p[n].phase) & !p[n].drain_asked", "concluded(p[n].phase)"),
            Gap("source pages come back with writes under way", "writing(n) ? Revoking : Quiesced", "writing(n)", "false"),
            Gap("source pages come back with the first write", _ENDED, "!writing(n)"),
            Gap("destination pages come back without proof", "VOUCHES = 1 ? Quiesced : Revoking", "VOUCHES = 1"),
            Gap("destination pages come back by any writer's death", "p_dead & d[g].linked & d[g].lease = Revoking", "p_dead"),
            Gap("destination pages come back unvouched", "VOUCHES = 2 & d[g].lease = Revoking", "VOUCHES = 2"),
            Gap("success with chunks to come", "return p[n].closed & forall other", "p[n].closed"),
            Gap(
                "success with a chunk unconfirmed",
                "other < p[n].chunks & other != c -> p[n].confirmed[other]",
                "p[n].confirmed[other]",
            ),
            Gap("decode succeeds before it knows the last chunk", "return (last | d[g].total > 0) &", "(last | d[g].total > 0)"),
            Gap("decode succeeds with a part missing", "other != c -> d[g].confirmed[other]", "d[g].confirmed[other]"),
            Gap("a confirmed chunk is written again", "p[n].write[c] = None & !p[n].confirmed[c] then", "!p[n].confirmed[c]"),
            Gap(
                "a chunk is written before a reader is known",
                "if p[n].phase != Bootstrapping then\n    pump",
                "p[n].phase != Bootstrapping",
            ),
            Gap("prefill clears a live room", '"P.clear"\n    p[n].open & concluded(p[n].phase)', "concluded(p[n].phase)"),
            Gap("decode clears a live room", '"D.clear"\n    d[g].open & concluded(d[g].phase)', "concluded(d[g].phase)"),
            Gap("prefill opens a room twice", '"P.open"\n  !p_dead & !p_is_open()', "!p_is_open()"),
            Gap("decode opens a room twice", '+ lease.expose:PRIVATE"\n  !d_dead & !d_is_open()', "!d_is_open()"),
            Gap("prefill forgets a room that is linked", "if !p[n].open & !p[n].linked then", "!p[n].linked"),
            Gap("prefill forgets a room that is open", "if !p[n].open & !p[n].linked then", "!p[n].open"),
            Gap("decode forgets a room that is linked", "if !d[g].open & !d[g].linked then", "!d[g].linked"),
            Gap("decode forgets a room that is open", "if !d[g].open & !d[g].linked then", "!d[g].open"),
            Gap(
                "a write that ends after its room confirms",
                "may_be_done(n, c) & live(p[n].phase) & !confirms_all(n, c)",
                "live(p[n].phase)",
            ),
        ),
    ),
    (
        _LOSES,
        (
            Gap("success that decode may not have heard is forgotten", "  if p[n].told then\n    unlink(n);", "p[n].told"),
            Gap("a part counts twice", "return live(d[g].phase) & !d[g].confirmed[c];", "!d[g].confirmed[c]"),
            Gap(
                "a live room is in doubt (prefill)",
                '"P.drain_deadline > lease.unknown:REVOKING"\n    p[n].lease = Revoking',
                "p[n].lease = Revoking",
            ),
            Gap(
                "a live room is in doubt (decode)",
                '"D.drain_deadline > lease.unknown:REVOKING"\n    d[g].lease = Revoking',
                "d[g].lease = Revoking",
            ),
            Gap("a write that goes on is settled", "p[n].write[c] = Doubtful & last_write(n, c)", "p[n].write[c] = Doubtful"),
        ),
    ),
    (
        _GIVES_UP,
        (
            Gap("a live room is forgotten", "p[n].linked & concluded(p[n].phase) & !writing(n)\n  ==>", "concluded(p[n].phase)"),
            Gap(
                "a room with writes under way is forgotten",
                "p[n].linked & concluded(p[n].phase) & !writing(n)\n  ==>",
                "!writing(n)",
            ),
        ),
    ),
    (_ALONE, (Gap("who offers late learns no verdict", "    elsif p_refuses then", "p_refuses", "false"),)),
)


def with_gaps(model: str, gaps: Sequence[Gap]) -> str:
    """`model` with all `gaps`, of which first state number k opens the k-th, counted from 1, and number 0 none.

    Raises ConfigError when a guard is not where it is looked for, once.
    """
    edits = []
    for number, gap in enumerate(gaps, 1):
        if model.count(gap.where) != 1 or gap.where.count(gap.guard) != 1:
            raise ConfigError(f"gap {gap.name!r}: its guard occurs {model.count(gap.where)} times in the specification, not once")
        begin = model.index(gap.where) + gap.where.index(gap.guard)
        edits.append((begin, begin + len(gap.guard), number, gap))
    opened: dict[tuple[int, int], str] = {}
    for begin, end, number, gap in edits:
        text = opened.get((begin, end), gap.guard)
        if not gap.instead:
            opened[begin, end] = f"if gap != {number} then {text} end;"
        else:
            opened[begin, end] = f"(gap = {number} ? {gap.instead} : {text})"
    for (begin, end), text in sorted(opened.items(), reverse=True):
        model = model[:begin] + text + model[end:]
    model = model.replace("\nvar\n", f"\nvar\n  gap: 0..{len(gaps)};\n", 1)
    begin = model.index("startstate\nbegin\n")
    end = model.index("\nend;", begin) + len("\nend;")
    start = model[begin:end].replace("begin\n", "begin\n  gap := number;\n", 1)
    return f"{model[:begin]}ruleset number: 0..{len(gaps)} do\n{start}\nend;{model[end:]}"


def check(model: str, scope: Mapping[str, int], gaps: Sequence[Gap]) -> list[spec_rumur.Run]:
    """One run for each gap, and before them one without."""
    text = with_gaps(spec_rumur.with_constants(model, scope), gaps)
    with spec_rumur.program(text, optimise="-O0", timeout_s=_TIMEOUT_S) as run_from:
        return [run_from(number) for number in range(1, len(gaps) + 1)]
