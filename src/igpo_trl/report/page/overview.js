// The head of the page: the verdict, its figures, the questions lost and gained, and the charts.

const percent = (value) => `${Math.round(100 * value)} %`;

const FACTS = {
  reward: ["Reward", "mean over groups", reward],
  right: ["Right answers", "share of rollouts", percent],
  partly: ["Partly right", "share of rollouts", percent],
  wrong: ["Wrong", "share of rollouts", percent],
  belief_start: ["Belief before searching", "mean", probability],
  belief_end: ["Belief before the last turn", "mean", probability],
  separation: ["Belief tells right from not right", ".5 is chance, 1 always", probability],
  searches: ["Searches", "per rollout", (value) => value.toFixed(1)],
  equal: ["Groups with equal rewards", "they teach nothing by reward", percent],
};

function showOverview() {
  const { runs, figures, rollouts } = state.data;
  const total = runs.reduce((sum, run) => sum + run.rollouts, 0);
  const steps = [...new Set(state.rollouts.map((r) => r.step))];
  state.steps = steps.length;
  state.sets = new Set(state.rollouts.map((r) => r.set)).size;
  const counts = runs.length > 1 ? [...runs.map((run) => `${run.name}: ${plural(run.rollouts, "rollout")}`), plural(figures.shared, "shared question")].join(", ") : plural(total, "rollout");
  $("count").textContent = `${counts}${total > rollouts.length ? `, ${rollouts.length.toLocaleString("en")} of them to read here` : ""}${steps.length > 1 ? `, steps ${Math.min(...steps)} to ${Math.max(...steps)}` : ""}`;
  $("headline").textContent = figures.verdict.headline;
  $("headline").className = figures.verdict.tone;
  $("reward-line").textContent = figures.reward;
  $("basis").textContent = [figures.verdict.basis, figures.counted && `All figures are those of the ${plural(figures.shared, "shared question")}: ${runs.map((run, i) => `${run.name}, ${figures.counted[i]} of ${plural(run.rollouts, "rollout")}`).join("; ")}.`].filter(Boolean).join(" ");
  replace($("notes"), figures.verdict.notes.map((note) => el("li", {}, note)));
  replace($("diagnoses"), Object.entries(state.data.diagnoses ?? {}).map(([name, diagnosis]) => diagnosed(runs.length > 1 ? `${name}: ` : "", diagnosis)));
  const names = Object.keys(FACTS).filter((name) => figures.facts.some((facts) => facts.some((fact) => fact.name === name)));
  replace($("facts"), names.filter((name) => !["partly", "wrong"].includes(name)).map((name) => (name === "right" ? gradesTile() : tile(name))));
  showDefinitions();
  showQuestions();
  showCharts();
  showSets();
}

// What `igpo doctor` says of a run.
function diagnosed(name, { findings, healthy }) {
  const checked = healthy.length > 0 && el("p", { class: "muted small", title: healthy.map(words).join(", ") },
    `${name}igpo doctor checked ${plural(healthy.length + findings.length, "known failure")} and found ${findings.length || "none"}.`);
  if (!findings.length) return checked || el("span");
  return el("div", {}, el("ul", { class: "findings" }, findings.map((finding) => {
    const [, first, rest] = `${finding.evidence}.`.match(/^(.*?[^.\d][.;])(?=\s|$)\s*(.*)$/s) ?? [null, `${finding.evidence}.`, ""];
    return el("li", {}, el("strong", {}, `${name}${words(finding.name)}: `), coded(first.replace(/;$/, ".")),
      el("details", {}, el("summary", {}, "why and what to change"), rest && el("p", {}, coded(rest)), el("p", {}, coded(finding.change))));
  })), checked);
}

// What stands between backticks as code.
const coded = (text) => text.split("`").map((part, i, parts) => (i % 2 && i < parts.length - 1 ? el("code", {}, part) : part));

// Terms of the rollouts, as they hold for these runs.
function showDefinitions() {
  const { gain } = state.data.figures;
  const turns = state.rollouts.flatMap((rollout) => rollout.turns);
  const trained = turns.some((turn) => isNumber(turn.advantage));
  const rise = { belief: "how much a turn raised the belief", logarithm: "how much a turn raised the logarithm of the belief", other: "what a turn did for the belief, in the measure the run was set to" }[gain];
  const grouped = [...state.groups.values()].some((group) => group.length > 1);
  replace($("definitions"),
    el("b", {}, "Belief"), ": the probability that the policy gives the right answer. ",
    rise && [el("b", {}, "Gain"), `: ${rise}. The colour of a card is its gain. `],
    trained && [el("b", { class: "advantage-word" }, "Advantage"), ": how strongly training pushed the tokens of a turn, up (+) or down (−). "],
    grouped && [el("b", {}, "Group"), `: the rollouts of one question${state.steps > 1 ? " in one step" : ""}. `],
    "Bar of a turn: ", el("b", { class: "kept" }, "blue"), " the belief that stayed, ", el("b", { class: "up" }, "green"), " what the turn added, ", el("b", { class: "down" }, "red"), " what it took away.");
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
  const count = (facts, what) => facts.find((each) => each.name === what)?.now ?? 0;
  const known = name.startsWith("belief") ? state.data.figures.facts.map((facts) => [count(facts, "believed"), count(facts, "rollouts")]) : [];
  const some = known.some(([n, all]) => n < all) && ` of ${known.map(([n, all]) => `${n.toLocaleString("en")} of ${plural(all, "rollout")}`).join("; ")}`;
  return el("div", { class: "tile" }, el("div", { class: "name" }, title), lines, el("div", { class: "muted" }, note, some));
}

