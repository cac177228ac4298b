"""Kernels for the accelerator, in Triton."""
