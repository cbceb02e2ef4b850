"""Adam's moments, matched to a model's parameters by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.reference.adam import AdamState, Variant

OptimizerSource = torch.optim.Optimizer | str | Path
# What transformers.Trainer keeps out of weight decay, and so in its second group; nn.LayerNorm too.
NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)")


def adam_states(
    source: OptimizerSource, model: nn.Module, selected: Mapping[str, nn.Parameter], variant: Variant = "adam"
) -> dict[str, AdamState]:
    """The moments of every selected parameter, under its name.

    ``source`` is a live optimiser, matched by the identity of its parameters, or a file or folder with an
    ``optimizer.pt`` (a ``state_dict``, loaded with ``weights_only=True``), matched by the ``param_names``
    that it holds, else by the order of the model's trainable parameters, as torch and transformers' Trainer
    write it; every shape must fit.

    Raises FileNotFoundError for a missing file, ValueError where the state is not that of Adam or AdamW,
    lacks a parameter or does not fit the model, TypeError for another kind of source.
    """
    if isinstance(source, (str, Path)):
        groups = _saved_groups(_read(Path(source)), model)
    elif isinstance(source, torch.optim.Optimizer):
        groups = _live_groups(source, model)
    else:
        raise TypeError(f"optimizer must be a torch optimiser or a path, got {type(source).__name__}")
    found: dict[str, AdamState] = {}
    for options, states in groups:
        for name, state in states.items():
            if name in selected:
                found[name] = _adam_state(name, selected[name], options, state, variant)
    missing = [name for name in selected if name not in found]
    if missing:
        raise ValueError(
            f"the optimiser has no state for {len(missing)} of {len(selected)} parameters, the first of them "
            f"{missing[0]!r}"
        )
    return {name: found[name] for name in selected}


Groups = list[tuple[Mapping[str, Any], dict[str, Mapping[str, Any]]]]


def _live_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> Groups:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (group, {names[p]: optimizer.state.get(p, {}) for p in group["params"] if p in names})
        for group in optimizer.param_groups
    ]


def _read(path: Path) -> Mapping[str, Any]:
    file = path / "optimizer.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"expected an optimiser's state at {file}, there is none")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged or hostile file
        raise ValueError(f"{file} is no optimiser state that loads without unpickling: {error}") from error
    if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= set(saved):
        raise ValueError(f"expected 'state' and 'param_groups' in {file}, got {type(saved).__name__}")
    return saved


def _saved_groups(saved: Mapping[str, Any], model: nn.Module) -> Groups:
    groups = saved["param_groups"]
    if all("param_names" in group for group in groups):
        names = [list(group["param_names"]) for group in groups]
    else:
        names = _names_by_order([len(group["params"]) for group in groups], model)
    return [
        (group, {name: saved["state"].get(i, {}) for name, i in zip(own, group["params"], strict=True)})
        for group, own in zip(groups, names, strict=True)
    ]


def _names_by_order(sizes: Sequence[int], model: nn.Module) -> list[list[str]]:
    """Trainable parameters as one group, or as the Trainer's two: decayed and not, each in model order."""
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if prefix and isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    plain = [name for name in trainable if name in norms or NOT_DECAYED.search(name.lower())]
    decayed = [n for n in trainable if n not in plain]
    for names in ([trainable], [decayed, plain]):
        if [len(own) for own in names] == list(sizes):
            return names
    raise ValueError(
        f"the optimiser's groups have {', '.join(map(str, sizes))} parameters; the model has "
        f"{len(trainable)} trainable ones ({len(decayed)} with and {len(plain)} without weight decay)"
    )


def _adam_state(
    name: str, parameter: nn.Parameter, options: Mapping[str, Any], state: Mapping[str, Any], variant: Variant
) -> AdamState:
    if "betas" not in options or "eps" not in options:
        raise ValueError(f"expected the state of Adam or AdamW, with betas and eps, got {sorted(options)}")
    # RAdam and NAdam keep moments of the same names, and lack the option that all forms of torch's Adam have.
    if "decoupled_weight_decay" in options and "amsgrad" not in options:
        raise ValueError("expected the state of Adam or AdamW, got that of RAdam or NAdam")
    for option in ("amsgrad", "maximize"):
        if options.get(option):
            raise ValueError(f"expected Adam or AdamW without {option}")
    absent = [key for key in ("exp_avg", "exp_avg_sq", "step") if key not in state]
    if absent:
        what = "has taken no step" if not state else f"lacks {', '.join(absent)}"
        raise ValueError(f"the optimiser's state of {name!r} {what}")
    for key in ("exp_avg", "exp_avg_sq"):
        if state[key].shape != parameter.shape:
            raise ValueError(
                f"{key} of {name!r} has shape {tuple(state[key].shape)}, expected {tuple(parameter.shape)}"
            )
    beta1, beta2 = options["betas"]
    return AdamState(
        exp_avg=_beside(state["exp_avg"], parameter),
        exp_avg_sq=_beside(state["exp_avg_sq"], parameter),
        step=int(state["step"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(options["eps"]),
        variant=variant,
    )


def _beside(moment: Tensor, parameter: nn.Parameter) -> Tensor:
    """The moment where the parameter is, fp64 for fp64 parameters, else fp32."""
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return moment.detach().to(device=parameter.device, dtype=dtype)
