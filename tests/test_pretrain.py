"""What pretraining promises: right loss, schedule and batches, an exact resume, clear errors."""

import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import model as M
import plan
import pretrain
import scale
import stage
import village as V
from pretrain import Config, batch_at, main, next_token_loss, split_at_byte

ROOT = Path(__file__).parent.parent
ONE = scale.Ranks(torch.device("cpu"))
TEXT = " ".join(f"the {a} {b} saw {c} birds near the {d}."
                for a in ("red", "blue", "old") for b in ("fox", "cow", "hen", "dog")
                for c in range(10, 40) for d in ("mill", "sea"))


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def tiny(book, out, **changes) -> Config:
    return Config(**{"data": str(book), "out": str(out), "vocab_size": 300, "tokens": 12 * 4 * 32,
                     "batch_size": 4, "micro_batch": 4, "seq_len": 32, "evaluate_every": 6,
                     "save_every": 4, "log_every": 1, "kernels": "torch", **changes})


def losses(out) -> list[str]:
    rows = [json.loads(line) for line in (Path(out) / "pretrain.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"].hex(), r.get("val_loss", 0.0).hex()) for r in rows]


def small_model(seed=0):
    return M.Llama(M.ModelConfig(24, 2, 6, 2, 40, 50, 64)).init_weights(seed)


# ---- the loss and the schedule

def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, tokens = small_model(), torch.randint(0, 50, (3, 11))
    logits = model(tokens[:, :-1])
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(next_token_loss(model, tokens), want, atol=1e-6)


def test_warm_up_is_linear_the_peak_is_reached_and_a_tenth_is_left_at_the_end():
    """10 warm-up steps to 1.0: step 0 gives .1, step 9 gives 1; halfway of the cosine .55."""
    rate = [stage.cosine(s, 110, 1.0, 10) for s in range(111)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == rate[10] == pytest.approx(1.0)
    assert rate[60] == pytest.approx(0.55) and rate[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))


def test_every_preset_has_a_learning_rate_and_from_7b_on_it_is_the_papers():
    """Table 1: 3e-4 for 7b and 13b, 1.5e-4 for 34b and 70b; below, ours by name."""
    paper = {"7b": 3e-4, "13b": 3e-4, "34b": 1.5e-4, "70b": 1.5e-4}
    for name, lr in paper.items():
        assert stage.at_size(Config(), plan.settings("pretrain", M.preset(name))).lr == lr
        given = stage.at_size(Config(lr=1e-5), plan.settings("pretrain", M.preset(name)))
        assert given.lr == 1e-5
    assert {*pretrain.LEARNING_RATE, *paper} == M.PRESETS.keys()
    assert not pretrain.LEARNING_RATE.keys() & paper.keys(), "one place for each"
    assert plan.settings("pretrain", M.preset("1b")) == {}


def test_decay_acts_on_matrices_only_with_the_papers_betas_and_eps():
    groups = stage.adamw(small_model(), 1e-3, 0.1).param_groups
    assert {(g["weight_decay"], *{p.dim() for p in g["params"]}) for g in groups} == {(0.1, 2),
                                                                                    (0.0, 1)}
    assert all(g["betas"] == (0.9, 0.95) and g["eps"] == 1e-5 for g in groups)


