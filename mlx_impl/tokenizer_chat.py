"""Render a tokenizer's chat template, and keep what users write from posing as special tokens.

A template is code from outside: it runs in jinja2's immutable sandbox with what transformers offers, no more.
Unusual: where a message contains the text of a special token, that text is rendered as a stand-in (a
private-use character found nowhere else) and put back afterwards as plain text. Everything else in a message
stays as it is, so that templates which trim, split or test contents do what they do in transformers.
"""

import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_impl.errors import InputError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    named: Mapping[str, str],
) -> str:
    """The text of a conversation; `named` holds bos_token and the like for the template.

    Raises InputError for a template that does not compile, and for messages that it refuses.
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **named,
            )
        )
    except Exception as error:  # a template can raise anything that Python can
        raise InputError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from None


def stand_ins(
    messages: Sequence[Mapping[str, Any]], specials: Iterable[str], template: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Messages without any text of a special token, and what each stand-in in them stands for."""
    spelled = re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")
    taken = set(template).union(*_strings(messages))
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in taken)
    by_special: dict[str, str] = {}

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return spelled.sub(lambda found: by_special.setdefault(found[0], next(free)), value)
        if isinstance(value, Mapping):
            return {replaced(key): replaced(item) for key, item in value.items()}
        return [replaced(item) for item in value] if isinstance(value, list | tuple) else value

    safe = replaced(list(messages))
    return safe, {character: special for special, character in by_special.items()}


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words for transformers' training; nothing here."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class PlainNamespace(Namespace):
        """A namespace that holds no underscored names, which the sandbox would not look at again."""

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"{name!r} cannot be set on a namespace")
            super().__setitem__(name, value)

    def namespace(**values: Any) -> Namespace:
        made = PlainNamespace()
        for name, value in values.items():
            made[name] = value
        return made

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        namespace=namespace,
        dict=lambda **values: values,
    )
    return environment
