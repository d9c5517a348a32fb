"use strict";
// Everything that is shown of a store goes through textContent or a row of a chart: no text becomes HTML or an expression here.
const V = JSON.parse(document.getElementById("values").textContent);
const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const number = (x, digits = 4) => (x === null || x === undefined ? "not known" : String(Number(x.toPrecision(digits))));
const signed = (x, digits = 3) => (x > 0 ? "+" : "") + number(x, digits);
const visible = (text) => text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, "\u25a1");

// ---- charts: drawn when they come into view, again when the colours change or something else is chosen
const charts = new Map();
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target.id); }
}, { rootMargin: "300px" });

const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function colours() {
  const css = getComputedStyle(root), of = (name) => css.getPropertyValue(name).trim();
  const text = { labelColor: of("--ink"), titleColor: of("--ink"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" };
  return {
    background: of("--paper"), font: "system-ui, 'DejaVu Sans', sans-serif", view: { stroke: of("--line") },
    axis: { ...text, gridColor: of("--grid"), tickColor: of("--line"), domainColor: of("--line") }, legend: { ...text, symbolStrokeWidth: 3 },
  };
}

function chart(id, name, rows, change) {
  if (!$(id)) return;
  charts.set(id, { name, rows, change, drawn: charts.get(id)?.drawn });
  if (charts.get(id).drawn) draw(id); else seen.observe($(id));
}

async function draw(id) {
  const one = charts.get(id), spec = structuredClone(V.charts[one.name]);
  one.drawn = true;
  const rows = one.rows();
  if (!rows.length) { $(id).textContent = "Nothing to show."; return; }
  spec.datasets = { rows };
  spec.config = colours();
  if (isDark()) paintDark(spec);
  oneLegend(spec, rows);
  if (one.change) one.change(spec, rows);
  const renderer = rows.length > 1500 ? "canvas" : "svg";
  const made = await vegaEmbed($(id), spec, {
    mode: "vega-lite", ast: true, renderer, tooltip: { theme: isDark() ? "dark" : "light", sanitize: (value) => escaped(visible(String(value))) },
    actions: { export: true, source: false, compiled: false, editor: false }, downloadFileName: "devinterp-" + id,
  });
  one.view?.finalize();
  one.view = made.view;
  $(id).dataset.drawn = String(Number($(id).dataset.drawn || 0) + 1);
}

function oneLegend(spec, rows) {  // colour, shape and dash of one field share a legend where their domains are the same
  for (const { encoding } of spec.layer ?? [spec])
    for (const channel of ["color", "shape", "strokeDash"]) {
      const of = encoding?.[channel];
      if (of?.type === "nominal" && rows.some((row) => row[of.field] !== undefined)) of.scale.domain = [...new Set(rows.map((row) => row[of.field]).filter((name) => name !== undefined))];
    }
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");

function paintDark(spec) {  // white, the middle of signed scales, and what is dark in the palette, on dark paper
  const other = { "#FFFFFF": getComputedStyle(root).getPropertyValue("--paper").trim(), "#000000": "#FFFFFF", "#0072B2": "#56B4E9", "#56B4E9": "#A9B8FF" };
  const walk = (value) => {
    for (const key of Object.keys(value)) {
      if (Object.hasOwn(other, value[key])) value[key] = other[value[key]];
      else if (value[key] && typeof value[key] === "object" && key !== "datasets") walk(value[key]);
    }
  };
  walk({ spec: { ...spec, datasets: null } });
}

function limits(values) {  // as pictures have them: nearly all values lie within
  const sizes = values.filter((x) => x !== null && !Number.isNaN(x)).map(Math.abs).sort((a, b) => a - b);
  return sizes.length ? sizes[Math.floor(0.99 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1 : 1;
}

function within(spec, rows) {
  const limit = limits(rows.filter((row) => row.value !== undefined).map((row) => row.value)), scale = spec.layer[0].encoding.color.scale;
  scale.domain = [-limit, 0, limit];
  delete scale.domainMid;
}

// ---- choices
function options(select, names) {
  select.replaceChildren(...names.map((name, at) => { const one = document.createElement("option"); one.value = at; one.textContent = visible(name); return one; }));
}
function onChange(ids, act) { for (const id of ids) $(id)?.addEventListener("change", act); }

// ---- tables
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows], numeric = rows.some((row) => row.cells[at].classList.contains("number"));
    const key = (row) => (numeric ? parseFloat(row.cells[at].dataset.v) : row.cells[at].dataset.v);
    const missing = (x) => numeric && Number.isNaN(x);
    rows.sort((a, b) => {
      const x = key(a), y = key(b);
      if (missing(x) || missing(y)) return missing(x) - missing(y);  // what is not known comes last, either way
      return (numeric ? x - y : x.localeCompare(y, undefined, { numeric: true })) * (up ? 1 : -1);
    });
    table.tBodies[0].append(...rows);
  }));
}

