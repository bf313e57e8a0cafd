"""Methods that are functions: they prune, edit, mend or average weights themselves, and are no config of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import federated, merging, pruning
from ..utils.tables import Table, table


@dataclass(frozen=True)
class FunctionInfo:
    """One method that is called."""

    name: str
    paper: str
    """Authors and year of the source."""
    call: str
    """What to write, with names of `hf_sparse_peft.{room}`."""
    does: str
    """One line: what comes of it."""
    parts: tuple[Callable[..., Any], ...] = field(repr=False)
    """The functions and classes of that room that it is."""

    @property
    def room(self) -> str:
        """Where its parts are imported from: "pruning", "merging" or "federated", in `hf_sparse_peft`."""
        return self.parts[0].__module__.split(".")[1]


def _entry(name: str, paper: str, call: str, does: str, *parts: Callable[..., Any]) -> FunctionInfo:
    return FunctionInfo(name, paper, call, does, parts)


_FUNCTIONS = [
    _entry(
        "cfsp", "Wang et al., 2025",
        "prune_model(model, data, method=CFSP(), sparsity=0.25)",
        "channels go, in blocks that change their hidden states little more of them",
        pruning.CFSP, pruning.importance_lora_config,
    ),
    _entry(
        "dsee-pruning", "Chen et al., 2023 (DSEE)",
        'prune_globally(model, 0.2, by="update", target_modules=["q_proj", "v_proj"])',
        "entries of the base go where an adapter's update is small (whole heads: `kept_by_update`); `dsee` is the "
        "adapter",
        pruning.prune_globally,
        pruning.kept_by_update,
    ),
    _entry(
        "dsnot", "Zhang et al., 2024 (DSnoT)",
        'prune_model(model, data, method=DSnoT(), sparsity=0.5)',
        "another method's mask, refined by swaps",
        pruning.DSnoT,
    ),
    _entry(
        "eora", "Liu et al., 2024 (EoRA)",
        "compensate(model, dense, data, rank=128)",
        "a plain LoRA beside a compressed base, in closed form, which makes up for what was lost",
        pruning.compensate, pruning.eigenspace_correction,
    ),
    _entry(
        "fedavg", "McMahan et al., 2017 (FedAvg)",
        "fedavg(updates, shares)",
        "the mean of clients' adapters, on the union of supports that moved",
        federated.fedavg,
    ),
    _entry(
        "feddip", "Long et al., 2023 (FedDIP)",
        "feddip_server_step(model, updates, shares, FedDIP(rounds=1000), 0)",
        "clients' full weights are averaged under one mask that grows sparser; `feddip_config()` is the adapter, "
        "`ErrorFeedback` what clients train with",
        federated.FedDIP, federated.feddip_server_step,
    ),
    _entry(
        "ferret", "Shu et al., 2024 (Ferret)",
        "ferret_server_step(tensors, updates, shares, Ferret())",
        "clients send their updates as coordinates in random bases that the server draws too",
        federated.Ferret, federated.ferret_server_step,
    ),
    _entry(
        "gqsa", "Zeng et al., 2025 (GQSA)",
        "prune_model(model, data, method=GQSA(), sparsity=0.5, pattern=Groups(16))",
        "groups of 16 neighbours of a row go; `FactoredConfig(form=GroupBits())` trains what is left at 4 bits",
        pruning.GQSA, pruning.Groups,
    ),
    _entry(
        "hessian-saliency", "Yang et al., 2023 (NViT)",
        "prune_model(model, data, method=HessianSaliency(), sparsity=0.5)",
        "heads and channels go, by one ranking of all",
        pruning.HessianSaliency,
    ),
    _entry(
        "laser", "Sharma et al., 2024 (LASER)",
        'laser(model, layer=-1, matrices="up", fraction=0.1)',
        "weights become approximations of very low rank, in place; `search_laser` looks for which",
        pruning.laser, pruning.search_laser,
    ),
    _entry(
        "lora-prune", "Zhang et al., 2024 (LoRAPrune)",
        "prune_model(model, data, method=LoRAPrune(), sparsity=0.5)",
        "heads and channels go in one shot; `loraprune` takes them while a LoRA trains",
        pruning.LoRAPrune,
    ),
    _entry(
        "loram", "Zhang et al., 2025 (LoRAM)",
        'recover_adapter(adapter, "for-the-full-base", base)',
        "a LoRA that was trained on a sliced base, as one for the full base",
        pruning.recover_adapter,
    ),
    _entry(
        "magnitude", "Han et al., 2015",
        "prune_globally(model, 0.5)",
        'the smallest entries go, of all weights together, or of each: `prune_model(model, method="magnitude")`',
        pruning.prune_globally, pruning.MagnitudePruning,
    ),
    _entry(
        "oba", "Sun et al., 2025 (Optimal Brain Apoptosis)",
        "prune_model(model, data, method=OBA(), sparsity=0.5)",
        "heads and channels go, by the quadratic form of the loss' Hessian",
        pruning.OBA,
    ),
    _entry(
        "perp-reconstruction", "Zimmer et al., 2023 (PERP)",
        "reconstruct(model, dense, data, steps=200)",
        "an adapter on a pruned base is tuned block by block to the dense one's outputs; `perp` is the adapter",
        pruning.reconstruct,
    ),
    _entry(
        "random", "baseline",
        'prune_model(model, method="random", sparsity=0.75)',
        "any entries go, by a seed",
        pruning.RandomPruning,
    ),
    _entry(
        "shortgpt", "Men et al., 2024 (ShortGPT)",
        "drop_blocks(model, 4, block_influence(model, data))",
        "whole blocks go that change their hidden states least",
        pruning.drop_blocks, pruning.block_influence, pruning.block_angles,
    ),
    _entry(
        "sparse-ift", "Thangarasa et al., 2024 (Sparse-IFT)",
        'sparse_ift(config, "wide", 0.75)',
        "a model of larger sparse layers with the dense one's multiplications, to train from scratch; `doped_ranks` "
        "sizes the LoRA that fills a pruned base up to them",
        pruning.sparse_ift,
        pruning.doped_ranks, pruning.iso_flop_size,
    ),
    _entry(
        "sparse-soup", "Zimmer et al., 2024 (Sparse Model Soups)",
        "sparse_soup(model, replicas, evaluate=evaluate)",
        "the average of models that were retrained under one mask, all or a greedy choice",
        pruning.sparse_soup,
    ),
    _entry(
        "sparsegpt", "Frantar and Alistarh, 2023 (SparseGPT)",
        'prune_model(model, data, method="sparsegpt", sparsity=0.5)',
        "the least harmful entries go, and later columns make up for them",
        pruning.SparseGPT,
    ),
    _entry(
        "wanda", "Sun et al., 2024 (Wanda)",
        'prune_model(model, data, method="wanda", sparsity=0.5)',
        "the smallest weight x norm of its input goes, in each output row",
        pruning.Wanda,
    ),
]  # fmt: skip
_FUNCTIONS += [
    _entry(
        "bitdelta", "Liu et al., 2024 (BitDelta)",
        'binarise_adapter("adapter", "adapter.bitdelta")',
        "an adapter as signs and a magnitude of each weight, in a file of bits; `restore_adapter` reads it, "
        "`distil_scales` trains the magnitudes; `groups=M`: BitDelta-M of the unified view of delta editing",
        merging.binarise_adapter, merging.restore_adapter, merging.distil_scales, merging.magnitude_groups,
    ),
    _entry(
        "compeft", "Yadav et al., 2023 (ComPEFT)",
        'compress_adapter("adapter", "adapter.compeft", density=0.2)',
        "an adapter as -a, 0 and a, in a file of Golomb codes; `decompress_adapter` reads it",
        merging.compress_adapter, merging.decompress_adapter,
    ),
    _entry(
        "greedy-soup", "Wortsman et al., 2022 (model soups)",
        "greedy_soup(model, adapters, evaluate)",
        "the mean of those of a model's adapters that do not lower a metric",
        merging.greedy_soup,
    ),
    _entry(
        "mos-cil", "Sun et al., 2025 (MOS)",
        "PullToEarlier(model, earlier)",
        "earlier tasks' adapters merged into the one that trains, after every step (`EarlierAdaptersCallback`)",
        merging.PullToEarlier, merging.EarlierAdaptersCallback,
    ),
]  # fmt: skip
_MERGES_NEED = {"darex-q": ", q=q", "fisher": ", importance=importance"}
_MERGE_PARTS = {"darex-q": (merging.find_q, merging.analytic_q), "fisher": (merging.fisher_importance,)}
for _name in merging.merge_names():
    _info = merging.merge_info(_name)
    _call = f'merge_adapters(paths, out, "{_name}"{_MERGES_NEED.get(_name, "")})'
    _FUNCTIONS.append(
        _entry(_name, _info.paper, _call, _info.does, merging.merge_adapters, *_MERGE_PARTS.get(_name, ()))
    )
FUNCTIONS: dict[str, FunctionInfo] = {info.name: info for info in sorted(_FUNCTIONS, key=lambda info: info.name)}
"""Methods that are functions, by name."""


def functions_table() -> Table:
    """A row a method."""
    cells = [(info.name, info.paper, info.call) for info in FUNCTIONS.values()]
    return table(("function", "source", "call"), cells)


def functions_markdown() -> str:
    """The methods that are functions, as docs/methods.md shows them."""
    lines = ["| method | source | call | what comes of it |", "|---|---|---|---|"]
    lines += [f"| `{info.name}` | {info.paper} | `{info.call}` | {info.does} |" for info in FUNCTIONS.values()]
    return "\n".join(lines)


def how_to_call(name: str) -> str:
    """What an error says where a function's name was given as a method's; empty for names of none."""
    info = FUNCTIONS.get(name)
    return (
        ""
        if info is None
        else (f"method {name!r} is a function of hf_sparse_peft.{info.room}, and no config: call {info.call}.")
    )
