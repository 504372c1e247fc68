"""Measurements, to be run from the checkout: ``python -m benchmarks.refresh URL …``."""
