"""Floor 6: what happens to an adapter during training."""

from __future__ import annotations

from .calibration import calibrate, initialize_support, load_support, save_support, write_supports
from .callbacks import LayerSamplingCallback, MaskRegrowthCallback, PruningCallback, RankReallocationCallback
from .example_weights import meta_weights, soft_label_losses
from .loop import Controller
from .muon import MuonSpec
from .optimizers import (
    AdamSSpec,
    AdamWSpec,
    AgedAdamWSpec,
    SparseSM3Spec,
    ZerothOrderSpec,
    make_optimizer,
    optimizer_spec,
)
from .options import TRAINERS, callbacks_for, trainer_class_for, trainer_options
from .replicated import adapter_parameters, leave_adapters_whole
from .report_page import write_report
from .run_record import RunRecord
from .run_report import RunReportCallback
from .runner import RuleRunner
from .support_picture import draw_run, draw_support_history
from .task_mixture import TaskCollator, TaskMixture
from .telemetry import SupportTelemetryCallback
from .trainers import TwoPassTrainer
from .upstream_runs import prepare_upstream
from .upstream_start import UpstreamStartCallback, initialize_upstream
from .whole_checkpoints import guard_checkpoints
from .zeroth_order_trainer import ZerothOrderCallback, ZerothOrderTrainer, zeroth_order_optimizer

__all__ = [
    "TRAINERS",
    "AdamSSpec",
    "AdamWSpec",
    "AgedAdamWSpec",
    "Controller",
    "LayerSamplingCallback",
    "MaskRegrowthCallback",
    "MuonSpec",
    "PruningCallback",
    "RankReallocationCallback",
    "RuleRunner",
    "RunRecord",
    "RunReportCallback",
    "SparseSM3Spec",
    "SupportTelemetryCallback",
    "TaskCollator",
    "TaskMixture",
    "TwoPassTrainer",
    "UpstreamStartCallback",
    "ZerothOrderCallback",
    "ZerothOrderSpec",
    "ZerothOrderTrainer",
    "adapter_parameters",
    "calibrate",
    "callbacks_for",
    "draw_run",
    "draw_support_history",
    "guard_checkpoints",
    "initialize_support",
    "initialize_upstream",
    "leave_adapters_whole",
    "load_support",
    "make_optimizer",
    "meta_weights",
    "optimizer_spec",
    "prepare_upstream",
    "save_support",
    "soft_label_losses",
    "trainer_class_for",
    "trainer_options",
    "write_report",
    "write_supports",
    "zeroth_order_optimizer",
]
