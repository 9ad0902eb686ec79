"""The Fisher matrix as a linear operator: its algebra, and the sum of several.

In come a model with its loss and data, or finished blocks, or a snapshot; out go products,
inverses, samples and merged operators. Nothing here may know of penalties, optimizers or training.
"""
