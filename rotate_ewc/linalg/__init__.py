"""Pure functions on tensors, and the block that they act on.

In come covariances, bases, eigenvalues and matrices; out go eigenvectors, rotated matrices and
products. Nothing here may know of models, layers, losses, data or files.
"""
