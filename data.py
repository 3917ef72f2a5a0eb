"""What a network reads of anybody's text: tokens, dialogues with their mask, packed rows, files.

Four things that every stage must do alike live here, so that no two stages can disagree:
1. Tokenizer: SentencePiece BPE with Llama's own options, trained in memory or read from a file.
2. Chat format: a dialogue becomes token ids and a loss mask, in `encode_dialog` and nowhere else.
3. Packing: whole dialogues side by side in rows of one width, each with a segment of its own.
4. Readers: the user's own .txt and .jsonl files, each row checked, each error with file and line.
Nothing here knows the village (village.py): made-up rows and real ones take the same way in.

Sources: [L2 §n] the Llama 2 paper (arXiv 2307.09288); [META gen] facebookresearch/llama
llama/generation.py; [META tok] its tokenizer.model, whose training options are stored inside;
[SP] google/sentencepiece, sentencepiece_model.proto. `DEVIATES` marks where we leave them,
`UNSPECIFIED in L2` where they are silent.
"""
import gzip
import io
import itertools
import json
import math
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
import torch

# ---- 1. Tokenizer [L2 §2.2] ----------------------------------------------------------------------

SPACE = "\u2581"  # '▁', SentencePiece's visible space: text 'Hi you' is the pieces '▁Hi' '▁you'
MAX_LINE_BYTES = 4192  # longer training lines would be dropped without a word [META tok]
# A space after something else and before something: the only place where a text may be cut.
CUT = re.compile(f" (?<=[^ {SPACE}] )(?=.)", re.DOTALL)
ACROSS = re.compile(f"[^{SPACE}]{SPACE}")  # in a piece: it reaches from a letter across a space
WORD = 32  # characters; longer ones seldom come twice, so their ids are not kept
# What decides which ids a text has: (part of the file, field, value where it is absent, Llama's).
TRAINER, NORMALIZER = 2, 3  # parts of the file [SP]
OPTIONS = {
    "model_type": (TRAINER, 3, 1, 2),  # 1 unigram, 2 BPE, 3 word, 4 char
    "treat_whitespace_as_suffix": (TRAINER, 24, 0, 0),
    "byte_fallback": (TRAINER, 35, 0, 1),
    "precompiled_charsmap": (NORMALIZER, 2, b"", b""),  # of nmt_nfkc and others: it changes texts
    "add_dummy_prefix": (NORMALIZER, 3, 1, 1),
    "remove_extra_whitespaces": (NORMALIZER, 4, 1, 0),
    "escape_whitespaces": (NORMALIZER, 5, 1, 1)}
USER_DEFINED = 4  # of the kinds of pieces, the one that the library does not tell [SP]


