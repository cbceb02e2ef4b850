"""Latent factors: choosing among them, where they go, and the file that keeps them."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from tiny_architectures import WIDTH, adapted
from torch import Tensor

from fastproj.latent.factors import LatentFactors
from fastproj.latent.identify import identify
from fastproj.reference.basis import Basis, orthonormalize

TABLES = ("shares", "agreement", "p_values", "null_shares")
POOLS = ["module", "stream"]
O_PROJ = "model.layers.0.self_attn.o_proj"


def factors(pool: Any = "stream", rank: int = 3, **options: Any) -> LatentFactors:
    return identify(adapted(), pool=pool, rank=rank, **{"draws": 9, **options})


def assert_same(one: LatentFactors, two: LatentFactors) -> None:
    assert (one.side, one.pool, one.modules) == (two.side, two.pool, two.modules)
    assert list(one.bases) == list(two.bases)
    assert list(one.spectra) == list(two.spectra)
    for key, basis in one.bases.items():
        assert torch.equal(basis.matrix, two.bases[key].matrix)
    for name, values in one.spectra.items():
        assert torch.equal(values, two.spectra[name])
    for table in TABLES:
        assert list(getattr(one, table)) == list(getattr(two, table))
        for key, values in getattr(one, table).items():
            torch.testing.assert_close(values, getattr(two, table)[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("pool", POOLS)
def test_selected_columns_come_in_the_order_asked_for(pool: Any) -> None:
    every = factors(pool)
    some = every.select([2, 0])
    assert some.rank == 2
    for key, basis in every.bases.items():
        assert torch.equal(some.bases[key].matrix, basis.matrix[:, [2, 0]])
        for table in TABLES:
            expected = getattr(every, table)[key][[2, 0]]
            torch.testing.assert_close(getattr(some, table)[key], expected, rtol=0, atol=0, equal_nan=True)
    assert some.spectra is every.spectra
    assert_same(every.first(2), every.select([0, 1]))
    assert every.first(0).rank == 0


@pytest.mark.parametrize("columns", [[0, 0], [3], [-1]])
def test_columns_twice_or_absent_are_refused(columns: list[int]) -> None:
    with pytest.raises(ValueError, match="expected different columns from 0 to 2"):
        factors().select(columns)


@pytest.mark.parametrize("rank", [-1, 4])
def test_more_directions_than_there_are_cannot_be_first(rank: int) -> None:
    with pytest.raises(ValueError, match="expected a rank from 0 to 3"):
        factors().first(rank)


def test_bases_move_and_numbers_stay() -> None:
    every = factors()
    moved = every.to(device="meta", dtype=torch.float32)
    assert moved.bases["stream"].matrix.device.type == "meta"
    assert moved.bases["stream"].matrix.dtype == torch.float32
    assert moved.shares is every.shares
    assert_same(every.to(), every)


def test_the_basis_of_a_module() -> None:
    stream = factors()
    assert stream.basis_of(O_PROJ, WIDTH) is stream.bases["stream"]
    assert stream.basis_of(O_PROJ, WIDTH + 1) is None
    assert stream.basis_of("model.layers.7.mlp.down_proj", WIDTH) is stream.bases["stream"]
    # A query layer of this model gives vectors as long as the stream's, which are none of it.
    assert stream.basis_of("model.layers.0.self_attn.q_proj", WIDTH) is None
    assert stream.basis_of("model.layers.0", WIDTH) is stream.bases["stream"]
    own = factors("module")
    assert own.basis_of(O_PROJ, WIDTH) is own.bases[O_PROJ]
    assert own.basis_of(O_PROJ, WIDTH + 1) is None
    assert own.basis_of("model.layers.7.mlp.down_proj", WIDTH) is None


def bare(**changes: Any) -> LatentFactors:
    empty: dict[str, Any] = {table: {} for table in ("spectra", *TABLES)}
    basis = orthonormalize(torch.ones(4))
    options = {"side": "write", "pool": "stream", "bases": {"stream": basis}, "modules": (), **empty}
    return LatentFactors(**{**options, **changes})


def test_a_direction_found_by_other_means_needs_no_numbers() -> None:
    """As that of a probe, to be removed like the others."""
    made = bare()
    assert made.first(1).select([0]).to(dtype=torch.float32).rank == 1
    assert made.unchanged == ()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"side": "up"}, "side: expected 'read' or 'write', got 'up'"),
        ({"pool": "all"}, "pool: expected 'module' or 'stream', got 'all'"),
        ({"bases": {}}, "bases: expected one a module"),
        ({"bases": {"fc1": orthonormalize(torch.ones(4))}}, "bases: expected one a module"),
        (
            {
                "pool": "module",
                "bases": {"a": orthonormalize(torch.ones(4)), "b": orthonormalize(torch.eye(4))},
            },
            "as many directions in each",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bare(**changes)


@pytest.mark.parametrize("side", ["read", "write"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("draws", [0, 9])
def test_a_file_gives_back_what_was_saved(pool: Any, side: Any, draws: int, tmp_path: Path) -> None:
    every = factors(pool, side=side, draws=draws)
    every.save(tmp_path / "new" / "factors.safetensors")
    assert_same(every, LatentFactors.load(str(tmp_path / "new" / "factors.safetensors")))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["factors.safetensors"]


def test_bases_in_fp32_and_chosen_ones_are_saved_as_they_are(tmp_path: Path) -> None:
    for changed in (factors().to(dtype=torch.float32), factors().select([2, 1]), factors().first(0)):
        changed.save(tmp_path / "f")
        assert_same(changed, LatentFactors.load(tmp_path / "f"))


def test_fp32_directions_brought_to_fp64_are_orthonormal_enough(tmp_path: Path) -> None:
    rounded = factors(rank=8).to(dtype=torch.float32).to(dtype=torch.float64)
    rounded.save(tmp_path / "f")
    assert_same(rounded, LatentFactors.load(tmp_path / "f"))


def test_factors_that_could_not_be_read_are_not_written(tmp_path: Path) -> None:
    every = factors()
    every.save(tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(ValueError, match="expected shares of every basis, got those of"):
        bare().save(tmp_path / "f")
    with pytest.raises(ValueError, match="there are none of 'fc1'"):
        bare(modules=("fc1",)).save(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return json.loads(file.metadata()["fastproj.latent"]), {name: file.get_tensor(name) for name in names}


def changed_file(path: Path, pool: str, change: Any) -> Path:
    """A saved file whose header and tensors went through ``change(header, tensors)``."""
    factors(pool).save(path)
    header, tensors = contents(path)
    header = change(header, tensors) or header
    path.write_bytes(save(tensors, metadata={"fastproj.latent": json.dumps(header)}))
    return path


def setting(name: str, value: Any) -> Any:
    return lambda header, _: header.update({name: value})


def removing(name: str) -> Any:
    def change(_: Any, tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def scaling(name: str, factor: float) -> Any:
    return lambda _, tensors: tensors.update({name: tensors[name] * factor})


def replacing(name: str, change: Any) -> Any:
    return lambda _, tensors: tensors.update({name: change(tensors[name]).clone()})


HOSTILE: dict[str, tuple[str, Any, str]] = {
    "a newer version": ("stream", setting("version", 2), "expected version 1, got 2"),
    "no version": (
        "stream",
        setting("version", None),
        "expected version 1, got None",
    ),
    "a header that is a list": ("stream", lambda *_: [1], "its header has no 'fastproj.latent'"),
    "another side": ("stream", setting("side", "up"), "side: expected 'read' or 'write'"),
    "another pool": ("stream", setting("pool", "module"), "of every module, there are none of 'stream'"),
    "an unknown pool": ("stream", setting("pool", ["stream"]), "pool: expected"),
    "modules no list": ("stream", setting("modules", "all"), "expected names as 'modules'"),
    "modules no names": ("stream", setting("modules", [1, 2, 3, 4]), "expected names as 'modules'"),
    "modules twice": ("stream", setting("modules", ["a"] * 4), "expected different names as 'modules'"),
    "modules unknown": ("stream", setting("modules", list("abcd")), "there are none of 'a'"),
    "fewer modules": ("stream", setting("modules", [O_PROJ]), "as 'agreement/stream'"),
    "no bases": ("stream", setting("bases", []), "bases: expected one a module"),
    "a tensor too few": (
        "stream",
        removing("shares/stream"),
        "expected a tensor 'shares/s",
    ),
    "a basis too few": (
        "module",
        removing(f"basis/{O_PROJ}"),
        "expected a tensor 'basis/",
    ),
    "a tensor too many": ("stream", lambda _, t: t.update(x=torch.ones(1)), "expected no tensor 'x'"),
    "directions too long": ("stream", scaling("basis/stream", 1.001), "expected orthonormal directions"),
    "directions unknown": ("stream", scaling("basis/stream", math.nan), "expected orthonormal directions"),
    "directions infinite": ("stream", scaling("basis/stream", math.inf), "expected orthonormal directions"),
    "directions alike": (
        "stream",
        replacing("basis/stream", lambda v: v[:, [0, 0, 1]]),
        "expected orthonormal",
    ),
    "directions in 16 bits": ("stream", replacing("basis/stream", Tensor.bfloat16), "must be fp32 or fp64"),
    "directions flat": ("stream", replacing("basis/stream", Tensor.flatten), r"a basis must be \(d, k\)"),
    "more directions": ("stream", replacing("basis/stream", lambda v: v[:, :2]), "as 'shares/stream'"),
    "unequal ranks": (
        "module",
        replacing(f"basis/{O_PROJ}", lambda v: v[:, :2]),
        "as many directions in each",
    ),
    "spectrum unknown": ("stream", scaling(f"spectra/{O_PROJ}", math.nan), "expected singular values of"),
    "spectrum negative": ("stream", scaling(f"spectra/{O_PROJ}", -1), "expected singular values of"),
    "spectrum ascending": (
        "stream",
        replacing(f"spectra/{O_PROJ}", lambda v: v.flip(0)),
        "expected singular",
    ),
    "spectrum in fp32": ("stream", replacing(f"spectra/{O_PROJ}", Tensor.float), "expected fp64 of shape"),
    "shares unknown": (
        "stream",
        scaling("shares/stream", math.nan),
        "numbers from 0 to 1 in 'shares/stream'",
    ),
    "shares negative": ("stream", scaling("shares/stream", -1), "numbers from 0 to 1 in 'shares/stream'"),
    "agreement above one": ("stream", scaling("agreement/stream", 99), "from 0 to 1 in 'agreement/stream'"),
    "p infinite": ("stream", scaling("p_values/stream", math.inf), "from 0 to 1 in 'p_values/stream'"),
    "quantiles missing": ("stream", replacing("null_shares/stream", lambda v: v[:, :2]), "as 'null_shares/"),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=list(HOSTILE))
def test_damaged_and_hostile_files_are_refused_with_their_path(case: Any, tmp_path: Path) -> None:
    pool, change, told = case
    path = changed_file(tmp_path / "factors.safetensors", pool, change)
    with pytest.raises(ValueError, match=told) as caught:
        LatentFactors.load(path)
    assert str(path) in str(caught.value)


def test_an_unchanged_file_passes_all_that(tmp_path: Path) -> None:
    for pool in POOLS:
        path = changed_file(tmp_path / pool, pool, lambda *_: None)
        assert_same(LatentFactors.load(path), factors(pool))


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"\xff" * 64, pickle.dumps({"a": 1}), save({"a": torch.ones(1)})], ids=range(5)
)
def test_other_files_are_refused(payload: bytes, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(payload)
    with pytest.raises(ValueError, match=str(path)):
        LatentFactors.load(path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    factors().save(tmp_path / "f")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-8])
    with pytest.raises(ValueError, match="is no safetensors file"):
        LatentFactors.load(tmp_path / "f")


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["open", "deep"])
def test_a_header_that_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(save({"a": torch.ones(1)}, metadata={"fastproj.latent": text}))
    with pytest.raises(ValueError, match="its header is no JSON"):
        LatentFactors.load(tmp_path / "f")


def test_a_missing_file_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file of latent factors"):
            LatentFactors.load(path)


def test_a_basis_of_a_file_can_be_projected_out(tmp_path: Path) -> None:
    factors().save(tmp_path / "f")
    basis = LatentFactors.load(tmp_path / "f").bases["stream"]
    assert isinstance(basis, Basis)
    assert basis.matrix.mT.is_contiguous()
