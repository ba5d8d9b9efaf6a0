"""The routers of a fine-tuned model against those of its base, on held-out blocks that stay the same: `router_guard`.

The base itself is not kept: what its routers say of the probe is computed once, before the first step, and stored in
the run directory.

Dimensions: P blocks of the probe, B of them in a batch, S tokens a block, T = B*S, L layers, E experts, K chosen.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from moe_llm.config import Config
from moe_llm.data.blocks import ValidationBlocks
from moe_llm.data.files import replace_file
from moe_llm.data.packing import Batch, model_inputs
from moe_llm.distributed.engine import Engine
from moe_llm.distributed.runtime import Runtime
from moe_llm.errors import TrainingFailure, UserError
from moe_llm.families.architectures import takes_top_k
from moe_llm.finetune.init_from import load_origin
from moe_llm.model.decoder import MoEDecoder
from moe_llm.train.build import restore
from moe_llm.train.callbacks.base import Callback, TrainingRun

FILE = "router_base.safetensors"
_NAME = "log_probabilities"


class RouterGuardCallback(Callback):
    """Measures at every evaluation how far the routers have moved, and acts on it (`finetune.router_guard`)."""

    guard: "RouterGuard"

    def validate(self, config: Config) -> None:
        """Refuse a guard that could do nothing: no base to compare with, or no evaluation at which to stop."""
        action = config.finetune.router_guard.action
        if config.model.init_from is None:
            raise UserError(
                f"finetune.router_guard.action={action} has no base to compare the routers with: set model.init_from"
            )
        if not takes_top_k(config.model):
            raise UserError(
                f"finetune.router_guard.action={action} compares routers that give a token its top k experts, which "
                f"model.router.type={config.model.router.type} does not: use another type, or turn the guard off"
            )
        if action == "stop" and config.evaluate.every_steps is None:
            raise UserError(
                "finetune.router_guard.action=stop has no evaluations at which to stop: set evaluate.every_steps"
            )

    def on_setup(self, run: TrainingRun) -> None:
        """Compute or read the base's routing; the engine is unchanged afterwards. Collective.

        Raises:
            TrainingFailure: the run was resumed from a checkpoint whose routers have moved too far.
        """
        guard = self.guard = RouterGuard(run.config, run.engine, run.runtime, run.data.validation)
        if run.source is None:
            guard.remember(run.run_dir)
            return
        if not guard.recall(run.run_dir):
            load_origin(run.engine, run.config.model)
            guard.remember(run.run_dir)
            restore(run.engine, run.source, hashes=False)
        failure = guard.why_failed(guard.measure())
        if failure is not None:
            raise TrainingFailure(f"{failure}: nothing is changed")

    def on_step_begin(self, run: TrainingRun) -> None:
        self.guard.add_gradients()

    def on_evaluate(self, run: TrainingRun, metrics: dict[str, Any]) -> None:
        metrics |= self.guard.measure()
        failure = self.guard.why_failed(metrics)
        if failure is not None:
            run.fail(failure)


class RouterGuard:
    """Measures how far the routers have moved, and what `finetune.router_guard.action` makes of it.

    The probe's blocks are evenly spread over all that is held out, whatever `evaluate.max_blocks`, and shared out over
    the ranks. The model is in evaluation mode for it: no noise, no dropout, no limit of capacity.
    """

    def __init__(self, config: Config, engine: Engine, runtime: Runtime, held_out: ValidationBlocks):
        self._guard, self._top_k = config.finetune.router_guard, config.model.num_experts_per_tok
        self._engine, self._runtime = engine, runtime
        probe = ValidationBlocks(held_out.sources, self._guard.blocks)
        width, rank, ranks = config.train.micro_batch_size, runtime.rank, runtime.world_size
        self._batches = probe.batches(micro_batch_size=width, rank=rank, world_size=ranks)
        mine = list(range(len(probe)))[rank::ranks]  # as `batches` shares them out
        self._rows = [mine[i * width : (i + 1) * width] for i in range(len(self._batches))]
        whole = probe.batches(micro_batch_size=len(probe))[0]
        self._tokens, self._digest = whole.num_tokens, _digest(whole)
        self._blocks = config.model.moe_layers  # their numbers among all
        self._shape = (
            len(probe),
            config.model.num_moe_layers,
            whole.input_ids_BS.shape[1],
            config.model.num_local_experts,
        )
        self._base_PLSE: Tensor | None = None  # fp32 on the CPU: 4 L E bytes a token

    def recall(self, run_dir: Path) -> bool:
        """Take the base's routers from the run directory; false if they are not there, or are of another probe.
        Collective."""
        found = _read(run_dir / FILE, self._digest, self._shape) if self._runtime.is_main else None
        self._base_PLSE = self._runtime.gather(found)[0]
        return self._base_PLSE is not None

    @torch.no_grad()
    def remember(self, run_dir: Path) -> None:
        """Take the model as it is for the base, and write down what its routers say. Collective."""
        own = []
        for batch, rows in zip(self._batches, self._rows):
            now_LBSE = self._log_probabilities(batch)[0]
            own.append((rows, now_LBSE.transpose(0, 1)[: len(rows)].cpu()))
        self._base_PLSE = torch.zeros(self._shape)
        for rows, now_BLSE in (part for parts in self._runtime.gather(own) for part in parts):
            self._base_PLSE[rows] = now_BLSE
        if self._runtime.is_main:
            replace_file(run_dir / FILE, save({_NAME: self._base_PLSE}, {"probe": self._digest}))
        self._runtime.barrier()

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """For the record of an evaluation, by layer; the same on every rank. Collective.

        kl: KL divergence of the router's distribution now from the base's, KL(base || now), nats, mean over the
        probe's tokens. agreement: mean share of a token's K experts that the base chose too, in whatever order.
        """
        sums_2L = torch.zeros(2, self._shape[1], dtype=torch.float64, device=self._runtime.device)
        for batch, rows in zip(self._batches, self._rows):
            now_LBSE, mask_BS, _ = self._log_probabilities(batch)
            base_LBSE = self._base(rows, now_LBSE)
            chosen_LBSE = _chosen(base_LBSE, self._top_k) & _chosen(now_LBSE, self._top_k)
            agreement_LBS = chosen_LBSE.sum(-1) / self._top_k
            sums_2L += torch.stack(
                [(value_LBS * mask_BS).double().sum((1, 2)) for value_LBS in (_kl(base_LBSE, now_LBSE), agreement_LBS)]
            )
        kl_L, agreement_L = (self._runtime.sum(sums_2L) / self._tokens).tolist()
        return {"router_drift": {"kl": kl_L, "agreement": agreement_L}}

    def add_gradients(self) -> None:
        """With `regularise`, the gradient of coefficient * mean over layers and tokens of KL(base || now), before
        those of a step's micro-batches. Collective."""
        if self._guard.action != "regularise":
            return
        for batch, rows in zip(self._batches, self._rows):
            with _evaluating(self._engine.model):
                now_LBSE, mask_BS, loss_sum = self._log_probabilities(batch)
                kl = (_kl(self._base(rows, now_LBSE), now_LBSE) * mask_BS).sum() / self._shape[1] / self._tokens
                # Engines average over the ranks, and DeepSpeed wants a gradient, if zero, of every parameter.
                assert self._guard.coefficient is not None, "`regularise` has one"
                share = self._runtime.world_size * self._guard.coefficient * kl + 0.0 * loss_sum
                self._engine.backward(share, last=False)

    def why_failed(self, measured: dict[str, Any]) -> str | None:
        """With `stop`, a sentence where a layer's router has moved past `max_kl`. `measured`: of `measure`."""
        if self._guard.action != "stop" or "router_drift" not in measured:
            return None
        kl_L = measured["router_drift"]["kl"]
        layer = max(range(len(kl_L)), key=lambda i: kl_L[i])
        if kl_L[layer] <= self._guard.max_kl:
            return None
        return (
            f"the router of layer {self._blocks[layer]} has moved by {kl_L[layer]:.4g} nats from its base, past "
            f"finetune.router_guard.max_kl={self._guard.max_kl:g} (to go on, raise it; to start anew, use a lower "
            "optim.lr, or action regularise or freeze, in another run.dir)"
        )

    def _log_probabilities(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(L, B, S, E) of the routers now, (B, S) real tokens, and the batch's loss, summed."""
        batch = batch.to(self._runtime.device)
        with _evaluating(self._engine.model), _router_logits(self._engine.model) as found:
            output = self._engine.forward(**model_inputs(batch))
        assert len(found) == self._shape[1], "each layer routes once"
        assert output.loss_sum is not None, "the probe has labels"
        gates = self._engine.model.model.routers
        now_LTE = torch.stack([gate.log_probabilities(logits_TE) for gate, logits_TE in zip(gates, found)])
        return now_LTE.unflatten(1, batch.input_ids_BS.shape), batch.attention_mask_BS, output.loss_sum

    def _base(self, rows: list[int], now_LBSE: Tensor) -> Tensor:
        """The base's log-probabilities beside those of now; zero in rows that are all padding."""
        assert self._base_PLSE is not None, "`recall` or `remember` comes first"
        base_LBSE = torch.zeros_like(now_LBSE)
        base_LBSE[:, : len(rows)] = self._base_PLSE[rows].transpose(0, 1).to(now_LBSE)
        return base_LBSE


def _kl(base: Tensor, now: Tensor) -> Tensor:
    """KL(base || now) of log-probabilities over the last dimension."""
    return (base.exp() * (base - now)).sum(-1)


def _chosen(log_probability: Tensor, top_k: int) -> Tensor:
    """Whether each expert is among the first K, bool; ties as `topk` breaks them."""
    index = log_probability.topk(top_k, dim=-1).indices
    return torch.zeros_like(log_probability, dtype=torch.bool).scatter_(-1, index, True)


@contextmanager
def _evaluating(model: MoEDecoder) -> Iterator[None]:
    """Evaluation mode inside, whatever it was before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _router_logits(model: MoEDecoder) -> Iterator[list[Tensor]]:
    """A list that fills with each layer's logits (T, E) of a forward pass inside. The hooks compute nothing: a
    recomputation comes later, in the backward pass, without them, and must save the same tensors."""
    found: list[Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda module, inputs, routing: found.append(routing.logits_TE))
        for gate in model.model.routers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _digest(batch: Batch) -> str:
    parts = [batch.input_ids_BS, batch.position_ids_BS, batch.attention_mask_BS, batch.document_ids_BS]
    digest = hashlib.sha256(str(tuple(batch.input_ids_BS.shape)).encode())
    for part in parts:
        digest.update(b"-" if part is None else part.numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, digest: str, shape: tuple[int, ...]) -> Tensor | None:
    """What `remember` has written, if it is of this probe."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as content:
            if (content.metadata() or {}).get("probe") != digest:
                return None
            found = content.get_tensor(_NAME)
    except SafetensorError as error:
        raise UserError(f"file {file} is damaged ({error}): delete it, and it is made from model.init_from") from error
    return found if found.shape == shape else None
