"""qrexec-proxy: chains of filters in the pipe of a call (docs/spec/proxy.md)."""
