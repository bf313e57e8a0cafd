"""FedAvg of adapters: means against float64 references of the dense updates, supports that moved, factors, refusals."""

import copy
import json

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft import (
    KernelLoraConfig,
    MaskedLoraConfig,
    Regrow,
    SparseLoraConfig,
    SpectralLoraConfig,
    callbacks_for,
)
from hf_sparse_peft.federated import (
    AdapterUpdate,
    adapter_message,
    adapter_tensors,
    choose_clients,
    collect,
    fedavg,
    pack,
    pack_all,
    read_adapter_message,
    unpack,
    unpack_all,
    write_adapter_tensors,
)
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.utils.checksums import checked_bytes

TARGETS = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SHARES = [0.5, 0.3, 0.2]


def adapted(config, seed=1):
    torch.manual_seed(seed)
    return get_peft_model(tiny.llama(), copy.deepcopy(config))


def noisy(model, seed):
    """Every trained number and head moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def deltas(model):
    """Dense update of each module, fp64, from merged weights."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[name] = module.get_delta_weight("default").detach().double()
    return found


def update_of(model, client, examples=1):
    return AdapterUpdate(client, examples, 0, adapter_tensors(model))


@pytest.mark.parametrize("granularity", ["entry", "block", "row", "subnet"])
def test_equal_supports_average_to_the_mean_of_the_updates(granularity):
    config = SparseLoraConfig(
        r=0, density=0.2, granularity=granularity, block_size=4, modules_to_save=["lm_head"], **TARGETS
    )
    clients = [noisy(adapted(config), seed) for seed in range(3)]
    result = fedavg(
        [update_of(model, str(at), n) for at, (model, n) in enumerate(zip(clients, (5, 3, 2), strict=True))]
    )
    server = adapted(config)
    write_adapter_tensors(server, result.tensors)
    every = [deltas(model) for model in clients]
    for name, found in deltas(server).items():
        expected = sum(share * one[name] for share, one in zip(SHARES, every, strict=True))
        assert torch.allclose(found, expected, atol=1e-6)
        assert expected.any()
    heads = [dict(model.named_parameters()) for model in (*clients, server)]
    name = next(key for key in heads[0] if "modules_to_save" in key)
    expected = sum(share * one[name].double() for share, one in zip(SHARES, heads, strict=False))
    assert torch.allclose(heads[-1][name].double(), expected, atol=1e-6)
    assert result.dropped == {} == result.factor_errors


@pytest.mark.parametrize("granularity", ["entry", "block", "column"])
def test_supports_that_moved_meet_on_their_union_and_the_largest_stay(granularity):
    options = {"r": 0, "density": 0.25, "granularity": granularity, "block_size": 4, **TARGETS}
    clients = [noisy(adapted(SparseLoraConfig(seed=seed, **options)), seed) for seed in range(3)]
    updates = [update_of(model, str(at)) for at, model in enumerate(clients)]
    result = fedavg(updates, SHARES)
    server = adapted(SparseLoraConfig(seed=9, **options))
    write_adapter_tensors(server, result.tensors)
    every = [deltas(model) for model in clients]
    for layer in adapter_layers(server):
        found = layer.get_delta_weight("default").detach().double()
        name = next(key for key in every[0] if key.endswith(layer.module_name))
        whole = sum(share * one[name] for share, one in zip(SHARES, every, strict=True))
        grid = layer.sparse_lora_grid["default"]
        units = grid.gather(whole, torch.arange(grid.num_units))
        sizes = units.abs().reshape(grid.num_units, -1).sum(1)
        count = layer.sparse_lora_values["default"].shape[0]
        best = sizes.topk(count).indices.sort().values
        assert torch.equal(layer.units("default").long(), best)
        expected = torch.zeros_like(whole)
        grid.scatter_add_(expected, best, units[best])
        assert torch.allclose(found, expected, atol=1e-6)
        lost = 1 - float(expected.square().sum() / whole.square().sum())
        key = next(key for key in result.dropped if key.endswith(layer.module_name))
        assert result.dropped[key] == pytest.approx(lost, abs=1e-9)
        assert lost > 0
    with pytest.raises(ValueError, match="moved='refuse'"):
        fedavg(updates, SHARES, moved="refuse")


