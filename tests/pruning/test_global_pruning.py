"""Pruning of all weights together, also by what an adapter learnt (DSEE's sparse base), and sparse model soups."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import MaskedLoraConfig, SparseLoraConfig, hub, methods
from hf_sparse_peft.pruning import prune_globally, prune_model, sparse_soup
from hf_sparse_peft.sparsity import unpack_bits
from hf_sparse_peft.tuners import adapter_layers


def linears(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name}


def test_all_weights_compete_and_the_count_is_exact():
    model = tiny.llama()
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0.01)
    before = {name: m.weight.detach().clone() for name, m in linears(model).items()}
    report = prune_globally(model, 0.3)
    everything = torch.cat([w.abs().flatten() for w in before.values()])
    cut = everything.sort().values[round(0.3 * len(everything)) - 1]
    for name, weight in before.items():
        gone = weight.abs() <= cut
        assert torch.equal(linears(model)[name].weight, weight.masked_fill(gone, 0)), name
        assert torch.equal(unpack_bits(report.masks[name], gone.numel()).view(gone.shape), gone)
    assert sum(report.zeros.values()) == round(0.3 * len(everything))
    assert report.zeros["model.layers.0.mlp.up_proj"] == 64 * 32


@pytest.mark.parametrize("tuner", ["dsee", "lora"])
@pytest.mark.parametrize("by", ["update", "sum"])
def test_the_base_loses_what_the_adapter_left_small_over_the_whole_group(tuner, by):
    """DSEE's S1: query and value by their updates, the other matrices by their own weights."""
    config = methods.get("dsee", num_sparse=16).config if tuner == "dsee" else LoraConfig(r=4)
    model = get_peft_model(tiny.llama(), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_(generator=generator)
    base = model.get_base_model()
    adapted = {n: base.get_submodule(n) for n in (f"model.layers.{i}.self_attn.{k}" for i in (0, 1) for k in
               ("q_proj", "v_proj"))}  # fmt: skip
    base_weights = {name: layer.base_layer.weight.detach().clone() for name, layer in adapted.items()}
    updates = {name: layer.get_delta_weight("default").detach().clone() for name, layer in adapted.items()}
    report = prune_globally(model, 0.2, by=by, target_modules=["q_proj", "v_proj"])
    judged = {n: (updates[n] + base_weights[n] if by == "sum" else updates[n]).abs() for n in adapted}
    everything = torch.cat([one.flatten() for one in judged.values()])
    cut = everything.sort().values[round(0.2 * len(everything)) - 1]
    counts = set()
    for name, layer in adapted.items():
        gone = judged[name] <= cut
        counts.add(float(gone.float().mean()))
        assert torch.equal(layer.base_layer.weight, base_weights[name].masked_fill(gone, 0))
        torch.testing.assert_close(layer.get_delta_weight("default"), updates[name])
    assert len(counts) > 1
    assert sum(report.zeros.values()) == round(0.2 * len(everything))
    others = prune_globally(model, 0.2, target_modules=["k_proj", "o_proj"])
    assert others.masks.keys().isdisjoint(report.masks)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m, {"sparsity": 1.0}, "sparsity=1.0"),
        (lambda m: m, {"by": "loss"}, "by='loss'"),
        (lambda m: m, {"by": "update"}, "has no active adapter"),
        (lambda m: tiny.base("nf4"), {}, "is quantised"),
        (lambda m: m.model.layers[1].mlp.up_proj.weight.data.fill_(torch.nan) is None or m, {}, "is not finite"),
        (lambda m: setattr(m.model.layers[1].mlp.up_proj, "weight", m.model.layers[0].mlp.up_proj.weight) or m, {},
         "is shared"),
        (lambda m: get_peft_model(m, SparseLoraConfig(r=2, density=0.1)).merge_adapter() or m, {}, "are merged"),
    ],
)  # fmt: skip
def test_what_cannot_be_pruned_globally_is_refused(change, options, message):
    model = change(tiny.llama())
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        prune_globally(model, **{"sparsity": 0.5, **options})
    assert all(torch.equal(p, b) or b.isnan().any() for p, b in zip(model.parameters(), before, strict=True))


