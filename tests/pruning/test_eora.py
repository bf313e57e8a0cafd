"""EoRA against references in float64 that are written from the paper's equations, with another root of S."""

import copy

import processes
import pytest
import tiny
import torch
from peft import PeftModel
from transformers.pytorch_utils import Conv1D

from hf_sparse_peft.pruning import NM, InputStatistics, compensate, eigenspace_correction, prune_model
from hf_sparse_peft.pruning.reading.block_inputs import BlockInputs
from hf_sparse_peft.pruning.reading.block_statistics import block_statistics


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches(count=4):
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, tiny.VOCAB, (4, 12), generator=generator)} for _ in range(count)]


def whitened(error, x, rank):
    """The best product by Cholesky's root of S (SVD-LLM's whitening), which is another root than EoRA's."""
    lower = torch.linalg.cholesky(x.T @ x)
    U, s, Vt = torch.linalg.svd(error @ lower)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank] @ torch.linalg.inv(lower), s


# One layer -----------------------------------------------------------------------------------------------------------


def test_the_worked_example_keeps_what_the_inputs_make_large():
    """Plain SVD keeps the entry 1.5 and leaves an error of 4."""
    found = eigenspace_correction(torch.diag(torch.tensor([1.0, 1.5])), torch.diag(torch.tensor([4.0, 1.0])), 1)
    torch.testing.assert_close(found.B @ found.A, torch.diag(torch.tensor([1.0, 0.0])).double())
    assert found.before == pytest.approx(6.25)
    assert found.after == pytest.approx(2.25)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_product_is_the_best_of_its_rank_and_its_error_the_tail(rank):
    error, x = drawn(9, 12), drawn(40, 12, seed=1) @ torch.diag(torch.linspace(0.1, 3, 12).double())
    found = eigenspace_correction(error, x.T @ x, rank)
    expected, sigma = whitened(error, x, rank)
    torch.testing.assert_close(found.B @ found.A, expected)
    left = ((error - found.B @ found.A) @ x.T).square().sum()
    assert found.after == pytest.approx(float(left)) == pytest.approx(float(sigma[rank:].square().sum()))
    U, s, Vt = torch.linalg.svd(error)
    plain = ((error - (U[:, :rank] * s[:rank]) @ Vt[:rank]) @ x.T).square().sum()
    assert left < 0.99 * plain


def test_with_alike_inputs_it_is_the_plain_svd():
    error = drawn(6, 10)
    U, s, Vt = torch.linalg.svd(error, full_matrices=False)
    found = eigenspace_correction(error, torch.eye(10), 3)
    torch.testing.assert_close(found.B @ found.A, (U[:, :3] * s[:3]) @ Vt[:3])


def test_inputs_that_span_less_than_the_layer_are_restored_there_and_nowhere_else_blown_up():
    """24 features, of which fp32 sums of 5 tokens know 5 directions: their moment has negative eigenvalues."""
    error, x = drawn(7, 24).float(), drawn(5, 24, seed=1).float()
    moment = x.T @ x
    assert torch.linalg.eigvalsh(moment.double())[0] < 0
    found = eigenspace_correction(error, moment, 7)
    torch.testing.assert_close((found.B @ found.A).float() @ x.T, error @ x.T, rtol=1e-4, atol=1e-4)
    assert found.A.norm() * found.B.norm() < 10 * error.norm()
    assert found.A.shape[0] == 5


