"""Supports of one module that are cut otherwise than another's, and supports that several modules choose together."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from support_codes import read_codes
from tuner_toolbox import HIDDEN, INNER, fill, logits, make_config

from hf_sparse_peft import ErdosRenyi, SparseLoraConfig, StructureConfig, UnitsPerModule
from hf_sparse_peft.hub import check_adapter, export_lora
from hf_sparse_peft.tuners import adapter_layers

KINDS = {"q_proj": "row", "v_proj": "entry", "down_proj": "column", r".*0.self_attn.o_proj": "block"}
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def mixed(**overrides) -> SparseLoraConfig:
    options = {"granularity": "row", "granularity_pattern": KINDS, "target_modules": TARGETS, "density": 0.25}
    return make_config(**{**options, **overrides})


def units_by_name(model, adapter: str = "default") -> dict[str, list[int]]:
    """Units of every layer, by the file format's definition."""
    return {
        layer.module_name: read_codes(layer.sparse_lora_support[adapter]) if adapter in layer.sparse_lora_grid else []
        for layer in adapter_layers(model)
    }


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_every_module_has_the_units_of_its_pattern_and_keeps_them_through_files_and_merging(base_of, tmp_path, base):
    model = get_peft_model(base_of(base), mixed())
    shapes = {layer.module_name: layer.sparse_lora_values["default"].shape for layer in adapter_layers(model)}
    assert shapes["model.layers.1.self_attn.q_proj"] == (HIDDEN // 4, HIDDEN)
    assert shapes["model.layers.1.self_attn.v_proj"] == (HIDDEN * HIDDEN // 8,)
    assert shapes["model.layers.1.self_attn.o_proj"] == (HIDDEN // 4, HIDDEN)  # no pattern matches: the default, rows
    assert shapes["model.layers.0.self_attn.o_proj"] == (4, 16, 16)
    assert shapes["model.layers.1.mlp.down_proj"] == (INNER // 4, HIDDEN)
    fill(model)
    before = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(base), tmp_path)), before)
    found = {m.name.rpartition(".")[2]: m.space("support")["unit"] for m in check_adapter(tmp_path).modules}
    assert found["down_proj"] == "column"
    model.compact()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(base), tmp_path)), before)
    if base == "fp32":
        model.merge_adapter()
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        assert torch.equal(logits(model), before)


def test_adapters_of_unlike_patterns_combine_exactly(base_of, tmp_path):
    model = get_peft_model(base_of(), mixed())
    model.add_adapter("other", mixed(granularity="column", granularity_pattern={"q_proj": "row"}, seed=3))
    for seed, name in enumerate(("default", "other")):
        fill(model, name, seed=seed)
    deltas = {
        layer.module_name: layer.get_delta_weight("default") - 2 * layer.get_delta_weight("other")
        for layer in adapter_layers(model)
    }
    model.add_weighted_adapter(["default", "other"], [1.0, -2.0], "sum", combination_type="cat")
    kinds = {layer.module_name: layer.sparse_lora_grid["sum"].granularity for layer in adapter_layers(model)}
    assert kinds["model.layers.0.self_attn.q_proj"] == "row"  # both agree there
    assert kinds["model.layers.0.mlp.down_proj"] == "column"
    assert kinds["model.layers.1.self_attn.o_proj"] == "entry"  # rows and columns
    for layer in adapter_layers(model):
        torch.testing.assert_close(layer.get_delta_weight("sum"), deltas[layer.module_name], rtol=1e-5, atol=1e-6)
    model.set_adapter("sum")
    before = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path / "sum")), before)


def test_errors_name_the_module_and_the_pattern(base_of):
    with pytest.raises(ValueError, match=r"granularity_pattern=\{'q_proj': 'rows'\} is out of range.*'row'"):
        mixed(granularity_pattern={"q_proj": "rows"})
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.o_proj': block_size=48"):
        get_peft_model(base_of(), mixed(block_size=48))


