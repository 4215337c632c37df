// The page around the charts: which are drawn, samples, rollouts, prompts, settings, theme.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const COLORS = 8, several = data.runs.length > 1;
const color = (place) => `var(--c${place % COLORS})`;
let album = null;

/** The picture at a place, parsed once it is first asked for. */
function picture(place) {
  album = album || JSON.parse(byId("pictures").textContent);
  return place < 0 ? null : `data:image/jpeg;base64,${album[place]}`;
}

for (const node of document.querySelectorAll("[data-run].swatch")) node.style.background = color(Number(node.dataset.run));

// -- charts -----------------------------------------------------------------------------------------------------------

const charts = [];

function lineOf(line, spec) {
  const roles = [...new Set(spec.lines.map((each) => each.role))];
  const role = roles.indexOf(line.role);
  const alone = roles.length === 1;
  return {
    name: several ? (alone ? data.runs[line.run] : `${data.runs[line.run]}, ${line.role}`) : alone ? "last" : line.role,
    color: several ? color(line.run) : line.role === "held-out" ? color(1) : color(line.role === "training" ? 0 : role),
    dash: several && role > 0 ? ["", "6 3", "2 3"][role % 3] : "",
    training: line.role !== "held-out", tag: line.tag, each: line.each,
    steps: data.steps[line.steps], values: line.values, low: line.low, high: line.high,
  };
}

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    const chart = charts.find((each) => each.node === target);
    chart.ready = true;
    chart.draw();
    sized.observe(target);
  }
}, { rootMargin: "300px" });
const sized = new ResizeObserver((entries) => {
  for (const { target } of entries) charts.find((each) => each.node === target).draw();
});

for (const section of data.sections) {
  const place = document.querySelector(`[data-charts="${section.key}"]`);
  for (const spec of section.charts) {
    const limits = spec.limits.map((limit) => ({ value: limit.value, color: several ? color(limit.run) : "" }));
    const chart = new Chart(spec, spec.lines.map((line) => lineOf(line, spec)), limits);
    chart.words = `${section.title} ${spec.title} ${spec.lines.map((line) => line.tag).join(" ")}`.toLowerCase();
    charts.push(chart);
    place.append(chart.node);
    seen.observe(chart.node);
  }
}

function smooth() {
  const level = [0, 1, 3][byId("smoothing").selectedIndex];
  for (const chart of charts) { chart.smoothing = level; if (chart.ready) chart.draw(); }
}

function findCharts() {
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const chart of charts) {
    chart.node.hidden = !words.every((word) => chart.words.includes(word));
    count += !chart.node.hidden;
  }
  for (const section of document.querySelectorAll("[data-section]")) section.hidden = words.length > 0 && !section.querySelector(".chart:not([hidden])");
  byId("found").textContent = words.length ? `${count} of ${charts.length} charts` : "";
}

if (byId("smoothing")) {
  if (charts.some((chart) => chart.lines.some((line) => line.training && line.values.length > 60))) byId("smoothing").selectedIndex = 1;
  smooth();
  byId("smoothing").addEventListener("change", smooth);
  byId("find").addEventListener("input", findCharts);
}

const stepText = (step) => `step ${step.toLocaleString("en")}`;

// -- pictures ---------------------------------------------------------------------------------------------------------

function shot(place, caption, prompt) {
  const source = picture(place);
  if (source === null) return el("div", { class: "missing" }, "no picture");
  return el("button", { class: "shot", type: "button", "aria-label": `Enlarge: ${caption}`, onclick: () => enlarge(source, caption, prompt) },
    el("img", { src: source, alt: prompt || caption, loading: "lazy", decoding: "async" }), el("span", {}, caption));
}

function enlarge(source, caption, prompt) {
  byId("large-body").replaceChildren(el("img", { src: source, alt: prompt }), el("p", {}, prompt), el("p", { class: "quiet" }, caption));
  byId("large").showModal();
}
byId("large").addEventListener("click", (event) => { if (event.target === byId("large")) byId("large").close(); });

