"""The demo's config: the student that it makes is one that other engines serve."""

from bmjax.config import read_yaml
from bmjax.demo.run import CONFIG

# Head sizes that vLLM 0.32 has kernels for on CPUs and on AMD's GPUs. On NVIDIA's, FlashAttention takes multiples of 8
# up to 256, and Triton takes 32 and more.
VLLM_CPU = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}
VLLM_ROCM = {32, 64, 80, 96, 128, 160, 192, 224, 256}


def test_the_students_heads_have_a_size_that_vllm_serves_everywhere():
    model = read_yaml(CONFIG)["model"]
    size, rest = divmod(model["hidden_size"], model["num_heads"])
    assert rest == 0 and size in VLLM_CPU & VLLM_ROCM
    assert model["num_heads"] % model["num_kv_heads"] == 0
