"""A model in the state in which influence is measured: no dropout, only the selected parameters trainable."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def measured(model: nn.Module, selected: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Evaluation mode and nothing but ``selected`` trainable, with ``.grad`` and modes given back at the end.

    Modules under gradient checkpointing stay in training mode by themselves, since transformers checkpoints
    in training mode alone; those that drop out or skip layers themselves, at a rate of their own or of their
    config, do not, and are run without it.
    """
    modes = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    chosen = set(selected.values())
    try:
        model.eval()
        for module, training in modes.items():
            if training and getattr(module, "gradient_checkpointing", False) and not _drops_out(module):
                module.training = True
        for parameter in trainable:
            parameter.requires_grad_(parameter in chosen)
            parameter.grad = None
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
            parameter.grad = gradients[parameter]


def _drops_out(module: nn.Module) -> bool:
    rates = vars(module)
    methods = [inspect.unwrap(own) for own in vars(type(module)).values() if inspect.isfunction(own)]
    if any("training" in method.__code__.co_names for method in methods):
        rates = {**getattr(getattr(module, "config", None), "__dict__", {}), **rates}
    return any("drop" in name and isinstance(rate, float) and rate > 0 for name, rate in rates.items())
