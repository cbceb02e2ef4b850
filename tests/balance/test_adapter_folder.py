"""A saved adapter comes back as it was, and nothing else comes in its place."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_architectures import MODELS, WIDTH, tiny
from torch import Tensor, nn

import fastproj

CAUSAL = sorted(set(MODELS) - {"bert", "roberta"})
RANKS = (None, 3)
IDS = torch.arange(2, 14).view(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(kind: str = "llama", layer: int = 1, **options: Any) -> nn.Module:
    """With an adapter whose every parameter is drawn, as training would leave it."""
    model = fastproj.add_balance_adapter(tiny(kind).eval(), layer, **options)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def changed(folder: Path, **values: Any) -> None:
    """The configuration in the folder with other values."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewritten(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("kind", CAUSAL)
def test_what_is_saved_is_loaded(kind: str, rank: int | None, shift: bool, tmp_path: Path) -> None:
    model = adapted(kind, rank=rank, shift=shift)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, "README.md"}
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(load_file(tmp_path / WEIGHTS)) == len(names)
    for trainable in (True, False):
        again = fastproj.load_balance_adapter(tiny(kind).train(), tmp_path, trainable=trainable)
        assert again.training == trainable
        assert torch.equal(logits(again.eval()), logits(model))
        assert {n for n, p in again.named_parameters() if p.requires_grad} == (names if trainable else set())
        with again.disable_adapter():
            assert torch.equal(logits(again), logits(tiny(kind).eval()))


@pytest.mark.parametrize("rank", RANKS)
def test_what_is_loaded_can_be_saved_again(rank: int | None, tmp_path: Path) -> None:
    adapted(rank=rank, layer=0).save_pretrained(tmp_path / "first")
    fastproj.load_balance_adapter(tiny("llama"), tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_alpha_and_options_of_peft_are_those_of_the_file(tmp_path: Path) -> None:
    adapted(rank=3, alpha=1.5).save_pretrained(tmp_path)
    plain = logits(fastproj.load_balance_adapter(tiny("llama").eval(), str(tmp_path)))
    assert torch.equal(plain, logits(adapted(rank=3, alpha=1.5)))
    changed(tmp_path, use_rslora=True)
    assert not torch.equal(logits(fastproj.load_balance_adapter(tiny("llama").eval(), tmp_path)), plain)


def test_loading_leaves_the_callers_random_state(tmp_path: Path) -> None:
    adapted(rank=3).save_pretrained(tmp_path)
    model = tiny("llama")
    before = torch.random.get_rng_state()
    fastproj.load_balance_adapter(model, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)


def refused(folder: Path, match: str, error: type[Exception] = ValueError, kind: str = "llama") -> None:
    """Loading fails with that message, and the model is as it was."""
    model = tiny(kind)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=match):
        fastproj.load_balance_adapter(model, folder)
    assert [name for name, _ in model.named_modules()] == names
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "there is none", FileNotFoundError)
    refused(tmp_path, "there is none", FileNotFoundError)
    adapted().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    refused(tmp_path, f"expected {WEIGHTS}", FileNotFoundError)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    refused(tmp_path, "is a pickle, which can run code")
    assert not (tmp_path / "sprung").exists()


def test_a_pickle_beside_the_weights_is_not_read(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert torch.equal(logits(fastproj.load_balance_adapter(tiny("llama").eval(), tmp_path)), logits(model))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("rank", RANKS)
def test_damaged_files(rank: int | None, tmp_path: Path) -> None:
    adapted(rank=rank).save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-8])
    refused(tmp_path, "is no safetensors file")
    (tmp_path / WEIGHTS).write_bytes(whole)
    (tmp_path / CONFIG).write_text("{")
    refused(tmp_path, "is no JSON")


@pytest.mark.parametrize("rank", RANKS)
def test_weights_that_are_missing_too_many_or_of_another_shape(rank: int | None, tmp_path: Path) -> None:
    adapted(rank=rank).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for key in tensors:
        name = key.removeprefix("base_model.model.")
        rewritten(tmp_path, {k: v for k, v in tensors.items() if k != key})
        refused(tmp_path, rf"expected '{name}' of shape \(.*\), got none")
        rewritten(tmp_path, {**tensors, key: tensors[key][:-1].contiguous()})
        refused(tmp_path, rf"expected '{name}' of shape")
    rewritten(tmp_path, {**tensors, "base_model.model.lm_head.weight": torch.zeros(2, 2)})
    refused(tmp_path, r"expected 'lm_head\.weight' of shape none, got \(2, 2\)")


@pytest.mark.parametrize("rank", RANKS)
def test_an_adapter_of_another_model(rank: int | None, tmp_path: Path) -> None:
    adapted("gpt2", rank=rank).save_pretrained(tmp_path)
    refused(tmp_path, r"expected the writers of one block of 'model\.layers\.0' to 'model\.layers\.1'")
    adapted("llama", rank=rank).save_pretrained(tmp_path)
    changed_names = json.loads((tmp_path / CONFIG).read_text())
    for key in ("modules_to_save", "target_modules"):
        if isinstance(changed_names[key], list):
            changed_names[key] = [name.replace("layers.1", "layers.7") for name in changed_names[key]]
    (tmp_path / CONFIG).write_text(json.dumps(changed_names))
    refused(tmp_path, "expected the writers of one block")


def test_other_adapters(tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(target_modules=["o_proj", "down_proj"])).save_pretrained(
        tmp_path
    )
    refused(tmp_path, "expected the writers of one block .* got down_proj, o_proj")
    adapted(rank=3).save_pretrained(tmp_path)
    for values, match in (
        ({"modules_to_save": ["model.layers.0.input_shift.vector"]}, "expected the writers of one block"),
        (
            {"modules_to_save": ["model.layers.1.input_shift.vector", "lm_head"]},
            "expected the writers of one",
        ),
        ({"target_modules": ["model.layers.1.mlp.down_proj"]}, "expected the writers of one block"),
        ({"target_modules": ".*down_proj"}, "expected names of modules in 'target_modules'"),
        ({"target_modules": None}, "expected the writers of one block"),
        ({"r": 4}, "lora_A"),
        ({"r": "3"}, "lora_A"),
        ({"use_dora": True}, "expected plain LoRA"),
        ({"peft_type": "IA3"}, "expected an adapter of type LORA"),
    ):
        adapted(rank=3).save_pretrained(tmp_path)
        changed(tmp_path, **values)
        refused(tmp_path, match)


def test_a_model_that_does_not_suit(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    refused(tmp_path, "an encoder", kind="bert")
    with pytest.raises(ValueError, match="without an adapter"):
        fastproj.load_balance_adapter(adapted(), tmp_path)
    quantised = tiny("llama")
    writer = quantised.model.layers[1].mlp.down_proj
    writer.weight = nn.Parameter(torch.zeros(WIDTH, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="give a rank"):
        fastproj.load_balance_adapter(quantised, tmp_path)
