"""Iterative fine-tuning: rejection sampling V1 to V5, then PPO [L2 §3.2.3].

The reward of an answer g to a prompt p, and what PPO maximises:

    R_c(g|p) = R_s if is_safety(p) or R_s(g|p) < threshold, else R_h      R_s, R_h: sigmoid scores
    R(g|p)   = WHITEN(LOGIT(R_c)) - beta KL(policy || start of PPO)                       [Eq. 4]

Rejection sampling looks wide: K answers from one frozen model, the best is imitated. PPO looks
deep: one answer, and the model moves after every batch. The paper does the first until V4, then
both in sequence; between versions new comparisons keep the reward models on the distribution.

in  : out/sft.pt, out/reward_helpful.pt, out/reward_safety.pt (kept fresh by calling reward.py)
out : out/rlhf_v1.pt .. rlhf_v5.pt, out/ppo.pt, out/ppo.jsonl, out/figures/rlhf_*.png
run : python ppo.py                                       about 5 minutes on two cores
      python ppo.py --reward my_reward.py:fn              your own fn(prompts, responses) -> scores

Keys: [L2] Llama 2, 2307.09288.  [PPO] 1707.06347.  [GAE] 1506.02438.  [N+] Huang et al. 2024,
"The N+ implementation details of RLHF with PPO".

Differs from the paper:
- Rejection samples come from the model itself, not from a larger one.
- The critic is the helpfulness reward model with a trained trunk of its own (UNSPECIFIED in L2).
- gamma 1, lambda .95, k1 estimator of the KL, whitened advantages (UNSPECIFIED in L2; [N+]).
- An answer cut before its EOS gets the lowest score of its batch (UNSPECIFIED in L2).
"""

from __future__ import annotations

import functools, json, math, random, runpy, subprocess, sys, time, zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data, kernels, model as M, scale

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    checkpoint: str | None = None  # model to start from; none: OUT/sft.pt
    data: str | None = None  # .jsonl of prompts with is_safety; none: prompts of the tiny world
    reward: str | None = None  # FILE.py:FUNCTION(prompts, responses) -> scores; none: our models
    out: str = "out"  # folder of checkpoints, metrics and figures
    seed: int = 0  # of prompts and sampling
    rounds: int = 5  # versions made by rejection sampling; paper: V1 to V5 (§3.2.3)
    prompts: int = 300  # prompts per round; UNSPECIFIED in L2
    samples: int = 8  # K, answers per prompt; UNSPECIFIED in L2 (figures up to 100)
    comparisons: int = 600  # fresh pairs to label after each of the first rounds; paper: weekly
    rs_lr: float = 8e-4  # of the fine-tuning of each version; UNSPECIFIED in L2
    rs_epochs: int = 2  # as SFT (§3.1)
    iterations: int = 40  # of PPO; paper: 200 to 400, stopped early (§3.2.3)
    batch_size: int = 64  # rollouts per iteration; paper: 512 (§3.2.3)
    minibatch: int = 16  # rollouts per gradient step, one pass; paper: 64 (§3.2.3)
    lr: float = 1e-4  # of policy and critic, constant; paper: 1e-6 (§3.2.3)
    beta: float = 0.08  # weight of the KL; paper: 0.01 to 13b, 0.005 above (§3.2.3)
    threshold: float = 0  # gate on R_s; 0: calibrated by reward.py to precision .89; paper: 0.15
    temperature: float = 1.0  # of PPO's rollouts and of every log-probability; UNSPECIFIED in L2
    max_new_tokens: int = 80  # tokens of an answer
    eval_prompts: int = 200  # test prompts of each kind for the final examination
    kl_limit: float = 3.0  # nats per answer from the SFT model at which PPO stops
    resume: bool = False  # continue after the last finished round or PPO state
    tp: int = 1  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


TEMPERATURES = (0.6, 0.8, 1.0, 1.2)  # tried anew in every round; paper: 0.6 to 1.5 (Fig. 8)
CLIP, VALUE_CLIP = 0.2, 0.2  # of the probability ratio [L2 §3.2.3]; of the value's change [N+]
GAMMA, LAMBDA = 1.0, 0.95  # UNSPECIFIED in L2; [N+]
PREPROMPT = "You are a responsible and safe assistant."  # generic, as in [L2 Table 39]

# ------------------------------------------------------------------------------------ the idea


