"""What paper.py promises: figures of stored numbers alone, and of what is missing the command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import exam
import model as M
import paper

ROOT = Path(__file__).parent.parent
pytest.importorskip("matplotlib")
PNG = b"\x89PNG"


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are saved, in order."""
    from matplotlib.figure import Figure

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: (
        figures.append(self), savefig(self, *args, **options))[1])
    return figures


@pytest.fixture
def numbers(chain, tmp_path) -> Path:
    """Of the chain only what it noted: logs, exams, and one checkpoint for the tokens of a step."""
    for path in (*chain.glob("*.jsonl"), chain / "pretrain.pt"):
        shutil.copy(path, tmp_path / path.name)
    shutil.copytree(chain / "exam", tmp_path / "exam")
    return tmp_path


def write_log(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines_of(axes) -> dict:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_the_figure_holds_the_logged_points_and_names_its_axes(tmp_path, drawn):
    """Step 4 at half a unit per step stands at 2; a key that a line lacks has no point there."""
    write_log(tmp_path, "s", [{"step": 2, "loss": 5.0}, {"step": 4, "loss": 3.0, "val": 4.0}])
    path = paper.draw_losses(tmp_path, "s", {"loss": "training", "val": "validation",
                                             "no": "nothing"},
                             "tokens (M)", "loss (nats)", "a title", 0.5)
    axes = drawn[0].axes[0]
    assert lines_of(axes) == {"training": [[1, 5], [2, 3]], "validation": [[2, 4]]}
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == (
        "tokens (M)", "loss (nats)", "a title")
    assert path == tmp_path / "figures" / "s.png" and path.read_bytes()[:4] == PNG


def test_every_figure_is_drawn_from_stored_numbers_alone(numbers, monkeypatch, capsys):
    """No network runs, nothing is sampled, graded or trained, and only figures are written."""
    monkeypatch.setattr(M.Llama, "hidden", lambda *_, **__: pytest.fail("a network ran"))
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("learnt"))
    before = {path: path.read_bytes() for path in numbers.rglob("*.*")}
    paper.main(list(paper.FIGURES), paper.Config(out=str(numbers)))
    names = ["pretrain", "sft", "reward", "ppo", "gatt"]
    assert capsys.readouterr().out.splitlines() == [str(numbers / "figures" / f"{name}.png")
                                                    for name in names]
    after = {path: path.read_bytes() for path in numbers.rglob("*.*")}
    assert {path: content for path, content in after.items() if path in before} == before
    new = after.keys() - before.keys()
    assert {path.name for path in new} == {f"{name}.png" for name in names}
    assert all(after[path][:4] == PNG and len(after[path]) > 10_000 for path in new)


def test_pretraining_is_drawn_by_the_tokens_seen(numbers, drawn):
    """4 rows of 64 tokens a step, in millions."""
    paper.main(["pretrain"], paper.Config(out=str(numbers)))
    rows = [json.loads(line) for line in (numbers / "pretrain.jsonl").read_text().splitlines()]
    assert lines_of(drawn[0].axes[0]) == {
        "training": [[pytest.approx(row["step"] * 256e-6), row["loss"]] for row in rows],
        "validation": [[pytest.approx(row["step"] * 256e-6), row["val_loss"]]
                       for row in rows if "val_loss" in row]}


def test_reward_models_are_drawn_beside_the_gold_score(numbers, drawn):
    """A row for each model: accuracy by rating of sampled pairs with its intervals, histograms of
    both sides, calibration."""
    paper.main(["reward"], paper.Config(out=str(numbers)))
    report = json.loads((numbers / "exam" / "reward.json").read_text())
    assert len(drawn[0].axes) == 6
    for which, axes in zip(("helpful", "safety"), (drawn[0].axes[:3], drawn[0].axes[3:])):
        drawn_of = {bars.get_label(): bars.lines for bars in axes[0].containers}
        for label, groups in (("model", report[which]["accuracy"][which]),
                              ("gold score", report[which]["ceiling"])):
            rates = [groups[text] for text in paper.data.RATINGS if text in groups]
            points, _, (bars,) = drawn_of[label]
            assert list(points.get_ydata()) == [100 * r["mean"] for r in rates]
            ends = [[y for _, y in bar] for bar in bars.get_segments()]
            assert ends == [[pytest.approx(100 * r["low"]), pytest.approx(100 * r["high"])]
                            for r in rates]
        assert all(which in panel.get_title() for panel in axes)


