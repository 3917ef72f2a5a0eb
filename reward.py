"""Reward models: two networks learn to score an answer as people would [L2 §3.2.1, §3.2.2].

People see two answers to a prompt, pick one, and say how much better it is. The model gives each
answer a number, and the chosen one's must be larger, by a margin that grows with the rating:

    loss = -log sigmoid(r_chosen - r_rejected - m(rating))      ln 2 at equal scores and m = 0

Helpfulness and safety pull apart: the most helpful answer to a harmful question is to comply. So
there are two models. Both start as the chat model, to know what it knows; a head with one output
replaces the one over the vocabulary, and is read at the EOS of the dialogue.

in  : out/sft.pt; comparisons of two variants of it that the annotator labels, or yours (--data)
out : out/reward_helpful.pt, out/reward_safety.pt, out/reward.jsonl, out/figures/reward.png,
      out/preferences_*.jsonl: the comparisons, in the form of a user's own
run : python reward.py                                  about 2 minutes on two AVX2 cores
      python reward.py --data mine.jsonl,mine_test.jsonl      rows as in data.read_preferences
      python reward.py --sweep --ablate                 more pairs, more layers, other losses

Expect 79 to 82% (helpfulness) and 67 to 72% (safety) of the pairs in the right order; the labels'
noise allows 87 to 88% and 74 to 77%.

Keys: [L2] Llama 2, 2307.09288.

Differs from the paper:
- An annotator with known noise instead of people; a few thousand pairs instead of 2.9 million.
- The helpfulness model reads no safety pair with an unsafe answer: see `mix`.
"""

from __future__ import annotations

import dataclasses, json, math, random, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import data, kernels, model as M, plan, scale

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is compared, and how it is learnt: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # chat model to start from; none: OUT/sft.pt
    data: str | None = None  # .jsonl files or folders, comma between; none: collect comparisons
    which: Literal["both", "helpful", "safety"] = "both"  # models to train
    out: str = "out"  # folder of checkpoints, metrics and figures
    seed: int = 0  # of prompts, labels, head and order
    pairs: int = 12000  # comparisons to collect, a third of them for safety; paper: 1.4 million
    test_pairs: int = 1000  # comparisons to hold out for each model; paper: 1000 a week (§3.2.2)
    margin: Literal["none", "small", "large"] = "small"  # m(rating); paper: unsaid (Table 27)
    aux_weight: float = 0.5  # of the safety model's classification loss; UNSPECIFIED in L2
    batch_size: int = 8  # pairs per step, over all ranks; paper: 512 (§3.2.2)
    micro_batch: int = 8  # pairs per rank and forward pass; smaller needs less memory
    lr: float = 0  # peak; 0: by the model's width, half with --resume-from; paper: 1e-5, 70b 5e-6
    log_every: int = 20  # steps between two lines on the screen and in out/reward.jsonl
    save_every: int = 100  # steps between resume states
    resume: bool = False  # continue from out/reward.state.pt if it is there
    resume_from: str | None = None  # folder of models to train on; own test pairs only, no figure
    sweep: bool = False  # also: accuracy by number of pairs and of layers (Fig. 6)
    ablate: bool = False  # also: other margins, no auxiliary loss (Tables 28, 29)
    skip_bad_rows: bool = False  # count and skip rows of --data that are wrong
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = 1  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


