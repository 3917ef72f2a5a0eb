"""Rejection sampling: the best of K answers is imitated, version after version [L2 §3.2.3].

Rejection sampling looks wide: K answers to each prompt from one frozen model, and the one that the
reward models score highest becomes a demonstration. (PPO, ppo.py, looks deep: one answer, and the
model moves after every batch.)

    distilled    = safer answers of the SFT model behind a preprompt, to the bare unsafe prompt
    for number in 1 .. 5:                                                       V1 to V5
        T        = the temperature with the highest mean best of K, newest version, valid prompts
        answers  = K answers of the newest version to each prompt, at T
        picks    = to each prompt, the finished answer with the highest score
        examples = the picks (from V4 on those of all rounds) + distilled
        version  = the SFT model, fine-tuned on the examples; it is the newest version now
        rewards  = the reward models, trained on with labelled answers of the two newest versions

in  : out/sft.pt, out/reward_helpful.pt, out/reward_safety.pt
out : out/rlhf_v1.pt .. rlhf_v5.pt, out/rlhf_control.pt,
      out/refreshed_N/: comparisons after round N, and the reward models trained on with them
run : python rejection.py                                 about 2 minutes on two AVX2 cores
      python rejection.py --reward my_reward.py:fn        your own fn(prompts, responses) -> scores

Expect the best of 8 to be worth .01 to .11 more than a random one by the gold score
(`python exam.py rejection`).

Keys: [L2] Llama 2, 2307.09288.

Differs from the paper:
- Rejection samples come from the model itself; the paper's smaller models learn the 70B's.
- Every version starts from the SFT model: our reading of the paper's "base model".
- Half or more of the first answers in comparisons are planted (village.Village.plant);
  temperatures are drawn from 0.8 and 1.0.
- Refreshing trains the reward models on instead of anew, with as many older comparisons.
- Context distillation is done once, by the SFT model, with one generic preprompt and no answer
  templates; where the gate rejects an answer nothing is learnt, the paper keeps the original.
- The prompts are in part those that the reward models were trained on.
- UNSPECIFIED in L2: K, prompts, learning rate and epochs (SFT's two); cut answers are never picked.
"""

from __future__ import annotations

import json, math, os, random, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import data, kernels, model as M, plan, rollouts, scale, stage, village as V
from rollouts import seed_of
from stage import ranged

STAGE = "rejection"

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """Versions and their rewards: each field is a flag, its comment the help text."""

    model: str | None = None  # preset that the checkpoint has; a dry run needs no checkpoint then
    checkpoint: str | None = None  # SFT model, where every version starts; none: OUT/sft.pt
    data: str | None = None  # .jsonl of prompts with is_safety; none: prompts of the village
    reward: str | None = None  # FILE.py:FUNCTION(prompts, responses) -> scores; none: our models
    out: str = "out"  # folder of checkpoints and metrics
    seed: int = ranged(0, least=0)  # of prompts and sampling
    rounds: int = ranged(5, least=1)  # versions to make; paper: V1 to V5 (§3.2.3)
    prompts: int = ranged(100, least=1)  # prompts per round; UNSPECIFIED in L2
    samples: int = ranged(8, least=1)  # K, answers per prompt; UNSPECIFIED in L2 (figures: to 100)
    comparisons: int = ranged(500, least=0)  # pairs to label after each round; paper: weekly
    rs_lr: float | None = ranged(None, above=0)  # of each fine-tuning; none: by size (RS_LR)
    batch_size: int = ranged(32, least=1)  # answers per step; UNSPECIFIED in L2 (SFT: 64, §3.1)
    # DEVIATES: 0.6 to 1.5 in Fig. 8; at hotter T the best of 8 by reward was worth no more gold
    # than a random one: broken answers fool the model.
    temperatures: str = "0.5,0.65,0.8"  # comma between; the best one of each round is sampled at
    threshold: float = ranged(0, least=0, below=1)  # gate on R_s; 0: calibrated; paper: 0.15
    max_new_tokens: int = ranged(80, least=1)  # tokens of an answer
    resume: bool = False  # continue after the last finished round
    recompute: bool = False  # recompute activations in the backward pass: less memory
    tp: int = ranged(1, least=1)  # tensor-parallel ranks, under torchrun
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles
    dry_run: bool = False  # print what the run would need, allocate nothing


