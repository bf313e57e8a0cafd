"""S2FT, SLTrain and DSEE against dense references in float64, on tiny models."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from hf_sparse_peft import methods
from hf_sparse_peft.sparsity import Random
from hf_sparse_peft.tuners import adapter_layers

HIDDEN, INNER, VOCAB, HEADS, GROUPS = 32, 64, 48, 4, 2
IDS = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


def base() -> LlamaForCausalLM:
    return tiny.llama(
        hidden_size=HIDDEN, intermediate_size=INNER, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
        vocab_size=VOCAB, max_position_embeddings=32, pad_token_id=None,
    )  # fmt: skip


def adapted(name, seed=7, **options):
    model = get_peft_model(base(), methods.get(name, **options).config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def layers_of(model):
    return {layer.module_name: layer for layer in adapter_layers(model)}


def loss_of(model):
    scores = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
    return -scores.gather(-1, IDS[:, 1:, None]).mean()


# S2FT


def test_s2ft_trains_three_percent_of_the_down_columns_over_all_layers():
    method = methods.get("s2ft")
    model = get_peft_model(base(), method.config)
    columns = [layer.sparse_lora_values["default"].shape for layer in adapter_layers(model) if layer.holds("default")]
    assert sum(shape[0] for shape in columns) == int(0.03 * INNER * 2)
    assert {shape[1] for shape in columns} == {HIDDEN}
    assert model.get_nb_trainable_parameters()[0] == int(0.03 * INNER * 2) * HIDDEN
    assert set(layers_of(model)) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}


MATRICES = {
    "channels": {"gate_proj": 0, "up_proj": 0, "down_proj": 1},
    "heads": {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1},
}


def permuted_twin(model, kind: str):
    """A dense float64 model whose chosen structures stand first, and its slices `[s, ...]` as the paper trains them."""
    twin, layers, slices = base().double().requires_grad_(False), layers_of(model), {}
    total = GROUPS if kind == "heads" else INNER
    for name, layer in layers.items():
        dim = MATRICES[kind][name.rpartition(".")[2]]
        linear = twin.get_submodule(name)
        size = linear.weight.shape[dim] // total
        chosen = sorted({unit // size for unit in layer.units("default").tolist()}) if layer.holds("default") else []
        order = torch.tensor([*chosen, *(j for j in range(total) if j not in chosen)])
        rows = (order[:, None] * size + torch.arange(size)).reshape(-1)
        linear.weight.data = linear.weight.data.index_select(dim, rows)
        slices[name] = (dim, len(chosen) * size)
    return twin, slices


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_s2ft_equals_the_permuted_model_with_contiguous_slices(kind):
    model = adapted("s2ft", down=0.0, **{kind: 0.5})
    twin, slices = permuted_twin(model, kind)
    with torch.no_grad():
        plain = base().double()(input_ids=IDS).logits
        torch.testing.assert_close(twin(input_ids=IDS).logits, plain, rtol=1e-5, atol=1e-5)
    leaves = {}
    for name, layer in layers_of(model).items():
        if layer.holds("default"):
            values = layer.sparse_lora_values["default"].detach().double()
            leaves[name] = values.clone().requires_grad_()
    assert leaves
    handles = []
    for name, (dim, count) in slices.items():
        if name not in leaves:
            continue

        def add(module, args, output, name=name, dim=dim, count=count):
            x, S = args[0], leaves[name]
            if dim == 1:
                return output + x[..., :count] @ S  # y = Wx + S x[a:b]
            return torch.cat([output[..., :count] + x @ S.t(), output[..., count:]], dim=-1)  # y[a:b] += S x

        handles.append(twin.get_submodule(name).register_forward_hook(add))
    expected, found = loss_of(twin), loss_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    for name, leaf in leaves.items():
        gradient = layers_of(model)[name].sparse_lora_values["default"].grad.double()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-6)


def test_s2ft_keeps_the_chosen_columns_of_the_input_and_no_more():
    kept = {}
    for columns in (8, 16, 32):
        model = adapted("s2ft", down=columns / INNER, scope="block")
        layer = layers_of(model)["model.layers.0.mlp.down_proj"]
        parameters = {id(p) for p in layer.parameters()}
        sizes = []
        x = torch.randn(50, INNER, requires_grad=True)

        def pack(tensor, sizes=sizes, parameters=parameters):
            if id(tensor) not in parameters and tensor.is_floating_point():
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        kept[columns] = sum(sizes)
    # Above a third of the columns the whole input is kept: layers that are fed the same one share it.
    assert kept == {8: 50 * 8, 16: 50 * 16, 32: 50 * INNER}


@pytest.mark.parametrize("options", [{"down": 0.1, "up": 0.1, "o": 0.2, "v": 0.3}, {"down": 0.0, "heads": 0.5}])
def test_s2ft_merges_into_the_chosen_rows_and_columns_only(options):
    model = adapted("s2ft", **options).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        weights = {name: layer.base_layer.weight.clone() for name, layer in layers_of(model).items()}
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)
    for name, layer in layers_of(model).items():
        dim = int(layer.sparse_lora_grid["default"].granularity == "column") if layer.holds("default") else 0
        others = torch.ones(weights[name].shape[dim], dtype=torch.bool)
        if layer.holds("default"):
            others[layer.units("default").long()] = False
        merged = layer.base_layer.weight
        assert torch.equal(merged.movedim(dim, 0)[others], weights[name].movedim(dim, 0)[others])
        assert not layer.holds("default") or not torch.equal(merged, weights[name])


# SLTrain


def test_sltrain_has_the_papers_defaults():
    config = methods.get("sltrain").config
    assert (config.r, config.lora_alpha, config.density, config.granularity) == (128, 32, 0.03, "entry")
    assert (config.target_modules, config.criterion, config.scale_support) == ("all-linear", Random(), False)


def test_sltrain_draws_exactly_the_share_of_entries_within_one_over_root_columns():
    model = get_peft_model(base(), methods.get("sltrain", r=4, support_init="uniform").config)
    for layer in adapter_layers(model):
        delta = layer.get_delta_weight("default")  # B = 0: the sparse half alone
        assert int((delta != 0).sum()) == int(0.03 * delta.numel())
        bound = layer.in_features**-0.5
        assert bound / 2 < delta.abs().max() <= bound
        assert (delta > 0).any()
        assert (delta < 0).any()


def test_sltrain_gradients_are_those_of_the_dense_sum():
    model = adapted("sltrain", r=4, target_modules=["q_proj", "down_proj"])
    twin, leaves = base().double().requires_grad_(False), {}
    for name, layer in layers_of(model).items():
        A, B = (getattr(layer, f"sparse_lora_{f}")["default"].detach().double().requires_grad_() for f in "AB")
        v = layer.sparse_lora_values["default"].detach().double().requires_grad_()
        leaves[name] = (A, B, v)
        flat = torch.zeros(layer.out_features * layer.in_features, dtype=torch.float64)
        S = flat.index_put((layer.units("default").long(),), v).view(layer.out_features, layer.in_features)
        update = 32 / 4 * B @ A + S
        twin.get_submodule(name).register_forward_hook(lambda m, args, y, update=update: y + args[0] @ update.t())
    expected, found = loss_of(twin), loss_of(model)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    for name, layer in layers_of(model).items():
        for kind, leaf in zip(("A", "B", "values"), leaves[name], strict=True):
            gradient = getattr(layer, f"sparse_lora_{kind}")["default"].grad.double()
            torch.testing.assert_close(gradient, leaf.grad, rtol=1e-3, atol=1e-6)


def test_sltrain_saves_nothing_of_the_size_of_the_weight():
    model = adapted("sltrain", r=4)
    layer = layers_of(model)["model.layers.0.mlp.up_proj"]
    parameters, shapes = {id(p) for p in layer.parameters()}, []

    def pack(tensor):
        if id(tensor) not in parameters:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(3, HIDDEN, requires_grad=True))
    assert (3, HIDDEN) in shapes
    assert all(torch.Size(shape).numel() < INNER * HIDDEN / 2 for shape in shapes)


# DSEE


def test_dsee_has_the_papers_defaults_and_starts_as_published():
    model = get_peft_model(base(), methods.get("dsee").config)
    for layer in adapter_layers(model):
        assert layer.module_name.endswith(("q_proj", "v_proj"))
        assert layer.units("default").numel() == layer.units("default").unique().numel() == 128
        assert layer.sparse_lora_scaling["default"] == layer.sparse_lora_support_scaling["default"] == 32 / 4
        assert not layer.sparse_lora_B["default"].any()
        assert not layer.sparse_lora_values["default"].any()
        assert 0.015 < layer.sparse_lora_A["default"].std() < 0.025


def test_dsee_scales_the_entries_with_the_low_rank_half(tmp_path):
    model = adapted("dsee", num_sparse=20).eval()
    for layer in adapter_layers(model):
        S = torch.zeros(layer.out_features * layer.in_features, dtype=torch.float64)
        S[layer.units("default").long()] = layer.sparse_lora_values["default"].detach().double()
        A, B = (getattr(layer, f"sparse_lora_{f}")["default"].detach().double() for f in "AB")
        expected = 32 / 4 * (B @ A + S.view(layer.out_features, layer.in_features))
        torch.testing.assert_close(layer.get_delta_weight("default").double(), expected, rtol=1e-5, atol=1e-6)
        x = torch.randn(3, layer.in_features)
        direct = x.double() @ (layer.base_layer.weight.double() + expected).t()
        torch.testing.assert_close(layer(x).double(), direct, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
        model.set_adapter("sum")
        torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-4, atol=1e-4)


def test_dsee_says_what_does_not_fit():
    tiny = torch.nn.Sequential()
    tiny.lin = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"UnitsPerModule.units=128 is more than the 64 .*'lin'"):
        get_peft_model(tiny, methods.get("dsee", target_modules=["lin"]).config)
    with pytest.raises(ValueError, match=r"DecompositionResidual.rounds=0 is out of range: it takes an integer >= 1"):
        methods.get("dsee", criterion={"type": "decomposition_residual", "rounds": 0})
    with pytest.raises(ValueError, match="scale_support concerns the low-rank half"):
        methods.get("dsee", r=0)
    config = copy.deepcopy(methods.get("dsee", num_sparse=8, rank_pattern={"q_proj": 0}).config)
    with pytest.raises(ValueError, match=r"scale_support multiplies the support of '.*q_proj'"):
        get_peft_model(base(), config)