/** At the head of the page: the first prompts, at the start and now; of several runs, by each of them now. */
function drawStrip() {
  const runs = data.samples.map((each, run) => ({ each, run })).filter((one) => one.each);
  const rows = several
    ? runs.map(({ each, run }) => [data.runs[run], each.steps.at(-1), each])
    : [...new Set([runs[0].each.steps[0], runs[0].each.steps.at(-1)])].map((one) => [stepText(one.step), one, runs[0].each]);
  const prompts = runs[0].each.prompts.slice(0, 6);
  byId("strip").style.setProperty("--columns", prompts.length);
  for (const [name, one, each] of rows) {
    byId("strip").append(el("span", { class: "of-row" }, name));
    prompts.forEach((prompt, i) => byId("strip").append(shot(each.prompts[i] === prompt ? one.pictures[i] ?? -1 : -1, name, prompt)));
  }
  byId("strip").append(el("span", {}), ...prompts.map((prompt) => el("span", { class: "quiet", title: prompt }, prompt)));
}
if (byId("strip")) drawStrip();

/** Calls `draw` once the section comes near, and whenever one of the inputs changes. */
function whenNear(id, inputs, draw) {
  let ready = false;
  new IntersectionObserver((entries, observer) => {
    if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); ready = true; draw(); }
  }, { rootMargin: "400px" }).observe(byId(id));
  for (const input of inputs) byId(input).addEventListener("input", () => { if (ready) draw(); });
}

const matches = (prompt, find) => find.toLowerCase().split(/\s+/).every((word) => prompt.toLowerCase().includes(word));

function drawSamples() {
  const all = samplesSteps(), step = all[Number(byId("samples-step").value)], find = byId("samples-find").value;
  byId("samples-at").textContent = `${stepText(step)} of ${all.at(-1).toLocaleString("en")}`;
  const prompts = [...new Set(data.samples.filter(Boolean).flatMap((each) => each.prompts.map((text, i) => `${i}\n${text}`)))];
  let most = 0;
  byId("samples-grid").replaceChildren();
  for (const key of prompts) {
    const [i, prompt] = [Number(key.split("\n", 1)[0]), key.slice(key.indexOf("\n") + 1)];
    if (!matches(prompt, find)) continue;
    const pair = el("div", { class: "pair" });
    data.samples.forEach((each, run) => {
      if (!each || each.prompts[i] !== prompt) return;
      const now = each.steps.filter((one) => one.step <= step).at(-1), first = each.steps[0], who = several ? `${data.runs[run]}, ` : "";
      if (byId("samples-first").checked && now !== first) pair.append(shot(first.pictures[i] ?? -1, `${who}${stepText(first.step)}`, prompt));
      pair.append(now ? shot(now.pictures[i] ?? -1, `${who}${stepText(now.step)}`, prompt) : el("div", { class: "missing" }, `${who}none yet`));
    });
    most = Math.max(most, pair.childElementCount);
    byId("samples-grid").append(el("figure", { class: "tile" }, pair, el("figcaption", {}, prompt || `picture ${i + 1}`)));
  }
  byId("samples-grid").classList.toggle("pairs", most > 1);
  byId("samples-grid").classList.toggle("many", most > 2);
  if (!byId("samples-grid").childElementCount) byId("samples-grid").append(el("p", { class: "quiet" }, "No prompt has these words."));
}

const samplesSteps = () => [...new Set(data.samples.filter(Boolean).flatMap((each) => each.steps.map((one) => one.step)))].sort((a, b) => a - b);

if (byId("samples")) {
  const last = samplesSteps().length - 1;
  byId("samples-step").max = last;
  byId("samples-step").value = last;
  byId("samples-step").disabled = last === 0;
  byId("samples-told").textContent = data.samples.filter(Boolean).map((each) => each.told).filter(Boolean).join(" ");
  whenNear("samples", ["samples-step", "samples-first", "samples-find"], drawSamples);
}

// -- rollouts ---------------------------------------------------------------------------------------------------------

const mean = (values) => { const real = values.filter((value) => value !== null); return real.length ? real.reduce((a, b) => a + b, 0) / real.length : null; };
const signed = (value) => value === null || value === undefined ? "-" : (value > 0 ? "+" : "") + shown(value);
const tone = (value) => value > 0 ? "up" : value < 0 ? "down" : "";

function options(id, pairs) {
  const before = byId(id).value;
  byId(id).replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
  if (pairs.some(([value]) => String(value) === before)) byId(id).value = before;
}

