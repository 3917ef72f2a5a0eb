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
GRADES = {"gold_helpfulness", "violations", "safety", "false_refusals", "eos_rate", "helpful",
          "right"}


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


@pytest.mark.parametrize("name", [name for name in exam.EXAMS if name != "summary"])
def test_each_exam_writes_the_keys_that_summary_and_figures_read(chain, name):
    duel = {f"{goal}_{key}" for goal in ("helpful", "harmless")
            for key in ("reward_model", "annotator", "ties")} | {"annotator", "annotator_low",
                                                                  "decided"}
    scored = {"reward_helpful", "reward_safety", "safety_histogram"}
    report = read(chain, name)
    if name == "pretrain":
        assert report.keys() == {"facts_asked", "facts_never_asked", "grammar"}
    if name == "sft":
        assert report.keys() == {"demonstrations", "greedy", "T=0.5", "T=1", "prompts_per_kind"}
        assert report["demonstrations"].keys() == {"gold_helpfulness", "violations",
                                                   "false_refusals"}
        assert report["T=1"].keys() == GRADES and report["T=1"]["helpful"].keys() == {*V.KINDS}
    if name == "reward":
        assert report.keys() == {"helpful", "safety"}
        for which, numbers in report.items():
            assert numbers["accuracy"].keys() == {"helpful", "safety"}, "both models, both tests"
            assert {"length_correlation", "longer_wins", "histograms", "worst", "ceiling",
                    "calibration", "unsafe_found_below", "threshold"} <= numbers.keys(), which
    if name == "rejection":
        assert report.keys() == {"rounds", "versions", "win_rates", "no_rejection"}
        assert report["versions"].keys() == {"SFT", "V1", "V2", "no rejection"}
        assert report["win_rates"].keys() == {"V1", "V2", "no rejection"}
        assert all(numbers.keys() == scored for numbers in report["versions"].values())
        assert all(numbers.keys() == duel for numbers in report["win_rates"].values())
        assert [record["round"] for record in report["rounds"]] == [1, 2]
        for record in report["rounds"]:
            best = [b for b, _ in record["ladder"].values()]
            assert best == sorted(best) and record["curve"].keys() == {"0.5", "0.65", "0.8"}
        assert report["no_rejection"]["T=0.5"].keys() == GRADES
    if name == "ppo":
        assert {"greedy", "T=0.5", "T=1", "prompts_per_kind", "win_rates"} | scored == report.keys()
        assert report["win_rates"].keys() == {"PPO", "PPO against V2"}
        assert all(numbers.keys() == duel for numbers in report["win_rates"].values())
    if name == "gatt":
        assert report.keys() == {"before", "after", "dialogues"} and report["dialogues"] == 2
        for when in ("before", "after"):
            assert {"seen", "unseen", "ceiling", "talk", "attention", "map", "T=1", "kl",
                    "helpful_under_instruction", "reward_helpful", "reward_safety"} <= (
                report[when].keys())
            for arm in ("seen", "unseen", "ceiling"):
                assert report[when][arm] == [1.0, 1.0], "every answer obeys here"
        assert report["before"]["attention"] != report["after"]["attention"]
        assert report["before"]["talk"] == report["after"]["talk"], "one dialogue, two models"


def test_an_exam_of_a_reward_model_repeats_what_the_stage_held_out(chain):
    """The same pairs, found again from the flags in the checkpoint: the same accuracy, and the
    threshold that RLHF reads."""
    report = read(chain, "reward")
    for which in ("helpful", "safety"):
        stored = metrics_of(chain, f"reward_{which}")
        assert report[which]["accuracy"][which]["all"][0] == pytest.approx(stored["accuracy"])
    assert report["safety"]["threshold"] == pytest.approx(stored["threshold"])


def test_the_summary_holds_each_stages_own_numbers_and_its_exams(chain):
    summary = json.loads((chain / "summary.json").read_text())
    assert list(summary) == ["pretrain", "sft", "reward", "rejection", "ppo", "gatt"]
    for name, numbers in summary.items():
        assert read(chain, name).items() <= numbers.items(), name
        if name in ("pretrain", "sft", "ppo", "gatt"):  # the exam's where both know a number
            assert numbers == {**metrics_of(chain, name), **read(chain, name)}, name
    minutes = [metrics_of(chain, f"reward_{which}")["minutes"] for which in ("helpful", "safety")]
    assert summary["reward"]["minutes"] == max(minutes)
    assert summary["ppo"]["kl"] == metrics_of(chain, "ppo")["kl_sft"]


