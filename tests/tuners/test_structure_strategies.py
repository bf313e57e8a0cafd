"""S2FT's selection strategies: structures chosen by activations, weights times activations, and gradients, against a
plain Llama in float64 with forward hooks."""

import copy

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model
from support_codes import read_codes
from tuner_toolbox import HIDDEN, INNER, base_bits, fill, logits, make_config, same_bits, tiny_llama
from tuner_toolbox import token_ids as tokens

from hf_sparse_peft import SparseLoraConfig, StructureConfig, initialize_support, load_support, methods
from hf_sparse_peft.tuners import adapter_layers

COLUMNS = ("o_proj", "down_proj")
FFN = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STRUCTURES = {"channel": (FFN, "mlp", INNER, 0.1), "head": (ATTENTION, "self_attn", 2, 0.5)}


def batches(size: int = 4, count: int = 12) -> list[dict]:
    return [{"input_ids": part, "labels": part.clone()} for part in tokens(count, 9).split(size)]


def config_of(criterion, unit="channel", scope="model", options=None, **overrides) -> SparseLoraConfig:
    modules, _, _, density = STRUCTURES[unit]
    return make_config(
        "sparse-row",
        **{
            "density": 0.0,
            "granularity_pattern": dict.fromkeys(COLUMNS, "column"),
            "structures": [StructureConfig(modules, unit, density, scope)],
            "target_modules": modules,
            "criterion": {"type": criterion, **({"examples": 12} if options is None else options)},
            **overrides,
        },
    )


def units_of(model) -> dict[str, list[int]]:
    return {
        layer.module_name: read_codes(layer.sparse_lora_support["default"])
        if "default" in layer.sparse_lora_support
        else []
        for layer in adapter_layers(model)
    }


def chosen(config, data=None, base=None, **options):
    model = get_peft_model(tiny_llama() if base is None else base, config)
    initialize_support(model, batches() if data is None else data, show_progress=False, **options)
    return model


