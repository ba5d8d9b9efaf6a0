"""A GPU step of a cluster, rehearsed on the CPU at true shapes: right devices, few waits, ranks that agree, memory by part.

Each fault that a rehearsal is there to find is planted once, and found.
"""

import itertools
from collections import Counter

import pytest
import torch
from support.ci import dear
from support.rehearsed import ROUTERS, cluster_config

from moe_llm.config import Config
from moe_llm.distributed import dispatch, traffic
from moe_llm.distributed.rehearsal import Rehearsal, disagreements, rehearse
from moe_llm.doctor.shrink import replace
from moe_llm.model.decoder import MoEDecoder
from moe_llm.model.moe import routers
from moe_llm.model.moe.experts import Experts, MoELayer
from moe_llm.ops import attention, host
from moe_llm.planner.layout import layout_of
from moe_llm.planner.memory import KERNELS, step_memory

SIZES, ROWS, COUNTS = "rows that each rank sends and receives", "rows of all tokens", "rows of each expert"
SEGMENTS = "segments of a block"
# Routers whose number of rows depends on values: it has to be known before the rows can be gathered.
VARYING = {"gshard", "switch", "batch_prioritised", "top_p", "expert_choice"}
# What a layer of 8x7B may wait for in a step without recomputation. Before Hopper experts are a loop that reads its counts.
CLUSTERS = [("8x7b", 8), ("8x22b", 64), ("8x7b", 512)]
BUDGET_OPERATIONS = {  # device operations a layer, forward and backward, of Mixtral's router: may only fall
    (1, (9, 0)): (86, 87),
    (8, (9, 0)): (132, 112),
}


def waits_of_a_layer(router: str, ep: int, capability: tuple[int, int]) -> Counter[str]:
    """The written budget: names of waits and how often a layer may have each, forward and backward together."""
    allowed: Counter[str] = Counter()
    if router == "lory":  # whole weights are exchanged: no sizes, no rows; documents decide how many mixtures there are
        return Counter({SEGMENTS: 1})
    if router in VARYING:
        allowed[ROWS] = 1
    if ep > 1:
        allowed[SIZES] = 1
    elif capability < (9, 0):
        allowed[COUNTS] = 1
    return allowed


def check(rehearsed: Rehearsal, router: str, ep: int, capability: tuple[int, int] = (9, 0), passes: int = 1) -> None:
    assert not rehearsed.faults
    expected = waits_of_a_layer(router, ep, capability)
    assert rehearsed.waits_named() == Counter(
        {name: times * rehearsed.layers * passes for name, times in expected.items()}
    )


def test_every_router_has_a_rehearsal():
    assert set(ROUTERS) == set(routers.ROUTERS)


@pytest.mark.parametrize(
    ("router", "ep"),
    dear(
        itertools.product(ROUTERS, (1, 8)),
        ("mixtral", 1),
        *((kind, (8, 1)[i % 2]) for i, kind in enumerate(sorted(ROUTERS))),
    ),
)
def test_a_step_waits_no_more_than_its_budget(router, ep):
    check(rehearse(cluster_config(router, ep=ep, layers=1), 8), router, ep)


@pytest.mark.parametrize(
    ("ep", "capability"), dear(itertools.product((1, 8), [(8, 0), (10, 0)]), (1, (8, 0)), (8, (10, 0)))
)
def test_other_devices_have_their_budget(ep, capability):
    check(rehearse(cluster_config(ep=ep), 8, capability=capability), "mixtral", ep, capability)


@pytest.mark.parametrize("stage", dear([1, 2, 3], 3))
def test_a_stage_runs_with_recomputation(stage):
    config = cluster_config(stage=stage, activation_checkpointing=True)
    rehearsed = rehearse(config, 8)
    check(rehearsed, "mixtral", 8, passes=2)


def test_selective_recomputation_exchanges_and_waits_once():
    """And its second pass has fewer operations; what it keeps instead is the rows of two exchanges and attention's."""
    plain, full, selective = (
        rehearse(cluster_config(activation_checkpointing=kind), 8) for kind in ("off", "full", "selective")
    )
    check(selective, "mixtral", 8)
    exchanged = [sum(e.name == "all_to_all_single" for e in one.exchanges) for one in (plain, full, selective)]
    assert exchanged[0] == exchanged[2] < exchanged[1]
    assert plain.operations["backward"] < selective.operations["backward"] < full.operations["backward"]


