// The rating page. Texts are data: they reach the page through textContent only.

const POLL_MS = 2000; // between looks for new pairs, and at others' progress
const GUARD_MS = 250; // a new pair takes no verdict before: a double press is not two answers
const FLASH_MS = 160;
const NAME_KEY = "freshpairs.rater";
const SIDES = ["left", "right"];
const KEYS = { left: ["1", "2", "3", "4", "5"], right: ["6", "7", "8", "9", "0"] };
const SAID = { left: "left is better", right: "right is better", tie: "tie", skip: "skipped" };

const $ = (id) => document.getElementById(id);
const page = {
  rater: localStorage.getItem(NAME_KEY) ?? "",
  item: null,
  quality: { left: null, right: null },
  busy: true,
  view: "",
};

// Time spent looking at the pair: a hidden tab does not count.
const watch = {
  spent: 0,
  since: 0,
  start() {
    this.spent = 0;
    this.since = document.hidden ? 0 : performance.now();
  },
  seconds() {
    return (this.spent + (this.since ? performance.now() - this.since : 0)) / 1000;
  },
  toggle() {
    if (document.hidden) {
      this.spent += this.since ? performance.now() - this.since : 0;
      this.since = 0;
    } else {
      this.since = performance.now();
    }
  },
};

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

class Refused extends Error {}

async function ask(path, body) {
  const request = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await fetch(`api/${path}`, { ...request, signal: AbortSignal.timeout(60000) });
  if (response.ok) return response.json();
  let reason = `${response.status}`;
  try {
    reason = (await response.json()).error ?? reason;
  } catch { /* The status says enough. */ }
  throw new Refused(reason);
}

function complain(error, meant) {
  if (!meant && !$("alert").hidden) return; // What was not saved matters more.
  const why = error instanceof Refused
    ? `The server refused: ${error.message}.`
    : "The server does not answer; its run may have ended. This page keeps trying.";
  $("alert").textContent = meant ? `${meant} ${why}` : why;
  $("alert").hidden = false;
}

const calm = () => { $("alert").hidden = true; };

function setBusy(busy) {
  page.busy = busy;
  $("main").setAttribute("aria-busy", String(busy));
}

function show(view) {
  page.view = view;
  for (const id of ["welcome", "pair", "waiting", "agreement"]) $(id).hidden = id !== view;
  $("actions").hidden = view !== "pair" && view !== "waiting";
  for (const button of document.querySelectorAll("[data-verdict]")) button.disabled = view !== "pair";
  $("actions").classList.toggle("idle", view === "waiting");
  $("progress").hidden = !page.rater || view === "welcome";
  $("rater").hidden = !page.rater || view === "welcome";
  $("rater").textContent = page.rater;
  if (view === "agreement") $("to-agreement").setAttribute("aria-current", "page");
  else $("to-agreement").removeAttribute("aria-current");
}

function showProgress({ items, finished, mine, remaining }) {
  $("bar").max = Math.max(items, 1);
  $("bar").value = finished;
  const counts = [[mine, " by you"], [remaining, " left for you"], [`${finished} / ${items}`, " done"]];
  $("counts").replaceChildren(...counts.flatMap(([count, what], i) => [
    ...(i ? [document.createTextNode(" · ")] : []), element("b", String(count)), document.createTextNode(what),
  ]));
  document.title = remaining ? `(${remaining}) Which is better?` : "Which is better?";
}

function showPrompt(prompt) {
  if (typeof prompt === "string") {
    const plain = element("div", prompt, "plain");
    plain.dir = "auto";
    $("prompt").replaceChildren(plain);
    return;
  }
  $("prompt").replaceChildren(...prompt.map(({ role, content }) => {
    const turn = element("div", undefined, "turn");
    if (role === "user" || role === "system") turn.classList.add(role);
    const said = element("div", content, "said");
    said.dir = "auto";
    turn.append(element("div", role, "who"), said);
    return turn;
  }));
}

