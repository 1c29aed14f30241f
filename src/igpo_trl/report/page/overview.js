// The head of the page: the verdict, its figures, the questions lost and gained, and the charts.

const FACTS = {
  reward: ["Reward", "mean over groups", reward],
  right: ["Right answers", "share of rollouts", (value) => `${Math.round(100 * value)} %`],
  belief_start: ["Belief before searching", "mean", probability],
  belief_end: ["Belief before the last turn", "mean", probability],
  separation: ["Belief tells right from wrong", ".5 is chance, 1 always", probability],
  searches: ["Searches", "per rollout", (value) => value.toFixed(1)],
  equal: ["Groups with equal rewards", "they teach nothing by reward", (value) => `${Math.round(100 * value)} %`],
};

function showOverview() {
  const { runs, figures, rollouts } = state.data;
  const total = runs.reduce((sum, run) => sum + run.rollouts, 0);
  const steps = [...new Set(state.rollouts.map((r) => r.step))];
  state.steps = steps.length;
  state.sets = new Set(state.rollouts.map((r) => r.set)).size;
  $("count").textContent = `${plural(total, "rollout")}${total > rollouts.length ? `, ${rollouts.length.toLocaleString("en")} of them to read here` : ""}${steps.length > 1 ? `, steps ${Math.min(...steps)} to ${Math.max(...steps)}` : ""}`;
  $("headline").textContent = figures.verdict.headline;
  $("headline").className = figures.verdict.tone;
  replace($("notes"), figures.verdict.notes.map((note) => el("li", {}, note)));
  replace($("diagnoses"), Object.entries(state.data.diagnoses ?? {}).map(([name, diagnosis]) => diagnosed(runs.length > 1 ? `${name}: ` : "", diagnosis)));
  const names = Object.keys(FACTS).filter((name) => figures.facts.some((facts) => facts.some((fact) => fact.name === name)));
  replace($("facts"), names.map(tile));
  showQuestions();
  showCharts();
  showSets();
}

// What `igpo doctor` says of a run.
function diagnosed(name, { findings, healthy }) {
  if (!findings.length) return el("p", { class: "muted" }, `${name}igpo doctor checked ${plural(healthy.length, "known failure")} and found none.`);
  return el("ul", { class: "findings" }, findings.map((finding) => el("li", {},
    el("strong", {}, `${name}${words(finding.name)}`), ` ${finding.evidence}. `, el("span", { class: "muted" }, finding.change))));
}

function tile(name) {
  const [title, note, form] = FACTS[name];
  const lines = state.data.figures.facts.map((facts, run) => {
    const fact = facts.find((each) => each.name === name);
    if (!fact) return null;
    const value = isNumber(fact.now) ? form(fact.now) : "–";
    return el("div", { class: "value" }, state.data.runs.length > 1 && el("span", { class: "muted run", title: runName(run) }, runName(run)),
      el("span", {}, isNumber(fact.before) && el("span", { class: "before" }, `${form(fact.before)} → `), el("b", {}, value)));
  });
  return el("div", { class: "tile" }, el("div", { class: "name" }, title), lines, el("div", { class: "muted" }, note));
}

function showQuestions() {
  const { kind, counts, lost, gained } = state.data.figures.questions;
  const [a, b] = state.data.runs.map((run) => run.name);
  const notes = {
    runs: `Mean reward of each question, ${a} → ${b}.`,
    repeated: "Mean reward of each question, in the first step in which it came up → in the last.",
    beliefs: "Lost: the policy had believed in the right answer, or its belief fell, and it answered wrong. Found: it did not believe in the right answer at first, and answered right.",
  };
  const titles = kind === "beliefs" ? ["Lost on the way", "Found by searching"] : ["Lost", "Gained"];
  $("questions").hidden = !lost.length && !gained.length;
  $("questions-note").textContent = `${notes[kind]} Click one to read it.`;
  replace($("question-lists"), [lost, gained].map((entries, i) => questionList(titles[i], entries, counts[i], kind, i ? "good" : "bad")));
}

function questionList(title, entries, count, kind, tone) {
  const rows = entries.map((entry) => {
    const [text, set] = state.data.questions[entry.question];
    const numbers = kind !== "beliefs" ? `${reward(entry.before)} → ${reward(entry.after)}`
      : tone === "good" ? `belief ${probability(entry.before)} → ${probability(entry.after)}` : `belief up to ${probability(entry.before)}, ${probability(entry.after)} at the end`;
    return el("li", {}, el("button", { type: "button", onclick: () => openQuestion(JSON.stringify([set, text]), kind, tone) },
      el("span", { class: "question" }, text), el("span", { class: `numbers ${tone}` }, numbers)));
  });
  return el("div", { class: "questions" }, el("h3", {}, title, el("span", { class: `pill ${tone}` }, count.toLocaleString("en"))),
    rows.length ? el("ol", {}, rows) : el("p", { class: "muted" }, "None."),
    count > entries.length && el("p", { class: "muted" }, `The first ${entries.length} are listed.`));
}

// The rollouts of a question: of two runs the second one's beside the first one's, else the one that the list speaks of.
function openQuestion(question, kind, tone) {
  setFilters({ ...NO_FILTER, question });
  const found = state.shown;
  if (!found.length) return;
  const wanted = kind === "runs" ? found.filter((r) => r.run === 1).at(-1)
    : kind === "repeated" ? found.at(-1)
      : found.filter((r) => r.grade === (tone === "good" ? "right" : "wrong") || (tone === "bad" && r.grade === "partly")).sort((a, b) => (tone === "good" ? b.rise - a.rise : Math.max(...b.beliefs) - Math.max(...a.beliefs)))[0];
  state.keepBeside = kind === "runs";
  state.beside = null;
  select_(wanted ?? found[0], true);
}

function showCharts() {
  const first = $("first-charts"), more = $("more-charts");
  const training = state.data.figures.curves.some((points) => points.length);
  if (training) curveChart(first, "Reward", "mean and 95 % interval over groups; click a point to read its rollouts", [["reward", ""]]);
  beliefChart(first);
  if (training) {
    curveChart(more, "Belief", "mean and 95 % interval", [["belief_start", "before searching", "dot"], ["belief_end", "before the last turn", "solid"]], { range: [-0.02, 1.02] });
    curveChart(more, "Groups that collapsed", "share with equal rewards, and those of them whose gains still differ", [["equal", "equal rewards", "solid"], ["only_gains", "only gains differ", "dot"]], { range: [-0.02, 1.02], tickformat: ".0%" });
    curveChart(more, "Searches", "per rollout", [["searches", ""]], { rangemode: "tozero" });
    curveChart(more, "Sampled tokens", "per rollout", [["tokens", ""]], { rangemode: "tozero" });
  }
  turnChart(training ? more : first);
  stopChart(more);
}

function showSets() {
  const tables = each("sets").filter(({ value }) => value.length).map(({ value, name }) => {
    const columns = Object.keys(FACTS).filter((column) => value.some((row) => isNumber(row[column])));
    return el("div", { class: "scroll" }, el("table", {}, el("caption", {}, `By data set${name && `: ${name}`}`),
      el("thead", {}, el("tr", {}, ["", "rollouts", ...columns.map((column) => FACTS[column][0])].map((text) => el("th", {}, text)))),
      el("tbody", {}, value.map((row) => el("tr", {}, el("th", {}, row.name || "(none)"), el("td", {}, row.rollouts.toLocaleString("en")),
        columns.map((column) => el("td", {}, isNumber(row[column]) ? FACTS[column][2](row[column]) : "–")))))));
  });
  replace($("sets"), tables);
}
