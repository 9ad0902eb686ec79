"""NCL: steps in the metric of what earlier tasks have made certain.

Kao, Jensen, van de Ven, Bernacchia and Hennequin, "Natural continual learning: success is a
journey, not (just) a destination", NeurIPS 2021.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines.capture import Layer, trained_layers
from benchmarks.baselines.kronecker_laplace import Factors, joint_matrix, kronecker_factors
from benchmarks.baselines.plugin import LABELLING, EstimatingPlugin, Examples, make_generator

ITERATIONS, TOLERANCE = 1_000, 1e-12
DAMPING = 1e-10  # relative to a factor's mean eigenvalue


class NaturalContinualLearning(EstimatingPlugin, supports_distributed=True):  # type: ignore[call-arg]
    """Replaces the gradient by the paper's direction, for an optimizer that is SGD with momentum.

    Before task ``k`` the weights have a normal distribution around those after the last task,
    ``θ_{k-1}``, with precision ``Λ_{k-1} = I / p_w² + Σ_{t<k} N_t F_t``. On the new task, of ``N``
    examples with mean loss ``L``, each step goes along

        ``-(N Λ_{k-1}⁻¹ ∇L + θ - θ_{k-1}) / (N p_w²)``

    which with the first task, where ``Λ_0 = I / p_w²`` and ``θ_0 = 0``, is gradient descent with
    weight decay. For each layer ``Λ`` is one Kronecker product, as is the Fisher matrix ``F_t``
    (see :class:`KroneckerLaplace`): of all products the one that is nearest to the sum of both,
    see :func:`nearest_product`. Some damping keeps it invertible.

    The variance of the prior is what a search varies: the greater ``p_w²``, the less can change
    what earlier tasks have made certain, relative to all else. With 0 training is plain.

    Attributes:
        strength: ``p_w²``.
        precision: ``Λ`` by name of layer, in float64; none for layers that no task has used.
        anchor: ``θ_{k-1}`` by name, weight and bias as one matrix ``[d_out, 1 + d_in]``.
    """

    def __init__(self, strength: float, *, samples: int | None = None, seed: int = 0) -> None:
        """Protect nothing yet; for the arguments see :class:`EstimatingPlugin`."""
        super().__init__(strength, samples=samples, seed=seed)
        self.precision: dict[str, Factors] = {}
        self.anchor: dict[str, Tensor] = {}
        self._covariance: dict[str, Factors] = {}  # times ``1 / p_w²``

    @torch.no_grad()
    def before_update(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        """Replace the gradients of the loss."""
        if not self.strength:
            return
        decay = 1 / (self.strength * len(strategy.experience.dataset))
        for name, layer in trained_layers(strategy.model).items():
            if layer.weight.grad is None:  # another task's head
                continue
            gradient = _joint_gradient(layer)
            if name in self._covariance:
                covariance = self._covariance[name]
                gradient = covariance.gradients @ gradient @ covariance.inputs
            moved = joint_matrix(layer) - self.anchor.get(name, 0.0)
            _set_gradient(layer, gradient + decay * moved)

    def consolidate(self, strategy: Any, examples: Examples) -> None:
        """Add the Fisher matrix of a task to the precision, and remember the weights."""
        generator = make_generator(self._seed, self.tasks, LABELLING)
        layers = trained_layers(strategy.model)
        if self.strength:
            for name, one in kronecker_factors(strategy.model, examples, generator).items():
                size = len(strategy.experience.dataset)
                fisher = Factors(one.inputs.double(), size * one.gradients.double())
                before = self.precision.get(name) or self._prior(fisher)
                self.precision[name] = _damped(nearest_product(before, fisher))
                self._covariance[name] = self._inverse(self.precision[name], like=one.inputs)
        self.anchor = {name: joint_matrix(one).detach().clone() for name, one in layers.items()}

    def _prior(self, like: Factors) -> Factors:
        """The precision of a layer that no task has used."""
        return Factors(_identity(like.inputs), _identity(like.gradients) / self.strength)

    def _inverse(self, precision: Factors, like: Tensor) -> Factors:
        """The factors of ``Λ⁻¹ / p_w²``."""
        inputs, gradients = map(torch.linalg.inv, (precision.inputs, precision.gradients))
        return Factors(inputs.to(like), (gradients / self.strength).to(like))


def nearest_product(first: Factors, second: Factors) -> Factors:
    """The product ``G ⊗ A`` nearest to the sum of two, of which the first is positive definite.

    Nearest by the Kullback-Leibler divergence from the normal distribution of precision ``G ⊗ A``
    to that of the sum ``P = G₁ ⊗ A₁ + G₂ ⊗ A₂``. That is smallest where, with matrices of ``m``
    and ``n`` rows, ``G = (tr(A⁻¹ A₁) G₁ + tr(A⁻¹ A₂) G₂) / n`` and likewise
    ``A = (tr(G⁻¹ G₁) A₁ + tr(G⁻¹ G₂) A₂) / m``. Each makes the divergence as small as the other
    factor allows, so they are taken in turns. The traces need only the eigenvalues of ``A₂``
    relative to ``A₁`` and of ``G₂`` relative to ``G₁``.
    """
    inputs = _relative(first.inputs, second.inputs)
    gradients = _relative(first.gradients, second.gradients)
    # How much there is of the first and of the second.
    of_inputs = of_gradients = torch.ones(2, dtype=torch.float64)
    for _ in range(ITERATIONS):
        before = of_inputs
        of_gradients = _traces(of_inputs, inputs)
        of_inputs = _traces(of_gradients, gradients)
        if torch.allclose(of_inputs, before, rtol=TOLERANCE, atol=0):
            break
    (a, b), (c, d) = of_inputs.tolist(), of_gradients.tolist()
    return Factors(a * first.inputs + b * second.inputs, c * first.gradients + d * second.gradients)


def _traces(parts: Tensor, relative: Tensor) -> Tensor:
    """Mean eigenvalues of two matrices relative to a sum of parts of them."""
    total = parts[0] + parts[1] * relative
    return torch.stack([(1 / total).mean(), (relative / total).mean()])


def _relative(first: Tensor, second: Tensor) -> Tensor:
    """Eigenvalues of the second matrix relative to the first, which is positive definite."""
    root = torch.linalg.cholesky(first)
    half = torch.linalg.solve_triangular(root, second, upper=False)
    whole = torch.linalg.solve_triangular(root, half.mT, upper=False)
    found: Tensor = torch.linalg.eigvalsh(whole)
    return found.clamp(min=0.0).cpu()


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _damped(factors: Factors) -> Factors:
    """Raise all eigenvalues a little."""

    def damped(matrix: Tensor) -> Tensor:
        return matrix + DAMPING * matrix.diagonal().mean() * _identity(matrix)

    return Factors(damped(factors.inputs), damped(factors.gradients))


def _joint_gradient(layer: Layer) -> Tensor:
    parts: list[Any] = [layer.weight.grad.flatten(1)]  # type: ignore[union-attr]
    if layer.bias is not None:
        parts.insert(0, layer.bias.grad.unsqueeze(1))  # type: ignore[union-attr]
    return torch.cat(parts, 1)


def _set_gradient(layer: Layer, joint: Tensor) -> None:
    if layer.bias is not None:
        layer.bias.grad, joint = joint[:, 0].clone(), joint[:, 1:]
    layer.weight.grad = joint.reshape(layer.weight.shape).clone()
