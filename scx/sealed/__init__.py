"""A tier of vLLM's KV offloading whose files only a holder of the key can read."""

from scx.sealed.tier import SealedTier as sealed  # noqa: N813 - vLLM looks for the type

__all__ = ["sealed"]
