"""The benchmark suite: every scenario, every method, one protocol.

``python -m benchmarks run SCENARIO`` searches each method's strength on held-out training images
and then tests it; ``compare``, ``plot`` and ``report`` present what the runs left behind. Data flow
in one direction: `sweep` decides what to run, `pool` runs it, `store` keeps one file for each run,
`protocol` turns records into results, and `figures`, `tables` and `page` show them.
"""
