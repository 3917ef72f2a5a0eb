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
[SP] google/sentencepiece, sentencepiece_model.proto.
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
from data import NORMALIZER, TRAINER, Tokenizer, refuse_pointer
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


def our_name(theirs: str, column: int, n_layers: int) -> str:
    """The other way: ("blk.7.ffn_norm.weight", GGUF) -> ours; what this model has not, stays."""
    number = re.search(r"(?<=\.)\d+(?=\.)", theirs)
    pattern = theirs.removesuffix(".weight")
    if number and int(number[0]) < n_layers:
        pattern = pattern[: number.start()] + "#" + pattern[number.end() :]
    for ours, row in NAMES.items():
        if row[column] == pattern and theirs.endswith(".weight"):
            return (ours.replace("#", number[0]) if number else ours) + ".weight"
    return theirs


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
    notes: list[str] = field(default_factory=list)  # what whoever uses it should be told

    def check(self, path) -> Source:
        """Self, if all names, shapes and the vocabulary agree; else ValueError says which not.

        Fine-tunes often have more rows than pieces: tokens of their own, or rows up to a multiple
        of 64. Each such row gets a piece that no text can produce, so that it stays on export.
        """
        ghosts = {n: torch.empty(w.shape, dtype=w.dtype, device="meta")
                  for n, w in self.weights.items()}
        model.assemble(self.config, ghosts, path)  # the rehearsal, without data
        pieces, rows = self.tokenizer.vocab_size, self.config.vocab_size
        if not rows / 2 <= pieces <= rows:
            raise ValueError(f"{path}: the tokenizer has {pieces} pieces, the model {rows}: they "
                             f"do not belong together; pass the right one with --tokenizer")
        if pieces < rows:
            added = [piece_field(f"<unused_{row}>", 0.0, 3) for row in range(pieces, rows)]
            self.tokenizer = Tokenizer(self.tokenizer.model_bytes + b"".join(added))
            self.notes.append(f"no text can reach {rows - pieces} of its {rows} rows: the "
                              f"tokenizer has {pieces} pieces")
        return self


# ------------------------------------------------------------------------------- files, mapped


def map_file(path) -> np.ndarray:
    """The bytes of a file, uint8 (n,): in memory only where they are looked at, never written."""
    if not Path(path).stat().st_size:
        raise ValueError(f"{path} is empty")
    data = np.memmap(path, np.uint8, mode="c")
    refuse_pointer(path, data[:64].tobytes())
    return data


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
        text = path.read_bytes()
        refuse_pointer(path, text)
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
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


def number(values: dict, key: str, path: Path, default: float) -> float:
    """values[key], or the default where absent or null; ValueError unless a number above 0."""
    value = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{path}: {key} is {value!r}, expected a number above 0")
    return float(value)


def check_spans(spans: list[tuple[int, int, str]], size: int) -> None:
    """ValueError if tensors (first byte, behind the last, name) overlap or lie beyond `size`."""
    end, before = 0, ""
    for start, behind, name in sorted(spans):
        if start < end:
            raise ValueError(f"{name} and {before} overlap")
        if behind > size:
            raise ValueError(f"{name} lies beyond the file's end: truncated")
        end, before = behind, name


SAFETENSORS_HEADER = 100_000_000  # bytes; the library's own limit [ST]
SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}


def read_safetensors(path) -> dict[str, Tensor]:
    """Map a .safetensors file: 8 bytes of header length, JSON header, raw data [ST]."""
    data = map_file(path)
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    tensors, spans = {}, []
    try:
        if start > 8 + SAFETENSORS_HEADER:
            raise ValueError(f"its header has {start - 8:,} bytes, at most {SAFETENSORS_HEADER:,} "
                             f"are allowed")
        if start > len(data):
            raise ValueError("truncated")
        for name, entry in json.loads(data[8:start].tobytes()).items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in SAFETENSORS:
                raise ValueError(f"{name} is stored as {entry['dtype']}; only "
                                 f"{', '.join(SAFETENSORS)} can be read")
            dtype, shape = SAFETENSORS[entry["dtype"]], entry["shape"]
            first, behind = entry["data_offsets"]
            if any(type(n) is not int or n < 0 for n in (*shape, first, behind)) or math.prod(
                    max(n, 1) for n in shape) >= 2**62:
                raise ValueError(f"{name} has the shape {shape} and the bytes {first} to {behind}")
            if behind - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} has {behind - first} bytes for shape {shape}")
            spans.append((first, behind, name))
            tensors[name] = (start + first, shape, dtype)
        check_spans(spans, len(data) - start)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is not a readable safetensors file: {e}") from e
    left = len(data) - start - sum(behind - first for first, behind, _ in spans)
    if left:
        raise ValueError(f"{path} has {left} bytes that its header does not mention")
    return {name: view(data, *place) for name, place in tensors.items()}


