"""Device code shared by the span projections: reading blocks, exact-range products, combining.

A block is a piece of one shard (see ``_blocks``): a flat run of elements, or a run of narrow rows. A group of
gradient sets is a tuple of pointers here, one per set, so that dtypes may differ between them.
"""

# Device code has no types, and triton's subset of Python has no starred tuples.
# mypy: disallow-untyped-defs=False, disable-error-code="assignment"
# ruff: noqa: RUF005, SIM102, SIM108, SIM300

from __future__ import annotations

import triton
import triton.language as tl

# Sums of squares outside of this range may hide products that left fp32's; inside, what underflowed is
# below 2⁻⁴⁰ of the sum, and nothing overflowed, because squares only add up.
SMALLEST_TRUSTED = tl.constexpr(2.0**-60)
LARGEST_TRUSTED = tl.constexpr(2.0**127)


@triton.jit
def block_fields(blocks, ALIGNED: tl.constexpr):
    """Where this program's block lies: shard, first element, length, row width or FLAT, slot, segment."""
    row = blocks + tl.program_id(0).to(tl.int64) * 10
    start = tl.load(row + 1)
    width = tl.load(row + 3).to(tl.int32)
    # Hints stay with a value only inside the function that makes it.
    if ALIGNED:
        start = tl.multiple_of(start, 8)
        width = tl.multiple_of(width, 8)
    return tl.load(row), start, tl.load(row + 2).to(tl.int32), width, tl.load(row + 4), tl.load(row + 5)


@triton.jit
def slot_range(blocks, FIELD: tl.constexpr):
    """The slots of the block's segment (FIELD 6) or of its shard (FIELD 8)."""
    row = blocks + tl.program_id(0).to(tl.int64) * 10 + FIELD
    return tl.load(row), tl.load(row + 1)


