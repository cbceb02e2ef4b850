"""EDGE in a training loop: what .grad holds after project_, and what it refuses."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import Tiny, bert, gpt2, two_pass_oracle
from torch import Tensor, nn

import fastproj
from fastproj.capture.select import select_parameters
from fastproj.reference.edge import edge as edge_oracle
from fastproj.reference.segments import segmentation

# Gradients of both routes agree to fp64 rounding; the projection adds a few roundings of its own.
CLOSE = {"rtol": 1e-10, "atol": 1e-14}


def expected_projection(
    tiny: Tiny, params: str = "lora", scale: float = 1.0, **options: Any
) -> dict[str, Tensor]:
    """The oracle on the oracle's gradients."""
    pairs = two_pass_oracle(tiny, select_parameters(tiny.model, params))
    erm, gce = [e for e, _ in pairs.values()], [g * scale for _, g in pairs.values()]
    variant = options.get("variant", "paper")
    plan = segmentation(erm, options.get("segments", "global") if variant != "released" else "row")
    projected = edge_oracle(erm, gce, plan, alpha=options.get("alpha", 1.0), variant=variant)
    return dict(zip(pairs, projected, strict=True))


def projected(tiny: Tiny, **options: Any) -> dict[str, Tensor]:
    tiny.model.zero_grad()
    with fastproj.EDGE(tiny.model, **options) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        engine.project_()
    return {n: p.grad.clone() for n, p in tiny.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.5, "segments": "tensor"},
        {"alpha": 2.0, "segments": "row"},
        {"variant": "naive", "segments": "tensor"},
        {"variant": "subtract", "alpha": 0.8},
    ],
    ids=str,
)
@pytest.mark.parametrize("passes", ["one", "two"])
def test_grad_holds_the_projection(options: dict[str, Any], passes: str) -> None:
    tiny = bert()
    expected = expected_projection(tiny, **options)
    got = projected(tiny, passes=passes, **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE)


def test_released_variant_scales_the_amplified_loss_by_q() -> None:
    tiny = bert()
    expected = expected_projection(tiny, variant="released", scale=0.7)
    got = projected(tiny, variant="released", q=0.7)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE)


def test_only_the_adapters_are_projected_by_default() -> None:
    tiny = bert()
    got = projected(tiny)
    head = "base_model.model.classifier.modules_to_save.default.weight"
    plain = two_pass_oracle(tiny, select_parameters(tiny.model, "trainable"))[head][0]
    torch.testing.assert_close(got[head], plain, **CLOSE)
    projected_head = expected_projection(tiny, params="trainable")[head]
    torch.testing.assert_close(projected(tiny, params="trainable")[head], projected_head, **CLOSE)
    assert not torch.allclose(projected_head, plain)


def test_weights_are_p_to_the_q_and_stats_describe_the_gradients() -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model, q=0.3) as engine:
        logits = tiny.logits()
        engine.loss(logits, tiny.labels).backward()
        stats = engine.project_()
    pairs = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"), q=0.3)
    p = torch.softmax(logits, -1)[torch.arange(4), tiny.labels]
    torch.testing.assert_close(engine.weights, p.detach() ** 0.3)
    e = torch.cat([e.flatten() for e, _ in pairs.values()])
    g = torch.cat([g.flatten() for _, g in pairs.values()])
    torch.testing.assert_close(stats.cosine, F.cosine_similarity(e, g, dim=0)[None])
    b = e / e.norm() + g / g.norm()
    bias = g - (g @ b) / (b @ b) * b
    torch.testing.assert_close(stats.bias_share, (bias.norm() / e.norm())[None])
    c = torch.stack([1 + g.norm() / (2 * e.norm()), torch.tensor(-0.5).double()])
    torch.testing.assert_close(stats.coefficients, c[None])


def test_token_weights_take_two_passes_and_are_exact() -> None:
    tiny = gpt2()
    logits = tiny.logits()[:, :-1]
    labels = tiny.labels[:, 1:]
    terms = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    gce = ((torch.exp(-0.7 * terms)).detach() * terms).sum() / (labels != -100).sum()
    parameters = select_parameters(tiny.model, "lora")
    expected = torch.autograd.grad(gce, list(parameters.values()))
    with fastproj.EDGE(tiny.model, weight="token", passes="two") as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        for (name, parameter), value in zip(parameters.items(), expected, strict=True):
            torch.testing.assert_close(engine._second_set.get(parameter), value, **CLOSE, msg=name)


