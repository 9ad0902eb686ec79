"""The names that the benchmarks take from Avalanche, imported without its noise.

Importing Avalanche takes seconds, so only modules and functions that are needed once training
starts import this one: ``--help`` and a mistyped option answer at once.
"""

import warnings

with warnings.catch_warnings():
    # Avalanche imports qpsolvers for GEM, which the benchmarks do not run; without a solver
    # installed it warns every user of every strategy.
    warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins import EvaluationPlugin, EWCPlugin
    from avalanche.training.supervised import Naive

__all__ = [
    "EWCPlugin",
    "EvaluationPlugin",
    "Naive",
    "SupervisedPlugin",
    "as_classification_dataset",
    "benchmark_from_datasets",
]
