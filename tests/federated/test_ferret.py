"""Ferret: bases, coordinates and reconstructions against numbers and float64 references from its equations."""

import functools
import hashlib
import math

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from hf_sparse_peft.federated import (
    Ferret,
    Pool,
    adapter_tensors,
    collect,
    ferret_client_message,
    ferret_receive,
    ferret_server_message,
    ferret_server_step,
    project,
    read_ferret_message,
    reconstruct,
    unpack,
    write_adapter_tensors,
)
from hf_sparse_peft.federated.ferret import FerretUpdate, as_terms, counts_of
from hf_sparse_peft.federated.seeded_bases import base, bases, blocks_of, chosen_bases


def vector(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rebuilt(update, options, seed=None):
    """Of one client."""
    found = project(update, options, 0, "a", 1)
    return reconstruct(as_terms([found], [1.0], options), update, options)


def test_bases_are_bounded_have_a_third_of_the_variance_and_no_direction():
    for size in (1, 7, 64, 1000):
        made = torch.cat([some for _, some in bases(5, 0, range(max(2, 40_000 // size)), size)])
        assert float(made.abs().max()) <= size**-0.5
        assert size * float(made.double().square().mean()) == pytest.approx(1 / 3, abs=0.01)
        assert abs(float(made.double().mean())) < 0.02 * size**-0.5
    made = torch.cat([some for _, some in bases(5, 1, range(20_000), 16)]).double()
    covariance = made.t() @ made / len(made) * 16
    assert torch.allclose(covariance, torch.eye(16, dtype=torch.float64) / 3, atol=0.01)
    assert abs(float((made[:-1] * made[1:]).sum(1).mean())) < 0.005  # neither within a base nor between neighbours


def test_a_base_is_a_function_of_its_seed_block_and_number_alone():
    state = torch.get_rng_state()
    one = [some for _, some in bases(3, 2, [0, 1, 2, 5, 6, 9], 11)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat(one), torch.cat([base(3, 2, n, 11) for n in (0, 1, 2, 5, 6, 9)]))
    first = base(3, 2, 0, 4)
    assert first.tolist() == [[pytest.approx(x) for x in reference_base(3, 2, 0, 4)]]
    for other in (base(4, 2, 0, 4), base(3, 1, 0, 4), base(3, 2, 1, 4)):
        assert not torch.equal(first, other)


def reference_base(seed, block, number, size):
    """The hash of the position, in Python's own integers."""
    digest = hashlib.sha256()
    for part in (seed, block, number // ((2**32 - 1) // size)):
        digest.update(b"i%d:" % len(str(part)) + str(part).encode())
    key = int.from_bytes(digest.digest()[:8], "little") >> 1
    found = []
    for at in range(size):
        x = (number % ((2**32 - 1) // size)) * size + at
        x = (x * (((key >> 31) | 1) & 0x7FFFFFFF) + (key & 0xFFFFFFFF)) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        x ^= x >> 15
        found.append(((x >> 8) * 2.0**-23 - 1) / math.sqrt(size))
    return found


def test_more_bases_than_one_seed_has_positions_for_have_others(monkeypatch):
    from hf_sparse_peft.federated import seeded_bases

    monkeypatch.setattr(seeded_bases, "LONGEST", 101)
    made = torch.cat([some for _, some in bases(3, 0, range(30), 10)])
    assert made.shape == (30, 10)
    assert len({tuple(row.tolist()) for row in made}) == 30
    with pytest.raises(ValueError, match="'w' makes a block of 120 numbers"):
        blocks_of({"w": torch.zeros(120)})


def test_blocks_are_packed_up_to_nine_tenths_of_the_median():
    sizes = {"a": 10, "b": 100, "c": 20, "d": 60, "e": 15, "f": 300, "g": 100}  # median 60: at most 54
    found = blocks_of({name: torch.zeros(size) for name, size in sizes.items()})
    assert [(block.names, block.size) for block in found] == [
        (("a",), 10), (("b",), 100), (("c",), 20), (("d",), 60), (("e",), 15), (("f",), 300), (("g",), 100)
    ]  # fmt: skip
    packed = blocks_of({str(i): torch.zeros(2, 5) for i in range(4)} | {"big": torch.zeros(80)}, share=2.5)
    assert [block.names for block in packed] == [("0", "1"), ("2", "3"), ("big",)]
    even = blocks_of({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(20), "d": torch.zeros(30)}, share=1.0)
    assert [block.names for block in even] == [("a", "b"), ("c",), ("d",)]  # the median of an even number is 12
    with pytest.raises(ValueError, match="nothing trains"):
        blocks_of({})


def test_coordinates_follow_the_norms_of_blocks():
    assert counts_of([1.0, 0.5, 0.0], Ferret(bases=200)) == [200, 100, 2]
    assert counts_of([1.0, float("nan"), 0.3], Ferret(bases=10, least=3)) == [10, 3, 3]
    assert counts_of([0.0, 0.0], Ferret(bases=10)) == [2, 2]


def test_reconstructions_are_those_of_the_equation():
    options = Ferret(bases=9, clip=0, draw="run", scaling="official", least=3)
    update = {"x": vector(24, 1).view(4, 6), "y": 0.4 * vector(24, 2)}
    found = project(update, options, 7, "a", 1)
    again = reconstruct(as_terms([found], [1.0], options), update, options)
    flats = [update["x"].double().flatten(), update["y"].double()]
    norms = [float(flat.norm()) for flat in flats]
    for at, (name, flat) in enumerate(zip(("x", "y"), flats, strict=True)):
        count = max(int(9 * norms[at] / max(norms)), 3)
        numbers = chosen_bases(found.chosen, at, 9, count)
        V = torch.tensor([reference_base(found.seed, at, n, 24) for n in numbers], dtype=torch.float64)
        gamma = 24 / count * (V @ flat)
        assert len(set(numbers)) == count
        assert torch.allclose(found.coordinates[at].double(), gamma, rtol=1e-5, atol=1e-7)
        assert torch.allclose(again[name].double().flatten(), gamma @ V, rtol=1e-5, atol=1e-6)
    assert again["x"].shape == (4, 6)


def test_reconstruction_is_unbiased_and_the_official_one_a_third():
    update = {"w": vector(64)}
    for scaling, expected in (("unbiased", 1.0), ("official", 1 / 3)):
        options = Ferret(bases=20_000, clip=0, scaling=scaling, block_share=1.0)
        found = rebuilt(update, options)["w"].double()
        share = float(found @ update["w"].double() / update["w"].double().square().sum())
        assert share == pytest.approx(expected, abs=0.01 * max(1, 3 * expected))
        assert float(torch.cosine_similarity(found, update["w"].double(), dim=0)) > 0.99
    # In the mean over many drawings of few bases, entry by entry.
    options = Ferret(bases=8, clip=0, block_share=1.0)
    total = torch.zeros(16, dtype=torch.float64)
    small = {"w": vector(16)}
    for number in range(2000):
        one = project(small, options, number, "a", 1)
        total += reconstruct(as_terms([one], [1.0], options), small, options)["w"].double()
    spread = math.sqrt(1.2 * 16 / 8 / 2000) * float(small["w"].norm())
    assert float((total / 2000 - small["w"].double()).abs().max()) < 3 * spread


def test_the_cosine_falls_with_the_size_of_blocks_as_the_formula_says():
    update = {"w": vector(4096)}
    for count in (200, 2000):
        found = rebuilt(update, Ferret(bases=count, clip=0))["w"]
        cosine = float(torch.cosine_similarity(found, update["w"], dim=0))
        assert cosine == pytest.approx(math.sqrt(count / (count + 4096)), abs=0.03)


def test_the_server_lands_where_the_client_is():
    before = {"w": vector(64)}
    after = {"w": before["w"] + vector(64, 1)}

    def error(options, sign=1.0):
        moved = {"w": before["w"] + sign * (after["w"] - before["w"])}
        data = ferret_client_message(before, moved, options, 0, "a", 1)
        update = read_ferret_message(data, "a", before, options, 0)
        landed, _ = ferret_server_step(before, [update], [1.0], options)
        return float((landed["w"] - after["w"]).norm() / (after["w"] - before["w"]).norm())

    many = {"bases": 20_000, "clip": 0}
    assert error(Ferret(**many)) < 0.1
    assert error(Ferret(**many, scaling="official", step=3.0)) < 0.1
    assert error(Ferret(**many, scaling="official")) == pytest.approx(2 / 3, abs=0.03)
    assert error(Ferret(**many), sign=-1.0) == pytest.approx(2, abs=0.1)


def test_two_clients_have_the_mean_of_their_tables_and_momentum_halves_the_former():
    options = Ferret(bases=6, clip=0, draw="run", momentum=0.5, scaling="official", step=2.0)
    tensors, pool, table = {"w": torch.zeros(40)}, Pool(), torch.zeros(6, dtype=torch.float64)
    V = torch.tensor([reference_base(options.bases_seed(0, "a"), 0, n, 40) for n in range(6)], dtype=torch.float64)
    w = torch.zeros(40, dtype=torch.float64)
    for number in range(3):
        updates, mean = [], torch.zeros(6, dtype=torch.float64)
        for share, client in ((0.25, "a"), (0.75, "b")):
            update = {"w": vector(40, 10 * number + len(client) + ord(client))}
            updates.append(project(update, options, number, client, 1))
            numbers = chosen_bases(updates[-1].chosen, 0, 6, 6)
            mean[numbers] += share * 40 / 6 * (V[numbers] @ update["w"].double())
        table = 0.5 * table + mean
        w -= 2.0 * table @ V
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        moved, terms = ferret_server_step(tensors, updates, [0.25, 0.75], options, pool)
        assert torch.equal(tensors["w"], before["w"])
        assert torch.allclose(pool.coordinates[0].double(), table, rtol=1e-5, atol=1e-6)
        assert torch.allclose(moved["w"].double(), w, rtol=1e-4, atol=1e-5)
        assert [len(term.base_numbers[0]) for term in terms] == [6]
        tensors = moved
    residual = tensors["w"].double() - V.t() @ torch.linalg.lstsq(V.t(), tensors["w"].double()).solution
    assert float(residual.norm()) < 1e-6 * float(tensors["w"].norm()) + 1e-6  # all of the run lies in K directions


def test_a_term_is_at_most_as_long_as_clip():
    options = Ferret(bases=2, clip=0.5, draw="run")
    update = FerretUpdate("a", 1, options.bases_seed(0, "a"), options.chosen_seed(0, "a"), [torch.tensor([1e6, 0.1])])
    like = {"w": torch.zeros(30)}
    found = reconstruct(as_terms([update], [1.0], options), like, options)["w"].double()
    V = torch.tensor([reference_base(update.seed, 0, n, 30) for n in range(2)], dtype=torch.float64)
    expected = 0.5 * V[0] / V[0].norm() + 0.1 * V[1]
    assert torch.allclose(found, expected, atol=1e-6)


def payload(data):
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("draw", ["client", "round", "run"])
def test_messages_are_as_long_as_the_coordinates_and_all_get_the_same_model(draw):
    options = Ferret(bases=20, draw=draw)
    server = {"a": vector(900, 1).view(30, 30), "b": vector(500, 2), "c": vector(700, 3).bfloat16()}
    clients = {name: {key: value.clone() for key, value in server.items()} for name in ("x", "y")}
    late = {key: value.clone() for key, value in server.items()}
    sent = []
    for number in range(3):
        replies = {}
        for at, (name, held) in enumerate(clients.items()):
            moved = {
                key: value + 0.1 * vector(value.numel(), 7 * number + at).view(value.shape).to(value)
                for key, value in held.items()
            }
            replies[name] = ferret_client_message(held, moved, options, number, name, 10 * (at + 1))
            tensors = unpack(replies[name], name).tensors
            assert payload(replies[name]) == 4 * len(blocks_of(server)) + 4 * int(tensors["counts"].sum())
            assert int(tensors["counts"].max()) == 20
        read = functools.partial(read_ferret_message, like=server, options=options, number=number)
        found = collect(number, replies, read)
        server, terms = ferret_server_step(server, found.replies, found.shares(), options)
        assert len(terms) == (2 if draw == "client" else 1)
        sent.append(ferret_server_message(terms, number, options.step))
        for name in clients:
            clients[name] = ferret_receive(clients[name], sent[-1], options, number)
            assert all(torch.equal(clients[name][key], value) for key, value in server.items())
    for number, data in enumerate(sent):  # one who missed all rounds
        late = ferret_receive(late, data, options, number)
    assert all(torch.equal(late[key], value) for key, value in server.items())


def test_bytes_do_not_depend_on_the_size_of_the_model():
    options, sizes = Ferret(bases=200), []
    for side in (40, 400):
        before = {f"w{i}": torch.zeros(side, side) for i in range(24)}
        after = {name: vector(side * side, i).view(side, side) for i, name in enumerate(before)}
        equal = {name: tensor / tensor.norm() for name, tensor in after.items()}
        sizes.append(payload(ferret_client_message(before, equal, options, 0, "a", 1)))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert sizes[0] == pytest.approx(24 * (4 * 200 + 4), rel=0.01)  # L = 24 blocks, K = 200


def test_what_does_not_fit_is_refused_by_name():
    options, like = Ferret(bases=20), {"a": vector(900), "b": vector(500)}
    moved = {name: tensor + 1 for name, tensor in like.items()}
    data = ferret_client_message(like, moved, options, 3, "x", 5)
    assert read_ferret_message(data, "x", like, options, 3).examples == 5
    for args, match in (
        ((data[:-1], "x", like, options, 3), "message of x.*truncated"),
        ((data, "y", like, options, 3), "it is of 'x' and round 3"),
        ((data, "x", like, options, 4), "awaited: round 4"),
        ((data, "x", {**like, "c": vector(900)}, options, 3), "not those of 3 blocks"),
        ((data, "x", like, Ferret(bases=10), 3), "at most 10 each"),
        ((data, "x", like, Ferret(bases=20, seed=1), 3), "other bases than round 3"),
    ):
        with pytest.raises(ValueError, match=match):
            read_ferret_message(*args)
    broken = {**moved, "b": moved["b"].index_fill(0, torch.tensor(3), torch.nan)}
    with pytest.raises(ValueError, match="'b' of 'x' has 1 numbers of 500"):
        ferret_client_message(like, broken, options, 3, "x", 5)
    with pytest.raises(ValueError, match="'b' is missing"):
        ferret_client_message(like, {"a": moved["a"]}, options, 3, "x", 5)
    update = read_ferret_message(data, "x", like, options, 3)
    with pytest.raises(ValueError, match="in all 1"):
        ferret_server_step(like, [update], [0.5], options)
    fixed = Ferret(bases=20, draw="run", momentum=0.9)
    with pytest.raises(ValueError, match=r"pass the same pool=Pool\(\)"):
        ferret_server_step(like, [project(moved, fixed, 0, "x", 1)], [1.0], fixed)
    for wrong, name in (({"momentum": 0.5}, "momentum"), ({"bases": 1}, "least"), ({"scaling": "paper"}, "scaling")):
        with pytest.raises(ValueError, match=rf"Ferret.{name}"):
            Ferret(**wrong)
    down = ferret_server_message(as_terms([update], [1.0], options), 3, 1.0)
    for number, message in ((4, down), (3, down[:50])):
        with pytest.raises(ValueError, match="server"):
            ferret_receive(like, message, options, number)
    with pytest.raises(ValueError, match="not those of 1 blocks"):
        ferret_receive({"a": vector(900)}, down, options, 3)


def test_an_adapter_of_peft_is_trained_by_coordinates():
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    server = get_peft_model(tiny.llama(), config)
    options, tensors = Ferret(bases=40, clip=0), adapter_tensors(server)
    data, losses = tiny.TokenData(16, seed=1), []
    batch = {key: torch.stack([data[i][key] for i in range(16)]) for key in data[0]}
    for number in range(6):
        write_adapter_tensors(server, tensors)
        optimizer = torch.optim.SGD([p for p in server.parameters() if p.requires_grad], lr=1.0)
        for _ in range(4):
            loss = server(**batch).loss
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        message = ferret_client_message(tensors, adapter_tensors(server), options, number, "a", 16)
        update = read_ferret_message(message, "a", tensors, options, number)
        tensors, _ = ferret_server_step(tensors, [update], [1.0], options)
    write_adapter_tensors(server, tensors)
    assert server(**batch).loss.item() < losses[0] - 0.02
    assert payload(message) < 4 * sum(tensor.numel() for tensor in tensors.values())
