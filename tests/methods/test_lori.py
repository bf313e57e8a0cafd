"""LoRI (Zhang et al., 2025): A random and fixed, B trained (D), then again from 0 where the first run made it largest
(S); from the equations, in float64. Where the official code rounds otherwise than the paper, both are tested."""

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from spectral_toolbox import Linears, close, on, random, trained, weight_gradient

from hf_sparse_peft import hub, methods
from hf_sparse_peft.tuners.spectral_lora import MaskedB, RandomA, spectral_layers
from hf_sparse_peft.tuners.spectral_lora.bases import Site
from hf_sparse_peft.tuners.spectral_lora.masked import largest_entries

W = (random(12, 10), random(8, 12, seed=1))
OPTIONS = {"r": 3, "lora_alpha": 6, "seed": 4}


def A_of(layer, name: str = "default") -> torch.Tensor:
    return layer._tensors(name)["spectral_lora_basis_A"]


def B_of(layer, name: str = "default") -> torch.Tensor:
    """The whole B, zeros included."""
    (piece,) = layer.pieces(name)
    return piece.B.detach()


def first_run(folder, seed: int = 5, **options):
    """An adapter of the first kind, as after training, saved: its layers."""
    model, layers = on("lori", *W, **{**OPTIONS, **options})
    for at, layer in enumerate(layers):
        layer.spectral_lora_B["default"].data.copy_(random(layer.out_features, 3, seed=seed + at))
    model.save_pretrained(folder)
    return layers


def second_run(folder, **options):
    """The adapter whose mask that run makes, and its layers."""
    return on("lori", *W, mask_from=folder, **{"sparsity": 0.7, **options})


# Masks


def test_the_worked_masks_are_by_one_threshold_over_all_matrices():
    B = {"1": torch.tensor([[0.5, -0.1], [0.2, 0.05]]), "2": torch.tensor([[0.9, 0.8], [-0.7, 0.6]])}
    found = largest_entries(B, 0.5)
    assert {name: places.tolist() for name, places in found.items()} == {"1": [], "2": [0, 1, 2, 3]}
    assert min(B["2"].view(-1)[found["2"]].abs()) == 0.6
    by_matrix = largest_entries(B, 0.5, scope="matrix")
    assert {name: places.tolist() for name, places in by_matrix.items()} == {"1": [0, 2], "2": [0, 1]}


def test_groups_compete_among_themselves():
    names = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
    B = {name: random(5, 4, seed=at) * 10.0**at for at, name in enumerate(names)}
    for scope, groups in (("type", ("02", "13")), ("block", ("01", "23")), ("model", ("0123",))):
        found = largest_entries(B, 0.75, scope)
        for group in groups:
            members = [names[int(at)] for at in group]
            all_of_them = torch.cat([B[name].abs().view(-1) for name in members])
            threshold = all_of_them.sort(descending=True).values[len(members) * 5 - 1]
            for name in members:
                assert torch.equal(found[name].long(), (B[name].abs().view(-1) >= threshold).nonzero().squeeze(1))


@pytest.mark.parametrize(("rounding", "kept"), [("round", 100), ("int", 99)])
def test_a_tenth_of_a_thousand_is_100_or_with_the_official_codes_int_99(rounding, kept):
    assert largest_entries({"a": random(100, 10)}, 0.9, rounding=rounding)["a"].numel() == kept


def test_ties_at_the_threshold_are_drawn_for_and_never_exceed_the_number():
    B = {"a": torch.ones(6, 5), "b": torch.ones(6, 5)}
    draws = [largest_entries(B, 0.9, seed=seed) for seed in (0, 0, 1)]
    assert [sum(one.numel() for one in found.values()) for found in draws] == [6, 6, 6]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in B)
    assert any(not torch.equal(draws[0][name], draws[2][name]) for name in B)


def test_a_mask_of_nothing_and_a_first_run_without_training_are_refused():
    with pytest.raises(ValueError, match=r"sparsity=0.99 keeps none of the 8 entries of B in 'a'"):
        largest_entries({"a": random(4, 2)}, 0.99)
    with pytest.raises(
        ValueError, match=r"None of the 8 entries of B in 'a', \.\.\. is other than 0: the first run has"
    ):
        largest_entries({"a": torch.zeros(4, 1), "b": torch.zeros(4, 1)}, 0.5)


# The first run


