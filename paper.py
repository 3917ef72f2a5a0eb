"""The paper's figures, drawn from one's own run.

    python paper.py               every figure that OUT has the numbers for
    python paper.py gatt          one of them

in  : OUT/STAGE.jsonl, OUT/exam/STAGE.json, and from OUT/pretrain.pt the tokens of a step
out : OUT/figures/STAGE.png; of rlhf, which is rejection sampling and PPO, ppo.png

Nothing is measured here: the stages and exam.py did that. Each figure is one short function.

Keys: [L2] Llama 2, arXiv 2307.09288.
"""

from __future__ import annotations

import json, sys
from dataclasses import dataclass
from pathlib import Path

import data, exam, model as M, stage


@dataclass
class Config:
    """Where the numbers are; each field is a flag, its comment the help text."""

    out: str = "out"  # folder of the checkpoints, metrics and exams


def plotting():
    """matplotlib.pyplot, for files and not for windows."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def read_log(out: Path, name: str) -> list[dict]:
    """The rows of OUT/NAME.jsonl; FileNotFoundError names the command that makes it."""
    path = out / f"{name}.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `python {name}.py` makes it")
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_exam(out: Path, name: str) -> dict:
    """OUT/exam/NAME.json; FileNotFoundError names the command that makes it."""
    path = out / "exam" / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: `python exam.py {name}` makes it")
    report = json.loads(path.read_text())
    if not report:  # of a model that has read of no village
        raise FileNotFoundError(f"{path} holds no numbers: there is nothing to draw")
    return report


def save(figure, out: Path, name: str) -> Path:
    """The figure as OUT/figures/NAME.png."""
    path = out / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plotting().close(figure)
    return path


# ------------------------------------------------------------------------------ loss by step


def draw_losses(out: Path, name: str, series: dict[str, str], xlabel: str, ylabel: str,
                title: str, per_step: float = 1) -> Path:
    """Keys of OUT/NAME.jsonl against the step: series {key: label}; per_step: x of one step."""
    rows = read_log(out, name)
    figure, axes = plotting().subplots(figsize=(7, 4.2))
    for key, label in series.items():
        points = [(row["step"] * per_step, row[key]) for row in rows if key in row]
        if points:
            style = "o-" if len(points) < 40 else "-"
            axes.plot(*zip(*points), style, label=label, markersize=4, linewidth=1.2)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return save(figure, out, name)


def draw_pretrain(out: Path) -> Path:
    """The counterpart of Fig. 5: loss by tokens seen."""
    tokens = M.load(out / "pretrain.pt", "cpu")[1]["metrics"]["tokens_per_step"]
    return draw_losses(out, "pretrain", {"loss": "training", "val_loss": "validation"},
                       "tokens seen (millions)", "loss (nats per token)",
                       "Pretraining loss (counterpart of Llama 2, Fig. 5)", tokens / 1e6)


def draw_sft(out: Path) -> Path:
    """Loss by step of supervised fine-tuning."""
    return draw_losses(out, "sft", {"loss": "training", "val_loss": "held out"}, "optimizer step",
                       "loss (nats per answer token)", "Supervised fine-tuning")


# ------------------------------------------------------------------------------------ the rest


def draw_reward(out: Path) -> Path:
    """Accuracy by rating, scores (Fig. 27), calibration (Fig. 29)."""
    reports = read_exam(out, "reward")
    reports = {which: reports[which] for which in ("helpful", "safety") if which in reports}
    figure, axes = plotting().subplots(len(reports), 3, figsize=(13, 3.8 * len(reports)),
                                       squeeze=False)
    for (which, report), (left, middle, right) in zip(reports.items(), axes):
        own, ceiling = report["accuracy"][which], report.get("ceiling", {})
        for groups, style, label in ((own, "o-", "model"), (ceiling, "s--", "gold score")):
            rated = [rating for rating in data.RATINGS if rating in groups]
            rates = [groups[rating] for rating in rated]
            spread = [[100 * (r["mean"] - r["low"]) for r in rates],
                      [100 * (r["high"] - r["mean"]) for r in rates]]
            left.errorbar(rated, [100 * r["mean"] for r in rates], spread, fmt=style, capsize=3,
                          label=label)
        left.axhline(50, color="grey", linewidth=0.8)
        left.set(title=f"{which}: accuracy by rating (sampled pairs)",
                 ylabel="pairs in the right order (%)")
        for counts, label in zip(report["histograms"], ("chosen", "rejected")):
            middle.stairs(counts, [i / 20 for i in range(21)], fill=True, alpha=0.5, label=label)
        middle.set(title=f"{which}: scores", xlabel="sigmoid(score)", ylabel="test answers")
        if "calibration" in report:
            gold, mean, spread, _ = zip(*report["calibration"])
            right.errorbar(gold, mean, spread, fmt="o-", capsize=3, label="mean and deviation")
            right.set(title=f"{which}: calibration", xlabel="gold score of the test answer",
                      ylabel="sigmoid(score)")
        for panel in (left, middle, right):
            if panel.get_legend_handles_labels()[0]:
                panel.legend()
    figure.tight_layout()
    return save(figure, out, "reward")


def draw_rlhf(out: Path) -> Path:
    """Figs. 7, 8, 11 and 20 in miniature, and PPO's reward against its KL."""
    versions, last = read_exam(out, "rejection"), read_exam(out, "ppo")
    figure, axes = plotting().subplots(2, 3, figsize=(16, 8))
    (ladder, curve, duels), (shift, bought, course) = axes
    for r in versions["rounds"]:
        sizes, (best, median) = list(r["ladder"]), zip(*r["ladder"].values())
        sizes = list(map(int, sizes))
        line, = ladder.plot(sizes, best, "o-", label=f"V{r['round']}: best of N")
        ladder.plot(sizes, median, "x:", color=line.get_color())
        curve.plot(list(map(float, r["curve"])), list(r["curve"].values()), "o-",
                   label=f"for V{r['round']}")
    ladder.set_xscale("log", base=2)
    ladder.set(xlabel="answers per prompt N", ylabel="reward (raw score)",
               title="Best (line) and median (dots) of N (Fig. 7)")
    curve.set(xlabel="sampling temperature", ylabel="reward of the best of K (raw score)",
              title="Which temperature to sample at (Fig. 8)")
    against_sft = {**versions["win_rates"], "PPO": last["win_rates"]["PPO"]}
    for judge, style in (("reward_model", "o"), ("annotator", "s")):
        points = [(100 * w["helpful"][judge]["mean"], 100 * w["harmless"][judge]["mean"])
                  for w in against_sft.values()]
        duels.plot(*zip(*points), style, label=f"judged by {judge.replace('_', ' ')}")
        for name, point in zip(against_sft, points):
            duels.annotate(name, point, textcoords="offset points", xytext=(4, 4), fontsize=8)
    duels.margins(0.12)  # room for the names
    duels.set(xlabel="helpfulness: wins against SFT, ties half (%)", title="Versions (Fig. 11)",
              ylabel="harmlessness: wins against SFT, ties half (%)")
    for name, numbers in {**versions["versions"], "PPO": last}.items():
        counts = numbers["safety_histogram"]
        shift.plot([0.1, 0.3, 0.5, 0.7, 0.9], [100 * c / sum(counts) for c in counts], ".-",
                   label=name)
    shift.set(xlabel="sigmoid(safety score) on unsafe prompts", ylabel="answers (%)",
              title="Scores from version to version (Fig. 20)")
    rows = read_log(out, "ppo")
    held = [row for row in rows if "val_reward" in row]
    for panel, key, label, color in ((bought, "val_reward", "reward (raw score)", "C0"),
                                     (bought.twinx(), "gold", "gold score", "C1")):
        points = [(row["kl_start"], row[key]) for row in held if key in row]
        if points:
            panel.plot(*zip(*points), "o", color=color)
        panel.set_ylabel(f"{label} on held-out prompts", color=color)
    bought.set(xlabel="KL from PPO's start (nats per answer)", title="PPO: what the KL buys")
    rolled = [row for row in rows if "kl" in row]
    for key in ("reward", "kl", "entropy"):
        course.plot([row["step"] for row in rolled], [row[key] for row in rolled], label=key)
    course.set(xlabel="PPO iteration", ylabel="raw score, nats per answer, nats per token",
               title="PPO: its course")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.tight_layout()
    return save(figure, out, "ppo")


