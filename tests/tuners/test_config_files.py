"""`adapter_config.json`: short, the same bytes every time, and open to options of newer releases and of plugins."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import processes
import pytest
import tiny
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_peft import Budget, KernelLoraConfig, Prune, SparseLoraConfig, callbacks_for, register_part
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.tuners import adapter_layers

CONFIG = "adapter_config.json"
NEEDED = {"peft_type", "peft_version", "base_model_name_or_path", "task_type", "target_modules", "install_hint"}
NEWER = {
    "an_option_of_tomorrow": {"b": [1, 2], "a": None},
    "another": 3,
}
RULE = {"type": "rule_of_a_plugin", "every": 20}
UNKNOWN = [{"another": 3}, {"schedule": [RULE]}, {"criterion": {"type": "score_of_a_plugin", "beta": 0.5}}]


def written(config, folder) -> dict:
    config.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text())


def adapter(folder, **options):
    config = SparseLoraConfig(**{"r": 2, "density": 0.05, "target_modules": ["q_proj", "v_proj"], **options})
    model = get_peft_model(tiny.llama(layers=1), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "sparse_lora" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(8)[None]).logits


def change(folder, **options) -> dict:
    """The file with `options` added, as written."""
    given = {**json.loads((folder / CONFIG).read_text()), **options}
    (folder / CONFIG).write_text(json.dumps(given))
    return given


@pytest.mark.parametrize("cls", [SparseLoraConfig, KernelLoraConfig])
def test_a_file_has_what_is_not_at_its_default_and_what_readers_look_for(cls, tmp_path):
    assert set(written(cls(), tmp_path)) == NEEDED
    given = written(cls(r=4, seed=3) if cls is SparseLoraConfig else cls(r=4), tmp_path)
    assert set(given) - NEEDED == ({"r", "seed"} if cls is SparseLoraConfig else {"r"})


def test_a_config_comes_back_equal_from_its_file(tmp_path):
    config = SparseLoraConfig(
        r=0, density=0.1, target_modules=["v_proj", "q_proj"], rank_pattern={"q_proj": 2}, schedule=[Prune()],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == config


def test_files_are_the_same_in_every_process(tmp_path):
    names = [f"module_{number}" for number in range(20)]
    code = (
        f"from hf_sparse_peft import SparseLoraConfig as C; C(target_modules={names}, exclude_modules={names})"
        f".save_pretrained({str(tmp_path / 'there')!r}); print(hash('a'))"
    )
    done = processes.python("-c", code, check=True)
    assert int(done.stdout) != hash("a"), "sets are in one order in both processes"
    SparseLoraConfig(target_modules=names, exclude_modules=names).save_pretrained(tmp_path / "here")
    assert (tmp_path / "here" / CONFIG).read_bytes() == (tmp_path / "there" / CONFIG).read_bytes()


def test_every_loader_reads_a_short_file(tmp_path):
    base = tmp_path / "base"
    tiny.llama(layers=1).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(
        model, SparseLoraConfig(r=0, density=0.05, target_modules=["q_proj"], task_type="CAUSAL_LM", seed=1)
    )
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.sparse_lora_values["default"])
    place = tmp_path / "adapter"
    model.save_pretrained(place)
    assert set(json.loads((place / CONFIG).read_text())) == NEEDED | {
        "r",
        "density",
        "inference_mode",
        "seed",
        "base_overrides",
    }
    expected = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(base)
    plain.load_adapter(str(place))
    for loaded in (
        AutoPeftModelForCausalLM.from_pretrained(place),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place),
        AutoModelForCausalLM.from_pretrained(place),
        plain,
    ):
        assert torch.equal(logits(loaded), expected)
    assert check_adapter(place).config.seed == 1


def test_options_of_a_newer_release_load_for_inference_and_are_saved_as_they_were(tmp_path):
    expected = logits(adapter(tmp_path))
    given = change(tmp_path, **NEWER, schedule=[RULE, {"type": "prune", "option_of_tomorrow": 1}])
    with pytest.warns(UserWarning, match="'an_option_of_tomorrow', 'another'"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.unknown_options == NEWER
    assert written(config, tmp_path / "config") == given
    model = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == given
    plain = tiny.llama(layers=1)
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)
    plain.save_pretrained(tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / CONFIG).read_text()) == given
    assert check_adapter(tmp_path).config == config


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("unknown", UNKNOWN, ids=[next(iter(one)) for one in UNKNOWN])
def test_what_is_unknown_refuses_training_by_name(unknown, finished, tmp_path):
    expected = logits(adapter(tmp_path))
    given = change(tmp_path, **unknown, training_finished=finished)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)), expected)
    saved = written(PeftConfig.from_pretrained(tmp_path), tmp_path / "again")
    assert saved == {name: value for name, value in given.items() if name != "training_finished" or finished}
    name = "another" if "another" in unknown else "of_a_plugin"
    model = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=name):
        model.train()(input_ids=torch.arange(8)[None])
    with pytest.raises(ValueError, match=name):
        tiny.train(model, tmp_path / "run", steps=1, callbacks=callbacks_for(model))
    frozen = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)
    frozen.train()(input_ids=torch.arange(8)[None])


def test_a_misspelt_option_in_code_is_refused():
    with pytest.raises(TypeError, match="densty"):
        SparseLoraConfig(densty=0.1)
    with pytest.raises(ValueError, match=r"schedule\[0\].*'prun'"):
        SparseLoraConfig(schedule=[{"type": "prun"}])
    with pytest.raises(ValueError, match=r"criterion.*no option \['ranks'\]"):
        SparseLoraConfig(criterion={"type": "low_rank_magnitude", "ranks": 3})


def test_an_unknown_score_in_a_config_of_a_file_chooses_no_first_support(tmp_path):
    change_of = {"criterion": {"type": "score_of_a_plugin"}}
    written(SparseLoraConfig(r=0, target_modules=["q_proj"]), tmp_path)
    change(tmp_path, **change_of)
    with pytest.raises(ValueError, match="score_of_a_plugin"):
        logits(get_peft_model(tiny.llama(layers=1), PeftConfig.from_pretrained(tmp_path)))


@register_part("test_square_root")
@dataclass(frozen=True)
class SquareRoot(Budget):
    """A budget from outside the package."""

    def counts(self, targets):
        return {name: math.isqrt(grid.num_units) for name, grid in targets.grids.items()}


def test_a_registered_budget_sizes_supports_and_its_files_load_where_it_is_unknown(tmp_path):
    model = adapter(tmp_path, r=0, budget="test_square_root", **{"density": 0.005})
    sizes = {name: len(units) for name, units in supports(model).items()}
    assert set(sizes.values()) == {32, 22}
    assert PeftConfig.from_pretrained(tmp_path).budget == SquareRoot()
    given = change(tmp_path, budget={"type": "budget_of_a_plugin", "power": 0.5})
    loaded = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / CONFIG).read_text()) == given
    model = PeftModel.from_pretrained(tiny.llama(layers=1), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match="budget_of_a_plugin"):
        model.train()(input_ids=torch.arange(8)[None])


def supports(model) -> dict[str, list[int]]:
    return {layer.module_name: layer.units("default").tolist() for layer in adapter_layers(model)}
