"""scale.py: many processes learn what one learns, save and resume; shards hold the corpus.

Ranks are forked from the test process and meet through a file (no network); each writes what its
function returned into a file, and leaves by os._exit. `make test-scale` runs the marked rest.
"""
import functools, json, os, random, signal, subprocess, sys, time, traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data, kernels, model as M, rollouts, scale, stage

ROOT = Path(__file__).parent.parent
CONFIG = M.ModelConfig(dim=48, n_layers=3, n_heads=8, n_kv_heads=4, hidden_dim=80, vocab_size=320,
                       max_seq_len=64)  # hd 6; every size different
ALONE = scale.Ranks(torch.device("cpu"))

# -------------------------------------------------------------------------------------- harness


def child(rank: int, size: int, folder: Path, fn, args) -> None:
    import torch.distributed as dist
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        dist.init_process_group = functools.partial(
            dist.init_process_group, init_method=f"file://{folder}/meet", rank=rank,
            world_size=size)
        torch.save(fn(*args), folder / f"result-{rank}")
        if dist.is_initialized():
            dist.barrier()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def start(size: int, folder: Path, fn, *args) -> list[int]:
    folder.mkdir(parents=True)
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            child(rank, size, folder, fn, args)
        pids.append(pid)
    return pids


def wait(pids: list[int], seconds: float) -> list[int]:
    """Exit codes; whoever still runs after that many seconds is killed."""
    codes, end = {}, time.time() + seconds
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            if time.time() > end:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def on_ranks(size: int, folder: Path, fn, *args, seconds: float = 600) -> list:
    """What fn(*args) returns on each of `size` ranks; an error on one is raised here."""
    codes = wait(start(size, folder, fn, *args), seconds)
    errors = [p.read_text() for p in sorted(folder.glob("error-*"))]
    assert codes == [0] * size, f"exit codes {codes}\n" + "\n".join(errors)
    return [torch.load(folder / f"result-{r}", weights_only=False) for r in range(size)]


# ------------------------------------------------------------------------------ a training run


def batch(step: int, ranks) -> torch.Tensor:
    """This rank's rows of 8 random sequences: int64 (8 / dp, 33)."""
    rng = torch.Generator().manual_seed(1000 + step)
    return torch.randint(CONFIG.vocab_size, (8, 33), generator=rng)[list(ranks.rows(8))]


def loss_of(model, rows):
    """Next-token loss by the stages' own calls."""
    targets = rows[:, 1:]
    logp = kernels.token_logprobs(kernels.trunk(model, rows[:, :-1]), model.output.weight, targets,
                                  torch.ones_like(targets))
    return -logp.mean()


def build(ranks, recompute=False, lr=2e-3):
    with torch.device("meta"):
        model = M.Llama(CONFIG)
    model = scale.wrap(model, ranks, seed=3, recompute=recompute)
    return model, stage.adamw(model, lr, 0.1)