@pytest.mark.grid
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ep", [1, 8])
@pytest.mark.parametrize("router", ROUTERS)
def test_the_whole_grid(router, ep, stage, capability):
    """Each in one of three clusters, which take turns."""
    shape, ranks = CLUSTERS[(list(ROUTERS).index(router) + stage + capability[0]) % len(CLUSTERS)]
    config = cluster_config(router, shape=shape, ranks=ranks, ep=ep, stage=stage, layers=1)
    check(rehearse(config, ranks, capability=capability), router, ep, capability)


@pytest.mark.parametrize("ranks", dear([8, 64, 512], 512))
def test_ranks_with_unequal_loads_agree_about_their_exchanges(ranks):
    watched = (0, 1, min(9, ranks - 1))
    config = cluster_config(ranks=ranks, stage=3, activation_checkpointing=True)
    of_ranks = [rehearse(config, ranks, rank=rank, skew=0.5) for rank in watched]
    assert not disagreements(of_ranks, watched)
    assert len({len(one.exchanges) for one in of_ranks}) == 1


@pytest.mark.parametrize("router", dear(["gshard", "lory", "soft_moe", "noisy_top_k"], "gshard", "lory"))
def test_ranks_agree_with_other_routers(router):
    of_ranks = [rehearse(cluster_config(router, layers=1), 8, rank=rank, skew=0.25) for rank in (0, 5)]
    assert not disagreements(of_ranks, (0, 5))


@pytest.mark.parametrize(("ep", "capability"), BUDGET_OPERATIONS)
def test_operations_of_a_layer_stay_within_their_budget(ep, capability):
    one, two = (rehearse(cluster_config(ep=ep, layers=layers), 8, capability=capability) for layers in (1, 2))
    used = tuple(two.operations[phase] - one.operations[phase] for phase in ("forward", "backward"))
    assert all(u <= b for u, b in zip(used, BUDGET_OPERATIONS[ep, capability])), used


@pytest.mark.parametrize(("router", "ep", "sp"), [("mixtral", 8, 8), ("gshard", 8, 2), ("expert_choice", 1, 4)])
def test_ranks_that_share_sequences_wait_no_more_and_agree(router, ep, sp):
    """Attention exchanges heads and positions there and back, forward and backward."""
    config = cluster_config(router, layers=1, ep=ep, sp=sp, length=8192)
    of_ranks = [rehearse(config, 8, rank=rank) for rank in (0, 1)]
    check(of_ranks[0], router, ep)
    assert not disagreements(of_ranks, (0, 1))
    neighbours = [e for e in of_ranks[0].exchanges if e.name == "all_to_all_single" and len(e.sent) == 5]
    assert len(neighbours) == 4


def test_128k_tokens_of_mixtral_8x7b_run_on_8_gpus_that_share_sequences():
    """A layer's activations are an eighth of those of a rank that has the sequence to itself."""
    shared = rehearse(cluster_config(layers=1, ep=8, sp=8, stage=2, length=131072), 8)
    check(shared, "mixtral", 8)
    alone = rehearse(cluster_config(layers=1, ep=8, stage=2, length=131072), 8)
    static = shared.memory.parts["weights"] + shared.memory.parts["optimizer"]
    assert shared.memory.peak - static < (alone.memory.peak - static) / 4


def check_plan(config: Config, ranks: int) -> None:
    planned = step_memory(config, layout_of(config, ranks), KERNELS["cuda"])
    assert planned.total == pytest.approx(rehearse(config, ranks).memory.peak, rel=0.05), planned


@pytest.mark.parametrize(("ranks", "stage"), [(8, 2), (64, 3), (512, 1)])
def test_the_plan_is_near_the_rehearsal(ranks, stage):
    check_plan(cluster_config(layers=4, ranks=ranks, stage=stage, activation_checkpointing="full"), ranks)