@pytest.mark.parametrize("kind", ["sparse", "peft"])
def test_factors_apart_are_not_their_product_and_the_error_says_by_how_much(kind):
    config = LoraConfig(r=4, **TARGETS) if kind == "peft" else SparseLoraConfig(r=4, density=0.1, **TARGETS)
    clients = [noisy(adapted(config), seed) for seed in range(3)]
    updates = [update_of(model, str(at)) for at, model in enumerate(clients)]
    every = [{key: low_rank(model, key) for key in modules(model)} for model in clients]
    for factors in ("apart", "product"):
        server = adapted(config)
        result = fedavg(updates, SHARES, factors=factors)
        write_adapter_tensors(server, result.tensors)
        for name in modules(server):
            mean = sum(share * one[name] for share, one in zip(SHARES, every, strict=True))
            found = low_rank(server, name)
            U, S, V = torch.linalg.svd(mean)
            best = (U[:, :4] * S[:4]) @ V[:4]
            error = float((found - mean).norm() / mean.norm())
            told = next(value for key, value in result.factor_errors.items() if key.endswith(name))
            assert told == pytest.approx(error, rel=1e-4)
            if factors == "product":
                assert torch.allclose(found, best, atol=1e-5)
            else:
                assert error > float((best - mean).norm() / mean.norm())


def modules(model):
    return [
        name.removeprefix("base_model.model.")
        for name, m in model.named_modules()
        if name.endswith(("q_proj", "down_proj"))
    ]


def low_rank(model, name):
    module = model.get_submodule(f"base_model.model.{name}")
    if hasattr(module, "sparse_lora_A"):
        scale = module.sparse_lora_scaling["default"]
        return (scale * module.sparse_lora_B["default"] @ module.sparse_lora_A["default"]).detach().double()
    return module.get_delta_weight("default").detach().double()


def test_a_frozen_factor_makes_the_mean_exact():
    config = LoraConfig(r=4, **TARGETS)
    clients = [adapted(config) for _ in range(2)]
    for seed, model in enumerate(clients):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    for factors in ("apart", "product"):
        result = fedavg([update_of(m, str(at)) for at, m in enumerate(clients)], factors=factors)
        assert result.factor_errors == {}
        server = adapted(config)
        write_adapter_tensors(server, result.tensors)
        for name in modules(server):
            expected = sum(0.5 * low_rank(model, name) for model in clients)
            assert torch.allclose(low_rank(server, name), expected, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        KernelLoraConfig(r=4, sparsity=0.5, **TARGETS),
        SpectralLoraConfig(r=4, **TARGETS),
        MaskedLoraConfig(r=4, mask="all", **TARGETS),
    ],
    ids=["kernel", "spectral", "masked"],
)
def test_every_tuner_travels_and_averages(config):
    clients = [noisy(adapted(config), seed) for seed in range(2)]
    known = adapter_tensors(adapted(config))
    updates = []
    for at, model in enumerate(clients):
        data = adapter_message(model, 4, client=str(at), examples=2, known=known)
        updates.append(read_adapter_message(data, str(at), known, number=4, config=model.peft_config["default"]))
        assert all(torch.equal(updates[-1].tensors[key], value) for key, value in adapter_tensors(model).items())
    result = fedavg(updates)
    server = adapted(config)
    write_adapter_tensors(server, result.tensors)
    for name, tensor in adapter_tensors(server).items():
        both = [update.tensors[name] for update in updates]
        expected = (both[0].double() + both[1].double()) / 2 if tensor.is_floating_point() else both[0]
        assert torch.equal(tensor, expected.to(tensor.dtype))


def test_masks_that_differ_have_no_mean():
    config = MaskedLoraConfig(r=4, mask="all", **TARGETS)
    clients = [adapted(config) for _ in range(2)]
    adapter_layers(clients[1])[0].masked_lora_mask["default"][0] = 1
    with pytest.raises(ValueError, match=r"q_proj.masked_lora_mask' of 'b' is not that of 'a'"):
        fedavg([update_of(clients[0], "a"), update_of(clients[1], "b")])


def test_what_the_receiver_has_is_not_sent():
    config = SparseLoraConfig(r=0, density=0.2, **TARGETS)
    model = adapted(config)
    known = adapter_tensors(model)
    noisy(model, 0)
    whole, short = adapter_message(model, 1), adapter_message(model, 1, known=known)
    assert {name.rpartition("_")[2] for name in unpack(short, "server").tensors} == {"values"}
    assert len(whole) - len(short) >= sum(t.numel() for name, t in known.items() if name.endswith("support"))
    for data in (whole, short):
        read = read_adapter_message(data, "server", known).tensors
        assert all(torch.equal(read[key], value) for key, value in adapter_tensors(model).items())
    other = adapter_tensors(adapted(SparseLoraConfig(r=0, density=0.2, seed=5, **TARGETS)))
    with pytest.raises(ValueError, match="believes known"):
        read_adapter_message(short, "server", other)