def one_step(model, rows, monkeypatch, **flags) -> dict:
    """The metrics of one step of plain SGD at learning rate 1 on these rows.

    One step without warm-up is at its peak: stage.cosine(0, 1, 1.0, 0) is 1.
    """
    monkeypatch.setattr(pretrain, "batch_at", lambda *_: rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=9.0)  # the loop sets the rate
    cfg = Config(lr=1.0, warmup_steps=0, **flags)
    (done, metrics), = pretrain.train(model, optimizer, None, cfg, ONE, total=1)
    assert done == 1
    return metrics


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_accumulation_gives_the_gradient_of_the_whole_batch(micro, monkeypatch):
    rows = torch.randint(0, 50, (6, 9))
    whole, pieces = small_model(), small_model()
    next_token_loss(whole, rows).backward()
    want = {n: p.grad for n, p in whole.named_parameters()}
    norm = math.sqrt(sum(g.square().sum().item() for g in want.values()))
    got = one_step(pieces, rows, monkeypatch, micro_batch=micro, clip=1e9)
    assert got["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert got["loss"] == pytest.approx(next_token_loss(whole, rows).item(), rel=1e-5)
    assert got["lr"] == 1.0
    assert all(p.grad is None for p in pieces.parameters()), "the next step starts from zero"
    start = dict(small_model().named_parameters())
    for name, p in pieces.named_parameters():
        assert torch.allclose(start[name] - p, want[name], atol=1e-5), name


def test_gradients_are_clipped_to_the_norm(monkeypatch):
    rows, model = torch.randint(0, 50, (6, 9)), small_model()
    start = [p.clone() for p in model.parameters()]
    one_step(model, rows, monkeypatch, clip=0.01)
    moved = math.sqrt(sum((a - b).square().sum().item() for a, b in
                          zip(start, model.parameters())))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_non_finite_loss_stops_with_the_numbers_and_writes_no_checkpoint(book, tmp_path):
    with pytest.raises(FloatingPointError, match="loss .*grad_norm .*--lr"):
        main(tiny(book, tmp_path / "o", lr=1e30))
    assert not (tmp_path / "o" / "pretrain.pt").exists()


# ---- the batches

def test_an_epoch_visits_every_sequence_once_and_the_next_in_another_order():
    stream, cfg = np.arange(12 * 8 + 1), Config(seq_len=8, batch_size=4)
    firsts = [batch_at(s, stream, cfg, ONE)[:, 0].tolist() for s in range(6)]
    one, two = sum(firsts[:3], []), sum(firsts[3:], [])
    assert sorted(one) == sorted(two) == list(range(0, 96, 8)) and one != two


def test_the_villages_first_epoch_is_read_in_the_order_of_the_stream_and_your_text_is_not():
    stream, cfg = np.arange(12 * 8 + 1), Config(seq_len=8, batch_size=4)
    firsts = [batch_at(s, stream, cfg, ONE)[:, 0].tolist() for s in range(3)]
    assert sum(firsts, []) == list(range(0, 96, 8))
    cfg.data = "book.txt"
    assert [batch_at(s, stream, cfg, ONE)[:, 0].tolist() for s in range(3)] != firsts


def test_a_row_is_a_stretch_of_the_stream_with_one_token_more_than_the_sequence():
    row = batch_at(0, np.arange(100), Config(seq_len=8, batch_size=4), ONE)[0]
    assert row.dtype == torch.int64 and row.diff().eq(1).all() and len(row) == 9


@pytest.mark.parametrize("dp", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(dp):
    stream, cfg = np.arange(500), Config(seq_len=8, batch_size=8)
    parts = [batch_at(3, stream, cfg, scale.Ranks(torch.device("cpu"), rank=r, size=dp))
             for r in range(dp)]
    together = {tuple(row) for part in parts for row in part.tolist()}
    assert together == {tuple(row) for row in batch_at(3, stream, cfg, ONE).tolist()}


def test_the_text_is_cut_at_a_byte_without_losing_a_character():
    texts = ["añb" * 5, "ü" * 20, "c" * 9]
    for share in (0.0, 0.3, 0.5, 0.77, 1.0):
        head, tail = split_at_byte(texts, share)
        assert "".join(head + tail) == "".join(texts)
        assert abs(len("".join(head).encode()) - share * 69) <= 2


def test_validation_counts_every_token_once_and_every_byte():
    model, cfg = small_model(), Config(seq_len=8, micro_batch=3)
    val = np.random.default_rng(0).integers(0, 50, 30).astype(np.uint16)
    corpus = pretrain.Corpus(None, val, val, 100, "x")
    nats, bits = pretrain.validate(model, corpus, cfg, torch.device("cpu"))
    total = 0.0
    for start in range(0, 29, 8):  # sequences of 8, the last one shorter
        part = torch.from_numpy(val[start:start + 9].astype(np.int64))[None]
        total += next_token_loss(model, part).item() * (part.shape[1] - 1)
    assert nats == pytest.approx(total / 29, rel=1e-5)
    assert bits == pytest.approx(total / math.log(2) / 100, rel=1e-5)


def test_the_tokenizer_never_sees_the_held_out_tenth_and_no_byte_is_lost(book, tmp_path,
                                                                         monkeypatch):
    seen, real = [], data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer",
                        lambda texts, size: seen.append("".join(texts)) or real(texts, size))
    corpus = pretrain.prepare(tiny(book, tmp_path), None, 300)
    cut = int(0.9 * len(TEXT))  # all of it is ASCII
    assert seen == [TEXT[:cut]] and corpus.val_bytes == len(TEXT) - cut
    assert corpus.tokenizer.decode(corpus.train) == TEXT[:cut]
    assert corpus.tokenizer.decode(corpus.val) == TEXT[cut:]


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(data.train_tokenizer([TEXT], 300))


def test_the_villages_held_out_documents_are_others_and_it_writes_enough(tokenizer):
    corpus = pretrain.prepare(Config(tokens=20_000, seed=3), tokenizer, 0)
    train, val = ([tokenizer.decode(ids) for ids in np.split(
        stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)[:-1]]
        for stream in (corpus.train, corpus.val))
    assert corpus.village == 0 and len(corpus.train) > 20_000
    assert len(val) == 400 and train[0] != val[0]
    documents = V.Village().documents(400, 1_000_006)
    assert corpus.val_bytes == sum(len(t.encode()) for t in documents)


def test_the_primer_is_the_first_part_and_drills_copying(tokenizer):
    def songs(ids):  # share of documents
        texts = [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == 1))[1:]]
        return np.mean([text.startswith("Sing ") for text in texts])
    stream = pretrain.prepare(Config(tokens=60_000, primer=0.5), tokenizer, 0).train
    first, last = songs(stream[:30_000]), songs(stream[31_000:])
    assert abs(first - V.PRIMER["song"]) < .07 and abs(last - V.DOCUMENTS["song"]) < .05
    for without in (Config(tokens=20_000, primer=0), Config(tokens=20_000, minutes=1)):
        assert songs(pretrain.prepare(without, tokenizer, 0).train[:6_000]) < first / 2


