"""The plain fine-tune, the directions in it, and the ways of doing it over, each measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastproj.bias_diff import commands as shared
from fastproj.bias_diff.records import Records, read_records
from fastproj.bias_diff.training import FineTuneConfig, add_adapter
from fastproj.grasp.arms import AFTERWARDS, Trained, afterwards, side_of, train
from fastproj.grasp.measure import MEASURES, Measured, measure
from fastproj.latent.evidence import choose_rank
from fastproj.latent.factors import LatentFactors, Pool, Side
from fastproj.latent.identify import identify
from fastproj.methods.ablation import remove

NAIVE = "plain"


@dataclass(frozen=True)
class Data:
    """Training samples; held-out and validation ones where there are any; the held-out ones' groups."""

    train: Records
    held_out: Records | None
    validation: Records | None
    groups: tuple[str, ...] | None

    @classmethod
    def read(
        cls,
        train: Path,
        held_out: Path | None,
        validation: Path | None,
        group_column: str | None,
        columns: Mapping[str, Any],
    ) -> Data:
        """From files. Raises what :func:`read_records` does, and ValueError for a group that is missing."""
        groups = None
        if group_column is not None:
            if held_out is None:
                raise ValueError("--group-column names a column of --held-out: give that, too")
            found = read_records(held_out, **{**columns, "label_column": group_column}).labels or ()
            if None in found:
                raise ValueError(f"{held_out}: expected a group in every row, got none in some")
            groups = tuple(map(str, found))
        return cls(
            read_records(train, **columns),
            None if held_out is None else read_records(held_out, **columns),
            None if validation is None else read_records(validation, **columns),
            groups,
        )


@dataclass(frozen=True)
class Search:
    """How directions come about: how many (at most), where, from a file, and what their removal may cost."""

    directions: int
    pool: Pool
    factors: Path | None
    tolerance: float | None


@dataclass(frozen=True)
class Row:
    """A method and what came out. None where it does not apply, or nothing is held out."""

    method: str
    loss: float | None
    measure: str | None
    overall: float | None
    worst: float | None
    groups: dict[str, float]
    violation: float | None
    relative_seconds: float | None


@dataclass
class Comparison:
    """Runs every method on a fresh copy of the model, from the same start, over samples in the same order."""

    model: str
    loss: shared.Loss
    device: str | None
    dtype: shared.Precision
    data: Data
    search: Search
    config: FineTuneConfig
    rank: int
    targets: tuple[str, ...] | None
    strength: float
    output: Path
    _plain_seconds: float | None = None
    _factors: dict[Side, LatentFactors] = field(default_factory=dict)

    @property
    def directions(self) -> dict[Side, int]:
        """How many directions of each side the methods were given."""
        return {side: factors.rank for side, factors in self._factors.items()}

    def run(self, methods: Sequence[str], naive: Path | None) -> list[Row]:
        """The plain fine-tune (or the adapter in ``naive``) and every method, in this order.

        Writes an adapter a method, ``factors-<side>.safetensors`` and nothing else. Raises ValueError where
        the task cannot be measured or the directions do not suit a method.
        """
        if self.loss.value not in MEASURES:
            raise ValueError(f"--loss: expected one of {', '.join(MEASURES)}, got {self.loss.value}")
        rows = [self._train(NAIVE) if naive is None else self._row(NAIVE, self._load(naive), None)]
        folder = self.output / NAIVE if naive is None else naive
        for side in dict.fromkeys(map(side_of, methods)):
            self._factors[side] = self._find(side, folder)
            self._factors[side].save(self.output / f"factors-{side}.safetensors")
        for method in methods:
            rows += self._afterwards(method, folder) if method in AFTERWARDS else [self._train(method)]
        return rows

    def _find(self, side: Side, naive: Path) -> LatentFactors:
        """The directions of a side: read from the file, or found; fewer where the tolerance says so."""
        if self.search.factors is not None:
            factors = LatentFactors.load(self.search.factors)
        else:
            factors = identify(naive, side=side, rank=self.search.directions, pool=self.search.pool)
        validation = self.data.validation
        if self.search.tolerance is None or validation is None:
            return factors

        def goodness(count: int) -> float:
            loaded = self._load(naive)
            if count:
                remove(loaded.model, factors.first(count))
            return self._measure(loaded, validation, None).goodness

        chosen, _ = choose_rank(goodness, factors.rank, self.search.tolerance)
        if not chosen:
            raise ValueError(
                f"--tolerance {self.search.tolerance}: even one direction costs the plain adapter more"
            )
        return factors.first(chosen)

    def _train(self, method: str) -> Row:
        torch.manual_seed(self.config.seed)  # a classifier's head may be new
        loaded = shared.load_model(
            self.model, None, self.loss, device=self.device, dtype=self.dtype, trainable=True, new_head=True
        )
        adapted: Any = add_adapter(
            loaded.model,
            task=self.config.task,
            rank=self.rank,
            alpha=2 * self.rank,
            targets=self.targets,
            seed=self.config.seed,
        )
        loaded = replace(loaded, model=adapted)
        config = replace(self.config, max_length=shared.fitting_length(loaded, self.config.max_length))
        with shared.progress(method) as show:
            done = train(
                method, loaded.model, loaded.tokenizer, self.data.train, config, self._factors,
                on_step=lambda step, total, _: show(step, total),
            )  # fmt: skip
        adapted.save_pretrained(self.output / method)
        if method == NAIVE:
            self._plain_seconds = done.seconds
        return self._row(method, loaded, done)

    def _afterwards(self, method: str, naive: Path) -> list[Row]:
        strengths = (self.strength, -self.strength) if method == "steer" else (0.0,)
        rows = []
        for strength in strengths:
            loaded = self._load(naive)
            name = f"steer {strength:+g}" if method == "steer" else method
            with afterwards(method, loaded.model, self._factors, strength):
                rows.append(self._row(name, loaded, None))
            if method == "remove":
                adapted: Any = loaded.model
                adapted.save_pretrained(self.output / method)
        return rows

    def _load(self, adapter: Path) -> shared.Loaded:
        return shared.load_model(
            self.model, adapter, self.loss, device=self.device, dtype=self.dtype, trainable=False
        )

    def _row(self, method: str, loaded: shared.Loaded, done: Trained | None) -> Row:
        held_out = self.data.held_out
        found = None if held_out is None else self._measure(loaded, held_out, self.data.groups)
        last = None if done is None else done.losses[-max(1, len(done.losses) // 10) :]
        return Row(
            method=method,
            loss=None if last is None else sum(last) / len(last),
            measure=None if found is None else found.measure,
            overall=None if found is None else found.overall,
            worst=None if found is None else found.worst,
            groups={} if found is None else found.groups,
            violation=None if done is None else done.violation,
            relative_seconds=(
                None if done is None or self._plain_seconds is None else done.seconds / self._plain_seconds
            ),
        )

    def _measure(self, loaded: shared.Loaded, records: Records, groups: Sequence[str] | None) -> Measured:
        length = shared.fitting_length(loaded, self.config.max_length)
        return measure(
            loaded.model, loaded.tokenizer, records, task=self.loss.value, groups=groups, max_length=length
        )
