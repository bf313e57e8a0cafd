"""prune_model with patterns of whole units: what goes, what the model computes then, resuming, refusals."""

import copy
import re

import pytest
import torch
from test_structure import MODELS, build, mixtral
from tiny import llama

from hf_sparse_peft.pruning import (
    CFSP,
    NM,
    OBA,
    Blocks,
    Heads,
    HessianSaliency,
    LoRAPrune,
    Rows,
    prune_model,
    structures_of,
)
from hf_sparse_peft.pruning.removal import structured_walk
from hf_sparse_peft.pruning.units.unit_scores import kept_over_all, weight_of
from hf_sparse_peft.sparsity import unpack_bits
from hf_sparse_peft.utils.checksums import save_checked

BOTH = [Heads(), Rows()]


def batches(padded=False, labels=None):
    generator = torch.Generator().manual_seed(7)
    for size in (2, 3):
        mask = torch.ones(size, 10, dtype=torch.long)
        if padded:
            mask[0, :4] = 0
        batch = {"input_ids": torch.randint(3, 64, (size, 10), generator=generator), "attention_mask": mask}
        yield batch if labels is None else {**batch, "labels": labels(batch["input_ids"])}


def prune(model, data=None, **options):
    return prune_model(model, list(batches()) if data is None else data, show_progress=False, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def silenced(model, kept):
    """Hooks that zero what removed heads and channels bring to the output: the model as pruning says."""
    for one in structures_of(model):
        gone = {kind: kept.blocks[one.name].removed(kind) for kind in ("heads", "channels")}
        per = one.heads // one.kv_heads * one.head_dim
        for layer, lines in (
            (one.output, [unit * per + at for unit in gone["heads"].tolist() for at in range(per)]),
            (one.down, gone["channels"].tolist()),
        ):
            model.get_submodule(layer).register_forward_pre_hook(
                lambda _, args, lines=lines: (args[0].index_fill(-1, torch.tensor(lines, dtype=torch.long), 0),)
            )
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_the_model_computes_what_it_would_without_those_heads_and_channels(kind):
    model = build(kind)
    expected, before = copy.deepcopy(model), weights(model)
    report = prune(model, method="magnitude", pattern=BOTH, sparsity=0.5)
    ids = next(batches())["input_ids"]
    assert torch.allclose(model(ids).logits, silenced(expected, report.kept)(ids).logits, atol=1e-5)
    pruned = {member.module for one in structures_of(model) for which in ("heads", "channels")
              for member in one.members(which)}  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in pruned:
            assert torch.equal(parameter, before[name])
    for one in structures_of(model):
        kept = report.kept.blocks[one.name]
        assert (len(kept.heads), len(kept.channels)) == (one.kv_heads // 2, 24)
    for name, bits in report.masks.items():
        weight = weight_of(model, name)
        gone = unpack_bits(bits, report.entries[name]).view(weight.shape)
        assert torch.equal(weight == 0, gone)
        assert torch.equal(weight[~gone], weight_of(expected, name)[~gone])
        bias = model.get_submodule(name).bias
        if bias is not None:
            assert torch.equal(bias == 0, gone.all(1))
    assert report.sparsity == 0.5
    assert "2 of 4" in str(report.table()) or "1 of 2" in str(report.table())
    assert "24 of 48" in str(report.table())


def test_group_norms_of_weights_and_of_wanda_choose_by_the_equation_in_every_block():
    """GQA by hand: unit u is key and value head u and query heads 2u, 2u + 1; each block sees pruned ones before it."""
    for method in ("magnitude", "wanda"):
        data, model = list(batches(padded=True)), llama().eval()
        reference = copy.deepcopy(model).double()
        report = prune(model, data, method=method, pattern=BOTH, sparsity=0.5)
        for number, block in enumerate(reference.model.layers):
            attention, mlp = block.self_attn, block.mlp
            layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                      mlp.gate_proj, mlp.up_proj, mlp.down_proj]  # fmt: skip
            seen = {layer: [] for layer in layers}
            hooks = [m.register_forward_pre_hook(lambda _, x, at=seen[m]: at.append(x[0].detach())) for m in layers]
            for batch in data:
                reference(**batch)
            for hook in hooks:
                hook.remove()
            score = {}
            for layer in layers:
                tokens = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen[layer], data, strict=True)])
                scale = tokens.square().sum(0) if method == "wanda" else torch.ones(tokens.shape[1]).double()
                score[layer] = layer.weight.detach().square() * scale
            q, k, v, o, gate, up, down = (score[layer] for layer in layers)
            heads = torch.stack([
                q[16 * u : 16 * u + 16].sum() + k[8 * u : 8 * u + 8].sum() + v[8 * u : 8 * u + 8].sum()
                + o[:, 16 * u : 16 * u + 16].sum() for u in range(2)
            ])  # fmt: skip
            channels = gate.sum(1) + up.sum(1) + down.sum(0)
            kept = report.kept.blocks[f"model.layers.{number}"]
            assert kept.heads.tolist() == [int(heads.argmax())]
            assert kept.channels.tolist() == sorted(channels.argsort()[32:].tolist())
            with torch.no_grad():
                gone = 1 - int(heads.argmax())
                attention.o_proj.weight[:, 16 * gone : 16 * gone + 16] = 0
                mlp.down_proj.weight[:, channels.argsort()[:32]] = 0


