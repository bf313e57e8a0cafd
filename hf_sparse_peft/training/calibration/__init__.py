"""What adapters take from the training data before their first step: one service for every tuner.

    start.py       calibrate, calibrate_waiting: an adapter of any tuner, by hand or at the start of training
    passes.py      passes over the data that read statistics of many layers, a few at a time
    readers.py     feeding one layer's statistic with gradients or activations, whatever the layer
    both_halves.py ranks, factors and supports that all modules decide together, from their gradients
    initialize.py  initialize_support: supports by a criterion, on top of the passes
    selection.py   an adapter's budget, spent on the units that score best
    warmup.py      LT-SFT's dense warm-up
    supports.py    supports from elsewhere; files of their own

A tuner's layer says what it reads and takes it by the protocol in `tuners.shared.calibration`.
"""

from __future__ import annotations

from .initialize import initialize_support
from .passes import read_statistics
from .start import calibrate, calibrate_waiting, waits_for_data
from .supports import layers_with_support, load_support, save_support, write_supports

__all__ = [
    "calibrate",
    "calibrate_waiting",
    "initialize_support",
    "layers_with_support",
    "load_support",
    "read_statistics",
    "save_support",
    "waits_for_data",
    "write_supports",
]
