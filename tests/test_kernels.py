"""kernels/: C and PyTorch compute the same numbers, and the path taken is always said.

The judge is model.py in float64. Tolerances, relative to the largest number of a tensor: float32
keeps 24 bits, and a sum of a thousand products loses a few more, so 1e-5 is an error, not rounding;
the PyTorch path in float32 lies at 1e-6 to 2e-6 on the same tests. bfloat16 factors keep 8 bits, so
each is wrong by up to 1/512; errors of a sum partly cancel, those of layers add up: 2e-3 to 2e-2
here, as under PyTorch's own autocast. A wrong index, sign or factor is an error of order 1.

Both kinds of products are tested on every processor: one without the instruction for bfloat16
computes the same sums in plain C (machine.h). Beyond the suite:

    PYTHONPATH=. python tests/test_kernels.py 600      # 600 s of random shapes against float64

    CC="gcc -g -fsanitize=address,undefined -fno-sanitize-recover=all" \\
    ASAN_OPTIONS=detect_leaks=0 \\
    LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" \\
    pytest tests/test_kernels.py tests/test_decode.py

The same with -fsanitize=thread, libtsan.so and -k "not compiler": it does not bear shell scripts.
"""
import ast
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
import model as M
from kernels import build, native

TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "torch": 1e-5}
FOLDER = Path(kernels.__file__).parent

try:
    build.load_library()
    COMPILED = ""
except OSError as e:
    COMPILED = str(e)
needs_c = pytest.mark.skipif(bool(COMPILED), reason=COMPILED)
PATHS = [pytest.param("float32", marks=needs_c), pytest.param("bfloat16", marks=needs_c), "torch"]

#                     D  L  H KV  F   V  context: sizes that differ, and none a multiple of 8
ODD = M.ModelConfig(36, 3, 6, 2, 53, 203, 64)
SMALLEST = M.ModelConfig(2, 1, 1, 1, 1, 3, 16)
ONE_KV = M.ModelConfig(50, 2, 5, 1, 29, 67, 64)
DEEP_K = M.ModelConfig(20, 1, 10, 10, 801, 67, 64)  # F beyond what a panel is cut into


@pytest.fixture(autouse=True)
def back_to_torch(monkeypatch):
    monkeypatch.delenv("LLAMA_PRODUCTS", raising=False)
    yield
    kernels.choose("torch")


@pytest.fixture(params=["float32", "bfloat16"])
def products(request):
    """The C path with either kind of products; its name."""
    choose(request.param)
    return request.param


def choose(path):
    """float32 or bfloat16 products in C, or PyTorch."""
    if path == "torch":
        kernels.choose("torch")
    else:
        kernels.choose("c", products=path)


def network(config, seed=0, gain=3.0):
    """A network far from its initial symmetry: weights `gain` times larger, norms not 1."""
    net = M.Llama(config).init_weights(seed)
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        with torch.no_grad():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=rng))
            else:
                p.mul_(gain)
    return net


def in_float64(net):
    twin = M.Llama(net.config).double()
    twin.load_state_dict(net.state_dict())
    return twin


def random_tokens(config, *shape, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, shape, generator=rng)


def assert_near(ours, exact, what, path, floor=1e-30):
    error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=floor)
    assert error < TOLERANCE[path], f"{what}: error {error:.1e} of the largest number"


def trunk_and_gradients(net, tokens, lengths=None, segments=None):
    """hidden and the gradient of every parameter, for a loss that weighs all outputs unequally."""
    net.zero_grad()
    hidden = kernels.trunk(net, tokens, lengths, segments)
    weights = torch.arange(hidden.numel(), dtype=torch.float64).sin().view(hidden.shape)
    (hidden * weights.to(hidden.dtype)).sum().backward()
    names = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **names}


# ------------------------------------------------------------------------------------ trunk


@needs_c
@pytest.mark.parametrize("config, B, T", [(ODD, 4, 37), (ONE_KV, 2, 25), (SMALLEST, 3, 7),
                                          (DEEP_K, 2, 17), (ODD, 1, 1)])
