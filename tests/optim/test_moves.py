"""Moves: the state of a unit follows it bit for bit, and what cannot follow is refused before anything is written."""

import gc
import warnings

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_a_group_of_one
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers.optimization import Adafactor

from hf_sparse_peft.optim import AgedAdamW, SparseSM3, adam_seeds, move_optimizer_state, move_rows, use_32bit_states
from hf_sparse_peft.optim import moves as moves_module
from hf_sparse_peft.utils.tensors import whole

OLD, NEW = torch.tensor([0, 2, 3, 5]), torch.tensor([2, 0, 4, 5])  # overlapping, with a swap; 1 and 3 are new


class Lion(torch.optim.Optimizer):
    """A minimal optimizer with one moment and no step."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.sub_(self.param_groups[0]["lr"] * torch.sign(0.9 * m + 0.1 * p.grad))
            m.mul_(0.99).add_(p.grad, alpha=0.01)


FAMILIES = {
    "adam": lambda p: torch.optim.Adam(p, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw-amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, centered=True, momentum=0.9),
    "adafactor-torch": torch.optim.Adafactor,
    "adafactor-transformers": lambda p: Adafactor(p, lr=1e-3, relative_step=False, scale_parameter=False, beta1=0.9),
    "lion": Lion,
    "aged": lambda p: AgedAdamW(p, per_unit_age=True),
    "sm3-momentum": lambda p: SparseSM3(p, momentum=0.9),
    "bnb-adamw-32bit": bnb.optim.AdamW32bit,
    "bnb-lion-8bit-small-stays-32bit": bnb.optim.Lion8bit,
    "bnb-ademamix-32bit": lambda p: bnb.optim.AdEMAMix(p, optim_bits=32),
}


def stepped(make, shape=(6,), steps=3, dtype=torch.float32):
    """A parameter and its optimizer after `steps` steps with random gradients."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    optimizer = make([p])
    for _ in range(steps):
        p.grad = torch.randn(shape, generator=generator).to(dtype)
        optimizer.step()
    return p, optimizer


def expected(before, old=OLD, new=NEW):
    after = torch.zeros_like(before)
    for i, j in zip(old.tolist(), new.tolist(), strict=True):
        after[j] = before[i]
    return after


def snapshot(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


@st.composite
def a_move(draw):
    k = draw(st.integers(1, 12))
    n = draw(st.integers(0, k))
    old = draw(st.permutations(range(k)))[:n]
    new = draw(st.permutations(range(k)))[:n]
    return k, torch.tensor(old, dtype=torch.int64), torch.tensor(new, dtype=torch.int64)


DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool)


@settings(max_examples=60, deadline=None)
@given(a_move(), st.sampled_from([(), (3,), (2, 2)]), st.sampled_from(DTYPES))
def test_move_rows_puts_every_kept_row_where_it_belongs_even_when_ranges_overlap(move, tail, dtype):
    k, old, new = move
    tensor = torch.randint(0, 200, (k, *tail)).to(dtype)
    want, address = expected(tensor, old, new), tensor.data_ptr()
    move_rows(tensor, old, new)
    assert torch.equal(tensor, want)
    assert tensor.data_ptr() == address


@settings(max_examples=40, deadline=None)
@given(a_move(), st.sampled_from([(), (3,)]), st.sampled_from(["adam", "aged", "sgd-momentum"]))
def test_a_move_never_mixes_the_state_of_two_units(move, tail, family):
    k, old, new = move
    p, optimizer = stepped(FAMILIES[family], (k, *tail))
    before = snapshot(optimizer.state[p])
    move_optimizer_state(optimizer, p, old, new)
    for name, value in optimizer.state[p].items():
        if isinstance(value, torch.Tensor) and value.dim():
            assert torch.equal(value, expected(before[name], old, new)), name


