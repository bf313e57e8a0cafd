"""Self-compression: weights that train through a quantiser whose bit depths and exponents train too, and its files."""

import math

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_sparse_peft import BitPenalty, FactoredConfig, callbacks_for, methods
from hf_sparse_peft.ops.channel_product import channel_product, channel_quantised
from hf_sparse_peft.sparsity import pack_planes, unpack_planes
from hf_sparse_peft.training import Controller
from hf_sparse_peft.tuners.factored import ChannelBits, PackedChannels, channel_report, factored_layers
from hf_sparse_peft.utils.checksums import save_checked

IDS = torch.arange(12)[None]
TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def adapted(form=None, layers=1, **options):
    config = FactoredConfig(form=form or ChannelBits(4), **{**TARGETS, **options})
    return get_peft_model(tiny.llama(layers=layers), config)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def spread(model, low=-0.5, high=5.0):
    """Give channels bit depths as after training, some of them none."""
    generator = torch.Generator().manual_seed(3)
    for layer in factored_layers(model):
        bits = layer.form_tensors("default")["bits"]
        bits.data.copy_(torch.rand(bits.shape, generator=generator) * (high - low) + low)
        bits.data[:3] = torch.tensor([0.0, -1.0, 3.0])


def reference(w, b, e):
    """q of one number, its slope in w, and those in b and e of the sum, from the equation."""
    depth = max(b, 0.0)
    low, high, u = -(2 ** (depth - 1)), 2 ** (depth - 1) - 1, w / 2**e
    if low <= u <= high:
        q = 2**e * round(u)  # Python rounds halves to even
        return q, float(b > 0), 0.0, math.log(2) * (q - w) * (b > 0)
    bound = low if u < low else high
    q = 2**e * round(bound)
    side = -1 if u < low else 1
    return q, 0.0, side * math.log(2) * 2 ** (depth - 1) * 2**e * (b > 0), math.log(2) * q * (b > 0)


# The quantiser


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_the_worked_channel_and_its_gradients():
    W, b, e = numbers([0.30, -0.11, 0.02, -0.9]), numbers(3.0), numbers(-3.0)
    q = channel_quantised(W, b, e)
    assert q.tolist() == [[0.25, -0.125, 0.0, -0.5]]
    q.sum().backward()
    assert W.grad.tolist() == [[1, 1, 1, 0]]
    assert b.grad.item() == pytest.approx(-0.346574, abs=1e-6)
    assert e.grad.item() == pytest.approx(-0.405491, abs=1e-6)
    assert channel_quantised(W, numbers(2.0), e)[0, 0].item() == 0.125
    one_sided = channel_quantised(W, numbers(1.5), e)
    assert one_sided.tolist() == [[0, -0.125, 0, -0.125]]
    for dead in (0.0, -2.0):
        W.grad, b, e.grad = None, numbers(dead), None
        q = channel_quantised(W, b, e)
        assert not q.any()
        assert not torch.signbit(q).any()
        (q * torch.arange(1, 5)).sum().backward()
        assert not any(one.grad.any() for one in (W, b, e))


def test_product_and_gradients_follow_the_straight_through_formula():
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(9, 7, generator=generator, dtype=torch.float64).requires_grad_()
    b = numbers(-1.0, 0.0, 0.3, 1.0, 1.7, 2.0, 3.4, 5.0, 8.0)
    e = (torch.randn(9, generator=generator, dtype=torch.float64) - 2).requires_grad_()
    x = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    y = channel_product(x, W, b, e, torch.float64)
    got = torch.autograd.grad(y, [x, W, b, e], dy)
    due = torch.tensor(
        [[reference(w, b[i].item(), e[i].item()) for w in W[i].tolist()] for i in range(9)], dtype=torch.float64
    )
    q, dW, db, de = due.unbind(2)
    G = torch.einsum("abo,abi->oi", dy, x.detach())
    torch.testing.assert_close(y, x @ q.T)
    for one, expected in zip(got, (dy @ q, G * dW, (G * db).sum(1), (G * de).sum(1)), strict=True):
        torch.testing.assert_close(one, expected)


