// The list of rollouts: filters, sorting, and only as many rows as are in sight.

const ROW = 62;
const NO_FILTER = { text: "", question: null, run: "", set: "", outcome: "", gain: "", stop: "", from: "", to: "", sort: "order" };
let filters = { ...NO_FILTER };

const SORTS = {
  order: ["in the order of the run", () => 0],
  fall: ["largest drop of belief", (r) => -r.fall],
  rise: ["largest rise of belief", (r) => -r.rise],
  idle: ["searched without gain", (r) => -r.idle],
  doubt: ["right answer, low belief", (r) => (r.grade === "right" ? (r.end ?? 2) : 3)],
  trust: ["wrong answer, high belief", (r) => (r.grade === "wrong" ? -(r.end ?? -1) : 2)],
  best: ["highest reward", (r) => -(r.outcome ?? -Infinity)],
  worst: ["lowest reward", (r) => r.outcome ?? Infinity],
  searches: ["most searches", (r) => -r.searches],
  tokens: ["most tokens", (r) => -r.tokens],
  late: ["latest step", (r) => -r.step],
};

const GAINS = {
  rose: ["rose by .1 or more", (r) => r.rise >= 0.1],
  fell: ["fell by .1 or more", (r) => r.fall >= 0.1],
  none: ["never changed by .01", (r) => r.changes.length && r.changes.every((change) => Math.abs(change) < NOTHING)],
};

function select(name, label, options) {
  const box = el("select", { name, "aria-label": label }, options.map(([value, text]) => el("option", { value }, text)));
  box.value = filters[name];
  box.addEventListener("change", () => setFilters({ [name]: box.value }, false));
  return el("label", {}, el("span", {}, label), box);
}

function input(name, label, type, more = {}) {
  const box = el("input", { name, type, "aria-label": label, ...more });
  box.value = filters[name];
  let waiting;
  box.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => setFilters({ [name]: box.value }, false), 120);
  });
  return el("label", { class: type }, el("span", {}, label), box);
}

function showFilters() {
  const { data, rollouts } = state;
  const values = (get) => [...new Set(rollouts.map(get))].filter((value) => value !== undefined && value !== "").sort();
  const any = (names) => [["", "any"], ...names.map((name) => [name, words(name)])];
  const sets = values((r) => r.set), stops = values((r) => r.stop), steps = values((r) => r.step);
  const many = new Set(steps).size > 1;
  replace($("filters"),
    input("text", "Find", "search", { placeholder: "question, answer, query or text" }),
    data.runs.length > 1 && select("run", "Run", [["", "both"], ...data.runs.map((run, i) => [String(i), run.name])]),
    sets.length > 1 && select("set", "Data set", any(sets)),
    select("outcome", "Answer", [["", "any"], ["right", "right"], ["partly", "partly right"], ["wrong", "wrong"]]),
    rollouts.some((r) => r.changes.length) && select("gain", "Belief", [["", "any"], ...Object.entries(GAINS).map(([name, [text]]) => [name, text])]),
    stops.length > 1 && select("stop", "Ended by", any(stops)),
    many && el("span", { class: "steps" }, input("from", "From step", "number"), input("to", "to", "number")),
    select("sort", "Sort", Object.entries(SORTS).map(([name, [text]]) => [name, text])),
    el("button", { type: "button", id: "reset", onclick: () => setFilters({ ...NO_FILTER }, true, false) }, "Reset"));
}

// Takes new values of filters, and shows what they leave.
function setFilters(changes, scroll = true, redraw = true) {
  filters = { ...filters, ...changes };
  if (scroll || !redraw) showFilters();
  applyFilters();
  if (scroll && redraw) $("rollouts").scrollIntoView({ block: "start" });
  if (state.shown.length && !state.shown.includes(state.selected)) select_(state.shown[0], false);
}

