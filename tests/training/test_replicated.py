"""What FSDP2 shards and what it leaves whole, in one process: a group of one rank runs all of its code. Several ranks
are compared in `test_distributed.py` and `test_fsdp_resume.py`."""

import copy
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from hf_sparse_peft import (
    Controller,
    Regrow,
    SparseLoraConfig,
    adapter_parameters,
    callbacks_for,
    leave_adapters_whole,
    trainer_options,
)
from hf_sparse_peft.optim import AgedAdamW
from hf_sparse_peft.rules import Gradient, LowRankMagnitude, collectives
from hf_sparse_peft.training import replicated
from hf_sparse_peft.tuners import adapter_layers

pytestmark = pytest.mark.slow  # by themselves: a run of the suite with them hung once


@pytest.fixture
def group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def adapted(kind: str = "fp32", **options):
    config = SparseLoraConfig(
        r=2, density=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        **{"schedule": [Regrow(every=2, grow=Gradient())], **options},
    )  # fmt: skip
    base = tiny.base(kind)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def shard(model, ignored=None):
    ignored = adapter_parameters(model) if ignored is None else ignored
    ignored |= {p for p in model.parameters() if not p.is_floating_point()}  # as accelerate does
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, ignored_params=ignored)
    return fully_shard(model, ignored_params=ignored)


def batches(count: int):
    ids = tiny.TokenData(8 * count).ids.view(count, 2, 4, -1)
    return [[{"input_ids": part, "labels": part} for part in step] for step in ids]


def train(model, steps: int = 5):
    """Two micro-batches a step, in a loop of one's own."""
    optimizer = AgedAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with Controller(model, optimizer, total_steps=steps, accumulation=2) as rules:
        for first, second in batches(steps):
            rules.before_step()
            (model(**first).loss / 2).backward()
            rules.after_micro_batch()
            (model(**second).loss / 2).backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()
    assert rules.events
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "sparse_lora" in name}


