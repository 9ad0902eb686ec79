"""The suite: every scenario, every method, one protocol.

Data flow in one direction: `sweep` decides what to run and runs it, `benchmarks.results` keeps one
file for each run, `outcome` turns records into results, and `benchmarks.report` shows them.
"""
