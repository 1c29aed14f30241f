// One rollout: its conversation beside its beliefs, the group that it was compared with, and another rollout beside it.

// The chart of the rollout that is shown. A click on a point shows its turn.
const beliefPlot = el("div", { class: "plot belief-plot" });
beliefPlot.onClick = ({ points: [point] }) => document.getElementById(`turn-${point.data.meta}-${point.x}`)?.scrollIntoView({ block: "nearest" });

// `byHand`: the reader pointed at it, so on a narrow screen the page moves to it.
function select_(rollout, byHand) {
  state.selected = rollout;
  const others = rivals(rollout);
  if (!others.some(([each]) => each === state.beside)) state.beside = state.keepBeside ? (others[0]?.[0] ?? null) : null;
  try {
    history.replaceState(null, "", `#r${rollout.key}`);
  } catch {} // a page within another one, as in a notebook, has no address
  keepInSight();
  showRows();
  showRollout();
  if (byHand && matchMedia("(max-width: 760px)").matches) $("detail").scrollIntoView({ block: "start" });
}

// Rollouts that can stand beside this one: [rollout, why].
function rivals(rollout) {
  const found = [];
  const others = state.byQuestion.get(rollout.questionKey).filter((each) => each.run !== rollout.run);
  if (others.length) {
    const nearest = others.reduce((a, b) => (Math.abs(b.step - rollout.step) < Math.abs(a.step - rollout.step) ? b : a));
    found.push([nearest, `${runName(nearest.run)}, same question`]);
  }
  const group = state.groups.get(rollout.group);
  const best = winner(group);
  if (best !== rollout) found.push([best, "the best of its group"]);
  const worst = winner(group, -1);
  if (worst !== rollout && worst !== best) found.push([worst, "the weakest of its group"]);
  return found;
}

// The rollout of a group with the highest reward; among equals the one that believed most.
function winner(group, sign = 1) {
  const value = (r) => [sign * (r.outcome ?? -Infinity), sign * (r.end ?? 0)];
  return group.reduce((best, r) => {
    const [a, b] = [value(r), value(best)];
    return a[0] > b[0] || (a[0] === b[0] && a[1] > b[1]) ? r : best;
  });
}

function showRollout() {
  const rollout = state.selected, beside = state.beside;
  if (!rollout) return;
  const pattern = answerPattern(rollout.answers);
  const [answer, ...aliases] = rollout.answers;
  const others = rivals(rollout);
  const choice = others.length > 0 && el("div", { class: "beside", role: "group", "aria-label": "Beside it" },
    el("span", { class: "muted" }, "Beside it:"),
    [[null, "nothing"], ...others].map(([each, name]) =>
      el("button", { type: "button", "aria-pressed": String(each === beside), onclick: () => { state.beside = each; state.keepBeside = Boolean(each); showRollout(); } }, name)));
  // The first run stands on the left.
  const shown = [rollout, beside].filter(Boolean).sort((a, b) => a.run - b.run);
  const titles = shown.map((each) => (shown.length < 2 ? "" : shown[0].run !== shown[1].run ? runName(each.run) : each === rollout ? "this one" : others.find(([other]) => other === each)[1]));
  const hasBeliefs = shown.some((each) => isNumber(each.start));
  const columns = shown.map((each, i) => conversation(each, pattern, i, titles[i]));
  replace($("detail"),
    el("header", {},
      el("button", { type: "button", class: "back", onclick: () => $("rollouts").scrollIntoView() }, "↑ to the list"),
      el("h3", {}, rollout.text),
      el("p", { class: "answers" },
        answer !== undefined && el("span", {}, "Right answer: ", el("strong", {}, answer),
          aliases.length > 0 && el("span", { class: "muted" }, ` or ${aliases.join(" · ")}`)),
        shown.length < 2 && answeredOf(rollout)),
      parting(rollout),
      choice),
    el("div", { class: beside ? "pair" : "single" }, el("div", { class: "chart-place" }, hasBeliefs ? beliefPlot : el("p", { class: "muted" }, unbelieved(rollout))), columns),
    groupOf(rollout));
  $("detail").scrollTop = 0;
  if (hasBeliefs) draw(beliefPlot, (c) => beliefCurves(c, shown, titles));
}

// What it answered, and whether that is right.
function answeredOf(rollout) {
  return el("span", { class: "given" }, "Answered: ", el("strong", {}, given(rollout)), ` (${GRADES[rollout.grade]})`);
}

