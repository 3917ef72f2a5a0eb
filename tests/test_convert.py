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
    refuses(llama2c, "--tokenizer")
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
    other.write_bytes(data.train_tokenizer(TEXT, VOCAB - 30))
    refuses(hf_folder, f"tokenizer has {VOCAB - 30} pieces, the model {VOCAB}", tokenizer=other)
    (tmp_path / "x.gguf").write_bytes(b"GGUF1234")
    refuses(tmp_path / "x.gguf", "not read")


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