def test_whole_rows_and_tiles_of_a_matrix_go_by_their_norm():
    model = llama()
    weight = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    rows = copy.deepcopy(model)
    assert prune(rows, method="magnitude", pattern=Rows(coupled=False), sparsity=0.25).sparsity == 0.25
    gone = (rows.model.layers[0].mlp.up_proj.weight == 0).all(1)
    assert gone.nonzero().flatten().tolist() == sorted(weight.norm(dim=1).argsort()[:16].tolist())
    report = prune(model, method="magnitude", pattern=Blocks(16, 8), sparsity=0.25)
    assert report.kept is None
    tiles = weight.view(4, 16, 4, 8).transpose(1, 2).flatten(2)
    left = model.model.layers[0].mlp.up_proj.weight.view(4, 16, 4, 8).transpose(1, 2).flatten(2)
    lowest = set(tiles.norm(dim=2).flatten().argsort()[:4].tolist())
    assert {at for at in range(16) if not left.view(16, -1)[at].any()} == lowest
    assert (left != 0).sum() == 12 * 128


class Killed(BaseException):
    pass


METHODS = [
    "wanda",
    CFSP(),
    LoRAPrune(last=0),
    *(pytest.param(method, marks=pytest.mark.slow) for method in (HessianSaliency(), OBA())),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: getattr(m, "part_type", m))
def test_a_walk_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, method, monkeypatch):
    options = {"method": method, "pattern": Rows() if method == CFSP() else BOTH, "sparsity": 0.5}
    whole, model = llama(), llama()
    expected = prune(whole, **options)
    original = structured_walk._UnitWalk.write

    def dies(self, structure, *args):
        if structure.name.endswith(".1"):
            raise Killed
        original(self, structure, *args)

    monkeypatch.setattr(structured_walk._UnitWalk, "write", dies)
    with pytest.raises(Killed):
        prune(model, checkpoint=tmp_path, **options)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), llama().parameters(), strict=True))
    monkeypatch.undo()
    scored = []
    if not isinstance(method, str):
        monkeypatch.setattr(type(method), "score", lambda *args: scored.append(args))
    for resumed in (llama(), model, model):  # loaded anew, the very model that was left half-way, and a finished one
        report = prune(resumed, checkpoint=tmp_path, **options)
        assert all(torch.equal(resumed.get_parameter(name), p) for name, p in whole.named_parameters())
        assert report.zeros == expected.zeros
        assert report.kept.to_dict() == expected.kept.to_dict()
        assert report.importance == expected.importance
    assert not scored


def test_a_walk_killed_while_it_scores_begins_anew(tmp_path, monkeypatch):
    model, whole = llama(), llama()
    original = LoRAPrune._of_block

    def dies(*args):
        raise Killed

    monkeypatch.setattr(LoRAPrune, "_of_block", dies)
    before = weights(model)
    with pytest.raises(Killed):
        prune(model, method="lora_prune", checkpoint=tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    monkeypatch.setattr(LoRAPrune, "_of_block", original)
    assert prune(model, method="lora_prune", checkpoint=tmp_path).zeros == prune(whole, method="lora_prune").zeros


def test_a_checkpoint_of_other_weights_other_data_or_a_damaged_one_is_refused(tmp_path):
    options = {"method": "cfsp", "sparsity": 0.5, "checkpoint": tmp_path}
    prune(llama(), **options)
    other = llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    before = weights(other)
    with pytest.raises(ValueError, match=r"pruned from another weight of 'model\.layers\.0\.mlp\.up_proj'"):
        prune(other, **options)
    with pytest.raises(ValueError, match="other calibration data, or the same in another order"):
        prune(other, list(batches())[::-1], **options)
    with pytest.raises(ValueError, match="another pruning walk, with another sparsity"):
        prune(other, **{**options, "sparsity": 0.25})
    for wrong in ([0, 0], [64], [-1, 3]):
        save_checked({"channels": torch.tensor(wrong)}, tmp_path / "block_00000.safetensors")
        with pytest.raises(ValueError, match=r"block_00000\.safetensors' (does not fit|was made with other)"):
            prune(other, **options)
    (tmp_path / "block_00000.safetensors").unlink()
    with pytest.raises(ValueError, match="made with another weight of"):
        prune(other, **options)
    (tmp_path / "scores.safetensors").unlink()
    with pytest.raises(ValueError, match=r"finished blocks without 'scores\.safetensors'"):
        prune(other, **options)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_blocks_that_are_excluded_whole_are_left_alone_and_units_in_part_are_refused():
    model = llama(layers=3)
    before = weights(model)
    report = prune(model, method="wanda", pattern=BOTH, exclude_modules=r".*layers\.0\..*")
    assert list(report.kept.blocks) == ["model.layers.1", "model.layers.2"]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if ".0." in n)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.down_proj' is none of the targets"):
        prune(llama(), method="magnitude", pattern=Rows(), exclude_modules=["down_proj"])
    with pytest.raises(ValueError, match="hold the heads of no block"):
        prune(llama(), method="magnitude", pattern=Heads(), target_modules=["up_proj"])


