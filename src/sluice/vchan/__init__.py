"""How the byte stream of a channel is carried (docs/spec/wire-protocol.md 5 and 20)."""
