"""Directions from a naive fine-tune's weights, against dense ΔW in fp64 and planted directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_architectures import WIDTH, adapted
from torch import Tensor, nn

import fastproj
from fastproj.architectures import ARCHITECTURES, Role, stream_role
from fastproj.latent.factors import LatentFactors
from fastproj.latent.identify import identify
from fastproj.latent.lora import lora_layers

WRITERS = [f"model.layers.{n}.{layer}" for n in (0, 1) for layer in ("self_attn.o_proj", "mlp.down_proj")]
NOISE = 0.05


def deltas(model: nn.Module, role: Role | None = None) -> dict[str, Tensor]:
    """Every ΔW, or those of one role, formed whole in fp64."""
    return {
        layer.name: layer.scale * layer.b.detach().double() @ layer.a.detach().double()
        for layer in lora_layers(model)
        if role is None or stream_role(layer.name) == role
    }


def planted_direction(seed: int = 3) -> Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return vector / vector.norm()


def planted(side: Role, direction: Tensor, **options: Any) -> nn.Module:
    """Noise everywhere, and ``direction`` in what each writer writes, or each reader reads."""
    model = adapted(**options)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.b.mul_(NOISE)
            if stream_role(layer.name) == side == "write":
                layer.b[:, 0] += direction
            if stream_role(layer.name) == side == "read":
                layer.a.mul_(NOISE)
                layer.a[0] += direction
                layer.b.div_(NOISE)
    return model


def dense_pool(model: nn.Module, side: Role, weighting: str) -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors), descending, of the pooled Gram formed from whole ΔW."""
    pooled = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for delta in deltas(model, side).values():
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        vectors = (u if side == "write" else vh.mT)[:, :4]
        weights = {"energy": s[:4], "relative": s[:4] / s[:4].norm(), "uniform": torch.ones_like(s[:4])}
        rows = vectors * weights[weighting]
        pooled += rows @ rows.mT
    values, vectors = torch.linalg.eigh(pooled)
    return values.flip(0), vectors.flip(1)


