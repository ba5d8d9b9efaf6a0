"""What a comparison says: one row of the table."""

from dataclasses import dataclass, field
from typing import Any

_NAMED = 32  # of the things that depart, kept as evidence
PASS, FAIL, NOTE = "PASS", "FAIL", "NOTE"


@dataclass
class Finding:
    """key: names the check for `causes` and for readers of the JSON. check: the same for people.

    difference, tolerance: relative unless the check says otherwise; a check without a tolerance must be exact.
    where: the first thing that departs. evidence: what `causes` goes by. cause: what it came to.
    """

    key: str
    check: str
    status: str
    difference: float | None = None
    tolerance: float | None = None
    where: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    cause: str = ""

    @property
    def failed(self) -> bool:
        return self.status == FAIL


def note(sentence: str) -> Finding:
    return Finding("note", sentence, NOTE)


def exact(key: str, check: str, wrong: list[str], **evidence: Any) -> Finding:
    """A check that nothing may depart from; `wrong` says what does, in order."""
    where = "" if not wrong else wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "")
    return Finding(key, check, FAIL if wrong else PASS, float(len(wrong)), 0.0, where, evidence)


def within(key: str, check: str, differences: list[tuple[float, float, str]], **evidence: Any) -> Finding:
    """A check of several (difference, tolerance, where): the first that is too large is named, else the closest
    to its tolerance."""
    beyond = [d for d in differences if not d[0] <= d[1]]  # NaN is beyond
    shown = beyond[0] if beyond else max(differences, key=lambda d: d[0] / d[1] if d[1] else 0.0)
    return Finding(
        key,
        check,
        FAIL if beyond else PASS,
        shown[0],
        shown[1],
        shown[2] if beyond else "",
        {**evidence, "beyond": [d[2] for d in beyond[:_NAMED]]},
    )
