"""Each kernel alone: what C computes, what float64 says, how much work it is, and PyTorch's twin.

`python -m bench` reads this list twice: to check that `ours` gives the numbers of `exact`, and to
time `ours` and `peer`. Forward and backward passes stand apart, as they are apart in C.

Two kinds: one sequence in one core (`rows` 1), through bench.c, for what the trunk does to each
sequence; and whole calls with threads of their own (`rows` B), as every stage makes them.
"""

from __future__ import annotations

import ctypes, itertools, os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

    @property
    def is_part(self) -> bool:
        """Whether it is an indented line of the table: a pass of the kernel above."""
        return self.name.startswith("  ")


# ------------------------------------------------------------------------------------- calling C


def library() -> ctypes.CDLL:
    """The kernels in use and bench.c, compiled together, with bench.c's functions ready to call."""
    products = native.library().products().decode()
    lib = build.load_library(products, SOURCES)
    for name, letters in SIGNATURES.items():
        getattr(lib, name).argtypes = [build.TYPES[letter] for letter in letters]
    return lib


def call(name: str, *arguments) -> int:
    """A function of bench.c; tensors are passed by address. MemoryError if it reports one."""
    function = getattr(library(), name)
    code = function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))
    if code < 0:
        raise MemoryError(f"{name}: not enough memory")
    return code


def runner(name: str, *arguments):
    """A function of bench.c with all but its first argument, as function(repeat)."""
    return lambda repeat: call(name, repeat, *arguments)


def repeated(function):
    """A function without arguments as one that runs it `repeat` times."""
    return lambda repeat: [function() for _ in range(repeat)]


def in_cores(functions: list):
    """Each function(repeat) in a thread and a core of its own, at once; C leaves Python's lock."""
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = itertools.cycle(there)

    def take_core():
        if there:
            os.sched_setaffinity(0, {next(cores)})  # 0: the thread that calls it

    pool = ThreadPoolExecutor(len(functions), initializer=take_core)
    return lambda repeat: list(pool.map(lambda function: function(repeat), functions))


# ------------------------------------------------------------------------- twins and gradients


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng)


def gradients(outputs: Tensor, inputs: list[Tensor], g: Tensor, keep: bool = False) -> list[Tensor]:
    """Of the inputs, for the gradient g of the outputs. keep: the graph, for another time."""
    return list(torch.autograd.grad(outputs, inputs, g, retain_graph=keep))


def doubles(*tensors: Tensor) -> list[Tensor]:
    """Float64 twins that require gradients."""
    return [t.detach().double().requires_grad_() for t in tensors]


def batch(rows: int, tensor: Tensor) -> Tensor:
    """`rows` copies of a tensor, one after another, that require gradients."""
    return tensor.detach().expand(rows, *tensor.shape).clone().requires_grad_()


def forward_only(function, *inputs: Tensor) -> Callable[[], object]:
    """The peer's forward pass without a graph."""
    def run():
        with torch.no_grad():
            return function(*inputs)
    return run


def backward_only(function, inputs: list[Tensor], g: Tensor) -> Callable[[], object]:
    """The peer's backward pass alone: the forward pass is done here, once."""
    outputs = function(*inputs)
    return lambda: gradients(outputs, inputs, g, keep=True)


# ------------------------------------------------------------------------ one sequence, one core


def qkv_width(config: M.ModelConfig) -> int:
    """E: queries, keys and values side by side."""
    return config.dim + 2 * config.n_kv_heads * config.head_dim


def products(config: M.ModelConfig, T: int, rng) -> list[Op]:
    """y = x w^T for the four matrices of a block, and both gradients for the last, the largest."""
    D = config.dim
    E = qkv_width(config)
    gate_up = 2 * config.hidden_dim  # both side by side
    return [product("product q k v", 0, T, E, D, rng),
            product("product wo", 0, T, D, D, rng),
            product("product down", 0, T, D, config.hidden_dim, rng),
            product("product gate up", 0, T, gate_up, D, rng),
            product("  gradient of x", 1, T, D, gate_up, rng),
            product("  gradient of w", 2, gate_up, D, T, rng)]


