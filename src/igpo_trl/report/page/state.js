// Data of the page, what follows from them, and helpers that make elements. Texts of a run become text nodes only.

const $ = (id) => document.getElementById(id);

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, each] of Object.entries(value)) node.style.setProperty(key, each);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return node;
}

function replace(parent, ...children) {
  parent.replaceChildren(...children.flat().filter((child) => child));
}

const NOTHING = 0.01; // a gain below this is none
const isNumber = (value) => typeof value === "number";

function probability(value) {
  if (!isNumber(value)) return "–";
  if (value === 0 || value >= 9.5e-5) return value.toFixed(value === 0 || value >= 0.095 ? 2 : value >= 9.5e-4 ? 3 : 4);
  return value.toExponential(0).replace("e-", "e−");
}
const minus = (text) => text.replace("-", "−");
const signed = (value) => (value >= 0 ? "+" : "−") + probability(Math.abs(value));
const reward = (value) => (isNumber(value) ? minus(String(Number(value.toFixed(2)))) : "–");
const words = (name) => name.replaceAll("_", " ");
const plural = (count, name) => `${count.toLocaleString("en")} ${name}${count === 1 ? "" : name.endsWith("h") ? "es" : "s"}`;

const state = {
  data: null,
  rollouts: [],
  groups: new Map(), // place of a group -> rollouts
  byQuestion: new Map(), // "data set, text" -> rollouts
  shown: [], // rollouts that pass the filters, sorted
  selected: null,
  beside: null,
  keepBeside: false, // whether another rollout stands beside the next one, too
  gainScale: 1,
};

function setData(data) {
  state.data = data;
  state.groups = new Map();
  state.byQuestion = new Map();
  state.rollouts = data.rollouts.map((record, id) => understand(record, id, data));
  for (const rollout of state.rollouts) {
    push(state.groups, rollout.group, rollout);
    push(state.byQuestion, rollout.questionKey, rollout);
  }
  const gains = state.rollouts.flatMap((rollout) => rollout.turns.map((turn) => Math.abs(turn.gain ?? 0)));
  gains.sort((a, b) => a - b);
  state.gainScale = Math.max(0.05, gains[Math.floor(gains.length * 0.95)] || 0);
}

function push(map, key, value) {
  if (map.has(key)) map.get(key).push(value);
  else map.set(key, [value]);
}

function understand(record, id, data) {
  const [text, set, answers] = data.questions[record.question];
  const turns = record.turns.map(([pieces, observations = [], tokens = 0, belief, gain, advantage, aliases = [], errors = []]) => ({
    pieces, observations, tokens, belief, gain, advantage, aliases, errors,
  }));
  const beliefs = turns.map((turn) => turn.belief);
  const known = beliefs.filter(isNumber);
  const changes = known.slice(1).map((belief, k) => belief - known[k]);
  const searching = turns.filter((turn) => turn.observations.length);
  return {
    ...record, id, text, set, answers, turns, beliefs, changes,
    key: `${record.run}.${record.place}`,
    questionKey: JSON.stringify([set, text]),
    start: known[0],
    end: known.at(-1),
    fall: Math.max(0, ...changes.map((change) => -change)),
    rise: Math.max(0, ...changes),
    searches: searching.length,
    idle: searching.filter((turn) => isNumber(turn.gain) && turn.gain < NOTHING).length,
    tokens: turns.reduce((sum, turn) => sum + turn.tokens, 0),
    grade: record.grade ?? "unknown",
  };
}

// Marks the words of the right answers in a text, as whole words in any case.
function answerPattern(answers) {
  const worth = answers.filter((answer) => answer.trim() && !["yes", "no"].includes(answer.trim().toLowerCase()));
  if (!worth.length) return null;
  const escaped = worth
    .sort((a, b) => b.length - a.length)
    .map((answer) => answer.trim().replace(/[.*+?^${}()|[\]\\/]/g, "\\$&").replace(/\s+/g, "\\s+"));
  return new RegExp(`(?<![\\p{L}\\p{N}])(?:${escaped.join("|")})(?![\\p{L}\\p{N}])`, "giu");
}

function marked(text, pattern) {
  if (!pattern) return [text];
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    nodes.push(text.slice(end, match.index), el("mark", {}, match[0]));
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

const runName = (run) => state.data.runs[run].name;
const action = (turn) => turn.pieces.filter(([kind]) => kind !== "think").map(([, text]) => text).join(" ") || "(no text)";

const GRADES = { right: "right", partly: "partly right", wrong: "wrong", unknown: "no reward" };

function badge(rollout) {
  return el("span", { class: `badge ${rollout.grade}`, title: `reward ${reward(rollout.outcome)}, ${GRADES[rollout.grade]}` }, reward(rollout.outcome));
}

// What the rollout answered: the answer of its last turn, or what that turn says if it calls nothing.
function given(rollout) {
  const pieces = rollout.turns.at(-1).pieces;
  const answer = pieces.findLast(([kind]) => kind === "answer") ?? (pieces.some(([kind]) => kind === "call") ? null : pieces.findLast(([kind]) => kind === "text"));
  return answer ? (answer[1].length > 160 ? `${answer[1].slice(0, 159)}…` : answer[1]) : "nothing";
}

// What happened in a rollout that did not end right, where its beliefs say it.
const FATES = {
  "answered otherwise": ["had the answer, answered otherwise", "belief of 0.5 or more before its last turn"],
  "pulled away": ["a later search pulled it away", "belief reached 0.5, and was lower before its last turn"],
  "never found": ["never found it", "belief never reached 0.5"],
};

// A glyph of the beliefs of a rollout, from the first turn to the last.
function sparkline(rollout, width = 72, height = 26) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const set = (node, values) => Object.entries(values).forEach(([name, value]) => node.setAttribute(name, value));
  set(svg, { viewBox: `0 0 ${width} ${height}`, width, height, class: "spark", role: "img" });
  svg.setAttribute("aria-label", `belief ${probability(rollout.start)} to ${probability(rollout.end)}`);
  const step = (width - 8) / Math.max(1, rollout.beliefs.length - 1);
  const points = rollout.beliefs
    .map((belief, k) => [4 + k * step, height - 4 - belief * (height - 8), isNumber(belief)])
    .filter((point) => point[2]);
  const line = document.createElementNS(space, "polyline");
  set(line, { points: points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ") });
  svg.append(line);
  for (const [x, y] of points.slice(-1)) {
    const dot = document.createElementNS(space, "circle");
    set(dot, { cx: x, cy: y, r: 2.6 });
    svg.append(dot);
  }
  return svg;
}

// The colour of a gain: green above zero, red below, the stronger the larger. Without a gain there is none.
function gainColour(gain) {
  if (!isNumber(gain)) return "var(--line)";
  const share = Math.min(1, Math.abs(gain) / state.gainScale);
  const colour = gain >= 0 ? "var(--good)" : "var(--bad)";
  return `color-mix(in srgb, ${colour} ${Math.round(15 + 85 * share)}%, var(--line))`;
}
