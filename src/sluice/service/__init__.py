"""Finding and starting one service (docs/spec/wire-protocol.md 9)."""
