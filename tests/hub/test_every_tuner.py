"""What every tuner's adapters get from pieces and unit spaces alone: LoRA, SHiRA, a dense model, a sum, a card."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import tiny
import torch
from hub_toolbox import TARGETS, fill, logits, tiny_base
from peft import PeftModel, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from safetensors.torch import load_file
from torch import nn

from hf_sparse_peft import Allocate, AverageRank, KernelLoraConfig, SparseLoraConfig, SpectralLoraConfig, hub
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.shared import (
    AdapterConfig,
    AdapterLayer,
    AdapterModel,
    AdditiveLinear,
    LowRank,
    register_tuner,
)
from hf_sparse_peft.tuners.spectral_lora import Full
from hf_sparse_peft.utils.tensors import TensorSpec

EXACT = {"atol": 2e-5, "rtol": 1e-5}  # fp32 sums in another order


@dataclass
class CoreConfig(AdapterConfig):
    """A tuner of somebody else: a trained core between fixed random bases."""

    tuner: ClassVar[str] = "some_core"
    r: int = 4


class CoreLayer(AdapterLayer):
    prefix = "some_core_"
    some_core_U: BufferDict
    some_core_V: BufferDict
    some_core_C: nn.ParameterDict

    @classmethod
    def tensor_specs(cls, config, module_name, rows, cols, sizes):
        def normal(*shape):
            return lambda generator: torch.randn(*shape, generator=generator)

        r = config.r
        return [
            TensorSpec("some_core_U", (rows, r), role="saved", start=normal(rows, r)),
            TensorSpec("some_core_V", (r, cols), role="saved", start=normal(r, cols)),
            TensorSpec("some_core_C", (r, r), space="core", start=normal(r, r)),
        ]

    def pieces(self, adapter_name):
        U, V = self.some_core_U[adapter_name], self.some_core_V[adapter_name]
        return [LowRank(U @ self.some_core_C[adapter_name], V, scale=0.01)]


class CoreLinear(AdditiveLinear, CoreLayer):
    pass


class CoreModel(AdapterModel):
    tuner_layer_cls, linear_cls = CoreLayer, CoreLinear


register_tuner(CoreConfig, CoreModel)


@dataclass(frozen=True)
class Form:
    """One form of update, and how it leaves."""

    tuner: type
    options: dict = field(default_factory=dict)
    lora: bool = False
    """Is a LoRA, exactly."""
    shira: bool = True
    """Is a list of entries."""
    combines: bool = True
    """A weighted sum of two is one more of its kind."""

    def config(self, **options):
        return self.tuner(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **self.options, **options})

    def model(self, base=None):
        torch.manual_seed(1)
        model = get_peft_model(tiny_base() if base is None else base, self.config())
        return self.filled(model, "default")

    def filled(self, model, name):
        if self.tuner is SparseLoraConfig:
            fill(model, name)
        return model.eval()


FORMS = {
    "low-rank": Form(SparseLoraConfig, {"r": 3, "density": 0.0}, lora=True, shira=False),
    "gated": Form(
        SparseLoraConfig,
        {"r": 3, "density": 0.0, "schedule": [Allocate(budget=AverageRank(2))]},
        lora=True,
        shira=False,
    ),
    "entries": Form(SparseLoraConfig, {"r": 0, "density": 0.02}),
    "blocks": Form(SparseLoraConfig, {"r": 0, "density": 0.1, "granularity": "block", "block_size": 8}),
    "rows": Form(SparseLoraConfig, {"r": 0, "density": 0.05, "granularity": "row"}, lora=True),
    "columns": Form(SparseLoraConfig, {"r": 0, "density": 0.05, "granularity": "column"}, lora=True),
    "diagonal": Form(
        SparseLoraConfig, {"r": 0, "density": 1.0, "granularity": "diagonal", "diagonal_blocks": 4}, lora=False
    ),
    "entries+low-rank": Form(SparseLoraConfig, {"r": 2, "density": 0.02}, shira=False),
    "columns+low-rank": Form(
        SparseLoraConfig, {"r": 2, "density": 0.05, "granularity": "column"}, lora=True, shira=False
    ),
    "snell": Form(KernelLoraConfig, {"r": 4, "init_weights": False, "sparsity": 0.9}, combines=False),
    "snella": Form(
        KernelLoraConfig,
        {
            "r": 4,
            "init_weights": False,
            "kernel": "mixed",
            "sparsity": 0.5,
            "schedule": [tiny.kernel_allocation()],
        },
        combines=False,
    ),
    "core": Form(SpectralLoraConfig, {"r": 4, "core": Full(std=0.3)}, lora=True, shira=False),
    "somebody's-core": Form(CoreConfig, lora=True, shira=False, combines=False),
}


@pytest.fixture(params=FORMS)
def form(request) -> Form:
    return FORMS[request.param]


def deltas(model, name="default"):
    return {layer.module_name: layer.get_delta_weight(name) for layer in adapter_layers(model)}


def products(folder):
    """B @ A of each module, from the file alone."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert 2 * len(names) == len(tensors)
    return {
        name.removeprefix("base_model.model."): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


def test_what_is_a_lora_leaves_as_one_exactly_and_the_rest_asks_for_a_rank(form, tmp_path):
    model = form.model()
    if not form.lora:
        with pytest.raises(
            ValueError, match=r"has no exact low-rank form\. Pass rank=.*export_shira or merge_to_dense"
        ):
            hub.export_lora(model, tmp_path / "lora")
        assert not (tmp_path / "lora").exists()
        return
    done = hub.export_lora(model, tmp_path / "lora")
    assert set(done.errors.values()) == {0.0}
    found = products(tmp_path / "lora")
    for name, delta in deltas(model).items():
        torch.testing.assert_close(found[name], delta, atol=1e-6, rtol=1e-6)
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)
    assert model.peft_config["default"].peft_type.value in (tmp_path / "lora" / "README.md").read_text()


