"""Talk to any checkpoint in the terminal: ours, Meta's, Hugging Face's, llama2.c's or GGUF.

An answer is sampled token by token from p(token | dialogue so far), at the released code's
settings, temperature 0.6 and top-p 0.9. `data.encode_dialog` builds the prompt, as in training.

in  : out/STAGE.pt, the last stage there is, or --checkpoint; out/reward_*.pt for scores
out : answers on stdout, everything else on stderr
run : python chat.py                                      /help lists the commands
      python chat.py --prompt "Who is Tom?"               one answer and no more, for scripts
      python chat.py --prompt "Who is Tom?" --compare     every stage's answer, with its scores
      python chat.py --checkpoint llama-2-7b --dtype int4  7B in 6 GiB: rounded while it is read
      echo "Who is Tom?" | python chat.py                 an answer to every line

Keys: [L2] Llama 2, arXiv 2307.09288.  [META gen] facebookresearch/llama, generation.py.

Differs from the paper: no system message unless you give one; its human evaluation had Table 31's.
"""

from __future__ import annotations

import codecs, contextlib, difflib, functools, json, math, os, random, re, sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import convert, data, kernels, model as M, rollouts, scale, stage
from stage import ranged

try:
    import readline
except ImportError:  # Windows: the console itself edits lines and recalls them
    readline = None

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """How to talk, and to whom: each field is a flag, its comment the help text."""

    checkpoint: str | None = None  # model to talk to, any format; none: the last stage in OUT
    tokenizer: str | None = None  # SentencePiece model, where the checkpoint has none beside it
    base: bool = False  # continue the text instead of answering; a pretrain checkpoint always does
    out: str = "out"  # folder of the stages' checkpoints and of the reward models
    prompt: str | None = None  # answer this once on stdout, and leave
    system: str | None = None  # system message: who the model is, what it must keep to
    compare: bool = False  # answer --prompt with every stage in OUT, and score the answers
    temperature: float = ranged(0.6, least=0, most=10)  # 0 is greedy; released code: 0.6 [META gen]
    top_p: float = ranged(0.9, above=0, most=1)  # likeliest tokens of this share; released: 0.9
    max_new_tokens: int = ranged(256, least=1)  # tokens of an answer at most
    seed: int | None = ranged(None, least=0)  # of the random numbers; none: a new one each
    show_prompt: bool = False  # print the pieces that the model reads
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # what computes: our C, or PyTorch
    dtype: Literal["fp32", "bf16", "int8", "int4"] | None = None  # of weights; none: the file's


REWARDS = ("helpful", "safety")  # OUT/reward_NAME.pt
CONTROLS = {c: "\ufffd" for c in [*range(32), *range(127, 160)] if chr(c) not in "\n\t"}
HELP = """\
/system TEXT     who the model is, what it must keep to; without TEXT: no system message
/reset           forget the dialogue, keep the system message
/temperature T   0 is greedy, 1 as trained; without T: show it
/top-p P         sample from the likeliest tokens that make up this share; without P: show it
/stage NAME      go on with another stage's model; without NAME: say which there are
/score           both reward models' scores of the last answer
/save FILE       append the dialogue to FILE.jsonl, as a row that `sft.py --data` reads
/help            this list
/quit            leave; so do Ctrl-D, and Ctrl-C at the prompt; Ctrl-C stops an answer"""

# ------------------------------------------------------------------------------------ the idea


def fit(tokenizer, messages: list[dict], room: int, context: int) -> tuple[list[int], int]:
    """(tokens, turns left out): the dialogue without its oldest turns, in at most `room` tokens.

    The system message stays, and the last turn may fill the context; ValueError if it is longer.
    """
    first = int(messages[0]["role"] == "system")  # where the turns begin
    for start in range(first, len(messages), 2):
        tokens, _ = data.encode_dialog(tokenizer, messages[:first] + messages[start:])
        if len(tokens) <= (room if start + 2 < len(messages) else context):
            return tokens, start // 2
    raise ValueError(f"system message and last turn are {len(tokens)} tokens, this model reads at "
                     f"most {context}: shorten them")


