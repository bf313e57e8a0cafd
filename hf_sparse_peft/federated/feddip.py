r"""FedDIP: federated training under a global mask that grows sparser, with a penalty that grows (Long et al., 2023).

    server                               client
    feddip_server_message   --bytes-->   feddip_receive
                                         Controller(model, optimizer, steps, rule=options.local_rule(t))
    read_feddip_message     <--bytes--   feddip_client_message
    feddip_server_step

The model is a `MaskedLoraConfig(update=DenseUpdate(), mask="all")` on one base that all have, :math:`V = M \odot (W +
D)`. Only D and the mask's changes travel, with heads and biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..rules import ErrorFeedback
from ..sparsity import Cubic, Density, ErdosRenyi, Targets, UnitGrid, pack_bits, stream_seed
from ..sparsity.ranking import GlobalRanking
from ..tuners import MaskedLoraConfig, adapter_layers
from ..tuners.masked_lora import DenseUpdate, MaskedLoraLayer
from ..utils.option_types import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Range, check_types
from .adapter_tensors import adapter_tensors, write_adapter_tensors
from .fedavg import mean

Sparsity = Annotated[float, Range(least=0, below=1)]


@dataclass(frozen=True)
class FedDIP:
    r"""Options and schedules of FedDIP (Long et al., 2023; schedules as in its official code).

    Of all entries of the adapted weights together, after round t = 0, ..., T-1 with t divisible by `reconfigure_every`,

    .. math:: s_t = s_T + (s_0 - s_T)(1 - t/T)^3

    are 0 (`round(s_t n)` entries, by :math:`|W + D|` over all weights); entries that left do not return. :math:`s_T`
    itself is never reached.

    Raises:
        ValueError: an option is out of range.
    """

    rounds: PositiveInt
    """T."""
    initial_sparsity: Sparsity = 0.5
    """:math:`s_0`."""
    final_sparsity: Sparsity = 0.95
    """:math:`s_T`."""
    reconfigure_every: PositiveInt = 20
    """Rounds between two choices of the mask (official runs: 20, and 5)."""
    max_penalty: NonNegativeFloat = 1e-3
    r""":math:`\lambda_{\max}`, which the official schedule does not reach either."""
    first_penalty: NonNegativeFloat = 5e-4
    r""":math:`\lambda` of the second segment; the first has 0. Above `max_penalty` it falls."""
    segments: PositiveInt = 20
    r"""Segments of `T // segments` rounds, in each of which :math:`\lambda` is constant. A run of fewer rounds than
    segments sees one a round, the first ones."""
    norm: Literal["1", "2", "inf"] = "2"
    """Of the penalty, one norm a weight, not squared."""
    learning_rate: PositiveFloat = 0.1
    """Of SGD without momentum, at round 0."""
    learning_rate_decay: Annotated[float, Range(above=0, most=1)] = 0.998
    """What it is multiplied by every round."""
    weight_decay: NonNegativeFloat = 5e-4
    """Of the weights themselves, kept or not."""
    proximal: NonNegativeFloat = 0.0
    r""":math:`\mu` of the pull to the global weights, :math:`\frac{\mu}{2}\|M \odot V - V_t\|_2`, not squared."""
    first_mask: Literal["random", "magnitude", "all"] = "random"
    """Mask of round 0. "random": each client draws its own, of an Erdos-Renyi density in each weight (official, for
    training from scratch). "magnitude": the largest of the base, the same for all. "all": none. A pre-trained base is
    lost under a random mask of half of its weights: take one of the other two."""
    seed: NonNegativeInt = 0
    """Of masks and ties."""

    def __post_init__(self) -> None:
        check_types(self)

    def sparsity(self, number: int) -> float:
        """:math:`s_t`."""
        return Cubic(self.initial_sparsity, self.final_sparsity)(number / self.rounds)

    def penalty(self, number: int) -> float:
        r""":math:`\lambda_t`: 0, then :math:`\lambda_1 + (\lambda_{\max} - \lambda_1)(i - 1)/(q - 1)` in segment i of
        q; rounds that are left over belong to the last."""
        segment = min(number // max(1, self.rounds // self.segments), self.segments - 1)
        if segment == 0:
            return 0.0
        return self.first_penalty + (self.max_penalty - self.first_penalty) / (self.segments - 1) * (segment - 1)

    def reconfigures(self, number: int) -> bool:
        """Whether the server chooses a new mask after that round."""
        return number % self.reconfigure_every == 0

    def draws_masks(self, number: int) -> bool:
        """Whether clients draw masks of their own in that round, and what they send is dense."""
        return number == 0 and self.first_mask == "random"

    def local_rule(self, number: int) -> ErrorFeedback:
        """What a client trains with, in its own loop or Trainer: `Controller(model, optimizer, steps, rule=...)`."""
        return ErrorFeedback(self.penalty(number), self.norm, self.weight_decay, self.proximal)

    def local_optimizer(self, model: nn.Module, number: int) -> torch.optim.SGD:
        """The client's: SGD without momentum at the round's rate; the decay of the weights is the rule's."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=self.learning_rate * self.learning_rate_decay**number)


