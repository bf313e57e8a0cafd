"""What a run costs on many ranks: bytes a rank holds, what ranks send per step and per move, and how long moves take.

Models of 1B, 8B, 70B and a mixture of experts of 400B are built on the meta device from their configs; nothing is
loaded. Times are those of gloo on this machine, measured with two and four processes, and simulated for more:

    python recipes/benchmarks/distributed_costs.py --page docs/scaling.md

Parts, which are measured once each: memory (minutes of one core: every model takes a step on the meta device), gloo.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gloo_costs import fit, measure_gloo, noise_of, simulated_move
from harness import Column, Options, Rows, markdown, option, parse
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from hf_sparse_peft import AccumulatedGradient, AgedAdamWSpec, Linear, Regrow, SparseLoraConfig
from hf_sparse_peft.preflight.base_groups import BaseGroup
from hf_sparse_peft.preflight.communication import Traffic, step_traffic
from hf_sparse_peft.preflight.dry_run import DryRun, dry_run
from hf_sparse_peft.preflight.meta_base import meta_base
from hf_sparse_peft.preflight.sharding import BUCKETS, GATHERED, SHARDINGS, per_rank

GIB, MIB = 1 << 30, 1 << 20
LLAMA = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
MODELS: dict[str, PretrainedConfig] = {
    "1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True, **LLAMA,
    ),
    "8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, head_dim=128,
        tie_word_embeddings=False, **LLAMA,
    ),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, head_dim=128,
        tie_word_embeddings=False, **LLAMA,
    ),
    "400B MoE": Qwen3MoeConfig(
        hidden_size=5120, intermediate_size=12288, moe_intermediate_size=2048, num_hidden_layers=98, num_experts=128,
        num_experts_per_tok=8, num_attention_heads=64, num_key_value_heads=8, head_dim=128, vocab_size=151936,
        tie_word_embeddings=False, max_position_embeddings=40960,
    ),
}  # fmt: skip
"""Shapes of Llama 3.2 1B, Llama 3.1 8B and 70B; Qwen3-MoE's architecture, widened from 235B to 400B."""
NUMBERS_USED = {"400B MoE": 8 / 128}
"""Share of the experts' numbers that a token passes through."""
FLOPS, NETWORK = 400e12, 50e9
"""Assumed, not measured: bf16 operations a second of one GPU, and bytes a second that it sends (400 Gb/s)."""


@dataclass
class CostOptions(Options):
    """Options of `distributed_costs.py`."""

    models: list[str] = option(list(MODELS), "models to estimate")
    bits: list[int] = option([16, 4], "how their linear layers are stored")
    ranks: list[int] = option([8, 64, 512], "ranks to estimate and simulate")
    seq: int = option(2048, "tokens of the one sequence of a rank's step")
    density: float = option(0.01, "of the supports, over all linear layers")
    every: int = option(100, "steps between moves")
    steps: int = option(5, "steps in which gradients of candidates are added up")
    rounds: int = option(25, "repetitions of each collective that is timed")
    largest: int = option(16 * MIB, "bytes of the largest collective that is timed")
    draws: int = option(5, "simulations of each collective")
    page: Path | None = option(None, "page whose tables, between their marks, are written anew")


# Bytes


def followed(name: str, bits: int, options: CostOptions) -> dict[str, Any]:
    """One process's step of a model, as numbers from which every rank's follow."""
    move = Regrow(every=options.every, grow=AccumulatedGradient(steps=options.steps), fraction=Linear(0.2, 0.0))
    config = SparseLoraConfig(
        r=0, density=options.density, target_modules="all-linear", schedule=[move], optimizer=AgedAdamWSpec(),
        task_type="CAUSAL_LM",
    )  # fmt: skip
    found = dry_run(
        meta_base(MODELS[name], bits, config), config, batch=1, seq=options.seq, gradient_checkpointing=True
    )
    return {"found": dataclasses.asdict(found)}


def restored(row: dict[str, Any]) -> DryRun:
    """The `DryRun` of a row."""
    found = dict(row["found"])
    groups = [{**one, "tensors": tuple(map(tuple, one["tensors"]))} for one in found["groups"]]
    found["groups"] = tuple(BaseGroup(**one) for one in groups)
    found["trained"] = tuple(map(tuple, found["trained"]))
    found["moves"] = tuple(Traffic(**{**one, "sizes": tuple(one["sizes"])}) for one in found["moves"])
    return DryRun(**found)


