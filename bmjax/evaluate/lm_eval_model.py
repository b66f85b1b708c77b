"""lm-eval's model class for bmjax: `--model bmjax --model_args pretrained=DIR`.

lm-eval 0.4.13 finds models in its own registry alone, so `bmjax-lm-eval`, which takes lm-eval's arguments, registers
the class and runs lm-eval. From Python: import this module, then `lm_eval.simple_evaluate(model="bmjax", ...)`.
"""

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from bmjax.config import UserError
from bmjax.evaluate.likelihood import continue_texts, loglikelihoods
from bmjax.generate.load import load_engine, open_model
from bmjax.generate.requests import Sampling
from bmjax.generate.settings import EngineSettings
from bmjax.log import write_line

# Of lm-eval's generation arguments, those that the engine has under the same name.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@register_model("bmjax")
class BmjaxLM(TemplateLM):
    """A model that bmjax's engine computes.

    Arguments:
        pretrained: Hugging Face directory or hub id.
        dtype: of weights and activations, 'float32' or 'bfloat16'.
        max_length: tokens that are read at most; None: the model's context.
        max_gen_toks: longest answer of tasks that do not say.
        batch_size: rows that are computed at once; results do not depend on it in float32.
        seed: of tasks that sample.
        template: of chats: None for the tokenizer's own, a name of bmjax/chat/templates, or FILE.jinja.
        mesh: devices along data, fsdp, context, tensor: '{"pretrained": DIR, "mesh": {"data": 8}}'.
        max_batch_size, device: lm-eval gives them to every model; they have no effect here.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str = "float32",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 64,
        seed: int = 0,
        template: str | None = None,
        mesh: dict[str, int] | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        values = {"compute_dtype": dtype, "context": max_length, "template": template, "mesh": mesh or {}}
        settings = EngineSettings.read(values)
        self._student = open_model(pretrained, template)
        self.tokenizer = self._student.tokenizer
        slots = int(batch_size) if str(batch_size).isdecimal() else 64
        self._engine = load_engine(self._student, settings, max(slots, 1), write_line)
        self.max_gen_toks, self._seed = max_gen_toks, seed

    @property
    def max_length(self) -> int:
        """Tokens that are read at most."""
        return self._engine.context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, and stands before one without a context."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the tokenizer's first, else its last."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """The model's directory, by which lm-eval tells caches of requests apart."""
        return str(self._student.directory).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text as it stands; bmjax adds no token of its own."""
        return self.tokenizer(string, add_special_tokens=False)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a chat; without a generation prompt its last turn stays open."""
        if self._student.template is None:
            raise UserError(f"{self._student.directory}: no chat template; give template=chatml or FILE.jinja")
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, chat_template=self._student.template,
            add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(before, after) for _, before, after in requests]
        scores, cut = loglikelihoods(self._engine, pairs, self.max_length)
        if cut:
            write_line(f"bmjax: note: {cut} of {len(pairs)} contexts were longer than {self.max_length} tokens and cut")
        results = [(score.logprob, score.is_greedy) for score in scores]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, each token of which is predicted once."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 1,
                context_len=1,
            )  # fmt: skip
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue every context up to one of its stop strings."""
        prompts, cut = [], 0
        end = self.tokenizer.decode([self.eot_token_id])
        for request in requests:
            context, asked = request.args
            fields = normalize_gen_kwargs(asked, self.max_gen_toks)
            room = int(fields["max_gen_toks"])
            if room >= self.max_length:
                raise UserError(f"max_gen_toks: {room} tokens, the model reads {self.max_length} with the prompt")
            stop = [text for text in handle_stop_sequences(fields.get("until"), eos=end) if text]
            sampling = Sampling(
                max_new_tokens=room,
                seed=self._seed,
                **{name: fields[name] for name in SAMPLING if fields.get(name) is not None},
            )
            tokens = self.tok_encode(context)
            cut += len(tokens) > self.max_length - room
            prompts.append((tokens[-(self.max_length - room) :], sampling, stop))
        if cut:
            write_line(f"bmjax: note: {cut} of {len(prompts)} prompts left no room for their answers and were cut")
        texts = continue_texts(self._engine, self.tokenizer, prompts)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts
