"""One answer at a time, fast, with weights in 32, 16, 8 or 4 bits: what chat.py speaks with.

    decoder = Decoder(config, weights, "int4")      # weights: {name: function that returns it}
    for token in decoder.stream(prompt, 100): ...   # as model.stream, and the same tokens in fp32

Weights are taken one at a time, so what a reader of convert.py has mapped from disk is never in
memory as a whole: a 7B model in int4 is 3.8 GiB. A format that the file has already (fp32, bf16)
is not copied at all. decode.c has the formats and the arithmetic.

The cache stays from one call to the next: of a dialogue only what is new is read.
"""

from __future__ import annotations

import ctypes, mmap, os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.build import Shape, load_library
from kernels.native import _check, _shape, known_start, threads
from model import ModelConfig, check_finite, check_prompts, rope_table

FORMATS = ("fp32", "bf16", "fp16", "int8", "int4")  # their places are decode.c's numbers
STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BURST = 0.02  # s: tokens faster than this come several per call, too quick for an eye to see
AT_ONCE = 128  # tokens of a prompt per call: Ctrl-C waits for a call to end


class Matrix(ctypes.Structure):
    """The Matrix of decode.c."""

    _fields_ = [("data", ctypes.c_void_p), ("rows", ctypes.c_int64), ("cols", ctypes.c_int64),
                ("format", ctypes.c_int64)]


MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


class DecoderLayer(ctypes.Structure):
    """The DecoderLayer of decode.c."""

    _fields_ = [("attention_norm", ctypes.c_void_p), ("ffn_norm", ctypes.c_void_p),
                *((name, Matrix) for name in MATRICES)]


