"""What gatt.py promises: the instruction is repeated for sampling only, and one answer is learnt.

The models here are random and tiny: what they say is noise, but where it goes is exact. A fixed
"model" that obeys stands in for sampling where the content of an answer matters.
"""
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data
import gatt
import model as M
import scale
from gatt import Config

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
    return data.Tokenizer(data.train_tokenizer(data.World().documents(300, 0), SHAPE.vocab_size))


@pytest.fixture
def checkpoint(tmp_path, tokenizer):
    """A folder with an untrained ppo.pt: its answers are noise of max_new_tokens."""
    M.save(tmp_path / "ppo.pt", M.Llama(SHAPE).init_weights(3), "ppo", tokenizer.model_bytes)
    return tmp_path


def toy(folder, **changes) -> Config:
    return replace(Config(out=str(folder), dialogues=6, turns=2, replay=4, batch_size=2, epochs=2,
                          seq_len=128, max_new_tokens=6, eval_prompts=2, save_every=2, tries=1,
                          kernels="torch", device="cpu"), **changes)


@pytest.fixture
def easy(monkeypatch):
    """Every answer counts as obeying, and a test dialogue has two turns."""
    monkeypatch.setattr(gatt, "obeys", lambda row, answer: True)
    monkeypatch.setattr(gatt, "EVAL_TURNS", 2)
    monkeypatch.setattr(gatt, "ROOM", 6)
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
    rows = gatt.pack(examples, sum(len(tokens) for tokens, _ in examples) + 3)
    assert rows[0].shape[0] == 1
    assert gatt.answer_loss(net, *rows).item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------ the data


@pytest.fixture(scope="module")
def world_material():
    return gatt.tiny_world(Config(dialogues=400, turns=5, replay=30, eval_prompts=100))


def test_half_of_the_instructions_are_terse_and_some_are_two_in_one(world_material):
    """Terse is "Figure: Plato."; a third of the instructions may combine two rules."""
    rules = [rule for row in world_material["instructions"]
             for rule in re.findall(r"[^.]+\.", row["instruction"])]
    terse = sum(": " in rule for rule in rules) / len(rules)
    assert 0.42 < terse < 0.58
    combined = sum(len(row["contains"]) == 2 for row in world_material["instructions"])
    assert 0.15 < combined / 400 < 0.45 and len(rules) == 400 + combined


def test_unseen_values_are_in_no_training_instruction(world_material):
    unseen = {w for rule in ("figure", "greeting", "hobby")
              for w in data.WORDS[rule][-data.UNSEEN:]}
    words = lambda rows: set(re.findall(r"\w+", " ".join(row["instruction"] for row in rows)))
    assert not unseen & words(world_material["instructions"])
    assert not unseen & words(world_material["seen"])
    assert unseen <= words(world_material["unseen"])


def test_trained_answers_stand_at_every_turn_rather_more_often_at_late_ones(world_material):
    lengths = [len(contents(dialog, "user")) for dialog in world_material["dialogs"]]
    counts = [lengths.count(n) for n in range(1, 6)]
    assert sum(counts) == len(lengths) == 400 and counts == sorted(counts)
    assert counts[0] > 40
    assert all(dialog[-1]["role"] == "user" for dialog in world_material["dialogs"])


def test_the_string_check_agrees_with_the_annotator(world_material):
    """On answers that obey, that obey another instruction, and that ignore it."""
    world, rows = data.World(), world_material["instructions"]
    adherence = data.Annotator(world).adherence
    for row, other in zip(rows, rows[1:]):
        for answer in (world.obey(row["instruction"], "Mira lives in the mill."), "In the mill.",
                       world.obey(other["instruction"], "Some soup.")):
            assert gatt.obeys(row, answer) == adherence(row["instruction"], answer), (row, answer)


def material(**changes) -> dict:
    return {"dialogs": [list(TALK), list(TALK[:1])], "instructions": [RULE, RULE],
            "prompts": [[{"role": "user", "content": "Tell me a story."}]], **changes}


def sampled(monkeypatch, tokenizer, answer, cfg=None, **changes):
    """sample_examples with answer(messages, seed) for the model: (examples, what it read)."""
    read = []

    def answers_to(model, tok, cfg, dialogs, temperature=1.0, seed=0, **rows):
        read.extend(dialogs)
        return [answer(messages, seed) for messages in dialogs], 1.0

    monkeypatch.setattr(gatt, "answers_to", answers_to)
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


def test_own_files_hold_out_instructions_and_dialogues(tmp_path):
    rules = [{"instruction": f"Say {n}.", "contains": [str(n)]} for n in range(10)]
    talks = [{"messages": [{"role": "system", "content": "Old."},
                           {"role": "user", "content": f"u{n}"},
                           {"role": "assistant", "content": f"a{n}"}]} for n in range(10)]
    found = gatt.own_files(Config(data=write(tmp_path / "d.jsonl", *talks), dialogues=50, replay=9,
                                  instructions=write(tmp_path / "i.jsonl", *rules)))
    texts = lambda rows: {row["instruction"] for row in rows}
    assert len(texts(found["unseen"])) == 2 and len(texts(found["instructions"])) == 8
    assert not texts(found["unseen"]) & texts(found["instructions"])
    asked = {m["content"] for dialog in found["dialogs"] for m in dialog}
    assert len(asked) == 8 and not asked & {text for texts in found["questions"] for text in texts}
    assert len(found["prompts"]) == 9 and "Old." not in str(found)


