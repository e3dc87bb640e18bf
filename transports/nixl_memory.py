"""Memory as NIXL sees it: what a side registered, how a peer learns of it, and copies as items of prepared descriptor lists.

A prepared list has one row for each region of a layout and numbers their pages and rows through, so that a plan becomes two arrays
of item numbers. It is made once for this side and once for each peer, and holds for every plan of whole items. What a peer says
about its memory is never trusted.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any

import attrs
import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from pd_fsm.errors import ConfigError, WireError
from pd_fsm.kv import KVLayout, Plan
from pd_fsm.kv.layout import Region
from pd_fsm.kv.registration import ADDRESS_BITS, blocks_to_register

VERSION = 1
MEMS = ("DRAM", "VRAM")
ITEMS_MAX = (1 << 31) - 1


class Descriptor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What travels in the handshake. Packed little-endian arrays, one entry a region: address uint64, items and item_bytes int64,
    device int32 (-1 - device for device memory). `probe` is the address of a byte that may be read to make the connection, or 0.
    `seal` covers everything, and whose it is."""

    version: int
    metadata: Annotated[bytes, Meta(max_length=2 << 20)]
    probe: Annotated[int, Meta(ge=0, lt=1 << ADDRESS_BITS)]
    address: Annotated[bytes, Meta(max_length=1 << 19)]
    items: Annotated[bytes, Meta(max_length=1 << 19)]
    item_bytes: Annotated[bytes, Meta(max_length=1 << 19)]
    device: Annotated[bytes, Meta(max_length=1 << 18)]
    seal: Annotated[bytes, Meta(min_length=32, max_length=32)]


_decode = msgspec.msgpack.Decoder(Descriptor).decode


@attrs.frozen(eq=False)
class Memory:
    """The regions of one side, one entry each: address uint64, items, item_bytes and device int64, `mem` an index into MEMS."""

    address: NDArray[np.uint64]
    items: NDArray[np.int64]
    item_bytes: NDArray[np.int64]
    device: NDArray[np.int64]
    mem: NDArray[np.int8]
    first: NDArray[np.int64]
    """Number of each region's first item in the prepared list of its kind of memory."""

    def rows(self, mem: int) -> NDArray[np.uint64]:
        """The prepared list of one kind of memory: uint64 [n, 5] of address, item bytes, device, stride, items."""
        chosen = self.mem == mem
        columns = (self.address, self.item_bytes, self.device, self.item_bytes, self.items)
        return np.column_stack([column[chosen].astype(np.uint64) for column in columns])

    def blocks(self, layout: KVLayout, mem: int) -> NDArray[np.uint64]:
        """What to register of one kind of memory: uint64 [n, 3] of address, bytes, device. Host memory is merged."""
        if MEMS[mem] == "DRAM":
            host = [(block.address, block.nbytes, 0) for block in blocks_to_register(layout) if block.host]
            return np.array(host, dtype=np.uint64)
        chosen = self.mem == mem
        columns = (self.address, self.items * self.item_bytes, self.device)
        return np.column_stack([column[chosen].astype(np.uint64) for column in columns])


