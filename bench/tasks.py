"""Whole tasks: which contestants meet in each, at which sizes, and the tables of their contests.

A part of the command (train, rollout, decode, align) has one task or several; each task at each
size is a contest and a table. What is not installed is left out, and one line at the end says so.
"""

from __future__ import annotations

import importlib.util, os, statistics, tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

import model as M
from bench import contestants as by
from bench.referee import Entry, Job, Result, contest, show
from kernels import build

SHAPES = {  # name: (config, sequences per step); the sizes of the table in README
    "T1": (M.ModelConfig(128, 4, 4, 2, 352, 1024, 256), 32),
    "T2": (M.ModelConfig(288, 6, 6, 6, 768, 4096, 256), 16),
    "T3": (M.ModelConfig(288, 6, 6, 6, 768, 32000, 256), 16),
    "tiny test": (M.ModelConfig(32, 2, 4, 2, 64, 96, 32), 2)}
HUGE = 5e8  # parameters: beyond, nobody holds 32-bit weights, since all contestants live at once

# ----------------------------------------------------------------------------- who meets whom

HF = "transformers"  # packages, as they are imported
TRL = "trl"
LLAMA = "llama_cpp"
INSTALL = {LLAMA: "llama-cpp-python", TRL: "trl==1.12.0 accelerate datasets"}  # as pip has them


class Task(NamedTuple):
    """What is timed, in which unit, and who is."""

    name: str
    unit: str
    entries: list[Entry]


def ours(function) -> list[Entry]:
    """One stage by our three paths; the second only where bfloat16 is the first (`wanted`)."""
    return [
        Entry("ours, C", None, function, {"path": "c"}),
        Entry("ours, C float32", None, function, {"path": "c", "products": "float32"}),
        Entry("ours, PyTorch", None, function, {})]


TRAIN = Task("training step", "tokens/s", [
    *ours(by.train_ours),
    Entry("ours, C, a quarter at a time", None, by.train_ours, {"path": "c", "mode": "quarters"}),
    Entry("transformers eager fp32", HF, by.train_transformers, {}),
    Entry("transformers eager bf16", HF, by.train_transformers, {"dtype": "bf16"}),
    Entry("transformers compiled fp32", HF, by.train_transformers, {"mode": "compiled"}),
    Entry("transformers compiled bf16", HF, by.train_transformers,
          {"mode": "compiled", "dtype": "bf16"}),
    Entry("limit: our product alone", None, by.product_alone, {"path": "c"}),
    Entry("limit: PyTorch's in bf16 alone", None, by.product_alone, {})])

ROLLOUT = Task("rollouts", "new tokens/s", [
    *ours(by.rollout_ours),
    Entry("transformers generate fp32", HF, by.generate_transformers, {}),
    Entry("transformers generate bf16", HF, by.generate_transformers, {"dtype": "bf16"}),
    Entry("transformers static cache fp32", HF, by.generate_transformers, {"mode": "static"})])

DECODE = Task("decoding", "tokens/s", [
    Entry("ours, C int4", None, by.decode_ours, {"dtype": "int4"}),
    Entry("ours, C int8", None, by.decode_ours, {"dtype": "int8"}),
    Entry("ours, C bf16", None, by.decode_ours, {"dtype": "bf16"}),
    Entry("ours, C fp32", None, by.decode_ours, {"dtype": "fp32"}),
    Entry("ours, PyTorch fp32", None, by.decode_plain, {}, "ours, C fp32"),
    Entry("transformers fp32", HF, by.generate_transformers, {}, "ours, C fp32"),
    Entry("transformers bf16", HF, by.generate_transformers, {"dtype": "bf16"}, "ours, C bf16"),
    Entry("llama.cpp F32", LLAMA, by.decode_llama_cpp, {"dtype": "fp32"}, "ours, C fp32"),
    Entry("llama.cpp Q8_0", LLAMA, by.decode_llama_cpp, {"dtype": "q8_0"}, "ours, C int8"),
    Entry("llama.cpp Q4_0", LLAMA, by.decode_llama_cpp, {"dtype": "q4_0"}, "ours, C int4"),
    Entry("limit: reading int4 alone", None, by.reading_alone, {"dtype": "int4"}, "ours, C int4"),
    Entry("limit: reading int8 alone", None, by.reading_alone, {"dtype": "int8"}, "ours, C int8"),
    Entry("limit: reading bf16 alone", None, by.reading_alone, {"dtype": "bf16"}, "ours, C bf16"),
    Entry("limit: reading fp32 alone", None, by.reading_alone, {"dtype": "fp32"}, "ours, C fp32")])

SFT = Task("supervised fine-tuning", "tokens/s", [
    *ours(by.sft_ours),
    Entry("trl SFTTrainer fp32", TRL, by.sft_trl, {}),
    Entry("trl SFTTrainer fp32, nll", TRL, by.sft_trl, {"mode": "nll"}),
    Entry("trl SFTTrainer bf16", TRL, by.sft_trl, {"dtype": "bf16"})])

REWARD = Task("reward model", "pairs/s", [
    *ours(by.reward_ours),
    Entry("trl RewardTrainer fp32", TRL, by.reward_trl, {}),
    Entry("trl RewardTrainer bf16", TRL, by.reward_trl, {"dtype": "bf16"})])

PPO = Task("PPO", "iterations/s", [
    *ours(by.ppo_ours),
    Entry("trl PPOTrainer fp32", TRL, by.ppo_trl, {})])

TASKS = {"train": [TRAIN], "rollout": [ROLLOUT], "decode": [DECODE], "align": [SFT, REWARD, PPO]}


