/* The pocket companion in a browser: tokenizer, forward pass, second moments, MEMIT's solve. No DOM in here.
   Numbers are float64 except the weights, which are rounded to float32 when they are written, as in editkit.
   Symbols: D width, M width of the MLP (key width d), T tokens; matrices are rows, W (out, in). */
"use strict";
(function (scope) {
  const Pocket = (scope.Pocket = scope.Pocket || {});

  // ---------------------------------------------------------------- reading the payload

  function halves(buffer, offset, count) {
    /* float16 (little-endian) -> Float64Array */
    const view = new DataView(buffer, offset, 2 * count), out = new Float64Array(count);
    for (let i = 0; i < count; i++) {
      const bits = view.getUint16(2 * i, true), sign = bits & 0x8000 ? -1 : 1;
      const exponent = (bits >> 10) & 31, fraction = bits & 1023;
      out[i] = sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24);
    }
    return out;
  }

  // ---------------------------------------------------------------- tokenizer: byte-level BPE

  const PIECES = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu;

  class Tokenizer {
    constructor({ vocab, merges }) {
      this.vocab = new Map(vocab.map((piece, id) => [piece, id]));
      this.rank = new Map(merges.map((pair, i) => [pair, i]));
      this.known = new Map();
      this.letter = [];
      for (let b = 0, extra = 0; b < 256; b++) {
        const printable = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        this.letter.push(String.fromCodePoint(printable ? b : 256 + extra++));
      }
      const byte = new Map(this.letter.map((c, b) => [c, b])), utf8 = new TextDecoder();
      this.text = vocab.map((p) => utf8.decode(Uint8Array.from([...p], (c) => byte.get(c) ?? 63)));
    }
    word(piece) {
      if (this.known.has(piece)) return this.known.get(piece);
      let parts = Array.from(new TextEncoder().encode(piece), (b) => this.letter[b]);
      while (parts.length > 1) {
        let best = Infinity, at = -1;
        for (let i = 0; i + 1 < parts.length; i++) {
          const rank = this.rank.get(parts[i] + " " + parts[i + 1]);
          if (rank < best) [best, at] = [rank, i];
        }
        if (at < 0) break;
        parts.splice(at, 2, parts[at] + parts[at + 1]);
      }
      const ids = parts.map((p) => this.vocab.get(p));
      this.known.set(piece, ids);
      return ids;
    }
    encode(text) {
      const ids = [];
      for (const [piece] of (/^\s/.test(text) ? text : " " + text).matchAll(PIECES)) ids.push(...this.word(piece));
      return ids;
    }
    decode(ids) {
      return Array.from(ids, (i) => this.text[i]).join("");
    }
  }

  // ---------------------------------------------------------------- linear algebra

  /* Y (T, N) = X (T, K) W^T + bias for W (N, K); two rows of X and four of W at a time keep sums in registers. */
  function product(Y, X, W, T, K, N, bias) {
    for (let t = 0; t < T; t += 2) {
      const two = t + 1 < T, a = t * K, b = two ? a + K : a;
      for (let n = 0; n < N; n += 4) {
        const w0 = n * K, w1 = w0 + K, w2 = w1 + K, w3 = w2 + K;
        let p0 = 0, p1 = 0, p2 = 0, p3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
        for (let k = 0; k < K; k++) {
          const x = X[a + k], y = X[b + k], u0 = W[w0 + k], u1 = W[w1 + k], u2 = W[w2 + k], u3 = W[w3 + k];
          p0 += x * u0; p1 += x * u1; p2 += x * u2; p3 += x * u3;
          q0 += y * u0; q1 += y * u1; q2 += y * u2; q3 += y * u3;
        }
        const o = t * N + n;
        Y[o] = p0; Y[o + 1] = p1; Y[o + 2] = p2; Y[o + 3] = p3;
        if (two) { Y[o + N] = q0; Y[o + N + 1] = q1; Y[o + N + 2] = q2; Y[o + N + 3] = q3; }
      }
    }
    if (bias) for (let t = 0, o = 0; t < T; t++) for (let n = 0; n < N; n++, o++) Y[o] += bias[n];
    return Y;
  }

  const dot = (a, i, b, j, n) => {
    let s0 = 0, s1 = 0, s2 = 0, s3 = 0, k = 0;
    for (; k + 3 < n; k += 4) {
      s0 += a[i + k] * b[j + k]; s1 += a[i + k + 1] * b[j + k + 1];
      s2 += a[i + k + 2] * b[j + k + 2]; s3 += a[i + k + 3] * b[j + k + 3];
    }
    for (; k < n; k++) s0 += a[i + k] * b[j + k];
    return s0 + s1 + (s2 + s3);
  };

  /* Lower Cholesky factor of C (d, d), in place, a few rows at a time: yields so that a page can breathe. */
  function* cholesky(C, d) {
    for (let i = 0; i < d; i++) {
      for (let j = 0; j < i; j++) C[i * d + j] = (C[i * d + j] - dot(C, i * d, C, j * d, j)) / C[j * d + j];
      const left = C[i * d + i] - dot(C, i * d, C, i * d, i);
      if (!(left > 0)) throw new Error("The system of this edit is singular. Move the slider λ to the right.");
      C[i * d + i] = Math.sqrt(left);
      if (i % 16 === 15) yield;
    }
    return C;
  }

  /* x <- C^-1 x for the factor L of C. */
  function substitute(L, d, x) {
    for (let i = 0; i < d; i++) x[i] = (x[i] - dot(L, i * d, x, 0, i)) / L[i * d + i];
    for (let i = d - 1; i >= 0; i--) {
      const v = (x[i] /= L[i * d + i]);
      for (let j = 0; j < i; j++) x[j] -= v * L[i * d + j];
    }
    return x;
  }

  /* G += sum over keys of k k^T, lower triangle only. */
  function addGram(G, keys, d) {
    for (const k of keys)
      for (let i = 0; i < d; i++) {
        const v = k[i], o = i * d;
        for (let j = 0; j <= i; j++) G[o + j] += v * k[j];
      }
    return G;
  }

  // ---------------------------------------------------------------- the model

  class Model {
    constructor(config, tensors) {
      Object.assign(this, config); // layers, width, mlp, heads, vocab, eps, theta
      this.w = tensors;
      this.first = config.sites[0]; // nothing below the down projection of this block is ever written
      this.original = new Map(config.sites.map((l) => [l, this.down(l).slice()]));
      const half = this.width / this.heads / 2;
      this.cos = new Float64Array(config.positions * half);
      this.sin = new Float64Array(config.positions * half);
      for (let t = 0; t < config.positions; t++)
        for (let i = 0; i < half; i++) {
          const angle = t / this.theta ** (i / half);
          this.cos[t * half + i] = Math.cos(angle);
          this.sin[t * half + i] = Math.sin(angle);
        }
    }
    t(layer, name) {
      return this.w[`model.layers.${layer}.${name}`];
    }
    down(layer) {
      return this.t(layer, "mlp.down_proj.weight");
    }
    restore() {
      for (const [layer, W] of this.original) this.down(layer).set(W);
    }
    /* Numbers that differ from the model as loaded. */
    changed() {
      let n = 0;
      for (const [layer, W] of this.original) {
        const now = this.down(layer);
        for (let i = 0; i < W.length; i++) if (!Object.is(W[i], now[i])) n++;
      }
      return n;
    }
    norm(h, T, weight) {
      const D = this.width, out = new Float64Array(T * D);
      for (let t = 0; t < T; t++) {
        const scale = 1 / Math.sqrt(dot(h, t * D, h, t * D, D) / D + this.eps);
        for (let i = 0; i < D; i++) out[t * D + i] = h[t * D + i] * scale * weight[i];
      }
      return out;
    }
    rotate(x, T, places) {
      const D = this.width, size = D / this.heads, half = size / 2;
      for (let t = 0; t < T; t++)
        for (let o = t * D, p = places[t] * half; o < (t + 1) * D; o += size)
          for (let i = 0; i < half; i++) {
            const a = x[o + i], b = x[o + i + half], c = this.cos[p + i], s = this.sin[p + i];
            x[o + i] = a * c - b * s;
            x[o + i + half] = b * c + a * s;
          }
      return x;
    }
    /* Attention of block `layer` on h (T, D), for the query rows `rows` only; returns h[rows] + attention. */
    attend(layer, h, T, rows) {
      const D = this.width, size = D / this.heads, R = rows.length;
      const x = this.norm(h, T, this.t(layer, "input_layernorm.weight"));
      const all = Array.from({ length: T }, (_, t) => t);
      const map = (name, from, n) => product(new Float64Array(n * D), from, this.t(layer, `self_attn.${name}_proj.weight`),
        n, D, D, this.t(layer, `self_attn.${name}_proj.bias`));
      const k = this.rotate(map("k", x, T), T, all), v = map("v", x, T);
      const q = this.rotate(map("q", pickRows(x, rows, D), R), R, rows);
      const mixed = new Float64Array(R * D), weight = new Float64Array(T);
      for (let r = 0; r < R; r++)
        for (let o = 0; o < D; o += size) {
          let top = -Infinity, sum = 0;
          for (let t = 0; t <= rows[r]; t++) {
            weight[t] = dot(q, r * D + o, k, t * D + o, size) / Math.sqrt(size);
            if (weight[t] > top) top = weight[t];
          }
          for (let t = 0; t <= rows[r]; t++) sum += weight[t] = Math.exp(weight[t] - top);
          for (let t = 0; t <= rows[r]; t++)
            for (let i = 0, s = weight[t] / sum; i < size; i++) mixed[r * D + o + i] += s * v[t * D + o + i];
        }
      const out = product(new Float64Array(R * D), mixed, this.t(layer, "self_attn.o_proj.weight"), R, D, D);
      for (let r = 0; r < R; r++) for (let i = 0; i < D; i++) out[r * D + i] += h[rows[r] * D + i];
      return out;
    }
    /* Keys (R, M) of block `layer`: the input of its down projection. */
    keys(layer, h, R) {
      const x = this.norm(h, R, this.t(layer, "post_attention_layernorm.weight")), D = this.width, M = this.mlp;
      const gate = product(new Float64Array(R * M), x, this.t(layer, "mlp.gate_proj.weight"), R, D, M);
      const up = product(new Float64Array(R * M), x, this.t(layer, "mlp.up_proj.weight"), R, D, M);
      for (let i = 0; i < gate.length; i++) gate[i] = (gate[i] / (1 + Math.exp(-gate[i]))) * up[i];
      return gate;
    }
    addDown(layer, h, key, R) {
      const y = product(new Float64Array(R * this.width), key, this.down(layer), R, this.mlp, this.width);
      for (let i = 0; i < y.length; i++) y[i] += h[i];
      return y;
    }
    /* What lies below the first matrix that edits may write; computed once per text. */
    text(ids) {
      if (!ids.length) throw new Error("The text is empty.");
      if (ids.length > this.positions) throw new Error(`The text is too long: ${ids.length} tokens of at most ${this.positions}.`);
      const D = this.width, T = ids.length, all = Array.from(ids, (_, t) => t), embedding = this.w["model.embed_tokens.weight"];
      let h = new Float64Array(T * D);
      ids.forEach((id, t) => h.set(embedding.subarray(id * D, id * D + D), t * D));
      for (let layer = 0; layer < this.first; layer++) {
        h = this.attend(layer, h, T, all);
        h = this.addDown(layer, h, this.keys(layer, h, T), T);
      }
      h = this.attend(this.first, h, T, all);
      return { ids, T, h, key: this.keys(this.first, h, T) };
    }
    /* From a text to the output (R, D) of block `top` (default: the last) at the rows `want` (default: the last
       token). keys: block -> key (M) at the last of these rows. */
    run(text, top = this.layers - 1, want = [text.T - 1]) {
      const { T } = text, all = Array.from({ length: T }, (_, t) => t), keys = {}, M = this.mlp, end = want[want.length - 1];
      let h = text.h;
      for (let layer = this.first; layer <= top; layer++) {
        const rows = layer === top ? want : all, R = rows.length;
        let key;
        if (layer === this.first) {
          key = pickRows(text.key, rows, M);
          h = pickRows(h, rows, this.width);
        } else {
          h = this.attend(layer, h, T, rows);
          key = this.keys(layer, h, R);
        }
        const at = layer === top ? R - 1 : end;
        keys[layer] = key.slice(at * M, (at + 1) * M);
        h = this.addDown(layer, h, key, R);
      }
      return { out: h, keys };
    }
    /* Logits (R, vocabulary) of final states (R, D). */
    head(h, R) {
      const x = this.norm(h, R, this.w["model.norm.weight"]);
      return product(new Float64Array(R * this.vocab), x, this.w["model.embed_tokens.weight"], R, this.width, this.vocab);
    }
  }

  function pickRows(x, rows, n) {
    if (rows.length * n === x.length) return x;
    const out = new Float64Array(rows.length * n);
    rows.forEach((t, r) => out.set(x.subarray(t * n, t * n + n), r * n));
    return out;
  }

  function logSoftmax(logits) {
    let top = -Infinity, sum = 0;
    for (const x of logits) if (x > top) top = x;
    for (const x of logits) sum += Math.exp(x - top);
    const shift = top + Math.log(sum);
    return logits.map((x) => x - shift);
  }

  Object.assign(Pocket, { halves, Tokenizer, Model, product, dot, cholesky, substitute, addGram, logSoftmax });
})(typeof self === "undefined" ? globalThis : self);
