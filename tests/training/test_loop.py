"""`Controller`: a loop of one's own gives the adapter that a Trainer gives, and leaves nothing behind."""

import copy
import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.data import DataLoader
from training_toolbox import TokenData, adapted, make_config, tiny_llama
from transformers import Trainer, TrainingArguments

from hf_sparse_peft import (
    AccumulatedGradient,
    AdamSSpec,
    AdaptiveRowScale,
    Allocate,
    AlternateModules,
    AverageRank,
    BalanceLoss,
    BitPenalty,
    Cast,
    ChooseSupport,
    Controller,
    Distil,
    DistilFeatures,
    ErrorFeedback,
    FactoredConfig,
    FactorExperts,
    FactorMaskConfig,
    Freeze,
    FreezeGradually,
    FrobeniusDecay,
    GradientNoise,
    GroupEnvelope,
    GroupLasso,
    GrowRank,
    HalfSpace,
    Hesso,
    L1Norm,
    L1Penalty,
    LargestError,
    LearnMask,
    Lobster,
    MaskedLoraConfig,
    MaskSparsity,
    NuclearNorm,
    Orthogonality,
    PairOrthogonality,
    PlateauThreshold,
    ProximalGate,
    Prune,
    Regrow,
    RelocateSubnets,
    Rule,
    SampleLayers,
    SampleRank,
    SampleVectors,
    SearchSupport,
    SeReNe,
    SparseLoraConfig,
    SpectralLoraConfig,
    StableRank,
    StructuredConfig,
    SwitchLayers,
    TrainedRankPruning,
    TrainNM,
    callbacks_for,
    make_optimizer,
)
from hf_sparse_peft.sparsity import Linear, Staircase
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.factored import ChannelBits, Spectral
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, ScoredMask
from hf_sparse_peft.tuners.shared.live_run import run_on
from hf_sparse_peft.tuners.spectral_lora import SVD
from hf_sparse_peft.tuners.structured import LowRankExperts, QuasiGivens
from hf_sparse_peft.utils.parts import load_part, part_types

STEPS = 12
PRUNE = Prune(final_fraction=0.4, start=0.1, end=0.8, every=3)
CASES = {
    "Prune": {"schedule": [PRUNE]},
    "Prune-global-blocks": {
        "schedule": [Prune(final_fraction=0.4, start=0.1, end=0.8, every=2, scope="global")], "granularity": "block",
        "density": 0.3, "r": 2,
    },
    "no rule": {},
}  # fmt: skip


