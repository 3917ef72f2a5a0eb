"""The command: its flags, and its parts in order. The page that --help prints is __init__.py."""

from __future__ import annotations

import math, os, platform, shlex, statistics, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import bench, kernels, model as M, stage
from bench import ops, tasks
from bench.referee import CLOCKS
from kernels import native
from kernels.decode import Decoder
from stage import ranged

__doc__ = bench.__doc__  # for --help

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What to do; every field is a flag."""

    parts: str = "check,limits,ops,train,rollout,decode,align"  # comma between
    shapes: str = "T1,T2,T3,15m"  # sizes for ops, train, rollout and align (T) and decode (presets)
    rounds: int = ranged(5, least=1)  # of each measurement, after one that is thrown away
    seconds: float = ranged(1.5, above=0)  # each contestant runs per round, at least
    peers: bool = True  # also time transformers, trl and llama-cpp-python if installed
    only: str = ""  # only contestants whose name contains one of these words, comma between
    checkpoint: str | None = None  # decode: a model's folder or file instead of random weights
    threads: int = ranged(0, least=0)  # for everyone; 0: as many as PyTorch takes
    clock: Literal["wall", "cpu"] = "wall"  # cpu: processor time, for a busy machine and 1 thread
    quick: bool = False  # tiny sizes, one round: shows that everything runs, its times mean nothing


PARTS = ("check", "limits", "ops", "train", "rollout", "decode", "align")
#                          D  L  H KV  F    V  context: sizes that differ, none a multiple of 8
CHECKED = {"grouped heads": M.ModelConfig(36, 3, 6, 2, 53, 203, 64),
           "one kv head": M.ModelConfig(50, 2, 5, 1, 29, 67, 64),
           "smallest": M.ModelConfig(2, 1, 1, 1, 1, 3, 16),
           "deep product": M.ModelConfig(20, 1, 10, 10, 801, 67, 64)}
# Largest error as a share of the largest number. float32 sums of a thousand products lie at 1e-6;
# a bfloat16 factor is off by up to 2^-9 = 0.2%, and one block takes the next one's errors in.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03}
DECODER_TOLERANCE = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.03, "int4": 0.2}  # of its logits

# ---------------------------------------------------------------------------------------- check


def error(ours: list, exact: list) -> float:
    """Largest difference, as a share of the largest number of its tensor.

    Where that is nearly 0 against the other tensors (dq, with a single key), theirs is taken.
    """
    largest = [tensor.abs().max().item() for tensor in exact]
    floor = 1e-3 * max(largest)
    shares = []
    for our_tensor, exact_tensor, size in zip(ours, exact, largest, strict=True):
        difference = (our_tensor.double() - exact_tensor).abs().max()
        shares.append(difference / max(size, floor))
    return torch.stack(shares).max().item()  # nan if one is nan, which max(shares) may miss


def errors_of_all_ops() -> dict[str, list[float]]:
    """Of each kernel, by its name, the error at each of the CHECKED sizes."""
    found: dict[str, list[float]] = {}
    for size, config in CHECKED.items():
        T = 7 if size == "smallest" else 37
        name = ""
        for op in ops.all_ops(config, B=3, T=T):
            if op.is_part:
                whole = name.split(",")[0]
                name = f"{whole}, {op.name.strip()}"
            else:
                name = op.name
            found.setdefault(name, []).append(error(op.ours(1), op.exact()))
    return found


def check() -> int:
    """Every kernel against float64 at odd sizes, in both libraries; returns how many are wrong."""
    sizes = "".join(f"{size:>15}" for size in CHECKED)
    print("\ncheck: largest error against float64, as a share of the largest number")
    print(f"{'':<32}{sizes}{'at most':>9}")
    wrong = 0
    for products, limit in TOLERANCE.items():
        native.use(products)
        print(f"{products} products")
        for name, errors in errors_of_all_ops().items():
            is_right = all(e < limit for e in errors)
            columns = "".join(f"{e:>15.1e}" for e in errors)
            print(f"  {name:<30}{columns}{limit:>9g}{verdict(is_right)}")
            if not is_right:
                wrong += 1
    native.use("float32")
    return wrong + check_generation() + check_decoder()


def verdict(is_right: bool) -> str:
    return "" if is_right else "   WRONG"


SPEAKER = M.ModelConfig(48, 2, 6, 3, 75, 211, 300)
LONG_PROMPT = list(range(30))


def check_generation() -> int:
    """Greedy answers of both generators against model.py; returns how many differ."""
    net = ops.network(SPEAKER, gain=6.0)
    prompts = [[5, 3, 8], LONG_PROMPT, [210] * 8]
    expected, exact = M.rollout(ops.in_float64(net), prompts, 250, temperature=0.0)

    tokens, logprobs = native.rollout(net, prompts, 250, 0.0, 1.0, 0, None, None)
    differences = []
    for our_row, exact_row in zip(logprobs, exact):
        differences += [abs(a - b) for a, b in zip(our_row, exact_row)]
    is_near = all(difference < 1e-3 for difference in differences)
    is_rollout_right = tokens == expected and is_near
    count = sum(len(row) for row in tokens)
    say_generated(f"rollout of 3 rows, {count} greedy tokens", is_rollout_right)

    decoded = list(Decoder.of(net, "fp32").stream(prompts[0], 250, temperature=0.0))
    is_decoder_right = decoded == expected[0]
    say_generated(f"decoding in fp32, {len(expected[0])} greedy tokens", is_decoder_right)
    return [is_rollout_right, is_decoder_right].count(False)


def say_generated(what: str, is_right: bool) -> None:
    print(f"{what:<42}{'as in float64' if is_right else 'NOT as in float64'}{verdict(is_right)}")


def check_decoder() -> int:
    """Logits in every format against float64; returns how many formats are wrong."""
    net = ops.network(SPEAKER)  # calm: rounding a weight does not turn the answer over
    exact = ops.in_float64(net)(torch.tensor([LONG_PROMPT]))[0]
    wrong = 0
    for dtype, limit in DECODER_TOLERANCE.items():
        e = error([Decoder.of(net, dtype).logits(LONG_PROMPT)], [exact])
        is_right = e < limit
        print(f"{f'decoding in {dtype}, 30 logits':<32}{e:>15.1e}{limit:>54g}{verdict(is_right)}")
        if not is_right:
            wrong += 1
    return wrong


# ---------------------------------------------------------------------------------- measuring


def rate(function, amount: float, seconds: float, clock=time.perf_counter) -> float:
    """amount per second of function(repeat), repeated until that takes `seconds`, once."""
    repeat = 1
    while True:
        start = clock()
        function(repeat)
        spent = clock() - start
        if spent >= seconds:
            return repeat * amount / spent
        growth = min(1.3 * seconds / max(spent, 1e-9), 100)
        repeat = max(repeat + 1, int(repeat * growth))


def rates(functions: list, amounts: list[float], cfg: Config) -> list[float]:
    """The median rate of each, over interleaved rounds: a b c a b c ..."""
    seconds = 0.001 if cfg.quick else cfg.seconds / 30
    rounds = 1 if cfg.quick else cfg.rounds
    clock = CLOCKS[cfg.clock]
    found = []
    for _ in range(rounds + 1):
        found.append([rate(f, amount, seconds, clock) for f, amount in zip(functions, amounts)])
    counted = found[1:]  # the first round is thrown away
    return [statistics.median(column) for column in zip(*counted)]


# --------------------------------------------------------------------------------------- limits


@dataclass
class Limits:
    """What this machine can do with all its cores at once."""

    multiply_add: float  # FLOP/s in registers
    product: float  # FLOP/s of our matrix product on a shape that fits its caches and tiles
    torch_float32: float  # FLOP/s of PyTorch's matrix product, 1024 x 1024 x 1024
    torch_bfloat16: float
    read: dict[str, float]  # bytes/s by place
    copy: dict[str, float]  # bytes/s, read and written, by place


PLACES = {"first-level cache": 1 << 14, "second-level cache": 1 << 18, "third-level cache": 1 << 22,
          "memory": 1 << 28}  # bytes per core; the cache that holds them, on most machines


def measure_limits(cfg: Config) -> Limits:
    """Measures and prints them; a few seconds."""
    n = torch.get_num_threads()
    square = 64 if cfg.quick else 1024
    arithmetic = measure_arithmetic(n, square, cfg)
    read = {}
    copy = {}
    for place, size in PLACES.items():
        if cfg.quick:
            size = min(size, 1 << 18)
        read[place], copy[place] = measure_moving(n, size, cfg)
    limits = Limits(*arithmetic, read, copy)

    print(f"\nlimits of {n} cores, measured now")
    for name, value in (("multiply-adds in registers", limits.multiply_add),
                        ("our product, 240 x 384 x 384 per core", limits.product),
                        (f"PyTorch's product, {square}^3, float32", limits.torch_float32),
                        (f"PyTorch's product, {square}^3, bfloat16", limits.torch_bfloat16)):
        print(f"  {name:<44}{value / 1e9:>8.0f} GFLOP/s{value / limits.multiply_add:>7.0%}")
    for place, size in PLACES.items():
        name = f"{place}, {size >> 10:,} KiB per core"
        print(f"  {name:<44}{read[place] / 1e9:>8.0f} GB/s read, {copy[place] / 1e9:.0f} copied")
    return limits


def measure_arithmetic(n: int, square: int, cfg: Config) -> list[float]:
    """FLOP/s, the first four of Limits: n cores, PyTorch's products of (square, square)."""
    per_round = ops.call("bench_multiply_add", 1, torch.zeros(1024))  # operations
    add = ops.in_cores([ops.runner("bench_multiply_add", torch.zeros(1024)) for _ in range(n)])
    tiles = [ops.product("", 0, 240, 384, 384, torch.Generator()) for _ in range(n)]
    x32 = torch.randn(square, square)
    x16 = torch.randn(square, square).bfloat16()
    functions = [lambda repeat: add(1000 * repeat),
                 ops.in_cores([tile.ours for tile in tiles]),
                 ops.repeated(lambda: x32 @ x32),
                 ops.repeated(lambda: x16 @ x16)]
    amounts = [1000 * n * per_round, n * tiles[0].flops, 2 * square**3, 2 * square**3]
    return rates(functions, amounts, cfg)


