from tests.merge.plan_helpers import planned, soup, tensors


def test_the_text_model_inside_a_config(save):
    inner = {"num_hidden_layers": 4, "tie_word_embeddings": True, "layer_types": ["a", "b", "c", "d"]}
    tied = save("tied", tensors(head=False), text_config=inner)
    untied = save("untied", tensors(seed=1))
    sources = [{"model": m, "layer_range": [1, 3]} for m in ("tied", "untied")]
    result = planned({"merge_method": "linear", "slices": [{"sources": sources}]}, tied=tied, untied=untied)
    assert result.config_changes == {
        "text_config": {"num_hidden_layers": 2, "tie_word_embeddings": False, "layer_types": ["b", "c"]}
    }


def test_differing_configs_are_told(save):
    a, b = save("a", tensors(), rope_theta=1.0, vocab_size=6), save("b", tensors(), rope_theta=2.0, vocab_size=7)
    assert planned(soup("a", "b"), a=a, b=b).notes == (
        "config.json of 'b' differs from 'a' in rope_theta; it is not used",
    )