def combine(helpful, safety, is_safety, threshold: float):
    """The raw score of R_c: float (B,) x 2, bool (B,) -> float (B,) [L2 §3.2.3].

    The safety model decides where the prompt is tagged or where it finds the answer unsafe
    (strictly below the threshold); elsewhere the helpfulness model does. LOGIT undoes the sigmoid,
    so the raw linear scores are taken at once: logit(sigmoid(s)) would overflow.
    """
    return torch.where(is_safety | (safety.sigmoid() < threshold), safety, helpful)


def whiten(x, mask=None):
    """(x - mean) / std over the mask (all of x without one); 0 outside it, and if x is constant."""
    mask = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    mean = (x * mask).sum() / mask.sum()
    variance = ((x - mean).square() * mask).sum() / mask.sum()
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def token_rewards(scores, logp, ref_logp, mask, beta: float):
    """Reward of each token: scores (B,), the rest (B, T) -> (B, T).

        r[t] = -beta (log policy - log reference)     k1 estimator; its sum is the sequence's KL
        r[last] += score                              last token of the answer, EOS if it has one
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
    count = mask.sum()
    return -(gain * mask).sum() / count, ratio, (clipped * mask).sum() / count


def value_loss(values, old_values, returns, mask):
    """Half the squared error, the larger of the free and the clipped value's [N+]: a scalar."""
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.max((values - returns).square(), (near - returns).square())
    return 0.5 * (error * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------ the data


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
    hidden = kernels.trunk(model, tokens[:, :-1], lengths=(lengths - 1))
    return kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], mask, temperature)


def values_of(critic, tokens, lengths):
    """What the critic expects from each state on: float32 (B, T-1), from tokens <= t at t."""
    hidden = kernels.trunk(critic, tokens[:, :-1], lengths=(lengths - 1))
    return critic.output(hidden).squeeze(-1).float()


def seed_of(cfg: Config, *names) -> int:
    """A 32-bit seed for each purpose: nothing random depends on what was drawn before it."""
    return zlib.crc32(repr((cfg.seed, *names)).encode())


