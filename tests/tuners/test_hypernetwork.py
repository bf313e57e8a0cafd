"""HyperFormer against its equations in float64, and what is shared, saved once, named and made of it."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_sparse_peft import StructuredConfig, callbacks_for, estimate, methods
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.training import TaskCollator, TaskMixture
from hf_sparse_peft.tuners.structured import Bottleneck, Hypernetwork, add_task_adapter, structured_layers
from hf_sparse_peft.tuners.structured.hypernetwork import places

TASKS = ("rte", "cola")
SMALL = {"tasks": TASKS, "reduction": 8, "embedding": 4, "hidden": 6, "projected": 5}
TARGETS = ["o_proj", "down_proj"]
IDS = torch.arange(36).view(3, 12)


def adapted(base="fp32", fill: float = 0.2, **options):
    torch.manual_seed(1)
    config = StructuredConfig(form=Hypernetwork(**{**SMALL, **options}), target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.base(base), config)
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += fill * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model, task=None):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS % tiny.VOCAB, **({} if task is None else {"task": task})).logits


def gelu_new(x):
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def normed(x, eps):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def reference(layer, y, task, layers, positions, form):
    """Output of the adapted layer in float64, by the equations; `layers` and `positions` number the model's."""
    held = {name: tensor.detach().double() for name, tensor in layer.form_tensors("default").items()}
    at = next(number for number, part in enumerate(layer.module_name.split(".")) if part.isdigit())
    parts = layer.module_name.split(".")
    position = positions.index(".".join(parts[at + 1 :]))
    z = [held[f"task_embedding_{TASKS.index(task)}"], held["layer_embeddings"][layers.index(parts[at])]]
    if form.generators == "shared":
        z.append(held["position_embeddings"][position])
    hidden = (held["mixer_in"][0] @ torch.cat(z) + held["mixer_in_bias"][0]).clamp_min(0)
    e = normed(held["mixer_out"][0] @ hidden + held["mixer_out_bias"][0], 1e-6)
    e = e * held["layernorm_scale"][0] + held["layernorm_shift"][0]
    of = 0 if form.generators == "shared" else position

    def made(name):
        return held[f"{name}_generator"][of] @ e + held[f"{name}_offset"][of]

    n = y.shape[-1]
    inner = gelu_new(y @ made("down").view(-1, n).t() + made("down_bias"))
    found = inner @ made("up").view(n, -1).t() + made("up_bias")
    return y + normed(found, 1e-5) * made("norm_scale") + made("norm_shift")


@pytest.mark.parametrize("generators", ["shared", "position"])
def test_every_module_adds_what_the_equations_say_for_the_task_that_was_named(generators):
    model = adapted(generators=generators)
    form = model.peft_config["default"].form
    for task in TASKS:
        model.base_model.set_task(task)
        for layer in structured_layers(model):
            x = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(3))
            y = layer.base_layer(x).detach().double()
            expected = reference(layer, y, task, ["0", "1"], ["self_attn.o_proj", "mlp.down_proj"], form)
            torch.testing.assert_close(layer(x).detach().double(), expected, rtol=1e-4, atol=1e-5)


def t5_base():
    """Names and sides of what T5-base has, without its weights' memory."""

    def stack():
        block = nn.ModuleDict({"o": nn.Linear(8, 768, bias=False), "wo": nn.Linear(8, 768, bias=False)})
        return nn.ModuleDict({"block": nn.ModuleList([copy.deepcopy(block) for _ in range(12)])})

    with torch.device("meta"):
        return nn.ModuleDict({"encoder": stack(), "decoder": stack()})


