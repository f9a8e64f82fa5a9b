/* The page "Try it": panels, buttons, and the one job at a time that they start. Loaded last but for model.js. */
"use strict";
(function (scope) {
  const Pocket = (scope.Pocket = scope.Pocket || {});
  const { el, percent, Grid, curves, cloud, drive, fields } = Pocket;
  const places = {};
  document.querySelectorAll("[data-try]").forEach((node) => (places[node.dataset.try] = node));
  if (!places.load) return;

  // ---------------------------------------------------------------- loading

  const base = document.currentScript.src.replace(/[^/]*$/, ""), parts = [];
  const bar = el("progress", { max: 100, value: 0, "aria-label": "Loading the model" }), news = el("p.ek-try-news", { role: "status" });
  let meta = null, session = null;
  Pocket.arrive = (i, text) => (parts[i] = text);
  Pocket.describe = async (description) => {
    meta = description;
    places.load.replaceChildren(el("div.ek-try-bar", {}, bar, news));
    try {
      for (let i = 0; i < meta.parts; i++) {
        news.textContent = `Loading ${meta.parameters.toLocaleString("en")} numbers, part ${i + 1} of ${meta.parts} …`;
        await script(`model-${i}.js`);
        bar.value = (80 * (i + 1)) / meta.parts;
      }
      await begin();
    } catch (error) {
      fail(places.load, error);
    }
  };
  const script = (name) => new Promise((done, failed) => {
    const node = el("script", { src: base + name, onload: done, onerror: () => failed(new Error(
      `The file ${name} of the model cannot be read. Copy the book again, with its folder _static/try_it.`)) });
    document.head.append(node);
  });
  async function begin() {
    const pieces = parts.map((t) => Uint8Array.from(atob(t), (c) => c.charCodeAt(0))), whole = new Uint8Array(meta.bytes);
    pieces.reduce((at, piece) => (whole.set(piece, at), at + piece.length), 0);
    parts.length = 0;
    news.textContent = "Reading the facts of the world …";
    session = Pocket.session = new Pocket.Session(meta, whole.buffer);
    let done = 0;
    const count = (work) => (function* () { for (const x of work) { bar.value = 80 + (20 * ++done) / (session.facts.length + 40); yield x; } })();
    await drive(count(session.prepare()));
    statusPanel(); askPanel(); editPanel(); streamPanel(); comparePanel(); linkPanel();
    const asked = fields(location.hash);
    refresh();
    await open(asked);
    window.addEventListener("hashchange", () => { if (location.hash.replace("#", "") !== written) open(fields(location.hash)); });
    document.documentElement.dataset.try = "ready";
  }

  // ---------------------------------------------------------------- one job at a time

  let busy = null;
  const alerts = new Map();
  function fail(place, error) {
    let node = alerts.get(place);
    if (!node) { node = el("p.ek-try-alert", { role: "alert" }); alerts.set(place, node); }
    if (!node.isConnected) place.append(node);
    node.textContent = error.message;
    node.hidden = !error.message;
  }
  /* Run a generator in slices; buttons rest until it has ended, except Stop. Errors become sentences in the panel. */
  async function job(place, label, work, onYield) {
    if (busy) return undefined;
    fail(place, { message: "" });
    busy = { stopped: false };
    Pocket.idle = false;
    tell(label);
    document.querySelectorAll("[data-action]").forEach((b) => (b.disabled = true));
    stop.hidden = false;
    const start = performance.now();
    try {
      const value = await drive(work, { onYield, stopped: () => busy.stopped });
      Pocket.took = performance.now() - start;
      return value === undefined ? true : value;  // STOPPED if it was stopped
    } catch (error) {
      fail(place, error);
      return undefined;
    } finally {
      busy = null;
      stop.hidden = true;
      document.querySelectorAll("[data-action]").forEach((b) => (b.disabled = false));
      refresh();
      Pocket.idle = true;
    }
  }
  const action = (label, run, strong) => el(strong ? "button.ek-try-do.ek-try-strong" : "button.ek-try-do", { type: "button", "data-action": "", onclick: run }, label);
  const labelled = (label, control, note) => el("label.ek-try-field", {}, el("span", {}, label), control, note);
  const select = (options, value, onchange) => {
    const node = el("select", { onchange });
    node.append(...options.map(([v, text]) => el("option", { value: v, selected: String(v) === String(value) }, text)));
    return node;
  };

  // ---------------------------------------------------------------- state: restore, stop, link

  const stop = el("button.ek-try-do", { type: "button", hidden: true, onclick: () => busy && (busy.stopped = true) }, "Stop");
  const tell = (text) => (news.textContent = text);
  function statusPanel() {
    const restore = action("Restore the model", () => {
      const left = session.restore(), all = meta.parameters.toLocaleString("en");
      refresh();
      tell(left ? `${left} numbers still differ; please reload the page.` : `Restored: all ${all} numbers are equal to the last bit.`);
    });
    places.load.replaceChildren(el("div.ek-try-bar", {}, news, el("span.ek-try-buttons", {}, stop, restore, action("Copy link", copy))));
  }
  async function copy() {
    try {
      await navigator.clipboard.writeText(address());
      tell("The link is copied: it opens this page, does the same edits again and shows what you see.");
    } catch {
      shown.select();
      tell("The link is marked in the last panel; copy it from there.");
      shown.scrollIntoView({ block: "center" });
    }
  }
  let written = "", more = {};
  const shown = el("input.ek-try-address", { readonly: true, "aria-label": "Link to this state" });
  const address = () => location.href.replace(/#.*/, "") + "#" + session.link(more);
  function linkPanel() {
    places.link?.replaceChildren(shown, el("span.ek-try-buttons", {}, action("Copy link", copy)));
  }
  function refresh() {
    const n = session.written.size, kept = session.keeps();
    tell(n ? `${n} ${n === 1 ? "edit" : "edits"} in the weights, ${kept} of them ${kept === 1 ? "holds" : "hold"}.`
      : `The pocket companion is ready: ${meta.parameters.toLocaleString("en")} numbers, unedited.`);
    written = session.link(more);
    shown.value = address();
    try { history.replaceState(null, "", "#" + written); } catch { /* the link panel has it */ }
    drawStream();
    drawSettings();
    ask(false);
  }
  async function open(wanted) {
    if (!["do", "set", "ask", "fact", "show"].some((k) => k in wanted)) return;
    if (busy) return tell("The page is at work. Press Stop, then open the link again.");
    if (session.written.size) session.restore();
    session.runs.length = 0;
    session.ops = [];
    if (wanted.ask) { more.ask = question.value = wanted.ask; }
    if (wanted.fact) pick(...wanted.fact.split(".").map(Number));
    places[wanted.show]?.scrollIntoView({ block: "start" });
    await settle(job(places.load, "Doing the edits of the link …", session.replay(wanted), watch));
    if (wanted.predict) await foresee();
    if (wanted.ask) ask(true);
  }

  // ---------------------------------------------------------------- ask

  let question, answers;
  function askPanel() {
    const examples = ["born_in", "sport", "employer", "language"].map((r) => meta.facts.find((f) => f.relation === r));
    question = el("input", { type: "text", autocomplete: "off", spellcheck: "false", value: examples[0].prompt, list: "ek-try-prompts" });
    answers = el("div.ek-try-answers", { "aria-live": "polite" });
    const form = el("form.ek-try-row", { onsubmit: (e) => { e.preventDefault(); ask(true); } },
      labelled("Prompt", question), el("button.ek-try-do.ek-try-strong", { type: "submit" }, "Ask"));
    const chips = examples.map((f) => el("button.ek-try-chip", { type: "button", onclick: () => { question.value = f.prompt; ask(true); } }, f.prompt + " …"));
    places.ask.replaceChildren(form, el("datalist", { id: "ek-try-prompts" }, meta.facts.map((f) => el("option", { value: f.prompt }))),
      el("p.ek-try-chips", {}, chips), answers);
    ask(false);
  }
  function ask(loud) {
    if (!answers || busy) return;
    const prompt = question.value.trim(), place = places.ask;
    fail(place, { message: "" });
    if (loud) more.ask = prompt;
    try {
      if (!prompt) throw new Error("The prompt is empty. Type the beginning of a sentence, or take one of the examples.");
      const [first] = session.unknown(prompt);
      if (first) throw new Error(`The pocket companion has never seen the word “${first.word}”. ` + (first.near ? `Did you mean “${first.near}”?` : "It knows only its own small world; take one of the examples."));
      const now = Pocket.ask(session.model, session.tokenizer, prompt);
      const columns = [["now", now]];
      if (session.written.size) columns.unshift(["as trained", session.asTrained(() => Pocket.ask(session.model, session.tokenizer, prompt))]);
      answers.replaceChildren(...columns.map(([title, a]) => el("div.ek-try-answer", {}, el("h4", {}, columns.length > 1 ? title : "The companion goes on"),
        el("p.ek-try-sentence", {}, prompt, el("b", {}, a.continuation)),
        el("table.ek-try-next", {}, el("caption", {}, "Next token"), el("tbody", {}, a.next.map(({ token, p }) => el("tr", {},
          el("th", { scope: "row" }, token.replace(/^ /, "") || "␣"),
          el("td", {}, el("span.ek-try-strength", { style: `width:${Math.max(0.5, 100 * p).toFixed(1)}%` })),
          el("td.ek-try-number", {}, p < 0.001 ? "< 0.1 %" : (100 * p).toFixed(1) + " %"))))))));
    } catch (error) {
      answers.replaceChildren();
      fail(place, error);
    }
    if (loud) { written = session.link(more); shown.value = address(); }
  }

  // ---------------------------------------------------------------- one edit, and what else moves

  let person, which, target, table, clouds, verdict, expected = null;
  function editPanel() {
    const people = [...new Set(meta.facts.map((f) => f.subject))].sort();
    person = select(people.map((p) => [p, p]), meta.facts[0].subject, () => { fillFacts(); choose(); });
    which = select([], "", () => { fillChoices(); choose(); });
    target = select([], "", choose);
    verdict = el("p.ek-try-verdict", { "aria-live": "polite" });
    table = el("div.ek-table", {});
    clouds = el("div.ek-try-pair", {});
    const any = action("Any fact", () => {
      const left = session.facts.filter((f) => !session.written.has(f.id));
      if (left.length) pick(left[Math.floor(Math.random() * left.length)].id, 0);
    });
    places.edit.replaceChildren(
      el("div.ek-try-row", {}, labelled("Person", person), labelled("Fact", which), labelled("New answer", target)),
      el("p.ek-try-buttons", {}, action("What else will move?", foresee), action("Write the edit", write, true), any),
      verdict, clouds, table);
    fillFacts();
    choose();
  }
  const own = () => session.facts[Number(which.value)];
  function fillFacts() {
    const facts = session.facts.filter((f) => f.subject === person.value);
    which.replaceChildren(...facts.map((f) => el("option", { value: f.id }, `${f.prompt} …`)));
    fillChoices();
  }
  function fillChoices() {
    target.replaceChildren(...own().choices.map((c, i) => el("option", { value: i }, c)));
  }
  function pick(id, choice = 0) {
    const fact = session.facts[id];
    if (!fact) return;
    person.value = fact.subject; fillFacts();
    which.value = id; fillChoices();
    target.value = choice; choose();
  }
  function choose() {
    const f = own(), had = session.written.get(f.id);
    expected = null;
    more.fact = `${f.id}.${target.value}`;
    clouds.replaceChildren(); table.replaceChildren();
    verdict.replaceChildren(`${f.prompt} `, el("s", {}, had ? f.choices[had.choice] : f.old), " → ", el("b", {}, f.choices[target.value]), ".");
  }
  async function foresee() {
    const id = own().id, rows = await job(places.edit, "Reading keys and states of all facts …", session.expect(id));
    if (!Array.isArray(rows)) return false;
    rank(rows, "whitened"); rank(rows, "clare");
    expected = { id, rows };
    list(rows, "whitened", "expected to move most, by whitened keys");
    return true;
  }
  function rank(rows, score) {
    [...rows].sort((a, b) => b[score] - a[score]).forEach((row, i) => (row[score + "Rank"] = i + 1));
  }
  async function write() {
    const f = own(), choice = Number(target.value);
    try { session.check(f.id, choice); } catch (error) { return fail(places.edit, error); }
    if (expected?.id !== f.id && !(await foresee())) return;
    const { rows } = expected;
    const done = await job(places.edit, "Solving and writing …", (function* () {
      yield* session.single([[f.id, choice]]);
      return yield* session.moved(rows);
    })());
    if (!done?.whitened) return;
    const fell = rows.filter((r) => r.before.holds && !r.after.holds).length, holds = session.written.get(f.id).holds;
    verdict.replaceChildren(`${f.prompt} `, el("b", {}, f.choices[choice]), holds ? ". The edit holds" : ". The edit does not hold; try a smaller λ",
      `; in other words (“${f.paraphrase} …”) it ${f.other[choice].look().holds ? "holds as well" : "does not"}`,
      fell ? `; ${fell} of ${rows.length} other facts ${fell === 1 ? "has" : "have"} lost the answer (✕).` : `; all ${rows.length} other facts keep their answer.`);
    clouds.replaceChildren(cloud(rows, "whitened", "Whitened keys", done.whitened), cloud(rows, "clare", "CLaRE", done.clare));
    list(rows, "moved", "that moved most");
    if (question.value !== f.prompt) { question.value = f.prompt; ask(true); }
    expected = null;
  }
  const small = (x) => (x >= 0.1 ? x.toFixed(2) : x < 1e-5 ? "0" : Number(x.toPrecision(2)).toString());
  function list(rows, by, title) {
    const top = [...rows].sort((a, b) => b[by] - a[by]).slice(0, 8), n = rows.length;
    table.replaceChildren(el("table.ek-try-movers", {}, el("caption", {}, `The eight facts ${title}. Columns: rank by each forecast; moved: change of the answer's log-probability (nats per token).`),
      el("thead", {}, el("tr", {}, ["fact", "whitened keys", "CLaRE", "moved"].map((t) => el("th", { scope: "col" }, t)))),
      el("tbody", {}, top.map((r) => el("tr", {}, el("td", {}, r.statement.prompt + " ", el("b", {}, r.statement.answer), r.after && r.before.holds && !r.after.holds ? " ✕ lost" : ""),
        el("td.num", {}, `${r.whitenedRank} of ${n}`), el("td.num", {}, `${r.clareRank} of ${n}`),
        el("td.num", {}, r.moved === null ? "–" : small(r.moved)))))));
  }

  // ---------------------------------------------------------------- a stream

  let many, grid, guard, chart, counted, controls;
  function streamPanel() {
    const s = session.settings, set = (name, value) => { session.settings[name] = value; expected = null; refresh(); };
    many = select([20, 60, 100, 200, 300].map((n) => [n, n]), 300, refresh);
    const lamOut = el("span.ek-try-out", {});
    controls = {
      history: el("input", { type: "checkbox", role: "switch", onchange: (e) => set("history", e.target.checked) }),
      batch: select(Pocket.BATCHES.map((n) => [n, n]), s.batch, (e) => set("batch", Number(e.target.value))),
      lam: el("input", { type: "range", min: 0, max: Pocket.LAMBDAS.length - 1, step: 1, oninput: (e) => set("lam", Pocket.LAMBDAS[e.target.value]) }),
      layers: select([["2", "2"], ["1,2", "1 and 2"]], "2", (e) => set("layers", e.target.value.split(",").map(Number))),
      spread: select([["linear_decay", "equal shares (MEMIT)"], ["consecutive", "orthogonal (HORSE)"], ["uniform", "all to each"]], "linear_decay", (e) => set("spread", e.target.value)),
      lamOut,
    };
    const say = (i) => {
      const f = session.facts[i], w = session.written.get(i);
      return `${f.prompt} ${w ? `${f.choices[w.choice]} (was ${f.old}): ${w.holds ? "holds" : "lost"}` : `${f.old}: not edited`}.`;
    };
    grid = new Grid({ label: "Edits", say, hint: "Point at a sign, or use the arrow keys, to read its fact." });
    guard = new Grid({ label: "Untouched facts", say: (i) => `${session.untouched[i].prompt} ${session.untouched[i].answer}: ${session.lost[i] ? "wrong now" : "right"}.` });
    chart = el("div.ek-try-pair.ek-try-curves", {});
    counted = el("p.ek-try-verdict", { "aria-live": "polite" });
    const legend = (cls, path, text) => el("span.ek-try-key", {}, Pocket.svg("svg", { viewBox: "0 0 14 14", width: 14, height: 14, "aria-hidden": "true" },
      Pocket.svg(path[0], { ...path[1], class: cls })), " " + text);
    places.stream.replaceChildren(
      el("div.ek-try-row", {}, labelled("Edits", many), labelled("In batches of", controls.batch), labelled("Blocks", controls.layers), labelled("Shares", controls.spread)),
      el("div.ek-try-row", {}, el("label.ek-try-switch", {}, controls.history, el("span", {}, "Keep the keys of earlier edits (history)")),
        el("label.ek-try-field.ek-try-slide", {}, el("span", {}, "Weight λ of what the model knew: ", lamOut), controls.lam)),
      el("p.ek-try-buttons", {}, action("Run the stream", run, true), action("Without and with history", both)),
      counted,
      el("p.ek-try-legend", {}, legend("ek-try-holds", ["circle", { cx: 7, cy: 7, r: 5.6 }], "edit holds"), legend("ek-try-lost", ["path", { d: "M3 3l8 8m0-8l-8 8" }], "lost"),
        legend("ek-try-waiting", ["circle", { cx: 7, cy: 7, r: 1.6 }], "not edited"), legend("ek-try-right", ["rect", { x: 2.4, y: 2.4, width: 9.2, height: 9.2, rx: 1.5 }], "untouched, right")),
      grid.node, guard.node, chart);
    controls.layers.title = "Restore the model to change the blocks.";
  }
  function drawSettings() {
    const s = session.settings, c = controls;
    c.history.checked = s.history; c.batch.value = s.batch; c.layers.value = s.layers.join(","); c.spread.value = s.spread;
    c.layers.disabled = session.locked; c.spread.disabled = s.layers.length < 2;
    c.lam.value = Pocket.LAMBDAS.reduce((best, v, i) => (Math.abs(Math.log(v / s.lam)) < Math.abs(Math.log(Pocket.LAMBDAS[best] / s.lam)) ? i : best), 0);
    c.lamOut.textContent = s.lam;
    c.lam.setAttribute("aria-valuetext", `λ = ${s.lam}`);
  }
  function drawStream() {
    const n = session.written.size, kept = session.keeps(), right = session.lost.filter((x) => !x).length, u = session.untouched.length;
    const early = [...session.written.values()].filter((w) => w.order < 60), first = early.filter((w) => w.holds).length;
    grid.draw(session.facts.map((f) => { const w = session.written.get(f.id); return !w ? "waiting" : w.holds ? "holds" : "lost"; }), n ? `${kept} of ${n} hold` : "none yet");
    guard.draw(session.lost.map((x) => (x ? "wrong" : "right")), `${right} of ${u} right`);
    chart.replaceChildren(...curves(session.runs, u, session.facts.length));
    counted.replaceChildren(...(n ? [el("b", {}, `${kept} of ${n}`), " edits hold", n > 60 ? `, ${first} of the first 60` : "", "; ", el("b", {}, `${right} of ${u}`), " untouched facts are right."]
      : ["Nothing is edited yet. Below, every sign is one fact."]));
  }
  let due = 0;
  const watch = (news) => {
    if (news.point) { drawStream(); drawSettings(); }
    if (news.written && performance.now() > due) { due = performance.now() + 200; tell(`${session.written.size} edits written …`); }
    if (news.point) tell(`${news.point.n} edits written, ${news.point.kept} hold.`);
    if (news.compared) tell(`Writing ${news.compared} …`);
  };
  /* What was stopped between two batches has edits that nobody has read yet. */
  async function settle(running) {
    const done = await running;
    if (done !== Pocket.STOPPED) return done;
    await job(places.stream, "Reading the edits …", session.look());
    tell(`Stopped after ${session.written.size} edits; the next run goes on from here.`);
    return undefined;
  }
  const run = async () => {
    const n = Number(many.value), start = session.written.size;
    const done = await settle(job(places.stream, "Writing …", session.stream(n), watch));
    if (!done) return;
    tell(`${session.written.size - start} edits in ${(Pocket.took / 1000).toFixed(1)} s, with every edit and untouched fact read again on the way.`);
  };
  const both = () => settle(job(places.stream, "Writing without history …", (function* () {
    for (const history of [false, true]) {
      session.restore();
      session.settings.history = history;
      yield* session.stream(Number(many.value));
    }
  })(), watch));

  // ---------------------------------------------------------------- one batch or many

  function comparePanel() {
    const out = el("div", { "aria-live": "polite" });
    const go = async () => {
      const n = Number(many.value), s = session.settings, batch = Math.min(s.batch, n);
      const rows = await job(places.compare, "Writing one batch …", session.compare(n), watch);
      if (!Array.isArray(rows)) return;
      out.replaceChildren(el("p", {}, `${n} edits in one batch, and the same ones in batches of ${batch}, ${s.history ? "with" : "without"} history:`),
        el("div.ek-table", {}, el("table", {}, el("thead", {}, el("tr", {}, ["block", "largest difference of two weights / norm of the matrix", "norm of the difference / norm of the matrix"].map((t) => el("th", { scope: "col" }, t)))),
          el("tbody", {}, rows.map((r) => el("tr", {}, el("td", {}, r.layer), el("td.num", {}, power(r.most)), el("td.num", {}, power(r.apart))))))),
        el("p", {}, conclusion(rows, s)));
    };
    places.compare.replaceChildren(el("p.ek-try-buttons", {}, action("Compare one batch with many", go, true)), out);
  }
  const power = (x) => (x === 0 ? "0" : x.toExponential(1).replace(/e\+?(-?)(\d+)/, (_, sign, digits) => ` × 10${sign && "⁻"}${[...digits].map((c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]).join("")}`));
  function conclusion(rows, s) {
    if (Math.max(...rows.map((r) => r.most)) < 1e-6) return "The two models are the same up to rounding: editing in sequence is editing at once.";
    if (!s.history) return "The two models differ: without history every batch forgets the keys of the batches before it.";
    return "The two models differ although the keys are kept: with two blocks, each batch moves the keys that the next one finds in the second block. With one block they agree.";
  }

  /* The curves as they stand, for book/_static/try_it_still.svg (tools/try_it_still.py). */
  const picture = () => Pocket.still([...chart.children], chart.firstChild.getAttribute("aria-label"));

  Object.assign(Pocket, { job, picture, idle: true });
})(window);
