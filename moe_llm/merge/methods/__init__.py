"""How tensors are merged: one method, one file, one line here.

A method is a function from a `Job` to its `Combine` (see `moe_llm.merge.job`), with what it asks of a recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import (
    breadcrumbs,
    dare_linear,
    dare_ties,
    della,
    deltas,
    karcher,
    linear,
    model_stock,
    nuslerp,
    passthrough,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
from moe_llm.merge.parameters import Parameter


@dataclass(frozen=True)
class Method:
    """start: the method. needs_base: task vectors are differences from it. takes_base: they are where there is one.
    least, most: inputs. check: raises `UserError` for parameters that do not go together."""

    start: Callable[[Job], Combine]
    parameters: dict[str, Parameter]
    needs_base: bool = False
    takes_base: bool = False
    least: int = 1
    most: int | None = None
    check: Callable[[Job], None] | None = None


METHODS = {
    "linear": Method(linear.start, linear.PARAMETERS, check=linear.check),
    "slerp": Method(slerp.start, slerp.PARAMETERS, needs_base=True, least=2, most=2),
    "task_arithmetic": Method(task_arithmetic.start, task_arithmetic.PARAMETERS, needs_base=True, check=deltas.check),
    "ties": Method(ties.start, ties.PARAMETERS, needs_base=True, check=deltas.check),
    "dare_linear": Method(dare_linear.start, dare_linear.PARAMETERS, needs_base=True, check=deltas.check),
    "dare_ties": Method(dare_ties.start, dare_ties.PARAMETERS, needs_base=True, check=deltas.check),
    "breadcrumbs": Method(breadcrumbs.start, breadcrumbs.PARAMETERS, needs_base=True, check=deltas.check),
    "breadcrumbs_ties": Method(breadcrumbs.start_elected, breadcrumbs.PARAMETERS, needs_base=True, check=deltas.check),
    "della": Method(della.start, della.PARAMETERS, needs_base=True, check=della.check),
    "della_linear": Method(della.start_linear, della.LINEAR_PARAMETERS, needs_base=True, check=della.check),
    "sce": Method(sce.start, sce.PARAMETERS, needs_base=True),
    "model_stock": Method(model_stock.start, model_stock.PARAMETERS, needs_base=True, least=3),
    "karcher": Method(karcher.start, karcher.PARAMETERS),
    "nuslerp": Method(nuslerp.start, nuslerp.PARAMETERS, takes_base=True, least=2, most=3, check=nuslerp.check),
    "passthrough": Method(passthrough.start, passthrough.PARAMETERS, most=1),
}
