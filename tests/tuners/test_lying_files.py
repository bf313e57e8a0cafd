"""Headers that lie, pickles, support files, hub repositories, interrupts: what stands behind every loading path."""

import json
import pickle
import struct
import threading

import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_sparse_peft import SparseLoraConfig, SparseLoraModel, load_support, save_support
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners.shared import loading
from hf_sparse_peft.utils.checksums import save_checked

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def base():
    return tiny.llama(layers=1)


def config(**options):
    return SparseLoraConfig(**{"r": 2, "density": 0.05, "target_modules": ["q_proj"], **options})


@pytest.fixture
def folder(tmp_path):
    get_peft_model(base(), config()).save_pretrained(tmp_path)
    return tmp_path


def state(model):
    tensors = {n: (t.clone(), t.requires_grad) for n, t in model.state_dict(keep_vars=True).items()}
    return tensors, [(name, type(module), module.training) for name, module in model.named_modules()]


def same(before, after):
    bits = all(after[0][n][0].equal(t) and after[0][n][1] == flag for n, (t, flag) in before[0].items())
    return list(before[0]) == list(after[0]) and bits and before[1] == after[1]


def entry(header):
    return header[next(key for key in header if key[0] != "_")]


HEADERS = {
    "offsets that are strings": lambda h: entry(h).update(data_offsets=["a", "b"]),
    "negative offsets": lambda h: entry(h).update(data_offsets=[-8, 0]),
    "a shape that is not there": lambda h: entry(h).update(shape=[10**15]),
    "a negative shape": lambda h: entry(h).update(shape=[-1]),
    "a dtype that is none": lambda h: entry(h).update(dtype="F12"),
    "an entry that is a list": lambda h: h.update({next(k for k in h if k[0] != "_"): []}),
    "two tensors in one place": lambda h: h.update(zzz=dict(entry(h))),
    "metadata that is a number": lambda h: h.update(__metadata__=5),
}


@pytest.mark.parametrize("lie", HEADERS)
def test_header_that_lies_names_the_file(folder, lie):
    content = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    HEADERS[lie](header)
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    refused(folder)


@pytest.mark.parametrize(
    "content", [struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", 10**5) + b"[" * 10**5, struct.pack("<Q", 2) + b"[]"]
)  # fmt: skip
def test_header_of_another_kind_names_the_file(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff\xfe", b"5"])
def test_config_of_another_kind_names_the_file(folder, content):
    (folder / CONFIG).write_bytes(content)
    refused(folder, CONFIG)


def refused(folder, name=WEIGHTS):
    with pytest.raises(ValueError, match=name):
        check_adapter(folder)
    model = base()
    before = state(model)
    for load in (lambda: PeftModel.from_pretrained(model, folder), lambda: model.load_adapter(str(folder))):
        with pytest.raises(ValueError, match=name):
            load()
        assert same(before, state(model))


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def test_pickle_in_a_repository_is_not_read(folder, monkeypatch):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))

    def download(repo, name, **kwargs):
        if not (folder / name).is_file():
            raise FileNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(loading, "hf_hub_download", download)
    model = base()
    before = state(model)
    for load in (lambda: PeftModel.from_pretrained(model, "me/adapter"), lambda: model.load_adapter("me/adapter")):
        with pytest.raises(ValueError, match=r"no adapter_model\.safetensors.*pickled and never read"):
            load()
        assert same(before, state(model))


@pytest.mark.parametrize("damage", ["half", "empty", "bit", "floats", "about", "no about", "about a list"])
def test_damaged_support_file_is_refused_by_name_and_chooses_nothing(tmp_path, damage):
    file = tmp_path / "support.safetensors"
    save_support(get_peft_model(base(), config()), file)
    content, tensors = file.read_bytes(), load_file(file)
    meta = {"format": "hf_sparse_peft.support", "version": "1"}
    writes = {
        "half": lambda: file.write_bytes(content[: len(content) // 2]),
        "empty": lambda: file.write_bytes(b""),
        "bit": lambda: file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]),
        "floats": lambda: save_checked({k: t.float() for k, t in tensors.items()}, file, {**meta, "about": "{}"}),
        "about": lambda: save_checked(tensors, file, {**meta, "about": "{"}),
        "no about": lambda: save_checked(tensors, file, meta),
        "about a list": lambda: save_checked(tensors, file, {**meta, "about": "[]"}),
    }
    writes[damage]()
    model = get_peft_model(base(), config(criterion="given"))
    before = state(model)
    with pytest.raises(ValueError, match=r"support\.safetensors"):
        load_support(model, file)
    assert same(before, state(model))


@pytest.mark.parametrize("where", ["peft", "existing", "transformers"])
def test_interrupted_load_leaves_the_model(folder, monkeypatch, where):
    model = get_peft_model(base(), config()) if where == "existing" else base()
    before = state(model)

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(SparseLoraModel, "_remap_adapter_state_dict_for_load", interrupt)
    loads = {
        "peft": lambda: PeftModel.from_pretrained(model, folder),
        "existing": lambda: model.load_adapter(folder, "new"),
        "transformers": lambda: model.load_adapter(str(folder)),
    }
    with pytest.raises(KeyboardInterrupt):
        loads[where]()
    assert same(before, state(model))
    monkeypatch.undo()
    loads[where]()  # and the second try works


def test_thread_that_loads_does_not_disturb_one_that_adds(folder, monkeypatch):
    entered, go_on, failures = threading.Event(), threading.Event(), []
    original = SparseLoraModel._remap_adapter_state_dict_for_load.__func__

    def wait(cls, *args, **kwargs):
        entered.set()
        go_on.wait(20)
        return original(cls, *args, **kwargs)

    def load():
        try:
            PeftModel.from_pretrained(base(), folder)
        except Exception as error:
            failures.append(error)

    monkeypatch.setattr(SparseLoraModel, "_remap_adapter_state_dict_for_load", classmethod(wait))
    thread = threading.Thread(target=load)
    thread.start()
    assert entered.wait(20)
    get_peft_model(base(), config(r=7, target_modules=["v_proj"]))  # not what the other thread's file holds
    go_on.set()
    thread.join(20)
    assert not failures


def test_automatic_classes_refuse_and_load(tmp_path):
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a")
    for cls in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        cls.from_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_checked(
        {key: t for key, t in tensors.items() if not key.endswith("_B")}, tmp_path / "a" / WEIGHTS, {"format": "pt"}
    )
    for cls in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="sparse_lora_B' is missing"):
            cls.from_pretrained(tmp_path / "a")


