"""Perceptrons: weights, activations, and what is known of them."""

from .mlp import MLP as MLP
from .network import AbstractNetwork as AbstractNetwork