def test_move_rows_fills_new_rows_and_takes_parameters_and_non_contiguous_views():
    p = torch.nn.Parameter(torch.arange(6.0))
    move_rows(p, OLD.int(), NEW.int(), fill=-1)
    assert p.tolist() == [2, -1, 0, -1, 3, 5]
    assert p.requires_grad
    assert p.grad_fn is None
    wide = torch.arange(12.0).view(2, 6)
    want = expected(wide.t().clone())
    move_rows(wide.t(), OLD, NEW)
    assert torch.equal(wide.t(), want)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 6), (6, 3, 2)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_per_unit_state_follows_its_unit_in_place_and_training_goes_on(family, shape):
    p, optimizer = stepped(FAMILIES[family], shape)
    state = optimizer.state[p]
    before, identity = snapshot(state), {k: id(v) for k, v in state.items()}
    move_optimizer_state(optimizer, p, OLD, NEW)
    moved = 0
    for name, value in state.items():
        assert id(value) == identity[name] or not isinstance(value, torch.Tensor), f"{name} was replaced"
        if not isinstance(value, torch.Tensor):
            assert value == before[name]
        elif value.shape == (2, *shape):
            assert torch.equal(value, torch.stack([expected(half) for half in before[name]])), name
            moved += 1
        elif value.dim() == 0 or (len(shape) == 2 and ("col" in name or name == "sm3_dim1")):
            assert torch.equal(value, before[name]), f"{name} belongs to no unit"
        elif not (name.startswith("sm3_dim") and name != "sm3_dim0"):
            assert torch.equal(value, expected(before[name])), name
            moved += 1
    assert moved
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_adafactor_keeps_the_column_factor_also_when_the_matrix_is_square(dim):
    p, optimizer = stepped(FAMILIES["adafactor-transformers"], (6, 6))
    name = ("exp_avg_sq_row", "exp_avg_sq_col")[dim]
    before = optimizer.state[p][name].clone()
    move_optimizer_state(optimizer, p, OLD, NEW)
    assert torch.equal(optimizer.state[p][name], before if dim else expected(before))


def test_moving_units_twice_back_and_forth_trains_as_if_nothing_happened():
    runs = []
    for moved in (False, True):
        p, optimizer = stepped(FAMILIES["aged"])
        if moved:
            there, back = torch.arange(6), torch.tensor([3, 1, 5, 0, 2, 4])
            for a, b in ((there, back), (back, there)):
                move_rows(p, a, b)
                move_optimizer_state(optimizer, p, a, b)
        p.grad = torch.linspace(-1, 1, 6)
        optimizer.step()
        runs.append(p.detach().clone())
    assert torch.equal(*runs)


def test_accelerates_wrapper_is_looked_through():
    p, optimizer = stepped(FAMILIES["adamw-foreach"])
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    before = optimizer.state[p]["exp_avg"].clone()
    move_optimizer_state(wrapped, p, OLD, NEW)
    assert torch.equal(optimizer.state[p]["exp_avg"], expected(before))


def test_a_move_before_the_first_step_leaves_no_trace():
    p, optimizer = stepped(FAMILIES["adamw-fused"], steps=0)
    move_optimizer_state(optimizer, p, OLD, NEW)
    assert len(optimizer.state) == 0


def test_state_dict_of_a_moved_optimizer_resumes_to_the_same_bits(tmp_path):
    p, optimizer = stepped(FAMILIES["adamw-fused"])
    move_optimizer_state(optimizer, p, OLD, NEW)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    q = torch.nn.Parameter(p.detach().clone())
    resumed = FAMILIES["adamw-fused"]([q])
    resumed.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for x, o in ((p, optimizer), (q, resumed)):
        x.grad = torch.linspace(-1, 1, 6)
        o.step()
    assert torch.equal(p, q)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_seeded_units_start_from_spiels_moments_and_age():
    p, optimizer = stepped(FAMILIES["aged"])
    g, g2, a = torch.tensor([0.5, -2.0]), torch.tensor([1.0, 5.0]), 7
    move_optimizer_state(optimizer, p, OLD, NEW, seeded=adam_seeds(g, g2, a), seeded_new=torch.tensor([3, 1]))
    state = optimizer.state[p]
    at = [3, 1]
    assert state["step"][at].tolist() == [7, 7]
    assert torch.allclose(state["exp_avg"][at].double(), g.double() * (1 - 0.9**7), rtol=1e-6)
    assert torch.allclose(state["exp_avg_sq"][at].double(), g2.double() * (1 - 0.999**7), rtol=1e-6)
    assert state["step"][NEW].tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("age", [1, 5, 1000])
def test_bias_correction_gives_the_candidates_means_back(age):
    g, g2 = torch.randn(50), torch.rand(50)
    seeds = adam_seeds(g, g2, age)
    assert torch.allclose(seeds["exp_avg"].double() / (1 - 0.9**age), g.double(), rtol=1e-6)
    assert torch.allclose(seeds["exp_avg_sq"].double() / (1 - 0.999**age), g2.double(), rtol=1e-6)


def test_the_first_step_of_a_seeded_unit_is_as_if_its_candidate_gradients_had_been_steps():
    # Constant gradient c: the corrected moments are c and c^2 at every age, so the step is exactly lr.
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = AgedAdamW([p], lr=0.1, weight_decay=0.0, per_unit_age=True)
    p.grad = torch.tensor([1.0, 1.0, 1.0])
    optimizer.step()
    seeds = adam_seeds(torch.tensor([0.3]), torch.tensor([0.09]), 5)
    keep = torch.tensor([0, 1])
    move_optimizer_state(optimizer, p, keep, keep, seeded=seeds, seeded_new=torch.tensor([2]))
    move_rows(p, keep, keep)
    p.grad = torch.tensor([1.0, 1.0, 0.3])
    optimizer.step()
    assert p[2].item() == pytest.approx(-0.1, rel=1e-5)


