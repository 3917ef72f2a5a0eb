"""Supervised fine-tuning: the network learns to answer instead of to continue [L2 §3.1].

The objective is pretraining's, on the answers alone: the prompt is read but not learnt.

    loss = - sum_t mask[t+1] log p(token[t+1] | token[1..t]) / sum_t mask[t+1]     nats per token

mask is 1 on each answer and on the EOS that ends it: without its loss the model never stops.
Demonstrations are helpful ones and unsafe requests mixed [L2 §4.2.2], most flawed on purpose: what
is wrong with them is what the reward models and RLHF will mend.

in  : out/pretrain.pt, and dialogues of the village or your own (--data rows.jsonl)
out : out/sft.pt, out/sft.jsonl
run : python sft.py                                       about 1 minute on two AVX2 cores
      python sft.py --data rows.jsonl --show-batch        look at what carries loss, then stop

Expect helpfulness .54 to .56 at T = 1 and .12 more at T = 0.5, 56 to 66% of the unsafe prompts
complied with (`python exam.py sft`).

Keys: [L2] Llama 2, arXiv 2307.09288.

Differs from the paper:
- A few thousand synthetic dialogues instead of 27,540 by people, and no public instruction data
  first. Most are flawed, and over half of the unsafe requests complied with (village.WRITERS); the
  paper's are few because they are good, and its safety demonstrations are all safe.
- [/INST] ends the prompt (the released code's format); the paper's special token has no name there.
- A dialogue is never cut in two (the paper fills its rows), and packed dialogues do not see each
  other (UNSPECIFIED in L2).
"""

from __future__ import annotations

import functools, math, random, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data, kernels, model as M, plan, scale, stage, village as V
from stage import ranged

STAGE = "sft"  # OUT/sft.pt

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is imitated, and how: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # model to start from; none: OUT/pretrain.pt
    data: str | None = None  # .jsonl of dialogues; none: demonstrations of the village
    out: str = "out"  # folder of checkpoints and metrics
    seed: int = ranged(0, least=0)  # of the demonstrations and of their order
    dialogues: int = ranged(4500, least=1)  # drawn from the village; paper: 27,540 (§3.1)
    epochs: int = ranged(2, least=1)  # passes over the dialogues; paper: 2 (§3.1)
    batch_size: int = ranged(4, least=1)  # packed rows per step, over all ranks; paper: 64 (§3.1)
    micro_batch: int = ranged(16, least=1)  # rows per rank and forward pass: less memory
    seq_len: int = ranged(512, least=2)  # tokens per packed row; paper: 4096 (§3.1)
    lr: float = ranged(0, least=0)  # peak of the cosine; 0: by width; paper: 2e-5 (§3.1)
    warmup_steps: int = ranged(10, least=0)  # UNSPECIFIED in L2
    weight_decay: float = ranged(0.1, least=0)  # paper: 0.1 (§3.1)
    clip: float = ranged(1.0, above=0)  # largest gradient norm; UNSPECIFIED in L2 (§2.2: 1.0)
    log_every: int = ranged(10, least=1)  # steps between two lines of the log
    evaluate_every: int = ranged(100, least=1)  # steps between held-out losses
    save_every: int = ranged(100, least=1)  # steps between resume states
    resume: bool = False  # continue from out/sft.state.pt if it is there
    skip_bad_rows: bool = False  # count and skip rows of --data that are wrong
    show_batch: bool = False  # print one batch, loss in green and no loss in grey, and stop
    recompute: bool = False  # recompute activations in the backward pass: less memory
    compile: bool = False  # torch.compile the blocks, for a GPU: 10 s to start, then faster
    tp: int = ranged(1, least=1)  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


# ------------------------------------------------------------------------------------ the idea


