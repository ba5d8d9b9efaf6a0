"""The one file that knows DeepSpeed's private contract for expert parallelism.

DeepSpeed finds mixture layers by class, expert parameters by tags, and reduces the gradients of the latter over
the ranks that hold the same experts. We keep our own router, dispatch and experts, and lend DeepSpeed its class:
`adopt_layers` turns each `MoELayer` of a built model into a subclass of `AutoEPMoELayer` whose `__init__` never runs.
tests/distributed/test_deepspeed_contract.py says at once when a version of DeepSpeed has moved any of this.
"""

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from moe_llm.config import Config
from moe_llm.distributed.adamw_8bit import AdamW8bit
from moe_llm.distributed.deep_ep import dispatcher
from moe_llm.distributed.muon import Piece, Share
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.init import give_buffers_storage, give_storage
from moe_llm.model.moe.experts import MoELayer

_LAUNCHERS = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "ACCELERATE_GRADIENT_CLIPPING",
)


def prepare_environment(cpu: bool, world_size: int) -> None:
    """What DeepSpeed and accelerate read from the environment; before either is imported."""
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # accelerate never engages DeepSpeed when it is told to use the CPU itself
        os.environ["ACCELERATE_USE_CPU"] = "false"
    # accelerate's launcher, where it engages DeepSpeed, has a configuration of its own that would contradict ours
    for name in [name for name in os.environ if name.startswith(_LAUNCHERS)]:
        del os.environ[name]
    if world_size == 1:
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
        }.items():
            os.environ.setdefault(name, value)
    from deepspeed.utils import logger

    from moe_llm.distributed import extension_locks

    extension_locks.install()
    _import_muon_uncompiled()
    _allow_experts_alone()
    _build_no_collectives()
    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    # DeepSpeed calls collectives by names that torch is about to change: a line for each of them, every step
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)


def _import_muon_uncompiled() -> None:
    """DeepSpeed compiles its own Muon when it is imported, which every start does. Nobody calls it here, and torch's
    compiler takes a second of CPU time to load in each rank."""
    compiling = torch.compile
    setattr(torch, "compile", lambda function: function)  # noqa: B010 - which type checkers let pass
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        setattr(torch, "compile", compiling)  # noqa: B010


def _build_no_collectives() -> None:
    """On a CPU DeepSpeed compiles an all-reduce of its own over shared memory when a group starts: half a minute of all
    cores, and a lock that other starts wait for. Only its inference and its tensor parallelism call it, so that nothing
    here ever would; without it they take torch's. May be called again."""
    communication = importlib.import_module("deepspeed.comm.torch")
    setattr(communication, "build_shm_op", lambda: None)  # noqa: B010 - which type checkers let pass


def leave_group() -> None:
    """End the process group of all ranks, and those that DeepSpeed has made of a part of them."""
    import deepspeed.comm

    deepspeed.comm.destroy_process_group()


def _allow_experts_alone() -> None:
    """Let DeepSpeed's bf16 optimizer (ZeRO-1) train experts and nothing else: it stacks the norms of all other gradients,
    of which there then are none. May be called again."""
    from deepspeed.runtime import bf16_optimizer

    real = bf16_optimizer.get_global_norm_of_tensors
    if getattr(real, "takes_none", False):
        return

    @functools.wraps(real)
    def norm(input_tensors: list[torch.Tensor], *arguments: Any, **named: Any) -> torch.Tensor:
        if input_tensors:
            return real(input_tensors, *arguments, **named)
        from deepspeed.accelerator import get_accelerator

        return torch.zeros((), device=get_accelerator().current_device_name())

    norm.takes_none = True  # type: ignore[attr-defined]
    bf16_optimizer.get_global_norm_of_tensors = norm


