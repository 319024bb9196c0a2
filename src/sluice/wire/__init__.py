"""Bytes to messages and back, names and their validation. No I/O."""
