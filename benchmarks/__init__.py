"""Benchmarks that compare rotated elastic weight consolidation with its baselines.

Each scenario is a module to run, for example ``python -m benchmarks.permuted_mnist --help``.
"""
