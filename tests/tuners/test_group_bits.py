"""GQSA's 4-bit stages: groups that train through their rounding, then scales and zero points of frozen integers."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import FactoredConfig, estimate
from hf_sparse_peft.ops.group_product import group_product
from hf_sparse_peft.pruning import GQSA, Groups, prune_model, reconstruct
from hf_sparse_peft.tuners.factored import GroupBits, PackedGroups, factored_layers
from hf_sparse_peft.utils.checksums import save_checked

IDS = torch.arange(1, 13)[None]
DATA = [{"input_ids": torch.randint(1, tiny.VOCAB, (8, 12), generator=torch.Generator().manual_seed(5))}]
SIZE = 8


def pruned(layers=1):
    model = tiny.llama(layers=layers)
    prune_model(model, DATA, method=GQSA(), sparsity=0.5, pattern=Groups(SIZE), show_progress=False)
    return model


def adapted(base=None, form=None, **options):
    config = FactoredConfig(form=form or GroupBits(SIZE), **{"target_modules": "all-linear", **options})
    return get_peft_model(pruned() if base is None else base, config)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def dense64(W, s, z, kept, bits):
    """W^ of the equation, number by number, and the slopes of each group's entries in w, s and z."""
    rows, groups = kept.shape
    size, most, at = W.shape[1], 2**bits - 1, 0
    dense = torch.zeros(rows, groups * size, dtype=torch.float64)
    slopes = torch.zeros(3, rows, groups * size, dtype=torch.float64)
    for i in range(rows):
        for g in range(groups):
            if not kept[i, g]:
                continue
            for j in range(size):
                w, u = W[at, j].item(), W[at, j].item() / s[at].item() + z[at].item()
                q = min(max(round(u), 0), most)
                inside = 0 <= round(u) <= most
                dense[i, g * size + j] = s[at].item() * (q - z[at].item())
                drift = q - z[at].item() - (w / s[at].item() if inside else 0.0)
                slopes[:, i, g * size + j] = torch.tensor([inside, drift, 0.0 if inside else -s[at].item()])
            at += 1
    return dense, slopes


def numbers(kept, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = int(kept.sum())
    W = torch.randn(count, size, generator=generator, dtype=torch.float64)
    s = torch.rand(count, generator=generator, dtype=torch.float64) * 0.3 + 0.05
    z = torch.rand(count, generator=generator, dtype=torch.float64) * 10 - 1
    return [one.requires_grad_() for one in (W, s, z)]


KEPT = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bits", [2, 4])
def test_product_and_gradients_follow_the_equations(bits, stage):
    generator = torch.Generator().manual_seed(1)
    W, s, z = numbers(KEPT, 4)
    x = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64).requires_grad_()
    dy = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    dense, slopes = dense64(W.detach(), s, z, KEPT, bits)
    held = W if stage == 1 else (W / s[:, None] + z[:, None]).detach().round().clamp(0, 2**bits - 1).to(torch.uint8)
    y = group_product(x, held, s, z, KEPT, bits, torch.float64)
    torch.testing.assert_close(y, x @ dense.T)
    G = torch.einsum("abo,abi->oi", dy, x.detach())
    if stage == 2:
        slopes[1] = (dense.view(4, 3, 4) / s.new_ones(1)).view(4, 12)  # s (q - z), divided by s below
        slopes[2] = -1.0
    by_group = (G * slopes).view(3, 4, 3, 4)[:, KEPT]
    if stage == 1:
        due = [dy @ dense, by_group[0], by_group[1].sum(1), by_group[2].sum(1)]
        assert bool((by_group[2].sum(1) != 0).any())  # something is clipped
        assert bool((slopes[0].view(4, 3, 4)[KEPT] == 1).any())
    else:
        due = [dy @ dense, by_group[1].sum(1) / s.detach(), by_group[2].sum(1) * s.detach()]
    got = torch.autograd.grad(y, [x, *([W] if stage == 1 else []), s, z], dy)
    for one, expected in zip(got, due, strict=True):
        torch.testing.assert_close(one, expected)


