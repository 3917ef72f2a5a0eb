"""The contestants: ours in C, ours in plain PyTorch, and the libraries that people use instead.

Each is a function(tick, job) that sets itself up, then works for ever and calls `tick(amount)`
after each piece of work (referee.py); tasks.py says who meets whom. Peers are imported in their
own processes only, and so are the stages.

Fairness: the same shapes, batches and optimizer (fused AdamW, gradient clipping), random tokens,
no padding, all cores for everyone; set-up, compilation and a first round are not counted. This
file drives the stages as a user would, so like a test it stands above them.
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


def random_tokens(job: Job, *shape: int) -> torch.Tensor:
    """int64 tokens >= 2: 0 and 1 are the peers' padding and end."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(2, job.config.vocab_size, shape, generator=rng)


# ------------------------------------------------------------------------------------ our stages

FOREVER = 10**9  # steps, iterations: the referee stops a contestant


def our_model(job: Job, scalar_head: bool = False) -> M.Llama:
    """On the path that the job names, the same weights every time."""
    kernels.choose(job.path, products=job.products)
    config = replace(job.config, scalar_head=scalar_head)
    return M.Llama(config).init_weights(0)


def train_ours(tick, job: Job) -> None:
    """Steps of pretrain.py."""
    import pretrain, scale, stage

    model = our_model(job)
    optimizer = stage.adamw(model, 1e-4, 0.1)
    T = job.config.max_seq_len
    pieces = 4 if job.mode == "quarters" else 1  # whose gradients add up: less memory, same step
    cfg = pretrain.Config(batch_size=job.rows, micro_batch=max(job.rows // pieces, 1), seq_len=T,
                          lr=1e-4)
    stream = random_tokens(job, job.rows * T + 1).numpy()
    ranks = scale.ranks_of(model)
    for _ in pretrain.train(model, optimizer, stream, cfg, ranks, total=FOREVER):
        tick(job.rows * T)


def sft_ours(tick, job: Job) -> None:
    """Steps of sft.py: half of each row carries loss."""
    import scale, sft, stage

    model = our_model(job)
    optimizer = stage.adamw(model, 1e-4, 0.1)
    T = job.config.max_seq_len
    cfg = sft.Config(batch_size=job.rows, micro_batch=job.rows, lr=1e-4)
    tokens = random_tokens(job, job.rows, T + 1)
    loss_mask = (torch.arange(T + 1) > T // 2).long().expand(job.rows, T + 1)
    segments = torch.zeros_like(tokens)
    ranks = scale.ranks_of(model)
    while True:
        one_step = sft.train(model, optimizer, (tokens, loss_mask, segments), cfg, ranks)
        for _ in one_step:
            tick(job.rows * T)


def reward_ours(tick, job: Job) -> None:
    """Steps of reward.py: pairs of two dialogues of half the context."""
    import reward, scale, stage

    model = our_model(job, scalar_head=True)
    optimizer = stage.adamw(model, 1e-4, 0.1)
    count = job.rows // 2
    cfg = reward.Config(batch_size=count, micro_batch=count, lr=1e-4)
    rows = random_tokens(job, 2 * count, job.config.max_seq_len // 2).tolist()
    pairs = []
    for chosen, rejected in zip(rows[::2], rows[1::2]):
        pairs.append(reward.Pair(chosen, rejected, 1, 0.0, (-1, -1), None, {}))
    ranks = scale.ranks_of(model)
    while True:
        one_step = reward.train(model, optimizer, pairs, 0.0, cfg, ranks)
        for _ in one_step:
            tick(count)


def ppo_ours(tick, job: Job) -> None:
    """Iterations of ppo.py: policy, reference, critic and one reward model, one epoch."""
    import ppo, rollouts, stage

    cfg = ppo.Config(batch_size=job.rows, minibatch=max(job.rows // 4, 1), lr=1e-6, beta=0.05,
                     max_new_tokens=job.new, iterations=FOREVER)
    policy = our_model(job)
    ref = our_model(job)
    critic = our_model(job, scalar_head=True)
    reward_model = our_model(job, scalar_head=True)
    optimizers = [stage.adamw(model, cfg.lr, 0.1) for model in (policy, critic)]

    def draw_rows(iteration: int) -> list[dict]:
        row = {"messages": [{"role": "user", "content": "?"}], "is_safety": False}
        return [row] * job.rows  # `OnePrompt` gives them their length

    def score(rows, answers) -> rollouts.Scores:
        dialogues = []
        for prompt, response in zip(answers.prompts, answers.responses):
            dialogues.append(prompt + response)
        scores = rollouts.scores(reward_model, dialogues)
        nowhere = torch.zeros(len(scores)).bool()
        return rollouts.Scores(helpful=scores, safety=scores, combined=scores, gate=nowhere)

    for _ in ppo.train(policy, ref, critic, optimizers, draw_rows, score, OnePrompt(job), cfg):
        tick(1)


class OnePrompt:
    """A tokenizer whose every prompt is as long as the job says; no response ends by itself."""

    eos_id = -1

    def __init__(self, job: Job):
        self.tokens = random_tokens(job, job.prompt).tolist()

    def encode(self, text, bos=False) -> list[int]:
        return self.tokens

    def decode(self, tokens) -> str:
        return ""


def rollout_ours(tick, job: Job) -> None:
    """Responses to a batch of prompts, with their log-probabilities."""
    model = our_model(job)
    prompts = random_tokens(job, job.rows, job.prompt).tolist()
    while True:
        kernels.rollout(model, prompts, job.new)
        tick(job.rows * job.new)


def decode_ours(tick, job: Job) -> None:
    """One greedy response after another, by what chat.py speaks with; every prompt is new."""
    from kernels.decode import Decoder

    source = model_source(job)
    weights = {name: weight.read for name, weight in source.weights.items()}
    decoder = Decoder(source.config, weights, job.dtype)
    prompt = random_tokens(job, job.prompt).tolist()
    spoken = 0
    while True:
        prompt[0] = 2 + spoken % (job.config.vocab_size - 2)  # nothing of it is in the cache
        for _ in decoder.stream(prompt, job.new, temperature=0.0):
            pass
        spoken += 1
        tick(job.new)


def decode_plain(tick, job: Job) -> None:
    """The same by model.stream."""
    model = our_model(job)
    prompt = random_tokens(job, job.prompt).tolist()
    while True:
        for _ in M.stream(model, prompt, job.new, temperature=0.0):
            pass
        tick(job.new)


# ------------------------------------------------------------------------------------ the limits


def flops_per_token(config: M.ModelConfig) -> int:
    """Of a training step: 6 per weight that multiplies, and attention's causal half."""
    embeddings = config.vocab_size * config.dim  # are looked up
    norms = (2 * config.n_layers + 1) * config.dim
    multiplying = M.count_parameters(config) - embeddings - norms
    return 6 * multiplying + 6 * config.n_layers * config.dim * config.max_seq_len


BYTES = {"fp32": 4, "bf16": 2, "int8": 34 / 32, "int4": 18 / 32}  # per weight, steps included


def bytes_per_token(config: M.ModelConfig, dtype: str) -> float:
    """The weights that decoding reads for a token: all but the embeddings, of which it needs a row.

    int4 has its output matrix in int8.
    """
    head = config.vocab_size * config.dim
    blocks = M.count_parameters(config) - 2 * head
    head_dtype = "int8" if dtype == "int4" else dtype
    return blocks * BYTES[dtype] + head * BYTES[head_dtype]


def product_alone(tick, job: Job) -> None:
    """Nothing but matrix products, as many as the arithmetic of a training step: its limit."""
    if job.path == "c":
        kernels.choose("c", products=job.products)
        alone = []  # one per core
        for _ in range(job.threads):
            alone.append(ops.product("", 0, 240, 384, 384, torch.Generator()))
        multiply = ops.in_cores([op.ours for op in alone])
        flops = job.threads * alone[0].flops
    else:
        x = torch.randn(1024, 1024).bfloat16()
        multiply = ops.repeated(lambda: x @ x)
        flops = 2 * 1024**3
    tokens = 16 * flops / flops_per_token(job.config)  # whose steps cost as much
    while True:
        multiply(16)
        tick(tokens)


def reading_alone(tick, job: Job) -> None:
    """Nothing but reading as many bytes as the weights of a token have: the limit of decoding."""
    from kernels.decode import memory

    numbers = bytes_per_token(job.config, job.dtype) / 4  # of float32, in as many bytes
    each = round_up(numbers / job.threads, 1024)
    readers = []
    for _ in range(job.threads):
        part = memory(4 * each).view(torch.float32).fill_(1)
        sums = torch.zeros(1024)
        readers.append(ops.runner("bench_read", each, part, sums))
    read = ops.in_cores(readers)
    while True:
        read(job.new)
        tick(job.new)


def round_up(n: float, multiple: int) -> int:
    return -int(-n // multiple) * multiple


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
    is_batch = job.rows > 1
    options = {"max_new_tokens": job.new,
               "min_new_tokens": job.new,
               "attention_mask": torch.ones_like(x),
               "do_sample": is_batch}
    if is_batch:
        options["temperature"] = 1.0
        options["top_k"] = 0
    if job.mode == "static":
        options["cache_implementation"] = "static"
    while True:
        with torch.inference_mode():
            rows = model.generate(x, **options)
        assert rows.shape == (job.rows, job.prompt + job.new), rows.shape
        tick(job.rows * job.new)


# ------------------------------------------------------------------------------------------- trl


def trl_options(job: Job) -> dict:
    """Options of all its trainers."""
    return {"output_dir": f"{job.folder}/trl", "use_cpu": True, "report_to": [],
            "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
            "gradient_checkpointing": False, "bf16": job.dtype == "bf16",
            "learning_rate": 1e-4, "weight_decay": 0.1}


def trl_tokenizer(job: Job):
    """A tokenizer of numbers."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(job.config.vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "t0")),
                                   pad_token="t0", eos_token="t1", bos_token="t1")


def trl_callback(tick, amount: float):
    """Ticks after each step."""
    from transformers import TrainerCallback

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            tick(amount)

    return Tick()


def sft_trl(tick, job: Job) -> None:
    """SFTTrainer on rows of the full context, half of each carrying loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    T = job.config.max_seq_len
    rows = random_tokens(job, 16 * job.rows, T).tolist()
    mask = [int(t > T // 2) for t in range(T)]
    dataset = Dataset.from_list([{"input_ids": row, "completion_mask": mask} for row in rows])
    config = SFTConfig(per_device_train_batch_size=job.rows, max_steps=10**6, max_length=T,
                       completion_only_loss=True, loss_type=job.mode or None, **trl_options(job))
    trainer = SFTTrainer(hf_model(job), config, train_dataset=dataset,
                         processing_class=trl_tokenizer(job),
                         callbacks=[trl_callback(tick, job.rows * T)])
    trainer.train()


def reward_trl(tick, job: Job) -> None:
    """RewardTrainer on pairs of two dialogues of half the context."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    T = job.config.max_seq_len // 2
    count = job.rows // 2
    rows = random_tokens(job, 32 * count, T).tolist()
    pairs = []
    for chosen, rejected in zip(rows[::2], rows[1::2]):
        pairs.append({"chosen_ids": chosen, "rejected_ids": rejected})
    config = RewardConfig(per_device_train_batch_size=count, max_steps=10**6, max_length=T,
                          **trl_options(job))
    trainer = RewardTrainer(hf_model(job, scalar_head=True), config,
                            train_dataset=Dataset.from_list(pairs),
                            processing_class=trl_tokenizer(job),
                            callbacks=[trl_callback(tick, count)])
    trainer.train()


def ppo_trl(tick, job: Job) -> None:
    """PPOTrainer with four models, one epoch of four minibatches."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    options = trl_options(job)
    options["learning_rate"] = 1e-6
    config = PPOConfig(per_device_train_batch_size=job.rows, num_mini_batches=min(4, job.rows),
                       num_ppo_epochs=1, local_rollout_forward_batch_size=job.rows,
                       response_length=job.new, total_episodes=10**6, num_sample_generations=0,
                       temperature=1.0, **options)
    prompts = random_tokens(job, 16 * job.rows, job.prompt).tolist()
    dataset = Dataset.from_list([{"input_ids": prompt} for prompt in prompts])
    policy = hf_model(job)
    ref = hf_model(job)
    reward_model = hf_model(job, scalar_head=True)
    critic = hf_model(job, scalar_head=True)
    trainer = PPOTrainer(config, trl_tokenizer(job), policy, ref, reward_model, dataset, critic,
                         callbacks=[trl_callback(tick, 1)])
    trainer.train()


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

    weights = {}
    for name, shape in convert.shapes(config).items():
        weights[name] = convert.Lazy(shape, torch.float32, functools.partial(draw, shape))
    return convert.Source("random weights", config, weights, random_pieces(config))


def random_pieces(config: M.ModelConfig) -> SimpleNamespace:
    """A vocabulary as SentencePiece's: unknown, begin and end, 256 bytes, then words."""
    kinds = ["unknown", "control", "control"] + ["byte"] * 256

    def piece(i: int) -> str:
        return f"<0x{i - 3:02X}>" if 3 <= i < 259 else f"<{i}>"

    def kind(i: int) -> str:
        return kinds[i] if i < 259 else "normal"

    def score(i: int) -> float:
        return -float(i)

    return SimpleNamespace(vocab_size=config.vocab_size, bos_id=1, eos_id=2, unk_id=0, score=score,
                           piece=piece, kind=kind)


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
