"""Forms of factored bases: CUR, codebooks, dense x sparse, low rank + sparse rows, the whole SVD."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from torch.nn.functional import mse_loss

from hf_sparse_peft import Allocate, FactoredConfig, Fraction, SampleVectors, Windowed, calibrate, callbacks_for
from hf_sparse_peft.pruning import prune_model
from hf_sparse_peft.tuners.factored import (
    CUR,
    Codebooks,
    DenseSparse,
    FixedRank,
    LowRank,
    LowRankSparse,
    ParameterRatio,
    Spectral,
    factored_layers,
)
from hf_sparse_peft.tuners.factored.spectral import draw_vectors

TARGETS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(12)[None]
DATA = [{"input_ids": torch.randint(0, tiny.VOCAB, (8, 12), generator=torch.Generator().manual_seed(5))}]
FORMS = {
    "cur": CUR(max_rank=8, inputs=False),
    "cur as released": CUR(max_rank=8, inputs=False, greedy="one_row", trained="core"),
    "codebooks": Codebooks(groups=2, bits=2, inputs=False),
    "dense x sparse": DenseSparse(blocks=2, rounds=2),
    "low rank + rows": LowRankSparse(0.1),
    "spectral": Spectral(4),
}
TRAINED = {
    "cur": {"core_update"},
    "cur as released": {"core"},
    "codebooks": {"codebooks"},
    "dense x sparse": {"dictionary", "coefficients"},
    "low rank + rows": {"A", "B", "S"},
    "spectral": {"values", "left_active", "right_active"},
}


def factored(form, base="fp32", **options):
    return get_peft_model(tiny.base(base), FactoredConfig(form=form, **{**TARGETS, **options}))


def one_layer(weight, form, bias=False, **options):
    """A factored layer over one linear layer in fp64."""
    linear = torch.nn.Linear(*reversed(weight.shape), bias=bias, dtype=torch.float64)
    linear.weight.data.copy_(weight)
    options = {"keep_base": True, **options}
    model = get_peft_model(torch.nn.Sequential(linear), FactoredConfig(form=form, target_modules=["0"], **options))
    return factored_layers(model)[0].double()


def held(layer):
    return {name: tensor.detach().clone() for name, tensor in layer.form_tensors("default").items()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


@pytest.mark.parametrize("name", FORMS)
def test_a_form_trains_what_it_says_saves_reloads_and_merges(name, tmp_path):
    base = list(tiny.BASES)[list(FORMS).index(name) % 3]
    rank = {"rank": ParameterRatio(0.9)} if name == "dense x sparse" else {}
    model = factored(FORMS[name], base, **rank)
    assert all(layer.released for layer in factored_layers(model))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    trained = {n.split(".factored_")[1].split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert trained == TRAINED[name]
    with torch.no_grad():
        for layer in factored_layers(model):
            for parameter in layer.trained_parameters("default"):
                parameter += 0.01 * parameter.grad
    before = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base(base), tmp_path)
    assert torch.equal(logits(again), before)
    again.merge_adapter()
    near = {"atol": 8e-2 if base != "fp32" else 1e-4, "rtol": 0}
    torch.testing.assert_close(logits(again), before, **near)
    again.unmerge_adapter()
    assert torch.equal(logits(again), before)
    torch.testing.assert_close(logits(again.merge_and_unload()), before, **near)


@pytest.mark.parametrize("name", [*FORMS, "codebooks of 5 bits"])
def test_product_and_gradients_are_those_of_the_dense_weight(name):
    rank = {"rank": FixedRank(4)} if name == "dense x sparse" else {}
    form = FORMS.get(name, Codebooks(groups=2, bits=5, inputs=False))
    layer = one_layer(normal(20, 160), form, bias=True, **rank)
    form, x, dy = layer.form("default"), normal(2, 3, 160, seed=1).requires_grad_(), normal(2, 3, 20, seed=2)
    tensors = layer.form_tensors("default")
    parameters = layer.trained_parameters("default")
    W = form.weight(tensors)
    y = layer(x)
    torch.testing.assert_close(y, x @ W.T + layer.get_base_layer().bias)
    got, due = torch.autograd.grad(y, [x, *parameters], dy), torch.autograd.grad(x @ W.T, [x, *parameters], dy)
    torch.testing.assert_close(got[0], due[0])
    if name != "spectral":  # whose vectors have the enhanced gradient
        for one, expected in zip(got[1:], due[1:], strict=True):
            torch.testing.assert_close(one, expected)


@pytest.mark.parametrize("divisor", [2, 3, 7])
def test_the_rank_of_a_ratio_is_that_of_integers(divisor):
    shapes = {f"{m}x{n}": (m, n) for m in range(6, 40) for n in (6, 10, 15, 42, 60, 84)}
    found = ParameterRatio(1 / divisor).ranks(LowRank(), shapes, {})
    expected = {name: m * n // (divisor * (m + n)) for name, (m, n) in shapes.items()}
    assert found == {name: rank for name, rank in expected.items() if rank}


# CUR


def test_cur_keeps_rows_and_columns_bit_for_bit_and_chooses_by_inputs():
    model = factored(CUR(max_rank=4, examples=8), "bf16", target_modules=["gate_proj", "q_proj"], keep_base=True)
    with pytest.raises(ValueError, match="starts from data"):
        model.train()(input_ids=IDS)
    layers, seen = factored_layers(model), {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0].detach().double()}))
        for layer in layers
    ]
    model.eval()(**DATA[0])
    for hook in hooks:
        hook.remove()
    calibrate(model, DATA)
    for layer in layers:
        W, tensors = layer.dense_base_weight().detach(), layer.form_tensors("default")
        rms = seen[layer].flatten(0, -2).square().mean(0).sqrt()
        U, _, Vh = torch.linalg.svd(W.double().abs() * rms, full_matrices=False)
        assert any(torch.equal(tensors["rows"][0], row) for row in W[U[:, 0].abs().argmax()][None])
        assert torch.equal(tensors["columns"][:, 0], W[:, Vh[0].abs().argmax()])
        assert all(any(torch.equal(row, own) for own in W) for row in tensors["rows"])
        core = torch.linalg.pinv(tensors["columns"].double()) @ W.double() @ torch.linalg.pinv(tensors["rows"].double())
        assert tensors["core"].dtype == torch.float32
        torch.testing.assert_close(tensors["core"].double(), core, rtol=1e-5, atol=1e-5)
        assert not tensors["core_update"].any()


def test_cur_leaves_as_three_linear_layers():
    model = factored(FORMS["cur"])
    before = logits(model)
    plain = model.base_model.export_modules()
    assert [name for name, _ in plain.model.layers[0].self_attn.q_proj.named_children()] == ["rows", "core", "columns"]
    torch.testing.assert_close(logits(plain), before)


# Codebooks


def test_codebooks_train_as_fp32_masters_and_codes_stay():
    form = Codebooks(groups=4, bits=3, inputs=False)
    model = get_peft_model(tiny.llama(hidden=64, dtype=torch.bfloat16), FactoredConfig(form=form, **TARGETS))
    layer = factored_layers(model)[0]
    before = held(layer)
    assert before["codebooks"].dtype == torch.float32
    assert before["codebooks"].shape == (64, 4, 8)
    assert before["packed_codes"].shape == (64, 32)
    optimizer = torch.optim.AdamW(layer.trained_parameters("default"), lr=3e-5, weight_decay=0.0)
    model.train()
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = held(layer)
    assert torch.equal(after["packed_codes"], before["packed_codes"])
    assert bool((after["codebooks"] != before["codebooks"]).any())  # bf16 values would not have moved
    W = layer.factored_weight("default")
    assert all(part.unique().numel() <= 8 for part in W[0].chunk(4))


def test_codebooks_of_64_columns_take_over_an_nf4_base_exactly():
    model = tiny.llama(hidden=64).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # 16 levels in each 64 numbers, as bitsandbytes leaves them
        for layer in model.model.layers:
            q = layer.self_attn.q_proj.weight
            levels = torch.randn(64, 16, generator=generator).to(torch.bfloat16)
            q.copy_(levels.gather(1, torch.randint(16, (64, 64), generator=generator)))
    W = model.model.layers[0].self_attn.q_proj.weight.float().clone()
    form = Codebooks(group_size=64, inputs=False)
    adapted = get_peft_model(model, FactoredConfig(form=form, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(factored_layers(adapted)[0].factored_weight("default"), W)


def test_zeros_of_a_pruned_base_stay_zeros():
    model = tiny.llama()
    prune_model(model, method="magnitude", show_progress=False)
    form = Codebooks(groups=2, bits=2, inputs=False, keep_zeros=True)
    model = get_peft_model(model, FactoredConfig(form=form, keep_base=True, **TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in factored_layers(model):
        assert torch.equal(layer.factored_weight("default") == 0, layer.dense_base_weight() == 0)


def test_codebooks_refuse_unequal_groups_and_codes_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="groups=5"):
        factored(Codebooks(groups=5, inputs=False))
    model = factored(Codebooks(groups=1, bits=2, inputs=False), target_modules=["q_proj"])
    factored_layers(model)[0].form_tensors("default")["packed_codes"].fill_(5)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="code of 5"):
        PeftModel.from_pretrained(tiny.base("fp32"), tmp_path)


# Dense x sparse


def test_dense_sparse_counts_and_moves_its_supports():
    form = DenseSparse(nonzeros=0.25, blocks=3)
    assert form.blocks_of(20) == 2
    assert form.stored_numbers(20, 16, 8) == 2 * 8 * 16 + 20 * 2 * (1 + 3 / 16)
    layer = one_layer(normal(20, 16), form, rank=FixedRank(8))
    S = layer.form_tensors("default")["coefficients"]
    assert S.shape == (2, 8, 10)
    assert bool(((S != 0).sum(1) == 2).all())
    W = layer.factored_weight("default").double()
    assert float(mse_loss(W, normal(20, 16))) < float(normal(20, 16).square().mean())
    optimizer, x, target = torch.optim.SGD(layer.trained_parameters("default"), lr=0.5), normal(64, 16, seed=3), None
    target = x @ normal(20, 16, seed=4).T
    first, losses = S.detach().abs().topk(2, dim=1).indices.sort(1).values, []
    for _ in range(200):
        loss = mse_loss(layer(x), target)
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(S.detach().abs().topk(2, dim=1).indices.sort(1).values, first)


def test_dense_sparse_of_all_nonzeros_is_low_rank():
    W = normal(20, 16)
    layer = one_layer(W, DenseSparse(nonzeros=1.0), rank=FixedRank(5))
    error = float((W - layer.form("default").weight(layer.form_tensors("default"))).norm())
    assert error == pytest.approx(float(torch.linalg.svdvals(W)[5:].norm()), rel=1e-5)


# Low rank + sparse rows (LoSparse)


def losparse(**options):
    options = {"budget": Fraction(0.15), "score": Windowed(), "unit_score": "mean", "count_from": 0, **options}
    return Allocate(spaces=("row",), **options)


def test_ratio_of_rows_follows_the_worked_schedule():
    total, w = 12272, 675
    rule = losparse(every=10, initial_warmup=w / total, final_warmup=5 * w / total, fixed_at_end=False)
    ratio = {t: rule.budget_at(100_000, 15_000, t, total) / 100_000 for t in (w, w + 1, 680, 5000, total - 5 * w + 1)}
    assert ratio[675] == 1
    assert ratio[676] == pytest.approx(0.99969, abs=1e-5)
    assert ratio[680] == pytest.approx(0.99845, abs=1e-5)
    assert ratio[5000] == pytest.approx(0.24051, abs=1e-5)
    assert ratio[total - 5 * w + 1] == 0.15


class OneSpace:
    """What a score asks of a space and a run."""

    step = 0

    def __init__(self, score):
        self.parameter = torch.nn.Parameter(torch.ones(1))
        self.kept = {f"{kept}_S": torch.zeros(1) for kept in score.averages}

    def scored_parameters(self):
        return {"S": (self.parameter, 0)}

    def state(self):
        return self.kept


def test_windows_of_importance_are_averaged_as_worked():
    score = Windowed(steps=3)
    space, seen = OneSpace(score), []
    for step in range(7):
        space.step, space.parameter.grad = step, torch.full((1,), float(step + 1))
        score.update(space, [space])
        seen.append(float(score.numbers(space)["S"]))
    assert seen == pytest.approx([0, 0, 0, 0.3, 0.3, 0.3, 1.005])
    platon, rest = Windowed(steps=3, beta2=0.5), []
    space = OneSpace(platon)
    for step in range(7):
        space.step, space.parameter.grad = step, torch.full((1,), float(step + 1))
        platon.update(space, [space])
        rest.append(float(platon.numbers(space)["S"]))
    uncertainty = 0.5 * (0.5 * abs(2 - 0.3)) + 0.5 * abs(5 - 1.005)
    assert rest[-1] == pytest.approx(1.005 * uncertainty)


def test_losparse_starts_as_the_weight_and_ends_with_rows_of_zeros(tmp_path):
    rule = losparse(every=2, initial_warmup=0.2, final_warmup=0.3, score=Windowed(steps=2), fixed_at_end=False)
    base = tiny.base("fp32")
    W = {name: m.weight.double() for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    own = logits(base)
    model = factored(LowRankSparse(0.1), schedule=[rule])
    for layer in factored_layers(model):
        tensors = layer.form_tensors("default")
        rows, cols = layer.out_features, layer.in_features
        assert tensors["A"].shape[0] == -(-rows * cols // (10 * (rows + cols)))
        torch.testing.assert_close(layer.factored_weight("default").double(), W[layer.module_name], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(model), own)
    tiny.train(model, tmp_path, 20, callbacks=callbacks_for(model))
    kept, total = 0, 0
    fractions = []
    for layer in factored_layers(model):
        tensors = held(layer)
        zero = (tensors["S"] == 0).all(1)
        assert torch.equal(zero, tensors["living"] == 0)
        assert bool((tensors["S"][~zero] != 0).all())  # whole rows or nothing
        kept += int((~zero).sum()) * layer.in_features
        total += tensors["S"].numel()
        fractions.append(float((~zero).float().mean()))
    assert 0.15 * total - 64 < kept <= 0.15 * total
    assert len(set(fractions)) > 2  # one threshold over the whole model


# The whole SVD (SST)


def test_spectral_is_the_weight_and_one_step_is_the_worked_one():
    layer = one_layer(torch.diag(torch.tensor([2.0, 1.0])).double(), Spectral(1))
    space = next(space for space in layer.unit_spaces("default") if space.kind == "vector")
    space.write(torch.tensor([0]))
    values, left, right = layer.trained_parameters("default")
    signs = left[0, 0].sign()
    torch.testing.assert_close(layer.form("default").weight(layer.form_tensors("default")), layer.dense_base_weight())
    G = torch.tensor([[0.5, 0.2], [-0.3, 0.1]], dtype=torch.float64)
    layer(torch.eye(2, dtype=torch.float64)).backward(G.T)
    torch.testing.assert_close(signs * left.grad[0], torch.tensor([0.5, -0.3], dtype=torch.float64))
    torch.optim.SGD([values, left, right], lr=0.1).step()
    space.normalise()
    torch.testing.assert_close(values.data, torch.tensor([1.95, 0.99], dtype=torch.float64))
    expected = {"left": [0.9995017577, 0.0315632134], "right": [0.9997784670, -0.0210479677]}
    for one, numbers in zip((left, right), expected.values(), strict=True):
        torch.testing.assert_close(signs * one.data[0], torch.tensor(numbers, dtype=torch.float64))


def test_values_clamp_at_zero_and_a_new_svd_leaves_the_weight():
    layer = one_layer(normal(6, 5), Spectral(2))
    space = next(space for space in layer.unit_spaces("default") if space.kind == "vector")
    with torch.no_grad():
        for parameter in layer.trained_parameters("default"):
            parameter += 0.3 * normal(*parameter.shape, seed=7)
        space.values[4] = -0.1
    space.normalise()
    assert float(space.values.min()) == 0
    form = layer.form("default")
    before = form.weight(layer.form_tensors("default")).clone()
    space.decompose()
    after = layer.form_tensors("default")
    torch.testing.assert_close(form.weight(after), before, rtol=0, atol=1e-12)
    assert bool((after["values"].diff() <= 0).all())
    full = {side: after[side].clone() for side in ("left", "right")}
    for side, vectors in full.items():
        assert not vectors[space.alive()].any()
        vectors[space.alive()] = after[f"{side}_active"].detach()
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(5, dtype=torch.float64))


def test_vectors_are_drawn_with_the_chances_and_others_stay():
    layer = one_layer(normal(6, 5), Spectral(1, floor=0.5))
    space = next(space for space in layer.unit_spaces("default") if space.kind == "vector")
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(5)
    for _ in range(4000):
        counts[draw_vectors(space.values, 1, 0.5, generator)] += 1
    sigma = torch.linalg.svdvals(normal(6, 5))
    expected = 4000 * (0.5 / 5 + 0.5 * sigma / sigma.sum()).float()
    assert float(((counts - expected).square() / expected).sum()) < 18.5  # chi^2 of 4 degrees, p = 0.001
    form, before = layer.form("default"), held(layer)
    W = form.weight(layer.form_tensors("default")).clone()
    space.write(torch.tensor([3]))
    assert torch.equal(form.weight(layer.form_tensors("default")), W) or torch.allclose(
        W, form.weight(layer.form_tensors("default"))
    )
    assert torch.equal(layer.form_tensors("default")["left_active"][0], before["left"][3]) or 3 in before["active"]


def test_training_samples_vectors_of_unit_length(tmp_path):
    rule = SampleVectors(every=3, iterations=2, warmup=1)
    model = factored(Spectral(4), schedule=[rule], target_modules=["q_proj", "down_proj"])
    first = {layer: held(layer) for layer in factored_layers(model)}
    tiny.train(model, tmp_path, 11, callbacks=callbacks_for(model))
    for layer, before in first.items():
        after = held(layer)
        assert not torch.equal(after["active"], before["active"])
        for side in ("left", "right"):
            norms = after[f"{side}_active"].norm(dim=1)
            torch.testing.assert_close(norms, torch.ones_like(norms))
        assert bool((after["values"] >= 0).all())
        assert not torch.equal(after["values"], before["values"])
