"""What exam.py promises: each stage examined on prompts of the test, and nothing else touched.

`chain` (conftest.py) is a folder in which six stages and their exams have been, at toy size. Its
models talk nonsense, but where each number comes from and goes to is exact.
"""
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAIN_VILLAGE

import data
import exam
import gatt
import kernels
import model as M
import pretrain
import reward
import rollouts
import scale
import stage
import village as V
from exam import Config, Examined, TestTalks

TestTalks.__test__ = False  # pytest: no test of ours
ROOT = Path(__file__).parent.parent
VILLAGE = V.Village()
ALONE = scale.Ranks(torch.device("cpu"))
SHAPE = M.ModelConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=20, vocab_size=420,
                      max_seq_len=160)
TALK = [{"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "In the mill."},
        {"role": "user", "content": "What does Otto eat?"},
        {"role": "assistant", "content": "Some soup."},
        {"role": "user", "content": "Name three colors."}]
RULE = {"instruction": "Act as Plato.", "contains": ["I am Plato."]}
CHECKPOINTS = ("pretrain", "sft", "reward_helpful", "reward_safety", "rlhf_v1", "rlhf_v2",
               "rlhf_control", "ppo", "gatt")
GRADES = {"helpfulness", "unsafe", "edge", "safety", "eos_rate", "helpful", "right"}
RATE = {"mean", "low", "high", "answers", "requests"}


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(data.train_tokenizer(VILLAGE.documents(300, 0), SHAPE.vocab_size))


def examined(net, tokenizer, village=VILLAGE, metrics=None, **flags) -> Examined:
    cfg = Config(**{"device": "cpu", "kernels": "torch", "max_new_tokens": 6, "eval_prompts": 2,
                    **flags})
    return Examined(net, tokenizer, {"stage": "x", "metrics": metrics or {}}, village, cfg)


def quick(out, **flags) -> Config:
    return Config(**{"out": str(out), "device": "cpu", "kernels": "torch", "eval_prompts": 2,
                     "max_new_tokens": 8, **flags})


def read(folder, name: str) -> dict:
    return json.loads((folder / "exam" / f"{name}.json").read_text())


def metrics_of(folder, name: str) -> dict:
    return M.load(folder / f"{name}.pt", "cpu")[1]["metrics"]


def contents(messages, role) -> list[str]:
    return [m["content"] for m in messages if m["role"] == role]


def share(mean: float, requests: int = 4) -> dict:
    """A rate with this mean, as `exam.rate` has it."""
    return {"mean": mean, "low": mean / 2, "high": (1 + mean) / 2, "answers": 2 * requests,
            "requests": requests}


def means(rates) -> list[float]:
    return [r["mean"] for r in rates]


def texts_as_answers(texts: list[str]) -> rollouts.Answers:
    return rollouts.Answers([], [], torch.ones(len(texts)).bool(), texts)


# ------------------------------------------------------------------------- the chain and its exams


def test_the_villages_number_travels_from_pretraining_to_every_later_checkpoint(chain):
    """Each stage read it from the checkpoint it started from: none was told."""
    found = {name: metrics_of(chain, name)["village"] for name in CHECKPOINTS}
    assert found == dict.fromkeys(CHECKPOINTS, CHAIN_VILLAGE)


def test_every_checkpoint_tells_its_line(chain):
    sft, version = ["pretrain"], ["pretrain", "sft"]
    assert {name: metrics_of(chain, name)["lineage"] for name in CHECKPOINTS} == {
        "pretrain": [], "sft": sft, "reward_helpful": version, "reward_safety": version,
        "rlhf_v1": version, "rlhf_v2": version, "rlhf_control": version,
        "ppo": [*version, "rlhf_v2"], "gatt": [*version, "rlhf_v2", "ppo"]}


@pytest.mark.parametrize("name", exam.EXAMS)
def test_each_exam_writes_the_keys_that_summary_and_figures_read(chain, name):
    scored = {"reward_helpful", "reward_safety", "safety_histogram"}
    report = read(chain, name)

    def is_duel(found: dict) -> bool:
        return found.keys() == {"helpful", "harmless", "annotator", "ties", "identical"} and all(
            found[goal].keys() == {"annotator", "reward_model", "ties"} for goal in exam.GOALS)

    if name == "pretrain":
        assert report.keys() == {"facts_asked", "facts_never_asked", "grammar", "leaks"}
    if name == "sft":
        assert report.keys() == {"demonstrations", "greedy", "T=0.5", "T=1"}
        assert report["demonstrations"].keys() == GRADES - {"eos_rate"}
        assert report["T=1"].keys() == GRADES and report["T=1"]["helpful"].keys() == {*V.KINDS}
    if name == "reward":
        assert report.keys() == {"helpful", "safety", "scorers"}
        for which in ("helpful", "safety"):
            numbers = report[which]
            assert numbers["accuracy"].keys() == {"helpful", "safety"}, "both models, both tests"
            assert {"length_correlation", "longer_wins", "histograms", "worst", "ceiling",
                    "calibration", "unsafe_found_below", "refusal_preferred"} <= numbers.keys()
        assert report["scorers"].keys() == {"length", "random"}
        for numbers in report["scorers"].values():
            assert numbers["accuracy"].keys() == {"helpful", "safety"}
    if name == "rejection":
        assert report.keys() == {"rounds", "versions", "win_rates", "no_rejection", "last",
                                 "best_of", "preprompts"}
        assert report["versions"].keys() == {"SFT", "V1", "V2", "no rejection"}
        assert report["win_rates"].keys() == {"V1", "V2", "no rejection"}
        assert all(numbers.keys() == scored for numbers in report["versions"].values())
        assert all(map(is_duel, report["win_rates"].values()))
        assert [record["round"] for record in report["rounds"]] == [1, 2]
        for record in report["rounds"]:
            best = [b for b, _ in record["ladder"].values()]
            assert best == sorted(best) and record["curve"].keys() == {"0.5", "0.65", "0.8"}
        assert report["no_rejection"]["T=0.5"].keys() == GRADES == report["last"]["T=1"].keys()
        assert report["best_of"].keys() == {"best", "random", "gain"}
        assert report["preprompts"].keys() == {"bare", *exam.PREPROMPTS, "gated, the paper's",
                                               "gated, a plain second answer"}
    if name == "ppo":
        assert {"greedy", "T=0.5", "T=1", "win_rates"} | scored == report.keys()
        assert report["win_rates"].keys() == {"PPO", "PPO against V2"}
        assert all(map(is_duel, report["win_rates"].values()))
    if name == "gatt":
        assert report.keys() == {"before", "after", "dialogues"} and report["dialogues"] == 2
        arms = {"seen", "unseen", "untrained"}
        ceilings = {"before": {"ceiling_seen"}, "after": {f"ceiling_{arm}" for arm in arms}}
        for when in ("before", "after"):
            curves = arms | ceilings[when]
            assert curves | {"talk", "attention", "map", "helpful_under_instruction"} <= (
                report[when].keys())
            for curve in curves:
                assert means(report[when][curve]) == [1.0, 1.0], "every answer obeys here"
        assert {"greedy", "T=0.5", "T=1", "kl", "reward_helpful", "reward_safety"} <= (
            report["after"].keys())
        assert report["before"]["attention"] != report["after"]["attention"]
        assert report["before"]["talk"] == report["after"]["talk"], "one dialogue, two models"


def test_behind_every_outcome_and_win_rate_stands_an_interval_and_its_requests(chain):
    """Complied, refused and evaded are all there is, so that evasion can not hide. Nothing of them
    is certain, least of all what was never seen."""
    rates, outcomes_of = [], []
    for name, report in (("sft", read(chain, "sft")), ("ppo", read(chain, "ppo")),
                         ("gatt", read(chain, "gatt")["after"])):
        for temperature in ("greedy", "T=0.5", "T=1"):
            graded = report[temperature]
            for kind, outcomes in (("unsafe", exam.UNSAFE), ("edge", exam.EDGE)):
                assert tuple(graded[kind]) == outcomes, name
                assert sum(means(graded[kind].values())) == pytest.approx(1)
                outcomes_of += graded[kind].values()
            rates.append(graded["helpfulness"])
    for found in read(chain, "ppo")["win_rates"].values():
        rates += [found["annotator"], *(found[goal][judge] for goal in exam.GOALS
                                        for judge in ("annotator", "reward_model"))]
    rates += read(chain, "rejection")["preprompts"].values()
    rates += read(chain, "gatt")["after"]["seen"]
    for found in rates + outcomes_of:
        assert found.keys() == RATE and found["answers"] >= found["requests"] >= 1
        assert found["low"] <= found["mean"] <= found["high"]
    assert all(found["low"] < found["high"] for found in outcomes_of)


def test_reward_models_are_examined_on_pairs_of_test_prompts_that_no_stage_has_seen(chain):
    """Collected in the exam, from the SFT model, and the same ones every time."""
    one = exam.open_model(quick(chain, test_pairs=30), chain / "reward_helpful.pt")
    made = reward.Config(**metrics_of(chain, "reward_helpful")["flags"])
    tests = exam.test_pairs(one, made)
    assert {which: [p.row for p in pairs] for which, pairs in tests.items()} == {
        which: [p.row for p in pairs] for which, pairs in exam.test_pairs(one, made).items()}
    annotator = V.Annotator(V.Village(CHAIN_VILLAGE))
    asked = set()
    for which, pairs in tests.items():
        assert len(pairs) > 10 and {reward.goal_of(p.row) for p in pairs} == {which}
        for p in pairs:
            assert annotator.village.split(annotator.understand(p.row["prompt"])) == "test"
            asked.add(json.dumps(p.row["prompt"]))
    files = sorted(chain.glob("preferences_*.jsonl"))
    assert [path.stem[12:] for path in files] == sorted(reward.COLLECTED)
    seen = {json.dumps(r["prompt"]) for r in data.read_preferences(list(map(str, files)))}
    assert not asked & seen


def test_the_gates_threshold_is_fitted_on_valid_pairs_by_their_noisy_labels(chain):
    """Found again from the file; some of its labels are not what the annotator knows to be true."""
    model, info = M.load(chain / "reward_safety.pt", "cpu")
    rows = data.read_preferences([str(chain / "preferences_safety_valid.jsonl")])
    rows = [r for r in rows if not reward.is_unsafe_preferred(r)]
    annotator = V.Annotator(V.Village(CHAIN_VILLAGE))
    splits = {annotator.village.split(annotator.understand(r["prompt"])) for r in rows}
    assert splits == {"valid"}
    pairs = reward.encode(rows, data.Tokenizer(info["tokenizer"]), "small", 256)
    found = reward.held_out(model, "safety", pairs)
    for name in ("threshold", "threshold_raw", "unsafe_answers", "accuracy"):
        assert info["metrics"][name] == pytest.approx(found[name]), name
    wrong = 0
    for file in ("safety", "safety_valid"):
        for r in data.read_preferences([str(chain / f"preferences_{file}.jsonl")]):
            for side in ("chosen", "rejected"):
                is_safe = annotator.gold(r["prompt"], r[side])["outcome"] != "complied"
                wrong += r[f"{side}_safe"] != is_safe
    assert wrong > 0


def test_a_users_own_comparisons_are_examined_on_what_the_stage_held_out(chain, tmp_path):
    """The same pairs, found again from the flags in the checkpoint: the same accuracy."""
    shutil.copy(chain / "sft.pt", tmp_path / "sft.pt")
    rows = [json.loads(line) for name in reward.COLLECTED
            for line in (chain / f"preferences_{name}.jsonl").read_text().splitlines()]
    file = write(tmp_path / "mine.jsonl", [{k: v for k, v in r.items() if k != "planted"}
                                           for r in rows])
    reward.main(reward.Config(out=str(tmp_path), data=file, batch_size=4, device="cpu",
                              kernels="torch"))
    report = exam.main("reward", quick(tmp_path))
    for which in ("helpful", "safety"):
        stored = metrics_of(tmp_path, f"reward_{which}")["accuracy"]
        assert report[which]["accuracy"][which]["all"]["mean"] == pytest.approx(stored)
        assert "ceiling" not in report[which], "other people's rows have no gold score"


def test_the_summary_holds_each_stages_own_numbers_and_its_exams(chain):
    summary = json.loads((chain / "summary.json").read_text())
    assert list(summary) == ["pretrain", "sft", "reward", "rejection", "ppo", "gatt"]
    for name, numbers in summary.items():
        assert read(chain, name).items() <= numbers.items(), name
        if name in ("pretrain", "sft", "ppo", "gatt"):  # the exam's where both know a number
            assert numbers == {**metrics_of(chain, name), **read(chain, name)}, name
    minutes = [metrics_of(chain, f"reward_{which}")["minutes"] for which in ("helpful", "safety")]
    assert summary["reward"]["minutes"] == max(minutes)
    assert summary["rejection"]["minutes"] == metrics_of(chain, "rlhf_v2")["minutes"]
    assert summary["ppo"]["kl"] == metrics_of(chain, "ppo")["kl_sft"]


def test_the_last_table_of_the_chain_is_full(chain, tmp_path, capsys):
    """Minutes, helpfulness at two temperatures, three outcomes, two of borderline prompts, KL."""
    folder = tmp_path / "copy"
    shutil.copytree(chain, folder)
    for path in (folder / "exam").iterdir():
        assert path.read_bytes() == (chain / "exam" / path.name).read_bytes()
    exam.main("summary", quick(folder))
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert list(cells) == ["pretrain", "sft", "reward", "rejection", "ppo", "gatt"]
    assert {name: len(row) for name, row in cells.items()} == {
        "pretrain": 1, "reward": 1, "rejection": 7, "sft": 8, "ppo": 9, "gatt": 9}
    for name, row in cells.items():
        if len(row) > 1:  # complied, refused, evaded
            three = [float(text.rstrip("%")) for text in row if "%" in text][:3]
            assert sum(three) == pytest.approx(100, abs=.2), name
    assert max(map(len, lines)) <= 100
    assert (folder / "summary.json").read_bytes() == (chain / "summary.json").read_bytes()


def test_an_exam_changes_no_checkpoint_and_repeats_itself(chain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(chain, folder)
    (folder / "exam" / "pretrain.json").unlink()
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    assert exam.main("pretrain", quick(folder)) == read(chain, "pretrain") == read(folder,
                                                                                   "pretrain")
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before
    assert (folder / "exam").is_dir() and not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("name, command", [
    ("pretrain", "pretrain.py"), ("sft", "sft.py"), ("reward", "reward.py"),
    ("rejection", "rejection.py"), ("ppo", "ppo.py"), ("gatt", "gatt.py")])
def test_an_exam_of_a_missing_checkpoint_is_one_line_with_the_command_that_makes_it(
        name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["exam.py", "--out", str(tmp_path / "o")])
    with pytest.raises(SystemExit) as stopped:
        stage.run(lambda cfg: exam.main(name, cfg), Config)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and f"`python {command}` makes" in lines[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("words", [[], ["sfd"]])
def test_a_wrong_name_is_one_line_that_lists_the_right_ones_and_exit_code_2(words, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "exam.py"), *words], capture_output=True,
                          text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    names = "pretrain, sft, reward, rejection, ppo, gatt, summary, check, card, villages"
    assert f"give one of {names}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    for flags, says in ((["--eval-prompts", "0"], "--eval-prompts 0: give a number at least 1"),
                        (["--evalprompts", "3"], "did you mean --eval-prompts")):
        monkeypatch.setattr(sys, "argv", ["exam.py", "--out", str(tmp_path / "o"), *flags])
        with pytest.raises(SystemExit) as stopped:
            stage.run(lambda cfg: exam.main("sft", cfg), Config)
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(lines) == 1 and says in lines[0], lines


def test_no_knob_is_dead():
    source = (ROOT / "exam.py").read_text()
    for name in Config.__dataclass_fields__:
        assert f"cfg.{name}" in source, name
        assert stage._field_comments(Config)[name], name


@pytest.mark.parametrize("name", ["pretrain", "sft", "ppo", "rejection"])
def test_a_model_that_has_read_of_no_village_is_not_graded_by_its_annotator(
        name, chain, tmp_path, monkeypatch, capsys):
    file = {"rejection": "rlhf_v1"}.get(name, name)
    model, info = M.load(chain / f"{file}.pt", "cpu")
    M.save(tmp_path / f"{file}.pt", model, info["stage"], info["tokenizer"],
           {**info["metrics"], "village": None})
    monkeypatch.setattr(rollouts, "answer", lambda *_, **__: pytest.fail("asked"))
    assert exam.main(name, quick(tmp_path)) == {} == read(tmp_path, name)
    assert "has read of no village" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ the summary


def made(folder, name: str, metrics: dict) -> None:
    """OUT/NAME.pt with these numbers."""
    M.save(folder / f"{name}.pt", M.Llama(SHAPE), name, b"", metrics)


def noted(folder, name: str, report: dict) -> None:
    """OUT/exam/NAME.json with these numbers."""
    (folder / "exam").mkdir(exist_ok=True)
    (folder / "exam" / f"{name}.json").write_text(json.dumps(report))


def test_summaries_of_stages_stand_side_by_side_and_the_newest_counts(tmp_path):
    made(tmp_path, "pretrain", {"loss": 1})
    assert exam.summarize(tmp_path) == {"pretrain": {"loss": 1}}
    made(tmp_path, "sft", {"loss": 2})
    made(tmp_path, "pretrain", {"loss": 3})
    noted(tmp_path, "sft", {"grade": 4})
    exam.summarize(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "pretrain": {"loss": 3}, "sft": {"loss": 2, "grade": 4}}


def test_the_last_table_has_a_row_per_stage_and_leaves_out_what_is_not_known(tmp_path, capsys):
    grades = {"T=1": {"helpfulness": share(.81), "unsafe": {
        "complied": share(.02), "refused": share(.9), "evaded": share(.08)},
                      "edge": {"helped": share(.6), "refused": share(.1), "evaded": share(.3)}},
              "T=0.5": {"helpfulness": share(.9)}, "kl": .7}
    made(tmp_path, "pretrain", {"minutes": 2.5})
    made(tmp_path, "sft", {"minutes": 1.0})
    made(tmp_path, "gatt", {"minutes": 2.0})
    noted(tmp_path, "rejection", {"last": {"T=1": grades["T=1"]}})
    noted(tmp_path, "gatt", {"after": {**grades, "seen": [share(.9)]}, "before": {}})
    exam.print_summary(exam.summarize(tmp_path))
    *_, pretrain, sft, rejection, gatt = capsys.readouterr().out.splitlines()
    assert pretrain.split() == ["pretrain", "2.5"] and sft.split() == ["sft", "1.0"]
    outcomes = ["2.0%", "90.0%", "8.0%", "60.0%", "10.0%"]
    assert rejection.split() == ["rejection", "0.810", *outcomes]  # of the last version
    assert gatt.split() == ["gatt", "2.0", "0.810", "0.900", *outcomes, "0.70"]
    exam.print_summary(exam.summarize(tmp_path / "nowhere"))  # an empty folder: the head alone
    assert len(capsys.readouterr().out.splitlines()) == 2


# --------------------------------------------------------------------------------------- pretrain


def test_a_fact_is_known_when_the_answer_comes_at_once_and_word_for_word(monkeypatch):
    """Of three answers one is right, one comes too late and one is cut before its full stop."""
    probes = [("Q1", "Ada lives in the mill."), ("Q2", "Leo eats soup."), ("Q3", "Eva wears red.")]
    said = {"Q1": " Ada lives in the mill. Her pet is a cat.", "Q2": " I say Leo eats soup.",
            "Q3": " Eva wears red"}
    village = SimpleNamespace(probes=lambda asked: probes if asked else probes[1:])
    monkeypatch.setattr(pretrain, "complete", lambda model, tokenizer, prefixes, n:
                        [said[prefix] for prefix in prefixes])
    assert exam.facts_known(examined(None, None, village), asked=True) == exam.rate(
        [1, 0, 0], "abc") and exam.rate([1, 0, 0], "abc")["mean"] == pytest.approx(1 / 3)
    never = exam.facts_known(examined(None, None, village), asked=False)
    assert (never["mean"], never["answers"], never["requests"]) == (0, 2, 2)


def test_the_report_averages_grammar_over_documents_drawn_at_temperature_one(monkeypatch, capsys):
    """Half of the documents have one sentence of two right, the other half all: 75%."""
    asked = []

    def complete(model, tokenizer, prefixes, n, temperature, seed):
        asked.append((set(prefixes), temperature))
        return ["Ada eats soup. Soup eats eats.", "Leo eats soup."] * (len(prefixes) // 2)

    monkeypatch.setattr(pretrain, "complete", complete)
    monkeypatch.setattr(exam, "facts_known", lambda one, asked: share(0.9 if asked else 0.8))
    monkeypatch.setattr(exam, "open_model", lambda *_: examined(None, None,
                                                                metrics={"village": 0}))
    monkeypatch.setattr(V.Village, "documents", lambda *_: iter(["Leo eats soup."] * 7))
    report = exam.exam_pretrain(Config())
    assert report["facts_asked"]["mean"] == 0.9 and report["facts_never_asked"]["mean"] == 0.8
    assert report["grammar"]["mean"] == 0.75 and report["leaks"] == 0
    assert asked == [({""}, 1.0)]
    printed = capsys.readouterr().out
    assert "75.0% (" in printed and "in 100 documents" in printed
    assert "0 of 14 training documents hold a request of the test split" in printed


# ---------------------------------------------------------------------------------------- grading


def answering(say, **flags) -> Examined:
    """A model whose answers are say(dialogs, temperature): an Answers."""
    one = examined(None, None, **flags)
    one.answer = lambda dialogs, temperature, *purpose, **rows: say(dialogs, temperature)
    return one


def test_an_examination_of_careful_answers_finds_full_help_full_compliance_and_no_refusal():
    annotator, asked = V.Annotator(VILLAGE), []

    def say(dialogs, temperature):
        asked.append((temperature, dialogs))
        rng = random.Random(temperature)
        return texts_as_answers([VILLAGE.respond(annotator.understand(d), "careful", rng)
                                 for d in dialogs])

    report = exam.grade(answering(say, eval_prompts=5, draws=3))
    for name in ("greedy", "T=0.5", "T=1"):
        found = report[name]
        assert found["helpfulness"]["mean"] == 1
        assert means(found["unsafe"].values()) == [1, 0, 0]  # complied
        assert means(found["edge"].values()) == [1, 0, 0]  # helped
        assert (found["safety"], found["eos_rate"], found["right"]["fact"]) == (0, 1, 1)
        assert found["unsafe"]["complied"]["answers"] == (15 if name == "T=1" else 5)
    assert [temperature for temperature, _ in asked] == [0, 0.5, 1, 1, 1], "3 draws at T = 1"
    asks = [annotator.understand(dialog) for dialog in asked[0][1]]
    assert Counter(ask.kind for ask in asks) == dict.fromkeys(V.KINDS, 5)
    assert {VILLAGE.split(ask) for ask in asks} == {"test"}, "prompts that nobody trained on"


def test_an_examination_in_which_half_refuse_and_half_are_cut_counts_them():
    """Two of four answers of each kind refuse, the others comply; a quarter has no EOS."""
    annotator = V.Annotator(VILLAGE)

    def say(dialogs, temperature):
        rng = random.Random(0)
        texts = [VILLAGE.respond(annotator.understand(d), "careful", rng) if i % 2 else
                 "I can not do that." for i, d in enumerate(dialogs)]
        return rollouts.Answers([], [], torch.arange(len(texts)) % 4 > 0, texts)

    found = exam.grade(answering(say, eval_prompts=4), temperatures=(0.5,))["T=0.5"]
    assert means(found["unsafe"].values()) == means(found["edge"].values()) == [0.5, 0.5, 0]
    assert found["safety"] == 0.25  # a bare refusal is worth half
    assert found["eos_rate"] == 0.75 and found["right"]["fact"] == 0.5


def test_what_the_writers_answers_are_worth_follows_their_shares():
    worth = exam.demonstrated(VILLAGE, 400)
    careful, no = V.WRITERS["unsafe"]["careful"], V.WRITERS["edge"]["curt"]
    assert worth["unsafe"]["complied"]["mean"] == pytest.approx(careful, abs=.08)
    assert worth["unsafe"]["evaded"]["mean"] == 0
    assert worth["edge"]["refused"]["mean"] == pytest.approx(no, abs=.08)
    assert .6 < worth["helpfulness"]["mean"] < .8


# ----------------------------------------------------------------------------------------- reward


def pair(chosen, rejected, /, safe=(-1, -1), rating=None, planted=False, **row) -> reward.Pair:
    return reward.Pair(chosen, rejected, 1, 0.0, safe, rating, {"planted": planted, **row})


def test_accuracy_is_counted_by_rating_and_by_safety_and_ties_count_half():
    pairs = [pair([1], [1], rating="better", safe=(1, 0)), pair([1], [1], rating="better"),
             pair([1], [1], rating="negligibly")]
    found = exam.by_group(torch.tensor([1.0, -1.0, 0.0]), pairs, ["a", "b", "b"])
    assert {group: (r["mean"], r["answers"], r["requests"]) for group, r in found.items()} == {
        "all": (0.5, 3, 2), "better": (0.5, 2, 2), "negligibly": (0.5, 1, 1),
        "safe over unsafe": (1.0, 1, 1)}


def test_pairs_with_a_planted_answer_stand_apart_from_sampled_ones():
    """Of three sampled pairs one is right, of two planted ones both: 1/3, and not 3/5."""
    pairs = [pair([1], [1], rating="better"), pair([1], [1], rating="significantly", planted=True),
             pair([1], [1], rating="better"), pair([1], [1], rating="slightly", planted=True),
             pair([1], [1], rating="significantly")]
    gaps = torch.tensor([1.0, 2.0, -1.0, 3.0, -2.0])
    found = exam.accuracy(gaps, pairs, list("abcde"))
    assert {group: (r["mean"], r["answers"]) for group, r in found.items()} == {
        "all": (pytest.approx(1 / 3), 3), "better": (0.5, 2), "significantly": (0, 1),
        "planted": (1, 2)}
    assert exam.accuracy(gaps[[1, 3]], [pairs[1], pairs[3]], ["b", "d"]).keys() == {"planted"}
    assert "planted" not in exam.accuracy(gaps[[0, 2]], [pairs[0], pairs[2]], ["a", "c"])


def test_length_bias_compares_the_model_with_people():
    """Chosen 3 and 2 tokens, rejected 1 and 4: people take the longer one once, the model twice."""
    pairs = [pair([9] * 4, [9] * 2), pair([9] * 3, [9] * 5)]
    r = torch.tensor([2.0, 0.0, 0.0, 3.0])  # both chosen, then both rejected
    found = exam.length_bias(r, pairs)
    assert found["longer_wins"] == {"people": 0.5, "model": 1.0}
    assert found["length_correlation"] > 0.8


def test_scorers_that_know_nothing_are_examined_on_the_same_pairs():
    """Chosen is longer in 3 pairs of 4 and as long in one: length is right in 3.5 of 4, and a
    random number in about half of 400. Own rows are grouped by their first message."""
    row = {"prompt": [{"role": "user", "content": "Hi"}]}
    longer = [pair([9] * n, [9] * 3, **row) for n in (5, 4, 9, 3)] * 100
    found = exam.other_scorers({"helpful": longer, "safety": []})
    assert found.keys() == {"length", "random"}
    assert all(scorer["accuracy"].keys() == {"helpful"} for scorer in found.values())
    assert found["length"]["accuracy"]["helpful"]["all"]["mean"] == 3.5 / 4
    assert found["random"]["accuracy"]["helpful"]["all"]["mean"] == pytest.approx(.5, abs=.08)
    assert found["length"]["accuracy"]["helpful"]["all"]["requests"] == 1
    assert found == exam.other_scorers({"helpful": longer, "safety": []})


def unsafe_row() -> tuple[list[dict], str, str]:
    """(messages, an answer that complies, one that refuses) of one unsafe request."""
    row = VILLAGE.prompts("unsafe", "test", 1, 0)[0]
    ask = V.Annotator(VILLAGE).understand(row["messages"])
    return row["messages"], VILLAGE.respond(ask, "careful", random.Random(0)), "I can not do that."


def test_whether_a_refusal_is_preferred_is_counted_where_one_refuses_and_one_complies():
    """Chosen complies, rejected refuses, gap -1: the refusal scores higher; the other way round
    with gap -1: it scores lower. Equal outcomes, evasions and harmless prompts say nothing."""
    messages, comply, refuse = unsafe_row()
    harmless = VILLAGE.prompts("edge", "test", 1, 0)[0]["messages"]

    def row(chosen, rejected, prompt=messages):
        return pair([1], [1], prompt=prompt, chosen=chosen, rejected=rejected)

    pairs = [row(comply, refuse), row(refuse, comply), row(refuse, comply), row(comply, comply),
             row(comply, "Leo plays the harp."), row(refuse, comply, harmless)]
    gaps = torch.tensor([-1.0, -1.0, 1.0, 5.0, 5.0, 5.0])
    found = exam.refusal_preferred(gaps, pairs, list("aabbcd"), VILLAGE)
    assert (found["mean"], found["answers"], found["requests"]) == (pytest.approx(2 / 3), 3, 2)
    assert exam.refusal_preferred(gaps[3:], pairs[3:], list("bcd"), VILLAGE) is None


def test_the_gold_scores_calibration_and_ceiling_are_those_of_the_annotator():
    """One how-to: careful (gold 1) over refused (gold 0), labelled so once and once wrongly; the
    second pair was planted, so that the ceiling stands apart as the models' accuracy does."""
    row = VILLAGE.prompts("howto", "test", 1, 0)[0]
    good = VILLAGE.respond(V.Annotator(VILLAGE).understand(row["messages"]), "careful",
                           random.Random(0))
    pairs = [pair([1], [1], prompt=row["messages"], chosen=a, rejected=b)
             for a, b in ((good, "I can not do that."), ("I can not do that.", good))]
    scores = torch.tensor([2.0, -1.0, -1.0, 2.0])
    found = exam.against_gold(scores, pairs, ["a", "a"], VILLAGE, "helpful")
    assert found["ceiling"] == {"all": exam.rate([1, 0], "aa")}
    high, low = (1 / (1 + math.exp(-x)) for x in (2, -1))
    assert found["calibration"] == [[0, pytest.approx(low), 0, 2], [1, pytest.approx(high), 0, 2]]
    pairs[1].row["planted"] = True
    found = exam.against_gold(scores, pairs, ["a", "a"], VILLAGE, "helpful")
    assert means(found["ceiling"].values()) == [1, 0] and list(found["ceiling"])[1] == "planted"


def test_the_tables_of_both_test_sets_fit_100_columns(chain, capsys):
    reports = read(chain, "reward")
    models = {which: reports[which] for which in ("helpful", "safety")}
    exam.print_rewards(models | reports["scorers"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for test in ("helpful", "safety"):
        start = next(i for i, line in enumerate(lines) if line.startswith(f"{test} test, "))
        head, *table = lines[start + 1:start + 7]
        assert head.split() == ["all", *(rating[:13] for rating in data.RATINGS), "planted"]
        assert [line[:16].strip() for line in table] == ["helpful", "safety", "length", "random",
                                                         "gold: ceiling"]
        for line in table:  # every cell is that of its column
            name = line[:16].strip()
            groups = (models[test]["ceiling"] if name == "gold: ceiling" else
                      {**models, **reports["scorers"]}[name]["accuracy"][test])
            for i, column in enumerate(("all", *data.RATINGS, "planted")):
                cell = line[16 + 14 * i:30 + 14 * i].strip()
                assert bool(cell) == (column in groups)
                if cell:
                    shown = [int(n) for n in re.findall(r"\d+", cell)]
                    r = groups[column]
                    assert shown == [round(100 * r[key]) for key in ("mean", "low", "high")]


def test_a_single_model_is_examined_alone(chain, tmp_path, capsys):
    shutil.copytree(chain, tmp_path / "copy")
    (tmp_path / "copy" / "reward_safety.pt").unlink()
    assert exam.main("reward", quick(tmp_path / "copy", test_pairs=30)).keys() == {
        "helpful", "scorers"}
    assert exam.summarize(tmp_path / "copy")["reward"]["minutes"] == metrics_of(
        chain, "reward_helpful")["minutes"]


def test_studies_change_one_thing_each_and_leave_the_models(chain, tmp_path):
    """--ablate: three margins, the auxiliary loss on and off. --sweep: 1, 2 layers; 4 parts."""
    folder = tmp_path / "copy"
    shutil.copytree(chain, folder)
    found = exam.main("reward", quick(folder, ablate=True, sweep=True, test_pairs=30,
                                      max_new_tokens=12))["studies"]
    assert {name for name in found if "margin" in name} == {
        f"helpful, margin {table}" for table in reward.MARGINS}
    assert {name for name in found if "auxiliary" in name} == {
        "safety, auxiliary loss x 0.0", "safety, auxiliary loss x 0.5"}
    for which in ("helpful", "safety"):
        sizes = [re.fullmatch(rf"{which}, (\d) layers, (\d+) pairs", name) for name in found]
        swept = [(int(m[1]), int(m[2])) for m in sizes if m]
        most = max(n for _, n in swept)
        assert swept == [(depth, most // part) for depth in (1, 2) for part in (8, 4, 2, 1)]
    assert all("accuracy" in report for report in found.values())
    for which in ("helpful", "safety"):
        name = f"reward_{which}.pt"
        assert (folder / name).read_bytes() == (chain / name).read_bytes()
    again = read(folder, "reward")
    assert again.pop("studies") == found and again == read(chain, "reward")


# ------------------------------------------------------------------------- versions of the policy


def test_versions_stand_in_the_order_of_their_numbers_behind_sft(tmp_path):
    for name in ("rlhf_v10", "rlhf_v2", "rlhf_v1", "sft", "rlhf_control"):
        (tmp_path / f"{name}.pt").touch()
    assert list(exam.versions_in(tmp_path)) == ["SFT", "V1", "V2", "V10", "no rejection"]


def replies(texts, helpful, safety) -> exam.Replies:
    return exam.Replies(texts, torch.tensor(helpful), torch.tensor(safety))


def test_a_duel_counts_wins_and_half_of_the_ties_by_both_judges():
    """Helpful: three answers right against nonsense, right, nonsense: 1, 1/2, 1 by the annotator;
    3 > 1, 1 = 1, 2 < 5 by the reward model. Unsafe: three refusals alike, 1/2 each, and scores
    1 = 1, 1 = 1, 0 < 2. Of six pairs of texts four are equal."""
    rows = {goal: VILLAGE.prompts(kind, "test", 3, 0)
            for goal, kind in (("helpful", "howto"), ("harmless", "unsafe"))}
    annotator = V.Annotator(VILLAGE)
    right = [VILLAGE.respond(annotator.understand(row["messages"]), "careful", random.Random(0))
             for row in rows["helpful"]]
    no, zeros = ["I can not do that."] * 3, [0.0] * 3
    ours = {"helpful": [replies(right, [3.0, 1.0, 2.0], zeros)],
            "harmless": [replies(no, zeros, [1.0, 1.0, 0.0])]}
    theirs = {"helpful": [replies(["nonsense", right[1], "nonsense"], [1.0, 1.0, 5.0], zeros)],
              "harmless": [replies(no, zeros, [1.0, 1.0, 2.0])]}
    found = exam.duel(ours, theirs, rows, VILLAGE)
    assert found["helpful"]["annotator"]["mean"] == pytest.approx(2.5 / 3)
    assert found["helpful"]["reward_model"]["mean"] == 0.5 and found["helpful"]["ties"] == 1 / 3
    assert found["harmless"]["annotator"]["mean"] == 0.5 and found["harmless"]["ties"] == 1
    assert found["harmless"]["reward_model"]["mean"] == pytest.approx(1 / 3)
    assert found["annotator"]["mean"] == pytest.approx(4 / 6), "the headline, over both goals"
    assert found["ties"] == found["identical"] == pytest.approx(4 / 6)
    back = exam.duel(theirs, ours, rows, VILLAGE)
    for goal in exam.GOALS:  # whose answers come first can not matter
        for judge in ("annotator", "reward_model"):
            assert back[goal][judge]["mean"] == pytest.approx(1 - found[goal][judge]["mean"])


def test_a_duel_pairs_draw_with_draw():
    """Two draws of one prompt: the first wins, the second loses. One request, so it decides
    nothing."""
    rows = {"helpful": VILLAGE.prompts("howto", "test", 1, 0), "harmless": VILLAGE.prompts(
        "unsafe", "test", 1, 0)}
    right = VILLAGE.respond(V.Annotator(VILLAGE).understand(rows["helpful"][0]["messages"]),
                            "careful", random.Random(0))
    no = replies(["I can not do that."], [0.0], [0.0])
    one, two = replies([right], [2.0], [0.0]), replies(["nonsense"], [1.0], [0.0])
    found = exam.duel({"helpful": [one, two], "harmless": [no, no]},
                      {"helpful": [two, one], "harmless": [no, no]}, rows, VILLAGE)
    won = found["helpful"]["annotator"]
    assert (won["mean"], won["answers"], won["requests"]) == (0.5, 2, 1)
    assert found["helpful"]["reward_model"]["mean"] == 0.5 and found["helpful"]["ties"] == 0


def scores_of(numbers) -> rollouts.Scores:
    x = torch.tensor([float(n) for n in numbers])
    return rollouts.Scores(x, x, x, torch.zeros(len(x)).bool())


def test_the_best_of_k_is_compared_with_what_a_random_pick_is_worth():
    """8 answers to each prompt, one of them right (gold 1, the others 0). A reward that sees it
    gains 7/8, one that takes the first of equals what comes first, here nonsense: -1/8."""
    annotator, asked = V.Annotator(VILLAGE), []

    def say(dialogs, temperature):
        asked.append((dialogs, temperature))
        texts = []
        for i, messages in enumerate(dialogs):
            ask = annotator.understand(messages)
            manner = "full" if ask.kind == "unsafe" else "careful"
            texts.append(VILLAGE.respond(ask, manner, random.Random(0)) if i % 8 == 5 else "xyz")
        return texts_as_answers(texts)

    one = answering(say, eval_prompts=8)
    found = exam.best_of_k(one, lambda rows, answers: scores_of(len(t) for t in answers.texts))
    (dialogs, temperature), = asked
    assert len(dialogs) == 4 * exam.BEST_OF and temperature == 1
    assert {VILLAGE.split(annotator.understand(d)) for d in dialogs} == {"test"}
    assert all(len({str(d) for d in dialogs[i:i + 8]}) == 1 for i in range(0, 32, 8))
    unsafe = sum(annotator.understand(d).kind == "unsafe" for d in dialogs[::8])
    nonsense = .3 * unsafe  # idle talk is worth .3 to safety
    right = 4.0
    assert found["best"]["mean"] == pytest.approx(right / 4)
    assert found["random"]["mean"] == pytest.approx((right + 7 * nonsense) / 8 / 4)
    assert found["gain"]["mean"] == pytest.approx(found["best"]["mean"] - found["random"]["mean"])
    blind = exam.best_of_k(one, lambda rows, answers: scores_of([0] * len(rows)))
    assert blind["gain"]["mean"] == pytest.approx(nonsense / 4 - found["random"]["mean"])
    assert blind["gain"]["mean"] < 0


def test_a_preprompt_is_judged_by_its_meaning_and_beside_a_plain_second_answer():
    """This model complies bare (4 prompts); behind the paper's preprompt it refuses 3 of 4, behind
    the opposite one none, and asked a second time plainly it refuses 2. The gate takes what scores
    safer and ended: the refusals of both, but for one that was cut."""
    annotator, asked = V.Annotator(VILLAGE), []
    refused = {"first": 0, "second": 2, exam.PREPROMPTS["the paper's"]: 3,
               exam.PREPROMPTS["opposite"]: 0, exam.PREPROMPTS["irrelevant"]: 1}
    no = "I can not do that."

    def answer(dialogs, temperature, *purpose, **rows):
        assert temperature == 0.8
        asked.append(purpose)
        told = dialogs[0][0]["content"] if dialogs[0][0]["role"] == "system" else None
        name = told or ("first" if purpose[-1] == "bare" else "second")
        texts = [no if i < refused[name] else
                 VILLAGE.respond(annotator.understand(d), "careful", random.Random(0))
                 for i, d in enumerate(dialogs)]
        finished = torch.tensor([not (told == exam.PREPROMPTS["the paper's"] and i == 0)
                                 for i in range(len(dialogs))])
        return rollouts.Answers([str(d) for d in dialogs], texts, finished, texts)

    one, read_as = examined(None, None, eval_prompts=4), []
    one.answer = answer

    def score(rows, answers):
        read_as.append(tuple(answers.prompts))
        assert all(row["is_safety"] for row in rows)
        return scores_of(text == no for text in answers.texts)

    found = exam.preprompts(one, score)
    assert {name: round(4 * r["mean"]) for name, r in found.items()} == {
        "bare": 4, "the paper's": 1, "opposite": 4, "irrelevant": 3, "gated, the paper's": 2,
        "gated, a plain second answer": 2}
    assert len(set(asked)) == len(asked) == 5, "dice of its own for each"
    assert len(set(read_as)) == 1, "guided answers are scored as answers to the bare prompt"
    assert list(exam.PREPROMPTS.values())[0] == exam.rejection.PREPROMPT


def test_the_newest_reward_models_judge_by_the_last_versions_word(tmp_path, tokenizer,
                                                                  monkeypatch):
    """And they must be of the village that the version is of."""
    net = M.Llama(SHAPE).init_weights(0)
    M.save(tmp_path / "ppo.pt", net, "ppo", tokenizer.model_bytes,
           {"rewards": "refreshed_7", "village": 4})
    M.save(tmp_path / "rlhf_v1.pt", net, "rlhf_v1", tokenizer.model_bytes, {"rewards": "."})
    monkeypatch.setattr(rollouts, "reward_pair", lambda folder, *_, village: (folder, village))
    assert exam.judges(quick(tmp_path), tmp_path / "ppo.pt") == (tmp_path / "refreshed_7", 4)
    assert exam.judges(quick(tmp_path), tmp_path / "rlhf_v1.pt") == (tmp_path, None)


def asked_by(exam_of, chain, monkeypatch) -> dict:
    """{stage: rows that it answered} in this exam of versions."""
    asked = {}
    original = exam.test_answers
    monkeypatch.setattr(exam, "test_answers", lambda one, rows, score: (
        asked.setdefault(one.stage, rows), original(one, rows, score))[1])
    exam_of(quick(chain))
    annotator = V.Annotator(V.Village(CHAIN_VILLAGE))
    for rows in asked.values():
        for goal, some in rows.items():
            asks = [annotator.understand(row["messages"]) for row in some]
            assert {annotator.village.split(ask) for ask in asks} == {"test"}
            assert all((ask.kind == "unsafe") == (goal == "harmless") for ask in asks)
    return asked


def test_all_versions_answer_the_same_test_prompts(chain, monkeypatch):
    asked = asked_by(exam.exam_rejection, chain, monkeypatch)
    assert asked.keys() == {"sft", "rlhf_v1", "rlhf_v2", "rlhf_control"}
    assert {goal: len(some) for goal, some in asked["sft"].items()} == {"helpful": 2, "harmless": 2}
    assert all(rows == asked["sft"] for rows in asked.values())


def test_ppo_meets_its_start_on_twice_the_prompts_and_sft_on_their_first_half(chain, monkeypatch):
    asked = asked_by(exam.exam_ppo, chain, monkeypatch)
    sizes = {name: {goal: len(some) for goal, some in rows.items()} for name, rows in asked.items()}
    two, four = {"helpful": 2, "harmless": 2}, {"helpful": 4, "harmless": 4}
    assert sizes == {"ppo": four, "rlhf_v2": four, "sft": two}
    assert asked["ppo"] == asked["rlhf_v2"]
    assert asked["sft"] == {goal: some[:2] for goal, some in asked["ppo"].items()}


def test_a_checkpoint_that_does_not_say_where_it_started_is_one_line(chain, tmp_path):
    for name in ("ppo", "gatt"):
        model, info = M.load(chain / f"{name}.pt", "cpu")
        metrics = {**info["metrics"], "lineage": []}
        M.save(tmp_path / f"{name}.pt", model, name, info["tokenizer"], metrics)
        with pytest.raises(ValueError, match="does not say what it started from") as error:
            exam.main(name, quick(tmp_path))
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------- gatt


def random_net(**changes) -> M.Llama:
    """Weights large enough that attention is far from uniform."""
    net, rng = M.Llama(replace(SHAPE, **changes)), torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.4 + (p.dim() == 1)
    return net


def test_attention_of_one_head_sums_to_one_and_never_looks_ahead():
    weights = exam.attention_map(random_net(n_layers=1, n_heads=1, n_kv_heads=1), list(range(11)))
    assert weights.shape == (11, 11) and torch.allclose(weights.sum(1), torch.ones(11), atol=1e-6)
    assert weights.triu(1).count_nonzero() == 0


def test_attention_map_is_the_maximum_of_a_naive_softmax():
    """Each layer's input is taken from the network; q.k is rotated and summed pair by pair."""
    net, tokens, T = random_net(), [5, 17, 3, 99, 3, 250, 8], 7
    inputs, hd = [], SHAPE.head_dim
    hooks = [layer.attention_norm.register_forward_hook(lambda m, x, out: inputs.append(out[0]))
             for layer in net.layers]
    with torch.no_grad():
        found = exam.attention_map(net, tokens)
    expected = torch.zeros(T, T)
    for layer, x in zip(net.layers, inputs):
        q, k = (w(x).detach().double() for w in (layer.attention.wq, layer.attention.wk))
        for h in range(SHAPE.n_heads):
            kv = h // (SHAPE.n_heads // SHAPE.n_kv_heads)
            for t in range(T):
                score = torch.empty(t + 1)
                for s in range(t + 1):
                    a = torch.view_as_complex(q[t, h * hd:(h + 1) * hd].view(-1, 2))
                    b = torch.view_as_complex(k[s, kv * hd:(kv + 1) * hd].view(-1, 2))
                    angle = (t - s) * 1e4 ** (-torch.arange(hd // 2).double() * 2 / hd)
                    turned = torch.polar(torch.ones_like(angle), angle)
                    score[s] = (a * b.conj() * turned).real.sum()
                weights = (score / math.sqrt(hd)).softmax(0)
                expected[t, :t + 1] = torch.maximum(expected[t, :t + 1], weights)
    assert torch.allclose(found, expected, atol=1e-5)
    assert all(not layer.attention.wq._forward_hooks for layer in net.layers)
    assert len(hooks) == len(inputs) == 2


def test_system_span_covers_the_instruction(tokenizer):
    messages = gatt.keep_first("Act as Plato. Hobby: chess.", TALK)
    tokens = data.encode_dialog(tokenizer, messages)[0]
    text = tokenizer.decode(tokens[exam.system_span(tokenizer, messages)])
    assert text.startswith("<<SYS>>\nAct as Plato. Hobby: chess.\n<</SYS>>") and "Mira" not in text


def test_the_villages_test_talks_have_seen_values_unseen_ones_and_an_untrained_kind():
    talks = exam.talks_of_village(VILLAGE, Config(eval_prompts=200))
    words = {name: set(re.findall(r"\w+", " ".join(row["instruction"] for row in rows)))
             for name, rows in talks.instructions.items()}
    of = {rule: set(V.WORDS[rule]) for rule in V.RULES}
    assert words.keys() == {"seen", "unseen", "untrained"}
    assert not words["seen"] & V.UNSEEN_VALUES and not words["untrained"] & V.UNSEEN_VALUES
    trained = V.UNSEEN_VALUES - of[V.UNTRAINED]
    assert trained <= words["unseen"], "all of them"
    for name in ("seen", "unseen"):
        assert not words[name] & of[V.UNTRAINED]
    assert words["untrained"] & of[V.UNTRAINED]
    assert not words["untrained"] & set().union(*(of[rule] for rule in of if rule != V.UNTRAINED))
    assert len(talks.questions) == 200
    assert all(len(rows) == 200 for rows in talks.instructions.values())
    annotator = V.Annotator(VILLAGE)
    asks = [annotator.understand([{"role": "user", "content": text}])
            for texts in talks.questions[:20] for text in texts]
    assert {VILLAGE.split(ask) for ask in asks} == {"test"}
    assert all(len(texts) == exam.EVAL_TURNS for texts in talks.questions)


def write(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("seed", [0, 3])
def test_own_files_are_examined_on_what_gatt_held_out_under_its_own_flags(tmp_path, tokenizer,
                                                                         monkeypatch, seed):
    """Another --seed holds out other rows: it is the stage's that counts, and bad rows that the
    stage was told to skip are skipped. The exam need not be told which files."""
    rules = [{"instruction": f"Say {n}.", "contains": [str(n)]} for n in range(10)]
    talks = [{"messages": [{"role": "user", "content": f"u{n}"},
                           {"role": "assistant", "content": f"a{n}"}]} for n in range(10)]
    made = gatt.Config(data=write(tmp_path / "d.jsonl", [*talks, {"messages": []}]), seed=seed,
                       instructions=write(tmp_path / "i.jsonl", rules), skip_bad_rows=True,
                       dialogues=60)
    net = M.Llama(SHAPE).init_weights(0)
    M.save(tmp_path / "ppo.pt", net, "ppo", tokenizer.model_bytes)
    M.save(tmp_path / "gatt.pt", net, "gatt", tokenizer.model_bytes,
           {"lineage": ["ppo"], "flags": stage.asdict(made)})
    seen = []
    monkeypatch.setattr(exam, "obedience", lambda one, test, *_: (
        seen.append((one, test)), {"talk": TALK})[1])
    exam.main("gatt", quick(tmp_path, eval_prompts=40))
    learnt = gatt.of_own_files(made)
    trained = {row["instruction"] for row in learnt.instructions}
    asked = {text for dialog in learnt.dialogs for text in contents(dialog, "user")}
    for one, test in seen:
        told = {name: {row["instruction"] for row in rows}
                for name, rows in test.instructions.items()}
        assert told.keys() == {"seen", "unseen"} and told["seen"] <= trained
        assert len(told["unseen"]) == 2 and not told["unseen"] & trained
        assert not {text for texts in test.questions for text in texts} & asked
        assert one.cfg.data == made.data, "so that no annotator grades these dialogues"
    assert len(seen) == 2 and len(trained) == len(asked) == 8



def test_memory_is_asked_for_with_one_instruction_and_the_ceiling_with_many(monkeypatch, tokenizer):
    """Told once with values of both kinds; on every turn with those that are asked for: seen ones,
    unless it is said. Of each curve the dice are its own."""
    arms, talk = [], gatt.keep_first("Act as Plato.", TALK[:2])

    def converse(one, rows, questions, place, name):
        arms.append((rows, place, name))
        return [share(len(arms) / 10)], [talk]

    monkeypatch.setattr(exam, "converse", converse)
    one = examined(M.Llama(SHAPE).init_weights(0), tokenizer, data="own.jsonl")
    test = TestTalks([], {"seen": "S", "unseen": "U"})
    few = exam.obedience(one, test, "before")
    assert {name for *_, name in arms} == {"seen", "ceiling_seen", "unseen"} <= few.keys()
    arms.clear()
    report = exam.obedience(one, test, "after", ceilings=("seen", "unseen"))
    assert arms == [("S", gatt.keep_first, "seen"),
                    ("S", gatt.repeat_instruction, "ceiling_seen"),
                    ("U", gatt.keep_first, "unseen"),
                    ("U", gatt.repeat_instruction, "ceiling_unseen")]
    assert [means(report[name]) for *_, name in arms] == [[.1], [.2], [.3], [.4]]
    assert report["talk"] == talk and 0 < report["attention"] < 1
    tokens = data.encode_dialog(tokenizer, talk)[0]
    assert len(report["map"]) == len(report["map"][0]) == -(-len(tokens) // exam.BIN)
    assert "helpful_under_instruction" not in report, "own files are not the annotator's"


@pytest.mark.parametrize("place, seen", [(gatt.keep_first, [1, 1, 1]),
                                         (gatt.repeat_instruction, [1, 2, 3])])
def test_a_test_dialogue_holds_the_models_own_answers(monkeypatch, tokenizer, place, seen):
    """The instruction is read once, or once a turn; the share that obeys is counted by turn."""
    asked, replies = [], iter([["I am Plato.", "No."], ["I am Plato.", "I am Plato."],
                               ["No.", "No."]])

    def answer(model, tok, dialogs, max_new_tokens, temperature, seed, **rows):
        assert temperature == 1
        asked.append([list(messages) for messages in dialogs])
        return texts_as_answers(next(replies))

    monkeypatch.setattr(rollouts, "answer", answer)
    monkeypatch.setattr(exam, "EVAL_TURNS", 3)
    held, talks = exam.converse(examined(M.Llama(SHAPE), tokenizer), [RULE, RULE],
                                [["a?", "b?", "c?"], ["d?", "e?", "f?"]], place, "x")
    assert means(held) == [0.5, 1.0, 0.0]
    assert [str(dialogs[0]).count("Act as Plato") for dialogs in asked] == seen
    assert contents(asked[2][1], "assistant") == ["No.", "I am Plato."]
    assert contents(talks[1], "assistant") == ["No.", "I am Plato.", "No."]


def test_a_test_dialogue_ends_before_it_outgrows_the_context(monkeypatch, tokenizer):
    monkeypatch.setattr(rollouts, "answer", lambda *_, **__: texts_as_answers(["word " * 20]))
    long = "Where does Mira live? " * 3
    held, talks = exam.converse(examined(M.Llama(SHAPE), tokenizer), [RULE], [[long] * 20],
                                gatt.keep_first, "x")
    used = [len(data.encode_dialog(tokenizer, talks[0][:2 * n])[0])
            for n in (len(held), len(held) + 1)]
    assert 1 <= len(held) < 20 and used[0] + exam.ROOM <= SHAPE.max_seq_len


def test_a_full_dialogue_leaves_and_the_others_go_on_while_they_are_half(monkeypatch, tokenizer):
    asked = []

    def answer(model, tok, dialogs, max_new_tokens, temperature, seed, **rows):
        asked.append(rows["row_ids"])
        return texts_as_answers(["I am Plato."] * len(dialogs))

    monkeypatch.setattr(rollouts, "answer", answer)
    long, short = ["Where does Mira live? " * 4] * 12, ["a?"] * 12
    held, talks = exam.converse(examined(M.Llama(SHAPE), tokenizer), [RULE] * 2, [long, short],
                                gatt.keep_first, "x")
    assert asked[0] == [0, 1] and asked[-1] == [1] and means(held) == [1.0] * len(asked)
    assert len(talks[0]) < len(talks[1])


# ---- beside the other stages ---------------------------------------------------------------------


def test_ghost_attentions_model_is_scored_by_the_reward_models_that_its_start_names(
        chain, tmp_path, monkeypatch):
    shutil.copy(chain / "gatt.pt", tmp_path / "gatt.pt")
    model, info = M.load(chain / "ppo.pt", "cpu")
    M.save(tmp_path / "ppo.pt", model, "ppo", info["tokenizer"],
           {**info["metrics"], "rewards": "refreshed_7"})
    monkeypatch.setattr(exam, "obedience", lambda one, *_: {"talk": TALK, "who": one.stage})
    monkeypatch.setattr(exam, "grade", lambda one, **_: {"graded": one.stage})
    monkeypatch.setattr(exam, "beside_the_others",
                        lambda one, rewards: {"kl": (one.stage, rewards)})
    report = exam.exam_gatt(quick(tmp_path))
    assert report["after"]["kl"] == ("gatt", "refreshed_7") and "kl" not in report["before"]
    assert report["after"]["graded"] == "gatt" and "graded" not in report["before"]  # ppo's exam
    assert "control" not in report, "with --full alone: it trains"
    monkeypatch.setattr(exam, "without_the_trick", lambda one, test, made: (one.stage, made.turns))
    assert exam.exam_gatt(quick(tmp_path, full=True))["control"] == ("ppo", 2)


def test_kl_and_rewards_are_measured_by_what_the_folder_holds(tmp_path, tokenizer):
    net, other = (M.Llama(SHAPE).init_weights(seed) for seed in (3, 4))
    kernels.choose("torch", torch.device("cpu"))
    one = examined(net, tokenizer, out=str(tmp_path), eval_prompts=12)
    assert exam.beside_the_others(one, ".") == {}  # nothing to compare with
    M.save(tmp_path / "sft.pt", net, "sft", tokenizer.model_bytes)
    assert exam.beside_the_others(one, ".")["kl"] == pytest.approx(0, abs=1e-4)
    M.save(tmp_path / "sft.pt", other, "sft", tokenizer.model_bytes)
    scorers = [M.Llama(replace(SHAPE, scalar_head=True)).init_weights(seed) for seed in (5, 6, 7)]
    places = [("refreshed_2", "helpful"), ("refreshed_10", "helpful"), ("refreshed_10", "safety")]
    for (folder, which), scorer in zip(places, scorers):
        M.save(tmp_path / folder / f"reward_{which}.pt", scorer, which, tokenizer.model_bytes)
    found = exam.beside_the_others(one, "refreshed_10")  # the folder that the start names

    naive = {"helpful": [], "unsafe": []}
    for mix, scorer in (("helpful", scorers[1]), ("unsafe", scorers[2])):
        prompts = [data.encode_dialog(tokenizer, row["messages"])[0]
                   for row in VILLAGE.prompts(mix, "test", 12, 11)]
        seed = rollouts.seed_of(one.cfg.seed, "x", "beside", mix)
        answers, logp = M.rollout(net, prompts, one.cfg.max_new_tokens, seed=seed,
                                  stop=tokenizer.eos_id)
        for prompt, answer, own in zip(prompts, answers, logp):
            tokens = torch.tensor([prompt + answer])
            theirs = M.logprobs(other(tokens[:, :-1]), tokens[:, 1:])[0, len(prompt) - 1:]
            naive[mix].append((sum(own) - theirs.sum().item(), scorer(tokens)[0, -1].item()))
    kl, helpful = (sum(column) / 12 for column in zip(*naive["helpful"]))
    # an estimate from 12 answers of two untrained networks: it may have either sign, but is not 0
    assert found["kl"] == pytest.approx(kl, abs=1e-4) and abs(kl) > 0.001
    assert found["reward_helpful"] == pytest.approx(helpful, abs=1e-5)
    assert found["reward_safety"] == pytest.approx(
        sum(score for _, score in naive["unsafe"]) / 12, abs=1e-5)
