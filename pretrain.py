"""Pretraining: a network of random numbers learns to continue text [L2 §2].

The objective is the likelihood of the next token, averaged over a packed stream of documents:

    loss = -1/T sum_t log p(token[t+1] | token[1..t])   nats per token; about ln V at the start,
                                                        as small random weights favour no token

Everything the later stages align (facts, grammar, answering a question at all) is learnt here.

in  : nothing (documents of village.py), or your own text with --data
out : out/pretrain.pt, out/pretrain.jsonl
run : python pretrain.py                                  about 3 minutes on two AVX2 cores
      python pretrain.py --data book.txt --minutes 3      your own text; prints bits per byte
      torchrun --nproc-per-node 8 pretrain.py --model 7b --data wiki=2,web    token shards

Expect .64 to .69 nats per token; `python exam.py pretrain` asks for facts and grammar.

Keys: [L2] Llama 2, arXiv 2307.09288.

Differs from the paper:
- 2.1 million tokens of a synthetic world instead of two trillion of public text.
- The text has the chat format, instructions and harmful requests in it; vocabulary 1536, no 32,000.
- Easy text first (village.PRIMER): so few tokens must not be spent on a plateau.
- Learning rate, warm-up, batch and sequence length are those of a toy; the paper's from 7b on.
"""

from __future__ import annotations

import dataclasses, functools, math, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import data, kernels, model as M, plan, scale, stage, village as V
from stage import ranged

STAGE = "pretrain"  # OUT/pretrain.pt

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is trained, on what, how long: each field is a flag, its comment the help text."""

    model: str = "tiny"  # preset: tiny 15m 110m 1b 7b 13b 34b 70b
    data: str | None = None  # text, or token shards with weights: wiki=2,web; none: the village
    village: int = ranged(0, least=0)  # which village to read of, without --data
    tokenizer: str | None = None  # a SentencePiece model to use; none: train one on the data
    vocab_size: int = ranged(0, least=0)  # tokens; 0: the preset's; paper: 32000 (§2.2)
    out: str = "out"  # folder of checkpoints and metrics
    seed: int = ranged(0, least=0)  # of weights, documents and their order
    tokens: float = ranged(2.1e6, least=1)  # tokens to train on; paper: 2e12 (Table 1)
    primer: float = ranged(0.25, least=0, most=1)  # the village's first part, songs and drills
    minutes: float = ranged(0, least=0)  # if > 0: train this long instead, evaluation included
    batch_size: int = ranged(4, least=1)  # sequences per step; paper: 1024 = 4M tokens (Table 1)
    micro_batch: int = ranged(16, least=1)  # sequences per rank and forward pass: less memory
    seq_len: int = ranged(256, least=2)  # tokens; paper: 4096 (Table 1)
    lr: float = ranged(0, least=0)  # peak; 0: by preset; paper: 3e-4, from 34b 1.5e-4 (Table 1)
    warmup_steps: int = ranged(100, least=0)  # of linear warm-up; paper: 2000 (§2.2)
    weight_decay: float = ranged(0.1, least=0)  # paper: 0.1 (§2.2)
    clip: float = ranged(1.0, above=0)  # largest gradient norm; paper: 1.0 (§2.2)
    log_every: int = ranged(40, least=1)  # steps between two lines of the log
    evaluate_every: int = ranged(500, least=1)  # steps between validation losses and samples
    save_every: int = ranged(200, least=1)  # steps between resume states; a kill loses what follows
    resume: bool = False  # continue from out/pretrain.state.pt if it is there
    recompute: bool = False  # recompute activations in the backward pass: less memory, 1/3 slower
    compile: bool = False  # torch.compile the blocks, for a GPU: 10 s to start, then faster
    tp: int = ranged(1, least=1)  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


# Peak learning rate of the sizes that the paper does not have; its own are in plan.SETTINGS.
LEARNING_RATE = {"tiny": 4e-3, "15m": 1e-3, "110m": 6e-4, "1b": 4e-4}

# ------------------------------------------------------------------------------------ the idea


def next_token_loss(model, tokens):
    """Mean of -log p(token t+1 | tokens 1..t), in nats: tokens int64 (B, T+1) -> scalar."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]  # the network at t is asked for t + 1
    hidden = kernels.trunk(model, inputs)  # (B, T, D): model.hidden(inputs), in C where it can run
    # log_softmax(hidden @ output.weight.T) at the targets, without keeping (B, T, V) logits
    logp = kernels.token_logprobs(hidden, model.output.weight, targets, torch.ones_like(targets))
    return -logp.mean()


# ------------------------------------------------------------------------------------ the data