def _memory(
    address: NDArray[np.uint64], items: NDArray[np.int64], item_bytes: NDArray[np.int64], packed_device: NDArray[np.int64]
) -> Memory:
    """Raises ValueError for regions that cannot exist."""
    if not len(address) == len(items) == len(item_bytes) == len(packed_device):
        raise ValueError("the lists of its regions differ in length")
    if len(items) and (items.min() < 1 or item_bytes.min() < 1 or (items > (1 << 48) // item_bytes).any()):
        raise ValueError("one of its regions has a size that no memory has")
    if (address >> np.uint64(ADDRESS_BITS)).any() or (address == 0).any():
        raise ValueError("one of its regions has an address that no memory has")
    mem = (packed_device < 0).astype(np.int8)
    first = np.zeros(len(items), dtype=np.int64)
    for kind in range(len(MEMS)):
        chosen = np.flatnonzero(mem == kind)
        ends = np.cumsum(items[chosen])
        if len(ends) and ends[-1] > ITEMS_MAX:
            raise ValueError(f"its regions have {ends[-1]} items, more than a prepared list can number")
        first[chosen] = ends - items[chosen]
    device = np.where(packed_device < 0, -1 - packed_device, packed_device)
    return Memory(address, items, item_bytes, device, mem, first)


def local_memory(layout: KVLayout) -> Memory:
    """The layout's regions. Raises ConfigError for what cannot be numbered."""
    regions = layout.regions
    try:
        return _memory(
            np.array([region.address for region in regions], dtype=np.uint64),
            np.array([region.items for region in regions], dtype=np.int64),
            np.array([region.item_bytes for region in regions], dtype=np.int64),
            np.array([_packed_device(region) for region in regions], dtype=np.int64),
        )
    except ValueError as error:
        raise ConfigError(f"transport 'nixl' cannot use this layout: {error}") from error


def _packed_device(region: Region) -> int:
    """0 for host memory, -1 - n for device n: a tensor or a raw buffer knows where it is."""
    if region.host:
        return 0
    device = getattr(region.owner, "device", None)
    index = device if isinstance(device, int) else getattr(device, "index", None)
    return -1 - int(index or 0)


# --- the handshake -----------------------------------------------------------------------------------------------------------


def agent_name(incarnation: bytes) -> str:
    """The name of a session's agent: it is bound to that life of that process."""
    return f"pd-fsm-{incarnation.hex()}"


def agent_incarnation(name: str) -> bytes:
    """Whose agent has that name; b"" when it is not one of ours."""
    prefix, _, tail = name.rpartition("-")
    try:
        return bytes.fromhex(tail) if prefix == "pd-fsm" and len(tail) == 32 else b""
    except ValueError:
        return b""


def pack_descriptor(incarnation: bytes, metadata: bytes, probe: int, memory: Memory, secret: bytes) -> bytes:
    """This side's descriptor. With a `secret`, only those who know it can make one that a peer takes."""
    packed_device = np.where(memory.mem == 1, -1 - memory.device, memory.device)
    columns = (
        memory.address.astype("<u8").tobytes(),
        memory.items.astype("<i8").tobytes(),
        memory.item_bytes.astype("<i8").tobytes(),
        packed_device.astype("<i4").tobytes(),
    )
    seal = _seal(incarnation, secret, metadata, probe, *columns)
    return msgspec.msgpack.encode(Descriptor(VERSION, metadata, probe, *columns, seal))


def unpack_descriptor(descriptor: bytes, peer: bytes, layout: KVLayout, secret: bytes) -> tuple[bytes, int, Memory]:
    """(metadata for the agent, address to probe or 0, memory) of a peer. Raises WireError for what this peer cannot have sent.

    NIXL and UCX parse the metadata in native code, which was seen to crash on a few flipped bytes. What they are given is therefore
    sealed: without a secret that finds corruption, with one it keeps everybody out who does not know it. And it must name the
    peer itself, or one peer could take the name of another.
    """
    try:
        said = _decode(descriptor)
    except (msgspec.DecodeError, ValueError) as error:
        raise WireError(f"its descriptor of {len(descriptor)} bytes is malformed: {error}") from None
    if said.version != VERSION:
        raise WireError(f"its descriptor has version {said.version}, not {VERSION}")
    seal = _seal(peer, secret, said.metadata, said.probe, said.address, said.items, said.item_bytes, said.device)
    if not hmac.compare_digest(seal, said.seal):
        raise WireError("its descriptor is damaged, not its own, or sealed with another secret (transport option `secret`)")
    name = agent_name(peer).encode()
    if not said.metadata.startswith(b"nixlSerDes|Agent" + len(name).to_bytes(8, "little") + name + b"|"):
        raise WireError("its metadata is not of its own agent, or of a NIXL version with another format")
    try:
        memory = _memory(
            np.frombuffer(said.address, dtype="<u8"),
            np.frombuffer(said.items, dtype="<i8"),
            np.frombuffer(said.item_bytes, dtype="<i8"),
            np.frombuffer(said.device, dtype="<i4").astype(np.int64),
        )
    except ValueError as error:
        raise WireError(f"its descriptor makes no sense: {error}") from None
    if len(memory.items) != len(layout.regions):
        raise WireError(f"it has {len(memory.items)} regions, this side {len(layout.regions)}")
    return said.metadata, said.probe, memory


def _seal(incarnation: bytes, secret: bytes, metadata: bytes, probe: int, *columns: bytes) -> bytes:
    key = hashlib.blake2b(secret).digest() if secret else b""
    digest = hashlib.blake2b(key=key, digest_size=32, person=b"pd-fsm nixl")
    for part in (incarnation, metadata, probe.to_bytes(8, "little"), *columns):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


# --- plans -------------------------------------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class Blocks:
    """A stretch of copies between one kind of memory on each side, which can be cut anywhere.

    Prepared: `source` and `destination` are item numbers (int32), and devices mean nothing. Plain: they are addresses (uint64).
    """

    prepared: bool
    source_mem: int
    destination_mem: int
    source: NDArray[Any]
    destination: NDArray[Any]
    nbytes: NDArray[np.int64]
    source_device: NDArray[np.int64]
    destination_device: NDArray[np.int64]

    def take(self, which: Any) -> Blocks:
        """Some of the copies, by anything that indexes an array."""
        return attrs.evolve(
            self,
            source=self.source[which],
            destination=self.destination[which],
            nbytes=self.nbytes[which],
            source_device=self.source_device[which],
            destination_device=self.destination_device[which],
        )

    def __len__(self) -> int:
        return len(self.nbytes)


@attrs.frozen(eq=False)
class Route:
    """From this side's memory to a peer's, and what can be said about all plans between them."""

    local: Memory
    remote: Memory
    ends: NDArray[np.int64]
    """Bytes of each of the peer's regions."""
    same_items: bool
    """Whether a page or row is as long there as here, in every region."""
    kinds: NDArray[np.int8]
    """For each region, its kinds of memory on both sides as one number."""
    one_kind: bool

    @classmethod
    def between(cls, local: Memory, remote: Memory) -> Route:
        kinds = (local.mem * len(MEMS) + remote.mem).astype(np.int8)
        same_items = bool((local.item_bytes == remote.item_bytes).all())
        return cls(local, remote, remote.items * remote.item_bytes, same_items, kinds, bool((kinds == kinds[0]).all()))


_EXPANSION_MAX = 2
"""Items to a copy up to which merged copies are written out again for a prepared list; the library merges them anew."""
_EXPANSION_FREE = 256


def blocks_of(plan: Plan, route: Route, bytes_max: int) -> list[Blocks]:
    """A plan as blocks, one group for each combination of kinds of memory. Raises WireError if it leaves the peer's regions.

    Whole items go by prepared lists, which cost the library least (measured: 0.4 ms for 16,384 scattered items, 1 ms as plain
    descriptors); long runs of items, and copies of parts of items, go as plain blocks of at most `bytes_max`.
    """
    local, remote = route.local, route.remote
    region, nbytes = plan.region, plan.nbytes
    beyond = plan.destination + nbytes > route.ends[region]
    if beyond.any():
        bad = int(np.argmax(beyond))
        raise WireError(f"bytes {plan.destination[bad]}+{nbytes[bad]} are beyond the end of region {region[bad]} of the peer")
    made = _as_items(plan, route) if route.same_items else None
    if made is None:
        plan = plan.cut(bytes_max)
        region = plan.region
        made = (
            region,
            Blocks(
                False,
                0,
                0,
                local.address[region] + plan.source.astype(np.uint64),
                remote.address[region] + plan.destination.astype(np.uint64),
                plan.nbytes,
                local.device[region],
                remote.device[region],
            ),
        )
    region, blocks = made
    if route.one_kind:
        return [_of_kind(blocks, int(route.kinds[0]))]
    kinds = route.kinds[region]
    return [_of_kind(blocks.take(kinds == kind), kind) for kind in sorted(set(kinds.tolist()))]


def _as_items(plan: Plan, route: Route) -> tuple[NDArray[np.int32], Blocks] | None:
    """(region of each item, blocks) for prepared lists, or None for a plan that has other things than some whole items."""
    local, remote, region = route.local, route.remote, plan.region
    item_bytes = local.item_bytes[region]
    source, destination, items = plan.source // item_bytes, plan.destination // item_bytes, plan.nbytes // item_bytes
    whole = (
        (source * item_bytes == plan.source) & (destination * item_bytes == plan.destination) & (items * item_bytes == plan.nbytes)
    )
    total = int(items.sum())
    if not whole.all() or total > max(_EXPANSION_MAX * len(plan), _EXPANSION_FREE):
        return None
    source += local.first[region]
    destination += remote.first[region]
    if total != len(plan):
        source, destination, region = _expand(source, items), _expand(destination, items), np.repeat(region, items)
        item_bytes = local.item_bytes[region]
    return region, Blocks(True, 0, 0, source.astype(np.int32), destination.astype(np.int32), item_bytes, item_bytes, item_bytes)


def _of_kind(blocks: Blocks, kind: int) -> Blocks:
    return blocks if kind == 0 else attrs.evolve(blocks, source_mem=kind // len(MEMS), destination_mem=kind % len(MEMS))


def _expand(first: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[i], first[i] + 1, ... count[i] of them, for all i."""
    ends = np.cumsum(count)
    numbers: NDArray[np.int64] = np.arange(int(ends[-1])) + np.repeat(first - (ends - count), count)
    return numbers


def transfers_of(blocks: Blocks, bytes_max: int, copies_max: int) -> list[Blocks]:
    """Blocks cut into transfers of at most so many copies and, where a copy is not longer by itself, bytes."""
    count = len(blocks)
    ends = np.cumsum(blocks.nbytes)
    if count <= copies_max and ends[-1] <= bytes_max:
        return [blocks]
    cut = []
    begin = 0
    while begin < count:
        done = int(ends[begin - 1]) if begin else 0
        end = min(max(int(np.searchsorted(ends, done + bytes_max, side="right")), begin + 1), begin + copies_max)
        cut.append(blocks.take(slice(begin, end)))
        begin = end
    return cut
