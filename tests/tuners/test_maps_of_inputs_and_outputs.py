"""Givens rotations and hyperplane reflections against matrices that are built from the papers' equations in float64."""

import copy
import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hf_sparse_peft import StructuredConfig, callbacks_for, estimate, hub, methods
from hf_sparse_peft.hub import merge_to_dense
from hf_sparse_peft.rules import PairOrthogonality
from hf_sparse_peft.tuners.structured import Givens, QuasiGivens, Reflections, structured_layers

ROWS, COLS = 6, 8


def host(bias: bool = True, rows: int = ROWS, cols: int = COLS) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, rows, bias=bias))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def adapted(form, fill: bool = True, **shape):
    torch.manual_seed(1)
    model = get_peft_model(host(**shape), StructuredConfig(form=form, target_modules=["0"]))
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad and fill):
        parameter.data += 0.7 * torch.randn(parameter.shape, generator=generator)
    return model, structured_layers(model)[0]


def inputs(cols: int = COLS) -> torch.Tensor:
    return torch.randn(5, 3, cols, generator=torch.Generator().manual_seed(3))


def doubles(layer) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().double() for name, tensor in layer.form_tensors("default").items()}


def pairs_of(size: int) -> list[list[tuple[int, int]]]:
    """Round k pairs i with i + 2^k for every multiple i of 2^(k + 1)."""
    rounds, stride = [], 1
    while stride < size:
        rounds.append([(i, i + stride) for i in range(0, size, 2 * stride) if i + stride < size])
        stride *= 2
    return rounds


def product_of_rounds(blocks: torch.Tensor, size: int) -> torch.Tensor:
    Q, at = torch.eye(size).double(), 0
    for pairs in pairs_of(size):
        for i, j in pairs:
            G = torch.eye(size).double()
            for row, to in enumerate((i, j)):
                for col, of in enumerate((i, j)):
                    G[to, of] = blocks[at, row, col]
            Q, at = Q @ G, at + 1
    return Q


def released_product(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Every round on adjacent inputs, with its numbers at the places of the paper's pairs."""
    Q, at = torch.eye(size).double(), 0
    for pairs in pairs_of(size):
        own, other = torch.ones(size).double(), torch.zeros(size).double()
        for i, j in pairs:
            own[i], other[i], other[j], own[j] = blocks[at, 0, 0], -blocks[at, 0, 1], blocks[at, 1, 0], blocks[at, 1, 1]
            at += 1
        G = torch.diag(own)
        for i in range(0, size, 2):
            G[i, i + 1] -= other[i]
            G[i + 1, i] += other[i + 1]
        Q = Q @ G
    return Q


def reflection(normals: torch.Tensor) -> torch.Tensor:
    """Block-diagonal I - 2 u u^T / |u|^2, or with v, I - u u^T / |u|^2 + v v^T / |v|^2."""
    found = []
    for i in range(normals.shape[1]):
        u = normals[0, i]
        own = torch.eye(len(u)).double() - (2 if len(normals) == 1 else 1) * torch.outer(u, u) / u.dot(u)
        if len(normals) == 2:
            v = normals[1, i]
            own = own + torch.outer(v, v) / v.dot(v)
        found.append(own)
    return torch.block_diag(*found)


def rotations(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.tensor([[a.cos(), -a.sin()], [a.sin(), a.cos()]]).double() for a in angles])


def mapped_weight(form, layer) -> torch.Tensor:
    """W' in float64."""
    W, held = layer.get_base_layer().weight.detach().double(), doubles(layer)
    if isinstance(form, Reflections):
        if form.grouping == "released":
            # A row-major reshape to [n, out, in / n], each of whose n parts meets one block.
            n = form.blocks
            blocks = [reflection(held["input_normals"][:, i : i + 1]) for i in range(n)]
            W = torch.stack([part @ H for part, H in zip(W.reshape(n, len(W), -1), blocks, strict=True)]).reshape(
                W.shape
            )
        elif form.side != "output":
            W = W @ reflection(held["input_normals"])
        return W if form.side == "input" else reflection(held["output_normals"]) @ W
    if isinstance(form, Givens):
        angles = held["angles"]
        blocks = rotations(math.pi * angles.tanh() if form.bounded else angles)
    else:
        blocks = held["layernorm_blocks"]
    product = product_of_rounds if form.wiring == "paper" else released_product
    return W * held.get("layernorm_lengths", torch.ones(W.shape[1]).double()) @ product(blocks, W.shape[1])


