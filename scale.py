"""Many processes: the ranks, a network split over them, its state on disk, tokens in shards.

Every stage calls these functions. In a plain `python STAGE.py` they are no-ops and nothing
distributed is imported. Under `torchrun --nproc-per-node N STAGE.py --tp M` the N ranks stand in a
grid of N/M rows (dp) and M columns (tp):

    tp ranks split every matrix: each holds some of the heads and some of the FFN's units
    dp ranks split the batch, and store 1/dp of what is left of every parameter, of its gradient
       and of its optimizer state; a layer's weights are gathered just before they are used (FSDP2)

             tp 0     tp 1
    dp 0   rank 0   rank 1     the same rows of the batch, different heads
    dp 1   rank 2   rank 3     other rows

A stage holds one object, `ranks = scale.setup(device, tp)`, and asks it: `ranks.rows(n)` are its
rows of the batch, `ranks.sum(x)` a number over all of them. A model remembers its own ranks from
`wrap` on, so what is done with a model needs the model alone: `scale.clip(model, 1.0)`.

Then data at scale: tokens in memory-mapped shards, read in an order that needs no table.

    python scale.py tokenise --data corpus/ --tokenizer llama.model --out shards/
    python scale.py consolidate --state out/pretrain.state --tokenizer llama.model --out now.pt

Not here: what a run will need, which is plan.py's; the one file that a finished stage leaves, which
is model.py's.

Keys: [L2] Llama 2, arXiv 2307.09288.  [FSDP] 2304.11277.  [TP] Megatron-LM, 1909.08053.

Differs from the paper: its training code is unpublished; this is PyTorch's own engine. Losses are
those of a single process up to the order of summation (float32: 1e-6), not bit for bit.
"""

from __future__ import annotations

import atexit, contextlib, functools, json, logging, math, multiprocessing, os, random, shutil, sys
import tempfile, threading, time, warnings, zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import data, kernels, model as M, stage
from stage import ranged

# ------------------------------------------------------------------------------- the processes


