"""What reward.py promises: the paper's loss, the score of the EOS, clean splits, an exact resume.

Most tests use a toy: 40 words, 12,000 parameters, and people who like polite answers, the more
"please" the better.
"""
import copy
import functools
import gzip
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import kernels
import model as M
import reward
import rollouts
import scale
import stage
import village as V
from reward import Config, calibrate, margin_of, ranking_loss, safety_loss

ALONE = scale.Ranks(torch.device("cpu"))
WORDS = ("bring me some bread soup water wine now please I will not yes no here it is for "
         "you").split()


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) + " [INST] [/INST]" for _ in range(300)]
    return data.Tokenizer(data.train_tokenizer(texts, 340))


@pytest.fixture(scope="module")
def chat(tokenizer) -> M.Llama:
    """An untrained network of 2 layers with a head over the vocabulary."""
    config = M.ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=28,
                           vocab_size=tokenizer.vocab_size, max_seq_len=64)
    return M.Llama(config).init_weights(1)


@pytest.fixture
def folder(tmp_path, chat, tokenizer):
    """An output folder in which `python sft.py` has been."""
    M.save(tmp_path / "sft.pt", chat, "sft", tokenizer.model_bytes)
    return tmp_path


def dialog(prompt: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def comparison(i: int, rated=True, **more) -> dict:
    """Row i of a preference file: of two answers people choose the one with more "please"."""
    rng = random.Random(i)
    prompt = " ".join(rng.choices(WORDS[:9], k=4)) + f" {i}"
    few, many = sorted(rng.sample(range(4), 2))
    rating = {"rating": data.RATINGS[3 - (many - few)]} if rated else {}
    return {"chosen": dialog(prompt, "here it is" + " please" * many),
            "rejected": dialog(prompt, "here it is" + " please" * few), **rating, **more}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(**fields) -> dict:
    """A comparison as data.read_preferences returns it."""
    return {"prompt": [{"role": "user", "content": "bread"}], "chosen": "yes", "rejected": "no",
            "rating": None, "margin": None, "chosen_safe": None, "rejected_safe": None,
            "planted": False, **fields}


def pair(chosen, rejected, margin=0.0, safe=(-1, -1), rating=None) -> reward.Pair:
    return reward.Pair(chosen, rejected, 1, margin, safe, rating, row())


def quick(folder, **flags) -> Config:
    return Config(out=str(folder), kernels="torch", device="cpu", batch_size=4, micro_batch=4,
                  **flags)


# ------------------------------------------------------------------------------------ the losses


@pytest.mark.parametrize("margin, nats", [(0, 0.6931), (1 / 3, 0.8736), (2 / 3, 1.0810),
                                          (1, 1.3133), (2, 2.1269), (3, 3.0486)])
def test_at_equal_scores_the_loss_is_ln_of_1_plus_e_to_the_margin(margin, nats):
    """-log sigmoid(0 - m) = log(1 + e^m); all margins of the paper's Table 27."""
    loss = ranking_loss(torch.tensor([5.0]), torch.tensor([5.0]), torch.tensor([margin]))
    assert loss.item() == pytest.approx(nats, abs=5e-5)


def test_a_number_added_to_both_scores_changes_nothing_and_a_margin_makes_it_harder():
    chosen, rejected = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    loss = [ranking_loss(chosen, rejected, torch.tensor(m)) for m in (0.0, 1.0)]
    shifted = ranking_loss(chosen + 7, rejected + 7, torch.tensor(1.0))
    assert torch.allclose(loss[1], shifted, atol=1e-6)
    assert (loss[1] > loss[0]).all()


def test_the_gradient_is_minus_one_half_where_the_gap_is_the_margin():
    chosen = torch.tensor([2.0], requires_grad=True)
    ranking_loss(chosen, torch.tensor([-1.0]), torch.tensor([3.0])).sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.5)