// Where the best one of the group took another way, in a line.
function parting(rollout) {
  const group = state.groups.get(rollout.group), best = winner(group);
  if (best === rollout || !((best.outcome ?? -Infinity) > (rollout.outcome ?? -Infinity))) return null;
  const k = parted(rollout, best);
  const did = (turn) => { const text = turn ? action(turn) : "(had ended)"; return text.length > 90 ? `${text.slice(0, 89)}…` : text; };
  return el("p", { class: "parting" },
    el("button", { type: "button", onclick: () => $("detail").querySelector(".differs")?.scrollIntoView({ block: "nearest" }) }, "What did the best one of the group do differently?"),
    ` In turn ${k + 1}: `, el("span", { class: "call" }, did(best.turns[k])), " instead of ", el("span", { class: "call" }, did(rollout.turns[k])));
}

// Number of the first turn, from 0, in which two rollouts did different things.
function parted(a, b) {
  let k = 0;
  while (k < a.turns.length && k < b.turns.length && action(a.turns[k]) === action(b.turns[k])) k += 1;
  return k;
}

// Why a rollout has no beliefs to show.
const unbelieved = (rollout) => (rollout.turns.length === 1 && !rollout.turns[0].pieces.some(([kind]) => kind === "call") && given(rollout) !== "nothing" ? "It answered without searching: no turn could change its belief, and none was recorded." : "No belief was recorded.");

function beliefCurves(c, shown, titles) {
  const traces = shown.flatMap((rollout, i) => {
    const known = rollout.beliefs.map((belief, k) => [k, belief]).filter(([, belief]) => isNumber(belief));
    const gain = ([k]) => (k ? rollout.turns[k - 1].gain : null);
    const colour = (value) => (!isNumber(value) ? c.muted : value >= NOTHING ? c.good : value <= -NOTHING ? c.bad : c.muted);
    const main = {
      meta: i, x: known.map(([k]) => k), y: known.map(([, belief]) => belief), mode: "lines+markers", name: plain(titles[i] || "belief"),
      line: { color: i ? c.amber : c.blue, width: 2 }, marker: { size: 10, color: known.map((each) => colour(gain(each))), line: { color: i ? c.amber : c.blue, width: 1.5 } },
      text: known.map((each) => `${probability(each[1])}${isNumber(gain(each)) ? `, gain ${signed(gain(each))}` : ""}`), hovertemplate: "%{text}<extra></extra>",
    };
    const aliases = shown.length === 1 && rollout.answers.length > 1 ? rollout.answers.slice(0, 4) : [];
    return [main, ...aliases.map((answer, a) => ({
      meta: i, x: rollout.turns.map((_, k) => k), y: rollout.turns.map((turn) => turn.aliases[a] ?? null), mode: "lines", name: plain(answer.slice(0, 24)),
      line: { width: 1, dash: ["dot", "dash", "dashdot", "longdash"][a], color: c.muted }, hovertemplate: `%{y:.3f}<extra>${plain(answer.slice(0, 24))}</extra>`,
    })).filter((trace) => trace.y.some(isNumber))];
  });
  const last = Math.max(...shown.map((rollout) => rollout.turns.length - 1), 1);
  return {
    traces,
    layout: {
      height: 220 + 19 * Math.max(0, traces.length - 2), showlegend: traces.length > 1, margin: { l: 36, r: 10, t: 8, b: 36 },
      xaxis: { dtick: last > 12 ? 5 : 1, range: [-0.2, last + 0.2], title: { text: "turns so far" } }, yaxis: { range: [-0.05, 1.05], dtick: 0.25, title: { text: "belief" } },
    },
  };
}

function conversation(rollout, pattern, column, title) {
  const rewards = Object.entries(rollout.rewards ?? {}).filter(([, value]) => isNumber(value));
  const facts = [
    state.data.runs.length > 1 && `run ${runName(rollout.run)}`, state.steps > 1 && `step ${rollout.step}`, rollout.stop && `ended: ${words(rollout.stop)}`, plural(rollout.searches, "search"),
    plural(rollout.tokens, "sampled token"), isNumber(rollout.seconds) && rollout.seconds >= 0.05 && `${rollout.seconds.toFixed(1)} s`,
    ...(rewards.length > 1 || rewards.some(([, value]) => value !== rollout.outcome) ? rewards.map(([name, value]) => `${words(name)} ${reward(value)}`) : []),
  ].filter(Boolean);
  return el("div", { class: "conversation" },
    title && el("h4", {}, title),
    title && el("p", { class: "answers" }, answeredOf(rollout)),
    el("p", { class: "outcome" }, badge(rollout), el("span", { class: "muted" }, facts.join(" · "))),
    !isNumber(rollout.start) && title && el("p", { class: "muted start" }, unbelieved(rollout)),
    isNumber(rollout.start) && el("p", { class: "muted start" }, "Before any search: belief ", bar(rollout.start, null), ` ${probability(rollout.start)}`),
    rollout.turns.map((turn, k) => turnCard(rollout, turn, k, pattern, column)));
}

