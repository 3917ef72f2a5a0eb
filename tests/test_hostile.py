"""Ten thousand damaged or hostile inputs per reader: one line each, no crash, no code run.

Each reader has a process of its own, so that a crash is seen, and its memory is measured: what a
file claims must not be allocated before it is known to be there. Half of the inputs are valid
files with damaged bytes, half have one value that is wrong on purpose: a size beyond all memory, a
negative one, another type, a list within lists, a tensor whose rows are all the same bytes.
"""
import json
import math
import os
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import convert
import data
import model as M
import scale
import stage

INPUTS = 10_000  # per reader
PEAK = 400  # MB that the address space may grow: no input is larger than 0.1 MB
TEXTS = ["the old miller walks to the river and asks why 17 times\n    return x\n"] * 9
NUMBERS = [0, 1, 2, 3, 127, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1,
           2**64 - 1]
VALUES = [None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 1e308, 1e-320,
          -0.5, math.nan, math.inf, "", "x", "7", "\u2581", "../../x", [], {}, [1, 2], {"a": 1},
          [[]], "F32", "llama", "object"]


class Attack:
    """A pickle of it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


WHOLE = {}  # the bytes of each sample that torch.save wrote, by the sample's id

# ---- damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The same bytes but for one to three accidents, near the beginning more often."""
    out = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        reach = rng.choice([16, 64, 512, len(out)])
        at = rng.randrange(max(min(reach, len(out)), 1))
        kind, size = rng.randrange(7), rng.choice([1, 4, 8, 50])
        if kind == 0:
            del out[at:]
        elif kind == 1 and out:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at:at + size] = rng.randbytes(size)
        elif kind == 3:
            out[at:at + size] = rng.choice([b"\0", b"\xff", b"\x7f"]) * size
        elif kind == 4:
            out[at:at] = out[at:at + size]
        elif kind == 5:
            del out[at:at + size]
        else:
            number = rng.choice(NUMBERS)
            width = rng.choice([4, 8])
            out[at:at + width] = (number % 256**width).to_bytes(width, "little")
    return bytes(out)


