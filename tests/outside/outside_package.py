"""A package of somebody else: a score, a rule, a form of the update with its tuner, and a method, in 60 lines."""

from dataclasses import dataclass, field

import torch
from torch import nn

from hf_sparse_peft import Rule, SparseLoraConfig
from hf_sparse_peft.methods import Method, register
from hf_sparse_peft.sparsity import Score, chunks_of
from hf_sparse_peft.tuners.shared import AdapterConfig, AdapterLayer, AdapterModel, AdditiveLinear, LowRank, add_tuner
from hf_sparse_peft.utils.parts import register_part
from hf_sparse_peft.utils.tensors import TensorSpec


@register_part("far_from_mean")
@dataclass(frozen=True)
class FarFromMean(Score):
    """|w - mean of its row|."""

    def __call__(self, weight, grid, generator):
        return chunks_of(lambda a, b: (weight[a:b] - weight[a:b].mean(1, keepdim=True)).abs(), grid, 1 << 20)


@register_part("shrink")
@dataclass(frozen=True)
class Shrink(Rule):
    """Every update ends with v <- (1 - weight) v; counts its steps."""

    weight: float = 0.01
    acts_on, writes = frozenset({"support", "core"}), frozenset({"values"})

    def state(self, space):
        return [TensorSpec("shrink_steps", (1,), torch.int32, "rule")]

    def after_update(self, run):
        for space in run.spaces():
            run.state(space)["shrink_steps"] += 1
            for parameter in space.parameters():
                parameter.data.mul_(1 - self.weight)


@add_tuner("core_lora")
class CoreLoraModel(AdapterModel):
    """dW = B diag(core) A with fixed random A and B."""

    @dataclass
    class Config(AdapterConfig):
        r: int = field(default=4, metadata={"help": "Components."})

    class Linear(AdditiveLinear):
        core_lora_core: nn.ParameterDict
        core_lora_A: "BufferDict"  # noqa: F821
        core_lora_B: "BufferDict"  # noqa: F821

        @classmethod
        def tensor_specs(cls, config, module_name, rows, cols, sizes):
            drawn = lambda *shape: lambda g: torch.randn(*shape, generator=g) / shape[-1] ** 0.5  # noqa: E731
            return [
                TensorSpec("core_lora_core", (config.r,), space="core"),
                TensorSpec("core_lora_A", (config.r, cols), role="saved", start=drawn(config.r, cols)),
                TensorSpec("core_lora_B", (rows, config.r), role="saved", start=drawn(rows, config.r)),
            ]

        def pieces(self, name):
            return [LowRank(self.core_lora_B[name], self.core_lora_A[name], self.core_lora_core[name])]


@register("far-shrink", paper="Nobody, 2026", moves="nothing", use_when="in this test", cost="none")
def far_shrink(density: float = 0.05, weight: float = 0.01, **overrides) -> Method:
    """Entries far from their row's mean, pulled to 0."""
    options = {"r": 0, "density": density, "criterion": "far_from_mean", "schedule": [Shrink(weight)], **overrides}
    return Method(SparseLoraConfig(**options))
