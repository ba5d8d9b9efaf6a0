"""What the training loop drives: forward, backward, step; and the state behind it, by name.

`LocalEngine` is one process with a torch optimizer; `DeepSpeedEngine` any number of ranks with expert parallelism
and ZeRO. Both keep fp32 master weights (or what `optim.master_weights` puts in their place), clip by the true global norm
and implement `TrainedState`.
"""

from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_llm.config import Config
from moe_llm.config.adversarial import UpdatePhase
from moe_llm.config.optim import OPTIMIZERS
from moe_llm.distributed import deepspeed as contract
from moe_llm.distributed.adamw_8bit import AdamW8bit
from moe_llm.distributed.averaging import Averaging
from moe_llm.distributed.mapped_state import MappedFiles
from moe_llm.distributed.muon import Muon
from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.sequence import share_sequences
from moe_llm.distributed.state import COMPENSATION, Adapted, ParameterShard, TrainedState, split, wide
from moe_llm.distributed.update_phase import UpdatePhases
from moe_llm.locks import tell
from moe_llm.model.adapters import factors_of, is_factor, own_name
from moe_llm.model.decoder import MoEDecoder, MoEOutput
from moe_llm.model.moe.experts import Experts, UnevenExperts
from moe_llm.model.quantized import packed_weights

OptimizerFactory = Callable[[list[dict]], torch.optim.Optimizer]
Fill = Callable[[str, Tensor], None]  # gives a parameter of this name its initial values


class Engine(TrainedState, Protocol):
    """A `TrainedState` that can be trained."""

    model: MoEDecoder
    trained_experts: frozenset[int] | None  # of each layer, by their indices over all ranks; None: none

    def forward(self, **inputs: Any) -> MoEOutput: ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients of one micro-batch's share of the step's loss; `last` ends the step's backward."""

    def gradient_square(self) -> Tensor:
        """This rank's summand of the square of the gradients' global norm (fp32 scalar on its device), between
        `backward` and `step`. Not finite if any gradient that it holds is not."""

    def set_phase(self, turn: UpdatePhase) -> None:
        """What the coming step trains, before its first backward pass: the gradients of all else are zero, and `step`
        leaves it and its optimizer tensors as they are."""

    def step(self, lr: float) -> float:
        """Clip, update, clear; returns the gradients' global norm before clipping. The gradients must be finite."""

    def discard(self) -> None:
        """Clear the gradients and update nothing, in place of `step`; on every rank."""

    def update_average(self) -> None:
        """Take the weights as they are into `checkpoint.ema`'s average; after `step`. Exchanges nothing."""

    def weights_for_use(self) -> AbstractContextManager[None]:
        """Inside it the engine holds the weights that are to be used, where its optimizer trains at others (as
        schedule-free ones do): for evaluation, saving and restoring. Collective."""

    def weights_finite(self) -> bool:
        """Whether this rank's part of the weights is."""

    def make_optimizer_state(self, steps: int) -> None:
        """Give the optimizer, which has none before its first step, the tensors that it has after `steps` steps,
        all zero: `write` then fills them."""

    def gradient(self, name: str) -> Tensor:
        """The gradient of a parameter (of this rank's experts), averaged over the ranks; fp32 on the CPU, between
        `backward` and `step`. Collective."""

    def expert_gradient_squares(self) -> Tensor:
        """This rank's summand of the square of each expert's gradient norm, (layers, experts), fp32 on its device,
        between `backward` and `step`; 0 for experts that are not trained. Reads what the rank holds: exchanges
        nothing."""


def shard_experts(model: MoEDecoder, experts: range) -> None:
    """Keep only these experts of every layer."""
    for module in model.modules():
        uneven = isinstance(module, UnevenExperts)
        if uneven or (isinstance(module, Experts) and len(experts) < module.gate_up_proj.shape[0]):
            assert isinstance(module, (Experts, UnevenExperts))
            module.keep(experts)


def first_experts(model: nn.Module) -> dict[str, int]:
    """Name of each expert parameter: index of the first expert that it holds."""
    return {
        f"{name}.{leaf}": module.first_expert
        for name, module in model.named_modules()
        if isinstance(module, Experts)
        for leaf in (*(leaf for leaf, _ in module.named_parameters()), *getattr(module, "packed", ()))
    }