def product(name: str, form: int, rows: int, columns: int, depth: int, rng) -> Op:
    """One product in one of bench_product's three forms."""
    a = normal(rng, *((depth, rows) if form == 2 else (rows, depth)))
    b = normal(rng, *((columns, depth) if form == 0 else (depth, columns)))
    out = torch.empty(rows, columns)

    def ours(repeat):
        call("bench_product", repeat, form, rows, columns, depth, a, b, out)
        return [out]

    def apply(a, b):
        if form == 0:
            return a @ b.t()
        if form == 1:
            return a @ b
        return a.t() @ b

    def exact():
        return [apply(a.double(), b.double())]

    def peer(B):  # PyTorch multiplies all sequences at once
        if form == 2:
            return forward_only(apply, a.repeat(B, 1), b.repeat(B, 1))
        return forward_only(apply, a.repeat(B, 1), b)

    return Op(name, f"{rows} x {columns} x {depth}", ours, exact, peer,
              flops=2 * rows * columns * depth)


def norms(config: M.ModelConfig, T: int, rng) -> list[Op]:
    """RMSNorm and its gradients."""
    D = config.dim
    eps = config.norm_eps
    x = normal(rng, T, D)
    w = normal(rng, D)
    dy = normal(rng, T, D)
    y = torch.empty(T, D)
    scale = torch.empty(T)
    dx = torch.zeros(T, D)
    dw = torch.zeros(D)

    def apply(x, w):
        return F.rms_norm(x, (D,), w, eps)

    def forward(repeat):
        call("bench_rmsnorm", repeat, T, D, x, w, eps, y, scale)
        return [y]

    def exact():
        return [apply(x.double(), w.double())]

    def peer(B):
        return forward_only(apply, x.repeat(B, 1, 1), w)

    def backward(repeat):
        call("bench_rmsnorm", 1, T, D, x, w, eps, y, scale)
        dx.zero_()
        dw.zero_()
        call("bench_rmsnorm_backward", repeat, T, D, x, w, scale, dy, dx, dw)
        return [dx, dw]

    def exact_backward():
        x64, w64 = doubles(x, w)
        return gradients(apply(x64, w64), [x64, w64], dy.double())

    def peer_backward(B):
        inputs = [batch(B, x), w.clone().requires_grad_()]
        return backward_only(apply, inputs, dy.expand(B, T, D))

    sizes = f"{T} x {D}"
    return [Op("rmsnorm", sizes, forward, exact, peer, bytes=8 * T * D),
            Op("  backward", sizes, backward, exact_backward, peer_backward, bytes=16 * T * D)]


def ropes(config: M.ModelConfig, T: int, rng) -> list[Op]:
    """The rotation of queries and keys; backward is the same with the opposite angle."""
    heads = config.n_heads + config.n_kv_heads
    hd = config.head_dim
    turning = heads * hd  # of the E columns: the values behind stay
    qkv = normal(rng, T, qkv_width(config))
    shape = native._shape(config)
    exact_cos, exact_sin = M.rope_table(hd, T, config.rope_theta)
    cos = exact_cos.float()
    sin = exact_sin.float()

    def ours(repeat):
        turned = qkv.clone()
        call("bench_rope", repeat, ctypes.addressof(shape), T, turned, cos, sin, 1.0)
        return [turned]

    def exact():
        qkv64 = qkv.double()
        x = qkv64[None, :, :turning].unflatten(-1, (heads, hd))  # (1, T, heads, hd)
        turned = M.rotate(x, exact_cos, exact_sin)[0].flatten(-2)
        return [torch.cat((turned, qkv64[:, turning:]), -1)]

    def peer(B):
        x = qkv[:, :turning].unflatten(-1, (heads, hd))
        return forward_only(M.rotate, x.repeat(B, 1, 1, 1), cos, sin)

    return [Op("rope", f"{T} x {heads} x {hd}", ours, exact, peer, bytes=8 * T * turning)]


