"""The contestants: ours in C, ours in plain PyTorch, and the libraries that people use instead.

Each is a function(tick, job) that works for ever (referee.py). Peers are imported in their own
processes only. Fairness: the same shapes, batches and optimizer (fused AdamW, gradient clipping),
random tokens, no padding, all cores for everyone; set-up, compilation and a first round are not
counted. This file drives the stages as a user would, so like a test it stands above them.
"""

from __future__ import annotations

import contextlib, functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels, model as M
from bench import ops
from bench.referee import Job

# ------------------------------------------------------------------------------------ our stages


def random_tokens(job: Job, *shape: int) -> torch.Tensor:
    """int64 tokens >= 2: 0 and 1 are the peers' padding and end."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(2, job.config.vocab_size, shape, generator=rng)


def our_model(job: Job, scalar_head: bool = False) -> M.Llama:
    kernels.choose(job.path, products=job.products)
    return M.Llama(replace(job.config, scalar_head=scalar_head)).init_weights(0)


FOREVER = 10**9  # steps, iterations: the referee stops a contestant


def train_ours(tick, job: Job) -> None:
    """Steps of pretrain.py."""
    import pretrain, scale, stage

    model, T = our_model(job), job.config.max_seq_len
    optimizer = stage.adamw(model, 1e-4, 0.1)
    pieces = 4 if job.mode == "quarters" else 1  # whose gradients add up: less memory, same step
    cfg = pretrain.Config(batch_size=job.rows, micro_batch=max(job.rows // pieces, 1), seq_len=T,
                          lr=1e-4)
    stream = random_tokens(job, job.rows * T + 1).numpy()
    for _ in pretrain.train(model, optimizer, stream, cfg, scale.ranks_of(model), FOREVER):
        tick(job.rows * T)


def sft_ours(tick, job: Job) -> None:
    """Steps of sft.py: half of each row carries loss."""
    import scale, sft, stage

    model, T = our_model(job), job.config.max_seq_len
    optimizer = stage.adamw(model, 1e-4, 0.1)
    cfg = sft.Config(batch_size=job.rows, micro_batch=job.rows, lr=1e-4)
    tokens = random_tokens(job, job.rows, T + 1)
    mask = (torch.arange(T + 1) > T // 2).long().expand(job.rows, T + 1)
    rows = (tokens, mask, torch.zeros_like(tokens))  # one step's
    while True:
        for _ in sft.train(model, optimizer, rows, cfg, scale.ranks_of(model)):
            tick(job.rows * T)


def reward_ours(tick, job: Job) -> None:
    """Steps of reward.py: pairs of two dialogues of half the context."""
    import reward, scale, stage

    model, count = our_model(job, scalar_head=True), job.rows // 2
    optimizer = stage.adamw(model, 1e-4, 0.1)
    cfg = reward.Config(batch_size=count, micro_batch=count, lr=1e-4)
    rows = random_tokens(job, 2 * count, job.config.max_seq_len // 2).tolist()
    pairs = [reward.Pair(a, b, 1, 0.0, (-1, -1), None, {}) for a, b in zip(rows[::2], rows[1::2])]
    while True:
        for _ in reward.train(model, optimizer, pairs, 0.0, cfg, scale.ranks_of(model)):
            tick(count)


def ppo_ours(tick, job: Job) -> None:
    """Iterations of ppo.py: policy, reference, critic and one reward model, one epoch."""
    import ppo, rollouts, stage

    cfg = ppo.Config(batch_size=job.rows, minibatch=max(job.rows // 4, 1), lr=1e-6, beta=0.05,
                     max_new_tokens=job.new, iterations=FOREVER)
    policy, ref = our_model(job), our_model(job)
    critic, reward_model = our_model(job, scalar_head=True), our_model(job, scalar_head=True)
    optimizers = [stage.adamw(model, cfg.lr, 0.1) for model in (policy, critic)]
    question = {"messages": [{"role": "user", "content": "?"}], "is_safety": False}

    def score(rows, answers) -> rollouts.Scores:
        whole = [p + r for p, r in zip(answers.prompts, answers.responses)]
        one = rollouts.scores(reward_model, whole)
        return rollouts.Scores(one, one, one, torch.zeros(len(one)).bool())

    for _ in ppo.train(policy, ref, critic, optimizers, lambda iteration: [question] * job.rows,
                       score, Numbers(job), cfg):
        tick(1)


class Numbers:
    """A tokenizer whose every prompt is as long as the job says; no answer ends by itself."""

    eos_id = -1

    def __init__(self, job: Job):
        self.tokens = random_tokens(job, job.prompt).tolist()

    def encode(self, text, bos=False) -> list[int]:
        return self.tokens

    def decode(self, tokens) -> str:
        return ""


def rollout_ours(tick, job: Job) -> None:
    """Answers to a batch of prompts, with their log-probabilities."""
    model, prompts = our_model(job), random_tokens(job, job.rows, job.prompt).tolist()
    while True:
        kernels.rollout(model, prompts, job.new)
        tick(job.rows * job.new)


def decode_ours(tick, job: Job) -> None:
    """One greedy answer after another, by what chat.py speaks with; every prompt is a new one."""
    from kernels.decode import Decoder

    source = model_source(job)
    decoder = Decoder(source.config, {n: w.read for n, w in source.weights.items()}, job.dtype)
    prompt, answers = random_tokens(job, job.prompt).tolist(), 0
    while True:
        prompt[0] = 2 + answers % (job.config.vocab_size - 2)  # nothing of it is in the cache
        for _ in decoder.stream(prompt, job.new, temperature=0.0):
            pass
        answers += 1
        tick(job.new)


def decode_plain(tick, job: Job) -> None:
    """The same by model.stream."""
    model, prompt = our_model(job), random_tokens(job, job.prompt).tolist()
    while True:
        for _ in M.stream(model, prompt, job.new, temperature=0.0):
            pass
        tick(job.new)


# ------------------------------------------------------------------------------------ the limits


def flops_per_token(c: M.ModelConfig) -> int:
    """Of a training step: 6 per weight that multiplies, and attention's causal half."""
    multiplying = M.count_parameters(c) - c.vocab_size * c.dim - (2 * c.n_layers + 1) * c.dim
    return 6 * multiplying + 6 * c.n_layers * c.dim * c.max_seq_len


