"""An inspection as one HTML page that needs no network: a text coloured by expert, tables, and the plots inside."""

import base64
import html
import json
from pathlib import Path
from typing import Any

_STYLE = """
:root{color-scheme:light dark;--fg:#1b1b1f;--bg:#fff;--soft:#f1f1f4;--line:#c9c9d1}
@media (prefers-color-scheme:dark){:root{--fg:#e8e8ee;--bg:#16161a;--soft:#24242b;--line:#44444f}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg)}
h1{font-size:1.4rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin-top:2rem}h3{font-size:1rem;overflow-wrap:anywhere}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{border:1px solid var(--line);padding:.2rem .5rem;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead{background:var(--soft)}
.controls{position:sticky;top:0;background:var(--bg);padding:.5rem 0;border-bottom:1px solid var(--line);display:flex;
flex-wrap:wrap;gap:.5rem 1rem;align-items:center}
.legend{display:flex;flex-wrap:wrap;gap:.3rem}.legend span,.text span{color:#111;border-radius:3px;padding:0 2px}
.text{font:15px/2 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;background:var(--soft);
padding:.7rem;border-radius:6px}
.text span{border-bottom:3px solid transparent}.text sub{font-size:.65em}.plain sub{display:none}
img{max-width:100%;height:auto;background:#fff;border-radius:6px}input[type=range]{width:min(60vw,24rem)}
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById('data').textContent);
const colour = e => `hsl(${Math.round(e * 360 / data.experts)} 70% ${e % 2 ? 84 : 72}%)`;
const layer = document.getElementById('layer'), label = document.getElementById('layer-name');
const legend = document.getElementById('legend'), area = document.getElementById('texts');
for (let e = 0; e < data.experts; e++) {
  const key = document.createElement('span');
  key.textContent = e; key.style.background = colour(e); legend.append(key);
}
const spans = data.shown.map(row => {
  const block = document.createElement('div');
  block.className = 'text';
  block.title = data.sources[row.source];
  const own = row.tokens.map(token => {
    const span = document.createElement('span'), sub = document.createElement('sub');
    span.textContent = token; span.append(sub); block.append(span);
    return span;
  });
  const name = document.createElement('h3');
  name.textContent = data.sources[row.source];
  area.append(name, block);
  return own;
});
function show() {
  const l = Number(layer.value);
  label.textContent = data.blocks[l];
  data.shown.forEach((row, r) => row.experts[l].forEach((chosen, t) => {
    const span = spans[r][t];
    span.style.background = colour(chosen[0]);
    span.style.borderBottomColor = chosen.length > 1 ? colour(chosen[1]) : 'transparent';
    span.lastChild.textContent = chosen[0];
    span.title = 'experts ' + chosen.join(', ');
  }));
}
layer.addEventListener('input', show);
document.getElementById('numbers').addEventListener('change', e => area.classList.toggle('plain', !e.target.checked));
show();
"""


def page(report: dict[str, Any], plots: list[Path]) -> str:
    """The whole page."""
    title = html.escape(f"Routing of {report['checkpoint']}")
    data = {
        "experts": report["experts"],
        "blocks": report["blocks"],
        "shown": report["shown"],
        "sources": [source["name"] for source in report["sources"]],
    }
    # "</script>" in a text would end the element
    inline = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"{_summary(report)}{_texts(report)}{_specialisation(report)}{_top_tokens(report)}"
        + "".join(_image(path) for path in plots)
        + f'<script type="application/json" id="data">{inline}</script><script>{_SCRIPT}</script></body></html>\n'
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def _summary(report: dict[str, Any]) -> str:
    rows = [[s["name"], f"{s['tokens']:,}", f"{s['loss']:.4f}"] for s in report["sources"]]
    return (
        f"<p>{report['layers']} layers, {report['experts_per_token']} of {report['experts']} experts for each token</p>"
        + _table(["source", "tokens", "loss, nats per token"], rows)
    )


def _texts(report: dict[str, Any]) -> str:
    return (
        "<h2>The text, coloured by expert</h2><p>Background and number: a token's first choice; underline: its second."
        '</p><div class="controls"><label>layer <output id="layer-name"></output> '
        f'<input id="layer" type="range" min="0" max="{report["layers"] - 1}" value="0"></label>'
        '<label><input id="numbers" type="checkbox" checked> numbers</label>'
        '<div class="legend" id="legend" aria-label="experts"></div></div><div id="texts"></div>'
    )


def _specialisation(report: dict[str, Any]) -> str:
    found = report["specialisation"]
    if found is None:
        return ""
    rows = [
        [
            str(report["blocks"][layer]),
            *(f"{found[key][layer]:.5f}" for key in ("bits", "chance_bits", "chance_95", "by_tokens")),
            f"{found['p_value'][layer]:.3g}",
        ]
        for layer in range(report["layers"])
    ]
    return (
        f"<h2>Specialisation by source</h2><p>Mutual information of source and expert, in bits, compared with "
        f"{found['permutations']} permutations of {found['units']} documents or pieces of them; over all layers "
        f"p = {found['overall_p_value']:.3g}</p>"
        + _table(["layer", "observed", "chance", "chance, 95%", "by the token alone", "p"], rows)
    )


def _top_tokens(report: dict[str, Any]) -> str:
    parts = []
    for layer, experts in enumerate(report["top_tokens"]):
        rows = [
            [str(expert), " ".join(f"{token['text']!r} {token['share']:.0%}" for token in tokens)]
            for expert, tokens in enumerate(experts)
        ]
        parts.append(
            f"<details><summary>layer {report['blocks'][layer]}</summary>{_table(['expert', 'tokens'], rows)}</details>"
        )
    return "<h2>Top tokens</h2><p>With the share of each token's occurrences that went there.</p>" + "".join(parts)


def _image(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<h2>{path.stem.capitalize()}</h2><img alt="{path.stem}" src="data:image/png;base64,{encoded}">'
