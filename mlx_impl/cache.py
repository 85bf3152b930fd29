"""Key/value caches of the decoder: one that grows, and one that keeps a fixed number of tokens.

Keys are cached after rotation, so their order in memory does not matter to attention; the rotating cache uses that
and overwrites its oldest row in place. Both share one small interface: `offset`, `mask(T)`, `update(k, v)`. What a
model has read of one prompt is kept for the next by `PromptCache`, in memory or in a file.
Letters: B batch, K key/value heads, T new tokens, S cached tokens, d head width.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_impl.errors import DamagedFileError, InputError
from mlx_impl.files import atomic_file
from mlx_impl.modeldir import validate_safetensors

STEP = 256
"""Rows by which a cache grows: one shape for 256 steps instead of a new one for each."""

FORMAT = "minimac-mlx prompt cache 1"

Mask = mx.array | str | None


class KVCache:
    """Keeps every token. Memory: 2 * K * d * 4 bytes a token and layer in fp32."""

    def __init__(self) -> None:
        self.offset = self._reserved = 0
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    @classmethod
    def holding(cls, keys: mx.array, values: mx.array) -> "KVCache":
        """A cache that holds these keys and values (B, K, S, d) already."""
        cache = cls()
        cache._keys, cache._values, cache.offset = keys, values, keys.shape[2]
        return cache

    def mask(self, length: int) -> Mask:
        """What `length` new tokens may attend to: all cached ones and, among themselves, none ahead."""
        return None if length == 1 else "causal"

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, K, T, d); returns all of them (B, K, S, d)."""
        end = self.offset + keys.shape[2]
        self._keys = self._room(self._keys, keys, end)
        self._values = self._room(self._values, values, end)
        self._keys[:, :, self.offset : end] = keys
        self._values[:, :, self.offset : end] = values
        self.offset = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    @property
    def state(self) -> tuple[mx.array, ...]:
        """The arrays that it keeps, rows in reserve included; none before the first token."""
        return () if self._keys is None or self._values is None else (self._keys, self._values)

    def reserve(self, rows: int) -> None:
        """Make room for so many tokens at once when it grows next; it grows by `STEP` otherwise."""
        self._reserved = rows

    def is_trimmable(self) -> bool:
        """Whether the latest tokens can be forgotten again."""
        return True

    def trim(self, count: int) -> int:
        """Forget the latest `count` tokens; their rows will be written over. Returns the count (as mlx-lm's do)."""
        self.offset -= count
        return count

    def _room(self, store: mx.array | None, new: mx.array, end: int) -> mx.array:
        """A store with at least `end` rows whose first `offset` rows are the old store's."""
        if store is not None and end <= store.shape[2]:
            return store
        batch, heads, _, width = new.shape
        rows = -(-max(end, self._reserved) // STEP) * STEP
        fresh = mx.zeros((batch, heads, rows - self.offset, width), new.dtype)
        return fresh if store is None else mx.concatenate([store[:, :, : self.offset], fresh], axis=2)


class RotatingKVCache(KVCache):
    """Keeps the first `keep` tokens and the latest `window - keep`; memory is bounded, so is the attention's reach.

    The first tokens stay because attention without them collapses (Xiao et al. 2023, "attention sinks").
    A token at position i sees position j <= i if j < keep or j > i - (window - keep).
    """

    def __init__(self, window: int, keep: int = 4) -> None:
        if window <= keep:
            raise InputError(
                f"window = {window} must be larger than keep = {keep}, the first tokens, which always stay; "
                f"--window {keep + 1} is the least"
            )
        super().__init__()
        self.window, self.keep = window, keep
        self._oldest = keep  # row that the next single token overwrites, once the window is full

    def reserve(self, rows: int) -> None:
        """As the growing cache's, within the window."""
        super().reserve(min(rows, self.window))

    def is_trimmable(self) -> bool:
        """Only while no token has been pushed out."""
        return self.offset <= self.window

    def mask(self, length: int) -> Mask:
        """None for one new token: whatever is still cached may be seen. Else a mask (T, S), or "causal"."""
        if length == 1:
            return None
        if self.offset + length <= self.window:
            return "causal"
        held = self._held(self.offset)
        columns = mx.concatenate([mx.array(held, mx.int32), mx.arange(self.offset, self.offset + length)])
        rows = mx.arange(self.offset, self.offset + length)[:, None]  # (T, 1)
        return visible(rows, columns[None], self.window, self.keep)  # (T, S)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add keys and values (B, K, T, d); returns those the new tokens may see, in any order."""
        length = keys.shape[2]
        if length == 1 and self.offset >= self.window:
            return self._overwrite(keys, values)
        end = self.offset + length
        if end <= self.window:
            return super().update(keys, values)
        held = min(self.offset, self.window)
        if self._keys is not None and self._values is not None:
            keys = mx.concatenate([self._in_order(self._keys[:, :, :held]), keys], axis=2)
            values = mx.concatenate([self._in_order(self._values[:, :, :held]), values], axis=2)
        self._keys, self._values = self._trim(keys), self._trim(values)
        self.offset, self._oldest = end, self.keep
        return keys, values

    def _held(self, offset: int) -> list[int]:
        """Positions in the cache, in order, when `offset` tokens have been seen."""
        if offset <= self.window:
            return list(range(offset))
        return [*range(self.keep), *range(offset - self.window + self.keep, offset)]

    def _overwrite(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        assert self._keys is not None
        assert self._values is not None
        if self._keys.shape[2] > self.window:  # grown in steps that need not divide the window
            self._keys, self._values = self._keys[:, :, : self.window], self._values[:, :, : self.window]
        self._keys[:, :, self._oldest : self._oldest + 1] = keys
        self._values[:, :, self._oldest : self._oldest + 1] = values
        self.offset += 1
        self._oldest = self._oldest + 1 if self._oldest + 1 < self.window else self.keep
        return self._keys, self._values

    def _in_order(self, rows: mx.array) -> mx.array:
        """Undo the rotation: rows (B, K, S, d) from the oldest token to the newest."""
        if self._oldest == self.keep:
            return rows
        parts = [rows[:, :, : self.keep], rows[:, :, self._oldest :], rows[:, :, self.keep : self._oldest]]
        return mx.concatenate(parts, axis=2)

    def _trim(self, rows: mx.array) -> mx.array:
        """Of rows (B, K, S, d) in order, those that stay."""
        latest = rows.shape[2] - (self.window - self.keep)
        return mx.concatenate([rows[:, :, : self.keep], rows[:, :, latest:]], axis=2)


Cache = KVCache
"""Either of the two."""


def visible(rows: mx.array, columns: mx.array, window: int, keep: int) -> mx.array:
    """Boolean mask of the rotating cache: may the query at position `rows` see the key at position `columns`?"""
    return (columns <= rows) & ((columns < keep) | (columns > rows - (window - keep)))


class PromptCache:
    """Keys and values of a text that a model has read, for a prompt that begins likewise.

    `owner` says which weights read it: of other weights they are of no use.
    """

    def __init__(self) -> None:
        self.owner = ""
        self.ids: list[int] = []
        self.layers: Sequence[Any] = ()

    def take(self, ids: Sequence[int], owner: str) -> Sequence[Any] | None:
        """The layers' caches, cut back to what `ids` have in common with the text; None where they are of no use.

        They are the caller's from now on, and nothing is kept until `put`: a reader who is interrupted leaves layers
        at different tokens. The last of `ids` is never among what they hold, for it is read for its logits.
        """
        layers, known = self.layers, self.ids
        self.layers, self.ids = (), []
        if not ids or not layers or self.owner != owner or not all(layer.is_trimmable() for layer in layers):
            return None
        pairs = enumerate(zip(known, ids, strict=False))
        same = next((n for n, (a, b) in pairs if a != b), min(len(known), len(ids)))
        same = min(same, len(ids) - 1, layers[0].offset)
        for layer in layers:
            layer.trim(layer.offset - same)
        return layers

    def put(self, ids: Sequence[int], owner: str, layers: Sequence[Any]) -> None:
        """Keep what was read; `ids` may be longer than what the caches hold, which their offset says."""
        self.ids, self.owner, self.layers = list(ids), owner, layers

    def save(self, path: Path) -> None:
        """Write it as a safetensors file, or nothing. InputError for what `check` refuses."""
        self.check(path, self.layers)
        held = self.layers[0].offset
        arrays = {
            f"{number}.{name}": mx.contiguous(array[:, :, :held])
            for number, layer in enumerate(self.layers)
            for name, array in zip(("keys", "values"), layer.state, strict=True)
        }
        metadata = {"format": FORMAT, "owner": self.owner, "ids": json.dumps(self.ids[:held])}
        with atomic_file(path) as temporary, open(temporary, "wb") as file:
            mx.save_safetensors(file, arrays, metadata)

    @staticmethod
    def check(path: Path, layers: Sequence[Any]) -> None:
        """InputError for caches that are not a `KVCache` each, and for a path in no folder."""
        if not layers or any(type(layer) is not KVCache for layer in layers):
            raise InputError("only the cache of a Llama model without a window can be written to a file")
        if not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent} to write the prompt cache into")

    @classmethod
    def load(cls, path: Path, config: Any) -> "PromptCache":
        """What `save` wrote, of a model of this configuration. DamagedFileError for any other file."""
        shapes = {name: info.shape for name, info in validate_safetensors(path).items()}
        loaded: Any = mx.load(str(path), "safetensors", return_metadata=True)
        arrays, metadata = loaded
        cache, layers = cls(), len(shapes) // 2
        try:
            if metadata["format"] != FORMAT:
                raise ValueError(metadata["format"])
            cache.owner, cache.ids = metadata["owner"], [int(id) for id in json.loads(metadata["ids"])]
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
            raise DamagedFileError(f"{path}: not a prompt cache of this program ({FORMAT})") from None
        named = {f"{number}.{name}" for number in range(layers) for name in ("keys", "values")}
        shape = (1, config.num_kv_heads, len(cache.ids), config.head_dim)
        if set(shapes) != named or set(shapes.values()) != {shape}:
            raise DamagedFileError(f"{path}: its {len(shapes)} arrays do not hold {len(cache.ids)} tokens each")
        if layers != config.num_layers:
            raise DamagedFileError(f"{path}: of {layers} layers, the model has {config.num_layers}")
        cache.layers = [KVCache.holding(arrays[f"{n}.keys"], arrays[f"{n}.values"]) for n in range(layers)]
        return cache
