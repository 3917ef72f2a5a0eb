"""Iterative fine-tuning: rejection sampling V1 to V5, then PPO [L2 §3.2.3].

The reward of an answer g to a prompt p, and what PPO maximises:

    R_c(g|p) = R_s if is_safety(p) or R_s(g|p) < threshold, else R_h      R_s, R_h: sigmoid scores
    R(g|p)   = WHITEN(LOGIT(R_c)) - beta KL(policy || start of PPO)                       [Eq. 4]

Rejection sampling looks wide: K answers from one frozen model, the best is imitated. PPO looks
deep: one answer, and the model moves after every batch. The paper does the first until V4, then
both in sequence; between versions new comparisons keep the reward models on the distribution.

in  : out/sft.pt, out/reward_helpful.pt, out/reward_safety.pt
out : out/rlhf_v1.pt .. rlhf_v5.pt, rlhf_control.pt, out/ppo.pt, out/ppo.jsonl, out/figures/ppo.png,
      out/refreshed_N/: comparisons after round N, and the reward models trained on with them
run : python ppo.py                                       about 3.2 minutes on two AVX2 cores
      python ppo.py --reward my_reward.py:fn              your own fn(prompts, responses) -> scores

Expect helpfulness .80 to .87 at T = 1 (.21 to .28 above SFT), .91 to .93 at T = 0.5, violations
of 0 to 1.5%, 1.5 to 3 nats from SFT, and that PPO's model wins 75 to 87% of its decided
comparisons with V5.

Keys: [L2] Llama 2, 2307.09288.  [PPO] 1707.06347.  [GAE] 1506.02438.  [N+] 2403.17031.

Differs from the paper:
- Rejection samples come from the model itself, not from a larger one.
- The critic is the helpfulness reward model with a trained trunk of its own (UNSPECIFIED in L2).
- gamma 1, lambda .95, k1 estimator of the KL, whitened advantages (UNSPECIFIED in L2; [N+]).
- An answer cut before its EOS gets the lowest score of its batch (UNSPECIFIED in L2).
"""

from __future__ import annotations

import dataclasses, functools, json, math, os, random, runpy, subprocess, sys, time, zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data, kernels, model as M, scale

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """Versions, rewards and PPO: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # SFT model, where every version starts; none: OUT/sft.pt
    data: str | None = None  # .jsonl of prompts with is_safety; none: prompts of the tiny world
    reward: str | None = None  # FILE.py:FUNCTION(prompts, responses) -> scores; none: our models
    out: str = "out"  # folder of checkpoints, metrics and figures
    seed: int = 0  # of prompts and sampling
    rounds: int = 5  # versions made by rejection sampling; paper: V1 to V5 (§3.2.3)
    prompts: int = 100  # prompts per round; UNSPECIFIED in L2
    samples: int = 8  # K, answers per prompt; UNSPECIFIED in L2 (figures up to 100)
    comparisons: int = 500  # pairs to label after each round, 0: none; paper: weekly batches
    rs_lr: float | None = None  # of each version's fine-tuning; none: by size (see SIZES)
    iterations: int = 60  # of PPO; paper: 200 to 400, stopped early (§3.2.3)
    batch_size: int = 96  # rollouts per iteration, over all ranks; paper: 512 (§3.2.3)
    minibatch: int = 24  # rollouts per gradient step, one pass; paper: 64 (§3.2.3)
    lr: float | None = None  # of policy and critic, constant; none: by size; paper: 1e-6 (§3.2.3)
    beta: float | None = None  # weight of the KL; none: by size; paper: 0.01 or 0.005 (§3.2.3)
    threshold: float = 0  # gate on R_s; 0: calibrated by reward.py to precision .89; paper: 0.15
    temperature: float = 1.0  # of rollouts and all their log-probabilities; UNSPECIFIED in L2
    max_new_tokens: int = 80  # tokens of an answer
    eval_prompts: int = 200  # test prompts of each kind for the final examination
    kl_limit: float = 2.9  # nats per answer from the SFT model; beyond it PPO stops
    resume: bool = False  # continue after the last finished round or PPO state
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = 1  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


SIZES = {  # width from which on: rs_lr (from 4096 on that of SFT), lr and beta [L2 §3.2.3]
    0: (2.5e-4, 1e-4, 0.1), 768: (1e-4, 1e-5, 0.02), 4096: (2e-5, 1e-6, 0.01),
    8192: (2e-5, 1e-6, 0.005)}
# From 7b on these take the place of the defaults above [L2 §3.2.3].
PAPER = {"iterations": 400, "batch_size": 512, "minibatch": 64}
# Tried anew in every round. DEVIATES: 0.6 to 1.5 in Fig. 8; the best of 8 of our hotter answers by
# reward was no better than one at random by the gold score, for broken ones fool the model.
TEMPERATURES = (0.5, 0.65, 0.8)
CLIP, VALUE_CLIP = 0.2, 0.2  # of the probability ratio [L2 §3.2.3]; of the value's change [N+]
GAMMA, LAMBDA = 1.0, 0.95  # UNSPECIFIED in L2; [N+]
PREPROMPT = "You are a responsible and safe assistant."  # generic, as in [L2 Table 39]
EVERY, PATIENCE = 5, 15  # iterations between held-out scores; without progress until PPO stops

# ------------------------------------------------------------------------------------ the idea


def fires(safety, is_safety, threshold: float):
    """Where the safety model decides: tagged prompts, and answers it finds unsafe: bool (B,).

    Low is unsafe, and strictly: sigmoid(score) < threshold [L2 §3.2.3].
    """
    return is_safety | (safety.sigmoid() < threshold)


def combine(helpful, safety, is_safety, threshold: float):
    """The raw score of R_c: float (B,) x 2, bool (B,) -> float (B,) [L2 §3.2.3].

    LOGIT undoes the sigmoid, so the raw linear scores are taken at once: logit(sigmoid(s)) would
    overflow.
    """
    return torch.where(fires(safety, is_safety, threshold), safety, helpful)


def punish_cut(scores, finished):
    """Answers without EOS get the lowest score of all: float (B,), bool (B,) -> float (B,)."""
    return scores.where(finished, scores.min())


def moments(x, mask, total=float) -> tuple[float, float]:
    """(mean, variance) of x where mask is 1; total: sum of a number over the ranks."""
    count = total(mask.sum())
    mean = total((x * mask).sum()) / count
    return mean, total(((x - mean).square() * mask).sum()) / count


def whiten(x, mask=None, total=float):
    """(x - mean) / std over the mask (all of x without one); 0 outside it, and if x is constant.

    total: sum of a number over the ranks, each of which holds a part of the batch.
    """
    mask = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    mean, variance = moments(x, mask, total)
    if variance <= 1e-10 * (mean * mean + 1e-2):  # rounding, not a difference between answers
        return torch.zeros_like(x)
    return (x - mean) * mask / math.sqrt(variance)


def token_rewards(scores, logp, ref_logp, mask, beta: float):
    """Reward of each token: scores (B,), the rest (B, T) -> (B, T).

        r[t] = -beta (log policy - log reference)     k1 estimator; its sum is the sequence's KL
        r[last] += score                              last token of the answer, EOS if it has one

    [N+] puts the score one slot behind EOS, as a state with a value of its own; here there is one
    mask for everything.
    """
    rewards = -beta * (logp - ref_logp) * mask
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)  # (B,)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask):
    """Generalised advantage estimation [GAE Eq.16]: (B, T) each -> (advantages, returns).

        delta[t] = r[t] + gamma V[t+1] - V[t]        V after the last token is 0, finished or cut
        A[t] = delta[t] + gamma lambda A[t+1]        returns = A + V, before any whitening

    Answers are contiguous: whatever stands at mask 0 is multiplied away.
    """
    mask = mask.to(values.dtype)
    values, advantages = values * mask, torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = (delta + GAMMA * LAMBDA * advantage) * mask[:, t]
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values


def policy_loss(logp, old_logp, advantages, mask):
    """Clipped surrogate [PPO Eq.7], mean over answer tokens: (loss, ratio, share clipped)."""
    ratio = (logp - old_logp).exp()
    gain = torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    clipped = ((ratio - 1).abs() > CLIP).float()
    return -(gain * mask).sum() / mask.sum(), ratio, (clipped * mask).sum() / mask.sum()


def value_loss(values, old_values, returns, mask):
    """Half the squared error, the larger of the free and the clipped value's [N+]: a scalar."""
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.max((values - returns).square(), (near - returns).square())
    return 0.5 * (error * mask).sum() / mask.sum()


