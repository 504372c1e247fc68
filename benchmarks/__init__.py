"""Benchmarks. Run them in the root of the checkout with ``python -m benchmarks``; see ``docs/benchmarks.md``."""
