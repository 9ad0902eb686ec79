"""A model's own loss: found by the model's class, and held to what the model computes itself."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from rotate_ewc._utils.preserve_state import undisturbed
from rotate_ewc._utils.tree import to_device
from rotate_ewc.integrations.loaders import begin_pass
from rotate_ewc.integrations.transformers.forms import (
    NEXT_TOKENS,
    ONE_CLASS,
    REGRESSION,
    SEVERAL_CLASSES,
    SPANS,
    TOKENS,
    LossForm,
)
from rotate_ewc.penalty.own_loss import OwnLoss
from rotate_ewc.tracing.passes import check_reiterable

# What a head of each kind may be trained with, the most likely first. The keys are those of the
# auto classes: `MODEL_FOR_{key}_MAPPING_NAMES` has the names of all models with such a head.
_FORMS: Final[dict[str, tuple[LossForm, ...]]] = {
    "MASKED_LM": (TOKENS,),
    "TOKEN_CLASSIFICATION": (TOKENS,),
    "SEQ_TO_SEQ_CAUSAL_LM": (TOKENS,),
    "SPEECH_SEQ_2_SEQ": (TOKENS,),
    "CAUSAL_LM": (NEXT_TOKENS, TOKENS),
    "IMAGE_TEXT_TO_TEXT": (NEXT_TOKENS, TOKENS),
    "SEQUENCE_CLASSIFICATION": (ONE_CLASS, SEVERAL_CLASSES, REGRESSION),
    "IMAGE_CLASSIFICATION": (ONE_CLASS, SEVERAL_CLASSES, REGRESSION),
    "VIDEO_CLASSIFICATION": (ONE_CLASS, SEVERAL_CLASSES, REGRESSION),
    "AUDIO_CLASSIFICATION": (ONE_CLASS,),
    "MULTIPLE_CHOICE": (ONE_CLASS,),
    "NEXT_SENTENCE_PREDICTION": (ONE_CLASS,),
    "QUESTION_ANSWERING": (SPANS,),
}
_PROBLEMS: Final = {
    "single_label_classification": ONE_CLASS,
    "multi_label_classification": SEVERAL_CLASSES,
    "regression": REGRESSION,
}
# What models take as tensors alone; some other inputs may be lists.
_INPUTS: Final = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
    *("decoder_input_ids", "decoder_attention_mask"),
)


def own_loss(model: nn.Module, data: Iterable[Any], *, label_smoothing: float = 0.0) -> OwnLoss:
    """Return the loss that a model of transformers computes itself from the labels in a batch.

    It is one of a few forms, chosen by the model's class and configuration. On the first batch that
    has labels it is compared with the loss that the model returns.

    Args:
        model: A model of transformers, also inside adapters of PEFT.
        data: Re-iterable batches as the model takes them: mappings, with labels.
        label_smoothing: As `Trainer` has it.

    Returns:
        The loss of outputs and targets, the batches as pairs of inputs and targets, and a function
        from inputs to outputs. `EKFACLinearOperator` takes these three as well.

    Raises:
        ValueError: If the model's kind of loss is unknown, differs from what the model computes
            itself, or needs labels that the batches lack.
        TypeError: If the batches are not mappings of tensors.
    """
    _check_weights(model)
    check_reiterable(data)
    # The loaders that accelerate prepares keep account of where training is.
    data = getattr(data, "base_dataloader", data)
    form = _form_of(model, data)
    form = form.smoothed(label_smoothing)
    return OwnLoss(form.loss, LabelledBatches(data, model, form), partial(outputs_of, model, form))


@dataclass(frozen=True)
class LabelledBatches:
    """Batches as pairs of what the model takes and targets.

    Every pass over them begins with the same random numbers, so that they come in the same order
    and, if masks are drawn, with the same tokens masked.

    Attributes:
        data: The batches.
        model: The model they are for.
        form: The form of the loss.
    """

    data: Iterable[Any]
    model: nn.Module
    form: LossForm

    def __iter__(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield inputs and targets; the caller must restore the states of random numbers."""
        begin_pass(self.data)
        for index, batch in enumerate(self.data):
            _check_batch(batch, index, self.form)
            yield inputs_of(self.model, batch, self.form), self.form.targets(batch)

    def num_terms(self) -> tuple[int, int]:
        """Return what the mean loss over all batches divides by, and the number of examples."""
        targets = [targets for _, targets in self]
        return sum(map(self.form.num_terms, targets)), sum(map(len, targets))