// ---- LLC over checkpoints
function llcRows(series) {
  const rows = [];
  for (const run of V.runs) {
    const at = V.checkpoints.indexOf(run.checkpoint), place = V.steps ? V.steps[at] : at;
    for (const [name, llc, sem, loss] of series(run))
      if (llc !== null) rows.push({ at: place, name: visible(run.checkpoint), series: visible(name), llc, sem, low: llc - 2 * sem, high: llc + 2 * sem, loss });
  }
  return rows;
}
function stepsAxis(spec) {
  if (!V.steps) return;
  for (const layer of spec.layer) {
    layer.encoding.x.axis = { ...layer.encoding.x.axis, values: V.steps, labelOverlap: true };
    layer.encoding.x.scale = { type: "symlog", constant: Math.min(...V.steps.filter((step) => step > 0), Infinity) || 1 };
    if (!Number.isFinite(layer.encoding.x.scale.constant)) layer.encoding.x.scale.constant = 1;
  }
}
const whole = (run) => run.restriction === V.full;
const overCheckpoints = V.steps ? "checkpoints" : "checkpoints by name";
chart("llc-whole", overCheckpoints, () => llcRows((run) => whole(run) ? [["sampling data", run.llc, run.sem, run.loss],
  ...Object.entries(run.observables).map(([name, [llc, sem, loss]]) => [name, llc, sem, loss])] : []), stepsAxis);
chart("llc-components", overCheckpoints, () => llcRows((run) => whole(run) ? [] : [[run.restriction, run.llc, run.sem, run.loss]]), stepsAxis);

// ---- chains of one run
function showRun() {
  const run = V.runs[$("run").value];
  for (const row of document.querySelectorAll("tr[data-run]")) row.classList.toggle("taken", row.dataset.run === $("run").value);
  $("run-sentences").replaceChildren(...run.sentences.map((line) => { const item = document.createElement("li"); item.textContent = visible(line); return item; }));
  chart("traces", "traces", () => run.traces.flatMap((trace, chain) => {
    let sum = 0;
    return trace.map((value, at) => ({ draw: at + 1, chain: `chain ${chain}: ${run.verdicts[chain]}`, value, running: value === null ? null : (sum += value) / (at + 1),
      nats: value === null || !run.n_beta ? null : value / run.n_beta, low: run.llc - 2 * run.sem, high: run.llc + 2 * run.sem }));
  }).filter((row) => row.value !== null));
}
options($("run"), V.runs.map((run) => run.name));
onChange(["run"], showRun);
for (const row of document.querySelectorAll("tr[data-run]")) row.addEventListener("click", () => { $("run").value = row.dataset.run; showRun(); $("chains").scrollIntoView({ behavior: "smooth" }); });
showRun();

