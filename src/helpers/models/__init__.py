"""Networks as functions of their parameters, ``model(params, x)``: one family a module."""

from helpers.models.adapter import from_module
from helpers.models.convnet import ConvNet
from helpers.models.deep_sets import DeepSets
from helpers.models.layers import EPSILON, layer_norm, normalize, stacked, subtree
from helpers.models.lenet import LeNet
from helpers.models.mixed import MixedConvNet, MixedMLP, decided
from helpers.models.mlp import MLP
from helpers.models.physics import Frequency, InertiaNetwork
from helpers.models.policies import GaussianPolicy, log_probability
from helpers.models.seq2seq import Seq2Seq, exact_match, greedy, recurrence, token_accuracy, translation_loss
from helpers.models.tokens import BEGIN, END, PAD
from helpers.models.wide_resnet import WideResNet

__all__ = [
    "BEGIN",
    "ConvNet",
    "DeepSets",
    "END",
    "EPSILON",
    "Frequency",
    "GaussianPolicy",
    "InertiaNetwork",
    "LeNet",
    "MLP",
    "MixedConvNet",
    "MixedMLP",
    "PAD",
    "Seq2Seq",
    "WideResNet",
    "decided",
    "exact_match",
    "from_module",
    "greedy",
    "layer_norm",
    "log_probability",
    "normalize",
    "recurrence",
    "stacked",
    "subtree",
    "token_accuracy",
    "translation_loss",
]