def test_counts_are_those_of_t5_base():
    model = get_peft_model(
        t5_base(), StructuredConfig(form=Hypernetwork(tuple("abcdefgh")), target_modules=["o", "wo"]),
        low_cpu_mem_usage=True,
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2_581_464 + 8 * 64
    owner = structured_layers(model)[0]
    counts = {name: tensor.numel() // 2 for name, tensor in owner.form_tensors("default").items()}
    mixer = sum(n for name, n in counts.items() if name.startswith("mixer"))
    assert mixer == 32_960
    up = sum(n for name, n in counts.items() if name.startswith("up"))
    assert up == 1_248_000
    assert sum(n for name, n in counts.items() if name.startswith("down")) == 1_199_640
    assert sum(n for name, n in counts.items() if name.startswith("norm")) == 99_840
    assert counts["layer_embeddings"] + counts["position_embeddings"] == 896
    assert counts["layernorm_scale"] + counts["layernorm_shift"] == 128


def test_names_say_where_modules_stand():
    found = places(("encoder.block.0.o", "encoder.block.0.wo", "encoder.block.1.o", "decoder.block.0.o", "head"))
    assert found.of["encoder.block.1.o"] == (0, 1, 0)
    assert found.of["decoder.block.0.o"] == (1, 2, 2)
    assert found.of["head"] == (2, 3, 3)
    assert found[1:] == (3, 4, 4)


def test_generated_norms_start_small_and_with_a_mean_of_nothing_so_that_adapters_start_near_the_base():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 4096)), StructuredConfig(form=Hypernetwork(reduction=512), target_modules=["0"])
    )
    layer = structured_layers(model)[0]
    with torch.no_grad():
        made = layer.form("default").generate(layer.form_tensors("default"), layer.site("default"), None)
    for name in ("norm_scale", "norm_shift"):
        assert float(made[name].std()) == pytest.approx(0.08, rel=0.1)
        assert made[name].mean().abs() < 0.01
    x = torch.randn(64, 8)
    change = (layer(x) - layer.base_layer(x)).detach()
    assert float(change.std()) == pytest.approx(0.11, rel=0.15)


def test_each_stack_has_a_network_of_its_own_and_both_the_same_embeddings_of_tasks():
    torch.manual_seed(0)
    names = ("encoder", "decoder")
    host = nn.ModuleDict({name: nn.ModuleList([nn.ModuleDict({"o": nn.Linear(4, 8)})]) for name in names})
    model = get_peft_model(host, StructuredConfig(form=Hypernetwork(**SMALL), target_modules=["o"]))
    encoder, decoder = structured_layers(model)
    model.base_model.set_task("rte")
    (decoder(torch.randn(3, 4)) ** 3).sum().backward()
    for name in ("up_generator", "mixer_in", "layernorm_shift", "layer_embeddings", "position_embeddings"):
        grad = getattr(encoder, f"structured_{name}")["default"].grad
        assert len(grad) == 2
        assert not grad[0].any()
        assert grad[1].any()
    assert encoder.structured_task_embedding_0["default"].grad.any()
    assert decoder.trained_parameters("default") == []


def test_equal_embeddings_give_equal_adapters_and_layers_differ():
    model = adapted()
    first, other = structured_layers(model)[0], structured_layers(model)[2]
    assert first.module_name.endswith("0.self_attn.o_proj")
    assert other.module_name.endswith("1.self_attn.o_proj")

    def made(layer, task):
        return layer.form("default").generate(layer.form_tensors("default"), layer.site("default"), task)["up"]

    assert not torch.equal(made(first, "rte"), made(first, "cola"))
    assert not torch.equal(made(first, "rte"), made(other, "rte"))
    first.structured_task_embedding_1["default"].data.copy_(first.structured_task_embedding_0["default"].data)
    assert torch.equal(made(first, "rte"), made(first, "cola"))


def test_a_generators_gradient_is_the_sum_over_modules_and_other_tasks_have_none():
    model = adapted()
    layers = structured_layers(model)
    owner = layers[0]
    g = torch.Generator().manual_seed(4)
    cases = [(layer, torch.randn(2, 3, layer.in_features, generator=g)) for layer in layers]
    model.base_model.set_task("cola")

    def gradients():
        found = {n: p.grad for n, p in owner.named_parameters() if p.requires_grad}
        owner.zero_grad()
        return found

    parts = []
    for layer, x in cases:
        layer(x).square().sum().backward()
        parts.append(gradients())
    sum(layer(x).square().sum() for layer, x in cases).backward()
    whole = gradients()
    assert whole["structured_task_embedding_0.default"] is None
    assert whole["structured_task_embedding_1.default"].any()
    for name in ("structured_up_generator.default", "structured_mixer_in.default"):
        torch.testing.assert_close(whole[name], sum(part[name] for part in parts), rtol=1e-4, atol=1e-4)


