"""Everything that is measured: the rows, and the packages."""

from benchmarks.peers.adapters.adapter import Adapter
from benchmarks.peers.adapters.curvlinops import Curvlinops
from benchmarks.peers.adapters.kronfluence import Kronfluence
from benchmarks.peers.adapters.laplace import Laplace
from benchmarks.peers.adapters.nngeometry import NNGeometry
from benchmarks.peers.adapters.ours import RotateEWC
from benchmarks.peers.row import Section
from benchmarks.peers.rows_data import DATA, STATE
from benchmarks.peers.rows_layers import LAYERS, WAYS_OF_USE
from benchmarks.peers.rows_losses import LOSSES

SECTIONS: tuple[Section, ...] = (LAYERS, WAYS_OF_USE, LOSSES, DATA, STATE)
ADAPTERS: tuple[Adapter, ...] = (
    RotateEWC(),
    Curvlinops(),
    NNGeometry(),
    Kronfluence(),
    Laplace(),
)
