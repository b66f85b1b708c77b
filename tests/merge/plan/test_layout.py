import numpy as np

from tests.merge.plan_helpers import EMBED, HEAD, names, planned, soup, tensors


def test_one_untied_model_makes_the_result_untied(save):
    tied = save("tied", tensors(head=False), tie_word_embeddings=True)
    untied = save("untied", tensors(seed=1), tie_word_embeddings=False)
    for base, other in (("tied", "untied"), ("untied", "tied")):
        result = planned(
            {"merge_method": "task_arithmetic", "base_model": base, "models": [other]}, tied=tied, untied=untied
        )
        head = result.nodes[-1]
        assert head.name == HEAD and head.shape == (6, 4)
        assert {model: source.tensor for model, source in head.inputs.items()} == {"tied": EMBED, "untied": HEAD}
        assert result.config_changes == ({"tie_word_embeddings": False} if base == "tied" else {})
        assert any("'tied' is tied" in note for note in result.notes)


def test_tied_models_stay_tied_with_an_untied_config(save):
    a, b = (save(name, tensors(head=False, seed=i), tie_word_embeddings=True) for i, name in enumerate("ab"))
    config = save("config", tensors(seed=2), tie_word_embeddings=False)
    result = planned(soup("a", "b", base_model="config"), a=a, b=b, config=config)
    assert HEAD not in names(result) and result.config_changes == {"tie_word_embeddings": True}
    assert planned(soup("a", "b"), a=a, b=b).config_changes == {}


def test_a_tied_step_read_beside_an_untied_model(save):
    models = {
        name: save(name, tensors(head=name == "untied", seed=i), tie_word_embeddings=name != "untied")
        for i, name in enumerate(("a", "b", "untied"))
    }
    steps = [{**soup("a", "b"), "name": "mid"}, soup("mid", "untied")]
    head = planned({"steps": steps}, **models).nodes[-1]
    assert head.name == HEAD and head.inputs["mid"].node.name == EMBED
    assert list(head.files()) == [("a", EMBED), ("b", EMBED), ("untied", HEAD)]


def test_a_head_that_copies_the_embedding_counts_as_tied(save):
    copied = tensors()
    copied[HEAD] = copied[EMBED].copy()
    other = tensors(seed=1)
    a = save("a", copied, tie_word_embeddings=True)
    result = planned(soup("a"), a=a)
    assert HEAD not in names(result) and result.config_changes == {}
    assert any("is a copy of its embedding" in note for note in result.notes)
    result = planned(soup("b"), b=save("b", other, tie_word_embeddings=True))
    assert HEAD in names(result) and result.config_changes == {"tie_word_embeddings": False}
    result = planned(soup("c"), c=save("c", copied, tie_word_embeddings=False))
    assert HEAD in names(result) and result.config_changes == {}


def test_gpt2_names(save):
    shapes = {"wte.weight": (6, 4), "wpe.weight": (8, 4), "h.0.attn.c_attn.weight": (4, 12),
              "h.1.attn.c_attn.weight": (4, 12), "ln_f.weight": (4,)}  # fmt: skip
    a, b = ({n: np.full(s, v, np.float32) for n, s in shapes.items()} for v in (1, 2))
    b |= {f"h.{i}.attn.bias": np.ones((1, 1, 8, 8), np.float32) for i in range(2)}
    recipe = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": m, "layer_range": [1, 2]}]} for m in ("a", "b", "a")],
    }
    result = planned(recipe, a=save("a", a, n_layer=2), b=save("b", b, n_layer=2))
    assert [(node.name, *node.files()) for node in result.nodes] == [
        ("wte.weight", ("a", "wte.weight")),
        ("wpe.weight", ("a", "wpe.weight")),
        ("h.0.attn.c_attn.weight", ("a", "h.1.attn.c_attn.weight")),
        ("h.1.attn.c_attn.weight", ("b", "h.1.attn.c_attn.weight")),
        ("h.1.attn.bias", ("b", "h.1.attn.bias")),
        ("h.2.attn.c_attn.weight", ("a", "h.1.attn.c_attn.weight")),
        ("ln_f.weight", ("a", "ln_f.weight")),
    ]
    assert result.config_changes == {"n_layer": 3}