// Right, partly right and wrong answers in one tile.
function gradesTile() {
  const { facts } = state.data.figures, several = facts.length > 1;
  const get = (run, name) => facts[run].find((each) => each.name === name) ?? {};
  const shown = ["right", "partly", "wrong"].filter((name) => name !== "partly" || facts.some((_, run) => get(run, name).now || get(run, name).before));
  const value = (run, name) => {
    const { before, now } = get(run, name);
    return el("span", {}, !several && isNumber(before) && el("span", { class: "before" }, `${Math.round(100 * before)} → `), el("b", {}, isNumber(now) ? percent(now) : "–"));
  };
  return el("div", { class: "tile" }, el("div", { class: "name" }, "Answers"),
    several && el("div", { class: "muted run" }, `${runName(0)} · ${runName(1)}`),
    shown.map((name) => el("div", { class: "value grade" }, el("span", {}, name), " ", el("span", {}, facts.flatMap((_, run) => [run > 0 && " · ", value(run, name)])))),
    el("div", { class: "muted" }, "share of rollouts"));
}

function showQuestions() {
  const { kind, counts, fates, lost, gained } = state.data.figures.questions;
  const [a, b] = state.data.runs.map((run) => run.name);
  const notes = {
    runs: `Mean reward of each question, ${a} → ${b}.`,
    repeated: "Mean reward of each question, in the first step in which it came up → in the last.",
    beliefs: "Lost: the policy had believed in the right answer, or its belief fell, and its answer was not right. Found: it did not believe in the right answer at first, and answered right. Of each question, one rollout is listed.",
  };
  const titles = kind === "beliefs" ? ["Lost on the way", "Found by searching"] : ["Lost", "Gained"];
  $("questions").hidden = !lost.length && !gained.length;
  $("questions-note").textContent = `${notes[kind]} Click one to read it.`;
  replace($("question-lists"), [lost, gained].map((entries, i) => questionList(titles[i], entries, counts[i], kind, i ? "good" : "bad", i ? {} : fates)));
}

function questionList(title, entries, count, kind, tone, fates) {
  const rows = entries.map((entry) => {
    const [text, set] = state.data.questions[entry.question];
    const numbers = kind !== "beliefs" ? `${reward(entry.before)} → ${reward(entry.after)}`
      : tone === "good" ? `belief ${probability(entry.before)} → ${probability(entry.after)}` : `belief up to ${probability(entry.before)}, ${probability(entry.after)} at the end`;
    const key = JSON.stringify([set, text]);
    const facts = [state.steps > 1 && kind !== "runs" && `step ${entry.step}`, answered(entry, key, kind)].filter(Boolean).join(" · ");
    return el("li", {}, el("button", { type: "button", onclick: () => openQuestion(key, kind, tone, entry) },
      el("span", { class: "question" }, text, " ",
        tone === "bad" && FATES[entry.fate] && el("span", { class: "tag fate", title: FATES[entry.fate][1] }, FATES[entry.fate][0]),
        facts && el("span", { class: "muted given" }, facts)),
      el("span", { class: `numbers ${tone}` }, numbers)));
  });
  return el("div", { class: "questions" }, el("h3", {}, title, el("span", { class: `pill ${tone}` }, plural(count, "question"))),
    Object.keys(fates).length > 0 && el("p", { class: "muted fates" }, Object.entries(fates).map(([fate, n]) => `${n.toLocaleString("en")}: ${FATES[fate][0]}`).join(" · ")),
    rows.length ? el("ol", {}, rows) : el("p", { class: "muted" }, "None."),
    count > entries.length && el("p", { class: "muted" }, `The first ${entries.length} are listed.`));
}

// What was answered: in the rollout of the entry, or where each run has a single rollout of the question, in both.
function answered(entry, key, kind) {
  const found = state.byQuestion.get(key) ?? [];
  if (kind === "beliefs") {
    const rollout = found.find((each) => each.place === entry.place);
    return rollout && `answered: ${given(rollout)}`;
  }
  const last = found.filter((each) => each.run === state.data.runs.length - 1 && each.step === entry.step);
  const first = found.filter((each) => each.run === 0);
  if (kind === "runs" && first.length === 1 && last.length === 1) return `answered: ${given(first[0])} → ${given(last[0])}`;
  return last.length && `${last.length > 1 ? `one of ${last.length} answered` : "answered"}: ${given(last.at(-1))}`;
}

// The rollouts of a question: of two runs the second one's beside the first one's, else the one that the list speaks of.
function openQuestion(question, kind, tone, entry) {
  setFilters({ ...NO_FILTER, question });
  const found = state.shown;
  if (!found.length) return;
  const wanted = kind === "runs" ? found.filter((r) => r.run === 1).at(-1)
    : kind === "repeated" ? found.at(-1)
      : found.find((r) => r.place === entry.place);
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
