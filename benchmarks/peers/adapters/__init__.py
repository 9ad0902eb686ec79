"""How each package is asked for the Fisher matrix of a model, and what it costs."""

from benchmarks.peers.adapters.adapter import Adapter
from benchmarks.peers.adapters.kronfluence import Kronfluence
from benchmarks.peers.adapters.laplace import Laplace
from benchmarks.peers.adapters.nngeometry import NNGeometry
from benchmarks.peers.adapters.operators import Curvlinops, RotateEWC

# The columns of the table.
PEERS: tuple[Adapter, ...] = (RotateEWC(), Curvlinops(), NNGeometry(), Kronfluence(), Laplace())

__all__ = ["PEERS", "Adapter", "Curvlinops", "Kronfluence", "Laplace", "NNGeometry", "RotateEWC"]