def memory_lines(rows: list[dict[str, Any]], options: CostOptions) -> list[dict[str, Any]]:
    """Bytes of a rank, a line for each model, form of the base and sharding."""
    lines = []
    for row in rows:
        found, hidden = restored(row), MODELS[row["model"]].hidden_size
        for sharding in SHARDINGS:
            line = {"model": row["model"], "bits": row["bits"], "sharding": sharding}
            for ranks in options.ranks:
                one = per_rank(found, sharding, ranks, bits=row["bits"], hidden=hidden)
                line[f"total {ranks}"] = one.training_peak
                line[f"base {ranks}"] = one.at_rest["weights"] + one.at_rest["constants"]
            line["adapter"] = one.at_rest["values"] + one.at_rest["indices"] + one.at_rest["rule_state"]
            line["adapter"] += one.at_rest.get("masters", 0)
            line["optimizer"] = one.optimizer_bytes
            line["gathered"] = one.at_rest.get(GATHERED, 0)
            line["buckets"] = one.at_rest[BUCKETS]
            line["step"] = sum(one.at_peak.values()) + one.at_move
            lines.append(line)
    return lines


def traffic_lines(rows: list[dict[str, Any]], options: CostOptions) -> list[dict[str, Any]]:
    """What a rank of the fewest ranks sends in a step and in a move, and what a step could hide."""
    lines, ranks = [], options.ranks[0]
    for row in rows:
        found = restored(row)
        used = found.base_numbers * _used(row["model"], found)
        compute = 6 * used * options.seq / FLOPS  # forward, again for checkpoints, and gradients of inputs: 2 each
        for sharding in SHARDINGS:
            step = step_traffic(sharding, found.groups, found.trained, found.buffers, 2)
            moves = list(found.moves) if sharding != "zero3" else []
            sent = sum(one.sent(ranks) for one in step)
            moved = sum(one.sent(ranks) for one in moves)
            lines.append(
                {
                    "model": row["model"], "bits": row["bits"], "sharding": sharding,
                    "collectives": sum(one.count for one in step), "sent": sent,
                    "adapter": sum(one.sent(ranks) for one in step if "adapter" in one.what),
                    "base": sum(one.sent(ranks) for one in step if one.what.startswith("base")),
                    "move_collectives": sum(one.count for one in moves) or None, "moved": moved or None,
                    "moved_a_step": moved / options.every or None,
                    "compute": compute, "network": sent / NETWORK, "move_seconds": moved / NETWORK or None,
                    "tokens": math.ceil(sent / NETWORK / (6 * used / FLOPS)),
                }
            )  # fmt: skip
    return lines


def _used(name: str, found: DryRun) -> float:
    if name not in NUMBERS_USED:
        return 1.0
    config = MODELS[name]
    experts = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts * config.num_hidden_layers
    return 1 - experts * (1 - NUMBERS_USED[name]) / found.base_numbers


# Pages

GB = "{:.1f}"


def tables(rows: Rows, options: CostOptions) -> dict[str, str]:
    """The page's tables, by the name of their marks."""
    steps = sorted(rows.of("step"), key=lambda row: ([*MODELS].index(row["model"]), -row["bits"]))
    return {
        "memory": _memory_table(memory_lines(steps, options), options),
        "traffic": _traffic_table(traffic_lines(steps, options)),
        **_gloo_tables(rows, steps, options),
    }


def _memory_table(lines: list[dict[str, Any]], options: CostOptions) -> str:
    def gib(key: str):
        return lambda line: line[key] / GIB if line[key] else None

    totals = [Column(f"**all, {ranks} ranks**", gib(f"total {ranks}"), GB) for ranks in options.ranks]
    base = [Column(f"base, {ranks} ranks", gib(f"base {ranks}"), GB) for ranks in options.ranks[:1]]
    return markdown(
        [
            Column("model", "model"), Column("base in", lambda line: "bf16" if line["bits"] == 16 else "NF4"),
            Column("sharding", "sharding"), *base, Column("gathered", gib("gathered"), GB),
            Column("adapter", gib("adapter"), GB), Column("optimizer", gib("optimizer"), GB),
            Column("buckets", gib("buckets"), GB), Column("a step's own", gib("step"), GB), *totals,
        ],
        lines,
    )  # fmt: skip


def _traffic_table(lines: list[dict[str, Any]]) -> str:
    def mib(key: str):
        return lambda line: line[key] / MIB if line[key] else None

    return markdown(
        [
            Column("model", "model"), Column("base in", lambda line: "bf16" if line["bits"] == 16 else "NF4"),
            Column("sharding", "sharding"), Column("collectives", "collectives"),
            Column("base, MiB", mib("base"), "{:,.0f}"), Column("adapter, MiB", mib("adapter"), "{:,.0f}"),
            Column("collectives of a move", "move_collectives"), Column("of a move, MiB", mib("moved"), "{:,.0f}"),
            Column("a step, s", "network", "{:.2f}"), Column("computing, s", "compute", "{:.2f}"),
            Column("hidden from tokens", "tokens", "{:,}"), Column("a move, s", "move_seconds", "{:.2f}"),
        ],
        lines,
    )  # fmt: skip


