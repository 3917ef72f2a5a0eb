"""What data.py promises: text comes back, the chat format is Meta's, bad rows are named.

The tokenizer under test is trained here in half a second, on sentences, code and chat tags.
"""
import gzip
import json
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import data
from data import Tokenizer, encode_dialog, train_tokenizer

WORDS = ("the a an old small river miller baker house walks sings to from with green bread seven "
         "and then who asks Why Because answer Hello there friend you are is not").split()
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def corpus() -> list[str]:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS, k=12)) + f". {rng.randrange(9999)}!" for _ in range(800)]
    texts += ["def f(x):\n    if x:\n        return 1\n\treturn x  # naïve\n"] * 40
    return texts + ["[INST] <<SYS>>\nYou are old.\n<</SYS>>\n\nHello [/INST] Why not? "] * 40


@pytest.fixture(scope="module")
def model() -> bytes:
    return train_tokenizer(corpus(), 500)


@pytest.fixture(scope="module")
def tok(model) -> Tokenizer:
    return Tokenizer(model)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


# ---- 1. Tokenizer --------------------------------------------------------------------------------

def random_text(rng: random.Random) -> str:
    """Words, runs of spaces, controls, emoji, any plane of Unicode; no U+2581, no surrogates."""
    def character():
        kind = rng.randrange(6)
        if kind == 0:
            return chr(rng.randrange(32))  # controls: NUL, tab, newline, carriage return, ...
        if kind == 1:
            return " " * rng.randrange(1, 9)
        if kind == 2:
            return rng.choice(["😀", "👩‍👩‍👧", "é", "e\u0301", "\ufeff", "\u3000", "⁇", "\ufffd"])
        if kind == 3:
            return rng.choice(["<s>", "</s>", "<unk>", "<0x0A>", *TAGS, "1234", "\r\n"])
        if kind == 4:
            code = rng.randrange(0x110000)
            return "x" if 0xD800 <= code < 0xE000 or code == 0x2581 else chr(code)
        return rng.choice(WORDS)
    return "".join(character() for _ in range(rng.randrange(12)))


