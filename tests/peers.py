"""The peers' samplers once more, position by position in plain Python: what test_compat.py holds compat against.

`logits_of(ids [B, T], real=None, sigma=None)` gives logits [B, T, V]. Noise comes from torch's global generator, in the
shapes and in the order in which the peers draw it. Every function yields the state [B, T] after each step, and takes
the state before the first, padded on the left, with `start` the first new column.
"""

import math

import torch

INF = float("inf")


def argmax(values):
    """Lowest index of the largest."""
    values = values.tolist()
    return values.index(max(values))


def deal(count, steps):
    """`count` cards dealt to `steps` players, one after the other."""
    hands = [0] * steps
    for card in range(count):
        hands[card % steps] += 1
    return hands


def guided(logits_of, x, hidden, scale):
    """hidden: bool [B, T], what the unconditional pass sees masked; at scale 0 one plain pass."""
    if not scale:
        return logits_of(x[0])
    ids, mask = x
    blind = ids.clone()
    for b, i in hidden.nonzero().tolist():
        blind[b, i] = mask
    both = logits_of(torch.cat((ids, blind)))
    c, u = both[: len(ids)], both[len(ids) :]
    return u + (scale + 1) * (c - u)


def noised(row, uniform, temperature):
    """Gumbel-max in float64."""
    return row.double().exp() / (-uniform.log()) ** temperature


def llada(logits_of, x, start, mask, *, steps, block, temperature, cfg, rule):
    B, T = x.shape
    prompt = x != mask
    per_block = steps // ((T - start) // block)
    for first in range(start, T, block):
        hands = [deal(sum(v == mask for v in row[first : first + block]), per_block) for row in x.tolist()]
        for step in range(per_block):
            logits = guided(logits_of, (x, mask), prompt, cfg)
            if temperature:
                uniform = torch.rand(logits.shape, dtype=torch.float64)
            if rule == "random":
                draws = torch.rand(B, T)
            new = x.clone()
            for b in range(B):
                tokens, scores = [], []
                for i in range(T):
                    row = logits[b, i]
                    token = argmax(noised(row, uniform[b, i], temperature) if temperature else row)
                    score = draws[b, i] if rule == "random" else row.softmax(-1)[token]
                    if x[b, i] != mask or i >= first + block:
                        score = torch.full_like(score, -INF)
                    tokens.append(token)
                    scores.append(score)
                for i in torch.stack(scores).topk(hands[b][step]).indices.tolist():
                    if x[b, i] == mask:
                        new[b, i] = tokens[i]
            x = new
            yield x


def dream_tokens(rows, temperature, top_p, top_k, rule):
    """A token and a confidence for each of the rows [V]; also whether the draw was given up."""
    probs = []
    for row in rows:
        row = row / temperature if temperature else row
        lowest = torch.finfo(row.dtype).min
        if top_p is not None and top_p < 1:
            order = row.sort(descending=True).indices.tolist()
            mass = row[order].softmax(-1).cumsum(-1).tolist()
            bound = float(torch.tensor(top_p, dtype=row.dtype))  # half precision rounds p as well
            kept = [token for place, token in enumerate(order) if place == 0 or mass[place - 1] <= bound]
            row = torch.tensor([v if i in kept else lowest for i, v in enumerate(row.tolist())], dtype=row.dtype)
        if top_k is not None:
            kth = sorted(row.tolist(), reverse=True)[min(top_k, len(row)) - 1]
            row = torch.tensor([v if v >= kth else lowest for v in row.tolist()], dtype=row.dtype)
        probs.append(row.softmax(-1))
    tokens = [argmax(p) for p in probs]
    refused = False
    if temperature and probs:
        unit = torch.stack([p / p.sum() for p in probs])
        refused = any(abs(float(p.sum()) - 1) >= 1e-6 for p in unit)
        if not refused:
            tokens = torch.multinomial(unit, 1)[:, 0].tolist()
    confidence = []
    for p, token in zip(probs, tokens, strict=True):
        if rule == "topk_margin":
            first, second = sorted(p, key=float, reverse=True)[:2]
            confidence.append(first - second)
        elif rule == "entropy":
            confidence.append((p * (p + 1e-10).log()).sum())
        else:
            confidence.append(p[token])
    return tokens, confidence, refused


