"""LoRA layers of live models and of saved folders, and the spectrum of ΔW from its factors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_architectures import adapted, drawn, tiny
from torch import Tensor, nn

from fastproj.architectures import ARCHITECTURES
from fastproj.latent.lora import LoraLayer, lora_layers, spectrum

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"


def delta(layer: LoraLayer) -> Tensor:
    """ΔW formed whole, in fp64."""
    return layer.scale * layer.b.detach().double() @ layer.a.detach().double()


def saved(model: Any, folder: Path) -> Path:
    """The folder of the model's adapters as PEFT saves them."""
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_live_layers_are_those_of_peft_itself(kind: str) -> None:
    model: Any = adapted(kind)
    layers = {layer.name: layer for layer in lora_layers(model)}
    modules = dict(model.get_base_model().named_modules())
    assert list(layers) == [name for name, module in modules.items() if hasattr(module, "lora_A")]
    for name, layer in layers.items():
        assert layer.a is modules[name].lora_A["default"].weight
        assert layer.b is modules[name].lora_B["default"].weight
        ours = delta(layer).mT if modules[name].fan_in_fan_out else delta(layer)
        # PEFT forms ΔW in fp32: sums of r = 4 products of a few units.
        torch.testing.assert_close(
            ours, modules[name].get_delta_weight("default").double(), rtol=1e-5, atol=1e-5
        )


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 3},
        # No module fits both: PEFT takes the first, and sorts them when it saves.
        "alpha_pattern": {"layers.0.*(q|k)_proj": 5, "down_proj": 32},
    },
    "patterns in rslora": {"use_rslora": True, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_a_folder_holds_what_the_live_model_has(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    live = {layer.name: layer for layer in lora_layers(model)}
    read = lora_layers(saved(model, tmp_path))
    assert sorted(live) == sorted(layer.name for layer in read)
    for layer in read:
        assert torch.equal(layer.a, live[layer.name].a)
        assert torch.equal(layer.b, live[layer.name].b)
        assert layer.scale == live[layer.name].scale


def test_the_scale_of_rslora_is_alpha_by_the_root_of_r() -> None:
    assert {layer.scale for layer in lora_layers(adapted(use_rslora=True))} == {8 / math.sqrt(4)}
    assert {layer.scale for layer in lora_layers(adapted())} == {8 / 4}


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_names_are_the_base_models_for_every_architecture(kind: str, tmp_path: Path) -> None:
    model: Any = adapted(kind)
    names = {name for name, _ in model.get_base_model().named_modules()}
    folder = [layer.name for layer in lora_layers(saved(model, tmp_path))]
    assert set(folder) <= names
    assert set(folder) == {layer.name for layer in lora_layers(model)}


def test_layers_of_a_folder_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    names = [f"model.layers.{number}.fc1" for number in (0, 1, 2, 9, 10, 11, 100)]
    tensors = {f"base_model.model.{name}.lora_A.weight": torch.ones(1, 2) for name in names}
    tensors |= {f"base_model.model.{name}.lora_B.weight": torch.ones(3, 1) for name in names}
    save_file(tensors, tmp_path / WEIGHTS)
    assert [layer.name for layer in lora_layers(tmp_path)] == names


def test_several_adapters_are_told_apart(tmp_path: Path) -> None:
    model: Any = adapted()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    drawn(model, seed=1)
    saved(model, tmp_path)
    for source in (model, tmp_path):
        assert len(lora_layers(source, "default")) == 14
        assert [(layer.scale, len(layer.a)) for layer in lora_layers(source, "other")] == [(3, 2)] * 2
        with pytest.raises(ValueError, match=r"one of .*default, other, got 'third'"):
            lora_layers(source, "third")
    with pytest.raises(ValueError, match="holds several adapters, name one of default, other"):
        lora_layers(tmp_path)
    assert len(lora_layers(model)) == 14
    model.set_adapter("other")
    assert len(lora_layers(model)) == 2
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"2 are active \(default, other\)"):
        lora_layers(model)
    assert len(lora_layers(model, "other")) == 2


def test_checkpoints_beside_a_trained_adapter_are_passed_by(tmp_path: Path) -> None:
    """As the Trainer leaves a folder: the adapter that was saved last, and those of steps before."""
    early, last = drawn(adapted(), seed=1), drawn(adapted(), seed=2)
    saved(early, tmp_path / "checkpoint-10")
    only = lora_layers(tmp_path)
    saved(last, tmp_path)
    for found, model in ((only, early), (lora_layers(tmp_path), last)):
        own = {layer.name: layer.b for layer in lora_layers(model)}
        assert all(torch.equal(layer.b, own[layer.name]) for layer in found)


def test_the_only_adapter_of_a_folder_needs_no_name(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    saved(model, tmp_path)
    assert not (tmp_path / CONFIG).exists()
    assert len(lora_layers(tmp_path)) == len(lora_layers(str(tmp_path), "mine")) == 2


def test_an_adapter_that_transformers_added_is_read() -> None:
    model: Any = tiny("llama")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine")
    assert [layer.name for layer in lora_layers(model)] == [Q_PROJ, Q_PROJ.replace("0", "1")]


def test_layers_saved_beside_the_adapter_are_left_alone(tmp_path: Path) -> None:
    model: Any = adapted("bert", task_type="SEQ_CLS")
    saved(model, tmp_path)
    assert any("classifier" in key and "lora_" not in key for key in load_file(tmp_path / WEIGHTS))
    names = [layer.name for layer in lora_layers(tmp_path)]
    assert sorted(names) == sorted(layer.name for layer in lora_layers(model))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True, "target_modules": ["q_proj"]}, "DoRA|use_dora"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "embed"),
    "bias": ({"target_modules": ["fc1"], "lora_bias": True}, "bias"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
def test_other_kinds_of_lora_are_refused(case: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    options, told = case
    model = get_peft_model(tiny("opt"), LoraConfig(r=2, **options))
    with pytest.raises(ValueError, match=f"expected plain LoRA on linear layers, .*({told})"):
        lora_layers(model)
    with pytest.raises(ValueError, match=f"expected plain LoRA on linear layers, .*({told})"):
        lora_layers(saved(model, tmp_path))


def test_convolutions_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(3, 4, 2)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="'0' has LoRA on a convolution"):
        lora_layers(model)
    with pytest.raises(ValueError, match="expected A of rank 2 in '0'"):
        lora_layers(saved(model, tmp_path))


def test_other_types_of_peft_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny("llama"), IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    with pytest.raises(ValueError, match=f"'{Q_PROJ}' has Linear".replace(".", r"\.")):
        lora_layers(model)
    with pytest.raises(ValueError, match="expected an adapter of type LORA, got 'IA3'"):
        lora_layers(saved(model, tmp_path))


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are none in LlamaForCausalLM"):
        lora_layers(tiny("llama"))
    with pytest.raises(TypeError, match="expected a model or the folder of an adapter, got int"):
        lora_layers(3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="expected the folder of an adapter"):
        lora_layers(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"expected {CONFIG}"):
        lora_layers(tmp_path)


def written(folder: Path, config: str | dict[str, Any], tensors: dict[str, Tensor] | bytes | None) -> Path:
    """An adapter's folder as someone else may have made it."""
    (folder / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    if isinstance(tensors, bytes):
        (folder / WEIGHTS).write_bytes(tensors)
    elif tensors is not None:
        save_file(tensors, folder / WEIGHTS)
    return folder


PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
A, B = torch.ones(2, 3), torch.ones(5, 2)
KEY_A, KEY_B = "base_model.model.fc1.lora_A.weight", "base_model.model.fc1.lora_B.weight"
PAIR = {KEY_A: A, KEY_B: B}
HOSTILE: dict[str, tuple[str | dict[str, Any], dict[str, Tensor] | bytes | None, str]] = {
    "no json": ("{", PAIR, "is no JSON"),
    "a deep json": ("[" * 100_000, PAIR, "is no JSON"),
    "a list": ("[]", PAIR, "expected an adapter of type LORA, got 'list'"),
    "no type": ("{}", PAIR, "expected an adapter of type LORA, got None"),
    "another type": ({**PLAIN, "peft_type": "LOHA"}, PAIR, "got 'LOHA'"),
    "qalora": ({**PLAIN, "use_qalora": True}, PAIR, "got use_qalora"),
    "mica": ({**PLAIN, "init_lora_weights": "mica"}, PAIR, "got mica"),
    "on parameters": ({**PLAIN, "target_parameters": ["experts"]}, PAIR, "got target_parameters"),
    "another rank": ({**PLAIN, "r": 3}, PAIR, "expected A of rank 3 in 'fc1'"),
    "no rank": (
        {**PLAIN, "r": 0},
        {KEY_A: torch.ones(0, 3), KEY_B: torch.ones(5, 0)},
        "expected A of rank 0",
    ),
    "rank as text": ({**PLAIN, "r": "2"}, PAIR, "r must be a number, got '2'"),
    "alpha missing": ({"peft_type": "LORA", "r": 2}, PAIR, "lora_alpha must be a number, got None"),
    "alpha unknown": ('{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', PAIR, "must be a number, got nan"),
    "a broken pattern": ({**PLAIN, "alpha_pattern": {"(": 1}}, PAIR, "alpha_pattern holds no regular"),
    "a pattern that is none": ({**PLAIN, "alpha_pattern": [1]}, PAIR, "alpha_pattern must be a table"),
    "no safetensors": (PLAIN, b"\x80\x04", "is no safetensors file"),
    "a header too long": (PLAIN, b"\xff" * 8 + b"{}", "is no safetensors file"),
    "no lora": (PLAIN, {"x": A}, "expected LoRA weights, there are none"),
    "A alone": (PLAIN, {KEY_A: A}, "'fc1' has lora_A alone"),
    "an embedding": (
        PLAIN,
        {**PAIR, "base_model.model.e.lora_embedding_A": A + 1},
        "got 'base_model.model.e",
    ),
    "ranks that differ": (PLAIN, {KEY_A: A, KEY_B: torch.ones(5, 3)}, r"expected A \(r, d_in\)"),
    "an empty B": (PLAIN, {KEY_A: A, KEY_B: torch.ones(0, 2)}, r"expected A \(r, d_in\)"),
    "a convolution": (PLAIN, {KEY_A: torch.ones(2, 3, 1), KEY_B: B}, "expected A of rank 2"),
    "whole numbers": (PLAIN, {KEY_A: A.int(), KEY_B: B.int()}, "expected floating-point factors"),
    "nan": (PLAIN, {KEY_A: A, KEY_B: B * math.nan}, "'fc1' hold NaN or Inf"),
    "infinite": (PLAIN, {KEY_A: A / 0, KEY_B: B}, "'fc1' hold NaN or Inf"),
}


@pytest.mark.parametrize("case", HOSTILE.values(), ids=list(HOSTILE))
def test_damaged_and_hostile_folders_are_refused(case: Any, tmp_path: Path) -> None:
    config, tensors, told = case
    with pytest.raises(ValueError, match=told):
        lora_layers(written(tmp_path, config, tensors))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return (Path.touch, (tmp_path / "sprung",))

    written(tmp_path, PLAIN, None)
    torch.save({KEY_A: Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
        lora_layers(tmp_path)
    assert not (tmp_path / "sprung").exists()
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=f"expected {WEIGHTS}"):
        lora_layers(tmp_path)


def random_layer(
    d_out: int, d_in: int, r: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
    b = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    return LoraLayer("layer", a.to(dtype), b.to(dtype), scale)


@given(
    d_out=st.integers(1, 12),
    d_in=st.integers(1, 12),
    r=st.integers(1, 14),
    seed=st.integers(0, 99),
    scale=st.sampled_from([2.0, -0.5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_the_spectrum_is_that_of_the_dense_product(
    d_out: int, d_in: int, r: int, seed: int, scale: float, dtype: torch.dtype
) -> None:
    layer = random_layer(d_out, d_in, r, seed, scale, dtype)
    u, s, v = spectrum(layer)
    k = min(d_out, d_in, r)
    assert u.shape == (d_out, s.numel())
    assert v.shape == (d_in, s.numel())
    assert u.dtype == s.dtype == v.dtype == torch.float64
    assert k <= s.numel() <= r
    # fp64 throughout: sums of at most 14 products of a few units.
    torch.testing.assert_close(u @ s.diag() @ v.mT, delta(layer), rtol=1e-11, atol=1e-11)
    dense = torch.linalg.svdvals(delta(layer))[:k]
    torch.testing.assert_close(s[:k], dense, rtol=1e-11, atol=1e-11)
    identity = torch.eye(s.numel(), dtype=torch.float64)
    for vectors in (u, v):
        torch.testing.assert_close(vectors.mT @ vectors, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e-15, 1e15, 1e30, 1e150])
def test_the_spectrum_scales_with_the_factors(size: float) -> None:
    layer = random_layer(9, 7, 3)
    large = LoraLayer("layer", layer.a * size, layer.b, layer.scale)
    for plain, scaled in zip(spectrum(layer), spectrum(large), strict=True):
        factor = size if plain.dim() == 1 else 1.0
        torch.testing.assert_close(scaled, plain * factor, rtol=1e-11, atol=1e-12 * factor)


def test_a_product_beyond_fp64_is_refused() -> None:
    layer = random_layer(3, 3, 2)
    with pytest.raises(ValueError, match="the weights of 'layer' are too large"):
        spectrum(LoraLayer("layer", layer.a * 1e200, layer.b * 1e200, 1.0))


@pytest.mark.parametrize("zero", ["a", "b", "scale"])
def test_the_spectrum_of_nothing_is_zero(zero: str) -> None:
    layer = random_layer(6, 5, 2)
    parts = {"a": layer.a, "b": layer.b, "scale": layer.scale}
    parts[zero] = parts[zero] * 0
    assert spectrum(LoraLayer(name="layer", **parts))[1].tolist() == [0.0, 0.0]  # type: ignore[arg-type]


def test_non_contiguous_factors_give_the_same_spectrum() -> None:
    layer = random_layer(6, 5, 2)
    other = LoraLayer("layer", layer.a.mT.contiguous().mT, layer.b.mT.contiguous().mT, layer.scale)
    assert not other.a.is_contiguous()
    for one, two in zip(spectrum(layer), spectrum(other), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