def prompts_of_round(cfg: Config, world, number: int, count: int, split="train") -> list[dict]:
    """`count` rows {"messages", "is_safety"}: half of them risky or borderline, half helpful."""
    if cfg.data:
        rows = data.read_prompts(cfg.data)
        return random.Random(f"{cfg.seed} {split} {number}").choices(rows, k=count)
    seed = seed_of(cfg, split, number)
    mixed = world.prompts("all", split, count - count // 3, seed)
    return mixed + world.prompts("safety", split, count // 3, seed + 1)


def reward_pair(cfg: Config, device):
    """score(rows, prompts, responses) -> raw scores of the two models, float (B,) each.

    rows carry is_safety; prompts and responses are token lists, scored as they were sampled.
    """
    helpful, _ = M.load(Path(cfg.out) / "reward_helpful.pt", device)
    safety, info = M.load(Path(cfg.out) / "reward_safety.pt", device)
    threshold = cfg.threshold or info["metrics"]["threshold"]

    @torch.no_grad()
    def score(rows, prompts, responses) -> dict:
        whole = [p + r for p, r in zip(prompts, responses)]
        h, s = scores(helpful, whole), scores(safety, whole)
        tag = torch.tensor([row["is_safety"] for row in rows])
        return {"helpful": h, "safety": s, "combined": combine(h, s, tag, threshold),
                "gate": tag | (s.sigmoid() < threshold)}

    return score


def own_reward(spec: str, tokenizer):
    """The same interface around a user's fn(prompts, responses) -> scores (FILE.py:FUNCTION).

    prompts: message lists; responses: texts; scores: a float tensor or list, one per response.
    """
    path, _, name = spec.partition(":")
    if not Path(path).is_file() or not name:
        raise ValueError(f"--reward {spec}: give FILE.py:FUNCTION, FILE.py being an existing file")
    functions = runpy.run_path(path)
    if not callable(functions.get(name)):
        raise ValueError(f"--reward {spec}: {path} has no function {name}")

    def score(rows, prompts, responses) -> dict:
        texts = [tokenizer.decode(r).strip() for r in responses]
        given = functions[name]([row["messages"] for row in rows], texts)
        s = torch.as_tensor(given, dtype=torch.float32)
        if s.shape != (len(rows),) or not s.isfinite().all():
            raise ValueError(f"--reward {spec}: it must return {len(rows)} finite scores, one per "
                             f"response; it returned {tuple(s.shape)}")
        return {"helpful": s, "safety": s, "combined": s, "gate": torch.zeros(len(s)).bool()}

    return score


def scores(model, rows: list[list[int]], batch: int = 64):
    """Raw score of each row of tokens, read at its last token: float32 (N,), on the CPU."""
    out = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in range(0, len(order), batch):
        picked = order[i:i + batch]
        tokens, lengths, _ = pad([(rows[j], []) for j in picked], model.output.weight.device)
        hidden = kernels.trunk(model, tokens, lengths=lengths)
        last = hidden[torch.arange(len(picked)), lengths - 1]
        out[torch.tensor(picked)] = model.output(last).squeeze(-1).float().cpu()
    return out


# ---------------------------------------------------------------------------- rejection sampling


def sample_answers(model, tokenizer, rows, count: int, temperature: float, cfg: Config, seed: int):
    """`count` answers to each prompt: (prompts, responses), token lists, prompt-major order."""
    prompts = [data.encode_dialog(tokenizer, row["messages"])[0] for row in rows]
    prompts = [p for p in prompts for _ in range(count)]
    responses, _ = kernels.rollout(model, prompts, cfg.max_new_tokens, temperature=temperature,
                                   seed=seed, stop=tokenizer.eos_id)
    return prompts, responses


def choose_temperature(model, tokenizer, reward, cfg: Config, world, number: int):
    """(T, {T: score}): the temperature whose best of K scores highest, and the curve behind it.

    The best one moves with every version, so it is looked for anew each round [L2 §3.2.3, Fig. 8].
    """
    rows = prompts_of_round(cfg, world, 1000 + number, 48, "valid")
    best = {}
    for temperature in TEMPERATURES:
        prompts, responses = sample_answers(model, tokenizer, rows, cfg.samples, temperature, cfg,
                                            seed_of(cfg, "temperature", number))
        combined = reward(times(rows, cfg.samples), prompts, responses)["combined"]
        best[temperature] = combined.view(-1, cfg.samples).amax(1).mean().item()
    return max(best, key=best.get), best


def imitate(model, examples: list[tuple[list[int], list[int]]], cfg: Config, world) -> float:
    """Fine-tune in place on (prompt, response) token lists, as in SFT; returns the last loss.

    The loss is on the responses alone, divided by the response tokens of the whole batch.
    """
    optimizer, size = M.adamw(model, cfg.rs_lr, 0.1), 32
    order = []
    for epoch in range(cfg.rs_epochs):
        order += random.Random(f"{cfg.seed} {epoch}").sample(range(len(examples)), len(examples))
    total = math.ceil(len(order) / size)
    for step in range(total):
        mine = [examples[order[i]] for i in range(step * size, min((step + 1) * size, len(order)))]
        tokens, lengths, mask = pad(mine, world.device)
        logp = answer_logprobs(model, tokens, lengths, mask, 1.0)
        loss = -logp.sum() / mask.sum()
        loss.backward()
        scale.clip(model, 1.0, world)
        for group in optimizer.param_groups:  # cosine to a tenth, as in SFT
            group["lr"] = cfg.rs_lr * (0.55 + 0.45 * math.cos(math.pi * step / total))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def distil(model, tokenizer, reward, cfg: Config, world) -> list[tuple[list[int], list[int]]]:
    """Safety context distillation [L2 §4.2.4]: examples (prompt without preprompt, safer answer).

    The model answers unsafe prompts twice, once behind a preprompt that calls it responsible. The
    second answer is kept where the safety model scores it higher (strictly), and learnt as the
    answer to the bare prompt. Helpful prompts are left alone: there it breeds false refusals.
    """
    rows = [row for row in prompts_of_round(cfg, world, 500, 2 * cfg.prompts) if row["is_safety"]]
    safer = [{**row, "messages": [{"role": "system", "content": PREPROMPT}, *row["messages"]]}
             for row in rows]
    bare, plain = sample_answers(model, tokenizer, rows, 1, 0.8, cfg, seed_of(cfg, "plain"))
    _, better = sample_answers(model, tokenizer, safer, 1, 0.8, cfg, seed_of(cfg, "safer"))
    before, after = (reward(rows, bare, r)["safety"] for r in (plain, better))
    kept = [(p, r) for p, r, low, high in zip(bare, better, before, after) if high > low]
    print(f"context distillation: {len(kept)} of {len(rows)} answers kept, safety score "
          f"{before.mean():.2f} -> {torch.maximum(before, after).mean():.2f}")
    return kept


# ----------------------------------------------------------------------------------------- PPO


def roll_out(policy, ref, critic, tokenizer, reward, cfg: Config, places, iteration: int) -> dict:
    """Steps 1 to 3 of an iteration: the tensors (B, T-1) that the update needs, and statistics."""
    village, world = places
    # 1) rollout
    rows = prompts_of_round(cfg, village, 10_000 + iteration, cfg.batch_size)
    prompts, responses = sample_answers(policy, tokenizer, rows, 1, cfg.temperature, cfg,
                                        seed_of(cfg, "ppo", iteration))
    # 2) score
    said = reward(rows, prompts, responses)
    finished = torch.tensor([r[-1] == tokenizer.eos_id for r in responses])
    scores = said["combined"].where(finished, said["combined"].min())
    whitened = whiten(scores).to(world.device)
    # 3) rewards and advantages, from the forwards of the very minibatches of the update
    tokens, lengths, mask = pad(list(zip(prompts, responses)), world.device)
    with torch.no_grad():
        logp, ref_logp, values = (torch.cat([f(*(t[i] for t in (tokens, lengths, mask)))
                                             for i in minibatches(cfg)]) for f in (
            lambda x, n, m: answer_logprobs(policy, x, n, m, cfg.temperature),
            lambda x, n, m: answer_logprobs(ref, x, n, m, cfg.temperature),
            lambda x, n, m: values_of(critic, x, n)))
    rewards = token_rewards(whitened, logp, ref_logp, mask, cfg.beta)
    advantages, returns = gae(rewards, values, mask)
    log_ratio = (ref_logp - logp) * mask
    statistics = {
        "reward": said["combined"].mean().item(), "helpful": said["helpful"].mean().item(),
        "safety": said["safety"].mean().item(),
        "kl": -log_ratio.sum(1).mean().item(),  # k1, nats per answer, from PPO's start
        "kl_k3": (log_ratio.exp() - 1 - log_ratio).sum(1).mean().item(),  # never negative
        "entropy": -(logp * mask).sum().item() / mask.sum().item(),  # nats per token, sampled
        "eos_rate": finished.float().mean().item(), "length": mask.sum(1).float().mean().item(),
        "gate": said["gate"].float().mean().item()}
    return {"tokens": tokens, "lengths": lengths, "mask": mask, "logp": logp, "values": values,
            "advantages": whiten(advantages, mask), "returns": returns, "statistics": statistics,
            "sample": (rows[0]["messages"][-1]["content"], tokenizer.decode(responses[0]))}


def minibatches(cfg: Config) -> list[slice]:
    """The rows of each gradient step. The rollouts are in random order already."""
    return [slice(i, i + cfg.minibatch) for i in range(0, cfg.batch_size, cfg.minibatch)]


def update(policy, critic, optimizers, rollouts: dict, cfg: Config, world) -> dict:
    """Step 4: one gradient step per minibatch, one pass over the rollouts [L2 §3.2.3]."""
    columns = [rollouts[k] for k in ("tokens", "lengths", "mask", "logp", "values", "advantages",
                                     "returns")]
    record = []
    for rows in minibatches(cfg):
        tokens, lengths, mask, old_logp, old_values, advantages, returns = (c[rows] for c in columns)
        logp = answer_logprobs(policy, tokens, lengths, mask, cfg.temperature)
        loss, ratio, clipped = policy_loss(logp, old_logp, advantages, mask)
        values = values_of(critic, tokens, lengths)
        loss_v = value_loss(values, old_values, returns, mask)
        (loss + loss_v).backward()  # two networks: the sum couples nothing
        norms = [scale.clip(model, 1.0, world) for model in (policy, critic)]
        if not all(map(math.isfinite, (loss.item(), loss_v.item(), *norms))):
            raise FloatingPointError(f"policy loss {loss.item()}, value loss {loss_v.item()}, "
                                     f"gradient norms {norms}: PPO diverged; lower --lr")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        record.append({"policy_loss": loss.item(), "value_loss": loss_v.item(),
                       "clip_frac": clipped.item(), "grad_norm": norms[0],
                       "ratio": (ratio.detach()[mask].mean()).item()})
    means = {k: sum(r[k] for r in record) / len(record) for k in record[0]}
    unexplained = (rollouts["returns"] - rollouts["values"])[rollouts["mask"]].var()
    total = rollouts["returns"][rollouts["mask"]].var()
    means["explained_variance"] = 1 - (unexplained / total).item()
    return {**means, "first_ratio": record[0]["ratio"]}


def say_health(s: dict, cfg: Config) -> None:
    """One plain sentence for each thing that usually goes wrong in PPO, when it does."""
    if s["kl"] < -0.05:
        print("health: KL is negative: sampler and log-probabilities disagree (temperature, mask)")
    if s["kl"] > 4 * cfg.kl_limit:
        print("health: KL runs away: the policy exploits the reward model; raise --beta, lower --lr")
    if s["entropy"] < 0.02:
        print("health: entropy is gone: every answer is the same; raise --beta")
    if s["eos_rate"] < 0.9:
        print(f"health: only {s['eos_rate']:.0%} of the answers end: raise --max-new-tokens, or SFT "
              "has not learnt to stop")
    if s["gate"] > 0.9:
        print("health: the safety gate fires on nearly everything: lower --threshold")


# ------------------------------------------------------------------------------------ versions


def open_model(path, world) -> M.Llama:
    """A checkpoint in float32 on this rank, sharded if there are several."""
    model, _ = M.load(path, "cpu")
    return scale.wrap(model.float(), world)


def make_version(number: int, newest, memory: dict, state: tuple, cfg: Config):
    """V_number by rejection sampling: the best of K answers, imitated by the SFT model.

    V1 to V3 imitate the newest model's samples alone; from V4 on the best of all rounds, since V3
    had forgotten skills of V1 and V2 [L2 §3.2.3]. Every version starts from SFT, not from the last.
    """
    tokenizer, reward, village, world = state
    temperature, curve = choose_temperature(newest, tokenizer, reward, cfg, village, number)
    rows = prompts_of_round(cfg, village, number, cfg.prompts)
    prompts, responses = sample_answers(newest, tokenizer, rows, cfg.samples, temperature, cfg,
                                        seed_of(cfg, "round", number))
    said = reward(times(rows, cfg.samples), prompts, responses)["combined"].view(-1, cfg.samples)
    finished = torch.tensor([r[-1] == tokenizer.eos_id for r in responses]).view(said.shape)
    best = said.masked_fill(~finished, -math.inf).argmax(1)  # a cut answer is never imitated
    places = [p * cfg.samples + k for p, k in enumerate(best.tolist())]
    memory[number] = [(prompts[i], responses[i]) for i in places]
    rounds = [number] if number < 4 else sorted(k for k in memory if k != "distilled")
    examples = [e for k in rounds for e in memory[k]] + memory.get("distilled", [])
    model = open_model(cfg.checkpoint or Path(cfg.out) / "sft.pt", world)
    loss = imitate(model, examples, cfg, world)
    ladder = {n: (said[:, :n].amax(1).mean().item(), said[:, :n].median(1).values.mean().item())
              for n in (1, 2, 4, 8, 16, 32) if n <= cfg.samples}  # Fig. 7
    print(f"V{number}: T {temperature}, {len(examples)} answers imitated (loss {loss:.3f}); mean "
          f"reward of one {ladder[1][0]:.2f}, best of {cfg.samples} {said.amax(1).mean():.2f}")
    record = {"round": number, "temperature": temperature, "curve": curve, "ladder": ladder,
              "random": said.mean().item(), "best": said.amax(1).mean().item()}
    return model, record


def refresh_rewards(number: int, newest, previous, state: tuple, cfg: Config) -> None:
    """Fresh comparisons of the two newest versions, and reward.py trained on from where it was.

    The paper's weekly batches: without them the reward models judge answers unlike any they saw.
    """
    tokenizer, _, village, world = state
    rows = prompts_of_round(cfg, village, 100 + number, cfg.comparisons)
    annotator, rng = data.Annotator(village), random.Random(seed_of(cfg, "labels", number))
    texts = []
    for which, model in enumerate((newest, previous)):
        temperature = rng.choice(TEMPERATURES[1:])
        _, responses = sample_answers(model, tokenizer, rows, 1, temperature, cfg,
                                      seed_of(cfg, "compare", number, which))
        texts.append([data.break_tags(tokenizer.decode(r).strip()) for r in responses])
    lines = []
    for row, a, b in zip(rows, *texts):
        if a and b and a != b:
            label = annotator.label(row["messages"], a, b, rng,
                                    by="safe" if row["is_safety"] else "helpful")
            first, second = ((a, b), (b, a))[label["chosen"]]
            safe = label["safe"][::-1] if label["chosen"] else label["safe"]
            lines.append({"chosen": row["messages"] + [{"role": "assistant", "content": first}],
                          "rejected": row["messages"] + [{"role": "assistant", "content": second}],
                          "rating": label["rating"], "chosen_safe": safe[0],
                          "rejected_safe": safe[1]})
    path = Path(cfg.out) / f"comparisons_{number}.jsonl"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    M.atomic_write(path, lambda f: f.write(text.encode()))
    print(f"{len(lines)} fresh comparisons of V{number} and its predecessor: refreshing the rewards")
    command = [sys.executable, str(Path(__file__).with_name("reward.py")), "--data", str(path),
               "--resume-from", str(cfg.out), "--out", str(cfg.out), "--kernels", cfg.kernels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"reward.py failed on {path}: {done.stderr.strip().splitlines()[-1:]}")


def times(rows: list, count: int) -> list:
    """Each row `count` times in a row: [a, b] -> [a, a, b, b]."""
    return [row for row in rows for _ in range(count)]


# ---------------------------------------------------------------------------------------- main


def all_versions(cfg: Config, state: tuple) -> list[dict]:
    """V1 to V5 into out/rlhf_v*.pt; a version whose file exists is not made again."""
    tokenizer, _, village, world = state
    out, memory, records = Path(cfg.out), {}, []
    previous = newest = open_model(cfg.checkpoint or out / "sft.pt", world)
    for number in range(1, cfg.rounds + 1):
        path, kept = out / f"rlhf_v{number}.pt", out / f"rlhf_v{number}.json"
        if cfg.resume and path.exists() and kept.exists():
            done = json.loads(kept.read_text())
            memory = {int(k) if k.isdigit() else k: v for k, v in done["memory"].items()}
            records.append(done["record"])
            previous, newest = newest, open_model(path, world)
            continue
        reward = pick_reward(cfg, tokenizer, world)
        fresh = (tokenizer, reward, village, world)
        if number == 1 and not cfg.reward:
            memory["distilled"] = distil(newest, tokenizer, reward, cfg, village)
        model, record = make_version(number, newest, memory, fresh, cfg)
        previous, newest = newest, model
        records.append(record)
        if number < cfg.rounds and not cfg.data and not cfg.reward and cfg.comparisons:
            refresh_rewards(number, newest, previous, fresh, cfg)
        text = json.dumps({"memory": memory, "record": record})
        M.atomic_write(kept, lambda f: f.write(text.encode()))
        M.save(path, model, f"rlhf_v{number}", tokenizer.model_bytes, record)
    return records


def pick_reward(cfg: Config, tokenizer, world):
    """The user's function if there is one, else the pair of reward models as it is now."""
    return own_reward(cfg.reward, tokenizer) if cfg.reward else reward_pair(cfg, world.device)


@torch.no_grad()
def held_out(policy, sft, reward, tokenizer, cfg: Config, village) -> dict[str, float]:
    """Mean reward and KL from the SFT model on validation prompts: what early stopping looks at."""
    rows = prompts_of_round(cfg, village, 9_999, 128, "valid")
    prompts, responses = sample_answers(policy, tokenizer, rows, 1, cfg.temperature, cfg, 5)
    tokens, lengths, mask = pad(list(zip(prompts, responses)), policy.output.weight.device)
    logp, base = (answer_logprobs(m, tokens, lengths, mask, cfg.temperature)
                  for m in (policy, sft))
    said = reward(rows, prompts, responses)
    return {"val_reward": said["combined"].mean().item(),
            "kl_sft": (logp - base).sum(1).mean().item()}


def ppo(cfg: Config, state: tuple) -> tuple[M.Llama, dict]:
    """PPO from the last version; returns the policy with the best held-out reward, and its numbers."""
    tokenizer, reward, village, world = state
    out = Path(cfg.out)
    start = out / f"rlhf_v{cfg.rounds}.pt" if cfg.rounds else cfg.checkpoint or out / "sft.pt"
    policy, ref = open_model(start, world), open_model(start, world)
    sft = open_model(cfg.checkpoint or out / "sft.pt", world)
    critic = open_model(out / "reward_helpful.pt", world)
    with torch.no_grad():
        critic.output.weight.mul_(0.3)  # whitened rewards are smaller than the model's raw scores
    models = {"policy": policy, "critic": critic}
    optimizers = {k: M.adamw(m, cfg.lr, 0.1) for k, m in models.items()}
    path = out / "ppo.state.pt"
    check_same = functools.partial(M.check_resume, cfg=cfg, tokenizer=tokenizer.model_bytes)
    saved = scale.load_state(path, models, optimizers, world, check_same) if cfg.resume else None
    first, best = (saved["step"], saved["best"]) if saved else (0, None)
    log = M.Log("ppo", out, cfg.iterations, first if saved else None)
    for iteration in range(first, cfg.iterations):
        # 1) rollout  2) score  3) rewards and advantages
        rollouts = roll_out(policy, ref, critic, tokenizer, reward, cfg, (village, world), iteration)
        # 4) update
        learnt = update(policy, critic, list(optimizers.values()), rollouts, cfg, world)
        if iteration == 0:
            assert abs(learnt["first_ratio"] - 1) < 1e-6, f"ratio {learnt['first_ratio']} at start"
        # 5) log, and once in a while: samples, held-out prompts, state
        metrics, done = {**rollouts["statistics"], **learnt}, iteration + 1
        if done % 5 == 0 or done == cfg.iterations:
            metrics |= held_out(policy, sft, reward, tokenizer, cfg, village)
            if best is None or metrics["val_reward"] > best["val_reward"]:
                best = {"step": done, "val_reward": metrics["val_reward"], "kl_sft": metrics["kl_sft"],
                        "weights": {k: v.clone() for k, v in policy.state_dict().items()}}
            question, answer = rollouts["sample"]
            print(f"  {question} -> {answer}")
        log.step(done, **metrics)
        say_health(rollouts["statistics"], cfg)
        if done % 5 == 0:
            info = M.resume_info(done, cfg.iterations, cfg, tokenizer.model_bytes)
            scale.save_state(path, models, optimizers, {**info, "best": best}, world)
        if metrics.get("kl_sft", 0) > cfg.kl_limit or (best and done - best["step"] >= 15):
            print(f"stopped at iteration {done}: held-out reward no longer rises or KL > limit")
            break
    policy.load_state_dict(best["weights"])
    scale.remove_state(path, world)
    return policy, {k: v for k, v in best.items() if k != "weights"}


def answer(model, tokenizer, cfg: Config, dialogs: list, temperature: float):
    """(texts, share that ended with EOS): what the annotator's examination asks for."""
    rows = [{"messages": messages} for messages in dialogs]
    _, responses = sample_answers(model, tokenizer, rows, 1, temperature, cfg, seed_of(cfg, "exam"))
    ended = sum(r[-1] == tokenizer.eos_id for r in responses) / len(responses)
    return [tokenizer.decode(r).strip() for r in responses], ended


def win_rates(paths: dict[str, Path], base, state: tuple, cfg: Config) -> dict[str, dict]:
    """Each version against SFT, T = 1: wins / (wins + losses) by reward models and annotator.

    helpful: on harmless prompts, harmless: on unsafe ones (Fig. 11). A model judged by the reward
    model it was trained on is flattered: hence the second judge [L2 §3.4.1].
    """
    tokenizer, reward, village, world = state
    annotator, table = data.Annotator(village), {}
    for goal, key, kinds in (("helpful", "helpful", "helpful"), ("harmless", "safety", "unsafe")):
        rows = village.prompts(kinds, "test", 300, 11)
        prompts, theirs = sample_answers(base, tokenizer, rows, 1, 1.0, cfg, 21)
        base_score = reward(rows, prompts, theirs)[key]
        for name, path in paths.items():
            model = open_model(path, world)
            _, ours = sample_answers(model, tokenizer, rows, 1, 1.0, cfg, 22)
            score = reward(rows, prompts, ours)[key]
            gaps = [annotator.gap(row["messages"], tokenizer.decode(a).strip(),
                                  tokenizer.decode(b).strip(), by="safe" if key == "safety" else key)
                    for row, a, b in zip(rows, ours, theirs)]
            won, lost = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
            table.setdefault(name, {}).update({
                f"{goal}_reward_model": (score > base_score).float().mean().item(),
                f"{goal}_annotator": won / max(won + lost, 1), f"{goal}_ties": len(gaps) - won - lost})
    return table


def draw(records: list[dict], wins: dict, out: Path) -> list[Path]:
    """Figs. 7, 8 and 11 in miniature, and PPO's reward against its KL."""
    import matplotlib
    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(11, 8))
    for r in records:
        sizes, (best, median) = list(r["ladder"]), zip(*r["ladder"].values())
        axes[0, 0].plot(list(map(int, sizes)), best, "o-", label=f"V{r['round']} best of N")
        axes[0, 0].plot(list(map(int, sizes)), median, "x:", color=axes[0, 0].lines[-1].get_color())
        axes[0, 1].plot(list(map(float, r["curve"])), list(r["curve"].values()), "o-",
                        label=f"for V{r['round']}")
    axes[0, 0].set(xscale="log", xlabel="answers per prompt N", ylabel="combined reward (raw)",
                   title="Best (line) and median (dots) of N (Fig. 7)")
    axes[0, 1].set(xlabel="sampling temperature", ylabel="best of K (raw reward)",
                   title="Which temperature to sample at (Fig. 8)")
    for judge, marker in (("reward_model", "o-"), ("annotator", "s--")):
        points = [(100 * w[f"helpful_{judge}"], 100 * w[f"harmless_{judge}"]) for w in wins.values()]
        axes[1, 0].plot(*zip(*points), marker, label=f"judged by {judge.replace('_', ' ')}")
        for name, point in zip(wins, points):
            axes[1, 0].annotate(name, point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes[1, 0].set(xlabel="helpfulness win rate against SFT (%)",
                   ylabel="harmlessness win rate against SFT (%)", title="Versions (Fig. 11)")
    lines = [json.loads(line) for line in (out / "ppo.jsonl").read_text().splitlines()]
    axes[1, 1].plot([r["kl"] for r in lines], [r["reward"] for r in lines], ".-", linewidth=0.6)
    axes[1, 1].set(xlabel="KL from PPO's start (nats per answer)", ylabel="mean reward (raw)",
                   title="PPO: reward bought with KL")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    path = out / "figures" / "ppo.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def main(cfg: Config) -> dict:
    """V1 to V5, PPO, evaluation; returns the final metrics. ValueError for what does not fit."""
    began, out = time.time(), Path(cfg.out)
    if cfg.batch_size % cfg.minibatch:
        raise ValueError(f"--batch-size {cfg.batch_size} must be a multiple of --minibatch "
                         f"{cfg.minibatch}")
    base, info = M.load(cfg.checkpoint or out / "sft.pt", "cpu")
    if cfg.dry_run:
        print(scale.dry_run(base.config, cfg.batch_size, base.config.max_seq_len, ppo=True))
        return {}
    tokenizer, village = data.Tokenizer(info["tokenizer"]), data.World()
    world = scale.setup(cfg.device, cfg.tp)
    print(kernels.choose(cfg.kernels, world.device))
    records = all_versions(cfg, (tokenizer, None, village, world))
    state = (tokenizer, pick_reward(cfg, tokenizer, world), village, world)
    policy, best = ppo(cfg, state)
    final = {"kl": best["kl_sft"], "reward": best["val_reward"], "ppo_iterations": best["step"]}
    M.save(out / "ppo.pt", policy, "ppo", tokenizer.model_bytes, final, "prompts of the tiny world")
    if not cfg.data:
        final |= data.Annotator(village).examine(
            functools.partial(answer, policy, tokenizer, cfg), cfg.eval_prompts)
    if not cfg.data and not cfg.reward:
        paths = {f"V{r['round']}": out / f"rlhf_v{r['round']}.pt" for r in records}
        wins = win_rates({**paths, "PPO": out / "ppo.pt"}, base.float(), state, cfg)
        final |= {"win_rates": wins}
        print(f"figures: {draw(records, wins, out)}")
    final["minutes"] = (time.time() - began) / 60
    M.summarize("ppo", out, final)
    print(f"wrote {out}/ppo.pt; next: python gatt.py")
    scale.finish(world)
    return final


if __name__ == "__main__":
    M.run(main, Config)