def learn(model, optimizer, ranks, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(model, batch(step, ranks))
        loss.backward()
        losses.append(ranks.mean(loss.item()))
        losses.append(scale.clip(model, 0.5))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses


def run_training(tp: int, recompute: bool) -> dict:
    ranks = scale.setup("cpu", tp)
    model, optimizer = build(ranks, recompute)
    if ranks.mesh is not None:  # what a state saved before the first step does: it must not count
        scale._distributed_state(model, optimizer)
    out = {"init": scale.full_weights(model), "losses": learn(model, optimizer, ranks, range(3))}
    with scale.unsharded(model):  # three rows: the ranks' shares differ, one has none
        out["text"] = scale.rollout(model, [[1, 2, 3], [4, 5], [6]], 8, seed=1)[0]
    out["losses"] += learn(model, optimizer, ranks, range(3, 6))
    out["losses"] += score(ranks)
    ranks.finish()
    return out


def score(ranks) -> list[float]:
    """A reward model's mean score and the norm of its gradient: the head is one row."""
    with torch.device("meta"):
        model = M.Llama(replace(CONFIG, scalar_head=True))
    model = scale.wrap(model, ranks, seed=4)
    mean = model(batch(0, ranks)).mean()
    mean.backward()
    return [ranks.mean(mean.item()), scale.clip(model, 1.0)]


@pytest.fixture(scope="module")
def single() -> dict:
    return run_training(1, False)


def check_equal(results: list[dict], single: dict) -> None:
    for name, weight in single["init"].items():
        assert torch.equal(results[0]["init"][name], weight), f"{name} starts differently"
    for result in results:
        assert result["losses"] == pytest.approx(single["losses"], abs=1e-5)
        assert result["text"] == single["text"]
    assert all(r["init"] == {} for r in results[1:])


class TestSameAsASingleProcess:
    """Losses and gradient norms of six steps within 1e-5 (float32), the first weights bit-equal."""

    def test_two_data_parallel_ranks(self, tmp_path, single):
        check_equal(on_ranks(2, tmp_path / "r", run_training, 1, True), single)

    def test_two_tensor_parallel_ranks(self, tmp_path, single):
        check_equal(on_ranks(2, tmp_path / "r", run_training, 2, False), single)

    @pytest.mark.scale
    @pytest.mark.parametrize("size, tp", [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_the_full_grid(self, tmp_path, single, size, tp, recompute):
        check_equal(on_ranks(size, tmp_path / "r", run_training, tp, recompute), single)

    @pytest.mark.scale
    @pytest.mark.parametrize("run", range(50))
    def test_no_flaky_exit(self, tmp_path, single, run):
        """Gloo aborted one exit in ten without the barrier of `finish`."""
        script = tmp_path / "two.py"
        script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                          "import scale\nranks = scale.setup('cpu')\n"
                          "assert ranks.sum(1.0) == 2.0\nranks.finish()\n")
        port = 20000 + random.SystemRandom().randrange(20000)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(port),
               "MASTER_ADDR": "127.0.0.1"}
        both = [subprocess.Popen([sys.executable, script], stderr=subprocess.PIPE,
                                 env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
                for r in range(2)]
        errors = [p.communicate(timeout=100)[1] for p in both]
        assert [p.returncode for p in both] == [0, 0], errors


def run_weighted() -> dict:
    """Two ranks with 10 and 30 answer tokens; rank 0 of three rows in another order."""
    ranks = scale.setup("cpu")
    count, mean = ((10, 1.0), (30, 3.0))[ranks.rank]
    parameter = torch.nn.Parameter(torch.zeros(()))
    total = ranks.sum(count)
    return {"total": total, "mean": ranks.mean(mean, weight=count),
            "scaled": float((mean * count) * ranks.dp / total + parameter),
            "rows": list(ranks.rows(6)), "main": ranks.is_main,
            "gathered": ranks.gather([f"{ranks.rank}{i}" for i in range(3 - ranks.rank)])}


def test_a_mean_over_ranks_counts_tokens_not_ranks(tmp_path):
    """(10 * 1 + 30 * 3) / 40 = 2.5, not 2; and the mean of the ranks' scaled losses is the same."""
    a, b = on_ranks(2, tmp_path / "r", run_weighted)
    assert a["total"] == b["total"] == 40 and a["mean"] == b["mean"] == 2.5
    assert (a["scaled"] + b["scaled"]) / 2 == 2.5
    assert sorted(a["rows"] + b["rows"]) == list(range(6)) and a["rows"] == [0, 2, 4]
    assert a["gathered"] == b["gathered"] == ["00", "10", "01", "11", "02"]
    assert a["main"] and not b["main"]


def run_masked() -> float:
    """One step in which only the last of two rows has answer tokens, as a short last batch has."""
    ranks = scale.setup("cpu")
    model, _ = build(ranks)
    rows = batch(0, ranks)[:2 // ranks.dp]
    mask = torch.zeros(2, 32)
    mask[1] = 1
    mask = mask[list(ranks.rows(2))]
    logp = kernels.token_logprobs(kernels.trunk(model, rows[:, :-1]), model.output.weight,
                                  rows[:, 1:], mask)
    (-logp.sum() * ranks.dp / ranks.sum(mask.sum().item())).backward()
    norm = scale.clip(model, 1.0)
    ranks.finish()
    return norm


def test_a_rank_without_answer_tokens_holds_up_nobody(tmp_path):
    """Its gradients are zeros, not None: the ranks' sums must have the same size."""
    expected = run_masked()
    for norm in on_ranks(2, tmp_path / "r", run_masked):
        assert norm == pytest.approx(expected, abs=1e-5)


def test_the_global_batch_is_the_same_for_any_number_of_ranks():
    for dp, tp in ((1, 1), (2, 1), (4, 2), (8, 1)):
        everyone = [scale.Ranks(torch.device("cpu"), r, dp * tp, tp) for r in range(dp * tp)]
        rows = [row for ranks in everyone[::tp] for row in ranks.rows(16)]
        assert sorted(rows) == list(range(16))
    with pytest.raises(ValueError, match="--batch-size 6 rows cannot be split over 4"):
        scale.Ranks(torch.device("cpu"), 0, 4).rows(6)


def test_tp_that_does_not_fit_is_one_clear_error(monkeypatch):
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        scale.setup("cpu", 2)
    ranks = scale.Ranks(torch.device("cpu"), 0, 8, 8, mesh="unused")
    with pytest.raises(ValueError, match="--tp 8 must divide the model's 4 kv heads"):
        scale.parallelize(M.Llama(CONFIG), ranks, None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="--tp 3 must divide the 4 ranks"):
        scale.setup("cpu", 3)


def run_failing() -> None:
    ranks = scale.setup("cpu")
    if ranks.rank == 1:
        raise ValueError("rank 1 read a bad row")
    ranks.sum(1.0)


def test_an_exception_on_one_rank_ends_the_other(tmp_path):
    """On its own, not killed here: a lost rank is noticed, gloo's 30 minutes are not waited for."""
    codes = wait(start(2, tmp_path / "r", run_failing), 600)
    assert 0 not in codes and -signal.SIGKILL not in codes
    assert "rank 1 read a bad row" in (tmp_path / "r" / "error-1").read_text()


@pytest.mark.scale
def test_torchrun_ends_all_ranks_when_one_fails(tmp_path):
    """Rank 1 exits as stage.run exits for a bad row, while rank 0 waits in a collective."""
    script = tmp_path / "fails.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport scale, stage\n"
                      "from dataclasses import dataclass\n"
                      "@dataclass\nclass Config:\n    device: str = 'cpu'\n"
                      "def main(cfg):\n    ranks = scale.setup(cfg.device)\n"
                      "    if ranks.rank == 1:\n        raise ValueError('a bad row')\n"
                      "    ranks.sum(1.0)\n    ranks.finish()\n"
                      "stage.run(main, Config)\n")
    done = torchrun(2, script)
    assert done.returncode != 0 and done.stderr.count("fails.py: a bad row") == 1


def words_of(flags: dict) -> list[str]:
    """A Config's fields as a command line."""
    return [word for name, value in flags.items() for word in (
        [f"--{name.replace('_', '-')}"] if value is True else
        [] if value is False else [f"--{name.replace('_', '-')}", str(value)])]


@pytest.mark.scale
def test_ctrl_c_of_torchrun_leaves_a_state_that_resumes_exactly(kit, tmp_path):
    """SIGINT goes to the launcher and to all ranks, as a terminal sends it."""
    more = dict(epochs=8, save_every=4, resume=True)
    on_ranks(2, tmp_path / "r", run_stage, "sft", flags_of("sft", kit, tmp_path / "whole", **more))
    flags = words_of(flags_of("sft", kit, tmp_path / "broken", **more))
    process = subprocess.Popen(
        [sys.executable, *LAUNCH, "2", "sft.py", *flags], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    state, end = tmp_path / "broken" / "sft.state", time.time() + 900
    while time.time() < end and not [p for p in state.glob("step-*") if p.suffix != ".tmp"]:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and errors.count("--resume continues from the last") == 1, errors
    assert not (tmp_path / "broken" / "sft.pt").exists()
    done = torchrun(2, "sft.py", *flags)
    assert done.returncode == 0, done.stderr
    assert logged(tmp_path / "broken", "sft") == logged(tmp_path / "whole", "sft")


@pytest.mark.scale
@pytest.mark.parametrize("words, message", [
    (["--batchsize", 4], "pretrain.py: unknown argument --batchsize: did you mean --batch-size?"),
    (["--tp", 3], "pretrain.py: --tp 3 must divide the 2 ranks that torchrun started"),
    (["--batch-size", 5], "pretrain.py: --batch-size 5 rows cannot be split over 2")])
def test_a_wrong_flag_is_said_once_under_torchrun(tmp_path, words, message):
    done = torchrun(2, "pretrain.py", "--out", tmp_path, "--tokens", 4096, *words)
    assert done.returncode != 0 and done.stderr.count(message) == 1
    assert done.stderr.count("pretrain.py: ") == 1  # the rest is torchrun's own report


LAUNCH = ["-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint",
          "localhost:0", "--nproc-per-node"]  # torchrun, at any free port


def torchrun(size: int, *words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *LAUNCH, str(size), *map(str, words)], cwd=ROOT,
                          capture_output=True, text=True, timeout=1200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_without_torchrun_nothing_distributed_is_imported():
    """`import torch` brings what it brings; scale adds nothing of FSDP, DTensor, checkpointing."""
    code = ("import sys, torch; before = set(sys.modules); import scale, model as M; "
            "r = scale.setup('cpu'); m = scale.wrap(M.Llama(M.PRESETS['tiny']), r, seed=0); "
            "r.sum(1); scale.clip(m, 1.0); r.finish(); "
            "print([k for k in set(sys.modules) - before if k.startswith('torch.distributed')])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ------------------------------------------------------------------------------- the six stages

SHAPE = M.ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=28, vocab_size=320,
                      max_seq_len=128)
LINES = [f"the {a} {b} saw {c} birds." for a in ("red", "old") for b in ("fox", "cow", "hen")
         for c in range(10, 30)]


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Path:
    """A folder with rows for every stage, and checkpoints of a toy that often says EOS."""
    folder = tmp_path_factory.mktemp("kit")
    tags = ["[INST] the cow [/INST] the hen <<SYS>> <</SYS>>"] * 20
    tokenizer = data.Tokenizer(data.train_tokenizer(LINES + tags, 320))
    for seed, name in enumerate(("pretrain", "sft", "ppo", "reward_helpful", "reward_safety")):
        scalar = name.startswith("reward")
        model = M.Llama(replace(SHAPE, vocab_size=tokenizer.vocab_size, scalar_head=scalar))
        model.init_weights(seed)
        with torch.no_grad():
            model.tok_embeddings.weight[:, 0] = 0.5
            if not scalar:  # answers differ, and end about every tenth token
                rng = torch.Generator().manual_seed(seed)  # a head that is not the embedding
                model.output.weight.normal_(std=0.4, generator=rng)
                model.output.weight[:, 0] = 0
                model.output.weight[tokenizer.eos_id, 0] = 0.6
        M.save(folder / f"{name}.pt", model, name, tokenizer.model_bytes, {"threshold": 0.4})
    (folder / "book.txt").write_text(" ".join(LINES * 4))
    write_rows(folder / "dialogs.jsonl", [{"question": f"what did number {i % 9} see?",
                                           "answer": line} for i, line in enumerate(LINES)])
    sides = [{side: [{"role": "user", "content": f"say {i % 7}"},
                     {"role": "assistant", "content": LINES[(i + k) % len(LINES)]}]
              for side, k in (("chosen", 0), ("rejected", 7))} for i in range(60)]
    for i, row in enumerate(sides):
        row["rating"] = data.RATINGS[i % 4]
        if i % 2:
            row |= {"chosen_safe": True, "rejected_safe": bool(i % 4 == 1)}
    write_rows(folder / "pairs.jsonl", sides[:40])
    for row in sides[40:]:
        for side in ("chosen", "rejected"):
            row[side][0] = {"role": "user", "content": "do"}  # no prompt of the training pairs
    write_rows(folder / "pairs_test.jsonl", sides[40:])
    write_rows(folder / "prompts.jsonl", [{"prompt": f"what did {a} see?", "is_safety": i % 3 == 0}
                                          for i, a in enumerate(LINES[:40])])
    write_rows(folder / "rules.jsonl", [{"instruction": f"Say {i}.", "contains": [" "]}
                                        for i in range(10)])  # nearly every answer obeys
    return folder


def flags_of(name: str, kit: Path, out: Path, **more) -> dict:
    """The Config of a short run of a stage on the kit, in the folder `out`."""
    own = {
        "pretrain": dict(data=str(kit / "book.txt"), vocab_size=320, tokens=5 * 4 * 32,
                         batch_size=4, micro_batch=1, seq_len=32, lr=1e-3, warmup_steps=2,
                         log_every=1),
        "sft": dict(checkpoint=str(kit / "pretrain.pt"), data=str(kit / "dialogs.jsonl"), epochs=1,
                    seq_len=64, batch_size=8, micro_batch=2, lr=1e-3, log_every=1),
        "reward": dict(checkpoint=str(kit / "sft.pt"), batch_size=8, micro_batch=2, lr=1e-3,
                       data=f"{kit / 'pairs.jsonl'},{kit / 'pairs_test.jsonl'}", log_every=1),
        "rejection": dict(checkpoint=str(kit / "sft.pt"), data=str(kit / "prompts.jsonl"),
                          rounds=1, prompts=6, samples=3, comparisons=0, rs_lr=1e-3,
                          max_new_tokens=8),
        "ppo": dict(checkpoint=str(kit / "ppo.pt"), data=str(kit / "prompts.jsonl"), iterations=2,
                    batch_size=8, minibatch=8, lr=1e-3, beta=0.1, max_new_tokens=8),
        "gatt": dict(checkpoint=str(kit / "ppo.pt"), data=str(kit / "dialogs.jsonl"), replay=6,
                     instructions=str(kit / "rules.jsonl"), dialogues=12, lr=1e-3, batch_size=4,
                     micro_batch=1, seq_len=64, max_new_tokens=16, epochs=6)}[name]
    out.mkdir(exist_ok=True)
    if name in ANSWERING:
        for file in ("sft.pt", "reward_helpful.pt", "reward_safety.pt"):
            (out / file).exists() or os.link(kit / file, out / file)
    return {**own, "out": str(out), "kernels": "torch", "device": "cpu", **more}


ANSWERING = ("rejection", "ppo")  # whose answers are scored: one token apart is another answer


def run_stage(name: str, flags: dict, answers: list | None = None) -> list:
    """The stage as a rank runs it; answers: of an earlier run of it, to be used again."""
    module = __import__(name)
    original, said = rollouts.answer, []

    def recorded(*arguments, **options):
        said.append(original(*arguments, **options) if answers is None else answers[len(said)])
        return said[-1]

    if name in ANSWERING:
        rollouts.answer = recorded
    try:
        module.main(module.Config(**flags))
    finally:
        rollouts.answer = original
    return said


def logged(out: Path, name: str) -> list[dict]:
    """The numbers of a run's log that do not depend on the clock."""
    if name == "rejection":
        return [version_in(out / f"{file}.pt") for file in ("rlhf_v1", "rlhf_control")]
    rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if isinstance(v, float) and k not in
             ("tokens_per_s", "of_peak")} for row in rows]


def version_in(path: Path) -> dict:
    """What rejection sampling found, and what its version has learnt: the loss of a fixed row."""
    model, info = M.load(path, "cpu")
    found = {"loss": loss_of(model, torch.arange(100, 140)[None]).item()}
    if "ladder" in info["metrics"]:
        for n, (best, median) in info["metrics"]["ladder"].items():
            found |= {f"best of {n}": best, f"median of {n}": median}
        found |= info["metrics"]["curve"] | {"T": info["metrics"]["temperature"]}
    return found


@pytest.fixture(scope="module")
def alone(kit, tmp_path_factory):
    """alone(name): (log, answers) of a single process, made once."""
    @functools.cache
    def make(name: str):
        out = tmp_path_factory.mktemp(name)
        answers = run_stage(name, flags_of(name, kit, out))
        return logged(out, name), answers
    return make


@pytest.fixture
def small_tiny(monkeypatch):
    monkeypatch.setitem(M.PRESETS, "tiny", replace(SHAPE, vocab_size=320))


def check_stage(name, size, tp, recompute, kit, alone, tmp_path) -> None:
    expected, answers = alone(name)
    flags = flags_of(name, kit, tmp_path / "out", tp=tp, recompute=recompute)
    on_ranks(size, tmp_path / "r", run_stage, name, flags, answers or None)
    found = logged(tmp_path / "out", name)
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected):
        assert a == pytest.approx(b, abs=1e-5)