def draw_gatt(out: Path) -> Path:
    """Consistency by turn (Table 30), and Fig. 10's two triangles."""
    report = read_exam(out, "gatt")
    before, after = report["before"], report["after"]
    figure, (curves, *maps) = plotting().subplots(1, 3, figsize=(18, 4.6), layout="constrained")
    for numbers, when, style in ((before, "before", "o--"), (after, "after GAtt", "o-")):
        for name, color, label in (("seen", "tab:blue", "seen values"),
                                   ("unseen", "tab:orange", "unseen values"),
                                   ("untrained", "tab:green", "untrained kind of rule")):
            shares = [r["mean"] for r in numbers.get(name, [])]
            curves.plot(range(1, len(shares) + 1), shares, style, color=color, markersize=4,
                        label=f"{label}, {when}")
    for numbers, when, color in ((before, "before", "0.6"), (after, "after GAtt", "k")):
        shares = [r["mean"] for r in numbers["ceiling_seen"]]
        curves.plot(range(1, len(shares) + 1), shares, ":", color=color,
                    label=f"ceiling: told on every turn, {when}")
    curves.set(title="The instruction is given on turn 1 only", xlabel="turn", ylim=(0, 1.02),
               ylabel="share of answers that obey")
    curves.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=2)
    curves.grid(alpha=0.3)
    for panel, numbers, when in zip(maps, (before, after), ("before", "after GAtt")):
        end = len(numbers["map"]) * exam.BIN
        image = panel.imshow(numbers["map"], cmap="magma", vmin=0, vmax=1, extent=(0, end, end, 0))
        panel.set(title=f"Attention in one dialogue, {when}", ylabel="token that looks",
                  xlabel="token looked at (the system message first)")
        figure.colorbar(image, ax=panel, label="largest weight over layers and heads")
    return save(figure, out, "gatt")


FIGURES = {"pretrain": draw_pretrain, "sft": draw_sft, "reward": draw_reward, "rlhf": draw_rlhf,
           "gatt": draw_gatt}


def main(names: list[str], cfg: Config) -> None:
    """Draw these figures; a missing input is one line that names the command that makes it."""
    out = Path(cfg.out)
    drawn = 0
    for name in names:
        try:
            print(FIGURES[name](out))
            drawn += 1
        except FileNotFoundError as e:
            if len(names) == 1:
                raise
            print(f"{name}: {e}")
    if not drawn:
        raise FileNotFoundError(f"{out} holds nothing to draw: `make` trains and examines all")


if __name__ == "__main__":
    names = list(FIGURES)
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        names = [sys.argv.pop(1)]
        if names[0] not in FIGURES:
            print(f"paper.py: no figure {names[0]}: give one of {', '.join(FIGURES)}, or none for "
                  f"all", file=sys.stderr)
            raise SystemExit(2)
    stage.run(lambda cfg: main(names, cfg), Config)
