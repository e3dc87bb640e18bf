"""The faults of the chaos run: what is done to the processes of a scene, and how each of its rooms may end because of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs

from pd_fsm.testing.chaos_scene import BOUND, HTTP_TIMEOUT_MS, Scene

SUCCESS = "SUCCESS$"


@attrs.frozen
class Fault:
    """`expect` maps "side.group" to a pattern of allowed outcomes ("cause: reason"); whatever it does not name succeeds."""

    name: str
    inject: Callable[[Scene], None]
    expect: Mapping[str, str] = attrs.field(factory=dict)
    deadlines: Mapping[str, int] = attrs.field(factory=dict)
    proxied: str = ""
    quick: bool = False

    def allowed(self, side: str, group: str) -> str:
        return self.expect.get(f"{side}.{group}", SUCCESS)


def rooms(side: str, pattern: str, *groups: str) -> dict[str, str]:
    """The same expectation for several groups."""
    return {f"{side}.{group}": pattern for group in groups}


def either(*patterns: str) -> str:
    return "|".join(patterns)


# --- kill -9 -----------------------------------------------------------------------------------------------------------------


def kill_prefill(scene: Scene) -> None:
    scene.launch()
    scene.some_time()
    scene.kill("prefill")
    scene.until_over("decode", "parked", *BOUND)
    scene.open_during("decode")
    scene.start("prefill")


def kill_decode(scene: Scene) -> None:
    scene.launch()
    scene.some_time()
    scene.kill("decode")
    scene.until_over("prefill", *BOUND)
    scene.open_during("prefill")
    scene.start("decode")


def kill_bootstrap(scene: Scene) -> None:
    scene.launch()
    scene.kill("bootstrap")
    scene.open_during("decode")
    scene.until_waits_for(r"Cannot connect to host 127\.0\.0\.1")
    scene.start("bootstrap")


def kill_prefill_and_bootstrap(scene: Scene) -> None:
    scene.launch()
    scene.some_time()
    scene.kill("bootstrap", "prefill")
    scene.until_over("decode", "parked", *BOUND)
    scene.open_during("decode")
    scene.start("bootstrap", "prefill")


def kill_both(scene: Scene) -> None:
    """Decode is back first, and the bootstrap server still sends it to the dead prefill, for rooms that this one had announced."""
    scene.launch()
    scene.some_time()
    scene.kill("prefill", "decode")
    scene.start("decode")
    scene.open("decode", scene.of("early"))
    scene.start("prefill")


PREFILL_DEAD = r"peer_lost: prefill-0 is lost: (nobody listens at tcp://|it was replaced by)"
DECODE_DEAD = r"peer_lost: decode-0 is lost: (nobody listens at tcp://|it was replaced by)"
WRITE_BROKE = r"transport: write of chunk \d+ to decode-0 failed: the connection was given up$"
# Data and messages have connections of their own, so a write may be refused before the word comes that decode gave the room up.
WRITE_REFUSED = r"transport: write of chunk \d+ to decode-0 failed: refused by the receiver: generation \d+ is not exposed"
DEAD_PREFILL = rooms("decode", PREFILL_DEAD, "parked", "waiting", "late", "moving") | {
    "decode.flight": either(SUCCESS, PREFILL_DEAD)
}


# --- SIGSTOP -----------------------------------------------------------------------------------------------------------------


def stop_until_suspect(victim: str, observer: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.launch()
        scene.some_time()
        scene.stop(victim)
        scene.until_peer(observer, "SUSPECT")
        scene.open_during(observer)
        scene.resume(victim)

    return inject


def stop_until_over(victim: str, observer: str, *groups: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.launch()
        scene.some_time()
        scene.stop(victim)
        scene.until_over(observer, *groups)
        scene.open_during(observer)
        scene.resume(victim)

    return inject


LOST_MS = {"lost_ms": 1_500}
TRANSFER_MS = {"transfer_ms": 1_500}
PREFILL_SILENT = r"peer_lost: prefill-0 is lost: it was silent for \d+ ms$"
DECODE_SILENT = r"peer_lost: decode-0 is lost: it was silent for \d+ ms$"
# Who was given up learns it from the other side's abort, from being called a stranger, or by the silence.
DECODE_GAVE_UP = either(
    r"peer_failed: decode-0 failed \(peer_lost\): prefill-0 is lost: it was silent",
    r"peer_lost: decode-0 is lost: it has given this session up$",
    DECODE_SILENT,
)
PREFILL_GAVE_UP = either(
    r"peer_failed: prefill-0 failed \(peer_lost\): decode-0 is lost: it was silent",
    r"peer_lost: prefill-0 is lost: it has given this session up$",
    PREFILL_SILENT,
)
STOPPED_PREFILL_LOST = (
    rooms("decode", PREFILL_SILENT, "parked", "waiting", "late", "moving")
    | rooms("prefill", DECODE_GAVE_UP, "waiting", "late", "moving")
    | {"decode.flight": either(SUCCESS, PREFILL_SILENT), "prefill.flight": either(SUCCESS, DECODE_GAVE_UP, WRITE_REFUSED)}
)
STOPPED_DECODE_LOST = (
    rooms("prefill", DECODE_SILENT, "waiting", "late", "moving")
    | rooms("decode", PREFILL_GAVE_UP, "waiting", "late", "moving", "parked")
    | {"prefill.flight": either(SUCCESS, DECODE_SILENT), "decode.flight": either(SUCCESS, PREFILL_GAVE_UP)}
)
TIMED_OUT = r"timeout: TRANSFERRING without progress for 1500 ms: "
PREFILL_TIMED_OUT = either(TIMED_OUT, r"peer_failed: decode-0 failed \(timeout\): TRANSFERRING without progress for 1500 ms: ")
DECODE_TIMED_OUT = either(TIMED_OUT, r"peer_failed: prefill-0 failed \(timeout\): TRANSFERRING without progress for 1500 ms: ")
TRANSFERS_TIMED_OUT = {
    "prefill.moving": PREFILL_TIMED_OUT,
    "decode.moving": DECODE_TIMED_OUT,
    "prefill.flight": either(SUCCESS, PREFILL_TIMED_OUT, WRITE_REFUSED),
    "decode.flight": either(SUCCESS, DECODE_TIMED_OUT),
}


# --- the network -------------------------------------------------------------------------------------------------------------


def reset_control(scene: Scene) -> None:
    scene.launch()
    scene.some_time()
    scene.proxy.reset()
    scene.open_during("decode")


def reset_data(scene: Scene) -> None:
    scene.proxy.stall()
    scene.launch()
    scene.until(lambda: scene.describe("prefill")["ops"] > 0, "writes are outstanding")
    scene.proxy.reset()
    scene.proxy.resume()
    scene.until_over("prefill", "flight")
    scene.open_during("decode")


def half_open_control_until_suspect(scene: Scene) -> None:
    scene.proxy.stall()
    scene.launch()
    for side in ("decode", "prefill"):
        scene.until_peer(side, "SUSPECT")
    scene.proxy.resume()


def half_open_control(*directions: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.launch()
        scene.some_time()
        scene.proxy.stall(*directions)
        for side in ("decode", "prefill"):
            scene.until_over(side, *BOUND)
        scene.open_during("decode")
        scene.proxy.resume()

    return inject


def half_open_data(*directions: str, reset: bool = False) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.proxy.stall(*directions)
        scene.launch()
        scene.until_over("prefill", "moving", "flight")
        held = {lease["room"]: lease["state"] for lease in scene.describe("prefill")["leases"] if lease["holders"]}
        scene.notes.append(f"while the data connection stood still, prefill held {len(held)} rooms: {sorted(set(held.values()))}")
        seen = scene.rooms("prefill")
        early = [room for room in held if seen[room][2]]  # ZeroMQ may still read what is listed
        if early or not held:
            scene.wrong.append(f"writes are outstanding, prefill holds {held}, and gave the pages of {early} back")
        scene.open_during("decode")
        if reset:
            scene.proxy.reset()
        scene.proxy.resume()

    return inject


BOTH_SILENT = (
    rooms("decode", PREFILL_GAVE_UP, "parked", "waiting", "late", "moving")
    | rooms("prefill", DECODE_GAVE_UP, "waiting", "late", "moving")
    | {"decode.flight": either(SUCCESS, PREFILL_GAVE_UP), "prefill.flight": either(SUCCESS, DECODE_GAVE_UP, WRITE_REFUSED)}
)


# --- the bootstrap server ----------------------------------------------------------------------------------------------------

SLOW_S = 3 * HTTP_TIMEOUT_MS / 1e3
LIES = (
    b"\x00\xff\xfe garbage \r\n\r\n",
    b"",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{]nonsense",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    b'HTTP/1.1 200 OK\r\nContent-Length: 37\r\n\r\n{"rooms": {"x": "zero"}, "dp_size": 2}',
    b'HTTP/1.1 200 OK\r\nContent-Length: 37\r\n\r\n{"peers": [{"incarnation":1}], "a": 1}',
    b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<html>",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
)


def vanish(scene: Scene) -> None:
    scene.launch()
    scene.kill("bootstrap")
    scene.until_over("decode", "asking", "parked")
    scene.until_over("prefill", "early")
    scene.open_during("decode")
    scene.start("bootstrap")


def answer_slowly(scene: Scene) -> None:
    scene.launch()
    scene.proxy.delay(SLOW_S)
    scene.open_during("decode")
    scene.until_waits_for(rf"no answer within {HTTP_TIMEOUT_MS} ms")
    scene.until(lambda: "no answer" in scene.describe("prefill")["registration"], "prefill says that it is not registered")
    scene.proxy.resume()


def answer_garbage(scene: Scene) -> None:
    scene.launch()
    scene.proxy.lie(LIES)
    scene.open_during("decode")
    scene.until_waits_for("(is not valid|was refused|http://127.0.0.1.*(400|Disconnected|payload|garbage|chunk|Bad))")
    scene.until(lambda: scene.describe("prefill")["registration"] != "ok", "prefill says that it is not registered")
    scene.proxy.resume()


STILL_BOOTSTRAPPING = r"timeout: still BOOTSTRAPPING after 4000 ms: "

FAULTS = (
    Fault("kill-prefill", kill_prefill, DEAD_PREFILL, quick=True),
    Fault(
        "kill-decode",
        kill_decode,
        rooms("prefill", DECODE_DEAD, "waiting", "late", "moving") | {"prefill.flight": either(SUCCESS, DECODE_DEAD, WRITE_BROKE)},
        quick=True,
    ),
    # Who is bound to the dead process before its connection is refused fails with it; the others wait for its successor.
    Fault("kill-both", kill_both, {"decode.early": either(SUCCESS, PREFILL_DEAD)}),
    Fault("kill-bootstrap", kill_bootstrap),
    Fault("kill-prefill-and-bootstrap", kill_prefill_and_bootstrap, DEAD_PREFILL),
    Fault("stop-prefill-suspect", stop_until_suspect("prefill", "decode")),
    Fault("stop-prefill-lost", stop_until_over("prefill", "decode", "parked", *BOUND), STOPPED_PREFILL_LOST, LOST_MS),
    Fault("stop-prefill-transfer", stop_until_over("prefill", "decode", "moving"), TRANSFERS_TIMED_OUT, TRANSFER_MS),
    Fault("stop-decode-suspect", stop_until_suspect("decode", "prefill")),
    Fault("stop-decode-lost", stop_until_over("decode", "prefill", *BOUND), STOPPED_DECODE_LOST, LOST_MS, quick=True),
    Fault("stop-decode-transfer", stop_until_over("decode", "prefill", "moving"), TRANSFERS_TIMED_OUT, TRANSFER_MS),
    Fault("reset-control", reset_control, proxied="control"),
    Fault(
        "reset-data",
        reset_data,
        {
            "prefill.flight": WRITE_BROKE,
            "decode.flight": r"peer_failed: prefill-0 failed \(transport\): write of chunk \d+ to decode-0 failed: the connection",
        },
        proxied="data",
        quick=True,
    ),
    Fault("half-open-control-suspect", half_open_control_until_suspect, proxied="control"),
    Fault("half-open-control", half_open_control(), BOTH_SILENT, LOST_MS, "control"),
    Fault("half-open-control-to-prefill", half_open_control("up"), BOTH_SILENT, LOST_MS, "control"),
    Fault("half-open-control-to-decode", half_open_control("down"), BOTH_SILENT, LOST_MS, "control"),
    Fault("half-open-data", half_open_data(), TRANSFERS_TIMED_OUT, TRANSFER_MS, "data"),
    Fault("half-open-data-to-decode", half_open_data("up"), TRANSFERS_TIMED_OUT, TRANSFER_MS, "data"),
    Fault("half-open-data-to-prefill", half_open_data("down"), TRANSFERS_TIMED_OUT, TRANSFER_MS, "data"),
    Fault("half-open-data-then-reset", half_open_data(reset=True), TRANSFERS_TIMED_OUT, TRANSFER_MS, "data"),
    Fault(
        "bootstrap-vanishes",
        vanish,
        {
            "decode.asking": STILL_BOOTSTRAPPING + r"no prefill rank was found: http://127\.0\.0\.1:\d+: Cannot connect to host",
            # Its offer is not accepted before prefill opens the room, and until then the same deadline counts.
            "decode.parked": r"timeout: still WAITING_FOR_INPUT after 4000 ms: prefill-0 has not opened the room$",
            "prefill.early": STILL_BOOTSTRAPPING + r"0 of 1 decode ranks have offered pages$",
        },
        {"bootstrap_ms": 4_000},
    ),
    Fault("bootstrap-slow", answer_slowly, proxied="bootstrap"),
    Fault("bootstrap-garbage", answer_garbage, proxied="bootstrap", quick=True),
)
