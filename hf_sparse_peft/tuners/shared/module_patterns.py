"""Regular expressions over module names, which may come from an adapter's config: none of them may run for ever.

Two guards, because upstream matches some options with `re`, which cannot be stopped: expressions whose matching can
take exponential time are refused when a config is made, and matching here is by `regex`, with a limit on the time.
"""

from __future__ import annotations

import math
import re
import time
from functools import cached_property, lru_cache
from typing import Any

import regex

try:
    from re import _parser  # Python 3.11 and later
except ImportError:
    import sre_parse as _parser

LONGEST_PATTERN = 10_000
MOST_CHOICES = 32.0
"""Choices, in bits, that one way through an expression may hold: a repeat counts as 5 (where it ends in a name), an
optional part as 1, b alternatives as log2(b). Six times `.*` fits."""
SECONDS = 1.0
"""Time that matching the names of one option may take beyond what harmless expressions take."""
_HARMLESS = 2e-3
_EXACT_NAME = re.compile(r"\^[\w.\-]+")  # what compact() and combinations write, one for each module


def check_pattern(pattern: str, field: str) -> None:
    """Refuse what is no regular expression, or one that can take exponential time.

    Raises:
        ValueError: names `field` and the pattern.
    """
    if len(pattern) <= LONGEST_PATTERN and _EXACT_NAME.fullmatch(pattern):
        return
    shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(
            f"{field}: the pattern '{shown}' has {len(pattern)} characters; at most {LONGEST_PATTERN} are "
            "matched. Give the module names as a list."
        )
    try:
        parsed = _parser.parse(pattern)
        re.compile(pattern)
        regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{field}: '{shown}' is no valid regular expression: {error or type(error).__name__}. Mend it, or give "
            "the module names as a list."
        ) from error
    reason = _dangerous(parsed)
    if reason:
        raise ValueError(
            f"{field}: the pattern '{shown}' {reason}, so that matching a name may never end. Write it without, or "
            "give the module names as a list."
        )


def matches(pattern: str, module_name: str, field: str) -> bool:
    """Whether `pattern` matches the whole name.

    Raises:
        ValueError: it takes too long; names `field` and the pattern.
    """
    return _patterns((pattern,), field, whole=True).first(module_name) is not None


def pattern_key(patterns: dict[str, Any], module_name: str, field: str) -> str | None:
    """The first key of `patterns` that matches the end of the name in whole parts, as upstream's `get_pattern_key`
    does, or None.

    Raises:
        ValueError: it takes too long; names `field` and the pattern.
    """
    return _patterns(tuple(patterns), field, whole=False).first(module_name) if patterns else None


@lru_cache(maxsize=256)
def _patterns(keys: tuple[str, ...], field: str, whole: bool) -> _Patterns:
    return _Patterns(keys, field, whole)


class _Patterns:
    """Compiled once for all modules: 5,000 patterns of a mixture of experts are more than `re` remembers."""

    def __init__(self, keys: tuple[str, ...], field: str, whole: bool) -> None:
        self.keys, self.field, self.whole, self.spent = keys, field, whole, 0.0
        self.exact = set(keys) if not whole and all(_EXACT_NAME.fullmatch(key) for key in keys) else set()

    @cached_property
    def compiled(self) -> list[tuple[str, Any]]:
        form = "{}" if self.whole else r"(?:.*\.)?(?:{})$"
        return [(key, regex.compile(form.replace("{}", key))) for key in self.keys]

    def first(self, module_name: str) -> str | None:
        """The first key that matches this module, an exact one before all others; None: none does."""
        if f"^{module_name}" in self.exact:
            return f"^{module_name}"
        for key, compiled in self.compiled:
            match = compiled.fullmatch if self.whole else compiled.match
            begin = time.thread_time()
            try:
                found = match(module_name, timeout=SECONDS)
            except TimeoutError:
                found, self.spent = None, SECONDS
            took = time.thread_time() - begin
            self.spent += took if took > _HARMLESS else 0.0
            if self.spent >= SECONDS:
                self.spent = 0.0
                raise ValueError(
                    f"{self.field}: matching the pattern '{key[:200]}' against module names such as "
                    f"'{module_name[:200]}' takes longer than {SECONDS:g} s. Write it with fewer repeats, or give the "
                    "module names as a list."
                )
            if found:
                return key
        return None


