"""From captured batches to finished blocks.

In come a forward function, a loss and the data, which `tracing` turns into captured batches, twice;
out go bases from the first pass, and eigenvalues in them from the second, with the number of
examples. Nothing here may know the layers' functions, or import from `curvature`, `penalty` or
`io`.
"""