def write_safetensors(path, tensors: dict[str, Lazy]) -> None:
    """Write tensors as they are, one at a time: the header needs only their shapes [ST]."""
    codes = {dtype: code for code, dtype in SAFETENSORS.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0  # transformers insists on the format
    for name, w in tensors.items():
        size = math.prod(w.shape) * w.dtype.itemsize
        header[name] = {"dtype": codes[w.dtype], "shape": list(w.shape),
                        "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w in tensors.values():
            f.write(raw(w.read()))


READABLE = "what can be read: our own .pt, Meta and Hugging Face folders, llama2.c .bin, .gguf"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or a torch.save file, mapped; never runs code."""
    read = partial(model.read_torch_file, hint=READABLE)
    if path.suffix == ".safetensors":
        read = read_safetensors
    tensors = read(path)
    model.check_tensors(tensors, path)
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
        is_hf = (path / "config.json").exists()
        if (path / "params.json").exists() and (list(path.glob("consolidated.*.pth")) or not is_hf):
            return open_meta(path, tokenizer)
        if is_hf:
            return open_hf(path, tokenizer)
        raise ValueError(f"{path} holds neither params.json (Meta) nor config.json (Hugging Face)")
    if path.suffix == ".gguf" and path.exists():
        return open_gguf(path, tokenizer)
    if path.suffix == ".bin" and path.exists():
        return open_llama2c(path, tokenizer)
    config, tensors, info = model.read_checkpoint(path, READABLE)
    weights = {name: lazy(t) for name, t in tensors.items()}
    try:
        text = Tokenizer(tokenizer or info["tokenizer"])
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    return Source("our own file", config, weights, text, info).check(path)


def find_tokenizer(folder: Path, given=None) -> Tokenizer:
    """The one given, or tokenizer.model in the folder or (Meta's download) in its parent."""
    beside = [folder / "tokenizer.model", folder.parent / "tokenizer.model"]
    there = [p for p in beside if p.is_file()]
    if not given and not there:
        raise FileNotFoundError(f"no tokenizer.model in {folder} or its parent: pass --tokenizer")
    return Tokenizer(given or there[0])


PARAMS = ("dim multiple_of ffn_dim_multiplier n_heads n_kv_heads n_layers norm_eps vocab_size "
          "rope_theta max_seq_len max_batch_size model_parallel_size").split()  # read, or harmless


def open_meta(folder: Path, tokenizer=None) -> Source:
    """Meta's folder: params.json and N files consolidated.NN.pth, one per model-parallel rank.

    Not recorded there: the vocabulary (-1: as many as the matrix has rows) and the context (4096
    in Llama 2). One file is only mapped; several are joined, one tensor at a time.
    """
    path, text = folder / "params.json", find_tokenizer(folder, tokenizer)
    params = read_json(path)
    dim, heads = positive(params, "dim", path), positive(params, "n_heads", path)
    if params.get("head_dim") == dim // heads:
        del params["head_dim"]  # nothing but what follows from the others
    for key, value in params.items():
        if key not in PARAMS and value:
            raise ValueError(f"{path}: {key} is {value!r}, which Llama 2 does not have; models "
                             f"that use it cannot be read")
    multiplier = params.get("ffn_dim_multiplier") and number(params, "ffn_dim_multiplier", path, 1)
    hidden = model.ffn_dim(dim, positive(params, "multiple_of", path), multiplier)

    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise FileNotFoundError(f"{folder} has params.json but no consolidated.*.pth")
    shards = [read_tensors(f) for f in files]
    for f, shard in zip(files, shards):
        if {n: t.shape for n, t in shard.items()} != {n: t.shape for n, t in shards[0].items()}:
            raise ValueError(f"{f} does not hold the same names and shapes as {files[0].name}")
    columns = cut_size(shards[0], "tok_embeddings.weight", 1) or dim
    parts = dim // columns if columns <= dim else 1
    if parts != len(files):
        advice = "get all of them" if len(files) < parts else "keep only those of this model"
        raise ValueError(f"{folder} has {len(files)} files consolidated.*.pth, but its weights "
                         f"were cut into {parts} parts: {advice}")
    if params.get("vocab_size", -1) == -1:
        rows = cut_size(shards[0], "output.weight", 0) * len(files)
        params = {**params, "vocab_size": rows or text.vocab_size}
    config = ModelConfig(
        dim, positive(params, "n_layers", path), heads, positive(params, "n_kv_heads", path, heads),
        hidden, positive(params, "vocab_size", path), 4096,
        number(params, "norm_eps", path, 1e-5), number(params, "rope_theta", path, 10000.0))
    weights = {}
    for name in shards[0]:
        if not name.endswith(DERIVED):  # unknown names: see `check`
            ours = our_name(name, META, config.n_layers)
            weights[ours] = merge([shard[name] for shard in shards], ours)
    return Source(f"Meta folder, {len(files)} shard(s)", config, weights, text).check(folder)


def cut_size(shard: dict[str, Tensor], name: str, dim: int) -> int:
    """The size of one dimension of a shard's matrix; 0 if the shard has no such matrix."""
    return shard[name].shape[dim] if name in shard and shard[name].dim() == 2 else 0


def merge(parts: list[Tensor], name: str) -> Lazy:
    """One weight from its shards: joined along Meta's cut; norms are copies, the first will do."""
    known = re.sub(r"\d+", "#", name.removesuffix(".weight")) in NAMES
    dim = lookup(name, SPLIT) if known else None
    if dim is None or len(parts) == 1 or parts[0].dim() != 2:
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
    move = partial(to_neighbours, head_dim=config.head_dim)
    weights = {}
    for name, t in theirs.items():
        moves = name.endswith(("q_proj.weight", "k_proj.weight"))
        if moves and t.dim() == 2 and t.shape[0] % config.head_dim == 0:
            weights[our_name(name, HF, config.n_layers)] = lazy(t, move)
        elif not name.endswith(DERIVED):
            weights[our_name(name, HF, config.n_layers)] = lazy(t)
    text = find_tokenizer(folder, tokenizer)
    return Source("Hugging Face folder", config, weights, text).check(folder)


def hf_config(c: dict, path: Path) -> ModelConfig:
    """Our configuration from config.json; ValueError for a variant that Llama 2 does not have."""
    dim, heads = positive(c, "hidden_size", path), positive(c, "num_attention_heads", path)
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4.x and 5.x
        if not isinstance(c.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} is {c[key]!r}, expected a JSON object")
        rope |= c.get(key) or {}
    for what, value, allowed in (
            ("model_type", c.get("model_type"), "llama"),
            ("hidden_act", c.get("hidden_act", "silu"), "silu"),
            ("attention_bias", c.get("attention_bias", False), False),
            ("mlp_bias", c.get("mlp_bias", False), False),
            ("sliding_window", c.get("sliding_window"), None),
            ("partial_rotary_factor", c.get("partial_rotary_factor", 1), 1),
            ("rope type", rope.get("rope_type", rope.get("type", "default")), "default"),
            ("head_dim", c.get("head_dim") or dim // heads, dim // heads),
            ("quantization_config", c.get("quantization_config"), None)):
        if value != allowed:
            raise ValueError(f"{path}: {what} is {value!r}; only {allowed!r} (Llama 2) can be read")
    return ModelConfig(
        dim, positive(c, "num_hidden_layers", path), heads,
        positive(c, "num_key_value_heads", path, heads), positive(c, "intermediate_size", path),
        positive(c, "vocab_size", path), positive(c, "max_position_embeddings", path, 2048),
        number(c, "rms_norm_eps", path, 1e-6), number({**c, **rope}, "rope_theta", path, 10000.0))


def hf_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before .bin; all that the index names, if any."""
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        for index in folder.glob(pattern + ".index.json"):
            places = read_json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(n, str) for n in places.values()):
                raise ValueError(f"{index}: weight_map does not say which file has which weight")
            names = {Path(n).name for n in places.values()}
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
    have a byte for that. A shared one is untied by copying. tokenizer: a SentencePiece file or
    llama2.c's .bin; by default NAME.tokenizer.bin, which `write_llama2c` leaves beside NAME.bin.
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
    if at != len(data) or version == 2 and any(
            math.prod(size) % group for size in shape.values() if len(size) == 2):
        raise broken
    beside = path.with_suffix(".tokenizer.bin")
    if not tokenizer and not beside.exists():
        raise ValueError(f"{path}: llama2.c files carry no tokenizer, and no {beside.name} lies "
                         f"beside it: pass --tokenizer PATH")
    text = Path(tokenizer or beside)
    if text.suffix == ".bin":
        text = read_tokenizer_bin(text, vocab)
    return Source(f"llama2.c version {version}", config, weights, Tokenizer(text)).check(path)


def dequantise(data: np.ndarray, at: int, shape, group: int) -> Tensor:
    """llama2.c's int8 matrix: all its values, then one float32 scale per group of them."""
    groups = math.prod(shape) // group
    values = view(data, at, (groups, group), torch.int8).float()
    return (values * view(data, at + groups * group, (groups, 1), torch.float32)).view(shape)


# ------------------------------------------------------------------------- tokenizers in and out


def protobuf_field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message, as `data.protobuf_fields` reads it; ints are 0 or more."""
    def varint(n: int) -> bytes:
        out = bytearray()
        while n > 127:
            out.append(n & 127 | 128)
            n >>= 7
        out.append(n)
        return bytes(out)

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def piece_field(piece: str, score: float, kind: int) -> bytes:
    """A piece in a SentencePiece model; kind: a number of PIECE_KINDS [SP]."""
    content = protobuf_field(1, piece.encode()) + protobuf_field(2, score) + protobuf_field(3, kind)
    return protobuf_field(1, content)


def sentencepiece_model(pieces: list[str], scores: list[float], kinds: list[int], unk: int,
                        bos: int, eos: int) -> bytes:
    """The SentencePiece model with Llama's options that has these pieces [SP]."""
    trainer = protobuf_field(3, 2)  # BPE
    trainer += protobuf_field(35, int(PIECE_KINDS["byte"] in kinds))  # byte_fallback
    for number, id in ((45, unk), (46, bos), (47, eos)):  # the library finds the ids by the pieces
        trainer += protobuf_field(number, pieces[id].encode())
    normalizer = protobuf_field(1, b"identity") + protobuf_field(3, 1)  # the space in front
    normalizer += protobuf_field(4, 0) + protobuf_field(5, 1)  # spaces are kept, and visible
    content = b"".join(map(piece_field, pieces, scores, kinds))
    return content + protobuf_field(TRAINER, trainer) + protobuf_field(NORMALIZER, normalizer)


def read_tokenizer_bin(path: Path, vocab_size: int) -> bytes:
    """llama2.c's tokenizer.bin as a SentencePiece model; the inverse of `tokenizer_bin` [l2c].

    It tells no kinds: 0 is unknown, 1 and 2 are BOS and EOS, 3 to 258 the bytes, as in Llama.
    """
    content, at = map_file(path), 4
    pieces, scores = [], []
    try:
        for _ in range(vocab_size):
            score, size = struct.unpack("<fI", content[at : at + 8].tobytes())
            piece = content[at + 8 : at + 8 + size].tobytes()
            at += 8 + size
            pieces.append(piece.decode().replace(" ", "\u2581"))
            scores.append(score)
    except (struct.error, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is truncated or no tokenizer of llama2.c: {e}") from e
    if at != len(content) or vocab_size < 259 or pieces[3] != "<0x00>":
        raise ValueError(f"{path} is no llama2.c tokenizer of {vocab_size} pieces: {len(content):,}"
                         f" bytes, of which {at:,} were read")
    pieces[1], pieces[2] = pieces[1].strip("\n"), pieces[2].strip("\n")
    kinds = [2, 3, 3] + [PIECE_KINDS["byte"]] * 256 + [PIECE_KINDS["normal"]] * (vocab_size - 259)
    return sentencepiece_model(pieces, scores, kinds, 0, 1, 2)


def check_portable(text: Tokenizer, to: str) -> None:
    """ValueError for a tokenizer from which another program would get other ids than we do.

    What these programs have built in are Llama's own options; a piece that is out of use must not
    be one that two others join to, and llama2.c knows ids by their places.
    """
    pieces = [text.piece(id) for id in range(text.vocab_size)]
    kinds = [text.kind(id) for id in range(text.vocab_size)]
    for name, value in text.unlike_llama.items():
        shown = f"{name}={value!r:.60}"
        if name == "precompiled_charsmap":
            shown = "a normalization rule"
        raise ValueError(f"--to {to} cannot carry this tokenizer: it was made with {shown}, unlike "
                         f"Llama's, and other programs would read other ids; --to own or meta can")
    known = set(pieces)
    for piece, kind in zip(pieces, kinds):
        cuts = [{piece[:i], piece[i:]} for i in range(1, len(piece))]
        if kind == "unused" and (len(piece) == 1 or any(cut <= known for cut in cuts)):
            raise ValueError(f"--to {to} cannot carry this tokenizer: its piece {piece!r} is out "
                             f"of use, and other programs would use it; --to own or meta can")
    first = ["unknown", "control", "control", *["byte"] * 256]
    ids = (text.unk_id, text.bos_id, text.eos_id)
    if to == "llama2c" and (kinds[:259] != first or ids != (0, 1, 2)):
        raise ValueError("--to llama2c needs unknown, BOS and EOS at 0, 1 and 2, then the 256 "
                         "bytes, as in Llama; this tokenizer has other places; choose another --to")


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


def as_dtype(name: str, w: Lazy, dtype: torch.dtype) -> Lazy:
    """The weight in another format, which is checked for its numbers when it is read."""
    if w.dtype == dtype:
        return w

    def convert() -> Tensor:
        whole = w.read()
        check_range(name, whole, torch.finfo(dtype).max, str(dtype).removeprefix("torch."))
        return whole.to(dtype)

    return Lazy(w.shape, dtype, convert)


def check_range(name: str, w: Tensor, limit: float, what: str) -> None:
    """ValueError unless all numbers of a weight are at most `limit`: none may become infinite."""
    least, greatest = torch.aminmax(w)
    reach = max(-least.item(), greatest.item())
    if not reach <= limit or math.isnan(least.item()):
        raise ValueError(f"{name} reaches {reach:.6g}, {what} at most {limit:.6g}: choose another "
                         f"--dtype, or none to keep each weight's own")


def formats(weights: dict[str, Lazy]) -> str:
    """How its numbers are stored: "bf16", or "fp32 and fp16" for a mixed file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = dict.fromkeys(names.get(w.dtype, str(w.dtype)) for w in weights.values())
    return " and ".join(found)


def write_own(source: Source, out: Path) -> None:
    """One self-contained file, which every stage reads."""
    with torch.device("meta"):
        shape_only = Llama(source.config)
    weights = {name: w.read() for name, w in source.weights.items()}
    model.save(out, shape_only, source.info["stage"],
               source.tokenizer.model_bytes, source.info["metrics"],
               source.info.get("trained_on") or f"converted from: {source.kind}", weights=weights)


LITTER = ".convert.tmp"  # the end of a hidden folder's name


@contextlib.contextmanager
def new_folder(out: Path):
    """A hidden folder to write into; what is in it becomes `out` at the end, or goes on an error.

    A new folder is renamed, and so appears whole. One that exists, behind a link or as a mounted
    volume, cannot be replaced: its files are moved up, on the same file system, and last the one
    that makes it a model.
    """
    out = out.resolve()
    exists = out.is_dir()
    temporary = out / LITTER if exists else out.with_name(f".{out.name}{LITTER}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
    temporary.mkdir(parents=True)
    moved = []
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        if exists:
            paths = sorted(temporary.iterdir(), key=lambda p: p.name in ("config.json",
                                                                         "params.json"))
            for path in paths:
                moved.append(out / path.name)
                os.replace(path, moved[-1])
            temporary.rmdir()
        else:
            os.replace(temporary, out)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
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


def write_meta(source: Source, out: Path, shards: int) -> None:
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
                part[lookup(name, META)] = mine.contiguous()
            model.write_torch_file(part, folder / f"consolidated.{rank:02d}.pth")


def write_hf(source: Source, out: Path) -> None:
    """A folder that transformers, vLLM, lm-eval and llama.cpp's converter read; streams."""
    check_portable(source.tokenizer, "hf")
    dtype = source.weights["output.weight"].dtype
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
        write_hf_weights(folder, weights)


def write_hf_weights(folder: Path, weights: dict[str, Lazy]) -> None:
    """model.safetensors, or files of at most SHARD_BYTES with the index of what is where."""
    files, sizes = [{}], [0]
    for name, w in weights.items():
        size = math.prod(w.shape) * w.dtype.itemsize
        if files[-1] and sizes[-1] + size > SHARD_BYTES:
            files.append({})
            sizes.append(0)
        files[-1][name], sizes[-1] = w, sizes[-1] + size
    if len(files) == 1:
        write_safetensors(folder / "model.safetensors", weights)
        return
    where = {}
    for i, part in enumerate(files, 1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, part)
        where |= dict.fromkeys(part, name)
    write_json(folder / "model.safetensors.index.json",
               {"metadata": {"total_size": sum(sizes)}, "weight_map": where})


def write_llama2c(source: Source, out: Path) -> None:
    """llama2.c version 0 in float32, and beside it the tokenizer for `./run -z`; streams [l2c]."""
    c = source.config
    check_portable(source.tokenizer, "llama2c")
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
            f.write(raw(as_dtype(name, source.weights[name], torch.float32).read()))

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


class Packing(NamedTuple):
    """One of ggml's ways to store numbers."""

    number: int  # ggml's
    block: int  # numbers per block
    size: int  # bytes per block
    pack: Callable[[Tensor], Tensor]
    file_type: int  # of a file that is mostly this [GGUF]
    limit: float  # a greater number would become infinite


HALF = torch.finfo(torch.float16).max
PACKINGS = {
    "fp32": Packing(0, 1, 4, Tensor.float, 0, torch.finfo(torch.float32).max),
    "fp16": Packing(1, 1, 2, Tensor.half, 1, HALF),
    "bf16": Packing(30, 1, 2, Tensor.bfloat16, 32, torch.finfo(torch.bfloat16).max),
    "q8_0": Packing(8, 32, 34, q8_0, 7, 127 * HALF), "q4_0": Packing(2, 32, 18, q4_0, 2, 8 * HALF)}
REFUSED = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
           14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 20: "IQ4_NL", 21: "IQ3_S",
           23: "IQ4_XS", 34: "TQ1_0", 39: "MXFP4"}  # the usual ones of llama.cpp's other types
PIECE_KINDS = {"normal": 1, "unknown": 2, "control": 3, "user-defined": 4, "unused": 5, "byte": 6}


def unpack(data: np.ndarray, at: int, shape: tuple[int, ...], kind: str) -> Tensor:
    """The tensor at byte `at` of a mapped GGUF file; the inverse of a packing's `pack` [GGUF]."""
    if kind in DTYPES:
        return view(data, at, shape, DTYPES[kind])
    size = PACKINGS[kind].size
    blocks = view(data, at, (math.prod(shape) // 32, size), torch.uint8)
    d = blocks[:, :2].contiguous().view(torch.float16).float()  # (n/32, 1)
    if kind == "q8_0":
        return (blocks[:, 2:].view(torch.int8) * d).view(shape)
    low, high = blocks[:, 2:] & 15, blocks[:, 2:] >> 4
    return ((torch.cat((low, high), 1).float() - 8) * d).view(shape)


def gguf_packing(name: str, shape: tuple[int, ...], dtype: str) -> Packing:
    """The entry of PACKINGS for one weight of a `dtype` file; nearly always that of `dtype`.

    Norms stay float32. Rows that are no multiple of 32 fall back to float16. The output matrix of a
    q4_0 file is q8_0, since its errors go straight into the logits; llama.cpp keeps it finer, too.
    """
    if len(shape) == 1:
        return PACKINGS["fp32"]
    packing = PACKINGS["q8_0" if (name, dtype) == ("output.weight", "q4_0") else dtype]
    return PACKINGS["fp16"] if shape[-1] % packing.block else packing


def gguf_metadata(source: Source, name: str, dtype: str) -> dict:
    """All that llama.cpp must know besides the weights, the tokenizer included [GGUF]."""
    c, text = source.config, source.tokenizer
    ids = range(text.vocab_size)
    return {
        "general.architecture": "llama", "general.name": name, "general.alignment": 32,
        "general.file_type": PACKINGS[dtype].file_type, "general.quantization_version": 2,
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


def write_gguf(source: Source, out: Path, dtype: str | None) -> None:
    """GGUF version 3: counts, metadata, list of tensors, data aligned to 32 bytes; streams [GGUF].

    wq and wk keep Meta's order of rows: llama.cpp turns neighbours for this architecture, and its
    own converter moves Hugging Face's rows back. dtype None: each weight as it is.
    """
    check_portable(source.tokenizer, "gguf")
    own = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
    packings = {name: gguf_packing(name, w.shape, dtype or own.get(w.dtype, "fp32"))
                for name, w in source.weights.items()}
    mostly = dtype or own.get(source.weights["output.weight"].dtype, "fp32")
    metadata = gguf_metadata(source, out.stem, mostly)
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(source.weights), len(metadata))
    for key, value in metadata.items():
        kind, content = gguf_value(value)
        head += gguf_value(key)[1] + struct.pack("<I", kind) + content
    at = 0  # from the start of the data
    for name, w in source.weights.items():
        packing = packings[name]
        head += gguf_value(lookup(name, GGUF))[1]
        head += struct.pack(f"<I{len(w.shape)}Q", len(w.shape), *reversed(w.shape))  # fastest first
        head += struct.pack("<IQ", packing.number, at)
        at += -(-math.prod(w.shape) // packing.block * packing.size // 32) * 32

    def write(f):
        f.write(head)
        for name, w in source.weights.items():
            f.write(bytes(-f.tell() % 32))
            packing = packings[name]
            for rows in w.read().split(1024):  # blocks never cross rows: a few at a time will do
                if packing.limit < torch.finfo(w.dtype).max:
                    check_range(name, rows, packing.limit, f"its type in {out.name}")
                f.write(raw(packing.pack(rows)))
        f.write(bytes(-f.tell() % 32))

    model.atomic_write(out, write)


class Cursor:
    """A place in a mapped file that reading moves on, never beyond the end; ValueError there."""

    def __init__(self, data: np.ndarray):
        self.data, self.at = memoryview(data), 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"byte {self.at:,} announces {size:,} more bytes: truncated")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def numbers(self, letter: str, n: int) -> tuple:
        """n numbers; letter: as in `struct`."""
        return struct.unpack(f"<{n}{letter}", self.take(n * struct.calcsize("<" + letter)))

    def text(self) -> str:
        """A string: its size in 8 bytes, then UTF-8."""
        return self.take(*self.numbers("Q", 1)).decode()

    def value(self, kind: int):
        """A value of the metadata: a number, a string, or a list of one of these [GGUF]."""
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, n = self.numbers("I", 1)[0], self.numbers("Q", 1)[0]
            if inner == 8:
                return [self.text() for _ in range(n)]
            return list(self.numbers(self.letter(inner), n))
        value = self.numbers(self.letter(kind), 1)[0]
        # 1e-5 as a float32 is 9.99999974e-06: the shortest number that means it is what was written
        return float(str(np.float32(value))) if kind == 6 else value

    def letter(self, kind: int) -> str:
        """The letter of a kind of number; ValueError for what is none (a list in a list, too)."""
        letters = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q",
                   11: "q", 12: "d"}
        if kind not in letters:
            raise ValueError(f"byte {self.at:,} has a value of kind {kind}")
        return letters[kind]


def read_gguf(path: Path) -> tuple[dict, dict[str, Lazy]]:
    """(metadata, tensors by GGUF's names) of a mapped file, every place checked [GGUF]."""
    data = map_file(path)
    cursor, metadata, places, spans = Cursor(data), {}, {}, []
    kinds = {packing.number: kind for kind, packing in PACKINGS.items()}
    try:
        if cursor.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, = cursor.numbers("I", 1)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; 2 and 3, little-endian, can be read")
        n_tensors, n_values = cursor.numbers("Q", 2)
        for _ in range(n_values):
            key = cursor.text()
            metadata[key] = cursor.value(*cursor.numbers("I", 1))
        for _ in range(n_tensors):
            name = cursor.text()
            shape = cursor.numbers("Q", *cursor.numbers("I", 1))[::-1]  # fastest first
            number, at = cursor.numbers("I", 1)[0], cursor.numbers("Q", 1)[0]
            if number not in kinds:
                kind = REFUSED.get(number, f"of ggml's type {number}")
                raise ValueError(f"{name} is {kind}; {', '.join(PACKINGS)} can be read")
            if name in places:
                raise ValueError(f"it has {name} twice")
            places[name] = (kinds[number], shape, at)
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align % 8:
            raise ValueError(f"general.alignment is {align!r}")
        start = -(-cursor.at // align) * align
        for name, (kind, shape, at) in places.items():
            packing = PACKINGS[kind]
            if not shape or min(shape) < 1 or shape[-1] % packing.block or at % align:
                raise ValueError(f"{name} has the shape {shape} and begins at byte {at}")
            size = math.prod(shape) // packing.block * packing.size
            spans.append((start + at, start + at + size, name))
        check_spans(spans, len(data))
    except ValueError as e:
        raise ValueError(f"{path} is not a readable GGUF file: {e}") from e
    tensors = {}
    for (name, (kind, shape, _)), (first, _, _) in zip(places.items(), spans):
        read = partial(unpack, data, first, shape, kind)
        tensors[name] = Lazy(shape, DTYPES.get(kind, torch.float32), read)
    return metadata, tensors


def open_gguf(path: Path, tokenizer=None) -> Source:
    """A GGUF file of architecture llama, as llama.cpp's converter and `write_gguf` make it.

    Numbers in blocks become float32 when they are read; a shared embedding is untied by copying.
    """
    metadata, theirs = read_gguf(path)
    config = gguf_config(metadata, path)
    text = Tokenizer(tokenizer or gguf_tokenizer(metadata, path))
    weights = {our_name(name, GGUF, config.n_layers): w for name, w in theirs.items()}
    if "output.weight" not in weights and "tok_embeddings.weight" in weights:
        shared = weights["tok_embeddings.weight"]
        weights["output.weight"] = shared._replace(read=lambda: shared.read().clone())
    return Source("GGUF", config, weights, text).check(path)


# Keys of the metadata that are read, or follow from others; another that is set is refused.
GGUF_KEYS = ("context_length embedding_length block_count feed_forward_length vocab_size "
             "attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon "
             "rope.freq_base tensor_data_layout").split()


def gguf_config(metadata: dict, path: Path) -> ModelConfig:
    """Our configuration from a GGUF file's metadata; ValueError for what Llama 2 does not have."""
    name = metadata.get("general.architecture")
    if name != "llama":
        raise ValueError(f"{path}: general.architecture is {name!r}, only 'llama' can be read")
    if metadata.get("split.count", 1) > 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} files: join them with "
                         f"llama.cpp's `llama-gguf-split --merge`")
    c = {key.removeprefix("llama."): value for key, value in metadata.items()
         if key.startswith("llama.")}
    dim, heads = positive(c, "embedding_length", path), positive(c, "attention.head_count", path)
    plain = {"rope.scaling.type": "none", "rope.dimension_count": dim // heads,
             "attention.key_length": dim // heads, "attention.value_length": dim // heads}
    for key, value in c.items():
        if key not in GGUF_KEYS and value and value != plain.get(key):
            raise ValueError(f"{path}: llama.{key} is {value!r:.60}, which Llama 2 does not have; "
                             f"models that use it cannot be read")
    tokens = metadata.get("tokenizer.ggml.tokens")
    return ModelConfig(
        dim, positive(c, "block_count", path), heads,
        positive(c, "attention.head_count_kv", path, heads),
        positive(c, "feed_forward_length", path),
        positive(c, "vocab_size", path, len(tokens) if isinstance(tokens, list) else None),
        positive(c, "context_length", path),
        number(c, "attention.layer_norm_rms_epsilon", path, 1e-5),
        number(c, "rope.freq_base", path, 10000.0))


def gguf_tokenizer(metadata: dict, path: Path) -> bytes:
    """The SentencePiece model that a GGUF file was made from, as far as it decides ids."""
    c = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if c.get("model") != "llama":
        raise ValueError(f"{path}: its tokenizer is {c.get('model')!r}, only 'llama' "
                         f"(SentencePiece) can be read; pass --tokenizer")
    if not c.get("add_space_prefix", True):
        raise ValueError(f"{path}: its tokenizer has add_space_prefix=False, Llama's is True: its "
                         f"chat format would be another one")
    lists = [c.get(key) for key in ("tokens", "scores", "token_type")]
    types = (str, float, int)
    if not all(isinstance(part, list) and len(part) == len(lists[0] or ()) and
               all(type(item) is kind for item in part) for part, kind in zip(lists, types)):
        raise ValueError(f"{path}: its tokenizer's tokens, scores and token_type are no lists of "
                         f"equal length")
    ids = [c.get(f"{name}_token_id", usual)
           for name, usual in (("unknown", 0), ("bos", 1), ("eos", 2))]
    if not all(type(id) is int and 0 <= id < len(lists[0]) for id in ids) or not set(
            lists[2]) <= set(PIECE_KINDS.values()):
        raise ValueError(f"{path}: its tokenizer has unknown, BOS and EOS at {ids} of "
                         f"{len(lists[0])} pieces, of the kinds {sorted(set(lists[2]))[:9]}")
    return sentencepiece_model(*lists, *ids)


# -------------------------------------------------------------------------------- using it


def load(path, tokenizer=None, device="cpu", dtype=None) -> tuple[Llama, Tokenizer]:
    """Open any format for use: (Llama, Tokenizer).

    dtype None keeps the file's own. Then the weights on a CPU stay mapped; memory is taken only by
    rows that had to move (Hugging Face's wq and wk), shards that had to be joined, numbers in
    blocks, and where a file mixes formats: a network computes in one, the widest of them.
    """
    source, device = open_model(path, tokenizer), model.pick_device(device)
    weights = {n: w.read().to(device, dtype or w.dtype) for n, w in source.weights.items()}
    return model.assemble(source.config, weights, path), source.tokenizer


@dataclass
class Config:
    """One conversion; every field is a flag."""

    checkpoint: str = ""  # our file, a Meta or Hugging Face folder, a llama2.c .bin or a .gguf
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
    empty_folder = cfg.to in ("meta", "hf") and out.is_dir() and all(
        path.name in (LITTER, "lost+found") for path in out.iterdir())  # a volume's own folder
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
    print(f"read {cfg.checkpoint}: {source.kind}, "
          f"{model.count_parameters(source.config):,} parameters, {formats(source.weights)}",
          flush=True)
    for line in source.notes:
        print(line, flush=True)
    if cfg.dtype and cfg.to != "gguf":
        source.weights = {name: as_dtype(name, w, DTYPES[cfg.dtype])
                          for name, w in source.weights.items()}
    if cfg.to == "own":
        write_own(source, out)
    elif cfg.to == "meta":
        write_meta(source, out, cfg.shards)
    elif cfg.to == "hf":
        write_hf(source, out)
    elif cfg.to == "llama2c":
        write_llama2c(source, out)
    else:
        write_gguf(source, out, cfg.dtype)
    size = sum(f.stat().st_size for f in (out.iterdir() if out.is_dir() else [out]))
    dtype = "fp32" if cfg.to == "llama2c" else cfg.dtype or formats(source.weights)
    print(f"wrote {out}: {cfg.to}, {dtype}, {size / 1e6:,.1f} MB")
    if cfg.to == "llama2c":
        print(f"run it with llama2.c: ./run {out} -z {out.with_suffix('.tokenizer.bin')}")


if __name__ == "__main__":
    stage.run(main, Config)
