"""Small random models in transformers and here, prompts, and what transformers generates from them."""

from functools import lru_cache

import numpy as np
import torch
import transformers

from bmjax.generate.engine import Engine
from bmjax.generate.requests import Request
from bmjax.model.config import ModelConfig
from tests.model.reference import BASE, CONFIGS, from_state


@lru_cache
def build(name: str, length: int = 128, **changes):
    """(transformers model, config, parameters) of 2 layers; where CONFIGS has windows, on the second."""
    torch.manual_seed(0)
    values = BASE | CONFIGS[name] | {"max_position_embeddings": length, "num_hidden_layers": 2, "max_window_layers": 1}
    values |= changes
    hf = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values, attn_implementation="eager")).eval()
    config = ModelConfig.from_hf(hf.config.to_dict())
    return hf, config, from_state(config, {k: v.detach().numpy() for k, v in hf.state_dict().items()})


def random_prompts(config: ModelConfig, lengths, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(2, config.vocab_size, n).tolist() for n in lengths]


def reference(hf, prompts, new: int, **options) -> tuple[list[list[int]], np.ndarray]:
    """transformers' continuations, padded on the left, and all log-probabilities [B, new, V] before its processors."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    out = hf.generate(
        ids, attention_mask=mask, max_new_tokens=new, return_dict_in_generate=True, output_logits=True, **options
    )
    logprobs = torch.stack(out.logits, dim=1).log_softmax(-1).numpy()
    return out.sequences[:, longest:].tolist(), logprobs


class Listener:
    """Collects what the engine tells of a request."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.tokens, self.calls = [], []
        self.running = engine.submit(request, self)

    def __call__(self, tokens, reason) -> None:
        assert not self.calls or self.calls[-1] is None, "told something after its end"
        self.tokens += tokens
        self.calls.append(reason)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def reason(self):
        assert self.calls[-1] == self.running.finish_reason
        return self.calls[-1]


def run(engine: Engine, requests) -> list[Listener]:
    listeners = [Listener(engine, request) for request in requests]
    engine.run()
    return listeners
