"""Adapters of PEFT: protected themselves, or trained while their base model is protected."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from rotate_ewc import EKFACPenalty
from rotate_ewc.integrations.peft import effective_parameters
from rotate_ewc.integrations.transformers import RotatedEWCCallback
from rotate_ewc.penalty.updates.viewed import _forward_products
from tests.helpers import hf_models
from tests.helpers.exact import exact_penalty
from tests.helpers.hf_training import tiny_gpt2, trainer
from tests.helpers.oracles import dense_operator

pytestmark = pytest.mark.filterwarnings("ignore")


def adapted(model: PreTrainedModel, name: str = "default", config: Any = None) -> PeftModel:
    """A copy with adapters that change something already."""
    torch.manual_seed(1)
    config = config or LoraConfig(r=2, lora_alpha=3, target_modules=["c_attn", "c_fc"])
    with_adapters = get_peft_model(copy.deepcopy(model), config, adapter_name=name)
    with torch.no_grad():
        for parameter in with_adapters.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return with_adapters


CONFIGS: dict[str, tuple[str, Any]] = {
    "Conv1D": ("gpt2", LoraConfig(r=2, target_modules=["c_attn", "c_proj"])),
    "linear": ("llama", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_rslora=True)),
    "bias": ("bert, one class", LoraConfig(r=2, target_modules=["query"], lora_bias=True)),
    "biases": ("bert, one class", LoraConfig(r=2, target_modules=["query"], bias="all")),
    "embedding": ("gpt2", LoraConfig(r=2, target_modules=["wpe"])),
    "convolution": ("vit", LoraConfig(r=2, target_modules=["projection"])),
    "head": (
        "bert, one class",
        LoraConfig(r=2, target_modules=["value"], modules_to_save=["classifier"]),
    ),
    "LoHa": ("llama", LoHaConfig(r=2, target_modules=["q_proj"])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_effective_parameters_are_those_of_the_merged_model(name: str) -> None:
    case, config = CONFIGS[name]
    base, batch = hf_models.case(case)
    model = adapted(base, config=config)
    found = effective_parameters(model)
    assert found.keys() >= dict(base.named_parameters()).keys()
    changed = {n for n, p in base.named_parameters() if not torch.equal(p, found[n])}
    assert changed == {n for n in dict(base.named_parameters()) if found[n].requires_grad}
    assert changed
    model.eval()
    with torch.no_grad():
        outputs = model(**batch).logits
    merged = model.merge_and_unload()
    for key, parameter in merged.named_parameters():
        assert torch.allclose(found[key], parameter, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.allclose(merged.eval()(**batch).logits, outputs, atol=1e-6)


def test_adapters_count_as_they_are_switched() -> None:
    base, _ = hf_models.case("gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    own = dict(base.named_parameters())[name]
    model = adapted(base, "one")
    first = effective_parameters(model)[name]
    torch.manual_seed(2)
    model.add_adapter("two", LoraConfig(r=1, target_modules=["c_attn"], init_lora_weights=False))
    assert torch.equal(effective_parameters(model)[name], first)
    model.set_adapter("two")
    assert not torch.equal(effective_parameters(model)[name], first)
    with model.disable_adapter():
        assert torch.equal(effective_parameters(model)[name], own)
    model.set_adapter("one")
    model.merge_adapter()
    assert torch.allclose(effective_parameters(model)[name], first)
    assert effective_parameters(base)[name] is own


def consolidated(
    base: PreTrainedModel, batch: Any, strength: Any = 2.0, **options: Any
) -> EKFACPenalty:
    include = ["*.c_*.weight"]
    penalty = exact_penalty(strength, fisher_type="empirical", include=include, **options)
    penalty.consolidate(base, data=[batch])
    return penalty


def dense_gradients(penalty: EKFACPenalty, model: PeftModel) -> dict[str, Tensor]:
    """λ F Δ by the dense matrix, and from there to A and B by hand: Δ = s (B A)ᵀ for a Conv1D."""
    (term,) = penalty.terms
    shapes = {name: tuple(a.shape) for name, a in term.anchor.items()}
    dense = dense_operator(term.operator.blocks, shapes)
    effective = {n: p.detach() for n, p in effective_parameters(model).items()}
    delta = torch.cat([(effective[n] - a).flatten() for n, a in term.anchor.items()])
    product = penalty.scale * dense @ delta
    parts = dict(zip(shapes, product.split([a.numel() for a in term.anchor.values()]), strict=True))
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        gradient = parts[f"{layer}.weight"].view(shapes[f"{layer}.weight"]).T * (3 / 2)
        other = name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("_X", "_B")
        partner = dict(model.named_parameters())[other].detach()
        found[name] = partner.T @ gradient if rest.startswith("A") else gradient @ partner.T
    return found


def test_gradients_reach_adapters() -> None:
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    model = adapted(base)
    penalty(effective_parameters(model)).backward()
    expected = dense_gradients(penalty, model)
    assert len(expected) == 4
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-10, atol=1e-14)


def test_steps_have_the_penalty_in_their_gradients() -> None:
    """And the gradients that the user sees are those of the loss."""
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    model, twin = adapted(base), adapted(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    handle = penalty.attach(optimizer, model, "gradient", view=effective_parameters)
    for _ in range(2):
        for each in (model, twin):
            each.zero_grad()
            each.eval()(**batch).loss.backward()
        added = dense_gradients(penalty, twin)
        before = {n: p.grad.clone() for n, p in twin.named_parameters() if p.requires_grad}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if parameter.requires_grad:
                    parameter.sub_(0.01 * (before[name] + added[name]))
        for name, parameter in model.named_parameters():
            expected = dict(twin.named_parameters())[name]
            assert torch.allclose(parameter, expected, rtol=1e-9, atol=1e-12)
            if parameter.requires_grad:
                assert torch.allclose(parameter.grad, before[name], rtol=1e-6)
    handle.detach()
    assert not optimizer._optimizer_step_pre_hooks


def test_products_with_the_jacobian_of_a_view() -> None:
    """Against torch.func, for a view that is not linear in all parameters at once."""
    torch.manual_seed(0)
    a, b, c = (torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    along = [torch.randn_like(a), torch.randn_like(b), torch.randn_like(c)]

    def view(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a @ b + 1.0, b.exp()

    found = _forward_products(list(view(a, b)), [a, b, c], along)
    _, expected = torch.func.jvp(view, (a, b), tuple(along[:2]))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other)


def train(model: nn.Module, batch: Any, steps: int, penalty: EKFACPenalty | None) -> None:
    model.eval()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.03, weight_decay=0.0
    )
    if penalty is not None:
        penalty.attach(optimizer, model, "gradient", view=effective_parameters)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("strength", [30.0, "auto"])
def test_less_of_the_base_model_is_forgotten(strength: Any) -> None:
    base, _ = hf_models.case("gpt2")
    old, new = hf_models.language(1), hf_models.language(2)
    train(base, old, 60, None)
    penalty = consolidated(base, old, strength, plasticity=0.8)
    start = float(base(**old).loss)
    losses = {}
    for name, used in (("free", None), ("protected", penalty)):
        model = adapted(base)
        train(model, new, 40, used)
        losses[name] = float(model(**old).loss) - start, float(model(**new).loss)
    assert losses["protected"][0] < 0.9 * losses["free"][0]
    assert penalty.strength != 1.0


def test_names_survive(tmp_path: Path) -> None:
    """Merging, another adapter name, and saving and loading."""
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    model = adapted(base, "mine")
    value = float(penalty(effective_parameters(model)))
    assert value > 0
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine", adapter_name="other")
    assert float(penalty(effective_parameters(again.double()))) == pytest.approx(value, rel=1e-6)
    merged = model.merge_and_unload()
    assert float(penalty(merged)) == pytest.approx(value, rel=1e-9)
    penalty.save(tmp_path / "penalty.safetensors")
    loaded = EKFACPenalty.load(tmp_path / "penalty.safetensors")
    # The next task is consolidated on the merged model, whose weights are to be protected.
    loaded.consolidate(merged.requires_grad_(True), data=[batch])
    assert loaded.num_tasks == 2
    assert float(loaded(effective_parameters(adapted(merged, "next")))) > 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(r=2, target_modules=["c_attn"], use_dora=True), "DoraLinearVariant"),
        (IA3Config(target_modules=["c_attn"], feedforward_modules=[]), "not added to the weights"),
    ],
)
def test_adapters_that_are_not_added_are_refused(config: Any, reason: str) -> None:
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    model = adapted(base, config=config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    message = rf"'transformer.h.0.attn.c_attn' \(.*{reason}.*use_dora=False"
    with pytest.raises(ValueError, match=message):
        penalty.attach(optimizer, model, "gradient", view=effective_parameters)
    assert not optimizer._optimizer_step_pre_hooks
    # The advice: a penalty on the adapters themselves.
    own = exact_penalty()
    own.consolidate(model, data=[batch])
    own.attach(optimizer, model)


@pytest.mark.parametrize(
    "config",
    [
        HRAConfig(r=2, target_modules=["q_proj"]),
        OFTConfig(oft_block_size=2, r=0, target_modules=["q_proj"]),
        MissConfig(r=2, target_modules=["q_proj"]),
    ],
)
def test_adapters_that_rotate_weights_are_refused(config: Any) -> None:
    """A rotation has the shape of a square layer's weight, to which it could be added."""
    base, _ = hf_models.case("llama")
    with pytest.raises(ValueError, match=r"self_attn.q_proj' \(.*not added to the weights"):
        effective_parameters(adapted(base, config=config))