def inputs_of(model: nn.Module, batch: Mapping[str, Any], form: LossForm) -> dict[str, Any]:
    """Return the parts of a batch that a model takes, without the labels."""
    base = base_model(model)
    inputs = {key: value for key, value in batch.items() if key not in form.labels}
    if _has_decoder(base) and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs):
        shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            # It makes the decoder's inputs from the labels by itself.
            return dict(batch)
        inputs["decoder_input_ids"] = shift(labels=batch["labels"])
    return inputs


def outputs_of(model: nn.Module, form: LossForm, inputs: Mapping[str, Any]) -> Tensor:
    """Return a model's outputs, as the loss takes them."""
    options = {"return_dict": True}
    if "use_cache" in inspect.signature(base_model(model).forward).parameters:
        options["use_cache"] = False
    return form.outputs(model(**{**inputs, **options}))


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers inside one that has adapters."""
    inside = getattr(model, "get_base_model", None)
    base = model if inside is None else inside()
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"loss_func is None, and {type(base).__name__} is not a transformers model; expected "
            f"a PreTrainedModel, or loss_func and forward"
        )
    return base


def _form_of(model: nn.Module, data: Iterable[Any]) -> LossForm:
    """Return the form of a model's loss that agrees with what the model returns for a batch."""
    base = base_model(model)
    forms = _forms_of(base)
    parameters = list(model.parameters())
    problem_type = getattr(base.config, "problem_type", None)
    try:
        with undisturbed(model.modules(), parameters, data), torch.no_grad():
            begin_pass(data)
            for index, batch in enumerate(data):
                _check_batch(batch, index, forms[0])
                batch = to_device(dict(batch), parameters[0].device)
                expected = _loss_of(model, batch)
                if math.isfinite(expected):  # else no label counts
                    return _matching(model, forms, batch, expected)
    finally:
        # Models note there what they find in the labels.
        base.config.problem_type = problem_type
    return forms[0]


def _forms_of(base: PreTrainedModel) -> tuple[LossForm, ...]:
    """Return the forms that a model's loss may have, by its class or a base of that."""
    for kind in type(base).__mro__:
        for key, forms in _FORMS.items():
            names = getattr(modeling_auto, f"MODEL_FOR_{key}_MAPPING_NAMES", {}).values()
            known = chain.from_iterable([n] if isinstance(n, str) else n for n in names)
            if kind.__name__ in known:
                problem = _PROBLEMS.get(getattr(base.config, "problem_type", None) or "")
                return (problem,) if problem in forms else forms
    raise ValueError(
        f"loss_func is None, and the loss that {type(base).__name__} is trained with is unknown; "
        f"expected a model with a head for one of {', '.join(map(_readable, _FORMS))}, or the loss "
        f"of its outputs: loss_func=torch.nn.CrossEntropyLoss(), data=[(batch, batch['labels']) "
        f"for batch in loader] and forward=lambda batch: model(**batch).logits, say, with the "
        f"classes on the second axis"
    )


def _readable(key: str) -> str:
    return key.replace("_", " ").lower()


def _loss_of(model: nn.Module, batch: Mapping[str, Any]) -> float:
    """Return the loss that a model computes itself."""
    loss = model(**{**batch, "return_dict": True}).loss
    if loss is None:
        raise ValueError(
            f"{type(model).__name__} returns no loss for a batch with {list(batch)}; expected the "
            f"labels that it takes, or loss_func and forward"
        )
    return float(loss)


