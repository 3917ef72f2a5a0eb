"""What rejection.py promises: fair picks, versions from SFT, fresh rewards, an exact resume.

The toy is that of toy.py: its answers are nonsense of all lengths, some of them cut.
"""
import json
import random
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import model as M
import rejection
import reward
import rollouts
import scale
import stage
import toy
import village as V
from rejection import Config

ALONE = scale.Ranks(torch.device("cpu"))


@pytest.fixture(scope="module")
def village() -> V.Village:
    return toy.village()


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return toy.tokenizer()


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output folder in which `python sft.py` and `python reward.py` have been."""
    return toy.chain(tmp_path)


def toy_config(folder, **flags) -> Config:
    quick = dict(rounds=2, prompts=6, samples=3, comparisons=0, rs_lr=1e-2, max_new_tokens=6)
    return Config(**{"out": str(folder), "device": "cpu", "kernels": "torch", **quick, **flags})


def setting_of(folder, **flags) -> rejection.Setting:
    info = M.load(folder / "sft.pt", "cpu")[1]
    return rejection.Setting(toy_config(folder, **flags), toy.tokenizer(), toy.village(), ALONE,
                             info)


def reward_of(folder):
    """score(rows, answers) by the reward models of a folder."""
    return rollouts.reward_pair(folder, toy.tokenizer(), ALONE)


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    ask_little(monkeypatch)


def ask_little(patch) -> None:
    """48 prompts to choose a temperature are many for a toy."""
    original = rejection.Setting.draw

    def draw(setting, purpose, count, split="train"):
        most = 24 if purpose == "distillation" else 12
        return original(setting, purpose, min(count, most), split)

    patch.setattr(rejection.Setting, "draw", draw)


# ------------------------------------------------------------------------------------ the idea


def test_the_best_answer_is_picked_and_never_one_that_was_cut():
    scores = torch.tensor([[1.0, 9.0, 3.0], [5.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    finished = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    picks = [rejection.pick(scores, finished, random.Random(seed)) for seed in range(20)]
    assert all([(p.row, p.best) for p in rows] == [(0, 2), (1, 0)] for rows in picks)
    assert {rows[0].random for rows in picks} == {0, 2}
    assert {rows[1].random for rows in picks} == {0, 1, 2}


def test_v1_to_v3_learn_from_their_own_round_and_v4_from_all():
    rounds = [[[f"p{n}", f"best{n}"]] for n in range(1, 6)]
    for number in (1, 2, 3):
        assert rejection.merged(rounds, number) == [(f"p{number}", f"best{number}")]
    assert rejection.merged(rounds, 4) == [(f"p{n}", f"best{n}") for n in range(1, 5)]
    assert len(rejection.merged(rounds, 5)) == 5


def test_imitation_makes_the_answers_likelier_and_learns_no_prompt():
    model = toy.network(1)
    examples = [([1, 9, 30], [8, 5, 2]), ([1, 7], [6, 2])]
    batch = rollouts.pad_answers(*zip(*examples), "cpu")
    before = rollouts.response_logprobs(model, *batch, 1.0).sum()
    loss = rejection.imitate(model, examples * 16, 1e-2, 8, 0)
    assert rollouts.response_logprobs(model, *batch, 1.0).sum() > before and loss > 0


# ---------------------------------------------------------------------------------- a version


def test_the_best_of_k_is_the_best_of_its_own_prompt(folder):
    """[a, b] asked 3 times each is [a, a, a, b, b, b]: row 1 of the scores is b's."""
    setting = setting_of(folder)
    rows = setting.draw("any", 2)

    def score(many, answers):
        own = [float(row is rows[1]) for row in many]
        return SimpleNamespace(combined=torch.tensor(own))

    answers, combined, finished = rejection.best_of(toy.network(1), rows, score, 0.8, setting, "x")
    assert combined.shape == finished.shape == (2, 3) and len(answers.texts) == 6
    cut = torch.tensor([[0.0] * 3, [1.0] * 3]).where(finished, torch.zeros(2, 3))
    assert torch.equal(combined, cut)  # an answer without EOS has the lowest score of all
    expected = [data.encode_dialog(setting.tokenizer, row["messages"])[0] for row in rows]
    assert answers.prompts == [p for p in expected for _ in range(3)]


