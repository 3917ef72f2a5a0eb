"""chat.py: what is printed while an answer comes, what the dialogue keeps, what each line may do.

A throwaway model of 2 layers learns two dialogues by heart; one with random weights never stops.
"""
import contextlib
import dataclasses
import io
import os
import re
import select
import signal
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

import chat as C
import data
import kernels
import model as M
from kernels import build

ROOT = Path(__file__).parent.parent
LLAMA = "Hello 🦙, my\nfriend."  # four bytes and a newline, none of which has a piece
TEXTS = ["Hello my friend. I am Plato, one and two, said the friend. Who are you? Be Plato."] * 3


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer(data.train_tokenizer(TEXTS, 320))


@pytest.fixture(scope="module")
def out(tokenizer, tmp_path_factory):
    """A folder with pretrain.pt (random, endless), sft.pt (two dialogues), both reward models."""
    folder = tmp_path_factory.mktemp("out")
    config = M.ModelConfig(32, 2, 4, 2, 64, tokenizer.vocab_size, 160)
    dialogs = [[user("hi"), assistant(LLAMA)],
               [{"role": "system", "content": "Be Plato."}, user("hi"), assistant("I am Plato.")]]
    net = M.Llama(config)
    net.init_weights(seed=0)
    encoded = [[torch.tensor([ids]) for ids in data.encode_dialog(tokenizer, d)] for d in dialogs]
    for step in range(40):  # sign descent: importing torch's optimizers takes longer than this
        logp = [M.logprobs(net(t[:, :-1]), t[:, 1:])[m[:, 1:] == 1].mean() for t, m in encoded]
        for p, grad in zip(net.parameters(), torch.autograd.grad(-sum(logp), net.parameters())):
            p.data -= 0.01 * (1 - step / 40) * grad.sign()
    M.save(folder / "sft.pt", net, "sft", tokenizer.model_bytes, {"lineage": ["pretrain"]})
    endless = M.Llama(M.ModelConfig(32, 2, 4, 2, 64, tokenizer.vocab_size, 20_000))
    endless.init_weights(seed=0)
    rng = torch.Generator().manual_seed(zlib.crc32(b"0 output.weight"))
    torch.nn.init.normal_(endless.output.weight, std=0.02, generator=rng)  # one that says spaces
    endless.output.weight.data[tokenizer.eos_id] = 0  # greedy: some other logit is above 0
    M.save(folder / "pretrain.pt", endless, "pretrain", tokenizer.model_bytes)
    for n, name in enumerate(C.REWARDS):
        reward = M.Llama(dataclasses.replace(config, scalar_head=True))
        reward.init_weights(seed=n)
        M.save(folder / f"reward_{name}.pt", reward, f"reward_{name}", tokenizer.model_bytes)
    return folder


@pytest.fixture(autouse=True)
def back_to_torch():
    yield
    kernels.choose("torch")


@pytest.fixture
def talker(out):
    return C.Chat(C.Config(out=str(out), temperature=0.0, kernels="torch"), out / "sft.pt")


