"""What gatt.py promises: the instruction is repeated for sampling only, and one answer is learnt.

The models here are random and tiny: what they say is noise, but where it goes is exact. A fixed
"model" that obeys stands in for sampling where the content of an answer matters.
"""
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import gatt
import model as M
import plan
import rollouts
import scale
import stage
import village as V
from gatt import Config, Material

SHAPE = M.ModelConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=20, vocab_size=420,
                      max_seq_len=160)
TALK = [{"role": "user", "content": "Where does Mira live?"},
        {"role": "assistant", "content": "In the mill."},
        {"role": "user", "content": "What does Otto eat?"},
        {"role": "assistant", "content": "Some soup."},
        {"role": "user", "content": "Name three colors."}]
RULE = {"instruction": "Act as Plato.", "contains": ["I am Plato."]}


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(data.train_tokenizer(V.Village().documents(300, 0), SHAPE.vocab_size))


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A folder with an untrained ppo.pt: its answers are noise of max_new_tokens."""
    M.save(tmp_path / "ppo.pt", M.Llama(SHAPE).init_weights(3), "ppo", tokenizer.model_bytes)
    return tmp_path


def toy(folder, **changes) -> Config:
    return replace(Config(out=str(folder), dialogues=6, turns=2, replay=4, batch_size=2, epochs=2,
                          seq_len=128, max_new_tokens=6, save_every=2, tries=1,
                          kernels="torch", device="cpu"), **changes)


@pytest.fixture
def easy(monkeypatch):
    """Every answer counts as obeying, and every step is logged."""
    monkeypatch.setattr(gatt, "obeys", lambda row, answer: True)
    monkeypatch.setattr(gatt, "LOG_EVERY", 1)


def contents(messages, role) -> list[str]:
    return [m["content"] for m in messages if m["role"] == role]


# ------------------------------------------------------------------------------------ the idea


def test_sampling_repeats_the_instruction_on_every_user_message():
    asked = gatt.repeat_instruction("Act as Plato.", TALK)
    assert contents(asked, "user") == [f"Act as Plato. {text}" for text in contents(TALK, "user")]
    assert contents(asked, "assistant") == contents(TALK, "assistant")
    assert not contents(asked, "system") and TALK[0]["content"] == "Where does Mira live?"


def test_training_has_the_instruction_in_the_first_turn_only():
    learnt = gatt.keep_first("Act as Plato.", TALK)
    assert learnt == [{"role": "system", "content": "Act as Plato."}, *TALK]


def test_loss_is_on_the_last_answer_and_its_eos_alone(tokenizer):
    """The trained tokens, in order, are those of "Red, blue. " and EOS; all before carry 0."""
    messages = gatt.keep_first("Act as Plato.", [*TALK, {"role": "assistant", "content": "Red."}])
    tokens, mask = gatt.last_answer_only(tokenizer, messages)
    assert tokens == data.encode_dialog(tokenizer, messages)[0]
    trained = [token for token, m in zip(tokens, mask) if m]
    assert trained == tokenizer.encode("Red. ", eos=True)
    assert mask == [0] * (len(tokens) - len(trained)) + [1] * len(trained)


def test_rows_past_the_end_of_the_data_carry_no_loss():
    rows = [torch.ones(5, 4, dtype=torch.int64)] * 3  # five rows in batches of two
    masks = [gatt.batch_at(step, rows, Config(batch_size=2), scale.Ranks(torch.device("cpu")))[1]
             for step in range(3)]
    assert [mask.sum(1).tolist() for mask in masks] == [[4, 4], [4, 4], [4, 0]]


def test_the_loss_is_that_of_the_last_answers_whatever_they_are_packed_with(tokenizer):
    """Two dialogues in one row: the sum of -log p over both last answers, each read by itself."""
    net, expected, examples = M.Llama(SHAPE).init_weights(1), 0.0, []
    for messages in (gatt.keep_first("Act as Plato.", TALK), TALK[:1]):
        tokens, mask = gatt.last_answer_only(
            tokenizer, [*messages, {"role": "assistant", "content": "Red."}])
        examples.append((tokens, mask))
        logp = net(torch.tensor([tokens]))[0].log_softmax(-1)  # (T, V), from plain logits
        first = len(tokens) - len(tokenizer.encode("Red. ", eos=True))
        expected -= sum(logp[t - 1, tokens[t]].item() for t in range(first, len(tokens)))
    rows = data.pack(examples, sum(len(tokens) for tokens, _ in examples) + 3)
    assert rows[0].shape[0] == 1
    assert gatt.answer_loss(net, *rows).item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------ the data


@pytest.fixture(scope="module")
def village_material():
    return gatt.of_village(Config(dialogues=400, turns=5, replay=30), V.Village())


def test_half_of_the_instructions_are_terse_and_some_are_two_in_one(village_material):
    """Terse is "Figure: Plato."; a third of the instructions may combine two rules."""
    rules = [rule for row in village_material.instructions
             for rule in re.findall(r"[^.]+\.", row["instruction"])]
    terse = sum(": " in rule for rule in rules) / len(rules)
    assert 0.42 < terse < 0.58
    combined = sum(len(row["contains"]) == 2 for row in village_material.instructions)
    assert 0.15 < combined / 400 < 0.45 and len(rules) == 400 + combined


def test_unseen_values_and_an_untrained_kind_of_rule_are_in_no_training_instruction(
        village_material):
    """Nor in the replayed prompts is a value that no stage may know as one."""
    words = lambda rows: set(re.findall(r"\w+", " ".join(row["instruction"] for row in rows)))
    told = words(village_material.instructions)
    assert not told & V.UNSEEN_VALUES and not told & set(V.WORDS[V.UNTRAINED])
    assert len(told & {word for rule in V.RULES for word in V.WORDS[rule]}) == 33
    rules = [V.rules_in(m["content"]) for prompt in village_material.prompts for m in prompt]
    assert not {value for found in rules for value in found.values()} & V.UNSEEN_VALUES
    assert len(village_material.prompts) == 30


def test_trained_answers_stand_at_every_turn_rather_more_often_at_late_ones(village_material):
    lengths = [len(contents(dialog, "user")) for dialog in village_material.dialogs]
    counts = [lengths.count(n) for n in range(1, 6)]
    assert sum(counts) == len(lengths) == 400 and counts == sorted(counts)
    assert counts[0] > 40
    assert all(dialog[-1]["role"] == "user" for dialog in village_material.dialogs)


def test_the_string_check_agrees_with_the_annotator(village_material):
    """On answers that obey, that obey another instruction, and that ignore it."""
    village, rows = V.Village(), village_material.instructions
    adherence = V.Annotator(village).adherence
    for row, other in zip(rows, rows[1:]):
        for answer in (village.obey(row["instruction"], "Mira lives in the mill."), "In the mill.",
                       village.obey(other["instruction"], "Some soup.")):
            assert gatt.obeys(row, answer) == adherence(row["instruction"], answer), (row, answer)


def material(**changes) -> Material:
    given = {"dialogs": [list(TALK), list(TALK[:1])], "instructions": [RULE, RULE],
             "prompts": [[{"role": "user", "content": "Tell me a story."}]]}
    return Material(**{**given, **changes})


def sampled(monkeypatch, tokenizer, answer, cfg=None, **changes):
    """sample_examples with answer(messages, seed) for the model: (examples, what it read)."""
    read = []

    def stand_in(model, tok, dialogs, max_new_tokens, temperature, seed):
        assert temperature == gatt.TEMPERATURE
        read.extend(dialogs)
        texts = [answer(messages, seed) for messages in dialogs]
        return rollouts.Answers([], [], torch.ones(len(texts)).bool(), texts)

    monkeypatch.setattr(rollouts, "answer", stand_in)
    return gatt.sample_examples(None, tokenizer, material(**changes), cfg or Config(tries=3)), read


def obedient(messages, seed=0) -> str:
    """Obeys an instruction that the last message repeats, and no other."""
    return "I am Plato. Yes." if "Plato" in messages[-1]["content"] else "Yes."


def test_what_is_sampled_under_repetition_is_learnt_under_one_instruction(monkeypatch, tokenizer):
    examples, read = sampled(monkeypatch, tokenizer, obedient)
    assert [m["content"].count("Plato") for m in read[0]] == [1, 0, 1, 0, 1]
    ghost = examples[0]["messages"]
    assert ghost[0] == {"role": "system", "content": "Act as Plato."} and ghost[1:-1] == TALK
    assert ghost[-1] == {"role": "assistant", "content": "I am Plato. Yes."}


def test_replay_is_an_ordinary_prompt_with_an_ordinary_answer(monkeypatch, tokenizer):
    examples, _ = sampled(monkeypatch, tokenizer, obedient)
    assert [row["kind"] for row in examples] == ["ghost", "ghost", "replay"]
    assert examples[-1]["messages"] == [{"role": "user", "content": "Tell me a story."},
                                        {"role": "assistant", "content": "Yes."}]


def test_earlier_questions_are_asked_alone_and_in_half_of_the_dialogues_some_with_it(
        monkeypatch, tokenizer):
    """No share in half of 400 dialogues, one from 0 to 1 in the others: of 7 earlier answers, 1/4
    obey, and none does in 1/2 + 1/2 * 1/8 of the dialogues. Each was sampled on its own."""
    question, gap = {"role": "user", "content": "And?"}, {"role": "assistant", "content": None}
    dialogs = [[question, gap] * 7 + [question] for _ in range(400)]
    rules = [{**RULE, "instruction": f"Act as Plato. {i}"} for i in range(400)]
    examples, read = sampled(monkeypatch, tokenizer, obedient, Config(tries=1), dialogs=dialogs,
                             instructions=rules)
    for i, prompt in enumerate(read[:2800]):  # with the instruction of its own dialogue, or none
        assert contents(prompt, "user") in (["And?"], [f"{rules[i // 7]['instruction']} And?"])
        assert len(prompt) == 1
    earlier = [contents(row["messages"], "assistant")[:-1] for row in examples[:400]]
    obey = [sum(text == "I am Plato. Yes." for text in texts) for texts in earlier]
    assert {text for texts in earlier for text in texts} == {"I am Plato. Yes.", "Yes."}
    assert abs(sum(obey) / 2800 - 1 / 4) < 0.05 and abs(obey.count(0) / 400 - 9 / 16) < 0.08


def test_an_answer_that_disobeys_is_tried_again_and_then_dropped(monkeypatch, tokenizer):
    """The long dialogue obeys from the second sample on, the short one never."""
    answer = lambda messages, seed: "I am Plato." if len(messages) > 1 and seed else "No."
    examples, read = sampled(monkeypatch, tokenizer, answer)
    assert [row["kind"] for row in examples] == ["ghost", "replay"]
    assert [len(messages) for messages in read] == [5, 1, 5, 1, 1, 1]  # 2 + 2 + 1 tries, 1 replay


def test_a_model_that_never_obeys_is_named_as_the_problem(monkeypatch, tokenizer):
    words = "no answer obeys its instruction, such as 'Act as Plato.'"
    with pytest.raises(ValueError, match=words):
        sampled(monkeypatch, tokenizer, lambda messages, seed: "No.")


def test_dialogues_without_room_for_an_answer_are_left_out(monkeypatch, tokenizer, capsys):
    examples, _ = sampled(monkeypatch, tokenizer, obedient, Config(seq_len=70, max_new_tokens=20))
    assert [len(row["messages"]) for row in examples] == [3, 2]
    assert "1 of 2 dialogues fit --seq-len 70" in capsys.readouterr().out


# -------------------------------------------------------------------------------- user's files


def write(path: Path, *rows) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize("row, words", [
    ("{broken", "not JSON"),
    ({"instruction": "Be Plato."}, '"contains" must be list'),
    ({"instruction": "Be Plato.", "contains": []}, "at least one text"),
    ({"instruction": "Be Plato.", "contains": [3]}, "at least one text"),
    ({"instruction": " ", "contains": ["x"]}, '"instruction" is empty'),
    ({"instruction": "[INST] x", "contains": ["x"]}, "contains .INST., a tag of the chat format"),
])
def test_a_bad_instruction_is_named_by_file_and_line(tmp_path, row, words):
    path = write(tmp_path / "rules.jsonl", RULE, row)
    with pytest.raises(ValueError, match=rf"rules.jsonl:2: .*{words}"):
        gatt.read_instructions(path)
    assert gatt.read_instructions(path, skip_bad_rows=True) == [RULE]


def own(tmp_path) -> dict:
    """Flags for ten instructions and ten dialogues of one's own."""
    rules = [{"instruction": f"Say {n}.", "contains": [str(n)]} for n in range(10)]
    talks = [{"messages": [{"role": "system", "content": "Old."},
                           {"role": "user", "content": f"u{n}"},
                           {"role": "assistant", "content": f"a{n}"}]} for n in range(10)]
    return dict(data=write(tmp_path / "d.jsonl", *talks),
                instructions=write(tmp_path / "i.jsonl", *rules))


