"""Hooks are installed that transformers leaves on a model for good."""

import torch


def install_recorders(model):
    """transformers hooks a model for good when it is first asked for its hidden states."""
    model(torch.tensor([[5, 6]]), output_hidden_states=True)
