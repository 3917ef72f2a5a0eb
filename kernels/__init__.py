"""How it goes fast: three functions that every stage calls, in C or in PyTorch.

    print(kernels.choose("auto", device))                         # one line: which path, and why
    hidden = kernels.trunk(model, tokens, lengths, segments)      # (B, T, D), differentiable
    logp = kernels.token_logprobs(hidden, model.output.weight, targets, mask)      # (B, T), too
    tokens, logprobs = kernels.rollout(model, prompts, max_new_tokens)

Losses, masks and the optimizer stay in each stage, in PyTorch. The PyTorch path is a few lines in
this file around `model.py`, which is always right; the C path computes the same on the CPU. Read
model.py first, then trunk.c, block.c, layer.c, attention.c, gemm.c, head.c, rollout.c.

Why C is faster than PyTorch on a CPU, though both spend their time in matrix products:

1. PyTorch runs operation by operation over the whole batch. At B 32 x T 256 one activation of the
   `tiny` preset has 4 to 12 MB: it goes out to memory and comes back for every norm, rotation,
   product, mask, softmax and sum, forward and backward. Here one sequence goes through all layers
   in one core, and what one operation writes (some 100 KB) the next finds in that core's cache.
2. Threads that share every operation wait for each other after each, some hundred times per step,
   and each wait lasts as long as the slowest. Here each thread has its own sequences from first
   layer to last and waits once. On a machine that has other things to do this counts most.
   PyTorch is left one thread: its idle ones spin on the cores that C needs (native.take_threads).
   And each begins on a core of its own (machine.h: take_core): left to the system, after a pause
   the two threads of a decoder often shared one of two cores, at a third of the speed.
3. Attention keeps no (T, T) matrix, computes only the half below the diagonal, and its backward
   pass is five matrix products on blocks that stay in cache. PyTorch's on a CPU is slow.
4. Only chosen positions go through the head, and its logits (B, T, V) never exist as floats; the
   forward pass leaves them to the backward pass in the form that its products read.
5. Generating, a step of PyTorch is some 150 small operations, each 1 to 15 us before it computes
   anything. Here all steps of all rows are one call, and of a dialogue's next prompt only what is
   new is read (Memory): half the time over ten turns of gatt.py's.
6. Matrix products multiply bfloat16 where that is faster: with AVX512-BF16 (twice as many
   multiply-adds per instruction as float32, half the bytes) but without AMX (Intel's processors,
   where float32 was faster: build.py). Everything that is added up, kept or handed to PyTorch stays
   float32: sums of products, the residual stream, norms, softmax, gradients, weights.
   LLAMA_PRODUCTS=float32 or bfloat16 decides otherwise.

Measured, a training step (forward, loss, backward) of dim 128, 4 layers, 4 heads, 2 kv heads, FFN
352, vocabulary 1024, 256 tokens a sequence, on one core, in tokens per second of processor time:

                                                    Zen 3 (AVX2)    Zen 5 (AVX512-BF16)
    PyTorch, operation by operation (model.py)       4800           10,800
    the head in C, the trunk in PyTorch              4800           12,000  1.1x
    trunk and head in C, float32 products            7700  1.6x     29,900  2.8x
    the same, bfloat16 products                      5600           50,000  4.6x

(without an instruction for them, bfloat16 products are plain C, a twin for the tests).

How far from the limit: of such a step on Zen 5 65% is in the tiles of gemm.c, at nine tenths of
what the processor can multiply; 7% goes into packing and narrowing factors, 6% into SwiGLU, 5% into
attention's softmax, 3% into the head's, 3% into norms. On Zen 3 the tiles take 81%: the slower the
products, the less the rest counts.

What it costs: weights are packed at each call (a few ms), each thread has its own gradients, and
the forward pass keeps about 1400 numbers per token and layer at `tiny` for the backward pass.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import native
from kernels.build import PRODUCTS, fastest_products
from kernels.native import Memory
from model import check_prompts, logprobs
from model import rollout as torch_rollout

LOGITS_AT_ONCE = 1 << 26  # numbers of the (n, V) logits that the PyTorch path keeps at a time

_path = {"kind": "torch", "told": set()}  # written by `choose`, read by the functions below


def choose(kind: str = "auto", device: torch.device | str = "cpu",
           products: str | None = None) -> str:
    """Pick the path for the whole process; returns one line saying which and why.

    kind: auto (C where it can run), c (ValueError where it cannot), torch. Until it is called,
    everything runs in PyTorch. products: what the matrix products in C multiply, float32 or
    bfloat16; auto is bfloat16 where the processor is faster with it. None reads
    LLAMA_PRODUCTS from the environment. Sums, weights, gradients and results are always float32.
    """
    if kind not in ("auto", "c", "torch"):
        raise ValueError(f"--kernels {kind!r}: choose auto, c or torch")
    products = products or os.environ.get("LLAMA_PRODUCTS") or "auto"
    if products not in ("auto", *PRODUCTS):
        raise ValueError(f"LLAMA_PRODUCTS={products}: choose auto, {' or '.join(PRODUCTS)}")
    native.return_threads()
    _path.clear()
    _path.update(kind="torch", told=set())
    why = None
    if kind == "torch":
        return "kernels: PyTorch, as asked"
    if torch.device(device).type != "cpu":
        why = f"the C kernels run on the CPU, not on {torch.device(device).type}"
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1:
        why = "under torchrun every path is PyTorch's"
    else:
        try:
            lib = native.use(fastest_products() if products == "auto" else products)
        except OSError as e:
            why = str(e)
    if why is None:
        _path["kind"] = "c"
        native.take_threads()
        native.keep_memory()
        return (f"kernels: C ({lib.isa().decode()}, {lib.products().decode()} products, "
                f"{native.threads()} threads)")
    if kind == "c":
        raise ValueError(f"--kernels c is not possible: {why}; --kernels auto falls back")
    return f"kernels: PyTorch ({why})"


def _use_c(weights, *activations: Tensor) -> bool:
    """Whether this call goes to C; says once why not when C was chosen but cannot be used."""
    if _path["kind"] != "c":
        return False
    why = native.unfit(weights, *activations)
    if why:
        native.return_threads()  # PyTorch has work after all
    if why and why not in _path["told"]:
        _path["told"].add(why)
        print(f"kernels: PyTorch for some calls ({why}; C takes float32 on the CPU)", flush=True)
    return why is None


def trunk(model, tokens: Tensor, lengths: Tensor | None = None,
          segments: Tensor | None = None) -> Tensor:
    """Everything but the head: tokens int64 (B, T) -> hidden (B, T, D), differentiable.

    lengths: int64 (B,), rows are padded on the right and hidden is 0 from lengths[b] on.
    segments: int64 (B, T), a token sees only its own segment (packed documents).
    """
    fits = tokens.shape[1] <= model.config.max_seq_len  # if not, model.hidden says so
    if fits and tokens.numel() and _use_c(model.parameters()):
        return native.trunk(model, tokens, lengths, segments)
    hidden = model.hidden(tokens, segments=segments)
    if lengths is None:
        return hidden
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (B, T)
    return hidden * real.unsqueeze(-1)


def token_logprobs(hidden: Tensor, output_weight: Tensor, targets: Tensor, mask: Tensor,
                   temperature: float = 1.0) -> Tensor:
    """log p(targets) where mask is not 0, and 0 elsewhere: float32 (B, T), differentiable.

    hidden (B, T, D); output_weight (V, D); targets int64 (B, T), any value where mask is 0; mask
    bool or number (B, T), used as a selection, not as a weight. Position t's target is whatever
    stands at targets[:, t]: the caller does the shift by one.
    """
    if hasattr(output_weight, "full_tensor"):  # split over tensor-parallel ranks: gather it
        output_weight = output_weight.full_tensor()
    chosen = mask.bool()
    if _use_c([output_weight], hidden) and chosen.any():
        return native.token_logprobs(hidden, output_weight, targets, chosen, temperature)
    if not chosen.any():
        none = hidden.new_zeros(chosen.shape, dtype=torch.float32)
        return none + 0 * (hidden.sum() + output_weight.sum())  # ranks wait for both gradients
    logp = _logprobs_in_chunks(hidden[chosen], output_weight, targets[chosen], temperature)
    return logp.new_zeros(chosen.shape).masked_scatter(chosen, logp)


def _logprobs_in_chunks(hidden, weight, targets, temperature) -> Tensor:
    """(N, D), (V, D), (N,) -> (N,); logits of one chunk exist at a time, backward redoes them."""
    rows, one = max(LOGITS_AT_ONCE // weight.shape[0], 1), _path.get("compiled", _logprobs)
    if len(targets) <= rows:
        return one(hidden, weight, targets, temperature)
    return torch.cat([checkpoint(one, h, weight, t, temperature, use_reentrant=False)
                      for h, t in zip(hidden.split(rows), targets.split(rows))])


def _logprobs(hidden, weight, targets, temperature) -> Tensor:
    return logprobs(F.linear(hidden, weight), targets, temperature)


def compile_model(model) -> None:
    """Send the blocks and the head of the PyTorch path through PyTorch's own compiler (--compile).

    On a GPU a block in PyTorch is some thirty small operations around seven matrix products, and
    each reads and writes all activations in the GPU's memory; compiled, neighbours become one.
    Decoding stays as it is: its shapes change with every token. Where the compiler fails, one line
    says so and that function runs as it is.
    """
    for layer in model.layers:
        layer.body = _compiled_for_training(layer.body)
    _path["compiled"] = _compiled(_logprobs)


def _compiled_for_training(body):
    fast = _compiled(body)
    return lambda x, rope, mask, append: (fast if append is None else body)(x, rope, mask, append)


def _compiled(function):
    from torch._dynamo.exc import TorchDynamoException

    fast = [torch.compile(function)]

    def call(*arguments):
        try:
            if fast:
                return fast[0](*arguments)
        except TorchDynamoException as e:  # no compiler, no Triton: go on without
            fast.clear()
            if "compile" not in _path["told"]:
                _path["told"].add("compile")
                why = str(e).strip().splitlines()[0]
                print(f"kernels: --compile is not possible here, going on without: {why}",
                      flush=True)
        return function(*arguments)

    return call


def rollout(model, prompts, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
            seed: int = 0, stop: int | None = None, row_ids=None,
            memory: Memory | None = None) -> tuple[list[list[int]], list[list[float]]]:
    """Answer all prompts: (tokens, logprobs), a list per row, the stop token included.

    Same contract and same random numbers as `model.rollout`, which is the PyTorch path. memory, a
    `Memory()` given to each rollout of a dialogue: C reads only what is new since the last.
    """
    if not model.config.scalar_head and _use_c(model.parameters()):
        check_prompts(prompts, model.config)
        return native.rollout(model, prompts, max_new_tokens, temperature, top_p, seed, stop,
                              row_ids, memory)
    return torch_rollout(model, prompts, max_new_tokens, temperature, top_p, seed, stop, row_ids)


def decoder(config, weights, dtype: str | None = None):
    """What speaks one answer at a time, a `kernels.decode.Decoder`; None on the PyTorch path.

    weights: our names to functions that return the tensor; dtype: fp32, bf16, int8 or int4, None:
    fp32 if the weights are, else bf16. PyTorch's counterpart is `model.stream`.
    """
    if _path["kind"] != "c":
        return None
    from kernels.decode import Decoder

    if dtype is None:
        dtype = "fp32" if weights["output.weight"]().dtype == torch.float32 else "bf16"
    return Decoder(config, weights, dtype)
