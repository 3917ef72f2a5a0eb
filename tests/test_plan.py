"""plan.py: FLOPs, memory and hours of a run before it starts, and the paper's numbers at its sizes.

The closed form is held against the simulated step, and that against a real run on real ranks.
"""
import subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import model as M, plan, scale, stage
from test_scale import on_ranks

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["tiny", "7b", "13b", "34b", "70b"])
def test_flops_per_token_equal_torch_own_count_exactly(name):
    """On the meta device, at full width, with one and two layers: so for any number of them."""
    from torch.utils.flop_counter import FlopCounterMode
    for layers in (1, 2):
        c = replace(M.PRESETS[name], n_layers=layers)
        with torch.device("meta"):
            model, tokens = M.Llama(c), torch.empty(1, c.max_seq_len, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            model(tokens).sum().backward()
        assert counter.get_total_flops() == c.max_seq_len * plan.flops_per_token(c, c.max_seq_len)


def test_flops_of_the_70b_by_hand():
    """6 (68,976,648,192 - 262,144,000 - 161 * 8192) + 12 * 80 * 8192 * 4096 per token."""
    by_hand = 6 * (68_976_648_192 - 262_144_000 - 1_318_912) + 12 * 80 * 8192 * 4096
    assert plan.flops_per_token(M.PRESETS["70b"], 4096) == by_hand


def run_of(name, n_ranks, tp, rows, recompute, layers=0) -> plan.Run:
    c = M.PRESETS[name]
    c = replace(c, n_layers=layers or c.n_layers)
    return plan.Run(c, rows * n_ranks // tp, c.max_seq_len, rows, n_ranks, tp, recompute)


GRID = [("7b", 8, 1, 1, False), ("7b", 8, 1, 1, True), ("7b", 8, 1, 4, True),
        ("7b", 2048, 1, 1, True), ("7b", 8, 2, 4, True), ("13b", 16, 2, 2, False),
        ("13b", 16, 1, 1, True), ("34b", 64, 1, 1, True), ("34b", 64, 8, 1, False),
        ("34b", 64, 8, 4, True), ("70b", 64, 1, 1, False), ("70b", 64, 1, 1, True),
        ("70b", 512, 8, 1, True), ("70b", 2048, 8, 4, True), ("70b", 2048, 8, 4, False),
        ("1b", 4, 2, 2, True), ("1b", 4, 1, 2, False), ("110m", 8, 1, 4, True)]


@pytest.mark.parametrize("case", [GRID[1], pytest.param(GRID[13], marks=pytest.mark.scale)],
                         ids=str)
def test_closed_form_agrees_with_a_simulated_step_of_four_layers(case):
    """The real sharded step on 8 and on 2048 fake ranks; within 6% (measured: 0.3%)."""
    run = run_of(*case, layers=4)
    assert run.peak() == pytest.approx(plan.simulate(run)["Total"], rel=0.06)


@pytest.mark.scale
@pytest.mark.parametrize("case", GRID, ids=str)
def test_closed_form_agrees_with_the_simulation_at_full_depth(case):
    run = run_of(*case)
    simulated = plan.simulate(run)["Total"]
    print(f"{case}: simulated {simulated / plan.GiB:.2f} GiB, "
          f"closed form {run.peak() / simulated - 1:+.1%}")
    assert run.peak() == pytest.approx(simulated, rel=0.06)


SMALL = replace(M.PRESETS["tiny"], dim=256, n_heads=8, n_kv_heads=4, hidden_dim=704,
                max_seq_len=256)


def run_tracked(run: plan.Run) -> dict:
    """The simulation's step on real ranks, with real numbers, under the same tracker."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    ranks = scale.setup("cpu", run.tp)
    with torch.device("meta"):
        model = plan.TrainingStep(run.config)
    model = scale.wrap(model, ranks, seed=0, recompute=run.recompute)
    optimizer = stage.adamw(model, 1e-4, 0.1)
    tokens = torch.zeros(run.rows, run.seq_len + 1, dtype=torch.int64)
    model.step(tokens, optimizer)
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((tokens,))
    with tracker:
        model.step(tokens, optimizer)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    ranks.finish()
    return {str(getattr(kind, "value", kind)): float(size) for kind, size in peak.items()}


@pytest.mark.scale
@pytest.mark.parametrize("size, tp, recompute", [(2, 1, False), (2, 1, True), (4, 2, True)])
def test_the_simulation_equals_a_real_run(tmp_path, size, tp, recompute):
    run = plan.Run(SMALL, 8 * size // tp, 256, 8, size, tp, recompute, half=False)
    real = on_ranks(size, tmp_path / "r", run_tracked, run)[0]
    assert real == plan.simulate(run)


def test_the_plan_of_what_fits_fits():
    run = plan.Run(M.PRESETS["70b"], 1024, 4096, ranks=64)
    better = plan.advise(run, 80 * plan.GiB)
    assert better.peak() <= 80 * plan.GiB < run.peak()
    assert better.batch_size % (better.ranks // better.tp) == 0
    text = plan.describe(run, 2e12, 80 * plan.GiB, "a GPU")
    assert "it does not fit; this would" in text and "1,720,320" in text
    assert "it fits" in plan.describe(better, 2e12, 80 * plan.GiB, "a GPU")


def test_ppo_holds_six_models_and_its_cache():
    """Two trained: 16 bytes per weight each; four frozen: 4 each. One rank keeps all."""
    N = M.count_parameters(M.PRESETS["7b"])
    run = plan.Run(M.PRESETS["7b"], 8, 4096, trained=2, frozen=4, rollouts=500)
    parts = run.memory()
    assert parts["weights"] + parts["optimizer"] == 2 * 12 * N
    assert parts["frozen models"] == 4 * 4 * N
    assert parts["KV cache"] == 500 * 4096 * 2 * 32 * 4096 * 2
    assert "2 trained and 4 frozen" in plan.dry_run(M.PRESETS["7b"], 8, 4096, rollouts=500)


@pytest.mark.parametrize("name, shown", [
    ("pretrain", "68,976,648,192 parameters|1024 rows x 4096|hours of one; the paper's Table 2: 1"),
    ("sft", "68,976,648,192 parameters|64 rows x 4096"),
    ("reward", "68,714,512,384 parameters|512 rows x 2 x 4096"),
    ("ppo", "2 trained and 4 frozen models|64 rows x 4096|512 answers an iteration"),
    ("gatt", "68,976,648,192 parameters|64 rows x 4096")])
def test_dry_run_of_a_preset_needs_no_checkpoint_and_takes_the_papers_batch(name, shown, tmp_path,
                                                                            capsys):
    module = __import__(name)
    flags = ["--model", "70b", "--dry-run", "--device", "cpu", "--out", str(tmp_path / "none")]
    assert module.main(stage.cli(module.Config, flags)) == {}
    text = capsys.readouterr().out
    assert all(part in text for part in shown.split("|")), text
    assert "does not fit" in text and not (tmp_path / "none").exists()
    batch = "minibatch" if name == "ppo" else "batch-size"
    module.main(stage.cli(module.Config, [*flags, f"--{batch}", "16"]))  # 16 is a default elsewhere
    assert "16 rows x" in capsys.readouterr().out


def test_dry_run_of_rejection_sampling_needs_no_checkpoint_and_counts_its_answers(tmp_path, capsys):
    import rejection
    flags = ["--model", "70b", "--dry-run", "--device", "cpu", "--out", str(tmp_path / "none")]
    assert rejection.main(stage.cli(rejection.Config, [*flags, "--samples", "7"])) == {}
    text = capsys.readouterr().out
    assert "68,976,648,192 parameters" in text and "70000 answers an iteration" in text
    assert "does not fit" in text and not (tmp_path / "none").exists()


@pytest.mark.parametrize("name, paper", [
    ("pretrain", dict(tokens=2e12, batch_size=1024, seq_len=4096, warmup_steps=2000,
                      weight_decay=0.1, clip=1.0)),  # [L2 §2.2, Table 1]
    ("sft", dict(batch_size=64, seq_len=4096, epochs=2, weight_decay=0.1)),  # §3.1
    ("reward", dict(batch_size=512)),  # §3.2.2
    ("ppo", dict(iterations=400, batch_size=512, minibatch=64)),  # §3.2.3
    ("gatt", dict(batch_size=64, seq_len=4096))])
def test_from_7b_on_a_stage_has_the_papers_hyperparameters(name, paper):
    """And below it, and for a flag that is given, its own."""
    module = __import__(name)
    toy, big = (stage.at_size(module.Config(), plan.settings(name, M.PRESETS[size]))
                for size in ("tiny", "7b"))
    assert {k: getattr(big, k) for k in paper} == paper and toy == module.Config()
    given = stage.cli(module.Config, ["--batch-size", str(module.Config.batch_size)])
    again = stage.at_size(given, plan.settings(name, M.PRESETS["7b"]))
    assert again.batch_size == module.Config.batch_size


def test_learning_rates_from_7b_on_are_the_papers():
    import ppo
    for name, pre, rm, beta in (("7b", 3e-4, 1e-5, 0.01), ("13b", 3e-4, 1e-5, 0.01),
                                ("34b", 1.5e-4, 1e-5, 0.005), ("70b", 1.5e-4, 5e-6, 0.005)):
        config = M.PRESETS[name]
        rates = {stage_name: plan.settings(stage_name, config)["lr"]
                 for stage_name in ("pretrain", "reward", "sft", "gatt")}
        assert rates == {"pretrain": pre, "reward": rm, "sft": 2e-5, "gatt": 2e-5}
        cfg = ppo.settings(ppo.Config(), config)
        assert (cfg.lr, cfg.beta) == (1e-6, beta)
        assert plan.settings("rejection", config)["rs_lr"] == 2e-5


def test_a_preset_that_is_not_the_checkpoints_is_one_clear_error(tmp_path):
    import sft
    small = M.ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=28,
                          vocab_size=320, max_seq_len=128)
    M.save(tmp_path / "sft.pt", M.Llama(small).init_weights(0), "sft", b"model", {})
    with pytest.raises(ValueError, match=r"--model 7b: .*sft.pt has another shape \(dim 24, 2 lay"):
        sft.main(sft.Config(model="7b", checkpoint=str(tmp_path / "sft.pt")))


def test_a_run_that_is_too_large_is_planned_all_the_same():
    text = plan.dry_run(M.PRESETS["70b"], 1024, 4096, device="cpu")
    assert "68,976,648,192 parameters" in text and "it does not fit" in text


def test_the_table_reprints_the_papers_hours(capsys):
    plan.table(plan.Table())
    rows = capsys.readouterr().out.splitlines()
    for row, (name, hours, share) in zip(rows[1:], (("7b", "184,320", "44.5%"),
                                                    ("13b", "368,640", "42.1%"),
                                                    ("34b", "1,038,336", "37.8%"),
                                                    ("70b", "1,720,320", "46.0%"))):
        assert row.startswith(name) and hours in row and share in row


def test_plan_prints_what_it_needs(capsys):
    plan.plan(stage.cli(plan.Plan, ["--model", "7b", "--ranks", "8", "--recompute"]))
    assert "it fits" in capsys.readouterr().out


def test_an_unknown_command_is_one_line_and_exit_code_2():
    done = subprocess.run([sys.executable, "plan.py", "plna"], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "simulate" in done.stderr
