"""Flower: rounds through a stand-in of its interface, and, where it is installed, through its simulation (slow); both
end with the tensors that the parties alone end with."""

import json
import subprocess
import sys
import types
from contextlib import nullcontext
from pathlib import Path

import flower_simulation as simulation
import pytest
import torch
from safetensors.torch import load_file

from hf_sparse_peft.federated import adapter_tensors, collect
from hf_sparse_peft.integrations import flower

KINDS = ("fedavg", "feddip", "ferret")


def parties_alone(kind):
    """The same rounds without Flower; client 2 has no power in round 1."""
    server, clients = simulation.party_of(kind, server=True), {}
    for number in range(simulation.ROUNDS):
        replies = {}
        for part in range(simulation.CLIENTS):
            name = str(part)
            party = clients.setdefault(name, simulation.party_of(kind))
            data = server.message(name, number)

            def local(_, rule, party=party, part=part, number=number):
                return simulation.train(party, rule, part, number)

            try:
                replies[name] = party.local(name, number, data, local)
            except RuntimeError as error:
                replies[name] = error
        with pytest.warns(UserWarning, match="no power") if number == 1 else nullcontext():
            found = collect(number, replies, server.reader(number))
        for client in found.refused:
            server.forget(client)
        server.step(found)
    return adapter_tensors(server.model)


class RecordDict(dict):
    @property
    def config_records(self):
        return self


class Message:
    def __init__(self, content=None, message_type=None, dst_node_id=None, reply_to=None, error=None):
        back = reply_to.metadata if reply_to is not None else types.SimpleNamespace(dst_node_id=0)
        self.content, self.message_type, self.error = content, message_type, error
        self.metadata = types.SimpleNamespace(dst_node_id=dst_node_id, src_node_id=back.dst_node_id)

    def has_error(self):
        return self.error is not None


class Strategy:
    """Flower's loop, as `flwr.serverapp.strategy.Strategy.start` has it."""

    def start(self, grid, initial_arrays, num_rounds, timeout, evaluate_fn):
        self.summary()
        metrics, evaluated = {}, {0: evaluate_fn(0, initial_arrays)}
        for number in range(1, num_rounds + 1):
            replies = grid.send_and_receive(self.configure_train(number, initial_arrays, {}, grid), timeout)
            arrays, metrics[number] = self.aggregate_train(number, replies)
            assert arrays is None
            nothing = self.configure_evaluate(number, initial_arrays, {}, grid)
            assert self.aggregate_evaluate(number, nothing) is None
            evaluated[number] = evaluate_fn(number, initial_arrays)
        return types.SimpleNamespace(train_metrics_clientapp=metrics, evaluate_metrics_serverapp=evaluated)


class ClientApp:
    def train(self):
        def enter(function):
            self.function = function
            return function

        return enter


class Grid:
    """Nodes in this process; states go through bytes, as Flower's do."""

    def __init__(self, app, damage=None):
        self.app, self.damage, self.states = app, damage, {}

    def get_node_ids(self):
        return range(simulation.CLIENTS)

    def send_and_receive(self, messages, timeout):
        for message in messages:
            node = message.metadata.dst_node_id
            state = self.states.setdefault(node, RecordDict())
            context = types.SimpleNamespace(state=state, node_config={"partition-id": node})
            try:
                reply = self.app.function(message, context)
            except Exception as error:
                reply = Message(reply_to=message, error=types.SimpleNamespace(reason=f"Traceback ...\n{error}"))
            if self.damage is not None:
                reply = self.damage(message, reply)
            if reply is not None:
                yield reply


@pytest.fixture
def flwr(monkeypatch):
    """A stand-in of what is used of Flower."""
    names = {
        "flwr": {},
        "flwr.app": {
            "ArrayRecord": dict, "ConfigRecord": dict, "MetricRecord": dict, "RecordDict": RecordDict,
            "Message": Message, "MessageType": types.SimpleNamespace(TRAIN="train"),
        },
        "flwr.clientapp": {"ClientApp": ClientApp},
        "flwr.serverapp": {},
        "flwr.serverapp.strategy": {"Strategy": Strategy},
    }  # fmt: skip
    for name, held in names.items():
        module = types.ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    flower._strategy_class.cache_clear()
    yield
    flower._strategy_class.cache_clear()


