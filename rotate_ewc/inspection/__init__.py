"""Look into snapshots: what each block holds, and how two of them differ.

Data flow from `contents` (a file → operators) to `summary` and `comparison` (numbers), and from
there to `tables` and `figure`.
"""
