"""What a layer keeps for its backward pass, and what is computed again (arXiv 1604.06174).

Every policy keeps a layer's input, and besides:
- full: nothing. One activation a layer; every product of the forward pass is computed twice.
- save_attention: the results of attention, so that its kernels do not run again. For long rows.
- minimal: these and every product with a weight; only elementwise operations are computed again.
- offload: as full, but the inputs wait in the host's memory.
- none: everything.
"""

from typing import Any

import flax.linen as nn
import jax

from bmjax.model.attention.options import Remat

ATTENTION = "attention"  # outputs and log-sums of attention kernels
LAYER_INPUT = "layer_input"


_policies = jax.checkpoint_policies
_attention = _policies.save_from_both_policies(
    _policies.save_only_these_names(ATTENTION),
    # cuDNN's kernel names no result: it is told by its primitive.
    lambda primitive, *_, **__: primitive.name == "dot_product_attention_fwd_wrapper",
)
_POLICIES: dict[str, Any] = {
    "full": None,
    "save_attention": _attention,
    "minimal": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _attention),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def remat(layer: type[nn.Module], policy: Remat) -> type[nn.Module]:
    return layer if policy == "none" else nn.remat(layer, prevent_cse=False, policy=_POLICIES[policy])
