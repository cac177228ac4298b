"""Kernels of the host, compiled by numba."""
