"""`recipes/benchmarks/learning.py`: the protocol, the rows, the tasks' halves, and one shipped row run again."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_ins
import torch

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
ROWS = BENCHMARKS / "learning_rows.jsonl"


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    for folder in (BENCHMARKS.parent, BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(BENCHMARKS.parents[1])


def measured(peak: float, tried: list):
    """Runs whose score falls with the distance from a rate."""

    def measure(rate: float, seed: int):
        tried.append((rate, seed))
        return {"learning_rate": rate, "seed": seed, "choose": -abs(math.log2(rate / peak)), "train_loss": 1.0}

    return measure


# The protocol


@pytest.mark.parametrize(("peak", "more"), [(4e-3, 0), (32e-3, 1), (64e-3, 2), (1.0, 3), (0.5e-3, 1)])
def test_a_sweep_has_seven_rates_and_goes_on_where_the_best_is_at_an_end(peak, more):
    from learning import sweep

    tried = []
    rows = list(sweep(measured(peak, tried), 4e-3, seeds=[5]))
    assert [row["learning_rate"] for row in rows] == [rate for rate, _ in tried]
    rates = sorted(rate for rate, _ in tried)
    assert len(rates) == 7 + more
    assert all(high / low == pytest.approx(2, rel=0.01) for low, high in itertools.pairwise(rates))


def test_other_seeds_run_at_the_best_rate_and_its_neighbours_only():
    from learning import sweep

    tried = []
    list(sweep(measured(8e-3, tried), 4e-3, seeds=[0, 1, 2]))
    assert [pair for pair in tried if pair[1]] == [(rate, seed) for rate in (4e-3, 8e-3, 16e-3) for seed in (1, 2)]


def test_other_seeds_run_on_where_their_mean_is_the_best_at_an_end():
    from learning import replicate

    def measure(rate: float, seed: int):
        tried.append((rate, seed))
        return {"choose": -abs(math.log2(rate / 1.0)), "train_loss": 1.0}

    tried, rates = [], (0.5, 1.0, 2.0, 4.0, 8.0)
    first = {rate: {"choose": 3.0 if rate == 4.0 else 0.0, "train_loss": 1.0} for rate in rates}
    list(replicate(measure, first, seeds=[0, 1, 2, 3]))
    assert [rate for rate, seed in tried if seed == 1] == [2.0, 4.0, 8.0, 1.0, 0.5]


def test_other_seeds_run_beyond_the_rates_that_were_tried_where_their_mean_is_the_best_there():
    from learning import replicate

    def measure(rate: float, seed: int):
        tried.append((rate, seed))
        return {"choose": -abs(math.log2(rate / 0.3)), "train_loss": 1.0}

    tried, chosen = [], {0.5: -0.7, 1.0: -0.6, 2.0: -3.0}
    first = {rate: {"choose": choose, "train_loss": 1.0} for rate, choose in chosen.items()}
    rows = list(replicate(measure, first, seeds=[0, 1]))
    assert len(rows) == len(tried)
    assert [rate for rate, seed in tried if seed == 1] == [0.5, 1.0, 2.0, 0.25, 0.125]
    assert [rate for rate, seed in tried if seed == 0] == [0.25, 0.125]


def test_what_does_not_train_a_four_bit_base_is_left_out_with_a_word():
    import learning

    options = learning.LearningOptions(bits="nf4")
    assert "4-bit" in learning.cannot_run("full", options)
    assert "4-bit" in learning.cannot_run("pissa:r=4", options)
    assert learning.cannot_run("lora:r=4", options) == ""


def test_a_rate_that_only_one_seed_likes_is_not_the_best():
    from learning_rows import Sweep

    rows = [
        {"learning_rate": rate, "seed": seed, "choose": choose, "score": score, "train_loss": 1.0}
        for rate, seed, choose, score in (
            (1.0, 0, 9.0, 1.0), (2.0, 0, 5.0, 2.0), (2.0, 1, 5.0, 4.0), (4.0, 0, 8.0, 3.0), (4.0, 1, 1.0, 9.0),
        )
    ]  # fmt: skip
    sweep = Sweep("a", rows)
    assert sweep.rate == 2.0
    assert sweep.column("score") == [2.0, 4.0]
    assert sweep.inner


def test_the_smooth_rate_is_the_lowest_point_of_a_parabola_in_log2():
    from learning_rows import Sweep

    def loss(rate):
        return 3 * (math.log2(rate) - math.log2(1.3)) ** 2 + 0.5

    rows = [
        {"learning_rate": rate, "seed": 0, "choose": -loss(rate), "train_loss": 1.0, "test_loss": loss(rate)}
        for rate in (0.25, 0.5, 1.0, 2.0, 4.0)
    ]
    assert Sweep("a", rows).smooth_rate == pytest.approx(1.3)


def test_differences_are_paired_by_seed():
    from learning_rows import Sweep, paired

    def sweep(name, scores):
        rows = [
            {"learning_rate": 1.0, "seed": seed, "choose": 0.0, "score": score, "train_loss": 1.0}
            for seed, score in scores.items()
        ]
        return Sweep(name, rows)

    mean, error = paired(sweep("a", {0: 10.0, 1: 20.0, 2: 33.0}), sweep("b", {2: 31.0, 1: 19.0, 0: 10.0}))
    assert (mean, error) == (pytest.approx(1.0), pytest.approx(1 / math.sqrt(3)))


def test_a_rate_that_more_seeds_chose_is_chosen_anew_on_the_seeds_that_are_compared():
    from learning_rows import Sweep, paired

    def sweep(name, by_rate):
        rows = [
            {"learning_rate": rate, "seed": seed, "choose": score, "score": score, "train_loss": 1.0}
            for rate, scores in by_rate.items()
            for seed, score in enumerate(scores)
        ]
        return Sweep(name, rows)

    three = sweep("three", {1.0: [30.0, 31.0, 32.0], 2.0: [10.0, 10.0, 10.0]})
    six = sweep("six", {1.0: [28.0] * 6, 2.0: [33.0] * 3 + [5.0] * 3})
    assert six.rate == 1.0
    assert paired(three, six)[0] == pytest.approx(-2.0)
    assert paired(six, three)[0] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="no seed in common"):
        paired(three, Sweep("other", [{**row, "seed": 9} for row in six.rows[:1]]))


def test_a_table_is_in_the_order_of_differences_since_seeds_differ():
    from learning_report import best_first
    from learning_rows import Sweep

    scores = {"lora": [10.0, 40.0], "second": [41.0], "first": [11.0], "both": [12.0, 43.0]}
    seeds = {"second": [1], "first": [0]}
    sweeps = {
        name: Sweep(
            name,
            [
                {"learning_rate": 1.0, "seed": seed, "choose": 0.0, "score": score, "train_loss": 1.0}
                for seed, score in zip(seeds.get(name, [0, 1]), found, strict=True)
            ],
        )
        for name, found in scores.items()
    }
    assert [sweep.name for sweep in best_first(sweeps)] == ["both", "second", "first", "lora"]
    del sweeps["lora"]
    assert [sweep.name for sweep in best_first(sweeps)] == ["second", "both", "first"]


def losses(steps: int, *found: float):
    from learning_runs import StopHopeless

    stop, control = StopHopeless(), SimpleNamespace(should_training_stop=False)
    for number, loss in enumerate(found):
        state = SimpleNamespace(global_step=(number + 1) * steps // 20, max_steps=steps)
        stop.on_log(None, state, control, {"loss": loss})
        if control.should_training_stop:
            break
    return stop.stopped_at


def test_only_runs_whose_mean_loss_of_a_quarter_rises_or_is_no_number_stop():
    assert losses(100, *[1.0] * 20) is None
    assert losses(100, 1.0, 3.0, *[0.7] * 18) is None  # warm-up
    assert losses(100, 1.0, 1.3, 1.3, 1.3, 1.3) is None
    assert losses(100, 1.0, 1.3, 1.3, 1.3, 1.3, 1.3, 1.3) == 30
    assert losses(100, 1.0, 0.9, math.nan) == 15


# Rows


def test_rows_are_measured_once_and_a_torn_line_is_no_row(tmp_path):
    from learning_rows import JsonLines

    path = tmp_path / "rows.jsonl"
    lines = JsonLines(path, {"steps": 3}, {"threads": 1})
    assert lines.measure(lambda: {"score": 1}, candidate="a", learning_rate=0.1, seed=0)["score"] == 1
    with path.open("a") as file:
        file.write('{"steps": 3, "candidate": "b", "sco')
    assert lines.measure(lambda: {"score": 2}, candidate="a", learning_rate=0.1, seed=0)["score"] == 1
    assert lines.measure(lambda: {"score": 3}, candidate="b", learning_rate=0.1, seed=0)["score"] == 3
    other = JsonLines(path, {"steps": 4}, {})
    assert other.measure(lambda: {"score": 4}, candidate="a", learning_rate=0.1, seed=0)["score"] == 4
    assert [row["score"] for row in lines.read()] == [1, 3, 4]
    again = JsonLines(path, {"steps": 3}, {}, again=True)
    assert again.measure(lambda: {"score": 5}, candidate="a", learning_rate=0.1, seed=0)["score"] == 5
    assert sorted(row["score"] for row in lines.read()) == [3, 4, 5]


def test_bases_of_one_name_and_other_weights_are_cases_of_their_own(tmp_path):
    from learning_rows import JsonLines, cases, weights_of

    assert weights_of("meta-llama/Llama-3.2-1B") == ""
    path, digests = tmp_path / "rows.jsonl", []
    setting = {"task": "e2e", "bits": "fp32", "steps": 3, "batch_size": 2, "rank": 4, "examples": 8}
    for score in (1, 2):
        (tmp_path / "model.safetensors").write_bytes(bytes([score]))
        digests.append(weights_of(tmp_path))
        lines = JsonLines(path, {**setting, "test_examples": 8, "base": "english", "weights": digests[-1]}, {})
        row = lines.measure(lambda score=score: {"score": score}, candidate="a", method="a", learning_rate=0.1, seed=0)
        assert row["score"] == score
    assert digests[0] != digests[1]
    assert len(cases(lines.read())) == 2


def test_a_row_comes_out_again_from_the_command_that_it_names(tmp_path):
    import learning
    from learning_rows import JsonLines, command_of

    (row,) = JsonLines(Path(__file__).with_name("learning_row.jsonl"), {}, {}).read()
    words = command_of(row)
    found = learning.main([*words[2:], "--device", "cpu", "--threads", "1", "--output", str(tmp_path)])
    assert len(found) == 1
    assert {key: found[0][key] for key in row if key not in ("machine", "seconds")} == {
        key: pytest.approx(value, rel=1e-3) if isinstance(value, float) else value
        for key, value in row.items()
        if key not in ("machine", "seconds")
    }


def test_the_command_of_every_shipped_row_asks_for_its_case():
    import harness
    import learning
    from learning_rows import SETTING, JsonLines, command_of

    rows = JsonLines(ROWS, {}, {}).read()
    assert len(rows) >= 600
    for row in rows:
        options = harness.parse(learning.LearningOptions, "", command_of(row)[2:])
        learning.fill_in_sizes(options)
        assert learning.setting_of(options) == {name: row[name] for name in SETTING}
        assert (options.candidates, options.rates, options.seeds) == (
            [row["candidate"]], [row["learning_rate"]], [row["seed"]],
        )  # fmt: skip
        assert learning.find(row["candidate"]).text == row["method"]
        assert ("DATA" in command_of(row)) == (row["task"] in ("e2e", "cola", "sst2"))


def test_tables_and_pictures_are_made_of_rows(tmp_path):
    from learning_report import frontier, main

    text = main(["--rows", str(ROWS), "--output", str(tmp_path)])
    assert "minus LoRA" in text
    assert (tmp_path / "learning.md").read_text() == text
    assert len(list(tmp_path.glob("*.png"))) == text.count("![") > 3
    assert frontier({"a": (1.0, 5.0), "b": (2.0, 4.0), "c": (3.0, 6.0), "d": (1.0, 1.0)}) == ["a", "c"]


# Tasks


def options_of(task: str, **given):
    import learning

    options = learning.LearningOptions(task=task, device="cpu", **given)
    learning.fill_in_sizes(options)
    return options


def sums_of(text: str) -> list[tuple[int, str, int]]:
    """The two sums of a problem: what there is, sign, change."""
    start, *changes = [int(word) for word in text.split() if word.isdigit()]
    found = []
    for sentence, change in zip(text.split(" . ")[1:3], changes, strict=True):
        sign = "+" if any(word in sentence for word in ("buys", "finds", "gets", "wins")) else "-"
        found.append((start, sign, change))
        start += change if sign == "+" else -change
    return found


def test_halves_share_nothing_and_no_sum_of_the_test_is_trained():
    import demo_data
    from learning_hub_tasks import TASKS

    task = TASKS["words"](options_of("words", test_examples=40, examples=200))
    one, other = ({tuple(row["input_ids"]) for row in half} for half in task.test)
    assert len(one) == len(other) == 20
    assert not one & other
    train, test = (
        {triple for text in demo_data.word_problems(300, split=split, changes=2)["prompt"] for triple in sums_of(text)}
        for split in ("train", "test")
    )
    assert len(train) > 100
    assert len(test) > 40
    assert not train & test


def test_a_base_has_no_divergence_from_itself_and_exact_match_counts_whole_answers():
    from learning_hub_tasks import TASKS

    task = TASKS["words"](options_of("words", test_examples=8))
    model = task.model()
    found = task.score(model)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["score"] == 0

    class Right(torch.nn.Module):
        """Says the right token at every place but one row's first."""

        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 640).float() * 50
            logits[0] = 0.0
            return SimpleNamespace(logits=logits)

    assert task._figures(Right(), task.test[0])[0] == 75.0