function bar(before, after) {
  const low = Math.min(before, after ?? before), high = Math.max(before, after ?? before);
  const part = (kind, from, to) => el("i", { class: kind, style: { left: `${100 * from}%`, width: `${100 * (to - from)}%` } });
  return el("span", { class: "meter" }, part("kept", 0, low), part((after ?? before) >= before ? "up" : "down", low, high));
}

function turnCard(rollout, turn, k, pattern, column) {
  const after = rollout.turns[k + 1]?.belief;
  const belief = isNumber(after) && el("span", { class: "change" },
    bar(turn.belief ?? after, after), ` ${probability(turn.belief)} → ${probability(after)}`,
    isNumber(turn.gain) && el("b", { class: turn.gain >= NOTHING ? "up" : turn.gain <= -NOTHING ? "down" : "" }, ` gain ${signed(turn.gain)}`));
  const read = turn.observations.map((i) => state.data.texts[i]);
  const states = pattern && read.some((text) => text.search(pattern) >= 0);
  const said = turn.pieces.map(([kind, text]) => el("div", { class: `piece ${kind}` }, kind === "answer" && el("span", { class: "tag" }, "answer"), marked(text, pattern)));
  return el("section", { class: "turn", id: `turn-${column}-${k + 1}`, style: { "--gain": gainColour(turn.gain) } },
    el("header", {},
      el("strong", {}, `Turn ${k + 1}`), el("span", { class: "muted" }, `${plural(turn.tokens, "token")}`),
      isNumber(turn.advantage) && el("span", { class: "tag advantage", title: "what training pushed its tokens with: up above zero, down below" }, `advantage ${minus((turn.advantage >= 0 ? "+" : "") + turn.advantage.toFixed(2))}`),
      turn.errors.length > 0 && el("span", { class: "tag failed" }, `failed call: ${turn.errors.map(words).join(", ")}`),
      belief),
    said.length ? said : el("div", { class: "piece text muted" }, "(no text)"),
    read.length > 0 && el("div", { class: "read" },
      el("span", { class: states ? "tag states" : "tag" }, states ? "result, contains the answer" : "result"),
      read.map((text) => paragraph(text, pattern))));
}

// A long paragraph is folded after some lines, unless the answer stands further down.
function paragraph(text, pattern) {
  const far = pattern ? text.search(pattern) : -1;
  const node = el("p", { class: text.length > 420 && far < 300 ? "folded" : "" }, marked(text, pattern));
  if (node.className) node.append(el("button", { type: "button", class: "more", onclick: (event) => { node.className = ""; event.target.remove(); } }, "more"));
  return node;
}

// The group: what each of its rollouts did, and where the best one took another way.
function groupOf(rollout) {
  const group = state.groups.get(rollout.group);
  if (group.length < 2) return null;
  const rewards = group.map((each) => each.outcome ?? 0);
  const equal = Math.max(...rewards) - Math.min(...rewards) < 1e-6;
  const best = winner(group), other = rollout.outcome === best.outcome ? winner(group, -1) : best;
  return el("section", { class: "group", "aria-label": "Group" },
    el("h4", {}, `The group: ${group.length} rollouts of this question`),
    equal && el("p", { class: "muted" }, `All have the reward ${reward(rewards[0])}: compared by reward alone, they teach nothing.`),
    el("div", { class: "members" }, group.map((each) =>
      el("button", { type: "button", class: "member", "aria-current": String(each === rollout), onclick: () => select_(each, false) },
        badge(each), el("span", { class: "path" }, each.turns.map(action).join("  →  ")), isNumber(each.start) && sparkline(each),
        each === best && !equal && el("span", { class: "tag states" }, "best")))),
    other !== rollout && !equal && differs(rollout, other, other === best ? "the best one" : "the weakest one"));
}

function differs(rollout, other, name) {
  const k = parted(rollout, other);
  const pattern = answerPattern(rollout.answers);
  const side = (each, title) => {
    const turn = each.turns[k], after = each.turns[k + 1]?.belief;
    return el("div", { class: "turn", style: { "--gain": gainColour(turn?.gain) } },
      el("header", {}, el("strong", {}, title), badge(each)),
      el("div", { class: "piece call" }, turn ? marked(action(turn), pattern) : "(had ended)"),
      turn && isNumber(after) && el("p", { class: "muted" }, `belief ${probability(turn.belief)} → ${probability(after)}`,
        turn.observations.some((i) => pattern && state.data.texts[i].search(pattern) >= 0) ? ", the answer was read" : ""));
  };
  const title = k === 0 ? "They part in the first turn" : `They did the same for ${plural(k, "turn")}, then parted`;
  return el("div", { class: "differs" }, el("h4", {}, `What did ${name} do differently?`), el("p", { class: "muted" }, `${title}:`),
    el("div", { class: "two" }, side(rollout, "this one"), side(other, name)),
    el("button", { type: "button", onclick: () => { state.beside = other; state.keepBeside = true; showRollout(); } }, `Read ${name} beside this one`));
}
