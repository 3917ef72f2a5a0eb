"""Reward models: two networks learn to score an answer as people would [L2 §3.2.1, §3.2.2].

People see two answers to a prompt, pick one, and say how much better it is. The model gives each
answer a number, and the chosen one's must be larger, by a margin that grows with the rating:

    loss = -log sigmoid(r_chosen - r_rejected - m(rating))      ln 2 at equal scores and m = 0

Helpfulness and safety pull apart: the most helpful answer to a harmful question is to comply. So
there are two models. Both start as the chat model, to know what it knows; a head with one output
replaces the one over the vocabulary, and is read at the EOS of the dialogue.

in  : out/sft.pt; comparisons of two variants of it that the annotator labels, or yours (--data)
out : out/reward_helpful.pt, out/reward_safety.pt, out/reward.jsonl,
      out/preferences_*.jsonl: the comparisons, in the form of a user's own
run : python reward.py                                  about 2 minutes on two AVX2 cores
      python reward.py --data mine.jsonl,mine_test.jsonl      rows as in data.read_preferences

Expect 72 to 73% (helpfulness) and 71 to 78% (safety) of the sampled test pairs in the right order;
the labels' noise allows 84 to 86% and 78% (`python exam.py reward`).

Keys: [L2] Llama 2, 2307.09288.

Differs from the paper:
- An annotator with known noise instead of people; 12,000 pairs instead of 1.4 million, and no
  open-source ones (1.5 million more there, which stay in both mixes).
- A pair is one model at two temperatures, not two model variants; half or more of the first answers
  are planted: refusals, stray or missing sentences, other questions' (village.Village.plant).
- The helpfulness model reads no safety pair with an answer labelled unsafe: see `mix`.
- RLHF's threshold is calibrated to the paper's precision, .89, instead of taken over: 0.15.
- UNSPECIFIED in L2: where the score is read (EOS), the head's start, margin, auxiliary loss.
"""

from __future__ import annotations

import dataclasses, json, math, random, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import data, kernels, model as M, plan, rollouts, scale, stage, village as V
from stage import ranged

STAGE = "reward"  # OUT/reward_helpful.pt, OUT/reward_safety.pt

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is compared, and how it is learnt: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # chat model to start from; none: OUT/sft.pt
    data: str | None = None  # .jsonl files or folders, comma between; none: collect comparisons
    which: Literal["both", "helpful", "safety"] = "both"  # models to train
    out: str = "out"  # folder of checkpoints and metrics
    seed: int = ranged(0, least=0)  # of prompts, labels, head and order
    pairs: int = ranged(12000, least=1)  # to collect, a third for safety; paper: 1.4 million
    valid_pairs: int = ranged(500, least=1)  # held out for each; paper: 1000 a week (§3.2.2)
    max_new_tokens: int = ranged(80, least=1)  # tokens of an answer
    margin: Literal["none", "small", "large"] = "small"  # m(rating); paper: unsaid (Table 27)
    aux_weight: float = ranged(0.5, least=0)  # of the safety model's classification loss (§A.3.4)
    batch_size: int = ranged(8, least=1)  # pairs per step, over all ranks; paper: 512 (§3.2.2)
    micro_batch: int = ranged(8, least=1)  # pairs per rank and forward pass: less memory
    lr: float = ranged(0, least=0)  # peak; 0: by width, half with --resume-from; paper: 1e-5, 5e-6
    log_every: int = ranged(20, least=1)  # steps between two lines of the log
    save_every: int = ranged(100, least=1)  # steps between resume states
    resume: bool = False  # continue from out/reward.state.pt if it is there
    resume_from: str | None = None  # folder of two older reward models to train on
    skip_bad_rows: bool = False  # count and skip rows of --data that are wrong
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = ranged(1, least=1)  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


MARGINS = {  # m(rating), in the order of data.RATINGS: significantly better ... negligibly better
    "none": (0, 0, 0, 0), "small": (1, 2 / 3, 1 / 3, 0), "large": (3, 2, 1, 0)}  # [L2 Table 27]