// ---- text
const tip = $("tip");
function showTip(lines, x, y) {
  tip.textContent = lines.join("\n");
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 8)) + "px";
  tip.style.top = (y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18) + "px";
}
const bytes = new Map();
function influencesOf(at) {  // of one checkpoint, decoded when first asked for
  if (!bytes.has(at)) {
    const tokens = V.influences[at]?.tokens;
    bytes.set(at, tokens ? Int8Array.from(atob(tokens.hundredths), (c) => (c.charCodeAt(0) << 24) >> 24) : null);
  }
  return bytes.get(at);
}
let picked = null;  // {observable, sequence, position}
const placeOf = (at, text) => V.influences[at]?.tokens?.rows.find(([name, sequence]) => name === text.observable && sequence === text.sequence)?.[2] ?? -1;
function measures(at) {
  const of = [["LLC of the token", "llc", "dimensionless"]];
  const found = V.responses[at];
  if (found && typeof found === "object") for (const name of found.components) of.push([`susceptibility of ${name}`, name, "z-score"]);
  if (V.influences[at]?.tokens) of.push(["correlation with a token (click one)", "influence", "correlation"]);
  return of;
}
function valuesFor(at, text, [, key]) {
  const count = text.tokens.length - 1;
  if (key === "llc") return [text.values.llc, text.values.sem];
  if (key === "influence") {
    const all = influencesOf(at), tokens = V.influences[at].tokens, here = placeOf(at, text);
    const from = picked ? placeOf(at, picked) : -1;
    if (here < 0 || from < 0) return [Array(count).fill(null), null];
    const width = Math.sqrt(all.length), start = (from * tokens.length + picked.position - 1) * width + here * tokens.length;
    return [Array.from(all.subarray(start, start + tokens.length), (x) => (x === V.not_known ? null : x / 100)), null];
  }
  const found = V.responses[at].tokens.find((one) => one.observable === text.observable && one.sequence === text.sequence);
  return [found ? found.values[key] : Array(count).fill(null), null];
}
function showTexts() {
  const at = $("text-checkpoint").value, known = measures(at);
  const chosen = known[Math.min($("text-measure").value || 0, known.length - 1)];
  const texts = V.texts[at].filter((text) => visible(text.observable) === $("text-observable").selectedOptions[0]?.textContent);
  const found = texts.map((text) => valuesFor(at, text, chosen));
  const isPicked = (text, position) => picked && picked.observable === text.observable && picked.sequence === text.sequence && picked.position === position;
  const others = found.flatMap(([values], at) => values.filter((_, i) => !(chosen[1] === "influence" && isPicked(texts[at], i + 1))));
  const limit = limits(others);
  $("text-scale-low").textContent = signed(-limit);
  $("text-scale-high").textContent = signed(limit);
  $("text-unit").textContent = chosen[2] + "; underlined: negative" + (chosen[1] === "influence" && !picked ? ". Click a token." : "");
  $("texts").replaceChildren(...texts.map((text, place) => {
    const [values, errors] = found[place], box = document.createElement("div");
    box.className = "text";
    text.tokens.forEach((token, i) => {
      const span = document.createElement("span"), value = i ? values[i - 1] : null;
      span.className = "token";
      span.tabIndex = 0;
      span.textContent = visible(token).replace(/\n/g, "↵\n").replace(/\t/g, "→   ");
      if (value !== null) {
        const share = Math.min(1, Math.abs(value) / limit);
        span.style.backgroundColor = (value < 0 ? V.colours[0] : V.colours[1]) + Math.round(share * 205).toString(16).padStart(2, "0");
        span.classList.toggle("negative", value < 0);
      }
      if (isPicked(text, i)) span.classList.add("picked");
      const lines = () => [`${JSON.stringify(visible(token))}`, `${text.observable}, sequence ${text.sequence}, position ${i}`,
        ...(i ? [`${chosen[1] === "influence" && picked ? "correlation with the token clicked" : chosen[0]}: ${value === null ? "not known" : signed(value, 4)}${errors ? " ± " + number(errors[i - 1], 2) : ""}`, `loss at the checkpoint: ${number(text.loss[i - 1])} nats`] : ["nothing predicts the first token"])];
      const show = (x, y) => showTip(lines(), x, y);
      span.addEventListener("mousemove", (event) => show(event.clientX, event.clientY));
      span.addEventListener("mouseleave", () => { tip.hidden = true; });
      span.addEventListener("focus", () => { const box = span.getBoundingClientRect(); if (span.matches(":focus-visible")) show(box.left, box.bottom - 14); });
      span.addEventListener("blur", () => { tip.hidden = true; });
      const pick = () => {
        if (!i || !influencesOf(at)) return;
        picked = { observable: text.observable, sequence: text.sequence, position: i };
        $("text-measure").value = known.length - 1;
        showTexts();
        document.querySelector("#texts .picked")?.focus({ preventScroll: true });
      };
      span.addEventListener("click", pick);
      span.addEventListener("keydown", (event) => { if (event.key === "Enter") pick(); });
      box.append(span);
    });
    return box;
  }));
}
function textChoices() {
  const at = $("text-checkpoint").value, before = [$("text-measure").value, $("text-observable").value];
  options($("text-measure"), measures(at).map(([name, , unit]) => `${name} (${unit})`));
  options($("text-observable"), [...new Set(V.texts[at].map((text) => text.observable))]);
  [["text-measure", before[0]], ["text-observable", before[1]]].forEach(([id, value]) => { if (value !== "" && value < $(id).options.length) $(id).value = value; });
  showTexts();
}
if ($("texts")) {
  options($("text-checkpoint"), V.checkpoints);
  $("text-checkpoint").value = V.checkpoints.length - 1;
  onChange(["text-checkpoint"], textChoices);
  onChange(["text-measure", "text-observable"], showTexts);
  textChoices();
}