def test_a_running_average_weighs_the_first_of_64_sequences_0377_of_the_last():
    """S <- S N / (N + b) + x x^T / N: each sequence is a unit vector, so that the diagonal holds the weights."""

    class Same(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(x)

    block, inputs = tiny_block(Same()), BlockInputs()
    inputs.hidden = [torch.eye(64)[None, None, at] for at in range(64)]
    inputs.masks, inputs.others = [None] * 64, [{"b": ((), {})} for _ in range(64)]
    weights = block_statistics(block, inputs, frozenset({"hessian"}), running=True)["b.linear"].hessian().diagonal()
    expected = torch.tensor([(64 / 65) ** (63 - at) for at in range(64)])
    torch.testing.assert_close(weights / weights[-1], expected)
    assert float(weights[0] / weights[-1]) == pytest.approx(0.377, abs=5e-4)
    plain = block_statistics(block, inputs, frozenset({"hessian"}))["b.linear"].hessian().diagonal()
    assert torch.equal(plain, plain[:1].expand(64))


def tiny_block(module):
    from hf_sparse_peft.pruning.reading.block_inputs import Block
    from hf_sparse_peft.pruning.reading.one_shot import PrunableLayer

    return Block("b", module, [PrunableLayer("b.linear", module.linear, None)])


def noting(seen):
    return lambda module, args: seen[module].append(args[0].flatten(0, -2))


# Whole models --------------------------------------------------------------------------------------------------------


def pruned(kind):
    dense = tiny.base("fp32" if kind == "nf4" else kind)
    model = tiny.base(kind)
    for own in (model, dense) if kind == "conv1d" else ():
        torch.manual_seed(5)
        for module in own.modules():
            if isinstance(module, torch.nn.LayerNorm):  # else what it gives sums to 0, and no moment has an inverse
                module.bias.data.normal_()
            if isinstance(module, Conv1D):
                module.weight.data.normal_(std=len(module.weight) ** -0.5)
    if kind != "nf4":
        prune_model(model, batches(), pattern=NM(2, 4), show_progress=False)
    return model, dense


@torch.no_grad()
def by_hand(model, dense, data, rank):
    """Whole forwards in float64: all inputs anew for each block, with the blocks before it compensated."""
    model, dense = copy.deepcopy(model).double().eval(), copy.deepcopy(dense).double()
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    originals = dense.model.layers if hasattr(dense, "model") else dense.transformer.h
    products, names = {}, {module: name for name, module in model.named_modules()}
    for block, original in zip(blocks, originals, strict=True):
        linears = [m for m in block.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
        weights = [m for m in original.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
        held, seen = [m.weight.data for m in linears], {m: [] for m in linears}
        hooks = [m.register_forward_pre_hook(noting(seen)) for m in linears]
        for module, other in zip(linears, weights, strict=True):
            module.weight.data = other.weight.data
        for batch in data:
            model(**batch)
        for hook in hooks:
            hook.remove()
        for module, other, compressed in zip(linears, weights, held, strict=True):
            error = other.weight - compressed
            error = error.T if isinstance(module, Conv1D) else error
            x = torch.cat(seen[module])
            product, _ = whitened(error, x, rank)
            module.weight.data = compressed + (product.T if isinstance(module, Conv1D) else product)
            products[names[module]] = error @ x.T, x, ((error - product) @ x.T).norm()
    return products


@pytest.mark.parametrize("kind", ["fp32", "conv1d"])
def test_each_block_is_read_with_its_own_weights_behind_compensated_ones(kind):
    model, dense = pruned(kind)
    expected = by_hand(model, dense, batches(), 5)
    found = compensate(model, dense, batches(), rank=5, show_progress=False)
    assert found.before.keys() == expected.keys()
    for name, (outputs, x, least) in expected.items():
        layer = found.model.get_submodule(f"base_model.model.{name}")
        assert layer.scaling["default"] == 1
        own = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert float((outputs - own @ x.T).norm()) == pytest.approx(float(least), rel=1e-2), name
        assert found.after[name] < found.before[name]


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "conv1d"])
def test_the_adapter_moves_the_outputs_to_the_dense_models_and_loads_with_peft_alone(kind, tmp_path):
    model, dense = pruned(kind)
    untouched, plain = copy.deepcopy(model), copy.deepcopy(model)
    found = compensate(model, dense, batches(), rank=12, task_type="CAUSAL_LM", show_progress=False)
    with torch.no_grad():
        target, data = dense(**batches()[0]).logits, batches()[0]
        before, after = untouched(**data).logits, found.model(**data).logits
        assert (after - target).norm() < 0.7 * (before - target).norm()
        with found.model.disable_adapter():
            assert torch.equal(found.model(**data).logits, before)
        found.model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(**data).logits, after)


def test_a_process_that_knows_peft_only_serves_the_adapter(tmp_path):
    model, dense = pruned("fp32")
    model.save_pretrained(tmp_path / "base")
    found = compensate(model, dense, batches(), rank=4, show_progress=False)
    found.model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.save(found.model(**batches()[0]).logits, tmp_path / "logits.pt")
    torch.save(batches()[0], tmp_path / "batch.pt")
    script = """
import sys, torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base = LlamaForCausalLM.from_pretrained("base")
logits = PeftModel.from_pretrained(base, "adapter").eval()(**torch.load("batch.pt")).logits
assert torch.equal(logits, torch.load("logits.pt")) and "hf_sparse_peft" not in sys.modules
"""
    processes.python("-c", script, check=True, cwd=tmp_path)


