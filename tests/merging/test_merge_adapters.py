"""`merge_adapters` from files to files, against float64 formulas over the updates of the loaded models."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sparse_peft import cli, merging
from hf_sparse_peft.merging import merge_adapters
from hf_sparse_peft.tuners.shared.file_check import read_adapter
from hf_sparse_peft.utils.parts import part_types


def positions(folders, updates):
    """What each adapter holds (its support with zeros is not seen here: values are drawn, so none is 0)."""
    found = [updates(folder) for folder in folders]
    names = sorted(set().union(*found))
    shape = {name: next(one[name].shape for one in found if name in one) for name in names}
    return names, [
        {name: one.get(name, torch.zeros(shape[name], dtype=torch.float64)) for name in names} for one in found
    ]


def ties_reference(names, deltas, density, weights):
    """TIES from its equations: entries of all weights of an adapter ranked together, counted where it holds any."""
    flat = [torch.cat([one[name].reshape(-1) for name in names]) for one in deltas]
    trimmed = []
    for one in flat:
        k = int(density * int((one != 0).sum()))
        least = one.abs().sort(descending=True).values[k - 1]
        trimmed.append(torch.where(one.abs() >= least, one, 0.0))
    stacked = torch.stack(trimmed)
    signs = stacked.sum(0).sign()
    majority = 1.0 if signs.sum() > 0 else -1.0
    signs[signs == 0] = majority
    agree = stacked.sign() == signs
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    merged = (w * stacked * agree).sum(0) / agree.sum(0).clamp_min(1)
    return dict(zip(names, merged.split([deltas[0][name].numel() for name in names]), strict=True))


@pytest.mark.parametrize("kinds", [("entries", "entries"), ("rows", "subnet"), ("entries", "other-modules")])
def test_ties_of_supports_is_exact_and_an_adapter_of_their_union(kinds, adapter, updates, tmp_path):
    folders = [adapter(kind, seed) for seed, kind in enumerate(kinds)]
    report = merge_adapters(folders, tmp_path / "merged", "ties", density=0.6, weights=[1.0, 0.5], show_progress=False)
    names, deltas = positions(folders, updates)
    expected, found = ties_reference(names, deltas, 0.6, [1.0, 0.5]), updates(tmp_path / "merged")
    assert report.exact
    for name in names:
        got = found.get(name, torch.zeros_like(deltas[0][name]))
        torch.testing.assert_close(got.reshape(-1), expected[name], atol=1e-6, rtol=1e-5)


def test_dare_keeps_entries_over_the_probability_and_draws_alike_again(adapter, updates, tmp_path):
    folders = [adapter("entries"), adapter("entries", 1)]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        merge_adapters(folders, tmp_path / name, "dare", rate=0.75, seed=seed, show_progress=False)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "abc"]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    names, (first, second) = positions(folders, updates)
    found = updates(tmp_path / "a")
    other = updates(tmp_path / "c")
    kept = total = 0
    for name in names:
        one, two, got = first[name], second[name], found.get(name, torch.zeros_like(first[name]))
        possible = torch.stack([torch.zeros_like(one), 4 * one, 4 * two, 4 * one + 4 * two])
        assert float((possible - got).abs().min(0).values.max()) < 1e-5
        kept, total = kept + int((got != 0).sum()), total + int(((one != 0) | (two != 0)).sum())
    assert 0.15 < kept / total < 0.4
    assert any(not torch.equal(found[name], other[name]) for name in set(found) & set(other))


def test_draws_of_one_adapter_do_not_depend_on_the_others(adapter, tmp_path):
    names = [
        ("ab", [adapter("entries"), adapter("entries", 1)]),
        ("ac", [adapter("entries"), adapter("other-modules")]),
    ]
    masks = []
    for out, folders in names:
        merge_adapters(folders, tmp_path / out, "dare", weights=[1.0, 1e-30], rate=0.5, show_progress=False)
        file = read_adapter(tmp_path / out / "adapter_config.json", tmp_path / out / "adapter_model.safetensors")
        from hf_sparse_peft.hub.held_layers import layers_without_base

        layer = layers_without_base(file)["model.layers.0.self_attn.q_proj"]
        positions_, values = layer.pieces("default")[0].entries()
        masks.append(set(positions_[values.abs() > 1e-20].tolist()))
    assert masks[0] == masks[1]


@pytest.mark.parametrize("method", ["sum", "soup"])
@pytest.mark.parametrize(
    "kinds", [("entries", "both", "factors"), ("lora", "rs-lora"), ("rows", "subnet"), ("core", "lora")]
)
def test_sums_and_means_are_exact_for_every_mix_of_pieces(method, kinds, adapter, updates, tmp_path):
    folders = [adapter(kind, seed) for seed, kind in enumerate(kinds)]
    weights = [0.7, -0.4, 1.3][: len(kinds)] if method == "sum" else [0.5, 0.25, 1.0][: len(kinds)]
    report = merge_adapters(folders, tmp_path / "merged", method, weights=weights, show_progress=False)
    names, deltas = positions(folders, updates)
    found, divisor = updates(tmp_path / "merged"), 1.0 if method == "sum" else sum(weights)
    assert report.exact
    for name in names:
        expected = sum(w * one[name] for w, one in zip(weights, deltas, strict=True)) / divisor
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=1e-4)


def test_a_merge_of_factors_is_fitted_by_svd_and_says_its_error(adapter, updates, tmp_path):
    folders = [adapter("factors"), adapter("lora", 1)]
    report = merge_adapters(folders, tmp_path / "merged", "ties", density=0.3, rank=5, show_progress=False)
    names, deltas = positions(folders, updates)
    expected, found = ties_reference(names, deltas, 0.3, [1.0, 1.0]), updates(tmp_path / "merged")
    assert not report.exact
    for name in names:
        dense = expected[name].view_as(found[name])
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        best = U[:, :5] * S[:5] @ Vh[:5]
        assert report.ranks[name] == 5
        torch.testing.assert_close(found[name], best, atol=1e-4, rtol=1e-3)
        assert report.errors[name] == pytest.approx(float((dense - best).norm() / dense.norm()), rel=1e-3)
    assert "at most" in str(report.table())


def test_a_dense_model_holds_the_exact_merge_and_a_lora_what_fits(base, adapter, updates, tmp_path):
    folders = [adapter("factors"), adapter("entries", 1)]
    names, deltas = positions(folders, updates)
    expected = ties_reference(names, deltas, 0.3, [1.0, 1.0])
    report = merge_adapters(folders, tmp_path / "dense", "ties", density=0.3, form="dense", show_progress=False)
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    assert report.exact
    for key, weight in after.items():
        change = (weight.double() - before[key].double()).reshape(-1)
        name = key.removesuffix(".weight")
        torch.testing.assert_close(change, expected.get(name, torch.zeros_like(change)), atol=1e-6, rtol=1e-4)
        assert report.entries.get(name, 0) == int((weight != before[key]).sum())
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    lora = merge_adapters(folders, tmp_path / "lora", "sum", form="lora", show_progress=False)
    found = updates(tmp_path / "lora")
    assert max(lora.errors.values()) > 0.01  # entries have no rank of their own
    for name in names:
        dense = deltas[0][name] + deltas[1][name]
        assert float((found[name] - dense).norm() / dense.norm()) == pytest.approx(lora.errors[name], abs=1e-4)
    exact = merge_adapters(
        [adapter("rows"), adapter("lora")], tmp_path / "as-lora", "sum", form="lora", show_progress=False
    )
    assert exact.exact
    found, (names, deltas) = updates(tmp_path / "as-lora"), positions([adapter("rows"), adapter("lora")], updates)
    for name in names:
        torch.testing.assert_close(found[name], deltas[0][name] + deltas[1][name], atol=1e-5, rtol=1e-4)


def test_the_command_merges_by_name_and_says_what_is_wrong_in_flags(adapter, updates, tmp_path, capsys):
    folders = [str(adapter("entries")), str(adapter("entries", 1))]
    words = ["combine", *folders, "--method", "ties", "--density", "0.6", "--out", str(tmp_path / "merged"), "--json"]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact"]
    names, deltas = positions(folders, updates)
    expected, found = ties_reference(names, deltas, 0.6, [1.0, 1.0]), updates(tmp_path / "merged")
    for name in names:
        torch.testing.assert_close(found[name].reshape(-1), expected[name], atol=1e-6, rtol=1e-5)
    out = ["--out", str(tmp_path / "x")]
    for more, status, said in (
        (["--method", "tie"], 1, "--method tie is unknown"),
        (["--method", "ties", "--set", "densty=1"], 1, "densty"),
        (["--method", "ties", "--set", "density=2"], 1, "density=2"),
        (["--method", "ties", "--set", "density"], 2, "NAME=VALUE"),
        (["--method", "fisher"], 1, "importance"),
        (["--method", "soup", "--weights", "1,-1"], 1, "--weights"),
        ([], 2, "--weights"),
        (["--weights", "1,1", "--form", "lora"], 2, "--method"),
    ):
        assert cli.main(["combine", *folders, *out, *more]) == status, more
        assert said in capsys.readouterr().err, more
    assert not (tmp_path / "x").exists()
    assert cli.main(["combine", "--methods"]) == 0
    assert "breadcrumbs" in capsys.readouterr().out


def test_merged_adapters_load_in_peft_and_say_where_they_are_from(base, adapter, tmp_path):
    merge_adapters([adapter("both"), adapter("entries", 1)], tmp_path / "merged", "sum", show_progress=False)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "merged"))
    ids = torch.arange(1, 9)[None]
    assert bool(torch.isfinite(model(ids).logits).all())
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == "CAUSAL_LM"
    assert "both-0" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["masked", "dora", "factored"])
def test_what_needs_the_base_is_refused_by_name(kind, adapter, tmp_path):
    with pytest.raises(ValueError, match="base's weights only"):
        merge_adapters([adapter("entries"), adapter(kind)], tmp_path / "x", "sum", show_progress=False)
    assert not (tmp_path / "x").exists()


def test_heads_are_taken_or_averaged_and_never_added(base, adapter, tmp_path):
    folders = [adapter("heads"), adapter("heads", 1)]
    key = "base_model.model.lm_head.weight"
    heads = [load_file(folder / "adapter_model.safetensors")[key] for folder in folders]
    with pytest.raises(ValueError, match="heads_from"):
        merge_adapters(folders, tmp_path / "x", "ties", show_progress=False)
    for out, heads_from, expected in (
        ("one", str(folders[1]), heads[1]), ("mean", "mean", 0.25 * heads[0] + 0.75 * heads[1])
    ):  # fmt: skip
        merge_adapters(folders, tmp_path / out, "ties", weights=[1, 3], heads_from=heads_from, show_progress=False)
        torch.testing.assert_close(load_file(tmp_path / out / "adapter_model.safetensors")[key], expected)
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / out))
    merge_adapters([folders[0], adapter("entries")], tmp_path / "alone", "sum", show_progress=False)
    assert torch.equal(load_file(tmp_path / "alone" / "adapter_model.safetensors")[key], heads[0])
    with pytest.raises(ValueError, match="none of the adapters"):
        merge_adapters(folders, tmp_path / "x", "ties", heads_from="elsewhere", show_progress=False)
    merge_adapters(folders, tmp_path / "dense", "sum", form="dense", heads_from="mean", show_progress=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense.lm_head.weight.data, 0.5 * heads[0] + 0.5 * heads[1])


def test_a_method_from_outside_is_a_row_of_registered_parts():
    from worked_example import T1, T2, GivenMasks, deltas, merged

    @merging.register_merge("masked-sum", paper="Nobody, 2026", does="in this test", result="exact")
    def masked_sum(**overrides):
        return merging.Merge(**{"sparsify": GivenMasks(), **overrides})

    try:
        method = merging.get_merge("masked-sum", scale=2.0)
        expected = torch.tensor([1.8, -0.5, 1.4, 0.8, -1.6, 0, 0, 0.2], dtype=torch.float64)
        torch.testing.assert_close(merged(method, deltas(T1, T2)), expected)
        with pytest.raises(ValueError, match="taken"):
            merging.register_merge("masked-sum", paper="", does="", result="")(masked_sum)
    finally:
        merging.table._ROWS.pop("masked-sum")


def test_the_table_of_the_page_is_the_registrys():
    page = (Path(__file__).parents[2] / "docs" / "merging.md").read_text()
    told = page.partition("<!-- merge table -->\n")[2].partition("\n<!-- end of merge table -->")[0]
    assert told == merging.merges_markdown()
    for kind in (merging.Sparsify, merging.Rescale, merging.Consensus, merging.Normalise):
        own = {name for name, part in part_types(kind).items() if part.__module__.startswith("hf_sparse_peft")}
        assert all(f"`{name}`" in page for name in own)
