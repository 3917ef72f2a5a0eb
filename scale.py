"""From laptop to 70B: the same scripts on many processes, and a plan before a cent is spent.

Every stage calls these functions. In a plain `python STAGE.py` they are no-ops and nothing
distributed is imported. Under `torchrun --nproc-per-node N STAGE.py --tp M` the N ranks stand in a
grid of N/M rows (dp) and M columns (tp):

    tp ranks split every matrix: each holds some of the heads and some of the FFN's units
    dp ranks split the batch, and store 1/dp of what is left of every parameter, of its gradient
       and of its optimizer state; a layer's weights are gathered just before they are used (FSDP2)

             tp 0     tp 1
    dp 0   rank 0   rank 1     the same rows of the batch, different heads
    dp 1   rank 2   rank 3     other rows

Then the planner: memory in closed form, FLOPs, GPU hours beside the paper's Table 2, and the real
sharded step of a 70B simulated on one core. Then data at scale: tokens in memory-mapped shards.

    python scale.py table                                            the paper's four sizes
    python scale.py plan --model 70b --ranks 2048 --tp 8 --recompute      memory, hours, advice
    python scale.py simulate --model 70b --ranks 2048 --tp 8 --recompute  about a minute
    python scale.py tokenise --data corpus/ --tokenizer llama.model --out shards/
    python scale.py consolidate --state out/pretrain.state --tokenizer llama.model --out now.pt

Keys: [L2] Llama 2, arXiv 2307.09288.  [FSDP] 2304.11277.  [TP] Megatron-LM, 1909.08053.
      [PaLM] 2204.02311 §B: how FLOPs are counted.  [ZeRO] 1910.02054: bytes per parameter.

Differs from the paper: its training code is unpublished; this is PyTorch's own engine. Losses are
those of a single process up to the order of summation (float32: 1e-6), not bit for bit.
"""

from __future__ import annotations

import atexit, contextlib, functools, json, logging, math, multiprocessing, os, random, shutil, sys
import tempfile, threading, time, warnings, zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

import data, kernels, model as M

# ------------------------------------------------------------------------------- the processes


@dataclass
class World:
    """Where this process stands among all; a single process is rank 0 of 1, with mesh None."""

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


def setup(device: str = "auto", tp: int = 1) -> World:
    """Join the ranks that torchrun started, or, without it, be a world of one.

    From here on only rank 0 prints. A rank that ends before `finish` takes the others with it:
    torchrun sees it die and ends them. ValueError if tp does not divide the number of ranks.
    """
    if "WORLD_SIZE" not in os.environ:
        if tp != 1:
            raise ValueError(f"--tp {tp} splits the model over processes: start it as "
                             f"`torchrun --nproc-per-node {tp} {sys.argv[0]} --tp {tp} ...`")
        return World(M.pick_device(device))
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
    return World(place, rank, size, tp, mesh)


def world_of(model) -> World:
    """The ranks among which `wrap` put a model; a model that never went through it is alone."""
    return getattr(model, "world", None) or World(model.tok_embeddings.weight.device)


def _abandon() -> None:
    """At exit without `finish`, something failed: leave at once, not through gloo's destructors."""
    import torch.distributed as dist

    if dist.is_initialized():
        sys.stderr.flush()
        os._exit(1)


def finish(world: World) -> None:
    """The last line of a stage: wait for all ranks, then close.

    Without the barrier gloo aborts in about one exit of ten: its worker thread still holds the
    last all-reduce while the interpreter goes down (pytorch issue 190489).
    """
    if world.mesh is None:
        return
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def barrier(world: World) -> None:
    """Nobody goes on before all are here: what one rank wrote, the others may now read."""
    all_sum(0, world)


# ----------------------------------------------------------------------------- the same batch


def rank_rows(batch_size: int, world: World) -> range:
    """Which rows of the global batch this rank takes: rows dp_rank, dp_rank + dp, ...

    Over all ranks they are range(batch_size), whatever their number; tp ranks take the same rows.
    ValueError if the batch cannot be split evenly.
    """
    if batch_size % world.dp:
        raise ValueError(f"--batch-size {batch_size} rows cannot be split over {world.dp} "
                         f"data-parallel ranks: give a multiple of {world.dp}")
    return range(world.dp_rank, batch_size, world.dp)