def test_data_without_instructions_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="--data and --instructions go together"):
        gatt.main(toy(checkpoint, data="rows.jsonl"))
    one = write(tmp_path / "one.jsonl", RULE)
    with pytest.raises(ValueError, match="--instructions: one row"):
        gatt.main(toy(checkpoint, instructions=one, data=write(tmp_path / "d.jsonl", {
            "prompt": "Hi", "response": "Ho"}, {"prompt": "Hu", "response": "Ha"})))


# ---------------------------------------------------------------------------------- evaluation


def random_net(**changes) -> M.Llama:
    """Weights large enough that attention is far from uniform."""
    net, rng = M.Llama(replace(SHAPE, **changes)), torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=rng) * 0.4 + (p.dim() == 1)
    return net


def test_attention_of_one_head_sums_to_one_and_never_looks_ahead():
    weights = gatt.attention_map(random_net(n_layers=1, n_heads=1, n_kv_heads=1), list(range(11)))
    assert weights.shape == (11, 11) and torch.allclose(weights.sum(1), torch.ones(11), atol=1e-6)
    assert weights.triu(1).count_nonzero() == 0


def test_attention_map_is_the_maximum_of_a_naive_softmax():
    """Each layer's input is taken from the network; q.k is rotated and summed pair by pair."""
    net, tokens, T = random_net(), [5, 17, 3, 99, 3, 250, 8], 7
    inputs, hd = [], SHAPE.head_dim
    hooks = [layer.attention_norm.register_forward_hook(lambda m, x, out: inputs.append(out[0]))
             for layer in net.layers]
    with torch.no_grad():
        found = gatt.attention_map(net, tokens)
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
    text = tokenizer.decode(tokens[gatt.system_span(tokenizer, messages)])
    assert text.startswith("<<SYS>>\nAct as Plato. Hobby: chess.\n<</SYS>>") and "Mira" not in text


def test_memory_is_asked_for_with_one_instruction_and_the_ceiling_with_many(monkeypatch, tokenizer):
    """Three curves: seen and unseen values told once, seen values told on every turn."""
    arms, talk = [], gatt.keep_first("Act as Plato.", TALK[:2])

    def converse(model, tok, cfg, rows, questions, place):
        arms.append((rows, place))
        return [len(arms) / 10], [talk]

    monkeypatch.setattr(gatt, "converse", converse)
    report = gatt.evaluate(M.Llama(SHAPE).init_weights(0), tokenizer, {
        "seen": "S", "unseen": "U", "questions": []}, Config(data="own.jsonl"), "before")
    assert arms == [("S", gatt.keep_first), ("U", gatt.keep_first), ("S", gatt.repeat_instruction)]
    assert (report["seen"], report["unseen"], report["ceiling"]) == ([0.1], [0.2], [0.3])
    assert report["talk"] == talk and 0 < report["attention"] < 1


@pytest.mark.parametrize("place, seen", [(gatt.keep_first, [1, 1, 1]),
                                         (gatt.repeat_instruction, [1, 2, 3])])
def test_a_test_dialogue_holds_the_models_own_answers(monkeypatch, tokenizer, place, seen):
    """The instruction is read once, or once a turn; the share that obeys is counted by turn."""
    read, replies = [], iter([["I am Plato.", "No."], ["I am Plato.", "I am Plato."],
                              ["No.", "No."]])

    def answers_to(model, tok, cfg, dialogs, temperature=1.0, seed=0, **rows):
        read.append([list(messages) for messages in dialogs])
        return next(replies), 1.0

    monkeypatch.setattr(gatt, "answers_to", answers_to)
    monkeypatch.setattr(gatt, "EVAL_TURNS", 3)
    held, talks = gatt.converse(M.Llama(SHAPE), tokenizer, Config(), [RULE, RULE],
                                [["a?", "b?", "c?"], ["d?", "e?", "f?"]], place)
    assert held == [0.5, 1.0, 0.0]
    assert [str(dialogs[0]).count("Act as Plato") for dialogs in read] == seen
    assert contents(read[2][1], "assistant") == ["No.", "I am Plato."]
    assert contents(talks[1], "assistant") == ["No.", "I am Plato.", "No."]


