"""What an eraser does to activations, gradients and weights, and that a file keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from erasure_families import FEATURES, normal, plain
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fastproj import LEACE, Basis, DifferenceOfMeans, Eraser, orthonormalize
from fastproj.erasure import ObliqueEraser, OrthogonalEraser

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def oblique(mean: bool = True, seed: int = 0) -> ObliqueEraser:
    fit = LEACE(3, affine=mean)
    fit.update(*plain(seed=seed))
    return fit.eraser


def orthogonal(mean: bool = True, seed: int = 0) -> OrthogonalEraser:
    fit = DifferenceOfMeans(3, affine=mean)
    fit.update(*plain(seed=seed))
    return fit.eraser


ERASERS = {
    "oblique": oblique(),
    "oblique, around 0": oblique(False),
    "orthogonal": orthogonal(),
    "orthogonal, around 0": orthogonal(False),
    "of nothing": ObliqueEraser(torch.zeros(7, 0), torch.zeros(7, 0), torch.ones(7)).to(dtype=torch.float64),
    "orthogonal, of nothing": OrthogonalEraser(Basis(torch.zeros(7, 0, dtype=torch.float64))),
}


def matrix(eraser: Eraser) -> Tensor:
    """``P = I − L Rᵀ``, in fp64."""
    return torch.eye(eraser.dimension, dtype=torch.float64) - eraser.left.double() @ eraser.right.double().mT


def exact(eraser: Eraser, x: Tensor) -> Tensor:
    mean = torch.zeros(eraser.dimension) if eraser.mean is None else eraser.mean
    return (x.double() - mean.double()) @ matrix(eraser).mT + mean.double()


@pytest.fixture(params=ERASERS)
def eraser(request: pytest.FixtureRequest) -> Eraser:
    return ERASERS[request.param]


@given(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(list(ERASERS)))
def test_activations_of_any_shape(shape: list[int], name: str) -> None:
    x = normal(*shape, FEATURES)
    got = ERASERS[name](x)
    assert got.shape == x.shape
    torch.testing.assert_close(got, exact(ERASERS[name], x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_less_precision_is_rounded_once(eraser: Eraser, dtype: torch.dtype) -> None:
    """fp32 within a few roundings of its largest parts, half precision within the one of its result."""
    x = plain()[0].to(dtype)
    got, want = eraser(x), exact(eraser, x)
    assert got.dtype == dtype
    parts = x.double().abs() + (x.double().abs() + 6) @ (eraser.right.abs() @ eraser.left.abs().mT)
    budget = torch.finfo(dtype).eps / 2 * want.abs() + 8 * torch.finfo(torch.float32).eps * parts
    assert bool(((got.double() - want).abs() <= budget * 1.01).all())


def test_strides_nan_and_inf_stay_where_they_are(eraser: Eraser) -> None:
    x = plain()[0][:6]
    want = eraser(x)
    assert torch.equal(eraser(x.mT.contiguous().mT), want)
    broken = x.clone()
    broken[1, 2], broken[4, 0] = torch.nan, torch.inf
    got = eraser(broken)
    rest = [0, 2, 3, 5]
    torch.testing.assert_close(got[rest], want[rest], rtol=0, atol=1e-13)
    assert not bool(torch.isfinite(got[[1, 4]]).all(1).any())


def test_autocast_changes_nothing(eraser: Eraser) -> None:
    x, shards = plain()[0].float(), [normal(5, FEATURES).float()]
    want = eraser(x), eraser.gradient(x), eraser.project(shards, side="right")[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = eraser(x), eraser.gradient(x), eraser.project(shards, side="right")[0]
    for value, right in zip(got, want, strict=True):
        assert value is not None
        assert right is not None
        assert torch.equal(value, right)


def test_compiled_without_a_break(eraser: Eraser) -> None:
    x = plain()[0].float()
    compiled = torch.compile(eraser.__call__, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), eraser(x), rtol=0, atol=1e-5)


def test_large_and_small_values(eraser: Eraser) -> None:
    around_zero: Eraser = ObliqueEraser(eraser.left, eraser.right)
    if isinstance(eraser, OrthogonalEraser):
        around_zero = OrthogonalEraser(eraser.basis)
    x = normal(5, FEATURES)
    for unit in (1e-30, 1e30):
        got = around_zero((unit * x).float()).double() / unit
        # fp32 at a condition of ten or so.
        torch.testing.assert_close(got, exact(around_zero, x), rtol=0, atol=1e-5)


def test_autograd_is_the_gradient_of_the_eraser(eraser: Eraser) -> None:
    x = plain()[0][:4].requires_grad_()
    assert torch.autograd.gradcheck(eraser, x)
    delta = normal(4, FEATURES, seed=6)
    (got,) = torch.autograd.grad(eraser(x), x, delta)
    torch.testing.assert_close(got, delta @ matrix(eraser), rtol=0, atol=1e-13)
    torch.testing.assert_close(eraser.gradient(delta), got, rtol=0, atol=1e-13)
    # Nothing is left that would move along L.
    assert eraser.rank == 0 or float((eraser.gradient(delta) @ eraser.left).abs().max()) < 1e-12
    assert torch.autograd.gradcheck(eraser.gradient, delta.requires_grad_())


@pytest.mark.parametrize("side", ["left", "right"])
def test_weights(eraser: Eraser, side: str) -> None:
    """Matrices, None, vectors, more dimensions, and no rows."""
    p = matrix(eraser)
    shapes = [(7, 5), (7,), (7, 2, 3), (7, 0)] if side == "left" else [(5, 7), (7,), (5, 7, 1), (0, 7)]
    shards: list[Tensor | None] = [normal(*shape, seed=number) for number, shape in enumerate(shapes)]
    shards.insert(1, None)
    got = eraser.project(shards, side=side)  # type: ignore[arg-type]
    assert got[1] is None
    for value, shard in zip(got, shards, strict=True):
        if value is None or shard is None:
            continue
        flat = shard.reshape(7, -1) if side == "left" else shard.reshape(-1, 7)
        want = p @ flat if side == "left" else flat @ p
        torch.testing.assert_close(value, want.reshape(shard.shape), rtol=0, atol=1e-12)
    copies = [None if shard is None else shard.clone() for shard in shards]
    copies[0] = normal(*reversed(shapes[0])).mT.copy_(shards[0])  # type: ignore[arg-type]
    assert not copies[0].is_contiguous()
    eraser.project_(copies, side=side)  # type: ignore[arg-type]
    for value, copy in zip(got, copies, strict=True):
        assert (value is None) == (copy is None)
        if value is not None and copy is not None:
            torch.testing.assert_close(copy, value, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["read", "write"])
def test_a_layer_keeps_the_eraser(eraser: Eraser, side: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 5 if side == "read" else 7).double()
    x = plain()[0][:9]
    want = layer(eraser(x)) if side == "read" else eraser(layer(x))
    layer.to(dtype)
    before = layer.weight.detach().double().clone()
    eraser.fold_(layer, side=side)
    # Weights were rounded to the dtype before, the result is rounded again.
    atol = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    torch.testing.assert_close(layer.double()(x), want, rtol=0, atol=atol)
    assert layer.weight.requires_grad
    if eraser.rank:
        assert not torch.equal(layer.weight.detach(), before)


def test_a_layer_without_bias() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(7, 7, bias=False).double()
    x, before = plain()[0][:9], layer.weight.detach().clone()
    for eraser in (orthogonal(), oblique()):
        for side in ("read", "write"):
            with pytest.raises(ValueError, match="a layer with a bias for an eraser with a mean"):
                eraser.fold_(layer, side=side)
    assert torch.equal(layer.weight, before)
    want = layer(oblique(False)(x))
    oblique(False).fold_(layer, side="read")
    torch.testing.assert_close(layer(x), want, rtol=0, atol=1e-12)


def test_directions_may_be_chosen() -> None:
    eraser = orthogonal()
    chosen = eraser.select([1])
    assert torch.equal(chosen.left, eraser.left[:, 1:])
    assert chosen.mean is eraser.mean
    for wrong in ([0, 0], [2], [-1]):
        with pytest.raises(ValueError, match="different columns from 0 to 1"):
            eraser.select(wrong)


def test_moved_to_another_precision(eraser: Eraser) -> None:
    narrow = eraser.to(dtype=torch.float32)
    assert type(narrow) is type(eraser)
    assert narrow.left.dtype == narrow.right.dtype == torch.float32
    assert (narrow.mean is None) == (eraser.mean is None)
    x = plain()[0]
    torch.testing.assert_close(narrow(x.float()), eraser(x.float()), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_file_keeps_it(eraser: Eraser, dtype: torch.dtype, tmp_path: Path) -> None:
    kept = eraser.to(dtype=dtype)
    kept.save(tmp_path / "folder" / "eraser.safetensors")
    got = Eraser.load(tmp_path / "folder" / "eraser.safetensors")
    assert type(got) is type(kept)
    assert torch.equal(got.left, kept.left)
    assert torch.equal(got.right, kept.right)
    assert (got.mean is None) == (kept.mean is None)
    assert got.mean is None or torch.equal(got.mean, kept.mean)  # type: ignore[arg-type]
    assert got.left.dtype == dtype


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "eraser.safetensors"
    with pytest.raises(FileNotFoundError, match="expected a file of an eraser at"):
        Eraser.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        Eraser.load(path)
    left = orthonormalize(normal(7, 2)).matrix.contiguous()
    cases: list[tuple[dict[str, object], dict[str, Tensor], str]] = [
        ({}, {"left": left}, "its header has no 'fastproj.erasure'"),
        ({"version": 2, "kind": "orthogonal"}, {"left": left}, "expected version 1, got 2"),
        ({"version": 1, "kind": "other"}, {"left": left}, "an orthogonal or an oblique eraser, got 'other'"),
        ({"version": 1, "kind": "orthogonal"}, {}, "expected a tensor 'left'"),
        ({"version": 1, "kind": "oblique"}, {"left": left}, "expected a tensor 'right'"),
        ({"version": 1, "kind": "orthogonal"}, {"left": left, "other": left.clone()}, "no tensor 'other'"),
        ({"version": 1, "kind": "orthogonal"}, {"left": 2 * left}, "RᵀL = I"),
        ({"version": 1, "kind": "oblique"}, {"left": left, "right": -left}, "RᵀL = I"),
        ({"version": 1, "kind": "oblique"}, {"left": left, "right": left * torch.nan}, "RᵀL = I"),
        ({"version": 1, "kind": "oblique"}, {"left": left, "right": left[:5].clone()}, r"\(d, k\), k ≤ d"),
        ({"version": 1, "kind": "orthogonal"}, {"left": left.half()}, "fp32 or fp64"),
        ({"version": 1, "kind": "orthogonal"}, {"left": left, "mean": left[:6, 0].clone()}, r"mean must be"),
        ({"version": 1, "kind": "orthogonal"}, {"left": left, "mean": left[:, 0] * torch.inf}, "finite mean"),
    ]
    for header, tensors, message in cases:
        metadata = {"fastproj.erasure": json.dumps(header)} if header else None
        save_file(tensors or {"unused": left.clone()}, path, metadata)
        with pytest.raises(ValueError, match=message) as raised:
            Eraser.load(path)
        assert str(path) in str(raised.value)


def test_bad_factors() -> None:
    left = normal(7, 2)
    with pytest.raises(TypeError, match="basis must be a Basis, got Tensor"):
        OrthogonalEraser(left)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"left must be an fp32 or fp64 tensor, got torch.float16"):
        ObliqueEraser(left.half(), left.half())
    with pytest.raises(TypeError, match="right must be an fp32 or fp64 tensor, got list"):
        ObliqueEraser(left, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(7, 2\) and \(7, 1\)"):
        ObliqueEraser(left, left[:, :1])
    with pytest.raises(ValueError, match=r"k ≤ d, got \(2, 7\)"):
        ObliqueEraser(left.mT, left.mT)
    with pytest.raises(ValueError, match="must be alike"):
        ObliqueEraser(left, left.float())
    with pytest.raises(ValueError, match="detach its factors"):
        ObliqueEraser(left.clone().requires_grad_(), left)
    with pytest.raises(TypeError, match="mean must be a tensor or None, got float"):
        ObliqueEraser(left, left, 0.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mean must be \(7,\) of torch.float64 on cpu"):
        ObliqueEraser(left, left, torch.zeros(7))


def test_bad_use(eraser: Eraser) -> None:
    x = normal(3, FEATURES)
    for call in (eraser, eraser.gradient):
        with pytest.raises(TypeError, match=r"torch.int64"):
            call(x.long())
        with pytest.raises(TypeError):
            call([1.0])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="length 7"):
            call(normal(3, 6))
        with pytest.raises(ValueError, match="on cpu"):
            call(torch.empty(3, 7, device="meta"))
    with pytest.raises(ValueError, match="side must be one of"):
        eraser.project([x], side="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length"):
        eraser.project([x], side="left")
    with pytest.raises(TypeError, match=r"torch.int64"):
        eraser.project([x.long()], side="right")
    with pytest.raises(ValueError, match="not differentiable"):
        eraser.project_([x.clone().requires_grad_()], side="right")
    with pytest.raises(TypeError, match=r"an nn.Linear, got Conv1d"):
        eraser.fold_(nn.Conv1d(7, 7, 1), side="read")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side must be one of"):
        eraser.fold_(nn.Linear(7, 7), side="right")
    for wrong, side in ((nn.Linear(6, 7), "read"), (nn.Linear(7, 6), "write")):
        before = wrong.weight.detach().clone()
        with pytest.raises(ValueError, match="length"):
            eraser.fold_(wrong.double(), side=side)
        assert torch.equal(wrong.weight.float(), before)
