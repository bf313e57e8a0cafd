"""PERP's retraining: what its rows train, and `reconstruct` against a loop written from the paper, in float64."""

import copy

import pytest
import tiny
import torch
from peft import get_peft_model
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_sparse_peft import methods
from hf_sparse_peft.pruning import NM, prune_model, reconstruct
from hf_sparse_peft.tuners import adapter_layers

STEPS, RATE = 6, 2e-3


def batches(count=3, padded=False):
    generator = torch.Generator().manual_seed(1)
    for at in range(count):
        ids = torch.randint(1, tiny.VOCAB, (3, 10), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, : 2 + at] = 0
        yield {"input_ids": ids, "attention_mask": mask}


def pruned(base="fp32", /, **options):
    dense, model = tiny.base(base), tiny.base(base)
    prune_model(model, method="magnitude", pattern=NM(2, 4), show_progress=False)
    torch.manual_seed(2)
    return get_peft_model(model, methods.get("perp", **options).config), dense


def run(model, dense, data=None, **options):
    options = {"steps": STEPS, "learning_rate": RATE, "show_progress": False, **options}
    return reconstruct(model, dense, list(batches()) if data is None else data, **options)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["mask_lora", "lora_prune"])
def test_each_block_is_tuned_to_the_dense_one_on_what_the_merged_blocks_before_it_give(kind, padded):
    data = list(batches(padded=padded))
    model, dense = pruned(kind=kind, biases=False, norms=False, r=2, lora_alpha=6)
    plain = tiny.base("fp32")
    prune_model(plain, method="magnitude", pattern=NM(2, 4), show_progress=False)
    plain, dense64 = plain.double().eval(), copy.deepcopy(dense).double().eval()
    start = {layer.module_name: {k: v.detach().double() for k, v in layer.own_tensors("default").items() if k in "AB"}
             for layer in adapter_layers(model)}  # fmt: skip
    report = run(model, dense, data, warmup=0.5)
    seen = {}
    for number, (block, original) in enumerate(zip(plain.model.layers, dense64.model.layers, strict=True)):
        calls = []
        hook = block.register_forward_pre_hook(lambda _, a, k, calls=calls: calls.append((a, k)), with_kwargs=True)
        with torch.no_grad():
            for batch in data:
                plain(**batch, use_cache=False)
        hook.remove()
        with torch.no_grad():
            targets = [original(*args, **kwargs) for args, kwargs in calls]
        names = [name for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)]
        factors = {f"{name}.{key}": start[f"model.layers.{number}.{name}"][key].clone().requires_grad_()
                   for name in names for key in "AB"}  # fmt: skip
        weights = {name: block.get_submodule(name).weight.detach() for name in names}

        def updated(merged, names=names, weights=weights, factors=factors):
            found = {}
            for name in names:
                update = 3.0 * factors[f"{name}.B"] @ factors[f"{name}.A"]
                masked = kind == "mask_lora" or merged
                found[f"{name}.weight"] = weights[name] + (update * (weights[name] != 0) if masked else update)
            return found

        def error(at, block=block, calls=calls, targets=targets, updated=updated):
            output = functional_call(block, updated(False), *calls[at])
            return (output - targets[at])[data[at]["attention_mask"].bool()].square()

        with torch.no_grad():
            whole = torch.cat([error(at) for at in range(len(data))])
            assert report.before[f"model.layers.{number}"] == pytest.approx(float(whole.mean()), rel=1e-4)
        first = {name: torch.zeros_like(value) for name, value in factors.items()}
        second = copy.deepcopy(first)
        for step in range(STEPS):
            gradients = torch.autograd.grad(error(step % len(data)).mean(), list(factors.values()))
            rate = RATE * (step / 3 if step < 3 else (STEPS - step) / 3)
            for (name, value), gradient in zip(factors.items(), gradients, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * gradient
                second[name] = 0.999 * second[name] + 0.001 * gradient**2
                mean, square = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                value.data -= rate * mean / (square.sqrt() + 1e-8)
        with torch.no_grad():
            whole = torch.cat([error(at) for at in range(len(data))])
            assert report.after[f"model.layers.{number}"] == pytest.approx(float(whole.mean()), rel=1e-3)
            for name, weight in updated(True).items():
                block.get_parameter(name).copy_(weight)
        seen |= {f"model.layers.{number}.{name}": value for name, value in factors.items()}
    for layer in adapter_layers(model):
        for key in "AB":
            own = layer.own_tensors("default")[key].double()
            torch.testing.assert_close(own, seen[f"{layer.module_name}.{key}"], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("base", "kind"), [("fp32", "mask_lora"), ("bf16", "scale_lora"), ("conv1d", "scale_lora"), ("conv1d", "none")]
)
def test_only_what_trains_changes_and_merging_keeps_every_zero(base, kind):
    model, dense = pruned(base, kind=kind)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    report = run(model, dense, learning_rate=3e-3, steps=20)
    assert all(report.after[name] < report.before[name] for name in report.before)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name][0])}
    assert changed
    assert all(before[name][1] for name in changed)
    blocks = {name for name in changed if ".0." in name or ".1." in name}
    assert changed == blocks  # the last norm and the head are no block's
    assert any("norm" in name or ".ln_" in name for name in changed)
    assert any(name.endswith("bias") for name in changed) == (base == "conv1d")
    merged = model.merge_and_unload()
    for module in merged.modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not merged.get_output_embeddings():
            rows = weight.t() if isinstance(module, Conv1D) else weight
            assert ((rows != 0).reshape(-1, 4).sum(1) <= 2).all()


