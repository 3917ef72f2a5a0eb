"""Ghost Attention: an instruction given once is followed to the end of the dialogue [L2 §3.3].

A chat model forgets "Act as Plato." after a few turns. GAtt needs no new network and no new loss,
only a trick with the data. An answer is sampled while *every* user message repeats the instruction,
and learnt while only the system message has it. u: user, a: answer, E: its EOS, three turns:

    sampled  [INST] inst u1 [/INST] a1 E [INST] inst u2 [/INST] a2 E [INST] inst u3 [/INST] -> a3 E
    learnt   [INST] <<inst>> u1 [/INST] a1 E [INST] u2 [/INST] a2 E [INST] u3 [/INST] a3 E
    loss       0       0     0     0    0  0   0    0     0    0  0   0    0     0    1  1

in  : out/ppo.pt, and questions of the tiny world or your own (--data and --instructions)
out : out/gatt.pt, out/gatt_dialogues.jsonl, out/gatt.jsonl, out/figures/gatt.png
run : python gatt.py                                      about 1.3 minutes on two AVX2 cores
      python gatt.py --show-batch                         look at what carries loss, then stop

Expect an instruction that was gone on turn 2 to be followed by 92 to 98% of the answers on turn 10
(values never trained on: 76 to 95%), if the model follows instructions at all.

Keys: [L2] Llama 2, arXiv 2307.09288.

Differs from the paper:
- Up to --tries answers are sampled; one that fails the instruction's string check is not kept.
- The model's own answers to ordinary prompts are learnt beside them, so that nothing else is lost.
- In the tiny world attention's matrices alone are trained. There are 33 values to obey, and a whole
  network learns them by heart: on one seed 19% then obeyed a value never trained on at turn 10
  (of an earlier chat model).
- Earlier answers in the tiny world's dialogues are sampled to each question alone, half of the
  dialogues with a share of answers that obey.
"""

from __future__ import annotations

import functools, json, math, random, re, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import data, kernels, model as M, plan, scale

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is sampled, and how it is learnt: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # model to start from; none: OUT/ppo.pt; paper: RLHF-V3 (§3.3)
    data: str | None = None  # .jsonl of dialogues; none: questions of the tiny world
    instructions: str | None = None  # .jsonl, see read_instructions; goes with --data
    out: str = "out"  # folder of checkpoints, metrics and figures
    seed: int = 0  # of questions, instructions, sampling and order
    dialogues: int = 900  # dialogues under an instruction; UNSPECIFIED in L2
    turns: int = 12  # questions of the longest; the paper's hold for 20 and more (§A.3.5)
    tries: int = 3  # samples until one obeys; paper: 1 (§3.3)
    replay: int = 1000  # ordinary prompts whose answers are learnt too; paper: 0 (§3.3)
    train: Literal["attention", "all"] = "attention"  # weights; from 7b on all, as in SFT (§3.3)
    epochs: int = 3  # passes over all examples; UNSPECIFIED in L2 (SFT: 2)
    batch_size: int = 4  # packed rows per step, over all ranks; UNSPECIFIED in L2
    micro_batch: int = 16  # rows per rank and forward pass; smaller needs less memory
    seq_len: int = 512  # tokens per packed row; paper: 4096 (§A.3.5)
    max_new_tokens: int = 80  # tokens of an answer
    lr: float = 0  # peak of the cosine; 0: by the model's width; UNSPECIFIED in L2
    eval_prompts: int = 200  # test dialogues per curve, and prompts of each kind for other skills
    save_every: int = 50  # steps between resume states
    resume: bool = False  # continue from out/gatt.state.pt if it is there
    skip_bad_rows: bool = False  # count and skip rows of the two files that are wrong
    show_batch: bool = False  # print one batch, loss in green and no loss in grey, and stop
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = 1  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


