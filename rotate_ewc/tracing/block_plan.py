"""Which blocks the uses of parameters make, and of what form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rotate_ewc.layers import Factors, Form
from rotate_ewc.tracing.recorder import Computed, Use


@dataclass(frozen=True)
class BlockKey:
    """Which parameters a block is for: a weight, a bias, or both jointly.

    Attributes:
        weight: Name of the weight, or of whatever parameter has a block of its own.
        bias: Name of the bias that shares its block.
    """

    weight: str
    bias: str | None = None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names, weight first."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def label(self) -> str:
        """The names joined for messages."""
        return "+".join(self.parameters)


@dataclass(frozen=True)
class Contribution:
    """One way in which a parameter gets a gradient.

    Attributes:
        use: Index of the use.
        is_weight: Whether it is the use's weight, or else its bias.
        through: Key of the computed tensor that stands between them, if any.
    """

    use: int
    is_weight: bool
    through: str | None = None


@dataclass(frozen=True)
class Plan:
    """How one block comes out of the uses.

    Attributes:
        key: The block's parameters.
        form: How its matrix is made.
        contributions: Where its gradient comes from.
        uniform: Whether all contributions are direct and of this form.
        follower: Of a weight, the bias that has a block of its own but only this weight's use.
    """

    key: BlockKey
    form: Form
    contributions: tuple[Contribution, ...]
    uniform: bool
    follower: BlockKey | None = None

    @property
    def uses(self) -> tuple[int, ...]:
        """Indices of the uses, each once."""
        return tuple(dict.fromkeys(contribution.use for contribution in self.contributions))


def plan_blocks(
    uses: Sequence[Use],
    computed: Mapping[str, Computed],
    parameters: Mapping[str, Tensor],
    *,
    separate: bool,
) -> tuple[Plan, ...]:
    """Plan one block for every parameter that is used, or for every pair of weight and bias.

    Args:
        uses: The uses of one forward pass.
        computed: The computed tensors that uses may name.
        parameters: The parameters that get blocks, by name.
        separate: Whether a weight and its bias are two blocks also where they could share one.
    """
    contributions = _contributions(uses, computed)
    plans = {
        name: _plan(name, found, uses, parameters[name])
        for name, found in contributions.items()
        if name in parameters
    }
    for weight, bias in _pairs(uses, plans):
        if not separate:
            _check_pair(plans[weight], plans[bias])
            plans[weight] = replace(plans[weight], key=BlockKey(weight, bias))
        elif plans[weight].uses == plans[bias].uses and len(plans[weight].uses) == 1:
            plans[weight] = replace(plans[weight], follower=BlockKey(bias))
    joined = {plan.key.bias for plan in plans.values()}
    return tuple(plan for name, plan in plans.items() if name not in joined)


def _contributions(
    uses: Sequence[Use], computed: Mapping[str, Computed]
) -> dict[str, list[Contribution]]:
    found: dict[str, list[Contribution]] = {}
    for index, use in enumerate(uses):
        for name, is_weight in ((use.weight, True), (use.bias, False)):
            if name is not None and name in computed:
                for source in sorted(computed[name].sources):
                    found.setdefault(source, []).append(Contribution(index, is_weight, name))
            elif name is not None:
                found.setdefault(name, []).append(Contribution(index, is_weight))
    return found


def _plan(
    name: str, contributions: Sequence[Contribution], uses: Sequence[Use], parameter: Tensor
) -> Plan:
    """Plan a parameter's own block, in the form of all its uses or the most they have in common."""
    forms = set()
    for contribution in contributions:
        call = uses[contribution.use].call
        forms.add(call.weight_form if contribution.is_weight else call.bias_form)
    direct = all(contribution.through is None for contribution in contributions)
    uniform = direct and len(forms) == 1
    if uniform:
        form = forms.pop()
    elif direct and any(form.factors is Factors.LOOKUP for form in forms):
        # An embedding tied to an output layer: no basis for the vocabulary.
        form = Form(transposed=True)
    else:
        form = Form(input_basis=parameter.ndim > 1)
    return Plan(BlockKey(name), form, tuple(contributions), uniform)


def _pairs(uses: Sequence[Use], plans: Mapping[str, Plan]) -> dict[tuple[str, str], None]:
    """Return the names of weights and biases that are used together and could share a block."""
    pairs: dict[tuple[str, str], None] = {}
    for use in uses:
        weight, bias = plans.get(use.weight or ""), plans.get(use.bias or "")
        if weight is None or bias is None or not use.call.joins_bias:
            continue
        if weight.form.factors is Factors.OUTER_PRODUCTS and bias.uniform:
            pairs[weight.key.weight, bias.key.weight] = None
    return pairs


def _check_pair(weight: Plan, bias: Plan) -> None:
    """Raise if one of a pair is also used without the other."""
    if weight.uses != bias.uses:
        raise ValueError(
            f"parameters {weight.key.weight!r} and {bias.key.weight!r} are used in different pairs "
            f"of weight and bias (one of them also without the other), which have no joint block; "
            f"pass separate_weight_and_bias=True"
        )
