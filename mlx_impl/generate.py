"""Text from a model: the naive decoder, which is the oracle, and the cached one, which is used.

The cached one runs the model's fast twin (see `decoder.opened`) and stays a step ahead of whoever reads its tokens:
penalty, filters and the draw are part of the step, so that nothing waits for the host. Both draw from the same
`Sampling` with the same keys, so that they give the same tokens. Ids beyond the tokenizer are never sampled: a model
may have more rows than its tokenizer has tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_impl.base import BaseModel
from mlx_impl.cache import KVCache
from mlx_impl.decoder import opened
from mlx_impl.errors import InputError
from mlx_impl.tokenizer import Tokenizer

PREFILL = 512
"""Prompt tokens a forward pass: bounds the memory of attention scores and of logits."""

GREEDY = 1e-6
"""Temperatures below are as good as 0, and logits divided by them soon beyond float32."""

ROOM = 1024
"""New tokens that room is made for beforehand, of however many are allowed: most texts end before that."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy, and the rest is then without effect but the penalty."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            f"{name} = {value} must lie in {allowed}"
            for name, value, allowed, fine in (
                ("temperature", self.temperature, "[0, 100]", 0 <= self.temperature <= 100),
                ("top_k", self.top_k, "0 (off) and up", self.top_k >= 0),
                ("top_p", self.top_p, "(0, 1]", 0 < self.top_p <= 1),
                ("min_p", self.min_p, "[0, 1]", 0 <= self.min_p <= 1),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    "[0.01, 100]",
                    0.01 <= self.repetition_penalty <= 100,
                ),
                ("seed", self.seed, "[0, 2**32)", 0 <= self.seed < 2**32),
            )
            if not fine
        ]
        if wrong:
            raise InputError("; ".join(wrong))


def penalized(logits: mx.array, seen: Sequence[int], penalty: float) -> mx.array:
    """Logits (V,) with those of tokens already there made less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    return logits if penalty == 1.0 else _weaker(logits, _marked(seen, logits.size), penalty)


def _marked(seen: Sequence[int], size: int) -> mx.array:
    """(V,): which tokens are in `seen`; ids beyond `size` are left out, for MLX writes wherever an index points."""
    marks = mx.zeros(size, mx.bool_)
    ids = sorted({token for token in seen if token < size})
    if ids:
        marks[mx.array(ids)] = True
    return marks


def _weaker(logits: mx.array, marks: mx.array, penalty: float) -> mx.array:
    """Logits (V,) with the marked ones moved down."""
    return mx.where(marks, mx.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: mx.array, sampling: Sampling) -> mx.array:
    """Log-probabilities (V,) at the temperature; what top-k, top-p and min-p exclude is -inf.

    Filters follow one another as in transformers: what top-k leaves is renormalised before top-p looks at it, and a
    token must pass all of them. The likeliest token always passes. top-p keeps the smallest set of at least that mass
    (Holtzman et al. 2020), min-p what has at least that share of the likeliest one's probability.
    """
    logp = logits.astype(mx.float32) / sampling.temperature
    logp = logp - mx.logsumexp(logp)
    if 0 < sampling.top_k < logp.size:
        least = mx.sort(logp)[-sampling.top_k]
        logp = mx.where(logp < least, -mx.inf, logp)
        logp = logp - mx.logsumexp(logp)
    if sampling.top_p < 1:
        order = mx.argsort(-logp)
        mass = mx.cumsum(mx.exp(logp[order]))
        before = mass - mx.exp(logp[order])  # mass of the likelier ones
        keep = mx.zeros(logp.shape, mx.bool_)
        keep[order] = before < sampling.top_p
        keep[order[0]] = True
        logp = mx.where(keep, logp, -mx.inf)
    if sampling.min_p > 0:
        logp = mx.where(logp < logp.max() + mx.log(mx.array(sampling.min_p)), -mx.inf, logp)
    return logp


def sample(logits: mx.array, sampling: Sampling, seen: Sequence[int], position: int) -> mx.array:
    """The next token, a scalar, from logits (V,).

    The random key is a function of seed and position, so that any decoder draws alike.
    """
    return _drawn(penalized(logits, seen, sampling.repetition_penalty), sampling, position)


def _drawn(logits: mx.array, sampling: Sampling, position: int) -> mx.array:
    """The next token, a scalar, from logits (V,) to which the penalty was done already."""
    if sampling.temperature < GREEDY:
        return mx.argmax(logits)
    key = mx.random.key((sampling.seed << 32) + position)
    return mx.random.categorical(filtered(logits, sampling), key=key)


def naive(
    model: BaseModel,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """The slow, obvious decoder: the whole text again for each token. Endless but for max_tokens."""
    seen = list(prompt)
    for _ in range(max_tokens):
        logits = model(mx.array([seen]))[0, -1, :vocab_size]  # (V,)
        token = int(sample(logits, sampling, seen, len(seen)))
        seen.append(token)
        yield token


def decode(
    model: BaseModel,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    vocab_size: int | None = None,
    window: int | None = None,
    cache: Sequence[Any] | None = None,
) -> Iterator[int]:
    """The decoder with a cache: the prompt in chunks, then a token a step. Same tokens as `naive`.

    `window` bounds the cache to that many tokens (see RotatingKVCache). A `cache` that is given holds a beginning of
    the prompt already, all but its last token at most. The next step is enqueued before the last token is read.
    """
    if max_tokens < 1:
        return
    network = opened(model)
    held = cache[0].offset if cache is not None else 0
    cache = model.make_cache(window) if cache is None else cache
    for layer in cache:
        if isinstance(layer, KVCache):
            layer.reserve(len(prompt) + min(max_tokens, ROOM))
    for start in range(held, len(prompt) - 1, PREFILL):
        network.hidden(mx.array([prompt[start : min(start + PREFILL, len(prompt) - 1)]]), cache)
        mx.eval([layer.state for layer in cache])  # and not the last layer's states, which nobody reads
    penalty = sampling.repetition_penalty
    marks: mx.array | None = None

    def step(token: mx.array, position: int) -> mx.array:
        nonlocal marks
        logits = network(token.reshape(1, 1), cache)[0, -1, :vocab_size]
        if penalty != 1.0:
            marks = _marked(prompt, logits.size) if marks is None else marks | (mx.arange(logits.size) == token)
            logits = _weaker(logits, marks, penalty)
        return _drawn(logits, sampling, position)

    token = step(mx.array(prompt[-1]), len(prompt))
    mx.async_eval(token)
    for produced in range(1, max_tokens + 1):
        if produced < max_tokens:
            following = step(token, len(prompt) + produced)
            mx.async_eval(following)
        yield int(token)
        if produced < max_tokens:
            token = following


def sampled_rows(
    model: BaseModel, start: int, rows: int, tokens: int, key: mx.array, vocab_size: int | None = None
) -> list[list[int]]:
    """`rows` texts of `tokens` tokens that follow the token `start`, drawn at temperature 1, side by side."""
    cache = model.make_cache()
    last, drawn = mx.full((rows,), start, mx.int32), []
    for step_key in mx.random.split(key, tokens):
        logits = model(last[:, None], cache)[:, -1, :vocab_size]  # (rows, V)
        last = mx.random.categorical(logits.astype(mx.float32), key=step_key)
        mx.async_eval(last)
        drawn.append(last)
    columns: list[list[int]] = mx.stack(drawn, axis=1).tolist()  # type: ignore[assignment]
    return columns


@dataclass
class Completion:
    """A finished text and how it came about."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish: str = "length"  # or "stop": an end token or a stop string
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first new one."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first, over the time they took."""
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 and self.seconds else 0.0


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a plain text to be continued, after BOS where the tokenizer adds it, as the model's own texts were."""
    begin = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return begin + tokenizer.encode(prompt)


