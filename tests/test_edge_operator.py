"""EDGE as people call it: statistics, autograd, torch.compile, bad input."""

from __future__ import annotations

import pytest
import torch
from devices import on_gpu
from span_inputs import Family, moved, random_sets
from torch import Tensor

import fastproj
from fastproj.reference.edge import VARIANTS
from fastproj.reference.gram import gram as reference_gram

SEGMENTS = ("global", "tensor", "row", (0, 1, 0))
LORA = ((16, 96), (80, 16), (24,))


def test_nothing_to_project() -> None:
    assert fastproj.edge([], []) == []
    assert fastproj.edge([None], [None]) == [None]
    stats = fastproj.edge_([None], [None])
    assert stats.gram.shape == (1, 2, 2)
    one = torch.ones(2)
    assert fastproj.edge([one, None], [one, None], segments="tensor")[1] is None


def test_empty_segments_report_zeros() -> None:
    e, g = random_sets(2, [(4,), (0, 3)])
    stats = fastproj.edge_([*e, None], [*g, None], segments="tensor")
    assert stats.coefficients[1:].tolist() == [[1, 0], [1, 0]]
    assert not stats.gram[1:].any()


@pytest.mark.parametrize("segments", SEGMENTS)
def test_statistics(segments: object) -> None:
    e, g = random_sets(2, LORA, (torch.float64,))
    family = Family([e, g], segments)
    out = fastproj.edge(e, g, alpha=1.0, segments=segments)
    stats = fastproj.edge_([shard.clone() for shard in e], g, alpha=1.0, segments=segments)
    difference = reference_gram([e, [a - b for a, b in zip(e, out, strict=True)]], family.plan)
    torch.testing.assert_close(
        stats.bias_share**2, difference[:, 1, 1] / difference[:, 0, 0], rtol=1e-9, atol=1e-12
    )
    gram = reference_gram(family.sets, family.plan)
    torch.testing.assert_close(stats.cosine, gram[:, 0, 1] / (gram[:, 0, 0] * gram[:, 1, 1]).sqrt())
    assert stats.coefficients.shape == (family.plan.count, 2)
    assert stats.nonfinite.tolist() == [False] * family.plan.count


def test_statistics_of_zero_and_nonfinite_segments() -> None:
    e = [torch.zeros(3), torch.ones(3), torch.tensor([1.0, torch.nan])]
    stats = fastproj.edge_(e, [torch.ones(3), torch.ones(3), torch.ones(2)], segments="tensor")
    assert stats.cosine[:2].tolist() == pytest.approx([0, 1])
    assert stats.bias_share[:2].tolist() == pytest.approx([0, 0], abs=1e-7)
    assert stats.nonfinite.tolist() == [False, False, True]
    assert stats.cosine[2].isnan()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("segments", ["global", "row"])
def test_gradcheck(variant: str, segments: str) -> None:
    shards = [
        s.requires_grad_() for s in Family(random_sets(2, [(3, 2), (4,)], (torch.float64,)), "row").flat
    ]
    segments = "global" if variant == "released" else segments

    def function(*s: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastproj.edge(s[:2], s[2:], alpha=0.7, segments=segments, variant=variant))

    assert torch.autograd.gradcheck(function, shards)


@on_gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_differentiable_path_gives_the_same(variant: str) -> None:
    e, g = (moved(shards, "public") for shards in random_sets(2, LORA))
    want = fastproj.edge(e, g, variant=variant)
    got = fastproj.edge([shard.clone().requires_grad_() for shard in e], g, variant=variant)
    for value, expected in zip(got, want, strict=True):
        assert value.requires_grad
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)  # one rounding more or less


@on_gpu
@pytest.mark.parametrize("in_place", [False, True])
def test_opcheck(in_place: bool) -> None:
    e, g = (moved(shards, "public") for shards in random_sets(2, [(3, 2), (4,)]))
    operator = torch.ops.fastproj.edge_ if in_place else torch.ops.fastproj.edge
    torch.library.opcheck(operator.default, (e, g, [0, 3], True, 4, 0.5, "paper", False))


@on_gpu
def test_compiles_without_graph_break() -> None:
    e, g = (moved(shards, "public") for shards in random_sets(2, LORA))
    want = fastproj.edge(e, g, alpha=0.5)
    compiled = torch.compile(lambda a, b: fastproj.edge(a, b, alpha=0.5), fullgraph=True, backend="aot_eager")
    for value, expected in zip(compiled(e, g), want, strict=True):
        assert torch.equal(value, expected)

    def in_place(a: list[Tensor], b: list[Tensor]) -> Tensor:
        return fastproj.edge_(a, b, alpha=0.5).cosine

    torch.compile(in_place, fullgraph=True, backend="aot_eager")(e, g)
    for value, expected in zip(e, want, strict=True):
        assert torch.equal(value, expected)


ONE = [torch.ones(2)]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"variant": "new"}, ValueError, "'new'"),
        ({"on_nonfinite": "ignore"}, ValueError, "'ignore'"),
        ({"alpha": float("nan")}, ValueError, "nan"),
        ({"alpha": float("inf")}, ValueError, "inf"),
        ({"alpha": "1"}, TypeError, "str"),
        ({"alpha": True}, TypeError, "bool"),
        ({"segments": "layers"}, ValueError, "'layers'"),
        ({"segments": "row", "variant": "released"}, ValueError, "'row'"),
        ({"gce": [torch.ones(3)]}, ValueError, r"\(2,\), \(3,\)"),
        ({"gce": []}, ValueError, "erm has 1, gce has 0"),
        ({"gce": [None]}, ValueError, "None in gce only"),
        ({"gce": [torch.ones(2, dtype=torch.int32)]}, TypeError, "gce.*int32"),
        ({"gce": [torch.ones(2, device="meta")]}, ValueError, "one device"),
        ({"gce": [torch.ones(2).to_sparse()]}, TypeError, "dense"),
    ],
)
@pytest.mark.parametrize("function", ["edge", "edge_"])
def test_bad_input(function: str, options: dict[str, object], error: type[Exception], match: str) -> None:
    arguments = {"gce": ONE, **options}
    with pytest.raises(error, match=match):
        getattr(fastproj, function)(ONE, **arguments)
