"""Necessary operations, against numbers worked out by hand."""

import pytest
import torch
from torch import nn

from benchmarks.speed.cases import CASES, Attention, Case, Workload, build
from benchmarks.speed.floor import (
    Counts,
    Factor,
    Layer,
    Necessary,
    count,
    count_attention,
    count_layer,
    describe_layers,
    factors,
    necessary,
)


def make_workload(model: nn.Module, *shape: int) -> Workload:
    case = Case(lambda: model, shape, 2, 2)
    batch = (torch.randn(2, *shape), torch.randint(2, (2,)))
    return Workload(case, model, nn.CrossEntropyLoss(), [batch])


def test_layers_are_described_by_a_forward_pass() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(5, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(36, 2),
    )
    assert describe_layers(make_workload(model, 3, 6, 6)) == [
        Layer(positions=9, d_in=27, d_out=5, bias=False, backward=False),
        Layer(positions=9, d_in=45, d_out=4, bias=True, backward=True),
        Layer(positions=1, d_in=36, d_out=2, bias=True, backward=True),
    ]


def test_no_gradient_is_needed_below_frozen_parameters() -> None:
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    workload = make_workload(model, 3)
    assert describe_layers(workload)[0].backward
    workload.freeze_other_parameters()
    assert not describe_layers(workload)[0].backward
    assert model[1].weight.requires_grad


def test_a_linear_layer_with_three_label_vectors() -> None:
    layer = Layer(positions=1, d_in=4, d_out=5, bias=True, backward=True)
    assert count_layer(layer, 3) == Counts(
        forward=40,
        backward=120,
        factors=16 + 3 * 25,
        rotations=2 * 16 + 3 * 2 * 25,
        eigenvalues=40,
    )
    assert factors([layer], 3, 7) == ([Factor(4, 7), Factor(5, 7 * 3)], [])


def test_the_first_layer_sends_nothing_backwards() -> None:
    assert count_layer(Layer(1, 4, 5, bias=True, backward=False), 3)["backward"] == 0


def test_a_layer_that_nobody_estimates_is_passed_through() -> None:
    layer = Layer(positions=2, d_in=4, d_out=5, bias=True, backward=True, estimated=False)
    assert count_layer(layer, 3) == Counts(forward=80, backward=240)
    assert factors([layer], 3, 7) == ([], [])


def test_a_convolution_whose_vectors_are_rotated() -> None:
    layer = Layer(positions=9, d_in=27, d_out=5, bias=True, backward=True)
    # Rotated inputs: 2·9·27² = 13122 or of the gradient 2·5·27² = 7290.
    # Rotated outputs: 2·9·5² = 450 or of the gradient 2·27·5² = 1350.
    # Gradients 2·9·27·5 = 2430; pairs 9·10·27·5 = 12150 with 13122 + 450.
    assert count_layer(layer, 1) == Counts(
        forward=2430,
        backward=2430,
        factors=9 * 27**2 + 9 * 5**2 + 5**2,
        rotations=7290 + 450,
        eigenvalues=2430,
    )
    assert factors([layer], 2, 100) == ([Factor(27, 900), Factor(5, 1800)], [Factor(5, 200)])


def test_few_vectors_are_cheaper_to_decompose_than_their_sum() -> None:
    assert (Factor(1000, 501).rows, Factor(1000, 501).gigaflop) == (1000, 0)
    assert (Factor(1000, 500).rows, Factor(1000, 500).gigaflop) == (500, pytest.approx(2))


def test_pairs_win_with_few_positions_and_many_label_vectors() -> None:
    layer = Layer(positions=2, d_in=10, d_out=10, bias=False, backward=True)
    counts = count_layer(layer, 9)
    assert counts["rotations"] == 2 * 2 * 100 + 9 * 2 * 2 * 100
    assert counts["eigenvalues"] == 2 * 3 * 100, "label vectors are summed before"
    assert counts["factors"] == 2 * 100 + 9 * 2 * 100


def test_one_position_is_the_same_whichever_way_it_is_counted() -> None:
    counts = count_layer(Layer(1, 7, 3, bias=False, backward=True), 4)
    assert counts["eigenvalues"] == 1 * (1 + 1) * 7 * 3


def test_attention_counts_half_of_each_product() -> None:
    one_product = 2 * 8 * 8 * 16 / 2
    counts = count_attention(Attention(blocks=3, length=8, width=16), 1)
    assert counts == Counts(forward=3 * 2 * one_product, backward=3 * 4 * one_product)


def test_label_vectors_are_the_rank_of_the_loss() -> None:
    workload = make_workload(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 10)), 3)
    sampled, exact = (necessary(workload, fisher).gigaflop for fisher in ("mc", "type2"))
    assert exact["backward"] == pytest.approx(9 * sampled["backward"])


def test_operations_are_divided_by_rates_and_eigh_is_added() -> None:
    layers = [Layer(1, 4, 5, bias=True, backward=False)] * 2
    counts = count(layers, None, 1, examples=10**6)
    assert counts["forward"] == 2 * 40 * 10**6
    assert sum(counts.values()) == 2 * (40 + 16 + 25 + 32 + 50 + 40) * 10**6
    of_weights, _ = factors(layers, 1, 10**6)
    gigaflop = {purpose: number / 1e9 for purpose, number in counts.items()}
    rates, eigh = {"small": [0.01], "large": [0.1, 0.1, 0.3]}, {"4": [1.0], "5": [9.0, 11.0]}
    seconds = Necessary(gigaflop, of_weights, []).seconds(rates, eigh)
    assert seconds["forward"] == pytest.approx(0.8)
    assert (seconds["eigh"], seconds["eigh for biases"]) == (22, 0)
    assert sum(seconds.values()) == pytest.approx(22 + sum(counts.values()) / 1e8)
    needed = Necessary(gigaflop, of_weights, [Factor(1000, 4)])
    assert needed.sizes == [4, 5, 4, 5, 4]
    assert needed.seconds(rates, eigh)["eigh for biases"] == pytest.approx(1 + 0.016 / 0.1)


@pytest.mark.parametrize("name", CASES)
def test_every_case_can_be_built_and_counted(name: str) -> None:
    workload = build(name, quick=True)
    workload.freeze_other_parameters()
    layers = describe_layers(workload)
    assert sum(layer.estimated for layer in layers) == len(workload.known_layers)
    assert [layer.backward for layer in layers] == [False, *[True] * (len(layers) - 1)]
    assert sum(necessary(workload, "mc").gigaflop.values()) > 0
    inputs, targets = workload.batches[0]
    loss = workload.criterion(workload.model(inputs), targets)
    loss.backward()
    assert all(parameter.grad is not None for parameter in workload.known_parameters)
    assert workload.labels_per_example == (128 if name in ("e", "f") else 1)


def test_a_fraction_is_of_whole_batches_and_at_least_one() -> None:
    assert build("a", fraction=0.25).examples == 2_500
    assert build("d-groupnorm", fraction=0.01).examples == 64
    first, second = build("a", fraction=0.1), build("a", fraction=0.1)
    assert torch.equal(first.batches[1][0], second.batches[1][0])