RULES = {
    "adaptive_row_scale": AdaptiveRowScale(2.0),
    "allocate": Allocate(budget=AverageRank(2), every=1),
    "alternate_modules": AlternateModules(period_steps=2),
    "cast": Cast(),
    "choose_support": ChooseSupport(2, 2),
    "distil": Distil(0.5),
    "distil_features": DistilFeatures(logits=0.5),
    "error_feedback": ErrorFeedback(0.5, proximal=0.1, weight_decay=0.01),
    "largest_error": LargestError(),
    "trained_rank_pruning": TrainedRankPruning(every=2, energy=0.5),
    "factor_experts": FactorExperts(consistency=0.0),
    "freeze": Freeze(at=0.5, threshold=0.01),
    "freeze_gradually": FreezeGradually(0.7),
    "frobenius_decay": FrobeniusDecay(0.1),
    "gradient_noise": GradientNoise(sigma=0.3),
    "group_lasso": GroupLasso(weight=3.0, every=2),
    "grow_rank": GrowRank(AverageRank(3), modules=1, every=1, warmup=0),
    "group_envelope": GroupEnvelope(weight=20.0),
    "half_space": HalfSpace(0.5, 0.5),
    "hesso": Hesso(periods=2),
    "learn_mask": LearnMask(0.5, penalty=1.0),
    "l1_penalty": L1Penalty(weight=5.0),
    "l1_norm": L1Norm(Staircase(Linear(5e-2, 0.0), 3), of="update"),
    "lobster": Lobster(0.05),
    "mask_sparsity": MaskSparsity(0.5),
    "plateau_threshold": PlateauThreshold(0.5, 1, 2, slack=-0.5, data="training", batches=1),
    "serene": SeReNe(0.05),
    "nuclear_norm": NuclearNorm(min_side=8),
    "orthogonality": Orthogonality(),
    "pair_orthogonality": PairOrthogonality(0.5),
    "prune": Prune(start=0.1, end=0.8, every=2),
    "proximal_gate": ProximalGate(weight=20.0),
    "relocate_subnets": RelocateSubnets(every=2, rate="rewarm"),
    "regrow": Regrow(every=3, grow=AccumulatedGradient(steps=2), fraction=0.5),
    "switch_layers": SwitchLayers(1, every=2),
    "sample_layers": SampleLayers(trained=0.5, every=3, probes=2),
    "sample_rank": SampleRank(),
    "balance_loss": BalanceLoss(0.5),
    "bit_penalty": BitPenalty(20.0, rate=10.0),
    "sample_vectors": SampleVectors(every=2, iterations=2, warmup=1),
    "stable_rank": StableRank(every=2, window=2, last=2, threshold=10.0, first=1),
    "search_support": SearchSupport(trials=6, steps=1, batches=2),
    "train_nm": TrainNM(),
}
"""Every rule of the package, with options with which it acts within a few steps on a tiny model."""
ON_THE_BASE = {"lora_prune", "light_peft", "transfer_pruning"}
"""On units of the base, which no config has: callbacks of their own run them."""
OWN = sorted(name for name, rule in part_types(Rule).items() if rule.__module__.startswith("hf_sparse"))


class Recorder(Trainer):
    """Takes the samples in their order; keeps what each micro-batch was, and the learning rate of its step."""

    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append((copy.deepcopy(inputs), num_items_in_batch, self.optimizer.param_groups[0]["lr"]))
        return super().training_step(model, inputs, num_items_in_batch)


def trained_by_trainer(config, out, accumulation: int = 1, layers: int = 1, **arguments):
    model = adapted(config, layers=layers)
    args = TrainingArguments(
        out, max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        learning_rate=1e-2, weight_decay=0.0, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
        optim="adamw_torch", **arguments,
    )  # fmt: skip
    optimizers = (make_optimizer(model, args), None)
    trainer = Recorder(model, args, train_dataset=TokenData(), callbacks=callbacks_for(model), optimizers=optimizers)
    trainer.seen = []
    trainer.train()
    return model, trainer.seen


def optimizer_for(model) -> torch.optim.Optimizer:
    optimizer = make_optimizer(model, lr=1e-2)
    if optimizer is None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    optimizer.param_groups[0]["initial_lr"] = 1e-2  # written by torch's schedulers, of which the Trainer has one
    return optimizer


def steps_of(seen, accumulation: int = 1):
    return [seen[at : at + accumulation] for at in range(0, len(seen), accumulation)]


def step_by_hand(rules, model, optimizer, micro_batches) -> None:
    model.train()
    for number, (inputs, items, _) in enumerate(micro_batches, 1):
        rules.before_step()
        model(**inputs, num_items_in_batch=items).loss.backward()
        if number < len(micro_batches):
            rules.after_micro_batch()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = micro_batches[-1][2]
    optimizer.step()
    rules.after_step()
    optimizer.zero_grad()


