"""From rules to decisions (docs/spec/policy.md). Pure but for files.py."""