def twisted(value, rng: random.Random, others):
    """A copy of a nested value in which one place holds something that does not belong there."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        copy, kind = dict(value), rng.randrange(8)
        if kind == 0:
            del copy[key]
        elif kind == 1:
            copy[rng.choice(["x", "", 7, key + "x" if isinstance(key, str) else 8])] = copy.pop(key)
        else:
            copy[key] = twisted(value[key], rng, others)
        return copy
    if isinstance(value, list) and value and rng.random() < 0.8:
        copy = list(value)
        place = rng.randrange(len(copy))
        copy[place] = twisted(copy[place], rng, others)
        return copy
    return others(value, rng)


def other_value(value, rng: random.Random):
    """Anything that JSON can hold."""
    return rng.choice(VALUES)


def other_tensor(value, rng: random.Random):
    """Anything that torch.save can hold; in place of a tensor often a strange tensor."""
    strange = [torch.ones(1).expand(2**20, 2**20), torch.empty(0), torch.ones(3, 4, 5),
               torch.ones(3, dtype=torch.int64), torch.tensor(math.nan),
               torch.empty(5, device="meta"), torch.ones(4, 4).to_sparse(),
               torch.ones(4, dtype=torch.complex64), torch.ones(2, 2).T,
               torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
               torch.ones(1, dtype=torch.uint8).expand(2**40)]
    if isinstance(value, torch.Tensor) and rng.random() < 0.3 and value.dim() == 2:
        return value[:1].expand(value.shape)
    kind = rng.random()
    if kind < 0.1:
        return Attack()
    return rng.choice(strange if kind < 0.6 else [v for v in VALUES if v != "object"])


def json_bytes(value, rng: random.Random) -> bytes:
    """JSON with one wrong value, or with damaged bytes, or nested without end."""
    kind = rng.random()
    if kind < 0.02:
        return b"[" * 50_000
    if kind < 0.04:
        return b'{"a":' * 50_000
    if kind < 0.3:
        return damaged(json.dumps(value).encode(), rng)
    return json.dumps(twisted(value, rng, other_value)).encode()


def torch_file(value, path: Path, rng: random.Random) -> None:
    """A torch.save file with one wrong value, or with damaged bytes."""
    if rng.random() < 0.5:
        torch.save(twisted(value, rng, other_tensor), path)
    else:
        if id(value) not in WHOLE:
            torch.save(value, path)
            WHOLE[id(value)] = path.read_bytes()
        path.write_bytes(damaged(WHOLE[id(value)], rng))


# ---- one valid example of each, and what reads it


class Samples:
    """A network and a tokenizer that every format holds; small, since it is written so often."""

    def __init__(self):
        self.tokenizer = data.train_tokenizer(TEXTS, 280)
        config = M.ModelConfig(8, 1, 2, 1, 32, 280, 16)
        self.network = M.Llama(config).init_weights()
        home = Path("samples")
        home.mkdir()
        M.save(home / "own.pt", self.network, "sft", self.tokenizer)
        for to, name in (("meta", "meta"), ("hf", "hf"), ("llama2c", "x.bin"), ("gguf", "x.gguf")):
            flags = convert.Config(checkpoint=str(home / "own.pt"), to=to, out=str(home / name))
            convert.main(flags)
        convert.main(convert.Config(checkpoint=str(home / "own.pt"), to="gguf", dtype="q8_0",
                                    out=str(home / "q.gguf")))
        self.own = torch.load(home / "own.pt", weights_only=True)
        self.files = {p.relative_to(home).as_posix(): p.read_bytes()
                      for p in home.rglob("*") if p.is_file()}
        self.shard = torch.load(home / "meta/consolidated.00.pth", weights_only=True)

    def folder(self, name: str, at: Path, without: str) -> None:
        """Copy a sample folder but for one file."""
        at.mkdir()
        for path, content in self.files.items():
            if path.startswith(name + "/") and not path.endswith("/" + without):
                (at / Path(path).name).write_bytes(content)


def use(source: convert.Source) -> None:
    """Read every weight, and encode and decode with the tokenizer."""
    for w in source.weights.values():
        float(w.read().sum())
    text = source.tokenizer
    text.decode(text.encode("the miller \u00e9"))


def checkpoint(s: Samples, at: Path, rng) -> None:
    torch_file(s.own, at, rng)
    network, info = M.load(at, "cpu")
    for p in network.parameters():
        float(p.detach().sum())
    data.Tokenizer(info["tokenizer"]).encode("the miller")


def meta(s: Samples, at: Path, rng) -> None:
    if rng.random() < 0.5:
        s.folder("meta", at, "params.json")
        params = json.loads(s.files["meta/params.json"])
        (at / "params.json").write_bytes(json_bytes(params, rng))
    else:
        s.folder("meta", at, "consolidated.00.pth")
        torch_file(s.shard, at / "consolidated.00.pth", rng)
    use(convert.open_model(at))


def safetensors(s: Samples, at: Path, rng) -> None:
    content = s.files["hf/model.safetensors"]
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.5:
        header = json_bytes(json.loads(content[8:8 + size]), rng)
        content = len(header).to_bytes(8, "little") + header + content[8 + size:]
    else:
        content = damaged(content, rng)
    at.write_bytes(content)
    for t in convert.read_safetensors(at).values():
        if t.is_floating_point():
            float(t.double().sum())


def hf_config(s: Samples, at: Path, rng) -> None:
    s.folder("hf", at, "config.json")
    config = json.loads(s.files["hf/config.json"])
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (at / "config.json").write_bytes(json_bytes(config, rng))
    if rng.random() < 0.3:
        (at / "config.json").write_bytes(s.files["hf/config.json"])
        index = {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
        (at / "model.safetensors.index.json").write_bytes(json_bytes(index, rng))
    use(convert.open_model(at))


def llama2c(s: Samples, at: Path, rng) -> None:
    content, tokenizer = s.files["x.bin"], s.files["x.tokenizer.bin"]
    if rng.random() < 0.3:
        tokenizer = damaged(tokenizer, rng)
    else:
        content = damaged(content, rng)
        if rng.random() < 0.3:
            head = struct.pack("<4si7i?i", b"24ka", rng.choice([1, 2, 3]), 8, 32, 1, 2, 1, 280, 16,
                               rng.random() < 0.5, rng.choice([-1, 0, 1, 4, 7, 8, 2**31 - 1]))
            content = damaged(head.ljust(256, b"\0"), rng) + content[28:]
    path = at.with_suffix(".bin")
    path.write_bytes(content)
    path.with_suffix(".tokenizer.bin").write_bytes(tokenizer)
    use(convert.open_model(path))


def gguf(s: Samples, at: Path, rng) -> None:
    content = bytearray(s.files[rng.choice(["x.gguf", "q.gguf"])])
    if rng.random() < 0.5:  # a number behind one of the names in the header
        names = [b"llama.", b"tokenizer.ggml.", b"blk.0.", b"general.", b"output", b"token_embd"]
        places = [i for name in names for i in find_all(content, name)]
        at_name = rng.choice(places)
        size = int.from_bytes(content[at_name - 8:at_name], "little")
        spot = at_name + size + rng.choice([0, 4, 8, 12, 16, 20, 24])
        number, width = rng.choice(NUMBERS), rng.choice([4, 8])
        content[spot:spot + width] = (number % 256**width).to_bytes(width, "little")
    else:
        content = damaged(bytes(content), rng)
    path = at.with_suffix(".gguf")
    path.write_bytes(content)
    use(convert.open_model(path))


def find_all(content: bytes, part: bytes) -> list[int]:
    """Every place of `part`."""
    places, at = [], content.find(part)
    while at >= 0:
        places.append(at)
        at = content.find(part, at + 1)
    return places


def tokenizer(s: Samples, at: Path, rng) -> None:
    content = s.tokenizer
    if rng.random() < 0.5:
        fields = list(data.protobuf_fields(content))
        place = rng.randrange(len(fields))
        number, value = fields[place]
        kind = rng.randrange(4)
        if kind == 0:
            value = damaged(value, rng)
        elif kind == 1:
            value += convert.protobuf_field(rng.randrange(1, 50), rng.choice(NUMBERS))
        elif kind == 2:
            value += convert.protobuf_field(rng.randrange(1, 50), rng.randbytes(3))
        else:
            number = rng.choice([1, 2, 3, 5, 9])
        fields[place] = (number, value)
        content = b"".join(convert.protobuf_field(n, v) for n, v in fields)
    else:
        content = damaged(content, rng)
    at.write_bytes(content)
    text = data.Tokenizer(at)
    text.decode(text.encode("the miller \u00e9\n", bos=True, eos=True))
    convert.check_portable(text, "hf")
    convert.tokenizer_json(text)


def manifest(s: Samples, at: Path, rng) -> None:
    at.mkdir()
    (at / "tokenizer.model").write_bytes(s.tokenizer)
    (at / "00000000.bin").write_bytes(bytes(400))
    value = {"tokenizer": 1, "vocab_size": 280, "source": {"a": [1, 2]}, "megabytes": 8,
             "dtype": "uint16", "files": {"00000000.bin": 200}}
    (at / "shards.json").write_bytes(json_bytes(value, rng))
    train, val, _ = scale.read_shards(str(at))
    train[0:50], val[0:50]


def jsonl(s: Samples, at: Path, rng) -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rest = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No"}]
    row, read = rng.choice([
        ({"messages": talk}, data.read_dialogs),
        ({"prompt": "a", "response": "b"}, data.read_dialogs),
        ({"chosen": talk, "rejected": rest, "rating": "better", "margin": 0.5, "chosen_safe": True},
         data.read_preferences),
        ({"prompt": "a", "is_safety": True}, data.read_prompts), ({"text": "a"}, data.read_texts),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
         data.read_preferences)])
    path = at.with_suffix(rng.choice([".jsonl", ".jsonl.gz"]))
    path.write_bytes(json.dumps(row).encode() + b"\n" + json_bytes(row, rng))
    list(read(path))


def resume_state(s: Samples, at: Path, rng) -> None:
    network = M.Llama(s.network.config).init_weights()
    optimizer = stage.adamw(network, 1e-3, 0.1)
    alone = scale.Ranks(torch.device("cpu"))
    if not hasattr(s, "state"):
        network(torch.ones(1, 4, dtype=torch.long)).sum().backward()
        optimizer.step()
        scale.save_state("good.state.pt", network, optimizer, {"step": 3}, alone)
        s.state = torch.load("good.state.pt", weights_only=True)
    path = at.with_suffix(".state.pt")
    torch_file(s.state, path, rng)
    scale.load_state(path, network, optimizer, alone)


READERS = {f.__name__: f for f in (checkpoint, meta, safetensors, hf_config, llama2c, gguf,
                                   tokenizer, manifest, jsonl, resume_state)}


# ---- the process of one reader, and the test


def memory(which: str) -> float:
    """VmPeak or VmHWM of this process, MB; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    return int(status.read_text().split(which + ":")[1].split()[0]) / 1024


