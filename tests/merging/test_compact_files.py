"""ComPEFT and BitDelta: the codes, the numbers that are worked out, the files, and what a damaged file does."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worked_example import T1

from hf_sparse_peft.merging import (
    binarise_adapter,
    compress_adapter,
    decompress_adapter,
    distil_scales,
    magnitude_groups,
    restore_adapter,
)
from hf_sparse_peft.merging.golomb import decode_positions, encode_positions, expected_bits
from hf_sparse_peft.merging.ternary import Ternary, _Coded, _ternary
from hf_sparse_peft.utils.checksums import save_checked

# The codes


@pytest.mark.parametrize(
    ("size", "positions"),
    [(1, []), (1, [0]), (8, []), (8, [0]), (8, [7]), (8, list(range(8))), (9, [0, 8]), (2**40, [5, 2**39, 2**40 - 1])],
)
def test_positions_come_back_at_every_edge(size, positions):
    wanted = torch.tensor(positions, dtype=torch.int64)
    unary, low = encode_positions(wanted, size)
    assert torch.equal(decode_positions(unary, low, len(positions), size, "w"), wanted)


@pytest.mark.parametrize("density", [0.001, 0.05, 0.1, 0.2, 0.5, 0.9])
def test_random_positions_come_back_at_the_expected_number_of_bits(density):
    size = 100_000
    mask = torch.rand(size, generator=torch.Generator().manual_seed(int(1000 * density))) < density
    positions = mask.nonzero().squeeze(1)
    unary, low = encode_positions(positions, size)
    assert torch.equal(decode_positions(unary, low, positions.numel(), size, "w"), positions)
    bits = 8 * (unary.numel() + low.numel()) / positions.numel()
    assert bits == pytest.approx(expected_bits(positions.numel() / size), rel=0.02 if density > 0.01 else 0.05)


def test_expected_bits_are_those_of_the_worked_table():
    for density, bits in ((0.05, 0.339), (0.1, 0.576), (0.2, 0.939)):
        assert density * (expected_bits(density) + 1) == pytest.approx(bits, abs=0.0006)  # + 1: the sign
        entropy = -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)
        assert density * (expected_bits(density) + 1) >= entropy


def test_codes_of_other_lengths_counts_or_ranges_are_refused():
    unary, low = encode_positions(torch.tensor([3, 40, 99]), 100)
    for changed in (
        (unary, low, 2, 100), (unary, low, 4, 100), (unary, low, 3, 99), (unary[:-1], low, 3, 100),
        (torch.cat([unary, unary.new_zeros(1)]), low, 3, 100), (unary, torch.cat([low, low[:1]]), 3, 100),
        (unary.long(), low, 3, 100), (unary, low, 101, 100),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="'w'"):
            decode_positions(*changed, "w")


# Worked numbers


def one_weight(row=T1):
    at = torch.tensor([place for place, one in enumerate(row) if one is not None])
    values = torch.tensor([one for one in row if one is not None])
    return _Coded("w", "entries", values, at, len(row))


def test_ternary_of_the_worked_row_by_the_paper_and_by_the_code():
    scale, (kept,) = _ternary([one_weight()], Ternary(density=0.25, missing="zero", count="code"))
    assert scale == pytest.approx(0.4533605, abs=1e-6)
    assert one_weight().positions[kept].tolist() == [0, 3, 4]
    _, (kept,) = _ternary([one_weight()], Ternary(density=0.25, missing="zero"))
    assert one_weight().positions[kept].tolist() == [0, 4]
    values = torch.tensor([0.9, -0.1, 0.4, -0.6, 0.2, -0.3])
    assert _ternary([one_weight()], Ternary(alpha=2.0))[0] == pytest.approx(2 * float(values.std()), rel=1e-6)
    stc = Ternary(density=0.25, missing="zero", count="code", scale="mean")
    assert _ternary([one_weight()], stc)[0] == pytest.approx(0.6333333, abs=1e-6)


def test_binary_of_the_worked_row_on_its_support_and_with_zeros():
    stored = torch.tensor([0.9, -0.1, 0.4, -0.6, 0.2, -0.3])
    group, scales = magnitude_groups(stored, 1)
    assert scales.tolist() == pytest.approx([0.4166667], abs=1e-6)
    error = (stored - torch.where(stored >= 0, scales[group], -scales[group])).square().sum()
    assert float(error) == pytest.approx(0.4283333, abs=1e-6)
    assert float(error) == pytest.approx(float(stored.square().sum() - 6 * scales[0] ** 2), abs=1e-6)
    dense = torch.tensor([0.0 if one is None else one for one in T1])
    group, scales = magnitude_groups(dense, 1)
    assert scales.tolist() == pytest.approx([0.3125])
    error = (dense - torch.where(dense >= 0, scales[group], -scales[group])).square().sum()
    assert float(error) == pytest.approx(0.68875, abs=1e-6)
    group, scales = magnitude_groups(stored, 2)
    restored = torch.where(stored >= 0, scales[group], -scales[group])
    torch.testing.assert_close(
        restored, torch.tensor([0.633333, -0.2, 0.633333, -0.633333, 0.2, -0.2]), atol=1e-6, rtol=0
    )
    assert float((stored - restored).square().sum()) == pytest.approx(0.1466667, abs=1e-6)


def test_more_groups_never_cost_more_and_as_many_as_entries_are_exact():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    errors = []
    for groups in (1, 2, 4, 8, 16, 32, 64):
        group, scales = magnitude_groups(values, groups)
        errors.append(float((values.abs() - scales[group]).square().sum()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(0.0, abs=1e-10)


# Files


def ternary_reference(tensors, density, alpha):
    """All tensors of an adapter as one vector, sorted by name: top-k, one standard deviation, signs."""
    flat = torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])
    k = int(density * flat.numel())
    least = flat.abs().sort(descending=True).values[k - 1]
    scale = alpha * flat.std()
    return {name: torch.where(t.double().abs() >= least, t.double().sign() * scale, 0.0) for name, t in tensors.items()}


def test_a_compressed_adapter_of_entries_holds_the_ternary_values_at_their_places(adapter, updates, tmp_path):
    folder = adapter("entries")
    report = compress_adapter(folder, tmp_path / "a.compeft", density=0.3, alpha=1.5, show_progress=False)
    decompress_adapter(tmp_path / "a.compeft", tmp_path / "back", show_progress=False)
    before, after = updates(folder), updates(tmp_path / "back")
    held = {name: update[update != 0] for name, update in before.items()}
    expected = ternary_reference(held, 0.3, 1.5)
    for name, update in before.items():
        wanted = torch.zeros_like(update)
        wanted[update != 0] = expected[name]
        torch.testing.assert_close(after.get(name, torch.zeros_like(update)), wanted, atol=1e-5, rtol=1e-4)
        assert report.errors[name] == pytest.approx(float((update - wanted).norm() / update.norm()), rel=1e-3)
    assert report.kept == sum(int((one != 0).sum()) for one in expected.values())
    assert report.file_bytes == (tmp_path / "a.compeft").stat().st_size < report.adapter_bytes


@pytest.mark.parametrize("kind", ["factors", "both", "rs-lora"])
@pytest.mark.parametrize("group", ["global", "factor"])
def test_factors_are_ternary_matrices_whose_product_is_the_update(kind, group, adapter, updates, tmp_path):
    compress_adapter(adapter(kind), tmp_path / "a.compeft", density=0.4, group=group, show_progress=False)
    report = decompress_adapter(tmp_path / "a.compeft", tmp_path / "back", show_progress=False)
    from hf_sparse_peft.merging import read_source
    from hf_sparse_peft.tuners.shared.pieces import LowRank

    source, before = read_source(tmp_path / "back"), read_source(adapter(kind))
    assert report.exact
    for name in source.shapes:
        for piece in source.pieces(name):
            for part in (piece.A, piece.B) if isinstance(piece, LowRank) else (piece.values,):
                assert len(part[part != 0].abs().round(decimals=5).unique()) <= 1
        for piece in before.pieces(name):
            if isinstance(piece, LowRank):
                (other,) = [one for one in source.pieces(name) if isinstance(one, LowRank)]
                signs = (other.B.sign() @ other.A.sign()).abs()
                assert float(signs.max()) > 0


def test_heads_travel_as_they_are_and_codecs_read_their_own_files(adapter, tmp_path):
    key = "base_model.model.lm_head.weight"
    for write, read in ((compress_adapter, decompress_adapter), (binarise_adapter, restore_adapter)):
        file, out = tmp_path / f"{write.__name__}.st", tmp_path / write.__name__
        write(adapter("heads"), file, show_progress=False)
        read(file, out, show_progress=False)
        kept, before = (load_file(folder / "adapter_model.safetensors")[key] for folder in (out, adapter("heads")))
        assert torch.equal(kept, before)
    with pytest.raises(ValueError, match="bitdelta file"):
        restore_adapter(tmp_path / "compress_adapter.st", tmp_path / "x", show_progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("groups", [1, 4])
def test_a_binary_adapter_keeps_supports_exactly_and_dense_signs_in_a_dense_model(
    groups, base, adapter, updates, tmp_path
):
    from transformers import AutoModelForCausalLM

    for kind in ("entries", "lora"):
        report = binarise_adapter(adapter(kind), tmp_path / kind, groups=groups, show_progress=False)
        before = updates(adapter(kind))
        if kind == "entries":
            restore_adapter(tmp_path / kind, tmp_path / "back", show_progress=False)
            after = updates(tmp_path / "back")
        else:
            done = restore_adapter(tmp_path / kind, tmp_path / "dense", form="dense", show_progress=False)
            assert done.exact
            fitted = restore_adapter(tmp_path / kind, tmp_path / "fitted", rank=2, show_progress=False)
            assert min(fitted.errors.values()) > 0.1
            own, new = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (base, tmp_path / "dense"))
            after = {name: new[f"{name}.weight"].double() - own[f"{name}.weight"].double() for name in before}
            assert 1 <= report.bits < 1.2 + math.log2(groups)
        for name, update in before.items():
            held = update[update != 0]
            group, scales = magnitude_groups(held, groups)
            wanted = torch.zeros_like(update)
            wanted[update != 0] = held.sign() * scales[group].double()
            torch.testing.assert_close(after[name], wanted, atol=1e-5, rtol=1e-3)
            assert report.errors[name] == pytest.approx(float((update - wanted).norm() / update.norm()), rel=1e-3)


def test_distilled_magnitudes_lower_the_loss_of_the_logits_and_leave_the_base_alone(base, adapter, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    binarise_adapter(adapter("entries"), tmp_path / "f", show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    teacher = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter("entries")))
    before = {name: p.clone() for name, p in model.named_parameters()}
    batches = [{"input_ids": torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))}]
    losses = distil_scales(model, teacher, tmp_path / "f", batches, steps=30, learning_rate=1e-2, show_progress=False)
    again = distil_scales(model, teacher, tmp_path / "f", batches, steps=1, learning_rate=1e-9, show_progress=False)
    assert again[0] < 0.97 * losses[0]
    assert {name for name, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    restore_adapter(tmp_path / "f", tmp_path / "back", show_progress=False)
    other = tiny.llama(layers=1, hidden=64)
    with pytest.raises(ValueError, match="of this model"):
        distil_scales(other, teacher, tmp_path / "f", batches, show_progress=False)
    assert all(p.requires_grad for p in other.parameters())
    assert not any("parametrizations" in name for name, _ in other.named_parameters())


def damaged(file: Path, out: Path, change):
    """The file with other tensors or another description, and checksums that fit."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        tensors, header = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
    modules = json.loads(header["modules"])
    change(tensors, modules)
    save_checked(tensors, out, {**header, "modules": json.dumps(modules)})
    return out


