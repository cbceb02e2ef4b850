"""The state in which influence is measured, and that it is left again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastproj.influence.quiet import measured


class Block(nn.Module):
    """Checkpointed in training mode, as transformers' layers are, with dropout of its own or its config's."""

    gradient_checkpointing = True

    def __init__(self, own: float = 0.0, configured: float = 0.0) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 4), own
        self.config = SimpleNamespace(hidden_dropout=configured, layers=2)

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(self.layer(x), self.dropout, self.training)
        return F.dropout(dropped, self.config.hidden_dropout, self.training)


def selected(model: nn.Module) -> dict[str, nn.Parameter]:
    return {"weight": next(model.parameters())}


@pytest.mark.parametrize(("own", "configured"), [(0.5, 0.0), (0.0, 0.5)])
def test_a_checkpointed_block_that_drops_out_is_quiet(own: float, configured: float) -> None:
    block = Block(own, configured).train()
    x = torch.randn(64, 4)
    with measured(block, selected(block)):
        assert not block.training
        assert torch.equal(block(x), block.layer(x))
    assert block.training


def test_a_checkpointed_block_without_dropout_stays_in_training_mode() -> None:
    model = nn.Sequential(Block(), nn.Dropout(0.5)).train()
    with measured(model, selected(model)):
        assert model[0].training
        assert not model[0].layer.training
        assert not model[1].training
    model.eval()
    with measured(model, selected(model)):
        assert not model[0].training


def test_everything_is_given_back_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    gradient = torch.ones_like(model[0].weight)
    model[0].weight.grad = gradient
    chosen = {"0.bias": model[0].bias}

    def interrupted() -> None:
        with torch.no_grad(), measured(model, chosen):
            assert torch.is_grad_enabled()
            assert [p.requires_grad for p in model.parameters()] == [False, True, False, False]
            assert all(p.grad is None for p in model.parameters())
            model[0].bias.grad = torch.ones_like(model[0].bias)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert model[0].weight.grad is gradient
    assert model[0].bias.grad is None
