"""Moving bytes between descriptors: pump, data channel, reactor (docs/spec/wire-protocol.md 10)."""
