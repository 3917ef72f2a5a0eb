"""Each kernel alone: what C computes, what float64 says, how much work it is, and PyTorch's twin.

`python -m bench` reads this list twice: to check that `ours` gives the numbers of `exact`, and to
time `ours` and `peer`. Forward and backward passes stand apart, as they are apart in C.

Two kinds: one sequence in one core (`rows` 1), through bench.c, for what the trunk does to each
sequence; and whole calls with threads of their own (`rows` B), as every stage makes them.
"""

from __future__ import annotations

import ctypes, itertools, os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import model as M
from kernels import build, native

SOURCES = (Path(__file__).parent / "bench.c",)

SIGNATURES = {  # of bench.c; letters as in build.SIGNATURES
    "bench_multiply_add": "ip", "bench_read": "iipp", "bench_copy": "iipp",
    "bench_product": "iniiippp", "bench_rmsnorm": "iiippfpp", "bench_rmsnorm_backward": "iiipppppp",
    "bench_rope": "ipipppf", "bench_swiglu": "iiipp", "bench_swiglu_backward": "iiipppp",
    "bench_attention": "ipippp", "bench_attention_backward": "ipippppp"}


@dataclass
class Op:
    """One kernel on given numbers."""

    name: str
    sizes: str  # for the reader
    ours: Callable[[int], list[Tensor]]  # run so many times in C; what the first run gives
    exact: Callable[[], list[Tensor]]  # the same results in float64
    peer: Callable[[int], Callable[[], object]]  # B -> a function: B sequences in PyTorch
    flops: float = 0  # operations per run, where arithmetic is the limit; repeated ones left out
    bytes: float = 0  # read and written per run, where moving numbers is
    rows: int = 1  # sequences per run of `ours`


def library() -> ctypes.CDLL:
    """The kernels in use and bench.c, compiled together, with bench.c's functions ready to call."""
    products = native.library().products().decode()
    lib = build.load_library(products, SOURCES)
    for name, letters in SIGNATURES.items():
        getattr(lib, name).argtypes = [build.TYPES[c] for c in letters]
    return lib


def call(name: str, *arguments) -> int:
    """A function of bench.c; tensors are passed by address. MemoryError if it reports one."""
    code = getattr(library(), name)(*(a.data_ptr() if isinstance(a, Tensor) else a
                                      for a in arguments))
    if code < 0:
        raise MemoryError(f"{name}: not enough memory")
    return code


def repeated(function):
    """A function without arguments as one that runs it `repeat` times."""
    return lambda repeat: [function() for _ in range(repeat)]


def in_cores(functions: list):
    """Each function(repeat) in a thread and a core of its own, at once; C leaves Python's lock."""
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = itertools.cycle(there)
    pool = ThreadPoolExecutor(len(functions), initializer=lambda: there and os.sched_setaffinity(
        0, {next(cores)}))  # of the thread that calls it
    return lambda repeat: list(pool.map(lambda f: f(repeat), functions))


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)


def gradients(outputs: Tensor, inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, g, retain_graph=True))


def doubles(*tensors: Tensor) -> list[Tensor]:
    """Float64 twins that require gradients."""
    return [t.detach().double().requires_grad_() for t in tensors]


def batch(rows: int, *tensors: Tensor) -> list[Tensor]:
    """`rows` copies of each tensor, one after another, that require gradients."""
    return [t.detach().expand(rows, *t.shape).clone().requires_grad_() for t in tensors]


def forward_only(function, *inputs: Tensor) -> Callable[[], object]:
    """The peer's forward pass without a graph."""
    def run():
        with torch.no_grad():
            return function(*inputs)
    return run


def backward_only(function, inputs: list[Tensor], g: Tensor) -> Callable[[], object]:
    """The peer's backward pass alone: the forward pass is done here, once."""
    outputs = function(*inputs)
    return lambda: gradients(outputs, inputs, g)


# ------------------------------------------------------------------------ one sequence, one core