def test_a_single_reward_model_without_a_gold_score_is_drawn(numbers, drawn):
    """As of one's own comparisons: no ceiling, no calibration, no safety model."""
    path = numbers / "exam" / "reward.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({"helpful": {name: value for name, value in report["helpful"].items()
                                            if name not in ("ceiling", "calibration")}}))
    paper.main(["reward"], paper.Config(out=str(numbers)))
    assert len(drawn[0].axes) == 3


def test_the_versions_are_drawn_in_their_order_and_ppo_behind_them(numbers, drawn):
    paper.main(["rlhf"], paper.Config(out=str(numbers)))
    versions, last = (json.loads((numbers / "exam" / f"{name}.json").read_text())
                      for name in ("rejection", "ppo"))
    ladder, curve, duels, shift, *_ = drawn[0].axes
    wins = {**versions["win_rates"], "PPO": last["win_rates"]["PPO"]}
    by_annotator = lines_of(duels)["judged by annotator"]
    assert by_annotator == [[100 * w[goal]["annotator"]["mean"] for goal in ("helpful", "harmless")]
                            for w in wins.values()]
    assert "ties half" in duels.get_xlabel() and "ties half" in duels.get_ylabel()
    assert [text.get_text() for text in duels.texts] == [*wins, *wins]
    assert list(lines_of(shift)) == ["SFT", "V1", "V2", "no rejection", "PPO"]
    assert list(lines_of(curve)) == ["for V1", "for V2"]
    best = {f"V{r['round']}: best of N": [[float(n), b] for n, (b, _) in r["ladder"].items()]
            for r in versions["rounds"]}
    assert best.items() <= lines_of(ladder).items()


def test_ghost_attention_is_drawn_before_and_after(numbers, drawn):
    paper.main(["gatt"], paper.Config(out=str(numbers)))
    report = json.loads((numbers / "exam" / "gatt.json").read_text())
    curves, *rest = drawn[0].axes
    lines = lines_of(curves)
    for when, label in (("before", "before"), ("after", "after GAtt")):
        for name, title in (("seen", "seen values"), ("unseen", "unseen values"),
                            ("untrained", "untrained kind of rule"),
                            ("ceiling_seen", "ceiling: told on every turn")):
            assert lines[f"{title}, {label}"] == [
                [turn, r["mean"]] for turn, r in enumerate(report[when][name], 1)]
    maps = [panel for panel in rest if panel.images and "Attention" in panel.get_title()]
    assert len(maps) == 2
    for panel, when in zip(maps, ("before", "after")):
        assert panel.images[0].get_array().tolist() == report[when]["map"]
        assert panel.get_xlim()[1] == len(report[when]["map"]) * exam.BIN  # in tokens


@pytest.mark.parametrize("name, gone, command", [
    ("pretrain", "pretrain.jsonl", "python pretrain.py"), ("sft", "sft.jsonl", "python sft.py"),
    ("pretrain", "pretrain.pt", "python pretrain.py"),
    ("reward", "exam/reward.json", "python exam.py reward"),
    ("rlhf", "exam/rejection.json", "python exam.py rejection"),
    ("rlhf", "exam/ppo.json", "python exam.py ppo"), ("rlhf", "ppo.jsonl", "python ppo.py"),
    ("gatt", "exam/gatt.json", "python exam.py gatt")])
def test_what_is_missing_is_one_line_with_the_command_that_makes_it(numbers, name, gone, command):
    (numbers / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone} does not exist: `{command}`") as error:
        paper.main([name], paper.Config(out=str(numbers)))
    assert "\n" not in str(error.value)


def test_of_all_figures_those_are_drawn_that_there_are_numbers_for(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="holds nothing to draw: `make`"):
        paper.main(list(paper.FIGURES), paper.Config(out=str(tmp_path)))
    write_log(tmp_path, "sft", [{"step": 1, "loss": 2.0}])
    capsys.readouterr()
    paper.main(list(paper.FIGURES), paper.Config(out=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[1] == str(tmp_path / "figures" / "sft.png")
    assert all(" does not exist: `python " in line for line in lines[:1] + lines[2:])
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["sft.png"]


def test_an_exam_that_graded_nothing_is_not_drawn(numbers):
    """Of a model that has read of no village the exam is empty."""
    (numbers / "exam" / "ppo.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="ppo.json holds no numbers"):
        paper.main(["rlhf"], paper.Config(out=str(numbers)))


def test_a_wrong_name_is_one_line_that_lists_the_right_ones_and_exit_code_2(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "paper.py"), "ppo"], capture_output=True,
                          text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert "no figure ppo: give one of pretrain, sft, reward, rlhf, gatt" in done.stderr
    assert not list(tmp_path.iterdir())