def feddip_config(**options: object) -> MaskedLoraConfig:
    """The adapter's config: full weights that train under a mask that is moved by the server alone."""
    return MaskedLoraConfig(**{"update": DenseUpdate(), "mask": "all", "target_modules": "all-linear", **options})


def masked_layers(model: nn.Module, adapter_name: str = "default") -> list[MaskedLoraLayer]:
    """The layers, checked.

    Raises:
        ValueError: no such adapter, or one without a stored mask, a masked base and a trained matrix.
    """
    layers = adapter_layers(model, MaskedLoraLayer, adapter_name)
    config = layers[0].adapter_configs[adapter_name]
    wrong = [
        f"{name}={value!r}"
        for name, value, bad in (
            ("update", config.update, not isinstance(config.update, DenseUpdate)),
            ("masking", config.masking, config.masking.computes_mask),
            ("masks_base", config.masks_base, not config.masks_base),
            ("n_of_m", config.n_of_m, config.n_of_m is not None),
        )
        if bad
    ]
    if wrong:
        raise ValueError(
            f"Adapter '{adapter_name}' has {', '.join(wrong)}, and FedDIP trains a matrix under a stored mask of the "
            "whole weight. Make it with feddip_config()."
        )
    return layers


def delta(layer: MaskedLoraLayer, adapter_name: str) -> nn.Parameter:
    """D `[out, in]`."""
    return layer.own_tensors(adapter_name)["delta"]


@torch.no_grad()
def write_mask(layer: MaskedLoraLayer, adapter_name: str, kept: Tensor) -> None:
    """Let those entries live, bool `[out, in]`; what is removed becomes 0: there D = -W."""
    layer.keep(adapter_name, pack_bits(kept))
    change = delta(layer, adapter_name)
    change.copy_(torch.where(kept, change, -layer.dense_base_weight().to(change.dtype)))


@torch.no_grad()
def choose_masks(model: nn.Module, sparsity: float, adapter_name: str = "default", seed: int = 0) -> dict[str, Tensor]:
    """The new global mask, by module: `round(sparsity * n)` of all n entries are removed, those with the smallest
    :math:`|W + D|` of all weights together, and first of all those that were removed before.

    Returns bool `[out, in]` for each module; writes nothing. Ties are drawn for, with `seed`.

    Raises:
        ValueError: weights that are not finite.
    """
    layers = masked_layers(model, adapter_name)
    total = sum(layer.out_features * layer.in_features for layer in layers)
    ranking = GlobalRanking(total - round(sparsity * total), seed, least=0)
    found = {}
    for layer in layers:
        ranking.add({layer.module_name: lambda layer=layer: _scores(layer, adapter_name)})
    units = ranking.units()
    for layer in layers:
        mine = units[layer.module_name].long()
        kept = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool, device=mine.device)
        kept[mine] = True
        found[layer.module_name] = kept.view(layer.out_features, layer.in_features)
    return found


def _scores(layer: MaskedLoraLayer, adapter_name: str) -> Iterator[Tensor]:
    sizes = layer.masked_weight(adapter_name).dense.float().abs()
    yield torch.where(layer.kept(adapter_name), sizes, -1.0).flatten()


