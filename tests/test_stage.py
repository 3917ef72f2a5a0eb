"""What stage.py promises: flags from a Config, one line for what is wrong, logs, states, AdamW."""
import copy
import errno
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, Optional

import pytest
import torch

import bench.__main__
import chat
import convert
import exam
import gatt
import model as M
import paper
import plan
import ppo
import pretrain
import rejection
import reward
import scale
import sft
import stage
from stage import ranged
from test_model import EVIL_FILES, SMALL, error_of, full_disk, llama, write_evil_file

ROOT = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------- flags


@dataclass
class Config:
    max_steps: int = 5  # optimizer steps; 100% of them
    lr: float = 3e-4  # peak; paper: 3e-4 (Table 1)
    out: str = "out"  # folder
    data: str | None = None  # path; None: the tiny world
    limit: Optional[int] = None  # rows
    resume: bool = False  # continue
    shuffle: bool = True  # every epoch
    kernels: Literal["auto", "c", "torch"] = "auto"  # who computes
    grade: Literal[1, 2] = 1  # a choice of numbers


def test_cli_without_flags_is_the_default_config():
    assert stage.cli(Config, []) == Config()


def test_cli_reads_every_type():
    argv = ("--max-steps 7 --lr 1e-2 --out here --data x.txt --limit 3 --resume --no-shuffle "
            "--kernels c --grade 2").split()
    config = stage.cli(Config, argv)
    assert config == Config(7, 0.01, "here", "x.txt", 3, True, False, "c", 2)
    assert [type(getattr(config, f.name)) for f in fields(Config)] == [
        int, float, str, str, int, bool, bool, str, int]


def test_cli_reads_negative_numbers_and_equals_signs():
    assert stage.cli(Config, ["--lr", "-0.5", "--max-steps=9"]) == Config(max_steps=9, lr=-0.5)