def test_seeds_of_a_matrix_of_units_have_one_age_per_unit():
    p, optimizer = stepped(FAMILIES["aged"], (6, 4))
    seeds = adam_seeds(torch.ones(2, 4), torch.ones(2, 4), torch.tensor([2.0, 9.0]))
    move_optimizer_state(optimizer, p, OLD, NEW, seeded=seeds, seeded_new=torch.tensor([1, 3]))
    assert optimizer.state[p]["step"].tolist() == [3, 2, 3, 9, 3, 3]


@pytest.mark.parametrize("family", ["adamw-fused", "bnb-adamw-32bit"])
def test_a_scalar_step_drops_seeded_ages_with_exactly_one_warning(family):
    moves_module._warn_once.cache_clear()
    p, optimizer = stepped(FAMILIES[family])
    step = optimizer.state[p]["step"]
    arguments = {"seeded": adam_seeds(torch.ones(1), torch.ones(1), 5), "seeded_new": torch.tensor([1])}
    with pytest.warns(UserWarning, match="one scalar step"):
        move_optimizer_state(optimizer, p, OLD, NEW, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        move_optimizer_state(optimizer, p, OLD, NEW, **arguments)
    assert optimizer.state[p]["step"] == step
    name = "state1" if family.startswith("bnb") else "exp_avg"
    assert optimizer.state[p][name][1].item() == pytest.approx(1 - 0.9**5)


def test_seeds_before_the_first_step_are_not_dropped_in_silence():
    moves_module._warn_once.cache_clear()
    p, optimizer = stepped(FAMILIES["aged"], steps=0)
    with pytest.warns(UserWarning, match="no state before its first step"):
        move_optimizer_state(
            optimizer, p, OLD, NEW, seeded=adam_seeds(torch.ones(1), torch.ones(1), 1), seeded_new=torch.tensor([1])
        )


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ([0, 1], [0], "equal lengths"),
        ([0, 6], [0, 1], "outside 0..5"),
        ([0, 1], [-1, 1], "outside 0..5"),
        ([1, 1], [0, 1], "kept_old names a unit twice"),
        ([0, 1], [1, 1], "kept_new names a unit twice"),
        ([[0]], [[0]], "1-D"),
        ([0.0], [0.0], "1-D int64"),
    ],
)
def test_bad_positions_are_refused_before_anything_moves(old, new, message):
    p, optimizer = stepped(FAMILIES["adam"])
    before = snapshot(optimizer.state[p])
    for call in (lambda *a: move_optimizer_state(optimizer, p, *a), lambda *a: move_rows(p, *a)):
        with pytest.raises(ValueError, match=message):
            call(torch.tensor(old), torch.tensor(new))
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[p].items())


@pytest.mark.parametrize(
    ("seeded", "at", "message"),
    [
        ({"exp_avg": torch.ones(1)}, [2], "either kept or new"),
        ({"exp_avg": torch.ones(2)}, [1], "has shape"),
        ({"momentum": torch.ones(1)}, [1], "keeps \\['exp_avg'"),
        ({"exp_avg": torch.ones(1)}, [7], "outside"),
        ({"exp_avg": torch.ones(1)}, None, "go together"),
    ],
)
def test_bad_seeds_are_refused_before_anything_moves(seeded, at, message):
    p, optimizer = stepped(FAMILIES["adam"])
    before = snapshot(optimizer.state[p])
    at = None if at is None else torch.tensor(at)
    with pytest.raises(ValueError, match=message):
        move_optimizer_state(optimizer, p, OLD, NEW, seeded=seeded, seeded_new=at)
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[p].items())


def test_8bit_state_is_refused_with_the_mend_and_the_mend_works():
    p, optimizer = stepped(bnb.optim.AdamW8bit, (4096,), steps=1)
    assert optimizer.state[p]["state1"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"8-bit.*use_32bit_states"):
        move_optimizer_state(optimizer, p, OLD, NEW)

    def with_override(params):
        use_32bit_states(params)
        return bnb.optim.AdamW8bit(params)

    p, optimizer = stepped(with_override, (4096,), steps=1)
    before = optimizer.state[p]["state1"].clone()
    assert before.dtype == torch.float32
    move_optimizer_state(optimizer, p, OLD, NEW)
    assert torch.equal(optimizer.state[p]["state1"], expected(before))


def test_the_32bit_override_reaches_only_the_named_parameters():
    named, other = (torch.nn.Parameter(torch.zeros(5000)) for _ in range(2))
    use_32bit_states(p for p in [named])
    optimizer = bnb.optim.Adam8bit([other, named])
    named.grad, other.grad = torch.ones(5000), torch.ones(5000)
    optimizer.step()
    assert optimizer.state[named]["state1"].dtype == torch.float32
    assert optimizer.state[other]["state1"].dtype == torch.uint8
    with pytest.raises(ValueError, match="holds a str"):
        use_32bit_states(["lora_A"])