def test_token_weights_differ_from_sequence_weights_by_tens_of_per_cent() -> None:
    tiny = gpt2()
    with fastproj.EDGE(tiny.model, weight="token", passes="two") as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        exact = torch.cat([engine._second_set.get(p).flatten() for p in engine._parameters.values()])
    sequence = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    approximate = torch.cat([g.flatten() for _, g in sequence.values()])
    assert not torch.allclose(approximate, exact, rtol=0.01)


def test_independent_dropout_draws_fresh_masks_for_the_second_set() -> None:
    tiny = bert(dropout=0.3)
    parameters = select_parameters(tiny.model, "lora")
    with fastproj.EDGE(tiny.model, dropout="independent", passes="two") as engine:
        torch.manual_seed(3)
        engine.loss(tiny.logits(), tiny.labels).backward()
        second = [engine._second_set.get(p) for p in parameters.values()]
    torch.manual_seed(3)
    tiny.logits()
    logits = tiny.logits()
    terms = F.cross_entropy(logits, tiny.labels, reduction="none")
    gce = (torch.exp(-0.7 * terms).detach() * terms).mean()
    for got, value in zip(second, torch.autograd.grad(gce, list(parameters.values())), strict=True):
        torch.testing.assert_close(got, value, **CLOSE)


@pytest.mark.parametrize("segments", ["global", "tensor"])
def test_lagged_ratio_uses_the_step_before(segments: str) -> None:
    tiny = bert()
    pairs = two_pass_oracle(tiny, select_parameters(tiny.model, "lora"))
    exact = expected_projection(tiny, alpha=0.5, segments=segments)
    with fastproj.EDGE(tiny.model, alpha=0.5, segments=segments, ratio="lagged") as engine:
        for step in range(3):
            tiny.model.zero_grad()
            engine.loss(tiny.logits(), tiny.labels).backward()
            if step:
                assert all(engine._second_set.get(p) is None for p in engine._parameters.values())
            stats = engine.project_()
            # Nothing is updated, so the ratio of the step before is this step's own.
            for name, parameter in engine._parameters.items():
                torch.testing.assert_close(parameter.grad, exact[name], **CLOSE)
    e = torch.stack([e.norm() for e, _ in pairs.values()])
    assert stats.cosine.shape == (1 if segments == "global" else len(e),)
    total = e.norm()[None] if segments == "global" else e
    torch.testing.assert_close(stats.erm_norm, total)


def test_lagged_ratio_strays_when_the_gradients_change() -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model, ratio="lagged") as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        stats = engine.project_()
        ratio = stats.gce_norm / stats.erm_norm
        part = tiny.rows(0, 2)
        tiny.model.zero_grad()
        engine.loss(part.logits(), part.labels).backward()
        engine.project_()
    parameters = select_parameters(tiny.model, "lora")
    for name, (e, g) in two_pass_oracle(part, parameters).items():
        torch.testing.assert_close(parameters[name].grad, (1 + ratio / 2) * e - 0.5 * g, **CLOSE)


