"""From a pattern of failures to what usually lies behind it: the table of `_RULES`, first match first."""

import re
from collections.abc import Callable

from moe_llm.doctor.findings import FAIL, Finding

Failed = dict[str, Finding]


def diagnose(findings: list[Finding], ranks: int) -> None:
    """Write each failed finding's likely cause."""
    failed = {finding.key: finding for finding in findings if finding.failed}
    for finding in failed.values():
        for keys, cause in _RULES:
            if finding.key in keys and (sentence := cause(finding, failed, ranks)):
                finding.cause = sentence
                break
        assert finding.status == FAIL


def _says(sentence: str, *, if_failed: str | None = None) -> Callable:
    return lambda finding, failed, ranks: sentence if if_failed is None or if_failed in failed else ""


def _gradient(finding: Finding, failed: Failed, ranks: int) -> str:
    if finding.evidence.get("why"):
        return finding.evidence["why"]
    kinds, factor = finding.evidence["kinds"], finding.evidence["factor"]
    who = "of the experts" if kinds == ["experts"] else "of the routers" if kinds == ["routers"] else ""
    if factor is not None and (kinds == ["experts"] or not finding.evidence["spared"]):
        number = f"{factor:.3g}"
        if abs(factor - ranks) < 1e-2 * ranks:
            number += ", the number of ranks"
        elif abs(factor * ranks - 1) < 1e-2:
            number = f"1/{ranks}, one over the number of ranks"
        scaled = f"gradients {who or 'of all parameters'} are scaled by {number}"
        return f"{scaled}: they are averaged or multiplied once too often"
    if factor == 0:
        return f"gradients {who or 'of these parameters'} are zero: they are cut off the loss"
    if kinds == ["experts"]:
        return "gradients of the experts alone depart: look at their reduction over the ranks that hold the same ones"
    if kinds == ["routers"]:
        return "gradients of the routers alone depart: look at the balance and z-loss and at the rows' weights"
    if "aux_loss" in failed or "reference_aux" in failed:
        return "follows from the balance loss"
    if "reference_own" in failed:
        return "follows from a loss of the router's own"
    beyond = finding.evidence["beyond"]
    if finding.key == "reference_gradients" and len(beyond) <= 2 and "reference_lm" not in failed:
        return f"the losses are right, and gradients of {' and '.join(beyond)} alone depart: part of them is cut off, or doubled"
    return ""


def _aux(finding: Finding, failed: Failed, ranks: int) -> str:
    if "routing" in failed and "lm_loss" in failed and _begins(failed["lm_loss"]) <= _begins(finding):
        return ""
    if sentence := _padding(failed.get("reference_aux", finding)):
        return sentence
    return "token counts are not summed over the ranks before the product, or are of another round of micro-batches"


def _reference_aux(finding: Finding, failed: Failed, ranks: int) -> str:
    if sentence := _padding(finding):
        return sentence
    if "reference_lm" in failed:
        return "follows from the forward pass"
    return "the balance loss has another formula than in the paper, or its coefficient is applied twice"


def _padding(finding: Finding) -> str:
    """What to say where steps with padding depart and none before the first of them; else nothing."""
    padded, full, beyond = (finding.evidence[key] for key in ("padded", "full", "beyond"))
    if beyond[0] not in padded or (beyond[0] == "step 1" and not set(beyond) <= set(padded)):
        return ""
    return "padding is counted as tokens" + ("" if full else ", or the formula is another: every step has padding")


def _begins(finding: Finding) -> list[int]:
    """Step, and layer where the check has one, of the first departure, in an order."""
    return [int(number) for number in re.findall(r"\d+", finding.evidence["beyond"][0])]


def _run(finding: Finding, failed: Failed, ranks: int) -> str:
    trace = finding.evidence["trace"]
    for words, cause in _TRACES.items():
        if words in trace:
            return cause
    return "a rank raised, ended or hung: --json has the trace"


_TRACES = {
    "KeyError: 'exp_avg'": "parameters that are to be trained are not in the optimizer",
    "None of the param groups are marked as MoE": "experts are not in the optimizer",
    "tensors of the experts are left out": "experts are not in the optimizer",
    "is in no parameter group of the optimizer": "parameters that are to be trained are not in the optimizer",
    "the ranks would not write the model that was configured": "the ranks do not export all experts, or some twice",
}


def _dropped(finding: Finding, failed: Failed, ranks: int) -> str:
    if "routing" in failed and _begins(failed["routing"]) <= _begins(finding):
        return "follows from the routing"
    return "who is dropped depends on the layout: capacity must not look beyond a sequence"


