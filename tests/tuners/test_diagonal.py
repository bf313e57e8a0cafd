"""granularity='diagonal' and the method DiaBlo: from injection to every way out."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_sparse_peft import Controller, Prune, Regrow, SparseLoraConfig, callbacks_for, hub, methods
from hf_sparse_peft.hub.summary import adapter_summary
from hf_sparse_peft.sparsity import ErdosRenyi, Numbers, Proportional, RankEquivalent
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.checksums import save_checked

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.arange(1, 11)[None]
WHOLE = {"r": 0, "granularity": "diagonal", "density": 1.0, "diagonal_blocks": 3, "target_modules": TARGETS}
"""Three blocks divide no side of the small models: 32, 64 and 16."""


class Two(nn.Module):
    """Two linears with biases, the first of which runs twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(14, 14), nn.Linear(14, 19)

    def forward(self, x):
        return self.second(torch.tanh(self.first(torch.tanh(self.first(x)))))


def adapted(base=None, **options):
    torch.manual_seed(0)
    model = get_peft_model(tiny.base() if base is None else base, SparseLoraConfig(**{**WHOLE, **options}))
    return model, adapter_layers(model)


def fill(model):
    for layer in adapter_layers(model):
        for name, values in layer.sparse_lora_values.items():
            values.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name) + layer.out_features))


def on_two(**options):
    model, layers = adapted(Two(), **{"diagonal_blocks": 4, "target_modules": ["first", "second"], **options})
    fill(model)
    return model, layers


def update_of(layer, name="default"):
    """`[out, in]` float64 by the paper's map, autograd through the values."""
    values = layer.sparse_lora_values[name].double()
    (_, b_out, b_in), units = values.shape, layer.units(name).tolist()
    rows, cols = layer.out_features, layer.in_features
    dense = torch.zeros(rows + b_out, cols + b_in, dtype=torch.float64)
    for i, block in zip(units, values, strict=True):
        place = torch.zeros_like(dense)
        place[i * b_out : (i + 1) * b_out, i * b_in : (i + 1) * b_in] = 1
        dense = dense.masked_scatter(place.bool(), block)
    return dense[:rows, :cols]


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=TOKENS).logits


def test_outputs_and_gradients_are_those_of_the_dense_weight_with_the_blocks_on_its_diagonal():
    model, (first, second) = on_two(r=2, lora_alpha=6)
    x, dy = torch.randn(7, 14), torch.randn(7, 19)
    y = model(x)
    y.backward(dy)
    leaves = {layer: layer.sparse_lora_values["default"] for layer in (first, second)}
    found = {layer: leaf.grad.clone() for layer, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None

    def linear(layer, x):
        A, B = (getattr(layer, f"sparse_lora_{one}")["default"].detach().double() for one in "AB")
        base = layer.get_base_layer()
        return x @ (base.weight.detach().double() + update_of(layer) + 3 * B @ A).t() + base.bias.detach().double()

    expected = linear(second, torch.tanh(linear(first, torch.tanh(linear(first, x.double())))))
    expected.backward(dy.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    for layer, leaf in leaves.items():
        torch.testing.assert_close(found[layer].double(), leaf.grad.double(), rtol=1e-4, atol=1e-4)


def test_merged_equals_adapter_in_float64_and_unmerging_restores_every_bit():
    model, layers = on_two()
    model.double()
    x = torch.randn(5, 14, dtype=torch.float64)
    before = [layer.get_base_layer().weight.clone() for layer in layers]
    y = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    for layer, weight in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_base_layer().weight, weight + update_of(layer), rtol=1e-12, atol=1e-12)
    model.unmerge_adapter()
    assert all(torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, before, strict=True))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "conv1d", "nf4"])
def test_every_base_trains_merges_saves_and_reloads(kind, tmp_path):
    targets = ["c_attn", "c_proj"] if kind == "conv1d" else TARGETS
    model, layers = adapted(tiny.base(kind), target_modules=targets, task_type="CAUSAL_LM")
    before = logits(model)
    if kind != "nf4":  # bitsandbytes has no 4-bit product of weights this narrow on a CPU
        assert torch.equal(before, logits(tiny.base(kind)))
    tiny.train(model, tmp_path / "run", 2, callbacks=callbacks_for(model))
    y = logits(model)
    assert not torch.equal(y, before)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.base(kind), tmp_path / "adapter")), y)
    hub.check_adapter(tmp_path / "adapter")
    for layer in layers:
        delta = layer.get_delta_weight("default").double()  # as the weight is stored
        torch.testing.assert_close(delta.t() if kind == "conv1d" else delta, update_of(layer), rtol=0, atol=1e-7)
    model.merge_adapter()
    if kind == "fp32":
        torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    if kind != "nf4":  # a 4-bit weight is quantised anew when merged
        assert torch.equal(logits(model), y)