def test_it_starts_at_the_base_and_trains_b_beside_a_kaiming_uniform_a():
    model, layers = on("lori", *W, **OPTIONS)
    x = random(4, 10, seed=1)
    assert torch.equal(model(x), Linears(*W)(x))
    assert {name.split(".")[2] for name in trained(model)} == {"spectral_lora_B"}
    for layer in layers:
        A, bound = A_of(layer).double(), layer.in_features**-0.5
        assert 0.8 * bound < A.abs().max() <= bound
        G = random(layer.out_features, layer.in_features, seed=2)
        weight_gradient(layer, G)
        B = layer.spectral_lora_B["default"]
        close(B.grad, 2 * G.double() @ A.t())
        B.data.copy_(random(*B.shape, seed=3))
        close(layer.get_delta_weight("default"), 2 * B.detach().double() @ A)
    assert not torch.equal(A_of(layers[0])[:, :8], A_of(layers[1])[:, :8])


def test_a_is_the_same_to_the_bit_from_the_first_run_to_the_second_and_over_training_and_in_no_file(tmp_path):
    before = [A_of(layer).clone() for layer in first_run(tmp_path / "first")]
    torch.manual_seed(99)
    model, layers = second_run(tmp_path / "first")
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(random(4, 10, seed=1)).square().sum().backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "second")
    again = spectral_layers(PeftModel.from_pretrained(Linears(*W), tmp_path / "second"))
    for was, layer, loaded in zip(before, layers, again, strict=True):
        assert torch.equal(A_of(layer), was)
        assert torch.equal(A_of(loaded), was)
    for folder, kinds in (("first", {"B", "shape"}), ("second", {"B_values", "B_entries", "shape"})):
        held = load_file(tmp_path / folder / "adapter_model.safetensors")
        assert {key.rpartition("lora_")[2] for key in held} == kinds


# The second run


def dense_mask(layers, share: float) -> list[torch.Tensor]:
    """Bool `[out, r]` of each layer, by a sort of all."""
    B = [B_of(layer).abs() for layer in layers]
    every = torch.cat([one.reshape(-1) for one in B])
    threshold = every.sort(descending=True).values[round(share * every.numel()) - 1]
    return [one >= threshold for one in B]


def test_one_line_takes_over_what_the_first_run_says_and_starts_b_at_zero(tmp_path):
    first = first_run(tmp_path)
    config = methods.get("lori", mask_from=tmp_path).config
    assert (config.r, config.lora_alpha, config.seed) == (3, 6, 4)
    assert config.target_modules == {"lin.0", "lin.1"}
    assert config.bases == MaskedB(str(tmp_path))
    model, layers = second_run(tmp_path)
    x = random(4, 10, seed=1)
    assert torch.equal(model(x), Linears(*W)(x))
    masks = dense_mask(first, 0.3)
    assert sum(p.numel() for p in trained(model).values()) == round(0.3 * 60) == sum(int(m.sum()) for m in masks)
    for layer, mask in zip(layers, masks, strict=True):
        assert not B_of(layer).any()
        assert torch.equal(layer.places("default").long(), mask.view(-1).nonzero().squeeze(1))
    assert model.peft_config["default"].bases.mask_from is None


@pytest.mark.parametrize("clip", [None, 0.05])
def test_ten_steps_are_those_of_a_dense_b_whose_gradient_is_masked_before_it_is_clipped(clip, tmp_path):
    """Masked entries stay exactly 0 whatever momentum and decay do, and however large their gradients are."""
    masks = dense_mask(first_run(tmp_path), 0.3)
    model, layers = second_run(tmp_path)
    As = [A_of(layer).double() for layer in layers]
    B = [torch.zeros(layer.out_features, 3, dtype=torch.float64, requires_grad=True) for layer in layers]
    options = {"lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    optimizers = [torch.optim.AdamW(list(ps), **options) for ps in (trained(model).values(), B)]
    for step in range(10):
        x, y = random(4, 10, seed=step), random(4, 8, seed=50 + step)
        outputs = x.double()
        for weight, A, one in zip(W, As, B, strict=True):
            outputs = outputs @ (weight.double() + 2 * one @ A).t()
        losses = [(model(x) - y).square().sum(), (outputs - y.double()).square().sum()]
        # A gradient of 1e4 at every entry under no mask: what is clipped must not see it.
        losses[1] = losses[1] + sum((1e4 * one * ~mask).sum() for one, mask in zip(B, masks, strict=True))
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
        for one, mask in zip(B, masks, strict=True):
            one.grad.mul_(mask)
        for parameters in (trained(model).values(), B) if clip else ():
            torch.nn.utils.clip_grad_norm_(list(parameters), clip)
        for optimizer in optimizers:
            optimizer.step()
    for layer, one, mask in zip(layers, B, masks, strict=True):
        assert not B_of(layer)[~mask].any()
        assert B_of(layer)[mask].all()
        close(B_of(layer), one.detach(), 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "has seed=5, which draws another A: a mask of B means nothing for it. Set seed=4"),
        ({"r": 2}, r"holds a B of 12x3 for 'lin.0', and here it is 12x2. Set r to the first run's"),
        ({"target_modules": ["lin.0"]}, r"of other modules than this one: \['lin.1'\]"),
        ({"sparsity": 1.0}, "MaskedB.sparsity=1.0 is out of range"),
        ({"sparsity": 0.999}, "keeps none of the 60 entries of B"),
    ],
)
def test_a_mask_of_another_adapter_is_refused_by_name(options, message, tmp_path):
    first_run(tmp_path)
    with pytest.raises(ValueError, match=message):
        second_run(tmp_path, **options)


