"""The adapted model under torch.compile: one graph, the eager path's numbers, whatever moves."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from hf_sparse_peft import Regrow, SparseLoraConfig
from hf_sparse_peft.tuners import adapter_layers


class Layers(nn.Module):
    """Linear layers of three shapes between an embedding and a head; compiled in a quarter of a Llama's time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.up, self.down, self.square = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, input_ids, labels=None):
        x = self.embedding(input_ids)
        logits = self.head(self.square(x + self.down(nn.functional.silu(self.up(x)))))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


# A Llama with both halves, and each granularity once on layers; the other combinations are slow.
LLAMA = ("llama", "entry", 4)
CASES = [
    pytest.param(
        base, granularity, r,
        marks=() if (base, r) == ("layers", by) or (base, granularity, r) == LLAMA else pytest.mark.slow,
        id=f"{base}-{granularity}-{r}",
    )
    for base in ("llama", "layers")
    for granularity, by in (("entry", 0), ("block", 4), ("row", 0), ("column", 4))
    for r in (0, 4)
]  # fmt: skip
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
        )
    )


def adapted(granularity: str, r: int, density: float = 0.15, base: str = "layers", **more):
    torch.manual_seed(0)
    model = llama() if base == "llama" else Layers()
    targets = "all-linear" if base == "llama" else ["up", "down", "square"]
    options = {"granularity": granularity, "block_size": 8, "schedule": [Regrow()] if density else [], **more}
    config = SparseLoraConfig(r=r, density=density, target_modules=targets, init_weights=False, **options)
    model = get_peft_model(model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.1)
    return model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("base", "granularity", "r"), CASES)
def test_compiled_training_is_one_graph_that_survives_steps_and_moves(base, granularity, r, backend, ids):
    eager = adapted(granularity, r, base=base)
    compiled = copy.deepcopy(eager)
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(compiled, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (eager, compiled)]
    for step in range(3):
        losses = [m(input_ids=ids, labels=ids).loss for m in (eager, run)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        got, expected = gradients(compiled), gradients(eager)
        assert got.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for model in (eager, compiled):
            move_supports(model, seed=step)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def move_supports(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter_layers(model):
        units, grid = layer.units("default"), layer.sparse_lora_grid["default"]
        moved = torch.randperm(grid.num_units, generator=generator)[: units.numel()].sort().values
        layer.write_support("default", moved.to(units.dtype))


@pytest.mark.parametrize("granularity", ["entry", "column"])
def test_compiled_backward_hands_dense_gradients_to_a_reader_that_came_later(granularity, ids):
    model = adapted(granularity, 0)
    torch._dynamo.reset()
    counters.clear()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(input_ids=ids, labels=ids).loss.backward()
    seen = {}
    for layer in adapter_layers(model):
        layer.add_gradient_reader("default", lambda dense, name=layer.module_name: seen.__setitem__(name, dense))
    run(input_ids=ids, labels=ids).loss.backward()
    compiled = dict(seen)
    model(input_ids=ids, labels=ids).loss.backward()
    assert compiled.keys() == {layer.module_name for layer in adapter_layers(model)}
    for name, dense in compiled.items():
        torch.testing.assert_close(dense, seen[name], rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("density", [0.15, 0.0], ids=["beside a support", "low-rank alone"])
def test_a_reader_is_shown_one_gradient_a_use_of_a_layer_that_drops_out_also_when_compiled(density, ids):
    model, shown = adapted("entry", 4, density, lora_dropout=0.5).train(), []
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(input_ids=ids, labels=ids).loss.backward()
    layers = adapter_layers(model)
    for layer in layers:
        layer.add_gradient_reader("default", lambda dense, name=layer.module_name: shown.append((name, dense.clone())))
    found = []
    for call in (run, model):
        shown.clear()
        torch.manual_seed(0)
        call(input_ids=ids, labels=ids).loss.backward()
        found.append(dict(shown))
        assert sorted(name for name, _ in shown) == sorted(layer.module_name for layer in layers)
    for name, dense in found[0].items():
        torch.testing.assert_close(dense, found[1][name], rtol=1e-4, atol=1e-6)


def test_a_copied_layer_answers_for_itself_not_for_the_original(ids):
    model = adapted("entry", 0)
    other = copy.deepcopy(model)
    owners = [layer._owner for m in (model, other) for layer in adapter_layers(m)]
    assert len(set(owners)) == len(owners)


def test_loading_a_state_dict_reaches_a_compiled_graph(ids):
    model, source = adapted("entry", 0), adapted("entry", 0)
    move_supports(source, seed=7)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    run(input_ids=ids)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(run(input_ids=ids).logits, source(input_ids=ids).logits)
