"""Every test imports the repository's files as the scripts do, and computes on one thread.

One thread: the sums then always run in the same order, and test runs side by side stay quick.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "scale: many processes, minutes long; make test-scale")