def unit_scores(plain, names, criterion, data) -> dict[str, torch.Tensor]:
    """One score a row, or a column of the o and down projections: from the definitions, with hooks and autograd."""
    squares = {name: [0, 0] for name in names}

    def watch(name):
        def see(module, args, output):
            for side, tensor in enumerate((args[0], output)):
                squares[name][side] = squares[name][side] + tensor.detach().double().square().sum((0, 1))

        return see

    handles = [plain.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    plain.requires_grad_(criterion == "gradient")
    for batch in data:
        scores = plain(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        if criterion == "gradient":
            (-scores.gather(-1, batch["labels"][:, 1:, None]).sum()).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name in names:
        column, linear = name.endswith(COLUMNS), plain.get_submodule(name)
        norm = squares[name][0 if column else 1].sqrt()
        if criterion == "gradient":
            found[name] = linear.weight.grad.abs().sum(0 if column else 1)
        elif criterion == "weighted_activation":
            found[name] = norm * linear.weight.detach().abs().sum(0 if column else 1)
        else:
            found[name] = norm
    return found


def expected_units(criterion, unit, scope, largest) -> dict[str, list[int]]:
    modules, place, count, density = STRUCTURES[unit]
    names = [[f"model.layers.{block}.{place}.{module}" for module in modules] for block in range(2)]
    scores = unit_scores(tiny_llama().double(), [*names[0], *names[1]], criterion, batches())
    worth = [
        sum(scores[n].reshape(count, -1).sum(1) for n in of_block).tolist() for of_block in names
    ]  # of every block's structures
    pool = [(w, block, j) for block in range(2) for j, w in enumerate(worth[block])]
    pool.sort(reverse=largest)
    if scope == "model":
        best = pool[: int(density * len(pool))]
    else:
        best = [one for block in range(2) for one in [p for p in pool if p[1] == block][: int(density * count)]]
    taken = {}
    for block in range(2):
        js = sorted(j for _, b, j in best if b == block)
        for name in names[block]:
            size = len(scores[name]) // count
            taken[name] = [j * size + i for j in js for i in range(size)]
    return taken


@tiny.crossed(
    criterion=["activation", "weighted_activation", "gradient"],
    unit=STRUCTURES,
    scope=["model", "block"],
    largest=[True, False],
)
def test_structures_are_the_best_by_the_sum_over_their_rows_and_columns(criterion, unit, scope, largest):
    config = config_of(criterion, unit, scope, {"examples": 12, "largest": largest})
    model = chosen(config)
    expected = expected_units(criterion, unit, scope, largest)
    assert units_of(model) == expected
    written = model.peft_config["default"]
    assert tiny.units_of_sizes(written) == {name: len(units) for name, units in expected.items()}
    assert written.criterion.largest is largest
    assert not any(
        layer.sparse_lora_values["default"].any() for layer in adapter_layers(model) if layer.holds("default")
    )


def test_smallest_and_largest_entries_are_opposite_ends():
    config = make_config("sparse-entry", criterion={"type": "gradient", "largest": False, "examples": 12})
    model, plain = chosen(config), tiny_llama().double()
    for batch in batches():
        scores = plain(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        (-scores.gather(-1, batch["labels"][:, 1:, None]).sum()).backward()
    for name, units in units_of(model).items():
        gradient = plain.get_submodule(name).weight.grad.abs().reshape(-1)
        smallest = gradient.topk(len(units), largest=False).indices.tolist()
        assert len(set(units) & set(smallest)) >= 0.95 * len(units)  # fp32 rounds what is nearly zero


@pytest.mark.parametrize("criterion", ["activation", "weighted_activation", "gradient"])
def test_neither_batch_size_nor_padding_nor_passes_change_what_is_chosen(criterion):
    whole = units_of(chosen(config_of(criterion)))
    assert units_of(chosen(config_of(criterion), batches(1))) == whole
    assert units_of(chosen(config_of(criterion), accumulator_bytes=1)) == whole
    padded = []
    for batch in batches(3):
        wide = torch.nn.functional.pad
        padded.append(
            {
                "input_ids": wide(batch["input_ids"], (0, 4), value=5),
                "labels": wide(batch["labels"], (0, 4), value=-100),
                "attention_mask": wide(torch.ones_like(batch["labels"]), (0, 4)),
            }
        )
    assert units_of(chosen(config_of(criterion), padded)) == whole


def test_activations_need_no_labels_no_gradient_and_leave_no_trace():
    model = get_peft_model(tiny_llama(attention_dropout=0.5), config_of("activation"))
    model.train()
    modes = [module.training for module in model.modules()]
    bits = base_bits(model)
    grads = []

    def seen(module, args):
        grads.append(torch.is_grad_enabled())

    handle = model.base_model.model.model.layers[0].register_forward_pre_hook(seen)
    initialize_support(model, [{"input_ids": b["input_ids"]} for b in batches()], show_progress=False)
    handle.remove()
    assert grads
    assert not any(grads)
    assert [module.training for module in model.modules()] == modes
    assert same_bits(bits, base_bits(model))
    assert not any(layer._forward_hooks for layer in adapter_layers(model))
    assert units_of(model) == units_of(chosen(config_of("activation")))


def test_an_nf4_base_is_ranked_by_what_flows_through_it_and_keeps_its_bits(base_of):
    config = config_of("activation", scope="block")
    model = get_peft_model(base_of("nf4"), config)
    bits = base_bits(model)
    initialize_support(model, batches(), show_progress=False)
    assert same_bits(bits, base_bits(model))
    other = get_peft_model(base_of("nf4"), make_config("low_rank-entry", target_modules=FFN)).base_model.model
    names = [layer.module_name for layer in adapter_layers(other)]
    squares = dict.fromkeys(names, 0)

    def watch(name):
        def see(module, args, output):
            seen = args[0] if name.endswith("down_proj") else output
            squares[name] = squares[name] + seen.detach().double().square().sum((0, 1))

        return see

    for name in names:
        other.get_submodule(name).register_forward_hook(watch(name))
    for batch in batches():
        other(input_ids=batch["input_ids"])
    for block in range(2):
        worth = sum(squares[f"model.layers.{block}.mlp.{name}"].sqrt() for name in FFN)
        best = sorted(worth.topk(int(0.1 * INNER)).indices.tolist())
        assert units_of(model)[f"model.layers.{block}.mlp.up_proj"] == best


def test_sizes_of_the_whole_model_come_from_data_and_go_through_files(tmp_path):
    # Two structures of 256: some seed leaves a block without one.
    for seed in range(4):
        base = tiny_llama(seed)
        structures = [StructureConfig(["down_proj"], density=2 / (2 * INNER))]
        config = config_of("activation", structures=structures, target_modules=["down_proj"])
        model = chosen(copy.deepcopy(config), base=base, save_to=tmp_path / "s.safetensors")
        sizes = {name: len(units) for name, units in units_of(model).items()}
        assert sum(sizes.values()) == 2
        fill(model)
        before = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(seed), tmp_path / "adapter")), before)
        resumed = get_peft_model(tiny_llama(seed), copy.deepcopy(config))
        resumed.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)  # what Trainer does at a resume
        assert torch.equal(logits(resumed), before)
        assert tiny.units_of_sizes(resumed.peft_config["default"]) == sizes
        again = get_peft_model(tiny_llama(seed), copy.deepcopy(config))
        load_support(again, tmp_path / "s.safetensors")
        assert units_of(again) == units_of(model)
        if 0 in sizes.values():
            return
    pytest.fail("no seed left a module without a unit")