def try_all(name: str, number: int) -> dict:
    """Give `number` inputs to one reader; what was refused, and what went wrong."""
    warnings.simplefilter("ignore")  # torch's, about the strange tensors
    torch.set_num_threads(1)
    samples, read = Samples(), READERS[name]
    refused, problems = 0, []
    before = memory("VmPeak"), memory("VmHWM")
    for i in range(number):
        rng, at = random.Random(i), Path("inputs") / str(i)
        at.parent.mkdir(exist_ok=True)
        try:
            read(samples, at, rng)
        except (ValueError, OSError) as e:  # what `stage.run` says in one line
            refused += 1
            if len(str(e)) > 1500 or type(e) in (OSError, UnicodeDecodeError, json.JSONDecodeError):
                problems.append(f"{i}: {type(e).__name__}: {str(e)[:200]}")
        except Exception as e:
            problems.append(f"{i}: {type(e).__name__}: {str(e)[:200]}")
        for path in sorted(Path("inputs").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return {"refused": refused, "problems": problems[:20], "number": len(problems),
            "grown": [memory("VmPeak") - before[0], memory("VmHWM") - before[1]],
            "attacked": Path("attacked").exists()}


@pytest.mark.scale
@pytest.mark.parametrize("name", READERS)
def test_hostile_inputs_are_one_line_each(name, tmp_path):
    done = subprocess.run([sys.executable, __file__, name, str(INPUTS)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["number"] == 0, result["problems"]
    assert result["refused"] > INPUTS / 4 and not result["attacked"], result
    assert max(result["grown"]) < PEAK, result


if __name__ == "__main__":
    print(json.dumps(try_all(sys.argv[1], int(sys.argv[2]))))