def test_the_last_table_of_the_chain_is_full(chain, tmp_path, capsys):
    """Minutes of what was timed, grades at two temperatures, rewards and KL, turns held."""
    folder = tmp_path / "copy"
    shutil.copytree(chain, folder)
    for path in (folder / "exam").iterdir():
        assert path.read_bytes() == (chain / "exam" / path.name).read_bytes()
    exam.main("summary", quick(folder))
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert list(cells) == ["pretrain", "sft", "reward", "rejection", "ppo", "gatt"]
    assert len(cells["pretrain"]) == len(cells["reward"]) == 1  # minutes
    # minutes, two of helpfulness, violations, false refusals, h / s, KL; and turns a -> b
    assert len(cells["sft"]) == len(cells["ppo"]) == 9 and cells["sft"][-1] == "0.00"
    assert len(cells["gatt"]) == 12 and cells["gatt"][-3:] == ["2", "->", "2"]
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
    assert "give one of pretrain, sft, reward, rejection, ppo, gatt, summary" in done.stderr
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
    grades = {"T=1": {"gold_helpfulness": .81, "violations": .02, "false_refusals": .1},
              "T=0.5": {"gold_helpfulness": .9}, "kl": .7, "reward_helpful": 1.25,
              "reward_safety": 4.5}
    made(tmp_path, "pretrain", {"minutes": 2.5})
    made(tmp_path, "sft", {"minutes": 1.0})
    made(tmp_path, "gatt", {"minutes": 2.0})
    noted(tmp_path, "rejection", {"versions": {"SFT": {}}})
    noted(tmp_path, "gatt", {"after": {**grades, "seen": [.9, .8, .7]},
                             "before": {"ceiling": [.9], "seen": [.9, .1, .5]}})
    exam.print_summary(exam.summarize(tmp_path))
    head, pretrain, sft, rejection, gatt = capsys.readouterr().out.splitlines()
    assert pretrain.split() == ["pretrain", "2.5"] and sft.split() == ["sft", "1.0"]
    assert gatt.split() == ["gatt", "2.0", "0.81", "0.90", "2.0%", "10.0%", "1.25", "/", "4.50",
                            "0.70", "2", "->", "3"]  # turns with at least half of the ceiling
    # known to a later exam only, and shown in the row of the stage that it is about
    noted(tmp_path, "rejection", {"versions": {"SFT": {"reward_helpful": -.5,
                                                       "reward_safety": 2.25}}})
    exam.print_summary(exam.summarize(tmp_path))
    assert capsys.readouterr().out.splitlines()[2].split() == ["sft", "1.0", "-0.50", "/", "2.25",
                                                               "0.00"]
    assert json.loads((tmp_path / "summary.json").read_text())["sft"] == {"minutes": 1.0}
    exam.print_summary(exam.summarize(tmp_path / "nowhere"))  # an empty folder: the head alone
    assert len(capsys.readouterr().out.splitlines()) == 1


# --------------------------------------------------------------------------------------- pretrain


def test_a_fact_is_known_when_the_answer_comes_at_once_and_word_for_word(monkeypatch):
    """Of three answers one is right, one comes too late and one is cut before its full stop."""
    probes = [("Q1", "Ada lives in the mill."), ("Q2", "Leo eats soup."), ("Q3", "Eva wears red.")]
    said = {"Q1": " Ada lives in the mill. Her pet is a cat.", "Q2": " I say Leo eats soup.",
            "Q3": " Eva wears red"}
    village = SimpleNamespace(probes=lambda asked: probes if asked else probes[1:])
    monkeypatch.setattr(pretrain, "complete", lambda model, tokenizer, prefixes, n:
                        [said[prefix] for prefix in prefixes])
    assert exam.facts_known(examined(None, None, village), asked=True) == (1 / 3, 3)
    assert exam.facts_known(examined(None, None, village), asked=False) == (0, 2)


