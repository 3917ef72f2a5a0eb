"""A toy of the chain up to the reward models, for the tests of the rooms behind it.

3,000 words of the village's text stand behind its tokenizer; its networks have 40,000 parameters,
and end about every fourth token: their answers are nonsense of all lengths, some of them cut.
"""
import functools
from pathlib import Path

import torch

import data
import model as M
import village as V


@functools.cache
def village() -> V.Village:
    return V.Village()


@functools.cache
def tokenizer() -> data.Tokenizer:
    return data.Tokenizer(data.train_tokenizer(village().documents(300, 0), 420))


def network(seed: int, scalar_head=False, ending=1.2) -> M.Llama:
    """2 layers; the first of the 24 features is large everywhere, and calls for EOS."""
    config = M.ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=28,
                           vocab_size=tokenizer().vocab_size, max_seq_len=256,
                           scalar_head=scalar_head)
    model = M.Llama(config).init_weights(seed)
    with torch.no_grad():
        model.tok_embeddings.weight[:, 0] = 0.5
        if not scalar_head:
            model.output.weight.mul_(20)  # answers differ
            model.output.weight[:, 0] = 0
            model.output.weight[tokenizer().eos_id, 0] = ending
    return model


def save(path: Path, model: M.Llama, **metrics) -> None:
    """A checkpoint of a stage that has the file's name."""
    M.save(path, model, path.stem, tokenizer().model_bytes, metrics)


def chain(folder: Path) -> Path:
    """An output folder in which `python sft.py` and `python reward.py` have been."""
    save(folder / "sft.pt", network(1))
    save_rewards(folder, 2, 3)
    return folder


def save_rewards(folder: Path, helpful: int, safety: int, **metrics) -> None:
    """Two reward models of these seeds."""
    for seed, which in ((helpful, "helpful"), (safety, "safety")):
        save(folder / f"reward_{which}.pt", network(seed, scalar_head=True), threshold=0.4,
             **metrics)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return M.load(path, "cpu")[0].state_dict()


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two networks are the same, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