RS_LR = {0: 2.5e-4, 768: 1e-4}  # width from which on, below 7b; plan.SETTINGS has SFT's above
PREPROMPT = "You are a responsible and safe assistant."  # generic, as in [L2 Table 39]
LADDER = (1, 2, 4, 8, 16, 32, 64, 100)  # N of best of N (Fig. 7)

# ------------------------------------------------------------------------------------ the idea


class Pick(NamedTuple):
    """Of the K answers to one prompt: its row, the best, and one at random (for the report alone;
    the control learns other answers, the SFT model's own)."""

    row: int
    best: int
    random: int


def pick(combined, finished, rng: random.Random) -> list[Pick]:
    """The answers to imitate, scores float and bool (N, K) -> at most N picks.

    An answer that was cut is never picked; a row without any finished answer is left out.
    """
    best = combined.masked_fill(~finished, -math.inf).argmax(1)
    picks = []
    for row, is_finished in enumerate(finished):
        choices = is_finished.nonzero().flatten().tolist()
        if choices:
            picks.append(Pick(row, best[row].item(), rng.choice(choices)))
    return picks


def merged(rounds: list, number: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) examples of version `number`, from the picks of rounds 1 to `number`.

    V1 to V3 imitate the newest model's samples alone; from V4 on the best of all rounds, since V3
    had forgotten skills of V1 and V2 [L2 §3.2.3].
    """
    used = rounds[number - 1:number] if number < 4 else rounds[:number]
    return [tuple(example) for examples in used for example in examples]


def imitate(model, examples: list[tuple[list[int], list[int]]], lr: float, batch_size: int,
            seed: int) -> float:
    """Fine-tune in place on (prompt, response) token lists, as in SFT; returns the last loss.

    Two epochs as there [L2 §3.1]; the loss is on the responses alone, per response token of the
    whole batch.
    """
    ranks = scale.ranks_of(model)
    optimizer = stage.adamw(model, lr, 0.1)
    size = min(batch_size, len(examples))
    order = []
    for epoch in range(2):
        order += random.Random(f"{seed} {epoch}").sample(range(len(examples)), len(examples))
    total = len(order) // size
    for step in range(total):
        # 1) batch: this rank's share, filled up with a row without loss: all ranks must run alike
        batch = order[step * size:(step + 1) * size]
        mine = range(ranks.dp_rank, -(-size // ranks.dp) * ranks.dp, ranks.dp)
        prompts, responses = zip(*(examples[batch[i % size]] for i in mine))
        tokens, lengths, mask = rollouts.pad_answers(prompts, responses, ranks.device)
        mask &= torch.tensor([i < size for i in mine], device=ranks.device)[:, None]
        # 2) forward and loss, over the answer tokens of all ranks
        answer_tokens = ranks.sum(mask.sum().item())
        logp = rollouts.response_logprobs(model, tokens, lengths, mask, 1.0)
        loss = -logp.sum() / answer_tokens
        # 3) backward, clip, step; FSDP averages gradients over its ranks: times their number, a sum
        (loss * ranks.dp).backward()
        scale.clip(model, 1.0)
        stage.step(optimizer, stage.cosine(step, total, lr, warmup=0), loss=loss.item())
    return ranks.sum(loss.item())


# ------------------------------------------------------------------------------------ a version


@dataclass
class Setting:
    """What every function below needs and none of them changes."""

    cfg: Config
    tokenizer: data.Tokenizer
    village: V.Village
    ranks: scale.Ranks
    info: dict  # of the SFT checkpoint

    def open(self, path) -> M.Llama:
        """A checkpoint in float32 on this rank, sharded if there are several."""
        return scale.wrap(M.load(path, "cpu")[0], self.ranks, recompute=self.cfg.recompute)

    @property
    def sft(self):
        return self.cfg.checkpoint or Path(self.cfg.out) / "sft.pt"

    def draw(self, purpose: str, count: int, split: str = "train") -> list[dict]:
        """Prompts of the user's file or of the village."""
        return rollouts.draw_prompts(self.cfg.data, self.village, count,
                                     seed_of(self.cfg.seed, "prompts", purpose), split)

    def answer(self, model, dialogs: list, temperature: float, *purpose) -> rollouts.Answers:
        """One answer to each open dialogue, with random numbers of its own for each purpose."""
        return rollouts.answer(model, self.tokenizer, dialogs, self.cfg.max_new_tokens,
                               temperature, seed_of(self.cfg.seed, *purpose))

    def save(self, path, model, name: str, metrics: dict) -> None:
        """One checkpoint, with where it came from."""
        scale.save(path, model, name, self.tokenizer.model_bytes,
                   {**metrics, **stage.heritage(self.info)},
                   self.cfg.data or f"prompts of village {self.village.number}")


