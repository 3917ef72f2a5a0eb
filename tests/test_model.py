"""What model.py promises: the network is Llama 2, sampling exact, a checkpoint whole or absent.

The trusted twin of the network is written here in NumPy, from the paper's formulas, with loops in
place of reshapes. Sizes are all different (D 48, H 6, KV 2, hd 8, hd/2 4, F 52, V 37, L 5, context
19, B 3, T 11), so that a swapped axis cannot pass by luck.
"""
import contextlib
import errno
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as M
from model import KVCache, Llama, ModelConfig

SIZES = ModelConfig(dim=48, n_layers=5, n_heads=6, n_kv_heads=2, hidden_dim=52, vocab_size=37,
                    max_seq_len=19, norm_eps=0.03, rope_theta=50.0)  # eps, theta: large, to be seen
SMALL = replace(SIZES, n_layers=1)  # where depth plays no role


def llama(config=SIZES, dtype=torch.float32, seed=0, scale=0.3) -> Llama:
    """Weights far larger than at the start, norms away from 1: no term hides behind another."""
    rng = torch.Generator().manual_seed(seed)
    net = Llama(config).to(dtype)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
        p.data = (noise * scale + (1 if "norm" in name else 0)).to(dtype)
    return net


def random_tokens(*shape, seed=0, high=SIZES.vocab_size) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def far(a, b) -> float:
    """The largest difference of two tensors."""
    return (a - b).abs().max().item()


# --------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("changes, words", [
    (dict(n_heads=5), "dim 48 must be n_heads 5 times an even number"),
    (dict(n_heads=16), "dim 48 must be n_heads 16 times an even number"),  # hd 3: no pairs
    (dict(n_kv_heads=4), "n_heads 6 must be a multiple of n_kv_heads 4"),
])
def test_config_refuses_heads_that_do_not_divide(changes, words):
    with pytest.raises(ValueError, match=words):
        replace(SIZES, **changes)


@pytest.mark.parametrize("field", ["dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim",
                                   "vocab_size", "max_seq_len"])