def test_quantised_weights_are_refused() -> None:
    """Stored as integers, as bitsandbytes does; all such layers are named."""
    base, _ = hf_models.case("gpt2")
    model = adapted(base)
    for layer in (model.base_model.model.transformer.h[0].attn.c_attn,):
        weight = layer.base_layer.weight
        weight.requires_grad_(False)
        weight.data = weight.data.to(torch.int8)
    message = r"'transformer.h.0.attn.c_attn' \(quantised, torch.int8\).*without"
    with pytest.raises(ValueError, match=message):
        effective_parameters(model)


@pytest.mark.parametrize("way", ["merged", "switched off", "removed"])
def test_adapters_that_vanish_are_refused(way: str) -> None:
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    model = adapted(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    penalty.attach(optimizer, model, "gradient", view=effective_parameters)
    model.eval()(**batch).loss.backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if way == "merged":
        model.merge_adapter()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
    elif way == "switched off":
        model.disable_adapter_layers()
    else:
        model.add_adapter("other", LoraConfig(r=1, target_modules=["c_attn"]))
        model.set_adapter("other")
    with pytest.raises(ValueError, match=r"none of the protected tensors .* depends on"):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name])


def test_a_view_needs_update_gradient() -> None:
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    model = adapted(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pytest.raises(ValueError, match=r"update is 'rotated'.*expected update='gradient'"):
        penalty.attach(optimizer, model, view=effective_parameters)
    view: Any = "effective"
    with pytest.raises(TypeError, match="view is str; expected a function"):
        penalty.attach(optimizer, model, "gradient", view=view)
    with pytest.raises(ValueError, match="the model has no such parameter"):
        penalty.attach(optimizer, model, "gradient", view=lambda model: {})


@pytest.mark.parametrize("way", ["alone", "in a module", "all parameters"])
def test_adapters_on_what_is_protected_need_a_view(way: str) -> None:
    """The advice is code that runs; its view is that of the documents."""
    base, batch = hf_models.case("gpt2")
    penalty = consolidated(base, batch)
    if way == "all parameters":
        penalty = exact_penalty(2.0)
        penalty.consolidate(base, data=[batch])
    peft_model = adapted(base)
    prefix = "inner." if way == "in a module" else ""
    model = nn.ModuleDict({"inner": peft_model}) if prefix else peft_model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pytest.raises(ValueError, match="no parameter of these names") as caught:
        penalty.attach(optimizer, model)
    message = str(caught.value)
    first = next(iter(penalty.terms[0].anchor)).removesuffix("weight")
    layer = "" if way == "all parameters" else "base_layer."
    assert f"its own are '{prefix}base_model.model.{first}{layer}weight'" in message
    code = re.search(r"(penalty\.attach\(.*\)), from (rotate_ewc\S+)$", message)
    assert code is not None
    scope = {"penalty": penalty, "optimizer": optimizer, "model": model}
    exec(f"from {code[2]} import effective_parameters\n{code[1]}", scope)
    peft_model(**batch).loss.backward()
    optimizer.step()


def test_adapters_of_another_name_are_refused() -> None:
    base, batch = hf_models.case("gpt2")
    model = adapted(base)
    penalty = exact_penalty()
    penalty.consolidate(model, data=[batch])
    renamed = adapted(base, "other")
    optimizer = torch.optim.AdamW([p for p in renamed.parameters() if p.requires_grad], lr=0.01)
    names = r"lora_A\.default\.weight'.*its own are '.*lora_A\.other\.weight'.*adapter_name"
    with pytest.raises(ValueError, match=names):
        penalty.attach(optimizer, renamed)
    again = adapted(base, "default")
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.01)
    penalty.attach(optimizer, again)
    again(**batch).loss.backward()
    optimizer.step()


