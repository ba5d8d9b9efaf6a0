"""Which expert is to lie where, by arithmetic on loads alone. This file needs no torch.

Dimensions: E experts, R ranks that share them, P = E / R slots of a rank.
"""

from collections.abc import Sequence

Placement = list[int]  # the expert in each slot, rank after rank


def rank_loads(load_E: Sequence[float], placement: Placement, ranks: int) -> list[float]:
    """Rows of each rank."""
    size = len(placement) // ranks
    return [sum(load_E[e] for e in placement[rank * size : (rank + 1) * size]) for rank in range(ranks)]


def busiest_over_even(load_E: Sequence[float], placement: Placement, ranks: int) -> float:
    """Rows of the busiest rank over those of an even share; 1 of none."""
    rows = rank_loads(load_E, placement, ranks)
    return max(rows) * ranks / sum(rows) if sum(rows) else 1.0


def imbalance(load_LE: Sequence[Sequence[float]], ranks: int, *, moved: bool) -> float:
    """The mean of that over layers: in each of them all ranks wait for the busiest. moved: once experts have changed ranks
    by these loads; else with neighbours together."""
    home = list(range(len(load_LE[0])))
    placements = [plan_placement(load_E, home, ranks) if moved else home for load_E in load_LE]
    found = [busiest_over_even(load_E, placement, ranks) for load_E, placement in zip(load_LE, placements)]
    return sum(found) / len(found)


def plan_placement(load_E: Sequence[float], placement: Placement, ranks: int) -> Placement:
    """A placement under which the busiest rank has less, or the one given where none is found.

    Experts are dealt out by falling load, each to the rank with the least so far that has room (Graham 1969), then pairs
    on the busiest rank and another are exchanged while that helps. The shares go to the ranks that hold most of them
    already, so that few experts move.
    """
    size = len(placement) // ranks
    shares: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    for expert in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        rank = min((r for r in range(ranks) if len(shares[r]) < size), key=lambda r: (sums[r], r))
        shares[rank].append(expert)
        sums[rank] += load_E[expert]
    _exchange_pairs(load_E, shares, sums)
    if max(sums) >= max(rank_loads(load_E, placement, ranks)):
        return placement
    held = [set(placement[rank * size : (rank + 1) * size]) for rank in range(ranks)]
    pairs = sorted(
        ((len(held[rank] & set(share)), rank, i) for rank in range(ranks) for i, share in enumerate(shares)),
        key=lambda found: (-found[0], found[1], found[2]),
    )
    goes: dict[int, int] = {}
    for _, rank, i in pairs:
        if rank not in goes and i not in goes.values():
            goes[rank] = i
    found: Placement = []
    for rank in range(ranks):
        coming = sorted(set(shares[goes[rank]]) - held[rank])
        # what stays keeps its slot
        found += [e if e in shares[goes[rank]] else coming.pop(0) for e in placement[rank * size : (rank + 1) * size]]
    return found


def _exchange_pairs(load_E: Sequence[float], shares: list[list[int]], sums: list[float]) -> None:
    while True:
        busiest = max(range(len(sums)), key=lambda r: sums[r])
        best = (max(sums), -1, -1, -1)
        for other in range(len(sums)):
            if other == busiest:
                continue
            for i, mine in enumerate(shares[busiest]):
                for j, theirs in enumerate(shares[other]):
                    moved = load_E[mine] - load_E[theirs]
                    highest = max(sums[busiest] - moved, sums[other] + moved)
                    if highest < best[0]:
                        best = (highest, other, i, j)
        _, other, i, j = best
        if other < 0:
            return
        mine, theirs = shares[busiest][i], shares[other][j]
        shares[busiest][i], shares[other][j] = theirs, mine
        sums[busiest] -= load_E[mine] - load_E[theirs]
        sums[other] += load_E[mine] - load_E[theirs]
