"""Shares of real models that one block's adapter trains, against sums done by hand."""

from __future__ import annotations

import re

import pytest

from fastproj.balance.shares import CONFIGURATIONS, RANK, Share, main, share, shares

# As the models' own pages and files give them; tied weights count once.
PUBLISHED = {
    "Llama 2 7B": 6_738_415_616,
    "Llama 3.1 8B": 8_030_261_248,
    "Llama 3.2 1B": 1_235_814_400,
    "SmolLM2 135M": 134_515_008,
    "Mistral 7B": 7_241_732_096,
    "Gemma 2 2B": 2_614_341_888,
    "Gemma 2 9B": 9_241_705_984,
    "Gemma 3 1B": 999_885_952,
    "Qwen2.5 1.5B": 1_543_714_304,
    "Qwen2.5 7B": 7_615_616_512,
    "Qwen3 0.6B": 596_049_920,
    "Qwen3 8B": 8_190_735_360,
    "GPT-2": 124_439_808,
    "GPT-2 medium": 354_823_168,
    "GPT-2 large": 774_030_080,
    "GPT-2 XL": 1_557_611_200,
    "OPT 125M": 125_239_296,
    "OPT 1.3B": 1_315_758_080,
    "OPT 6.7B": 6_658_473_984,
}
# In full, one block of a shallow model, or of a wide one, is more than a hundredth of it.
BELOW_ONE_PER_CENT_IN_FULL = {
    "Llama 2 7B", "Llama 3.1 8B", "SmolLM2 135M", "Gemma 2 2B", "Gemma 2 9B", "Gemma 3 1B", "Qwen3 0.6B",
    "Qwen3 8B", "GPT-2 XL",
}  # fmt: skip


@pytest.fixture(scope="module")
def counted() -> dict[str, Share]:
    return {found.model: found for found in shares()}


def widths(name: str) -> tuple[int, int, int]:
    """Of the residual stream, and of what the attention's and the MLP's writers read."""
    sizes = CONFIGURATIONS[name]
    width = sizes.get("hidden_size", sizes.get("n_embd"))
    heads = sizes.get("num_attention_heads", sizes.get("n_head"))
    mlp = sizes.get("intermediate_size", sizes.get("ffn_dim", 4 * width))
    return width, heads * sizes.get("head_dim", width // heads), mlp


def test_the_models_are_of_their_published_size(counted: dict[str, Share]) -> None:
    assert {name: found.parameters for name, found in counted.items()} == PUBLISHED


def test_trained_are_both_writers_and_the_vector(counted: dict[str, Share]) -> None:
    for name, found in counted.items():
        width, attention, mlp = widths(name)
        biases = 2 * width if CONFIGURATIONS[name]["model_type"] in ("gpt2", "opt") else 0
        assert found.in_full == width * (attention + mlp) + biases + width, name
        assert found.low_rank == RANK * (attention + width + mlp + width) + width, name


def test_rank_16_is_below_one_per_cent_everywhere(counted: dict[str, Share]) -> None:
    assert RANK == 16
    assert all(found.low_rank < 0.01 * found.parameters for found in counted.values())


def test_in_full_some_are_below_one_per_cent(counted: dict[str, Share]) -> None:
    below = {name for name, found in counted.items() if found.in_full < 0.01 * found.parameters}
    assert below == BELOW_ONE_PER_CENT_IN_FULL


def test_the_table_has_what_was_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "fastproj.balance.shares.CONFIGURATIONS", {"SmolLM2 135M": CONFIGURATIONS["SmolLM2 135M"]}
    )
    monkeypatch.setenv("COLUMNS", "120")
    main()
    found = share("SmolLM2 135M")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "SmolLM2" in line]
    numbers = re.findall(r"[\d.,]+", row.split("135M")[1])
    assert numbers == ["134,515,008", "1,217,088", "0.905", "52,800", "0.039"]
    assert (found.in_full, found.low_rank) == (1_217_088, 52_800)