def refused(argv, capsys) -> str:
    """The one line on stderr of a command line that is refused with exit code 2."""
    with pytest.raises(SystemExit) as e:
        stage.cli(Config, argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.count("\n") == 1 and err.endswith("\n")
    return err


@pytest.mark.parametrize("argv, words", [
    (["--max-step", "5"], "unknown argument --max-step: did you mean --max-steps?"),
    (["--shufle"], "unknown argument --shufle: did you mean --shuffle?"),
    (["--no-shufle"], "unknown argument --no-shufle: did you mean --no-shuffle?"),
    (["--max-stepz=5"], "unknown argument --max-stepz=5: did you mean --max-steps?"),
    (["--qqq"], "unknown argument --qqq: --help lists them all"),
    (["stray"], "unknown argument stray"),
    (["--max-steps", "many"], "--max-steps: invalid int value: 'many'"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--kernels", "rust"], "--kernels: invalid choice: 'rust'"),
    (["--max-steps"], "--max-steps: expected one argument"),
])
def test_cli_refuses_in_one_line_with_exit_code_2(argv, words, capsys):
    assert words in refused(argv, capsys)


def test_help_is_the_config_block_itself(capsys):
    """Flags, types, choices, comments (a percent sign too) and defaults; the module's docstring."""
    with pytest.raises(SystemExit) as e:
        stage.cli(Config, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0 and "What stage.py promises" in text
    for part in ("--max-steps INT", "optimizer steps; 100% of them (default: 5)", "--lr FLOAT",
                 "peak; paper: 3e-4 (Table 1) (default: 0.0003)", "--data STR",
                 "path; None: the tiny world --limit", "--limit INT rows --resume", "--no-shuffle",
                 "{auto,c,torch}", "every epoch (default: True)"):
        assert part in text, part


# -------------------------------------------------------------------------------------- ranges


@dataclass
class Ranged:
    share: float = ranged(0.5, least=0, most=1)  # both ends are legal
    gate: float = ranged(0.5, above=0, below=1)  # neither is
    rows_at_once: int = ranged(4, least=1)  # one end only
    lr: float | None = ranged(None, above=0)  # none: by size
    name: str = "out"  # no number


@pytest.mark.parametrize("value", [
    dict(share=0), dict(share=1), dict(share=0.3), dict(gate=1e-9), dict(gate=1 - 1e-9),
    dict(rows_at_once=1), dict(rows_at_once=10**12), dict(lr=None), dict(lr=1e-30), dict(name="")])
def test_a_number_within_its_range_is_legal_the_ends_of_least_and_most_too(value):
    stage.check(Ranged(**value))


@pytest.mark.parametrize("value, line", [
    (dict(share=-1e-9), "--share -1e-09: give a number at least 0, at most 1"),
    (dict(share=1.001), "--share 1.001: give a number at least 0, at most 1"),
    (dict(gate=0), "--gate 0: give a number above 0, below 1"),
    (dict(gate=1.0), "--gate 1.0: give a number above 0, below 1"),
    (dict(rows_at_once=0), "--rows-at-once 0: give a number at least 1"),
    (dict(lr=0.0), "--lr 0.0: give a number above 0"),
    (dict(lr=-1), "--lr -1: give a number above 0")])
def test_a_number_beyond_its_range_is_one_line_with_the_flag_and_what_is_legal(value, line):
    with pytest.raises(ValueError) as e:
        stage.check(Ranged(**value))
    assert str(e.value) == line


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["share", "gate", "rows_at_once", "lr"])
def test_what_is_not_finite_is_never_legal(name, value):
    flag = f"--{name.replace('_', '-')} {value}: give a number"
    with pytest.raises(ValueError, match=flag):
        stage.check(Ranged(**{name: value}))


def test_the_first_wrong_number_is_named():
    with pytest.raises(ValueError, match="^--gate 2: "):
        stage.check(Ranged(gate=2, rows_at_once=0))


def test_a_range_changes_neither_default_nor_flag_nor_help(capsys):
    """`ranged(0.5, ...)` is read by dataclass, cli and --help as `0.5` is."""
    assert Ranged() == Ranged(0.5, 0.5, 4, None, "out")
    config = stage.cli(Ranged, ["--rows-at-once", "7", "--lr", "3e-4"])
    assert config == Ranged(rows_at_once=7, lr=3e-4) and config.given == {"rows_at_once", "lr"}
    with pytest.raises(SystemExit):
        stage.cli(Ranged, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--share FLOAT both ends are legal (default: 0.5)" in text
    assert "--lr FLOAT none: by size --name" in text


# Every script's Config, and what is called with it.
SCRIPTS = {"pretrain": (pretrain.Config, pretrain.main), "sft": (sft.Config, sft.main),
           "reward": (reward.Config, reward.main), "ppo": (ppo.Config, ppo.main),
           "rejection": (rejection.Config, rejection.main), "gatt": (gatt.Config, gatt.main),
           "exam": (exam.Config, lambda cfg: exam.main("sft", cfg)),
           "exam summary": (exam.Config, lambda cfg: exam.main("summary", cfg)),
           "paper": (paper.Config, lambda cfg: paper.main(["sft"], cfg)),
           "chat": (chat.Config, chat.main),
           "convert": (convert.Config, convert.main),
           "scale tokenise": (scale.Tokenise, scale.tokenise),
           "scale consolidate": (scale.Consolidate, scale.consolidate),
           "plan plan": (plan.Plan, plan.plan), "plan simulate": (plan.Plan, plan.run_simulation),
           "plan table": (plan.Table, plan.table),
           "bench": (bench.__main__.Config, bench.__main__.main)}
NUMBERS = [(script, field.name) for script, (Config, _) in SCRIPTS.items()
           for field in fields(Config) if {"int", "float"} & set(field.type.split(" | "))]


def test_every_script_with_flags_is_among_them():
    """Whatever calls stage.run is in SCRIPTS, so that the tests below walk all flags there are."""
    files = [*ROOT.glob("*.py"), ROOT / "bench" / "__main__.py"]
    running = {f.parent.name if f.stem == "__main__" else f.stem for f in files
               if "\n    stage.run(" in f.read_text()} - {"stage"}
    assert running == {script.split()[0] for script in SCRIPTS}
    assert len(NUMBERS) > 100


@pytest.mark.parametrize("script, name", NUMBERS)
def test_every_number_of_every_script_has_a_range_with_its_default_in_it(script, name):
    Config, _ = SCRIPTS[script]
    field = next(field for field in fields(Config) if field.name == name)
    assert field.metadata.keys() == {"least", "most", "above", "below"}
    assert any(math.isfinite(end) for end in field.metadata.values())
    stage.check(Config())


@pytest.mark.parametrize("script, name", NUMBERS)
def test_every_script_refuses_a_number_beyond_its_range_before_it_does_anything(
        script, name, tmp_path, monkeypatch, capsys):
    """Just beyond each end, and nan: one line with the flag, nothing printed, nothing written."""
    Config, main = SCRIPTS[script]
    limit = next(field.metadata for field in fields(Config) if field.name == name)
    beyond = [math.nan, limit["least"] - 1, limit["most"] + 1, limit["above"], limit["below"]]
    monkeypatch.chdir(tmp_path)  # where nothing is: whatever is read first would be missing
    for value in [v for v in beyond if not math.isinf(v)]:
        with pytest.raises(ValueError) as e:
            main(Config(**{name: value}))
        assert str(e.value).startswith(f"--{name.replace('_', '-')} {value}: "), e.value
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- the model's size


def test_the_values_of_a_size_take_the_place_of_the_defaults():
    assert stage.at_size(Config(), {}) == Config()
    paper = {"max_steps": 900, "lr": 1e-5}
    assert stage.at_size(Config(), paper) == Config(max_steps=900, lr=1e-5)


def test_a_flag_that_was_given_keeps_its_value_at_any_size_its_default_too():
    """Without the command line nobody knows whether a default was meant: then it was not."""
    given = stage.cli(Config, ["--max-steps", "5"])
    assert stage.at_size(given, {"max_steps": 900, "lr": 1e-5}) == Config(lr=1e-5)
    made = Config(max_steps=7)
    assert stage.at_size(made, {"max_steps": 900, "lr": 1e-5}) == replace(made, lr=1e-5)
    assert stage.at_size(Config(max_steps=5), {"max_steps": 900}).max_steps == 900


# -------------------------------------------------------------------------------------- errors


def run_main(monkeypatch, main, argv=(), config=Config):
    monkeypatch.setattr(sys, "argv", ["folder/stage.py", *argv])
    monkeypatch.delenv("TRACEBACK", raising=False)
    stage.run(main, config)


def raising(error):
    def main(config):
        raise error
    return main


def test_run_gives_main_the_config(monkeypatch):
    got = []
    run_main(monkeypatch, got.append, ["--max-steps", "9"])
    assert got == [Config(max_steps=9)]


@pytest.mark.parametrize("error, code, line", [
    (ValueError("rows.jsonl:3: no prompt"), 2, "stage.py: rows.jsonl:3: no prompt\n"),
    (ValueError("unknown name 'a\nb'"), 2, "stage.py: unknown name 'a b'\n"),
    (FileNotFoundError("a.pt does not exist"), 2, "stage.py: a.pt does not exist\n"),
    (OSError("disk full"), 2, "stage.py: disk full\n"),
    (FloatingPointError("loss is nan at step 3"), 1, "stage.py: loss is nan at step 3\n"),
])
def test_run_says_what_a_user_can_mend_in_one_line(monkeypatch, capsys, error, code, line):
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, raising(error))
    assert e.value.code == code and capsys.readouterr().err == line


def test_run_ends_with_130_after_ctrl_c(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, raising(KeyboardInterrupt()))
    err = capsys.readouterr().err
    assert e.value.code == 130 and "stage.py: interrupted" in err and "--resume" in err


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: x"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")])
def test_run_names_the_flags_that_fit_when_memory_is_out(monkeypatch, capsys, error):
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, raising(error))
    err = capsys.readouterr().err
    assert e.value.code == 1 and err.count("\n") == 1 and "out of memory" in err
    assert "smaller" not in err  # this Config has no flag that would help


