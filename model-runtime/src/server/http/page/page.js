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

function showForm(model) {
  const limit = 4096;
  // Where texts or pictures stand for tensors, these are left empty, and what is empty is not sent.
  const stands = ({ name, datatype }) => datatype === "BYTES" && (name === "text" || name === "image");
  const instead = model.inputs.length > 1 && model.inputs.some(stands);
  for (const input of model.inputs) {
    const shape = input.shape.map((size) => (size < 0 ? 1 : size));
    const data = sample(input.datatype, shape.reduce((a, b) => a * b, 1) > limit ? [0] : shape);
    const label = element("label", `${input.name} (${input.datatype}), shape `);
    const shapeField = element("input", undefined, { name: `${input.name}/shape`, value: JSON.stringify(shape), "aria-label": `shape of ${input.name}` });
    label.append(shapeField);
    const area = element("textarea", instead && !stands(input) ? "" : JSON.stringify(data), { name: `${input.name}/data`, spellcheck: "false", "aria-label": `data of ${input.name}` });
    at("inputs").append(label, area);
    if (instead && stands(input) && input.name === "image") at("inputs").append(picker(area, shapeField));
  }
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
    const inputs = given.map(({ name, datatype }) => ({
      name, datatype, shape: read(form, `${name}/shape`), data: read(form, `${name}/data`),
    }));
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

function showOutput({ name, datatype, shape, data }) {
  const outputs = at("outputs");
  outputs.append(element("h3", `${name}: ${datatype} ${shapeText(shape)}`));
  const drawable = data.length <= 100 && data.every((value) => typeof value === "number");
  if (!drawable) {
    outputs.append(element("pre", JSON.stringify(data.slice(0, 2000)) + (data.length > 2000 ? " …" : "")));
    return;
  }
  const largest = Math.max(...data.map(Math.abs)) || 1;
  data.forEach((value, index) => {
    const bar = element("div", undefined, { class: "bar" });
    const length = element("i");
    length.style.width = `${(100 * Math.abs(value)) / largest}%`;
    bar.append(element("span", index), length, element("span", Number(value.toPrecision(6))));
    outputs.append(bar);
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
  at("totals").textContent = `Since the start: ${now.count} requests answered${mean}${batch}, ${now.failed} failed.`;
}

const verdicts = { TooFew: "too few to tell", Stable: "stable", Moderate: "moderate", Significant: "significant" };

function showDrift({ tensors, rows, window_s, reference }) {
  at("drifted").textContent =
    `${rows} samples of the last ${window_s / 60} minutes beside ${reference.samples} that the optimiser saw: PSI from 0.1 is moderate, from 0.25 significant.`;
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
  const [width, height, left] = [600, 140, 56];
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
    at("about").textContent = `version ${model.versions.join(", ")}, ${config.backend} on ${config.instance_group[0].count} instance(s), ${batching}`;
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