def test_the_auxiliary_loss_is_cross_entropy_and_skips_answers_without_a_label():
    """score ln 3: p(safe) = 3/4, so -ln(3/4) if safe and -ln(1/4) if unsafe."""
    score = torch.full((3,), math.log(3))
    loss = safety_loss(score, torch.tensor([1.0, 0.0, -1.0]))
    assert loss.tolist() == pytest.approx([math.log(4 / 3), math.log(4), 0.0])


@pytest.mark.parametrize("table, margins", [("none", (0, 0, 0, 0)), ("small", (1, 2 / 3, 1 / 3, 0)),
                                            ("large", (3, 2, 1, 0))])
def test_margins_are_those_of_table_27_and_0_for_negligibly_better(table, margins):
    found = [margin_of(row(rating=rating), table) for rating in
             ("significantly", "better", "slightly", "negligibly")]
    assert found == pytest.approx(margins)


def test_an_unrated_row_has_no_margin_and_a_written_one_wins():
    assert margin_of(row(), "large") == 0
    assert margin_of(row(margin=1.5, rating="negligibly"), "small") == 1.5
    assert margin_of(row(margin=1.5), "none") == 0


# ------------------------------------------------------------------------------------- the score


def scalar(chat) -> M.Llama:
    """Of a copy: the trunk is not copied, and training would move the next test's model."""
    return reward.with_scalar_head(copy.deepcopy(chat), seed=0)


def test_the_score_is_read_at_the_last_real_token(chat):
    """The plain forward gives a score per position; the one at length - 1 counts, not the pad's."""
    model, row = scalar(chat), [1, 5, 9, 30, 2]
    everywhere = model(torch.tensor([row + [0, 0, 0]]))[0]  # (T,)
    score = rollouts.end_scores(model, *rollouts.pad([row, row + [7, 8, 9]], "cpu"))[0]
    assert score.item() == pytest.approx(everywhere[4].item(), abs=1e-6)
    assert abs(everywhere[4] - everywhere[7]) > 1e-3


def test_padding_and_neighbours_change_no_score(chat):
    model, rng = scalar(chat), random.Random(0)
    rows = [[1] + [rng.randrange(3, 300) for _ in range(n)] + [2] for n in (3, 40, 11, 25, 7)]
    alone = [rollouts.scores(model, [r]).item() for r in rows]
    assert rollouts.scores(model, rows, rows_at_once=3).tolist() == pytest.approx(alone, abs=1e-5)


def test_dialogues_end_with_eos_and_differ_only_behind_the_prompt(tokenizer):
    [p] = reward.encode([row(chosen="yes please", rejected="no")], tokenizer, "small", 64)
    assert p.chosen[-1] == p.rejected[-1] == tokenizer.eos_id
    assert p.chosen[:p.prompt] == p.rejected[:p.prompt]
    assert tokenizer.decode(p.chosen[p.prompt:]).strip() == "yes please"


def test_a_dialogue_longer_than_the_context_is_left_out_and_counted(tokenizer, capsys):
    rows = [row(), row(chosen="please " * 80), row(rejected="please " * 80)]
    assert len(reward.encode(rows, tokenizer, "small", 64)) == 1
    assert "skipped 2 comparisons of more than 64 tokens" in capsys.readouterr().out


def test_before_training_all_scores_are_near_zero_and_the_trunk_is_the_chat_models(chat):
    model = scalar(chat)
    assert rollouts.scores(model, [[1, 4, 2], [1, 200, 33, 2]]).abs().max() < 0.5
    assert model.output.weight.shape == (1, 24)
    assert torch.equal(model.layers[1].attention.wq.weight, chat.layers[1].attention.wq.weight)
    assert len(reward.with_scalar_head(chat, 0, layers=1).layers) == 1


# ------------------------------------------------------------------------------------- the rows


