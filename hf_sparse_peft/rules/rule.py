"""Rules: what happens to the units of an adapter while it trains; options, behaviour and state in one class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..utils.parts import Part, UnknownPart
from ..utils.tensors import TensorSpec
from .run import Run
from .space import UnitSpace

WRITES = frozenset({"units", "trains", "values", "gradient", "forward"})


@dataclass(frozen=True)
class Rule(Part):
    r"""Base of the rules of `config.schedule`; a subclass is a registered frozen dataclass, its fields are its options.

    A rule object is never changed and knows no model: what it needs is in the `Run` that each of its methods is given,
    in this order at every optimizer step:

        before_step          before the first micro-batch's forward pass
        after_micro_batch    after each but the last micro-batch's backward pass
        gradients            gradients are summed, averaged over ranks and clipped; the optimizer has not stepped
        after_update         the optimizer has stepped (or skipped the step); gradients are still there
        after_step           the step is counted, gradients are gone

    What a resumed run must find again are tensors that `state` declares, and JSON in `run.saved`; everything else
    follows from the step number or lives in `run.memory`.
    """

    part_kind: ClassVar[str] = "rule"
    acts_on: ClassVar[frozenset[str]] = frozenset()
    """Kinds of the unit spaces that it works on."""
    writes: ClassVar[frozenset[str]] = frozenset()
    """What it changes: `units` (which ones live), `trains` (who is updated), `values`, `gradient`, `forward`. Two rules
    that write the units of one space are refused; see `conflict`."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """What it relies on: `gate` (rank components with a trained gate), `scaling` (their number and scaling may be other
    ones in a step than between steps), `counts` (matrices with a number of living entries of their own), `fixed_units`
    (no other rule moves them), `all_modules` (no other rule holds modules still), `entries` (units that are single
    weight entries), `gradient` (dense gradients of a layer, `Run.read_gradient`), `batches` (a dataloader at the
    start), `experts` (split low-rank factors), `two_passes` (a loop that gives each batch to the model twice).
    Asked for by `all_needs`."""
    gate: ClassVar[str] = "zeros"
    """How the gate starts that an adapter is given for this rule where its config says nothing (`config.gate`)."""
    decides: ClassVar[str | None] = None
    """Of what the rule alone decides who trains at a step ("layers"); two rules that decide the same are refused."""
    undecayed: ClassVar[frozenset[str]] = frozenset()
    """Parameters of its spaces, by name (`UnitSpace.scored_parameters`), that are to have no weight decay: the
    optimizers of a config leave them out, others are warned of."""
    within: ClassVar[frozenset[str]] = frozenset()
    """Types of the rules that may write the same units: this one acts at their moves, before them."""

    @property
    def takes_shards(self) -> bool:
        """Whether it may run where ranks hold a shard of each parameter (`fully_shard`): it reads them by
        `UnitSpace.living_values` or `whole`, and writes them by `move_units` alone."""
        return False

    @property
    def freezes_units(self) -> bool:
        """Whether single units may be excluded from the update while they go on adding to the weight."""
        return False

    @property
    def extra_capacity(self) -> float:
        """Room to allocate for units beyond those that are trained, as a fraction of them."""
        return 0.0

    def check(self, config: Any) -> None:
        """Refuse a config that the rule, or a part among its options, cannot work with, when the config is made.

        Raises:
            ValueError: names the option and the mend.
        """
        for part in self._parts("check_training"):
            part.check_training(config, sorted(self.acts_on))

    def state(self, space: UnitSpace) -> list[TensorSpec]:
        """The tensors (role "rule") to keep for one space: allocated at injection as zeros, saved in checkpoints, moved
        with the units that they follow, dropped when the last step is done. Here: what parts among the options keep."""
        return [spec for part in self._parts("state") for spec in part.state(space)]

    @property
    def all_needs(self) -> frozenset[str]:
        """`needs`, and those of the parts among the options."""
        return self.needs.union(*[part.needs for part in self._parts("needs")])

    def _parts(self, method: str) -> list[Any]:
        options = [getattr(self, option.name) for option in fields(self)]
        return [part for part in options if isinstance(part, Part) and hasattr(part, method)]

    def begin(self, run: Run) -> None:
        """Training begins (`run.resumed`: goes on).

        Raises:
            ValueError: the run is too short or lacks something.
        """

    def before_step(self, run: Run) -> None:
        """Before the first micro-batch of a step."""

    def after_micro_batch(self, run: Run) -> None:
        """After a micro-batch that is not the step's last."""

    def gradients(self, run: Run) -> None:
        """Before the optimizer's step."""

    def after_update(self, run: Run) -> None:
        """After the optimizer's step."""

    def after_step(self, run: Run) -> None:
        """After the step is counted: `run.step` steps are done."""

    def finish(self, run: Run) -> None:
        """The run's last step is done."""

    def release(self, run: Run) -> None:
        """The run is over, however it ended: take everything off the model that is not part of the adapter."""