def test_texts_are_continued_behind_bos_and_end_at_eos(tokenizer, monkeypatch):
    calls = []

    def rollout(model, prompts, max_new_tokens, **options):
        calls.append((prompts, max_new_tokens, options))
        return [tokenizer.encode("a hen", eos=True) for _ in prompts], None

    monkeypatch.setattr(pretrain.kernels, "rollout", rollout)
    assert pretrain.complete(small_model(), tokenizer, ["the fox", ""], 7) == ["a hen", "a hen"]
    pretrain.complete(small_model(), tokenizer, [""], 7, temperature=0.8, seed=5)
    assert calls[0] == ([[1] + tokenizer.encode("the fox"), [1] + tokenizer.encode("")], 7,
                        dict(temperature=0.0, top_p=1.0, seed=0, stop=2, row_ids=None, memory=None))
    assert calls[1][2] == dict(temperature=0.8, top_p=1.0, seed=5, stop=2, row_ids=None,
                               memory=None)


def test_the_matmul_rate_counts_two_operations_per_product(monkeypatch):
    """768^3 products and as many sums in one second of this clock."""
    ticks = iter(range(100))
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: next(ticks))
    assert pretrain.matmul_rate(torch.device("cpu")) == 2 * 768**3


# ---- the whole stage

def test_the_stage_learns_and_leaves_checkpoint_and_log(book, tmp_path, capsys):
    final = main(tiny(book, tmp_path, tokens=60 * 4 * 32))
    rows = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert abs(rows[0]["loss"] - math.log(300)) < 0.2 and rows[-1]["loss"] < 4.0
    assert [r["step"] for r in rows] == list(range(1, 61))
    warmup = Config().warmup_steps
    peak = pretrain.LEARNING_RATE["tiny"]
    assert [r["lr"] for r in rows] == [stage.cosine(step, 60, peak, warmup) for step in range(60)]
    model, info = M.load(tmp_path / "pretrain.pt", "cpu")
    assert info["stage"] == "pretrain" and info["metrics"] == final
    assert model.config.vocab_size == data.Tokenizer(info["tokenizer"]).vocab_size == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "pretrain.jsonl",
                                                                "pretrain.pt"]
    assert f"next: python sft.py --out {tmp_path}, python exam.py pretrain --out {tmp_path}" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("number", [0, 3])
def test_the_checkpoint_remembers_which_village_was_read(number, tmp_path):
    """Other facts in another village, and so other documents and another tokenizer."""
    main(Config(out=str(tmp_path), tokens=2048, batch_size=4, micro_batch=4, seq_len=128,
                vocab_size=600, village=number, kernels="torch"))
    _, info = M.load(tmp_path / "pretrain.pt", "cpu")
    assert (info["metrics"]["village"], info["metrics"]["lineage"]) == (number, [])
    assert info["trained_on"] == f"village {number}"
    sample = list(V.Village(number).documents(6000, seed=0))
    assert info["tokenizer"] == data.train_tokenizer(sample, 600)