/** The samples of prompt `p`: plans of renders with their values. */
function groupOf(kept, p, figure) {
  const each = kept.plans * kept.renders;
  const plans = Array.from({ length: kept.plans }, (_, n) => {
    const rows = Array.from({ length: kept.renders }, (_, m) => p * each + n * kept.renders + m);
    const renders = rows.map((row) => ({ row, value: kept.scores[figure][row], advantage: kept.render_advantages[row] }));
    return { number: n + 1, renders, value: mean(renders.map((one) => one.value)), advantage: kept.plan_advantages[p * kept.plans + n] };
  });
  const real = plans.flatMap((plan) => plan.renders).filter((one) => one.value !== null);
  const values = real.map((one) => one.value), [low, high] = bounds(values);
  return {
    prompt: kept.prompts[p], plans, mean: mean(values), spread: values.length ? high - low : -1,
    best: high > low ? real.find((one) => one.value === high) : null, worst: high > low ? real.find((one) => one.value === low) : null,
  };
}

function render(kept, group, plan, one, name) {
  const mark = one === group.best ? "best" : one === group.worst ? "worst" : "";
  const which = kept.renders > 1 ? `plan ${plan.number}, render ${plan.renders.indexOf(one) + 1}` : `plan ${plan.number}`;
  const others = Object.keys(kept.scores).map((key) => `${kept.names[key]} ${shown(kept.scores[key][one.row])}`).join(", ");
  const node = el("div", { class: `render ${mark}` }, shot(kept.pictures[one.row], `${which}: ${others}`, group.prompt));
  const caption = node.querySelector(".shot span");
  if (caption) caption.replaceChildren(`${name} ${shown(one.value)}`);
  if (mark) node.append(el("span", { class: "mark" }, mark));
  const advantages = [kept.renders === 1 ? ["plan", plan.advantage] : null, ["render", one.advantage]].filter((each) => each && each[1] !== undefined);
  for (const [half, value] of advantages)
    node.append(el("span", { class: `under ${tone(value)}`, title: `advantage of the ${half}` }, `${advantages.length > 1 ? half : "advantage"} ${signed(value)}`));
  return node;
}

function promptNode(kept, group, name, ends) {
  const title = el("h3", {}, group.prompt || "without a text");
  const about = el("span", { class: "quiet" }, `${name}: mean ${shown(group.mean)}, spread ${group.spread < 0 ? "-" : shown(group.spread)}`);
  const node = el("div", { class: "prompt" }, title, about);
  const chosen = (plan) => plan.renders.filter((one) => !ends || one === group.best || one === group.worst);
  if (kept.renders === 1) {
    const all = el("div", { class: "renders" });
    for (const plan of group.plans) all.append(...chosen(plan).map((one) => render(kept, group, plan, one, name)));
    if (!all.childElementCount) all.append(el("p", { class: "quiet" }, "All are alike."));
    node.append(el("div", { class: "plan one" }, el("div", { class: "about-plan" }, `${group.plans.length} plans, one render each`), all));
    return node;
  }
  for (const plan of group.plans) {
    const renders = chosen(plan).map((one) => render(kept, group, plan, one, name));
    if (!renders.length) continue;
    const side = el("div", { class: "about-plan" }, el("b", {}, `plan ${plan.number}`), el("div", {}, `${name} ${shown(plan.value)}`));
    if (plan.advantage !== undefined) side.append(el("div", { class: tone(plan.advantage) }, `advantage ${signed(plan.advantage)}`));
    node.append(el("div", { class: "plan" }, side, el("div", { class: "renders" }, ...renders)));
  }
  if (ends && !group.best) node.append(el("p", { class: "quiet" }, "All are alike."));
  return node;
}

function drawRollouts() {
  const own = data.rollouts[Number(byId("rollouts-run").value)];
  byId("rollouts-step").max = own.steps.length - 1;
  const kept = own.steps[Math.min(own.steps.length - 1, Number(byId("rollouts-step").value))];
  options("rollouts-figure", Object.keys(kept.scores).map((name) => [name, kept.names[name]]));
  const figure = byId("rollouts-figure").value, order = byId("rollouts-order").value, find = byId("rollouts-find").value;
  byId("rollouts-at").textContent = `${stepText(kept.step)} of ${own.steps.at(-1).step.toLocaleString("en")}`;
  const keys = { drawn: () => 0, best: (group) => -(group.mean ?? -Infinity), worst: (group) => group.mean ?? Infinity, spread: (group) => -group.spread };
  const groups = kept.prompts.map((_, p) => groupOf(kept, p, figure)).filter((group) => matches(group.prompt, find));
  groups.sort((a, b) => keys[order](a) - keys[order](b) || 0);
  const ends = byId("rollouts-show").value === "ends";
  byId("rollouts-list").replaceChildren(...groups.map((group) => promptNode(kept, group, kept.names[figure], ends)));
  if (!groups.length) byId("rollouts-list").append(el("p", { class: "quiet" }, "No prompt has these words."));
  byId("rollouts-told").textContent = `Kept: ${kept.prompts.length} of ${kept.of} prompts of the step (logging.rollout_prompts). ${own.told}`;
}