def best_of(model, rows: list[dict], score, temperature: float, setting: Setting, *purpose):
    """K answers per row: Answers (N K), combined scores and finished (N, K)."""
    k = setting.cfg.samples
    many = [row for row in rows for _ in range(k)]  # [a, b] -> [a, a, b, b]
    answers = setting.answer(model, [row["messages"] for row in many], temperature, *purpose)
    # a cut answer is never picked; in the curve and the ladder it counts with the lowest score
    combined = rollouts.punish_cut(score(many, answers).combined, answers.finished)
    return answers, combined.view(-1, k), answers.finished.view(-1, k)


def temperatures_of(cfg: Config) -> list[float]:
    """The numbers of --temperatures; ValueError unless each is above 0."""
    try:
        temperatures = [float(word) for word in cfg.temperatures.split(",")]
    except ValueError:
        temperatures = []
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise ValueError(f"--temperatures {cfg.temperatures}: numbers above 0, comma between, as "
                         f"0.5,0.65,0.8")
    return temperatures


def choose_temperature(newest, number: int, score, setting: Setting) -> tuple[float, dict]:
    """(T, {T: score}): the temperature whose best of K scores highest, and the curve behind it.

    The best one moves with every version, so it is looked for anew each round [L2 §3.2.3, Fig. 8].
    """
    rows = setting.draw(f"temperature {number}", 48, "valid")
    curve = {}
    for temperature in temperatures_of(setting.cfg):
        _, combined, _ = best_of(newest, rows, score, temperature, setting, "temperature", number)
        curve[temperature] = combined.amax(1).mean().item()
    return max(curve, key=curve.get), curve


def distil(model, score, setting: Setting) -> list[tuple[list[int], list[int]]]:
    """Safety context distillation [L2 §4.2.4]: examples (prompt without preprompt, safer answer).

    The model answers unsafe prompts twice, once behind a preprompt that calls it responsible. The
    second answer is kept where the safety model scores it higher (strictly), and learnt as the
    answer to the bare prompt (DEVIATES: else the paper keeps the first; here nothing is learnt).
    Helpful prompts are left alone: there it breeds false refusals.
    """
    drawn = setting.draw("distillation", 2 * setting.cfg.prompts)
    rows = []
    for row in drawn:
        if row["is_safety"] and row["messages"][0]["role"] != "system":  # the preprompt's place
            rows.append(row)
    if not rows:
        return []
    bare = [row["messages"] for row in rows]
    behind = [[{"role": "system", "content": PREPROMPT}, *messages] for messages in bare]
    plain = setting.answer(model, bare, 0.8, "plain")
    guided = setting.answer(model, behind, 0.8, "guided")
    # both are scored as answers to the bare prompt
    as_bare = rollouts.Answers(plain.prompts, guided.responses, guided.finished, guided.texts)
    before = score(rows, plain).safety
    after = score(rows, as_bare).safety
    is_kept = guided.finished & (after > before)
    print(f"context distillation: {int(is_kept.sum())} of {len(rows)} answers kept, safety score "
          f"{before.mean():.2f} -> {after.where(is_kept, before).mean():.2f}")
    examples = zip(plain.prompts, guided.responses, is_kept.tolist())
    return [(prompt, response) for prompt, response, keep in examples if keep]