@pytest.mark.parametrize("error", [
    RuntimeError("mat1 and mat2 cannot be multiplied"), ZeroDivisionError(), AssertionError("B"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("unsupported memory format option Preserve")])
def test_run_shows_the_traceback_of_our_own_mistakes(monkeypatch, error):
    with pytest.raises(type(error)) as e:
        run_main(monkeypatch, raising(error))
    assert e.value is error


def test_run_shows_the_traceback_on_request(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="why"):
        stage.run(raising(ValueError("why")), Config)


def test_run_reports_a_config_that_refuses_itself(monkeypatch, capsys):
    """A Config may check its own fields in __post_init__; that is user input as well."""
    with pytest.raises(SystemExit) as e:
        run_main(monkeypatch, print, ["--max-steps", "-1"], Checked)
    assert e.value.code == 2 and capsys.readouterr().err == "stage.py: max_steps must be positive\n"


@dataclass
class Checked:
    max_steps: int = 5  # optimizer steps

    def __post_init__(self):
        if self.max_steps < 0:
            raise ValueError("max_steps must be positive")


def test_run_is_silent_when_the_reader_closed_the_pipe(monkeypatch, capsys):
    moved = []
    monkeypatch.setattr(os, "dup2", lambda a, b: moved.append(b))
    run_main(monkeypatch, raising(BrokenPipeError()))
    assert moved == [1] and capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------- log


def test_log_appends_json_lines_and_prints_aligned_ones(tmp_path, capsys):
    """All numbers in the file; on the screen those to watch, in columns that keep their place."""
    log = stage.Log("sft", tmp_path / "new", 100, watch=("loss", "val_loss", "tokens_per_s"))
    log.step(9, loss=2.34567, tokens_per_s=12345.6, seconds=1.0)
    log.step(10, loss=0.5, tokens_per_s=1.0, seconds=2.0)
    rows = [json.loads(line) for line in (tmp_path / "new" / "sft.jsonl").read_text().splitlines()]
    assert rows == [{"step": 9, "loss": 2.34567, "tokens_per_s": 12345.6, "seconds": 1.0},
                    {"step": 10, "loss": 0.5, "tokens_per_s": 1.0, "seconds": 2.0}]
    first, second = capsys.readouterr().out.splitlines()
    gap = " " * len("val_loss 0.00000")
    assert first.startswith(f"step   9/100  loss   2.346  {gap}  tokens_per_s  12,346  eta ")
    assert second.startswith(f"step  10/100  loss     0.5  {gap}  tokens_per_s       1  eta ")
    assert "seconds" not in first


def test_log_starts_afresh_without_resume_step(tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"step": 1}\n')
    stage.Log("sft", tmp_path, 9)
    assert (tmp_path / "sft.jsonl").read_text() == ""


def test_log_on_resume_drops_later_lines_and_half_lines(tmp_path):
    rows = [json.dumps({"step": s, "loss": 1.0}) for s in (1, 2, 3, 4)]
    for tail in ('{"step": 2, "lo', "3", "null", '{"loss": 1}'):
        (tmp_path / "sft.jsonl").write_text("\n".join(rows) + "\n" + tail)
        stage.Log("sft", tmp_path, 9, resume_step=2).step(3, loss=0.5)
        lines = (tmp_path / "sft.jsonl").read_text().splitlines()
        assert lines == rows[:2] + ['{"step": 3, "loss": 0.5}']


def test_log_at_resume_step_zero_keeps_step_zero(tmp_path):
    (tmp_path / "sft.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    stage.Log("sft", tmp_path, 9, resume_step=0)
    assert (tmp_path / "sft.jsonl").read_text() == '{"step": 0}\n'


def test_log_eta_counts_the_steps_of_this_run_only(tmp_path, capsys, monkeypatch):
    """Resumed at step 40, 20 seconds later at step 50: 2 s a step, 50 steps left, 1:40."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    log = stage.Log("sft", tmp_path, 100, resume_step=40)
    monkeypatch.setattr(time, "time", lambda: 1020.0)
    log.step(50)
    log.step(40)  # the first line after a resume: no step done yet
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("eta 1:40") and second.endswith("eta 20:00")


def test_only_rank_zero_writes_the_log(tmp_path, monkeypatch):
    (tmp_path / "s.jsonl").write_text("rank 0's\n")
    monkeypatch.setenv("RANK", "1")
    stage.Log("s", tmp_path, 10).step(1, loss=2.0)
    assert (tmp_path / "s.jsonl").read_text() == "rank 0's\n"


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (5.9, "0:05"), (65, "1:05"), (3599, "59:59"), (3600, "1:00:00"),
    (7205, "2:00:05"), (360000, "100:00:00")])
def test_clock(seconds, text):
    assert stage.clock(seconds) == text


# -------------------------------------------------------------------------------- the last line


def test_a_checkpoint_passes_on_its_village_and_its_line():
    info = {"stage": "sft", "metrics": {"village": 103, "lineage": ["pretrain"], "loss": 1.0}}
    assert stage.heritage(info) == {"village": 103, "lineage": ["pretrain", "sft"]}
    assert stage.heritage({"stage": "pretrain", "metrics": {}}) == {"village": None,
                                                                    "lineage": ["pretrain"]}


def test_the_last_line_says_what_was_written_and_the_next_commands_with_their_out():
    assert stage.wrote("out/sft.pt", "out", "reward.py", "exam.py sft") == (
        "wrote out/sft.pt; next: python reward.py, python exam.py sft")
    assert stage.wrote("o/sft.pt", Path("o"), "reward.py", "exam.py sft") == (
        "wrote o/sft.pt; next: python reward.py --out o, python exam.py sft --out o")


# -------------------------------------------------------------------------------- resume states


@pytest.fixture
def state(tmp_path) -> Path:
    path = tmp_path / "sft.state.pt"
    stage.save_state(path, {"step": 3, "x": torch.ones(9)})
    return path


def test_resume_state_round_trip(tmp_path):
    state = {"step": 7, "rng": torch.get_rng_state(), "w": torch.ones(3, dtype=torch.bfloat16)}
    stage.save_state(tmp_path / "pretrain.state.pt", state)
    back = stage.load_state(tmp_path / "pretrain.state.pt")
    assert back["step"] == 7 and torch.equal(back["rng"], state["rng"]) and set(state) <= set(back)
    assert torch.equal(back["w"], state["w"])


def test_no_resume_state_is_none(tmp_path):
    assert stage.load_state(tmp_path / "pretrain.state.pt") is None


@pytest.mark.parametrize("value", [{"step": 3}, {"format": 2}, [1]])
def test_a_foreign_resume_state_says_delete_it(state, value):
    torch.save(value, state)
    assert "delete it to start afresh" in error_of(state, stage.load_state)


def test_a_damaged_resume_state_is_one_line(state):
    state.write_bytes(state.read_bytes()[:1000])
    assert "delete it to start afresh" in error_of(state, stage.load_state)


@pytest.mark.parametrize("kind", EVIL_FILES)
def test_a_state_that_asks_to_run_code_does_not_run(tmp_path, kind):
    path, proof = tmp_path / "pretrain.state.pt", tmp_path / "proof"
    write_evil_file(path, proof, kind)
    words = error_of(path, stage.load_state)
    assert not proof.exists()
    assert kind != "zip" or "it asks to run code" in words


def test_a_full_disk_is_one_oserror_and_the_old_state_stays(state):
    old = state.read_bytes()
    with full_disk(), pytest.raises(OSError) as e:
        stage.save_state(state, {"x": torch.ones(9999)})
    assert "\n" not in str(e.value)
    assert state.read_bytes() == old and os.listdir(state.parent) == ["sft.state.pt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file\nat: 1")])
def test_a_state_that_cannot_be_written_is_one_oserror_and_the_old_one_stays(state, monkeypatch,
                                                                             error):
    def fail(value, f):
        f.write(b"half")
        raise error

    old = state.read_bytes()
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError) as e:
        stage.save_state(state, {})
    assert "\n" not in str(e.value)
    assert state.read_bytes() == old and os.listdir(state.parent) == ["sft.state.pt"]


# ------------------------------------------------------------------------------------ optimizer


def test_adamw_has_the_papers_settings_and_decays_matrices_only():
    net = llama(SMALL)
    net.tok_embeddings.weight.requires_grad_(False)
    groups = stage.adamw(net, lr=3e-4, weight_decay=0.1).param_groups
    for g in groups:
        assert (g["betas"], g["eps"], g["lr"]) == ((0.9, 0.95), 1e-5, 3e-4)
        assert g["weight_decay"] == (0.1 if g["params"][0].dim() == 2 else 0.0)
        assert len({p.dim() for p in g["params"]}) == 1
    given = [id(p) for g in groups for p in g["params"]]
    assert sorted(given) == sorted(id(p) for p in net.parameters() if p.requires_grad)


def test_adamw_is_pytorchs_to_the_bit_with_and_without_a_reload():
    ours, theirs = llama(SMALL), llama(SMALL)
    optimizers = [stage.adamw(ours, 1e-2, 0.1), None]
    groups = [{"params": [p for p in theirs.parameters() if (p.dim() > 1) == matrices],
               "weight_decay": decay} for matrices, decay in ((True, 0.1), (False, 0.0))]
    optimizers[1] = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, fused=True)
    for step in range(4):
        for net, optimizer in zip((ours, theirs), optimizers):
            net.hidden(torch.tensor([[1, 2, 3 + step]])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            assert all(p.grad is None and p.requires_grad for p in net.parameters())
        if step == 1:  # each continues from the other's state
            states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
            optimizers[0].load_state_dict(states[1])
            optimizers[1].load_state_dict(states[0])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_a_training_step_and_its_state_do_not_import_the_compiler():
    code = ("import sys, torch, model as M, stage; "
            "net = M.Llama(M.PRESETS['tiny']).init_weights(0); "
            "optimizer = stage.adamw(net, 1e-3, 0.1); "
            "net.hidden(torch.tensor([[1, 2]])).sum().backward(); optimizer.step(); "
            "optimizer.zero_grad(); optimizer.load_state_dict(optimizer.state_dict()); "
            "print([m for m in ('torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(M.__file__).parent)
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize("numbers", [dict(loss=math.nan), dict(loss=1.0, norm=math.inf)])
def test_a_step_with_a_number_that_is_not_finite_changes_nothing(numbers):
    net = llama(SMALL)
    optimizer = stage.adamw(net, 1e-2, 0.1)
    net.hidden(torch.tensor([[1, 2]])).sum().backward()
    with pytest.raises(FloatingPointError, match=r"training diverged; a smaller --lr \(now 0.5\)"):
        stage.step(optimizer, 0.5, **numbers)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), llama(SMALL).parameters()))


def test_a_step_takes_the_given_rate_for_all_groups_and_clears_the_gradients():
    """AdamW's first step moves each weight by its rate, but for eps: all by 0.5 here, or none."""
    net = llama(SMALL)
    optimizer = stage.adamw(net, 1e-9, 0.0)
    net.hidden(torch.tensor([[1, 2]])).square().sum().backward()
    stage.step(optimizer, 0.5, loss=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert all(p.grad is None for p in net.parameters())
    moved = (net.norm.weight - llama(SMALL).norm.weight).detach().abs()
    assert moved.median().item() == pytest.approx(0.5, rel=1e-3)


# --------------------------------------------------------------------------------- where it stands


def test_this_file_knows_no_stage_and_imports_the_network_alone():
    ours = sorted(path.stem for path in ROOT.glob("*.py"))
    code = f"import sys, stage; print([name for name in {ours} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "['model', 'stage']\n", done.stdout + done.stderr


# ---- terminals from the wild


def run_script(code: str, **environment) -> subprocess.CompletedProcess:
    """A small script with its own Config, run by `stage.run` as every script is."""
    head = ("from dataclasses import dataclass\nimport sys\nsys.path.insert(0, {home!r})\n"
            "import stage\n\n@dataclass\nclass Config:\n    \"\"\"Flags.\"\"\"\n")
    home = str(Path(stage.__file__).parent)
    return subprocess.run([sys.executable, "-c", head.format(home=home) + code],
                          capture_output=True, timeout=120, env={**os.environ, **environment})


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_shows_numbers_for_what_it_lacks(encoding, monkeypatch):
    """Also the error line, which may quote a file's content."""
    code = ("    x: int = 0  # a number\n\ndef main(cfg):\n    print('caf\u00e9 \u2581the')\n"
            "    raise ValueError('no \u2581')\nimport inspect\n"
            "stage.inspect = type('inspect', (), {'getsource': staticmethod(lambda c: '')})\n"
            "stage.run(main, Config)\n")
    done = run_script(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 2, done.stderr
    want = "caf\u00e9".encode(encoding, "backslashreplace") + b" \\u2581the"
    assert done.stdout.strip() == want and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("fields, interrupted, memory", [
    ("    x: int = 0\n", b"interrupted\n", b"out of memory\n"),
    ("    resume: bool = False\n    seq_len: int = 1\n",
     b"interrupted; --resume continues from the last saved state\n",
     b"out of memory: a smaller --seq-len fits\n"),
    ("    dry_run: bool = False\n    model: str = ''\n", b"interrupted\n",
     b"out of memory: a smaller --model fits; --dry-run shows what a run will need\n")])
def test_advice_names_only_flags_that_the_script_has(fields, interrupted, memory):
    for error, line in (("KeyboardInterrupt", interrupted), ("MemoryError", memory)):
        code = (f"{fields}\ndef main(cfg):\n    raise {error}\n"
                "stage.inspect = type('inspect', (), {'getsource': staticmethod(lambda c: '')})\n"
                "stage.run(main, Config)\n")
        assert run_script(code).stderr.endswith(line)
