"""Which modules a function can reach."""

from __future__ import annotations

import weakref

from torch import Tensor, nn

from rotate_ewc._utils.reached_modules import reached_modules


class WithProxy(nn.Module):
    """Has a weak proxy of another module, as modules in Lightning have of themselves."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.__dict__["proxy"] = weakref.proxy(other)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def test_weak_proxies_are_passed_over() -> None:
    other = nn.Linear(1, 1)
    module = WithProxy(other)
    assert module.inner in reached_modules(lambda x: module(x))
