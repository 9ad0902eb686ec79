"""What the plugin does, as metrics for Avalanche's evaluator and its loggers."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import get_metric_name
from torch import Tensor

from rotate_ewc.integrations.avalanche.plugin import RotatedEWCPlugin, Update


def rotated_ewc_metrics(
    *, penalty: bool = True, consolidation: bool = True, traces: bool = False
) -> list[Any]:
    """Return metrics of a `RotatedEWCPlugin`, to be given to Avalanche's `EvaluationPlugin`.

    Args:
        penalty: After every epoch, the penalty, its strength, and its share of loss plus penalty:
            means over the epoch's batches where the penalty is in the loss, else the penalty as the
            epoch ends.
        consolidation: After every experience, how many seconds its consolidation took, and how many
            bytes the penalty keeps in all.
        traces: After every experience, the trace of the penalty's second derivatives for each block
            of parameters.

    Examples:
        ```python
        evaluator = EvaluationPlugin(accuracy_metrics(stream=True), rotated_ewc_metrics(),
                                     loggers=[InteractiveLogger()])
        ```
    """
    metrics: list[Any] = [PenaltyMetric()] if penalty else []
    if consolidation or traces:
        metrics.append(ConsolidationMetric(costs=consolidation, traces=traces))
    return metrics


class PenaltyMetric(PluginMetric[float]):
    """The penalty and its share, after every training epoch."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._loss: Tensor | float = 0.0
        self._penalty: Tensor | float = 0.0
        self._batches = 0

    def result(self) -> float:
        """Return the mean penalty in the loss over the batches so far."""
        return float(self._penalty) / max(self._batches, 1)

    def before_training_epoch(self, strategy: Any) -> None:
        """Start at zero."""
        self.reset()

    def after_training_iteration(self, strategy: Any) -> None:
        """Count a batch, without waiting for an accelerator."""
        self._loss = self._loss + strategy.loss.detach().sum()
        self._penalty = self._penalty + _plugin(strategy).penalty_in_loss
        self._batches += 1

    def after_training_epoch(self, strategy: Any) -> list[MetricValue]:
        """Return the penalty and its share."""
        plugin = _plugin(strategy)
        penalty, total = self.result(), float(self._loss) / max(self._batches, 1)
        if plugin.update is not Update.LOSS:
            with torch.no_grad():
                penalty = float(plugin.penalty(strategy.model))
            total += penalty
        share = penalty / total if total > 0 else 0.0
        values = {
            "RotatedEWC_Penalty": penalty,
            "RotatedEWC_Share": share,
            "RotatedEWC_Strength": plugin.ewc_lambda,
        }
        return _metric_values(self, strategy, values, add_experience=False)


class ConsolidationMetric(PluginMetric[float]):
    """Duration of consolidations, size and traces of the penalty, after every experience."""

    def __init__(self, *, costs: bool, traces: bool) -> None:
        """Choose what to report.

        Args:
            costs: Whether to report duration and size.
            traces: Whether to report the trace of each block.
        """
        super().__init__()
        self._costs, self._traces = costs, traces
        self._seconds = 0.0

    def reset(self) -> None:
        """Forget the last consolidation."""
        self._seconds = 0.0

    def result(self) -> float:
        """Return how many seconds the last consolidation took."""
        return self._seconds

    def after_training_exp(self, strategy: Any) -> list[MetricValue]:
        """Return the values; none in the middle of an online task."""
        plugin = _plugin(strategy)
        if plugin.consolidation_seconds is None:
            return []
        self._seconds = plugin.consolidation_seconds
        values: dict[str, float] = {}
        if self._costs:
            values["RotatedEWC_ConsolidationSeconds"] = self._seconds
            values["RotatedEWC_KeptBytes"] = plugin.penalty.nbytes
        if self._traces:
            for stack in plugin.penalty.stacks:
                name = f"RotatedEWC_Trace_{'+'.join(stack.names)}"
                trace = plugin.penalty.scale * float(stack.block.trace)
                values[name] = values.get(name, 0.0) + trace
        return _metric_values(self, strategy, values, add_experience=True)


def _plugin(strategy: Any) -> RotatedEWCPlugin:
    found = [plugin for plugin in strategy.plugins if isinstance(plugin, RotatedEWCPlugin)]
    if len(found) != 1:
        raise ValueError(
            f"the strategy has {len(found)} RotatedEWCPlugin; expected one, or an evaluator "
            f"without rotated_ewc_metrics"
        )
    return found[0]


def _metric_values(
    metric: PluginMetric[float], strategy: Any, values: dict[str, float], *, add_experience: bool
) -> list[MetricValue]:
    """Name values as Avalanche names its own."""
    position = strategy.clock.train_iterations
    return [
        MetricValue(
            metric,
            get_metric_name(name, strategy, add_experience=add_experience, add_task=True),
            value,
            position,
        )
        for name, value in values.items()
    ]