FORMS = {
    "rotations": Givens(),
    "bounded with lengths": Givens(bounded=True, lengths=True),
    "released wiring": Givens("released", bounded=True, lengths=True),
    "free pairs": QuasiGivens(),
    "released pairs": QuasiGivens("released"),
    "reflection": Reflections(blocks=2),
    "one block": Reflections(blocks=1),
    "reflected outputs": Reflections(side="output", blocks=3),
    "relaxed": Reflections(True, "both", 2),
    "relaxed inputs": Reflections(True, blocks=4),
    "released groups": Reflections(blocks=2, grouping="released"),
    "released both": Reflections(True, "both", 2, "released"),
}
STARTS_AWAY = {"reflection", "one block", "reflected outputs", "released groups"}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", FORMS)
def test_output_merge_and_unmerge_are_the_equation_with_the_bias_left_as_it_is(name, bias, tmp_path):
    (model, layer), x = adapted(FORMS[name], bias=bias), inputs()
    base = layer.get_base_layer()
    before = copy.deepcopy(base.state_dict())
    expected = x.double() @ mapped_weight(FORMS[name], layer).t() + (base.bias.double() if bias else 0)
    answer = layer(x)
    torch.testing.assert_close(answer.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(merge_to_dense(model)[0](x).double(), expected, rtol=1e-5, atol=2e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(host(bias), tmp_path)(x), answer)
    model.merge_adapter()
    torch.testing.assert_close(base(x).double(), expected, rtol=1e-5, atol=2e-6)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    with torch.inference_mode():
        torch.testing.assert_close(model.merge_and_unload()[0](x).double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", FORMS)
def test_all_but_plain_reflections_start_as_the_base_to_the_bit_and_every_number_has_a_gradient(name):
    (model, layer), x = adapted(FORMS[name], fill=False), inputs()
    assert torch.equal(layer(x), layer.base_layer(x)) == (name not in STARTS_AWAY)
    g = torch.randn(5, 3, ROWS, generator=torch.Generator().manual_seed(5))
    (layer(x) * g).sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter.grad != 0).all(), key


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6, 7, 8, 13])
def test_rotations_are_orthogonal_for_every_number_of_inputs(size, bounded):
    form = Givens(bounded=bounded)
    angles = torch.randn(size - 1, generator=torch.Generator().manual_seed(size)).double()
    Q = form.map_input(torch.eye(size).double(), {"angles": angles}, None).t()
    torch.testing.assert_close(Q.t() @ Q, torch.eye(size).double(), rtol=0, atol=1e-12)
    blocks = rotations(math.pi * angles.tanh() if bounded else angles)
    torch.testing.assert_close(Q, product_of_rounds(blocks, size), rtol=0, atol=1e-12)
    assert torch.linalg.det(Q) == pytest.approx(1)
    if size % 2 == 0:
        released = Givens("released", bounded).map_input(torch.eye(size).double(), {"angles": angles}, None).t()
        torch.testing.assert_close(released, released_product(blocks, size), rtol=0, atol=1e-12)
        gap = (released.t() @ released - torch.eye(size).double()).norm()
        assert (gap < 1e-12) == (size == 2)


def test_rotations_keep_the_norms_and_the_angles_of_the_rows():
    _, layer = adapted(Givens())
    W = layer.get_base_layer().weight.detach().double()
    rotated = W + layer.get_delta_weight("default").double()
    torch.testing.assert_close(rotated @ rotated.t(), W @ W.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("at", "moved"), [(0, {0, 1}), (1, {2, 3}), (2, {0, 2})])
def test_an_angle_moves_its_own_pair_of_four_inputs_alone(at, moved):
    angles = torch.zeros(3).double()
    angles[at] = 0.3
    Q = Givens().map_input(torch.eye(4).double(), {"angles": angles}, None)
    assert {int(i) for i in (Q - torch.eye(4).double()).nonzero().unique()} == moved


def test_the_gradient_of_an_angle_at_the_start_is_that_along_its_generator():
    _, layer = adapted(Givens(), fill=False)
    G = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(5))
    (layer(torch.eye(COLS)).t() * G).sum().backward()
    W = layer.get_base_layer().weight.detach()
    expected = []
    for i, j in (pair for pairs in pairs_of(COLS) for pair in pairs):
        J = torch.zeros(COLS, COLS)
        J[i, j], J[j, i] = -1, 1
        expected.append((G * (W @ J)).sum())
    torch.testing.assert_close(layer.structured_angles["default"].grad, torch.stack(expected))


def test_counts_are_those_of_the_papers():
    def count(form):
        return sum(p.numel() for p in adapted(form)[0].parameters() if p.requires_grad)

    assert count(Givens()) == COLS - 1
    assert count(Givens(lengths=True)) == 2 * COLS - 1
    assert count(QuasiGivens()) == 4 * (COLS - 1)
    assert count(Reflections(blocks=1)) == count(Reflections(blocks=4)) == COLS
    assert count(Reflections(True, blocks=4)) == 2 * COLS
    assert count(Reflections(True, "both", 2)) == 2 * (ROWS + COLS)


