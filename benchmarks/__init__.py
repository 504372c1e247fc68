"""Measurements, to be run from the checkout: ``python -m benchmarks``; see ``docs/benchmarks.md``."""
