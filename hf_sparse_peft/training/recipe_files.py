"""The options of a run in a YAML file, overridden by a command line, as dataclasses whose values were checked.

(recipe, args) = parse_recipe((RecipeArguments, TrainingArguments), ["run.yaml", "learning_rate=1e-4"])
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser

from ..utils.option_types import check_value, fits

EXTENDS = "extends"
"""Key of a file whose options hold where a file has none of its own; a path beside it."""
_SUFFIXES = (".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, a key once in a mapping; in those of `SafeLoader`, 1.1's, `1e-2` is a string, `no` false."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
for _tag, _form, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", rf"[-+]?{_DIGITS}", "-+0123456789"),
    ("float", rf"[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_form})$"), list(_first))


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is ten


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ValueError(f"the key {key.value!r} is there twice, again in line {key.start_mark.line + 1}.")
        seen.add(key.value)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read_yaml(text: str) -> Any:
    """What YAML text holds, by the scalars of YAML 1.2: `1e-2` is a float, `no` and `on` are strings, `010` is ten.

    Raises:
        ValueError: it is no YAML, or has a key twice in one mapping.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"this is no YAML: {error}") from error


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file and in those that it `extends`; its own come first, nested mappings key by key.

    Raises:
        ValueError: no such file, no mapping of names to values, a circle of files.
    """
    return _read(Path(path), ())


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    place = path.resolve()
    if place in readers:
        raise ValueError(f"'{path}' extends itself: {' -> '.join(f.name for f in (*readers, place))}.")
    if not path.is_file():
        raise ValueError(f"There is no file '{path}'. Give the path of a YAML file.")
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}': {error}") from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"'{path}' holds {type(found).__name__}. It takes lines of `option: value`.")
    if EXTENDS not in found:
        return found
    below = found.pop(EXTENDS)
    check_value(below, str, f"'{path}': {EXTENDS}")
    return merged(_read(path.parent / below, (*readers, place)), found)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`; mappings in both are merged key by key, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def read_overrides(words: Sequence[str]) -> dict[str, str]:
    """Options from a command line, as they were written: `name=value`, `--name=value`, `--name value` or, for true,
    `--name`; hyphens in names are underscores, `adapter.r=4` is the option `r` of the mapping `adapter`.

    Raises:
        ValueError: a word that is none of these.
    """
    found, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise ValueError(f"{word!r} is no option. Write {word}=VALUE, or --{word} VALUE.")
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found[name.replace("-", "_")] = value
    return found


def parse_recipe(
    types: Iterable[type], words: Sequence[str], *, default: str | Path | None = None, below: Mapping[str, Any] = {}
) -> tuple[Any, ...]:
    """An object of each dataclass in `types`, from a YAML file and what a command line puts over it.

    A key belongs to the dataclass that has a field of that name, as in `transformers.HfArgumentParser.parse_dict`, and
    its value must be of the field's annotated type. A field that takes a dict may stand for another object's options
    (`checked_options`). `--help` prints all options.

    Args:
        types: dataclasses; a name that several have goes to all of them.
        words: the command line: the file, if any, then overrides as `read_overrides` takes them.
        default: the file where `words` name none; None: no file.
        below: values that hold where neither file nor overrides have one.

    Raises:
        ValueError: names the file or the override, the key and what is accepted: unknown keys, with those that are
            alike; values of another type; what `read_recipe` refuses.
        SystemExit: after `--help`.
    """
    types, words = tuple(types), list(words)
    if {"-h", "--help"} & set(words):
        HfArgumentParser(types).print_help()
        raise SystemExit(0)
    path = Path(words.pop(0)) if words and words[0].endswith(_SUFFIXES) and "=" not in words[0] else default
    hints = {name: hint for one in types for name, hint in _options(one).items()}
    options = {} if path is None else read_recipe(path)
    _check(options, hints, "" if path is None else f"'{path}': ")
    for name, text in read_overrides(words).items():
        first, *inner = name.split(".")
        _check_names([first], hints, "")
        value = read_value(text, Any if inner else hints[first], name)
        for key in reversed(inner):
            value = {key: value}
        options = merged(options, {first: value})
        check_value(options[first], hints[first], first)
    return HfArgumentParser(types).parse_dict({**below, **options})


def read_value(text: str, accepted: Any, name: str) -> Any:
    """The value that one word of a command line stands for: what YAML reads, or the word where only that fits.

    Raises:
        ValueError: neither is what `accepted` takes.
    """
    value = _yaml_or_text(text)
    try:
        check_value(value, accepted, name)
    except ValueError:
        if not fits(text, accepted):
            raise
        return text
    return value


def checked_options(options: Mapping[str, Any], cls: type, where: str) -> dict[str, Any]:
    """`options` for a dataclass that is made later, `cls(**options)`: names are checked, values by the class itself.

    Raises:
        ValueError: names `where`, the unknown key, and those that are alike.
    """
    _check_names(options, _options(cls), f"{where}: ")
    return dict(options)


def _options(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _check(options: Mapping[str, Any], hints: Mapping[str, Any], where: str) -> None:
    _check_names(options, hints, where)
    for name, value in options.items():
        check_value(value, hints[name], f"{where}{name}")


def _check_names(names: Iterable[str], known: Mapping[str, Any], where: str) -> None:
    for name in names:
        if name not in known:
            alike = difflib.get_close_matches(name, known, n=3)
            mend = f"Did you mean {' or '.join(alike)}?" if alike else f"Known are {', '.join(sorted(known))}."
            raise ValueError(f"{where}there is no option {name!r}. {mend}")


def _yaml_or_text(text: str) -> Any:
    try:
        return read_yaml(text)
    except ValueError:
        return text
