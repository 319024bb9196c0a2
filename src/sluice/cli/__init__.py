"""Thin entry points: parse arguments, call one thing, print."""