def test_sft_on_two_ranks_logs_the_numbers_of_one(kit, alone, tmp_path):
    check_stage("sft", 2, 1, False, kit, alone, tmp_path)


@pytest.mark.scale
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "rejection", "ppo", "gatt"])
@pytest.mark.parametrize("size, tp", [(2, 1), (2, 2), (4, 1), (4, 2)])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_stage_logs_the_numbers_of_a_single_process(name, size, tp, recompute, kit, alone,
                                                          small_tiny, tmp_path):
    """Losses, gradient norms, accuracies, KL and rewards within 1e-5; ANSWERING on recorded ones.

    Of rejection sampling, which writes no log: its record, and the loss of V1 and of the control.
    """
    check_stage(name, size, tp, recompute, kit, alone, tmp_path)


@pytest.mark.scale
@pytest.mark.parametrize("tp", [1, 2])
def test_ppo_with_fresh_answers_starts_at_ratio_1_and_kl_0(kit, tmp_path, tp):
    on_ranks(2, tmp_path / "r", run_stage, "ppo", flags_of("ppo", kit, tmp_path / "out", tp=tp))
    first = next(row for row in logged(tmp_path / "out", "ppo") if "ratio" in row)
    assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["clip_frac"] == 0
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["kl_k3"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------- checkpoints


def run_saving(path, tp: int) -> dict:
    ranks = scale.setup("cpu", tp)
    model, optimizer = build(ranks)
    learn(model, optimizer, ranks, range(2))
    torch.manual_seed(ranks.rank)
    extra = {"step": 2, "note": "hello", "kl": torch.tensor([0.5])}
    scale.save_state(path, {"policy": model}, {"policy": optimizer}, extra, ranks)
    out = {"weights": scale.full_weights(model), "random": torch.rand(3),
           "losses": learn(model, optimizer, ranks, range(2, 4))}
    ranks.finish()
    return out


def run_resuming(path, tp: int) -> dict:
    ranks = scale.setup("cpu", tp)
    model, optimizer = build(ranks)
    extra = scale.load_state(path, {"policy": model}, {"policy": optimizer}, ranks)
    out = {"extra": extra, "weights": scale.full_weights(model), "random": torch.rand(3)}
    out["losses"] = learn(model, optimizer, ranks, range(2, 4))
    ranks.finish()
    return out


def check_resumed(saved: list, resumed: list, exact: bool) -> None:
    for name, weight in saved[0]["weights"].items():
        assert torch.equal(resumed[0]["weights"][name], weight), name
    assert resumed[0]["extra"]["note"] == "hello" and resumed[0]["extra"]["kl"].item() == 0.5
    assert resumed[0]["losses"] == pytest.approx(saved[0]["losses"], abs=1e-5)
    if exact:
        for a, b in zip(saved, resumed):
            assert a["losses"] == b["losses"] and torch.equal(a["random"], b["random"])


def test_saved_on_two_ranks_resumes_on_two_exactly_and_on_one(tmp_path):
    path = tmp_path / "sft.state.pt"
    saved = on_ranks(2, tmp_path / "a", run_saving, path, 1)
    check_resumed(saved, on_ranks(2, tmp_path / "b", run_resuming, path, 1), exact=True)
    check_resumed(saved, [run_resuming(path, 1)], exact=False)
    check_consolidated(tmp_path, saved[0]["weights"])
    model, optimizer = build(ALONE)
    scale.save_state(path, model, optimizer, {"step": 1}, ALONE)  # a new run, alone: it counts
    assert scale.load_state(path, model, optimizer, ALONE) == {"step": 1}
    scale.remove_state(path, ALONE)
    assert not (tmp_path / "sft.state").exists() and not path.exists()


def check_consolidated(folder: Path, weights: dict) -> None:
    """One process makes one checkpoint of the ranks' state: the same weights, bit for bit."""
    for size in (300, CONFIG.vocab_size):
        tokenizer = data.train_tokenizer([" ".join(LINES), "[INST] hi [/INST] ho"] * 9, size)
        (folder / f"{size}.model").write_bytes(tokenizer)
    cfg = scale.Consolidate(str(folder / "sft.state"), "policy", str(folder / "320.model"),
                            str(folder / "one.pt"))
    with pytest.raises(ValueError, match="another vocabulary"):
        scale.consolidate(replace(cfg, tokenizer=str(folder / "300.model")))
    with pytest.raises(ValueError, match="--part 'x': .* holds policy"):
        scale.consolidate(replace(cfg, part="x"))
    with pytest.raises(FileNotFoundError, match="no finished state"):
        scale.consolidate(replace(cfg, state=str(folder / "none")))
    before = set(folder.iterdir())
    scale.consolidate(cfg)
    assert set(folder.iterdir()) - before == {folder / "one.pt"}
    model, info = M.load(cfg.out, "cpu")
    assert info["tokenizer"] == tokenizer and info["stage"] == "sft"
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in weights.items())


