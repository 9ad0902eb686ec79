"""`RotatedEWCCallback` in `Trainer`."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.transformers import RotatedEWCCallback
from tests.helpers import hf_models
from tests.helpers.exact import exact_penalty
from tests.helpers.hf_training import penalty_of_a_task, task, tiny_gpt2, trainer


@pytest.fixture(autouse=True)
def _quiet(recwarn: Any) -> None:
    """What other packages warn of is not ours to fix."""


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def by_hand(model: Any, penalty: EKFACPenalty, batches: Any, accumulate: int = 1) -> None:
    """What `Trainer` is to do, as a plain loop: mean loss over all labels of a step, clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, eps=1e-3)
    penalty.attach(optimizer, model)
    model.train()
    for start in range(0, len(batches), accumulate):
        parts = batches[start : start + accumulate]
        count = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
        optimizer.zero_grad()
        for part in parts:
            logits = model(part["input_ids"], attention_mask=part["attention_mask"]).logits
            loss = nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), part["labels"][:, 1:], reduction="sum"
            )
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


class Batches(TrainerCallback):
    """Keeps what the model was given."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[dict[str, Tensor]] = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and "labels" in kwargs:
            tensors = {k: v for k, v in kwargs.items() if k in hf_models.language()}
            self.seen.append({key: value.clone() for key, value in tensors.items()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_an_attached_penalty(tmp_path: Path, accumulate: int) -> None:
    model = tiny_gpt2()
    other = copy.deepcopy(model)
    penalty = penalty_of_a_task(model)
    twin = copy.deepcopy(penalty)
    batches = Batches(model)
    run = trainer(
        tmp_path,
        model,
        [RotatedEWCCallback(penalty, consolidate_at_end=False)],
        gradient_accumulation_steps=accumulate,
        per_device_train_batch_size=4 // accumulate,
        adam_epsilon=1e-3,  # gradients that are rounding errors make no steps
    )
    run.train()
    assert len(batches.seen) == 6 * accumulate
    twin.current_num_data = 12
    by_hand(other, twin, batches.seen, accumulate)
    assert largest_difference(weights(model), weights(other)) < 1e-5
    assert penalty.num_tasks == 1


def test_the_task_is_consolidated_at_the_end(tmp_path: Path) -> None:
    """As by hand, at the weights in the end; and the next training is free of the optimizer."""
    model = tiny_gpt2()
    penalty = exact_penalty(weighting="uniform")
    callback = RotatedEWCCallback(penalty)
    run = trainer(tmp_path, model, [callback])
    run.train()
    assert penalty.num_tasks == 1
    assert callback.attachment is None
    assert callback.consolidation_seconds > 0
    (term,) = penalty.terms
    expected = exact_penalty(weighting="uniform")
    expected.consolidate(model, data=[hf_models.language(1, 12)])
    assert term.operator.provenance.num_loss_terms == 12 * 4 - 3
    delta = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    assert float(penalty(delta)) == pytest.approx(float(expected(delta)), rel=0.2)  # sampled labels
    for name, anchor in term.anchor.items():
        assert torch.equal(anchor, dict(model.named_parameters())[name])
    run.train()
    assert penalty.num_tasks == 2


def test_samples_are_drawn(tmp_path: Path) -> None:
    penalty = exact_penalty()
    trainer(tmp_path, tiny_gpt2(), [RotatedEWCCallback(penalty, num_samples=5)]).train()
    provenance = penalty.terms[0].operator.provenance
    assert provenance.num_data == 12
    assert provenance.settings["num_data_seen"] == 5


def test_loss_terms_of_the_task_are_counted(tmp_path: Path) -> None:
    model = tiny_gpt2()
    penalty = penalty_of_a_task(model)
    trainer(tmp_path, model, [RotatedEWCCallback(penalty)]).train()
    assert penalty.current_num_data == 12
    assert penalty.current_num_loss_terms == 12 * 4 - 3


def test_the_best_weights_are_consolidated(tmp_path: Path) -> None:
    model = tiny_gpt2()
    penalty = exact_penalty()
    run = trainer(
        tmp_path,
        model,
        [RotatedEWCCallback(penalty)],
        load_best_model_at_end=True,
        learning_rate=1.0,  # so that the first is the best
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.train()
    assert run.state.best_global_step < 6
    for name, anchor in penalty.terms[0].anchor.items():
        assert torch.equal(anchor, dict(model.named_parameters())[name])


@pytest.mark.parametrize(
    ("update", "every", "optimizer", "strength"),
    [
        ("tangent", 4, "adamw_torch", 5.0),
        ("rotated", 3, "sgd", "auto"),
    ],
)
def test_resumed_runs_end_in_the_same_bits(
    tmp_path: Path, update: str, every: int, optimizer: str, strength: Any
) -> None:
    """Also with dropout, whose random numbers `Trainer` restores; and with the penalty made new."""

    def run(folder: Path, resume: bool) -> tuple[dict[str, Tensor], EKFACPenalty]:
        model = tiny_gpt2(resid_pdrop=0.2)
        penalty = penalty_of_a_task(model, strength)
        if resume:
            penalty = exact_penalty(strength)
        callback = RotatedEWCCallback(penalty, update=update, every=every)
        made = trainer(
            folder,
            model,
            [callback],
            optim=optimizer,
            save_strategy="steps",
            save_steps=3,
            max_steps=8,
        )
        made.train(resume_from_checkpoint=resume)
        return weights(model), penalty

    whole, penalty = run(tmp_path / "whole", False)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
    resumed, resumed_penalty = run(tmp_path / "parts", True)
    assert same(whole, resumed)
    assert resumed_penalty.num_tasks == 2
    assert resumed_penalty.strength == penalty.strength
    assert float(resumed_penalty(whole)) == float(penalty(whole))


def test_a_checkpoint_without_the_penalty_is_refused(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 3}
    trainer(tmp_path, tiny_gpt2(), [], **options).train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    penalty = exact_penalty()
    run = trainer(tmp_path, tiny_gpt2(), [RotatedEWCCallback(penalty)], **options)
    with pytest.raises(FileNotFoundError, match=r"there is no 'penalty\.safetensors' in") as caught:
        run.train(resume_from_checkpoint=True)
    advice = str(caught.value).partition("save the penalty there: ")[2]
    assert advice.startswith("penalty.save(")
    exec(advice, {"penalty": penalty})
    run = trainer(tmp_path, tiny_gpt2(), [RotatedEWCCallback(penalty)], **options)
    with pytest.warns(UserWarning, match=r"there is no 'penalty_attachment\.pt'"):
        run.train(resume_from_checkpoint=True)
    assert penalty.num_tasks == 1


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path) -> None:
    """Of two folders with the same number it is the one that is resumed."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    for name in ("one", "other"):
        trainer(
            tmp_path / name,
            tiny_gpt2(),
            [RotatedEWCCallback(exact_penalty())],
            learning_rate=1e-2 if name == "one" else 1e-3,
            **options,
        ).train()
    run = trainer(
        tmp_path / "one",
        tiny_gpt2(),
        [RotatedEWCCallback(exact_penalty())],
        **{**options, "max_steps": 4},
    )
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        run.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))


