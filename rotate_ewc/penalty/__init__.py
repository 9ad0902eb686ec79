"""Elastic weight consolidation: what was learned, the penalty, and the updates that respect it.

In come operators, anchors and a model's parameters; out go a scalar for the loss, or parameters
moved in place. Nothing here may import a framework's integration or the command line.
"""