@pytest.mark.parametrize("rows", ["full", "padded", "packed", "padded and packed"])
def test_trunk_and_all_its_gradients_are_those_of_float64(config, B, T, rows, products):
    lengths = torch.tensor([T, 1, 0, T // 2])[:B] if "padded" in rows else None
    segments = (torch.arange(B * T).view(B, T) * 3 // T) if "packed" in rows else None
    check_against_float64(config, B, T, products, lengths, segments)


def check_against_float64(config, B, T, products, lengths, segments, seed=0, zero=1e-3):
    """zero: the share of the largest gradient beside which one is judged that is exactly 0: with
    one key dq is, and what stands there is the rounding of the others."""
    net, tokens = network(config, seed), random_tokens(config, B, T, seed=seed + 1)
    choose("torch")
    exact = trunk_and_gradients(in_float64(net), tokens, lengths, segments)
    choose(products)
    ours = trunk_and_gradients(net, tokens, lengths, segments)
    assert ours.keys() == exact.keys()
    largest = max(v.abs().max().item() for v in exact.values()) or 1e-30  # or all are 0
    for name, value in exact.items():
        share = zero if value.abs().max() < 1e-12 * largest else 1e-3
        assert_near(ours[name], value, name, products, share * largest)


@needs_c
def test_segments_may_be_interleaved(products):
    net, tokens = network(ODD), random_tokens(ODD, 2, 61)
    segments = torch.arange(2 * 61).view(2, 61) * 7 % 3  # 0 1 2 0 1 2 ...
    exact = trunk_and_gradients(in_float64(net), tokens, None, segments)
    ours = trunk_and_gradients(net, tokens, None, segments)
    for name, value in exact.items():
        assert_near(ours[name], value, name, products)


@pytest.mark.parametrize("path", PATHS)
def test_padding_reads_as_zero_and_changes_nothing(path):
    choose(path)
    net, tokens = network(ODD), random_tokens(ODD, 3, 20)
    lengths = torch.tensor([20, 4, 11])
    pad = torch.arange(20) >= lengths[:, None]
    first = trunk_and_gradients(net, tokens, lengths)
    second = trunk_and_gradients(net, tokens.masked_fill(pad, 5), lengths)
    assert first["hidden"][pad].abs().max() == 0
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@needs_c
def test_a_packed_row_equals_its_documents_alone(products):
    """Positions go on counting in a packed row; RoPE only looks at distances, so nothing shows."""
    net, tokens = network(ODD), random_tokens(ODD, 1, 40)
    packed = kernels.trunk(net, tokens, None, torch.tensor([[0] * 13 + [1] * 27]))
    alone = torch.cat([kernels.trunk(net, tokens[:, :13]), kernels.trunk(net, tokens[:, 13:])], 1)
    assert_near(packed.detach(), alone.detach().double(), "packed", products)


@needs_c
def test_no_token_looks_to_its_right(products):
    net, tokens = network(ODD), random_tokens(ODD, 1, 50)
    changed = tokens.clone()
    changed[0, 30] = (changed[0, 30] + 1) % ODD.vocab_size
    a, b = kernels.trunk(net, tokens), kernels.trunk(net, changed)
    assert torch.equal(a[:, :30], b[:, :30]) and not torch.equal(a[:, 30:], b[:, 30:])


@needs_c
def test_the_same_call_gives_the_same_bits_on_two_threads(products):
    net, tokens = network(ODD), random_tokens(ODD, 5, 30)
    torch.set_num_threads(2)
    try:
        runs = [trunk_and_gradients(net, tokens) for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    single = trunk_and_gradients(net, tokens)
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]) and torch.equal(value, runs[2][name]), name
        assert_near(value, single[name].double(), name, products)


@needs_c
def test_without_gradients_the_same_bits_come_out(products):
    net, tokens = network(ODD), random_tokens(ODD, 2, 30)
    kept = kernels.trunk(net, tokens)
    with torch.no_grad():
        assert torch.equal(kernels.trunk(net, tokens), kept.detach())


@needs_c
def test_frozen_parameters_get_no_gradient_and_micro_batches_add_up(products):
    net, tokens = network(ODD), random_tokens(ODD, 4, 20)
    net.layers[1].requires_grad_(False)
    whole = trunk_and_gradients(net, tokens)
    assert not [name for name in whole if name.startswith("layers.1.")]
    assert "layers.0.ffn_norm.weight" in whole and "tok_embeddings.weight" in whole
    net.zero_grad()
    for half in tokens.split(2):
        kernels.trunk(net, half).sum().backward()
    twice = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    kernels.trunk(net, tokens).sum().backward()
    for name, p in net.named_parameters():
        if p.grad is not None:
            assert_near(twice[name], p.grad.double(), name, products)


@needs_c
@pytest.mark.parametrize("which", ["attention.w", "norm", "layers.1.feed_forward.w_up"])
def test_gradients_are_the_same_bits_when_other_weights_do_not_learn(which, products):
    net, tokens = network(ODD), random_tokens(ODD, 3, 20)
    whole = trunk_and_gradients(net, tokens)
    for name, p in net.named_parameters():
        p.requires_grad_(which in name)
    part = trunk_and_gradients(net, tokens)
    learns = {name for name in whole if which in name}
    assert learns and set(part) == {"hidden", *learns}
    for name in learns:
        assert torch.equal(part[name], whole[name]), name


@needs_c
@pytest.mark.parametrize("learns", ["attention.w", "w_down"])
def test_gradients_of_feed_forward_weights_are_computed_only_if_one_learns(learns, products,
                                                                           monkeypatch):
    net, lib, seen = network(ODD), native.library(), []
    sizes = [w.numel() for w in native.trunk_weights(net)]

    class Watched:
        def __getattr__(self, name):
            return getattr(lib, name)

        def trunk_backward(self, *arguments):
            code = lib.trunk_backward(*arguments)
            flat = (ctypes.c_float * sum(sizes)).from_address(arguments[-3])
            seen.extend(part.abs().sum().item() for part in
                        torch.frombuffer(flat, dtype=torch.float32).split(sizes))
            return code

    monkeypatch.setattr(native, "library", Watched)
    for name, p in net.named_parameters():
        p.requires_grad_(learns in name)
    kernels.trunk(net, random_tokens(ODD, 3, 20)).square().sum().backward()
    names = [name for _ in net.layers for name in native.LAYER]
    empty = {name for name, size in zip(names, seen) if size == 0}
    assert empty == (set(native.FEED_FORWARD) if learns == "attention.w" else set())


@needs_c
def test_a_second_backward_pass_is_refused_and_not_wrong(products):
    hidden = kernels.trunk(network(ODD), random_tokens(ODD, 2, 9))
    hidden.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        hidden.sum().backward()


@needs_c
def test_weights_changed_before_the_backward_pass_are_noticed(products):
    net = network(ODD)
    hidden = kernels.trunk(net, random_tokens(ODD, 2, 9))
    with torch.no_grad():
        net.layers[0].attention.wq.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


@needs_c
def test_a_number_that_is_not_finite_reaches_the_loss(products):
    tokens = random_tokens(ODD, 2, 9)
    for name in ("tok_embeddings.weight", "layers.1.attention.wq.weight",
                 "layers.0.feed_forward.w_gate.weight", "output.weight"):
        broken = network(ODD)
        with torch.no_grad():
            broken.get_parameter(name).fill_(float("nan"))
        logp = kernels.token_logprobs(kernels.trunk(broken, tokens), broken.output.weight, tokens,
                                      torch.ones(2, 9))
        assert logp.sum().isnan(), name


@needs_c
@pytest.mark.parametrize("tokens, lengths, segments, what", [
    ((1, 65), None, None, "do not fit the context of 64"),
    ((2, 5), [5, 6], None, "lengths .* do not fit"),
    ((2, 5), [5], None, "lengths .* do not fit"),
    ((2, 5), None, (2, 6), "segments have shape"),
])
def test_what_does_not_fit_is_one_clear_line(tokens, lengths, segments, what):
    kernels.choose("c")
    lengths = None if lengths is None else torch.tensor(lengths)
    segments = None if segments is None else torch.zeros(segments, dtype=torch.long)
    with pytest.raises(ValueError, match=what):
        kernels.trunk(network(ODD), random_tokens(ODD, *tokens), lengths, segments)


# ----------------------------------------------------------------------- log-probabilities


def head_and_gradients(hidden, weight, targets, mask, temperature):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp = kernels.token_logprobs(hidden, weight, targets, mask, temperature)
    (logp * torch.arange(logp.numel()).cos().view(logp.shape)).sum().backward()
    return {"logp": logp.detach(), "hidden": hidden.grad, "weight": weight.grad}


@needs_c
@pytest.mark.parametrize("kept", [1 << 27, 0])
@pytest.mark.parametrize("gap, temperature", [(7.0, 1.0), (10.0, 0.37)])
def test_a_log_probability_near_0_keeps_its_digits(gap, temperature, kept, monkeypatch):
    """Of logits 5 + gap and 5: log p = -log1p(e^-gap), and d log p / d logit = 1 - p."""
    monkeypatch.setattr(native, "LOGITS_KEPT", kept)
    choose("float32")
    hidden = torch.ones(1, 1, 1, requires_grad=True)
    weight = torch.tensor([[5 + gap], [5.0]]) * temperature
    logp = kernels.token_logprobs(hidden, weight, torch.zeros(1, 1, dtype=torch.long),
                                  torch.ones(1, 1), temperature)
    logp.sum().backward()
    other = torch.tensor(-gap).double().exp()
    assert logp.item() == pytest.approx(-other.log1p().item(), rel=1e-5)
    assert hidden.grad.item() == pytest.approx((gap * other / (1 + other)).item(), rel=1e-5)


@pytest.mark.parametrize("kept", [1 << 27, 0])  # logits that the forward pass may keep
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("B, T, D, V, every, temperature", [
    (3, 17, 36, 203, 2, 0.7),  # half of the positions
    (2, 131, 20, 131, 1, 1.0),  # more rows than one tile has, and more columns
    (1, 400, 7, 2, 3, 2.0),
    (2, 3, 5, 1, 1, 1.0),  # one token: log p = 0
    (1, 5, 130, 515, 5, 0.1),  # a single position
])
def test_log_probabilities_are_those_of_float64(path, kept, B, T, D, V, every, temperature,
                                                monkeypatch):
    """float64 by the definition itself; logits of order 10, so some probabilities are tiny."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=rng)
    weight = torch.randn(V, D, generator=rng) * 10 / D**0.5
    targets = torch.randint(0, V, (B, T), generator=rng)
    mask = (torch.arange(B * T) % every == 0).view(B, T)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = (h @ w.t() / temperature).log_softmax(-1).gather(-1, targets[..., None])[..., 0] * mask
    (exact * torch.arange(B * T).cos().view(B, T)).sum().backward()
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 5 * V)  # PyTorch: several chunks
    monkeypatch.setattr(native, "LOGITS_KEPT", kept)
    choose(path)
    ours = head_and_gradients(hidden, weight, targets.masked_fill(~mask, -100), mask, temperature)
    assert_near(ours["logp"], exact.detach(), "logp", path)
    assert_near(ours["hidden"], h.grad, "gradient of hidden", path)
    assert_near(ours["weight"], w.grad, "gradient of the weight", path)
    assert ours["logp"].dtype == torch.float32 and ours["logp"][~mask].abs().sum() == 0
    assert ours["hidden"][~mask].abs().sum() == 0


@pytest.mark.parametrize("path", PATHS)
def test_no_position_chosen_is_zero_with_a_zero_gradient(path):
    choose(path)
    got = head_and_gradients(torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3).long(),
                             torch.zeros(2, 3), 1.0)
    assert got["logp"].abs().sum() == 0 and got["hidden"].abs().sum() == 0


@needs_c
def test_a_second_backward_pass_through_the_head_gives_the_same(products):
    """The first one gives back the logits that were kept; the second computes them again."""
    hidden = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(203, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = kernels.token_logprobs(hidden, weight, random_tokens(ODD, 2, 9), torch.ones(2, 9)).sum()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, second):
        assert_near(a, b.double(), "gradient", products)


@needs_c
def test_huge_logits_neither_overflow_nor_lose_the_answer(products):
    """The target's logit is 4 * 12288 above all others: log p = 0. The least likely one: -98304."""
    weight = torch.tensor([[1.0], [0.0], [-1.0]]).repeat(1, 4)
    hidden = torch.full((1, 2, 4), 12288.0)
    logp = kernels.token_logprobs(hidden, weight, torch.tensor([[0, 2]]), torch.ones(1, 2))
    assert logp.tolist() == [[0.0, -98304.0]]


@needs_c
def test_a_target_outside_the_vocabulary_is_refused():
    kernels.choose("c")
    with pytest.raises(ValueError, match="outside the vocabulary 0..4"):
        kernels.token_logprobs(torch.randn(1, 2, 4), torch.randn(5, 4), torch.tensor([[1, 5]]),
                               torch.ones(1, 2))


# --------------------------------------------------------------------------------- rollouts

TALKER = M.ModelConfig(48, 2, 6, 3, 75, 211, 600)


def rollouts(prompts, new, **options):
    """The same rollout by both paths."""
    net = network(TALKER, gain=6.0)  # decided enough that rounding does not choose tokens
    choose("torch")
    expected = kernels.rollout(net, prompts, new, **options)
    choose("float32")
    return kernels.rollout(net, prompts, new, **options), expected


def assert_same_rollout(ours, expected):
    assert ours[0] == expected[0]
    for a, b in zip(ours[1], expected[1]):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-4, atol=1e-4)


@needs_c
def test_500_greedy_tokens_are_those_of_pytorch():
    assert_same_rollout(*rollouts([[1, 2, 3]], 500, temperature=0.0))


@needs_c
@pytest.mark.parametrize("options", [
    dict(temperature=1.0, seed=-3), dict(temperature=0.6, top_p=0.9, seed=2**31),
    dict(temperature=1.0, row_ids=[9, 3, 5, 2**40, 8]), dict(temperature=1.3, top_p=0.0),
])
def test_rows_of_different_lengths_draw_the_tokens_that_pytorch_draws(options):
    prompts = [random_tokens(TALKER, n, seed=n).tolist() for n in (1, 30, 8, 17, 23)]
    ours, expected = rollouts(prompts, 40, **options)
    assert_same_rollout(ours, expected)


@needs_c
def test_a_row_ends_with_the_stop_token_and_the_others_go_on():
    prompts = [random_tokens(TALKER, n, seed=n).tolist() for n in (4, 30, 8)]
    (free, _), _ = rollouts(prompts, 40)
    stop = free[1][10]
    (tokens, logps), expected = rollouts(prompts, 40, stop=stop)
    assert_same_rollout((tokens, logps), expected)
    cut = [row.index(stop) + 1 if stop in row else 40 for row in free]
    assert cut[1] <= 11 and tokens == [row[:n] for row, n in zip(free, cut)]


@needs_c
def test_a_row_ends_where_the_context_ends():
    prompts = [random_tokens(TALKER, n).tolist() for n in (599, 590)]
    (tokens, _), expected = rollouts(prompts, 20)
    assert tokens == expected[0] and [len(t) for t in tokens] == [1, 10]


@needs_c
def test_a_row_draws_the_same_alone_as_in_a_batch_on_two_threads(products):
    net = network(TALKER)
    prompts = [random_tokens(TALKER, n, seed=n).tolist() for n in (5, 16, 3)]
    torch.set_num_threads(2)
    try:
        together, _ = kernels.rollout(net, prompts, 30, seed=4)
    finally:
        torch.set_num_threads(1)
    alone = [kernels.rollout(net, [p], 30, seed=4, row_ids=[i])[0][0]
             for i, p in enumerate(prompts)]
    assert together == alone


@needs_c
def test_rollout_and_update_agree_on_the_log_probability(products):
    """PPO's ratio starts at 1: what the rollout says it drew is what the trainer computes."""
    net = network(TALKER)
    prompt = [4, 5, 6]
    (row,), (logp,) = kernels.rollout(net, [prompt], 50, temperature=0.8)
    tokens = torch.tensor([prompt + row])
    again = kernels.token_logprobs(kernels.trunk(net, tokens[:, :-1]), net.output.weight,
                                   tokens[:, 1:], torch.ones(1, 52), temperature=0.8)
    difference = (again[0, 2:] - torch.tensor(logp)).abs().max()
    assert difference < {"float32": 1e-5, "bfloat16": 5e-3}[products]


@needs_c
def test_a_dialogue_with_a_memory_is_the_same_and_reads_only_what_is_new(products, monkeypatch):
    """Three turns of three rows: the middle one has left in the second, the first one's past is
    changed in the third. New tokens are few, of an odd number, and more than half of the prompt."""
    net, memory = network(TALKER, gain=6.0), kernels.Memory()
    said = lambda n, seed=0: random_tokens(TALKER, n, seed=seed).tolist()
    prompts = {0: said(30), 1: said(12), 7: said(16)}
    asked, answers = {0: (8, 5), 7: (9, 70)}, {}  # new tokens in turns 2 and 3
    for turn in range(3):
        if turn:
            prompts = {i: prompts[i] + answers[i] + said(asked[i][turn - 1], turn) for i in asked}
        if turn == 2:
            prompts[0][25] = 3
        found = []
        for options in ({}, {"memory": memory}):
            found.append(kernels.rollout(net, list(prompts.values()), 11, seed=turn,
                                         row_ids=list(prompts), **options))
        answers = dict(zip(prompts, found[0][0]))
        assert found[0][0] == found[1][0]
        for a, b in zip(found[0][1], found[1][1]):
            bound = {"float32": 1e-4, "bfloat16": 5e-2}[products]
            torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=bound, atol=bound)
    # what counts as known: never the last token, nothing below half of the prompt
    prompt = prompts[7] + answers[7]
    size = memory.cache.shape[1]
    for asks, known in ((prompt, len(prompt) - 1), (prompt[:-1], len(prompt) - 2),
                        ([*prompt, 5, 6], len(prompt) - 1), (prompt * 3, 0), ([5, *prompt], 0)):
        assert memory.recall([7], [asks], size) == [(known, 2)], known
    for ids in ([7, 7], [2]):
        with pytest.raises(ValueError, match="different rows, all of them among the 3"):
            kernels.rollout(net, [[1]] * len(ids), 4, row_ids=ids, memory=memory)
    monkeypatch.setattr(native, "MEMORY", 3 * size - 1)  # too large: does without
    large = kernels.Memory()
    assert kernels.rollout(net, [[1, 2, 3]] * 3, 4, memory=large) == kernels.rollout(
        net, [[1, 2, 3]] * 3, 4) and large.cache is None


