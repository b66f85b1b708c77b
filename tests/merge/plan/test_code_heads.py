"""Models that score codes of sounds or images with heads of their own, and so have no language head to lose."""

import numpy as np
import pytest

from bmjax.config import UserError
from bmjax.merge.plan.tensor_names import is_code_head, layer
from tests.merge.plan_helpers import names, planned, soup, tensors

CONFIG = {"model_type": "unknown", "architectures": ["SoundForConditionalGeneration"], "tie_word_embeddings": False}
HEADS = {
    "MusicGen, a head for each codebook": ["decoder.lm_heads.0.weight", "decoder.lm_heads.1.weight"],
    "CSM": ["depth_decoder.codebooks_head.weight"],
    "Moshi's depth decoder": ["lm_heads.weight"],
    "Dia": ["logits_dense.weight"],
    "Qwen's talker": ["talker.codec_head.weight", "talker.code_predictor.lm_head.0.weight"],
    "Higgs": ["audio_lm_head.weight"],
}


def sounds(heads, seed=0):
    return tensors(head=False, seed=seed) | {name: np.ones((3, 4), np.float32) for name in heads}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_heads_of_codes_stand_in_place_of_a_language_head(save, heads):
    assert all(map(is_code_head, heads)) and not any(map(layer, heads))
    a, b = (save(name, sounds(heads, i), **CONFIG) for i, name in enumerate("ab"))
    result = planned(soup("a", "b"), a=a, b=b)
    assert names(result) == list(sounds(heads)) and result.notes == ()
    slices = [{"sources": [{"model": "a", "layer_range": list(part)}]} for part in ((0, 3), (1, 4))]
    stack = planned({"merge_method": "passthrough", "slices": slices}, a=a)
    assert [name for name in names(stack) if is_code_head(name)] == heads
    assert sum("up_proj" in name for name in names(stack)) == 6


def test_a_model_without_any_head_is_still_refused(save):
    with pytest.raises(UserError, match="the head was lost"):
        planned(soup("a"), a=save("a", sounds(["decoder.heads_up.weight"]), **CONFIG))
