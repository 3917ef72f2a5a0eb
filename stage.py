"""How a script runs: flags, errors in one line, log, resume, the optimizer, the last line.

Every script here is `main(Config(...))`, and what all of them do alike stands in this file: it
knows no stage, and nothing of what is learnt. A script uses it in this order:

    @dataclass class Config       one field a flag; `ranged` gives a number its legal range
    stage.run(main, Config)       Config from the command line; what a user can mend in one line
    stage.check(cfg)              every number in its range, before anything is read
    stage.at_size(cfg, values)    from 7b on the paper's values take the place of the toy's
    stage.adamw, stage.cosine, stage.step     the paper's optimizer [L2 §2.2] for all stages
    stage.Log                     one line on the screen, one in OUT/STAGE.jsonl
    stage.resume_info, stage.check_resume     a state continues the run that wrote it, or none
    stage.wrote                   the last line: what was written, which commands come next

Keys: [L2] Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

import argparse, dataclasses, difflib, functools, gc, inspect, json, math, os, signal, sys, time
import typing, zlib
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import model as M

# --------------------------------------------------------------------------------------- flags


def ranged(default, least: float = -math.inf, most: float = math.inf, above: float = -math.inf,
           below: float = math.inf):
    """A numeric field of a Config, its legal range beside its default; `check` reads it.

    least, most: the ends, which are legal; above, below: ends that are not. A default of None is
    legal too.
    """
    return dataclasses.field(default=default, metadata={"least": least, "most": most,
                                                        "above": above, "below": below})


def check(cfg) -> None:
    """ValueError for the first number that lies outside its range; nan and infinity always do."""
    for field in dataclasses.fields(cfg):
        value, limit = getattr(cfg, field.name), field.metadata
        if not limit or value is None and field.default is None:
            continue
        is_legal = limit["least"] <= value <= limit["most"]  # so written, nan is not
        if is_legal and limit["above"] < value < limit["below"]:
            continue
        words = {"least": "at least", "most": "at most", "above": "above", "below": "below"}
        legal = [f"{words[end]} {limit[end]:g}" for end in words if abs(limit[end]) < math.inf]
        raise ValueError(f"--{field.name.replace('_', '-')} {value}: give a number "
                         f"{', '.join(legal)}")


def at_size(cfg, values: dict):
    """A stage's Config with the values that go with its model's size, as `plan.settings` has them.

    values: {field: value}. A flag that was given keeps its value; in a Config made without `cli`,
    those are the fields that are not their defaults.
    """
    given = getattr(cfg, "given", {f.name for f in dataclasses.fields(cfg)
                                   if getattr(cfg, f.name) != f.default})
    changed = {name: value for name, value in values.items() if name not in given}
    return dataclasses.replace(cfg, **changed)


def _field_comments(Config) -> dict[str, str]:
    """The comment behind each field of a dataclass: it is the help text, written once."""
    comments = {}
    for line in inspect.getsource(Config).splitlines():
        name, colon, rest = line.strip().partition(":")
        if colon and name.isidentifier() and "  # " in rest:
            comments[name] = rest.split("  # ", 1)[1].strip()
    return comments


def cli(Config, argv: list[str] | None = None):
    """A Config from the command line: every field is a flag, and its comment is the help text.

    `max_steps: int = 5` becomes `--max-steps 5`; a bool becomes `--flag / --no-flag`; Literal types
    list their choices. Unknown flags and wrong types are one line and exit code 2.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            complain(f"{self.prog}: {message}")
            self.exit(2)

    doc = sys.modules[Config.__module__].__doc__
    parser = Parser(description=doc, allow_abbrev=False, formatter_class=functools.partial(
        argparse.RawDescriptionHelpFormatter, width=100, max_help_position=34))
    hints, comments = typing.get_type_hints(Config), _field_comments(Config)
    for field in dataclasses.fields(Config):
        kind, flag = hints[field.name], "--" + field.name.replace("_", "-")
        default = "" if field.default in (None, "") else f" (default: {field.default})"
        text = (comments.get(field.name, "") + default).strip().replace("%", "%%")
        options = dict(default=argparse.SUPPRESS, help=text)
        if type(None) in typing.get_args(kind):  # `str | None`: the flag takes the str
            kind = next(a for a in typing.get_args(kind) if a is not type(None))
        if typing.get_origin(kind) is typing.Literal:
            options["choices"] = typing.get_args(kind)
            options["type"] = type(options["choices"][0])
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"], options["metavar"] = kind, kind.__name__.upper()
        parser.add_argument(flag, **options)
    known, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flags = [o for a in parser._actions for o in a.option_strings]
        near = difflib.get_close_matches(word.split("=")[0], flags, 1)
        hint = f"did you mean {near[0]}?" if near else "--help lists them all"
        parser.error(f"unknown argument {word}: {hint}")
    config = Config(**vars(known))
    config.given = set(vars(known))  # for `at_size`
    return config