def test_a_message_is_whole_or_refused_by_its_senders_name():
    model = adapted(SparseLoraConfig(r=2, density=0.2, **TARGETS))
    known, data = adapter_tensors(model), adapter_message(model, 1, client="a", examples=3)
    for at in range(0, len(data), max(1, len(data) // 97)):
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]):
            with pytest.raises(ValueError, match=r"of ('|)a\b"):
                read_adapter_message(damaged, "a", known, config=model.peft_config["default"])
    with pytest.raises(ValueError, match="is a str, not bytes"):
        read_adapter_message("text", "a", known)
    for options, match in (
        ({"number": 2}, "round 1; awaited: round 2"),
        ({"known": {**known, "more": torch.ones(1)}}, "leaves out"),
    ):
        with pytest.raises(ValueError, match=match):
            read_adapter_message(data, "a", **{"known": known, **options})
    with pytest.raises(ValueError, match="it is of 'a'"):
        read_adapter_message(data, "b", known)
    with pytest.raises(ValueError, match="'feddip' is awaited"):
        unpack(data, "a", "feddip")
    plain = data.replace(b'\\"examples\\": 3', b'\\"examples\\":-3')
    assert len(plain) == len(data)
    with pytest.raises(ValueError, match="checksum"):
        read_adapter_message(plain, "a", known)
    tensors = unpack(data, "a").tensors
    about = {"round": 1, "client": "a", "examples": -1, "left_out": "00000000"}
    with pytest.raises(ValueError, match="examples=-1 is out of range"):
        read_adapter_message(pack("adapter", tensors, **about), "a", known)
    bent = {name: t[1:] if name.endswith("values") else t for name, t in tensors.items()}
    none = unpack(adapter_message(model, 1, client="a"), "a").about["left_out"]
    with pytest.raises(ValueError, match=r"sparse_lora_values' of 'a' is torch.float32 of shape"):
        read_adapter_message(pack("adapter", bent, **{**about, "examples": 1, "left_out": none}), "a", known)


def test_a_support_of_another_weight_is_refused_before_it_is_averaged():
    config = SparseLoraConfig(r=0, density=0.2, **TARGETS)
    model = adapted(config)
    known = adapter_tensors(model)
    name = next(key for key in known if key.endswith("support"))
    for tensors in ({**known, name: torch.zeros_like(known[name])}, {**known, name: known[name].flip(0)}):
        none = unpack(adapter_message(model, 0, client="a"), "a").about["left_out"]
        data = pack("adapter", tensors, round=0, client="a", examples=1, left_out=none)
        with pytest.raises(ValueError, match=r"q_proj|down_proj"):
            read_adapter_message(data, "a", known, config=model.peft_config["default"])
    before = adapter_tensors(model)
    with pytest.raises(ValueError, match=r"down_proj|q_proj"):
        write_adapter_tensors(model, {**known, name: torch.zeros_like(known[name])})
    assert all(torch.equal(value, before[key]) for key, value in adapter_tensors(model).items())


def test_rounds_go_on_without_bad_replies_or_stop_and_never_average_none():
    model = noisy(adapted(SparseLoraConfig(r=0, density=0.2, **TARGETS)), 0)
    known = adapter_tensors(model)

    def read(data, client):
        return read_adapter_message(data, client, known, number=3)

    good = {name: adapter_message(model, 3, client=name, examples=n) for name, n in (("a", 30), ("b", 10))}
    with torch.no_grad():
        adapter_layers(model)[0].sparse_lora_values["default"][0] = float("nan")
    with pytest.raises(ValueError, match=r"this message.*NaN"):
        adapter_message(model, 3, client="d", examples=1)
    broken = pack_unchecked(adapter_tensors(model), client="d")
    replies = {**good, "c": None, "d": broken, "e": good["a"][:-5], "f": RuntimeError("out of memory")}
    with pytest.warns(UserWarning, match="Round 3, client"):
        found = collect(3, replies, read)
    assert [one.client for one in found.replies] == ["a", "b"]
    assert found.shares() == [0.75, 0.25]
    assert found.shares("equal") == [0.5, 0.5]
    assert found.bytes_up == sum(len(data) for data in replies.values() if isinstance(data, bytes))
    assert sorted(found.refused) == ["c", "d", "e", "f"]
    assert found.refused["c"] == "no reply"
    assert "1 numbers of" in found.refused["d"]
    assert "NaN" in found.refused["d"]
    assert "truncated" in found.refused["e"]
    assert "out of memory" in found.refused["f"]
    with pytest.raises(ValueError, match=r"client 'c': no reply \(on_bad='stop'\)"):
        collect(3, replies, read, on_bad="stop")
    for bad, least in (({**good, "c": None}, 3), ({"c": None}, 1)):
        with (
            pytest.raises(ValueError, match=r"good replies of \d.*'c': 'no reply'"),
            pytest.warns(UserWarning, match="no reply"),
        ):
            collect(3, bad, read, least=least)
    alone = collect(3, {"a": good["a"]}, read)
    tensors = fedavg(alone.replies, alone.shares()).tensors
    assert all(torch.equal(tensors[key], value) for key, value in alone.replies[0].tensors.items())


