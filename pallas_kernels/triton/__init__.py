"""The GPU kernels' twins in Triton itself, by jax-triton."""
