"""Record two training steps of MEND, MALMEN or HORSE in the format of the golden recordings, with plain torch.

A second implementation, float32, that shares nothing with `editkit.methods.hypernet`: one autograd graph from the
networks through `torch.linalg.solve` to <shift, weight gradient>. Test material for the adapter in
`editkit.press.conformance`.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax
from transformers.pytorch_utils import Conv1D

EPS = torch.finfo(torch.float32).eps


def record(folder, lm, method, modules, steps, token="ans"):
    """Write case.json, arrays.npz and the model below `folder`.

    steps: for each step lists of (prompt, answer): {"edit": ..., "equiv": ..., "unrel": ...}, in batches of two.
    """
    lm.model.save_pretrained(folder / "models" / "tiny")
    lm.tokenizer.save_pretrained(folder / "models" / "tiny")
    editor = {"rank": 3, "n_blocks": 2, "lr": 0.01, "meta_lr": 1e-3, "loc_coef": 1, "max_grad_norm": 1,
              "batch_size": 3, "token": token}  # fmt: skip
    made = _Recorder(lm, method, modules, editor)
    for number, pairs in enumerate(steps):
        made.step(number, {k: made.encode(v) for k, v in pairs.items()})
    data = {"method": method, "model": "tiny", "edit_modules": modules, "config": {"editor": editor},
            "net_keys": list(made.nets), **made.told}  # fmt: skip
    (folder / "case.json").write_text(json.dumps(data))
    np.savez(folder / "arrays.npz", **{k: v.numpy() for k, v in made.arrays.items()})


class _Recorder:
    def __init__(self, lm, method, modules, editor):
        self.lm, self.method, self.editor, self.arrays, self.told = lm, method, editor, {}, {}
        found = dict(lm.model.named_modules())
        self.modules = [found[name] for name in modules]
        self.shapes = [
            tuple(m.weight.shape) if isinstance(m, Conv1D) else tuple(m.weight.shape)[::-1]
            for m in self.modules
        ]
        torch.manual_seed(3)
        self.nets, self.index = {}, []
        for shape in self.shapes:
            self.index.append(sum(s == shape for s in self.shapes[: len(self.index)]))
        for shape in dict.fromkeys(self.shapes):
            d, n = sum(shape), self.shapes.count(shape)
            net = {"normalizer.n": torch.zeros(1)}
            net |= {f"normalizer.{k}": torch.zeros(d) for k in ("mean", "var", "std")}
            for b in range(2):
                net |= {f"blocks.{b}.A": torch.randn(d, 3), f"blocks.{b}.B": 0.1 * torch.randn(3, d)}
                net |= {
                    f"blocks.{b}.bias": 0.1 * torch.randn(d),
                    f"blocks.{b}.scale.weight": 1 + 0.1 * torch.randn(n, d),
                }
                net |= {f"blocks.{b}.shift.weight": 0.1 * torch.randn(n, d)}
            net |= {"lr.weight": 0.01 + 0.001 * torch.randn(n, 1), "lamda.weight": 0.1 * torch.randn(n, 1)}
            self.nets[str(shape)] = {
                k: v if "normalizer" in k else v.requires_grad_() for k, v in net.items()
            }
        self.save("net0:", lambda key: True)
        self.adam = torch.optim.Adam(self.parameters().values(), lr=editor["meta_lr"])

    def parameters(self):
        return {
            f"{s}.{k}": v for s, net in self.nets.items() for k, v in net.items() if "normalizer" not in k
        }

    def save(self, prefix, wanted):
        for shape, net in self.nets.items():
            self.arrays |= {f"{prefix}{shape}.{k}": v.detach().clone() for k, v in net.items() if wanted(k)}

    def encode(self, pairs):
        tok, rows = self.lm.tokenizer, []
        for prompt, answer in pairs:
            head, tail = (tok(x, add_special_tokens=False)["input_ids"] for x in (prompt, " " + answer))
            rows.append((head + tail[:-1], [-100] * (len(head) - 1) + tail))
        rows.sort(key=lambda r: -len(r[0]))
        batches = []
        for part in (rows[k : k + 2] for k in range(0, len(rows), 2)):
            wide = len(part[0][0])
            pad = [wide - len(r[0]) for r in part]
            ids = [r[0] + [tok.pad_token_id] * k for r, k in zip(part, pad, strict=True)]
            mask = [[1] * (wide - k) + [0] * k for k in pad]
            labels = [r[1] + [-100] * k for r, k in zip(part, pad, strict=True)]
            batches.append(tuple(map(torch.tensor, (ids, mask, labels))))
        return batches

    def logits(self, batch):
        ids, mask, labels = batch
        return self.lm.model(input_ids=ids, attention_mask=mask).logits[labels != -100]

    def step(self, number, batches):
        s, told = f"s{number}", {"losses": []}
        for kind, found in batches.items():
            for j, (ids, mask, labels) in enumerate(found):
                for name, x in (("input_ids", ids), ("attention_mask", mask), ("labels", labels)):
                    self.arrays[f"{s}_{kind}_tuples_{j}_{name}"] = x
        keys, grads, counts = self.cache(batches["edit"], told)
        self.save(f"{s}_after_cache:", lambda key: "normalizer" in key)
        shifts = self.shifts(s, keys, grads)
        weights = [m.weight for m in self.modules]
        before = [log_softmax(self.logits(b), -1).detach() for b in batches["unrel"]]
        start = [w.detach().clone() for w in weights]
        turned = [S if isinstance(m, Conv1D) else S.T for S, m in zip(shifts, self.modules, strict=True)]
        with torch.no_grad():
            for w, S in zip(weights, turned, strict=True):
                w.add_(S)
        losses = [
            (1, lambda b=b: cross_entropy(self.logits(b), b[2][b[2] != -100])) for b in batches["equiv"]
        ]
        for b, old in zip(batches["unrel"], before, strict=True):
            if self.method == "horse":
                losses.append((1, lambda b=b: cross_entropy(self.logits(b), b[2][b[2] != -100])))
            else:
                kl = lambda b=b, old=old: (old.exp() * (old - log_softmax(self.logits(b), -1))).sum(-1).mean()  # noqa: E731
                losses.append((self.editor["loc_coef"], kl))
        total = [torch.zeros_like(w) for w in weights]
        for factor, loss_of in losses:
            loss = loss_of()
            told["losses"].append(["loss", float(loss.detach())])
            total = [t + factor * g for t, g in zip(total, torch.autograd.grad(loss, weights), strict=True)]
        with torch.no_grad():
            for w, old in zip(weights, start, strict=True):
                w.copy_(old)
        self.adam.zero_grad()
        sum((S * G).sum() for S, G in zip(turned, total, strict=True)).backward()
        named = self.parameters()
        for i in range(len(self.modules)):
            found = {"keys": keys[i], "values_grad": grads[i], "rows_per_batch": counts,
                     "param_shift": shifts[i].detach(), "weight_grad": total[i]}  # fmt: skip
            self.arrays |= {f"{s}_m{i}_{name}": value for name, value in found.items()}
        self.arrays |= {
            f"{s}_netgrad_preclip:{k}": p.grad.clone() for k, p in named.items() if p.grad is not None
        }
        told["params_without_grad"] = [k for k, p in named.items() if p.grad is None]
        told["grad_norm_preclip"] = float(torch.nn.utils.clip_grad_norm_(named.values(), 1))
        self.adam.step()
        self.save(f"{s}_net_after:", lambda key: "normalizer" not in key)
        self.told[f"step{number}"] = told

    def cache(self, batches, told):
        keys, grads, counts = [[] for _ in self.modules], [[] for _ in self.modules], []
        for batch in batches:
            seen = []
            keep = lambda module, given, out, seen=seen: seen.append((given[0].detach(), out))  # noqa: E731
            hooks = [m.register_forward_hook(keep) for m in self.modules]
            loss = cross_entropy(self.logits(batch), batch[2][batch[2] != -100])
            for hook in hooks:
                hook.remove()
            told["losses"].append(["ce", float(loss.detach())])
            g = torch.autograd.grad(loss, [o for _, o in seen])
            rows = batch[2] != -100 if self.editor["token"] == "ans" else batch[1].bool()
            counts.append(int(rows.sum()))
            for i, shape in enumerate(self.shapes):
                keys[i].append(seen[i][0][rows])
                grads[i].append(g[i][rows])
                self.update(self.nets[str(shape)], torch.cat([keys[i][-1], grads[i][-1]], -1))
        return [torch.cat(k) for k in keys], [torch.cat(g) for g in grads], torch.tensor(counts)

    @staticmethod
    def update(net, x):
        n, old = len(x), net["normalizer.n"].clone()
        gap = x.mean(0) - net["normalizer.mean"]
        net["normalizer.n"] += n
        net["normalizer.mean"] += gap * n / net["normalizer.n"]
        net["normalizer.var"] += n * x.var(0) + gap**2 * old * n / net["normalizer.n"]
        net["normalizer.std"] = (net["normalizer.var"] / (net["normalizer.n"] - 1 + EPS)).sqrt()

    def shifts(self, s, keys, grads):
        out, previous = [], None
        for i, shape in enumerate(self.shapes):
            net, k = self.nets[str(shape)], self.index[i]
            x = (torch.cat([keys[i], grads[i]], -1) - net["normalizer.mean"]) / (net["normalizer.std"] + EPS)
            for b in range(2):
                a = torch.relu(x @ net[f"blocks.{b}.A"] @ net[f"blocks.{b}.B"] + net[f"blocks.{b}.bias"])
                x = x + net[f"blocks.{b}.scale.weight"][k] * a + net[f"blocks.{b}.shift.weight"][k]
            u, g = x.split(shape, -1)
            eta = net["lr.weight"][k]
            if self.method == "mend":
                out.append(-eta * u.T @ g)
                continue
            R = -eta * (keys[i] * u).sum(-1, keepdim=True) * g
            lamda = net["lamda.weight"][k]
            if self.method == "horse":
                lamda = lamda.detach()
                self.arrays[f"{s}_m{i}_value_diffs_before"] = R.detach()
                raw = R.detach()
                if previous is not None:
                    P, gp = previous
                    c = (R * P).sum() / (P * P).sum()
                    self.arrays[f"{s}_m{i}_projection_coeff"] = c.detach()
                    R = R - c * gp
                    self.arrays[f"{s}_m{i}_value_diffs_after"] = R.detach()
                previous = raw, grads[i]
            else:
                self.arrays[f"{s}_m{i}_value_diffs"] = R.detach()
            A = keys[i].T @ keys[i] + lamda.exp() * torch.eye(shape[0])
            out.append(torch.linalg.solve(A, keys[i].T @ R))
        return out
