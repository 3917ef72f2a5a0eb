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

# ---------------------------------------------------------------------------------------- check


def error(ours: list, exact: list) -> float:
    """Largest difference, as a share of the largest number of its tensor.

    Where that is nearly 0 against the other tensors (dq, with a single key), theirs is taken.
    """
    floor = 1e-3 * max(e.abs().max().item() for e in exact)
    return max(((o.double() - e).abs().max() / max(e.abs().max().item(), floor)).item()
               for o, e in zip(ours, exact, strict=True))


def check() -> int:
    """Every kernel against float64 at odd sizes, in both libraries; returns how many are wrong."""
    print(f"\ncheck: largest error against float64, as a share of the largest number\n{'':<32}"
          + "".join(f"{size:>15}" for size in CHECKED) + f"{'at most':>9}")
    wrong = 0
    for products, limit in TOLERANCE.items():
        native.use(products)
        print(f"{products} products")
        found: dict[str, list[float]] = {}
        for size, config in CHECKED.items():
            name = ""
            for op in ops.all_ops(config, B=3, T=7 if size == "smallest" else 37):
                part = op.name[0] == " "  # of the line above
                name = f"{name.split(',')[0]},{op.name[1:]}" if part else op.name
                found.setdefault(name, []).append(error(op.ours(1), op.exact()))
        for name, errors in found.items():
            bad = not all(e < limit for e in errors)
            wrong += bad
            print(f"  {name:<30}" + "".join(f"{e:>15.1e}" for e in errors)
                  + f"{limit:>9g}{'   WRONG' * bad}")
    native.use("float32")
    return wrong + check_generation()


