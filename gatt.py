"""Ghost Attention: an instruction given once is followed to the end of the dialogue [L2 §3.3].

A chat model forgets "Act as Plato." after a few turns. GAtt needs no new network and no new loss,
only a trick with the data. An answer is sampled while *every* user message repeats the instruction,
and learnt while only the system message (<<inst>>) has it. u: user, a: answer, E: its EOS:

    sampled  [INST] inst u1 [/INST] a1 E [INST] inst u2 [/INST] a2 E [INST] inst u3 [/INST] -> a3 E
    learnt   [INST] <<inst>> u1 [/INST] a1 E [INST] u2 [/INST] a2 E [INST] u3 [/INST] a3 E
    loss       0       0     0     0    0  0   0    0     0    0  0   0    0     0    1  1

in  : out/ppo.pt, and questions of the village or your own (--data and --instructions)
out : out/gatt.pt, out/gatt_dialogues.jsonl, out/gatt.jsonl
run : python gatt.py                                      about 1.3 minutes on two AVX2 cores
      python gatt.py --show-batch                         look at what carries loss, then stop

Expect an instruction that was gone on turn 2 to be followed on turn 10 as often as one that is
repeated on every turn; with values that no stage trained on 58 to 86% as often (`python exam.py
gatt`).

Keys: [L2] Llama 2, arXiv 2307.09288.

Differs from the paper:
- It comes after PPO; the paper has it from RLHF V3 on.
- Figures, greetings and hobbies from fixed lists; the paper's: hobbies, languages, public figures,
  the lists written by the chat model itself.
- Up to --tries answers are sampled; one that fails the instruction's string check is not kept.
- The model's own answers to ordinary prompts are learnt beside them, so that nothing else is lost.
- In the village attention's matrices alone are trained. There are 33 values to obey, and a whole
  network learns them by heart: on one seed 19% then obeyed a value never trained on at turn 10
  (of an earlier chat model).
- Earlier answers in the village's dialogues are sampled to each question alone, half of the
  dialogues with a share of answers that obey.
"""

from __future__ import annotations

import dataclasses, functools, json, math, random, re, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import data, kernels, model as M, plan, rollouts, scale, stage, village as V
from stage import ranged

STAGE = "gatt"  # OUT/gatt.pt

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is sampled, and how it is learnt: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # model to start from; none: OUT/ppo.pt; paper: RLHF-V3 (§3.3)
    data: str | None = None  # .jsonl of dialogues; none: questions of the village
    instructions: str | None = None  # .jsonl, see read_instructions; goes with --data
    out: str = "out"  # folder of checkpoints and metrics
    seed: int = ranged(0, least=0)  # of questions, instructions, sampling and order
    dialogues: int = ranged(900, least=1)  # dialogues under an instruction; UNSPECIFIED in L2
    turns: int = ranged(12, least=1)  # questions of the longest; UNSPECIFIED in L2 (tested to 20)
    tries: int = ranged(3, least=1)  # samples until one obeys; UNSPECIFIED in L2
    replay: int = ranged(1000, least=0)  # ordinary prompts, answers learnt too; paper: none said
    train: Literal["attention", "all"] = "attention"  # weights; from 7b on all, as in SFT (§3.3)
    epochs: int = ranged(3, least=1)  # passes over all examples; UNSPECIFIED in L2 (SFT: 2)
    batch_size: int = ranged(4, least=1)  # packed rows per step, over all ranks; UNSPECIFIED in L2
    micro_batch: int = ranged(16, least=1)  # rows per rank and forward pass: less memory
    seq_len: int = ranged(512, least=2)  # tokens per packed row; UNSPECIFIED in L2 (SFT: 4096)
    max_new_tokens: int = ranged(80, least=1)  # tokens of an answer
    lr: float = ranged(0, least=0)  # peak of the cosine; 0: by width; UNSPECIFIED in L2
    save_every: int = ranged(50, least=1)  # steps between resume states
    resume: bool = False  # continue from out/gatt.state.pt if it is there
    skip_bad_rows: bool = False  # count and skip rows of the two files that are wrong
    show_batch: bool = False  # print one batch, loss in green and no loss in grey, and stop
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = ranged(1, least=1)  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


TEMPERATURE = 0.7  # of the answers that are learnt; UNSPECIFIED in L2
LOG_EVERY = 5  # steps between two lines on the screen and in out/gatt.jsonl

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
    # as in SFT: the network without its head, then log p of the next tokens where the mask is 1
    hidden = kernels.trunk(model, tokens[:, :-1], segments=segments[:, :-1])  # (B, T, D)
    logp = kernels.token_logprobs(hidden, model.output.weight, tokens[:, 1:], loss_mask[:, 1:])
    return -logp.sum()