def test_the_error_of_a_4_bit_layer_is_that_of_the_weight_it_dequantises_to():
    """At full rank the compensated model is the dense one, double quantisation of the scales included."""
    model, dense = pruned("nf4")
    data = batches(8)
    found = compensate(model, dense, data, rank=64, show_progress=False)
    with torch.no_grad():
        logits = dense(**data[0]).logits
        assert (found.model(**data[0]).logits - logits).norm() < 2e-3 * logits.norm()
    ranks = {name.rpartition(".")[2]: layer.r["default"] for name, layer in
             ((n, m) for n, m in found.model.named_modules() if hasattr(m, "lora_A"))}  # fmt: skip
    assert ranks == {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 32, "up_proj": 32,
                     "down_proj": 32}  # fmt: skip


def test_a_folder_gives_what_the_model_gives(tmp_path):
    model, dense = pruned("conv1d")
    dense.save_pretrained(tmp_path)
    options = {"rank": 3, "rank_pattern": {"c_fc": 6}, "show_progress": False}
    by_model = compensate(copy.deepcopy(model), dense, batches(), **options).model
    by_folder = compensate(model, tmp_path, batches(), **options).model
    for (name, one), (_, other) in zip(by_model.named_parameters(), by_folder.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    assert by_model.get_submodule("base_model.model.transformer.h.0.mlp.c_fc").r == {"default": 6}
    assert by_model.get_submodule("base_model.model.transformer.h.0.mlp.c_proj").r == {"default": 3}


def test_directions_without_an_error_start_as_loras_do_and_every_number_can_train():
    """One token reaches the layers: its error has one direction, whatever the rank."""
    model, dense = pruned("fp32")
    data = [{"input_ids": torch.tensor([[5]])}]
    found = compensate(model, dense, data, rank=4, show_progress=False).model
    layer = found.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert (layer.lora_B["default"].weight.norm(dim=0) > 0).tolist() == [True, False, False, False]
    found.train()
    loss = found(**batches()[0], labels=batches()[0]["input_ids"]).loss
    loss.backward()
    assert (layer.lora_B["default"].weight.grad.norm(dim=0) > 0).all()


# Refused -------------------------------------------------------------------------------------------------------------


def refusals():
    def other_shape(model, dense):
        return {"reference": tiny.llama(hidden=64)}

    def nan(model, dense):
        dense.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        return {"reference": dense}

    def nan_inside(model, dense):
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
        return {"reference": dense}

    return [
        (lambda m, d: {"reference": m}, "reference is the model itself"),
        (lambda m, d: {"reference": copy.deepcopy(m)}, "equal weights"),
        (other_shape, "are of two models"),
        (nan, "reference's weight of 'model.layers.1.mlp.up_proj' is not finite"),
        (nan_inside, "not finite"),
        (lambda m, d: {"reference": {}}, "has no weight of 'model.layers.0"),
        (lambda m, d: {"reference": d, "rank": 0}, "rank=0"),
        (lambda m, d: {"reference": d, "rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
        (lambda m, d: {"reference": d, "average": "median"}, "average='median'"),
        (lambda m, d: {"reference": d, "dataloader": []}, "no batch"),
    ]


@pytest.mark.parametrize(("change", "message"), refusals())
def test_what_cannot_be_compensated_is_refused_and_the_model_left_as_it_was(change, message):
    model, dense = pruned("fp32")
    options = {"dataloader": batches(1), **change(model, dense)}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compensate(model, options.pop("reference"), options.pop("dataloader"), show_progress=False, **options)
    assert all(
        torch.equal(a, b) or a.isnan().any() for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_statistics_can_be_scaled():
    found = InputStatistics(3, ("squares", "means", "hessian"), "cpu")
    found.add(torch.ones(1, 2, 3), None)
    found.scale(0.5)
    assert found.mean_square().tolist() == found.mean().tolist() == [1.0] * 3
    assert found.hessian().tolist() == [[2.0] * 3] * 3