# Soups ---------------------------------------------------------------------------------------------------------------


def replicas(count=3):
    """Models of one mask, changed on what is kept."""
    first = tiny.llama()
    report = prune_globally(first, 0.5)
    found = []
    for seed in range(count):
        replica = copy.deepcopy(first)
        torch.manual_seed(seed)
        for parameter in replica.parameters():
            parameter.data += (parameter != 0) * 0.02 * torch.randn_like(parameter)
        found.append(replica)
    return found, report


def test_a_soup_is_the_mean_and_as_sparse_as_each_replica(tmp_path):
    models, report = replicas()
    models[1].save_pretrained(tmp_path)
    target = tiny.llama(seed=9)
    soup = sparse_soup(target, [models[0], tmp_path, models[2].state_dict()], masks=report.masks)
    assert soup.members == [0, 1, 2]
    for name, parameter in target.named_parameters():
        mean = torch.stack([m.get_parameter(name).double() for m in models]).mean(0)
        torch.testing.assert_close(parameter.double(), mean)
    zeros = {name: int((m.weight == 0).sum()) for name, m in linears(target).items()}
    assert zeros == report.zeros
    again = prune_globally(target, 0.6)  # the next phase judges the average
    assert sum(again.zeros.values()) == round(0.6 * sum(again.entries.values()))


def test_a_greedy_soup_takes_ties_and_is_never_below_its_best_replica():
    models, _ = replicas(4)
    target, scores = tiny.llama(seed=9), [0.3, 0.9, 0.5, 0.6]
    first = {round(float(m.lm_head.weight.sum()), 6): s for m, s in zip(models, scores, strict=True)}
    tried = []

    def evaluate(model):
        own = first.get(round(float(model.lm_head.weight.sum()), 6))
        if own is None:
            tried.append(model)
            return 0.9 if len(tried) != 2 else 0.8  # the second average is worse, the others tie
        return own

    soup = sparse_soup(target, models, evaluate=evaluate)
    assert (soup.members, soup.metrics, soup.metric) == ([1, 3, 0], scores, 0.9)
    mean = torch.stack([models[at].lm_head.weight for at in soup.members]).mean(0)
    torch.testing.assert_close(target.lm_head.weight, mean)
    assert sparse_soup(target, models, evaluate=lambda model: 1.0).members == [0, 1, 2, 3]


def test_soups_of_other_masks_are_refused_and_the_model_stays():
    models, report = replicas()
    other = tiny.llama()
    prune_model(other, method="random", show_progress=False)
    target = tiny.llama(seed=9)
    before = [p.detach().clone() for p in target.parameters()]

    def broken(model):
        raise RuntimeError("no metric")

    for inputs, options, error, message in (
        ([models[0]], {}, ValueError, "two or more"),
        ([models[0], other], {}, ValueError, "denser than each"),
        ([models[0], other], {"masks": report.masks}, ValueError, "denser than each"),
        ([models[0], tiny.llama(hidden=64)], {}, ValueError, "are of two models"),
        ([models[0], {}], {}, ValueError, "has no tensor"),
        (models, {"evaluate": lambda model: float("nan")}, ValueError, "gave nan"),
        (models, {"evaluate": broken}, RuntimeError, "no metric"),
    ):
        with pytest.raises(error, match=message):
            sparse_soup(target, inputs, **options)
    assert all(torch.equal(p, b) for p, b in zip(target.parameters(), before, strict=True))


def test_adapters_of_one_mask_are_averaged_as_merged_models_and_keep_its_zeros():
    base = tiny.llama()
    prune_globally(base, 0.5)
    config = MaskedLoraConfig(r=2, target_modules="all-linear", init_weights=False)
    model = get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("second", config)
    soup = hub.merge_to_dense(model, adapter_names=["default", "second"], weights=[0.5, 0.5])
    layer = adapter_layers(model)[0]
    deltas = [layer.get_delta_weight(name) for name in ("default", "second")]
    expected = layer.base_layer.weight + sum(deltas) / 2
    torch.testing.assert_close(soup.get_submodule(layer.module_name).weight, expected)
    for name, module in linears(soup).items():
        assert torch.equal(module.weight == 0, base.get_submodule(name).weight == 0)