def wanted(entries: list[Entry], job: Job, cfg, missing: set) -> list[Entry]:
    """Those that can run and are wanted; collects the packages that are not there."""
    is_huge = M.count_parameters(job.config) > HUGE
    kept = []
    for entry in entries:
        if not any(word in entry.name for word in cfg.only.split(",")):
            continue
        if entry.options.get("products") == "float32" and not bfloat16_here():
            continue  # that is "ours, C" itself
        if entry.package and not cfg.peers:
            continue
        if entry.package == HF and cfg.checkpoint:
            continue  # transformers does not read every format that we do
        has_wide_weights = entry.package == HF or entry.options.get("dtype", "fp32") == "fp32"
        if is_huge and has_wide_weights:
            continue  # several GiB each
        if entry.package and not importlib.util.find_spec(entry.package):
            missing.add(entry.package)
            continue
        kept.append(entry)
    return kept


def bfloat16_here() -> bool:
    """Whether ours in C multiplies bfloat16 unless told otherwise."""
    products = os.environ.get("LLAMA_PRODUCTS") or "auto"
    if products != "auto":
        return products == "bfloat16"
    try:
        return build.fastest_products() == "bfloat16"
    except OSError:  # no compiler: nothing in C
        return False


# ----------------------------------------------------------------------------- at which sizes


def jobs(part: str, sizes: list[str], presets: list[str], cfg,
         folder: str) -> Iterator[tuple[str, Job]]:
    """(name of the shape, Job) of each table of a part."""
    common = {"threads": torch.get_num_threads(),
              "seconds": 0.01 if cfg.quick else cfg.seconds,
              "folder": folder,
              "clock": cfg.clock}
    if part == "decode":
        for name, config in decoded_shapes(presets, cfg).items():
            new = min(64, config.max_seq_len - 16)
            yield name, Job(config, rows=1, prompt=8, new=new, checkpoint=cfg.checkpoint, **common)
        return
    if part == "align":
        sizes = sizes[:1]
    for name in sizes:
        config, rows = SHAPES[name]
        quarter = config.max_seq_len // 4
        yield name, Job(config, rows, prompt=quarter, new=quarter, **common)


def decoded_shapes(presets: list[str], cfg) -> dict[str, M.ModelConfig]:
    """The networks to decode with, by the name that the table has."""
    if cfg.checkpoint:
        import convert

        return {cfg.checkpoint: convert.open_model(cfg.checkpoint).config}
    if cfg.quick:
        config, _ = SHAPES["tiny test"]
        return {"tiny test": config}
    return {name: M.PRESETS[name] for name in presets if name in M.PRESETS}


def describe(task: str, job: Job) -> tuple[str, Job]:
    """(the sizes in words, the job with as many rows as this task has)."""
    T = job.config.max_seq_len
    if task in ("rollouts", "PPO"):
        if job.rows > 2:
            job = replace(job, rows=64)  # 64 answers of 64 tokens at T1 to T3
        return f"{job.rows} answers, prompts of {job.prompt} tokens, answers of {job.new}", job
    if task == "reward model":
        return f"{job.rows // 2} pairs of 2 x {T // 2} tokens", job
    if task == "decoding":
        is_huge = M.count_parameters(job.config) > HUGE
        none = ", none with 32-bit weights" if is_huge else ""
        return f"one answer of {job.new} tokens at a time{none}", job
    return f"{job.rows} sequences of {T} tokens", job


# ------------------------------------------------------------------------------- their tables


def show_limits(results: list[Result], job: Job) -> None:
    """What ours does per second in absolute numbers, and its share of the limits beside it."""
    for result in results:
        if not result.name.startswith("ours, C") or not result.rates:
            continue
        limits = limits_of(result, results)
        if not limits:
            continue
        speed = statistics.median(result.rates)
        if limits[0].against:  # one of decoding
            dtype = result.name.split()[-1]
            size = by.bytes_per_token(job.config, dtype)
            done = f"{size / 2**20:,.0f} MiB of weights per token, {speed * size / 1e9:.1f} GB/s"
        else:
            flops = by.flops_per_token(job.config)
            done = f"{flops / 1e6:.2f} MFLOP per token, {speed * flops / 1e9:.0f} GFLOP/s"
        shares = []
        for limit in limits:
            share = statistics.median(a / b for a, b in zip(result.rates, limit.rates))
            shares.append(f"{share:.0%} of {limit.name.removeprefix('limit: ')}")
        print(f"{result.name}: {done}; {', '.join(shares)}")


def limits_of(ours: Result, results: list[Result]) -> list[Result]:
    """The limits that hold for one of ours: those of all, and those of its own."""
    found = []
    for result in results:
        is_limit = result.name.startswith("limit")
        if is_limit and result.rates and result.against in ("", ours.name):
            found.append(result)
    return found


def tables(parts: list[str], sizes: list[str], presets: list[str], cfg) -> None:
    """Run and print every contest of the given parts."""
    missing: set[str] = set()
    rounds = 1 if cfg.quick else cfg.rounds
    with tempfile.TemporaryDirectory(prefix="kernels-") as folder:
        for part in parts:
            for shape, job in jobs(part, sizes, presets, cfg, folder):
                for task in TASKS[part]:
                    sizes_in_words, job_of_task = describe(task.name, job)
                    entries = wanted(task.entries, job_of_task, cfg, missing)
                    results = contest(entries, job_of_task, rounds)
                    show(f"{task.name}, {shape}: {sizes_in_words}", task.unit, results)
                    show_limits(results, job)
    if missing:
        packages = sorted(missing)
        command = " ".join(["pip install", *(INSTALL.get(name, name) for name in packages)])
        print(f"\nnot installed, so not in the tables: {', '.join(packages)} ({command})")
