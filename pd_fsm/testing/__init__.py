"""The race harness: a world of real session cores under a hostile network and a virtual clock. Usable by third parties."""

from pd_fsm.testing.world import Actor, Violation, World

__all__ = ["Actor", "Violation", "World"]
