"""Structured adapters: what the layer makes of each kind of form, and of one from outside of the package."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_sparse_peft import SampleLayers, StructuredConfig, estimate, hub, register_part
from hf_sparse_peft.hub import check_adapter, merge_to_dense
from hf_sparse_peft.tuners.structured import (
    Additive,
    Beside,
    Bottleneck,
    Circulant,
    DenseMatrix,
    FactorPair,
    Kronecker,
    Quantised,
    ScaleShift,
    structured_layers,
)
from hf_sparse_peft.utils.parts import _PARTS
from hf_sparse_peft.utils.tensors import TensorSpec

ROWS, COLS = 6, 8


class Host(nn.Module):
    def __init__(self, bias: bool = True, rows: int = ROWS, cols: int = COLS):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(cols, rows, bias=bias)
        self.second = nn.Linear(rows, cols, bias=bias)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, x):
        return self.second(self.first(x).relu())


def adapted(form, bias=True, fill=True, targets=("first",), **options):
    torch.manual_seed(1)
    model = get_peft_model(Host(bias), StructuredConfig(form=form, target_modules=list(targets), **options))
    return filled(model) if fill else model


def filled(model, scale=0.3):
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def inputs(cols=COLS):
    return torch.randn(5, 3, cols, generator=torch.Generator().manual_seed(3))


def doubles(layer, name="default"):
    return {key: tensor.detach().double() for key, tensor in layer.form_tensors(name).items()}


def the_layer(model):
    return structured_layers(model)[0]


MERGING = {
    "kronecker": Kronecker(3, 2),
    "released": Kronecker(3, 2, layout="released"),
    "dense kronecker": Kronecker(2, 2),
    "scale and shift": ScaleShift(),
    "scale": ScaleShift(shift_outputs=False),
    "linear bottleneck": Bottleneck(3, activation="identity"),
    "linear without biases": Bottleneck(3, activation="identity", biases=False, scale=2.0),
}


def reference(form, layer, x):
    """Output of the layer in float64, by the equations."""
    base, held = layer.get_base_layer(), doubles(layer)
    bias = torch.zeros(layer.out_features).double() if base.bias is None else base.bias.detach().double()
    W, x = base.weight.detach().double(), x.double()
    if isinstance(form, Kronecker):
        update = torch.kron(held["first"], held["second"])
        if form.layout == "released":
            a1, p = held["first"].shape[0], held["second"].shape[0]
            update = update[[q * p + i for i in range(p) for q in range(a1)]]
        return x @ (W + update).t() + bias
    y = x @ W.t() + bias
    if isinstance(form, ScaleShift):
        return y * held["layernorm_scale"] + held.get("layernorm_shift", 0.0)
    inner = y @ held["down_matrix"].t() + held.get("down_bias", 0.0)
    inner = {"identity": inner, "gelu": 0.5 * inner * (1 + torch.erf(inner / 2**0.5)), "relu": inner.clamp_min(0)}[
        form.activation
    ]
    return y + form.scale * (inner @ held["up_matrix"].t() + held.get("up_bias", 0.0))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", MERGING)
def test_output_and_merged_output_are_the_equation_and_unmerging_restores_weight_and_bias(name, bias):
    form = MERGING[name]
    model, x = adapted(form, bias), inputs()
    layer = the_layer(model)
    before = copy.deepcopy(layer.get_base_layer().state_dict())
    expected, answer = reference(form, layer, x), layer(x)
    torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=1e-5)
    dense = merge_to_dense(model)
    torch.testing.assert_close(dense.first(x).double(), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    after = layer.get_base_layer().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(layer(x), answer)
    unloaded = model.merge_and_unload()
    torch.testing.assert_close(unloaded.first(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["kronecker", "scale and shift", "linear bottleneck"])
def test_two_active_adapters_add_what_each_changes(name):
    model, x = adapted(MERGING[name]), inputs()
    model.add_adapter("other", StructuredConfig(form=ScaleShift(), target_modules=["first"]))
    layer = the_layer(model)
    base = layer.base_layer(x)
    alone = []
    for one in ("default", "other"):
        model.set_adapter(one)
        alone.append(layer(x) - base)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base + alone[0] + alone[1], rtol=1e-5, atol=1e-5)
    both = layer(x)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer(x), both)
    mixed = layer(x, adapter_names=["default", "other", "__base__", "other", "default"])
    expected = torch.stack([base[0] + alone[0][0], base[1] + alone[1][1], base[2], base[3] + alone[1][3],
                            base[4] + alone[0][4]])  # fmt: skip
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_bottleneck_is_behind_the_layer_and_refuses_by_name_to_leave(activation, tmp_path):
    form = Bottleneck(3, activation=activation)
    model, x = adapted(form), inputs()
    layer = the_layer(model)
    torch.testing.assert_close(layer(x).double(), reference(form, layer, x), rtol=1e-5, atol=1e-5)
    answer = model(x)
    for leave in (
        model.merge_adapter,
        model.merge_and_unload,
        lambda: merge_to_dense(model),
        lambda: hub.export_lora(model, tmp_path / "lora", rank=2),
        lambda: hub.export_shira(model, tmp_path / "shira"),
        lambda: hub.make_patch(model),
        lambda: layer.get_delta_weight("default"),
    ):
        with pytest.raises(ValueError, match=r"form Bottleneck.* no change of it: it can neither be merged"):
            leave()
        assert torch.equal(model(x), answer)
    assert list(tmp_path.iterdir()) == []
    assert not layer.supports_lora_conversion("default")
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(PeftModel.from_pretrained(Host(), tmp_path / "a")(x), answer)
    with model.disable_adapter():
        assert torch.equal(model(x), Host()(x))
    assert torch.equal(model.unload()(x), Host()(x))


def test_gradients_of_scale_and_shift_are_sums_over_tokens():
    model, x = adapted(ScaleShift()), inputs()
    layer, g = the_layer(model), torch.randn(5, 3, ROWS, generator=torch.Generator().manual_seed(5))
    (layer(x) * g).sum().backward()
    y = layer.base_layer(x)
    torch.testing.assert_close(layer.structured_layernorm_scale["default"].grad, (g * y).sum((0, 1)))
    torch.testing.assert_close(layer.structured_layernorm_shift["default"].grad, g.sum((0, 1)))


@pytest.mark.parametrize("name", MERGING)
def test_a_saved_form_loads_bit_for_bit_and_its_file_is_checked(name, tmp_path):
    model, x = adapted(MERGING[name]), inputs()
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Host(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match=r"structured_.*another base"):
        PeftModel.from_pretrained(Host(rows=12, cols=16), tmp_path)


@pytest.mark.parametrize("name", ["kronecker", "released"])
def test_a_product_of_low_rank_leaves_as_an_exact_lora(name, tmp_path):
    model, x = adapted(MERGING[name]), inputs()
    done = hub.export_lora(model, tmp_path)
    assert done.errors == {"first": 0.0}
    assert done.ranks == {"first": 4}  # min(3, 2) * min(2, 4)
    torch.testing.assert_close(PeftModel.from_pretrained(Host(), tmp_path)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_map_leaves_as_a_lora_with_its_error_and_one_with_a_shift_does_not(tmp_path):
    model = adapted(ScaleShift(shift_outputs=False), bias=False)
    with pytest.warns(UserWarning, match="relative error"):
        assert 0 < hub.export_lora(model, tmp_path / "a", rank=2).errors["first"] < 1
    with pytest.raises(ValueError, match="changes the bias of 'first'"):
        hub.export_lora(adapted(ScaleShift()), tmp_path / "b", rank=2)


def test_merging_a_shift_into_a_layer_without_bias_says_where_it_is_lost():
    with pytest.warns(UserWarning, match=r"gave 1 layers \('first'\) biases"):
        merged = adapted(ScaleShift(), bias=False).merge_and_unload()
    assert merged.first.bias is not None


def test_a_trainer_keeps_weight_decay_off_scales_and_shifts(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = adapted(ScaleShift())
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[]))
    decayed = [group for group in trainer.create_optimizer().param_groups if group["weight_decay"]]
    assert not [parameter for group in decayed for parameter in group["params"]]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Kronecker(4, 2), "Kronecker.rows=4 does not divide the 6 outputs of 'first'"),
        (Kronecker(3, 3), "Kronecker.cols=3 does not divide the 8 inputs of 'first'"),
        (Bottleneck(None, 7), "Bottleneck.reduction=7 leaves no width for the 6 outputs of 'first'"),
    ],
)
def test_a_form_that_does_not_fit_is_refused_by_the_module_and_leaves_the_model_as_it_was(form, message):
    host = Host()
    with pytest.raises(ValueError, match=message):
        get_peft_model(host, StructuredConfig(form=form, target_modules=["first"]))
    assert type(host.first) is nn.Linear


@pytest.mark.parametrize("options", [{"size": None}, {"reduction": 4}, {"dropout": 1.0}])
def test_options_that_contradict_each_other_are_refused(options):
    with pytest.raises(ValueError, match=r"^Bottleneck\.(size|dropout)="):
        Bottleneck(**options)


def test_an_unknown_form_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"form='kronecer' is unknown; choose one of .*'kronecker'"):
        StructuredConfig(form="kronecer")


@pytest.mark.parametrize("name", ["kronecker", "scale and shift", "bottleneck"])
@pytest.mark.parametrize("base", ["bf16", "nf4", "int8", "conv1d"])
def test_forms_train_on_other_bases_with_fp32_masters(name, base):
    form = {**MERGING, "kronecker": Kronecker(8, 4), "bottleneck": Bottleneck(4)}[name]
    targets = ["c_attn"] if base == "conv1d" else ["q_proj", "down_proj"]
    model = filled(get_peft_model(tiny.base(base), StructuredConfig(form=form, target_modules=targets)), 0.05)
    loss = model(input_ids=torch.arange(12).view(1, 12), labels=torch.arange(12).view(1, 12)).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() and g.any() for g in grads.values())


def test_a_layer_that_runs_twice_gets_the_sum_of_both_gradients():
    model, x = adapted(Kronecker(2, 2), targets=("first",)), inputs()
    layer = the_layer(model)
    (layer(x) + layer(2 * x)).sum().backward()
    both = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    (3 * layer(x)).sum().backward()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, both[name])


def test_suppressed_layers_add_a_share_of_their_change():
    model, x = adapted(ScaleShift()), inputs()
    layer = the_layer(model)
    base, whole = layer.base_layer(x), layer(x)
    layer.structured_scaling["default"] = 0.25
    torch.testing.assert_close(layer(x), base + 0.25 * (whole - base))
    StructuredConfig(form=ScaleShift(), target_modules=["first"], schedule=[SampleLayers()])


def test_memory_is_estimated():
    model = tiny.llama(layers=2)
    forms = (Kronecker(8, 4), ScaleShift(), Bottleneck(4), Circulant(), FactorPair(4, 4, Quantised()))
    for form in forms:
        config = StructuredConfig(form=form, target_modules=["q_proj"], task_type="CAUSAL_LM")
        expected = sum(p.numel() for p in get_peft_model(copy.deepcopy(model), config).parameters() if p.requires_grad)
        assert estimate(model.config, config, batch=1, seq=8).trained_numbers == expected


# From outside


@pytest.fixture
def outside():
    @register_part("sum_of_sides")
    @dataclass(frozen=True)
    class SumOfSides(Additive):
        tensor_names: ClassVar[tuple[str, ...]] = ("row_term", "column_term")

        def specs(self, site):
            return [TensorSpec("row_term", (site.rows,)), TensorSpec("column_term", (site.cols,))]

        def weight(self, tensors, site):
            return tensors["row_term"][:, None] + tensors["column_term"]

    @register_part("gated_twice")
    @dataclass(frozen=True)
    class Gated(Beside):
        tensor_names: ClassVar[tuple[str, ...]] = ("gate_rows",)

        def specs(self, site):
            return [TensorSpec("gate_rows", (site.rows, site.cols))]

        def branch(self, x, tensors, call):
            gate = (x @ tensors["gate_rows"].to(call.dtype).t()).sigmoid()
            call.note("gate", gate)
            return gate

    yield SumOfSides, Gated
    for name in ("sum_of_sides", "gated_twice"):
        del _PARTS["structured_form", name]


def test_a_form_of_somebody_else_trains_saves_merges_and_is_unknown_where_it_is_not_installed(outside, tmp_path):
    model, x = adapted(outside[0]()), inputs()
    held = doubles(the_layer(model))
    update = held["row_term"][:, None] + held["column_term"]
    base = Host().first
    expected = x.double() @ (base.weight.double() + update).t() + base.bias.double()
    torch.testing.assert_close(the_layer(model)(x).double(), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Host(), tmp_path)(x), model(x))
    known = _PARTS.pop(("structured_form", "sum_of_sides"))
    try:
        with pytest.raises(ValueError, match="'sum_of_sides' is not registered"):
            PeftModel.from_pretrained(Host(), tmp_path)
    finally:
        _PARTS["structured_form", "sum_of_sides"] = known


def test_what_a_form_notes_of_a_pass_is_shown_with_its_graph_while_somebody_reads(outside):
    model, x, seen = adapted(outside[1]()), inputs(), []
    layer = the_layer(model)
    with layer.read_passes(lambda adapter, name, tensor: seen.append((adapter, name, tensor))):
        layer(x)
    layer(x)
    ((adapter, name, gate),) = seen
    assert (adapter, name, gate.shape) == ("default", "gate", (5, 3, ROWS))
    gate.sum().backward()
    assert layer.structured_gate_rows["default"].grad.any()


def test_files_hold_only_what_the_form_declares(tmp_path):
    adapted(Bottleneck(3, matrix=DenseMatrix("normal", 0.02), biases=False)).save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in held} == {
        "structured_down_matrix", "structured_up_matrix", "structured_frozen_shape",
    }  # fmt: skip
