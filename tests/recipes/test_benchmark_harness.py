"""`recipes/benchmarks/harness.py`: candidates are methods with options, and no row is measured twice; and the
sweep of `learning_by_name.py` in tiny form."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture(autouse=True)
def programs(monkeypatch):
    for folder in (BENCHMARKS.parent, BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(BENCHMARKS.parents[1])


@pytest.fixture
def new_rows(programs, tmp_path):
    from harness import Options, Rows

    return lambda steps=3, **options: Rows(Options(output=tmp_path, device="cpu", **options), "test", {"steps": steps})


def test_a_candidate_is_a_method_with_options_of_every_kind():
    from harness import build_method

    text = "shira:density=0.02,granularity=row,criterion={type: low_rank_magnitude, rank: $half}"
    config = build_method(text, {"half": 4}, seed=3, target_modules=["q_proj"], density=0.5).config
    assert (config.density, config.granularity, config.criterion.rank) == (0.02, "row", 4)
    assert (config.target_modules, config.seed) == ({"q_proj"}, 3)
    assert build_method("shira:seed=1", seed=3).config.seed == 1
    assert build_method("lora:r=2").config.peft_type == "LORA"
    assert build_method("houlsby", target_modules="all-linear").config.target_modules == {"o_proj", "down_proj"}
    assert build_method("houlsby:target_modules=[o_proj]", target_modules="all-linear").config.target_modules == {
        "o_proj"
    }
    with pytest.raises(ValueError, match="unknown"):
        build_method("no-such-method")


def test_every_named_candidate_is_one_that_the_package_takes():
    import learning_by_name
    import step_cost
    from harness import build_method

    numbers = {
        "rank": 4,
        "alpha": 8,
        "half": 2,
        "numbers": 400,
        "rest": 200,
        "sparsity": 0.9,
        "density": 0.05,
        "blocks": 8,
    }
    adapters = {name: text for name, text in step_cost.CANDIDATES.items() if text not in ("frozen", "full", "spiel")}
    moving = {name: step_cost.MOVING + step_cost.OURS[name].removeprefix("shira:") for name in step_cost.MOVED}
    rated = [(*one, name) for group in learning_by_name.GROUPS.values() for name, one in group.items()]
    assert all(len(set(rates)) == 3 for _, rates, _ in rated)
    own = {name: text for text, _, name in rated}
    for candidates in (adapters, moving, own):
        for text in candidates.values():
            assert build_method(text, numbers, target_modules=["q_proj"]).config.peft_type


def test_a_row_is_measured_once_in_each_setting_and_an_error_again(new_rows):
    assert new_rows().measure(lambda: {"score": 1}, candidate="a")["score"] == 1
    assert new_rows().measure(lambda: {"score": 2}, candidate="a")["score"] == 1
    assert new_rows().measure(lambda: {"score": 2}, candidate="b")["score"] == 2
    assert new_rows(steps=4).measure(lambda: {"score": 3}, candidate="a")["score"] == 3
    assert new_rows(again=True).measure(lambda: {"score": 4}, candidate="a")["score"] == 4
    assert new_rows().measure(lambda: 1 // 0, go_on=True, candidate="c")["error"].startswith("ZeroDivisionError")
    assert new_rows().measure(lambda: {"score": 5}, candidate="c")["score"] == 5
    with pytest.raises(ZeroDivisionError):
        new_rows().measure(lambda: 1 // 0, candidate="d")
    rows = json.loads(new_rows().path.read_text())["rows"]
    assert sorted(row["score"] for row in rows) == [2, 3, 4, 5]
    assert all(row["machine"]["threads"] >= 1 and row["machine"]["code"] for row in rows)


def test_each_small_method_has_rates_of_its_own(tmp_path, monkeypatch):
    import learning_by_name

    text, rates = learning_by_name.SMALL["svfit"]
    monkeypatch.setitem(learning_by_name.SMALL, "svfit", (text, rates[-1:]))
    sizes = ["--steps", "1", "--batch_size", "2", "--test_examples", "2", "--seeds", "0", "--output", str(tmp_path)]
    (best,) = learning_by_name.main([*sizes, "--group", "small", "--candidates", "svfit"])
    tried = [row["learning_rate"] for row in json.loads((tmp_path / "learning_by_name.json").read_text())["rows"]]
    assert tuple(tried) == (0.0, *learning_by_name.SMALL["svfit"][1])
    assert (best["candidate"], best["learning_rate"] in tried) == ("svfit", True)
    assert (tmp_path / "small_demo.png").exists()
