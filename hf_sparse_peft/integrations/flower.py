"""Federated training by Flower (`flwr>=1.42`): a strategy for its server, an app for its clients.

    # server                                          # client
    from flwr.serverapp import ServerApp              from hf_sparse_peft.integrations.flower import client_app
    from hf_sparse_peft.integrations import flower
                                                      app = client_app(make_party, train)
    app = ServerApp()

    @app.main()
    def main(grid, context):
        party = FedAvgParty(make_model(), server=True)
        flower.start(party, grid, rounds=10)

`make_party(context)` makes a client's `federated.Party` on a model of its own, `train(party, rule, context)` trains
that model and returns how many examples there were. Flower carries bytes; what they are, and what is refused, is
`hf_sparse_peft.federated`'s. What a client must remember lies in Flower's `context.state`, so that it may be another
process every time. flwr is imported when one of the functions is called, not before. It asks for older protobuf, typer,
rich and packaging than constraints.txt has: give it an environment of its own, `pip install hf-sparse-peft[flower]`.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal

from ..federated import Party, choose_clients, collect
from ..rules import Rule
from ..utils.option_types import PositiveInt, check_value

RECORD, MESSAGE, MEMORY = "hf_sparse_peft", "message", "memory"
"""Names in Flower's messages and states."""
_logger = logging.getLogger(__name__)


def start(party: Party, grid: Any, rounds: int, *, timeout: float = 3600, evaluate: Any = None, **options: Any) -> Any:
    """Run `rounds` rounds over Flower's `grid`; the party's model is then the global one. Returns Flower's `Result`,
    whose metrics of a round are `clients`, `refused`, `bytes-down` and `bytes-up`.

    Args:
        party: the server's (`server=True`).
        grid: what Flower gives the server's app.
        rounds: how many.
        timeout: seconds that replies are waited for; a client that takes longer has none.
        evaluate: `evaluate(model)` -> a dict of figures, after each round and before the first.
        options: of `strategy_of`.
    """
    from flwr.app import ArrayRecord, MetricRecord

    def figures(number: int, arrays: Any) -> Any:
        return None if evaluate is None else MetricRecord(evaluate(party.model))

    return strategy_of(party, **options).start(
        grid=grid, initial_arrays=ArrayRecord(), num_rounds=rounds, timeout=timeout, evaluate_fn=figures
    )


def strategy_of(
    party: Party,
    *,
    fraction: float = 1.0,
    available: int = 1,
    patience: float = 600,
    least: int = 1,
    on_bad: Literal["skip", "stop"] = "skip",
    seed: int = 0,
) -> Any:
    """A `flwr.serverapp.strategy.Strategy` that runs the rounds of `party`.

    Args:
        party: the server's.
        fraction: of Flower's nodes that take part in a round.
        available: nodes that a round waits for before it draws.
        patience: seconds that it waits at most.
        least: good replies that a round needs.
        on_bad: whether a round goes on without a reply that is missing or refused, or stops.
        seed: of the nodes that are drawn.

    Raises:
        ValueError: the party is a client's.
        ImportError: flwr is not installed.
    """
    if not party.server:
        raise ValueError("party is a client's. Make the server's with server=True.")
    check_value(available, PositiveInt, "strategy_of(available)")
    return _strategy_class()(party, fraction, (available, patience), least, on_bad, seed)


def client_app(make_party: Callable[[Any], Party], train: Callable[[Party, Rule | None, Any], int]) -> Any:
    """A `flwr.clientapp.ClientApp` that takes part.

    Args:
        make_party: `make_party(context)` gives a party with `server=False`, on a model that this call may train; what
            takes long, the base, may be kept by it (`functools.cache`) for as long as Flower keeps the process.
        train: `train(party, rule, context)` trains `party.model`, with `rule` where that is not None
            (`Controller(rule=...)`), and returns how many examples it trained on.

    Raises:
        ImportError: flwr is not installed.
    """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def take_part(message: Any, context: Any) -> Any:
        told, client = message.content[RECORD], str(message.metadata.dst_node_id)
        party = make_party(context)
        if RECORD in context.state:
            party.recall(client, context.state[RECORD][MEMORY])
        reply = party.local(client, told["round"], told[MESSAGE], lambda _, rule: train(party, rule, context))
        context.state[RECORD] = ConfigRecord({MEMORY: party.memory(client)})
        return Message(content=RecordDict({RECORD: ConfigRecord({MESSAGE: reply})}), reply_to=message)

    return app


@functools.cache
def _strategy_class() -> type:
    from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
    from flwr.serverapp.strategy import Strategy

    class SparsePeftStrategy(Strategy):
        """Rounds of a party."""

        def __init__(
            self, party: Party, fraction: float, awaited: tuple[int, float], least: int, on_bad: str, seed: int
        ) -> None:
            self.party, self.fraction, self.awaited, self.seed = party, fraction, awaited, seed
            self.collect = functools.partial(collect, on_bad=on_bad, least=least)
            self.chosen: list[str] = []
            self.bytes_down = 0

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
            nodes = _nodes(grid, *self.awaited)
            self.chosen = choose_clients(nodes, self.fraction, server_round - 1, self.seed)
            sent = {client: self.party.message(client, server_round - 1) for client in self.chosen}
            self.bytes_down = sum(len(data) for data in sent.values())
            return [
                Message(
                    content=RecordDict({RECORD: ConfigRecord({"round": server_round - 1, MESSAGE: data})}),
                    message_type=MessageType.TRAIN,
                    dst_node_id=int(client),
                )
                for client, data in sent.items()
            ]

        def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> tuple[None, Any]:
            found: dict[str, Any] = dict.fromkeys(self.chosen)
            for message in replies:
                client = str(message.metadata.src_node_id)
                found[client] = _reply(message)
            done = self.collect(server_round - 1, found, self.party.reader(server_round - 1))
            for client in done.refused:
                self.party.forget(client)
            self.party.step(done)
            figures = {"clients": len(done.replies), "refused": len(done.refused)}
            return None, MetricRecord({**figures, "bytes-down": self.bytes_down, "bytes-up": done.bytes_up})

        def configure_evaluate(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Iterable[Any]:
            return []

        def aggregate_evaluate(self, server_round: int, replies: Iterable[Any]) -> None:
            return None

        def summary(self) -> None:
            _logger.info("%s, a fraction of %s of the nodes in each round", self.party.name, self.fraction)

    return SparsePeftStrategy


def _nodes(grid: Any, available: int, patience: float) -> list[str]:
    """Names of Flower's nodes, once there are so many."""
    end = time.monotonic() + patience
    while len(nodes := [str(node) for node in grid.get_node_ids()]) < available:
        if time.monotonic() > end:
            raise ValueError(
                f"Flower has {len(nodes)} nodes after {patience} s, and available={available} are awaited."
            )
        time.sleep(0.2)
    return nodes


def _reply(message: Any) -> bytes | RuntimeError | None:
    """The bytes in Flower's message, or its error."""
    if message.has_error():
        return RuntimeError(message.error.reason.strip().rpartition("\n")[2])  # above it is Flower's traceback
    record = message.content.config_records.get(RECORD, {})
    return record.get(MESSAGE)