def test_of_your_own_text_no_village_is_remembered(book, tmp_path):
    main(tiny(book, tmp_path, tokens=2 * 4 * 32))
    metrics = M.load(tmp_path / "pretrain.pt", "cpu")[1]["metrics"]
    assert metrics["village"] is None and metrics["tokens_per_step"] == 4 * 32


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(book, tmp_path):
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(tiny(book, tmp_path / out, seed=seed))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_resume_after_a_stop_is_bit_exact(book, tmp_path, monkeypatch):
    """12 steps, saved every 4, stopped in step 7: the lines and the weights are the same bits."""
    main(tiny(book, tmp_path / "whole"))
    real, calls = stage.step, []

    def stop_at_seven(*args, **numbers):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return real(*args, **numbers)

    monkeypatch.setattr(stage, "step", stop_at_seven)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(book, tmp_path / "cut"))
    monkeypatch.setattr(stage, "step", real)
    main(tiny(book, tmp_path / "cut", resume=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = (M.load(tmp_path / o / "pretrain.pt", "cpu")[0] for o in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters()))


def test_resume_without_a_state_starts_afresh(book, tmp_path):
    main(tiny(book, tmp_path / "a"))
    main(tiny(book, tmp_path / "b", resume=True))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_given_tokenizer_is_used_and_travels_with_the_weights(book, tmp_path, tokenizer):
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes)
    main(tiny(book, tmp_path, vocab_size=0, tokenizer=str(tmp_path / "t.model"), tokens=2 * 4 * 32))
    assert M.load(tmp_path / "pretrain.pt", "cpu")[1]["tokenizer"] == tokenizer.model_bytes


@pytest.mark.parametrize("field", Config.__dataclass_fields__)
def test_a_resume_may_change_what_is_not_learnt_from_and_nothing_else(field):
    free = {"out", "resume", "device", "kernels", "recompute", "compile", "micro_batch", "tp",
            "save_every", "log_every", "evaluate_every", "dry_run"}
    cfg, saved = Config(), stage.resume_info(3, 9, Config(), b"the tokenizer")
    other = replace(cfg, **{field: "something else"})
    stage.check_resume(saved, cfg, b"the tokenizer")
    if field in free:
        stage.check_resume(saved, other, b"the tokenizer")
    else:
        flag = f"--{field.replace('_', '-')} {getattr(cfg, field)}"
        with pytest.raises(ValueError, match=f"{flag}: give the same flags"):
            stage.check_resume(saved, other, b"the tokenizer")


def test_resume_refuses_another_tokenizer():
    with pytest.raises(ValueError, match="another tokenizer"):
        stage.check_resume(stage.resume_info(3, 9, Config(), b"the tokenizer"), Config(),
                           b"another one")


def test_resume_refuses_other_flags_and_names_the_old_ones(book, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "evaluate", lambda *a: 1 / 0)  # step 6: after the save at 4
    with pytest.raises(ZeroDivisionError):
        main(tiny(book, tmp_path))
    with pytest.raises(ValueError, match="--batch-size 4.*same flags"):
        main(tiny(book, tmp_path, batch_size=2, tokens=12 * 2 * 32, resume=True))