def swiglus(config: M.ModelConfig, T: int, rng) -> list[Op]:
    """silu(gate) * up and its gradients."""
    width = config.hidden_dim
    gu = normal(rng, T, 2 * width)
    da = normal(rng, T, width)
    a = torch.empty(T, width)
    dgu = torch.empty(T, 2 * width)

    def apply(gu):
        gate, up = gu.chunk(2, -1)
        return F.silu(gate) * up

    def forward(repeat):
        call("bench_swiglu", repeat, T, width, gu, a)
        return [a]

    def exact():
        return [apply(gu.double())]

    def peer(B):
        return forward_only(apply, gu.repeat(B, 1, 1))

    def backward(repeat):
        call("bench_swiglu_backward", repeat, T, width, gu, da, a, dgu)
        return [dgu]

    def exact_backward():
        [gu64] = doubles(gu)
        return gradients(apply(gu64), [gu64], da.double())

    def peer_backward(B):
        return backward_only(apply, [batch(B, gu)], da.expand(B, T, width))

    sizes = f"{T} x {width}"
    return [Op("swiglu", sizes, forward, exact, peer, bytes=12 * T * width),
            Op("  backward", sizes, backward, exact_backward, peer_backward, bytes=24 * T * width)]


def attentions(config: M.ModelConfig, T: int, rng) -> list[Op]:
    """Causal grouped-query attention of one sequence, and its gradients."""
    H = config.n_heads
    KV = config.n_kv_heads
    hd = config.head_dim
    qkv = normal(rng, T, (H + 2 * KV) * hd)
    d_out = normal(rng, T, H * hd)
    out = torch.empty(T, H * hd)
    log_sum = torch.empty(H, T)
    dqkv = torch.empty_like(qkv)
    shape = native._shape(config)

    def apply(qkv):  # (B, T, E) -> (B, T, D)
        parts = qkv.split([H * hd, KV * hd, KV * hd], -1)
        q, k, v = (x.unflatten(-1, (-1, hd)).transpose(1, 2) for x in parts)  # (B, heads, T, hd)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != KV)
        return y.transpose(1, 2).flatten(-2)

    def forward(repeat):
        call("bench_attention", repeat, ctypes.addressof(shape), T, qkv, out, log_sum)
        return [out]

    def exact():
        return [apply(qkv[None].double())[0]]

    def peer(B):
        return forward_only(apply, qkv.repeat(B, 1, 1))

    def backward(repeat):
        address = ctypes.addressof(shape)
        call("bench_attention", 1, address, T, qkv, out, log_sum)
        call("bench_attention_backward", repeat, address, T, qkv, out, log_sum, d_out, dqkv)
        return [dqkv]

    def exact_backward():
        [x] = doubles(qkv[None])
        [dx] = gradients(apply(x), [x], d_out[None].double())
        return [dx[0]]

    def peer_backward(B):
        return backward_only(apply, [batch(B, qkv)], d_out.expand(B, T, H * hd))

    sizes = f"{T} x {H} on {KV} x {hd}"
    seen = T * (T + 1) / 2  # pairs of query and key
    return [Op("attention", sizes, forward, exact, peer, flops=2 * 2 * seen * H * hd),
            Op("  backward", sizes, backward, exact_backward, peer_backward,
               flops=4 * 2 * seen * H * hd)]


# ------------------------------------------------------------------------- calls of every stage


def network(config: M.ModelConfig, gain: float = 3.0) -> M.Llama:
    """A network far from its initial symmetry: weights `gain` times larger, norms not 1."""
    net = M.Llama(config).init_weights(0)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 1:
                p.add_(0.2 * normal(rng, *p.shape))
            else:
                p.mul_(gain)
    return net


