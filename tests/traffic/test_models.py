"""The traffic of the named workloads against its bounds, and the roofline against hand-worked examples."""

from __future__ import annotations

import pytest
import torch

from fastproj.bench.traffic.chips import CHIPS, MIB, Chip
from fastproj.bench.traffic.models import OPERATORS, Traffic, roofline
from fastproj.bench.traffic.moves import DTYPES, KernelCount, Moves, Stream
from fastproj.bench.traffic.projected_adamw import projected_adamw, separate_bytes
from fastproj.bench.traffic.sketch import hadamard_moves, sparse_moves
from fastproj.bench.traffic.span import edge, gram, gram_and_combine, most_blocks
from fastproj.bench.traffic.workloads import WORKLOADS, Workload
from fastproj.kernels.gram import MOST_SETS

SLOW = Chip("slow", "sm_0", 100.0, {"bf16": 10.0, "fp32": 1.0}, 1000, 1, memory_bytes=1, source="made up")
NAMED = list(WORKLOADS.values())
TABLE_ENTRY = 8  # bytes


def _data_and_rest(traffic: Traffic, workload: Workload) -> tuple[float, float]:
    """Element accesses of the shards, and all other accesses in numbers of 8 bytes."""
    data = traffic.moves.bytes("load", "sets") + traffic.moves.bytes("store", "out")
    rest = traffic.read_bytes + traffic.written_bytes - data
    return data / DTYPES[workload.dtype].itemsize, rest / TABLE_ENTRY


@pytest.mark.parametrize("workload", NAMED, ids=lambda workload: workload.name)
@pytest.mark.parametrize("segments", ["global", "tensor"])
def test_gram_and_combine_access_five_times_the_elements(workload: Workload, segments: str):
    """2N read, 2N read again, N written; the rest is O(blocks), whatever N."""
    data, rest = _data_and_rest(gram_and_combine(workload, segments), workload)
    assert data == 5 * workload.elements
    # Per block: two times six fields, 2 + 3 addresses, three sums written and four read, two coefficients;
    # per segment: eight bounds and four entries, of which there are no more than blocks.
    assert rest <= (12 + 5 + 7 + 2 + 12) * most_blocks(len(workload.shards))


@pytest.mark.parametrize("workload", NAMED, ids=lambda workload: workload.name)
@pytest.mark.parametrize("segments", ["global", "tensor"])
def test_edge_accesses_five_times_the_elements(workload: Workload, segments: str):
    """As the Gram and the combination; besides, each block adds up the sums of its segment."""
    data, rest = _data_and_rest(edge(workload, segments), workload)
    blocks = most_blocks(len(workload.shards))
    assert data == 5 * workload.elements
    # Per block: 6 + 8 fields, 2 + 3 addresses, three sums written, six statistics; and 3 sums of each of its
    # segment's blocks.
    assert rest <= (14 + 5 + 3 + 6) * blocks + 3 * blocks**2


@pytest.mark.parametrize("workload", NAMED, ids=lambda workload: workload.name)
@pytest.mark.parametrize("operator", ["gram + combine", "edge"])
def test_the_second_read_is_a_hit_where_the_sets_fit(operator: str, workload: Workload):
    traffic = OPERATORS[operator](workload)
    fitting = 2 * workload.elements * 4
    # 2N + N where the sets fit, 4N + N where they do not; tables and sums add less than 1 %.
    assert traffic.memory_ratio(fitting) == pytest.approx(1.0, abs=0.01)
    assert traffic.memory_ratio(fitting - 1) == pytest.approx(5 / 3, abs=0.01)


@pytest.mark.parametrize("workload", NAMED, ids=lambda workload: workload.name)
@pytest.mark.parametrize("segments", ["global", "tensor"])
def test_a_step_in_one_sweep_saves_two_accesses_of_each_element(workload: Workload, segments: str):
    """e, g, p, m and v read, three of them written; a combination writes G as well, and AdamW reads it."""
    moves = projected_adamw(workload, segments).moves
    size = DTYPES[workload.dtype].itemsize * workload.elements
    assert moves.bytes("load", "sets", "state") + moves.bytes("store") == 8 * size
    whole = torch.empty((), dtype=DTYPES[workload.dtype]).expand(workload.elements)
    assert separate_bytes([[whole]] * 2, [[whole]] * 3, [whole]) == 10 * size
    # Per block: six fields, 2 + 3 addresses, two coefficients, a step and where it is, two controls.
    rest = moves.bytes("load") - 5 * size
    assert rest <= (6 + 5 + 2 + 2 + 2) * TABLE_ENTRY * most_blocks(len(workload.shards))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
@pytest.mark.parametrize("workload", NAMED, ids=lambda workload: workload.name)
@pytest.mark.parametrize("operator", ["weighted_grad", "per_sample_grad"])
def test_contractions_move_little_more_than_they_must(operator: str, workload: Workload, chip: Chip):
    """The project's bound: 1.05 × x, delta and the result once each."""
    assert 1.0 <= OPERATORS[operator](workload).memory_ratio(chip.l2_bytes) <= 1.05