@pytest.mark.grid
@pytest.mark.parametrize("recompute", ["off", "full", "selective"])
@pytest.mark.parametrize("ep", [1, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", [8, 64, 512])
def test_the_plan_is_near_every_rehearsal(ranks, stage, ep, recompute):
    check_plan(cluster_config(layers=4, ranks=ranks, ep=ep, stage=stage, activation_checkpointing=recompute), ranks)


MEMORY = [
    {"activation_checkpointing": "full", "activation_offload": True},
    {"activation_checkpointing": "selective", "activation_offload": True},
    {"activation_offload": True},
    {"activation_checkpointing": "full", "tiled_mlp": 8},
]


@pytest.mark.parametrize("saving", dear(MEMORY, MEMORY[0], MEMORY[3]))
def test_the_plan_counts_offload_and_tiles(saving):
    check_plan(cluster_config(layers=4, stage=2, length=16384, **saving), 8)


OPTIM = [{"name": "adamw_8bit"}, *({"master_weights": masters} for masters in ("fp32", "kahan", "stochastic_rounding"))]


@pytest.mark.parametrize("optim", dear(OPTIM, OPTIM[0], OPTIM[2]))
def test_the_plan_counts_narrow_gradients_weights_and_moments(optim):
    config = cluster_config(layers=4, stage=2, activation_checkpointing="full")
    check_plan(replace(config, parallel={"gradient_dtype": "bf16"}, optim=optim), 8)


def test_offload_takes_activations_of_all_layers_but_two_from_the_device():
    few, many = (
        rehearse(cluster_config(layers=n, length=16384, activation_checkpointing="full", activation_offload=True), 8)
        for n in (3, 6)
    )
    kept = rehearse(cluster_config(layers=6, length=16384, activation_checkpointing="full"), 8)
    residual = 2 * 16384 * 4096 * 2
    static = [one.memory.parts["weights"] + one.memory.parts["optimizer"] for one in (few, many)]
    sums = 4 * 3 * 3 * 4096 * 14336 * 2  # of the three layers more: gradients of experts and of attention
    assert many.memory.peak - static[1] < few.memory.peak - static[0] + sums
    assert kept.memory.peak - many.memory.peak > 3 * residual
    check(many, "mixtral", 8, passes=2)


def test_stages_hold_what_they_say():
    """Of 2 layers on 64 ranks with EP 8: bytes a rank, by part, at the step's highest point."""
    by_stage = {stage: rehearse(cluster_config(ranks=64, stage=stage), 64).memory for stage in (1, 2, 3)}
    experts = 2 * 3 * 4096 * 14336  # of this rank
    dense = 2 * 4096 * 32000 + 2 * (2 * 4096**2 + 2 * 4096 * 1024) + 2 * 4096 * 8 + 5 * 4096
    optimizer = 12 * (experts / 8 + dense / 64)
    for stage, memory in by_stage.items():
        assert memory.parts["optimizer"] == pytest.approx(optimizer, rel=0.01), stage
    assert by_stage[1].parts["weights"] == pytest.approx(2 * (experts + dense), rel=0.01)
    assert by_stage[3].parts["weights"] == pytest.approx(2 * (experts / 8 + dense / 64), rel=0.01)
    # what ZeRO-3 has gathered stays, up to a billion parameters: here that is all of them
    assert by_stage[1].peak > by_stage[2].peak > by_stage[3].peak - by_stage[3].parts["gathered weights"]


def test_documents_cost_no_wait_and_no_square_of_memory():
    length = 32768
    runs = [[length // 4] * 4]
    alone = rehearse(cluster_config(ep=8, layers=1, length=length), 8)
    packed = rehearse(cluster_config(ep=8, layers=1, length=length), 8, runs=runs)
    check(packed, "mixtral", 8)
    assert packed.memory.peak < alone.memory.peak + 2**28
    assert len(packed.uploads) <= 1, packed.uploads  # the ends of the runs, once for all layers


# planted faults


def test_counts_on_the_host_are_found(monkeypatch):
    """Grouped products take their offsets on the device."""
    kept = Experts.forward

    def hand_counts_of_the_host(self, x, counts_E=None, *rest, host_counts_E=None, **more):
        return kept(self, x, None if counts_E is None else counts_E.cpu(), *rest, host_counts_E=host_counts_E, **more)

    monkeypatch.setattr(Experts, "forward", hand_counts_of_the_host)
    with pytest.raises(Exception, match="same device"):
        rehearse(cluster_config(layers=1), 8)


def test_a_read_beside_the_door_is_found(monkeypatch):
    kept = MoELayer.forward

    def look(self, x_BSD, *rest):
        if x_BSD.isfinite().all():
            return kept(self, x_BSD, *rest)
        raise AssertionError

    monkeypatch.setattr(MoELayer, "forward", look)
    rehearsed = rehearse(cluster_config(layers=2), 8)
    assert sum("value of a tensor" in name for name in rehearsed.waits_named().elements()) == 2


def test_weights_that_stay_whole_are_found():
    """As they do where nothing is partitioned at construction."""

    def hold_all(model: MoEDecoder) -> None:
        model.held = [torch.empty(3 * 4096 * 14336 * 8, dtype=torch.bfloat16, device="cuda") for _ in range(2)]

    config = cluster_config(ep=1, stage=3)
    sound, planted = rehearse(config, 8), rehearse(config, 8, before_step=hold_all)
    assert planted.memory.parts["weights"] > sound.memory.parts["weights"] + 2 * 2 * 3 * 4096 * 14336 * 8 * 0.99


def test_a_dense_mask_is_found(monkeypatch):
    monkeypatch.setattr(attention, "variable_length_kernel", lambda: None)
    monkeypatch.setattr(attention, "_segments", lambda *_: None)
    build = attention.AttentionPattern.build
    monkeypatch.setattr(
        attention.AttentionPattern, "build", staticmethod(lambda like, runs=None, **given: build(like, **given))
    )
    runs = [[4096] * 4]
    config = cluster_config(layers=1, length=16384)
    with pytest.warns(UserWarning, match=r"dense mask of 1 x 16384 x 16384 \(0\.25 GiB\)"):
        planted = rehearse(config, 8, runs=runs)
    monkeypatch.undo()
    assert planted.memory.peak > rehearse(config, 8, runs=runs).memory.peak + 16384**2


def test_asking_the_device_about_documents_is_found(monkeypatch):
    build = attention.AttentionPattern.build
    monkeypatch.setattr(
        attention.AttentionPattern, "build", staticmethod(lambda like, runs=None, **given: build(like, **given))
    )
    rehearsed = rehearse(cluster_config(layers=1), 8)
    assert rehearsed.waits_named()["documents and padding of a batch without runs"] == 1


def test_timing_events_do_not_grow_with_micro_batches(monkeypatch):
    few, many = (rehearse(cluster_config(layers=1), 8, micro_batches=n).timing_events for n in (4, 8))
    assert few == many == 2 * traffic.TIMED
    monkeypatch.setattr(traffic, "TIMED", 10**9)
    assert rehearse(cluster_config(layers=1), 8, micro_batches=8).timing_events > 3 * many


def test_an_exchange_that_one_rank_leaves_out_is_found(monkeypatch):
    kept = dispatch.AllToAllDispatcher.__call__

    def leave_out(self, x_TD, routing, experts):
        if self.rank == 1:
            return experts(x_TD, torch.full((1,), len(x_TD), device="cuda"))
        return kept(self, x_TD, routing, experts)

    monkeypatch.setattr(dispatch.AllToAllDispatcher, "__call__", leave_out)
    of_ranks = [rehearse(cluster_config(layers=1), 8, rank=rank) for rank in (0, 1)]
    assert "exchanges with rank 1" in disagreements(of_ranks, (0, 1))[0]


def test_sizes_that_do_not_meet_are_found(monkeypatch):
    kept = host.read

    def forget_one(tensor, what, total=None):
        values = kept(tensor, what, total)
        if what == SIZES and torch.distributed.get_rank() == 1:
            values[1, 0, 0] += 1  # expects a row of rank 0 that is not sent
        return values

    monkeypatch.setattr(dispatch.host, "read", forget_one)
    of_ranks = [rehearse(cluster_config(layers=1), 8, rank=rank) for rank in (0, 1)]
    assert "rows are sent where" in disagreements(of_ranks, (0, 1))[0]


def test_a_slip_to_fp32_is_found(monkeypatch):
    class Wide(torch.nn.Linear):
        def forward(self, x):
            return torch.nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)

    def widen(model: MoEDecoder) -> None:
        for layer in model.model.layers:
            layer.self_attn.q_proj.__class__ = Wide

    rehearsed = rehearse(cluster_config(ep=1, layers=1), 8, before_step=widen)
    assert any("products are of fp32" in fault for fault in rehearsed.faults)


def test_afterwards_torch_is_as_before():
    before = torch.cuda.get_device_capability, torch.cuda.Event, torch.nn.functional.scaled_dot_product_attention
    rehearse(cluster_config(layers=1), 8)
    assert before == (
        torch.cuda.get_device_capability,
        torch.cuda.Event,
        torch.nn.functional.scaled_dot_product_attention,
    )
    assert not torch.distributed.is_initialized()
    x = torch.randn(3, requires_grad=True)
    x.square().sum().backward()
    assert x.grad is not None