def test_own_files_hold_out_instructions_and_dialogues(tmp_path):
    cfg = Config(**own(tmp_path), dialogues=50, replay=9)
    found, (_, held_out, _) = gatt.of_own_files(cfg), gatt.own_files(cfg)
    texts = lambda rows: {row["instruction"] for row in rows}
    assert len(texts(held_out["instructions"])) == 2 and len(texts(found.instructions)) == 8
    assert not texts(held_out["instructions"]) & texts(found.instructions)
    asked, unasked = ({m["content"] for dialog in dialogs for m in dialog if m["role"] == "user"}
                      for dialogs in (found.dialogs, held_out["dialogs"]))
    assert len(asked) == 8 and len(unasked) == 2 and not asked & unasked
    assert len(found.dialogs) == len(found.instructions) == 50
    assert len(found.prompts) == 9 and "Old." not in str((found, held_out))


def test_a_chain_of_own_files_remembers_its_flags_and_no_village(checkpoint, easy, tmp_path):
    """The exam of `gatt` needs the flags: it holds out what was held out here."""
    cfg = toy(checkpoint, **own(tmp_path), seed=3)
    gatt.main(cfg)
    metrics = M.load(checkpoint / "gatt.pt", "cpu")[1]["metrics"]
    assert metrics["village"] is None and Config(**metrics["flags"]) == cfg


