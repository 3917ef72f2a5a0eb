"""What plan.SETTINGS promises: one table of every hyperparameter, by size, beside the paper's."""
import dataclasses
import importlib
import re

import pytest

import model as M
import plan
import stage

STAGES = ("pretrain", "sft", "reward", "rejection", "ppo", "gatt")
SIZES = ("7b", "13b", "34b", "70b")
ROWS = {(row.stage, row.name): row for row in plan.SETTINGS}
# What is no hyperparameter: dice and village, when to log and save, how many ranks, how long by the
# clock; the vocabulary, which is the preset's; how much is drawn of the village, where one's own
# files are read whole.
OTHER = {"seed", "village", "log_every", "evaluate_every", "save_every", "tp", "minutes",
         "vocab_size"}
DRAWN = {("sft", "dialogues"), ("reward", "pairs"), ("reward", "valid_pairs"),
         ("rejection", "comparisons")}


def config_of(name: str):
    return importlib.import_module(name).Config


def test_every_row_is_there_once_and_says_where_its_value_is_from():
    assert len(ROWS) == len(plan.SETTINGS)
    assert {row.stage for row in plan.SETTINGS} == set(STAGES)
    for row in plan.SETTINGS:
        assert len(row.sizes) == len(plan.SIZES) == 4 and row.source, row.name
        assert row.source.startswith(("Table ", "§", "ours", "memory only", "none but"))


@pytest.mark.parametrize("row", plan.SETTINGS, ids=lambda row: f"{row.stage}.{row.name}")
def test_the_column_of_the_village_is_what_the_stage_has(row):
    """A field's default, or the constant of that name."""
    room = importlib.import_module(row.stage)
    if row.name.isupper():
        assert getattr(room, row.name) == row.tiny
    else:
        assert getattr(room.Config(), row.name) == row.tiny


@pytest.mark.parametrize("name", STAGES)
def test_every_numeric_flag_of_a_stage_is_in_the_table(name):
    for field in dataclasses.fields(config_of(name)):
        is_number = bool(field.metadata)  # `ranged`
        if is_number and field.name not in OTHER and (name, field.name) not in DRAWN:
            assert (name, field.name) in ROWS, field.name
        assert not ((name, field.name) in ROWS and field.name in OTHER)


PAPER = {  # read once more in the paper, by hand
    ("pretrain", "tokens"): 2e12,  # Table 1: 2.0T
    ("pretrain", "lr"): (3e-4, 3e-4, 1.5e-4, 1.5e-4),  # Table 1
    ("pretrain", "seq_len"): 4096,  # Table 1: 4k
    ("pretrain", "warmup_steps"): 2000, ("pretrain", "weight_decay"): 0.1,  # §2.2
    ("pretrain", "clip"): 1.0,  # §2.2
    ("sft", "lr"): 2e-5, ("sft", "weight_decay"): 0.1, ("sft", "batch_size"): 64,  # §3.1
    ("sft", "seq_len"): 4096, ("sft", "epochs"): 2,  # §3.1
    ("reward", "batch_size"): 512,  # §3.2.2: pairs, 1024 rows
    ("reward", "lr"): (1e-5, 1e-5, 1e-5, 5e-6),  # §3.2.2: 5e-6 for the 70B alone
    ("rejection", "rounds"): 5,  # V1 to V5, §3.2.3
    ("rejection", "threshold"): 0.15, ("ppo", "threshold"): 0.15,  # §3.2.3
    ("ppo", "lr"): 1e-6, ("ppo", "batch_size"): 512, ("ppo", "minibatch"): 64,  # §3.2.3
    ("ppo", "CLIP"): 0.2, ("ppo", "beta"): (0.01, 0.01, 0.005, 0.005),  # §3.2.3
    ("ppo", "iterations"): 400,  # §3.2.3: 200 to 400, the more of them
}
AS_SFT = {  # rejection sampling and Ghost Attention fine-tune as SFT does: §3.2.3, §3.3
    ("rejection", "batch_size"): 64, ("rejection", "rs_lr"): 2e-5, ("gatt", "lr"): 2e-5,
    ("gatt", "epochs"): 2, ("gatt", "batch_size"): 64, ("gatt", "seq_len"): 4096,
    ("sft", "clip"): 1.0,  # this as pretraining, §2.2
}


