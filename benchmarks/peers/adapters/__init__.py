"""One file per package: how it is asked for the Fisher matrix of a model, and what it costs."""

from benchmarks.peers.adapters.adapter import Adapter, Mode
from benchmarks.peers.adapters.avalanche import Avalanche
from benchmarks.peers.adapters.curvlinops import Curvlinops
from benchmarks.peers.adapters.kronfluence import Kronfluence
from benchmarks.peers.adapters.laplace import Laplace
from benchmarks.peers.adapters.nngeometry import NNGeometry
from benchmarks.peers.adapters.ours import RotateEWC

# The columns of the table.
PEERS: tuple[Adapter, ...] = (RotateEWC(), Curvlinops(), NNGeometry(), Kronfluence(), Laplace())

__all__ = [
    "PEERS",
    "Adapter",
    "Avalanche",
    "Curvlinops",
    "Kronfluence",
    "Laplace",
    "Mode",
    "NNGeometry",
    "RotateEWC",
]