CHANGES = {
    "a count": lambda t, m: next(iter(m.values()))["entries"].update(count=3),
    "a size": lambda t, m: next(iter(m.values()))["entries"].update(size=2**40),
    "a shape": lambda t, m: next(iter(m.values())).update(shape=[8, 8]),
    "no shape": lambda t, m: next(iter(m.values())).pop("shape"),
    "a scale": lambda t, m: t.update({key: torch.tensor([torch.nan]) for key in t if key.endswith(":scale")}),
    "a dtype": lambda t, m: t.update({key: t[key].int() for key in t if key.endswith(":signs")}),
    "a tensor": lambda t, m: t.pop(next(key for key in t if key.endswith(":gaps"))),
    "a factor": lambda t, m: next(iter(m.values())).update(A={"count": 0, "size": 0}),
}


def test_factors_that_a_forged_scaling_makes_infinite_are_refused(adapter, tmp_path):
    compress_adapter(adapter("both"), tmp_path / "f", show_progress=False)
    damaged(tmp_path / "f", tmp_path / "g", lambda t, m: [one.update(scaling=1e300) for one in m.values()])
    with pytest.raises(ValueError, match=r"damaged.*scaling=1e\+300"):
        decompress_adapter(tmp_path / "g", tmp_path / "x", show_progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("what", CHANGES)
def test_a_damaged_file_is_refused_and_nothing_is_written(what, adapter, tmp_path):
    compress_adapter(adapter("entries"), tmp_path / "f", show_progress=False)
    damaged(tmp_path / "f", tmp_path / "g", CHANGES[what])
    with pytest.raises(ValueError, match="damaged"):
        decompress_adapter(tmp_path / "g", tmp_path / "x", show_progress=False)
    assert not (tmp_path / "x").exists()


def test_files_that_are_cut_or_flipped_anywhere_are_refused(adapter, tmp_path):
    for write, read in ((compress_adapter, decompress_adapter), (binarise_adapter, restore_adapter)):
        write(adapter("both" if write is compress_adapter else "entries"), tmp_path / "f", show_progress=False)
        whole = (tmp_path / "f").read_bytes()
        draw = torch.Generator().manual_seed(0)
        for at in torch.randint(0, len(whole), (60,), generator=draw).tolist():
            flipped = bytearray(whole)
            flipped[at] ^= 1 << int(torch.randint(0, 8, (), generator=draw))
            for content in (bytes(flipped), whole[:at]):
                (tmp_path / "g").write_bytes(content)
                with pytest.raises(ValueError, match=r"g'"):
                    read(tmp_path / "g", tmp_path / "x", show_progress=False)
                assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"density": 1.0}, "density"), ({"alpha": 0}, "alpha"), ({"group": "all"}, "group"), ({"count": "k"}, "count")],
)
def test_options_out_of_range_are_refused_by_name(options, said, adapter, tmp_path):
    with pytest.raises(ValueError, match=said):
        compress_adapter(adapter("entries"), tmp_path / "f", show_progress=False, **options)
    with pytest.raises(ValueError, match="groups"):
        binarise_adapter(adapter("entries"), tmp_path / "f", groups=3, show_progress=False)
    assert not (tmp_path / "f").exists()