def all_sum(value: float, world: World) -> float:
    """Sum of a number over the dp ranks; tp ranks hold the same number, which counts once."""
    if world.mesh is None:
        return float(value)
    import torch.distributed as dist

    total = torch.tensor(value / world.tp, dtype=torch.float64)  # on the CPU, so through gloo
    dist.all_reduce(total)
    return total.item()


def all_max(tensor: Tensor, world: World) -> Tensor:
    """The largest of all ranks, element by element; on the CPU."""
    if world.mesh is not None:
        import torch.distributed as dist

        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def all_mean(value: float, world: World, weight: float = 1.0) -> float:
    """Mean of a number over the dp ranks; weight: how much stands behind it here, e.g. tokens."""
    return all_sum(value * weight, world) / all_sum(weight, world)


def clip(params, max_norm: float, world: World) -> float:
    """Scale gradients to norm max_norm at most, over all ranks; returns the norm before.

    params: a module, or an iterable of parameters.
    """
    if isinstance(params, nn.Module):
        _shard_again(params, world)
        params = params.parameters()
    params = [p for p in params if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in params])
    total = float(norm if world.mesh is None else norm.full_tensor())  # a collective: on all ranks
    if not total <= max_norm:  # multiplying by 1 takes as long as by anything else; true of nan
        nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return total


def gather(values: list, world: World) -> list:
    """The lists of all dp ranks as one: their first rows, their second ones, ... as `rank_rows`."""
    if world.mesh is None:
        return values
    import torch.distributed as dist

    lists = [None] * world.size
    dist.all_gather_object(lists, values)
    lists = lists[::world.tp]  # tp ranks hold the same rows
    return [rows[i] for i in range(max(map(len, lists))) for rows in lists if i < len(rows)]


# ----------------------------------------------------------------------------- the same network


def wrap(model: M.Llama, world: World, seed: int | None = None, recompute: bool = False,
         compile: bool = False) -> M.Llama:
    """Put a model on this process's device: whole, or its share of it.

    seed: draw all weights (a model built under `torch.device("meta")` costs nothing until then);
    None keeps those it has, which must be the same on all ranks, e.g. a file they all map. Half
    precision becomes float32, each rank converting its share alone. compile: through PyTorch's
    compiler. The optimizer is built after this, never before: it would hold the unsharded
    parameters.
    """
    model.world = world  # for `world_of`
    for layer in model.layers:
        layer.recompute = recompute
    if compile:
        kernels.compile_model(model)
    is_meta = model.tok_embeddings.weight.is_meta
    if is_meta and seed is None:
        raise ValueError("a model on the meta device has no weights: give wrap a seed")
    if world.mesh is not None:  # bf16 compute over float32 weights on a GPU
        parallelize(model, world, torch.bfloat16 if world.device.type == "cuda" else None)
    if is_meta:
        model.to_empty(device=world.device)
    elif world.mesh is None:
        model.to(world.device)
    if seed is not None and world.mesh is None:
        model.init_weights(seed)
    elif seed is not None:
        _init_shards(model, seed, world)
    return model.to(M.at_least_float32(model.norm.weight.dtype))


def parallelize(model: M.Llama, world: World, dtype: torch.dtype | None) -> None:
    """Split a model over world.mesh: tensor parallel first, then FSDP2, each layer one unit.

    dtype: of the compute (weights are gathered in it); gradients are summed in float32. Embeddings,
    last norm and head are the root unit, which stays gathered between forward and backward: the
    stages use `model.output.weight` after `model.hidden`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method
    from torch.distributed.tensor.parallel import parallelize_module

    if world.tp > 1:
        c = model.config
        if c.n_kv_heads % world.tp or c.hidden_dim % world.tp or c.dim % world.tp:
            raise ValueError(f"--tp {world.tp} must divide the model's {c.n_kv_heads} kv heads, "
                             f"FFN width {c.hidden_dim} and width {c.dim}")
        # src_data_rank None: each rank cuts its part from its own copy, without communication
        parallelize_module(model, world.mesh["tp"], tensor_plan(c.scalar_head), src_data_rank=None)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None,
        cast_forward_inputs=False)  # True would round the RoPE table, and copy a KV cache unseen
    for part in (*model.layers, model):
        fully_shard(part, mesh=world.mesh["dp"], mp_policy=policy)
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


def _init_shards(model, seed: int, world: World) -> None:
    """init_weights on a split model: the numbers of a single process, one parameter at a time.

    Left alone, every rank would draw the same numbers for its own part. So each draws the whole
    tensor, in the order and from the generators of `init_weights`, and keeps its part.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=False)

    def named_parameters():
        for name, p in model.named_parameters():
            full = torch.empty(p.shape, dtype=p.dtype, device=world.device)
            yield name, full  # init_weights fills it, then asks for the next
            set_model_state_dict(model, {name: full}, options=options)

    M.Llama.init_weights(SimpleNamespace(config=model.config, named_parameters=named_parameters),
                         seed)