@pytest.mark.parametrize("workload", NAMED, ids=lambda workload: workload.name)
@pytest.mark.parametrize("operator", OPERATORS)
def test_accesses_cover_memory_traffic_and_the_least_possible(operator: str, workload: Workload):
    traffic = OPERATORS[operator](workload)
    accessed = traffic.read_bytes + traffic.written_bytes
    assert traffic.least_bytes <= accessed
    assert traffic.memory_bytes(0) <= accessed
    assert traffic.least_bytes <= traffic.memory_bytes(10**12) <= traffic.memory_bytes(50 * MIB)
    assert traffic.launches > 0


def test_launches_of_the_span_projections_do_not_grow_with_the_shards():
    for workload in NAMED:
        assert [OPERATORS[name](workload).launches for name in ("gram", "combine", "edge")] == [2, 1, 2]


def test_least_bytes_and_flops_by_hand():
    """Llama-3.1-8B: 41,943,040 elements of 4 bytes in a set; q's A: 16,384 tokens, 4096 → 16."""
    workload = NAMED[1]
    n = 41_943_040
    assert (gram(workload).least_read_bytes, gram(workload).least_written_bytes) == (2 * n * 4, 4 * 8)
    assert gram(workload).flops == 6 * n
    assert edge(workload).least_written_bytes == n * 4 + 6 * 8
    by_tokens = 16_384 * 32
    sizes = 2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    traffic = OPERATORS["weighted_grad"](workload)
    assert traffic.flops == 2 * 2 * by_tokens * 16 * sizes
    # x and delta of A and of B in bf16, and the two weights of each of eight samples in fp32.
    assert traffic.least_read_bytes == 2 * by_tokens * (sizes + 14 * 16) + 32 * 14 * 2 * 8 * 4
    assert traffic.least_written_bytes == 2 * 2 * n
    assert OPERATORS["per_sample_grad"](workload).least_written_bytes == 8 * 2 * n


def test_sketches_by_blocks_by_hand():
    """Two vectors of 399 blocks and 8 positions, which lie in 400 blocks: 12.5 or 25 to each of 32 or 16."""
    positions, dtype = 399 * 4096 + 8, DTYPES["bf16"]
    vectors = 2 * positions * 2
    # Outputs in two groups: spans of 13 blocks, 31 of them; each gives 5,000 outputs a term.
    assert hadamard_moves(2, positions, 5000, dtype).by_kernel() == {
        "hadamard_kernel": KernelCount(1, 2 * vectors, 2 * 31 * 2 * 4096 * 4),
        "sampled_rows_kernel": KernelCount(1, 2 * 31 * 5000 * 4, 2 * 5000 * 4),
    }
    # Four parts: 16 spans of 25 blocks; all slots are added up.
    assert sparse_moves(2, positions, 64, dtype).by_kernel() == {
        "sparse_kernel": KernelCount(1, 4 * vectors, 2 * 16 * 4 * 4096 * 4),
        "slot_sums_kernel": KernelCount(1, 2 * 16 * 4 * 4096 * 4, 2 * 64 * 4),
    }
    # Positions 7 to 15: zeros make whole loads of 8 numbers, 0 to 15.
    assert sparse_moves(1, 9, 64, dtype, offset=7).bytes("load", "vectors") == 4 * 16 * 2


def _traffic(flops: int, rate: str) -> Traffic:
    streams = (
        Stream("one", "x", "load", accessed=900, distinct=300, resident=300),
        Stream("one", "out", "store", accessed=100, distinct=100),
        Stream("two", "x", "load", accessed=300, distinct=300, resident=300, warm=True),
    )
    return Traffic("made up", "by hand", Moves({"one": 1, "two": 1}, streams), 300, 100, flops, rate)


def test_roofline_by_hand():
    """300 read once, 100 written, 100 bytes and 10 FLOPs a second."""
    floor = roofline(_traffic(20, "bf16"), SLOW)
    assert (floor.memory_seconds, floor.arithmetic_seconds, floor.least_seconds) == (4.0, 2.0, 4.0)
    assert (floor.floor_seconds, floor.bound) == (4.0, "memory")
    floor = roofline(_traffic(20, "fp32"), SLOW)
    assert (floor.floor_seconds, floor.bound) == (20.0, "arithmetic")


def test_memory_traffic_by_hand():
    traffic = _traffic(0, "bf16")
    assert (traffic.read_bytes, traffic.written_bytes, traffic.launches) == (1200, 100, 2)
    assert traffic.access_ratio == 1300 / 400
    # x fits: read once. It does not: nine, one and three hundreds.
    assert (traffic.memory_bytes(300), traffic.memory_bytes(299)) == (400, 1300)
    assert traffic.moves.repeated(3).by_kernel() == {
        "one": KernelCount(3, 2700, 300),
        "two": KernelCount(3, 900, 0),
    }
    # A cache that holds one call's operands serves each of three calls on operands of their own.
    assert sum(stream.memory_bytes(300) for stream in traffic.moves.repeated(3).streams) == 3 * 400


def test_what_the_model_does_not_cover_is_refused():
    many = Workload("many", NAMED[0].model, 1, ("q_proj",), sets=MOST_SETS + 1)
    with pytest.raises(ValueError, match=f"at most {MOST_SETS} gradient sets, got {MOST_SETS + 1}"):
        gram(many)
    with pytest.raises(ValueError, match="2 gradient sets, e and g, got 9"):
        edge(many)
