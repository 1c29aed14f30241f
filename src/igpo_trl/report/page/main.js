// Starts the page: shows its data, answers keys, and follows a run that is still being made.

const POLL = 3000; // milliseconds

function show(data) {
  const selected = state.selected?.key ?? location.hash.match(/^#r(\d+\.\d+)$/)?.[1];
  const beside = state.beside?.key;
  const isNew = !state.data;
  const top = $("list").scrollTop;
  document.querySelector("main").hidden = false;
  setData(data);
  if (isNew) state.keepBeside = data.runs.length > 1;
  const find = (key) => state.rollouts.find((rollout) => rollout.key === key) ?? null;
  state.selected = find(selected);
  state.beside = find(beside);
  showOverview();
  showFilters();
  applyFilters();
  $("list").scrollTop = top;
  if (isNew) performance.mark("igpo-shown");
  if (!state.selected) select_(interesting(), false);
  else if (isNew) { select_(state.selected, false); $("rollouts").scrollIntoView(); }
}

// What to read first: the wrong answer of the largest drop of belief, or the first rollout.
function interesting() {
  const wrong = state.rollouts.filter((rollout) => rollout.grade === "wrong" && rollout.fall > 0.1);
  return wrong.sort((a, b) => b.fall - a.fall)[0] ?? state.rollouts[0];
}

async function follow() {
  const live = $("live");
  live.hidden = false;
  let tag = null;
  for (;;) {
    try {
      const response = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (response.status === 200) {
        tag = response.headers.get("ETag");
        const data = await response.json();
        if (data) show(data);
        live.textContent = data ? `following, last news at ${new Date().toLocaleTimeString("en-GB")}` : "waiting for the first rollouts";
        live.className = "live on";
      } else if (response.status !== 304) throw new Error(await response.text());
      else live.className = "live on";
    } catch (error) {
      live.textContent = `not following: ${error.message}`;
      live.className = "live off";
    }
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
}

function onKey(event) {
  const typing = event.target.closest?.("input, select, textarea");
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape" && typing) { event.target.blur(); return; }
  if (typing) return;
  const inBrowser = event.target.closest?.("#rollouts");
  const page = Math.max(1, Math.floor($("list").clientHeight / ROW) - 1);
  const inList = { ArrowDown: () => move(1), ArrowUp: () => move(-1), PageDown: () => move(page), PageUp: () => move(-page), Home: () => move(-Infinity), End: () => move(Infinity) };
  const anywhere = { j: () => move(1), k: () => move(-1), ArrowLeft: () => moveInGroup(-1), ArrowRight: () => moveInGroup(1), "/": () => { $("rollouts").scrollIntoView(); $("filters").elements.text.focus(); } };
  const act = anywhere[event.key] ?? (inBrowser && !event.target.closest("#detail") ? inList[event.key] : undefined);
  if (!act || !state.data) return;
  event.preventDefault();
  act();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  drawAllAgain();
}

const dark = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = dark.matches ? "dark" : "light";
dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
$("filters").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", onKey);
let frame = 0;
$("list").addEventListener("scroll", () => {
  cancelAnimationFrame(frame);
  frame = requestAnimationFrame(showRows);
});
new ResizeObserver(() => state.data && showRows()).observe($("list"));

const data = JSON.parse($("data").textContent);
$("data").remove();
if (data) show(data);
else {
  document.querySelector("main").hidden = true;
  follow();
}
addEventListener("load", () => requestAnimationFrame(() => setTimeout(startCharts)));