def test_the_second_task_is_scored_with_the_first_one_after_it(tmp_path):
    import learning

    words = ["--task", "two-tasks", "--steps", "2", "--batch_size", "2", "--examples", "20", "--test_examples", "8"]
    more = ["--candidates", "lora", "--rates", "4e-3", "--seeds", "0", "--device", "cpu", "--output", str(tmp_path)]
    (row,) = learning.main([*words, *more])
    assert row["score"] == (row["first_after"] + row["second"]) / 2
    assert row["kl"] > 0


@pytest.mark.parametrize("task", ["gsm8k", "metamath", "commonsense"])
def test_tasks_of_the_hub_run_on_stand_ins(task, tmp_path, monkeypatch):
    import datasets
    import learning

    monkeypatch.setattr(datasets, "load_dataset", stand_ins.load_dataset)
    stand_ins.MODELS["meta-llama/Llama-3.2-1B"](tmp_path / "base")
    sizes = ["--steps", "2", "--batch_size", "2", "--rank", "2", "--examples", "8", "--test_examples", "4"]
    more = ["--rates", "1e-3", "--seeds", "0", "--device", "cpu", "--output", str(tmp_path)]
    base = ["--base", str(tmp_path / "base"), "--candidates", "lora"]
    (row,) = learning.main(["--task", task, *sizes, *more, *base])
    assert row["base"] == "base"
    assert 0 <= row["score"] <= 100
    assert math.isfinite(row["kl"])
    assert math.isfinite(row["held_out_loss"])


