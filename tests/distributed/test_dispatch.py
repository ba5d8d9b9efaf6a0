"""The all-to-all dispatcher equals the local one, whatever the routing: forward, gradients, empty experts and ranks."""

from unittest import mock

import pytest
import torch
from support.ranks import fresh_accelerate
from support.training import config

from moe_llm.config import ModelConfig
from moe_llm.distributed.dispatch import AllToAllDispatcher, _Flight, _regroup
from moe_llm.distributed.runtime import start
from moe_llm.model.moe.experts import Experts, LocalDispatcher
from moe_llm.model.moe.routing import Routing
from moe_llm.ops.permutation import sort_by_expert

EXPERTS, HIDDEN = 4, 8
MODEL = ModelConfig(
    vocab_size=16,
    hidden_size=HIDDEN,
    intermediate_size=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_local_experts=EXPERTS,
    num_experts_per_tok=2,
    max_position_embeddings=16,
)
# For each rank: the experts of its tokens
ROUTINGS = {
    "spread": [[[0, 1], [2, 3], [1, 2]], [[3, 0], [0, 2]]],
    "one_expert_takes_all": [[[2, 2]] * 3, [[2, 2]] * 4],
    "one_rank_gets_nothing": [[[0, 1], [1, 0]], [[0, 1], [1, 1], [0, 0]]],
    "a_rank_without_tokens": [[], [[0, 3], [2, 1]]],
    "nobody_has_tokens": [[], []],
    "one_token": [[[3, 1]], []],
}


def routing_of(expert_TK: torch.Tensor, weight_TK: torch.Tensor, varying: bool) -> Routing:
    token_index_N, order_N, slot_TK, counts_E = sort_by_expert(expert_TK, EXPERTS)
    return Routing(
        token_index_N,
        weight_TK.flatten()[order_N],
        counts_E,
        None if varying else slot_TK,
        torch.empty(len(expert_TK), EXPERTS),
        None,
    )


def stacked_experts() -> Experts:
    generator = torch.Generator().manual_seed(0)
    experts = Experts(MODEL)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return experts


def inputs(rank: int, choice: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    expert_TK = torch.tensor(choice, dtype=torch.int64).view(-1, 2)
    x_TD = torch.randn(len(choice), HIDDEN, generator=generator, requires_grad=True)
    weight_TK = torch.rand(len(choice), 2, generator=generator, requires_grad=True)
    return x_TD, expert_TK, weight_TK


def dispatched(choices: list, varying: bool, chunks: int) -> tuple:
    """On a rank: output and gradients through the all-to-all dispatcher."""
    fresh_accelerate()
    runtime = start(config(1, 1, 2, ep=2))
    experts = stacked_experts()
    held = EXPERTS // 2
    experts.keep(range(runtime.rank * held, (runtime.rank + 1) * held))
    x_TD, expert_TK, weight_TK = inputs(runtime.rank, choices[runtime.rank])
    dispatcher = AllToAllDispatcher(torch.distributed.group.WORLD, 2, chunks)
    y_TD = dispatcher(x_TD, routing_of(expert_TK, weight_TK, varying), experts)
    (y_TD * y_TD).sum().backward()
    return y_TD.detach(), x_TD.grad, weight_TK.grad, [p.grad for p in experts.parameters()]


# a rank holds two experts: two chunks are one of them each, three a third of each one's rows
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_local_dispatcher(two_ranks, name, varying, chunks):
    choices = ROUTINGS[name]
    found = two_ranks.run(dispatched, choices, varying, chunks)
    experts = stacked_experts()
    for rank, (y_TD, x_grad, weight_grad, _) in enumerate(found):
        x_TD, expert_TK, weight_TK = inputs(rank, choices[rank])
        expected = LocalDispatcher()(x_TD, routing_of(expert_TK, weight_TK, varying), experts)
        (expected * expected).sum().backward()
        torch.testing.assert_close(y_TD, expected.detach())
        torch.testing.assert_close(x_grad, x_TD.grad)
        torch.testing.assert_close(weight_grad, weight_TK.grad)
    for i, parameter in enumerate(experts.parameters()):
        parts = [gradients[i] for *_, gradients in found]
        assert all(part is not None for part in parts), "an expert without tokens still gets a gradient"
        torch.testing.assert_close(torch.cat(parts), parameter.grad)


def order_of_events(chunks: int) -> list[str]:
    """On a rank: when exchanges begin and end and when experts compute, forward and backward."""
    fresh_accelerate()
    runtime = start(config(1, 1, 2, ep=2))
    experts = stacked_experts()
    experts.keep(range(runtime.rank * 2, runtime.rank * 2 + 2))
    events: list[str] = []
    depart, arrive, forward = _Flight.depart, _Flight.arrive, experts.forward
    numbers: dict[int, int] = {}

    def number(flight: _Flight) -> int:
        return numbers.setdefault(id(flight), len(numbers))

    def noted_depart(flight, x_ND, *, back):
        events.append(f"{'gradient' if back else 'rows'} {number(flight)} leave")
        depart(flight, x_ND, back=back)

    def noted_arrive(flight):
        events.append(f"{number(flight)} awaited")
        return arrive(flight)

    def computed(x_MD, *arguments, **named):
        events.append("compute")
        y_MD = forward(x_MD, *arguments, **named)
        y_MD.register_hook(lambda grad: events.append("compute back"))
        return y_MD

    experts.forward = computed
    with mock.patch.object(_Flight, "depart", noted_depart), mock.patch.object(_Flight, "arrive", noted_arrive):
        x_TD, expert_TK, weight_TK = inputs(runtime.rank, ROUTINGS["spread"][runtime.rank])
        dispatcher = AllToAllDispatcher(torch.distributed.group.WORLD, 2, chunks)
        dispatcher(x_TD, routing_of(expert_TK, weight_TK, False), experts).sum().backward()
    return events


def test_the_next_part_travels_while_one_is_computed(two_ranks):
    expected = [
        "rows 0 leave",
        "rows 1 leave",
        "0 awaited",
        "compute",
        "rows 2 leave",
        "1 awaited",
        "compute",
        "rows 3 leave",
        "2 awaited",
        "3 awaited",
        "gradient 3 leave",
        "gradient 2 leave",
        "3 awaited",
        "compute back",
        "gradient 1 leave",
        "2 awaited",
        "compute back",
        "gradient 0 leave",
        "1 awaited",
        "0 awaited",
    ]
    assert two_ranks.run(order_of_events, 2) == [expected, expected]


def test_regroup_transposes_blocks_and_undoes_itself():
    counts = torch.tensor([[2, 0, 1], [0, 3, 1]])
    labels = [(a, b) for a in range(2) for b in range(3) for _ in range(counts[a, b])]
    rows = torch.arange(len(labels)).view(-1, 1)
    moved = _regroup(rows, counts)
    assert [labels[i] for i in moved.flatten().tolist()] == sorted(labels, key=lambda ab: (ab[1], ab[0]))
    assert torch.equal(_regroup(moved, counts.T), rows)