def structured(structures, **overrides) -> SparseLoraConfig:
    pattern = {"o_proj": "column", "down_proj": "column"}
    options = {"granularity": "row", "granularity_pattern": pattern, "structures": structures}
    options |= {} if "budget" in overrides else {"density": 0.0}
    names = [name for one in structures for name in one.modules]
    return make_config("sparse-row", **{**options, "target_modules": names, **overrides})


FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def test_channels_are_the_same_in_every_matrix_of_a_block_and_exact_in_number(base_of):
    config = structured([StructureConfig(FFN, density=0.1)])
    model = get_peft_model(base_of(), copy.deepcopy(config))
    units = units_by_name(model)
    by_block = [units[f"model.layers.{i}.mlp.gate_proj"] for i in range(2)]
    for block, chosen in enumerate(by_block):
        for name in FFN:
            assert units[f"model.layers.{block}.mlp.{name}"] == chosen
    assert sum(map(len, by_block)) == int(0.1 * 2 * INNER)
    assert by_block[0] != by_block[1]
    again = units_by_name(get_peft_model(base_of(), copy.deepcopy(config)))
    other = units_by_name(get_peft_model(base_of(), structured([StructureConfig(FFN, density=0.1)], seed=1)))
    assert again == units != other


def test_random_structures_are_drawn_over_all_blocks_and_may_leave_one_empty(base_of, tmp_path):
    counts = set()
    for seed in range(6):
        config = structured([StructureConfig(["down_proj"], density=2 / (2 * INNER))], seed=seed)
        model = get_peft_model(base_of(), config)
        counts.add(tuple(map(len, units_by_name(model).values())))
        if 0 in map(len, units_by_name(model).values()):
            fill(model)
            before = logits(model)
            model.save_pretrained(tmp_path)
            assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), before)
            check_adapter(tmp_path)
    assert {sum(pair) for pair in counts} == {2}
    assert len(counts) > 1


@pytest.mark.parametrize("criterion", ["magnitude", "smallest_magnitude"])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_heads_are_the_best_groups_by_the_sum_over_all_their_rows_and_columns(base_of, criterion, scope):
    base = base_of()
    heads, groups, size = 4, 2, HIDDEN // 4
    worth = []
    for block in base.model.layers:
        weights = {n: getattr(block.self_attn, n).weight.detach().double().abs() for n in ATTENTION}
        for group in range(groups):
            queries = slice(group * size * heads // groups, (group + 1) * size * heads // groups)
            keys = slice(group * size, (group + 1) * size)
            worth.append(
                weights["q_proj"][queries].sum()
                + weights["k_proj"][keys].sum()
                + weights["v_proj"][keys].sum()
                + weights["o_proj"][:, queries].sum()
            )
    worth = torch.stack(worth) * (1 if criterion == "magnitude" else -1)
    best = (
        worth.topk(2).indices.tolist() if scope == "model" else [int(worth[:2].argmax()), 2 + int(worth[2:].argmax())]
    )
    one = StructureConfig(ATTENTION, "head", 0.5, scope)
    units = units_by_name(get_peft_model(base, structured([one], criterion=criterion)))
    for block in range(2):
        chosen = [group for group in range(groups) if 2 * block + group in best]
        keys = [group * size + i for group in chosen for i in range(size)]
        queries = [group * 2 * size + i for group in chosen for i in range(2 * size)]
        for name in ATTENTION:
            assert units[f"model.layers.{block}.self_attn.{name}"] == (
                keys if name in ("k_proj", "v_proj") else queries
            )


def test_whole_matrices_are_all_or_nothing(base_of):
    one = StructureConfig(["q_proj", "v_proj"], "matrix", 0.5)
    units = units_by_name(get_peft_model(base_of(), structured([one])))
    counts = [len(units[f"model.layers.{i}.self_attn.{n}"]) for i in range(2) for n in ("q_proj", "v_proj")]
    assert sorted(counts) == [0, 0, HIDDEN // 2, HIDDEN]
    assert bool(counts[0]) == bool(counts[1])


def test_other_modules_take_the_density_beside_structures(base_of):
    config = structured([StructureConfig(FFN, density=0.1)], density=0.25, target_modules=[*FFN, "q_proj"])
    units = units_by_name(get_peft_model(base_of(), config))
    assert len(units["model.layers.0.self_attn.q_proj"]) == HIDDEN // 4


def test_a_config_that_was_used_before_gives_the_same_support_to_another_copy(base_of):
    config = structured([StructureConfig(FFN, density=0.1)])
    model = get_peft_model(base_of(), config)
    first, config = units_by_name(model), model.peft_config["default"]
    assert sum(tiny.units_of_sizes(config).values()) == 3 * int(0.1 * 2 * INNER)
    assert units_by_name(get_peft_model(base_of(), config)) == first


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_structures_survive_files_compaction_and_training_again(base_of, tmp_path, base):
    one = StructureConfig(ATTENTION, "head", 0.5)
    model = get_peft_model(base_of(base), structured([one], criterion="magnitude"))
    fill(model)
    layer = next(layer for layer in adapter_layers(model) if layer.holds("default"))
    layer.write_support("default", layer.units("default")[:-1])
    model.compact()
    before = logits(model)
    model.save_pretrained(tmp_path)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(base_of(base), tmp_path, is_trainable=trainable)
        assert torch.equal(logits(loaded), before)
        assert units_by_name(loaded) == units_by_name(model)
    loaded = PeftModel.from_pretrained(base_of(base), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), before)


def test_structures_leave_as_a_plain_lora(base_of, tmp_path):
    model = get_peft_model(base_of(), structured([StructureConfig(FFN, density=0.1)]))
    fill(model)
    before = logits(model)
    export = export_lora(model, tmp_path / "lora")
    assert set(export.errors.values()) == {0.0}
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base_of(), tmp_path / "lora")), before)