def test_an_unsafe_answer_preferred_to_a_safe_one_is_left_out(tmp_path):
    rows = [comparison(i, chosen_safe=a, rejected_safe=b) for i, (a, b) in enumerate(
        [(True, False), (True, True), (False, False), (False, True)] * 10)]
    both = reward.read_comparisons(Config(data=write(tmp_path / "a.jsonl", rows)))
    labels = {(r["chosen_safe"], r["rejected_safe"]) for part in both for r in part}
    assert labels == {(True, False), (True, True), (False, False)}


def test_without_held_out_files_dialogues_are_held_out_with_their_siblings(tmp_path):
    """Rows with one opening, at their first and second turn, stand on one side together."""
    rows = [comparison(i) for i in range(30)]
    for r in list(rows):
        opening = r["chosen"][0]["content"]
        turns = dialog(opening, "yes")
        rows.append({side: turns + dialog("and wine", answer) for side, answer in
                     (("chosen", "here please"), ("rejected", "no"))})
    train, test = reward.read_comparisons(Config(data=write(tmp_path / "a.jsonl", rows)))
    openings = [{r["prompt"][0]["content"] for r in part} for part in (train, test)]
    assert len(test) == 6 and len(train) == 54 and not openings[0] & openings[1]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_prompt_of_a_held_out_file_is_not_trained_on(tmp_path, split):
    """The village's are named *_valid.jsonl, other people's often *_test.jsonl."""
    write(tmp_path / "mine.jsonl", [comparison(i) for i in range(20)])
    write(tmp_path / f"mine_{split}.jsonl", [comparison(i) for i in range(15, 25)])
    train, test = reward.read_comparisons(Config(data=str(tmp_path)))
    assert len(train) == 15 and len(test) == 10


def test_the_mixes_are_those_of_the_paper_but_helpfulness_reads_no_unsafe_answer():
    helpful, safe = [row() for _ in range(50)], [row(chosen_safe=True, rejected_safe=True)] * 20
    unsafe = [row(chosen_safe=True, rejected_safe=False)] * 70
    rows = helpful + safe + unsafe
    assert reward.mix(rows, "helpful", 0).count(safe[0]) == 20
    assert unsafe[0] not in reward.mix(rows, "helpful", 0)
    for_safety = reward.mix(rows, "safety", 0)
    assert len(for_safety) == 100 and for_safety.count(row()) == 10  # 90 to 10


@pytest.mark.parametrize("change, words", [
    (dict(rejected=dialog("another prompt", "no")), "a.jsonl:3: .*different prompts"),
    (dict(rating="great"), "a.jsonl:3: \"rating\" is 'great', allowed: significantly"),
    (dict(chosen="no transcript"), "a.jsonl:3: .*a transcript begins with"),
])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, change, words):
    path = write(tmp_path / "a.jsonl", [comparison(0), comparison(1), comparison(2, **change)])
    with pytest.raises(ValueError, match=words):
        reward.read_comparisons(Config(data=path))


def test_too_few_rows_say_what_is_missing(folder):
    path = write(folder / "a.jsonl", [comparison(i) for i in range(30)])
    with pytest.raises(ValueError, match="0 comparisons to train the safety model.*chosen_safe"):
        reward.main(quick(folder, data=path, which="safety"))


# ------------------------------------------------------------------------------- the evaluation


@pytest.mark.parametrize("precision, low, high", [(1.0, 0.2, 0.3), (0.75, 0.5, 0.6),
                                                  (0.7, 0.5, 0.6), (0.6, 0.6, 0.7)])
def test_the_threshold_is_the_largest_that_is_precise_enough(precision, low, high):
    """Answers by score, u unsafe: u.1 u.2 s.3 u.5 s.6 s.7; precision of the first n: 1, 1, 2/3,
    3/4, 3/5, 1/2. In another order in the call, for the order must not matter."""
    scores = torch.tensor([0.7, 0.1, 0.3, 0.2, 0.5, 0.6])
    unsafe = torch.tensor([False, True, False, True, True, False])
    assert low < calibrate(scores, unsafe, precision) < high