@needs_c
def test_a_memory_is_read_and_not_the_prompt(products):
    """A wrong key in the cache shows: the known part of the prompt is not computed again."""
    net = network(TALKER, gain=6.0)
    found = []
    for spoil in (False, True):
        memory = kernels.Memory()
        (first,), _ = kernels.rollout(net, [[1, 2, 3, 4]], 8, temperature=0.0, memory=memory)
        if spoil:
            memory.cache.zero_()
        found.append(kernels.rollout(net, [[1, 2, 3, 4, *first, 5]], 1, temperature=0.0,
                                     memory=memory)[1])
    assert abs(found[0][0][0] - found[1][0][0]) > 1e-3


@needs_c
def test_rollouts_refuse_what_model_rollout_refuses():
    kernels.choose("c")
    for prompts, what in (([], "no prompts"), ([[1], []], "prompt 1 has 0 tokens"),
                          ([[211]], "outside 0..210"), ([[1] * 600], "prompt 0 has 600")):
        with pytest.raises(ValueError, match=what):
            kernels.rollout(network(TALKER), prompts, 5)
    assert kernels.rollout(network(TALKER), [[1]], 0) == ([[]], [[]])


# ------------------------------------------------------------------------- which path, and why


@pytest.mark.parametrize(("macros", "products"), [
    ("", "float32"), ("#define __AMX_TILE__ 1", "float32"),
    ("#define __AVX512BF16__ 1", "bfloat16"),
    ("#define __AMX_TILE__ 1\n#define __AVX512BF16__ 1", "float32")])
