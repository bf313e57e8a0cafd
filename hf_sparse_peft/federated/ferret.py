r"""Ferret: local updates as a few coordinates in random bases that all can draw (Shu et al., 2024).

    client                                       server
    ferret_client_message   --bytes-->           read_ferret_message
                                                 ferret_server_step, ferret_server_message
    ferret_receive          <--bytes--

Any tensors take part, by name: all weights of a model, or those of an adapter (`adapter_tensors`). Client and server
apply the same messages, and so hold the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..sparsity import stream_seed
from ..utils.option_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, check_types
from ..utils.parts import require
from .messages import check_finite
from .seeded_bases import VARIANCE, bases, blocks_of, chosen_bases


@dataclass(frozen=True)
class Ferret:
    r"""Options of Ferret (Shu et al., 2024).

    An update :math:`\Delta = w_{old} - w_{new}` is cut into blocks of :math:`d` numbers, and block :math:`\ell` sent as
    :math:`n_\ell = \max(\lfloor K \|\Delta_\ell\| / \max_j \|\Delta_j\| \rfloor, 2)` coordinates

    .. math:: \gamma_k = \frac{d}{\rho\,n_\ell} \langle \Delta_\ell, v_k \rangle, \qquad
              \hat\Delta_\ell = \sum_k \gamma_k v_k, \qquad E[v v^\top] = \frac{\rho}{d} I,\ \rho = 1/3,

    so that :math:`E[\hat\Delta] = \Delta`; its cosine to it is about :math:`\sqrt{n / (n + d)}`. The server moves
    the global tensors by minus the clients' weighted mean, `step` times.

    Raises:
        ValueError: an option is out of range, or two exclude each other.
    """

    bases: PositiveInt = 200
    """K, the most coordinates of a block (official script: 200; its parser: 4096)."""
    step: PositiveFloat = 1.0
    """Server's step. With `scaling="official"` and 3 the mean is what it is here with 1; the script takes 10."""
    scaling: Literal["unbiased", "official"] = "unbiased"
    r"""Whether coordinates are divided by the variance of bases (:math:`\rho`), or, as in the official code, not: the
    mean of a reconstruction is then :math:`\Delta / 3`."""
    draw: Literal["client", "round", "run"] = "client"
    """Bases are new for each client in each round (its seed is sent), for each round, or the same in the whole run
    (official code). With the last two clients choose theirs among K, and the server draws each once for all of them."""
    clip: NonNegativeFloat = 10.0
    r"""Largest norm of one term :math:`\gamma_k v_k` at the server, for one block; 0: no limit (official: 10)."""
    momentum: Annotated[float, Range(least=0, below=1)] = 0.0
    """What is kept of the former rounds' coordinates, for `draw="run"` (official script: 0; its parser: .9)."""
    least: PositiveInt = 2
    """The fewest coordinates of a block."""
    block_share: PositiveFloat = 0.9
    """Small tensors are packed into blocks of at most this many medians of the tensors' sizes."""
    seed: NonNegativeInt = 0
    """Of the bases."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.least <= self.bases, self, "least", f"at most bases={self.bases}")
        accepted = "0 unless draw='run': coordinates in bases that are drawn anew do not add up"
        require(not self.momentum or self.draw == "run", self, "momentum", accepted)

    def bases_seed(self, number: int, client: str) -> int:
        """Of the bases of that client in round `number`."""
        named = {"client": ("client", number, client), "round": ("round", number), "run": ("run",)}[self.draw]
        return stream_seed(self.seed, "ferret", *named)

    def chosen_seed(self, number: int, client: str) -> int | None:
        """Of its choice among K; None: it takes the first ones."""
        return None if self.draw == "client" else stream_seed(self.seed, "ferret", "chosen", number, client)

    def factor(self, size: int, count: int) -> float:
        """What inner products are multiplied by."""
        return size / count / (VARIANCE if self.scaling == "unbiased" else 1.0)


@dataclass(frozen=True)
class FerretUpdate:
    """A client's update as coordinates."""

    client: str
    examples: int
    """That it trained on."""
    seed: int
    """Of the bases."""
    chosen: int | None
    """Seed of the choice among K; None: the first ones."""
    coordinates: list[Tensor]
    """fp32 `[n]` of each block."""


def counts_of(norms: Sequence[float], options: Ferret) -> list[int]:
    """Coordinates of each block, by the norms of their updates; `least` for blocks that are not finite, which do not
    count as the largest."""
    finite = [norm for norm in norms if norm < float("inf")]
    largest = max([1e-8, *finite])
    return [
        max(int(norm / largest * options.bases), options.least) if norm < float("inf") else options.least
        for norm in norms
    ]


@torch.no_grad()
def project(update: Mapping[str, Tensor], options: Ferret, number: int, client: str, examples: int) -> FerretUpdate:
    r"""The coordinates of :math:`\Delta = w_{old} - w_{new}`, by name.

    Inner products are of fp32 numbers, on the update's device. torch's generators are neither read nor moved.

    Raises:
        ValueError: no tensor, or a number that is not finite; names it.
    """
    check_finite(update, client)
    seed, chosen, found = options.bases_seed(number, client), options.chosen_seed(number, client), []
    parts = blocks_of(update, options.block_share)
    flats = [block.flat(update) for block in parts]
    norms = [float(torch.linalg.vector_norm(flat, dtype=torch.float64)) for flat in flats]
    for at, (block, flat, count) in enumerate(zip(parts, flats, counts_of(norms, options), strict=True)):
        numbers = chosen_bases(chosen, at, options.bases, count)
        products = [some @ flat for _, some in bases(seed, at, numbers, block.size, flat.device)]
        found.append(torch.cat(products).mul_(options.factor(block.size, count)).cpu())
    return FerretUpdate(client, examples, seed, chosen, found)