def test_lora_prune_trains_dense_and_merges_masked():
    model, _ = pruned(kind="lora_prune", biases=False, norms=False, r=2, init_weights=False)
    data = next(iter(batches()))
    layer = adapter_layers(model)[0]
    update = 16 * layer.own_tensors("default")["B"] @ layer.own_tensors("default")["A"]
    weight = layer.get_base_layer().weight
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ (weight + update).T)
    torch.testing.assert_close(layer.get_delta_weight("default"), update * (weight != 0))
    with torch.no_grad():
        trained = model(**data).logits
        merged = model.merge_and_unload()(**data).logits
    assert (merged - trained).norm() > 0.05 * trained.norm()


def test_a_head_beside_the_layers_gets_an_ordinary_lora():
    targets = ["q_proj", "v_proj", "lm_head"]
    model, _ = pruned(target_modules=targets, init_weights=False, r=2)
    head = next(layer for layer in adapter_layers(model) if layer.module_name == "lm_head")
    update = 16 * head.own_tensors("default")["B"] @ head.own_tensors("default")["A"]
    torch.testing.assert_close(head.get_delta_weight("default"), update)


def test_a_killed_run_goes_on_behind_its_last_block_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    from hf_sparse_peft.pruning.repair import reconstruction

    expected, dense = pruned("conv1d")
    report = run(expected, dense)
    model, _ = pruned("conv1d")
    tuned, calls = reconstruction._tuned, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tuned(*args)

    monkeypatch.setattr(reconstruction, "_tuned", killed)
    with pytest.raises(KeyboardInterrupt):
        run(model, dense, checkpoint=tmp_path)
    model, _ = pruned("conv1d")
    again = run(model, dense, checkpoint=tmp_path)
    assert len(calls) == 3
    assert (again.before, again.after) == (report.before, report.after)
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    model, _ = pruned("conv1d")
    for options, what in (({"steps": 3}, "another steps"), ({"data": list(batches(2))}, "another calibration data")):
        with pytest.raises(ValueError, match=what):
            run(model, dense, checkpoint=tmp_path, **options)


def test_a_block_whose_loss_is_not_finite_is_left_as_it_was():
    model, dense = pruned()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"loss of 'model.layers.0' is (inf|nan)"):
        run(model, dense, learning_rate=1e30)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, d: (m.get_base_model(), d, {}), "has none"),
        (lambda m, d: (m, d, {"steps": 0}), "steps=0"),
        (lambda m, d: (m, d, {"warmup": 1.0}), "warmup=1.0"),
        (lambda m, d: (m, tiny.llama(hidden=64), {}), "are of two models"),
        (lambda m, d: (m.merge_adapter() or m, d, {}), "are merged"),
        (lambda m, d: (m.requires_grad_(False), d, {}), "Nothing trains"),
        (lambda m, d: (pruned(mask="given")[0], d, {}), "does not know its mask"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(change, message):
    model, dense, options = change(*pruned())
    with pytest.raises(ValueError, match=message):
        run(model, dense, **options)


def test_perp_refuses_kinds_that_it_does_not_have():
    with pytest.raises(ValueError, match="kind='dora'"):
        methods.get("perp", kind="dora")
