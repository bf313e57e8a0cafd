"""Floor 4: what happens to the units of an adapter while it trains. One file a rule.

space.py         what a rule sees of a layer          moves.py         the one way that units change
run.py           what a rule sees of a training run   update_mask.py   who is updated
rule.py          the base of all rules, and which pairs compose
prune.py         units leave along a curve
regrow.py        supports move                        drop.py, growth.py   who leaves, who enters
freeze.py        entries stop training                frozen.py        units that are excluded from the update
alternate_modules.py    a fraction of the modules is updated per period
penalties.py     L1 and nuclear norm on what trains
sample_layers.py    drawn transformer layers train at a step        probing.py    passes beside training
"""

from .alternate_modules import AlternateModules
from .drop import Age, Drop, Magnitude, Sensitivity, SignedMagnitude
from .freeze import Freeze
from .growth import SM3, AccumulatedGradient, Gradient, Growth, LowRankMagnitude, Move
from .moves import MoveResult, move_units
from .penalties import L1Penalty, NuclearNorm
from .prune import Prune
from .random_growth import Random, RandomUnfired
from .regrow import Regrow
from .rule import Rule, check_schedule, conflict, in_order
from .run import Run, Training, leave_update_out, refuse_unskippable
from .sample_layers import SampleLayers
from .space import Follower, ModuleSpace, TensorSpace, UnitSpace
from .update_mask import UpdateMask

__all__ = [
    "SM3",
    "AccumulatedGradient",
    "Age",
    "AlternateModules",
    "Drop",
    "Follower",
    "Freeze",
    "Gradient",
    "Growth",
    "L1Penalty",
    "LowRankMagnitude",
    "Magnitude",
    "ModuleSpace",
    "Move",
    "MoveResult",
    "NuclearNorm",
    "Prune",
    "Random",
    "RandomUnfired",
    "Regrow",
    "Rule",
    "Run",
    "SampleLayers",
    "Sensitivity",
    "SignedMagnitude",
    "TensorSpace",
    "Training",
    "UnitSpace",
    "UpdateMask",
    "check_schedule",
    "conflict",
    "in_order",
    "leave_update_out",
    "move_units",
    "refuse_unskippable",
]