def products(c: M.ModelConfig, T: int, rng) -> list[Op]:
    """y = x w^T for the four matrices of a block, and both gradients for the last, the largest."""
    E = c.dim + 2 * c.n_kv_heads * c.head_dim
    out, into = 2 * c.hidden_dim, c.dim  # of gate and up side by side
    shapes = {"q k v": (E, c.dim), "wo": (c.dim, c.dim), "down": (c.dim, c.hidden_dim),
              "gate up": (out, into)}
    return [*(product(f"product {name}", 0, T, *shape, rng) for name, shape in shapes.items()),
            product("  gradient of x", 1, T, into, out, rng),
            product("  gradient of w", 2, out, into, T, rng)]


def product(name: str, form: int, rows: int, columns: int, depth: int, rng) -> Op:
    """One product in one of bench_product's three forms."""
    a = normal(rng, *((depth, rows) if form == 2 else (rows, depth)))
    b = normal(rng, *((columns, depth) if form == 0 else (depth, columns)))
    out = torch.empty(rows, columns)

    def ours(repeat):
        call("bench_product", repeat, form, rows, columns, depth, a, b, out)
        return [out]

    def apply(a, b):
        return a @ b.t() if form == 0 else a.t() @ b if form == 2 else a @ b

    def peer(B):  # PyTorch multiplies all sequences at once
        if form == 2:
            return forward_only(apply, a.repeat(B, 1), b.repeat(B, 1))
        return forward_only(apply, a.repeat(B, 1), b)

    return Op(name, f"{rows} x {columns} x {depth}", ours,
              lambda: [apply(a.double(), b.double())], peer, flops=2 * rows * columns * depth)


def norms(c: M.ModelConfig, T: int, rng) -> list[Op]:
    """RMSNorm and its gradients."""
    D, eps = c.dim, c.norm_eps
    x, w, dy = normal(rng, T, D), normal(rng, D), normal(rng, T, D)
    y, scale, dx, dw = torch.empty(T, D), torch.empty(T), torch.zeros(T, D), torch.zeros(D)

    def apply(x, w):
        return F.rms_norm(x, (D,), w, eps)

    def forward(repeat):
        call("bench_rmsnorm", repeat, T, D, x, w, eps, y, scale)
        return [y]

    def backward(repeat):
        call("bench_rmsnorm", 1, T, D, x, w, eps, y, scale)
        dx.zero_(), dw.zero_()
        call("bench_rmsnorm_backward", repeat, T, D, x, w, scale, dy, dx, dw)
        return [dx, dw]

    def exact_backward():
        x64, w64 = doubles(x, w)
        return gradients(apply(x64, w64), [x64, w64], dy.double())

    def peer_backward(B):
        many, = batch(B, x)
        return backward_only(apply, [many, w.clone().requires_grad_()], dy.expand(B, T, D))

    return [Op("rmsnorm", f"{T} x {D}", forward, lambda: [apply(x.double(), w.double())],
               lambda B: forward_only(apply, x.repeat(B, 1, 1), w), bytes=8 * T * D),
            Op("  backward", f"{T} x {D}", backward, exact_backward, peer_backward,
               bytes=16 * T * D)]


def ropes(c: M.ModelConfig, T: int, rng) -> list[Op]:
    """The rotation of queries and keys; backward is the same with the opposite angle."""
    heads = c.n_heads + c.n_kv_heads
    E = c.dim + 2 * c.n_kv_heads * c.head_dim
    qkv, shape = normal(rng, T, E), native._shape(c)
    exact_table = M.rope_table(c.head_dim, T, c.rope_theta)
    cos, sin = (t.float() for t in exact_table)

    def ours(repeat):
        turned = qkv.clone()
        call("bench_rope", repeat, ctypes.addressof(shape), T, turned, cos, sin, 1.0)
        return [turned]

    def apply(qkv, cos, sin):
        x = qkv[..., :heads * c.head_dim].unflatten(-1, (heads, c.head_dim))
        return torch.cat((M.rotate(x, cos, sin).flatten(-2), qkv[..., heads * c.head_dim:]), -1)

    def peer(B):
        x = qkv[:, :heads * c.head_dim].unflatten(-1, (heads, c.head_dim))
        return forward_only(M.rotate, x.repeat(B, 1, 1, 1), cos, sin)

    return [Op("rope", f"{T} x {heads} x {c.head_dim}", ours,
               lambda: [apply(qkv[None].double(), *exact_table)[0]], peer,
               bytes=8 * T * heads * c.head_dim)]


