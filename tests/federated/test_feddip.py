"""FedDIP: its schedules to the digit, the client's step and the server's against float64 references from the equations,
and messages as long as the formula says."""

import federated_toolbox as box
import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import Controller
from hf_sparse_peft.federated import (
    FedDIP,
    FedDIPUpdate,
    feddip_client_message,
    feddip_config,
    feddip_receive,
    feddip_server_message,
    feddip_server_step,
    feddip_start,
    masks_of,
    read_feddip_message,
    unpack,
)
from hf_sparse_peft.rules.error_feedback import norm_gradient
from hf_sparse_peft.tuners import adapter_layers

TARGETS = ["q_proj", "v_proj", "down_proj"]


def test_schedules_have_the_official_numbers():
    options = FedDIP(rounds=1000)
    assert [round(options.sparsity(t), 7) for t in (0, 20, 500, 980)] == [0.5, 0.5264636, 0.89375, 0.9499964]
    assert options.sparsity(999) < 0.95
    table = [options.penalty(t) for t in (0, 49, 50, 99, 100, 999)]
    assert table == pytest.approx([0, 0, 5e-4, 5e-4, 5.2632e-4, 9.7368e-4], rel=1e-4)
    assert len({options.penalty(t) for t in range(1000)}) == 20
    assert FedDIP(rounds=1010).penalty(1009) == options.penalty(999)  # what is left over belongs to the last segment
    assert [FedDIP(rounds=3).penalty(t) for t in range(3)] == pytest.approx([0, 5e-4, 5e-4 + 5e-4 / 19])
    falling = FedDIP(rounds=40, max_penalty=1e-4)
    assert falling.penalty(39) < falling.penalty(2)
    assert options.local_optimizer(torch.nn.Linear(1, 1), 2).param_groups[0]["lr"] == 0.1 * 0.998**2
    assert [t for t in range(50) if options.reconfigures(t)] == [0, 20, 40]


def test_options_out_of_range_are_refused_by_name():
    for options, name in (
        ({"rounds": 0}, "rounds"),
        ({"rounds": 5, "final_sparsity": 1.0}, "final_sparsity"),
        ({"rounds": 5, "first_mask": "erk"}, "first_mask"),
        ({"rounds": 5, "norm": 2}, "norm"),
    ):
        with pytest.raises(ValueError, match=rf"FedDIP.{name}"):
            FedDIP(**options)


