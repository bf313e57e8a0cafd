"""SSF and Houlsby's adapters in the models of their papers: counts, what trains, where adapters stand."""

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from hf_sparse_peft import methods
from hf_sparse_peft.training import TaskMixture
from hf_sparse_peft.tuners.structured import structured_layers

BEHIND = ["attention.output.dense", "output.dense"]


def trained(model) -> dict[str, int]:
    return {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}


def test_houlsby_has_the_papers_count_and_trains_norms_beside():
    with torch.device("meta"):
        base = BertModel(BertConfig(), add_pooling_layer=False)
    model = get_peft_model(base, methods.get("houlsby", target_modules=BEHIND).config, low_cpu_mem_usage=True)
    found = trained(model)
    adapters = {name: n for name, n in found.items() if ".structured_" in name}
    assert len(structured_layers(model)) == 24
    assert sum(n for name, n in adapters.items() if ".layer.3." in name) == 198_272
    assert sum(adapters.values()) == 2_379_264
    assert sum(found.values()) - sum(adapters.values()) == 38_400
    assert all("LayerNorm.modules_to_save" in name for name in found.keys() - adapters.keys())


def small_bert():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=50, **options), add_pooling_layer=False).eval()


def test_houlsby_starts_near_the_base_and_not_at_it():
    model = get_peft_model(small_bert(), methods.get("houlsby", target_modules=BEHIND).config).eval()
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        after = model(ids).last_hidden_state
        with model.disable_adapter():
            before = model(ids).last_hidden_state
    change = float((after - before).norm() / before.norm())
    assert 0 < change < 1e-3


def test_an_adapter_stands_before_the_sum_with_the_residual_stream():
    model = get_peft_model(small_bert(), methods.get("houlsby", size=4, target_modules=BEHIND).config).eval()
    block, seen = model.base_model.model.encoder.layer[0], []
    norm = block.attention.output.LayerNorm
    block.attention.output.dense.register_forward_hook(lambda module, args, out: seen.append(("adapted", out)))
    norm.register_forward_pre_hook(lambda module, args: seen.append(("norm", args[0])))
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        model(ids)
        layer = block.attention.output.dense
        layer.structured_up_matrix["default"].zero_()
        layer.structured_down_matrix["default"].zero_()
        layer.structured_up_bias["default"].zero_()
        model(ids)
        layer.structured_up_bias["default"].fill_(0.5)
        model(ids)
    shifts = [(now - before).unique() for (_, before), (_, now) in zip(seen[2:4], seen[4:6], strict=True)]
    for shift in shifts:  # of the layer's output, and by as much of the sum
        torch.testing.assert_close(shift, torch.full_like(shift, 0.5), rtol=0, atol=1e-6)


def test_ssf_has_the_papers_count_without_its_convolution():
    with torch.device("meta"):
        base = ViTModel(ViTConfig(), add_pooling_layer=False)
    model = get_peft_model(base, methods.get("ssf", task_type="FEATURE_EXTRACTION").config, low_cpu_mem_usage=True)
    found = trained(model)
    assert sum(n for name, n in found.items() if ".structured_" in name) == 12 * 18 * 768
    assert sum(found.values()) == 205_824 - 2 * 768


@pytest.mark.parametrize("std", [0.02, 0.0])
def test_ssf_starts_as_far_from_the_base_as_its_deviation_says(std):
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(256, 4096))
    model = get_peft_model(base, methods.get("ssf", std=std, norms=False, target_modules=["0"]).config)
    layer, x = structured_layers(model)[0], torch.randn(16, 256)
    with torch.no_grad():
        y = layer.base_layer(x)
        torch.testing.assert_close((layer(x) - y).norm() / y.norm(), torch.tensor(0.04 * (std > 0)), atol=0.005, rtol=0)


def test_all_ranks_of_a_trainer_get_the_same_task_at_every_step():
    from accelerate.data_loader import BatchSamplerShard

    per_device, world = 2, 2
    data = TaskMixture({"a": range(30), "b": range(20)}, per_device * world, batches=12)
    whole = type("Indexed", (torch.utils.data.Dataset,), {"__len__": lambda self: len(data)})()
    ranks = []
    for rank in range(world):
        batches = BatchSampler(SequentialSampler(whole), per_device, drop_last=False)
        drawn = BatchSamplerShard(batches, num_processes=world, process_index=rank)
        ranks.append([{data.task(index // data.batch) for index in batch} for batch in drawn])
    assert ranks[0] == ranks[1]
    assert all(len(tasks) == 1 for tasks in ranks[0])
    assert len(set.union(*ranks[0])) == 2