@pytest.mark.scale
@pytest.mark.parametrize("tp", [1, 2])
def test_saved_on_four_ranks_resumes_on_two_and_on_one(tmp_path, tp):
    path = tmp_path / "sft.state.pt"
    saved = on_ranks(4, tmp_path / "a", run_saving, path, tp)
    check_resumed(saved, on_ranks(4, tmp_path / "b", run_resuming, path, tp), exact=True)
    check_resumed(saved, on_ranks(2, tmp_path / "c", run_resuming, path, 1), exact=False)
    check_resumed(saved, on_ranks(2, tmp_path / "d", run_resuming, path, 2), exact=False)
    check_resumed(saved, [run_resuming(path, 1)], exact=False)


def test_a_single_process_resumes_exactly(tmp_path):
    path = tmp_path / "sft.state.pt"
    saved = run_saving(path, 1)
    check_resumed([saved], [run_resuming(path, 1)], exact=True)
    assert scale.load_state(tmp_path / "other.state.pt", *build(ALONE), ALONE) is None


def test_check_is_asked_before_anything_is_filled(tmp_path):
    path, (model, optimizer) = tmp_path / "x.state.pt", build(ALONE)
    scale.save_state(path, model, optimizer, {"step": 1}, ALONE)
    other = M.Llama(replace(CONFIG, dim=64, hidden_dim=96))

    def check(extra):
        raise ValueError("made with other flags")

    with pytest.raises(ValueError, match="made with other flags"):
        scale.load_state(path, other, stage.adamw(other, 0.1, 0.1), ALONE, check)


