"""Benchmarks that compare rotated elastic weight consolidation with its baselines.

``python -m benchmarks`` lists the commands.
"""