def test_the_start_spans_each_kept_group_and_the_others_stay_exactly_0():
    base = pruned()
    weights = {n: m.weight.detach().clone() for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    model = adapted(base)
    for layer in factored_layers(model):
        W, found = weights[layer.module_name].view(-1, SIZE), layer.factored_weight("default").view(-1, SIZE)
        gone = (W == 0).all(1)
        assert int(gone.sum()) == len(W) // 2
        assert not found[gone].any()
        tensors = layer.form_tensors("default")
        assert [tuple(tensors[n].shape) for n in ("W", "scales", "zeros")] == [
            (len(W) - len(W) // 2, SIZE), (len(W) - len(W) // 2,), (len(W) - len(W) // 2,)]  # fmt: skip
        step = (W.amax(1) - W.amin(1)) / 15
        assert bool(((found - W).abs() <= 0.501 * step[:, None]).all())
        for group, new in zip(W[~gone][:20], found[~gone][:20], strict=True):
            assert new.amin() == pytest.approx(float(group.amin()), abs=1e-6)
            assert new.amax() == pytest.approx(float(group.amax()), abs=1e-6)


@pytest.mark.parametrize("base", ["nf4", "conv1d", "bf16"])
def test_other_bases_start_from_what_they_hold(base):
    model = adapted(tiny.base(base, hidden=64, layers=1))
    assert logits(model).isfinite().all()
    form = GroupBits(SIZE, bits=8)
    near, plain = adapted(tiny.base(base, hidden=64, layers=1), form), tiny.base(base, hidden=64, layers=1)
    difference = (logits(near) - logits(plain)).norm() / logits(plain).norm()
    assert difference < 0.05
    assert difference < (logits(model) - logits(plain)).norm() / logits(plain).norm()


def test_memory_is_estimated_before_a_run():
    """Without weights all groups count as kept."""
    config = FactoredConfig(form=GroupBits(SIZE), target_modules="all-linear", task_type="CAUSAL_LM")
    dense = tiny.llama(layers=1)
    entries = sum(
        m.weight.numel() for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and "lm" not in n
    )
    memory = estimate(dense.config, config, seq=16)
    assert memory.trained_numbers == entries + 2 * entries // SIZE


def trained_names(model):
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    names = {n.split(".factored_")[1].split(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return names


def test_blocks_then_scales_train_and_the_zeros_and_integers_stay(tmp_path):
    dense, base = tiny.llama(layers=2), pruned(layers=2)
    zeros = {n: m.weight == 0 for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and "lm" not in n}
    model = adapted(base, keep_base=True, task_type="CAUSAL_LM")
    assert trained_names(model) == {"W", "scales", "zeros"}
    report = reconstruct(model, dense, DATA, steps=8, learning_rate=2e-3, show_progress=False)
    assert all(report.after[block] < report.before[block] for block in report.before)
    before = logits(model)
    model.base_model.pack_groups()
    assert torch.equal(logits(model), before)
    assert trained_names(model) == {"scales", "zeros"}
    codes = [layer.form_tensors("default")["codes"].clone() for layer in factored_layers(model)]
    loss = model(input_ids=IDS, labels=IDS).loss
    tiny.train(model, tmp_path, 5, data=[{"input_ids": IDS[0], "labels": IDS[0]}] * 32, learning_rate=1e-3)
    assert model(input_ids=IDS, labels=IDS).loss < loss
    for layer, old in zip(factored_layers(model), codes, strict=True):
        assert torch.equal(layer.form_tensors("default")["codes"], old)
    model.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "adapter_model.safetensors")
    integers = sum(t.numel() for key, t in tensors.items() if key.endswith("codes"))
    assert integers == sum(int((~z).sum()) for z in zeros.values()) // 2
    again = PeftModel.from_pretrained(tiny.llama(layers=2), tmp_path / "packed")
    assert torch.equal(logits(again), logits(model))
    assert isinstance(factored_layers(again)[0].form("default"), PackedGroups)
    merged = again.merge_and_unload()
    assert all(not merged.get_submodule(name).weight[gone].any() for name, gone in zeros.items())


LIES = {
    "codes": (lambda t: t[1:], "codes"),
    "kept": (lambda t: t ^ 1, "keeps .* groups"),
    "columns": (lambda t: t + 1, "columns"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_file_that_lies_is_refused(what, tmp_path):
    model = adapted(target_modules=["down_proj"])
    model.base_model.pack_groups()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change, message = LIES[what]
    key = next(key for key in tensors if key.endswith(what))
    save_checked(tensors | {key: change(tensors[key]).contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)


def test_what_has_no_groups_is_refused():
    empty = tiny.llama(layers=1)
    empty.model.layers[0].mlp.up_proj.weight.data.zero_()
    for base, options, message in (
        (empty, {}, r"up_proj': a weight is 0 throughout"),
        (tiny.llama(layers=1), {"form": GroupBits(24)}, r"size=24 does not divide the 32 columns"),
        (tiny.llama(layers=1), {"rank_pattern": {"up_proj": 4}}, r"rank_pattern\['up_proj'\]"),
        (tiny.llama(layers=1), {"form": PackedGroups(SIZE)}, "pack_groups"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted(base, **options)
    packed = adapted(target_modules=["down_proj"])
    packed.base_model.pack_groups()
    with pytest.raises(ValueError, match=r"name one adapter of FactoredConfig\(form=GroupBits"):
        packed.base_model.pack_groups()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_goes_on_from_its_checkpoint_to_the_bit(tmp_path, stage):
    def start():
        model = adapted(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        if stage == 2:
            model.base_model.pack_groups()
        return model

    data = [{"input_ids": ids, "labels": ids} for ids in DATA[0]["input_ids"].repeat(4, 1)]
    saves = {"data": data, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = start()
    tiny.train(whole, tmp_path / "whole", 4, **saves)
    again = PeftModel.from_pretrained(pruned(), tmp_path / "whole" / "checkpoint-2", is_trainable=True)
    tiny.train(again, tmp_path / "again", 4, resume=str(tmp_path / "whole" / "checkpoint-2"), **saves)
    first = start()
    for a, b, c in zip(*(factored_layers(one) for one in (whole, again, first)), strict=True):
        a, b, c = (one.form_tensors("default") for one in (a, b, c))
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert not torch.equal(a["scales"], c["scales"])
