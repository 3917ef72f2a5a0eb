"""What a model is worth: one examination per stage, on prompts that nobody trained on.

    python exam.py pretrain       facts asked and never asked, grammar
    python exam.py sft            helpfulness, violations, false refusals; the demonstrations' own
    python exam.py reward         accuracy by rating on both test sets (Tables 7, 8), length, gold
    python exam.py reward --sweep --ablate     more pairs, more layers, other losses (Tables 28, 29)
    python exam.py rejection      every version against SFT, and the control (Fig. 11)
    python exam.py ppo            the same of PPO, and PPO against the version it started from
    python exam.py gatt           obedience by turn (Table 30), attention (Fig. 10), other skills
    python exam.py summary        the table of all stages

in  : the checkpoints in OUT
out : OUT/exam/STAGE.json, put together with the stages' own numbers as OUT/summary.json

Nothing is trained here but the studies of `reward`, and nothing that is measured here decides
anything in a stage. Figures are drawn by paper.py.

Keys: [L2] Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

import json, math, random, sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import data, gatt, kernels, model as M, pretrain, reward, rollouts, scale, stage, village as V
from rollouts import seed_of
from stage import ranged

# ------------------------------------------------------------------------------- configuration


@dataclass
class Config:
    """What is examined, and how: each field is a flag, its comment the help text."""

    out: str = "out"  # folder of the checkpoints, and of the exams
    checkpoint: str | None = None  # pretrain, sft, ppo, gatt: another model than the stage's
    data: str | None = None  # reward, gatt: other files than the stage was given
    instructions: str | None = None  # gatt: goes with --data
    seed: int = ranged(0, least=0)  # of the sampling
    eval_prompts: int = ranged(200, least=1)  # test prompts of each kind, dialogues per curve
    max_new_tokens: int = ranged(80, least=1)  # tokens of an answer
    sweep: bool = False  # reward, also: accuracy by number of pairs and of layers (Fig. 6)
    ablate: bool = False  # reward, also: other margins, no auxiliary loss (Tables 28, 29)
    device: str = "auto"  # auto cuda mps cpu
    kernels: Literal["auto", "c", "torch"] = "auto"  # fused C on the CPU where it compiles


PROMPTS = 11  # seed of the test prompts on which versions are compared
EVAL_TURNS = 10  # or as many as fit the context; paper: 20 (Table 30)
ROOM = 32  # tokens that every test dialogue must have left for its next answer
BIN = 8  # neighbouring tokens that are drawn as one (Fig. 10)


@dataclass
class Examined:
    """A model with what its examination needs."""

    model: M.Llama
    tokenizer: data.Tokenizer
    info: dict
    village: V.Village
    cfg: Config

    def answer(self, dialogs: list, temperature: float, seed: int, **rows) -> rollouts.Answers:
        """One answer to each open dialogue."""
        return rollouts.answer(self.model, self.tokenizer, dialogs, self.cfg.max_new_tokens,
                               temperature, seed, **rows)


def open_model(cfg: Config, path) -> Examined:
    """A checkpoint in float32, as the stages train it."""
    model, info = M.load(path, "cpu")
    model = scale.wrap(model, scale.Ranks(M.pick_device(cfg.device)))
    village = V.Village(info["metrics"].get("village") or 0)
    return Examined(model, data.Tokenizer(info["tokenizer"]), info, village, cfg)


def knows_a_village(one: Examined) -> bool:
    """Whether the annotator can grade the model; says so where it can not."""
    knows = one.info["metrics"].get("village") is not None
    if not knows:
        print("this model has read of no village: its held-out numbers are all there is to say")
    return knows


def start_of(one: Examined) -> str:
    """The stage that a model started from: OUT/NAME.pt."""
    lineage = one.info["metrics"].get("lineage")
    if not lineage:
        raise ValueError(f"a checkpoint of stage {one.info['stage']} that does not say what it "
                         f"started from has nothing to be compared with")
    return lineage[-1]


# ------------------------------------------------------------------------------------ pretrain


def facts_known(one: Examined, asked: bool) -> tuple[float, int]:
    """Share of the village's facts completed greedily word for word, and how many were tried.

    asked=False: pairs of villager and attribute that no question of the training text contains;
    they stand in biographies only, so answering them is generalisation, not recall of an answer.
    """
    probes = one.village.probes(asked)
    texts = pretrain.complete(one.model, one.tokenizer, [prefix for prefix, _ in probes], 24)
    right = [text.strip().startswith(answer) for text, (_, answer) in zip(texts, probes)]
    return sum(right) / len(right), len(right)


def exam_pretrain(cfg: Config) -> dict:
    """What the base model knows: facts asked, facts never asked, grammar at T = 1."""
    one = open_model(cfg, cfg.checkpoint or Path(cfg.out) / "pretrain.pt")
    if not knows_a_village(one):
        return {}
    asked, n_asked = facts_known(one, asked=True)
    unasked, n_unasked = facts_known(one, asked=False)
    texts = pretrain.complete(one.model, one.tokenizer, [""] * 100, 80, temperature=1.0, seed=1)
    grammar = sum(one.village.grammar_rate(text) for text in texts) / len(texts)
    print(f"facts asked in training: {asked:.1%} of {n_asked};  never asked: {unasked:.1%} of "
          f"{n_unasked};  grammatical sentences at T=1: {grammar:.1%} in {len(texts)} documents")
    return {"facts_asked": asked, "facts_never_asked": unasked, "grammar": grammar}


# ------------------------------------------------------------------------------------- grading


def grade(answer, village: V.Village, n: int, temperatures=(0.0, 0.5, 1.0)) -> dict:
    """Grade a model on n test prompts of every kind, greedily, at T = 0.5 and at T = 1.

    answer: (dialogs, temperature) -> rollouts.Answers. Returns {"greedy", "T=0.5", "T=1"} ->
    gold_helpfulness (mean over the harmless kinds), violations (share of the unsafe prompts),
    false_refusals (share of the edge prompts), eos_rate, and per kind the mean helpfulness and the
    share that is right; printed as a table.
    """
    annotator = V.Annotator(village)
    rows = []
    for kind in V.KINDS:
        rows += village.prompts(kind, "test", n, 0)
    report = {}
    for temperature in temperatures:
        name = f"T={temperature:g}" if temperature else "greedy"
        answers = answer([row["messages"] for row in rows], temperature)
        golds = {kind: [] for kind in V.KINDS}
        for row, text in zip(rows, answers.texts):
            golds[row["kind"]].append(annotator.gold(row["messages"], text))

        def mean(kind: str, key: str) -> float:
            return V.mean(gold[key] for gold in golds[kind])

        helpful = {kind: mean(kind, "helpful") for kind in V.KINDS}
        report[name] = {
            "gold_helpfulness": V.mean(helpful[kind] for kind in V.KINDS if kind != "unsafe"),
            "violations": mean("unsafe", "violation"), "safety": mean("unsafe", "safe"),
            "false_refusals": mean("edge", "refusal"), "eos_rate": answers.eos_rate,
            "helpful": helpful, "right": {kind: mean(kind, "right") for kind in V.KINDS}}
        r = report[name]
        print(f"{name:>7}: helpfulness {r['gold_helpfulness']:.3f}  violations "
              f"{r['violations']:.1%}  false refusals {r['false_refusals']:.1%}  EOS "
              f"{r['eos_rate']:.1%}")
        print(f"{'':9}" + "  ".join(f"{kind} {value:.2f}" for kind, value in helpful.items()))
    return {**report, "prompts_per_kind": n}


def demonstrated(village: V.Village, n: int = 2000) -> dict:
    """What the writers' own answers are worth: {"gold_helpfulness", "violations",
    "false_refusals"}, as `grade` has them for a model, over n answers a kind."""
    rng = random.Random(f"demonstrated {village.number}")
    annotator = V.Annotator(village)
    golds = {}
    for kind in V.KINDS:
        golds[kind] = []
        for _ in range(n):
            messages = village.dialogue(village.ask(kind, rng, "train"), rng, flawed=True)
            golds[kind].append(annotator.gold(messages[:-1], messages[-1]["content"]))
    helpful = [V.mean(gold["helpful"] for gold in golds[kind])
               for kind in V.KINDS if kind != "unsafe"]
    return {"gold_helpfulness": V.mean(helpful),
            "violations": V.mean(gold["violation"] for gold in golds["unsafe"]),
            "false_refusals": V.mean(gold["refusal"] for gold in golds["edge"])}


def exam_sft(cfg: Config) -> dict:
    """What the annotator thinks of the model's answers, and of those it has learnt from."""
    one = open_model(cfg, cfg.checkpoint or Path(cfg.out) / "sft.pt")
    if not knows_a_village(one):
        return {}
    own = demonstrated(one.village)
    print(f"demonstrations' own answers: helpfulness {own['gold_helpfulness']:.3f}  violations "
          f"{own['violations']:.1%}  false refusals {own['false_refusals']:.1%}")

    def answer(dialogs, temperature):
        return one.answer(dialogs, temperature, seed=0)

    return {"demonstrations": own, **grade(answer, one.village, cfg.eval_prompts)}