class _NamedState(Averaging, UpdatePhases):
    """The parts of `TrainedState` that do not depend on who trains.

    Where only some experts are trained (`finetune.experts`), a stacked parameter is trained whole, since the engine
    shares it out as one: the other experts' rows get no gradient, so that their moments stay zero and their weights
    what they are. Weight decay is then applied here, to the trained rows alone: their group has none.
    """

    def __init__(
        self,
        model: MoEDecoder,
        runtime: Runtime,
        config: Config,
        groups: list[dict],
        replicas: int,
        replica: int,
    ):
        self.model = model
        self._optimizer = OPTIMIZERS[config.optim.name]
        self.kinds, self.starts_as_weight = self._optimizer.tensors, self._optimizer.starts_as_weight
        own_kinds = {p: tuple(group["kinds"]) for group in groups if "kinds" in group for p in group["params"]}
        self._allocate = partial(torch.empty_like, dtype=torch.float32, requires_grad=False)
        self._set_up_average(config.checkpoint.ema)
        self.rank, self.world_size = runtime.rank, runtime.world_size
        self._runtime = runtime
        self.base_files: dict[str, dict[str, Any]] = {}
        buffers = {own_name(name): buffer for name, buffer in model.named_buffers()}
        # buffers are read and written by the same names
        packed = dict(packed_weights(model))
        self._parameters: dict[str, Any] = (
            {own_name(name): p for name, p in model.named_parameters()} | buffers | packed
        )
        first = first_experts(model)
        self._entries = [
            ParameterShard(
                name=name,
                shape=tuple(getattr(p, "ds_shape", p.shape)),
                first_expert=first.get(name),
                trainable=p.requires_grad,
                buffer=name in buffers,
                packed=name in packed,
                trained_experts=_trained_experts(config) if name in first and p.requires_grad else None,
                adapter=is_factor(name),
                kinds=own_kinds.get(p),
                adapted=_adapted(name, self._parameters, config),
                # Replicas of a parameter take turns as its writer, so that all ranks write at once.
                writer=(i % replicas == replica) if name in first else (i % self.world_size == self.rank),
            )
            for i, (name, p) in enumerate(self._parameters.items())
        ]
        self._trained_rows = {}
        for entry in self._entries:
            if entry.trained_experts is not None and entry.experts is not None:
                parameter, rows = self._parameters[entry.name], [entry.trains(e) for e in entry.experts]
                self._trained_rows[parameter] = [row for row, trained in enumerate(rows) if trained]
                others = [row for row, trained in enumerate(rows) if not trained]
                parameter.register_hook(_clear_rows(torch.tensor(others, device=runtime.device)))
        self._in_turns = any("routers" in group for group in groups)
        self._set_up_phases(config.train.adversarial, groups)
        self._trained_stacks = self._find_trained_stacks()
        self._decays = [
            (p, group["row_weight_decay"], group.get("lr_multiplier", 1.0))
            for group in groups
            if "row_weight_decay" in group
            for p in group["params"]
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        """Give each group its rate and its turn, and the trained rows of stacked parameters their decay (as AdamW does
        it)."""
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_multiplier", 1.0)
        if self._in_turns:
            self._mark_idle(optimizer.param_groups)
            if self._idle(routers=False):
                return
        for parameter, decay, multiplier in self._decays:
            self._decay_rows(parameter, self._trained_rows[parameter], 1 - lr * multiplier * decay)

    @property
    def counters(self) -> dict[str, dict[str, float]]:
        groups = self._stepped()[0].param_groups if self._optimizer.counters else []
        return {_rate_of(group): {name: group[name] for name in self._optimizer.counters} for group in groups}

    @counters.setter
    def counters(self, stored: dict[str, dict[str, float]]) -> None:
        for group in self._stepped()[0].param_groups:
            group.update(stored[_rate_of(group)])

    def _packer(self, kind: str) -> AdamW8bit | None:
        """The optimizer, where it holds a tensor in few bits, and so reads and writes it itself."""
        optimizer = self._stepped()[0]
        return optimizer if kind in self.kinds and isinstance(optimizer, AdamW8bit) else None

    @contextmanager
    def weights_for_use(self) -> Iterator[None]:
        optimizer: Any = self._stepped()[0]
        if not self._optimizer.switches or not optimizer.param_groups[0]["train_mode"]:
            yield
            return
        optimizer.eval()
        self._publish()
        yield
        optimizer.train()
        self._publish()

    @abstractmethod
    def _publish(self) -> None:
        """Copy the optimizer's weights into the model where they are different tensors. Collective."""

    @abstractmethod
    def _decay_rows(self, parameter: nn.Parameter, rows: list[int], factor: float) -> None:
        """Multiply some rows of a parameter's fp32 weight."""

    @torch.no_grad()
    def expert_gradient_squares(self) -> Tensor:
        squares_LE = torch.zeros(self._num_moe_layers, self.model.config.num_local_experts, device=self._runtime.device)
        for row, experts, home, parameter in self._trained_stacks:
            held = home if experts.held is None else experts.held
            squares_LE[row, held] += self._row_squares(parameter).to(squares_LE.device)
        return squares_LE

    def _find_trained_stacks(self) -> list[tuple[int, Experts, list[int], nn.Parameter]]:
        """Each trained parameter of experts: the row of its layer among those with experts, its module, and which
        experts its rows are of while none has moved. Sets `trained_experts`."""
        layers = self.model.config.moe_layers
        self._num_moe_layers = len(layers)
        found, self.trained_experts = [], None
        for entry in self._entries:
            if entry.experts is not None and entry.trainable:
                layer = int(entry.name.partition("layers.")[2].partition(".")[0])
                experts = self.model.get_submodule(entry.name.rpartition(".")[0])
                assert isinstance(experts, Experts)
                found.append((layers.index(layer), experts, list(entry.experts), self._parameters[entry.name]))
                every = range(self.model.config.num_local_experts)
                self.trained_experts = frozenset(entry.trained_experts or every)
        return found

    @abstractmethod
    def _row_squares(self, parameter: nn.Parameter) -> Tensor:
        """The square of the gradient's norm for each row of a stacked parameter, as far as this rank holds it."""

    def entries(self) -> list[ParameterShard]:
        return self._entries

    def gather(self, value: Any) -> Sequence[Any]:
        return self._runtime.gather(value)


def _rate_of(group: dict[str, Any]) -> str:
    """The multiple of `optim.lr` at which a group of parameters is trained, as a key."""
    return f"{group.get('lr_multiplier', 1.0):g}"


def _adapted(name: str, parameters: Container[str], config: Config) -> Adapted | None:
    a, b = factors_of(name)
    return Adapted(a, b, config.finetune.lora.scale) if a in parameters else None


def _trained_experts(config: Config) -> tuple[int, ...] | None:
    chosen = config.finetune.experts
    return None if chosen is None else tuple(sorted(set(chosen)))


def _clear_rows(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.index_fill(0, rows, 0.0)


def _assert_grouped(model: nn.Module, groups: list[dict]) -> None:
    """The optimizer is given all that is to be trained: what it does not know would stay as it is, unseen."""
    given, experts = {id(p) for group in groups for p in group["params"]}, first_experts(model)
    lost = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in given]
    whose = "of the experts" if all(name in experts for name in lost) else "of these parameters"
    assert not lost, f"{lost[0]} is in no parameter group of the optimizer: {len(lost)} tensors {whose} are left out"


class LocalEngine(_NamedState):
    """One process. In bf16 the optimizer steps on fp32 masters, and gradients are summed in fp32, unless the
    configuration says that either is bf16 too."""

    def __init__(
        self,
        model: MoEDecoder,
        runtime: Runtime,
        config: Config,
        groups: list[dict],
        build_optimizer: OptimizerFactory,
    ):
        super().__init__(model.to(runtime.device), runtime, config, groups, replicas=1, replica=0)
        self.clip = config.optim.grad_clip
        masters = {p: p for p in model.parameters()}
        wide_gradients = config.parallel.gradient_dtype == "fp32"
        if config.train.precision == "bf16":
            if config.optim.master_weights == "fp32":
                # Masters begin with what bf16 can hold, as DeepSpeed's do: initial weights are the same in every layout.
                trained = [p for p in model.parameters() if p.requires_grad]
                masters = {p: nn.Parameter(p.detach().bfloat16().float()) for p in trained}
            model.to(torch.bfloat16)
            for parameter, master in masters.items():
                if wide_gradients and master is not parameter:
                    parameter.register_post_accumulate_grad_hook(_move_gradient_to(master))
        self._masters = masters
        # what holds a parameter's gradient until the step
        self._graded = masters if wide_gradients else {p: p for p in masters}
        groups = [{**group, "params": [masters[p] for p in group["params"]]} for group in groups]
        self.optimizer = build_optimizer(groups)
        self._trained = [p for group in groups for p in group["params"]]
        if config.optim.master_weights == "kahan":
            add_compensation(self.optimizer, self._trained)

    def forward(self, **inputs: Any) -> MoEOutput:
        return self.model(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()

    def gradient_square(self) -> Tensor:
        gradients = [p.grad for p in self._graded.values() if p.grad is not None]
        return _norm(gradients, self._runtime.device).square()

    def discard(self) -> None:
        for parameter in self._graded.values():
            parameter.grad = None

    def weights_finite(self) -> bool:
        return bool(_norm(list(self._masters.values()), self._runtime.device).isfinite())

    def _stepped(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        return self.optimizer, self._trained

    def step(self, lr: float) -> float:
        for parameter, holder in self._graded.items():
            master = self._masters[parameter]
            if holder is not master and holder.grad is not None:
                master.grad, holder.grad = holder.grad.float(), None
        gradients = [p.grad for p in self._trained if p.grad is not None]
        norm = _norm(gradients, self._runtime.device)
        torch.nn.utils.clip_grads_with_norm_(self._trained, self.clip or float("inf"), norm)
        self._before_step(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._publish()
        return norm.item()

    @torch.no_grad()
    def _decay_rows(self, parameter: nn.Parameter, rows: list[int], factor: float) -> None:
        for row in rows:
            self._masters[parameter][row].mul_(factor)

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy masters into the model where they are different tensors."""
        for parameter, master in self._masters.items():
            if parameter is not master:
                parameter.copy_(master)

    def _row_squares(self, parameter: nn.Parameter) -> Tensor:
        return _gradient(self._graded[parameter]).flatten(1).square().sum(1)

    def gradient(self, name: str) -> Tensor:
        return _gradient(self._graded[self._parameters[name]]).cpu()

    def read(self, name: str, kind: str) -> Tensor:
        parameter = self._parameters[name]
        master = self._masters.get(parameter, parameter)
        state = self.optimizer.state.get(master, {})
        packer = self._packer(kind)
        if packer is not None:
            value = packer.read(master, kind, 0, master.numel()).view(master.shape)
        else:
            value = wide(master, state) if kind == "weight" else state[kind]
        return value.detach().float().cpu()

    def share(self, name: str, kind: str) -> range | None:
        return None

    def write_share(self, name: str, kind: str, flat: Tensor) -> None:
        raise AssertionError("one process holds all of a tensor")

    @torch.no_grad()
    def write(self, name: str, kind: str, tensor: Tensor) -> None:
        parameter = self._parameters[name]
        master, packer = self._masters.get(parameter, parameter), self._packer(kind)
        if kind == "weight":
            if COMPENSATION in self.optimizer.state.get(master, {}):
                self.optimizer.state[master][COMPENSATION].copy_(split(tensor.float())[1])
            master.copy_(tensor)
            parameter.copy_(tensor)
        elif packer is not None:
            packer.write(master, kind, 0, tensor.to(master.device).flatten())
        else:
            self.optimizer.state[master][kind].copy_(tensor)

    def make_optimizer_state(self, steps: int) -> None:
        groups = self.optimizer.param_groups
        self._fill_optimizer_state(self.optimizer, [(p, group) for group in groups for p in group["params"]], steps)


@torch.no_grad()
def _norm(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm over all of them, fp32; 0 of nothing."""
    if not tensors:
        return torch.zeros((), device=device)
    if any(t.dtype == torch.bfloat16 for t in tensors):  # torch's own total would be of bf16 too
        norms = [torch.linalg.vector_norm(t, dtype=torch.float32).to(device) for t in tensors]
        return torch.linalg.vector_norm(torch.stack(norms))
    return torch.nn.utils.get_total_norm(tensors).float().to(device)  # offloaded tensors are on the host


def add_compensation(optimizer: torch.optim.Optimizer, weights: list[Tensor]) -> None:
    """Room for what rounding bf16 weights leaves over (`optim.master_weights: kahan`)."""
    for weight in weights:
        optimizer.state[weight][COMPENSATION] = torch.zeros_like(weight, requires_grad=False)


def _gradient(parameter: Tensor) -> Tensor:
    """fp32; it is there between `backward` and `step`."""
    assert parameter.grad is not None, "there is no gradient yet"
    return parameter.grad.float()


def _move_gradient_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        gradient = _gradient(parameter)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move


class DeepSpeedEngine(_NamedState):
    """Ranks under DeepSpeed: data parallel everywhere, experts spread over `expert_parallel_size` neighbours."""

    def __init__(
        self,
        model: MoEDecoder,
        runtime: Runtime,
        config: Config,
        groups: list[dict],
        build_optimizer: OptimizerFactory,
        fill: Fill | None = None,
    ):
        ep = config.parallel.expert_parallel_size
        self.accumulation = config.accumulation_steps(runtime.world_size)
        _assert_grouped(model, groups)
        given = [{**group, "params": list(group["params"])} for group in groups]  # splitting changes its argument
        chunks = config.parallel.all_to_all_chunks
        if chunks == "auto":
            chunks = 2 if runtime.device.type == "cuda" else 1
        share_sequences(model, config.parallel.sequence_parallel_size, runtime.rank, runtime.world_size)
        contract.adopt_layers(model, ep, runtime.rank, config.parallel.zero_stage, chunks)
        if config.parallel.zero_stage == 3:
            contract.share_out(model, config, runtime.world_size, fill)
        optimizer: Any = build_optimizer(contract.split_groups(groups))
        self.engine, _ = runtime.accelerator.prepare(model, optimizer)
        trained = any(p.requires_grad for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
        assert self.engine.has_moe_layers or not trained, "DeepSpeed does not see the mixture layers"
        self._compensates = config.optim.master_weights == "kahan"
        if config.optim.master_weights != "fp32":
            contract.update_weights_in_place(self.engine.optimizer)
        if self._compensates:
            add_compensation(self.engine.optimizer.optimizer, contract.flat_parameters(self.engine.optimizer))
            contract.link_optimizer_state(self.engine.optimizer)
        super().__init__(model, runtime, config, given, replicas=runtime.world_size // ep, replica=runtime.rank // ep)
        if isinstance(optimizer, Muon | AdamW8bit):
            optimizer.share_of = contract.shares(self.engine.optimizer).__getitem__

    def forward(self, **inputs: Any) -> MoEOutput:
        return self.engine(**inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss * self.accumulation)  # DeepSpeed divides by the number of micro-batches

    def gradient_square(self) -> Tensor:
        return _norm(contract.held_gradients(self.engine.optimizer), self._runtime.device).square()

    def discard(self) -> None:
        contract.discard_step(self.engine)

    def weights_finite(self) -> bool:
        weights = [*contract.flat_parameters(self.engine.optimizer), *contract.held_parameters(self.model)]
        return bool(_norm(weights, self._runtime.device).isfinite())

    def step(self, lr: float) -> float:
        self._before_step(self.engine.optimizer, lr)
        self.engine.step()
        assert not self.engine.optimizer.overflow, "DeepSpeed has left out a step whose gradients are finite"
        return float(self.engine.get_global_grad_norm())

    def _decay_rows(self, parameter: nn.Parameter, rows: list[int], factor: float) -> None:
        contract.decay_rows(parameter, rows, factor, self.engine.optimizer)

    def _publish(self) -> None:
        self.engine.optimizer.update_lp_params()

    def _row_squares(self, parameter: nn.Parameter) -> Tensor:
        return contract.row_gradient_squares(parameter, self.engine.optimizer)

    def gradient(self, name: str) -> Tensor:
        return contract.read_gradient(self._parameters[name]).float().cpu()

    def read(self, name: str, kind: str) -> Tensor:
        parameter = self._parameters[name]
        if not parameter.requires_grad:
            assert kind == "weight", f"{name} is not trained and has no {kind}"
            return contract.read_frozen(parameter, self.engine.optimizer).cpu()
        contract.link_optimizer_state(self.engine.optimizer)
        packer = self._packer(kind)
        if packer is not None:
            return contract.read_moment(parameter, kind, packer, self.engine.optimizer).cpu()
        value = contract.read_full(parameter, kind)
        assert value is not None, f"{name} is in no parameter group of the optimizer"
        if kind == "weight" and self._compensates:
            value = value + contract.read_full(parameter, COMPENSATION)
        return value.cpu()

    def write(self, name: str, kind: str, tensor: Tensor) -> None:
        parameter, value = self._parameters[name], tensor.to(self._runtime.device)
        if self._packer(kind) is not None:
            span = contract.held_span(parameter, kind, self.engine.optimizer)
            assert span is not None, "no rank has all of an optimizer's tensor"
            self.write_share(name, kind, value.flatten()[span.start : span.stop])
            return
        if kind == "weight" and self._compensates and parameter.requires_grad:
            value, left_over = split(value)
            contract.write_full(parameter, COMPENSATION, left_over.float())
        contract.write_full(parameter, kind, value.float())

    def share(self, name: str, kind: str) -> range | None:
        return contract.held_span(self._parameters[name], kind, self.engine.optimizer)

    def write_share(self, name: str, kind: str, flat: Tensor) -> None:
        parameter, value = self._parameters[name], flat.to(self._runtime.device)
        packer = self._packer(kind)
        if packer is not None:
            contract.write_moment(parameter, kind, packer, self.engine.optimizer, value)
            return
        if kind == "weight" and self._compensates:
            value, left_over = split(value)
            contract.write_span(parameter, COMPENSATION, left_over)
        contract.write_span(parameter, kind, value)

    def _stepped(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        optimizer = self.engine.optimizer
        return optimizer.optimizer, contract.flat_parameters(optimizer)

    def map_to_files(self, files: MappedFiles) -> None:
        """Move the optimizer's fp32 weights, which are in host memory, into files, and make its other tensors there."""
        self._allocate = files.empty_like
        contract.replace_masters(self.engine.optimizer, lambda flat: files.empty_like(flat).copy_(flat))
        self.make_optimizer_state(0)

    def make_optimizer_state(self, steps: int) -> None:
        optimizer = self.engine.optimizer
        self._fill_optimizer_state(optimizer.optimizer, contract.flat_parameters_with_groups(optimizer), steps)
        contract.link_optimizer_state(self.engine.optimizer)

    def make_average(self, updates: int) -> None:
        super().make_average(updates)
        contract.link_optimizer_state(self.engine.optimizer)


def save_memory(model: MoEDecoder, config: Config) -> None:
    """Have the model keep for its backward pass what the configuration says."""
    train = config.train
    model.save_memory(
        train.activation_checkpointing if train.recomputes else False,
        offload=train.activation_offload,
        tiles=train.tiled_mlp,
    )


def build_engine(
    model: MoEDecoder,
    runtime: Runtime,
    config: Config,
    groups: list[dict],
    build_optimizer: OptimizerFactory,
    fill: Fill | None = None,
) -> "LocalEngine | DeepSpeedEngine":
    """The engine for this run; `model` is on the CPU and holds this rank's experts only. fill: gives a parameter its
    values, where ZeRO-3 shares out a model without storage."""
    tell("building the engine and its optimizer, which may compile an extension")
    save_memory(model, config)
    if runtime.deepspeed:
        return DeepSpeedEngine(model, runtime, config, groups, build_optimizer, fill)
    return LocalEngine(model, runtime, config, groups, build_optimizer)
