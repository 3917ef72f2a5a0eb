"""Pretraining: a network of random numbers learns to continue text [L2 §2].

The objective is the likelihood of the next token, averaged over a packed stream of documents:

    loss = -1/T sum_t log p(token[t+1] | token[1..t])        nats per token; ln V at the start

Everything the later stages align (facts, grammar, answering a question at all) is learnt here.

in  : nothing (the tiny world of data.py), or your own text with --data
out : out/pretrain.pt, out/pretrain.jsonl, out/figures/pretrain.png (the counterpart of Fig. 5)
run : python pretrain.py                                  about 3 minutes on two AVX2 cores
      python pretrain.py --data book.txt --minutes 3      your own text; prints bits per byte
      torchrun --nproc-per-node 8 pretrain.py --model 7b --data wiki=2,web    token shards

Expect .64 to .69 nats per token, facts known, and nine of ten sampled sentences grammatical.

Keys: [L2] Llama 2, arXiv 2307.09288.

Differs from the paper:
- 2.1 million tokens of a synthetic world instead of two trillion of public text.
- Easy text first (data.PRIMER): so few tokens must not be spent on a plateau.
- Learning rate, warm-up, batch and sequence length are those of a toy; the paper's from 7b on.
"""

from __future__ import annotations

import dataclasses, functools, math, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data, kernels, model as M, plan, scale

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is trained, on what, how long: each field is a flag, its comment the help text."""

    model: str = "tiny"  # preset: tiny 15m 110m 1b 7b 13b 34b 70b
    data: str | None = None  # text, or token shards with weights: wiki=2,web; none: the tiny world
    tokenizer: str | None = None  # a SentencePiece model to use; none: train one on the data
    vocab_size: int = 0  # tokens; 0: the preset's; paper: 32000 (§2.2)
    out: str = "out"  # folder of checkpoints, metrics and figures
    seed: int = 0  # of weights, world and order of the data
    tokens: float = 2.1e6  # tokens to train on; paper: 2e12 (Table 1)
    primer: float = 0.25  # the tiny world's first part, songs and drills; paper: 0, one mixture
    minutes: float = 0  # if > 0: train this long instead, tokenizer and evaluation included
    batch_size: int = 4  # sequences per step, over all ranks; paper: 1024 = 4M tokens (Table 1)
    micro_batch: int = 16  # sequences per rank and forward pass; smaller needs less memory
    seq_len: int = 256  # tokens; paper: 4096 (Table 1)
    lr: float = 0  # peak; 0: the preset's, paper: 3e-4 up to 13b, 1.5e-4 above (Table 1)
    warmup_steps: int = 100  # steps of linear warm-up; paper: 2000 of 500,000 (§2.2)
    weight_decay: float = 0.1  # paper: 0.1 (§2.2)
    clip: float = 1.0  # largest gradient norm; paper: 1.0 (§2.2)
    log_every: int = 40  # steps between two lines on the screen and in out/pretrain.jsonl
    evaluate_every: int = 500  # steps between validation losses and samples
    save_every: int = 200  # steps between resume states
    resume: bool = False  # continue from out/pretrain.state.pt if it is there
    recompute: bool = False  # recompute activations in the backward pass: less memory, 1/3 slower
    compile: bool = False  # torch.compile the blocks, for a GPU: 10 s to start, then faster
    tp: int = 1  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


# Peak learning rate by preset; the paper's from 7b on [L2 Table 1], below it ours.
LEARNING_RATE = {"tiny": 4e-3, "15m": 1e-3, "110m": 6e-4, "1b": 4e-4,
                 "7b": 3e-4, "13b": 3e-4, "34b": 1.5e-4, "70b": 1.5e-4}

# From 7b on these take the place of the defaults above [L2 §2.2, Table 1].
PAPER = {"tokens": 2e12, "batch_size": 1024, "micro_batch": 1, "seq_len": 4096,
         "warmup_steps": 2000}

# ------------------------------------------------------------------------------------ the idea


def next_token_loss(model, tokens):
    """Mean of -log p(token t+1 | tokens 1..t), in nats: tokens int64 (B, T+1) -> scalar."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # the network at t is asked for t + 1
    hidden = kernels.trunk(model, inputs)  # (B, T, D)
    logp = kernels.token_logprobs(hidden, model.output.weight, targets, torch.ones_like(targets))
    return -logp.mean()


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine down to a tenth of it at `total` [L2 §2.2].

    UNSPECIFIED in L2: the shape of the warm-up. Steps count from 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