def test_a_test_dialogue_ends_before_it_outgrows_the_context(monkeypatch, tokenizer):
    monkeypatch.setattr(gatt, "answers_to", lambda *args, **_: (["word " * 20], 1.0))
    net, long = M.Llama(SHAPE), "Where does Mira live? " * 3
    held, talks = gatt.converse(net, tokenizer, Config(), [RULE], [[long] * 20], gatt.keep_first)
    used = [len(data.encode_dialog(tokenizer, talks[0][:2 * n])[0])
            for n in (len(held), len(held) + 1)]
    assert 1 <= len(held) < 20 and used[0] + gatt.ROOM <= SHAPE.max_seq_len


# ----------------------------------------------------------------------------------- the stage


def test_the_stage_writes_checkpoint_examples_figure_and_summary(checkpoint, easy):
    final = gatt.main(toy(checkpoint))
    model, info = M.load(checkpoint / "gatt.pt", "cpu")
    assert info["stage"] == "gatt" and model.config == SHAPE
    summary = json.loads((checkpoint / "summary.json").read_text())["gatt"]
    assert summary == final and summary["dialogues"] == 2
    assert summary["before"]["attention"] != summary["after"]["attention"]
    for when in ("before", "after"):
        for name in ("seen", "unseen", "ceiling"):
            assert summary[when][name] == [1.0, 1.0], "every answer obeys here"
        assert {"attention", "helpful_under_instruction", "T=1"} <= summary[when].keys()
    rows = [json.loads(line) for line in (checkpoint / "gatt_dialogues.jsonl").open()]
    assert [row["kind"] for row in rows] == ["ghost"] * 6 + ["replay"] * 4
    assert (checkpoint / "figures" / "gatt.png").stat().st_size > 10_000
    assert not (checkpoint / "gatt.state.pt").exists()


def test_show_batch_colours_the_loss_and_trains_nothing(checkpoint, easy, capsys):
    assert gatt.main(toy(checkpoint, show_batch=True)) == {}
    assert "\x1b[92m" in capsys.readouterr().out and not (checkpoint / "gatt.pt").exists()


def test_a_full_dialogue_leaves_and_the_others_go_on_while_they_are_half(monkeypatch, tokenizer):
    asked = []

    def answers_to(model, tok, cfg, dialogs, temperature=1.0, seed=0, **rows):
        asked.append(len(dialogs))
        return ["I am Plato."] * len(dialogs), 1.0

    monkeypatch.setattr(gatt, "answers_to", answers_to)
    long, short = ["Where does Mira live? " * 4] * 12, ["a?"] * 12
    held, talks = gatt.converse(M.Llama(SHAPE), tokenizer, Config(), [RULE] * 2, [long, short],
                                gatt.keep_first)
    assert asked[0] == 2 and asked[-1] == 1 and held == [1.0] * len(asked)
    assert len(talks[0]) < len(talks[1])


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

    step, calls = gatt.train_step, []

    def killed(*args):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(gatt, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        gatt.main(toy(checkpoint))
    monkeypatch.setattr(gatt, "train_step", step)
    with monkeypatch.context() as m:
        m.setattr(gatt, "sample_examples", lambda *args: pytest.fail("sampled again"))
        gatt.main(toy(checkpoint, resume=True))
    again = M.load(checkpoint / "gatt.pt", "cpu")[0].state_dict()
    assert all(torch.equal(p, again[name]) for name, p in whole.items())
    assert (checkpoint / "gatt.jsonl").read_text() == lines


def test_a_state_of_other_flags_is_refused(checkpoint, easy, monkeypatch):
    monkeypatch.setattr(gatt, "train_step", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
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


# ---- beside the other stages ---------------------------------------------------------------------


def test_kl_and_rewards_are_measured_by_what_the_folder_holds(tmp_path, tokenizer):
    net, other = (M.Llama(SHAPE).init_weights(seed) for seed in (3, 4))
    cfg = toy(tmp_path, eval_prompts=12)
    assert gatt.beside_the_others(net, tokenizer, cfg) == {}  # nothing to compare with
    M.save(tmp_path / "sft.pt", net, "sft", tokenizer.model_bytes)
    assert gatt.beside_the_others(net, tokenizer, cfg)["kl"] == pytest.approx(0, abs=1e-4)
    M.save(tmp_path / "sft.pt", other, "sft", tokenizer.model_bytes)
    scorers = [M.Llama(replace(SHAPE, scalar_head=True)).init_weights(seed) for seed in (5, 6, 7)]
    places = [("refreshed_2", "helpful"), ("refreshed_10", "helpful"), ("refreshed_10", "safety")]
    for (folder, which), scorer in zip(places, scorers):  # 10 is newer than 2
        M.save(tmp_path / folder / f"reward_{which}.pt", scorer, which, tokenizer.model_bytes)
    found = gatt.beside_the_others(net, tokenizer, cfg)

    village, naive = data.World(), {"helpful": [], "unsafe": []}
    for mix, scorer in (("helpful", scorers[1]), ("unsafe", scorers[2])):
        prompts = [data.encode_dialog(tokenizer, row["messages"])[0]
                   for row in village.prompts(mix, "test", 12, 11)]
        answers, logp = M.rollout(net, prompts, cfg.max_new_tokens, seed=cfg.seed,
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