def test_other_modules_take_their_density_beside_structures():
    model = chosen(config_of("gradient", density=0.25, target_modules=[*FFN, "q_proj"]))
    units = units_of(model)
    plain = tiny_llama().double()
    name = "model.layers.0.self_attn.q_proj"
    best = unit_scores(plain, [name], "gradient", batches())[name].topk(HIDDEN // 4).indices.sort().values.tolist()
    assert units[name] == best
    assert sum(len(units[f"model.layers.{i}.mlp.up_proj"]) for i in range(2)) == int(0.1 * 2 * INNER)


def test_a_warm_up_chooses_structures_too():
    options = {"examples": 128, "warmup_steps": 2, "warmup_lr": 1e-3, "n_iterations": 2}
    units = units_of(chosen(config_of("delta_magnitude", scope="block", options=options)))
    for block in range(2):
        assert len({tuple(units[f"model.layers.{block}.mlp.{name}"]) for name in FFN}) == 1
        assert len(units[f"model.layers.{block}.mlp.up_proj"]) == int(0.1 * INNER)


def test_s2ft_takes_the_papers_strategies_by_name():
    def s2ft(**options):
        method = methods.get("s2ft", down=0.1, task_type="CAUSAL_LM", **options)
        model = get_peft_model(tiny_llama(), method.config)
        if method.config.needs_calibration:
            initialize_support(model, batches(), show_progress=False)
        return units_of(model)

    weights = {n: p.detach().double() for n, p in tiny_llama().named_parameters() if "down_proj" in n}
    names = [n.removesuffix(".weight") for n in weights]
    scores = {
        "magnitude": torch.cat([w.abs().sum(0) for w in weights.values()]),
        **{
            criterion: torch.cat(list(unit_scores(tiny_llama().double(), names, criterion, batches()).values()))
            for criterion in ("activation", "weighted_activation", "gradient")
        },
    }
    for criterion, worth in scores.items():
        for largest in (True, False):
            best = set(worth.topk(int(0.1 * 2 * INNER), largest=largest).indices.tolist())
            found = s2ft(criterion=criterion, largest=largest)
            assert {u + INNER * block for block, name in enumerate(names) for u in found[name]} == best


def test_strategies_that_cannot_be_carried_out_say_what_to_change():
    with pytest.raises(ValueError, match=r"largest=False turns a ranking round, and criterion='random'"):
        methods.get("s2ft", largest=False)
    with pytest.raises(ValueError, match=r"Activation.largest='no' is of the wrong type: it takes true or false"):
        config_of("activation", options={"largest": "no"})
    with pytest.raises(ValueError, match="criterion='given' takes units from outside, and structures choose them"):
        config_of("given", options={})
    with pytest.raises(ValueError, match="support_init='uniform' gives them values at injection"):
        config_of("activation", support_init="uniform")
    base = tiny_llama()
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.q_proj' is cut\s+into units of granularity 'entry'"
    ):
        get_peft_model(base, make_config("sparse-entry", criterion="activation"))
    assert not adapter_layers(base)
    model = get_peft_model(tiny_llama(), make_config("sparse-entry"))
    with pytest.raises(ValueError, match=r"q_proj' is cut.*granularity_pattern to 'column'"):
        initialize_support(model, batches(), "weighted_activation", show_progress=False)
    model = get_peft_model(tiny_llama(), config_of("random", options={}))
    with pytest.raises(ValueError, match=r"sizes\s+has fixed that already \(criterion='random'\)"):
        initialize_support(model, batches(), "activation", show_progress=False)
    model = get_peft_model(tiny_llama(), config_of("activation"))
    model.train()
    with pytest.raises(ValueError, match=r"initialize_support\(model, dataloader\).*callbacks_for\(model\)"):
        model(input_ids=tokens(), labels=tokens())
    broken = tiny_llama()
    broken.model.layers[0].mlp.up_proj.weight.data[3] = float("inf")
    with pytest.warns(UserWarning, match=r"says nothing about .*layers\.0\.mlp\.down_proj"):
        chosen(config_of("activation"), base=broken)


def test_a_block_wise_choice_by_data_may_replace_a_random_one():
    config = config_of("random", scope="block", options={})
    model = get_peft_model(tiny_llama(), config)
    initialize_support(model, batches(), "activation", max_examples=12, show_progress=False)
    assert units_of(model) == expected_units("activation", "channel", "block", True)
    assert model.peft_config["default"].criterion.part_type == "activation"