# ------------------------------------------------------------------------------------ the data


@dataclass
class Corpus:
    """A tokenizer and two streams of ids; `val_bytes` is the text behind `val`, in UTF-8 bytes."""

    tokenizer: data.Tokenizer
    train: np.ndarray | scale.TokenStream
    val: np.ndarray
    val_bytes: int
    name: str
    world: data.World | None = None


def prepare(cfg: Config, tokenizer: data.Tokenizer | None, vocab_size: int) -> Corpus:
    """Read or generate the text, train the tokenizer if there is none, encode everything."""
    if cfg.data and scale.are_shards(cfg.data):
        return open_shards(cfg)
    if cfg.data:
        train, val = split_at_byte(list(data.read_texts(cfg.data)), 0.9)
        tokenizer = tokenizer or data.Tokenizer(data.train_tokenizer(train, vocab_size))
        encoded = data.encode_texts(tokenizer, train), data.encode_texts(tokenizer, val)
        if len(encoded[0]) <= cfg.seq_len or not val:
            raise ValueError(f"{cfg.data}: {len(encoded[0])} tokens to train on (a tenth of the "
                             f"text is held out) do not fill one sequence of --seq-len "
                             f"{cfg.seq_len}: bring more text or shorten it")
        return Corpus(tokenizer, *encoded, sum(len(t.encode()) for t in val), str(cfg.data))
    world = data.World()
    if tokenizer is None:
        sample = list(world.documents(6000, seed=cfg.seed))
        tokenizer = data.Tokenizer(data.train_tokenizer(sample, vocab_size))
    val = list(world.documents(400, seed=cfg.seed + 1_000_003))  # other documents, same world
    train, primer = [], 0 if cfg.minutes else cfg.primer  # of minutes nobody knows the tokens yet
    for part, shares in ((primer, data.PRIMER), (1 - primer, data.DOCUMENTS)):
        few = data.encode_texts(tokenizer, world.documents(400, cfg.seed, shares))
        n = part * cfg.tokens / (len(few) / 400)  # documents, by their mean length
        texts = world.documents(int(1.02 * n) + 10, cfg.seed, shares)
        train.append(data.encode_texts(tokenizer, texts))
    return Corpus(tokenizer, np.concatenate(train), data.encode_texts(tokenizer, val),
                  sum(len(t.encode()) for t in val), "the tiny world", world)


def open_shards(cfg: Config) -> Corpus:
    """A mixture of token shards, mapped from disk; the tokenizer is the one they were made with."""
    if cfg.tokenizer or cfg.vocab_size:
        raise ValueError("token shards bring their tokenizer: leave --tokenizer and --vocab-size "
                         "away")
    train, val, model = scale.read_shards(cfg.data)
    tokenizer, val = data.Tokenizer(model), val[:]
    if len(train) <= cfg.seq_len or len(val) < 2:
        raise ValueError(f"{cfg.data}: {len(train)} tokens to train on and {len(val)} held out; "
                         f"more than one --seq-len of {cfg.seq_len} is needed")
    documents = np.split(val, np.flatnonzero(val == tokenizer.eos_id))
    val_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
    return Corpus(tokenizer, train, val, val_bytes, cfg.data)