def test_a_folder_that_is_no_first_run_is_refused_by_name(tmp_path):
    first_run(tmp_path / "first")
    on("sharelora", *W, r=3)[0].save_pretrained(tmp_path / "other")
    on("shira", *W, density=0.1)[0].save_pretrained(tmp_path / "sparse")
    second_run(tmp_path / "first")[0].save_pretrained(tmp_path / "second")
    for folder, message in (
        ("nowhere", "has no adapter_config.json; is this an adapter folder"),
        ("other", r"holds an adapter with bases=SharedBases\(.*a mask is made from one with bases=RandomA"),
        ("sparse", "holds an adapter with SPARSE_LORA"),
        ("second", r"bases=MaskedB\("),
    ):
        with pytest.raises(ValueError, match=message):
            second_run(tmp_path / folder, target_modules=["lin.0", "lin.1"])
    with pytest.raises(ValueError, match=r"MaskedB.mask_from=None: .*Train an adapter with bases=RandomA\(\) first"):
        on("lori", *W, bases=MaskedB(), **OPTIONS)


# Several tasks


def test_updates_of_tasks_with_seeds_of_their_own_are_orthogonal_on_average_and_with_one_seed_never():
    B, site = random(20, 4).double(), Site("lin", 20, 16, 4, None, 0)

    def overlap(*seeds):
        one, two = (
            RandomA().derive(site._replace(seed=seed), None)["spectral_lora_basis_A"].double() for seed in seeds
        )
        return float(((B @ one) * (B @ two)).sum())

    apart = torch.tensor([overlap(2 * at, 2 * at + 1) for at in range(200)])
    assert abs(apart.mean()) < 3 * apart.std() / 200**0.5
    assert all(overlap(at, at) > 0 for at in range(200))


@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_three_tasks_merge_as_their_loras_do(kind, tmp_path):
    """Against peft's own combination of the exported adapters."""
    first_run(tmp_path / "first")
    model, layers = second_run(tmp_path / "first")
    for name, seed in (("second", 8), ("third", 9)):
        model.add_adapter(
            name, methods.get("lori", target_modules=["lin.0", "lin.1"], **{**OPTIONS, "seed": seed}).config
        )
    names = ["default", "second", "third"]
    with torch.no_grad():
        for at, (layer, name) in enumerate((layer, name) for layer in layers for name in names):
            for parameter in layer.trained_parameters(name):
                parameter.copy_(random(*parameter.shape, seed=at))
    loras = None
    for name in names:
        hub.export_lora(model, tmp_path / name, adapter_name=name)
        if loras is None:
            loras = PeftModel.from_pretrained(Linears(*W), tmp_path / name, adapter_name=name)
        else:
            loras.load_adapter(tmp_path / name, name)
    for peft_model in (model, loras):
        peft_model.add_weighted_adapter(names, [0.4] * 3, "merged", kind)
        peft_model.set_adapter("merged")
    for layer in layers:
        theirs = loras.get_submodule(f"base_model.model.{layer.module_name}").get_delta_weight("merged")
        close(layer.get_delta_weight("merged"), theirs)
        if kind == "cat":
            close(layer.get_delta_weight("merged"), 0.4 * sum(layer.get_delta_weight(name) for name in names))
    x = random(4, 10, seed=1)
    close(model(x), loras(x))
    model.save_pretrained(tmp_path / "out", selected_adapters=["merged"])
    again = PeftModel.from_pretrained(Linears(*W), tmp_path / "out" / "merged")
    assert torch.equal(again(x), model(x))


def test_both_runs_of_a_language_model_learn(tmp_path):
    losses = []
    for kind, options in (("D", {"r": 8, "task_type": "CAUSAL_LM"}), ("S", {"mask_from": tmp_path / "D"})):
        method = methods.get("lori", **options)
        model = get_peft_model(tiny.base(), method.config)
        data = tiny.TokenData(8, repeated=12)
        tiny.train(model, tmp_path / "run", 24, callbacks=method.callbacks(model), data=data)
        with torch.no_grad():
            losses.append(model.eval()(input_ids=data.ids, labels=data.ids).loss.item())
        model.save_pretrained(tmp_path / kind)
    start = tiny.base()(input_ids=data.ids, labels=data.ids).loss.item()
    assert losses[0] < start - 0.3
    assert losses[1] < start - 0.1
