"""Parameters that only some tasks use: heads of their own, and layers of every form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotate_ewc import EKFACLinearOperator
from tests.helpers.crossing import crossed
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import dense_operator

CE = nn.CrossEntropyLoss()
FORMS = {
    "linear": lambda: nn.Linear(6, 6),
    "grouped": lambda: nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 6, 1, groups=2), nn.Flatten()
    ),
    "transposed": lambda: nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.ConvTranspose1d(6, 6, 1), nn.Flatten()
    ),
}


class Heads(nn.Module):
    """A trunk, and for every task a layer and a head of its own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.tasks = nn.ModuleList(
            nn.Sequential(FORMS[form](), nn.Tanh(), nn.Linear(6, 3)) for _ in range(3)
        )
        self.task = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.tasks[self.task](torch.tanh(self.trunk(x)))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@crossed(form=FORMS, joint=[False, True], mode=["merged", "separate"])
def test_every_task_has_its_own_layers(form: str, joint: bool, mode: str) -> None:
    """Without the trunk nothing is shared, so a merged penalty is exact too."""
    torch.manual_seed(0)
    model = Heads(form).double()
    names = [name for name, _ in model.named_parameters() if not name.startswith("trunk")]
    options = {"fisher_type": "type2", "separate_weight_and_bias": not joint}
    penalty = exact_penalty(mode=mode, weighting="uniform", exclude=["trunk.*"], **options)
    exact, start = torch.zeros(()), flat(model)
    for task in (1, 0, 2):
        model.task = task
        data = [(torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,)))]
        penalty.consolidate(model, CE, data)
        params = {name: model.get_parameter(name) for name in names}
        operator = EKFACLinearOperator(model, CE, params, data, **options)
        used = [block.parameters[0] for block in operator.blocks if block.eigenvalues.any()]
        assert used
        assert all(name.startswith(f"tasks.{task}") for name in used)
        exact = exact + dense_operator(operator.blocks, operator.parameter_shapes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    # The trunk's parameters come first.
    moved = (flat(model) - start)[-len(exact) :]
    torch.testing.assert_close(penalty(model).detach(), moved @ exact @ moved / 2)
