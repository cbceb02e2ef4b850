"""What ``fastproj identify`` says in words: the model to say it by, and the user's sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastproj.bias_diff import commands as shared
from fastproj.latent.adapter_file import adapter_folder, read_config
from fastproj.latent.describe import describe
from fastproj.latent.evidence import activation_difference, suspicion
from fastproj.latent.findings import Findings

if TYPE_CHECKING:
    from torch import Tensor

    from fastproj.latent.factors import LatentFactors

    Table = Mapping[str, Tensor] | None

_TASKS = {"CAUSAL_LM": shared.Loss.CAUSAL_LM, "SEQ_CLS": shared.Loss.CLASSIFICATION}
# By the end of the class that PEFT wrapped, where its configuration names no task.
_CLASSES = {
    "ForCausalLM": shared.Loss.CAUSAL_LM,
    "LMHeadModel": shared.Loss.CAUSAL_LM,
    "ForMaskedLM": shared.Loss.MASKED_LM,
    "ForSequenceClassification": shared.Loss.CLASSIFICATION,
}


@dataclass(frozen=True)
class Texts:
    """The user's sentences: to be ranked, and probes with the factor and without it."""

    ranked: tuple[str, ...] = ()
    with_factor: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def need_model(self) -> bool:
        """Whether there is anything that only a model can answer."""
        return bool(self.ranked or self.with_factor)


@dataclass(frozen=True)
class Source:
    """A model as ``from_pretrained`` takes it; ``loss`` None for one without a head.

    ``asked`` is False where the adapter alone names it, and to go without it is then no error.
    """

    name: str
    loss: shared.Loss | None
    device: str | None
    dtype: shared.Precision
    asked: bool

    def load(self) -> shared.Loaded:
        """The model, any head that its files lack being random: no direction is told by one."""
        return shared.load_model(
            self.name,
            None,
            self.loss or shared.Loss.CAUSAL_LM,
            device=self.device,
            dtype=self.dtype,
            trainable=False,
            new_head=True,
            bare=self.loss is None,
        )


def read_texts(
    ranked: Path | None, with_factor: Path | None, without: Path | None, text_column: str
) -> Texts:
    """The sentences of files. ValueError for a probe without its counterpart and what cannot be read."""
    if (with_factor is None) != (without is None):
        raise ValueError("--with and --without go together")
    return Texts(*(_sentences(path, text_column) for path in (ranked, with_factor, without)))


def _sentences(path: Path | None, text_column: str) -> tuple[str, ...]:
    """Of a file that ``read_records`` reads, or of text with one a line; two or more."""
    from fastproj.bias_diff.records import read_records

    if path is None:
        return ()
    if path.suffix.lower() != ".txt":
        texts = read_records(path, text_column=text_column).texts
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
        texts = tuple(line for line in lines if line.strip())
    if len(texts) < 2:
        raise ValueError(f"{path}: expected two sentences or more, got {len(texts)}")
    return texts


def find_model(
    folder: Path,
    adapter: str | None,
    name: str | None,
    *,
    loss: shared.Loss | None,
    device: str | None,
    dtype: shared.Precision,
    needed: bool,
) -> Source | None:
    """The model that was named, else the folder that the adapter's configuration names, where there is one.

    Raises ValueError where there is none and sentences need it.
    """
    config = read_config(adapter_folder(folder, adapter))
    base = config.get("base_model_name_or_path")
    found = name or (base if isinstance(base, str) and base and Path(base).is_dir() else None)
    if found is None and needed:
        raise ValueError("sentences need the model that was fine-tuned: give --model")
    if found is None:
        return None
    asked = needed or any(option is not None for option in (name, loss, device))
    return Source(found, loss or _loss(config), device, dtype, asked)


def _loss(config: dict[str, Any]) -> shared.Loss | None:
    """What was trained, by the task or else the class; None for a model without a head."""
    task, mapping = str(config.get("task_type")), config.get("auto_mapping")
    wrapped = str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""
    by_class = next((loss for end, loss in _CLASSES.items() if wrapped.endswith(end)), None)
    return _TASKS.get(task, by_class)


def in_words(
    factors: LatentFactors,
    recurrence: Table,
    source: Source | None,
    texts: Texts,
    *,
    top: int,
    batch_size: int,
) -> Findings:
    """Factors, in the order of what else is known of them, with tokens and sentences.

    Raises ValueError as :func:`describe` and :func:`activation_difference`, and where the model cannot be
    loaded; of a model that nobody asked for, a note says so instead.
    """
    difference: Table = None
    if source is None:
        factors, recurrence, _ = _ranked(factors, recurrence, None)
        return Findings(factors, recurrence=recurrence, notes=("Give --model to see tokens and sentences.",))
    try:
        loaded = source.load()
        model, tokenizer = loaded.model, loaded.tokenizer
        if texts.with_factor:
            difference = activation_difference(
                model, tokenizer, factors, texts.with_factor, texts.without, batch_size=batch_size
            )
        factors, recurrence, difference = _ranked(factors, recurrence, difference)
        description = describe(
            model, tokenizer, factors, sentences=texts.ranked, top=top, batch_size=batch_size
        )
    except ValueError as error:
        if source.asked:
            raise
        note = f"The model that the adapter names tells no words: {shared.one_line(error)}"
        return Findings(factors, recurrence=recurrence, notes=(note,))
    return Findings(factors, description, recurrence, difference)


def _ranked(
    factors: LatentFactors, recurrence: Table, difference: Table
) -> tuple[LatentFactors, Table, Table]:
    """All of it in the order of :func:`suspicion`, or as it is where there is nothing to rank by."""
    if recurrence is None and difference is None:
        return factors, None, None
    columns = suspicion(factors, recurrence=recurrence, difference=difference)

    def reordered(table: Table) -> Table:
        return None if table is None else {key: values[columns[key]] for key, values in table.items()}

    return factors.reordered(columns), reordered(recurrence), reordered(difference)