def in_float64(net: M.Llama) -> M.Llama:
    twin = M.Llama(net.config).double()
    twin.load_state_dict(net.state_dict())
    return twin


def first_of(repeat: int, function) -> list[Tensor]:
    """What the first of `repeat` runs gives; all are kept till the end, as by `repeated`."""
    results = [function() for _ in range(repeat)]
    return results[0]


def heads(config: M.ModelConfig, B: int, T: int, rng) -> list[Op]:
    """Log-probabilities of given tokens, and the gradients of hidden and of the output matrix."""
    D = config.dim
    V = config.vocab_size
    hidden = normal(rng, B, T, D)
    weight = normal(rng, V, D) / D ** 0.5
    targets = torch.randint(0, V, (B, T), generator=rng)
    mask = torch.ones(B, T)
    g = normal(rng, B, T)
    learning = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]

    def in_c(hidden, weight):
        return native.token_logprobs(hidden, weight, targets, mask.bool(), 1.0)

    def apply(hidden, weight):
        return M.logprobs(hidden @ weight.t(), targets)

    def forward(repeat):
        with torch.no_grad():
            return first_of(repeat, lambda: [in_c(hidden, weight)])

    def exact():
        return [apply(hidden.double(), weight.double())]

    def peer(B):
        return forward_only(apply, hidden, weight)

    def both(repeat):
        return first_of(repeat, lambda: gradients(in_c(*learning), learning, g))

    def exact_both():
        inputs64 = doubles(hidden, weight)
        return gradients(apply(*inputs64), inputs64, g.double())

    def peer_both(B):
        return lambda: gradients(apply(*learning), learning, g)

    sizes = f"{B} x {T} x {D} to {V}"
    flops = 2 * B * T * D * V
    return [Op("head", sizes, forward, exact, peer, flops=flops, rows=B),
            Op("  forward and backward", sizes, both, exact_both, peer_both, flops=3 * flops,
               rows=B)]


def trunks(config: M.ModelConfig, B: int, T: int, rng) -> list[Op]:
    """All blocks and the final norm on whole sequences, and the gradients of all weights."""
    D = config.dim
    L = config.n_layers
    net = network(config)
    twin = in_float64(net)
    tokens = torch.randint(0, config.vocab_size, (B, T), generator=rng)
    g = normal(rng, B, T, D)
    weights = list(net.parameters())[:-1]  # all but the head
    weights64 = list(twin.parameters())[:-1]

    def in_c():
        return native.trunk(net, tokens, None, None)

    def plain():
        return net.hidden(tokens)

    def forward(repeat):  # as a backward pass follows it, so activations are kept
        return first_of(repeat, lambda: [in_c().detach()])

    def exact():
        return [twin.hidden(tokens).detach()]

    def peer(B):
        return plain

    def both(repeat):
        return first_of(repeat, lambda: gradients(in_c(), weights, g))

    def exact_both():
        return gradients(twin.hidden(tokens), weights64, g.double())

    def peer_both(B):
        return lambda: gradients(plain(), weights, g)

    sizes = f"{B} x {T}, {L} layers"
    per_token = 2 * L * D * (qkv_width(config) + D + 3 * config.hidden_dim)
    attention = 2 * T * (T + 1) * D  # of a sequence in a layer: the causal half
    flops = B * T * per_token + L * B * attention
    return [Op("trunk, kept for backward", sizes, forward, exact, peer, flops=flops, rows=B),
            Op("  forward and backward", sizes, both, exact_both, peer_both, flops=3 * flops,
               rows=B)]


def all_ops(config: M.ModelConfig, B: int, T: int) -> list[Op]:
    """Every kernel of training at the sizes of one model, rows and length."""
    rng = torch.Generator().manual_seed(1)
    found = []
    for part in (products, norms, ropes, swiglus, attentions):
        found += part(config, T, rng)
    for part in (heads, trunks):
        found += part(config, B, T, rng)
    return found
