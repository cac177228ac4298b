"""Fused forms of `scx.codecs` with equal results, for the host and the accelerator."""
