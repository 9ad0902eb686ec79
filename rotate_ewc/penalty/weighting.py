"""What the tasks of a penalty weigh: numbers of loss terms, and losses that are means or sums.

The summed loss L_t of a task is its negative log-likelihood, but for a constant. M_t, its number of
loss terms, is what the reduction `mean` divides L_t by: examples, tokens that count, elements of
the outputs (squared errors, binary cross-entropy), or their weights. With F̄_t the Fisher matrix of
the *mean* loss, that of L_t is `M_t F̄_t`, and by Bayes' rule the negative log-posterior after the
tasks of the past is

    L_now + ½ Σ_t M_t Δᵀ F̄_t Δ

A penalty keeps `M_t F̄_t` (`Weighting.EXAMPLES`) or, where all tasks are to weigh the same, `F̄_t`
(`Weighting.UNIFORM`), times the task's own weight. The matrix of a mean loss is F̄_t, that of a
summed loss `M_t F̄_t`.

A mean loss is L_now over M_now (the terms of the task being trained), and so must the penalty be:
`½ Σ_t (M_t / M_now) Δᵀ F̄_t Δ`, or the same without M_t / M_now. The penalty for a summed loss is
M_now times that, as the loss itself is.
"""

from __future__ import annotations

from rotate_ewc.options import Reduction, Weighting


def kept_weight(
    weight: float, num_loss_terms: float, weighting: Weighting, reduction: Reduction
) -> float:
    """Return the factor from a task's Fisher matrix to what the penalty keeps of it.

    Args:
        weight: The task's own weight.
        num_loss_terms: M_t; zero only for a summed loss of which nothing counts.
        weighting: How tasks are weighted.
        reduction: The reduction of the loss.
    """
    counted = reduction is Reduction.SUM
    wanted = weighting is Weighting.EXAMPLES
    if wanted and not counted:
        return weight * num_loss_terms
    if counted and not wanted:
        return weight / num_loss_terms if num_loss_terms else 0.0
    return weight


def scale_of_penalty(
    strength: float, current_num_loss_terms: float, weighting: Weighting, reduction: Reduction
) -> float:
    """Return the factor from a penalty's stored matrices to its second derivatives.

    Args:
        strength: λ.
        current_num_loss_terms: M_now.
        weighting: How tasks are weighted.
        reduction: The reduction of the loss.
    """
    if weighting is Weighting.EXAMPLES:
        return strength if reduction is Reduction.SUM else strength / current_num_loss_terms
    return strength * current_num_loss_terms if reduction is Reduction.SUM else strength