def as_text(tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of each token as it comes: '▁Hi' -> ' Hi'; half a character waits for its rest.

    A character without a piece of its own is two to four byte tokens. Joined, the texts are
    `tokenizer.decode(tokens)`, but for the space in front, which decode drops.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # broken bytes become U+FFFD
    for token in tokens:
        kind, piece = tokenizer.kind(token), tokenizer.piece(token)
        if kind == "byte":
            yield utf8.decode(bytes([int(piece[3:5], 16)]))  # '<0x0A>'
        elif kind != "control":  # EOS is silent
            yield utf8.decode(piece.replace(data.SPACE, " ").encode())
    yield utf8.decode(b"", final=True)


# --------------------------------------------------------------------------------- the dialogue


class Chat:
    """A dialogue under way, and the model that speaks in it."""

    def __init__(self, cfg: Config, path):
        self.cfg, self.turns = cfg, []  # turns: messages of user, assistant, user, assistant, ...
        self.open(path)

    def open(self, path) -> None:
        """Let the checkpoint at `path` speak; ValueError for reward models, which only score."""
        source = convert.open_model(path, self.cfg.tokenizer)
        kind, config = source.info["stage"], source.config
        if config.scalar_head:
            raise ValueError(f"{path} scores answers and gives none: choose a chat or base model")
        for line in source.notes:
            note(f"{path}: {line}")
        how = self.load(source)
        self.tokenizer, self.config = source.tokenizer, config
        self.path, self.is_base = path, self.cfg.base or kind == "pretrain"
        if self.is_base:
            note(f"{path} is a base model, not a chat model: it continues your text, and reads "
                 f"neither a system message nor earlier turns")
        elif self.cfg.prompt is None:  # other formats do not say what they hold: "converted"
            note(f"{path}: {kind}, {M.count_parameters(config):,} parameters; {how}\n/help lists "
                 f"the commands" + ", --base is for models that only continue" *
                 (kind == "converted"))

    def load(self, source) -> str:
        """Make `source` ready to speak, in C where it can be; returns how, in a few words.

        ValueError for flags that exclude each other. PyTorch has no int8 and int4 weights here: it
        speaks in the file's own format, which on a CPU stays on disk until it is looked at.
        """
        cfg, dtype = self.cfg, self.cfg.dtype
        if cfg.kernels == "torch" and dtype in ("int8", "int4"):
            raise ValueError(f"--dtype {dtype} is computed in C: leave --kernels torch away")
        how = kernels.choose(cfg.kernels, M.pick_device(cfg.device))
        self.model = None  # of another stage: give its memory back first
        self.decoder = None
        weights = {n: w.read for n, w in source.weights.items()}
        self.decoder = kernels.decoder(source.config, weights, dtype)
        if self.decoder:
            kept = convert.formats({n: w for n, w in source.weights.items() if len(w.shape) == 2})
            if dtype is None and kept != self.decoder.dtype:
                note(f"the file's {kept} weights are spoken in {self.decoder.dtype}; --dtype fp32 "
                     f"keeps every digit, for more memory")
            return f"{how}, {self.decoder.dtype} weights"
        if dtype in ("int8", "int4"):
            note(f"--dtype {dtype} needs the C kernels, and there are none ({how}): the weights "
                 f"stay as in the file")
            dtype = None
        device = M.pick_device(cfg.device)
        weights = {n: read().to(device, dtype and convert.DTYPES[dtype])
                   for n, read in weights.items()}
        self.model = M.assemble(source.config, weights, source.kind)
        return how

    def stream(self, tokens: list[int], seed: int | None) -> Iterator[int]:
        """The tokens of an answer to a prompt as they come, EOS included."""
        cfg = self.cfg
        speak = self.decoder.stream if self.decoder else functools.partial(M.stream, self.model)
        return speak(tokens, cfg.max_new_tokens, cfg.temperature, cfg.top_p, seed,
                     stop=self.tokenizer.eos_id)

    def messages(self) -> list[dict]:
        """The dialogue in the form of `data.encode_dialog`."""
        return [{"role": "system", "content": self.cfg.system}] * bool(self.cfg.system) + self.turns

    def prompt(self, text: str) -> list[int]:
        """What the model reads to answer `text`; ValueError: empty, too long, tags in it."""
        if not text.strip():
            raise ValueError("nothing to answer: the message is empty")
        if self.is_base:
            tokens, left_out = self.tokenizer.encode(text, bos=True), 0
        else:
            context = self.config.max_seq_len
            room = context - min(self.cfg.max_new_tokens, context // 4)  # the rest: the answer's
            messages = self.messages() + [{"role": "user", "content": text}]
            tokens, left_out = fit(self.tokenizer, messages, room, context - 1)
        if left_out:
            note(f"(the context is full: the oldest turns, {left_out} so far, are not read)")
        if self.cfg.show_prompt:
            note("|".join(map(self.tokenizer.piece, tokens)))
        return tokens


def ask(chat: Chat, text: str) -> bool:
    """Print the answer to `text` as it is sampled and keep both; False if Ctrl-C stopped it."""
    tokens, said, held, stopped = [], "", "", False
    eos, on_screen = chat.tokenizer.eos_id, sys.stdout.isatty()
    stream = chat.stream(chat.prompt(text), chat.cfg.seed)
    try:
        # '▁Hello ▁ </s>': the spaces around an answer belong to the chat format. White space is
        # held back until a word follows it. A terminal obeys control characters: it gets none.
        for piece in as_text(chat.tokenizer, (tokens.append(t) or t for t in stream)):
            piece = held + piece if said or chat.is_base else piece.lstrip()
            held = piece[len(piece.rstrip()):]
            piece = piece.rstrip()
            said += piece
            print(piece.translate(CONTROLS) if on_screen else piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(flush=True)
    if stopped or tokens[-1] != eos:
        why = "Ctrl-C" if stopped else "--max-new-tokens or the end of the context"
        note(f"(cut by {why}; tokens: {len(tokens)})")
    if not said:
        note("(an empty answer: this turn is not kept)")
    else:  # tags in an answer must not forge a turn when it is read again
        chat.turns += [{"role": "user", "content": text},
                       {"role": "assistant", "content": data.break_tags(said).strip()}]
    return not stopped


@torch.inference_mode()
def rate(messages: list[dict], cfg: Config) -> dict[str, float]:
    """Raw scores of the last answer by the reward models in OUT, read at its EOS.

    A model that is not there is left out; ValueError if the last turn outgrows a model's context.
    """
    scores = {}
    for name in REWARDS:
        if (path := Path(cfg.out) / f"reward_{name}.pt").is_file():
            model, info = M.load(path, "cpu")
            context = model.config.max_seq_len
            tokens, _ = fit(data.Tokenizer(info["tokenizer"]), messages, context, context)
            model = scale.wrap(model, scale.Ranks(M.pick_device(cfg.device)))
            scores[name] = rollouts.scores(model, [tokens]).item()
    return scores


def compare(cfg: Config) -> None:
    """Print one row per stage: both reward models' scores, and the answer to --prompt."""
    seed = random.getrandbits(31) if cfg.seed is None else cfg.seed
    print(f"{'stage':13}{'helpful':>8}{'safety':>8}  answer")
    for name in stages_in(cfg.out):
        chat = Chat(cfg, Path(cfg.out) / f"{name}.pt")
        tokens = list(chat.stream(chat.prompt(cfg.prompt), seed))
        answer = data.break_tags(chat.tokenizer.decode(tokens).strip())
        chat.turns = [{"role": "user", "content": cfg.prompt},
                      {"role": "assistant", "content": answer}]
        try:
            scores = rate(chat.messages(), cfg)
        except ValueError as e:  # the answer is longer than a reward model reads: nan
            note(e)
            scores = {}
        shown = "".join(f"{scores.get(which, math.nan):8.2f}" for which in REWARDS)
        print(f"{name:13}{shown}  {' '.join(answer.translate(CONTROLS).split())}", flush=True)


# --------------------------------------------------------------------------------- the terminal


def command(chat: Chat, name: str, text: str) -> str:
    """Do what `name` asks for; returns the line to print. ValueError or OSError changes nothing."""
    if name == "/system":
        chat.cfg = checked(replace(chat.cfg, system=text or None))
        return "system message set; /reset begins anew with it" if text else "no system message"
    if name == "/reset":
        chat.turns = []
        return "a new dialogue" + ", same system message" * bool(chat.cfg.system)
    if name in ("/temperature", "/top-p"):
        field = name[1:].replace("-", "_")
        if text:
            try:
                number = float(text)
            except ValueError:
                raise ValueError(f"{name} {text}: write a number, as in {name} 0.7") from None
            chat.cfg = checked(replace(chat.cfg, **{field: number}))
        return f"{field} is {getattr(chat.cfg, field)}"
    if name == "/stage":
        stages = stages_in(chat.cfg.out)
        if text not in stages:
            raise ValueError(f"/stage takes {', '.join(stages)}, not {text!r}; now: {chat.path}")
        chat.open(Path(chat.cfg.out) / f"{text}.pt")
        return f"the dialogue goes on with {text}"
    if name in ("/score", "/save") and not chat.turns:
        raise ValueError(f"nothing to {name[1:]} yet: ask something first")
    if name == "/score":
        scores = rate(chat.messages(), chat.cfg)
        if not scores:
            raise ValueError(f"no reward model in {chat.cfg.out}: `python reward.py` makes both")
        return "   ".join(f"{name} {score:+.2f}" for name, score in scores.items())
    if name == "/save":
        path = Path(os.path.expanduser(text))
        if path.suffix != ".jsonl":
            raise ValueError(f"/save {text}: the name must end in .jsonl, as in /save talks.jsonl")
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"messages": chat.messages()}, ensure_ascii=False) + "\n")
        return f"saved {len(chat.turns) // 2} turns to {path}"
    if name == "/help":
        return HELP
    if name == "/quit":
        raise EOFError
    near = difflib.get_close_matches(name, [line.split()[0] for line in HELP.splitlines()], 1)
    raise ValueError(f"no command {name}: {f'did you mean {near[0]}? ' if near else ''}/help lists "
                     f"them all; a message that begins with / needs a space before it")