def _matching(
    model: nn.Module, forms: tuple[LossForm, ...], batch: Mapping[str, Any], expected: float
) -> LossForm:
    """Return the form that comes nearest to the loss that the model computes itself for a batch."""
    values, told = {}, []
    tolerance = 0.0
    for index, form in enumerate(forms):
        outputs = outputs_of(model, form, inputs_of(model, batch, form))
        half = torch.finfo(outputs.dtype).bits < 32
        tolerance = max(1e-6, abs(expected) * (1e-2 if half else 1e-5))
        try:
            values[index] = form.value(outputs.double(), form.targets(batch))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            told.append(f"{form.name}: {error}")
        else:
            told.append(f"{form.name}: {values[index]:.6g}")
    # The first of equally near ones, as for a model that is not trained at all.
    nearest = min(values, key=lambda index: abs(values[index] - expected), default=None)
    if nearest is None or not abs(values[nearest] - expected) <= tolerance:
        raise ValueError(
            f"{type(base_model(model)).__name__} returns the loss {expected:.6g}, which is none of "
            f"the losses known for its head ({'; '.join(told)}), as if it had additional "
            f"terms; expected one of these, or the loss of its outputs: loss_func and forward"
        )
    return forms[nearest]


def _check_batch(batch: Any, index: int, form: LossForm) -> None:
    """Raise unless a batch is a mapping of tensors, with the labels that a loss needs."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"batch {index} of data is a {type(batch).__name__}; expected a dictionary as the "
            f"model takes it, with {_keys(form)}, or loss_func for batches (inputs, targets)"
        )
    if missing := [key for key in form.labels if batch.get(key) is None]:
        advice = ""
        if form in (TOKENS, NEXT_TOKENS):
            advice = (
                ". DataCollatorForLanguageModeling makes labels of the tokens themselves (-100 "
                "for those that do not count)"
            )
        raise ValueError(
            f"batch {index} of data has {list(batch)}, but no {missing[0]!r}, which the model's "
            f"loss needs; expected tensors {_keys(form)} in every batch{advice}"
        )
    alone = [key for key in form.labels if getattr(batch[key], "ndim", 1) == 0]
    if alone and all(getattr(value, "ndim", 0) < 2 for value in batch.values()):
        raise ValueError(
            f"batch {index} of data has a single number as {alone[0]!r}, as one example has; "
            f"expected batches: pass torch.utils.data.DataLoader(data, batch_size=100)"
        )
    wrong = [key for key in form.labels if not isinstance(batch[key], Tensor)]
    wrong += [key for key in _INPUTS if isinstance(batch.get(key), (list, tuple, np.ndarray))]
    if wrong:
        # The one that pads labels too.
        of_tokens = form in (TOKENS, NEXT_TOKENS)
        collator = "DataCollatorForSeq2Seq" if of_tokens else "DataCollatorWithPadding"
        raise TypeError(
            f"batch {index} of data has {wrong[0]!r} of type {type(batch[wrong[0]]).__name__}; "
            f"expected a tensor. For a DataLoader, pass collate_fn=default_data_collator of "
            f"transformers, or, if examples differ in length, collate_fn={collator}(tokenizer). To "
            f"a tokenizer that makes the batches, pass return_tensors='pt'"
        )


def _keys(form: LossForm) -> str:
    return " and ".join(map(repr, form.labels))


def _check_weights(model: nn.Module) -> None:
    """Raise if all that a model has is weights that no gradient reaches, as quantised ones are."""
    base = base_model(model)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if getattr(base, "is_quantized", False) and not trained:
        raise ValueError(
            f"{type(base).__name__} has quantised weights, which get no gradients and have no "
            f"Fisher matrix; expected the model without quantization_config, or adapters that are "
            f"trained on it (then only the adapters are protected)"
        )


def _has_decoder(base: PreTrainedModel) -> bool:
    return bool(getattr(base.config, "is_encoder_decoder", False))
