"""ShareLoRA (Song et al., 2024; official code Rain9876/ShareLoRA) against its equations, in float64."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_toolbox import close, random
from torch import nn

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.spectral_lora import spectral_layers


class Blocks(nn.Module):
    """Layers `block.0.q`, `block.1.q`, ... of one shape, each with a residual connection."""

    def __init__(self, count: int, side: int = 6) -> None:
        super().__init__()
        self.block = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(side, side, bias=False)}) for _ in range(count))
        for at, block in enumerate(self.block):
            block["q"].weight.data.copy_(random(side, side, seed=at))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.block:
            x = x + block["q"](x)
        return x


def shared(sides: str, count: int = 3, side: int = 6, r: int = 2, **options):
    torch.manual_seed(0)
    method = methods.get("sharelora", r=r, lora_alpha=4, sides=sides, target_modules=["q"], **options)
    model = get_peft_model(Blocks(count, side), method.config)
    return model, spectral_layers(model)


def factors(layer) -> dict[str, nn.Parameter]:
    held = layer._tensors("default")
    return {"A": held["spectral_lora_A"], "B": held["spectral_lora_B"]}


def fill(layers) -> None:
    for at, layer in enumerate(layers):
        for name, tensor in layer.tensors("default").items():
            if name != "spectral_lora_shape":
                tensor.data.copy_(random(*tensor.shape, seed=10 * at + len(name)))


@pytest.mark.parametrize(("sides", "count"), [("A", 79_872), ("B", 79_872), ("AB", 12_288)])
def test_numbers_of_twelve_layers(sides, count):
    model, layers = shared(sides, 12, 768, 8)
    assert model.get_nb_trainable_parameters()[0] == count  # LoRA: 147,456
    assert all(factors(layers[5])[side] is factors(layers[0])[side] for side in sides)
    assert sum(p.numel() for p in {id(p): p for p in model.parameters() if p.requires_grad}.values()) == count


@pytest.mark.parametrize("sides", ["A", "B", "AB"])
def test_the_gradient_of_what_is_shared_is_the_sum_over_layers_and_a_step_moves_it_once(sides):
    model, layers = shared(sides)
    fill(layers)
    x = random(5, 6, seed=7)
    model(x).square().sum().backward()
    untied = [{side: p.detach().double().requires_grad_() for side, p in factors(layer).items()} for layer in layers]
    y = x.double()
    for layer, held in zip(layers, untied, strict=True):
        y = y + y @ (layer.base_layer.weight.double() + 2 * held["B"] @ held["A"]).t()
    y.square().sum().backward()
    close(model(x), y.detach())
    for side in sides:
        close(factors(layers[0])[side].grad, sum(held[side].grad for held in untied))
    for side in set("AB") - set(sides):
        for layer, held in zip(layers, untied, strict=True):
            close(factors(layer)[side].grad, held[side].grad)
    before = {side: factors(layers[0])[side].detach().clone() for side in sides}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    for side in sides:
        moved = factors(layers[2])[side]
        close(moved, before[side] - 0.1 * moved.grad)


def test_the_file_holds_what_is_shared_once_and_ties_survive_save_load_copy_merge_and_deletion(tmp_path):
    model, layers = shared("A")
    fill(layers)
    x = random(5, 6, seed=7)
    answer = model(x)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert [key for key in held if key.endswith("spectral_lora_A")] == ["base_model.model.block.0.q.spectral_lora_A"]
    loaded = PeftModel.from_pretrained(Blocks(3), tmp_path, is_trainable=True)
    assert torch.equal(loaded(x), answer)
    copied = copy.deepcopy(model)
    for other in (loaded, copied):
        found = spectral_layers(other)
        assert all(factors(layer)["A"] is factors(found[0])["A"] for layer in found)
        assert factors(found[0])["A"] is not factors(layers[0])["A"]
    model.add_adapter("other", copy.deepcopy(methods.get("sharelora", r=2, target_modules=["q"]).config))
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(model(x), answer)
    model.delete_adapter("other")
    assert torch.equal(model(x), answer)
    assert all(factors(layer)["A"] is factors(layers[0])["A"] for layer in layers)
    assert not any("other" in key for key in model.state_dict())


def test_layers_with_different_teachers_fit_with_a_shared_a_but_not_with_both_shared():
    row = random(1, 6, seed=30)
    teachers = [random(6, 1, seed=31) @ row, random(6, 1, seed=32) @ row]
    left = {}
    for sides in ("A", "AB"):
        _, layers = shared(sides, 2)
        parameters = {id(p): p for layer in layers for p in factors(layer).values()}
        optimizer = torch.optim.Adam(parameters.values(), lr=0.05)
        for _ in range(400):
            optimizer.zero_grad()
            terms = [
                (2 * factors(layer)["B"] @ factors(layer)["A"] - teacher).square().sum()
                for layer, teacher in zip(layers, teachers, strict=True)
            ]
            loss = sum(terms)
            loss.backward()
            optimizer.step()
        left[sides] = loss.item()
    assert left["A"] < 1e-3 < 1 < left["AB"]


@pytest.mark.parametrize("sides", ["A", "B", "AB"])
def test_the_exported_lora_copies_what_is_shared_into_each_layer(sides, tmp_path):
    model, layers = shared(sides)
    fill(layers)
    assert hub.export_lora(model, tmp_path).ranks == {f"block.{at}.q": 2 for at in range(3)}
    x = random(5, 6, seed=7)
    close(PeftModel.from_pretrained(Blocks(3), tmp_path)(x), model(x))


def test_a_file_of_modules_that_share_otherwise_is_refused(tmp_path):
    model, layers = shared("AB")
    fill(layers)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"sizes.* in this base it is"):
        PeftModel.from_pretrained(Blocks(4), tmp_path)


def test_what_is_shared_and_not_whole_is_refused_by_the_names_of_both_layers():
    _, layers = shared("A")
    layers[0].spectral_lora_A["default"].data = torch.empty(0)  # as a sharded parameter is between its uses
    with pytest.raises(ValueError, match=r"'block\.1\.q' shares 'spectral_lora_A' of 'block\.0\.q', which is sharded"):
        layers[1](random(5, 6))
