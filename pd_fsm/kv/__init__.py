"""KV memory: layouts of the engine's buffers and copy plans between two of them. Never moves a byte."""

from pd_fsm.kv.layout import Component, KVLayout, Region, paged, rows
from pd_fsm.kv.plan import Plan, make_plan

__all__ = ["Component", "KVLayout", "Plan", "Region", "make_plan", "paged", "rows"]