function showQuality() {
  for (const side of SIDES) {
    for (const button of $(`${side}-quality`).querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.quality) === page.quality[side]));
    }
  }
}

function mark(verdict) {
  for (const side of SIDES) $(`${side}-side`).classList.toggle("chosen", verdict === side);
  $("pair").classList.toggle("tied", verdict === "tie");
}

async function showState({ item, progress }) {
  calm();
  showProgress(progress);
  const same = item !== null && page.item !== null && item.id === page.item.id && page.view === "pair";
  page.item = item;
  mark("");
  if (location.hash === "#agreement") {
    setBusy(false);
    return;
  }
  if (item === null) {
    const others = progress.remaining
      ? "Other people hold the last pairs. "
      : progress.items ? "You have answered every pair that there is. " : "There are no pairs yet. ";
    $("waiting-title").textContent = progress.items ? "All done" : "Nothing to rate yet";
    $("waiting-text").textContent = `${others}This page looks for new ones by itself.`;
    show("waiting");
    setBusy(false);
    return;
  }
  const before = item.withdrawn;
  page.quality = { left: before?.left ?? null, right: before?.right ?? null };
  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.classList.toggle("before", button.dataset.verdict === before?.verdict);
  }
  showQuality();
  showPrompt(item.prompt);
  for (const side of SIDES) $(`${side}-text`).textContent = item[side];
  show("pair");
  if (!same) {
    // Of a conversation the last turn is what was answered.
    $("prompt").scrollTop = typeof item.prompt === "string" ? 0 : $("prompt").scrollHeight;
    scrollTo(0, 0);
  }
  watch.start();
  await pause(GUARD_MS);
  setBusy(false);
}

async function fetchNext() {
  setBusy(true);
  try {
    await showState(await ask("next", { rater: page.rater }));
  } catch (error) {
    if (error instanceof Refused && page.view === "") show("welcome");
    complain(error);
    setBusy(false);
  }
}

async function answer(verdict) {
  if (page.busy || page.view !== "pair") return;
  setBusy(true);
  mark(verdict);
  const { left, right } = page.quality;
  const body = { rater: page.rater, item: page.item.id, verdict, left, right, seconds: Math.min(watch.seconds(), 86400) };
  try {
    const [state] = await Promise.all([ask("rate", body), pause(FLASH_MS)]);
    const qualities = left || right ? ` (quality ${left ?? "–"} and ${right ?? "–"})` : "";
    $("status").textContent = `Saved: ${SAID[verdict]}${qualities}.`;
    await showState(state);
  } catch (error) {
    mark("");
    $("status").textContent = "";
    complain(error, "Not saved: answer again.");
    setBusy(false);
  }
}

async function undo() {
  if (page.busy || (page.view !== "pair" && page.view !== "waiting")) return;
  setBusy(true);
  try {
    const state = await ask("undo", { rater: page.rater });
    $("status").textContent = state.item?.withdrawn
      ? `Withdrawn: ${SAID[state.item.withdrawn.verdict]}. Answer again.`
      : "There is nothing to undo.";
    await showState(state);
  } catch (error) {
    complain(error, "Not undone.");
    setBusy(false);
  }
}

function rateQuality(side, quality) {
  if (page.view !== "pair") return;
  page.quality[side] = page.quality[side] === quality ? null : quality;
  showQuality();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
  if (event.target.closest("input") || !["pair", "waiting"].includes(page.view)) return;
  const verdict = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", t: "tie", s: "skip" }[
    event.key.length === 1 ? event.key.toLowerCase() : event.key
  ];
  // The place of the key, not its sign: on some layouts digits need Shift.
  const digit = /^(?:Digit|Numpad)(\d)$/.exec(event.code)?.[1];
  if (verdict) answer(verdict);
  else if (event.key.toLowerCase() === "u") undo();
  else if (digit && KEYS.left.includes(digit)) {
    rateQuality(event.shiftKey ? "right" : "left", KEYS.left.indexOf(digit) + 1);
  } else if (digit) rateQuality("right", KEYS.right.indexOf(digit) + 1);
  else return;
  event.preventDefault();
}

