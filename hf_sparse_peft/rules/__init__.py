"""Floor 4: what happens to the units of an adapter while it trains. One file a rule.

space.py         what a rule sees of a layer          moves.py         the one way that units change
run.py           what a rule sees of a training run   update_mask.py   who is updated
rule.py          the base of all rules, and which pairs compose
prune.py         units leave along a curve
alternate_modules.py    a fraction of the modules is updated per period
sample_layers.py    drawn transformer layers train at a step        probing.py    passes beside training
"""

from .alternate_modules import AlternateModules
from .moves import MoveResult, move_units
from .prune import Prune
from .rule import Rule, check_schedule, conflict
from .run import Run, Training, leave_update_out, refuse_unskippable
from .sample_layers import SampleLayers
from .space import Follower, ModuleSpace, TensorSpace, UnitSpace
from .update_mask import UpdateMask

__all__ = [
    "AlternateModules",
    "Follower",
    "ModuleSpace",
    "MoveResult",
    "Prune",
    "Rule",
    "Run",
    "SampleLayers",
    "TensorSpace",
    "Training",
    "UnitSpace",
    "UpdateMask",
    "check_schedule",
    "conflict",
    "leave_update_out",
    "move_units",
    "refuse_unskippable",
]
