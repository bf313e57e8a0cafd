import json
import struct

import pytest
import torch
from hub_toolbox import adapted, tiny_base
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from hf_sparse_peft import Allocate, AverageRank, ErdosRenyi, Numbers, Prune, Regrow, hub
from hf_sparse_peft.sparsity import UnitGrid, encode_support
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.checksums import save_checked

FILE = "adapter_model.safetensors"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def hybrid_folder(tmp_path_factory):
    """A folder with an entry support and a gated low-rank half in each module; tests that damage it copy it first."""
    model = adapted(r=3, density=0.02, schedule=[Allocate(budget=AverageRank(2))], modules_to_save=["lm_head"])
    model.base_model.compact("default")
    return hub.save_adapter(model, tmp_path_factory.mktemp("hybrid") / "adapter")


@pytest.fixture
def damaged(hybrid_folder, tmp_path):
    """`damaged(change)`: a copy of the folder whose tensors (or config, by `config=`) went through `change`."""

    def make(change=None, config=None):
        place = tmp_path / "damaged"
        place.mkdir()
        tensors = load_file(hybrid_folder / FILE)
        if change is not None:
            change(tensors)
        save_checked(tensors, place / FILE, metadata={"format": "pt"})
        options = json.loads((hybrid_folder / "adapter_config.json").read_text())
        options.update(config or {})
        (place / "adapter_config.json").write_text(json.dumps(options))
        return place

    return make


@pytest.mark.parametrize("granularity", ["entry", "block", "row", "column"])
def test_report_says_what_the_layers_hold(tmp_path, granularity):
    model = adapted(r=2, granularity=granularity)
    report = hub.check_adapter(hub.save_adapter(model, tmp_path / "a"))
    layers = {layer.module_name: layer for layer in adapter_layers(model)}
    assert {m.name for m in report.modules} == set(layers)
    for module in report.modules:
        layer = layers[module.name]
        units = layer.units("default").numel()
        living = units * layer.sparse_lora_grid["default"].unit_numel
        assert (module.rows, module.cols) == (layer.out_features, layer.in_features)
        space = module.space("support")
        assert (space["unit"], space["alive"], space["capacity"]) == (granularity, units, units)
        assert module.density == pytest.approx(living / (module.rows * module.cols))
        assert (module.space("rank")["capacity"], module.space("rank")["alive"]) == (2, 2)
        support = layer.sparse_lora_support["default"].numel()
        assert module.bytes == support + 4 * living + 4 * 2 * (module.rows + module.cols)
        assert space["bytes"] == support + 4 * living
    assert report.file_bytes == (tmp_path / "a" / FILE).stat().st_size
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = str(report.table()).splitlines()
    assert len(lines) == 2 + len(layers)
    assert lines[-1].startswith("6 modules")


def test_low_rank_only_adapter_passes(tmp_path):
    report = hub.check_adapter(hub.save_adapter(adapted(r=2, density=0.0), tmp_path / "a"))
    assert all(m.space("support") is None and m.space("rank")["capacity"] == 2 for m in report.modules)
    assert report.density == 0


def test_adapter_saved_amid_its_schedules_passes(tmp_path):
    model = adapted(r=3, schedule=[Prune(), Regrow(), Allocate(budget=AverageRank(2))])
    layer = adapter_layers(model)[0]
    layer.write_support("default", layer.units("default")[:-5])
    layer.sparse_lora_rank_mask["default"][0] = 0
    report = hub.check_adapter(hub.save_adapter(model, tmp_path / "a"))
    module = next(m for m in report.modules if m.name == layer.module_name)
    support, rank = module.space("support"), module.space("rank")
    assert support["capacity"] - support["alive"] == 5
    assert (rank["capacity"], rank["alive"]) == (3, 2)
    assert report.other_bytes > 0


def test_compacted_bf16_adapter_passes(tmp_path):
    model = adapted(r=3, schedule=[Allocate(budget=AverageRank(2))])
    for layer in adapter_layers(model)[::2]:
        layer.write_support("default", layer.units("default")[:-5])
        layer.sparse_lora_rank_mask["default"][0] = 0
    model.base_model.compact("default", values_dtype="bfloat16")
    report = hub.check_adapter(hub.save_adapter(model, tmp_path / "a"))
    assert {m.space("rank")["capacity"] for m in report.modules} == {2, 3}
    assert all(space["capacity"] == space["alive"] for m in report.modules for space in m.spaces)


@pytest.mark.parametrize("options", [{"budget": Numbers(500)}, {"budget": ErdosRenyi(0.02)}])
def test_supports_sized_over_the_model_pass(tmp_path, options):
    hub.check_adapter(hub.save_adapter(adapted(**options), tmp_path / "a"))