def assert_same(first, second) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def a_batch():
    ids = TokenData()[0]["input_ids"][None]
    return [({"input_ids": ids, "labels": ids}, None, 1e-2)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_loop_by_hand_gives_the_trainers_adapter_to_the_bit(case, accumulation, tmp_path):
    config = make_config(**CASES[case])
    expected, seen = trained_by_trainer(config, tmp_path, accumulation)
    model = adapted(config)
    optimizer = optimizer_for(model)
    with Controller(model, optimizer, STEPS, accumulation=accumulation) as rules:
        for micro_batches in steps_of(seen, accumulation):
            step_by_hand(rules, model, optimizer, micro_batches)
    assert_same(model, expected)
    assert model.peft_config["default"].training_finished == bool(config.schedule)
    assert [event["rule"] for event in rules.events] == ["prune"] * len(rules.events)
    assert bool(rules.events) == bool(config.schedule)


def test_an_accelerate_loop_with_accumulation_gives_the_trainers_adapter_to_the_bit(tmp_path):
    config = make_config(**CASES["Prune"])
    expected, seen = trained_by_trainer(config, tmp_path, 2)
    GradientState._reset_state()  # the Trainer's is at the end of its data
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2))
    plain = adapted(config)
    model, optimizer = accelerator.prepare(plain, optimizer_for(plain))
    model.train()
    with Controller(model, optimizer, STEPS, accumulation=2) as rules:
        for inputs, items, lr in seen:
            with accelerator.accumulate(model):
                rules.before_step()
                # accelerate divides by 2, and the loss is a share of the step's already, as in Trainer
                accelerator.backward(2 * model(**inputs, num_items_in_batch=items).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                rules.after_step() if accelerator.sync_gradients else rules.after_micro_batch()
                optimizer.zero_grad()
    assert rules.step == STEPS
    assert_same(plain, expected)


def test_a_run_goes_on_from_model_optimizer_and_the_controllers_state(tmp_path):
    config = make_config(**CASES["Prune"])
    expected, seen = trained_by_trainer(config, tmp_path)
    model = adapted(config)
    optimizer = optimizer_for(model)
    with Controller(model, optimizer, STEPS) as rules:
        for micro_batches in steps_of(seen)[:5]:
            step_by_hand(rules, model, optimizer, micro_batches)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), rules.state_dict()))
    again = adapted(config)
    again.load_state_dict(saved[0])
    optimizer = optimizer_for(again)
    optimizer.load_state_dict(saved[1])
    with Controller(again, optimizer, STEPS, state=saved[2]) as rules:
        for micro_batches in steps_of(seen)[5:]:
            step_by_hand(rules, again, optimizer, micro_batches)
    assert_same(again, expected)


def config_for(rule: Rule) -> SparseLoraConfig | SpectralLoraConfig | FactoredConfig:
    if rule.acts_on == {"factors"}:
        return FactoredConfig(keep_base=True, target_modules=["q_proj", "v_proj"], schedule=[rule])
    if rule.acts_on == {"mask"}:
        parts = {"masking": ScoredMask()} if isinstance(rule, LearnMask) else {}
        parts |= {"optimizer": AdamSSpec()} if isinstance(rule, Cast) else {}
        targets = ["q_proj", "v_proj"]
        return MaskedLoraConfig(update=DenseUpdate(), mask="all", target_modules=targets, schedule=[rule], **parts)
    if rule.acts_on == {"basis"}:
        return SpectralLoraConfig(r=4, target_modules=["q_proj", "v_proj"], bases=SVD(train_B=True), schedule=[rule])
    if rule.acts_on == {"channel"}:
        targets = ["q_proj", "v_proj"]
        return FactoredConfig(form=ChannelBits(4), target_modules=targets, schedule=[rule], keep_base=True)
    if rule.acts_on == {"vector"}:
        return FactoredConfig(form=Spectral(4), target_modules=["q_proj", "v_proj"], schedule=[rule], keep_base=True)
    if rule.acts_on == {"pair"}:
        return StructuredConfig(form=QuasiGivens(), target_modules=["q_proj", "v_proj"], schedule=[rule])
    if rule.acts_on == {"expert"}:
        return StructuredConfig(form=LowRankExperts(4, 2), target_modules=["q_proj", "v_proj"], schedule=[rule])
    split = FactorMaskConfig(kind="stochastic", experts=2) if "experts" in rule.needs else None
    granularity = "subnet" if "subnet_row" in rule.acts_on else "entry"
    return make_config(schedule=[rule], r=4, density=0.1, factor_masks=split, granularity=granularity)


