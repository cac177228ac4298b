"""A tier of vLLM's KV offloading whose files only a holder of the key can read."""

from scx.sealed.tier import SealedTier as sealed  # the type's name, for vLLM

__all__ = ["sealed"]
