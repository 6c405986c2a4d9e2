"""Perceptrons: weights, activations, and what is known of them."""

from .mlp import MLP as MLP, AbstractNetwork as AbstractNetwork
