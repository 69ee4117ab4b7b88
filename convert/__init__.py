"""Hugging Face checkpoint to Orbax checkpoint and back: python -m convert."""
