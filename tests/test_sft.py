"""What fine-tuning promises: loss on answers alone, whole dialogues, exact resume, clear errors."""

import gzip
import json
from pathlib import Path

import pytest
import torch

import data
import model as M
import plan
import scale
import sft
import stage
import village as V
from data import pack
from sft import Config, answer_loss, main

ONE = scale.Ranks(torch.device("cpu"))
LINES = [f"the {a} {b} saw {c} birds." for a in ("red", "old") for b in ("fox", "cow", "hen")
         for c in range(10, 30)]


@pytest.fixture(scope="module")
def tokenizer():
    tags = ["[INST] the cow [/INST] the hen <<SYS>> <</SYS>>"] * 20
    return data.Tokenizer(data.train_tokenizer(LINES + tags, 320))


@pytest.fixture
def base(tokenizer, tmp_path):
    config = M.ModelConfig(24, 2, 6, 2, 40, tokenizer.vocab_size, 96)
    path = tmp_path / "base.pt"
    M.save(path, M.Llama(config).init_weights(1), "pretrain", tokenizer.model_bytes)
    return path


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    with gzip.open(path, "wt") as f:
        for i, line in enumerate(LINES):
            row = {"question": f"what did number {i % 9} see?", "answer": line}
            f.write(json.dumps(row) + "\n")
    return path


def tiny(base, rows, out, **changes) -> Config:
    return Config(**{"checkpoint": str(base), "data": str(rows), "out": str(out), "seq_len": 64,
                     "batch_size": 4, "micro_batch": 4, "log_every": 1, "save_every": 3,
                     "evaluate_every": 5, "epochs": 1, "kernels": "torch", **changes})


def losses(out) -> list:
    lines = (Path(out) / "sft.jsonl").read_text().splitlines()
    return [(r["step"], r["loss"].hex(), r.get("val_loss", 0.0).hex())
            for r in map(json.loads, lines)]


# ---- packing and the loss

def test_packing_keeps_every_dialogue_whole_in_order_and_numbers_them():
    """Widths 6: [3 + 2 | 4 | 6]; fills: token 0, mask 0, segment -1."""
    dialogs = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]), ([6, 7, 8, 9], [0, 0, 1, 1]),
               ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1])]
    tokens, mask, segments = pack(dialogs, 6)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert mask.tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1], [0] * 6]


def test_the_loss_is_that_of_the_answers_and_their_eos_dialogue_by_dialogue(tokenizer):
    """Packed or alone, a dialogue gives the same nats: prompt, padding, neighbours give none."""
    model = M.Llama(M.ModelConfig(24, 2, 6, 2, 40, tokenizer.vocab_size, 96)).init_weights(1)
    dialogs = [data.encode_dialog(tokenizer, [{"role": "user", "content": f"number {i}?"},
                                              {"role": "assistant", "content": LINES[i]}])
               for i in range(5)]
    packed = answer_loss(model, *pack(dialogs, 64)).item()
    alone = 0.0
    for tokens, mask in dialogs:
        logits = model(torch.tensor([tokens[:-1]]))
        logp = M.logprobs(logits, torch.tensor([tokens[1:]]))[0]
        alone -= sum(l.item() for l, m in zip(logp, mask[1:]) if m)
        assert mask[-1] == 1 and tokens[-1] == tokenizer.eos_id
    assert packed == pytest.approx(alone, rel=1e-5)


