"""The side of the domain: agent and clients (docs/spec/wire-protocol.md 7, 8, 11)."""
