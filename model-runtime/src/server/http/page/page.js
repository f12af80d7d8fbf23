"use strict";

const at = (id) => document.getElementById(id);

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function row(table, cells, kind = "td") {
  const made = table.appendChild(element("tr"));
  for (const cell of cells) made.append(element(kind, cell, typeof cell === "number" || /^[\d.]/.test(cell) ? { class: "number" } : {}));
}

async function get(path) {
  const answer = await fetch(path);
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.error || `${path}: ${answer.status}`);
  return body;
}

const bytes = (size) => {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) { size /= 1024; unit += 1; }
  return `${unit ? size.toFixed(1) : size} ${units[unit]}`;
};

const milliseconds = (ms) => (ms < 1 ? `${(ms * 1000).toFixed(0)} µs` : `${ms.toFixed(ms < 10 ? 2 : 1)} ms`);

const shapeText = (shape) => `[${shape.map((size) => (size < 0 ? "any" : size)).join(", ")}]`;

const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

/** Zeros of a shape, or empty texts: what a person changes. */
function sample(datatype, shape) {
  const count = shape.reduce((product, size) => product * size, 1);
  return Array.from({ length: count }, () => (datatype === "BYTES" ? "" : datatype === "BOOL" ? false : 0));
}

function showSignature(model) {
  const table = at("signature");
  row(table, ["", "name", "type", "shape"], "th");
  for (const [kind, tensors] of [["input", model.inputs], ["output", model.outputs]])
    for (const tensor of tensors) row(table, [kind, tensor.name, tensor.datatype, shapeText(tensor.shape)]);
}

/** Fills the text area with the pictures that are chosen, in base64. */
function picker(area, shape) {
  const chosen = element("input", undefined, { type: "file", accept: "image/png,image/jpeg,image/webp", multiple: "", "aria-label": "pictures" });
  chosen.addEventListener("change", async () => {
    const read = (file) => new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onload = () => resolve(reader.result);
      reader.onerror = () => reject(reader.error);
      reader.readAsDataURL(file);
    });
    const pictures = await Promise.all(Array.from(chosen.files, read));
    area.value = JSON.stringify(pictures);
    shape.value = JSON.stringify([pictures.length]);
  });
  return chosen;
}

// Where texts or pictures stand for tensors, they come first; what is left empty is not sent.
const isText = ({ name, datatype, shape }) => datatype === "BYTES" && shape.length === 1 && (name === "text" || name === "text_pair");
const isPicture = ({ name, datatype }) => datatype === "BYTES" && name === "image";

/** Texts, one a line. */
function textField({ name }) {
  return [
    element("label", `${name}: one a line`, { for: `${name}/data` }),
    element("textarea", "", { id: `${name}/data`, name: `${name}/data`, class: "text" }),
  ];
}

/** A tensor: its shape and its values, which are zeros until somebody writes others. */
function tensorField({ name, datatype, shape: open }, empty) {
  const limit = 4096;
  const zeros = (shape) => JSON.stringify(sample(datatype, shape.reduce((a, b) => a * b, 1) > limit ? [0] : shape));
  const shape = open.map((size) => (size < 0 ? 1 : size));
  const label = element("label", `${name} (${datatype}), shape `);
  const shapeField = element("input", undefined, { name: `${name}/shape`, value: JSON.stringify(shape), "aria-label": `shape of ${name}` });
  let untouched = empty ? "" : zeros(shape);
  const area = element("textarea", untouched, { name: `${name}/data`, spellcheck: "false", "aria-label": `data of ${name}` });
  shapeField.addEventListener("change", () => {
    let wanted;
    try {
      wanted = JSON.parse(shapeField.value);
    } catch {
      return;
    }
    if (area.value !== untouched || !Array.isArray(wanted) || !wanted.every((size) => Number.isInteger(size) && size >= 0)) return;
    untouched = zeros(wanted);
    area.value = untouched;
  });
  label.append(shapeField);
  return [label, area, ...(isPicture({ name, datatype }) && empty ? [picker(area, shapeField)] : [])];
}