# -------------------------------------------------------------------------------------- reward


def by_group(gaps, pairs: list[reward.Pair]) -> dict[str, list]:
    """{group: [accuracy, pairs]}: all, by rating, by safety labels; equal scores count half."""
    groups = {}
    for hit, pair in zip(((gaps.sign() + 1) / 2).tolist(), pairs):
        for group in ("all", pair.rating, reward.SAFETY_BINS.get(pair.safe)):
            if group:
                groups.setdefault(group, []).append(hit)
    return {group: [sum(hits) / len(hits), len(hits)] for group, hits in groups.items()}


def length_bias(scores, gaps, pairs: list[reward.Pair]) -> dict:
    """Whether length is taken for quality: how often the longer answer wins, with people and model.

    scores (2N,): of the chosen, then of the rejected answers; gaps (N,): their differences.
    """
    chosen = torch.tensor([float(len(p.chosen) - p.prompt) for p in pairs])
    rejected = torch.tensor([float(len(p.rejected) - p.prompt) for p in pairs])
    longer = chosen - rejected  # > 0: people chose the longer one
    unequal = max((longer != 0).sum().item(), 1)
    lengths = torch.cat((chosen, rejected))  # (2N,)
    return {"length_correlation": torch.corrcoef(torch.stack((scores, lengths)))[0, 1].item(),
            "longer_wins": {"people": (longer > 0).sum().item() / unequal,
                            "model": (longer * gaps > 0).sum().item() / unequal}}


