"""KV memory as the session sees it: components made of regions, and nothing about models.

A component is a set of buffers (regions) that are indexed alike: `paged` ones by page (K and V of every layer), `rows` by row,
one row a request (aux: first token, logprobs). Both sides must declare the same components; how many pages each has may differ.

This module holds references to the engine's buffers, so they live as long as the layout. It must never copy, move or free them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from pd_fsm.core.wire import ComponentInfo
from pd_fsm.errors import ConfigError


@attrs.frozen(eq=False)
class Region:
    """One contiguous buffer of `items` equal pages or rows. `owner` keeps it alive; `host` is False for device memory."""

    address: int
    items: int
    item_bytes: int
    dtype: str
    host: bool
    owner: Any = attrs.field(repr=False)

    @property
    def nbytes(self) -> int:
        return self.items * self.item_bytes

    def bytes_view(self) -> NDArray[np.uint8]:
        """All bytes of a host region as a flat uint8 array that shares its memory."""
        assert self.host, "device memory has no host view"
        if self.nbytes == 0:
            return np.empty(0, dtype=np.uint8)
        raw: Any = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        raw.owner = self.owner  # the view must not outlive the buffer
        view: NDArray[np.uint8] = np.frombuffer(raw, dtype=np.uint8)
        return view


@attrs.frozen(eq=False)
class RawBuffer:
    """Memory that no tensor or array stands for: `items` pages or rows of `item_bytes` each, from `address` on.

    `owner` is whatever keeps it alive. `device` is the number of the device that it is on, None for host memory. `dtype` is a word
    that both sides must agree on.
    """

    address: int
    items: int
    item_bytes: int
    owner: Any = attrs.field(default=None, repr=False)
    device: int | None = None
    dtype: str = "bytes"


@attrs.frozen(eq=False)
class Component:
    """Buffers that share one index. Make it with `paged` or `rows`."""

    name: str
    kind: str
    space: str
    page_size: int
    regions: tuple[Region, ...]

    def info(self) -> ComponentInfo:
        items = min(region.items for region in self.regions)
        dtypes = "+".join(sorted({region.dtype for region in self.regions}))
        item_bytes = tuple(region.item_bytes for region in self.regions)
        return ComponentInfo(self.name, self.kind, self.space, self.page_size, items, item_bytes, dtypes)


def paged(name: str, buffers: Sequence[Any], page_size: int, space: str = "kv") -> Component:
    """A component of pages of `page_size` tokens.

    `buffers` are C-contiguous torch tensors or numpy arrays whose dimension 0 counts pages, of any dtype that is the same on both
    sides, for example `[num_pages, page_size, kv_heads, head_dim]` for K and for V of each layer; or `RawBuffer`s.
    Components with the same `space` are indexed by the same page numbers. Raises ConfigError for a buffer that cannot be used.
    """
    if page_size < 1:
        raise ConfigError(f"component {name!r}: page_size must be at least 1 token, not {page_size}")
    return Component(name, "paged", space, page_size, _regions(name, buffers))


def rows(name: str, *buffers: Any) -> Component:
    """A component of one row a request. Dimension 0 of each buffer counts rows. Raises ConfigError as `paged` does."""
    return Component(name, "rows", name, 0, _regions(name, buffers))


class KVLayout:
    """All components of one rank, in an order that both sides share. Immutable; safe to use from any thread."""

    def __init__(self, components: Sequence[Component]) -> None:
        names = [component.name for component in components]
        if len(set(names)) != len(names):
            raise ConfigError(f"component names must be unique, got {names}")
        if not any(component.kind == "paged" for component in components):
            raise ConfigError("a layout needs at least one paged component; make one with pd_fsm.paged(...)")
        sizes: dict[str, int] = {}
        paged_spaces = {component.space for component in components if component.kind == "paged"}
        for component in components:
            if component.kind == "rows" and component.space in paged_spaces:
                raise ConfigError(
                    f"rows of {component.name!r} need an index space of their own, and pages have that name for theirs"
                )
            if component.kind == "paged" and sizes.setdefault(component.space, component.page_size) != component.page_size:
                raise ConfigError(
                    f"components of index space {component.space!r} have page sizes {sizes[component.space]} and "
                    f"{component.page_size}; give one of them a space of its own"
                )
        self.components = tuple(components)
        self.regions: tuple[Region, ...] = tuple(region for component in components for region in component.regions)
        self._by_space: dict[str, tuple[NDArray[np.int32], NDArray[np.int64]]] = {}
        self._items_of: dict[str, list[tuple[int, int]]] = {}
        for space in {component.space for component in components}:
            chosen = [(i, region) for i, region in enumerate(self.regions) if self._component_of(i).space == space]
            self._items_of[space] = [(i, region.item_bytes) for i, region in chosen]
            self._by_space[space] = (
                np.array([i for i, _ in chosen], dtype=np.int32),
                np.array([region.item_bytes for _, region in chosen], dtype=np.int64),
            )

    def _component_of(self, region: int) -> Component:
        for component in self.components:
            if region < len(component.regions):
                return component
            region -= len(component.regions)
        raise IndexError(region)

    def space_of(self, region: int) -> str:
        """The index space of a region number."""
        return self._component_of(region).space

    def space_regions(self, space: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(region numbers int32 [R], bytes an item int64 [R]) of an index space."""
        return self._by_space[space]

    def space_items(self, space: str) -> list[tuple[int, int]]:
        """The same as plain numbers: (region number, bytes an item)."""
        return self._items_of[space]

    def aux_spaces(self) -> tuple[str, ...]:
        return tuple(component.space for component in self.components if component.kind == "rows")

    def infos(self) -> tuple[ComponentInfo, ...]:
        return tuple(component.info() for component in self.components)