function showForm(model) {
  const stands = (input) => isText(input) || isPicture(input);
  const instead = model.inputs.length > 1 && model.inputs.some(stands);
  const first = model.inputs.filter((input) => instead && stands(input));
  const tensors = model.inputs.filter((input) => !first.includes(input));
  for (const input of first) at("inputs").append(...(isText(input) ? textField(input) : tensorField(input, true)));
  let rest = at("inputs");
  if (instead && tensors.length) {
    rest = rest.appendChild(element("details"));
    rest.append(element("summary", "or the model's own tensors"));
  }
  for (const input of tensors) rest.append(...tensorField(input, instead));
  at("form").addEventListener("submit", (event) => {
    event.preventDefault();
    infer(model);
  });
}

function read(form, name) {
  const text = form.elements[name].value;
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`${name.replace("/", ": ")} is not a JSON list`);
  }
}

async function infer(model) {
  const form = at("form");
  const button = form.querySelector("button");
  at("error").textContent = "";
  at("outputs").replaceChildren();
  at("took").textContent = "";
  button.disabled = true;
  try {
    const given = model.inputs.filter(({ name }) => form.elements[`${name}/data`].value.trim() !== "");
    const inputs = given.map(({ name, datatype }) => {
      if (form.elements[`${name}/shape`]) return { name, datatype, shape: read(form, `${name}/shape`), data: read(form, `${name}/data`) };
      const data = form.elements[`${name}/data`].value.trim().split("\n");
      return { name, datatype, shape: [data.length], data };
    });
    if (!inputs.length) throw new Error("write something first");
    const begun = performance.now();
    const answer = await fetch(`v2/models/${encodeURIComponent(model.name)}/infer`, { method: "POST", body: JSON.stringify({ inputs }) });
    const body = await answer.json();
    at("took").textContent = `answered in ${milliseconds(performance.now() - begun)}`;
    if (!answer.ok) throw new Error(body.error);
    body.outputs.forEach(showOutput);
  } catch (error) {
    at("error").textContent = error.message;
  } finally {
    button.disabled = false;
  }
}

/** Where the value at an index of flat data lies in its tensor; a first axis of one is left out. */
function place(index, shape) {
  const indices = [];
  for (const size of shape.toReversed()) {
    indices.unshift(index % size);
    index = Math.floor(index / size);
  }
  return (shape.length > 1 && shape[0] === 1 ? indices.slice(1) : indices).join(", ");
}

function showOutput({ name, datatype, shape, data }) {
  const outputs = at("outputs");
  outputs.append(element("h3", `${name}: ${datatype} ${shapeText(shape)}`));
  const drawable = data.length <= 100 && data.every((value) => typeof value === "number");
  if (!drawable) {
    const shown = data.slice(0, 2000).map((value) => JSON.stringify(value)).join(", ");
    outputs.append(element("pre", `[${shown}${data.length > 2000 ? ", …" : ""}]`));
    return;
  }
  // One scale, on which zero has its place: to its left what is negative.
  const [least, most] = [Math.min(0, ...data), Math.max(0, ...data)];
  const share = (value) => (100 * value) / (most - least || 1);
  const bars = outputs.appendChild(element("div", undefined, { class: "bars" }));
  bars.style.setProperty("--zero", `${share(-least)}%`);
  data.forEach((value, index) => {
    const bar = element("b", undefined, value < 0 ? { class: "negative" } : {});
    bar.style.left = `${share(Math.min(value, 0) - least)}%`;
    bar.style.width = `${share(Math.abs(value))}%`;
    const track = element("i");
    track.append(bar);
    bars.append(element("span", place(index, shape)), track, element("span", Number(value.toPrecision(6)), { class: "value" }));
  });
}

function showCosts({ summary }) {
  const table = at("costs");
  row(table, ["", "before", "after"], "th");
  row(table, ["size", bytes(summary.sizeBefore), bytes(summary.sizeAfter)]);
  const digits = (value) => String(Number(value.toPrecision(5)));
  if (summary.metric) row(table, [summary.metric.name, digits(summary.metric.before), digits(summary.metric.after)]);
  if (summary.latency) row(table, ["latency", milliseconds(summary.latency.beforeUs / 1000), milliseconds(summary.latency.afterUs / 1000)]);
  if (summary.fidelity !== undefined) row(table, ["fidelity to the original", "", digits(summary.fidelity)]);
  row(table, ["zeros among the weights", "", `${(100 * summary.sparsity).toFixed(1)} %`]);
  at("card").hidden = false;
}

