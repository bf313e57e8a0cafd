"""BitDelta: an update as signs and one magnitude, or a few, in a file of bits."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..sparsity import pack_bits, unpack_bits
from ..utils.option_types import Range, check_types
from .compact_files import Compact, about_of, as_folder, number, read_compact, scales_of, write_compact
from .deltas import stack_deltas
from .forms import Form, Merged, MergeReport, check_form, write_merged
from .golomb import decode_positions, encode_positions
from .row import Update
from .sources import read_source
from .ternary import CompactReport

KIND = "bitdelta"


@dataclass(frozen=True)
class Binary:
    r"""Options of BitDelta (Liu et al., 2024): :math:`\tau \approx a\,\mathrm{sign}(\tau)` in each weight, with
    :math:`a = \mathrm{mean}|\tau|`, which minimises the error for these signs; :math:`\mathrm{sign}(0) = +1`."""

    groups: Annotated[int, Range(least=1, most=256)] = 1
    r"""M: entries are sorted by magnitude and cut into M groups as equal as they can be, each with its own mean, at
    :math:`\log_2 M` bits more an entry (BitDelta-M of the unified view of delta editing; Tang et al., 2024)."""
    missing: Literal["absent", "zero"] = "absent"
    """Whether entries outside of a support are coded too. They become :math:`+a` then, which costs more than it
    gives: `absent` keeps the support."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.groups & (self.groups - 1):
            raise ValueError(f"Binary.groups={self.groups} is out of range: it takes a power of 2, up to 256.")


@torch.no_grad()
def binarise_adapter(
    path: str | os.PathLike, out: str | os.PathLike, *, show_progress: bool = True, **options: Any
) -> CompactReport:
    """Write the adapter in the folder `path` as a BitDelta file `out`, whole or not at all; heads and biases come along
    as they are. `options` are those of `Binary`.

    Supports keep their places (Golomb-coded) and get a bit a value; a low-rank update is coded as the dense update that
    it is, one weight at a time: a bit for each entry of the weight.

    Raises:
        ValueError: no adapter that can be read without its base, or an option out of range.
    """
    how = Binary(**options)
    source = read_source(path)
    others, about = about_of(source)
    modules: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    errors, numbers = {}, 0
    for name in tqdm(sorted(source.shapes), desc="Coding", unit="layer", disable=not show_progress):
        deltas = stack_deltas(name, source.shapes[name], [source.pieces(name)])
        deltas = deltas.filled() if how.missing == "zero" else deltas
        values = deltas.values[0]
        size = deltas.shape[0] * deltas.shape[1]
        modules[name] = {"count": values.numel(), "groups": how.groups, "support": deltas.positions is not None}
        if deltas.positions is not None:
            tensors[f"{name}:gaps"], tensors[f"{name}:low"] = encode_positions(deltas.positions, size)
        groups, scales = magnitude_groups(values, how.groups)
        for bit in range(int(math.log2(how.groups))):
            tensors[f"{name}:group{bit}"] = pack_bits((groups >> bit) & 1 == 1)
        tensors[f"{name}:signs"], tensors[f"{name}:scales"] = pack_bits(values >= 0), scales
        restored = torch.where(values >= 0, scales[groups], -scales[groups])
        norm = values.norm()
        errors[name], numbers = float((values - restored).norm() / norm) if norm else 0.0, numbers + values.numel()
    size = write_compact(Compact(KIND, dict(source.shapes), modules, tensors, others, about), out)
    bits = 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / max(numbers, 1)
    own = (source.path / "adapter_model.safetensors").stat().st_size
    return CompactReport(Path(out), size, own, numbers, numbers, bits, errors)


