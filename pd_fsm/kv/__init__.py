"""KV memory: layouts of the engine's buffers and copy plans between two of them. Never moves a byte."""

from pd_fsm.kv.layout import Component, KVLayout, RawBuffer, Region, paged, rows
from pd_fsm.kv.plan import Plan, make_plan

__all__ = ["Component", "KVLayout", "Plan", "RawBuffer", "Region", "make_plan", "paged", "rows"]
