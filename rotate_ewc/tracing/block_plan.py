"""Plan the blocks: which uses of a parameter make its block, and in what form.

A plan is made of names, shapes and forms alone, and knows nothing of a batch's numbers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from rotate_ewc._utils.messages import listed
from rotate_ewc.layers import Factors, Form, form_within_reach


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

    @property
    def leading_columns(self) -> int:
        """Columns of the block's matrix in front of the weight's: one in a joint block."""
        return int(self.bias is not None)


@dataclass(frozen=True)
class UseForms:
    """What the plan depends on in one use of parameters.

    Attributes:
        weight: Name of the weight (or key of a computed one), None if it is not tracked.
        bias: Name of the bias, likewise.
        weight_form: How the weight becomes a block.
        bias_form: How the bias does.
        joins_bias: Whether the two can have a joint block.
        output_size: Number of entries of the operation's output, with as many rows for every
            example.
    """

    weight: str | None
    bias: str | None
    weight_form: Form
    bias_form: Form
    joins_bias: bool
    output_size: int


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


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """How one block comes out of the uses.

    Attributes:
        key: The block's parameters.
        parameter: The weight, or whatever parameter has a block of its own.
        form: How its matrix is made.
        contributions: Where its gradient comes from.
        uniform: Whether all contributions are direct and of this form.
        one_position: Whether its (first) use has one output vector for each example.
        follower: Of a weight, the bias with a block of its own whose per-example gradients are this
            weight's output gradients, as they are where both have one use, with one position. What
            is computed from them is then computed for both.
    """

    key: BlockKey
    parameter: Tensor
    form: Form
    contributions: tuple[Contribution, ...]
    uniform: bool
    one_position: bool
    follower: BlockKey | None = None

    @property
    def uses(self) -> tuple[int, ...]:
        """Indices of the uses, each once."""
        return tuple(dict.fromkeys(contribution.use for contribution in self.contributions))


def plan_blocks(
    uses: Sequence[UseForms],
    sources: Mapping[str, frozenset[str]],
    parameters: Mapping[str, Tensor],
    num_examples: int,
    *,
    separate: bool,
    diagonal: Container[str] = (),
) -> tuple[BlockPlan, ...]:
    """Plan one block for every parameter that is used, or for every pair of weight and bias.

    Args:
        uses: The uses of one forward pass.
        sources: For the key of every computed tensor, the parameters that it is computed from.
        parameters: The parameters that get blocks, by name.
        num_examples: Number of examples in the batch.
        separate: Whether a weight and its bias are two blocks also where they could share one.
        diagonal: Names of the parameters whose blocks have no bases.

    Raises:
        ValueError: If a pair that is to share a block is not always used together.
    """
    contributions = _contributions(uses, sources)
    plans = {
        name: _plan(name, found, uses, parameters[name], num_examples)
        for name, found in contributions.items()
        if name in parameters
    }
    pairs = _pairs(uses, plans)
    if not separate:
        _check_pairs([(plans[weight], plans[bias]) for weight, bias in pairs])
    for weight, bias in pairs:
        if not separate:
            plans[weight] = replace(plans[weight], key=BlockKey(weight, bias))
        elif plans[weight].one_position and _have_one_use(plans[weight], plans[bias]):
            plans[weight] = replace(plans[weight], follower=BlockKey(bias))
    joined = {plan.key.bias for plan in plans.values()}
    found = (plan for name, plan in plans.items() if name not in joined)
    return tuple(_without_bases(plan, diagonal) for plan in found)


def _without_bases(plan: BlockPlan, diagonal: Container[str]) -> BlockPlan:
    """Return the plan of a block that is not rotated, if one of its parameters is not to be.

    A bias follows its weight only if both are rotated.
    """
    if any(name in diagonal for name in plan.key.parameters):
        form = replace(plan.form, gradient_basis=False, activation_basis=False)
        return replace(plan, form=form, follower=None)
    if plan.follower is not None and plan.follower.weight in diagonal:
        return replace(plan, follower=None)
    return plan


def _contributions(
    uses: Sequence[UseForms], sources: Mapping[str, frozenset[str]]
) -> dict[str, list[Contribution]]:
    found: dict[str, list[Contribution]] = {}
    for index, use in enumerate(uses):
        for name, is_weight in ((use.weight, True), (use.bias, False)):
            if name is not None and name in sources:
                for source in sorted(sources[name]):
                    found.setdefault(source, []).append(Contribution(index, is_weight, name))
            elif name is not None:
                found.setdefault(name, []).append(Contribution(index, is_weight))
    return found


def _plan(
    name: str,
    contributions: Sequence[Contribution],
    uses: Sequence[UseForms],
    parameter: Tensor,
    num_examples: int,
) -> BlockPlan:
    """Plan a parameter's own block, in the form of all its uses or the most they have in common."""
    forms = set()
    for contribution in contributions:
        use = uses[contribution.use]
        forms.add(use.weight_form if contribution.is_weight else use.bias_form)
    direct = all(contribution.through is None for contribution in contributions)
    uniform = direct and len(forms) == 1
    if uniform:
        form = forms.pop()
    elif direct and any(form.factors is Factors.LOOKUP for form in forms):
        # An embedding tied to an output layer: no basis for the vocabulary.
        kinds = {form.factors for form in forms}
        known = kinds == {Factors.LOOKUP, Factors.OUTER_PRODUCTS}
        plain = all((form.groups, form.window) == (1, 1) for form in forms)
        form = Form(Factors.TIED if known and plain else Factors.NONE, transposed=True)
    elif any(uses[c.use].weight_form.factors is not Factors.NONE for c in contributions):
        form = Form(activation_basis=parameter.ndim > 1)
    else:
        # Positional embeddings, say, may have more entries than a basis can have.
        form = form_within_reach(parameter.shape)
    groups, d_out, _ = form.shape(parameter.shape)
    one_position = uses[contributions[0].use].output_size == num_examples * groups * d_out
    return BlockPlan(BlockKey(name), parameter, form, tuple(contributions), uniform, one_position)


def _pairs(uses: Sequence[UseForms], plans: Mapping[str, BlockPlan]) -> dict[tuple[str, str], None]:
    """Return the names of weights and biases that are used together and could share a block."""
    pairs: dict[tuple[str, str], None] = {}
    for use in uses:
        weight, bias = plans.get(use.weight or ""), plans.get(use.bias or "")
        if weight is None or bias is None or not use.joins_bias:
            continue
        if weight.form.factors is Factors.OUTER_PRODUCTS and bias.uniform:
            pairs[weight.key.weight, bias.key.weight] = None
    return pairs


def _have_one_use(weight: BlockPlan, bias: BlockPlan) -> bool:
    """Whether both are used once, together."""
    return weight.uses == bias.uses and len(weight.uses) == 1


def _check_pairs(pairs: Iterable[tuple[BlockPlan, BlockPlan]]) -> None:
    """Raise if one of a pair is also used without the other, naming all such pairs."""
    told = [
        f"{weight.key.weight!r} and {bias.key.weight!r}"
        for weight, bias in pairs
        if weight.uses != bias.uses
    ]
    if told:
        raise ValueError(
            f"parameters {listed(told)} are used in different pairs of weight and bias (one of "
            f"them also without the other), which have no joint block; pass "
            f"separate_weight_and_bias=True"
        )
