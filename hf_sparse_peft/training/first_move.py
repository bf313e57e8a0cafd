"""What the first move may do to the support that it finds: replace a random draw whole, or keep what was chosen or
trained."""

from __future__ import annotations

import warnings

from transformers import TrainerState

from .base import AdaptedLayer


def replaces_start(parts: list[AdaptedLayer]) -> bool:
    """Whether the first move replaces every unit of one adapter, at the start of its run; warns where something that
    was chosen or trained is kept from that, or is not.

    SpIEL's linear policy (Ansell et al., 2024) replaces its random, untrained start. `regrowth.replace_all_first` says
    otherwise; None keeps what was chosen or trained.
    """
    regrowth, adapter = parts[0].config.regrowth, parts[0].adapter
    origin = origin_of(parts)
    if regrowth.drop == "none":
        _warn_of_new_choice(parts, origin)
        return False
    if not regrowth.replaces_random_start or origin is None:
        return regrowth.replaces_random_start
    if regrowth.replace_all_first:
        warnings.warn(
            f"regrowth.replace_all_first=True: the first move, at step {regrowth.first}, replaces all units of adapter "
            f"'{adapter}', whose support {origin}: that is lost. Set replace_all_first=None or False to keep it.",
            stacklevel=4,
        )
        return True
    warnings.warn(
        f"Adapter '{adapter}': the first move of grow='{regrowth.grow}' replaces every unit of a random start. This "
        f"support {origin}, so it is kept and the first move replaces the schedule's share only. Set "
        "regrowth.replace_all_first=False to say that this is right, or True to replace it.",
        stacklevel=4,
    )
    return False


def restored_start(parts: list[AdaptedLayer], state: TrainerState, callback: str) -> bool:
    """The same for a resumed run, from what the checkpoint says of its start; where it says nothing, from the support,
    which has not moved before the first move."""
    saved = (state.stateful_callbacks or {}).get(callback)
    saved = saved[0] if isinstance(saved, list) else saved
    decided = (saved or {}).get("attributes", {}).get("replaces_start", {}).get(parts[0].adapter)
    if decided is not None:
        return bool(decided)
    regrowth = parts[0].config.regrowth
    if regrowth.replace_all_first is not None or not regrowth.replaces_random_start:
        return regrowth.replaces_random_start
    return all(part.layer.is_random_start(part.adapter) for part in parts)


def origin_of(parts: list[AdaptedLayer]) -> str | None:
    """What makes the supports of one adapter worth keeping, as the end of a sentence; None for an untrained draw."""
    config = parts[0].config
    if not all(part.layer.has_first_values(part.adapter) for part in parts):
        return "has trained values"
    if all(part.layer.is_random_start(part.adapter) for part in parts):
        return None
    if config.criterion.part_type != "random":
        return f"was chosen by criterion='{config.criterion.part_type}'"
    if config.support_search is not None:
        return "was found by support_search"
    return "was loaded, given or moved before"


def _warn_of_new_choice(parts: list[AdaptedLayer], origin: str | None) -> None:
    """`drop='none'` chooses the whole support anew at every move: right where the same rule chose it before."""
    config = parts[0].config
    if origin == "has trained values":
        keeps = config.regrowth.retired_share > 0  # those that leave retire with what they learned
    else:
        keeps = origin is None or config.criterion.part_type == config.regrowth.grow
    if not keeps:
        warnings.warn(
            f"Adapter '{parts[0].adapter}': regrowth.drop='none' chooses the whole support anew by grow="
            f"'{config.regrowth.grow}' at step {config.regrowth.first}, and the support {origin}: what it leaves out "
            f"is lost. Set criterion='{config.regrowth.grow}' for the start, retired_share=1.0 to keep what was "
            "learned, or regrowth=None.",
            stacklevel=4,
        )