@pytest.mark.parametrize("value", [0, -6, 10**20])
def test_config_refuses_sizes_that_cannot_be_by_name(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        replace(SIZES, **{field: value})


@pytest.mark.parametrize("field, value", [("dim", 48.0), ("n_layers", "3"), ("vocab_size", True),
                                          ("max_seq_len", None), ("norm_eps", "1e-5"),
                                          ("norm_eps", 0.0), ("rope_theta", math.nan)])
def test_config_refuses_values_of_the_wrong_type_by_name(field, value):
    """A configuration comes out of a file, where anything may stand."""
    with pytest.raises(ValueError, match=f"{field} must be .*{value!r}"):
        replace(SIZES, **{field: value})


@pytest.mark.parametrize("dim, multiple_of, multiplier, width", [
    (4096, 256, None, 11008), (5120, 256, None, 13824), (8192, 256, 1.0, 22016),
    (8192, 4096, 1.3, 28672),
    (128, 32, None, 352),  # 512 * 2/3 = 341.3 -> 341 -> 11 * 32
    (48, 64, None, 128),  # 192 * 2/3 = 128: already a multiple, not rounded further
    (10, 1, 1.6, 41),  # 40 * 2/3 = 26.67 -> 26; 26 * 1.6 = 41.6 -> 41; 26.67 * 1.6 would give 42
])
def test_ffn_dim_truncates_in_the_order_of_metas_code(dim, multiple_of, multiplier, width):
    assert M.ffn_dim(dim, multiple_of, multiplier) == width


@pytest.mark.parametrize("name, parameters", [
    ("7b", 6_738_415_616), ("13b", 13_015_864_320), ("34b", 33_743_970_304),
    ("70b", 68_976_648_192)])
def test_preset_has_the_exact_parameters_of_the_release(name, parameters):
    with torch.device("meta"):
        built = sum(p.numel() for p in Llama(M.PRESETS[name]).parameters())
    assert built == parameters == M.count_parameters(M.PRESETS[name])


@pytest.mark.parametrize("name", ["tiny", "15m", "110m", "1b"])
def test_count_parameters_equals_the_built_small_preset(name):
    with torch.device("meta"):
        built = sum(p.numel() for p in Llama(M.PRESETS[name]).parameters())
    assert built == M.count_parameters(M.PRESETS[name])


@pytest.mark.parametrize("scalar_head", [False, True])
def test_count_parameters_knows_both_heads(scalar_head):
    config = replace(SIZES, scalar_head=scalar_head)
    built = sum(p.numel() for p in Llama(config).parameters())
    assert M.count_parameters(config) == built


def test_presets_are_the_papers_table():
    """Each row: dim, layers, heads, kv heads, FFN width, context."""
    rows = {name: (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.hidden_dim, c.max_seq_len)
            for name, c in M.PRESETS.items()}
    assert rows["7b"] == (4096, 32, 32, 32, 11008, 4096)
    assert rows["13b"] == (5120, 40, 40, 40, 13824, 4096)
    assert rows["34b"] == (8192, 48, 64, 8, 22016, 4096)
    assert rows["70b"] == (8192, 80, 64, 8, 28672, 4096)
    for name in ("7b", "13b", "34b", "70b"):
        c = M.PRESETS[name]
        assert (c.norm_eps, c.rope_theta, c.vocab_size, c.head_dim) == (1e-5, 1e4, 32000, 128)
    assert list(M.PRESETS) == ["tiny", "15m", "110m", "1b", "7b", "13b", "34b", "70b"]


def test_preset_returns_a_changed_copy():
    changed = M.preset("tiny", vocab_size=99)
    assert changed.vocab_size == 99 and M.PRESETS["tiny"].vocab_size != 99
    M.preset("tiny").dim = 64
    assert M.PRESETS["tiny"].dim == 128


def test_preset_names_the_nearest_one():
    with pytest.raises(ValueError, match="unknown model '7bb': did you mean 7b\\? choose one of "
                                         "tiny, 15m, 110m, 1b, 7b, 13b, 34b, 70b$"):
        M.preset("7bb")
    with pytest.raises(ValueError, match="unknown model 'xyzzy': choose one of"):
        M.preset("xyzzy")


# --------------------------------------------------------------------------- the naive twin


def twin(net: Llama, tokens: list[int]) -> np.ndarray:
    """Logits (T, V) of one row in float64, token by token and head by head, from the formulas.

    h = x + attention(norm(x)); x = h + w_down(silu(w_gate norm(h)) * w_up norm(h))
    norm(x) = x / sqrt(mean(x^2) + eps) * g;  softmax over the keys up to and including one's own
    RoPE: numbers 2i and 2i+1 of a head are one complex number, times exp(1j * p * theta^(-2i/hd))
    """
    c, w = net.config, {n: p.detach().double().numpy() for n, p in net.state_dict().items()}
    hd, group = c.dim // c.n_heads, c.n_heads // c.n_kv_heads

    def norm(x, g):
        return x / math.sqrt(sum(v * v for v in x) / len(x) + c.norm_eps) * g

    def turned(v, p):
        out = []
        for i in range(hd // 2):
            z = complex(v[2 * i], v[2 * i + 1]) * np.exp(1j * p * c.rope_theta ** (-2 * i / hd))
            out += [z.real, z.imag]
        return np.array(out)

    def head(v, h):
        return v[h * hd:(h + 1) * hd]

    xs = [w["tok_embeddings.weight"][t] for t in tokens]
    for layer in range(c.n_layers):
        at = {n.removeprefix(f"layers.{layer}."): v for n, v in w.items()}
        keys, values, after = [], [], []
        for p, x in enumerate(xs):
            h = norm(x, at["attention_norm.weight"])
            q, k, v = (at[f"attention.{n}.weight"] @ h for n in ("wq", "wk", "wv"))
            keys.append([turned(head(k, g), p) for g in range(c.n_kv_heads)])
            values.append([head(v, g) for g in range(c.n_kv_heads)])
            answers = []
            for n in range(c.n_heads):
                mine = turned(head(q, n), p)
                scores = np.array([mine @ key[n // group] for key in keys]) / math.sqrt(hd)
                weight = np.exp(scores - scores.max())
                weight = weight / weight.sum()
                answers.append(sum(a * value[n // group] for a, value in zip(weight, values)))
            h = x + at["attention.wo.weight"] @ np.concatenate(answers)
            f = norm(h, at["ffn_norm.weight"])
            gate, up = (at[f"feed_forward.{n}.weight"] @ f for n in ("w_gate", "w_up"))
            after.append(h + at["feed_forward.w_down.weight"] @ (gate / (1 + np.exp(-gate)) * up))
        xs = after
    return np.array([w["output.weight"] @ norm(x, w["norm.weight"]) for x in xs])


@pytest.mark.parametrize("n_kv_heads", [1, 2, 6])
def test_logits_equal_the_naive_twin_in_float64(n_kv_heads):
    net = llama(replace(SIZES, n_kv_heads=n_kv_heads), torch.float64)
    tokens = random_tokens(2, 11)
    logits = net(tokens)
    for row in range(2):
        expected = torch.from_numpy(twin(net, tokens[row].tolist()))
        assert expected.abs().max() > 1
        assert far(logits[row], expected) < 1e-10


def test_the_default_config_equals_the_twin_too():
    """eps and theta come from the configuration, also where it leaves them at their defaults."""
    config = ModelConfig(dim=12, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=10, vocab_size=7,
                         max_seq_len=9)
    assert (config.norm_eps, config.rope_theta, config.scalar_head) == (1e-5, 1e4, False)
    net = llama(config, torch.float64)
    tokens = [3, 1, 6, 6]
    assert far(net(torch.tensor([tokens]))[0], torch.from_numpy(twin(net, tokens))) < 1e-10


# ------------------------------------------------------------------------------------- RMSNorm


def test_rmsnorm_hand_worked():
    """x = (1, 7): mean of squares (1 + 49) / 2 = 25, plus eps 11 = 36, root 6; weights 2 and 3."""
    norm = M.RMSNorm(2, eps=11.0)
    norm.weight.data = torch.tensor([2.0, 3.0])
    assert torch.allclose(norm(torch.tensor([[[1.0, 7.0]]])), torch.tensor([[[2 / 6, 21 / 6]]]))


def test_rmsnorm_weight_starts_at_one():
    assert torch.equal(M.RMSNorm(7, 1e-5).weight, torch.ones(7))


def test_rmsnorm_in_bf16_divides_in_float32_and_casts_before_the_weight():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=rng).bfloat16()
    norm = M.RMSNorm(64, 1e-5).bfloat16()
    norm.weight.data = torch.randn(64, generator=rng).bfloat16()
    wide = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    narrow = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), wide.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (wide * norm.weight.float()).bfloat16()), "the other order"
    assert not torch.equal(norm(x), narrow * norm.weight), "division in bf16"


def test_at_least_float32_never_narrows():
    widened = {torch.bfloat16: torch.float32, torch.float16: torch.float32,
               torch.float32: torch.float32, torch.float64: torch.float64}
    assert {d: M.at_least_float32(d) for d in widened} == widened


# ---------------------------------------------------------------------------------------- RoPE


def turned(x, position, theta=50.0):
    """rotate() applied to one head (hd,) at one position."""
    cos, sin = M.rope_table(len(x), position + 1, theta)
    return M.rotate(x.view(1, 1, 1, -1), cos[-1:], sin[-1:]).flatten()


def test_rope_hand_worked_turns_neighbouring_pairs():
    """hd 4, theta 100: pair 0 turns by p radians, pair 1 by p * 100^(-2/4) = p / 10."""
    x = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    expected = [math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)]
    assert far(turned(x, 3, theta=100.0), torch.tensor(expected)) < 1e-7


def test_rope_score_depends_on_distance_only():
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    score = {p: turned(q, p + 5) @ turned(k, p) for p in (0, 1, 17, 1000)}
    assert all(abs(s - score[0]) < 1e-9 for s in score.values())
    assert abs(turned(q, 6) @ turned(k, 0) - score[0]) > 0.01


def test_rope_position_zero_is_identity():
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(turned(x, 0), x)


def test_rope_keeps_the_norm_of_every_pair():
    x = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert far(turned(x, 13).view(4, 2).norm(dim=1), x.view(4, 2).norm(dim=1)) < 1e-12


def test_rotate_takes_a_position_per_row():
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cos, sin = M.rope_table(8, 19, 50.0)
    positions = torch.tensor([[4, 5], [0, 1], [17, 18]])
    out = M.rotate(x, cos[positions], sin[positions])
    for b in range(3):
        for t in range(2):
            for h in range(5):
                assert far(out[b, t, h], turned(x[b, t, h], int(positions[b, t]))) < 1e-12


def test_rotate_in_bf16_is_the_float32_result_cast_back():
    x = torch.randn(3, 5, 6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = (t[:5].float() for t in M.rope_table(8, 5, 50.0))
    out = M.rotate(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, M.rotate(x.float(), cos, sin).bfloat16())


def test_rope_table_is_exact_at_the_end_of_the_context():
    """In float32 the angle itself would be off by up to 2e-4; only cos and sin are rounded."""
    net = Llama(replace(SMALL, max_seq_len=4096))
    cos, sin = net.rope(torch.float32, torch.device("cpu"))
    assert cos.shape == sin.shape == (4096, 4)
    for i in range(4):
        angle = 4095 * 50.0 ** (-2 * i / 8)
        assert abs(cos[4095, i] - math.cos(angle)) < 1e-6
        assert abs(sin[4095, i] - math.sin(angle)) < 1e-6


def test_bf16_weights_rotate_with_a_float32_table(monkeypatch):
    net, asked = llama(dtype=torch.bfloat16), []
    rope = net.rope
    monkeypatch.setattr(net, "rope", lambda *a: asked.append(a[0]) or rope(*a))
    net(random_tokens(1, 3))
    assert asked == [torch.float32]


def test_rope_table_follows_the_weights_dtype():
    """A table built for float32 must not be used, 1e-8 wrong, after the weights became float64."""
    net, tokens = llama(dtype=torch.float64), random_tokens(1, 11)
    expected = net(tokens)
    net.float()(tokens)
    assert net._rope[0].dtype == torch.float32
    fresh = llama(dtype=torch.float64)
    net.load_state_dict(fresh.state_dict(), assign=True)
    assert torch.equal(net(tokens), expected)


def test_rope_table_is_not_in_the_state():
    net = llama(SMALL)
    net(random_tokens(1, 3))
    assert not list(net.buffers()) and not [n for n in net.state_dict() if "rope" in n]


# ----------------------------------------------------------------------------------- attention


def heads_before_wo(attention, x):
    """The H answers (T, H, hd) of one attention layer, before wo mixes them."""
    seen = []
    hook = attention.wo.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    attention(x, M.rope_table(8, x.shape[1], 50.0))
    hook.remove()
    return seen[0].unflatten(-1, (-1, 8))[0]


@pytest.mark.parametrize("kv_head", [0, 1])
def test_query_head_h_reads_kv_head_h_over_n_rep(kv_head):
    """H 6, KV 2, so n_rep 3: changing values of head 0 moves queries 0 1 2; of head 1, 3 4 5."""
    attention = llama(SMALL, torch.float64).layers[0].attention
    x = torch.randn(1, 11, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = heads_before_wo(attention, x)
    attention.wv.weight.data[kv_head * 8:(kv_head + 1) * 8] += 1
    moved = (heads_before_wo(attention, x) - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [h // 3 == kv_head for h in range(6)]


def test_grouped_heads_equal_plain_attention_with_interleaved_copies():
    """Each key/value head copied n_rep times in place (0 0 0 1 1 1) gives the same network."""
    grouped = llama(dtype=torch.float64)
    plain = llama(replace(SIZES, n_kv_heads=6), torch.float64)
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = state[name].view(2, 8, 48).repeat_interleave(3, 0).reshape(48, 48)
    plain.load_state_dict(state)
    tokens = random_tokens(3, 11)
    assert far(grouped(tokens), plain(tokens)) < 1e-10
    for name in state:  # the other order, 0 1 0 1 0 1, is another network
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = grouped.state_dict()[name].view(2, 8, 48).repeat(3, 1, 1).reshape(48, 48)
    plain.load_state_dict(state)
    assert far(grouped(tokens), plain(tokens)) > 0.1


def test_heads_are_counted_from_the_tensors_not_the_config():
    """As under tensor parallelism: a layer given half of its heads answers for those."""
    whole = llama(SMALL, torch.float64).layers[0].attention
    half = llama(SMALL, torch.float64).layers[0].attention
    half.wq.weight.data, half.wk.weight.data = whole.wq.weight[:24], whole.wk.weight[:8]
    half.wv.weight.data = whole.wv.weight[:8]
    half.wo.weight.data = whole.wo.weight[:, :24]
    x = torch.randn(1, 11, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert far(heads_before_wo(half, x), heads_before_wo(whole, x)[:, :3]) < 1e-12


def test_no_position_sees_the_future():
    net, tokens = llama(), random_tokens(3, 11)
    before = net(tokens)
    for t in range(11):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 37
        after = net(changed)
        assert t == 0 or far(after[:, :t], before[:, :t]) < 1e-5
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4, "the past must be seen"


def test_segments_isolate_packed_documents():
    net, tokens = llama(dtype=torch.float64), random_tokens(3, 11)
    segments = torch.tensor([[0] * 4 + [1] * 7, [5] * 11, [0] * 1 + [1] * 9 + [2]])
    packed = net(tokens, segments=segments)
    for row, cuts in enumerate([(0, 4, 11), (0, 11), (0, 1, 10, 11)]):
        for start, end in zip(cuts, cuts[1:]):
            assert far(packed[row:row + 1, start:end], net(tokens[row:row + 1, start:end])) < 1e-9


# --------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("pieces", [[1] * 11, [11], [4, 1, 1, 3, 2], [10, 1]])
def test_cached_decoding_equals_the_full_forward(pieces):
    net, tokens = llama(dtype=torch.float64), random_tokens(3, 11)
    full, cache, start = net(tokens), KVCache(5, 13), 0
    for n in pieces:
        positions = torch.arange(start, start + n).expand(3, n)
        part = net(tokens[:, start:start + n], cache=cache, positions=positions)
        assert far(part, full[:, start:start + n]) < 1e-10
        start += n


def test_cached_rows_may_stand_at_different_positions():
    """Prompts of 2, 7, 4 tokens padded to 7; then each row goes on at its own position."""
    net, tokens, lengths = llama(dtype=torch.float64), random_tokens(3, 11), torch.tensor([2, 7, 4])
    cache, full = KVCache(5, 11), net(tokens)
    padded = tokens[:, :7].where(torch.arange(7) < lengths[:, None], 0)
    net(padded, cache=cache, positions=torch.arange(7).expand(3, 7))
    for step in range(4):
        at = (lengths + step)[:, None]  # (B, 1)
        part = net(tokens.gather(1, at), cache=cache, positions=at)
        for row in range(3):
            assert far(part[row, 0], full[row, at[row, 0]]) < 1e-10


def test_cache_holds_kv_heads_only_and_keeps_the_rows_asked_for():
    net, cache = llama(), KVCache(5, 13)
    net(random_tokens(3, 11), cache=cache, positions=torch.arange(11).expand(3, 11))
    before = [k.clone() for k, _ in cache.layers]
    assert all(t.shape == (3, 2, 13, 8) for pair in cache.layers for t in pair)
    cache.keep(torch.tensor([2, 0]))
    assert all(torch.equal(k, b[[2, 0]]) for (k, _), b in zip(cache.layers, before))
    assert all(t.shape == (2, 2, 13, 8) for pair in cache.layers for t in pair)


def test_cache_append_returns_everything_written_so_far():
    cache, k = KVCache(3, 9), torch.randn(2, 2, 4, 8)  # (B, T, KV, hd)
    keys, values = cache.append(1, k, k + 1, torch.tensor([[0, 1], [3, 4]]), 5)
    assert keys.shape == values.shape == (2, 4, 5, 8)
    assert torch.equal(keys[0, :, :2], k[0].transpose(0, 1)) and keys[0, :, 2:].abs().sum() == 0
    assert torch.equal(values[1, :, 3:], k[1].transpose(0, 1) + 1)
    assert cache.layers[0] is None and cache.layers[2] is None


# --------------------------------------------------------------------------- the whole network


def test_state_dict_names_are_the_role_names():
    names = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    roles = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
             "ffn_norm", "feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down")
    names |= {f"layers.{i}.{role}.weight" for i in range(5) for role in roles}
    assert set(Llama(SIZES).state_dict()) == names


@pytest.mark.parametrize("dtype, out", [(torch.bfloat16, torch.float32),
                                        (torch.float32, torch.float32),
                                        (torch.float64, torch.float64)])
def test_logits_are_at_least_float32(dtype, out):
    logits = llama(dtype=dtype)(random_tokens(3, 11))
    assert logits.dtype == out and logits.shape == (3, 11, 37)


def test_hidden_is_what_the_head_reads():
    net, tokens = llama(dtype=torch.float64), random_tokens(3, 11)
    hidden = net.hidden(tokens)
    assert hidden.shape == (3, 11, 48)
    assert torch.equal(net(tokens), hidden @ net.output.weight.T)


def test_scalar_head_gives_one_score_per_position():
    net, tokens = llama(replace(SIZES, scalar_head=True), torch.float64), random_tokens(3, 11)
    assert net.output.weight.shape == (1, 48)
    scores = net(tokens)
    assert scores.shape == (3, 11)
    assert far(scores, net.hidden(tokens) @ net.output.weight[0]) < 1e-12
    assert llama(replace(SIZES, scalar_head=True), torch.bfloat16)(tokens).dtype == torch.float32


def test_scalar_score_reads_its_own_position():
    """The value at t sees tokens up to and including t, and t itself."""
    net, tokens = llama(replace(SIZES, scalar_head=True)), random_tokens(1, 11)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 37
    moved = (net(changed) - net(tokens)).abs()[0] > 1e-5
    assert moved.tolist() == [False] * 6 + [True] * 5


def test_tokens_beyond_the_context_are_refused():
    net = llama(SMALL)
    assert net(random_tokens(1, 19)).shape == (1, 19, 37)
    with pytest.raises(ValueError, match="20 tokens do not fit the context of 19"):
        net(random_tokens(1, 20))


def gradients(net, tokens) -> dict[str, torch.Tensor]:
    F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {n: p.grad.clone() for n, p in net.named_parameters()}


def test_recompute_gives_equal_gradients_and_runs_each_block_twice(monkeypatch):
    tokens, expected = random_tokens(3, 11), gradients(llama(), random_tokens(3, 11))
    net, calls = llama(), []
    for layer in net.layers:
        layer.recompute = True
        layer.attention.wq.register_forward_hook(lambda *_: calls.append(1))
    got = gradients(net, tokens)
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    assert len(calls) == 2 * 5
    monkeypatch.setattr(M, "checkpoint", None)  # without gradients nothing is to be recomputed
    with torch.no_grad():
        net(tokens)


def test_every_parameter_gets_a_gradient():
    assert all(g.abs().sum() > 0 for g in gradients(llama(), random_tokens(3, 11)).values())


# ------------------------------------------------------------------------------ initialisation


def test_loss_at_init_is_near_ln_v():
    config = replace(M.PRESETS["tiny"], vocab_size=1000)
    net, tokens = Llama(config).init_weights(), random_tokens(4, 65, high=1000)
    loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert abs(loss - math.log(1000)) < 0.1  # nats


def test_init_std_is_two_percent_and_less_for_residual_projections():
    """wo and w_down: 0.02 / sqrt(2 * 8) = 0.005. 4096 draws or more: std within 5%."""
    net = Llama(ModelConfig(64, 8, 4, 4, 176, 80, 16)).init_weights()
    for name, p in net.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones(64)), name
        else:
            std = 0.005 if name.endswith(("wo.weight", "w_down.weight")) else 0.02
            assert abs(p.std() / std - 1) < 0.05, name
            assert abs(p.mean()) < 5 * std / p.numel() ** 0.5, name


@pytest.mark.parametrize(("dim", "equal"), [(64, True), (512, True), (520, False)])
def test_the_head_of_a_narrow_network_starts_as_the_embedding_and_is_its_own(dim, equal):
    net = Llama(ModelConfig(dim, 1, 4, 4, 4, 40, 16)).init_weights(1)
    assert torch.equal(net.output.weight, net.tok_embeddings.weight) == equal
    with torch.no_grad():
        net.output.weight.zero_()
    assert net.tok_embeddings.weight.abs().max() > 0  # untied [L2 §2.2]


def test_init_of_a_scalar_head_gives_scores_of_order_one():
    """std 1/sqrt(D+1) [N+], here 1/32: the hidden state has mean square 1, so have the scores."""
    net = Llama(ModelConfig(1024, 1, 64, 1, 2, 3, 4, scalar_head=True)).init_weights()
    assert abs(net.output.weight.std() * math.sqrt(1025) - 1) < 0.1


def test_init_is_a_function_of_seed_and_name_only():
    torch.manual_seed(0)
    a = Llama(SIZES).init_weights(3)
    torch.manual_seed(1)
    b = Llama(SIZES).init_weights(3)
    deeper = Llama(replace(SIZES, n_layers=7)).init_weights(3)
    assert all(torch.equal(p, b.state_dict()[n]) for n, p in a.state_dict().items())
    for name in ("tok_embeddings.weight", "layers.2.attention.wq.weight"):
        assert torch.equal(a.state_dict()[name], deeper.state_dict()[name])


def test_init_differs_between_seeds_and_between_parameters():
    a, b = Llama(SIZES).init_weights(0).state_dict(), Llama(SIZES).init_weights(1).state_dict()
    for name in a:
        if "norm" not in name:
            assert not torch.equal(a[name], b[name]), name
    wq = [a[f"layers.{i}.attention.wq.weight"] for i in range(5)]
    assert not any(torch.equal(wq[i], wq[j]) for i in range(5) for j in range(i))


def test_init_returns_the_model_and_consumes_no_global_randomness():
    torch.manual_seed(0)
    net, state = Llama(SMALL), torch.get_rng_state()
    assert net.init_weights() is net and torch.equal(torch.get_rng_state(), state)


def test_overfits_one_batch():
    net, tokens = Llama(replace(SIZES, n_layers=2)).init_weights(), random_tokens(3, 12)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(80):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.05  # nats; ln 37 = 3.6 at the start


# -------------------------------------------------------------------------------- probabilities


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_logprobs_is_log_softmax_at_the_target(temperature):
    logits = torch.randn(3, 11, 37, generator=torch.Generator().manual_seed(0)) * 5
    targets = random_tokens(3, 11, seed=1)
    expected = F.log_softmax(logits / temperature, -1).gather(-1, targets[..., None])[..., 0]
    got = M.logprobs(logits, targets, temperature)
    assert got.dtype == torch.float32 and got.shape == (3, 11) and far(got, expected) < 1e-5


def test_logprobs_hand_worked():
    """Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8; at temperature 1/2: 1, 4, 25 / 30."""
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(1, 2, 3)
    expected = torch.tensor([[2 / 8, 5 / 8]]).log()
    assert far(M.logprobs(logits, torch.tensor([[1, 2]])), expected) < 1e-6
    half = M.logprobs(logits, torch.tensor([[1, 2]]), temperature=0.5)
    assert far(half, torch.tensor([[4 / 30, 25 / 30]]).log()) < 1e-6


def test_logprobs_of_bf16_logits_are_computed_in_float32():
    logits = torch.randn(1, 5, 37, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = F.log_softmax(logits.float(), -1)[..., 3]
    assert far(M.logprobs(logits, torch.full((1, 5), 3)), expected) < 1e-6


# -------------------------------------------------------------------------------------- uniform

MASK = (1 << 64) - 1


def splitmix(z: int) -> int:
    """The finaliser of splitmix64 on Python's unbounded integers (Steele et al. 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def grid(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs (row, position) below n."""
    return torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)


def test_uniform_equals_splitmix64_on_unbounded_integers():
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the published first output for state 0
    cases = [(s, r, p) for s in (0, 1, 7, 2**31, 2**32 - 1, 2**62) for r in (0, 5, 10**9)
             for p in (0, 3, 4095)]
    for seed, row, position in cases:
        bits = splitmix(splitmix(splitmix(seed) ^ row) ^ position)
        got = M.uniform(seed, torch.tensor([row]), torch.tensor([position]))
        assert got.dtype == torch.float32 and got.item() == (bits >> 40) / 2**24


def test_uniform_is_uniform():
    """2^18 draws in 256 bins: chi-squared has mean 255, std 22.6. All within 5 standard errors."""
    u = M.uniform(0, *grid(512))
    counts = torch.histc(u, 256, 0, 1)
    assert 0 <= u.min() and u.max() < 1
    assert abs(((counts - 1024) ** 2 / 1024).sum() - 255) < 5 * 22.6
    assert abs(u.mean() - 0.5) < 5 * 12**-0.5 / 512
    assert abs(u.var() - 1 / 12) < 5 * 180**-0.5 / 512


def test_uniform_is_independent_over_rows_positions_and_seeds():
    """Correlation of 2^18 neighbours has standard error 1/512; nearly all values are distinct."""
    rows, positions = grid(512)
    u = M.uniform(0, rows, positions)
    others = {"next row": M.uniform(0, rows + 1, positions),
              "next position": M.uniform(0, rows, positions + 1),
              "next seed": M.uniform(1, rows, positions),
              "row and position exchanged": M.uniform(0, positions, rows),
              "one row on, one position back": M.uniform(0, rows + 1, positions - 1)}
    for name, other in others.items():
        pairs = torch.stack((u, other))[:, rows != positions]
        assert abs(torch.corrcoef(pairs)[0, 1]) < 5 / 512, name
    assert len(u.unique()) > 0.99 * 2**18  # 2^18 of 2^24 values: 0.8% collide by chance


def test_uniform_is_a_pure_function():
    rows, positions = torch.tensor([4, 9, 2]), torch.tensor([1, 0, 8])
    together = M.uniform(5, rows, positions)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    alone = torch.cat([M.uniform(5, r[None], p[None]) for r, p in zip(rows, positions)])
    assert torch.equal(together, alone) and torch.equal(torch.get_rng_state(), state)
    assert rows.tolist() == [4, 9, 2] and positions.tolist() == [1, 0, 8]


# --------------------------------------------------------------------------------------- sample

SHUFFLED = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()  # most likely first: tokens 1 3 0 2


def picks(logits, us, temperature=1.0, top_p=1.0) -> list[int]:
    us = torch.as_tensor(us)
    return M.sample(logits.expand(len(us), -1), temperature, top_p, us).tolist()


def test_sample_at_temperature_zero_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.0]])
    assert M.sample(logits, 0, 0.5, torch.tensor([0.99, 0.99])).tolist() == [1, 0]
    assert M.sample(logits, 0.0, 1.0, torch.tensor([0.0, 0.5])).tolist() == [1, 0]


def test_sample_inverts_the_distribution_in_vocabulary_order():
    """Bounds .15, .65, .70, 1: token 0 below .15, token 1 up to .65, and so on."""
    us = [0.0, 0.14, 0.16, 0.64, 0.66, 0.69, 0.71, 0.999]
    assert picks(SHUFFLED, us) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_top_p_hand_worked():
    """Sorted .5 .3 .15 .05, mass before each 0 .5 .8 .95. top_p .7 keeps .5 and the crossing .3,
    renormalised .625 and .375; top_p .9 keeps three of sum .95, bounds .526, .842."""
    assert picks(SHUFFLED, [0.0, 0.62, 0.63, 0.9999], top_p=0.7) == [1, 1, 3, 3]
    assert picks(SHUFFLED, [0.52, 0.53, 0.84, 0.85, 0.9999], top_p=0.9) == [1, 3, 3, 0, 0]


def test_top_p_reached_exactly_keeps_the_next_token_as_metas_code_does():
    """Two tokens of 1/2 and top_p 1/2: the mass before the second is 1/2, not more: it stays."""
    assert sorted(set(picks(torch.zeros(2), [0.25, 0.75], top_p=0.5))) == [0, 1]
    assert len(set(picks(torch.zeros(2), [0.25, 0.75], top_p=0.49))) == 1


def test_top_p_zero_is_greedy():
    logits = torch.randn(64, 37, generator=torch.Generator().manual_seed(0))
    u = torch.linspace(0, 1 - 2**-24, 64)
    assert torch.equal(M.sample(logits, 1.0, 0.0, u), logits.argmax(-1))


def test_temperature_acts_before_top_p():
    """At temperature 1/2 the weights are .25 .09 .0225 .0025, of sum .365: .685 .247 .062 .007;
    top_p .65 keeps the first alone, though at temperature 1 it would keep two."""
    assert set(picks(SHUFFLED, [0.0, 0.5, 0.9999], temperature=0.5, top_p=0.65)) == {1}
    assert set(picks(SHUFFLED, [0.0, 0.5, 0.9999], temperature=1.0, top_p=0.65)) == {1, 3}


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.6, 1.0), (0.6, 0.9), (2.0, 0.5)])
def test_sample_frequencies_are_the_softmax(temperature, top_p):
    """u on a regular grid of n: each token comes n * p times, give or take the two ends."""
    n, logits = 20_000, torch.randn(37, generator=torch.Generator().manual_seed(0)) * 2
    p = torch.softmax(logits.double() / temperature, -1)
    ranked = p.sort(descending=True)
    kept = ranked.indices[(ranked.values.cumsum(0) - ranked.values) <= top_p]
    expected = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
    got = torch.tensor(picks(logits, (torch.arange(n) + 0.5) / n, temperature, top_p))
    assert far(torch.bincount(got, minlength=37) / n, expected) < 2 / n + 1e-6


def test_sampled_frequencies_with_our_random_numbers():
    """40,000 draws: each count within 4.5 standard deviations of the binomial."""
    n, logits = 40_000, torch.randn(11, generator=torch.Generator().manual_seed(0))
    u = M.uniform(3, torch.arange(n), torch.full((n,), 17))
    counts = torch.bincount(torch.tensor(picks(logits, u)), minlength=11)
    p = logits.softmax(-1)
    assert ((counts - n * p).abs() < 4.5 * (n * p * (1 - p)).sqrt()).all()


@pytest.mark.parametrize("top_p", [1.0, 0.999999, 0.9])
def test_a_token_of_probability_zero_is_never_sampled(top_p):
    """Forbidden tokens stand first, last and in between; u at both ends and everywhere between."""
    logits = torch.randn(37, generator=torch.Generator().manual_seed(0))
    forbidden = [0, 1, 5, 6, 20, 35, 36]
    logits[forbidden] = -math.inf
    us = torch.cat((torch.linspace(0, 1, 5000), torch.tensor([2**-24, 1 - 2**-24])))
    assert not set(picks(logits, us, top_p=top_p)) & set(forbidden)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("u", [1 - 2**-24, 1.0])
def test_u_near_one_takes_the_last_possible_token(u, top_p):
    """The sum of 32,000 float32 probabilities is not exactly 1: the pick must stay in range."""
    logits = torch.randn(200, 3200, generator=torch.Generator().manual_seed(0))
    logits[:, 3000:] = -math.inf
    got = M.sample(logits, 1.0, top_p, torch.full((200,), u))
    p = logits.softmax(-1)
    assert (p.gather(1, got[:, None]) > 0).all()
    if top_p == 1.0:
        assert (got >= 2990).all()
    else:
        likelier = (p > p.gather(1, got[:, None])).float() * p
        assert (abs(likelier.sum(-1) - top_p) < 0.01).all(), "the last token that top_p keeps"


def test_one_token_may_hold_all_probability():
    logits = torch.full((37,), -math.inf)
    logits[11] = 0.0
    assert set(picks(logits, [0.0, 0.5, 1 - 2**-24])) == {11}
    assert set(picks(logits, [0.0, 0.5, 1 - 2**-24], top_p=0.5)) == {11}


# ---------------------------------------------------------------- rollout, generate and stream

PROMPTS = [[5, 9], [1, 2, 3, 4, 5, 6, 7], [30], [8, 8, 8, 1]]


def talker() -> Llama:
    """Logits of std 1, so that float32 agrees within 1e-5."""
    return llama(scale=0.15)


@torch.no_grad()
def naive_rollout(net, prompt, new, temperature, top_p, seed, stop, row):
    """One answer by the definition: whole forward per token, u from (seed, row, position)."""
    text, logps = list(prompt), []
    while len(text) < min(len(prompt) + new, net.config.max_seq_len):
        logits = net(torch.tensor([text]))[:, -1]  # (1, V)
        u = M.uniform(seed, torch.tensor([row]), torch.tensor([len(text)]))
        token = M.sample(logits, temperature, top_p, u)
        logps.append(M.logprobs(logits, token, temperature or 1.0).item())
        text.append(token.item())
        if text[-1] == stop:
            break
    return text[len(prompt):], logps


@pytest.mark.parametrize("temperature, top_p, stop", [
    (0, 1.0, None), (1.5, 1.0, 10), (4.0, 0.9, 2)])
def test_rollout_equals_the_naive_loop_row_by_row(temperature, top_p, stop):
    """Rows end by stop, by max_new_tokens or by the context: some leave the batch midway."""
    net = talker()
    prompts = PROMPTS + [[i, 20] for i in range(8)]
    ids = [10 * i + 3 for i in range(12)]
    tokens, logps = M.rollout(net, prompts, 13, temperature, top_p, 5, stop, ids)
    for row, prompt in enumerate(prompts):
        expected = naive_rollout(net, prompt, 13, temperature, top_p, 5, stop, ids[row])
        assert tokens[row] == expected[0]
        assert np.abs(np.subtract(logps[row], expected[1])).max() < 1e-5
    if stop is not None:
        assert len({len(t) for t in tokens}) > 3, "the rows must end at different steps"


def test_rows_leave_the_batch_once_more_than_a_quarter_is_idle(monkeypatch):
    """Eight prompts of 8 to 15 tokens in a context of 19: the longest end first, one a step."""
    net, sizes = llama(), []
    hidden = net.hidden
    monkeypatch.setattr(net, "hidden", lambda tokens, *a, **k: sizes.append(len(tokens)) or
                        hidden(tokens, *a, **k))
    tokens, _ = M.rollout(net, [[1] * n for n in range(8, 16)], 99, 1.0, 1.0)
    assert [len(t) for t in tokens] == [11, 10, 9, 8, 7, 6, 5, 4]
    # after the prompts: 3 steps with all; rows end after 4, 5, 6, ...: 7 and 6 of 8 live is not yet
    # less than 3/4, 5 is; then 4 of 5 is not, 3 is; then 2, then 1
    assert sizes == [8, 8, 8, 8, 8, 8, 5, 5, 3, 2, 1]


def test_a_prompts_logits_are_the_same_alone_and_beside_longer_ones():
    net = talker()
    padded = torch.tensor([p + [0] * (7 - len(p)) for p in PROMPTS])
    cache = KVCache(5, 19)
    cached = net(padded, cache=cache, positions=torch.arange(7).expand(4, 7))
    plain = net(padded)
    for row, prompt in enumerate(PROMPTS):
        alone = net(torch.tensor([prompt]))[0]
        assert far(cached[row, :len(prompt)], alone) < 1e-5
        assert far(plain[row, :len(prompt)], alone) < 1e-5


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (0.6, 0.9), (3.0, 1.0)])
def test_a_prompts_continuation_is_the_same_alone_and_beside_longer_ones(temperature, top_p):
    net = talker()
    batch, logps = M.rollout(net, PROMPTS, 10, temperature, top_p, seed=2, stop=7)
    for row, prompt in enumerate(PROMPTS):
        alone, p = M.rollout(net, [prompt], 10, temperature, top_p, seed=2, stop=7, row_ids=[row])
        assert alone[0] == batch[row]
        assert np.abs(np.subtract(p[0], logps[row])).max() < 1e-5