def test_bfloat16_is_for_processors_that_are_fast_at_it(monkeypatch, macros, products):
    monkeypatch.setattr(build, "find_compiler", lambda: (["cc"], macros))
    assert build.fastest_products() == products


@needs_c
def test_the_line_says_which_path(monkeypatch):
    fastest = build.fastest_products()
    assert f", {fastest} products, " in kernels.choose("c")
    for products in build.PRODUCTS:
        assert f", {products} products, " in kernels.choose("auto", products=products)
        monkeypatch.setenv("LLAMA_PRODUCTS", products)
        assert f", {products} products, " in kernels.choose("auto")
    monkeypatch.setenv("LLAMA_PRODUCTS", "float8")
    with pytest.raises(ValueError, match="LLAMA_PRODUCTS=float8: choose auto, float32 or bfloat16"):
        kernels.choose("auto")
    monkeypatch.delenv("LLAMA_PRODUCTS")
    assert kernels.choose("torch") == "kernels: PyTorch, as asked"
    assert "not on cuda" in kernels.choose("auto", "cuda")
    with pytest.raises(ValueError, match="not on cuda"):
        kernels.choose("c", "cuda")
    with pytest.raises(ValueError, match="choose auto, c or torch"):
        kernels.choose("fast")


@needs_c
def test_under_torchrun_it_is_pytorch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "torchrun" in kernels.choose("auto")