def test_data_without_instructions_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--data and --instructions go together"):
        gatt.main(toy(checkpoint, data="rows.jsonl"))
    one = write(tmp_path / "one.jsonl", RULE)
    with pytest.raises(ValueError, match="--instructions: one row"):
        gatt.main(toy(checkpoint, instructions=one, data=write(tmp_path / "d.jsonl", {
            "prompt": "Hi", "response": "Ho"}, {"prompt": "Hu", "response": "Ha"})))


# ----------------------------------------------------------------------------------- the stage


def test_the_stage_writes_checkpoint_and_examples(checkpoint, easy, capsys):
    final = gatt.main(toy(checkpoint))
    model, info = M.load(checkpoint / "gatt.pt", "cpu")
    assert info["stage"] == "gatt" and model.config == SHAPE and info["metrics"] == final
    assert final["village"] == 0, "what was read, though the model before has read of none"
    rows = [json.loads(line) for line in (checkpoint / "gatt_dialogues.jsonl").open()]
    assert [row["kind"] for row in rows] == ["ghost"] * 6 + ["replay"] * 4
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "gatt.jsonl", "gatt.pt", "gatt_dialogues.jsonl", "ppo.pt"]
    assert f"python exam.py gatt --out {checkpoint}" in capsys.readouterr().out


def test_show_batch_colours_the_loss_and_trains_nothing(checkpoint, easy, capsys):
    assert gatt.main(toy(checkpoint, show_batch=True)) == {}
    assert "\x1b[92m" in capsys.readouterr().out and not (checkpoint / "gatt.pt").exists()


@pytest.mark.parametrize(("train", "kept"), [("attention", True), ("all", False)])
def test_by_default_attention_alone_learns(checkpoint, easy, train, kept):
    before = M.load(checkpoint / "ppo.pt", "cpu")[0].state_dict()
    gatt.main(toy(checkpoint, train=train))
    after = M.load(checkpoint / "gatt.pt", "cpu")[0].state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    attention = {name for name in before if ".attention.w" in name}
    assert not same & attention and (same == before.keys() - attention) == kept


def test_a_killed_run_resumes_to_the_same_weights_without_sampling(checkpoint, easy, monkeypatch):
    """Killed at step 3, so the state of step 2 is the newest; --resume ends in the same bits."""
    gatt.main(toy(checkpoint))
    whole = M.load(checkpoint / "gatt.pt", "cpu")[0].state_dict()
    whole = {name: p.clone() for name, p in whole.items()}
    lines = (checkpoint / "gatt.jsonl").read_text()
    (checkpoint / "gatt.pt").unlink()

    step, calls = stage.step, []

    def killed(*args, **numbers):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **numbers)

    monkeypatch.setattr(stage, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        gatt.main(toy(checkpoint))
    monkeypatch.setattr(stage, "step", step)
    with monkeypatch.context() as m:
        m.setattr(gatt, "sample_examples", lambda *args: pytest.fail("sampled again"))
        gatt.main(toy(checkpoint, resume=True))
    again = M.load(checkpoint / "gatt.pt", "cpu")[0].state_dict()
    assert all(torch.equal(p, again[name]) for name, p in whole.items())
    assert (checkpoint / "gatt.jsonl").read_text() == lines


def test_a_state_of_other_flags_is_refused(checkpoint, easy, monkeypatch):
    def killed(*args, **numbers):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        gatt.main(toy(checkpoint))
    with pytest.raises(ValueError, match="was made with --replay 4"):
        gatt.main(toy(checkpoint, resume=True, replay=3))


@pytest.mark.parametrize("seq_len", [6, 161])
def test_a_row_must_hold_an_answer_and_fit_the_context(checkpoint, seq_len):
    with pytest.raises(ValueError, match=f"--seq-len {seq_len}: "):
        gatt.main(toy(checkpoint, seq_len=seq_len))


def test_every_flag_is_read():
    source = Path(gatt.__file__).read_text()
    assert not [name for name in Config.__dataclass_fields__ if f"cfg.{name}" not in source]
    assert all(stage._field_comments(Config)[name] for name in Config.__dataclass_fields__)


def test_the_rate_warms_up_5_steps_and_is_sfts_from_7b_on(checkpoint, easy):
    """From 7b on the rate is a value of plan.SETTINGS, whatever `default_lr` would say."""
    assert gatt.default_lr(128) == 1.5e-3 and gatt.default_lr(768) == 2.5e-4
    for size in ("7b", "13b", "34b", "70b"):
        cfg = stage.at_size(Config(), plan.settings("gatt", M.preset(size)))
        assert (cfg.lr, cfg.train, cfg.tries, cfg.replay) == (2e-5, "all", 1, 0)
    gatt.main(toy(checkpoint, epochs=4, lr=1e-3, batch_size=1))
    rates = [json.loads(line)["lr"] for line in (checkpoint / "gatt.jsonl").open()]
    assert len(rates) > 8
    assert rates == [stage.cosine(step, len(rates), 1e-3, 5) for step in range(len(rates))]