def against_gold(scores, pairs: list[reward.Pair], village, by: str) -> dict:
    """ceiling: the gold score's own accuracy on these noisy labels, which only luck can beat.
    calibration: [gold score, mean, deviation, answers] of sigmoid(score) by gold bin [L2 Fig. 29].
    """
    annotator, rows = V.Annotator(village), [p.row for p in pairs]
    gaps = torch.tensor([annotator.gap(row["prompt"], row["chosen"], row["rejected"], by)
                         for row in rows])
    gold = torch.tensor([annotator.gold(row["prompt"], row[side])[by]
                         for side in ("chosen", "rejected") for row in rows])  # (2N,)
    levels = (gold * 5).round() / 5
    calibration = []
    for level in levels.unique():
        p = scores[levels == level].sigmoid()
        calibration.append([level.item(), p.mean().item(), p.std(correction=0).item(), len(p)])
    return {"ceiling": by_group(gaps, pairs), "calibration": calibration}


def judge(model, which: str, tests: dict[str, list[reward.Pair]], village=None) -> dict:
    """What a reward model is worth: its numbers on the test pairs of both kinds.

    village: if the pairs come from it, for what only the gold score can tell.
    """
    report = {"accuracy": {}}
    for name, pairs in tests.items():
        if not pairs:
            continue
        scores = rollouts.scores(model, [p.chosen for p in pairs] + [p.rejected for p in pairs])
        gaps = scores[:len(pairs)] - scores[len(pairs):]  # (N,) of (2N,)
        report["accuracy"][name] = by_group(gaps, pairs)
        if name == "safety":
            is_unsafe = torch.tensor([p.safe[i] == 0 for i in (0, 1) for p in pairs])
            report |= reward.detection(scores, is_unsafe)
        if name == which:
            report |= length_bias(scores, gaps, pairs)
            report["histograms"] = [torch.histc(side.sigmoid(), 20, 0, 1).tolist()
                                    for side in scores.chunk(2)]
            report["worst"] = []
            for i in gaps.argsort()[:5].tolist():
                row = pairs[i].row
                report["worst"].append(
                    f"{gaps[i]:+.1f} {pairs[i].rating}: {row['prompt'][-1]['content'][:60]} | "
                    f"preferred: {row['chosen'][:60]} | instead of: {row['rejected'][:60]}")
            if village:
                report |= against_gold(scores, pairs, village,
                                       "safe" if which == "safety" else which)
    return report


def print_rewards(reports: dict[str, dict]) -> None:
    """Accuracy by rating on both test sets (Tables 7, 8), and each model's weak points."""
    for columns in ((*data.RATINGS, "all"), tuple(reward.SAFETY_BINS.values())):
        width = max(13, *map(len, columns))
        print(f"\n{'accuracy in %, of pairs':<34}" + "".join(f"{c:>{width}}" for c in columns))
        for test in ("helpful", "safety"):
            lines = {f"{which} model": report["accuracy"].get(test)
                     for which, report in reports.items()}
            lines["gold score: ceiling"] = reports.get(test, {}).get("ceiling")
            for name, groups in lines.items():
                if not groups or not set(groups) & set(columns):
                    continue
                cells = [f"{100 * groups[c][0]:.1f} of {groups[c][1]:>4}" if c in groups else ""
                         for c in columns]
                print(f"{f'{test} test, {name}':<34}"
                      + "".join(f"{cell:>{width}}" for cell in cells))
    for which, report in reports.items():
        wins = report["longer_wins"]
        print(f"\n{which} model: score and length correlate by {report['length_correlation']:+.2f};"
              f" the longer answer wins {wins['people']:.0%} of the labels, {wins['model']:.0%} of "
              f"the model's choices; the widest disagreements:")
        print("\n".join(f"  {line}" for line in report["worst"]))
    for name, (precision, recall) in reports.get("safety", {}).get("unsafe_found_below",
                                                                   {}).items():
        print(f"unsafe answers below {name}: precision {precision:.2f}, recall {recall:.2f}")


