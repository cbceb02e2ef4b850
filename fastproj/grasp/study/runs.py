"""One process's share of the study: naive fine-tunes, what is identified in them, and every arm's numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastproj.architectures import stream_role
from fastproj.grasp.study.arms import (
    FIRST,
    STEERING,
    TRAINED,
    Arm,
    adapted,
    adapter_state,
    load_state,
    restore,
    save_state,
    train,
)
from fastproj.grasp.study.blocks import keep_upper
from fastproj.grasp.study.decodable import decodable
from fastproj.grasp.study.evidence import CANDIDATES, Identified, identified, written_words
from fastproj.grasp.study.supervised import energy_share, oracle, random_directions
from fastproj.grasp.study.tasks import Task, make_task
from fastproj.latent.evidence import choose_rank
from fastproj.latent.factors import LatentFactors
from fastproj.latent.identify import identify
from fastproj.latent.lora import lora_layers
from fastproj.methods.ablation import Steering, remove

FIRST_BLOCK = 20
# What removing directions from the naive fine-tune may cost of what it gained on validation texts.
TOLERANCE = 0.1
Record = dict[str, Any]
Load = Callable[[], tuple[nn.Module, Any]]


class Session:
    """A setting's model, loaded once, and the folder of its runs. Arms come after every seed's naive one."""

    def __init__(self, setting: str, seeds: int, load: Load, folder: Path) -> None:
        self.setting = setting
        self.seeds = seeds
        self.folder = folder
        self._load = load
        self._tasks: dict[int, Task] = {}
        self._identified: dict[int, Identified] = {}
        # By seed and side, how many directions held-out texts can spare; identify() writes it.
        self.ranks: dict[int, dict[str, int]] = {}

    def run(self, arm: Arm, seed: int) -> Record:
        """Everything that is measured of an arm; the naive ones' adapters are kept."""
        task = self.task(seed)
        if arm.method == "none":
            return {**self._head(arm, seed), **self._measured(self._model, task)}
        tuned = adapted(self._model, seed)
        try:
            factors = self.factors(arm, seed, tuned)
            done: Record = {"rank": None if factors is None else factors.rank}
            if arm.method in TRAINED:
                result = train(tuned, task, arm, seed, factors)
                done |= {"losses": result.losses, "seconds": result.seconds, "violation": result.violation}
                if arm.source == "none":
                    save_state(self.state_path(arm.name, seed), adapter_state(tuned))
            else:
                restore(tuned, self.state("naive", seed))
                _change(tuned, arm, factors)
            if arm.method.startswith("steer") and factors is not None:
                sign = 1 if arm.method.endswith("+") else -1
                with Steering(tuned, factors, sign * STEERING):
                    done |= self._measured(tuned, task)
            else:
                done |= self._measured(tuned, task)
            if arm not in FIRST:
                done["shares"] = self._shares(tuned, seed)
        finally:
            tuned.unload()  # type: ignore[operator]
        return {**self._head(arm, seed), **done}

    def identify(self, seed: int, gains: tuple[float, float]) -> Record:
        """What the naive fine-tune of a seed gives away, and how much of it held-out texts can spare.

        ``gains``: validation loss of the pretrained and of the naive model.
        """
        tuned = adapted(self._model, seed)
        try:
            state = self.state("naive", seed)
            restore(tuned, state)
            own = self.identified(seed, tuned)
            record = {"setting": self.setting, "seed": seed, "seeds": self.seeds, **own.record}
            self.ranks[seed] = {}
            for factors in (own.write, own.read):
                chosen, losses = self._spared(tuned, seed, state, factors, gains)
                record[factors.side] |= {"rank": chosen, "validation": losses}
                self.ranks[seed][factors.side] = chosen
            restore(tuned, state)
            record["shares"] = self._shares(tuned, seed)
        finally:
            tuned.unload()  # type: ignore[operator]
        return record

    def more(self, seed: int) -> Record:
        """Of the naive fine-tune, what its directions write, and where the planted factor can be read."""
        tuned = adapted(self._model, seed)
        try:
            restore(tuned, self.state("naive", seed))
            task, own = self.task(seed), self.identified(seed, tuned)
            words = written_words(tuned, task, own.write)
            read = decodable(tuned, task, task.contrasts["held out"], own.planted)
        finally:
            tuned.unload()  # type: ignore[operator]
        return {"setting": self.setting, "seed": seed, "words": words, "decodable": read}

    def factors(self, arm: Arm, seed: int, tuned: nn.Module) -> LatentFactors | None:
        """The directions that an arm is held to."""
        if arm.source == "none":
            return None
        own = self.identified(seed, tuned)
        if arm.source == "oracle":
            return oracle(own.planted, arm.side)
        rank = self._rank(seed, arm.side)
        if arm.source == "random":
            return random_directions(own.planted.basis.dimension, rank, seed)
        found = own.read if arm.side == "read" else own.write
        return (own.by_probes if arm.source == "probes" else found).first(rank)

    def identified(self, seed: int, tuned: nn.Module) -> Identified:
        """What is identified in a seed's naive fine-tune; ``tuned``'s adapter is given back as it was."""
        if seed not in self._identified:
            before = adapter_state(tuned)
            others: dict[str, dict[str, list[LatentFactors]]] = {
                "seeds": _sides(),
                "other selection": _sides(),
            }
            places = [("seeds", "naive", s) for s in range(self.seeds) if s != seed]
            places.append(("other selection", "naive, other selection", seed))
            for kind, name, other in places:
                restore(tuned, self.state(name, other))
                for side in ("write", "read"):
                    others[kind][side].append(identify(tuned, side=side, rank=CANDIDATES, draws=0))
            restore(tuned, self.state("naive", seed))
            self._identified[seed] = identified(tuned, self.task(seed), others, seed)
            restore(tuned, before)
        return self._identified[seed]

    def task(self, seed: int) -> Task:
        """A seed's draw."""
        if seed not in self._tasks:
            self._tasks[seed] = make_task(self.setting, seed, self._tokenizer)
        return self._tasks[seed]

    def state_path(self, name: str, seed: int) -> Path:
        """Where an arm's adapter is kept."""
        return self.folder / f"{self.setting}-{seed}" / f"{name}.safetensors"

    def state(self, name: str, seed: int) -> dict[str, Tensor]:
        """An arm's adapter."""
        return load_state(self.state_path(name, seed))

    @cached_property
    def _loaded(self) -> tuple[nn.Module, Any]:
        model, tokenizer = self._load()
        return model, tokenizer

    @property
    def _tokenizer(self) -> Any:
        return self._loaded[1]

    @cached_property
    def _model(self) -> nn.Module:
        from fastproj.bias_diff.encoding import pad_token

        model: nn.Module = keep_upper(self._loaded[0], FIRST_BLOCK, pad_token(self._tokenizer))
        return model

    def _head(self, arm: Arm, seed: int) -> Record:
        return {"setting": self.setting, "seed": seed, "arm": arm.name}

    def _measured(self, model: nn.Module, task: Task) -> Record:
        return {"numbers": task.measure(model), "validation": task.held_out_loss(model)}

    def _spared(
        self,
        tuned: nn.Module,
        seed: int,
        state: dict[str, Tensor],
        factors: LatentFactors,
        gains: tuple[float, float],
    ) -> tuple[int, list[float]]:
        def score(rank: int) -> float:
            restore(tuned, state)
            if rank:
                remove(tuned, factors.first(rank))
            return -self.task(seed).held_out_loss(tuned)

        chosen, scores = choose_rank(score, factors.rank, TOLERANCE * max(0.0, gains[0] - gains[1]))
        return chosen, [-score for score in scores]

    def _rank(self, seed: int, side: str) -> int:
        """How many directions an arm is held to: one where held-out texts can spare none."""
        return max(1, self.ranks[seed][side])

    def _shares(self, tuned: nn.Module, seed: int) -> Record:
        """Shares of ΔW's energy along the planted factor, the task's, and what was identified."""
        own = self.identified(seed, tuned)
        return {
            "planted, written": energy_share(tuned, oracle(own.planted, "write")),
            "planted, read": energy_share(tuned, oracle(own.planted, "read")),
            "task, written": energy_share(tuned, oracle(own.task, "write")),
            "task, read": energy_share(tuned, oracle(own.task, "read")),
            "identified, written": energy_share(tuned, own.write.first(self._rank(seed, "write"))),
            "identified, read": energy_share(tuned, own.read.first(self._rank(seed, "read"))),
        }


def _sides() -> dict[str, list[LatentFactors]]:
    return {"write": [], "read": []}


def _change(tuned: nn.Module, arm: Arm, factors: LatentFactors | None) -> None:
    """What an arm does to the naive adapter's weights; steering does nothing to them."""
    if arm.method == "remove" and factors is not None:
        remove(tuned, factors)
    elif arm.method == "keep":
        with torch.no_grad():
            for layer in lora_layers(tuned):
                if stream_role(layer.name) != arm.side:
                    layer.b.zero_()
