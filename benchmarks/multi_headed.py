"""A network with an output layer for every task."""

import torch
from torch import Tensor, nn

from benchmarks.avalanche_names import MultiTaskModule


class MultiHeadedNetwork(MultiTaskModule):  # type: ignore[misc]
    """Shared layers, and on top a linear layer for every task label, all there from the start."""

    def __init__(self, trunk: nn.Module, features: int, classes: int, tasks: int) -> None:
        """Put heads on a trunk whose outputs are ``[N, features]``."""
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleList(nn.Linear(features, classes) for _ in range(tasks))

    def forward(self, x: Tensor, task_labels: Tensor | None) -> Tensor | dict[int, Tensor]:
        """Logits ``[N, classes]`` of inputs ``[N, ...]``, each of its own task's head.

        Without task labels, the logits of all tasks that have been trained, by task.
        """
        hidden = self.trunk(x)
        if task_labels is None:
            return {task: self.heads[task](hidden) for task in self.known_train_tasks_labels}
        present = sorted(set(task_labels.tolist()))
        if len(present) == 1:
            only: Tensor = self.heads[present[0]](hidden)
            return only
        rows = {task: torch.nonzero(task_labels == task).flatten() for task in present}
        logits = torch.cat([self.heads[task](hidden[rows[task]]) for task in present])
        return logits[torch.cat(list(rows.values())).argsort()]
