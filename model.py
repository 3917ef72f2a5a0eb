"""What the network is: Llama 2, its cache, its probabilities and sampling, and its checkpoint.

It reads from top to bottom: configuration, small parts, block, `Llama`; then what is done with the
network (probabilities, sampling), then where it lives and what a checkpoint of it holds. Nothing
here knows flags, logs or stages, and no file of ours is imported.

Shape key of the whole repository, used in every `# (B, T, D)` comment:
    B batch   T tokens in this call   S keys visible (cache + T)   D width (`dim`)
    H query heads   KV key/value heads   hd head size   F FFN width   V vocabulary   L layers
    P prompt length   R response length   N samples per prompt

One forward pass in shapes:

    tokens (B, T) -> tok_embeddings (B, T, D)
      L times  attention   x (B, T, D) -> q (B, T, H, hd), k and v (B, T, KV, hd) -> (B, T, D)
               SwiGLU      x (B, T, D) -> gate and up (B, T, F) -> (B, T, D)
    -> norm (B, T, D) -> output: logits (B, T, V), or with a scalar head one score (B, T)

Sources: [L2] Llama 2, arXiv 2307.09288.  [RMS] RMSNorm, 1910.07467.  [RoPE] RoFormer, 2104.09864.
         [GLU] GLU variants, 2002.05202.  [GQA] 2305.13245.  [code] facebookresearch/llama.

Differs from the paper: the network not at all. Initialisation is unspecified there (see
`init_weights`), and the released code samples a batch to its end in lockstep (see `decode`).
"""

from __future__ import annotations

import contextlib, dataclasses, difflib, functools, json, math, os, pickle, zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------ configuration


@dataclass
class ModelConfig:
    """The shape of one network; nothing here changes during training."""

    dim: int  # D, width of the residual stream
    n_layers: int  # L
    n_heads: int  # H, query heads; hd = dim / n_heads
    n_kv_heads: int  # KV, key/value heads; KV < H is grouped-query attention [L2 §2.2, GQA]
    hidden_dim: int  # F, width of the SwiGLU layer
    vocab_size: int  # V
    max_seq_len: int  # tokens; paper: 4096 (Table 1)
    norm_eps: float = 1e-5  # paper's code: 1e-5 (the first upload of 7B said 1e-6 by mistake)
    rope_theta: float = 10000.0  # base of the rotary wavelengths [RoPE §3.2.2]
    scalar_head: bool = False  # True: one score per position: reward, value models [L2 §3.2.2]

    def __post_init__(self):
        for field in dataclasses.fields(self)[:7]:  # the sizes
            size = getattr(self, field.name)
            if type(size) is not int or not 1 <= size < 2**31:
                raise ValueError(f"{field.name} must be a whole number of at least 1 and below "
                                 f"2**31, not {size!r}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} must be n_heads {self.n_heads} times an even number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads "
                             f"{self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def ffn_dim(dim: int, multiple_of: int, multiplier: float | None = None) -> int:
    """FFN width by Meta's rule: 2/3 of 4*dim, times `multiplier`, rounded up to `multiple_of`.

    The order of the truncations matters: 8192 with 4096 and 1.3 gives 28672. [code]
    """
    hidden = int(2 * (4 * dim) / 3)  # 2/3: three matrices instead of two, equal parameters [GLU]
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def _preset(dim, layers, heads, kv_heads, hidden, vocab, context) -> ModelConfig:
    return ModelConfig(dim, layers, heads, kv_heads, hidden, vocab, context)


PRESETS: dict[str, ModelConfig] = {  # dim, layers, heads, kv heads, FFN, vocabulary, context
    "tiny": _preset(128, 4, 4, 2, ffn_dim(128, 32), 1536, 512),  # minutes on a laptop CPU
    "15m": _preset(288, 6, 6, 6, 768, 32000, 256),  # llama2.c's stories15M
    "110m": _preset(768, 12, 12, 12, 2048, 32000, 1024),  # llama2.c's stories110M
    "1b": _preset(2048, 22, 32, 4, 5632, 32000, 2048),  # TinyLlama's shape
    "7b": _preset(4096, 32, 32, 32, ffn_dim(4096, 256), 32000, 4096),  # 6,738,415,616 parameters
    "13b": _preset(5120, 40, 40, 40, ffn_dim(5120, 256), 32000, 4096),  # 13,015,864,320
    "34b": _preset(8192, 48, 64, 8, ffn_dim(8192, 256, 1.0), 32000, 4096),  # 33,743,970,304
    "70b": _preset(8192, 80, 64, 8, ffn_dim(8192, 4096, 1.3), 32000, 4096),  # 68,976,648,192
}


def preset(name: str, **changes) -> ModelConfig:
    """A copy of `PRESETS[name]` with fields replaced; ValueError names the nearest preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1, 0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}choose one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)


def count_parameters(config: ModelConfig) -> int:
    """Exact number of parameters, by formula: no biases, input and output embeddings untied."""
    c, kv_dim = config, config.n_kv_heads * config.head_dim
    layer = 2 * c.dim * c.dim + 2 * c.dim * kv_dim + 3 * c.dim * c.hidden_dim + 2 * c.dim
    head = 1 if c.scalar_head else c.vocab_size
    return c.vocab_size * c.dim + c.n_layers * layer + c.dim + head * c.dim


# --------------------------------------------------------------------------------- the network


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the half precisions, else the dtype itself: norm and RoPE never go narrower."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight: LayerNorm without the mean and the bias [RMS Eq.4].

    (B, T, D) -> (B, T, D). The division happens in float32 and is cast back *before* the weight
    multiplies, as in Meta's code: the other order gives other bits in bfloat16.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(at_least_float32(x.dtype))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight


def rope_table(head_dim: int, length: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the angle of every (position, pair): float64 (length, hd/2) each.

    angle[p, i] = p * theta^(-2i/hd): pair 0 turns one radian per token, the last pair hardly moves.
    DEVIATES: Meta's code has the angles in float32, up to 2e-4 off at position 4095; here only
    cos and sin are rounded.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)  # (hd/2,)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency  # (length, hd/2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbours (x0, x1), (x2, x3), ... by its position's angle [RoPE Eq.34].

    x: (B, T, H, hd); cos, sin: (T, hd/2), or (B, T, hd/2) when rows differ. After it, q.k depends
    on the *distance* of two positions only. Meta pairs neighbours; Hugging Face pairs i with
    i + hd/2 and permutes the rows of wq and wk to match (convert.py).
    """
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, hd/2) each
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # the same angle for all heads
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


