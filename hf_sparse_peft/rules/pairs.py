"""Which registered rules compose on one adapter, as a table: `python -m hf_sparse_peft.rules.pairs` prints it."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields

from ..utils.parts import part_types
from .rule import Rule, conflict


def registered_rules() -> list[Rule]:
    """One rule with its default options of every registered type that has defaults for all of them, by type."""
    return [cls() for cls in part_types(Rule).values() if all(map(_has_default, fields(cls)))]


def _has_default(field: Field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def pair_table(rules: list[Rule] | None = None) -> str:
    """Markdown: what each rule acts on, writes and needs, then rules x rules with "composes" or "refused".

    Args:
        rules: None: all registered ones.
    """
    rules = registered_rules() if rules is None else rules
    names = [type(rule).__name__ for rule in rules]
    lines = ["| rule | acts on | writes | needs |", "|---|---|---|---|"]
    for rule, name in zip(rules, names, strict=True):
        cells = [", ".join(sorted(one)) or "nothing" for one in (rule.acts_on, rule.writes, rule.all_needs)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += ["", f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for rule, name in zip(rules, names, strict=True):
        cells = ["composes" if conflict(rule, other) is None else "refused" for other in rules]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    reasons = [conflict(one, other) for at, one in enumerate(rules) for other in rules[at + 1 :]]
    return "\n".join([*lines, "", *(f"- {reason}" for reason in reasons if reason)])


if __name__ == "__main__":
    print(pair_table())
