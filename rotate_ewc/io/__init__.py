"""Snapshots: blocks ⇄ a flat dictionary of tensors with a header ⇄ a safetensors file.

A snapshot is the saved state of an operator, a penalty or a tangent. What is written are blocks and
their provenance; what is read comes from a source that is not trusted, and is checked before it is
returned. Nothing here may import estimation, an operator or a penalty, or run what it reads.
"""