def plugin(config: Config, world_size: int) -> Any:
    """accelerate's plugin that engages DeepSpeed with our settings."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin(hf_ds_config=engine_config(config, world_size))


def engine_config(config: Config, world_size: int) -> dict:
    """DeepSpeed's configuration, from ours alone: batch sizes, precision and ZeRO stage exist once."""
    stage = config.parallel.zero_stage
    bucket = config.reduce_bucket_size
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": overlaps_communication(config),
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if config.parallel.offload_optimizer != "none":  # files too are host memory to DeepSpeed
        zero["offload_optimizer"] = {
            "device": "cpu",
            "pin_memory": config.train.device != "cpu" and torch.cuda.is_available(),
        }
    if stage == 3:
        # Small tensors (norms, routers) stay whole: gathering them costs more than holding them.
        zero["stage3_param_persistence_threshold"] = 100_000
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        "gradient_clipping": config.optim.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's own fused AdamW updates host tensors as DeepSpeed's CPU Adam does, and is not compiled at the start
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if config.train.precision == "bf16":
        # the check is what leaves out a step in ZeRO-1 and 2: see `discard_step`
        # without the last key ZeRO-1 holds every gradient in bf16 too until the backward pass ends
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        # Sums of gradients, over micro-batches and over ranks, lose what is small in bf16.
        settings["data_types"] = {"grad_accum_dtype": config.parallel.gradient_dtype}
        if config.optim.master_weights != "fp32":
            # the second key only says that no optimizer in host memory is needed: ours keeps its moments in fp32
            settings["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        settings["communication_data_type"] = config.parallel.communication_dtype
    return settings


def overlaps_communication(config: Config) -> bool:
    """Whether gradients are reduced on a stream of their own while the backward pass goes on."""
    if config.parallel.overlap_comm != "auto":
        return config.parallel.overlap_comm
    return config.parallel.zero_stage > 1 and config.train.device != "cpu" and torch.cuda.is_available()


def adopt_layers(
    model: MoEDecoder, expert_parallel_size: int, rank: int, zero_stage: int = 1, all_to_all_chunks: int = 1
) -> None:
    """Make DeepSpeed see our mixture layers: its class, its attributes, its tags on expert parameters.

    The process groups are made by the engine, which calls each layer's `set_deepspeed_parallelism`. Where no expert is
    trained, ZeRO-1 and 2 would insist on experts in the optimizer, so the layers are not of its class; ZeRO-3 does not
    insist, and has to see them, or it would share out each expert over ranks that hold another one.
    """
    from deepspeed.checkpoint import autoep_affine
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    experts = model.config.num_local_experts
    group_name = f"ep_size_{expert_parallel_size}"
    trained = any(p.requires_grad for m in model.modules() if type(m) is MoELayer for p in m.experts.parameters())
    theirs = (AutoEPMoELayer,) if trained or zero_stage == 3 else ()
    adopted = type("ExpertParallelMoELayer", (_EngineContract, MoELayer, *theirs), {})
    for module in model.modules():
        if type(module) is not MoELayer:
            continue
        layer: Any = module  # DeepSpeed hangs its own attributes on modules and parameters
        layer.__class__ = adopted
        layer.num_experts = experts
        layer.num_local_experts = experts // expert_parallel_size
        layer.ep_size = expert_parallel_size
        layer.ep_rank = rank % expert_parallel_size
        layer.ep_group_name = group_name
        layer.ep_group = None
        layer.all_to_all_chunks = all_to_all_chunks
        layer.folding_group_handles = None
        layer.expert_placement_descriptor = autoep_affine.legacy_uniform_autoep_placement_descriptor(
            experts, layer.num_local_experts, expert_parallel_size
        )
        for parameter in layer.experts.parameters():
            parameter.allreduce = False
            parameter.group_name = group_name
            parameter.ds_zero_placement_family = "autoep_expert"
            parameter.ds_zero_partition_group_name = group_name


@torch.no_grad()
def share_out(
    model: MoEDecoder, config: Config, world_size: int, fill: Callable[[str, torch.Tensor], None] | None
) -> None:
    """ZeRO-3: cut each parameter into the ranks' slices before the next one comes to the device. Collective.

    DeepSpeed itself would first move the whole model there. Parameters without storage get it here, and their values by
    `fill`: beyond its slices a rank then holds one whole parameter at a time, on the host and on the device.
    """
    import deepspeed
    from deepspeed.utils import groups

    size = config.parallel.expert_parallel_size
    if f"ep_size_{size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)
    give_buffers_storage(model)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    # of a module without parameters: what makes linear maps forget the weights that are gathered for them
    sharing = deepspeed.zero.Init(
        module=torch.nn.Module(), dtype=dtype, config_dict_or_path=engine_config(config, world_size)
    )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            assert fill is not None, f"{name} has neither storage nor values"
            give_storage(parameter)
            fill(name, parameter)
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
        if getattr(parameter, "ds_zero_placement_family", None) == "autoep_expert":
            replicas = groups._get_expert_data_parallel_group(f"ep_size_{size}")
            setattr(parameter, "ds_zero_partition_process_group", replicas)  # noqa: B010 (no attribute of torch's)
        sharing._convert_to_zero_parameters([parameter])


class _EngineContract:
    """The method through which the engine hands a layer its process group."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_=False, folding_group_handles=None):
        from deepspeed.utils import groups

        assert not use_data_before_expert_parallel_, "experts are spread over neighbouring ranks"
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)
        assert torch.distributed.get_rank(self.ep_group) == self.ep_rank
        if self.ep_size > 1:
            self.dispatcher = dispatcher(self.ep_group, self.ep_size, self.all_to_all_chunks)


def split_groups(groups: list[dict]) -> list[dict]:
    """Optimizer parameter groups in which expert parameters stand apart, as the engine demands."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    split = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in split if group["params"]]  # it leaves groups of experts alone without any


def read_full(parameter: Any, kind: str) -> torch.Tensor:
    """The whole fp32 weight or optimizer tensor of a parameter that is trained (of this rank's experts). Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(parameter, "ds_id"):  # ZeRO-3's own way rounds moments to bf16 where the weights are of it
        optimizer, key = parameter._z3_optimizer, None if kind == "weight" else kind
        piece = optimizer._get_fp32_opt_state_partition(parameter, True, key)[0].detach().to(parameter.device).float()
        return _gathered(parameter, piece, optimizer)
    if kind == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def read_frozen(parameter: Any, optimizer: Any) -> torch.Tensor:
    """The whole of a parameter that is not trained, fp32: the optimizer knows nothing of it. Collective."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float()
    return _gathered(parameter, parameter.ds_tensor.detach(), optimizer).float()


def _gathered(parameter: Any, piece: torch.Tensor, optimizer: Any) -> torch.Tensor:
    """The whole tensor, of which each rank that shares a ZeRO-3 parameter has a slice, the last one padded."""
    group = optimizer._get_param_partition_group(parameter)
    whole = piece.new_empty(piece.numel() * torch.distributed.get_world_size(group))
    torch.distributed.all_gather_into_tensor(whole, piece.contiguous(), group=group)
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


@torch.no_grad()
def decay_rows(parameter: Any, rows: list[int], factor: float, optimizer: Any) -> None:
    """Multiply some rows (along the first dimension) of a parameter's fp32 weight, as far as this rank holds them."""
    if hasattr(parameter, "ds_id"):
        shape, rank = parameter.ds_shape, optimizer._get_param_partition_rank(parameter)
        begin, held = rank * parameter.ds_tensor.numel(), optimizer._get_fp32_opt_state_partition(parameter, False)[0]
    elif parameter._hp_mapping is None:  # all of it is on other ranks
        return
    else:
        shape, mapping = parameter.shape, parameter._hp_mapping
        begin, held = mapping.lp_fragment_address.start, mapping.get_hp_fragment()
    for _, piece in _pieces(held, begin, shape, rows):
        piece.mul_(factor)


def _pieces(
    held: torch.Tensor, begin: int, shape: torch.Size, rows: Iterable[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(row, what a slice holds of it), for rows along the first dimension of a tensor of which `held` is the slice
    that begins at element `begin`."""
    size = shape[1:].numel()
    for row in rows:
        first, last = max(0, row * size - begin), min(held.numel(), (row + 1) * size - begin)
        if first < last:
            yield row, held[first:last]


@torch.no_grad()
def row_gradient_squares(parameter: Any, optimizer: Any) -> torch.Tensor:
    """Squares of the gradient's norm for each row (along the first dimension), of what this rank holds: fp32,
    between backward and step. Slices of all ranks that share a parameter are all of it, once."""
    if hasattr(parameter, "ds_id"):
        shape, rank = parameter.ds_shape, optimizer._get_param_partition_rank(parameter)
        begin, held = rank * parameter.ds_tensor.numel(), optimizer.get_local_fp32_grad_for_param(parameter)
    elif parameter._hp_mapping is None:  # all of it is on other ranks
        return torch.zeros(parameter.shape[0], device=parameter.device)
    else:
        shape, address = parameter.shape, parameter._hp_mapping.lp_fragment_address
        begin = address.start
        held = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
        if held.numel() == parameter.numel():  # in bf16 each rank has the whole gradient, and owns a part of it
            held = held.narrow(0, begin, address.numel)
    squares = torch.zeros(shape[0], device=held.device)
    for row, piece in _pieces(held, begin, shape, range(shape[0])):
        squares[row] = torch.linalg.vector_norm(piece.float()).square()
    return squares


def read_gradient(parameter: Any) -> torch.Tensor:
    """The whole gradient of a parameter (of this rank's experts), between backward and step. Collective."""
    from deepspeed.utils import safe_get_full_grad

    return safe_get_full_grad(parameter)


def write_full(parameter: Any, kind: str, value: torch.Tensor) -> None:
    """Set the fp32 weight (and the model's own copy of it) or an optimizer tensor from the whole tensor.

    Every rank of the parameter's group passes the same value and keeps its own slice.
    """
    key = None if kind == "weight" else kind
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal slices, the last one padded
        optimizer, size = parameter._z3_optimizer, parameter.ds_tensor.numel()
        rank = optimizer._get_param_partition_rank(parameter)
        group = optimizer._get_param_partition_group(parameter)
        padded = torch.nn.functional.pad(
            value.flatten(), (0, size * torch.distributed.get_world_size(group) - value.numel())
        )
        piece = padded[rank * size : (rank + 1) * size]
        optimizer.set_local_hp_param(piece, parameter, key)  # leaves alone what is not trained
        if kind == "weight":
            parameter.ds_tensor.data.copy_(piece)
    elif parameter.requires_grad:
        parameter.set_full_hp_param(value, key)
    if kind == "weight" and parameter.numel() == value.numel():  # not the placeholder of a partitioned one
        parameter.data.copy_(value.view(parameter.shape))


def held_span(parameter: Any, kind: str, optimizer: Any) -> range | None:
    """The elements of a trained parameter's fp32 weight or optimizer tensor that this rank keeps; None: with ZeRO-1 and 2
    every rank has the model's own copy of the weight, and needs all of it."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal slices, the last one padded
        size, count = parameter.ds_tensor.numel(), parameter.ds_numel
        start = min(optimizer._get_param_partition_rank(parameter) * size, count)
        return range(start, min(start + size, count))
    if kind == "weight":
        return None
    if parameter._hp_mapping is None:  # all of it is on other ranks
        return range(0)
    address = parameter._hp_mapping.lp_fragment_address
    return range(address.start, address.start + address.numel)


@torch.no_grad()
def write_span(parameter: Any, kind: str, flat: torch.Tensor) -> None:
    """Set what this rank keeps of a trained parameter: see `held_span`."""
    key = None if kind == "weight" else kind
    if hasattr(parameter, "ds_id"):
        piece = torch.nn.functional.pad(flat, (0, parameter.ds_tensor.numel() - flat.numel()))
        parameter._z3_optimizer.set_local_hp_param(piece, parameter, key)
        if key is None:
            parameter.ds_tensor.data.copy_(piece)
    elif parameter._hp_mapping is not None:
        parameter._hp_mapping.get_hp_fragment(optim_state_key=key).view(-1).copy_(flat)


@torch.no_grad()
def update_weights_in_place(optimizer: Any) -> None:
    """Let the torch optimizer step on the model's own bf16 weights, of which DeepSpeed has made a copy."""
    if not hasattr(optimizer, "parallel_partitioned_bit16_groups"):  # ZeRO-3
        for flat, own in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True
        ):
            flat.data = own.data
        return
    for i, flat in enumerate(optimizer.single_partition_of_fp32_groups):
        rank = torch.distributed.get_rank(optimizer.real_dp_process_group[i])
        flat.data = optimizer.parallel_partitioned_bit16_groups[i][rank]
    optimizer._link_all_hp_params()


@torch.no_grad()
def replace_masters(optimizer: Any, moved: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let the torch optimizer step on other tensors of the same values, which `moved` gives of one after the other."""
    for flat in flat_parameters(optimizer):
        flat.data = moved(flat.data)
    if hasattr(optimizer, "_link_all_hp_params"):  # ZeRO-1 and 2
        optimizer._link_all_hp_params()


def flat_parameters(optimizer: Any) -> list[torch.Tensor]:
    """The slices (fp32, but for `optim.master_weights`) that the torch optimizer behind the engine's optimizer steps on."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO-3
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # ZeRO-1 in bf16
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


def flat_parameters_with_groups(optimizer: Any) -> list[tuple[torch.Tensor, dict]]:
    """The same, each with its parameter group."""
    flat, groups = flat_parameters(optimizer), optimizer.param_groups
    if hasattr(optimizer, "sub_group_to_group_id"):  # ZeRO-3
        return [(piece, groups[optimizer.sub_group_to_group_id[i]]) for i, piece in enumerate(flat)]
    return list(zip(flat, groups, strict=True))


def shares(optimizer: Any) -> dict[torch.Tensor, Share]:
    """Of each flat slice that the torch optimizer steps on: which pieces of which parameters it is. Slices of ZeRO-3 are not
    gathered as a whole, and so have no ranks."""
    in_parts = hasattr(optimizer, "fp32_partitioned_groups_flat")
    groups = (
        optimizer.fp16_groups
        if in_parts
        else optimizer.bf16_groups
        if hasattr(optimizer, "bf16_groups")
        else optimizer.bit16_groups
    )
    ranks = [None] * len(groups) if in_parts else optimizer.real_dp_process_group
    found = {}
    for flat, parameters, group in zip(flat_parameters(optimizer), groups, ranks):
        pieces = [_piece(p, optimizer) for p in parameters]
        found[flat] = Share([piece for piece in pieces if piece is not None], group)
    return found


def _piece(parameter: Any, optimizer: Any) -> Piece | None:
    """What this rank's slice has of a trained parameter; None: nothing."""
    if hasattr(parameter, "ds_id"):  # the last rank's part is padded
        _, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = optimizer._get_param_partition_rank(parameter) * parameter.ds_tensor.numel()
        length = min(length, parameter.ds_numel - first)
        return Piece(tuple(parameter.ds_shape), first, start, length) if length > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    address = mapping.hp_fragment_address
    return Piece(tuple(parameter.shape), mapping.lp_fragment_address.start, address.start, address.numel)


def _flat_of(parameter: Any, optimizer: Any) -> torch.Tensor:
    """The slice in which this rank has its piece of a trained parameter."""
    if hasattr(parameter, "ds_id"):
        index: int = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
    else:
        index = parameter._hp_mapping.param_group_index
    return flat_parameters(optimizer)[index]


def read_moment(parameter: Any, kind: str, moments: AdamW8bit, optimizer: Any) -> torch.Tensor:
    """The whole of an optimizer tensor that is held in few bits (of this rank's experts), fp32. Collective."""
    piece = _piece(parameter, optimizer)
    held = None if piece is None else moments.read(_flat_of(parameter, optimizer), kind, piece.start, piece.length)
    if hasattr(parameter, "ds_id"):
        whole = torch.zeros(parameter.ds_tensor.numel(), device=parameter.device)
        if held is not None:
            whole[: held.numel()] = held
        return _gathered(parameter, whole, optimizer)
    whole = torch.zeros(parameter.numel(), device=parameter.device)
    if piece is not None and held is not None:
        whole[piece.first : piece.first + piece.length] = held
    torch.distributed.all_reduce(whole, group=parameter._dp_group)
    return whole.view(parameter.shape)


def write_moment(parameter: Any, kind: str, moments: AdamW8bit, optimizer: Any, flat: torch.Tensor) -> None:
    """Set this rank's part of it (see `held_span`)."""
    piece = _piece(parameter, optimizer)
    if piece is not None:
        moments.write(_flat_of(parameter, optimizer), kind, piece.start, flat)


def held_parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """The model's own parameters, or this rank's slices of them (ZeRO-3)."""
    return [getattr(p, "ds_tensor", p).detach() for p in model.parameters()]


def held_gradients(optimizer: Any) -> list[torch.Tensor]:
    """This rank's slices of the reduced and accumulated gradients, between backward and step.

    Slices of all ranks together are every gradient once: replicas share them out.
    """
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # ZeRO-1 in bf16
        return optimizer.fp32_groups_gradient_flat_partition
    if offloads(optimizer):  # the gradients lie with the masters in host memory
        return [piece.grad for piece in flat_parameters(optimizer) if piece.grad is not None]
    groups = [group for group in optimizer.averaged_gradients.values() if group is not None]
    return [gradient for group in groups for gradient in group if gradient is not None and gradient.numel()]


def offloads(optimizer: Any) -> bool:
    """Whether the optimizer's tensors, and this rank's slices of the gradients, are in host memory."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


@torch.no_grad()
def discard_step(engine: Any) -> None:
    """End a step without an update.

    DeepSpeed does that itself, with all its own bookkeeping, when it finds the gradient's norm not finite: so every
    rank makes it so. (Here, too, the loss alone may be what is not finite.)
    """
    optimizer = engine.optimizer
    # ZeRO-1 in bf16 takes the norm from whole gradients, of which every rank has its own sum
    gradients = getattr(optimizer, "fp32_groups_gradients_flat", None) or held_gradients(optimizer)
    for gradient in gradients:
        gradient.view(-1)[0] = float("nan")
    if offloads(optimizer):  # then it takes the norm from what it has noted of each gradient on the way to the host
        for norm in optimizer.norm_for_param_grads.values():
            norm.fill_(float("nan"))
    engine.step()
    assert optimizer.overflow, "DeepSpeed has taken a step whose gradients are not finite"


def link_optimizer_state(optimizer: Any) -> None:
    """Let parameters find their slices of the optimizer's tensors (ZeRO-1 and 2).

    DeepSpeed links them once, in the step of the first parameter group, when the other groups have no state yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