def _gloo_tables(rows: Rows, steps: list[dict[str, Any]], options: CostOptions) -> dict[str, str]:
    measured = [(row["ranks"], one) for row in rows.of("gloo", rounds=options.rounds) for one in row["times"]]
    if not measured:
        return {}
    lines, fits = [], {}
    for collective in ("all_reduce", "broadcast"):
        fits[collective] = fitted = fit(measured, collective)
        median, largest = fitted.residual
        lines.append({"collective": collective, "start": 1e6 * fitted.start, "latency": 1e6 * fitted.latency,
                      "speed": 1e-9 / fitted.seconds_a_byte if fitted.seconds_a_byte else None,
                      "median": median, "largest": largest})  # fmt: skip
    fitted = markdown(
        [
            Column("collective", "collective"), Column("start, us", "start", "{:.0f}"),
            Column("a message, us", "latency", "{:.0f}"), Column("GB/s", "speed", "{:.2f}"),
            Column("error, median", "median", "{:.0%}"), Column("error, largest", "largest", "{:.0%}"),
        ],
        lines,
    )  # fmt: skip
    points = [
        {
            "collective": one["collective"], "ranks": ranks, "KiB": one["bytes"] // 1024,
            "fastest": 1e3 * min(one["seconds"]),
            "median": 1e3 * statistics.median(one["seconds"]),
            "model": 1e3 * fits[one["collective"]].seconds(one["collective"], ranks, one["bytes"]),
        }
        for ranks, one in measured
    ]  # fmt: skip
    points_table = markdown(
        [
            Column("collective", "collective"), Column("ranks", "ranks"), Column("KiB", "KiB", "{:,}"),
            Column("fastest, ms", "fastest", "{:.2f}"), Column("median, ms", "median", "{:.2f}"),
            Column("model, ms", "model", "{:.2f}"),
        ],
        points,
    )  # fmt: skip
    noise, moves = noise_of(measured, "all_reduce"), []
    for row in steps:
        found = restored(row)
        if row["bits"] != options.bits[0]:
            continue
        for ranks in options.ranks:
            formula, calm, noisy = simulated_move(fits["all_reduce"], noise, ranks, list(found.moves), options.draws)
            latency = sum(one.count for one in found.moves) * 2 * (ranks - 1) * fits["all_reduce"].latency
            moves.append({"model": row["model"], "ranks": ranks, "formula": formula, "calm": calm, "noisy": noisy,
                          "latency": latency / formula if formula else None})  # fmt: skip
    simulated = markdown(
        [
            Column("model", "model"), Column("ranks", "ranks"), Column("formula, s", "formula", "{:.1f}"),
            Column("of it latency", "latency", "{:.0%}"),
            Column("simulated, noise of 20 %, s", "calm", "{:.1f}"), Column("measured noise, s", "noisy", "{:.0f}"),
        ],
        moves,
    )  # fmt: skip
    return {"gloo fit": fitted, "gloo points": points_table, "simulated moves": simulated}


def write_page(page: Path, found: dict[str, str]) -> None:
    """Put each table between its marks, `<!-- name -->` and `<!-- /name -->`."""
    text = page.read_text(encoding="utf-8")
    for name, made in found.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        if begin in text and end in text:
            head, rest = text.split(begin, 1)
            text = head + begin + made + end + rest.split(end, 1)[1]
    page.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Measure what is missing, and write the tables."""
    options = parse(CostOptions, __doc__, argv)
    setting = {"seq": options.seq, "density": options.density, "every": options.every, "steps": options.steps}
    rows = Rows(options, "distributed_costs", setting)
    for name in options.models:
        for bits in options.bits:
            rows.measure(lambda name=name, bits=bits: followed(name, bits, options), part="step", model=name, bits=bits)
    for ranks in (2, 4):
        key = {"rounds": options.rounds, "largest": options.largest}
        rows.measure(
            lambda ranks=ranks: measure_gloo(ranks, options.largest, options.rounds), part="gloo", ranks=ranks, **key
        )
    found = tables(rows, options)
    for name, made in found.items():
        print(f"\n{name}\n\n{made}")
    if options.page:
        write_page(options.page, found)


if __name__ == "__main__":
    main(sys.argv[1:])