const seconds = [];
let last;

async function look(name) {
  const { model_stats: [model] } = await get(`v2/models/${encodeURIComponent(name)}/stats`);
  const now = { ...model.inference_stats.success, failed: model.inference_stats.fail.count, executions: model.execution_count, rows: model.inference_count };
  if (last) {
    const count = now.count - last.count;
    seconds.push(count ? (now.ns - last.ns) / count / 1e6 : null);
    if (seconds.length > 120) seconds.shift();
    draw();
  }
  last = now;
  const mean = now.count ? `, ${milliseconds(now.ns / now.count / 1e6)} each on average` : "";
  const batch = now.executions ? `, ${(now.rows / now.executions).toFixed(1)} rows a batch` : "";
  at("totals").textContent = `Since the start: ${counted(now.count, "request")} answered${mean}${batch}, ${now.failed} failed.`;
}

const verdicts = { TooFew: "too few to tell", Stable: "stable", Moderate: "moderate", Significant: "significant" };

function showDrift({ tensors, rows, window_s, reference }) {
  at("drifted").textContent =
    `${counted(rows, "sample")} of the last ${window_s / 60} minutes beside ${reference.samples} that the optimiser saw: PSI from 0.1 is moderate, from 0.25 significant.`;
  const table = at("distances");
  table.replaceChildren();
  row(table, ["", "tensor", "seen", "PSI", "KS", "drift"], "th");
  const digits = (value) => (value === null ? "" : value.toFixed(3));
  for (const { name, side, kind, count, psi, ks, verdict } of tensors)
    row(table, [`${side}: ${kind}`, name, String(count), digits(psi), digits(ks), verdicts[verdict]]);
  at("drift").hidden = false;
}

function draw() {
  const chart = at("chart");
  // As wide as it is shown, so that its text keeps its size.
  const [width, height, left] = [chart.clientWidth, 140, 62];
  chart.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const known = seconds.filter((value) => value !== null);
  const top = Math.max(...known, 1e-6) * 1.15;
  const x = (index) => left + ((width - left) * index) / 119;
  const y = (value) => height - 12 - ((height - 24) * value) / top;
  const svg = (name, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text) made.textContent = text;
    return made;
  };
  const parts = [svg("line", { x1: left, x2: width, y1: y(0), y2: y(0) }), svg("text", { x: 0, y: y(0) + 4 }, "0")];
  if (known.length) {
    parts.push(svg("line", { x1: left, x2: width, y1: y(top / 1.15), y2: y(top / 1.15) }), svg("text", { x: 0, y: y(top / 1.15) + 4 }, milliseconds(top / 1.15)));
  }
  let run = [];
  const flush = () => {
    if (run.length > 1) parts.push(svg("polyline", { points: run.map((point) => point.join(",")).join(" ") }));
    else if (run.length) parts.push(svg("circle", { cx: run[0][0], cy: run[0][1], r: 2 }));
    run = [];
  };
  const offset = 120 - seconds.length;
  seconds.forEach((value, index) => (value === null ? flush() : run.push([x(index + offset), y(value)])));
  flush();
  chart.replaceChildren(...parts);
}

async function start() {
  try {
    const { models: [name] } = await get("v2/models");
    document.title = `${name} · Plimsoll`;
    at("name").textContent = name;
    const model = await get(`v2/models/${encodeURIComponent(name)}`);
    const config = await get(`v2/models/${encodeURIComponent(name)}/config`);
    const batching = config.max_batch_size ? `batches of up to ${config.max_batch_size} rows` : "requests run one by one";
    at("about").textContent = `version ${model.versions.join(", ")}, ${config.backend} on ${counted(config.instance_group[0].count, "instance")}, ${batching}`;
    at("metadata").href = `v2/models/${encodeURIComponent(name)}`;
    showSignature(model);
    showForm(model);
    get("report.json").then(showCosts, () => {});
    const again = () => look(name).catch(() => {}).then(() => setTimeout(again, 1000));
    again();
    const compare = () => get(`v2/models/${encodeURIComponent(name)}/drift`).then((drift) => {
      showDrift(drift);
      setTimeout(compare, 5000);
    }, () => {});
    compare();
  } catch (error) {
    at("about").textContent = error.message;
    setTimeout(() => location.reload(), 2000);
  }
}

start();
