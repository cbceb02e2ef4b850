"""The table of architectures against transformers' own classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny_architectures import BLOCKS, MODELS, VOCABULARY, WIDTH, tiny
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from fastproj.architectures import ARCHITECTURES, architecture_of, blocks, final_layers, stream_role

KINDS = sorted(ARCHITECTURES)
ENCODERS = ("bert", "roberta")
CAUSAL = [kind for kind in KINDS if kind not in ENCODERS]


def widths(layer: nn.Module) -> tuple[int, int]:
    """What a linear layer takes and gives."""
    assert isinstance(layer, (nn.Linear, Conv1D))
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)


def test_every_architecture_has_a_model_here() -> None:
    assert sorted(MODELS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_readers_and_writers_are_the_linear_layers_of_a_block(kind: str) -> None:
    model = tiny(kind)
    architecture = architecture_of(model)
    found = blocks(model)
    assert list(found) == [f"{architecture.blocks}.{number}" for number in range(BLOCKS)]
    for block in found.values():
        linear = {name for name, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        assert linear == {*architecture.readers, *architecture.writers}
        assert all(widths(block.get_submodule(name))[0] == WIDTH for name in architecture.readers)
        assert all(widths(block.get_submodule(name))[1] == WIDTH for name in architecture.writers)


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_modules_tell_their_role(kind: str) -> None:
    model = tiny(kind)
    architecture = architecture_of(model)
    roles = {name: stream_role(name) for name, _ in model.named_modules()}
    found = list(blocks(model))
    assert {n for n, role in roles.items() if role == "read"} == {
        f"{block}.{layer}" for block in found for layer in architecture.readers
    }
    assert {n for n, role in roles.items() if role == "write"} == {
        f"{block}.{layer}" for block in found for layer in architecture.writers
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coordinate", [0, WIDTH - 1])
def test_what_a_writer_gives_reaches_the_stream_where_it_was_written(kind: str, coordinate: int) -> None:
    model = tiny(kind).eval()
    block = next(iter(blocks(model).values()))
    given: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        given.append(out[0] if isinstance(out, tuple) else out)

    block.register_forward_hook(keep)
    push = F.one_hot(torch.tensor(coordinate), WIDTH)
    ids = torch.arange(2, 8)[None]
    with torch.no_grad():
        model(input_ids=ids)
        for name in architecture_of(model).writers:
            handle = block.get_submodule(name).register_forward_hook(lambda _, __, out: out + push)
            model(input_ids=ids)
            handle.remove()
    before, *after = given
    for changed in after:
        # Norms behind a writer, of BERT and Gemma, spread some of it; most stays where it was.
        assert int((changed - before).mean((0, 1)).argmax()) == coordinate


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_bare_and_of_adapted_models(kind: str) -> None:
    bare = tiny(kind, bare=True)
    _, _, path = architecture_of(bare).blocks.partition(".")
    assert list(blocks(bare)) == [f"{path}.{number}" for number in range(BLOCKS)]
    model = tiny(kind)
    plain = blocks(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    again = blocks(wrapped)
    assert list(again) == list(plain)
    assert all(again[name] is block for name, block in plain.items())


def last_stream_and_end(model: nn.Module) -> tuple[Tensor, Tensor]:
    """What the last block gives, and what the unembedding reads, or a bare model gives."""
    taken: dict[str, Tensor] = {}

    def keep_stream(_: nn.Module, __: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> None:
        taken["stream"] = out[0] if isinstance(out, tuple) else out

    def keep_end(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        taken["end"] = inputs[0]

    handles = [list(blocks(model).values())[-1].register_forward_hook(keep_stream)]
    head = model.get_output_embeddings()
    if head is not None:
        handles.append(head.register_forward_pre_hook(keep_end))
    with torch.no_grad():
        out = model(input_ids=torch.arange(2, 8)[None])
    for handle in handles:
        handle.remove()
    return taken["stream"], taken["end"] if head is not None else out.last_hidden_state


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("bare", [False, True], ids=["head", "bare"])
def test_final_layers_lead_from_the_last_block_to_the_head(kind: str, bare: bool) -> None:
    model = tiny(kind, bare).eval()
    stream, end = last_stream_and_end(model)
    with torch.no_grad():
        for layer in final_layers(model):
            stream = layer(stream)
    assert torch.equal(stream, end)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("without_norm", [False, True])
def test_final_layers_of_opt_models_of_every_shape(narrow: bool, without_norm: bool) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        hidden_size=WIDTH, word_embed_proj_dim=8 if narrow else WIDTH, ffn_dim=24, num_hidden_layers=BLOCKS,
        num_attention_heads=2, vocab_size=VOCABULARY, max_position_embeddings=16,
        do_layer_norm_before=not without_norm, _remove_final_layer_norm=without_norm,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    layers = final_layers(model)
    assert [type(layer) for layer in layers] == [nn.LayerNorm] * (not without_norm) + [nn.Linear] * narrow
    stream, end = last_stream_and_end(model)
    with torch.no_grad():
        for layer in layers:
            stream = layer(stream)
    assert torch.equal(stream, end)


def test_final_layers_of_adapted_models_and_of_encoders() -> None:
    model = tiny("llama")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert final_layers(wrapped) == [model.model.norm]
    assert [final_layers(tiny(kind)) for kind in ENCODERS] == [[], []]


def test_a_model_without_its_final_layers_is_refused() -> None:
    model = tiny("llama")
    del model.model.norm
    with pytest.raises(ValueError, match=r"expected 'model\.norm' in LlamaForCausalLM, there is none"):
        final_layers(model)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    config = T5Config(num_layers=1, d_model=8, d_kv=4, num_heads=2, d_ff=8, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=r"expected a model of type bert, .*, got 't5'"):
        architecture_of(T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match="got a Linear without a model_type"):
        blocks(nn.Linear(2, 2))


def test_a_model_of_a_known_type_without_its_blocks_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.config = tiny("llama").config  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"expected blocks at 'model\.layers' in Linear"):
        blocks(model)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lm_head",
        "classifier",
        "pooler.dense",
        "bert.pooler.dense",
        "model.layers.0",
        "not_fc1",
        "xq_proj",
    ],
)
def test_other_names_have_no_role(name: str) -> None:
    assert stream_role(name) is None


def test_a_layer_alone_has_its_role() -> None:
    assert stream_role("mlp.down_proj") == "write"
    assert stream_role("fc1") == "read"
    assert stream_role("bert.encoder.layer.3.attention.output.dense") == "write"
    assert stream_role("bert.encoder.layer.3.intermediate.dense") == "read"