class Tokenizer:
    """Text <-> ids as Llama does it: 0 unknown, 1 BOS, 2 EOS, 3-258 the bytes 0-255, then pieces.

        encode("Hi 42", bos=True) -> <s> ▁Hi ▁ 4 2      digits always stand alone
        encode("\\n")              -> ▁ <0x0A>          no piece for it: the byte itself

    SentencePiece puts one space in front of every text it encodes and drops it when it decodes, so
    leading spaces survive, and a word has the same id at the start of a text as after a space.
    `decode(encode(text)) == text` for all Unicode but two cases: U+2581 comes back as a space, as
    in Llama, and lone surrogates, which are no text, are refused. No text can produce the ids 1
    and 2: a written "<s>" is three ordinary characters.

    Models of other options give the library's own ids (`unlike_llama` lists what differs); but
    without the space in front, or with it behind, the chat format would be another one: refused.
    """

    def __init__(self, path_or_bytes: str | Path | bytes):
        """Reads a tokenizer.model file or its bytes; ValueError if they are something else.

        Also for options that would change what the chat format means; the message names them.
        """
        is_bytes = isinstance(path_or_bytes, bytes)
        name = "tokenizer bytes" if is_bytes else path_or_bytes
        if not is_bytes and not Path(name).is_file():
            raise FileNotFoundError(f"{name}: no such tokenizer file")
        self.model_bytes = path_or_bytes if is_bytes else Path(name).read_bytes()
        refuse_pointer(name, self.model_bytes)
        self.sp = sentencepiece.SentencePieceProcessor()
        try:
            self.sp.load_from_serialized_proto(self.model_bytes)
        except (RuntimeError, UnicodeDecodeError):  # the library's message may quote any bytes
            raise ValueError(f"{name}: {len(self.model_bytes)} bytes that are no SentencePiece "
                             "model; expected a file like Llama's tokenizer.model") from None
        self._word = lru_cache(1 << 16)(self.sp.encode)
        self.vocab_size = self.sp.get_piece_size()  # = rows of tok_embeddings and of output
        self.unk_id, self.bos_id, self.eos_id = self.sp.unk_id(), self.sp.bos_id(), self.sp.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{name}: a tokenizer without BOS or EOS; Llama needs both")
        try:
            self._read_options()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _read_options(self) -> None:
        """Sets `unlike_llama`, `user_defined` (ids) and whether words can be encoded alone."""
        parts = {TRAINER: b"", NORMALIZER: b""}
        self.user_defined, id = set(), 0
        for number, value in protobuf_fields(self.model_bytes):
            if not isinstance(value, bytes):
                continue  # no part and no piece
            if number in parts:
                parts[number] += value  # a part that comes twice counts as one [protobuf]
            elif number == 1:  # a piece; the search is fast, and nearly always enough
                if b"\x18\x04" in value and dict(protobuf_fields(value)).get(3) == USER_DEFINED:
                    self.user_defined.add(id)
                id += 1
        parts = {number: dict(protobuf_fields(part)) for number, part in parts.items()}
        found = {name: parts[part].get(number, absent)
                 for name, (part, number, absent, _) in OPTIONS.items()}
        self.unlike_llama = {name: value for name, value in found.items()
                             if value != OPTIONS[name][3]}
        for name in ("treat_whitespace_as_suffix", "add_dummy_prefix", "escape_whitespaces"):
            if name in self.unlike_llama:
                raise ValueError(f"made with {name}={bool(found[name])}, Llama's is "
                                 f"{bool(OPTIONS[name][3])}: its chat format would be another one; "
                                 f"train the tokenizer with Llama's options")
        if found["model_type"] not in (1, 2):
            kind = {3: "word", 4: "char"}.get(found["model_type"], found["model_type"])
            raise ValueError(f"made with model_type={kind}; bpe (Llama's) and unigram can be read")
        if self.user_defined:
            self.unlike_llama["user_defined_symbols"] = self.piece(min(self.user_defined))
        if not 0 <= self.unk_id < self.vocab_size:
            raise ValueError("a tokenizer without an unknown piece")
        self.sp.decode([self.unk_id])  # its text, too, may be no text: UnicodeDecodeError
        across = any(ACROSS.search(self.piece(id)) for id in range(self.vocab_size))
        self._whole = across or bool(self.unlike_llama)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`, BOS in front and EOS behind on request; ValueError: lone surrogates.

        Word by word, and the ids of the last 65,536 different words are kept: 1.6 times as
        fast as the whole text at once. The space left out at a cut is the one that SentencePiece
        puts in front of the next word: the ids stay the same, because no piece reaches from a
        letter across a space [META tok: split_by_whitespace]. Other models take the text whole.
        """
        check_text(text, "text")
        ids = [self.bos_id] if bos else []
        for word in [text] if self._whole else CUT.split(text):
            ids += self._word(word) if len(word) < WORD else self.sp.encode(word)
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: BOS and EOS vanish, bytes that are no UTF-8 become U+FFFD.

        Raises ValueError for an id outside [0, vocab_size).
        """
        ids = [int(i) for i in ids]  # tensors and arrays welcome
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"cannot decode ids {min(ids)}..{max(ids)}: this tokenizer has "
                             f"{self.vocab_size} pieces; is it the one the model was trained with?")
        return self.sp.decode(ids)

    def piece(self, id: int) -> str:
        """The piece as stored: '▁the', '<0x0A>', '</s>'."""
        return self.sp.id_to_piece(int(id))

    def score(self, id: int) -> float:
        """Merge priority, highest first: minus the rank of the merge; -1e9 for runs of spaces."""
        return self.sp.get_score(int(id))

    def kind(self, id: int) -> str:
        """'normal', 'unknown', 'control' (BOS, EOS), 'byte', 'user-defined' or 'unused'."""
        id = int(id)
        if id in self.user_defined:
            return "user-defined"
        return ("unknown" if self.sp.is_unknown(id) else "control" if self.sp.is_control(id)
                else "byte" if self.sp.is_byte(id) else "unused" if self.sp.is_unused(id)
                else "normal")


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a protobuf message; ValueError if it is none.

    A value is an int, or the bytes of a number, a text or an inner message.
    """
    at, end = 0, len(message)

    def varint() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise IndexError

    try:
        while at < end:
            tag = varint()
            kind = tag & 7
            if kind == 0:
                yield tag >> 3, varint()
                continue
            size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
            if at + size > end:
                raise IndexError
            yield tag >> 3, message[at:at + size]
            at += size
    except (IndexError, KeyError):
        raise ValueError(f"byte {at} is no part of a protobuf message: the file is damaged"
                         ) from None


def refuse_pointer(path, content: bytes) -> None:
    """ValueError if a file's first bytes are git-lfs's note of where the file is."""
    if content.startswith(b"version https://git-lfs.github.com"):
        raise ValueError(f"{path} is a git-lfs pointer, not the file itself: `git lfs pull` in its "
                         f"folder fetches it")


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """One stream of ids, BOS text EOS BOS text EOS ...: uint16 (N,), uint32 above 65,536 pieces.

    UNSPECIFIED in L2: what stands between documents. BOS tells the model that the past no longer
    counts, EOS lets it learn that a text can be over; the chat format frames its turns alike.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    rows = [np.array(tokenizer.encode(text, bos=True, eos=True), dtype) for text in texts]
    return np.concatenate(rows) if rows else np.empty(0, dtype)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_lines: int = 1_000_000) -> bytes:
    """Trains Llama's kind of tokenizer on `texts`; returns the SentencePiece model file's bytes.

    Every option is the one stored in Llama's file [META tok]; the same texts give the same bytes.
    Beyond `max_lines` a uniform sample is used (a million lines: about 11 s and half a GB).
    ValueError: no text, or a `vocab_size` that these texts cannot fill or that leaves no room.
    """
    out, sample, rng = io.BytesIO(), [], random.Random(0)
    for n, line in enumerate(training_lines(texts)):  # reservoir: each line is kept equally likely
        if n < max_lines:
            sample.append(line)
        elif (slot := rng.randrange(n + 1)) < max_lines:
            sample[slot] = line
    if not sample:
        raise ValueError("cannot train a tokenizer: the texts are empty")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample), model_writer=out,
            model_type="bpe", vocab_size=vocab_size,
            split_digits=True,  # "we split all numbers into individual digits" [L2 §2.2]
            byte_fallback=True,  # "bytes to decompose unknown UTF-8 characters" [L2 §2.2]
            normalization_rule_name="identity", remove_extra_whitespaces=False,  # text comes back
            add_dummy_prefix=True, allow_whitespace_only_pieces=True,  # '▁▁▁▁' indents code
            character_coverage=0.99995,  # the rarest .005% of characters are left to their bytes
            max_sentence_length=MAX_LINE_BYTES, max_sentencepiece_length=16,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,  # no padding piece: batches pad by length
            unk_surface=" \u2047 ", num_threads=1, minloglevel=2)  # 2: errors only
    except RuntimeError as error:  # both complaints about the size hold the number that would do
        if most := re.search(r"value <= (\d+)", str(error)):
            raise ValueError(f"vocab_size {vocab_size} is more than this text can fill: at most "
                             f"{most[1]}; choose a smaller one or bring more text") from None
        if least := re.search(r"required_chars.* vs (\d+)", str(error)):
            raise ValueError(f"vocab_size {vocab_size} is too small: 3 special pieces, 256 bytes "
                             f"and this text's characters need at least {least[1]}") from None
        raise
    return demote_spaces(out.getvalue())


def training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines short enough for the trainer, each text cut at newlines and tabs, and at U+2585.

    Llama's vocabulary has no piece with a newline or a tab: they are left to their bytes
    [META tok]. So is U+2585: SentencePiece keeps that character for itself and would silently
    skip the lines that have it. A line of more than MAX_LINE_BYTES is cut at spaces (else
    anywhere) into parts of at most 1,000 characters, 4 bytes each at worst; SentencePiece would
    silently skip it.
    """
    for text in texts:
        check_text(text, "text")
        for line in re.split(r"[\n\t\u2585]+", text):
            if len(line.encode()) <= MAX_LINE_BYTES:
                yield from [line] if line else []
            else:
                yield from re.findall(r"(?s).{1,1000}(?= |$)|.{1,1000}", line)


def demote_spaces(model: bytes) -> bytes:
    """The hidden edit in Llama's file: pieces made of spaces only get the score -1e9 [META tok].

    BPE merges the best score first, so words are now joined before indentation: '▁▁▁' '▁return'.
    As trained, '▁▁▁▁' 'return' would win, and code would see two spellings of each word.

    The file is a protobuf message whose pieces come first, each less than 128 bytes long [SP]:
        0A size  0A n '▁▁'  15 float32  [18 kind]        size and n are one byte each
    """
    out, at = bytearray(model), 0
    while model[at] == 0x0A:
        size, n = model[at + 1], model[at + 3]
        if not model[at + 4:at + 4 + n].decode().strip(SPACE):
            struct.pack_into("<f", out, at + 5 + n, -1e9)
        at += 2 + size
    return bytes(out)


def check_text(text: str, name: str) -> None:
    """ValueError unless `text` is a string that UTF-8 can hold (a lone surrogate is no text)."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be str, found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has the lone surrogate U+{ord(text[error.start]):04X} at "
                         f"position {error.start}; it stands for no character, remove it") from None


# ---- 2. Chat format [META gen] -------------------------------------------------------------------
#
#   <s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST] {answer} </s><s>[INST] {user} [/INST]
#   '----------------- mask 0: given ---------------------''- mask 1 --''---- an open turn: 0 ---'
#
# <s> and </s> are the ids 1 and 2; all else is ordinary text: Llama 2 has no special chat pieces.
# Each (user, answer) pair is encoded by itself. The space before </s> belongs to the format and is
# trained too, else the model would never get as far as </s>. An open turn ends without a space.

TAG = re.compile(r"\[/?INST\]|<</?SYS>>")


def check_dialog(messages: list[dict], last: str | None = None) -> None:
    """ValueError unless `messages` is [system] user assistant user assistant ..., free of tags.

    A tag inside a message would forge a turn, so it is refused, as in Meta's chat [META gen:
    "special tags are not allowed as part of the prompt"]. `break_tags` makes such text harmless.
    With `last`, that role must end the dialogue and no message may be blank (rows of a file).
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"a dialogue is a list of messages, not {messages!r:.40}")
    role, allowed = None, ("system", "user")
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f'message {n} must be {{"role": ..., "content": ...}}, found '
                             f"{type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role not in allowed:
            raise ValueError(f"message {n} has the role {role!r}, allowed here: "
                             f"{' or '.join(allowed)} (a system message may come first, then user "
                             "and assistant take turns)")
        name = f"content of message {n} ({role})"
        check_text(content, name)
        if tag := TAG.search(content):
            raise ValueError(f"{name} contains {tag[0]}, a tag of the chat format; write it in "
                             f"another way, such as {break_tags(tag[0])}")
        if last and not content.strip():
            raise ValueError(f"{name} is empty")
        allowed = ("assistant",) if role == "user" else ("user",)
    if role == "system" or last and role != last:
        raise ValueError(f"the last message is the {role}'s, it must be the {last or 'user'}'s")


def break_tags(text: str) -> str:
    """Puts a space into every chat tag: '[INST]' -> '[ INST]', which is no tag any more.

    For text that a model wrote and that goes back in as history or to a reward model, where a
    refusal would stop the run. User text is refused instead, so that nothing changes unseen.
    """
    return TAG.sub(lambda tag: tag[0][0] + " " + tag[0][1:], text)


def encode_dialog(tokenizer: Tokenizer, messages: list[dict]) -> tuple[list[int], list[int]]:
    """(tokens, loss_mask) of a dialogue: the ids Meta's code gives, 1 on each answer and its EOS.

    messages: [{"role": "system" | "user" | "assistant", "content": str}, ...]. Ends after the last
    answer's EOS or, when the user spoke last, after [/INST], ready for `generate`: the tokens of an
    open dialogue are a prefix of those of the answered one. We "zero-out the loss on tokens from
    the user prompt" [L2 §3.1]; of EOS the paper says nothing, but only its loss teaches to stop.
    Raises ValueError for wrong roles or types and for a tag inside a message.
    """
    check_dialog(messages)
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":  # folded into the first user message, never a turn itself
        contents[:2] = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}"]
    tokens, loss_mask = [], []
    for user, answer in itertools.zip_longest(contents[::2], contents[1::2]):
        prompt = tokenizer.encode(f"[INST] {user.strip()} [/INST]", bos=True)
        # Meta encodes "[INST] user [/INST] answer " as one string. In two parts the ids are the
        # same, since SentencePiece puts back the space at the cut (see Tokenizer.encode), and the
        # edge of the mask is exact by construction.
        response = [] if answer is None else tokenizer.encode(f"{answer.strip()} ", eos=True)
        tokens += prompt + response
        loss_mask += [0] * len(prompt) + [1] * len(response)
    return tokens, loss_mask


def show_dialog(tokenizer: Tokenizer, tokens: list[int], loss_mask: list[int]) -> str:
    """One line for the terminal, pieces divided by '|': green carries loss, grey does not."""
    return "|".join(f"\x1b[{92 if trained else 90}m{tokenizer.piece(token)}\x1b[0m"
                    for token, trained in zip(tokens, loss_mask, strict=True))


# ---- 3. Packing ----------------------------------------------------------------------------------
#
#   tokens    <s> [INST] hi [/INST] hello </s> <s> [INST] bye [/INST] ...   0   0
#   loss_mask  0     0   0     0      1    1    0     0    0     0    ...   0   0
#   segments   0     0   0     0      0    0    1     1    1     1    ...  -1  -1
#
# A token sees its own segment only (UNSPECIFIED in L2), so an answer is learnt as it will be asked
# for: with its own dialogue in front of it and nothing else.


def pack(dialogs: list[tuple[list[int], list[int]]], width: int):
    """Fill rows of `width` tokens with whole dialogues, in order: three int64 tensors (N, width).

    dialogs: (tokens, loss_mask) each; none may be longer than `width`. Returns tokens, loss_mask
    and segments as drawn above. DEVIATES: the paper fills its rows; here no dialogue is cut.
    """
    rows = []
    room = 0
    for tokens, loss_mask in dialogs:
        assert len(tokens) <= width, f"dialogue of {len(tokens)} tokens in rows of {width}"
        if len(tokens) > room:
            rows.append(([], [], []))
            room = width
        row_tokens, row_mask, row_segments = rows[-1]
        segment = row_segments[-1] + 1 if row_segments else 0
        row_tokens.extend(tokens)
        row_mask.extend(loss_mask)
        row_segments.extend([segment] * len(tokens))
        room -= len(tokens)
    columns = []
    for i, padding in enumerate((0, 0, -1)):
        filled = [row[i] + [padding] * (width - len(row[i])) for row in rows]
        columns.append(torch.tensor(filled))
    return tuple(columns)


def pack_epochs(dialogs: list[tuple[list[int], list[int]]], width: int, epochs: int, seed: int):
    """All rows of a run in order, as `pack`: every epoch shuffles and packs the dialogues anew."""
    packed = []
    for epoch in range(epochs):
        order = random.Random(f"{seed} {epoch}").sample(dialogs, len(dialogs))
        packed.append(pack(order, width))
    return tuple(torch.cat(columns) for columns in zip(*packed))


# ---- 4. Readers of the user's own files ----------------------------------------------------------
#
#   read_texts        .txt, or .jsonl rows {"text": "..."}
#   read_dialogs      {"messages": [...]}, or one of the pairs of ANSWERED below
#   read_preferences  {"chosen": D, "rejected": D, "rating": "better", "chosen_safe": true, ...}
#   read_prompts      {"prompt": "..."} or {"messages": [...]}, {"is_safety": true}
#
# `paths` is a file, a folder (searched through) or a list of them; `.gz` is read as is. .jsonl is
# one JSON object a line, blank lines ignored. A bad row stops with `file:line: what is wrong`, or
# is counted and skipped with `skip_bad_rows`; a file that is no text at all always stops.

RATINGS = ("significantly", "better", "slightly", "negligibly")  # how much better [L2 §3.2.1]
ANSWERED = (("prompt", "response"), ("instruction", "output"), ("question", "answer"))
DOCUMENT_LINES = 100_000  # a longer .txt file becomes several documents: memory stays bounded


def read_texts(paths, skip_bad_rows: bool = False) -> Iterator[str]:
    """Documents of .txt files (one a file) and .jsonl files (one a row), in order, as stored.

    Missing or unsuitable paths raise at once, bad content when it is reached.
    """
    def documents(path: Path) -> Iterator[str]:
        if ".jsonl" in path.name.lower():
            yield from read_rows([path], lambda row: field(row, "text", str), skip_bad_rows)
        else:
            lines = (line for _, line in read_lines(path))
            while text := "".join(itertools.islice(lines, DOCUMENT_LINES)):
                yield text
    return itertools.chain.from_iterable(map(documents, find_files(paths, ".txt", ".jsonl")))


def read_dialogs(paths, skip_bad_rows: bool = False) -> list[list[dict]]:
    """Demonstrations for fine-tuning: message lists that end with the assistant."""
    def parse(row: dict) -> list[dict]:
        messages = row.get("messages")
        if messages is None:
            pair = next((pair for pair in ANSWERED if row.keys() >= set(pair)), None)
            if pair is None:
                raise ValueError(f'expected the field "messages", or one of the pairs {ANSWERED}, '
                                 f"found {sorted(row)}")
            user, answer = field(row, pair[0], str), field(row, pair[1], str)
            if pair[0] == "instruction" and row.get("input"):  # the optional third field
                user += "\n\n" + field(row, "input", str)
            messages = [{"role": "user", "content": user},
                        {"role": "assistant", "content": answer}]
        check_dialog(messages, last="assistant")
        return messages
    return list(read_rows(find_files(paths, ".jsonl"), parse, skip_bad_rows))


def read_preferences(paths, skip_bad_rows: bool = False) -> list[dict]:
    """Comparisons for the reward model: two dialogues that differ only in their last answer.

    Each becomes {"prompt": messages, "chosen": str, "rejected": str, "rating": one of RATINGS or
    None, "margin": number or None, "chosen_safe": bool or None, "rejected_safe": bool or None,
    "planted": bool, whether an answer was written for the pair and not sampled from a model}.
    A dialogue is a list of messages or a "\\n\\nHuman: ...\\n\\nAssistant: ..." transcript.
    """
    return list(read_rows(find_files(paths, ".jsonl"), parse_preference, skip_bad_rows))


def parse_preference(row: dict) -> dict:
    """A row of a preference file as `read_preferences` returns it; ValueError for a bad one."""
    sides = {}
    for side in ("chosen", "rejected"):
        messages = field(row, side, list, str)
        try:
            sides[side] = split_transcript(messages) if type(messages) is str else messages
            check_dialog(sides[side], last="assistant")
        except ValueError as error:
            raise ValueError(f'"{side}": {error}') from None
    (*prompt, chosen), (*prompt_too, rejected) = sides["chosen"], sides["rejected"]
    if prompt != prompt_too:
        raise ValueError('"chosen" and "rejected" have different prompts: they may differ '
                         "only in the last answer")
    if chosen["content"] == rejected["content"]:
        raise ValueError('"chosen" and "rejected" are the same, there is nothing to prefer')
    rating = field(row, "rating", str, default=None)
    margin = field(row, "margin", int, float, default=None)
    if rating not in (None, *RATINGS):
        raise ValueError(f'"rating" is {rating!r}, allowed: {", ".join(RATINGS)}')
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f'"margin" is {margin}, allowed: 0 or more')
    return {"prompt": prompt, "chosen": chosen["content"], "rejected": rejected["content"],
            "rating": rating, "margin": margin,
            "chosen_safe": field(row, "chosen_safe", bool, default=None),
            "rejected_safe": field(row, "rejected_safe", bool, default=None),
            "planted": field(row, "planted", bool, default=False)}


def read_prompts(paths, skip_bad_rows: bool = False) -> list[dict]:
    """Prompts for RLHF: [{"messages": a dialogue ending with the user, "is_safety": bool}, ...]."""
    def parse(row: dict) -> dict:
        messages = field(row, "messages" if "messages" in row else "prompt", str, list)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        check_dialog(messages, last="user")
        return {"messages": messages, "is_safety": field(row, "is_safety", bool, default=False)}
    return list(read_rows(find_files(paths, ".jsonl"), parse, skip_bad_rows))


def split_transcript(text: str) -> list[dict]:
    """Messages of an Anthropic-style transcript, "\\n\\nHuman: Hi\\n\\nAssistant: Hello"."""
    before, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if before.strip() or not parts:
        raise ValueError(f'a transcript begins with "\\n\\nHuman: ", this one with {text[:20]!r}')
    return [{"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
            for speaker, content in zip(parts[::2], parts[1::2])]


def field(row: dict, name: str, *types: type, default=...):
    """row[name] if it has one of `types`, else ValueError; missing or null may give `default`."""
    value = row.get(name)
    if value is None and default is not ...:
        return default
    if type(value) not in types:  # not isinstance: true is no number
        found = type(value).__name__ if name in row else f"only the fields {sorted(row)}"
        expected = " or ".join(t.__name__ for t in types)
        raise ValueError(f'"{name}" must be {expected}, found {found}')
    if types == (str,):
        check_text(value, f'"{name}"')
        if not value.strip():
            raise ValueError(f'"{name}" is empty')
    return value


def read_rows(files: list[Path], parse: Callable, skip_bad_rows: bool) -> Iterator:
    """parse(row) for each row of .jsonl files; ValueError with file:line, or if no row is good."""
    good, bad = 0, []
    for path, (number, line) in ((path, row) for path in files for row in read_lines(path)):
        try:
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected one JSON object a line, found {type(row).__name__}")
            row = parse(row)
        except (ValueError, RecursionError) as error:
            what = "not JSON: " if isinstance(error, (json.JSONDecodeError, RecursionError)) else ""
            bad.append(f"{path}:{number}: {what}{error}")
            if not skip_bad_rows:
                raise ValueError(f"{bad[0]} (--skip-bad-rows passes over such rows)") from None
        else:
            good += 1
            yield row
    if bad:
        print(f"skipped {len(bad)} bad rows of {len(bad) + good}, the first: {bad[0]}")
    if not good:
        raise ValueError(f"{', '.join(map(str, files))}: no usable row inside")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line with its newline) of a UTF-8 file or .gz; ValueError if it is neither."""
    number = 0
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if number == 1:
                    refuse_pointer(path, raw)
                if b"\0" in raw:
                    raise ValueError(f"{path}:{number}: a NUL byte, so this is no UTF-8 text file")
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")  # drops a BOM
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8 text "
                         "(iconv converts other encodings)") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: broken .gz file ({error}), is it complete?") from None
    if number == 0:
        raise ValueError(f"{path}: the file is empty")


def find_files(paths, *suffixes: str) -> list[Path]:
    """The files at `paths` with one of these suffixes, folders searched, in a fixed order."""
    files, wanted = [], suffixes + tuple(suffix + ".gz" for suffix in suffixes)
    for path in map(Path, [paths] if isinstance(paths, (str, Path)) else paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in inside if file.is_file() and file.name.lower().endswith(wanted)]
        if not found:
            raise ValueError(f"{path}: expected {' or '.join(wanted)}"
                             f"{' files in this folder' if path.is_dir() else ''}")
        files += found
    return files