@dataclass
class Ranks:
    """All processes, and which one this is; a single process is rank 0 of 1, with mesh None.

    Every rank must make the same calls of `sum` to `finish` in the same order: each waits for all.
    """

    device: torch.device
    rank: int = 0
    size: int = 1  # processes in all = dp * tp
    tp: int = 1  # ranks that split each matrix
    mesh: object = None  # DeviceMesh with dimensions ("dp", "tp")

    @property
    def is_main(self) -> bool:
        return self.rank == 0  # the one that prints and writes files

    @property
    def dp(self) -> int:
        return self.size // self.tp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    def rows(self, batch_size: int) -> range:
        """Which rows of the global batch this rank takes: rows dp_rank, dp_rank + dp, ...

        Over all ranks they are range(batch_size), whatever their number; tp ranks take the same
        rows. ValueError if the batch cannot be split evenly.
        """
        if batch_size % self.dp:
            raise ValueError(f"--batch-size {batch_size} rows cannot be split over {self.dp} "
                             f"data-parallel ranks: give a multiple of {self.dp}")
        return range(self.dp_rank, batch_size, self.dp)

    def sum(self, value: float) -> float:
        """Sum of a number over the dp ranks; tp ranks hold the same number, which counts once."""
        if self.mesh is None:
            return float(value)
        import torch.distributed as dist

        total = torch.tensor(value / self.tp, dtype=torch.float64)  # on the CPU, so through gloo
        dist.all_reduce(total)
        return total.item()

    def mean(self, value: float, weight: float = 1.0) -> float:
        """Mean of a number over the dp ranks; weight: how much stands behind it here, as tokens."""
        return self.sum(value * weight) / self.sum(weight)

    def max(self, tensor: Tensor) -> Tensor:
        """The largest of all ranks, element by element; on the CPU, in place."""
        if self.mesh is not None:
            import torch.distributed as dist

            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, values: list) -> list:
        """The lists of all dp ranks as one: their first items, their second ones, ... as `rows`."""
        if self.mesh is None:
            return values
        import torch.distributed as dist

        lists = [None] * self.size
        dist.all_gather_object(lists, values)
        lists = lists[::self.tp]  # tp ranks hold the same items
        longest = max(len(items) for items in lists)
        return [items[i] for i in range(longest) for items in lists if i < len(items)]

    def barrier(self) -> None:
        """Nobody goes on before all are here: what one rank wrote, the others may now read."""
        self.sum(0)

    def finish(self) -> None:
        """The last line of a stage: wait for all ranks, then close.

        Without the barrier gloo aborts in about one exit of ten: its worker thread still holds the
        last all-reduce while the interpreter goes down (pytorch issue 190489).
        """
        if self.mesh is None:
            return
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def setup(device: str = "auto", tp: int = 1) -> Ranks:
    """Join the ranks that torchrun started, or, without it, be the only one.

    From here on only rank 0 prints. A rank that ends before `finish` takes the others with it:
    torchrun sees it die and ends them. ValueError if tp does not divide the number of ranks.
    """
    if "WORLD_SIZE" not in os.environ:
        if tp != 1:
            raise ValueError(f"--tp {tp} splits the model over processes: start it as "
                             f"`torchrun --nproc-per-node {tp} {sys.argv[0]} --tp {tp} ...`")
        return Ranks(M.pick_device(device))
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if tp < 1 or size % tp:
        raise ValueError(f"--tp {tp} must divide the {size} ranks that torchrun started")
    place = M.pick_device("cpu" if device in ("auto", "mps") and not torch.cuda.is_available()
                          else device)  # gloo knows no MPS
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    atexit.register(_abandon)
    # Advice about speed, once per rank; and the views that FSDP warns of are never written to
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    if rank != 0:
        sys.stdout = open(os.devnull, "w")
    mesh = init_device_mesh(place.type, (size // tp, tp), mesh_dim_names=("dp", "tp"))
    return Ranks(place, rank, size, tp, mesh)


def ranks_of(model) -> Ranks:
    """The ranks among which `wrap` put a model; a model that never went through it is alone."""
    return getattr(model, "ranks", None) or Ranks(model.tok_embeddings.weight.device)


def _abandon() -> None:
    """At exit without `finish`, something failed: leave at once, not through gloo's destructors."""
    import torch.distributed as dist

    if dist.is_initialized():
        sys.stderr.flush()
        os._exit(1)


# ----------------------------------------------------------------------------- the same network


def wrap(model: M.Llama, ranks: Ranks, seed: int | None = None, recompute: bool = False,
         compile: bool = False) -> M.Llama:
    """Put a model on this process's device: whole, or its share of it.

    seed: draw all weights (a model built under `torch.device("meta")` costs nothing until then);
    None keeps those it has, which must be the same on all ranks, e.g. a file they all map. Half
    precision becomes float32, each rank converting its share alone. compile: through PyTorch's
    compiler. The optimizer is built after this, never before: it would hold the unsharded
    parameters.
    """
    model.ranks = ranks  # for `ranks_of`
    for layer in model.layers:
        layer.recompute = recompute
    if compile:
        kernels.compile_model(model)
    is_meta = model.tok_embeddings.weight.is_meta
    if is_meta and seed is None:
        raise ValueError("a model on the meta device has no weights: give wrap a seed")
    if ranks.mesh is not None:  # bf16 compute over float32 weights on a GPU
        parallelize(model, ranks, torch.bfloat16 if ranks.device.type == "cuda" else None)
    if is_meta:
        model.to_empty(device=ranks.device)
    elif ranks.mesh is None:
        model.to(ranks.device)
    if seed is not None and ranks.mesh is None:
        model.init_weights(seed)
    elif seed is not None:
        _init_shards(model, seed)
    return model.to(M.at_least_float32(model.norm.weight.dtype))


def parallelize(model: M.Llama, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Split a model over ranks.mesh: tensor parallel first, then FSDP2, each layer one unit.

    dtype: of the compute (weights are gathered in it); gradients are summed in float32. Embeddings,
    last norm and head are the root unit, which stays gathered between forward and backward: the
    stages use `model.output.weight` after `model.hidden`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor.parallel import parallelize_module

    if ranks.tp > 1:
        c = model.config
        if c.n_kv_heads % ranks.tp or c.hidden_dim % ranks.tp or c.dim % ranks.tp:
            raise ValueError(f"--tp {ranks.tp} must divide the model's {c.n_kv_heads} kv heads, "
                             f"FFN width {c.hidden_dim} and width {c.dim}")
        # src_data_rank None: each rank cuts its part from its own copy, without communication
        parallelize_module(model, ranks.mesh["tp"], tensor_plan(c.scalar_head), src_data_rank=None)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None,
        cast_forward_inputs=False)  # True would round the RoPE table, and copy a KV cache unseen
    for part in (*model.layers, model):
        fully_shard(part, mesh=ranks.mesh["dp"], mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")  # gathers the root unit, as forward does


def tensor_plan(scalar_head: bool) -> dict:
    """How each matrix is split over the tp ranks [TP §3]; * is any layer.

    A column-wise matrix takes the whole input and makes part of the output (some heads, some FFN
    units); a row-wise one takes that part and makes a summand of the whole output. So a pair of
    them costs one all-reduce forward and one backward. The residual stream is whole on each rank.
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

    class Whole(ParallelStyle):
        """The same on all tp ranks; a DTensor like its neighbours, so that one norm clips all."""

        def _apply(self, module, mesh):
            def enter(_, inputs, mesh):
                return tuple(DTensor.from_local(x, mesh, [Replicate()]) for x in inputs)

            return distribute_module(module, mesh, None, enter, lambda _, y, mesh: y.to_local())

    attention = {f"layers.*.attention.{w}": ColwiseParallel() for w in ("wq", "wk", "wv")}
    ffn = {f"layers.*.feed_forward.{w}": ColwiseParallel() for w in ("w_gate", "w_up")}
    whole = Replicate()
    return {**attention, "layers.*.attention.wo": RowwiseParallel(),
            **ffn, "layers.*.feed_forward.w_down": RowwiseParallel(),
            "layers.*.attention_norm": Whole(), "layers.*.ffn_norm": Whole(), "norm": Whole(),
            "tok_embeddings": ColwiseParallel(output_layouts=whole),  # by features, as Meta does
            "output": Whole() if scalar_head else ColwiseParallel(output_layouts=whole)}


def _init_shards(model, seed: int) -> None:
    """init_weights on a split model: the numbers of a single process, one parameter at a time.

    Left alone, every rank would draw the same numbers for its own part. So each draws the whole
    tensor, in the order and from the generators of `init_weights`, and keeps its part.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)
    device = ranks_of(model).device

    def named_parameters():
        for name, p in model.named_parameters():
            full = torch.empty(p.shape, dtype=p.dtype, device=device)
            yield name, full  # init_weights fills it, then asks for the next
            set_model_state_dict(model, {name: full}, options=options)

    M.Llama.init_weights(SimpleNamespace(config=model.config, named_parameters=named_parameters),
                         seed)


def _units(model) -> list:
    """The FSDP units of a module, root first; none in a single process."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


def _shard_again(model) -> None:
    """Free gathered weights, so that the next use gathers what the optimizer wrote."""
    for unit in _units(model):
        unit.reshard()


def clip(model, max_norm: float) -> float:
    """Scale a model's gradients to norm max_norm at most, over its ranks; the norm before.

    Every rank must call it. Parameters without a gradient count nothing.
    """
    _shard_again(model)
    params = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params])
    is_alone = ranks_of(model).mesh is None
    total = float(norm if is_alone else norm.full_tensor())  # a collective: on all ranks
    if not total <= max_norm:  # multiplying by 1 takes as long as by anything else; true of nan
        nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return total


@contextlib.contextmanager
def unsharded(model):
    """Inside, the weights are gathered once: for rollouts and evaluation [L2 §3.2.3].

    Every rollout stands inside. Outside it would gather every layer for every token, and in
    inference mode, where what is gathered can never be trained on. With tp 1 no rank waits for
    another, so they may generate different lengths. Costs the whole model / tp per rank.
    """
    if ranks_of(model).mesh is None or getattr(model, "is_gathered", False):
        yield model
        return
    units, model.is_gathered = _units(model), True
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield model
    finally:
        model.is_gathered = False
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not model, recurse=False)


def rollout(model, prompts, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0,
            seed: int = 0, stop: int | None = None, row_ids=None, memory=None):
    """`kernels.rollout`, its rows shared out among the dp ranks; every rank gets all of them.

    A row draws by its id, so the answers are those of a single process. Ranks keep no memory.
    """
    ranks = ranks_of(model)
    options = dict(temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    if ranks.mesh is None:
        return kernels.rollout(model, prompts, max_new_tokens, row_ids=row_ids, memory=memory,
                               **options)
    ids = list(range(len(prompts)) if row_ids is None else row_ids)
    mine, found = range(ranks.dp_rank, len(prompts), ranks.dp), ([], [])
    with unsharded(model):
        if mine:  # more ranks than prompts: some have none
            found = kernels.rollout(model, [prompts[i] for i in mine], max_new_tokens,
                                    row_ids=[ids[i] for i in mine], **options)
    tokens, logprobs = zip(*ranks.gather(list(zip(*found))))
    return list(tokens), list(logprobs)


# --------------------------------------------------------------------------------- checkpoints


def full_weights(model, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of all weights, whole, on rank 0's CPU; {} on the others, which must call it too."""
    _shard_again(model)
    weights, is_main = {}, ranks_of(model).is_main
    for name, p in model.state_dict().items():  # one tensor at a time is whole on the devices
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        if is_main:
            weights[name] = whole.detach().to("cpu", dtype or p.dtype, copy=True)
    return weights


def load_weights(model, weights: dict[str, Tensor]) -> None:
    """The way back from `full_weights`: rank 0's whole tensors into any number of ranks."""
    ranks = ranks_of(model)
    if ranks.mesh is None:
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    _shard_again(model)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights if ranks.is_main else {}, options=options)


def save(path, model, name: str, tokenizer: bytes, metrics: dict, trained_on: str) -> None:
    """`M.save` of a model that may be sharded: rank 0 writes, and all go on when it is there."""
    weights = full_weights(model)
    ranks = ranks_of(model)
    if ranks.is_main:
        M.save(path, model, name, tokenizer, metrics, trained_on, weights=weights)
    ranks.barrier()


def save_state(path, model, optimizer, extra: dict, ranks: Ranks) -> None:
    """Write what a running stage needs to go on: weights, optimizer, random state, `extra`.

    path: out/STAGE.state.pt, written by a single process. Many ranks write their parts side by
    side into out/STAGE.state/step-00000012/. model, optimizer: one of each, or dicts of them.
    extra: plain values and whole tensors, with the key "step"; rank 0's counts. Atomic: a kill
    leaves the previous state.
    """
    folder = Path(path).with_suffix("")
    if ranks.mesh is None:
        parts = {k: v.state_dict() for k, v in _parts(model, optimizer).items()}
        stage.save_state(path, {"parts": parts, "random": _random_state(ranks), "extra": extra})
        shutil.rmtree(folder, ignore_errors=True)  # what many ranks wrote before
        return
    import torch.distributed.checkpoint as dcp

    final = folder / f"step-{extra['step']:08d}"
    temporary = final.with_suffix(".tmp")
    if ranks.is_main:
        for old in folder.glob("*.tmp"):  # litter of a kill; a .tmp is never read
            shutil.rmtree(old)
        temporary.mkdir(parents=True)
    ranks.barrier()
    dcp.save(_distributed_state(model, optimizer), checkpoint_id=temporary)
    stage.save_state(temporary / f"random-{ranks.rank}-of-{ranks.size}.pt", _random_state(ranks))
    ranks.barrier()  # every part is on the disk
    if ranks.is_main:
        stage.save_state(temporary / "extra.pt", extra)
        shapes = {name: asdict(part.config) for name, part in _parts(model, {}).items()}
        stage.save_state(temporary / "shapes.pt", shapes)  # for `consolidate`
        _swap_in(temporary, final)
        Path(path).unlink(missing_ok=True)  # what a single process wrote before
    ranks.barrier()


def _swap_in(temporary: Path, final: Path) -> None:
    """Rename a finished state, and drop all but it and its predecessor.

    Never write into a finished one: killed halfway, it would hold old metadata with new data.
    """
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    directory = os.open(final.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
    states = sorted(p for p in final.parent.iterdir() if p.suffix != ".tmp")
    for old in states:
        if old > final or old < states[max(states.index(final) - 1, 0)]:
            shutil.rmtree(old)


def _newest_state(path) -> tuple[dict | None, Path | None]:
    """(a single process's state, None), (None, folder of many ranks' state), or (None, None)."""
    folder = Path(path).with_suffix("")
    states = sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")
    single = stage.load_state(path)
    if single and not single.keys() >= {"parts", "random", "extra"}:
        raise ValueError(f"{path} is not a resume state of a stage: delete it to start afresh")
    if single and (not states or single["extra"]["step"] > int(states[-1].name[5:])):
        return single, None
    return None, states[-1] if states else None


def peek_state(path) -> dict | None:
    """`extra` of the newest complete state of `path`; None when there is none."""
    single, folder = _newest_state(path)
    if single:
        return single["extra"]
    return stage.load_state(folder / "extra.pt") if folder else None


def load_state(path, model, optimizer, ranks: Ranks, check=None) -> dict | None:
    """Continue from the newest complete state of `path`: fills model and optimizer, returns extra.

    None when there is none. check(extra), if given, is called before anything is filled, and may
    raise. Many ranks' state loads on any number of ranks, one included; there the random state is
    left as it is, and losses agree to rounding instead of bit for bit.
    """
    single, folder = _newest_state(path)
    if single and ranks.mesh is not None:
        raise ValueError(f"{path} is the state of a single process: continue it without "
                         f"torchrun, or leave --resume away to start afresh")
    if not single and not folder:
        return None
    if single:
        try:
            if check:
                check(single["extra"])
            for name, part in _parts(model, optimizer).items():
                part.load_state_dict(single["parts"][name])
            _set_random_state(single["random"], ranks)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as e:
            raise ValueError(f"{path} does not fit this run, or is damaged ({type(e).__name__}): "
                             f"delete it to start afresh") from e
        return single["extra"]
    extra = stage.load_state(folder / "extra.pt")
    if check:
        check(extra)
    _load_distributed(folder, model, optimizer, ranks)
    random_state = stage.load_state(folder / f"random-{ranks.rank}-of-{ranks.size}.pt")
    if random_state:
        _set_random_state(random_state, ranks)
    return extra


@dataclass
class Consolidate:
    """Flags of `consolidate`, a distributed state made one file."""

    state: str = "out/pretrain.state"  # folder of a run's distributed resume states
    part: str = ""  # which model of several: ppo.py has policy and critic
    tokenizer: str = "tokenizer.model"  # SentencePiece model, or a checkpoint of ours that holds it
    out: str = "consolidated.pt"  # checkpoint to write
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights


def consolidate(cfg: Consolidate) -> None:
    """The newest state of a running or interrupted stage as one checkpoint of ours.

    Needs no ranks. One tensor is in memory at a time: the whole is gathered in files beside OUT,
    as large as OUT, that are gone at the end.
    """
    import torch.distributed.checkpoint as dcp

    states = sorted(p for p in Path(cfg.state).glob("step-*") if p.suffix != ".tmp")
    if not states:
        raise FileNotFoundError(f"{cfg.state} holds no finished state: give the folder that "
                                f"a stage under torchrun writes, as out/pretrain.state")
    shapes, name = stage.load_state(states[-1] / "shapes.pt"), f"model.{cfg.part}"
    if name not in shapes:
        raise ValueError(f"--part {cfg.part!r}: {states[-1]} holds "
                         f"{', '.join(n[6:] or repr('') for n in shapes if n != 'format')}")
    source = Path(cfg.tokenizer)
    tokenizer = M.load(source, "cpu")[1]["tokenizer"] if source.suffix == ".pt" else \
        data.Tokenizer(source).model_bytes
    with torch.device("meta"):
        model = M.Llama(M.ModelConfig(**shapes[name]))
    if data.Tokenizer(tokenizer).vocab_size != model.config.vocab_size:
        raise ValueError(f"{source} has another vocabulary than the model's "
                         f"{model.config.vocab_size}: give the tokenizer it is trained with")
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(cfg.out).parent) as folder:
        weights, dtype = {}, getattr(torch, cfg.dtype)
        for key, p in model.state_dict().items():
            one = {key: torch.empty(p.shape)}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is")  # one process: as meant
                dcp.load({name: one}, checkpoint_id=states[-1], no_dist=True)
            mapped = torch.from_file(f"{folder}/{key}", True, p.numel(), dtype=dtype)
            weights[key] = mapped.view(p.shape).copy_(one[key])
        M.save(cfg.out, model, Path(cfg.state).stem, tokenizer, {}, f"{states[-1]}",
               weights=weights)
        del weights, mapped  # before their files go
    print(f"wrote {cfg.out}: {M.count_parameters(model.config):,} parameters of {states[-1]}")


def remove_state(path, ranks: Ranks) -> None:
    """The stage is finished, its checkpoint written: its resume states are no longer needed."""
    if ranks.is_main:
        Path(path).unlink(missing_ok=True)
        shutil.rmtree(Path(path).with_suffix(""), ignore_errors=True)


def _parts(model, optimizer) -> dict:
    """{"model.NAME": module, "optimizer.NAME": optimizer} from one of each or dicts of them."""
    def named(kind, x):
        return {f"{kind}.{k}": v for k, v in (x if isinstance(x, dict) else {"": x}).items()}

    return named("model", model) | named("optimizer", optimizer)


def _distributed_state(model, optimizer) -> dict:
    """State dicts keyed by parameter names, which mean the same on any number of ranks.

    Optimizers are matched with the model of the same key.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    parts, state = _parts(model, optimizer), {}
    for name, part in parts.items():
        kind, key = name.split(".", 1)
        if kind == "model":
            _shard_again(part)
            state[name] = get_model_state_dict(part)
        else:
            owner, is_fresh = parts[f"model.{key}"], not part.state
            state[name] = get_optimizer_state_dict(owner, part)
            if is_fresh:  # torch made up its moments by a step with gradient 0: uncount that step
                for moments in part.state.values():
                    moments["step"].zero_()
                state[name] = get_optimizer_state_dict(owner, part)
    return state


def _load_distributed(folder: Path, model, optimizer, ranks: Ranks) -> None:
    """Fill models and optimizers, each rank reading its own part."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state, parts = _distributed_state(model, optimizer), _parts(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: as meant
        dcp.load(state, checkpoint_id=folder, no_dist=ranks.mesh is None)
    for name, part in parts.items():
        kind, key = name.split(".", 1)
        if kind == "model":
            set_model_state_dict(part, state[name])
        else:
            set_optimizer_state_dict(parts[f"model.{key}"], part, state[name])


def _random_state(ranks: Ranks) -> dict:
    """The generators behind torch, numpy and random, as values that weights_only accepts."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state(ranks.device) if ranks.device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
            "numpy": [name, keys.tolist(), *rest]}


def _set_random_state(state: dict, ranks: Ranks) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], ranks.device)
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))


# ------------------------------------------------------------------------------- data at scale


def permuted(index: np.ndarray, count: int, seed: int, epoch: int = 0) -> np.ndarray:
    """Where positions `index` of an epoch lie in the data: a permutation of range(count).

    int64 (n,) -> int64 (n,). No table and no state: a Feistel network permutes the numbers of
    2b bits, keyed by (seed, epoch); a result >= count is put in again until it falls inside.
    """
    bits = max((count - 1).bit_length() + 1, 2) // 2  # b: half of the number
    low = np.uint64((1 << bits) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64)
    x, outside = index.astype(np.uint64), np.ones(len(index), bool)
    while outside.any():
        left, right = x[outside] >> np.uint64(bits), x[outside] & low
        for key in keys:  # (l, r) -> (r, l xor hash(r)): undone by the same hash, so one to one
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & low)
        x[outside] = left << np.uint64(bits) | right
        outside = x >= count
    return x.astype(np.int64)


class TokenStream:
    """Token shards on disk as one long array: len(stream), stream[a:b]; loads only what is read.

    pieces: (file, first, end) in tokens, one behind the other; the same may stand there twice.
    """

    def __init__(self, pieces: list[tuple[Path, int, int]], dtype: str):
        self.pieces = [piece for piece in pieces if piece[1] < piece[2]]
        self.ends = np.cumsum([0] + [end - first for _, first, end in self.pieces])[1:]
        self.dtype = np.dtype(dtype)
        # Few at a time: a process may map 65,530 files, and 2e12 tokens can be more
        self.open = functools.lru_cache(256)(lambda path: np.memmap(path, self.dtype, "r"))

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.pieces else 0

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        at, found = int(np.searchsorted(self.ends, start, side="right")), []
        while start < stop:
            path, first, end = self.pieces[at]
            base = int(self.ends[at]) - (end - first)  # where this piece begins in the stream
            upto = min(stop, int(self.ends[at]))
            found.append(self.open(path)[first + start - base:first + upto - base])
            start, at = upto, at + 1
        return np.concatenate(found) if found else np.empty(0, self.dtype)


def are_shards(sources: str) -> bool:
    """Whether --data names token shards, as `tokenise` writes them, and not text."""
    return (Path(sources.split(",")[0].partition("=")[0]) / "shards.json").is_file()


def read_shards(sources: str, held_out: int = 1 << 20) -> tuple[TokenStream, TokenStream, bytes]:
    """(to train on, held out, bytes of the SentencePiece model) of a mixture of shards.

    sources: folders made by `tokenise` with their weights: "wiki=2.5,web" reads wiki two and a
    half times per epoch and web once [L2 §2.1: the most factual sources are up-sampled]. The half
    is the first one of every shard. Held out: the end of each source, at most a tenth of it and
    `held_out` tokens of all. ValueError: different tokenizers, a weight that is none.
    """
    train, val, tokenizers, types = [], [], set(), set()
    for source in sources.split(","):
        folder, _, weight = source.partition("=")
        folder, info = Path(folder), read_manifest(Path(folder))
        tokenizers.add((folder / "tokenizer.model").read_bytes())
        types.add(info["dtype"])
        left = sum(info["files"].values())  # tokens
        left -= min(left // 10, held_out // (sources.count(",") + 1))
        pieces = []
        for name, tokens in info["files"].items():
            pieces.append((folder / name, 0, min(tokens, left)))
            val.append((folder / name, min(tokens, left), tokens))
            left = max(left - tokens, 0)
        passes, rest = divmod(_weight(source, weight), 1)
        train += pieces * int(passes) + [(file, 0, int(end * rest)) for file, _, end in pieces]
    if len(tokenizers) != 1:
        raise ValueError(f"{sources}: made with different tokenizers; tokenise all with one")
    dtype = types.pop()
    return TokenStream(train, dtype), TokenStream(val, dtype), tokenizers.pop()


def _weight(source: str, weight: str) -> float:
    """The number behind "=", 1 without one; ValueError unless it is positive."""
    try:
        number = float(weight or 1)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise ValueError(f"--data {source}: a weight is a number above 0, as in wiki=2.5,web")
    return number


def read_manifest(folder: Path) -> dict:
    """shards.json of a finished folder; FileNotFoundError or ValueError if it is none."""
    if not (folder / "shards.json").is_file():
        raise FileNotFoundError(f"{folder} holds no shards.json: `python scale.py tokenise --data "
                                f"TEXT --tokenizer MODEL --out {folder}` makes one")
    path = folder / "shards.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        files, dtype = info["files"], info["dtype"]
        good = dtype in ("uint16", "uint32") and all(
            Path(name).name == name and type(tokens) is int and tokens >= 0
            for name, tokens in files.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        good, why = False, f"{type(e).__name__}: {e}"
    else:
        why = "files or dtype are not as tokenise writes them"
    if not good:
        raise ValueError(f"{path} is damaged ({why}): delete it and run the same `scale.py "
                         f"tokenise` again")
    if not files:
        raise ValueError(f"{folder} is unfinished: run the same `scale.py tokenise` again, it "
                         f"continues where it stopped")
    for name, tokens in info["files"].items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size != tokens * np.dtype(info["dtype"]).itemsize:
            raise ValueError(f"{folder / name} has {size} bytes, shards.json says {tokens} tokens: "
                             f"delete it and run the same `scale.py tokenise` again")
    return info


@dataclass
class Tokenise:
    """Flags of `tokenise`, text made token shards."""

    data: str = "corpus"  # .txt, .jsonl or a folder of them
    tokenizer: str = "tokenizer.model"  # SentencePiece model
    vocab_size: int = ranged(0, least=0)  # if > 0 and it does not exist: train it; paper: 32000
    out: str = "shards"  # folder of the shards
    shard_megabytes: int = ranged(8, least=1)  # of text per shard; a kill loses that per worker
    workers: int = ranged(0, least=0)  # processes; 0: one per core


def tokenise(cfg: Tokenise) -> None:
    """Encode a corpus in parallel into OUT/00000000.bin, ...; run again, it skips what is there.

    Shards are plain arrays of ids, uint16 (uint32 above 65,536 pieces): BOS text EOS BOS ...
    """
    stage.check(cfg)
    out, workers = Path(cfg.out), cfg.workers or os.cpu_count() or 1
    if cfg.vocab_size and not Path(cfg.tokenizer).exists():
        trained = data.train_tokenizer(data.read_texts(cfg.data), cfg.vocab_size)
        M.atomic_write(cfg.tokenizer, lambda f: f.write(trained))
        print(f"trained {cfg.tokenizer} with Llama's own options")
    model = data.Tokenizer(cfg.tokenizer).model_bytes
    vocab = data.Tokenizer(model).vocab_size
    if cfg.vocab_size not in (0, vocab):
        raise ValueError(f"--vocab-size {cfg.vocab_size}: {cfg.tokenizer} has {vocab} pieces; "
                         f"leave the flag away, or name a file that is not there yet")
    sources = {str(f): _fingerprint(f) for f in data.find_files(cfg.data, ".txt", ".jsonl")}
    manifest = {"tokenizer": zlib.crc32(model), "vocab_size": vocab, "source": sources,
                "megabytes": cfg.shard_megabytes, "dtype": "uint16" if vocab <= 2**16 else "uint32"}
    path, width = out / "shards.json", np.dtype(manifest["dtype"]).itemsize
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            old = None
        if not isinstance(old, dict) or {k: old.get(k) for k in manifest} != manifest:
            raise ValueError(f"{out} holds shards of another text, tokenizer or size: choose "
                             f"another --out, or delete it")
    write_manifest(path, {**manifest, "files": {}})
    M.atomic_write(out / "tokenizer.model", lambda f: f.write(model))
    names, read, began = [], 0, time.time()
    with ProcessPoolExecutor(workers, initializer=_use_tokenizer, initargs=(model,)) as pool:
        waiting = deque()
        try:
            for number, texts in enumerate(_pieces(data.read_texts(cfg.data), cfg.shard_megabytes)):
                names.append(f"{number:08d}.bin")
                read += sum(len(text.encode()) for text in texts)
                if not (out / names[-1]).exists():
                    waiting.append(pool.submit(_write_shard, out / names[-1], texts))
                if len(waiting) >= 2 * workers:  # bounded: the corpus is never in memory as a whole
                    waiting.popleft().result()
                    speed = read / 1e6 / (time.time() - began)
                    print(f"{read / 1e6:,.0f} MB read, {speed:.1f} MB/s")
            for shard in waiting:
                shard.result()
        except BrokenProcessPool:
            raise OSError(f"a worker process was killed; was there too little memory for "
                          f"--workers {workers}? Run the same command again, with fewer perhaps: "
                          f"it continues where it stopped") from None
    files = {name: (out / name).stat().st_size // width for name in names}
    write_manifest(path, {**manifest, "files": files})
    tokens, seconds = sum(files.values()), time.time() - began
    print(f"{out}: {tokens:,} tokens in {len(names)} shards, {read / max(tokens, 1):.2f} bytes per "
          f"token; {read / 1e6:,.1f} MB in {seconds:.1f} s, {read / 1e6 / seconds:.1f} MB/s with "
          f"{workers} workers")


def _fingerprint(path: Path) -> list[int]:
    """[bytes, CRC-32 of them]: an edit that keeps the size, or a new date on old text, is known."""
    crc = 0
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            crc = zlib.crc32(part, crc)
    return [path.stat().st_size, crc]


def write_manifest(path: Path, manifest: dict) -> None:
    """The JSON file that says which shards a folder has, whole or not at all."""
    M.atomic_write(path, lambda f: f.write(json.dumps(manifest, indent=1).encode()))


def _pieces(texts, megabytes: int):
    """Lists of texts of about this many characters each, in order."""
    piece, size = [], 0
    for text in texts:
        piece.append(text)
        size += len(text)
        if size >= megabytes * 1e6:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


_worker = {}  # the tokenizer of a worker process, written once by `_use_tokenizer`


def _use_tokenizer(model: bytes) -> None:
    _worker["tokenizer"] = data.Tokenizer(model)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when the process that feeds it is gone, however it went."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _write_shard(path: Path, texts: list[str]) -> None:
    ids = data.encode_texts(_worker["tokenizer"], texts)
    M.atomic_write(path, lambda f: f.write(ids.tobytes()))


# --------------------------------------------------------------------------------- the commands

COMMANDS = {"tokenise": (tokenise, Tokenise), "consolidate": (consolidate, Consolidate)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"scale.py: give one of {', '.join(COMMANDS)}; `python scale.py tokenise --help` "
              f"lists a command's flags", file=sys.stderr)
        raise SystemExit(2)
    stage.run(*COMMANDS[sys.argv.pop(1)])
