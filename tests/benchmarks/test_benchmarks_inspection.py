"""What methods keep, against what they are known to keep."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.runner
from benchmarks.configuration import Configuration
from benchmarks.data import ImageData
from benchmarks.inspection import RANKS_PER_BLOCK, spectra, state_bytes
from benchmarks.methods import Variant
from benchmarks.records import Record
from benchmarks.runner import run
from benchmarks.scenarios import SplitImages

TASKS = 2
PARAMETERS = 12 * 5 + 5 + 5 * 2 + 2
FLOAT = 4


@pytest.fixture
def run_method(learnable_images: ImageData, monkeypatch: pytest.MonkeyPatch):
    """A function that runs a method, and returns the record and the plugin."""

    def go(name: str) -> tuple[Record, Any]:
        plugins = []
        make = benchmarks.runner.make_plugin

        def spy(*arguments: Any, **keywords: Any) -> Any:
            plugins.append(make(*arguments, **keywords))
            return plugins[-1]

        monkeypatch.setattr(benchmarks.runner, "make_plugin", spy)
        scenario = SplitImages(learnable_images, TASKS, "domain")
        configuration = Configuration(tasks=TASKS, epochs=1, hidden=(5,), batch_size=16)
        variant = Variant(name, name, 1.0)
        record = run(variant, scenario, configuration, seed=0, data_source="tiny", quiet=True)
        return record, plugins[0]

    return go


@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("naive", 0),
        ("ewc", 2 * TASKS),  # an anchor and importances for every task
        ("ewc-online", 2),
        ("si", 4),  # the path so far, its start, the weights before a step, importances
        ("mas", 2),
        ("lwf", 1),  # the last network
    ],
)
def test_other_methods_keep_so_many_copies_of_the_parameters(
    run_method, name: str, copies: int
) -> None:
    record, _ = run_method(name)
    assert record.state_bytes == copies * PARAMETERS * FLOAT


@pytest.mark.parametrize(
    ("name", "snapshots"),
    [("rotated-ewc", 1), ("rotated-ewc-separate", TASKS), ("rotated-adam", 1)],
)
def test_rotated_methods_keep_their_penalty_and_what_it_is_applied_with(
    run_method, name: str, snapshots: int
) -> None:
    record, plugin = run_method(name)
    applied = 2 * snapshots * PARAMETERS * FLOAT  # eigenvalues with their weights, and anchors
    last_penalty = FLOAT
    more = record.state_bytes - plugin.penalty.nbytes - applied
    assert 0 <= more <= last_penalty


def test_every_tensor_counts_once_however_it_is_kept() -> None:
    model = nn.Linear(3, 2)
    shared = torch.zeros(10)
    plugin = SimpleNamespace(
        one={"a": shared, "b": [shared[:4], (torch.zeros(2, dtype=torch.float64),)]},
        two=SimpleNamespace(inner=shared, network=nn.Linear(3, 2)),
        live=[model.weight, model, model.bias.data],
        other=(1, "text", None, int),
    )
    plugin.itself = plugin
    assert state_bytes(plugin, model) == 10 * 4 + 2 * 8 + 8 * 4
    assert state_bytes(None, model) == 0


def test_spectra_are_sorted_eigenvalues_at_some_ranks(run_method) -> None:
    record, plugin = run_method("rotated-ewc")
    (term,) = plugin.penalty.terms
    assert set(record.spectra) == {block.label for block in term.operator.blocks}
    for block in term.operator.blocks:
        expected = torch.sort(block.eigenvalues.flatten(), descending=True).values
        found = record.spectra[block.label]
        ranks = [int(rank) for rank in found["ranks"]]
        assert found["dimension"] == [len(expected)]
        assert ranks == sorted(set(ranks))
        assert (ranks[0], ranks[-1]) == (1, len(expected))
        assert len(ranks) <= RANKS_PER_BLOCK
        assert found["eigenvalues"] == [expected[rank - 1].item() for rank in ranks]


@pytest.mark.parametrize("name", ["naive", "ewc", "lwf", "rotated-ewc-separate"])
def test_methods_without_a_merged_snapshot_have_no_spectra(run_method, name: str) -> None:
    assert run_method(name)[0].spectra == {}


def test_ranks_are_evenly_spaced_by_their_logarithms() -> None:
    eigenvalues = torch.randperm(5000, generator=torch.Generator().manual_seed(0)).float()
    block = SimpleNamespace(label="block", eigenvalues=eigenvalues.reshape(50, 100))
    term = SimpleNamespace(operator=SimpleNamespace(blocks=[block]))
    found = spectra(SimpleNamespace(penalty=SimpleNamespace(terms=[term])))["block"]
    assert found["eigenvalues"] == [5000 - rank for rank in found["ranks"]]
    late = torch.tensor(found["ranks"][-10:]).log().diff()
    torch.testing.assert_close(late, late.mean().expand(9), atol=0.01, rtol=0)
