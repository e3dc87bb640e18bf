"""The timeline reads what sessions wrote, whole or cut short, and shows every state where and when it was."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pd_fsm.runtime.timeline import Life, RoomTrace, TraceError, audit, read, timeline
from pd_fsm.runtime.timeline_perfetto import chrome_trace
from pd_fsm.runtime.timeline_svg import COLOURS, ROOMS_MAX, draw, short_room

SVG = "{http://www.w3.org/2000/svg}"
BIG_ROOM = 2**62 + 12_345  # a JavaScript number cannot hold it


class Trace:
    """Writes the lines of one session by hand."""

    def __init__(self, session: str, role: str) -> None:
        self.common = {"session": session, "role": role}
        self.lines: list[str] = []

    def put(self, t_ms: float, machine: str, event: str, **fields: Any) -> Trace:
        self.lines.append(json.dumps({"t_ms": t_ms, **self.common, "machine": machine, "event": event, **fields}))
        return self

    def open(self, t_ms: float, incarnation: str = "aa") -> Trace:
        return self.put(t_ms, "session", "open", incarnation=incarnation, pid=17)

    def close(self, t_ms: float) -> Trace:
        return self.put(t_ms, "session", "close", incarnation="aa", pid=17)

    def room(self, t_ms: float, room: int, event: str, before: str, after: str, *, generation: int = 1, **more: Any) -> Trace:
        return self.put(
            t_ms, "room", event, room=room, generation=generation, row=f"room.{event}", before=before, after=after, **more
        )

    def lease(self, t_ms: float, room: int, event: str, before: str, after: str) -> Trace:
        return self.put(t_ms, "lease", event, room=room, generation=1, row=f"lease.{event}", before=before, after=after)

    def up_to_transfer(self, t_ms: float, room: int) -> Trace:
        self.room(t_ms, room, "open", "", "BOOTSTRAPPING")
        self.room(t_ms + 10, room, "peer_ready", "BOOTSTRAPPING", "WAITING_FOR_INPUT")
        self.lease(t_ms + 10, room, "expose", "PRIVATE", "EXPOSED")
        return self.room(t_ms + 30, room, "start", "WAITING_FOR_INPUT", "TRANSFERRING")

    def success(self, t_ms: float, room: int) -> Trace:
        """A whole room of 100 ms, cleared 20 ms later."""
        self.up_to_transfer(t_ms, room)
        self.room(t_ms + 60, room, "part_settled", "TRANSFERRING", "TRANSFERRING", bytes=1000)
        self.room(t_ms + 100, room, "part_settled", "TRANSFERRING", "SUCCESS", bytes=4096)
        self.lease(t_ms + 100, room, "conclude", "EXPOSED", "QUIESCED")
        return self.room(t_ms + 120, room, "clear", "SUCCESS", "", bytes=4096)

    def failure(self, t_ms: float, room: int, reason: str) -> Trace:
        """Fails in the transfer after 50 ms; the memory is owed for 200 ms more."""
        self.up_to_transfer(t_ms, room)
        self.room(t_ms + 50, room, "fail", "TRANSFERRING", "FAILED", reason=reason)
        self.lease(t_ms + 50, room, "conclude", "EXPOSED", "REVOKING")
        self.lease(t_ms + 250, room, "settled", "REVOKING", "QUIESCED")
        return self.room(t_ms + 260, room, "clear", "FAILED", "")

    def text(self, cut: int = 0) -> str:
        """As a file; `cut` bytes are missing at the end, as after a kill -9."""
        text = "".join(line + "\n" for line in self.lines)
        return text[: len(text) - cut]

    def write(self, path: Path, cut: int = 0) -> Path:
        path.write_text(self.text(cut))
        return path


def only_room(life: Life) -> RoomTrace:
    (room,) = life.rooms.values()
    return room


def spans(room: RoomTrace) -> list[tuple[str, float, float]]:
    return [(span.state, span.start_ms, span.end_ms) for span in room.phase.spans]


# reading


def test_a_whole_life_gives_every_phase_and_lease_with_its_times(tmp_path: Path) -> None:
    path = Trace("prefill-0", "prefill").open(1000).success(2000, BIG_ROOM).close(3000).write(tmp_path / "p.ndjson")
    (life,) = read([path])
    room = only_room(life)
    assert (life.session, life.role, life.incarnation, life.pid, life.closed, life.torn) == (
        "prefill-0",
        "prefill",
        "aa",
        17,
        True,
        0,
    )
    assert spans(room) == [
        ("BOOTSTRAPPING", 2000, 2010),
        ("WAITING_FOR_INPUT", 2010, 2030),
        ("TRANSFERRING", 2030, 2100),
        ("SUCCESS", 2100, 2120),
    ]
    assert [(span.state, span.start_ms, span.end_ms) for span in room.lease.spans] == [
        ("EXPOSED", 2010, 2100),
        ("QUIESCED", 2100, 3000),
    ]
    assert (room.room, room.verdict, room.concluded_ms, room.bytes, room.cleared) == (BIG_ROOM, "SUCCESS", 2100, 4096, True)
    assert audit([life]) == []


def test_a_failure_keeps_its_reason_and_the_first_verdict_stands(tmp_path: Path) -> None:
    trace = Trace("decode-0", "decode").open(0).failure(100, 7, "prefill-0 died")
    trace.lines.insert(-3, Trace("decode-0", "decode").room(200, 7, "fail", "FAILED", "FAILED", reason="and then that").lines[0])
    trace.close(900)
    room = only_room(read([trace.write(tmp_path / "d.ndjson")])[0])
    assert (room.verdict, room.reason, room.concluded_ms) == ("FAILED", "prefill-0 died", 150)


@pytest.mark.parametrize("cut", [1, 2, 30, 200])
def test_a_torn_last_line_ends_the_life_at_its_last_whole_line(tmp_path: Path, cut: int) -> None:
    trace = Trace("prefill-0", "prefill").open(0).up_to_transfer(100, 7)
    cut = min(cut, len(trace.lines[-1]))
    (life,) = read([trace.write(tmp_path / "p.ndjson", cut=cut)])
    whole = cut == 1  # only the newline is missing: the line itself is whole
    assert life.torn == (0 if whole else 1)
    assert not life.closed
    assert only_room(life).verdict == ""
    assert spans(only_room(life))[-1] == (("TRANSFERRING", 130, 130) if whole else ("WAITING_FOR_INPUT", 110, 110))


@pytest.mark.parametrize("in_one_file", [True, False])
@pytest.mark.parametrize("cut", [0, 25])
def test_a_restart_is_a_second_life_whether_appended_or_in_another_file(tmp_path: Path, in_one_file: bool, cut: int) -> None:
    first = Trace("prefill-0", "prefill").open(0, "aa").up_to_transfer(100, 7).up_to_transfer(140, 8)
    second = Trace("prefill-0", "prefill").open(500, "bb").success(600, 7).close(800)
    if in_one_file:  # after a kill the new life's first line may follow the torn one without a newline
        paths = [tmp_path / "p.ndjson"]
        paths[0].write_text(first.text(cut) + second.text())
    else:
        paths = [second.write(tmp_path / "p2.ndjson"), first.write(tmp_path / "p1.ndjson", cut)]
    old, new = read(paths)
    assert (old.number, old.incarnation, old.title, old.torn) == (1, "aa", "prefill-0", int(cut > 0))
    assert (new.number, new.incarnation, new.title, new.torn) == (2, "bb", "prefill-0 (life 2)", 0)
    assert {room for room, _ in old.rooms} == {7, 8}
    assert only_room(new).verdict == "SUCCESS"
    assert audit([old, new]) == []


def test_generations_of_one_room_are_kept_apart(tmp_path: Path) -> None:
    trace = Trace("decode-0", "decode").open(0)
    for generation in (1, 2):
        t_ms = generation * 100.0
        trace.room(t_ms, 7, "open", "", "BOOTSTRAPPING", generation=generation)
        trace.room(t_ms + 5, 7, "fail", "BOOTSTRAPPING", "FAILED", generation=generation, reason=f"attempt {generation}")
        trace.room(t_ms + 9, 7, "clear", "FAILED", "", generation=generation)
    (life,) = read([trace.close(400).write(tmp_path / "d.ndjson")])
    assert {key: room.reason for key, room in life.rooms.items()} == {(7, 1): "attempt 1", (7, 2): "attempt 2"}


def test_an_empty_file_is_no_life(tmp_path: Path) -> None:
    path = tmp_path / "empty.ndjson"
    path.touch()
    assert read([path]) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# notes\nand more\n", "notes.txt:1 "),
        ("{}\n", "notes.txt:1 "),
        ("\x00\xff\n", "notes.txt:1 "),
        (Trace("a", "decode").open(0).text() + "garbage\n" + Trace("a", "decode").close(9).text(), "notes.txt:2 "),
        (Trace("a", "decode").open(0).text() + "garbage\nmore\n", "notes.txt:2 "),
    ],
)
def test_what_is_no_trace_is_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(TraceError, match=re.escape(message)):
        timeline([path], svg=tmp_path / "out.svg")
    assert not (tmp_path / "out.svg").exists()


# audit


def test_audit_names_what_a_trace_lacks(tmp_path: Path) -> None:
    trace = Trace("decode-0", "decode").open(0)
    trace.up_to_transfer(100, 1)  # never concludes
    trace.failure(100, 2, "")  # no reason
    trace.success(100, 3).lines.pop()  # never cleared
    trace.room(200, 4, "start", "WAITING_FOR_INPUT", "TRANSFERRING")  # its beginning is missing
    trace.room(210, 4, "fail", "BOOTSTRAPPING", "FAILED", reason="x").room(
        220, 4, "clear", "FAILED", ""
    )  # a step that does not continue
    trace.failure(300, 5, "y").lines.pop(-2)  # the lease is still revoking
    findings = audit(read([trace.close(900).write(tmp_path / "d.ndjson")]))
    expected = {
        1: "never concluded; last seen in TRANSFERRING",
        2: "failed without a reason",
        3: "never cleared",
        4: "first phase is TRANSFERRING",
        5: "lease ended in REVOKING",
    }
    for room, words in expected.items():
        assert any(f"room {room}:" in finding and words in finding for finding in findings), (room, findings)
    assert any("room 4:" in finding and "starts from BOOTSTRAPPING, but it was in TRANSFERRING" in finding for finding in findings)


def test_audit_wants_a_close_unless_a_later_life_follows(tmp_path: Path) -> None:
    path = Trace("decode-0", "decode").open(0).success(10, 1).write(tmp_path / "d.ndjson")
    assert any("without a close" in finding for finding in audit(read([path])))


def test_audit_sees_a_clock_that_runs_backwards(tmp_path: Path) -> None:
    path = Trace("decode-0", "decode").open(1000).success(10, 1).close(2000).write(tmp_path / "d.ndjson")
    assert any("backwards" in finding for finding in audit(read([path])))


# Perfetto


def demo_like(tmp_path: Path) -> list[Path]:
    killed = Trace("prefill-0", "prefill").open(0, "aa").success(100, 1).up_to_transfer(200, BIG_ROOM)
    reborn = Trace("prefill-0", "prefill").open(700, "bb").success(800, 3).close(1000)
    decode = Trace("decode-0", "decode").open(5).success(101, 1).failure(202, BIG_ROOM, "prefill-0 <lost> & gone")
    decode.put(252, "peer", "lost", peer="prefill-0", row="peer.lost:READY", before="READY", after="LOST", reason="refused")
    decode.success(801, 3).close(1001)
    return [
        killed.write(tmp_path / "p0.ndjson", cut=20),
        reborn.write(tmp_path / "p0-2.ndjson"),
        decode.write(tmp_path / "d0.ndjson"),
    ]


def test_chrome_trace_has_every_phase_lease_failure_and_peer_change(tmp_path: Path) -> None:
    events = chrome_trace(read(demo_like(tmp_path)))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert sorted(names.values()) == ["decode-0", "prefill-0", "prefill-0 (life 2)"]
    decode = next(pid for pid, name in names.items() if name == "decode-0")
    slices = [event for event in events if event["ph"] == "X" and event["pid"] == decode]
    transferring = [event for event in slices if event["name"] == "TRANSFERRING" and event["args"]["room"] == "1"]
    assert [(event["ts"], event["dur"]) for event in transferring] == [(131_000, 70_000)]
    assert transferring[0]["args"] == {"room": "1", "generation": 1, "bytes": 4096, "reason": ""}
    revoking = [event for event in slices if event["name"] == "lease REVOKING"]
    assert [(event["ts"], event["dur"], event["args"]["room"]) for event in revoking] == [(252_000, 200_000, str(BIG_ROOM))]
    instants = {(event["name"], event["ts"]) for event in events if event["ph"] == "i" and event["pid"] == decode}
    assert ("failed: prefill-0 <lost> & gone", 252_000) in instants
    assert ("prefill-0 LOST", 252_000) in instants


def test_chrome_trace_slices_of_a_lane_nest_or_follow(tmp_path: Path) -> None:
    trace = Trace("decode-0", "decode").open(0)
    for number in range(12):
        trace.success(100 + 37 * number, number)  # 120 ms each: up to four at a time
    trace.lines[1:] = sorted(trace.lines[1:], key=lambda line: float(json.loads(line)["t_ms"]))
    events = chrome_trace(read([trace.close(2000).write(tmp_path / "d.ndjson")]))["traceEvents"]
    lanes: dict[int, list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            lanes.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert sum(len(lane) for lane in lanes.values()) == 12 * (1 + 4 + 2)  # the room, its phases, its leases
    for lane in lanes.values():
        for a_start, a_end in lane:
            for b_start, b_end in lane:
                apart = a_end <= b_start or b_end <= a_start
                nested = (a_start <= b_start and b_end <= a_end) or (b_start <= a_start and a_end <= b_end)
                assert apart or nested


# the picture


def bars(svg: str, room: int) -> list[tuple[str, float, float, float]]:
    """(class, x, y, width) of the rectangles of a room, in order of drawing."""
    found = []
    for rect in ET.fromstring(svg).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and f"room {room}" in (title.text or "").replace(":", " ").split(" generation")[0] + " ":
            found.append((rect.attrib["class"], float(rect.attrib["x"]), float(rect.attrib["y"]), float(rect.attrib["width"])))
    return found


def texts(svg: str) -> list[str]:
    """What is readable in the picture, without the tooltips."""
    found = []
    for text in ET.fromstring(svg).iter(f"{SVG}text"):
        title = text.find(f"{SVG}title")
        found.append(((text.text or "") if title is None else (text.text or "") + (title.tail or "")).strip())
    return found


def test_picture_shows_both_sides_failures_and_the_restart(tmp_path: Path) -> None:
    svg = draw(read(demo_like(tmp_path)))
    words = texts(svg)
    assert words[0] == "3 rooms: 2 succeeded, 1 failed"
    assert "decode-0: prefill-0 <lost> & gone" in words
    assert "prefill-0 died" in words
    assert "prefill-0 restarted" in words
    assert any("torn line" in word for word in words)
    for phase in COLOURS:
        assert phase in words, "the legend names every phase"
    for room in (1, BIG_ROOM, 3):
        assert short_room(room) in words
    assert words.count("prefill-0 → decode-0") == 3, "prefill's bar is above decode's"
    first = bars(svg, 1)
    assert [css for css, *_ in first] == ["BOOTSTRAPPING", "WAITING_FOR_INPUT", "TRANSFERRING", "SUCCESS"] * 2
    assert len({y for _, _, y, _ in first}) == 4, "prefill's and decode's bars lie below each other, each with a thin tail"
    failed = [css for css, *_ in bars(svg, BIG_ROOM)]
    assert "owed" in failed, "a verdict whose memory is still owed is visible"
    assert svg.count('class="cross"') == 1, "decode failed; the killed side has no verdict"


def test_picture_places_bars_in_proportion_to_time(tmp_path: Path) -> None:
    path = Trace("decode-0", "decode").open(0).success(1000, 1).close(1200).write(tmp_path / "d.ndjson")
    bootstrapping, waiting, transferring, success = bars(draw(read([path])), 1)
    per_ms = transferring[3] / 70
    assert bootstrapping[3] / 10 == pytest.approx(per_ms, rel=0.02)
    assert waiting[1] - bootstrapping[1] == pytest.approx(10 * per_ms, rel=0.02)
    assert success[1] == pytest.approx(transferring[1] + transferring[3], abs=0.2)


def test_picture_of_no_rooms_says_so(tmp_path: Path) -> None:
    path = Trace("decode-0", "decode").open(0).close(10).write(tmp_path / "d.ndjson")
    assert texts(draw(read([path]))) == ["No room was opened in these traces."]
    assert texts(draw([])) == ["No room was opened in these traces."]


def test_picture_of_very_many_rooms_says_how_many_are_left_out(tmp_path: Path) -> None:
    trace = Trace("decode-0", "decode").open(0)
    for room in range(ROOMS_MAX + 3):
        trace.room(room + 1.0, room, "open", "", "BOOTSTRAPPING")
    svg = draw(read([trace.write(tmp_path / "d.ndjson")]))
    assert any(word.startswith("3 more rooms") for word in texts(svg))
    assert not bars(svg, ROOMS_MAX)


def test_labels_of_deaths_and_restarts_do_not_overlap(tmp_path: Path) -> None:
    paths = []
    for index in range(4):
        name = f"prefill-{index}"
        Trace(name, "prefill").open(0).up_to_transfer(1000 + index, index).write(tmp_path / f"{name}.1")
        Trace(name, "prefill").open(1100 + index).success(3000, index).close(3300).write(tmp_path / f"{name}.2")
        paths += [tmp_path / f"{name}.1", tmp_path / f"{name}.2"]
    boxes = []
    for text in ET.fromstring(draw(read(paths))).iter(f"{SVG}text"):
        words = text.text or ""
        if words.endswith((" died", " restarted")):
            x, width = float(text.attrib["x"]), 5.5 * len(words)
            boxes.append((x - width if "end" in text.attrib["class"] else x, width, float(text.attrib["y"])))
    assert len(boxes) == 8
    for a in boxes:
        for b in boxes:
            assert a is b or a[2] != b[2] or a[0] + a[1] <= b[0] or b[0] + b[1] <= a[0]


def test_outputs_are_written_and_the_same_every_time(tmp_path: Path) -> None:
    paths = demo_like(tmp_path)
    outputs = []
    for folder in ("one", "two"):
        svg, trace = tmp_path / folder / "timeline.svg", tmp_path / folder / "trace.json"
        lives = timeline(paths, svg=svg, perfetto=trace)
        assert len(lives) == 3
        outputs.append((svg.read_bytes(), trace.read_bytes()))
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0][1])["traceEvents"]
    ET.fromstring(outputs[0][0])
