"""The penalty inside other people's training loops, one for each framework.

In come a framework's strategies and batches; out go calls of the penalty at the right moments.
Nothing here may be imported by another room, or, but for `attaching`, `loaders` and `rehearsal`, by
another integration.
"""
