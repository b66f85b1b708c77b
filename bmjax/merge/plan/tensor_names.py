"""Reads the names of a Hugging Face checkpoint's tensors, whatever the architecture: layers, embeddings, heads."""

import functools
import re
from typing import NamedTuple

_LAYER = re.compile(r"\.([0-9]{1,5})\.")
# Modules of these names hold a row for each token. The second group's names stand in encoders of other senses, too.
_EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings?|tok_embeddings|tokens_embed|token_embeddings?|input_embeddings?"
    r"|in_out_embed|embed_text_tokens|shared|embeddings)\.weight"
)
_SHORT_EMBEDDING = re.compile(r"(^|\.)(emb|embed|embedding)\.weight")
_HEAD = re.compile(
    r"(.*\.)?((text_|generator_)?lm_head(\.(decoder|linear|out_proj))?|predictions(\.decoder)?|embed_out"
    r"|output_layer|output_projection|vocab_projector|pred_layer\.proj|lm_loss|mlm_score\.decoder|ff_out"
    r"|word_embeddings_for_head|unembed(ding)?(_projection)?)\.(weight|bias)"
    r"|((model|language_model|llm|transformer)\.)*output\.(weight|bias)"
)
_TASK_HEAD = re.compile(
    r"(^|\.)(scorer?|regressor|(\w+_)?classifier|classification_head|multiple_choice_head|qa_outputs|summary|logits_proj"
    r"|(v|cls|value|rank)s?_head|(rm|prm|critic|reward|regression|scoring)s?_(head|layer|proj))\."
)
# The embedding of each layer beside the model's own, [V, L x size], of Gemma 3n and Gemma 4.
_PER_LAYER_EMBEDDING = re.compile(r"(^|\.)embed_tokens_per_layer\.weight$")
# Scores of the codes of sounds or images: a head for each codebook, or one under a name of its own.
_CODE_HEAD = re.compile(
    r"(^|\.)((\w+_)?lm_heads?\.[0-9]+|(\w+_)?lm_heads|codebooks?_heads?|(audio|code|codec)_(lm_)?heads?|logits_dense)\."
    r"(.*\.)?(weight|bias)$"
)
# What an encoder-decoder adds to its scores of tokens, [1, V] (BART, Marian, Pegasus).
_SCORES_BIAS = re.compile(r"(^|\.)final_logits_bias$")
_BUFFER = re.compile(r"(^|\.)(inv_freq|position_ids|(attn|attention)\.(masked_)?bias)$")
# Parts of the names of what is beside a language model: encoders of other senses, and what joins them to it.
TOWERS = r"vision|visual|image|audio|speech|video|multi_modal|projector|connector|resampler|qformer|perceiver"
_FIRST = re.compile(r"emb|wte|wpe|shared\.weight|layernorm_pre|ln_pre|patch")


class Layer(NamedTuple):
    """`model.layers.3.mlp.up_proj.weight` is tensor `mlp.up_proj.weight` of layer 3 in the stack `model.layers`."""

    stack: str
    number: int
    tensor: str

    @property
    def name(self) -> str:
        """The whole name."""
        return f"{self.stack}.{self.number}.{self.tensor}"


@functools.lru_cache(2**16)
def layer(name: str) -> Layer | None:
    """Return the layer of a tensor: its number is the first in the name. None for embeddings, norms and heads.

    A head of rewards or classes may be a row of modules, `score.0` and `score.2`, which are no layers. Nor are the
    heads of several codebooks.
    """
    match = _LAYER.search(name)
    if match is None or _TASK_HEAD.search(name[: match.start() + 1]) or is_code_head(name):
        return None
    return Layer(name[: match.start()], int(match[1]), name[match.end() :])


def depth(number: int, layers: int) -> float:
    """Return how deep a layer lies: 0 for the first, 1 for the last and for an only layer.

    Tensors of no layer count as depth 0, as in mergekit.
    """
    return number / (layers - 1) if layers > 1 else 1.0


@functools.lru_cache(2**16)
def is_head(name: str) -> bool:
    """Return whether the tensor turns hidden states into scores of tokens, by its name: a row for each token.

    Heads of other names are told by their shape, see `heads.heads_by_shape`.
    """
    return _HEAD.fullmatch(name) is not None and layer(name) is None


def is_task_head(name: str) -> bool:
    """Return whether the tensor turns hidden states into something else than scores of tokens: rewards, classes."""
    return layer(name) is None and not is_head(name) and _TASK_HEAD.search(name) is not None


def is_code_head(name: str) -> bool:
    """Return whether the tensor turns hidden states into scores of codes, of which a decoder makes sounds or images."""
    return ("head" in name or "logits" in name) and _CODE_HEAD.search(name) is not None


def is_embedding(name: str) -> bool:
    """Return whether the tensor holds the tokens' input vectors: a row for each token."""
    if layer(name) is not None or is_head(name):
        return False
    is_short = _SHORT_EMBEDDING.search(name) is not None and not is_of_tower(name)
    return is_short or _EMBEDDING.search(name) is not None


@functools.lru_cache(2**16)
def is_vocabulary(name: str) -> bool:
    """Return whether the tensor has a row for each token, by its name. A bias of scores counts as a row's entries."""
    return is_embedding(name) or is_head(name) or _SCORES_BIAS.search(name) is not None or is_per_layer_embedding(name)


def is_per_layer_embedding(name: str) -> bool:
    """Return whether the tensor has a row for each token, with a part for each layer."""
    return _PER_LAYER_EMBEDDING.search(name) is not None


def token_axis(name: str) -> int:
    """Return which axis of a tensor of the vocabulary goes along the tokens: the first, of a bias [1, V] the last."""
    return -1 if _SCORES_BIAS.search(name) else 0


def with_tokens(name: str, shape: tuple[int, ...], *count: int) -> tuple[int, ...]:
    """Return the shape of a tensor of the vocabulary with `count` in place of its tokens, or without that axis."""
    axis = token_axis(name)
    return (*shape[:axis], *count, *shape[axis:][1:])


def is_buffer(name: str) -> bool:
    """Return whether loaders compute the tensor themselves, so that a checkpoint may lack it."""
    return _BUFFER.search(name) is not None


@functools.lru_cache(2**16)
def is_of_tower(name: str) -> bool:
    """Return whether a tensor belongs to an encoder beside the language model, or to what joins the two."""
    return re.search(TOWERS, name) is not None


def is_before_layers(name: str) -> bool:
    """Return whether a tensor of no layer stands before the layers (an embedding), not after (a norm, a head)."""
    return not is_head(name) and _FIRST.search(name) is not None
