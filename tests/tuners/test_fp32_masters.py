"""Values that somebody casts between injection and training are fp32 masters again when they train."""

import copy
import warnings

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from processes import in_a_group_of_one

from hf_sparse_peft import Allocate, AverageRank, KernelLoraConfig, SparseLoraConfig, restore_fp32
from hf_sparse_peft.optim import AgedAdamW
from hf_sparse_peft.tuners import adapter_layers

IDS = torch.arange(1, 9).view(2, 4)
CONFIGS = {
    "hybrid": lambda: SparseLoraConfig(r=4, density=0.1, target_modules=["q_proj", "o_proj"]),
    "gated": lambda: SparseLoraConfig(
        r=4, density=0.1, target_modules=["q_proj"], schedule=[Allocate(budget=AverageRank(2))]
    ),
    "kernel": lambda: KernelLoraConfig(r=4, kernel="mixed", target_modules=["q_proj", "o_proj"]),
}
CASTS = {
    "trl": lambda model: [setattr(p, "data", p.data.bfloat16()) for p in model.parameters() if p.requires_grad],
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
}


def adapted(case="hybrid", **options):
    model = get_peft_model(tiny.llama(layers=1), CONFIGS[case](), **options)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model):
    return {name: p.detach().clone() for name, p in trained(model).items()}


def same(model, values):
    return all(torch.equal(p, values[name]) for name, p in trained(model).items())


def messages(caught):
    return [str(w.message) for w in caught if "were cast to" in str(w.message)]


def run(model, *, train_mode):
    """One training forward and backward of a model that was or was not switched to training."""
    if train_mode:
        model.train()
    for layer in adapter_layers(model):
        layer.training = True  # without `train()`, as a fresh layer over a base in evaluation mode
    model(input_ids=IDS, labels=IDS).loss.float().backward()


@pytest.mark.filterwarnings("ignore:Adapter 'default' asks for")
@pytest.mark.parametrize("train_mode", [True, False], ids=["train()", "forward"])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("case", CONFIGS)
def test_a_cast_is_undone_bit_for_bit_in_the_same_parameters_and_told_once(case, cast, train_mode):
    model = adapted(case)
    before, objects = snapshot(model), {name: id(p) for name, p in trained(model).items()}
    CASTS[cast](model)
    assert not same(model, before)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            run(model, train_mode=train_mode)
    assert len(messages(caught)) == 1
    assert "bit for bit" in messages(caught)[0]
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert same(model, before)
    assert objects == {name: id(p) for name, p in trained(model).items()}
    assert {p.grad.dtype for p in trained(model).values() if p.grad is not None} == {torch.float32}


@pytest.mark.filterwarnings("ignore:Adapter 'default' asks for")
def test_training_state_is_fp32_again_and_supports_stay_bytes():
    model = adapted("gated")
    layer = adapter_layers(model)[0]
    codes = layer.sparse_lora_support["default"].clone()
    model.to(torch.bfloat16)
    assert layer.rule_state("default")["sensitivity_A"].dtype == torch.bfloat16
    model.train()
    assert layer.rule_state("default")["sensitivity_A"].dtype == torch.float32
    assert torch.equal(layer.sparse_lora_support["default"], codes)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD, AgedAdamW])
def test_an_optimizer_goes_on_in_fp32_after_a_cast_in_the_middle(optimizer_cls):
    """The step after a cast, and after moments were read into cast parameters, is the step without any cast."""

    def steps(cast_at):
        model = adapted()
        optimizer = optimizer_cls(trained(model).values(), lr=1e-3)
        for step in range(4):
            if step == cast_at:
                CASTS["trl"](model)
            run(model, train_mode=True)
            optimizer.step()
            optimizer.zero_grad()
        return snapshot(model), optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (cast, optimizer), (plain, _) = steps(2), steps(None)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)
    assert all(p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])


