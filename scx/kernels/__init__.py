"""Fused forms of `scx.codecs`, of equal results, for the host and the accelerator."""