def checked(cfg: Config) -> Config:
    """cfg itself; ValueError for numbers that nothing can be sampled with, and forged tags."""
    if not (cfg.temperature == 0 or 0.01 <= cfg.temperature <= 10):  # lower: logits overflow
        raise ValueError(f"--temperature {cfg.temperature}: 0 (greedy), or 0.01 to 10")
    stage.check(cfg)
    data.check_dialog([{"role": "system", "content": cfg.system or ""},
                       {"role": "user", "content": ""}])
    return cfg


def stages_in(out) -> list[str]:
    """What can chat of OUT/*.pt, in the order of training; FileNotFoundError if nothing can.

    The order is that of the lines that the checkpoints remember: longer ones are later, and of
    equal ones rlhf_v10 is later than rlhf_v9. A file that is no checkpoint is named and left out.
    """
    order = []
    for path in sorted(Path(out).glob("*.pt")):
        if path.name.endswith(".state.pt"):
            continue
        try:
            model, info = M.load(path, "cpu")  # mapped: nothing is read
        except ValueError as e:
            note(f"left out: {e}")
            continue
        if not model.config.scalar_head:
            words = re.split(r"(\d+)", path.stem)  # rlhf_v10 -> "rlhf_v", "10", ""
            counted = [int(word) if word.isdigit() else word for word in words]
            order.append((len(info["metrics"].get("lineage", [])), counted, path.stem))
    if not order:
        raise FileNotFoundError(f"no trained model in {out}: `make` trains all stages, `python "
                                f"pretrain.py` the first; --checkpoint PATH opens another model")
    return [name for *_, name in sorted(order)]


