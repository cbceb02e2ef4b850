"""Nothing is left out of the compile matrix: no kernel, no choice of a launcher, no pair of choices."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from projection_inputs import Problem, problems, run
from span_inputs import Family, families, random_sets

import fastproj.kernels
from fastproj.bench.audit.compilation import TARGETS, jobs, operators
from fastproj.bench.traffic.recorder import Launch, observed_accesses
from fastproj.kernels import (
    balance_loss,
    combine,
    edge,
    gram,
    per_sample_grad,
    projected_adamw,
    sketch,
    weighted_grad,
)
from fastproj.kernels._cases import CompileCase, every_pair

KERNELS = Path(fastproj.kernels.__file__).parent
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled launches are not seen")


def launched_kernels(source: str) -> set[str]:
    """Names that are launched somewhere in a file: ``name[grid](...)``."""
    return {
        node.func.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }


def cases(operator: str) -> tuple[CompileCase, ...]:
    found: tuple[CompileCase, ...] = import_module(f"fastproj.kernels.{operator}").COMPILE_CASES
    return found


def test_every_kernel_that_is_launched_is_in_the_matrix() -> None:
    launched: dict[str, set[str]] = {}
    for path in KERNELS.glob("*.py"):
        # An operator of several kinds keeps each in a file of its own: ``_sketch_dense`` is a part of sketch.
        name = next((name for name in operators() if path.stem.startswith(f"_{name}_")), path.stem)
        launched.setdefault(name, set()).update(launched_kernels(path.read_text(encoding="utf-8")))
    assert {name for name, kernels in launched.items() if kernels} == set(operators())
    for operator in operators():
        assert launched[operator] == {case.kernel.__name__ for case in cases(operator)}, operator


def test_a_launch_is_seen() -> None:
    assert launched_kernels("def f():\n    new_kernel[(1, 2)](x, BLOCK=3)\n    table[0] = g(y)") == {
        "new_kernel"
    }


def test_cases_have_names_of_their_own() -> None:
    for operator in operators():
        names = [case.name for case in cases(operator)]
        assert len(set(names)) == len(names), operator


def test_all_cases_go_to_all_targets() -> None:
    count = sum(len(cases(operator)) for operator in operators())
    assert len(set(jobs(operators(), tuple(TARGETS)))) == count * 5
    with pytest.raises(ValueError, match=r"expected some of .*'edge'.* got \['nothing'\]"):
        jobs(["nothing"], ["sm_90"])
    with pytest.raises(ValueError, match=r"expected some of .*'gfx942'.* got \['sm_1'\]"):
        jobs(["edge"], ["sm_90", "sm_1"])


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_every_pair_meets(sizes: list[int]) -> None:
    choices = {f"choice {i}": [f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)}
    found = every_pair(**choices)
    assert found[0] == {name: values[0] for name, values in choices.items()}
    for name, values in choices.items():
        assert {row[name] for row in found} == set(values)
    for a, b in combinations(choices, 2):
        assert {(row[a], row[b]) for row in found} == {(x, y) for x in choices[a] for y in choices[b]}
    assert len(found) <= max(sizes) * max(sizes) + sum(sizes)


def traits(kernel: str, constants: dict[str, Any]) -> dict[str, Any] | None:
    """What was chosen in a launch or a case; None where sets mix their dtypes, in endless combinations.

    Left out is what follows from the other choices, and the width of a layer.
    """
    following = ("ACC", "CHUNK", "VECTOR", "ROWS", "NARROW", "ENTRY")
    chosen = {n: str(value) for n, value in constants.items() if n.isupper() and n not in following}
    if "DTYPES" in constants:
        dtypes = constants["DTYPES"]
        if len({*dtypes, *constants.get("STATE", ()), constants.get("OUT", dtypes[0])}) > 1:
            return None
        # Combinations of three sets and more are alike but for their registers: the most are among the cases.
        alike = ("_combine_kernel", "_projected_adamw_kernel")
        sets = min(len(dtypes), 3) if kernel in alike else len(dtypes)
        chosen |= {"DTYPES": str(dtypes[0]), "sets": str(sets), "OUT": "", "STATE": ""}
    if "narrow_stride" in constants or "wide_stride" in constants:
        chosen["delta is narrow"] = str(constants.get("wide_stride") == 1)
    return chosen


def one_by_one(constants: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The classes of length of a launch apart: a branch each, which registers of their own serve."""
    lengths = constants.get("LENGTHS")
    yield from [constants] if lengths is None else ({**constants, "LENGTHS": length} for length in lengths)


def pairs(chosen: dict[str, Any]) -> Iterator[frozenset[tuple[str, Any]]]:
    return (frozenset(pair) for pair in combinations(sorted(chosen.items()), 2))


def compiled_pairs() -> dict[str, set[frozenset[tuple[str, Any]]]]:
    """Of every kernel, the pairs of choices that some case has."""
    known: dict[str, set[frozenset[tuple[str, Any]]]] = {}
    for operator in operators():
        for case in cases(operator):
            for constants in one_by_one(dict(case.constexprs)):
                chosen = traits(case.kernel.__name__, constants)
                known.setdefault(case.kernel.__name__, set()).update(pairs(chosen or {}))
    return known


KNOWN = compiled_pairs()


def check(launch: Launch) -> None:
    for constants in one_by_one(dict(launch.arguments)):
        missing = set(pairs(traits(launch.kernel, constants) or {})) - KNOWN[launch.kernel]
        assert missing == set(), f"{launch.kernel} was launched with what no case has"


