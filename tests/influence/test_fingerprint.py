"""Fingerprints: equal for equal weights and data, different where anything differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastproj.influence import fingerprint
from fastproj.influence.fingerprint import (
    RowsDigest,
    model_fingerprint,
    rows_fingerprint,
    tensors_fingerprint,
)


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    model.add_module("tied", nn.Linear(4, 3))
    model.tied.weight = model[0].weight  # type: ignore[union-attr, assignment, index]
    return model


# Weights


def test_equal_models_have_equal_fingerprints() -> None:
    one, two = small_model(), small_model()
    assert model_fingerprint(one) == model_fingerprint(two)
    assert len(model_fingerprint(one)) == 32
    two.eval().requires_grad_(False)
    assert model_fingerprint(one) == model_fingerprint(two)


def change_value(model: Any) -> None:
    model[0].weight.data[1, 2] += 1e-6


def change_buffer(model: Any) -> None:
    model[1].running_mean[0] = 1


def change_dtype(model: Any) -> None:
    model[2].weight.data.zero_()
    model[2].half()


def change_name(model: Any) -> None:
    model.other = model.tied
    del model.tied


@pytest.mark.parametrize("change", [change_value, change_buffer, change_dtype, change_name])
def test_any_change_shows(change: Any) -> None:
    model, changed = small_model(), small_model()
    change(changed)
    assert model_fingerprint(model) != model_fingerprint(changed)


def test_an_adapter_can_be_left_out() -> None:
    model, changed = small_model(), small_model()
    changed[2].weight.data.zero_()  # type: ignore[index, union-attr, operator]
    assert model_fingerprint(model, without=["2.weight"]) == model_fingerprint(changed, without={"2.weight"})
    assert model_fingerprint(model, without=["2.weight"]) != model_fingerprint(model)
    with pytest.raises(ValueError, match=r"names of the model's parameters in without, got \['lora'\]"):
        model_fingerprint(model, without=["lora"])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_layout_does_not_count_and_content_does(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    strided = torch.zeros(4, 3, 2, dtype=dtype)[..., 0].T.copy_(tensor)
    print_of = tensors_fingerprint({"a": tensor})
    assert tensors_fingerprint({"a": strided}) == print_of
    assert tensors_fingerprint({"a": tensor.reshape(4, 3)}) != print_of
    assert tensors_fingerprint({"b": tensor}) != print_of
    strided[2, 3] = 0
    assert tensors_fingerprint({"a": strided}) != print_of


def test_odd_tensors_have_fingerprints_of_their_own() -> None:
    odd = [
        torch.tensor(2.0),
        torch.tensor([2.0]),
        torch.empty(0),
        torch.empty(0, 3),
        torch.tensor(float("nan")),
    ]
    assert len({tensors_fingerprint({"a": tensor}) for tensor in odd}) == len(odd)
    assert tensors_fingerprint({"a": odd[-1]}) == tensors_fingerprint({"a": torch.tensor(float("nan"))})


def test_the_order_of_names_does_not_count_and_their_tensors_do() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert tensors_fingerprint({"a": one, "b": two}) == tensors_fingerprint({"b": two, "a": one})
    assert tensors_fingerprint({"a": one, "b": two}) != tensors_fingerprint({"a": two, "b": one})


def test_pieces_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(101)
    whole = tensors_fingerprint({"a": tensor})
    monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 40)
    assert tensors_fingerprint({"a": tensor}) == whole


def test_a_tensor_without_content_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tensors with content, got \['a'\] on the meta device"):
        tensors_fingerprint({"a": torch.empty(2, device="meta")})


# Data

ROWS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=6,
)


def exact(value: Any) -> Any:
    """A value that equals another exactly where both are of one kind and content."""
    if isinstance(value, list):
        return ("list", *map(exact, value))
    if isinstance(value, dict):
        return ("dict", *sorted((key, repr(exact(item))) for key, item in value.items()))
    return (type(value).__name__, repr(value))


@given(one=ROWS, two=ROWS)
def test_rows_are_equal_where_their_fingerprints_are(one: object, two: object) -> None:
    assert (rows_fingerprint([one]) == rows_fingerprint([two])) == (exact(one) == exact(two))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["ab", "c"], ["a", "bc"]),
        ([["a"], "b"], [["a", "b"]]),
        ([1], [1.0]),
        ([1], [True]),
        ([0], [None]),
        (["1"], [1]),
        (["a"], [b"a"]),
        ([0.0], [-0.0]),
        ([], [[]]),
        (["a", "b"], ["b", "a"]),
        ([torch.tensor([1])], [torch.tensor([1.0])]),
        ([torch.ones(2, 3)], [torch.ones(3, 2)]),
    ],
)
def test_likely_confusions_are_told_apart(one: list, two: list) -> None:
    assert rows_fingerprint(one) != rows_fingerprint(two)


def test_what_is_the_same_data_has_the_same_fingerprint() -> None:
    row: dict[str, Any] = {"text": "a", "labels": [1, 2], "weight": 0.5}
    alike = {"weight": np.float64(0.5), "labels": (np.int64(1), 2), "text": "a"}
    assert rows_fingerprint([row]) == rows_fingerprint([alike])
    tensor: Tensor = torch.arange(6).reshape(2, 3)
    assert rows_fingerprint([tensor]) == rows_fingerprint([tensor.numpy()])
    digest = RowsDigest()
    for part in (row, tensor):
        digest.update(part)
    assert digest.hexdigest() == rows_fingerprint(iter([row, tensor]))


def test_what_has_no_content_of_its_own_is_refused() -> None:
    for value in (object(), {1, 2}, np.array(["a"])):
        with pytest.raises(TypeError, match=f"got {type(value).__name__}"):
            rows_fingerprint([{"a": value}])