def swiglus(c: M.ModelConfig, T: int, rng) -> list[Op]:
    """silu(gate) * up and its gradients."""
    width = c.hidden_dim
    gu, da = normal(rng, T, 2 * width), normal(rng, T, width)
    a, dgu = torch.empty(T, width), torch.empty(T, 2 * width)

    def apply(gu):
        gate, up = gu.chunk(2, -1)
        return F.silu(gate) * up

    def forward(repeat):
        call("bench_swiglu", repeat, T, width, gu, a)
        return [a]

    def backward(repeat):
        call("bench_swiglu_backward", repeat, T, width, gu, da, a, dgu)
        return [dgu]

    def exact_backward():
        gu64, = doubles(gu)
        return gradients(apply(gu64), [gu64], da.double())

    def peer_backward(B):
        return backward_only(apply, batch(B, gu), da.expand(B, *da.shape))

    return [Op("swiglu", f"{T} x {width}", forward, lambda: [apply(gu.double())],
               lambda B: forward_only(apply, gu.repeat(B, 1, 1)), bytes=12 * T * width),
            Op("  backward", f"{T} x {width}", backward, exact_backward, peer_backward,
               bytes=24 * T * width)]


def attentions(c: M.ModelConfig, T: int, rng) -> list[Op]:
    """Causal grouped-query attention of one sequence, and its gradients."""
    H, KV, hd = c.n_heads, c.n_kv_heads, c.head_dim
    qkv, d_out = normal(rng, T, (H + 2 * KV) * hd), normal(rng, T, H * hd)
    out, log_sum, dqkv = torch.empty(T, H * hd), torch.empty(H, T), torch.empty_like(qkv)
    shape = native._shape(c)

    def apply(qkv):  # (B, T, E) -> (B, T, D)
        q, k, v = (x.unflatten(-1, (-1, hd)).transpose(1, 2)
                   for x in qkv.split([H * hd, KV * hd, KV * hd], -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != KV)
        return y.transpose(1, 2).flatten(-2)

    def forward(repeat):
        call("bench_attention", repeat, ctypes.addressof(shape), T, qkv, out, log_sum)
        return [out]

    def backward(repeat):
        s = ctypes.addressof(shape)
        call("bench_attention", 1, s, T, qkv, out, log_sum)
        call("bench_attention_backward", repeat, s, T, qkv, out, log_sum, d_out, dqkv)
        return [dqkv]

    def exact_backward():
        x, = doubles(qkv[None])
        return [gradients(apply(x), [x], d_out[None].double())[0][0]]

    def peer_backward(B):
        return backward_only(apply, batch(B, qkv), d_out.expand(B, *d_out.shape))

    seen = T * (T + 1) / 2  # pairs of query and key
    return [Op("attention", f"{T} x {H} on {KV} x {hd}", forward,
               lambda: [apply(qkv[None].double())[0]],
               lambda B: forward_only(apply, qkv.repeat(B, 1, 1)), flops=2 * 2 * seen * H * hd),
            Op("  backward", f"{T} x {H} on {KV} x {hd}", backward, exact_backward, peer_backward,
               flops=4 * 2 * seen * H * hd)]


# ------------------------------------------------------------------------- calls of every stage


def network(c: M.ModelConfig, gain: float = 3.0) -> M.Llama:
    """A network far from its initial symmetry: weights `gain` times larger, norms not 1."""
    net, rng = M.Llama(c).init_weights(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * normal(rng, *p.shape)) if p.dim() == 1 else p.mul_(gain)
    return net


def in_float64(net: M.Llama) -> M.Llama:
    twin = M.Llama(net.config).double()
    twin.load_state_dict(net.state_dict())
    return twin


def heads(c: M.ModelConfig, B: int, T: int, rng) -> list[Op]:
    """Log-probabilities of given tokens, and the gradients of hidden and of the output matrix."""
    hidden, weight = normal(rng, B, T, c.dim), normal(rng, c.vocab_size, c.dim) / c.dim ** 0.5
    targets = torch.randint(0, c.vocab_size, (B, T), generator=rng)
    mask, g = torch.ones(B, T), normal(rng, B, T)

    def apply(hidden, weight):
        return M.logprobs(hidden @ weight.t(), targets)

    def in_c(hidden, weight):
        return native.token_logprobs(hidden, weight, targets, mask.bool(), 1.0)

    return whole_call("head", f"{B} x {T} x {c.dim} to {c.vocab_size}", in_c, apply,
                      [hidden, weight], g, B, 2 * B * T * c.dim * c.vocab_size)


def trunks(c: M.ModelConfig, B: int, T: int, rng) -> list[Op]:
    """All blocks and the final norm on whole sequences, and the gradients of all weights."""
    net = network(c)
    tokens = torch.randint(0, c.vocab_size, (B, T), generator=rng)
    twin, g = in_float64(net), normal(rng, B, T, c.dim)
    weights, weights64 = (list(m.parameters())[:-1] for m in (net, twin))  # all but the head

    def ours():
        return native.trunk(net, tokens, None, None)

    def plain():
        return net.hidden(tokens)

    E = c.dim + 2 * c.n_kv_heads * c.head_dim
    per_token = 2 * c.n_layers * c.dim * (E + c.dim + 3 * c.hidden_dim)
    flops = B * T * per_token + c.n_layers * B * 2 * T * (T + 1) * c.dim  # attention: causal half
    # the forward pass that a backward pass follows keeps its activations
    op = Op("trunk, kept for backward", f"{B} x {T}, {c.n_layers} layers",
            lambda repeat: [ours().detach() for _ in range(repeat)][:1],
            lambda: [twin.hidden(tokens).detach()], lambda B: plain, flops=flops, rows=B)

    def both(repeat):
        return [gradients_once(ours(), weights, g) for _ in range(repeat)][0]

    def plain_both(B):
        return lambda: gradients_once(plain(), weights, g)

    return [op, replace(op, name="  forward and backward", ours=both, peer=plain_both,
                        exact=lambda: gradients_once(twin.hidden(tokens), weights64, g.double()),
                        flops=3 * flops)]


def gradients_once(outputs: Tensor, inputs: list[Tensor], g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(outputs, inputs, g))


def whole_call(name, sizes, in_c, apply, inputs, g, B, flops) -> list[Op]:
    """Two Ops for an autograd Function: forward without a graph, and both passes."""
    ours_inputs = [t.clone().requires_grad_() for t in inputs]

    def forward(repeat):
        with torch.no_grad():
            return [in_c(*inputs) for _ in range(repeat)][:1]

    def both(repeat):
        return [gradients_once(in_c(*ours_inputs), ours_inputs, g) for _ in range(repeat)][0]

    def exact_both():
        inputs64 = doubles(*inputs)
        return gradients_once(apply(*inputs64), inputs64, g.double())

    def peer_both(B):
        return lambda: gradients_once(apply(*ours_inputs), ours_inputs, g)

    return [Op(name, sizes, forward, lambda: [apply(*(t.double() for t in inputs))],
               lambda B: forward_only(apply, *inputs), flops=flops, rows=B),
            Op("  forward and backward", sizes, both, exact_both, peer_both,
               flops=3 * flops, rows=B)]


def all_ops(c: M.ModelConfig, B: int, T: int) -> list[Op]:
    """Every kernel of training at the sizes of one model, rows and length."""
    rng = torch.Generator().manual_seed(1)
    alone = [part(c, T, rng) for part in (products, norms, ropes, swiglus, attentions)]
    whole = [part(c, B, T, rng) for part in (heads, trunks)]
    return [op for ops in (*alone, *whole) for op in ops]
