"""What a seed's world is like: a mix of its own, with many features off, so that rare combinations get their share.

A mix in which everything always happens a little finds little: rooms never live long enough, and one fault hides another. So each
feature is on in some seeds only, then with a strength of its own (swarm testing: Groce et al., ISSTA 2012).
"""

from __future__ import annotations

from random import Random

import msgspec

from pd_fsm.core.settings import Deadlines, Limits

PAGE_TOKENS = 4
DEADLINES = Deadlines(
    bootstrap_ms=6_000,
    waiting_ms=4_000,
    transfer_ms=3_000,
    handshake_ms=2_000,
    heartbeat_ms=500,
    lost_ms=3_000,
    repeat_max_ms=1_000,
    drain_ms=4_000,
    early_offer_ms=3_000,
    tombstone_ms=6_000,
)
"""Short, so that a simulated minute holds many of them; in the same order as the real ones."""
SMALL = Limits(
    rooms_max=24,
    peers_max=8,
    early_offers_max=6,
    early_offers_per_peer_max=4,
    tombstones_max=4,
    spent_generations_max=4,
    quarantined_rooms_max=2,
)
CALM = 0.15
"""The share of seeds in which nothing is done to the network, the data plane and the processes."""
_FAULTS = (
    *("lost", "delayed", "write_faults", "small_limits", "moves", "misfits"),
    *("crashes", "freezes", "cuts", "outages", "drains", "closes", "resets", "overflows"),
)
WRITE_FAULTS = ("failed", "part_failed", "unknown_lands", "unknown_never", "unknown_done", "hangs", "twice", "late_error", "slow")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """One mix. Shares are of 1; `*_faults` are how often something happens in a run; times are true milliseconds."""

    prefills: int = 1
    decodes: int = 1
    rooms: int = 10
    room_numbers: int = 1_000_000
    """How many different numbers the router hands out: with few, they come back while old lives are in the air."""
    horizon_ms: int = 6_000
    """How long the safety phase lasts."""
    # the network
    lost: float = 0.0
    copied: float = 0.0
    delayed: float = 0.0
    delay_ms_max: int = 0
    cut_holds: bool = False
    """A partition keeps frames until it ends, as a connection does, instead of losing them."""
    notices_death: bool = True
    """Broken connections and refused ones are seen and told, as by `zmq`; else only silence and strangers tell."""
    # the data plane
    write_ms: int = 0
    """How long every write takes at least."""
    notifies: bool = True
    vouches: bool = True
    """The receiving side places every byte itself and can prove that nothing lands after a revoke; else writes are one-sided."""
    residual_ms: int = 0
    write_faults: float = 0.0
    write_kinds: tuple[str, ...] = ()
    cancels: str = "stops"
    """What a cancelled (or orphaned) write does: "stops", "ignores" it and ends by itself, or its end is in doubt ("doubts")."""
    # processes
    lag_ms: int = 0
    """How long a loop may be busy elsewhere before it drives its session."""
    skew: float = 0.0
    """How much faster or slower than true time a process' clock may go."""
    small_limits: bool = False
    moves: float = 0.0
    """How likely a process that is started again takes another free address, maybe that of a neighbour."""
    misfits: float = 0.0
    """How likely a life has another layout than most."""
    rendezvous_ms: int = 1
    # what engines, operators and machines do
    late: float = 0.0
    prefix: float = 0.0
    two_readers: float = 0.0
    wrong_tokens: float = 0.0
    aborts: int = 0
    cancels_by_room: int = 0
    crashes: int = 0
    freezes: int = 0
    cuts: int = 0
    outages: int = 0
    drains: int = 0
    closes: int = 0
    resets: int = 0
    overflows: int = 0
    garbage: int = 0


def draw_options(random: Random) -> Options:
    """The mix of one seed."""

    def some(*values: int) -> int:
        return random.choice(values)

    def share(*values: float) -> float:
        return random.choice(values)

    def often(probability: float, most: int) -> int:
        return random.randint(1, most) if random.random() < probability else 0

    vouches = random.random() < 0.4
    kinds = tuple(kind for kind in WRITE_FAULTS if random.random() < 0.4) or (random.choice(WRITE_FAULTS),)
    options = Options(
        prefills=some(1, 1, 2, 2, 3),
        decodes=some(1, 2, 2, 3),
        rooms=some(8, 20, 40, 80),
        room_numbers=some(1, 2, 4, 8, 1_000_000, 1_000_000, 1_000_000),
        horizon_ms=some(2_000, 6_000, 12_000, 24_000),
        lost=share(0, 0, 0.01, 0.1, 0.3),
        copied=share(0, 0, 0.05, 0.3),
        delayed=share(0, 0, 0.1, 0.5),
        delay_ms_max=some(20, 300, 4_000),
        cut_holds=random.random() < 0.5,
        notices_death=random.random() < 0.7,
        write_ms=some(0, 0, 30, 400),
        notifies=random.random() < 0.5,
        vouches=vouches,
        residual_ms=some(0, 0, 500) if vouches else some(0, 500, 3_000),
        write_faults=share(0, 0, 0.1, 0.4),
        write_kinds=kinds,
        cancels=random.choice(("stops", "ignores", "doubts")),
        lag_ms=some(0, 0, 5, 60),
        skew=share(0, 0.0003, 0.03),
        small_limits=random.random() < 0.1,
        moves=share(0, 0, 0.7),
        misfits=share(0, 0, 0, 0.3),
        rendezvous_ms=some(1, 1, 40, 1_500),
        late=share(0, 0, 0.2, 0.7),
        prefix=share(0, 0, 0.3),
        two_readers=share(0, 0, 0.3),
        wrong_tokens=share(0, 0, 0, 0.1),
        aborts=often(0.5, 12),
        cancels_by_room=often(0.3, 10),
        crashes=often(0.35, 4),
        freezes=often(0.3, 3),
        cuts=often(0.35, 6),
        outages=often(0.2, 2),
        drains=often(0.2, 2),
        closes=often(0.2, 2),
        resets=often(0.2, some(6, 20)),
        overflows=often(0.25, some(2, 10)),
        garbage=often(0.3, some(5, 60, 300)),
    )
    return _calmed(options) if random.random() < CALM else options


def _calmed(options: Options) -> Options:
    """Only engines do something to their rooms, and all else is in order: then more can be asked of how rooms end."""
    nothing = Options()
    named = {name: getattr(nothing, name) for name in _FAULTS}
    return msgspec.structs.replace(options, room_numbers=1_000_000, rendezvous_ms=1, **named)