def check_generation() -> int:
    """Greedy answers of both generators against model.py; returns how many differ."""
    net = ops.network(M.ModelConfig(48, 2, 6, 3, 75, 211, 300), gain=6.0)
    prompts, twin = [[5, 3, 8], list(range(30)), [210] * 8], ops.in_float64(net)
    expected, exact = M.rollout(twin, prompts, 250, temperature=0.0)
    tokens, logps = native.rollout(net, prompts, 250, 0.0, 1.0, 0, None, None)
    off = max(abs(a - b) for x, y in zip(logps, exact) for a, b in zip(x, y))
    same = [tokens == expected and off < 1e-3,
            list(Decoder.of(net, "fp32").stream(prompts[0], 250, temperature=0.0)) == expected[0]]
    for name, right in zip((f"rollout of 3 rows, {sum(map(len, tokens))} greedy tokens",
                            f"decoding in fp32, {len(expected[0])} greedy tokens"), same):
        print(f"{name:<42}{'as in float64' if right else 'NOT as in float64   WRONG'}")
    calm = ops.network(net.config)  # where rounding a weight does not turn the answer over
    exact = ops.in_float64(calm)(torch.tensor([prompts[1]]))[0]
    for dtype, limit in (("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.03), ("int4", 0.2)):
        e = error([Decoder.of(calm, dtype).logits(prompts[1])], [exact])
        same.append(e < limit)
        print(f"{f'decoding in {dtype}, 30 logits':<32}{e:>15.1e}{limit:>54g}"
              + ("" if same[-1] else "   WRONG"))
    return same.count(False)


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
        repeat = max(repeat + 1, int(repeat * min(1.3 * seconds / max(spent, 1e-9), 100)))


def rates(functions: list, amounts: list[float], cfg: Config) -> list[float]:
    """The median rate of each, over interleaved rounds: a b c a b c ..."""
    seconds, rounds = (0.001, 1) if cfg.quick else (cfg.seconds / 30, cfg.rounds)
    clock = CLOCKS[cfg.clock]
    found = [[rate(f, amount, seconds, clock) for f, amount in zip(functions, amounts)]
             for _ in range(rounds + 1)]
    return [statistics.median(column) for column in zip(*found[1:])]


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
    n, lib = torch.get_num_threads(), ops.library()
    out = [torch.zeros(1024) for _ in range(n)]
    per_round = lib.bench_multiply_add(1, out[0].data_ptr())  # operations
    adds = ops.in_cores([lambda r, o=o: ops.call("bench_multiply_add", 1000 * r, o)
                         for o in out])
    tiles = [ops.product("", 0, 240, 384, 384, torch.Generator()) for _ in range(n)]
    square = 64 if cfg.quick else 1024
    a = {kind: torch.randn(square, square).to(kind) for kind in (torch.float32, torch.bfloat16)}
    speeds = rates([adds, ops.in_cores([t.ours for t in tiles])]
                   + [ops.repeated(lambda x=x: x @ x) for x in a.values()],
                   [1000 * n * per_round, n * tiles[0].flops] + 2 * [2 * square**3], cfg)
    read, copy = {}, {}
    for place, size in PLACES.items():
        size = min(size, 1 << 18) if cfg.quick else size
        buffers = [torch.zeros(size // 4) for _ in range(n)]
        reads = ops.in_cores([lambda r, b=b, o=o: ops.call("bench_read", r, b.numel(), b, o)
                              for b, o in zip(buffers, out)])
        copies = ops.in_cores([lambda r, b=b: ops.call("bench_copy", r, b.numel() // 2, b,
                                                       b[b.numel() // 2:]) for b in buffers])
        read[place], copy[place] = rates([reads, copies], [n * size, n * size], cfg)
    limits = Limits(*speeds, read, copy)
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


def products_of(sizes: list[str], limits: Limits, cfg: Config) -> None:
    """The widest product of each model (gate and up): ours in every core, PyTorch's on all rows."""
    for shape in sizes:
        (config, B), n = tasks.SHAPES[shape], torch.get_num_threads()
        T, K, N = config.max_seq_len, config.dim, 2 * config.hidden_dim
        alone = [ops.product("", 0, T, N, K, torch.Generator()) for _ in range(n)]
        pairs = [(torch.randn(B * T, K).to(kind), torch.randn(K, N).to(kind))
                 for kind in (torch.float32, torch.bfloat16)]
        speeds = rates([ops.in_cores([op.ours for op in alone])]
                       + [ops.repeated(lambda p=p: p[0] @ p[1]) for p in pairs],
                       [n * alone[0].flops] + 2 * [B * alone[0].flops], cfg)
        texts = [f"{name} {speed / 1e9:.0f} ({speed / limits.multiply_add:.0%})" for name, speed in
                 zip(("ours", "PyTorch float32", "bfloat16"), speeds)]
        print(f"  {f'{shape}, {B * T} x {N} x {K}, GFLOP/s':<44}{', '.join(texts)}")


# ------------------------------------------------------------------------------------ op table


def op_table(shape: str, limits: Limits, cfg: Config) -> None:
    """Each kernel beside its limit and beside PyTorch, at one model's sizes."""
    config, B = tasks.SHAPES[shape]
    T, n = config.max_seq_len, torch.get_num_threads()
    print(f"\nops at {shape}: {B} sequences of {T} tokens, {n} cores; us per sequence and core\n"
          f"{'':<28}{'sizes':<24}{'ours':>9}{'rate':>14}{'limit':>7}{'share':>7}"
          f"{'PyTorch':>10}{'ratio':>7}")
    copies = [ops.all_ops(config, B, T) for _ in range(n)]
    for same in zip(*copies):  # one Op per core, each with numbers of its own
        op, alone = same[0], same[0].rows == 1
        ours = ops.in_cores([o.ours for o in same]) if alone else op.ours
        runs = n if alone else 1  # of the Op per call
        speed, plain = rates([ours, ops.repeated(op.peer(B))], [runs * op.rows, B], cfg)
        if op.flops:
            done, unit, limit = op.flops, "GFLOP/s", limits.multiply_add
        else:  # a plain copy of as many bytes, from where they fit
            done, unit = op.bytes, "GB/s"
            limit = next((limits.copy[p] for p, size in PLACES.items() if size >= op.bytes),
                         limits.copy["memory"])
        reached = speed / op.rows * done
        print(f"{op.name:<28}{op.sizes:<24}{1e6 * n / speed:>9.1f}{reached / 1e9:>7.0f} {unit:<7}"
              f"{limit / 1e9:>6.0f}{reached / limit:>7.0%}{1e6 * n / plain:>10.1f}"
              f"{speed / plain:>6.1f}x")


# ---------------------------------------------------------------------------------------- main


def busy() -> str:
    """How much else the machine does, in words."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return f"load {load:.2f}" + (": BUSY, times mean little" if load > 0.5 else "")


def processor() -> str:
    """The processor's name as the system gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def chosen(cfg: Config) -> tuple[list[str], list[str]]:
    """(parts, shapes) as given; ValueError for one that does not exist, and for other bad flags."""
    stage.check(cfg)
    if cfg.clock == "cpu" and cfg.threads != 1:
        raise ValueError("--clock cpu adds up the time of all threads: give --threads 1 with it")
    given = []
    for flag, there in (("parts", PARTS), ("shapes", (*tasks.SHAPES, *M.PRESETS))):
        names = [name for name in getattr(cfg, flag).split(",") if name]
        unknown = [name for name in names if name not in there]
        if unknown or not names:
            raise ValueError(f"--{flag} {getattr(cfg, flag)}: choose of {', '.join(there)}")
        given.append(names)
    return tuple(given)


def main(cfg: Config) -> None:
    """Run the chosen parts; SystemExit(1) if a kernel is wrong."""
    parts, shapes = chosen(cfg)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    wants = set(parts)
    sizes = ["tiny test"] if cfg.quick else [s for s in shapes if s in tasks.SHAPES]
    print(f"repeat: python {shlex.join(['-m', 'bench', *sys.argv[1:]])}\n{processor()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"{'processor time' if cfg.clock == 'cpu' else busy()}")
    line = kernels.choose("auto")
    print(line)
    compiled = line.startswith("kernels: C")
    if not compiled and {"check", "limits", "ops"} & wants:
        print("check, limits and ops are left out: they need the C kernels")
    wrong = check() if compiled and "check" in parts else 0
    kernels.choose("auto")  # the check has tried both libraries
    native.return_threads()  # here PyTorch has work to do
    limits = None
    if compiled and {"limits", "ops"} & wants:
        limits = measure_limits(cfg)
        products_of(sizes, limits, cfg)
    for shape in sizes:
        if compiled and "ops" in parts:
            op_table(shape, limits, cfg)
    tasks.tables([p for p in parts if p in tasks.TASKS], sizes, shapes, cfg)
    kernels.choose("torch")
    if wrong:
        print(f"{wrong} kernels are WRONG", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.argv[0] = "python -m bench"
    stage.run(main, Config)
