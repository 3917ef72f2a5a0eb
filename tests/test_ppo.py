"""What ppo.py promises: the paper's reward, exact first steps, fair picks, an exact resume.

The toy has 3,000 words of the tiny world's text behind its tokenizer, 40,000 parameters, and ends
about every fourth token: its answers are nonsense of all lengths, some of them cut.
"""
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import kernels
import model as M
import ppo
import reward
import scale
from ppo import Config, combine, gae, policy_loss, token_rewards, value_loss, whiten

WORLD = scale.World(torch.device("cpu"))


@pytest.fixture(scope="module")
def village() -> data.World:
    return data.World()


@pytest.fixture(scope="module")
def tokenizer(village) -> data.Tokenizer:
    return data.Tokenizer(data.train_tokenizer(village.documents(300, 0), 420))


def network(tokenizer, seed: int, scalar_head=False, ending=1.2) -> M.Llama:
    """2 layers; the first of the 24 features is large everywhere, and calls for EOS."""
    config = M.ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=28,
                           vocab_size=tokenizer.vocab_size, max_seq_len=256,
                           scalar_head=scalar_head)
    model = M.Llama(config).init_weights(seed)
    with torch.no_grad():
        model.tok_embeddings.weight[:, 0] = 0.5
        if not scalar_head:
            model.output.weight.mul_(20)  # answers differ
            model.output.weight[:, 0] = 0
            model.output.weight[tokenizer.eos_id, 0] = ending
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> Path:
    """An output folder in which `python sft.py` and `python reward.py` have been."""
    folder = tmp_path_factory.mktemp("made")
    M.save(folder / "sft.pt", network(tokenizer, 1), "sft", tokenizer.model_bytes)
    for seed, which in ((2, "helpful"), (3, "safety")):
        M.save(folder / f"reward_{which}.pt", network(tokenizer, seed, True), f"reward_{which}",
               tokenizer.model_bytes, {"threshold": 0.4})
    return folder


@pytest.fixture
def folder(tmp_path, made) -> Path:
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def toy(folder, **flags) -> Config:
    quick = dict(rounds=2, prompts=6, samples=3, comparisons=0, rs_lr=1e-2, iterations=2,
                 batch_size=8, minibatch=4, lr=1e-3, beta=0.1, max_new_tokens=6, eval_prompts=2)
    return Config(**{"out": str(folder), "device": "cpu", "kernels": "torch", **quick, **flags})


def places(folder, tokenizer, village, **flags) -> ppo.Places:
    at = ppo.Places(toy(folder, **flags), tokenizer, village, WORLD)
    at.reward = ppo.reward_pair(at.cfg, tokenizer, WORLD, folder)
    return at


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    """48 prompts to choose a temperature are many for a toy."""
    original = ppo.draw_prompts

    def draw(cfg, village, purpose, count, split="train"):
        most = 24 if purpose == "distillation" else 12
        return original(cfg, village, purpose, min(count, most), split)

    monkeypatch.setattr(ppo, "draw_prompts", draw)


# -------------------------------------------------------------------------------- the reward


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


def test_whitening_counts_the_mask_only_and_is_blind_to_scale():
    x, mask = torch.randn(3, 5), torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 0]])
    white = whiten(x, mask)
    real = white[mask.bool()]
    assert real.mean().abs() < 1e-6 and real.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert (white[mask == 0] == 0).all()
    poisoned = torch.where(mask.bool(), x, torch.tensor(1e6))
    assert torch.equal(whiten(poisoned, mask), white)
    assert torch.allclose(whiten(3 * x + 7, mask), white, atol=1e-5)


def test_a_share_of_the_prompts_comes_with_an_instruction(folder, village, monkeypatch):
    monkeypatch.undo()  # of `few_prompts`
    rows = ppo.draw_prompts(toy(folder), village, "share", 300)
    told = sum(any(data.rules_in(m["content"]) for m in row["messages"]) for row in rows)
    assert len(rows) == 300 and 0.12 < told / 300 < 0.28


def test_a_third_of_the_prompts_lies_at_the_border_with_more_look_alikes_than_unsafe_ones(
        folder, village, monkeypatch):
    """With the other two thirds, from the mix of all: 24% unsafe, 26% edge."""
    monkeypatch.undo()
    rows = ppo.draw_prompts(toy(folder), village, "border", 1200)
    for kind, share in data.MIXES["border"].items():
        found = sum(row["kind"] == kind for row in rows) / 1200
        assert found == pytest.approx(share / 3 + 2 / 3 * data.DEMONSTRATIONS[kind], abs=.04)
    assert data.MIXES["border"]["edge"] > data.MIXES["border"]["unsafe"]


