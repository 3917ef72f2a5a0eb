"""PPO: the policy follows the reward, one batch of its own answers after another [L2 §3.2.3].

The reward of an answer g to a prompt p, and what PPO maximises:

    R_c(g|p) = R_s if is_safety(p) or R_s(g|p) < threshold, else R_h      R_s, R_h: sigmoid scores
    R(g|p)   = WHITEN(LOGIT(R_c)) - beta KL(policy || start of PPO)                       [Eq. 4]

Rejection sampling (rejection.py) looks wide: K answers from one frozen model, the best is imitated.
PPO looks deep: one answer, and the model moves after every batch. One iteration, in the order in
which `train` has it:

    1) rollout     an answer to each prompt of the batch, sampled at temperature 1
    2) score       R_c of each by the two reward models, whitened over the batch
    3) advantages  per token: reward = -beta (log policy - log reference), + score on the last;
                   what the critic did not expect, summed up backwards (GAE)
    4) update      per minibatch: clipped policy loss, value loss, one step of both networks

in  : out/rlhf_v5.pt (where PPO starts), out/sft.pt, and the newest reward models
out : out/ppo.pt, out/ppo.jsonl
run : python ppo.py                                       about 1 minute on two AVX2 cores
      python ppo.py --reward my_reward.py:fn              your own fn(prompts, responses) -> scores

Expect helpfulness .76 to .81 at T = 1 (.22 to .26 above SFT), 1 to 10% of the unsafe prompts
complied with and 88 to 98% refused, 1 to 2% of the borderline ones refused (`python exam.py ppo`).

Keys: [L2] Llama 2, 2307.09288.  [PPO] 1707.06347.  [GAE] 1506.02438.  [N+] 2403.17031.

Differs from the paper:
- PPO comes once, on V5 (as in Fig. 11), and nothing is sampled from its model again.
- The KL's reference is where PPO starts (UNSPECIFIED in L2: "the original policy").
- It also stops at --kl-limit nats from the SFT model; the toy's lr and beta are not the paper's.
- The gate's threshold is reward.py's calibrated one, not 0.15; is_safety is the village's own tag.
- The prompts are in part those that the reward models were trained on.
- The critic is the helpfulness reward model with a trained trunk of its own (UNSPECIFIED in L2).
- gamma 1, lambda .95, k1 estimator of the KL, whitened advantages (UNSPECIFIED in L2; [N+]).
- An answer cut before its EOS gets the lowest score of its batch (UNSPECIFIED in L2).
"""

from __future__ import annotations

import dataclasses, functools, math, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import data, kernels, model as M, plan, rollouts, scale, stage, village as V
from rollouts import punish_cut, response_logprobs, seed_of
from stage import ranged