def local(party, rule, context):
    return simulation.train(party, rule, context.node_config["partition-id"], party.number)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_through_flower_end_where_the_parties_alone_do(kind, flwr):
    app = flower.client_app(lambda context: simulation.noted(kind), local)
    server = simulation.party_of(kind, server=True)
    with pytest.warns(UserWarning, match="Round 1, client '2': no reply: RuntimeError: no power"):
        result = flower.start(server, Grid(app), simulation.ROUNDS, evaluate=lambda model: {"seen": 1.0})
    expected = parties_alone(kind)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapter_tensors(server.model).items())
    clients = [result.train_metrics_clientapp[number]["clients"] for number in (1, 2, 3)]
    assert clients == [3, 2, 3]
    assert result.train_metrics_clientapp[2]["refused"] == 1
    assert all(one["bytes-up"] > 0 for one in result.train_metrics_clientapp.values())
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2, 3]


def test_a_damaged_reply_and_one_that_never_comes_are_left_out_or_end_the_run(flwr):
    app = flower.client_app(lambda context: simulation.noted("fedavg"), local)

    def damage(message, reply):
        if message.metadata.dst_node_id == 0:
            return None
        if message.metadata.dst_node_id == 1:
            record = reply.content[flower.RECORD]
            record[flower.MESSAGE] = record[flower.MESSAGE][:-3]
        return reply

    server = simulation.party_of("fedavg", server=True)
    with pytest.warns(UserWarning, match="The round goes on") as told:
        result = flower.start(server, Grid(app, damage), 1)
    assert result.train_metrics_clientapp[1]["clients"] == 1
    said = [str(one.message) for one in told]
    assert any("client '0': no reply" in one for one in said)
    assert any("client '1'" in one and "truncated" in one for one in said)
    with pytest.raises(ValueError, match="client '0'"):
        flower.start(simulation.party_of("fedavg", server=True), Grid(app, damage), 1, on_bad="stop")
    with pytest.raises(ValueError, match="least=2"), pytest.warns(UserWarning, match="no reply"):
        flower.start(simulation.party_of("fedavg", server=True), Grid(app, damage), 1, least=2)
    with pytest.raises(ValueError, match=r"3 nodes after 0.1 s, and available=4"):
        flower.start(simulation.party_of("fedavg", server=True), Grid(app), 1, available=4, patience=0.1)
    with pytest.raises(ValueError, match="server=True"):
        flower.start(simulation.party_of("fedavg"), Grid(app), 1)


def test_a_client_that_forgot_is_sent_everything_again(flwr):
    for kind in ("feddip", "ferret"):  # FedAvg leaves out what has not changed since the start
        app = flower.client_app(lambda context, kind=kind: simulation.noted(kind), local)
        server, grid = simulation.party_of(kind, server=True), Grid(app)
        strategy = flower.strategy_of(server)

        def a_round(number, strategy=strategy, grid=grid):
            return strategy.aggregate_train(
                number, grid.send_and_receive(strategy.configure_train(number, {}, {}, grid), 1)
            )

        a_round(1)
        with pytest.warns(UserWarning, match="client '2': no reply: RuntimeError: no power"):
            a_round(2)
        grid.states.pop(0)  # the node's disk is gone
        with pytest.warns(UserWarning, match="client '0': no reply: ValueError|client '0': no reply: RuntimeError"):
            a_round(3)
        _, metrics = a_round(4)
        assert metrics["clients"] == 3, kind


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_flowers_own_simulation_ends_where_the_parties_alone_do(kind, tmp_path):
    pytest.importorskip("ray")
    pytest.importorskip("flwr")
    script = Path(simulation.__file__)
    subprocess.run([sys.executable, str(script), str(tmp_path), kind], check=True, timeout=600)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [metrics[number]["clients"] for number in ("1", "2", "3")] == [3, 2, 3]
    found, expected = load_file(tmp_path / "tensors.safetensors"), parties_alone(kind)
    for key, tensor in found.items():  # Flower's names of nodes, by which sums are ordered, are drawn
        if tensor.is_floating_point():
            assert torch.allclose(tensor, expected[key], atol=1e-6), key
        else:
            assert torch.equal(tensor, expected[key])
