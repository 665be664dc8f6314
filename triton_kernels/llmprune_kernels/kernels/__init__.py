"""Triton kernels, one file per storage format; each imports triton, so import them only where a kernel is launched."""
