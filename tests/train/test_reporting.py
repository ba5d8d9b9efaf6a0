"""Records, pictures and what is shown while a run trains."""

import io
import json

import pytest
import torch
from support.training import config

from moe_llm.errors import UserError
from moe_llm.model.moe.routing import RoutingStatistics
from moe_llm.train.callbacks.console import Console, duration, summary
from moe_llm.train.metrics import MetricsFile, read_metrics, routing_metrics
from moe_llm.train.plots import plot_run


def record(step: int, **more) -> dict:
    moe = {
        "tokens_per_expert": [[6, 2], [8, 0]],
        "load_cv": [0.5, 1.0],
        "router_entropy": [0.6, 0.1],
        "dead_experts": [[], [1]],
    }
    return {
        "step": step,
        "tokens": 8 * step,
        "loss": 3.0 / step,
        "lm_loss": 2.5 / step,
        "tokens_per_second": 1234.5,
        "moe": moe,
        **more,
    }


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in range(1, 6):
        file.write(record(step))
    file.close()
    return path


def test_what_is_written_is_read_and_each_line_is_on_the_disk_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write(record(1, loss=0.1 + 0.2))
    assert read_metrics(path) == [record(1, loss=0.1 + 0.2)]
    file.close()


def test_opening_at_a_step_drops_what_came_after_it(metrics):
    file = MetricsFile(metrics, 3)
    file.write(record(4, loss=9.0))
    file.close()
    assert [(r["step"], r["loss"] == 9.0) for r in read_metrics(metrics)] == [
        (1, False), (2, False), (3, False), (4, True),
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 2, 50])
def test_a_last_line_cut_by_a_crash_is_left_out_and_not_glued_to_the_next(metrics, cut):
    whole = metrics.read_text()
    metrics.write_text(whole[:-cut])
    complete = 5 if cut == 1 else 4  # only the line's end was missing
    assert [r["step"] for r in read_metrics(metrics)] == list(range(1, complete + 1))
    file = MetricsFile(metrics, 4)
    file.write(record(5))
    file.close()
    assert metrics.read_text() == whole


def test_damage_elsewhere_is_not_passed_over(metrics):
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged: line 2 is not valid JSON"):
        read_metrics(metrics)


def test_routing_metrics_by_hand():
    zeros = RoutingStatistics(*(torch.zeros(2) for _ in RoutingStatistics._fields))
    statistics = zeros._replace(
        tokens_per_expert_E=torch.tensor([[3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        entropy_sum=torch.tensor([1.0, 2.0]), num_tokens=torch.tensor([2.0, 2.0]), dropped=torch.tensor([1.0, 0.0]),
    )  # fmt: skip
    found = routing_metrics(statistics)
    assert found["tokens_per_expert"] == [[3, 1, 0, 0], [1, 1, 1, 1]]
    assert found["load_cv"] == pytest.approx([1.5**0.5, 0.0])
    assert found["router_entropy"] == [0.5, 1.0]
    assert found["dead_experts"] == [[2, 3], []]
    assert found["dropped_share"] == [0.25, 0.0]
    assert found["experts_per_token"] == [2.0, 2.0]
    json.dumps(found)


def test_durations():
    assert [duration(s) for s in (0, 59.4, 60, 3725, 90061)] == ["0:00", "0:59", "1:00", "1:02:05", "25:01:01"]


def test_the_summary_names_loss_balance_and_speed():
    assert summary(record(2)) == "loss 1.5000 · load cv 0.75, 1 dead · 1,234 tokens/s"
    assert summary(record(2, val_loss=1.75)).startswith("loss 1.5000 · val 1.7500 · ")


def console_config(mode: str):
    return config(1, 1, 1, logging={"console": mode})


def test_plain_lines_where_there_is_no_terminal(capsys):
    console = Console(console_config("auto"), 0)
    console.say("hello [bold]")
    console.update(record(7), 61)
    console.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "hello [bold]\nstep   7/100 · loss 0.4286 · load cv 0.75, 1 dead · 1,234 tokens/s · 1:01 left\n"


def test_off_is_silent(capsys):
    console = Console(console_config("off"), 0)
    console.say("hello")
    console.update(record(7), 61)
    console.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("mode", ["auto", "bar"])
def test_a_bar_on_a_terminal(mode, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(console_config(mode), 3)
    console.say("hello [bold]")
    console.update(record(7, val_loss=0.5), 61)
    console.close()
    console.close()
    shown = terminal.getvalue()
    assert "hello [bold]" in shown, "text in brackets is no markup"
    assert "7/100" in shown
    assert "loss 0.4286 · val 0.5000 · load cv 0.75, 1 dead · 1,234 tokens/s" in shown
    assert "left" in shown


def test_plots_are_drawn_from_the_records(metrics):
    from matplotlib.image import imread

    paths = plot_run(metrics.parent)
    assert sorted(path.name for path in paths) == ["expert_load.png", "loss.png"]
    before = [imread(path) for path in paths]
    changed = record(5, lm_loss=9.0)
    changed["moe"]["tokens_per_expert"] = [[1, 7], [4, 4]]
    file = MetricsFile(metrics, 4)
    file.write(changed)
    file.close()
    after = [imread(path) for path in plot_run(metrics.parent)]
    for one, two in zip(before, after, strict=True):
        assert one.shape != two.shape or (one != two).any(), "the picture does not show the record"


def test_no_records_no_pictures(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert plot_run(tmp_path) == []
