"""CAST: dense training whose optimizer makes weights 2:4, scales of column blocks, and the mask at the end."""

import copy

import pytest
import torch
from mask_toolbox import Net, loss_of, masked_net, run, spaces_of
from peft import PeftModel

from hf_sparse_peft import AdamSSpec, Cast, make_optimizer
from hf_sparse_peft.optim import AdamS
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, LowRankUpdate, ScaledDenseUpdate

OPTIONS = {"update": ScaledDenseUpdate(), "optimizer": AdamSSpec(decay=0.5)}


def decaying(model, steps, lr):
    """The optimizer of the config, whose rate falls to a twentieth."""
    optimizer = make_optimizer(model, lr=lr)

    def lower(optimizer, *_):
        for group in optimizer.param_groups:
            group["lr"] *= 0.05 ** (1 / steps)

    optimizer.register_step_pre_hook(lower)
    return optimizer


def test_the_scaled_weight_and_its_gradients_are_the_chain_rules():
    model = masked_net(**OPTIONS)
    layer = adapter_layers(model)[0]
    delta, scales = layer.masked_lora_delta["default"], layer.masked_lora_scales["default"]
    assert scales.shape == (12, 2)
    assert (scales == 1).all()
    generator = torch.Generator().manual_seed(1)
    delta.data.normal_(generator=generator)
    scales.data.add_(torch.rand(12, 2, generator=generator))
    W = layer.dense_base_weight().double()
    d, s = (one.detach().double().requires_grad_() for one in (delta, scales))
    x = torch.randn(5, 8, generator=generator)
    y = x.double() @ torch.cat([(W + d)[:, :4] * s[:, :1], (W + d)[:, 4:] * s[:, 1:]], 1).t()
    y.square().sum().backward()
    out = layer(x)
    assert torch.allclose(out.double(), y, atol=1e-5)
    out.square().sum().backward()
    assert torch.allclose(delta.grad.double(), d.grad, atol=1e-4)
    assert torch.allclose(scales.grad.double(), s.grad, atol=1e-4)


def test_the_spec_puts_matrices_alone_in_scope_and_decays_the_whole_weight():
    model = masked_net(**{**OPTIONS, "optimizer": AdamSSpec(decay=0.5, keep=1, mask_every=3, betas=(0.8, 0.9))})
    optimizer = make_optimizer(model, lr=1e-3)
    assert type(optimizer) is AdamS
    scope = {id(p) for group in optimizer.param_groups if group["cast_scope"] for p in group["params"]}
    assert scope == {id(space.dense_change()) for space in spaces_of(model).values()}
    assert all((g["keep"], g["mask_every"], g["betas"]) == (1, 3, (0.8, 0.9)) for g in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["total_steps"] = 2
    loss_of(model, 0).backward()
    optimizer.step()
    for space in spaces_of(model).values():
        mask = optimizer.state[space.dense_change()]["mask"]
        assert int(mask.sum()) == mask.numel() // 4
        base = space.base_weight()
        best = base.abs().view(-1, 4).argmax(1)
        assert torch.equal(mask.view(-1, 4).int().argmax(1), best)  # by W + D, and D was 0


def test_training_is_dense_until_the_end_and_ends_exactly_2_of_4(tmp_path):
    model, counts, steps = masked_net(Cast(), **OPTIONS), [], 200

    def look(step, model):
        counts.append(spaces_of(model)["first"].count)

    run(model, steps, decaying(model, steps, 0.02), at_step=look)
    assert set(counts) == {96}
    merged = copy.deepcopy(model).merge_and_unload()
    for name, space in spaces_of(model).items():
        weight = getattr(merged, name).weight.detach()
        assert set((weight != 0).view(-1, 4).sum(1).tolist()) == {2}
        unmasked = space.base_weight() + space.dense_change()
        removed = ~space.layer.kept("default")
        assert float(unmasked[removed].abs().max()) < 2 * 0.02 * 0.05 + 1e-3  # twice the last rate
        scales = space.layer.masked_lora_scales["default"].repeat_interleave(weight.shape[1] // 2, 1)
        assert torch.allclose(weight, unmasked * ~removed * scales, atol=1e-6)
    assert torch.allclose(loss_of(merged, 30), loss_of(model, 30), atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(0), str(tmp_path))
    assert torch.equal(loss_of(loaded, 30), loss_of(model, 30))


def test_pruning_what_is_0_already_changes_no_output():
    model = masked_net(Cast(), **OPTIONS)
    optimizer = make_optimizer(model, lr=0.0)
    with torch.no_grad():
        for space in spaces_of(model).values():
            base = space.base_weight()
            kept = torch.arange(base.shape[1]) % 4 < 2
            space.dense_change().copy_(torch.where(kept, 0, -base))
    before = loss_of(model, 9)
    run(model, 1, optimizer)
    assert spaces_of(model)["first"].count == 48
    assert torch.equal(loss_of(model, 9), before)


def test_a_run_that_goes_on_in_the_middle_ends_with_the_same_bits():
    whole, first, second = (masked_net(Cast(), **OPTIONS) for _ in range(3))
    run(whole, 12, lr=0.02)
    optimizer, state = run(first, 12, lr=0.02, stop=7)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    other = make_optimizer(second, lr=0.02)
    other.load_state_dict(optimizer.state_dict())
    run(second, 12, other, state=state)
    ours, theirs = whole.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_cannot_be_cast_is_refused():
    model = masked_net(Cast())
    with pytest.raises(ValueError, match="Cast needs the optimizer AdamS, and this run has SGD"):
        run(model, 2, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    with pytest.raises(ValueError, match="has no trained matrix of the shape of 'first'"):
        make_optimizer(masked_net(Cast(), update=LowRankUpdate(), optimizer=AdamSSpec()), lr=0.1)
    with pytest.raises(ValueError, match="groups=3 does not divide the 8 inputs of 'first'"):
        masked_net(update=ScaledDenseUpdate(groups=3))
    model = masked_net(Cast(), update=DenseUpdate())
    with pytest.raises(ValueError, match="does not have the weights of 'first' in scope"):
        run(model, 2, AdamS([p for p in model.parameters() if p.requires_grad]))