def _units(model) -> list:
    """The FSDP units of a module, root first; none in a single process."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


def _shard_again(model, world: World) -> None:
    """Free gathered weights, so that the next use gathers what the optimizer wrote."""
    if world.mesh is not None:
        for unit in _units(model):
            unit.reshard()


@contextlib.contextmanager
def unsharded(model, world: World):
    """Inside, the weights are gathered once: for rollouts and evaluation [L2 §3.2.3].

    Every rollout stands inside. Outside it would gather every layer for every token, and in
    inference mode, where what is gathered can never be trained on. With tp 1 no rank waits for
    another, so they may generate different lengths. Costs the whole model / tp per rank.
    """
    if world.mesh is None or getattr(model, "is_gathered", False):
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
    world = world_of(model)
    options = dict(temperature=temperature, top_p=top_p, seed=seed, stop=stop)
    if world.mesh is None:
        return kernels.rollout(model, prompts, max_new_tokens, row_ids=row_ids, memory=memory,
                               **options)
    ids = list(range(len(prompts)) if row_ids is None else row_ids)
    mine, found = range(world.dp_rank, len(prompts), world.dp), ([], [])
    with unsharded(model, world):
        if mine:  # more ranks than prompts: some have none
            found = kernels.rollout(model, [prompts[i] for i in mine], max_new_tokens,
                                    row_ids=[ids[i] for i in mine], **options)
    tokens, logprobs = zip(*gather(list(zip(*found)), world))
    return list(tokens), list(logprobs)


# --------------------------------------------------------------------------------- checkpoints


def full_weights(model, world: World, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of all weights, whole, on rank 0's CPU; {} on the others, which must call it too."""
    _shard_again(model, world)
    weights = {}
    for name, p in model.state_dict().items():  # one tensor at a time is whole on the devices
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        if world.is_main:
            weights[name] = whole.detach().to("cpu", dtype or p.dtype, copy=True)
    return weights


def load_weights(model, weights: dict[str, Tensor], world: World) -> None:
    """The way back from `full_weights`: rank 0's whole tensors into any number of ranks."""
    if world.mesh is None:
        model.load_state_dict(weights)
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    _shard_again(model, world)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights if world.is_main else {}, options=options)


def save_state(path, model, optimizer, extra: dict, world: World) -> None:
    """Write what a running stage needs to go on: weights, optimizer, random state, `extra`.

    path: out/STAGE.state.pt, written by a single process. Many ranks write their parts side by
    side into out/STAGE.state/step-00000012/. model, optimizer: one of each, or dicts of them.
    extra: plain values and whole tensors, with the key "step"; rank 0's counts. Atomic: a kill
    leaves the previous state.
    """
    folder = Path(path).with_suffix("")
    if world.mesh is None:
        parts = {k: v.state_dict() for k, v in _parts(model, optimizer).items()}
        M.save_state(path, {"parts": parts, "random": _random_state(world), "extra": extra})
        shutil.rmtree(folder, ignore_errors=True)  # what many ranks wrote before
        return
    import torch.distributed.checkpoint as dcp

    final = folder / f"step-{extra['step']:08d}"
    temporary = final.with_suffix(".tmp")
    if world.is_main:
        for old in folder.glob("*.tmp"):  # litter of a kill; a .tmp is never read
            shutil.rmtree(old)
        temporary.mkdir(parents=True)
    barrier(world)
    dcp.save(_distributed_state(model, optimizer, world), checkpoint_id=temporary)
    M.save_state(temporary / f"random-{world.rank}-of-{world.size}.pt", _random_state(world))
    barrier(world)  # every part is on the disk
    if world.is_main:
        M.save_state(temporary / "extra.pt", extra)
        shapes = {name: asdict(part.config) for name, part in _parts(model, {}).items()}
        M.save_state(temporary / "shapes.pt", shapes)  # for `consolidate`
        _swap_in(temporary, final)
        Path(path).unlink(missing_ok=True)  # what a single process wrote before
    barrier(world)


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