def test_the_penalty_is_a_norm_and_not_its_square():
    assert norm_gradient(torch.tensor([[3.0, 4.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]
    assert norm_gradient(torch.tensor([[3.0, -4.0]]), "1").tolist() == [[1, -1]]
    assert norm_gradient(torch.tensor([[3.0, -4.0]]), "inf").tolist() == [[0, -1]]
    assert not norm_gradient(torch.zeros(2, 2)).any()


def reference_step(V, M, x, y, lr, penalty, decay, mu=0.0, anchor=None):
    """The official client: a masked copy's gradient, unmasked, is given to the dense weights."""
    copies = {name: (V[name] * M[name]).clone().requires_grad_() for name in V}
    loss = (torch.tanh(x @ copies["first"].T) @ copies["second"].T - y).square().mean()
    loss = loss + penalty * sum(torch.norm(w) for w in copies.values())
    if mu:
        loss = loss + mu / 2 * sum(torch.norm(copies[name] - anchor[name]) for name in copies)
    found = torch.autograd.grad(loss, list(copies.values()))
    return {name: V[name] - lr * (g + decay * V[name]) for (name, g) in zip(V, found, strict=True)}


@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_a_clients_steps_are_those_of_the_masked_copy(mu):
    options = FedDIP(
        rounds=40, first_mask="magnitude", max_penalty=0.2, first_penalty=0.1, weight_decay=0.05, proximal=mu, seed=3
    )
    model, number = box.masked_model(), 10
    feddip_start(model, options)
    V, M = box.weights(model), box.masks(model)
    assert sum(int(m.sum()) for m in M.values()) == 45 - round(0.5 * 45)
    assert all(not (V[name][~M[name]]).any() for name in V)
    anchor = {name: V[name] * M[name] for name in V}
    base = [layer.get_base_layer().weight.clone() for layer in adapter_layers(model)]
    box.train_locally(model, options, number, [1, 2, 3], lr=0.2)
    for seed in (1, 2, 3):
        V = reference_step(V, M, *box.batch(seed), 0.2, options.penalty(number), 0.05, mu, anchor)
    for name, found in box.weights(model).items():
        assert torch.allclose(found, V[name], rtol=1e-12, atol=1e-12)
        assert (V[name][~M[name]] != 0).any()  # error feedback: what is off the mask moved
        assert torch.equal(box.masks(model)[name], M[name])
    assert all(
        torch.equal(layer.get_base_layer().weight, b) for layer, b in zip(adapter_layers(model), base, strict=True)
    )


def global_mask(V, M, sparsity):
    """Magnitudes of all weights in one list; removed ones are 0 before they are ranked."""
    n = sum(v.numel() for v in V.values())
    every = sorted((-1.0 if not M[name].flatten()[i] else abs(V[name].flatten()[i].item()), name, i)
                   for name in V for i in range(V[name].numel()))  # fmt: skip
    kept = {name: torch.ones(v.numel(), dtype=torch.bool) for name, v in V.items()}
    for _, name, i in every[: round(sparsity * n)]:
        kept[name][i] = False
    return {name: kept[name].view_as(V[name]) for name in V}


def test_the_server_averages_then_masks_then_ranks_and_nothing_returns():
    options = FedDIP(rounds=6, reconfigure_every=2, first_mask="all", final_sparsity=0.9)
    server, clients = box.masked_model(), {name: box.masked_model() for name in ("a", "b")}
    feddip_start(server, options)
    V, M = box.weights(server), box.masks(server)
    examples, known = {"a": 30, "b": 10}, None
    for number in range(options.rounds):
        data = feddip_server_message(as_fp32(server), options, number, known=known)
        known = masks_of(server)
        updates, dense = [], {}
        for at, (name, model) in enumerate(clients.items()):
            feddip_receive(as_fp32(model), data, options, number, name)
            box.train_locally(model.double(), options, number, [10 * number + at], lr=0.5)
            reply = feddip_client_message(as_fp32(model), options, number, name, examples[name])
            updates.append(read_feddip_message(as_fp32(server), reply, name, options, number))
            dense[name] = box.weights(as_fp32(model))
        told = feddip_server_step(as_fp32(server), updates, [0.75, 0.25], options, number)
        V = {name: (0.75 * dense["a"][name].double() + 0.25 * dense["b"][name].double()) * M[name] for name in V}
        if number % 2 == 0:
            after = global_mask(V, M, options.sparsity(number))
            assert all(bool((M[name] | ~after[name]).all()) for name in M)  # nested
            zeros = sum(int((~m).sum()) for m in after.values())
            assert zeros == round(options.sparsity(number) * 45)
            assert told["sparsity"] == pytest.approx(zeros / 45)
            M = after
            V = {name: V[name] * M[name] for name in V}
        for name, found in box.weights(server).items():
            assert torch.equal(box.masks(server)[name], M[name])
            assert torch.allclose(found.double(), V[name], atol=1e-6)
            assert not found[~M[name]].any()


def as_fp32(model):
    """Trained tensors as messages have them."""
    for layer in adapter_layers(model):
        layer.masked_lora_delta["default"].data = layer.masked_lora_delta["default"].data.float()
    return model


@pytest.fixture(scope="module")
def llamas():
    def make(**options):
        return get_peft_model(tiny.llama(), feddip_config(**{"target_modules": TARGETS, **options}))

    return make


def steps(model, options, number, seed, count=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    data = tiny.TokenData(4 * count, seed=seed)
    with Controller(model, optimizer, count, rule=options.local_rule(number)) as rules:
        for at in range(count):
            rows = [data[i] for i in range(4 * at, 4 * at + 4)]
            rules.before_step()
            model(**{key: torch.stack([row[key] for row in rows]) for key in rows[0]}).loss.backward()
            optimizer.step()
            rules.after_step()
            optimizer.zero_grad()


def payload(data):
    """Bytes of tensors in a message."""
    return len(data) - 8 - int.from_bytes(data[:8], "little")


def test_messages_are_as_long_as_the_formula_says(llamas):
    options = FedDIP(rounds=10, reconfigure_every=2, first_mask="magnitude", final_sparsity=0.9, segments=5)
    server, client = llamas(), llamas()
    feddip_start(server, options)
    numel = [layer.out_features * layer.in_features for layer in adapter_layers(server)]
    n = sum(numel)

    def kept(model):
        return [int(layer.kept("default").sum()) for layer in adapter_layers(model)]

    known, seen = None, []
    for number in range(4):
        data, former = feddip_server_message(server, options, number, known=known), kept(client)
        expected = 0 if number == 0 else 4 * sum(kept(server))
        if known is None:
            expected += sum((size + 7) // 8 for size in numel)
        elif any(not torch.equal(a, b) for a, b in zip(masks_of(server).values(), known.values(), strict=True)):
            expected += sum((count + 7) // 8 for count in former)  # a bit for each entry that was kept before
            seen.append(number)
        assert payload(data) == expected
        known = masks_of(server)
        feddip_receive(client, data, options, number, "a")
        assert kept(client) == kept(server)
        steps(client, options, number, seed=number)
        reply = feddip_client_message(client, options, number, "a", 8)
        assert payload(reply) == 4 * sum(kept(server))
        update = read_feddip_message(server, reply, "a", options, number)
        feddip_server_step(server, [update], [1.0], options, number)
        if number % 2 == 0:
            assert n - sum(kept(server)) == round(options.sparsity(number) * n)
    assert seen == [3]  # round 0 chose at s_0 what the base had already; round 2's choice comes with round 3


def test_kept_values_alone_give_the_same_model_to_the_bit(llamas):
    options = FedDIP(rounds=10, reconfigure_every=1, first_mask="magnitude")
    server, client = llamas(), llamas()
    feddip_start(server, options)
    feddip_receive(client, feddip_server_message(server, options, 3), options, 3, "a")
    steps(client, options, 3, seed=1)
    update = read_feddip_message(server, feddip_client_message(client, options, 3, "a", 1), "a", options, 3)
    dense = {layer.module_name: layer.masked_lora_delta["default"].detach().clone() for layer in adapter_layers(client)}
    other = llamas()
    feddip_start(other, options)
    feddip_server_step(server, [update], [1.0], options, 3)
    feddip_server_step(other, [FedDIPUpdate("a", 1, dense, {})], [1.0], options, 3)
    for one, two in zip(adapter_layers(server), adapter_layers(other), strict=True):
        assert torch.equal(one.masked_lora_delta["default"], two.masked_lora_delta["default"])
        assert torch.equal(one.masked_lora_mask["default"], two.masked_lora_mask["default"])


def test_random_masks_of_round_0_are_each_clients_own_and_dense_updates_come_back(llamas):
    options, server = FedDIP(rounds=10, first_mask="random"), llamas()
    data = feddip_server_message(server, options, 0)
    assert payload(data) == 0
    found = {}
    for name in ("a", "b"):
        client = llamas()
        feddip_receive(client, data, options, 0, name)
        found[name] = masks_of(client)
        layers = adapter_layers(client)
        assert sum(int(layer.kept("default").sum()) for layer in layers) == pytest.approx(
            0.5 * sum(layer.kept("default").numel() for layer in layers), rel=0.01
        )
        shares = {layer.module_name: float(layer.kept("default").double().mean()) for layer in layers}
        assert len({round(share, 2) for share in shares.values()}) > 1  # Erdos-Renyi: by the weights' sides
        assert not any(layer.masked_lora_delta["default"].any() for layer in layers)
        again = llamas()
        feddip_receive(again, data, options, 0, name)
        assert all(torch.equal(masks_of(again)[key], bits) for key, bits in found[name].items())
        steps(client, options, 0, seed=1)
        reply = feddip_client_message(client, options, 0, name, 3)
        assert payload(reply) == 4 * sum(layer.kept("default").numel() for layer in layers)
        update = read_feddip_message(server, reply, name, options, 0)
    assert any(not torch.equal(found["a"][key], found["b"][key]) for key in found["a"])
    feddip_server_step(server, [update], [1.0], options, 0)
    assert sum(int((~layer.kept("default")).sum()) for layer in adapter_layers(server)) == round(
        0.5 * sum(layer.kept("default").numel() for layer in adapter_layers(server))
    )


@pytest.mark.parametrize("kind", ["nf4", "bf16", "conv1d"])
def test_other_bases_and_a_head_take_part(kind):
    options = FedDIP(rounds=4, reconfigure_every=1, first_mask="magnitude", final_sparsity=0.8)
    config = {"target_modules": ["c_attn"] if kind == "conv1d" else TARGETS, "modules_to_save": ["lm_head"]}

    def make():
        torch.manual_seed(0)
        return get_peft_model(tiny.base(kind), feddip_config(**config, task_type="CAUSAL_LM"))

    server, client = make(), make()
    feddip_start(server, options)
    for number in range(2):
        feddip_receive(client, feddip_server_message(server, options, number), options, number, "a")
        steps(client, options, number, seed=number)
        reply = feddip_client_message(client, options, number, "a", 8)
        feddip_server_step(server, [read_feddip_message(server, reply, "a", options, number)], [1.0], options, number)
    ids = torch.arange(1, 21).view(2, 10)
    feddip_receive(client, feddip_server_message(server, options, 2), options, 2, "a")
    with torch.no_grad():
        assert torch.equal(server(input_ids=ids).logits, client(input_ids=ids).logits)
    heads = [name for name in unpack(reply, "a").tensors if "lm_head" in name]
    assert heads
    assert heads[0].startswith("other/")
    for layer in adapter_layers(server):
        off = ~layer.kept("default")
        assert off.any()
        assert not layer.masked_weight("default").dense[off].any()


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(llamas):
    options = FedDIP(rounds=10, reconfigure_every=1, first_mask="magnitude")
    server, client = llamas(), llamas()
    feddip_start(server, options)
    whole = feddip_server_message(server, options, 1)
    before = {k: v.clone() for k, v in client.state_dict().items()}

    def unchanged(model, state):
        return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())

    for data, number, match in (
        (whole[:-1], 1, "truncated"),
        (whole[:40] + bytes([whole[40] ^ 1]) + whole[41:], 1, "server"),
        (whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:], 1, "checksum"),
        (whole, 2, "for round 1, and 2"),
        (feddip_server_message(server, options, 1, known=masks_of(server)), 1, "does not have"),
    ):
        with pytest.raises(ValueError, match=match):
            feddip_receive(client, data, options, number, "a")
        assert unchanged(client, before)

    feddip_receive(client, whole, options, 1, "a")
    steps(client, options, 1, seed=0)
    reply = feddip_client_message(client, options, 1, "a", 8)
    state = {k: v.clone() for k, v in server.state_dict().items()}
    for data, sender, number, match in (
        (reply, "b", 1, "it is of 'a' and round 1"),
        (reply, "a", 2, "round 2"),
        (reply[:-9], "a", 1, "message of a.*truncated"),
        (feddip_client_message(llamas(), options, 1, "a", 8), "a", 1, "another mask"),
    ):
        with pytest.raises(ValueError, match=match):
            read_feddip_message(server, data, sender, options, number)
    with torch.no_grad():
        adapter_layers(client)[0].masked_lora_delta["default"].fill_(float("nan"))
    with pytest.raises(ValueError, match=r"values/model.layers.0.self_attn.q_proj.*NaN"):
        feddip_client_message(client, options, 1, "a", 8)
    with pytest.raises(ValueError, match=r"shares=\[0.5\]"):
        feddip_server_step(server, [], [0.5], options, 1)
    assert unchanged(server, state)
    lora = get_peft_model(tiny.llama(), feddip_config(update="low_rank", target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"update=LowRankUpdate.*feddip_config"):
        feddip_start(lora, options)