const percent = (share) => (share === null ? "–" : `${Math.round(100 * share)} %`);
const decimal = (alpha) => (alpha === null ? "–" : alpha.toFixed(2).replace("-", "−"));

function raterRow(bias) {
  const row = element("tr");
  const name = element("th", bias.rater);
  name.scope = "row";
  const left = element("td", percent(bias.left_rate));
  if (bias.left_rate !== null) {
    const meter = element("meter");
    meter.value = bias.left_rate;
    meter.ariaLabel = "Share of left among preferences";
    left.append(meter);
  }
  const majority = bias.compared ? `${percent(bias.majority_rate)} of ${bias.compared}` : "–";
  const seconds = bias.seconds === null ? "–" : `${bias.seconds.toFixed(1)} s`;
  row.append(
    name, element("td", String(bias.verdicts)), element("td", String(bias.skips)), left,
    element("td", percent(bias.tie_rate)), element("td", majority), element("td", seconds),
  );
  return row;
}

async function showAgreement() {
  try {
    const agreed = await ask("agreement");
    calm();
    const tiles = [
      ["α of preferences", decimal(agreed.preference)], ["α of qualities", decimal(agreed.quality)],
      ["ratings", agreed.verdicts], ["pairs rated", agreed.items], ["rated by two or more", agreed.shared],
    ];
    $("tiles").replaceChildren(...tiles.map(([name, value]) => {
      const tile = element("div");
      tile.append(element("dt", name), element("dd", String(value)));
      return tile;
    }));
    $("raters").replaceChildren(...agreed.raters.map(raterRow));
    $("agreement").setAttribute("aria-busy", "false");
  } catch (error) {
    complain(error);
  }
}

async function route() {
  if (location.hash === "#agreement") {
    show("agreement");
    await showAgreement();
    setBusy(false);
  } else if (!page.rater) {
    show("welcome");
    setBusy(false);
    $("name").focus();
  } else {
    await fetchNext();
  }
}

async function poll() {
  for (;;) {
    await pause(POLL_MS);
    if (page.busy) continue;
    if (page.view === "agreement") await showAgreement();
    else if (page.view === "waiting" || (page.view === "" && page.rater)) await look();
    else if (page.view === "pair") {
      try {
        const progress = await ask("progress", { rater: page.rater });
        calm();
        if (page.view === "pair" && !page.busy) showProgress(progress);
      } catch (error) {
        complain(error);
      }
    }
  }
}

// While nothing is open the page must not look busy: undo works there.
async function look() {
  try {
    const state = await ask("next", { rater: page.rater });
    if (page.busy || (page.view !== "waiting" && page.view !== "")) return;
    if (state.item !== null) {
      setBusy(true);
      $("status").textContent = "A new pair has come.";
    }
    await showState(state);
  } catch (error) {
    complain(error);
  }
}

for (const side of SIDES) {
  const legend = element("span", "Quality", "legend");
  legend.append(element("small", "1 poor – 5 excellent"));
  $(`${side}-quality`).append(legend, ...KEYS[side].map((key, i) => {
    const button = element("button", String(i + 1));
    button.type = "button";
    button.dataset.quality = i + 1;
    button.ariaLabel = `Quality ${i + 1} of 5, ${side}`;
    button.setAttribute("aria-keyshortcuts", key);
    button.append(element("kbd", key));
    button.addEventListener("click", () => rateQuality(side, i + 1));
    return button;
  }));
}
for (const button of document.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => answer(button.dataset.verdict));
}
$("undo").addEventListener("click", undo);
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  if (!name) return;
  page.rater = name;
  localStorage.setItem(NAME_KEY, name);
  route();
});
$("rater").addEventListener("click", () => {
  if (page.busy) return;
  page.item = null;
  show("welcome");
  $("name").value = page.rater;
  $("name").select();
});
document.addEventListener("keydown", onKey);
document.addEventListener("visibilitychange", () => watch.toggle());
addEventListener("hashchange", route);
route();
poll();
