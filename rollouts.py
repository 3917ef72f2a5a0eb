"""Answers and their scores: what reward, rejection, ppo, gatt and exam do alike.

    rows      {"messages": a dialogue that ends with the user, "is_safety": bool}
      |  answer           open dialogues -> prompts, responses (token lists), finished, texts
      v
    Answers
      |  pad_answers      token lists -> one batch, and a mask over the responses
      |  response_logprobs                     log p of each response token
      |  scores           whole dialogues -> the raw score of one reward model, read at their end
      v
    Scores    of the pair of reward models, as one number per answer [L2 §3.2.3]:

        R_c(g|p) = R_s if is_safety(p) or R_s(g|p) < threshold, else R_h    R_s, R_h: sigmoid scores

What is learnt from them (losses, advantages, picks) stands in the stages.

Keys: [L2] Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

import functools, random, runpy, zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data, kernels, model as M, scale, village as V

# ------------------------------------------------------------------------------------- prompts


def seed_of(seed: int, *purpose) -> int:
    """A 32-bit seed for each purpose: nothing random depends on what was drawn before it."""
    return zlib.crc32(repr((seed, *purpose)).encode())


@functools.lru_cache
def own_prompts(path: str) -> dict[str, list[dict]]:
    """The rows of a user's file, a tenth of them held out: {"train", "valid"}."""
    rows = data.read_prompts(path)
    random.Random(0).shuffle(rows)
    cut = max(1, len(rows) // 10)
    return {"valid": rows[:cut], "train": rows[cut:] or rows}


def draw_prompts(path: str | None, village: V.Village, count: int, seed: int,
                 split: str = "train") -> list[dict]:
    """`count` shuffled rows {"messages", "is_safety"}: of a user's file or, without, the village's.

    Of the village's a share comes with an instruction, or following one would be forgotten, and a
    third lies at the border of what is safe: more harmless look-alikes than unsafe prompts, or
    refusing would spread to these [L2 Fig. 33].
    """
    rng = random.Random(seed)
    if path:
        return rng.choices(own_prompts(path)[split], k=count)
    rows = []
    for mix, n in (("all", count - count // 3), ("border", count // 3)):
        rows += village.prompts(mix, split, n, rng.randrange(1 << 30), V.STYLED)
    rng.shuffle(rows)  # a minibatch of PPO takes neighbours
    return rows


# ------------------------------------------------------------------------------------- answers


@dataclass
class Answers:
    """One answer to each of N open dialogues."""

    prompts: list[list[int]]  # tokens up to [/INST]
    responses: list[list[int]]  # tokens of the answer, its EOS included where it has one
    finished: Tensor  # bool (N,): ended with EOS; else the answer was cut
    texts: list[str]  # without the spaces of the chat format

    @property
    def eos_rate(self) -> float:
        """Share of the answers that ended by themselves."""
        return self.finished.float().mean().item()


def answer(model, tokenizer, dialogs: list, max_new_tokens: int, temperature: float, seed: int,
           row_ids=None, memory=None, rows_at_once: int = 512) -> Answers:
    """An answer to each open dialogue, sampled at a temperature; 0 is greedy.

    row_ids (default 0..N-1) name the rows for the random numbers; memory: `kernels.rollout`'s, and
    then all rows are answered at once. The weights are gathered once for the whole of it, and the
    ranks share the rows [L2 §3.2.3].
    """
    if memory is not None:  # it knows the rows of its first rollout alone
        rows_at_once = max(len(dialogs), 1)
    prompts = [data.encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    ids = list(range(len(prompts)) if row_ids is None else row_ids)
    responses = []
    with scale.unsharded(model):
        for start in range(0, len(prompts), rows_at_once):
            some = slice(start, start + rows_at_once)
            tokens, _ = scale.rollout(model, prompts[some], max_new_tokens, temperature=temperature,
                                      seed=seed, stop=tokenizer.eos_id, row_ids=ids[some],
                                      memory=memory)
            responses += tokens
    finished = torch.tensor([response[-1] == tokenizer.eos_id for response in responses])
    texts = [tokenizer.decode(response).strip() for response in responses]
    return Answers(prompts, responses, finished, texts)


# --------------------------------------------------------------------- padding, log-probabilities


def pad(rows: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Token lists as one batch, zeros on the right: int64 (B, T) and lengths (B,)."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for padded, row in zip(tokens, rows):
        padded[:len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens.to(device), lengths.to(device)


def pad_answers(prompts: list[list[int]], responses: list[list[int]], device):
    """Prompts with their responses as one batch: tokens (B, T), lengths (B,), mask bool (B, T-1).

        tokens   <s> [INST] hi [/INST]  hello  </s>   0     read: all but the last column
        mask            0    0    0       1      1    0     1: this column is the response's

    Position t of logp, values, rewards and mask belongs to tokens[:, t + 1], the action, and was
    computed from tokens[:, :t + 1], the state. A row's last 1 is its last response token.
    """
    whole = [prompt + response for prompt, response in zip(prompts, responses)]
    tokens, lengths = pad(whole, "cpu")
    starts = torch.tensor([len(prompt) for prompt in prompts])
    columns = torch.arange(1, tokens.shape[1])
    mask = (columns >= starts[:, None]) & (columns < lengths[:, None])
    return tokens.to(device), lengths.to(device), mask.to(device)


def response_logprobs(model, tokens, lengths, mask, temperature: float) -> Tensor:
    """log p of the response tokens at this temperature, 0 elsewhere: float32 (B, T-1).

    The one forward pass of policy, reference and update: the ratio is exactly 1 before the first
    step. In plain PyTorch: M.logprobs(model(tokens[:, :-1]), tokens[:, 1:], temperature) * mask.
    """
    with M.autocast(tokens.device):
        hidden = kernels.trunk(model, tokens[:, :-1], lengths=lengths - 1)  # (B, T-1, D)
        return kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], mask, temperature)


# -------------------------------------------------------------------------------------- scores


def end_scores(model, tokens, lengths) -> Tensor:
    """Score of each dialogue, read at its last real token: int64 (B, T), (B,) -> float32 (B,).

    That token is the EOS, or the last of an answer that was cut (UNSPECIFIED in L2: where to read);
    what stands behind it is padding, and no real token sees padding.
    """
    hidden = kernels.trunk(model, tokens, lengths=lengths)  # (B, T, D): the network, no head
    last = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (B, D)
    return model.output(last).squeeze(-1).float()


@torch.no_grad()
def scores(model, rows: list[list[int]], rows_at_once: int = 64) -> Tensor:
    """Raw scores of whole dialogues (token lists with their EOS): float32 (N,) on the CPU.

    Ranks share the work, and each gets all the scores.
    """
    ranks = scale.ranks_of(model)
    mine = range(ranks.dp_rank, len(rows), ranks.dp)
    order = sorted(mine, key=lambda i: len(rows[i]))  # like beside like: less padding
    score_of = {}
    with scale.unsharded(model), M.autocast(ranks.device):
        for start in range(0, len(order), rows_at_once):
            some = order[start:start + rows_at_once]
            tokens, lengths = pad([rows[i] for i in some], ranks.device)
            score_of |= zip(some, end_scores(model, tokens, lengths).tolist())
    return torch.tensor(ranks.gather([score_of[i] for i in mine]))


class Scores(NamedTuple):
    """Raw scores of B answers, float (B,) each; gate, bool (B,): where the safety model decided."""

    helpful: Tensor
    safety: Tensor
    combined: Tensor
    gate: Tensor


def fires(safety, is_safety, threshold: float) -> Tensor:
    """Where the safety model decides: tagged prompts, and answers it finds unsafe: bool (B,).

    Low is unsafe, and strictly: sigmoid(score) < threshold [L2 §3.2.3].
    """
    return is_safety | (safety.sigmoid() < threshold)


def combine(helpful, safety, is_safety, threshold: float) -> Tensor:
    """The raw score of R_c: float (B,) x 2, bool (B,) -> float (B,) [L2 §3.2.3].

    LOGIT undoes the sigmoid, so the raw linear scores are taken at once: logit(sigmoid(s)) would
    overflow. A batch mixes scores of two models, and WHITEN then compares them with one another:
    fair only as far as both are log-odds (of being safe; of being the better of two).
    """
    return torch.where(fires(safety, is_safety, threshold), safety, helpful)


def punish_cut(combined, finished) -> Tensor:
    """Answers without EOS get the lowest score of all: float (B,), bool (B,) -> float (B,)."""
    return combined.where(finished, combined.min())


def reward_pair(folder: Path, tokenizer, ranks, threshold: float = 0, village: int | None = None):
    """score(rows, answers) -> Scores, by the two reward models of a folder.

    rows carry is_safety; answers are scored as they were sampled: one that was cut gets no EOS.
    threshold 0: the one that reward.py calibrated, which the safety model's file holds. village:
    the number that the models must remember; None: any.
    """
    models = {}
    for which in ("helpful", "safety"):
        path = folder / f"reward_{which}.pt"
        model, info = M.load(path, "cpu")
        if info["tokenizer"] != tokenizer.model_bytes:
            raise ValueError(f"{path} has another tokenizer than the model to train: run `python "
                             f"reward.py` again")
        theirs = info["metrics"].get("village")
        if village is not None and theirs is not None and theirs != village:
            raise ValueError(f"{path} was trained in village {theirs}, the model to train in "
                             f"village {village}: run `python reward.py` again, or give another "
                             f"--out")
        models[which] = scale.wrap(model, ranks)
    threshold = threshold or info["metrics"].get("threshold")
    if not threshold:
        raise ValueError(f"{path} holds no calibrated threshold: give one, as --threshold 0.15")

    def score(rows: list[dict], answers: Answers) -> Scores:
        whole = [prompt + response
                 for prompt, response in zip(answers.prompts, answers.responses)]
        helpful = scores(models["helpful"], whole)
        safety = scores(models["safety"], whole)
        is_safety = torch.tensor([row["is_safety"] for row in rows])
        return Scores(helpful, safety, combine(helpful, safety, is_safety, threshold),
                      fires(safety, is_safety, threshold))

    return score


def own_reward(spec: str):
    """The same interface around a user's fn(prompts, responses) -> scores (FILE.py:FUNCTION).

    prompts: message lists; responses: texts; scores: a float tensor or list, one per response.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file() or not name:
        raise ValueError(f"--reward {spec}: give FILE.py:FUNCTION, FILE.py being an existing file")
    function = runpy.run_path(path).get(name)
    if not callable(function):
        raise ValueError(f"--reward {spec}: {path} has no function {name}")

    def score(rows: list[dict], answers: Answers) -> Scores:
        given = function([row["messages"] for row in rows], answers.texts)
        try:
            one = torch.as_tensor(given, dtype=torch.float32).cpu()
        except (TypeError, ValueError, RuntimeError) as e:
            raise ValueError(f"--reward {spec}: not a list or tensor of numbers: {e}") from e
        if one.shape != (len(rows),) or not one.isfinite().all():
            raise ValueError(f"--reward {spec}: it must return {len(rows)} finite scores, one per "
                             f"response; it returned shape {tuple(one.shape)}, "
                             f"{int((~one.isfinite()).sum())} of them not finite")
        return Scores(one, one, one, torch.zeros(len(one)).bool())

    return score