def test_no_threshold_is_precise_enough_then_nothing_lies_below_it():
    scores = torch.tensor([0.3, 0.1, 0.2])
    threshold = calibrate(scores, torch.tensor([True, False, True]), 0.9)
    assert not (scores < threshold).any()


def test_a_threshold_never_stands_between_equal_scores():
    """s.05 u.1 u.1 s.1: the first three would be 2/3 unsafe, but .1 < t takes the fourth too."""
    scores = torch.tensor([0.05, 0.1, 0.1, 0.1])
    assert not (scores < calibrate(scores, torch.tensor([False, True, True, False]), 0.6)).any()


def test_the_gate_never_fires_above_one_half():
    """Perfect scores: precision .89 would reach among the safe answers."""
    r, unsafe = torch.tensor([-3.0] * 9 + [2.0, 3.0]), torch.tensor([True] * 9 + [False] * 2)
    found = reward.detection(r, unsafe)
    assert found["threshold"] == 0.5 and found["unsafe_found_below"]["threshold"] == [1.0, 1.0]


def test_of_its_own_pairs_the_right_order_is_counted_and_ties_count_half(monkeypatch):
    """Gaps 1, -1 and 0: one right, one wrong, one half. Safety finds its threshold beside it."""
    scores = torch.tensor([3.0, 0.0, 1.0, 2.0, 1.0, 1.0])  # chosen, then rejected
    monkeypatch.setattr(rollouts, "scores", lambda model, dialogs: scores)
    pairs = [pair([1], [1], safe=(1, 0))] * 3
    assert reward.held_out(None, "helpful", pairs) == {"accuracy": 0.5}
    is_unsafe = torch.tensor([False] * 3 + [True] * 3)
    assert reward.held_out(None, "safety", pairs) == {
        "accuracy": 0.5, **reward.detection(scores, is_unsafe)}


# ------------------------------------------------------------------------------------ the stage


def rates_of(model, monkeypatch, steps: int, **flags) -> list[float]:
    """The learning rates of a run that learns nothing; a pair a step."""
    rates = []
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "end_scores", lambda *_: torch.zeros(2, requires_grad=True))
        patch.setattr(scale, "clip", lambda *_: 0.0)
        patch.setattr(stage, "step", lambda optimizer, lr, **_: rates.append(lr))
        pairs = [pair([1], [2])] * steps
        assert len(list(reward.train(model, None, pairs, 0.0, Config(batch_size=1, **flags),
                                     ALONE))) == steps
    return rates


def test_the_learning_rate_warms_up_5_steps_and_ends_at_a_tenth(chat, monkeypatch):
    rates = rates_of(chat, monkeypatch, 100, lr=1.0)
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates == [stage.cosine(step, 100, 1.0, 5) for step in range(100)]
    assert stage.cosine(100, 100, 1.0, 5) == pytest.approx(0.1)
    longer = rates_of(chat, monkeypatch, 1000, lr=1.0)
    assert longer[29] == 1.0 > longer[28]  # 3%


def one_step(model, batch, aux_weight: float, **flags) -> dict:
    """The metrics of one step on these pairs."""
    cfg = Config(batch_size=len(batch), **flags)
    (done, metrics), = reward.train(model, stage.adamw(model, 0.0, 0.1), batch, aux_weight, cfg,
                                    ALONE)
    assert done == 1
    return metrics


def test_micro_batches_give_the_gradient_of_the_whole_batch(chat, tokenizer):
    rows = [row(chosen="please " * (i + 1), rejected="no", rating="better", chosen_safe=True,
                rejected_safe=i % 2 == 0) for i in range(4)]
    batch = reward.encode(rows, tokenizer, "small", 64)
    parts, whole = (one_step(scalar(chat), batch, 0.7, micro_batch=micro) for micro in (1, 4))
    for name in ("grad_norm", "loss", "aux_loss", "accuracy"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4), name


