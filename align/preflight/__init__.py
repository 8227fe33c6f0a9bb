"""Preflight: what a recipe would train, on which rows, in seconds and without a GPU, before it does (docs/preflight.md)."""
