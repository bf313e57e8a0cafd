"""Layers of a model whose own weights train: drawn alike, by outliers, in turns or by gradients, with optimizers whose
state follows; resumed to the bit."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from hf_sparse_peft import ProjectedAdamWSpec, SampleLayers, SwitchLayers, trainer_options
from hf_sparse_peft.optim import SVDProjection, innermost
from hf_sparse_peft.rules import Cyclic, LargestGradient, Outliers
from hf_sparse_peft.rules.probing import drawn_batches
from hf_sparse_peft.training import RuleRunner

LAYERS, STEPS = 4, 8
GALORE = ProjectedAdamWSpec(SVDProjection(4), every=5)
OUTLIERS = Outliers(threshold=3.0, samples=12, batch=8)
RULES = {
    "lisa": SwitchLayers(1, every=3, moments="keep"),
    "owlore": SwitchLayers(1, every=3, moments="drop", choice=OUTLIERS),
    "badam": SwitchLayers(1, every=3, moments="drop", choice=Cyclic("permutation")),
    "gauss-southwell": SwitchLayers(1, every=3, moments="drop", choice=LargestGradient()),
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


def layer_of(name):
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else None


def train(model, out, rule, *callbacks, resume=None, **arguments):
    args = tiny.arguments(out, STEPS, **{"weight_decay": 0.1, **arguments})
    options = trainer_options(model, args, optimizer=GALORE)
    runner = RuleRunner(rule)
    options["callbacks"] = [*options["callbacks"], runner, *callbacks]
    trainer = Trainer(model=model, train_dataset=tiny.TokenData(), **options)
    trainer.train(resume_from_checkpoint=resume)
    trainer.runner = runner
    return trainer


def state(trainer):
    names = {p: name for name, p in trainer.model.named_parameters()}
    found = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    for p, entry in innermost(trainer.optimizer).state.items():
        found |= {f"{names[p]}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    return found


@pytest.mark.parametrize("name", RULES)
def test_one_layer_changes_at_a_time_and_a_run_resumes_to_the_bit(name, tmp_path):
    changed, held, seen = [], [], {}

    def look(step, model, optimizer):
        now = {n: p.detach().clone() for n, p in model.named_parameters()}
        if seen:
            changed.append({layer_of(n) for n in now if not torch.equal(now[n], seen[n])} - {None})
        held.append({layer_of(n) for n, p in model.named_parameters() if innermost(optimizer).state.get(p)} - {None})
        seen.update(now)

    whole = train(tiny.llama(layers=LAYERS), tmp_path / "whole", RULES[name], tiny.At(on_step_end=look))
    assert all(len(layers) == 1 for layers in changed)
    assert changed[0] == changed[1]
    if RULES[name].moments == "drop":
        assert held[1:] == changed
    train(tiny.llama(layers=LAYERS), tmp_path / "halves", RULES[name], StopAt(4))  # in the middle of an interval
    again = train(
        tiny.llama(layers=LAYERS), tmp_path / "again", RULES[name], resume=str(tmp_path / "halves/checkpoint-4")
    )
    expected, found = state(whole), state(again)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    trains = [event["trains"] for event in whole.runner.events]
    assert len(trains) == 3
    assert all(p.requires_grad for p in whole.model.parameters())


def planted(layers=LAYERS):
    """A Llama, of which one layer has outlying weights."""
    model = tiny.llama(layers=layers)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[:4, :4] *= 60
    return model


def test_outliers_are_those_of_the_definition_over_the_samples_that_were_drawn(tmp_path):
    model = planted()
    inputs: dict[str, torch.Tensor] = {}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(model, tmp_path, SwitchLayers(1, every=3, choice=OUTLIERS))
    found = trainer.runner.saved["/switch_layers"]["outliers"]
    rows = trainer.runner.runs[0]
    base = planted()
    linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    for name, module in linears.items():
        module.register_forward_pre_hook(
            lambda m, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, 1).double())
        )
    for batch in drawn_batches(rows, rows.rule, 12, 8, "outliers"):
        base.eval()(**batch)
    for layer in range(LAYERS):
        scores = [
            (start[f"{name}.weight"].double().abs() * torch.cat(inputs[name]).norm(dim=0)).flatten()
            for name in linears
            if layer_of(name) == layer
        ]
        pooled = torch.cat(scores)
        expected = (pooled > 3.0 * pooled.mean()).double().mean()
        assert found[layer] == pytest.approx(float(expected), abs=1e-9)


def test_the_layer_with_the_largest_gradient_is_chosen_and_the_probe_leaves_no_trace(tmp_path):
    model = tiny.llama(layers=LAYERS)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 6
    trainer = train(model, tmp_path, SwitchLayers(1, every=20, choice=LargestGradient(samples=96)))
    base = tiny.llama(layers=LAYERS)
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight *= 6
    ids = tiny.TokenData().ids
    base(input_ids=ids, labels=ids).loss.backward()
    norms = {}
    for name, p in base.named_parameters():
        if (layer := layer_of(name)) is not None:
            norms[layer] = norms.get(layer, 0) + float(p.grad.double().pow(2).sum())
    (event,) = trainer.runner.events
    assert event["trains"] == [f"model.layers.{max(norms, key=norms.get)}"]


def test_every_layer_has_a_turn_before_layers_are_compared_by_their_second_moments(tmp_path):
    seen = []

    class Watched(LargestGradient):
        def choose(self, rule, run, start):
            if start == 2 * LAYERS:
                ids, model = next(drawn_batches(run, rule, 96, 96, "gradient", run.step, share=False)), run.model
                rule.train_only(run, list(range(LAYERS)))
                found = dict.fromkeys(range(LAYERS), 0.0)
                named = [(name, p) for name, p in model.named_parameters() if layer_of(name) is not None]
                grads = torch.autograd.grad(model.eval()(**ids).loss, [p for _, p in named])
                model.train()
                for (name, p), g in zip(named, grads, strict=True):
                    kept = innermost(run.optimizer).state[p]
                    second = kept["exp_avg_sq"].double() / (1 - 0.999 ** int(kept["step"]))
                    found[layer_of(name)] += float((g.double() ** 2 / (second.sqrt() + 1e-8)).sum())
                seen.append(max(found, key=found.get))
            return super().choose(rule, run, start)

    model = tiny.llama(layers=LAYERS)
    runner = RuleRunner(SwitchLayers(1, every=2, moments="keep", choice=Watched(samples=96, by="diagonal")))
    args = tiny.arguments(tmp_path, 2 * LAYERS + 2)
    Trainer(model=model, train_dataset=tiny.TokenData(), args=args, callbacks=[runner]).train()
    turns = [int(event["trains"][0].rsplit(".", 1)[1]) for event in runner.events]
    assert sorted(turns[:LAYERS]) == list(range(LAYERS))
    assert turns[LAYERS:] == seen


def test_the_diagonal_rule_refuses_an_optimizer_without_moments_of_entries(tmp_path):
    rule = SwitchLayers(1, every=2, moments="keep", choice=LargestGradient(by="diagonal"))
    with pytest.raises(ValueError, match="keeps none of each entry"):
        train(tiny.llama(layers=LAYERS), tmp_path, rule)


def test_constants_of_layers_turn_the_choice(tmp_path):
    rule = SwitchLayers(1, every=20, choice=LargestGradient(by="lipschitz", lipschitz=[1e6, 1e6, 1e-6, 1e6]))
    (event,) = train(tiny.llama(layers=LAYERS), tmp_path, rule).runner.events
    assert event["trains"] == ["model.layers.2"]


def test_adapters_of_upstream_are_drawn_by_their_bases_outliers(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(planted(), LoraConfig(r=8, target_modules=["q_proj", "up_proj"]))
    trainer = train(model, tmp_path, SwitchLayers(1, every=3, choice=Outliers(3.0, 12)))
    found = trainer.runner.saved["default/switch_layers"]["outliers"]
    plain = train(planted(), tmp_path, SwitchLayers(1, every=3, choice=Outliers(3.0, 12)))
    assert found == pytest.approx(plain.runner.saved["/switch_layers"]["outliers"], abs=1e-9)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SwitchLayers(2, every=3, choice=Outliers(1e6)), "finds outliers in 0 of 4 layers"),
        (SampleLayers(every=3), "has no scaling that could be suppressed"),
    ],
    ids=["threshold", "ist"],
)
def test_what_cannot_be_drawn_is_refused_before_training(rule, message, tmp_path):
    model = tiny.llama(layers=LAYERS)
    with pytest.raises(ValueError, match=message):
        train(model, tmp_path, rule)
    assert all(p.requires_grad for p in model.parameters())
