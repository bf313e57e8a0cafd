"""What an adapter may need of the training data before its first step: the protocol of calibration."""

from __future__ import annotations

from torch import Tensor

from ...sparsity import Statistic
from .tensors import AdapterTensors


class CalibratedTensors(AdapterTensors):
    r"""An adapter that takes something from data (a support, bases from a gradient's SVD) before it trains.

    The runner of a Trainer and `Controller(dataloader=...)` read the data at the start of training
    (`training.calibration`); `hf_sparse_peft.calibrate(model, dataloader)` does it before. A tuner whose layers decide
    each for itself takes part with three methods and `needs_calibration` of its config, here with the bases of the
    mean gradient's truncated SVD:

        class SpectralConfig(AdapterConfig):
            @property
            def needs_calibration(self):
                return self.bases == "gradient"

        class SpectralLayer(AdapterLayer):
            def awaits_calibration(self, adapter_name):
                return self.adapter_configs[adapter_name].needs_calibration and not self.spectral_A[adapter_name].any()

            def calibration_statistic(self, adapter_name):
                return MeanGradient(examples=256)

            def take_calibration(self, adapter_name, state):
                U, S, Vh = torch.linalg.svd(state["mean"], full_matrices=False)
                ...

    From the statistic follows the pass: gradients of the base weight, dense or quantised, of whole batches, of one
    example or of one optimizer step at a time, or activations in forward passes alone (`Statistic`). The model runs in
    evaluation mode and a layer that awaits calibration computes as its base does. Layers are read in groups whose
    states fit into memory together, and a group's layers take theirs before the next group is read.
    """

    def awaits_calibration(self, adapter_name: str) -> bool:
        """Whether the adapter in this layer waits for data: the layer computes as its base then, and refuses to train.
        What a checkpoint brings must end it. Asked in every training forward: not on the device's memory if possible.
        """
        return False

    def calibration_statistic(self, adapter_name: str) -> Statistic:
        """What to read of the layer's base weight."""
        raise NotImplementedError

    def take_calibration(self, adapter_name: str, state: dict[str, Tensor] | None) -> None:
        """Start from what data says: afterwards the adapter no longer awaits calibration.

        Args:
            adapter_name: which adapter.
            state: the statistic's, fp32 on the layer's device, added up over ranks, equal on all of them, and the
                layer's to overwrite. None where the data says nothing about this layer (its tensors are all 0, or not
                finite): start as without data. The user is told.
        """
        raise NotImplementedError

    def calibration_message(self, adapter_name: str) -> str:
        """What to tell a user whose adapter waits for data."""
        return (
            f"Adapter '{adapter_name}' starts from data, and has seen none yet. Either call "
            "hf_sparse_peft.calibrate(model, dataloader) first, or let the Trainer do it: Trainer(..., "
            "callbacks=hf_sparse_peft.callbacks_for(model)); in a loop of your own, Controller(..., dataloader=...)."
        )

    def choose_units(self, adapter_name: str, action: str) -> None:
        """Choose units that are still to be chosen without data, before `action` ("save", "compact").

        Raises:
            ValueError: the adapter waits for data.
        """
        if self.awaits_calibration(adapter_name):
            raise ValueError(f"Nothing to {action}: {self.calibration_message(adapter_name)}")