def split_at_byte(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    """The first `share` of all bytes, and the rest; one text may be cut in two, at a character."""
    left = int(share * sum(len(t.encode()) for t in texts))
    for i, text in enumerate(texts):
        raw = text.encode()
        if len(raw) > left:
            head = raw[:left].decode(errors="ignore")  # a cut character goes to the second part
            return texts[:i] + [head], [text[len(head):]] + texts[i + 1:]
        left -= len(raw)
    return texts, []


def batch_at(step: int, stream, cfg: Config, ranks) -> torch.Tensor:
    """This rank's rows of the global batch of `step`: int64 (B, seq_len + 1).

    A pure function of (seed, step): nothing to save for a resume, and the global batch is the same
    on any number of ranks. An epoch visits every sequence once, in an order of its own; the tiny
    world's first epoch in the order of the stream, which is random but for its primer.
    """
    T, count = cfg.seq_len, (len(stream) - 1) // cfg.seq_len  # sequences in an epoch
    rows = []
    for i in ranks.rows(cfg.batch_size):
        epoch, place = divmod(step * cfg.batch_size + i, count)
        if cfg.data or epoch:
            place = int(scale.permuted(np.array([place]), count, cfg.seed, epoch)[0])
        start = T * place
        rows.append(stream[start:start + T + 1])  # neighbours share one token: input, then target
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# ---------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def validate(model, corpus: Corpus, cfg: Config, device) -> tuple[float, float]:
    """(nats per token, bits per byte) on held-out text, every token counted once.

    Bits per byte = total nats / ln 2 / bytes of the text: comparable between tokenizers, which
    nats per token are not. Each sequence starts without context, so this is an upper bound.
    Ranks share the work.
    """
    T, total, ranks = cfg.seq_len, 0.0, scale.ranks_of(model)
    padded = np.concatenate([corpus.val, np.zeros(-(len(corpus.val) - 1) % T, corpus.val.dtype)])
    inputs = torch.from_numpy(padded[:-1].astype(np.int64)).view(-1, T)
    targets = torch.from_numpy(padded[1:].astype(np.int64)).view(-1, T)
    real = (torch.arange(targets.numel()) < len(corpus.val) - 1).view(-1, T)  # not the padding
    for i in range(ranks.dp_rank * cfg.micro_batch, len(inputs), ranks.dp * cfg.micro_batch):
        x, y, mask = (t[i:i + cfg.micro_batch].to(device) for t in (inputs, targets, real))
        with M.autocast(device):
            logp = kernels.token_logprobs(kernels.trunk(model, x), model.output.weight, y, mask)
        total -= logp.double().sum().item()
    total = ranks.sum(total)
    return total / (len(corpus.val) - 1), total / math.log(2) / corpus.val_bytes


def complete(model, tokenizer, prefixes: list[str], max_new_tokens: int, temperature=0.0, seed=0):
    """Continue each text: list of str; greedy by default; a document's end (EOS) stops it."""
    prompts = [tokenizer.encode(p, bos=True) for p in prefixes]
    tokens, _ = scale.rollout(model, prompts, max_new_tokens, temperature=temperature, top_p=1.0,
                                seed=seed, stop=tokenizer.eos_id)
    return [tokenizer.decode(t) for t in tokens]


def facts_known(model, corpus: Corpus, asked: bool) -> tuple[float, int]:
    """Share of the world's facts completed greedily word for word, and how many were tried.

    asked=False: pairs of villager and attribute that no question of the training text contains;
    they stand in biographies only, so answering them is generalisation, not recall of an answer.
    """
    probes = corpus.world.probes(asked)
    answers = complete(model, corpus.tokenizer, [prefix for prefix, _ in probes], 24)
    right = [a.strip().startswith(answer) for a, (_, answer) in zip(answers, probes)]
    return sum(right) / len(right), len(right)


def report_world(model, corpus: Corpus) -> dict[str, float]:
    """What the model knows of the tiny world: facts asked, facts never asked, grammar at T=1."""
    asked, n_asked = facts_known(model, corpus, asked=True)
    unasked, n_unasked = facts_known(model, corpus, asked=False)
    texts = complete(model, corpus.tokenizer, [""] * 100, 80, temperature=1.0, seed=1)
    grammar = sum(corpus.world.grammar_rate(t) for t in texts) / len(texts)
    print(f"facts asked in training: {asked:.1%} of {n_asked};  never asked: {unasked:.1%} of "
          f"{n_unasked};  grammatical sentences at T=1: {grammar:.1%} in {len(texts)} documents")
    return {"facts_asked": asked, "facts_never_asked": unasked, "grammar": grammar}


def matmul_rate(device) -> float:
    """FLOP per second of this machine's own matrix product, in its faster type, measured."""
    n, best = 8192 if device.type == "cuda" else 768, math.inf
    for kind in (torch.bfloat16,) if device.type == "cuda" else (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=device).to(kind)
        for run in range(8):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # .item() waits for the device
            spent = time.perf_counter() - start
            best = min(best, spent)
            if run and spent > 4 * best:
                break  # no instruction for it here; the first run sets things up
    return 2 * n**3 / best


# ---------------------------------------------------------------------------------------- main


def train_step(model, optimizer, rows, lr: float, cfg: Config, ranks) -> tuple[float, float]:
    """One optimizer step on this rank's rows int64 (B, T+1): (loss in nats, gradient norm).

    The batch goes through in pieces of `micro_batch` rows whose gradients add up to that of the
    mean over all rows and ranks: the pieces change the memory needed, not the result.
    """
    loss = 0.0
    for piece in rows.split(cfg.micro_batch):
        with M.autocast(ranks.device):
            share = next_token_loss(model, piece) * (len(piece) / len(rows))
        share.backward()
        loss += share.item()
    loss = ranks.mean(loss)
    norm = scale.clip(model, cfg.clip)
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: training diverged; a smaller "
                                 f"--lr (now {lr:.2g}) or more --warmup-steps helps")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def count_steps(cfg: Config, model, stream, ranks, began: float) -> int:
    """Optimizer steps of the whole run: from --tokens, or from --minutes and a timed step.

    Of the minutes, what is already spent and a tenth for evaluation and writing are taken off. The
    optimizer is given a tenth of a step.
    """
    if cfg.minutes <= 0:
        return max(1, round(cfg.tokens / (cfg.batch_size * cfg.seq_len)))
    rows, seconds = batch_at(0, stream, cfg, ranks).to(ranks.device), []
    for _ in range(9):  # forward and backward only: nothing is learnt yet; the first warms up
        start = time.perf_counter()
        for piece in rows.split(cfg.micro_batch):
            next_token_loss(model, piece).backward()
        seconds.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    left = cfg.minutes * 60 * 0.9 - (time.time() - began)
    return max(1, int(ranks.mean(left / (1.1 * data.mean(seconds[1:])))))