def step_folder(root: Path, name: str) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "extra.pt").write_text(name)
    return root / name


def test_a_finished_state_replaces_all_but_its_predecessor(tmp_path):
    """Newer ones belong to an abandoned run: resuming must not find them."""
    for name in ("step-00000010", "step-00000020", "step-00000090"):
        step_folder(tmp_path, name)
    new = step_folder(tmp_path, "step-00000030.tmp")
    scale._swap_in(new, tmp_path / "step-00000030")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000030"]


def run_until_killed(path, log: Path, steps: int) -> None:
    ranks = scale.setup("cpu")
    model, optimizer = build(ranks)
    saved = scale.load_state(path, model, optimizer, ranks)
    for step in range(saved["step"] if saved else 0, steps):
        losses = learn(model, optimizer, ranks, range(step, step + 1))
        if ranks.is_main:
            with open(log, "a") as f:
                f.write(f"{step} {losses[0].hex()} {losses[1].hex()}\n")
        if step % 3 == 2:
            scale.save_state(path, model, optimizer, {"step": step + 1}, ranks)
    ranks.finish()


def lines_by_step(log: Path) -> dict[str, set]:
    found = {}
    for line in log.read_text().splitlines():
        found.setdefault(line.split()[0], set()).add(line)
    return found


@pytest.mark.scale
def test_killed_at_five_moments_and_resumed_every_loss_is_bit_equal(tmp_path):
    on_ranks(2, tmp_path / "whole", run_until_killed, tmp_path / "a.state.pt", tmp_path / "a", 30)
    rng, kills = random.Random(7), 0
    for attempt in range(40):
        pids = start(2, tmp_path / f"try{attempt}", run_until_killed, tmp_path / "b.state.pt",
                     tmp_path / "b", 30)
        if kills == 5:
            assert wait(pids, 600) == [0, 0]
            break
        time.sleep(rng.uniform(0.5, 2.5))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        kills += -9 in wait(pids, 10)
    whole, broken = lines_by_step(tmp_path / "a"), lines_by_step(tmp_path / "b")
    assert kills == 5 and len(whole) == 30
    assert whole == broken  # a redone step has the same line, so each set has one member


