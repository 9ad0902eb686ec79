"""One forward pass: which operation uses which parameter, and which row belongs to which example.

In come a model's forward function and its parameters; out go the recorded uses, where the examples
lie in them, and a plan of the blocks that they make. Nothing here may sum over data, or import from
`estimation`, `curvature` or `penalty`.
"""