def assert_alike(found, expected):
    """The same supports; values but for what BLAS rounds by how its operands are aligned, which gathering changes."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        close = 1e-5 if tensor.is_floating_point() else 0
        torch.testing.assert_close(found[name], tensor, rtol=close, atol=close)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_a_sharded_base_trains_and_moves_as_a_whole_one(kind, group):
    whole, sharded = adapted(kind), shard(adapted(kind))
    layer = adapter_layers(sharded)[0]
    assert isinstance(layer.get_base_layer().weight, DTensor) == (kind == "fp32")  # uint8 codes: see below
    assert not replicated.sharded_names(sharded)
    one = train(whole)
    assert_alike(train(sharded), one)
    assert any("values" in name and tensor.any() for name, tensor in one.items())


def four_bit(storage: torch.dtype, folder):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    tiny.llama(hidden=64, layers=1).save_pretrained(folder)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": storage}
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    base = LlamaForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, dtype=torch.float32, quantization_config=quantised
    )
    config = SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], schedule=[Regrow(every=2, grow=Gradient())])
    torch.manual_seed(1)
    return get_peft_model(base, config)


def test_four_bit_codes_are_sharded_in_floating_point_storage_and_read_as_they_were(group, tmp_path):
    whole = four_bit(torch.bfloat16, tmp_path)
    sharded = shard(copy.deepcopy(whole))
    layer, other = adapter_layers(whole)[0], adapter_layers(sharded)[0]
    assert isinstance(other.get_base_layer().weight, DTensor)
    assert torch.equal(other.dense_base_weight(), layer.dense_base_weight())
    assert_alike(train(sharded, 3), train(whole, 3))


def test_gradients_of_a_step_that_is_not_reduced_wait(group, monkeypatch):
    model, calls = shard(adapted()), []
    monkeypatch.setattr(replicated, "average_gradients", lambda parameters: calls.append(len(parameters)))
    replicated.average_replicated(model)
    replicated.average_replicated(model)  # once a model, however often it is asked
    first = batches(1)[0][0]
    model.set_requires_gradient_sync(False)
    model(**first).loss.backward()
    assert calls == []
    model.set_requires_gradient_sync(True)
    model(**first).loss.backward()
    assert calls == [len(adapter_parameters(model))]


def test_means_over_ranks_fill_what_a_rank_lacks_and_leave_what_no_rank_has(group, monkeypatch):
    """A second rank that has a gradient for `b` alone, which this one lacks, and none for `c`."""
    a, b, c = (nn.Parameter(torch.zeros(3)) for _ in range(3))
    a.grad = torch.tensor([2.0, 4.0, 6.0])
    others = [torch.tensor([0, 1, 0]), torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 3.0])]
    monkeypatch.setattr(replicated, "all_reduce_sum", lambda tensor: tensor + others[0])
    monkeypatch.setattr(collectives, "all_reduce_mean", lambda tensor: (tensor + others[1]) / 2)
    replicated.average_gradients([a, b, c])
    assert a.grad.tolist() == [1.0, 2.0, 3.0]
    assert b.grad.tolist() == [0.5, 1.0, 1.5]
    assert c.grad is None


# Refused


def test_moves_of_sharded_adapters_are_refused_with_the_mend(group):
    model = shard(adapted(schedule=[Regrow(every=2, grow=LowRankMagnitude())]), ignored=set())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(
        ValueError, match=r"sharded 'base_model.*Regrow does not take.*leave_adapters_whole.*ignored_params"
    ):
        Controller(model, optimizer, total_steps=2)


def test_nothing_is_merged_into_a_shard(group):
    model = shard(adapted(schedule=[]))
    with pytest.raises(ValueError, match=r"q_proj' is sharded over ranks.*merge_and_unload"):
        model.merge_adapter()


def plugin(monkeypatch, **options) -> SimpleNamespace:
    defaults = {
        "fsdp_version": 2, "ignored_modules": None, "cpu_ram_efficient_loading": False, "mixed_precision_policy": None,
    }  # fmt: skip
    found = SimpleNamespace(**{**defaults, **options})
    monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", found)
    return found


def test_loading_on_the_first_rank_alone_is_refused(monkeypatch):
    plugin(monkeypatch, cpu_ram_efficient_loading=True)
    with pytest.raises(ValueError, match=r"fsdp_cpu_ram_efficient_loading=true.*Set it to false"):
        leave_adapters_whole(adapted())


def test_a_cast_of_packed_codes_is_refused(monkeypatch, tmp_path):
    plugin(monkeypatch, mixed_precision_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
    model = four_bit(torch.bfloat16, tmp_path)
    with pytest.raises(ValueError, match=r"quant_storage=torch.bfloat16.*torch.float16.*quant_storage=torch.float16"):
        leave_adapters_whole(model)


def test_what_the_user_ignores_stays_ignored(monkeypatch):
    found, model = plugin(monkeypatch, ignored_modules=r".*embed_tokens"), adapted()
    leave_adapters_whole(model)
    leave_adapters_whole(model)
    ignored = {parameter for one in found.ignored_modules for parameter in one.parameters()}
    assert ignored == adapter_parameters(model) | {model.get_input_embeddings().weight}


def test_weights_that_tensor_parallelism_has_split_are_refused_by_name(group):
    model, mesh = tiny.llama(layers=1), init_device_mesh("cpu", (1,))
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh))
    with pytest.raises(ValueError, match=r"self_attn.q_proj.*tp_plan.*DDP or FSDP2"):
        get_peft_model(model, SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("field", ["tp_size", "cp_size", "sp_size"])
def test_moves_are_refused_where_a_rank_sees_a_part_of_a_sequence_or_a_weight(field, tmp_path):
    args = SimpleNamespace(deepspeed=None, fsdp=None, parallelism_config=SimpleNamespace(**{field: 2}))
    with pytest.raises(ValueError, match=rf"cannot move under .* parallelism.*parallelism_config.{field}"):
        callbacks_for(adapted())[0].on_init_end(args, None, None)


def test_fixed_supports_get_what_keeps_them_whole(tmp_path):
    args = SimpleNamespace(fsdp=True, fsdp_config={"version": 2})
    assert [type(one).__name__ for one in trainer_options(adapted(schedule=[]), args)["callbacks"]] == [
        "RunCheckCallback"
    ]