def note(text) -> None:
    """What is no answer goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def history(action: str) -> None:
    """Read or write the lines typed, in the user's state folder, where that is possible."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    path = Path(state) / "llama2-chat" / "history"
    with contextlib.suppress(OSError):  # not there yet; a read-only home
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        readline.set_history_length(1000)
        getattr(readline, f"{action}_history_file")(path)


def talk(chat: Chat) -> None:
    """Read, answer, repeat. What is wrong with a line is said in one line, and nothing is lost."""
    on_screen = sys.stdin.isatty() and sys.stdout.isatty()
    if recalls := readline and on_screen:
        history("read")
    while True:
        try:
            line = None  # nothing typed yet
            line = input("you> " if on_screen else "")
            if line.startswith("/"):
                name, _, text = line.partition(" ")
                print(command(chat, name, text.strip()), flush=True)
            else:
                ask(chat, line)
        except BrokenPipeError:
            raise  # nobody listens any more
        except (ValueError, OSError) as e:
            note(e)
        except (EOFError, KeyboardInterrupt) as e:  # Ctrl-C drops a line, or stops a command
            print(end="\n" * on_screen)
            begun = line is not None or readline and readline.get_line_buffer()
            if isinstance(e, EOFError) or not begun:
                break
    if recalls:
        history("write")


def main(cfg: Config) -> None:
    """Answer once (--prompt), by every stage (--compare), or talk."""
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(file, "reconfigure"):  # UTF-8 whatever the locale; no bytes are lost or refused
            file.reconfigure(encoding="utf-8", errors="surrogateescape")
    if checked(cfg).compare and not cfg.prompt:
        raise ValueError("--compare answers one prompt with every stage: add --prompt TEXT")
    try:
        if cfg.compare:
            return compare(cfg)
        chat = Chat(cfg, cfg.checkpoint or Path(cfg.out) / f"{stages_in(cfg.out)[-1]}.pt")
        if cfg.prompt is None:
            talk(chat)
        elif not ask(chat, cfg.prompt):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    stage.run(main, Config)