@needs_c
def test_a_model_that_c_cannot_take_runs_in_pytorch_and_says_so_once(capsys):
    kernels.choose("c")
    net, tokens = in_float64(network(ODD)), random_tokens(ODD, 2, 9)
    assert kernels.trunk(net, tokens).dtype == torch.float64
    kernels.trunk(net, tokens)
    assert capsys.readouterr().out.count("float64 on cpu") == 1


@needs_c
@pytest.mark.parametrize("cut", [lambda h: h[:, 1:], lambda h: h[::2], lambda h: h[..., 2:38],
                                 lambda h: h.transpose(0, 1)])
def test_hidden_states_may_be_a_slice_of_something_larger(cut, products, capsys):
    """Equal to the bit to a contiguous copy, gradients included, and without a fall-back line."""
    hidden = torch.randn(4, 9, 40, generator=torch.Generator().manual_seed(0))
    shape = cut(hidden).shape
    weight = torch.randn(23, shape[-1], generator=torch.Generator().manual_seed(1))
    targets = torch.arange(2 * shape[0] * shape[1]).view(shape[0], -1)[:, ::2] % 23  # strided too
    mask = torch.arange(2 * shape[0] * shape[1]).view(shape[0], -1)[:, ::2] % 3
    results = []
    for copied in (lambda t: t, torch.Tensor.contiguous):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp = kernels.token_logprobs(copied(cut(h)), w, copied(targets), copied(mask))
        (logp * logp).sum().backward()
        results.append((logp.detach(), h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert capsys.readouterr().out == ""


@needs_c
def test_c_takes_pytorchs_threads_and_gives_them_back():
    torch.set_num_threads(2)
    try:
        assert "2 threads" in kernels.choose("c")
        assert (native.threads(), torch.get_num_threads()) == (2, 1)
        assert "2 threads" in kernels.choose("c")  # again: they are not lost
        kernels.choose("torch")
        assert torch.get_num_threads() == 2
        kernels.choose("c")
        kernels.trunk(in_float64(network(ODD)), random_tokens(ODD, 1, 5))  # is PyTorch's
        assert torch.get_num_threads() == 2
    finally:
        kernels.choose("torch")
        torch.set_num_threads(1)


# ---------------------------------------------------------------------- PyTorch's own compiler


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_the_loss_and_all_gradients_stay(recompute, monkeypatch):
    """Everything of --compile but the code generator, which takes minutes on some machines."""
    plain, fast = network(ODD), network(ODD)
    traced, compile = [], functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f: traced.append(f) or compile(f))
    tokens, mask = random_tokens(ODD, 3, 17), torch.ones(3, 17)
    monkeypatch.setattr(kernels, "LOGITS_AT_ONCE", 20 * ODD.vocab_size)  # chunks of two sizes
    for net in (plain, fast):
        for layer in net.layers:
            layer.recompute = recompute
        if net is plain:
            kernels.choose("torch")  # forgets what was compiled
        else:
            kernels.compile_model(fast)
        logp = kernels.token_logprobs(kernels.trunk(net, tokens), net.output.weight, tokens, mask)
        (logp * logp).sum().backward()
    assert len(traced) == ODD.n_layers + 1
    for (name, a), b in zip(plain.named_parameters(), fast.parameters()):
        assert_near(b.grad, a.grad.double(), name, "torch")


def test_where_pytorchs_compiler_fails_one_line_says_so(monkeypatch, capsys):
    def broken(function):
        def call(*arguments):
            raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no Triton"), None)
        return call

    import torch._dynamo.exc
    monkeypatch.setattr(torch, "compile", broken)
    plain, net, tokens = network(ODD), network(ODD), random_tokens(ODD, 2, 9)
    kernels.compile_model(net)
    assert torch.equal(net.hidden(tokens), plain.hidden(tokens))
    assert capsys.readouterr().out.count("--compile is not possible here, going on without") == 1


CRASHES = "#!/bin/sh\nkill -SEGV $$\n"
REFUSES = "#!/bin/sh\necho 'fatal error: no such thing' >&2\nexit 1\n"
MAKES_RUBBISH = ("#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ $1 = -o ]; then echo rubbish > $2; fi; "
                 "shift; done\n")


@pytest.mark.parametrize("script, what", [(CRASHES, "does not work"), (REFUSES, "no such thing"),
                                          (MAKES_RUBBISH, "fails its own test"),
                                          (None, "no C compiler found")])
def test_a_compiler_that_is_missing_or_broken_is_one_line(script, what, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if script:
        (tmp_path / "cc").write_text(script)
        (tmp_path / "cc").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
    build.load_library.cache_clear()
    try:
        line = kernels.choose("auto")
        assert line.startswith("kernels: PyTorch (") and what in line and "\n" not in line
        with pytest.raises(ValueError, match="--kernels auto falls back"):
            kernels.choose("c")
    finally:
        build.load_library.cache_clear()
    assert not list(tmp_path.glob("cache/**/*.so"))


@needs_c
@pytest.mark.parametrize("kind", build.PRODUCTS)
def test_a_compiler_that_knows_no_vectors_makes_the_same_numbers(kind, tmp_path, monkeypatch):
    """It refuses -march=native, so the target is the oldest processor of this architecture."""
    script = tmp_path / "old-cc"
    script.write_text('#!/bin/sh\ncase "$*" in *native*) exit 1;; esac\nexec cc "$@" -O1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_library.cache_clear()
    try:
        line = kernels.choose("c", products=kind)
        assert f"plain C, {kind}" in line or f"NEON, {kind}" in line
        check_against_float64(ODD, 3, 37, kind, torch.tensor([37, 0, 20]), None)
    finally:
        build.load_library.cache_clear()


@needs_c
def test_two_processes_may_compile_at_once(tmp_path):
    """Both end well, and one library is left."""
    code = ("import importlib.util as u, sys; s = u.spec_from_file_location('build', sys.argv[1]); "
            "b = u.module_from_spec(s); s.loader.exec_module(b); "
            "b.FLAGS = [f.replace('-O3', '-O0') for f in b.FLAGS]; print(b.compile_library())")
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code, str(FOLDER / "build.py")],
                                env=environment, stdout=subprocess.PIPE, text=True)
               for _ in range(2)]
    answers = {p.communicate(timeout=300)[0].strip() for p in started}
    assert [p.returncode for p in started] == [0, 0] and len(answers) == 1
    assert [str(p) for p in tmp_path.rglob("*") if p.is_file()] == list(answers)


