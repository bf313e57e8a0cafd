"""Several processes: bytes of a rank and collectives, as they are estimated, and as two gloo processes have them."""

import copy
import json
import socket
from pathlib import Path

import collectives_script
import processes
import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import estimate
from hf_sparse_peft.preflight.base_groups import base_groups
from hf_sparse_peft.preflight.communication import Traffic, buckets_of, ddp_buckets, move_traffic
from hf_sparse_peft.preflight.sharding import SHARDINGS
from hf_sparse_peft.rules.collectives import BUCKET, buckets
from hf_sparse_peft.tuners import adapter_layers

SCRIPT = Path(__file__).parent / "collectives_script.py"
MODEL = tiny.llama().config
ITEMSIZE = {"fp32": 4, "bf16": 2, "nf4": 2}


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """What both ranks counted; they must agree."""
    out = tmp_path_factory.mktemp("counted")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        processes.Started(SCRIPT, out, env={**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)
    ]
    for done in [process.wait(600) for process in started]:
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    failed = [
        text
        for text in (one["buckets"], one["moving over shards"], *one["moving"].values(), *one["fsdp2"].values())
        if isinstance(text, str)
    ]
    assert not failed, failed[0]
    return one


def expected(name: str) -> list[Traffic]:
    """By formula, of a model with weights."""
    config, base, accumulation = collectives_script.MOVING[name]
    model = get_peft_model(tiny.base(base), copy.deepcopy(config))
    (rule,) = config.rules
    spaces = [s for layer in adapter_layers(model) for s in layer.unit_spaces("default") if s.kind in rule.acts_on]
    found = move_traffic(rule, spaces, itemsize=ITEMSIZE[base], accumulation=accumulation)
    return [] if found is None else found


SENDING = ("accumulated", "accumulated-rows-bf16", "gradient", "gradient-bf16", "gradient-two-micro-batches",
           "gradient-candidates", "gradient-nf4", "low-rank", "allocate-kernel")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", collectives_script.MOVING)
def test_a_move_sends_what_the_formula_says_one_by_one(name, counted):
    found, told = counted["moving"][name], expected(name)
    assert bool(told) == (name in SENDING)
    told = sorted((one.collective, size) for one in told for size in one.sizes)
    if name == "allocate-kernel":  # at each of its allocations
        assert found["rules"]
        assert {tuple(one) for one in found["rules"]} == set(told)
    else:
        assert sorted(map(tuple, found["rules"])) == told


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in collectives_script.MOVING if name != "held"])
def test_and_something_moved(name, counted):
    assert counted["moving"][name]["events"]


@pytest.mark.slow
def test_ddp_sends_gradients_and_the_buffers_of_the_base_alone_at_every_step(counted):
    config = collectives_script.MOVING["accumulated"][0]
    told = estimate(MODEL, copy.deepcopy(config), bits=32, seq=collectives_script.SEQ, processes=2)
    traffic = {one.what: one for one in told.traffic}
    found = counted["moving"]["accumulated"]
    steps = collectives_script.STEPS
    assert found["buckets"] == [*traffic["gradients of adapters"].sizes] * steps
    assert [size for _, size in found["buffers"]] == [*traffic["buffers of the base"].sizes] * steps
    assert found["buffers of adapters"] > 10 * traffic["buffers of the base"].bytes
    own = [one for one in told.traffic if one.when == "move"]
    assert sorted(size for one in own for size in one.sizes) == sorted(size for _, size in found["rules"])


@pytest.mark.slow
def test_a_move_over_a_sharded_base_sends_the_same_beside_its_steps(counted):
    config = copy.deepcopy(collectives_script.MOVING["accumulated"][0])
    told = estimate(MODEL, config, bits=32, seq=collectives_script.SEQ, processes=2, sharding="fsdp2").traffic
    sums = [one for one in told if one.collective == "all_reduce"]
    expected = [size for one in sums for size in one.sizes * (collectives_script.STEPS if one.when == "step" else 1)]
    (names, checksums), found = counted["moving over shards"][:2], counted["moving over shards"][2:]
    assert names == ["all_reduce", 16]  # once, at the start: are adapters alike on all ranks
    assert checksums[0] == "all_reduce"
    assert sorted(size for name, size in found if name == "all_reduce") == sorted(expected)
    (gathered,) = [one for one in told if one.collective == "all_gather"]
    gathers = [size for name, size in found if name.startswith("all_gather")]
    assert sorted(gathers) == sorted(gathered.sizes * collectives_script.STEPS)
    assert len(found) == len(expected) + len(gathers)


@pytest.mark.slow
def test_ddp_closes_its_buckets_as_told(counted):
    assert counted["buckets"] == [*ddp_buckets([4 * size for size in collectives_script.SIZES])]
    assert len(counted["buckets"]) > 2


