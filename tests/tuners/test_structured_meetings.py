"""Structured adapters where they meet other things: a second adapter, biases of the base, a head, a tied or repeated
layer, a loss scale that overflows, files of other tools."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from hf_sparse_peft import StructuredConfig, hub
from hf_sparse_peft.tuners.structured import (
    PHM,
    Bottleneck,
    Circulant,
    DenseMatrix,
    FactorPair,
    Hypernetwork,
    Kronecker,
    LowRankExperts,
    MatrixProductExperts,
    Reflections,
    ScaleExperts,
    ScaleShift,
    structured_layers,
)

COMPACTER = Bottleneck(4, matrix=PHM(2, rule_std=0.1))
NETWORK = Hypernetwork(reduction=8, embedding=4, hidden=8, projected=4)
EXPERTS = LowRankExperts(4, 2)
FORMS = {
    "kronecker": Kronecker(8, 4), "scale and shift": ScaleShift(), "reflections": Reflections(True, "both", 4),
    "compacter": COMPACTER, "hypernetwork": NETWORK, "experts": EXPERTS, "circulant": Circulant(),
    "tensor trains": FactorPair(4), "routed scales": ScaleExperts(3, input_modules=["down_proj"]),
}  # fmt: skip
IDS = torch.arange(3, 15).view(1, -1)


def config(form, targets=("o_proj", "down_proj"), **options):
    return StructuredConfig(form=form, target_modules=list(targets), **{"task_type": "CAUSAL_LM", **options})


def fill(model, seed=2, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def with_biases():
    base = tiny.llama(layers=2, attention_bias=True, mlp_bias=True)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return base


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("which", ["all", "structured_only"])
def test_trained_biases_are_the_bases_and_never_those_of_an_adapter_that_waits(which):
    model = get_peft_model(with_biases(), config(COMPACTER, bias="none"))
    model.add_adapter("second", config(COMPACTER, bias=which))
    model.set_adapter("second")
    trained = trained_names(model)
    waiting = {name for name, _ in model.named_parameters() if name.endswith(".default")}
    assert {"structured_down_bias", "structured_up_bias"} <= {name.split(".")[-2] for name in waiting}
    assert not waiting & trained
    assert not {name for name in trained if name.endswith(".bias") and "structured_" in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in waiting}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("which", ["all", "structured_only"])
def test_an_adapter_with_biases_of_both_kinds_is_saved_and_loaded_whole(which, tmp_path):
    model = fill(get_peft_model(with_biases(), config(COMPACTER, bias=which))).eval()
    assert any(name.endswith("o_proj.base_layer.bias") for name in trained_names(model))
    model.save_pretrained(tmp_path)
    hub.check_adapter(tmp_path)
    again = PeftModel.from_pretrained(with_biases(), tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    named = get_peft_model(with_biases(), config(ScaleShift()), adapter_name="mine").eval()
    named.load_adapter(tmp_path, "other")
    named.set_adapter("other")
    assert torch.equal(named(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    "form",
    [
        EXPERTS, ScaleExperts(3, input_modules=["down_proj"]), NETWORK, COMPACTER, Bottleneck(4),
        MatrixProductExperts(2),
    ],
    ids=lambda form: type(form).__name__,
)  # fmt: skip
def test_what_is_no_change_of_a_weight_leaves_in_no_format_and_says_the_form(form, tmp_path):
    targets = ("gate_proj", "up_proj", "down_proj") if isinstance(form, MatrixProductExperts) else ("o_proj",)
    model = fill(get_peft_model(tiny.llama(layers=1), config(form, targets))).eval()
    answer = model(input_ids=IDS).logits
    for leave in (
        lambda: hub.export_lora(model, tmp_path / "lora", rank=2),
        lambda: hub.export_shira(model, tmp_path / "shira"),
        lambda: hub.make_patch(model),
        lambda: hub.merge_to_dense(model),
        model.merge_adapter,
    ):
        with pytest.raises(ValueError, match=type(form).__name__):
            leave()
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(model(input_ids=IDS).logits, answer)


def test_a_pair_of_factors_leaves_as_the_lora_that_it_is(tmp_path):
    form = FactorPair(2, 8.0, DenseMatrix("normal", std=0.3))
    model = get_peft_model(tiny.llama(layers=1), config(form)).eval()
    done = hub.export_lora(model, tmp_path)
    assert set(done.errors.values()) == {0.0}
    assert set(done.ranks.values()) == {2}
    again = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("second", ["compacter", "scale and shift", "hypernetwork"])
@pytest.mark.parametrize("first", ["compacter", "experts"])
def test_two_active_adapters_of_shared_and_routed_forms_add_their_changes_in_each_layer(first, second):
    model = fill(get_peft_model(tiny.llama(layers=2), config(FORMS[first])))
    model.add_adapter("second", config(FORMS[second]))
    model.set_adapter("second")
    fill(model, 7).eval()
    layers, changes = structured_layers(model), []
    inputs = [torch.randn(2, 3, one.in_features, generator=torch.Generator().manual_seed(1)) for one in layers]
    for names in ("default", "second", ["default", "second"]):
        model.base_model.set_adapter(names)
        changes.append([one(x) - one.base_layer(x) for one, x in zip(layers, inputs, strict=True)])
    for one, two, both in zip(*changes, strict=True):
        assert one.any()
        torch.testing.assert_close(both, one + two, rtol=1e-5, atol=1e-5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("name", FORMS)
def test_a_named_adapter_with_a_head_is_saved_and_loaded_whole(name, tmp_path):
    def base():
        return tiny.llama(LlamaForSequenceClassification, layers=2, num_labels=3, pad_token_id=0)

    options = config(FORMS[name], task_type="SEQ_CLS")
    model = fill(get_peft_model(base(), options, adapter_name="mine")).eval()
    assert "base_model.model.score.modules_to_save.mine.weight" in trained_names(model)
    model.save_pretrained(tmp_path)
    hub.check_adapter(tmp_path / "mine")
    again = PeftModel.from_pretrained(base(), tmp_path / "mine", adapter_name="other").eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("name", ["kronecker", "scale and shift", "reflections"])
def test_an_adapted_head_that_is_tied_leaves_the_embedding_as_it_was(name):
    base = tiny.llama(layers=1, tie_word_embeddings=True).eval()
    embedding = base.get_input_embeddings().weight
    bits = embedding.detach().clone()
    model = fill(get_peft_model(base, config(FORMS[name], ("lm_head",)))).eval()
    answer = model(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model.merge_adapter()
    assert torch.equal(base.get_input_embeddings().weight, bits)
    torch.testing.assert_close(model(input_ids=IDS).logits, answer, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert base.get_input_embeddings().weight is embedding
    assert structured_layers(model)[0].get_base_layer().weight is embedding
    assert torch.equal(embedding, bits)
    assert torch.equal(model(input_ids=IDS).logits, answer)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("name", FORMS)
def test_layers_that_run_twice_in_a_pass_have_the_gradients_of_both_runs(name, checkpointing):
    """The second decoder layer is the first one again; the reference has two that start alike."""
    repeated = fill(get_peft_model(tiny.llama(layers=1), config(FORMS[name], layers_to_transform=[0])))
    unrolled = copy.deepcopy(repeated)
    inner = repeated.base_model.model.model
    if checkpointing:
        repeated.gradient_checkpointing_enable({"use_reentrant": False})
        repeated.enable_input_require_grads()
    inner.layers.append(inner.layers[0])
    inner.config.num_hidden_layers = 2
    repeated.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()

    other = unrolled.base_model.model.model
    other.layers.append(copy.deepcopy(other.layers[0]))
    other.config.num_hidden_layers = 2
    first, second = other.layers
    unrolled.train()(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    got, expected = dict(inner.layers[0].named_parameters()), dict(second.named_parameters())
    for key, parameter in first.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[key].grad, parameter.grad + expected[key].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FORMS)
def test_a_step_that_overflows_under_fp16_changes_nothing_and_the_next_one_trains(name):
    base = tiny.llama(layers=1, dtype=torch.float16)
    model = fill(get_peft_model(base, config(FORMS[name])), scale=0.02)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-36)
    before = {key: p.detach().clone() for key, p in trained.items()}
    for due in (False, True):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=IDS, labels=IDS).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.isfinite(loss)
        assert any(not torch.equal(p, before[key]) for key, p in trained.items()) == due
        assert all(torch.isfinite(p).all() for p in trained.values())
    assert scaler.get_scale() == 2.0**4