# From 7b on, in place of the defaults above, as in SFT [L2 §3.1].
PAPER = {"batch_size": 64, "micro_batch": 1, "seq_len": 4096, "train": "all"}
TEMPERATURE = 0.7  # of the answers that are learnt; UNSPECIFIED in L2
LOG_EVERY = 5  # steps between two lines on the screen and in out/gatt.jsonl
EVAL_TURNS = 10  # or as many as fit the context; paper: 20 (Table 30)
ROOM = 32  # tokens that every test dialogue must have left for its next answer
BIN = 8  # neighbouring tokens that are drawn as one (Fig. 10)

# ------------------------------------------------------------------------------------ the idea


def repeat_instruction(instruction: str, messages: list[dict]) -> list[dict]:
    """Every user message carries the instruction: how answers are sampled [L2 §3.3]."""
    return [{**m, "content": f"{instruction} {m['content']}"} if m["role"] == "user" else m
            for m in messages]


def keep_first(instruction: str, messages: list[dict]) -> list[dict]:
    """The first turn alone has it, as system message: how answers are learnt, and asked for later.

    "drop it in all but the first turn" [L2 §3.3]; that it goes into the system message and not in
    front of u1 is our reading of "system message" in the same paragraph.
    """
    return [{"role": "system", "content": instruction}, *messages]


def last_answer_only(tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(tokens, loss_mask): loss on the last answer and its EOS, 0 on all else, answers included.

    Most earlier answers were not given under the instruction; learning them would teach to ignore
    it: "we simply set the loss to 0 for all the tokens from the previous turns" [L2 §3.3].
    """
    tokens, _ = data.encode_dialog(tokenizer, messages)
    given = len(data.encode_dialog(tokenizer, messages[:-1])[0])  # an open dialogue is a prefix
    return tokens, [0] * given + [1] * (len(tokens) - given)


def answer_loss(model, tokens, loss_mask, segments):
    """Summed -log p of the tokens where loss_mask is 1: int64 (B, T+1) each -> scalar, nats."""
    hidden = kernels.trunk(model, tokens[:, :-1], segments=segments[:, :-1])  # (B, T, D)
    logp = kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], loss_mask[:, 1:])
    return -logp.sum()


def learning_rate(step: int, total: int, peak: float, warmup: int = 5) -> float:
    """Cosine from `peak` to a tenth of it, as in SFT (UNSPECIFIED in L2)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(progress, 1.0))))


def default_lr(dim: int) -> float:
    """2e-5 from 7b on, as SFT [L2 §3.1]; below, by the width: 1.5e-3 for the tiny 128."""
    return 2e-5 if dim >= 4096 else 1.5e-3 * 128 / dim


# ------------------------------------------------------------------------------------ the data


def read_instructions(path, skip_bad_rows: bool = False) -> list[dict]:
    """Rows {"instruction": "Act as Plato.", "contains": ["I am Plato."]} of a .jsonl file.

    contains: what an answer that obeys must hold, word for word. Give an instruction a second,
    terse row ("Figure: Plato."), as the paper does half of the time. ValueError: file and line.
    """
    def parse(row: dict) -> dict:
        instruction = data.field(row, "instruction", str)
        contains = data.field(row, "contains", list)
        data.check_dialog([{"role": "user", "content": instruction}])  # no chat tags in it
        if not contains or not all(isinstance(text, str) and text for text in contains):
            raise ValueError('"contains" must list at least one text that an answer has to hold')
        return {"instruction": instruction, "contains": contains}
    return list(data.read_rows(data.find_files(path, ".jsonl"), parse, skip_bad_rows))


def obeys(row: dict, answer: str) -> bool:
    """The string check: the answer holds everything that the instruction's row asks for."""
    return all(text in answer for text in row["contains"])