def answer_loss(model, tokens, loss_mask, segments):
    """Summed -log p of the tokens where loss_mask is 1: int64 (B, T+1) each -> scalar, nats.

    A sum, not a mean: the caller divides by the answer tokens of the *whole* batch, so that
    pieces, ranks and rows with few answers all weigh each answer token alike.
    """
    # the network without its head, in C where it can run: model.hidden(tokens, segments)
    hidden = kernels.trunk(model, tokens[:, :-1], segments=segments[:, :-1])  # (B, T, D)
    # log_softmax(hidden @ output.weight.T) at the next tokens, where the mask is 1
    logp = kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], loss_mask[:, 1:])
    return -logp.sum()


def default_lr(dim: int) -> float:
    """Inversely to the width: 1e-3 for the tiny model's 128; plan.SETTINGS has the paper's."""
    return 1e-3 * 128 / dim


# ------------------------------------------------------------------------------------ the data


def read_demonstrations(cfg: Config, tokenizer, village: V.Village) -> tuple[list, list]:
    """(training, held-out) dialogues as (tokens, loss_mask); prints what was skipped."""
    if cfg.data:
        dialogs = data.read_dialogs(cfg.data, cfg.skip_bad_rows)
        random.Random(cfg.seed).shuffle(dialogs)
        cut = max(1, len(dialogs) // 20)
        parts = dialogs[cut:], dialogs[:cut]
    else:
        parts = []
        for n, seed in ((cfg.dialogues, cfg.seed), (300, cfg.seed + 1_000_003)):
            parts.append([row["messages"] for row in village.demonstrations(n, seed)])
        print(village.summary())
    encoded = [[data.encode_dialog(tokenizer, d) for d in part] for part in parts]
    fitting = [[e for e in part if len(e[0]) <= cfg.seq_len + 1] for part in encoded]
    dropped = sum(map(len, encoded)) - sum(map(len, fitting))
    if dropped:
        print(f"skipped {dropped} dialogues longer than --seq-len {cfg.seq_len}")
    if not all(fitting):
        raise ValueError(f"{cfg.data or 'village'}: {len(fitting[0])} dialogues to train on and "
                         f"{len(fitting[1])} held out fit --seq-len {cfg.seq_len}; at least one "
                         f"of each is needed: bring more rows or raise --seq-len")
    return tuple(fitting)


def batch_at(step: int, rows, cfg: Config, ranks):
    """This rank's part of the batch of `step`: three int64 (B, seq_len + 1).

    A pure function of the step, so that a resumed run needs no other memory of where it was.
    """
    mine = step * cfg.batch_size + torch.tensor(list(ranks.rows(cfg.batch_size)))
    real = mine < len(rows[0])  # past the end: row 0 without loss, as all ranks must run alike
    tokens, mask, segments = (column[mine.where(real, 0)] for column in rows)
    return tuple(t.to(ranks.device) for t in (tokens, mask * real[:, None], segments))


# ------------------------------------------------------------------------------------ training


def train(model, optimizer, rows, cfg: Config, ranks, first: int = 0):
    """The loop: one optimizer step after another; yields (steps done, metrics) behind each.

    rows: tokens, loss_mask and segments, int64 (N, seq_len + 1) each, as `data.pack` makes them.
    """
    total = math.ceil(len(rows[0]) / cfg.batch_size)
    peak = cfg.lr or default_lr(model.config.dim)
    for step in range(first, total):
        # 1) batch; its answer tokens, counted over all ranks, are what the loss is a mean over
        tokens, mask, segments = batch_at(step, rows, cfg, ranks)
        answer_tokens = ranks.sum(mask[:, 1:].sum().item())
        # 2) forward, loss, backward: piece by piece, the gradients add up
        nats = 0.0
        size = cfg.micro_batch
        for piece in zip(tokens.split(size), mask.split(size), segments.split(size)):
            with M.autocast(ranks.device):
                share = answer_loss(model, *piece)
            # FSDP averages gradients over its ranks; times their number makes that a sum
            (share * (ranks.dp / answer_tokens)).backward()
            nats += share.item()
        loss = ranks.sum(nats) / answer_tokens
        # 3) clip, step
        norm = scale.clip(model, cfg.clip)
        lr = stage.cosine(step, total, peak, cfg.warmup_steps)
        stage.step(optimizer, lr, loss=loss, grad_norm=norm)
        yield step + 1, {"loss": loss, "lr": lr, "grad_norm": norm}


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


# ---------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Fine-tune, evaluate, save; returns the final metrics. ValueError for wrong flags."""
    began = time.time()
    stage.check(cfg)
    out = Path(cfg.out)
    source = cfg.checkpoint or out / "pretrain.pt"
    config = plan.shape_of(source, cfg.model, cfg.dry_run)
    cfg = stage.at_size(cfg, plan.settings(STAGE, config))
    if cfg.seq_len > config.max_seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len}: this model's context is {config.max_seq_len}")
    if cfg.dry_run:
        plan.dry_run(config, cfg.batch_size, cfg.seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     device=cfg.device)
        return {}
    model, info = M.load(source, "cpu")
    tokenizer = data.Tokenizer(info["tokenizer"])
    village = V.Village(info["metrics"].get("village") or 0)
    dialogs, held_out = read_demonstrations(cfg, tokenizer, village)
    # one more than seq_len: all but the last token are read, all but the first asked for
    rows = data.pack_epochs(dialogs, cfg.seq_len + 1, cfg.epochs, cfg.seed)
    val_rows = data.pack(held_out, cfg.seq_len + 1)
    if cfg.show_batch:
        for tokens, mask in zip(rows[0][:4].tolist(), rows[1][:4].tolist()):
            print(data.show_dialog(tokenizer, tokens, mask), end="\n\n")
        return {}
    ranks = scale.setup(cfg.device, cfg.tp)  # this process among others; alone: rank 0 of 1
    print(kernels.choose(cfg.kernels, ranks.device))
    model = scale.wrap(model, ranks, recompute=cfg.recompute, compile=cfg.compile)
    optimizer = stage.adamw(model, 0.0, cfg.weight_decay)  # lr: set at every step, by stage.step
    state = out / f"{STAGE}.state.pt"
    check_same = functools.partial(stage.check_resume, cfg=cfg, tokenizer=tokenizer.model_bytes)
    saved = scale.load_state(state, model, optimizer, ranks, check_same) if cfg.resume else None
    first, total = saved["step"] if saved else 0, math.ceil(len(rows[0]) / cfg.batch_size)
    log = stage.Log(STAGE, out, total, first if saved else None,
                    watch=("loss", "lr", "grad_norm", "val_loss"))
    print(f"{len(dialogs)} dialogues in {len(rows[0]) / cfg.epochs:.0f} rows of {cfg.seq_len} "
          f"tokens ({rows[1].float().mean():.0%} answers), {len(held_out)} held out; {cfg.epochs} "
          f"epochs are {total} steps of {cfg.batch_size} rows")
    if not saved:
        with scale.unsharded(model):
            before = held_out_loss(model, val_rows, cfg, ranks.device)
        print(f"held-out answer loss before: {before:.4f}")

    for done, metrics in train(model, optimizer, rows, cfg, ranks, first):
        # 4) log  5) once in a while: evaluate, save
        evaluates = done % cfg.evaluate_every == 0 or done == total
        if evaluates:
            with scale.unsharded(model):
                metrics["val_loss"] = held_out_loss(model, val_rows, cfg, ranks.device)
        if done % cfg.log_every == 0 or evaluates or done == first + 1:
            log.step(done, **metrics)
        if done % cfg.save_every == 0 and done < total:
            progress = stage.resume_info(done, total, cfg, tokenizer.model_bytes)
            scale.save_state(state, model, optimizer, progress, ranks)

    final = {"val_loss": metrics["val_loss"], **stage.heritage(info),
             "minutes": (time.time() - began) / 60}
    if not cfg.data:
        final["village"] = village.number  # its demonstrations, whatever was read before
    scale.save(out / f"{STAGE}.pt", model, STAGE, tokenizer.model_bytes, final,
               cfg.data or f"village {village.number}")
    print(f"held-out answer loss {final['val_loss']:.4f} nats per token")
    print(stage.wrote(out / f"{STAGE}.pt", out, "reward.py", f"exam.py {STAGE}"))
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    stage.run(main, Config)
