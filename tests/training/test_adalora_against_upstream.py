"""AdaLoRA's budget, importances and masks, step by step beside peft's own `RankAllocator`."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import AdaLoraConfig, get_peft_model
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from torch import nn

from hf_sparse_peft import Allocate, AverageRank, Orthogonality, callbacks_for, methods
from hf_sparse_peft.tuners import adapter_layers

R, TARGET = 4, 2


class Upstream:
    """peft's allocator on a copy of our factors, gates and gradients, called as its documentation says."""

    def __init__(self, layers, total: int, tinit: int, tfinal: int, interval: int) -> None:
        self.layers, self.copy = layers, nn.Module()
        for number, layer in enumerate(layers):
            held, copy = self.of(layer), nn.Module()
            for name, tensor in held.items():
                copy.add_module(name, nn.ParameterDict({"default": nn.Parameter(torch.empty_like(tensor))}))
            self.copy.add_module(f"m{number}", copy)
        config = AdaLoraConfig(init_r=R, target_r=TARGET, tinit=tinit, tfinal=tfinal, deltaT=interval, total_step=total)
        allocator = RankAllocator(self.copy, config, "default")
        self.model = SimpleNamespace(
            peft_config={"default": config}, trainable_adapter_name="default", model=self.copy, rankallocator=allocator
        )

    @staticmethod
    def of(layer) -> dict[str, torch.Tensor]:
        gate, A, B = (getattr(layer, f"sparse_lora_{name}")["default"] for name in ("gate", "A", "B"))
        return {"lora_E": gate[:, None], "lora_A": A, "lora_B": B}

    def step(self, step: int) -> None:
        for number, layer in enumerate(self.layers):
            grads = {"lora_E": layer.sparse_lora_gate["default"].grad[:, None]}
            grads |= {f"lora_{name}": getattr(layer, f"sparse_lora_{name}")["default"].grad for name in "AB"}
            for name, tensor in self.of(layer).items():
                parameter = getattr(getattr(self.copy, f"m{number}"), name)["default"]
                parameter.data.copy_(tensor.detach())
                parameter.grad = grads[name].clone()
        AdaLoraModel.update_and_allocate(self.model, step)

    def gates(self) -> list[torch.Tensor]:
        return [
            getattr(self.copy, f"m{number}").lora_E["default"].detach()[:, 0].clone()
            for number in range(len(self.layers))
        ]

    def sensitivity(self) -> list[torch.Tensor]:
        kept, order = self.model.rankallocator.exp_avg_ipt, ("lora_E", "lora_A", "lora_B")
        return [
            torch.cat([kept[f"m{number}.{name}.default"].reshape(-1) for name in order])
            for number in range(len(self.layers))
        ]


def sensitivity_of(layer) -> torch.Tensor:
    state = layer.rule_state("default")
    return torch.cat([state[f"sensitivity_{name}"].reshape(-1) for name in ("gate", "A", "B")])


