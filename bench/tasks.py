"""Whole tasks: which contestants meet in each, at which sizes, and the tables of their contests.

What is not installed is left out with one printed line.
"""

from __future__ import annotations

import contextlib, importlib.util, os, statistics, tempfile
from dataclasses import replace

import torch

import model as M
from bench.contestants import (
    bytes_per_token, decode_llama_cpp, decode_ours, decode_plain, flops_per_token,
    generate_transformers, ppo_ours, ppo_trl, product_alone, reading_alone, reward_ours,
    reward_trl, rollout_ours, sft_ours, sft_trl, train_ours, train_transformers)
from bench.referee import Entry, Job, Result, contest, show
from kernels import build

SHAPES = {  # name: (config, sequences per step); the sizes of README's tables
    "T1": (M.ModelConfig(128, 4, 4, 2, 352, 1024, 256), 32),
    "T2": (M.ModelConfig(288, 6, 6, 6, 768, 4096, 256), 16),
    "T3": (M.ModelConfig(288, 6, 6, 6, 768, 32000, 256), 16),
    "tiny test": (M.ModelConfig(32, 2, 4, 2, 64, 96, 32), 2)}
HUGE = 5e8  # parameters: beyond, nobody holds 32-bit weights, since all contestants live at once

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
