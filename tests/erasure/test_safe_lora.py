"""Safe LoRA: which modules stray from what alignment wrote, and what projection leaves of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import Tiny, llama
from torch import Tensor

from fastproj import SafeLoRA
from fastproj.erasure import AlignmentProjection
from fastproj.latent.lora import lora_layers
from fastproj.reference.erasure import safe_lora as reference


def weights(tiny: Tiny, unit: float = 1.0) -> dict[str, tuple[Tensor, Tensor]]:
    """Of each adapted module, before and after an alignment of rank 6 or so."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {}
    for layer in lora_layers(tiny.model):
        rows, columns = len(layer.b), layer.a.shape[1]
        base = normal(rows, columns)
        made[layer.name] = (base, base + unit * normal(rows, 6) @ normal(6, columns))
    return made


def fitted(tiny: Tiny, rank: int | None = None, unit: float = 1.0) -> AlignmentProjection:
    fit = SafeLoRA(rank)
    for name, (base, aligned) in weights(tiny, unit).items():
        fit.update(name, base, aligned)
    return fit.eraser


@pytest.mark.parametrize("rank", [None, 3])
def test_it_is_the_reference(rank: int | None) -> None:
    tiny = llama()
    before = {x.name: (x.a.detach().clone(), x.b.detach().clone()) for x in lora_layers(tiny.model)}
    projection = fitted(tiny, rank)
    cosines = projection.cosines(tiny.model)
    threshold = sorted(cosines.values())[len(cosines) // 2]
    projected = projection.project_(tiny.model, threshold=threshold)
    assert list(cosines) == list(before)
    assert projected == tuple(name for name, cosine in cosines.items() if cosine <= threshold)
    assert 0 < len(projected) < len(before)
    for layer in lora_layers(tiny.model):
        a, b = before[layer.name]
        want, cosine = reference(a, b, *weights(tiny)[layer.name], rank)
        assert cosines[layer.name] == pytest.approx(cosine, abs=1e-12)
        assert torch.equal(layer.a.detach(), a)
        if layer.name in projected:
            torch.testing.assert_close(layer.b.detach(), want, rtol=1e-10, atol=1e-10)
        else:
            assert torch.equal(layer.b.detach(), b)


def test_a_count_takes_the_lowest_cosines() -> None:
    tiny = llama()
    projection = fitted(tiny)
    cosines = projection.cosines(tiny.model)
    assert projection.project_(tiny.model, count=0) == ()
    lowest = sorted(cosines, key=cosines.__getitem__)[:3]
    assert set(projection.project_(tiny.model, count=3)) == set(lowest)


def test_of_equal_cosines_a_count_takes_no_more() -> None:
    """Published codes take a threshold from the sorted cosines, and with it all modules that are equal."""
    tiny = llama()
    with torch.no_grad():
        for layer in lora_layers(tiny.model):
            layer.b.zero_()
    projection = fitted(tiny)
    assert set(projection.cosines(tiny.model).values()) == {0.0}
    assert projection.project_(tiny.model, count=2) == tuple(x.name for x in lora_layers(tiny.model)[:2])


def test_the_papers_matrix_is_no_projection_and_the_rank_is_one() -> None:
    """Its scale is that of what alignment changed; the cosines are those of any scale."""
    tiny, doubled = llama(), llama()
    one, two = fitted(tiny), fitted(doubled, unit=2.0)
    name = lora_layers(tiny.model)[0].name
    torch.testing.assert_close(two.factors[name] * 0.5**0.5, one.factors[name], rtol=1e-12, atol=1e-12)
    assert list(one.cosines(tiny.model).values()) == pytest.approx(list(two.cosines(tiny.model).values()))
    one.project_(tiny.model, threshold=1.0)
    once = lora_layers(tiny.model)[0].b.detach().clone()
    one.project_(tiny.model, threshold=1.0)
    assert not torch.allclose(lora_layers(tiny.model)[0].b.detach(), once)
    orthogonal = fitted(doubled, 3)
    factor = orthogonal.factors[name]
    torch.testing.assert_close(factor.mT @ factor, torch.eye(3).double(), rtol=0, atol=1e-13)
    orthogonal.project_(doubled.model, threshold=1.0)
    once = lora_layers(doubled.model)[0].b.detach().clone()
    orthogonal.project_(doubled.model, threshold=1.0)
    torch.testing.assert_close(lora_layers(doubled.model)[0].b.detach(), once, rtol=1e-12, atol=1e-13)


def test_all_directions_of_a_square_full_rank_change_leave_everything() -> None:
    """The paper's exact form, V (VᵀV)⁻¹ Vᵀ, is the identity there."""
    fit = SafeLoRA(rank=8)
    v = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit.update("layer", torch.zeros_like(v), v)
    factor = fit.eraser.factors["layer"]
    torch.testing.assert_close(factor @ factor.mT, torch.eye(8).double(), rtol=0, atol=1e-13)
    exact = v @ torch.linalg.inv(v.mT @ v) @ v.mT
    torch.testing.assert_close(exact, torch.eye(8).double(), rtol=0, atol=1e-9)


def test_modules_are_paired_by_name() -> None:
    """By position, as published codes pair them, a layer that is not adapted shifts all those after it."""
    tiny = llama(target_modules=r".*layers\.1.*(q_proj|v_proj)")
    aligned = {name: pair for name, pair in weights(llama()).items() if name.endswith(("q_proj", "v_proj"))}
    fit = SafeLoRA()
    for name, pair in aligned.items():
        fit.update(name, *pair)
    cosines = fit.eraser.cosines(tiny.model)
    assert list(cosines) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    for layer, shifted in zip(lora_layers(tiny.model), aligned.values(), strict=False):
        a, b = layer.a.detach(), layer.b.detach()
        _, own = reference(a, b, *aligned[layer.name], None)
        _, other = reference(a, b, *shifted, None)
        assert cosines[layer.name] == pytest.approx(own, abs=1e-12)
        assert abs(own - other) > 1e-3


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_updates_and_changes_of_any_size(unit: float) -> None:
    tiny = llama()
    want = list(fitted(tiny).cosines(tiny.model).values())
    with torch.no_grad():
        for layer in lora_layers(tiny.model):
            layer.a.mul_(unit)
            layer.b.mul_(unit)
    got = fitted(tiny, unit=unit if unit > 1 else 1.0).cosines(tiny.model)
    assert list(got.values()) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_less_precision(dtype: torch.dtype) -> None:
    """Factors of half-precision weights are fp32, and B is rounded once."""
    tiny = llama()
    tiny.model.to(dtype)
    fit = SafeLoRA()
    for name, (base, aligned) in weights(tiny).items():
        fit.update(name, base.to(dtype), aligned.to(dtype))
    layer = lora_layers(tiny.model)[0]
    before, factor = layer.b.detach().double().clone(), fit.eraser.factors[layer.name]
    assert factor.dtype == torch.float32
    fit.eraser.project_(tiny.model, threshold=1.0)
    want = factor.double() @ (factor.double().mT @ before)
    assert layer.b.dtype == dtype
    rounding = torch.finfo(dtype).eps * want.abs() + 1e-5 * want.abs().max()
    assert bool(((layer.b.detach().double() - want).abs() <= rounding).all())


def test_a_file_keeps_it(tmp_path: Path) -> None:
    projection = fitted(llama(), 2)
    path = tmp_path / "alignment.safetensors"
    projection.save(path)
    got = AlignmentProjection.load(path)
    assert got.factors.keys() == projection.factors.keys()
    assert all(torch.equal(got.factors[name], factor) for name, factor in projection.factors.items())


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "alignment.safetensors"
    with pytest.raises(FileNotFoundError, match="alignment factors"):
        AlignmentProjection.load(path)
    good = {"fastproj.erasure.alignment": json.dumps({"version": 1})}
    cases = [
        (torch.zeros(3, 2), None, "its header has no"),
        (
            torch.zeros(3, 2),
            {"fastproj.erasure.alignment": '{"version": 9}'},
            "expected version 1, got 9",
        ),
        (torch.full((3, 2), torch.nan), good, "hold NaN or Inf"),
        (torch.zeros(3), good, r"factors \(d_out, m\) of 'layer', got torch.float32 of \(3,\)"),
        (torch.zeros(3, 2).half(), good, "got torch.float16"),
    ]
    for tensor, metadata, message in cases:
        save_file({"layer": tensor}, path, metadata)
        with pytest.raises(ValueError, match=message) as raised:
            AlignmentProjection.load(path)
        assert str(path) in str(raised.value)


def test_bad_input() -> None:
    tiny = llama()
    with pytest.raises(TypeError, match="whole number or None, got float"):
        SafeLoRA(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or more, got 0"):
        SafeLoRA(0)
    fit, one = SafeLoRA(), torch.ones(3, 2)
    with pytest.raises(ValueError, match="one module or more, got none"):
        _ = fit.eraser
    with pytest.raises(TypeError, match=r"got torch.int64"):
        fit.update("layer", one.long(), one)
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(2, 3\)"):
        fit.update("layer", one, one.mT)
    with pytest.raises(ValueError, match=r"got \(3,\) and \(3,\)"):
        fit.update("layer", one[:, 0], one[:, 1])
    with pytest.raises(ValueError, match="changed nothing in 'layer'"):
        fit.update("layer", one, one)
    with pytest.raises(ValueError, match="NaN or Inf"):
        fit.update("layer", one, one / 0)
    with pytest.raises(ValueError, match="along 1 directions, fewer than the rank, 2"):
        SafeLoRA(2).update("layer", 0 * one, one)
    fit.update("layer", 0 * one, one)
    with pytest.raises(ValueError, match="each module once, got 'layer' again"):
        fit.update("layer", 0 * one, one)
    with pytest.raises(ValueError, match="factors of each adapted module"):
        fit.eraser.cosines(tiny.model)
    name = lora_layers(tiny.model)[0].name
    short = {**fitted(tiny).factors, name: one}
    with pytest.raises(ValueError, match="have length 3, its output 32"):
        AlignmentProjection(short).cosines(tiny.model)
    projection = fitted(tiny)
    for options in ({}, {"threshold": 0.5, "count": 1}):
        with pytest.raises(ValueError, match="a threshold or a count"):
            projection.project_(tiny.model, **options)
    for count in (-1, 99, True):
        with pytest.raises(ValueError, match="count must be from 0 to 14"):
            projection.project_(tiny.model, count=count)
