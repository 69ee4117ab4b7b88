"""The decoder that all model families share, and the config that tells them apart."""
