"""`initialize_support`: supports from dense gradients, against a plain Llama in float64."""

import random

import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support_codes import read_codes
from torch.utils.data import DataLoader, TensorDataset
from tuner_toolbox import base_bits, fill, logits, make_config, same_bits, tiny_llama, token_ids

from hf_sparse_peft import (
    ByModule,
    Density,
    Global,
    SparseLoraConfig,
    initialize_support,
    load_support,
    save_support,
    write_supports,
)
from hf_sparse_peft.sparsity.statistics import Fisher
from hf_sparse_peft.tuners import adapter_layers

EXAMPLES = 12


def config_of(criterion="fisher", options=None, **overrides) -> SparseLoraConfig:
    options = (
        {"examples": EXAMPLES, **(options or {})} if criterion not in ("given", "delta_magnitude") else options or {}
    )
    return make_config("sparse-entry", criterion={"type": criterion, **options}, **overrides)


def batches(size: int = 4, count: int = EXAMPLES, seed: int = 1) -> list[dict]:
    ids = token_ids(count, 9, seed)
    return [{"input_ids": part, "labels": part.clone()} for part in ids.split(size)]


def supports(model, adapter="default"):
    return {layer.module_name: read_codes(layer.sparse_lora_support[adapter]) for layer in adapter_layers(model)}


def chosen(config, data=None, base=None, **options):
    model = get_peft_model(tiny_llama() if base is None else base, config)
    initialize_support(model, batches() if data is None else data, show_progress=False, **options)
    return model


def reference_gradients(model, data, single: bool) -> dict[str, list[torch.Tensor]]:
    """Flat float64 gradients of the targeted weights of a plain Llama, a batch or an example at a time; mean losses."""
    plain = tiny_llama().double()
    found = {layer.module_name: [] for layer in adapter_layers(model)}
    for batch in data:
        for ids in batch["input_ids"].split(1) if single else [batch["input_ids"]]:
            plain.zero_grad()
            scores = plain(input_ids=ids).logits[:, :-1].log_softmax(-1)
            (-scores.gather(-1, ids[:, 1:, None]).mean()).backward()
            for name, gradients in found.items():
                gradients.append(plain.get_submodule(name).weight.grad.reshape(-1).clone())
    return found


def best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda unit: (-float(scores[unit]), unit))[:count])


SCORES = {
    "gradient": lambda w, gs: sum(gs).abs(),
    "fisher": lambda w, gs: sum(g**2 for g in gs),
    "snip": lambda w, gs: (w * sum(gs)).abs(),
    "movement": lambda w, gs: -w * sum(gs),
    "momentum": lambda w, gs: sum(0.9 ** (len(gs) - i) * g for i, g in enumerate(gs)).abs(),
}


@pytest.mark.parametrize("criterion", SCORES)
def test_supports_are_the_best_entries_by_gradients_of_a_plain_model(criterion):
    model = chosen(config_of(criterion))
    found = reference_gradients(model, batches(), single=criterion == "fisher")
    weights = dict(tiny_llama().named_parameters())
    for name, units in supports(model).items():
        weight = weights[f"{name}.weight"].detach().double().reshape(-1)
        assert units == best(SCORES[criterion](weight, found[name]), len(units))
        assert not model.get_submodule(f"base_model.model.{name}").sparse_lora_values["default"].any()


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_global_allocation_is_the_top_k_of_all_scores_together(density):
    targets = ["q_proj", "v_proj", "down_proj"] if density < 0.1 else ["v_proj", "down_proj"]
    model = chosen(config_of(budget=Global(density), target_modules=targets))
    squares = {n: sum(g**2 for g in gs) for n, gs in reference_gradients(model, batches(), single=True).items()}
    # By definition: every module's best entry, and the best of all others.
    pool = [
        (0 if unit == int(scores.argmax()) else 1, -value, name, unit)
        for name, scores in squares.items()
        for unit, value in enumerate(scores.tolist())
    ]
    total = int(density * len(pool))
    expected = {name: [] for name in squares}
    for _, _, name, unit in sorted(pool)[:total]:
        expected[name].append(unit)
    assert supports(model) == {name: sorted(units) for name, units in expected.items()}
    assert tiny.units_of_sizes(model.peft_config["default"]) == {name: len(units) for name, units in expected.items()}
    assert len({len(units) for units in expected.values()}) > 1
    if density == 0.3:  # FISH's own rule, without a floor for modules, is the same where each gets something
        threshold = torch.cat(list(squares.values())).topk(total).values[-1]
        plain = {name: (scores >= threshold).nonzero().squeeze(1).tolist() for name, scores in squares.items()}
        assert supports(model) == plain


