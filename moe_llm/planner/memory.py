"""What one rank holds at its fullest moment in a training step, by arithmetic alone.

The walk follows the code: which tensors each operation keeps for its backward pass (`model`, `ops`), in which order
they go, where gradients are kept and copied (`parallel`), and what DeepSpeed 0.19 allocates besides. The same walk
serves CPUs and GPUs; `Kernels` says which variant of an operation runs there. scripts/benchmarks/plan_memory.py holds
it against measurement.

Letters in names, as in the tensors' names elsewhere: T tokens of a micro-batch, D hidden, F expert width, E experts,
K experts per token, H query heads, G key-value heads, d head dimension, V vocabulary, N = T * K routed rows.
"""

from dataclasses import dataclass, replace

from moe_llm.config import Config
from moe_llm.config.optim import OPTIMIZERS
from moe_llm.config.routers import LorySettings
from moe_llm.planner.layout import Layout, held_parameters, trained_parameters

PARTS = ("weights", "gradients", "optimizer", "activations", "all_to_all", "loss", "buffers")
# DeepSpeed's own defaults, which `distributed.deepspeed.engine_config` leaves as they are (deepspeed/runtime/zero/
# config.py, version 0.19.8): sub_group_size and stage3_max_live_parameters, in elements.
SUB_GROUP, MAX_LIVE = 1_000_000_000, 1_000_000_000
_LOGITS_CHUNK = 32 * 2**20  # moe_llm.ops.cross_entropy: logits of one chunk
_PORTION = 8  # moe_llm.ops.merged_expert_mlp: mixtures that exist at once


@dataclass(frozen=True)
class Kernels:
    """Which variant of an operation a device runs, as far as memory differs.

    fused_experts: experts gather their own rows (`ops.expert_mlp`), so that of the routed rows only the gate and
    up projections are kept; otherwise the rows themselves are too (`ops.expert_mlp_grouped`).
    wide_softmax: the loss turns a chunk's logits into fp32 probabilities (without the C++ kernels).
    chunks: `parallel.all_to_all_chunks: auto`.
    keeps_attention: `selective` recomputation keeps attention's output (by the names of CUDA's kernels).
    """

    fused_experts: bool
    wide_softmax: bool
    keeps_attention: bool
    chunks: int


KERNELS = {
    "cpu": Kernels(fused_experts=True, wide_softmax=False, keeps_attention=False, chunks=1),
    "cuda": Kernels(fused_experts=False, wide_softmax=True, keeps_attention=True, chunks=2),
}


@dataclass(frozen=True)
class Memory:
    """Bytes by part at the fullest moment of a step, and when that is."""

    parts: dict[str, float]
    phase: str
    host: float = 0.0  # bytes of host memory that the rank's optimizer and activations take, with offload
    disk: float = 0.0  # bytes of the rank's optimizer in files of `parallel.nvme_path`
    host_at_start: float = 0.0  # bytes of host memory in which the rank's weights are made before the device has them

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def host_needed(self) -> float:
        """Bytes of host memory that the rank needs at one time or another."""
        return max(self.host, self.host_at_start)


def step_memory(config: Config, layout: Layout, kernels: Kernels, imbalance: float = 1.0) -> Memory:
    """The fullest moment of a rank in a step that is not the first.

    Args:
        imbalance: rows of the busiest rank (and expert) over its even share.
    """
    return _Walk(config, layout, kernels, imbalance).fullest()


def offloaded_activations(config: Config, layout: Layout, kernels: Kernels) -> float:
    """Bytes that a rank's layers keep for the backward pass of a micro-batch (`train.activation_offload`)."""
    return config.model.num_moe_layers * sum(_Walk(config, layout, kernels, 1.0).kept_by_layer().values())


