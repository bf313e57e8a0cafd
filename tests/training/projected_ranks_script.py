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

from hf_sparse_peft import ProjectedAdamWSpec, trainer_options
from hf_sparse_peft.optim import NormScaledResidual, SVDProjection, innermost

STEPS = 5
SPEC = ProjectedAdamWSpec(SVDProjection(4), NormScaledResidual(), every=2)


def train(out: Path, batch: int, spec: ProjectedAdamWSpec = SPEC) -> dict[str, torch.Tensor]:
    """Weights and subspaces after a few steps."""
    model = tiny.llama()
    args = tiny.arguments(out, STEPS, per_device_train_batch_size=batch, max_grad_norm=0.0)
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
    try:
        train(out / str(rank), 4, ProjectedAdamWSpec(SVDProjection(4), layerwise=True))
        found["refused"] = torch.tensor(False)
    except ValueError as error:
        found["refused"] = torch.tensor("layerwise=True out" in str(error))
    torch.save(found, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
