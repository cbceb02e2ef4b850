"""The permutation test: its shares, its p-values under noise and under a planted direction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastproj.latent.null import leading_energies, module_null, p_values, quantiles, stream_null


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def orthonormal_rows(modules: int, r: int, d: int, seed: int) -> Tensor:
    return torch.linalg.qr(noise(modules, d, r, seed=seed)).Q.mT


def shares_of(rows: Tensor) -> Tensor:
    energies = torch.linalg.svdvals(rows).square()
    return energies / energies.sum()


def test_p_values_count_draws_at_least_as_large() -> None:
    null = torch.tensor([[0.1, 0.3], [0.2, 0.3], [0.4, 0.3]], dtype=torch.float64)
    observed = torch.tensor([0.2, 0.31], dtype=torch.float64)
    assert p_values(observed, null).tolist() == [0.75, 0.25]
    assert p_values(observed, null[:0]).isnan().tolist() == [True, True]


def test_quantiles_are_of_each_direction() -> None:
    null = torch.stack([torch.arange(101.0), 10 * torch.arange(101.0)], 1).double()
    expected = torch.tensor([[5.0, 50.0, 95.0], [50.0, 500.0, 950.0]]).double()
    # Interpolated between neighbours in fp64.
    torch.testing.assert_close(quantiles(null), expected, rtol=1e-12, atol=0)
    assert quantiles(null[:0]).shape == (2, 3)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (300, 280), (1, 1), (600, 270)])
@pytest.mark.parametrize("count", [1, 4])
def test_leading_energies_are_squared_singular_values(shape: tuple[int, int], count: int) -> None:
    rows = noise(*shape)
    count = min(count, *shape)
    expected = torch.linalg.svdvals(rows)[:count].square()
    # Dense in fp64 where small; Ritz values of the larger ones stop at changes of 1e-5 a step.
    precise = 1e-10 if min(shape) <= 256 else 1e-4
    torch.testing.assert_close(leading_energies(rows, count, generator()), expected, rtol=precise, atol=0)


def test_leading_energies_of_equal_singular_values_are_all_found() -> None:
    rows = torch.linalg.qr(noise(400, 300)).Q.mT
    # Rounding of fp32 in products of vectors of length 400.
    torch.testing.assert_close(
        leading_energies(rows, 3, generator()), torch.ones(3).double(), rtol=1e-4, atol=0
    )


def test_leading_energies_of_a_lower_rank_are_followed_by_zeros() -> None:
    rows = noise(300, 2) @ noise(2, 290, seed=1)
    found = leading_energies(rows, 4, generator())
    expected = torch.linalg.svdvals(rows)[:4].square()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected[0]))


def test_a_draw_of_the_stream_keeps_each_module_and_moves_it_as_one() -> None:
    """With one module nothing changes; with two, what each holds stays and their sum's shares move."""
    stack = orthonormal_rows(1, 3, 20, seed=1) * torch.tensor([3.0, 2.0, 1.0])[:, None]
    null = stream_null(stack, 3, 5, generator())
    torch.testing.assert_close(null, shares_of(stack[0]).expand(5, 3), rtol=1e-10, atol=0)
    twice = stack.expand(2, 3, 20).contiguous()
    null = stream_null(twice, 3, 5, generator())
    assert bool((null[:, 0] < shares_of(twice.flatten(0, 1))[0]).all())
    assert bool((null[:, 0] >= 9 / 28 - 1e-12).all())  # no less than one module's first alone


def test_a_draw_of_a_module_keeps_the_entries_of_each_column() -> None:
    """Columns of one value alone are the same in any order, so that nothing changes."""
    b = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).expand(8, 3)
    a = noise(3, 5)
    (null,) = module_null([(b, a * 0 + a[:, :1])], 2, 25, generator())
    expected = torch.tensor([1.0, 0.0]).double().expand(25, 2)
    # Gram matrices of rank one in fp64.
    torch.testing.assert_close(null, expected, rtol=0, atol=1e-12)


def test_a_module_of_rank_one_has_all_its_energy_in_any_order() -> None:
    (null,) = module_null([(noise(8, 1), noise(1, 5))], 1, 4, generator())
    torch.testing.assert_close(null, torch.ones(4, 1).double(), rtol=1e-12, atol=0)


def test_shares_of_permuted_modules_are_those_of_dense_products() -> None:
    """The permutations drawn again here, applied to B and A, and ΔW formed whole."""
    factors = [(noise(6, 2, seed=1), noise(2, 9, seed=2)), (noise(9, 3, seed=3), noise(3, 9, seed=4))]
    draws = 23
    found = module_null(factors, 2, draws, generator(7))
    again = generator(7)
    expected: list[list[Tensor]] = [[], []]
    for count in (20, 3):
        orders = {w: torch.rand(count, 3, w, generator=again).argsort(2) for w in (6, 9)}
        for draw in range(count):
            for number, (b, a) in enumerate(factors):
                columns = b.mT.gather(1, orders[len(b)][draw, : len(a)])
                rows = a.gather(1, orders[a.shape[1]][draw, : len(a)])
                expected[number].append(shares_of(columns.mT @ rows)[:2])
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, torch.stack(two), rtol=1e-9, atol=1e-12)


REPEATS, DRAWS = 60, 19


def test_p_values_of_the_stream_under_noise_are_uniform() -> None:
    """Of 60 noises, a share q of p-values is at most q, give or take 4 standard errors of a proportion."""
    found = []
    for seed in range(REPEATS):
        stack = orthonormal_rows(6, 3, 24, seed=seed)
        null = stream_null(stack, 1, DRAWS, generator(seed))
        found.append(float(p_values(shares_of(stack.flatten(0, 1))[:1], null)))
    check_uniform(torch.tensor(found))


def test_p_values_of_modules_under_noise_are_uniform() -> None:
    found = []
    for seed in range(REPEATS):
        b, a = noise(20, 4, seed=seed), noise(4, 30, seed=seed + 1000)
        (null,) = module_null([(b, a)], 1, DRAWS, generator(seed))
        found.append(float(p_values(shares_of(b @ a)[:1], null)))
    check_uniform(torch.tensor(found))


def check_uniform(found: Tensor) -> None:
    for q in (0.1, 0.25, 0.5, 0.75):
        error = 4 * (q * (1 - q) / REPEATS) ** 0.5
        assert abs(float((found <= q + 1e-9).double().mean()) - q) < error


def test_a_shared_direction_has_the_smallest_p_value() -> None:
    stack = orthonormal_rows(6, 3, 24, seed=0)
    stack[:, 0] = stack[0, 0]
    null = stream_null(stack, 2, 99, generator())
    values = p_values(shares_of(stack.flatten(0, 1))[:2], null)
    assert float(values[0]) == 0.01
    assert float(values[1]) > 0.05
