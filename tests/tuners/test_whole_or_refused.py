"""A file is whole or it is refused, on every path that reads one, and a refused load leaves the model bit for bit."""

import contextlib
import json
import shutil
import warnings

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM, LlamaForSequenceClassification

from hf_sparse_peft import (
    AccumulatedGradient,
    Allocate,
    AverageRank,
    ByModule,
    KernelLoraConfig,
    Regrow,
    SparseLoraConfig,
    callbacks_for,
)
from hf_sparse_peft.cli import main as command_line
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners import FactorMaskConfig
from hf_sparse_peft.utils.checksums import save_checked

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def base(cls=LlamaForCausalLM, **options):
    return tiny.llama(cls, layers=1, **options).eval()


def config(cls=SparseLoraConfig, **options):
    defaults = {"r": 2, "target_modules": ["q_proj"]}
    return cls(
        **{**defaults, **({"density": 0.05} if cls is SparseLoraConfig and "budget" not in options else {}), **options}
    )


@torch.no_grad()
def fill(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def save(folder, model_base=None, **options):
    model = get_peft_model(model_base or base(), config(**options))
    fill(model)
    model.save_pretrained(folder)
    return model.eval()


def edit(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_checked(tensors, folder / WEIGHTS, {"format": "pt"})


def edit_config(folder, **options):
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def state(model):
    """Everything a refused load could have left: tensors, flags, modules, active adapters."""
    tensors = {
        name: (tensor.detach().clone(), tensor.requires_grad, tensor.dtype)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    modules = [(name, type(module), module.training) for name, module in model.named_modules()]
    configs = {name: one.to_dict() for name, one in (getattr(model, "peft_config", None) or {}).items()}
    active = [getattr(module, "_active_adapter", None) for module in model.modules()]
    return tensors, modules, configs, active


def same(before, after):
    (tensors, *rest), (now, *others) = before, after
    bits = all(
        now[name][1:] == kept[1:] and now[name][0].nan_to_num(7).equal(kept[0].nan_to_num(7))
        for name, kept in tensors.items()
    )
    return list(tensors) == list(now) and bits and rest == others


def second(folder):
    model = get_peft_model(base(), config(), adapter_name="mine")
    fill(model, seed=5)
    return model, lambda: model.load_adapter(folder, "new")


def again(folder):
    model = get_peft_model(base(), config())
    fill(model, seed=5)
    return model, lambda: model.load_adapter(folder, "default", is_trainable=True)


def through_peft(folder):
    model = base().train()
    return model, lambda: PeftModel.from_pretrained(model, folder)


def through_peft_on_meta(folder):
    model = base()
    return model, lambda: PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True, is_trainable=True)


def through_transformers(folder):
    model = base()
    return model, lambda: model.load_adapter(str(folder))


def second_through_transformers(folder):
    model = base()
    model.add_adapter(config(), "mine")
    return model, lambda: model.load_adapter(str(folder), "new")


PATHS = [second, again, through_peft, through_peft_on_meta, through_transformers, second_through_transformers]


def refused_everywhere(folder, message, paths=PATHS, check=True):
    if check:
        with pytest.raises(ValueError, match=message):
            check_adapter(folder)
    for path in paths:
        model, load = path(folder)
        before = state(model)
        with pytest.raises(ValueError, match=message):
            load()
        assert same(before, state(model)), path.__name__
        assert (
            not hasattr(model, "_hf_peft_config_loaded")
            or getattr(model, "peft_config", None)
            or not (model._hf_peft_config_loaded)
        )


def swap(kind, change):
    key = f"{Q}.sparse_lora_{kind}"
    return lambda tensors: tensors.__setitem__(key, change(tensors[key]))


def first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


DAMAGES = {
    "A as int8": (swap("A", lambda t: t.to(torch.int8)), "sparse_lora_A"),
    "B as fp8": (swap("B", lambda t: t.to(torch.float8_e4m3fn)), "sparse_lora_B"),
    "B as complex": (swap("B", lambda t: t.to(torch.complex64)), "sparse_lora_B"),
    "values as bool": (swap("values", lambda t: t.bool()), "sparse_lora_values"),
    "values as int64": (swap("values", lambda t: t.long()), "sparse_lora_values"),
    "support as int8": (swap("support", lambda t: t.to(torch.int8)), "sparse_lora_support"),
    "support as floats": (swap("support", lambda t: t.float()), "sparse_lora_support"),
    "NaN in A": (swap("A", first(float("nan"))), "sparse_lora_A"),
    "inf in bf16 values": (swap("values", lambda t: first(float("-inf"))(t.bfloat16())), "sparse_lora_values"),
    "values above fp32": (swap("values", lambda t: first(1e300)(t.double())), "sparse_lora_values"),
    "B missing": (lambda t: t.pop(f"{Q}.sparse_lora_B"), "sparse_lora_B"),
    "low-rank half missing": (lambda t: [t.pop(f"{Q}.sparse_lora_{k}") for k in "AB"], "sparse_lora_A"),
    "support missing": (lambda t: t.pop(f"{Q}.sparse_lora_support"), "sparse_lora_support"),
    "gate that nothing asks for": (
        lambda t: t.update(
            {f"{Q}.sparse_lora_gate": torch.ones(2), f"{Q}.sparse_lora_rank_mask": torch.ones(2).byte()}
        ),
        "sparse_lora_gate",
    ),
    "map that nothing asks for": (
        lambda t: t.update({f"{Q}.sparse_lora_B_map": torch.ones(32, 2).byte()}), "sparse_lora_B_map",
    ),
    "tensor of another release": (lambda t: t.update({f"{Q}.sparse_lora_phase": torch.ones(1)}), "sparse_lora_phase"),
    "tensor of LoRA": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 32)}), "lora_A"),
    "the layer's own weight": (lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(32, 32)}), "base_layer"),
    "the base's head": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(64, 32)}), "lm_head.weight",
    ),
    "the base's head without prefix": (lambda t: t.update({"lm_head.weight": torch.zeros(64, 32)}), "lm_head.weight"),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(64, 32)}), "embed_tokens",
    ),
    "a norm": (lambda t: t.update({"base_model.model.model.norm.weight": torch.zeros(32)}), "norm.weight"),
    "a bias": (lambda t: t.update({f"{Q}.base_layer.bias": torch.zeros(32)}), "bias"),
    "another adapter's tensor": (
        lambda t: t.update({f"{Q}.sparse_lora_A.mine": torch.ones(2, 32)}), r"sparse_lora_A\.mine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_tensor_is_refused_by_name_on_every_path(tmp_path, damage):
    save(tmp_path)
    change, message = DAMAGES[damage]
    edit(tmp_path, change)
    refused_everywhere(tmp_path, message)


@pytest.mark.parametrize("cut", [0, 4, 0.5, -1])
def test_torn_file_names_itself_on_every_path(tmp_path, cut, capsys):
    save(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[: int(len(content) * cut) if isinstance(cut, float) else cut])
    refused_everywhere(tmp_path, "adapter_model.safetensors")
    assert command_line(["inspect", str(tmp_path)]) == 1
    assert WEIGHTS in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"peft_type": "SPARSE_LORA", "r": '])
def test_torn_config_names_itself(tmp_path, content):
    save(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    refused_everywhere(tmp_path, CONFIG)


def test_resume_from_a_torn_checkpoint_names_the_file_and_keeps_the_model(tmp_path):
    model = get_peft_model(base(), config())
    tiny.train(model, tmp_path, 2, save_strategy="steps", save_steps=1)
    file = tmp_path / "checkpoint-1" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    resumed = get_peft_model(base(), config())
    before = state(resumed)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is truncated"):
        tiny.train(resumed, tmp_path, 2, resume=str(tmp_path / "checkpoint-1"))
    assert same((before[0], [], [], []), (state(resumed)[0], [], [], []))


def test_pickled_weights_are_never_read(tmp_path):
    save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    refused_everywhere(tmp_path, "pickled")
    save_checked(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="use_safetensors=False"):
        base().load_adapter(str(tmp_path), use_safetensors=False)
    check_adapter(tmp_path)  # one lying beside is not looked at


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 10**9}, "sparse_lora_A"),
        ({"rank_pattern": {"k_proj": 10**9}, "target_modules": ["q_proj", "k_proj"]}, "k_proj"),
        ({"sizes": {"model.layers.0.self_attn.q_proj": [10**12, 10**12, 2]}}, "sparse_lora_values"),
        ({"density": 1.0}, "sparse_lora_values"),
        ({"density": 0.005, "budget": {"type": "numbers", "numbers": 10**15}}, "Numbers.numbers|sparse_lora_values"),
        ({"density": 0.005, "budget": {"type": "units_per_module", "units": 10**12}}, "units|sparse_lora_values"),
        ({"block_size": 10**9, "granularity": "block"}, "granularity"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"target_modules=.*v_proj"),
        ({"target_modules": ["v_proj"]}, "proj"),
        ({"gate": "zeros"}, "sparse_lora_gate"), ({"factor_masks": {}}, "sparse_lora_B_map"),
        ({"granularity": "row"}, "granularity"), ({"r": 3}, "sparse_lora_A"), ({"peft_type": "KERNEL_LORA"}, "."),
    ],
    ids=str,
)  # fmt: skip
def test_config_that_asks_for_more_than_the_file_holds_is_refused_before_it_is_allocated(tmp_path, options, message):
    save(tmp_path)
    edit_config(tmp_path, **options)
    fresh = [path for path in PATHS if path is not again]  # an adapter that is there keeps its own config
    refused_everywhere(tmp_path, message, fresh, check=False)


