"""What the tasks of a penalty weigh: example counts, and losses that are means or sums.

With F̄_t the Fisher matrix of task t's *mean* loss and N_t its number of examples, a penalty keeps
`N_t F̄_t` (`Weighting.EXAMPLES`) or `F̄_t` (`Weighting.UNIFORM`), times the task's own weight. The
matrix of a mean loss is F̄_t, that of a summed loss `N_t F̄_t`.

The penalty for a mean loss is what is kept, over N_now (the examples of the task being trained)
where counts are in it. For a summed loss it is N_now times that, as the loss itself is.
"""

from __future__ import annotations

from rotate_ewc.options import Reduction, Weighting


def kept_weight(weight: float, num_data: int, weighting: Weighting, reduction: Reduction) -> float:
    """Return the factor from a task's Fisher matrix to what the penalty keeps of it.

    Args:
        weight: The task's own weight.
        num_data: N_t.
        weighting: How tasks are weighted.
        reduction: That of the loss.
    """
    counted = reduction is Reduction.SUM
    wanted = weighting is Weighting.EXAMPLES
    if wanted and not counted:
        return weight * num_data
    if counted and not wanted:
        return weight / num_data
    return weight


def scale_of_penalty(
    strength: float, current_num_data: int, weighting: Weighting, reduction: Reduction
) -> float:
    """Return the factor from what a penalty keeps to the second derivatives of the penalty.

    Args:
        strength: λ.
        current_num_data: N_now.
        weighting: How tasks are weighted.
        reduction: That of the loss.
    """
    if weighting is Weighting.EXAMPLES:
        return strength if reduction is Reduction.SUM else strength / current_num_data
    return strength * current_num_data if reduction is Reduction.SUM else strength


def kept_examples(num_data: int, weighting: Weighting) -> int:
    """Return how many times a penalty keeps the Fisher matrix F̄_t of a task's mean loss.

    Args:
        num_data: N_t.
        weighting: How tasks are weighted.
    """
    return num_data if weighting is Weighting.EXAMPLES else 1
