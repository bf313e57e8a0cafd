"""What an examination of a run's settings found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..utils.tables import Table, table

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_FIELD = re.compile(r"(?<![\w'\"])([A-Za-z_]\w*(?:\.\w+)*)(?:\[[^\]]*\])?(?==|\b has \[)")
_MENDS = (
    "Set|Lower|Raise|Leave|Pass|Train|Call|Load|Choose|Give|Correct|Use|Add|Make|Widen|Take|Keep|Let|Name|Import|Update|"
    "Adapters of this package|Activate|Change|Put|Install|Check|Please|Was it|Close to it|It takes|Call it|Activate"
)
_MEND = re.compile(rf"(?<=[.!?:]) (?={_MENDS})")


@dataclass(frozen=True)
class Finding:
    """One thing that was found."""

    severity: Severity
    """`error`: the run fails, or trains something else than was asked for; `warning`: probably not what is meant;
    `note`: to know."""
    field: str
    """The option that it is about, by the name that it has in the adapter's config or in the run's arguments."""
    what: str
    """What is wrong."""
    mend: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.field}: {self.what} {self.mend}".rstrip()


@dataclass(frozen=True)
class Diagnosis:
    """All findings, errors first."""

    findings: tuple[Finding, ...]

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def of(self, *severities: Severity) -> list[Finding]:
        """The findings of these severities."""
        return [finding for finding in self.findings if finding.severity in severities]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not self.of("error")

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}

    def table(self) -> Table:
        """A line for each finding."""
        rows = [(one.severity, one.field, one.what, one.mend) for one in self.findings]
        return table(("", "field", "what", "mend"), rows)

    def __str__(self) -> str:
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{counts[one]} {one}{'s' * (counts[one] != 1)}" for one in SEVERITIES if counts[one])
        return "\n".join([f"{found or 'Nothing found'}.", *(f"- {finding}" for finding in self.findings)])


def diagnosis_of(findings: list[Finding]) -> Diagnosis:
    """The findings, each once, errors first."""
    found = dict.fromkeys(findings)
    return Diagnosis(tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))))


def from_message(severity: Severity, message: str, field: str) -> Finding:
    """A finding of what an error or a warning of this package says: its option and its mend are in the message; `field`
    is the option where it names none."""
    message = " ".join(message.split())
    at = next((found.start() for found in _MEND.finditer(message)), None)
    what, mend = (message, "") if at is None else (message[:at], message[at + 1 :])
    named = _FIELD.search(what)
    mend = mend or f"Change {named[1] if named else field}."  # upstream's messages often have none
    # An option of the config itself is named without its class, one of a rule with it.
    return Finding(severity, re.sub(r"^\w+Config\.", "", named[1]) if named else field, what, mend)
