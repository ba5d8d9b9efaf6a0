"""What `step.py` times: the contenders that run here, and of them those that compute the same."""

import gc
import time

import torch
from contenders import contender

# Relative distance of each parameter's gradient from fp32's. In bf16 it may be a multiple of what transformers' plain
# loop itself has there.
FP32_TOLERANCE, BF16_MULTIPLE, BF16_FLOOR = 1e-4, 1.5, 0.01


def build_all(names, shape, state, dtype, ids) -> tuple[dict, dict]:
    """The contenders that make a step, and what the others said: a package may fail in whatever way it likes.

    A model's `first_step_seconds` are those of its first step, in which some compile."""
    models, failures = {}, {}
    for name in names:
        try:
            model = contender(name, shape, state, dtype, ids.device)
            start = time.perf_counter()
            model(ids).backward()
            model.first_step_seconds = time.perf_counter() - start
            without = [key for key, grad in model.gradients().items() if grad is None]
        except Exception as error:
            if name in ("ours", "transformers:eager"):
                raise
            reason = str(error).partition("\n")[0][:120] or type(error).__name__
            failures[name] = f"does not run: {reason}"
            continue
        model.zero_grad(set_to_none=True)
        if without:
            failures[name] = f"does not train: no gradient of {without[0]}"
        else:
            models[name] = model
    return models, failures


def gradients(model, ids) -> tuple[float, dict[str, torch.Tensor]]:
    """(loss, the gradient of each parameter, in fp32) of one step."""
    model.zero_grad(set_to_none=True)
    loss = model(ids)
    loss.backward()
    found = {name: grad.float().cpu() for name, grad in model.gradients().items()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def departures(models, shape, state, ids, dtype: str) -> dict[str, float]:
    """How far each model's loss and gradients are from those of the plain loop in fp32, in units of what is allowed:
    the worst parameter's. In bf16 the plain loop's own distance sets what is allowed for each."""
    golden = contender("transformers:eager", shape, state, torch.float32, ids.device)
    loss, exact = gradients(golden, ids)
    del golden
    free()
    distances = {}
    for name, model in models.items():
        own_loss, own = gradients(model, ids)
        distances[name] = {key: ((own[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact}
        distances[name]["loss"] = abs(own_loss - loss) / abs(loss)
    allowed = dict.fromkeys([*exact, "loss"], FP32_TOLERANCE)
    if dtype == "bf16":
        allowed = {key: BF16_FLOOR + BF16_MULTIPLE * d for key, d in distances["transformers:eager"].items()}
    # torch's maximum: Python's passes over what is not a number
    return {n: torch.tensor([d[key] / allowed[key] for key in allowed]).max().item() for n, d in distances.items()}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
