"""Other libraries of gradient influence, where they are installed, each called as kindly as it allows.

None is needed by anything else: what is not installed is named in a table, without a figure. In a virtual
environment that has this package, they come in so that they bring no other torch, nor anything for a GPU::

    pip install --no-deps traker==0.3.2 bergson==2.5.1 dattri==0.3.0 torchopt optree
    pip install scikit-learn natsort ml_dtypes jaxtyping simple-parsing petname
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastproj.bench.scoring import SAMPLES, Workload

Run = Callable[[], Tensor]
# What their users import, and the project that it comes from.
PEERS = {"trak": "traker", "bergson": "bergson", "dattri": "dattri", "sklearn": "scikit-learn"}


def missing() -> list[str]:
    """The libraries that are not installed, by the names they are installed under."""
    return [project for module, project in PEERS.items() if not has(module)]


def has(module: str) -> bool:
    """Whether a library can be imported; looks without importing it."""
    return importlib.util.find_spec(module) is not None


def traker_projection(vectors: Tensor, dimension: int, kind: str) -> Run:
    """``BasicProjector`` in blocks of 100 rows, its default; ``kind`` is "rademacher" or "normal"."""
    projectors = import_module("trak.projectors")
    projector = projectors.BasicProjector(
        vectors.shape[1], dimension, 0, projectors.ProjectionType(kind), torch.device("cpu")
    )
    return lambda: projector.project(vectors, 0)


def dattri_projection(vectors: Tensor, dimension: int, kind: str) -> Run:
    """``random_project``, which takes its own ``BasicProjector`` on a CPU."""
    random_project = import_module("dattri.func.projection").random_project
    project = random_project(vectors, vectors.shape[0], dimension, 32, 0, kind, device="cpu")
    return lambda: project(vectors)


def bergson_projection(vectors: Tensor, dimension: int, kind: str) -> Run:
    """``project_global``: one matrix over a module's flattened gradient, made in blocks."""
    project_global = import_module("bergson.collector.collector").project_global
    return lambda: project_global("benchmark", vectors, dimension, kind)


def sklearn_projection(vectors: Tensor, dimension: int) -> Run:
    """``SparseRandomProjection`` at its default density, the matrix made beforehand and kept in memory."""
    projection = import_module("sklearn.random_projection").SparseRandomProjection
    own = vectors.numpy()
    fitted = projection(dimension, random_state=0).fit(own)
    return lambda: torch.from_numpy(fitted.transform(own))


def sklearn_made_anew(vectors: Tensor, dimension: int) -> Tensor:
    """The same with its matrix made each time, as one that is not kept must be."""
    return sklearn_projection(vectors, dimension)()


DENSE: dict[str, Callable[[Tensor, int, str], Run]] = {
    "trak": traker_projection,
    "dattri": dattri_projection,
    "bergson": bergson_projection,
}


def loop_with_traker(workload: Workload, dimension: int) -> Run:
    """A backward pass a sample, then the batch's gradients through ``BasicProjector``, as LESS goes about it.

    Normal entries: on a CPU traker makes them in half the time of signs.
    """
    size = sum(p.numel() for p in workload.parameters.values())
    projectors = import_module("trak.projectors")
    projector = projectors.BasicProjector(
        size, dimension, 0, projectors.ProjectionType("normal"), torch.device("cpu")
    )
    return lambda: projector.project(workload.sample_gradients(), 0)


def dattri_gradients(workload: Workload) -> Run:
    """(B, n) gradients of samples as an ``AttributionTask`` computes them, by ``vmap`` of ``grad``."""
    names = list(workload.parameters)
    keys = list(workload.batch)

    def loss(parameters: Any, data: tuple[Tensor, ...]) -> Tensor:
        sample = {key: value.unsqueeze(0) for key, value in zip(keys, data, strict=True)}
        inputs = {"input_ids": sample["input_ids"]}
        logits = torch.func.functional_call(workload.model, parameters, (), inputs).logits
        return workload.losses(logits, sample).sum()

    state = {name: value.clone() for name, value in workload.model.state_dict().items()}
    task = import_module("dattri.task").AttributionTask(loss, workload.model, state)
    parameters, _ = task.get_param(ckpt_idx=0, layer_name=names)
    gradients = task.get_grad_loss_func(in_dims=(None, 0), layer_name=names, ckpt_idx=0)
    return lambda: gradients(parameters, tuple(workload.batch.values())).detach()


