"""AdamW's step along a combination: reference, CPU fast path, Triton launcher, operator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from span_inputs import (
    DTYPES,
    KERNELS,
    PATHS,
    Family,
    accumulation_eps,
    assert_as_good_as_eager,
    device_of,
    families,
    random_sets,
    strided,
)
from step_inputs import LORA, OPTIONS, State, counts_of, random_coefficients, random_state, run, wanted
from torch import Tensor

import fastproj
from fastproj.reference.combine import combine as reference_combine
from fastproj.reference.projected_adamw import projected_adamw as reference
from fastproj.reference.segments import segmentation

pytest.importorskip("triton")

# fp16 overflows in a test on purpose; numpy, behind the interpreter, tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def eager(family: Family, coefficients: Tensor, state: State, steps: list[Tensor]) -> State:
    """G rounded to the parameter's dtype, then every step of the formula in the dtype of what it gives."""
    out: State = [[], [], []]
    gradients = reference_combine(family.sets, coefficients, family.plan)
    lr, beta1, beta2, eps, decay = OPTIONS.values()
    for exact, p, m, v, step in zip(gradients, *state, steps, strict=True):
        g, t = exact.to(p.dtype), step.item()
        moment = beta1 * m + (1 - beta1) * g.to(m.dtype)
        square = beta2 * v + (1 - beta2) * g.to(v.dtype).square()
        update = (moment / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + eps)
        for own, value in zip(
            out, ((p - lr * decay * p) - lr * update.to(p.dtype), moment, square), strict=True
        ):
            own.append(value)
    return out


def assert_within_budget(
    got: State, family: Family, coefficients: Tensor, state: State, steps: list[Tensor]
) -> None:
    """Each list as good as eager code; a sum's magnitude is that of its terms, of v twice for its square."""
    exact, rough = (f(family, coefficients, state, steps) for f in (wanted, eager))
    absolute = [[shard.abs() for shard in own] for own in family.sets]
    gradient = reference_combine(absolute, coefficients.abs(), family.plan)
    moments = [a.double().abs() + g for a, g in zip(state[1], gradient, strict=True)]
    squares = [a.double() + 2 * g.square() for a, g in zip(state[2], gradient, strict=True)]
    # The root of v̂ is at least one of order one: a step carries m̂'s rounding, and its own.
    params = [p.double().abs() + 10 * m for p, m in zip(state[0], moments, strict=True)]
    for own, want, other, magnitude in zip(got, exact, rough, (params, moments, squares), strict=True):
        eps = accumulation_eps([*own, *family.flat])
        assert_as_good_as_eager(own, other, want, magnitude, eps)


@settings(max_examples=40)
@given(family=families(), data=st.data())
@pytest.mark.parametrize("path", KERNELS)
def test_equals_the_reference(path: str, family: Family, data: st.DataObject) -> None:
    shapes = [tuple(shard.shape) for shard in family.sets[0]]
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3), label="dtypes of the state")
    state = random_state(shapes, dtypes)
    coefficients, steps = random_coefficients(family), counts_of(state)
    got = run(path, family, coefficients, state, steps)
    assert_within_budget(got, family, coefficients, state, steps)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("segments", ["global", "tensor", "row", (0, 1, 0)])
@pytest.mark.parametrize("num_sets", [1, 2, 7, 17])
def test_numbers_of_sets(num_sets: int, segments: object, path: str) -> None:
    """Up to more than a launch takes, rows or not."""
    family = Family(random_sets(num_sets, LORA), segments)
    state = random_state(LORA, [torch.float32])
    coefficients, steps = random_coefficients(family), counts_of(state)
    got = run(path, family, coefficients, state, steps)
    assert_within_budget(got, family, coefficients, state, steps)


