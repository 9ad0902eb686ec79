"""Independent oracles: dense Fisher matrices from first principles.

Nothing here knows how the library computes anything. Curvature is assembled one example at a time
from ``torch.func`` Jacobians and from the Hessian of the actual PyTorch loss, so that no closed
form, no layer rule and no scaling convention of the library is repeated. Everything is written for
clarity, not speed, and is meant for models with at most a few hundred parameters in float64.

Conventions:
    * A *flat* vector is the concatenation of the parameters, each flattened row-major, in the
      order of a ``shapes`` mapping (name to shape).
    * A parameter is the matrix ``p.reshape(groups, d_out, d_in)`` or, in a transposed block,
      ``p.reshape(groups, d_in, d_out).mT``; a separate bias is ``[groups, d_out, 1]``, and a weight
      with its bias ``[groups, d_out, 1 + d_in]`` with the bias as the first column.
    * A block acts on the row-major ``vec`` of each group's matrix.
"""

from tests.helpers.oracles.blocks import (
    BlockLayout,
    BlockLike,
    Kind,
    block_bases,
    block_indices,
    block_matrix,
    dense_block,
    dense_operator,
    exact_blocks,
    expected_layouts,
    in_own_basis,
    kronecker_basis,
    partial_traces,
)
from tests.helpers.oracles.comparison import assert_close
from tests.helpers.oracles.curvature import (
    Fisher,
    Loss,
    Shapes,
    by_example,
    dense_empirical_fisher,
    dense_fisher,
    dense_ggn,
    evaluation_copy,
    example_gradient,
    example_jacobian,
    example_jacobians,
    loss_mass,
    output_hessian,
    parameter_shapes,
    squared_error_ggn,
    with_reduction,
)
from tests.helpers.oracles.terms import (
    Approximation,
    LayerDerivatives,
    LayerTerms,
    kfac_matrix,
    kronecker_factors,
    layer_derivatives,
    layer_terms,
    output_hook,
    unfold_input,
    unfold_output,
)

__all__ = [
    "Approximation",
    "BlockLayout",
    "BlockLike",
    "Fisher",
    "Kind",
    "LayerDerivatives",
    "LayerTerms",
    "Loss",
    "Shapes",
    "assert_close",
    "block_bases",
    "block_indices",
    "block_matrix",
    "by_example",
    "dense_block",
    "dense_empirical_fisher",
    "dense_fisher",
    "dense_ggn",
    "dense_operator",
    "evaluation_copy",
    "exact_blocks",
    "example_gradient",
    "example_jacobian",
    "example_jacobians",
    "expected_layouts",
    "in_own_basis",
    "kfac_matrix",
    "kronecker_basis",
    "kronecker_factors",
    "layer_derivatives",
    "layer_terms",
    "loss_mass",
    "output_hessian",
    "output_hook",
    "parameter_shapes",
    "partial_traces",
    "squared_error_ggn",
    "unfold_input",
    "unfold_output",
    "with_reduction",
]
