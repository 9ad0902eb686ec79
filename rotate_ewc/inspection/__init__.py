"""Look into snapshots: what each block holds, and how two of them differ.

Files are read, summarised (`summary`) and compared (`comparison`), and the results shown as tables
and figures by the command line `python -m rotate_ewc`. Nothing here may change a snapshot, and
nothing else may import from here.
"""
