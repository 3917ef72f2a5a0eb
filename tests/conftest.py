"""Every test imports the repository's files as the scripts do, and computes on one thread.

One thread: the sums then always run in the same order, and test runs side by side stay quick.
"""
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "scale: many processes, minutes long; make test-scale")


CHAIN_VILLAGE = 3


def listen(patch, asked: list) -> None:
    """From now on every split that a village is asked for is noted: [method, split]."""
    import village as V

    splits = {"ask": lambda kind, rng, *splits: splits, "probes": lambda asked: [
        "train" if asked else "test"], "prompts": lambda kind, split, *rest, **more: [split],
              "conversations": lambda turns, split, *rest: [split],
              "instructions": lambda split, *rest: [split]}

    def noted(name):
        original = getattr(V.Village, name)

        def method(self, *args, **more):
            asked.extend([name, split] for split in splits[name](*args, **more)
                         if [name, split] not in asked)
            return original(self, *args, **more)

        return method

    for name in splits:
        patch.setattr(V.Village, name, noted(name))


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """A folder in which all six stages and their exams have been, at toy size, in village 3.

    Read it, never write to it: `shutil.copytree` makes one to write to. The network has 2 layers of
    24 features; the first feature is large everywhere and calls for EOS, so that its nonsense
    ends soon. Every answer counts as obeying an instruction. asked.json: which splits of the
    village the stages asked for, and which the exams.
    """
    import exam, gatt, model as M, ppo, pretrain, rejection, reward, sft

    out = tmp_path_factory.mktemp("chain")
    same = dict(out=str(out), device="cpu", kernels="torch")
    asked = {"stages": [], "exams": []}
    with pytest.MonkeyPatch.context() as patch:
        listen(patch, asked["stages"])
        patch.setitem(M.PRESETS, "toy", M.ModelConfig(dim=24, n_layers=2, n_heads=3, n_kv_heads=1,
                                                      hidden_dim=28, vocab_size=420,
                                                      max_seq_len=256))
        patch.setitem(pretrain.LEARNING_RATE, "toy", 1e-3)
        patch.setattr(gatt, "obeys", lambda row, answer: True)
        pretrain.main(pretrain.Config(**same, model="toy", village=CHAIN_VILLAGE, tokens=2048,
                                      seq_len=64))
        model, info = M.load(out / "pretrain.pt", "cpu")
        with torch.no_grad():
            model.tok_embeddings.weight[:, 0] = 0.5
            model.output.weight.mul_(20)  # answers differ
            model.output.weight[:, 0] = 0
            model.output.weight[2, 0] = 0.6  # EOS
        M.save(out / "pretrain.pt", model, info["stage"], info["tokenizer"], info["metrics"],
               info["trained_on"])
        sft.main(sft.Config(**same, dialogues=40, epochs=1, seq_len=256, lr=1e-6))
        reward.main(reward.Config(**same, pairs=90, valid_pairs=30, batch_size=4, lr=1e-3))
        rejection.main(rejection.Config(**same, rounds=2, prompts=6, samples=2, comparisons=0,
                                        max_new_tokens=12))
        ppo.main(ppo.Config(**same, iterations=2, batch_size=8, minibatch=4, max_new_tokens=12,
                            kl_limit=1e3))
        gatt.main(gatt.Config(**same, dialogues=6, turns=2, replay=4, tries=1, epochs=2,
                              batch_size=2, seq_len=256, max_new_tokens=12))

        few = exam.Config(**same, eval_prompts=2, test_pairs=30, max_new_tokens=12)
        before_the_exams = [*asked["stages"]]
        listen(patch, asked["exams"])
        demonstrated = exam.demonstrated
        patch.setattr(exam, "demonstrated", lambda village: demonstrated(village, 20))
        patch.setattr(exam, "EVAL_TURNS", 2)
        patch.setattr(exam, "ROOM", 8)
        for name in exam.EXAMS:
            exam.main(name, few)
    asked["stages"] = before_the_exams
    (out / "asked.json").write_text(json.dumps(asked))
    return out