@pytest.mark.parametrize("path", KERNELS)
@pytest.mark.parametrize("segments", ["global", "row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_of_several_packs(dtype: torch.dtype, segments: str, path: str) -> None:
    shapes = [(3, 90_001), (5,), (270_000,)]
    family = Family(random_sets(2, shapes, [dtype]), segments)
    state = random_state(shapes, [dtype])
    coefficients, steps = random_coefficients(family), counts_of(state)
    assert_within_budget(
        run(path, family, coefficients, state, steps), family, coefficients, state, steps
    )  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_combine_and_torch(path: str, weight_decay: float) -> None:
    """Step after step, in fp32, some roundings apart: torch takes the means in another order."""
    sets, state = random_sets(2, LORA), random_state(LORA, [torch.float32])
    coefficients = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
    params = [torch.nn.Parameter(p.clone()) for p in state[0]]
    optimizer = torch.optim.AdamW(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=weight_decay)
    ours = [state[0], *([torch.zeros_like(p) for p in state[0]] for _ in range(2))]
    for t in range(1, 6):
        family = Family([[shard * t for shard in own] for own in sets], "global")
        for p, g in zip(params, fastproj.combine(family.sets, coefficients), strict=True):
            p.grad = g
        optimizer.step()
        steps = [torch.tensor(float(t)) for _ in LORA]
        ours = run(path, family, coefficients, ours, steps, lr=1e-2, eps=1e-8, weight_decay=weight_decay)
    for p, m, v, parameter in zip(*ours, params, strict=True):
        torch.testing.assert_close(p, parameter.detach(), rtol=2e-6, atol=2e-7)
        own = optimizer.state[parameter]
        # m is a sum of both signs: rounding is that of its terms, of order one.
        torch.testing.assert_close(m, own["exp_avg"], rtol=2e-6, atol=1e-6)
        # (1 − β2) G², where G is a difference of numbers of order one.
        torch.testing.assert_close(v, own["exp_avg_sq"], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_scales_that_coefficients_undo(scale: float, path: str) -> None:
    """Sets far from one, whose combination is of order one."""
    family = Family(random_sets(2, LORA, scale=scale), "global")
    plain = Family(
        [[s / scale for s in own] for own in random_sets(2, LORA, [torch.float64], scale=scale)], "global"
    )
    state, coefficients = (
        random_state(LORA, [torch.float32]),
        torch.tensor([[1.5, -0.5]], dtype=torch.float64),
    )
    got = run(path, family, coefficients / scale, state, counts_of(state))
    want = wanted(plain, coefficients, state, counts_of(state))
    for own, exact in zip(got, want, strict=True):
        for value, expected in zip(own, exact, strict=True):
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_of_gradients_as_torch(scale: float, path: str) -> None:
    """G² leaves fp32's range: v becomes 0 or Inf, and the step is what torch makes of that."""
    family = Family(random_sets(1, LORA, scale=scale), "global")
    zeros = [torch.zeros(shape) for shape in LORA]
    params = [torch.nn.Parameter(p.clone()) for p in random_state(LORA, [torch.float32])[0]]
    state = [[p.detach().clone() for p in params], zeros, zeros]
    for p, g in zip(params, family.sets[0], strict=True):
        p.grad = g
    optimizer = torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    optimizer.step()
    steps = [torch.ones(()) for _ in LORA]
    got = run(path, family, torch.ones(1, 1, dtype=torch.float64), state, steps, eps=1e-8)
    for p, m, v, parameter in zip(*got, params, strict=True):
        own = optimizer.state[parameter]
        for value, expected in ((p, parameter.detach()), (m, own["exp_avg"]), (v, own["exp_avg_sq"])):
            torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_nonfinite_gradients_reach_their_own_elements(path: str) -> None:
    """As in torch's step; and a set whose coefficient is 0 is not looked at."""
    sets = random_sets(3, [(4, 6), (3,)])
    sets[0][0][1, 2] = torch.nan
    sets[1][1][0] = torch.inf
    sets[2][0][:] = torch.nan
    family = Family(sets, "global")
    coefficients = torch.tensor([[1.0, 0.5, 0.0]], dtype=torch.float64)
    state = random_state([(4, 6), (3,)], [torch.float32])
    got = run(path, family, coefficients, state, counts_of(state))
    for own in got:
        assert own[0].isnan().nonzero().tolist() == [[1, 2]]
    # m and v are infinite, and the step Inf/Inf.
    assert [own[1].isfinite().tolist() for own in got] == [[False, True, True]] * 3
    got = run(path, family, coefficients * torch.nan, state, counts_of(state))
    assert all(tensor.isnan().all() for own in got for tensor in own)


@pytest.mark.parametrize("path", PATHS)
def test_strided_tensors(path: str) -> None:
    family = Family([strided(own) for own in random_sets(2, LORA)], "row")
    state = random_state(LORA, [torch.float32])
    coefficients, steps = random_coefficients(family), counts_of(state)
    want = run(path, family, coefficients, state, steps)
    ours = [strided(own) for own in state]
    got = run(path, family, coefficients, ours, steps)
    assert not any(tensor.is_contiguous() for own in ours for tensor in own)
    for own, expected in zip(got, want, strict=True):
        for value, other in zip(own, expected, strict=True):
            assert torch.equal(value, other)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_one_element(path: str, dtype: torch.dtype) -> None:
    """From nothing along nothing only the decay moves p; the first step is lr, whatever the gradient."""
    family = Family([[torch.zeros(3, dtype=dtype), torch.full((), 1e-3, dtype=dtype)]], "tensor")
    state = [[torch.ones(3, dtype=dtype), torch.ones((), dtype=dtype)]]
    state += [[torch.zeros_like(p) for p in state[0]] for _ in range(2)]
    steps = [torch.ones(()), torch.ones(())]
    ones = torch.ones(2, 1, dtype=torch.float64)
    (still, single), _, _ = run(path, family, ones, state, steps, eps=1e-12)
    # Half precision: one rounding of p; fp16 rounds v to denormals, which leaves its own step.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        still.double(), torch.full((3,), 0.99, dtype=torch.float64), rtol=2 * eps, atol=eps
    )
    assert single.item() == pytest.approx(0.89, abs=max(4 * eps, 1e-6))


@pytest.mark.parametrize("path", PATHS)
def test_a_found_inf_leaves_all_as_it_was(path: str) -> None:
    family, state = Family(random_sets(2, LORA), "tensor"), random_state(LORA, [torch.float32])
    coefficients = random_coefficients(family)
    for found, moves in ((1.0, False), (0.0, True), (2.0, False)):
        flag = torch.tensor([found], device=device_of(path))
        got = run(path, family, coefficients, state, counts_of(state), found_inf=flag)
        same = [torch.equal(a, b) for own in zip(got, state, strict=True) for a, b in zip(*own, strict=True)]
        assert same == [not moves] * 9


@pytest.mark.parametrize("path", PATHS)
def test_is_bitwise_reproducible(path: str) -> None:
    family, state = Family(random_sets(2, LORA), "row"), random_state(LORA, [torch.float32])
    coefficients, steps = random_coefficients(family), counts_of(state)
    first, second = (run(path, family, coefficients, state, steps) for _ in range(2))
    for own, again in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True))


def test_reference_by_hand() -> None:
    """One step of one number: G = 2·1 − 1 = 1; m = 0.1, v = 0.01; m̂ = 1, v̂ = 1; p = 1 − 0.5·0.1 − 0.5."""
    one = torch.ones(1)
    plan = segmentation([one], "global")
    (p,), (m,), (v,) = reference(
        [[one], [one]], torch.tensor([[2.0, -1.0]]), plan, [one], [0 * one], [0 * one], [1],
        lr=0.5, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.1,
    )  # fmt: skip
    assert (p.item(), m.item(), v.item()) == pytest.approx((0.45, 0.1, 0.01))