def test_a_lora_by_svd_is_the_best_of_its_rank_and_says_how_far_off_it_is(form, tmp_path):
    model = form.model()
    with pytest.warns(UserWarning, match="cut updates to rank 1 by SVD: relative error"):
        done = hub.export_lora(model, tmp_path / "lora", rank=1)
    found = products(tmp_path / "lora")
    for name, delta in deltas(model).items():
        singular = torch.linalg.svdvals(delta.double())
        best = (singular[1:].norm() / singular.norm()).item()  # Eckart and Young
        measured = ((found[name] - delta).norm() / delta.norm()).item()
        assert done.errors[name] == pytest.approx(measured, rel=1e-3, abs=1e-6)
        assert measured == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_what_is_a_list_of_entries_leaves_as_shira_to_the_last_bit(form, tmp_path):
    model = form.model()
    if not form.shira:
        with pytest.raises(ValueError, match=r"SHiRA has no low-rank half, and '.*' has rank \d"):
            hub.export_shira(model, tmp_path / "shira")
        return
    hub.export_shira(model, tmp_path / "shira")
    loaded = PeftModel.from_pretrained(tiny_base(), tmp_path / "shira")
    for name, delta in deltas(model).items():
        found = loaded.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        assert torch.equal(found.to_dense(), delta)
    torch.testing.assert_close(logits(loaded), logits(model), **EXACT)


def test_a_dense_model_holds_base_and_update(form):
    model = form.model()
    dense = hub.merge_to_dense(model)
    for layer in adapter_layers(model):
        expected = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
        torch.testing.assert_close(dense.get_submodule(layer.module_name).weight.double(), expected, **EXACT)
    torch.testing.assert_close(logits(dense), logits(model), **EXACT)
    assert not adapter_layers(dense)


def two_adapters(form):
    model = form.model()
    torch.manual_seed(7)
    options = {"seed": 5} if form.tuner is SparseLoraConfig else {}
    model.add_adapter("other", form.config(**options))
    form.filled(model, "other")
    return model


def test_a_weighted_sum_of_two_is_one_more_adapter_or_is_refused_by_name_with_the_mend(form):
    model = two_adapters(form)
    first, second = deltas(model), deltas(model, "other")
    keys, configs = set(model.state_dict()), set(model.peft_config)
    if form.combines:
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mix", "cat")
        for name, delta in deltas(model, "mix").items():
            torch.testing.assert_close(delta, 0.7 * first[name] - 0.4 * second[name], rtol=1e-5, atol=1e-6)
        return
    kind = model.peft_config["default"].peft_type.value
    with pytest.raises(ValueError, match=rf"sum of {kind} updates is no {kind}.*merge_to_dense.*export_lora"):
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mix", "cat")
    assert (set(model.state_dict()), set(model.peft_config)) == (keys, configs)


def test_a_dense_model_is_the_weighted_sum_of_any_two(form):
    model = two_adapters(form)
    first, second = deltas(model), deltas(model, "other")
    dense = hub.merge_to_dense(model, adapter_names=["default", "other"], weights=[0.7, -0.4])
    for layer in adapter_layers(model):
        name = layer.module_name
        expected = layer.base_layer.weight + 0.7 * first[name] - 0.4 * second[name]
        torch.testing.assert_close(dense.get_submodule(name).weight, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="weights has 1 numbers for 2 adapters"):
        hub.merge_to_dense(model, adapter_names=["default", "other"], weights=[1.0])


def test_the_summary_counts_every_trained_number_and_every_entry_that_may_change(form):
    model = form.model()
    rows = hub.adapter_summary(model)
    assert [row["group"] for row in rows] == TARGETS
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(row["parameters"] for row in rows) == trained
    for row in rows:
        layers = [layer for layer in adapter_layers(model) if layer.module_name.endswith(row["group"])]
        assert (row["modules"], row["rows"], row["cols"]) == (2, layers[0].out_features, layers[0].in_features)
        if {space["kind"] for space in row["spaces"]} in ({"rank"}, {"core"}):
            assert row["density"] == 0
        elif form.shira:
            changed = sum(int((layer.get_delta_weight("default") != 0).sum()) for layer in layers)
            assert row["density"] * 2 * row["rows"] * row["cols"] == pytest.approx(changed)


def test_the_card_names_type_units_options_and_how_to_load(form, tmp_path):
    model = form.model()
    place = hub.save_adapter(model, tmp_path / "adapter", method="a-method")
    text, kind = (place / "README.md").read_text(), model.peft_config["default"].peft_type.value
    for row in hub.adapter_summary(model):
        for space in row["spaces"]:
            assert f"living units: {space['kind']}" in text
            assert f"{space['alive']:,}" in text
        assert f"{row['parameters']:,} |" in text
    for part in (f"KeyError: '{kind}'", f"- {kind.lower()}\n", "`a-method`", "| `target_modules` | `down_proj, q_proj"):
        assert part in text, part
    assert ("As a plain LoRA, without loss" in text) == form.lora
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_base(), place)), logits(model))


def test_pefts_own_save_writes_the_card(form, tmp_path):
    model = form.model()
    model.save_pretrained(tmp_path)
    assert "## What it changes" in (tmp_path / "README.md").read_text()