@pytest.mark.slow
@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_shards_kept_bytes_and_gathers_of_fsdp2_are_those_of_two_processes(base, counted):
    found = counted["fsdp2"][base]
    told = estimate(
        MODEL, collectives_script.sparse(target_modules="all-linear"), bits={"fp32": 32, "bf16": 16}[base],
        seq=collectives_script.SEQ, batch=collectives_script.BATCH, processes=2, sharding="fsdp2",
    )  # fmt: skip
    sizes = {part.name: part.bytes for part in told.parts}
    inv_freq = 4 * MODEL.hidden_size // MODEL.num_attention_heads // 2
    assert found["shards"] <= sizes["base weights"] <= found["shards"] + 2 * inv_freq
    assert told.saved == pytest.approx(found["saved"], rel=0.02)
    gathers = [size for name, size in found["collectives"] if name.startswith("all_gather")]
    (gathered,) = [one for one in told.traffic if one.collective == "all_gather"]
    assert sorted(gathers) == sorted(gathered.sizes)
    assert not [name for name, _ in found["collectives"] if "scatter" in name]  # nothing of the base trains


def told_of(sharding, processes=4, **options):
    options = {"bits": 16, "seq": 8, **options}
    return estimate(MODEL, "rigl", density=0.1, processes=processes, sharding=sharding, **options)


@pytest.fixture(scope="module")
def alone():
    return estimate(MODEL, "rigl", density=0.1, bits=16, seq=8)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_rank_holds_its_share_of_what_one_process_holds(sharding, alone):
    one, rank = ({part.name: part.bytes for part in told.parts} for told in (alone, told_of(sharding)))
    base = base_groups(tiny.llama(dtype=torch.bfloat16))
    whole = sum(group.bytes for group in base)
    share = 1 if sharding == "ddp" else 4
    assert one["base weights"] - rank["base weights"] == whole - whole // share
    if sharding == "zero3":
        assert rank["adapter values"] == pytest.approx(one["adapter values"] / 2 / 4, abs=2)
        assert rank["fp32 copies of values"] == pytest.approx(one["adapter values"] / 4, abs=4)
        assert rank["optimizer state"] == pytest.approx(one["optimizer state"] / 4, abs=1)
    else:
        assert rank["adapter values"] == one["adapter values"] == rank["buckets of collectives"]
        assert rank["optimizer state"] == one["optimizer state"]
    if sharding == "fsdp2":
        assert rank["gathered layers of the base"] == whole  # two layers and the root are all there is
    told = told_of(sharding)
    assert told.training == sum(part.bytes for part in told.parts)


def test_a_move_is_sent_as_many_bytes_whatever_the_number_of_ranks(alone):
    two, many = told_of("fsdp2", 2), told_of("fsdp2", 64)
    moves = [[one for one in told.traffic if one.when == "move"] for told in (two, many)]
    assert moves[0] == moves[1]
    assert not alone.traffic
    dense = next(one for one in moves[0] if one.what == "dense gradients")
    assert dense.sizes == tuple(2 * shape[0] * shape[1] for shape in _linear_shapes())
    assert dense.sent(2) == dense.bytes
    assert dense.sent(64) == int(2 * 63 / 64 * dense.bytes)


def _linear_shapes():
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for layer in tiny.llama().model.layers:
        modules = dict(layer.named_modules())
        for name in names:
            yield next(module.weight.shape for key, module in modules.items() if key.endswith(name))


def test_buckets_close_where_they_are_full():
    mib = 1 << 20
    assert ddp_buckets([10 * mib, 10 * mib, 20 * mib, mib // 2, mib // 2]) == (mib, 30 * mib, 10 * mib)
    assert buckets_of([(BUCKET, 4), (1, 4), (BUCKET - 1, 4), (2 * BUCKET, 8)]) == (4, 8, 8)
    assert ddp_buckets([]) == buckets_of([]) == ()


def test_sums_of_fsdp2_are_those_that_average_gradients_makes():
    numbers = [BUCKET - 5, 5, 1, BUCKET, 2 * BUCKET, 7]
    parameters = [torch.empty(number, device="meta") for number in numbers]
    found = [sum(one.nbytes for one in bucket) for bucket in buckets(parameters)]
    assert [*buckets_of([(one.numel(), one.nbytes) for one in parameters])] == found
    assert len(found) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes=0"),
        ({"processes": 2, "sharding": "fsdp1"}, "sharding='fsdp1' is unknown"),
        ({"processes": 1, "sharding": "fsdp2"}, "Set processes"),
        ({"processes": 2, "sharding": "fsdp2", "bits": 8}, "bits=8 with sharding='fsdp2'"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        estimate(MODEL, "lora", seq=8, **options)


def test_a_density_that_fits_a_rank_is_larger_where_the_base_is_sharded():
    from hf_sparse_peft.preflight.memory import RESERVE

    room = told_of("fsdp2", 8, seq=4).total + RESERVE
    told = estimate(MODEL, "shira", seq=4, fit=room, processes=8, sharding="fsdp2", optimizer="sgd")
    assert told.fits
