"""What every rank of `test_projected_runs.py` runs: whole weights under DDP, over subspaces that ranks would not agree
about.

    torchrun --nproc_per_node 2 tests/training/projected_ranks_script.py OUT
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tiny` is: this runs as a script, too
import tiny
from transformers import Trainer

from hf_sparse_peft import AdamRSpec, MkorSpec, MuonSpec, OptimizerSpec, ProjectedAdamWSpec, trainer_options
from hf_sparse_peft.optim import NormScaledResidual, SVDProjection, innermost

STEPS = 5
SPEC = ProjectedAdamWSpec(SVDProjection(4), NormScaledResidual(), every=2)
OTHERS = {"muon": MuonSpec(iteration_dtype="float32"), "mkor": MkorSpec(every=2), "adam_r": AdamRSpec()}


def train(out: Path, batch: int, spec: OptimizerSpec = SPEC) -> dict[str, torch.Tensor]:
    """Weights and subspaces after a few steps."""
    model = tiny.llama()
    more = {"max_grad_norm": 0.0, "weight_decay": 0.1, "learning_rate": 1e-3}
    args = tiny.arguments(out, STEPS, per_device_train_batch_size=batch, **more)
    options = trainer_options(model, args, optimizer=spec)
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **options)
    trainer.train()
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for at, entry in innermost(trainer.optimizer).state_dict()["state"].items():
        found |= {f"{at}.{name}": torch.as_tensor(value).clone() for name, value in entry.items()}
    return found


def main(out: Path) -> None:
    """Writes `OUT/rank<r>.pt`."""
    rank = int(os.environ["RANK"])
    choose = SVDProjection.choose

    def noisy(self, gradient, seed):
        return {name: basis + 1e-3 * rank for name, basis in choose(self, gradient, seed).items()}

    SVDProjection.choose = noisy
    found = train(out / str(rank), 4)
    SVDProjection.choose = choose
    for name, spec in OTHERS.items():
        found |= {f"{name}.{key}": value for key, value in train(out / str(rank), 4, spec).items()}
    try:
        train(out / str(rank), 4, ProjectedAdamWSpec(SVDProjection(4), layerwise=True))
        found["refused"] = torch.tensor(False)
    except ValueError as error:
        found["refused"] = torch.tensor("layerwise=True out" in str(error))
    torch.save(found, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