def test_fisher_of_one_linear_layer_with_squared_loss_is_the_closed_form():
    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = torch.nn.Linear(5, 1, bias=False)

        def forward(self, x, y):
            return {"loss": 0.5 * (self.lin(x).squeeze(-1) - y).square().mean()}

    torch.manual_seed(3)
    x, y = torch.randn(20, 5), torch.randn(20)
    base = Regression()
    error = (x.double() @ base.lin.weight.detach().double().t()).squeeze(1) - y.double()
    closed = (error[:, None] * x.double()).square().sum(0)  # sum_i (e_i x_ij)^2
    config = SparseLoraConfig(r=0, density=0.4, target_modules=["lin"], criterion="fisher")
    model = get_peft_model(base, config)
    data = [{"x": x[i : i + 3], "y": y[i : i + 3]} for i in range(0, 20, 3)]
    initialize_support(model, data, max_examples=20, show_progress=False)
    assert supports(model)["lin"] == closed.topk(2).indices.sort().values.tolist()


@pytest.mark.parametrize("criterion", ["fisher", "gradient", "snip", "movement"])
def test_the_batch_size_of_the_loader_changes_nothing(criterion):
    one, other = (supports(chosen(config_of(criterion), batches(size))) for size in (1, 6))
    assert one == other


@pytest.mark.parametrize("criterion", ["sensitivity", "momentum", "sm3", "delta_magnitude"])
def test_accumulation_changes_nothing_where_steps_count(criterion):
    options = {"warmup_steps": 3, "warmup_lr": 1e-3} if criterion == "delta_magnitude" else {}
    whole = chosen(config_of(criterion, options), batches(4))
    parts = chosen(config_of(criterion, options), batches(2), batches_per_step=2)
    apart = chosen(config_of(criterion, options), batches(2))
    one, two, three = (supports(model) for model in (whole, parts, apart))
    overlap = sum(len(set(one[n]) & set(two[n])) for n in one) / sum(map(len, one.values()))
    assert overlap > 0.995  # sums of other orders may swap two neighbours in the last bit
    assert one != three


def test_permuted_examples_leave_the_fisher_mask_as_it_is():
    data = batches(1)
    assert supports(chosen(config_of(), data)) == supports(chosen(config_of(), data[::-1]))


def test_two_runs_choose_the_same_units():
    assert supports(chosen(config_of())) == supports(chosen(config_of()))


