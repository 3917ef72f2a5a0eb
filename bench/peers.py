"""Whole tasks, timed: ours in C, ours in plain PyTorch, and the libraries that people use instead.

Each contestant is a function in a process of its own. It sets itself up, then works for ever and
calls `tick(amount)` after each piece of work; the referee in that process stops it there until it
is its turn again. Rounds go a b c a b c ..., so that whatever else the machine does falls on all,
and ratios are taken round by round. Peers are imported in their own processes only, and what is
not installed is left out with one printed line.

Fairness: the same shapes, batches and optimizer (fused AdamW, gradient clipping), random tokens,
no padding, all cores for everyone; set-up, compilation and a first round are not counted. This
file drives the stages as a user would, so like a test it stands above them.
"""

from __future__ import annotations

import contextlib, functools, importlib.util, multiprocessing, os, statistics, tempfile, time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

import torch

import kernels, model as M
from bench import ops
from kernels import build

SHAPES = {  # name: (config, sequences per step); the sizes that PERFORMANCE's goals are stated at
    "T1": (M.ModelConfig(128, 4, 4, 2, 352, 1024, 256), 32),
    "T2": (M.ModelConfig(288, 6, 6, 6, 768, 4096, 256), 16),
    "T3": (M.ModelConfig(288, 6, 6, 6, 768, 32000, 256), 16),
    "tiny test": (M.ModelConfig(32, 2, 4, 2, 64, 96, 32), 2)}
TOO_SLOW = 20  # s: who needs longer for a round is measured once
GIVE_UP = 300  # s: who needs longer to set up is stopped
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
HUGE = 5e8  # parameters: beyond, nobody holds 32-bit weights, since all contestants live at once


@dataclass
class Job:
    """What one contestant is to do; it travels to its process."""

    config: M.ModelConfig
    rows: int  # B: sequences per step, or answers at once
    prompt: int  # tokens of a prompt
    new: int  # tokens of an answer
    threads: int
    seconds: float  # of a round, at least
    folder: str  # for files that a contestant writes
    checkpoint: str | None = None  # decode: read this instead of random weights
    path: str = "torch"  # ours: c or torch
    products: str | None = None  # ours in C: float32, or what is fastest here
    dtype: str = "fp32"  # or bf16, int8, int4, q8_0, q4_0
    mode: str = ""  # peers: compiled, static, nll; ours: quarters
    clock: str = "wall"  # or cpu


class Entry(NamedTuple):
    """A contestant: what the table calls it, the package it needs, its function and options."""

    name: str
    package: str | None
    function: Callable
    options: dict
    against: str = ""  # which of ours it is compared with; the table's first if empty


class Finished(Exception):
    """The referee has seen enough."""


# ------------------------------------------------------------------------------------ our stages


def random_tokens(job: Job, *shape: int) -> torch.Tensor:
    """int64 tokens >= 2: 0 and 1 are the peers' padding and end."""
    rng = torch.Generator().manual_seed(1)
    return torch.randint(2, job.config.vocab_size, shape, generator=rng)


def our_model(job: Job, scalar_head: bool = False) -> M.Llama:
    kernels.choose(job.path, products=job.products)
    return M.Llama(replace(job.config, scalar_head=scalar_head)).init_weights(0)


def single_process():
    import scale
    return scale.World(torch.device("cpu"))


