"""What rollouts.py promises: answers that do not depend on neighbours, and the paper's score.

The toy is that of toy.py: its answers are nonsense of all lengths, some of them cut.
"""
import json

import pytest
import torch

import data
import kernels
import model as M
import rollouts
import scale
import toy
import village as V
from kernels import build
from rollouts import Answers, combine

ALONE = scale.Ranks(torch.device("cpu"))
try:
    build.load_library()
    COMPILED = ""
except OSError as e:
    COMPILED = str(e)
needs_c = pytest.mark.skipif(bool(COMPILED), reason=COMPILED)
PATHS = [pytest.param("float32", marks=needs_c), pytest.param("bfloat16", marks=needs_c), "torch"]


@pytest.fixture(scope="module")
def village() -> V.Village:
    return toy.village()


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return toy.tokenizer()


@pytest.fixture(params=PATHS)
def path(request):
    """PyTorch, or C with either kind of products; PyTorch again afterwards."""
    if request.param == "torch":
        kernels.choose("torch")
    else:
        kernels.choose("c", products=request.param)
    yield request.param
    kernels.choose("torch")


def said(tokenizer, *responses: list[int]) -> Answers:
    """Answers of these tokens to the empty prompt."""
    finished = torch.tensor([response[-1] == tokenizer.eos_id for response in responses])
    texts = [tokenizer.decode(response).strip() for response in responses]
    return Answers([[1]] * len(responses), list(responses), finished, texts)


# ------------------------------------------------------------------------------------- prompts


def test_a_share_of_the_prompts_comes_with_an_instruction(village):
    rows = rollouts.draw_prompts(None, village, 300, 1)
    told = sum(any(V.rules_in(m["content"]) for m in row["messages"]) for row in rows)
    assert len(rows) == 300 and 0.12 < told / 300 < 0.28


def test_a_third_of_the_prompts_lies_at_the_border_with_more_look_alikes_than_unsafe_ones(village):
    """With the other two thirds, from the mix of all: 24% unsafe, 26% edge."""
    rows = rollouts.draw_prompts(None, village, 1200, 2)
    for kind, share in V.MIXES["border"].items():
        found = sum(row["kind"] == kind for row in rows) / 1200
        assert found == pytest.approx(share / 3 + 2 / 3 * V.DEMONSTRATIONS[kind], abs=.04)
    assert V.MIXES["border"]["edge"] > V.MIXES["border"]["unsafe"]


