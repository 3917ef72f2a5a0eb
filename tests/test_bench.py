"""python -m bench: what it checks, what it prints, how it referees; never how fast."""
import itertools
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
import kernels
import model as M
from bench import contestants, ops, tasks
from bench.referee import CLOCKS, Entry, Finished, Job, Referee, Result, contest, show
from kernels import build, native

try:
    for products in build.PRODUCTS:
        build.load_library(products)
        build.load_library(products, ops.SOURCES)
    COMPILED = ""
except OSError as e:
    COMPILED = str(e)
needs_c = pytest.mark.skipif(bool(COMPILED), reason=COMPILED)

QUICK = dict(quick=True, peers=False)
TINY, ROWS = tasks.SHAPES["tiny test"]
JOB = Job(TINY, ROWS, prompt=8, new=5, threads=1, seconds=0.01, folder="")


@pytest.fixture(autouse=True)
def back_to_torch():
    yield
    kernels.choose("torch")


# ------------------------------------------------------------------------------------- check


@needs_c
def test_every_kernel_is_checked_and_right(capsys):
    bench.main(bench.Config(parts="check", **QUICK))
    out = capsys.readouterr().out
    assert "WRONG" not in out
    for name in ("product gate up, gradient of w", "rmsnorm, backward", "rope", "swiglu, backward",
                 "attention, backward", "head, forward and backward",
                 "trunk, forward and backward"):
        assert out.count(f"\n  {name} ") == 2, name  # float32 and bfloat16 products
    for name in ("rollout", "decoding in fp32", "decoding in int4"):
        assert f"\n{name}" in out, name


@needs_c
def test_a_kernel_that_is_off_by_a_ten_thousandth_is_found(monkeypatch, capsys):
    right, sizes = native.token_logprobs, bench.CHECKED
    monkeypatch.setattr(bench, "CHECKED", {"smallest": sizes["smallest"]})
    monkeypatch.setattr(native, "token_logprobs", lambda *given: right(*given) * 1.0001)
    with pytest.raises(SystemExit) as end:
        bench.main(bench.Config(parts="check", **QUICK))
    out, err = capsys.readouterr()
    assert end.value.code == 1 and err == "2 kernels are WRONG\n"
    wrong = [line[:30].strip() for line in out.splitlines() if "WRONG" in line]
    assert wrong == ["head", "head, forward and backward"]


def test_an_error_is_a_share_of_its_tensors_largest_number():
    """0.5 of 10 is 5%; where a tensor is 0 beside its sister of 10, 0.01 counts as one."""
    ten, zero = torch.tensor([10.0, 1.0]).double(), torch.zeros(2).double()
    assert bench.error([ten - 0.5], [ten]) == pytest.approx(0.05)
    assert bench.error([ten, zero + 1e-4], [ten, zero]) == pytest.approx(0.01)


@pytest.mark.parametrize("place", [0, 1])
def test_a_number_that_is_not_finite_is_wrong(place):
    """In the first tensor and in one behind it: Python's max forgets a nan that is not first."""
    exact = [torch.ones(2).double(), torch.ones(2).double()]
    ours = [torch.ones(2), torch.ones(2)]
    ours[place][0] = float("nan")
    assert not bench.error(ours, exact) < bench.TOLERANCE["bfloat16"]


# ------------------------------------------------------------------------------ limits and ops


@needs_c
def test_each_kernel_stands_beside_a_limit_and_pytorch(capsys):
    bench.main(bench.Config(parts="limits,ops", **QUICK))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("repeat: python -m bench")
    assert any("multiply-adds in registers" in line and line.endswith("100%") for line in lines)
    assert sum("GB/s read" in line for line in lines) == len(bench.PLACES)
    table = [line for line in lines if line.endswith("x") and "/s" in line]
    assert len(table) == len(ops.all_ops(TINY, ROWS, TINY.max_seq_len))
    assert sum("GB/s" in line for line in table) == 5  # norm, rope and swiglu only move numbers


def test_the_rate_is_the_work_over_the_time_of_all_repetitions():
    """A function of 0.25 s by a clock of our own, asked for a second: 3 units per 0.25 s = 12."""
    now = [0.0]

    def work(repeat):
        now[0] += 0.25 * repeat

    assert bench.rate(work, 3, 1.0, clock=lambda: now[0]) == pytest.approx(12)