def test_rows_past_the_end_of_the_data_carry_no_loss():
    rows = [torch.ones(5, 4, dtype=torch.int64)] * 3  # five rows in batches of two
    masks = [sft.batch_at(step, rows, Config(batch_size=2), scale.Ranks(torch.device("cpu")))[1]
             for step in range(3)]
    assert [mask.sum(1).tolist() for mask in masks] == [[4, 4], [4, 4], [4, 0]]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_every_answer_token_weighs_the_same_however_the_batch_is_cut(micro, tokenizer):
    """Rows with few and with many answer tokens, in pieces: the gradient of the whole batch.

    One step without warm-up is at its peak: stage.cosine(0, 1, 1.0, 0) is 1.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 50, (6, 9), generator=generator)
    mask = (torch.rand(6, 9, generator=generator) < torch.linspace(0.1, 0.9, 6)[:, None]).long()
    rows, segments = (tokens, mask, torch.zeros_like(tokens)), torch.zeros_like(tokens)
    make = lambda: M.Llama(M.ModelConfig(24, 2, 6, 2, 40, 50, 64)).init_weights(2)
    whole, cut = make(), make()
    (answer_loss(whole, tokens, mask, segments) / mask[:, 1:].sum()).backward()
    cfg = Config(batch_size=6, micro_batch=micro, clip=1e9, lr=1.0, warmup_steps=0)
    (done, _), = sft.train(cut, torch.optim.SGD(cut.parameters(), lr=9.0), rows, cfg, ONE)
    assert done == 1
    for (name, p), before in zip(cut.named_parameters(), make().parameters()):
        assert torch.allclose(before - p, whole.get_parameter(name).grad, atol=1e-5), name


def test_the_rate_starts_at_the_papers_value_for_7b_and_falls_to_a_tenth(base, rows, tmp_path):
    """The log of a run of its own: 10 steps of warm-up, then down to a tenth of the peak."""
    for size in ("7b", "13b", "34b", "70b"):
        cfg = stage.at_size(Config(), plan.settings("sft", M.preset(size)))
        assert (cfg.lr, cfg.batch_size, cfg.seq_len, cfg.epochs) == (2e-5, 64, 4096, 2)
    assert sft.default_lr(128) == 1e-3 and sft.default_lr(256) == 5e-4
    main(tiny(base, rows, tmp_path / "o", lr=1.0, epochs=8, batch_size=2, clip=1e-9))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "o/sft.jsonl").read_text().splitlines()]
    total = len(rates)
    assert total > 40 and rates == [stage.cosine(step, total, 1.0, 10) for step in range(total)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[-1] < 0.11
    assert stage.cosine(100, 100, 1.0, 10) == pytest.approx(0.1)


# ---- the stage

def test_the_stage_lowers_the_held_out_loss_on_rows_of_a_user(base, rows, tmp_path, capsys):
    final = main(tiny(base, rows, tmp_path / "o", epochs=4, lr=3e-3))
    before = float(capsys.readouterr().out.split("held-out answer loss before: ")[1].split()[0])
    assert final["val_loss"] < before - 0.5
    _, info = M.load(tmp_path / "o" / "sft.pt", "cpu")
    assert info["stage"] == "sft" and info["metrics"] == final and final["village"] is None
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["sft.jsonl", "sft.pt"]


def test_resume_after_a_stop_is_bit_exact(base, rows, tmp_path, monkeypatch):
    main(tiny(base, rows, tmp_path / "whole"))
    real, calls = stage.step, []

    def stop_at_five(*args, **numbers):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **numbers)

    monkeypatch.setattr(stage, "step", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        main(tiny(base, rows, tmp_path / "cut"))
    monkeypatch.setattr(stage, "step", real)
    main(tiny(base, rows, tmp_path / "cut", resume=True))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) > 5


def test_demonstrations_are_those_of_the_village_that_pretraining_read(tmp_path, capsys):
    village = V.Village(3)
    tokenizer = data.Tokenizer(data.train_tokenizer(village.documents(400, seed=0), 700))
    path = tmp_path / "pretrain.pt"
    M.save(path, M.Llama(M.ModelConfig(24, 1, 6, 2, 40, 700, 512)).init_weights(1), "pretrain",
           tokenizer.model_bytes, {"village": 3})
    main(Config(out=str(tmp_path), show_batch=True, dialogues=60, seed=5))
    shown = capsys.readouterr().out
    rows = sft.read_demonstrations(Config(dialogues=60, seed=5), tokenizer, village)[0]
    told = [data.encode_dialog(tokenizer, row["messages"])
            for row in village.demonstrations(60, 5)]
    assert rows == [row for row in told if len(row[0]) <= 513]
    tokens, mask, _ = data.pack_epochs(rows, 513, 2, 5)
    assert data.show_dialog(tokenizer, tokens[0].tolist(), mask[0].tolist()) in shown


def test_a_model_that_learns_a_villages_demonstrations_says_so_whatever_it_read_before(tmp_path):
    tokenizer = data.Tokenizer(data.train_tokenizer(V.Village().documents(300, seed=0), 500))
    model = M.Llama(M.ModelConfig(24, 1, 6, 2, 40, 500, 256)).init_weights(1)
    M.save(tmp_path / "mine.pt", model, "converted", tokenizer.model_bytes)
    final = main(Config(checkpoint=str(tmp_path / "mine.pt"), out=str(tmp_path), dialogues=20,
                        epochs=1, seq_len=256, kernels="torch"))
    _, info = M.load(tmp_path / "sft.pt", "cpu")
    assert final["village"] == 0 and info["trained_on"] == "village 0"
    assert final["lineage"] == ["converted"]


def test_show_batch_prints_the_colours_and_trains_nothing(base, rows, tmp_path, capsys):
    main(tiny(base, rows, tmp_path / "o", show_batch=True))
    shown = capsys.readouterr().out
    assert "\x1b[92m" in shown and "\x1b[90m" in shown and not (tmp_path / "o").exists()


def test_long_dialogues_are_skipped_and_counted_and_if_all_are_it_is_an_error(base, rows, tmp_path,
                                                                              capsys):
    with pytest.raises(ValueError, match="raise --seq-len"):
        main(tiny(base, rows, tmp_path / "o", seq_len=8))
    assert "skipped 120 dialogues longer than --seq-len 8" in capsys.readouterr().out


@pytest.mark.parametrize("changes, says", [
    ({"checkpoint": "none.pt"}, "none.pt"), ({"seq_len": 4096}, "context is 96"),
    ({"data": "none.jsonl"}, "none.jsonl")])
def test_what_is_wrong_is_said_before_anything_is_written(base, rows, tmp_path, changes, says):
    with pytest.raises((ValueError, OSError), match=says):
        main(tiny(base, rows, tmp_path / "o", **changes))
    assert not (tmp_path / "o").exists()


def test_no_knob_is_dead():
    source = (Path(sft.__file__)).read_text()
    for name in Config.__dataclass_fields__:
        assert f"cfg.{name}" in source or name in stage.FREE_FLAGS, name
        assert stage._field_comments(Config)[name], name
