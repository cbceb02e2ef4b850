"""Scores against a loop of single-sample backward passes in fp64, and what the scorer refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from single_samples import batch_of, expected_scores, loss_name, one_by_one, trained_adamw
from tiny_models import BATCH, Tiny, bert, gpt2, llama
from torch import Tensor, nn

import fastproj
from fastproj.influence.optimizer_state import adam_states
from fastproj.influence.references import References

# fp64 sums of products in another order, of at most 1e5 terms.
ROUNDING = 1e-10
MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}


def halves(tiny: Tiny) -> dict[str, list[dict[str, Any]]]:
    return {"first": [batch_of(tiny.rows(0, 2))], "last": [batch_of(tiny.rows(2, 4))]}


def scored(
    scorer: fastproj.InfluenceScorer, tiny: Tiny, references: References, normalize: bool = True
) -> Tensor:
    """Scores in fp64, before they are rounded for the disk."""
    (rows,) = scorer.score_batches([batch_of(tiny)], references, normalize=normalize)
    return rows.values


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("with_adam", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_single_backward_passes(name: str, with_adam: bool, normalize: bool) -> None:
    tiny = MODELS[name]()
    scorer = fastproj.InfluenceScorer(tiny.model, loss=loss_name(tiny))
    adam = None
    if with_adam:
        optimizer = trained_adamw(scorer)
        scorer = fastproj.InfluenceScorer(tiny.model, optimizer, loss=loss_name(tiny))
        adam = adam_states(optimizer, tiny.model, scorer.parameters)
    references = scorer.reference(halves(tiny))
    got = scored(scorer, tiny, references, normalize)
    expected = expected_scores(tiny, references, adam, normalize)
    assert got.shape == (BATCH, 2)
    torch.testing.assert_close(got, expected, rtol=ROUNDING, atol=ROUNDING)


def test_references_are_mean_gradients_of_single_samples() -> None:
    tiny = gpt2()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference([batch_of(tiny.rows(0, 3)), batch_of(tiny.rows(3, 4))])
    singles = list(one_by_one(tiny, scorer.parameters))
    for name, gradient in references.gradients[0].items():
        mean = torch.stack([own[name] for own in singles]).mean(0)
        torch.testing.assert_close(gradient[0], mean, rtol=ROUNDING, atol=ROUNDING)


def test_every_captured_kind_of_layer_has_sample_gradients() -> None:
    tiny = bert()
    for name, parameter in tiny.model.named_parameters():
        # PEFT replaces the one by a copy; the other's input is the same for all samples.
        frozen = "original_module" in name or "position_embeddings" in name
        parameter.requires_grad_(not frozen)
    scorer = fastproj.InfluenceScorer(tiny.model, loss="classification", params="trainable")
    kinds = {name.split(".")[-2] for name in scorer.parameters}
    assert {"word_embeddings", "LayerNorm", "base_layer"} <= kinds
    optimizer = trained_adamw(scorer)
    scorer = fastproj.InfluenceScorer(tiny.model, optimizer, loss="classification", params="trainable")
    adam = adam_states(optimizer, tiny.model, scorer.parameters)
    references = scorer.reference(halves(tiny))
    expected = expected_scores(tiny, references, adam)
    torch.testing.assert_close(scored(scorer, tiny, references), expected, rtol=1e-8, atol=ROUNDING)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    tiny = llama()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference(halves(tiny))
    plain = scored(scorer, tiny, references)
    tiny.model.enable_input_require_grads()
    tiny.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tiny.model.train()
    checkpointed = [m for m in tiny.model.modules() if getattr(m, "gradient_checkpointing", False)]
    runs = []
    for module in checkpointed:
        module.register_forward_pre_hook(lambda m, _: runs.append(m.training))
    again = scored(scorer, tiny, references)
    assert runs
    assert all(runs), "the layers were not run in training mode, so nothing was checkpointed"
    torch.testing.assert_close(again, plain, rtol=ROUNDING, atol=ROUNDING)


def test_autocast_stays_within_its_rounding() -> None:
    tiny = llama()
    tiny.model.float()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference(halves(tiny))
    plain = scored(scorer, tiny, references)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scored(scorer, tiny, references)
    assert not torch.equal(plain, rounded)
    # Cosines of gradients that bf16's 8 bits of mantissa reach through two layers.
    torch.testing.assert_close(rounded, plain, rtol=0, atol=0.03)


def test_dropout_is_off_and_everything_is_given_back() -> None:
    tiny = gpt2(dropout=0.5)
    parameter = next(p for n, p in tiny.model.named_parameters() if "lora_A" in n)
    parameter.grad = torch.full_like(parameter, 3.0)
    flags = {name: p.requires_grad for name, p in tiny.model.named_parameters()}
    modes = {name: module.training for name, module in tiny.model.named_modules()}
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference(halves(tiny))
    first, second = (scored(scorer, tiny, references) for _ in range(2))
    assert torch.equal(first, second)
    assert {name: p.requires_grad for name, p in tiny.model.named_parameters()} == flags
    assert {name: module.training for name, module in tiny.model.named_modules()} == modes
    assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))
    assert all("forward" not in vars(module) for module in tiny.model.modules())


def test_batches_do_not_matter() -> None:
    tiny = llama()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference(halves(tiny))
    whole = scorer.score([batch_of(tiny)], references)
    parts = scorer.score([batch_of(tiny.rows(row, row + 1)) for row in range(BATCH)], references)
    assert parts.ids == whole.ids == ("0", "1", "2", "3")
    torch.testing.assert_close(parts.values, whole.values)


def test_ids_aggregate_and_progress() -> None:
    tiny = llama()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference(halves(tiny))
    batch = {"id": ["a", "b", "c", "d"], **batch_of(tiny)}
    done: list[int] = []
    both = scorer.score([batch], references, progress=done.append)
    assert both.ids == ("a", "b", "c", "d")
    assert both.names == ("first", "last")
    assert done == [4]
    largest = scorer.score([batch], references, aggregate="max")
    assert torch.equal(largest.values[:, 0], both.values.amax(1))


def test_a_sample_without_gradient_scores_zero() -> None:
    tiny = llama()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference([batch_of(tiny)])
    silent = batch_of(tiny)
    silent["labels"] = silent["labels"].clone()
    silent["labels"][1] = -100
    values = scorer.score([silent], references).values[:, 0]
    assert values[1] == 0
    assert (values[[0, 2, 3]] != 0).all()


def test_a_layer_called_twice_has_one_gradient() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    torch.manual_seed(0)
    model = Twice().double()
    batch = {"x": torch.randn(5, 6).double(), "labels": torch.tensor([0, 1, 2, 1, 0])}
    scorer = fastproj.InfluenceScorer(model, loss="classification", params="trainable")
    references = scorer.reference([batch])
    optimizer = trained_adamw(scorer)
    references = scorer.reference([batch])
    scorer = fastproj.InfluenceScorer(model, optimizer, loss="classification", params="trainable")
    adam = adam_states(optimizer, model, scorer.parameters)
    (rows,) = scorer.score_batches([batch], references)
    got = rows.values
    from fastproj.reference.adam import adam_update

    target = torch.cat([g.flatten() for g in references.gradients[0].values()])
    for row in range(5):
        loss = nn.functional.cross_entropy(model(batch["x"][row : row + 1]), batch["labels"][row : row + 1])
        gradients = torch.autograd.grad(loss, list(scorer.parameters.values()))
        updates = [
            adam_update(g, adam[n]).flatten() for n, g in zip(scorer.parameters, gradients, strict=True)
        ]
        cosine = torch.cosine_similarity(torch.cat(updates), target, dim=0)
        torch.testing.assert_close(got[row, 0], cosine, rtol=ROUNDING, atol=ROUNDING)


def test_tied_embeddings_are_refused() -> None:
    tiny = gpt2()
    tiny.model.get_input_embeddings().weight.requires_grad_(True)
    scorer = fastproj.InfluenceScorer(tiny.model, params="trainable")
    references = scorer.reference(halves(tiny))
    with pytest.raises(RuntimeError, match="several calls"):
        scorer.score([batch_of(tiny)], references)


def test_samples_that_meet_are_refused() -> None:
    class Meeting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x - x.mean(0))

    class Mixing(Meeting):
        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y - y.mean(0)

    batch = {"x": torch.randn(4, 4), "labels": torch.tensor([0, 1, 2, 0])}
    scorer = fastproj.InfluenceScorer(Mixing(), loss="classification", params="trainable")
    references = scorer.reference([batch])
    with pytest.raises(ValueError, match="samples meet"):
        scorer.score([batch], references)


def test_layers_that_come_later_are_checked_too() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, mix: bool) -> Tensor:
            y = self.other(x) if mix else self.layer(x)
            return y - y.mean(0) if mix else y

    def batch(mix: bool) -> dict[str, Any]:
        return {"x": torch.randn(4, 4), "mix": mix, "labels": torch.tensor([0, 1, 2, 0])}

    scorer = fastproj.InfluenceScorer(Branching(), loss="classification", params="trainable")
    references = scorer.reference([batch(False)])
    scorer.score([batch(False)], references)
    with pytest.raises(ValueError, match="samples meet"):
        scorer.score([batch(True)], references)


def test_a_layer_that_cannot_be_captured_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.Flatten(), nn.Linear(8, 3))
    batch = {"input": torch.randn(2, 1, 4), "labels": torch.tensor([0, 1])}
    scorer = fastproj.InfluenceScorer(model, loss="classification", params="trainable")
    references = scorer.reference([batch])
    with pytest.raises(ValueError, match="Conv1d has trainable parameters"):
        scorer.score([batch], references)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "squared"}, "loss must be one of"),
        ({"reduction": "max"}, "reduction must be"),
        ({"params": "all"}, "params must be one of"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastproj.InfluenceScorer(gpt2().model, **options)


def test_references_of_another_model_are_refused() -> None:
    small, other = gpt2(), gpt2(target_modules=["c_attn"])
    references = fastproj.InfluenceScorer(other.model).reference([batch_of(other)])
    with pytest.raises(ValueError, match="other parameters"):
        fastproj.InfluenceScorer(small.model).score([batch_of(small)], references)


def test_an_empty_probe_is_refused() -> None:
    with pytest.raises(ValueError, match="yielded no batch"):
        fastproj.InfluenceScorer(gpt2().model).reference({"empty": []})


def test_a_loss_of_another_shape_is_refused() -> None:
    tiny = gpt2()
    scorer = fastproj.InfluenceScorer(tiny.model, loss=lambda outputs, batch: outputs.logits.mean())
    with pytest.raises(ValueError, match="one number for each of the 4 samples"):
        scorer.reference([batch_of(tiny)])


def test_references_minus_one_of_them() -> None:
    tiny = gpt2()
    scorer = fastproj.InfluenceScorer(tiny.model)
    references = scorer.reference(halves(tiny))
    apart = references.minus("last")
    assert apart.names == ("first",)
    for name, gradient in apart.gradients[0].items():
        first, last = references.gradients[0][name]
        assert torch.equal(gradient[0], first - last)
    torch.testing.assert_close(scored(scorer, tiny, apart), expected_scores(tiny, apart, None))
    for wrong, held in (("other", references), ("first", apart)):
        with pytest.raises(ValueError, match="and another beside it"):
            held.minus(wrong)


def test_references_survive_the_disk(tmp_path: Any) -> None:
    tiny = gpt2()
    references = fastproj.InfluenceScorer(tiny.model).reference(halves(tiny))
    references.save(tmp_path / "references.safetensors")
    again = References.load(tmp_path / "references.safetensors")
    assert again.names == references.names
    for name, gradient in references.gradients[0].items():
        assert torch.equal(again.gradients[0][name], gradient)
    (tmp_path / "broken.safetensors").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(ValueError, match="does not hold reference gradients"):
        References.load(tmp_path / "broken.safetensors")


def test_sketches_keep_scores() -> None:
    tiny = llama()
    scorer = fastproj.InfluenceScorer(tiny.model)
    optimizer = trained_adamw(scorer)
    scorer = fastproj.InfluenceScorer(tiny.model, optimizer)
    references = scorer.reference(halves(tiny))
    exact = scored(scorer, tiny, references)
    dimension = 4096
    (rows,) = scorer.sketch_batches([batch_of(tiny)], dimension, kind="rademacher", seed=7)
    queries = scorer.sketch_references(references, dimension, kind="rademacher", seed=7)
    cosines = torch.cosine_similarity(rows.values[:, None], queries[None], dim=-1)
    # A cosine's standard error is at most 1/√k; five of them.
    torch.testing.assert_close(cosines, exact, rtol=0, atol=5 / dimension**0.5)


def test_the_model_may_be_copied_after_scoring() -> None:
    tiny = gpt2()
    scorer = fastproj.InfluenceScorer(tiny.model)
    scorer.score([batch_of(tiny)], scorer.reference([batch_of(tiny)]))
    copy.deepcopy(tiny.model)(**tiny.inputs)