@triton.jit
def shard_pointer(addresses, index, shard, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of element ``start`` of a shard, from row ``index`` of the pointer table."""
    pointer = tl.load(addresses + index + shard).to(tl.pointer_type(DTYPE))
    # A pointer that comes out of memory carries no alignment; the host has checked it.
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def set_pointers(addresses, shards, shard, start, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """One pointer per gradient set."""
    pointers = ()
    for k in tl.static_range(len(DTYPES)):
        pointers = pointers + (shard_pointer(addresses, k * shards, shard, start, DTYPES[k], ALIGNED),)
    return pointers


@triton.jit
def load_tiles(pointers, offsets, mask, MASKED: tl.constexpr, ACC: tl.constexpr):
    """One tile per set in the accumulation dtype; an unmasked load keeps its 128 bits."""
    tiles = ()
    for k in tl.static_range(len(pointers)):
        if MASKED:
            tile = tl.load(pointers[k] + offsets, mask=mask, other=0.0)
        else:
            tile = tl.load(pointers[k] + offsets)
        tiles = tiles + (tile.to(ACC),)
    return tiles


@triton.jit
def zeros(COUNT: tl.constexpr, LENGTH: tl.constexpr, DTYPE: tl.constexpr):
    """A tuple of COUNT zero vectors."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.full([LENGTH], 0.0, DTYPE),)
    return out


@triton.jit
def add_products(sums, tiles, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """``sums[ab] + Σ tile_a · tile_b`` over each VECTOR neighbours, for each pair a ≤ b.

    A thread holds whole vectors: it adds them up in its own registers and keeps one sum a vector.
    """
    out = ()
    for a in tl.static_range(len(tiles)):
        for b in tl.static_range(a, len(tiles)):
            product = tl.reshape(tiles[a] * tiles[b], [CHUNK // VECTOR, VECTOR])
            out = out + (sums[len(out)] + tl.sum(product, axis=1),)
    return out


@triton.jit
def scale_to_one(tile, AXIS: tl.constexpr):
    """The tile times a power of two that brings its largest magnitude to [1, 4), and the inverse in fp64.

    Exact for finite tiles: the exponent is read from the bits. Denormals take the largest scale.
    """
    bits = tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = tl.minimum(tl.maximum(tl.max(bits, axis=AXIS) >> 23, 1), 253)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    inverse = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
    if AXIS == 1:
        scale = scale[:, None]
    return tile * scale, inverse


@triton.jit
def add_scaled_products(sums, tiles, AXIS: tl.constexpr):
    """``sums[ab] + Σ tile_a · tile_b`` along AXIS in fp64, whatever the range of the fp32 tiles."""
    scaled = ()
    inverses = ()
    for k in tl.static_range(len(tiles)):
        tile, inverse = scale_to_one(tiles[k], AXIS)
        scaled = scaled + (tile,)
        inverses = inverses + (inverse,)
    out = ()
    for a in tl.static_range(len(tiles)):
        for b in tl.static_range(a, len(tiles)):
            product = tl.sum(scaled[a] * scaled[b], axis=AXIS).to(tl.float64)
            out = out + (sums[len(out)] + product * inverses[a] * inverses[b],)
    return out


@triton.jit
def add_row_products(sums, tiles):
    """``sums[ab] + Σ tile_a · tile_b`` along the rows of fp64 tiles."""
    out = ()
    for a in tl.static_range(len(tiles)):
        for b in tl.static_range(a, len(tiles)):
            out = out + (sums[len(out)] + tl.sum(tiles[a] * tiles[b], axis=1),)
    return out


@triton.jit
def flat_products(pointers, length, CHUNK: tl.constexpr, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """``Σ x_a x_b`` over a flat block for each pair a ≤ b, fp64 scalars.

    Lanes add up in ACC. Where fp32 may have overflowed or lost products to underflow, the block is read
    again with each chunk scaled exactly.
    """
    pairs: tl.constexpr = len(pointers) * (len(pointers) + 1) // 2
    offsets = tl.arange(0, CHUNK)
    sums = zeros(pairs, CHUNK // VECTOR, ACC)
    full = length // CHUNK * CHUNK
    for at in range(0, full, CHUNK):
        sums = add_products(sums, load_tiles(pointers, at + offsets, None, False, ACC), CHUNK, VECTOR)
    if full < length:
        tail = full + offsets
        sums = add_products(sums, load_tiles(pointers, tail, tail < length, True, ACC), CHUNK, VECTOR)
    out = ()
    trusted = length >= 0
    for a in tl.static_range(len(pointers)):
        for b in tl.static_range(a, len(pointers)):
            total = tl.sum(sums[len(out)], axis=0)
            if a == b:
                trusted = trusted & (total > SMALLEST_TRUSTED) & (total < LARGEST_TRUSTED)
            out = out + (total.to(tl.float64),)
    if ACC == tl.float32:
        if not trusted:
            # Rare, so that it takes short tiles rather than registers from the loop above.
            out = scaled_flat_products(pointers, length, CHUNK // VECTOR)
    return out


@triton.jit
def scaled_flat_products(pointers, length, CHUNK: tl.constexpr):
    """``flat_products`` for fp32 values of any magnitude: a scale per chunk, fp64 between chunks."""
    offsets = tl.arange(0, CHUNK)
    sums = ()
    for _ in tl.static_range(len(pointers) * (len(pointers) + 1) // 2):
        sums = sums + (length.to(tl.float64) * 0.0,)
    for start in range(0, length, CHUNK):
        at = start + offsets
        sums = add_scaled_products(sums, load_tiles(pointers, at, at < length, True, tl.float32), 0)
    return sums


@triton.jit
def row_products(pointers, row, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """``Σ x_a x_b`` along each of ROWS narrow rows from ``row`` on, for each pair a ≤ b, fp64 vectors."""
    pairs: tl.constexpr = len(pointers) * (len(pointers) + 1) // 2
    sums = zeros(pairs, ROWS, tl.float64)
    for column in range(0, width, COLUMNS):
        at, mask = row_offsets(row, column, length, width, ROWS, COLUMNS)
        tiles = load_tiles(pointers, at, mask, True, ACC)
        if ACC == tl.float32:
            sums = add_scaled_products(sums, tiles, 1)
        else:
            sums = add_row_products(sums, tiles)
    return sums


@triton.jit
def row_offsets(row, column, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets and mask of a tile of narrow rows."""
    rows = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    return rows[:, None] * width + columns[None, :], (rows < length)[:, None] & (columns < width)[None, :]


@triton.jit
def slot_sums(partials, slots, low, high, PAIRS: tl.constexpr, REDUCE: tl.constexpr):
    """The partial sums of slots low … high−1, added in a fixed order: PAIRS fp64 scalars."""
    sums = zeros(PAIRS, REDUCE, tl.float64)
    for first in range(low, high, REDUCE):
        at = first + tl.arange(0, REDUCE)
        added = ()
        for pair in tl.static_range(PAIRS):
            added = added + (sums[pair] + tl.load(partials + pair * slots + at, mask=at < high, other=0.0),)
        sums = added
    out = ()
    for pair in tl.static_range(PAIRS):
        out = out + (tl.sum(sums[pair], axis=0),)
    return out


@triton.jit
def split_coefficient(coefficient, ACC: tl.constexpr):
    """A coefficient as an fp32 factor times a power of two of about half its exponent; as it is in fp64.

    ``c·x`` then stays in range wherever the result does: |g|/|e| = 1e60 is no fp32 number, 1e30 twice is.
    """
    factor = coefficient
    power = coefficient
    if ACC == tl.float32:
        exponent = ((coefficient.to(tl.int64, bitcast=True) >> 52) & 0x7FF) - 1023
        half = tl.minimum(tl.maximum(exponent >> 1, -126), 126)
        inverse = ((1023 - half) << 52).to(tl.float64, bitcast=True)
        factor = (coefficient * inverse).to(tl.float32)
        power = ((127 + half) << 23).to(tl.int32).to(tl.float32, bitcast=True)
    return factor, power


@triton.jit
def weighted_sum(pointers, factors, powers, offsets, mask, MASKED: tl.constexpr, ACC: tl.constexpr):
    """``Σ_k c_k x_k``; a set whose coefficient is exactly 0 is not read."""
    total = tl.full(offsets.shape, 0.0, ACC)
    for k in tl.static_range(len(pointers)):
        used = tl.broadcast_to(factors[k], offsets.shape) != 0
        if MASKED:
            used = used & mask
        tile = tl.load(pointers[k] + offsets, mask=used, other=0.0).to(ACC)
        if ACC == tl.float32:
            tile = tile * powers[k]
        total += tile * factors[k]
    return total


@triton.jit
def rounded(tile, DTYPE: tl.constexpr):
    """The tile in DTYPE; fp64 goes to half precision by way of fp32, the one road that all backends know."""
    if tile.dtype == tl.float64 and DTYPE != tl.float64:
        tile = tile.to(tl.float32)
    return tile.to(DTYPE)


@triton.jit
def combine_flat(target, pointers, coefficients, length, CHUNK: tl.constexpr, ACC: tl.constexpr):
    """``target ← Σ_k c_k x_k`` over a flat block; reads each element before it is written."""
    factors = ()
    powers = ()
    for k in tl.static_range(len(pointers)):
        factor, power = split_coefficient(coefficients[k], ACC)
        factors = factors + (factor,)
        powers = powers + (power,)
    offsets = tl.arange(0, CHUNK)
    full = length // CHUNK * CHUNK
    for start in range(0, full, CHUNK):
        at = start + offsets
        total = weighted_sum(pointers, factors, powers, at, None, False, ACC)
        tl.store(target + at, rounded(total, target.dtype.element_ty))
    if full < length:
        tail = full + offsets
        total = weighted_sum(pointers, factors, powers, tail, tail < length, True, ACC)
        tl.store(target + tail, rounded(total, target.dtype.element_ty), mask=tail < length)


@triton.jit
def combine_rows(
    target, pointers, coefficients, row, length, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``target ← Σ_k c_k x_k`` over ROWS narrow rows, each with its own coefficients."""
    factors = ()
    powers = ()
    for k in tl.static_range(len(pointers)):
        factor, power = split_coefficient(coefficients[k], ACC)
        factors = factors + (factor[:, None],)
        powers = powers + (power[:, None],)
    for column in range(0, width, COLUMNS):
        at, mask = row_offsets(row, column, length, width, ROWS, COLUMNS)
        total = weighted_sum(pointers, factors, powers, at, mask, True, ACC)
        tl.store(target + at, rounded(total, target.dtype.element_ty), mask=mask)
