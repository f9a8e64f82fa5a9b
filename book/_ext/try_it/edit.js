/* Editing in the browser: MEMIT's loop over the layers, statements and what became of them, predictors. No DOM in here.
   Long work is written as generators that yield often; `Pocket.drive` runs them in slices. */
"use strict";
(function (scope) {
  const Pocket = (scope.Pocket = scope.Pocket || {});
  const { cholesky, substitute, addGram, dot, product, logSoftmax } = Pocket;

  /* Run a generator in slices of `slice` ms; between them the page draws and listens. It can be stopped where it yields
     news, that is between batches and never inside one; the value is then STOPPED. */
  const STOPPED = Symbol("stopped");
  const wake = [];
  const channel = typeof MessageChannel === "undefined" ? null : new MessageChannel();
  if (channel) channel.port1.onmessage = () => wake.shift()?.();
  const breath = () => new Promise((done) => {
    if (!channel) return setTimeout(done, 0);
    wake.push(done);
    channel.port2.postMessage(0);
  });
  async function drive(work, { slice = 12, onYield = null, stopped = () => false } = {}) {
    for (let end = performance.now() + slice; ; ) {
      const step = work.next();
      if (step.done) return step.value;
      if (step.value !== undefined) {
        if (stopped()) { work.return(); return STOPPED; }
        if (onYield) onYield(step.value);
      }
      if (performance.now() < end) continue;
      await breath();
      end = performance.now() + slice;
    }
  }

  /* MEMIT with and without history: per layer Delta (lam C0 + S + K K^T) = R K^T, S the keys of earlier batches.
     moments: layer -> C0 (d, d), lower triangle. */
  class Editor {
    constructor(model, moments) {
      Object.assign(this, { model, moments, d: model.mlp });
      this.reset();
    }
    reset() {
      this.sums = new Map(); // layer -> sum of k k^T over everything written
    }
    /* Factor of lam C0 + S (with history) + the keys' own sum. */
    *factor(layer, { lam, history }, keys = []) {
      const C = this.moments.get(layer).map((x) => lam * x), S = history && this.sums.get(layer);
      if (S) for (let i = 0; i < C.length; i++) C[i] += S[i];
      yield* cholesky(addGram(C, keys, this.d), this.d);
      return C;
    }
    /* Write a batch: requests {text, z}; settings {layers, lam, history, spread}. Returns what was read and written. */
    *write(requests, settings) {
      const { model, d } = this, { layers } = settings, top = layers[layers.length - 1], D = model.width;
      const residuals = [], record = [];
      for (let i = 0; i < layers.length; i++) {
        const layer = layers[i], keys = [], R = new Float64Array(requests.length * D);
        for (let n = 0; n < requests.length; n++) {
          const seen = model.run(requests[n].text, top);
          keys.push(seen.keys[layer]);
          for (let j = 0; j < D; j++) R[n * D + j] = requests[n].z[j] - seen.out[j];
          yield;
        }
        residuals.push(R);
        const share = spread(residuals, settings.spread || "linear_decay", layers.length - i);
        const L = yield* this.factor(layer, settings, keys);
        const solved = new Float64Array(keys.length * d); // rows: C^-1 k
        for (let n = 0; n < keys.length; n++) {
          solved.set(substitute(L, d, keys[n].slice()), n * d);
          yield;
        }
        const Delta = outer(share, solved, keys.length, D, d), W = model.down(layer);
        for (let j = 0; j < W.length; j++) W[j] = Math.fround(W[j] + Delta[j]);
        this.sums.set(layer, addGram(this.sums.get(layer) || new Float64Array(d * d), keys, d));
        record.push({ layer, keys, Delta });
        yield;
      }
      return record;
    }
  }

  /* The part of the residual that the layer at hand writes; residuals as measured before each layer so far. */
  function spread(residuals, name, left) {
    const R = residuals[residuals.length - 1], before = residuals[residuals.length - 2];
    if (name === "linear_decay") return R.map((x) => x / left);
    if (name === "uniform" || !before) return R.slice();
    const p = dot(R, 0, before, 0, R.length) / dot(before, 0, before, 0, before.length) || 0;
    return R.map((x, i) => x - p * before[i]); // "consecutive"
  }

  /* Sum over facts of r s^T: (D, d) from rows R (n, D), S (n, d). */
  function outer(R, S, n, D, d) {
    const out = new Float64Array(D * d);
    for (let f = 0; f < n; f++)
      for (let i = 0; i < D; i++)
        for (let j = 0, o = i * d, r = R[f * D + i], s = f * d; j < d; j++) out[o + j] += r * S[s + j];
    return out;
  }

  /* A prompt with its answer: how likely the answer is, and whether the model would give exactly it. */
  class Statement {
    constructor(model, tokenizer, prompt, answer) {
      const start = tokenizer.encode(prompt), said = tokenizer.encode(` ${answer}.`);
      Object.assign(this, { prompt, answer, start, said, model, made: null });
    }
    get text() {
      return (this.made ??= this.model.text([...this.start, ...this.said.slice(0, -1)]));
    }
    /* {holds: greedy generation gives "answer.", logp: mean log-probability of its tokens, the full stop left out} */
    look() {
      const n = this.start.length, want = this.said.map((_, i) => n - 1 + i), { model } = this;
      const logits = model.head(model.run(this.text, undefined, want).out, want.length);
      let holds = true, logp = 0;
      this.said.forEach((token, r) => {
        const row = logits.subarray(r * model.vocab, (r + 1) * model.vocab);
        for (const x of row) if (x > row[token]) { holds = false; break; }
        if (r < this.said.length - 1 || r === 0) logp += logSoftmax(row)[token];
      });
      return { holds, logp: logp / Math.max(1, this.said.length - 1) };
    }
  }

  /* The likeliest next tokens and a greedy continuation of a prompt. */
  function ask(model, tokenizer, prompt, { top = 6, length = 8 } = {}) {
    const ids = tokenizer.encode(prompt);
    if (!ids.length) throw new Error("The prompt is empty.");
    const next = (all) => model.head(model.run(model.text(all)).out, 1);
    const p = logSoftmax(next(ids)).map(Math.exp);
    const best = Array.from(p.keys()).sort((a, b) => p[b] - p[a]).slice(0, top);
    const said = [];
    while (said.length < length) {
      const logits = next([...ids, ...said]);
      let token = 0;
      for (let i = 1; i < logits.length; i++) if (logits[i] > logits[token]) token = i;
      if (tokenizer.text[token].startsWith("<|")) break;
      said.push(token);
      if (tokenizer.text[token].trim() === ".") break;
    }
    return { next: best.map((i) => ({ token: tokenizer.text[i], p: p[i] })), continuation: tokenizer.decode(said) };
  }

  /* Key and state of prompts at a layer, on the current weights: what the predictors read. */
  function* represent(model, texts, layer) {
    const found = [];
    for (const text of texts) {
      const { keys, out } = model.run(text, layer);
      found.push({ key: keys[layer], state: out });
      yield;
    }
    return found;
  }

  /* Before an edit: the share of its residual that reaches each probe, |k M^-1 k'| / (1 + k M^-1 k), and CLaRE's
     cosine of states. L: factor of M. */
  function predict(edit, probes, L, d) {
    const p = substitute(L, d, edit.key.slice()), energy = 1 + dot(p, 0, edit.key, 0, d);
    const norm = (x) => Math.sqrt(dot(x, 0, x, 0, x.length)), length = norm(edit.state);
    return probes.map(({ key, state }) => ({
      whitened: Math.abs(dot(p, 0, key, 0, d)) / energy,
      clare: dot(edit.state, 0, state, 0, state.length) / (length * norm(state)),
    }));
  }

  /* Spearman's rank correlation; NaN where one side is constant. */
  function spearman(a, b) {
    const ranks = (x) => {
      const order = Array.from(x.keys()).sort((i, j) => x[i] - x[j]), out = new Float64Array(x.length);
      for (let i = 0; i < order.length; ) {
        let j = i;
        while (j < order.length && x[order[j]] === x[order[i]]) j++;
        for (let k = i; k < j; k++) out[order[k]] = (i + j - 1) / 2;
        i = j;
      }
      return out;
    };
    const x = ranks(a), y = ranks(b), mean = (x.length - 1) / 2;
    let xy = 0, xx = 0, yy = 0;
    for (let i = 0; i < x.length; i++) {
      xy += (x[i] - mean) * (y[i] - mean); xx += (x[i] - mean) ** 2; yy += (y[i] - mean) ** 2;
    }
    return xy / Math.sqrt(xx * yy);
  }

  Object.assign(Pocket, { drive, STOPPED, Editor, Statement, ask, represent, predict, spearman, spread, outer, product });
})(typeof self === "undefined" ? globalThis : self);