def run_half(path) -> tuple:
    ranks = scale.setup("cpu", 2)
    model = scale.wrap(M.load(path, "cpu")[0], ranks)
    optimizer = stage.adamw(model, 1e-2, 0.1)
    weights, losses = scale.full_weights(model), learn(model, optimizer, ranks, range(2))
    ranks.finish()
    return weights, losses


def test_a_half_precision_file_is_trained_in_float32(tmp_path):
    """The start of a fine-tuning stage: each rank maps the file and takes its part of it."""
    M.save(tmp_path / "half.pt", M.Llama(CONFIG).init_weights(1), "pretrain", b"model", {},
           dtype=torch.bfloat16)
    model = scale.wrap(M.load(tmp_path / "half.pt", "cpu")[0], ALONE)
    expected = learn(model, stage.adamw(model, 1e-2, 0.1), ALONE, range(2))
    model = M.load(tmp_path / "half.pt", "cpu")[0]
    for weights, losses in on_ranks(2, tmp_path / "r", run_half, tmp_path / "half.pt"):
        assert losses == pytest.approx(expected, abs=1e-5)
        for name, weight in weights.items():
            assert weight.dtype == torch.float32 and torch.equal(weight.bfloat16(),
                                                                 model.state_dict()[name])


def run_weights_back() -> float:
    ranks = scale.setup("cpu", 2)
    model, optimizer = build(ranks)
    kept = scale.full_weights(model)
    first = learn(model, optimizer, ranks, range(2))
    scale.load_weights(model, kept)
    optimizer = stage.adamw(model, 2e-3, 0.1)  # as in `build`
    again = learn(model, optimizer, ranks, range(2))
    ranks.finish()
    return max(abs(a - b) for a, b in zip(first, again))


