"""Kernels for NVIDIA GPUs, in Pallas-Triton, and the host's plan for them."""
