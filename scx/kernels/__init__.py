"""Fused forms of `scx.codec`, with the same results, for the host and the accelerator."""