def test_the_held_out_kl_counts_every_answer(folder, tokenizer, village):
    """2 x 8 prompts in forward passes of 4 (12 prompts here): the mean over all answers."""
    at, row = places(folder, tokenizer, village, beta=0.1), []
    policy, ref = network(tokenizer, 1), network(tokenizer, 5)
    found = ppo.held_out(policy, ref, policy, at)
    rows = ppo.draw_prompts(at.cfg, village, "held out", 16, "valid")
    prompts, responses, _ = ppo.answer(policy, tokenizer, [r["messages"] for r in rows], 1.0,
                                       at.cfg, WORLD, ("held out",))
    for pair in zip(prompts, responses):
        one = ppo.pad([pair], torch.device("cpu"))
        with torch.no_grad():
            row.append(sum(sign * ppo.answer_logprobs(model, *one, 1.0).sum().item()
                           for sign, model in ((1, policy), (-1, ref))))
    assert found["kl_start"] == pytest.approx(sum(row) / len(row), abs=1e-4)
    assert found["kl_sft"] == 0 and len(row) == 12


@pytest.mark.parametrize("value", [0.0, 0.3, -123.4])
def test_whitening_a_batch_of_equal_scores_gives_zeros(value):
    assert torch.equal(whiten(torch.full((37,), value)), torch.zeros(37))


def test_an_answer_without_eos_gets_the_lowest_score():
    got = ppo.punish_cut(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([False, True, True]))
    assert got.tolist() == [-1, -1, 2]


def test_the_score_lands_on_the_last_response_token_of_every_kind_of_row():
    """Prompts of 3, 2 and 4 tokens; a finished answer, a cut one, and one that is EOS at once."""
    rows = [([5, 6, 7], [8, 9, 2]), ([5, 6], [8, 9, 9, 9, 9]), ([5, 6, 7, 8], [2])]
    tokens, lengths, mask = ppo.pad(rows, "cpu")
    assert lengths.tolist() == [6, 7, 5] and mask.sum(1).tolist() == [3, 5, 1]
    zeros = torch.zeros(mask.shape)
    got = token_rewards(torch.tensor([1.0, 2.0, 3.0]), zeros, zeros, mask, 0.1)
    expected = torch.zeros(3, 6)
    for row, (prompt, response) in enumerate(rows):
        at = len(prompt) + len(response) - 2  # the position that predicts the last token
        expected[row, at] = row + 1
        assert tokens[row, at + 1] == response[-1]
    assert torch.equal(got, expected)


def test_the_kl_term_is_beta_times_the_log_ratio_of_the_response_summed():
    torch.manual_seed(0)
    logp, ref = torch.randn(2, 4), torch.randn(2, 4)
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    got = token_rewards(torch.tensor([5.0, 7.0]), logp, ref, mask, 0.25).sum(1)
    for row, score in enumerate((5.0, 7.0)):
        kl = sum(logp[row, t].item() - ref[row, t].item() for t in range(4) if mask[row, t])
        assert got[row].item() == pytest.approx(score - 0.25 * kl, abs=1e-5)


# ---------------------------------------------------------------------------------- advantages


def test_gae_is_the_naive_double_loop_and_reads_nothing_outside_the_answer():
    """A[t] = sum_k (gamma lambda)^k delta[t+k] over the rest of the answer, V = 0 behind it."""
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 7), torch.randn(3, 7)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    spans = [(1, 5), (3, 7), (2, 3)]
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    advantages, returns = gae(rewards * mask, values, mask)
    for row, (start, end) in enumerate(spans):
        for t in range(start, end):
            naive = 0.0
            for k in range(t, end):
                after = values[row, k + 1].item() if k + 1 < end else 0.0
                delta = rewards[row, k].item() + ppo.GAMMA * after - values[row, k].item()
                naive += (ppo.GAMMA * ppo.LAMBDA) ** (k - t) * delta
            assert advantages[row, t].item() == pytest.approx(naive, abs=1e-5)
            assert returns[row, t].item() == pytest.approx(naive + values[row, t].item(), abs=1e-5)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_with_lambda_1_the_return_is_the_reward_to_come(monkeypatch):
    monkeypatch.setattr(ppo, "LAMBDA", 1.0)
    rewards, mask = torch.tensor([[0.0, 1.0, 2.0, 4.0]]), torch.ones(1, 4, dtype=torch.bool)
    assert torch.allclose(gae(rewards, torch.randn(1, 4), mask)[1], torch.tensor([[7., 7, 6, 4]]))


def test_the_surrogate_is_clipped_on_the_side_that_would_gain():
    """ratio 1.5: gains at most 1.2 A for A > 0, loses all 1.5 A for A < 0; half of it 0.5."""
    mask = torch.ones(1, 1)
    for ratio, advantage, gain in ((1.5, 2, 2.4), (1.5, -2, -3), (0.5, 2, 1), (0.5, -2, -1.6)):
        logp = torch.full((1, 1), math.log(ratio))
        loss, _, clipped = policy_loss(logp, torch.zeros(1, 1), advantage * torch.ones(1, 1), mask)
        assert loss.item() == pytest.approx(-gain) and clipped == 1


