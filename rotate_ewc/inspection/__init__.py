"""Look into snapshots: what each block holds, and how two of them differ.

In come files; out go numbers (`summary`, `comparison`), and from these tables and figures for the
command line `python -m rotate_ewc`. Nothing here may change a snapshot, and nothing else may import
from here.
"""
