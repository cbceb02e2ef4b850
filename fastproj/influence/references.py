"""Reference gradients: what samples are scored against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastproj.files import write_atomically

NAMES = "names"


@dataclass(frozen=True, eq=False)
class References:
    """``R_m = 1/n Σ_i ∇L(z_i)`` over the n samples of probe m, at each of T checkpoints.

    ``names`` are those of the M probes. ``gradients[t]`` has an (M, *shape) tensor for every parameter, under
    its name in the model; ``norms`` is (T, M), fp64.
    """

    names: tuple[str, ...]
    gradients: tuple[dict[str, Tensor], ...]

    @property
    def norms(self) -> Tensor:
        """``‖R_m‖`` over all parameters, (T, M) in fp64."""
        squares = [
            torch.stack([g.double().flatten(1).square().sum(1).cpu() for g in own.values()]).sum(0)
            for own in self.gradients
        ]
        return torch.stack(squares).sqrt()

    def minus(self, name: str) -> References:
        """``R_m − R_name`` for every other probe: what sets them apart from that one.

        Gradients of any two texts of a kind have much in common. With the mean gradient of texts that are as
        they should be taken off, a score asks for the probe's own part alone. Raises ValueError for an
        unknown name, or where no other is left.
        """
        if name not in self.names or len(self.names) < 2:
            raise ValueError(f"expected one of {', '.join(self.names)} and another beside it, got {name!r}")
        at = self.names.index(name)
        others = [row for row in range(len(self.names)) if row != at]
        gradients = tuple({key: g[others] - g[at] for key, g in own.items()} for own in self.gradients)
        return References(tuple(self.names[row] for row in others), gradients)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; an existing one is replaced once the new one is whole."""
        from safetensors.torch import save

        tensors = {
            f"{t}/{name}": gradient.detach().cpu().contiguous()
            for t, own in enumerate(self.gradients)
            for name, gradient in own.items()
        }
        write_atomically(Path(path), save(tensors, {NAMES: json.dumps(self.names)}))

    @classmethod
    def load(cls, path: str | Path) -> References:
        """Read what :meth:`save` wrote. Raises ValueError for another kind of file."""
        from safetensors import SafetensorError, safe_open

        gradients: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                for key in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
                    t, name = key.split("/", 1)
                    gradients.setdefault(int(t), {})[name] = file.get_tensor(key)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} does not hold reference gradients: {error}") from error
        if NAMES not in metadata or sorted(gradients) != list(range(len(gradients))):
            raise ValueError(
                f"{path} does not hold reference gradients: its names or checkpoints are missing"
            )
        return cls(tuple(json.loads(metadata[NAMES])), tuple(gradients[t] for t in range(len(gradients))))

    def check(self, parameters: Mapping[str, Tensor], checkpoints: int) -> None:
        """Raise ValueError unless these are gradients of ``parameters`` at that many checkpoints."""
        if len(self.gradients) != checkpoints:
            raise ValueError(f"references of {len(self.gradients)} checkpoints, expected {checkpoints}")
        for own in self.gradients:
            if set(own) != set(parameters):
                odd = sorted(set(own) ^ set(parameters))
                raise ValueError(
                    f"the references are gradients of other parameters: {len(odd)} differ, such as {odd[0]!r}"
                )
            for name, gradient in own.items():
                expected = (len(self.names), *parameters[name].shape)
                if tuple(gradient.shape) != expected:
                    raise ValueError(
                        f"the reference of {name!r} has shape {tuple(gradient.shape)}, expected {expected}"
                    )