def studies(pairs_of: dict, tests: dict, cfg: reward.Config, sweep: bool, ablate: bool, ranks,
            layers: int) -> dict[str, dict]:
    """Train again with one thing changed; prints and returns the reports.

    ablate: the margin tables (Table 28), and no auxiliary loss (Table 29). sweep: nested parts of
    the pairs, and the chat model's first layers in place of a smaller chat model (Fig. 6).
    """
    weight = {"helpful": 0.0, "safety": cfg.aux_weight}
    runs = []  # (name, which, pairs, weight of the auxiliary loss, layers)
    for which, pairs in pairs_of.items():
        if ablate and which == "helpful":
            for table in reward.MARGINS:
                again = [p._replace(margin=reward.margin_of(p.row, table)) for p in pairs]
                runs.append((f"helpful, margin {table}", which, again, 0.0, layers))
        if ablate and which == "safety":
            for w in (0.0, cfg.aux_weight):
                runs.append((f"safety, auxiliary loss x {w}", which, pairs, w, layers))
        if sweep:
            mixed = random.Random(f"sweep {cfg.seed}").sample(pairs, len(pairs))
            for depth in sorted({layers, -(-layers // 2), -(-layers // 4)}):
                for part in (8, 4, 2, 1):
                    some = mixed[:len(mixed) // part]
                    runs.append((f"{which}, {depth} layers, {len(some)} pairs", which, some,
                                 weight[which], depth))
    reports = {}
    for name, which, pairs, aux_weight, depth in runs:
        model, optimizer = reward.start(cfg, which, ranks, depth)
        for _ in reward.train(model, optimizer, pairs, aux_weight, cfg, ranks):
            pass
        reports[name] = report = judge(model, which, tests)
        print(f"{name}: accuracy " + ", ".join(f"{100 * share:.1f} {group}" for group, (share, _)
                                               in report["accuracy"][which].items()))
        if which == "safety":
            print("    unsafe answers below 0.5: precision {:.2f}, recall {:.2f}".format(
                *report["unsafe_found_below"]["0.5"]))
    return reports


def exam_reward(cfg: Config) -> dict:
    """Both reward models on both test sets."""
    out = Path(cfg.out)
    models = {}
    for which in ("helpful", "safety"):
        path = out / f"reward_{which}.pt"
        if path.exists():
            models[which] = open_model(cfg, path)
    if not models:
        raise FileNotFoundError(f"{out} holds no reward model: `python reward.py` makes both")
    one = next(iter(models.values()))
    flags = {**one.info["metrics"].get("flags", {}), "out": cfg.out}
    if cfg.data:
        flags["data"] = cfg.data
    made = reward.Config(**flags)  # the flags that made them
    pairs_of, tests = reward.prepare(made, one.tokenizer, one.model.config.max_seq_len)
    village = None if made.data else one.village
    reports = {which: judge(examined.model, which, tests, village)
               for which, examined in models.items()}
    print_rewards(reports)
    if cfg.sweep or cfg.ablate:
        ranks = scale.ranks_of(one.model)
        reports["studies"] = studies(pairs_of, tests, made, cfg.sweep, cfg.ablate, ranks,
                                     one.model.config.n_layers)
    return reports


# ------------------------------------------------------------------------- versions of the policy


def versions_in(out: Path) -> dict[str, Path]:
    """{"SFT", "V1" .., "no rejection"}: what rejection.py started from and made, as far as it is
    there."""
    paths = {"SFT": out / "sft.pt"}
    numbered = sorted(out.glob("rlhf_v*.pt"), key=lambda path: int(path.stem[6:]))
    paths |= {f"V{path.stem[6:]}": path for path in numbered}
    control = out / "rlhf_control.pt"
    return {**paths, "no rejection": control} if control.exists() else paths


def test_prompts(village: V.Village, n: int) -> dict[str, list[dict]]:
    """{"helpful": harmless prompts, "harmless": unsafe ones}, n each."""
    return {"helpful": village.prompts("helpful", "test", n, PROMPTS),
            "harmless": village.prompts("unsafe", "test", n, PROMPTS)}


def test_answers(one: Examined, rows: dict, score) -> dict:
    """{goal: {"texts", "helpful", "safety"}}: answers at T = 1 and the reward models' scores."""
    report = {}
    for goal, asked in rows.items():
        answers = one.answer([row["messages"] for row in asked], 1.0,
                             seed_of(one.cfg.seed, "versions", goal))
        scores = score(asked, answers)
        report[goal] = {"texts": answers.texts, "helpful": scores.helpful, "safety": scores.safety}
    return report


def duel(ours: dict, theirs: dict, rows: dict, annotator) -> dict:
    """Wins / (wins + losses) of one model's answers over another's, by both judges.

    helpful: harmless prompts, harmless: unsafe ones (Fig. 11). A model judged by the reward model
    it was trained on is flattered: hence the second judge [L2 §3.4.1]. The gap of two answers
    changes its sign with their order, so order cannot matter. Of answers to different numbers of
    prompts, the first ones that both have count.
    """
    result, won, decided = {}, 0, 0
    for goal, key, by in (("helpful", "helpful", "helpful"), ("harmless", "safety", "safe")):
        gaps = [annotator.gap(row["messages"], a, b, by) for row, a, b in
                zip(rows[goal], ours[goal]["texts"], theirs[goal]["texts"])]
        wins, losses = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
        won, decided = won + wins, decided + wins + losses
        by_model = ours[goal][key][:len(gaps)] - theirs[goal][key][:len(gaps)]
        result |= {f"{goal}_reward_model": (by_model > 0).sum().item()
                   / max((by_model != 0).sum().item(), 1),  # equal answers decide nothing
                   f"{goal}_annotator": wins / max(wins + losses, 1),
                   f"{goal}_ties": len(gaps) - wins - losses}
    p = won / max(decided, 1)
    low = p - 1.96 * math.sqrt(p * (1 - p) / max(decided, 1))  # of the 95% interval
    return {**result, "annotator": p, "annotator_low": low, "decided": decided}


def print_duel(name: str, d: dict) -> None:
    """Two lines: who won against whom, by which judge."""
    print(f"{name}: wins by reward models {d['helpful_reward_model']:.0%} helpful, "
          f"{d['harmless_reward_model']:.0%} harmless; by annotator {d['helpful_annotator']:.0%}, "
          f"{d['harmless_annotator']:.0%}")
    print(f"{'':4}both {d['annotator']:.1%}, at least {d['annotator_low']:.1%} (95%), of "
          f"{d['decided']} decided, {d['helpful_ties'] + d['harmless_ties']} ties")


def summed_up(name: str, answers: dict) -> dict:
    """What is kept of a version's answers: mean scores, and the 5-bin histogram of Fig. 20."""
    return {"reward_helpful": answers["helpful"]["helpful"].mean().item(),
            "reward_safety": answers["harmless"]["safety"].mean().item(),
            "safety_histogram": torch.histc(answers["harmless"]["safety"].sigmoid(), 5, 0,
                                            1).tolist()}


def judges(cfg: Config, last: Path) -> tuple:
    """score(rows, answers) by the newest reward models, which the last version's file names."""
    info = M.load(last, "cpu")[1]
    folder = Path(cfg.out) / info["metrics"].get("rewards", ".")
    ranks = scale.Ranks(M.pick_device(cfg.device))
    return rollouts.reward_pair(folder, data.Tokenizer(info["tokenizer"]), ranks)


def exam_rejection(cfg: Config) -> dict:
    """Every version against SFT; and what imitation alone is worth, without rejection."""
    out = Path(cfg.out)
    paths = versions_in(out)
    if "V1" not in paths:
        raise FileNotFoundError(f"{out} holds no version: `python rejection.py` makes them")
    last = [name for name in paths if name.startswith("V")][-1]
    if not knows_a_village(open_model(cfg, paths[last])):
        return {}
    score = judges(cfg, paths[last])
    report = {"rounds": [], "versions": {}, "win_rates": {}}
    sft = None
    for name, path in paths.items():
        one = open_model(cfg, path)
        rows = test_prompts(one.village, 2 * cfg.eval_prompts)
        if name != last:  # the last one is compared on all prompts
            rows = {goal: asked[:cfg.eval_prompts] for goal, asked in rows.items()}
        answers = test_answers(one, rows, score)
        report["versions"][name] = summed_up(name, answers)
        if name == "SFT":
            sft = answers
        else:
            d = duel(answers, sft, rows, V.Annotator(one.village))
            report["win_rates"][name] = d
            print_duel(f"{name} against SFT", d)
        if name.startswith("V"):
            metrics = one.info["metrics"]
            report["rounds"].append({key: metrics[key] for key in metrics
                                     if key not in ("village", "lineage", "rewards")})
        if name == "no rejection":
            print("the control, trained as long on SFT's own answers, none rejected:")
            report["no_rejection"] = grade_of_policy(one, temperatures=(0.5,))
    return report


def grade_of_policy(one: Examined, temperatures=(0.0, 0.5, 1.0)) -> dict:
    """`grade` of a version or of PPO's model, with random numbers of its own."""
    def answer(dialogs, temperature):
        return one.answer(dialogs, temperature, seed_of(one.cfg.seed, "examination"))

    return grade(answer, one.village, one.cfg.eval_prompts, temperatures)


def exam_ppo(cfg: Config) -> dict:
    """PPO's model graded, and compared with SFT and with the version it started from."""
    out = Path(cfg.out)
    path = cfg.checkpoint or out / "ppo.pt"
    one = open_model(cfg, path)
    if not knows_a_village(one):
        return {}
    last = start_of(one)
    report = grade_of_policy(one)
    score = judges(cfg, path)
    rows = test_prompts(one.village, 2 * cfg.eval_prompts)
    annotator = V.Annotator(one.village)
    ours = test_answers(one, rows, score)
    few = {goal: asked[:cfg.eval_prompts] for goal, asked in rows.items()}
    name = last.replace("rlhf_v", "V").replace("sft", "SFT")
    theirs = test_answers(open_model(cfg, out / f"{last}.pt"), rows, score)
    sft = test_answers(open_model(cfg, out / "sft.pt"), few, score)
    report["win_rates"] = {"PPO": duel(ours, sft, rows, annotator),
                           f"PPO against {name}": duel(ours, theirs, rows, annotator)}
    print_duel("PPO against SFT", report["win_rates"]["PPO"])
    print_duel(f"PPO against {name}", report["win_rates"][f"PPO against {name}"])
    return report | summed_up("PPO", ours)


# ---------------------------------------------------------------------------------------- gatt


@dataclass
class TestTalks:
    """Dialogues of the test: questions, and rows of instructions whose values were trained on
    (seen) or never (unseen)."""

    questions: list[list[str]]
    seen: list[dict]
    unseen: list[dict]


def talks_of_village(village: V.Village, cfg: Config) -> TestTalks:
    """Test questions, and instructions in wordings of their own."""
    n, seed = cfg.eval_prompts, cfg.seed + 1_000_003

    def rows(split: str) -> list[dict]:
        return gatt.rows_of(village, village.instructions(split, n, seed))

    return TestTalks(village.conversations(EVAL_TURNS, "test", n, seed), rows("seen"),
                     rows("unseen"))


def talks_of_files(made: gatt.Config, cfg: Config) -> TestTalks:
    """The same from a user's files, of what gatt.py held out under the flags it was given."""
    train, test, _ = gatt.own_files(made)
    rng = random.Random(f"exam {cfg.seed}")
    questions = [m["content"] for dialog in test["dialogs"] for m in dialog if m["role"] == "user"]
    n = cfg.eval_prompts
    return TestTalks([rng.choices(questions, k=EVAL_TURNS) for _ in range(n)],
                     rng.choices(train["instructions"], k=n),
                     rng.choices(test["instructions"], k=n))


def converse(one: Examined, rows: list[dict], questions: list, place) -> tuple[list[float], list]:
    """Answer every question in turn, the model's own earlier answers in view, at temperature 1.

    Returns the share of answers that obey, by turn, and the dialogues as they were read. place:
    `gatt.keep_first` asks for memory, `gatt.repeat_instruction` gives the ceiling. A dialogue
    leaves when it has no ROOM in the context; ends after EVAL_TURNS, or when fewer than half are
    left.
    """
    talks, held = [[] for _ in rows], []
    alive = list(range(len(rows)))
    memory = kernels.Memory()
    for turn in range(EVAL_TURNS):
        opened = {i: [*talks[i], {"role": "user", "content": questions[i][turn]}] for i in alive}
        asked = {i: place(rows[i]["instruction"], talk) for i, talk in opened.items()}
        alive = [i for i in alive if len(data.encode_dialog(one.tokenizer, asked[i])[0]) + ROOM
                 <= one.model.config.max_seq_len]
        if 2 * len(alive) < len(rows) or not alive:
            break
        answers = one.answer([asked[i] for i in alive], 1.0, seed=turn, row_ids=alive,
                             memory=memory)
        obeyed = 0
        for i, text in zip(alive, answers.texts):
            message = gatt.assistant(text)
            obeyed += gatt.obeys(rows[i], message["content"])
            talks[i] = [*opened[i], message]
        held.append(obeyed / len(alive))
    return held, [place(row["instruction"], talk) for row, talk in zip(rows, talks)]


@torch.no_grad()
def attention_map(model, tokens: list[int]):
    """The largest attention weight over layers and heads: float32 (T, T), row t looks at column s.

    The network keeps no weights (its attention is fused), so they are computed once more from its
    queries and keys: softmax(q k^T / sqrt(hd)) over the past [L2 Fig. 10].
    """
    c, T, outputs = model.config, len(tokens), []
    hooks = [w.register_forward_hook(lambda w, x, out: outputs.append(out[0]))  # (T, H*hd or KV*hd)
             for layer in model.layers for w in (layer.attention.wq, layer.attention.wk)]
    model.hidden(torch.tensor([tokens], device=model.tok_embeddings.weight.device))
    for hook in hooks:
        hook.remove()
    cos, sin = (table[:T] for table in model.rope(torch.float32, outputs[0].device))
    heads = [M.rotate(x.float().unflatten(-1, (-1, c.head_dim)), cos, sin).transpose(0, 1)
             for x in outputs]  # q (H, T, hd), k (KV, T, hd), q, k, ... layer by layer
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
def beside_the_others(one: Examined) -> dict:
    """{"kl", "reward_helpful", "reward_safety"} on test prompts, by what OUT has.

    kl: nats per answer from OUT/sft.pt, at temperature 1. Rewards: mean raw scores of the newest
    reward models, helpfulness on harmless prompts, safety on unsafe ones.
    """
    cfg, out = one.cfg, Path(one.cfg.out)
    newest = max(out.glob("refreshed_*/"), key=lambda p: int(p.name.split("_")[1]), default=out)
    report = {}
    for mix, files in (("helpful", {"kl": out / "sft.pt",
                                    "reward_helpful": newest / "reward_helpful.pt"}),
                       ("unsafe", {"reward_safety": newest / "reward_safety.pt"})):
        rows = one.village.prompts(mix, "test", cfg.eval_prompts, PROMPTS)
        answers = one.answer([row["messages"] for row in rows], 1.0, cfg.seed)
        for name, path in files.items():
            other = open_model(cfg, path).model if path.exists() else None
            if other is None or other.config.vocab_size != one.model.config.vocab_size:
                continue  # a folder without that stage, or of another model
            if name == "kl":
                report[name] = kl(one.model, other, answers)
            else:
                whole = [p + r for p, r in zip(answers.prompts, answers.responses)]
                report[name] = rollouts.scores(other, whole).mean().item()
    return report


def kl(policy, other, answers: rollouts.Answers) -> float:
    """Nats per answer from another model, k1 estimator, on the policy's own samples at T = 1."""
    batch = rollouts.pad_answers(answers.prompts, answers.responses,
                                 scale.ranks_of(policy).device)
    ours, theirs = (rollouts.response_logprobs(model, *batch, 1.0).sum().item()
                    for model in (policy, other))
    return (ours - theirs) / len(answers.prompts)


def obedience(one: Examined, test: TestTalks, when: str, talk=None) -> dict:
    """Consistency by turn for instructions seen and unseen in training, attention, other skills.

    talk: the dialogue to look at the attention in; none: the first of the test, as this model
    leads it. Prints the counterpart of Table 30, a column per turn.
    """
    report = {}
    for name, rows, place in (("seen", test.seen, gatt.keep_first),
                              ("unseen", test.unseen, gatt.keep_first),
                              ("ceiling", test.seen, gatt.repeat_instruction)):
        report[name], talks = converse(one, rows, test.questions, place)
        if name == "seen":
            seen_talks = talks
        print(f"{when:>6}, {name:<7} " + " ".join(f"{s:.2f}" for s in report[name]), flush=True)
    report["talk"] = talk or seen_talks[0]
    tokens, mask = gatt.last_answer_only(one.tokenizer, report["talk"])
    weights = attention_map(one.model, tokens)
    looks = weights[torch.tensor(mask).bool(), system_span(one.tokenizer, report["talk"])]
    report["attention"] = looks.amax(1).mean().item()  # mean over the answer's tokens
    binned = torch.nn.functional.max_pool2d(weights[None], BIN, ceil_mode=True)[0]
    report["map"] = [[round(x, 3) for x in row] for row in binned.tolist()]
    print(f"{when:>6}, attention of the last answer to the instruction: {report['attention']:.2f}")
    if not one.cfg.data:  # the annotator grades what was asked, besides the style
        annotator = V.Annotator(one.village)
        golds = []
        for messages in seen_talks:
            for i, message in enumerate(messages):
                if message["role"] == "assistant":
                    golds.append(annotator.gold(messages[:i], message["content"])["helpful"])
        report["helpful_under_instruction"] = sum(golds) / len(golds)

        def answer(dialogs, temperature):
            return one.answer(dialogs, temperature, seed=0)

        report |= grade(answer, one.village, one.cfg.eval_prompts) | beside_the_others(one)
    return report


def exam_gatt(cfg: Config) -> dict:
    """Ghost Attention's model, beside the one that it started from."""
    out = Path(cfg.out)
    path = cfg.checkpoint or out / "gatt.pt"
    made = gatt.Config(**M.load(path, "cpu")[1]["metrics"].get("flags", {}))
    if cfg.data or cfg.instructions:
        made = replace(made, data=cfg.data, instructions=cfg.instructions)
    cfg = replace(cfg, data=made.data, instructions=made.instructions)
    after = open_model(cfg, path)
    before = open_model(cfg, out / f"{start_of(after)}.pt")
    test = talks_of_files(made, cfg) if made.data else talks_of_village(after.village, cfg)
    report = {"before": obedience(before, test, "before")}
    report["after"] = obedience(after, test, "after", report["before"]["talk"])
    return report | {"dialogues": cfg.eval_prompts}


# ------------------------------------------------------------------------------------- summary


def exam_summary(cfg: Config) -> dict:
    """The table of all stages; nothing is measured."""
    return {}


EXAMS = {"pretrain": exam_pretrain, "sft": exam_sft, "reward": exam_reward,
         "rejection": exam_rejection, "ppo": exam_ppo, "gatt": exam_gatt, "summary": exam_summary}


def summarize(out: Path) -> dict:
    """{stage: its own numbers and its exam's}, of what OUT has; written to OUT/summary.json."""
    summary = {}
    for name in EXAMS:
        numbers = {}
        path = out / f"{name}.pt"
        if path.exists():
            numbers |= M.load(path, "cpu")[1]["metrics"]
        if name == "reward":  # two files
            parts = [out / f"reward_{which}.pt" for which in ("helpful", "safety")]
            minutes = [M.load(part, "cpu")[1]["metrics"].get("minutes", 0)
                       for part in parts if part.exists()]
            numbers |= {"minutes": max(minutes)} if minutes else {}
        report = out / "exam" / f"{name}.json"
        if report.exists():
            numbers |= json.loads(report.read_text())
        if numbers:
            summary[name] = numbers
    M.atomic_write(out / "summary.json", lambda f: f.write(json.dumps(summary, indent=2).encode()))
    return summary


def dig(numbers: dict, *keys):
    """numbers[a][b]..., None where a key is missing."""
    for key in keys:
        numbers = numbers.get(key) if isinstance(numbers, dict) else None
    return numbers


def shown(value, form: str) -> str:
    """The number in this form; nothing for None."""
    return "" if value is None else format(value, form)


def print_summary(summary: dict) -> None:
    """The table that `make` ends with: what each stage cost and what it is worth, at T = 1."""
    print(f"{'stage':<10}{'minutes':>8}{'helpful':>9}{'at T=.5':>9}{'violations':>12}"
          f"{'false refusals':>16}{'reward h / s':>15}{'KL':>7}   turns held")
    for name, numbers in summary.items():
        where = numbers.get("after", {}) if name == "gatt" else numbers
        scored = dig(summary, "rejection", "versions", "SFT")
        if name == "sft" and scored:  # could not be known before the reward models
            where = {**numbers, **scored, "kl": 0.0}
        rewards = [shown(where.get(f"reward_{goal}"), ".2f") for goal in ("helpful", "safety")]
        held = []
        if name == "gatt" and dig(numbers, "before", "ceiling"):
            least = numbers["before"]["ceiling"][0] / 2
            held = [str(sum(share >= least for share in numbers[when]["seen"]))
                    for when in ("before", "after")]
        print(f"{name:<10}{shown(numbers.get('minutes'), '.1f'):>8}"
              f"{shown(dig(where, 'T=1', 'gold_helpfulness'), '.2f'):>9}"
              f"{shown(dig(where, 'T=0.5', 'gold_helpfulness'), '.2f'):>9}"
              f"{shown(dig(where, 'T=1', 'violations'), '.1%'):>12}"
              f"{shown(dig(where, 'T=1', 'false_refusals'), '.1%'):>16}"
              f"{' / '.join(filter(None, rewards)):>15}{shown(where.get('kl'), '.2f'):>7}"
              f"   {' -> '.join(held)}".rstrip())


def main(name: str, cfg: Config) -> dict:
    """One examination: printed, written to OUT/exam/NAME.json; returns the report."""
    stage.check(cfg)
    out = Path(cfg.out)
    if name != "summary":
        print(kernels.choose(cfg.kernels, M.pick_device(cfg.device)))
        report = EXAMS[name](cfg)
        text = json.dumps(report, indent=1)
        M.atomic_write(out / "exam" / f"{name}.json", lambda f: f.write(text.encode()))
        print(f"wrote {out}/exam/{name}.json")
    summary = summarize(out)
    if name == "summary":
        print_summary(summary)
        return summary
    return report


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in EXAMS:
        print(f"exam.py: give one of {', '.join(EXAMS)}; `python exam.py sft --help` lists the "
              f"flags", file=sys.stderr)
        raise SystemExit(2)
    name = sys.argv.pop(1)
    stage.run(lambda cfg: main(name, cfg), Config)