def test_adapters_alone_are_protected() -> None:
    """With nothing but `consolidate`; the base model requires no gradients."""
    base, batch = hf_models.case("gpt2")
    model = adapted(base)
    penalty = exact_penalty()
    penalty.consolidate(model, data=[batch])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(penalty.terms[0].anchor) == trained
    assert len(trained) == 4
    assert penalty.terms[0].operator.provenance.num_loss_terms == 13
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    penalty.attach(optimizer, model)
    model(**batch).loss.backward()
    optimizer.step()
    assert float(penalty(model)) > 0
    with pytest.raises(ValueError, match=r"lora_A.*the model has no such parameter"):
        penalty(model.merge_and_unload())


def test_in_trainer(tmp_path: Path) -> None:
    base = tiny_gpt2()
    penalty = exact_penalty(50.0, include=["*.c_*.weight"])
    penalty.consolidate(base, data=[hf_models.language(5)])
    model = adapted(base)
    callback = RotatedEWCCallback(
        penalty, consolidate_at_end=False, update="gradient", view=effective_parameters
    )
    run = trainer(tmp_path, model, [callback], save_strategy="steps", save_steps=3)
    run.train()
    assert run.state.log_history[0]["rotated_ewc_penalty"] > 0
    assert (tmp_path / "checkpoint-3" / "penalty.safetensors").is_file()
    own = exact_penalty()
    trainer(tmp_path / "own", model, [RotatedEWCCallback(own)]).train()
    assert all("lora" in name for name in own.terms[0].anchor)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_the_recipe_for_virtual_tokens(kind: Any) -> None:
    """As the page has it; the Fisher matrix is that of a plain loop over the texts."""
    base, batch = hf_models.case("gpt2")
    v = 2
    model = adapted(base, config=kind(task_type="CAUSAL_LM", num_virtual_tokens=v)).double()
    inputs = {k: x for k, x in batch.items() if k != "labels"}
    labels = batch["labels"][:, 1:]
    penalty = exact_penalty(fisher_type="empirical", weighting="uniform")
    penalty.consolidate(
        model,
        nn.CrossEntropyLoss(),
        [(inputs, labels)],
        forward=lambda b: model(**b).logits[:, v:-1].transpose(1, 2),
    )
    model.eval()
    total, count = 0.0, int((labels != -100).sum())
    for index, own in enumerate(labels):
        model.zero_grad()
        one = {k: x[index : index + 1] for k, x in inputs.items()}
        logits = model(**one).logits[0, v:-1]
        nn.functional.cross_entropy(logits, own, reduction="sum").backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        total += sum(float(g.square().sum()) for g in gradients) / count
    assert float(penalty.terms[0].operator.trace) == pytest.approx(total, rel=1e-8)
