"""Supervised fine-tuning: the network learns to answer instead of to continue [L2 §3.1].

The objective is pretraining's, on the answers alone: the prompt is read but not learnt.

    loss = - sum_t mask[t+1] log p(token[t+1] | token[1..t]) / sum_t mask[t+1]     nats per token

mask is 1 on each answer and on the EOS that ends it: without its loss the model never stops.
Demonstrations are helpful and safe ones mixed [L2 §4.2.2], of mixed quality like the paper's; what
is wrong with them is what the reward models and RLHF will mend.

in  : out/pretrain.pt, and dialogues of the tiny world or your own (--data rows.jsonl)
out : out/sft.pt, out/sft.jsonl, out/figures/sft.png
run : python sft.py                                       about 1 minute on two AVX2 cores
      python sft.py --data rows.jsonl --show-batch        look at what carries loss, then stop

Expect helpfulness .55 to .60 at T = 1 and .10 to .14 more at T = 0.5, half of the unsafe prompts
complied with.

Keys: [L2] Llama 2, arXiv 2307.09288.

Differs from the paper:
- A few thousand synthetic dialogues instead of 27,540 written by people.
- A dialogue is never cut in two, and packed dialogues do not see each other (UNSPECIFIED in L2).
"""

from __future__ import annotations

import functools, math, random, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data, kernels, model as M, plan, scale

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is imitated, and how: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # model to start from; none: OUT/pretrain.pt
    data: str | None = None  # .jsonl of dialogues; none: demonstrations of the tiny world
    out: str = "out"  # folder of checkpoints, metrics and figures
    seed: int = 0  # of the demonstrations and of their order
    dialogues: int = 4500  # demonstrations drawn from the tiny world; paper: 27,540 (§3.1)
    epochs: int = 2  # passes over the dialogues; paper: 2 (§3.1)
    batch_size: int = 4  # packed rows per step, over all ranks; paper: 64 (§3.1)
    micro_batch: int = 16  # rows per rank and forward pass; smaller needs less memory
    seq_len: int = 512  # tokens per packed row, at most the model's context; paper: 4096 (§3.1)
    lr: float = 0  # peak of the cosine; 0: by the model's width; paper: 2e-5 (§3.1)
    warmup_steps: int = 10  # UNSPECIFIED in L2
    weight_decay: float = 0.1  # paper: 0.1 (§3.1)
    clip: float = 1.0  # largest gradient norm; paper: 1.0 (§2.2)
    eval_prompts: int = 200  # test prompts of each kind for the final examination
    log_every: int = 10  # steps between two lines on the screen and in out/sft.jsonl
    evaluate_every: int = 100  # steps between held-out losses
    save_every: int = 100  # steps between resume states
    resume: bool = False  # continue from out/sft.state.pt if it is there
    skip_bad_rows: bool = False  # count and skip rows of --data that are wrong
    show_batch: bool = False  # print one batch, loss in green and no loss in grey, and stop
    recompute: bool = False  # recompute activations in the backward pass: less memory
    compile: bool = False  # torch.compile the blocks, for a GPU: 10 s to start, then faster
    tp: int = 1  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


# From 7b on these take the place of the defaults above [L2 §3.1].
PAPER = {"batch_size": 64, "micro_batch": 1, "seq_len": 4096}

# ------------------------------------------------------------------------------------ the idea


def answer_loss(model, tokens, loss_mask, segments):
    """Summed -log p of the tokens where loss_mask is 1: int64 (B, T+1) each -> scalar, nats.

    A sum, not a mean: the caller divides by the answer tokens of the *whole* batch, so that
    pieces, ranks and rows with few answers all weigh each answer token alike.
    """
    hidden = kernels.trunk(model, tokens[:, :-1], segments=segments[:, :-1])  # (B, T, D)
    logp = kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], loss_mask[:, 1:])
    return -logp.sum()


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Cosine from `peak` to a tenth of it [L2 §3.1]; warm-up and floor are UNSPECIFIED in L2."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def default_lr(dim: int) -> float:
    """2e-5 from 7b on [L2 §3.1]; below, inversely to the width: 1e-3 for the tiny model's 128."""
    return 2e-5 if dim >= 4096 else 1e-3 * 128 / dim


# ------------------------------------------------------------------------------------ the data


def pack(dialogs: list[tuple[list[int], list[int]]], width: int):
    """Fill rows of `width` tokens with whole dialogues, in order: three int64 tensors (N, width).

        tokens    <s> [INST] hi [/INST] hello </s> <s> [INST] bye [/INST] ...   0   0
        loss_mask  0     0   0     0      1    1    0     0    0     0    ...   0   0
        segments   0     0   0     0      0    0    1     1    1     1    ...  -1  -1

    A token sees its own segment only, so an answer is learnt as it will be asked for: with its
    own dialogue in front of it and nothing else. No dialogue may be longer than `width`.
    """
    rows, room = [], 0
    for tokens, mask in dialogs:
        assert len(tokens) <= width, f"dialogue of {len(tokens)} tokens in rows of {width}"
        if len(tokens) > room:
            rows.append(([], [], []))
            room = width
        row = rows[-1]
        number = row[2][-1] + 1 if row[2] else 0
        for column, part in zip(row, (tokens, mask, [number] * len(tokens))):
            column.extend(part)
        room -= len(tokens)
    return tuple(torch.tensor([r[i] + [fill] * (width - len(r[i])) for r in rows])
                 for i, fill in enumerate((0, 0, -1)))


