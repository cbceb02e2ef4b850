"""Adam's moments found by name: live, saved by torch, saved by the Trainer, and where they do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from single_samples import trained_adamw
from tiny_models import gpt2
from torch import nn

import fastproj
from fastproj.influence.optimizer_state import adam_states


@pytest.fixture
def scorer() -> fastproj.InfluenceScorer:
    return fastproj.InfluenceScorer(gpt2().model)


def same_states(first: Any, second: Any) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[name].exp_avg, second[name].exp_avg)
        and torch.equal(first[name].exp_avg_sq, second[name].exp_avg_sq)
        and first[name].step == second[name].step
        for name in first
    )


def test_a_live_optimizer_is_matched_by_identity(scorer: fastproj.InfluenceScorer) -> None:
    backwards = dict(reversed(scorer.parameters.items()))
    optimizer = torch.optim.Adam(backwards.values(), lr=1e-3, betas=(0.8, 0.95), eps=1e-6)
    for parameter in backwards.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    states = adam_states(optimizer, scorer.model, scorer.parameters)
    for name, parameter in scorer.parameters.items():
        assert torch.equal(states[name].exp_avg, optimizer.state[parameter]["exp_avg"])
        assert (states[name].step, states[name].beta1, states[name].beta2) == (1, 0.8, 0.95)
        assert states[name].eps == 1e-6


def test_a_file_is_matched_by_order(scorer: fastproj.InfluenceScorer, tmp_path: Path) -> None:
    optimizer = trained_adamw(scorer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = adam_states(optimizer, scorer.model, scorer.parameters)
    for source in (tmp_path, tmp_path / "optimizer.pt", str(tmp_path)):
        assert same_states(adam_states(source, scorer.model, scorer.parameters), live)


def test_names_in_a_file_come_before_order(scorer: fastproj.InfluenceScorer, tmp_path: Path) -> None:
    optimizer = trained_adamw(scorer)
    live = adam_states(optimizer, scorer.model, scorer.parameters)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    group["params"].reverse()
    group["param_names"] = list(reversed(scorer.parameters))
    torch.save(saved, tmp_path / "optimizer.pt")
    assert same_states(adam_states(tmp_path, scorer.model, scorer.parameters), live)


def test_the_trainers_two_groups_are_told_apart(tmp_path: Path) -> None:
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "last": nn.Linear(3, 3)})
    parameters = dict(model.named_parameters())
    decayed = ["first.weight", "last.weight"]
    groups = [
        {"params": [parameters[name] for name in decayed]},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = adam_states(optimizer, model, parameters)
    assert same_states(adam_states(tmp_path, model, parameters), live)


def test_groups_are_told_apart_as_the_trainer_does(tmp_path: Path) -> None:
    from transformers import Trainer

    names = ["prenorm", "norm", "q_norm", "ln_1", "RMSNorm", "normal"]
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in names})
    model["ln_1"] = nn.LayerNorm(3)
    parameters = dict(model.named_parameters())
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    assert decayed == {"prenorm.weight", "normal.weight"}
    groups = [[p for name, p in parameters.items() if (name in decayed) is kept] for kept in (True, False)]
    optimizer = torch.optim.AdamW([{"params": own} for own in groups], fused=True)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    live = adam_states(optimizer, model, parameters)
    assert same_states(adam_states(tmp_path, model, parameters), live)


@pytest.mark.parametrize("kind", [torch.optim.RAdam, torch.optim.NAdam])
def test_other_optimizers_with_two_moments_are_refused(
    scorer: fastproj.InfluenceScorer, kind: Any, tmp_path: Path
) -> None:
    optimizer = kind(scorer.parameters.values())
    for parameter in scorer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for source in (optimizer, tmp_path):
        with pytest.raises(ValueError, match="got that of RAdam or NAdam"):
            adam_states(source, scorer.model, scorer.parameters)


def test_groups_have_their_own_constants(scorer: fastproj.InfluenceScorer) -> None:
    first, *rest = scorer.parameters.values()
    options = {"betas": (0.5, 0.25), "eps": 1e-3}
    optimizer = torch.optim.AdamW([{"params": [first], **options}, {"params": rest}], betas=(0.75, 0.5))
    for parameter in scorer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = list(adam_states(optimizer, scorer.model, scorer.parameters, "less").values())
    assert [(s.beta1, s.beta2, s.eps) for s in states[:2]] == [(0.5, 0.25, 1e-3), (0.75, 0.5, 1e-8)]
    assert {s.variant for s in states} == {"less"}
    assert {s.exp_avg.dtype for s in states} == {torch.float64}
    narrow = adam_states(optimizer, scorer.model.bfloat16(), scorer.parameters)
    assert {s.exp_avg_sq.dtype for s in narrow.values()} == {torch.float32}


def test_an_optimizer_that_has_not_stepped_is_refused(scorer: fastproj.InfluenceScorer) -> None:
    optimizer = torch.optim.AdamW(scorer.parameters.values())
    with pytest.raises(ValueError, match="has taken no step"):
        adam_states(optimizer, scorer.model, scorer.parameters)


def test_another_kind_of_optimizer_is_refused(scorer: fastproj.InfluenceScorer) -> None:
    optimizer = torch.optim.SGD(scorer.parameters.values(), lr=0.1)
    with pytest.raises(ValueError, match="expected the state of Adam or AdamW"):
        adam_states(optimizer, scorer.model, scorer.parameters)
    with pytest.raises(ValueError, match="without amsgrad"):
        adam_states(
            torch.optim.Adam(scorer.parameters.values(), amsgrad=True), scorer.model, scorer.parameters
        )
    with pytest.raises(ValueError, match="without maximize"):
        adam_states(
            torch.optim.Adam(scorer.parameters.values(), maximize=True), scorer.model, scorer.parameters
        )
    with pytest.raises(TypeError, match="torch optimiser or a path"):
        adam_states({"state": {}}, scorer.model, scorer.parameters)  # type: ignore[arg-type]


def test_a_parameter_without_state_is_named(scorer: fastproj.InfluenceScorer) -> None:
    *most, last = scorer.parameters
    optimizer = torch.optim.AdamW([scorer.parameters[name] for name in most])
    for name in most:
        scorer.parameters[name].grad = torch.ones_like(scorer.parameters[name])
    optimizer.step()
    with pytest.raises(ValueError, match=f"no state for 1 of {len(most) + 1} parameters.*{last}"):
        adam_states(optimizer, scorer.model, scorer.parameters)


def test_a_file_of_another_model_is_refused(scorer: fastproj.InfluenceScorer, tmp_path: Path) -> None:
    other = fastproj.InfluenceScorer(gpt2(target_modules=["c_attn"]).model)
    torch.save(trained_adamw(other).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="the model has 16 trainable ones"):
        adam_states(tmp_path, scorer.model, scorer.parameters)
    wider = fastproj.InfluenceScorer(gpt2(r=8).model)
    torch.save(trained_adamw(wider).state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match=r"exp_avg of .* has shape \(8, 32\), expected \(4, 32\)"):
        adam_states(tmp_path, scorer.model, scorer.parameters)


class Trap:
    """Leaves a trace where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_nothing_is_unpickled(scorer: fastproj.InfluenceScorer, tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"state": {}, "param_groups": [Trap(trace)]}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="without unpickling"):
        adam_states(tmp_path, scorer.model, scorer.parameters)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(ValueError, match="without unpickling"):
        adam_states(tmp_path / "plain.pt", scorer.model, scorer.parameters)
    assert not trace.exists()


def test_missing_and_foreign_files_are_refused(scorer: fastproj.InfluenceScorer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"optimizer\.pt"):
        adam_states(tmp_path, scorer.model, scorer.parameters)
    torch.save({"weights": torch.ones(2)}, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="expected 'state' and 'param_groups'"):
        adam_states(tmp_path, scorer.model, scorer.parameters)
