"""`moe-llm report`: the page in a real browser, the pictures, and what it says of directories that are no runs."""

import json
import re

import pytest
from support.browser import CHROMIUM, browser
from support.recorded import EXPERTS, LAYERS, recorded_run

from moe_llm.cli import main
from moe_llm.report.curves import charts, load_over_time
from moe_llm.report.page import count, duration
from moe_llm.report.runs import load_runs


@pytest.fixture
def one(tmp_path):
    return recorded_run(tmp_path / "first")


@pytest.fixture
def other(tmp_path):
    return recorded_run(tmp_path / "second", 40, 1.5, optim={"lr": 1e-2})


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(one, other, tmp_path):
    assert main(["report", str(one)]) == 0
    both = tmp_path / "both.html"
    assert main(["report", str(one), str(other), "--out", str(both)]) == 0
    with browser(tmp_path / "profile") as page:
        for width in (390, 1200):
            page.open(one / "report.html", width)
            assert page.value("document.querySelectorAll('.charts svg').length") == 7
            assert page.value("document.querySelectorAll('polyline.curve').length") == 7
            assert page.value("document.querySelectorAll('circle.dot').length") == 3
            assert page.value("document.querySelectorAll('rect.cell').length") == 30 * LAYERS * EXPERTS
            assert page.value("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
            # within its figure, as high as the loss falls: the last point is the lowest
            points = page.value("document.querySelector('#chart-0 polyline').getAttribute('points')")
            heights = [float(pair.split(",")[1]) for pair in points.split()]
            assert heights == sorted(heights)
        starved = "getComputedStyle(document.querySelectorAll('#load-0-0 rect')[{}]).fill"
        even, none = (page.value(starved.format(index)) for index in (1, 29 * EXPERTS + 1))
        assert even != none
        box = page.value(
            "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
            "(document.querySelector('#chart-0 svg').getBoundingClientRect())"
        )
        page.move(*box)
        tip = page.value("document.getElementById('tip').textContent")
        assert re.search(r"step 1\d\n.* nats per token\nheld-out at", tip)
        colours = [page.value("getComputedStyle(document.body).backgroundColor")]
        page.open(one / "report.html", 1200, scheme="dark")
        assert colours != [page.value("getComputedStyle(document.body).backgroundColor")]

        page.open(both, 390)
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value("document.querySelectorAll('#chart-0 polyline').length") == 2
        assert page.value("document.querySelectorAll('#chart-0 circle').length") == 3 + 4
        assert page.errors == []


def test_the_page_has_what_was_run_and_escapes_it(one, capsys):
    assert main(["report", str(one)]) == 0
    assert f"{one / 'report.html'}, and " in capsys.readouterr().out
    text = (one / "report.html").read_text()
    assert "layer 0 expert 1: &lt;dying&gt;" in text
    assert "a &lt;device&gt;" in text
    assert "<dying>" not in text
    assert "12,345 tokens" in text
    assert "2 of 4 experts a token" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text), "something from elsewhere"
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_summary_by_hand(one):
    (run,) = load_runs([str(one)])
    assert run.seconds == pytest.approx(30 * 128 / 1280)
    drawn = {chart["title"]: chart for chart in charts([run])}
    assert "Dropped choices" not in drawn
    assert drawn["Router entropy"]["series"][0]["low"][0] == pytest.approx(1.0 / 1.386294, rel=1e-4)
    assert drawn["Gradient norms of experts"]["series"][0]["high"][0] == pytest.approx(1.5)
    load = load_over_time(run)
    assert load["loads"][0][0] == [1.0, 1.0, 1.0, 1.0]
    assert load["loads"][0][-1] == [2.0, 0.0, 1.0, 1.0]
    assert (count(1_234_567), count(950), count(12.9e9), duration(3725), duration(9)) == (
        "1.23 M", "950", "12.9 G", "1 h 2 min", "9 s")  # fmt: skip


def test_long_runs_are_drawn_in_means(tmp_path):
    (run,) = load_runs([str(recorded_run(tmp_path / "long", 2000))])
    curve = charts([run])[0]["series"][0]
    assert len(curve["x"]) == 400
    assert curve["x"][-1] == 2000
    load = load_over_time(run)
    assert len(load["steps"]) == 72
    assert load["loads"][0][-1] == [2.0, 0.0, 1.0, 1.0]


def test_two_runs_are_told_apart_and_their_settings_compared(one, other, tmp_path):
    out = tmp_path / "both.html"
    assert main(["report", str(one), str(other), "--out", str(out)]) == 0
    text = out.read_text()
    assert "<th>optim.lr</th>" in text
    assert "<th>optim.eps</th>" not in text
    pictures = {path.name for path in (tmp_path / "both_plots").iterdir()}
    assert {"loss.png", "router_entropy.png", "expert_load_1.png", "expert_load_2.png"} < pictures


def test_a_run_of_an_older_version_has_no_facts_and_is_shown(one):
    (one / "facts.json").unlink()
    records = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["moe"]["expert_grad_norm"], record["moe"]["dropped_share"]
    (one / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["report", str(one)]) == 0
    assert "not recorded by this run" in (one / "report.html").read_text()


def break_nothing(run):
    pass


@pytest.mark.parametrize(
    ("spoil", "arguments", "sentence"),
    [
        (break_nothing, ["{run}x"], "firstx' is no directory: name a run directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), ["{run}"], "has no metrics.jsonl: name a run directory"),
        (lambda run: (run / "config.yaml").unlink(), ["{run}"], "has no config.yaml: name a run directory"),
        (lambda run: (run / "metrics.jsonl").write_text(""), ["{run}"], "has recorded nothing yet"),
        (lambda run: (run / "metrics.jsonl").write_text("{\n{}\n"), ["{run}"], "line 1 is not valid JSON"),
        (lambda run: (run / "metrics.jsonl").write_text("[]\n"), ["{run}"], "line 1 is no record of a step"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\n"), ["{run}"], "line 1 is not valid JSON"),
        (lambda run: (run / "facts.json").write_text("{"), ["{run}"], "facts.json is damaged"),
        (break_nothing, ["{run}", "{run}"], "is given twice"),
        (break_nothing, ["{run}", "--out", "{run}/no/page.html"], "cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(one, spoil, arguments, sentence, capsys):
    spoil(one)
    assert main(["report", *(argument.format(run=one) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (one / "report.html").exists()