@pytest.mark.filterwarnings("ignore:The values of adapter")
def test_moments_that_were_read_into_cast_parameters_follow_them_to_fp32():
    model = adapted()
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3)
    run(model, train_mode=True)
    optimizer.step()
    saved = optimizer.state_dict()
    CASTS["trl"](model)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-3)
    optimizer.load_state_dict(copy.deepcopy(saved))  # torch casts the moments to the parameters' dtype
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.bfloat16}
    run(model, train_mode=True)
    optimizer.step()
    assert {s[k].dtype for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_what_was_written_after_the_cast_is_kept_and_the_rounding_is_told():
    model = adapted()
    CASTS["trl"](model)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(1)
    rounded = {name: p.detach().float() for name, p in trained(model).items()}
    with pytest.warns(UserWarning, match="start from what the cast rounded them to"):
        model.train()
    assert same(model, rounded)


def test_a_deep_copy_is_restored_from_its_own_values():
    model = adapted()
    CASTS["trl"](model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained(twin).values():
            parameter.zero_()
    with pytest.warns(UserWarning, match="were cast to"):
        twin.train()
    assert all(not p.any() and p.dtype == torch.float32 for p in trained(twin).values())


def test_the_dtype_of_the_base_stays_where_it_was_asked_for(tmp_path):
    model = get_peft_model(
        tiny.llama(layers=1, dtype=torch.bfloat16), CONFIGS["hybrid"](), autocast_adapter_dtype=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(model, train_mode=True)
        restore_fp32(model)
    assert not messages(caught)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)  # as Trainer does on resume
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}


@pytest.mark.parametrize("low_memory", [True, False])
def test_a_loaded_adapter_goes_on_from_its_fp32_values(low_memory, tmp_path):
    model = adapted()
    before = snapshot(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        tiny.llama(layers=1), str(tmp_path), is_trainable=True, low_cpu_mem_usage=low_memory
    )
    CASTS["trl"](loaded)
    with pytest.warns(UserWarning, match="bit for bit"):
        loaded.train()
    assert same(loaded, before)


def test_a_checkpoint_is_read_into_fp32_values_after_a_cast(tmp_path):
    model = adapted()
    before = snapshot(model)
    model.save_pretrained(tmp_path)
    CASTS["trl"](model)
    with pytest.warns(UserWarning, match="were cast to"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert same(model, before)


def test_evaluation_and_an_adapter_that_does_not_train_keep_the_dtype_they_were_cast_to(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny.llama(layers=1), str(tmp_path)).to(torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.eval()
        with torch.no_grad():
            model(input_ids=IDS)
    layer = adapter_layers(model)[0]
    assert not messages(caught)
    assert layer.sparse_lora_values["default"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["hybrid", "kernel"])
@pytest.mark.parametrize("moved", [False, True])
def test_a_head_that_was_cast_alone_trains_in_fp32_again(kind, moved):
    config = CONFIGS[kind]()
    config.modules_to_save = ["lm_head"]
    model = get_peft_model(tiny.llama(layers=1), config)
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    if moved:
        head.data.mul_(1.1)
    expected = head.detach().bfloat16().float() if moved else head.detach().clone()
    CASTS["trl"](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with pytest.warns(UserWarning, match="were cast to torch.bfloat16"):
        run(model, train_mode=True)
    assert head.dtype == torch.float32
    assert torch.equal(head, expected)
    optimizer.step()
    assert optimizer.state[head]["exp_avg"].dtype == torch.float32
    assert (head != expected).float().mean() > 0.9  # in bf16 a step of 1e-5 is rounded away
    assert model.base_model.model.lm_head.original_module.weight.dtype == torch.float32


@pytest.mark.parametrize("cast", ["to", "half"])
@pytest.mark.filterwarnings("ignore:The values of adapter 'default' were cast")
def test_a_head_that_was_cast_with_its_model_keeps_the_dtype_of_the_model(cast):
    model = get_peft_model(
        tiny.llama(layers=1), SparseLoraConfig(r=2, density=0.1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    CASTS[cast](model)
    run(model, train_mode=True)
    lm_head = model.base_model.model.lm_head
    assert lm_head.modules_to_save["default"].weight.dtype == lm_head.original_module.weight.dtype != torch.float32


@in_a_group_of_one
def test_a_cast_is_undone_before_ddp_lays_out_its_buckets():
    """Afterwards a gradient of another dtype fits no bucket; nothing but the wrapping runs in between."""
    model = adapted()
    before = snapshot(model)
    CASTS["trl"](model)
    with pytest.warns(UserWarning, match="bit for bit"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    assert same(model, before)
    wrapped(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in trained(model).values()} == {torch.float32}
