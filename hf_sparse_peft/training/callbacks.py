"""Callbacks that carry one rule each: for a rule that is given in place, or a run that lists its callbacks itself."""

from __future__ import annotations

from typing import ClassVar

from ..rules import Allocate, Prune, Regrow, Rule, SampleLayers
from .runner import RuleRunner


class PruningCallback(RuleRunner):
    """Runs `Prune`, the config's or the one that is given."""

    rule_class: ClassVar[type[Rule]] = Prune


class LayerSamplingCallback(RuleRunner):
    """Runs `SampleLayers`, the config's or the one that is given; given, on any peft adapter with a `scaling`."""

    rule_class: ClassVar[type[Rule]] = SampleLayers


class MaskRegrowthCallback(RuleRunner):
    """Runs `Regrow`, the config's or the one that is given."""

    rule_class: ClassVar[type[Rule]] = Regrow


class RankReallocationCallback(RuleRunner):
    """Runs `Allocate`, the config's or the one that is given."""

    rule_class: ClassVar[type[Rule]] = Allocate
