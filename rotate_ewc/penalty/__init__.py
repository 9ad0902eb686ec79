"""Elastic weight consolidation: what was learned, the penalty, and the updates that respect it.

In come a model with its loss and data, after each task, and its parameters, on later ones; out go a
scalar for the loss (`penalty`), steps of any optimizer that respect it (`attachment`, with
`step_rules` and `updates`), or parameters moved in place (`proximal`, `tangent`, and `rotated_adam`
with `rotation`). Nothing here may import a framework's integration or the command
line.
"""