def lines(monkeypatch, talker, *typed):
    """Run the chat on lines of standard input."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in typed)))
    C.talk(talker)


# ---- text while it comes -------------------------------------------------------------------------


def test_a_character_split_over_byte_tokens_is_printed_once_and_whole(tokenizer):
    texts = list(C.as_text(tokenizer, tokenizer.encode("a 🦙 b")))
    assert "".join(texts) == " a 🦙 b" and "🦙" in texts


def test_streamed_text_is_the_tokenizers_own_after_the_space_in_front(tokenizer):
    text = "Hello  my\n\n friend é 漢字 [x] "
    assert "".join(C.as_text(tokenizer, tokenizer.encode(text, bos=True, eos=True))) == " " + text


def test_half_a_character_at_the_end_becomes_one_replacement_mark(tokenizer):
    assert "".join(C.as_text(tokenizer, tokenizer.encode("🦙")[:-1])).strip() == "\ufffd"


def test_the_answer_is_printed_without_the_spaces_of_the_chat_format(talker, capsys):
    C.ask(talker, "hi")
    assert capsys.readouterr().out == LLAMA + "\n"


def test_answers_come_piece_by_piece(talker, monkeypatch):
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.extend(a))
    C.ask(talker, "hi")
    assert len([p for p in pieces if p]) > 4


def test_a_terminal_gets_no_control_characters(talker, tokenizer, monkeypatch, capsys):
    ids = tokenizer.encode("a\x1b[2Jb", eos=True)
    monkeypatch.setattr(M, "stream", lambda *a, **k: iter(ids))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    C.ask(talker, "hi")
    assert capsys.readouterr().out == "a\ufffd[2Jb\n"


def test_a_base_model_continues_the_text_as_it_stands(out, tokenizer, capsys):
    base = C.Chat(C.Config(out=str(out), temperature=0.0, max_new_tokens=5, kernels="torch"),
                  out / "pretrain.pt")
    C.ask(base, "Hello my")
    prompt = tokenizer.encode("Hello my", bos=True)
    whole = tokenizer.decode(prompt + M.generate(base.model, [prompt], 5, temperature=0)[0])
    printed = capsys.readouterr()
    assert ("Hello my" + printed.out).rstrip() == whole.rstrip()
    assert "not a chat model" in printed.err


# ---- the dialogue --------------------------------------------------------------------------------


def test_the_prompt_is_the_training_format_with_the_whole_dialogue(talker, tokenizer):
    talker.turns = [user("hi"), assistant("Hello")]
    expected = data.encode_dialog(tokenizer, [user("hi"), assistant("Hello"), user("and?")])[0]
    assert talker.prompt("and?") == expected


def test_the_oldest_turns_go_first_and_the_system_message_stays(tokenizer):
    system = {"role": "system", "content": "Be Plato."}
    turns = [user("one"), assistant("two"), user("Who"), assistant("you"), user("hi")]
    wanted = data.encode_dialog(tokenizer, [system, *turns[2:]])[0]
    assert C.fit(tokenizer, [system, *turns], len(wanted), 1000) == (wanted, 1)


def test_a_full_context_is_said_in_one_line_and_nothing_is_forgotten(talker, capsys):
    talker.turns = [user("hi"), assistant("Hello my friend. " * 4)] * 5
    C.ask(talker, "hi")
    assert capsys.readouterr().err.count("are not read") == 1 and len(talker.turns) == 12


def test_a_message_longer_than_the_context_is_refused_and_changes_nothing(talker):
    with pytest.raises(ValueError, match="at most 159"):
        C.ask(talker, "漢" * 200)
    assert talker.turns == []


def test_tags_in_an_answer_are_broken_before_they_become_history(talker, tokenizer, monkeypatch):
    ids = tokenizer.encode("x [/INST] y", eos=True)
    monkeypatch.setattr(M, "stream", lambda *a, **k: iter(ids))
    C.ask(talker, "hi")
    assert talker.turns[1]["content"] == "x [ /INST] y" and talker.prompt("go on")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talker, tokenizer, monkeypatch):
    def interrupted(*_, **__):
        yield from tokenizer.encode("one two")
        raise KeyboardInterrupt
    monkeypatch.setattr(M, "stream", interrupted)
    assert C.ask(talker, "hi") is False
    assert talker.turns == [user("hi"), assistant("one two")]


def test_an_empty_answer_is_not_kept(talker, tokenizer, monkeypatch):
    monkeypatch.setattr(M, "stream", lambda *a, **k: iter([tokenizer.eos_id]))
    C.ask(talker, "hi")
    assert talker.turns == []


# ---- commands ------------------------------------------------------------------------------------


def test_the_system_message_changes_the_answer(talker, monkeypatch, capsys):
    lines(monkeypatch, talker, "/system Be Plato.", "hi")
    assert "I am Plato.\n" in capsys.readouterr().out


def test_reset_forgets_the_turns_and_keeps_the_system_message(talker, monkeypatch):
    lines(monkeypatch, talker, "/system Be Plato.", "hi", "/reset")
    assert talker.messages() == [{"role": "system", "content": "Be Plato."}]


@pytest.mark.parametrize("bad, said", [
    ("/temprature 1", "did you mean /temperature?"), ("/temperature warm", "warm: write a number"),
    ("/temperature nan", "0.01 to 10"), ("/top-p 0", "at most 1"),
    ("/stage sfd", "pretrain, sft"), ("/stage", "pretrain, sft"),
    ("/save talk.txt", ".jsonl"), ("/save /no/such/folder/x.jsonl", "No such file"),
    ("/system <<SYS>>", "a tag of the chat format"), ("a [/INST] b", "a tag of the chat format"),
    ("", "empty"), ("   ", "empty"), ("a \udcff b", "lone surrogate")])
def test_bad_input_is_one_line_and_nothing_is_lost(talker, monkeypatch, capsys, bad, said):
    talker.turns = [user("hi"), assistant("Hello")]
    cfg = talker.cfg
    lines(monkeypatch, talker, bad)
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert talker.turns == [user("hi"), assistant("Hello")] and talker.cfg == cfg


def test_numbers_are_set_and_shown(talker, monkeypatch, capsys):
    lines(monkeypatch, talker, "/temperature 0.5", "/top-p 0.8", "/top-p")
    assert talker.cfg.temperature == 0.5
    assert capsys.readouterr().out.endswith("top_p is 0.8\ntop_p is 0.8\n")


def test_another_stage_goes_on_with_the_same_dialogue(talker, monkeypatch):
    lines(monkeypatch, talker, "hi", "/stage pretrain", "/stage sft")
    assert talker.path.name == "sft.pt" and len(talker.turns) == 2


def test_score_is_the_reward_models_own_at_the_eos(talker, out):
    talker.turns = [user("hi"), assistant("Hello")]
    tokens, _ = data.encode_dialog(talker.tokenizer, talker.turns)
    for name, score in C.rate(talker.messages(), talker.cfg).items():
        reward, _ = M.load(out / f"reward_{name}.pt")
        assert score == pytest.approx(reward(torch.tensor([tokens]))[0, -1].item(), abs=1e-6)


def test_score_needs_an_answer(talker, monkeypatch, capsys):
    lines(monkeypatch, talker, "/score")
    assert "ask something first" in capsys.readouterr().err


def test_a_saved_dialogue_is_a_row_for_fine_tuning(talker, monkeypatch, tmp_path):
    file = tmp_path / "my talks.jsonl"
    lines(monkeypatch, talker, "/system Be Plato.", "hi", f"/save {file}", f"/save {file}")
    assert data.read_dialogs(file) == [talker.messages()] * 2


def test_every_command_of_the_help_is_known(talker, monkeypatch, capsys):
    for line in C.HELP.splitlines():
        lines(monkeypatch, talker, line.split()[0])
    assert "no command" not in capsys.readouterr().err


# ---- flags ---------------------------------------------------------------------------------------


def test_the_last_stage_of_the_chain_speaks(out, monkeypatch, capsys):
    C.main(C.Config(out=str(out), temperature=0, prompt="hi"))
    assert capsys.readouterr().out == LLAMA + "\n"


def lined_up(folder, config, **lines) -> list[str]:
    """stages_in of a folder with checkpoints of these names and lineages, made in this order."""
    for name, lineage in lines.items():
        M.save(folder / f"{name}.pt", M.Llama(config), name, b"", {"lineage": lineage})
    return C.stages_in(folder)


ONE_LAYER = M.ModelConfig(8, 1, 2, 1, 8, 16, 16)


def test_stages_stand_in_the_order_of_the_lines_they_remember_whatever_their_names(tmp_path):
    """Of the versions, all made from SFT, the tenth is later than the ninth."""
    versions = {f"rlhf_v{n}": ["pretrain", "sft"] for n in (10, 9, 1)}
    found = lined_up(tmp_path, ONE_LAYER, apo=[*versions["rlhf_v1"], "rlhf_v10"], **versions,
                     zero=["pretrain"], pretrain=[])
    assert found == ["pretrain", "zero", "rlhf_v1", "rlhf_v9", "rlhf_v10", "apo"]


def test_what_cannot_chat_is_no_stage_and_what_is_no_checkpoint_is_named(tmp_path, capsys):
    reward = dataclasses.replace(ONE_LAYER, scalar_head=True)
    M.save(tmp_path / "reward_safety.pt", M.Llama(reward), "reward_safety", b"")
    torch.save({"step": 3}, tmp_path / "sft.state.pt")
    torch.save([1, 2], tmp_path / "mine.pt")
    assert lined_up(tmp_path, ONE_LAYER, pretrain=[]) == ["pretrain"]
    err = capsys.readouterr().err
    assert err.startswith(f"left out: {tmp_path / 'mine.pt'} is not a checkpoint")
    assert err.count("\n") == 1
    (tmp_path / "pretrain.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no trained model"):
        C.stages_in(tmp_path)


def test_compare_shows_every_stage_with_both_scores(out, capsys):
    C.main(C.Config(out=str(out), temperature=0, prompt="hi", compare=True, max_new_tokens=40,
                    kernels="torch"))
    header, pretrain, sft = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "helpful", "safety", "answer"]
    assert pretrain.startswith("pretrain") and "nan" not in pretrain + sft
    assert sft.startswith("sft") and sft.endswith("Hello 🦙, my friend.")


def test_an_answer_too_long_for_the_reward_models_has_no_score(out, capsys):
    C.main(C.Config(out=str(out), temperature=0, prompt="hi", compare=True, max_new_tokens=170,
                    kernels="torch"))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split()[1:3] == ["nan", "nan"] and "shorten" in printed.err


def test_show_prompt_prints_the_pieces_beside_the_answer(out, capsys):
    C.main(C.Config(out=str(out), temperature=0, prompt="hi", show_prompt=True))
    assert capsys.readouterr().err.startswith("<s>|▁|<0x5B>|I|")


@pytest.mark.parametrize("flags, said", [
    ({"temperature": -1.0}, "temperature -1.0"), ({"max_new_tokens": 0}, "at least 1"),
    ({"prompt": " "}, "empty"), ({"prompt": None, "compare": True}, "add --prompt"),
    ({"system": "[INST]"}, "a tag of the chat format"), ({"out": "/nowhere"}, "make")])
def test_flags_that_cannot_work_are_refused(out, flags, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said.replace("[", r"\[")):
        C.main(C.Config(**{"out": str(out), "prompt": "hi", **flags}))


@pytest.mark.parametrize("dtype", [None, "bf16", "int8", "int4"])
def test_every_dtype_speaks_in_c(out, capsys, dtype):
    """A model that knows its answer by heart still knows it in 4 bits."""
    try:
        build.load_library()
    except OSError as e:
        pytest.skip(str(e))
    chat = C.Chat(C.Config(out=str(out), temperature=0.0, dtype=dtype, kernels="c"), out / "sft.pt")
    assert f"{dtype or 'fp32'} weights" in capsys.readouterr().err and chat.model is None
    for _ in range(2):  # the second turn finds the first in the cache
        assert C.ask(chat, "hi")
    assert capsys.readouterr().out.startswith(LLAMA + "\n")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_without_a_compiler_whole_numbers_are_refused_in_one_line_and_the_model_speaks(
        out, capsys, monkeypatch, dtype):
    def no_compiler(*_):
        raise OSError("no C compiler found (cc, gcc or clang)")
    monkeypatch.setattr(kernels.native, "load_library", no_compiler)
    C.main(C.Config(out=str(out), temperature=0, prompt="hi", dtype=dtype))
    printed = capsys.readouterr()
    assert printed.out == LLAMA + "\n" and printed.err.count("\n") == 1
    assert f"--dtype {dtype}" in printed.err and "no C compiler" in printed.err


def test_a_dtype_of_the_pytorch_path_is_obeyed(out):
    talk = C.Chat(C.Config(out=str(out), kernels="torch", dtype="bf16"), out / "sft.pt")
    assert talk.model.output.weight.dtype == torch.bfloat16


def test_flags_that_exclude_each_other_are_refused(out):
    with pytest.raises(ValueError, match="computed in C: leave --kernels torch away"):
        C.Chat(C.Config(out=str(out), kernels="torch", dtype="int4"), out / "sft.pt")


def test_a_reward_model_does_not_speak(out):
    with pytest.raises(ValueError, match="scores answers"):
        C.Chat(C.Config(), out / "reward_safety.pt")


# ---- the program ---------------------------------------------------------------------------------


def test_piped_lines_are_answered_in_utf8_and_only_answers_are_on_stdout(out, monkeypatch):
    piped = {"stdin": io.BytesIO("hi\n/fly\n/system é\n".encode()), "stdout": io.BytesIO()}
    for name, raw in piped.items():  # as on a machine without a UTF-8 locale
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii"))
    C.main(C.Config(out=str(out), temperature=0))
    printed = piped["stdout"].getvalue().decode().splitlines()
    assert printed == [*LLAMA.splitlines(), "system message set; /reset begins anew with it"]


@pytest.fixture(scope="module")
def session(out, tmp_path_factory):
    """One talk in a pseudo-terminal: {what was done: what the screen then showed}."""
    pty = pytest.importorskip("pty")
    with contextlib.suppress(OSError):
        build.load_library()  # compiled now, while no clock runs
    state = tmp_path_factory.mktemp("state")
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        os.chdir(ROOT)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state)}
        os.execve(sys.executable, [sys.executable, "chat.py", "--out", str(out), "--temperature",
                                   "0", "--max-new-tokens", "100000"], env)

    def until(pattern: bytes, seconds: float = 60) -> bytes:
        seen, end = b"", time.time() + seconds
        while not re.search(pattern, seen, re.DOTALL) and time.time() < end:
            if select.select([terminal], [], [], 0.1)[0]:
                try:
                    seen += os.read(terminal, 4096)
                except OSError:  # the program has left
                    break
        return seen

    def do(keys: str, wait: bytes = b"you> ") -> str:
        os.write(terminal, keys.encode())
        return until(wait).decode()

    shown = {"start": until(b"you> ").decode(), "hi": do("hi\n"), "stage": do("/stage pretrain\n")}
    shown["endless"] = do("Hello\n", wait=b"\r\n.* ")  # its own line, then a word
    shown["ctrl-c"] = do("\x03")
    shown["begun"] = do("half a line", wait=b"half a line")
    for _ in range(20):  # Ctrl-C just before Python waits for keys is seen with the next key
        os.write(terminal, b"\x03")
        # the prompt may be drawn again with the keys: only one on a line of its own is the next
        if answer := until(b"\n.*you> ", seconds=3):
            break
    shown["begun"] += answer.decode()
    shown["after"] = do("/stage sft\n")
    shown["up"] = do("\x1b[A\n")  # arrow up, enter: the last line again
    shown["ctrl-d"] = do("\x04", wait=b"nothing: read to the end")
    shown["status"] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    file = state / "llama2-chat" / "history"
    shown["history"] = file.read_text() if file.exists() else ""
    return shown


def test_in_a_terminal_the_answer_follows_the_question(session):
    assert session["hi"].replace("\r", "") == f"hi\n{LLAMA}\nyou> "


def test_ctrl_c_stops_the_answer_and_not_the_program(session):
    assert "cut by Ctrl-C" in session["ctrl-c"] and session["ctrl-c"].endswith("you> ")


def test_words_are_on_the_screen_before_the_answer_is_over(session):
    assert "cut" not in session["endless"] and len(session["endless"].split()) > 1


def test_ctrl_c_drops_a_line_that_has_begun(session):
    assert session["begun"].endswith("you> ") and session["after"].rstrip().endswith("you>")


def test_arrow_up_recalls_the_last_line(session):
    pytest.importorskip("readline")
    assert session["up"].count("goes on with sft") == 1


def test_ctrl_d_leaves_without_complaint(session):
    assert session["status"] == 0 and "Traceback" not in session["ctrl-d"]


def test_what_was_typed_is_kept_for_next_time(session):
    pytest.importorskip("readline")
    assert session["history"].split("\n")[:2] == ["hi", "/stage pretrain"]
