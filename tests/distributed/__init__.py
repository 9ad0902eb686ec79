"""Several processes that talk to each other, on one machine and over `gloo`.

Here is what holds today: processes that estimate the same data from the same seed have the same
bits, so each can consolidate for itself, and a penalty beside `DistributedDataParallel` trains as
one process does. What will be here, once estimation itself is shared among processes: the sums of
several shards are those of all the data; a process that fails is named in the others; snapshots are
written by one of them.
"""
