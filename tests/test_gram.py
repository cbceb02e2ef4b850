"""Gram: reference, CPU fast path, Triton launcher, operator."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from devices import on_gpu
from hypothesis import given, settings
from span_inputs import (
    DTYPES,
    KERNELS,
    PATHS,
    Family,
    accumulation_eps,
    device_of,
    eager_gram,
    families,
    function_of,
    moved,
    random_sets,
    strided,
)
from torch import Tensor

import fastproj
from fastproj.reference.gram import gram as reference
from fastproj.reference.segments import segmentation

pytest.importorskip("triton")

from fastproj.kernels import _blocks
from fastproj.kernels.gram import MOST_SETS

# Products overflow first and are then taken again, scaled; numpy tells of the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

SEGMENTS = ("global", "tensor", "row", (0, 1, 0))
LORA = ((16, 96), (80, 16), (24,))


def run(path: str, family: Family) -> Tensor:
    """The Gram by one of PATHS, back on the CPU."""
    sets = [moved(shards, path) for shards in family.sets]
    if path == "public":
        return fastproj.gram(sets, segments=family.segments).cpu()
    plan, flat = family.plan, [shard for shards in sets for shard in shards]
    result: Tensor = function_of(path, "gram")(flat, len(sets), plan.first, plan.rows, plan.count)
    return result.cpu()


def norms(gram: Tensor) -> Tensor:
    """``√M_aa √M_bb``: what an inner product's error is measured against."""
    root = gram.diagonal(dim1=1, dim2=2).sqrt()
    return root[:, :, None] * root[:, None, :]


def assert_within_budget(got: Tensor, family: Family) -> None:
    """Relative to the norms: 4 × the eager error, and 8 eps where the eager run was lucky."""
    exact = reference(family.sets, family.plan)
    scale = norms(exact)
    assert got.dtype == torch.float64
    assert torch.equal(got == 0, exact == 0)
    eager = ((eager_gram(family) - exact).abs() / scale.clamp_min(torch.finfo(torch.float64).tiny)).flatten()
    lucky = 8 * accumulation_eps(family.flat)
    assert ((got - exact).abs() <= (4 * max(eager.tolist(), default=0.0) + lucky) * scale).all()


def test_reference_is_the_inner_product() -> None:
    (e,), (g,) = random_sets(2, [(4, 6)], (torch.float64,))
    plan = segmentation([e], "row")
    want = torch.stack([torch.stack([(a * b).sum(1) for b in (e, g)], 1) for a in (e, g)], 1)
    torch.testing.assert_close(
        reference([[e], [g]], plan), want, rtol=1e-14, atol=0
    )  # one fp64 rounding a term


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25)
@given(family=families())
def test_matches_reference(path: str, family: Family) -> None:
    got = run(path, family)
    assert torch.equal(got, got.transpose(1, 2))
    assert_within_budget(got, family)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_strided_shards(path: str, segments: object) -> None:
    sets = random_sets(2, LORA)
    dense, cut = Family(sets, segments), Family([strided(shards) for shards in sets], segments)
    assert not cut.sets[0][0].is_contiguous()
    torch.testing.assert_close(
        run(path, cut), run(path, dense), rtol=1e-6, atol=1e-5
    )  # strides change the blocking


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponents", [(-99, -99), (99, 99), (99, -99), (-140, 0)])
@pytest.mark.parametrize("segments", ["global", "row"])
def test_range_is_exact(path: str, dtype: torch.dtype, exponents: tuple[int, int], segments: str) -> None:
    """Powers of two come out of the products as they went in, far beyond fp32's range (2⁻⁹⁹ ≈ 1e-30)."""
    plain = random_sets(2, LORA, (dtype,))
    scaled = [[shard * 2.0**p for shard in shards] for shards, p in zip(plain, exponents, strict=True)]
    family = Family(scaled, segments)
    exact = reference(family.sets, family.plan)  # of what the denormals of 2⁻¹⁴⁰ kept
    assert ((run(path, family) - exact).abs() <= 8 * torch.finfo(torch.float32).eps * norms(exact)).all()