def test_start_fits_each_row_and_rows_of_zeros_have_no_bits():
    base = tiny.llama(layers=1)
    weight = base.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[2] = 0
    W = weight.detach().clone()
    model = get_peft_model(base, FactoredConfig(form=ChannelBits(8), target_modules=["q_proj"], keep_base=True))
    layer = factored_layers(model)[0]
    tensors = layer.form_tensors("default")
    step = W.abs().amax(1) / 127
    assert tensors["bits"][2].item() == 0
    assert bool((tensors["bits"][torch.arange(len(W)) != 2] == 8).all())
    assert bool(((layer.factored_weight("default") - W).abs() <= 0.5001 * step[:, None]).all())
    fixed = factored_layers(adapted(ChannelBits(2, exponent=-8.0)))[0].form_tensors("default")
    assert set(fixed["bits"].tolist()) == {2.0}
    assert set(fixed["exponents"].tolist()) == {-8.0}


# The penalty


@pytest.mark.parametrize("over", ["weights", "parameters"])
def test_penalty_is_the_gradient_of_the_mean_bit_depth_once_a_step(over):
    model = adapted(schedule=[BitPenalty(0.5, over=over)])
    spread(model)
    layers = factored_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    with Controller(model, optimizer, 2, accumulation=2) as rules:
        rules.before_step()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        rules.after_micro_batch()
        model(input_ids=IDS, labels=IDS).loss.backward()
        before = [layer.form_tensors("default")["bits"].grad.clone() for layer in layers]
        matrices = [p for p in trained if p.dim() == 2]
        others = [p.grad.clone() for p in matrices]
        optimizer.step()
        N = sum(layer.out_features * (layer.in_features + 2 * (over == "parameters")) for layer in layers)
        for layer, own in zip(layers, before, strict=True):
            bits = layer.form_tensors("default")["bits"]
            due = own + 0.5 * layer.in_features / N * (bits > 0)
            torch.testing.assert_close(bits.grad, due.detach())
            assert bool((bits.grad[:2] == 0).all())
        assert all(torch.equal(p.grad, own) for p, own in zip(matrices, others, strict=True))