def test_weights_taken_out_whole_go_back_in(tmp_path):
    assert on_ranks(2, tmp_path / "r", run_weights_back) == [0.0, 0.0]


# -------------------------------------------------------------------------------- data at scale


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 12345])
def test_the_permutation_visits_every_sequence_once(count):
    order = scale.permuted(np.arange(count), count, seed=5, epoch=1)
    assert np.array_equal(np.sort(order), np.arange(count))
    assert np.array_equal(order, np.concatenate(  # any part alone is the same
        [scale.permuted(np.arange(i, min(i + 100, count)), count, 5, 1)
         for i in range(0, count, 100)]))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [scale.permuted(np.arange(1000), 1000, s, e) for s, e in ((0, 0), (0, 1), (1, 0))]
    for i, order in enumerate(orders):
        assert np.mean(order == np.arange(1000)) < 0.02
        assert all(np.mean(order == other) < 0.02 for other in orders[:i])


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A corpus of two files, its tokenizer, and the finished folder of small shards."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "corpus").mkdir()
    rng = random.Random(0)
    words = ["lamp", "ferry", "quiet", "harbour", "seven", "bakes", "bread", "in", "the", "rain"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(5, 60))) for _ in range(300)]
    for name, part in (("a", texts[:200]), ("b", texts[200:])):
        (folder / "corpus" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in part))
    (folder / "t.model").write_bytes(data.train_tokenizer(texts, 320))
    cfg = scale.Tokenise(str(folder / "corpus"), str(folder / "t.model"),
                         out=str(folder / "out"), workers=1)
    return folder, texts, cfg


@pytest.fixture
def small_pieces(monkeypatch):
    pieces = scale._pieces
    monkeypatch.setattr(scale, "_pieces", lambda texts, megabytes: pieces(texts, 0.01))


def test_tokenising_in_parallel_equals_encoding_in_order(shards, small_pieces):
    folder, texts, cfg = shards
    scale.tokenise(cfg)
    stream, val, tokenizer = scale.read_shards(cfg.out, held_out=0)
    whole = data.encode_texts(data.Tokenizer(folder / "t.model"), texts)
    assert len(stream.pieces) > 3 and len(stream) == len(whole) and len(val) == 0
    for a, b in ((0, len(whole)), (5, 17), (len(whole) // 3, len(whole) // 3 * 2), (9, 9)):
        assert np.array_equal(stream[a:b], whole[a:b])
    assert tokenizer == (folder / "t.model").read_bytes()


def test_tokenising_again_skips_what_is_there_and_restores_what_is_missing(shards, small_pieces):
    folder, _, cfg = shards
    scale.tokenise(cfg)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in Path(cfg.out).glob("*.bin")}
    (Path(cfg.out) / "00000001.bin").unlink()
    with pytest.raises(ValueError, match="00000001.bin has 0 bytes"):
        scale.read_shards(cfg.out)
    scale.tokenise(cfg)
    for path in Path(cfg.out).glob("*.bin"):
        content, written = before[path.name]
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == written) == (path.name != "00000001.bin")


def test_an_unfinished_or_foreign_folder_is_refused(shards, small_pieces, tmp_path):
    folder, _, cfg = shards
    scale.tokenise(cfg)
    with pytest.raises(FileNotFoundError, match="scale.py tokenise"):
        scale.read_shards(str(tmp_path))
    with pytest.raises(ValueError, match="another text, tokenizer or size"):
        scale.tokenise(replace(cfg, shard_megabytes=2))
    manifest = Path(cfg.out) / "shards.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "files": {}}))
    with pytest.raises(ValueError, match="unfinished"):
        scale.read_shards(cfg.out)
    manifest.write_text(text)


