"""What runs a domain on plain Linux (docs/spec/core-stack.md 12)."""
