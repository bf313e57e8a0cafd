"""N:M masks in fewer bits than one an entry, for files: each group is one of the ways to keep N of M."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import torch
from torch import Tensor


@cache
def _ways(keep: int, of: int) -> tuple[Tensor, Tensor, int]:
    """The masks `[ways, of]`, the way of each pattern of bits (-1 for none) `[2**of]`, and groups in a byte."""
    chosen = list(combinations(range(of), keep))
    if len(chosen) > 256 or of > 16:
        raise ValueError(f"{keep}:{of} has {len(chosen)} ways, more than a byte tells apart; store bits instead.")
    masks = torch.zeros(len(chosen), of, dtype=torch.bool)
    for way, places in enumerate(chosen):
        masks[way, list(places)] = True
    way_of = torch.full((2**of,), -1)
    way_of[(masks * 2 ** torch.arange(of)).sum(1)] = torch.arange(len(chosen))
    groups = 1
    while len(chosen) ** (groups + 1) <= 256:
        groups += 1
    return masks, way_of, groups


def n_of_m_bytes(numel: int, keep: int, of: int) -> int:
    """Bytes of a coded mask of `numel` entries: 2:4 takes 2/3 of a bit an entry."""
    return -(-(numel // of) // _ways(keep, of)[2])


def encode_n_of_m(mask: Tensor, keep: int, of: int) -> Tensor:
    """A bool mask with `keep` of every `of` consecutive entries as uint8 `[n_of_m_bytes]`.

    Raises:
        ValueError: a group keeps another number, or groups do not divide it.
    """
    masks, way_of, groups = _ways(keep, of)
    if mask.numel() % of:
        raise ValueError(f"groups of {of} do not divide a mask of {mask.numel()} entries.")
    powers = 2 ** torch.arange(of, device=mask.device)
    ways = way_of.to(mask.device)[(mask.reshape(-1, of) * powers).sum(1)]
    if bool((ways < 0).any()):
        raise ValueError(f"the mask does not keep {keep} of every {of} entries; store its bits instead.")
    ways = torch.cat([ways, ways.new_zeros(-ways.numel() % groups)]).view(-1, groups)
    return (ways * len(masks) ** torch.arange(groups, device=mask.device)).sum(1).to(torch.uint8)


def decode_n_of_m(codes: Tensor, numel: int, keep: int, of: int) -> Tensor:
    """The bool mask `[numel]` that `encode_n_of_m` coded, of codes that were checked (`check_n_of_m`)."""
    masks, _, groups = _ways(keep, of)
    left, ways = codes.long(), []
    for _ in range(groups):
        ways.append(left % len(masks))
        left = left // len(masks)
    flat = torch.stack(ways, 1).view(-1)
    return masks.to(codes.device)[flat[: numel // of]].view(-1)


def check_n_of_m(codes: Tensor, numel: int, keep: int, of: int) -> None:
    """Is that the code of a mask of `numel` entries?

    Raises:
        ValueError: codes of another length, or a byte that codes nothing.
    """
    masks, _, groups = _ways(keep, of)
    if codes.dtype != torch.uint8 or codes.shape != (n_of_m_bytes(numel, keep, of),) or numel % of:
        raise ValueError(
            f"{codes.numel()} codes of {codes.dtype} are no {keep}:{of} mask of {numel} entries, which takes "
            f"{n_of_m_bytes(numel, keep, of)} bytes of uint8."
        )
    most = len(masks) ** groups - 1
    if codes.numel() and int(codes.max()) > most:
        raise ValueError(f"codes of a {keep}:{of} mask are at most {most}; the file is damaged.")
    used = numel // of - (codes.numel() - 1) * groups  # groups of the last byte
    if codes.numel() and int(codes[-1]) >= len(masks) ** used:
        raise ValueError(f"codes of a {keep}:{of} mask say something behind its last group; the file is damaged.")
