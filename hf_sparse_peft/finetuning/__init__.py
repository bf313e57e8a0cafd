"""Whole runs: from the options in a YAML file to an adapter with its card. What `sparse-peft train` and recipes share.

train_recipe                     a YAML file's run: text, or prompts and answers, on a base in 4 bits or dense
AdapterArguments, TextArguments  its options
choose_method, method_defaults   the method that options name, or SparseLora as they describe it
load_base, nf4                   the base, prepared for training
fine_tune, FineTuned             a method's run on any data, with figures before and after; what it leaves
full_fine_tuning                 the run without an adapter that some methods learn from
"""

from .base import load_base, nf4
from .method import choose_method, full_fine_tuning, method_defaults, method_of_card
from .options import AdapterArguments, TextArguments
from .recipe import read_options, train_recipe
from .run import FineTuned, fine_tune, trainer_for

__all__ = [
    "AdapterArguments",
    "FineTuned",
    "TextArguments",
    "choose_method",
    "fine_tune",
    "full_fine_tuning",
    "load_base",
    "method_defaults",
    "method_of_card",
    "nf4",
    "read_options",
    "train_recipe",
    "trainer_for",
]
