import pytest

from bmjax.merge.plan.config_token_ids import follow_tokens, stated_ids

OLD = {"u": 0, "<s>": 1, "</s>": 2, "<image>": 3, "<end>": 4, "x": 5}
NEW = {"<end>": 0, "u": 1, "</s>": 2, "<s>": 3, "<image>": 9}  # lacks x

MOVED = {
    "bos_token_id": (1, 3), "eos_token_id": ([2, 4], [2, 0]), "image_token_index": (3, 9), "image_token_id": (3, 9),
    "decoder_start_token_id": (4, 0), "forced_bos_token_id": (1, 3), "boi_token_index": (1, 3),
    "visual_indicator_token_ids": ([3, 1], [9, 3]), "image_token_indices": ([3], [9]), "im_start_id": (1, 3),
    "suppress_tokens": ([1, 4, -1], [3, 0, -1]), "begin_suppress_tokens": ([0, 3], [1, 9]),
    "bad_words_ids": ([[1, 4], [0]], [[3, 0], [1]]), "force_words_ids": ([[[1], [4]]], [[[3], [0]]]),
    "forced_decoder_ids": ([[1, 3], [2, None]], [[1, 9], [2, None]]), "lang_to_id": ({"<|en|>": 3}, {"<|en|>": 9}),
    "sequence_bias": ([[[1, 3], 4]], [[[3, 9], 4]]),
}  # fmt: skip
STAYS = {
    "image_token_index": -200, "num_image_tokens": 3, "max_new_tokens": 3, "codec_eos_token_id": 3,
    "pad_token_id": None, "blank_token_id": 3, "image_seq_length": 4, "tts_codec_end_token_id": 1, "eos_token": 3,
    "unk_token_id": True,
}  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("key", MOVED)
def test_ids_follow_their_tokens(key, nested):
    before, after = MOVED[key]
    config = {"text_config": {key: before}} if nested else {key: before}
    result, notes = follow_tokens(config, OLD, NEW)
    assert result == ({"text_config": {key: after}} if nested else {key: after})
    assert notes == [f"config.json: {key}: by the result's tokenizer, which has other ids than the donor's"]
    assert config == ({"text_config": {key: before}} if nested else {key: before})


@pytest.mark.parametrize("key", STAYS)
def test_other_numbers_stay(key):
    assert follow_tokens({key: STAYS[key]}, OLD, NEW) == ({key: STAYS[key]}, [])


LOST = {
    "eos_token_id": (5, None, "written as null"), "image_token_id": (5, -1, "written as -1, no token's id"),
    "suppress_tokens": ([5, 1], [3], "left out"), "bad_words_ids": ([[1, 5], [1]], [[3]], "left out"),
    "begin_suppress_tokens": ([5], None, "written as null"), "lang_to_id": ({"a": 5, "b": 1}, {"b": 3}, "left out"),
    "forced_decoder_ids": ([[1, 5], [2, 1]], [[2, 3]], "left out"),
}  # fmt: skip


@pytest.mark.parametrize("key", LOST)
def test_a_token_without_a_counterpart_is_told_and_never_another_tokens_id(key):
    before, after, told = LOST[key]
    result, notes = follow_tokens({key: before}, OLD, NEW)
    assert result == {key: after}
    assert notes[0].startswith(f"config.json: {key}: the result's tokenizer lacks 'x': {told};")


def test_an_id_of_no_token_stays_and_is_told():
    result, notes = follow_tokens({"image_token_id": 9, "pad_token_id": 7}, OLD, NEW, "generation_config.json")
    assert result == {"image_token_id": 9, "pad_token_id": 7}
    assert notes == [
        "generation_config.json: image_token_id: 9 was no token's id, so it stays, and is now '<image>': look at it",
        "generation_config.json: pad_token_id: 7 was no token's id, so it stays",
    ]
    # A tokenizer that only grows takes no id away, unless a new token gets it.
    assert follow_tokens({"image_token_id": 9}, OLD, OLD | {"new": 6}) == ({"image_token_id": 9}, [])
    assert "is now 'new'" in follow_tokens({"image_token_id": 6}, OLD, OLD | {"new": 6})[1][0]


def test_ids_that_the_tokenizers_model_states_go_first():
    stated = stated_ids(
        {"eos_token_id": 0, "pad_token_id": None, "image_token_id": 1, "text_config": {"bos_token_id": 1}}
    )
    assert stated == {"eos_token_id": 0, "bos_token_id": 1}
    config = {"eos_token_id": 2, "bos_token_id": 5, "text_config": {"eos_token_id": [2, 5]}, "pad_token_id": 4}
    result, notes = follow_tokens(config, OLD, NEW, stated=stated)
    assert result == {"eos_token_id": 0, "bos_token_id": 1, "text_config": {"eos_token_id": 0}, "pad_token_id": 0}
    assert len(notes) == 1


def test_ids_in_other_blocks_stay_and_are_told():
    config = {"vision_config": {"pad_token_id": 2, "x": {"bos_token_id": 1}}, "text_config": {"bos_token_id": 2}}
    result, notes = follow_tokens(config, OLD, NEW)
    assert result == config
    assert notes == [
        "config.json: vision_config.x.bos_token_id stay as they are: look whether they are ids of the tokenizer"
    ]
