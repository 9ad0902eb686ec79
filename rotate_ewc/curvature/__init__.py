"""The Fisher matrix as a linear operator: its algebra, and the sum of several.

In come blocks, estimated or read from a snapshot; out go products, inverses, samples and merged
operators. Nothing here may know of penalties, optimizers or training.
"""
