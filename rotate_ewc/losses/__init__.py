"""Loss families, a file each: the vectors whose outer products make a loss's Fisher matrix.

In come a model's outputs and the targets of one batch; out go vectors to back-propagate, and what
the batch adds to the number that the reduction `mean` divides by. To teach the package a loss,
write a `Likelihood`, and add it to the tables of `registry.py` or pass it to `register_likelihood`.
Nothing here may know of models, layers or parameters, or import from `tracing` or `estimation`.
"""

from rotate_ewc.losses.base import BatchForm, Likelihood
from rotate_ewc.losses.empirical import EmpiricalLoss
from rotate_ewc.losses.heads import SumOfLosses
from rotate_ewc.losses.model_loss import ModelLoss
from rotate_ewc.losses.registry import likelihood_of, register_likelihood

__all__ = [
    "BatchForm",
    "EmpiricalLoss",
    "Likelihood",
    "ModelLoss",
    "SumOfLosses",
    "likelihood_of",
    "register_likelihood",
]