def make_version(number: int, newest, score, memory: dict, setting: Setting):
    """V_number: the best of K answers of the newest version, imitated by the SFT model.

    Returns (version, record). Distilled answers join each version. The control's answers are
    collected beside them: one of the SFT model itself to each prompt, none rejected.
    """
    cfg = setting.cfg
    temperature, curve = choose_temperature(newest, number, score, setting)
    rows = setting.draw(f"round {number}", cfg.prompts)
    answers, combined, finished = best_of(newest, rows, score, temperature, setting, "round",
                                          number)
    picks = pick(combined, finished, random.Random(seed_of(cfg.seed, "at random", number)))
    best = [p.row * cfg.samples + p.best for p in picks]  # places among the N K answers
    by_chance = [p.row * cfg.samples + p.random for p in picks]
    memory["rounds"].append([(answers.prompts[i], answers.responses[i]) for i in best])

    model = setting.open(setting.sft)
    plain = setting.answer(model, [row["messages"] for row in rows], temperature, "control", number)
    control = zip(plain.prompts, plain.responses, plain.finished.tolist())
    memory["control"].append([(prompt, response) for prompt, response, whole in control if whole])

    ladder = {}  # {N: (mean of the best of N, median of N)} (Fig. 7)
    for n in LADDER:
        if n <= cfg.samples:
            some = combined[:, :n]
            ladder[n] = (some.amax(1).mean().item(), some.quantile(0.5, 1).mean().item())
    record = {"round": number, "temperature": temperature, "curve": curve, "ladder": ladder}
    note = ""
    if not cfg.data and picks:  # reported only: nothing is chosen by the gold score
        annotator = V.Annotator(setting.village)
        asked = [rows[p.row] for p in picks]
        record["gold_best"] = annotator.mean_gold(asked, [answers.texts[i] for i in best])
        record["gold_random"] = annotator.mean_gold(asked, [answers.texts[i] for i in by_chance])
        note = f"; gold score {record['gold_best']:.2f}, at random {record['gold_random']:.2f}"
    examples = merged(memory["rounds"], number) + [tuple(e) for e in memory["distilled"]]
    if not examples:
        raise ValueError(f"none of {combined.numel()} answers ended within --max-new-tokens "
                         f"{cfg.max_new_tokens}: raise it, or train sft.py longer")
    loss = imitate(model, examples, cfg.rs_lr, cfg.batch_size, cfg.seed)
    print(f"V{number}: T {temperature}, {len(examples)} answers imitated (loss {loss:.3f}); reward "
          f"of one {ladder[1][0]:.2f}, best of {cfg.samples} {combined.amax(1).mean():.2f}{note}")
    return model, record


# ----------------------------------------------------------------------- fresh reward models