def _dangerous(parsed: Any) -> str | None:
    """What makes an expression take exponential time, or None."""
    try:
        return None if _choices(parsed, inside=False) <= MOST_CHOICES else "has too many repeats and alternatives"
    except _Dangerous as error:
        return str(error)


class _Dangerous(Exception):
    pass


def _choices(parsed: Any, inside: bool) -> float:
    """Choices of one way through the expression; `inside` a repeat no other one and no alternatives may stand."""
    total = 0.0
    for operation, argument in parsed:
        name = str(operation)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            varies = least != most
            if inside and varies:
                raise _Dangerous("repeats what has a repeat in it")
            many = most > 3
            if not (many and _has_one_way(body)):
                total += _choices(body, inside or many) * (1 if many else most)
            total += 0 if not varies else 5 if most > 1 else 1
        elif name == "BRANCH":
            if inside:
                raise _Dangerous("repeats alternatives")
            total += math.log2(len(argument[1])) + max(_choices(branch, inside) for branch in argument[1])
        elif name in ("GROUPREF", "GROUPREF_EXISTS", "ATOMIC_GROUP"):
            raise _Dangerous("refers back to a group or has an atomic one")
        elif name == "SUBPATTERN":
            total += _choices(argument[-1], inside)
        elif name in ("ASSERT", "ASSERT_NOT"):
            total += _choices(argument[1], inside)
    return total


def _has_one_way(body: Any) -> bool:
    r"""Whether repeating `body` divides a name in one way only, as in `(\w+\.)*` or `(\.[a-z]+)*`: it begins or ends
    with a mark that nothing else in it matches, and only one part of it varies in length."""
    parts, varying = [], 0
    for operation, argument in _flat(body):
        if "REPEAT" in str(operation):
            least, most, inner = argument
            inner = _flat(inner)
            if len(inner) != 1:
                return False
            varying += least != most
            ((operation, argument),) = inner
            parts.append((operation, argument, least))
        else:
            parts.append((operation, argument, None))
    if varying > 1 or any(str(operation) not in _CHARACTERS for operation, *_ in parts):
        return False
    for first, others in ((parts[:1], parts[1:]), (parts[-1:], parts[:-1])):
        for operation, code, repeated in first:
            mark = str(operation) == "LITERAL" and repeated is None and not chr(code).isalpha()
            if mark and not any(_may_match(one, what, code) for one, what, _ in others):
                return True
    return False


_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_CATEGORIES = {
    f"CATEGORY_{negation}{name}": letter.upper() if negation else letter
    for name, letter in (("WORD", "w"), ("DIGIT", "d"), ("SPACE", "s"))
    for negation in ("", "NOT_")
}


def _flat(parsed: Any) -> list[tuple[Any, Any]]:
    """The expression's parts, those of its groups in their place."""
    found = []
    for operation, argument in parsed:
        found += _flat(argument[-1]) if str(operation) == "SUBPATTERN" else [(operation, argument)]
    return found


def _may_match(operation: Any, argument: Any, code: int) -> bool:
    """Whether a part that stands for one character may be the character of that `code`."""
    name = str(operation)
    if name in ("LITERAL", "NOT_LITERAL"):
        return (argument == code) == (name == "LITERAL")
    if name == "RANGE":
        return argument[0] <= code <= argument[1]
    if name == "CATEGORY":
        letter = _CATEGORIES.get(str(argument))
        return letter is None or re.match(f"\\{letter}", chr(code)) is not None
    if name == "IN":
        negated = str(argument[0][0]) == "NEGATE"
        return negated != any(_may_match(one, what, code) for one, what in argument[negated:])
    return True