# -------------------------------------------------------------------------------------- errors


def complain(message: str) -> None:
    """One line on stderr. Under torchrun all ranks find a bad flag or file: one of each machine
    says so. Once they have joined, rank 0 says it, and torchrun ends the others while they wait:
    what only they found wrong they then say."""
    if os.environ.get("LOCAL_RANK", "0") != "0" and not torch.distributed.is_initialized():
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    print(message, file=sys.stderr, flush=True)


def run(main, Config) -> None:
    """main(cli(Config)), with what a user can mend said in one line and exit code 2.

    TRACEBACK=1 in the environment shows where it came from.
    """
    name = Path(sys.argv[0]).name
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(Config)}
    for file in (sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):  # an encoding without a character shows its number
            file.reconfigure(errors="backslashreplace")
    if os.environ.get("TRACEBACK"):
        main(cli(Config))
        return
    try:
        main(cli(Config))
        gc.freeze()  # at exit Python would look through all that the imports made: a second
    except BrokenPipeError:  # `... | head` closed the pipe: nobody is reading any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (ValueError, OSError) as e:  # one line, even if a file's content stands in the message
        complain(f"{name}: {e}".replace("\n", " "))
        raise SystemExit(2) from None
    except FloatingPointError as e:  # a non-finite loss: the last good checkpoint is untouched
        complain(f"{name}: {e}")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        if "RANK" in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun sends a second one
        if os.environ.get("RANK", "0") == "0":
            hint = "; --resume continues from the last saved state" if "--resume" in flags else ""
            complain(f"\n{name}: interrupted{hint}")
        raise SystemExit(130) from None
    except (MemoryError, RuntimeError) as e:
        if any(w in str(e) for w in ("closed by peer", "reset by peer")):  # gloo's words
            complain(f"{name}: rank {os.environ.get('RANK')} lost another one, which says why")
            raise SystemExit(1) from None
        words = ("out of memory", "allocate memory", "not enough memory")  # GPU, Linux, Windows
        if not isinstance(e, MemoryError) and not any(w in str(e) for w in words):
            raise
        smaller = [flag for flag in ("--batch-size", "--seq-len", "--model") if flag in flags]
        hint = f": a smaller {' or '.join(smaller)} fits" if smaller else ""
        if "--dry-run" in flags:
            hint += "; --dry-run shows what a run will need"
        complain(f"{name}: out of memory{hint}")
        raise SystemExit(1) from None


# ----------------------------------------------------------------------------------------- log


class Log:
    """Metrics of a stage: a few numbers on the screen, all of them in out/STAGE.jsonl.

    watch: the numbers to look at, in columns that keep their place; none: whatever is given.
    resume_step: lines after that step, written before a crash, are dropped, so the file reads
    like that of an uninterrupted run.
    """

    def __init__(self, stage: str, out, total_steps: int, resume_step: int | None = None,
                 watch: tuple[str, ...] = ()):
        self.path, self.total = Path(out) / f"{stage}.jsonl", total_steps
        self.start, self.first = time.time(), resume_step or 0
        self.watch = watch
        self.writes = os.environ.get("RANK", "0") == "0"  # under torchrun one rank writes for all
        if not self.writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if resume_step is not None and _step_of(line) <= resume_step]
        M.atomic_write(self.path, lambda f: f.write("".join(l + "\n" for l in kept).encode()))

    def step(self, step: int, **metrics) -> None:
        """Record metrics (numbers) of optimizer step `step`; prints how long is left."""
        if self.writes:
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **metrics}) + "\n")
        done = max(step - self.first, 1)
        eta = (self.total - step) * (time.time() - self.start) / done  # s
        columns = []
        for name in self.watch or metrics:
            column = f"{name} {_short(metrics[name]):>7}" if name in metrics else ""
            columns.append(column.ljust(len(name) + 8))
        width = len(str(self.total))
        print(f"step {step:>{width}}/{self.total}  {'  '.join(columns)}  eta {clock(eta)}",
              flush=True)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # half a line, written when the machine went down


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def clock(seconds: float) -> str:
    """1:05 for 65 seconds, 2:00:05 above an hour."""
    m, s = divmod(int(seconds), 60)
    return f"{m // 60}:{m % 60:02d}:{s:02d}" if m >= 60 else f"{m}:{s:02d}"