def _routing(finding: Finding, failed: Failed, ranks: int) -> str:
    if "dropped" in failed and _begins(failed["dropped"]) < _begins(finding):
        return "follows from who is dropped"
    if "aux_loss" in failed and "lm_loss" not in failed:
        return "tokens go where they should, so their counts are wrong: not summed over the ranks, or with padding"
    return "tokens go elsewhere than in one process: look at the router's input and at its precision"


def _later(finding: Finding, failed: Failed, ranks: int) -> str:
    """Losses that are right at first and depart later."""
    if finding.where and not finding.where.startswith("step 1"):
        for key in ("experts_train", "gradients", "weights"):
            if key in failed:
                return f"follows from: {failed[key].check}"
    return ""


def _weights(finding: Finding, failed: Failed, ranks: int) -> str:
    if "experts_train" in failed:
        return "follows from: experts that do not change"
    if "gradients" in failed:
        return "follows from the gradients"
    if "norm" in failed:
        return "clipped by another norm"
    return "gradients and norm are right, so the optimizer's step is not: its groups, rate, decay or bound of the norm"


def _optimizer(finding: Finding, failed: Failed, ranks: int) -> str:
    """What a replay with other rules has shown."""
    if finding.evidence.get("why"):
        return finding.evidence["why"]
    return (
        "the optimizer's step is not what its settings say: look at its groups, rate, decay, betas, eps or bound of "
        "the norm"
    )


def _resumed_state(finding: Finding, failed: Failed, ranks: int) -> str:
    if finding.evidence.get("loaded_in"):
        return f"the checkpoint is loaded in {finding.evidence['loaded_in']}, to which values are rounded"
    return "the checkpoint misses or misplaces state at another layout"


def _as_found(finding: Finding, failed: Failed, ranks: int) -> str:
    """What the oracle has to say needs no guess."""
    return finding.where.partition(": ")[2] or finding.where


def _reference_buffers(finding: Finding, failed: Failed, ranks: int) -> str:
    forward = failed.get("reference_lm")
    return "follows from the forward pass" if forward is not None and _begins(forward)[-1] == 1 else ""


def _after_buffers(finding: Finding, failed: Failed, ranks: int) -> str:
    """From the second step on, after the routers' buffers have been moved."""
    moved = "reference_buffers" in failed and not _reference_buffers(finding, failed, ranks)
    return "follows from what routers have moved" if moved and _begins(finding)[-1] > 1 else ""


