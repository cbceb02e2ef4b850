"""What the commands of BIAS DIFF share: options, models, errors in one line. Heavy imports wait for a run."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fastproj.bias_diff.records import Records


class Aggregate(str, Enum):
    """How the scores against several references become one."""

    MEAN = "mean"
    MAX = "max"


class Loss(str, Enum):
    """What the model was trained to do."""

    CAUSAL_LM = "causal-lm"
    MASKED_LM = "masked-lm"
    CLASSIFICATION = "classification"


class Params(str, Enum):
    """Parameters whose gradients count."""

    LORA = "lora"
    TRAINABLE = "trainable"


class Precision(str, Enum):
    """The dtype that the model is loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


LONGEST_ERROR = 600  # characters
AUTO_CLASSES = {
    Loss.CAUSAL_LM: "AutoModelForCausalLM",
    Loss.MASKED_LM: "AutoModelForMaskedLM",
    Loss.CLASSIFICATION: "AutoModelForSequenceClassification",
}

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or name of the model.")]
Adapter = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter on the model.")]
Train = Annotated[Path, typer.Option(help="Training samples: JSONL, CSV or Parquet.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
IdColumn = Annotated[str | None, typer.Option(help="Column of ids; else 'id', else row numbers.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of labels; else 'label' where there is one.")]
Biased = Annotated[
    str | None, typer.Option(metavar="LABEL", help="The label of biased samples, where labels are known.")
]
LossOption = Annotated[Loss, typer.Option(help="What the model was trained to do.")]
MaxLength = Annotated[int, typer.Option(min=2, help="Tokens of a text that count, within MODEL's context.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; by default a GPU where there is one.")]
Dtype = Annotated[Precision, typer.Option(help="Precision that the model is loaded in.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
AggregateOption = Annotated[Aggregate, typer.Option(help="Over several references: their mean or maximum.")]


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and its tokenizer."""

    model: nn.Module
    tokenizer: Any


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Leave with 2 where the input does not fit and with 1 where work fails, with one line on why."""
    try:
        yield
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, ImportError) as error:
        raise _told(error, 2) from error
    except (OSError, RuntimeError) as error:
        raise _told(error, 1) from error


def _told(error: Exception, code: int) -> typer.Exit:
    typer.echo(f"Error: {one_line(error)}", err=True)
    return typer.Exit(code)


def one_line(error: BaseException) -> str:
    """What an error says, on one line that is not endless; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}…"


def load_model(
    name: str,
    adapter: Path | None,
    loss: Loss,
    *,
    device: str | None,
    dtype: Precision,
    trainable: bool,
    new_head: bool = False,
    bare: bool = False,
) -> Loaded:
    """A model with its adapter, on its device in evaluation mode.

    Raises ValueError, naming the model or the adapter, where it cannot be loaded, or where weights are in
    neither and would be random; ``new_head`` allows that, for who trains them. ``bare`` leaves the head out.
    """
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    automatic = transformers.AutoModel if bare else getattr(transformers, AUTO_CLASSES[loss])
    with _naming(f"model {name}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model, info = automatic.from_pretrained(
            name, dtype=getattr(torch, dtype.value), output_loading_info=True
        )
    if loss is Loss.CAUSAL_LM and not bare and _reads_both_ways(model.config):
        raise ValueError(f"model {name} is a masked one ({model.config.model_type}): give --loss masked-lm")
    if adapter is not None:
        model = _with_adapter(model, adapter, trainable)
    random = [] if new_head else _random_weights(model, info["missing_keys"], adapter is not None)
    if random:
        raise ValueError(
            f"model {name} has no weights for {loss.value}: {len(random)} would be random, as {random[0]!r}"
        )
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with _naming(f"device {chosen}"):
        return Loaded(model.to(chosen).eval(), tokenizer)


def _reads_both_ways(config: Any) -> bool:
    """Whether a model sees the tokens that a causal loss has it predict, whatever its head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    return config.model_type in MASKED and not getattr(config, "is_decoder", False)


def _with_adapter(model: Any, adapter: Path, trainable: bool) -> Any:
    """The model with all weights of an adapter, which PEFT alone would let be too few or too many."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    if not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"adapter {adapter}: expected a folder with adapter_config.json, there is none")
    with _naming(f"adapter {adapter}"):
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        saved = set(load_peft_weights(str(adapter), device="cpu"))
    own = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    odd = sorted((own - saved) | {name for name in saved - own if ".lora_" in name})
    if odd:
        raise ValueError(
            f"adapter {adapter} is of another model: {len(odd)} weights are in one of both, as {odd[0]!r}"
        )
    return model


def fitting_length(loaded: Loaded, max_length: int) -> int:
    """Tokens of a text that the model takes, at most ``max_length``."""
    from fastproj.bias_diff.likelihood import context_length

    return min(max_length, context_length(loaded.model) or max_length)


def keep_inputs(output: Path, *inputs: Path | None) -> None:
    """Raises ValueError where an output would take the place of an input."""
    for path in inputs:
        if path is not None and path.resolve() == output.resolve():
            raise ValueError(f"--output: {output} is what is read")


def check_empty(output: Path) -> None:
    """Raises ValueError where the folder holds something, OSError where it cannot be made."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output: expected a new or empty folder, {output} is neither")
    output.parent.mkdir(parents=True, exist_ok=True)


def sketch_folder(output: Path) -> Path:
    """Where the sketches of the samples scored in ``output`` go."""
    return output.with_suffix(".sketches")


def _random_weights(model: Any, missing: Iterable[str], adapted: bool) -> list[str]:
    """Of the weights that the model's files lack, those that its adapter does not bring."""
    base = model.get_base_model() if adapted else model
    brought = [name for name, module in base.named_modules() if hasattr(module, "modules_to_save")]
    return sorted(key for key in missing if not any(key.startswith(f"{name}.") for name in brought))


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Whatever goes wrong becomes a ValueError on ``what``: files of others fail in their own ways."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries, not for who runs a command
            yield
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {one_line(error)}") from error


def read_selection(path: Path) -> tuple[str, ...]:
    """Ids of a selection: JSON of ``select`` or a list of ids, else text with an id a line.

    Raises FileNotFoundError where there is no file, ValueError where there is no id in it.
    """
    import json

    from fastproj.bias_diff.records import FORMATS

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix.lower() in FORMATS.keys() - {".json"}:
        raise ValueError(f"{path}: expected a selection in JSON (.json), or text with an id a line")
    text = path.read_text(encoding="utf-8-sig")
    ids: Any = [line for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".json":
        try:
            ids = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: no JSON: {one_line(error)}") from error
        ids = ids.get("ids") if isinstance(ids, dict) else ids
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{path}: expected a list of ids, got none")
    return tuple(str(name) for name in ids)


def in_order_of(ids: tuple[str, ...], records: Records, source: Path) -> list[int]:
    """Rows of the records that have these ids. Raises ValueError where ``source`` lacks one."""
    rows = {name: row for row, name in enumerate(records.ids)}
    missing = [name for name in ids if name not in rows]
    if missing:
        raise ValueError(
            f"{source}: expected the samples that were scored, {len(missing)} of {len(ids)} ids are not "
            f"there, first {missing[0]!r}"
        )
    return [rows[name] for name in ids]


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error; what it yields takes how much is done, and the total if that was not known."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def show(completed: int, total: int | None = None) -> None:
            bar.update(task, completed=completed, total=total)

        yield show


def command_line() -> str:
    """The command that is running, as one would type it."""
    return shlex.join(["fastproj", *sys.argv[1:]])