def test_test_rows_of_a_data_set_with_one_split_are_kept_from_training(monkeypatch, tmp_path):
    import datasets
    from learning_hub_tasks import TASKS

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, c=None, *, split: stand_ins.load_dataset(name, c, split=split)
    )
    stand_ins.MODELS["meta-llama/Llama-3.2-1B"](tmp_path)
    task = TASKS["commonsense"](options_of("commonsense", base=str(tmp_path), test_examples=8))
    train, test = ({row["prompt"] for row in task.pairs(100, split, 3)} for split in ("train", "test"))
    assert (len(train), len(test)) == (32, 8)
    assert not train & test


def test_real_data_is_asked_for_by_the_options_name():
    from learning_hub_tasks import TASKS

    with pytest.raises(SystemExit, match="--encoder"):
        TASKS["cola"](options_of("cola"))
    with pytest.raises(SystemExit, match="--base"):
        TASKS["e2e"](options_of("e2e"))
    with pytest.raises(SystemExit, match="--data"):
        TASKS["e2e"](options_of("e2e", base="english"))


def test_a_new_head_learns_at_a_rate_of_its_own():
    from learning_runs import with_head_rate
    from transformers import TrainingArguments

    task = SimpleNamespace(head=["classifier"], head_rate=0.125)
    model = torch.nn.ModuleDict({"modules_to_save": torch.nn.Linear(2, 2), "rest": torch.nn.Linear(2, 2)})
    args = TrainingArguments("runs", learning_rate=0.5, weight_decay=0.25, use_cpu=True)
    own = torch.optim.SGD([{"params": list(model.parameters()), "momentum": 0.5}], lr=0.5)
    for optimizer in (None, own):
        groups = with_head_rate(optimizer, model, args, task).param_groups
        assert [(group["lr"], len(group["params"])) for group in groups] == [(0.5, 2), (0.125, 2)]
    assert own.param_groups[1]["momentum"] == 0.5
    assert with_head_rate(None, model["rest"], args, task) is None


def test_every_candidate_is_one_that_the_package_takes():
    from harness import build_method
    from learning_candidates import CANDIDATES

    numbers = {
        "rank": 4, "alpha": 8, "half": 2, "double": 8, "more": 6, "blocks": 16, "numbers": 400, "rest": 200,
        "low": 1, "high": 3, "high_rest": 300, "share": 0.2, "every": 5, "fifth": 10, "middle": 25,
        "sparsity": 0.99,
    }  # fmt: skip
    for name, candidate in CANDIDATES.items():
        if name != "full":
            assert build_method(candidate.text, numbers, target_modules=["q_proj"]).config.peft_type