# ---------------------------------------------------------------------------- prompts and answers


def pad(pairs: list[tuple[list[int], list[int]]], device):
    """(prompt, response) rows, padded on the right: tokens (B, T), lengths (B,), mask (B, T-1).

        tokens   <s> [INST] hi [/INST]  hello  </s>   0     read: all but the last column
        mask            0    0    0       1      1    0     1: this column is the response's

    Position t of logp, values, rewards and mask belongs to tokens[:, t + 1], the action, and was
    computed from tokens[:, :t + 1], the state. A row's last 1 is its last response token.
    """
    lengths = torch.tensor([len(p) + len(r) for p, r in pairs])
    starts = torch.tensor([len(p) for p, _ in pairs])
    width = int(lengths.max())
    tokens = torch.tensor([p + r + [0] * (width - len(p) - len(r)) for p, r in pairs])
    at = torch.arange(1, width)
    mask = (at >= starts[:, None]) & (at < lengths[:, None])
    return tokens.to(device), lengths.to(device), mask.to(device)


def answer_logprobs(model, tokens, lengths, mask, temperature: float):
    """log p of the response tokens at this temperature, 0 elsewhere: float32 (B, T-1).

    The one forward of rollout, reference and update: the ratio is exactly 1 before the first step.
    """
    with M.autocast(tokens.device):
        hidden = kernels.trunk(model, tokens[:, :-1], lengths=lengths - 1)
        return kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], mask, temperature)


def values_of(critic, tokens, lengths):
    """What the critic expects from each state on: float32 (B, T-1), from tokens <= t at t."""
    with M.autocast(tokens.device):
        hidden = kernels.trunk(critic, tokens[:, :-1], lengths=lengths - 1)
        return critic.output(hidden).squeeze(-1).float()


def seed_of(cfg: Config, *names) -> int:
    """A 32-bit seed for each purpose: nothing random depends on what was drawn before it."""
    return zlib.crc32(repr((cfg.seed, *names)).encode())


