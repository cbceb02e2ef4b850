"""Scores of texts, from records to files on disk: what ``fastproj score`` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, Literal

import torch

from fastproj.bias_diff.commands import Loaded, fitting_length, progress, sketch_folder
from fastproj.bias_diff.encoding import Task, encode, pad_token
from fastproj.bias_diff.records import Records
from fastproj.bias_diff.training import mask_tokens
from fastproj.influence.batches import TokenBatches
from fastproj.influence.durable import Lock
from fastproj.influence.fingerprint import model_fingerprint, rows_fingerprint
from fastproj.influence.parts import LOCK_NAME, MANIFEST_NAME, own_files
from fastproj.influence.references import References
from fastproj.influence.scorer import InfluenceScorer
from fastproj.influence.scores import Scores

AGAINST = " against"  # no probe's name begins with a space


@dataclass(frozen=True)
class Scoring:
    """Everything but the texts that decides their scores.

    Attributes:
        optimizer: ``optimizer.pt`` for Adam's updates, None for plain gradients.
        checkpoints: folders to sum over, each weighted by its learning rate, in place of the model as it is.
        batch_tokens: tokens in a batch at most; rows on disk follow the order of the batches.
        seed: of a masked model's masks, and of sketches.
        against: texts whose mean gradient is taken off every probe's.
    """

    loaded: Loaded
    loss: Task
    params: Literal["lora", "trainable"]
    optimizer: Path | None
    checkpoints: Sequence[Path]
    adam_variant: Literal["adam", "less"]
    max_length: int
    batch_tokens: int
    normalize: bool
    seed: int
    against: Records | None = None

    def run(
        self,
        records: Records,
        probes: Mapping[str, Records],
        output: Path,
        *,
        sketch: tuple[str, int] | None = None,
    ) -> Scores:
        """Write the scores of all records to ``output``, and sketches beside it, going on where they end.

        Raises ValueError where texts, optimiser or what is on disk do not fit, OSError where writing fails.
        """
        scorer = InfluenceScorer(
            self.loaded.model,
            self.optimizer,
            loss=self.loss,
            params=self.params,
            adam_variant=self.adam_variant,
            checkpoints=tuple(self.checkpoints),
        )
        if self.optimizer is not None:
            scorer.adam(0)  # what does not fit is met before anything is computed
        samples = self._samples(records)
        batches = self._batches(samples)
        total = len(samples)
        with self._references(scorer, probes, output) as references, progress("scoring", total) as show:
            scores = scorer.score(
                batches,
                references,
                normalize=self.normalize,
                out=output,
                progress=lambda done: show(done, total),
            )
        if sketch is not None:
            kind, dimension = sketch
            with progress("sketching", total) as show:
                scorer.sketch(
                    batches,
                    dimension,
                    out=sketch_folder(output),
                    kind=kind,
                    seed=self.seed,
                    progress=lambda done: show(done, total),
                )
        return scores

    @contextmanager
    def _references(
        self, scorer: InfluenceScorer, probes: Mapping[str, Records], output: Path
    ) -> Iterator[References]:
        """The probes' gradients, in a file beside ``output`` until the block ends well.

        A run that goes on takes them from there: computed anew, they may differ by rounding on a GPU.
        """
        texts = {**probes, AGAINST: self.against} if self.against is not None else probes
        samples = {name: self._samples(own) for name, own in texts.items()}
        # Those of other weights would be taken for these where a run ended before it wrote a row.
        weights = [model_fingerprint(scorer.model) for _ in scorer.states()]
        rows = [row for own in samples.values() for row in own]
        digest = rows_fingerprint([self.loss, self.params, weights, list(samples), *rows])
        file = output.with_name(f"{output.name}.references-{digest[:16]}")
        resumed = file.is_file()
        if resumed:
            references = References.load(file)
        else:
            with progress("probes"):
                references = scorer.reference({name: self._batches(own) for name, own in samples.items()})
            if self.against is not None:
                references = references.minus(AGAINST)
            references.save(file)
        try:
            yield references
        except ValueError:
            if not resumed:  # refused: there is nothing that these belong to
                file.unlink()
            _remove_without_rows(output)
            raise
        for own in output.parent.glob(f"{escape(output.name)}.references-*"):
            own.unlink()

    def _samples(self, records: Records) -> list[dict[str, Any]]:
        """Token ids of every record; for a masked model with masks that the seed decides."""
        tokenizer = self.loaded.tokenizer
        length = fitting_length(self.loaded, self.max_length)
        samples = encode(records, tokenizer, task=self.loss, max_length=length)
        if self.loss != "masked-lm":
            return samples
        generator = torch.Generator().manual_seed(self.seed)
        for sample in samples:
            ids = torch.tensor([sample["input_ids"]])
            masked, labels = mask_tokens(ids, torch.ones_like(ids), tokenizer, generator)
            sample |= {"input_ids": masked[0].tolist(), "labels": labels[0].tolist()}
        return samples

    def _batches(self, samples: Sequence[Mapping[str, Any]]) -> TokenBatches:
        pad = pad_token(self.loaded.tokenizer)
        return TokenBatches(samples, pad_token_id=pad, max_tokens=self.batch_tokens)


def _remove_without_rows(output: Path) -> None:
    """Remove the folders for parts that a refused run left with nothing in them."""
    for folder in output.parent.glob(f"{escape(output.name)}.*parts"):
        with suppress(OSError):  # another process writes there, or the user keeps something
            lock = Lock(folder / LOCK_NAME)
            if own_files(folder):
                lock.release()
                continue
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            lock.remove()
            folder.rmdir()
