"""config.json of a Hugging Face directory, read into the sizes that the architecture needs; sizes of published models.

Nothing else reads model hyperparameters out of config.json. A new architecture gets its model_type in ARCHITECTURES
here, its rows in spec.py and, where it computes differently, its modules in qwen2.py.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bmjax.config import UserError, read_text

MAX_CONFIG_CHARACTERS = 2**24  # the largest, with a label for each of 20,000 classes, have a million
# model_type -> the architecture's class in transformers, which config.json names under `architectures`.
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM"}
_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Rope:
    """Rotary position settings. `kind` is 'default', 'linear' or 'yarn' (arXiv 2309.00071)."""

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_length: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """What the architecture needs of a Hugging Face `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_length: int  # tokens of the context
    norm_eps: float = 1e-6
    tied: bool = False  # the embedding's transpose is the head
    rope: Rope = Rope()
    windows: tuple[int | None, ...] = ()  # every layer's, in tokens, None for full attention; empty: no layer has one
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    model_type: str = "qwen2"

    def __post_init__(self) -> None:
        if len(self.windows) not in (0, self.num_layers):
            raise UserError(f"{len(self.windows)} layer types for {self.num_layers} layers")
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")

    @property
    def uses_windows(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(window is not None for window in self.windows)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], source: str = "config.json") -> "ModelConfig":
        """Read a config.json (transformers 4 and 5 spellings); a UserError begins with `source`."""
        try:
            model_type = config.get("model_type")
            if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
                expected = " or ".join(f"'{name}'" for name in ARCHITECTURES)
                raise UserError(f"model_type is {model_type!r}, expected {expected} (Qwen2, Qwen2.5, R1-Distill-Qwen)")
            for key in _COUNTS:
                value = config.get(key)
                if value is not None and (type(value) is not int or value < 1):
                    raise UserError(f"{key} is {value!r}, expected a whole number of at least 1")
            if config.get("hidden_act", "silu") != "silu":
                raise UserError(f"hidden_act is {config['hidden_act']!r}, expected 'silu'")
            heads, layers = int(config["num_attention_heads"]), int(config["num_hidden_layers"])
            hidden, rope = int(config["hidden_size"]), _rope(config)
            ends = config.get("eos_token_id")
            return cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                max_length=context_length(config) or 32_768,
                norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                tied=bool(config.get("tie_word_embeddings", False)),
                rope=rope,
                windows=_windows(config, layers),
                initializer_range=float(config.get("initializer_range", 0.02)),
                eos_token_ids=() if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),),
                pad_token_id=config.get("pad_token_id"),
                model_type=model_type,
            )
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        except KeyError as error:
            raise UserError(f"{source}: key {error} is missing") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: a value has the wrong type: {error}") from None

    @classmethod
    def from_dir(cls, directory: str | Path) -> "ModelConfig":
        """Read DIR/config.json."""
        return cls.from_hf(read_hf_config(directory), str(Path(directory) / "config.json"))


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Return DIR/config.json as a dictionary; a UserError when it is missing or is not a JSON object."""
    path = Path(directory) / "config.json"
    try:
        config = json.loads(read_text(path, MAX_CONFIG_CHARACTERS))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}: not valid JSON: {reason}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model reads at most, by the content of its config.json; None where it does not say."""
    stated = config.get("max_position_embeddings")
    longest = stated if type(stated) is int and stated > 0 else 0
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope |= block if isinstance(block := config.get(key), Mapping) else {}
    if rope.get("rope_type", rope.get("type")) == "yarn":
        # YaRN configs of Qwen2.5 leave max_position_embeddings at the length before scaling.
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            longest = max(longest, int(rope["factor"] * (rope.get("original_max_position_embeddings") or longest)))
    return longest or None


def _rope(config: Mapping[str, Any]) -> Rope:
    # transformers 5 writes `rope_parameters`, 4 wrote `rope_theta` and `rope_scaling`.
    values: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = values.get("rope_type", values.get("type")) or "default"
    theta = float(values.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    if kind == "default":
        return Rope(theta=theta)
    if kind not in ("yarn", "linear"):
        raise UserError(f"rope type {kind!r} is not supported; 'default', 'linear' and 'yarn' are")
    original = values.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    options: dict[str, Any] = {key: values.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim")}
    options |= {key: float(values[key]) for key in ("beta_fast", "beta_slow") if values.get(key)}
    options["truncate"] = bool(values.get("truncate", True))
    return Rope(theta, kind, float(values["factor"]), int(original) if original else None, **options)


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window", 4096)  # transformers' default
    kinds = config.get("layer_types")
    if not config.get("use_sliding_window", False) or window is None:
        return ()
    if kinds is None:
        first = int(config.get("max_window_layers", 28))
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    unknown = [repr(kind) for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown or len(kinds) != layers:
        problem = unknown[0] if unknown else f"{len(kinds)} entries for {layers} layers"
        raise UserError(f"layer_types has {problem}; expected sliding_attention or full_attention a layer")
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


# Published models, so that `bmjax plan` needs no file of theirs: billions of parameters -> vocabulary, hidden,
# intermediate, layers, heads, key/value heads, head size.
_SIZES = {
    "0.5": (151_936, 896, 4864, 24, 14, 2, 64),
    "1.5": (151_936, 1536, 8960, 28, 12, 2, 128),
    "3": (151_936, 2048, 11_008, 36, 16, 2, 128),
    "7": (152_064, 3584, 18_944, 28, 28, 4, 128),
    "14": (152_064, 5120, 13_824, 48, 40, 8, 128),
    "32": (152_064, 5120, 27_648, 64, 40, 8, 128),
    "72": (152_064, 8192, 29_568, 80, 64, 8, 128),
}
_TIED = ("0.5", "1.5", "3")  # but not the distilled 1.5B, which was made from Qwen2.5-Math
_SHORT = ("0.5", "3")  # context of 32,768 tokens, as of all -Instruct; the other bases have 131,072
_DISTILLED = ("1.5", "7", "14", "32")
_NAME = re.compile(r"(?:(?:deepseek-ai/)?(DeepSeek-R1-Distill-Qwen)-|(?:Qwen/)?Qwen2\.5-)([\d.]+)B(-Instruct)?")


def known(name: str) -> ModelConfig | None:
    """Return the config of DeepSeek-R1-Distill-Qwen-*B or Qwen2.5-*B(-Instruct) by hub id; None for other names."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in (_DISTILLED if match[1] else _SIZES):
        return None
    size, distilled = match[2], bool(match[1])
    return ModelConfig(
        *_SIZES[size],
        max_length=32_768 if match[3] or size in _SHORT else 131_072,
        tied=size in _TIED and not distilled,
        rope=Rope(theta=10_000.0 if distilled and size in ("1.5", "7") else 1_000_000.0),
    )
