"""Weights in and out: Meta's shards, Hugging Face folders, llama2.c files, GGUF.

A checkpoint of another project holds the same numbers as ours under other names, with other bytes
around them. Four things differ, and each stands in one place:

    names    one table for all formats: NAMES
    shards   Meta cuts each matrix into N parts along one of its dimensions: NAMES, last column
    rotary   Meta turns neighbours (0,1) (2,3) ..; Hugging Face turns i and i + hd/2, with the
             rows of wq and wk moved to match: to_halves, to_neighbours
    bytes    how numbers, sizes and tokenizer lie in the file: one reader or writer per format

A reader returns a `Source` whose weights are still on disk. Each is read, joined or moved when a
writer asks for it, so a 70B model passes through one tensor at a time.

    python convert.py --checkpoint llama-2-7b --to own --out out/llama.pt
    python convert.py --checkpoint out/sft.pt --to gguf --dtype q8_0 --out out/sft.gguf

Sources: [code] facebookresearch/llama.  [HF] transformers, convert_llama_weights_to_hf.
[ST] safetensors, README.  [l2c] karpathy/llama2.c, export.py and runq.c.
[GGUF] ggml, docs/gguf.md and ggml-quants.c (quantize_row_q8_0_ref, quantize_row_q4_0_ref).
"""

from __future__ import annotations

import contextlib, json, math, os, re, shutil, struct
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import model, stage
from data import Tokenizer
from model import Llama, ModelConfig
from stage import ranged

# ------------------------------------------------------------------------- names, shards, rotary

PREFIX = ("layers.#.", "model.layers.#.", "blk.#.")  # Meta (and ours), Hugging Face, GGUF
LAYER = {  # ours: (Meta, Hugging Face, GGUF, the dimension along which Meta cuts it [code])
    "attention_norm": ("attention_norm", "input_layernorm", "attn_norm", None),
    "attention.wq": ("attention.wq", "self_attn.q_proj", "attn_q", 0),
    "attention.wk": ("attention.wk", "self_attn.k_proj", "attn_k", 0),
    "attention.wv": ("attention.wv", "self_attn.v_proj", "attn_v", 0),
    "attention.wo": ("attention.wo", "self_attn.o_proj", "attn_output", 1),
    "ffn_norm": ("ffn_norm", "post_attention_layernorm", "ffn_norm", None),
    "feed_forward.w_gate": ("feed_forward.w1", "mlp.gate_proj", "ffn_gate", 0),  # 1, then 3, then 2
    "feed_forward.w_up": ("feed_forward.w3", "mlp.up_proj", "ffn_up", 0),
    "feed_forward.w_down": ("feed_forward.w2", "mlp.down_proj", "ffn_down", 1),
}
NAMES = {
    "tok_embeddings": ("tok_embeddings", "model.embed_tokens", "token_embd", 1),  # Llama 3 cuts 0
    **{PREFIX[0] + ours: (*map(str.__add__, PREFIX, row), row[3]) for ours, row in LAYER.items()},
    "norm": ("norm", "model.norm", "output_norm", None),
    "output": ("output", "lm_head", "output", 0),
}
META, HF, GGUF, SPLIT = range(4)  # columns of NAMES
DERIVED = ("rope.freqs", "rotary_emb.inv_freq")  # tables that some files carry; never needed


def lookup(ours: str, column: int):
    """A cell of NAMES: ("layers.7.ffn_norm.weight", GGUF) -> "blk.7.ffn_norm.weight"."""
    layer = re.search(r"\d+", ours)
    cell = NAMES[re.sub(r"\d+", "#", ours.removesuffix(".weight"))][column]
    return cell if column == SPLIT else (cell.replace("#", layer[0]) if layer else cell) + ".weight"


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, in the order of the network; allocates nothing."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Llama(config).state_dict().items()}


