"""From captured batches to finished blocks.

In come captured batches, twice; out go bases from the first pass, and eigenvalues in them from the
second, with the number of examples. Nothing here may run the model or know its layers' functions,
or import from `curvature`, `penalty` or `io`.
"""
