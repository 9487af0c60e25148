"""Triton kernels of loopmdm, one fused operation a file. Imported only when a kernel is about to run."""
