"""A model in training as tensors in dictionaries, on ranks that are threads: every layout, no engine."""

import threading
from collections.abc import Callable

import torch

from moe_llm.config import ModelConfig, load_config
from moe_llm.distributed.state import EMA, ParameterShard
from moe_llm.families import hf

KINDS = ("exp_avg", "exp_avg_sq")


def small_config(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": 24,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(sizes | changes))


def run_config(tmp_path, *overrides):
    path = tmp_path / "run.yaml"
    path.write_text("data: {sources: [{type: python_stdlib}]}\nmodel: {vocab_size: 24}\ntrain: {max_steps: 5}\n")
    return load_config(path, overrides)


def random_tensors(config: ModelConfig, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> dict:
    """(name, kind) -> the whole tensor, fp32, for "weight" and the optimizer's kinds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        (name, kind): torch.randn(shape, generator=generator)
        for name, shape in hf.parameter_shapes(config).items()
        for kind in ("weight", *kinds)
    }


class ThreadRanks:
    """What the ranks of one run share: a barrier and a board to write values on."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=20)
        self.board = [None] * world_size

    def exchange(self, rank: int, value):
        self.board[rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def run(self, work: Callable[[int], object]) -> list:
        """`work(rank)` on every rank at once: (result, exception) by rank."""
        outcomes = [(None, None)] * self.world_size

        def one(rank):
            try:
                outcomes[rank] = (work(rank), None)
            except Exception as error:  # noqa: BLE001 (handed to the test)
                outcomes[rank] = (None, error)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes


class ThreadRank:
    """One rank of `ThreadRanks`, to whom its thread does not matter."""

    def __init__(self, ranks: ThreadRanks, rank: int):
        self.ranks, self.rank, self.world_size = ranks, rank, ranks.world_size

    def gather(self, value):
        return self.ranks.exchange(self.rank, value)


class FakeState:
    """A `TrainedState`: dense tensors whole, experts shared out over `ep` neighbouring ranks.

    Collective calls are checked to be the same on all ranks. `sliced`: it needs only a slice of each tensor. With
    tensors of kind `EMA` there is an average, of as many updates as `averaged`.
    """

    sliced = False

    def __init__(
        self,
        tensors: dict,
        ep: int = 1,
        rank: int = 0,
        ranks: ThreadRanks | None = None,
        frozen=(),
        averaged: int = 7,
    ):
        self.rank, self.ranks = rank, ranks or ThreadRanks(1)
        self.world_size = self.ranks.world_size
        self.counters: dict = {}
        self.kinds = tuple(dict.fromkeys(kind for _, kind in tensors if kind not in ("weight", EMA)))
        self.averages = any(kind == EMA for _, kind in tensors)
        self.averaged = averaged if self.averages else 0
        self.held, self._entries = {}, []
        replicas = self.world_size // ep
        for i, name in enumerate(dict.fromkeys(name for name, _ in tensors)):
            whole, expert = tensors[name, "weight"], hf.is_expert(name)
            size = whole.shape[0] // ep
            first = rank % ep * size
            rows = slice(first, first + size) if expert else slice(None)
            for kind in ("weight", *self.kinds, *([EMA] if self.averages else [])):
                self.held[name, kind] = tensors[name, kind][rows].clone()
            writer = i % replicas == rank // ep if expert else i % self.world_size == rank
            self._entries.append(
                ParameterShard(name, tuple(whole[rows].shape), first if expert else None, name not in frozen, writer)
            )

    def entries(self):
        return self._entries

    def read(self, name, kind):
        assert len(set(self.gather((name, kind)))) == 1, "the ranks read different tensors"
        return self.held[name, kind].clone()

    def write(self, name, kind, tensor):
        assert len(set(self.gather((name, kind)))) == 1, "the ranks write different tensors"
        assert tensor.dtype == torch.float32
        self.held[name, kind].copy_(tensor)

    def share(self, name, kind):
        """As under ZeRO: of a tensor that all ranks hold, each keeps an equal slice; the last one's may be short."""
        if not self.sliced:
            return None
        count = self.held[name, kind].numel()
        size = -(-count // self.world_size)
        return range(min(self.rank * size, count), min((self.rank + 1) * size, count))

    def write_share(self, name, kind, flat):
        assert len(set(self.gather((name, kind)))) == 1, "the ranks write different tensors"
        span = self.share(name, kind)
        assert (flat.shape, flat.dtype) == ((len(span),), torch.float32)
        self.held[name, kind].view(-1)[span.start : span.stop] = flat

    def make_average(self, updates):
        self.averaged = updates

    def gather(self, value):
        return self.ranks.exchange(self.rank, value)


def save_arguments(config: ModelConfig, **changes) -> dict:
    arguments = {
        "step": 100,
        "trainer_state": {"samples": 7, "loss": 0.1 + 0.2},
        "model_config": config,
        "run_config_text": "run: {}\n",
        "tokenizer": None,
    }
    return arguments | changes


def zeros_like(tensors: dict) -> dict:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
