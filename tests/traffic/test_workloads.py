"""Named workloads against the published configurations, worked out by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastproj.bench.traffic.shapes import ALL_LINEARS, MODELS, lora_shards
from fastproj.bench.traffic.workloads import WORKLOADS

QWEN, SMALL, LARGE = WORKLOADS
# Per block, r (d_in + d_out) for each target, from config.json.
BY_HAND = {
    # q: 1536 → 12·128; v: 1536 → 2·128; 28 blocks.
    QWEN: 28 * 16 * ((1536 + 1536) + (1536 + 256)),
    # q, o: 4096 ↔ 4096; k, v: 4096 → 8·128; gate, up, down: 4096 ↔ 14336; 32 blocks.
    SMALL: 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)),
    # q, o: 8192 ↔ 8192; k, v: 8192 → 8·128; gate, up, down: 8192 ↔ 28672; 80 blocks.
    LARGE: 80 * 64 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)),
}


def test_the_names_say_what_they_are():
    assert QWEN == "Qwen2.5-1.5B, LoRA r=16 on q, v"
    assert SMALL == "Llama-3.1-8B, LoRA r=16 on all linear layers"
    assert LARGE == "Llama-3.1-70B, LoRA r=64 on all linear layers"


@pytest.mark.parametrize("name", WORKLOADS)
def test_shard_elements_are_those_of_the_configuration(name: str):
    assert WORKLOADS[name].elements == BY_HAND[name]


def test_counts_known_from_elsewhere():
    """What PEFT's print_trainable_parameters says of these."""
    assert WORKLOADS[QWEN].elements == 2_179_072
    assert WORKLOADS[SMALL].elements == 41_943_040
    assert sum(a * b for a, b in lora_shards(MODELS["Llama-3.1-70B"], 16)) == 207_093_760


@pytest.mark.parametrize("name", WORKLOADS)
def test_contractions_match_the_shards(name: str):
    """Each contraction's result has the shape of its shard, in the shards' order."""
    workload = WORKLOADS[name]
    block = [(call.d_out, call.d_in) for call in workload.contractions]
    assert block * workload.model.layers == workload.shards
    for call in workload.contractions:
        assert (call.samples, call.tokens, call.calls) == (8, 2048, workload.model.layers)


def test_a_whole_model_has_its_published_size():
    """Weights of the linear layers: Llama-3.1-8B is 6.98 of its 8.03 billion (the rest embeds)."""
    model = MODELS["Llama-3.1-8B"]
    assert model.layers * sum(linear.d_in * linear.d_out for linear in model.linears) == 6_979_321_856


def test_unknown_targets_and_ranks_are_refused():
    with pytest.raises(ValueError, match=r"expected linear layers of Qwen2\.5-1\.5B.*got \['query'\]"):
        lora_shards(MODELS["Qwen2.5-1.5B"], 8, ["query"])
    with pytest.raises(ValueError, match="rank of at least 1, got 0"):
        lora_shards(MODELS["Qwen2.5-1.5B"], 0, ALL_LINEARS)


def test_chips_and_workloads_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import fastproj.bench.traffic.chips, fastproj.bench.traffic.moves, fastproj.bench.traffic.workloads"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