def test_counts_leave_padding_out_of_density_and_the_report_agrees(tmp_path):
    model, layers = adapted()
    fill(model)
    for row in adapter_summary(model):
        (space,) = row["spaces"]
        assert (space["kind"], space["unit"], space["alive"]) == ("support", "diagonal", 3 * row["modules"])
        inside = sum(int((update_of(layer) != 0).sum()) for layer in layers if layer.module_name.endswith(row["group"]))
        assert row["density"] == pytest.approx(inside / (row["modules"] * row["rows"] * row["cols"]), abs=1e-12)
    assert sum(row["parameters"] for row in adapter_summary(model)) == model.get_nb_trainable_parameters()[0]
    assert any(layer.sparse_lora_grid["default"].padding for layer in layers)
    model.save_pretrained(tmp_path)
    report = hub.check_adapter(tmp_path)
    total = sum(layer.out_features * layer.in_features for layer in layers)
    inside = sum(int((update_of(layer) != 0).sum()) for layer in layers)
    assert report.density == pytest.approx(inside / total)


def test_a_file_of_blocks_keeps_no_more_than_the_values_and_a_byte_a_block():
    _, layers = adapted(diagonal_blocks=4)
    for layer in layers:
        assert layer.sparse_lora_support["default"].numel() == 24 + 1 + 4
        assert layer.sparse_lora_values["default"].numel() == layer.out_features * layer.in_features // 4


def test_some_blocks_are_chosen_by_a_criterion_and_budgets_count_them():
    _, (layer, *_) = adapted(diagonal_blocks=4, density=0.5, criterion="magnitude")
    weight = layer.get_base_layer().weight
    height, width = weight.shape[0] // 4, weight.shape[1] // 4
    sums = [weight[i * height : (i + 1) * height, i * width : (i + 1) * width].abs().sum() for i in range(4)]
    assert layer.units("default").tolist() == sorted(torch.stack(sums).topk(2).indices.tolist())
    _, layers = adapted(diagonal_blocks=8, density=0.005, budget=Numbers(600))
    assert 0 < sum(layer.sparse_lora_values["default"].numel() for layer in layers) <= 600
    for budget in (Proportional, ErdosRenyi):  # fractions of all entries, not of the diagonal's
        _, layers = adapted(diagonal_blocks=8, density=0.005, budget=budget(0.05))
        numbers = sum(layer.sparse_lora_values["default"].numel() for layer in layers if layer.holds("default"))
        asked = 0.05 * sum(layer.out_features * layer.in_features for layer in layers)
        assert 0.8 * asked <= numbers <= asked
        with pytest.raises(ValueError, match=r"budget gives '.*' \d+ diagonal blocks of .* has 8\. Lower the budget"):
            adapted(diagonal_blocks=8, density=0.005, budget=budget(0.5))
    with pytest.raises(ValueError, match=r"wants \d+ diagonal block units, and its .* has 8\. Lower the budget"):
        adapted(diagonal_blocks=8, density=0.005, budget=RankEquivalent(16))
    with pytest.raises(
        ValueError, match=r"density=0.005 leaves no diagonal block in .*Raise density to at least 1.3e-01"
    ):
        adapted(diagonal_blocks=8, density=0.005)


def test_blocks_that_would_never_learn_are_refused_by_the_modules_name():
    with pytest.raises(ValueError, match=r"'.*v_proj': diagonal_blocks=7 .*16x32.*fit: .*8"):
        adapted(diagonal_blocks=7)
    with pytest.raises(ValueError, match=r"pattern=.* is for entries and blocks"):
        adapted(pattern={"type": "grid"})
    with pytest.raises(ValueError, match="diagonal_blocks=0"):
        adapted(diagonal_blocks=0)


def test_a_rule_that_could_only_move_what_is_all_there_says_so(tmp_path):
    model, _ = adapted(
        diagonal_blocks=4, schedule=[Regrow(every=1, grow="gradient", fraction=0.5)], task_type="CAUSAL_LM"
    )
    with pytest.warns(UserWarning, match="Regrow"):
        tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model))


