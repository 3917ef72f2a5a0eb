"""kernels/decode: one answer in fp32, bf16, int8 and int4 is what float64 says of those weights.

Tolerances, relative to the largest logit: fp32 1e-5 as in test_kernels. The others are judged by
float64 with the weights as they were rounded, so that what is left is the rounding of inputs: of
the cache to bf16 (8 bits: 4e-3 per number), of each product's input to int8 (a group's largest
number is 127: 4e-3 of it per number, in every layer). These networks have large weights, which make
the worst of it; a wrong scale, column or row is an error of order 1.
"""
import ctypes
import gc
import math
import os
import weakref

import pytest
import torch

import convert
import data
import model as M
from kernels import build
from test_kernels import DEEP_K, ODD, ONE_KV, SMALLEST, TALKER, in_float64, network, random_tokens

try:
    build.load_library()
except OSError as e:
    pytest.skip(str(e), allow_module_level=True)

from kernels.decode import AT_ONCE, FORMATS, Decoder, Matrix, memory

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 4e-2, "int4": 4e-2}
#                     D   L  H KV  F   V  context: rows and columns beyond one block of weights
WIDE = M.ModelConfig(300, 2, 6, 3, 290, 67, 300)


@pytest.fixture
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------ the formats


def steps(w, kind):
    """The step of each group, float32 (rows, groups), by decode.c's definition, in PyTorch."""
    rows, cols = w.shape
    groups = torch.nn.functional.pad(w, (0, -cols % 32)).view(rows, -1, 32)
    if kind == "int8":
        return (groups.abs().amax(-1) / 127).bfloat16().float()
    most = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best, step = torch.zeros(groups.shape[:2]), torch.zeros(groups.shape[:2])
    for i in range(9):
        q = (groups * (-(7 + i / 4) / most)).nan_to_num(0).round().clamp(-8, 7)
        wq, qq = (groups * q).sum(-1), (q * q).sum(-1)
        better = wq * wq > best * qq
        best, step = (torch.where(better, a, b) for a, b in ((wq * wq / qq, best), (wq / qq, step)))
    return step.bfloat16().float()


def rounded(w, kind):
    """A matrix as its format holds it, float32."""
    if kind in ("fp32", "bf16"):
        return w.to(torch.bfloat16).float() if kind == "bf16" else w
    d = steps(w, kind).repeat_interleave(32, 1)[:, : w.shape[1]]
    limits = (-127, 127) if kind == "int8" else (-8, 7)
    return torch.where(d == 0, 0.0, (w / d).round().clamp(*limits)) * d


