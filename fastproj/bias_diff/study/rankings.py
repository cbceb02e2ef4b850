"""Scores of every training sample by each way of looking for the biased ones; higher is more suspect."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastproj.bias_diff.records import Records
from fastproj.bias_diff.study.evidence import CONTRASTS, SKETCHES, Evidence


def rankings(evidence: Evidence, bias_types: Sequence[str]) -> dict[str, Tensor]:
    """Name of the way → (N,) scores, from what a backward pass and a forward pass gave."""
    probes = evidence.gram.shape[1] - len(CONTRASTS)
    everything = torch.ones(len(evidence.parameters), dtype=torch.bool)
    mean = torch.zeros(probes + len(CONTRASTS), dtype=torch.float64)
    mean[:probes] = 1 / probes

    def cosine(update: str, weights: Tensor = mean, chosen: Tensor = everything) -> Tensor:
        return cosines(evidence, update, weights[None], chosen)[:, 0]

    found = {
        "influence, Adam": cosine("adam"),
        "influence, plain gradient": cosine("plain"),
        "influence, Adam, loss summed over tokens": cosine("adam, summed loss"),
        "influence, Adam, dot product": (evidence.dots["adam"].sum(0) @ mean),
        "loss": evidence.losses,
        "length": evidence.lengths.double(),
    }
    for k in SKETCHES:
        found[f"sketched, k = {k}"] = evidence.sketched[k]
    for size in (5, 15, 30):
        some = torch.zeros_like(mean)
        some[:size] = 1 / size
        found[f"influence, Adam, {size} probes"] = cosine("adam", some)
    for row, contrast in enumerate(CONTRASTS, start=probes):
        against = mean.clone()
        against[row] = -1
        found[f"influence, Adam, probes minus {contrast}"] = cosine("adam", against)
    found["influence, Adam, nearest probe"] = _nearest(evidence, torch.eye(probes, dtype=torch.float64))
    found["influence, Adam, nearest bias type"] = _nearest(evidence, _by_type(bias_types))
    for name, chosen in _groups(evidence.parameters).items():
        found[f"influence, Adam, {name}"] = cosine("adam", mean, chosen)
    return found


def cosines(evidence: Evidence, update: str, weights: Tensor, chosen: Tensor) -> Tensor:
    """Cosines (N, J) with J sums of references, ``weights`` (J, M or fewer), over ``chosen`` parameters."""
    weights = F.pad(weights, (0, evidence.gram.shape[1] - weights.shape[1]))
    dots = evidence.dots[update][chosen].sum(0) @ weights.T
    norms = evidence.sqnorms[update][chosen].sum(0).sqrt()
    gram = evidence.gram[chosen].sum(0)
    targets = torch.einsum("jm,mn,jn->j", weights, gram, weights).sqrt()
    return dots / (norms[:, None] * targets)


def _nearest(evidence: Evidence, weights: Tensor) -> Tensor:
    everything = torch.ones(len(evidence.parameters), dtype=torch.bool)
    return cosines(evidence, "adam", weights, everything).amax(1)


def _by_type(bias_types: Sequence[str]) -> Tensor:
    rows = [[float(own == kind) for own in bias_types] for kind in sorted(set(bias_types))]
    table = torch.tensor(rows, dtype=torch.float64)
    return table / table.sum(1, keepdim=True)


def _groups(parameters: Sequence[str]) -> dict[str, Tensor]:
    """Parts of the adapter: either factor, either projection, thirds of the depth."""
    depths = [int(name.split(".layers.")[1].split(".")[0]) for name in parameters]
    third = (max(depths) + 1) / 3
    tests: dict[str, Callable[[int], bool]] = {
        "A alone": lambda i: "lora_A" in parameters[i],
        "B alone": lambda i: "lora_B" in parameters[i],
        "queries alone": lambda i: "q_proj" in parameters[i],
        "values alone": lambda i: "v_proj" in parameters[i],
        "first third of the layers": lambda i: depths[i] < third,
        "middle third of the layers": lambda i: third <= depths[i] < 2 * third,
        "last third of the layers": lambda i: depths[i] >= 2 * third,
    }
    return {name: torch.tensor([test(i) for i in range(len(parameters))]) for name, test in tests.items()}


def similarity(texts: Records, probe: Records, batch_size: int = 32) -> Tensor:
    """Cosine of a text's MiniLM-L6 embedding with the probe's mean embedding, (N,)."""
    from transformers import AutoModel, AutoTokenizer

    from fastproj.demo.data import find_model

    folder = find_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(sentences: Sequence[str]) -> Tensor:
        rows = []
        for first in range(0, len(sentences), batch_size):
            batch = tokenizer(
                list(sentences[first : first + batch_size]),
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][:, :, None]
            rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(rows)

    return torch.cosine_similarity(embed(texts.texts), embed(probe.texts).mean(0, keepdim=True)).double()
