"""Rollouts for trainers: `fastgen_jax.rl.tunix` serves Tunix's learners."""
