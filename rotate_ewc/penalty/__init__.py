"""Elastic weight consolidation: what was learned, the penalty, and the updates that respect it.

In come a model with its loss and data, after each task, and its parameters, on later ones; out go
steps of any optimizer that respect the penalty (`attachment`, with `step_rules` and `updates`), or
a scalar for the loss (`penalty`). Nothing here may import a framework's integration or the command
line.
"""