def tiny_world(cfg: Config) -> dict:
    """What there is to talk about. Instructions: half terse, some two in one [L2 §3.3, §A.3.5].

    {"dialogs": message lists that end with a question, earlier answers None: to be sampled;
    "instructions": a row for each; "prompts": ordinary ones for replay; for the test "questions",
    lists of EVAL_TURNS, and rows "seen" and "unseen", whose values are never trained on}
    """
    world = data.World()

    def rows(split, n, seed):
        return [{"instruction": text, "contains": re.findall(r"\w[^.!]*[.!]", world.obey(text, ""))}
                for text in world.instructions(split, n, seed)]

    test = cfg.seed + 1_000_003
    talks = world.conversations(cfg.turns, "train", cfg.dialogues, cfg.seed)
    lengths = [1 + int(cfg.turns * (i / cfg.dialogues) ** 0.8) for i in range(cfg.dialogues)]
    dialogs = [[{"role": role, "content": text if role == "user" else None}
                for text in texts[:length] for role in ("user", "assistant")][:-1]
               for texts, length in zip(talks, lengths)]  # late turns as often as early
    safety = cfg.replay // 3
    prompts = [row for mix, n in (("all", cfg.replay - safety), ("safety", safety))
               for row in world.prompts(mix, "train", n, test, data.STYLED)]
    return {"dialogs": dialogs, "instructions": rows("seen", cfg.dialogues, cfg.seed),
            "prompts": [row["messages"] for row in prompts],
            "questions": world.conversations(EVAL_TURNS, "test", cfg.eval_prompts, test),
            "seen": rows("seen", cfg.eval_prompts, test),
            "unseen": rows("unseen", cfg.eval_prompts, test)}


def own_files(cfg: Config) -> dict:
    """The same from --data and --instructions, a fifth of both held out for the test."""
    if not (cfg.data and cfg.instructions):
        raise ValueError("--data and --instructions go together: give both, or neither of them for "
                         "the tiny world")
    draw, parts = random.Random(cfg.seed), []
    for flag, rows in (("instructions", read_instructions(cfg.instructions, cfg.skip_bad_rows)),
                       ("data", data.read_dialogs(cfg.data, cfg.skip_bad_rows))):
        if len(rows) < 2:
            raise ValueError(f"--{flag}: one row; two are needed, to train on one and test another")
        draw.shuffle(rows)
        cut = len(rows) // 5 or 1
        parts += [rows[cut:], rows[:cut]]
    seen, unseen, train, test = parts
    train, test = ([[m for m in dialog if m["role"] != "system"] for dialog in part]
                   for part in (train, test))  # the instruction takes the system message's place
    questions = [m["content"] for dialog in test for m in dialog if m["role"] == "user"]
    return {"dialogs": [dialog[:-1] for dialog in draw.choices(train, k=cfg.dialogues)],
            "instructions": draw.choices(seen, k=cfg.dialogues),
            "prompts": [dialog[:1] for dialog in draw.choices(train, k=cfg.replay)],
            "questions": [draw.choices(questions, k=EVAL_TURNS) for _ in range(cfg.eval_prompts)],
            "seen": draw.choices(seen, k=cfg.eval_prompts),
            "unseen": draw.choices(unseen, k=cfg.eval_prompts)}


