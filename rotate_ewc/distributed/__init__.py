"""Several processes at work on one matrix, and parameters that are spread over processes.

In come a group of `torch.distributed` and tensors of each process; out go their sums, each at its
owner or everywhere, and errors that are raised in all processes or in none. Nothing here may know
of layers, blocks, models' data or penalties.
"""
