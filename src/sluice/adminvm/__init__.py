"""The trusted side: control links, dispatch of calls, audit (docs/spec/wire-protocol.md 6)."""