def test_diff_reads_small_files_and_tells_where_signs_are_opposite(adapter, updates, tmp_path, capsys):
    from hf_sparse_peft import cli

    folder = adapter("entries")
    compress_adapter(folder, tmp_path / "a.compeft", density=0.4, show_progress=False)
    binarise_adapter(folder, tmp_path / "a.bitdelta", show_progress=False)
    capsys.readouterr()
    for file in ("a.compeft", "a.bitdelta"):
        assert cli.main(["diff", str(folder), str(tmp_path / file), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert all(module["opposite"] == 0.0 for module in found["modules"].values())
        assert not found["equal"]
    assert cli.main(["diff", str(adapter("rows")), str(adapter("rows", 1)), "--json"]) == 0
    modules = json.loads(capsys.readouterr().out)["modules"]
    first, second = updates(adapter("rows")), updates(adapter("rows", 1))
    for name, module in modules.items():
        both = (first[name] != 0) & (second[name] != 0)
        share = float(((first[name] * second[name])[both] < 0).double().mean()) if both.any() else None
        assert module["opposite"] == (None if share is None else pytest.approx(share, abs=1e-6))
    binarise_adapter(adapter("lora"), tmp_path / "dense", show_progress=False)
    capsys.readouterr()
    assert cli.main(["diff", str(folder), str(tmp_path / "dense")]) == 1
    assert "signs of all entries" in capsys.readouterr().err
    assert cli.main(["diff", str(folder), str(folder / "adapter_model.safetensors")]) == 1
    assert "neither an adapter folder" in capsys.readouterr().err
