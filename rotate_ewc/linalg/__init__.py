"""Functions of tensors alone, and the block that they act on.

In come covariances, bases, eigenvalues, matrices and the factors of per-example gradients; out go
eigenvectors, rotated matrices and products. Nothing here may know of models, layers, losses, data
or files.
"""
