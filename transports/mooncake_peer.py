"""What a reader tells its writers: where its engine answers, and where its memory is. What a peer says is never trusted."""

from __future__ import annotations

import ipaddress
from typing import Annotated

import attrs
import msgspec
import numpy as np
from msgspec import Meta

from pd_fsm.errors import WireError
from pd_fsm.kv import KVLayout
from pd_fsm.kv.registration import AddressTable

VERSION = 1
_PACKED_BYTES_MAX = 1 << 19


class Descriptor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What travels in the handshake: packed little-endian, one entry a region, address uint64 and nbytes int64."""

    version: int
    protocol: Annotated[str, Meta(max_length=32)]
    address: Annotated[str, Meta(max_length=64)]
    port: Annotated[int, Meta(ge=1, le=65_535)]
    region_address: Annotated[bytes, Meta(max_length=_PACKED_BYTES_MAX)]
    region_nbytes: Annotated[bytes, Meta(max_length=_PACKED_BYTES_MAX)]


_decode = msgspec.msgpack.Decoder(Descriptor).decode


@attrs.frozen(eq=False)
class Remote:
    """A reader: the address and port of its engine, and its regions."""

    address: str
    port: int
    table: AddressTable

    @property
    def target(self) -> str:
        """Its name to the library."""
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"


def pack(protocol: str, address: str, port: int, table: AddressTable) -> bytes:
    packed = table.address.astype("<u8").tobytes(), table.nbytes.astype("<i8").tobytes()
    return msgspec.msgpack.encode(Descriptor(VERSION, protocol, address, port, *packed))


def unpack(descriptor: bytes, protocol: str, layout: KVLayout) -> Remote:
    """Raises WireError for anything that no session with this layout and protocol could have sent."""
    try:
        said = _decode(descriptor)
        if said.version != VERSION:
            raise WireError(f"its descriptor has version {said.version}, not {VERSION}")
        if said.protocol != protocol:
            raise WireError(f"its engine speaks {said.protocol!r}, this one {protocol!r}; give both the same option `protocol`")
        address = str(ipaddress.ip_address(said.address))
        table = AddressTable(np.frombuffer(said.region_address, "<u8"), np.frombuffer(said.region_nbytes, "<i8"))
    except (msgspec.DecodeError, ValueError) as error:  # ValueError: numbers that mean nothing
        raise WireError(f"its descriptor of {len(descriptor)} bytes makes no sense: {error}") from None
    if len(table.nbytes) != len(layout.regions):
        raise WireError(f"it has {len(table.nbytes)} regions, this side {len(layout.regions)}")
    item_bytes = np.array([region.item_bytes for region in layout.regions])
    if (table.nbytes % item_bytes).any():
        raise WireError("one of its regions does not hold whole pages of this layout")
    return Remote(address, said.port, table)