def test_the_auxiliary_loss_is_weighed_and_only_the_safety_model_has_it(chat, tokenizer):
    """One pair at its start: gradient norm differs with the weight, loss and accuracy do not."""
    batch = reward.encode([row(chosen_safe=True, rejected_safe=False)], tokenizer, "none", 64)
    without, weighed = (one_step(scalar(chat), batch, weight) for weight in (0.0, 1.0))
    assert without["loss"] == weighed["loss"] and without["accuracy"] == weighed["accuracy"]
    assert without["grad_norm"] != weighed["grad_norm"]
    assert "aux_loss" not in without
    assert weighed["aux_loss"] == pytest.approx(2 * math.log(2), 0.1)  # p(safe) = 1/2, twice


def test_a_non_finite_loss_stops_with_the_numbers_and_the_weights_stay(chat, tokenizer):
    batch = reward.encode([row(chosen="yes please", rejected="no")], tokenizer, "none", 64)
    model = scalar(chat)
    with torch.no_grad():
        model.output.weight.fill_(math.nan)
    before = model.layers[0].attention.wq.weight.clone()
    with pytest.raises(FloatingPointError, match="loss nan, aux_loss .*--lr"):
        one_step(model, batch, 0.0)
    assert torch.equal(before, model.layers[0].attention.wq.weight)


@functools.cache
def transcripts() -> bytes:
    """200 comparisons as Anthropic publishes them: .jsonl.gz, transcripts, no ratings."""
    lines = []
    for i in range(200):
        sides = {side: "".join(f"\n\n{'Human' if m['role'] == 'user' else 'Assistant'}: "
                               f"{m['content']}" for m in messages)
                 for side, messages in comparison(i, rated=False).items()}
        lines.append(json.dumps(sides) + "\n")
    return gzip.compress("".join(lines).encode())


def test_transcripts_from_a_gz_file_are_learnt(folder, capsys):
    """More "please" wins: a count that 40 steps of a tiny model learn well above chance."""
    (folder / "hh.jsonl.gz").write_bytes(transcripts())
    report = reward.main(quick(folder, data=str(folder / "hh.jsonl.gz"), lr=5e-3))["helpful"]
    assert "20 held out" in capsys.readouterr().out and report["accuracy"] >= 0.8
    model, info = M.load(folder / "reward_helpful.pt", "cpu")
    assert model.config.scalar_head and info["stage"] == "reward_helpful"
    assert info["metrics"]["accuracy"] == report["accuracy"]
    assert info["metrics"]["village"] is None and info["trained_on"].endswith("hh.jsonl.gz")
    assert sorted(path.name for path in folder.iterdir()) == [  # no safety labels, no safety model
        "hh.jsonl.gz", "reward.jsonl", "reward_helpful.pt", "sft.pt"]


def labelled(folder) -> str:
    """A file with both kinds of rows."""
    rows = [comparison(i) for i in range(60)]
    rows += [comparison(i, chosen_safe=True, rejected_safe=i % 2 == 0) for i in range(100, 160)]
    return write(folder / "both.jsonl", rows)


class Killed(Exception):
    """Stands for a kill -9."""


def without_time_and_place(metrics: dict) -> dict:
    """What must not depend on where and when a model was made."""
    flags = {k: v for k, v in metrics["flags"].items() if k not in ("out", "resume")}
    return {**metrics, "minutes": None, "flags": flags}


def killed_run(folder, monkeypatch, steps: int, **flags) -> Config:
    """A run that is killed behind that many steps; returns its flags."""
    cfg, calls, step = quick(folder, checkpoint=str(folder / "sft.pt"), **flags), [], stage.step

    def mortal(*arguments, **numbers):
        calls.append(1)
        if len(calls) > steps:
            raise Killed
        return step(*arguments, **numbers)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "step", mortal)
        with pytest.raises(Killed):
            reward.main(cfg)
    return cfg


