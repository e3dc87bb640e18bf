"""What the explorer looks at: how many processes, rooms, chunks and faults. Each scope is small enough to be looked at whole.

The numbers of states and edges are pinned: a change of behaviour moves them, and must be understood before they are moved
(`pd-fsm check --pin` prints the new ones). The specification in Murphi counts the same states.
"""

from __future__ import annotations

import attrs


@attrs.frozen(kw_only=True)
class Scope:
    """One small world, and how much may go wrong in it.

    `opens`, `aborts`: how often each prefill and each decode opens the room, and gives it up. `losses`, `duplicates`: of frames, in
    all. `failures`, `unknowns`: writes that end so. `crashes`: kill -9 and restart, of each prefill and of each decode. `silences`:
    peers given up because nothing was heard. `deadlines`: rooms run out of time at "any" moment, or when all is "quiet": nothing is
    under way and nobody can open the room any more, which is how it goes when deadlines are far longer than ways. `expiry`:
    tombstones and early offers lapse. `vouches`, `notifies`: what the data plane can do. `granted_late`: decode reserves its pages
    when prefill is done. `residual`: bytes of a dead writer may still be in the network. `met`: the handshake is over. `rude`: in
    every state of a core, every message from everybody is tried, and every write is reported again.
    """

    name: str
    about: str
    prefills: int = 1
    decodes: int = 1
    opens: tuple[int, int] = (1, 1)
    chunks: int = 1
    aborts: tuple[int, int] = (0, 0)
    losses: int = 0
    duplicates: int = 0
    failures: int = 0
    unknowns: int = 0
    crashes: tuple[int, int] = (0, 0)
    silences: int = 0
    deadlines: str = attrs.field(default="quiet", validator=attrs.validators.in_(("none", "quiet", "any")))
    expiry: bool = False
    vouches: bool = False
    notifies: bool = False
    granted_late: bool = False
    residual: bool = False
    met: bool = True
    rude: bool = False
    states: int = 0
    edges: int = 0
    long: bool = False
    """Only `pd-fsm check --all` and `make verify-long` explore it."""


SCOPES = (
    Scope(name="smallest", about="one room, one chunk, prefill may give it up", aborts=(1, 0), states=10_668, edges=50_884),
    Scope(
        name="aborts",
        about="both engines give up, and the room runs out of time whenever",
        aborts=(1, 1),
        deadlines="any",
        states=81_992,
        edges=414_524,
    ),
    Scope(name="chunks", about="two chunks, a write that fails", chunks=2, failures=1, states=42_731, edges=214_210),
    Scope(
        name="unknown", about="a write of unknown outcome, decode gives up", unknowns=1, aborts=(0, 1), states=21_960, edges=107_276
    ),
    Scope(
        name="reuse", about="prefill gives up and opens the room again", opens=(2, 1), aborts=(1, 0), states=24_603, edges=121_055
    ),
    Scope(name="loss", about="a frame is lost, decode gives up", losses=1, aborts=(0, 1), states=36_368, edges=215_985),
    Scope(name="duplicates", about="two frames come twice", duplicates=2, states=8_091, edges=46_808),
    Scope(
        name="readers",
        about="one prefill rank writes to two decode ranks",
        decodes=2,
        deadlines="none",
        states=134_581,
        edges=876_316,
    ),
    Scope(name="crash", about="prefill is killed and comes back", crashes=(1, 0), states=12_827, edges=56_454),
    Scope(name="crash-decode", about="decode is killed and comes back", crashes=(0, 1), states=14_492, edges=66_186),
    Scope(
        name="residual",
        about="prefill is killed, its bytes are still under way",
        crashes=(1, 0),
        residual=True,
        unknowns=1,
        states=49_600,
        edges=257_491,
    ),
    Scope(name="silence", about="one side gives the other up though it lives", silences=1, states=34_848, edges=160_085),
    Scope(name="handshake", about="nobody knows anybody, a frame is lost", met=False, losses=1, states=11_618, edges=57_027),
    Scope(name="grant", about="decode reserves its pages late", granted_late=True, states=7_204, edges=32_101),
    Scope(
        name="vouch",
        about="a data plane that vouches for its revokes, aborts",
        vouches=True,
        aborts=(1, 1),
        states=24_566,
        edges=115_446,
    ),
    Scope(name="notify", about="a data plane that notifies, aborts", notifies=True, aborts=(1, 1), states=30_836, edges=155_728),
    Scope(name="expiry", about="tombstones and early offers lapse", expiry=True, aborts=(1, 0), states=23_039, edges=116_815),
    Scope(
        name="rude",
        about="every message from everybody in every state",
        rude=True,
        aborts=(1, 1),
        unknowns=1,
        states=47_282,
        edges=238_430,
    ),
    Scope(
        name="writers",
        about="two prefill ranks write to one decode rank",
        prefills=2,
        deadlines="none",
        long=True,
        states=244_306,
        edges=1_514_183,
    ),
    Scope(name="reuse-both", about="both sides open the room twice", opens=(2, 2), long=True, states=619_486, edges=4_290_618),
    Scope(
        name="loss-more",
        about="one frame is lost, one comes twice, both give up",
        losses=1,
        duplicates=1,
        aborts=(1, 1),
        long=True,
        states=197_729,
        edges=1_493_033,
    ),
    Scope(
        name="handshake-crash",
        about="a handshake with a loss and a kill",
        met=False,
        losses=1,
        crashes=(1, 0),
        long=True,
        states=44_828,
        edges=250_558,
    ),
    Scope(
        name="grant-abort",
        about="decode reserves late and gives up",
        granted_late=True,
        aborts=(0, 1),
        long=True,
        states=91_231,
        edges=561_427,
    ),
    Scope(
        name="rude-crash",
        about="every message in every state, after a kill",
        rude=True,
        crashes=(1, 1),
        long=True,
        states=60_487,
        edges=297_716,
    ),
)