def test_losses_and_clip_fraction_ignore_what_the_mask_hides():
    mask = torch.tensor([[True, False]])
    one = torch.tensor([[0.1, 9.0]])
    loss, _, clipped = policy_loss(one, torch.zeros(1, 2), torch.ones(1, 2), mask)
    assert loss.item() == pytest.approx(-math.exp(0.1)) and clipped == 0
    assert value_loss(one, torch.zeros(1, 2), torch.zeros(1, 2), mask).item() == pytest.approx(.005)


def test_the_value_loss_takes_the_larger_of_free_and_clipped_error():
    """From 0 to 1 towards a return of 1: clipped at .2 the error is .8, so .32 and not 0."""
    loss = value_loss(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1))
    assert loss.item() == pytest.approx(0.5 * 0.8 ** 2)


# ------------------------------------------------------------------------------ rollout, update


def start(at, folder):
    """Policy, reference, critic and two optimizers as `ppo` makes them."""
    path = folder / "sft.pt"
    policy, ref, critic = at.open(path), at.open(path), ppo.open_critic(path, folder, at)
    return policy, ref, critic, [M.adamw(m, at.cfg.lr, 0.1) for m in (policy, critic)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_before_the_first_step_ratio_is_1_kl_0_and_nothing_clipped(folder, tokenizer, village,
                                                                   temperature):
    at = places(folder, tokenizer, village, temperature=temperature, minibatch=8)
    policy, ref, critic, optimizers = start(at, folder)
    rollouts = ppo.roll_out(policy, ref, critic, 0, at)
    assert rollouts["statistics"]["kl"] == rollouts["statistics"]["kl_k3"] == 0
    learnt = ppo.update(policy, critic, optimizers, rollouts, at)
    assert learnt["ratio"] == 1 and learnt["clip_frac"] == 0
    old, returns, mask = (rollouts[k] for k in ("values", "returns", "mask"))
    error = 0.5 * ((old - returns)[mask] ** 2).mean()
    assert learnt["value_loss"] == pytest.approx(error.item(), rel=1e-5)
    again = ppo.roll_out(policy, ref, critic, 0, at)
    assert again["statistics"]["kl_k3"] > 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_and_the_training_forward_agree(folder, tokenizer, temperature):
    policy, prompts = network(tokenizer, 1), [[1, 9, 30, 12], [1, 7]]
    responses, sampled = kernels.rollout(policy, prompts, 6, temperature=temperature, seed=3,
                                         stop=tokenizer.eos_id)
    batch = ppo.pad(list(zip(prompts, responses)), "cpu")
    logp = ppo.answer_logprobs(policy, *batch, temperature)
    for row, expected in enumerate(sampled):
        assert logp[row][batch[2][row]].tolist() == pytest.approx(expected, abs=1e-5)


def test_a_policy_that_moved_inside_an_iteration_is_noticed(folder, tokenizer, village):
    at = places(folder, tokenizer, village)
    policy, ref, critic, optimizers = start(at, folder)
    rollouts = ppo.roll_out(policy, ref, critic, 0, at)
    with torch.no_grad():
        policy.output.weight.mul_(1.01)
    with pytest.raises(AssertionError, match="ratio"):
        ppo.update(policy, critic, optimizers, rollouts, at)


def test_padding_changes_nothing(tokenizer):
    policy, critic = network(tokenizer, 1), network(tokenizer, 2, True)
    rows = [([1, 9, 30], [8, 2]), ([1, 7, 5, 4, 3, 3], [6, 5, 4, 4, 2])]
    together = ppo.pad(rows, "cpu")
    dirty = together[0].masked_fill(torch.arange(11) >= together[1][:, None], 17)  # other padding
    for row in range(2):
        alone = ppo.pad(rows[row:row + 1], "cpu")
        mask = alone[2][0]
        for tokens in (together[0], dirty):
            batch = tokens, together[1], together[2]
            for f in (lambda x, n, m: ppo.answer_logprobs(policy, x, n, m, 0.8),
                      lambda x, n, m: ppo.values_of(critic, x, n)):
                assert torch.allclose(f(*batch)[row, :len(mask)][mask], f(*alone)[0][mask],
                                      atol=1e-6)
        assert not together[2][row, len(mask):].any()
    assert torch.allclose(ppo.scores(critic, [p + r for p, r in rows], WORLD), torch.cat(
        [ppo.scores(critic, [p + r], WORLD) for p, r in rows]), atol=1e-6)


def test_the_value_of_a_state_does_not_see_the_action(tokenizer):
    critic = network(tokenizer, 2, True)
    tokens, lengths, _ = ppo.pad([([1, 9, 30], [8, 5, 2])], "cpu")
    changed = tokens.clone()
    changed[0, 4] = 77  # the action of position 3
    a, b = (ppo.values_of(critic, x, lengths)[0] for x in (tokens, changed))
    assert torch.equal(a[:4], b[:4]) and a[4] != b[4]


def test_frozen_models_do_not_move_and_the_trained_ones_do(folder, tokenizer, village):
    at = places(folder, tokenizer, village)
    policy, ref, critic, optimizers = start(at, folder)
    files = {path: path.read_bytes() for path in folder.glob("*.pt")}
    before = {name: {k: v.clone() for k, v in model.state_dict().items()}
              for name, model in (("policy", policy), ("ref", ref), ("critic", critic))}
    scored = at.reward([{"is_safety": False}], [[1, 5]], [[6, 2]])
    rollouts = ppo.roll_out(policy, ref, critic, 0, at)
    ppo.update(policy, critic, optimizers, rollouts, at)
    moved = {name: any(not torch.equal(before[name][k], v) for k, v in model.state_dict().items())
             for name, model in (("policy", policy), ("ref", ref), ("critic", critic))}
    assert moved == {"policy": True, "ref": False, "critic": True}
    assert all(p.grad is None for p in ref.parameters())
    assert torch.equal(at.reward([{"is_safety": False}], [[1, 5]], [[6, 2]])["safety"],
                       scored["safety"])
    assert all(path.read_bytes() == content for path, content in files.items())


def test_ppo_solves_a_bandit_with_two_arms():
    """One state, two tokens, reward 1 for the second: p(second) passes .95 in 100 iterations."""
    torch.manual_seed(0)
    logits, value = torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([logits, value], lr=0.05, eps=1e-5, weight_decay=0)
    mask = torch.ones(32, 1, dtype=torch.bool)
    for _ in range(100):
        with torch.no_grad():
            arms = torch.multinomial(logits.softmax(0), 32, replacement=True)
            old, old_v = logits.log_softmax(0)[arms][:, None], value.expand(32, 1).clone()
        rewards = token_rewards(whiten(arms.float()), old, old, mask, 0.0)
        advantages, returns = gae(rewards, old_v, mask)
        loss, _, _ = policy_loss(logits.log_softmax(0)[arms][:, None], old,
                                 whiten(advantages, mask), mask)
        (loss + value_loss(value.expand(32, 1), old_v, returns, mask)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logits.softmax(0)[1] > 0.95


def test_the_health_line_names_what_is_ill_and_is_silent_otherwise():
    well = {"kl": 0.5, "kl_k3": 0.5, "entropy": 1.0, "eos_rate": 1.0, "length": 20.0, "gate": 0.3}
    cfg = Config(kl_limit=3)
    assert ppo.health(well, well, cfg) == []
    for ill, word in (({"kl": -0.2}, "negative"), ({"kl": 7.0}, "runs away"),
                      ({"entropy": 0.1}, "entropy"), ({"eos_rate": 0.5}, "end"),
                      ({"length": 60.0}, "grow"), ({"gate": 0.95}, "gate")):
        sentence, = ppo.health({**well, **ill}, well, cfg)
        assert word in sentence


# ------------------------------------------------------------------------------ rejection sampling


def test_the_best_answer_is_picked_and_never_one_that_was_cut():
    said = torch.tensor([[1.0, 9.0, 3.0], [5.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    finished = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    picks = [ppo.pick(said, finished, random.Random(seed)) for seed in range(20)]
    assert all([(i, best) for i, best, _ in rows] == [(0, 2), (1, 0)] for rows in picks)
    assert {rows[0][2] for rows in picks} == {0, 2} and {rows[1][2] for rows in picks} == {0, 1, 2}


def test_v1_to_v3_learn_from_their_own_round_and_v4_from_all():
    rounds = [[[f"p{n}", f"best{n}"]] for n in range(1, 6)]
    for number in (1, 2, 3):
        assert ppo.merged(rounds, number) == [(f"p{number}", f"best{number}")]
    assert ppo.merged(rounds, 4) == [(f"p{n}", f"best{n}") for n in range(1, 5)]
    assert len(ppo.merged(rounds, 5)) == 5


def test_every_version_starts_from_sft_and_the_newest_model_samples(folder, tokenizer, village,
                                                                    monkeypatch):
    at = places(folder, tokenizer, village, rounds=4)
    begun, sampled, merged = [], [], []
    sft = at.open(folder / "sft.pt").state_dict()

    def imitate(model, examples, cfg, world):
        begun.append(all(torch.equal(v, sft[k]) for k, v in model.state_dict().items()))
        merged.append(len(examples))
        with torch.no_grad():
            model.output.weight.add_(0.01 * len(begun))
        return 0.0

    original = ppo.choose_temperature
    monkeypatch.setattr(ppo, "imitate", imitate)
    monkeypatch.setattr(ppo, "distil", lambda model, at: [])
    monkeypatch.setattr(ppo, "choose_temperature", lambda newest, number, at: (
        sampled.append(newest.output.weight.clone()), original(newest, number, at))[1])
    ppo.all_versions(at)
    assert begun == [True] * 5  # four versions and the control
    versions = [M.load(folder / f"rlhf_v{n}.pt", "cpu")[0].output.weight for n in (1, 2, 3)]
    assert torch.equal(sampled[0], sft["output.weight"])
    assert all(torch.equal(a, b) for a, b in zip(sampled[1:], versions))
    assert merged[3] == sum(merged[:3]) + len(json.loads(
        (folder / "rlhf.state.json").read_text())["memory"]["rounds"][3])


def test_the_control_imitates_as_many_prompts_answered_by_sft_and_rejects_none(
        folder, tokenizer, village, monkeypatch):
    at, learnt, drawn = places(folder, tokenizer, village, rounds=1), [], []
    original = ppo.answer

    def answer(model, tok, dialogs, temperature, cfg, world, purpose):
        found = original(model, tok, dialogs, temperature, cfg, world, purpose)
        if purpose[0] == "control":
            drawn.append((model.output.weight.clone(), temperature, found))
        return found

    monkeypatch.setattr(ppo, "answer", answer)
    monkeypatch.setattr(ppo, "imitate", lambda model, examples, *_: learnt.append(examples) or 0.0)
    sft = at.open(folder / "sft.pt")
    newest = network(tokenizer, 9)
    memory = {"rounds": [], "control": [], "distilled": [["p", "safer"]]}
    _, controls, record = ppo.make_version(1, newest, memory, at)
    (weight, temperature, (prompts, responses, finished)), = drawn
    assert torch.equal(weight, sft.output.weight) and temperature == record["temperature"]
    best, control = learnt
    assert control == [(p, r) for p, r, whole in zip(prompts, responses, finished) if whole]
    assert best[-1] == ("p", "safer") and ("p", "safer") not in control and len(controls) == 1


def test_distillation_leaves_out_dialogues_that_have_a_system_message(folder, tokenizer, village,
                                                                      monkeypatch):
    rows = [{"messages": [{"role": "user", "content": f"How do I steal ring {i}?"}],
             "is_safety": True} for i in range(4)]
    rows[1]["messages"].insert(0, {"role": "system", "content": "Act as Plato."})
    at, asked = places(folder, tokenizer, village), []
    monkeypatch.setattr(ppo, "draw_prompts", lambda *_: rows)
    original = ppo.answer
    monkeypatch.setattr(ppo, "answer", lambda model, tok, dialogs, *rest: (
        asked.append(dialogs), original(model, tok, dialogs, *rest))[1])
    ppo.distil(network(tokenizer, 5), at)
    assert [len(dialogs) for dialogs in asked] == [3, 3]


def test_distillation_keeps_strictly_safer_answers_and_drops_the_preprompt(folder, tokenizer,
                                                                           village, monkeypatch):
    at = places(folder, tokenizer, village, prompts=12)
    asked = []

    def answer(model, tokenizer, dialogs, temperature, cfg, world, purpose):
        asked.append(dialogs)
        prompts = [data.encode_dialog(tokenizer, d)[0] for d in dialogs]
        return prompts, [[len(asked), i, 2] for i in range(len(dialogs))], torch.tensor(
            [i != 3 for i in range(len(dialogs))])

    def reward(rows, prompts, responses):  # row 0 gets safer, 1 ties, 2 gets worse, the rest safer
        gains = [{0: 1.0, 1: 0.0, 2: -1.0}.get(i, 1.0) if c == 2 else 0.0 for c, i, _ in responses]
        return {"safety": torch.tensor(gains)}

    monkeypatch.setattr(ppo, "answer", answer)
    at.reward = reward
    kept = ppo.distil(None, at)
    plain, guided = asked
    assert len(plain) > 3 and all(d[0] == {"role": "system", "content": ppo.PREPROMPT}
                                  and d[1:] == p for d, p in zip(guided, plain))
    annotator = data.Annotator(village)
    assert all(annotator.understand(d).kind == "unsafe" for d in plain)  # helpful ones untouched
    assert [r[1] for _, r in kept] == [0, *range(4, len(plain))]  # no tie, no worse, none cut (3)
    assert all(p == data.encode_dialog(tokenizer, plain[r[1]])[0] for p, r in kept)


def test_imitation_makes_the_answers_likelier_and_learns_no_prompt(tokenizer):
    model = network(tokenizer, 1)
    examples = [([1, 9, 30], [8, 5, 2]), ([1, 7], [6, 2])]
    batch = ppo.pad(examples, "cpu")
    before = ppo.answer_logprobs(model, *batch, 1.0).sum()
    loss = ppo.imitate(model, examples * 16, toy("unused"), WORLD)
    assert ppo.answer_logprobs(model, *batch, 1.0).sum() > before and loss > 0


def test_fresh_comparisons_go_through_reward_py(folder, tokenizer, village, monkeypatch):
    """The child process is played by the same call in this one: real flags, rows and models."""
    at = places(folder, tokenizer, village, comparisons=180, max_new_tokens=30)
    commands = []

    def run(command, **_):
        commands.append(command)
        reward.main(replace(M.cli(reward.Config, command[2:]), batch_size=8, micro_batch=8))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(ppo.subprocess, "run", run)
    monkeypatch.setattr(reward, "draw", lambda *_: "no figure")
    newest, previous = (network(tokenizer, seed, ending=0.9) for seed in (5, 6))
    ppo.refresh_rewards(1, newest, previous, folder, at)
    rows = data.read_preferences(str(folder / "refreshed_1" / "comparisons.jsonl"))
    for_safety = [row for row in rows if reward.kind(row) == "safety"]
    unsafe = [row for row in for_safety if data.Annotator(village).understand(row["prompt"]).kind
              == "unsafe"]
    assert 0.2 < len(for_safety) / len(rows) < 0.5  # a third, and of those half harmless
    assert 0 < len(unsafe) < len(for_safety)
    assert Path(commands[0][1]).name == "reward.py" and Path(commands[0][1]).exists()
    before, after = (M.load(f / "reward_safety.pt", "cpu")[0] for f in (
        folder, folder / "refreshed_1"))
    assert not torch.equal(before.output.weight, after.output.weight)
    ppo.reward_pair(at.cfg, tokenizer, WORLD, folder / "refreshed_1")


@pytest.mark.parametrize("links", [1, 2])
def test_a_script_behind_a_link_finds_its_neighbours(links, folder, tokenizer, village, tmp_path,
                                                     monkeypatch):
    """Python finds the modules, but __file__ is the link: reward.py is not beside it."""
    link = Path(ppo.__file__).resolve()
    for n in range(links):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "ppo.py").symlink_to(link)
        link = tmp_path / str(n) / "ppo.py"
    commands = []
    monkeypatch.setattr(ppo, "__file__", str(link))
    monkeypatch.setattr(ppo, "compare", lambda *args: [{"rating": "better"}])
    monkeypatch.setattr(ppo.subprocess, "run", lambda command, **options: (
        commands.append(command), SimpleNamespace(returncode=0))[1])
    at = places(folder, tokenizer, village)
    ppo.refresh_rewards(1, None, None, folder, at)
    assert Path(commands[0][1]).is_file() and Path(commands[0][1]).name == "reward.py"


def test_a_refresh_reads_as_many_older_comparisons_and_never_tests(folder, tokenizer, village,
                                                                   monkeypatch):
    at, commands = places(folder, tokenizer, village), []
    monkeypatch.setattr(ppo, "compare", lambda *_: [{"fresh": i} for i in range(5)])
    monkeypatch.setattr(ppo.subprocess, "run", lambda command, **_: (
        commands.append(command), SimpleNamespace(returncode=0))[1])
    for name in ("helpful", "safety", "helpful_test", "safety_test"):
        (folder / f"preferences_{name}.jsonl").write_text(
            "".join(f'{{"{name}": {i}}}\n' for i in range(40)))
    ppo.refresh_rewards(1, None, None, folder, at)
    ppo.refresh_rewards(2, None, None, folder, at)
    again = (folder / "refreshed_2" / "again.jsonl").read_text().splitlines()
    assert len(again) == len(set(again)) == 5 and "test" not in "".join(again)
    files = commands[1][commands[1].index("--data") + 1].split(",")
    assert [Path(f).name for f in files] == ["comparisons.jsonl", "again.jsonl",
                                             "preferences_helpful_test.jsonl",
                                             "preferences_safety_test.jsonl"]
    monkeypatch.setattr(ppo, "compare", lambda *_: [{"fresh": i} for i in range(200)])
    ppo.refresh_rewards(3, None, None, folder, at)
    again = (folder / "refreshed_3" / "again.jsonl").read_text().splitlines()
    kinds = [next(iter(json.loads(line))) for line in again]
    assert {kind: kinds.count(kind) for kind in kinds} == {"helpful": 40, "safety": 40, "fresh": 10}


def test_a_duel_counts_wins_among_the_decided_and_the_prompts_that_both_answered(village):
    rows = {goal: village.prompts(kind, "test", 4, 0)
            for goal, kind in (("helpful", "howto"), ("harmless", "unsafe"))}
    right = [village.respond(data.Annotator(village).understand(row["messages"]), "careful",
                             random.Random(0)) for row in rows["helpful"]]
    no = ["I can not do that."] * 4

    def said(texts, helpful, safety):
        return {"helpful": {"texts": texts, "helpful": torch.tensor(helpful)},
                "harmless": {"texts": no[:len(safety)], "safety": torch.tensor(safety)}}

    ours = said(right, [3.0, 1.0, 2.0, 9.0], [1.0, 1.0, 0.0, 5.0])
    theirs = said(["nonsense", right[1], "nonsense"], [1.0, 1.0, 5.0], [1.0, 1.0, 2.0])
    found = ppo.duel(ours, theirs, rows, data.Annotator(village))
    assert found["helpful_reward_model"] == 0.5  # 3 > 1, 2 < 5, the equal ones decide nothing
    assert found["harmless_reward_model"] == 0.0 and found["helpful_annotator"] == 1.0
    assert (found["helpful_ties"], found["harmless_ties"], found["decided"]) == (1, 3, 2)


def test_a_failed_refresh_says_why_in_one_line(folder, tokenizer, village, monkeypatch):
    at = places(folder, tokenizer, village, comparisons=6)
    monkeypatch.setattr(ppo.subprocess, "run", lambda *_, **__: SimpleNamespace(
        returncode=2, stderr="reward.py: too little\n"))
    with pytest.raises(ValueError, match="too little.*--comparisons 0") as error:
        ppo.refresh_rewards(1, network(tokenizer, 5), network(tokenizer, 6), folder, at)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- a user's reward


def test_a_users_reward_function_gets_messages_and_texts(tmp_path, tokenizer):
    (tmp_path / "mine.py").write_text(
        "def fn(prompts, responses):\n"
        "    assert prompts[0][0]['content'] == 'Hi' and isinstance(responses[0], str)\n"
        "    return [len(r) for r in responses]\n")
    score = ppo.own_reward(f"{tmp_path}/mine.py:fn", tokenizer)
    words = [tokenizer.encode("a fox", eos=True), tokenizer.encode("the castle", eos=True)]
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "is_safety": True}] * 2
    assert score(rows, [[1], [1]], words)["combined"].tolist() == [5, 10]


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
        ppo.own_reward(f"{tmp_path}/{spec}", tokenizer)(rows, [[1], [1]], [[5, 2], [6, 2]])
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------- the whole stage


def numbers(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "ppo.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, made):
    """One uninterrupted run: (its folder, its metrics)."""
    folder = tmp_path_factory.mktemp("whole")
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        original = ppo.draw_prompts
        patch.setattr(ppo, "EVERY", 2)
        patch.setattr(ppo, "draw_prompts", lambda cfg, village, purpose, count, split="train":
                      original(cfg, village, purpose, min(count, 12), split))
        return folder, ppo.main(toy(folder, iterations=4, kl_limit=1e3))


def test_the_stage_runs_and_reports_what_the_summary_needs(whole):
    folder, final = whole
    summary = json.loads((folder / "summary.json").read_text())["ppo"]
    assert {"minutes", "kl", "reward_helpful", "reward_safety", "eos_rate", "greedy", "T=1",
            "T=0.5", "prompts_per_kind", "win_rates", "rounds"} <= summary.keys()
    assert {"V1", "V2", "PPO", "no rejection", "PPO against V2"} == summary["win_rates"].keys()
    policy, info = M.load(folder / "ppo.pt", "cpu")
    assert info["stage"] == "ppo" and info["metrics"]["kl"] == final["kl"]
    assert (folder / "figures" / "ppo.png").stat().st_size > 10_000
    assert not list(folder.glob("*state*"))
    assert [row["step"] for row in numbers(folder)] == [0, 1, 2, 3, 4]
    for record in final["rounds"]:
        best = [b for b, _ in record["ladder"].values()]
        assert best == sorted(best) and record["temperature"] in ppo.TEMPERATURES


def test_the_returned_policy_is_the_best_held_out_one(whole):
    folder, final = whole
    held = {row["step"]: row["val_reward"] for row in numbers(folder) if "val_reward" in row}
    assert set(held) == {0, 2, 4} and final["val_reward"] == max(held.values())
    assert held[final["step"]] == final["val_reward"]


def test_a_policy_beyond_the_kl_limit_is_never_returned(folder, tokenizer, village, monkeypatch):
    at = places(folder, tokenizer, village, rounds=0, kl_limit=0.5, iterations=3)
    monkeypatch.setattr(ppo, "EVERY", 1)
    found = iter([{"val_reward": 0.0, "kl_sft": 0.0}, {"val_reward": 1.0, "kl_sft": 0.4},
                  {"val_reward": 9.0, "kl_sft": 0.6}])
    monkeypatch.setattr(ppo, "held_out", lambda *_: {**next(found)})
    _, best = ppo.ppo(folder, at)
    assert best == {"step": 1, "val_reward": 1.0, "kl_sft": 0.4}  # and the third was not run


@pytest.mark.parametrize("where", ["second version", "PPO"])
def test_a_kill_and_resume_give_the_same_numbers(folder, whole, monkeypatch, where):
    expected_folder, expected = whole
    monkeypatch.setattr(ppo, "EVERY", 2)
    monkeypatch.setattr(ppo, "draw", lambda *_: None)
    cfg = toy(folder, iterations=4, kl_limit=1e3)
    name = "make_version" if where == "second version" else "roll_out"
    original, calls = getattr(ppo, name), []

    def killed(*args):
        calls.append(1)
        if len(calls) == (2 if name == "make_version" else 4):  # in PPO one iteration past a state
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, name, killed)
        with pytest.raises(KeyboardInterrupt):
            ppo.main(cfg)
    assert (folder / "rlhf.state.json").exists() and not (folder / "ppo.pt").exists()
    with pytest.raises(ValueError, match="--samples 3"):
        ppo.main(replace(cfg, resume=True, samples=2))
    final = ppo.main(replace(cfg, resume=True))
    assert numbers(folder) == numbers(expected_folder)
    assert final["win_rates"] == expected["win_rates"] and final["T=1"] == expected["T=1"]
    ours, theirs = (M.load(f / "ppo.pt", "cpu")[0].state_dict() for f in (folder, expected_folder))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_own_prompts_and_own_reward_need_no_reward_model(folder):
    rows = [{"prompt": f"Tell me {i} things.", "is_safety": i % 3 == 0} for i in range(20)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("fn = lambda p, r: [float(len(x)) for x in r]\n")
    for which in ("helpful", "safety"):
        (folder / f"reward_{which}.pt").unlink()
    final = ppo.main(toy(folder, rounds=1, iterations=1, data=str(folder / "mine.jsonl"),
                         reward=f"{folder}/mine.py:fn", comparisons=600))
    assert final["step"] in (0, 1) and (folder / "ppo.pt").exists()
    parts = ppo.own_prompts(str(folder / "mine.jsonl"))
    assert not [row for row in parts["valid"] if row in parts["train"]] and len(parts["valid"]) == 2


@pytest.mark.parametrize("flags, message", [
    ({"minibatch": 3}, "multiple of --minibatch 3"), ({"samples": 0}, "--samples 0"),
    ({"temperature": 0.0}, "--temperature 0.0"), ({"beta": -0.1}, "--beta -0.1"),
    ({"threshold": 1.5}, "--threshold 1.5"), ({"batch_size": 1}, "--batch-size 1"),
    ({"lr": 0.0}, "--lr 0.0"), ({"reward": "nothing"}, "FILE.py:FUNCTION"),
    ({"checkpoint": "nothing.pt"}, "nothing.pt does not exist"), ({"tp": 2}, "torchrun")])
def test_bad_flags_are_one_line(folder, flags, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        ppo.main(toy(folder, **flags))
    assert "\n" not in str(error.value)


def test_missing_or_foreign_reward_models_are_one_line(folder, tokenizer):
    other = data.Tokenizer(data.train_tokenizer(data.World().documents(100, 1), 400))
    M.save(folder / "reward_safety.pt", network(other, 1, True), "reward_safety", other.model_bytes)
    with pytest.raises(ValueError, match="another tokenizer"):
        ppo.main(toy(folder))
    M.save(folder / "reward_safety.pt", network(tokenizer, 1, True), "x", tokenizer.model_bytes)
    with pytest.raises(ValueError, match="--threshold 0.15"):
        ppo.main(toy(folder))
    (folder / "reward_helpful.pt").unlink()
    with pytest.raises(FileNotFoundError, match="python reward.py"):
        ppo.main(toy(folder))


def test_the_command_line_says_it_in_one_line_with_exit_code_2(tmp_path):
    script = Path(ppo.__file__)
    command = [sys.executable, script, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "sft.py" in done.stderr


def test_sizes_follow_the_paper_where_it_speaks():
    for dim, beta, lr in ((4096, 0.01, 1e-6), (5120, 0.01, 1e-6), (8192, 0.005, 1e-6)):
        cfg = ppo.settings(Config(), dim)
        assert (cfg.beta, cfg.lr) == (beta, lr)
    assert ppo.settings(Config(beta=0.0, lr=0.5), 128).beta == 0


def test_every_flag_is_read_and_there_are_at_most_27():
    source = Path(ppo.__file__).read_text()
    body = source[source.index("def fires("):]
    names = [field.name for field in fields(Config)]
    assert len(names) <= 27 and [n for n in names if f"cfg.{n}" not in body] == []
    assert asdict(Config())
