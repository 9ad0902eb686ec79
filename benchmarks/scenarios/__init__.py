"""Streams of tasks, as PyTorch data sets and as Avalanche experiences."""

from benchmarks.scenarios.base import LabelledDataset, Scenario, training_experiences
from benchmarks.scenarios.registry import load_data, make_scenario
from benchmarks.scenarios.split import SplitImages
from benchmarks.scenarios.transformed import PermutedImages, RotatedImages

__all__ = [
    "LabelledDataset",
    "PermutedImages",
    "RotatedImages",
    "Scenario",
    "SplitImages",
    "load_data",
    "make_scenario",
    "training_experiences",
]
