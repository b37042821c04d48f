// The runs' own curves, drawn when a point or a row is clicked; and the arms' names as switches.
const text = document.getElementById("data").textContent;
let runs = null;  // parsed at the first click: the page opens sooner
const dialog = document.createElement("dialog");
document.body.append(dialog);
dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => history.replaceState(null, "", " "));

function element(name, content, parent) {
  const made = document.createElement(name);
  if (content) made.textContent = content;
  parent.append(made);
  return made;
}

// The ticks of a logarithmic axis, written out: 1, 2, 5, or powers of ten where there are many.
function logTicks(data) {
  const known = data.flatMap(trace => trace.y).filter(value => value > 0);
  if (!known.length) return {};
  const log = known.map(Math.log10), low = Math.min(...log), high = Math.max(...log), tickvals = [];
  if (high - low < 0.4) return {type: "linear"};  // there is hardly a tick among them
  for (let e = Math.floor(low); e <= Math.ceil(high); e++)
    for (const m of high - low < 2.5 ? [1, 2, 5] : [1]) tickvals.push(m * 10 ** e);
  return {range: [low - 0.1, high + 0.1], tickvals, ticktext: tickvals.map(tick => `${+tick.toPrecision(1)}`)};
}

function open(key) {
  runs ??= JSON.parse(text);
  const run = runs.runs[key];
  if (!run) return;
  dialog.replaceChildren();
  const close = element("button", "close", dialog);
  close.className = "close";
  close.addEventListener("click", () => dialog.close());
  element("h2", run.name, dialog);
  element("p", run.end, dialog).className = "below";
  const panels = element("div", "", dialog);
  panels.className = "panels";
  const charts = [];
  for (const {title, curves, layout} of runs.panels) {
    const data = curves.filter(([name]) => run.curves[name]).map(([name, label], place) => ({
      x: run.curves[name][0], y: run.curves[name][1], mode: run.curves[name][0].length > 1 ? "lines" : "markers",
      line: {color: run.color, width: 2, dash: place ? "dot" : "solid"}, marker: {color: run.color},
      hovertemplate: `step %{x}: %{y:.4g}<extra>${label}</extra>`,
    }));
    if (!data.length) continue;
    const panel = element("div", "", panels);
    panel.className = "panel";
    element("h3", title, panel);
    const place = element("div", "", panel);
    place.style.height = layout.height + "px";
    const shapes = run.alarms.map(([step]) => (
      {type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: {color: "#D55E00", width: 1, dash: "dot"}}));
    const xaxis = {...layout.xaxis, range: [0, run.steps * 1.02]};
    const yaxis = {...layout.yaxis, ...(layout.yaxis.type === "log" ? logTicks(data) : {})};
    charts.push([place, {data, layout: {...layout, xaxis, yaxis, shapes}}]);
  }
  if (run.alarms.length) {
    element("h3", `Alarms: ${run.num_alarms} (dotted lines)`, dialog);
    const list = element("ul", "", dialog);
    for (const [step, kind, message] of run.alarms) element("li", message || `step ${step}: ${kind}`, list);
  }
  for (const [name, value] of run.facts) {
    const line = element("p", "", dialog);
    line.className = "fact";
    element("b", name + " ", line);
    line.append(value);
  }
  if (!dialog.open) dialog.showModal();
  for (const [place, chart] of charts) draw(place, chart);
  dialog.scrollTop = 0;
  history.replaceState(null, "", "#" + encodeURIComponent(key));
}

const drawn = [], hidden = new Set();
document.addEventListener("drawn", event => {
  const place = event.detail;
  drawn.push(place);
  for (const arm of hidden) show(place, arm);
  place.on("plotly_click", event => {
    const key = event.points.map(point => point.customdata).find(key => typeof key === "string");
    if (key) open(key);
  });
});
function show(place, arm) {
  const traces = place.data.flatMap((trace, index) => trace.legendgroup === arm ? [index] : []);
  if (traces.length) Plotly.restyle(place, {visible: !hidden.has(arm)}, traces);
}
for (const row of document.querySelectorAll("tr[data-key]")) {
  row.addEventListener("click", () => open(row.dataset.key));
  row.addEventListener("keydown", event => { if (event.key === "Enter") open(row.dataset.key); });
}
for (const button of document.querySelectorAll("button[data-arm]")) {
  button.addEventListener("click", () => {
    const arm = button.dataset.arm;
    if (!hidden.delete(arm)) hidden.add(arm);
    for (const other of document.querySelectorAll("button[data-arm]"))
      other.classList.toggle("off", hidden.has(other.dataset.arm));
    for (const place of drawn) show(place, arm);
  });
}
if (location.hash.length > 1) open(decodeURIComponent(location.hash.slice(1)));
