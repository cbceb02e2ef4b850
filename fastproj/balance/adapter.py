"""One block of a language model trained alone: the layers it writes with, and a vector added before it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastproj.architectures import ARCHITECTURES, architecture_of, blocks
from fastproj.balance.adapter_folder import SHIFT, VECTOR, read_folder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


class InputShift(nn.Module):
    """``h ← h + v``: one vector added to the hidden states of every token.

    v is the weight (d, 1) of a linear layer that reads ones: a type of layer whose sample gradients the rest
    of the package takes apart. It starts at zero, in fp32, in fp64 where ``like`` is fp64. With the adapter
    disabled the hidden states come back as they are.
    """

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.vector = nn.Linear(1, width, bias=False, device=like.device, dtype=dtype)
        nn.init.zeros_(self.vector.weight)
        self.handle: RemovableHandle | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, d) in its own dtype; the vector's is that of its product."""
        if getattr(self.vector, "disable_adapters", False):
            return hidden
        ones = hidden.new_ones(hidden.shape[0], 1, 1, dtype=self.vector.weight.dtype)
        shift: Tensor = self.vector(ones)
        return hidden + shift.to(hidden.dtype)


def shift_input(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A block's forward pre-hook: its input through its ``input_shift``; by name, for copies and pickles."""
    shift: Any = block.get_submodule(SHIFT)
    if "hidden_states" in kwargs:
        return args, {**kwargs, "hidden_states": shift(kwargs["hidden_states"])}
    return (shift(args[0]), *args[1:]), kwargs


def add_balance_adapter(
    model: nn.Module,
    layer: int,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    shift: bool = True,
    seed: int = 0,
) -> PeftModel:
    """``W ← W + ΔW`` in what block ``layer`` writes with, and ``h ← h + v`` before it: all else is frozen.

    The writers are the output projections of attention and of the MLP (``o_proj`` and ``down_proj``, in
    GPT-2 and OPT their counterparts). The vector v (d,) is added to the block's input in the residual stream,
    so to all that comes after it too. The model, changed in place, gives at first what it gave before.

    Args:
        model: a causal language model of transformers, of :mod:`fastproj.architectures`.
        layer: the number of the block, from 0.
        rank: None trains the writers themselves, biases too, in copies that PEFT keeps beside them
            (``modules_to_save``), in their own dtype: below fp32 small steps are lost to rounding. A number
            trains ``ΔW = (alpha/rank)·B·A`` alone, and v, in fp32; it is the way for quantised models.
        alpha: of LoRA, twice the rank where None.
        shift: whether there is a vector.
        seed: of what LoRA's A is drawn from; the caller's random state is left as it is.

    What PEFT does works as with other adapters: ``save_pretrained`` (safetensors), ``disable_adapter()``,
    which gives the model's own output bit for bit. A saved one is to be read by :func:`load_balance_adapter`:
    PEFT alone would pass over the vector without a word. ``merge_and_unload()`` leaves the vector in its
    place, in memory; such a model, saved and read again, lacks it. :func:`remove_balance_adapter` leaves the
    model as it was.

    Raises:
        ValueError: an unknown architecture, an encoder or a model without its head; no such block; a model
            that has an adapter; a rank below 1, an alpha that is not positive or without a rank; writers
            without floating-point weights and no rank.
        TypeError: a layer or rank that is no integer.

    Source: Zhao, Yang, Chen, ACL 2025, for what is trained; low rank, and where the vector is kept: ours.
    """
    from peft import get_peft_model

    name = _block_name(model, layer)
    _check_rank(rank, alpha)
    config = _config(model, name, rank, alpha, shift)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if shift:
            _insert_shift(model, name)
        adapted: PeftModel = get_peft_model(model, config)
    return adapted


def load_balance_adapter(model: nn.Module, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """The model with the adapter of :func:`add_balance_adapter` that ``save_pretrained`` left in ``folder``.

    Which block it is of, its rank and whether it has a vector are told by PEFT's ``adapter_config.json``. The
    weights are read from ``adapter_model.safetensors``; nothing is unpickled. Frozen and in evaluation mode
    unless ``trainable``. The folder is held against the model before the model is changed.

    Raises:
        FileNotFoundError: no such folder, or no adapter in it.
        ValueError: a model that does not suit, as for :func:`add_balance_adapter`; an adapter of another
            kind, of a block that the model lacks, or whose weights are not those of the model's writers and
            vector; a pickle or a damaged file.
    """
    from peft import PeftModel

    saved = read_folder(Path(folder), list(_blocks(model)), architecture_of(model).writers)
    if saved.rank is None:
        _check_trains_in_full(model, saved.block)
    saved.check_shapes(model)
    with torch.random.fork_rng():
        if saved.shift:
            _insert_shift(model, saved.block)
        adapted: PeftModel = PeftModel.from_pretrained(model, str(saved.folder), is_trainable=trainable)
    if not trainable:
        adapted.requires_grad_(False)  # not all versions of PEFT freeze modules_to_save
    return adapted


def remove_balance_adapter(model: PeftModel) -> nn.Module:
    """The model that the adapter was put on, its weights as they were, the vector gone; all of it frozen.

    Raises ValueError where there is no such adapter.
    """
    from peft.utils.other import ModulesToSaveWrapper

    base: nn.Module | None = model.get_base_model() if hasattr(model, "get_base_model") else None
    if base is None:
        raise ValueError(f"expected a model with an adapter of PEFT, got a {type(model).__name__}")
    if any(getattr(module, "merged", False) for module in base.modules()):
        model.unmerge_adapter()
    for name, wrapper in list(base.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            # PEFT's own unload would leave the trained copy in its place.
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, wrapper.original_module)
    model.unload()
    if hasattr(base, "peft_config"):  # left there by PEFT before 0.18
        del base.peft_config
    for block in blocks(base).values():
        shift = getattr(block, SHIFT, None)
        if isinstance(shift, InputShift):
            if shift.handle is not None:
                shift.handle.remove()
            delattr(block, SHIFT)
    return base


def writer_names(model: nn.Module, block: str) -> list[str]:
    """The names of a block's writers in the model."""
    return [f"{block}.{writer}" for writer in architecture_of(model).writers]


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a causal language model without an adapter."""
    if not architecture_of(model).causal:
        known = ", ".join(kind for kind, entry in ARCHITECTURES.items() if entry.causal)
        raise ValueError(
            f"expected a causal language model ({known}), got {type(model).__name__}, an encoder"
        )
    can_generate: Any = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise ValueError(
            f"expected a causal language model with its head, got {type(model).__name__}: load it with "
            "AutoModelForCausalLM"
        )
    found = blocks(model)
    if hasattr(model, "peft_config") or any(hasattr(block, SHIFT) for block in found.values()):
        raise ValueError(
            f"expected a model without an adapter, got a {type(model).__name__} that has one: unload it first"
        )
    return found


def _block_name(model: nn.Module, layer: int) -> str:
    names = list(_blocks(model))
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"layer must be an integer, got {layer!r}")
    if not 0 <= layer < len(names):
        raise ValueError(f"layer must be in 0..{len(names) - 1} for {len(names)} blocks, got {layer}")
    return names[layer]


def _check_rank(rank: int | None, alpha: float | None) -> None:
    if rank is None:
        if alpha is not None:
            raise ValueError(f"alpha={alpha!r} needs a rank: without one the writers are trained in full")
        return
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an integer or None, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}")


def _config(model: nn.Module, block: str, rank: int | None, alpha: float | None, shift: bool) -> LoraConfig:
    """PEFT's configuration: full names of modules, so that no other block's match."""
    from peft import LoraConfig
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from transformers.pytorch_utils import Conv1D

    saved = [f"{block}.{VECTOR}"] if shift else []
    writers = writer_names(model, block)
    if rank is None:
        _check_trains_in_full(model, block)
        return LoraConfig(
            task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, modules_to_save=[*writers, *saved]
        )
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=writers,
        modules_to_save=saved or None,
        fan_in_fan_out=all(isinstance(model.get_submodule(name), Conv1D) for name in writers),
    )


def _check_trains_in_full(model: nn.Module, block: str) -> None:
    for name in writer_names(model, block):
        writer = model.get_submodule(name)
        weight = getattr(writer, "weight", None)
        # fp8 is floating point to torch; one byte an element is storage, not arithmetic.
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
            came = weight.dtype if isinstance(weight, Tensor) else "none"
            raise ValueError(
                f"expected weights of fp16 or wider in {name!r} to train it in full, got {came} in a "
                f"{type(writer).__name__}: give a rank"
            )


def _insert_shift(model: nn.Module, block: str) -> None:
    module = model.get_submodule(block)
    config: Any = model.config
    writer: Any = model.get_submodule(writer_names(model, block)[0])
    shift = InputShift(config.hidden_size, writer.weight).train(module.training)
    module.add_module(SHIFT, shift)
    shift.handle = module.register_forward_pre_hook(shift_input, with_kwargs=True)
