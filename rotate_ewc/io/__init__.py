"""Snapshots: blocks ⇄ a flat dictionary of tensors with a header ⇄ a safetensors file.

In come blocks and where they come from, or a file that nobody trusts; out go a state or a file, or
checked blocks. Nothing here may import estimation, an operator or a penalty, or run what it reads.
"""