@torch.no_grad()
def feddip_start(model: nn.Module, options: FedDIP, adapter_name: str = "default") -> None:
    """The server's model before round 0: `first_mask="magnitude"` is chosen here."""
    layers = masked_layers(model, adapter_name)
    if options.first_mask == "magnitude":
        masks = choose_masks(model, options.initial_sparsity, adapter_name, stream_seed(options.seed, "feddip"))
        for layer in layers:
            write_mask(layer, adapter_name, masks[layer.module_name])


@torch.no_grad()
def draw_masks(model: nn.Module, options: FedDIP, client: str, adapter_name: str = "default") -> None:
    """A client's own random mask of round 0: densities of Erdos-Renyi, entries drawn by the client's name. Weights that
    it removes stay as they are, and are trained by error feedback."""
    layers = masked_layers(model, adapter_name)
    grids = {layer.module_name: UnitGrid(layer.out_features, layer.in_features, "entry") for layer in layers}
    seed = stream_seed(options.seed, "feddip", client)
    counts = ErdosRenyi(Density(1 - options.initial_sparsity)).counts(Targets(grids, seed))
    for layer in layers:
        generator = torch.Generator().manual_seed(stream_seed(seed, layer.module_name))
        kept = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool)
        kept[torch.randperm(kept.numel(), generator=generator)[: counts[layer.module_name]]] = True
        layer.keep(adapter_name, pack_bits(kept).to(layer.get_base_layer_device()))


@dataclass(frozen=True)
class FedDIPUpdate:
    """What a client sent back."""

    client: str
    examples: int
    """That it trained on."""
    values: dict[str, Tensor]
    """By module: D of the kept entries `[k]`, or all of it `[out, in]`."""
    others: dict[str, Tensor]
    """Heads and biases, by the names in the adapter's file."""


@torch.no_grad()
def feddip_server_step(
    model: PeftModel,
    updates: Sequence[FedDIPUpdate],
    shares: Sequence[float],
    options: FedDIP,
    number: int,
    adapter_name: str = "default",
) -> dict[str, float]:
    """Average what the clients sent into the server's model; then, if the round says so, choose the next mask.

    In the official order: the mean, 0 outside of the mask that the clients trained under, then magnitudes of all
    weights. Returns `sparsity` (measured), and `changed`, how many entries left.

    Raises:
        ValueError: no update, or shares that do not fit. The model is as it was then.
    """
    layers = masked_layers(model, adapter_name)
    if not updates or len(shares) != len(updates) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares={list(shares)} takes a number for each of the {len(updates)} updates, in all 1.")
    averaged = {
        layer.module_name: mean([update.values[layer.module_name] for update in updates], shares) for layer in layers
    }
    if updates[0].others:
        others = {name: mean([update.others[name] for update in updates], shares) for name in updates[0].others}
        write_adapter_tensors(model, {**adapter_tensors(model, adapter_name), **others}, adapter_name)
    before = 0
    for layer in layers:
        kept, change = layer.kept(adapter_name), delta(layer, adapter_name)
        before += int(kept.sum())
        values = averaged[layer.module_name].to(change.device)
        change.copy_(values) if values.dim() == 2 else change.masked_scatter_(kept, values)
    if options.reconfigures(number):
        seed = stream_seed(options.seed, "feddip", number)
        masks = choose_masks(model, options.sparsity(number), adapter_name, seed)
        for layer in layers:
            write_mask(layer, adapter_name, masks[layer.module_name])
    total = sum(layer.out_features * layer.in_features for layer in layers)
    after = sum(int(layer.kept(adapter_name).sum()) for layer in layers)
    return {"sparsity": 1 - after / total, "changed": before - after}


def masks_of(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The bits of all masks, by module: what `feddip_server_message(known=...)` takes for a client that has them."""
    layers = masked_layers(model, adapter_name)
    return {layer.module_name: pack_bits(layer.kept(adapter_name).cpu()) for layer in layers}


def check_modules(found: Mapping[str, object], layers: Sequence[MaskedLoraLayer], sender: str) -> None:
    """Raises `ValueError`, naming sender and module, unless there is something for each layer and nothing else."""
    odd = sorted(set(found) ^ {layer.module_name for layer in layers})
    if odd:
        what = "none" if odd[0] not in found else "some, and no such module is adapted here,"
        raise ValueError(f"The message of '{sender}' has {what} values for '{odd[0]}'. All take part with one config.")
