"""`InitialSupportCallback`: supports that the training data chooses, at the start of training."""

from __future__ import annotations

from transformers import TrainerCallback

from ..tuners import SparseLoraLayer, adapter_layers, restore_fp32
from ..tuners.shared.best_model import warn_of_best_model
from .calibration import initialize_support
from .trainer_checks import sharding_switched_on


class InitialSupportCallback(TrainerCallback):
    """Calls `initialize_support` at `on_train_begin` for trained adapters whose support waits for data.

    It reads the Trainer's own dataloader through copies of its sampler and of the random states, so that training sees
    the batches that it would have seen without it. A resumed run finds its supports in the checkpoint and does nothing
    here. Under DDP every rank reads its share and all choose the same units.

    Args:
        show_progress: whether a bar shows on stderr; None: as the Trainer's `disable_tqdm` says.
    """

    def __init__(self, show_progress: bool | None = None) -> None:
        self.show_progress = show_progress

    def on_init_end(self, args, state, control, model=None, **kwargs) -> None:
        """Undo the casts of the trainer's constructor before anything wraps the model."""
        if model is not None:
            restore_fp32(model)

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs) -> None:
        """Choose what has not been chosen.

        Raises:
            ValueError: there is no dataloader; sizes would change under a wrapped model; see `initialize_support`.
        """
        warn_of_best_model(args, state, model)
        layers = adapter_layers(model, SparseLoraLayer)
        for name in dict.fromkeys(name for layer in layers for name in layer.active_adapters):
            waiting = [layer for layer in layers if layer.awaits_calibration(name)]
            if not waiting or not waiting[0].sparse_lora_values[name].requires_grad:
                continue
            config = waiting[0].adapter_configs[name]
            score = config.criterion.part_type
            if sharded := sharding_switched_on(args):
                raise ValueError(
                    f"criterion='{score}' reads gradients of whole weights, and {sharded[0]}, switched on "
                    f"by {sharded[1]}, has sharded them. Call hf_sparse_peft.initialize_support(model, dataloader) "
                    "before creating the Trainer."
                )
            if config.calibrates_sizes and args.world_size > 1:
                raise ValueError(
                    f"budget=Global(...) or a structure of scope='model' with criterion='{score}' changes "
                    f"the sizes of the supports, and {args.world_size} processes have wrapped the model already. Call "
                    "hf_sparse_peft.initialize_support(model, dataloader) before creating the Trainer, or set "
                    "a density and scope='block'."
                )
            if train_dataloader is None:
                raise ValueError(
                    f"criterion='{score}' is estimated from data, and this trainer hands its callbacks no "
                    "dataloader. Call hf_sparse_peft.initialize_support(model, dataloader) before training."
                )
            show = not args.disable_tqdm if self.show_progress is None else self.show_progress
            initialize_support(
                model,
                train_dataloader,
                adapter_name=name,
                batches_per_step=args.gradient_accumulation_steps,
                show_progress=show and state.is_world_process_zero,
            )