@pytest.mark.parametrize("name", sorted(set(OWN) - ON_THE_BASE))
def test_every_rule_does_in_a_loop_by_hand_what_it_does_in_a_trainer_also_resumed(name, tmp_path):
    config, layers, middle = config_for(RULES[name]), 2, 5
    expected, seen = trained_by_trainer(config, tmp_path, 2, layers)
    steps, loader = steps_of(seen, 2), DataLoader(TokenData(), batch_size=4)

    def trained(model, steps, state=None, moments=None):
        """Train; what a resumed run needs, as it was before each step."""
        optimizer, seen = optimizer_for(model), []
        if moments is not None:
            optimizer.load_state_dict(moments)
        with Controller(model, optimizer, STEPS, accumulation=2, dataloader=loader, state=state) as rules:
            for at, micro_batches in enumerate(steps):
                if at == middle:
                    seen = copy.deepcopy((rules.state_dict(), optimizer.state_dict(), model.state_dict()))
                step_by_hand(rules, model, optimizer, micro_batches)
        return seen

    model = adapted(config, layers=layers)
    state, moments, tensors = trained(model, steps)
    assert_same(model, expected)

    again = adapted(config, layers=layers)
    again.load_state_dict(tensors)
    trained(again, steps[middle:], state, moments)
    assert_same(again, expected)

    idle = adapted(config, layers=layers)
    idle.peft_config["default"].schedule = []
    if name == "cast":
        idle.peft_config["default"].optimizer = None  # AdamS refuses to step without the rule
    trained(idle, steps)
    ours, theirs = idle.state_dict(), expected.state_dict()
    assert not all(torch.equal(ours[key], theirs[key]) for key in theirs)  # the rule has done something


class Overflow:
    """A gradient scaler that skips the steps in `skipped`."""

    def __init__(self, skipped):
        self.skipped, self.calls = skipped, 0

    def get_scale(self):
        return 1.0

    def step(self, optimizer):
        self.calls += 1
        if self.calls not in self.skipped:
            optimizer.step()


def test_a_step_that_the_scaler_skips_counts_and_moves_nothing():
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer, scaler = optimizer_for(model), Overflow({3})
    calls = []
    with Controller(model, optimizer, STEPS, scaler=scaler) as rules:
        (run,) = rules._steps.rules.runs
        run.rule = Watched(calls)
        for _ in range(4):
            inputs, items, _ = a_batch()[0]
            rules.before_step()
            model(**inputs, num_items_in_batch=items).loss.backward()
            scaler.step(optimizer)
            rules.after_step()
            optimizer.zero_grad()
        assert rules.step == 4
    assert calls == ["before_step", "gradients", "after_update", "after_step"] * 4


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_step_that_the_scaler_skips_thresholds_no_gate_and_the_next_one_does(accelerated):
    model = adapted(make_config(r=4, density=0.0, schedule=[ProximalGate(weight=0.05, scaled_by_lr=False)]))
    layer = adapter_layers(model)[0]
    optimizer, scaler, gates = optimizer_for(model), Overflow({2}), []
    given = AcceleratedOptimizer(optimizer, scaler=Reporting({2})) if accelerated else optimizer
    with Controller(model, given, 3, scaler=None if accelerated else scaler) as rules:
        for _ in range(3):
            inputs, items, _ = a_batch()[0]
            before = layer.sparse_lora_gate["default"].detach().clone()
            rules.before_step()
            model(**inputs, num_items_in_batch=items).loss.backward()
            given.step() if accelerated else scaler.step(optimizer)
            stepped = layer.sparse_lora_gate["default"].detach().clone()
            rules.after_step()
            gates.append((before, stepped, layer.sparse_lora_gate["default"].detach().clone()))
            optimizer.zero_grad()
    assert [not torch.equal(before, after) for before, _, after in gates] == [True, False, True]