def test_every_version_starts_from_sft_and_the_newest_model_samples(folder, monkeypatch):
    setting = setting_of(folder, rounds=4)
    begun, sampled, merged = [], [], []
    sft = toy.weights(folder / "sft.pt")

    def imitate(model, examples, lr, batch_size, seed):
        begun.append(toy.same(model.state_dict(), sft))
        merged.append(len(examples))
        with torch.no_grad():
            model.output.weight.add_(0.01 * len(begun))
        return 0.0

    original = rejection.choose_temperature
    monkeypatch.setattr(rejection, "imitate", imitate)
    monkeypatch.setattr(rejection, "distil", lambda *_: [])
    monkeypatch.setattr(rejection, "choose_temperature", lambda newest, *rest: (
        sampled.append(newest.output.weight.clone()), original(newest, *rest))[1])
    assert [number for number, _ in rejection.train(setting)] == [1, 2, 3, 4]
    assert begun == [True] * 5  # four versions and the control
    versions = [M.load(folder / f"rlhf_v{n}.pt", "cpu")[0].output.weight for n in (1, 2, 3)]
    assert torch.equal(sampled[0], sft["output.weight"])
    assert all(torch.equal(a, b) for a, b in zip(sampled[1:], versions))
    assert merged[3] == sum(merged[:3]) + len(json.loads(
        (folder / "rejection.state.json").read_text())["memory"]["rounds"][3])


def test_the_control_imitates_as_many_prompts_answered_by_sft_and_rejects_none(folder,
                                                                               monkeypatch):
    setting, learnt, drawn = setting_of(folder, rounds=1), [], []
    original = rejection.Setting.answer

    def answer(setting, model, dialogs, temperature, *purpose):
        answers = original(setting, model, dialogs, temperature, *purpose)
        if purpose[0] == "control":
            drawn.append((model.output.weight.clone(), temperature, answers))
        return answers

    monkeypatch.setattr(rejection.Setting, "answer", answer)
    monkeypatch.setattr(rejection, "imitate", lambda model, examples, *_: (
        learnt.append((toy.same(model.state_dict(), sft), examples)), 0.0)[1])
    monkeypatch.setattr(rejection, "distil", lambda *_: [["p", "safer"]])
    sft = toy.weights(folder / "sft.pt")
    (number, record), = rejection.train(setting)
    (weight, temperature, answers), = drawn
    assert torch.equal(weight, sft["output.weight"]) and temperature == record["temperature"]
    (_, best), (is_sft, control) = learnt
    whole = zip(answers.prompts, answers.responses, answers.finished)
    assert is_sft and control == [(p, r) for p, r, ended in whole if ended]
    assert best[-1] == ("p", "safer") and ("p", "safer") not in control
    assert (folder / "rlhf_control.pt").exists()


def test_the_control_is_trained_in_the_last_round_alone(folder, monkeypatch):
    monkeypatch.setattr(rejection, "imitate", lambda *_: 0.0)
    there = [(folder / "rlhf_control.pt").exists()
             for _ in rejection.train(setting_of(folder, rounds=3))]
    assert there == [False, False, True]


def test_distillation_leaves_out_dialogues_that_have_a_system_message(folder, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"How do I steal ring {i}?"}],
             "is_safety": True} for i in range(4)]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Act as Plato."})
    asked = []
    monkeypatch.setattr(rejection.Setting, "draw", lambda *_: rows)
    original = rejection.Setting.answer
    monkeypatch.setattr(rejection.Setting, "answer", lambda setting, model, dialogs, *rest: (
        asked.append(dialogs), original(setting, model, dialogs, *rest))[1])
    rejection.distil(toy.network(5), reward_of(folder), setting_of(folder))
    assert [len(dialogs) for dialogs in asked] == [3, 3]