_FOLLOWS_SAMPLES = _says("follows from the data: the blocks are not those that were due", if_failed="samples")
_RULES: list[tuple[set[str], Callable[[Finding, Failed, int], str]]] = [
    ({"oracle_updates", "oracle_moments"}, _optimizer),
    ({"oracle_average"}, _says("the average lags behind the weights, or takes in others than those after each step")),
    ({"export_config", "export_tokens", "export_dtype"}, lambda finding, failed, ranks: finding.where),
    ({"oracle_schedule"}, _says("the learning rate is not its formula's: look at warm-up, schedule and step count")),
    ({"oracle_norm"}, _says("the norm that is recorded, and clipped by, is not that of all gradients")),
    ({"oracle_text", "oracle_order", "oracle_held_out", "oracle_chat", "oracle_initial", "random"}, _as_found),
    (
        {"cut", "cut_gradients"},
        _says(
            "a loss is averaged over micro-batches in place of tokens, or a router looks beyond a sequence: the cut of "
            "the batch changes what is trained"
        ),
    ),
    ({"samples"}, _says("ranks share out the blocks wrongly: look at the loader's rank, world size and position")),
    ({"run"}, _run),
    (
        {
            "tokens",
            "lm_loss",
            "aux_loss",
            "z_loss",
            "loss",
            "gradients",
            "norm",
            "weights",
            "routing",
            "dropped",
            "val_loss",
            "resume_one_data",
            "resume_one_loss",
            "resume_ranks_data",
            "resume_ranks_loss",
        },
        _FOLLOWS_SAMPLES,
    ),
    ({"start"}, _says("a rank's initial weights are not those of one process: initialisation depends on the rank")),
    ({"tokens"}, _says("padding is counted, or the ranks' masks differ from those of one process")),
    ({"experts_train"}, _says("experts are not in the optimizer, or their learning rate is zero")),
    ({"others_train"}, _says("these parameters are not in the optimizer")),
    ({"frozen"}, _says("what is frozen is in the optimizer, or decays")),
    ({"aux_loss", "z_loss", "lm_loss", "loss", "routing", "dropped", "norm"}, _later),
    ({"aux_loss"}, _aux),
    ({"loss"}, _says("follows from the balance loss", if_failed="aux_loss")),
    ({"loss"}, _says("follows from the z-loss", if_failed="z_loss")),
    ({"z_loss"}, _says("the number of tokens it is divided by is not that of all ranks")),
    (
        {"lm_loss", "loss"},
        _says(
            "the targets it is divided by are not those of the whole step, or the forward pass of "
            "the layout differs: look at dispatch and attention"
        ),
    ),
    ({"dropped"}, _dropped),
    ({"routing"}, _routing),
    ({"gradients", "reference_gradients"}, _gradient),
    (
        {"gradients"},
        _says(
            "backward departs where forward does not: look at the exchange's backward and at "
            "accumulation over micro-batches"
        ),
    ),
    ({"norm"}, _says("follows from the gradients", if_failed="gradients")),
    ({"norm"}, _says("gradients are right, so the norm is not taken over all ranks and parameters: clipping is wrong")),
    ({"weights"}, _weights),
    ({"val_loss"}, _says("follows from the weights", if_failed="weights")),
    ({"val_loss"}, _says("held-out blocks are shared out wrongly among the ranks")),
    ({"bf16"}, _says("bf16 loses more than rounding: look at what is kept in fp32 (router, norms, sums, masters)")),
    ({"reference_aux"}, _reference_aux),
    ({"reference_norm"}, _says("follows from the gradients", if_failed="reference_gradients")),
    ({"reference_norm"}, _says("gradients are right, so their norm is not taken over all parameters")),
    ({"reference_val"}, _says("follows from the forward pass", if_failed="reference_lm")),
    (
        {"reference_val", "noise_val"},
        _says(
            "held-out losses are not the mean over all targets, or noise, dropout or limits of capacity act while evaluating"
        ),
    ),
    ({"noise_dropout"}, _says("dropout is configured and does not act")),
    ({"reference_own"}, lambda finding, failed, ranks: _padding(finding)),
    ({"reference_own"}, _says("follows from the forward pass", if_failed="reference_lm")),
    ({"reference_own"}, _says("a loss of the router's own has another formula than in its paper")),
    ({"reference_buffers"}, _reference_buffers),
    ({"reference_lm", "reference_aux", "reference_z", "reference_own"}, _after_buffers),
    ({"reference_buffers"}, _says("a router moves its bias, threshold or load by another rule than its paper's")),
    ({"reference_z"}, lambda finding, failed, ranks: _padding(finding)),
    ({"reference_z"}, _says("follows from the forward pass", if_failed="reference_lm")),
    ({"reference_z"}, _says("the z-loss has another formula than in the paper")),
    (
        {"reference_lm"},
        _says(
            "the forward pass is another than transformers': documents see each other, targets are shifted wrongly, "
            "padding is counted, or attention, rope, norms or experts' weights are computed otherwise"
        ),
    ),
    (
        {"export_load"},
        _says("config.json or the files of the checkpoint are not what transformers reads: --json has the trace"),
    ),
    (
        {"export", "export_keys"},
        _says(
            "the checkpoint does not hold what was trained: experts of some ranks are "
            "missing, doubled or in another's place"
        ),
    ),
    ({"export_loaded"}, _says("follows from config.json", if_failed="export_config")),
    ({"export_loaded"}, _as_found),
    ({"export_logits"}, _says("follows from the exported weights", if_failed="export")),
    ({"export_logits"}, _says("config.json does not describe the model that was trained")),
    ({"resume_one_data", "resume_ranks_data"}, _says("the data position in the checkpoint is not that of its step")),
    ({"resume_one_state", "resume_ranks_state"}, _resumed_state),
    ({"resume_one_loss"}, _says("follows from the data position", if_failed="resume_one_data")),
    ({"resume_ranks_loss"}, _says("follows from the data position", if_failed="resume_ranks_data")),
    ({"resume_one_loss"}, _says("follows from the restored state", if_failed="resume_one_state")),
    ({"resume_ranks_loss"}, _says("follows from the restored state", if_failed="resume_ranks_state")),
    (
        {"resume_one_loss", "resume_ranks_loss"},
        _says("the state is right and the steps after it are not: step count, schedule or noise"),
    ),
    ({"noise_recomputed"}, _says("recomputation draws other noise than the forward pass, or noise is not seeded")),
    ({"noise_acts"}, _says("the noise is drawn but not used, or never drawn")),
]