@dataclass
class Corpus:
    """A tokenizer and two streams of ids; `val_bytes` is the text behind `val`, in UTF-8 bytes."""

    tokenizer: data.Tokenizer
    train: np.ndarray | scale.TokenStream
    val: np.ndarray
    val_bytes: int
    name: str
    village: int | None = None  # its number; None: other text


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
    village = V.Village(cfg.village)
    if tokenizer is None:
        sample = list(village.documents(6000, seed=cfg.seed))
        tokenizer = data.Tokenizer(data.train_tokenizer(sample, vocab_size))
    val = list(village.documents(400, seed=cfg.seed + 1_000_003))  # other documents, same village
    train = []
    primer = 0 if cfg.minutes else cfg.primer  # of minutes nobody knows the tokens yet
    for part, shares in ((primer, V.PRIMER), (1 - primer, V.DOCUMENTS)):
        few = data.encode_texts(tokenizer, village.documents(400, cfg.seed, shares))
        n = part * cfg.tokens / (len(few) / 400)  # documents, by their mean length
        enough = int(1.02 * n) + 10  # the mean of 400 may be 2% off: rather a few too many
        texts = village.documents(enough, cfg.seed, shares)
        train.append(data.encode_texts(tokenizer, texts))
    return Corpus(tokenizer, np.concatenate(train), data.encode_texts(tokenizer, val),
                  sum(len(t.encode()) for t in val), f"village {cfg.village}", cfg.village)


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

    One more than seq_len: the network reads all but the last token and is asked for all but the
    first. Documents that share a row see each other here (in SFT dialogues do not): Llama's own
    packing is UNSPECIFIED in L2.

    A pure function of (seed, step): nothing to save for a resume, and the global batch is the same
    on any number of ranks. An epoch visits every sequence once, in an order of its own; the
    village's first epoch in the order of the stream, which is random but for its primer.
    """
    T = cfg.seq_len
    count = (len(stream) - 1) // T  # sequences in an epoch
    numbers = step * cfg.batch_size + np.array(ranks.rows(cfg.batch_size))  # since the first step
    epochs, places = numbers // count, numbers % count
    for epoch in np.unique(epochs):
        if cfg.data or epoch:
            mine = epochs == epoch
            places[mine] = scale.permuted(places[mine], count, cfg.seed, int(epoch))
    starts = T * places  # neighbours share one token: input, then target
    rows = [stream[start:start + T + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# ------------------------------------------------------------------------------------ training


def train(model, optimizer, stream, cfg: Config, ranks, total: int, first: int = 0):
    """The loop: one optimizer step after another; yields (steps done, metrics) behind each.

    stream: token ids (N,). A batch goes through in pieces of `micro_batch` rows whose gradients add
    up to that of the mean over all rows and ranks: the pieces change the memory, not the result.
    """
    peak = cfg.lr or LEARNING_RATE[cfg.model]
    for step in range(first, total):
        # 1) batch
        rows = batch_at(step, stream, cfg, ranks).to(ranks.device)  # (B, T+1)
        # 2) forward, loss, backward: piece by piece, the gradients add up
        loss = 0.0
        for piece in rows.split(cfg.micro_batch):
            with M.autocast(ranks.device):
                share = next_token_loss(model, piece) * (len(piece) / len(rows))
            share.backward()
            loss += share.item()
        loss = ranks.mean(loss)
        # 3) clip, step
        norm = scale.clip(model, cfg.clip)
        lr = stage.cosine(step, total, peak, cfg.warmup_steps)
        stage.step(optimizer, lr, loss=loss, grad_norm=norm)
        yield step + 1, {"loss": loss, "lr": lr, "grad_norm": norm}


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


def count_steps(cfg: Config, model, stream, ranks, began: float) -> int:
    """Optimizer steps of the whole run: from --tokens, or from --minutes and a timed step.

    Of the minutes, what is already spent and a tenth for evaluation and writing are taken off. The
    optimizer is given a tenth of a step.
    """
    if cfg.minutes <= 0:
        return max(1, round(cfg.tokens / (cfg.batch_size * cfg.seq_len)))
    rows = batch_at(0, stream, cfg, ranks).to(ranks.device)
    seconds = []
    for _ in range(9):  # forward and backward only: nothing is learnt yet; the first warms up
        start = time.perf_counter()
        for piece in rows.split(cfg.micro_batch):
            next_token_loss(model, piece).backward()
        seconds.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    left = cfg.minutes * 60 * 0.9 - (time.time() - began)
    mean = sum(seconds[1:]) / len(seconds[1:])
    return max(1, int(ranks.mean(left / (1.1 * mean))))


def check(cfg: Config, shape: M.ModelConfig) -> None:
    """ValueError for flags that cannot work, before anything is read or allocated."""
    if not 1 < cfg.seq_len <= shape.max_seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len}: the context of {cfg.model} is "
                         f"{shape.max_seq_len} tokens; give 2 to {shape.max_seq_len}")
    if cfg.tokens > 1e9 and not (cfg.data or cfg.dry_run):
        raise ValueError(f"--tokens {cfg.tokens:.3g} are too many for a village: give --data")
    if cfg.data and cfg.village:
        raise ValueError(f"--village {cfg.village} and --data are two texts to read: give one")
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
          f"untrained, all {config.vocab_size} tokens are about equally likely: the loss is about "
          f"ln {config.vocab_size} = {math.log(config.vocab_size):.2f}")


def evaluate(model, corpus: Corpus, cfg: Config, device) -> dict[str, float]:
    """Validation loss and bits per byte, and one greedy and one sampled text to read."""
    nats, bits = validate(model, corpus, cfg, device)
    head = corpus.tokenizer.decode(corpus.val[1:9]) if len(corpus.val) > 8 else ""
    greedy = complete(model, corpus.tokenizer, [head], 40)[0]
    drawn = complete(model, corpus.tokenizer, [""], 40, temperature=0.8)[0]
    print(f"  greedy  | {head}[...]{greedy}".replace("\n", "\\n"))
    print(f"  T = 0.8 | {drawn}".replace("\n", "\\n"))
    return {"val_loss": nats, "val_bits_per_byte": bits}


def main(cfg: Config) -> dict:
    """Train, evaluate, save; returns the final metrics. ValueError for flags that do not fit."""
    began = time.time()
    stage.check(cfg)
    out, shape = Path(cfg.out), M.preset(cfg.model)
    cfg = stage.at_size(cfg, plan.settings(STAGE, shape))
    check(cfg, shape)
    if cfg.dry_run:
        plan.dry_run(shape, cfg.batch_size, cfg.seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     cfg.tokens, cfg.device)
        return {}
    ranks = scale.setup(cfg.device, cfg.tp)  # this process among others; alone: rank 0 of 1
    rate = matmul_rate(ranks.device)  # before C takes PyTorch's threads
    print(kernels.choose(cfg.kernels, ranks.device))
    given = data.Tokenizer(cfg.tokenizer) if cfg.tokenizer else None
    corpus = prepare(cfg, given, cfg.vocab_size or shape.vocab_size)
    tokenizer = corpus.tokenizer
    config = dataclasses.replace(shape, vocab_size=tokenizer.vocab_size)
    with torch.device("meta"):  # no memory until `wrap` has decided which part is this rank's
        model = M.Llama(config)
    model = scale.wrap(model, ranks, seed=cfg.seed, recompute=cfg.recompute,
                       compile=cfg.compile)
    optimizer = stage.adamw(model, 0.0, cfg.weight_decay)  # lr: set at every step, by stage.step
    state = out / f"{STAGE}.state.pt"
    check_same = functools.partial(stage.check_resume, cfg=cfg, tokenizer=tokenizer.model_bytes)
    saved = scale.load_state(state, model, optimizer, ranks, check_same) if cfg.resume else None
    first = saved["step"] if saved else 0
    total = saved["total"] if saved else count_steps(cfg, model, corpus.train, ranks, began)
    log = stage.Log(STAGE, out, total, first if saved else None,
                    watch=("loss", "lr", "tokens_per_s", "val_loss"))
    introduce(cfg, config, corpus, total, first)
    flops = plan.flops_per_token(config, cfg.seq_len)
    tick, counted = time.time(), 0  # for tokens/s between two log lines, evaluation left out

    for done, metrics in train(model, optimizer, corpus.train, cfg, ranks, total, first):
        # 4) log
        counted += cfg.batch_size * cfg.seq_len
        evaluates = done % cfg.evaluate_every == 0 or done == total
        if done % cfg.log_every == 0 or evaluates or done == first + 1:
            speed = counted / (time.time() - tick)
            metrics |= {"tokens_per_s": round(speed), "of_peak": speed * flops / rate / ranks.size}
            # 5) once in a while: evaluate, sample, save
            if evaluates:
                with scale.unsharded(model):
                    metrics |= evaluate(model, corpus, cfg, ranks.device)
            log.step(done, **metrics)
            tick, counted = time.time(), 0
        if done % cfg.save_every == 0 and done < total:
            progress = stage.resume_info(done, total, cfg, tokenizer.model_bytes)
            scale.save_state(state, model, optimizer, progress, ranks)

    final = {k: v for k, v in metrics.items() if k.startswith("val_")}
    final |= {"village": corpus.village, "lineage": [], "tokens_per_step":
              cfg.batch_size * cfg.seq_len, "minutes": (time.time() - began) / 60}
    scale.save(out / f"{STAGE}.pt", model, STAGE, tokenizer.model_bytes, final, corpus.name)
    spent = stage.clock(time.time() - began)
    print(f"validation loss {final['val_loss']:.4f} nats per token, "
          f"{final['val_bits_per_byte']:.4f} bits per byte, after {spent}")
    print(stage.wrote(out / f"{STAGE}.pt", out, "sft.py", f"exam.py {STAGE}"))
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    stage.run(main, Config)