def test_what_is_shared_is_one_parameter_saved_once_and_loaded_to_the_bit(tmp_path):
    model = adapted()
    owners = [layer for layer in structured_layers(model) if layer.trained_parameters("default")]
    assert len(owners) == 1
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith("structured_up_generator") for key in held) == 1
    assert sum(key.endswith("structured_frozen_shape") for key in held) == len(structured_layers(model))
    check_adapter(tmp_path)
    again = PeftModel.from_pretrained(tiny.base("fp32"), tmp_path)
    assert again.peft_config["default"].form.tasks == TASKS
    for task in TASKS:
        assert torch.equal(logits(again, task), logits(model, task))
    base = logits(tiny.base("fp32"))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.delete_adapter("default")
    assert not [name for name, _ in model.named_parameters() if ".default" in name]
    assert torch.equal(logits(model.unload()), base)


def test_a_pass_without_a_task_or_of_an_unknown_or_several_ones_is_refused_by_name():
    model = adapted()
    with pytest.raises(
        ValueError, match=r"task=None, and the adapter of form Hypernetwork has.* tasks \['rte', 'cola'\]"
    ):
        logits(model)
    with pytest.raises(ValueError, match="task='qnli'"):
        logits(model, "qnli")
    with pytest.raises(ValueError, match=r"task=\['cola', 'rte'\]: a pass is of one task"):
        logits(model, ["rte", "cola", "rte"])
    answer = logits(model, ["rte"] * 3)
    assert torch.equal(logits(model), answer)  # the task holds until another is named
    assert not torch.equal(logits(model, "cola"), answer)
    with pytest.raises(ValueError, match="have no tasks"):
        model.base_model.set_task("rte", "nobody")
    out = model.generate(input_ids=IDS[:1, :4], max_new_tokens=2, do_sample=False, task="rte")
    assert out.shape[1] <= 6
    assert torch.equal(logits(model), answer)
    alone = adapted(tasks=("only",))
    assert torch.equal(logits(alone), logits(alone, "only"))


def test_an_adapter_of_one_task_gives_its_logits_without_the_hypernetwork(tmp_path):
    torch.manual_seed(1)
    config = StructuredConfig(
        form=Hypernetwork(**SMALL), target_modules=TARGETS, task_type="CAUSAL_LM", modules_to_save=["norm"]
    )
    model = get_peft_model(tiny.base("fp32"), config)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.2 * torch.randn(parameter.shape)
    expected = logits(model, "cola")
    assert add_task_adapter(model, "cola") == "cola"
    assert torch.equal(logits(model, "cola"), expected)
    model.set_adapter("cola")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["cola"])
    loaded = PeftModel.from_pretrained(tiny.base("fp32"), tmp_path / "cola")
    assert isinstance(loaded.peft_config["default"].form, Bottleneck)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    for arguments, message in (
        ({"task": "cola", "adapter_name": "default"}, "name='cola' is an adapter of this model already"),
        ({"task": "rte", "adapter_name": "cola"}, "is of form Bottleneck"),
        ({"task": "qnli", "adapter_name": "default"}, "task='qnli'"),
    ):
        with pytest.raises(ValueError, match=message):
            add_task_adapter(model, **arguments)


class Sentences(list):
    """Token sequences of one task."""

    def __init__(self, size, seed):
        ids = torch.randint(1, tiny.VOCAB, (size, 8), generator=torch.Generator().manual_seed(seed))
        super().__init__({"input_ids": row, "labels": row} for row in ids)


def collate(examples):
    return {key: torch.stack([example[key] for example in examples]) for key in examples[0]}


def mixture(batch=4, **options):
    return TaskMixture({"rte": Sentences(20, 1), "cola": Sentences(9, 2)}, batch, **options)


def train(folder, base="fp32", steps=6, resume=None, form=None):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    form = form or Hypernetwork(**SMALL)
    config = StructuredConfig(form=form, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.base(base), config)
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, learning_rate=1e-2,
        lr_scheduler_type="constant", save_steps=3, report_to=[], disable_tqdm=True, use_cpu=True, weight_decay=0.1,
        remove_unused_columns=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    seen = []

    class Seeing(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["task"])
            return super().training_step(model, inputs, *args, **kwargs)

    data = mixture(batches=5)
    trainer = Seeing(
        model, args, train_dataset=data, data_collator=TaskCollator(collate), callbacks=callbacks_for(model)
    )
    trainer.train(resume_from_checkpoint=resume)
    state = {f"optimizer.{n}": s["exp_avg"] for n, s in enumerate(trainer.optimizer.state.values())}
    return model, {**dict(model.state_dict()), **state}, seen


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_a_run_over_tasks_resumes_to_the_bit_in_the_middle_of_an_epoch(base, tmp_path):
    _, whole, seen = train(tmp_path / "a", base)
    assert set(seen) == set(TASKS)
    _, again, rest = train(tmp_path / "b", base, resume=str(tmp_path / "a" / "checkpoint-3"))
    assert seen[-len(rest) :] == rest
    assert len(rest) < len(seen)
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_memory_is_estimated_as_of_a_pass_of_one_task():
    base = tiny.llama(layers=2)
    config = StructuredConfig(form=Hypernetwork(**SMALL), target_modules=TARGETS, task_type="CAUSAL_LM")
    expected = sum(p.numel() for p in get_peft_model(copy.deepcopy(base), config).parameters() if p.requires_grad)
    assert estimate(base.config, config, batch=1, seq=8).trained_numbers == expected


