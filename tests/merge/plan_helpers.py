"""Small checkpoints to plan merges of."""

import numpy as np

from bmjax.merge.plan.nodes import plan
from bmjax.merge.recipe.recipe import read_recipe

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def tensors(layers=4, vocabulary=6, hidden=4, head=True, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {EMBED: (vocabulary, hidden)}
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (hidden, hidden)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (8, hidden)
    shapes[NORM] = (hidden,)
    if head:
        shapes[HEAD] = (vocabulary, hidden)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def planned(recipe, **models):
    recipe = read_recipe(recipe)
    return plan(recipe, {name: models[name] for name in recipe.inputs})


def names(result):
    return [node.name for node in result.nodes]


def soup(*models, **more):
    return {"merge_method": "linear", "models": list(models), **more}