def _regions(name: str, buffers: Sequence[Any]) -> tuple[Region, ...]:
    if hasattr(buffers, "shape"):  # its pages would be taken for buffers
        raise ConfigError(f"component {name!r} needs a list of buffers, not one of shape {tuple(buffers.shape)}")
    if not buffers:
        raise ConfigError(f"component {name!r} has no buffers")
    return tuple(_region(f"component {name!r}, buffer {index}", buffer) for index, buffer in enumerate(buffers))


def _region(where: str, buffer: Any) -> Region:
    if isinstance(buffer, RawBuffer):
        if buffer.address < 1 or buffer.items < 1 or buffer.item_bytes < 1:
            raise ConfigError(f"{where}, {buffer}, holds no bytes; address, items and item_bytes must be at least 1")
        return Region(buffer.address, buffer.items, buffer.item_bytes, buffer.dtype, buffer.device is None, buffer)
    if hasattr(buffer, "data_ptr"):  # a torch tensor, found without importing torch
        address, contiguous = int(buffer.data_ptr()), bool(buffer.is_contiguous())
        itemsize, host = int(buffer.element_size()), buffer.device.type == "cpu"
    elif isinstance(buffer, np.ndarray):
        address, contiguous = int(buffer.ctypes.data), bool(buffer.flags.c_contiguous)
        itemsize, host = int(buffer.itemsize), True
        if buffer.dtype.hasobject:
            raise ConfigError(f"{where} holds Python objects, whose bytes mean nothing elsewhere")
        if not buffer.flags.writeable:
            raise ConfigError(f"{where} is read-only memory; a hand-off must be able to write to it")
    else:
        raise ConfigError(f"{where} is a {type(buffer).__name__}; a torch tensor, a numpy array or a RawBuffer is needed")
    shape = tuple(int(n) for n in buffer.shape)
    if not contiguous or len(shape) < 1:
        raise ConfigError(f"{where} of shape {shape} must be C-contiguous with pages or rows in dimension 0")
    item_bytes = itemsize
    for extent in shape[1:]:
        item_bytes *= extent
    if shape[0] < 1 or item_bytes < 1:
        raise ConfigError(f"{where} of shape {shape} holds no bytes")
    return Region(address, shape[0], item_bytes, str(buffer.dtype).removeprefix("torch."), host, buffer)