@pytest.mark.parametrize("rate", [1.0, 30.0])
def test_bit_depths_move_at_their_own_rate(rate):
    model = adapted(schedule=[BitPenalty(100.0, rate=rate)], target_modules=["q_proj"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tensors = factored_layers(model)[0].form_tensors("default")
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with Controller(model, optimizer, 2) as rules:
        rules.before_step()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        rules.after_step()
        moved = {name: (tensor.detach() - before[name]).abs().max().item() for name, tensor in tensors.items()}
    assert moved == pytest.approx({"W": 1e-3, "bits": rate * 1e-3, "exponents": rate * 1e-3}, rel=1e-2)
    assert (tensors["bits"] < 4).all()


def test_a_run_removes_channels_that_never_return_and_says_how_many(tmp_path):
    method = methods.get("self-compression", bits=4, weight=50.0, rate=200.0, **TARGETS)
    model = get_peft_model(tiny.llama(layers=1), method.config)
    dead = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            for layer in factored_layers(model):
                now = layer.form_tensors("default")["bits"] <= 0
                assert not (dead.get(layer.module_name, now) & ~now).any()
                dead[layer.module_name] = now

    tiny.train(model, tmp_path, 10, learning_rate=5e-3, callbacks=[*callbacks_for(model), Watch()])
    report = channel_report(model)
    pruned = {name: one.pruned for name, one in report.items()}
    assert sum(pruned.values()) > 0
    for layer in factored_layers(model):
        gone, zero = dead[layer.module_name], (layer.factored_weight("default") == 0).all(1)
        assert bool(zero[gone].all())
        assert int(gone.sum()) == pruned[layer.module_name]
    dense = model.merge_and_unload()
    q = dense.model.layers[0].self_attn.q_proj.weight
    assert int((q == 0).all(1).sum()) >= next(n for name, n in pruned.items() if "q_proj" in name)


# The file


@pytest.mark.parametrize("cols", [8, 13])
def test_planes_hold_every_code_at_its_depth(cols):
    generator = torch.Generator().manual_seed(0)
    depths = torch.tensor([0, 1, 2, 5, 16, 0, 3])
    codes = torch.stack(
        [torch.randint(-(2**d // 2), max(2**d // 2, 1), (cols,), generator=generator) for d in depths.tolist()]
    )
    planes = pack_planes(codes, depths)
    assert planes.shape == (27, -(-cols // 8))
    assert torch.equal(unpack_planes(planes, depths, cols).long(), codes)
    for row, wrong in ((2, 2), (0, 1), (1, 1)):
        bad = codes.clone()
        bad[row, 0] = wrong
        with pytest.raises(ValueError, match=f"row {row} has codes"):
            pack_planes(bad, depths)


def test_a_packed_adapter_is_the_same_model_in_the_bits_it_claims(tmp_path):
    model = adapted(layers=2)
    spread(model)
    before, report = logits(model), channel_report(model)
    weights = {layer.module_name: layer.factored_weight("default") for layer in factored_layers(model)}
    model.save_pretrained(tmp_path / "training")
    model.base_model.pack_channels()
    assert torch.equal(logits(model), before)
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "adapter_model.safetensors")
    assert {key.rpartition("_")[2] for key in tensors} == {"planes", "bits", "exponents", "columns"}
    planes = {key: tensor for key, tensor in tensors.items() if key.endswith("planes")}
    assert sum(tensor.numel() for tensor in planes.values()) == sum(one.packed_bytes for one in report.values())
    for key, tensor in planes.items():
        bits = tensors[key.replace("planes", "bits")]
        assert len(tensor) == int(bits.sum())
    for kind, form in (("training", ChannelBits), ("packed", PackedChannels)):
        again = PeftModel.from_pretrained(tiny.llama(layers=2), tmp_path / kind)
        assert torch.equal(logits(again), before)
        assert isinstance(factored_layers(again)[0].form("default"), form)
    assert {n: one.pruned for n, one in channel_report(again).items()} == {n: one.pruned for n, one in report.items()}
    dense = again.merge_and_unload()
    for name, weight in weights.items():
        assert torch.equal(dense.get_submodule(name).weight, weight)


def test_channels_all_gone_pack_and_too_many_bits_do_not(tmp_path):
    model = adapted()
    layers = factored_layers(model)
    layers[1].form_tensors("default")["bits"].data[4] = 17.5
    layers[0].form_tensors("default")["bits"].data.fill_(-1)
    with pytest.raises(ValueError, match=r"down_proj' cannot be packed: a row has 17\.50 bits"):
        model.base_model.pack_channels()
    assert isinstance(layers[0].form("default"), ChannelBits)
    layers[1].form_tensors("default")["bits"].data.fill_(2)
    before = logits(model)
    model.base_model.pack_channels()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)), before)
    with pytest.raises(ValueError, match="name one adapter"):
        model.base_model.pack_channels()
    with pytest.raises(ValueError, match="PackedChannels is made of a trained adapter"):
        adapted(PackedChannels())


LIES = {
    "bits": (lambda t: t.index_fill(0, torch.tensor([5]), 200), "200 bits"),
    "other bits": (lambda t: t.flip(0).index_fill(0, torch.tensor([5]), 9), "bits in all rows"),
    "exponents": (lambda t: t + 500, "exponent"),
    "columns": (lambda t: t + 1, "columns"),
    "planes": (lambda t: t[1:], "planes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_packed_file_that_lies_is_refused_by_name(lie, tmp_path):
    model = adapted(target_modules=["q_proj"])
    spread(model)
    model.base_model.pack_channels()
    model.save_pretrained(tmp_path)
    file, (change, message) = tmp_path / "adapter_model.safetensors", LIES[lie]
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(lie.split()[-1]))
    save_checked({**tensors, key: change(tensors[key]).contiguous()}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)


def test_one_config_for_two_models_packs_one():
    config = FactoredConfig(form=ChannelBits(4), schedule=[BitPenalty()], **TARGETS)
    one, two = (get_peft_model(tiny.llama(layers=1), config) for _ in range(2))
    one.base_model.pack_channels()
    assert isinstance(config.form, ChannelBits)
    assert len(config.schedule) == 1
    assert torch.equal(logits(one), logits(two))
