"""The referee: lets contestants work in turn, times them, and prints what each one reached.

A contestant is a function in a process of its own. It sets itself up, then works for ever and
calls `tick(amount)` after each piece of work; the referee in that process stops it there until it
is its turn again. Rounds go a b c a b c ..., so that whatever else the machine does falls on all,
and ratios are taken round by round.

    this process                       a contestant's process
    start          ------------------> set-up, first piece of work
    receive        <-- ready, seconds  tick: wait
    "go"           ------------------> pieces of work, for `seconds` at least
    receive        <-- rate            tick: wait
    ...
    "stop"         ------------------> tick: raise Finished
    receive        <-- memory          the end
"""

from __future__ import annotations

import contextlib, math, multiprocessing, os, statistics, time
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
    rows: int  # B: sequences per step, or responses at once
    prompt: int  # tokens of a prompt
    new: int  # tokens of a response
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
    function: Callable  # (tick, job)
    options: dict  # fields of the Job that are its own
    against: str = ""  # which of ours it is compared with; the table's first if empty


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


class Finished(Exception):
    """The referee has seen enough."""


# ------------------------------------------------------------------------ in its own process


class Referee:
    """Lives in the contestant's process: lets it work while it is its turn, and times it."""

    def __init__(self, pipe, seconds: float, clock: str = "wall"):
        self.pipe = pipe
        self.seconds = seconds
        self.clock = CLOCKS[clock]
        self.born = self.clock()
        self.began = None  # when this round did; None during set-up
        self.done = 0.0  # amount of work since then
        self.own = 0.0  # MiB, as in Result

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
        self.own = max(self.own, process_memory("RssAnon"))
        if self.pipe.recv() != "go":
            raise Finished
        self.began = self.clock()
        self.done = 0.0


def contestant(pipe, function, job: Job) -> None:
    """Main function of a contestant's process. What it prints is thrown away."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    torch.set_num_threads(job.threads)
    referee = Referee(pipe, job.seconds, job.clock)
    try:
        function(referee.tick, job)
    except Finished:
        pipe.send(("memory", (process_memory("VmHWM"), referee.own)))
    except Exception as e:  # whatever a peer raises is one line of the table
        lines = str(e).strip().splitlines() or [""]
        pipe.send(("failed", f"{type(e).__name__}: {lines[0]}"[:120]))


def process_memory(name: str) -> float:
    """A line of this process's status, in MiB; nan where the system has none.

    Not getrusage: its figure is inherited from the parent when a process starts.
    """
    path = Path("/proc/self/status")
    if not path.exists():
        return math.nan
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            kibibytes = int(line.split()[1])
            return kibibytes / 1024
    return math.nan


# ------------------------------------------------------------------------------- the contest


def contest(entries: list[Entry], job: Job, rounds: int) -> list[Result]:
    """Let all set up, one after another, then work in turn; one Result each."""
    results = [Result(entry.name, [], entry.against) for entry in entries]
    running = []  # (process, pipe) of each
    patience = GIVE_UP if job.clock == "wall" else 20 * GIVE_UP  # a busy machine lets it wait
    try:
        for entry, result in zip(entries, results):
            process, pipe = start(entry, job)
            running.append((process, pipe))
            result.setup = receive(pipe, result, patience)
        for number in range(rounds + 1):
            for (_, pipe), result in zip(running, results):
                if result.note:
                    continue
                began = time.perf_counter()
                pipe.send("go")
                rate = receive(pipe, result, patience)
                spent = time.perf_counter() - began
                is_slow = job.clock == "wall" and spent > TOO_SLOW
                is_counted = number > 0 or is_slow  # the first round is thrown away
                has_failed = result.note != ""
                if is_counted and not has_failed:
                    result.rates.append(rate)
                if is_slow and not has_failed:
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
    own_job = replace(job, **entry.options)
    process = context.Process(target=contestant, args=(there, entry.function, own_job))
    with environment(OMP_NUM_THREADS=str(job.threads),
                     HF_HUB_OFFLINE="1",
                     TRL_EXPERIMENTAL_SILENCE="1",
                     TORCHINDUCTOR_CACHE_DIR=f"{job.folder}/inductor"):
        process.start()
    there.close()
    return process, here


def receive(pipe, result: Result, seconds: float):
    """What a contestant sends; 0 and a note if it failed or takes too long."""
    kind = "failed"
    value = f"nothing in {seconds} s"
    try:
        if pipe.poll(seconds):
            kind, value = pipe.recv()
    except EOFError:
        value = "its process died"
    if kind == "failed":
        result.note = value
        return 0.0
    return value


def end(process, pipe, result: Result) -> None:
    """Stop a contestant and ask for its peak memory."""
    with contextlib.suppress(BrokenPipeError, OSError):
        pipe.send("stop")
        if result.rates:
            found = receive(pipe, Result("", []), 30)
            if isinstance(found, tuple):  # neither a failure nor a rate that comes too late
                result.peak, result.own = found
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
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


# --------------------------------------------------------------------------------- the table


def spread(values: list[float], form: str) -> tuple[str, str]:
    """(median, "(least-most)")."""
    middle = format(statistics.median(values), form)
    least = format(min(values), form)
    most = format(max(values), form)
    return middle, f"({least}-{most})"


def times_faster(ours: Result, theirs: Result) -> list[float]:
    """Ours by theirs, round by round; of the medians where one has fewer rounds."""
    if len(ours.rates) == len(theirs.rates):
        return [a / b for a, b in zip(ours.rates, theirs.rates)]
    return [statistics.median(ours.rates) / statistics.median(theirs.rates)]


def show(title: str, unit: str, results: list[Result]) -> None:
    """One table: rates, and how many times faster ours is, round by round."""
    print(f"\n{title}")
    print(f"{'':<32}{unit:>13} {'(least-most)':<20}{'ours is':>8} {'(least-most)':<14}"
          f"{'peak MiB':>9}{'no file':>9}{'start s':>9}")
    by_name = {result.name: result for result in results}
    for result in results:
        if not result.rates:
            print(f"{result.name:<32}  {result.note}")
            continue
        form = ",.0f" if max(result.rates) >= 100 else ".3g"
        middle, width = spread(result.rates, form)
        ours = by_name.get(result.against, results[0])
        ratio = ""
        ratio_width = ""
        if result is not results[0] and result is not ours and ours.rates:
            ratio, ratio_width = spread(times_faster(ours, result), ".2f")
            ratio += "x"
        print(f"{result.name:<32}{middle:>13} {width:<20}{ratio:>8} {ratio_width:<14}"
              f"{result.peak:>9,.0f}{result.own:>9,.0f}{result.setup:>9.1f}  {result.note}")