STAGE = "ppo"  # OUT/ppo.pt

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """Rewards and PPO: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # model to start from; none: the last OUT/rlhf_vN.pt
    data: str | None = None  # .jsonl of prompts with is_safety; none: prompts of the village
    reward: str | None = None  # FILE.py:FUNCTION(prompts, responses) -> scores; none: our models
    out: str = "out"  # folder of checkpoints and metrics
    seed: int = ranged(0, least=0)  # of prompts and sampling
    iterations: int = ranged(60, least=0)  # paper: 200 to 400, stopped early (§3.2.3)
    batch_size: int = ranged(96, least=2)  # rollouts per iteration, all ranks; paper: 512 (§3.2.3)
    minibatch: int = ranged(24, least=1)  # rollouts per gradient step, one pass; paper: 64 (§3.2.3)
    lr: float | None = ranged(None, above=0)  # of both networks; none: by size; paper: 1e-6
    beta: float | None = ranged(None, least=0)  # weight of the KL; none: by size; paper: .01, .005
    threshold: float = ranged(0, least=0, below=1)  # gate on R_s; 0: calibrated; paper: 0.15
    temperature: float = ranged(1.0, above=0)  # of rollouts and log-probabilities; UNSPECIFIED
    max_new_tokens: int = ranged(80, least=1)  # tokens of an answer
    kl_limit: float = ranged(2.9, least=0)  # nats from SFT, checked with patience; 0: none
    patience: int = ranged(15, least=1)  # iterations without progress; looked at every 5th
    resume: bool = False  # continue from out/ppo.state.pt if it is there
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = ranged(1, least=1)  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


class Size(NamedTuple):
    """What changes with the model's size; plan.SETTINGS has the paper's values."""

    lr: float
    beta: float


SIZES = {0: Size(1e-4, 0.1), 768: Size(1e-5, 0.02)}  # by the width from which on, below 7b
CLIP, VALUE_CLIP = 0.2, 0.2  # of the probability ratio [L2 §3.2.3]; of the value's change [N+]
GAMMA, LAMBDA = 1.0, 0.95  # UNSPECIFIED in L2; [N+]
EVERY = 5  # iterations between held-out scores

# ------------------------------------------------------------------------------------ the idea


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


def masked_mean(x, mask):
    """Mean of x over the answer tokens: (B, T) each -> a scalar."""
    return (x * mask).sum() / mask.sum()


def policy_loss(logp, old_logp, advantages, mask):
    """Clipped surrogate [PPO Eq.7], mean over answer tokens: (loss, ratio, share clipped)."""
    ratio = (logp - old_logp).exp()
    near = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.min(ratio * advantages, near * advantages)
    clipped = ((ratio - 1).abs() > CLIP).float()
    return -masked_mean(gain, mask), ratio, masked_mean(clipped, mask)


def value_loss(values, old_values, returns, mask):
    """Half the squared error, the larger of the free and the clipped value's [N+]: a scalar."""
    near = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.max((values - returns).square(), (near - returns).square())
    return 0.5 * masked_mean(error, mask)


def values_of(critic, tokens, lengths):
    """What the critic expects from each state on: float32 (B, T-1), from tokens <= t at t."""
    with M.autocast(tokens.device):
        # critic.hidden(tokens[:, :-1]), in C where it can run
        hidden = kernels.trunk(critic, tokens[:, :-1], lengths=lengths - 1)  # (B, T-1, D)
        return critic.output(hidden).squeeze(-1).float()


# ------------------------------------------------------------------------------------ training