class KVCache:
    """Keys and values of the tokens already read, per layer (B, KV, S, hd).

    Memory per token: 2 * L * KV * hd numbers; grouped-query attention exists to make this small
    [L2 §A.2.1]: 70b with 8 key/value heads keeps 1.25 GiB for 4096 tokens in half precision, with
    one for each of its 64 query heads it would be 8 times that. A layer's tensors are allocated at
    its first use, from the shape it is given, so that a model whose heads are split over devices
    needs no line here.
    """

    def __init__(self, n_layers: int, max_len: int):
        self.max_len = max_len
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layers

    def append(self, layer: int, k: Tensor, v: Tensor, positions: Tensor, S: int):
        """Write k, v (B, T, KV, hd) at positions (B, T); return the first S keys and values.

        (B, KV, S, hd) each: no position beyond S has been written yet.
        """
        B, _, KV, hd = k.shape
        if self.layers[layer] is None:
            empty = k.new_zeros(2, B, KV, self.max_len, hd)
            self.layers[layer] = (empty[0], empty[1])
        keys, values = self.layers[layer]
        rows = torch.arange(B, device=k.device)[:, None]  # (B, 1) against positions (B, T)
        keys[rows, :, positions], values[rows, :, positions] = k.detach(), v.detach()
        return keys[:, :, :S], values[:, :, :S]

    def keep(self, rows: Tensor) -> None:
        """Keep only these batch rows (int64 indices): finished answers need no more work."""
        self.layers = [(k[rows], v[rows]) for k, v in self.layers]