def compare(number: int, newest, previous, setting: Setting) -> list[dict]:
    """Rows of a preference file: answers of the two newest versions, labelled by the annotator.

    A third is judged for safety, on mostly unsafe prompts; an answer that was cut is none.
    """
    cfg, village = setting.cfg, setting.village
    annotator = V.Annotator(village)
    rng = random.Random(seed_of(cfg.seed, "labels", number))
    lines = []
    for mix, by, n in (("helpful", "helpful", cfg.comparisons - cfg.comparisons // 3),
                       ("safety", "safe", cfg.comparisons // 3)):
        rows = village.prompts(mix, "train", n, rng.randrange(1 << 30), V.STYLED)
        dialogs = [row["messages"] for row in rows]
        sides = []
        for which, model in enumerate((newest, previous)):
            answers = setting.answer(model, dialogs, rng.choice((0.8, 1.0)), "compare", mix, number,
                                     which)
            sides.append([data.break_tags(text) if whole else ""
                          for text, whole in zip(answers.texts, answers.finished.tolist())])
        lines += annotator.comparisons(dialogs, *sides, rng, by)
    return lines


def refresh_rewards(number: int, newest, previous, folder: Path, setting: Setting) -> None:
    """Train the reward models of `folder` on with fresh comparisons, into out/refreshed_NUMBER.

    The paper's weekly batches: without them the models judge answers unlike any they saw. As many
    older comparisons are learnt beside them, so that what is rare now is not forgotten. reward.py
    does it, as a child process with the flags that made the models; the first comparisons' held-out
    files, where there are any, are held out again.
    """
    cfg, out = setting.cfg, Path(setting.cfg.out)
    home = out / f"refreshed_{number}"
    lines = compare(number, newest, previous, setting)
    if setting.ranks.is_main:
        before = [out / "preferences_helpful.jsonl", out / "preferences_safety.jsonl"]
        before += [out / f"refreshed_{n}" / "comparisons.jsonl" for n in range(1, number)]
        older = [line for path in before if path.exists()
                 for line in path.read_text().splitlines()]
        again = random.Random(seed_of(cfg.seed, "again", number)).sample(
            sorted(older), min(len(lines), len(older)))
        write_lines(home / "comparisons.jsonl", map(json.dumps, lines))
        write_lines(home / "again.jsonl", again)
        print(f"{home}: {len(lines)} fresh comparisons of the two newest versions, {len(again)} "
              f"older ones", flush=True)
        files = [home / "comparisons.jsonl"]
        if again:
            files.append(home / "again.jsonl")
        files += sorted(out.glob("preferences_*_valid.jsonl"))
        run_reward(["--data", ",".join(map(str, files)), "--resume-from", str(folder), "--out",
                    str(home), "--device", cfg.device, "--kernels", cfg.kernels,
                    *flags_of(folder / "reward_helpful.pt")])
    setting.ranks.barrier()  # the others wait for the files


def write_lines(path: Path, lines) -> None:
    """A file of these lines, whole or not at all."""
    text = "".join(f"{line}\n" for line in lines)
    M.atomic_write(path, lambda f: f.write(text.encode()))


def flags_of(path: Path) -> list[str]:
    """The flags that decide what a reward model learns, as the run that made it was given them."""
    given = M.load(path, "cpu")[1]["metrics"].get("flags", {})
    flags = []
    for name in ("seed", "margin", "aux_weight", "lr", "batch_size", "micro_batch"):
        if name in given:
            flags += [f"--{name.replace('_', '-')}", str(given[name])]
    return flags


def run_reward(flags: list[str]) -> None:
    """reward.py with these flags as a process of its own; ValueError with its last words."""
    command = [sys.executable, str(Path(__file__).resolve().with_name("reward.py")), *flags]
    # the child is no rank of ours
    alone = {k: v for k, v in os.environ.items() if "RANK" not in k and k != "WORLD_SIZE"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    if done.returncode:
        raise ValueError(f"refreshing the reward models failed ({done.stderr.strip()[-300:]}); "
                         f"--comparisons 0 leaves them as they are")


# ---------------------------------------------------------------------------------------- main


def open_reward(setting: Setting, folder: Path):
    """score(rows, answers): the user's function if there is one, else the two reward models."""
    cfg = setting.cfg
    if cfg.reward:
        return rollouts.own_reward(cfg.reward)
    return rollouts.reward_pair(folder, setting.tokenizer, setting.ranks, cfg.threshold,
                                setting.info["metrics"].get("village"))


def remove_older_run(setting: Setting) -> None:
    """No version of an earlier run stands beside those of this one: ppo.py takes the highest."""
    out = Path(setting.cfg.out)
    if setting.ranks.is_main:
        for path in out.glob("rlhf_*.pt"):
            if not path.samefile(setting.sft):
                path.unlink()
    scale.remove_state(out / "ppo.state.pt", setting.ranks)  # of versions that are no more
    setting.ranks.barrier()


def train(setting: Setting):
    """The course of the versions; yields (number, record) behind each, when all is on the disk.

    out/rejection.state.json holds the answers picked so far: with --resume finished rounds are not
    repeated. A version's file appears last: whoever sees rlhf_v5.pt finds its reward models too.
    """
    began = time.time()
    cfg, out = setting.cfg, Path(setting.cfg.out)
    state = out / f"{STAGE}.state.json"
    memory = {"rounds": [], "control": [], "distilled": []}
    done = 0
    if cfg.resume and state.exists():
        saved = json.loads(state.read_text())
        stage.check_resume(saved, cfg, setting.tokenizer.model_bytes)
        memory, done = saved["memory"], saved["step"]
        print(f"resuming after version {done}")

    def path_of(number: int):
        return out / f"rlhf_v{number}.pt" if number > 0 else setting.sft

    refreshes = cfg.comparisons and not (cfg.data or cfg.reward)
    folder = out / f"refreshed_{done}" if done and refreshes else out  # of the newest reward models
    score = open_reward(setting, folder)
    previous, newest = setting.open(path_of(done - 1)), setting.open(path_of(done))
    for number in range(done + 1, cfg.rounds + 1):
        if number == 1 and not cfg.reward:
            memory["distilled"] = distil(newest, score, setting)
        version, record = make_version(number, newest, score, memory, setting)
        previous, newest = newest, version
        if number == 1:
            remove_older_run(setting)
        if number == cfg.rounds and memory["control"][-1]:
            control = setting.open(setting.sft)
            imitate(control, merged(memory["control"], number), cfg.rs_lr, cfg.batch_size,
                    cfg.seed)
            setting.save(out / "rlhf_control.pt", control, "rlhf_control", {})
        if refreshes:
            refresh_rewards(number, newest, previous, folder, setting)
            folder = out / f"refreshed_{number}"
            score = open_reward(setting, folder)
        record["rewards"] = folder.name if folder != out else "."  # in OUT; for ppo.py
        record["minutes"] = (time.time() - began) / 60  # since this process began
        setting.save(path_of(number), newest, f"rlhf_v{number}", record)
        info = stage.resume_info(number, cfg.rounds, cfg, setting.tokenizer.model_bytes)
        if setting.ranks.is_main:
            write_lines(state, [json.dumps({**info, "memory": memory})])
        yield number, record


def main(cfg: Config) -> dict:
    """V1 to V5 and their reward models; ValueError for bad flags.

    Returns {number: record} of the versions made now; with --resume the files hold the others'.
    """
    began = time.time()
    stage.check(cfg)
    out = Path(cfg.out)
    source = cfg.checkpoint or out / "sft.pt"
    config = plan.shape_of(source, cfg.model, cfg.dry_run)
    cfg = stage.at_size(cfg, plan.settings(STAGE, config))
    temperatures_of(cfg)
    if cfg.rs_lr is None:
        cfg.rs_lr = next(lr for width, lr in reversed(RS_LR.items()) if config.dim >= width)
    if cfg.dry_run:
        plan.dry_run(config, cfg.batch_size, config.max_seq_len, recompute=cfg.recompute, tp=cfg.tp,
                     device=cfg.device, rollouts=cfg.prompts * cfg.samples, trained=1, frozen=4)
        return {}
    info = M.load(source, "cpu")[1]
    ranks = scale.setup(cfg.device, cfg.tp)  # this process among others; alone: rank 0 of 1
    print(kernels.choose(cfg.kernels, ranks.device))
    village = V.Village(info["metrics"].get("village") or 0)
    setting = Setting(cfg, data.Tokenizer(info["tokenizer"]), village, ranks, info)
    records = dict(train(setting))
    if ranks.is_main:
        (out / f"{STAGE}.state.json").unlink(missing_ok=True)
    print(f"{len(records)} versions in {stage.clock(time.time() - began)}")
    print(stage.wrote(out / f"rlhf_v{cfg.rounds}.pt", out, "ppo.py", f"exam.py {STAGE}"))
    ranks.finish()
    return records


if __name__ == "__main__":
    stage.run(main, Config)