def test_gradient_checkpointing_computes_again_for_the_task_of_the_pass():
    found = []
    for on in (False, True):
        model = adapted().train()
        if on:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.base_model.set_task("rte")
        model(input_ids=IDS % tiny.VOCAB, labels=IDS % tiny.VOCAB, task="cola").loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_tasks_are_drawn_by_temperature_alike_for_the_same_seed_and_anew_every_epoch():
    data = TaskMixture({"large": range(1000), "small": range(10)}, 4, temperature=10, batches=4000)
    assert data.probabilities["large"] == pytest.approx(0.613, abs=5e-4)
    assert data.probabilities["small"] == pytest.approx(0.387, abs=5e-4)
    share = sum(data.task(batch) == "large" for batch in range(4000)) / 4000
    assert share == pytest.approx(0.613, abs=0.03)
    plain = TaskMixture({"large": range(1000), "small": range(10)}, 4, temperature=1)
    assert plain.probabilities["large"] == pytest.approx(0.990, abs=5e-4)
    data, other = mixture(batches=20), mixture(batches=20)
    tasks = [data[index]["task"] for index in range(len(data))]
    assert tasks == [other[index]["task"] for index in reversed(range(len(other)))][::-1]
    assert all(len(set(tasks[at : at + 4])) == 1 for at in range(0, 80, 4))
    data.set_epoch(1)
    assert tasks != [data[index]["task"] for index in range(len(data))]
    assert len(mixture()) == 8 * 4  # ceil(29 / 4) batches


def test_batches_of_several_tasks_and_impossible_mixtures_are_refused():
    data = mixture(batches=20)
    first = next(at for at in range(80) if data[at]["task"] != data[at + 1]["task"])
    with pytest.raises(ValueError, match=r"tasks \['cola', 'rte'\], and every batch is of one"):
        TaskCollator(collate)([data[first], data[first + 1]])
    with pytest.raises(ValueError, match="every batch is of one"):
        TaskCollator(collate)([Sentences(1, 1)[0]])
    with pytest.raises(ValueError, match="none of them empty"):
        TaskMixture({"a": []}, 4)
    for options in ({"batch": 0}, {"temperature": 0.0}, {"batches": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}="):
            mixture(**options)
    with pytest.raises(IndexError):
        data[80]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ()}, r"Hypernetwork\.tasks=\(\)"),
        ({"tasks": ("a", "a")}, r"Hypernetwork\.tasks="),
        ({"tasks": "rte"}, r"Hypernetwork\.tasks="),
    ],
)
def test_tasks_without_names_of_their_own_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Hypernetwork(**options)


def test_a_reduction_beyond_the_outputs_is_refused_by_the_module():
    with pytest.raises(ValueError, match=r"reduction=64 leaves no width for the 32 outputs of 'model\.layers\.0"):
        adapted(reduction=64)


def test_bottlenecks_with_a_norm_are_no_maps():
    torch.manual_seed(0)
    form = Bottleneck(3, activation="identity", norm=True)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), StructuredConfig(form=form, target_modules=["0"]))
    layer = structured_layers(model)[0]
    held = {name: tensor.detach().double() for name, tensor in layer.form_tensors("default").items()}
    x = torch.randn(5, 4)
    y = layer.base_layer(x).double()
    found = (y @ held["down_matrix"].t()) @ held["up_matrix"].t()
    torch.testing.assert_close(layer(x).double(), y + normed(found, 1e-5), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no change of it"):
        model.merge_adapter()


def test_rows_are_both_of_the_papers():
    assert methods.get("hyperformer", tasks=["a", "b"]).config.form == Hypernetwork(("a", "b"), 32, "position")
    assert methods.get("hyperformer++").config.form == Hypernetwork(generators="shared")