def test_distillation_keeps_strictly_safer_answers_and_drops_the_preprompt(
        folder, tokenizer, village, monkeypatch):
    asked, scored = [], []

    def answer(setting, model, dialogs, temperature, *purpose):
        asked.append(dialogs)
        prompts = [data.encode_dialog(tokenizer, d)[0] for d in dialogs]
        responses = [[len(asked), i, 2] for i in range(len(dialogs))]
        finished = torch.tensor([i != 3 for i in range(len(dialogs))])
        return rollouts.Answers(prompts, responses, finished, [""] * len(dialogs))

    def score(rows, answers):  # row 0 gets safer, 1 ties, 2 gets worse, the rest safer
        scored.append(answers.prompts)
        gains = [{0: 1.0, 1: 0.0, 2: -1.0}.get(i, 1.0) if call == 2 else 0.0
                 for call, i, _ in answers.responses]
        return SimpleNamespace(safety=torch.tensor(gains))

    monkeypatch.setattr(rejection.Setting, "answer", answer)
    kept = rejection.distil(None, score, setting_of(folder, prompts=12))
    plain, guided = asked
    assert len(plain) > 3
    assert all(d[0] == {"role": "system", "content": rejection.PREPROMPT} and d[1:] == p
               for d, p in zip(guided, plain))
    annotator = V.Annotator(village)
    assert all(annotator.understand(d).kind == "unsafe" for d in plain)  # helpful ones untouched
    assert [r[1] for _, r in kept] == [0, *range(4, len(plain))]  # no tie, no worse, none cut (3)
    bare = [data.encode_dialog(tokenizer, d)[0] for d in plain]
    assert all(p == bare[r[1]] for p, r in kept)
    assert scored == [bare, bare]  # the preprompt's answers too, as answers to the bare prompt


# ----------------------------------------------------------------------- fresh reward models


@pytest.mark.parametrize("links", [1, 2])
def test_a_script_behind_a_link_finds_its_neighbours(links, tmp_path, monkeypatch):
    """Python finds the modules, but __file__ is the link: reward.py is not beside it."""
    link = Path(rejection.__file__).resolve()
    for n in range(links):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "rejection.py").symlink_to(link)
        link = tmp_path / str(n) / "rejection.py"
    commands = []
    monkeypatch.setattr(rejection, "__file__", str(link))
    monkeypatch.setattr(rejection.subprocess, "run", lambda command, **options: (
        commands.append(command), SimpleNamespace(returncode=0))[1])
    rejection.run_reward([])
    assert Path(commands[0][1]).is_file() and Path(commands[0][1]).name == "reward.py"