@functools.lru_cache
def own_prompts(path: str) -> dict[str, list[dict]]:
    """The rows of --data, a tenth of them held out: {"train", "valid"}."""
    rows = data.read_prompts(path)
    random.Random(0).shuffle(rows)
    cut = max(1, len(rows) // 10)
    return {"valid": rows[:cut], "train": rows[cut:] or rows}


def draw_prompts(cfg: Config, village, purpose, count: int, split: str = "train") -> list[dict]:
    """`count` rows {"messages", "is_safety"}, shuffled; of the tiny world's a share comes with an
    instruction, or following one would be forgotten, and a third lies at the border of what is
    safe: more harmless look-alikes than unsafe prompts, or refusing would spread to these
    [L2 Fig. 33].
    """
    rng = random.Random(seed_of(cfg, "prompts", purpose))
    if cfg.data:
        return rng.choices(own_prompts(cfg.data)[split], k=count)
    rows = [row for mix, n in (("all", count - count // 3), ("border", count // 3))
            for row in village.prompts(mix, split, n, rng.randrange(1 << 30), data.STYLED)]
    rng.shuffle(rows)  # a minibatch of PPO takes neighbours
    return rows


def answer(model, tokenizer, dialogs: list, temperature: float, cfg: Config, world, purpose,
           rows_at_once: int = 512):
    """An answer to each open dialogue: (prompts, responses, finished), token lists and bool (N,).

    The weights are gathered once for the whole of it, and the ranks share the rows [L2 §3.2.3].
    """
    prompts = [data.encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    mine, responses = range(world.dp_rank, len(prompts), world.dp), []
    with scale.unsharded(model, world):
        for start in range(0, len(mine), rows_at_once):
            ids = mine[start:start + rows_at_once]
            responses += kernels.rollout(
                model, [prompts[i] for i in ids], cfg.max_new_tokens, temperature=temperature,
                seed=seed_of(cfg, *purpose), stop=tokenizer.eos_id, row_ids=ids)[0]
    responses = scale.gather(responses, world)
    return prompts, responses, torch.tensor([r[-1] == tokenizer.eos_id for r in responses])


@torch.no_grad()
def scores(model, rows: list[list[int]], world, rows_at_once: int = 64):
    """Raw score of each row of tokens, read at its last token: float32 (N,), on the CPU."""
    mine, found = range(world.dp_rank, len(rows), world.dp), {}
    order = sorted(mine, key=lambda i: len(rows[i]))  # like beside like: less padding
    with scale.unsharded(model, world), M.autocast(world.device):
        for start in range(0, len(order), rows_at_once):
            picked = order[start:start + rows_at_once]
            tokens, lengths, _ = pad([(rows[i], []) for i in picked], world.device)
            hidden = kernels.trunk(model, tokens, lengths=lengths)
            last = hidden[torch.arange(len(picked), device=world.device), lengths - 1]
            found |= zip(picked, model.output(last).squeeze(-1).float().tolist())
    return torch.tensor(scale.gather([found[i] for i in mine], world))


def reward_pair(cfg: Config, tokenizer, world, folder: Path):
    """score(rows, prompts, responses) -> {"helpful", "safety", "combined", "gate"}, (B,) each.

    gate: where the safety model decided. rows carry is_safety; prompts and responses are token
    lists, scored as they were sampled: an answer that was cut gets no EOS.
    """
    models = {}
    for which in ("helpful", "safety"):
        model, info = M.load(folder / f"reward_{which}.pt", "cpu")
        if info["tokenizer"] != tokenizer.model_bytes:
            raise ValueError(f"{folder}/reward_{which}.pt has another tokenizer than the model to "
                             f"train: run `python reward.py` again")
        models[which] = scale.wrap(model, world)
    threshold = cfg.threshold or info["metrics"].get("threshold")
    if not threshold:
        raise ValueError(f"{folder}/reward_safety.pt holds no calibrated threshold: give one, as "
                         f"--threshold 0.15")

    def score(rows, prompts, responses) -> dict:
        whole = [p + r for p, r in zip(prompts, responses)]
        h, s = (scores(model, whole, world) for model in models.values())
        tag = torch.tensor([row["is_safety"] for row in rows])
        return {"helpful": h, "safety": s, "combined": combine(h, s, tag, threshold),
                "gate": fires(s, tag, threshold)}

    return score


def own_reward(spec: str, tokenizer):
    """The same interface around a user's fn(prompts, responses) -> scores (FILE.py:FUNCTION).

    prompts: message lists; responses: texts; scores: a float tensor or list, one per response.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or not name:
        raise ValueError(f"--reward {spec}: give FILE.py:FUNCTION, FILE.py being an existing file")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"--reward {spec}: {path} has no function {name}")

    def score(rows, prompts, responses) -> dict:
        texts = [tokenizer.decode(r).strip() for r in responses]
        given = function([row["messages"] for row in rows], texts)
        try:
            s = torch.as_tensor(given, dtype=torch.float32).cpu()
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"--reward {spec}: not a list or tensor of numbers: {e}") from e
        if s.shape != (len(rows),) or not s.isfinite().all():
            raise ValueError(f"--reward {spec}: it must return {len(rows)} finite scores, one per "
                             f"response; it returned shape {tuple(s.shape)}, "
                             f"{int((~s.isfinite()).sum())} of them not finite")
        return {"helpful": s, "safety": s, "combined": s, "gate": torch.zeros(len(s)).bool()}

    return score


# ---------------------------------------------------------------------------- rejection sampling


@dataclass
class Places:
    """What every function below needs and none of them changes, but `reward`, anew each round."""

    cfg: Config
    tokenizer: data.Tokenizer
    village: data.World  # the tiny world, for its prompts and its annotator
    world: scale.World  # the ranks
    reward: object = None  # score(rows, prompts, responses)

    def open(self, path) -> M.Llama:
        """A checkpoint in float32 on this rank, sharded if there are several."""
        return scale.wrap(M.load(path, "cpu")[0], self.world, recompute=self.cfg.recompute)

    def best_of(self, model, rows: list[dict], temperature: float, purpose) -> tuple:
        """K answers per row: prompts (N K lists), responses, scores and finished (N, K)."""
        cfg = self.cfg
        many = [row for row in rows for _ in range(cfg.samples)]  # [a, b] -> [a, a, b, b]
        prompts, responses, finished = answer(model, self.tokenizer, [r["messages"] for r in many],
                                              temperature, cfg, self.world, purpose)
        combined = punish_cut(self.reward(many, prompts, responses)["combined"], finished)
        return prompts, responses, combined.view(-1, cfg.samples), finished.view(-1, cfg.samples)


def choose_temperature(newest, number: int, at: Places) -> tuple[float, dict]:
    """(T, {T: score}): the temperature whose best of K scores highest, and the curve behind it.

    The best one moves with every version, so it is looked for anew each round [L2 §3.2.3, Fig. 8].
    """
    rows = draw_prompts(at.cfg, at.village, f"temperature {number}", 48, "valid")
    curve = {t: at.best_of(newest, rows, t, ("temperature", number))[2].amax(1).mean().item()
             for t in TEMPERATURES}
    return max(curve, key=curve.get), curve


def pick(said, finished, rng: random.Random) -> list[tuple[int, int, int]]:
    """[(row, best, random)]: scores, bool (N, K) -> the answers to imitate, and one at random.

    An answer that was cut is never picked; a row without any finished answer is left out.
    """
    best = said.masked_fill(~finished, -math.inf).argmax(1)
    whole = [row.nonzero().flatten().tolist() for row in finished]
    return [(i, best[i].item(), rng.choice(ks)) for i, ks in enumerate(whole) if ks]


def imitate(model, examples: list[tuple[list[int], list[int]]], cfg: Config, world) -> float:
    """Fine-tune in place on (prompt, response) token lists, as in SFT; returns the last loss.

    Two epochs as there [L2 §3.1]; the loss is on the responses alone, per response token of the
    whole batch.
    """
    optimizer, size, order = M.adamw(model, cfg.rs_lr, 0.1), min(32, len(examples)), []
    for epoch in range(2):
        order += random.Random(f"{cfg.seed} {epoch}").sample(range(len(examples)), len(examples))
    total = len(order) // size
    for step in range(total):
        # this rank's share; filled up with a row without loss, as all ranks must run alike
        batch = order[step * size:(step + 1) * size]
        places = range(world.dp_rank, -(-size // world.dp) * world.dp, world.dp)
        tokens, lengths, mask = pad([examples[batch[i % size]] for i in places], world.device)
        mask &= torch.tensor([i < size for i in places], device=world.device)[:, None]
        answers = scale.all_sum(mask.sum().item(), world)
        loss = -answer_logprobs(model, tokens, lengths, mask, 1.0).sum() / answers
        # FSDP averages gradients over its ranks; times their number makes that a sum
        (loss * world.dp).backward()
        scale.clip(model, 1.0, world)
        for group in optimizer.param_groups:  # cosine to a tenth, as in SFT
            group["lr"] = cfg.rs_lr * (0.55 + 0.45 * math.cos(math.pi * step / total))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return scale.all_sum(loss.item(), world)


def distil(model, at: Places) -> list[tuple[list[int], list[int]]]:
    """Safety context distillation [L2 §4.2.4]: examples (prompt without preprompt, safer answer).

    The model answers unsafe prompts twice, once behind a preprompt that calls it responsible. The
    second answer is kept where the safety model scores it higher (strictly), and learnt as the
    answer to the bare prompt. Helpful prompts are left alone: there it breeds false refusals.
    """
    cfg, drawn = at.cfg, draw_prompts(at.cfg, at.village, "distillation", 2 * at.cfg.prompts)
    rows = [row for row in drawn  # where the preprompt has a place
            if row["is_safety"] and row["messages"][0]["role"] != "system"]
    if not rows:
        return []
    dialogs = [row["messages"] for row in rows]
    safer = [[{"role": "system", "content": PREPROMPT}, *messages] for messages in dialogs]
    bare, plain, _ = answer(model, at.tokenizer, dialogs, 0.8, cfg, at.world, ("plain",))
    _, guided, finished = answer(model, at.tokenizer, safer, 0.8, cfg, at.world, ("guided",))
    before, after = (at.reward(rows, bare, r)["safety"] for r in (plain, guided))
    kept = finished & (after > before)
    print(f"context distillation: {int(kept.sum())} of {len(rows)} answers kept, safety score "
          f"{before.mean():.2f} -> {after.where(kept, before).mean():.2f}")
    return [(p, r) for p, r, keep in zip(bare, guided, kept.tolist()) if keep]


def merged(rounds: list, number: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) examples of version `number`, from the picks of rounds 1 to `number`.

    V1 to V3 imitate the newest model's samples alone; from V4 on the best of all rounds, since V3
    had forgotten skills of V1 and V2 [L2 §3.2.3].
    """
    return [tuple(e) for picks in (rounds[number - 1:number] if number < 4 else rounds[:number])
            for e in picks]


def make_version(number: int, newest, memory: dict, at: Places):
    """V_number by rejection sampling: the best of K answers, imitated by the SFT model.

    Every version starts from SFT, not from the last one; distilled answers join each. The last
    round also trains a control on as many answers of the SFT model itself, one to each prompt and
    none rejected: what imitation alone is worth.
    """
    cfg, sft = at.cfg, at.cfg.checkpoint or Path(at.cfg.out) / "sft.pt"
    temperature, curve = choose_temperature(newest, number, at)
    rows = draw_prompts(cfg, at.village, f"round {number}", cfg.prompts)
    prompts, responses, said, finished = at.best_of(newest, rows, temperature, ("round", number))
    picks = pick(said, finished, random.Random(seed_of(cfg, "control", number)))
    places = [[i * cfg.samples + k for k in ks] for i, *ks in picks]
    memory["rounds"].append([(prompts[best], responses[best]) for best, _ in places])
    model = at.open(sft)
    asked, plain, ended = answer(model, at.tokenizer, [row["messages"] for row in rows],
                                 temperature, cfg, at.world, ("control", number))
    memory["control"].append([(p, r) for p, r, whole in zip(asked, plain, ended) if whole])
    ladder = {n: (said[:, :n].amax(1).mean().item(), said[:, :n].quantile(0.5, 1).mean().item())
              for n in (1, 2, 4, 8, 16, 32, 64, 100) if n <= cfg.samples}  # Fig. 7
    record = {"round": number, "temperature": temperature, "curve": curve, "ladder": ladder}
    if not cfg.data and picks:  # reported only: nothing is chosen by the gold score
        record |= {f"gold_{name}": gold(at, [rows[i] for i, *_ in picks],
                                        [responses[p[j]] for p in places])
                   for j, name in enumerate(("best", "random"))}
    examples = merged(memory["rounds"], number) + [tuple(e) for e in memory["distilled"]]
    if not examples:
        raise ValueError(f"none of {said.numel()} answers ended within --max-new-tokens "
                         f"{cfg.max_new_tokens}: raise it, or train sft.py longer")
    loss, controls = imitate(model, examples, cfg, at.world), []
    if number == cfg.rounds and memory["control"][-1]:
        controls = [at.open(sft)]
        imitate(controls[0], merged(memory["control"], number), cfg, at.world)
    print(f"V{number}: T {temperature}, {len(examples)} answers imitated (loss {loss:.3f}); "
          f"reward of one {ladder[1][0]:.2f}, best of {cfg.samples} {said.amax(1).mean():.2f}"
          + (f"; gold score {record['gold_best']:.2f}, at random {record['gold_random']:.2f}"
             if "gold_best" in record else ""))
    return model, controls, record


def gold(at: Places, rows: list[dict], responses: list[list[int]]) -> float:
    """The annotator's mean score without noise: safety on unsafe prompts, else helpfulness."""
    annotator = data.Annotator(at.village)
    return data.mean(annotator.gold(row["messages"], at.tokenizer.decode(r).strip())[
        "safe" if row["is_safety"] else "helpful"] for row, r in zip(rows, responses))


def compare(number: int, newest, previous, at: Places) -> list[dict]:
    """Rows of a preference file: answers of the two newest versions, labelled by the annotator.

    A third is judged for safety, on mostly unsafe prompts, and as in reward.py some first answers
    are what neither would say; an answer that was cut is none.
    """
    cfg, lines = at.cfg, []
    annotator, rng = data.Annotator(at.village), random.Random(seed_of(cfg, "labels", number))
    for mix, by, n in (("helpful", "helpful", cfg.comparisons - cfg.comparisons // 3),
                       ("safety", "safe", cfg.comparisons // 3)):
        drawn = at.village.prompts(mix, "train", n, rng.randrange(1 << 30), data.STYLED)
        dialogs, sides = [row["messages"] for row in drawn], []
        for which, model in enumerate((newest, previous)):
            _, responses, finished = answer(model, at.tokenizer, dialogs, rng.choice((0.8, 1.0)),
                                            cfg, at.world, ("compare", mix, number, which))
            sides.append([data.break_tags(at.tokenizer.decode(r).strip()) if ended else ""
                          for r, ended in zip(responses, finished)])
        sides[0] = at.village.oddities(dialogs, *sides, rng)
        for messages, a, b in zip(dialogs, *sides):
            if a and b and a != b:
                label = annotator.label(messages, a, b, rng, by)
                lines.append({"rating": label["rating"]})
                for side, i in (("chosen", label["chosen"]), ("rejected", 1 - label["chosen"])):
                    lines[-1][side] = messages + [{"role": "assistant", "content": (a, b)[i]}]
                    if by == "safe":
                        lines[-1][f"{side}_safe"] = label["safe"][i]
    return lines


def refresh_rewards(number: int, newest, previous, folder: Path, at: Places) -> None:
    """Train the reward models of `folder` on with fresh comparisons, into out/refreshed_NUMBER.

    The paper's weekly batches: without them the models judge answers unlike any they saw. As many
    older comparisons are learnt beside them, so that what is rare now is not forgotten. reward.py
    does it, as a child process; the first comparisons' test files, where there are any, are the
    test again.
    """
    cfg, out = at.cfg, Path(at.cfg.out)
    home, lines = out / f"refreshed_{number}", compare(number, newest, previous, at)
    if at.world.is_main:
        before = [*(out / f"preferences_{which}.jsonl" for which in ("helpful", "safety")),
                  *(out / f"refreshed_{n}" / "comparisons.jsonl" for n in range(1, number))]
        older = [line for path in before if path.exists() for line in path.read_text().splitlines()]
        again = random.Random(seed_of(cfg, "again", number)).sample(
            sorted(older), min(len(lines), len(older)))
        for name, rows in (("comparisons", map(json.dumps, lines)), ("again", again)):
            text = "".join(f"{row}\n" for row in rows)
            M.atomic_write(home / f"{name}.jsonl", lambda f: f.write(text.encode()))
        print(f"{home}: {len(lines)} fresh comparisons of the two newest versions, {len(again)} "
              f"older ones", flush=True)
        files = [home / "comparisons.jsonl", *([home / "again.jsonl"] if again else []),
                 *sorted(out.glob("preferences_*_test.jsonl"))]
        command = [sys.executable, str(Path(__file__).resolve().with_name("reward.py")), "--data",
                   ",".join(map(str, files)), "--resume-from", str(folder), "--out",
                   str(home), "--device", cfg.device, "--kernels", cfg.kernels]
        # the child is no rank of ours
        alone = {k: v for k, v in os.environ.items() if "RANK" not in k and k != "WORLD_SIZE"}
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        if done.returncode:
            raise ValueError(f"refreshing the reward models failed ({done.stderr.strip()[-300:]}); "
                             f"--comparisons 0 leaves them as they are")
    scale.all_sum(0, at.world)  # the others wait for the files


def all_versions(at: Places) -> tuple[list[dict], Path]:
    """V1 to V5 into out/rlhf_v*.pt; (records, folder of the newest reward models).

    out/rlhf.state.json holds the answers picked so far: with --resume its rounds are not repeated.
    """
    cfg, out, state = at.cfg, Path(at.cfg.out), Path(at.cfg.out) / "rlhf.state.json"
    memory, records, done = {"rounds": [], "control": [], "distilled": []}, [], 0
    if cfg.resume and state.exists():
        saved = json.loads(state.read_text())
        M.check_resume(saved, cfg, at.tokenizer.model_bytes)
        memory, records, done = saved["memory"], saved["records"], saved["step"]
        print(f"resuming after version {done}")
    else:
        scale.remove_state(out / "ppo.state.pt", at.world)  # of versions that are no more
    path_of = lambda n: out / f"rlhf_v{n}.pt" if n > 0 else cfg.checkpoint or out / "sft.pt"
    refreshes = cfg.comparisons and not (cfg.data or cfg.reward)
    folder = out / f"refreshed_{done}" if done and refreshes else out
    at.reward = pick_reward(at, folder)
    previous, newest = at.open(path_of(done - 1)), at.open(path_of(done))
    for number in range(done + 1, cfg.rounds + 1):
        if number == 1 and not cfg.reward:
            memory["distilled"] = distil(newest, at)
        model, controls, record = make_version(number, newest, memory, at)
        previous, newest = newest, model
        records.append(record)
        save(path_of(number), newest, f"rlhf_v{number}", record, at)
        for control in controls:
            save(out / "rlhf_control.pt", control, "rlhf_control", {}, at)
        if refreshes:
            refresh_rewards(number, newest, previous, folder, at)
            folder = out / f"refreshed_{number}"
            at.reward = pick_reward(at, folder)
        info = M.resume_info(number, cfg.rounds, cfg, at.tokenizer.model_bytes)
        text = json.dumps({**info, "memory": memory, "records": records})
        if at.world.is_main:
            M.atomic_write(state, lambda f: f.write(text.encode()))
    return records, folder


def pick_reward(at: Places, folder: Path):
    """The user's function if there is one, else the pair of reward models of a folder."""
    if at.cfg.reward:
        return own_reward(at.cfg.reward, at.tokenizer)
    return reward_pair(at.cfg, at.tokenizer, at.world, folder)


def save(path: Path, model, stage: str, metrics: dict, at: Places) -> None:
    """One checkpoint of ours, written by rank 0 from all ranks' shares."""
    weights = scale.full_weights(model, at.world)
    if at.world.is_main:
        M.save(path, model, stage, at.tokenizer.model_bytes, metrics,
               at.cfg.data or "prompts of the tiny world", weights=weights)
    scale.barrier(at.world)  # whoever opens it next finds it whole


# ----------------------------------------------------------------------------------------- PPO


def open_critic(start, folder: Path, at: Places) -> M.Llama:
    """The helpfulness model, its head x 0.3: whitened rewards are smaller than its raw scores.

    UNSPECIFIED in L2. With a user's own reward: the policy's trunk, and a head that says 0.
    """
    if not at.cfg.reward:
        critic = at.open(folder / "reward_helpful.pt")
        with torch.no_grad():
            critic.output.weight.mul_(0.3)
        return critic
    policy = M.load(start, "cpu")[0]
    config = dataclasses.replace(policy.config, scalar_head=True)
    head = torch.zeros(1, config.dim, dtype=policy.norm.weight.dtype)
    weights = {**policy.state_dict(), "output.weight": head}
    critic = M.assemble(config, weights, start)
    return scale.wrap(critic, at.world, recompute=at.cfg.recompute)


def minibatches(cfg: Config, world) -> list[slice]:
    """This rank's rows of each gradient step; over all ranks, neighbours among the rollouts."""
    size = len(scale.rank_rows(cfg.minibatch, world))
    return [slice(i, i + size) for i in range(0, cfg.batch_size // world.dp, size)]


def roll_out(policy, ref, critic, iteration: int, at: Places) -> dict:
    """Steps 1 to 3 of an iteration: the tensors (B, T-1) that the update needs, and statistics.

    Every rank knows all answers and scores, and goes on with its own rows.
    """
    cfg, world, began = at.cfg, at.world, time.time()
    # 1) rollout
    rows = draw_prompts(cfg, at.village, f"ppo {iteration}", cfg.batch_size)
    prompts, responses, finished = answer(policy, at.tokenizer, [row["messages"] for row in rows],
                                          cfg.temperature, cfg, world, ("ppo", iteration))
    rolled = time.time()
    # 2) score; WHITEN over all rollouts, after the choice between the two models, before the KL
    said = at.reward(rows, prompts, responses)
    whitened = whiten(punish_cut(said["combined"], finished))
    # 3) rewards and advantages, from the forwards of the very minibatches of the update
    mine = list(scale.rank_rows(cfg.batch_size, world))
    batch = pad([(prompts[i], responses[i]) for i in mine], world.device)
    tokens, lengths, mask = batch
    with torch.no_grad():
        parts = [[t[i] for t in batch] for i in minibatches(cfg, world)]
        logp, ref_logp = (torch.cat([answer_logprobs(model, *part, cfg.temperature)
                                     for part in parts]) for model in (policy, ref))
        values = torch.cat([values_of(critic, *part[:2]) for part in parts])
    rewards = token_rewards(whitened[mine].to(world.device), logp, ref_logp, mask, cfg.beta)
    advantages, returns = gae(rewards, values, mask)
    total = functools.partial(scale.all_sum, world=world)
    log_ratio, count = (ref_logp - logp) * mask, total(mask.sum().item())
    statistics = {
        "reward": said["combined"].mean().item(), "helpful": said["helpful"].mean().item(),
        "safety": said["safety"].mean().item(),
        # nats per answer from PPO's start: k1, as in the reward; k3 is never negative
        "kl": total((logp - ref_logp).sum().item()) / cfg.batch_size,
        "kl_k3": total((log_ratio.exp() - 1 - log_ratio).sum().item()) / cfg.batch_size,
        "entropy": -total((logp * mask).sum().item()) / count,  # nats per token, of those sampled
        "eos_rate": finished.float().mean().item(), "length": count / cfg.batch_size,
        "gate": said["gate"].float().mean().item(),
        "tokens_per_s": count / max(rolled - began, 1e-9)}
    return {"tokens": tokens, "lengths": lengths, "mask": mask, "logp": logp, "values": values,
            "advantages": whiten(advantages, mask, lambda x: total(x.item())), "returns": returns,
            "statistics": statistics, "sample": (rows[0]["messages"][-1]["content"],
                                                 at.tokenizer.decode(responses[0]))}


def update(policy, critic, optimizers, rollouts: dict, at: Places) -> dict:
    """Step 4: one gradient step per minibatch, one pass over the rollouts [L2 §3.2.3].

    Two networks and two optimizers: the weight of the value loss ([N+]: 0.1) would change nothing.
    """
    cfg, world, record = at.cfg, at.world, []
    columns = [rollouts[k] for k in ("tokens", "lengths", "mask", "logp", "values", "advantages",
                                     "returns")]
    for rows in minibatches(cfg, world):
        tokens, lengths, mask, old_logp, old_values, advantages, returns = (
            column[rows] for column in columns)
        logp = answer_logprobs(policy, tokens, lengths, mask, cfg.temperature)
        loss, ratio, clipped = policy_loss(logp, old_logp, advantages, mask)
        loss_v = value_loss(values_of(critic, tokens, lengths), old_values, returns, mask)
        away = (ratio.detach() - 1).abs().max().item()
        assert record or away < 1e-6, f"ratio is 1 +- {away} before the first step: not one forward"
        share = mask.sum().item() / scale.all_sum(mask.sum().item(), world)  # of all answer tokens
        ((loss + loss_v) * share * world.dp).backward()  # FSDP averages gradients over its ranks
        norms = [scale.clip(model, 1.0, world) for model in (policy, critic)]
        mean_ratio = ratio.detach()[mask].mean()
        loss, loss_v, clipped, ratio = (scale.all_sum(x.item() * share, world)
                                        for x in (loss, loss_v, clipped, mean_ratio))
        if not all(map(math.isfinite, (loss, loss_v, *norms))):
            raise FloatingPointError(f"policy loss {loss}, value loss {loss_v}, gradient norms "
                                     f"{norms}: PPO diverged; lower --lr {cfg.lr}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        record.append({"policy_loss": loss, "value_loss": loss_v, "clip_frac": clipped,
                       "ratio": ratio, "grad_norm": norms[0]})
    mask, returns = rollouts["mask"].float(), rollouts["returns"]
    spread = [moments(x, mask, lambda x: scale.all_sum(x.item(), world))[1]
              for x in (returns - rollouts["values"], returns)]
    means = {k: data.mean(r[k] for r in record) for k in record[0]}
    return {**means, "explained_variance": 1 - spread[0] / max(spread[1], 1e-12)}


def health(now: dict, start: dict, cfg: Config) -> list[str]:
    """One plain sentence for each thing that usually goes wrong in PPO, where it does.

    now, start: statistics of this iteration and of the first one.
    """
    signs = {
        "KL is negative: sampler and log-probabilities disagree (temperature, mask)":
            now["kl"] < -0.05 - 0.1 * now["kl_k3"],
        "KL runs away: the policy exploits the reward model; raise --beta or lower --lr":
            now["kl"] > 2 * cfg.kl_limit,
        "entropy is gone: every answer is the same; raise --beta":
            now["entropy"] < 0.2 * start["entropy"],
        f"only {now['eos_rate']:.0%} of the answers end: raise --max-new-tokens, or SFT has not "
        "learnt to stop": now["eos_rate"] < 0.9,
        f"answers grow, {start['length']:.0f} -> {now['length']:.0f} tokens: the reward models may "
        "take length for quality": now["length"] > 1.7 * start["length"],
        "the safety gate fires on nearly everything: lower --threshold": now["gate"] > 0.9}
    return [f"health: {sentence}" for sentence, is_ill in signs.items() if is_ill]


@torch.no_grad()
def held_out(policy, ref, sft, at: Places) -> dict[str, float]:
    """Mean reward and KL on validation prompts: what early stopping looks at [L2 §3.2.3].

    kl_sft, kl_start: nats per answer from the SFT model and from PPO's start. gold: the annotator's
    score, reported only, to see the reward model being exploited.
    """
    cfg, world = at.cfg, at.world
    rows = draw_prompts(cfg, at.village, "held out", 2 * cfg.batch_size, "valid")
    prompts, responses, finished = answer(policy, at.tokenizer, [row["messages"] for row in rows],
                                          cfg.temperature, cfg, world, ("held out",))
    batch = pad([(prompts[i], responses[i]) for i in scale.rank_rows(len(rows), world)],
                world.device)
    size = len(scale.rank_rows(cfg.minibatch, world))  # of a forward pass, as in the update
    parts = list(zip(*(column.split(size) for column in batch)))
    logp, start, base = (sum(answer_logprobs(model, *part, cfg.temperature).sum().item()
                             for part in parts) for model in (policy, ref, sft))
    said = at.reward(rows, prompts, responses)
    return {"val_reward": punish_cut(said["combined"], finished).mean().item(),
            "kl_sft": scale.all_sum(logp - base, world) / len(rows),
            "kl_start": scale.all_sum(logp - start, world) / len(rows),
            "reward_helpful": said["helpful"].mean().item(),
            "reward_safety": said["safety"].mean().item(),
            "eos_rate": finished.float().mean().item(),
            **({} if cfg.data else {"gold": gold(at, rows, responses)})}


def ppo(folder: Path, at: Places) -> tuple[M.Llama, dict]:
    """PPO from the last version: the policy with the best held-out reward within the KL limit,
    and its numbers. PPO's start is the first candidate: what PPO returns is never worse there."""
    cfg, world, out = at.cfg, at.world, Path(at.cfg.out)
    sft_path, path = cfg.checkpoint or out / "sft.pt", out / "ppo.state.pt"
    start = out / f"rlhf_v{cfg.rounds}.pt" if cfg.rounds else sft_path
    policy, ref, sft = at.open(start), at.open(start), at.open(sft_path)
    models = {"policy": policy, "critic": open_critic(start, folder, at)}
    optimizers = {k: M.adamw(m, cfg.lr, 0.1) for k, m in models.items()}
    check_same = functools.partial(M.check_resume, cfg=cfg, tokenizer=at.tokenizer.model_bytes)
    saved = scale.load_state(path, models, optimizers, world, check_same) if cfg.resume else None
    log = M.Log("ppo", out, cfg.iterations, saved["step"] if saved else None)
    if saved:
        first, best, initial = saved["step"], saved["best"], saved["initial"]
    else:
        first, initial, metrics = 0, None, held_out(policy, ref, sft, at)
        best = {"step": 0, **metrics, "weights": scale.full_weights(policy, world)}
        log.step(0, **metrics)
    for iteration in range(first, cfg.iterations):
        # 1) rollout  2) score  3) rewards and advantages
        rollouts = roll_out(policy, ref, models["critic"], iteration, at)
        # 4) update
        learnt = update(policy, models["critic"], list(optimizers.values()), rollouts, at)
        # 5) log, and once in a while: samples, held-out prompts, state
        metrics, done = {**rollouts["statistics"], **learnt}, iteration + 1
        initial = initial or rollouts["statistics"]
        evaluates = done % EVERY == 0 or done == cfg.iterations
        if evaluates:
            found = held_out(policy, ref, sft, at)
            metrics |= found
            if found["kl_sft"] <= cfg.kl_limit and found["val_reward"] > best["val_reward"]:
                best = {"step": done, **found, "weights": scale.full_weights(policy, world)}
            print("  {} -> {}".format(*rollouts["sample"]))
        log.step(done, **metrics)
        print("".join(line + "\n" for line in health(rollouts["statistics"], initial, cfg)), end="")
        if evaluates and done < cfg.iterations:
            info = M.resume_info(done, cfg.iterations, cfg, at.tokenizer.model_bytes)
            extra = {**info, "best": best, "initial": initial}
            scale.save_state(path, models, optimizers, extra, world)
        if metrics.get("kl_sft", 0) > cfg.kl_limit or done - best["step"] >= PATIENCE:
            print(f"stopped at iteration {done}: the KL is over its limit, or the held-out reward "
                  f"has not risen for {PATIENCE} iterations")
            break
    scale.load_weights(policy, best.pop("weights"), world)
    return policy, best


# ---------------------------------------------------------------------------- judging the versions


def test_answers(model, rows: dict, at: Places) -> dict:
    """{goal: {"texts", "helpful", "safety"}}: answers at T = 1 and the reward models' scores."""
    found = {}
    for goal, asked in rows.items():
        prompts, responses, _ = answer(model, at.tokenizer, [r["messages"] for r in asked], 1.0,
                                       at.cfg, at.world, ("versions", goal))
        said = at.reward(asked, prompts, responses)
        found[goal] = {"texts": [at.tokenizer.decode(r).strip() for r in responses],
                       "helpful": said["helpful"], "safety": said["safety"]}
    return found


def duel(ours: dict, theirs: dict, rows: dict, annotator) -> dict:
    """Wins / (wins + losses) of one model's answers over another's, by both judges.

    helpful: harmless prompts, harmless: unsafe ones (Fig. 11). A model judged by the reward model
    it was trained on is flattered: hence the second judge [L2 §3.4.1]. The gap of two answers
    changes its sign with their order, so order cannot matter. Of answers to different numbers of
    prompts, the first ones that both have count.
    """
    result, won, decided = {}, 0, 0
    for goal, key, by in (("helpful", "helpful", "helpful"), ("harmless", "safety", "safe")):
        gaps = [annotator.gap(row["messages"], a, b, by) for row, a, b in
                zip(rows[goal], ours[goal]["texts"], theirs[goal]["texts"])]
        wins, losses = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
        won, decided = won + wins, decided + wins + losses
        scored = ours[goal][key][:len(gaps)] - theirs[goal][key][:len(gaps)]
        result |= {f"{goal}_reward_model": (scored > 0).sum().item()
                   / max((scored != 0).sum().item(), 1),  # equal answers decide nothing
                   f"{goal}_annotator": wins / max(wins + losses, 1),
                   f"{goal}_ties": len(gaps) - wins - losses}
    p = won / max(decided, 1)
    low = p - 1.96 * math.sqrt(p * (1 - p) / max(decided, 1))  # of the 95% interval
    return {**result, "annotator": p, "annotator_low": low, "decided": decided}


def compare_versions(policy, at: Places) -> tuple[dict, dict, dict]:
    """({name: duel against SFT, "PPO against V5": duel}, {name: 5-bin histogram, Fig. 20},
    {name: {"reward_helpful", "reward_safety"}: mean raw scores on harmless and unsafe prompts})."""
    cfg, out, n = at.cfg, Path(at.cfg.out), at.cfg.eval_prompts
    rows = {"helpful": at.village.prompts("helpful", "test", 2 * n, 11),
            "harmless": at.village.prompts("unsafe", "test", 2 * n, 11)}
    few = {goal: asked[:n] for goal, asked in rows.items()}
    paths = {"SFT": cfg.checkpoint or out / "sft.pt"}
    paths |= {f"V{i}": out / f"rlhf_v{i}.pt" for i in range(1, cfg.rounds + 1)}
    control = out / "rlhf_control.pt"
    paths |= {"no rejection": control} if cfg.rounds and control.exists() else {}
    last = f"V{cfg.rounds}" if cfg.rounds else "SFT"  # PPO's start, compared on all prompts
    said = {name: test_answers(at.open(path), rows if name == last else few, at)
            for name, path in paths.items()}
    said["PPO"], annotator = test_answers(policy, rows, at), data.Annotator(at.village)
    wins = {name: duel(said[name], said["SFT"], rows, annotator) for name in said if name != "SFT"}
    wins[f"PPO against {last}"] = duel(said["PPO"], said[last], rows, annotator)
    for name, w in wins.items():
        print(f"{name + ('' if ' against ' in name else ' against SFT'):<26}wins, helpful / "
              f"harmless: reward models {w['helpful_reward_model']:.0%} / "
              f"{w['harmless_reward_model']:.0%}, annotator {w['helpful_annotator']:.0%} / "
              f"{w['harmless_annotator']:.0%}; both {w['annotator']:.1%}, at least "
              f"{w['annotator_low']:.1%} (95%), of {w['decided']} decided, "
              f"{w['helpful_ties'] + w['harmless_ties']} ties")
    means = {name: {f"reward_{key}": answers[goal][key].mean().item() for goal, key in
                    (("helpful", "helpful"), ("harmless", "safety"))}
             for name, answers in said.items()}
    return wins, {name: torch.histc(answers["harmless"]["safety"].sigmoid(), 5, 0, 1).tolist()
                  for name, answers in said.items()}, means


def draw(records: list[dict], wins: dict, shifts: dict, out: Path) -> Path:
    """out/figures/ppo.png: Figs. 7, 8, 11 and 20 in miniature, and PPO's reward against its KL."""
    import matplotlib
    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(16, 8))
    (ladder, curve, versions), (shift, bought, course) = axes
    for r in records:
        sizes, (best, median) = list(r["ladder"]), zip(*r["ladder"].values())
        sizes = list(map(int, sizes))
        line, = ladder.plot(sizes, best, "o-", label=f"V{r['round']}: best of N")
        ladder.plot(sizes, median, "x:", color=line.get_color())
        curve.plot(list(map(float, r["curve"])), list(r["curve"].values()), "o-",
                   label=f"for V{r['round']}")
    ladder.set_xscale("log", base=2)
    ladder.set(xlabel="answers per prompt N", ylabel="reward (raw score)",
               title="Best (line) and median (dots) of N (Fig. 7)")
    curve.set(xlabel="sampling temperature", ylabel="reward of the best of K (raw score)",
              title="Which temperature to sample at (Fig. 8)")
    against_sft = {name: w for name, w in wins.items() if " against " not in name}
    for judge, style in (("reward_model", "o"), ("annotator", "s")):
        points = [(100 * w[f"helpful_{judge}"], 100 * w[f"harmless_{judge}"])
                  for w in against_sft.values()]
        versions.plot(*zip(*points), style, label=f"judged by {judge.replace('_', ' ')}")
        for name, point in zip(against_sft, points):
            versions.annotate(name, point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    versions.margins(0.12)  # room for the names
    versions.set(xlabel="helpfulness: wins against SFT (%)", title="Versions (Fig. 11)",
                 ylabel="harmlessness: wins against SFT (%)")
    for name, counts in shifts.items():
        shift.plot([0.1, 0.3, 0.5, 0.7, 0.9], [100 * c / sum(counts) for c in counts], ".-",
                   label=name)
    shift.set(xlabel="sigmoid(safety score) on unsafe prompts", ylabel="answers (%)",
              title="Scores from version to version (Fig. 20)")
    rows = [json.loads(line) for line in (out / "ppo.jsonl").read_text().splitlines()]
    held = [r for r in rows if "val_reward" in r]
    for panel, key, label, color in ((bought, "val_reward", "reward (raw score)", "C0"),
                                     (bought.twinx(), "gold", "gold score", "C1")):
        panel.plot([r["kl_start"] for r in held], [r[key] for r in held], "o", color=color)
        panel.set_ylabel(f"{label} on held-out prompts", color=color)
    bought.set(xlabel="KL from PPO's start (nats per answer)",
               title="PPO: what the KL buys")
    rolled = [r for r in rows if "kl" in r]
    for key in ("reward", "kl", "entropy"):
        course.plot([r["step"] for r in rolled], [r[key] for r in rolled], label=key)
    course.set(xlabel="PPO iteration", ylabel="raw score, nats per answer, nats per token",
               title="PPO: its course")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    path = out / "figures" / "ppo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# ---------------------------------------------------------------------------------------- main


def settings(cfg: Config, dim: int) -> Config:
    """cfg with what depends on the model's size filled in; ValueError for what does not fit."""
    cfg = M.at_size(cfg, PAPER, dim)
    by_size = next(v for width, v in reversed(SIZES.items()) if dim >= width)
    given = {k: v if getattr(cfg, k) is None else getattr(cfg, k)
             for k, v in zip(("rs_lr", "lr", "beta"), by_size)}
    cfg = dataclasses.replace(cfg, **given)
    tiny = 1e-9  # more than 0
    least = {"rounds": 0, "prompts": 1, "samples": 1, "comparisons": 0, "iterations": 0,
             "batch_size": 2, "minibatch": 1, "beta": 0, "max_new_tokens": 1, "eval_prompts": 1,
             "threshold": 0, "temperature": tiny, "lr": tiny, "rs_lr": tiny, "kl_limit": tiny}
    for name, low in least.items():
        if not low <= getattr(cfg, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least {low}")
    if cfg.threshold >= 1:
        raise ValueError(f"--threshold {cfg.threshold}: a probability, as 0.15; 0: calibrated")
    if cfg.batch_size % cfg.minibatch:
        raise ValueError(f"--batch-size {cfg.batch_size} must be a multiple of --minibatch "
                         f"{cfg.minibatch}")
    return cfg


def main(cfg: Config) -> dict:
    """V1 to V5, PPO, evaluation; returns the final metrics. ValueError for what does not fit."""
    began, out = time.time(), Path(cfg.out)
    source = cfg.checkpoint or out / "sft.pt"
    config = scale.shape_of(source, cfg.model, cfg.dry_run)
    cfg = settings(cfg, config.dim)
    if cfg.dry_run:
        length = config.max_seq_len
        scale.dry_run(config, cfg.minibatch, length, recompute=cfg.recompute, tp=cfg.tp,
                      tokens=cfg.iterations * cfg.batch_size * length, device=cfg.device,
                      rollouts=cfg.batch_size)
        return {}
    info = M.load(source, "cpu")[1]
    world = scale.setup(cfg.device, cfg.tp)
    print(kernels.choose(cfg.kernels, world.device))
    at = Places(cfg, data.Tokenizer(info["tokenizer"]), data.World(), world)
    records, folder = all_versions(at)
    policy, best = ppo(folder, at)
    final = {**best, "kl": best["kl_sft"], "rounds": records}
    if not cfg.data:
        def give(model, dialogs, temperature):
            _, responses, finished = answer(model, at.tokenizer, dialogs, temperature, cfg, world,
                                            ("examination",))
            texts = [at.tokenizer.decode(r).strip() for r in responses]
            return texts, finished.float().mean().item()

        examine = data.Annotator(at.village).examine
        final |= examine(functools.partial(give, policy), cfg.eval_prompts)
        if cfg.rounds and (out / "rlhf_control.pt").exists():
            print("the control, trained as long on SFT's own answers, none rejected:")
            control = functools.partial(give, at.open(out / "rlhf_control.pt"))
            final["no_rejection"] = examine(control, cfg.eval_prompts, temperatures=(0.5,))
        final["win_rates"], shifts, final["versions"] = compare_versions(policy, at)
        final |= final["versions"]["PPO"]
    final["minutes"] = (time.time() - began) / 60
    save(out / "ppo.pt", policy, "ppo", final, at)
    if world.is_main:
        M.summarize("ppo", out, final)
        if not cfg.data:
            if not cfg.checkpoint:  # what SFT's answers score could not be known before
                M.summarize("sft", out, {**final["versions"]["SFT"], "kl": 0.0}, add=True)
            print(f"figures: {draw(records, final['win_rates'], shifts, out)}")
        print(f"wrote {out}/ppo.pt (PPO iteration {best['step']}, KL {final['kl']:.2f} nats from "
              f"SFT); next: python gatt.py")
        (out / "rlhf.state.json").unlink(missing_ok=True)
    scale.remove_state(out / "ppo.state.pt", world)
    scale.finish(world)
    return final


if __name__ == "__main__":
    M.run(main, Config)
