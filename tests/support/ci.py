"""Which cases of a dear test run in CI; the others wait for `-m grid`."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def dear(cases: Iterable[Any], *in_ci: Any) -> list[Any]:
    """The cases of a parametrization, all but `in_ci` marked as `grid`. A case of several values is a tuple.

    Raises:
        ValueError: a case that is to run in CI is not among them.
    """
    cases = list(cases)
    if unknown := [case for case in in_ci if case not in cases]:
        raise ValueError(f"no such case: {unknown}")
    return [case if case in in_ci else _grid(case) for case in cases]


def dear_by_id(cases: dict[str, Any], in_ci: Collection[str]) -> dict[str, Any]:
    """`dear` of named cases: give its values as cases and its keys as ids."""
    if unknown := set(in_ci) - set(cases):
        raise ValueError(f"no such case: {unknown}")
    return {name: case if name in in_ci else _grid(case) for name, case in cases.items()}


def _grid(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.grid)