if (byId("rollouts")) {
  const runs = data.runs.map((name, run) => [run, name]).filter(([run]) => data.rollouts[run]);
  options("rollouts-run", runs);
  byId("rollouts-of").hidden = runs.length < 2;
  const newest = () => {
    const count = data.rollouts[Number(byId("rollouts-run").value)].steps.length;
    byId("rollouts-step").max = count - 1;
    byId("rollouts-step").value = count - 1;
    byId("rollouts-step").disabled = count === 1;
  };
  newest();
  byId("rollouts-run").addEventListener("input", newest);
  whenNear("rollouts", ["rollouts-run", "rollouts-step", "rollouts-figure", "rollouts-show", "rollouts-order", "rollouts-find"], drawRollouts);
}

// -- prompts ----------------------------------------------------------------------------------------------------------

function drawPrompts() {
  const own = data.prompts[Number(byId("prompts-run").value)];
  options("prompts-figure", Object.keys(own.figures).map((name) => [name, own.names[name]]));
  const figure = byId("prompts-figure").value, order = byId("prompts-order").value, find = byId("prompts-find").value;
  const [first, last] = own.figures[figure], sign = own.lower_is_better.includes(figure) ? -1 : 1;
  const rows = own.prompts.map((prompt, i) => ({ prompt, first: first[i], last: last[i], change: first[i] === null || last[i] === null ? null : last[i] - first[i] }));
  const keys = { moved: (row) => -Math.abs(row.change), better: (row) => -sign * row.change, worse: (row) => sign * row.change, low: (row) => row.last };
  const shownRows = rows.filter((row) => matches(row.prompt, find) && (row.first !== null || row.last !== null));
  shownRows.sort((a, b) => (a.change === null) - (b.change === null) || keys[order](a) - keys[order](b));
  byId("prompts-rows").replaceChildren(...shownRows.map((row) => el("tr", {}, el("td", {}, row.prompt), el("td", { class: "n" }, shown(row.first)),
    el("td", { class: "n" }, shown(row.last)), el("td", { class: `n ${tone(sign * row.change)}` }, signed(row.change)))));
  const left = own.of > own.prompts.length ? ` Shown: the ${own.prompts.length} that moved most of ${own.of}.` : "";
  byId("prompts-about").textContent = `Each of the ${own.on}, from step ${own.steps[0]} to step ${own.steps[1]}.${left}`;
}

if (byId("prompts")) {
  const runs = data.runs.map((name, run) => [run, name]).filter(([run]) => data.prompts[run]);
  options("prompts-run", runs);
  byId("prompts-of").hidden = runs.length < 2;
  whenNear("prompts", ["prompts-run", "prompts-figure", "prompts-order", "prompts-find"], drawPrompts);
}

// -- the rest ---------------------------------------------------------------------------------------------------------

if (byId("settings-find")) byId("settings-find").addEventListener("input", (event) => {
  const find = event.target.value;
  for (const group of document.querySelectorAll("details.keys")) {
    let count = 0;
    for (const row of group.querySelectorAll("tr")) { row.hidden = !matches(row.textContent, find); count += !row.hidden; }
    group.hidden = count === 0;
    group.open = find.trim() !== "" && count > 0;
  }
});

byId("theme").addEventListener("change", (event) => {
  if (event.target.value) document.documentElement.dataset.theme = event.target.value; else delete document.documentElement.dataset.theme;
});

const links = new Map([...document.querySelectorAll(".nav a")].map((link) => [link.hash.slice(1), link]));
const here = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (!isIntersecting) continue;
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(target.id);
    link.setAttribute("aria-current", "true");
    link.parentElement.scrollLeft = link.offsetLeft - 60;
  }
}, { rootMargin: "-15% 0px -75% 0px" });
for (const id of links.keys()) here.observe(byId(id));
