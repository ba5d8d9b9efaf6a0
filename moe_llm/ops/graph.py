"""What a function's backward pass may do with what its forward pass has saved."""

import torch


def graph_is_kept() -> bool:
    """Whether the running backward pass may be run again (`retain_graph`), and what was saved must stay as it is. To be
    called within one."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # not in torch's interface
    return asked is None or asked()