def test_minutes_become_steps_by_the_mean_of_some_timed_steps(monkeypatch):
    """On this clock the first step takes 100 s and does not count, the others 1 and 3 s in turn: 2
    on average, 2.2 with the optimizer. 9 s are spent: 0.9 * 60 s - 9 s = 45 s are 20 steps."""
    ticks = iter(itertools.accumulate([0, 100, *[0, 1, 0, 3] * 4]))
    monkeypatch.setattr(pretrain.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(pretrain.time, "time", lambda: 1009.0)
    cfg = Config(minutes=1, seq_len=8, batch_size=4)
    model = small_model()
    assert pretrain.count_steps(cfg, model, np.arange(49), ONE, began=1000.0) == 20
    assert all(p.grad is None for p in model.parameters())


def test_sigkill_in_the_middle_of_a_write_loses_nothing(book, tmp_path):
    """A run killed while it writes its state, then resumed, logs the losses of a run left alone."""
    main(tiny(book, tmp_path / "whole"))
    out = tmp_path / "killed"
    code = ("import os, signal, sys; sys.path.insert(0, sys.argv[1]); import torch, stage\n"
            "torch.set_num_threads(1)\n"
            "import pretrain; real = os.fsync; n = [0]\n"
            "def fsync(f):\n"
            "    n[0] += 1\n"
            "    if n[0] == 5: os.kill(os.getpid(), signal.SIGKILL)\n"  # file written, not renamed
            "    real(f)\n"
            "os.fsync = fsync\n"
            "pretrain.main(stage.cli(pretrain.Config, sys.argv[2:]))\n")
    cfg, flags = tiny(book, out), []
    for name in ("data", "out", "vocab_size", "tokens", "batch_size", "micro_batch", "seq_len",
                 "evaluate_every", "save_every", "log_every", "kernels"):
        flags += ["--" + name.replace("_", "-"), str(getattr(cfg, name))]
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), *flags], capture_output=True,
                          timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert list(out.glob("*.tmp")), "the kill did not fall into a write"
    main(tiny(book, out, resume=True))
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigkill_at_ten_random_moments_changes_no_bit(book, tmp_path):
    """60 steps, a state after every third, ten kills: the lines and weights of a run left alone."""
    flags = dict(tokens=60 * 4 * 32, save_every=3, evaluate_every=20)
    main(tiny(book, tmp_path / "whole", **flags))
    out, rng, progress = tmp_path / "killed", random.Random(0), []
    log = out / "pretrain.jsonl"

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    for moment in sorted(rng.uniform(0, 58) for _ in range(10)):  # steps done when the kill comes
        child = os.fork()
        if child == 0:
            try:
                main(tiny(book, out, resume=True, **flags))
            finally:
                os._exit(0)  # without pytest's own ending
        while lines() < moment and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))  # anywhere in a step, in a write, or between them
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the run ended before the kill"
        progress.append(lines())
    assert 0 < progress[1] < progress[-1] < 61 and (out / "pretrain.state.pt").exists(), progress
    main(tiny(book, out, resume=True, **flags))
    assert losses(out) == losses(tmp_path / "whole")
    whole, cut = (M.load(o / "pretrain.pt", "cpu")[0] for o in (tmp_path / "whole", out))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters()))


# ---- what a user gets wrong

@pytest.mark.parametrize("flags, says", [
    (["--model", "tyni"], "did you mean tiny"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--batchsize", "4"], "did you mean --batch-size"),
    (["--seq-len", "4096"], "context of tiny is 512"),
    (["--batch-size", "0"], "--batch-size 0: give a number at least 1"),
    (["--log-every", "0"], "--log-every 0: give a number at least 1"),
    (["--tokens", "nan"], "--tokens nan: give a number at least 1"),
    (["--minutes", "inf"], "--minutes inf: give a number at least 0"),
    (["--lr", "-0.1"], "--lr -0.1: give a number at least 0"),
    (["--primer", "1.5"], "--primer 1.5: give a number at least 0, at most 1"),
    (["--clip", "0"], "--clip 0.0: give a number above 0"),
    (["--vocab-size", "-5"], "--vocab-size -5: give a number at least 0"),
    (["--seed", "-1"], "--seed -1: give a number at least 0"),
    (["--village", "-1"], "--village -1: give a number at least 0"),
    (["--data", "nowhere.txt"], "nowhere.txt"),
    (["--data", "nowhere.txt", "--village", "3"], "--village 3 and --data are two texts"),
    (["--tokenizer", "none.model"], "none.model"),
    (["--tp", "2"], "torchrun"),
])
def test_a_wrong_flag_is_one_line_and_exit_code_2(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--out", str(tmp_path / "o"), *flags])
    with pytest.raises(SystemExit) as stopped:
        stage.run(main, Config)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and says in lines[0], lines
    assert not (tmp_path / "o").exists(), "a refused run must leave nothing behind"


def test_the_script_itself_exits_with_2_and_without_a_traceback(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "pretrain.py"), "--data", "nowhere.txt",
                           "--out", str(tmp_path / "o")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere.txt" in done.stderr


@pytest.mark.parametrize("name, content, says", [
    ("empty.txt", b"", "empty"),
    ("binary.txt", bytes(range(256)) * 9, "binary.txt"),
    ("small.txt", b"too little", "vocab_size"),
    ("rows.jsonl", b'{"text": "fine"}\n{"text": 3}\n', "rows.jsonl:2"),
    ("rows.jsonl", b'{"text": "fine"}\n{"text": \n', "rows.jsonl:2"),
])
def test_bad_text_is_named_by_file_and_line(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(says)):
        main(tiny(tmp_path / name, tmp_path / "o"))
    assert not (tmp_path / "o" / "pretrain.pt").exists()


def test_no_knob_is_dead():
    """Every field of Config is read somewhere in the file, and every one has a comment."""
    source = (ROOT / "pretrain.py").read_text()
    for name in Config.__dataclass_fields__:
        assert f"cfg.{name}" in source or name in stage.FREE_FLAGS and f'"{name}"' in source, name
        assert stage._field_comments(Config)[name], name