def side_by_side(out, total: int, tinit: int, tfinal: int, interval: int, count_from: int = 1, seed: int = 0):
    """Gates (ours, upstream's) after every step of one run, and both sensitivities before upstream drops its own."""
    method = methods.get(
        "adalora", r=R, target_r=TARGET, target_modules=["q_proj", "v_proj", "down_proj"],
        schedule=[
            Allocate(
                budget=AverageRank(TARGET), initial_warmup=tinit / total, final_warmup=tfinal / total, every=interval,
                count_from=count_from,
            ),
            Orthogonality(0.5),
        ],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = get_peft_model(tiny.llama(layers=1, seed=seed), method.config)
    layers = adapter_layers(model)
    upstream, gates, averages, later = Upstream(layers, total, tinit, tfinal, interval), {}, {}, []

    def after(step, model, optimizer):
        ours = [layer.sparse_lora_gate["default"].detach().clone() for layer in layers]
        number = step - 1 + count_from
        gates[number] = ours, upstream.gates()
        if number < total - tfinal:
            own = [sensitivity_of(layer) for layer in layers]
            averages[number] = own, upstream.sensitivity()
        elif step < total:  # the last step drops the state
            later.append([sensitivity_of(layer) for layer in layers])

    # Ours acts in the same event and zeroes gates: upstream looks first.
    first = tiny.At(on_optimizer_step=lambda step, model, optimizer: upstream.step(step - 1 + count_from))
    last = tiny.At(on_step_end=after)
    tiny.train(
        model, out, total, callbacks=[first, *callbacks_for(model), last], learning_rate=3e-2,
        per_device_train_batch_size=1, seed=seed,
    )  # fmt: skip
    final = averages[total - tfinal - 1][0]
    assert all(torch.equal(a, b) for one in later for a, b in zip(final, one, strict=True))
    return gates, averages


SCHEDULES = [(20, 4, 5, 4), (20, 2, 6, 2), (19, 0, 7, 3), (16, 5, 1, 1), (12, 3, 4, 10)]


@pytest.mark.parametrize("count_from", [0, 1])
@pytest.mark.parametrize(("total", "tinit", "tfinal", "interval"), SCHEDULES)
def test_gates_are_upstreams_after_every_step(total, tinit, tfinal, interval, count_from, tmp_path):
    gates, averages = side_by_side(tmp_path, total, tinit, tfinal, interval, count_from)
    assert sorted(gates) == list(range(count_from, total + count_from))
    for step, (ours, theirs) in gates.items():
        assert all(map(torch.equal, ours, theirs)), step
    assert sorted(averages) == list(range(count_from, total - tfinal))
    for own, theirs in averages.values():
        torch.testing.assert_close(own, theirs, rtol=1e-6, atol=0)
    alive = sum(int((gate != 0).sum()) for gate in gates[total - 1][0])
    assert alive == TARGET * len(gates[total - 1][0])


def test_importances_stop_before_t_minus_t_final_so_that_later_gradients_change_no_mask(tmp_path):
    total, tfinal = 12, 4
    method = methods.get(
        "adalora", r=R, target_r=TARGET, target_modules=["q_proj", "down_proj"],
        schedule=[
            Allocate(budget=AverageRank(TARGET), initial_warmup=0.0, final_warmup=tfinal / total, every=2),
            Orthogonality(0.5),
        ],
    )  # fmt: skip
    masks = []
    for factor in (1.0, -50.0):
        torch.manual_seed(0)
        model = get_peft_model(tiny.llama(layers=1), method.config)
        layers = adapter_layers(model)

        def disturb(step, model, optimizer, factor=factor, layers=layers):
            if step >= total - tfinal:
                for layer in layers:
                    for name in ("gate", "A", "B"):
                        getattr(layer, f"sparse_lora_{name}")["default"].grad.mul_(factor).add_(factor - 1)

        look = [*callbacks_for(model)]
        tiny.train(model, tmp_path, total, callbacks=[tiny.At(on_pre_optimizer_step=disturb), *look])
        masks.append([(layer.sparse_lora_gate["default"] != 0).tolist() for layer in layers])
    assert masks[0] == masks[1]


@pytest.mark.parametrize("count_from", [0, 1])
def test_without_final_phase_the_last_step_still_reaches_the_target(count_from, tmp_path):
    gates, _ = side_by_side(tmp_path, 11, 2, 0, 4, count_from)  # the last multiple of the interval is above the target
    for step in range(count_from, 10 + 2 * count_from):  # counted from 0, upstream's last step never comes
        assert all(map(torch.equal, *gates[step])), step
    assert sum(int((gate != 0).sum()) for gate in gates[10 + count_from][0]) == TARGET * 3


def test_the_budget_curve_of_the_official_code():
    config = Allocate(initial_warmup=4 / 20, final_warmup=5 / 20, every=4)
    budgets = [int(config.budget_at(48, 32, step, 20)) for step in range(4, 13)]
    assert budgets == [48, 44, 40, 38, 36, 34, 33, 32, 32]
    assert [int(config.budget_at(48, 32, step, 20)) for step in (0, 15, 16, 19)] == [48, 32, 32, 32]
    # 0.29 * 100 is 28.999... in floats: the window must still begin at 29.
    assert Allocate(initial_warmup=0.29, final_warmup=0.0).budget_at(9, 1, 29, 100) == 9