def test_surplus_and_missing_modules_are_named(tmp_path):
    model = get_peft_model(tiny.llama(layers=3), config())
    fill(model)
    model.save_pretrained(tmp_path)
    for path in PATHS:
        loaded, load = path(tmp_path)
        before = state(loaded)
        with pytest.raises(ValueError, match=r"layers\.1"):
            load()
        assert same(before, state(loaded))
    wider = tiny.llama(layers=4)
    with pytest.raises(ValueError, match=r"layers\.3\.self_attn\.q_proj"):
        PeftModel.from_pretrained(wider, tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(2, 32\).*\(2, 64\)"):
        tiny.llama(layers=3, hidden=64).load_adapter(str(tmp_path))


SCORE, HEAD = "base_model.model.score", "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(HEAD), "score"), (lambda t: t.update({HEAD: torch.full((3, 32), float("nan"))}), "score"),
        (lambda t: t.update({HEAD: torch.full((3, 32), float("inf"), dtype=torch.bfloat16)}), "score"),
        (lambda t: t.update({HEAD: torch.full((3, 32), float("nan"), dtype=torch.float16)}), "score"),
        (lambda t: t.update({HEAD: torch.zeros(5, 32)}), "score"),
        (lambda t: t.update({HEAD: torch.zeros(3, 32).long()}), "score"),
        (lambda t: t.update({f"{SCORE}.original_module.weight": torch.zeros(3, 32)}), "original_module"),
        (lambda t: t.update({f"{SCORE}.modules_to_save.mine.weight": torch.zeros(3, 32)}), r"modules_to_save\.mine"),
        (lambda t: t.update({f"{SCORE}.more": torch.zeros(3)}), r"score\.more"),
    ],
)  # fmt: skip
def test_damaged_head_is_refused_and_the_model_keeps_its_own(tmp_path, change, message):
    def classifier():
        return base(LlamaForSequenceClassification, num_labels=3)

    save(tmp_path, classifier(), modules_to_save=["score"])
    edit(tmp_path, change)
    fresh = classifier()
    trained = get_peft_model(classifier(), config(modules_to_save=["score"]))
    bare = classifier()
    for model, load in (
        (fresh, lambda: PeftModel.from_pretrained(fresh, tmp_path)),
        (trained, lambda: trained.load_adapter(tmp_path, "default", is_trainable=True)),
        (trained, lambda: trained.load_adapter(tmp_path, "new")),
        (bare, lambda: bare.load_adapter(str(tmp_path))),
    ):
        before = state(model)
        with pytest.raises(ValueError, match=message):
            load()
        assert same(before, state(model))