def default_lr(dim: int) -> float:
    """Inversely to the width: 1.5e-3 for the tiny 128; plan.SETTINGS has that from 7b on."""
    return 1.5e-3 * 128 / dim


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


class Material(NamedTuple):
    """What there is to talk about."""

    dialogs: list  # message lists that end with a question; earlier answers None: to be sampled
    instructions: list  # a row for each dialogue
    prompts: list  # ordinary open dialogues, for replay


def rows_of(village: V.Village, instructions: list[str]) -> list[dict]:
    """The village's instructions in the form of `read_instructions`."""
    rows = []
    for text in instructions:
        sentences = re.findall(r"\w[^.!]*[.!]", village.obey(text, ""))
        rows.append({"instruction": text, "contains": sentences})
    return rows


def of_village(cfg: Config, village: V.Village) -> Material:
    """Questions and instructions of the village: half terse, some two in one [L2 §3.3, §A.3.5]."""
    talks = village.conversations(cfg.turns, "train", cfg.dialogues, cfg.seed)
    dialogs = []
    for i, questions in enumerate(talks):
        length = 1 + int(cfg.turns * (i / cfg.dialogues) ** 0.8)  # late turns as often as early
        messages = []
        for text in questions[:length]:
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": None}]
        dialogs.append(messages[:-1])
    safety = cfg.replay // 3
    prompts = []
    for mix, n in (("all", cfg.replay - safety), ("safety", safety)):
        rows = village.prompts(mix, "train", n, cfg.seed + 1_000_003, V.STYLED)
        prompts += [row["messages"] for row in rows]
    instructions = village.instructions("seen", cfg.dialogues, cfg.seed)
    return Material(dialogs, rows_of(village, instructions), prompts)


def own_files(cfg: Config) -> tuple[dict, dict, random.Random]:
    """({"instructions", "dialogs"} to train on, the same held out, a fifth of each; the dice)."""
    if not (cfg.data and cfg.instructions):
        raise ValueError("--data and --instructions go together: give both, or neither of them for "
                         "the village")
    rng = random.Random(cfg.seed)
    train, test = {}, {}
    for name, flag, rows in (
            ("instructions", "--instructions", read_instructions(cfg.instructions,
                                                                 cfg.skip_bad_rows)),
            ("dialogs", "--data", data.read_dialogs(cfg.data, cfg.skip_bad_rows))):
        if len(rows) < 2:
            raise ValueError(f"{flag}: one row; two are needed, to train on one and test another")
        rng.shuffle(rows)
        cut = len(rows) // 5 or 1
        train[name], test[name] = rows[cut:], rows[:cut]
    for part in (train, test):  # the instruction takes the system message's place
        part["dialogs"] = [[m for m in dialog if m["role"] != "system"]
                           for dialog in part["dialogs"]]
    return train, test, rng


def of_own_files(cfg: Config) -> Material:
    """The same from --data and --instructions."""
    train, _, rng = own_files(cfg)
    dialogs = [dialog[:-1] for dialog in rng.choices(train["dialogs"], k=cfg.dialogues)]
    instructions = rng.choices(train["instructions"], k=cfg.dialogues)
    prompts = [dialog[:1] for dialog in rng.choices(train["dialogs"], k=cfg.replay)]
    return Material(dialogs, instructions, prompts)


def assistant(text: str) -> dict:
    """An answer as a message; tags in it must not forge a turn when it is read again."""
    return {"role": "assistant", "content": data.break_tags(text)}


