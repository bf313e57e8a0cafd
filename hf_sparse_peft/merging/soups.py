"""Greedy soups of adapters: the mean of those that do not make it worse."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import nn
from tqdm.auto import tqdm

from ..pruning.repair.soups import Soup
from ..tuners import adapter_layers
from ..tuners.shared.pieces import Entries, Subgrid, summed_entries
from .row import warn_of_supports

_TRIAL = "soup_on_trial"


@torch.no_grad()
def greedy_soup(
    model: PeftModel,
    adapters: Sequence[str],
    evaluate: Callable[[nn.Module], float],
    adapter_name: str = "soup",
    *,
    strict: bool = False,
    same_support: bool = False,
    modules_to_save_from: str | None = None,
    show_progress: bool = True,
) -> Soup:
    r"""Add the mean of a greedy choice of adapters as the adapter `adapter_name`, and make it active (model soups;
    Wortsman et al., 2022).

    The adapter of the highest metric comes first; each of the others, in falling order, stays in where the metric of
    the mean does not fall below the best so far. So on what `evaluate` measures the soup is never below the best
    adapter. Means are of updates, :math:`\frac1m \sum_i \Delta W_i`, exactly: supports add on their union, and
    ranks add up.

    Args:
        model: has the adapters, all of one tuner that combines them exactly (`add_weighted_adapter`).
        adapters: their names, two or more; equal metrics keep this order.
        evaluate: a number for the model with one adapter active, the higher the better.
        adapter_name: of the soup.
        strict: whether a metric that only stays the same leaves an adapter out, as the authors' code has it; their
            recipe takes it in.
        same_support: refuse adapters with other supports, whose mean is denser than each (sparse model soups).
        modules_to_save_from: whose heads the soup takes, where they differ.
        show_progress: whether a bar over evaluations shows on stderr.

    Raises:
        ValueError: fewer than two adapters, one that is unknown, a taken name, other supports, or a metric that is no
            number. The model has the adapters that it had.
    """
    adapters = list(adapters)
    if len(adapters) < 2 or len(set(adapters)) < len(adapters):
        raise ValueError(f"adapters={adapters}: a soup takes two or more adapters, each once.")
    unknown = [name for name in adapters if name not in model.peft_config]
    if unknown or adapter_name in model.peft_config:
        what = f"adapters={unknown} are unknown" if unknown else f"adapter_name={adapter_name!r} is taken"
        raise ValueError(f"{what}; this model has {sorted(model.peft_config)}.")
    _check_supports(model, adapters, same_support)
    active = list(model.active_adapters)
    done = False
    with tqdm(total=2 * len(adapters) - 1, desc="Soup", disable=not show_progress) as bar:

        def metric(members: list[str]) -> float:
            found = _metric(model, members, evaluate, modules_to_save_from)
            bar.update()
            return found

        try:
            metrics = [metric([name]) for name in adapters]
            first, *others = sorted(range(len(adapters)), key=lambda at: -metrics[at])
            members, best = [first], metrics[first]
            for at in others:
                tried = metric([adapters[one] for one in (*members, at)])
                if tried > best or (tried == best and not strict):
                    members, best = [*members, at], tried
            names = [adapters[at] for at in members]
            _mix(model, names, adapter_name, modules_to_save_from)
            model.set_adapter(adapter_name)
            done = True
        finally:
            if not done:
                model.base_model.set_adapter(active)
    return Soup(members, metrics, best)


def _metric(model: PeftModel, members: list[str], evaluate: Callable[[nn.Module], float], heads: str | None) -> float:
    name = members[0]
    if len(members) > 1:
        name = _TRIAL
        _mix(model, members, name, heads)
    try:
        model.set_adapter(name)
        found = float(evaluate(model))
    finally:
        if name == _TRIAL:
            model.set_adapter(members[0])
            model.delete_adapter(_TRIAL)
    if found != found:
        raise ValueError(f"evaluate gave {found} for {members}, and soups are ordered by it.")
    return found


def _mix(model: PeftModel, members: list[str], name: str, heads: str | None) -> None:
    heads = heads if heads in members else None
    model.base_model.add_weighted_adapter(
        members, [1 / len(members)] * len(members), name, "cat", modules_to_save_from=heads
    )


def _check_supports(model: PeftModel, adapters: Sequence[str], same_support: bool) -> None:
    for layer in adapter_layers(model):
        supports = []
        for name in adapters:
            pieces = layer.pieces(name) if layer.holds(name) else []
            entries = summed_entries([p for p in pieces if isinstance(p, (Entries, Subgrid))])
            supports.append(torch.zeros(0, dtype=torch.int64) if entries is None else entries[0].cpu().long())
        odd = next((at for at, one in enumerate(supports) if not torch.equal(one, supports[0])), None)
        if odd is None:
            continue
        if same_support:
            raise ValueError(
                f"same_support=True: '{adapters[odd]}' holds other entries of '{layer.module_name}' than "
                f"'{adapters[0]}', and a mean of other supports is denser than each."
            )
        warn_of_supports(layer.module_name)
        return