def pack_unchecked(tensors, client):
    about = {"kind": "adapter", "round": 3, "client": client, "examples": 1, "left_out": "00000000"}
    return checked_bytes(tensors, {"federated": json.dumps(about)})


def test_several_messages_travel_as_one():
    some = [pack("adapter", {"x": torch.arange(float(n))}, number=n) for n in (1, 3, 12)]
    data = pack_all(some)
    assert unpack_all(data, "server") == some
    assert unpack_all(pack_all([]), "server") == []
    with pytest.raises(ValueError, match="server"):
        unpack_all(data[:-1], "server")
    with pytest.raises(ValueError, match="'several' is awaited"):
        unpack_all(some[0], "server")
    for odd in (torch.ones(4, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"'x' of 'server'.*no message"):
            unpack_all(pack("several", {"x": odd}), "server")


def test_8_bit_floats_are_read_as_such_and_those_that_are_nan_refused():
    data = pack("any", {"x": torch.ones(3).to(torch.float8_e4m3fn)})
    assert unpack(data, "a").tensors["x"].dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"'x' of 'this message' has 1 numbers of 2"):
        pack("any", {"x": torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)})


def test_clients_are_drawn_without_replacement_by_seed_and_round():
    names = [f"c{i}" for i in range(10)]
    drawn = [tuple(choose_clients(names, 0.35, number, seed)) for seed in (0, 1) for number in range(20)]
    assert all(len(set(one)) == 3 == len(one) and set(one) <= set(names) for one in drawn)
    assert drawn[0] == tuple(choose_clients(list(reversed(names)), 0.35, 0, 0))
    assert len(set(drawn)) > 30
    assert {name for one in drawn for name in one} == set(names)
    assert choose_clients(["only"], 0.1, 0) == ["only"]
    for bad, match in ((([], 0.5, 0), "clients="), ((["a", "a"], 0.5, 0), "clients="), ((["a"], 0.0, 0), "fraction")):
        with pytest.raises(ValueError, match=match):
            choose_clients(*bad)


def test_averages_of_what_does_not_belong_together_are_refused():
    model = adapted(SparseLoraConfig(r=0, density=0.2, **TARGETS))
    one = update_of(model, "a")
    with pytest.raises(ValueError, match=r"updates=\[\]"):
        fedavg([])
    with pytest.raises(ValueError, match="add up to 1"):
        fedavg([one, one], [0.5, 0.6])
    with pytest.raises(ValueError, match="examples of 'a'=0"):
        fedavg([AdapterUpdate("a", 0, 0, one.tensors)])
    smaller = update_of(adapted(SparseLoraConfig(r=0, density=0.1, **TARGETS)), "b")
    with pytest.raises(ValueError, match="of 'b' is"):
        fedavg([one, smaller])
    gated = adapted(SparseLoraConfig(r=4, density=0.0, gate="ones", **TARGETS))
    updates = [update_of(noisy(gated, seed), str(seed)) for seed in range(2)]
    with pytest.raises(ValueError, match="sparse_lora_gate"):
        fedavg(updates, factors="product")
    fedavg(updates)


def test_a_support_moved_by_a_rule_comes_back_and_is_merged(tmp_path):
    config = SparseLoraConfig(r=0, density=0.1, schedule=[Regrow(every=2, grow="gradient", fraction=0.5)], **TARGETS)
    server = adapted(config)
    known, updates = adapter_tensors(server), []
    for seed, name in enumerate("ab"):
        client = adapted(config)
        write_adapter_tensors(client, known)
        data = tiny.TokenData(24, seed=seed)
        tiny.train(client, tmp_path / name, 5, data=data, callbacks=callbacks_for(client), learning_rate=0.1)
        message = adapter_message(client, 0, client=name, examples=24, known=known)
        updates.append(read_adapter_message(message, name, known, config=server.peft_config["default"]))
    result = fedavg(updates)
    assert result.dropped
    assert max(result.dropped.values()) > 0
    write_adapter_tensors(server, result.tensors)
    again = adapted(config)
    write_adapter_tensors(again, read_adapter_message(adapter_message(server, 1), "server", known).tensors)
    ids = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        assert torch.equal(server(input_ids=ids).logits, again(input_ids=ids).logits)
