/* What a reader does to the pocket companion: edits, streams, predictions, restore, and the link that holds all of
   it. No DOM in here; long work is generators (see edit.js). */
"use strict";
(function (scope) {
  const Pocket = (scope.Pocket = scope.Pocket || {});
  const { halves, Tokenizer, Model, Editor, Statement, cholesky, predict, spearman, represent } = Pocket;

  const BATCHES = [1, 5, 10, 20, 50, 100, 150, 300], SPREADS = ["linear_decay", "consecutive", "uniform"];
  const LAMBDAS = [0.1, 1, 3, 10, 30, 50, 100, 200, 300, 500, 1000, 3000];

  class Session {
    /* meta: the payload of the build (try_it.py); buffer: its numbers, float16. */
    constructor(meta, buffer) {
      const tensors = {};
      for (const [name, [offset, count]] of Object.entries(meta.tensors)) tensors[name] = halves(buffer, offset, count);
      this.meta = meta;
      this.model = new Model(meta.config, tensors);
      this.tokenizer = new Tokenizer(meta.tokenizer);
      this.words = new Set(meta.words);
      const D = meta.config.width, make = (prompt, answer) => new Statement(this.model, this.tokenizer, prompt, answer);
      this.facts = meta.facts.map((f, i) => ({
        ...f, id: i, start: this.tokenizer.encode(f.prompt), key: null, // key: the text whose last token is edited
        z: f.choices.map((_, c) => tensors.z.subarray((i * f.choices.length + c) * D, (i * f.choices.length + c + 1) * D)),
        before: make(f.prompt, f.old), after: f.choices.map((answer) => make(f.prompt, answer)),
        other: f.choices.map((answer) => make(f.paraphrase, answer)),
      }));
      this.untouched = meta.untouched.map(([prompt, answer]) => make(prompt, answer));
      this.settings = { ...meta.settings };
      this.tensors = tensors;
    }
    /* Second moments from their stored factors, and what lies below the edits for every fact: the rest of loading. */
    *prepare() {
      for (const f of this.facts) {
        f.key = this.model.text(f.start);
        yield;
      }
      const d = this.model.mlp, moments = new Map();
      for (const layer of this.meta.config.sites) {
        const packed = this.tensors[`moment.${layer}`], L = new Float64Array(d * d), C = new Float64Array(d * d);
        for (let i = 0, o = 0; i < d; i++, o += i) L.set(packed.subarray(o, o + i + 1), i * d);
        for (let i = 0; i < d; i++) {
          for (let j = 0; j <= i; j++) C[i * d + j] = Pocket.dot(L, i * d, L, j * d, j + 1);
          if (i % 32 === 0) yield;
        }
        moments.set(layer, C);
      }
      this.editor = new Editor(this.model, moments);
      this.runs = [];
      this.restore();
    }

    // -------------------------------------------------------------- state

    /* Back to the weights as loaded; what was measured stays as a finished run. Returns numbers that still differ. */
    restore() {
      this.model.restore();
      this.editor.reset();
      this.ops = this.ops?.length ? [...this.ops, "r"] : [];
      this.written = new Map(); // fact id -> {choice, holds, order}
      this.lost = this.untouched.map(() => false);
      this.run = null;
      this.probes = null;
      return this.model.changed();
    }
    /* f() on the weights as loaded. */
    asTrained(f) {
      const { model } = this, now = [...model.original.keys()].map((layer) => [layer, model.down(layer).slice()]);
      model.restore();
      try {
        return f();
      } finally {
        for (const [layer, W] of now) model.down(layer).set(W);
      }
    }
    get locked() {
      return this.written.size > 0; // layers cannot change once keys of some layers are in the history
    }
    keeps() {
      return [...this.written.values()].filter((w) => w.holds).length;
    }
    check(id, choice) {
      const fact = this.facts[id];
      if (!fact || !(choice in fact.choices)) throw new Error("This page has no target for that edit; pick another fact.");
      const had = this.written.get(id);
      if (had)
        throw new Error(`“${fact.prompt}” was edited already, to “${fact.choices[had.choice]}”. Pick another fact, or restore first.`);
      if (!this.settings.layers.length) throw new Error("No layer is chosen. Tick at least one layer to edit.");
      return { text: fact.key, z: fact.z[choice] };
    }

    // -------------------------------------------------------------- edits

    /* Write [[fact, choice], ...] as one batch. */
    *edit(pairs) {
      const ids = pairs.map(([id]) => id);
      if (new Set(ids).size < ids.length) throw new Error("A fact is named twice in one batch. Name every fact once.");
      const requests = pairs.map(([id, choice]) => this.check(id, choice));
      yield* this.editor.write(requests, this.settings);
      for (const [id, choice] of pairs) this.written.set(id, { choice, holds: false, order: this.written.size });
      this.probes = null;
    }
    /* Read all written edits and all untouched facts again. */
    *look() {
      for (const [id, w] of this.written) {
        w.holds = this.facts[id].after[w.choice].look().holds;
        yield;
      }
      for (let i = 0; i < this.untouched.length; i++) {
        this.lost[i] = !this.untouched[i].look().holds;
        yield;
      }
      const point = { n: this.written.size, kept: this.keeps(), untouched: this.lost.filter((x) => !x).length };
      if (!this.run) {
        this.run = { settings: { ...this.settings }, points: [] };
        this.runs.push(this.run);
      }
      this.run.settings = { ...this.settings };
      this.run.points.push(point);
      return point;
    }
    /* Facts that have not been edited yet, in the order of the page, each with its first choice. */
    waiting(n) {
      return this.facts.filter((f) => !this.written.has(f.id)).slice(0, n).map((f) => [f.id, 0]);
    }
    /* n more edits in batches; yields {point} after every reading, {written} after every other batch. */
    *stream(n) {
      const todo = this.waiting(n), { batch } = this.settings, every = Math.max(batch, 20);
      if (!todo.length) throw new Error("All facts of this page are edited. Restore the model to start again.");
      const before = this.written.size;
      try {
        for (let i = 0, seen = 0; i < todo.length; i += batch) {
          yield* this.edit(todo.slice(i, i + batch));
          const done = this.written.size - before;
          if (done - seen >= every || done === todo.length) {
            seen = done;
            yield { point: yield* this.look() };
          } else yield { written: done };
        }
      } finally { // also when it is stopped between two batches
        if (this.written.size > before) this.note("s", this.written.size - before);
      }
    }
    /* One batch that the reader has chosen, and what became of it. */
    *single(pairs) {
      yield* this.edit(pairs);
      this.note("e", pairs.map((p) => p.join(".")).join("+"));
      yield { point: yield* this.look() };
    }
    /* The same edits in one batch and in many, from the unedited model: how far apart the weights end. */
    *compare(n) {
      const { model, settings } = this, D = model.width, keep = new Map(), ends = [];
      const own = new Editor(model, this.editor.moments), todo = this.facts.slice(0, n);
      for (const layer of model.original.keys()) keep.set(layer, model.down(layer).slice());
      try {
        for (const batch of [n, settings.batch]) {
          model.restore();
          own.reset();
          for (let i = 0; i < n; i += batch) {
            yield* own.write(todo.slice(i, i + batch).map((f) => ({ text: f.key, z: f.z[0] })), settings);
            yield { compared: `${Math.min(i + batch, n)} of ${n}, in batches of ${batch}` };
          }
          ends.push(settings.layers.map((layer) => model.down(layer).slice()));
        }
      } finally {
        for (const [layer, W] of keep) model.down(layer).set(W);
      }
      return settings.layers.map((layer, l) => {
        const W = model.original.get(layer), [a, b] = [ends[0][l], ends[1][l]];
        let most = 0, size = 0, apart = 0, change = 0;
        for (let i = 0; i < a.length; i++) {
          most = Math.max(most, Math.abs(a[i] - b[i]));
          apart += (a[i] - b[i]) ** 2; size += a[i] ** 2; change += (a[i] - W[i]) ** 2;
        }
        return { layer, most: most / Math.sqrt(size), apart: Math.sqrt(apart / size), change: Math.sqrt(change / size) };
      });
    }

    // -------------------------------------------------------------- what else moves

    /* Before an edit: what the two predictors expect at every other fact, on the weights as they are now. */
    *expect(id) {
      const { layers } = this.settings, top = layers[layers.length - 1], others = this.others(id);
      if (!layers.length) throw new Error("No layer is chosen. Tick at least one layer to edit.");
      const signature = JSON.stringify([top, this.written.size]);
      if (this.probes?.signature !== signature) {
        const texts = [...this.facts.map((f) => f.key), ...this.untouched.map((s) => this.model.text(s.start))];
        this.probes = { signature, states: yield* represent(this.model, texts, top), logp: new Map() };
      }
      const L = yield* this.editor.factor(top, this.settings), { states } = this.probes;
      const found = predict(states[id], others.map((o) => states[o.place]), L, this.model.mlp);
      const rows = others.map((o, i) => ({ ...o, ...found[i], moved: null }));
      for (const row of rows) {
        row.before = row.statement.look();
        yield;
      }
      return rows;
    }
    /* After it: how far the log-probability of each fact's answer moved (nats per token). */
    *moved(rows) {
      for (const row of rows) {
        row.after = row.statement.look();
        row.moved = Math.abs(row.after.logp - row.before.logp);
        yield;
      }
      const moved = rows.map((r) => r.moved);
      return { whitened: spearman(rows.map((r) => r.whitened), moved), clare: spearman(rows.map((r) => r.clare), moved) };
    }
    /* All facts but one, as the model states them now: what an edit can move. */
    others(id) {
      const facts = this.facts.filter((f) => f.id !== id).map((f) => {
        const w = this.written.get(f.id);
        return { place: f.id, statement: w ? f.after[w.choice] : f.before };
      });
      return [...facts, ...this.untouched.map((statement, i) => ({ place: this.facts.length + i, statement }))];
    }

    // -------------------------------------------------------------- words and links

    /* Words of a prompt that the world does not have, with the nearest that it has. */
    unknown(prompt) {
      const found = prompt.match(/[\p{L}\p{N}]+/gu) || [];
      return [...new Set(found)].filter((w) => !this.words.has(w)).map((w) => ({ word: w, near: nearest(w, this.words) }));
    }
    /* The state as text: settings and everything that was done, in order. */
    link(more = {}) {
      const s = this.settings;
      const fields = { do: this.ops.join("~"), set: [s.layers.join(""), s.lam, +s.history, s.batch, SPREADS.indexOf(s.spread)].join(","), ...more };
      return Object.entries(fields).filter(([, v]) => v !== "" && v !== undefined && v !== null)
        .map(([k, v]) => `${k}=${encodeURIComponent(v).replace(/%2C/g, ",")}`).join("&");
    }
    /* One step of a link: note what was done, so that `replay` can do it again. */
    note(kind, value) {
      const s = this.settings;
      this.ops.push([kind + value, s.layers.join(""), s.lam, +s.history, s.batch, SPREADS.indexOf(s.spread)].join(","));
    }
    apply(list) {
      const [layers, lam, history, batch, spread] = list;
      const sites = this.meta.config.sites, chosen = [...String(layers)].map(Number);
      if (!chosen.length || chosen.some((l) => !sites.includes(l)) || !(lam > 0) || !BATCHES.includes(+batch) || !SPREADS[spread])
        throw new Error("This link does not fit the page: its settings are unknown here. Ask for a new link.");
      this.settings = { layers: chosen.sort(), lam: +lam, history: history === "1", batch: +batch, spread: SPREADS[spread] };
    }
    /* Do again what a link says; yields like `stream`. */
    *replay(fields) {
      for (const op of (fields.do || "").split("~").filter(Boolean)) {
        if (op === "r") { this.restore(); continue; }
        const [what, ...list] = op.split(","), kind = what[0], value = what.slice(1);
        this.apply(list);
        if (kind === "s") yield* this.stream(+value);
        else if (kind === "e") yield* this.single(value.split("+").map((p) => p.split(".").map(Number)));
        else throw new Error("This link does not fit the page: it names an unknown step. Ask for a new link.");
      }
      if (fields.set) this.apply(fields.set.split(","));
    }
  }

  function nearest(word, words) {
    const distance = (a, b) => {
      let row = Array.from({ length: b.length + 1 }, (_, j) => j);
      for (let i = 1; i <= a.length; i++) {
        const next = [i];
        for (let j = 1; j <= b.length; j++)
          next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1].toLowerCase() === b[j - 1].toLowerCase() ? 0 : 1));
        row = next;
      }
      return row[b.length];
    };
    let best = null, least = Math.max(2, Math.ceil(word.length / 3)) + 1;
    for (const w of words) {
      const d = Math.abs(w.length - word.length) < least ? distance(word, w) : Infinity;
      if (d < least) [best, least] = [w, d];
    }
    return best;
  }

  const fields = (hash) => Object.fromEntries(new URLSearchParams(hash.replace(/^#/, "").replace(/\+/g, "%2B")));

  Object.assign(Pocket, { Session, BATCHES, LAMBDAS, SPREADS, nearest, fields });
})(typeof self === "undefined" ? globalThis : self);