// ---- influences between sequences
function rowsFor(id, at) { for (const row of document.querySelectorAll(`#${id} tr[data-at]`)) row.hidden = row.dataset.at !== String(at); }
function showInfluences() {
  const at = $("influence-checkpoint").value, found = V.influences[at];
  rowsFor("pairs", at);
  if (!found) { chart("influence-chart", "influences", () => []); return; }
  const by = $("influence-order").value === "1", order = by ? found.order : found.sequences.map((_, i) => i);
  const name = found.sequences.map((one) => visible(`${one.observable} ${one.sequence}: ${one.text}`));
  chart("influence-chart", "influences", () => order.flatMap((i, row) => order.map((j, column) => ({ row, column, value: i === j ? null : found.matrix[i][j],
    first: name[i], second: name[j], clusters: `${found.cluster[i]} and ${found.cluster[j]}` }))).filter((one) => one.value !== null).concat(order.flatMap((i, at) => { const group = by ? `cluster ${found.cluster[i]}` : visible(found.sequences[i].observable); return [{ row: at, column: -1, group }, { row: -1, column: at, group }]; })), within);
}
if ($("influence-chart")) {
  options($("influence-checkpoint"), V.checkpoints);
  $("influence-checkpoint").value = V.checkpoints.length - 1;
  options($("influence-order"), ["by observable", "by cluster"]);
  onChange(["influence-checkpoint", "influence-order"], showInfluences);
  showInfluences();
}

// ---- components
function showComponents() {
  const at = $("component-checkpoint").value, found = V.responses[at], there = found && typeof found === "object";
  $("component-note").textContent = there ? `Estimator ${found.estimator}, sampling task ${found.task}.` : found || "No components at this checkpoint.";
  chart("responses", "responses", () => !there ? [] : found.components.flatMap((component, c) => found.observables.map((observable, o) => {
    const mean = found.means[o][c], sem = found.errors ? found.errors[o][c] : 0;
    return { component: visible(component), observable: visible(observable), mean, sem, low: mean - 2 * sem, high: mean + 2 * sem };
  })), (spec) => { spec.height = 4 + found.components.length * (6 + 12 * found.observables.length); });
  chart("by-sequence", "sequences", () => !there ? [] : found.by_sequence.flatMap((values, at) => values.map((value, c) => ({ component: visible(found.components[c]), at,
    name: visible(`${found.sequences[at][0]} ${found.sequences[at][1]}`), value })))
    .concat(found.sequences.map(([name], at) => ({ component: "observable", at, group: visible(name) }))), (spec, rows) => { within(spec, rows); spec.height = 18 * (found.components.length + 1); });
  const points = there && found.points, by = $("point-kind").value === "1" ? 3 : 2;
  $("point-note").textContent = points ? `${points.rows.length} of ${points.of} tokens. The axes hold ${Math.round(100 * points.shares[0])} % and ${Math.round(100 * points.shares[1])} % of the variance. Scroll to zoom, drag to move, click the legend to single out a kind.` : "";
  chart("points", "points", () => !points ? [] : points.rows.map((row) => ({ x: row[0], y: row[1], observable: visible(row[2]), kind: visible(row[by]), text: visible(`${row[4]} [${row[5]}]`) })));
}
if ($("responses")) {
  options($("component-checkpoint"), V.checkpoints);
  $("component-checkpoint").value = V.checkpoints.length - 1;
  options($("point-kind"), ["observable", "kind of token"]);
  onChange(["component-checkpoint", "point-kind"], showComponents);
  showComponents();
}

// ---- light and dark
function redraw() { for (const [id, one] of charts) if (one.drawn) draw(id); }
$("theme").addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; redraw(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