def complete(
    model: BaseModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    max_tokens: int = 100,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    window: int | None = None,
    on_text: Callable[[str], None] = lambda text: None,
    cache: Sequence[Any] | None = None,
) -> Completion:
    """Continue a prompt (text, or ids such as a chat's) until an end token, a stop string or `max_tokens`.

    A text becomes `prompt_ids`, ids are taken as they are. `cache` may hold a beginning of them (see `decode`);
    afterwards its offset says how many tokens of prompt and answer it holds.
    `on_text` receives the text as it becomes certain: whole characters, nothing of a stop string. Raises
    InputError for an empty prompt where the tokenizer has no token to start from, and for a tokenizer that has
    more ids than the model has rows.
    """
    tokenizer.check_fits(model.vocab_size)
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        if start is None:
            raise InputError("the prompt is empty and the tokenizer has no token to start from")
        ids = [start]
    wrong = sorted({id for id in ids if not 0 <= id < model.vocab_size})  # MLX would read past the table's end
    if wrong:
        raise InputError(f"prompt ids {wrong[:5]} are outside the model's 0 to {model.vocab_size - 1}")
    positions = getattr(model, "positions", None)  # of a foreign network that learned them, and has no others
    if positions is not None:
        if len(ids) >= positions:
            raise InputError(
                f"the prompt has {len(ids):,} tokens, and the model can read {positions - 1:,}; shorten it"
            )
        max_tokens = min(max_tokens, positions - len(ids))
    if any(not text for text in stop):
        raise InputError("a stop string must not be empty")
    result = Completion(prompt_tokens=len(ids))
    text = _Text(tokenizer, stop, on_text)
    started = time.perf_counter()
    for token in decode(model, ids, max_tokens, sampling or Sampling(), tokenizer.vocab_size, window, cache):
        if not result.tokens:
            result.prompt_seconds = time.perf_counter() - started
            started = time.perf_counter()
        result.tokens.append(token)
        if token in tokenizer.eos_ids or text.add(token):
            result.finish = "stop"
            break
    result.seconds = time.perf_counter() - started
    result.text = text.finish()
    return result


class _Text:
    """Text under way: holds back what could still become a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.stream = tokenizer.stream()
        self.stop = list(stop)
        self.stopped = False
        self.on_text = on_text
        self.held = ""
        self.sent: list[str] = []

    def add(self, token: int) -> bool:
        """Take a token; True if a stop string is complete."""
        return self._take(self.stream.add(token), last=False)

    def finish(self) -> str:
        """Send what is held back; returns the whole text."""
        if not self.stopped:
            self._take(self.stream.finish(), last=True)
        return "".join(self.sent)

    def _take(self, text: str, last: bool) -> bool:
        self.held += text
        found = min((at for at in (self.held.find(s) for s in self.stop) if at >= 0), default=-1)
        if found >= 0:
            self._send(self.held[:found])
            self.held, self.stopped = "", True
            return True
        keep = 0 if last else max((_overlap(self.held, s) for s in self.stop), default=0)
        self._send(self.held[: len(self.held) - keep])
        self.held = self.held[len(self.held) - keep :]
        return False

    def _send(self, text: str) -> None:
        if text:
            self.sent.append(text)
            self.on_text(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
