"""Sparse-IFT's sizes against the worked numbers, and SPDF's two phases."""

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import SparseLoraConfig, methods
from hf_sparse_peft.pruning import doped_ranks, iso_flop_size, prune_model
from hf_sparse_peft.tuners import adapter_layers


@pytest.mark.parametrize(
    ("member", "sparsity", "size", "multiplications"),
    [
        ("wide", 0.75, 1024, lambda n: n * n // 4),
        ("parallel", 0.75, 4, lambda n: n * 65_536),
        ("factorized", 0.75, 1024, lambda n: n * 1024 // 4),
        ("doped", 0.75, 192, lambda n: 65_536 + n * 1024),
        ("doped", 0.5, 128, lambda n: 131_072 + n * 1024),
    ],
)
def test_512_by_512_has_the_worked_sizes_and_as_many_multiplications(member, sparsity, size, multiplications):
    assert iso_flop_size(member, 512, 512, sparsity) == size
    assert multiplications(size) == 512 * 512


def test_at_90_percent_sizes_are_rounded_and_at_0_nothing_is_added():
    assert iso_flop_size("doped", 512, 512, 0.9) == 230
    assert round(0.1 * 512 * 512) + 230 * 1024 == 261_734
    assert iso_flop_size("factorized", 512, 512, 0.9) == 2560
    assert iso_flop_size("parallel", 512, 512, 0.9) == 10
    assert [iso_flop_size(m, 512, 256, 0.0) for m in ("wide", "parallel", "doped")] == [256, 1, 0]
    for options in (("deep", 4, 4, 0.5), ("doped", 0, 4, 0.5), ("doped", 4, 4, 1.0)):
        with pytest.raises(ValueError, match=r"member='deep'|rows=0|sparsity=1.0"):
            iso_flop_size(*options)


def test_doped_ranks_are_the_ranks_of_a_lora_beside_the_pruned_base():
    model = tiny.llama()
    ranks = doped_ranks(model, 0.75)
    config = SparseLoraConfig(r=1, density=0.0, rank_pattern=ranks, target_modules="all-linear")
    model = get_peft_model(model, config)
    for layer in adapter_layers(model):
        rows, cols = layer.out_features, layer.in_features
        assert layer.sparse_lora_A["default"].shape[0] == int(0.75 * rows * cols / (rows + cols))
    with pytest.raises(ValueError, match="no rank"):
        doped_ranks(tiny.llama(), 0.01)


def test_spdf_trains_the_kept_then_all_with_removed_entries_from_exactly_0():
    model = tiny.llama()
    report = prune_model(model, method="random", sparsity=0.75, show_progress=False)
    assert all(zeros == int(0.75 * report.entries[name]) for name, zeros in report.zeros.items())
    data = {"input_ids": torch.randint(1, tiny.VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))}

    def step(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        model(**data, labels=data["input_ids"]).loss.backward()
        torch.optim.SGD(trained, lr=0.1).step()
        return model.merge_and_unload()

    sparse = step(get_peft_model(model, methods.get("spdf", phase="sparse").config))
    assert all(int((sparse.get_submodule(n).weight == 0).sum()) == zeros for n, zeros in report.zeros.items())
    for parameter in sparse.requires_grad_().parameters():
        parameter.grad = None
    sparse(**data, labels=data["input_ids"]).loss.backward()
    expected = {n: sparse.get_submodule(n).weight.detach() - 0.1 * sparse.get_submodule(n).weight.grad
                for n in report.masks}  # fmt: skip
    removed = {n: sparse.get_submodule(n).weight.detach() == 0 for n in report.masks}
    descent = {n: -0.1 * sparse.get_submodule(n).weight.grad for n in report.masks}
    dense = step(get_peft_model(sparse, methods.get("spdf").config))
    for name, weight in expected.items():
        found = dense.get_submodule(name).weight
        torch.testing.assert_close(found, weight)
        torch.testing.assert_close(found[removed[name]], descent[name][removed[name]])
        assert (found != 0).float().mean() > 0.99
    with pytest.raises(ValueError, match="phase='wide'"):
        methods.get("spdf", phase="wide")
