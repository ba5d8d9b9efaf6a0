"""The report for people, and for programs."""

from typing import Any

from moe_llm.doctor.examine import Report
from moe_llm.doctor.findings import FAIL, NOTE, Finding

# What a copy in small is described by; all changes are in the JSON
_SIZES = {
    "model.hidden_size": "width",
    "model.num_hidden_layers": "layers",
    "model.num_local_experts": "experts",
    "data.sequence_length": "tokens a block",
    "train.global_batch_size": "blocks a step",
    "train.max_steps": "steps",
}
_STYLES = {"PASS": "green", "FAIL": "bold red", "NOTE": "yellow"}


def as_json(report: Report) -> dict[str, Any]:
    """Everything of a report as JSON values."""
    return {
        "passed": report.passed,
        "layout": report.layout,
        "seconds": round(report.seconds, 1),
        "changes": {key: {"configured": old, "examined": new} for key, (old, new) in report.changes.items()},
        "checks": [
            {
                "key": finding.key,
                "check": finding.check,
                "status": finding.status,
                "difference": _finite(finding.difference),
                "tolerance": finding.tolerance,
                "where": finding.where,
                "cause": finding.cause,
                "evidence": finding.evidence,
            }
            for finding in report.findings
        ],
    }


def print_report(report: Report) -> None:
    """The table, then what failed and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has no width of its own
    sizes = [
        f"{name} {report.changes[key][0]} -> {report.changes[key][1]}"
        for key, name in _SIZES.items()
        if key in report.changes
    ]
    console.print(f"examined: {escape(report.layout)}", highlight=False)
    if sizes:
        console.print(f"in small: {escape(', '.join(sizes))} (--json has every change)", highlight=False)
    for finding in report.findings:
        if finding.status == NOTE:
            console.print(f"[yellow]note[/]: {escape(finding.check)}", highlight=False)
    table = Table("check", "", show_edge=False)
    for heading in ("difference", "tolerance"):
        table.add_column(heading, justify="right")
    checks = [finding for finding in report.findings if finding.status != NOTE]
    for finding in checks:
        status = f"[{_STYLES[finding.status]}]{finding.status}[/]"
        table.add_row(
            escape(finding.check), status, _number(finding, finding.difference), _number(finding, finding.tolerance)
        )
    console.print(table)
    for finding in checks:
        if finding.status == FAIL:
            console.print(f"[bold red]FAIL[/] {escape(finding.check)}: {escape(finding.where)}", highlight=False)
            if finding.cause:
                console.print(f"     likely: {escape(finding.cause)}", highlight=False)
    failures = sum(finding.failed for finding in checks)
    verdict = "[green]all checks pass[/]" if report.passed else f"[bold red]{failures} of {len(checks)} checks fail[/]"
    console.print(f"{verdict}, {report.seconds:.0f} s", highlight=False)


def _number(finding: Finding, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if finding.tolerance == 0 and value == int(value) else f"{value:.1e}"


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN: null says that there was no number."""
    return value if value is not None and value == value and abs(value) != float("inf") else None