def test_bf16_models_are_scored_and_stay_bf16():
    for method in ("lora_prune", "oba", "hessian_saliency", "cfsp", "wanda"):
        model = llama(dtype=torch.bfloat16)
        report = prune(model, method=method, pattern=Rows(), sparsity=0.5)
        assert 0.2 < report.sparsity <= 0.5, method
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_units_of_all_blocks_compete_for_a_share_of_the_entries_and_the_best_of_each_stays():
    scores = {
        "a": {"heads": torch.tensor([5.0, 0.1]), "channels": torch.tensor([1.0, 1.0, 3.0])},
        "b": {"heads": torch.tensor([0.2, 0.3]), "channels": torch.tensor([0.05, 0.06, 0.07])},
    }
    costs = {"a": {"heads": 10, "channels": 1}, "b": {"heads": 10, "channels": 1}}
    kept = kept_over_all(scores, costs, 24 / 46)
    assert {b: {k: v.tolist() for k, v in kinds.items()} for b, kinds in kept.items()} == {
        "a": {"heads": [0], "channels": [2]}, "b": {"heads": [1], "channels": [2]},
    }  # fmt: skip
    kept = kept_over_all(scores, costs, 12 / 46)  # .05, .06, .1 make 12
    assert kept["b"]["channels"].tolist() == [2]
    assert kept["a"]["heads"].tolist() == [0]
    assert kept["a"]["channels"].tolist() == [0, 1, 2]


def test_labels_are_made_for_models_that_predict_their_inputs_and_asked_for_elsewhere():
    masked = prune(llama(), list(batches(padded=True)), method="hessian_saliency")
    given = [{**b, "labels": b["input_ids"].masked_fill(b["attention_mask"] == 0, -100)} for b in batches(padded=True)]
    assert prune(llama(), given, method="hessian_saliency").kept.to_dict() == masked.kept.to_dict()
    bert = build("bert")
    with pytest.raises(
        ValueError, match="gradients of BertForSequenceClassification are those of a loss: put 'labels'"
    ):
        prune(bert, method="oba")
    assert prune(bert, list(batches(labels=lambda ids: ids[:, 0] % 2)), method="oba").sparsity == 0.5
    with pytest.raises(ValueError, match=r"The loss of batch 0 is nan.*labels are not all masked"):
        prune(llama(), list(batches(labels=lambda ids: torch.full_like(ids, -100))), method="lora_prune")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (llama, {"pattern": [Heads(), Heads()]}, "several are units of different kinds"),
        (llama, {"pattern": [Heads(), NM()]}, "several are units of different kinds"),
        (llama, {"pattern": []}, "several are units of different kinds"),
        (llama, {"method": "sparsegpt", "pattern": Heads()}, "judges single entries.*removes whole units"),
        (llama, {"method": "dsnot", "pattern": Blocks(8, 8)}, "judges single entries"),
        (llama, {"method": "oba", "pattern": NM()}, "scores heads and channels, and pattern=NM"),
        (llama, {"method": "cfsp", "pattern": Heads()}, r"scores \['channels'\] and no \['heads'\]"),
        (llama, {"method": "cfsp", "data": None}, "method='cfsp' reads"),
        (llama, {"pattern": Heads(), "sparsity": 0.4}, "sparsity=0.4 removes none of the 2 heads of 'model.layers.0'"),
        (llama, {"method": "lora_prune", "sparsity": 0.4}, "sparsity=0.4 removes no heads of any block"),
        (llama, {"method": LoRAPrune(last=2)}, "leaves none of 2 blocks to prune"),
        (llama, {"pattern": Blocks(24, 8)}, "tiles of 24 x 8 do not divide the 32 x 32 weight"),
        (mixtral, {"pattern": Rows()}, "has no feed-forward part of linear layers"),
    ],
)
def test_what_cannot_be_pruned_is_refused_whole(make, options, message):
    model = make()
    before, data = weights(model), options.pop("data", list(batches()))
    with pytest.raises(ValueError, match=message):
        prune_model(model, data, show_progress=False, **options)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_bar_shows_for_scoring_and_for_pruning(capsys):
    prune_model(llama(), list(batches()), method="cfsp")
    assert re.search(r"Scoring: 100%.*2/2.*Pruning: 100%.*2/2", capsys.readouterr().err, re.S)