def dream(
    logits_of, x, mask, real, *, steps, rule, temperature=0.0, top_p=None, top_k=None, alg_temp=None, refusals=None
):
    B, T = x.shape
    times = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        last = step == steps - 1
        rest = times[step + 1] / times[step]
        logits = logits_of(x, real)
        places = [(b, i) for b in range(B) for i in range(T) if x[b, i] == mask]
        new = x.clone()
        if rule == "origin":
            chance = 1.0 if last else float(1 - rest)
            uniform = torch.rand(len(places)).tolist()
            moving = [place for place, u in zip(places, uniform, strict=True) if u < chance]
            rows = [logits[b, i] for b, i in moving]
            tokens, _, refused = dream_tokens(rows, temperature, top_p, top_k, rule)
            for (b, i), token in zip(moving, tokens, strict=True):
                new[b, i] = token
        else:
            rows = [logits[b, i] for b, i in places]
            tokens, confidence, refused = dream_tokens(rows, temperature, top_p, top_k, rule)
            mean = torch.tensor(len(places)) / B
            k = int(mean) if last else int(mean * (1 - rest))
            ranked = torch.full((B, T), -INF, dtype=logits.dtype)
            proposal = dict(zip(places, tokens, strict=True))
            for place, score in zip(places, confidence, strict=True):
                ranked[place] = score
            if k:
                if alg_temp:
                    chosen = torch.multinomial((ranked / alg_temp).softmax(-1), k).tolist()
                else:
                    chosen = [row.topk(k).indices.tolist() for row in ranked]
                for b in range(B):
                    for i in chosen[b]:
                        new[b, i] = proposal.get((b, i), mask)  # what was no mask becomes one
        if refusals is not None:
            refusals.append(refused)
        x = new
        yield x


def mdlm(logits_of, x, mask, *, steps, cached, conditioned=False):
    B, T = x.shape
    times = torch.linspace(1, 1e-5, steps + 1)

    def sigma(t):
        return -torch.log1p(-(1 - 1e-3) * t)

    def predicted(t):
        logits = logits_of(x, None, sigma(t).repeat(B))
        out = torch.empty_like(logits)
        for b in range(B):
            for i in range(T):
                row = logits[b, i].clone()
                row[mask] += -1e6
                row = row - row.logsumexp(-1)
                if x[b, i] != mask:
                    row = torch.full_like(row, -1e6)
                    row[x[b, i]] = 0
                out[b, i] = row
        return out

    kept = None
    for step in range(steps):
        t = times[step]
        s = t - (1 - 1e-5) / steps
        p = predicted(t).exp() if kept is None else kept
        if cached:
            stay, leave = s, t - s
        else:
            stay = 1 - torch.exp(-sigma(s))
            leave = 1 - torch.exp(-sigma(t)) - stay
        uniform = torch.rand(p.shape, dtype=torch.promote_types(p.dtype, torch.float32))
        new = x.clone()
        for b in range(B):
            for i in range(T):
                if x[b, i] == mask:
                    weight = p[b, i] * leave.reshape(1)
                    weight[mask] = stay
                    new[b, i] = argmax(weight / (1e-10 - (uniform[b, i] + 1e-10).log()))
        kept = p if cached and not conditioned and torch.equal(new, x) else None
        x = new
        yield x
    final = predicted(times[-1])
    x = torch.tensor([[argmax(row) for row in rows] for rows in final])
    yield x


def smdm(logits_of, x, start, mask, *, steps, temperature, cfg, rule):
    """The mask is the last id and has no logit."""
    B, T = x.shape
    times = torch.linspace(1, 1e-5, steps + 1)
    prompt = torch.tensor([[i < start for i in range(T)]] * B)
    for step in range(steps):
        last = step == steps - 1
        rest = times[step + 1] / times[step]
        logits = guided(logits_of, (x, mask), prompt, cfg)[..., :mask]
        places = [(b, i) for b in range(B) for i in range(T) if x[b, i] == mask]
        new = x.clone()
        if rule == "origin":
            uniform = torch.rand(len(places)).tolist()
            chance = 1.0 if last else float(1 - rest)
            moving = [place for place, u in zip(places, uniform, strict=True) if u < chance]
        else:
            moving = places
        noise = torch.rand(len(moving), mask, dtype=torch.float64)
        tokens = [argmax(noised(logits[p], u, temperature)) for p, u in zip(moving, noise, strict=True)]
        chosen = range(len(moving))
        if rule == "greedy":
            scores = [logits[p].double().softmax(-1)[v] for p, v in zip(moving, tokens, strict=True)]
            k = len(moving) if last else math.floor(torch.tensor(len(moving)) * (1 - rest))
            chosen = torch.stack(scores).topk(k).indices.tolist() if k else []
        for n in chosen:
            new[moving[n]] = tokens[n]
        x = new
        yield x
