"""The built-in filters, one file each (docs/spec/proxy.md 5.1)."""
