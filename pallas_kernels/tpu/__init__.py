"""Kernels for TPU, in Pallas (Mosaic)."""