# out/preferences_NAME.jsonl: "valid" calibrates; test pairs are collected by exam.py alone
COLLECTED = ("helpful", "helpful_valid", "safety", "safety_valid")
TEMPERATURES = (0.5, 0.8, 1.1)  # of the variants that are compared; UNSPECIFIED in L2
PRECISION = 0.89  # of the gate of RLHF: "threshold 0.15 ... precision of 0.89" [L2 §3.2.3]

# ------------------------------------------------------------------------------------ the idea


def ranking_loss(chosen, rejected, margin):
    """-log sigmoid(r_c - r_r - m): raw scores and margins float (B,) -> (B,) nats [L2 Eq.2].

    d loss / d r_c = -(1 - sigmoid(r_c - r_r - m)), and the opposite for r_r. So the margin makes
    the task harder: the pull is 1/2 not at equal scores but at a gap of m.
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


def preferences(out, name: str) -> Path:
    """Where `collect` writes the comparisons of that name."""
    return Path(out) / f"preferences_{name}.jsonl"


def collect(model, tokenizer, village: V.Village, name: str, n: int, seed: int,
            max_new_tokens: int) -> list[dict]:
    """n comparisons of two answers to a prompt, labelled, as rows of a preference file [L2 §3.2.1].

    name: "helpful" or "safety", the guidelines, each with prompts of its own, and behind it
    "_valid" or "_test" for held-out prompts. Helpfulness is trained on more of what is hard to
    judge, and measured on prompts as they come. Prompts whose answers are equal, empty or
    unfinished give none.
    """
    which, _, split = name.partition("_")
    mix = "compared" if name == "helpful" else which
    prompts = village.prompts(mix, split or "train", n, seed, V.STYLED)
    return compare(model, tokenizer, village, [row["messages"] for row in prompts],
                   "safe" if which == "safety" else "helpful", f"{name} {seed}", max_new_tokens)


def collect_all(cfg: Config, ranks) -> None:
    """Write out/preferences_{helpful,safety}[_valid].jsonl with answers of the chat model."""
    model, info = M.load(cfg.checkpoint or Path(cfg.out) / "sft.pt", "cpu")
    tokenizer = data.Tokenizer(info["tokenizer"])
    village = V.Village(info["metrics"].get("village") or 0)
    model = scale.wrap(model, ranks)
    counts = {"helpful": cfg.pairs - cfg.pairs // 3, "safety": cfg.pairs // 3,
              "helpful_valid": cfg.valid_pairs, "safety_valid": cfg.valid_pairs}
    for name in COLLECTED:
        rows = collect(model, tokenizer, village, name, counts[name], cfg.seed,
                       cfg.max_new_tokens)
        path = preferences(cfg.out, name)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if ranks.is_main:
            M.atomic_write(path, lambda f: f.write(text.encode()))
        print(f"{path}: {len(rows)} comparisons, {sum(row['planted'] for row in rows)} with a "
              f"planted answer; {counts[name] - len(rows)} prompts gave none")
    ranks.barrier()  # every rank reads the files, once they are there


def compare(model, tokenizer, village, prompts: list, by: str, seed: str,
            max_new_tokens: int) -> list[dict]:
    """Rows of a preference file: two answers of different variants to each open dialogue.

    The variants are two temperatures (DEVIATES: the paper's are also two models). Then
    `Annotator.comparisons` plants (replaces half or more of the first answers) and labels: a wins
    with probability sigmoid(8 gap), gap = gold(a) - gold(b); the rating, and with it the margin, is
    |gap| + N(0, .08) cut at .5, .25, .08. by: "helpful" or "safe", the guidelines of the label.
    """
    rng = random.Random(f"compare {seed}")
    jobs = []  # (open dialogue, temperature), two neighbours for each prompt
    for prompt in prompts:
        jobs += [(prompt, temperature) for temperature in rng.sample(TEMPERATURES, 2)]
    texts = sample(model, tokenizer, jobs, rng.randrange(1 << 30), max_new_tokens)
    return V.Annotator(village).comparisons(prompts, texts[::2], texts[1::2], rng, by)


def sample(model, tokenizer, jobs: list, seed: int, max_new_tokens: int) -> list[str]:
    """An answer to each (open dialogue, temperature); "" where no EOS came.

    An answer that was cut is no answer: a file of messages could not say that it has no end.
    """
    texts = [""] * len(jobs)
    for temperature in TEMPERATURES:
        same = [i for i, (_, wanted) in enumerate(jobs) if wanted == temperature]
        if not same:
            continue
        answers = rollouts.answer(model, tokenizer, [jobs[i][0] for i in same],
                                  max_new_tokens, temperature, seed, row_ids=same)
        for i, text, is_finished in zip(same, answers.texts, answers.finished.tolist()):
            if is_finished:
                texts[i] = data.break_tags(text)
    return texts


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


def goal_of(row: dict) -> str:
    """"safety" for a row whose answers are labelled safe or not, else "helpful"."""
    return "safety" if None not in (row["chosen_safe"], row["rejected_safe"]) else "helpful"


def parse(rows: list[dict]) -> list[dict]:
    """Rows of `collect` as `data.read_preferences` gives those of a file."""
    return list(map(data.parse_preference, rows))


def split_off(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(training, held-out) rows: a tenth of the openings, at most 1000, each with all its rows."""
    openings = sorted({row["prompt"][0]["content"] for row in rows})
    count = min(1000, max(1, len(openings) // 10))
    chosen = set(random.Random(0).sample(openings, count))
    parts = {True: [], False: []}
    for row in rows:
        parts[row["prompt"][0]["content"] in chosen].append(row)
    return parts[False], parts[True]


def is_unsafe_preferred(row: dict) -> bool:
    """An unsafe answer preferred to a safe one: excluded, "as we believe safer responses will also
    be better" [L2 §3.2.1]."""
    return row["chosen_safe"] is False and row["rejected_safe"] is True


def read_comparisons(cfg: Config) -> tuple[list[dict], list[dict]]:
    """(training, held-out) rows of files, and no prompt on both sides.

    Files named *_valid.jsonl or *_test.jsonl are held out; without any, it is a tenth of the
    dialogues, each with all that begin with the same message.
    """
    if cfg.data:
        files = data.find_files(cfg.data.split(","), ".jsonl")
    else:
        files = [preferences(cfg.out, name) for name in COLLECTED]
    names = {True: [], False: []}
    for file in files:
        names[file.name.split(".")[0].endswith(("_valid", "_test"))].append(file)
    train = data.read_preferences(names[False], cfg.skip_bad_rows)
    if names[True]:
        held_out = data.read_preferences(names[True], cfg.skip_bad_rows)
    else:
        train, held_out = split_off(train)

    held_prompts = {json.dumps(row["prompt"]) for row in held_out}
    kept, on_both_sides, excluded = [], 0, 0
    for row in train:
        if json.dumps(row["prompt"]) in held_prompts:
            on_both_sides += 1
        elif is_unsafe_preferred(row):
            excluded += 1
        else:
            kept.append(row)
    held_kept = [row for row in held_out if not is_unsafe_preferred(row)]
    print(f"{len(kept)} comparisons to train on, {len(held_kept)} held out; left out: "
          f"{on_both_sides} whose prompt\nis held out, {excluded} and "
          f"{len(held_out) - len(held_kept)} that prefer an unsafe answer to a safe one")
    return kept, held_kept


def mix(rows: list[dict], which: str, seed: int) -> list[dict]:
    """The rows that a model is trained on [L2 §3.2.2].

    Helpfulness: all helpful rows, and as many safety rows where there are. DEVIATES: of those only
    pairs of two safe answers; the others would teach both models to refuse, and leave nothing to
    tell apart (in the village 79 to 21 is what there is). Safety: all safety rows, and helpful
    ones, 90 to 10.
    """
    own = [row for row in rows if goal_of(row) == which]
    other = [row for row in rows if goal_of(row) != which]
    count = len(own) // 9
    if which == "helpful":
        other = [row for row in other if row["chosen_safe"] and row["rejected_safe"]]
        count = len(own)
    return own + random.Random(f"mix {seed}").sample(other, min(count, len(other)))


LABEL = {True: 1, False: 0, None: -1}  # of an answer: safe, unsafe, nobody said


def encode(rows: list[dict], tokenizer, margin: str, longest: int) -> list[Pair]:
    """Rows as pairs of token lists; those longer than the context are left out, and counted."""
    pairs = []
    for row in rows:
        prompt = data.encode_dialog(tokenizer, row["prompt"])[0]
        sides = []
        for side in ("chosen", "rejected"):
            answered = row["prompt"] + [{"role": "assistant", "content": row[side]}]
            sides.append(data.encode_dialog(tokenizer, answered)[0])
        if max(map(len, sides)) <= longest:
            safe = (LABEL[row["chosen_safe"]], LABEL[row["rejected_safe"]])
            pairs.append(Pair(*sides, len(prompt), margin_of(row, margin), safe, row["rating"],
                              row))
    if len(pairs) < len(rows):
        print(f"skipped {len(rows) - len(pairs)} comparisons of more than {longest} tokens")
    return pairs


def describe(which: str, pairs: list[Pair], held_out: list[Pair]) -> None:
    """What a model learns from, and the loss of one that knows nothing."""
    shares = []
    for rating in data.RATINGS:
        shares.append((rating, sum(p.rating == rating for p in pairs)))
    for safe, name in SAFETY_BINS.items():
        shares.append((name, sum(p.safe == safe for p in pairs)))
    at_zero = sum(math.log1p(math.exp(p.margin)) for p in pairs) / len(pairs)
    parts = ", ".join(f"{n / len(pairs):.0%} {name}" for name, n in shares if n)
    print(f"{which} model: {len(pairs)} pairs, {len(held_out)} held out; loss at equal scores "
          f"{at_zero:.4f}\n    {parts}")


def prepare(cfg: Config, tokenizer, longest: int) -> tuple[dict, dict]:
    """({which: training pairs}, {which: held-out pairs}); ValueError where there is too little."""
    rows, held_rows = read_comparisons(cfg)
    train, held = {}, {}
    for which in ("helpful", "safety"):
        own = [row for row in held_rows if goal_of(row) == which]
        held[which] = encode(own, tokenizer, cfg.margin, longest)
        if cfg.which in ("both", which):
            train[which] = encode(mix(rows, which, cfg.seed), tokenizer, cfg.margin, longest)
    if cfg.which == "both" and any(train.values()):  # rows without safety labels make one model
        train = {which: pairs for which, pairs in train.items() if pairs}
    for which, pairs in train.items():
        if len(pairs) < cfg.batch_size or not held[which]:
            raise ValueError(f"{len(pairs)} comparisons to train the {which} model on and "
                             f"{len(held[which])} held out: --batch-size {cfg.batch_size} and "
                             f"1 are needed; bring more rows (safety rows have chosen_safe and "
                             f"rejected_safe), or choose the other model with --which")
        describe(which, pairs, held[which])
    return train, held


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
    # as in pretraining [L2 §3.2.2]; the learning rate is set at every step, by stage.step
    return model, stage.adamw(model, 0.0, weight_decay=0.1)


def default_lr(dim: int) -> float:
    """Inversely to the width: 5e-4 for tiny's 128; plan.SETTINGS has the paper's."""
    return 5e-4 * 128 / dim


def as_rows(pairs: list[Pair], device):
    """B pairs as 2B rows, all chosen, then all rejected: dialogues, margin (B,), is_safe (2B,)."""
    chosen = [(p.chosen, p.safe[0]) for p in pairs]
    rejected = [(p.rejected, p.safe[1]) for p in pairs]
    dialogs, labels = zip(*chosen, *rejected)
    margin = torch.tensor([p.margin for p in pairs], device=device)
    is_safe = torch.tensor(labels, dtype=torch.float32, device=device)
    return dialogs, margin, is_safe


def train(model, optimizer, pairs: list[Pair], aux_weight: float, cfg: Config, ranks,
          first: int = 0):
    """One epoch, for "training longer can lead to over-fitting" [L2 §3.2.2]; yields (steps done,
    metrics) behind each step. The order is a function of the seed: a resumed run needs no other
    memory."""
    order = random.Random(f"order {cfg.seed}").sample(pairs, len(pairs))
    peak = cfg.lr or default_lr(model.config.dim) / (2 if cfg.resume_from else 1)
    total = len(pairs) // cfg.batch_size
    warmup = max(5, round(0.03 * total))  # 3% of the steps, at least 5 [L2 §3.2.2]
    for step in range(first, total):
        # 1) batch
        batch = [order[step * cfg.batch_size + i] for i in ranks.rows(cfg.batch_size)]
        # 2) forward, loss, backward; chosen and rejected are rows of one forward pass
        sums = torch.zeros(3, dtype=torch.float64)  # ranking loss, auxiliary loss, right order
        for i in range(0, len(batch), cfg.micro_batch):
            piece = batch[i:i + cfg.micro_batch]  # B pairs
            dialogs, margin, is_safe = as_rows(piece, ranks.device)
            with M.autocast(ranks.device):
                scores = rollouts.end_scores(model, *rollouts.pad(dialogs, ranks.device))  # (2B,)
            chosen, rejected = scores.chunk(2)
            ranking = ranking_loss(chosen, rejected, margin).sum()
            aux = safety_loss(scores, is_safe).sum()
            # the mean over this rank's pairs: FSDP averages gradients over its ranks. The auxiliary
            # loss is summed over both answers of a pair
            ((ranking + aux_weight * aux) / len(batch)).backward()
            sums += torch.tensor([ranking.item(), aux.item(), (chosen > rejected).sum().item()])
        loss, aux_loss, accuracy = (ranks.mean(x / len(batch)) for x in sums.tolist())
        # 3) clip, step
        norm = scale.clip(model, 1.0)  # as in pretraining [L2 §3.2.2]
        lr = stage.cosine(step, total, peak, warmup)
        stage.step(optimizer, lr, loss=loss, aux_loss=aux_loss, grad_norm=norm)
        metrics = {"loss": loss, "accuracy": accuracy, "lr": lr, "grad_norm": norm}
        if aux_weight:
            metrics["aux_loss"] = aux_loss
        yield step + 1, metrics


# ---------------------------------------------------------------------------------- evaluation


def held_out(model, which: str, pairs: list[Pair]) -> dict:
    """Accuracy on held-out pairs ("valid", never exam.py's test); of the safety model also RLHF's
    threshold."""
    dialogs = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = rollouts.scores(model, dialogs)  # (2N,)
    chosen, rejected = scores.chunk(2)
    report = {"accuracy": (((chosen - rejected).sign() + 1) / 2).mean().item()}  # equal: half
    if which == "safety":
        is_unsafe = torch.tensor([p.safe[i] == 0 for i in (0, 1) for p in pairs])
        report |= detection(scores, is_unsafe)
    return report


def found_below(scores, is_unsafe, **more: float) -> dict[str, list[float]]:
    """How well low scores find unsafe answers: {"0.15", "0.5", ...: [precision, recall]}.

    scores: raw, float (N,); more: further cuts by name, in raw scores.
    """
    reached = {}
    for name, cut in {"0.15": math.log(0.15 / 0.85), "0.5": 0.0, **more}.items():
        low = scores < cut
        hits = (low & is_unsafe).sum().item()
        reached[name] = [hits / max(low.sum().item(), 1), hits / max(is_unsafe.sum().item(), 1)]
    return reached


def detection(scores, is_unsafe) -> dict:
    """RLHF's threshold, a probability: where the precision on held-out answers is that of the
    paper's 0.15, by their noisy labels. Never above 0.5: a model that is right about nearly all
    answers keeps its precision far into the safe ones."""
    threshold = min(calibrate(scores, is_unsafe, PRECISION), 0.0)
    return {"unsafe_found_below": found_below(scores, is_unsafe, threshold=threshold),
            "unsafe_answers": is_unsafe.sum().item(), "threshold_raw": threshold,
            "threshold": 1 / (1 + math.exp(-threshold))}


# ---------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Collect, train both models, report; returns {which: report}. ValueError for bad flags."""
    began = time.time()
    stage.check(cfg)
    out = Path(cfg.out)
    source = cfg.checkpoint or out / "sft.pt"
    if cfg.resume_from:
        source = Path(cfg.resume_from) / f"reward_{cfg.which.replace('both', 'helpful')}.pt"
    config = plan.shape_of(source, cfg.model, cfg.dry_run)
    is_given = cfg.lr > 0
    cfg = stage.at_size(cfg, plan.settings(STAGE, config))
    if cfg.resume_from and not is_given:  # from 7b on too
        cfg = dataclasses.replace(cfg, lr=cfg.lr / 2)
    if cfg.dry_run:
        plan.dry_run(dataclasses.replace(config, scalar_head=True), cfg.batch_size,
                     config.max_seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     device=cfg.device, pairs=True)
        return {}
    info = M.load(source, "cpu")[1]
    tokenizer = data.Tokenizer(info["tokenizer"])
    if cfg.resume_from and not cfg.data:
        chat = M.load(cfg.checkpoint or out / "sft.pt", "cpu")[1]["metrics"].get("village") or 0
        if info["metrics"].get("village") not in (None, chat):
            raise ValueError(f"{source} was trained in village {info['metrics']['village']}, the "
                             f"chat model that is to be compared in village {chat}: give another "
                             f"--resume-from, or another --out")
    ranks = scale.setup(cfg.device, cfg.tp)  # this process among others; alone: rank 0 of 1
    print(kernels.choose(cfg.kernels, ranks.device))
    state = out / f"{STAGE}.state.pt"
    progress = scale.peek_state(state) if cfg.resume else None
    if progress:
        stage.check_resume(progress, cfg, tokenizer.model_bytes)
    if not cfg.data and not progress:
        collect_all(cfg, ranks)
    pairs_of, held_out_of = prepare(cfg, tokenizer, config.max_seq_len)
    steps = {which: len(pairs) // cfg.batch_size for which, pairs in pairs_of.items()}
    log = stage.Log(STAGE, out, sum(steps.values()), progress["step"] if progress else None,
                    watch=("model", "loss", "accuracy", "lr", "grad_norm"))
    origin = {**stage.heritage(info), "flags": dataclasses.asdict(cfg)}
    if not cfg.data:
        origin["village"] = origin["village"] or 0  # as `collect` reads it
    reports = {}
    before = 0  # steps of the models that are finished

    for which, pairs in pairs_of.items():
        path = out / f"reward_{which}.pt"
        # skip what was finished before the interruption
        if progress and progress["which"] != which:
            reports[which] = M.load(path, "cpu")[1]["metrics"]
            before += steps[which]
            continue
        # open, and resume at its own step
        model, optimizer = start(cfg, which, ranks)
        first = 0
        if progress:
            scale.load_state(state, model, optimizer, ranks)
            first = progress["step"] - before
            progress = None  # the next model begins anew
        # train
        aux_weight = cfg.aux_weight if which == "safety" else 0.0
        for done, metrics in train(model, optimizer, pairs, aux_weight, cfg, ranks, first):
            # 4) log  5) once in a while: save
            is_last = done == steps[which]
            if done % cfg.log_every == 0 or done == 1 or is_last:
                log.step(before + done, model=which, **metrics)
            if done % cfg.save_every == 0 or is_last:
                extra = stage.resume_info(before + done, log.total, cfg, tokenizer.model_bytes)
                scale.save_state(state, model, optimizer, extra | {"which": which}, ranks)
        before += steps[which]
        # save
        reports[which] = held_out(model, which, held_out_of[which])
        metrics = {**reports[which], **origin, "minutes": (time.time() - began) / 60}
        scale.save(path, model, f"reward_{which}", tokenizer.model_bytes, metrics,
                   cfg.data or f"village {origin['village']}")

    shares = ", ".join(f"{which} {report['accuracy']:.1%}" for which, report in reports.items())
    print(f"held-out pairs in the right order: {shares}")
    files = ", ".join(f"{out}/reward_{which}.pt" for which in reports)
    print(stage.wrote(files, out, "rejection.py", f"exam.py {STAGE}"))
    scale.remove_state(state, ranks)
    ranks.finish()
    return reports


if __name__ == "__main__":
    stage.run(main, Config)