def test_the_32bit_override_dies_with_its_parameter():
    manager = bnb.optim.GlobalOptimManager.get_instance()
    parameter = torch.nn.Parameter(torch.zeros(5000))
    number = id(parameter)
    use_32bit_states(parameter)
    assert number in manager.pid2config
    del parameter
    gc.collect()
    assert number not in manager.pid2config


def test_state_of_an_unknown_shape_is_named_and_nothing_moves():
    p, optimizer = stepped(FAMILIES["adam"])
    before = optimizer.state[p]["exp_avg"].clone()
    optimizer.state[p]["projection"] = torch.zeros(6, 2)
    with pytest.raises(ValueError, match=r"'projection'.*\(6, 2\)"):
        move_optimizer_state(optimizer, p, OLD, NEW)
    optimizer.state[p]["projection"] = [torch.zeros(6)]
    with pytest.raises(ValueError, match=r"'projection'.*list of tensors"):
        move_optimizer_state(optimizer, p, OLD, NEW)
    assert torch.equal(optimizer.state[p]["exp_avg"], before)
    del optimizer.state[p]["projection"]
    optimizer.state[p]["unknown_but_of_the_parameters_shape"] = before.clone()
    move_optimizer_state(optimizer, p, OLD, NEW)
    assert torch.equal(optimizer.state[p]["unknown_but_of_the_parameters_shape"], expected(before))


def test_a_replaced_parameter_is_refused_not_skipped():
    p, optimizer = stepped(FAMILIES["adam"])
    with pytest.raises(ValueError, match=r"does not hold this parameter.*replaced"):
        move_optimizer_state(optimizer, torch.nn.Parameter(p.detach().clone()), OLD, NEW)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [("ds_id", 3, "ZeRO"), ("_hp_mapping", object(), "ZeRO")],
)
def test_partitioned_parameters_are_refused_with_the_mend(attribute, value, message):
    p, optimizer = stepped(FAMILIES["adam"])
    setattr(p, attribute, value)
    with pytest.raises(ValueError, match=f"{message}.*DDP"):
        move_optimizer_state(optimizer, p, OLD, NEW)


def test_a_deepspeed_optimizer_is_refused_also_inside_a_wrapper():
    p, optimizer = stepped(FAMILIES["adam"])
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    inner = kind()
    inner.param_groups, inner.state, inner.optimizer = optimizer.param_groups, {}, optimizer
    wrapper = type("Wrapper", (), {})()
    wrapper.optimizer = inner
    for level in (inner, wrapper):
        with pytest.raises(ValueError, match=r"DeepSpeedZeroOptimizer.*DDP"):
            move_optimizer_state(level, p, OLD, NEW)


class Adapted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.base = torch.nn.Linear(4, 4)
        self.values = torch.nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.base(x).sum() + (self.values * x.sum()).sum()


@pytest.mark.parametrize("sharded", [True, False])
@in_a_group_of_one
def test_state_of_fsdp2_moves_sharded_or_ignored(sharded):
    """On one rank; `tests/training/test_ranks.py` has several."""
    model = Adapted()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)), ignored_params=set() if sharded else {model.values})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.ones(2, 4)).backward()
    optimizer.step()
    state = optimizer.state[model.values]["exp_avg"]
    assert (type(state) is not torch.Tensor) == sharded
    before = whole(state).clone()
    move_optimizer_state(optimizer, model.values, OLD, NEW)
    assert torch.equal(whole(state), expected(before))
    before = whole(model.values.detach()).clone()
    move_rows(model.values, OLD, NEW)
    assert torch.equal(whole(model.values.detach()), expected(before))


@pytest.mark.filterwarnings("ignore:FSDP is switching")
@pytest.mark.parametrize("use_orig_params", [True, False])
@in_a_group_of_one
def test_fsdp1_flat_parameters_are_refused_with_the_mend(use_orig_params):
    cpu, mesh = torch.device("cpu"), init_device_mesh("cpu", (1,))
    model = FullyShardedDataParallel(Adapted(), use_orig_params=use_orig_params, device_id=cpu, device_mesh=mesh)
    p = next(iter(model.parameters()))
    with pytest.raises(ValueError, match=r"FSDP1.*DDP"):
        move_optimizer_state(torch.optim.AdamW(model.parameters()), p, OLD, NEW)


def test_a_scalar_parameter_has_no_units():
    p, optimizer = stepped(FAMILIES["adam"], ())
    with pytest.raises(ValueError, match="no units"):
        move_optimizer_state(optimizer, p, OLD, NEW)
    with pytest.raises(ValueError, match="no rows"):
        move_rows(p, OLD, NEW)