def test_row_ids_name_the_rows_for_the_random_numbers():
    net, ids = llama(), [7, 3, 11, 0]
    first = M.generate(net, PROMPTS, 6, 3.0, 1.0, seed=1, row_ids=ids)
    order = [2, 0, 3, 1]
    moved = M.generate(net, [PROMPTS[i] for i in order], 6, 3.0, 1.0, seed=1,
                       row_ids=[ids[i] for i in order])
    assert moved == [first[i] for i in order]
    same = M.generate(net, [PROMPTS[0]] * 3, 6, 3.0, 1.0, seed=1, row_ids=[4, 5, 4])
    assert same[0] == same[2] != same[1]


def test_row_ids_default_to_the_row_numbers():
    net = llama()
    assert (M.generate(net, PROMPTS, 6, 3.0, 1.0, seed=1)
            == M.generate(net, PROMPTS, 6, 3.0, 1.0, seed=1, row_ids=[0, 1, 2, 3])
            != M.generate(net, PROMPTS, 6, 3.0, 1.0, seed=1, row_ids=[1, 2, 3, 4]))


def test_the_seed_decides_and_none_draws_a_new_one():
    net = llama()
    one = M.generate(net, PROMPTS, 9, 5.0, 1.0, seed=1)
    assert one == M.generate(net, PROMPTS, 9, 5.0, 1.0, seed=1)
    assert one != M.generate(net, PROMPTS, 9, 5.0, 1.0, seed=2)
    assert M.generate(net, PROMPTS, 9, 5.0, 1.0) != M.generate(net, PROMPTS, 9, 5.0, 1.0)
    assert list(M.stream(net, [1], 12, 5.0, 1.0)) != list(M.stream(net, [1], 12, 5.0, 1.0))