def test_blocks_are_pruned_and_some_of_a_diagonal_move_and_resume_to_the_bit(tmp_path):
    for schedule, density in (
        (Prune(final_fraction=0.5, every=1), 1.0),
        (Regrow(every=2, grow="gradient", fraction=0.5), 0.5),
    ):

        def build(schedule=schedule, density=density):
            return adapted(diagonal_blocks=8, density=density, schedule=[schedule], task_type="CAUSAL_LM")[0]

        model, name = build(), type(schedule).__name__
        before = [layer.units("default").tolist() for layer in adapter_layers(model)]
        tiny.train(model, tmp_path / name, 6, callbacks=callbacks_for(model), save_steps=3, save_strategy="steps")
        after = [layer.units("default").tolist() for layer in adapter_layers(model)]
        assert before != after
        again = build()
        tiny.train(
            again, tmp_path / name, 6, callbacks=callbacks_for(again), save_steps=3, save_strategy="steps",
            resume=str(tmp_path / name / "checkpoint-3"),
        )  # fmt: skip
        assert [layer.units("default").tolist() for layer in adapter_layers(again)] == after
        assert torch.equal(logits(again), logits(model))


def test_compaction_drops_blocks_of_zeros_and_changes_no_output(tmp_path):
    model, (first, second) = on_two()
    second.sparse_lora_values["default"].data[1] = 0.0
    first.sparse_lora_values["default"].data.zero_()
    x = torch.randn(4, 14)
    y = model(x).detach()
    model.compact(compact_tolerance=0.0)
    assert second.units("default").tolist() == [0, 2, 3]
    assert not first.holds("default")
    torch.testing.assert_close(model(x), y)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(Two(), tmp_path)(x), model(x))


@pytest.mark.parametrize(
    "other",
    [{}, {"diagonal_blocks": 3}, {"granularity": "row", "density": 0.2}, {"granularity": "subnet", "density": 0.2}],
)
def test_two_active_adapters_add_up_and_combine(other):
    model, (_, second) = on_two()
    model.add_adapter(
        "again", SparseLoraConfig(**{**WHOLE, "diagonal_blocks": 4, "target_modules": ["second"], **other})
    )
    for name, values in (*second.sparse_lora_values.items(), *second.sparse_lora_subnet.items()):
        values.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    model.base_model.set_adapter(["default", "again"])
    x = torch.randn(6, 14)
    y = second(x)
    deltas = [second.get_delta_weight(name) for name in ("default", "again")]
    weight = second.get_base_layer().weight + sum(deltas)
    torch.testing.assert_close(y, x @ weight.t() + second.get_base_layer().bias, rtol=1e-4, atol=1e-5)
    y.sum().backward()
    G = torch.ones(6, 19).t() @ x
    b_out, b_in = second.sparse_lora_values["default"].shape[1:]
    expected = torch.nn.functional.pad(G, (0, b_in, 0, b_out))
    for i, found in enumerate(second.sparse_lora_values["default"].grad):
        block = expected[i * b_out : (i + 1) * b_out, i * b_in : (i + 1) * b_in]
        torch.testing.assert_close(found, block, rtol=1e-4, atol=1e-4)
    model.base_model.add_weighted_adapter(["default", "again"], [2.0, -1.0], "both", "linear")
    torch.testing.assert_close(second.get_delta_weight("both"), 2 * deltas[0] - deltas[1])


def test_it_leaves_as_shira_and_merged_and_as_a_lora_by_svd_only(tmp_path):
    model, _ = adapted(task_type="CAUSAL_LM")
    fill(model)
    y = logits(model)
    with pytest.raises(
        ValueError, match=r"diagonal block units, which has no exact low-rank form.*export_shira or merge"
    ):
        hub.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    hub.export_shira(model, tmp_path / "shira")
    shira = PeftModel.from_pretrained(tiny.base(), tmp_path / "shira")
    torch.testing.assert_close(logits(shira), y, atol=1e-5, rtol=1e-5)
    exported = hub.export_lora(model, tmp_path / "full", rank=32)
    assert max(exported.errors.values()) < 1e-5
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny.base(), tmp_path / "full")), y, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_layer_follows_a_support_that_moved(backend):
    model, layers = on_two(density=0.5)
    x = torch.randn(6, 14)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        y = compiled(x)
        torch.testing.assert_close(y, model(x))
        y.sum().backward()
        found = [layer.sparse_lora_values["default"].grad.clone() for layer in layers]
        model.zero_grad()
        model(x).sum().backward()
        for layer, gradient in zip(layers, found, strict=True):
            torch.testing.assert_close(gradient, layer.sparse_lora_values["default"].grad)
        model.zero_grad()
        layers[1].write_support("default", torch.tensor([0, 3]))


