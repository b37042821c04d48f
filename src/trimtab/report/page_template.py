"""The page's frame: its document, its script, its style, its colours by day and by night."""

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, SOFT, FAINT, PAPER = "#1f2328", "#636c76", "#e4e7eb", "#ffffff"
DARK = {INK: "#e6edf3", SOFT: "#9aa4af", FAINT: "#30363d", PAPER: "#0d1117"}  # for who prefers dark pages


# The policy lets the page's own scripts run and forbids every request to the network. The charts are drawn last,
# when the page's layout is known: drawn where they stand, the first panel of a row takes the width of the row.
DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body><main>
{body}
</main>
<script type="application/json" id="data">{data}</script>
<script>
const night = matchMedia("(prefers-color-scheme: dark)");
const inks = night.matches ? Object.entries({dark}) : [];
const inked = chart => !inks.length ? chart
  : JSON.parse(inks.reduce((text, [light, dark]) => text.replaceAll(light, dark), JSON.stringify(chart)));
function draw(name, chart) {{
  const {{data, layout}} = inked(chart);
  return Plotly.newPlot(name, data, layout, {{displayModeBar: false, responsive: true}});
}}
night.addEventListener("change", () => location.reload());
const waiting = Object.entries({{
{charts}
}});
function drawNext() {{
  const [name, chart] = waiting.shift();
  const told = new CustomEvent("drawn", {{detail: document.getElementById(name)}});
  draw(name, chart).then(() => document.dispatchEvent(told));
}}
function drawRest() {{  // one after another, so that the page can be read and scrolled meanwhile
  if (waiting.length) {{ drawNext(); setTimeout(drawRest); }}
}}
addEventListener("beforeprint", () => {{ while (waiting.length) drawNext(); }});
setTimeout(drawRest);
{script}
</script>
</body>
</html>
"""

STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK}; --soft: {SOFT}; --faint: {FAINT}; --paper: {PAPER}; }}
@media (prefers-color-scheme: dark) {{ :root {{
  --ink: {DARK[INK]}; --soft: {DARK[SOFT]}; --faint: {DARK[FAINT]}; --paper: {DARK[PAPER]}; }} }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 17px/1.55 {FONT}; }}
main {{ max-width: 1040px; margin: 0 auto; padding: 40px 20px 64px; }}
h1 {{ font-size: 32px; line-height: 1.2; margin: 0 0 16px; letter-spacing: -0.01em; }}
h2 {{ font-size: 21px; line-height: 1.3; margin: 0 0 8px; }}
h3 {{ font-size: 14px; font-weight: 600; color: var(--soft); margin: 12px 0 4px; }}
p {{ margin: 0 0 14px; max-width: 46em; }}
figure {{ margin: 44px 0 0; }}
figcaption {{ margin-top: 10px; max-width: 46em; padding-left: 14px; border-left: 3px solid var(--faint); }}
main > h2 {{ margin-top: 48px; }}
.panels {{ display: grid; gap: 8px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }}
.panel {{ min-width: 0; }}
.key {{ font-size: 14px; color: var(--soft); display: flex; flex-wrap: wrap; align-items: center; gap: 4px 20px; }}
.key span {{ display: inline-flex; align-items: center; gap: 7px; }}
.key button {{ display: inline-flex; align-items: center; gap: 7px; border: 0; padding: 2px 0; font: inherit;
  background: none; color: var(--ink); cursor: pointer; }}
.key button.off {{ opacity: 0.35; text-decoration: line-through; }}
dialog {{ width: min(1000px, 94vw); max-height: 92vh; overflow-y: auto;
  border: 1px solid var(--faint); border-radius: 8px; padding: 20px 24px; box-sizing: border-box;
  background: var(--paper); color: var(--ink); font-size: 15px; }}
dialog::backdrop {{ background: rgba(0, 0, 0, 0.45); }}
dialog .close {{ float: right; font: inherit; }}
dialog p.fact {{ margin: 4px 0; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }}
.ramp {{ width: 150px; height: 11px; border-radius: 2px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 14px; white-space: pre;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--faint); }}
th:first-child, td:first-child {{ text-align: left; }}
td {{ vertical-align: top; }}
td:first-child {{ white-space: pre-wrap; min-width: 5em; max-width: 22em; overflow-wrap: break-word; }}
th {{ vertical-align: bottom; white-space: pre-wrap; min-width: 3.2em; }}
th {{ color: var(--soft); font-weight: 600; border-bottom-color: var(--soft); }}
td.bold {{ font-weight: 700; }}
td.soft {{ color: var(--soft); }}
th[title] {{ text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }}
tr[data-key] {{ cursor: pointer; }}
tr[data-key]:hover, tr[data-key]:focus {{ background: var(--faint); }}
.scroll {{ max-height: 60em; overflow-y: auto; }}
.scroll thead th {{ position: sticky; top: 0; background: var(--paper); }}
.below {{ font-size: 15px; margin-top: 10px; }}
details {{ margin-top: 32px; }}
summary h2 {{ display: inline; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 3px 20px; font-size: 14px; margin: 0; }}
dt {{ color: var(--soft); }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
@media print {{ .scroll {{ max-height: none; overflow: visible; }} }}
@media (max-width: 520px) {{
  main {{ padding: 24px 16px 48px; }}
  h1 {{ font-size: 26px; }}
  dl {{ grid-template-columns: 1fr; }}
  dd {{ margin-bottom: 8px; }}
}}
"""
