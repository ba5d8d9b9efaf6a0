"""How large a model is, and what each rank holds of it, as tables."""

from typing import Any

from moe_llm.config.schema import Config


def placement(config: Config, world_size: int) -> list[dict]:
    """What each rank holds: its experts of every layer, its parameters, and which ranks have the same experts."""
    config.check_layout(world_size)
    size, counts = config.parallel.expert_parallel_size, config.model.parameter_counts()
    held = sum(counts.values()) - counts["experts"] + counts["experts"] // size
    return [
        {
            "rank": rank,
            "experts": list(config.expert_range(rank)),
            "parameters": held,
            "same_experts": [other for other in range(rank % size, world_size, size) if other != rank],
        }
        for rank in range(world_size)
    ]


def placement_table(ranks: list[dict]) -> Any:
    """`placement` for people."""
    from rich.table import Table

    table = Table("rank", "experts of each layer", "parameters held, before ZeRO", "ranks with the same experts")
    for row in ranks:
        same = ", ".join(map(str, row["same_experts"])) or "none"
        table.add_row(str(row["rank"]), ", ".join(map(str, row["experts"])), f"{row['parameters']:,}", same)
    return table


def params_table(total: dict[str, int], active: dict[str, int]) -> Any:
    """Parameters by part, all and those that a token uses."""
    from rich.table import Table

    table = Table("part")
    for heading in ("total", "share", "active", "share"):
        table.add_column(heading, justify="right")

    def row(part: str, count: int, active_count: int) -> tuple[str, ...]:
        shares = f"{count / sum(total.values()):.1%}", f"{active_count / sum(active.values()):.1%}"
        return part, f"{count:,}", shares[0], f"{active_count:,}", shares[1]

    for part in total:
        table.add_row(*row(part, total[part], active[part]), end_section=part == list(total)[-1])
    table.add_row(*row("model", sum(total.values()), sum(active.values())))
    return table