class _Walk:
    """Goes through a step, with what is held at each moment as a dictionary of parts."""

    def __init__(self, config: Config, layout: Layout, kernels: Kernels, imbalance: float):
        self.config, self.model, self.layout, self.kernels = config, config.model, layout, kernels
        self.imbalance = imbalance
        self.size = 4 if config.train.precision == "fp32" else 2  # bytes of a weight or activation
        # of a gradient in the sum over micro-batches; of what the optimizer updates, beyond the bf16 weights themselves
        self.summed = 2 if config.parallel.gradient_dtype == "bf16" else 4
        self.masters = {"fp32": 4, "kahan": 2, "stochastic_rounding": 0}[config.optim.master_weights]
        # DeepSpeed's BF16_Optimizer holds fp32 sums of whole gradients
        self.whole_sums = layout.zero_stage == 1 and self.size == 2 and self.summed == 4
        self.tokens = layout.micro_batch * config.data.sequence_length / layout.sequence_parallel
        self.rows = self.tokens * self.model.router.active_experts(self.model)
        self.elsewhere = layout.expert_parallel > 1
        # where tokens have different numbers of rows, the fused gather does not take them
        even = self.model.router.even
        self.autograd = bool(self.model.expert_dropout)  # then torch's own operations compute the experts
        self.tiles = config.train.tiled_mlp
        self.fused = kernels.fused_experts and not self.elsewhere and even and not self.autograd and self.tiles == 1
        self.received = self.rows * (imbalance if self.elsewhere else 1)
        chunks = config.parallel.all_to_all_chunks
        self.parts = (kernels.chunks if chunks == "auto" else chunks) if self.elsewhere else 1
        self.local_experts = self.model.num_local_experts // layout.expert_parallel
        self.engine = layout.ranks > 1 or config.parallel.engine == "deepspeed"
        self.rounds = max(1, config.train.global_batch_size // (layout.micro_batch * layout.readers))
        self.trained = trained_parameters(config, layout)
        dense, expert = held_parameters(config, layout)
        self.dense, self.expert = dense + self.trained.adapters[0], expert + self.trained.adapters[1]
        self.shard = self.dense / layout.ranks + self.expert / layout.replicas
        self.trained_shard = self.trained.dense / layout.ranks + self.trained.expert / layout.replicas
        self.bucket = planned_bucket(config, layout)
        self.sent = 2 if config.parallel.communication_dtype == "bf16" and self.size == 2 else 4
        self.overlaps = overlaps(config, layout, kernels)
        self.moments: list[Memory] = []
        self.host = self.disk = self.around_experts = 0.0

    # what is held throughout

    def weights(self, held: float) -> float:
        """Bytes of so many parameters; of experts that are packed, their bits and an fp32 scale for each 64 elements."""
        kind, packed = self.config.finetune.quantize_frozen, held_parameters(self.config, self.layout)[1]
        if kind is None:
            return self.size * held
        return self.size * (held - packed) + packed * ({"int8": 1.0, "nf4": 0.5}[kind] + 4 / 64)

    def static(self) -> dict[str, float]:
        size, held, stage = self.size, self.dense + self.expert, self.layout.zero_stage
        trained = self.trained.total
        kept = OPTIMIZERS[self.config.optim.name].nbytes
        # what Muon leaves to AdamW has a second moment, and embeddings have moments of 32 bits; routers and norms are too
        # small to count
        second = {
            "muon": 4 * (self.trained.head + self.trained.embeddings),
            "adamw_8bit": (8 - kept) * self.trained.embeddings,
        }.get(self.config.optim.name, 0)
        kept += 4 if self.config.checkpoint.ema.decay is not None else 0
        parts = dict.fromkeys(PARTS, 0.0)
        if not self.engine:
            parts["weights"] = self.weights(held)
            parts["optimizer"] = (kept + (self.masters if size == 2 else 0)) * trained + second
            parts["gradients"] = self.summed * trained if self.rounds > 1 else 0
            return parts
        parts["weights"] = size * self.shard if stage == 3 else self.weights(held)
        # ZeRO-1 and 2 clone fp32 weights as masters too; ZeRO-3 steps on the shard itself
        optimizer = (kept + (0 if stage == 3 and size == 4 else self.masters)) * self.trained_shard
        optimizer += second / self.layout.ranks
        offload = self.layout.offload
        parts["optimizer"] = 0.0 if offload else optimizer
        in_memory = (
            kept * self.trained_shard + second / self.layout.ranks if self.config.optim.name == "adamw_8bit" else 0
        )
        self.disk = optimizer - in_memory if self.layout.nvme else 0.0
        self.host = optimizer - self.disk + 4 * self.trained_shard if offload else 0.0
        if offload:  # accumulated in host memory; ZeRO-1 holds the micro-batches' sum until it is reduced
            parts["gradients"] = size * trained if stage == 1 else 0.0
        elif stage == 1:
            # else the parameters' own gradients
            parts["gradients"] = 4 * trained if self.whole_sums else size * trained if self.rounds > 1 else 0
        else:
            parts["gradients"] = self.summed * self.trained_shard
        if stage == 3:
            parts["buffers"] += self.sent * self.bucket
        elif not self.whole_sums:  # with overlap the next one is filled while one is reduced
            parts["buffers"] += size * self.bucket * (2 if self.overlaps else 1)
        return parts

    def gathered(self) -> dict[str, float]:
        """Weights that ZeRO-3 has gathered during the passes; none are in the optimizer's step."""
        if not self.engine or self.layout.zero_stage < 3:
            return {}
        return {"weights": self.size * min(self.dense + self.expert, max(MAX_LIVE, self.largest_module))}

    @property
    def largest_module(self) -> int:
        return max(self.layer_experts, self.model.resolved_vocab_size * self.model.hidden_size)

    @property
    def layer_experts(self) -> int:
        return self.model.held_expert_parameters(self.layout.expert_parallel)

    @property
    def layer_dense(self) -> float:
        counts = self.model.parameter_counts()
        dense = counts["attention"] + counts["router"] + counts.get("shared_experts", 0)
        return dense / self.model.num_hidden_layers + 2 * self.model.hidden_size

    # what the forward pass keeps

    def layer(self) -> dict[str, float]:
        """Of one layer, for its backward pass."""
        m, size, tokens = self.model, self.size, self.tokens
        hidden = tokens * m.hidden_size * size
        heads, groups, d = m.num_attention_heads, m.kv_heads, m.attention_head_dim
        if m.attention_sinks:  # eight more elements a head, and a mask over all pairs of a block: `ops.attention_sinks`
            d += 8
        attention = hidden + 2 * tokens * (heads + groups) * d * size + 4 * tokens * heads
        attention += tokens * self.config.data.sequence_length * (size + 1) * m.attention_sinks  # as bools too
        norms = 2 * hidden + 8 * tokens
        # logits and probabilities of the router; indices and weights of the choices
        router = tokens * (8 * m.num_local_experts * m.router.parts_per_token + 60 * m.router.active_experts(m))
        if m.router_jitter_noise:
            router += 8 * tokens * m.hidden_size  # the noise, and the input times the noise, in fp32
        # tiles compute projections again, and so keep the rows that go into them
        experts = hidden + self.received * 2 * m.expert_width * size * (self.tiles == 1)
        experts += self.rows * m.expert_hidden_size * size * (self.tiles > 1)
        experts += tokens * m.router.entered_per_token(m) * size
        if m.router.merges:
            experts = hidden  # the tokens in their segments; all else is computed again
        elif self.autograd:
            # silu(gate), the activations after dropout and its mask; unweighted outputs, for the weights' gradient
            experts += self.received * (m.expert_width * (2 * size + 1) + m.expert_hidden_size * size)
        # of the shared experts gate, its silu, up and their product, as torch's own operations keep them, and outputs
        experts += tokens * 4 * m.shared_width * size * (self.tiles == 1)
        experts += hidden * (m.shared_expert_gate + bool(m.shared_width and m.expert_dropout))
        exchanged = 0.0
        if self.elsewhere and not m.router.merges:
            exchanged = (self.received + self.rows) * m.expert_hidden_size * size  # rows received; rows that came back
        elif not self.fused and not m.router.merges:
            experts += self.rows * m.expert_hidden_size * size
        self.around_experts = attention + norms + router
        return {"activations": attention + norms + router + experts, "all_to_all": exchanged}

    def dense_block(self) -> float:
        """What stays of a block without experts until the backward pass comes to it."""
        m, hidden = self.model, self.tokens * self.model.hidden_size * self.size
        if self.layout.recompute:
            return 2 * hidden
        attention = 2 * self.tokens * (m.num_attention_heads + m.kv_heads) * m.attention_head_dim * self.size
        return 4 * hidden + attention + 4 * self.tokens * m.dense_width * self.size * (self.tiles == 1)

    def kept_by_layer(self) -> dict[str, float]:
        """What stays of a layer until the backward pass comes to it."""
        if not self.layout.recompute:
            return self.layer()
        m, size = self.model, self.size
        kept, exchanged = self.layer_inputs(), 0.0
        if self.layout.selective:
            kept += (
                self.tokens * m.num_attention_heads * (m.attention_head_dim * size + 4) * self.kernels.keeps_attention
            )
            if self.elsewhere and not m.router.merges:
                exchanged = (self.received + self.rows) * m.expert_hidden_size * size
            if self.layout.sequence_parallel > 1:  # heads for positions, and back
                groups = max(m.kv_heads, self.layout.sequence_parallel)
                exchanged += 2 * self.tokens * (m.num_attention_heads + groups) * m.attention_head_dim * size
        return {"activations": kept, "all_to_all": exchanged}

    def layer_inputs(self) -> float:
        """What recomputation begins with: the residual stream, what is to be added to it, and the choices of experts."""
        return 2 * self.tokens * self.model.hidden_size * self.size + 12 * self.rows  # top-k: `model.recomputation`

    def shared(self) -> float:
        """Kept once: token ids, labels, positions, documents and mask, cosines and sines."""
        m, tokens = self.model, self.tokens
        ids = 8 * 4 * tokens + tokens + (4 * tokens if self.config.data.isolate_documents else 0)
        return ids + 2 * tokens * m.attention_head_dim * self.size

    # what operations need while they run

    def experts_forward(self) -> dict[str, float]:
        m, size = self.model, self.size
        if m.router.merges:
            return self.merging(merged=1, activations=2 * self.tokens * m.hidden_size)
        largest = self.largest_rows * m.expert_width if self.fused else self.received * m.expert_width
        largest *= 1 if self.tiles == 1 else 3 / self.tiles  # with the projections, which are not kept
        rows = self.received * m.expert_hidden_size * size
        if self.elsewhere:
            return {"activations": size * largest + rows, "all_to_all": 2 * rows}
        gathered = self.largest_rows * m.expert_hidden_size if self.fused else 0
        return {"activations": size * (largest + gathered) + rows, "all_to_all": 0.0}

    def merging(self, merged: int, activations: float) -> dict[str, float]:
        """Weights of a portion of the mixtures, `merged` times, its rows, and the experts that come from elsewhere."""
        m, size = self.model, self.size
        assert isinstance(m.router, LorySettings), "no other router merges experts"
        layer, rows = 3 * m.hidden_size * m.intermediate_size, min(_PORTION * m.router.segment_length, self.tokens)
        activations += merged * (_PORTION * layer + 3 * rows * m.intermediate_size)
        return {"activations": size * activations, "all_to_all": size * m.num_local_experts * layer * self.elsewhere}

    @property
    def largest_rows(self) -> float:
        """Rows of the busiest expert that is here."""
        return self.rows / self.model.num_local_experts * max(self.imbalance, 1.1)

    def experts_backward(self) -> dict[str, float]:
        m, size = self.model, self.size
        if m.router.merges:
            held = self.merging(merged=2, activations=3 * self.tokens * m.hidden_size)
            # gradients of all experts, summed in fp32, and what a portion adds to the larger of the two weights
            whole = m.num_local_experts * m.hidden_size * m.intermediate_size
            return {**held, "activations": held["activations"] + whole * (3 * 4 + 2 * size)}
        hidden, rows = self.tokens * m.hidden_size * size, self.received * m.expert_hidden_size * size
        # gradients on their way: of the residual stream, of the layer's output, of the experts' input
        flowing = 2 * hidden + rows
        if self.fused or (self.kernels.fused_experts and self.elsewhere and not self.autograd and self.tiles == 1):
            busy = self.largest_rows if self.fused else self.received / self.local_experts * 1.1
            # hidden activations and their gradient have one buffer, the projections' gradients take the place of these
            work = size * busy * (m.expert_width + (2 * m.expert_hidden_size if self.fused else 0))
        else:
            # rows travel and are worked on in parts
            part = size * self.received / (self.parts * self.tiles)
            again = 2 * m.expert_width + m.expert_hidden_size if self.tiles > 1 else 0
            work = part * (4 * m.expert_width + m.expert_hidden_size + again)
        exchanged = 2 * rows if self.elsewhere else 0.0
        return {"activations": flowing + work, "all_to_all": exchanged}

    def loss_chunk(self) -> float:
        """Logits of a chunk, their gradient in place, and what turns the one into the other. A chunk's logits are
        there until the next one's have been formed."""
        m = self.model
        chunk = min(self.tokens, max(1, _LOGITS_CHUNK // m.resolved_vocab_size))
        logits = chunk * m.resolved_vocab_size * self.size
        product = m.resolved_vocab_size * m.hidden_size * self.size if self.size == 2 and self.tokens > chunk else 0
        following = min(chunk, self.tokens - chunk) * m.resolved_vocab_size * self.size
        return logits + max(following, product, 4 * chunk * m.resolved_vocab_size if self.kernels.wide_softmax else 0)

    @property
    def head_gradient(self) -> float:
        """The head's gradient as the loss accumulates it, from the forward pass on; none where the head is frozen."""
        if not (self.trained.head or (self.model.tie_word_embeddings and self.trained.embeddings)):
            return 0.0
        chunk = max(1, _LOGITS_CHUNK // self.model.resolved_vocab_size)
        wide = 4 if self.tokens > chunk else self.size
        return wide * self.model.resolved_vocab_size * self.model.hidden_size

    # gradients that the backward pass has left behind

    def left_behind(self, parameters: float) -> float:
        """Bytes that `parameters` of them take until the optimizer's step, beyond what is held throughout."""
        if not self.engine:
            return 0 if self.rounds > 1 else self.summed * parameters
        if self.layout.zero_stage == 1:
            return 0 if self.whole_sums or self.rounds > 1 else self.size * parameters
        return 0  # reduced from the bucket into the shard

    @property
    def largest_tensor(self) -> float:
        """Parameters of the largest one that is trained."""
        adapted = any(self.trained.adapters)
        experts = self.trained.layer_experts * (0.5 if adapted else 2 / 3)  # gate and up are one
        return max(experts, self.trained.head, self.trained.embeddings, self.trained.layer_dense / 2)

    def reduction(self) -> float:
        """Copies of gradients while they are reduced over ranks."""
        if not self.engine:
            return 0.0
        whole, largest = self.trained.total, self.largest_tensor
        if self.layout.zero_stage == 3:  # as wide as it is sent; of several tensors, a copy by ranks
            return max(self.sent * min(self.bucket, whole), (self.sent if largest > self.bucket else 0) * largest)
        # slices by rank, copied together up to a bucket and one more, and widened
        replicas = self.layout.replicas if self.trained.expert else self.layout.ranks
        at_once = min(whole, max(self.bucket, min(largest, self.bucket + largest / replicas)))
        return (self.size + (self.sent if self.sent > self.size else 0)) * at_once

    # the walk

    def at(self, phase: str, *held: dict[str, float]) -> None:
        parts = dict.fromkeys(PARTS, 0.0)
        for piece in held:
            for part, size in piece.items():
                parts[part] += size
        self.moments.append(Memory(parts, phase))

    def fullest(self) -> Memory:
        m, size = self.model, self.size
        static, layer, kept = self.static(), self.layer(), self.kept_by_layer()
        layers, hidden = m.num_moe_layers, self.tokens * m.hidden_size * size
        base = {**self.gathered(), "activations": self.shared() + (m.num_hidden_layers - layers) * self.dense_block()}

        def times(count: float, parts: dict[str, float]) -> dict[str, float]:
            return {part: count * value for part, value in parts.items()}

        if self.engine and self.layout.zero_stage == 3:
            # a parameter is shared out before the next one comes (`distributed.deepspeed.share_out`)
            self.at("start, weights made and shared out", {"weights": size * (self.shard + self.largest_parameter)})
        offload = self.config.train.activation_offload

        inputs = {"activations": self.layer_inputs()} if self.layout.recompute else {}
        rest = {part: value - inputs.get(part, 0.0) for part, value in kept.items()}

        def waiting(layers: float, under_way: int = 0) -> dict[str, float]:
            """What so many layers keep, on the device, beside `under_way` layers, of which what recomputation begins with
            is counted here and all else with them. Offloaded: of one layer more than is under way."""
            waits = min(layers, 1) if offload else layers
            begins = times(waits + (under_way if self.layout.recompute else 0), inputs)
            return {part: begins.get(part, 0.0) + value for part, value in times(waits, rest).items()}

        if offload:
            self.host += layers * sum(kept.values())
        all_kept = waiting(layers)
        self.at("forward, last layer", static, base, waiting(layers - 1), layer, self.experts_forward())
        # the rows that have a target, the gradient of these; what the last norm keeps until its backward pass
        loss = {"loss": 2 * hidden + self.head_gradient, "activations": 2 * hidden}
        self.at("loss", static, base, all_kept, loss, {"loss": self.loss_chunk()})
        trained = self.trained
        # the loss's backward pass scales what its forward pass has made
        self.at(
            "loss, backward",
            static,
            base,
            all_kept,
            loss,
            {"loss": hidden, "gradients": self.new_gradient(trained.head) + self.taken(trained.head, trained.head)},
        )
        for index in range(layers - 1, -1, -1):
            done = trained.head + (layers - 1 - index) * (trained.layer_experts + trained.layer_dense)
            behind = {"gradients": self.left_behind(done)}
            before = waiting(index, under_way=1)
            own = {"gradients": self.new_gradient(trained.layer_experts)}
            self.at(f"backward, layer {index}", static, base, before, layer, behind, own, self.experts_backward())
            so_far = done + trained.layer_experts + trained.layer_dense
            # what the experts have kept is gone once their gradients are there
            after = {"activations": self.around_experts + 2 * hidden}
            copies = {"gradients": self.taken(trained.layer_experts, so_far)}
            self.at(f"backward, layer {index}, gradients", static, base, before, after, behind, own, copies)
        whole = trained.total
        self.at(
            "backward, embeddings",
            static,
            {**self.gathered(), "activations": 2 * hidden},
            {
                "gradients": self.left_behind(whole - trained.embeddings)
                + self.new_gradient(trained.embeddings)
                + self.taken(trained.embeddings, whole)
            },
        )
        self.at("optimizer", static, {"gradients": self.left_behind(whole)}, self.optimizer_step())
        return replace(
            max(self.moments, key=lambda moment: moment.total),
            host=self.host,
            disk=self.disk,
            host_at_start=self.made_on_host(),
        )

    @property
    def largest_parameter(self) -> float:
        m = self.model
        assert m.vocab_size is not None, "plans know the vocabulary"
        if m.single_expert_sizes is not None:
            return max(2 * max(m.single_expert_sizes) * m.expert_hidden_size, m.vocab_size * m.hidden_size)
        return max(2 * self.local_experts * m.expert_parameters / 3, m.vocab_size * m.hidden_size)

    def made_on_host(self) -> float:
        """Weights are made in host memory: one parameter at a time under ZeRO-3."""
        one_by_one = self.engine and self.layout.zero_stage == 3
        return self.size * (self.largest_parameter if one_by_one else self.dense + self.expert)

    def new_gradient(self, parameters: float) -> float:
        """Of an operation's weights, when it has just been computed and, in one process, copied into an fp32 one."""
        copied = self.size == 2 < self.summed and not self.engine and self.rounds == 1
        return self.size * parameters + (4 * parameters if copied else 0)

    def taken(self, parameters: float, so_far: float) -> float:
        """Copies while a gradient is added to the sums or reduced, which is when the operation has ended. so_far: how many
        parameters have their gradient by then, which is when the bucket overflows for the first time."""
        if not self.engine:
            return 0.0
        if self.whole_sums:  # made fp32, a tensor at a time
            return 4 * min(parameters, self.largest_tensor)
        return self.reduction() if self.layout.zero_stage > 1 and so_far > self.bucket else 0.0

    def optimizer_step(self) -> dict[str, float]:
        narrow = self.config.optim.master_weights != "fp32"
        if not self.engine:  # gradients become fp32 for fp32 masters, one after the other
            return {"gradients": (4 - self.summed) * self.trained.total} if self.size == 2 and not narrow else {}
        stage = self.layout.zero_stage
        if not OPTIMIZERS[self.config.optim.name].elementwise:  # slices are gathered in bf16, and a group's direction
            whole = max(self.trained.dense, self.trained.expert) if self.layout.ranks > 1 else 0
            return {"buffers": 2 * whole + 4 * max(self.trained.dense, self.trained.expert)}
        largest = max(self.trained.dense / self.layout.ranks, self.trained.expert / self.layout.replicas)
        if self.layout.offload:
            return {"buffers": self.size * largest}  # updated weights on their way from the host
        if self.whole_sums:  # copies of a bucket and one tensor more, while gradients are reduced
            return {"buffers": 4 * min(self.bucket + self.largest_tensor, max(self.trained.dense, self.trained.expert))}
        if stage == 3:
            return {"buffers": (2 if narrow else 4) * min(SUB_GROUP, largest)}
        # a flat copy of the gradients, and that as wide as the weights
        return {"buffers": (2 if narrow else 4 if self.summed == 4 else 6) * largest}


def planned_bucket(config: Config, layout: Layout) -> int:
    """Elements of DeepSpeed's reduction bucket in a layout, which may not be the configuration's own."""
    parallel = config.parallel.model_copy(update={"expert_parallel_size": layout.expert_parallel})
    return config.model_copy(update={"parallel": parallel}).reduce_bucket_size


def overlaps(config: Config, layout: Layout, kernels: Kernels) -> bool:
    """Whether gradients are reduced while the backward pass goes on, out of one of two buckets."""
    asked = config.parallel.overlap_comm
    return layout.zero_stage == 2 and (kernels is KERNELS["cuda"] if asked == "auto" else asked)