def dattri_scores(workload: Workload, reference: Tensor) -> Run:
    """Cosines of those gradients with a reference, none projected."""
    gradients = dattri_gradients(workload)
    return lambda: torch.nn.functional.cosine_similarity(gradients(), reference.unsqueeze(0))


def dattri_sketches(workload: Workload, dimension: int) -> Run:
    """Those gradients through ``random_project``, with normal entries as traker's."""
    gradients = dattri_gradients(workload)
    project = import_module("dattri.func.projection").random_project(
        torch.empty(SAMPLES, sum(p.numel() for p in workload.parameters.values())),
        SAMPLES, dimension, 32, 0, "normal", device="cpu",
    )  # fmt: skip
    return lambda: project(gradients())


def bergson_scores(
    workload: Workload, references: dict[str, Tensor], second_moments: dict[str, Tensor] | None = None
) -> Run:
    """Its streaming ``Scorer`` behind its gradient hooks, nothing projected or written to disk.

    With second moments every gradient is divided by their root, which is Adam's step without momentum.
    """
    bergson = import_module("bergson")
    names = {_module(name): name for name in workload.parameters}
    norm = torch.stack([r.norm() for r in references.values()]).norm()
    queries = {module: (references[name] / norm).flatten().unsqueeze(0) for module, name in names.items()}
    writer = import_module("bergson.score.score_writer").InMemorySequenceScoreWriter(SAMPLES, 1)
    scorer = bergson.Scorer(
        queries, list(names), writer, torch.device("cpu"), torch.float32, unit_normalize=True
    )
    normalizers = {}
    if second_moments is not None:
        normalizer = import_module("bergson.gradients").AdamNormalizer
        normalizers = {module: normalizer(second_moments[name]) for module, name in names.items()}
    processor = bergson.GradientProcessor(normalizers=normalizers)
    run = _bergson_pass(workload, set(names), processor, scorer=scorer)

    def scores() -> Tensor:
        run()
        result: Tensor = writer.scores[:, 0]
        return result

    return scores


def bergson_sketches(workload: Workload, dimension: int) -> Run:
    """Its hooks with ``projection_target="global"`` and signs, which it makes faster than normal numbers."""
    processor = import_module("bergson").GradientProcessor(
        projection_dim=dimension, projection_target="global", projection_type="rademacher"
    )
    modules = {_module(name) for name in workload.parameters}
    collected: dict[str, Tensor] = {}
    run = _bergson_pass(workload, modules, processor, collected=collected, skip_index=True)

    def sketches() -> Tensor:
        run()
        return collected["gradients"]

    return sketches


def _module(parameter: str) -> str:
    """bergson's name for a PEFT model's layer: as seen from the base model, without the weight."""
    return parameter.removeprefix("base_model.").removesuffix(".weight")


def _bergson_pass(
    workload: Workload,
    modules: set[str],
    processor: Any,
    *,
    collected: dict[str, Tensor] | None = None,
    **options: Any,
) -> Callable[[], None]:
    """A forward and a backward pass of the batch under its hooks."""
    bergson = import_module("bergson")
    dataset = import_module("datasets").Dataset
    collector = bergson.GradientCollector(
        model=workload.model.base_model,
        target_modules=modules,
        data=dataset.from_dict({"input_ids": workload.batch["input_ids"].tolist()}),
        cfg=bergson.IndexConfig(run_path=tempfile.gettempdir()),
        processor=processor,
        **options,
    )

    def run() -> None:
        with collector.with_batch(None):
            losses = workload.forward(workload.batch)
            losses.sum().backward()
            workload.model.zero_grad()
        if collected is not None:
            collected.update(collector.mod_grads)
        collector.process_batch(list(range(SAMPLES)), losses=losses)

    return run
