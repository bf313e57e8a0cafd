"""Ranges of options stand in their annotations: every one is enforced, in every part and config of the package."""

import copy
import pickle
import pydoc
from dataclasses import MISSING, fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
from peft import PeftConfig

import hf_sparse_peft
from hf_sparse_peft import (
    KernelLoraConfig,
    Prune,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructureConfig,
    StructuredConfig,
)
from hf_sparse_peft.rules import AlternateModules
from hf_sparse_peft.sparsity import ByModule, Density, Linear
from hf_sparse_peft.utils import parts
from hf_sparse_peft.utils.option_docs import Option, options_of
from hf_sparse_peft.utils.option_types import Range, check_value, described

CONFIGS = (KernelLoraConfig, SparseLoraConfig, SpectralLoraConfig, StructuredConfig)
NEEDED = {
    "end": 1.0,
    "groups": {"q_proj": 4},
    float: 0.5,
    int: 1,
    str: "x",
    "curve": Linear(1.0, 0.0),
    "budget": Density(0.5),
}
"""What fields without a default are given, by name, type or kind of part."""


def own_parts():
    here = hf_sparse_peft.__name__
    return [cls for cls in parts._PARTS.values() if cls.__module__.startswith(here)]


def bounds(hint, wrap=lambda value: value):
    """(a value just outside of a bound or no member of a `Literal`, what the bound is) for all in an annotation."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        step = 1 if inner[0] is int else 0.001
        for limit in (one for one in inner[1:] if isinstance(one, Range)):
            for name, outside in (("least", -step), ("above", 0), ("most", step), ("below", 0)):
                bound = getattr(limit, name)
                if bound is not None:
                    yield wrap(inner[0](bound + outside)), f"{name}={bound}"
    elif origin is Literal:
        if all(isinstance(one, str) for one in inner):
            yield wrap("no such choice"), "choices"
        else:
            yield wrap(max(inner) + 1), "choices"
    elif origin is dict:
        yield from bounds(inner[1], lambda value: wrap({"a": value}))
    elif origin is tuple and inner[-1] is not Ellipsis:
        inside = [1 if int in (one, *get_args(one)) else 0.5 for one in inner]
        for at, one in enumerate(inner):
            yield from bounds(one, lambda value, at=at: wrap((*inside[:at], value, *inside[at + 1 :])))
    elif origin in (list, tuple):
        yield from bounds(inner[0], lambda value: wrap((value,)))
    else:
        for one in inner:
            yield from bounds(one, wrap)


def options_for(cls):
    found, hints = {}, get_type_hints(cls)
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING:
            hint = hints[field.name]
            kind = next((one.part_kind for one in (hint, *get_args(hint)) if hasattr(one, "part_kind")), hint)
            given = {} if get_origin(hint) is dict else NEEDED.get(kind)
            found[field.name] = NEEDED.get(field.name, given)
    return found


def cases():
    for cls in (*own_parts(), *CONFIGS):
        for name, hint in get_type_hints(cls, include_extras=True).items():
            if name in {field.name for field in fields(cls)} and name not in ("peft_type", "task_type"):
                for value, bound in bounds(hint):
                    yield pytest.param(cls, name, value, id=f"{cls.__name__}.{name}:{bound}")


@pytest.mark.parametrize(("cls", "name", "value"), cases())
def test_a_value_outside_of_a_declared_bound_is_refused_by_name(cls, name, value):
    with pytest.raises(ValueError, match=rf"^{cls.__name__}\.{name}=.* is out of range: it takes "):
        cls(**{**options_for(cls), name: value})


@pytest.mark.parametrize("cls", own_parts(), ids=lambda cls: f"{cls.part_kind}-{cls.part_type}")
def test_every_part_hashes_and_is_copied_and_pickled_as_itself(cls):
    part = cls(**options_for(cls))
    for other in (cls(**options_for(cls)), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert other == part
        assert hash(other) == hash(part)
    assert {part: 1}[copy.copy(part)] == 1


def test_dicts_in_parts_do_not_change_and_leave_the_files_as_they_were():
    given = {"q_proj": 0.1}
    budget = ByModule(given)
    given["q_proj"] = 0.2
    assert budget == ByModule({"q_proj": 0.1})
    assert len({budget, ByModule({"q_proj": 0.1}), ByModule({"q_proj": 0.2})}) == 2
    assert type(budget.to_dict()["densities"]) is dict
    with pytest.raises(TypeError, match="does not change"):
        budget.densities["q_proj"] = 0.2
    assert AlternateModules().to_dict() == {"type": "alternate_modules"}
    assert AlternateModules(categories={"a": ["x"]}).to_dict()["categories"] == {"a": ["x"]}


@pytest.mark.parametrize(
    ("accepted", "words"),
    [
        (Annotated[int, Range(least=1)], "an integer >= 1"),
        (Annotated[float, Range(above=0)] | None, "a number > 0 or None"),
        (Annotated[float, Range(above=0, most=1)], "a number in (0, 1]"),
        (Annotated[float, Range(least=0, below=1)], "a number in [0, 1)"),
        (Annotated[int, Range(most=8)], "an integer <= 8"),
        (Annotated[float, Range(below=0)], "a number < 0"),
        (dict[str, Annotated[float, Range(least=0, most=1)]], "a dict of a string -> a number in [0, 1]"),
        (list[Annotated[int, Range(least=1)]], "a list of integers >= 1"),
        (
            tuple[Annotated[float, Range(least=0, below=1)], Annotated[float, Range(least=0, below=1)]],
            "2 numbers in [0, 1)",
        ),
        (Literal["a", "b"], "'a' or 'b'"),
        (Literal["a", "b", "c"], "one of ['a', 'b', 'c']"),
        (float, "a finite number"),
    ],
    ids=str,
)
def test_errors_say_a_range_in_words(accepted, words):
    assert described(accepted) == words


def test_a_value_is_of_the_wrong_type_before_it_is_out_of_range():
    hint = Annotated[int, Range(least=1)] | None
    check_value(None, hint, "x")
    check_value(1, hint, "x")
    for value in (1.0, "1", True):
        with pytest.raises(ValueError, match=r"^x=.* is of the wrong type: it takes an integer >= 1 or None\.$"):
            check_value(value, hint, "x")
    with pytest.raises(ValueError, match=r"^x=0 is out of range: it takes an integer >= 1 or None\.$"):
        check_value(0, hint, "x")


@pytest.mark.parametrize("cls", [*own_parts(), *CONFIGS], ids=lambda cls: cls.__name__)
def test_every_option_has_one_description_that_help_texts_can_read(cls):
    found = options_of(cls)
    upstreams = {field.name for field in fields(PeftConfig)}
    assert [option.name for option in found] == [field.name for field in fields(cls) if field.init]
    assert not [option.name for option in found if not option.description and option.name not in upstreams]


@pytest.mark.parametrize("cls", [SparseLoraConfig, Prune, StructureConfig, hf_sparse_peft.sparsity.Fisher])
def test_help_shows_every_option_with_type_default_and_description(cls):
    text = " ".join(pydoc.plain(pydoc.render_doc(cls)).replace("|", " ").split())
    for option in options_of(cls):
        default = "required" if option.default is MISSING else f"default {option.default!r}"
        said = f"{option.name} ({option.accepts}; {default}): {option.description}"
        assert " ".join(said.replace("|", " ").split()) in text
    assert cls.__doc__.count("Args:") == 1


def test_help_keeps_the_errors_behind_the_options():
    text = SparseLoraConfig.__doc__
    assert text.startswith("Configuration of a sparse + low-rank adapter")
    assert text.index("Args:") < text.index("Raises:")


def test_options_are_described_as_they_stand_in_the_class():
    assert options_of(Prune)[0] == Option(
        "final_fraction", "a number in (0, 1]", 0.5,
        "Fraction of the injected units that lives at the end: a density d ends as `final_fraction * d`.",
    )  # fmt: skip
    inherited = {option.name: option for option in options_of(hf_sparse_peft.sparsity.Fisher)}
    assert inherited["examples"].description.startswith("Examples that the statistic is estimated from (FISH")
    assert inherited["largest"].description == "False chooses the units that rank lowest."
    assert options_of(Density)[0].default is MISSING