def test_state_dict_given_to_transformers_is_checked_like_a_file(folder):
    tensors = load_file(folder / WEIGHTS)
    model = base()
    model.load_adapter(peft_config=config(), adapter_state_dict=dict(tensors))
    key = next(key for key in tensors if key.endswith("_A"))
    tensors[key][0] = float("nan")
    model = base()
    before = state(model)
    with pytest.raises(ValueError, match="sparse_lora_A"):
        model.load_adapter(peft_config=config(), adapter_state_dict=tensors)
    assert same(before, state(model))


def test_adapters_of_other_kinds_load_as_ever_and_are_not_mixed_up(folder, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    place = tmp_path / "lora"
    get_peft_model(base(), lora).save_pretrained(place)
    PeftModel.from_pretrained(base(), place)
    base().load_adapter(str(place))
    with pytest.raises(ValueError, match="SPARSE_LORA"):
        get_peft_model(base(), lora).load_adapter(folder, "default")
    with pytest.raises(ValueError, match="sparse_lora_"):
        get_peft_model(base(), config()).load_adapter(place, "default")
    with pytest.raises(ValueError, match="LORA"):
        check_adapter(place)


def test_weights_without_a_config_are_checked_by_the_adapters_own(folder):
    (folder / CONFIG).unlink()
    model = get_peft_model(base(), config(seed=3))
    model.load_adapter(folder, "default")
    with pytest.raises(ValueError, match=WEIGHTS):
        get_peft_model(base(), config(r=3)).load_adapter(folder, "default")


@pytest.mark.parametrize("kind", ["nf4", "bf16"])
def test_refused_load_leaves_quantised_and_half_precision_bases(tmp_path, kind):
    model = get_peft_model(tiny.base(kind), config())
    model.save_pretrained(tmp_path)
    assert {p.dtype for n, p in model.named_parameters() if "sparse_lora" in n} == {torch.float32}
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("_support"))
    tensors[key][30] ^= 1
    save_checked(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    fresh = tiny.base(kind)
    before = state(fresh)
    for load in (lambda: PeftModel.from_pretrained(fresh, tmp_path), lambda: fresh.load_adapter(str(tmp_path))):
        with pytest.raises(ValueError, match="checksum"):
            load()
        assert same(before, state(fresh))


def test_existing_values_stay_when_a_state_dict_is_refused(folder):
    model = get_peft_model(base(), config())
    tensors = load_file(folder / WEIGHTS)
    before = state(model)
    for key in ("base_model.model.lm_head.weight", next(iter(tensors)).replace("q_proj", "k_proj")):
        with pytest.raises(ValueError, match=key.rpartition(".")[0]):
            set_peft_model_state_dict(model, {**tensors, key: torch.zeros(64, 32)})
        assert same(before, state(model))
