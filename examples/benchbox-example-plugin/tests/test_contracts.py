import torch
from benchbox_example.bit_depth import BitDepth
from benchbox_example.digits_mlp import DigitsMlp
from benchbox_example.momentum import Momentum
from benchbox_example.worst_class import WorstClass

from benchbox import api
from benchbox.testing import contracts

IMAGES = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_model(tmp_path):
    contracts.check_model(DigitsMlp(DigitsMlp.Options()), (1, 8, 8), 10, tmp_path)


def test_attack():
    contracts.check_attack(Momentum(Momentum.Options(steps=5)))


def test_defense(tmp_path):
    model = DigitsMlp(DigitsMlp.Options()).load(tmp_path)
    contracts.check_defense(BitDepth(BitDepth.Options()), model, api.Examples(IMAGES, torch.arange(10)), IMAGES)


def test_metric():
    contracts.check_metric(WorstClass(WorstClass.Options()))