def to_halves(w: Tensor, head_dim: int) -> Tensor:
    """Rows of wq or wk, Meta's order to Hugging Face's: in each head 0 1 2 3 4 5 -> 0 2 4 1 3 5.

    (heads*hd, D) -> the same. The number of heads follows from the tensor, so that wk under
    grouped-query attention cannot be given the wrong one [HF].
    """
    return w.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def to_neighbours(w: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`: 0 1 2 3 4 5 -> 0 3 1 4 2 5."""
    return w.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


class Lazy(NamedTuple):
    """A tensor that is still on disk: what it will be, and the function that gets it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def lazy(t: Tensor, change: Callable[[Tensor], Tensor] = lambda t: t) -> Lazy:
    """A mapped tensor, with what shall happen to it when it is read (the shape stays)."""
    return Lazy(tuple(t.shape), t.dtype, partial(change, t))


@dataclass
class Source:
    """An opened model of any format; its weights have our names."""

    kind: str  # what to call it in messages
    config: ModelConfig
    weights: dict[str, Lazy]
    tokenizer: Tokenizer
    info: dict = field(default_factory=lambda: {"stage": "converted", "metrics": {}})

    def check(self, path) -> Source:
        """Self, if all names, shapes and the vocabulary agree; else ValueError says which not."""
        ghosts = {n: torch.empty(w.shape, device="meta") for n, w in self.weights.items()}
        model.assemble(self.config, ghosts, path)  # the rehearsal, without data
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise ValueError(f"{path}: the tokenizer has {self.tokenizer.vocab_size} pieces, the "
                             f"model {self.config.vocab_size}: they do not belong together; pass "
                             f"the right one with --tokenizer")
        return self


# ------------------------------------------------------------------------------- files, mapped


def map_file(path) -> np.ndarray:
    """The bytes of a file, uint8 (n,): in memory only where they are looked at, never written."""
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty")
    return np.memmap(path, np.uint8, mode="c")


def view(data: np.ndarray, at: int, shape, dtype: torch.dtype) -> Tensor:
    """The tensor that starts at byte `at` of a mapped file; copied only if it is not aligned."""
    part = torch.from_numpy(data[at : at + math.prod(shape) * dtype.itemsize])
    return (part.clone() if at % dtype.itemsize else part).view(dtype).view(shape)


def raw(t: Tensor) -> memoryview:
    """The bytes of a tensor, row after row, little-endian."""
    return t.contiguous().flatten().view(torch.uint8).numpy().data


def read_json(path: Path) -> dict:
    """A JSON object; ValueError if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def positive(values: dict, key: str, path: Path, default: int | None = None) -> int:
    """values[key], or the default where it is absent or null; ValueError unless a positive int."""
    value = default if values.get(key) is None else values[key]
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {key} is {value!r}, expected a positive whole number")
    return value


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def read_safetensors(path) -> dict[str, Tensor]:
    """Map a .safetensors file: 8 bytes of header length, JSON header, raw data [ST]."""
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors, end = {}, start
    try:
        if start > len(data):
            raise ValueError("truncated")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            dtype, (first, last) = SAFETENSORS[entry["dtype"]], entry["data_offsets"]
            if not 0 <= last - first == math.prod(entry["shape"]) * dtype.itemsize:
                raise ValueError(f"{name} has {last - first} bytes for shape {entry['shape']}")
            if first < 0 or start + last > len(data):
                raise ValueError(f"{name} lies beyond the file's {len(data):,} bytes: truncated")
            tensors[name] = view(data, start + first, entry["shape"], dtype)
            end = max(end, start + last)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a readable safetensors file: {e}") from e
    if end != len(data):
        raise ValueError(f"{path} has {len(data) - end} bytes that its header does not mention")
    return tensors


def write_safetensors(path, tensors: dict[str, Lazy], dtype: torch.dtype) -> None:
    """Write tensors as `dtype`, one at a time: the header needs only their shapes [ST]."""
    code = next(code for code, d in SAFETENSORS.items() if d == dtype)
    header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers insists on the format
    for name, w in tensors.items():
        size = math.prod(w.shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(w.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w in tensors.values():
            f.write(raw(w.read().to(dtype)))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or a torch.save file, mapped; never runs code."""
    read = read_safetensors if path.suffix == ".safetensors" else model.read_torch_file
    tensors = read(path)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a weight file: it holds something else than named tensors")
    return tensors


# ---------------------------------------------------------------------------------------- readers


def open_model(path, tokenizer=None) -> Source:
    """Recognise what `path` is and open it; tokenizer: a SentencePiece file, if none lies beside.

    ValueError or FileNotFoundError, in one line, for anything that cannot be used.
    """
    path = Path(path)
    if path.suffix in (".pth", ".safetensors") or path.name.startswith("pytorch_model"):
        path = path.parent  # a weight file stands for its folder
    if path.is_dir():
        if (path / "params.json").exists():
            return open_meta(path, tokenizer)
        if (path / "config.json").exists():
            return open_hf(path, tokenizer)
        raise ValueError(f"{path} holds neither params.json (Meta) nor config.json (Hugging Face)")
    if path.suffix == ".gguf":
        raise ValueError(f"{path}: GGUF is written here, not read; convert from the original")
    if path.suffix == ".bin" and path.exists():
        return open_llama2c(path, tokenizer)
    network, info = model.load(path, "cpu")
    weights = {name: lazy(p.detach()) for name, p in network.state_dict().items()}
    try:
        text = Tokenizer(tokenizer or info["tokenizer"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return Source("our own file", network.config, weights, text, info).check(path)


def find_tokenizer(folder: Path, given=None) -> Tokenizer:
    """The one given, or tokenizer.model in the folder or (Meta's download) in its parent."""
    beside = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    there = [p for p in beside if p.is_file()]
    if not given and not there:
        raise FileNotFoundError(f"no tokenizer.model in {folder} or its parent: pass --tokenizer")
    return Tokenizer(given or there[0])


def open_meta(folder: Path, tokenizer=None) -> Source:
    """Meta's folder: params.json and N files consolidated.NN.pth, one per model-parallel rank.

    Not recorded there: the vocabulary (-1 means the tokenizer's) and the context (4096 in
    Llama 2). One file is only mapped; several are joined, one tensor at a time.
    """
    path, text = folder / "params.json", find_tokenizer(folder, tokenizer)
    params = read_json(path)
    dim, heads = positive(params, "dim", path), positive(params, "n_heads", path)
    multiplier = params.get("ffn_dim_multiplier")
    hidden = model.ffn_dim(dim, positive(params, "multiple_of", path),
                           None if multiplier is None else float(multiplier))
    vocab = {**params, "vocab_size": None} if params.get("vocab_size") == -1 else params
    config = ModelConfig(
        dim, positive(params, "n_layers", path), heads, positive(params, "n_kv_heads", path, heads),
        hidden, positive(vocab, "vocab_size", path, text.vocab_size), 4096,
        float(params.get("norm_eps", 1e-5)), float(params.get("rope_theta", 10000.0)))

    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} has params.json but no consolidated.*.pth")
    shards = [read_tensors(f) for f in files]
    for f, shard in zip(files, shards):
        if {n: t.shape for n, t in shard.items()} != {n: t.shape for n, t in shards[0].items()}:
            raise ValueError(f"{f} does not hold the same names and shapes as {files[0].name}")
    width = shards[0].get("norm.weight", torch.empty(dim)).numel()  # a copy in each, never cut
    parts = width // shards[0].get("tok_embeddings.weight", torch.empty(1, width)).shape[-1]
    if parts != len(files):
        raise ValueError(f"{folder} has {len(files)} files consolidated.*.pth, but its weights "
                         f"were cut into {parts} parts: get all of them")
    ours = {lookup(name, META): name for name in shapes(config)}
    weights = {ours.get(name, name): merge([s[name] for s in shards], ours.get(name))
               for name in shards[0] if not name.endswith(DERIVED)}  # unknown names: see `check`
    return Source(f"Meta folder, {len(files)} shard(s)", config, weights, text).check(folder)


def merge(parts: list[Tensor], name: str | None) -> Lazy:
    """One weight from its shards: joined along Meta's cut; norms are copies, the first will do."""
    dim = lookup(name, SPLIT) if name else None
    if dim is None or len(parts) == 1:
        return lazy(parts[0])
    shape = list(parts[0].shape)
    shape[dim] = sum(p.shape[dim] for p in parts)
    return Lazy(tuple(shape), parts[0].dtype, partial(torch.cat, parts, dim))


def open_hf(folder: Path, tokenizer=None) -> Source:
    """A Hugging Face Llama: config.json and *.safetensors or pytorch_model*.bin, sharded or not.

    Only wq and wk, whose rows move, take memory. Shared embeddings are untied by copying.
    """
    given = read_json(folder / "config.json")
    config = hf_config(given, folder / "config.json")
    theirs: dict[str, Tensor] = {}
    for f in hf_files(folder):
        theirs |= read_tensors(f)
    if given.get("tie_word_embeddings") and "model.embed_tokens.weight" in theirs:
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
    ours = {lookup(name, HF): name for name in shapes(config)}
    move = partial(to_neighbours, head_dim=config.head_dim)
    weights = {}
    for name, t in theirs.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")) and t.shape[0] % config.head_dim == 0:
            weights[ours.get(name, name)] = lazy(t, move)
        elif not name.endswith(DERIVED):
            weights[ours.get(name, name)] = lazy(t)
    text = find_tokenizer(folder, tokenizer)
    return Source("Hugging Face folder", config, weights, text).check(folder)


def hf_config(c: dict, path: Path) -> ModelConfig:
    """Our configuration from config.json; ValueError for a variant that Llama 2 does not have."""
    dim, heads = positive(c, "hidden_size", path), positive(c, "num_attention_heads", path)
    rope = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}  # 4.x, 5.x
    for what, value, allowed in (
            ("model_type", c.get("model_type"), "llama"),
            ("hidden_act", c.get("hidden_act", "silu"), "silu"),
            ("attention_bias", c.get("attention_bias", False), False),
            ("mlp_bias", c.get("mlp_bias", False), False),
            ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
            ("head_dim", c.get("head_dim") or dim // heads, dim // heads),
            ("quantization_config", c.get("quantization_config"), None)):
        if value != allowed:
            raise ValueError(f"{path}: {what} is {value!r}; only {allowed!r} (Llama 2) can be read")
    return ModelConfig(
        dim, positive(c, "num_hidden_layers", path), heads,
        positive(c, "num_key_value_heads", path, heads), positive(c, "intermediate_size", path),
        positive(c, "vocab_size", path), positive(c, "max_position_embeddings", path, 2048),
        float(c.get("rms_norm_eps", 1e-6)),
        float(rope.get("rope_theta", c.get("rope_theta", 10000.0))))


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before .bin; all that the index names, if any."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        for index in folder.glob(pattern + ".index.json"):
            names = {Path(n).name for n in read_json(index).get("weight_map", {}).values()}
            files = [folder / n for n in sorted(names)]
            missing = [f.name for f in files if not f.exists()]
            if missing:
                raise FileNotFoundError(f"{folder} lacks {missing[0]}: it has only "
                                        f"{len(files) - len(missing)} of the {len(files)} files in "
                                        f"{index.name}")
        if files:
            return files
    raise FileNotFoundError(f"{folder} has config.json but no *.safetensors or pytorch_model*.bin")


# llama2.c has no names: the order is the format, each kind of weight for all layers in turn [l2c].
LLAMA2C = ("tok_embeddings attention_norm attention.wq attention.wk attention.wv attention.wo "
           "ffn_norm feed_forward.w_gate feed_forward.w_down feed_forward.w_up norm output").split()
NORMS = ("attention_norm", "ffn_norm", "norm")  # from version 1 on these come first


def llama2c_order(config: ModelConfig, version: int) -> list[str]:
    """Our names in the order in which a llama2.c file of this version holds them."""
    kinds = LLAMA2C if version == 0 else [*NORMS, *(k for k in LLAMA2C if k not in NORMS)]
    return [f"{kind}.weight" if kind in NAMES else f"layers.{i}.{kind}.weight"
            for kind in kinds for i in range(1 if kind in NAMES else config.n_layers)]


def open_llama2c(path: Path, tokenizer=None) -> Source:
    """A llama2.c .bin: version 0 (no magic), 1 (256-byte header), 2 (int8 in groups) [l2c].

    Version 0 says with a negative vocabulary that the classifier is not the embedding; 1 and 2
    have a byte for that. A shared one is untied by copying.
    """
    data = map_file(path)
    head = data[:256].tobytes().ljust(256, b"\0")
    version = struct.unpack("<i", head[4:8])[0] if head[:4] == b"24ka" else 0  # "ak42" as an int
    if version not in (0, 1, 2):
        raise ValueError(f"{path} is llama2.c version {version}; 0, 1 and 2 can be read")
    fields = struct.unpack("<7i", head[8:36] if version else head[:28])
    shared, group = struct.unpack("<?i", head[36:41]) if version else (fields[5] > 0, 0)
    dim, hidden, layers, heads, kv_heads, vocab, context = (*fields[:5], abs(fields[5]), fields[6])
    broken = ValueError(f"{path} is truncated or not a llama2.c file: {len(data):,} bytes, and its "
                        f"header reads {fields}")
    if min(dim, hidden, layers, heads, kv_heads, vocab, context, group if version == 2 else 1) < 1:
        raise broken
    config = ModelConfig(dim, layers, heads, kv_heads, hidden, vocab, context)
    if model.count_parameters(config) - vocab * dim > len(data):
        raise broken  # before anything of that size is made

    weights, at, shape = {}, 256 if version else 28, shapes(config)
    for name in llama2c_order(config, version):
        n = math.prod(shape[name])
        if name == "output.weight":
            at += 0 if version else 4 * context * config.head_dim  # cos, sin: (context, hd/2) each
            if shared:
                embedding = weights["tok_embeddings.weight"].read
                weights[name] = Lazy(shape[name], torch.float32, lambda: embedding().clone())
                continue
        in_groups = version == 2 and len(shape[name]) == 2
        read = partial(dequantise, group=group) if in_groups else partial(view, dtype=torch.float32)
        weights[name] = Lazy(shape[name], torch.float32, partial(read, data, at, shape[name]))
        at += n + 4 * (n // group) if in_groups else 4 * n
    if at != len(data):
        raise broken
    if not tokenizer:
        raise ValueError(f"{path}: llama2.c files carry no tokenizer: pass --tokenizer PATH")
    return Source(f"llama2.c version {version}", config, weights, Tokenizer(tokenizer)).check(path)


def dequantise(data: np.ndarray, at: int, shape, group: int) -> Tensor:
    """llama2.c's int8 matrix: all its values, then one float32 scale per group of them."""
    groups = math.prod(shape) // group
    values = view(data, at, (groups, group), torch.int8).float()
    return (values * view(data, at + groups * group, (groups, 1), torch.float32)).view(shape)


# ------------------------------------------------------------------------------ tokenizer exports


def tokenizer_json(text: Tokenizer) -> dict:
    """Hugging Face's description of a SentencePiece BPE tokenizer that gives the same ids.

    SentencePiece joins, again and again, the two neighbours whose union has the best score, the
    leftmost among equals. Hugging Face wants these joins listed, best first: every way to cut a
    piece into two. Llama's runs of spaces all score -1e9 and so grow from the left: among equals
    the longer union must come first, or 17 spaces become 8 + 9 where Llama has 16 + 1.
    """
    pieces = [text.piece(i) for i in range(text.vocab_size)]
    rank = {p: (-text.score(i), -len(p)) for i, p in enumerate(pieces) if text.kind(i) == "normal"}
    cuts = [(p[:i], p[i:]) for p in rank for i in range(1, len(p)) if {p[:i], p[i:]} <= rank.keys()]
    cuts.sort(key=lambda cut: rank[cut[0] + cut[1]])
    bos = pieces[text.bos_id]
    start, a, b = ({kind: {"id": id, "type_id": 0}} for kind, id in
                   (("SpecialToken", bos), ("Sequence", "A"), ("Sequence", "B")))
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": pieces[i], **flags}
                         for i in sorted((text.unk_id, text.bos_id, text.eos_id))],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},  # SentencePiece's dummy prefix
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [start, a], "pair": [start, a, start, b],
            "special_tokens": {bos: {"id": bos, "ids": [text.bos_id], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": pieces[text.unk_id], "fuse_unk": True,
                  "byte_fallback": True, "vocab": {p: i for i, p in enumerate(pieces)},
                  "merges": [" ".join(cut) for cut in cuts]}}


# data.encode_dialog in Jinja, which other programs fill in: the system message goes into the first
# user message, BOS and EOS around each pair of turns, a space before EOS.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}"
    "{% if turn['role'] != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('user and assistant must take turns, the user first') }}{% endif %}"
    "{% set content = (system if loop.first else '') + turn['content'] %}"
    "{% if turn['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + content | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}")


def tokenizer_bin(text: Tokenizer) -> bytes:
    """llama2.c's tokenizer.bin: the longest piece; then score, length, bytes of each [l2c]."""
    pieces = [text.piece(i).replace("▁", " ") for i in range(text.vocab_size)]
    for id in (text.bos_id, text.eos_id):
        pieces[id] = f"\n{pieces[id]}\n"  # what run.c prints for them
    coded = [p.encode() for p in pieces]
    return struct.pack("<I", max(map(len, coded))) + b"".join(
        struct.pack("<fI", text.score(i), len(p)) + p for i, p in enumerate(coded))


# ------------------------------------------------------------------------------------ writers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 5 * 10**9  # of one safetensors file; larger models are split, as transformers does


def write_own(source: Source, out: Path, dtype: torch.dtype) -> None:
    """One self-contained file, which every stage reads."""
    weights = {name: w.read().to(dtype) for name, w in source.weights.items()}
    model.save(out, model.assemble(source.config, weights, out), source.info["stage"],
               source.tokenizer.model_bytes, source.info["metrics"],
               source.info.get("trained_on") or f"converted from: {source.kind}")


@contextlib.contextmanager
def new_folder(out: Path):
    """A hidden folder to write into, synced and renamed to `out` at the end, removed on error."""
    temporary = out.with_name(f".{out.name}.convert.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary)
        raise


def write_json(path: Path, value) -> None:
    """A value as indented JSON, in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def ffn_rule(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) for which Meta's rounding rule gives hidden_dim exactly.

    The plainest pair: no multiplier, then few decimals; Meta's own multiples 256 and 4096 first.
    """
    ratio = hidden_dim / int(8 * dim / 3)
    for multiplier in (None, *(round(ratio, decimals) for decimals in range(1, 9))):
        for multiple in (256, 4096, 2048, 1024, 512, 128, 64, 32, 16, 8, 4, 2, 1):
            if model.ffn_dim(dim, multiple, multiplier) == hidden_dim:
                return multiple, multiplier
    raise ValueError(f"no multiple_of and ffn_dim_multiplier give hidden_dim {hidden_dim} for dim "
                     f"{dim}: Meta's params.json cannot say it; choose another --to")


def write_meta(source: Source, out: Path, dtype: torch.dtype, shards: int) -> None:
    """Meta's folder with N shards, one in memory at a time. It does not record the context."""
    c = source.config
    for what in ("dim", "n_heads", "n_kv_heads", "hidden_dim", "vocab_size"):
        if shards < 1 or getattr(c, what) % shards:
            raise ValueError(f"--shards {shards} does not divide {what} {getattr(c, what)}: every "
                             f"shard holds whole heads and equal parts")
    multiple, multiplier = ffn_rule(c.dim, c.hidden_dim)
    params = {"dim": c.dim, "multiple_of": multiple, "ffn_dim_multiplier": multiplier,
              "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "n_layers": c.n_layers,
              "norm_eps": c.norm_eps, "vocab_size": -1, "rope_theta": c.rope_theta}
    # As published: what is Meta's default is absent (its first code refuses keys it does not know).
    absent = {"ffn_dim_multiplier": None, "n_kv_heads": c.n_heads, "rope_theta": 10000.0}
    params = {k: v for k, v in params.items() if k not in absent or v != absent[k]}
    with new_folder(out) as folder:
        write_json(folder / "params.json", params)
        (folder / "tokenizer.model").write_bytes(source.tokenizer.model_bytes)
        for rank in range(shards):
            part = {}
            for name, w in source.weights.items():
                dim, whole = lookup(name, SPLIT), w.read()
                cut = dim is not None and shards > 1  # clone: a view would save the whole storage
                mine = whole.chunk(shards, dim)[rank].clone() if cut else whole
                part[lookup(name, META)] = mine.to(dtype).contiguous()
            model.write_torch_file(part, folder / f"consolidated.{rank:02d}.pth")


def write_hf(source: Source, out: Path, dtype: torch.dtype) -> None:
    """A folder that transformers, vLLM, lm-eval and llama.cpp's converter read; streams."""
    c, text = source.config, source.tokenizer
    ids = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": c.dim, "intermediate_size": c.hidden_dim, "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim, "max_position_embeddings": c.max_seq_len,
        "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": False, "torch_dtype": str(dtype).removeprefix("torch."), **ids}
    weights = {}
    for name, w in source.weights.items():
        if name.endswith(("wq.weight", "wk.weight")):
            w = w._replace(read=lambda w=w: to_halves(w.read(), c.head_dim))
        weights[lookup(name, HF)] = w
    with new_folder(out) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json",
                   {"do_sample": True, "temperature": 0.6, "top_p": 0.9, **ids})
        (folder / "tokenizer.model").write_bytes(text.model_bytes)
        write_json(folder / "tokenizer.json", tokenizer_json(text))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",  # "LlamaTokenizer" loses leading spaces
            "bos_token": text.piece(text.bos_id), "eos_token": text.piece(text.eos_id),
            "unk_token": text.piece(text.unk_id), "add_bos_token": True, "add_eos_token": False,
            "clean_up_tokenization_spaces": False, "model_max_length": c.max_seq_len,
            "chat_template": CHAT_TEMPLATE})
        write_hf_weights(folder, weights, dtype)


def write_hf_weights(folder: Path, weights: dict[str, Lazy], dtype: torch.dtype) -> None:
    """model.safetensors, or files of at most SHARD_BYTES with the index of what is where."""
    files, sizes = [{}], [0]
    for name, w in weights.items():
        size = math.prod(w.shape) * dtype.itemsize
        if files[-1] and sizes[-1] + size > SHARD_BYTES:
            files.append({})
            sizes.append(0)
        files[-1][name], sizes[-1] = w, sizes[-1] + size
    if len(files) == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    where = {}
    for i, part in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, part, dtype)
        where |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def write_llama2c(source: Source, out: Path) -> None:
    """llama2.c version 0 in float32, and beside it the tokenizer for `./run -z`; streams [l2c]."""
    c = source.config
    if (c.norm_eps, c.rope_theta) != (1e-5, 10000.0):
        raise ValueError(f"llama2.c has norm_eps 1e-5 and rope_theta 10000 built in, this model "
                         f"{c.norm_eps} and {c.rope_theta}: choose another --to")
    sizes = (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads, -c.vocab_size, c.max_seq_len)

    def write(f):
        f.write(struct.pack("<7i", *sizes))  # vocabulary < 0: the classifier is not the embedding
        for name in llama2c_order(c, 0):
            if name == "output.weight":  # run.c skips these tables, but they must be there
                for table in model.rope_table(c.head_dim, c.max_seq_len, c.rope_theta):
                    f.write(raw(table.float()))
            f.write(raw(source.weights[name].read().float()))

    tokenizer = tokenizer_bin(source.tokenizer)
    model.atomic_write(out.with_suffix(".tokenizer.bin"), lambda f: f.write(tokenizer))
    model.atomic_write(out, write)


# ------------------------------------------------------------------------------------------ GGUF


def q8_0(w: Tensor) -> Tensor:
    """Blocks of 32: float16 d = max|x|/127, then int8 round(x/d): uint8 (n/32, 34) [GGUF].

    As in ggml the float32 d divides, though its float16 is stored, and halves round away from zero
    as C's roundf does (torch.round would go to the even neighbour).
    """
    blocks = w.float().reshape(-1, 32)
    d = blocks.abs().amax(1, keepdim=True) / 127
    x = blocks * torch.where(d == 0, 0, 1 / d)
    whole = x.abs().floor()
    values = (whole + (x.abs() - whole >= 0.5)).copysign(x).to(torch.int8)
    return torch.cat((d.half().view(torch.uint8), values.view(torch.uint8)), 1)


def q4_0(w: Tensor) -> Tensor:
    """Blocks of 32: float16 d = x/-8 for the x of greatest |x|, then x/d + 8 in 4 bits each [GGUF].

    uint8 (n/32, 18): byte j holds value j in its low half, value j + 16 in its high half. The sign
    of d makes the extreme exact: it becomes 0, that is -8 * d; its opposite is clamped to 7 * d.
    """
    blocks = w.float().reshape(-1, 32)
    d = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    x = blocks * torch.where(d == 0, 0, 1 / d) + 8.5  # truncated next: rounds halves up
    values = x.to(torch.uint8).clamp(max=15)
    return torch.cat((d.half().view(torch.uint8), values[:, :16] | values[:, 16:] << 4), 1)


PACKINGS = {  # name: (ggml's number, numbers per block, bytes per block, function, file type)
    "fp32": (0, 1, 4, Tensor.float, 0), "fp16": (1, 1, 2, Tensor.half, 1),
    "bf16": (30, 1, 2, Tensor.bfloat16, 32),
    "q8_0": (8, 32, 34, q8_0, 7), "q4_0": (2, 32, 18, q4_0, 2)}
PIECE_KINDS = {"normal": 1, "unknown": 2, "control": 3, "byte": 6}


def gguf_packing(name: str, shape: tuple[int, ...], dtype: str):
    """The entry of PACKINGS for one weight of a `dtype` file; nearly always that of `dtype`.

    Norms stay float32. Rows that are no multiple of 32 fall back to float16. The output matrix of a
    q4_0 file is q8_0, since its errors go straight into the logits; llama.cpp keeps it finer, too.
    """
    if len(shape) == 1:
        return PACKINGS["fp32"]
    packing = PACKINGS["q8_0" if (name, dtype) == ("output.weight", "q4_0") else dtype]
    return PACKINGS["fp16"] if shape[-1] % packing[1] else packing


def gguf_metadata(source: Source, name: str, dtype: str) -> dict:
    """All that llama.cpp must know besides the weights, the tokenizer included [GGUF]."""
    c, text = source.config, source.tokenizer
    ids = range(text.vocab_size)
    return {
        "general.architecture": "llama", "general.name": name, "general.alignment": 32,
        "general.file_type": PACKINGS[dtype][4], "general.quantization_version": 2,
        "llama.context_length": c.max_seq_len, "llama.embedding_length": c.dim,
        "llama.block_count": c.n_layers, "llama.feed_forward_length": c.hidden_dim,
        "llama.attention.head_count": c.n_heads, "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "llama.rope.dimension_count": c.head_dim, "llama.rope.freq_base": float(c.rope_theta),
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [text.piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(text.score(i)) for i in ids],
        "tokenizer.ggml.token_type": [PIECE_KINDS[text.kind(i)] for i in ids],
        "tokenizer.ggml.bos_token_id": text.bos_id, "tokenizer.ggml.eos_token_id": text.eos_id,
        "tokenizer.ggml.unknown_token_id": text.unk_id, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": CHAT_TEMPLATE}


def gguf_value(value, in_list: bool = False) -> tuple[int, bytes]:
    """(type number, bytes) of a metadata value: bool, int, float, str or a list of one of these."""
    if isinstance(value, list):
        items = [gguf_value(v, in_list=True) for v in value]
        return 9, struct.pack("<IQ", items[0][0], len(items)) + b"".join(b for _, b in items)
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return (5, struct.pack("<i", value)) if in_list else (4, struct.pack("<I", value))


def write_gguf(source: Source, out: Path, dtype: str) -> None:
    """GGUF version 3: counts, metadata, list of tensors, data aligned to 32 bytes; streams [GGUF].

    wq and wk keep Meta's order of rows: llama.cpp turns neighbours for this architecture, and its
    own converter moves Hugging Face's rows back.
    """
    metadata = gguf_metadata(source, out.stem, dtype)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(source.weights), len(metadata))
    for key, value in metadata.items():
        kind, content = gguf_value(value)
        head += gguf_value(key)[1] + struct.pack("<I", kind) + content
    at = 0  # from the start of the data
    for name, w in source.weights.items():
        ggml_type, block, size, *_ = gguf_packing(name, w.shape, dtype)
        head += gguf_value(lookup(name, GGUF))[1]
        head += struct.pack(f"<I{len(w.shape)}Q", len(w.shape), *reversed(w.shape))  # fastest first
        head += struct.pack("<IQ", ggml_type, at)
        at += -(-math.prod(w.shape) // block * size // 32) * 32

    def write(f):
        f.write(head)
        for name, w in source.weights.items():
            f.write(bytes(-f.tell() % 32))
            pack = gguf_packing(name, w.shape, dtype)[3]
            for rows in w.read().split(1024):  # blocks never cross rows: a few at a time will do
                f.write(raw(pack(rows)))
        f.write(bytes(-f.tell() % 32))

    model.atomic_write(out, write)


# -------------------------------------------------------------------------------- using it


def load(path, tokenizer=None, device="cpu", dtype=None) -> tuple[Llama, Tokenizer]:
    """Open any format for use: (Llama, Tokenizer).

    dtype None keeps the file's own. Then the weights on a CPU stay mapped; memory is taken only by
    rows that had to move (Hugging Face's wq and wk) and by shards that had to be joined.
    """
    source, device = open_model(path, tokenizer), model.pick_device(device)
    weights = {n: w.read().to(device, dtype or w.dtype) for n, w in source.weights.items()}
    return model.assemble(source.config, weights, path), source.tokenizer


@dataclass
class Config:
    """One conversion; every field is a flag."""

    checkpoint: str = ""  # our file, a Meta or Hugging Face folder, or a llama2.c .bin
    to: Literal["own", "meta", "hf", "llama2c", "gguf"] = "own"  # the format to write
    out: str = ""  # new file (own, llama2c, gguf) or new folder (meta, hf)
    tokenizer: str = ""  # SentencePiece model, where the checkpoint has none beside it
    shards: int = ranged(1, least=1)  # meta only: consolidated.NN.pth; Meta: 7B 1, 13B 2, 70B 8
    dtype: Literal["fp32", "bf16", "fp16", "q8_0", "q4_0"] | None = None  # None: as it is; q: gguf


def check_command(cfg: Config) -> None:
    """ValueError for flags that are missing or do not go together, and for an --out that exists."""
    out = Path(cfg.out)
    if not cfg.checkpoint or not cfg.out:
        raise ValueError("what to read and where to write? --checkpoint SRC --to FORMAT --out DST")
    empty_folder = cfg.to in ("meta", "hf") and out.is_dir() and not any(out.iterdir())
    beside = [out.with_suffix(".tokenizer.bin")] if cfg.to == "llama2c" else []
    for path in [out, *beside]:
        if path.exists() and not empty_folder:
            raise ValueError(f"{path} exists and is never overwritten: choose another --out")
    if cfg.shards != 1 and cfg.to != "meta":
        raise ValueError(f"--shards {cfg.shards} is for --to meta, not for {cfg.to}")
    if cfg.dtype in ("q8_0", "q4_0") and cfg.to != "gguf":
        raise ValueError(f"--dtype {cfg.dtype} is for --to gguf; {cfg.to} takes fp32, bf16, fp16")
    if cfg.dtype not in (None, "fp32") and cfg.to == "llama2c":
        raise ValueError(f"--to llama2c writes version 0, which is fp32 only, not {cfg.dtype}")


def main(cfg: Config) -> None:
    """Read `checkpoint`, write `out`; what can be wrong is found before a byte is written."""
    stage.check(cfg)
    check_command(cfg)
    source, out = open_model(cfg.checkpoint, cfg.tokenizer or None), Path(cfg.out)
    if source.config.scalar_head and cfg.to != "own":
        raise ValueError(f"{cfg.checkpoint} is a reward or value model: only --to own can hold it")
    kept = source.weights["tok_embeddings.weight"].dtype
    dtype = cfg.dtype or next((name for name, d in DTYPES.items() if d == kept), "fp32")
    if cfg.to == "llama2c":
        dtype = "fp32"
    print(f"read {cfg.checkpoint}: {source.kind}, "
          f"{model.count_parameters(source.config):,} parameters, {kept}", flush=True)
    if cfg.to == "own":
        write_own(source, out, DTYPES[dtype])
    elif cfg.to == "meta":
        write_meta(source, out, DTYPES[dtype], cfg.shards)
    elif cfg.to == "hf":
        write_hf(source, out, DTYPES[dtype])
    elif cfg.to == "llama2c":
        write_llama2c(source, out)
    else:
        write_gguf(source, out, dtype)
    size = sum(f.stat().st_size for f in (out.iterdir() if out.is_dir() else [out]))
    print(f"wrote {out}: {cfg.to}, {dtype}, {size / 1e6:,.1f} MB")
    if cfg.to == "llama2c":
        print(f"run it with llama2.c: ./run {out} -z {out.with_suffix('.tokenizer.bin')}")


if __name__ == "__main__":
    stage.run(main, Config)