def test_generation_neither_reads_nor_moves_the_global_randomness():
    net, state = llama(), torch.get_rng_state()
    M.generate(net, PROMPTS, 6, 3.0, 1.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.5), (0, 1.0)])
@torch.no_grad()
def test_rollout_logprobs_equal_the_training_forward(temperature, top_p):
    """Those of the plain distribution at this temperature: top_p chooses, and changes no number."""
    net = talker()
    tokens, logps = M.rollout(net, PROMPTS, 8, temperature, top_p, seed=4)
    for prompt, answer, got in zip(PROMPTS, tokens, logps):
        row = torch.tensor([prompt + answer])
        again = M.logprobs(net(row[:, :-1]), row[:, 1:], temperature or 1.0)[0, len(prompt) - 1:]
        assert far(again, torch.tensor(got)) < 1e-5


def always(net: Llama, token: int) -> Llama:
    """A network whose every answer is `token`: the head reads a constant hidden state."""
    net.norm.weight.data.zero_()
    net.tok_embeddings.weight.data[:, 0] = 1e4  # nothing a block adds can outweigh it
    net.norm.weight.data[0] = 1.0
    net.output.weight.data.zero_()
    net.output.weight.data[token, 0] = 1.0
    return net


def test_the_stop_token_is_included_and_ends_the_row():
    net = llama()
    free = M.generate(net, PROMPTS, 9, 3.0, 1.0, seed=1)
    stop = free[1][4]
    for row, cut in zip(free, M.generate(net, PROMPTS, 9, 3.0, 1.0, seed=1, stop=stop)):
        assert cut == (row[:row.index(stop) + 1] if stop in row else row)
    assert M.generate(always(llama(), 4), PROMPTS, 9, 0, stop=4) == [[4]] * 4
    assert M.generate(always(llama(), 4), PROMPTS, 3, 0, stop=5) == [[4, 4, 4]] * 4