# --------------------------------------------------------------------------------- whole tasks


def our_entries() -> list:
    """(task, entry) of each of ours, but of the path that is "ours, C" on many machines."""
    found = []
    for task in itertools.chain.from_iterable(tasks.TASKS.values()):
        for entry in task.entries:
            if entry.name.startswith("ours") and entry.name != "ours, C float32":
                name = f"{task.name}, {entry.name}"
                found.append(pytest.param(task.name, entry, id=name))
    return found


@pytest.mark.parametrize("task, entry", our_entries())
def test_our_contestants_work_and_say_how_much(task, entry):
    """tokens of a step 2 x 32; answers of 5 tokens, 2 at once or 1; a pair; an iteration."""
    if COMPILED and "C" in entry.name:
        pytest.skip(COMPILED)
    done = []

    def tick(amount):
        done.append(amount)
        if len(done) == 2:
            raise Finished

    rows = 1 if task == "decoding" else ROWS
    with pytest.raises(Finished):
        entry.function(tick, replace(JOB, rows=rows, **entry.options))
    assert done == 2 * [{"training step": 64, "rollouts": 10, "decoding": 5,
                         "supervised fine-tuning": 64, "reward model": 1, "PPO": 1}[task]]


class Pipe:
    """What the other end says, in order, and what was sent to it."""

    def __init__(self, *says):
        self.says, self.sent = list(says), []

    def recv(self):
        return self.says.pop(0)

    def send(self, message):
        self.sent.append(message)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_the_referee_counts_what_is_done_while_it_is_its_turn(clock, monkeypatch):
    """Set-up takes 3 s. A round lasts at least 2 s: three pieces of 7 in 0.9 s each, 21 / 2.7 s."""
    now = [0.0]
    monkeypatch.setitem(CLOCKS, clock, lambda: now[0])
    pipe = Pipe("go", "stop")
    referee = Referee(pipe, 2.0, clock)
    now[0] += 3
    referee.tick(7)
    with pytest.raises(Finished):
        for _ in range(9):
            now[0] += 0.9
            referee.tick(7)
    assert pipe.sent == [("ready", 3.0), ("rate", pytest.approx(21 / 2.7))]


def works(tick, job):
    while True:
        time.sleep(0.001)
        tick(1)


def breaks(tick, job):
    tick(1)
    raise ValueError("no such thing\nand much more")


def test_a_contest_has_all_rounds_of_who_works_and_one_line_of_who_breaks(capsys):
    entries = [Entry("steady", None, works, {}), Entry("broken", None, breaks, {})]
    steady, broken = contest(entries, JOB, rounds=2)
    assert len(steady.rates) == 2 and min(steady.rates) > 0 and not steady.note
    assert steady.peak > 10 or not Path("/proc/self/status").exists()  # MiB
    assert broken.rates == [] and broken.note == "ValueError: no such thing"
    show("who", "things/s", [steady, broken])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["broken", "ValueError:", "no",
                                                                "such", "thing"]