def test_arbitrary_unicode_survives_the_round_trip(tok):
    rng = random.Random(0)
    for _ in range(20_000):
        text = random_text(rng)
        assert tok.decode(tok.encode(text)) == text
        assert tok.decode(tok.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", ["", " ", "  a", "a  ", "\n", "\n a", "\0", "a\0b", "\r\n"])
def test_spaces_and_controls_at_the_edges_survive(tok, text):
    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("unit", ["the old house  sings.\n", "x", " ", "é😀", "a ", " \n"])
def test_a_very_long_text_survives_and_has_the_ids_of_the_uncut_text(tok, unit):
    text = unit * (70_000 // len(unit))
    assert tok.encode(text) == tok.sp.encode(text)
    assert tok.decode(tok.encode(text)) == text


def test_encoding_word_by_word_never_changes_an_id(tok):
    rng = random.Random(1)
    for _ in range(5_000):
        text = "".join(rng.choices(["the", "a", " ", "  ", "\n", "▁", ".", "1", "é"], k=12))
        assert tok.encode(text) == tok.sp.encode(text)


def test_u2581_comes_back_as_a_space(tok):
    assert tok.decode(tok.encode("a\u2581b")) == "a b"


def test_a_lone_surrogate_is_refused_with_its_place(tok):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at position 2"):
        tok.encode("ab\ud83d")


def test_bos_and_eos_are_ids_and_never_text(tok):
    assert tok.encode("the", bos=True, eos=True) == [1, *tok.encode("the"), 2]
    for text in ("<s>", "</s>", "<unk>", "a</s>b", "<s><s>"):
        assert not {tok.unk_id, tok.bos_id, tok.eos_id} & set(tok.encode(text))
    assert (tok.unk_id, tok.bos_id, tok.eos_id) == (0, 1, 2)


def test_every_digit_stands_alone(tok):
    assert [tok.piece(i) for i in tok.encode("1234")] == ["▁", "1", "2", "3", "4"]
    several = [tok.piece(i) for i in range(tok.vocab_size) if tok.kind(i) == "normal"
               and any(c.isdigit() for c in tok.piece(i)) and len(tok.piece(i)) > 1]
    assert several == []


def test_ids_are_laid_out_as_in_llama(tok):
    assert [tok.kind(i) for i in range(3)] == ["unknown", "control", "control"]
    assert [tok.piece(i) for i in range(3, 259)] == [f"<0x{b:02X}>" for b in range(256)]
    assert {tok.kind(i) for i in range(3, 259)} == {"byte"}
    assert {tok.kind(i) for i in range(259, tok.vocab_size)} == {"normal"}
    assert tok.vocab_size == 500


def test_newline_and_tab_are_bytes_as_in_llama(tok):
    assert [tok.piece(i) for i in tok.encode("\n\t")] == ["▁", "<0x0A>", "<0x09>"]


def test_words_merge_before_indentation_as_in_llama(tok):
    """Llama's own tokenizer splits '    return' as ▁▁▁ ▁return, an unpatched one as ▁▁▁▁ return."""
    pieces = [tok.piece(i) for i in tok.encode("\n    return")]
    assert pieces[-1] == "▁return" and "".join(pieces[2:-1]) == "▁▁▁"


def fields(message: bytes) -> list[tuple[int, object]]:
    """(field number, value) of a protobuf message, read as the wire format says."""
    def varint(at):
        value = shift = 0
        while message[at] & 128:
            value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
        return value | message[at] << shift, at + 1

    found, at = [], 0
    while at < len(message):
        tag, at = varint(at)
        if tag & 7 == 0:
            value, at = varint(at)
        elif tag & 7 == 2:
            size, at = varint(at)
            value, at = message[at:at + size], at + size
        else:
            assert tag & 7 == 5, tag
            value, at = struct.unpack_from("<f", message, at)[0], at + 4
        found.append((tag >> 3, value))
    return found


def test_only_pieces_made_of_spaces_have_their_score_changed(model, tok):
    pieces = [dict(fields(value)) for number, value in fields(model) if number == 1]
    texts = [piece[1].decode() for piece in pieces]
    scores = [piece[2] for piece in pieces]
    assert {"▁", "▁▁", "▁▁▁▁"} <= set(texts)
    merge = 0
    for id, (text, score) in enumerate(zip(texts, scores)):
        if set(text) == {"▁"}:
            assert score == -1e9
        else:  # special pieces and bytes 0, then minus the rank of the merge
            assert score == -merge
        merge += id >= 259
        assert (tok.piece(id), tok.score(id)) == (text, score)


def test_the_training_options_are_the_ones_stored_in_llamas_file(model):
    """Numbers of TrainerSpec and NormalizerSpec in sentencepiece_model.proto; absent = default."""
    top = dict(pair for pair in fields(model) if pair[0] in (2, 3))
    trainer, normalizer = dict(fields(top[2])), dict(fields(top[3]))
    assert trainer[3] == 2 and trainer[4] == 500  # model_type BPE, vocab_size
    assert trainer[10] == pytest.approx(0.99995)  # character_coverage
    assert trainer.get(18, 4192) == 4192  # max_sentence_length (bytes)
    assert trainer.get(20, 16) == 16  # max_sentencepiece_length
    assert all(trainer.get(n, 1) == 1 for n in (21, 22, 23))  # split by script, whitespace, number
    assert (trainer[25], trainer[26], trainer[35]) == (1, 1, 1)  # digits, space pieces, bytes
    assert [trainer.get(n, d) for n, d in ((40, 0), (41, 1), (42, 2))] == [0, 1, 2]  # unk bos eos
    assert trainer[43] == 2**64 - 1  # pad_id -1
    assert trainer.get(44, " ⁇ ".encode()) == " ⁇ ".encode()
    assert not {30, 31, 36} & trainer.keys()  # no control, user-defined or required symbols
    assert normalizer[1] == b"identity" and normalizer.get(2, b"") == b""
    assert normalizer.get(3, 1) == 1 and normalizer[4] == 0  # dummy prefix on, spaces kept


def test_training_twice_gives_the_same_bytes(model):
    assert train_tokenizer(corpus(), 500) == model


def test_a_line_too_long_for_the_trainer_is_cut_not_dropped():
    line = "zebra quagga " * 1_000  # 13,000 bytes in one line, and nothing else to learn from
    parts = list(data.training_lines([line, "ééé" * 1_000, "a\n\nb\tc"]))  # 6,000 bytes
    assert all(len(part.encode()) <= data.MAX_LINE_BYTES for part in parts)
    assert "".join(parts) == line + "ééé" * 1_000 + "abc" and parts[-3:] == ["a", "b", "c"]
    assert not any(part.startswith("ebra") for part in parts)  # cut at spaces where there are some
    tok = Tokenizer(train_tokenizer([line], 280))
    assert len(tok.encode("zebra quagga")) == 2


def test_beyond_max_lines_a_fixed_sample_of_all_lines_is_used():
    texts = ["aaaa bbbb"] * 500 + ["cccc dddd"] * 500
    sampled = train_tokenizer(texts, 275, max_lines=50)
    assert sampled == train_tokenizer(texts, 275, max_lines=50)
    tok = Tokenizer(sampled)
    assert len(tok.encode("aaaa dddd")) == 2  # from both halves


@pytest.mark.parametrize("texts, size, message", [
    (["hello world"], 5_000, r"5000 is more than this text can fill: at most \d+"),
    (["hello world"], 259, r"259 is too small: .* need at least 267"),  # 259 and 'helowrd▁'
    ([], 300, "the texts are empty"),
    (["", "\n\n"], 300, "the texts are empty"),
    (["a\ud800"], 300, "lone surrogate"),
    ([b"bytes"], 300, "text must be str, found bytes"),
])
def test_impossible_training_is_one_clear_line(texts, size, message):
    with pytest.raises(ValueError, match=message) as caught:
        train_tokenizer(texts, size)
    assert "\n" not in str(caught.value)


def test_the_limit_named_by_the_size_error_works():
    with pytest.raises(ValueError) as caught:
        train_tokenizer(["hello world"], 5_000)
    most = int(str(caught.value).split("at most ")[1].split(";")[0])
    assert Tokenizer(train_tokenizer(["hello world"], most)).vocab_size == most


def test_an_error_while_texts_are_read_keeps_its_kind():
    def texts():
        yield "hello"
        raise FileNotFoundError("gone")
    with pytest.raises(FileNotFoundError, match="gone"):
        train_tokenizer(texts(), 300)


def test_a_file_and_its_bytes_are_the_same_tokenizer(tmp_path, model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model)
    for source in (path, str(path), model):
        assert Tokenizer(source).model_bytes == model
        assert Tokenizer(source).encode("Hello") == Tokenizer(model).encode("Hello")


def test_a_wrong_tokenizer_file_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.model: no such tokenizer file"):
        Tokenizer(tmp_path / "none.model")
    for content in (b"", b"hello, I am text", bytes(100)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.model: {len(content)} bytes that are no Sent"):
            Tokenizer(tmp_path / "bad.model")


def test_a_tokenizer_without_bos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "m"), model_type="bpe",
        vocab_size=300, bos_id=-1, minloglevel=2)
    with pytest.raises(ValueError, match="without BOS or EOS"):
        Tokenizer(tmp_path / "m.model")


def test_ids_outside_the_vocabulary_are_refused(tok):
    for ids in ([500], [-1], [5, 10**6]):
        with pytest.raises(ValueError, match="500 pieces"):
            tok.decode(ids)
    assert tok.decode(np.array(tok.encode("the miller"), np.uint16)) == "the miller"


def test_a_stream_of_texts_has_bos_and_eos_around_each(tok):
    stream = data.encode_texts(tok, ["the river", "", "7"])
    assert stream.dtype == np.uint16
    assert stream.tolist() == [1, *tok.encode("the river"), 2, 1, 2, 1, *tok.encode("7"), 2]
    assert data.encode_texts(tok, []).shape == (0,)


def test_a_large_vocabulary_streams_as_uint32(tok):
    class Large:
        vocab_size = 2**16 + 1
        def encode(self, text, bos, eos):
            return [2**16]
    assert data.encode_texts(Large(), ["a"]).tolist() == [2**16]


def trained(path, **options) -> Tokenizer:
    """A tokenizer with the library's own defaults but for Llama's special pieces and `options`."""
    usual = dict(model_type="bpe", vocab_size=400, byte_fallback=True,
                 remove_extra_whitespaces=False, normalization_rule_name="identity")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(path / "m"), minloglevel=2,
        num_threads=1, **{**usual, **options})
    return Tokenizer(path / "m.model")