def sample_examples(model, tokenizer, material: Material, cfg: Config) -> list[dict]:
    """The training rows {"kind": "ghost" | "replay", "messages"}; every answer is the model's own.

    1) Questions inside a dialogue that have no answer yet get one, asked alone; in half of the
       dialogues a share of them, drawn from 0 to 1, with the instruction. A dialogue in which the
       model obeys has answers that obey: with none in training, one seed forgot on turns 3 to 6.
    2) The last one is answered with the instruction on every turn; what disobeys is tried again.
    3) What obeys is kept, under the instruction on the first turn.
    4) Ordinary prompts get ordinary answers.
    """
    def answer(dialogs: list, seed: int) -> list[str]:
        if not dialogs:
            return []
        return rollouts.answer(model, tokenizer, dialogs, cfg.max_new_tokens, TEMPERATURE,
                               seed).texts

    # 1) earlier answers
    dialogs, instructions, prompts = material
    rng = random.Random(cfg.seed)
    blanks = []  # (dialogue, index of the answer in it, prompt)
    for row, dialog in zip(instructions, dialogs):
        share = max(0.0, rng.uniform(-1, 1))  # 0 for half of the dialogues, else uniform in 0..1
        for i, message in enumerate(dialog):
            if message["content"] is None:
                prompt = dialog[i - 1:i]
                if rng.random() < share:
                    prompt = repeat_instruction(row["instruction"], prompt)
                blanks.append((dialog, i, prompt))
    texts = answer([prompt for *_, prompt in blanks], cfg.seed)
    for (dialog, i, _), text in zip(blanks, texts):
        dialog[i] = assistant(text)

    # 2) the last answer
    asked = [repeat_instruction(row["instruction"], dialog)
             for row, dialog in zip(instructions, dialogs)]
    lengths = [len(data.encode_dialog(tokenizer, messages)[0]) for messages in asked]
    fitting = [i for i, n in enumerate(lengths) if n + cfg.max_new_tokens <= cfg.seq_len]
    kept = {}
    for attempt in range(cfg.tries):
        left = [i for i in fitting if i not in kept]
        texts = answer([asked[i] for i in left], cfg.seed + attempt)
        for i, text in zip(left, texts):
            if obeys(instructions[i], data.break_tags(text)):
                kept[i] = text
    print(f"{len(fitting)} of {len(dialogs)} dialogues fit --seq-len {cfg.seq_len}, {len(kept)} "
          f"answers obey after up to {cfg.tries} samples")
    if not kept:
        raise ValueError(f"no answer obeys its instruction, such as "
                         f"{instructions[0]['instruction']!r}: a model must follow instructions "
                         f"before GAtt can make them last")

    # 3) what is learnt  4) and what must not be forgotten
    examples = []
    for i in sorted(kept):
        messages = keep_first(instructions[i]["instruction"], dialogs[i])
        examples.append({"kind": "ghost", "messages": [*messages, assistant(kept[i])]})
    for prompt, text in zip(prompts, answer(prompts, cfg.seed)):
        examples.append({"kind": "replay", "messages": [*prompt, assistant(text)]})
    return examples


def encode(examples: list[dict], tokenizer, seq_len: int) -> list[tuple[list[int], list[int]]]:
    """(tokens, loss_mask) of the examples that fit a row, ghosts and replay alike."""
    encoded = [last_answer_only(tokenizer, row["messages"]) for row in examples]
    return [(tokens, mask) for tokens, mask in encoded if len(tokens) <= seq_len + 1]


def batch_at(step: int, rows, cfg: Config, ranks):
    """This rank's part of the batch of `step`: a pure function of it, so that a run can resume."""
    mine = step * cfg.batch_size + torch.tensor(list(ranks.rows(cfg.batch_size)))
    real = mine < len(rows[0])  # past the end: row 0 without loss, as all ranks must run alike
    tokens, mask, segments = (column[mine.where(real, 0)] for column in rows)
    return tuple(t.to(ranks.device) for t in (tokens, mask * real[:, None], segments))


# ------------------------------------------------------------------------------------ training


def let_learn(model, which: str) -> None:
    """which: "all" weights, or those of "attention" alone, which decides where to look back to."""
    for name, weight in model.named_parameters():
        weight.requires_grad_(which == "all" or ".attention.w" in name)


def train(model, optimizer, rows, cfg: Config, ranks, first: int = 0):
    """The loop: one optimizer step after another, as in SFT; yields (steps done, metrics).

    rows: tokens, loss_mask and segments, int64 (N, seq_len + 1) each, as `data.pack` makes them.
    """
    total = math.ceil(len(rows[0]) / cfg.batch_size)
    peak = cfg.lr or default_lr(model.config.dim)
    for step in range(first, total):
        # 1) batch; its answer tokens, counted over all ranks, are what the loss is a mean over
        tokens, mask, segments = batch_at(step, rows, cfg, ranks)
        answer_tokens = ranks.sum(mask[:, 1:].sum().item())
        # 2) forward, loss, backward: piece by piece, the gradients add up
        nats = 0.0
        size = cfg.micro_batch
        for piece in zip(tokens.split(size), mask.split(size), segments.split(size)):
            with M.autocast(ranks.device):
                share = answer_loss(model, *piece)
            # FSDP averages gradients over its ranks; times their number makes that a sum
            (share * (ranks.dp / answer_tokens)).backward()
            nats += share.item()
        loss = ranks.sum(nats) / answer_tokens
        # 3) clip, step
        norm = scale.clip(model, 1.0)
        lr = stage.cosine(step, total, peak, 5)
        stage.step(optimizer, lr, loss=loss, grad_norm=norm)
        yield step + 1, {"loss": loss, "lr": lr, "grad_norm": norm}