@pytest.mark.parametrize("where", PAPER, ids=".".join)
def test_where_the_paper_gives_a_value_it_stands_there_from_7b_on(where):
    value = PAPER[where]
    assert ROWS[where].sizes == (value if isinstance(value, tuple) else (value,) * 4)
    assert not ROWS[where].source.startswith("ours")


def test_what_the_paper_does_as_elsewhere_has_that_value_and_is_marked_as_ours():
    for where, value in AS_SFT.items():
        assert ROWS[where].sizes == (value,) * 4 and re.match("ours: as (SFT, )?§",
                                                              ROWS[where].source)
    for name, value in (("tries", 1), ("replay", 0), ("train", "all")):  # §3.3 has no such thing
        assert ROWS["gatt", name].sizes == (value,) * 4


def test_a_batch_of_pretraining_is_4_million_tokens_at_every_size():
    """Table 1's caption."""
    for rows, length in zip(ROWS["pretrain", "batch_size"].sizes,
                            ROWS["pretrain", "seq_len"].sizes):
        assert rows * length == 2 ** 22


def test_temperatures_from_7b_on_lie_in_the_range_of_figure_8():
    """.6 to 1.5, with 1.2, the best one there for RLHF."""
    for text in ROWS["rejection", "temperatures"].sizes:
        tried = [float(word) for word in text.split(",")]
        assert 0.6 <= min(tried) and max(tried) <= 1.5 and 1.2 in tried


def test_what_the_paper_does_not_give_is_marked_as_ours():
    given = {where for where, row in ROWS.items() if not row.source.startswith("ours")}
    checked = PAPER.keys() | {("pretrain", "batch_size"), ("ppo", "kl_limit")}
    unchecked = {where for where in given - checked if ROWS[where].source != "memory only"}
    assert not unchecked


@pytest.mark.parametrize("name", STAGES)
def test_a_model_of_the_papers_size_gets_the_papers_values_and_a_given_flag_stays(name):
    Config = config_of(name)
    flags = [row for row in plan.SETTINGS if row.stage == name and not row.name.isupper()]
    for i, size in enumerate(SIZES):
        cfg = stage.at_size(Config(), plan.settings(name, M.preset(size)))
        assert all(getattr(cfg, row.name) == row.sizes[i] for row in flags)
        stage.check(cfg)  # all of them legal
        scalar = dataclasses.replace(M.preset(size), scalar_head=True)
        assert plan.settings(name, scalar) == plan.settings(name, M.preset(size))
    for size in ("tiny", "15m", "110m", "1b"):
        assert plan.settings(name, M.preset(size)) == {}
    one = next(row for row in flags if isinstance(row.tiny, int) and row.tiny > 1)
    flag = "--" + one.name.replace("_", "-")
    given = stage.cli(Config, [flag, str(one.tiny)])  # given, though it is the default
    assert getattr(stage.at_size(given, plan.settings(name, M.preset("70b"))),
                   one.name) == one.tiny


def test_the_printed_table_has_a_line_for_every_row_in_100_columns(capsys):
    plan.print_settings()
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"{s}.{n}" for s, n in ROWS]
    assert head.split()[:5] == ["tiny", *SIZES] and max(map(len, [head, *lines])) <= 100
    for line, row in zip(lines, plan.SETTINGS):
        assert line.endswith(row.source)
        shown = line[25 + 13:25 + 13 + 36].split()
        assert len(shown) == 4, line
        for text, value in zip(shown, row.sizes):
            if isinstance(value, (int, float)):
                assert float(text) == pytest.approx(value, rel=1e-5), line