BYTES = {"fp32": 4, "bf16": 2, "int8": 34 / 32, "int4": 18 / 32}  # per weight, steps included


def bytes_per_token(c: M.ModelConfig, dtype: str) -> float:
    """The weights that decoding reads for a token: all but the embeddings, of which it needs a row.

    int4 has its output matrix in int8.
    """
    head = c.vocab_size * c.dim
    blocks = M.count_parameters(c) - 2 * head
    return blocks * BYTES[dtype] + head * BYTES["int8" if dtype == "int4" else dtype]


def product_alone(tick, job: Job) -> None:
    """Nothing but matrix products, as many as the arithmetic of a training step: its limit."""
    per_token = flops_per_token(job.config)
    if job.path == "c":
        kernels.choose("c", products=job.products)
        alone = [ops.product("", 0, 240, 384, 384, torch.Generator()) for _ in range(job.threads)]
        one, flops = ops.in_cores([op.ours for op in alone]), job.threads * alone[0].flops
    else:
        x = torch.randn(1024, 1024).bfloat16()
        one, flops = ops.repeated(lambda: x @ x), 2 * 1024**3
    while True:
        one(16)
        tick(16 * flops / per_token)


def reading_alone(tick, job: Job) -> None:
    """Nothing but reading as many bytes as the weights of a token have: the limit of decoding."""
    from kernels.decode import memory

    each = round_up(bytes_per_token(job.config, job.dtype) / 4 / job.threads, 1024)  # numbers
    parts = [memory(4 * each).view(torch.float32).fill_(1) for _ in range(job.threads)]
    sums = [torch.zeros(1024) for _ in parts]
    read = ops.in_cores([lambda repeat, p=p, s=s: ops.call("bench_read", repeat, each, p, s)
                         for p, s in zip(parts, sums)])
    while True:
        read(job.new)
        tick(job.new)