PAPER = {"batch_size": 512, "micro_batch": 1}  # from 7b on, in place of the above [L2 §3.2.2]
MARGINS = {  # m(rating), in the order of data.RATINGS: significantly better ... negligibly better
    "none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}  # [L2 Table 27]
COLLECTED = ("helpful", "helpful_test", "safety", "safety_test")  # out/preferences_NAME.jsonl
TEMPERATURES = (0.5, 0.8, 1.1)  # of the variants that are compared; UNSPECIFIED in L2
MAX_ANSWER = 80  # tokens
PRECISION = 0.89  # of the gate of RLHF: "threshold 0.15 ... precision of 0.89" [L2 §3.2.3]

# ------------------------------------------------------------------------------------ the idea


def ranking_loss(chosen, rejected, margin):
    """-log sigmoid(r_c - r_r - m): raw scores and margins float (B,) -> (B,) nats [L2 Eq.2].

    The margin makes the task harder: the gradient is -1/2 not at equal scores but at a gap of m.
    Adding a number to all scores changes nothing, so this loss alone fixes no zero.
    """
    return -F.logsigmoid(chosen - rejected - margin)


def safety_loss(scores, is_safe):
    """-log p(label) with p(safe) = sigmoid(score): float (N,), (N,) in {1, 0, -1} -> (N,) nats.

    UNSPECIFIED in L2 §A.3.4: the formula. It gives the scores a zero, so that a threshold means
    something. -1 stands for an answer without a label, whose loss is 0.
    """
    nats = F.binary_cross_entropy_with_logits(scores, is_safe.clamp(min=0), reduction="none")
    return nats * (is_safe >= 0)


def margin_of(row: dict, table: str) -> float:
    """m of a comparison: its own "margin" if it has one, else that of its rating, else 0.

    0 for open-source rows without a rating: nobody said that the gap must be wide.
    """
    if table != "none" and row["margin"] is not None:
        return float(row["margin"])
    return float(dict(zip(data.RATINGS, MARGINS[table])).get(row["rating"], 0))


def end_scores(model, tokens, lengths):
    """Score of each dialogue, read at its last real token: int64 (B, T), (B,) -> float32 (B,).

    That token is the EOS: what stands behind it is padding, and no real token sees padding.
    """
    hidden = kernels.trunk(model, tokens, lengths)  # (B, T, D)
    last = hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (B, D)
    return model.output(last).squeeze(-1).float()


def pad(rows: list[list[int]], device):
    """Token lists as one batch, zeros on the right: int64 (B, T) and lengths (B,)."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for filled, row in zip(tokens, rows):
        filled[:len(row)] = torch.tensor(row)
    return tokens.to(device), torch.tensor([len(row) for row in rows], device=device)


@torch.no_grad()
def scores(model, rows: list[list[int]], rows_at_once: int = 64):
    """Raw scores of whole dialogues (token lists with their EOS): float32 (N,) on the CPU.

    Ranks share the work, and each gets all the scores.
    """
    ranks, found = scale.ranks_of(model), {}
    mine = range(ranks.dp_rank, len(rows), ranks.dp)
    order = sorted(mine, key=lambda i: len(rows[i]))  # like beside like: less padding
    with scale.unsharded(model), M.autocast(ranks.device):
        for start in range(0, len(order), rows_at_once):
            at = order[start:start + rows_at_once]
            r = end_scores(model, *pad([rows[i] for i in at], ranks.device))
            found |= zip(at, r.tolist())
    return torch.tensor(ranks.gather([found[i] for i in mine]))


def calibrate(scores, is_unsafe, precision: float) -> float:
    """The largest t such that at least `precision` of the answers with score < t are unsafe.

    scores float (N,), is_unsafe bool (N,). Halfway between two scores, so that rounding does not
    matter; the lowest score, below which nothing lies, if no threshold is precise enough.
    """
    ranked, order = scores.double().sort()
    share = is_unsafe[order].double().cumsum(0) / torch.arange(1, len(ranked) + 1)
    above = torch.cat([ranked[1:], ranked[-1:] + 1])
    good = (share >= precision) & (above > ranked)  # never a cut between equal scores
    return ((ranked + above)[good][-1] / 2 if good.any() else ranked[0]).item()


# -------------------------------------------------------------------------- collecting the data


def collect(cfg: Config, ranks) -> None:
    """Write out/preferences_{helpful,safety}[_test].jsonl: pairs of answers, labelled [L2 §3.2.1].

    Helpfulness and safety are judged by guidelines of their own, on prompts of their own; the test
    pairs are answers to held-out prompts. Helpfulness is trained on more of what is hard to judge,
    and tested on prompts as they come.
    """
    model, info = M.load(cfg.checkpoint or Path(cfg.out) / "sft.pt", "cpu")
    tokenizer, village = data.Tokenizer(info["tokenizer"]), data.World()
    model = scale.wrap(model, ranks)
    counts = {"helpful": cfg.pairs - cfg.pairs // 3, "safety": cfg.pairs // 3}
    for name in COLLECTED:
        which, _, test = name.partition("_")
        n = cfg.test_pairs if test else counts[which]
        kinds = "compared" if name == "helpful" else which
        prompts = village.prompts(kinds, test or "train", n, cfg.seed, data.STYLED)
        rows = compare(model, tokenizer, village, [row["messages"] for row in prompts],
                       "safe" if which == "safety" else "helpful", f"{name} {cfg.seed}", ranks)
        path, text = preferences(cfg, name), "".join(json.dumps(row) + "\n" for row in rows)
        if ranks.is_main:
            M.atomic_write(path, lambda f: f.write(text.encode()))
        print(f"{path}: {len(rows)} comparisons; {n - len(rows)} prompts had equal, empty or "
              f"unfinished answers")
    ranks.barrier()  # every rank reads the files, once they are there


def preferences(cfg: Config, name: str) -> Path:
    """Where `collect` writes the comparisons of that name."""
    return Path(cfg.out) / f"preferences_{name}.jsonl"


def compare(model, tokenizer, village, prompts: list, by: str, seed: str, ranks) -> list[dict]:
    """Rows of a preference file: two answers of different variants to each open dialogue.

    The variants are temperatures; some first answers are what neither would say. by: "helpful" or
    "safe", the guidelines of the label.
    """
    rng, annotator, rows = random.Random(f"compare {seed}"), data.Annotator(village), []
    jobs = [(prompt, t) for prompt in prompts for t in rng.sample(TEMPERATURES, 2)]
    answers = sample(model, tokenizer, jobs, rng.randrange(1 << 30), ranks)
    first = village.oddities(prompts, answers[::2], answers[1::2], rng)
    for prompt, a, b in zip(prompts, first, answers[1::2]):
        if not a or not b or a == b:
            continue
        label = annotator.label(prompt, a, b, rng, by)
        row = {"rating": label["rating"]}
        for side, i in (("chosen", label["chosen"]), ("rejected", 1 - label["chosen"])):
            row[side] = prompt + [{"role": "assistant", "content": (a, b)[i]}]
            if by == "safe":  # only safety raters say whether an answer is safe [L2 §3.2.1]
                row[f"{side}_safe"] = label["safe"][i]
        rows.append(row)
    return rows


def sample(model, tokenizer, jobs: list, seed: int, ranks, rows_at_once: int = 256) -> list[str]:
    """An answer to each (open dialogue, temperature); "" where no EOS came. Ranks share the work.

    An answer that was cut is no answer: a file of messages could not say that it has no end.
    """
    mine = range(ranks.dp_rank, len(jobs), ranks.dp)
    texts = dict.fromkeys(mine, "")
    with scale.unsharded(model):
        for temperature in TEMPERATURES:
            same = [i for i in mine if jobs[i][1] == temperature]
            for start in range(0, len(same), rows_at_once):
                ids = same[start:start + rows_at_once]
                prompts = [data.encode_dialog(tokenizer, jobs[i][0])[0] for i in ids]
                answers, _ = kernels.rollout(model, prompts, MAX_ANSWER, temperature, seed=seed,
                                             stop=tokenizer.eos_id, row_ids=ids)
                texts |= {i: data.break_tags(tokenizer.decode(answer).strip())
                          for i, answer in zip(ids, answers) if answer[-1] == tokenizer.eos_id}
    return ranks.gather(list(texts.values()))[:len(jobs)]


# ------------------------------------------------------------------------------------ the data


class Pair(NamedTuple):
    """A comparison as the network reads it: two dialogues that differ in their last answer."""

    chosen: list[int]  # tokens of the whole dialogue, EOS included
    rejected: list[int]
    prompt: int  # tokens before the answer
    margin: float
    safe: tuple[int, int]  # of chosen and rejected: 1 safe, 0 unsafe, -1 not labelled
    rating: str | None
    row: dict


SAFETY_BINS = {(1, 0): "safe over unsafe", (1, 1): "both safe", (0, 0): "both unsafe"}  # Table 29


def kind(row: dict) -> str:
    """"safety" for a row whose answers are labelled safe or not, else "helpful"."""
    return "safety" if None not in (row["chosen_safe"], row["rejected_safe"]) else "helpful"


def read_comparisons(cfg: Config) -> tuple[list[dict], list[dict]]:
    """(training, test) rows of files, and no prompt on both sides.

    Files named *_test.jsonl are the test; without any, it is a tenth of the dialogues (at most
    1000), each with all that begin with the same message. Excluded: an unsafe answer preferred to
    a safe one, "as we believe safer responses will also be better" [L2 §A.3.1].
    """
    files = [preferences(cfg, name) for name in COLLECTED] if not cfg.data else \
        data.find_files(cfg.data.split(","), ".jsonl")
    given = [file for file in files if file.name.split(".")[0].endswith("_test")]
    train = data.read_preferences([f for f in files if f not in given], cfg.skip_bad_rows)
    if given:
        test = data.read_preferences(given, cfg.skip_bad_rows)
    else:
        openings = sorted({row["prompt"][0]["content"] for row in train})
        count = min(1000, max(1, len(openings) // 10))
        held_out = set(random.Random(0).sample(openings, count))
        test = [row for row in train if row["prompt"][0]["content"] in held_out]
        train = [row for row in train if row["prompt"][0]["content"] not in held_out]
    tested = {json.dumps(row["prompt"]) for row in test}
    apart = [row for row in train if json.dumps(row["prompt"]) not in tested]
    parts = [[row for row in part if (row["chosen_safe"], row["rejected_safe"]) != (False, True)]
             for part in (apart, test)]
    print(f"{len(parts[0])} comparisons to train on, {len(parts[1])} to test on; left out: "
          f"{len(train) - len(apart)} whose prompt is tested, {len(apart) - len(parts[0])} and "
          f"{len(test) - len(parts[1])} that prefer an unsafe answer to a safe one")
    return parts[0], parts[1]


def mix(rows: list[dict], which: str, seed: int) -> list[dict]:
    """The rows that a model is trained on [L2 §A.3.3].

    Helpfulness: all helpful rows, and as many safety rows. DEVIATES: of those only pairs of two
    safe answers; the others would teach both models to refuse, and leave nothing to tell apart.
    Safety: all safety rows, and helpful ones, 90 to 10.
    """
    own = [row for row in rows if kind(row) == which]
    other = [row for row in rows if kind(row) != which]
    if which == "helpful":
        other = [row for row in other if row["chosen_safe"] and row["rejected_safe"]]
    count = len(own) if which == "helpful" else len(own) // 9
    return own + random.Random(f"mix {seed}").sample(other, min(count, len(other)))


def encode(rows: list[dict], tokenizer, margin: str, longest: int) -> list[Pair]:
    """Rows as pairs of token lists; those longer than the context are left out, and counted."""
    label, pairs = {True: 1, False: 0, None: -1}, []
    for row in rows:
        answered = [row["prompt"] + [{"role": "assistant", "content": row[side]}]
                    for side in ("chosen", "rejected")]
        prompt, chosen, rejected = (data.encode_dialog(tokenizer, messages)[0]
                                    for messages in (row["prompt"], *answered))
        if max(len(chosen), len(rejected)) <= longest:
            pairs.append(Pair(chosen, rejected, len(prompt), margin_of(row, margin),
                              (label[row["chosen_safe"]], label[row["rejected_safe"]]),
                              row["rating"], row))
    if len(pairs) < len(rows):
        print(f"skipped {len(rows) - len(pairs)} comparisons of more than {longest} tokens")
    return pairs


def prepare(cfg: Config, tokenizer, longest: int) -> tuple[dict, dict]:
    """({which: training pairs}, {which: test pairs}); ValueError where there is too little.

    Prints what each model learns from, and the loss of one that knows nothing.
    """
    rows, test = read_comparisons(cfg)
    tests = {which: encode([row for row in test if kind(row) == which], tokenizer, cfg.margin,
                           longest) for which in ("helpful", "safety")}
    train = {which: encode(mix(rows, which, cfg.seed), tokenizer, cfg.margin, longest)
             for which in tests if cfg.which in ("both", which)}
    if cfg.which == "both":  # rows without safety labels make one model
        train = {which: pairs for which, pairs in train.items() if pairs} or train
    for which, pairs in train.items():
        if len(pairs) < cfg.batch_size or not tests[which]:
            raise ValueError(f"{len(pairs)} comparisons to train the {which} model on and "
                             f"{len(tests[which])} to test it: --batch-size {cfg.batch_size} and 1 "
                             f"are needed; bring more rows (safety rows have chosen_safe and "
                             f"rejected_safe), or choose the other model with --which")
        shares = [(rating, sum(p.rating == rating for p in pairs)) for rating in data.RATINGS]
        shares += [(name, sum(p.safe == safe for p in pairs)) for safe, name in SAFETY_BINS.items()]
        at_zero = sum(math.log1p(math.exp(p.margin)) for p in pairs) / len(pairs)
        print(f"{which} model: {len(pairs)} pairs, "
              + ", ".join(f"{n / len(pairs):.0%} {name}" for name, n in shares if n)
              + f"; {len(tests[which])} to test; loss at equal scores {at_zero:.4f}")
    return train, tests


# ------------------------------------------------------------------------------------ training


def with_scalar_head(chat: M.Llama, seed: int, layers: int = 0) -> M.Llama:
    """The chat model with a head of one output, small enough that all scores begin near 0.

    The head's initialisation is UNSPECIFIED in L2. layers: keep only the first ones; 0: all.
    """
    config = dataclasses.replace(chat.config, scalar_head=True,
                                 n_layers=layers or chat.config.n_layers)
    rng = torch.Generator().manual_seed(seed)
    head = torch.randn(1, config.dim, generator=rng) * 0.1 * config.dim ** -0.5
    head = head.to(chat.norm.weight.dtype)
    dropped = tuple(f"layers.{i}." for i in range(config.n_layers, chat.config.n_layers))
    weights = {n: w for n, w in chat.state_dict().items() if not n.startswith(dropped)}
    return M.assemble(config, weights | {"output.weight": head}, "the chat model")


def start(cfg: Config, which: str, ranks, layers: int = 0):
    """(model, optimizer) before the first step: a chat model's trunk, or an older reward model."""
    if cfg.resume_from:
        model, _ = M.load(Path(cfg.resume_from) / f"reward_{which}.pt", "cpu")
    else:
        chat, _ = M.load(cfg.checkpoint or Path(cfg.out) / "sft.pt", "cpu")
        model = with_scalar_head(chat, cfg.seed, layers)
    model = scale.wrap(model, ranks, recompute=cfg.recompute)
    return model, M.adamw(model, 0.0, weight_decay=0.1)  # as in pretraining [L2 §3.2.2]


def learning_rate(step: int, total: int, peak: float) -> float:
    """Warm-up over 3% of the steps, at least 5, then a cosine to a tenth [L2 §3.2.2]."""
    warmup = max(5, round(0.03 * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def default_lr(c: M.ModelConfig) -> float:
    """1e-5, 5e-6 for 70b [L2 §3.2.2]; below 7b, inversely to the width: 5e-4 for tiny's 128."""
    if c.dim < 4096:
        return 5e-4 * 128 / c.dim
    return 5e-6 if c.dim >= 8192 and c.n_layers > 64 else 1e-5  # 34b is as wide as 70b


def train_step(model, optimizer, batch, lr, aux_weight, cfg: Config, ranks) -> dict[str, float]:
    """One optimizer step on this rank's pairs; chosen and rejected are rows of one forward pass."""
    sums = [0.0, 0.0, 0.0]  # ranking loss, auxiliary loss, pairs in the right order
    for first in range(0, len(batch), cfg.micro_batch):
        piece = batch[first:first + cfg.micro_batch]
        margin = torch.tensor([p.margin for p in piece], device=ranks.device)  # (B,)
        safe = torch.tensor([float(p.safe[i]) for i in (0, 1) for p in piece], device=ranks.device)
        rows = [p.chosen for p in piece] + [p.rejected for p in piece]
        with M.autocast(ranks.device):
            r = end_scores(model, *pad(rows, ranks.device))  # (2B,): chosen, then rejected
        chosen, rejected = r.chunk(2)
        ranking, aux = ranking_loss(chosen, rejected, margin).sum(), safety_loss(r, safe).sum()
        # the mean over this rank's pairs: FSDP averages gradients over its ranks
        ((ranking + aux_weight * aux) / len(batch)).backward()
        sums = [s + x.item() for s, x in zip(sums, (ranking, aux, (chosen > rejected).sum()))]
    loss, aux, accuracy = (ranks.mean(s / len(batch)) for s in sums)
    norm = scale.clip(model, 1.0)  # as in pretraining [L2 §3.2.2]
    if not math.isfinite(loss + aux + norm):
        raise FloatingPointError(f"loss {loss}, auxiliary loss {aux}, gradient norm {norm}: "
                                 f"training diverged; a smaller --lr (now {lr:.2g}) helps")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"loss": loss, "accuracy": accuracy, "lr": lr, "grad_norm": norm} | (
        {"aux_loss": aux} if aux_weight else {})


def fit(model, optimizer, pairs: list[Pair], aux_weight: float, cfg: Config, ranks, first=0):
    """One epoch, for "training longer can lead to over-fitting" [L2 §3.2.2]; yields (done, metrics)
    after each step. The order is a function of the seed: a resumed run needs no other memory."""
    order = random.Random(f"order {cfg.seed}").sample(pairs, len(pairs))
    peak = cfg.lr or default_lr(model.config) / (2 if cfg.resume_from else 1)
    total = len(pairs) // cfg.batch_size
    for step in range(first, total):
        # 1) batch
        batch = [order[step * cfg.batch_size + i] for i in ranks.rows(cfg.batch_size)]
        # 2) forward and loss  3) backward, clip, step
        lr = learning_rate(step, total, peak)
        yield step + 1, train_step(model, optimizer, batch, lr, aux_weight, cfg, ranks)


# ---------------------------------------------------------------------------------- evaluation


def by_group(gaps, pairs: list[Pair]) -> dict[str, list]:
    """{group: [accuracy, pairs]}: all, by rating, by safety labels; equal scores count half."""
    groups = {}
    for hit, pair in zip(((gaps.sign() + 1) / 2).tolist(), pairs):
        for group in ("all", pair.rating, SAFETY_BINS.get(pair.safe)):
            if group:
                groups.setdefault(group, []).append(hit)
    return {group: [sum(hits) / len(hits), len(hits)] for group, hits in groups.items()}


def examine(model, which: str, tests: dict[str, list[Pair]], village=None) -> dict:
    """What a reward model is worth: its numbers on the test pairs of both kinds.

    village: the tiny world if the pairs come from it, for what only the gold score can tell.
    """
    report = {"accuracy": {}}
    for name, pairs in tests.items():
        if not pairs:
            continue
        r = scores(model, [p.chosen for p in pairs] + [p.rejected for p in pairs])  # (2N,)
        gaps = r[:len(pairs)] - r[len(pairs):]
        report["accuracy"][name] = by_group(gaps, pairs)
        if name == "safety":
            report |= detection(r, torch.tensor([p.safe[i] == 0 for i in (0, 1) for p in pairs]))
        if name == which:
            report |= length_bias(r, gaps, pairs)
            report["histograms"] = [torch.histc(x.sigmoid(), 20, 0, 1).tolist() for x in r.chunk(2)]
            report["worst"] = [
                f"{gaps[i]:+.1f} {pairs[i].rating}: {p['prompt'][-1]['content'][:60]} | preferred: "
                f"{p['chosen'][:60]} | instead of: {p['rejected'][:60]}"
                for i in gaps.argsort()[:5].tolist() for p in [pairs[i].row]]
            if village:
                report |= against_gold(r, pairs, village, "safe" if which == "safety" else which)
    return report


def detection(r, is_unsafe) -> dict:
    """How well low scores find unsafe answers, [precision, recall], and RLHF's threshold.

    threshold, a probability: where the precision is that of the paper's 0.15. Never above 0.5: a
    model that is right about nearly all answers keeps its precision far into the safe ones.
    """
    threshold = min(calibrate(r, is_unsafe, PRECISION), 0.0)
    found = {}
    for name, t in (("0.15", math.log(0.15 / 0.85)), ("0.5", 0.0), ("threshold", threshold)):
        low = r < t
        hits = (low & is_unsafe).sum().item()
        found[name] = [hits / max(low.sum().item(), 1), hits / max(is_unsafe.sum().item(), 1)]
    return {"unsafe_found_below": found, "unsafe_answers": is_unsafe.sum().item(),
            "threshold_raw": threshold, "threshold": 1 / (1 + math.exp(-threshold))}


def length_bias(r, gaps, pairs: list[Pair]) -> dict:
    """Whether length is taken for quality: how often the longer answer wins, with people and model.

    r (2N,): scores of the chosen, then of the rejected answers; gaps (N,): their differences.
    """
    lengths = torch.tensor([[len(p.chosen) - p.prompt for p in pairs],
                            [len(p.rejected) - p.prompt for p in pairs]]).float().flatten()  # (2N,)
    longer = lengths[:len(pairs)] - lengths[len(pairs):]  # > 0: people chose the longer one
    n = max((longer != 0).sum().item(), 1)
    return {"length_correlation": torch.corrcoef(torch.stack((r, lengths)))[0, 1].item(),
            "longer_wins": {"people": (longer > 0).sum().item() / n,
                            "model": (longer * gaps > 0).sum().item() / n}}


def against_gold(r, pairs: list[Pair], village, by: str) -> dict:
    """ceiling: the gold score's own accuracy on these noisy labels, which only luck can beat.
    calibration: [gold score, mean, deviation, answers] of sigmoid(score) by gold bin [L2 Fig. 29].

    Only reported: no loss, filter or choice reads the gold score.
    """
    annotator, rows = data.Annotator(village), [p.row for p in pairs]
    gaps = torch.tensor([annotator.gap(row["prompt"], row["chosen"], row["rejected"], by)
                         for row in rows])
    gold = torch.tensor([annotator.gold(row["prompt"], row[side])[by]
                         for side in ("chosen", "rejected") for row in rows])  # (2N,)
    levels, calibration = (gold * 5).round() / 5, []
    for level in levels.unique():
        p = r[levels == level].sigmoid()
        calibration.append([level.item(), p.mean().item(), p.std(correction=0).item(), len(p)])
    return {"ceiling": by_group(gaps, pairs), "calibration": calibration}


def show(reports: dict[str, dict]) -> None:
    """Print accuracy by rating on both test sets (Tables 7, 8), and each model's weak points."""
    columns = (*data.RATINGS, "all", *SAFETY_BINS.values())
    print(f"\naccuracy in %, of pairs {'':<14}" + "".join(f"{name:>18}" for name in columns))
    for test in ("helpful", "safety"):
        lines = {f"{which} model": r["accuracy"].get(test) for which, r in reports.items()}
        lines["gold score: ceiling"] = reports.get(test, {}).get("ceiling")
        for name, groups in lines.items():
            if groups:
                cells = (f"{100 * groups[c][0]:.1f} of {groups[c][1]:>4}" if c in groups else ""
                         for c in columns)
                print(f"{f'{test} test, {name}':<38}" + "".join(f"{cell:>18}" for cell in cells))
    for which, report in reports.items():
        wins = report["longer_wins"]
        print(f"\n{which} model: score and length correlate by {report['length_correlation']:+.2f};"
              f" the longer answer wins {wins['people']:.0%} of the labels, {wins['model']:.0%} of "
              f"the model's choices; the widest disagreements:")
        print("\n".join(f"  {line}" for line in report["worst"]))
    found = reports.get("safety", {}).get("unsafe_found_below", {})
    for name, (precision, recall) in found.items():
        print(f"unsafe answers below {name}: precision {precision:.2f}, recall {recall:.2f}")


def draw(reports: dict[str, dict], out: Path) -> Path:
    """out/figures/reward.png: accuracy by rating, scores (Fig. 27), calibration (Fig. 29)."""
    import matplotlib
    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(reports), 3, figsize=(13, 3.8 * len(reports)), squeeze=False)
    for (which, report), (left, middle, right) in zip(reports.items(), axes):
        own, ceiling = report["accuracy"][which], report.get("ceiling", {})
        for groups, style, label in ((own, "o-", "model"), (ceiling, "s--", "gold score")):
            rated = [rating for rating in data.RATINGS if rating in groups]
            left.plot(rated, [100 * groups[rating][0] for rating in rated], style, label=label)
        left.axhline(50, color="grey", linewidth=0.8)
        left.set(title=f"{which}: accuracy by rating", ylabel="pairs in the right order (%)")
        for counts, label in zip(report["histograms"], ("chosen", "rejected")):
            middle.stairs(counts, [i / 20 for i in range(21)], fill=True, alpha=0.5, label=label)
        middle.set(title=f"{which}: scores", xlabel="sigmoid(score)", ylabel="test answers")
        if "calibration" in report:
            gold, mean, spread, _ = zip(*report["calibration"])
            right.errorbar(gold, mean, spread, fmt="o-", capsize=3, label="mean and deviation")
            right.set(title=f"{which}: calibration", xlabel="gold score of the test answer",
                      ylabel="sigmoid(score)")
        for panel in (left, middle, right):
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
    figure.tight_layout()
    path = out / "figures" / "reward.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


# ------------------------------------------------------------------------------------- studies


def studies(train: dict, tests: dict, cfg: Config, ranks, layers: int) -> dict[str, dict]:
    """Train again with one thing changed; prints and returns the reports.

    --ablate: the margin tables (Table 28), and no auxiliary loss (Table 29). --sweep: nested parts
    of the pairs, and the chat model's first layers in place of a smaller chat model (Fig. 6).
    """
    weight, runs, reports = {"helpful": 0.0, "safety": cfg.aux_weight}, {}, {}
    for which, pairs in train.items():
        if cfg.ablate and which == "helpful":
            for table in MARGINS:
                again = [p._replace(margin=margin_of(p.row, table)) for p in pairs]
                runs[f"helpful, margin {table}"] = which, again, 0.0, layers
        if cfg.ablate and which == "safety":
            for w in (0.0, cfg.aux_weight):
                runs[f"safety, auxiliary loss x {w}"] = which, pairs, w, layers
        if cfg.sweep:
            mixed = random.Random(f"sweep {cfg.seed}").sample(pairs, len(pairs))
            for depth in sorted({layers, -(-layers // 2), -(-layers // 4)}):
                for some in (mixed[:len(mixed) // part] for part in (8, 4, 2, 1)):
                    runs[f"{which}, {depth} layers, {len(some)} pairs"] = (
                        which, some, weight[which], depth)
    for name, (which, pairs, aux_weight, depth) in runs.items():
        model, optimizer = start(cfg, which, ranks, depth)
        for _ in fit(model, optimizer, pairs, aux_weight, cfg, ranks):
            pass
        reports[name] = report = examine(model, which, tests)
        print(f"{name}: accuracy " + ", ".join(f"{100 * share:.1f} {group}" for group, (share, _)
                                               in report["accuracy"][which].items()))
        if which == "safety":
            print("    unsafe answers below 0.5: precision {:.2f}, recall {:.2f}".format(
                *report["unsafe_found_below"]["0.5"]))
    return reports


# ---------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Collect, train both models, report; returns {which: report}. ValueError for bad flags."""
    began, out = time.time(), Path(cfg.out)
    source = cfg.checkpoint or out / "sft.pt"
    if cfg.resume_from:
        source = Path(cfg.resume_from) / f"reward_{cfg.which.replace('both', 'helpful')}.pt"
    config = plan.shape_of(source, cfg.model, cfg.dry_run)
    cfg = M.at_size(cfg, PAPER, config.dim)
    if cfg.dry_run:
        plan.dry_run(dataclasses.replace(config, scalar_head=True), cfg.batch_size,
                     config.max_seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     device=cfg.device, pairs=True)
        return {}
    tokenizer = data.Tokenizer(M.load(source, "cpu")[1]["tokenizer"])
    ranks, state = scale.setup(cfg.device, cfg.tp), out / "reward.state.pt"
    print(kernels.choose(cfg.kernels, ranks.device))
    resumes = cfg.resume and (state.exists() or state.with_suffix("").exists())
    if not cfg.data and not resumes:
        collect(cfg, ranks)
    train, tests = prepare(cfg, tokenizer, config.max_seq_len)
    steps = {which: len(pairs) // cfg.batch_size for which, pairs in train.items()}
    model, optimizer = start(cfg, next(iter(train)), ranks)
    saved = scale.load_state(state, model, optimizer, ranks, check=lambda extra: M.check_resume(
        extra, cfg, tokenizer.model_bytes)) if resumes else None
    log = M.Log("reward", out, sum(steps.values()), saved["step"] if saved else None)
    reports, before = {}, 0  # before: steps of the models that are finished

    for which, pairs in train.items():
        path, aux_weight = out / f"reward_{which}.pt", cfg.aux_weight * (which == "safety")
        if saved and saved["which"] != which:  # finished before the interruption
            reports[which], before = M.load(path, "cpu")[1]["metrics"], before + steps[which]
            continue
        if reports and not saved:
            model, optimizer = start(cfg, which, ranks)
        first, saved = saved["step"] - before if saved else 0, None
        for done, metrics in fit(model, optimizer, pairs, aux_weight, cfg, ranks, first):
            # 4) log  5) once in a while: save
            is_last = done == steps[which]
            if done % cfg.log_every == 0 or done == 1 or is_last:
                log.step(before + done, model=which, **metrics)
            if done % cfg.save_every == 0 or is_last:
                extra = M.resume_info(before + done, log.total, cfg, tokenizer.model_bytes)
                scale.save_state(state, model, optimizer, extra | {"which": which}, ranks)
        before += steps[which]
        reports[which] = examine(model, which, {which: tests[which]} if cfg.resume_from else tests,
                                 None if cfg.data else data.World())
        weights = scale.full_weights(model)
        if ranks.is_main:
            M.save(path, model, f"reward_{which}", tokenizer.model_bytes, reports[which],
                   cfg.data or "the tiny world", weights=weights)
    show(reports)
    extra = {"studies": studies(train, tests, cfg, ranks, config.n_layers)}
    if ranks.is_main:
        M.summarize("reward", out, reports | extra | {"minutes": (time.time() - began) / 60})
        drawn = "" if cfg.resume_from else f" and {draw(reports, out)}"
        files = ", ".join(f"{out}/reward_{which}.pt" for which in reports)
        print(f"wrote {files}{drawn}; next: python ppo.py")
    scale.remove_state(state, ranks)
    ranks.finish()
    return reports


if __name__ == "__main__":
    M.run(main, Config)