LEAST = {"tokens": 1, "batch_size": 1, "micro_batch": 1, "log_every": 1, "evaluate_every": 1,
         "save_every": 1, "tp": 1, "vocab_size": 0, "seed": 0, "minutes": 0, "lr": 0,
         "warmup_steps": 0, "weight_decay": 0, "clip": 1e-6}  # the smallest that makes sense


def check(cfg: Config, shape: M.ModelConfig) -> None:
    """ValueError for flags that cannot work, before anything is read or allocated."""
    if not 1 < cfg.seq_len <= shape.max_seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len}: the context of {cfg.model} is "
                         f"{shape.max_seq_len} tokens; give 2 to {shape.max_seq_len}")
    for flag, least in LEAST.items():
        value = getattr(cfg, flag)
        if not least <= value < math.inf:  # so written, it catches nan too
            raise ValueError(f"--{flag.replace('_', '-')} {value:g}: give {least:g} or more")
    if cfg.tokens > 1e9 and not (cfg.data or cfg.dry_run):
        raise ValueError(f"--tokens {cfg.tokens:.3g} are too many for the tiny world: give --data")
    if not 0 <= cfg.primer <= 1:
        raise ValueError(f"--primer {cfg.primer:g}: a share of the tokens; give 0 to 1")
    if cfg.tokenizer and cfg.vocab_size:
        raise ValueError("--vocab-size is for training a tokenizer: leave it away with --tokenizer")


def introduce(cfg: Config, config: M.ModelConfig, corpus: Corpus, total: int, first: int) -> None:
    """The first lines a reader sees: what is trained, on what, for how long, and what to expect."""
    per_step = cfg.batch_size * cfg.seq_len
    share = total * per_step / max(len(corpus.train), 1)  # epochs
    print(f"model {cfg.model}: {M.count_parameters(config):,} parameters, dim {config.dim}, "
          f"{config.n_layers} layers, {config.n_heads} heads on {config.n_kv_heads} kv heads")
    print(f"data {corpus.name}: {len(corpus.train):,} tokens to train on, {len(corpus.val):,} held "
          f"out, vocabulary {corpus.tokenizer.vocab_size}")
    print(f"{total} steps of {per_step:,} tokens ({cfg.batch_size} rows x {cfg.seq_len}): "
          f"{total * per_step:,} tokens, {share:.2f} epochs")
    print(f"resuming at step {first}" if first else
          f"untrained, the loss is ln {config.vocab_size} = {math.log(config.vocab_size):.2f}")


def evaluate(model, corpus: Corpus, cfg: Config, device) -> dict[str, float]:
    """Validation loss and bits per byte, and one greedy and one sampled text to read."""
    nats, bits = validate(model, corpus, cfg, device)
    head = corpus.tokenizer.decode(corpus.val[1:9]) if len(corpus.val) > 8 else ""
    greedy = complete(model, corpus.tokenizer, [head], 40)[0]
    drawn = complete(model, corpus.tokenizer, [""], 40, temperature=0.8)[0]
    print(f"  greedy  | {head}[...]{greedy}".replace("\n", "\\n"))
    print(f"  T = 0.8 | {drawn}".replace("\n", "\\n"))
    return {"val_loss": nats, "val_bits_per_byte": bits}


