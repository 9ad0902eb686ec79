"""Models of transformers are consolidated by their own loss, exactly."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.utils.data import DataLoader
from transformers import (
    BertForPreTraining,
    BertModel,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from rotate_ewc import EKFACLinearOperator, EKFACPenalty
from rotate_ewc.integrations.transformers import own_loss
from tests.helpers import hf_models
from tests.helpers.exact import exact_penalty
from tests.helpers.oracles import assert_close, block_matrix, in_own_basis

# Labels that count, worked out by hand from the batches.
NUM_TERMS = {
    "gpt2": 4 * 4 - 2 - 1,
    "llama": 4 * 4 - 2 - 1,
    "bert, masked tokens": 4,
    "bert, several classes": 12,
    "bert, several classes, untold": 12,
    "bert, regressions": 12,
    "bert, tokens": 4 * 5 - 2 - 1,
    "bert, answers": 5,
    "t5": 4 * 5 - 2 - 1,
}


SPANS_LABELS = ("start_positions", "end_positions")


def example(batch: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index : index + 1] for key, value in batch.items()}


def summed_loss(name: str, model: nn.Module, values: Mapping[str, Tensor], batch: Any) -> Tensor:
    """The loss of one example, summed over the labels that count, written out."""
    logits, counts = predictions(name, model, values, batch)
    if name == "bert, answers":
        labels = torch.cat([batch["start_positions"], batch["end_positions"]])
    else:
        labels = batch["labels"].reshape(-1)
        labels = labels[1:] if name in ("gpt2", "llama") else labels
    if "regression" in name:
        return (logits.flatten() - labels).square().sum()
    if "several" in name:
        return (
            -(logits.sigmoid().flatten().log() * labels).sum()
            - ((-logits).sigmoid().flatten().log() * (1 - labels)).sum()
        )
    chosen = logits.log_softmax(dim=1).gather(1, labels.where(counts, 0)[:, None]).squeeze(1)
    return -(chosen * counts).sum()


def dense_empirical(name: str, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Σ_n ∇L_n ∇L_nᵀ over the number of labels that count, by torch.func."""
    model = copy.deepcopy(model).eval()
    values = {n: p.detach() for n, p in model.named_parameters()}
    total: Tensor | None = None
    for index in range(len(next(iter(batch.values())))):
        single = example(batch, index)
        found = grad(lambda v, b=single: summed_loss(name, model, v, b))(values)
        flat = torch.cat([found[n].flatten() for n in values])
        term = torch.outer(flat, flat)
        total = term if total is None else total + term
    assert total is not None
    return total / NUM_TERMS.get(name, 4)


