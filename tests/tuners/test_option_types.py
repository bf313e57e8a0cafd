"""Whatever a config file holds: an option of the wrong type is refused by its name, and never read as another."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny
from peft import PeftModel, get_peft_model

from hf_sparse_peft import (
    SM3,
    AccumulatedGradient,
    Allocate,
    AlternateModules,
    FactorExperts,
    FactorMaskConfig,
    Freeze,
    Gradient,
    KernelLoraConfig,
    L1Penalty,
    LowRankMagnitude,
    NuclearNorm,
    Prune,
    Regrow,
    SampleLayers,
    SearchSupport,
    SparseLoraConfig,
    StructureConfig,
)
from hf_sparse_peft.hub import check_adapter
from hf_sparse_peft.rules import Age

NESTED = [
    Allocate, FactorExperts, FactorMaskConfig, Freeze, AlternateModules, L1Penalty, SampleLayers,
    NuclearNorm, Prune, Regrow, StructureConfig, SearchSupport,
    AccumulatedGradient, Gradient, LowRankMagnitude, SM3, Age,
]  # fmt: skip
NEEDED = {StructureConfig: {"modules": ["q_proj"]}}
JUNK = [
    "false", "0.1", "", 2.5, True, -1, 10**400, math.nan, math.inf, None, [], [1], ["a", 2], {}, {"a": "b"},
    {"q_proj": math.nan}, {"q_proj": "8"}, {"q_proj": True}, [[]], {"type": {}}, object(), np.float32(1.0),
]  # fmt: skip


def options(cls):
    return [field.name for field in dataclasses.fields(cls) if field.init]


@pytest.mark.parametrize("cls", [*NESTED, SparseLoraConfig, KernelLoraConfig])
def test_any_value_of_any_option_is_taken_or_refused_by_its_name(cls):
    taken, unnamed = 0, []
    for name in options(cls):
        for value in JUNK:
            try:
                cls(**{**NEEDED.get(cls, {}), name: value})
                taken += 1
            except ValueError as error:  # upstream says "task type"
                if name not in str(error) and name.replace("_", " ") not in str(error):
                    unnamed.append((name, value, str(error)))
    assert not unnamed
    assert taken < 0.5 * len(options(cls)) * len(JUNK), "hardly anything is refused"


SPARSE = [
    ("use_rslora", "false"), ("use_rslora", 1), ("use_rslora", None), ("lora_alpha", math.nan), ("lora_alpha", "16"),
    ("lora_alpha", math.inf), ("lora_alpha", True), ("r", 2.0), ("r", "2"), ("r", True), ("r", None),
    ("density", "0.1"),
    ("density", True), ("density", math.nan), ("seed", 1.5), ("block_size", 8.0), ("lora_dropout", "0"),
    ("budget", {"type": "numbers", "numbers": 3.0}), ("budget", {"type": "units_per_module", "units": "all"}),
    ("budget", {"type": "rank_equivalent", "rank": True}), ("rank_pattern", ["q_proj"]),
    ("rank_pattern", {"q_proj": 2.0}), ("rank_pattern", {"q_proj": -1}), ("rank_pattern", {"(": 1}),
    ("alpha_pattern", {"q_proj": math.nan}), ("alpha_pattern", {"[": 1.0}),
    ("budget", {"type": "by_module", "densities": {"q_proj": "1"}}),
    ("sizes", {"q_proj": [-4, 3, 2]}), ("sizes", {"q_proj": [1.5, 2, 2]}), ("sizes", {"q_proj": [4, 4]}),
    ("granularity_pattern", {"q_proj": 1}), ("structures", {}), ("structures", ["q_proj"]), ("criterion", 5),
    ("criterion", {"type": "fisher", "examples": "8"}),
    ("target_modules", 5), ("target_modules", [5]), ("exclude_modules", "("),
    ("layers_to_transform", "1"), ("layers_to_transform", [True]), ("modules_to_save", "score"),
    ("modules_to_save", ["(a+)+"]), ("inference_mode", "yes"), ("training_finished", "no"), ("compact_tolerance", "0"),
    ("values_dtype", "int8"), ("bias", True), ("schedule", "rigl"), ("schedule", [{"type": "regrow", "every": "20"}]),
    ("schedule", [{"type": "regrow", "fraction": math.nan}]), ("schedule", [{"type": "prune", "scope": "all"}]),
    ("schedule", [{"type": "allocate", "every": 2.0}]),
    ("schedule", [{"type": "sample_layers", "layers_pattern": "(a+)+"}]),
    ("saved_base_weights", "lm_head"), ("base_overrides", [64]),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapter")
    get_peft_model(
        tiny.llama(layers=1), SparseLoraConfig(r=2, density=0.05, target_modules=["q_proj"])
    ).save_pretrained(place)
    return place


@pytest.mark.parametrize(("name", "value"), SPARSE, ids=lambda value: str(value)[:40])
def test_option_of_the_wrong_type_in_a_file_is_refused_by_every_reader(folder, name, value):
    file = folder / "adapter_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), name: value}))
    base = tiny.llama(layers=1)
    try:
        for read in (
            check_adapter,
            SparseLoraConfig.from_pretrained,
            lambda place: PeftModel.from_pretrained(base, place),
        ):
            with pytest.raises(ValueError, match=name):
                read(folder)
        with pytest.raises(ValueError, match=name):
            base.load_adapter(str(folder))
    finally:
        file.write_text(before)
    assert not any("Sparse" in type(module).__name__ for module in base.modules())


def test_integers_are_floats_and_tuples_are_lists():
    config = SparseLoraConfig(lora_alpha=16, density=1, target_modules=("q_proj", "v_proj"), rank_pattern={"q_proj": 0})
    assert config.target_modules == {"q_proj", "v_proj"}
    assert SparseLoraConfig(criterion={"type": "low_rank_magnitude", "rank": 4}).criterion.rank == 4
    with pytest.raises(ValueError, match=r"criterion.*LowRankMagnitude.rank='4'"):
        SparseLoraConfig(criterion={"type": "low_rank_magnitude", "rank": "4"})
