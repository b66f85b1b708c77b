"""Streamed text is, to the last character, that of all tokens together: random tokens, every kind of decoder."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from bmjax.generate.decoding import token_decoder
from bmjax.generate.text import TextStream
from tests.conftest import byte_tokenizer

WORDS = ["▁", "▁▁", "▁a", "b", "▁the", ".", "▁n't", "'s", "▁'", "'", "☃", "�", "▁日", "本"]
BYTES = [f"<0x{byte:02X}>" for byte in (0x0A, 0x20, 0x41, 0x80, 0x98, 0x83, 0xBF, 0xC3, 0xE2, 0xF0, 0x9F, 0xFF)]


def wrap(model, decoder, added=True, **options):
    """A transformers tokenizer, where wanted with tokens that are special and others that are text."""
    backend = Tokenizer(model)
    backend.decoder = decoder
    if added:
        backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
        backend.add_tokens([AddedToken("<think>"), AddedToken(" spaced token "), AddedToken("é☃ added")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def pieces_model():
    vocabulary = [("<unk>", 0.0), *((word, -1.0) for word in WORDS + BYTES)]
    return models.Unigram(vocabulary, unk_id=0, byte_fallback=True)


def words_model():
    words = ["[UNK]", "foo", "##bar", ".", "?", "!", ",", "'", "n't", "'m", "'s", "'ve", "'re", "n", "t", "s", "日"]
    return models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]")


def bpe_words(suffix=""):
    words = ["foo", "b", ".", "'", "n't", "'m", " ", " .", " '", " ' ", "'re", " n't", " x", "  "]
    return models.BPE({word + suffix: number for number, word in enumerate(words)}, [])


def added_bytes():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(" spaced token "), AddedToken("é☃ added"), AddedToken("ÿĀ")])
    return tokenizer


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
FORCED = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
KINDS = {
    "bytes": byte_tokenizer,
    "bytes, added tokens": added_bytes,
    "bytes, a clean-up that transformers leaves out": lambda: wrap(
        byte_tokenizer().backend_tokenizer.model, decoders.ByteLevel(), clean_up_tokenization_spaces=True
    ),
    "pieces with bytes": lambda: wrap(pieces_model(), decoders.Sequence(LLAMA)),
    "pieces with bytes, no added tokens": lambda: wrap(pieces_model(), decoders.Sequence(LLAMA), added=False),
    "metaspace": lambda: wrap(pieces_model(), decoders.Metaspace()),
    "metaspace as it stands": lambda: wrap(pieces_model(), decoders.Metaspace(prepend_scheme="never")),
    "words": lambda: wrap(words_model(), decoders.WordPiece(cleanup=False)),
    "words, cleaned by their decoder": lambda: wrap(words_model(), decoders.WordPiece(cleanup=True)),
    "words, cleaned up": lambda: wrap(
        words_model(), decoders.WordPiece(cleanup=False), clean_up_tokenization_spaces=True
    ),
    "words with ends": lambda: wrap(bpe_words("</w>"), decoders.BPEDecoder()),
    "no decoder": lambda: wrap(bpe_words(), None, added=False),
    "bytes within a sequence": lambda: wrap(
        byte_tokenizer().backend_tokenizer.model, decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 1, 0)])
    ),
    "pieces, cleaned up by force": lambda: wrap(
        bpe_words(), decoders.Fuse(), clean_up_tokenization_spaces=True, **{FORCED: True}
    ),
}  # fmt: skip


def assert_streamed(tokenizer, tokens, rng, keep=()) -> None:
    """What comes in runs of 1 to 4 tokens is the text of all tokens."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    kept = [t for t in tokens if t not in special or tokenizer.convert_ids_to_tokens(t) in keep]
    whole = tokenizer.decode(kept, skip_special_tokens=False)
    assert keep or whole == tokenizer.decode(tokens, skip_special_tokens=True)
    stream, start, told = TextStream(tokenizer, keep=keep), 0, ""
    while start < len(tokens):
        size = int(rng.integers(1, 5))
        told += stream.push(tokens[start : start + size])
        assert whole.startswith(told), (tokens[: start + size], told)
        start += size
    told += stream.finish()
    assert told == stream.text == whole, tokens


@pytest.mark.parametrize("keep", [(), ("<think>", "</think>", "<s>")])
@pytest.mark.parametrize("kind", KINDS)
def test_random_tokens_stream_to_the_text_of_all(kind, keep):
    tokenizer, rng = KINDS[kind](), np.random.default_rng(0)
    ids = len(tokenizer) + 3  # a model's vocabulary has free rows
    several = 0
    for _ in range(1500):
        tokens = rng.integers(0, ids, rng.integers(0, 24)).tolist()
        assert_streamed(tokenizer, tokens, rng, keep)
        several += len(tokenizer.decode(tokens, skip_special_tokens=True)) > 5
    assert several > 500


def test_bytes_of_a_real_tokenizer(qwen2_tokenizer):
    rng = np.random.default_rng(0)
    # Bytes alone are the hardest; then any tokens.
    for ids in (256, len(qwen2_tokenizer) + 100):
        for _ in range(500):
            assert_streamed(qwen2_tokenizer, rng.integers(0, ids, 30).tolist(), rng)


def test_text_comes_with_its_token_and_no_later():
    tokenizer = byte_tokenizer()
    decoder, tokens = token_decoder(tokenizer), tokenizer("ab é☃", add_special_tokens=False)["input_ids"]
    said = [decoder.push([token]) for token in tokens]
    assert "".join(said) == "ab é☃" and sum(map(bool, said)) >= 4
    pieces = wrap(pieces_model(), decoders.Sequence(LLAMA))
    decoder = token_decoder(pieces)
    ids = [pieces.convert_tokens_to_ids(name) for name in ("▁the", "▁a", "<0xE2>", "<0x98>", "<0x83>", "b", "<s>", ".")]
    assert [decoder.push([token]) for token in ids] == ["the", " a", "", "", "", "☃b", "", "."]


def test_many_tokens_take_no_more_time_each():
    tokenizer = byte_tokenizer()
    decoder, calls = token_decoder(tokenizer), 0

    class Counting:
        def id_to_token(self, token):
            nonlocal calls
            calls += 1
            return tokenizer.backend_tokenizer.id_to_token(token)

    decoder._backend = Counting()
    for token in [65] * 2000:
        decoder.push([token])
    assert calls == 2000
