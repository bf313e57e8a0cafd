"""Which tests of peft are run, and with what configs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_sparse_peft import (
    FactoredConfig,
    KernelLoraConfig,
    MaskedLoraConfig,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
)
from hf_sparse_peft.tuners.factored import FixedRank
from hf_sparse_peft.tuners.spectral_lora import Full
from hf_sparse_peft.tuners.structured import ScaleShift


@dataclass(frozen=True)
class Tuner:
    """A config class, and the options that the models of peft's tests need: layers of 10 x 20 and 20 x 2 numbers."""

    config_cls: type
    options: dict[str, Any]
    random: dict[str, Any]
    """Options that start it with an update that is not 0."""

    @property
    def name(self) -> str:
        """Its name, as files have it."""
        return self.config_cls.tuner


TUNERS = {
    one.name: one
    for one in (
        Tuner(SparseLoraConfig, {"r": 2, "density": 0.2}, {"init_weights": False}),
        Tuner(KernelLoraConfig, {"r": 4}, {"init_weights": False}),
        Tuner(SpectralLoraConfig, {"r": 2, "core": Full(init="zeros")}, {"core": Full(std=1.0)}),
        Tuner(MaskedLoraConfig, {"r": 2, "mask": "all"}, {"init_weights": False}),
        Tuner(FactoredConfig, {"rank": FixedRank(1), "keep_base": True}, {}),
        Tuner(StructuredConfig, {"form": ScaleShift(std=0.0)}, {"form": ScaleShift(std=0.5)}),
    )
}


@dataclass(frozen=True)
class Suite:
    """A file of peft's tests, and of those that name a config of peft the ones that are run with ours instead."""

    file: str
    substituted: tuple[str, ...] = ()
    """Beginnings of test names, `Class::function` or `function`."""
    replaces: tuple[str, ...] = ("LoraConfig",)
    """Names in the module that become ours in these."""
    leaves_out: tuple[str, ...] = ()
    """Of these, parts of names of tests and fixtures that need what only peft's method has."""


SUITES = {
    "custom": Suite(
        "test_custom_models",
        (
            "TestPeftCustomModel::test_add_adapter_rejects_duplicate_name",
            "TestPeftCustomModel::test_weight_bias_attributes",
            "TestPeftCustomModel::test_delete_adapter_with_multiple_adapters_works",
            "TestPeftCustomModel::test_delete_adapter_multiple_adapters_with_modules_to_save",
            "TestPeftCustomModel::test_multiple_adapters_mixed_modules_to_save_merging",
            "TestPeftCustomModel::test_multiple_adapters_same_modules_to_save_merging",
            "TestPeftCustomModel::test_existing_model_card",
            "TestPeftCustomModel::test_non_existing_model_card",
            "TestPeftCustomModel::test_ignore_mismatched_sizes_with_scalar",
        ),
    ),
    "decoder": Suite("test_decoder_models"),
    "encoder_decoder": Suite("test_encoder_decoder_models"),
    "features": Suite("test_feature_extraction_models"),
    "classifier": Suite("test_seq_classifier"),
    "tokens_and_spans": Suite("test_token_classification_qa"),
    "parameters": Suite("test_target_parameters"),
    "mixed": Suite("test_mixed", ("TestMixedAdapterTypes::",), ("LoHaConfig",)),
    "status": Suite(
        "test_tuners_utils",
        ("TestTargetedModuleNames::", "TestExcludedModuleNames::", "TestModelAndLayerStatus::"),
        leaves_out=(
            "large_model",
            "ia3",
            "gpu",
            "trainable_tokens",
            "realistic",
            "bnb",
            "loha",
            "vera",
            "prefix",
            "adaption",
            "target_parameters",
            "module_type",
            "nb_params",
            "model_type_small",
            "peft_types",
            "transformer",
            "with_modules_to_save",
        ),
    ),
    "low_level": Suite(
        "test_low_level_api",
        ("TestLowLevelFunctional::", "TestPeftStateDict::", "TestGetBaseModelStateDict::"),
        leaves_out=("test_inject_adapter_in_model", "test_modules_to_save", "named_like_peft_prefix"),
    ),
    "compile": Suite("test_torch_compile", ("TestTorchCompileCausalLM::",), leaves_out=("compile[", "mixed_batch")),
    "hotswap": Suite("test_initialization", ("TestHotSwapping::test_hotswap_works",), leaves_out=("conv2d", "ranks")),
}

MODELS = (
    "OPTForCausalLM", "GPT2LMHeadModel", "calibrated", "BertModel", "BertForSequenceClassification",
    "tiny-LlamaForSequenceClassification-3.2",
)  # fmt: skip
"""Ends of names of the models that are run, of those that peft's tests name."""

CUSTOM = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
]
"""Models of `test_custom_models`, and where they are adapted."""


def custom_cases(tuner: Tuner) -> list[tuple]:
    """Rows of `test_name, model_id, config_cls, config_kwargs`: peft's models of linear layers and Conv1D."""
    return [
        (f"{model} {at} {tuner.name}", model, tuner.config_cls, {**tuner.options, **targets})
        for at, (model, targets) in enumerate(CUSTOM)
        if tuner.name != "factored" or model == "MLP"  # of a weight of 1 x 5 a form saves nothing
    ]


def pairs_of_adapters(tuner: Tuner) -> list[tuple]:
    """Rows of `test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2`."""
    options = {**tuner.options, **tuner.random}
    seeds = (
        [{"seed": 1}, {"seed": 2}] if any(tuner.name == one for one in ("sparse_lora", "spectral_lora")) else [{}, {}]
    )
    places = {"same": ("lin0", "lin0"), "different": ("lin0", "lin1")}
    return [
        (
            f"{tuner.name} {name}", tuner.name, tuner.config_cls,
            *({**options, **seed, "target_modules": [at]} for at, seed in zip(place, seeds, strict=True)),
        )
        for name, place in places.items()
    ]  # fmt: skip


def parameter_cases(tuner: Tuner, model: str) -> list[tuple]:
    """Rows of `model_id, config_cls, config_kwargs` with `target_parameters`, where the tuner has them."""
    if not hasattr(tuner.config_cls, "target_parameters") or tuner.name != "sparse_lora":
        return []
    down, up = "mlp.experts.down_proj", "mlp.experts.gate_up_proj"
    targets = [
        ([], [down]), ([], ["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]), (None, [down, up]),
        (["q_proj", "v_proj"], [down]),
    ]  # fmt: skip
    return [
        (
            model, tuner.config_cls,
            {**tuner.options, "task_type": "CAUSAL_LM", "target_modules": modules, "target_parameters": parameters},
        )
        for modules, parameters in targets
    ]  # fmt: skip
