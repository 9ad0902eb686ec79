"""Elastic weight consolidation in a rotated basis, for PyTorch.

`EKFACPenalty` is what a training loop needs: `attach` has any optimizer's steps respect it, and
`consolidate` remembers each task. `EKFACLinearOperator` is the Fisher matrix by itself, and
`rotate_ewc.integrations.avalanche` has a plugin for Avalanche.
"""

from rotate_ewc.curvature.merge import merge
from rotate_ewc.curvature.operator import EKFACLinearOperator
from rotate_ewc.errors import NotFiniteError, SnapshotError
from rotate_ewc.linalg.block import Block
from rotate_ewc.losses import (
    BatchForm,
    EmpiricalLoss,
    Likelihood,
    ModelLoss,
    SumOfLosses,
    register_likelihood,
)
from rotate_ewc.options import (
    EstimationOptions,
    EstimationSettings,
    FisherType,
    KFACType,
    Mode,
    PenaltyOptions,
    Reduction,
    Unsupported,
    Weighting,
)
from rotate_ewc.penalty.attachment import Attachment
from rotate_ewc.penalty.penalty import EKFACPenalty
from rotate_ewc.penalty.step_rules import register_step_size
from rotate_ewc.penalty.terms import Stack, Term
from rotate_ewc.penalty.updates import UpdateKind
from rotate_ewc.provenance import Provenance
from rotate_ewc.version import __version__

__all__ = [
    "Attachment",
    "BatchForm",
    "Block",
    "EKFACLinearOperator",
    "EKFACPenalty",
    "EmpiricalLoss",
    "EstimationOptions",
    "EstimationSettings",
    "FisherType",
    "KFACType",
    "Likelihood",
    "Mode",
    "ModelLoss",
    "NotFiniteError",
    "PenaltyOptions",
    "Provenance",
    "Reduction",
    "SnapshotError",
    "Stack",
    "SumOfLosses",
    "Term",
    "Unsupported",
    "UpdateKind",
    "Weighting",
    "__version__",
    "merge",
    "register_likelihood",
    "register_step_size",
]