def test_every_cut_of_the_file_is_named(hybrid_folder, tmp_path):
    whole = (hybrid_folder / FILE).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    place = tmp_path / "cut"
    place.mkdir()
    (place / "adapter_config.json").write_bytes((hybrid_folder / "adapter_config.json").read_bytes())
    for kept in (0, 5, 8, header // 2, header, header + 1, len(whole) // 2, len(whole) - 1):
        (place / FILE).write_bytes(whole[:kept])
        with pytest.raises(ValueError, match="is truncated") as error:
            hub.check_adapter(place)
        assert str(place / FILE) in str(error.value)
        if kept >= header:
            assert "'base_model.model." in str(error.value)
    (place / FILE).write_bytes(whole + b"x")
    with pytest.raises(ValueError, match=r"bytes where its header accounts for"):
        hub.check_adapter(place)
    (place / FILE).write_bytes(struct.pack("<Q", 20) + b"y" * 40)
    with pytest.raises(ValueError, match="no safetensors header"):
        hub.check_adapter(place)


def _flip(tensors, key, at):
    tensors[key][at] ^= 1


def _other_base(tensors):
    count = tensors[f"{Q0}.sparse_lora_values"].shape[0]
    tensors[f"{Q0}.sparse_lora_support"] = encode_support(torch.arange(count), UnitGrid(32, 128), count)


@pytest.mark.parametrize("bit_at", [24, 40, -1])
def test_flipped_support_bits_are_found(damaged, bit_at):
    place = damaged(lambda t: _flip(t, f"{Q0}.sparse_lora_support", bit_at))
    with pytest.raises(ValueError, match=rf"{Q0}\.sparse_lora_support.*(checksum|damaged)"):
        hub.check_adapter(place)


@pytest.mark.parametrize(
    ("at", "says"),
    [(0, "does not begin"), (2, "format version"), (3, "granularity"), (8, "checksum|count|says it holds|capacity")],
)
def test_damaged_support_headers_are_found(damaged, at, says):
    place = damaged(lambda t: _flip(t, f"{Q0}.sparse_lora_support", at))
    with pytest.raises(ValueError, match=rf"{Q0}\.sparse_lora_support.*({says})"):
        hub.check_adapter(place)


@pytest.mark.parametrize("byte", range(24))
def test_no_header_byte_can_change_unnoticed(damaged, byte):
    with pytest.raises(ValueError, match="q_proj"):
        hub.check_adapter(damaged(lambda t: _flip(t, f"{Q0}.sparse_lora_support", byte)))


def test_blank_support_is_found(damaged):
    place = damaged(lambda t: t[f"{Q0}.sparse_lora_support"].zero_())
    with pytest.raises(ValueError, match=rf"{Q0}\.sparse_lora_support.*not yet written"):
        hub.check_adapter(place)


def test_support_of_another_weight_is_found(damaged):
    with pytest.raises(ValueError, match=rf"{Q0}.*(64x64|32x128)"):
        hub.check_adapter(damaged(_other_base))


@pytest.mark.parametrize("kind", ["values", "A", "B", "gate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found(damaged, kind, value):
    key = f"{Q0}.sparse_lora_{kind}"
    with pytest.raises(ValueError, match=rf"'{key}'.*not finite"):
        hub.check_adapter(damaged(lambda t: t[key].view(-1).__setitem__(0, value)))


@pytest.mark.parametrize("kind", ["values", "support", "A", "B", "gate", "rank_mask"])
def test_missing_partner_is_named(damaged, kind):
    key = f"{Q0}.sparse_lora_{kind}"
    with pytest.raises(ValueError, match=rf"'{key}' is missing"):
        hub.check_adapter(damaged(lambda t: t.pop(key)))


@pytest.mark.parametrize("half", [("values", "support"), ("A", "B", "gate", "rank_mask")])
def test_missing_half_is_named(damaged, half):
    with pytest.raises(ValueError, match=rf"'{Q0}\.sparse_lora_{half[0]}' is missing"):
        hub.check_adapter(damaged(lambda t: [t.pop(f"{Q0}.sparse_lora_{kind}") for kind in half]))


def test_missing_module_is_named(damaged):
    with pytest.raises(ValueError, match=rf"'{Q0}\.sparse_lora_values' is missing.*sizes"):
        hub.check_adapter(damaged(lambda t: [t.pop(k) for k in list(t) if k.startswith(Q0)]))


@pytest.mark.parametrize("kind", ["values", "A", "B", "gate", "rank_mask"])
def test_wrong_shapes_are_named(damaged, kind):
    key = f"{Q0}.sparse_lora_{kind}"
    with pytest.raises(ValueError, match=rf"{Q0}\.sparse_lora_"):
        hub.check_adapter(damaged(lambda t: t.update({key: t[key][:-1].clone()})))


def test_mask_of_other_numbers_is_found(damaged):
    key = f"{Q0}.sparse_lora_rank_mask"
    with pytest.raises(ValueError, match=rf"'{key}' must be uint8 of 0 and 1"):
        hub.check_adapter(damaged(lambda t: t[key].fill_(2)))


def test_low_rank_half_of_another_weight_is_found(damaged):
    key = f"{Q0}.sparse_lora_A"
    with pytest.raises(ValueError, match=rf"'{key}'.*64x63.*64x64"):
        hub.check_adapter(damaged(lambda t: t.update({key: t[key][:, :-1].clone()})))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"granularity": "row", "sizes": {}}, "granularity 'entry'"),
        ({"density": 0.03, "sizes": {}}, r"room for \d+ units.*makes it \d+"),
        ({"r": 5, "sizes": {}}, r"sparse_lora_A' .* has shape \(3, 96\), and its config makes it \(5, 96\)"),
        ({"density": 7}, r"density=7 is out of range: it takes a number in \[0, 1\]"),
        ({"peft_type": "LORA"}, "peft_type='LORA'"),
    ],
)
def test_config_of_another_adapter_is_found(damaged, config, says):
    with pytest.raises(ValueError, match=says):
        hub.check_adapter(damaged(config=config))


def test_tensors_of_a_later_release_are_named(damaged):
    with pytest.raises(ValueError, match=rf"'{Q0}\.sparse_lora_phase' .*Update hf-sparse-peft"):
        hub.check_adapter(damaged(lambda t: t.update({f"{Q0}.sparse_lora_phase": torch.ones(1)})))


def test_folders_that_are_no_adapter_are_refused(tmp_path, hybrid_folder):
    with pytest.raises(ValueError, match="is no folder"):
        hub.check_adapter(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        hub.check_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes((hybrid_folder / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_model.bin").write_text("pickle")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors.*never read"):
        hub.check_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        hub.check_adapter(tmp_path)
    get_peft_model(tiny_base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="peft_type='LORA'"):
        hub.check_adapter(tmp_path / "lora")
