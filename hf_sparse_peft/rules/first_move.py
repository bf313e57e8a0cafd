"""What `Regrow`'s first move may do to the support that it finds: replace a random draw whole, or keep what was chosen
or trained."""

from __future__ import annotations

import warnings

from .run import Run
from .space import UnitSpace


def replaces_start(run: Run) -> bool:
    """Whether the first move replaces every unit of the adapter, at the start of its run; warns where something that
    was chosen or trained is kept from that, or is not.

    SpIEL's linear policy (Ansell et al., 2024) replaces its random, untrained start. `Regrow.replace_all_first` says
    otherwise; None keeps what was chosen or trained.
    """
    rule, spaces = run.rule, run.spaces(training=False)
    if rule.space == "mask":
        return bool(rule.replace_all_first)
    origin = origin_of(spaces)
    if rule.drop is None:
        _warn_of_new_choice(run, origin)
        return False
    if not rule.replaces_random_start or origin is None:
        return rule.replaces_random_start
    if rule.replace_all_first:
        warnings.warn(
            f"Regrow.replace_all_first=True: the first move, at step {rule.first_step}, replaces all units of adapter "
            f"'{run.adapter}', whose support {origin}: that is lost. Set replace_all_first=None or False to keep it.",
            stacklevel=4,
        )
        return True
    warnings.warn(
        f"Adapter '{run.adapter}': the first move of Regrow(grow={type(rule.grow).__name__}()) replaces every unit of "
        f"a random start. This support {origin}, so it is kept and the first move replaces the given fraction only. "
        "Set Regrow.replace_all_first=False to say that this is right, or True to replace it.",
        stacklevel=4,
    )
    return False


def restored_start(run: Run) -> bool:
    """The same for a resumed run whose checkpoint says nothing of it: from the support, which has not moved before the
    first move."""
    rule = run.rule
    if rule.space == "mask":
        return bool(rule.replace_all_first)
    if rule.replace_all_first is not None or not rule.replaces_random_start:
        return rule.replaces_random_start
    return all(space.is_random_start() for space in run.spaces(training=False))


def origin_of(spaces: list[UnitSpace]) -> str | None:
    """Why the first move should keep the supports of an adapter, as the end of a sentence; None: an untrained draw."""
    config = spaces[0].config
    if not all(space.has_first_values() for space in spaces):
        return "has trained values"
    if all(space.is_random_start() for space in spaces):
        return None
    if config.criterion.part_type != "random":
        return f"was chosen by criterion='{config.criterion.part_type}'"
    if any(rule.part_type == "search_support" for rule in config.rules):
        return "was found by SearchSupport"
    return "was loaded, given or moved before"


def _warn_of_new_choice(run: Run, origin: str | None) -> None:
    """`drop=None` chooses the whole support anew at every move: right where the same criterion chose it before."""
    rule, criterion = run.rule, run.rule.grow.part_type
    if origin == "has trained values":
        keeps = rule.retired > 0  # those that leave retire with what they learned
    else:
        keeps = origin is None or run.config.criterion.part_type == criterion
    if not keeps:
        warnings.warn(
            f"Adapter '{run.adapter}': Regrow.drop=None chooses the whole support anew by {type(rule.grow).__name__} "
            f"at step {rule.first_step}, and the support {origin}: what it leaves out is lost. Set criterion="
            f"'{criterion}' for the start, Regrow.retired=1.0 to keep what was learned, or leave the rule out.",
            stacklevel=4,
        )