def test_head_that_overflows_the_models_dtype_is_refused(tmp_path):
    model = get_peft_model(base(LlamaForSequenceClassification, num_labels=3), config(modules_to_save=["score"]))
    model.save_pretrained(tmp_path)
    edit(tmp_path, lambda t: t.update({HEAD: torch.full((3, 32), 1e6)}))
    half = base(LlamaForSequenceClassification, num_labels=3, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"score.*float16"):
        PeftModel.from_pretrained(half, tmp_path, autocast_adapter_dtype=False)


@pytest.mark.parametrize("bias", ["all", "sparse_lora_only"])
def test_biases_are_loaded_where_the_config_trains_them_and_missed_where_they_are_not_there(tmp_path, bias):
    def biased():
        return base(attention_bias=True)

    model = save(tmp_path, biased(), bias=bias)
    for load in (
        lambda: PeftModel.from_pretrained(biased(), tmp_path),
        lambda: _through_transformers(biased(), tmp_path),
    ):
        assert torch.equal(_logits(load()), _logits(model))
    edit(tmp_path, lambda t: t.pop(f"{Q}.base_layer.bias"))
    with pytest.raises(ValueError, match=r"q_proj\.base_layer\.bias' is missing"):
        PeftModel.from_pretrained(biased(), tmp_path)


