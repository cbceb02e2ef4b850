"""LoRA layers of a live PEFT model or of a saved adapter, as factors of ``ΔW = s·B·A``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.latent.adapter_file import read_adapter

LoraSource = nn.Module | str | Path


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """``ΔW = s·B·A`` of one linear layer, as its factors.

    Attributes:
        name: the layer's in the base model, without PEFT's prefixes: ``"model.layers.0.self_attn.q_proj"``.
        a: (r, d_in); of a live model the parameter itself.
        b: (d_out, r); likewise.
        scale: s, ``alpha/r`` or, in rsLoRA, ``alpha/√r``.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: float


def lora_layers(source: LoraSource, adapter: str | None = None) -> list[LoraLayer]:
    """The LoRA layers of an adapter, in the model's order, or in a folder by name.

    Args:
        source: a model with PEFT's LoRA layers, or a folder that PEFT saved: ``adapter_config.json`` and
            ``adapter_model.safetensors``, of which nothing is unpickled.
        adapter: which one of several. None is a live model's active one, or the only one in a folder; PEFT
            keeps the adapter "default" in the folder itself, and others in folders in it.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it.
        ValueError: no adapter of that name; several and none named; another kind than plain LoRA on linear
            layers (DoRA, embeddings, convolutions, a bias in B, other PEFT types), a damaged file, weights
            that are not finite, of shapes that do not fit or without their counterpart.
        TypeError: another kind of source.
    """
    if isinstance(source, nn.Module):
        layers = list(_live_layers(source, adapter))
    elif isinstance(source, (str, Path)):
        layers = [LoraLayer(*parts) for parts in read_adapter(Path(source), adapter)]
    else:
        raise TypeError(f"expected a model or the folder of an adapter, got {type(source).__name__}")
    for layer in layers:
        _check(layer)
    return layers


def spectrum(layer: LoraLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Singular value decomposition ``ΔW = U diag(S) Vᵀ`` from the factors alone.

    ``B = Q_B R_B``, ``Aᵀ = Q_A R_A``, and ``s·R_B R_Aᵀ = U' S V'ᵀ`` is r × r; ``U = Q_B U'``, ``V = Q_A V'``.
    U (d_out, k), S (k,) descending and V (d_in, k), k = min(r, d_out, d_in), fp64 on the CPU. Raises
    ValueError where a singular value is beyond fp64.
    """
    b, b_scale = unit_scaled(layer.b)
    a, a_scale = unit_scaled(layer.a.mT)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    u, v = q_b @ u, q_a @ vh.mT
    s = s * b_scale * a_scale * abs(layer.scale)
    if not bool(torch.isfinite(s).all()):
        raise ValueError(f"the weights of {layer.name!r} are too large: ΔW is not finite in fp64")
    return u, s, -v if layer.scale < 0 else v


def unit_scaled(factor: Tensor) -> tuple[Tensor, float]:
    """The factor in fp64 at a largest magnitude of 1, and what it was: squares of 1e±300 stay in range."""
    wide = factor.detach().to(device="cpu", dtype=torch.float64)
    largest = float(wide.abs().max())
    return (wide / largest, largest) if largest else (wide, 0.0)


def _live_layers(model: nn.Module, adapter: str | None) -> Iterator[LoraLayer]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapper: Any = model
    base: nn.Module = wrapper.get_base_model() if hasattr(model, "get_base_model") else model
    tuned: list[tuple[str, Any]] = [(n, m) for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
    if not tuned:
        raise ValueError(f"expected a model with LoRA layers, there are none in {type(base).__name__}")
    name = _live_adapter([module for _, module in tuned], adapter)
    for path, module in tuned:
        layer = _live_layer(path, module, name)
        if layer is not None:
            yield layer


def _live_adapter(layers: list[Any], adapter: str | None) -> str:
    """The adapter asked for, else the only active one."""
    known = list(dict.fromkeys(name for layer in layers for name in _adapters(layer)))
    if adapter is not None:
        if adapter not in known:
            raise ValueError(f"adapter: expected one of {', '.join(known)}, got {adapter!r}")
        return adapter
    active = list(dict.fromkeys(n for layer in layers for n in layer.active_adapters if n in known))
    if len(active) != 1:
        which = f"{len(active)} are active ({', '.join(active)})" if active else "none is active"
        raise ValueError(f"adapter: {which}, name one of {', '.join(known)}")
    return active[0]


def _adapters(layer: Any) -> list[str]:
    """Names of the adapters in a layer of whatever PEFT type."""
    tables = [getattr(layer, name) for name in layer.adapter_layer_names if hasattr(layer, name)]
    return [name for table in tables if hasattr(table, "keys") for name in table.keys()]  # noqa: SIM118


def _live_layer(path: str, module: Any, adapter: str) -> LoraLayer | None:
    """The adapter's factors in a layer, None where it has none; ValueError where it is no plain LoRA."""
    from peft.tuners.lora import LoraLayer as PeftLoraLayer

    if adapter not in _adapters(module):
        return None
    kind = None
    if not isinstance(module, PeftLoraLayer):
        kind = type(module).__name__
    elif adapter in module.lora_embedding_A:
        kind = "LoRA on an embedding"
    elif adapter in module.lora_magnitude_vector:
        kind = "DoRA"
    elif adapter in module.lora_variant:
        kind = type(module.lora_variant[adapter]).__name__
    elif type(module).__name__ == "ParamWrapper":
        kind = "LoRA on a parameter"
    elif module.lora_B[adapter].bias is not None:
        kind = "LoRA with a bias"
    elif module.lora_A[adapter].weight.dim() != 2:
        kind = "LoRA on a convolution"
    if kind is not None:
        raise ValueError(f"expected plain LoRA on linear layers, {path!r} has {kind}")
    a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return LoraLayer(path, a, b, float(module.scaling[adapter]))


def _check(layer: LoraLayer) -> None:
    a, b = layer.a, layer.b
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        raise ValueError(
            f"expected A (r, d_in) and B (d_out, r) in {layer.name!r}, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if not (a.dtype.is_floating_point and b.dtype.is_floating_point):
        raise ValueError(f"expected floating-point factors in {layer.name!r}, got {a.dtype} and {b.dtype}")
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"the LoRA weights of {layer.name!r} hold NaN or Inf")