@pytest.mark.parametrize(
    ("structures", "options", "message"),
    [
        ([StructureConfig(["gate_proj"])], {"granularity": "entry"}, r"gate_proj'.*granularity is\s+'entry'"),
        ([StructureConfig(["q_proj", "k_proj"])], {}, r"different sizes"),
        ([StructureConfig(["gate_proj"], "head")], {}, r"has 128 rows, not the 4 heads or 2 key/value heads"),
        ([StructureConfig(["w1"])], {"target_modules": ["q_proj"]}, r"target_modules has none of them"),
        ([StructureConfig(["q_proj"], density=1e-4)], {}, r"density=0.0001 leaves no"),
    ],
)
def test_structures_that_do_not_fit_are_refused_by_name(base_of, structures, options, message):
    base = base_of()
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, structured(structures, **options))
    assert not adapter_layers(base)


def test_structures_are_checked_when_they_are_written():
    with pytest.raises(ValueError, match=r"StructureConfig.unit='row' is out of range"):
        StructureConfig(["q_proj"], "row")
    with pytest.raises(ValueError, match=r"structures name \['q_proj'\] more than once"):
        structured([StructureConfig(["q_proj"]), StructureConfig(["q_proj", "v_proj"])])
    with pytest.raises(ValueError, match=r"structures have densities and a scope of their own"):
        structured([StructureConfig(["q_proj"])], budget=ErdosRenyi(0.1))
    with pytest.raises(ValueError, match=r"structures has no option \['share'\]"):
        make_config(structures=[{"modules": ["q_proj"], "share": 1}])


def test_fused_projections_are_refused_as_heads(base_of):
    one = StructureConfig(["c_attn"], "head", 0.5)
    with pytest.raises(ValueError, match="Fused projections cannot be cut into heads"):
        get_peft_model(base_of("conv1d"), structured([one]))


def test_units_per_module_is_the_number_in_every_module(base_of, tmp_path):
    model = get_peft_model(base_of(), make_config("sparse-entry", budget=UnitsPerModule(13)))
    assert {len(units) for units in units_by_name(model).values()} == {13}
    fill(model)
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base_of(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match=r"UnitsPerModule.units=70 is more than the 64 row units of '.*q_proj'"):
        get_peft_model(base_of(), make_config("sparse-row", budget=UnitsPerModule(70)))
