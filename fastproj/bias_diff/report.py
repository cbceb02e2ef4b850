"""The page for reviewing scored samples: one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fastproj.influence.scores import Aggregate, Scores

HERE = Path(__file__).parent
TEMPLATES = (HERE, HERE.parent / "templates")
SCRIPTS = ("report_figures.js", "report_table.js", "report.js")
TITLE = "Training samples by their influence on the probe"
AGGREGATES: dict[Aggregate, str] = {"mean": "mean over probes", "max": "highest probe"}

# What a script element's text may not hold: the end of the element, or the start of a comment.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def render_report(
    scores: Scores,
    *,
    texts: Sequence[str] | None = None,
    labels: Sequence[bool] | None = None,
    selected: Collection[str] | None = None,
    aggregate: Aggregate = "mean",
    fraction: float = 0.35,
    text_limit: int = 2000,
    title: str = TITLE,
    command: str = "",
) -> str:
    """The page as HTML: N samples with M scores each, browsed by whoever opens it.

    coverage = |selected ∩ biased| / |biased| and precision = |selected ∩ biased| / |selected| are drawn
    where ``labels`` (N, True for a biased sample) are given. The page opens on the samples whose ids are in
    ``selected`` or, without it, on the ``fraction`` with the highest scores; the reader may move the
    threshold. ``aggregate`` ("mean" or "max" over the M references) names the score it opens with. Texts
    beyond ``text_limit`` characters are cut; all of them stay hidden until the reader asks.

    Raises ValueError for no sample, scores that are not finite, texts or labels of another
    length, a fraction outside (0, 1], another aggregate, and selected ids that were not scored.
    """
    _require_matching(scores, texts, labels, fraction)
    if aggregate not in AGGREGATES:
        raise ValueError(f"expected aggregate 'mean' or 'max', got {aggregate!r}")
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    columns = _columns(scores)
    made = _positions(scores.ids, selected) if selected is not None else None
    data = {
        "ids": list(scores.ids),
        "texts": [_cut(text, text_limit) for text in texts] if texts is not None else None,
        "labels": "".join("1" if label else "0" for label in labels) if labels is not None else None,
        "columns": [{"name": name, "values": _encode(values)} for name, values in columns],
        "column": list(AGGREGATES).index(aggregate) if len(columns) > 1 else 0,
        "count": len(made) if made is not None else max(1, round(fraction * len(scores.ids))),
        "made": made,
    }
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    script = "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return environment.get_template("report.html").render(
        title=title,
        command=command,
        data=to_json(data),
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        samples=len(scores.ids),
        references=list(scores.names),
        has_texts=texts is not None,
        has_labels=labels is not None,
        cut=sum(len(text) > text_limit for text in texts or ()),
        text_limit=text_limit,
    )


def to_json(value: Any) -> str:
    """JSON in ASCII that may stand inside a script element: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).translate(_ESCAPES)


def _require_matching(
    scores: Scores, texts: Sequence[str] | None, labels: Sequence[bool] | None, fraction: float
) -> None:
    samples = len(scores.ids)
    if samples == 0:
        raise ValueError("expected a sample at least, got none")
    for name, given in (("texts", texts), ("labels", labels)):
        if given is not None and len(given) != samples:
            raise ValueError(f"expected {samples} {name}, one for each sample, got {len(given)}")
    if not 0 < fraction <= 1:
        raise ValueError(f"expected a fraction above 0 and up to 1, got {fraction}")
    finite = scores.values.isfinite().all(dim=1)
    if not bool(finite.all()):
        first = scores.ids[int((~finite).nonzero()[0, 0])]
        raise ValueError(f"expected finite scores, got others for {int((~finite).sum())}, first {first!r}")


def _columns(scores: Scores) -> list[tuple[str, Tensor]]:
    """The scores by name; where there are several references, their mean and maximum go first."""
    own = list(zip(scores.names, scores.values.T, strict=True))
    if len(own) == 1:
        return own
    return [(words, scores.aggregate(how)) for how, words in AGGREGATES.items()] + own


def _positions(ids: Sequence[str], selected: Collection[str]) -> list[int]:
    wanted = set(selected)
    found = [position for position, name in enumerate(ids) if name in wanted]
    missing = wanted - {ids[position] for position in found}
    if missing:
        raise ValueError(
            f"expected selected ids among those scored, got {len(missing)} others, first {min(missing)!r}"
        )
    return found


def _encode(values: Tensor) -> str:
    """Little-endian fp32 in base64: the browser orders samples by the same numbers, unrounded."""
    return base64.b64encode(values.detach().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