@pytest.mark.parametrize("where", ["in the first", "between", "in the second"])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(folder, monkeypatch, where):
    """Two models, one after the other: killed in either of them, and right between them."""
    flags = dict(data=labelled(folder), lr=2e-3, save_every=2, log_every=1)
    (folder / "whole").mkdir()
    whole = quick(folder / "whole", checkpoint=str(folder / "sft.pt"), **flags)
    reward.main(whole)
    lines = [json.loads(line) for line in (folder / "whole/reward.jsonl").read_text().splitlines()]
    assert all(("aux_loss" in line) == (line["model"] == "safety") for line in lines)
    boundary = sum(line["model"] == "helpful" for line in lines)
    kill_at = {"in the first": 3, "between": boundary, "in the second": boundary + 5}[where]
    cfg = killed_run(folder, monkeypatch, kill_at, **flags)
    reward.main(replace(cfg, resume=True))
    for which in ("helpful", "safety"):
        one, two = (M.load(f / f"reward_{which}.pt", "cpu") for f in (folder, folder / "whole"))
        weights = one[0].state_dict(), two[0].state_dict()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        assert without_time_and_place(one[1]["metrics"]) == without_time_and_place(
            two[1]["metrics"])
    logs = [(path / "reward.jsonl").read_text() for path in (folder, folder / "whole")]
    assert logs[0] == logs[1] and not (folder / "reward.state.pt").exists()


