"""What a layer keeps for its backward pass, and what is computed again (arXiv 1604.06174).

A layer's input, and:
- full: nothing. One activation a layer; every product of the forward pass is computed twice.
- save_attention: what attention gave, so that its kernels don't run again. For long rows.
- minimal: that and every product with a weight; only what lies between them is computed again.
- offload: as full, but the inputs wait in the host's memory.
- none: everything.
"""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from bmjax.model.how import Remat

ATTENTION = "attention"  # outputs and log-sums of attention kernels
LAYER_INPUT = "layer_input"


def named(x: jax.Array, name: str) -> jax.Array:
    """`x`, under the name by which a policy finds it."""
    return checkpoint_name(x, name)


def remat(layer: type[nn.Module], how: Remat) -> type[nn.Module]:
    """The layer with what `how` says kept. Raises KeyError for a name that is not one."""
    if how == "none":
        return layer
    return nn.remat(layer, prevent_cse=False, policy=_POLICIES[how]())


def _minimal() -> Any:
    policies = jax.checkpoint_policies
    return policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
    )


_POLICIES: dict[str, Any] = {
    "full": lambda: None,
    "save_attention": lambda: jax.checkpoint_policies.save_only_these_names(ATTENTION),
    "minimal": _minimal,
    "offload": lambda: jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT], offload_src="device",
        offload_dst="pinned_host",
    ),
}  # fmt: skip