@pytest.mark.parametrize("budget", [Density(0.05), Global(0.05)], ids=["uniform", "global"])
def test_one_layer_a_pass_chooses_what_one_pass_for_all_does(budget):
    whole = chosen(config_of(budget=budget))
    passes = []
    data = batches()

    class Counting(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    layerwise = chosen(config_of(budget=budget), Counting(data), accumulator_bytes=1)
    assert supports(layerwise) == supports(whole)
    assert len(passes) == len(adapter_layers(whole))


def test_the_model_is_in_evaluation_mode_and_gets_its_modes_and_gradients_back():
    model = get_peft_model(tiny_llama(attention_dropout=0.5), config_of())
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    layer = adapter_layers(model)[0]
    layer.sparse_lora_values["default"].grad = mark = torch.ones_like(layer.sparse_lora_values["default"])
    bits = base_bits(model)
    initialize_support(model, batches(), show_progress=False)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert layer.sparse_lora_values["default"].grad is mark
    assert all(p.grad is None for p in model.parameters() if p is not layer.sparse_lora_values["default"])
    assert not any(layer.sparse_lora_gradient_readers for layer in adapter_layers(model))
    assert same_bits(bits, base_bits(model))
    assert supports(model) == supports(chosen(config_of()))  # dropout had no say


@pytest.mark.parametrize("criterion", ["fisher", "delta_magnitude"])
def test_no_random_state_and_no_sampler_moves(criterion):
    ids = token_ids(EXAMPLES, 9)

    def collate(rows):
        torch.rand(3), random.random(), np.random.rand()
        part = torch.stack([row[0] for row in rows])
        return {"input_ids": part, "labels": part.clone()}

    loader = DataLoader(
        TensorDataset(ids), batch_size=4, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(5)
    )
    options = {"warmup_steps": 5, "warmup_lr": 1e-3} if criterion == "delta_magnitude" else {}
    model = get_peft_model(tiny_llama(attention_dropout=0.1), config_of(criterion, options))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), loader.generator.get_state()
    initialize_support(model, loader, show_progress=False)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist(), loader.generator.get_state()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[3], after[3])
    assert before[1:3] == after[1:3]
    order = torch.cat([batch["input_ids"] for batch in loader])
    fresh = DataLoader(
        TensorDataset(ids), batch_size=4, shuffle=True, collate_fn=collate, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(order, torch.cat([batch["input_ids"] for batch in fresh]))


def test_an_nf4_base_is_ranked_by_gradients_at_its_dequantised_weights(base_of):
    model = get_peft_model(base_of("nf4"), config_of())
    initialize_support(model, batches(), show_progress=False)
    plain = tiny_llama().double()
    for name, parameter in base_of("nf4").named_parameters():
        if parameter.ndim == 1 or "embed" in name or "lm_head" in name:
            plain.get_parameter(name).data.copy_(parameter)
    other = get_peft_model(base_of("nf4"), config_of())
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            adapted = other.get_submodule(f"base_model.model.{name}")
            if hasattr(adapted, "get_base_weight"):
                module.weight.data.copy_(adapted.get_base_weight())
            else:
                import bitsandbytes as bnb

                weight = bnb.functional.dequantize_4bit(adapted.weight.data, adapted.weight.quant_state)
                module.weight.data.copy_(weight)
    squares = dict.fromkeys(supports(model), 0)
    for batch in batches(1):
        plain.zero_grad()
        scores = plain(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        (-scores.gather(-1, batch["labels"][:, 1:, None]).mean()).backward()
        for name in squares:
            squares[name] = squares[name] + plain.get_submodule(name).weight.grad.reshape(-1) ** 2
    for name, units in supports(model).items():
        assert len(set(units) & set(best(squares[name], len(units)))) >= 0.99 * len(units)


# Undecided supports


@pytest.mark.parametrize("case", ["sparse-entry", "hybrid-column", "sparse-block", "hybrid-row"])
def test_an_undecided_support_computes_as_the_base_and_refuses_to_train(case):
    model = get_peft_model(tiny_llama(), make_config(case, criterion="fisher"))
    assert torch.equal(logits(model), logits(tiny_llama()))
    model.train()
    with pytest.raises(ValueError, match=r"initialize_support\(model, dataloader\).*callbacks_for\(model\)"):
        model(input_ids=token_ids(), labels=token_ids())
    with torch.no_grad():
        model(input_ids=token_ids())
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable >= sum(layer.sparse_lora_values["default"].numel() for layer in adapter_layers(model))


def test_an_undecided_support_is_neither_saved_nor_compacted(tmp_path):
    model = get_peft_model(tiny_llama(), config_of())
    for act in (lambda: model.save_pretrained(tmp_path), model.compact, lambda: save_support(model, tmp_path / "s")):
        with pytest.raises(ValueError, match="has not been chosen yet"):
            act()


def test_config_survives_the_round_trip_of_its_file(tmp_path):
    model = chosen(config_of(budget=Global(0.05), options={"mode": "absolute"}))
    fill(model)
    model.save_pretrained(tmp_path)
    config = SparseLoraConfig.from_pretrained(str(tmp_path))
    assert config.criterion.mode == "absolute"
    assert tiny.units_of_sizes(config) == {name: len(units) for name, units in supports(model).items()}
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_a_file_fills_an_adapter_whose_sizes_wait_for_data(tmp_path):
    model = chosen(config_of(budget=Global(0.05)))
    fill(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(tiny_llama(), config_of(budget=Global(0.05)))
    other.load_adapter(str(tmp_path), "default", is_trainable=True)  # what Trainer does at a resume
    assert supports(other) == supports(model)
    assert tiny.units_of_sizes(other.peft_config["default"]) == tiny.units_of_sizes(model.peft_config["default"])
    assert torch.equal(logits(other), logits(model))


def test_the_heads_numbers_are_paid_out_of_the_budget():
    plain = chosen(config_of(budget=Global(0.05)))
    model = chosen(config_of(budget=Global(0.4, pay_head=True), modules_to_save=["lm_head"]))
    total = sum(layer.get_base_weight().numel() for layer in adapter_layers(model))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight.numel()
    assert sum(map(len, supports(model).values())) == int(0.4 * total) - head
    assert sum(map(len, supports(plain).values())) == int(0.05 * total)
    with pytest.raises(ValueError, match=r"has to pay for 6144 numbers.*Raise the density to at least"):
        chosen(config_of(budget=Global(0.05, pay_head=True), modules_to_save=["lm_head"]))


# Files of supports


def test_a_run_starts_from_a_saved_support(tmp_path):
    for budget in (Density(0.05), Global(0.05)):
        model = chosen(config_of(budget=budget), save_to=tmp_path / "s.safetensors")
        other = get_peft_model(tiny_llama(), config_of(budget=budget))
        load_support(other, tmp_path / "s.safetensors")
        assert supports(other) == supports(model)
        other.train()
        other(input_ids=token_ids(), labels=token_ids()).loss.backward()


def test_files_for_other_models_or_formats_are_refused_by_name(tmp_path):
    path = tmp_path / "s.safetensors"
    chosen(config_of(), save_to=path)
    with pytest.raises(ValueError, match=r"made for another model.*layers\.2"):
        load_support(get_peft_model(tiny_llama(num_hidden_layers=3), config_of()), path)
    with pytest.raises(ValueError, match=r"layers\.0.*q_proj"):
        load_support(get_peft_model(tiny_llama(hidden_size=32), config_of()), path)
    with pytest.raises(ValueError, match=r"is given \d+ units and its support has"):
        load_support(get_peft_model(tiny_llama(), config_of(density=0.1)), path)
    save_file(load_file(path), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a support file of version 1"):
        load_support(get_peft_model(tiny_llama(), config_of()), tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="save_to"):
        load_support(get_peft_model(tiny_llama(), config_of()), tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="truncated"):
        load_support(get_peft_model(tiny_llama(), config_of()), tmp_path / "cut.safetensors")


# Errors


def test_bad_input_says_what_to_change():
    model = get_peft_model(tiny_llama(), config_of())
    cases = [
        (lambda: initialize_support(model, iter(batches())), TypeError, "cannot be read again"),
        (lambda: initialize_support(model, []), ValueError, "no batch"),
        (lambda: initialize_support(model, [token_ids()]), TypeError, "keyword arguments"),
        (lambda: initialize_support(model, [{"input_ids": token_ids()}]), ValueError, "returns no loss"),
        (lambda: initialize_support(model, batches(), adapter_name="x"), ValueError, "no adapter 'x'"),
        (lambda: initialize_support(model, batches(), "magnitude"), ValueError, "without data"),
        (lambda: initialize_support(model, batches(), "fischer"), ValueError, "'fischer' is unknown"),
        (lambda: initialize_support(model, batches(), "given"), ValueError, "from outside"),
        (lambda: initialize_support(model, batches(), max_examples=0), ValueError, "max_examples=0"),
        (lambda: make_config("sparse-entry", criterion="fischer"), ValueError, "criterion='fischer' is unknown"),
        (lambda: config_of(options={"modes": 1}), ValueError, "has no option .'modes'."),
        (
            lambda: config_of(budget=Global(0.05, pay_head=True), granularity="row"),
            ValueError,
            "needs granularity='entry'",
        ),
    ]
    for act, kind, message in cases:
        with pytest.raises(kind, match=message):
            act()
    with pytest.raises(ValueError, match=r"density=1\.00e-05 leaves .* each of the 6 targeted modules keeps at least"):
        get_peft_model(tiny_llama(), config_of(budget=Global(1e-5)))
    with pytest.raises(ValueError, match="density=1e-05 leaves no entry"):
        get_peft_model(tiny_llama(), config_of(density=1e-5))
    initialize_support(model, batches(), show_progress=False)
    fill(model)
    with pytest.raises(ValueError, match="has trained values"):
        initialize_support(model, batches())


@pytest.mark.filterwarnings("ignore:criterion='gradient' leaves out")
def test_gradients_that_are_finite_in_no_module_choose_nothing():
    base = tiny_llama()
    model = get_peft_model(base, config_of("gradient"))
    loss = lambda model, batch: model(**batch).loss * float("inf")  # noqa: E731
    with pytest.raises(ValueError, match="scores of all 6 modules are 0 or not finite"):
        initialize_support(model, batches(), compute_loss=loss, show_progress=False)
    assert all(layer.awaits_calibration("default") for layer in adapter_layers(model))


def test_a_criterion_with_options_can_be_given_and_is_written_to_the_config():
    model = get_peft_model(tiny_llama(), make_config("sparse-entry"))
    initialize_support(model, batches(), Fisher(examples=4, mode="absolute"), show_progress=False)
    config = model.peft_config["default"]
    assert config.criterion == Fisher(examples=4, mode="absolute")
    assert supports(model) == supports(chosen(config_of(options={"examples": 4, "mode": "absolute"})))


def test_units_from_outside_may_leave_a_module_out(tmp_path):
    model = get_peft_model(tiny_llama(), config_of("given"))
    names = [layer.module_name for layer in adapter_layers(model)]
    units = {name: torch.tensor([3, 8, 11][: i % 4]) for i, name in enumerate(names)}
    write_supports(model, units)
    assert tiny.units_of_sizes(model.peft_config["default"]) == {name: i % 4 for i, name in enumerate(names)}
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    save_support(model, tmp_path / "s.safetensors")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), logits(model))
    resumed = get_peft_model(tiny_llama(), config_of("given"))
    resumed.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    again = get_peft_model(tiny_llama(), config_of("given"))
    load_support(again, tmp_path / "s.safetensors")
    assert tiny.units_of_sizes(again.peft_config["default"]) == tiny.units_of_sizes(model.peft_config["default"])
    with pytest.raises(ValueError, match=r"other modules than adapter.*q_proj"):
        write_supports(get_peft_model(tiny_llama(), config_of("given")), dict(list(units.items())[1:]))


# Allocation by module


def test_densities_by_module_are_kept_and_checked(tmp_path):
    pattern = {"q_proj": 0.1, r"layers\.1\.self_attn\.v_proj": 0.0}
    config = make_config("sparse-entry", budget=ByModule(pattern, otherwise=0.05))
    model = get_peft_model(tiny_llama(), config)
    for layer in adapter_layers(model):
        share = next((v for k, v in pattern.items() if k.replace("\\", "") in layer.module_name), 0.05)
        held = layer.sparse_lora_values
        assert (held["default"].shape[0] if "default" in held else 0) == int(share * layer.get_base_weight().numel())
    fill(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match=r"budget=ByModule names \['k_proj'\]"):
        get_peft_model(tiny_llama(), make_config("sparse-entry", budget=ByModule({"k_proj": 0.1})))
    with pytest.raises(ValueError, match=r"ByModule.densities=.*1.5.* is out of range.* in \[0, 1\]"):
        make_config("sparse-entry", budget=ByModule({"q_proj": 1.5}))
    with pytest.raises(ValueError, match="leaves no entry"):
        get_peft_model(tiny_llama(), make_config("sparse-entry", budget=ByModule({"q_proj": 1e-6})))


def test_a_given_table_of_counts_is_taken_as_it_is_and_checked():
    names = [layer.module_name for layer in adapter_layers(get_peft_model(tiny_llama(), make_config("sparse-entry")))]
    table = {name: 10 * (i + 1) for i, name in enumerate(names)}
    model = chosen(config_of(sizes={name: [count, count, 0] for name, count in table.items()}))
    assert {name: len(units) for name, units in supports(model).items()} == table
    with pytest.raises(ValueError, match=r"sizes gives .* 99999 units"):
        get_peft_model(tiny_llama(), config_of(sizes={name: [99999, 99999, 0] for name in names}))
