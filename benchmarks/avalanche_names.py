"""The names that the benchmarks take from Avalanche, imported without its noise.

Importing Avalanche takes seconds, so only modules and functions that are needed once training
starts import this one: ``--help`` and a mistyped option answer at once.
"""

import warnings

with warnings.catch_warnings():
    # Avalanche imports qpsolvers for GEM, which the benchmarks do not run; without a solver
    # installed it warns every user of every strategy.
    warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
    from avalanche.benchmarks import (
        benchmark_from_datasets,
        with_classes_timeline,
        with_task_labels,
    )
    from avalanche.benchmarks.utils import DataAttribute
    from avalanche.benchmarks.utils.classification_dataset import TaskAwareClassificationDataset
    from avalanche.core import SupervisedPlugin
    from avalanche.models import MultiTaskModule, avalanche_forward
    from avalanche.training.plugins import (
        EvaluationPlugin,
        EWCPlugin,
        LwFPlugin,
        MASPlugin,
        ReplayPlugin,
        SynapticIntelligencePlugin,
    )
    from avalanche.training.supervised import Naive

__all__ = [
    "DataAttribute",
    "EWCPlugin",
    "EvaluationPlugin",
    "LwFPlugin",
    "MASPlugin",
    "MultiTaskModule",
    "Naive",
    "ReplayPlugin",
    "SupervisedPlugin",
    "SynapticIntelligencePlugin",
    "TaskAwareClassificationDataset",
    "avalanche_forward",
    "benchmark_from_datasets",
    "with_classes_timeline",
    "with_task_labels",
]