def load_state(path, model, optimizer, world: World, check=None) -> dict | None:
    """Continue from the newest complete state of `path`: fills model and optimizer, returns extra.

    None when there is none. check(extra), if given, is called before anything is filled, and may
    raise. Many ranks' state loads on any number of ranks, one included; there the random state is
    left as it is, and losses agree to rounding instead of bit for bit.
    """
    folder = Path(path).with_suffix("")
    states = sorted(p for p in folder.glob("step-*") if p.suffix != ".tmp")
    single = M.load_state(path)
    if single and not single.keys() >= {"parts", "random", "extra"}:
        raise ValueError(f"{path} is not a resume state of a stage: delete it to start afresh")
    if single and (not states or single["extra"]["step"] > int(states[-1].name[5:])):
        if world.mesh is not None:
            raise ValueError(f"{path} is the state of a single process: continue it without "
                             f"torchrun, or leave --resume away to start afresh")
        try:
            if check:
                check(single["extra"])
            for name, part in _parts(model, optimizer).items():
                part.load_state_dict(single["parts"][name])
            _set_random_state(single["random"], world)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, AttributeError, OverflowError, RuntimeError) as e:
            raise ValueError(f"{path} does not fit this run, or is damaged ({type(e).__name__}): "
                             f"delete it to start afresh") from e
        return single["extra"]
    if not states:
        return None
    extra = M.load_state(states[-1] / "extra.pt")
    if check:
        check(extra)
    _load_distributed(states[-1], model, optimizer, world)
    random_state = M.load_state(states[-1] / f"random-{world.rank}-of-{world.size}.pt")
    if random_state:
        _set_random_state(random_state, world)
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
    shapes, name = M.load_state(states[-1] / "shapes.pt"), f"model.{cfg.part}"
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


def remove_state(path, world: World) -> None:
    """The stage is finished, its checkpoint written: its resume states are no longer needed."""
    if world.is_main:
        Path(path).unlink(missing_ok=True)
        shutil.rmtree(Path(path).with_suffix(""), ignore_errors=True)


def _parts(model, optimizer) -> dict:
    """{"model.NAME": module, "optimizer.NAME": optimizer} from one of each or dicts of them."""
    def named(kind, x):
        return {f"{kind}.{k}": v for k, v in (x if isinstance(x, dict) else {"": x}).items()}

    return named("model", model) | named("optimizer", optimizer)


def _distributed_state(model, optimizer, world: World) -> dict:
    """State dicts keyed by parameter names, which mean the same on any number of ranks.

    Optimizers are matched with the model of the same key.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    parts, state = _parts(model, optimizer), {}
    for name, part in parts.items():
        kind, key = name.split(".", 1)
        if kind == "model":
            _shard_again(part, world)
            state[name] = get_model_state_dict(part)
        else:
            owner, is_fresh = parts[f"model.{key}"], not part.state
            state[name] = get_optimizer_state_dict(owner, part)
            if is_fresh:  # torch made up its moments by a step with gradient 0: uncount that step
                for moments in part.state.values():
                    moments["step"].zero_()
                state[name] = get_optimizer_state_dict(owner, part)
    return state


def _load_distributed(folder: Path, model, optimizer, world: World) -> None:
    """Fill models and optimizers, each rank reading its own part."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_model_state_dict
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    state, parts = _distributed_state(model, optimizer, world), _parts(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: as meant
        dcp.load(state, checkpoint_id=folder, no_dist=world.mesh is None)
    for name, part in parts.items():
        kind, key = name.split(".", 1)
        if kind == "model":
            set_model_state_dict(part, state[name])
        else:
            set_optimizer_state_dict(parts[f"model.{key}"], part, state[name])


def _random_state(world: World) -> dict:
    """The generators behind torch, numpy and random, as values that weights_only accepts."""
    name, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    return {"torch": torch.get_rng_state(), "cuda": cuda, "python": random.getstate(),
            "numpy": [name, keys.tolist(), *rest]}


def _set_random_state(state: dict, world: World) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], world.device)
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))


# --------------------------------------------------------------------------------- the planner

