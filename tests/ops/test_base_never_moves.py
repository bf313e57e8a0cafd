"""Whatever happens in whatever order, the base weights are bit for bit what they were, unless merged right now."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_peft import SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers

IDS = torch.arange(10).view(2, 5)


class BaseNeverMoves(RuleBasedStateMachine):
    """Random sequences of what users do to an adapted model."""

    @initialize(granularity=st.sampled_from(["entry", "block", "row", "column"]), r=st.sampled_from([0, 2]))
    def build(self, granularity, r):
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=16,
            )
        ).to(torch.bfloat16)
        options = {"granularity": granularity, "block_size": 8, "target_modules": "all-linear", "init_weights": False}
        self.model = get_peft_model(base, SparseLoraConfig(r=r, density=0.3, **options))
        self.model.add_adapter("other", SparseLoraConfig(r=2, density=0.3, seed=1, **options))
        self.optimizer = torch.optim.SGD([p for n, p in self.model.named_parameters() if "sparse_lora" in n], lr=0.01)
        self.weights = [layer.get_base_layer().weight for layer in adapter_layers(self.model)]
        self.before = [weight.detach().clone() for weight in self.weights]
        self.merged, self.loss = False, None

    @rule()
    def forward(self):
        self.loss = self.model(input_ids=IDS, labels=IDS).loss

    @precondition(lambda self: self.loss is not None and self.loss.requires_grad)
    @rule()
    def backward(self):
        self.loss.backward()
        self.loss = None

    @precondition(lambda self: self.loss is None)
    @rule()
    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    @rule(training=st.booleans())
    def switch_mode(self, training):
        self.model.train(training)

    @precondition(lambda self: not self.merged and self.loss is None)
    @rule()
    def disabled(self):
        with self.model.disable_adapter():
            self.model(input_ids=IDS)

    @precondition(lambda self: self.loss is None and not self.merged)
    @rule(safe=st.booleans())
    def merge(self, safe):
        self.model.merge_adapter(safe_merge=safe)
        self.merged = True

    @precondition(lambda self: self.merged and self.loss is None)
    @rule()
    def unmerge(self):
        self.model.unmerge_adapter()
        self.merged = False

    @precondition(lambda self: not self.merged and self.loss is None)
    @rule(names=st.sampled_from([["default"], ["other"], ["default", "other"]]))
    def switch_adapters(self, names):
        self.model.base_model.set_adapter(names)

    @rule()
    def a_forward_that_raises(self):
        layer = adapter_layers(self.model)[0]
        with pytest.raises(RuntimeError):
            layer(torch.zeros(3, layer.in_features + 1, dtype=torch.bfloat16))

    @invariant()
    def base_is_bit_identical(self):
        if getattr(self, "weights", None) and not self.merged:
            for weight, before in zip(self.weights, self.before, strict=True):
                assert torch.equal(weight, before)


BaseNeverMoves.TestCase.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestBaseNeverMoves = BaseNeverMoves.TestCase