def test_a_tenth_of_a_users_prompts_is_held_out_and_never_trained_on(tmp_path, village):
    rows = [{"prompt": f"Tell me {i} things.", "is_safety": i % 3 == 0} for i in range(20)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = rollouts.own_prompts(str(path))
    assert not [row for row in parts["valid"] if row in parts["train"]] and len(parts["valid"]) == 2
    for split, part in parts.items():
        drawn = rollouts.draw_prompts(str(path), village, 50, 3, split)
        assert len(drawn) == 50 and all(row in part for row in drawn)


def test_each_purpose_has_a_seed_of_its_own_that_no_other_draw_moves():
    """crc32 of the text "(3, 'ppo', 7)": known on every machine, in every process."""
    seeds = {rollouts.seed_of(3, "ppo", i) for i in range(100)}
    assert len(seeds) == 100 and rollouts.seed_of(3, "ppo", 7) in seeds
    assert rollouts.seed_of(3, "ppo", 7) == 1787996762
    assert rollouts.seed_of(4, "ppo", 7) not in seeds


# ------------------------------------------------------------------------------------- answers


def test_an_answer_is_the_same_alone_in_a_batch_and_in_any_chunk(path, tokenizer, village):
    """Rows draw by their ids: 9 dialogues of different lengths at once, by twos, and one by one."""
    model = toy.network(1)
    dialogs = [row["messages"] for row in rollouts.draw_prompts(None, village, 9, 4)]
    whole = rollouts.answer(model, tokenizer, dialogs, 12, 1.0, 5)
    assert len({len(response) for response in whole.responses}) > 2
    for rows_at_once in (2, 8):
        chunked = rollouts.answer(model, tokenizer, dialogs, 12, 1.0, 5, rows_at_once=rows_at_once)
        assert chunked.responses == whole.responses and chunked.texts == whole.texts
        assert torch.equal(chunked.finished, whole.finished)
    for i, dialog in enumerate(dialogs):
        alone = rollouts.answer(model, tokenizer, [dialog], 12, 1.0, 5, row_ids=[i])
        assert alone.responses == whole.responses[i:i + 1]
        assert alone.prompts == whole.prompts[i:i + 1]
    other = rollouts.answer(model, tokenizer, dialogs[:1], 12, 1.0, 5, row_ids=[3])
    assert other.responses != whole.responses[:1]


def test_with_a_memory_more_rows_than_a_chunk_are_answered(path, tokenizer, village):
    """A memory knows the rows of its first rollout, and would refuse those of a second chunk."""
    model = toy.network(1)
    dialogs = [row["messages"] for row in rollouts.draw_prompts(None, village, 5, 4)]
    plain = rollouts.answer(model, tokenizer, dialogs, 6, 1.0, 5)
    memory = kernels.Memory()
    for _ in range(2):  # the second time from what it remembers
        found = rollouts.answer(model, tokenizer, dialogs, 6, 1.0, 5, memory=memory,
                                rows_at_once=2)
        assert found.responses == plain.responses


def test_answers_say_which_of_them_ended_and_what_they_say(tokenizer):
    model = toy.network(1)
    dialogs = [[{"role": "user", "content": f"Name {i} things."}] for i in range(12)]
    found = rollouts.answer(model, tokenizer, dialogs, 3, 1.0, 0)
    for i, response in enumerate(found.responses):
        assert found.prompts[i] == data.encode_dialog(tokenizer, dialogs[i])[0]
        assert found.finished[i] == (response[-1] == tokenizer.eos_id)
        assert found.finished[i] or len(response) == 3  # cut
        assert found.texts[i] == tokenizer.decode(response).strip()
    assert found.finished.dtype == torch.bool and 0 < found.finished.sum() < 12
    assert found.eos_rate == pytest.approx(found.finished.sum().item() / 12)


# --------------------------------------------------------------------- padding, log-probabilities


def test_the_mask_covers_exactly_the_response():
    """Prompts of 3 and 1 tokens, responses of 2 and 3: position t predicts token t + 1."""
    tokens, lengths, mask = rollouts.pad_answers([[5, 6, 7], [5]], [[8, 2], [9, 9, 9]], "cpu")
    assert tokens.tolist() == [[5, 6, 7, 8, 2], [5, 9, 9, 9, 0]] and lengths.tolist() == [5, 4]
    assert mask.int().tolist() == [[0, 0, 1, 1], [1, 1, 1, 0]]
    assert [tokens[row, 1:][mask[row]].tolist() for row in (0, 1)] == [[8, 2], [9, 9, 9]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_training_forward_agree(tokenizer, temperature):
    policy, prompts = toy.network(1), [[1, 9, 30, 12], [1, 7]]
    responses, sampled = kernels.rollout(policy, prompts, 6, temperature=temperature, seed=3,
                                         stop=tokenizer.eos_id)
    batch = rollouts.pad_answers(prompts, responses, "cpu")
    logp = rollouts.response_logprobs(policy, *batch, temperature)
    for row, expected in enumerate(sampled):
        assert logp[row][batch[2][row]].tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_changes_no_log_probability_and_no_score():
    policy, reward_model = toy.network(1), toy.network(2, True)
    prompts, responses = [[1, 9, 30], [1, 7, 5, 4, 3, 3]], [[8, 2], [6, 5, 4, 4, 2]]
    together = rollouts.pad_answers(prompts, responses, "cpu")
    dirty = together[0].masked_fill(torch.arange(11) >= together[1][:, None], 17)  # other padding
    for row in range(2):
        alone = rollouts.pad_answers(prompts[row:row + 1], responses[row:row + 1], "cpu")
        mask = alone[2][0]
        expected = rollouts.response_logprobs(policy, *alone, 0.8)[0][mask]
        for tokens in (together[0], dirty):
            found = rollouts.response_logprobs(policy, tokens, *together[1:], 0.8)[row]
            assert torch.allclose(found[:len(mask)][mask], expected, atol=1e-6)
        assert not together[2][row, len(mask):].any()
    whole = [p + r for p, r in zip(prompts, responses)]
    assert torch.allclose(rollouts.scores(reward_model, whole), torch.cat(
        [rollouts.scores(reward_model, [row]) for row in whole]), atol=1e-6)
    assert torch.allclose(rollouts.end_scores(reward_model, dirty, together[1]),
                          rollouts.end_scores(reward_model, *together[:2]), atol=1e-6)


# ---------------------------------------------------------------------------------- the reward


def test_scores_come_back_in_the_order_of_the_rows():
    """They are computed shortest first, two rows at once."""
    reward_model = toy.network(2, True)
    rows = [[1, 5, 6, 7, 2], [1, 2], [1, 9, 8, 2], [1, 4, 2], [1, 30, 31, 32, 33, 2]]
    found = rollouts.scores(reward_model, rows, rows_at_once=2)
    expected = [rollouts.scores(reward_model, [row]).item() for row in rows]
    assert found.tolist() == pytest.approx(expected, abs=1e-6) and len(set(expected)) == 5


@pytest.mark.parametrize("tag, r_s, r_h, expected", [
    (True, 0.90, 0.20, 0.90), (False, 0.90, 0.20, 0.20), (False, 0.10, 0.95, 0.10),
    (False, 0.149, 0.95, 0.149), (False, 0.151, 0.95, 0.95)])
def test_the_gate_follows_the_papers_table(tag, r_s, r_h, expected):
    r_h, r_s = (torch.tensor([x]).logit() for x in (r_h, r_s))
    raw = combine(r_h, r_s, torch.tensor([tag]), 0.15)
    assert raw.sigmoid().item() == pytest.approx(expected, abs=1e-6)


def test_a_safety_score_of_exactly_the_threshold_passes_the_gate():
    """sigmoid(0) is exactly .5: strictly below, it would fire."""
    safety, helpful = torch.zeros(1), torch.ones(1)
    assert combine(helpful, safety, torch.tensor([False]), 0.5) == 1
    assert combine(helpful, safety - 1e-3, torch.tensor([False]), 0.5) == -1e-3


def test_scores_too_large_for_a_sigmoid_stay_finite():
    raw = combine(torch.tensor([1.0, 90.0]), torch.tensor([-500.0, 500.0]),
                  torch.tensor([False, True]), 0.15)
    assert raw.tolist() == [-500, 500]


def test_an_answer_without_eos_gets_the_lowest_score():
    got = rollouts.punish_cut(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([False, True, True]))
    assert got.tolist() == [-1, -1, 2]


def test_the_pair_scores_whole_dialogues_and_says_who_decided(tmp_path, tokenizer):
    """Without a threshold the calibrated one counts, .4 in the toy's file; 1 fires everywhere."""
    toy.chain(tmp_path)
    answers = said(tokenizer, [5, 6, 2], [30, 31, 32], [7, 2])
    rows = [{"is_safety": False}, {"is_safety": True}, {"is_safety": False}]
    whole = [p + r for p, r in zip(answers.prompts, answers.responses)]
    helpful, safety = (rollouts.scores(toy.network(seed, True), whole) for seed in (2, 3))
    for given, used in ((0, 0.4), (1e-9, 1e-9), (1 - 1e-6, 1 - 1e-6)):
        found = rollouts.reward_pair(tmp_path, tokenizer, ALONE, given)(rows, answers)
        gate = torch.tensor([False, True, False]) | (safety.sigmoid() < used)
        assert torch.equal(found.helpful, helpful) and torch.equal(found.safety, safety)
        assert torch.equal(found.gate, gate)
        assert torch.equal(found.combined, safety.where(gate, helpful))


def test_missing_or_foreign_reward_models_are_one_line(tmp_path, tokenizer):
    toy.chain(tmp_path)
    other = data.Tokenizer(data.train_tokenizer(V.Village().documents(100, 1), 400))
    scalar = toy.network(1, True)
    M.save(tmp_path / "reward_safety.pt", scalar, "reward_safety", other.model_bytes)
    with pytest.raises(ValueError, match="another tokenizer"):
        rollouts.reward_pair(tmp_path, tokenizer, ALONE)
    toy.save(tmp_path / "reward_safety.pt", scalar)
    with pytest.raises(ValueError, match="--threshold 0.15"):
        rollouts.reward_pair(tmp_path, tokenizer, ALONE)
    rollouts.reward_pair(tmp_path, tokenizer, ALONE, threshold=0.15)
    (tmp_path / "reward_helpful.pt").unlink()
    with pytest.raises(FileNotFoundError, match="python reward.py"):
        rollouts.reward_pair(tmp_path, tokenizer, ALONE)


@pytest.mark.parametrize("ours, theirs, fits", [(4, 5, False), (4, 4, True), (None, 5, True),
                                                (4, None, True)])
def test_reward_models_of_another_village_are_refused_in_one_line(tmp_path, tokenizer, ours,
                                                                  theirs, fits):
    """A model that remembers no village (one's own data) goes with any."""
    toy.chain(tmp_path)
    toy.save_rewards(tmp_path, 2, 3, village=theirs)
    if fits:
        rollouts.reward_pair(tmp_path, tokenizer, ALONE, village=ours)
        return
    with pytest.raises(ValueError, match="reward_helpful.pt was trained in village 5, the model to "
                       "train in village 4: run `python reward.py` again") as error:
        rollouts.reward_pair(tmp_path, tokenizer, ALONE, village=ours)
    assert "\n" not in str(error.value)


def test_prompts_are_drawn_from_the_split_that_is_named_and_test_is_none_of_the_stages(village):
    annotator = V.Annotator(village)
    for split in ("train", "valid"):
        rows = rollouts.draw_prompts(None, village, 60, 5, split)
        asks = [annotator.understand(row["messages"]) for row in rows]
        assert {village.split(ask) for ask in asks} == {split}


# ------------------------------------------------------------------------------ a user's reward


def test_a_users_reward_function_gets_messages_and_texts(tmp_path, tokenizer):
    (tmp_path / "mine.py").write_text(
        "def fn(prompts, responses):\n"
        "    assert prompts[0][0]['content'] == 'Hi' and isinstance(responses[0], str)\n"
        "    return [len(r) for r in responses]\n")
    score = rollouts.own_reward(f"{tmp_path}/mine.py:fn")
    answers = said(tokenizer, tokenizer.encode("a fox", eos=True),
                   tokenizer.encode("the castle", eos=True))
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "is_safety": True}] * 2
    assert score(rows, answers).combined.tolist() == [5, 10]
    assert not score(rows, answers).gate.any()


@pytest.mark.parametrize("spec, message", [
    ("none.py:fn", "existing file"), ("mine.py", "existing file"), ("mine.py:other", "no function"),
    ("mine.py:short", "2 finite scores"), ("mine.py:broken", "2 finite scores"),
    ("mine.py:words", "numbers")])
def test_a_users_reward_function_that_does_not_fit_is_one_line(tmp_path, tokenizer, spec, message):
    (tmp_path / "mine.py").write_text(
        "fn = lambda p, r: [0.] * len(r)\nshort = lambda p, r: [1.]\n"
        "broken = lambda p, r: [1., float('nan')]\nwords = lambda p, r: ['a', 'b']\n")
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "is_safety": False}] * 2
    with pytest.raises(ValueError, match=message) as error:
        rollouts.own_reward(f"{tmp_path}/{spec}")(rows, said(tokenizer, [5, 2], [6, 2]))
    assert "\n" not in str(error.value)
