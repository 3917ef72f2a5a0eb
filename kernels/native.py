"""The C functions as PyTorch sees them: two autograd Functions and one call that generates.

Tensors are float32 on the CPU only, whatever the matrix products inside multiply; `unfit` says why
a model must take the PyTorch path.
"""

from __future__ import annotations

import ctypes, operator

import torch
from torch import Tensor, nn

from kernels.build import Shape, load_library
from model import check_finite

LAYER = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
         "ffn_norm", "feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down")
LAYER_WEIGHTS = operator.attrgetter(*(f"{name}.weight" for name in LAYER))
FEED_FORWARD = LAYER[-3:]  # where none of these learns, their gradients are not computed


_products = "float32"  # which library `library` gives; written by `use`


def use(products: str) -> ctypes.CDLL:
    """Load the library whose products multiply float32 or bfloat16 and take it from now on."""
    global _products
    lib, _products = load_library(products), products
    return lib


def library() -> ctypes.CDLL:
    return load_library(_products)


def unfit(weights, *activations: Tensor) -> str | None:
    """Why these tensors cannot go to C, or None: plain, float32, on the CPU.

    weights, a list, are read where they lie and must be contiguous; activations may be slices of
    something larger, they are made contiguous on the way.
    """
    for what, tensors in (("weights", weights), ("hidden states", activations)):
        for t in tensors:
            if type(t) not in (Tensor, nn.Parameter):
                return f"{what} are of type {type(t).__name__}"  # sharded: FSDP, tensor parallel
            if t.device.type != "cpu" or t.dtype != torch.float32:
                return f"{what} are {str(t.dtype).removeprefix('torch.')} on {t.device.type}"
            if what == "weights" and not t.is_contiguous():
                return "weights are not contiguous"
    return None


def trunk_weights(model) -> list[nn.Parameter]:
    """The parameters in the order that C expects: nine per layer, then the final norm."""
    return [*(weight for layer in model.layers for weight in LAYER_WEIGHTS(layer)),
            model.norm.weight]


def _shape(config) -> Shape:
    names = [name for name, _ in Shape._fields_]
    return Shape(*(getattr(config, name) for name in names))


def _pointers(tensors) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))


def _pointer(tensor: Tensor | None):
    return None if tensor is None else tensor.data_ptr()


def _check(code: int) -> None:
    if code:
        raise MemoryError("not enough memory for this batch: smaller or shorter rows fit")


_taken = {"threads": 0}


def threads() -> int:
    """How many threads C uses."""
    return max(_taken["threads"], torch.get_num_threads())


def take_threads() -> None:
    """C has PyTorch's threads from now on, and PyTorch one.

    After each operation the threads of PyTorch's OpenMP spin for milliseconds, in wait for the
    next, on the cores that C's threads need: a training step of `tiny` on 4 x 256 tokens took 118
    ms with them and 89 without. What PyTorch still does alone, clipping and the optimizer, is 6 ms.
    """
    _taken["threads"] = threads()
    torch.set_num_threads(1)