def test_a_stop_token_in_the_prompt_ends_nothing():
    assert M.generate(always(llama(), 4), [[7, 7, 1]], 3, 0, stop=7) == [[4, 4, 4]]


def test_token_zero_can_be_the_stop_token():
    assert M.generate(always(llama(), 0), [[7, 1]], 3, 0, stop=0) == [[0]]


@pytest.mark.parametrize("new", [0, 1, 5])
def test_max_new_tokens_is_kept_exactly(new):
    assert [len(t) for t in M.generate(llama(), PROMPTS, new, 1.0, 1.0, seed=0)] == [new] * 4


def test_negative_max_new_tokens_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens.*-2"):
        M.generate(llama(SMALL), PROMPTS, -2)


def test_generation_stops_when_the_context_is_full():
    """Context 19: prompts of 2, 7, 1, 4 and 18 tokens leave room for 17, 12, 18, 15 and 1."""
    tokens = M.generate(llama(), PROMPTS + [[1] * 18], 100, 1.0, 1.0, seed=0)
    assert [len(t) for t in tokens] == [17, 12, 18, 15, 1]


@pytest.mark.parametrize("temperature, top_p, stop", [(0, 1.0, None), (2.0, 0.9, 7)])
def test_stream_yields_the_tokens_of_generate(temperature, top_p, stop):
    net = llama()
    for prompt in PROMPTS:
        expected = M.generate(net, [prompt], 9, temperature, top_p, seed=6, stop=stop)[0]
        assert list(M.stream(net, prompt, 9, temperature, top_p, 6, stop)) == expected


