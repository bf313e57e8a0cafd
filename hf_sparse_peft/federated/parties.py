"""A party to federated training: a model, and what must be remembered between rounds; the functions of a method in the
order in which they are called. The server has one, and every process that clients live in.

    server                                            client
    data = party.message(client, number)  --bytes-->  reply = party.local(client, number, data, train)
    collect(number, replies, party.reader(number))    <--bytes--
    party.step(round)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from peft import PeftModel
from torch import Tensor

from ..rules import Rule
from ..tuners.masked_lora import set_masks
from .adapter_tensors import adapter_tensors, write_adapter_tensors
from .fedavg import Averaged, adapter_message, fedavg, read_adapter_message
from .feddip import FedDIP, feddip_server_step, feddip_start, masked_layers, masks_of
from .feddip_messages import feddip_client_message, feddip_receive, feddip_server_message, read_feddip_message
from .ferret import Ferret, Pool, ferret_server_step
from .ferret_messages import ferret_client_message, ferret_receive, ferret_server_message, read_ferret_message
from .messages import check_tensors_like, pack, pack_all, unpack, unpack_all
from .rounds import Round

Train = Callable[[PeftModel, Rule | None], int]
"""Local training: of the model, with the rule that the method asks for (`Controller(rule=...)`, a `RuleRunner` of a
Trainer); returns how many examples there were."""


class Party:
    """Base of the parties.

    Args:
        model: the party's own, of the same base and config as everybody's.
        server: whether it is the server's.
        adapter_name: which adapter.
    """

    name: ClassVar[str]

    def __init__(self, model: PeftModel, *, server: bool = False, adapter_name: str = "default") -> None:
        self.model, self.server, self.adapter_name = model, server, adapter_name
        self.held: dict[str, Any] = {}
        """Client -> what it has, as far as this party knows."""

    def message(self, client: str, number: int) -> bytes:
        """What the server sends to the client in round `number`, and notes that it has it."""
        raise NotImplementedError

    def local(self, client: str, number: int, data: bytes, train: Train) -> bytes:
        """A client's part of the round; returns its reply. Raises as the method's functions do."""
        raise NotImplementedError

    def reader(self, number: int) -> Callable[[bytes, str], Any]:
        """What `collect` reads replies with."""
        raise NotImplementedError

    def step(self, found: Round) -> Any:
        """The server's step; returns what the method says of it."""
        raise NotImplementedError

    def forget(self, client: str) -> None:
        """Send the client everything the next time: it may not have what it was sent."""
        self.held.pop(client, None)

    def memory(self, client: str) -> bytes:
        """What the client has, for a process that does not live until the next round."""
        return pack("memory", self.held.get(client, {}))

    def recall(self, client: str, data: bytes) -> None:
        """Take up what `memory` gave."""
        self.held[client] = unpack(data, client, "memory").tensors


class FedAvgParty(Party):
    """FedAvg of adapters; `options` are those of `fedavg`."""

    name = "fedavg"

    def __init__(
        self, model: PeftModel, *, server: bool = False, adapter_name: str = "default", **options: Any
    ) -> None:
        super().__init__(model, server=server, adapter_name=adapter_name)
        self.options = options
        self.tensors = adapter_tensors(model, adapter_name)
        """The global adapter."""

    def message(self, client: str, number: int) -> bytes:
        """The adapter, without what the client has to the bit."""
        known = self.held.get(client)
        data = adapter_message(self.model, number, known=known, adapter_name=self.adapter_name)
        self.held[client] = self.tensors
        return data

    def local(self, client: str, number: int, data: bytes, train: Train) -> bytes:
        """Take the global adapter, train, and send it back."""
        known = self.held.get(client, self.tensors)
        received = read_adapter_message(data, "server", known, number=number).tensors
        write_adapter_tensors(self.model, received, self.adapter_name)
        self.held[client] = received
        return adapter_message(
            self.model, number, client=client, examples=train(self.model, None), known=received,
            adapter_name=self.adapter_name,
        )  # fmt: skip

    def reader(self, number: int) -> Callable[[bytes, str], Any]:
        """`read_adapter_message` against the global adapter."""
        config = self.model.peft_config[self.adapter_name]
        return partial(read_adapter_message, known=self.tensors, number=number, config=config)

    def step(self, found: Round) -> Averaged:
        """The mean, written to the server's model."""
        averaged = fedavg(found.replies, found.shares(), **self.options)
        write_adapter_tensors(self.model, averaged.tensors, self.adapter_name)
        self.tensors = averaged.tensors
        return averaged