def test_a_mixture_repeats_a_source_by_its_weight_and_never_what_is_held_out(shards, small_pieces):
    _, _, cfg = shards
    scale.tokenise(cfg)
    (once, val, _), all_of_it = scale.read_shards(cfg.out), scale.read_shards(cfg.out, 0)[0]
    assert len(val) == len(all_of_it) // 10
    assert np.array_equal(np.concatenate([once[:], val[:]]), all_of_it[:])
    twice = scale.read_shards(f"{cfg.out}=2")[0]
    assert np.array_equal(twice[:], np.concatenate([once[:], once[:]]))
    assert len(scale.read_shards(f"{cfg.out}=2,{cfg.out}")[0]) == 3 * len(once)
    assert len(scale.read_shards(f"{cfg.out}=1.5")[0]) == pytest.approx(1.5 * len(once), rel=0.01)
    for weight in ("x", "0", "-1", "nan"):
        with pytest.raises(ValueError, match="a weight is a number above 0"):
            scale.read_shards(f"{cfg.out}={weight}")


def test_pretraining_reads_shards_in_the_order_of_the_permutation(shards, small_pieces, tmp_path,
                                                                  monkeypatch):
    """Rows of the batches are those stretches of the mixture that `permuted` names."""
    import pretrain
    _, _, cfg = shards
    scale.tokenise(cfg)
    seen, original = [], pretrain.batch_at

    def watched(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(pretrain, "batch_at", watched)
    monkeypatch.setitem(M.PRESETS, "tiny", SHAPE)
    final = pretrain.main(pretrain.Config(
        data=f"{cfg.out}=2", out=str(tmp_path), tokens=3 * 4 * 16, batch_size=4, micro_batch=4,
        seq_len=16, seed=5, kernels="torch", device="cpu"))
    stream = scale.read_shards(f"{cfg.out}=2")[0]
    count = (len(stream) - 1) // 16
    starts = 16 * scale.permuted(np.arange(12), count, 5, 0)
    assert np.array_equal(torch.cat(seen), [stream[a:a + 17] for a in starts])
    assert 0 < final["val_bits_per_byte"] < 20


def test_an_unknown_command_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "scale.py", "tokenize"], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "consolidate" in done.stderr


# ---- tokenising among other processes


def corpus_of(folder: Path, rows: int = 4000) -> scale.Tokenise:
    """Flags of `tokenise` for some text, in shards of one megabyte."""
    texts = [f"The miller of house {n} asks: who walks to the river, and why?" for n in range(rows)]
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "t.model").write_bytes(data.train_tokenizer(texts[:300], 300))
    return scale.Tokenise(data=str(folder / "text.txt"), tokenizer=str(folder / "t.model"),
                          out=str(folder / "shards"), shard_megabytes=1, workers=2)


def workers_of(pid: int) -> list[int]:
    """The child processes of a process."""
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def tokenising(cfg: scale.Tokenise) -> subprocess.Popen:
    """`scale.py tokenise` under way, both workers started."""
    words = [w for k in ("data", "tokenizer", "out", "workers")
             for w in ("--" + k, str(getattr(cfg, k)))]
    process = subprocess.Popen(
        [sys.executable, scale.__file__, "tokenise", "--shard-megabytes", "1", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while len(workers_of(process.pid)) < 2 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    return process


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_killed_worker_is_one_line_and_the_next_run_continues(number, tmp_path):
    cfg = corpus_of(tmp_path, 100_000)
    process = tokenising(cfg)
    os.kill(workers_of(process.pid)[0], number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "a worker process was killed" in error and "continues where it stopped" in error
    scale.tokenise(cfg)
    assert sum(scale.read_manifest(tmp_path / "shards")["files"].values()) > 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_workers_end_with_the_process_that_feeds_them(number, tmp_path):
    process = tokenising(corpus_of(tmp_path, 100_000))
    workers = workers_of(process.pid)
    process.send_signal(number)
    process.communicate(timeout=120)  # until nobody holds its output: the workers, too
    deadline = time.time() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("edit", ["same size", "same size and date", "swapped"])
def test_an_edit_that_keeps_the_size_is_noticed(edit, tmp_path):
    cfg = corpus_of(tmp_path)
    scale.tokenise(cfg)
    text = tmp_path / "text.txt"
    before, content = text.stat(), text.read_text()
    lines = content.splitlines()
    changed = "\n".join([lines[1], lines[0], *lines[2:]])
    text.write_text(changed if edit == "swapped" else content.replace("miller", "farmer"))
    assert text.stat().st_size == before.st_size
    if edit == "same size and date":
        os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="shards of another text"):
        scale.tokenise(cfg)
    text.write_text(content)  # the same text with a new date is the same text
    scale.tokenise(cfg)


@pytest.mark.parametrize("content", [
    "{", "[]", "null", '{"files": {"a.bin": 1}}', "[" * 100_000, '{"files": 3, "dtype": "uint16"}',
    '{"files": {"../a": 1}, "dtype": "uint16"}', '{"files": {"a": "1"}, "dtype": "uint16"}',
    '{"files": {"a": 1}, "dtype": "object"}', '{"files": {"a": 1}, "dtype": ["uint16"]}'])
def test_a_damaged_manifest_is_one_line(content, tmp_path):
    (tmp_path / "shards.json").write_text(content)
    with pytest.raises(ValueError, match="shards.json is damaged"):
        scale.read_manifest(tmp_path)