def test_a_reflection_is_its_own_inverse_and_at_a_fixed_distance_from_the_identity():
    u = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(5)).double()
    H = Reflections(blocks=2).map_input(torch.eye(8).double(), {"input_normals": u}, None)
    torch.testing.assert_close(H, H.t())
    torch.testing.assert_close(H @ H, torch.eye(8).double())
    for block in (H[:4, :4], H[4:, 4:]):
        assert torch.linalg.det(block) == pytest.approx(-1)
        assert (block - torch.eye(4)).square().sum() == pytest.approx(4)
    scaled = Reflections(blocks=2).map_input(torch.eye(8).double(), {"input_normals": 17 * u}, None)
    torch.testing.assert_close(scaled, H)


def test_the_distance_of_a_reflected_weight_and_of_a_relaxed_map_are_the_equations():
    _, layer = adapted(Reflections(blocks=1), fill=False)
    W, u = layer.get_base_layer().weight.detach(), layer.structured_input_normals["default"].detach()[0, 0]
    assert layer.get_delta_weight("default").norm() == pytest.approx(float(2 * (W @ (u / u.norm())).norm()))
    pair = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(5)).double()
    H = Reflections(True, blocks=1).map_input(torch.eye(8).double(), {"input_normals": pair}, None)
    cos = torch.cosine_similarity(pair[0, 0], pair[1, 0], 0)
    assert (H - torch.eye(8)).norm() == pytest.approx(float((2 - 2 * cos**2).sqrt()))


def test_both_vectors_of_a_relaxed_reflection_open_alike_at_right_angles_to_themselves():
    (_, layer), x = adapted(Reflections(True, blocks=2), fill=False), inputs()
    normals = layer.structured_input_normals["default"]
    bound = (2 / COLS) ** 0.5
    assert normals.abs().max() <= bound
    assert torch.equal(normals[0], -normals[1])
    assert not torch.equal(normals[0, 0], normals[0, 1])
    layer(x).square().sum().backward()
    torch.testing.assert_close(normals.grad[0], normals.grad[1])
    assert ((normals * normals.grad).sum(-1).abs() < 1e-5 * normals.grad.norm()).all()


def test_the_published_groups_are_no_blocks_of_inputs():
    _, layer = adapted(Reflections(blocks=2))
    _, released = adapted(Reflections(blocks=2, grouping="released"))
    assert torch.equal(layer.structured_input_normals["default"], released.structured_input_normals["default"])
    assert not torch.allclose(layer.get_delta_weight("default"), released.get_delta_weight("default"))


def test_norms_of_rotated_bf16_inputs_are_kept_to_one_rounding():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(5)).bfloat16()
    angles = torch.randn(4095, generator=torch.Generator().manual_seed(6))
    rotated = Givens().map_input(x, {"angles": angles}, None)
    assert rotated.dtype == torch.bfloat16
    torch.testing.assert_close(rotated.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-3, atol=0)


def test_two_active_maps_add_what_each_changes_and_merge_to_that():
    (model, layer), x = adapted(Givens()), inputs()
    model.add_adapter("other", StructuredConfig(form=Reflections(True, "both", 2), target_modules=["0"]))
    layer.structured_input_normals["other"].data += 0.5
    base, alone = layer.base_layer(x), []
    for name in ("default", "other"):
        model.set_adapter(name)
        alone.append(layer(x) - base)
    model.base_model.set_adapter(["default", "other"])
    both = layer(x)
    torch.testing.assert_close(both, base + alone[0] + alone[1], rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer(x), both)


@pytest.mark.parametrize("name", ["rotations", "free pairs", "relaxed"])
@pytest.mark.parametrize("base", ["bf16", "nf4", "conv1d"])
def test_maps_train_on_other_bases_and_merge_into_4_bits_with_the_error_that_is_told(name, base):
    targets = ["c_attn"] if base == "conv1d" else ["q_proj", "down_proj"]
    model = get_peft_model(tiny.base(base), StructuredConfig(form=FORMS[name], target_modules=targets))
    ids = torch.arange(12).view(1, 12)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() and g.any() for g in grads)
    if base != "nf4":
        return
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.05
    layer = structured_layers(model)[0]
    wanted = layer.dense_base_weight().float() + layer.get_delta_weight("default")
    model.merge_adapter()
    error = (layer.dense_base_weight().float() - wanted).norm() / wanted.norm()
    assert model.merge_errors()[layer.module_name] == pytest.approx(float(error), rel=1e-3)
    assert error > 0