function applyFilters() {
  const f = filters;
  const needle = f.text.trim().toLowerCase();
  const texts = new Set();
  if (needle) state.data.texts.forEach((text, i) => text.toLowerCase().includes(needle) && texts.add(i));
  const says = (r) =>
    r.text.toLowerCase().includes(needle) || r.answers.some((answer) => answer.toLowerCase().includes(needle)) ||
    r.turns.some((turn) => turn.pieces.some(([, text]) => text.toLowerCase().includes(needle)) || turn.observations.some((i) => texts.has(i)));
  const tests = [
    f.question !== null && ((r) => r.questionKey === f.question),
    f.run !== "" && ((r) => r.run === Number(f.run)),
    f.set && ((r) => r.set === f.set),
    f.outcome && ((r) => r.grade === f.outcome),
    f.gain && GAINS[f.gain][1],
    f.stop && ((r) => r.stop === f.stop),
    f.from !== "" && ((r) => r.step >= Number(f.from)),
    f.to !== "" && ((r) => r.step <= Number(f.to)),
    needle && says,
  ].filter(Boolean);
  const key = SORTS[f.sort][1];
  state.shown = state.rollouts.filter((r) => tests.every((test) => test(r)));
  if (f.sort === "idle") state.shown = state.shown.filter((r) => r.idle);
  if (f.sort === "doubt") state.shown = state.shown.filter((r) => r.grade === "right");
  if (f.sort === "trust") state.shown = state.shown.filter((r) => r.grade === "wrong");
  if (f.sort !== "order") {
    const keys = new Map(state.shown.map((r) => [r, key(r)]));
    state.shown.sort((a, b) => keys.get(a) - keys.get(b) || a.id - b.id);
  }
  const of = state.shown.length === state.rollouts.length ? "" : ` of ${state.rollouts.length.toLocaleString("en")}`;
  replace($("matches"), el("span", {}, `${plural(state.shown.length, "rollout")}${of}`),
    f.question !== null && el("button", { type: "button", class: "chip", onclick: () => setFilters({ question: null }, false) }, "one question only ✕"));
  $("list").scrollTop = 0;
  showRows();
}

function showRows() {
  const list = $("list"), rows = $("rows");
  rows.style.height = `${state.shown.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 6);
  const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 6);
  replace(rows, state.shown.slice(first, last).map((rollout, i) => row(rollout, first + i)));
  const active = state.shown.indexOf(state.selected);
  if (active >= first && active < last) list.setAttribute("aria-activedescendant", `row-${active}`);
  else list.removeAttribute("aria-activedescendant");
}

function row(rollout, place) {
  const many = state.data.runs.length > 1;
  const facts = [
    many && runName(rollout.run), state.steps > 1 && `step ${rollout.step}`, plural(rollout.searches, "search"),
    rollout.stop && rollout.stop !== "answered" && words(rollout.stop), state.sets > 1 && rollout.set,
  ].filter(Boolean);
  return el("div", {
    class: "row", role: "option", id: `row-${place}`, "aria-selected": String(rollout === state.selected), "aria-posinset": place + 1,
    "aria-setsize": state.shown.length, style: { top: `${place * ROW}px` }, onclick: () => select_(rollout, true),
  },
  badge(rollout),
  el("div", { class: "what" }, el("div", { class: "question" }, rollout.text), el("div", { class: "muted" }, facts.join(" · "))),
  isNumber(rollout.start) && el("div", { class: "belief" }, sparkline(rollout), el("span", { class: "muted" }, `${probability(rollout.start)} → ${probability(rollout.end)}`)));
}

function move(by) {
  const at = state.shown.indexOf(state.selected);
  const next = Math.min(state.shown.length - 1, Math.max(0, at + by));
  if (state.shown.length && next !== at) select_(state.shown[next], false);
}

function moveInGroup(by) {
  const group = state.selected && state.groups.get(state.selected.group);
  if (group) select_(group[(group.indexOf(state.selected) + by + group.length) % group.length], false);
}

function keepInSight() {
  const list = $("list"), at = state.shown.indexOf(state.selected);
  if (at < 0) return;
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
}
