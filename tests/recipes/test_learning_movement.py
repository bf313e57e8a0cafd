"""`recipes/benchmarks/learning_movement.py`: the first step's movement, against gradients read by hand."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
EXAMPLES = 128


@pytest.fixture
def words(monkeypatch, tmp_path):
    """The word problems with one batch of examples, options and numbers."""
    for folder in (BENCHMARKS.parent, BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(BENCHMARKS.parents[1])
    import learning
    from learning_hub_tasks import TASKS
    from learning_runs import budget

    options = learning.LearningOptions(
        task="words", device="cpu", examples=EXAMPLES, test_examples=8, rank=2, output=tmp_path
    )
    learning.fill_in_sizes(options)
    task = TASKS["words"](options)
    return task, options, budget(task, options.rank, options.steps)


def by_hand(task, name: str, share: float) -> float:
    """RMS of x @ (M * sign(G))^T for the entries M with the largest |G|, G the loss gradient of all examples."""
    model = task.model().eval()
    data = task.training_data(0)
    rows = [data["train_dataset"][i] for i in range(EXAMPLES)]
    layer, seen = model.get_submodule(name), []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(**data["data_collator"](rows[:16]))
    hook.remove()
    x = seen[0][torch.randperm(len(seen[0]), generator=torch.Generator().manual_seed(0))[:512]]
    model(**data["data_collator"](rows)).loss.backward()
    gradient = layer.weight.grad.double()
    kept = round(share * gradient.numel())
    mask = torch.zeros(gradient.numel(), dtype=torch.float64)
    mask[gradient.abs().flatten().topk(kept).indices] = 1
    moved = x.double() @ (mask.view_as(gradient) * gradient.sign()).T
    return moved.square().mean().sqrt().item()


def test_one_step_of_sparse_values_moves_outputs_by_the_signs_of_the_gradient(words):
    from learning_movement import first_step

    task, options, numbers = words
    name = "model.layers.1.mlp.up_proj"
    found = first_step("shira:density=0.02,criterion=gradient", task, options, numbers)
    (far,) = (value for key, value in found.items() if key.endswith(name))
    assert far == pytest.approx(by_hand(task, name, 0.02), rel=0.03)  # near 0 Adam's eps slows entries
    assert len(found) == 28


def test_a_factor_on_the_low_rank_half_is_a_factor_on_its_movement(words):
    from learning_movement import first_step

    task, options, numbers = words
    one, two = (first_step(f"lora:r=2,lora_alpha={alpha}", task, options, numbers) for alpha in (4, 8))
    assert {name: two[name] / one[name] for name in one} == {name: pytest.approx(2, rel=0.05) for name in one}