GiB = 2**30
A100 = 312e12  # FLOP/s, bf16; 80 GiB of memory each [L2 Table 2]
PAPER_HOURS = {"7b": 184_320, "13b": 368_640, "34b": 1_038_336, "70b": 1_720_320}  # [L2 Table 2]
PAPER_TOKENS = 2e12  # [L2 Table 1]


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
            pairs: bool = False, rollouts: int = 0) -> str:
    """--dry-run: print what a stage would need on this machine, under this torchrun.

    Allocates nothing. tokens: of the whole training, for the hours; 0: of one step. pairs: a row
    is two sequences, chosen and rejected. rollouts: answers of an iteration of PPO, where policy
    and critic are trained, and reference, SFT and two reward models are only read.
    """
    ranks, place = int(os.environ.get("WORLD_SIZE", 1)), M.pick_device(device)
    if tp < 1 or ranks % tp:
        raise ValueError(f"--tp {tp} must divide the {ranks} ranks: start --dry-run under torchrun "
                         f"too, or ask `python scale.py plan --ranks N --tp {tp}`")
    run = Run(config, batch_size, seq_len, micro_batch, ranks, tp, recompute, place.type == "cuda",
              *(2, 4, rollouts) if rollouts else (), per_row=1 + pairs)
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
        world = World(torch.device("cpu"), 0, run.ranks, run.tp, mesh)
        with torch.device("meta"):
            model = TrainingStep(run.config)
        for layer in model.layers:
            layer.recompute = run.recompute
        parallelize(model, world, torch.bfloat16 if run.half else None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = M.adamw(model, 1e-4, 0.1)
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
    vocab_size: int = 0  # if > 0 and it does not exist: train it on the data; paper: 32000 (§2.2)
    out: str = "shards"  # folder of the shards
    shard_megabytes: int = 8  # of text per shard; a kill loses at most this much per worker
    workers: int = 0  # processes; 0: one per core


def tokenise(cfg: Tokenise) -> None:
    """Encode a corpus in parallel into OUT/00000000.bin, ...; run again, it skips what is there.

    Shards are plain arrays of ids, uint16 (uint32 above 65,536 pieces): BOS text EOS BOS ...
    """
    out, workers = Path(cfg.out), cfg.workers or os.cpu_count() or 1
    if cfg.shard_megabytes < 1 or workers < 1:
        raise ValueError(f"--shard-megabytes {cfg.shard_megabytes} --workers {cfg.workers}: at "
                         f"least 1 (--workers 0: one per core)")
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


@dataclass
class Plan:
    """Flags of `plan` and `simulate`, one training run."""

    model: str = "70b"  # preset: tiny 15m 110m 1b 7b 13b 34b 70b
    layers: int = 0  # 0: the preset's; 4 are enough to compare simulation and closed form
    ranks: int = 2048  # GPUs; paper: 2000 (§2.2.1)
    tp: int = 1  # of which so many split each matrix
    batch_size: int = 1024  # rows of a step, over all ranks; paper: 4M tokens (Table 1)
    micro_batch: int = 1  # rows per rank and forward pass
    seq_len: int = 0  # tokens; 0: the preset's context
    recompute: bool = False  # recompute activations in the backward pass
    gpu_memory: float = 80  # GiB; paper: A100-80GB (§2.2.1)
    tokens: float = PAPER_TOKENS  # of the whole training; paper: 2e12 (Table 1)
    utilisation: float = 0.45  # of the chip's peak; paper: .38 to .46, see `table`

    def run(self) -> Run:
        c = M.preset(self.model)
        c = replace(c, n_layers=self.layers or c.n_layers)
        least = {"ranks": 1, "tp": 1, "batch_size": 1, "micro_batch": 1, "gpu_memory": 1e-9,
                 "tokens": 1, "utilisation": 1e-9, "layers": 0, "seq_len": 0}
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least "
                                 f"{low}")
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

    ranks: int = 2048  # GPUs for the column of days; paper: 2000 (§2.2.1)


def table(cfg: Table) -> None:
    """The paper's four sizes: hours of Table 2, and what they imply."""
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


COMMANDS = {"table": (table, Table), "plan": (plan, Plan), "simulate": (run_simulation, Plan),
            "tokenise": (tokenise, Tokenise), "consolidate": (consolidate, Consolidate)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"scale.py: give one of {', '.join(COMMANDS)}; `python scale.py plan --help` lists "
              f"a command's flags", file=sys.stderr)
        raise SystemExit(2)
    M.run(*COMMANDS[sys.argv.pop(1)])
