"""Random projections: the operator, its laws, and all rooms against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from devices import DEVICE, GPU_MARKS, on_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastproj
from fastproj.bindings.sketch import from_reference, sketch
from fastproj.kernels.cpu.sketch import sketch as cpu_path
from fastproj.reference.sketch import KINDS
from fastproj.reference.sketch import sketch as reference

pytest.importorskip("triton")

from fastproj.kernels.sketch import sketch as triton_path

# The dense kinds and their product; the others have files of their own for what is theirs alone.
DENSE = ("rademacher", "gaussian", "kronecker")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATHS = [
    pytest.param(cpu_path, "cpu", id="cpu"),
    pytest.param(triton_path, DEVICE, id="triton", marks=GPU_MARKS),
]
# (samples, positions, dimension, offset)
SIZES = ((1, 1, 1, 0), (3, 520, 6, 1000), (2, 70, 260, 2**40 + 5))
# The interpreter takes a second for a row of a product's 1,024 columns: a test of its own has it in pieces.
PIECEWISE = [
    pytest.param(path, device, kind, id=f"{name}-{kind}", marks=marks)
    for name, path, device, marks in (
        ("cpu", cpu_path, "cpu", []),
        ("triton", triton_path, DEVICE, GPU_MARKS),
    )
    for kind in DENSE
    if (name, kind) != ("triton", "kronecker")
]


def vectors(samples: int, positions: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, positions, generator=generator, dtype=torch.float64).to(dtype)


def assert_close(got: Tensor, want: Tensor, inputs: Sequence[Tensor], scale: float = 1.0) -> None:
    """Sums of n products in fp32 (fp64), each of a size of at most 5 |v|/√k with the scale of the kind."""
    precision = torch.finfo(got.dtype).eps
    size = sum(shard.double().abs().sum(dim=1, keepdim=True) for shard in inputs)
    # Sums in blocks: errors grow with the root of n and not with n; 8 leaves room for the largest entries.
    allowed = 8 * scale * precision * size / want.shape[1] ** 0.5
    assert got.dtype == (torch.float64 if any(v.dtype == torch.float64 for v in inputs) else torch.float32)
    assert bool(((got.double().cpu() - want).abs() <= allowed).all()), (got.double().cpu() - want).abs().max()


@pytest.mark.parametrize(("path", "device"), PATHS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [*product(("rademacher", "gaussian"), DTYPES), ("kronecker", torch.float32)]
)
def test_every_room_agrees_with_the_reference(path, device, dtype: torch.dtype, kind: str) -> None:  # type: ignore[no-untyped-def]
    for samples, positions, dimension, offset in SIZES if kind != "kronecker" else SIZES[-1:]:
        v = vectors(samples, positions, dtype)
        got = path([v.to(device)], dimension, 11, kind, offset)
        assert_close(got, reference([v], dimension, 11, kind, offset), [v])


@pytest.mark.parametrize(("path", "device", "kind"), PIECEWISE)
@settings(max_examples=4)
@given(
    samples=st.integers(1, 4),
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    dimension=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 2**50),
)
def test_shards_add_up_to_the_whole(  # type: ignore[no-untyped-def]
    path, device, kind: str, samples: int, lengths: list[int], dimension: int, seed: int, offset: int
) -> None:
    """In one call, or each by itself at its own offset, as the reference has the whole."""
    whole = vectors(samples, sum(lengths))
    shards = [shard.to(device) for shard in whole.split(lengths, dim=1)]
    want = reference([whole], dimension, seed, kind, offset)
    assert_close(path(shards, dimension, seed, kind, offset), want, [whole])
    total = torch.zeros_like(want)
    for shard in shards:
        total += path([shard], dimension, seed, kind, offset).double().cpu()
        offset += shard.shape[1]
    assert_close(total.float(), want, [whole])


@on_gpu
def test_a_product_in_pieces() -> None:
    """Over the end of a row."""
    whole = vectors(2, 70)
    shards = [shard.to(DEVICE) for shard in whole.split([40, 30], dim=1)]
    want = reference([whole], 6, 3, "kronecker", 1000)
    assert_close(triton_path(shards, 6, 3, "kronecker", 1000), want, [whole])


@pytest.mark.parametrize(("path", "device", "kind"), PIECEWISE)
def test_matrices_are_the_same_bits_wherever_they_are_cut(path, device, kind: str) -> None:  # type: ignore[no-untyped-def]
    """Sketches of unit vectors are the columns: no sum rounds them."""
    units = torch.eye(60, dtype=torch.float32, device=device)
    whole = path([units], 12, 5, kind, 1000)
    for first in (0, 1, 37):
        padded = torch.zeros(60 - first, 60, device=device)
        padded[:, : 60 - first] = units[first:, first:]
        assert torch.equal(path([padded], 12, 5, kind, 1000 + first), whole[first:])
    # In fp64 they are correctly rounded scales of whole numbers, and fp32 rounds these scales once.
    want = reference([units.double().cpu()], 12, 5, kind, 1000)
    torch.testing.assert_close(whole.double().cpu(), want, rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_matrix(kind: str) -> None:
    v = vectors(2, 500)
    one = sketch(v, 64, seed=1, kind=kind)
    assert torch.equal(one, sketch(v, 64, seed=1, kind=kind))
    assert not torch.allclose(one, sketch(v, 64, seed=2, kind=kind))
    assert not torch.allclose(one, sketch(v, 64, seed=1, kind=kind, offset=1))
    others = [sketch(v, 64, seed=1, kind=other) for other in KINDS if other != kind]
    assert not any(torch.allclose(one, other) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_kept_on_average_and_within_theory(kind: str) -> None:
    """Over seeds: the mean of ‖Pv‖²/‖v‖² is 1 and its variance at most that of the theory."""
    dimension, seeds = 64, 200
    v = vectors(1, 300, torch.float64)
    ratios = torch.cat(
        [sketch(v, dimension, seed=s, kind=kind).square().sum(1) / v.square().sum() for s in range(seeds)]
    )
    # 2/k for independent entries; (1 + 2/k₁)(1 + 2/k₂) − 1 at most for products, k₁ = k₂ = 8.
    variance = (1 + 2 / 8) ** 2 - 1 if kind == "kronecker" else 2 / dimension
    # Five standard errors of the mean; a variance from 200 draws is within 1.5 × with all but 1e-5.
    assert abs(ratios.mean().item() - 1) < 5 * (variance / seeds) ** 0.5
    assert ratios.var().item() < 1.5 * variance


@pytest.mark.parametrize("kind", DENSE)
def test_inner_products_of_many_vectors_are_kept(kind: str) -> None:
    v = torch.nn.functional.normalize(vectors(20, 3000, torch.float64), dim=1)
    s = sketch(v, 1024, seed=3, kind=kind)
    # Johnson–Lindenstrauss: 210 products, each off by at most about √(1/k) for dense P; products are coarser.
    deviation = (s @ s.T - v @ v.T).abs()
    spread = (4 / 1024**0.5 if kind == "kronecker" else 2 / 1024) ** 0.5
    assert deviation.max().item() < 5 * spread


def test_shapes_are_flattened_and_dtypes_mixed() -> None:
    a, b = vectors(3, 24).reshape(3, 4, 6), vectors(3, 5, torch.bfloat16)
    got = sketch([a.transpose(1, 2), b, torch.ones(3)], 8, seed=0)
    flat = [a.transpose(1, 2).reshape(3, 24), b, torch.ones(3, 1)]
    assert_close(got, reference(flat, 8, 0, "rademacher", 0), flat)
    assert sketch([a, b.double()], 8, seed=0).dtype == torch.float64
    strided = vectors(3, 40)[:, ::2]
    assert_close(sketch(strided, 8, seed=0), reference([strided], 8, 0, "rademacher", 0), [strided])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_sketch(kind: str) -> None:
    assert sketch(torch.ones(0, 7), 16, seed=0, kind=kind).shape == (0, 16)
    assert torch.equal(sketch(torch.ones(2, 0, 3), 16, seed=0, kind=kind), torch.zeros(2, 16))
    assert torch.equal(sketch(torch.zeros(2, 9), 16, seed=0, kind=kind), torch.zeros(2, 16))


@pytest.mark.parametrize(("path", "device"), PATHS)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_extreme_values_stay_in_their_sample(path, device, kind: str) -> None:  # type: ignore[no-untyped-def]
    v = vectors(6, 100)
    v[0] *= 1e30
    v[1] *= 1e-30
    v[2, 3], v[3, 4], v[4, 5] = torch.nan, torch.inf, 3.4e38
    got = path([v.to(device)], 10, 0, kind, 0).cpu()
    assert bool(got[2].isnan().all())
    assert bool(got[3].isinf().all()) or kind == "gaussian"  # infinity times an entry that is rounded to 0
    for finite in (0, 1, 5):
        one = v[finite : finite + 1]
        assert_close(got[finite : finite + 1], reference([one], 10, 0, kind, 0), [one])
    assert bool(got[4].isfinite().all()) or kind == "gaussian"


@on_gpu
@pytest.mark.parametrize("kind", DENSE)
def test_gradient_is_the_transposed_product(kind: str) -> None:
    shards = [v.to(DEVICE).requires_grad_() for v in (vectors(2, 30), vectors(2, 11, torch.float64))]
    grad = vectors(2, 9, torch.float64).to(DEVICE)
    got = torch.autograd.grad(sketch(shards, 9, seed=4, kind=kind, offset=3), shards, grad)
    columns = reference([torch.eye(41, dtype=torch.float64)], 9, 4, kind, 3).to(DEVICE)
    for value, want in zip(got, (grad @ columns.T).split([30, 11], dim=1), strict=True):
        # The matrix of the backward pass is fp64 here, the gradient of the fp32 shard is rounded once.
        torch.testing.assert_close(value, want.to(value.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_numerically(kind: str) -> None:
    v = vectors(2, 6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sketch(v, 4, seed=2, kind=kind), (v,))
    assert torch.autograd.gradgradcheck(lambda v: sketch(v, 4, seed=2, kind=kind) ** 2, (v,))


@pytest.mark.parametrize("kind", ["rademacher", "kronecker"])
def test_operator_is_registered_soundly(kind: str) -> None:
    """All kinds are one operator."""
    shards = [vectors(2, 7).requires_grad_(), vectors(2, 3).requires_grad_()]
    torch.library.opcheck(torch.ops.fastproj.sketch, (shards, 4, 1, kind, 0))
    torch.library.opcheck(torch.ops.fastproj.sketch_transposed, (vectors(2, 4), 5, 1, kind, 2))


def test_compiles_without_a_break() -> None:
    def squared(v: Tensor) -> Tensor:
        return fastproj.sketch([v, 2 * v], 4, seed=1).square().sum()

    v = vectors(2, 7).requires_grad_()
    compiled = torch.compile(squared, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(squared(v), v)
    (got,) = torch.autograd.grad(compiled(v), v)
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_a_dimension_that_the_kind_does_not_allow_is_told_before_anything_runs() -> None:
    """Shapes alone, as while a program is traced: no kernel is there to refuse it."""
    with FakeTensorMode():
        assert fastproj.sketch(torch.empty(2, 3), 8, seed=1, kind="sjlt").shape == (2, 8)
        with pytest.raises(ValueError, match=r"power of two from 4 to 16384, .* got 6"):
            fastproj.sketch(torch.empty(2, 3), 6, seed=1, kind="sjlt")


def test_the_reference_serves_where_there_is_no_kernel() -> None:
    v = vectors(2, 7, torch.bfloat16)
    assert_close(from_reference([v], 4, 1, "gaussian", 0), reference([v], 4, 1, "gaussian", 0), [v])


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "at least one shard", {"shards": []}),
        (ValueError, "got 2 in shard 0 and 3 in shard 1", {"shards": [ONE, torch.ones(3, 1)]}),
        (ValueError, "at least one axis, got a scalar", {"shards": torch.ones(())}),
        (TypeError, "shard 0 must be fp32, bf16, fp16 or fp64, got torch.int64", {"shards": ONE.long()}),
        (TypeError, "shard 1 must be a tensor, got float", {"shards": [ONE, 1.0]}),
        (TypeError, "dimension must be an integer, got float", {"dimension": 4.0}),
        (TypeError, "seed must be an integer, got bool", {"seed": True}),
        (ValueError, "dimension must be at least 1, got 0", {"dimension": 0}),
        (ValueError, r"seed must be from 0 to 2\*\*63 - 1, got -1", {"seed": -1}),
        (ValueError, r"offset must be from 0 to 2\*\*56 - 1, got -2", {"offset": -2}),
        (ValueError, "kind must be one of .*'rademacher'.* got 'normal'", {"kind": "normal"}),
        (ValueError, "power of two from 4 to 16384, .* got 6", {"kind": "sjlt", "dimension": 6}),
    ],
)
def test_misuse_is_told(error: type[Exception], words: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=words):
        sketch(**{"shards": ONE, "dimension": 4, "seed": 0, **arguments})  # type: ignore[arg-type]