def measure_moving(n: int, size: int, cfg: Config) -> list[float]:
    """bytes/s (read, copied) of n cores, `size` bytes in each."""
    readers = []
    copiers = []
    for _ in range(n):
        buffer = torch.zeros(size // 4)
        sums = torch.zeros(1024)
        half = buffer.numel() // 2
        readers.append(ops.runner("bench_read", buffer.numel(), buffer, sums))
        copiers.append(ops.runner("bench_copy", half, buffer, buffer[half:]))
    return rates([ops.in_cores(readers), ops.in_cores(copiers)], [n * size, n * size], cfg)


def products_of(sizes: list[str], limits: Limits, cfg: Config) -> None:
    """The widest product of each model (gate and up): ours in every core, PyTorch's on all rows."""
    n = torch.get_num_threads()
    for shape in sizes:
        config, B = tasks.SHAPES[shape]
        T = config.max_seq_len
        K = config.dim
        N = 2 * config.hidden_dim
        alone = [ops.product("", 0, T, N, K, torch.Generator()) for _ in range(n)]
        functions = [ops.in_cores([op.ours for op in alone])]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(B * T, K).to(dtype)
            w = torch.randn(K, N).to(dtype)
            functions.append(ops.repeated(lambda x=x, w=w: x @ w))
        flops = alone[0].flops
        speeds = rates(functions, [n * flops, B * flops, B * flops], cfg)
        texts = []
        for name, speed in zip(("ours", "PyTorch float32", "bfloat16"), speeds):
            texts.append(f"{name} {speed / 1e9:.0f} ({speed / limits.multiply_add:.0%})")
        print(f"  {f'{shape}, {B * T} x {N} x {K}, GFLOP/s':<44}{', '.join(texts)}")


# ------------------------------------------------------------------------------------ op table


def op_table(shape: str, limits: Limits, cfg: Config) -> None:
    """Each kernel beside its limit and beside PyTorch, at one model's sizes."""
    config, B = tasks.SHAPES[shape]
    T = config.max_seq_len
    n = torch.get_num_threads()
    print(f"\nops at {shape}: {B} sequences of {T} tokens, {n} cores; us per sequence and core")
    print(f"{'':<28}{'sizes':<24}{'ours':>9}{'rate':>14}{'limit':>7}{'share':>7}"
          f"{'PyTorch':>10}{'ratio':>7}")
    copies = [ops.all_ops(config, B, T) for _ in range(n)]
    for same in zip(*copies):  # one Op per core, each with numbers of its own
        op = same[0]
        if op.rows == 1:
            ours = ops.in_cores([o.ours for o in same])
            sequences = n  # per call
        else:
            ours = op.ours
            sequences = op.rows
        speed, plain = rates([ours, ops.repeated(op.peer(B))], [sequences, B], cfg)
        if op.flops:
            done = op.flops
            unit = "GFLOP/s"
            limit = limits.multiply_add
        else:
            done = op.bytes
            unit = "GB/s"
            limit = copy_limit(op.bytes, limits)
        reached = speed / op.rows * done
        print(f"{op.name:<28}{op.sizes:<24}{1e6 * n / speed:>9.1f}{reached / 1e9:>7.0f} {unit:<7}"
              f"{limit / 1e9:>6.0f}{reached / limit:>7.0%}{1e6 * n / plain:>10.1f}"
              f"{speed / plain:>6.1f}x")


def copy_limit(size: float, limits: Limits) -> float:
    """bytes/s of a plain copy of as many bytes, from the first place where they fit."""
    for place, room in PLACES.items():
        if size <= room:
            return limits.copy[place]
    return limits.copy["memory"]


# ---------------------------------------------------------------------------------------- main


def busy() -> str:
    """How much else the machine does, in words."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    warning = ": BUSY, times mean little" if load > 0.5 else ""
    return f"load {load:.2f}{warning}"


def processor() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def chosen(cfg: Config) -> tuple[list[str], list[str]]:
    """(parts, shapes) as given; ValueError for one that does not exist, and for other bad flags."""
    stage.check(cfg)
    if cfg.clock == "cpu" and cfg.threads != 1:
        raise ValueError("--clock cpu adds up the time of all threads: give --threads 1 with it")
    parts = names_in("--parts", cfg.parts, PARTS)
    shapes = names_in("--shapes", cfg.shapes, (*tasks.SHAPES, *M.PRESETS))
    return parts, shapes


def names_in(flag: str, text: str, there: tuple[str, ...]) -> list[str]:
    """The names in a flag's text, comma between; ValueError if there is none or one is unknown."""
    names = [name for name in text.split(",") if name]
    is_known = all(name in there for name in names)
    if not names or not is_known:
        raise ValueError(f"{flag} {text}: choose of {', '.join(there)}")
    return names


def main(cfg: Config) -> None:
    """Run the chosen parts; SystemExit(1) if a kernel is wrong."""
    parts, shapes = chosen(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    sizes = ["tiny test"] if cfg.quick else [s for s in shapes if s in tasks.SHAPES]
    command = shlex.join(["-m", "bench", *sys.argv[1:]])
    clock = "processor time" if cfg.clock == "cpu" else busy()
    print(f"repeat: python {command}")
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {clock}")
    line = kernels.choose("auto")
    print(line)
    is_compiled = line.startswith("kernels: C")
    if not is_compiled and {"check", "limits", "ops"} & set(parts):
        print("check, limits and ops are left out: they need the C kernels")

    wrong = 0
    if is_compiled and "check" in parts:
        wrong = check()
    kernels.choose("auto")  # the check has tried both libraries
    native.return_threads()  # here PyTorch has work to do

    if is_compiled and ("limits" in parts or "ops" in parts):
        limits = measure_limits(cfg)
        products_of(sizes, limits, cfg)
        if "ops" in parts:
            for shape in sizes:
                op_table(shape, limits, cfg)

    tasks.tables([part for part in parts if part in tasks.TASKS], sizes, shapes, cfg)
    kernels.choose("torch")
    if wrong:
        print(f"{wrong} kernels are WRONG", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.argv[0] = "python -m bench"
    stage.run(main, Config)