def test_the_report_averages_grammar_over_documents_drawn_at_temperature_one(monkeypatch, capsys):
    """Half of the documents have one sentence of two right, the other half all: 75%."""
    asked = []

    def complete(model, tokenizer, prefixes, n, temperature, seed):
        asked.append((set(prefixes), temperature))
        return ["Ada eats soup. Soup eats eats.", "Leo eats soup."] * (len(prefixes) // 2)

    monkeypatch.setattr(pretrain, "complete", complete)
    monkeypatch.setattr(exam, "facts_known", lambda one, asked: (0.9, 10) if asked else (0.8, 5))
    monkeypatch.setattr(exam, "open_model", lambda *_: examined(None, None,
                                                                metrics={"village": 0}))
    assert exam.exam_pretrain(Config()) == {"facts_asked": 0.9, "facts_never_asked": 0.8,
                                            "grammar": 0.75}
    assert asked == [({""}, 1.0)] and "75.0% in 100 documents" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- grading


def test_an_examination_of_careful_answers_finds_full_help_full_compliance_and_no_refusal():
    annotator, asked = V.Annotator(VILLAGE), []

    def answer(dialogs, temperature):
        asked.append((temperature, dialogs))
        rng = random.Random(temperature)
        return texts_as_answers([VILLAGE.respond(annotator.understand(d), "careful", rng)
                                 for d in dialogs])

    report = exam.grade(answer, VILLAGE, 5)
    for name in ("greedy", "T=0.5", "T=1"):
        found = report[name]
        assert found["gold_helpfulness"] == found["violations"] == 1
        assert found["false_refusals"] == 0
        assert (found["safety"], found["eos_rate"], found["right"]["fact"]) == (0, 1, 1)
    assert report["prompts_per_kind"] == 5
    assert [temperature for temperature, _ in asked] == [0, 0.5, 1]
    asks = [annotator.understand(dialog) for dialog in asked[0][1]]
    assert Counter(ask.kind for ask in asks) == dict.fromkeys(V.KINDS, 5)
    assert {VILLAGE.split(ask) for ask in asks} == {"test"}, "prompts that nobody trained on"


def test_an_examination_in_which_half_refuse_and_half_are_cut_counts_them():
    """Two of four answers of each kind refuse, the others comply; a quarter has no EOS."""
    annotator = V.Annotator(VILLAGE)

    def answer(dialogs, temperature):
        rng = random.Random(0)
        texts = [VILLAGE.respond(annotator.understand(d), "careful", rng) if i % 2 else
                 "I can not do that." for i, d in enumerate(dialogs)]
        return rollouts.Answers([], [], torch.arange(len(texts)) % 4 > 0, texts)

    found = exam.grade(answer, VILLAGE, 4, temperatures=(0.5,))["T=0.5"]
    assert found["violations"] == found["false_refusals"] == 0.5
    assert found["safety"] == 0.25  # a bare refusal is worth half
    assert found["eos_rate"] == 0.75 and found["right"]["fact"] == 0.5


def test_what_the_writers_answers_are_worth_follows_their_shares():
    worth = exam.demonstrated(VILLAGE, 400)
    assert worth["violations"] == pytest.approx(V.WRITERS["unsafe"]["careful"], abs=.08)
    assert worth["false_refusals"] == pytest.approx(V.WRITERS["edge"]["curt"], abs=.08)
    assert .6 < worth["gold_helpfulness"] < .8


# ----------------------------------------------------------------------------------------- reward


def pair(chosen, rejected, safe=(-1, -1), rating=None) -> reward.Pair:
    return reward.Pair(chosen, rejected, 1, 0.0, safe, rating, {})


def test_accuracy_is_counted_by_rating_and_by_safety_and_ties_count_half():
    pairs = [pair([1], [1], rating="better", safe=(1, 0)), pair([1], [1], rating="better"),
             pair([1], [1], rating="negligibly")]
    found = exam.by_group(torch.tensor([1.0, -1.0, 0.0]), pairs)
    assert found == {"all": [0.5, 3], "better": [0.5, 2], "negligibly": [0.5, 1],
                     "safe over unsafe": [1.0, 1]}


def test_length_bias_compares_the_model_with_people():
    """Chosen 3 and 2 tokens, rejected 1 and 4: people take the longer one once, the model twice."""
    pairs = [pair([9] * 4, [9] * 2), pair([9] * 3, [9] * 5)]
    r = torch.tensor([2.0, 0.0, 0.0, 3.0])  # both chosen, then both rejected
    found = exam.length_bias(r, r[:2] - r[2:], pairs)
    assert found["longer_wins"] == {"people": 0.5, "model": 1.0}
    assert found["length_correlation"] > 0.8


def test_the_gold_scores_calibration_and_ceiling_are_those_of_the_annotator():
    """One how-to: careful (gold 1) over refused (gold 0), labelled so once and once wrongly."""
    row = VILLAGE.prompts("howto", "test", 1, 0)[0]
    good = VILLAGE.respond(V.Annotator(VILLAGE).understand(row["messages"]), "careful",
                           random.Random(0))
    rows = [{"prompt": row["messages"], "chosen": a, "rejected": b}
            for a, b in ((good, "I can not do that."), ("I can not do that.", good))]
    pairs = [pair([1], [1])._replace(row=row) for row in rows]
    found = exam.against_gold(torch.tensor([2.0, -1.0, -1.0, 2.0]), pairs, VILLAGE, "helpful")
    assert found["ceiling"] == {"all": [0.5, 2]}
    high, low = (1 / (1 + math.exp(-x)) for x in (2, -1))
    assert found["calibration"] == [[0, pytest.approx(low), 0, 2], [1, pytest.approx(high), 0, 2]]


def test_the_tables_of_both_test_sets_fit_100_columns(chain, capsys):
    reports = read(chain, "reward")
    exam.print_rewards(reports)
    tables = [line for line in capsys.readouterr().out.splitlines()
              if line.startswith(("accuracy in", "helpful test", "safety test"))]
    assert len(tables) == 2 + 6 + 3 and max(map(len, tables)) <= 100  # by rating; by safety label
    for line in tables:  # the columns stay apart
        if " model" in line:
            share = reports[re.search(r"(\w+) model", line)[1]]["accuracy"][line.split()[0]]
            cells = re.findall(r"([\d.]+) of +(\d+)", line)
            assert set(cells) <= {(f"{100 * hit:.1f}", str(n)) for hit, n in share.values()}
            assert len(cells) > 0


def test_a_single_model_is_examined_alone(chain, tmp_path, capsys):
    shutil.copytree(chain, tmp_path / "copy")
    (tmp_path / "copy" / "reward_safety.pt").unlink()
    assert exam.main("reward", quick(tmp_path / "copy")).keys() == {"helpful"}
    assert exam.summarize(tmp_path / "copy")["reward"]["minutes"] == metrics_of(
        chain, "reward_helpful")["minutes"]


def test_studies_change_one_thing_each_and_leave_the_models(chain, tmp_path):
    """--ablate: three margins, the auxiliary loss on and off. --sweep: 1, 2 layers; 4 parts."""
    folder = tmp_path / "copy"
    shutil.copytree(chain, folder)
    found = exam.main("reward", quick(folder, ablate=True, sweep=True))["studies"]
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
    assert {which: again[which] for which in ("helpful", "safety")} == read(chain, "reward")


# ------------------------------------------------------------------------- versions of the policy


def test_versions_stand_in_the_order_of_their_numbers_behind_sft(tmp_path):
    for name in ("rlhf_v10", "rlhf_v2", "rlhf_v1", "sft", "rlhf_control"):
        (tmp_path / f"{name}.pt").touch()
    assert list(exam.versions_in(tmp_path)) == ["SFT", "V1", "V2", "V10", "no rejection"]


def test_a_duel_counts_wins_among_the_decided_and_the_prompts_that_both_answered():
    rows = {goal: VILLAGE.prompts(kind, "test", 4, 0)
            for goal, kind in (("helpful", "howto"), ("harmless", "unsafe"))}
    annotator = V.Annotator(VILLAGE)
    right = [VILLAGE.respond(annotator.understand(row["messages"]), "careful", random.Random(0))
             for row in rows["helpful"]]
    no = ["I can not do that."] * 4

    def said(texts, helpful, safety):
        return {"helpful": {"texts": texts, "helpful": torch.tensor(helpful)},
                "harmless": {"texts": no[:len(safety)], "safety": torch.tensor(safety)}}

    ours = said(right, [3.0, 1.0, 2.0, 9.0], [1.0, 1.0, 0.0, 5.0])
    theirs = said(["nonsense", right[1], "nonsense"], [1.0, 1.0, 5.0], [1.0, 1.0, 2.0])
    found = exam.duel(ours, theirs, rows, annotator)
    assert found["helpful_reward_model"] == 0.5  # 3 > 1, 2 < 5, the equal ones decide nothing
    assert found["harmless_reward_model"] == 0.0 and found["helpful_annotator"] == 1.0
    assert (found["helpful_ties"], found["harmless_ties"], found["decided"]) == (1, 3, 2)


def test_the_newest_reward_models_judge_by_the_last_versions_word(tmp_path, tokenizer,
                                                                  monkeypatch):
    net = M.Llama(SHAPE).init_weights(0)
    M.save(tmp_path / "ppo.pt", net, "ppo", tokenizer.model_bytes, {"rewards": "refreshed_7"})
    M.save(tmp_path / "rlhf_v1.pt", net, "rlhf_v1", tokenizer.model_bytes, {"rewards": "."})
    monkeypatch.setattr(rollouts, "reward_pair", lambda folder, *_: folder)
    assert exam.judges(quick(tmp_path), tmp_path / "ppo.pt") == tmp_path / "refreshed_7"
    assert exam.judges(quick(tmp_path), tmp_path / "rlhf_v1.pt") == tmp_path


def test_the_last_version_is_compared_on_twice_the_prompts_and_the_others_on_their_first_half(
        chain, monkeypatch):
    asked = {}
    original = exam.test_answers
    monkeypatch.setattr(exam, "test_answers", lambda one, rows, score: (
        asked.setdefault(one.info["stage"], rows), original(one, rows, score))[1])
    exam.exam_rejection(quick(chain))
    sizes = {name: {goal: len(some) for goal, some in rows.items()} for name, rows in asked.items()}
    two, four = {"helpful": 2, "harmless": 2}, {"helpful": 4, "harmless": 4}
    assert sizes == {"sft": two, "rlhf_v1": two, "rlhf_v2": four, "rlhf_control": two}
    assert asked["rlhf_v2"]["helpful"][:2] == asked["sft"]["helpful"]
    annotator = V.Annotator(V.Village(CHAIN_VILLAGE))
    for goal, some in asked["rlhf_v2"].items():
        asks = [annotator.understand(row["messages"]) for row in some]
        assert {annotator.village.split(ask) for ask in asks} == {"test"}
        assert all((ask.kind == "unsafe") == (goal == "harmless") for ask in asks)


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


def test_the_villages_test_talks_have_seen_values_and_values_never_trained_on():
    talks = exam.talks_of_village(VILLAGE, Config(eval_prompts=100))
    unseen = {w for rule in ("figure", "greeting", "hobby") for w in V.WORDS[rule][-V.UNSEEN:]}
    words = lambda rows: set(re.findall(r"\w+", " ".join(row["instruction"] for row in rows)))
    assert not unseen & words(talks.seen) and unseen <= words(talks.unseen)
    assert len(talks.questions) == len(talks.seen) == len(talks.unseen) == 100
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
    monkeypatch.setattr(exam, "obedience", lambda one, test, when, talk=None: (
        seen.append((one, test)), {"talk": TALK})[1])
    exam.main("gatt", quick(tmp_path, eval_prompts=40))
    learnt = gatt.of_own_files(made)
    trained = {row["instruction"] for row in learnt.instructions}
    asked = {text for dialog in learnt.dialogs for text in contents(dialog, "user")}
    for one, test in seen:
        assert {row["instruction"] for row in test.seen} <= trained
        assert len({row["instruction"] for row in test.unseen}) == 2
        assert not {row["instruction"] for row in test.unseen} & trained
        assert not {text for texts in test.questions for text in texts} & asked
        assert one.cfg.data == made.data, "so that no annotator grades these dialogues"
    assert len(seen) == 2 and len(trained) == len(asked) == 8



def test_memory_is_asked_for_with_one_instruction_and_the_ceiling_with_many(monkeypatch, tokenizer):
    """Three curves: seen and unseen values told once, seen values told on every turn."""
    arms, talk = [], gatt.keep_first("Act as Plato.", TALK[:2])

    def converse(one, rows, questions, place):
        arms.append((rows, place))
        return [len(arms) / 10], [talk]

    monkeypatch.setattr(exam, "converse", converse)
    one = examined(M.Llama(SHAPE).init_weights(0), tokenizer, data="own.jsonl")
    report = exam.obedience(one, TestTalks([], "S", "U"), "before")
    assert arms == [("S", gatt.keep_first), ("U", gatt.keep_first), ("S", gatt.repeat_instruction)]
    assert (report["seen"], report["unseen"], report["ceiling"]) == ([0.1], [0.2], [0.3])
    assert report["talk"] == talk and 0 < report["attention"] < 1
    tokens = data.encode_dialog(tokenizer, talk)[0]
    assert len(report["map"]) == len(report["map"][0]) == -(-len(tokens) // exam.BIN)
    assert "T=1" not in report, "own files are not the village's annotator's"


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
                                [["a?", "b?", "c?"], ["d?", "e?", "f?"]], place)
    assert held == [0.5, 1.0, 0.0]
    assert [str(dialogs[0]).count("Act as Plato") for dialogs in asked] == seen
    assert contents(asked[2][1], "assistant") == ["No.", "I am Plato."]
    assert contents(talks[1], "assistant") == ["No.", "I am Plato.", "No."]


def test_a_test_dialogue_ends_before_it_outgrows_the_context(monkeypatch, tokenizer):
    monkeypatch.setattr(rollouts, "answer", lambda *_, **__: texts_as_answers(["word " * 20]))
    long = "Where does Mira live? " * 3
    held, talks = exam.converse(examined(M.Llama(SHAPE), tokenizer), [RULE], [[long] * 20],
                                gatt.keep_first)
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
                                gatt.keep_first)
    assert asked[0] == [0, 1] and asked[-1] == [1] and held == [1.0] * len(asked)
    assert len(talks[0]) < len(talks[1])