@pytest.mark.parametrize("bias", ["none", "all", "sparse_lora_only"])
def test_heads_with_biases_are_loaded_on_every_path(tmp_path, bias):
    def classifier():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
        return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()

    options = {"bias": bias, "target_modules": ["query"], "modules_to_save": ["pooler", "classifier"]}
    model = save(tmp_path, classifier(), **options)
    check_adapter(tmp_path)
    resumed = get_peft_model(classifier(), config(**options))
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    loaded = [PeftModel.from_pretrained(classifier(), tmp_path, low_cpu_mem_usage=meta) for meta in (False, True)]
    assert all(torch.equal(_logits(one), _logits(model)) for one in (resumed, *loaded))
    bare = _through_transformers(classifier(), tmp_path).state_dict()
    for key, tensor in model.state_dict().items():
        assert bare[key.removeprefix("base_model.model.")].equal(tensor), key


@pytest.mark.parametrize("path", ["fresh", "resumed"])
def test_adapted_output_embedding_is_loaded_with_the_base_weight_that_peft_saves_beside_it(tmp_path, path):
    targets = {"target_modules": ["q_proj", "lm_head"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = save(tmp_path, **targets)
    check_adapter(tmp_path)
    if path == "fresh":
        loaded = PeftModel.from_pretrained(base(), tmp_path)
    else:
        loaded = get_peft_model(base(), config(**targets))
        loaded.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(_logits(loaded), _logits(model))


def _through_transformers(model, folder):
    model.load_adapter(str(folder))
    return model


def _logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 9)[None]).logits


def test_embeddings_of_a_resized_vocabulary_are_declared_and_loaded(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(70)
    model = get_peft_model(model, config())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "a")
    declared = json.loads((tmp_path / "a" / CONFIG).read_text())["saved_base_weights"]
    assert declared == ["base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"]
    check_adapter(tmp_path / "a")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.resize_token_embeddings(70)
    assert torch.equal(_logits(PeftModel.from_pretrained(again, tmp_path / "a")), _logits(model))
    edit_config(tmp_path / "a", saved_base_weights=None)
    with pytest.raises(ValueError, match=r"embed_tokens|lm_head"):
        check_adapter(tmp_path / "a")