def test_fresh_comparisons_go_through_reward_py(folder, tokenizer, village, monkeypatch):
    """The child process is played by the same call in this one: real flags, rows and models."""
    flags = asdict(reward.Config(seed=7, margin="none"))
    toy.save_rewards(folder, 2, 3, flags=flags)
    setting = setting_of(folder, comparisons=180, max_new_tokens=30)
    commands = []

    def run(command, **_):
        commands.append(command)
        reward.main(stage.cli(reward.Config, command[2:]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(rejection.subprocess, "run", run)
    newest, previous = (toy.network(seed, ending=0.9) for seed in (5, 6))
    rejection.refresh_rewards(1, newest, previous, folder, setting)
    rows = data.read_preferences(str(folder / "refreshed_1" / "comparisons.jsonl"))
    for_safety = [row for row in rows if reward.goal_of(row) == "safety"]
    unsafe = [row for row in for_safety if V.Annotator(village).understand(row["prompt"]).kind
              == "unsafe"]
    assert 0.2 < len(for_safety) / len(rows) < 0.5  # a third, and of those half harmless
    assert 0 < len(unsafe) < len(for_safety)
    assert Path(commands[0][1]).name == "reward.py" and Path(commands[0][1]).exists()
    before, after = (M.load(f / "reward_safety.pt", "cpu")[0] for f in (
        folder, folder / "refreshed_1"))
    assert not torch.equal(before.output.weight, after.output.weight)
    reward_of(folder / "refreshed_1")
    # what made the first models makes the refreshed ones, and so the next: their files say it
    first, next_one = (stage.cli(reward.Config, rejection.flags_of(f / "reward_helpful.pt"))
                       for f in (folder, folder / "refreshed_1"))
    assert next_one == first == reward.Config(seed=7, margin="none")


def test_a_refresh_reads_as_many_older_comparisons_and_never_what_is_held_out(folder, monkeypatch):
    setting, commands = setting_of(folder), []
    monkeypatch.setattr(rejection, "compare", lambda *_: [{"fresh": i} for i in range(5)])
    monkeypatch.setattr(rejection.subprocess, "run", lambda command, **_: (
        commands.append(command), SimpleNamespace(returncode=0))[1])
    for name in ("helpful", "safety", "helpful_valid", "safety_valid"):
        (folder / f"preferences_{name}.jsonl").write_text(
            "".join(f'{{"{name}": {i}}}\n' for i in range(40)))
    rejection.refresh_rewards(1, None, None, folder, setting)
    rejection.refresh_rewards(2, None, None, folder, setting)
    again = (folder / "refreshed_2" / "again.jsonl").read_text().splitlines()
    assert len(again) == len(set(again)) == 5 and "valid" not in "".join(again)
    files = commands[1][commands[1].index("--data") + 1].split(",")
    assert [Path(f).name for f in files] == ["comparisons.jsonl", "again.jsonl",
                                             "preferences_helpful_valid.jsonl",
                                             "preferences_safety_valid.jsonl"]
    monkeypatch.setattr(rejection, "compare", lambda *_: [{"fresh": i} for i in range(200)])
    rejection.refresh_rewards(3, None, None, folder, setting)
    again = (folder / "refreshed_3" / "again.jsonl").read_text().splitlines()
    kinds = [next(iter(json.loads(line))) for line in again]
    assert {kind: kinds.count(kind) for kind in kinds} == {"helpful": 40, "safety": 40, "fresh": 10}


def test_a_refresh_has_the_flags_that_made_the_reward_models(folder, monkeypatch):
    """All that decides what is learnt, as it was given; never how many pairs were collected."""
    made = dict(seed=7, margin="large", aux_weight=0.25, lr=3e-4, batch_size=4, micro_batch=2)
    flags = asdict(reward.Config(**made, pairs=99, valid_pairs=5, save_every=3))
    toy.save_rewards(folder, 2, 3, flags=flags)
    commands = []
    monkeypatch.setattr(rejection, "compare", lambda *_: [{"fresh": 1}])
    monkeypatch.setattr(rejection.subprocess, "run", lambda command, **_: (
        commands.append(command), SimpleNamespace(returncode=0))[1])
    setting = setting_of(folder)
    rejection.refresh_rewards(1, None, None, folder, setting)
    child = stage.cli(reward.Config, commands[0][2:])  # every flag is one that reward.py has
    assert child.given == {"data", "resume_from", "out", "device", "kernels", *made}
    assert {name: getattr(child, name) for name in made} == made
    assert (child.resume_from, child.out) == (str(folder), str(folder / "refreshed_1"))
    toy.save_rewards(folder, 2, 3)  # a user's own, that name no flags
    rejection.refresh_rewards(2, None, None, folder, setting)
    child = stage.cli(reward.Config, commands[1][2:])
    assert child.given == {"data", "resume_from", "out", "device", "kernels"}


def test_a_failed_refresh_says_why_in_one_line(folder, monkeypatch):
    monkeypatch.setattr(rejection.subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=2, stderr="reward.py: too little\n"))
    with pytest.raises(ValueError, match="too little.*--comparisons 0") as error:
        rejection.refresh_rewards(1, toy.network(5), toy.network(6), folder,
                                  setting_of(folder, comparisons=6))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- the whole stage


def refreshed(flags: list[str]) -> None:
    """Plays reward.py: two models that depend on the older ones and on the comparisons."""
    cfg = stage.cli(reward.Config, flags)
    read = sum(len(Path(file).read_bytes()) for file in cfg.data.split(","))
    for which in ("helpful", "safety"):
        model = M.load(Path(cfg.resume_from) / f"reward_{which}.pt", "cpu")[0]
        with torch.no_grad():
            model.output.weight.add_(torch.linspace(0, 1, 24) * (read % 997 / 997))
        toy.save(Path(cfg.out) / f"reward_{which}.pt", model, threshold=0.4)


def course(folder, **flags) -> Config:
    """Two versions with comparisons, at the least that makes each of them learn something."""
    return toy_config(folder, **{**dict(prompts=4, samples=2, comparisons=24, max_new_tokens=16,
                                        temperatures="0.5,0.8"), **flags})


def timeless(metrics: dict) -> dict:
    """What must not depend on how long it took."""
    return {key: value for key, value in metrics.items() if key != "minutes"}


VERSIONS = ("rlhf_v1", "rlhf_v2", "rlhf_control", "refreshed_1/reward_helpful",
            "refreshed_1/reward_safety", "refreshed_2/reward_helpful",
            "refreshed_2/reward_safety")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its records, and its folder as it was behind each file written."""
    folder = toy.chain(tmp_path_factory.mktemp("whole") / "out")
    snapshots, original = [], M.atomic_write

    def write(path, content):
        original(path, content)
        copy = folder.parent / f"after {len(snapshots)}"
        shutil.copytree(folder, copy)
        snapshots.append((str(Path(path).relative_to(folder)), copy))

    with pytest.MonkeyPatch.context() as patch:
        ask_little(patch)
        patch.setattr(rejection, "run_reward", refreshed)
        patch.setattr(M, "atomic_write", write)
        records = rejection.main(course(folder))
    return SimpleNamespace(folder=folder, records=records, snapshots=snapshots)


def test_the_stage_makes_versions_and_says_how(whole):
    assert list(whole.records) == [1, 2]
    for number, record in whole.records.items():
        best = [b for b, _ in record["ladder"].values()]
        assert best == sorted(best) and record["temperature"] in (0.5, 0.8)
        assert record["rewards"] == f"refreshed_{number}"
        info = M.load(whole.folder / f"rlhf_v{number}.pt", "cpu")[1]
        assert info["stage"] == f"rlhf_v{number}" and info["metrics"]["lineage"] == ["sft"]
        assert info["metrics"]["rewards"] == record["rewards"]
        assert info["metrics"]["gold_best"] == record["gold_best"]
    assert not list(whole.folder.glob("*state*"))


def test_a_version_appears_last_when_its_reward_models_are_there(whole):
    """Whoever waits for rlhf_v2.pt finds everything that its metrics name."""
    refresh = ["comparisons.jsonl", "again.jsonl", "reward_helpful.pt", "reward_safety.pt"]
    first, second = ([f"refreshed_{n}/{file}" for file in refresh] for n in (1, 2))
    state = "rejection.state.json"
    assert [file for file, _ in whole.snapshots] == [
        *first, "rlhf_v1.pt", state, "rlhf_control.pt", *second, "rlhf_v2.pt", state]
    assert (whole.folder / first[0]).stat().st_size and (whole.folder / second[1]).stat().st_size
    for _, copy in whole.snapshots:
        for path in copy.glob("rlhf_v*.pt"):
            named = M.load(path, "cpu")[1]["metrics"]["rewards"]
            assert (copy / named / "reward_safety.pt").exists()


@pytest.mark.parametrize("place", range(13))
def test_a_kill_between_any_two_files_and_resume_give_the_same_versions(whole, tmp_path, place,
                                                                        monkeypatch):
    """What a kill leaves is what was on the disk: the folder as it was behind each file."""
    monkeypatch.setattr(rejection, "run_reward", refreshed)
    shutil.copytree(whole.snapshots[place][1], tmp_path / "out")
    records = rejection.main(course(tmp_path / "out", resume=True))
    for number, record in records.items():
        assert timeless(record) == timeless(whole.records[number])
    for name in VERSIONS:
        ours, theirs = (M.load(f / f"{name}.pt", "cpu") for f in (tmp_path / "out", whole.folder))
        assert toy.same(ours[0].state_dict(), theirs[0].state_dict())
        assert timeless(ours[1]["metrics"]) == timeless(theirs[1]["metrics"])
    for number in (1, 2):
        file = f"refreshed_{number}/comparisons.jsonl"
        assert (tmp_path / "out" / file).read_text() == (whole.folder / file).read_text()
    assert not list((tmp_path / "out").glob("*state*"))


def test_a_kill_inside_a_version_and_resume_give_the_same_versions(whole, folder, monkeypatch):
    monkeypatch.setattr(rejection, "run_reward", refreshed)
    original, calls = rejection.make_version, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(rejection, "make_version", killed)
        with pytest.raises(KeyboardInterrupt):
            rejection.main(course(folder))
    assert (folder / "rejection.state.json").exists() and not (folder / "rlhf_v2.pt").exists()
    with pytest.raises(ValueError, match="--samples 2"):
        rejection.main(replace(course(folder, resume=True), samples=3))
    (number, record), = rejection.main(course(folder, resume=True)).items()
    assert number == 2 and timeless(record) == timeless(whole.records[2])
    for name in VERSIONS:
        assert toy.same(toy.weights(folder / f"{name}.pt"),
                        toy.weights(whole.folder / f"{name}.pt"))


def test_a_new_run_leaves_no_version_of_an_older_one_and_no_ppo_behind_it(folder, monkeypatch):
    """ppo.py starts from the highest version: an older V5 is none of a run of one version."""
    monkeypatch.setattr(rejection, "imitate", lambda *_: 0.0)
    for name in ("rlhf_v1.pt", "rlhf_v5.pt", "rlhf_control.pt", "ppo.state.pt"):
        (folder / name).write_bytes((folder / "sft.pt").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(rejection, "make_version", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rejection.main(toy_config(folder, rounds=1))
    assert (folder / "rlhf_v5.pt").exists()  # until there is a new one, the old run is whole
    rejection.main(toy_config(folder, rounds=1))
    assert sorted(path.name for path in folder.glob("rlhf*")) == ["rlhf_control.pt", "rlhf_v1.pt"]
    assert not (folder / "ppo.state.pt").exists()
    start = folder / "rlhf_v7.pt"  # a version as the start of versions stays
    start.write_bytes((folder / "sft.pt").read_bytes())
    rejection.main(toy_config(folder, rounds=1, checkpoint=str(start)))
    assert start.exists()


def test_own_prompts_and_own_reward_need_no_reward_model(folder):
    rows = [{"prompt": f"Tell me {i} things.", "is_safety": i % 3 == 0} for i in range(20)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("fn = lambda p, r: [float(len(x)) for x in r]\n")
    for which in ("helpful", "safety"):
        (folder / f"reward_{which}.pt").unlink()
    records = rejection.main(toy_config(folder, rounds=1, data=str(folder / "mine.jsonl"),
                                        reward=f"{folder}/mine.py:fn", comparisons=600))
    assert "gold_best" not in records[1] and records[1]["rewards"] == "."
    assert (folder / "rlhf_v1.pt").exists() and not list(folder.glob("refreshed*"))


def test_no_answer_that_ends_is_one_line(folder):
    toy.save(folder / "sft.pt", toy.network(1, ending=-50.0))
    with pytest.raises(ValueError, match="none of 18 answers ended within --max-new-tokens 2"):
        rejection.main(toy_config(folder, rounds=1, max_new_tokens=2))


@pytest.mark.parametrize("flags, message", [
    ({"samples": 0}, "--samples 0"), ({"rounds": 0}, "--rounds 0"), ({"rs_lr": 0.0}, "--rs-lr 0.0"),
    ({"threshold": 1.5}, "--threshold 1.5"), ({"reward": "nothing"}, "FILE.py:FUNCTION"),
    ({"checkpoint": "nothing.pt"}, "nothing.pt does not exist"), ({"tp": 2}, "torchrun"),
    ({"batch_size": 0}, "--batch-size 0"), ({"temperatures": "0.5,hot"}, "--temperatures 0.5,hot"),
    ({"temperatures": "0.5,0"}, "--temperatures 0.5,0: numbers above 0, comma between"),
    ({"temperatures": ""}, "--temperatures : numbers"),
    ({"temperatures": "0.5,inf"}, "--temperatures 0.5,inf")])
def test_bad_flags_are_one_line(folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        rejection.main(toy_config(folder, **flags))
    assert "\n" not in str(error.value)


def test_missing_or_foreign_reward_models_are_one_line(folder):
    other = data.Tokenizer(data.train_tokenizer(V.Village().documents(100, 1), 400))
    M.save(folder / "reward_safety.pt", toy.network(1, True), "reward_safety", other.model_bytes)
    with pytest.raises(ValueError, match="another tokenizer"):
        rejection.main(toy_config(folder))
    toy.save(folder / "reward_safety.pt", toy.network(1, True))
    with pytest.raises(ValueError, match="--threshold 0.15"):
        rejection.main(toy_config(folder))
    (folder / "reward_helpful.pt").unlink()
    with pytest.raises(FileNotFoundError, match="python reward.py"):
        rejection.main(toy_config(folder))


def test_reward_models_of_another_village_are_one_line(folder):
    toy.save(folder / "sft.pt", toy.network(1), village=4)
    toy.save_rewards(folder, 2, 3, village=5)
    with pytest.raises(ValueError, match="trained in village 5, the model to train in village 4"
                       ) as error:
        rejection.main(toy_config(folder))
    assert "\n" not in str(error.value) and not (folder / "rlhf_v1.pt").exists()


def test_the_temperatures_that_are_tried_are_those_of_the_flag(folder, monkeypatch):
    """And the best one by the reward is sampled at, on valid prompts."""
    tried, splits, draw = [], [], rejection.Setting.draw

    def best_of(newest, rows, score, temperature, *_):
        tried.append(temperature)
        return None, torch.tensor([[temperature == 0.9, 0.0]]).float(), None

    monkeypatch.setattr(rejection, "best_of", best_of)
    monkeypatch.setattr(rejection.Setting, "draw", lambda setting, purpose, count, split: (
        splits.append(split), draw(setting, purpose, count, split))[1])
    setting = setting_of(folder, temperatures="0.3,0.9,1.4")
    chosen, curve = rejection.choose_temperature(None, 1, None, setting)
    assert tried == list(curve) == [0.3, 0.9, 1.4] and chosen == 0.9 and splits == ["valid"]


def test_imitation_takes_as_many_answers_a_step_as_it_is_told(monkeypatch):
    """10 answers, twice: in steps of 4 five of them, in steps of 32 two of all."""
    examples = [([1, 9, 30], [8, 5, 2])] * 10
    for batch_size, rows in ((4, [4] * 5), (32, [10] * 2)):
        seen = []
        with monkeypatch.context() as patch:
            pad = rollouts.pad_answers
            patch.setattr(rollouts, "pad_answers", lambda prompts, *rest: (
                seen.append(len(prompts)), pad(prompts, *rest))[1])
            rejection.imitate(toy.network(1), examples, 1e-3, batch_size, 0)
        assert seen == rows


def test_the_command_line_says_it_in_one_line_with_exit_code_2(tmp_path):
    script = Path(rejection.__file__)
    command = [sys.executable, script, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "sft.py" in done.stderr


def test_the_learning_rate_follows_the_width_and_from_7b_on_is_that_of_sft(folder, monkeypatch):
    used = []
    monkeypatch.setattr(rejection, "train", lambda setting: used.append(setting.cfg.rs_lr) or [])
    for size, lr in (("tiny", 2.5e-4), ("110m", 1e-4), ("7b", 2e-5), ("70b", 2e-5)):
        monkeypatch.setattr(rejection.plan, "shape_of", lambda *_: M.preset(size))
        rejection.main(toy_config(folder, rs_lr=None))
        assert used.pop() == lr
        rejection.main(toy_config(folder, rs_lr=0.5))
        assert used.pop() == 0.5


def test_every_flag_is_read_and_there_are_at_most_21():
    source = Path(rejection.__file__).read_text()
    body = source[source.index("class Pick("):]
    names = [field.name for field in fields(Config)]
    assert len(names) <= 21 and [n for n in names if f"cfg.{n}" not in body] == []
    assert asdict(Config())