def dense_exact(name: str, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Σ_n J_nᵀ H_n J_n over the number of labels that count, with H_n written out by hand."""
    model = copy.deepcopy(model).eval()
    values = {n: p.detach() for n, p in model.named_parameters()}
    total: Tensor | None = None
    for index in range(len(next(iter(batch.values())))):
        single = example(batch, index)
        outputs, counts = predictions(name, model, values, single)
        jacobian = jacobian_of(name, model, values, single)
        hessian = hessian_of(name, outputs, counts)
        term = jacobian.T @ hessian @ jacobian
        total = term if total is None else total + term
    assert total is not None
    return total / NUM_TERMS.get(name, 4)


def predictions(
    name: str, model: nn.Module, values: Mapping[str, Tensor], batch: Any
) -> tuple[Tensor, Tensor]:
    """Logits `[predictions, classes]` of one example, and which predictions count."""
    found = functional_call(model, dict(values), (), {**batch, "return_dict": True})
    if name == "bert, answers":
        logits = torch.stack([found.start_logits[0], found.end_logits[0]])
        ends = torch.cat([batch["start_positions"], batch["end_positions"]])
        return logits, ends < hf_models.LENGTH
    logits = found.logits.reshape(-1, found.logits.shape[-1])
    labels = batch["labels"].reshape(-1)
    if name in ("gpt2", "llama"):
        logits, labels = logits[:-1], labels[1:]
    if labels.is_floating_point():
        return logits, torch.ones(1)
    return logits, labels != -100


def jacobian_of(name: str, model: nn.Module, values: Any, batch: Any) -> Tensor:
    def outputs(given: Any) -> Tensor:
        return predictions(name, model, given, batch)[0].flatten()

    value, pull = torch.func.vjp(outputs, values)
    rows = [pull(unit)[0] for unit in torch.eye(len(value), dtype=value.dtype)]
    return torch.stack([torch.cat([row[n].flatten() for n in values]) for row in rows])


def hessian_of(name: str, logits: Tensor, counts: Tensor) -> Tensor:
    """Second derivatives of the summed loss by the logits."""
    if "regression" in name:
        return 2 * torch.eye(logits.numel(), dtype=logits.dtype)
    if "several" in name:
        sigmoid = logits.sigmoid().flatten()
        return torch.diag(sigmoid * (1 - sigmoid))
    blocks = []
    for row, counted in zip(logits.softmax(dim=1), counts, strict=True):
        blocks.append((torch.diag(row) - torch.outer(row, row)) * counted)
    return torch.block_diag(*blocks)


def assert_exact(
    operator: EKFACLinearOperator, dense: Tensor, model: nn.Module, tolerance: float
) -> None:
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    compared = 0
    for block in operator.blocks:
        groups = len(block.eigenvalues)
        matrix = block_matrix(dense, shapes, block.parameters, groups, block.transposed)
        if float(matrix.abs().max()) > 1e-14:
            assert_close(block.eigenvalues, in_own_basis(block, matrix), tolerance)
            compared += 1
    assert compared > 3


@pytest.mark.parametrize(
    ("name", "fisher"), list(zip(hf_models.CASES, cycle(["empirical", "type2"]), strict=False))
)
def test_fisher_matrix_is_that_of_the_models_own_loss(name: str, fisher: str) -> None:
    model, batch = hf_models.case(name)
    model.train()
    parts = [example(batch, 0), {key: value[1:] for key, value in batch.items()}]
    penalty = exact_penalty(fisher_type=fisher, weighting="uniform")
    penalty.consolidate(model, data=parts)
    (term,) = penalty.terms
    provenance = term.operator.provenance
    assert provenance.num_loss_terms == NUM_TERMS.get(name, 4)
    assert provenance.num_data == 4
    dense = (dense_empirical if fisher == "empirical" else dense_exact)(name, model, batch)
    # Some compute their softmax in float32, whatever they are given.
    assert_exact(term.operator, dense, model, 1e-5 if name == "t5" else 1e-10)
    assert model.training


@pytest.mark.parametrize("name", hf_models.CASES)
def test_the_loss_that_is_written_out_is_the_models_own(name: str) -> None:
    """Or else the test above would hold the library to another loss."""
    model, batch = hf_models.case(name)
    model.eval()
    with torch.no_grad():
        values = {n: p.detach() for n, p in model.named_parameters()}
        count = len(next(iter(batch.values())))
        singles = [example(batch, index) for index in range(count)]
        summed = sum(float(summed_loss(name, model, values, single)) for single in singles)
        expected = float(model(**batch).loss)
    if name == "bert, answers":  # whose own mean is that of two means
        means = []
        for row, end in enumerate(SPANS_LABELS):
            terms = [
                -float(predictions(name, model, values, one)[0][row].log_softmax(0)[int(one[end])])
                for one in singles
                if int(one[end]) < hf_models.LENGTH
            ]
            means.append(sum(terms) / len(terms))
        assert sum(means) / 2 == pytest.approx(expected, rel=1e-5)
        return
    assert summed / NUM_TERMS.get(name, 4) == pytest.approx(expected, rel=1e-5)


def refused(model: nn.Module, data: Any, message: str, error: type[Exception] = ValueError) -> None:
    """It says why, and neither model nor penalty has changed."""
    penalty = EKFACPenalty()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        penalty.consolidate(model, data=data)
    assert penalty.num_tasks == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_layers_without_sizes_are_refused() -> None:
    """Before the loss is looked for, which would run them."""
    model, batch = hf_models.case("bert, one class")
    model.classifier = head = nn.LazyLinear(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"the layers 'classifier', .*run one batch through"):
        EKFACPenalty(exclude=["classifier.*"]).consolidate(model, data=[batch])
    assert head.has_uninitialized_params()
    model(**batch)
    EKFACPenalty().consolidate(model, data=[batch])


def test_batches_without_labels_are_refused() -> None:
    model, batch = hf_models.case("gpt2")
    unlabelled = {key: batch[key] for key in ("input_ids", "attention_mask")}
    message = "batch 1 of data has .*no 'labels'.*DataCollatorForLanguageModeling"
    refused(model, [batch, unlabelled], message)
    refused(model, [unlabelled], "batch 0 of data has")


@pytest.mark.parametrize("key", ["labels", "input_ids", "attention_mask"])
@pytest.mark.parametrize("name", ["gpt2", "bert, one class", "t5"])
def test_lists_are_refused_by_name(name: str, key: str) -> None:
    model, batch = hf_models.case(name)
    data = [batch, {**batch, key: batch[key].tolist()}]
    refused(model, data, f"batch 1 of data has '{key}' of type list; expected a tensor", TypeError)
    refused(model, [{**batch, key: batch[key].numpy()}], f"'{key}' of type ndarray", TypeError)


@pytest.mark.parametrize("name", ["gpt2", "bert, one class", "bert, tokens"])
def test_the_advice_for_lists_works(name: str) -> None:
    model, batch = hf_models.case(name)
    examples = [{key: value[i].tolist() for key, value in batch.items()} for i in range(4)]
    refused(model, DataLoader(examples, 2), r"of type list; .*default_data_collator", TypeError)
    expected, equal, padded = (exact_penalty(fisher_type="type2") for _ in range(3))
    expected.consolidate(model, data=[batch])
    equal.consolidate(model, data=DataLoader(examples, 2, collate_fn=default_data_collator))
    # Of another length each.
    for example in examples:
        length = sum(example["attention_mask"])
        cut = {k: v[:length] for k, v in example.items() if isinstance(v, list)}
        example.update(cut)
    words = {"[PAD]": 0, **{f"word{i}": i for i in range(1, hf_models.VOCABULARY)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "[PAD]")), pad_token="[PAD]"
    )
    per_token = name != "bert, one class"
    collator = (DataCollatorForSeq2Seq if per_token else DataCollatorWithPadding)(tokenizer)
    with pytest.raises(TypeError, match=rf"collate_fn={type(collator).__name__}\(tokenizer\)"):
        expected.consolidate(model, data=[examples[0]])
    padded.consolidate(model, data=DataLoader(examples, 2, collate_fn=collator))
    x = {key: torch.randn_like(p) for key, p in model.named_parameters()}
    for penalty in (equal, padded):
        assert float(penalty(x)) == pytest.approx(float(expected(x)), rel=1e-6)
    made = tokenizer(["word1 word2"], return_tensors="pt")
    assert all(isinstance(made[key], Tensor) for key in made)


def test_answers_need_both_ends() -> None:
    model, batch = hf_models.case("bert, answers")
    del batch["end_positions"]
    refused(model, [batch], "no 'end_positions'")


def test_single_examples_are_refused_unless_they_are_batches_of_one() -> None:
    model, batch = hf_models.case("bert, one class")
    alone = {key: value[0] for key, value in batch.items()}
    refused(model, [alone], r"a single number as 'labels', as one example has.*DataLoader")
    of_one = {**{key: value[:1] for key, value in batch.items()}, "labels": batch["labels"][0]}
    penalty = exact_penalty()
    penalty.consolidate(model, data=[of_one])
    assert penalty.num_tasks == 1


def test_pairs_are_refused() -> None:
    model, batch = hf_models.case("gpt2")
    refused(model, [(batch, batch["labels"])], "batch 0 of data is a tuple", TypeError)


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining])
def test_models_of_which_no_loss_is_known_are_refused(kind: Any) -> None:
    model = kind(hf_models.bert_config())
    refused(model, [hf_models.masked()], f"that {kind.__name__} is trained with is unknown")


def test_the_advice_for_unknown_losses_works() -> None:
    """`loss_func`, pairs and `forward`, as the message has them; here for a loss that is known."""
    model, batch = hf_models.case("bert, one class")
    own, told = exact_penalty(fisher_type="type2"), exact_penalty(fisher_type="type2")
    own.consolidate(model, data=[batch])
    told.consolidate(
        model,
        nn.CrossEntropyLoss(),
        [({k: v for k, v in batch.items() if k != "labels"}, batch["labels"])],
        forward=lambda batch: model(**batch).logits,
    )
    x = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    assert float(own(x)) == pytest.approx(float(told(x)), rel=1e-12)


class WithAnotherTerm(GPT2LMHeadModel):
    def forward(self, *args: Any, **options: Any) -> Any:
        found = super().forward(*args, **options)
        if found.loss is not None:
            found.loss = found.loss + found.logits.square().mean()
        return found


def test_a_loss_with_further_terms_is_refused() -> None:
    torch.manual_seed(0)
    model = WithAnotherTerm(hf_models.gpt2_config())
    refused(model, [hf_models.language()], "returns the loss .* which is none of .*next tokens")


def test_the_recipe_for_experts() -> None:
    """As the page has it; the first refusal says how experts are to be computed."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=hf_models.VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        output_router_logits=True,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    batch = hf_models.language()
    refused(model, [batch], "as if it had additional terms")
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    data = [(inputs, batch["labels"][:, 1:])]

    def consolidated() -> EKFACPenalty:
        penalty = exact_penalty(fisher_type="empirical", weighting="uniform")
        penalty.consolidate(
            model,
            nn.CrossEntropyLoss(),
            data,
            forward=lambda b: model(**b).logits[:, :-1].transpose(1, 2),
        )
        return penalty

    if model.get_experts_implementation() == "grouped_mm":
        with pytest.raises(ValueError, match=r"set_experts_implementation\('batched_mm'\)"):
            consolidated()
    model.set_experts_implementation("batched_mm")
    model.double()
    (term,) = consolidated().terms
    squares = dict.fromkeys(dict(model.named_parameters()), 0.0)
    count = int((data[0][1] != -100).sum())
    for index, labels in enumerate(data[0][1]):
        model.zero_grad()
        logits = model(**example(inputs, index)).logits[0, :-1]
        nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[name] += float(parameter.grad.square().sum()) / count
    total = sum(squares.values())
    assert float(term.operator.trace) == pytest.approx(total, rel=1e-6)


class Unshifted(GPT2LMHeadModel):
    """As the decoders of translation models are, which are made for labels of the same place."""

    def forward(self, *args: Any, labels: Tensor | None = None, **options: Any) -> Any:
        found = super().forward(*args, **options)
        if labels is not None:
            found.loss = nn.functional.cross_entropy(found.logits.transpose(1, 2), labels)
        return found


def test_the_shift_is_measured() -> None:
    torch.manual_seed(0)
    model, batch = Unshifted(hf_models.gpt2_config()), hf_models.language()
    penalty = exact_penalty()
    penalty.consolidate(model, data=[batch])
    assert penalty.terms[0].operator.provenance.num_loss_terms == 4 * 5 - 3


def test_quantised_weights_are_refused() -> None:
    model, batch = hf_models.case("gpt2")
    model.requires_grad_(False)
    model.is_quantized = True
    refused(model, [batch], "quantised weights, which get no gradients")


def test_a_batch_of_which_no_label_counts_is_passed_over() -> None:
    model, batch = hf_models.case("gpt2")
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    one, both = exact_penalty(), exact_penalty()
    one.consolidate(model, data=[batch])
    both.consolidate(model, data=[nothing, batch])
    assert both.terms[0].operator.provenance.num_loss_terms == 13
    assert one.terms[0].operator.provenance.num_loss_terms == 13


def test_nothing_is_left_behind() -> None:
    """No random numbers are drawn, and what models note in their configuration is gone."""
    model, batch = hf_models.case("bert, several classes, untold")
    state, mode = torch.get_rng_state(), model.training
    own_loss(model, [batch])
    EKFACPenalty(1.0).consolidate(model, data=[batch])
    assert model.config.problem_type is None
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training is mode


def test_an_operator_takes_what_own_loss_returns() -> None:
    model, batch = hf_models.case("gpt2")
    loss_func, data, forward = own_loss(model, [batch])
    parameters = dict(model.named_parameters())
    operator = EKFACLinearOperator(forward, loss_func, parameters, data, fisher_type="empirical")
    assert_exact(operator, dense_empirical("gpt2", model, batch), model, 1e-10)


def test_models_without_a_loss_need_one() -> None:
    model = nn.Linear(2, 2)
    penalty = EKFACPenalty()
    with pytest.raises(ValueError, match=r"loss_func is None.*Linear, which has no loss"):
        penalty.consolidate(model, data=[(torch.zeros(1, 2), torch.zeros(1, 2))])
    with pytest.raises(TypeError, match="data is missing"):
        penalty.consolidate(model)
    with pytest.raises(ValueError, match="forward is given, but loss_func is not"):
        penalty.consolidate(model, data=[], forward=model)


def test_every_pass_sees_the_same_masks() -> None:
    """Of a loader that shuffles, with a collator that masks tokens at random."""
    model, _ = hf_models.case("bert, masked tokens")
    texts = hf_models.texts()["input_ids"]
    passes: list[list[Tensor]] = []

    class Loader:
        def __iter__(self) -> Any:
            seen: list[Tensor] = []
            passes.append(seen)
            for index in torch.randperm(4).split(2):
                hidden = torch.rand(2, texts.shape[1]) < 0.5
                labels = texts[index].masked_fill(~hidden, -100)
                seen.append(labels)
                yield {"input_ids": texts[index], "labels": labels}

    penalty = EKFACPenalty(1.0, memory_budget=2**10)
    penalty.consolidate(model, data=Loader())
    whole = [seen for seen in passes if len(seen) == 2]
    assert len(whole) >= 3  # to soften, for the factors and for the eigenvalues
    for seen in whole[1:]:
        assert all(map(torch.equal, seen, whole[0]))
    counted = sum(int((labels != -100).sum()) for labels in whole[0])
    assert penalty.terms[0].operator.provenance.num_loss_terms == counted


def test_every_pass_has_the_same_order_of_a_loader_with_a_generator() -> None:
    model, batch = hf_models.case("bert, one class")
    passes: list[Tensor] = []

    def collated(examples: Any) -> Any:
        passes.append(torch.cat([example["input_ids"] for example in examples]))
        return default_data_collator(examples)

    examples = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    loader = DataLoader(examples, 2, shuffle=True, generator=generator, collate_fn=collated)
    own_loss(model, loader)
    assert torch.equal(generator.get_state(), before)
    passes.clear()
    EKFACPenalty(1.0, memory_budget=2**10).consolidate(model, data=loader)
    assert torch.equal(generator.get_state(), before)
    # After the first batch, for the form of the loss.
    assert len(passes) >= 1 + 3 * 2  # to soften, for the factors and for the eigenvalues
    assert len(passes) % 2 == 1
    assert all(map(torch.equal, passes[1:-2], passes[3:]))
    assert not torch.equal(passes[1], passes[2])