class Reporting(Overflow):
    """As accelerate calls it."""

    def step(self, optimizer, closure=None):
        super().step(optimizer)

    def update(self):
        pass


def test_what_readers_see_is_in_the_scale_of_the_step_whatever_the_scaler_made_of_it_meanwhile():
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer, scales = optimizer_for(model), [8.0]
    scaler = SimpleNamespace(get_scale=lambda: scales[-1])
    with Controller(model, optimizer, STEPS, scaler=scaler) as rules:
        (run,) = rules._steps.rules.runs
        rules.before_step()
        scales.append(4.0)  # an overflow: the scaler has skipped the step and lowered its scale
        assert run.loss_scale == 8.0
        rules.after_step()
        rules.before_step()
        assert run.loss_scale == 4.0


class Watched(Prune):
    """Notes its phases in a list that is no option of it."""

    def __init__(self, calls):
        super().__init__()
        object.__setattr__(self, "calls", calls)

    def before_step(self, run):
        self.calls.append("before_step")

    def gradients(self, run):
        self.calls.append("gradients")

    def after_update(self, run):
        self.calls.append("after_update")

    def after_step(self, run):
        self.calls.append("after_step")


def hooks_on(optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


@pytest.mark.parametrize("way", ["exception", "dropped", "closed", "next controller"])
def test_however_a_loop_ends_nothing_stays_on_model_and_optimizer(way):
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer = optimizer_for(model)
    before = hooks_on(optimizer)
    if way == "exception":
        with pytest.raises(RuntimeError, match="embedding"), Controller(model, optimizer, STEPS) as rules:
            step_by_hand(rules, model, optimizer, [({"input_ids": torch.ones(2, 3, 4, 5)}, None, 1e-2)])
    elif way == "dropped":
        rules = Controller(model, optimizer, STEPS)
        rules.before_step()
        del rules
        gc.collect()
    else:
        rules = Controller(model, optimizer, STEPS)
        rules.before_step()
        if way == "closed":
            rules.close()
            rules.close()
        else:
            other = optimizer_for(model)
            after = Controller(model, other, STEPS)
            step_by_hand(after, model, other, a_batch())
            after.close()
            rules.close()
    assert hooks_on(optimizer) == before
    assert run_on(model) is None
    assert not model.peft_config["default"].training_finished


def test_layers_warn_where_nobody_runs_the_rules_and_not_where_a_controller_does():
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer = optimizer_for(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Controller(model, optimizer, STEPS) as rules:
            step_by_hand(rules, model, optimizer, a_batch())
        assert not [w for w in caught if "asks for" in str(w.message)]
        model(**a_batch()[0][0]).loss.backward()
    (message,) = [str(w.message) for w in caught if "asks for" in str(w.message)]
    assert "Controller" in message


def test_steps_out_of_order_are_refused_with_the_mend():
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer = optimizer_for(model)
    with Controller(model, optimizer, 2) as rules:
        with pytest.raises(ValueError, match=r"optimizer\.step\(\) without Controller\.before_step"):
            optimizer.step()
        with pytest.raises(ValueError, match=r"after_step\(\) without Controller\.before_step"):
            rules.after_step()
        rules.before_step()
        with pytest.raises(ValueError, match="without a step of the optimizer"):
            rules.after_step()
        optimizer.step()
        with pytest.raises(ValueError, match=r"call Controller\.after_step\(\) before the next"):
            rules.before_step()
        with pytest.raises(ValueError, match="steps twice"):
            optimizer.step()
        rules.after_step()
        step_by_hand(rules, model, optimizer, a_batch())
        with pytest.raises(ValueError, match="closed after 2 of 2 steps"):
            rules.before_step()


def test_what_cannot_run_is_refused_when_the_controller_is_made():
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer = optimizer_for(model)
    with pytest.raises(ValueError, match=r"total_steps=0.*integer >= 1"):
        Controller(model, optimizer, 0)
    with pytest.raises(ValueError, match="no step left"):
        Controller(model, optimizer, 5, state={"step": 5, "saved": {}})
    for state in ([], {}, {"step": 1}, {"step": "1", "saved": {}}, {"step": -1, "saved": {}}, {"step": 1, "saved": []}):
        with pytest.raises(ValueError, match=r"Controller\(state"):
            Controller(model, optimizer, 5, state=state)
    with pytest.raises(TypeError, match="no step hooks"):
        Controller(model, object(), 5)
    with pytest.raises(ValueError, match="leave no step in a run of 1"):
        Controller(model, optimizer, 1, rule=Prune(start=0.1, end=0.2))
    assert run_on(model) is None
    unknown = adapted(make_config())  # as a file brings it
    unknown.peft_config["default"].schedule = [load_part(Rule, {"type": "from_a_plugin"}, "schedule[0]")]
    with pytest.raises(ValueError, match="from_a_plugin"):
        Controller(unknown, optimizer_for(unknown), 5)
    Controller(tiny_llama(), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 5).close()


def test_a_run_that_another_one_has_ended_says_so_instead_of_training_without_its_rules():
    model = adapted(make_config(schedule=[PRUNE]))
    optimizer = optimizer_for(model)
    with Controller(model, optimizer, STEPS) as first:
        step_by_hand(first, model, optimizer, a_batch())
        with Controller(model, optimizer_for(model), STEPS):
            pass
        with pytest.raises(ValueError, match="Another training run has begun on this model after 1 steps"):
            first.before_step()


@pytest.mark.parametrize("rule", [SampleRank(), GrowRank(AverageRank(3), modules=1, every=1, warmup=0)])
def test_rank_rules_train_one_factor_where_the_other_is_frozen(rule):
    model = adapted(make_config(r=4, density=0.0, schedule=[rule]))
    layers = adapter_layers(model)
    for layer in layers:
        layer.sparse_lora_A["default"].requires_grad_(False)
    before = [layer.sparse_lora_A["default"].detach().clone() for layer in layers]
    optimizer = optimizer_for(model)
    with Controller(model, optimizer, STEPS) as rules:
        for _ in range(STEPS):
            step_by_hand(rules, model, optimizer, a_batch())
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.sparse_lora_A["default"], old)
        assert not layer.sparse_lora_A["default"].requires_grad
        assert layer.sparse_lora_B["default"].any()


def test_more_micro_batches_than_accumulation_says_are_refused():
    model = adapted(make_config(schedule=[PRUNE]))
    with Controller(model, optimizer_for(model), STEPS, accumulation=2) as rules:
        rules.before_step()
        rules.after_micro_batch()
        with pytest.raises(ValueError, match=r"for the 2\. time in a step, and accumulation=2"):
            rules.after_micro_batch()


def test_an_optimizer_of_other_parameters_is_refused():
    model = adapted(make_config(schedule=[PRUNE]))
    with pytest.raises(ValueError, match="has none of the parameters that the rules act on"):
        Controller(model, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), STEPS)
    assert run_on(model) is None


def test_a_closed_controller_takes_no_further_call():
    model = adapted(make_config(schedule=[PRUNE]))
    rules = Controller(model, optimizer_for(model), STEPS, accumulation=2)
    rules.before_step()
    rules.close()
    for call in (rules.before_step, rules.after_micro_batch, rules.after_step):
        with pytest.raises(ValueError, match="closed after 0 of 12 steps"):
            call()


def test_a_final_rank_that_no_module_has_is_refused():
    model = adapted(make_config(r=4, density=0.0, schedule=[SampleRank(final_rank=5)]))
    with pytest.raises(ValueError, match="final_rank=5 is above the largest rank of a module, 4"):
        Controller(model, optimizer_for(model), STEPS)
