// Charts with Plotly, in the colours of the page. Plotly starts after the rest: reading it takes a browser longer than all
// else on the page.

const drawn = new Map(); // element -> function that draws it again, in other colours
const cards = new Map(); // place and title -> element of a chart

function colours() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["ink", "muted", "line", "card", "good", "bad", "blue", "amber", "violet"];
  return Object.fromEntries(names.map((name) => [name, get(name)]));
}

// What Plotly takes for markup is text here.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

// Draws a chart now and whenever the colours change. `make(colours)` gives its traces and layout.
function draw(element, make) {
  const again = () => {
    if (!window.Plotly) return;
    const { traces, layout = {} } = make(colours());
    const c = colours();
    const axis = { gridcolor: c.line, zerolinecolor: c.line, linecolor: c.line, tickfont: { color: c.muted }, fixedrange: true, automargin: true };
    const full = {
      margin: { l: 44, r: 12, t: 8, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: c.ink },
      hoverlabel: { bgcolor: c.card, bordercolor: c.line, font: { color: c.ink }, align: "left" },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: c.ink, size: 11 } },
      hovermode: "x unified",
      ...layout,
      xaxis: { ...axis, showgrid: false, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
    Plotly.react(element, traces, full, { displayModeBar: false, responsive: true, doubleClick: false });
    if (element.clientWidth && Math.abs(element._fullLayout.width - element.clientWidth) > 1) Plotly.Plots.resize(element);
    if (!element.heard) element.on("plotly_click", (event) => element.onClick?.(event));
    element.heard = true;
  };
  drawn.set(element, again);
  again();
}

function drawAllAgain() {
  for (const again of drawn.values()) again();
}

function startCharts() {
  document.body.append(el("script", {}, $("plotly").textContent));
  $("plotly").remove();
  drawAllAgain();
}

function alpha(colour, share) {
  const value = parseInt(colour.slice(1), 16);
  return `rgba(${value >> 16}, ${(value >> 8) & 255}, ${value & 255}, ${share})`;
}

// Charts are drawn when they come into view, so that the page opens at once.
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    watcher.unobserve(entry.target);
    entry.target.drawNow();
  }
}, { rootMargin: "200px" });

// A chart with its title. One that is there already, as in a page that follows a run, takes the new data.
function card(parent, title, note, make, onClick) {
  const key = `${parent.id} ${title}`;
  let place = cards.get(key);
  if (!place) {
    place = el("div", { class: "plot" });
    cards.set(key, place);
    parent.append(el("figure", { class: "chart" }, el("figcaption", {}, el("strong", {}, title), el("span", { class: "muted" }, note)), place));
  }
  place.onClick = onClick;
  place.drawNow = () => draw(place, make);
  if (drawn.has(place)) place.drawNow();
  else watcher.observe(place);
}

// A line with the band of its intervals. `points`: [x, [mean, low, high], hover text].
function band(points, name, colour, options = {}) {
  const with_ = points.filter(([, value]) => value);
  const x = with_.map(([each]) => each);
  const edge = (i) => with_.map(([, value]) => value[i] ?? value[0]);
  const hidden = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, x };
  const text = with_.map(([, value, more]) => `${value[0].toFixed(3)}${isNumber(value[1]) ? ` [${value[1].toFixed(3)}, ${value[2].toFixed(3)}]` : ""}${more ?? ""}`.replaceAll("-", "−"));
  return [
    { ...hidden, y: edge(1) },
    { ...hidden, y: edge(2), fill: "tonexty", fillcolor: alpha(colour, 0.16) },
    {
      x, y: edge(0), name: plain(name), text, hovertemplate: `%{text}<extra>${plain(name)}</extra>`,
      mode: with_.length > 25 ? "lines" : "lines+markers", line: { color: colour, width: 2, dash: options.dash }, marker: { size: 5 },
    },
  ];
}

const runColour = (c, run) => (state.data.runs.length === 1 ? c.blue : [c.muted, c.blue][run]);
const each = (name) => state.data.figures[name].map((value, run) => ({ value, run, name: state.data.runs.length > 1 ? runName(run) : "" }));

function curveChart(parent, title, note, fields, yaxis = {}) {
  const runs = each("curves").filter(({ value }) => value.some((point) => fields.some(([field]) => point[field])));
  if (!runs.length) return;
  const make = (c) => ({
    traces: runs.flatMap(({ value, run, name }) =>
      fields.flatMap(([field, label, dash], i) => {
        const colour = runs.length > 1 ? runColour(c, run) : [c.blue, c.good, c.amber][i];
        const points = value.map((point) => [middle(point), point[field], `<br>${plural(point.rollouts, "rollout")}`]);
        return band(points, [name, label].filter(Boolean).join(": ") || title, colour, { dash });
      })),
    layout: { xaxis: stepAxis(), yaxis, showlegend: runs.length * fields.length > 1 },
  });
  card(parent, title, note, make, (event) => {
    const x = event.points[0].x;
    const point = runs.flatMap(({ value }) => value).find((each) => middle(each) === x);
    if (point) setFilters({ from: point.steps[0], to: point.steps[1] });
  });
}