def train_ours(tick, job: Job) -> None:
    """Steps of pretrain.py."""
    import pretrain

    model, world = our_model(job), single_process()
    optimizer = M.adamw(model, 1e-4, 0.1)
    pieces = 4 if job.mode == "quarters" else 1  # whose gradients add up: less memory, same step
    cfg = pretrain.Config(micro_batch=max(job.rows // pieces, 1))
    rows = random_tokens(job, job.rows, job.config.max_seq_len + 1)
    while True:
        pretrain.train_step(model, optimizer, rows, 1e-4, cfg, world)
        tick(job.rows * job.config.max_seq_len)


def sft_ours(tick, job: Job) -> None:
    """Steps of sft.py: half of each row carries loss."""
    import sft

    model, world = our_model(job), single_process()
    optimizer, cfg = M.adamw(model, 1e-4, 0.1), sft.Config(micro_batch=job.rows)
    T = job.config.max_seq_len
    tokens = random_tokens(job, job.rows, T + 1)
    mask = (torch.arange(T + 1) > T // 2).long().expand(job.rows, T + 1)
    while True:
        sft.train_step(model, optimizer, (tokens, mask, torch.zeros_like(tokens)), 1e-4, cfg, world)
        tick(job.rows * T)


def reward_ours(tick, job: Job) -> None:
    """Steps of reward.py: pairs of two dialogues of half the context."""
    import reward

    model, world, count = our_model(job, scalar_head=True), single_process(), job.rows // 2
    optimizer, cfg = M.adamw(model, 1e-4, 0.1), reward.Config(batch_size=count, micro_batch=count)
    rows = random_tokens(job, 2 * count, job.config.max_seq_len // 2).tolist()
    pairs = [reward.Pair(a, b, 1, 0.0, (-1, -1), None, {}) for a, b in zip(rows[::2], rows[1::2])]
    while True:
        reward.train_step(model, optimizer, pairs, 1e-4, 0.0, cfg, world)
        tick(count)


def ppo_ours(tick, job: Job) -> None:
    """Iterations of ppo.py: policy, reference, critic and one reward model, one epoch."""
    import ppo

    cfg = ppo.Config(batch_size=job.rows, minibatch=max(job.rows // 4, 1), lr=1e-6, beta=0.05,
                     max_new_tokens=job.new)
    policy, ref = our_model(job), our_model(job)
    critic, reward_model = our_model(job, scalar_head=True), our_model(job, scalar_head=True)
    optimizers = [M.adamw(model, cfg.lr, 0.1) for model in (policy, critic)]
    world = single_process()

    def reward(rows, prompts, responses) -> dict:
        said = ppo.scores(reward_model, [p + r for p, r in zip(prompts, responses)], world)
        return dict.fromkeys(("helpful", "safety", "combined", "gate"), said)

    at = SimpleNamespace(cfg=cfg, world=world, reward=reward, tokenizer=Numbers(job),
                         village=SimpleNamespace(prompts=no_questions))
    iteration = 0
    while True:
        rollouts = ppo.roll_out(policy, ref, critic, iteration, at)
        ppo.update(policy, critic, optimizers, rollouts, at)
        iteration += 1
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


def no_questions(kind, split, count: int, seed: int, styled: float) -> list[dict]:
    """Rows in the form of data.World.prompts; `Numbers` gives them their length."""
    return [{"messages": [{"role": "user", "content": "?"}], "is_safety": False}] * count


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


# --------------------------------------------------------------------------------- the contests


HF, TRL, LLAMA = "transformers", "trl", "llama_cpp"


def ours(function) -> list[Entry]:
    """One stage by our three paths; the second only where bfloat16 is the first (`wanted`)."""
    return [Entry("ours, C", None, function, {"path": "c"}),
            Entry("ours, C float32", None, function, {"path": "c", "products": "float32"}),
            Entry("ours, PyTorch", None, function, {})]


TASKS = {  # part: {what is timed: (unit, contestants)}
    "train": {"training step": ("tokens/s", [
        *ours(train_ours),
        Entry("ours, C, a quarter at a time", None, train_ours, {"path": "c", "mode": "quarters"}),
        Entry("transformers eager fp32", HF, train_transformers, {}),
        Entry("transformers eager bf16", HF, train_transformers, {"dtype": "bf16"}),
        Entry("transformers compiled fp32", HF, train_transformers, {"mode": "compiled"}),
        Entry("transformers compiled bf16", HF, train_transformers,
              {"mode": "compiled", "dtype": "bf16"}),
        Entry("limit: our product alone", None, product_alone, {"path": "c"}),
        Entry("limit: PyTorch's in bf16 alone", None, product_alone, {})])},
    "rollout": {"rollouts": ("new tokens/s", [
        *ours(rollout_ours),
        Entry("transformers generate fp32", HF, generate_transformers, {}),
        Entry("transformers generate bf16", HF, generate_transformers, {"dtype": "bf16"}),
        Entry("transformers static cache fp32", HF, generate_transformers, {"mode": "static"})])},
    "decode": {"decoding": ("tokens/s", [
        *(Entry(f"ours, C {dtype}", None, decode_ours, {"dtype": dtype})
          for dtype in ("int4", "int8", "bf16", "fp32")),
        Entry("ours, PyTorch fp32", None, decode_plain, {}, "ours, C fp32"),
        Entry("transformers fp32", HF, generate_transformers, {}, "ours, C fp32"),
        Entry("transformers bf16", HF, generate_transformers, {"dtype": "bf16"},
              "ours, C bf16"),
        Entry("llama.cpp F32", LLAMA, decode_llama_cpp, {"dtype": "fp32"}, "ours, C fp32"),
        Entry("llama.cpp Q8_0", LLAMA, decode_llama_cpp, {"dtype": "q8_0"}, "ours, C int8"),
        Entry("llama.cpp Q4_0", LLAMA, decode_llama_cpp, {"dtype": "q4_0"}, "ours, C int4"),
        *(Entry(f"limit: reading {dtype} alone", None, reading_alone, {"dtype": dtype},
                f"ours, C {dtype}") for dtype in ("int4", "int8", "bf16", "fp32"))])},
    "align": {
        "supervised fine-tuning": ("tokens/s", [
            *ours(sft_ours), Entry("trl SFTTrainer fp32", TRL, sft_trl, {}),
            Entry("trl SFTTrainer fp32, nll", TRL, sft_trl, {"mode": "nll"}),
            Entry("trl SFTTrainer bf16", TRL, sft_trl, {"dtype": "bf16"})]),
        "reward model": ("pairs/s", [
            *ours(reward_ours), Entry("trl RewardTrainer fp32", TRL, reward_trl, {}),
            Entry("trl RewardTrainer bf16", TRL, reward_trl, {"dtype": "bf16"})]),
        "PPO": ("iterations/s", [
            *ours(ppo_ours), Entry("trl PPOTrainer fp32", TRL, ppo_trl, {})])}}


@dataclass
class Result:
    """What a contestant reached."""

    name: str
    rates: list[float]  # amount per second of each counted round; empty if it failed
    against: str = ""  # the name of the Result to compare with
    setup: float = 0.0  # s from its first line to its first finished piece of work
    peak: float = 0.0  # MiB resident at most, mapped files included
    own: float = 0.0  # MiB of that which no file backs, at most after a piece of work
    note: str = ""


class Referee:
    """Lives in the contestant's process: lets it work while it is its turn, and times it."""

    def __init__(self, pipe, seconds: float, clock: str = "wall"):
        self.pipe, self.seconds, self.clock = pipe, seconds, CLOCKS[clock]
        self.born = self.clock()
        self.began, self.done, self.own = None, 0.0, 0.0

    def tick(self, amount: float) -> None:
        """So much more is done. Returns when there is time for more; Finished ends it all."""
        now = self.clock()
        self.done += amount
        if self.began is None:
            self.pipe.send(("ready", now - self.born))
        elif now - self.began < self.seconds:
            return
        else:
            self.pipe.send(("rate", self.done / (now - self.began)))
        self.own = max(self.own, memory("RssAnon"))
        if self.pipe.recv() != "go":
            raise Finished
        self.began, self.done = self.clock(), 0.0


def contestant(pipe, function, job: Job) -> None:
    """Main function of a contestant's process. What it prints is thrown away."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    torch.set_num_threads(job.threads)
    referee = Referee(pipe, job.seconds, job.clock)
    try:
        function(referee.tick, job)
    except Finished:
        pipe.send(("memory", (memory("VmHWM"), referee.own)))
    except Exception as e:  # whatever a peer raises is one line of the table
        line = (str(e).strip().splitlines() or [""])[0]
        pipe.send(("failed", f"{type(e).__name__}: {line}"[:120]))


def memory(name: str) -> float:
    """A line of this process's status, in MiB; nan where the system has none.

    Not getrusage: its figure is inherited from the parent when a process starts.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")),
                float("nan"))


def contest(entries: list[Entry], job: Job, rounds: int) -> list[Result]:
    """Let all set up, one after another, then work in turn; one Result each."""
    results, running = [Result(e.name, [], e.against) for e in entries], []
    patience = GIVE_UP if job.clock == "wall" else 20 * GIVE_UP  # a busy machine lets it wait
    try:
        for entry, result in zip(entries, results):
            running.append(start(entry, job))
            result.setup = answer(running[-1][1], result, patience)
        for number in range(rounds + 1):  # the first is thrown away
            for (_, pipe), result in zip(running, results):
                if result.note:
                    continue
                began = time.perf_counter()
                pipe.send("go")
                speed = answer(pipe, result, patience)
                slow = job.clock == "wall" and time.perf_counter() - began > TOO_SLOW
                if (number or slow) and not result.note:
                    result.rates.append(speed)
                if slow and not result.note:
                    result.note = "one round"
                time.sleep(0.05)  # its threads go to sleep
    finally:
        for (process, pipe), result in zip(running, results):
            end(process, pipe, result)
    return results


def start(entry: Entry, job: Job):
    """(process, pipe) of a contestant, whose first message says that it is ready."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=contestant, args=(there, entry.function,
                                                       replace(job, **entry.options)))
    with environment(OMP_NUM_THREADS=str(job.threads), HF_HUB_OFFLINE="1",
                     TRL_EXPERIMENTAL_SILENCE="1",
                     TORCHINDUCTOR_CACHE_DIR=f"{job.folder}/inductor"):
        process.start()
    there.close()
    return process, here


def answer(pipe, result: Result, seconds: float):
    """What a contestant sends; 0 and a note if it failed or takes too long."""
    try:
        kind, value = pipe.recv() if pipe.poll(seconds) else ("failed", f"nothing in {seconds} s")
    except EOFError:
        kind, value = "failed", "its process died"
    if kind == "failed":
        result.note = value
        return 0.0
    return value


def end(process, pipe, result: Result) -> None:
    """Stop a contestant and ask for its peak memory."""
    with contextlib.suppress(BrokenPipeError, OSError):
        pipe.send("stop")
        if result.rates:
            result.peak, result.own = answer(pipe, Result("", []), 30) or (0.0, 0.0)
    process.join(10)
    if process.is_alive():
        process.kill()
        process.join()


@contextlib.contextmanager
def environment(**values: str):
    """Set for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


# -------------------------------------------------------------------------------------- tables


def spread(values: list[float], form: str) -> tuple[str, str]:
    """(median, "(least-most)")."""
    return (format(statistics.median(values), form),
            f"({format(min(values), form)}-{format(max(values), form)})")


def show(title: str, unit: str, results: list[Result]) -> None:
    """One table: rates, and how many times faster ours is, round by round."""
    print(f"\n{title}\n{'':<32}{unit:>13} {'(least-most)':<20}{'ours is':>8} {'(least-most)':<14}"
          f"{'peak MiB':>9}{'no file':>9}{'start s':>9}")
    by_name = {r.name: r for r in results}
    for r in results:
        if not r.rates:
            print(f"{r.name:<32}  {r.note}")
            continue
        middle, width = spread(r.rates, ",.0f" if max(r.rates) >= 100 else ".3g")
        ratio, about, ours = "", "", by_name.get(r.against, results[0])
        if r is not results[0] and ours is not r and ours.rates:
            pairs = zip(ours.rates, r.rates) if len(r.rates) == len(ours.rates) else \
                [(statistics.median(ours.rates), statistics.median(r.rates))]
            ratio, about = spread([a / b for a, b in pairs], ".2f")
            ratio += "x"
        print(f"{r.name:<32}{middle:>13} {width:<20}{ratio:>8} {about:<14}{r.peak:>9,.0f}"
              f"{r.own:>9,.0f}{r.setup:>9.1f}  {r.note}")


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


def show_limits(results: list[Result], job: Job) -> None:
    """What ours does per second in absolute numbers, and its share of the limits beside it."""
    for r in results:
        limits = [x for x in results if x.name.startswith("limit") and x.rates
                  and x.against in ("", r.name)]
        if not r.name.startswith("ours, C") or not r.rates or not limits:
            continue
        speed = statistics.median(r.rates)
        if limits[0].against:
            size = bytes_per_token(job.config, r.name.split()[-1])
            done = f"{size / 2**20:,.0f} MiB of weights per token, {speed * size / 1e9:.1f} GB/s"
        else:
            flops = flops_per_token(job.config)
            done = f"{flops / 1e6:.2f} MFLOP per token, {speed * flops / 1e9:.0f} GFLOP/s"
        shares = [f"{statistics.median(a / b for a, b in zip(r.rates, x.rates)):.0%} of "
                  f"{x.name.removeprefix('limit: ')}" for x in limits]
        print(f"{r.name}: {done}; {', '.join(shares)}")


def wanted(entries: list[Entry], job: Job, cfg, missing: set) -> list[Entry]:
    """Those that can run and are wanted; collects the packages that are not there."""
    kept, huge = [], M.count_parameters(job.config) > HUGE
    for entry in entries:
        if not any(word in entry.name for word in cfg.only.split(",")):
            continue
        if entry.options.get("products") == "float32" and not bfloat16_here():
            continue  # that is "ours, C" itself
        if entry.package and (not cfg.peers or cfg.checkpoint and entry.package == HF):
            continue  # transformers does not read every format that we do
        if huge and (entry.package == HF or entry.options.get("dtype", "fp32") == "fp32"):
            continue  # several GiB each
        if entry.package and not importlib.util.find_spec(entry.package):
            missing.add(entry.package)
            continue
        kept.append(entry)
    return kept


def bfloat16_here() -> bool:
    """Whether ours in C multiplies bfloat16 unless told otherwise."""
    told = os.environ.get("LLAMA_PRODUCTS") or "auto"
    with contextlib.suppress(OSError):  # no compiler: neither
        return "bfloat16" in (told if told != "auto" else build.fastest_products())
    return False


def jobs(part: str, sizes: list[str], presets: list[str], cfg, folder: str):
    """(name of the shape, Job) of each table of a part."""
    n = torch.get_num_threads()
    seconds = 0.01 if cfg.quick else cfg.seconds
    if part == "decode":
        shapes = {name: M.PRESETS[name] for name in presets if name in M.PRESETS}
        if cfg.quick:
            shapes = {"tiny test": SHAPES["tiny test"][0]}
        if cfg.checkpoint:
            import convert
            shapes = {cfg.checkpoint: convert.open_model(cfg.checkpoint).config}
        for name, c in shapes.items():
            yield name, Job(c, 1, 8, min(64, c.max_seq_len - 16), n, seconds, folder,
                            cfg.checkpoint, clock=cfg.clock)
        return
    for name in sizes if part != "align" else sizes[:1]:
        c, rows = SHAPES[name]
        quarter = c.max_seq_len // 4
        yield name, Job(c, rows, quarter, quarter, n, seconds, folder, clock=cfg.clock)


def describe(task: str, job: Job) -> tuple[str, Job]:
    """(the sizes in words, the job with as many rows as this task has)."""
    T, rows = job.config.max_seq_len, job.rows
    if task in ("rollouts", "PPO"):  # 64 answers of 64 tokens at T1 to T3
        job = replace(job, rows=64 if rows > 2 else rows)
        return f"{job.rows} answers, prompts of {job.prompt} tokens, answers of {job.new}", job
    if task == "reward model":
        return f"{rows // 2} pairs of 2 x {T // 2} tokens", job
    if task == "decoding":
        none = ", none with 32-bit weights" if M.count_parameters(job.config) > HUGE else ""
        return f"one answer of {job.new} tokens at a time{none}", job
    return f"{rows} sequences of {T} tokens", job


def tables(parts: list[str], sizes: list[str], presets: list[str], cfg) -> None:
    """Run and print every contest of the given parts."""
    missing: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        for part in parts:
            for shape, job in jobs(part, sizes, presets, cfg, folder):
                for task, (unit, entries) in TASKS[part].items():
                    sizes_in_words, job_of_task = describe(task, job)
                    there = wanted(entries, job_of_task, cfg, missing)
                    results = contest(there, job_of_task, 1 if cfg.quick else cfg.rounds)
                    show(f"{task}, {shape}: {sizes_in_words}", unit, results)
                    show_limits(results, job)
    if missing:
        names = {"llama_cpp": "llama-cpp-python", "trl": "trl==1.12.0 accelerate datasets"}
        print(f"\nnot installed, so not in the tables: {', '.join(sorted(missing))} (pip install "
              f"{' '.join(names.get(m, m) for m in sorted(missing))})")