def round_up(n: float, to: int) -> int:
    return -int(-n // to) * to


# ---------------------------------------------------------------------------------- transformers


def hf_config(job: Job, **more):
    """Our shape in transformers' words."""
    from transformers import LlamaConfig

    c = job.config
    return LlamaConfig(hidden_size=c.dim, num_hidden_layers=c.n_layers, vocab_size=c.vocab_size,
                       num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
                       intermediate_size=c.hidden_dim, max_position_embeddings=c.max_seq_len,
                       rms_norm_eps=c.norm_eps, tie_word_embeddings=False, pad_token_id=0,
                       bos_token_id=1, eos_token_id=1, **more)


def hf_model(job: Job, scalar_head: bool = False):
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    if scalar_head:
        return LlamaForSequenceClassification(hf_config(job, num_labels=1))
    return LlamaForCausalLM(hf_config(job))


def bf16(job: Job):
    """bf16 products over float32 weights where the job says so."""
    if job.dtype == "bf16":
        return torch.autocast("cpu", torch.bfloat16)
    return contextlib.nullcontext()


def train_transformers(tick, job: Job) -> None:
    """A training step as the library's own examples write it."""
    model = hf_model(job)
    forward = torch.compile(model) if job.mode == "compiled" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    x = random_tokens(job, job.rows, job.config.max_seq_len)
    while True:
        with bf16(job):
            loss = forward(input_ids=x, labels=x).loss
        loss.backward()
        loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tick(x.numel())


def generate_transformers(tick, job: Job) -> None:
    """model.generate on a batch of prompts of one length; greedy for a single row."""
    model = hf_model(job).eval()
    if job.dtype == "bf16":
        model = model.bfloat16()
    x = random_tokens(job, job.rows, job.prompt)
    options = dict(max_new_tokens=job.new, min_new_tokens=job.new,
                   attention_mask=torch.ones_like(x), do_sample=job.rows > 1)
    if job.rows > 1:
        options |= dict(temperature=1.0, top_k=0)
    if job.mode == "static":
        options["cache_implementation"] = "static"
    while True:
        with torch.inference_mode():
            answers = model.generate(x, **options)
        assert answers.shape == (job.rows, job.prompt + job.new), answers.shape
        tick(job.rows * job.new)


# ------------------------------------------------------------------------------------------- trl


def trl_parts(tick, job: Job):
    """(options of all its trainers, a tokenizer of numbers, a callback that ticks)."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    words = {f"t{i}": i for i in range(job.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "t0")),
                                        pad_token="t0", eos_token="t1", bos_token="t1")
    options = dict(output_dir=f"{job.folder}/trl", use_cpu=True, report_to=[], save_strategy="no",
                   logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
                   bf16=job.dtype == "bf16", learning_rate=1e-4, weight_decay=0.1)

    class Tick(TrainerCallback):
        def __init__(self, amount):
            self.amount = amount

        def on_step_end(self, args, state, control, **more):
            tick(self.amount)

    return options, tokenizer, Tick


def sft_trl(tick, job: Job) -> None:
    """SFTTrainer on rows of the full context, half of each carrying loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    options, tokenizer, Tick = trl_parts(tick, job)
    T = job.config.max_seq_len
    rows = random_tokens(job, 16 * job.rows, T).tolist()
    mask = [int(t > T // 2) for t in range(T)]
    SFTTrainer(hf_model(job), SFTConfig(per_device_train_batch_size=job.rows, max_steps=10**6,
                                        max_length=T, completion_only_loss=True,
                                        loss_type=job.mode or None, **options),
               train_dataset=Dataset.from_list([{"input_ids": r, "completion_mask": mask}
                                                for r in rows]),
               processing_class=tokenizer, callbacks=[Tick(job.rows * T)]).train()


def reward_trl(tick, job: Job) -> None:
    """RewardTrainer on pairs of two dialogues of half the context."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    options, tokenizer, Tick = trl_parts(tick, job)
    T, count = job.config.max_seq_len // 2, job.rows // 2
    rows = random_tokens(job, 32 * count, T).tolist()
    RewardTrainer(hf_model(job, scalar_head=True),
                  RewardConfig(per_device_train_batch_size=count, max_steps=10**6, max_length=T,
                               **options),
                  train_dataset=Dataset.from_list([{"chosen_ids": a, "rejected_ids": b} for a, b in
                                                   zip(rows[::2], rows[1::2])]),
                  processing_class=tokenizer, callbacks=[Tick(count)]).train()


def ppo_trl(tick, job: Job) -> None:
    """PPOTrainer with four models, one epoch of four minibatches."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    options, tokenizer, Tick = trl_parts(tick, job)
    config = PPOConfig(per_device_train_batch_size=job.rows, num_mini_batches=min(4, job.rows),
                       num_ppo_epochs=1, local_rollout_forward_batch_size=job.rows,
                       response_length=job.new,
                       total_episodes=10**6, num_sample_generations=0, temperature=1.0,
                       **options | dict(learning_rate=1e-6))
    prompts = random_tokens(job, 16 * job.rows, job.prompt).tolist()
    PPOTrainer(config, tokenizer, hf_model(job), hf_model(job), hf_model(job, scalar_head=True),
               Dataset.from_list([{"input_ids": p} for p in prompts]),
               hf_model(job, scalar_head=True), callbacks=[Tick(1)]).train()


# ------------------------------------------------------------------------------- llama-cpp-python


def model_source(job: Job):
    """What to decode with, still unread: the checkpoint, or random weights of the job's shape."""
    import convert

    return convert.open_model(job.checkpoint) if job.checkpoint else random_source(job.config)


def random_source(config: M.ModelConfig):
    """A model of random weights that convert.py can write; each tensor is drawn when it is read."""
    import convert

    def draw(shape):
        return torch.randn(shape) * 0.02 if len(shape) > 1 else torch.ones(shape)

    weights = {name: convert.Lazy(shape, torch.float32, functools.partial(draw, shape))
               for name, shape in convert.shapes(config).items()}
    kinds = ["unknown", "control", "control"] + ["byte"] * 256
    pieces = SimpleNamespace(
        vocab_size=config.vocab_size, bos_id=1, eos_id=2, unk_id=0, score=lambda i: -float(i),
        piece=lambda i: f"<0x{i - 3:02X}>" if 3 <= i < 259 else f"<{i}>",
        kind=lambda i: kinds[i] if i < 259 else "normal")
    return convert.Source("random weights", config, weights, pieces)


def decode_llama_cpp(tick, job: Job) -> None:
    """Batch-1 evaluation of one token after another, without sampling."""
    import llama_cpp

    import convert

    source = model_source(job)
    path = Path(job.folder) / f"{job.dtype}.gguf"
    convert.write_gguf(source, path, job.dtype)
    llm = llama_cpp.Llama(str(path), n_ctx=source.config.max_seq_len, n_threads=job.threads,
                          n_threads_batch=job.threads, verbose=False)
    prompt = random_tokens(job, job.prompt).tolist()
    while True:
        llm.reset()
        llm.eval(prompt)
        for _ in range(job.new):
            llm.eval([prompt[0]])
        tick(job.new)
