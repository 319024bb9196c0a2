"""The registry of domains and what runs them (docs/spec/core-stack.md)."""
