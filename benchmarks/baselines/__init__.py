"""Published methods that the library is compared with, as Avalanche plugins.

They are written from the papers and share no code with the library: a mistake in one is not
repeated in the other.
"""

from benchmarks.baselines.diagonal_fisher import DiagonalFisherEWC
from benchmarks.baselines.kronecker_laplace import KroneckerLaplace
from benchmarks.baselines.natural_continual_learning import NaturalContinualLearning
from benchmarks.baselines.rotated_published import PublishedRotatedEWC
from benchmarks.baselines.synaptic_intelligence import SynapticIntelligence

__all__ = [
    "DiagonalFisherEWC",
    "KroneckerLaplace",
    "NaturalContinualLearning",
    "PublishedRotatedEWC",
    "SynapticIntelligence",
]
