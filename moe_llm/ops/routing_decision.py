"""Marks a decision about who goes where, so that a recomputation can take it over (`model.recomputation`)."""

import torch
from torch import Tensor

_library = torch.library.Library("moe_llm", "DEF")
_library.define("decided(Tensor x) -> Tensor")
_library.impl("decided", lambda x: x.clone(), "CompositeExplicitAutograd")


def decided(x: Tensor) -> Tensor:
    """The same bools or integers. Wrap what follows from a comparison of computed numbers: computed again, these may
    differ in the last bit."""
    assert not x.is_floating_point(), "a decision has no gradient"
    return torch.ops.moe_llm.decided(x)