def test_stream_computes_a_token_when_it_is_asked_for_and_keeps_no_graph():
    net, states = llama(SMALL), []
    net.norm.register_forward_hook(lambda module, inputs, output: states.append(output))
    answer = M.stream(net, [1, 2], 9, seed=0)
    assert not states
    next(answer), next(answer)
    assert len(states) == 2 and not any(state.requires_grad for state in states)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled(), "the caller's own"


def test_generation_defaults_are_the_papers_chat_settings(monkeypatch):
    """Temperature 0.6 and top-p 0.9 [L2 code]; rollout samples the plain distribution for PPO."""
    asked = []
    monkeypatch.setattr(M, "decode", lambda *a: asked.append(a[3:5]) or iter(()))
    M.generate(llama(SMALL), [[1]], 3), list(M.stream(llama(SMALL), [1], 3)), M.rollout(0, [[1]], 3)
    assert asked == [(0.6, 0.9), (0.6, 0.9), (1.0, 1.0)]


def test_a_model_can_be_trained_after_it_generated():
    """PPO's order: rollout first. Nothing that inference made may enter the training graph."""
    net = llama()
    M.generate(net, PROMPTS, 3, seed=0)
    assert all(g.isfinite().all() for g in gradients(net, random_tokens(2, 5)).values())


@pytest.mark.parametrize("prompts, words", [
    ([], "no prompts given"),
    ([[1], []], "prompt 1 has 0 tokens: this model's context holds 19"),
    ([[1], [2], [3] * 19], "prompt 2 has 19 tokens: this model's context holds 19"),
    ([[1, 37]], "prompt 0 has token ids outside 0..36: was it encoded with another tokenizer"),
    ([[1], [-1, 2]], "prompt 1 has token ids outside 0..36"),
])
def test_bad_prompts_are_refused_by_row(prompts, words):
    with pytest.raises(ValueError, match=words):
        M.check_prompts(prompts, SIZES)
    with pytest.raises(ValueError, match=words):
        M.generate(llama(SMALL), prompts, 3)


def test_prompts_at_the_edges_are_accepted():
    M.check_prompts([[0], [36] * 18], SIZES)


# ------------------------------------------------------------------------------- atomic writes


@pytest.fixture
def old(tmp_path) -> Path:
    """A file with content that must survive."""
    path = tmp_path / "file.pt"
    path.write_bytes(b"old")
    return path


def test_atomic_write_replaces_and_leaves_nothing_beside(old):
    M.atomic_write(old, lambda f: f.write(b"new"))
    assert old.read_bytes() == b"new" and os.listdir(old.parent) == ["file.pt"]


def test_atomic_write_makes_the_folder(tmp_path):
    M.atomic_write(tmp_path / "a" / "b" / "c", lambda f: f.write(b"new"))
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"new"


