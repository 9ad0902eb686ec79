"""From a model, a loss and data to finished blocks, in two passes over the data.

In come the user's batches; out go bases and eigenvalues, and how many examples they were estimated
from. Nothing here may know of operators, penalties or files.
"""