def test_training_with_accumulation_clipping_and_loss_scaling_equals_training_without_scaling() -> None:
    finals = []
    for scale in (1.0, 4096.0):
        tiny = bert()
        tiny.model.float()
        optimizer = torch.optim.SGD([p for p in tiny.model.parameters() if p.requires_grad], lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        with fastproj.EDGE(tiny.model, alpha=0.5, params="trainable") as engine:
            for _ in range(3):
                for part in (tiny.rows(0, 2), tiny.rows(2, 4)):
                    scaler.scale(engine.loss(part.logits(), part.labels) / 2).backward()
                engine.project_()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(tiny.model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        finals.append(torch.cat([p.flatten() for p in tiny.model.parameters() if p.requires_grad]))
    # Scaling by a power of two is exact; the scaler's own unscaling multiplies by its inverse.
    torch.testing.assert_close(finals[0], finals[1], rtol=1e-5, atol=1e-6)


def test_gradients_changed_before_the_projection_are_an_error() -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        nn.utils.clip_grad_norm_(tiny.model.parameters(), 1e-3)
        with pytest.raises(RuntimeError, match=r"changed after backward\(\): project first"):
            engine.project_()


def test_projection_without_a_backward_is_an_error() -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model) as engine:
        with pytest.raises(RuntimeError, match="no gradient"):
            engine.project_()
        engine.loss(tiny.logits(), tiny.labels).backward()
        engine.project_()
        with pytest.raises(RuntimeError, match="no gradient"):
            engine.project_()


def test_loss_under_no_grad_is_plain_cross_entropy() -> None:
    tiny = gpt2()
    with fastproj.EDGE(tiny.model) as engine, torch.no_grad():
        expected = tiny.model(**tiny.inputs, labels=tiny.labels).loss
        got = engine.loss(tiny.logits(), tiny.labels)
        # The model's own loss is taken in fp32.
        torch.testing.assert_close(got.float(), expected.float())
        assert engine.weights is None


def test_nonfinite_gradients_are_told_and_skipped_on_request() -> None:
    tiny = bert()
    for policy in ("propagate", "skip"):
        tiny.model.zero_grad()
        with fastproj.EDGE(tiny.model, segments="tensor", on_nonfinite=policy) as engine:
            engine.loss(tiny.logits(), tiny.labels).backward()
            name, parameter = next(iter(engine._parameters.items()))
            engine._second_set._sums[parameter] = torch.full_like(parameter, torch.nan)
            before = parameter.grad.clone()
            stats = engine.project_()
        assert stats.nonfinite.tolist() == [True] + [False] * (len(engine._parameters) - 1)
        assert torch.equal(parameter.grad, before) if policy == "skip" else parameter.grad.isnan().all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "best"}, "variant must be one of"),
        ({"q": 0.0}, r"q must be in \(0, 1\]"),
        ({"passes": "three"}, "passes must be one of"),
        ({"weight": "token"}, "needs passes='two'"),
        ({"dropout": "independent"}, "needs passes='two'"),
        ({"ratio": "lagged", "segments": "row"}, "got 'row'"),
        ({"ratio": "lagged", "variant": "naive"}, "paper's form only"),
        ({"ratio": "lagged", "passes": "two"}, "two passes were asked for"),
        ({"params": "all"}, "params must be one of"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    tiny = bert()
    with pytest.raises(ValueError, match=message):
        fastproj.EDGE(tiny.model, **options)
    fastproj.EDGE(tiny.model).detach()


def test_a_model_without_adapters_is_told_about_params() -> None:
    with pytest.raises(ValueError, match="params='trainable'"):
        fastproj.EDGE(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("logits", "labels", "error"),
    [
        ((4, 3), torch.zeros(5, dtype=torch.long), ValueError),
        ((4, 3), torch.zeros(4), TypeError),
        ((4, 2, 3), torch.zeros(4, dtype=torch.long), ValueError),
    ],
)
def test_labels_that_do_not_fit(logits: tuple[int, ...], labels: Tensor, error: type[Exception]) -> None:
    tiny = bert()
    with fastproj.EDGE(tiny.model) as engine, pytest.raises(error, match="labels"):
        engine.loss(torch.zeros(logits), labels)


@pytest.mark.parametrize("passes", ["two", "auto"])
def test_two_passes_under_gradient_checkpointing(passes: str) -> None:
    tiny = bert(use_dora=passes == "auto")
    expected = expected_projection(tiny)
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tiny.model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = projected(tiny, passes=passes)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE)


def test_falling_back_to_two_passes_under_gradient_checkpointing() -> None:
    tiny = gpt2()
    tiny.model.base_model.model.transformer.wpe.weight.requires_grad_(True)
    expected = expected_projection(tiny, params="trainable")
    tiny.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tiny.model.enable_input_require_grads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = projected(tiny, passes="auto", params="trainable")
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **CLOSE)


def test_lagged_segment_without_a_ratio_keeps_its_gradient() -> None:
    tiny = bert()
    for name, parameter in tiny.model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    with fastproj.EDGE(tiny.model, segments="tensor", ratio="lagged") as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        engine.project_()  # B is zero, so A had no gradient and no ratio
        for name, parameter in tiny.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        tiny.model.zero_grad()
        engine.loss(tiny.logits(), tiny.labels).backward()
        engine.project_()
    parameters = select_parameters(tiny.model, "lora")
    for name, (e, _) in two_pass_oracle(tiny, parameters).items():
        if "lora_A" in name:
            torch.testing.assert_close(parameters[name].grad, e, **CLOSE)
        else:
            assert not torch.allclose(parameters[name].grad, e)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = bert()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with fastproj.EDGE(tiny.model) as engine:
        engine.loss(tiny.logits(), tiny.labels).backward()
        with pytest.raises(RuntimeError, match=r"torch\.distributed runs 4"):
            engine.project_()