@pytest.mark.parametrize("weighting", ["energy", "relative", "uniform"])
@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_directions_of_the_stream_are_those_of_the_dense_pool(kind: str, side: Any, weighting: Any) -> None:
    model = adapted(kind)
    factors = identify(model, side=side, rank=3, weighting=weighting, draws=5)
    values, vectors = dense_pool(model, side, weighting)
    basis = factors.bases["stream"].matrix
    # Both in fp64; gaps between these eigenvalues are a percent of them and more.
    torch.testing.assert_close((basis.mT @ vectors[:, :3]).abs(), torch.eye(3).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(factors.shares["stream"], (values / values.sum())[:3], rtol=1e-10, atol=0)
    pooled = deltas(model, side)
    assert factors.modules == tuple(pooled)
    for column, delta in zip(factors.agreement["stream"].unbind(1), pooled.values(), strict=True):
        along = basis.mT @ delta if side == "write" else (delta @ basis).mT
        share = along.square().sum(1) / delta.square().sum()
        torch.testing.assert_close(column, share, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("side", ["read", "write"])
def test_directions_of_a_module_are_those_of_its_dense_change(side: Any) -> None:
    model = adapted()
    factors = identify(model, side=side, rank=2, pool="module", draws=3)
    every = deltas(model)
    assert tuple(factors.bases) == factors.modules == tuple(every)
    for name, delta in every.items():
        u, s, vh = torch.linalg.svd(delta)
        vectors = (u if side == "write" else vh.mT)[:, :2]
        basis = factors.bases[name].matrix
        torch.testing.assert_close((basis.mT @ vectors).abs(), torch.eye(2).double(), rtol=0, atol=1e-8)
        torch.testing.assert_close(factors.spectra[name], s[:4], rtol=1e-10, atol=0)
        shares = s.square() / s.square().sum()
        torch.testing.assert_close(factors.shares[name], shares[:2], rtol=1e-10, atol=0)


def test_agreement_of_modules_is_with_those_of_their_width_and_role() -> None:
    model = adapted()
    every = deltas(model)
    factors = identify(model, pool="module", rank=2, draws=0)
    for name, table in factors.agreement.items():
        for other, column in zip(factors.modules, table.unbind(1), strict=True):
            alike = stream_role(name) == stream_role(other) and len(every[name]) == len(every[other])
            assert bool(column.isnan().any()) is not alike
            if alike:
                along = factors.bases[name].matrix.mT @ every[other]
                share = along.square().sum(1) / every[other].square().sum()
                torch.testing.assert_close(column, share, rtol=1e-10, atol=1e-14)
        own = table[:, factors.modules.index(name)]
        torch.testing.assert_close(own, factors.shares[name], rtol=1e-10, atol=0)


@pytest.mark.parametrize("weighting", ["energy", "relative", "uniform"])
@pytest.mark.parametrize("side", ["read", "write"])
def test_a_planted_direction_is_found_and_stands_out(side: Any, weighting: Any) -> None:
    direction = planted_direction()
    factors = identify(planted(side, direction), side=side, weighting=weighting, draws=99)
    found = factors.bases["stream"].matrix[:, 0]
    # Each module adds noise of 5 % a coordinate in each of r = 4 columns; uniform counts all of them alike.
    assert float((found @ direction).abs()) > 0.97
    assert factors.p_values["stream"].tolist() == [0.01]
    assert float(factors.shares["stream"]) > float(factors.null_shares["stream"][0, 2])
    if weighting != "uniform":
        # 1 against 4 · 16 · 0.05² = 0.16 of noise, where the columns that meet are of like lengths.
        assert float(factors.agreement["stream"].mean()) > 0.75


def test_a_direction_that_dominates_its_own_columns_stands_out_within_a_module() -> None:
    model = adapted()
    direction = planted_direction()
    layer = next(layer for layer in lora_layers(model) if layer.name == WRITERS[0])
    with torch.no_grad():
        layer.b.mul_(NOISE).add_(direction[:, None])
    factors = identify(model, pool="module", draws=99)
    assert float((factors.bases[WRITERS[0]].matrix[:, 0] @ direction).abs()) > 0.98
    assert factors.p_values[WRITERS[0]].tolist() == [0.01]
    others = [float(p) for name, p in factors.p_values.items() if name != WRITERS[0]]
    assert sorted(others)[len(others) // 2] > 0.2


def test_weightings_differ_in_what_a_large_module_counts() -> None:
    """One writer a hundred times as large with a direction of its own, three that share another."""
    shared, own = planted_direction(1), planted_direction(2)
    own = own - (own @ shared) * shared
    own = own / own.norm()
    model = adapted()
    with torch.no_grad():
        for layer in lora_layers(model):
            if stream_role(layer.name) == "write":
                layer.b.mul_(1e-3)
                layer.b[:, 0] += 100 * own if layer.name == WRITERS[0] else shared

    def first(weighting: Any) -> Tensor:
        return identify(model, weighting=weighting, draws=0).bases["stream"].matrix[:, 0]

    # 3 against 1 in the relative pool, 1 against 10⁴ in that of energy; B's noise is 1e-3.
    assert float((first("energy") @ own).abs()) > 0.999
    assert float((first("relative") @ shared).abs()) > 0.999
    assert float((first("uniform") @ shared).abs()) > 0.9


def mixed(model: nn.Module) -> nn.Module:
    """The same ΔW from other factors: ``A → M A, B → B M⁻¹``."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in lora_layers(model):
            m = torch.randn(len(layer.a), len(layer.a), generator=generator, dtype=torch.float64)
            m += 3 * torch.eye(len(m))
            layer.a.copy_(m @ layer.a.double())
            layer.b.copy_(layer.b.double() @ torch.linalg.inv(m))
    return model


@pytest.mark.parametrize("pool", ["module", "stream"])
def test_factors_are_of_the_change_and_not_of_how_it_is_factored(pool: Any) -> None:
    model = adapted().double()
    one = identify(model, pool=pool, rank=2, draws=20)
    two = identify(mixed(model), pool=pool, rank=2, draws=20)
    for key, basis in one.bases.items():
        # fp64 through factors of condition 10 or so.
        torch.testing.assert_close(basis.matrix, two.bases[key].matrix, rtol=0, atol=1e-8)
        torch.testing.assert_close(one.shares[key], two.shares[key], rtol=1e-8, atol=0)
        torch.testing.assert_close(
            one.agreement[key], two.agreement[key], rtol=1e-8, atol=1e-12, equal_nan=True
        )
    if pool == "stream":
        assert torch.equal(one.p_values["stream"], two.p_values["stream"])


@given(size=st.sampled_from([1e-15, 1e-30, 1e15, 1e30]), pool=st.sampled_from(["module", "stream"]))
def test_factors_do_not_depend_on_the_size_of_the_change(size: float, pool: Any) -> None:
    model = adapted()
    plain = identify(model, pool=pool, draws=9)
    with torch.no_grad():
        for layer in lora_layers(model):
            layer.b.mul_(size)
    scaled = identify(model, pool=pool, draws=9)
    for key, basis in plain.bases.items():
        # The factors were rounded to fp32 after scaling: 6e-8 each, through gaps of a percent.
        torch.testing.assert_close(basis.matrix, scaled.bases[key].matrix, rtol=0, atol=1e-4)
        torch.testing.assert_close(plain.shares[key], scaled.shares[key], rtol=1e-5, atol=0)
    for name, values in plain.spectra.items():
        torch.testing.assert_close(values * size, scaled.spectra[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
@pytest.mark.parametrize("pool", ["module", "stream"])
def test_every_architecture_from_its_folder(kind: str, pool: Any, tmp_path: Path) -> None:
    model: Any = adapted(kind)
    model.save_pretrained(tmp_path)
    live, read = identify(model, pool=pool, draws=2), identify(tmp_path, pool=pool, draws=2)
    assert set(live.modules) == set(read.modules)
    for key, basis in live.bases.items():
        # Modules may come in another order, and so do sums in fp64.
        torch.testing.assert_close(basis.matrix, read.bases[key].matrix, rtol=0, atol=1e-9)


def test_the_seed_alone_decides_the_test_and_the_global_generator_is_left_alone() -> None:
    model = adapted()
    before = torch.get_rng_state()
    for pool in ("module", "stream"):
        one, two, three = (identify(model, pool=pool, draws=30, seed=seed) for seed in (1, 1, 2))
        for key, quantiles in one.null_shares.items():
            assert torch.equal(quantiles, two.null_shares[key])
            if float(one.shares[key]) < 1:
                assert not torch.equal(quantiles, three.null_shares[key])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pool", ["module", "stream"])
def test_no_draws_make_no_test(pool: Any) -> None:
    factors = identify(adapted(), pool=pool, rank=2, draws=0)
    for key in factors.bases:
        assert factors.p_values[key].isnan().tolist() == [True, True]
        assert bool(factors.null_shares[key].isnan().all())
        assert factors.null_shares[key].shape == (2, 3)


def silenced(model: nn.Module, *names: str) -> nn.Module:
    with torch.no_grad():
        for layer in lora_layers(model):
            if layer.name in names:
                layer.b.zero_()
    return model


@pytest.mark.parametrize("pool", ["module", "stream"])
def test_modules_that_learnt_nothing_are_left_out_and_named(pool: Any) -> None:
    factors = identify(silenced(adapted(), WRITERS[1]), pool=pool, draws=2)
    assert factors.unchanged == (WRITERS[1],)
    assert WRITERS[1] not in factors.modules
    assert WRITERS[0] in factors.modules
    assert factors.spectra[WRITERS[1]].tolist() == [0.0] * 4


def test_a_fresh_adapter_is_refused() -> None:
    model = adapted(noise=0.0)
    with pytest.raises(ValueError, match=r"nothing was learnt: .* zero in all 14 modules"):
        identify(model)


def test_a_stream_without_writers_is_refused() -> None:
    model = adapted(target_modules=["q_proj", "v_proj"])
    with pytest.raises(ValueError, match="expected modules that write the residual stream"):
        identify(model)
    assert len(identify(model, side="read", draws=0).modules) == 4
    with pytest.raises(ValueError, match="expected modules that write the residual stream"):
        identify(silenced(adapted(), *WRITERS))


def test_modules_of_another_width_are_not_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastproj.latent.lora import LoraLayer

    def layer(name: str, width: int) -> LoraLayer:
        return LoraLayer(name, torch.randn(2, 5), torch.randn(width, 2), 1.0)

    layers = [layer("a.fc2", 8), layer("b.fc2", 8), layer("vision.fc2", 6)]
    monkeypatch.setattr("fastproj.latent.identify.lora_layers", lambda *_: layers)
    assert identify("").modules == ("a.fc2", "b.fc2")
    layers.append(layer("vision.b.fc2", 6))
    with pytest.raises(ValueError, match=r"expected one width .*, got 2 modules each of 8 and 6"):
        identify("")


def test_one_module_cannot_stand_out_from_itself() -> None:
    """Permuting all coordinates of one module alone changes no singular value: every draw is a tie."""
    model = silenced(adapted(), *WRITERS[1:])
    factors = identify(model, draws=9, rank=2)
    assert factors.modules == (WRITERS[0],)
    assert factors.p_values["stream"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"side": "both"}, "side: expected one of read, write, got 'both'"),
        ({"pool": "layer"}, "pool: expected one of module, stream"),
        ({"weighting": "none"}, "weighting: expected one of energy, relative, uniform"),
        ({"weighting": "uniform", "pool": "module"}, "weighting is of pool='stream' alone"),
        ({"rank": 0}, "rank: expected 1 to 64, got 0"),
        ({"rank": 65}, "rank: expected 1 to 64, got 65"),
        (
            {"rank": 5, "pool": "module"},
            "rank: expected at most 4, the directions of 'model.layers.0.self_attn",
        ),
        ({"rank": 17}, "rank: expected at most 16, the directions of all pooled modules"),
        ({"draws": -1}, "draws: expected 0 or more"),
        ({"adapter": "other"}, "got 'other'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        identify(adapted(), **options)


def test_a_rank_that_is_rounding_alone_is_refused() -> None:
    model = adapted()
    with torch.no_grad():
        for layer in lora_layers(model):
            if layer.name == WRITERS[0]:
                layer.b[:, 1:] = layer.b[:, :1] * torch.tensor([2.0, 0.3, -1.0])
    assert identify(model, pool="module", draws=0).rank == 1
    with pytest.raises(ValueError, match=f"at most 1, the directions of '{WRITERS[0]}' beyond"):
        identify(model, pool="module", rank=2)


@pytest.mark.parametrize("pool", ["module", "stream"])
def test_all_directions_hold_all_energy(pool: Any) -> None:
    factors = identify(adapted(), pool=pool, rank=4 if pool == "module" else WIDTH, draws=2)
    for key, shares in factors.shares.items():
        assert float(shares.sum()) == pytest.approx(1, abs=1e-12)  # fp64 sums of 16 numbers
        assert bool((shares.diff() <= 0).all())
        basis = factors.bases[key].matrix
        assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


def test_16_bit_adapters_are_taken_as_they_are() -> None:
    model = adapted().bfloat16()
    factors = identify(model, rank=2, draws=2)
    _, vectors = dense_pool(model, "write", "energy")
    basis = factors.bases["stream"].matrix
    torch.testing.assert_close((basis.mT @ vectors[:, :2]).abs(), torch.eye(2).double(), rtol=0, atol=1e-8)


def test_the_package_exports_both() -> None:
    assert fastproj.identify is identify
    assert fastproj.LatentFactors is LatentFactors
