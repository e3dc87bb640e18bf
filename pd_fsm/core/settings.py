"""Every bound and every deadline of a session, with its unit in its name.

A queue, table or wait that is not bounded by a name of this module is a bug.
"""

from __future__ import annotations

import attrs


def _positive(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    if value <= 0:
        raise ValueError(f"{attribute.name} must be positive, not {value}")


@attrs.frozen(kw_only=True)
class Deadlines:
    """How long each phase and each obligation may take, in milliseconds. Every one is measured on the local monotonic clock."""

    bootstrap_ms: int = attrs.field(default=300_000, validator=_positive)
    """From open() until every peer of the room is known and has opened it, too."""
    waiting_ms: int = attrs.field(default=300_000, validator=_positive)
    """From the bootstrap until the first chunk is handed in (sender) or the first part arrives (receiver). A sender that has the
    whole prompt and waits for decode's pages waits longer, as long as decode is heard: decode's own deadline bounds that."""
    transfer_ms: int = attrs.field(default=60_000, validator=_positive)
    """Without any progress while transferring."""
    handshake_ms: int = attrs.field(default=10_000, validator=_positive)
    """From the first Hello until the peer has answered."""
    heartbeat_ms: int = attrs.field(default=1_000, validator=_positive)
    """A peer that was silent this long is pinged; after `suspect_missed` of them it is suspected."""
    suspect_missed: int = attrs.field(default=3, validator=_positive)
    lost_ms: int = attrs.field(default=10_000, validator=_positive)
    """A peer that was silent this long is lost. One whose address refuses a connection is lost at once."""
    repeat_min_ms: int = attrs.field(default=50, validator=_positive)
    """First repetition of an unanswered message; doubles up to `repeat_max_ms`."""
    repeat_max_ms: int = attrs.field(default=2_000, validator=_positive)
    drain_ms: int = attrs.field(default=60_000, validator=_positive)
    """From a room's end until its memory is proven free. Then it is in doubt (Limits.quarantined_rooms_max), and is not freed."""
    early_offer_ms: int = attrs.field(default=30_000, validator=_positive)
    """How long an offer for a room that is not open yet is kept; its sender repeats it."""
    tombstone_ms: int = attrs.field(default=120_000, validator=_positive)
    """How long a cleared room's verdict is kept for peers that register late."""


@attrs.frozen(kw_only=True)
class Limits:
    """Upper bounds of a session's tables. Reaching one costs the room or the peer that did, never the session."""

    rooms_max: int = attrs.field(default=65_536, validator=_positive)
    peers_max: int = attrs.field(default=4_096, validator=_positive)
    early_offers_max: int = attrs.field(default=16_384, validator=_positive)
    early_offers_per_peer_max: int = attrs.field(default=8_192, validator=_positive)
    """So that one peer cannot take the places of all."""
    tombstones_max: int = attrs.field(default=65_536, validator=_positive)
    spent_generations_max: int = attrs.field(default=8_192, validator=_positive)
    """Concluded transfers remembered for each peer, so that a repeated offer of one cannot open it again."""
    quarantined_rooms_max: int = attrs.field(default=1_024, validator=_positive)
    """Rooms whose memory is in doubt. Reaching it does what `on_quarantine_full` says; it never releases any."""
    on_quarantine_full: str = attrs.field(default="stop_admitting", validator=attrs.validators.in_(("stop_admitting", "fail_stop")))
    """"stop_admitting" refuses new rooms until doubts are settled, "fail_stop" fails all rooms and admits none any more."""
    chunks_max: int = attrs.field(default=65_536, validator=_positive)
    """Chunks of one room."""
    outbox_messages_max: int = attrs.field(default=16_384, validator=_positive)
    """Control messages queued for one peer that does not read."""
    in_flight_bytes_max: int = attrs.field(default=64 << 20, validator=_positive)
    """Page bytes on their way to one peer, for transports that queue them in this process."""


@attrs.frozen(kw_only=True)
class Topology:
    """Where this rank stands in its engine's parallel layout. Ranks count from 0."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1

    def __attrs_post_init__(self) -> None:
        for axis in ("tp", "pp", "cp", "dp"):
            rank, size = getattr(self, f"{axis}_rank"), getattr(self, f"{axis}_size")
            if not 0 <= rank < size:
                raise ValueError(f"{axis}_rank must be in 0..{size - 1} for {axis}_size={size}, not {rank}")