def write(model, corpus: Corpus, cfg: Config, final: dict, began: float, ranks) -> None:
    """The last lines, out/pretrain.pt, its figure and summary; `final` gets what the world says."""
    out = Path(cfg.out)
    if corpus.world:
        with scale.unsharded(model):
            final |= report_world(model, corpus)
    final["minutes"] = (time.time() - began) / 60
    weights = scale.full_weights(model)
    if ranks.is_main:
        M.save(out / "pretrain.pt", model, "pretrain", corpus.tokenizer.model_bytes, final,
               corpus.name, weights=weights)
        figure = M.plot_log("pretrain", out, {"loss": "training", "val_loss": "validation"},
                            "tokens seen (millions)", "loss (nats per token)",
                            "Pretraining loss (counterpart of Llama 2, Fig. 5)",
                            cfg.batch_size * cfg.seq_len / 1e6)
        M.summarize("pretrain", out, final)
        print(f"validation loss {final['val_loss']:.4f} nats per token, "
              f"{final['val_bits_per_byte']:.4f} bits per byte, after "
              f"{M.clock(time.time() - began)}")
        print(f"wrote {out}/pretrain.pt and {figure}; next: python sft.py")


def main(cfg: Config) -> dict:
    """Train, evaluate, save; returns the final metrics. ValueError for flags that do not fit."""
    began, out, shape = time.time(), Path(cfg.out), M.preset(cfg.model)
    cfg = M.at_size(cfg, PAPER, shape.dim)
    check(cfg, shape)
    if cfg.dry_run:
        plan.dry_run(shape, cfg.batch_size, cfg.seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     cfg.tokens, cfg.device)
        return {}
    ranks = scale.setup(cfg.device, cfg.tp)
    rate = matmul_rate(ranks.device)  # before C takes PyTorch's threads
    print(kernels.choose(cfg.kernels, ranks.device))
    given = data.Tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    corpus = prepare(cfg, given, cfg.vocab_size or shape.vocab_size)
    config = dataclasses.replace(shape, vocab_size=corpus.tokenizer.vocab_size)
    with torch.device("meta"):  # no memory until `wrap` has decided which part is this rank's
        model = M.Llama(config)
    model = scale.wrap(model, ranks, seed=cfg.seed, recompute=cfg.recompute,
                       compile=cfg.compile)
    optimizer = M.adamw(model, 0.0, cfg.weight_decay)
    state = out / "pretrain.state.pt"
    check_same = functools.partial(M.check_resume, cfg=cfg, tokenizer=corpus.tokenizer.model_bytes)
    saved = scale.load_state(state, model, optimizer, ranks, check_same) if cfg.resume else None
    first = saved["step"] if saved else 0
    total = saved["total"] if saved else count_steps(cfg, model, corpus.train, ranks, began)
    peak = cfg.lr or LEARNING_RATE[cfg.model]
    log = M.Log("pretrain", out, total, first if saved else None)
    introduce(cfg, config, corpus, total, first)
    flops = plan.flops_per_token(config, cfg.seq_len)
    tick, counted = time.time(), 0  # for tokens/s between two log lines, evaluation left out

    for step in range(first, total):
        # 1) batch
        rows = batch_at(step, corpus.train, cfg, ranks).to(ranks.device)  # (B, T+1)
        # 2) forward and loss  3) backward, clip, step
        lr = learning_rate(step, total, peak, cfg.warmup_steps)
        loss, norm = train_step(model, optimizer, rows, lr, cfg, ranks)
        counted += cfg.batch_size * cfg.seq_len
        # 4) log
        done, metrics = step + 1, {"loss": loss, "lr": lr, "grad_norm": norm}
        evaluates = done % cfg.evaluate_every == 0 or done == total
        if done % cfg.log_every == 0 or evaluates or step == first:
            speed = counted / (time.time() - tick)
            metrics |= {"tokens_per_s": round(speed), "of_peak": speed * flops / rate / ranks.size}
            # 5) once in a while: evaluate, sample, save
            if evaluates:
                with scale.unsharded(model):
                    metrics |= evaluate(model, corpus, cfg, ranks.device)
            log.step(done, **metrics)
            tick, counted = time.time(), 0
        if done % cfg.save_every == 0 and done < total:
            info = M.resume_info(done, total, cfg, corpus.tokenizer.model_bytes)
            scale.save_state(state, model, optimizer, info, ranks)

    final = {k: v for k, v in metrics.items() if k.startswith("val_")}
    write(model, corpus, cfg, final, began, ranks)
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    M.run(main, Config)
