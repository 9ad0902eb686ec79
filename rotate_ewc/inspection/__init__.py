"""Look into snapshots: what each block holds, and how two of them differ.

In come files; out go numbers (`summary`, `comparison`), and of these tables and plots for the
command line `python -m rotate_ewc`. Nothing here may change a snapshot, or be imported by another
room.
"""