@needs_c
def test_every_file_that_is_compiled_is_in_the_librarys_name(tmp_path, monkeypatch):
    """The compiler is a copy of a library that works; `extra` is one more file, changed once."""
    script = tmp_path / "copying-cc"
    script.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do if [ $1 = -o ]; then '
                      f'cp {build.compile_library()} $2; fi; shift; done\n')
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    extra = tmp_path / "extra.c"
    made = [build.compile_library()]
    for text in ("int one;", "int two;"):
        extra.write_text(text)
        made.append(build.compile_library(extra=(extra,)))
        assert build.compile_library(extra=(extra,)) == made[-1]
    assert len(set(made)) == 3
    assert sorted(tmp_path.glob("cache/*/*")) == sorted(made)


def test_kernels_import_nothing_of_ours_but_model():
    ours = {path.stem for path in FOLDER.parent.glob("*.py")} | {"bench", "tests"}
    imported = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    assert imported & ours == {"model"}


def test_freed_memory_is_kept_where_the_c_library_can_and_nothing_happens_elsewhere(monkeypatch):
    calls = []
    glibc = SimpleNamespace(mallopt=lambda option, value: calls.append((option, value)))
    for libc in (glibc, SimpleNamespace()):
        monkeypatch.setattr(native.ctypes, "CDLL", lambda name, libc=libc: libc)
        native.keep_memory()
    assert sorted(calls) == [(-3, 32 << 20), (-2, 64 << 20), (-1, 256 << 20)]