def answers_to(model, tokenizer, cfg: Config, dialogs: list, temperature=1.0, seed=0, **rows):
    """(texts, share that ended with EOS): one answer to each open dialogue, fit to be history.

    rows: `kernels.rollout`'s row_ids and memory.
    """
    prompts = [data.encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    tokens, _ = scale.rollout(model, prompts, cfg.max_new_tokens, temperature=temperature,
                                seed=seed, stop=tokenizer.eos_id, **rows)
    ended = sum(row[-1] == tokenizer.eos_id for row in tokens) / len(tokens)
    return [data.break_tags(tokenizer.decode(row).strip()) for row in tokens], ended


def sample_examples(model, tokenizer, material: dict, cfg: Config) -> list[dict]:
    """The training rows {"kind": "ghost" | "replay", "messages"}; every answer is the model's own.

    1) Questions inside a dialogue that have no answer yet get one, asked alone; in half of the
       dialogues a share of them, drawn from 0 to 1, with the instruction. A dialogue in which the
       model obeys has answers that obey: with none in training, one seed forgot on turns 3 to 6.
    2) The last one is answered with the instruction on every turn; what disobeys is tried again.
    3) What obeys is kept, under the instruction on the first turn.
    4) Ordinary prompts get ordinary answers.
    """
    answer = functools.partial(answers_to, model, tokenizer, cfg, temperature=TEMPERATURE)
    said = lambda text: {"role": "assistant", "content": text}
    dialogs, rows, prompts = (material[k] for k in ("dialogs", "instructions", "prompts"))
    gaps, rng = [], random.Random(cfg.seed)  # (dialogue, place of the answer, prompt)
    for row, dialog in zip(rows, dialogs):
        share = max(0.0, rng.uniform(-1, 1))
        for i, message in enumerate(dialog):
            if message["content"] is None:
                prompt = dialog[i - 1:i]
                if rng.random() < share:
                    prompt = repeat_instruction(row["instruction"], prompt)
                gaps.append((dialog, i, prompt))
    texts = answer([prompt for *_, prompt in gaps], seed=cfg.seed)[0] if gaps else []
    for (dialog, i, _), text in zip(gaps, texts):
        dialog[i] = said(text)

    asked = [repeat_instruction(row["instruction"], dialog) for row, dialog in zip(rows, dialogs)]
    lengths = [len(data.encode_dialog(tokenizer, messages)[0]) for messages in asked]
    fitting = [i for i, n in enumerate(lengths) if n + cfg.max_new_tokens <= cfg.seq_len]
    kept = {}
    for attempt in range(cfg.tries):
        todo = [i for i in fitting if i not in kept]
        texts = answer([asked[i] for i in todo], seed=cfg.seed + attempt)[0] if todo else []
        kept |= {i: text for i, text in zip(todo, texts) if obeys(rows[i], text)}
    print(f"{len(fitting)} of {len(dialogs)} dialogues fit --seq-len {cfg.seq_len}, {len(kept)} "
          f"answers obey after up to {cfg.tries} samples")
    if not kept:
        raise ValueError(f"no answer obeys its instruction, such as {rows[0]['instruction']!r}: a "
                         f"model must follow instructions before GAtt can make them last")
    texts = answer(prompts, seed=cfg.seed)[0] if prompts else []
    ghosts = [[*keep_first(rows[i]["instruction"], dialogs[i]), said(kept[i])]
              for i in sorted(kept)]
    replay = [[*prompt, said(text)] for prompt, text in zip(prompts, texts)]
    return [{"kind": kind, "messages": messages} for kind, part in
            (("ghost", ghosts), ("replay", replay)) for messages in part]


def pack(examples: list[tuple[list[int], list[int]]], width: int):
    """Whole dialogues in rows of `width` tokens: int64 (N, width) tokens, loss_mask, segments.

    As in SFT: a token sees its own dialogue only. Padding: token 0, mask 0, segment -1.
    """
    rows, room = [], 0
    for tokens, mask in examples:
        assert len(tokens) <= width, f"dialogue of {len(tokens)} tokens in rows of {width}"
        if len(tokens) > room:
            rows.append(([], [], []))
            room = width
        row = rows[-1]
        number = row[2][-1] + 1 if row[2] else 0
        for column, part in zip(row, (tokens, mask, [number] * len(tokens))):
            column.extend(part)
        room -= len(tokens)
    return tuple(torch.tensor([r[i] + [fill] * (width - len(r[i])) for r in rows])
                 for i, fill in enumerate((0, 0, -1)))


def pack_epochs(examples: list[dict], tokenizer, cfg: Config):
    """All rows of the run: ghosts and replay mixed, every epoch shuffled and packed anew."""
    encoded = [last_answer_only(tokenizer, row["messages"]) for row in examples]
    encoded = [(tokens, mask) for tokens, mask in encoded if len(tokens) <= cfg.seq_len + 1]
    epochs = [pack(random.Random(f"{cfg.seed} {epoch}").sample(encoded, len(encoded)),
                   cfg.seq_len + 1) for epoch in range(cfg.epochs)]
    return tuple(torch.cat(columns) for columns in zip(*epochs))


def batch_at(step: int, rows, cfg: Config, ranks):
    """This rank's part of the batch of `step`: a pure function of it, so that a run can resume."""
    mine = step * cfg.batch_size + torch.tensor(list(ranks.rows(cfg.batch_size)))
    real = mine < len(rows[0])  # past the end: row 0 without loss, as all ranks must run alike
    tokens, mask, segments = (column[mine.where(real, 0)] for column in rows)
    return tuple(t.to(ranks.device) for t in (tokens, mask * real[:, None], segments))


# ---------------------------------------------------------------------------------- evaluation


def converse(model, tokenizer, cfg: Config, rows, questions, place) -> tuple[list[float], list]:
    """Answer every question in turn, the model's own earlier answers in view, at temperature 1.

    Returns the share of answers that obey, by turn, and the dialogues as they were read. place:
    `keep_first` asks for memory, `repeat_instruction` gives the ceiling. A dialogue leaves when it
    has no ROOM in the context; ends after EVAL_TURNS, or when fewer than half are left.
    """
    talks, held, alive = [[] for _ in rows], [], list(range(len(rows)))
    memory = kernels.Memory()
    for turn in range(EVAL_TURNS):
        opened = {i: [*talks[i], {"role": "user", "content": questions[i][turn]}] for i in alive}
        asked = {i: place(rows[i]["instruction"], talk) for i, talk in opened.items()}
        alive = [i for i in alive if len(data.encode_dialog(tokenizer, asked[i])[0]) + ROOM
                 <= model.config.max_seq_len]
        if 2 * len(alive) < len(rows) or not alive:
            break
        answers, _ = answers_to(model, tokenizer, cfg, [asked[i] for i in alive], seed=turn,
                                row_ids=alive, memory=memory)
        held.append(sum(obeys(rows[i], text) for i, text in zip(alive, answers)) / len(alive))
        for i, text in zip(alive, answers):
            talks[i] = [*opened[i], {"role": "assistant", "content": text}]
    return held, [place(row["instruction"], talk) for row, talk in zip(rows, talks)]


@torch.no_grad()
def attention_map(model, tokens: list[int]):
    """The largest attention weight over layers and heads: float32 (T, T), row t looks at column s.

    The network keeps no weights (its attention is fused), so they are computed once more from its
    queries and keys: softmax(q k^T / sqrt(hd)) over the past [L2 Fig. 10].
    """
    c, T, found = model.config, len(tokens), []
    hooks = [w.register_forward_hook(lambda w, x, out: found.append(out[0]))  # (T, H*hd or KV*hd)
             for layer in model.layers for w in (layer.attention.wq, layer.attention.wk)]
    model.hidden(torch.tensor([tokens], device=model.tok_embeddings.weight.device))
    for hook in hooks:
        hook.remove()
    cos, sin = (table[:T] for table in model.rope(torch.float32, found[0].device))
    heads = [M.rotate(x.float().unflatten(-1, (-1, c.head_dim)), cos, sin).transpose(0, 1)
             for x in found]  # q (H, T, hd), k (KV, T, hd), q, k, ... layer by layer
    future = torch.ones(T, T, dtype=torch.bool, device=cos.device).triu(1)
    strongest = torch.zeros(T, T, device=cos.device)
    for q, k in zip(heads[::2], heads[1::2]):
        k = k.repeat_interleave(len(q) // len(k), 0)  # one per query head: 0 0 1 1
        scores = (q @ k.mT / c.head_dim ** 0.5).masked_fill(future, -math.inf)  # (H, T, T)
        strongest = torch.maximum(strongest, scores.softmax(-1).amax(0))
    return scale.ranks_of(model).max(strongest.cpu())  # tp ranks saw their own heads


def system_span(tokenizer, messages: list[dict]) -> slice:
    """Where the system message stands among the tokens: what is there more with it than without."""
    told, plain = (data.encode_dialog(tokenizer, m)[0] for m in (messages, messages[1:]))
    start = next(i for i, (a, b) in enumerate(zip(told, plain)) if a != b)
    return slice(start, start + len(told) - len(plain))


@torch.no_grad()
def beside_the_others(model, tokenizer, cfg: Config) -> dict:
    """{"kl", "reward_helpful", "reward_safety"} on test prompts of the tiny world, by what OUT has.

    kl: nats per answer from OUT/sft.pt, at temperature 1. Rewards: mean raw scores of the newest
    reward models, helpfulness on harmless prompts, safety on unsafe ones.
    """
    out, world, device = Path(cfg.out), data.World(), model.output.weight.device
    newest = max(out.glob("refreshed_*/"), key=lambda p: int(p.name.split("_")[1]), default=out)
    found = {}
    for mix, files in (("helpful", {"kl": out / "sft.pt",
                                    "reward_helpful": newest / "reward_helpful.pt"}),
                       ("unsafe", {"reward_safety": newest / "reward_safety.pt"})):
        prompts = [data.encode_dialog(tokenizer, row["messages"])[0]
                   for row in world.prompts(mix, "test", cfg.eval_prompts, 11)]
        answers, logp = kernels.rollout(model, prompts, cfg.max_new_tokens, seed=cfg.seed,
                                        stop=tokenizer.eos_id)
        lengths = torch.tensor([len(p) + len(a) for p, a in zip(prompts, answers)])
        tokens = torch.tensor([p + a + [0] * (int(lengths.max()) - len(p) - len(a))
                               for p, a in zip(prompts, answers)])  # (B, T)
        at = torch.arange(1, tokens.shape[1])
        starts = torch.tensor(list(map(len, prompts)))
        mask = (at >= starts[:, None]) & (at < lengths[:, None])  # (B, T-1): answer tokens
        tokens, lengths, mask = tokens.to(device), lengths.to(device), mask.to(device)
        for name, path in files.items():
            other = M.load(path, device)[0] if path.exists() else None
            if other is None or other.config.vocab_size != model.config.vocab_size:
                continue  # a folder without that stage, or of another model
            hidden = kernels.trunk(other, tokens, lengths=lengths)
            if name == "kl":
                theirs = kernels.token_logprobs(hidden[:, :-1], other.output.weight, tokens[:, 1:],
                                                mask).sum().item()
                found[name] = (sum(map(sum, logp)) - theirs) / len(prompts)
            else:
                last = hidden[torch.arange(len(prompts), device=device), lengths - 1]
                found[name] = F.linear(last, other.output.weight).mean().item()
    return found


def evaluate(model, tokenizer, material: dict, cfg: Config, when: str, talk=None) -> dict:
    """Consistency by turn for instructions seen and unseen in training, attention, other skills.

    talk: the dialogue to look at the attention in; none: the first of the test, as this model
    leads it. Prints the counterpart of Table 30, a column per turn.
    """
    report = {}
    for name, rows, place in (("seen", "seen", keep_first), ("unseen", "unseen", keep_first),
                              ("ceiling", "seen", repeat_instruction)):
        report[name], talks = converse(model, tokenizer, cfg, material[rows],
                                       material["questions"], place)
        report.setdefault("talks", talks)
        print(f"{when:>6}, {name:<7} " + " ".join(f"{s:.2f}" for s in report[name]), flush=True)
    report["talk"] = talk or report["talks"][0]
    tokens, mask = last_answer_only(tokenizer, report["talk"])
    report["map"] = attention_map(model, tokens)
    looks = report["map"][torch.tensor(mask).bool(), system_span(tokenizer, report["talk"])]
    report["attention"] = looks.amax(1).mean().item()  # mean over the answer's tokens
    print(f"{when:>6}, attention of the last answer to the instruction: {report['attention']:.2f}")
    if not cfg.data:  # the annotator grades what was asked, besides the style
        annotator = data.Annotator(data.World())
        golds = [annotator.gold(messages[:i], m["content"])["helpful"]
                 for messages in report["talks"]
                 for i, m in enumerate(messages) if m["role"] == "assistant"]
        report["helpful_under_instruction"] = sum(golds) / len(golds)
        report |= annotator.examine(functools.partial(answers_to, model, tokenizer, cfg),
                                    cfg.eval_prompts) | beside_the_others(model, tokenizer, cfg)
    return report


def draw_figure(out: Path, before: dict, after: dict) -> Path:
    """Consistency by turn, and Fig. 10's two triangles, in out/figures/gatt.png."""
    import matplotlib
    matplotlib.use("Agg")  # a file, not a window
    import matplotlib.pyplot as plt

    figure, (curves, *maps) = plt.subplots(1, 3, figsize=(18, 4.6), layout="constrained")
    for report, when, style in ((before, "before", "o--"), (after, "after GAtt", "o-")):
        for name, color in (("seen", "tab:blue"), ("unseen", "tab:orange")):
            curves.plot(range(1, len(report[name]) + 1), report[name], style, color=color,
                        markersize=4, label=f"{name} values, {when}")
    for report, when, color in ((before, "before", "0.6"), (after, "after GAtt", "k")):
        curves.plot(range(1, len(report["ceiling"]) + 1), report["ceiling"], ":", color=color,
                    label=f"ceiling: told on every turn, {when}")
    curves.set(title="The instruction is given on turn 1 only", xlabel="turn", ylim=(0, 1.02),
               ylabel="share of answers that obey")
    curves.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    curves.grid(alpha=0.3)
    for panel, report, when in zip(maps, (before, after), ("before", "after GAtt")):
        binned = F.max_pool2d(report["map"][None], BIN, ceil_mode=True)[0]
        end = len(binned) * BIN
        image = panel.imshow(binned, cmap="magma", vmin=0, vmax=1, extent=(0, end, end, 0))
        panel.set(title=f"Attention in one dialogue, {when}", ylabel="token that looks",
                  xlabel="token looked at (the system message first)")
        figure.colorbar(image, ax=panel, label="largest weight over layers and heads")
    path = out / "figures" / "gatt.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    return path


# ---------------------------------------------------------------------------------------- main


def train_step(model, optimizer, rows, lr: float, cfg: Config, ranks) -> tuple[float, float]:
    """One optimizer step on this rank's rows: (loss in nats per answer token, gradient norm)."""
    answers = ranks.sum(rows[1][:, 1:].sum().item())
    total = 0.0
    for piece in zip(*(column.split(cfg.micro_batch) for column in rows)):
        with M.autocast(ranks.device):
            nats = answer_loss(model, *piece)
        # FSDP averages gradients over its ranks; times their number makes that a sum
        (nats * (ranks.dp / answers)).backward()
        total += nats.item()
    loss = ranks.sum(total) / answers
    norm = scale.clip(model, 1.0)
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}: training diverged; a smaller "
                                 f"--lr (now {lr:.2g}) helps")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def let_learn(model, which: str) -> None:
    """which: "all" weights, or those of "attention" alone, which decides where to look back to."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(which == "all" or ".attention.w" in name)


def train(model, rows, first: int, optimizer, tokenizer, cfg: Config, ranks) -> None:
    """The loop over packed `rows`, from step `first` on, as in SFT."""
    total = math.ceil(len(rows[0]) / cfg.batch_size)
    log = M.Log("gatt", cfg.out, total, first if cfg.resume else None)
    for step in range(first, total):
        if step % cfg.save_every == 0:  # step 0 too: from then on nothing is sampled again
            info = M.resume_info(step, total, cfg, tokenizer.model_bytes)
            scale.save_state(Path(cfg.out) / "gatt.state.pt", model, optimizer, info, ranks)
        # 1) batch
        batch = batch_at(step, rows, cfg, ranks)
        # 2) forward and loss  3) backward, clip, step
        lr = learning_rate(step, total, cfg.lr or default_lr(model.config.dim))
        loss, norm = train_step(model, optimizer, batch, lr, cfg, ranks)
        # 4) log
        if (step + 1) % LOG_EVERY == 0 or step + 1 == total:
            log.step(step + 1, loss=loss, lr=lr, grad_norm=norm)


def main(cfg: Config) -> dict:
    """Sample, fine-tune, evaluate, save; returns the final metrics. ValueError for bad flags."""
    began, out = time.time(), Path(cfg.out)
    checkpoint, state, kept = (cfg.checkpoint or out / "ppo.pt", out / "gatt.state.pt",
                               out / "gatt_dialogues.jsonl")
    config = plan.shape_of(checkpoint, cfg.model, cfg.dry_run)
    cfg = M.at_size(cfg, PAPER, config.dim)
    if not cfg.max_new_tokens < cfg.seq_len <= config.max_seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len}: more than --max-new-tokens "
                         f"{cfg.max_new_tokens}, at most this model's context {config.max_seq_len}")
    if cfg.dry_run:
        plan.dry_run(config, cfg.batch_size, cfg.seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     device=cfg.device)
        return {}
    model, info = M.load(checkpoint, "cpu")
    tokenizer = data.Tokenizer(info["tokenizer"])
    material = own_files(cfg) if cfg.data or cfg.instructions else tiny_world(cfg)
    ranks = scale.setup(cfg.device, cfg.tp)
    print(kernels.choose(cfg.kernels, ranks.device))
    model = scale.wrap(model, ranks, recompute=cfg.recompute)
    let_learn(model, cfg.train)
    optimizer = M.adamw(model, 0.0, 0.1)
    saved = scale.load_state(state, model, optimizer, ranks, check=lambda extra: M.check_resume(
        extra, cfg, tokenizer.model_bytes)) if cfg.resume else None
    if saved:
        examples = [json.loads(line) for line in kept.read_text().splitlines()]
    else:
        with scale.unsharded(model):
            examples = sample_examples(model, tokenizer, material, cfg)
        scale.remove_state(state, ranks)  # of another run: its examples are replaced now
        if ranks.is_main:
            text = "".join(json.dumps(row) + "\n" for row in examples)
            M.atomic_write(kept, lambda f: f.write(text.encode()))
    rows = pack_epochs(examples, tokenizer, cfg)
    print(f"{len(rows[0]) / cfg.epochs:.0f} rows of {cfg.seq_len} tokens, "
          f"{rows[1].float().mean():.0%} of them trained")
    if cfg.show_batch:
        for tokens, mask in zip(rows[0][:4].tolist(), rows[1][:4].tolist()):
            print(data.show_dialog(tokenizer, tokens, mask), end="\n\n")
        return {}
    train(model, rows, saved["step"] if saved else 0, optimizer, tokenizer, cfg, ranks)

    # 5) evaluate, save
    start = scale.wrap(M.load(checkpoint, "cpu")[0], ranks)
    with scale.unsharded(start), scale.unsharded(model):
        before = evaluate(start, tokenizer, material, cfg, "before")
        after = evaluate(model, tokenizer, material, cfg, "after", before["talk"])
    final = {"minutes": (time.time() - began) / 60, "dialogues": cfg.eval_prompts}
    for when, report in (("before", before), ("after", after)):
        final[when] = {k: v for k, v in report.items() if k not in ("map", "talk", "talks")}
    weights = scale.full_weights(model)
    if ranks.is_main:
        M.save(out / "gatt.pt", model, "gatt", tokenizer.model_bytes, final,
               cfg.data or "the tiny world", weights=weights)
        figure = draw_figure(out, before, after)
        M.summarize("gatt", out, final)
        print(f"wrote {out}/gatt.pt and {figure}; next: python chat.py --checkpoint {out}/gatt.pt")
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    M.run(main, Config)
