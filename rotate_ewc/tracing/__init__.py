"""From the user's data to captured batches: what each batch shows of every use of a parameter.

In come a model's forward function, its parameters, a loss and the data; out go captured batches,
each with the inputs of all uses, the gradients at their outputs, and a plan of the blocks that they
belong to. Nothing here may sum over batches, or import from `estimation`, `curvature` or `penalty`.
"""