class FedDIPParty(Party):
    """FedDIP."""

    name = "feddip"

    def __init__(
        self, model: PeftModel, options: FedDIP, *, server: bool = False, adapter_name: str = "default"
    ) -> None:
        super().__init__(model, server=server, adapter_name=adapter_name)
        self.options = options
        masked_layers(model, adapter_name)
        if server:
            feddip_start(model, options, adapter_name)

    def message(self, client: str, number: int) -> bytes:
        """The kept values, and what changed of the masks."""
        known, name = self.held.get(client), self.adapter_name
        data = feddip_server_message(self.model, self.options, number, known=known, adapter_name=name)
        if not self.options.draws_masks(number):
            self.held[client] = masks_of(self.model, name)
        return data

    def local(self, client: str, number: int, data: bytes, train: Train) -> bytes:
        """Take the global model and its masks, train by the round's rule, send back what is kept."""
        if client in self.held:  # several clients may share a process' model
            set_masks(self.model, {name: ~bits for name, bits in self.held[client].items()}, self.adapter_name)
        feddip_receive(self.model, data, self.options, number, client, self.adapter_name)
        if not self.options.draws_masks(number):
            self.held[client] = masks_of(self.model, self.adapter_name)
        examples = train(self.model, self.options.local_rule(number))
        return feddip_client_message(self.model, self.options, number, client, examples, self.adapter_name)

    def reader(self, number: int) -> Callable[[bytes, str], Any]:
        """`read_feddip_message` against the server's masks."""
        model, options, name = self.model, self.options, self.adapter_name
        return lambda data, client: read_feddip_message(model, data, client, options, number, name)

    def step(self, found: Round) -> dict[str, float]:
        """The mean, and the next masks."""
        shares = found.shares()
        return feddip_server_step(self.model, found.replies, shares, self.options, found.number, self.adapter_name)

    def recall(self, client: str, data: bytes) -> None:
        """The client's masks, checked against the weights.

        Raises:
            ValueError: they are masks of other weights.
        """
        super().recall(client, data)
        sizes = {
            one.module_name: one.out_features * one.in_features for one in masked_layers(self.model, self.adapter_name)
        }
        held = self.held[client]
        if held and any(name not in held or held[name].shape != ((size + 7) // 8,) for name, size in sizes.items()):
            self.forget(client)
            raise ValueError(f"What '{client}' remembers are masks of other weights. Let it begin anew.")
        if not held:
            self.forget(client)


class FerretParty(Party):
    """Ferret, over the floating-point tensors of an adapter: all of its weights with `feddip_config()`, or factors."""

    name = "ferret"

    def __init__(
        self, model: PeftModel, options: Ferret, *, server: bool = False, adapter_name: str = "default"
    ) -> None:
        super().__init__(model, server=server, adapter_name=adapter_name)
        self.options, self.pool = options, Pool()
        self.log: list[bytes] = []
        """The server's message of each round, as far as this party has them."""
        self.applied = 0
        """Rounds that `tensors` have."""
        self.tensors = self._trained()
        """The global tensors."""

    def _trained(self) -> dict[str, Tensor]:
        held = adapter_tensors(self.model, self.adapter_name)
        return {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}

    def _write(self) -> None:
        whole = {**adapter_tensors(self.model, self.adapter_name), **self.tensors}
        write_adapter_tensors(self.model, whole, self.adapter_name)

    def message(self, client: str, number: int) -> bytes:
        """The rounds' messages that the client has not seen; one that is new begins with the base."""
        data = pack_all(self.log[self.held.get(client, 0) : number])
        self.held[client] = number
        return data

    def local(self, client: str, number: int, data: bytes, train: Train) -> bytes:
        """Apply the rounds that are new, train, send coordinates.

        Raises:
            ValueError: a round is missing between those that this party has and those that were sent.
        """
        some = unpack_all(data, "server")
        first = number - len(some)
        if first > self.applied:
            raise ValueError(
                f"'{client}' has the global tensors of round {self.applied}, and was sent those from {first} on. Let "
                "the server forget it: Party.forget(client)."
            )
        for at in range(self.applied, number):  # clients of one process share its copy
            self.tensors = ferret_receive(self.tensors, some[at - first], self.options, at)
            self.applied = at + 1
        self._write()
        examples = train(self.model, None)
        return ferret_client_message(self.tensors, self._trained(), self.options, number, client, examples)

    def reader(self, number: int) -> Callable[[bytes, str], Any]:
        """`read_ferret_message` against the global tensors."""
        return partial(read_ferret_message, like=self.tensors, options=self.options, number=number)

    def step(self, found: Round) -> dict[str, float]:
        """The step, written to the server's model and to the log."""
        before = self.tensors
        self.tensors, terms = ferret_server_step(before, found.replies, found.shares(), self.options, self.pool)
        self.log.append(ferret_server_message(terms, found.number, self.options.step))
        self.applied = found.number + 1
        self._write()
        moved = sum(float((self.tensors[name] - one).square().sum()) for name, one in before.items())
        return {"moved": moved**0.5}

    def memory(self, client: str) -> bytes:
        """The global tensors, and how many rounds they have."""
        return pack("memory", self.tensors, rounds=self.applied)

    def recall(self, client: str, data: bytes) -> None:
        """Take them up, where they have more rounds than this party's."""
        message = unpack(data, client, "memory")
        if message.get("rounds", int, client) > self.applied:
            check_tensors_like(message.tensors, self.tensors, client)
            # Blocks follow from the order of the tensors.
            self.tensors = {name: message.tensors[name] for name in self.tensors}
            self.applied = message.about["rounds"]


PARTIES: dict[Literal["fedavg", "feddip", "ferret"], type[Party]] = {
    party.name: party for party in (FedAvgParty, FedDIPParty, FerretParty)
}
"""By name."""