@dataclass(frozen=True)
class RankRule(Rule):
    """Base of the rules that act on components of low-rank halves by their gate."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"rank"})
    needs: ClassVar[frozenset[str]] = frozenset({"gate", "scaling"})


def conflict(first: Rule, second: Rule) -> str | None:
    """Why two rules of one adapter cannot be combined, as a sentence with its mend; None where they compose.

    Rules that write the units of the same spaces are refused, unless one is meant to act within the other. A rule that
    needs fixed units is refused beside any that writes them. `trains` masks are combined, `values`, `gradient` and
    `forward` act in the order of the list.
    """
    names = f"{type(first).__name__} and {type(second).__name__}"
    if type(first) is type(second):
        return f"schedule has {type(first).__name__} twice; keep one of them."
    spaces = first.acts_on & second.acts_on
    if first.decides is not None and first.decides == second.decides:
        return f"{names} both decide which {first.decides} train, and together may leave none. Keep one of them."
    for one, other in ((first, second), (second, first)):
        if "all_modules" in one.all_needs and "module" in other.acts_on and "trains" in other.writes:
            return (
                f"{type(one).__name__} decides once, over all modules, and {type(other).__name__} holds some of them "
                "still at that step. Keep one of them."
            )
    both = "units" in first.writes and "units" in second.writes
    if both and spaces and second.part_type not in first.within and first.part_type not in second.within:
        return f"{names} both decide which units of {sorted(spaces)} live. Keep one of them."
    for one, other in ((first, second), (second, first)):
        if spaces and "fixed_units" in one.all_needs and "units" in other.writes:
            return (
                f"{type(one).__name__} needs the units that training began with, and {type(other).__name__} moves "
                "them. Keep one of them."
            )
    return None


def why_not_without_gradients(rule: Rule) -> str | None:
    """What a rule does that no training without gradients (zeroth order) allows, as the end of a sentence; None for
    rules that may run there: those that write values only, or nothing, and read no gradient."""
    if "gradient" in rule.all_needs | rule.writes:
        return "reads or changes gradients"
    if "trains" in rule.writes:
        return "holds numbers still that noise would move"
    if "units" in rule.writes:
        return "moves units, which the noise and the replay log are not told of"
    return "changes the forward pass, whose two losses are compared" if "forward" in rule.writes else None


def check_entries(owner: str, config: Any) -> None:
    """Raises `ValueError` unless the units of the adapter's support are single entries."""
    other = [g for g in (config.granularity, *config.granularity_pattern.values()) if g != "entry"]
    if other or not config.has_support:
        raise ValueError(
            f"{owner} looks at single entries of the support, and granularity={(other or ['entry'])[0]!r} with "
            f"density={config.density}. Set granularity='entry' and density > 0, or leave it out."
        )


def check_kind(rule: Any, config: Any) -> None:
    """Raises `ValueError` where adapters of that config have no units of the rule's one kind, `rule.space`."""
    if rule.space not in config.possible_kinds:
        kinds = sorted(config.possible_kinds & {"support", "mask"}) or "neither"
        raise ValueError(
            f"{type(rule).__name__}.space={rule.space!r}, and adapters of a {type(config).__name__} have {kinds}. "
            "Set space to that, or leave the rule out of schedule."
        )


def in_order(rules: Iterable[Rule]) -> list[Rule]:
    """Rules in the order in which they act: as listed, but those that hold whole modules still before all others, which
    must find who trains at a step, and one that acts within another's moves before that one."""
    found: list[Rule] = []
    for rule in sorted(rules, key=lambda rule: not ("module" in rule.acts_on and "trains" in rule.writes)):
        others = [at for at, other in enumerate(found) if other.part_type in rule.within]
        found.insert(others[0] if others else len(found), rule)
    return found


def check_pairs(schedule: Iterable[Rule | UnknownPart]) -> None:
    """Refuse rules that cannot be combined.

    Raises:
        ValueError: names both rules.
    """
    known = [rule for rule in schedule if isinstance(rule, Rule)]
    for number, rule in enumerate(known):
        for other in known[:number]:
            if (reason := conflict(other, rule)) is not None:
                raise ValueError(reason)


def check_schedule(schedule: Iterable[Rule | UnknownPart], config: Any) -> None:
    """Refuse rules that cannot be combined, or cannot work with `config`.

    Raises:
        ValueError: names both rules, the rule's option, or the kinds of units that adapters of that config never have.
    """
    check_pairs(schedule)
    for rule in (rule for rule in schedule if isinstance(rule, Rule)):
        if not rule.acts_on & config.possible_kinds:
            raise ValueError(
                f"{type(rule).__name__} acts on units of {sorted(rule.acts_on)}, and adapters of a "
                f"{type(config).__name__} have {sorted(config.possible_kinds)}. Leave it out of schedule."
            )
        rule.check(config)
