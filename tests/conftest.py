"""Every test runs on 8 fake CPU devices; the flags must be set before jax starts.

The compiler's optimizations are off, for compiling is most of the tests' time and takes half of it without them;
JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests what users run.
"""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.emulators import buckets, emulator_environment  # noqa: F401 - fixtures

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8 --xla_gpu_autotune_level=0"  # trying products out takes longer than them
)
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the workers of a run and the processes of its tests share one
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bmjax-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads spin for each other: 50 times the time on busy cores

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(autouse=True, scope="module")
def optimized(request):
    """Parity is shown of what users run: the model, the merge methods, and files, copied byte for byte.

    (Without its optimizations XLA on a CPU takes bfloat16 NaNs through float32.)
    """
    if not {"weights", "model", "methods"} & set(request.path.parts):
        yield
        return
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep tokenized data out of the user's cache directory."""
    os.environ["BMJAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def write_rows(path: Path, rows) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int, seed: int = 0):
    """Records of additions, of different lengths, half of them with reasoning."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        terms = rng.integers(1, 99, rng.integers(2, 6)).tolist()
        text = " + ".join(map(str, terms))
        row = {"prompt": f"What is {text}?", "response": f"{text} = {sum(terms)}", "reference": str(sum(terms))}
        if number % 2:
            row["reasoning"] = "Add them one by one. " + " then ".join(
                str(sum(terms[: i + 1])) for i in range(len(terms))
            )
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def train_file(tmp_path_factory) -> Path:
    """20 records, 5 steps an epoch at batch 4 without packing."""
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", sums(20))


def byte_tokenizer():
    """A byte-level tokenizer with 300 tokens: some merges, Qwen2's and DeepSeek's marks, the template chatml."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from bmjax.chat.template import TEMPLATES

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(
        (row["prompt"] + row["response"] + row.get("reasoning", "") for row in sums(20)), trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip
    tokenizer.chat_template = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8").rstrip("\n")
    return tokenizer


def write_student(
    directory: Path, seed: int = 0, dtype: str = "float32", scale: float = 0.05, tokenizer=None, **changes
) -> Path:
    """A random Qwen2 with 2 layers, D 32, V 300 and context 256 as a Hugging Face directory, with `byte_tokenizer`."""
    from bmjax.model import qwen2
    from bmjax.model.config import ModelConfig
    from bmjax.weights.hf import save_hf

    hf_config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 300, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "initializer_range": scale, "use_sliding_window": False,
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
    } | changes  # fmt: skip
    params = qwen2.init(ModelConfig.from_hf(hf_config), seed)
    save_hf(directory, params, hf_config, tokenizer=tokenizer or byte_tokenizer(), dtype=dtype)
    return directory


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    """The model directory of `write_student`, float32."""
    return write_student(tmp_path_factory.mktemp("models") / "student")


@pytest.fixture(scope="session")
def tokenizer(student):
    from bmjax.weights.tokenizer import load_tokenizer

    return load_tokenizer(student)


@pytest.fixture(scope="session")
def qwen2_tokenizer():
    """The real Qwen2 tokenizer; tests that need it are skipped where it isn't."""
    directory = SHARED / "data" / "qwen2_tokenizer"
    if not directory.is_dir():
        pytest.skip(f"{directory} is not here")
    from bmjax.weights.tokenizer import load_tokenizer

    return load_tokenizer(directory)