def minibatches(cfg: Config, ranks) -> list[slice]:
    """This rank's slices of its rows, one per gradient step, in order: the rows are shuffled."""
    size = len(ranks.rows(cfg.minibatch))
    return [slice(i, i + size) for i in range(0, cfg.batch_size // ranks.dp, size)]


@dataclass
class Iteration:
    """What one iteration yields: its number, its metrics, and one prompt with its answer."""

    done: int
    metrics: dict[str, float]
    sample: tuple[str, str]


def train(policy, ref, critic, optimizers, draw_rows, score, tokenizer, cfg: Config, first=0):
    """The loop: one PPO iteration after another; yields an Iteration behind each.

    policy, ref, critic: models on the same ranks; ref is the policy before PPO, and stays so.
    optimizers: of policy and of critic. draw_rows(iteration) -> rows {"messages", "is_safety"};
    score(rows, answers) -> rollouts.Scores. Every rank knows all answers and scores, and goes on
    with its own rows.
    """
    ranks = scale.ranks_of(policy)
    for iteration in range(first, cfg.iterations):
        # 1) rollout
        rows = draw_rows(iteration)
        began = time.time()
        answers = rollouts.answer(policy, tokenizer, [row["messages"] for row in rows],
                                  cfg.max_new_tokens, cfg.temperature,
                                  seed_of(cfg.seed, "ppo", iteration))
        seconds = time.time() - began

        # 2) score; WHITEN over all rollouts, behind the choice between the models, before the KL
        scores = score(rows, answers)
        whitened = whiten(punish_cut(scores.combined, answers.finished))  # (batch_size,)

        # 3) rewards and advantages. The log-probabilities are computed anew by the forward pass of
        #    the update, on its very minibatches, and not taken from the sampler: so the first ratio
        #    is exactly 1
        mine = list(ranks.rows(cfg.batch_size))
        prompts = [answers.prompts[i] for i in mine]
        responses = [answers.responses[i] for i in mine]
        tokens, lengths, mask = rollouts.pad_answers(prompts, responses, ranks.device)
        old_logp, ref_logp, old_values = [], [], []
        with torch.no_grad():
            for part in minibatches(cfg, ranks):
                batch = tokens[part], lengths[part]
                old_logp.append(response_logprobs(policy, *batch, mask[part], cfg.temperature))
                ref_logp.append(response_logprobs(ref, *batch, mask[part], cfg.temperature))
                old_values.append(values_of(critic, *batch))
        old_logp = torch.cat(old_logp)  # (B, T-1)
        ref_logp = torch.cat(ref_logp)
        old_values = torch.cat(old_values)
        rewards = token_rewards(whitened[mine].to(ranks.device), old_logp, ref_logp, mask, cfg.beta)
        advantages, returns = gae(rewards, old_values, mask)
        # every rank has all scores, but only its own tokens' advantages: hence the sum over ranks
        advantages = whiten(advantages, mask, lambda x: ranks.sum(x.item()))

        # 4) update: one gradient step per minibatch, one pass over the rollouts
        record = []
        for part in minibatches(cfg, ranks):
            batch = tokens[part], lengths[part]
            logp = response_logprobs(policy, *batch, mask[part], cfg.temperature)
            loss, ratio, clipped = policy_loss(logp, old_logp[part], advantages[part], mask[part])
            values = values_of(critic, *batch)
            loss_v = value_loss(values, old_values[part], returns[part], mask[part])
            away = (ratio.detach() - 1).abs().max().item()
            is_first = not record
            assert not is_first or away < 1e-6, (
                f"ratio is 1 +- {away} before the first step: not one forward pass")
            # the ranks' answer tokens weigh alike; FSDP averages gradients over its ranks. Two
            # networks, two optimizers: a weight of the value loss ([N+]: 0.1) would only be felt
            # where clipping and Adam's eps bite
            own_tokens = mask[part].sum().item()
            share = own_tokens / ranks.sum(own_tokens)
            ((loss + loss_v) * share * ranks.dp).backward()
            norm = scale.clip(policy, 1.0)
            value_norm = scale.clip(critic, 1.0)
            learnt = {"policy_loss": loss, "value_loss": loss_v, "clip_frac": clipped,
                      "ratio": ratio.detach()[mask[part]].mean()}
            learnt = {name: ranks.sum(x.item() * share) for name, x in learnt.items()}
            learnt["grad_norm"] = norm
            for optimizer in optimizers:
                stage.step(optimizer, cfg.lr, value_norm=value_norm, **learnt)
            record.append(learnt)

        # 5) log
        metrics = course(scores, answers, old_logp, ref_logp, mask, ranks)
        metrics["tokens_per_s"] = metrics["length"] * cfg.batch_size / max(seconds, 1e-9)
        for name in record[0]:
            metrics[name] = sum(learnt[name] for learnt in record) / len(record)
        metrics["explained_variance"] = explained_variance(old_values, returns, mask, ranks)
        sample = rows[0]["messages"][-1]["content"], tokenizer.decode(answers.responses[0])
        yield Iteration(iteration + 1, metrics, sample)


def course(scores, answers, logp, ref_logp, mask, ranks) -> dict[str, float]:
    """Where the policy is: mean scores, KL to PPO's start, entropy, length, share of the gate.

    kl: nats per answer from PPO's start, k1 as in the reward (kl_sft of `held_out`, which
    --kl-limit bounds, counts from SFT); kl_k3 is never negative. entropy: nats per token, of those
    sampled.
    """
    count = len(answers.responses)
    answer_tokens = ranks.sum(mask.sum().item())
    log_ratio = (ref_logp - logp) * mask
    return {
        "reward": scores.combined.mean().item(), "helpful": scores.helpful.mean().item(),
        "safety": scores.safety.mean().item(),
        "kl": ranks.sum((logp - ref_logp).sum().item()) / count,
        "kl_k3": ranks.sum((log_ratio.exp() - 1 - log_ratio).sum().item()) / count,
        "entropy": -ranks.sum((logp * mask).sum().item()) / answer_tokens,
        "eos_rate": answers.eos_rate, "length": answer_tokens / count,
        "gate": scores.gate.float().mean().item()}


def explained_variance(values, returns, mask, ranks) -> float:
    """Which share of the returns' variance the critic foresaw: 1 all of it, 0 none."""
    mask = mask.float()
    left, whole = (moments(x, mask, lambda x: ranks.sum(x.item()))[1]
                   for x in (returns - values, returns))
    return 1 - left / max(whole, 1e-12)


def health(now: dict, start: dict, cfg: Config) -> list[str]:
    """One plain sentence for each thing that usually goes wrong in PPO, where it does.

    now, start: statistics of this iteration and of the first one.
    """
    signs = {
        "KL is negative: sampler and log-probabilities disagree (temperature, mask)":
            now["kl"] < -0.05 - 0.1 * now["kl_k3"],
        "KL from PPO's start runs away: the reward is exploited; raise --beta or lower --lr":
            cfg.kl_limit > 0 and now["kl"] > 2 * cfg.kl_limit,
        "entropy is gone: every answer is the same; raise --beta":
            now["entropy"] < 0.2 * start["entropy"],
        f"only {now['eos_rate']:.0%} of the answers end: raise --max-new-tokens, or SFT has not "
        "learnt to stop": now["eos_rate"] < 0.9,
        f"answers grow, {start['length']:.0f} -> {now['length']:.0f} tokens: the reward models may "
        "take length for quality": now["length"] > 1.7 * start["length"],
        "the safety gate fires on nearly everything: lower --threshold": now["gate"] > 0.9}
    return [f"health: {sentence}" for sentence, is_ill in signs.items() if is_ill]


@torch.no_grad()
def held_out(policy, ref, sft, score, tokenizer, village, cfg: Config) -> dict[str, float]:
    """Mean reward and KL on validation prompts: what early stopping looks at [L2 §3.2.3].

    kl_sft, kl_start: nats per answer from the SFT model and from PPO's start. gold: the annotator's
    score, reported only, to see the reward model being exploited.
    """
    ranks = scale.ranks_of(policy)
    rows = draw(cfg, village, "held out", 2 * cfg.batch_size, "valid")
    answers = rollouts.answer(policy, tokenizer, [row["messages"] for row in rows],
                              cfg.max_new_tokens, cfg.temperature, seed_of(cfg.seed, "held out"))
    mine = ranks.rows(len(rows))
    batch = rollouts.pad_answers([answers.prompts[i] for i in mine],
                                 [answers.responses[i] for i in mine], ranks.device)
    size = len(ranks.rows(cfg.minibatch))  # of a forward pass, as in the update
    parts = list(zip(*(column.split(size) for column in batch)))
    sums = []
    for model in (policy, ref, sft):
        sums.append(sum(response_logprobs(model, *part, cfg.temperature).sum().item()
                        for part in parts))
    logp, start_logp, sft_logp = sums
    scores = score(rows, answers)
    report = {"val_reward": punish_cut(scores.combined, answers.finished).mean().item(),
              "kl_sft": ranks.sum(logp - sft_logp) / len(rows),
              "kl_start": ranks.sum(logp - start_logp) / len(rows),
              "reward_helpful": scores.helpful.mean().item(),
              "reward_safety": scores.safety.mean().item(),
              "eos_rate": answers.eos_rate}
    if not cfg.data:
        report["gold"] = V.Annotator(village).mean_gold(rows, answers.texts)
    return report


# ---------------------------------------------------------------------------------------- main


def draw(cfg: Config, village, purpose: str, count: int, split: str = "train") -> list[dict]:
    """Prompts of the user's file or of the village, anew for each purpose."""
    return rollouts.draw_prompts(cfg.data, village, count, seed_of(cfg.seed, "prompts", purpose),
                                 split)


def last_version(out: Path) -> Path:
    """The highest OUT/rlhf_vN.pt; FileNotFoundError names the command that makes it."""
    versions = {int(path.stem[6:]): path for path in out.glob("rlhf_v*.pt")
                if path.stem[6:].isdecimal()}
    if not versions:
        raise FileNotFoundError(f"{out}/rlhf_v5.pt does not exist: `python rejection.py` makes it; "
                                f"--checkpoint {out}/sft.pt starts without it")
    return versions[max(versions)]


def settings(cfg: Config, config: M.ModelConfig) -> Config:
    """cfg with what depends on the model's size filled in; ValueError for what does not fit."""
    stage.check(cfg)
    cfg = stage.at_size(cfg, plan.settings(STAGE, config))
    size = next(size for width, size in reversed(SIZES.items()) if config.dim >= width)
    lr = size.lr if cfg.lr is None else cfg.lr
    beta = size.beta if cfg.beta is None else cfg.beta
    cfg = dataclasses.replace(cfg, lr=lr, beta=beta)
    if cfg.batch_size % cfg.minibatch:
        raise ValueError(f"--batch-size {cfg.batch_size} must be a multiple of --minibatch "
                         f"{cfg.minibatch}")
    return cfg


def is_too_far(metrics: dict, cfg: Config) -> bool:
    """Whether the policy is further from the SFT model than --kl-limit allows."""
    return cfg.kl_limit > 0 and metrics.get("kl_sft", 0) > cfg.kl_limit


def open_critic(start, rewards: Path | None, ranks, recompute: bool) -> M.Llama:
    """The helpfulness model, its head x 0.3: whitened rewards have deviation 1, its raw scores 2.5
    in one village, and a critic that begins nearer has less to unlearn.

    UNSPECIFIED in L2. Without reward models (a user's own reward): the policy's trunk, and a head
    that says 0.
    """
    if rewards:
        critic = M.load(rewards / "reward_helpful.pt", "cpu")[0]
        critic = scale.wrap(critic, ranks, recompute=recompute)
        with torch.no_grad():
            critic.output.weight.mul_(0.3)
        return critic
    policy = M.load(start, "cpu")[0]
    config = dataclasses.replace(policy.config, scalar_head=True)
    head = torch.zeros(1, config.dim, dtype=policy.norm.weight.dtype)
    critic = M.assemble(config, {**policy.state_dict(), "output.weight": head}, start)
    return scale.wrap(critic, ranks, recompute=recompute)


def main(cfg: Config) -> dict:
    """PPO from the last version; returns the final metrics. ValueError for what does not fit.

    Kept is the policy with the best held-out reward within the KL limit. PPO's start is the first
    candidate: what PPO returns is never worse there.
    """
    began = time.time()
    stage.check(cfg)
    out = Path(cfg.out)
    sft_path = out / "sft.pt"
    dry = cfg.dry_run and cfg.model  # needs no checkpoint
    start = cfg.checkpoint or (sft_path if dry else last_version(out))
    config = plan.shape_of(start, cfg.model, cfg.dry_run)
    cfg = settings(cfg, config)
    if cfg.dry_run:
        length = config.max_seq_len
        plan.dry_run(config, cfg.minibatch, length, recompute=cfg.recompute, tp=cfg.tp,
                     tokens=cfg.iterations * cfg.batch_size * length, device=cfg.device,
                     rollouts=cfg.batch_size)
        return {}
    info = M.load(start, "cpu")[1]
    if M.load(sft_path, "cpu")[1]["tokenizer"] != info["tokenizer"]:
        raise ValueError(f"{sft_path}, from which the KL is counted, has another tokenizer than "
                         f"{start}: give an --out whose sft.pt it comes from")
    tokenizer = data.Tokenizer(info["tokenizer"])
    ranks = scale.setup(cfg.device, cfg.tp)  # this process among others; alone: rank 0 of 1
    print(kernels.choose(cfg.kernels, ranks.device))
    village = V.Village(info["metrics"].get("village") or 0)
    rewards = None if cfg.reward else out / info["metrics"].get("rewards", ".")
    score = rollouts.own_reward(cfg.reward) if cfg.reward else \
        rollouts.reward_pair(rewards, tokenizer, ranks, cfg.threshold,
                             info["metrics"].get("village"))

    policy, ref, sft = (scale.wrap(M.load(path, "cpu")[0], ranks, recompute=cfg.recompute)
                        for path in (start, start, sft_path))
    models = {"policy": policy, "critic": open_critic(start, rewards, ranks, cfg.recompute)}
    optimizers = {name: stage.adamw(model, cfg.lr, 0.1) for name, model in models.items()}
    state = out / f"{STAGE}.state.pt"
    check_same = functools.partial(stage.check_resume, cfg=cfg, tokenizer=tokenizer.model_bytes)
    saved = scale.load_state(state, models, optimizers, ranks, check_same) if cfg.resume else None
    log = stage.Log(STAGE, out, cfg.iterations, saved["step"] if saved else None,
                    watch=("reward", "kl", "length", "val_reward", "gold"))
    evaluate = functools.partial(held_out, policy, ref, sft, score, tokenizer, village, cfg)
    if saved:
        first, best, initial = saved["step"], saved["best"], saved["initial"]
    else:
        first, initial, metrics = 0, None, evaluate()
        best = {"step": 0, **metrics, "weights": scale.full_weights(policy)}
        log.step(0, **metrics)

    def draw_rows(iteration: int) -> list[dict]:
        return draw(cfg, village, f"ppo {iteration}", cfg.batch_size)

    for it in train(policy, ref, models["critic"], list(optimizers.values()), draw_rows, score,
                    tokenizer, cfg, first):
        # 5) log, and once in a while: samples, held-out prompts, state
        initial = initial or it.metrics
        evaluates = it.done % EVERY == 0 or it.done == cfg.iterations
        metrics = dict(it.metrics)
        if evaluates:
            report = evaluate()
            metrics |= report
            if not is_too_far(report, cfg) and report["val_reward"] > best["val_reward"]:
                best = {"step": it.done, **report, "weights": scale.full_weights(policy)}
            print("  {} -> {}".format(*it.sample))
        log.step(it.done, **metrics)
        for line in health(it.metrics, initial, cfg):
            print(line)
        if evaluates and it.done < cfg.iterations:
            progress = stage.resume_info(it.done, cfg.iterations, cfg, tokenizer.model_bytes)
            scale.save_state(state, models, optimizers,
                             {**progress, "best": best, "initial": initial}, ranks)
        reason = ""
        if is_too_far(metrics, cfg):
            reason = f"KL {metrics['kl_sft']:.2f} nats from SFT is over --kl-limit {cfg.kl_limit}"
        elif evaluates and it.done - best["step"] >= cfg.patience:
            reason = f"the held-out reward has not risen for {cfg.patience} iterations"
        if reason:
            print(f"stopped at iteration {it.done}: {reason}")
            break

    scale.load_weights(policy, best.pop("weights"))
    # "kl" of the checkpoint counts from SFT, for exam.py's table; "kl" of the log from PPO's start
    final = {**best, "kl": best["kl_sft"], **stage.heritage(info), "minutes":
             (time.time() - began) / 60, "rewards": info["metrics"].get("rewards", ".")}
    scale.save(out / f"{STAGE}.pt", policy, STAGE, tokenizer.model_bytes, final,
               cfg.data or f"prompts of village {village.number}")
    print(f"kept is iteration {best['step']}: held-out reward {best['val_reward']:.2f}, KL "
          f"{final['kl']:.2f} nats from SFT, {best['kl_start']:.2f} from PPO's start")
    print(stage.wrote(out / f"{STAGE}.pt", out, "gatt.py", f"exam.py {STAGE}"))
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    stage.run(main, Config)
