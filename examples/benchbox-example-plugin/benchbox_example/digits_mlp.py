"""digits-mlp: a model with a weight file of its own."""

from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import nn

from benchbox import api
from benchbox.identity import file_digest

WEIGHTS = Path(__file__).parent / "digits-mlp.safetensors"


class DigitsMlp(api.Model):
    """A perceptron with one hidden layer for scikit-learn's 8x8 digits, trained by digits-mlp.toml."""

    name = "digits-mlp"

    class Options(api.Options):
        weights: Literal["trained", "none"] = "trained"

    def load(self, data_dir):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        if self.options.weights == "trained":
            network.load_state_dict(safetensors.torch.load_file(WEIGHTS))
        return network.eval()

    def fingerprint(self, data_dir):
        return file_digest(WEIGHTS) if self.options.weights == "trained" else ""