@pytest.mark.parametrize("path", PATHS)
def test_large_and_small_values_in_one_shard(path: str) -> None:
    sets = random_sets(2, [(3000,)])
    sets[0][0][::2] *= 2.0**99
    sets[1][0][::2] *= 2.0**-99
    family = Family(sets, "global")
    exact = reference(sets, family.plan)
    assert ((run(path, family) - exact).abs() <= 8 * torch.finfo(torch.float32).eps * norms(exact)).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("segments", ["tensor", "row"])
def test_nonfinite_stays_in_its_segment(path: str, bad: float, segments: str) -> None:
    family = Family(random_sets(2, LORA), segments)
    clean = run(path, family)
    family.sets[1][1][3, 2] = bad
    got = run(path, family)
    hit = 1 if segments == "tensor" else 16 + 3
    others = torch.arange(len(got)) != hit
    assert not got[hit, 1, 1].isfinite()
    assert not got[hit, 0, 1].isfinite()
    assert got[hit, 0, 0].item() == pytest.approx(clean[hit, 0, 0].item(), rel=1e-6)  # summed another way
    # The CPU's path may take a whole shard again in fp64: other rounding, same values.
    torch.testing.assert_close(got[others], clean[others], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_zeros_give_zeros(path: str, segments: object) -> None:
    family = Family([[torch.zeros(shape) for shape in LORA], random_sets(1, LORA)[0]], segments)
    got = run(path, family)
    assert not got[:, 0].any()
    assert (got[:, 1, 1] > 0).all()


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("segments", SEGMENTS)
def test_two_runs_agree_bit_for_bit(path: str, segments: object) -> None:
    """Also where the shards lie elsewhere in memory."""
    family = Family(random_sets(3, LORA, DTYPES), segments)
    copy = Family([[shard.clone() for shard in shards] for shards in family.sets], segments)
    assert torch.equal(run(path, family), run(path, copy))


@pytest.mark.parametrize("path", PATHS)
def test_many_shards(path: str) -> None:
    """A thousand; the interpreter takes 12 ms for each and does them in test_edge."""
    count = 100 if device_of(path).type == "cpu" and path == "triton" else 1000
    family = Family(random_sets(2, [(3,)] * count), "global")
    assert_within_budget(run(path, family), family)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("num_sets", [1, 5, MOST_SETS, MOST_SETS + 1, 2 * MOST_SETS + 3])
def test_any_number_of_sets(path: str, num_sets: int) -> None:
    family = Family(random_sets(num_sets, [(6, 20), (9,)]), "tensor")
    assert_within_budget(run(path, family), family)


def test_nothing_to_sum() -> None:
    assert fastproj.gram([[], []]).tolist() == [[[0, 0], [0, 0]]]
    assert fastproj.gram([[], []], segments="tensor").shape == (0, 2, 2)
    assert fastproj.gram([[None], [None]], segments="tensor").tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize("segments", ["tensor", (0, 1, 2)])
def test_missing_shard_keeps_its_segment(segments: object) -> None:
    shard = torch.ones(4)
    assert fastproj.gram([[shard, None, 2 * shard]], segments=segments).flatten().tolist() == [4, 0, 16]


def test_gradcheck() -> None:
    shards = [
        s.requires_grad_() for s in Family(random_sets(2, [(3, 2), (4,)], (torch.float64,)), "row").flat
    ]

    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return fastproj.gram([[a, b], [c, d]], segments="row")

    assert torch.autograd.gradcheck(function, shards)


@on_gpu
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    shards = [
        s.to(device_of("public")).requires_grad_(grad)
        for s in Family(random_sets(2, [(3, 2), (4,)]), "row").flat
    ]
    torch.library.opcheck(torch.ops.fastproj.gram.default, (shards, 2, [0, 3], True, 4))


@on_gpu
def test_compiles_without_graph_break() -> None:
    e, g = (moved(shards, "public") for shards in random_sets(2, LORA))
    compiled = torch.compile(lambda a, b: fastproj.gram([a, b]) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(e, g), fastproj.gram([e, g]) * 2)


@pytest.mark.parametrize(
    ("sets", "segments", "error", "match"),
    [
        ([], "global", ValueError, "at least one"),
        ([[torch.ones(2)], []], "global", ValueError, "set 0 has 1, set 1 has 0"),
        ([[torch.ones(2)], [torch.ones(3)]], "global", ValueError, r"shard 0 .*\(2,\), \(3,\)"),
        ([[torch.ones(2)], [None]], "global", ValueError, "None in set 1 only"),
        ([[torch.ones(2)], [torch.ones(2, dtype=torch.int64)]], "global", TypeError, "set 1.*int64"),
        ([[torch.ones(2)], ["x"]], "global", TypeError, "set 1.*str"),
        ([torch.ones(2)], "global", TypeError, "list of tensors"),
        ([[torch.ones(2), torch.ones(2, device="meta")]], "global", ValueError, "one device"),
        ([[torch.ones(2)]], "columns", ValueError, "columns"),
        ([[torch.ones(2)]], [0, 1], ValueError, "expected 1 ids, got 2"),
        ([[torch.ones(2)]], [1], ValueError, "without gaps"),
        ([[torch.ones(2)]], [-1], ValueError, "non-negative"),
        ([[torch.ones(2)]], [0.5], TypeError, "float"),
    ],
)
def test_bad_input(sets: object, segments: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fastproj.gram(sets, segments=segments)


@settings(max_examples=60)
@given(family=families(num_sets=1))
def test_blocks_cover_every_element_once(family: Family) -> None:
    plan = family.plan
    work = _blocks.prepare([family.sets[0]], plan.first, plan.rows, plan.count)
    seen = [torch.zeros(shard.numel(), dtype=torch.int64) for shard in family.sets[0]]
    slots = torch.full((work.plan.slots,), -1)
    for group in work.plan.groups:
        for shard, start, length, width, slot, segment, low, high, _, end in group.blocks.tolist():
            narrow = width != _blocks.FLAT
            seen[shard][start : start + length * (width if narrow else 1)] += 1
            own = torch.arange(slot, slot + (length if narrow else 1))
            assert (slots[own] == -1).all()
            slots[own] = segment + torch.arange(len(own))
            assert low <= slot < (end if narrow else high)
    assert all((count == 1).all() for count in seen)
    # Every slot is written, and a segment's lie side by side.
    want = torch.repeat_interleave(torch.arange(plan.count), work.plan.bounds.diff())
    assert torch.equal(slots, want)


def test_blocks_are_about_a_thousand_whatever_the_size() -> None:
    shards = [torch.empty(shape, device="meta") for shape in [(4096, 4096)] * 40]
    shapes = tuple((1, shard.numel()) for shard in shards)
    plan = _blocks._plan(
        shapes, (0,) * 40, False, 1, ((torch.float32,),) * 40, (True,) * 40, torch.device("cpu")
    )
    (group,) = plan.groups
    # Pieces are rounded up, by 2,048 elements of 655,360 here, and each shard ends in one of its own.
    assert 0.99 * _blocks.BLOCKS <= len(group.blocks) <= _blocks.BLOCKS + 40


def test_one_launch_group_for_shards_of_one_kind() -> None:
    """Launches do not grow with the shards; other dtypes or a misaligned shard take a group of their own."""
    (shards,) = random_sets(1, [(16, 96), (80, 16), (24,)] * 20)

    def groups(shards: list[Tensor], rows: bool = False) -> int:
        plan = segmentation(shards, "row" if rows else "global")
        return len(_blocks.prepare([shards], plan.first, rows, plan.count).plan.groups)

    assert groups(shards) == 1
    assert groups(shards, rows=True) == 1
    assert groups([*shards, torch.ones(8, dtype=torch.bfloat16)]) == 2
    assert groups([*shards, torch.ones(9)[1:]]) == 2


def test_tables_are_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay would copy them again from memory that is long gone."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a first call with the same tensors before"):
        _blocks.upload(torch.zeros(3, dtype=torch.int64), torch.device("cuda", 0))


def test_tables_of_a_captured_graph_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """They outlive the caches; those of other launches are marked as read by the current stream."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_blocks, "_CAPTURED", kept := [])
    work = _blocks.prepare([[torch.ones(5)]], [0], False, 1)
    assert kept == []
    _blocks.keep(work, [work.addresses, work.plan.bounds, work.plan.groups[0].blocks])
    assert kept == [work]
    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "here")
    monkeypatch.setattr(Tensor, "record_stream", lambda table, stream: streams.append(stream))
    _blocks.keep(work, [work.addresses, work.plan.bounds, work.plan.groups[0].blocks])
    assert kept == [work]
    assert streams == ["here"] * 3