def pack(w, kind):
    """The bytes of a matrix, quantised in C: uint8 (tiles, groups, bytes)."""
    lib, (rows, cols) = build.load_library(), w.shape
    stored = next(k for k, d in (("fp32", torch.float32), ("bf16", torch.bfloat16),
                                 ("fp16", torch.float16)) if d == w.dtype)
    matrix = Matrix(w.data_ptr(), rows, cols, FORMATS.index(stored))
    out = memory(lib.packed_bytes(rows, cols, FORMATS.index(kind)))
    lib.quantise(ctypes.byref(matrix), FORMATS.index(kind), out.data_ptr(), 2)
    return out.view(-(-rows // 16), -(-cols // 32), -1)


def unpack(packed, kind, zero):
    """float32 (tiles * 16, groups * 32) from the layout that machine.h describes."""
    tiles, groups, _ = packed.shape
    d = packed[..., :32].contiguous().view(torch.bfloat16).float()  # (tiles, groups, 16)
    q = packed[..., 32:].view(tiles, groups, -1, 16, 4).int()  # four columns of 16 rows
    if kind == "int4":
        q = torch.cat((q & 15, q >> 4), 2) - 8
    else:
        q = (q - zero + 128) % 256 - 128
    q = q.permute(0, 3, 1, 2, 4).reshape(tiles * 16, groups, 32)
    return (q * d.permute(0, 2, 1).reshape(tiles * 16, groups, 1)).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows, cols", [(1, 1), (16, 32), (37, 70), (53, 331)])
def test_a_matrix_is_rounded_as_its_format_says(kind, dtype, rows, cols):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
    w[0, 0] = 0
    zero = int(pack(torch.zeros(1, 1), "int8")[0, 0, -1])  # how this machine writes an int8 of 0
    held = unpack(pack(w, kind), kind, zero)
    step = steps(w.float(), kind).repeat_interleave(32, 1)[:, :cols]
    error = (held[:rows, :cols] - w.float()).abs() / step.abs().clamp(min=1e-30)
    if kind == "int8":
        assert error.max() <= 0.5001
    torch.testing.assert_close(held[:rows, :cols], rounded(w.float(), kind), rtol=0,
                               atol=float(step.abs().max()) * 1.01)  # a tie may fall either way
    assert (error > 0.5001).float().mean() < 0.1  # only what int4 cuts at its ends
    assert held[rows:].abs().sum() == 0 and held[:, cols:].abs().sum() == 0


def test_int4_chooses_a_better_step_than_the_extreme_number_alone():
    """Q4_0's step makes the number of greatest size exactly -8; the search must win by far."""
    w = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    groups = w.view(64, -1, 32)
    plain = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = ((groups / plain).round().clamp(-8, 7) * plain).view_as(w)
    ours = unpack(pack(w, "int4"), "int4", 0)
    assert (ours - w).square().mean() < 0.93 * (plain - w).square().mean()


# ------------------------------------------------------------------- logits against float64


def exact_logits(net, tokens, kind):
    """float64 (T, V) of the network with its matrices as this format holds them."""
    twin = in_float64(net)
    for name, p in twin.named_parameters():
        if p.dim() == 2 and name != "tok_embeddings.weight":
            own = "int8" if (kind, name) == ("int4", "output.weight") else kind
            p.data = rounded(net.get_parameter(name).data, own).double()
    with torch.no_grad():
        return twin(torch.tensor([tokens]))[0]


def assert_near(ours, exact, kind):
    error = (ours.double() - exact).abs().max() / exact.abs().max()
    assert error < TOLERANCE[kind], f"{kind}: error {error:.1e} of the largest logit"


@pytest.mark.parametrize("kind", TOLERANCE)
@pytest.mark.parametrize("config, threads", [
    (ODD, 1), (SMALLEST, 1), (ONE_KV, 1), (DEEP_K, 1), (WIDE, 1), (ODD, 2), (WIDE, 3),
    (SMALLEST, 3)], indirect=["threads"])
def test_logits_are_those_of_float64(config, kind, threads):
    """Token by token, in matrix form, and a prompt in parts; with 3 threads, some have no work."""
    net = network(config)
    tokens = random_tokens(config, min(config.max_seq_len - 1, 150 // threads)).tolist()
    exact = exact_logits(net, tokens, kind)
    decoder = Decoder.of(net, kind)
    assert_near(decoder.logits(tokens), exact, kind)
    decoder.read = []
    assert_near(decoder._generate(tokens, 1)[1], exact[-1], kind)
    decoder.read = []
    decoder._generate(tokens[:7], 0)
    assert_near(decoder._generate(tokens[7:], 1)[1], exact[-1], kind)
    assert decoder.read == tokens


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_weight_that_is_not_finite_reaches_the_logits(kind):
    for value in (float("nan"), float("inf"), -float("inf")):
        net = network(ODD)
        with torch.no_grad():
            net.layers[0].feed_forward.w_up.weight[3, 7] = value
        assert not Decoder.of(net, kind).logits([1, 2]).isfinite().any()


# ----------------------------------------------------------------------------------- tokens

PROMPT = [1, 2, 3]


def sharp():
    net = network(TALKER, gain=6.0)  # decided enough that rounding does not choose tokens
    rng = torch.Generator().manual_seed(1)  # a head like the embedding repeats one word for ever
    torch.nn.init.normal_(net.output.weight, std=0.12, generator=rng)
    return net


def test_500_greedy_tokens_in_fp32_are_those_of_pytorch():
    net = sharp()
    ours = list(Decoder.of(net, "fp32").stream(PROMPT, 500, temperature=0))
    assert ours == list(M.stream(net, PROMPT, 500, temperature=0)) and len(set(ours)) > 50


@pytest.mark.parametrize("options", [dict(temperature=1.0, top_p=1.0, seed=-3),
                                     dict(temperature=0.6, top_p=0.9, seed=2**31)])
def test_sampled_tokens_in_fp32_are_those_of_pytorch(options):
    net, prompt = sharp(), random_tokens(TALKER, 300).tolist()  # several calls read the prompt
    assert len(prompt) > 2 * AT_ONCE
    ours = list(Decoder.of(net, "fp32").stream(prompt, 40, **options))
    assert ours == list(M.stream(net, prompt, 40, **options))


def test_an_answer_ends_with_the_stop_token():
    decoder = Decoder.of(sharp(), "int8")
    free = list(decoder.stream(PROMPT, 50, temperature=0))
    stop = free[20]
    assert list(decoder.stream(PROMPT, 50, 0, stop=stop)) == free[: free.index(stop) + 1]


@pytest.mark.parametrize("context, count", [(None, 5), (10, 4)])
def test_an_answer_ends_where_the_context_ends(context, count):
    prompt = random_tokens(TALKER, 595 if context is None else 6).tolist()
    assert len(list(Decoder.of(sharp(), "int4", context).stream(prompt, 20, 0))) == count


def test_a_dialogue_reads_only_what_is_new_and_says_the_same():
    net, prompt = sharp(), random_tokens(TALKER, 40).tolist()
    decoder, calls = Decoder.of(net, "fp32"), []
    generate = decoder._generate
    decoder._generate = lambda tokens, *rest: calls.append(len(tokens)) or generate(tokens, *rest)
    answer = list(decoder.stream(prompt, 30, temperature=0))
    longer = prompt + answer + [5, 6, 7]
    calls.clear()
    again = list(decoder.stream(longer, 30, temperature=0))
    assert calls[0] == 4  # the answer's last token was drawn, not read
    assert again == list(Decoder.of(net, "fp32").stream(longer, 30, temperature=0))
    other = prompt[:20] + [9]  # a dialogue that took another turn
    assert list(decoder.stream(other, 9, 0)) == list(Decoder.of(net, "fp32").stream(other, 9, 0))


def test_an_answer_left_in_the_middle_does_no_harm():
    decoder = Decoder.of(sharp(), "fp32")
    whole = list(decoder.stream(PROMPT, 60, temperature=0))
    answer = decoder.stream(PROMPT, 60, temperature=0)
    assert [next(answer) for _ in range(3)] == whole[:3]
    answer.close()
    assert list(decoder.stream(PROMPT + whole[:10], 50, temperature=0)) == whole[10:]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores have no numbers here")
@pytest.mark.parametrize("threads", [3], indirect=True)
def test_threads_keep_to_the_cores_that_the_process_may_use(threads):
    """Each begins on a core of its own, but not on a forbidden one, and the caller stays free."""
    before, prompt = os.sched_getaffinity(0), [1, 2, 3]
    decoder = Decoder.of(network(TALKER), "fp32")
    answer = list(decoder.stream(prompt, 20, temperature=0.0))
    assert os.sched_getaffinity(0) == before
    one = {min(before)}
    os.sched_setaffinity(0, one)
    try:
        decoder.read = []
        assert list(decoder.stream(prompt, 20, temperature=0.0)) == answer
        assert os.sched_getaffinity(0) == one
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_the_same_call_gives_the_same_tokens(kind, threads):
    net = network(TALKER)
    a, b = (list(Decoder.of(net, kind).stream(PROMPT, 80, 1.0, 1.0, seed=5)) for _ in range(2))
    assert a == b


@pytest.mark.parametrize("make, said", [
    (lambda net: Decoder.of(net, "fp16"), "choose fp32, bf16, int8 or int4"),
    (lambda net: Decoder.of(M.Llama(M.ModelConfig(2, 1, 1, 1, 1, 3, 16, scalar_head=True)), "int8"),
     "scores answers"),
    (lambda net: list(Decoder.of(net, "fp32").stream([], 5)), "prompt 0 has 0 tokens"),
    (lambda net: list(Decoder.of(net, "fp32").stream([211], 5)), "outside 0..210"),
    (lambda net: list(Decoder.of(net, "fp32", 8).stream([1] * 8, 5)), "the decoder's context 8")])
def test_what_cannot_be_is_one_clear_line(make, said):
    with pytest.raises(ValueError, match=said):
        make(sharp())


# ----------------------------------------------------------------------------------- memory


def test_weights_are_taken_one_at_a_time():
    """A weight is gone before the next but one is asked for: no copy of the model is ever whole."""
    net, alive, most = network(ODD), weakref.WeakSet(), 0

    def reader(p):
        def read():
            nonlocal most
            gc.collect()
            most = max(most, len(alive))
            w = p.detach().clone()
            alive.add(w)
            return w
        return read

    names = [n for n, p in net.named_parameters() if p.dim() == 2 and n != "tok_embeddings.weight"]
    weights = {n: reader(p) if n in names else (lambda p=p: p) for n, p in net.named_parameters()}
    Decoder(ODD, weights, "int4")
    assert most <= 1


@pytest.mark.parametrize("kind, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_format_that_the_file_has_already_is_not_copied(kind, dtype):
    net = network(ODD).to(dtype)
    decoder = Decoder.of(net, kind)
    w = net.layers[1].attention.wk.weight
    assert decoder._network.layers[1].wk.data == w.data_ptr() and decoder._packed.numel() == 1


@pytest.mark.parametrize("kind, bits", [("int8", 8.5), ("int4", 4.5)])
def test_a_weight_takes_its_bits_and_half_a_bit_for_the_step(kind, bits):
    """At sizes that are multiples of a tile; without embeddings, and int4 with output in int8."""
    c = M.ModelConfig(64, 2, 4, 2, 96, 48, 16)
    matrices = M.count_parameters(c) - 48 * 64 - 5 * 64
    head = 48 * 64 * (8.5 - bits)
    assert Decoder.of(network(c), kind)._packed.numel() * 8 == matrices * bits + head


# ---------------------------------------------------------------------------------- formats


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One small model in every format that convert.py reads."""
    folder = tmp_path_factory.mktemp("formats")
    tokenizer = data.Tokenizer(data.train_tokenizer(["one two three four five"] * 3, 280))
    config = M.ModelConfig(36, 2, 6, 2, 54, tokenizer.vocab_size, 64)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    M.save(folder / "own.pt", network(config, gain=6.0), "sft", tokenizer.model_bytes)
    for to, out, more in (("meta", "meta", {"shards": 2}), ("hf", "hf", {}),
                          ("llama2c", "l2c.bin", {}), ("hf", "hf16", {"dtype": "fp16"})):
        convert.main(convert.Config(str(folder / "own.pt"), to, str(folder / out), **more))
    return folder


@pytest.mark.parametrize("name", ["meta", "hf", "l2c.bin", "hf16"])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_every_format_speaks_the_same_tokens(checkpoints, name, kind):
    def say(path):
        source = convert.open_model(path, checkpoints / "tokenizer.model")
        weights = {n: w.read for n, w in source.weights.items()}
        return Decoder(source.config, weights, kind).logits([1, 30, 40, 50])
    ours, expected = say(checkpoints / name), say(checkpoints / "own.pt")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.05 if name == "hf16" else 0)
    assert math.isfinite(float(expected.sum()))