# ---------------------------------------------------------------------------------------- main


def main(cfg: Config) -> dict:
    """Sample, fine-tune, save; returns the final metrics. ValueError for bad flags."""
    began = time.time()
    stage.check(cfg)
    out = Path(cfg.out)
    state, kept = out / f"{STAGE}.state.pt", out / f"{STAGE}_dialogues.jsonl"
    source = cfg.checkpoint or out / "ppo.pt"
    config = plan.shape_of(source, cfg.model, cfg.dry_run)
    cfg = stage.at_size(cfg, plan.settings(STAGE, config))
    if not cfg.max_new_tokens < cfg.seq_len <= config.max_seq_len:
        raise ValueError(f"--seq-len {cfg.seq_len}: more than --max-new-tokens "
                         f"{cfg.max_new_tokens}, at most this model's context {config.max_seq_len}")
    if cfg.dry_run:
        plan.dry_run(config, cfg.batch_size, cfg.seq_len, cfg.micro_batch, cfg.recompute, cfg.tp,
                     device=cfg.device)
        return {}
    model, info = M.load(source, "cpu")
    tokenizer = data.Tokenizer(info["tokenizer"])
    village = V.Village(info["metrics"].get("village") or 0)
    has_files = cfg.data or cfg.instructions
    material = of_own_files(cfg) if has_files else of_village(cfg, village)
    ranks = scale.setup(cfg.device, cfg.tp)  # this process among others; alone: rank 0 of 1
    print(kernels.choose(cfg.kernels, ranks.device))
    model = scale.wrap(model, ranks, recompute=cfg.recompute)
    let_learn(model, cfg.train)
    optimizer = stage.adamw(model, 0.0, 0.1)  # lr: set at every step, by stage.step
    check_same = functools.partial(stage.check_resume, cfg=cfg, tokenizer=tokenizer.model_bytes)
    saved = scale.load_state(state, model, optimizer, ranks, check_same) if cfg.resume else None
    if saved:
        examples = [json.loads(line) for line in kept.read_text().splitlines()]
    else:
        with scale.unsharded(model):
            examples = sample_examples(model, tokenizer, material, cfg)
        scale.remove_state(state, ranks)  # of another run: its examples are replaced now
        if ranks.is_main:
            text = "".join(json.dumps(row) + "\n" for row in examples)
            M.atomic_write(kept, lambda f: f.write(text.encode()))
    encoded = encode(examples, tokenizer, cfg.seq_len)
    rows = data.pack_epochs(encoded, cfg.seq_len + 1, cfg.epochs, cfg.seed)
    print(f"{len(rows[0]) / cfg.epochs:.0f} rows of {cfg.seq_len} tokens, "
          f"{rows[1].float().mean():.0%} of them trained")
    if cfg.show_batch:
        for tokens, mask in zip(rows[0][:4].tolist(), rows[1][:4].tolist()):
            print(data.show_dialog(tokenizer, tokens, mask), end="\n\n")
        return {}
    first, total = saved["step"] if saved else 0, math.ceil(len(rows[0]) / cfg.batch_size)
    log = stage.Log(STAGE, out, total, first if saved else None,
                    watch=("loss", "lr", "grad_norm"))
    if not saved:  # from here on nothing is sampled again
        progress = stage.resume_info(0, total, cfg, tokenizer.model_bytes)
        scale.save_state(state, model, optimizer, progress, ranks)

    for done, metrics in train(model, optimizer, rows, cfg, ranks, first):
        # 4) log  5) once in a while: save
        if done % LOG_EVERY == 0 or done == total:
            log.step(done, **metrics)
        if done % cfg.save_every == 0 and done < total:
            progress = stage.resume_info(done, total, cfg, tokenizer.model_bytes)
            scale.save_state(state, model, optimizer, progress, ranks)

    final = {"loss": metrics["loss"], **stage.heritage(info), "flags": dataclasses.asdict(cfg),
             "minutes": (time.time() - began) / 60}
    if not has_files:
        final["village"] = village.number  # its questions, whatever was read before
    scale.save(out / f"{STAGE}.pt", model, STAGE, tokenizer.model_bytes, final,
               cfg.data or f"village {village.number}")
    print(f"loss of the last step {final['loss']:.4f} nats per answer token")
    print(stage.wrote(out / f"{STAGE}.pt", out, "chat.py", f"exam.py {STAGE}"))
    scale.remove_state(state, ranks)
    ranks.finish()
    return final


if __name__ == "__main__":
    stage.run(main, Config)