def test_memory_of_maps_is_estimated():
    base = tiny.llama(layers=2)
    for form in (Givens(lengths=True), QuasiGivens(), Reflections(True, "both", 4)):
        config = StructuredConfig(form=form, target_modules=["q_proj"], task_type="CAUSAL_LM")
        expected = sum(p.numel() for p in get_peft_model(copy.deepcopy(base), config).parameters() if p.requires_grad)
        assert estimate(base.config, config, batch=1, seq=8).trained_numbers == expected


def test_a_map_leaves_as_a_lora_with_its_error(tmp_path):
    model, _ = adapted(Givens())
    with pytest.warns(UserWarning, match="relative error"):
        assert 0 < hub.export_lora(model, tmp_path, rank=2).errors["0"] < 1
    assert hub.export_lora(model, tmp_path / "whole", rank=ROWS).errors["0"] < 1e-5


def test_pair_orthogonality_adds_the_autograd_gradient_of_its_formula_once_a_step(tmp_path):
    config = StructuredConfig(
        form=QuasiGivens(), target_modules=["q_proj"], task_type="CAUSAL_LM", schedule=[PairOrthogonality(0.3)]
    )
    model = get_peft_model(tiny.llama(layers=2), config)
    for layer in structured_layers(model):
        layer.structured_layernorm_blocks["default"].data += 0.1 * torch.randn(layer.in_features - 1, 2, 2)
    seen = []

    class Look(tiny.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            held = [layer.structured_layernorm_blocks["default"] for layer in structured_layers(model)]
            seen.append([(p.detach().clone(), p.grad.clone()) for p in held])

    tiny.train(model, tmp_path, 1, callbacks=[Look(), *callbacks_for(model), Look()], gradient_accumulation_steps=2)
    before, after = seen
    for (value, grad), (_, pulled) in zip(before, after, strict=True):
        blocks = value.double().requires_grad_()
        penalty = 0.3 * sum((blocks[i, 0] @ blocks[i, 1]) ** 2 for i in range(len(blocks)))
        penalty.backward()
        torch.testing.assert_close((pulled - grad).double(), blocks.grad, rtol=1e-4, atol=1e-7)


def test_the_penalty_of_identities_is_nothing():
    _, layer = adapted(QuasiGivens(), fill=False)
    blocks = layer.structured_layernorm_blocks["default"]
    assert not (blocks[:, 0] * blocks[:, 1]).sum(-1).any()


def test_a_trainer_keeps_weight_decay_off_what_starts_at_one(tmp_path):
    from transformers import Trainer, TrainingArguments

    for form, decayed in ((QuasiGivens(), 0), (Givens(lengths=True), 1)):
        model, _ = adapted(form)
        args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
        groups = Trainer(model=model, args=args).create_optimizer().param_groups
        assert sum(len(group["params"]) for group in groups if group["weight_decay"]) == decayed


@pytest.mark.parametrize(
    ("form", "shape", "message"),
    [
        (Reflections(blocks=3), {}, "Reflections.blocks=3 does not divide the 8 inputs of '0'"),
        (Reflections(True, "both", 4), {}, "Reflections.blocks=4 does not divide the 6 outputs of '0'"),
        (Reflections(blocks=4, grouping="released"), {}, "blocks=4 does not divide the 6 outputs of '0'"),
        (Reflections(blocks=8), {}, "Reflections.blocks=8 leaves blocks of one of the 8 inputs of '0'"),
        (Reflections(True, "output", 6), {}, "Reflections.blocks=6 leaves blocks of one of the 6 outputs of '0'"),
        (Givens("released"), {"cols": 7}, "Givens.wiring='released' needs an even number of inputs, and '0' has 7"),
        (QuasiGivens(), {"cols": 1}, "QuasiGivens pairs inputs, and '0' has 1"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_by_the_module(form, shape, message):
    model = host(**shape)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, StructuredConfig(form=form, target_modules=["0"]))
    assert type(model[0]) is nn.Linear


def test_released_groups_of_outputs_alone_are_refused():
    with pytest.raises(ValueError, match=r"Reflections\.grouping="):
        Reflections(side="output", grouping="released")


def test_rows_are_the_papers_and_the_published_codes_by_options():
    assert methods.get("goft").config.form == Givens()
    assert methods.get("goft", bounded=True, lengths=True, wiring="released").config.form == Givens(
        "released", True, True
    )
    assert methods.get("qgoft").config.schedule == [PairOrthogonality(1e-3)]
    assert methods.get("qgoft", weight=0).config.schedule == []
    assert methods.get("ether").config.form == Reflections(False, "input", 32)
    assert methods.get("ether+").config.form == Reflections(True, "both", 32)