def test_a_run_resumed_in_its_second_model_neither_trains_nor_writes_the_first(folder,
                                                                               monkeypatch):
    flags = dict(data=labelled(folder), lr=2e-3, save_every=2)
    pairs = reward.prepare(quick(folder, **flags), data.Tokenizer(
        M.load(folder / "sft.pt", "cpu")[1]["tokenizer"]), 64)[0]
    cfg = killed_run(folder, monkeypatch, len(pairs["helpful"]) // 4 + 5, **flags)
    finished, begun, start = (folder / "reward_helpful.pt").stat(), [], reward.start
    accuracy = M.load(folder / "reward_helpful.pt", "cpu")[1]["metrics"]["accuracy"]
    monkeypatch.setattr(reward, "start", lambda cfg, which, ranks: (
        begun.append(which), start(cfg, which, ranks))[1])
    reports = reward.main(replace(cfg, resume=True))
    assert begun == ["safety"] and reports["helpful"]["accuracy"] == accuracy
    now = (folder / "reward_helpful.pt").stat()
    assert (now.st_ino, now.st_mtime_ns) == (finished.st_ino, finished.st_mtime_ns)


def test_resume_of_other_flags_is_refused_before_anything_is_collected(folder, monkeypatch):
    cfg = killed_run(folder, monkeypatch, 3, data=labelled(folder), save_every=2)
    monkeypatch.setattr(reward, "prepare", lambda *_: pytest.fail("went on"))
    with pytest.raises(ValueError, match="was made with --margin small"):
        reward.main(replace(cfg, resume=True, margin="large"))


def test_resume_from_trains_existing_reward_models_on_and_examines_them_briefly(folder,
                                                                                 monkeypatch):
    """Each on its own held-out pairs, and on nothing else."""
    flags = dict(data=labelled(folder), lr=2e-3)
    reward.main(quick(folder, **flags))
    before = M.load(folder / "reward_safety.pt", "cpu")[0].state_dict()
    fresh = write(folder / "fresh.jsonl", [comparison(i) for i in range(300, 340)])
    (folder / "next").mkdir()
    examined, held_out = [], reward.held_out
    monkeypatch.setattr(reward, "held_out", lambda model, which, pairs: (
        examined.append((which, {p.safe == (-1, -1) for p in pairs})),
        held_out(model, which, pairs))[1])
    reward.main(quick(folder / "next", data=f"{flags['data']},{fresh}", resume_from=str(folder),
                      lr=1e-12))
    after = M.load(folder / "next" / "reward_safety.pt", "cpu")[0].state_dict()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert examined == [("helpful", {True}), ("safety", {False})]
    assert sorted(path.name for path in (folder / "next").iterdir()) == [
        "reward.jsonl", "reward_helpful.pt", "reward_safety.pt"]


@pytest.mark.parametrize(("older", "lr", "share"), [(None, 0, 1), ("folder", 0, 0.5),
                                                    ("folder", 0.003, None)])
def test_a_refresh_learns_at_half_the_rate_unless_told(chat, monkeypatch, older, lr, share):
    rates = rates_of(chat, monkeypatch, 100, lr=lr, resume_from=older)
    assert max(rates) == pytest.approx(lr or share * reward.default_lr(chat.config.dim), rel=0.01)


def test_dry_run_and_importing_compute_nothing(folder, capsys):
    assert reward.main(quick(folder, dry_run=True)) == {}
    assert "parameters" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["sft.pt"]


# --------------------------------------------------------------------------- the village's part


class Village:
    """A stand-in for V.Village: what comparing needs of it."""

    def plant(self, prompts, answers, rivals, rng):
        assert [p[0]["content"] for p in prompts] == [f"bread {i}" for i in range(200)]
        assert len(answers) == len(rivals) == len(prompts)
        planted = [rng.random() < 0.15 for _ in answers]
        return ["I will not" if p else answer for p, answer in zip(planted, answers)], planted


def test_comparisons_are_two_different_finished_answers_in_the_users_row_format(
        monkeypatch, tokenizer, chat, tmp_path):
    """The sampler is replaced: each dialogue gets answers named after its two temperatures. What
    was planted is marked, and nothing else."""
    jobs_seen = []

    def sample(model, tokenizer, jobs, seed, max_new_tokens):
        assert max_new_tokens == 7
        jobs_seen.extend(jobs)
        return ["" if i % 10 == 0 else f"at {t}" for i, (_, t) in enumerate(jobs)]

    def label(self, messages, a, b, rng, by):
        return {"chosen": 1, "rating": "better", "safe": (False, True)}

    monkeypatch.setattr(reward, "sample", sample)
    monkeypatch.setattr(V.Annotator, "label", label)
    prompts = [[{"role": "user", "content": f"bread {i}"}] for i in range(200)]
    for by in ("helpful", "safe"):
        rows = reward.compare(chat, tokenizer, Village(), prompts, by, "0", 7)
        assert all(one[1] != two[1] for one, two in zip(jobs_seen[::2], jobs_seen[1::2]))
        read = data.read_preferences(write(tmp_path / "rows.jsonl", rows))
        assert len(read) == len(rows) and 150 < len(rows) < 180  # a fifth has an empty answer
        assert reward.parse(rows) == read, "without a file between"
        refusals = sum(r["rejected"] == "I will not" for r in read)
        assert 0.08 < refusals / len(rows) < 0.25  # of `plant`; chosen is always the second
        assert all(r["planted"] == (r["rejected"] == "I will not") for r in read)
        labels = {(r["chosen_safe"], r["rejected_safe"]) for r in read}
        assert labels == ({(True, False)} if by == "safe" else {(None, None)})


def test_a_row_of_other_people_has_no_planted_answer(tmp_path):
    """Nobody said so: it is a sampled one."""
    path = write(tmp_path / "a.jsonl", [comparison(0), comparison(1, planted=True)])
    assert [r["planted"] for r in data.read_preferences(path)] == [False, True]
    with pytest.raises(ValueError, match='a.jsonl:1: .*"planted"'):
        data.read_preferences(write(tmp_path / "a.jsonl", [comparison(0, planted="yes")]))


def test_helpfulness_is_trained_on_what_is_hard_to_judge_and_measured_on_prompts_as_they_come(
        tmp_path, chat, tokenizer, monkeypatch):
    """And all of them in the village that the chat model comes from, of train and valid alone; a
    test set is collected where it is asked for by name, and in no file."""
    asked = []

    class Village:
        def __init__(self, number):
            self.number = number

        def prompts(self, kind, split, n, seed, styled):
            asked.append((self.number, kind, split, n))
            return []

    M.save(tmp_path / "sft.pt", chat, "sft", tokenizer.model_bytes, {"village": 4})
    monkeypatch.setattr(V, "Village", Village)
    monkeypatch.setattr(reward, "compare", lambda *_: [])
    cfg = Config(out=str(tmp_path), pairs=30, valid_pairs=7)
    reward.collect_all(cfg, scale.setup("cpu"))
    assert sorted(asked) == [(4, "compared", "train", 20), (4, "helpful", "valid", 7),
                             (4, "safety", "train", 10), (4, "safety", "valid", 7)]
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == sorted(
        f"preferences_{name}.jsonl" for name in reward.COLLECTED)
    asked.clear()
    for which in ("helpful", "safety"):
        reward.collect(chat, tokenizer, Village(9), f"{which}_test", 5, 0, 8)
    assert asked == [(9, "helpful", "test", 5), (9, "safety", "test", 5)]


def test_each_collection_has_dice_of_its_own(chat, tokenizer, monkeypatch):
    """Held-out answers are no copies of training answers to the same prompt: the name is in the
    seed."""
    seeds = []
    monkeypatch.setattr(reward, "compare", lambda m, t, v, prompts, by, seed, n: seeds.append(seed))
    for name in (*reward.COLLECTED, "helpful_test"):
        reward.collect(chat, tokenizer, V.Village(), name, 3, 5, 8)
    assert len(set(seeds)) == 5


def test_models_of_collected_comparisons_remember_the_village_and_their_flags(folder, monkeypatch):
    """The exam repeats the flags; a model that has read of no village is asked of village 0."""
    def collect_all(cfg, ranks):
        for start, name in enumerate(reward.COLLECTED):
            more = dict(chosen_safe=True, rejected_safe=True) if "safety" in name else {}
            rows = [comparison(100 * start + i, **more) for i in range(20)]
            write(reward.preferences(folder, name), rows)

    monkeypatch.setattr(reward, "collect_all", collect_all)
    cfg = quick(folder, which="helpful", margin="large", seed=4)
    reward.main(cfg)
    _, info = M.load(folder / "reward_helpful.pt", "cpu")
    assert (info["metrics"]["village"], info["trained_on"]) == (0, "village 0")
    assert Config(**info["metrics"]["flags"]) == cfg and info["metrics"]["lineage"] == ["sft"]


def test_reward_models_are_not_trained_on_in_another_village(folder, chat, tokenizer, monkeypatch):
    M.save(folder / "sft.pt", chat, "sft", tokenizer.model_bytes, {"village": 5})
    (folder / "older").mkdir()
    for which in ("helpful", "safety"):
        M.save(folder / "older" / f"reward_{which}.pt", scalar(chat), f"reward_{which}",
               tokenizer.model_bytes, {"village": 4})
    monkeypatch.setattr(reward, "collect_all", lambda *_: pytest.fail("went on"))
    with pytest.raises(ValueError, match="trained in village 4, the chat model .* village 5"
                       ) as error:
        reward.main(quick(folder, resume_from=str(folder / "older")))
    assert "\n" not in str(error.value)


def test_an_unfinished_answer_is_no_answer(chat, tokenizer, monkeypatch):
    """A rollout whose rows end with EOS, and one that does not: the latter comes back empty."""
    def rollout(model, prompts, *arguments, row_ids, **options):
        done = tokenizer.encode("here it is", eos=True)
        return [done if i % 2 else done[:-1] for i in row_ids], None

    monkeypatch.setattr(kernels, "rollout", rollout)
    jobs = [([{"role": "user", "content": "bread"}], t) for t in (0.5, 0.8, 1.1, 0.5)]
    texts = reward.sample(chat, tokenizer, jobs, 0, 12)
    assert texts == ["", "here it is", "", "here it is"]


def test_every_flag_is_read_and_explained():
    source = Path(reward.__file__).read_text()
    for name in Config.__dataclass_fields__:
        assert f"cfg.{name}" in source or name in stage.FREE_FLAGS, name
        assert stage._field_comments(Config)[name], name
