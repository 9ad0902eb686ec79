"""Snapshots: blocks ⇄ a flat dictionary of tensors with a header ⇄ a safetensors file.

In come blocks and their provenance, or a file that nobody trusts; out go a dictionary or a file, or
checked blocks. A snapshot is the saved state of an operator or a penalty: the
schema of all three is in `header`, and the last two pack their own tensors. Nothing here
may import estimation, an operator or a penalty, or run what it reads.
"""