class Attention(nn.Module):
    """softmax(q k^T / sqrt(hd)) v with H query heads on KV key/value heads [L2 §2.2, GQA].

    Query head h reads key/value head h // (H / KV). The number of heads is read from the tensors,
    never from the configuration: under tensor parallelism each device sees its own share.
    """

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, rope, mask=None, append=None) -> Tensor:
        """x (B, T, D) -> (B, T, D); mask: bool (B, 1, T, S), True = may look; None = causal.

        append: puts k and v into the cache and returns all that is in it; None without a cache.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, *rope), rotate(k, *rope)  # (B, T, H, hd), (B, T, KV, hd)
        if append is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, KV, T, hd)
        else:
            k, v = append(k, v)  # (B, KV, S, hd): what is cached is already rotated
        q = q.transpose(1, 2)  # (B, H, T, hd)
        gqa = q.shape[1] != k.shape[1]  # repeats k and v by interleaving: 0 0 1 1, not 0 1 0 1
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=gqa)
        return self.wo(out.transpose(1, 2).flatten(-2))  # (B, T, H*hd) -> (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w_down(silu(w_gate x) * w_up x) [GLU Eq.6]; Meta's w1 (gate), w3 (up), w2 (down)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.w_gate = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.w_up = nn.Linear(c.dim, c.hidden_dim, bias=False)
        self.w_down = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))  # (B, T, F) in between


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + ffn(norm(x)) [L2 §2.2]."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.attention = Attention(c)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)
        self.feed_forward = FeedForward(c)
        self.recompute = False  # activation checkpointing: keep only x, redo the rest in backward

    def body(self, x, rope, mask, append) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, append)
        return x + self.feed_forward(self.ffn_norm(x))

    def forward(self, x, rope, mask=None, append=None) -> Tensor:
        """(B, T, D) -> (B, T, D)"""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.body, x, rope, mask, append, use_reentrant=False)
        return self.body(x, rope, mask, append)


class Llama(nn.Module):
    """The whole network: embedding, L blocks, final norm, output head [L2 §2.2].

    State-dict names are the role names used here; the one table to Meta's and Hugging Face's names
    is in convert.py. There is no dropout and no bias anywhere, and there are no buffers.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        # from_pretrained: no random fill, which on the meta device imports torch's compiler, 2 s
        table = torch.zeros(c.vocab_size, c.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(table, freeze=False)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = RMSNorm(c.dim, c.norm_eps)
        self.output = nn.Linear(c.dim, 1 if c.scalar_head else c.vocab_size, bias=False)
        self._rope = None  # (cos, sin), built on first use for the dtype and device at hand

    def rope(self, dtype: torch.dtype, device: torch.device,
             length: int | None = None) -> tuple[Tensor, Tensor]:
        """The rotary table (at least `length`, hd/2) x 2: derived, so never stored, only rebuilt.

        length None: the whole context. Of a long context only what is reached is ever built, and
        twice as much as needed, so that a growing text seldom builds it anew.
        """
        c = self.config
        length = c.max_seq_len if length is None else length
        known = self._rope[0] if self._rope else torch.empty(0, dtype=dtype, device=device)
        if len(known) < length or (known.dtype, known.device) != (dtype, device):
            rows = min(c.max_seq_len, max(2 * length, 4096))
            with torch.inference_mode(False):  # a table made while sampling serves training too
                table = rope_table(c.head_dim, rows, c.rope_theta)
                self._rope = tuple(t.to(dtype).to(device) for t in table)  # MPS has no float64
        return self._rope

    def hidden(self, tokens, segments=None, cache=None, positions=None) -> Tensor:
        """Everything but the head: tokens int64 (B, T) -> (B, T, D) after the final norm.

        segments: int64 (B, T): a token sees only its own segment (packed documents). cache with
        positions int64 (B, T): where each token stands in its row. Right padding needs no mask:
        no real token looks to its right. ValueError if T exceeds the context.
        """
        B, T = tokens.shape
        if T > self.config.max_seq_len:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.max_seq_len}: "
                             f"shorten the text or use a model with a larger max_seq_len")
        x = self.tok_embeddings(tokens)  # (B, T, D)
        reach = T if positions is None else int(positions.max()) + 1
        cos, sin = self.rope(at_least_float32(x.dtype), x.device, reach)
        rope = (cos[:T], sin[:T]) if positions is None else (cos[positions], sin[positions])
        mask = None
        if cache is not None:  # key s is visible to the token at position p if s <= p
            S = reach
            mask = torch.arange(S, device=x.device) <= positions[:, None, :, None]  # (B, 1, T, S)
        elif segments is not None:
            same = segments[:, None, :, None] == segments[:, None, None, :]  # (B, 1, T, T)
            mask = same & torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        for i, layer in enumerate(self.layers):
            append = None
            if cache is not None:
                append = lambda k, v, i=i: cache.append(i, k, v, positions, S)
            x = layer(x, rope, mask, append)
        return self.norm(x)

    def forward(self, tokens, segments=None, cache=None, positions=None) -> Tensor:
        """tokens int64 (B, T) -> logits float32 (B, T, V), or scores (B, T) with a scalar head.

        float64 weights give float64 logits. Arguments and errors as in `hidden`.
        """
        out = self.output(self.hidden(tokens, segments, cache, positions))
        out = out.to(at_least_float32(out.dtype))
        return out.squeeze(-1) if self.config.scalar_head else out

    def init_weights(self, seed: int = 0) -> Llama:
        """Fill every parameter; each draws from its own generator, so a part alone gets the same.

        UNSPECIFIED in L2: N(0, 0.02), and the two projections that write into the residual stream
        divided by sqrt(2L), so that its variance at the end does not depend on depth. A scalar
        head starts at std 1/sqrt(D+1): scores of order 1 whatever the width (reward.py draws its
        own). The head of a narrow network starts equal to the embedding: then a word that attention
        brings along is a guess at that word from the first step on, and copying is learnt sooner
        (`tiny` was further after 1.2 million tokens than without it after 1.5). Not in a wide one:
        the logit of the word just read starts at 0.02 D.
        """
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(p)
                continue
            std = 0.02
            if name.endswith(("wo.weight", "w_down.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            elif name == "output.weight" and self.config.scalar_head:
                std = (self.config.dim + 1) ** -0.5
            elif name == "output.weight" and self.config.dim <= 512:
                name = "tok_embeddings.weight"  # the same seed, the same numbers
            mixed = zlib.crc32(f"{seed} {name}".encode())  # the CPU's generator reads 32 bits only
            rng = torch.Generator(p.device).manual_seed(mixed)
            nn.init.normal_(p, std=std, generator=rng)
        return self


# ---------------------------------------------------------------------- probabilities, sampling


def logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(target) at each position: logits (B, T, V), targets int64 (B, T) -> float32 (B, T), or
    float64 of such logits.

    The one definition for rollout, reference and update: log_softmax(logits / temperature).
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def uniform(seed: int, rows: Tensor, positions: Tensor) -> Tensor:
    """One number in [0, 1) per (seed, row, position): int64 (B,) x 2 -> float32 (B,), on the CPU.

    A pure function instead of a stream of random numbers: what a row draws does not depend on who
    else is in the batch, on the order of work or on the number of devices. The mixing is
    splitmix64's finaliser (Steele et al. 2014), applied to each coordinate in turn.
    """
    def mix(z: Tensor) -> Tensor:
        z = z - 7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
        z = (z ^ (z >> 30 & (1 << 34) - 1)) * -4658895280553007687  # >> keeps the sign: mask it off
        z = (z ^ (z >> 27 & (1 << 37) - 1)) * -7723592293110705685
        return z ^ (z >> 31 & (1 << 33) - 1)

    bits = mix(mix(mix(torch.full_like(rows, seed)) ^ rows) ^ positions)
    return (bits >> 40 & (1 << 24) - 1).float() / (1 << 24)  # 24 bits: exact in float32


def sample(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """Pick a token per row by inverting the distribution at u: float (B, V), (B,) -> int64 (B,).

    temperature 0 is greedy. top_p < 1 keeps the most likely tokens up to the one that crosses
    top_p [code]; cumsum - p > top_p is what is dropped, so the first token always stays.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1), None
    if top_p < 1:
        p, order = p.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p > top_p, 0.0)
    cdf = p.cumsum(-1)  # (B, V), not normalised: u is scaled to it instead
    pick = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)  # first index with cdf > u
    pick = torch.minimum(pick, (cdf < cdf[:, -1:]).sum(-1, keepdim=True))  # rounding at the end
    return (pick if order is None else order.gather(-1, pick)).squeeze(-1)


@torch.inference_mode()
def decode(model, prompts, max_new_tokens, temperature, top_p, seed, stop=None, row_ids=None):
    """Yield (rows, tokens, logprobs), three lists, once per generated position.

    Prompts of different lengths stand left-aligned; each row continues at its own position, so no
    padding is ever looked at and rows do not influence each other. (The last bits of a logit may
    differ between batch shapes, as products are summed in another order; the dice do not.)

    A row ends with `stop` (which is yielded), at max_new_tokens or when the context is full.
    logprobs are those of the plain distribution at this temperature (1 if greedy), without top_p.
    Rows that ended leave the batch once more than a quarter of it is idle.
    """
    check_prompts(prompts, model.config)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be 0 or more, not {max_new_tokens}")
    device = model.tok_embeddings.weight.device
    ids = torch.tensor(list(row_ids) if row_ids is not None else range(len(prompts)))
    lengths = torch.tensor([len(p) for p in prompts])  # (B,), on the CPU like all bookkeeping
    B, T = len(prompts), int(lengths.max())
    limit = torch.clamp(lengths + max_new_tokens, max=model.config.max_seq_len)
    cache = KVCache(model.config.n_layers, int(limit.max()))
    tokens = torch.tensor([list(p) + [0] * (T - len(p)) for p in prompts], device=device)
    x = model.hidden(tokens, cache=cache, positions=torch.arange(T, device=device).expand(B, T))
    x = x[torch.arange(B), lengths - 1]  # (B, D) at each row's last token
    rows, position = torch.arange(B), lengths.clone()  # original row numbers; where the next goes
    live = position < limit
    while live.any():
        logits = model.output(x).float()  # (B, V)
        u = uniform(seed, ids[rows], position).to(device)
        token = sample(logits, temperature, top_p, u)
        logp = logprobs(logits, token, temperature or 1.0).cpu()
        check_finite(logp)
        chosen = token.cpu()
        yield rows[live].tolist(), chosen[live].tolist(), logp[live].tolist()
        position = position + 1
        live &= position < limit
        if stop is not None:
            live &= chosen != stop
        if not live.any():
            return
        if live.float().mean() < 0.75:
            keep = live.nonzero().squeeze(-1)
            cache.keep(keep.to(device))
            token, rows, position, limit = token[keep], rows[keep], position[keep], limit[keep]
            live = live[keep]
        at = (position - 1).clamp(max=cache.max_len - 1).to(device)[:, None]  # (B, 1)
        x = model.hidden(token[:, None], cache=cache, positions=at)[:, 0]


def check_finite(logprobs: Tensor) -> None:
    """FloatingPointError if a log-probability is no number: then no logit means anything."""
    if not logprobs.isfinite().all():
        raise FloatingPointError("the model's logits are not finite: its weights are damaged, or "
                                 "its training diverged; use an earlier checkpoint")


def check_prompts(prompts, config: ModelConfig) -> None:
    """ValueError unless every prompt is non-empty, shorter than the context, in the vocabulary."""
    if not prompts:
        raise ValueError("no prompts given: pass a list of token lists")
    for row, prompt in enumerate(prompts):
        if not 0 < len(prompt) < config.max_seq_len:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens: this model's context holds "
                             f"{config.max_seq_len}, and an answer needs at least one; shorten it")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompt {row} has token ids outside 0..{config.vocab_size - 1}: "
                             f"was it encoded with another tokenizer?")


def rollout(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, seed=0, stop=None,
            row_ids=None) -> tuple[list[list[int]], list[list[float]]]:
    """Answer all prompts: (tokens, logprobs), a list per row, the stop token included.

    A row that does not end with `stop` was cut. row_ids (default 0..B-1) name the rows for the
    random numbers, so that the same row drawn elsewhere gives the same answer.
    """
    tokens, logps = [[] for _ in prompts], [[] for _ in prompts]
    steps = decode(model, prompts, max_new_tokens, temperature, top_p, seed, stop, row_ids)
    for rows, chosen, chosen_logps in steps:
        for row, token, logp in zip(rows, chosen, chosen_logps):
            tokens[row].append(token)
            logps[row].append(logp)
    return tokens, logps


def generate(model, prompts, max_new_tokens, temperature=0.6, top_p=0.9, seed=None, stop=None,
             row_ids=None) -> list[list[int]]:
    """Tokens only, at the released code's chat settings; seed None draws one. See `rollout`."""
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    return rollout(model, prompts, max_new_tokens, temperature, top_p, seed, stop, row_ids)[0]


def stream(model, prompt, max_new_tokens, temperature=0.6, top_p=0.9, seed=None, stop=None):
    """Yield the tokens of one answer as they come; `stop` ends it and is yielded."""
    seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
    for _, chosen, _ in decode(model, [prompt], max_new_tokens, temperature, top_p, seed, stop):
        yield chosen[0]


# ----------------------------------------------------------------- where it lives, its checkpoint


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is cuda, else mps, else cpu; ValueError if the named device is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    kind = next(k for k in there if there[k]) if name == "auto" else str(name).split(":")[0]
    if not there.get(kind, kind == "meta"):
        raise ValueError(f"device {name!r} is not available: choose auto or one of "
                         f"{', '.join(k for k in there if there[k])}")
    try:
        return torch.device(kind if name == "auto" else name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no device: auto, cpu, cuda, cuda:1 and mps are") from None


def autocast(device: torch.device):
    """bf16 products over fp32 weights on CUDA; fp32 elsewhere, where bf16 is slow or unsafe."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


FORMAT = 1  # of the checkpoint file; a reader refuses what it does not know


def atomic_write(path, write) -> None:
    """Call write(file) on a temporary file beside `path`, sync it, rename it over `path`.

    Whatever happens, `path` holds either the old content or the new, whole; a kill in between
    leaves one `.tmp` file, which the next write replaces.
    """
    path = Path(os.path.realpath(path))  # a link stays one: it may lead to a larger disk
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the rename too must reach the disk; Windows has no such call
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_torch_file(value, path) -> None:
    """torch.save, atomically; OSError in one line when the disk refuses."""
    def write(f):
        try:
            torch.save(value, f)
        except RuntimeError as e:  # torch hides the disk's own error in its message
            raise OSError(f"cannot write {path}: {str(e).splitlines()[0]} (disk full?)") from e

    atomic_write(path, write)


def check_tensors(weights, path) -> None:
    """ValueError unless these are named tensors of plain numbers that a file of `path`'s size has.

    A file may name tensors whose rows are all the same bytes: a few of them would fill any memory.
    Twice its size may be claimed, since an embedding may be shared with the output matrix.
    """
    other = f"{path} is not a weight file: it holds something else than named tensors"
    if not isinstance(weights, dict):
        raise ValueError(other)
    claimed = 0
    for name, t in weights.items():
        if not isinstance(name, str) or not isinstance(t, Tensor):
            raise ValueError(f"{other} ({name!s:.80} is {type(t).__name__})")
        if t.layout != torch.strided or t.device.type != "cpu" or t.is_quantized:
            raise ValueError(f"{path}: {name} is no plain tensor, but {t.layout} on {t.device}")
        claimed += t.numel() * t.itemsize
    if claimed > 2 * Path(path).stat().st_size:
        raise ValueError(f"{path}: its tensors claim {claimed:,} bytes, more than the file has: "
                         f"it is damaged")


def save(path, model: Llama, stage: str, tokenizer: bytes, metrics: dict | None = None,
         trained_on: str = "", dtype: torch.dtype | None = None,
         weights: dict | None = None) -> None:
    """Write one self-contained checkpoint: configuration, weights, tokenizer, what it learnt from.

    dtype: None keeps the weights' own; torch.bfloat16 halves the file. weights: the gathered
    tensors of a model that is sharded over ranks; None takes the model's own.
    """
    weights = model.state_dict() if weights is None else weights
    weights = {n: p.detach().to("cpu", dtype or p.dtype) for n, p in weights.items()}
    write_torch_file({"format": FORMAT, "stage": stage, "config": asdict(model.config),
                 "weights": {n: w.contiguous() for n, w in weights.items()},
                 "tokenizer": torch.tensor(list(tokenizer), dtype=torch.uint8),
                 "metrics": json.loads(json.dumps(metrics or {})), "trained_on": trained_on}, path)


FOREIGN = {  # how a file begins that is often taken for a checkpoint: what it is, what to do
    b"version https://git-lfs":
        "is a git-lfs pointer, not the file itself: `git lfs pull` in its folder fetches it",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.":
        "was saved by a PyTorch before 1.6 and cannot be mapped: write it anew, in Python, with "
        "torch.save(torch.load(OLD, weights_only=True), NEW)"}
CONVERT = "`python convert.py --checkpoint {} --to own --out NEW.pt` turns other formats into ours"


def read_torch_file(path, hint=CONVERT):
    """torch.load without code execution, memory-mapped; one-line ValueError for anything else.

    hint: what to do when the file is damaged or of another kind; {} stands for its path.
    """
    if not Path(path).exists():
        stem = Path(path).stem.split(".")[0]
        script = stem.split("_")[0] + ".py"  # reward.py of reward_safety.pt
        there = Path(__file__).resolve().with_name(script)
        makes = there.is_file() and "\nSTAGE = " in there.read_text(encoding="utf-8")
        raise FileNotFoundError(f"{path} does not exist: " +
                                (f"`python {script}` makes it" if makes else "check the path"))
    if Path(path).is_file():
        with open(path, "rb") as f:
            head = f.read(64)
        for start, why in FOREIGN.items():
            if head.startswith(start):
                raise ValueError(f"{path} {why}")
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except PermissionError:
        raise
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, TypeError,
            AttributeError, OSError, MemoryError) as e:  # all of these come out of damaged files
        why = f"truncated, or another format ({hint.format(path)})"
        if "weights_only" in str(e).lower():
            why = "it asks to run code, which a checkpoint never needs"
        raise ValueError(f"{path} cannot be read as a checkpoint: {why}") from e


def load(path, device="auto", dtype: torch.dtype | None = None) -> tuple[Llama, dict]:
    """Open a checkpoint of ours: (Llama, info); info: format, stage, config, tokenizer, metrics.

    The file is mapped, not read: weights that keep their dtype and stay on the CPU cost no memory
    until touched. Every key and shape is checked; ValueError says what is wrong with the file.
    """
    config, weights, info = read_checkpoint(path)
    model = assemble(config, weights, path)
    return model.to(device=pick_device(device), dtype=dtype), info


def read_checkpoint(path, hint: str = CONVERT) -> tuple[ModelConfig, dict[str, Tensor], dict]:
    """The parts of a checkpoint of ours: (configuration, mapped weights, info), as in `load`.

    hint: what to do with a file of another kind; {} stands for its path.
    """
    data = read_torch_file(path, hint)
    if isinstance(data, dict) and "model_args" in data:
        raise ValueError(f"{path} is a training state of llama2.c or nanoGPT: llama2.c's `python "
                         f"export.py model.bin --version 0 --checkpoint {path}` makes a .bin of "
                         f"it, which convert.py reads")
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError(f"{path} is not a checkpoint of this project: {hint.format(path)}")
    if "parts" in data and "random" in data:
        raise ValueError(f"{path} is the resume state of a run, not a finished model: the same "
                         f"command with --resume continues the run, and its end writes the model")
    if type(data["format"]) is not int or data["format"] != FORMAT:
        raise ValueError(f"{path} has checkpoint format {data['format']!r}, we read {FORMAT}")
    parts = {"stage": str, "config": dict, "weights": dict, "tokenizer": Tensor, "metrics": dict,
             "trained_on": str}
    missing = [name for name, kind in parts.items() if not isinstance(data.get(name), kind)]
    if missing:
        raise ValueError(f"{path} is incomplete: it lacks {', '.join(missing)}")
    try:
        config = ModelConfig(**data["config"])
        if not isinstance(config.scalar_head, bool):
            raise ValueError(f"scalar_head is {type(config.scalar_head).__name__}, expected bool")
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path} has an unknown model configuration: {e}") from e
    check_tensors(data["weights"], path)
    check_tensors({"tokenizer": data["tokenizer"]}, path)
    info = {k: v for k, v in data.items() if k != "weights"}
    return config, data["weights"], {**info, "tokenizer": bytes(data["tokenizer"].numpy())}


def assemble(config: ModelConfig, weights: dict[str, Tensor], source) -> Llama:
    """A Llama around given tensors, without copying; ValueError lists wrong names and shapes.

    Only where they mix formats (norms often are float32 among bfloat16) the narrower are widened:
    a network computes in one.
    """
    if config.n_layers > len(weights) + 1000:  # before so many are made
        raise ValueError(f"{source}: {config.n_layers} layers in the configuration, and "
                         f"{len(weights)} weights in the file")
    with torch.device("meta"):
        model = Llama(config)
    wanted = {n: tuple(p.shape) for n, p in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        lists = [f"{what} {', '.join(map(str, names[:4]))}{' ...' if len(names) > 4 else ''}"
                 for what, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise ValueError(f"{source}: wrong weight names: it {' and '.join(lists)}")
    for name, shape in wanted.items():
        if not isinstance(weights[name], Tensor) or not weights[name].is_floating_point():
            kind = getattr(weights[name], "dtype", type(weights[name]).__name__)
            raise ValueError(f"{source}: {name} is {kind}, expected a tensor of floating point")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{source}: {name} has shape {tuple(weights[name].shape)}, "
                             f"the configuration says {shape}")
    widest = functools.reduce(torch.promote_types, [w.dtype for w in weights.values()])
    weights = {name: w.to(widest) for name, w in weights.items()}
    model.load_state_dict(weights, assign=True, strict=True)
    return model
