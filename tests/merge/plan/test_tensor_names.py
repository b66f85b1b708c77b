import pytest

from bmjax.merge.plan.tensor_names import (
    Layer,
    depth,
    is_before_layers,
    is_buffer,
    is_embedding,
    is_head,
    is_vocabulary,
    layer,
)  # fmt: skip


@pytest.mark.parametrize(
    "name, expected",
    [
        ("model.layers.31.mlp.up_proj.weight", ("model.layers", 31, "mlp.up_proj.weight")),
        (
            "model.layers.3.block_sparse_moe.experts.7.w1.weight",
            ("model.layers", 3, "block_sparse_moe.experts.7.w1.weight"),
        ),
        ("h.0.attn.c_attn.weight", ("h", 0, "attn.c_attn.weight")),
        ("bert.encoder.layer.11.output.dense.bias", ("bert.encoder.layer", 11, "output.dense.bias")),
    ],
)
def test_layers(name, expected):
    assert layer(name) == Layer(*expected)
    assert layer(name).name == name


# Names of Llama and Qwen2, GPT-2, GPT-NeoX, Bloom, InternLM2, ChatGLM, Mamba, BERT, T5, Gemma 3.
BEFORE = [
    "model.embed_tokens.weight", "wte.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight",
    "transformer.word_embeddings.weight", "model.tok_embeddings.weight", "backbone.embeddings.weight",
    "bert.embeddings.word_embeddings.weight", "shared.weight", "model.language_model.embed_tokens.weight",
    "emb.weight", "backbone.embedding.weight", "transformer.word_embedding.weight", "transformer.tokens_embed.weight",
]  # fmt: skip
BEFORE_TOO = [
    "wpe.weight", "transformer.word_embeddings_layernorm.weight", "bert.embeddings.position_embeddings.weight",
    "bert.embeddings.LayerNorm.bias", "embed_positions.weight", "visual.patch_embed.proj.weight",
    "model.embed_vision.embedding.weight", "audio_tower.embed.weight",
]  # fmt: skip
HEADS = [
    "lm_head.weight", "lm_head.bias", "embed_out.weight", "output.weight", "transformer.output_layer.weight",
    "cls.predictions.decoder.weight", "language_model.lm_head.weight", "vocab_projector.weight",
    "cls.predictions.bias", "language_model.output.weight", "model.transformer.ff_out.weight", "lm_head.linear.weight",
]  # fmt: skip
AFTER = ["model.norm.weight", "transformer.ln_f.bias", "gpt_neox.final_layer_norm.weight", "score.weight"]


def test_places_and_kinds():
    for name in BEFORE:
        assert is_embedding(name) and is_vocabulary(name) and is_before_layers(name), name
    for name in BEFORE_TOO:
        assert is_before_layers(name) and not is_vocabulary(name), name
    for name in HEADS:
        assert is_head(name) and is_vocabulary(name) and not is_before_layers(name) and not is_embedding(name), name
    for name in AFTER:
        assert not is_vocabulary(name) and not is_before_layers(name), name
    for name in (*BEFORE, *BEFORE_TOO, *HEADS, *AFTER):
        assert layer(name) is None and not is_buffer(name), name
    for name in (
        "model.layers.0.mlp.output.weight", "model.layers.0.embed_tokens.weight", "blocks.0.ff_out.weight",
        "h.0.ff_out.weight", "lm_head.dense.weight", "vision.output.weight",
    ):  # fmt: skip
        assert not is_vocabulary(name)


def test_buffers():
    for name in (
        "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "h.0.attn.bias",
        "gpt_neox.layers.0.attention.masked_bias", "bert.embeddings.position_ids",
    ):  # fmt: skip
        assert is_buffer(name)
    for name in ("model.layers.0.self_attn.q_proj.bias", "h.0.attn.c_attn.bias", "model.layers.0.mlp.bias"):
        assert not is_buffer(name)


def test_depth():
    assert [depth(i, 5) for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert depth(0, 1) == 1.0
