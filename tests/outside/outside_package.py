"""A package of somebody else: a score, a rule, a form of the update with its tuner, and a method, in 60 lines."""

from dataclasses import dataclass, field

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import nn

from hf_sparse_peft import Rule, SparseLoraConfig
from hf_sparse_peft.methods import Method, register
from hf_sparse_peft.sparsity import Score, chunks_of
from hf_sparse_peft.tuners.shared import AdapterConfig, AdapterModel, AdditiveLinear, LowRank, register_tuner
from hf_sparse_peft.utils.parts import register_part
from hf_sparse_peft.utils.tensors import TensorSpec


@register_part("far_from_mean")
@dataclass(frozen=True)
class FarFromMean(Score):
    def __call__(self, weight, grid, generator=None):
        return chunks_of(lambda a, b: (weight[a:b].float() - weight[a:b].float().mean()).abs(), grid, 1 << 20)


@register_part("shrink")
@dataclass(frozen=True)
class Shrink(Rule):
    weight: float = 0.01
    acts_on, writes = frozenset({"support", "core"}), frozenset({"values"})

    def state(self, space):
        return [TensorSpec("shrunk", (1,), torch.int32, "rule")]

    def after_update(self, run):
        for space in run.spaces():
            run.state(space)["shrunk"] += 1
            for parameter in space.parameters():
                parameter.data.mul_(1 - self.weight)


@dataclass
class CoreConfig(AdapterConfig):
    tuner = "core_lora"
    r: int = field(default=4, metadata={"help": "Components."})


class CoreLinear(AdditiveLinear):
    prefix = "core_lora_"
    core_lora_core: nn.ParameterDict
    core_lora_A: BufferDict
    core_lora_B: BufferDict

    @classmethod
    def tensor_specs(cls, config, module_name, rows, cols, sizes=None):
        def drawn(*shape):
            return lambda generator: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        return [
            TensorSpec("core_lora_core", (config.r,), space="core"),
            TensorSpec("core_lora_A", (config.r, cols), role="saved", start=drawn(config.r, cols)),
            TensorSpec("core_lora_B", (rows, config.r), role="saved", start=drawn(rows, config.r)),
        ]

    def pieces(self, name):
        return [LowRank(self.core_lora_B[name], self.core_lora_A[name], self.core_lora_core[name])]


class CoreModel(AdapterModel):
    linear_cls = CoreLinear


register_tuner(CoreConfig, CoreModel)


@register("far-shrink", paper="Nobody, 2026", moves="nothing", use_when="in this test", cost="none")
def far_shrink(density=0.05, weight=0.01, **overrides) -> Method:
    options = {"r": 0, "density": density, "criterion": "far_from_mean", "schedule": [Shrink(weight)], **overrides}
    return Method(SparseLoraConfig(**options))
