"""Evidence beyond one adapter's weights: recurrence, ranking, the held-out choice, a known direction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_architectures import WIDTH, adapted
from torch import Tensor

from fastproj.latent.evidence import choose_rank, match, rank_directions, recurrence
from fastproj.latent.factors import LatentFactors
from fastproj.latent.identify import identify
from fastproj.latent.lora import lora_layers
from fastproj.reference.basis import Basis

EYE = torch.eye(6, dtype=torch.float64)


def made(*columns: int, key: str = "stream", side: Any = "write", turn: float = 0.0) -> LatentFactors:
    """Factors along coordinates, the first turned towards the last coordinate by an angle."""
    matrix = EYE[:, list(columns)].clone()
    matrix[:, 0] = math.cos(turn) * matrix[:, 0] + math.sin(turn) * EYE[:, 5]
    rank = len(columns)
    return LatentFactors(
        side=side,
        pool="stream" if key == "stream" else "module",
        bases={key: Basis(matrix)},
        spectra={},
        shares={key: torch.arange(rank, 0, -1).double() / 10},
        agreement={key: torch.zeros(rank, 0).double()},
        p_values={key: torch.ones(rank).double()},
        null_shares={key: torch.zeros(rank, 3).double()},
        modules=(),
    )


@pytest.mark.parametrize("key", ["stream", "fc1"])
def test_recurrence_is_the_mean_of_what_others_span(key: str) -> None:
    ours = made(0, 1, 2, key=key)
    others = [made(0, 1, key=key), made(0, 3, key=key, turn=math.pi / 3), made(1, key=key)]
    found = recurrence(ours, others)[key]
    # cos² of 60° is 1/4; fp64 cosines.
    expected = torch.tensor([1.25 / 3, 2 / 3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_what_two_fine_tunes_share_recurs_and_their_noise_does_not() -> None:
    """Two seeds with the same planted direction, and another that each has for itself."""
    shared = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)

    def tuned(seed: int) -> LatentFactors:
        model = adapted(seed=seed, noise=0.02)
        own = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed + 50))
        own = torch.nn.functional.normalize(own - (own @ shared) * shared, dim=0)
        with torch.no_grad():
            for layer in lora_layers(model):
                if layer.b.shape[0] == WIDTH:
                    layer.b[:, 0] += shared
                    layer.b[:, 1] += 3 * own
        return identify(model, rank=2, draws=0)

    one, two = tuned(1), tuned(2)
    found = recurrence(one, [two])
    ordered = rank_directions(one, recurrence=found)
    assert match(one, shared)["stream"].cosines[1] > 0.95  # the larger, its own, came first
    assert match(ordered, shared)["stream"].cosines[0] > 0.95
    scores = sorted(found["stream"].tolist())
    assert scores[1] > 0.9
    assert scores[0] < 0.5


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([], "at least one other fine-tune, got none"),
        ([made(0, side="read")], "expected side='write' and pool='stream', got 'read'"),
        ([made(0, key="fc1")], "got 'write' and 'module'"),
        ([identify(adapted(), draws=0)], f"expected directions of length 6 for 'stream', got {WIDTH}"),
    ],
)
def test_others_that_do_not_compare_are_refused(others: list[LatentFactors], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        recurrence(made(0), others)


def test_a_module_that_others_have_not_is_refused() -> None:
    with pytest.raises(ValueError, match="expected directions of 'fc1', there are none"):
        recurrence(made(0, key="fc1"), [made(0, key="fc2")])


def tensor(*values: float) -> dict[str, Tensor]:
    return {"stream": torch.tensor(values)}


@pytest.mark.parametrize(
    ("scores", "order"),
    [
        ({"recurrence": tensor(0.1, 0.9, 0.5)}, [1, 2, 0]),
        ({"difference": tensor(-3.0, 0.1, 2.0)}, [0, 2, 1]),
        ({"recurrence": tensor(0.1, 0.9, 0.5), "difference": tensor(-3.0, 0.1, 2.0)}, [2, 0, 1]),
        ({"recurrence": tensor(0.0, 0.5, 0.2), "difference": tensor(math.inf, 1.0, -math.inf)}, [2, 1, 0]),
        ({"recurrence": tensor(0.5, 0.5, 0.5)}, [0, 1, 2]),
    ],
)
def test_directions_are_ranked_by_the_product_of_what_is_given(scores: Any, order: list[int]) -> None:
    ours = made(0, 1, 2)
    ranked = rank_directions(ours, **scores)
    assert torch.equal(ranked.bases["stream"].matrix, ours.bases["stream"].matrix[:, order])
    assert torch.equal(ranked.shares["stream"], ours.shares["stream"][order])


def test_each_module_is_ranked_by_itself() -> None:
    ours = identify(adapted(), pool="module", rank=2, draws=0)
    scores = {key: torch.tensor([0.0, 1.0] if "q_proj" in key else [1.0, 0.0]) for key in ours.bases}
    for key, basis in rank_directions(ours, difference=scores).bases.items():
        order = [1, 0] if "q_proj" in key else [0, 1]
        assert torch.equal(basis.matrix, ours.bases[key].matrix[:, order])


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ({}, "recurrence, difference or both to rank by, got neither"),
        ({"recurrence": {}}, "recurrence: expected scores of 'stream', there are none"),
        ({"recurrence": tensor(1.0, 2.0)}, "recurrence: expected 3 numbers for 'stream'"),
        ({"difference": tensor(1.0, 2.0, math.nan)}, "difference: expected 3 numbers for 'stream'"),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rank_directions(made(0, 1, 2), **scores)


@pytest.mark.parametrize(
    ("scores", "tolerance", "best"),
    [
        ([0.9, 0.95, 0.8], 0.0, 1),
        ([0.9, 0.85, 0.89, 0.5], 0.01, 2),
        ([0.9, 0.1, 0.2], 0.05, 0),
        ([0.9, 0.9, 0.9], 0.0, 2),
        ([0.9], 0.0, 0),
        ([0.9, -math.inf], math.inf, 1),
    ],
)
def test_the_most_directions_that_cost_no_more_than_allowed(
    scores: list[float], tolerance: float, best: int
) -> None:
    asked: list[int] = []

    def evaluate(k: int) -> float:
        asked.append(k)
        return scores[k]

    # 0.9 − 0.01 and 0.89 differ by a rounding of fp64, in favour of 0.89.
    assert choose_rank(evaluate, len(scores) - 1, tolerance) == (best, scores)
    assert asked == list(range(len(scores)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((lambda _: 1.0, -1, 0.0), "most: expected 0 or more directions, got -1"),
        ((lambda _: 1.0, 1, -0.1), "tolerance: expected 0 or more, got -0.1"),
        ((lambda _: 1.0, 1, math.nan), "tolerance: expected 0 or more, got nan"),
        ((lambda k: math.nan if k else 1.0, 2, 0.1), "a score with 1 directions removed, got NaN"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        choose_rank(*options)


@pytest.mark.parametrize("size", [1e-300, 1.0, -1e300])
def test_a_known_direction_is_matched_at_any_length_and_sign(size: float) -> None:
    direction = size * (3 * EYE[0] + 4 * EYE[2])
    found = match(made(0, 1, 2), direction)["stream"]
    assert found.cosines == pytest.approx((0.6, 0.0, 0.8), abs=1e-12)  # fp64
    assert found.span == pytest.approx(1, abs=1e-12)
    assert match(made(0, 1), direction)["stream"].span == pytest.approx(0.6, abs=1e-12)
    assert match(made(0).first(0), direction)["stream"].span == 0


def test_a_known_direction_is_matched_with_the_bases_of_its_width() -> None:
    ours = identify(adapted(), pool="module", draws=0)
    expected = {key for key, basis in ours.bases.items() if basis.dimension == WIDTH}
    assert set(match(ours, torch.ones(WIDTH))) == expected
    assert expected < set(ours.bases)


@pytest.mark.parametrize(
    "direction", [torch.ones(5), torch.zeros(6), torch.ones(6, 1), torch.ones(6) * math.nan]
)
def test_directions_that_are_none_are_refused(direction: Tensor) -> None:
    with pytest.raises(ValueError, match="direction: expected"):
        match(made(0), direction)


@pytest.mark.parametrize("direction", [[1.0] * 6, torch.ones(6).int()])
def test_directions_of_another_type_are_refused(direction: Any) -> None:
    with pytest.raises(TypeError, match="direction: expected a floating-point tensor"):
        match(made(0), direction)
