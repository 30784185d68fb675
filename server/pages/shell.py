"""The page around a content: style, the little script for sorting, and a policy that lets nothing else in.

Everything is inline. The policy names style and script by their SHA-256, so that markup that got in by a mistake could
neither run nor load anything. Without scripts the page is complete; only sorting by a click on a heading is missing.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

from server.pages.markup import Html, el, join

# Colours are of the set by Okabe and Ito, which stays apart under every common colour blindness.
_STYLE: Final = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#59636e;--rule:#d5dae0;--tint:#f4f6f8;
--reference:#a3acb6;--now:#0072b2;--alarm:#b34700;--alarm-tint:#fbe9dc;--ok:#00704f}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ec;--soft:#9ba5b0;--rule:#363d45;--tint:#1e2329;
--reference:#77818c;--now:#56b4e9;--alarm:#f0883e;--alarm-tint:#3c2718;--ok:#4cc6a0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:80rem;padding:1.25rem;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .25rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:0;overflow-wrap:anywhere}
p{margin:.4rem 0}a{color:var(--now)}small,.soft{color:var(--soft)}
dl{display:flex;flex-wrap:wrap;gap:.15rem 1.5rem;margin:.5rem 0}
dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.verdict{margin:1rem 0;padding:.7rem 1rem;border-left:5px solid var(--ok);background:var(--tint);font-size:1.05rem;
overflow-wrap:anywhere}
.verdict.alarm{border-color:var(--alarm);background:var(--alarm-tint)}
.warnings{margin:.75rem 0;padding:.6rem 1rem .6rem 2rem;border:1px solid var(--alarm);border-radius:4px;
overflow-wrap:anywhere}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);padding:.2rem 0}summary{cursor:pointer;padding:.5rem 0;color:var(--now)}
th,td{padding:.28rem .42rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;vertical-align:top}
th{font-weight:600;vertical-align:bottom;background:var(--tint);white-space:normal}
.t,.records td:first-child,.records th:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:7rem;max-width:22rem}
th:first-child{text-align:left}
tr.alarm td{background:var(--alarm-tint)}
.mark{color:var(--alarm);font-weight:700}
.js th[data-sort]{cursor:pointer}.js th[data-sort]:hover{text-decoration:underline}
th[aria-sort=descending]::after{content:" \\2193"}th[aria-sort=ascending]::after{content:" \\2191"}
.pick{position:absolute;opacity:0}
.tabs{display:flex;flex-wrap:wrap;gap:.4rem;margin:.5rem 0}
.tabs label{padding:.25rem .7rem;border:1px solid var(--rule);border-radius:99px;cursor:pointer}
.view{display:none}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));gap:.75rem 1.25rem}
.feature{margin:0;padding:.9rem 0;border-top:1px solid var(--rule);break-inside:avoid}
figure{margin:0}figcaption{font-size:.82rem;color:var(--soft)}
svg{display:block;width:100%;height:auto;max-width:34rem}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}
.reference{fill:var(--reference)}.now{fill:var(--now)}
.line,.threshold{fill:none;stroke:var(--now);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.threshold{stroke:var(--ink);stroke-width:1.2;stroke-dasharray:5 4}
.floor{stroke:var(--soft);stroke-width:1.4;stroke-dasharray:1 4;stroke-linecap:round}
.span{fill:var(--alarm);opacity:.18}.hover{fill:transparent}
.hover:hover{fill:var(--soft);opacity:.2}
.key{display:inline-block;width:1.1em;height:.7em;margin:0 .35em 0 .9em;vertical-align:baseline}
.key.reference{background:var(--reference)}.key.now{background:var(--now)}.key.span{background:var(--alarm);opacity:.35}
.key.dash{height:0;border-top:2px dashed var(--ink);vertical-align:middle}
.key.dots{height:0;border-top:2px dotted var(--soft);vertical-align:middle}
@media print{body{max-width:none;padding:0;font-size:11px}.tabs{display:none}.scroll{overflow:visible}
table{font-size:9px}svg{max-width:none}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""

_SCRIPT: Final = """
document.documentElement.classList.add("js");
for (const head of document.querySelectorAll("th[data-sort]")) {
  const sort = () => {
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => {
      const cell = row.cells[head.cellIndex];
      return cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v || NaN);
    };
    const order = (a, b) => {
      const x = value(a), y = value(b);
      if (typeof x === "string") return down ? y.localeCompare(x) : x.localeCompare(y);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return down ? y - x : x - y;
    };
    body.append(...[...body.rows].sort(order));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
}
"""


def page(title: str, *content: object, rules: str = "") -> str:
    """A whole document. ``rules``: style rules of this page beside the common ones, never a caller's text."""
    style = _STYLE + rules
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(_SCRIPT)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", Html(style)),
    )
    body = el("body", *content, el("script", Html(_SCRIPT)))
    return "<!DOCTYPE html>\n" + join(el("html", head, body, lang="en"), "\n")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
