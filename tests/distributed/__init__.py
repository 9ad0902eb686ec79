"""Several processes that talk to each other, on one machine: over `gloo`, and NCCL with GPUs.

Together they estimate what one process does with all of their data, to 1e-12; what fails in one of
them fails in all, and nothing hangs; replicas that train stay the same to the bit; and all of this
with parameters that are spread over the processes. A penalty beside `DistributedDataParallel`
trains as one process does.
"""