def read_demonstrations(cfg: Config, tokenizer) -> tuple[list, list]:
    """(training, held-out) dialogues as (tokens, loss_mask); prints what was skipped."""
    if cfg.data:
        dialogs = data.read_dialogs(cfg.data, cfg.skip_bad_rows)
        random.Random(cfg.seed).shuffle(dialogs)
        cut = max(1, len(dialogs) // 20)
        parts = dialogs[cut:], dialogs[:cut]
    else:
        world = data.World()
        parts = [[row["messages"] for row in world.demonstrations(n, seed)] for n, seed in
                 ((cfg.dialogues, cfg.seed), (300, cfg.seed + 1_000_003))]
        print(world.summary())
    encoded = [[data.encode_dialog(tokenizer, d) for d in part] for part in parts]
    fitting = [[e for e in part if len(e[0]) <= cfg.seq_len + 1] for part in encoded]
    dropped = sum(map(len, encoded)) - sum(map(len, fitting))
    if dropped:
        print(f"skipped {dropped} dialogues longer than --seq-len {cfg.seq_len}")
    if not all(fitting):
        raise ValueError(f"{cfg.data}: {len(fitting[0])} dialogues to train on and "
                         f"{len(fitting[1])} held out fit --seq-len {cfg.seq_len}; at least one "
                         f"of each is needed: bring more rows or raise --seq-len")
    return tuple(fitting)


def pack_epochs(dialogs: list, cfg: Config):
    """All rows of the run in order: every epoch shuffles and packs the dialogues anew."""
    epochs = [pack(random.Random(f"{cfg.seed} {epoch}").sample(dialogs, len(dialogs)),
                   cfg.seq_len + 1) for epoch in range(cfg.epochs)]
    return tuple(torch.cat(columns) for columns in zip(*epochs))


def batch_at(step: int, rows, cfg: Config, ranks):
    """This rank's part of the batch of `step`: three int64 (B, seq_len + 1).

    A pure function of the step, so that a resumed run needs no other memory of where it was.
    """
    mine = step * cfg.batch_size + torch.tensor(list(ranks.rows(cfg.batch_size)))
    real = mine < len(rows[0])  # past the end: row 0 without loss, as all ranks must run alike
    tokens, mask, segments = (column[mine.where(real, 0)] for column in rows)
    return tuple(t.to(ranks.device) for t in (tokens, mask * real[:, None], segments))


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def held_out_loss(model, rows, cfg: Config, device) -> float:
    """Nats per answer token on dialogues that are not trained on; ranks share the work."""
    total, count, ranks = 0.0, rows[1].sum().item(), scale.ranks_of(model)
    mine = [column[ranks.dp_rank::ranks.dp].split(cfg.micro_batch) for column in rows]
    for tokens, mask, segments in zip(*mine):
        with M.autocast(device):
            batch = tokens.to(device), mask.to(device), segments.to(device)
            total += answer_loss(model, *batch).item()
    return ranks.sum(total) / count


def answers_to(model, tokenizer, dialogs: list, temperature: float, seed=0, max_new_tokens=80):
    """(texts, share that ended with EOS): one answer to each open dialogue."""
    prompts = [data.encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    tokens, _ = scale.rollout(model, prompts, max_new_tokens, temperature=temperature,
                                seed=seed, stop=tokenizer.eos_id)
    ended = sum(row[-1] == tokenizer.eos_id for row in tokens) / len(tokens)
    return [tokenizer.decode(row).strip() for row in tokens], ended


def grade(model, tokenizer, cfg: Config) -> dict:
    """What the annotator thinks of the model's answers, and of those it has learnt from."""
    village = data.World()
    own = village.demonstrated()
    print(f"demonstrations' own answers: helpfulness {own['gold_helpfulness']:.3f}  violations "
          f"{own['violations']:.1%}  false refusals {own['false_refusals']:.1%}")
    answer = functools.partial(answers_to, model, tokenizer)
    return {"demonstrations": own, **data.Annotator(village).examine(answer, cfg.eval_prompts)}


# ---------------------------------------------------------------------------------------- main


def train_step(model, optimizer, rows, lr: float, cfg: Config, ranks) -> tuple[float, float]:
    """One optimizer step on this rank's rows: (loss in nats per answer token, gradient norm).

    Normalised by the answer tokens of the global batch: `answers` is counted over all ranks first.
    """
    answers = ranks.sum(rows[1][:, 1:].sum().item())
    total = 0.0
    for piece in zip(*(column.split(cfg.micro_batch) for column in rows)):
        with M.autocast(ranks.device):
            nats = answer_loss(model, *piece)
        # FSDP averages gradients over its ranks; times their number makes that a sum
        (nats * (ranks.dp / answers)).backward()
        total += nats.item()
    loss = ranks.sum(total) / answers
    norm = scale.clip(model, cfg.clip)
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: training diverged; a smaller "
                                 f"--lr (now {lr:.2g}) or more --warmup-steps helps")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def write(model, tokenizer, cfg: Config, final: dict, began: float, ranks) -> None:
    """Examine the model; out/sft.pt, its figure and summary. `final` gets the grades."""
    out = Path(cfg.out)
    if not cfg.data:
        with scale.unsharded(model):
            final |= grade(model, tokenizer, cfg)
    final["minutes"] = (time.time() - began) / 60
    weights = scale.full_weights(model)
    if ranks.is_main:
        M.save(out / "sft.pt", model, "sft", tokenizer.model_bytes, final,
               cfg.data or "the tiny world", weights=weights)
        figure = M.plot_log("sft", out, {"loss": "training", "val_loss": "held out"},
                            "optimizer step", "loss (nats per answer token)",
                            "Supervised fine-tuning")
        M.summarize("sft", out, final)
        print(f"wrote {out}/sft.pt and {figure}; next: python reward.py")


def main(cfg: Config) -> dict:
    """Fine-tune, evaluate, save; returns the final metrics. ValueError for wrong flags."""
    began, out = time.time(), Path(cfg.out)
    source = cfg.checkpoint or out / "pretrain.pt"
    config = plan.shape_of(source, cfg.model, cfg.dry_run)
    cfg = M.at_size(cfg, PAPER, config.dim)
    if not 1 < cfg.seq_len <= config.max_seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len}: this model's context is {config.max_seq_len}")
    if cfg.dry_run:
        plan.dry_run(config, cfg.batch_size, cfg.seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     device=cfg.device)
        return {}
    model, info = M.load(source, "cpu")
    tokenizer = data.Tokenizer(info["tokenizer"])
    train, held_out = read_demonstrations(cfg, tokenizer)
    rows, val_rows = pack_epochs(train, cfg), pack(held_out, cfg.seq_len + 1)
    if cfg.show_batch:
        for tokens, mask in zip(rows[0][:4].tolist(), rows[1][:4].tolist()):
            print(data.show_dialog(tokenizer, tokens, mask), end="\n\n")
        return {}
    ranks = scale.setup(cfg.device, cfg.tp)
    print(kernels.choose(cfg.kernels, ranks.device))
    model = scale.wrap(model, ranks, recompute=cfg.recompute, compile=cfg.compile)
    optimizer = M.adamw(model, 0.0, cfg.weight_decay)
    state = out / "sft.state.pt"
    check_same = functools.partial(M.check_resume, cfg=cfg, tokenizer=tokenizer.model_bytes)
    saved = scale.load_state(state, model, optimizer, ranks, check_same) if cfg.resume else None
    first, total = saved["step"] if saved else 0, math.ceil(len(rows[0]) / cfg.batch_size)
    log = M.Log("sft", out, total, first if saved else None)
    print(f"{len(train)} dialogues in {len(rows[0]) / cfg.epochs:.0f} rows of {cfg.seq_len} tokens "
          f"({rows[1].float().mean():.0%} answers), {len(held_out)} held out; {cfg.epochs} epochs "
          f"are {total} steps of {cfg.batch_size} rows")
    if not saved:
        with scale.unsharded(model):
            before = held_out_loss(model, val_rows, cfg, ranks.device)
        print(f"held-out answer loss before: {before:.4f}")

    for step in range(first, total):
        # 1) batch
        batch = batch_at(step, rows, cfg, ranks)
        # 2) forward and loss  3) backward, clip, step
        lr = learning_rate(step, total, cfg.lr or default_lr(config.dim), cfg.warmup_steps)
        loss, norm = train_step(model, optimizer, batch, lr, cfg, ranks)
        # 4) log  5) once in a while: evaluate, save
        done, metrics = step + 1, {"loss": loss, "lr": lr, "grad_norm": norm}
        evaluates = done % cfg.evaluate_every == 0 or done == total
        if evaluates:
            with scale.unsharded(model):
                metrics["val_loss"] = held_out_loss(model, val_rows, cfg, ranks.device)
        if done % cfg.log_every == 0 or evaluates or step == first:
            log.step(done, **metrics)
        if done % cfg.save_every == 0 and done < total:
            info = M.resume_info(done, total, cfg, tokenizer.model_bytes)
            scale.save_state(state, model, optimizer, info, ranks)

    final = {"val_loss": metrics["val_loss"]}
    write(model, tokenizer, cfg, final, began, ranks)
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    M.run(main, Config)