def heritage(info: dict) -> dict:
    """What a checkpoint passes on to the one made from it, as metrics: its village, its line.

    info: of `M.load`. village: None where no village was read; lineage: the stages before.
    """
    metrics = info["metrics"]
    return {"village": metrics.get("village"),
            "lineage": [*metrics.get("lineage", []), info["stage"]]}


def wrote(path, out, *commands: str) -> str:
    """A script's last line: what it wrote, and the commands that come next, with its --out."""
    where = "" if str(out) == "out" else f" --out {out}"
    following = ", ".join(f"python {command}{where}" for command in commands)
    return f"wrote {path}; next: {following}"


# -------------------------------------------------------------------------------------- resume

FREE_FLAGS = {"resume", "out", "device", "kernels", "recompute", "compile", "micro_batch", "tp",
              "save_every", "log_every", "evaluate_every", "dry_run"}


def check_resume(saved: dict, cfg, tokenizer: bytes) -> None:
    """ValueError when a resume state belongs to another run: other flags, or another tokenizer.

    saved: what `resume_info` put into the state.
    """
    other = [f"--{k.replace('_', '-')} {saved['config'].get(k)}" for k, v in asdict(cfg).items()
             if k not in FREE_FLAGS and saved["config"].get(k) != v]
    if other:
        raise ValueError(f"the state in {cfg.out} was made with {' '.join(other)}: give the same "
                         f"flags, or leave --resume away to start afresh")
    if saved["tokenizer"] != zlib.crc32(tokenizer):
        raise ValueError(f"the state in {cfg.out} was made with another tokenizer (has the data "
                         f"changed?): leave --resume away to start afresh")


def resume_info(step: int, total: int, cfg, tokenizer: bytes) -> dict:
    """What a resume state holds beside weights and optimizer; `check_resume` reads it."""
    return {"step": step, "total": total, "config": asdict(cfg), "tokenizer": zlib.crc32(tokenizer)}


def save_state(path, state: dict) -> None:
    """Write a running stage's resume state (weights, optimizer, RNG, step), atomically."""
    M.write_torch_file({"format": M.FORMAT, **state}, path)


def load_state(path) -> dict | None:
    """Read a resume state, or None when there is none; ValueError if the file is damaged."""
    if not Path(path).exists():
        return None
    state = M.read_torch_file(path, hint="delete it to start afresh")
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int or version != M.FORMAT:
        raise ValueError(f"{path} is not a resume state of this version: delete it to start afresh")
    M.check_tensors(tensors_in(state), path)
    return state


def tensors_in(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dictionaries and lists, each under the names that lead to it."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    tensors = {}
    for key, part in items:
        if isinstance(part, (torch.Tensor, dict, list, tuple)):
            tensors |= tensors_in(part, f"{name}.{key}")
    return tensors


# ----------------------------------------------------------------------------------- optimizer


class AdamW(torch.optim.AdamW):
    """PyTorch's own, its methods out of the wrappers that hide them from torch.compile.

    Nothing here compiles an optimizer, but the wrappers import the compiler at their first call:
    1.3 to 1.9 s in each process, of which `make` starts ten.
    """

    add_param_group, zero_grad, state_dict, load_state_dict = map(inspect.unwrap, (
        torch.optim.AdamW.add_param_group, torch.optim.AdamW.zero_grad,
        torch.optim.AdamW.state_dict, torch.optim.AdamW.load_state_dict))
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(model: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """The paper's optimizer, betas .9, .95, eps 1e-5 [L2 §2.2; §3.2.2 reward models; §3.2.3 PPO].

    Of SFT, rejection and GAtt UNSPECIFIED in L2. Decay acts on matrices only: pulling the norms'
    scales towards 0 would mute whole layers (UNSPECIFIED too). eps is 1e-5, not the usual 1e-8. lr
    may be a schedule's first value.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in weights if p.dim() > 1], "weight_decay": weight_decay},
              {"params": [p for p in weights if p.dim() == 1], "weight_decay": 0.0}]
    return AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)



def cosine(step: int, total: int, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up to `peak`, then a cosine to a tenth of it [L2 §2.2, §3.2.2].

    Steps count from 0. UNSPECIFIED in L2: the warm-up's shape; SFT's warm-up and floor.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def step(optimizer, lr: float, **numbers: float) -> None:
    """One optimizer step at this learning rate; the gradients are cleared after it.

    numbers: losses and gradient norms of the step. FloatingPointError if one of them is not finite:
    then the weights stay as they were, and so does the last checkpoint.
    """
    if not all(map(math.isfinite, numbers.values())):
        values = ", ".join(f"{name} {value}" for name, value in numbers.items())
        raise FloatingPointError(f"{values}: training diverged; a smaller --lr (now {lr:.2g}) "
                                 f"helps")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