# ---------------------------------------------------------------------------- random shapes


def draw(rng, smallest, largest) -> int:
    """A whole number, small ones more often; rng: random.Random."""
    return int(smallest * (largest / smallest) ** rng.random() + rng.random())


def fuzz(seconds: float, seed: int = 0) -> int:
    """Random networks, batches and rollouts in both kinds of products; returns how many it tried.

    Fails at the first one that is not float64's, printing the seed that repeats it. Networks ten
    times as sensitive as the tests' do occur; how much so in bfloat16, PyTorch's autocast tells.
    """
    import random
    import time
    TOLERANCE.update(float32=1e-4)
    torch.set_num_threads(1)  # PyTorch's own; C has its threads from below
    end, start = time.time() + seconds, seed
    while time.time() < end:
        rng, seed = random.Random(seed), seed + 1
        kv, group, half = draw(rng, 1, 5), draw(rng, 1, 4), draw(rng, 1, 40)
        config = M.ModelConfig(kv * group * half * 2, draw(rng, 1, 3), kv * group, kv,
                               draw(rng, 1, 500), draw(rng, 2, 700), 300)
        B, T, path = draw(rng, 1, 6), draw(rng, 1, 290), rng.choice(["float32", "bfloat16"])
        lengths = torch.tensor([rng.randint(0, T) for _ in range(B)])
        segments = torch.tensor([[rng.randint(0, 2) for _ in range(T)] for _ in range(B)])
        if rng.random() < 0.5:
            segments = segments.sort(1).values
        lengths, segments = rng.choice([lengths, None]), rng.choice([segments, None])
        print(f"seed {seed - 1}: {path} {config} B {B} T {T}", flush=True)
        n_threads = rng.randint(1, 3)
        native._threads = lambda work: min(work, n_threads)
        autocast = autocast_error(config, B, T, lengths, segments, seed)
        TOLERANCE["bfloat16"] = max(0.2, 3 * autocast)
        choose(path)
        check_against_float64(config, B, T, path, lengths, segments, seed, zero=0.03)
        TOLERANCE["bfloat16"] = 0.2
        check_head(rng, path, B, T, config.dim - rng.randint(0, 1), config.vocab_size)
        check_rollout(rng, path, config, T, seed)
    return seed - start


def autocast_error(config, B, T, lengths, segments, seed) -> float:
    """The largest error of PyTorch's bfloat16 autocast in check_against_float64."""
    net, tokens = network(config, seed), random_tokens(config, B, T, seed=seed + 1)
    choose("torch")
    exact = trunk_and_gradients(in_float64(net), tokens, lengths, segments)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = trunk_and_gradients(net, tokens, lengths, segments)
    largest = max(v.abs().max().item() for v in exact.values()) or 1e-30
    return max([0.0, *(((theirs[n].double() - v).abs().max() / v.abs().max()).item()
                        for n, v in exact.items() if v.abs().max() > 1e-12 * largest)])


def check_head(rng, path, B, T, D, V):
    torch.manual_seed(rng.randint(0, 2**40))
    hidden, weight = torch.randn(B, T, D), torch.randn(V, D) * 3 / D**0.5
    targets, mask = torch.randint(0, V, (B, T)), torch.rand(B, T) < rng.random()
    mask[0, 0], temperature = True, rng.uniform(0.3, 2)
    native.LOGITS_KEPT = rng.choice([0, 1 << 27])
    ours = head_and_gradients(hidden, weight, targets, mask, temperature)
    choose("torch")
    exact = head_and_gradients(hidden.double(), weight.double(), targets, mask, temperature)
    choose(path)
    floor = 1e-3 * max(v.abs().max().item() for v in exact.values()) or 1e-30
    for name, value in exact.items():
        # a log-probability near 0 is the difference of two numbers as large as the logits
        assert_near(ours[name], value, name, path, 1e-2 if name == "logp" else floor)


