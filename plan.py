"""Before a cent is spent: what a training run will need, and what would make it fit.

Every stage asks here on `--dry-run`, and takes the shape of what it trains from `shape_of`. Then
the commands, which need no checkpoint and no GPU:

    python plan.py settings                                              hyperparameters by size
    python plan.py table                                                 the paper's four sizes
    python plan.py plan --model 70b --ranks 2048 --tp 8 --recompute      memory, hours, advice
    python plan.py simulate --model 70b --ranks 2048 --tp 8 --recompute  about a minute

`plan` is arithmetic: memory per rank in closed form, FLOPs, GPU hours beside the paper's Table 2,
and the cheapest change that fits. `simulate` is its proof: the real sharded training step of a 70B,
on fake ranks and fake tensors, on one core; the two agree within 6%.

Not here: how a model is split over its ranks; that is scale.py, whose own split is simulated.

Keys: [L2] Llama 2, arXiv 2307.09288.  [PaLM] 2204.02311 §B: how FLOPs are counted.
      [ZeRO] 1910.02054: bytes per parameter.
"""

from __future__ import annotations

import math, os, sys, time
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

import kernels, model as M, scale, stage
from stage import ranged

GiB = 2**30
A100 = 312e12  # FLOP/s, bf16; 80 GiB of memory each [L2 Table 2]
PAPER_HOURS = {"7b": 184_320, "13b": 368_640, "34b": 1_038_336, "70b": 1_720_320}  # [L2 Table 2]
PAPER_TOKENS = 2e12  # [L2 Table 1]

# --------------------------------------------------------------------------- the closed form


def flops_per_token(c: M.ModelConfig, seq_len: int) -> int:
    """FLOPs of training on one token: 6 per weight that multiplies, 12 L D T for attention [PaLM].

    2 forward, 4 backward per weight; embeddings are looked up and norms do no matrix work.
    Attention counts the full square; a causal kernel needs half of that term.
    """
    multiplying = M.count_parameters(c) - c.vocab_size * c.dim - (2 * c.n_layers + 1) * c.dim
    return 6 * multiplying + 12 * c.n_layers * c.dim * seq_len


def gpu_hours(c: M.ModelConfig, tokens: float, seq_len: int, utilisation: float) -> float:
    """A100 hours to train on `tokens` at this share of the chip's peak; any number of chips."""
    return tokens * flops_per_token(c, seq_len) / (utilisation * A100) / 3600


