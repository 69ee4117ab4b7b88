"""The engine: token ids in, token ids out. It never sees text, files' formats or sockets."""