def check_rollout(rng, path, config, P, seed):
    """The log-probabilities of a rollout are those that training computes."""
    net, new = network(config, seed, gain=1.0), draw(rng, 1, 20)
    prompts = [random_tokens(config, draw(rng, 1, P), seed=i).tolist() for i in range(3)]
    options = dict(temperature=rng.uniform(0.5, 1.5), seed=seed, top_p=rng.choice([1.0, 0.8]))
    rows, logps = kernels.rollout(net, prompts, new, **options)
    for prompt, row, logp in zip(prompts, rows, logps):
        tokens = torch.tensor([prompt + row])
        again = kernels.token_logprobs(kernels.trunk(net, tokens[:, :-1]), net.output.weight,
                                       tokens[:, 1:], torch.ones_like(tokens[:, 1:]),
                                       options["temperature"])[0, len(prompt) - 1:]
        difference = (again - torch.tensor(logp)).abs().max()
        assert difference < {"float32": 1e-5, "bfloat16": 5e-3}[path], f"rollout: {difference}"


if __name__ == "__main__":
    print(f"{fuzz(float(sys.argv[1]), *map(int, sys.argv[2:]))} networks, all as in float64")


# ---- the cache of compiled libraries


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Path:
    """A cache folder with one library in it, compiled without optimising."""
    folder = tmp_path_factory.mktemp("cache")
    assert ask_for_library(folder).returncode == 0
    return folder


def ask_for_library(cache: Path | None, before: str = "pass", **environment):
    """Another process compiles what is missing in this cache, loads it and prints its path."""
    code = (f"import importlib.util as u, sys, os; {before}; "
            "s = u.spec_from_file_location('build', sys.argv[1]); b = u.module_from_spec(s); "
            "s.loader.exec_module(b); b.FLAGS = [f.replace('-O3', '-O0') for f in b.FLAGS]; "
            "library = b.compile_library(); b.load_library(); print(library)")
    settings = {**os.environ, **environment}
    settings.pop("XDG_CACHE_HOME", None)
    if cache:
        settings["XDG_CACHE_HOME"] = str(cache)
    return subprocess.run([sys.executable, "-c", code, str(FOLDER / "build.py")], env=settings,
                          capture_output=True, text=True, timeout=300)


@needs_c
@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "overwritten"])
def test_a_damaged_library_in_the_cache_is_made_anew(damage, compiled, tmp_path):
    """The system would map it as it is, and the process die of SIGBUS at every start."""
    shutil.copytree(compiled, tmp_path / "cache")
    library, = (tmp_path / "cache").rglob("*.so")
    content = library.read_bytes()
    middle = len(content) // 2
    library.write_bytes({"truncated": content[:middle], "empty": b"", "overwritten": b"x" * 5000,
                         "one bit": content[:middle] + bytes([content[middle] ^ 1])
                         + content[middle + 1:]}[damage])
    done = ask_for_library(tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert library.read_bytes() == content and Path(done.stdout.strip()) == library


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root may be others")
@pytest.mark.parametrize("shared", ["folder of everyone", "folder of the first", "name taken"])
def test_a_cache_shared_by_two_users_serves_both(shared):
    """Each has a folder of their own: nobody runs what another could have written."""
    cache = Path(tempfile.mkdtemp())  # pytest's folders are closed to other users
    try:
        cache.chmod(0o1777 if shared != "folder of the first" else 0o755)
        (cache / "free").mkdir()
        (cache / "free").chmod(0o777)
        if shared == "name taken":
            (cache / "llama2-kernels-65534").mkdir()  # by root, for the second user
        folders = []
        for user in (0, 65534):
            code = ("import importlib.util as u, os, sys; "
                    "s = u.spec_from_file_location('build', sys.argv[1]); "
                    "b = u.module_from_spec(s); s.loader.exec_module(b); "
                    f"os.setgid({user}); os.setuid({user}); folder = b.cache_folder(); "
                    "(folder / 'x.so').write_text(''); print(folder)")
            done = subprocess.run(
                [sys.executable, "-c", code, str(FOLDER / "build.py")], text=True, timeout=300,
                env={**os.environ, "XDG_CACHE_HOME": str(cache), "TMPDIR": str(cache / "free"),
                     "HOME": "/proc"}, capture_output=True)
            assert done.returncode == 0, done.stderr
            folders.append(Path(done.stdout.strip()))
            assert folders[-1].stat().st_uid == user
            assert folders[-1].stat().st_mode & 0o777 == 0o700
        assert folders[0] == cache / "llama2-kernels-0"
        free = cache if shared == "folder of everyone" else cache / "free"
        assert folders[1] == free / "llama2-kernels-65534"
    finally:
        shutil.rmtree(cache)


@needs_c
@pytest.mark.parametrize("home", [None, "/proc", "/dev/null"])
def test_without_a_home_the_library_is_kept_with_the_temporary_files(home, compiled, tmp_path):
    """No HOME and a user id that no one knows, as in a container: pathlib has no home for it."""
    shutil.copytree(compiled, tmp_path / "cache")
    before = "os.environ.pop('HOME', None); import pwd; pwd.getpwuid = {}.__getitem__"
    if home:
        before = f"os.environ['HOME'] = {home!r}"
    done = ask_for_library(None, before, TMPDIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.parent == tmp_path / "cache"


@needs_c
def test_sources_are_read_as_utf_8_whatever_the_locale(compiled):
    """PYTHONUTF8=0 with LC_ALL=C and no coercion: Python's own default is then ASCII."""
    done = ask_for_library(compiled, PYTHONUTF8="0", LC_ALL="C", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
