"""The referee: lets contestants work in turn, times them, and prints what each one reached.

A contestant is a function in a process of its own. It sets itself up, then works for ever and
calls `tick(amount)` after each piece of work; the referee in that process stops it there until it
is its turn again. Rounds go a b c a b c ..., so that whatever else the machine does falls on all,
and ratios are taken round by round.
"""

from __future__ import annotations

import contextlib, multiprocessing, os, statistics, time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple

import torch

import model as M

TOO_SLOW = 20  # s: who needs longer for a round is measured once
GIVE_UP = 300  # s: who needs longer to set up is stopped
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