const stepAxis = () => ({ title: { text: "step" }, tickformat: "d", dtick: state.steps <= 10 ? 1 : undefined });
const middle = (point) => (point.steps[0] + point.steps[1]) / 2;

function beliefChart(parent) {
  const runs = each("turns").filter(({ value }) => value.some((turn) => Object.keys(turn.beliefs).length));
  if (!runs.length) return;
  const make = (c) => ({
    traces: runs.flatMap(({ value, run, name }) =>
      ["right", "not right"].flatMap((kind) => {
        const colour = kind === "right" ? c.good : c.bad;
        const points = value.flatMap((turn, k) => {
          const found = turn.beliefs[kind];
          return found ? [[k, [found[1], found[0], found[2]], `, n = ${found[3].toLocaleString("en")}`]] : [];
        });
        return band(points, name ? `${name}, ${kind}` : kind === "right" ? "answered right" : "answered not right (partly or wrong)", colour, { dash: runs.length > 1 && run === 0 ? "dot" : "solid" });
      })),
    layout: {
      xaxis: { title: { text: "turns so far" }, dtick: 1 },
      yaxis: { range: [-0.02, 1.02], title: { text: "belief" } },
    },
  });
  card(parent, "What the policy believed after each turn", "median and quartiles, by how the rollout ended", make);
}

function turnChart(parent) {
  const runs = each("turns").filter(({ value }) => value.some((turn) => turn.gain));
  if (runs.length) {
    const make = (c) => ({
      traces: runs.map(({ value, run, name }) => {
        const turns = value.map((turn, k) => [k + 1, turn]).filter(([, turn]) => turn.gain);
        const gains = turns.map(([, turn]) => turn.gain[0]);
        return {
          type: "bar", name: plain(name || "gain"), x: turns.map(([k]) => k), y: gains,
          marker: { color: runs.length > 1 ? runColour(c, run) : gains.map((gain) => (gain >= 0 ? c.good : c.bad)) },
          error_y: {
            type: "data", symmetric: false, color: c.muted, thickness: 1.2,
            array: turns.map(([, { gain }]) => (gain[2] ?? gain[0]) - gain[0]), arrayminus: turns.map(([, { gain }]) => gain[0] - (gain[1] ?? gain[0])),
          },
          text: turns.map(([, turn]) => plural(turn.gains, "turn")), textposition: "none",
          hovertemplate: "%{y:.3f}, %{text}<extra></extra>",
        };
      }),
      layout: { xaxis: { title: { text: "turn" }, dtick: 1 }, yaxis: { title: { text: "mean gain" } }, showlegend: runs.length > 1 },
    });
    card(parent, "Gain by turn", "mean with its 95 % interval", make);
  }
  const make = (c) => ({
    traces: each("turns").map(({ value, run, name }) => ({
      type: "bar", name: plain(name || "rollouts"), x: value.map((_, k) => k + 1), y: value.map((turn) => turn.searching), marker: { color: runColour(c, run) },
      hovertemplate: "%{y:.0%}<extra></extra>",
    })),
    layout: { xaxis: { title: { text: "turn" }, dtick: 1 }, yaxis: { tickformat: ".0%", range: [0, 1.02], title: { text: "of all rollouts" } }, showlegend: state.data.runs.length > 1 },
  });
  card(parent, "Searches by turn", "share of rollouts that search in this turn", make);
}

function stopChart(parent) {
  const stops = state.data.figures.stops;
  const reasons = [...new Set(stops.flatMap((each) => Object.keys(each)))];
  for (const { value, run, name } of each("curves")) {
    if (!value.length || (reasons.length === 1 && reasons[0] === "unknown")) continue;
    const make = (c) => {
      const palette = [c.good, c.amber, c.bad, c.violet, c.blue, c.muted];
      return {
        traces: reasons.map((reason, i) => ({
          x: value.map(middle), y: value.map((point) => point.stops[reason] ?? 0), name: plain(words(reason)), stackgroup: "all", mode: "lines",
          line: { width: 0.5, color: palette[i % palette.length] }, fillcolor: alpha(palette[i % palette.length], 0.55),
          hovertemplate: `%{y:.0%}<extra>${plain(words(reason))}</extra>`,
        })),
        layout: { xaxis: stepAxis(), yaxis: { tickformat: ".0%", range: [0, 1] } },
      };
    };
    card(parent, `Why rollouts ended${name && `: ${name}`}`, "share by step", make);
  }
  if (each("curves").some(({ value }) => value.length)) return;
  const make = (c) => ({
    traces: each("stops").map(({ value, run, name }) => ({
      type: "bar", orientation: "h", name: plain(name || "rollouts"), y: reasons.map((reason) => plain(words(reason))), x: reasons.map((reason) => value[reason] ?? 0),
      marker: { color: runColour(c, run) }, hovertemplate: "%{x:.1%}<extra></extra>",
    })),
    layout: { hovermode: "closest", xaxis: { tickformat: ".0%", range: [0, 1] }, yaxis: { autorange: "reversed" }, showlegend: state.data.runs.length > 1 },
  });
  card(parent, "Why rollouts ended", "share of rollouts", make);
}