class Network(ctypes.Structure):
    """The Decoder of decode.c."""

    _fields_ = [("shape", Shape), ("embeddings", Matrix), ("output", Matrix),
                ("final_norm", ctypes.c_void_p), ("layers", ctypes.POINTER(DecoderLayer)),
                ("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("keys", ctypes.c_void_p),
                ("values", ctypes.c_void_p), ("context", ctypes.c_int64),
                ("cache_format", ctypes.c_int64)]


def memory(size: int) -> Tensor:
    """uint8 (size,), zeros, in large pages where the system has them: fewer look-ups per byte."""
    block = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            block.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without them
    return torch.frombuffer(block, dtype=torch.uint8)


class Decoder:
    """A network with its weights in one format, and the cache of the tokens read so far.

    weights: our names to functions that return the tensor, fp32, bf16 or fp16; `dtype` one of
    fp32 bf16 int8 int4. context: tokens that the cache holds, at most and by default the
    network's. int4 keeps the output matrix in int8: its errors go straight into the logits.
    ValueError for a reward model and for a dtype there is not; OSError without a C compiler.
    """

    def __init__(self, config: ModelConfig, weights: dict[str, Callable[[], Tensor]], dtype: str,
                 context: int | None = None):
        if dtype not in ("fp32", "bf16", "int8", "int4"):
            raise ValueError(f"dtype {dtype!r}: choose fp32, bf16, int8 or int4")
        if config.scalar_head:
            raise ValueError("this model scores answers and gives none")
        self.config, self.dtype, self._lib = config, dtype, load_library()
        self.context = min(context or config.max_seq_len, config.max_seq_len)
        self.read = []  # the tokens whose keys and values are in the cache
        self._weights, self._held = weights, []  # _held: what the pointers point to
        self._packed = memory(sum(self._size(name) for name in weights))
        self._used = 0  # bytes of _packed
        network = self._network = Network(shape=_shape(config), context=self.context)
        network.embeddings = self._matrix("tok_embeddings.weight")
        network.final_norm = self._vector("norm.weight")
        network.layers = (DecoderLayer * config.n_layers)(
            *(self._layer(f"layers.{i}.") for i in range(config.n_layers)))
        network.output = self._matrix("output.weight")
        self._rope = ()  # (cos, sin), as far as has been read: see `_reach`
        kind = "fp32" if dtype == "fp32" else "bf16"
        network.cache_format = FORMATS.index(kind)
        numbers = config.n_layers * self._lib.cache_numbers(ctypes.byref(network.shape),
                                                            self.context)
        network.keys, network.values = (
            self._hold(memory(numbers * STORED[kind].itemsize)) for _ in range(2))

    @classmethod
    def of(cls, model, dtype: str, context: int | None = None) -> Decoder:
        """The same for a Llama in memory."""
        return cls(model.config, {name: lambda p=p: p for name, p in model.state_dict().items()},
                   dtype, context)

    # ---- the weights

    def _format(self, name: str) -> str:
        """The format that a matrix is kept in; the embeddings' is the file's own."""
        return "int8" if self.dtype == "int4" and name == "output.weight" else self.dtype

    def _size(self, name: str) -> int:
        """Bytes that a weight takes in _packed."""
        c, kind = self.config, self._format(name)
        if kind not in ("int8", "int4") or "norm" in name or name == "tok_embeddings.weight":
            return 0
        kv, (D, F) = c.n_kv_heads * c.head_dim, (c.dim, c.hidden_dim)
        shape = {"wk": (kv, D), "wv": (kv, D), "w_gate": (F, D), "w_up": (F, D), "w_down": (D, F),
                 "output": (c.vocab_size, D)}.get(name.split(".")[-2], (D, D))
        return self._lib.packed_bytes(*shape, FORMATS.index(kind))

    def _hold(self, tensor: Tensor) -> int:
        """Its address; the tensor lives as long as the decoder."""
        self._held.append(tensor)
        return tensor.data_ptr()

    def _vector(self, name: str) -> int:
        return self._hold(self._weights[name]().detach().float().cpu().contiguous())

    def _layer(self, prefix: str) -> DecoderLayer:
        parts = [f"{prefix}{'attention' if m in MATRICES[:4] else 'feed_forward'}.{m}.weight"
                 for m in MATRICES]
        return DecoderLayer(self._vector(f"{prefix}attention_norm.weight"),
                            self._vector(f"{prefix}ffn_norm.weight"), *map(self._matrix, parts))

    def _matrix(self, name: str) -> Matrix:
        """The weight `name` as C reads it: quantised, converted, or as it lies in the file."""
        tensor, kind = self._weights[name]().detach().cpu(), self._format(name)
        if kind in ("fp32", "bf16") and name != "tok_embeddings.weight":
            tensor = tensor.to(STORED[kind])
        elif tensor.dtype not in STORED.values():
            tensor = tensor.float()
        tensor = tensor.contiguous()
        own = next(name for name, d in STORED.items() if d == tensor.dtype)
        matrix = Matrix(tensor.data_ptr(), *tensor.shape, FORMATS.index(own))
        if kind not in ("int8", "int4") or name == "tok_embeddings.weight":
            self._hold(tensor)
            return matrix
        size, start = self._size(name), self._packed.data_ptr() + self._used
        self._used += size
        self._lib.quantise(ctypes.byref(matrix), FORMATS.index(kind), start,
                           threads())
        return Matrix(start, *tensor.shape, FORMATS.index(kind))

    # ---- what it does

    def _reach(self, length: int) -> None:
        """Have the rotary table for so many positions; of a long context the rest is never made."""
        if self._rope and len(self._rope[0]) >= length:
            return
        rows = min(self.context, max(2 * length, 4096))
        table = rope_table(self.config.head_dim, rows, self.config.rope_theta)
        self._rope = tuple(t.float() for t in table)
        self._network.cos, self._network.sin = (t.data_ptr() for t in self._rope)

    def _generate(self, tokens: list[int], max_new: int, temperature=0.0, top_p=1.0, seed=0,
                  stop=None) -> tuple[list[int], Tensor]:
        """Read tokens, draw some: (drawn, logits float32 (V,)) as `generate` in decode.c."""
        prompt, drawn = torch.tensor(tokens), torch.empty(max(max_new, 1), dtype=torch.long)
        logits = torch.empty(self.config.vocab_size)
        self._reach(min(len(self.read) + len(tokens) + max_new, self.context))
        n = self._lib.generate(
            ctypes.byref(self._network), len(self.read), len(tokens), prompt.data_ptr(), max_new,
            BURST, temperature, top_p, ctypes.c_int64(seed).value, -1 if stop is None else stop,
            drawn.data_ptr(), logits.data_ptr(), min(threads(), 256))
        _check(min(n, 0))
        drawn = drawn[:n].tolist()
        self.read += tokens + drawn[:-1]
        return drawn, logits

    def stream(self, prompt, max_new_tokens: int, temperature: float = 0.6, top_p: float = 0.9,
               seed: int | None = None, stop: int | None = None) -> Iterator[int]:
        """Yield the tokens of one answer as they come; `stop` ends it and is yielded.

        As `model.stream`: the same random numbers, and in fp32 the same tokens as long as rounding
        does not decide. Ends where the context ends. ValueError for a prompt that does not fit.
        """
        check_prompts([prompt], self.config)
        if len(prompt) >= self.context:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the decoder's context "
                             f"{self.context}: an answer needs at least one; shorten it")
        seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
        left = min(max_new_tokens, self.context - len(prompt))
        tokens = self._forget(list(prompt))
        while len(tokens) > AT_ONCE and left > 0:
            self._generate(tokens[:AT_ONCE], 0)
            tokens = tokens[AT_ONCE:]
        while left > 0:
            tokens, logits = self._generate(tokens, left, temperature, top_p, seed, stop)
            check_finite(logits.logsumexp(0))
            yield from tokens
            left -= len(tokens)
            if tokens[-1] == stop:
                return
            tokens = tokens[-1:]

    def _forget(self, prompt: list[int]) -> list[int]:
        """Keep in the cache what `prompt` begins with; returns what is still to be read."""
        same = known_start(self.read, prompt)
        self.read = self.read[:same]
        return prompt[same:]

    def logits(self, tokens) -> Tensor:
        """float32 (T, V): the logits behind each of T tokens, read one by one as in an answer."""
        check_prompts([tokens], self.config)
        self.read = []
        return torch.stack([self._generate([int(t)], 1)[1] for t in tokens])