# ---- beside the other stages ---------------------------------------------------------------------


def test_kl_and_rewards_are_measured_by_what_the_folder_holds(tmp_path, tokenizer):
    net, other = (M.Llama(SHAPE).init_weights(seed) for seed in (3, 4))
    kernels.choose("torch", torch.device("cpu"))
    one = examined(net, tokenizer, out=str(tmp_path), eval_prompts=12)
    assert exam.beside_the_others(one) == {}  # nothing to compare with
    M.save(tmp_path / "sft.pt", net, "sft", tokenizer.model_bytes)
    assert exam.beside_the_others(one)["kl"] == pytest.approx(0, abs=1e-4)
    M.save(tmp_path / "sft.pt", other, "sft", tokenizer.model_bytes)
    scorers = [M.Llama(replace(SHAPE, scalar_head=True)).init_weights(seed) for seed in (5, 6, 7)]
    places = [("refreshed_2", "helpful"), ("refreshed_10", "helpful"), ("refreshed_10", "safety")]
    for (folder, which), scorer in zip(places, scorers):  # 10 is newer than 2
        M.save(tmp_path / folder / f"reward_{which}.pt", scorer, which, tokenizer.model_bytes)
    found = exam.beside_the_others(one)

    naive = {"helpful": [], "unsafe": []}
    for mix, scorer in (("helpful", scorers[1]), ("unsafe", scorers[2])):
        prompts = [data.encode_dialog(tokenizer, row["messages"])[0]
                   for row in VILLAGE.prompts(mix, "test", 12, 11)]
        answers, logp = M.rollout(net, prompts, one.cfg.max_new_tokens, seed=one.cfg.seed,
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
