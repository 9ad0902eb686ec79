"""The names that the benchmarks take from Avalanche, imported without its noise.

Importing Avalanche takes seconds, so only modules and functions that are needed once training
starts import this one: ``--help`` and a mistyped option answer at once.
"""

import warnings

with warnings.catch_warnings():
    # Avalanche imports qpsolvers for GEM, which the benchmarks do not run; without a solver
    # installed it warns every user of every strategy.
    warnings.filterwarnings("ignore", message="no QP solver found", category=UserWarning)
    from avalanche.benchmarks import benchmark_from_datasets as benchmark_from_datasets
    from avalanche.benchmarks import with_classes_timeline as with_classes_timeline
    from avalanche.benchmarks import with_task_labels as with_task_labels
    from avalanche.benchmarks.utils import DataAttribute as DataAttribute
    from avalanche.benchmarks.utils.classification_dataset import (
        TaskAwareClassificationDataset as TaskAwareClassificationDataset,
    )
    from avalanche.core import SupervisedPlugin as SupervisedPlugin
    from avalanche.models import MultiTaskModule as MultiTaskModule
    from avalanche.models import avalanche_forward as avalanche_forward
    from avalanche.training.plugins import EWCPlugin as EWCPlugin
    from avalanche.training.plugins import LwFPlugin as LwFPlugin
    from avalanche.training.plugins import MASPlugin as MASPlugin
    from avalanche.training.plugins import ReplayPlugin as ReplayPlugin
    from avalanche.training.plugins import (
        SynapticIntelligencePlugin as SynapticIntelligencePlugin,
    )
    from avalanche.training.supervised import Naive as Naive
