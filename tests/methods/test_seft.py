"""SEFT's idea: SpIEL's moves among the weights that a pruned base keeps."""

import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import methods, sparsity_report
from hf_sparse_peft.pruning import prune_model
from hf_sparse_peft.tuners import adapter_layers


def trained(name, folder, base, **options):
    method = methods.get(name, density=0.1, every=3, steps=2, task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    model = get_peft_model(base, method.config)
    first = {layer.module_name: layer.units("default").clone() for layer in adapter_layers(model)}
    tiny.train(model, folder, 8, callbacks=method.callbacks(model))
    return model, first


def test_supports_move_among_kept_weights_and_merging_fills_no_zero(tmp_path):
    base = tiny.llama(hidden=64, layers=1)
    prune_model(base, method="magnitude", sparsity=0.5, show_progress=False)
    before = sparsity_report(base)
    model, first = trained("seft", tmp_path, base)
    for layer in adapter_layers(model):
        units, kept = layer.units("default"), layer.dense_base_weight().reshape(-1) != 0
        assert kept[units.long()].all()
        assert kept[first[layer.module_name].long()].all()
        assert not torch.equal(units, first[layer.module_name])
    report = model.sparsity_report()
    assert report.total.filled == 0
    assert report.total.merged_zeros == before.total.zeros


def test_a_support_that_moves_freely_fills_zeros(tmp_path):
    base = tiny.llama(hidden=64, layers=1)
    prune_model(base, method="magnitude", sparsity=0.5, show_progress=False)
    model, _ = trained("spiel-ag", tmp_path, base)
    assert model.sparsity_report().total.filled > 0