@dataclass
class Pool:
    """The server's coordinates of all bases, for `draw="run"` with momentum: what to keep between rounds, and send."""

    coordinates: list[Tensor] = field(default_factory=list)
    """fp32 `[K]` of each block; empty before the first round."""


@dataclass(frozen=True)
class Term:
    """Coordinates that are to be added: in which bases, times which share."""

    seed: int
    base_numbers: list[list[int]]
    """Of each block, which bases."""
    coordinates: list[Tensor]
    """fp32, of each block."""


def as_terms(updates: Sequence[FerretUpdate], shares: Sequence[float], options: Ferret) -> list[Term]:
    """The clients' coordinates times their shares; those in the same bases are added up, block by block."""
    if not updates or len(shares) != len(updates) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares={list(shares)} takes a number for each of the {len(updates)} updates, in all 1.")
    groups: dict[int, list[tuple[FerretUpdate, float]]] = {}
    for update, share in zip(updates, shares, strict=True):
        groups.setdefault(update.seed, []).append((update, share))
    found = []
    for seed, members in groups.items():
        sums: list[dict[int, float]] = [{} for _ in members[0][0].coordinates]
        for update, share in members:
            for at, coordinates in enumerate(update.coordinates):
                numbers = chosen_bases(update.chosen, at, options.bases, coordinates.numel())
                for number, value in zip(numbers, coordinates.double().tolist(), strict=True):
                    sums[at][number] = sums[at].get(number, 0.0) + share * value
        numbers = [sorted(one) for one in sums]
        values = [
            torch.tensor([one[n] for n in order], dtype=torch.float32) for one, order in zip(sums, numbers, strict=True)
        ]
        found.append(Term(seed, numbers, values))
    return found


@torch.no_grad()
def reconstruct(terms: Sequence[Term], like: Mapping[str, Tensor], options: Ferret) -> dict[str, Tensor]:
    r""":math:`\hat\Delta`, fp32, of the names and shapes of `like`: the sum of all terms, each at most `clip` long.
    What is not finite is left out.

    Raises:
        ValueError: another number of blocks than `like` has.
    """
    found: dict[str, Tensor] = {}
    for at, block in enumerate(blocks_of(like, options.block_share)):
        device = like[block.names[0]].device
        total = torch.zeros(block.size, device=device)
        for term in terms:
            for places, some in bases(term.seed, at, term.base_numbers[at], block.size, device):
                values = term.coordinates[at][places].to(device)
                total += _clipped(values, some, options.clip) @ some
        found |= block.unflatten(total, like)
    return found


def _clipped(values: Tensor, some: Tensor, clip: float) -> Tensor:
    values = torch.where(torch.isfinite(values), values, 0)
    if not clip:
        return values
    lengths = values.abs() * torch.linalg.vector_norm(some, dim=1)
    return values * (clip / (lengths + 1e-8)).clamp_(max=1)


@torch.no_grad()
def ferret_server_step(
    tensors: Mapping[str, Tensor],
    updates: Sequence[FerretUpdate],
    shares: Sequence[float],
    options: Ferret,
    pool: Pool | None = None,
    step: float | None = None,
) -> tuple[dict[str, Tensor], list[Term]]:
    r"""The global tensors after a round, :math:`w - step \cdot \sum_k p_k \hat\Delta_k`, in their own dtypes; and what
    was applied, for `ferret_server_message`. `tensors` are not changed.

    Args:
        tensors: the global ones, by name.
        updates: of the clients whose replies count.
        shares: p (`Round.shares`).
        options: of the method.
        pool: kept by the caller between rounds, for momentum; is changed.
        step: of this round, instead of `options.step` (the official parser lets it fall from 10 to 0).

    Raises:
        ValueError: no update, or shares that do not fit, or momentum without a pool.
    """
    terms = as_terms(updates, shares, options)
    if options.momentum:
        if pool is None:
            raise ValueError("Ferret.momentum keeps coordinates between rounds: pass the same pool=Pool() to each.")
        terms = [_with_momentum(terms[0], pool, options)]
    return apply_terms(tensors, terms, options, options.step if step is None else step), terms


def _with_momentum(term: Term, pool: Pool, options: Ferret) -> Term:
    if not pool.coordinates:
        pool.coordinates = [torch.zeros(options.bases) for _ in term.coordinates]
    for held, numbers, values in zip(pool.coordinates, term.base_numbers, term.coordinates, strict=True):
        held.mul_(options.momentum).index_add_(0, torch.tensor(numbers), values)
    every = list(range(options.bases))
    return Term(term.seed, [every for _ in pool.coordinates], [held.clone() for held in pool.coordinates])


@torch.no_grad()
def apply_terms(
    tensors: Mapping[str, Tensor], terms: Sequence[Term], options: Ferret, step: float
) -> dict[str, Tensor]:
    """The tensors minus `step` times what the terms say; of everybody the same, who has the same tensors."""
    change = reconstruct(terms, tensors, options)
    moved = {name: (tensor.float() - step * change[name]).to(tensor.dtype) for name, tensor in tensors.items()}
    check_finite(moved, "server")
    return moved