def test_ratios_are_taken_round_by_round_against_the_counterpart(capsys):
    """300 and 800 against 100 and 400: 3 and 2, though the medians' ratio would be 2.2."""
    show("who", "tokens/s", [
        Result("ours int4", [9.0, 9.0]), Result("ours int8", [300.0, 800.0]),
        Result("theirs", [100.0, 400.0], against="ours int8")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert "250 (100-400)" in line and "2.50x (2.00-3.00)" in line


@pytest.mark.parametrize("path, flops", [("c", 2 * 240 * 384 * 384), ("torch", 2 * 1024**3)])
def test_the_limit_of_a_step_is_as_many_operations_in_products_alone(path, flops, monkeypatch):
    """16 products a piece, on each of 2 threads in C; as tokens of a step."""
    if COMPILED and path == "c":
        pytest.skip(COMPILED)
    monkeypatch.setattr(ops, "repeated", lambda function: lambda repeat: function())
    done = ticks(contestants.product_alone, replace(JOB, path=path, threads=2))
    cores = 2 if path == "c" else 1
    assert done == [pytest.approx(16 * cores * flops / contestants.flops_per_token(TINY))]


@needs_c
@pytest.mark.parametrize("threads", [1, 2])
def test_the_limit_of_decoding_reads_as_many_bytes_as_the_weights_have(threads, monkeypatch):
    """Per token once, in parts that together are the size, up to 1024 numbers a thread more."""
    read, call = [], ops.call
    monkeypatch.setattr(ops, "call", lambda *given: read.append(given) or call(*given))
    job = replace(JOB, threads=threads, dtype="int8", config=M.PRESETS["110m"])
    assert ticks(contestants.reading_alone, job) == [5]
    assert {(name, repeat) for name, repeat, *_ in read} == {("bench_read", 5)}
    more = sum(4 * given[2] for given in read) - contestants.bytes_per_token(job.config, "int8")
    assert 0 <= more < 4 * 1024 * threads


def ticks(function, job) -> list:
    """What a contestant says of its first piece of work."""
    done = []

    def tick(amount):
        done.append(amount)
        raise Finished

    with pytest.raises(Finished):
        function(tick, job)
    return done


@pytest.mark.parametrize("dtype, size", [("fp32", 4 * 7168 + 4 * 3200), ("bf16", 2 * 10368),
                                         ("int8", 10368 * 34 / 32),
                                         ("int4", 7168 * 18 / 32 + 3200 * 34 / 32)])
def test_a_token_reads_all_weights_but_the_embeddings(dtype, size):
    """Blocks 4 x 32 x 32 + 3 x 32 x 32 = 7168, head 100 x 32; the 96 numbers of norms count too."""
    config = replace(TINY, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=32, vocab_size=100)
    assert size < contestants.bytes_per_token(config, dtype) <= size + 4 * 96


def test_a_token_of_t1_costs_six_million_operations():
    """6 (4 (128 x 256 + 128 x 128 + 3 x 128 x 352) + 128 x 1024) + 6 x 4 x 128 x 256 = 5,996,544"""
    assert contestants.flops_per_token(tasks.SHAPES["T1"][0]) == 5_996_544


def test_the_share_of_a_limit_is_taken_round_by_round(capsys):
    """1 of 2, 3 of 4, 6 of 8: 75%. And a limit of int4's is not one of int8's."""
    config, rows = tasks.SHAPES["T1"]
    tasks.show_limits([Result("ours, C", [1000.0, 3000.0, 6000.0]),
                       Result("limit: theirs", [2000.0, 4000.0, 8000.0])],
                      replace(JOB, config=config))
    assert capsys.readouterr().out == ("ours, C: 6.00 MFLOP per token, 18 GFLOP/s; 75% of "
                                       "theirs\n")
    tasks.show_limits([Result("ours, C int4", [100.0]), Result("ours, C int8", [90.0]),
                       Result("limit: reading int4", [125.0], against="ours, C int4")],
                      replace(JOB, config=M.PRESETS["15m"]))
    assert capsys.readouterr().out == ("ours, C int4: 13 MiB of weights per token, 1.3 GB/s; 80% "
                                       "of reading int4\n")


def test_what_is_not_installed_is_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(tasks, "contest", lambda entries, *given: [
        Result(entry.name, [1.0]) for entry in entries])
    bench.main(bench.Config(parts="align", quick=True))
    out = capsys.readouterr().out
    assert "trl SFTTrainer" not in out and "ours, PyTorch" in out
    assert out.splitlines()[-1].startswith("not installed, so not in the tables: trl (pip install")


@pytest.mark.parametrize("flags, what", [
    (dict(parts="chek"), "choose of check, limits"), (dict(shapes="T9"), "choose of T1, T2"),
    (dict(rounds=0), "--rounds 0: give a number at least 1"), (dict(parts=""), "choose of check"),
    (dict(seconds=0.0), "--seconds 0.0: give a number above 0"),
    (dict(clock="cpu"), "give --threads 1")])
def test_what_cannot_be_done_is_one_line(flags, what):
    with pytest.raises(ValueError, match=what) as e:
        bench.main(bench.Config(**flags))
    assert "\n" not in str(e.value)


def test_the_command_names_itself_and_exits_with_2():
    done = subprocess.run([sys.executable, "-m", "bench", "--part", "check"], text=True,
                          capture_output=True, cwd=Path(bench.__file__).parent.parent)
    assert done.returncode == 2
    assert done.stderr == "python -m bench: unknown argument --part: did you mean --parts?\n"