def keep_memory() -> None:
    """What the process frees it keeps, for the next step to take: glibc only, else nothing.

    By default large blocks go back to the operating system, which clears every page again for the
    next step: 6 of the 59 ms of a training step of `tiny` on 2 x 256 tokens (median of 6 pairs).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # numbers of malloc.h
        mallopt(mmap_threshold, 32 << 20)  # bytes; the largest it allows
        mallopt(trim_threshold, 256 << 20)
        mallopt(top_pad, 64 << 20)


def return_threads() -> None:
    """PyTorch has its threads back; nothing if it gave none."""
    if _taken["threads"]:
        torch.set_num_threads(_taken["threads"])
        _taken["threads"] = 0


def _threads(work: int) -> int:
    return max(1, min(threads(), work, 256))


# ---------------------------------------------------------------------------------- trunk

_spare: list[Tensor] = []  # buffers of activations that the last steps gave back: the operating
SPARE = 3                  # system clears new memory page by page, 5% of a step
MEMORY = 1 << 29           # numbers that a Memory may hold; rows that need more do without
LOGITS_KEPT = 1 << 27      # logits (N, V) kept for the backward pass; more are computed again


def _take(size: int) -> Tensor:
    """A float32 buffer of at least `size` numbers, content undefined."""
    fits = [b for b in _spare if size <= b.numel() <= 2 * size]
    if not fits:
        return torch.empty(size)
    best = min(fits, key=torch.numel)
    _spare[:] = [b for b in _spare if b is not best]
    return best


def _give_back(buffer: Tensor | None) -> None:
    if buffer is not None:
        _spare[:] = [buffer, *_spare][:SPARE]


def trunk(model, tokens: Tensor, lengths: Tensor | None, segments: Tensor | None) -> Tensor:
    """`kernels.trunk` in C; float32 (B, T, D)."""
    B, T = tokens.shape
    x = model.tok_embeddings(tokens)
    lengths = torch.full((B,), T) if lengths is None else lengths.long().cpu().contiguous()
    if lengths.shape != (B,) or (B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T):
        raise ValueError(f"lengths {lengths.tolist()} do not fit tokens of shape {(B, T)}: one "
                         f"number from 0 to {T} per row")
    if segments is not None:
        if segments.shape != (B, T):
            raise ValueError(f"segments have shape {tuple(segments.shape)}, tokens {(B, T)}")
        segments = segments.long().contiguous()
    rope = [t[:T].contiguous() for t in model.rope(torch.float32, x.device, T)]
    weights = trunk_weights(model)
    keep = torch.is_grad_enabled() and any(w.requires_grad for w in (x, *weights))
    if keep:
        return Trunk.apply(_shape(model.config), lengths, segments, rope, x, *weights)
    return _trunk_forward(_shape(model.config), lengths, segments, rope, x, weights, None)


def _trunk_forward(shape, lengths, segments, rope, x, weights, saved) -> Tensor:
    B, T, _ = x.shape
    x, hidden = x.detach().contiguous(), torch.empty(x.shape)
    _check(library().trunk_forward(
        ctypes.byref(shape), B, T, x.data_ptr(), lengths.data_ptr(), _pointer(segments),
        _pointers(weights), rope[0].data_ptr(), rope[1].data_ptr(), _pointer(saved),
        hidden.data_ptr(), _threads(B)))
    return hidden


class Trunk(torch.autograd.Function):
    """All layers and the final norm as one differentiable operation on embedded tokens."""

    @staticmethod
    def forward(ctx, shape, lengths, segments, rope, x, *weights):
        B, T, _ = x.shape
        ctx.lib = library()  # what it saves, only the same library can read
        ctx.kept = _take(B * ctx.lib.saved_size(ctypes.byref(shape), T))
        ctx.shape, ctx.lengths, ctx.segments, ctx.rope = shape, lengths, segments, rope
        ctx.save_for_backward(*weights)  # PyTorch complains if they change before backward
        return _trunk_forward(shape, lengths, segments, rope, x, weights, ctx.kept)

    @staticmethod
    def backward(ctx, d_hidden):
        weights = ctx.saved_tensors
        if ctx.kept is None:
            raise RuntimeError("second backward pass through kernels.trunk: its activations are "
                               "given back after the first; --kernels torch can keep them")
        B, T, D = d_hidden.shape
        d_hidden, dx, n = d_hidden.contiguous(), torch.empty(B, T, D), _threads(B)
        gradients, needed = torch.empty(sum(w.numel() for w in weights)), ctx.needs_input_grad[5:]
        ffn = any(need for i, need in enumerate(needed[:-1]) if LAYER[i % 9] in FEED_FORWARD)
        _check(ctx.lib.trunk_backward(
            ctypes.byref(ctx.shape), B, T, d_hidden.data_ptr(), ctx.lengths.data_ptr(),
            _pointer(ctx.segments), _pointers(weights), ctx.rope[0].data_ptr(),
            ctx.rope[1].data_ptr(), ctx.kept.data_ptr(), dx.data_ptr(), gradients.data_ptr(), ffn,
            n))
        ctx.kept = _give_back(ctx.kept)
        parts = gradients.split([w.numel() for w in weights])
        parts = [p.view_as(w) if need else None
                 for p, w, need in zip(parts, weights, needed)]
        return None, None, None, None, dx, *parts


# ----------------------------------------------------------------------------------- head


class TokenLogprobs(torch.autograd.Function):
    """log p(targets) at chosen rows: hidden (any, D), weight (V, D), rows, targets (N) -> (N)."""

    @staticmethod
    def forward(ctx, hidden, weight, rows, targets, temperature):
        N, (V, D) = len(rows), weight.shape
        hidden = hidden.contiguous()
        logp, sums, ctx.lib = torch.empty(N), torch.empty(2, N), library()
        keep = any(ctx.needs_input_grad) and N * V <= LOGITS_KEPT
        ctx.kept = _take(ctx.lib.kept_size(N, V)) if keep else None
        _check(ctx.lib.head_forward(
            N, D, V, hidden.data_ptr(), rows.data_ptr(), weight.data_ptr(), targets.data_ptr(),
            temperature, logp.data_ptr(), sums.data_ptr(), _pointer(ctx.kept), _threads(N)))
        ctx.save_for_backward(hidden, weight, rows, targets, sums)
        ctx.temperature = temperature
        return logp

    @staticmethod
    def backward(ctx, g):
        hidden, weight, rows, targets, sums = ctx.saved_tensors
        N, (V, D), g = len(rows), weight.shape, g.contiguous()
        d_hidden, d_weight = torch.zeros_like(hidden), torch.empty_like(weight)
        _check(ctx.lib.head_backward(
            N, D, V, hidden.data_ptr(), rows.data_ptr(), weight.data_ptr(), targets.data_ptr(),
            ctx.temperature, sums.data_ptr(), _pointer(ctx.kept), g.data_ptr(),
            d_hidden.data_ptr(), d_weight.data_ptr(), _threads(V)))
        ctx.kept = _give_back(ctx.kept)  # a second backward pass computes the logits again
        return d_hidden, d_weight if ctx.needs_input_grad[1] else None, None, None, None


def token_logprobs(hidden, output_weight, targets, chosen, temperature) -> Tensor:
    """`kernels.token_logprobs` in C: chosen is bool (B, T) and has at least one True."""
    rows = chosen.reshape(-1).nonzero().squeeze(-1)  # (N,)
    picked = targets.reshape(-1)[rows].long()
    if int(picked.min()) < 0 or int(picked.max()) >= len(output_weight):
        raise ValueError(f"targets {int(picked.min())}..{int(picked.max())} lie outside the "
                         f"vocabulary 0..{len(output_weight) - 1}")
    logp = TokenLogprobs.apply(hidden.flatten(0, -2), output_weight, rows, picked,
                               float(temperature))
    return torch.zeros(chosen.shape).masked_scatter(chosen, logp)


# -------------------------------------------------------------------------------- rollout


def known_start(read: list[int], prompt: list[int]) -> int:
    """How many tokens of `prompt` were read before: never its last, which must take its step."""
    pairs = enumerate(zip(read, prompt[:-1]))
    return next((i for i, (old, new) in pairs if old != new), min(len(read), len(prompt) - 1))


class Memory:
    """Keys and values of what the rows of a dialogue have read, kept from one rollout to the next.

    The rows are those of the first rollout that gets it, by their ids; the weights must stay.
    """

    def __init__(self):
        self.cache, self.read = None, {}  # (rows, row_cache_size); {row id: (place, tokens)}

    def recall(self, ids: list[int], prompts, size: int) -> list[tuple[int, int]]:
        """(tokens of the prompt whose keys are in the cache, place there) of each row.

        Below half of a prompt it is 0: many new tokens are faster in matrix form.
        """
        if self.cache is None and len(ids) * size <= MEMORY:
            self.read = {row: (place, []) for place, row in enumerate(ids)}
            self.cache = torch.empty(len(ids), size)
        if self.cache is None:
            return [(0, 0)] * len(ids)
        if len(set(ids)) < len(ids) or not self.read.keys() >= set(ids):
            raise ValueError(f"row_ids {ids[:9]}...: a memory wants different rows, all of them "
                             f"among the {len(self.read)} of its first rollout")
        found = []
        for row, prompt in zip(ids, prompts):
            place, tokens = self.read[row]
            known = known_start(tokens, prompt)
            found.append((known if 2 * known >= len(prompt) else 0, place))
        return found

    def keep(self, ids: list[int], prompts, answers: list[list[int]]) -> None:
        """After a rollout: the last token of an answer has not been read."""
        if self.cache is not None:
            for row, prompt, answer in zip(ids, prompts, answers):
                self.read[row] = self.read[row][0], [*prompt, *answer][:-1]


def rollout(model, prompts, max_new_tokens, temperature, top_p, seed, stop, row_ids,
            memory=None):
    """`kernels.rollout` in C; prompts have been checked."""
    B, c = len(prompts), model.config
    ids = torch.tensor(list(row_ids) if row_ids is not None else range(B))
    if len(ids) != B:
        raise ValueError(f"{len(ids)} row_ids given for {B} prompts: one per prompt")
    size = library().row_cache_size(ctypes.byref(_shape(c)), c.max_seq_len)
    found = memory.recall(ids.tolist(), prompts, size) if memory else [(0, 0)] * B
    known, places = torch.tensor(found).t().contiguous()
    flat = torch.tensor([token for prompt in prompts for token in prompt])
    starts = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0)  # (B + 1,)
    longest = int((starts[1:] - starts[:-1]).max())
    room = max(min(max_new_tokens, c.max_seq_len - min(len(p) for p in prompts)), 0)
    tokens, logps = torch.empty(B, room, dtype=torch.long), torch.empty(B, room)
    counts = torch.zeros(B, dtype=torch.long)
    end = min(longest + max_new_tokens, c.max_seq_len)
    cos, sin = (t[:end].contiguous() for t in model.rope(torch.float32, torch.device("cpu"), end))
    weights = [*trunk_weights(model), model.tok_embeddings.weight, model.output.weight]
    _check(library().rollout(
        ctypes.byref(_shape(c)), _pointers(weights), cos.data_ptr(), sin.data_ptr(), B,
        c.max_seq_len, room, flat.data_ptr(), starts.data_ptr(), ids.data_ptr(), known.data_ptr(),
        places.data_ptr(), _pointer(memory.cache if memory else None), float(temperature),
        float(top_p), ctypes.c_int64(seed).value, -1 if stop is None else stop, tokens.data_ptr(),
        logps.data_ptr(), counts.data_ptr(), _threads(B)))
    rows = counts.tolist()
    drawn = torch.arange(room) < counts[:, None]  # (B, room)
    check_finite(logps[drawn])
    answers = [t[:n] for t, n in zip(tokens.tolist(), rows)]
    if memory and room:
        memory.keep(ids.tolist(), prompts, answers)
    return answers, [p[:n] for p, n in zip(logps.tolist(), rows)]
