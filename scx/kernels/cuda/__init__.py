"""Kernels of the accelerator, in Triton."""
