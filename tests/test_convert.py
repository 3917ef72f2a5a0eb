"""convert.py: every format in and out, against the libraries that own them and a NumPy twin.

The sizes are all different (heads, key/value heads, half head size, layers, ...), so that a swapped
axis cannot pass by luck. transformers, safetensors, gguf and llama_cpp are used when installed.
"""

import gc
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import convert
import data
import model
import stage
from model import Llama, ModelConfig

torch.set_num_threads(1)

TEXT = ["The baker Ada lives in the red house. def f(x):\n    return x + 1\n",
        "Once upon a time there were 3 little pigs, 17 wolves; they said: \"no!\"   ok\n\n",
        "if a == b:\n        print('equal')\n    else:\n\treturn [i for i in range(10)]\n",
        "\n".join(" " * n + "x = aaaaaaa" for n in range(1, 40))] * 40
VOCAB = 400  # 259 reserved + characters + merges, runs of spaces among them


@pytest.fixture(scope="session")
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(data.train_tokenizer(TEXT, VOCAB))


def random_model(seed=0, **sizes) -> Llama:
    """Grouped-query, every size different: H 6, KV 2, hd 10 (pairs 5), F 88, L 3; large weights."""
    shape = dict(dim=60, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=88, vocab_size=VOCAB,
                 max_seq_len=64)
    network = Llama(ModelConfig(**{**shape, **sizes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.25 if p.dim() == 2 else 0.3))
            if p.dim() == 1:
                p.add_(1)
    return network


@pytest.fixture(scope="session")
def network() -> Llama:
    return random_model()


@pytest.fixture(scope="session")
def own(network, tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("own") / "own.pt"
    model.save(path, network, "sft", tokenizer.model_bytes, {"loss": 1.5}, "a test")
    return path


def run(source, to, out, **options) -> Path:
    convert.main(convert.Config(checkpoint=str(source), to=to, out=str(out), **options))
    return Path(out)


def same_weights(a: Llama, b: Llama) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def tokens(n=(2, 11), seed=0):
    return torch.randint(3, VOCAB, n, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------- names, rotary order, shards


def test_every_weight_has_a_distinct_name_in_every_format(network):
    for column in (convert.META, convert.HF, convert.GGUF):
        theirs = [convert.lookup(name, column) for name in network.state_dict()]
        assert len(set(theirs)) == len(theirs) == 2 + 1 + 3 * 9
    up = "layers.2.feed_forward.w_up.weight"
    assert convert.lookup(up, convert.META) == "layers.2.feed_forward.w3.weight"


def test_rows_of_a_head_of_eight_move_to_0_2_4_6_1_3_5_7():
    """Two heads of 8 rows: each is reordered within itself, and back."""
    w = torch.arange(16.0)[:, None]
    moved = convert.to_halves(w, 8)[:, 0].tolist()
    assert moved == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(convert.to_neighbours(convert.to_halves(w, 8), 8), w)


def test_turning_halves_of_moved_rows_gives_the_scores_of_turning_neighbours():
    """q.k is the same for (neighbours, W) and (halves, moved W); for (halves, W) it is not."""
    hd, T, D = 6, 5, 7
    rng = np.random.default_rng(0)
    x, wq, wk = rng.normal(size=(T, D)), rng.normal(size=(hd, D)), rng.normal(size=(hd, D))
    angle = np.arange(T)[:, None] * 10000.0 ** (-np.arange(0, hd, 2) / hd)  # (T, hd/2)
    cos, sin = np.cos(angle), np.sin(angle)

    def halves(y):
        a, b = y[:, : hd // 2], y[:, hd // 2 :]
        return np.concatenate((a * cos - b * sin, a * sin + b * cos), 1)

    def neighbours(y):
        y, table = torch.tensor(y)[None, :, None], (torch.tensor(cos), torch.tensor(sin))
        return model.rotate(y, *table)[0, :, 0].numpy()

    def moved(w):
        return convert.to_halves(torch.tensor(w), hd).numpy()

    want = neighbours(x @ wq.T) @ neighbours(x @ wk.T).T
    assert np.allclose(halves(x @ moved(wq).T) @ halves(x @ moved(wk).T).T, want, atol=1e-12)
    assert not np.allclose(halves(x @ wq.T) @ halves(x @ wk.T).T, want, atol=0.1)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_meta_shards_merge_to_identical_weights(shards, tokenizer, tmp_path):
    network = random_model(dim=96, n_heads=16, n_kv_heads=8, hidden_dim=104)  # hd 6, kv dim 48
    model.save(tmp_path / "own.pt", network, "sft", tokenizer.model_bytes)
    folder = run(tmp_path / "own.pt", "meta", tmp_path / "meta", shards=shards)
    assert len(list(folder.glob("consolidated.*.pth"))) == shards
    part = torch.load(folder / f"consolidated.{shards - 1:02d}.pth", weights_only=True)
    n = shards  # Meta cuts outputs, but the inputs of wo and w2 and the embedding's features
    want = {"tok_embeddings": (400, 96 // n), "layers.1.attention.wq": (96 // n, 96),
            "layers.1.attention.wk": (48 // n, 96), "layers.1.attention.wv": (48 // n, 96),
            "layers.1.attention.wo": (96, 96 // n), "layers.1.feed_forward.w1": (104 // n, 96),
            "layers.1.feed_forward.w2": (96, 104 // n), "layers.1.feed_forward.w3": (104 // n, 96),
            "layers.1.ffn_norm": (96,), "norm": (96,), "output": (400 // n, 96)}
    assert {name: tuple(part[name + ".weight"].shape) for name in want} == want
    assert torch.equal(part["layers.1.feed_forward.w3.weight"],
                       network.layers[1].feed_forward.w_up.weight.chunk(n)[-1])
    merged, text = convert.load(folder)
    assert same_weights(merged, network) and text.model_bytes == tokenizer.model_bytes


def test_params_json_of_meta_is_reproduced_from_the_shapes_alone():
    """The published files: 7B and 13B have multiple_of 256, 70B 4096 with multiplier 1.3."""
    p = model.PRESETS
    assert convert.ffn_rule(p["7b"].dim, p["7b"].hidden_dim) == (256, None)
    assert convert.ffn_rule(p["13b"].dim, p["13b"].hidden_dim) == (256, None)
    assert convert.ffn_rule(p["70b"].dim, p["70b"].hidden_dim) == (4096, 1.3)
    for dim, hidden in [(60, 88), (96, 104), (2048, 5632), (288, 768), (64, 1), (64, 7919)]:
        multiple, multiplier = convert.ffn_rule(dim, hidden)
        assert model.ffn_dim(dim, multiple, multiplier) == hidden


def test_meta_extras_are_understood(network, own, tmp_path):
    """rope.freqs is ignored, the tokenizer may lie in the parent, other thetas are kept."""
    folder = run(own, "meta", tmp_path / "7b")
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save({**weights, "rope.freqs": torch.ones(5)}, folder / "consolidated.00.pth")
    (folder / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    params = json.loads((folder / "params.json").read_text())
    assert params["vocab_size"] == -1 and "rope_theta" not in params and params["n_kv_heads"] == 2
    (folder / "params.json").write_text(json.dumps({**params, "rope_theta": 1e6}))
    merged, _ = convert.load(folder)
    assert same_weights(merged, network) and merged.config.rope_theta == 1e6


# --------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="session")
def hf_folder(own, tmp_path_factory) -> Path:
    return run(own, "hf", tmp_path_factory.mktemp("hf") / "model")


def hf_logits(folder):
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForCausalLM
    theirs, loading = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        return theirs.eval(), theirs(tokens()).logits


def test_transformers_reads_our_folder_with_equal_logits_and_greedy_text(network, hf_folder):
    theirs, logits = hf_logits(hf_folder)
    with torch.no_grad():
        want = network(tokens())
    assert want.abs().max() > 3 and (logits - want).abs().max() < 1e-4
    prompt = tokens((1, 5))
    answer = theirs.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None,
                             pad_token_id=0, attention_mask=torch.ones_like(prompt))[0, 5:].tolist()
    assert answer == model.generate(network, prompt.tolist(), 20, temperature=0)[0]
    assert len(set(answer)) > 5, answer


def test_transformers_reads_our_sharded_folder(network, own, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    folder = run(own, "hf", tmp_path / "sharded")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert not (folder / "model.safetensors").exists()
    with torch.no_grad():
        assert (hf_logits(folder)[1] - network(tokens())).abs().max() < 1e-4
    assert same_weights(convert.load(folder)[0], network)


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_we_read_folders_of_transformers_with_equal_logits(form, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=60, intermediate_size=88, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, initializer_range=0.3)
    torch.manual_seed(1)
    theirs = transformers.LlamaForCausalLM(shape).eval()
    size = "100KB" if form == "sharded" else "1GB"
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=size)
    assert (tmp_path / "hf" / "model.safetensors").exists() == (form != "sharded")
    if form == "bin":
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    ours, _ = convert.load(tmp_path / "hf", tmp_path / "tokenizer.model")
    assert ours.config.rope_theta == 500 and ours.config.max_seq_len == 64
    with torch.no_grad():
        want = theirs(tokens()).logits
        assert want.abs().max() > 3 and (ours(tokens()) - want).abs().max() < 1e-4


def test_hugging_face_round_trip_without_any_library(network, own, hf_folder, tmp_path):
    back, text = convert.load(hf_folder)
    assert same_weights(back, network) and back.config == network.config
    again = run(hf_folder, "own", tmp_path / "again.pt")  # no view may drag its whole file along
    assert same_weights(model.load(again, "cpu")[0], network)
    assert abs(again.stat().st_size - own.stat().st_size) < 1000
    half, _ = convert.load(hf_folder, dtype=torch.bfloat16)
    assert torch.equal(half.output.weight, network.output.weight.bfloat16())


@pytest.mark.parametrize("dtype, kept", [(None, torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("to", ["own", "meta", "hf"])
def test_numbers_keep_their_dtype_unless_another_is_asked_for(to, dtype, kept, network, tokenizer,
                                                              tmp_path):
    model.save(tmp_path / "half.pt", network, "sft", tokenizer.model_bytes, dtype=torch.bfloat16)
    out = run(tmp_path / "half.pt", to, tmp_path / "out", dtype=dtype)
    back = convert.load(out)[0].state_dict()
    for name, w in network.state_dict().items():
        assert back[name].dtype == kept and torch.equal(back[name], w.bfloat16().to(kept)), name


def test_shared_embeddings_are_untied_by_copying(network, hf_folder, tmp_path):
    folder = tmp_path / "tied"
    folder.mkdir()
    config = json.loads((hf_folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes((hf_folder / "tokenizer.model").read_bytes())
    weights = convert.read_safetensors(hf_folder / "model.safetensors")
    del weights["lm_head.weight"]
    convert.write_safetensors(folder / "model.safetensors",
                              {n: convert.lazy(t) for n, t in weights.items()})
    untied, _ = convert.load(folder)
    assert torch.equal(untied.output.weight, network.tok_embeddings.weight)
    with torch.no_grad():
        untied.output.weight.zero_()
    assert torch.equal(untied.tok_embeddings.weight, network.tok_embeddings.weight)


def test_safetensors_bytes_are_the_golden_ones(tmp_path):
    """Eight bytes of header length, the header padded to a multiple of 8, the rows in order."""
    a, b = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([3.0])
    tensors = {"a": convert.lazy(a.bfloat16()), "b": convert.lazy(b.bfloat16())}
    convert.write_safetensors(tmp_path / "t", tensors)
    header = (b'{"__metadata__":{"format":"pt"},'
              b'"a":{"dtype":"BF16","shape":[1,3],"data_offsets":[0,6]},'
              b'"b":{"dtype":"BF16","shape":[1],"data_offsets":[6,8]}}')
    header += b" " * (-len(header) % 8)
    data_bytes = bytes.fromhex("803f" "00c0" "003f" "4040")  # 1, -2, .5, 3 as bf16, little-endian
    assert (tmp_path / "t").read_bytes() == len(header).to_bytes(8, "little") + header + data_bytes
    back = convert.read_safetensors(tmp_path / "t")
    assert torch.equal(back["a"], a.bfloat16()) and torch.equal(back["b"], b.bfloat16())


def test_safetensors_agree_with_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    kinds = "float64 float32 float16 bfloat16 int64 int32 uint8".split()
    want = {kind: torch.arange(15).reshape(3, 5).to(getattr(torch, kind)) for kind in kinds}
    want |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}
    library.save_file(want, tmp_path / "theirs")
    got = convert.read_safetensors(tmp_path / "theirs")
    assert got.keys() == want.keys() and all(torch.equal(got[n], want[n]) for n in want)
    assert all(got[n].dtype == want[n].dtype for n in want)
    convert.write_safetensors(tmp_path / "ours", {n: convert.lazy(t) for n, t in want.items()})
    got = library.load_file(tmp_path / "ours")
    assert all(torch.equal(got[n], want[n]) and got[n].dtype == want[n].dtype for n in want)


def test_opening_maps_the_file_instead_of_reading_it(tokenizer, tmp_path):
    """64 MB of weights: no more than the rows of wq and wk that move is copied."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc to see anonymous memory")

    def anonymous():  # MB
        gc.collect()
        return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024

    network = random_model(dim=64, n_heads=4, n_layers=1, hidden_dim=80_000)
    model.save(tmp_path / "own.pt", network, "sft", tokenizer.model_bytes)
    for to in ("hf", "meta"):
        folder = run(tmp_path / "own.pt", to, tmp_path / to)
        before = anonymous()
        opened, _ = convert.load(folder)
        assert anonymous() - before < 8, to
        assert same_weights(opened, network)


# ------------------------------------------------------------------------------------- tokenizer


def strings(n: int) -> list[str]:
    """Leading spaces, runs of spaces, newlines, emoji, code, control characters, many scripts."""
    rng = random.Random(0)
    words = ["the", "Ada", "house", "return", "def", "x", "17", "3.5", "range(10)", "é", "你好",
             "🙂", "👩‍👩‍👧", "\u0000", "\u200b", "ﬁ", "Ω", "<s", "[INST]", "<0x0A>", "'", '"no!"',
             "equal", "a" * 4, "a" * 9]
    gaps = ["", " ", "  ", "   ", "\n", "\n    ", "\n\n\t", "\r\n", "\u00a0", "▁"]
    gaps += [" " * n for n in range(4, 40)]  # longer than the longest piece, 16
    made = ["", " ", "a", " a", "  a", "a ", " " * 40, "\n", "\n    return", TEXT[0], TEXT[2] * 3]
    while len(made) < n:
        made.append("".join(rng.choice(gaps) + rng.choice(words) for _ in range(rng.randint(1, 9)))
                    + rng.choice(gaps))
    return made


def test_the_exported_tokenizer_gives_the_same_ids_in_transformers(tokenizer, hf_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(hf_folder)
    assert {"▁" * 6, "▁" * 16} < set(map(tokenizer.piece, range(VOCAB)))  # what goes wrong
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    for text in strings(3500):
        ids = tokenizer.encode(text, bos=True)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids), repr(text)
    assert theirs("a", add_special_tokens=False)["input_ids"] == tokenizer.encode("a")


DIALOGS = [["user", " Who is Ada?\n"], ["system", "Be kind. ", "user", "Hi"],
           ["user", "Hi", "assistant", " Hello  there ", "user", "1 + 1?"],
           ["system", "S", "user", "a\nb", "assistant", "c", "user", "d", "assistant", "e"]]


@pytest.mark.parametrize("dialog", DIALOGS)
def test_the_exported_chat_template_gives_the_ids_of_encode_dialog(dialog, tokenizer, hf_folder):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("jinja2")
    theirs = transformers.AutoTokenizer.from_pretrained(hf_folder)
    messages = [{"role": r, "content": c} for r, c in zip(dialog[::2], dialog[1::2])]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ids == data.encode_dialog(tokenizer, messages)[0]


def test_the_exported_chat_template_refuses_roles_out_of_turn(hf_folder):
    transformers, jinja2 = pytest.importorskip("transformers"), pytest.importorskip("jinja2")
    theirs = transformers.AutoTokenizer.from_pretrained(hf_folder)
    with pytest.raises(jinja2.exceptions.TemplateError, match="take turns"):
        theirs.apply_chat_template([{"role": "user", "content": "a"}] * 2, tokenize=False)


def test_llama2c_tokenizer_file_holds_every_piece_and_score(tokenizer):
    content = convert.tokenizer_bin(tokenizer)
    longest, at, pieces = struct.unpack("<I", content[:4])[0], 4, []
    while at < len(content):
        score, size = struct.unpack("<fI", content[at : at + 8])
        pieces.append((content[at + 8 : at + 8 + size].decode(), score))
        at += 8 + size
    assert len(pieces) == VOCAB and longest == max(len(p.encode()) for p, _ in pieces)
    assert pieces[1][0] == "\n<s>\n" and pieces[13][0] == "<0x0A>"
    for i in range(3, VOCAB):
        assert pieces[i] == (tokenizer.piece(i).replace("▁", " "), np.float32(tokenizer.score(i)))


# --------------------------------------------------------------------- llama2.c and the NumPy twin


class Twin:
    """Llama in NumPy float64 with plain loops, reading a llama2.c version 0 file."""

    def __init__(self, path):
        raw = Path(path).read_bytes()
        self.D, self.F, self.L, self.H, self.KV, V, self.T = struct.unpack("<7i", raw[:28])
        numbers, self.at = np.frombuffer(raw, "<f4", offset=28).astype(np.float64), 0
        self.V, self.hd = abs(V), self.D // self.H

        def take(*shape):
            size = int(np.prod(shape))
            self.at += size
            return numbers[self.at - size : self.at].reshape(shape)

        D, F, L, kv = self.D, self.F, self.L, self.KV * self.hd
        self.embedding = take(self.V, D)
        self.norm1 = take(L, D)
        self.wq, self.wk, self.wv = take(L, D, D), take(L, kv, D), take(L, kv, D)
        self.wo, self.norm2 = take(L, D, D), take(L, D)
        self.w1, self.w2, self.w3 = take(L, F, D), take(L, D, F), take(L, F, D)
        self.norm3 = take(D)
        take(self.T, self.hd)  # the two rotary tables: computed below instead
        self.output = self.embedding if V > 0 else take(self.V, D)
        assert self.at == len(numbers)

    def rms(self, x, weight):
        return x / np.sqrt((x * x).mean() + 1e-5) * weight

    def turn(self, head, position):
        out = head.copy()
        for i in range(self.hd // 2):
            angle = position * 10000.0 ** (-2 * i / self.hd)
            a, b = head[2 * i], head[2 * i + 1]
            out[2 * i] = a * np.cos(angle) - b * np.sin(angle)
            out[2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def logits(self, ids):
        keys = [[] for _ in range(self.L)]  # per layer: one list of (k, v) heads per position
        for position, token in enumerate(ids):
            x = self.embedding[token].copy()
            for l in range(self.L):
                y = self.rms(x, self.norm1[l])
                q = (self.wq[l] @ y).reshape(self.H, self.hd)
                k = (self.wk[l] @ y).reshape(self.KV, self.hd)
                v = (self.wv[l] @ y).reshape(self.KV, self.hd)
                keys[l].append(([self.turn(h, position) for h in k], v))
                mixed = []
                for h in range(self.H):
                    group = h // (self.H // self.KV)
                    turned = self.turn(q[h], position)
                    scores = np.array([turned @ past[0][group] for past in keys[l]])
                    weights = np.exp((scores - scores.max()) / np.sqrt(self.hd))
                    weights /= weights.sum()
                    mixed.append(sum(w * past[1][group] for w, past in zip(weights, keys[l])))
                x = x + self.wo[l] @ np.concatenate(mixed)
                y = self.rms(x, self.norm2[l])
                gate = self.w1[l] @ y
                x = x + self.w2[l] @ (gate / (1 + np.exp(-gate)) * (self.w3[l] @ y))
            yield self.output @ self.rms(x, self.norm3)

    def greedy(self, prompt, n):
        ids = list(prompt)
        for _ in range(n):
            *_, last = self.logits(ids)
            ids.append(int(last.argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="session")
def llama2c(own, tmp_path_factory) -> Path:
    return run(own, "llama2c", tmp_path_factory.mktemp("c") / "model.bin")


def test_a_naive_numpy_llama_gives_the_same_logits_and_text(llama2c, tokenizer, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    ours, _ = convert.load(llama2c, tmp_path / "t.model", dtype=torch.float64)
    twin, ids = Twin(llama2c), tokens((1, 12))
    with torch.no_grad():
        mine = ours(ids)[0].numpy()
    theirs = np.stack(list(twin.logits(ids[0].tolist())))
    assert mine.dtype == np.float64 and np.abs(theirs).max() > 3
    assert np.abs(mine - theirs).max() < 1e-10
    prompt = tokenizer.encode("The baker", bos=True)
    assert twin.greedy(prompt, 16) == model.generate(ours, [prompt], 16, temperature=0)[0]


def write_llama2c(path, network, version, shared):
    """Versions 1 and 2 as runq.c reads them: norms, embedding, then each kind for all layers."""
    c, w = network.config, network.state_dict()
    kinds = [f"attention.{k}" for k in ("wq", "wk", "wv", "wo")]
    kinds += [f"feed_forward.{k}" for k in ("w_gate", "w_down", "w_up")]  # w1, w2, w3
    matrices = [w["tok_embeddings.weight"]]
    matrices += [w[f"layers.{i}.{kind}.weight"] for kind in kinds for i in range(c.n_layers)]
    matrices += [] if shared else [w["output.weight"]]
    with open(path, "wb") as f:
        head = struct.pack("<Ii7iB", 0x616B3432, version, c.dim, c.hidden_dim, c.n_layers,
                           c.n_heads, c.n_kv_heads, c.vocab_size, c.max_seq_len, shared)
        f.write((head + (struct.pack("<i", 20) if version == 2 else b"")).ljust(256, b"\0"))
        for norm in ("attention_norm", "ffn_norm"):
            for i in range(c.n_layers):
                f.write(w[f"layers.{i}.{norm}.weight"].numpy().tobytes())
        f.write(w["norm.weight"].numpy().tobytes())
        for m in matrices:
            if version == 1:
                f.write(m.numpy().tobytes())
                continue
            groups = m.reshape(-1, 20)
            scale = groups.abs().amax(1) / 127
            f.write((groups / scale[:, None]).round().to(torch.int8).numpy().tobytes())
            f.write(scale.numpy().tobytes())


@pytest.mark.parametrize("version, shared", [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_llama2c_versions_1_and_2_are_read(version, shared, network, tokenizer, tmp_path):
    write_llama2c(tmp_path / "m.bin", network, version, shared)
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    got = convert.load(tmp_path / "m.bin", tmp_path / "t.model")[0].state_dict()
    want = network.state_dict()
    if shared:
        want["output.weight"] = want["tok_embeddings.weight"]
    for name, w in want.items():  # int8 in groups of 20: at most half a step of max/127 off
        bound = w.abs().max() / 127 * 0.51 if version == 2 and w.dim() == 2 else 0
        assert (got[name] - w).abs().max() <= bound, name


def test_a_positive_vocabulary_in_version_0_shares_the_classifier(network, llama2c, tokenizer,
                                                                  tmp_path):
    content = llama2c.read_bytes()[: -4 * VOCAB * 60]
    (tmp_path / "m.bin").write_bytes(content[:20] + struct.pack("<i", VOCAB) + content[24:])
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    got, _ = convert.load(tmp_path / "m.bin", tmp_path / "t.model")
    assert torch.equal(got.output.weight, network.tok_embeddings.weight)


def test_llama2c_carries_a_file_to_every_other_format(network, llama2c, tokenizer, tmp_path):
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    out = run(llama2c, "own", tmp_path / "own.pt", tokenizer=str(tmp_path / "t.model"))
    back, info = model.load(out, "cpu")
    assert same_weights(back, network) and info["stage"] == "converted"
    assert info["tokenizer"] == tokenizer.model_bytes and "llama2.c" in info["trained_on"]


# ------------------------------------------------------------------------------------------ GGUF


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_blocks_equal_ggml_bit_for_bit(kind):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    rows = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    rows[0] = 0  # a block of zeros has d = 0
    rows[1] = torch.arange(96) / 127 * 0.5 - 0.1
    rows[2, ::2], rows[2, 1::2] = 8, -8  # the first of two equal extremes decides the sign
    rows[3] = (torch.arange(96) % 32 - 16) * 0.5 + 0.25  # many halves: which way they round
    rows[3, ::32] = -127 * 0.5
    want = quants.quantize(rows.numpy(), constants.GGMLQuantizationType[kind.upper()])
    pack = {"q8_0": convert.q8_0, "q4_0": convert.q4_0}[kind]
    assert np.array_equal(pack(rows).reshape(40, -1).numpy(), want)
    assert torch.equal(pack(rows.bfloat16()), pack(rows.bfloat16().float()))


def test_a_block_quantised_by_hand():
    """q8_0, greatest |x| 127: d = 1, so values are roundf(x): .5 -> 1, -2.5 -> -3, 2.4 -> 2.

    q4_0, extreme -8: d = 1 (0x3c00 as float16), codes are trunc(x + 8.5): -8 -> 0, 0 -> 8,
    .5 -> 9, 8 -> 16 -> 15. Value j is in the low half of byte j, value j + 16 in its high half.
    """
    x = torch.zeros(32)
    x[:5] = torch.tensor([127, 0.5, -2.5, 2.4, -127])
    assert convert.q8_0(x)[0].tolist() == [0, 0x3C, 127, 1, 256 - 3, 2, 256 - 127] + [0] * 27
    x = torch.zeros(32)
    x[0], x[1], x[16], x[17] = -8, 0.5, 8, -1
    assert convert.q4_0(x)[0].tolist() == [0, 0x3C, 0xF0, 0x79] + [0x88] * 14


def gguf_model(tokenizer, path) -> Llama:
    """dim 64 fills two blocks of 32; hidden_dim 88 does not, so w_down must fall back."""
    network = random_model(dim=64, n_heads=4, hidden_dim=88)
    model.save(path, network, "sft", tokenizer.model_bytes)
    return network


def test_gguf_calls_each_weight_by_llama_cpps_name_and_aligns_odd_sizes(network, own, tmp_path):
    """Names written out by hand; dim 60: a norm has 240 bytes, what follows it starts at 256."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(run(own, "gguf", tmp_path / "m.gguf", dtype="fp32"))
    tensors, layer = {t.name: t.data for t in reader.tensors}, network.layers[1]
    a, f = layer.attention, layer.feed_forward
    want = {"token_embd": network.tok_embeddings, "blk.1.attn_norm": layer.attention_norm,
            "blk.1.attn_q": a.wq, "blk.1.attn_k": a.wk, "blk.1.attn_v": a.wv,
            "blk.1.attn_output": a.wo, "blk.1.ffn_norm": layer.ffn_norm, "blk.1.ffn_gate": f.w_gate,
            "blk.1.ffn_up": f.w_up, "blk.1.ffn_down": f.w_down, "output_norm": network.norm,
            "output": network.output}
    for name, module in want.items():
        assert np.array_equal(tensors[name + ".weight"], module.weight.detach().numpy()), name


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "q8_0", "q4_0"])
def test_the_gguf_package_reads_every_tensor_and_all_metadata(dtype, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    network = gguf_model(tokenizer, tmp_path / "own.pt")
    reader = gguf.GGUFReader(run(tmp_path / "own.pt", "gguf", tmp_path / "m.gguf", dtype=dtype))
    got = {key: f.contents() for key, f in reader.fields.items()}
    want = {"general.architecture": "llama", "llama.context_length": 64,
            "llama.embedding_length": 64, "llama.block_count": 3, "llama.feed_forward_length": 88,
            "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0,
            "llama.vocab_size": VOCAB, "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": convert.CHAT_TEMPLATE,
            "general.file_type": {"fp32": 0, "fp16": 1, "q8_0": 7, "q4_0": 2}[dtype]}
    assert {key: got[key] for key in want} == want
    assert got["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert got["tokenizer.ggml.tokens"] == [tokenizer.piece(i) for i in range(VOCAB)]
    assert np.allclose(got["tokenizer.ggml.scores"], [tokenizer.score(i) for i in range(VOCAB)])
    kinds = {"normal": 1, "unknown": 2, "control": 3, "byte": 6}
    assert got["tokenizer.ggml.token_type"] == [kinds[tokenizer.kind(i)] for i in range(VOCAB)]

    tensors, weights = {t.name: t for t in reader.tensors}, network.state_dict()
    assert len(tensors) == len(reader.tensors) == len(weights)
    for name, w in weights.items():
        t = tensors[convert.lookup(name, convert.GGUF)]
        kind = ("F32" if w.dim() == 1 else {"fp32": "F32", "fp16": "F16"}.get(dtype, dtype.upper()))
        if w.dim() == 2 and dtype.startswith("q"):
            kind = "F16" if "w_down" in name else "Q8_0" if name == "output.weight" else kind
        assert t.tensor_type.name == kind and t.shape.tolist() == list(reversed(w.shape)), name
        values = gguf.quants.dequantize(t.data, t.tensor_type).reshape(w.shape)
        step = {"F32": 0, "F16": 2**-11, "Q8_0": 0.5 / 127 + 2**-11, "Q4_0": 1 / 8 + 2**-11}[kind]
        assert np.abs(values - w.numpy()).max() <= step * w.abs().max(), name
        exact = gguf.quants.quantize(w.numpy(), t.tensor_type)
        assert np.array_equal(t.data.view(np.uint8).ravel(), exact.view(np.uint8).ravel()), name


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "q8_0"])
def test_llama_cpp_answers_our_gguf_as_we_do(dtype, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    network = gguf_model(tokenizer, tmp_path / "own.pt")
    path = run(tmp_path / "own.pt", "gguf", tmp_path / "m.gguf", dtype=dtype)
    theirs = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    text = "The baker Ada   lives\n    return 17"
    prompt = tokenizer.encode(text, bos=True)
    assert theirs.tokenize(text.encode(), add_bos=True) == prompt
    theirs.eval(prompt)
    with torch.no_grad():
        want = network(torch.tensor([prompt]))[0].numpy()
    got = np.array(theirs.scores[: len(prompt)])
    bound = {"fp32": 2e-2, "fp16": 5e-2, "q8_0": 1.0}[dtype]  # its activations are rounded too
    assert np.abs(got - want).max() < bound, np.abs(got - want).max()
    if dtype == "fp32":
        stream = theirs.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answer = [token for token, _ in zip(stream, range(12))]
        assert answer == model.generate(network, [prompt], 12, temperature=0)[0]


# --------------------------------------------------------------------------------- what goes wrong


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


def refuses(path, message, **options):
    """load raises one clear line, quickly, that contains the message."""
    with pytest.raises((ValueError, FileNotFoundError), match=message) as e:
        convert.load(path, **options)
    assert "\n" not in str(e.value), str(e.value)


@pytest.mark.parametrize("place", ["x.pt", "meta/consolidated.00.pth", "hf/pytorch_model.bin"])
def test_a_pickle_that_runs_code_is_refused(place, own, hf_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(own, "meta", tmp_path / "meta")
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / "hf" / name).write_bytes((hf_folder / name).read_bytes())
    torch.save({"output.weight": Attack()}, tmp_path / place)
    refuses(tmp_path / place, "run code")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.3, 0.999])
def test_truncated_files_are_refused(fraction, own, hf_folder, llama2c, tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    meta = run(own, "meta", tmp_path / "meta")
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    for source, target in [(own, tmp_path / "own.pt"), (llama2c, tmp_path / "m.bin"),
                           (meta / "consolidated.00.pth", meta / "consolidated.00.pth"),
                           (hf_folder / "model.safetensors", hf / "model.safetensors")]:
        content = source.read_bytes()
        target.write_bytes(content[: int(len(content) * fraction)])
        refuses(target, "truncated|is empty|not a", tokenizer=tmp_path / "tokenizer.model")


def changed_hf(hf_folder, folder, change=lambda weights: weights, **config) -> Path:
    folder.mkdir()
    old = json.loads((hf_folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, **config}))
    (folder / "tokenizer.model").write_bytes((hf_folder / "tokenizer.model").read_bytes())
    weights = change(convert.read_safetensors(hf_folder / "model.safetensors"))
    convert.write_safetensors(folder / "model.safetensors",
                              {n: convert.lazy(t) for n, t in weights.items()})
    return folder


def test_wrong_names_and_shapes_are_listed(hf_folder, tmp_path):
    def rename(w):
        return {n.replace("model.norm.weight", "model.strange.weight"): t for n, t in w.items()}

    def stretch(w):
        return {**w, "model.norm.weight": torch.ones(61)}

    refuses(changed_hf(hf_folder, tmp_path / "a", rename), "lacks norm.weight.*unknown model.str")
    refuses(changed_hf(hf_folder, tmp_path / "b", stretch), r"norm.weight has shape \(61,\)")
    with pytest.raises(ValueError, match=r"norm.weight has shape \(61,\)"):  # streaming, too
        run(tmp_path / "b", "gguf", tmp_path / "b.gguf")
    assert not (tmp_path / "b.gguf").exists()
    refuses(changed_hf(hf_folder, tmp_path / "c", num_hidden_layers=2), "unknown model.layers.2")
    refuses(changed_hf(hf_folder, tmp_path / "d", num_key_value_heads=3), "wk.weight has shape")


@pytest.mark.parametrize("config, message", [
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type is 'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type is 'linear'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"head_dim": 16}, "head_dim is 16"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "60"}, "hidden_size is '60'"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"vocab_size": None}, "vocab_size is None")])
def test_other_architectures_are_refused_by_name(config, message, hf_folder, tmp_path):
    refuses(changed_hf(hf_folder, tmp_path / "x", **config), message)


def test_missing_pieces_are_named(own, hf_folder, llama2c, tokenizer, tmp_path, monkeypatch):
    refuses(tmp_path / "nowhere.pt", "does not exist")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "neither params.json .* nor config.json")
    alone = tmp_path / "alone.bin"
    alone.write_bytes(llama2c.read_bytes())
    refuses(alone, "no alone.tokenizer.bin lies beside it: pass --tokenizer")
    meta = run(own, "meta", tmp_path / "meta", shards=2)
    torch.save({"model": {}}, meta / "consolidated.01.pth")
    refuses(meta, "something else than named tensors")
    torch.save({"norm.weight": torch.ones(60)}, meta / "consolidated.01.pth")
    refuses(meta, "not hold the same names and shapes as consolidated.00.pth")
    (meta / "consolidated.01.pth").unlink()
    refuses(meta, "has 1 files consolidated.* cut into 2 parts")
    (meta / "tokenizer.model").unlink()
    refuses(meta, "no tokenizer.model")
    monkeypatch.setattr(convert, "SHARD_BYTES", 100_000)
    sharded = run(own, "hf", tmp_path / "hf")
    sorted(sharded.glob("model-*"))[1].unlink()
    refuses(sharded, r"lacks model-00002.* has only \d+ of the \d+ files in model.safetensors")
    other = tmp_path / "other.model"
    other.write_bytes(data.train_tokenizer(TEXT, VOCAB + 2))
    refuses(hf_folder, f"tokenizer has {VOCAB + 2} pieces, the model {VOCAB}", tokenizer=other)
    (tmp_path / "x.gguf").write_bytes(b"GGUF1234")
    refuses(tmp_path / "x.gguf", "x.gguf is not a readable GGUF file: .*version")


def test_bad_commands_write_nothing(own, tokenizer, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    (tmp_path / "full" / "a.tokenizer.bin").write_text("precious")
    reward = Llama(ModelConfig(8, 1, 2, 1, 12, VOCAB, 16, scalar_head=True)).init_weights()
    model.save(tmp_path / "reward.pt", reward, "reward", tokenizer.model_bytes)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    for message, options in [
            ("never overwritten", dict(to="own", out=str(own))),
            ("never overwritten", dict(to="hf", out=str(tmp_path / "full"))),
            ("never overwritten", dict(to="llama2c", out=str(tmp_path / "full" / "a.bin"))),
            ("does not divide dim", dict(to="meta", shards=7)),
            ("for --to meta", dict(to="hf", shards=2)),
            ("for --to gguf", dict(to="hf", dtype="q4_0")),
            ("fp32 only", dict(to="llama2c", dtype="bf16")),
            ("--checkpoint SRC", dict(checkpoint="")),
            ("reward or value", dict(to="hf", checkpoint=str(tmp_path / "reward.pt")))]:
        config = convert.Config(**{"checkpoint": str(own), "out": str(tmp_path / "new"), **options})
        with pytest.raises(ValueError, match=message):
            convert.main(config)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize("to", ["own", "meta", "hf", "llama2c", "gguf"])
def test_a_disk_that_fills_up_leaves_nothing_behind(to, own, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(own, to, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_only_when_it_is_complete(own, tmp_path, monkeypatch):
    def killed(folder, weights):
        assert (folder / "config.json").exists() and not (tmp_path / "new").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "write_hf_weights", killed)
    (tmp_path / ".new.convert.tmp").mkdir()  # litter of a run that had no chance to tidy up
    (tmp_path / ".new.convert.tmp" / "old").write_text("x")
    with pytest.raises(KeyboardInterrupt):
        run(own, "hf", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_one_line_and_exits_with_2(own, tmp_path):
    (tmp_path / "something").write_text("x")
    flags = ["--checkpoint", str(own), "--to", "hf", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, convert.__file__, *flags], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "never overwritten" in done.stderr


# ------------------------------------------------------------------------- files from the wild

NAMED = {"own": "x.pt", "meta": "meta", "hf": "hf", "llama2c": "x.bin", "gguf": "x.gguf"}

def sentencepiece_file(path, texts=TEXT, vocab_size=380, **options) -> Path:
    """A tokenizer with Llama's options but for those given."""
    import sentencepiece

    llama = dict(model_type="bpe", split_digits=True, byte_fallback=True, add_dummy_prefix=True,
                 normalization_rule_name="identity", remove_extra_whitespaces=False,
                 allow_whitespace_only_pieces=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 3), model_prefix=str(path.with_suffix("")), num_threads=1,
        minloglevel=2, vocab_size=vocab_size, **{**llama, **options})
    return path.with_suffix(".model")


UNLIKE = {  # the options of a tokenizer that other programs would read in another way
    "user_defined_symbols": dict(user_defined_symbols=["<mask>", "<a b>"]),
    "model_type": dict(model_type="unigram", vocab_size=320),
    "a normalization rule": dict(normalization_rule_name="nmt_nfkc"),
    "remove_extra_whitespaces": dict(remove_extra_whitespaces=True),
    "byte_fallback": dict(byte_fallback=False, vocab_size=150)}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_tokenizer_that_others_would_read_differently_is_not_exported(name, tmp_path):
    """Refused by each of the three formats that describe it; `own` and `meta` carry its bytes."""
    path = sentencepiece_file(tmp_path / "t.model", **UNLIKE[name])
    text = data.Tokenizer(path)
    model.save(tmp_path / "m.pt", random_model(vocab_size=text.vocab_size), "sft", text.model_bytes)
    for to in ("hf", "gguf", "llama2c"):
        with pytest.raises(ValueError, match=f"--to {to} cannot carry .* made with {name}"):
            run(tmp_path / "m.pt", to, tmp_path / "out.bin")
        assert not (tmp_path / "out.bin").exists()
    again, _ = convert.load(run(tmp_path / "m.pt", "meta", tmp_path / "meta"))
    assert again.config.vocab_size == text.vocab_size


def test_pieces_across_spaces_give_equal_ids_in_transformers(tmp_path):
    """split_by_whitespace=False: "▁return▁x" is one piece, and no option that others lack."""
    transformers = pytest.importorskip("transformers")
    path = sentencepiece_file(tmp_path / "t.model", ["Ada lives in the house"] * 9, 300,
                              split_by_whitespace=False)
    text = data.Tokenizer(path)
    assert any("▁" in text.piece(i).strip("▁") for i in range(259, text.vocab_size))
    model.save(tmp_path / "m.pt", random_model(vocab_size=300), "sft", text.model_bytes)
    theirs = transformers.AutoTokenizer.from_pretrained(run(tmp_path / "m.pt", "hf",
                                                            tmp_path / "hf"))
    for sample in strings(500):
        ids = text.sp.encode(sample)
        assert text.encode(sample) == ids, repr(sample)
        assert theirs(sample, add_special_tokens=False)["input_ids"] == ids, repr(sample)


@pytest.mark.parametrize("key, value", [
    ("use_scaled_rope", True), ("moe", {"num_experts": 8}), ("sliding_window", 4096),
    ("head_dim", 16), ("attention_bias", True), ("lora_args", {"rank": 16}), ("qk_norm", True)])
def test_params_json_with_what_llama_2_lacks_is_refused_by_name(key, value, own, tmp_path):
    folder = run(own, "meta", tmp_path / "meta")
    params = json.loads((folder / "params.json").read_text())
    harmless = {"head_dim": 10, "use_scaled_rope": False, "max_seq_len": 2048, "moe": None}
    (folder / "params.json").write_text(json.dumps({**params, **harmless}))
    convert.load(folder)
    (folder / "params.json").write_text(json.dumps({**params, key: value}))
    refuses(folder, f"{key} is ")


@pytest.mark.parametrize("to", ["own", "meta", "hf", "llama2c", "gguf"])
@pytest.mark.parametrize("pieces", [VOCAB - 1, VOCAB - 16, VOCAB - 50])
def test_rows_that_no_text_can_reach_are_counted_and_kept(pieces, to, network, own, tmp_path,
                                                          capsys):
    """32,001 rows, or a multiple of 64, for a tokenizer of 32,000 pieces, in the small."""
    folder = run(own, "meta" if to == "hf" else "hf", tmp_path / "source")
    (folder / "tokenizer.model").write_bytes(data.train_tokenizer(TEXT, pieces))
    text = data.Tokenizer(folder / "tokenizer.model")
    out = run(folder, to, tmp_path / NAMED[to])
    assert f"no text can reach {VOCAB - pieces} of its {VOCAB} rows" in capsys.readouterr().out
    back, theirs = convert.load(out)
    assert same_weights(back, network) and theirs.vocab_size == VOCAB
    for sample in strings(200):
        assert theirs.encode(sample) == text.encode(sample)
    if to != "llama2c":  # which does not tell what kind a piece is
        assert theirs.decode([1, VOCAB - 1, *text.encode("Ada")]) == "Ada"


@pytest.mark.parametrize("to", ["own", "meta", "hf", "gguf"])
@pytest.mark.parametrize("value", [7e4, float("inf"), float("nan")])
def test_a_conversion_that_overflows_is_refused_with_the_tensors_name(to, value, tokenizer,
                                                                      tmp_path):
    network = random_model()
    with torch.no_grad():
        network.layers[1].feed_forward.w_up.weight[5, 7] = value
    model.save(tmp_path / "m.pt", network, "sft", tokenizer.model_bytes, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="layers.1.feed_forward.w_up.weight reaches .* 65504"):
        run(tmp_path / "m.pt", to, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()
    if value == 7e4:
        kept = convert.load(run(tmp_path / "m.pt", to, tmp_path / NAMED[to]))[0].state_dict()
        assert kept["layers.1.feed_forward.w_up.weight"][5, 7] == torch.tensor(value).bfloat16()


def test_blocks_whose_scale_overflows_are_refused(tokenizer, tmp_path):
    network = gguf_model(tokenizer, tmp_path / "a.pt")
    with torch.no_grad():
        network.layers[0].attention.wk.weight[3, 40] = -1e7  # 1e7 / 127 and 1e7 / 8 exceed 65,504
    model.save(tmp_path / "m.pt", network, "sft", tokenizer.model_bytes)
    for dtype in ("q8_0", "q4_0", "fp16"):
        with pytest.raises(ValueError, match=r"layers.0.attention.wk.weight reaches 1e\+07"):
            run(tmp_path / "m.pt", "gguf", tmp_path / "out.gguf", dtype=dtype)


@pytest.mark.parametrize("to", ["own", "meta", "hf", "gguf"])
@pytest.mark.parametrize("norms, rest", [(torch.float32, torch.bfloat16),
                                         (torch.float32, torch.float16),
                                         (torch.bfloat16, torch.float32)])
def test_each_tensor_of_a_mixed_file_keeps_its_own_dtype(norms, rest, to, network, tokenizer,
                                                         tmp_path):
    """1.0001 is no bfloat16: a norm that was narrowed and widened again would be 1."""
    mixed = {n: w.to(norms if w.dim() == 1 else rest) for n, w in network.state_dict().items()}
    mixed["norm.weight"] = torch.full((60,), 1.0001).to(norms)
    model.save(tmp_path / "m.pt", network, "sft", tokenizer.model_bytes, weights=mixed)
    out = run(tmp_path / "m.pt", to, tmp_path / NAMED[to])
    source = convert.open_model(out)
    for name, w in mixed.items():
        kept = torch.float32 if to == "gguf" and w.dim() == 1 else w.dtype  # llama.cpp's rule
        assert source.weights[name].dtype == kept, name
        assert torch.equal(source.weights[name].read(), w.to(kept)), name
    opened, _ = convert.load(out)  # and it can speak
    assert model.generate(opened, [[1, 5, 9]], 3, temperature=0)


@pytest.mark.parametrize("kind", ["link", "link to a link", "dangling", "folder", "volume"])
@pytest.mark.parametrize("to", ["hf", "meta", "own"])
def test_an_export_goes_where_the_link_or_the_volume_is(kind, to, own, tmp_path, monkeypatch):
    """Nothing is written beside it, on the other file system; a mounted folder stays the same."""
    target, out = tmp_path / "volume" / "target", tmp_path / "out"
    target.parent.mkdir()
    if kind in ("link", "link to a link", "dangling"):
        out.symlink_to(target)
    if kind == "link to a link":
        (tmp_path / "again").symlink_to(out)
        out = tmp_path / "again"
    if kind in ("folder", "volume"):
        target = out
    if kind != "dangling" and to != "own":
        target.mkdir()
    if kind == "volume" and to != "own":
        (target / "lost+found").mkdir()
        (target / convert.LITTER).mkdir()  # of a run that was killed
    seen, replace = [], os.replace

    def watched(source, destination):
        seen.append(Path(source).parent)
        assert not Path(destination).is_dir(), "Device or resource busy"
        replace(source, destination)

    monkeypatch.setattr(os, "replace", watched)
    run(own, to, out)
    assert not out.is_symlink() == (kind in ("folder", "volume"))
    assert all(target.parent in (folder, *folder.parents) for folder in seen)
    names = {path.name for path in out.iterdir()} if to != "own" else {"params.json"}
    assert {"config.json", "params.json"} & names and convert.LITTER not in names
    convert.load(out)


def test_an_export_into_a_folder_that_fails_leaves_it_as_it_was(own, tmp_path, monkeypatch):
    replace = os.replace

    def fails(source, destination):
        if Path(destination).name == "config.json":
            raise OSError(28, "No space left on device")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fails)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space"):
        run(own, "hf", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_that_are_taken_for_checkpoints_are_called_what_they_are(own, hf_folder, tokenizer,
                                                                      tmp_path):
    note = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 42\n"
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((hf_folder / "config.json").read_bytes())
    for name in ("a.pt", "a.bin", "a.gguf", "hf/model.safetensors", "a.model", "a.jsonl"):
        (tmp_path / name).write_bytes(note)
    for path in ("a.pt", "a.bin", "a.gguf", "hf"):
        refuses(tmp_path / path, "git-lfs pointer.*git lfs pull")
    refuses(own, "a.model is a git-lfs pointer", tokenizer=tmp_path / "a.model")
    with pytest.raises(ValueError, match="a.jsonl is a git-lfs pointer"):
        data.read_prompts(tmp_path / "a.jsonl")
    torch.save({"x": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refuses(tmp_path / "old.pt", "saved by a PyTorch before 1.6.*torch.save")
    torch.save({"model": {}, "model_args": {"dim": 60}, "iter_num": 3}, tmp_path / "ckpt.pt")
    refuses(tmp_path / "ckpt.pt", "training state of llama2.c.*export.py")
    stage.save_state(tmp_path / "sft.state.pt", {"parts": {}, "random": {}, "extra": {"step": 3}})
    refuses(tmp_path / "sft.state.pt", "resume state of a run.*--resume continues")
    for content in (b"hello", own.read_bytes()[:5000]):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(ValueError) as e:
            convert.load(tmp_path / "x.pt")
        assert "python convert.py" not in str(e.value) and "what can be read" in str(e.value)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "I8"])
def test_a_dtype_that_cannot_be_read_is_named_with_those_that_can(code, tmp_path):
    header = json.dumps({"w": {"dtype": code, "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=f"w is stored as {code}; only F64, F32.* can be read"):
        convert.read_safetensors(tmp_path / "t")


def test_too_many_meta_shards_and_too_few_get_different_advice(own, tmp_path):
    folder = run(own, "meta", tmp_path / "meta", shards=2)
    (folder / "consolidated.02.pth").write_bytes((folder / "consolidated.01.pth").read_bytes())
    refuses(folder, "has 3 files .* cut into 2 parts: keep only those")
    (folder / "consolidated.02.pth").unlink()
    (folder / "consolidated.01.pth").unlink()
    refuses(folder, "has 1 files .* cut into 2 parts: get all")


@pytest.mark.parametrize("content", ["{}", "null", '{"dim": 4096, "n_heads": 32}'])
def test_a_foreign_params_json_does_not_hide_a_config_json(content, hf_folder, network, tmp_path):
    folder = changed_hf(hf_folder, tmp_path / "x")
    (folder / "params.json").write_text(content)
    assert same_weights(convert.load(folder)[0], network)


def test_llama2c_exports_are_read_with_the_tokenizer_beside_them(llama2c, network, tokenizer):
    back, text = convert.load(llama2c)
    assert same_weights(back, network)
    for sample in strings(1000):
        ids = tokenizer.encode(sample)
        assert text.encode(sample) == ids and text.decode(ids) == tokenizer.decode(ids)


def test_safetensors_that_overlap_or_have_a_huge_header_are_refused(tmp_path):
    def write(spans, size, header=None):
        entries = {name: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]}
                   for name, (a, b) in spans.items()}
        text = json.dumps(entries).encode()
        length = len(text) if header is None else header
        (tmp_path / "t").write_bytes(length.to_bytes(8, "little") + text + bytes(size))
        return tmp_path / "t"

    convert.read_safetensors(write({"b": (4, 8), "a": (0, 4), "none": (4, 4)}, 8))
    for spans, size, message in (({"a": (0, 8), "b": (4, 8)}, 8, "b and a overlap"),
                                 ({"a": (0, 8), "b": (0, 8)}, 8, "overlap"),
                                 ({"a": (0, 8), "b": (2, 3)}, 8, "b and a overlap"),
                                 ({"a": (0, 2), "b": (4, 8)}, 8, "2 bytes that its header")):
        with pytest.raises(ValueError, match=message):
            convert.read_safetensors(write(spans, size))
    with pytest.raises(ValueError, match="at most 100,000,000"):
        convert.read_safetensors(write({"a": (0, 8)}, 8, header=100_000_001))


# ---- GGUF in


@pytest.mark.parametrize("dtype", [None, "fp32", "fp16", "bf16", "q8_0", "q4_0"])
def test_what_we_write_as_gguf_we_read_back(dtype, tokenizer, tmp_path):
    """Equal where the format is exact; a second trip changes nothing, whatever it rounded."""
    network = gguf_model(tokenizer, tmp_path / "own.pt")
    first = run(tmp_path / "own.pt", "gguf", tmp_path / "a.gguf", dtype=dtype)
    back, text = convert.load(first)
    assert back.config == network.config
    if dtype in (None, "fp32"):
        assert same_weights(back, network)
    second = run(first, "gguf", tmp_path / "a2.gguf", dtype=dtype)
    again, _ = convert.load(second)
    assert same_weights(back, again)
    for name, w in network.state_dict().items():
        step = {"q4_0": 1 / 8, "bf16": 1 / 256}.get(dtype, 1 / 127)
        assert (back.state_dict()[name] - w).abs().max() <= step * w.abs().max(), name
    for sample in strings(1000):
        ids = tokenizer.encode(sample)
        assert text.encode(sample) == ids and text.decode(ids) == tokenizer.decode(ids)
    for id in range(VOCAB):
        mine = (tokenizer.piece(id), tokenizer.score(id), tokenizer.kind(id))
        assert (text.piece(id), text.score(id), text.kind(id)) == mine


def gguf_by_the_package(path, network, tokenizer, kind, change=lambda writer: None, tied=False,
                        names=lambda name: name) -> Path:
    """A file as llama.cpp's own converter writes it: norms F32, rows that do not fit F16."""
    gguf = pytest.importorskip("gguf")
    types = gguf.GGMLQuantizationType
    c, writer = network.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("a test")
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([tokenizer.piece(i).encode() for i in range(VOCAB)])
    writer.add_token_scores([tokenizer.score(i) for i in range(VOCAB)])
    writer.add_token_types([convert.PIECE_KINDS[tokenizer.kind(i)] for i in range(VOCAB)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    change(writer)
    for name, w in network.state_dict().items():
        if tied and name == "output.weight":
            continue
        numbers, exact = w.numpy(), kind
        if w.dim() == 1:
            exact = types.F32
        elif w.shape[1] % 32:
            exact = types.F16
        packed = gguf.quants.quantize(numbers, exact)
        writer.add_tensor(names(convert.lookup(name, convert.GGUF)), packed, raw_dtype=exact)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "BF16", "Q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_files_of_the_gguf_packages_own_writer_are_read(kind, tied, tokenizer, tmp_path):
    """Weights equal to the package's own dequantiser, bit for bit; ids equal to the original's."""
    gguf = pytest.importorskip("gguf")
    network = gguf_model(tokenizer, tmp_path / "own.pt")
    path = gguf_by_the_package(tmp_path / "m.gguf", network, tokenizer,
                               gguf.GGMLQuantizationType[kind], tied=tied)
    back, text = convert.load(path, dtype=torch.float32)
    assert back.config == network.config
    weights = back.state_dict()
    for t in gguf.GGUFReader(path).tensors:
        name = convert.our_name(t.name, convert.GGUF, 3)
        want = gguf.quants.dequantize(t.data, t.tensor_type).reshape(weights[name].shape)
        assert np.array_equal(weights[name].numpy(), want), name
    if tied:
        assert torch.equal(weights["output.weight"], weights["tok_embeddings.weight"])
    for sample in strings(500):
        assert text.encode(sample) == tokenizer.encode(sample)


@pytest.mark.parametrize("dtype", ["fp16", "q8_0"])
def test_transformers_reads_our_gguf_with_the_logits_that_we_read(dtype, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf"), pytest.importorskip("accelerate")
    gguf_model(tokenizer, tmp_path / "own.pt")
    path = run(tmp_path / "own.pt", "gguf", tmp_path / "m.gguf", dtype=dtype)
    ours, _ = convert.load(path, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = theirs(tokens()).logits, ours(tokens())
    assert want.abs().max() > 3 and (want - got).abs().max() < 1e-4


@pytest.mark.parametrize("change, message", [
    (lambda w: w.add_string("llama.rope.scaling.type", "linear"), "rope.scaling.type is 'linear'"),
    (lambda w: w.add_uint32("llama.expert_count", 8), "expert_count is 8"),
    (lambda w: w.add_uint32("llama.attention.sliding_window", 64), "sliding_window is 64"),
    (lambda w: w.add_uint32("llama.attention.key_length", 32), "key_length is 32"),
    (lambda w: w.add_bool("tokenizer.ggml.add_space_prefix", False), "add_space_prefix=False"),
    (lambda w: w.add_uint16("split.count", 3), "one of 3 files.*--merge")])
def test_gguf_files_of_other_networks_are_refused_by_name(change, message, tokenizer, tmp_path):
    gguf = pytest.importorskip("gguf")
    network = gguf_model(tokenizer, tmp_path / "own.pt")
    path = gguf_by_the_package(tmp_path / "m.gguf", network, tokenizer,
                               gguf.GGMLQuantizationType.F32, change)
    refuses(path, message)


def test_gguf_types_that_are_not_read_are_named(tokenizer, tmp_path):
    gguf_model(tokenizer, tmp_path / "own.pt")
    content = run(tmp_path / "own.pt", "gguf", tmp_path / "m.gguf", dtype="fp32").read_bytes()
    name = b"blk.0.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # behind the name: rank, two sizes, type
    for number, kind in ((12, "Q4_K"), (14, "Q6_K"), (6, "Q5_0"), (99, "of ggml's type 99")):
        (tmp_path / "x.gguf").write_bytes(content[:at] + struct.pack("<I", number)
                                          + content[at + 4:])
        refuses(tmp_path / "x.gguf", f"attn_q.weight is {kind}; fp32, fp16, .* can be read")


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("writer", ["ours", "the package's"])
def test_greedy_answers_to_a_gguf_file_are_llama_cpps(writer, kind, tokenizer, tmp_path):
    """The prompt's ids, too. llama.cpp rounds the activations of a q8_0 file to int8 as well.

    So there each of its tokens, given those before, must be ours or nearly as likely: within what
    that rounding does to these logits, the greatest of which are about 5.
    """
    llama_cpp, gguf = pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    network = gguf_model(tokenizer, tmp_path / "own.pt")
    path = tmp_path / "m.gguf"
    if writer == "ours":
        dtype = {"F32": "fp32", "F16": "fp16", "Q8_0": "q8_0"}[kind]
        run(tmp_path / "own.pt", "gguf", path, dtype=dtype)
    else:
        gguf_by_the_package(path, network, tokenizer, gguf.GGMLQuantizationType[kind])
    ours, text = convert.load(path, dtype=torch.float32)
    theirs = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False)
    for sample in ("The baker Ada   lives\n    return 17", "Once upon", "é🙂 x"):
        prompt = text.encode(sample, bos=True)
        assert theirs.tokenize(sample.encode(), add_bos=True) == prompt
        stream = theirs.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answer = [token for token, _ in zip(stream, range(16))]
        with torch.no_grad():
            logits = ours(torch.tensor([prompt + answer]))[0, len(prompt) - 1:-1]  # (16, V)
        lost = logits.amax(1) - logits[torch.arange(16), answer]
        if kind == "Q8_0":
            assert lost.max() < 0.5 and (lost == 0).sum() >= 12, lost
        else:
            assert answer == model.generate(ours, [prompt], 16, temperature=0)[0]