@torch.no_grad()
def restore_adapter(
    path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    form: Form = "adapter",
    rank: int | None = None,
    base: str | None = None,
    show_progress: bool = True,
) -> MergeReport:
    """Write the update in a BitDelta file into the folder `out`. Supports become entries, exactly. Dense signs have
    full rank: in a dense model (`form="dense"`) they are exact, else fitted by SVD of rank `rank`, the error measured.

    Raises:
        ValueError: no such file, one that is damaged, or `out` that holds something else. Nothing is written then.
    """
    check_form(out, form, rank)
    compact, updates = read_binary(path)
    about = {**compact.about, "base_model_name_or_path": base or compact.about["base_model_name_or_path"]}
    with as_folder(compact) as like:
        results = ((name, read()) for name, read in updates.items())
        merged = Merged(results, compact.shapes, compact.others, about, f"From a {KIND} file.", lambda name: 16, like)
        return write_merged(merged, out, form, rank, "Writing", show_progress)


def magnitude_groups(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of values `[n]`: the group of each by its magnitude, ascending, int64 `[n]`; and the groups' mean magnitudes,
    fp32 `[groups]`, 0 for empty ones. The first n mod M groups have one entry more."""
    n = values.numel()
    order = values.abs().argsort(stable=True)
    sizes = torch.full((groups,), n // groups)
    sizes[: n % groups] += 1
    group = torch.empty(n, dtype=torch.int64)
    group[order] = torch.arange(groups).repeat_interleave(sizes)
    sums = torch.zeros(groups, dtype=torch.float64).index_add_(0, group, values.double().abs())
    return group, (sums / sizes.clamp_min(1)).float()


def distil_scales(
    model: nn.Module,
    teacher: nn.Module | Callable[[Mapping[str, Any]], Tensor],
    path: str | os.PathLike,
    batches: Iterable[Mapping[str, Any]],
    *,
    steps: int = 200,
    learning_rate: float = 1e-4,
    show_progress: bool = True,
) -> list[float]:
    r"""Train the magnitudes of a BitDelta file so that the base with its update gives the logits of the fine-tuned
    model, and write the file anew: AdamW without weight decay, a cosine to 0, the mean squared error of all logits
    (Liu et al., 2024; the paper trains the magnitudes alone, which their code does not).

    Args:
        model: the base without the adapter, not quantised; its weights are as they were afterwards.
        teacher: the fine-tuned model, or a function of a batch that gives its logits.
        path: the file; heads in it are not looked at.
        batches: inputs, as mappings; taken again from the start where `steps` are more.
        steps: updates (the authors: 200, of 4 rows of 128 tokens).
        learning_rate: the first one.
        show_progress: whether a bar shows on stderr.

    Returns:
        The loss of each step, the file's own magnitudes in the first.

    Raises:
        ValueError: a file that is damaged or of another base, no batches, or a loss that is not finite. The file is as
            it was.
    """
    compact, updates = read_binary(path)
    rows = list(batches)
    if not rows or steps < 1 or not learning_rate > 0:
        raise ValueError(f"batches={len(rows)}, steps={steps}, learning_rate={learning_rate}: all are to be above 0.")
    logits = teacher if not isinstance(teacher, nn.Module) else lambda batch: teacher(**batch).logits
    losses = []
    with _with_updates(model, compact, updates) as scales:
        optimizer = torch.optim.AdamW(scales.values(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in tqdm(range(steps), desc="Distilling", disable=not show_progress):
            batch = rows[step % len(rows)]
            with torch.no_grad():
                wanted = logits(batch)
            found = model(**batch).logits
            loss = nn.functional.mse_loss(found.float(), wanted.to(found.device).float())
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"The loss of step {step} is {float(loss)}; take a smaller learning_rate.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        for name, scale in scales.items():
            # A magnitude below 0 would turn signs over, which the file codes apart.
            compact.tensors[f"{name}:scales"] = scale.detach().float().clamp_min(0).cpu()
    write_compact(compact, path)
    return losses


class _AddSigns(nn.Module):
    """Weight + magnitudes x signs."""

    def __init__(self, signed: Tensor, groups: Tensor, scales: Tensor, transposed: bool) -> None:
        super().__init__()
        self.signed, self.groups, self.transposed = signed, groups, transposed
        self.scales = nn.Parameter(scales)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight of the fine-tuned model."""
        update = self.signed * self.scales[self.groups]
        return (weight.float() + (update.t() if self.transposed else update)).to(weight.dtype)


@contextmanager
def _with_updates(model: nn.Module, compact: Compact, updates: Mapping[str, Callable[[], Update]]) -> Iterator[dict]:
    """The magnitudes by module, as parameters of `model` within the block, whose own are frozen and in evaluation."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    done: list[nn.Module] = []
    try:
        model.requires_grad_(False).eval()
        scales = {}
        for name in updates:
            module = dict(model.named_modules()).get(name)
            weight = getattr(module, "weight", None)
            shape = (
                None if weight is None else tuple(weight.shape[::-1] if isinstance(module, Conv1D) else weight.shape)
            )
            if shape != compact.shapes[name] or not weight.is_floating_point():
                raise ValueError(f"'{name}' of the file is {compact.shapes[name]}, and of this model {shape}.")
            signed, groups = _signs(compact, name)
            add = _AddSigns(
                signed.to(weight.device), groups.to(weight.device),
                compact.tensors[f"{name}:scales"].to(weight.device, copy=True), isinstance(module, Conv1D),
            )  # fmt: skip
            parametrize.register_parametrization(module, "weight", add, unsafe=True)
            done.append(module)
            scales[name] = add.scales
        yield scales
    finally:
        for module in done:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(name, True))
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


def _signs(compact: Compact, name: str) -> tuple[Tensor, Tensor]:
    """Signs, 0 outside of the support, fp32 `[out, in]`, and the group of each entry."""
    positions, signs, groups = _codes(compact, name)
    size = compact.shapes[name][0] * compact.shapes[name][1]
    at = torch.arange(size) if positions is None else positions
    signed = torch.zeros(size).index_copy_(0, at, torch.where(signs, 1.0, -1.0))
    return signed.view(compact.shapes[name]), torch.zeros(size, dtype=torch.int64).index_copy_(0, at, groups).view(
        compact.shapes[name]
    )


def read_binary(path: str | os.PathLike) -> tuple[Compact, dict[str, Callable[[], Update]]]:
    """A BitDelta file, found whole, and a way to each update.

    Raises:
        ValueError: no such file, or one that is damaged.
    """
    compact = read_compact(path, KIND)
    try:
        for name in compact.modules:
            _update(compact, name)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}' is damaged: {error}. Fetch or write it again.") from error
    return compact, {name: lambda name=name: _update(compact, name) for name in compact.modules}


def _update(compact: Compact, name: str) -> Update:
    positions, signs, groups = _codes(compact, name)
    count = number(compact.modules[name], "groups", 256)
    scales = scales_of(compact.tensor(f"{name}:scales"), count, f"{name}:scales")
    values = scales[groups]
    return Update(name, compact.shapes[name], positions, torch.where(signs, values, -values))


def _codes(compact: Compact, name: str) -> tuple[Tensor | None, Tensor, Tensor]:
    """Positions (None: all), signs bool `[n]`, groups int64 `[n]`."""
    described, size = compact.modules[name], compact.shapes[name][0] * compact.shapes[name][1]
    if set(described) != {"count", "groups", "support"} or type(described["support"]) is not bool:
        raise ValueError(f"'{name}' is described by {described}")
    count, groups = number(described, "count", size), number(described, "groups", 256)
    if not groups or groups & (groups - 1) or (not described["support"] and count != size):
        raise ValueError(f"'{name}' is described by {described}")
    planes = [compact.tensor(f"{name}:signs")]
    planes += [compact.tensor(f"{name}:group{bit}") for bit in range(int(math.log2(groups)))]
    for plane in planes:
        if plane.dtype != torch.uint8 or tuple(plane.shape) != (-(-count // 8),):
            raise ValueError(f"'{name}' has bits of shape {tuple(plane.shape)} where {count} are due")
    positions = None
    if described["support"]:
        gaps, low = compact.tensor(f"{name}:gaps"), compact.tensor(f"{name}:low")
        positions = decode_positions(gaps, low, count, size, name)
    signs, *bits = (unpack_bits(plane, count) for plane in planes)
    group = torch.zeros(count, dtype=torch.int64)
    for place, bit in enumerate(bits):
        group += bit.long() << place
    return positions, signs, group
