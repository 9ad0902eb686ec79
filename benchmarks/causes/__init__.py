"""Why long streams of tasks lose accuracy: the causes told apart, with oracles that keep old data.

Every run is one optimizer with one curvature; see :mod:`benchmarks.causes.training`.
"""
