/* Explorer of an entanglement graph: search a fact, see its strongest neighbours, go on from there.
   The build appends a call exploreGraph(payload); see companion_explorer.py for the payload. */
"use strict";
function exploreGraph(data) {
  const script = document.currentScript;
  const box = script && document.getElementById(script.dataset.explorer);
  if (!box) return;

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const shorts = (text) => {
    const view = new DataView(bytes(text).buffer);
    return Array.from({ length: view.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true));
  };
  const NONE = 0xffff;
  const facts = shorts(data.facts);
  const n = facts.length / 3;
  const scores = data.scores.map((s) => ({ ...s, to: shorts(s.to), strength: bytes(s.strength) }));
  const template = (i) => data.prompts[facts[3 * i]];
  const subject = (i) => data.subjects[facts[3 * i + 1]];
  const answer = (i) => data.answers[facts[3 * i + 2]];
  const text = (i) => template(i).split("{}").join(subject(i));
  const folded = (t) => t.normalize("NFD").replace(/[\u0300-\u036f]/g, "").toLowerCase();
  const index = Array.from({ length: n }, (_, i) => folded(text(i) + " " + answer(i)));
  let current = null, chosen = 0, trail = [];

  const make = (tag, className, content) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (content !== undefined) node.textContent = content;
    return node;
  };
  const button = (className, content, action) => {
    const node = make("button", className, content);
    node.type = "button";
    node.addEventListener("click", action);
    return node;
  };

  const value = (s, place) => s.low + (s.strength[place] / 255) * (s.high - s.low);
  const neighbours = (s, i) => {
    const found = [];
    for (let j = 0; j < s.k; j++) {
      const place = i * s.k + j;
      if (s.to[place] !== NONE) found.push({ fact: s.to[place], score: value(s, place) });
    }
    return found;
  };
  const listing = (s, i) => {
    const found = [];
    for (let place = 0; place < s.to.length; place++) {
      if (s.to[place] === i) found.push({ fact: Math.floor(place / s.k), score: value(s, place) });
    }
    return found.sort((a, b) => b.score - a.score);
  };

  const bar = make("div", "ek-explorer-bar");
  const field = make("input");
  field.type = "search";
  field.placeholder = "Search " + n.toLocaleString("en") + " facts: subject, relation, answer";
  field.setAttribute("aria-label", "Search the facts");
  const select = make("select");
  select.setAttribute("aria-label", "Score");
  scores.forEach((s, i) => {
    const option = make("option", "", s.name);
    option.value = i;
    select.append(option);
  });
  const back = button("ek-explorer-small", "← Back", () => show(trail.pop(), false));
  const any = button("ek-explorer-small", "Random fact", () => show(Math.floor(Math.random() * n)));
  bar.append(field, select, back, any);
  const hits = make("ul", "ek-explorer-hits");
  const card = make("div", "ek-explorer-card");
  card.setAttribute("aria-live", "polite");
  box.replaceChildren(bar, hits, card);
  if (data.note) box.append(make("p", "ek-explorer-note", data.note));

  function entry(i, score, s, why) {
    const item = make("li");
    const go = button("ek-explorer-fact", undefined, () => show(i));
    const line = make("span", "ek-explorer-line");
    line.append(make("span", "", text(i) + " "), make("b", "", answer(i)));
    if (why) line.append(make("span", "ek-explorer-why", why));
    go.append(line);
    if (score !== undefined) {
      const strength = make("span", "ek-explorer-strength");
      const fill = make("span");
      const span = s.high - Math.min(0, s.low);
      fill.style.width = Math.max(2, (100 * (score - Math.min(0, s.low))) / (span || 1)) + "%";
      strength.append(fill);
      go.append(strength, make("span", "ek-explorer-score", score.toFixed(2)));
    }
    item.append(go);
    return item;
  }

  function search() {
    const words = folded(field.value).split(/\s+/).filter(Boolean);
    hits.replaceChildren();
    if (!words.length) return;
    let count = 0;
    for (let i = 0; i < n; i++) {
      if (words.every((w) => index[i].includes(w)) && ++count <= 12) hits.append(entry(i));
    }
    const more = count > 12 ? "12 of " + count.toLocaleString("en") + " facts; more words narrow it down" : "";
    const note = count ? more : "No fact has all of these words.";
    if (note) hits.append(make("li", "ek-explorer-why", note));
  }

  function relation(a, b) {
    const same = [];
    if (subject(a) === subject(b)) same.push("same subject");
    if (template(a) === template(b)) same.push("same template");
    if (answer(a) === answer(b)) same.push("same answer");
    return same.length ? " · " + same.join(", ") : "";
  }

  function show(i, remember = true) {
    if (i === undefined || i === null) return;
    if (remember && current !== null && current !== i) trail.push(current);
    current = i;
    back.disabled = !trail.length;
    field.value = "";
    hits.replaceChildren();
    const s = scores[chosen];
    const listed = listing(s, i);
    card.replaceChildren();
    const head = make("p", "ek-explorer-head");
    head.append(make("span", "", text(i) + " "), make("b", "", answer(i)));
    card.append(head);
    const list = (title, found) => {
      const column = make("div");
      column.append(make("h4", "", title));
      const items = make("ol");
      found.forEach((x) => items.append(entry(x.fact, x.score, s, relation(i, x.fact))));
      if (!found.length) items.append(make("li", "ek-explorer-why", "none"));
      column.append(items);
      return column;
    };
    const columns = make("div", "ek-explorer-columns");
    const some = listed.slice(0, s.k);
    columns.append(
      list("Most entangled with it", neighbours(s, i)),
      list("In whose list it is: " + listed.length.toLocaleString("en")
        + (listed.length > some.length ? ", the strongest " + some.length : ""), some),
    );
    card.append(columns);
  }

  field.addEventListener("input", search);
  select.addEventListener("change", () => { chosen = Number(select.value); show(current); });
  const wanted = folded(new URLSearchParams(location.search).get("fact") || data.start || "").split(/\s+/);
  show(Math.max(index.findIndex((t) => wanted.every((w) => t.includes(w))), 0));
}
