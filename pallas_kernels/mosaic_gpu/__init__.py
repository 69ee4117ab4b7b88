"""The chunk kernel for NVIDIA Hopper, in Pallas' Mosaic GPU."""