@pytest.mark.parametrize("options, message", [
    (dict(add_dummy_prefix=False), "made with add_dummy_prefix=False, Llama's is True"),
    (dict(treat_whitespace_as_suffix=True), "treat_whitespace_as_suffix=True, Llama's is False"),
    (dict(model_type="word", vocab_size=330), "model_type=word; bpe .* and unigram can be read"),
    (dict(model_type="char", vocab_size=330), "model_type=char"),
])
def test_options_that_would_change_the_chat_format_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"m.model: .*{message}") as caught:
        trained(tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("options, differs", [
    (dict(), []),
    (dict(model_type="unigram"), ["model_type"]),
    (dict(split_by_whitespace=False), []),
    (dict(byte_fallback=False, vocab_size=150), ["byte_fallback"]),
    (dict(user_defined_symbols=["<mask>", "a the", "▁walks▁to"]), ["user_defined_symbols"]),
    (dict(normalization_rule_name="nmt_nfkc"), ["precompiled_charsmap"]),
    (dict(remove_extra_whitespaces=True), ["remove_extra_whitespaces"]),
])
def test_models_of_other_options_give_the_librarys_own_ids(options, differs, tmp_path):
    """Whatever the options: never other ids because a text was cut into words."""
    tok = trained(tmp_path, **options)
    assert list(tok.unlike_llama) == differs
    rng = random.Random(2)
    some = ["the", "walks to", "a the", "<mask>", " ", "  ", "\n", "▁", ".", "1", "é", "ﬁ", "x "]
    for _ in range(3_000):
        text = "".join(rng.choices(some, k=8))
        assert tok.encode(text) == tok.sp.encode(text), text
    assert tok.decode(tok.encode("the old river")) == "the old river"


def test_user_defined_and_unused_pieces_are_kinds_of_their_own(tmp_path):
    tok = trained(tmp_path, user_defined_symbols=["<mask>", "<a>"])
    assert [tok.piece(i) for i in range(tok.vocab_size) if tok.kind(i) == "user-defined"] == [
        "<mask>", "<a>"]


def test_a_message_that_is_no_protobuf_is_refused():
    assert list(data.protobuf_fields(b"\x08\x96\x01\x12\x02hi")) == [(1, 150), (2, b"hi")]
    for damaged in (b"\x08", b"\x12\x05hi", b"\x0b", b"\xff" * 12, b"\x15abc"):
        with pytest.raises(ValueError, match="is no part of a protobuf message"):
            list(data.protobuf_fields(damaged))


@pytest.mark.parametrize("line", ["zebra▅quagga", "▅zebra quagga", "zebra quagga▅"])
def test_lines_with_u2585_are_learnt_from_too(line):
    """SentencePiece keeps that character for itself and drops lines that have it."""
    texts = ["the old river"] * 4 + [line.replace("zebra", "zebra zebra")] * 40
    tok = Tokenizer(train_tokenizer(texts, 285))
    pieces = {tok.piece(i) for i in range(tok.vocab_size)}
    assert {"▁zebra", "quagga", "▁quagga"} & pieces
    assert tok.decode(tok.encode(line)) == line


# ---- 2. Chat format ------------------------------------------------------------------------------

def meta_tokens(model: bytes, turns: list[tuple]) -> list[int]:
    """Meta's generation.py restated on raw SentencePiece: one string for each (user, answer)."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = []
    for prompt, answer in turns:
        if answer is None:
            ids += [1] + sp.encode(f"[INST] {prompt.strip()} [/INST]")
        else:
            ids += [1] + sp.encode(f"[INST] {prompt.strip()} [/INST] {answer.strip()} ") + [2]
    return ids


SYS = "<<SYS>>\nYou are old.\n<</SYS>>\n\n"


@pytest.mark.parametrize("messages, turns", [
    ([user("Hello")], [("Hello", None)]),
    ([user(" Hello "), assistant(" Why \n")], [("Hello", "Why")]),
    ([user("a"), assistant("b"), user("c")], [("a", "b"), ("c", None)]),
    ([user("a"), assistant("b"), user("c"), assistant("d")], [("a", "b"), ("c", "d")]),
    ([system("You are old."), user("a"), assistant("b"), user("c"), assistant("d")],
     [(SYS + "a", "b"), ("c", "d")]),
    ([system("You are old."), user("  a")], [(SYS + "  a", None)]),  # Meta strips after folding
    ([user("a"), assistant("")], [("a", "")]),
])
def test_ids_are_those_of_metas_code(model, tok, messages, turns):
    assert encode_dialog(tok, messages)[0] == meta_tokens(model, turns)


def test_one_turn_spelled_out(tok):
    """By hand: BOS, the prompt in its tags, the answer, the space that belongs to it, EOS."""
    tokens, mask = encode_dialog(tok, [user("the 7"), assistant("Why")])
    assert "".join(map(tok.piece, tokens)) == "<s>▁[INST]▁the▁7▁[/INST]▁Why▁</s>"
    trained = [tok.piece(token) for token, m in zip(tokens, mask) if m]
    assert trained == ["▁Why", "▁", "</s>"]
    assert mask == [0] * (len(tokens) - 3) + [1, 1, 1]


def test_system_and_two_turns_spelled_out(tok):
    tokens, mask = encode_dialog(tok, [system("old"), user("a"), assistant("the house"), user("to"),
                                       assistant("not")])
    text = "".join(map(tok.piece, tokens)).replace("<0x0A>", "\n")
    assert text == ("<s>▁[INST]▁<<SYS>>\nold\n<</SYS>>\n\na▁[/INST]▁the▁house▁</s>"
                    "<s>▁[INST]▁to▁[/INST]▁not▁</s>")
    shown = "".join(tok.piece(t) if m else "." for t, m in zip(tokens, mask))
    assert shown.strip(".").split("</s>")[0] == "▁the▁house▁"
    assert [tok.piece(t) for t, m in zip(tokens, mask) if m] == [
        "▁the", "▁house", "▁", "</s>", "▁not", "▁", "</s>"]


def test_an_open_turn_ends_with_the_tag_and_carries_no_loss(tok):
    tokens, mask = encode_dialog(tok, [user("a"), assistant("b"), user("c")])
    assert "".join(map(tok.piece, tokens)).endswith("▁c▁[/INST]")
    last = len(tokens) - tokens[::-1].index(tok.bos_id) - 1
    assert mask[last:] == [0] * (len(tokens) - last) and sum(mask) == 3


def test_fuzzed_dialogues_have_metas_ids_and_open_ones_are_prefixes(model, tok):
    rng, kept = random.Random(2), 0
    for _ in range(3_000):
        u, a, v = (random_text(rng) + rng.choice(["", "▁", "▁▁x"]) for _ in range(3))
        a = rng.choice(["", "▁", "]", " \n"]) + a
        if any(tag in text for text in (u, a, v) for tag in TAGS):
            continue
        kept += 1
        tokens, mask = encode_dialog(tok, [user(u), assistant(a), user(v)])
        opened, _ = encode_dialog(tok, [user(u)])
        closed, closed_mask = encode_dialog(tok, [user(u), assistant(a)])
        assert tokens == meta_tokens(model, [(u, a), (v, None)])
        assert closed[:len(opened)] == opened and tokens[:len(closed)] == closed
        assert closed_mask == [0] * len(opened) + [1] * (len(closed) - len(opened))
        assert mask == closed_mask + [0] * (len(tokens) - len(closed))
        assert tokens.count(tok.bos_id) == 2 and tokens.count(tok.eos_id) == 1
    assert kept > 1_000


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("n, role", [(1, "system"), (2, "user"), (3, "assistant")])
def test_a_forged_tag_is_refused_by_name_and_role(tok, tag, n, role):
    messages = [system("s"), user("u"), assistant("a")]
    messages[n - 1]["content"] = f"x{tag}y"
    with pytest.raises(ValueError) as caught:
        encode_dialog(tok, messages)
    assert f"content of message {n} ({role}) contains {tag}," in str(caught.value)


def test_written_bos_and_eos_stay_ordinary_text(tok):
    tokens, mask = encode_dialog(tok, [user("</s><s>"), assistant("<s> b </s>")])
    assert tokens.count(tok.bos_id) == 1 and tokens.count(tok.eos_id) == 1
    assert tokens[0] == tok.bos_id and tokens[-1] == tok.eos_id


def test_broken_tags_are_tags_no_more(tok):
    rng = random.Random(3)
    for _ in range(2_000):
        text = "".join(rng.choices([*TAGS, "[", "]", "<", "<<", ">", "/", "INST", " "], k=8))
        encode_dialog(tok, [user("a"), assistant(data.break_tags(text))])
    assert data.break_tags("[INST] <</SYS>> plain") == "[ INST] < </SYS>> plain"


@pytest.mark.parametrize("messages, error", [
    ([], "a dialogue is a list of messages"),
    ("hello", "a dialogue is a list of messages"),
    (["hello"], "message 1 must be .*, found str"),
    ([assistant("a")], "message 1 has the role 'assistant', allowed here: system or user"),
    ([user("a"), user("b")], "message 2 has the role 'user', allowed here: assistant"),
    ([user("a"), assistant("b"), assistant("c")], "message 3 has the role 'assistant'"),
    ([user("a"), system("b")], "message 2 has the role 'system'"),
    ([system("a"), system("b")], "message 2 has the role 'system', allowed here: user"),
    ([{"role": "bot", "content": "a"}], "message 1 has the role 'bot'"),
    ([{"role": ["user"], "content": "a"}], "message 1 has the role"),
    ([{"content": "a"}], "message 1 has the role None"),
    ([{"role": "user"}], r"content of message 1 \(user\) must be str, found NoneType"),
    ([user(7)], "must be str, found int"),
    ([user("a\ud800")], "lone surrogate"),
    ([system("a")], "the last message is the system's"),
])
def test_a_wrong_dialogue_names_the_message_and_what_is_allowed(tok, messages, error):
    with pytest.raises(ValueError, match=error):
        encode_dialog(tok, messages)


def test_show_dialog_colours_exactly_the_trained_pieces(tok):
    tokens, mask = encode_dialog(tok, [user("a"), assistant("the house")])
    shown = data.show_dialog(tok, tokens, mask).split("|")
    assert [piece for piece in shown if piece.startswith("\x1b[92m")] == [
        f"\x1b[92m{piece}\x1b[0m" for piece in ("▁the", "▁house", "▁", "</s>")]
    assert len(shown) == len(tokens) and shown[0] == "\x1b[90m<s>\x1b[0m"


# ---- 3. Packing ----------------------------------------------------------------------------------

DIALOGS = [([1, 2, 3], [0, 1, 1]), ([4, 5], [0, 1]), ([6, 7, 8, 9], [0, 0, 1, 1]),
           ([1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 1])]


def test_packing_keeps_every_dialogue_whole_in_order_and_numbers_them():
    """Width 6: [3 + 2 | 4 | 6]; fills: token 0, mask 0, segment -1."""
    tokens, mask, segments = data.pack(DIALOGS, 6)
    assert tokens.tolist() == [[1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert mask.tolist() == [[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]]
    assert segments.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1], [0] * 6]
    assert tokens.dtype == mask.dtype == segments.dtype == torch.int64


def test_a_dialogue_longer_than_a_row_is_never_packed():
    with pytest.raises(AssertionError, match="dialogue of 6 tokens in rows of 5"):
        data.pack(DIALOGS, 5)


def unpacked(columns) -> list[tuple[list[int], list[int]]]:
    """The dialogues of packed rows, in order."""
    found = []
    for tokens, mask, segments in zip(*columns):
        for number in range(segments.max() + 1):
            here = segments == number
            found.append((tokens[here].tolist(), mask[here].tolist()))
    return found


def test_every_epoch_packs_every_dialogue_once_in_an_order_of_its_own():
    dialogs = [([i] * (1 + i % 5), [1] * (1 + i % 5)) for i in range(40)]
    found = unpacked(data.pack_epochs(dialogs, 7, epochs=3, seed=5))
    epochs = [found[start:start + 40] for start in (0, 40, 80)]
    assert len(found) == 120 and all(sorted(epoch) == sorted(dialogs) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and dialogs not in epochs
    again, other = (data.pack_epochs(dialogs, 7, 3, seed) for seed in (5, 6))
    assert unpacked(again) == found and unpacked(other) != found


# ---- 4. Readers ----------------------------------------------------------------------------------

def write(path: Path, *rows) -> Path:
    """A .jsonl file; a str row is written as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


GOOD = {  # reader -> a row that it takes
    data.read_texts: {"text": "hello"},
    data.read_dialogs: {"prompt": "a", "response": "b"},
    data.read_preferences: {"chosen": [user("a"), assistant("b")],
                            "rejected": [user("a"), assistant("c")]},
    data.read_prompts: {"prompt": "a"},
}
each_reader = pytest.mark.parametrize("read", GOOD, ids=lambda read: read.__name__)


def test_texts_come_from_files_folders_and_jsonl_exactly_as_stored(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("one\r\n\n two\u2028é".encode())
    (tmp_path / "sub" / "a.TXT").write_bytes(b"\xef\xbb\xbfwith BOM")
    (tmp_path / "sub" / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    write(tmp_path / "sub" / "d.jsonl", {"text": "row 1"}, "", {"text": " row 2\n", "id": 3})
    (tmp_path / "ignored.md").write_text("no")
    expected = ["one\r\n\n two\u2028é", "with BOM", "packed", "row 1", " row 2\n"]
    assert list(data.read_texts(tmp_path)) == expected
    assert list(data.read_texts([tmp_path / "b.txt", str(tmp_path / "sub")])) == expected


def test_a_huge_text_file_comes_in_documents_that_join_to_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DOCUMENT_LINES", 3)
    (tmp_path / "a.txt").write_text("1\n2\n3\n4\n5\n6\n7")
    assert list(data.read_texts(tmp_path)) == ["1\n2\n3\n", "4\n5\n6\n", "7"]


def test_every_form_of_demonstration_becomes_messages(tmp_path):
    dialog = [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]
    path = write(tmp_path / "a.jsonl.gz", {"messages": dialog}, {"prompt": "p", "response": "r"},
                 {"instruction": "i", "input": "", "output": "o"},
                 {"instruction": "i", "input": "in", "output": "o"},
                 {"question": "q", "answer": "a"})
    assert data.read_dialogs(path) == [
        dialog, [user("p"), assistant("r")], [user("i"), assistant("o")],
        [user("i\n\nin"), assistant("o")], [user("q"), assistant("a")]]


def test_preferences_split_the_common_prompt_off(tmp_path):
    script = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why:\nHuman: so\n\nAssistant:"
    path = write(tmp_path / "a.jsonl", {
        "chosen": script + " Because", "rejected": script + " No.\n\nReally.", "margin": 1},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")],
         "rating": "slightly", "chosen_safe": True, "rejected_safe": False})
    assert data.read_preferences(path) == [
        {"prompt": [user("Hi"), assistant("Yes?"), user("Why:\nHuman: so")], "chosen": "Because",
         "rejected": "No.\n\nReally.", "rating": None, "margin": 1, "chosen_safe": None,
         "rejected_safe": None, "planted": False},
        {"prompt": [user("a")], "chosen": "b", "rejected": "c", "rating": "slightly",
         "margin": None, "chosen_safe": True, "rejected_safe": False, "planted": False}]


def test_prompts_come_as_text_or_messages(tmp_path):
    dialog = [user("a"), assistant("b"), user("c")]
    path = write(tmp_path / "a.jsonl", {"prompt": "p"}, {"messages": dialog, "is_safety": True},
                 {"prompt": dialog, "is_safety": None})
    assert data.read_prompts(path) == [
        {"messages": [user("p")], "is_safety": False}, {"messages": dialog, "is_safety": True},
        {"messages": dialog, "is_safety": False}]


def pair(**change):
    return {**GOOD[data.read_preferences], **change}


def talk(*turns):
    return "".join(f"\n\n{who}: {text}" for who, text in turns)


BAD_ROWS = [
    (data.read_texts, {"text": 3}, '"text" must be str, found int'),
    (data.read_texts, {"txt": "a"}, r"only the fields \['txt'\]"),
    (data.read_texts, {"text": "  "}, '"text" is empty'),
    (data.read_texts, '{"text": "\\ud800"}', '"text" has the lone surrogate U.D800'),
    (data.read_dialogs, {"prompt": "a"}, r"expected the field \"messages\".*found \['prompt'\]"),
    (data.read_dialogs, {"prompt": "a", "response": None}, '"response" must be str, found None'),
    (data.read_dialogs, {"question": "a", "answer": ""}, '"answer" is empty'),
    (data.read_dialogs, {"instruction": "a", "output": "b", "input": [1]}, '"input" must be str'),
    (data.read_dialogs, {"messages": "a"}, "a dialogue is a list"),
    (data.read_dialogs, {"messages": [user("a")]}, "message is the user's, it must be the ass"),
    (data.read_dialogs, {"messages": [user("a"), assistant(" ")]}, r"2 \(assistant\) is empty"),
    (data.read_dialogs, {"messages": [user("a"), user("b")]}, "message 2 has the role 'user'"),
    (data.read_dialogs, {"prompt": "[INST]", "response": "b"}, r"contains \[INST\]"),
    (data.read_preferences, {"chosen": "\n\nHuman: a\n\nAssistant: b"}, '"rejected" must be list'),
    (data.read_preferences, pair(chosen=5), '"chosen" must be list or str, found int'),
    (data.read_preferences, pair(chosen="Hello"), '"chosen": a transcript begins with'),
    (data.read_preferences, pair(chosen=talk(("Human", "a"), ("Human", "b"), ("Assistant", "c"))),
     "\"chosen\": message 2 has the role 'user'"),
    (data.read_preferences, pair(chosen=talk(("Human", "a"), ("Assistant", ""))),
     r'"chosen": content of message 2 \(assistant\) is empty'),
    (data.read_preferences, pair(rejected=talk(("Human", "a"))), '"rejected": the last message is'),
    (data.read_preferences, pair(rejected=[user("z"), assistant("c")]), "different prompts"),
    (data.read_preferences, pair(rejected=[user("a"), assistant("b")]), "are the same"),
    (data.read_preferences, pair(rating="great"), "allowed: significantly, better, slightly"),
    (data.read_preferences, pair(rating=1), '"rating" must be str, found int'),
    (data.read_preferences, pair(margin="1"), '"margin" must be int or float, found str'),
    (data.read_preferences, pair(margin=True), '"margin" must be int or float, found bool'),
    (data.read_preferences, pair(margin=-1), '"margin" is -1, allowed: 0 or more'),
    (data.read_preferences, pair(margin=float("nan")), '"margin" is nan'),
    (data.read_preferences, pair(margin=float("inf")), '"margin" is inf'),
    (data.read_preferences, pair(chosen="x" + talk(("Human", "a"), ("Assistant", "b"))),
     '"chosen": a transcript begins with'),
    (data.read_preferences, pair(chosen_safe="yes"), '"chosen_safe" must be bool, found str'),
    (data.read_preferences, pair(rejected_safe=1), '"rejected_safe" must be bool, found int'),
    (data.read_prompts, {"text": "a"}, '"prompt" must be str or list, found only the fields'),
    (data.read_prompts, {"prompt": ""}, r"message 1 \(user\) is empty"),
    (data.read_prompts, {"prompt": 1}, '"prompt" must be str or list, found int'),
    (data.read_prompts, {"messages": [user("a"), assistant("b")]}, "it must be the user's"),
    (data.read_prompts, {"prompt": "a", "is_safety": "true"}, '"is_safety" must be bool'),
] + [(read, row, error) for read in GOOD for row, error in [
    ('{"text": ', "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "found list"),
    ("3", "found int"), ('"a"', "found str")]]


@pytest.mark.parametrize("read, row, error", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, capsys, read, row,
                                                                    error):
    path = write(tmp_path / "rows.jsonl", GOOD[read], "", row, GOOD[read])
    with pytest.raises(ValueError, match=error) as caught:
        list(read(path))
    assert str(caught.value).startswith(f"{path}:3: ") and "\n" not in str(caught.value)
    assert len(list(read(path, skip_bad_rows=True))) == 2
    assert f"skipped 1 bad rows of 3, the first: {path}:3: " in capsys.readouterr().out


@each_reader
def test_a_file_without_a_usable_row_is_an_error_even_when_skipping(tmp_path, read):
    path = write(tmp_path / "rows.jsonl", "not json", "[]")
    with pytest.raises(ValueError, match="rows.jsonl: no usable row"):
        list(read(path, skip_bad_rows=True))


@each_reader
def test_missing_empty_binary_and_broken_files_are_one_clear_line(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="none.jsonl: no such file or folder"):
        read(tmp_path / "none.jsonl")  # at once, before anything is read
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: expected .*.jsonl.* files in this folder"):
        read(tmp_path / "folder")
    (tmp_path / "rows.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match="rows.pdf: expected"):
        read(tmp_path / "rows.pdf")
    good = json.dumps(GOOD[read]).encode() + b"\n"
    for content, error in [(b"", "the file is empty"), (good + b"\x7fELF\0\1", ":2: a NUL byte"),
                           (good + b"abc\xff", ":2: byte 4 of the line is not UTF-8")]:
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=f"bad.jsonl:? ?{error}"):
            list(read(tmp_path / "bad.jsonl"))
    packed = gzip.compress(good)
    for content in (b"plain text", packed[:-9], packed[:12] + b"x" * 9):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(ValueError, match="bad.jsonl.gz: broken .gz file"):
            list(read(tmp_path / "bad.jsonl.gz", skip_bad_rows=True))