def test_copies_share_nothing_and_a_head_and_a_name_travel_along(tmp_path):
    model, layers = adapted(modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    fill(model)
    twin, y = copy.deepcopy(model), logits(model)
    layers[0].sparse_lora_values["default"].data.zero_()
    assert torch.equal(logits(twin), y)
    for _ in range(2):
        tiny.train(twin, tmp_path, 2, callbacks=callbacks_for(twin))
    twin.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.base(), tmp_path / "adapter", adapter_name="task")
    assert torch.equal(logits(loaded), logits(twin))


@pytest.mark.parametrize("harm", ["values missing", "values cut", "codes flipped", "blocks of another number"])
def test_a_damaged_file_is_refused_by_the_tensors_name(harm, tmp_path):
    model, _ = on_two()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    values, codes = (f"base_model.model.second.sparse_lora_{kind}" for kind in ("values", "support"))
    if harm == "values missing":
        del tensors[values]
    elif harm == "values cut":
        tensors[values] = tensors[values][:, :-1].contiguous()
    elif harm == "codes flipped":
        tensors[codes][-1] ^= 1
    else:
        tensors[codes][4] = 3
    save_checked(tensors, file, metadata={"format": "pt"})
    for read in (lambda: hub.check_adapter(tmp_path), lambda: PeftModel.from_pretrained(Two(), tmp_path)):
        with pytest.raises(ValueError, match=r"second.*sparse_lora_(values|support)"):
            read()


def test_the_backward_pass_keeps_the_input_once():
    _, (_, second) = on_two()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        second(torch.randn(50, 14, requires_grad=True))
    assert [tuple(t.shape) for t in kept if t.shape[:1] == (50,)] == [(50, 14)]


def test_diablo_is_all_blocks_of_the_papers_matrices_from_zero():
    config = methods.get("diablo").config
    assert (config.diagonal_blocks, config.density, config.r) == (64, 1.0, 0)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    model = get_peft_model(tiny.llama(layers=1), methods.get("diablo", blocks=4).config)
    for layer in adapter_layers(model):
        values = layer.sparse_lora_values["default"]
        assert not values.any()
        assert values.shape == (4, layer.out_features // 4, layer.in_features // 4)
        assert layer.sparse_lora_support_scaling["default"] == 1.0


def test_diablo_in_a_plain_loop_is_adamw_on_the_dense_form():
    """One linear, three steps of AdamW, accumulation of two: the blocks' values against a float64 loop of their own."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 7))
    method = methods.get("diablo", blocks=3, target_modules=["0"])
    W, b = base[0].weight.detach().double().clone(), base[0].bias.detach().double().clone()
    model = get_peft_model(base, method.config)
    (layer,) = adapter_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    data = [(torch.randn(6, 10), torch.randn(6, 7)) for _ in range(6)]
    with Controller(model, optimizer, 3, accumulation=2) as controller:
        for at, (x, target) in enumerate(data):
            controller.before_step()
            ((model(x) - target) ** 2).mean().div(2).backward()
            if at % 2:
                optimizer.step()
                controller.after_step()
                optimizer.zero_grad()
            else:
                controller.after_micro_batch()
    values = torch.zeros(3, 3, 4, dtype=torch.float64, requires_grad=True)
    own = torch.optim.AdamW([values], lr=0.05, weight_decay=0.0)
    for at, (x, target) in enumerate(data):
        slices = torch.nn.functional.pad(x.double(), (0, 2)).view(6, 3, 4)
        y = torch.einsum("tgi,goi->tgo", slices, values).reshape(6, 9)[:, :7]
        ((x.double() @ W.t() + b + y - target.double()) ** 2).mean().div(2).backward()
        if at % 2:
            own.step()
            own.zero_grad()
    torch.testing.assert_close(layer.sparse_lora_values["default"].double(), values.detach(), rtol=1e-4, atol=1e-5)
