/* What the page "Try it" draws: elements, grids, curves, clouds of points. Nothing here knows a model. */
"use strict";
(function (scope) {
  const Pocket = (scope.Pocket = scope.Pocket || {});
  const SVG = "http://www.w3.org/2000/svg";

  /* el("p.some-class", {attribute: value, onclick: f}, ...children) */
  function el(name, attributes = {}, ...children) {
    const [tag, ...classes] = name.split("."), node = document.createElement(tag);
    if (classes.length) node.className = classes.join(" ");
    fill(node, attributes, children);
    return node;
  }
  function svg(tag, attributes = {}, ...children) {
    const node = document.createElementNS(SVG, tag);
    fill(node, attributes, children);
    return node;
  }
  function fill(node, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value === true) node.setAttribute(key, "");
      else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  }
  const percent = (a, b) => (b ? Math.round((100 * a) / b) + " %" : "–");

  // ---------------------------------------------------------------- grid: one sign per fact

  const SIGNS = {
    holds: (x, y) => svg("circle", { cx: x, cy: y, r: 5.6 }),
    lost: (x, y) => svg("path", { d: `M${x - 4} ${y - 4}l8 8m0-8l-8 8` }),
    waiting: (x, y) => svg("circle", { cx: x, cy: y, r: 1.6 }),
    right: (x, y) => svg("rect", { x: x - 4.6, y: y - 4.6, width: 9.2, height: 9.2, rx: 1.5 }),
    wrong: (x, y) => svg("path", { d: `M${x - 4} ${y - 4}l8 8m0-8l-8 8` }),
  };
  const CELL = 17;

  /* A grid of states that the arrow keys walk through; say(i) describes a cell. */
  class Grid {
    constructor({ label, say, hint = "" }) {
      this.say = say;
      this.label = label;
      this.states = [];
      this.drawing = svg("svg", { class: "ek-try-grid", "aria-hidden": "true" });
      this.line = el("p.ek-try-said", { "aria-live": "polite" });
      this.hint = hint;
      this.box = el("div.ek-try-gridbox", { tabindex: 0, role: "group", onkeydown: (e) => this.key(e),
        onpointermove: (e) => this.point(e), onclick: (e) => this.point(e), onblur: () => this.at(null) }, this.drawing);
      this.node = el("div", {}, this.box, this.line);
      this.cursor = null;
      new ResizeObserver(() => this.layout()).observe(this.box);
    }
    draw(states, summary) {
      this.box.setAttribute("aria-label", `${this.label}: ${summary}. Arrow keys read single facts.`);
      this.changed = states.map((s, i) => this.states.length > 0 && this.states[i] !== s);
      this.states = states;
      this.layout(true);
    }
    layout(force = false) {
      const columns = Math.max(5, Math.floor((this.box.clientWidth || 680) / CELL));
      if (!force && columns === this.columns) return;
      this.columns = columns;
      const rows = Math.ceil(this.states.length / columns) || 1;
      this.drawing.setAttribute("viewBox", `0 0 ${columns * CELL} ${rows * CELL}`);
      this.drawing.style.width = columns * CELL + "px";
      this.drawing.replaceChildren(...this.states.map((state, i) => {
        const mark = SIGNS[state]((i % columns + 0.5) * CELL, (Math.floor(i / columns) + 0.5) * CELL);
        mark.setAttribute("class", `ek-try-${state}` + (this.changed?.[i] ? " ek-try-new" : ""));
        return mark;
      }));
      this.at(this.cursor);
    }
    at(i) {
      this.cursor = i;
      this.ring?.remove();
      this.line.textContent = i === null ? this.hint : this.say(i);
      if (i === null) return;
      this.ring = svg("rect", { class: "ek-try-ring", x: (i % this.columns) * CELL + 0.5,
        y: Math.floor(i / this.columns) * CELL + 0.5, width: CELL - 1, height: CELL - 1, rx: 3 });
      this.drawing.append(this.ring);
    }
    key(event) {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = this.cursor === null ? 0 : this.cursor + step;
      if (next >= 0 && next < this.states.length) this.at(next);
    }
    point(event) {
      const place = this.drawing.getBoundingClientRect(), scale = place.width / (this.columns * CELL) || 1;
      const x = Math.floor((event.clientX - place.left) / scale / CELL), y = Math.floor((event.clientY - place.top) / scale / CELL);
      const i = y * this.columns + x;
      if (x >= 0 && x < this.columns && y >= 0 && i < this.states.length && i !== this.cursor) this.at(i);
    }
  }

  // ---------------------------------------------------------------- curves

  const NAMES = {
    history: (x) => (x ? "with history" : "without history"), spread: (x) => ({ linear_decay: "equal shares", consecutive: "orthogonal", uniform: "all to each" })[x],
    lam: (x) => `λ ${x}`, batch: (x) => `batches of ${x}`, layers: (x) => (x.length > 1 ? "blocks 1, 2" : "block " + x[0]),
  };
  /* What a run is called beside another one: the settings in which they differ. */
  function runName(run, other) {
    const differs = (key) => other && JSON.stringify(run.settings[key]) !== JSON.stringify(other.settings[key]);
    const keys = Object.keys(NAMES).filter(differs);
    return (keys.length ? keys : ["history"]).map((key) => NAMES[key](run.settings[key])).join(", ");
  }

  /* Two panels over the number of edits: share of edits that hold, share of untouched facts still right. The latest
     run is solid, the one before it dashed, older ones pale. runs: [{settings, points}]. */
  function curves(runs, untouched, most) {
    const wide = 330, high = 190, left = 42, top = 26, bottom = 34, shown = runs.filter((r) => r.points.length).slice(-4);
    const panel = (title, value, offset) => {
      const x = (n) => offset + left + (n / most) * (wide - left - 12), y = (v) => top + (1 - v) * (high - top - bottom);
      const parts = [svg("text", { x: offset + left, y: 14, class: "ek-try-title" }, title)];
      for (const v of [0, 0.5, 1])
        parts.push(svg("line", { x1: x(0), x2: x(most), y1: y(v), y2: y(v), class: "ek-try-rule" }),
          svg("text", { x: offset + left - 6, y: y(v) + 4, "text-anchor": "end" }, v * 100 + " %"));
      for (const n of [0, most / 2, most])
        parts.push(svg("text", { x: x(n), y: high - bottom + 16, "text-anchor": "middle" }, n));
      parts.push(svg("text", { x: x(most / 2), y: high - 3, "text-anchor": "middle" }, "edits written"));
      const taken = [];
      shown.forEach((run, i) => {
        const latest = i >= shown.length - 2;
        const at = run.points.map((p) => [x(p.n), y(value(p))]);
        const newest = i === shown.length - 1, other = shown[shown.length - (newest ? 2 : 1)];
        const kind = `ek-try-run-${newest ? "new" : "former"}` + (latest ? "" : " ek-try-old");
        parts.push(svg("polyline", { points: at.map((p) => p.join(",")).join(" "), class: kind }));
        at.forEach(([px, py]) => parts.push(svg(newest ? "circle" : "rect", newest
          ? { cx: px, cy: py, r: 2.6, class: kind + " ek-try-dot" }
          : { x: px - 2.4, y: py - 2.4, width: 4.8, height: 4.8, class: kind + " ek-try-dot" })));
        const [ex, ey] = at[at.length - 1];
        // Under all lines near its end, and under the labels that are there already.
        const near = shown.flatMap((r) => r.points.map((q) => [x(q.n), y(value(q))]));
        let ly = Math.max(...near.filter(([qx, qy]) => qx > ex - 110 && Math.abs(qy - ey) < 26).map((q) => q[1])) + 17;
        while (taken.some((other) => Math.abs(other - ly) < 14)) ly += 14;
        if (ly > high - bottom - 4) ly = ey - 9;
        taken.push(ly);
        const end = ex > offset + left + 120;
        if (latest) parts.push(svg("text", { x: ex, y: ly, "text-anchor": end ? "end" : "start", class: kind + " ek-try-label" }, runName(run, other)));
      });
      return svg("g", {}, ...parts);
    };
    const last = shown[shown.length - 1]?.points.slice(-1)[0];
    const words = last ? `After ${last.n} edits ${last.kept} hold; ${last.untouched} of ${untouched} untouched facts are right.` : "No edits yet.";
    const make = (offset, title, value) => svg("svg", { viewBox: `${offset} 0 ${wide} ${high}`, role: "img", "aria-label": `${title}. ${words}` }, panel(title, value, offset));
    return [make(0, "Edits that hold", (p) => p.kept / p.n), make(0, "Untouched facts still right", (p) => p.untouched / untouched)];
  }

  // ---------------------------------------------------------------- what was expected against what moved

  function cloud(rows, score, label, rho) {
    const wide = 300, high = 210, left = 40, bottom = 36, top = 24;
    const most = Math.max(...rows.map((r) => r[score]), 1e-9), least = score === "clare" ? Math.min(...rows.map((r) => r[score])) : 0;
    const highest = Math.max(...rows.map((r) => r.moved), 1e-9), log = (v) => Math.log10(Math.max(v, highest / 1e5));
    const x = (r) => left + 6 + ((r[score] - least) / (most - least || 1)) * (wide - left - 14);
    const y = (r) => top + 4 + (1 - (log(r.moved) - log(0)) / (log(highest) - log(0))) * (high - top - bottom - 8);
    return svg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img",
      "aria-label": `${label} against the movement of ${rows.length} facts; rank correlation ${rho.toFixed(2)}.` },
    svg("text", { x: left, y: 13, class: "ek-try-title" }, `${label}: rank correlation ${rho.toFixed(2)}`),
    svg("line", { x1: left, x2: left, y1: top, y2: high - bottom, class: "ek-try-axis" }),
    svg("line", { x1: left, x2: wide, y1: high - bottom, y2: high - bottom, class: "ek-try-axis" }),
    svg("text", { x: (left + wide) / 2, y: high - 20, "text-anchor": "middle" }, "expected before the edit →"),
    svg("text", { x: 0, y: 0, transform: `translate(14 ${(high - bottom + top) / 2}) rotate(-90)`, "text-anchor": "middle" }, "moved (log scale) →"),
    ...rows.map((r) => r.before.holds && !r.after.holds
      ? svg("path", { d: `M${x(r) - 4} ${y(r) - 4}l8 8m0-8l-8 8`, class: "ek-try-lost" }, svg("title", {}, r.statement.prompt))
      : svg("circle", { cx: x(r), cy: y(r), r: 2.6, class: "ek-try-point" }, svg("title", {}, r.statement.prompt))));
  }

  /* Several drawings side by side as one SVG text with its own colours: a still picture for paper. */
  function still(drawings, title) {
    const wide = 330, high = 190, root = svg("svg", { xmlns: SVG, viewBox: `0 0 ${wide * drawings.length} ${high}`, role: "img" },
      svg("title", {}, title), svg("rect", { width: "100%", height: "100%", fill: "#fff" }));
    const names = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-size", "font-weight", "paint-order"];
    drawings.forEach((drawing, i) => {
      const copy = drawing.firstChild.cloneNode(true), from = drawing.querySelectorAll("g *"), to = copy.querySelectorAll("*");
      to.forEach((node, k) => {
        const seen = getComputedStyle(from[k]);
        node.removeAttribute("class");
        node.setAttribute("style", names.map((n) => `${n}: ${seen.getPropertyValue(n)}`).join("; "));
      });
      copy.setAttribute("transform", `translate(${i * wide} 0)`);
      root.append(copy);
    });
    root.setAttribute("font-family", "sans-serif");
    return new XMLSerializer().serializeToString(root) + "\n";
  }

  Object.assign(Pocket, { still, el, svg, percent, Grid, curves, cloud });
})(window);
