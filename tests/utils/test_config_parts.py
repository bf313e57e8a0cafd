"""Parts of a config: round trips through JSON, unknown ones, registration from outside."""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from hf_sparse_peft import Prune, Rule, SparseLoraConfig
from hf_sparse_peft.sparsity import Cosine, Curve, Linear, Window
from hf_sparse_peft.utils.parts import Part, UnknownPart, load_part, part_types, register_part


@dataclass(frozen=True)
class Dish(Part):
    part_kind: ClassVar[str] = "dish"


@register_part("soup")
@dataclass(frozen=True)
class Soup(Dish):
    heat: Curve | float = 0.5
    spices: tuple[str, ...] = ()
    courses: tuple[Dish, ...] = ()


@pytest.mark.parametrize(
    "part",
    [
        Soup(),
        Soup(heat=Linear(0.2, 0.0)),
        Soup(heat=Window(Cosine(1.0, 0.1), 0.2, 0.8), spices=("salt",)),
        Soup(courses=(Soup(0.1), Soup(Cosine(0.3, 0.0)))),
    ],
    ids=str,
)
def test_a_part_comes_back_equal_from_json_at_any_depth(part):
    assert load_part(Dish, json.loads(json.dumps(part.to_dict())), "menu") == part
    assert hash(load_part(Dish, part.to_dict(), "menu")) == hash(part)


def test_what_is_at_its_default_is_not_in_the_file():
    assert Soup().to_dict() == {"type": "soup"}
    assert Soup(heat=Linear(0.2, 0.0)).to_dict() == {
        "type": "soup",
        "heat": {"type": "linear", "start": 0.2, "end": 0.0},
    }
    assert Prune(0.25).to_dict() == {"type": "prune", "final_fraction": 0.25}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"type": "stew", "of": [1]}, "'stew' is not registered"),
        ({"type": "soup", "bowl": 3}, r"Soup has no option \['bowl'\]"),
        ({"type": "soup", "heat": {"type": "sawtooth", "teeth": 5}}, "'sawtooth' is not registered"),
        ({"type": "soup", "courses": [{"type": "soup"}, {"type": "pie"}]}, "'pie' is not registered"),
    ],
    ids=["type", "option", "nested type", "type in a list"],
)
def test_an_unknown_part_is_kept_as_it_was_and_says_why(data, reason):
    found = load_part(Dish, data, "menu")
    assert isinstance(found, UnknownPart)
    assert found.to_dict() == data
    assert re.search(reason, found.reason)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, r"menu=3 is not understood.*Soup"),
        ({"heat": 1.0}, "'type'"),
        ({"type": "soup", "heat": "hot"}, "Soup.heat='hot' is unknown"),
        ({"type": "soup", "heat": float("nan")}, "Soup.heat=nan"),
        ({"type": "soup", "spices": [1]}, "Soup.spices"),
        (Prune(), "menu=Prune"),
    ],
    ids=["number", "without a type", "name of no curve", "nan", "wrong item", "another kind"],
)
def test_what_is_no_such_part_is_refused_by_the_name_of_the_option(value, words):
    with pytest.raises(ValueError, match=words):
        load_part(Dish, value, "menu")


def test_a_name_is_a_part_with_its_defaults():
    assert load_part(Dish, "soup", "menu") == Soup()


def test_a_name_is_taken_once_and_only_by_a_frozen_dataclass_of_a_kind():
    with pytest.raises(ValueError, match=r"dish 'soup' is taken by .*Soup"):

        @register_part("soup")
        @dataclass(frozen=True)
        class Other(Dish):
            pass

    with pytest.raises(TypeError, match="no frozen dataclass"):

        @register_part("loose")
        class Loose(Dish):
            pass

    with pytest.raises(TypeError, match="is no part"):
        register_part("nothing")(int)
    with pytest.raises(ValueError, match="lower case"):
        register_part("Big-Soup")
    assert part_types(Dish) == {"soup": Soup}
    assert "prune" in part_types(Rule)


@pytest.mark.parametrize("given", ["numbers", {"type": "numbers"}])
def test_a_part_that_lacks_an_option_without_default_says_which(given):
    with pytest.raises(ValueError, match=r"budget=.*numbers.* is incomplete: Numbers has no default for \['numbers'\]"):
        SparseLoraConfig(r=0, budget=given)


def test_a_low_rank_half_that_is_multiplied_by_zero_is_refused():
    with pytest.raises(ValueError, match="lora_alpha=0 multiplies the low-rank half by 0"):
        SparseLoraConfig(r=4, lora_alpha=0)
    SparseLoraConfig(r=0, lora_alpha=0, density=0.1)