@interpreted
@settings(max_examples=40)
@given(family=families(), variant=st.sampled_from(edge.VARIANTS))
def test_launchers_of_projections_choose_what_is_compiled(family: Family, variant: str) -> None:
    plan, sets = family.plan, family.sets
    with observed_accesses(lambda access: None, check):
        gram.gram(family.flat, len(sets), plan.first, plan.rows, plan.count)
        combine.combine(
            family.flat,
            torch.ones(plan.count, len(sets), dtype=torch.float64),
            plan.first,
            plan.rows,
            sets[0],
        )
        state, steps = (
            [[shard.abs() for shard in sets[0]] for _ in range(3)],
            [torch.ones(()) for _ in sets[0]],
        )
        projected_adamw.projected_adamw(
            family.flat, torch.ones(plan.count, len(sets), dtype=torch.float64), plan.first, plan.rows,
            *state, steps, torch.ones(()), 0.9, 0.999, 1e-8, 0.0, None,
        )  # fmt: skip
        if len(sets) > 1 and (variant != "released" or plan.rows):
            edge.edge(sets[0], sets[1], sets[0], plan.first, plan.rows, plan.count, 1.0, variant, False)


@interpreted
@settings(max_examples=15)
@given(problem=problems())
def test_launchers_of_subspace_projections_choose_what_is_compiled(problem: Problem) -> None:
    with observed_accesses(lambda access: None, check):
        run("triton", problem)


@interpreted
@pytest.mark.parametrize("num_sets", [5, 6, 7, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [False, True])
def test_many_sets_choose_what_is_compiled(num_sets: int, dtype: torch.dtype, rows: bool) -> None:
    shapes = [(6, 16), (3, 24), (40,)]
    flat = [shard for shards in random_sets(num_sets, shapes, [dtype]) for shard in shards]
    first, count = ([0, 6, 9], 10) if rows else ([0, 0, 0], 1)
    with observed_accesses(lambda access: None, check):
        gram.gram(flat, num_sets, first, rows, count)


@interpreted
def test_combinations_take_no_more_sets_than_a_case() -> None:
    most = max(len(case.constexprs["DTYPES"]) for case in cases("combine"))
    assert most == combine.MOST_SETS
    launched: list[int] = []
    sets = random_sets(2 * most + 3, [(5,)])
    coefficients = torch.linspace(-1, 2, len(sets), dtype=torch.float64)
    want = sum(c * own[0].double() for c, own in zip(coefficients, sets, strict=True))

    def note(launch: Launch) -> None:
        launched.append(len(launch.arguments["DTYPES"]))

    # In place of the last set: it is read before it is written.
    out = sets[-1]
    with observed_accesses(lambda access: None, note):
        combine.combine([s for own in sets for s in own], coefficients[None], [0], False, out)
    assert launched == [most, most, 5]
    # Sums of 35 numbers of order one in fp32.
    torch.testing.assert_close(out[0].double(), want, rtol=1e-5, atol=1e-5)


@interpreted
@settings(max_examples=40)
@given(
    size=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    sums=st.integers(1, 3),
    tf32=st.booleans(),
)
def test_launchers_of_contractions_choose_what_is_compiled(
    size: tuple[int, int, int, int], dtype: torch.dtype, sums: int, tf32: bool
) -> None:
    samples, tokens, d_out, d_in = size
    x, delta = torch.ones(samples, tokens, d_in, dtype=dtype), torch.ones(samples, tokens, d_out, dtype=dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with observed_accesses(lambda access: None, lambda launch: check(with_ones(launch))):
            weighted_grad.weighted_grad(x, delta, torch.ones(sums, samples))
            per_sample_grad.per_sample_grad(x, delta)
    finally:
        torch.set_float32_matmul_precision(before)


@interpreted
@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 300)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    kind=st.sampled_from(["rademacher", "gaussian"]),
)
def test_launchers_of_sketches_choose_what_is_compiled(
    size: tuple[int, int, int], dtype: torch.dtype, kind: str
) -> None:
    samples, positions, dimension = size
    with observed_accesses(lambda access: None, check):
        sketch.sketch([torch.ones(samples, positions, dtype=dtype)], dimension, 0, kind, 0)


@interpreted
@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(1, 3), st.sampled_from([1, 32, 33, 256, 257, 1024, 1025])),
    each=st.booleans(),
    known=st.booleans(),
    losses=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_launchers_of_the_balance_loss_choose_what_is_compiled(
    size: tuple[int, int], each: bool, known: bool, losses: tuple[bool, bool]
) -> None:
    labels = torch.zeros(size if each else size[0], dtype=torch.int64)
    means = torch.zeros(2, size[1], dtype=torch.float64) if known else None
    with observed_accesses(lambda access: None, check):
        *both, _, slopes = balance_loss.balance_loss(torch.ones(size), labels, means, True, -100)
        grads = [loss if wanted else None for loss, wanted in zip(both, losses, strict=True)]
        balance_loss.balance_loss_backward(*grads, slopes, labels, -100, torch.float32)


def with_ones(launch: Launch) -> Launch:
    """As triton specialises it: a stride of 1 is a constant, and tf32 is a choice of fp32 alone."""
    arguments = dict(launch.arguments)
    if "narrow_stride" in arguments:
        del arguments["narrow_stride" if arguments["wide_stride"] == 1 else "wide_stride"]
        if str(arguments["OPERAND"]) != "fp32":
            arguments["PRECISION"] = "ieee"
    return Launch(launch.kernel, launch.launch, launch.grid, arguments)