def test_atomic_write_syncs_the_bytes_then_renames_then_syncs_the_folder(old, monkeypatch):
    """Another order could leave, after a power cut, a new name with no content behind it."""
    steps, fsync, rename = [], os.fsync, os.replace

    def logged_fsync(fd):
        is_folder = os.path.isdir(f"/proc/self/fd/{fd}") or not os.fstat(fd).st_size
        steps.append("sync folder" if is_folder else f"sync {os.fstat(fd).st_size}")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: steps.append("rename") or rename(a, b))
    M.atomic_write(old, lambda f: f.write(b"12345"))
    assert steps == ["sync 5", "rename", "sync folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file(old, monkeypatch, call, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        M.atomic_write(old, lambda f: f.write(b"new"))
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["file.pt"]


def test_an_error_while_writing_leaves_the_old_file(old):
    def write(f):
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        M.atomic_write(old, write)
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["file.pt"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_write_leaves_the_old_file_and_the_next_write_cleans_up(old):
    def write_half_and_die(f):
        f.write(b"half")
        f.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            M.atomic_write(old, write_half_and_die)
        finally:
            os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert old.read_bytes() == b"old"
    assert sorted(os.listdir(old.parent)) == ["file.pt", "file.pt.tmp"]
    M.atomic_write(old, lambda f: f.write(b"new"))
    assert old.read_bytes() == b"new" and os.listdir(old.parent) == ["file.pt"]


@contextlib.contextmanager
def full_disk():
    """Inside, files cannot grow beyond 4096 bytes: the kernel refuses, as on a full disk.

    No longer than the write itself: the test runner's own output may be a file, too.
    """
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [
    lambda path: M.save(path, llama(), "pretrain", b"tok"),
    lambda path: M.atomic_write(path, lambda f: f.write(b"x" * 9999))])
def test_a_full_disk_is_one_oserror_and_the_old_file_stays(old, write):
    with full_disk(), pytest.raises(OSError) as e:
        write(old)
    assert "\n" not in str(e.value)
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["file.pt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   RuntimeError("PytorchStreamWriter failed writing file\nat: 1")])
def test_write_torch_file_failing_is_one_oserror_and_the_old_file_stays(old, monkeypatch, error):
    def fail(value, f):
        f.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    for write in (lambda: M.save(old, llama(SMALL), "sft", b"tok"),
                  lambda: M.write_torch_file({}, old)):
        with pytest.raises(OSError) as e:
            write()
        assert "\n" not in str(e.value)
        if isinstance(error, RuntimeError):
            assert str(old) in str(e.value) and "disk full?" in str(e.value)
        assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["file.pt"]


# --------------------------------------------------------------------------------- checkpoints

PARTS = ["stage", "config", "weights", "tokenizer", "metrics", "trained_on"]
CONTENTS = {"text": b"hello world\n" * 99, "zip": b"PK\x03\x04" + b"\0" * 99,
            "pickle": pickle.dumps({}), "zeros": b"\0" * 5000}


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "pretrain.pt"
    M.save(path, llama(), "pretrain", b"tok\x00\xff", {"loss": 1.5}, "tiny world")
    return path


@pytest.mark.parametrize("scalar_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(tmp_path, scalar_head, dtype):
    net = llama(replace(SIZES, scalar_head=scalar_head), dtype)
    M.save(tmp_path / "a.pt", net, "reward", bytes(range(256)), {"loss": 1.5, "n": 3}, "pairs")
    back, info = M.load(tmp_path / "a.pt", device="cpu")
    assert back.config == net.config and type(back.config) is ModelConfig
    assert list(back.state_dict()) == list(net.state_dict())
    for name, p in net.state_dict().items():
        assert back.state_dict()[name].dtype == dtype and torch.equal(back.state_dict()[name], p)
    assert info == {"format": 1, "stage": "reward", "config": asdict(net.config),
                    "tokenizer": bytes(range(256)), "metrics": {"loss": 1.5, "n": 3},
                    "trained_on": "pairs"}
    assert torch.equal(back(random_tokens(3, 11)), net(random_tokens(3, 11)))


def test_save_with_a_dtype_converts_the_file_but_not_the_model(tmp_path):
    net = llama()
    M.save(tmp_path / "a.pt", net, "sft", b"tok", dtype=torch.bfloat16)
    back, info = M.load(tmp_path / "a.pt", device="cpu")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert torch.equal(back.output.weight, net.output.weight.bfloat16())
    assert info["metrics"] == {} and info["trained_on"] == ""


def test_save_takes_weights_gathered_elsewhere(tmp_path):
    """A model spread over devices holds only a share of each tensor; the whole ones are given."""
    net, gathered = llama(SMALL), llama(SMALL, seed=1).state_dict()
    M.save(tmp_path / "a.pt", net, "sft", b"tok", weights=gathered)
    back, _ = M.load(tmp_path / "a.pt", device="cpu")
    assert torch.equal(back.output.weight, gathered["output.weight"])
    assert not torch.equal(back.output.weight, net.output.weight)


def test_load_with_a_dtype_converts_the_model(saved):
    back, _ = M.load(saved, device="cpu", dtype=torch.float64)
    assert {p.dtype for p in back.parameters()} == {torch.float64}


def test_a_checkpoint_without_tokenizer_can_be_saved(tmp_path):
    M.save(tmp_path / "a.pt", llama(SMALL), "pretrain", b"")
    assert M.load(tmp_path / "a.pt", "cpu")[1]["tokenizer"] == b""


def test_a_loaded_model_can_be_trained_and_the_file_does_not_change(saved):
    before, (net, _) = saved.read_bytes(), M.load(saved, device="cpu")
    gradients(net, random_tokens(2, 5))
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not torch.equal(net.output.weight, llama().output.weight)
    assert saved.read_bytes() == before


def test_a_checkpoint_can_be_written_over_the_file_it_is_mapped_from(saved):
    net, _ = M.load(saved, device="cpu")
    M.save(saved, net, "sft", b"tok")
    assert torch.equal(net.output.weight, llama().output.weight)
    assert torch.equal(M.load(saved, device="cpu")[0].output.weight, llama().output.weight)


def test_the_file_is_read_with_plain_torch(saved):
    """Tensors and plain values only: nothing of ours is needed to open it."""
    data = torch.load(saved, weights_only=True)
    assert set(data) == {"format", *PARTS}
    assert data["format"] == 1 and data["config"] == asdict(SIZES)
    assert bytes(data["tokenizer"].numpy()) == b"tok\x00\xff"
    assert set(data["weights"]) == set(llama().state_dict())


def anonymous_memory() -> int:
    """RssAnon in bytes: memory that is not a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_load_maps_the_file_and_uses_no_anonymous_memory(tmp_path):
    config = ModelConfig(512, 1, 8, 2, 1024, 24000, 16)
    M.save(tmp_path / "big.pt", Llama(config), "pretrain", b"tok")
    assert (tmp_path / "big.pt").stat().st_size > 100e6
    before = anonymous_memory()
    net, _ = M.load(tmp_path / "big.pt", device="cpu")
    total = sum(p.sum() for p in net.parameters())  # touches every page
    assert total.isfinite() and anonymous_memory() - before < 8e6


def edited(path: Path, change) -> Path:
    """The checkpoint at `path` with its dictionary changed."""
    data = torch.load(path, weights_only=True)
    change(data)
    torch.save(data, path)
    return path


def error_of(path, load=M.load) -> str:
    with pytest.raises(ValueError) as e:
        load(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", ["pretrain.pt", "pretrain.state.pt", "sft.pt", "ppo.pt",
                                  "gatt.pt"])
def test_a_missing_checkpoint_names_the_command_that_makes_it(tmp_path, name):
    script = name.split(".")[0] + ".py"
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist: `python {script}`"):
        M.load(tmp_path / name)


def test_a_missing_reward_model_names_reward_py(tmp_path, monkeypatch):
    """reward_safety.pt is made by reward.py; the test gives model.py a neighbour of that name."""
    (tmp_path / "reward.py").write_text('"""A stage."""\nSTAGE = "reward"\n')
    monkeypatch.setattr(M, "__file__", str(tmp_path / "model.py"))
    with pytest.raises(FileNotFoundError, match="`python reward.py` makes it"):
        M.load(tmp_path / "reward_safety.pt")


@pytest.mark.parametrize("name", ["mine.pt", "model.pt", "data.pt", "chat.pt", "exam_1.pt"])
def test_a_missing_file_of_another_name_claims_no_command(tmp_path, name):
    """model.py, data.py, chat.py and exam.py make no checkpoint: only a stage, which says STAGE."""
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist: check the path"):
        M.load(tmp_path / name)


def test_a_folder_is_not_called_missing(tmp_path):
    """It may be a Hugging Face or Meta folder: the message must lead to convert.py."""
    assert "--to own" in error_of(tmp_path)


@pytest.mark.parametrize("part", [0.0, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_line(saved, part):
    whole = saved.read_bytes()
    saved.write_bytes(whole[:int(len(whole) * part)])
    assert "truncated" in error_of(saved)


@pytest.mark.parametrize("content", CONTENTS)
def test_a_file_of_another_kind_is_one_line_and_names_the_converter(saved, content):
    saved.write_bytes(CONTENTS[content])
    assert "--to own" in error_of(saved)


@pytest.mark.parametrize("value", [{"model": torch.ones(2)}, [1, 2], torch.ones(3)])
def test_a_torch_file_that_is_no_checkpoint_names_the_converter(saved, value):
    torch.save(value, saved)
    assert f"`python convert.py --checkpoint {saved} --to own --out NEW.pt`" in error_of(saved)


def test_an_unknown_format_number_is_refused(saved):
    assert "format 2" in error_of(edited(saved, lambda d: d.update(format=2)))


@pytest.mark.parametrize("key", PARTS)
def test_an_incomplete_checkpoint_names_what_it_lacks(saved, key):
    assert f"it lacks {key}" in error_of(edited(saved, lambda d: d.pop(key)))


def test_an_unknown_config_key_is_named(saved):
    words = error_of(edited(saved, lambda d: d["config"].update(n_experts=8)))
    assert "configuration" in words and "n_experts" in words


@pytest.mark.parametrize("change", [dict(n_heads=5), dict(n_heads=0), dict(dim="48")])
def test_an_impossible_config_is_one_line_with_the_file(saved, change):
    error_of(edited(saved, lambda d: d["config"].update(change)))


@pytest.mark.parametrize("key", ["config", "weights", "tokenizer"])
def test_a_part_of_the_wrong_type_is_one_line_with_the_file(saved, key):
    error_of(edited(saved, lambda d: d.update({key: 3})))


def test_a_missing_and_an_unknown_weight_are_both_named(saved):
    def change(d):
        d["weights"]["layers.0.attention.wz.weight"] = d["weights"].pop("layers.3.ffn_norm.weight")

    words = error_of(edited(saved, change))
    assert "lacks layers.3.ffn_norm.weight" in words
    assert "has unknown layers.0.attention.wz.weight" in words


def test_many_wrong_weights_are_listed_in_short(saved):
    words = error_of(edited(saved, lambda d: d["weights"].clear()))
    assert words.count(".weight") == 4 and words.endswith(" ...")


def test_a_wrong_shape_is_named_with_both_shapes(saved):
    def change(d):
        d["weights"]["layers.1.attention.wk.weight"] = torch.ones(48, 16)

    words = error_of(edited(saved, change))
    assert "layers.1.attention.wk.weight has shape (48, 16)" in words and "(16, 48)" in words


@pytest.mark.parametrize("value, kind", [(3, "int"), (torch.ones(48, dtype=torch.int64), "int64")])
def test_a_weight_that_is_no_floating_point_tensor_is_named(saved, value, kind):
    words = error_of(edited(saved, lambda d: d["weights"].update({"norm.weight": value})))
    assert "norm.weight is" in words and kind in words


def test_assemble_uses_the_given_tensors_without_copying():
    weights = llama(SMALL).state_dict()
    net = M.assemble(SMALL, weights, "memory")
    assert net.output.weight.data_ptr() == weights["output.weight"].data_ptr()
    assert all(p.device.type == "cpu" and p.requires_grad for p in net.parameters())


class Evil:
    """Unpickling it would create the file `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


EVIL_FILES = ["zip", "legacy", "pickle"]  # the formats of PyTorch, and Python's own


def write_evil_file(path, proof, kind):
    """A file of `kind` that would make the folder `proof` if its code ran."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"format": 1, "weights": Evil(proof)}))
    else:
        torch.save({"format": 1, "weights": Evil(proof)}, path,
                   _use_new_zipfile_serialization=kind == "zip")


@pytest.mark.parametrize("kind", EVIL_FILES)
def test_a_pickle_that_asks_to_run_code_does_not_run(tmp_path, kind):
    path, proof = tmp_path / "pretrain.pt", tmp_path / "proof"
    write_evil_file(path, proof, kind)
    words = error_of(path)
    assert not proof.exists()
    assert kind != "zip" or "it asks to run code" in words


def test_metrics_are_saved_as_plain_numbers(old):
    """A NumPy number would be pickled as code: such a file could never be opened again."""
    M.save(old, llama(SMALL), "sft", b"tok", {"loss": np.float64(1.5)})
    assert M.load(old, "cpu")[1]["metrics"] == {"loss": 1.5}


# ------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("cuda, mps, kind", [(True, True, "cuda"), (True, False, "cuda"),
                                             (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert M.pick_device("auto") == M.pick_device() == torch.device(kind)


def test_a_named_device_is_taken_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert M.pick_device("cpu") == torch.device("cpu")
    assert M.pick_device("cuda:3") == torch.device("cuda", 3)
    assert M.pick_device(torch.device("cpu")) == torch.device("cpu")
    for name in ("mps", "gpu", "tpu:0"):
        with pytest.raises(ValueError, match=f"device '{name}' is not available: choose auto or "
                                             "one of cuda, cpu$"):
            M.pick_device(name)


def test_autocast_is_bf16_on_cuda_only(monkeypatch):
    """On the CPU and on MPS the context does nothing; on CUDA torch.autocast takes bfloat16."""
    monkeypatch.setattr(torch, "autocast", lambda *a: a)
    for name in ("cpu", "mps"):
        with M.autocast(torch.device(name)):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert M.autocast(torch.device("cuda", 1)) == ("cuda", torch.bfloat16)


# ------------------------------------------------------------------------------- where it stands


def test_the_network_imports_no_other_room():
    root = Path(M.__file__).parent
    ours = sorted(path.stem for path in root.glob("*.py"))
    code = f"import sys, model; print([name for name in {ours} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "['model']\n", done.stdout + done.stderr


# ---- files from the wild


def damaged(value: float, place: str = "all") -> Llama:
    net = Llama(ModelConfig(12, 2, 3, 1, 20, 40, 64)).init_weights()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if place in ("all", name):
                p.fill_(value)
    return net


@pytest.mark.parametrize("value, place", [
    (math.nan, "all"), (math.nan, "layers.1.ffn_norm.weight"), (math.inf, "output.weight"),
    (math.nan, "layers.0.attention.wv.weight")])
@pytest.mark.parametrize("path", ["torch", "c"])
def test_logits_that_are_no_numbers_end_with_one_line(value, place, path):
    """By each way to speak: whole answers and token by token, greedy and drawn, PyTorch and C."""
    import kernels
    from kernels.decode import Decoder

    net = damaged(value, place)
    if path == "c" and "C" not in kernels.choose("auto"):
        pytest.skip("no C compiler")
    try:
        for temperature in (0.0, 1.0):
            with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
                if path == "torch":
                    list(M.stream(net, [1, 5, 7], 9, temperature, seed=0))
                else:
                    kernels.rollout(net, [[1, 5, 7], [1, 2]], 9, temperature)
        if path == "c":
            for dtype in ("fp32", "bf16", "int8"):
                with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
                    list(Decoder.of(net, dtype).stream([1, 5, 7], 9, 1.0, seed=0))
    finally:
        kernels.choose("torch")


def test_a_long_context_costs_what_is_used_of_it():
    """A million positions are 1.6 GiB of float64 angles; three tokens need four thousand."""
    net = Llama(ModelConfig(256, 1, 2, 1, 20, 40, 1 << 20)).init_weights()
    assert len(M.generate(net, [[1, 5, 7]], 4, temperature=0)[0]) == 4
    assert net._rope[0].shape == (4096, 64)
    short, long = Llama(ModelConfig(12, 1, 3, 1, 20, 40, 9000)).init_weights(), 5000
    tokens = torch.randint(40, (1, long), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        short(tokens[:, :3])
        assert len(short._rope[0]) == 4096
        grown = short(tokens)
        assert len(short._rope[0]) == 9000  # twice what is needed, at most the context
        short._rope = None
        assert torch.equal(short(tokens), grown)


def test_a_decoder_with_a_long_context_builds_its_table_as_it_reads():
    import kernels
    from kernels.decode import Decoder

    if "C" not in kernels.choose("auto"):
        pytest.skip("no C compiler")
    kernels.choose("torch")
    net = Llama(ModelConfig(12, 1, 3, 1, 20, 40, 9000)).init_weights()
    decoder, prompt = Decoder.of(net, "fp32"), [1, 5] * 2100
    assert list(decoder.stream([1, 5, 7], 3, 0.0)) == list(M.stream(net, [1, 5, 7], 3, 0.0))
    assert len(decoder._rope[0]) == 4096
    assert list(decoder.stream(prompt, 3, 0.0)) == list(M.stream(net, prompt, 3, 0.0))
    assert 4200 < len(decoder._rope[0]) <= 9000


@pytest.mark.parametrize("kind", ["link", "link to a link", "dangling"])
def test_what_is_written_through_a_link_goes_where_it_leads(kind, tmp_path):
    (tmp_path / "disk").mkdir()
    target, path = tmp_path / "disk" / "x.pt", tmp_path / "x.pt"
    path.symlink_to(target)
    if kind == "link to a link":
        (tmp_path / "y.pt").symlink_to(path)
        path = tmp_path / "y.pt"
    if kind != "dangling":
        target.write_bytes(b"old")
    M.atomic_write(path, lambda f: f.write(b"new"))
    assert path.is_symlink() and target.read_bytes() == b"new"
    assert sorted(p.name for p in (tmp_path / "disk").iterdir()) == ["x.pt"]