def memory(c: M.ModelConfig, tokens: int, ranks: int = 1, tp: int = 1, recompute: bool = False,
           half: bool = True) -> dict[str, float]:
    """Bytes per rank by kind at the fullest moment of a training step, in closed form.

    tokens: of one forward pass on this rank. half: bf16 compute on float32 weights. The moments:
    the loss; the first layers of the backward pass; its last layers; the embeddings' gradient.
    Within 6% of the simulation below; not counted: the driver's context, NCCL, fragmentation.
    """
    d, h, L, t, w = c.dim, c.hidden_dim, c.n_layers, tokens, 2 if half else 4
    V = 1 if c.scalar_head else c.vocab_size  # rows of the head
    alone, layer = ranks == 1, 2 * d * d + 2 * d * c.n_kv_heads * c.head_dim + 3 * d * h + 2 * d
    N = M.count_parameters(c)
    layers, P, R = L * layer, layer / tp, (N - L * layer) / tp  # P: of a layer, R: of the root unit
    # Saved for backward, per layer: two norms (input in float32, result, output), q, k, v, out and
    # the log-sum-exp of attention, four of the FFN. Tensor parallelism splits all but the norms.
    norms = t * 2 * d * (4 + 2 * w)
    attention = t * (w * (2 * d + 2 * c.n_kv_heads * c.head_dim) + 4 * c.n_heads) / tp
    ffn = t * w * 4 * h / tp
    if alone and half:  # autocast: the stream stays float32, each linear keeps its own bf16 copy
        norms = t * 34 * d
    saved = norms + attention + ffn
    kept = t * w * d if recompute else saved
    # The head works on this many rows at a time: logits and gradients, 16 bytes per number.
    rows, head = min(t, max(kernels.LOGITS_AT_ONCE // V, 1)), w * V * d
    logits = max(head + 16 * V * rows, 3 * head if rows < t else 0) + 10 * d * t
    logits += head if tp > 1 else 0  # the head's weight is gathered whole
    redone = 0.0  # recomputing a layer; its peak is in w_down's backward, or in the norm's
    if recompute:
        redone = max(saved + w * t * (2 * h / tp + d) + w * d * h / tp,
                     norms + attention + t * d * (16 + w) + 3 * w * d * h / tp)
    gathers = 0 if alone else w * (R + 2 * P)  # root, this layer, the next one on its way
    sums = (0 if recompute else w * P) + (0 if alone else 4 * P)  # this layer's gradients, theirs
    copies = w * N if alone and half else 0  # autocast's bf16 weights
    moments = [(0, (0 if alone else w * (R + P)) + copies, L * kept + logits, 0),
               (layer, gathers + copies, (L - 1) * kept + redone, sums + head / tp),
               ((L - 2) * layer, gathers + copies, 2 * kept + redone, sums + head / tp),
               (layers, (0 if alone else w * R) + copies, 0, (w + (0 if alone else 4)) * R)]
    done, gathered, activations, buffers = max(moments, key=lambda m: 4 * m[0] / ranks + sum(m[1:]))
    return {"weights": 4 * N / ranks, "optimizer": 8 * N / ranks, "gradients": 4 * done / ranks,
            "gathered weights": gathered, "activations": activations, "buffers": buffers}


# ------------------------------------------------------------------------------- one run, planned


@dataclass
class Run:
    """What a training step is made of, for the planner."""

    config: M.ModelConfig
    batch_size: int  # rows of a step, over all ranks
    seq_len: int
    micro_batch: int = 0  # rows per rank and forward pass; 0: all at once
    ranks: int = 1
    tp: int = 1
    recompute: bool = False
    half: bool = True  # bf16 compute; alone on a GPU that is autocast: an estimate, not simulated
    trained: int = 1  # models with gradients and optimizer, of this shape; PPO: policy and critic
    frozen: int = 0  # models that are only read; PPO: reference and reward models
    rollouts: int = 0  # PPO: answers of an iteration, over all ranks
    per_row: int = 1  # sequences that stand for one row of the batch; reward models: 2, a pair

    @property
    def rows(self) -> int:
        """Rows per rank and forward pass."""
        own = max(self.batch_size * self.tp // self.ranks, 1)
        return min(self.micro_batch or own, own)

    def memory(self) -> dict[str, float]:
        """Bytes per rank by kind: the update, or the rollouts where they need more."""
        c, N = self.config, M.count_parameters(self.config)
        tokens = self.rows * self.per_row * self.seq_len
        parts = memory(c, tokens, self.ranks, self.tp, self.recompute, self.half)
        for kind, size in (("weights", 4), ("optimizer", 8)):
            parts[kind] += (self.trained - 1) * size * N / self.ranks
        parts["activations"] *= self.trained  # policy and critic are updated by one loss
        parts["gradients"] += (self.trained - 1) * 4 * N / self.ranks
        parts |= {"frozen models": self.frozen * 4 * N / self.ranks, "KV cache": 0.0}
        width = 2 if self.half else 4
        cached = min(self.rollouts * self.tp / self.ranks, 512) * self.seq_len  # tokens at a time
        cache = cached * 2 * c.n_layers * c.n_kv_heads * c.head_dim * width / self.tp
        whole = 0 if self.ranks == 1 else width * N / self.tp  # `unsharded`
        step = ("gradients", "gathered weights", "activations", "buffers")
        if self.rollouts and cache + whole > sum(parts[k] for k in step):
            parts |= dict.fromkeys(step, 0.0) | {"gathered weights": whole, "KV cache": cache}
        return parts

    def peak(self) -> float:
        return sum(self.memory().values())


def advise(run: Run, limit: float) -> Run | None:
    """The smallest change that makes a run fit into `limit` bytes per rank, or None.

    Tried in the order of their price: smaller micro-batches, recomputation, more ranks, tp.
    """
    sizes = [2**i for i in range(13)]
    heads = run.config.n_kv_heads
    for ranks in [r for r in sizes if r >= run.ranks]:
        for tp in [t for t in sizes if run.tp <= t <= min(8, ranks) and heads % t == 0]:
            if run.batch_size % (ranks // tp):
                continue
            for recompute in (run.recompute, True):
                for rows in [r for r in reversed(sizes) if r <= run.rows and not run.rollouts
                             ] or [0]:  # PPO takes a rank's mini-batch at once
                    changed = replace(run, ranks=ranks, tp=tp, recompute=recompute,
                                      micro_batch=rows)
                    if changed.peak() <= limit:
                        return changed
    return None


def describe(run: Run, tokens: float, limit: float, where: str, utilisation: float = 0.45) -> str:
    """A run in words and numbers: what it computes, needs, costs, and what would make it fit."""
    c, parts, peak, dp = run.config, run.memory(), run.peak(), run.ranks // run.tp
    name = next((n for n, p in M.PRESETS.items() if p == replace(c, scalar_head=False)), "model")
    models = f", {run.trained} trained and {run.frozen} frozen models" if run.frozen else ""
    per_row = f"{run.per_row} x " if run.per_row > 1 else ""
    per_step = run.batch_size * run.per_row * run.seq_len
    # PPO trains two models, and reads each token six times more: rollout, policy, reference,
    # critic and two reward models; a forward pass is a third of a training step.
    work = run.trained + (6 / 3 if run.frozen else 0)
    flops = work * flops_per_token(c, run.seq_len)
    hours = work * gpu_hours(c, tokens, run.seq_len, utilisation)
    paper = f"; the paper's Table 2: {PAPER_HOURS[name]:,}" if (
        name in PAPER_HOURS and tokens == PAPER_TOKENS) else ""
    lines = [f"{name}: {M.count_parameters(c):,} parameters{models}",
             f"batch: {run.batch_size} rows x {per_row}{run.seq_len} tokens = {per_step:,} tokens "
             f"a step; ranks: {run.ranks} ({dp} data x {run.tp} tensor parallel), each with "
             f"{run.rows} at a time",
             f"memory per rank at its fullest, GiB ({'bf16' if run.half else 'float32'} compute, "
             f"float32 weights{', recomputed activations' if run.recompute else ''}):",
             *(f"  {kind:<17}{size / GiB:10.2f}" for kind, size in parts.items() if size),
             f"  {'peak':<17}{peak / GiB:10.2f}   of the {limit / GiB:,.0f} of {where}",
             f"compute: {flops:.4g} FLOPs per token; at {utilisation:.0%} of its peak an A100 does "
             f"{utilisation * A100 / flops:,.0f} tokens/s, and {tokens:.3g} tokens "
             f"{'(a step) ' * (tokens == per_step)}are {hours:,.4g} hours of one{paper}"]
    if run.rollouts:
        lines[1] += f"; {run.rollouts} answers an iteration"
    if run.batch_size % dp:
        lines.append(f"{run.batch_size} rows cannot be split over {dp} data-parallel ranks")
    elif peak <= limit:
        return "\n".join(lines + ["it fits"])
    better, gpu = advise(run, limit), ""  # the cheapest change that does
    if better is None or better.ranks > run.ranks:  # not here: elsewhere
        better, gpu = advise(replace(run, half=True), 80 * GiB), " on 80 GiB GPUs"
    if better is None:
        return "\n".join(lines + ["it does not fit, nor on 4096 GPUs of 80 GiB"])
    change = (f"torchrun over {better.ranks} ranks, " if better.ranks > 1 else "") + \
        f"--tp {better.tp}" + (f" --micro-batch {better.micro_batch}" if better.micro_batch else
                               "") + (" --recompute" if better.recompute else "")
    return "\n".join(lines + [f"it does not fit; this would{gpu}: {change} "
                              f"({better.peak() / GiB:.1f} GiB per rank)"])


# ------------------------------------------------------------------------- hyperparameters by size


class Setting(NamedTuple):
    """One hyperparameter: what it is in the village, and at the paper's four sizes."""

    stage: str
    name: str  # a field of the stage's Config, or, in capitals, a constant of its file
    tiny: object  # the default
    sizes: tuple  # 7b, 13b, 34b, 70b
    source: str  # where the paper gives it; "ours: ..." why, where it does not


SIZES = {"7b": 5e9, "13b": 10e9, "34b": 25e9, "70b": 50e9}  # parameters from which on


def all_sizes(value) -> tuple:
    """The same at each of SIZES."""
    return (value,) * len(SIZES)


OURS = "ours: unspecified in L2"
ANSWER = "ours: §A.3.7's limit"  # 1000 tokens for the open models of its human evaluation
SETTINGS = [Setting(*row) for row in (
    ("pretrain", "tokens", 2.1e6, all_sizes(2e12), "Table 1"),
    ("pretrain", "primer", 0.25, all_sizes(0.25), "ours: the village alone"),
    ("pretrain", "batch_size", 4, all_sizes(1024), "Table 1: 4M tokens"),
    ("pretrain", "micro_batch", 16, all_sizes(1), "memory only"),
    ("pretrain", "seq_len", 256, all_sizes(4096), "Table 1"),
    ("pretrain", "lr", 0, (3e-4, 3e-4, 1.5e-4, 1.5e-4), "Table 1"),
    ("pretrain", "warmup_steps", 100, all_sizes(2000), "§2.2"),
    ("pretrain", "weight_decay", 0.1, all_sizes(0.1), "§2.2"),
    ("pretrain", "clip", 1.0, all_sizes(1.0), "§2.2"),
    ("sft", "epochs", 2, all_sizes(2), "§3.1"),
    ("sft", "batch_size", 4, all_sizes(64), "§3.1"),
    ("sft", "micro_batch", 16, all_sizes(1), "memory only"),
    ("sft", "seq_len", 512, all_sizes(4096), "§3.1"),
    ("sft", "lr", 0, all_sizes(2e-5), "§3.1"),
    ("sft", "warmup_steps", 10, all_sizes(10), OURS),
    ("sft", "weight_decay", 0.1, all_sizes(0.1), "§3.1"),
    ("sft", "clip", 1.0, all_sizes(1.0), "ours: as §2.2"),
    ("reward", "batch_size", 8, all_sizes(512), "§3.2.2"),
    ("reward", "micro_batch", 8, all_sizes(1), "memory only"),
    ("reward", "lr", 0, (1e-5, 1e-5, 1e-5, 5e-6), "§3.2.2"),
    ("reward", "margin", "small", all_sizes("small"), "ours: of Table 27's two"),
    ("reward", "aux_weight", 0.5, all_sizes(0.5), OURS),
    ("reward", "max_new_tokens", 80, all_sizes(1024), ANSWER),
    ("reward", "TEMPERATURES", (0.5, 0.8, 1.1), all_sizes((0.5, 0.8, 1.1)), OURS),
    ("rejection", "rounds", 5, all_sizes(5), "§3.2.3: V1 to V5"),
    ("rejection", "prompts", 100, all_sizes(10_000), OURS),
    ("rejection", "samples", 8, all_sizes(20), "ours: Fig. 26's"),
    ("rejection", "batch_size", 32, all_sizes(64), "ours: as SFT, §3.1"),
    ("rejection", "rs_lr", None, all_sizes(2e-5), "ours: as SFT, §3.1"),
    ("rejection", "temperatures", "0.5,0.65,0.8", all_sizes("0.6,0.8,1.0,1.2,1.4"),
     "ours: of Fig. 8's"),
    ("rejection", "threshold", 0, all_sizes(0.15), "§3.2.3"),
    ("rejection", "max_new_tokens", 80, all_sizes(1024), ANSWER),
    ("ppo", "iterations", 60, all_sizes(400), "§3.2.3"),
    ("ppo", "batch_size", 96, all_sizes(512), "§3.2.3"),
    ("ppo", "minibatch", 24, all_sizes(64), "§3.2.3"),
    ("ppo", "lr", None, all_sizes(1e-6), "§3.2.3"),
    ("ppo", "beta", None, (0.01, 0.01, 0.005, 0.005), "§3.2.3"),
    ("ppo", "threshold", 0, all_sizes(0.15), "§3.2.3"),
    ("ppo", "temperature", 1.0, all_sizes(1.0), OURS),
    ("ppo", "max_new_tokens", 80, all_sizes(1024), ANSWER),
    ("ppo", "kl_limit", 2.9, all_sizes(0), "none but beta, §3.2.3"),
    ("ppo", "patience", 15, all_sizes(200), "ours, of 200 to 400"),
    ("ppo", "CLIP", 0.2, all_sizes(0.2), "§3.2.3"),
    ("ppo", "VALUE_CLIP", 0.2, all_sizes(0.2), OURS),
    ("ppo", "GAMMA", 1.0, all_sizes(1.0), OURS),
    ("ppo", "LAMBDA", 0.95, all_sizes(0.95), OURS),
    ("gatt", "dialogues", 900, all_sizes(10_000), OURS),
    ("gatt", "turns", 12, all_sizes(20), "ours: tested to 20"),
    ("gatt", "tries", 3, all_sizes(1), "ours: none in §3.3"),
    ("gatt", "replay", 1000, all_sizes(0), "ours: none in §3.3"),
    ("gatt", "train", "attention", all_sizes("all"), "ours: as SFT, §3.1"),
    ("gatt", "epochs", 3, all_sizes(2), "ours: as SFT, §3.1"),
    ("gatt", "batch_size", 4, all_sizes(64), "ours: as SFT, §3.1"),
    ("gatt", "micro_batch", 16, all_sizes(1), "memory only"),
    ("gatt", "seq_len", 512, all_sizes(4096), "ours: as SFT, §3.1"),
    ("gatt", "max_new_tokens", 80, all_sizes(1024), ANSWER),
    ("gatt", "lr", 0, all_sizes(2e-5), "ours: as SFT, §3.1"),
    ("gatt", "TEMPERATURE", 0.7, all_sizes(0.7), OURS),
)]


def settings(stage_name: str, config: M.ModelConfig) -> dict:
    """{flag: value} of a stage for a model of this size, {} below 7b: for `stage.at_size`.

    ValueError for a stage without rows: a fork must say what it is at a large size.
    """
    parameters = M.count_parameters(replace(config, scalar_head=False))
    columns = [i for i, least in enumerate(SIZES.values()) if parameters >= least]
    if not columns:
        return {}
    values = {row.name: row.sizes[columns[-1]] for row in SETTINGS
              if row.stage == stage_name and not row.name.isupper()}
    if not values:
        raise ValueError(f"plan.SETTINGS has no rows for {stage_name}: say there what its flags "
                         f"are from 7b on")
    return values


def print_settings() -> None:
    """The hyperparameters that change with size, and where the large ones' values come from."""
    print(f"{'':<25}{'tiny':>13}" + "".join(f"{size:>9}" for size in SIZES) + "  from 7b on")
    for row in SETTINGS:
        tiny = "by width" if row.tiny in (None, 0) else str(row.tiny).replace(" ", "")
        if row.name == "threshold":
            tiny = "calibrated"
        values = [f"{v:g}" if isinstance(v, (int, float)) else "..." for v in row.sizes]
        if isinstance(row.sizes[0], str):
            values = [v if len(v) < 9 else "(list)" for v in row.sizes]
        print(f"{row.stage + '.' + row.name:<25}{tiny[:12]:>13}"
              + "".join(f"{value:>9}" for value in values) + f"  {row.source}")


# ------------------------------------------------------------------------- what the stages ask for


def shape_of(checkpoint, preset: str | None, dry_run: bool) -> M.ModelConfig:
    """The shape that a stage trains: its checkpoint's, which --model NAME, if given, must name.

    A dry run with --model needs no checkpoint. ValueError if the two differ; the vocabulary and
    the context may.
    """
    if preset and dry_run:
        return M.preset(preset)
    config = M.load(checkpoint, "cpu")[0].config
    if preset:
        same = M.preset(preset, vocab_size=config.vocab_size, max_seq_len=config.max_seq_len,
                        norm_eps=config.norm_eps, rope_theta=config.rope_theta,
                        scalar_head=config.scalar_head)
        if config != same:
            raise ValueError(f"--model {preset}: {checkpoint} has another shape (dim {config.dim}, "
                             f"{config.n_layers} layers): leave --model away, or give a "
                             f"--checkpoint of that size")
    return config


def dry_run(config: M.ModelConfig, batch_size: int, seq_len: int, micro_batch: int = 0,
            recompute: bool = False, tp: int = 1, tokens: float = 0, device: str = "auto",
            pairs: bool = False, rollouts: int = 0, trained: int = 2, frozen: int = 4) -> str:
    """--dry-run: print what a stage would need on this machine, under this torchrun.

    Allocates nothing. tokens: of the whole training, for the hours; 0: of one step. pairs: a row
    is two sequences, chosen and rejected. rollouts: answers of an iteration; with them go the
    models that are trained and those that are only read (of PPO policy and critic; reference, SFT
    and two reward models).
    """
    ranks, place = int(os.environ.get("WORLD_SIZE", 1)), M.pick_device(device)
    if tp < 1 or ranks % tp:
        raise ValueError(f"--tp {tp} must divide the {ranks} ranks: start --dry-run under torchrun "
                         f"too, or ask `python plan.py plan --ranks N --tp {tp}`")
    run = Run(config, batch_size, seq_len, micro_batch, ranks, tp, recompute, place.type == "cuda",
              per_row=1 + pairs)
    if rollouts:
        run = replace(run, trained=trained, frozen=frozen, rollouts=rollouts)
    if place.type == "cuda":
        limit = float(torch.cuda.get_device_properties(place).total_memory)
    elif hasattr(os, "sysconf"):
        limit = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        limit /= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    else:
        limit = math.inf
    tokens = tokens or batch_size * (1 + pairs) * seq_len
    text = describe(run, tokens, limit, f"this machine's {place.type}")
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return text


# ----------------------------------------------------------------------------- the simulated step


def simulate(run: Run) -> dict[str, float]:
    """Bytes per rank by kind at the peak of a *real* sharded training step, on fake ranks.

    The model, the split, FSDP2 and AdamW are the real ones; tensors have shapes but no storage,
    and the process group only pretends. So a 70B on 2048 ranks runs on one core. The private
    imports of this repository all stand here.
    """
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=run.ranks)
    try:
        mesh = init_device_mesh("cpu", (run.ranks // run.tp, run.tp), mesh_dim_names=("dp", "tp"))
        ranks = scale.Ranks(torch.device("cpu"), 0, run.ranks, run.tp, mesh)
        with torch.device("meta"):
            model = TrainingStep(run.config)
        for layer in model.layers:
            layer.recompute = run.recompute
        scale.parallelize(model, ranks, torch.bfloat16 if run.half else None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = stage.adamw(model, 1e-4, 0.1)
            tokens = torch.empty(run.rows, run.seq_len + 1, dtype=torch.int64)
            model.step(tokens, optimizer)  # untracked: DTensor works out its layouts only once
            tracker = FSDPMemTracker(model, optimizer)
            tracker.track_inputs((tokens,))
            with tracker:
                model.step(tokens, optimizer)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        return {str(getattr(kind, "value", kind)): float(size) for kind, size in peak.items()}
    finally:
        dist.destroy_process_group()


class TrainingStep(M.Llama):
    """The stages' loss inside `forward`, where the memory tracker's hooks can see it.

    As `kernels.token_logprobs`, without picking positions by a mask: fake tensors have no values.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = M.Llama.hidden(self, tokens[:, :-1]).flatten(0, 1)  # not FSDP's: we are inside
        weight = self.output.weight  # gathered after hidden: backward runs in reverse order
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        logp = kernels._logprobs_in_chunks(hidden, weight, tokens[:, 1:].flatten(), 1.0)
        return -logp.mean()

    def step(self, tokens: Tensor, optimizer) -> None:
        self(tokens).backward()
        optimizer.step()
        optimizer.zero_grad()


# --------------------------------------------------------------------------------- the commands


@dataclass
class Plan:
    """Flags of `plan` and `simulate`, one training run."""

    model: str = "70b"  # preset: tiny 15m 110m 1b 7b 13b 34b 70b
    layers: int = ranged(0, least=0)  # 0: the preset's; 4 do to compare with the closed form
    ranks: int = ranged(2048, least=1)  # GPUs; paper: 2000 (§2.2.1)
    tp: int = ranged(1, least=1)  # of which so many split each matrix
    batch_size: int = ranged(1024, least=1)  # rows of a step; paper: 4M tokens (Table 1)
    micro_batch: int = ranged(1, least=1)  # rows per rank and forward pass
    seq_len: int = ranged(0, least=0)  # tokens; 0: the preset's context
    recompute: bool = False  # recompute activations in the backward pass
    gpu_memory: float = ranged(80, above=0)  # GiB; paper: A100-80GB (§2.2.1)
    tokens: float = ranged(PAPER_TOKENS, least=1)  # of the whole training; paper: 2e12 (Table 1)
    utilisation: float = ranged(0.45, above=0)  # of the chip's peak; paper: .38 to .46, see `table`

    def run(self) -> Run:
        stage.check(self)
        c = M.preset(self.model)
        c = replace(c, n_layers=self.layers or c.n_layers)
        if self.ranks % self.tp or c.n_kv_heads % self.tp:
            raise ValueError(f"--tp {self.tp} must divide --ranks {self.ranks} and the model's "
                             f"{c.n_kv_heads} kv heads")
        return Run(c, self.batch_size, self.seq_len or c.max_seq_len, self.micro_batch, self.ranks,
                   self.tp, self.recompute)


def plan(cfg: Plan) -> None:
    """Memory, hours and advice for one configuration."""
    print(describe(cfg.run(), cfg.tokens, cfg.gpu_memory * GiB, "a GPU", cfg.utilisation))


def run_simulation(cfg: Plan) -> None:
    """The simulated step beside the closed form."""
    run, began = cfg.run(), time.process_time()
    peak = simulate(run)
    print(f"{cfg.model}, {run.config.n_layers} layers, {run.ranks} ranks, tp {run.tp}, "
          f"{run.rows} x {run.seq_len} tokens per rank; GiB per rank at a simulated step's peak:")
    print("\n".join(f"  {kind:<17}{size / GiB:10.3f}" for kind, size in peak.items() if size))
    print(f"  {'closed form':<17}{run.peak() / GiB:10.3f}   "
          f"{run.peak() / peak['Total'] - 1:+.1%}   ({time.process_time() - began:.0f} CPU s)")


@dataclass
class Table:
    """Flags of `table`, the paper's four sizes."""

    ranks: int = ranged(2048, least=1)  # GPUs for the column of days; paper: 2000 (§2.2.1)


def table(cfg: Table) -> None:
    """The paper's four sizes: hours of Table 2, and what they imply."""
    stage.check(cfg)
    print("size      parameters  FLOPs/token  A100 hours  of peak  tokens/s/GPU  days on "
          f"{cfg.ranks}  GiB/GPU*")
    for name, hours in PAPER_HOURS.items():
        c = M.PRESETS[name]
        ideal = gpu_hours(c, PAPER_TOKENS, c.max_seq_len, 1.0)
        run = Run(c, 1024, c.max_seq_len, 4, cfg.ranks, 8, True)
        print(f"{name:<4}{M.count_parameters(c):>16,}{flops_per_token(c, c.max_seq_len):>13.4g}"
              f"{hours:>12,}{ideal / hours:>9.1%}{PAPER_TOKENS / hours / 3600:>14,.0f}"
              f"{hours / 24 / cfg.ranks:>15.1f}{run.peak() / GiB:>10.1f}")
    print("hours: the paper's Table 2, 2T tokens; of peak: 312 TFLOP/s bf16, attention counted in "
          "full\n* closed form: tp 8, 4 rows of 4096 tokens at a time, activations recomputed")


@dataclass
class Settings:
    """`settings` has no flags."""


COMMANDS = {"settings": (lambda cfg: print_settings(), Settings), "table": (table, Table),
            "plan": (plan, Plan), "simulate": (run_simulation, Plan)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"plan.py: give one of {', '.join(COMMANDS)}; `python plan.py plan --help` lists "
              f"a command's flags", file=sys.stderr)
        raise SystemExit(2)
    stage.run(*COMMANDS[sys.argv.pop(1)])