CASES = {
    "hybrid": {}, "sparse": {"r": 0}, "low rank": {"density": 0.0}, "bf16": {"values_dtype": "bfloat16"},
    "rows": {"granularity": "row", "density": 0.1}, "blocks": {"granularity": "block", "block_size": 8, "density": 0.2},
    "gated": {"schedule": [Allocate(budget=AverageRank(1))]}, "masked": {"factor_masks": FactorMaskConfig()},
    "experts": {"factor_masks": FactorMaskConfig(kind="stochastic")},
    "moving": {"schedule": [Regrow(every=2, grow=AccumulatedGradient(steps=1))]},
    "no module": {"budget": ByModule({"q_proj": 0.0})},
    "kernel": {"cls": KernelLoraConfig, "kernel": "mixed"},
    "kernel budget": {"cls": KernelLoraConfig, "schedule": [tiny.kernel_allocation()]},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_whole_file_gives_the_same_logits_on_every_path(tmp_path, case):
    model = save(tmp_path, **CASES[case])
    check_adapter(tmp_path)
    for path in (through_peft, through_peft_on_meta):
        loaded = path(tmp_path)[1]()
        assert torch.equal(_logits(loaded), _logits(PeftModel.from_pretrained(base(), tmp_path)))
    if case != "bf16":
        assert torch.equal(_logits(loaded), _logits(model))
    bare, load = through_transformers(tmp_path)
    load()
    assert torch.equal(_logits(bare), _logits(loaded))
    masters = [p for name, p in bare.named_parameters() if "_lora_" in name]
    assert {p.dtype for p in masters} == {torch.float32}


def test_checkpoint_of_a_running_schedule_with_another_runs_state_is_refused(tmp_path):
    options = {"schedule": [Regrow(every=2, grow=AccumulatedGradient(steps=1))]}
    model = get_peft_model(base(), config(**options))
    tiny.train(model, tmp_path, 2, callbacks=callbacks_for(model), save_strategy="steps", save_steps=1)
    place = tmp_path / "checkpoint-1"
    for wrong in (lambda t: t[:-1].clone(), lambda t: t.float(), lambda t: t[None].clone()):
        broken = shutil.copytree(place, tmp_path / "broken", dirs_exist_ok=True)
        edit(
            broken,
            lambda t, wrong=wrong: t.update(
                {f"{Q}.sparse_lora_rule_candidates": wrong(t[f"{Q}.sparse_lora_rule_candidates"])}
            ),
        )
        other = get_peft_model(base(), config(**options))
        before = state(other)
        with pytest.raises(ValueError, match="sparse_lora_rule_candidates"):
            other.load_adapter(broken, "default", is_trainable=True)
        assert same(before, state(other))


@st.composite
def mutations(draw):
    kind = draw(st.sampled_from(["byte", "drop", "dtype", "shape", "rename", "copy", "transpose"]))
    return kind, draw(st.integers(0, 10**6)), draw(st.integers(1, 255)), draw(st.integers(0, 5))


DTYPES = [torch.int8, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64]


def mutate(content, tensors, mutation):
    """The bytes of a file that was mutated."""
    kind, place, flip, choice = mutation
    if kind == "byte":
        at = place % len(content)
        return content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
    key = sorted(tensors)[place % len(tensors)]
    if kind == "drop":
        del tensors[key]
    elif kind == "dtype":
        tensors[key] = tensors[key].to(DTYPES[choice])
    elif kind == "shape":
        tensors[key] = tensors[key][:-1].clone()
    elif kind == "transpose":
        tensors[key] = tensors[key].t().contiguous() if tensors[key].ndim == 2 else tensors[key].flip(0)
    elif kind == "rename":
        tensors[key[:choice] + key[choice + 1 :]] = tensors.pop(key)
    else:
        tensors[key + "x"[: choice % 2] + ".0"] = tensors[key].clone()
    return None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    place = tmp_path_factory.mktemp("small")
    save(place, granularity="row", density=0.1)
    return place


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mutation=mutations())
def test_any_mutation_is_refused_everywhere_with_the_model_as_it_was_or_loads_alike_everywhere(
    small, tmp_path_factory, mutation
):
    folder = shutil.copytree(small, tmp_path_factory.mktemp("mutated") / "a")
    tensors = load_file(folder / WEIGHTS)
    content = mutate((folder / WEIGHTS).read_bytes(), tensors, mutation)
    if content is None:
        save_checked(tensors, folder / WEIGHTS, {"format": "pt"})
    else:
        (folder / WEIGHTS).write_bytes(content)
    checked = True
    try:
        check_adapter(folder)
    except ValueError:
        checked = False
    loaded = []
    for path in (through_peft, through_transformers, again):
        if path is again:
            model = get_peft_model(base(), config(granularity="row", density=0.1))
            load = lambda model=model: model.load_adapter(folder, "default")  # noqa: E731
        else:
            model, load = path(folder)
        before = state(model)
        with contextlib.suppress(ValueError):
            result = load()
            loaded.append(_logits(result if path is through_peft else model))
            continue
        assert same(before, state(model)), path.__name__
    assert len(loaded) in (0, 3), "the paths do not agree"
    assert checked or not loaded, "a loader takes what the checker refuses"
    assert all(one.equal(loaded[0]) for one in loaded)