def test_logs_tell_the_penalty_and_leave_losses_alone(tmp_path: Path) -> None:
    model = tiny_gpt2()
    plain = copy.deepcopy(model)
    penalty = penalty_of_a_task(model, strength=3.0)
    run = trainer(tmp_path / "a", model, [RotatedEWCCallback(penalty, False)], max_steps=1)
    run.train()
    (first, *_) = run.state.log_history
    without = trainer(tmp_path / "b", plain, [], max_steps=1)
    without.train()
    assert first["loss"] == without.state.log_history[0]["loss"]
    value = float(penalty(model))
    assert first["rotated_ewc_penalty"] == pytest.approx(value, rel=1e-5)
    assert first["rotated_ewc_strength"] == 3.0
    assert first["rotated_ewc_share"] == pytest.approx(value / (value + first["loss"]), rel=1e-5)
    evaluated = run.evaluate()
    expected = trainer(tmp_path / "c", model, []).evaluate()["eval_loss"]
    assert evaluated["eval_loss"] == expected
    assert not any("rotated_ewc" in key for key in evaluated)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"label_smoothing_factor": 0.1},
        {"optim": "adafactor"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_ways_to_train(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_gpt2()
    penalty = penalty_of_a_task(model, strength=50.0)
    update = "gradient" if options.get("optim") == "adafactor" else "rotated"
    free = copy.deepcopy(model)
    trainer(tmp_path, free, [], max_steps=20, **options).train()
    callback = RotatedEWCCallback(penalty, update=update)
    value = float(penalty(free))
    twin = copy.deepcopy(penalty)
    trainer(tmp_path, model, [callback], max_steps=20, **options).train()
    assert penalty.num_tasks == 2
    assert float(twin(model)) < 0.8 * value


def test_two_penalties_are_refused(tmp_path: Path) -> None:
    penalties: Any = [exact_penalty(), exact_penalty()]
    with pytest.raises(TypeError, match="penalty is list; expected one EKFACPenalty"):
        RotatedEWCCallback(penalties)
    run = trainer(tmp_path, tiny_gpt2(), [RotatedEWCCallback(p) for p in penalties])
    with pytest.raises(ValueError, match=r"two RotatedEWCCallbacks .* one EKFACPenalty for all"):
        run.train()
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks


def test_what_cannot_be_consolidated_is_refused_before_training(tmp_path: Path) -> None:
    model = tiny_gpt2()
    before = weights(model)
    data = [{"input_ids": text["input_ids"]} for text in task(1)]
    run = trainer(tmp_path, model, [RotatedEWCCallback(exact_penalty())], data=data)
    with pytest.raises(ValueError, match=r"batch 0 of data has .* but no 'labels'"):
        run.train()
    assert same(before, weights(model))


def test_arguments_are_checked() -> None:
    penalty = exact_penalty()
    with pytest.raises(TypeError, match="consolidate_at_end"):
        RotatedEWCCallback(penalty, "yes")
    with pytest.raises(ValueError, match="num_samples"):
        RotatedEWCCallback(penalty, num_samples=0)
    with pytest.raises(ValueError, match="view is given, and consolidate_at_end is True"):
        RotatedEWCCallback(penalty, view=lambda model: {})


def test_each_of_several_processes_has_its_part(tmp_path: Path) -> None:
    """Together all examples, each once; loss terms are counted over all of them by everyone."""
    penalty = exact_penalty()
    callback = RotatedEWCCallback(penalty, num_samples=10)
    run = trainer(tmp_path, tiny_gpt2(), [callback])
    loader = run.get_train_dataloader()
    callback._num_data = 12
    texts = [
        [
            tuple(text.tolist())
            for batch in callback._sampled(loader, run.args, part)
            for text in batch["input_ids"]
        ]
        for part in (slice(None), slice(0, None, 2), slice(1, None, 2))
    ]
    assert len(texts[0]) == 10
    assert sorted(texts[1] + texts[2]) == sorted(texts[0])


def test_the_loader_of_trainer_is_taken_as_it_is(tmp_path: Path) -> None:
    """And accelerate's account of where training is stays what it was."""
    model = tiny_gpt2()
    run = trainer(tmp_path, model, [])
    loader = run.get_train_dataloader()
    penalty = exact_penalty()
    penalty.consolidate(model, data=loader)
    assert penalty.terms[0].operator.provenance.num_loss_terms == 12 * 4 - 3
    assert not run.accelerator.gradient_state.in_dataloader
    assert loader.iteration == 0
