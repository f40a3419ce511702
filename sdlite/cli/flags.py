"""Makes flags of records: a command asks for a record, and each field of it becomes a flag.

    @app.command()
    @options
    def draw(load: LoadOptions, request: Annotated[Request, Flags(only=("steps", "width"))] = Request(prompt="x")): ...

Name, type, default and bounds of a flag are those of the field. Short names, other names, metavar and help are in the
table of words.py; a field without help there shows its own description. A parameter's default is a record that holds
the flags' defaults and the values of the fields that are no flags.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import reduce, wraps
from operator import or_
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.models import OptionInfo, ParameterInfo

from sdlite.cli.words import WORDS
from sdlite.config import Record

T = TypeVar("T")


@dataclass(frozen=True)
class Flags:
    """How a parameter becomes flags: Annotated[SomeRecord, Flags(...)].

    only: names of the fields that become flags, in this order; without: those that do not. words: entries like those
    of WORDS, which go before them. records: for a parameter of type dict[str, Any], which holds just what the user
    gave; the flags are the fields of all these records. Their names appear in the help where a field, its help or its
    default is not the same for all.
    """

    only: Sequence[str] = ()
    without: Sequence[str] = ()
    words: Mapping[str, ParameterInfo] | None = None
    records: Mapping[str, type[Record]] | None = None


def options(command: Callable[..., T]) -> Callable[..., T]:
    """Replaces each parameter of a command that is a record by flags, and calls the command with the record.

    Raises the record's one-line ValueError for values that do not fit, before the command runs.
    """
    signature = inspect.signature(command, eval_str=True)
    groups = {name: group for name, each in signature.parameters.items() if (group := _group(each)) is not None}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += groups[name].parameters() if name in groups else [_keyword(parameter)]

    @wraps(command)
    def run(**values: Any) -> T:
        given = {name: [(field, values.pop(field)) for field in group.fields] for name, group in groups.items()}
        return command(**values, **{name: groups[name].build(pairs) for name, pairs in given.items()})

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _keyword(parameter: inspect.Parameter) -> inspect.Parameter:
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _group(parameter: inspect.Parameter) -> "_Group | None":
    """The flags of a parameter that is a record or has `Flags`; None for any other."""
    kind, *notes = get_args(parameter.annotation) if _is_annotated(parameter.annotation) else [parameter.annotation]
    rule = next((note for note in notes if isinstance(note, Flags)), None)
    is_record = isinstance(kind, type) and issubclass(kind, Record)
    if rule is None and not is_record:
        return None
    start = None if parameter.default is parameter.empty else parameter.default
    return _Group(rule or Flags(), kind if is_record else None, start)


class _Group:
    """The flags that stand for one parameter. kind: its record, or None for a dict. start: holds the defaults."""

    def __init__(self, rule: Flags, kind: type[Record] | None, start: Record | None) -> None:
        self.words = {**WORDS, **(rule.words or {})}
        self.kind, self.start = kind, start
        records = {"": kind} if kind is not None else dict(rule.records or {})
        self.owners = list(records)
        names = rule.only or dict.fromkeys(name for record in records.values() for name in record.model_fields)
        self.fields = {
            name: {owner: fields[name] for owner, record in records.items() if name in (fields := record.model_fields)}
            for name in names
            if name not in rule.without
        }

    def build(self, pairs: Sequence[tuple[str, Any]]) -> Any:
        """The record, or what the user gave as a dict."""
        given = {name: value for name, value in pairs if value is not None and value != []}
        if self.kind is None:
            return given
        return self.kind(**given) if self.start is None else self.start.replace(**given)

    def parameters(self) -> list[inspect.Parameter]:
        return [self._parameter(name, fields) for name, fields in self.fields.items()]

    def _parameter(self, name: str, fields: Mapping[str, FieldInfo]) -> inspect.Parameter:
        first = next(iter(fields.values()))
        default = self._default(name, first)
        info = copy(self.words.get(name) or typer.Option())
        info.help = self._help(fields, info.help)
        kind = _joined([_type(field.annotation) for field in fields.values()])
        names = _switch(name, {field.default for field in fields.values()}) if kind is bool else f"--{_dashed(name)}"
        if isinstance(info, OptionInfo) and info.default is ...:  # in Annotated it is the first name
            info.default = names
        if self.kind is None and info.show_default is True:
            info.show_default = _defaults(fields) or True
        hint = kind if default is not None else kind | None
        annotation = Annotated[hint, info]  # type: ignore[valid-type]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def _default(self, name: str, field: FieldInfo) -> Any:
        if self.kind is None:
            return None
        if self.start is None and field.is_required():
            return inspect.Parameter.empty
        default = field.get_default() if self.start is None else getattr(self.start, name)
        return None if isinstance(default, tuple) else default

    def _help(self, fields: Mapping[str, FieldInfo], words: str | None) -> str:
        """The help of the table or else of the fields, with the names of the records where they do not agree."""
        texts: dict[str, list[str]] = {}
        for owner, field in fields.items():
            texts.setdefault((words or field.description or "").removesuffix(".") + _limits(field), []).append(owner)
        if len(texts) == 1 and len(fields) == len(self.owners):
            return f"{next(iter(texts))}."
        return " ".join(f"{' and '.join(owners).capitalize()}: {text}." for text, owners in texts.items())


def _defaults(fields: Mapping[str, FieldInfo]) -> str:
    """The default of each record, in words; those of most are "others"."""
    shown = {owner: _shown(field.default) for owner, field in fields.items()}
    most, count = Counter(shown.values()).most_common(1)[0]
    if count == len(shown):
        return most
    parts = [f"{owner} {value}" for owner, value in shown.items() if count == 1 or value != most]
    return ", ".join(parts if count == 1 else [*parts, f"others {most}"])


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return ("off", "on")[default]
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def _switch(name: str, defaults: set[Any]) -> str:
    """A switch that is off at first needs one name only."""
    return f"--{_dashed(name)}" if defaults == {False} else f"--{_dashed(name)}/--no-{_dashed(name)}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _is_annotated(annotation: Any) -> bool:
    return get_origin(annotation) is Annotated


def _type(annotation: Any) -> Any:
    """The field's type as typer knows it: no None, no bounds, a list for a tuple, text for text or path."""
    if _is_annotated(annotation):
        return _type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        kinds = [_type(each) for each in get_args(annotation) if each is not NoneType]
        return str if str in kinds else reduce(or_, kinds)
    if get_origin(annotation) is tuple:
        return list[_type(get_args(annotation)[0])]  # type: ignore[misc]
    return annotation


def _joined(kinds: Sequence[Any]) -> Any:
    """One type for the same field of several records: all their choices, or the type of the first."""
    choices = dict.fromkeys(choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))
    return Literal[tuple(choices)] if choices else kinds[0]


def _limits(field: FieldInfo) -> str:
    """The bounds of a number that has both, as " (0 to 1)"."""
    notes = [*field.metadata]
    for part in get_args(field.annotation):  # such as Size in Size | None
        notes += [note for info in getattr(part, "__metadata__", ()) for note in getattr(info, "metadata", ())]
    bounds = {name: getattr(note, name) for note in notes for name in ("ge", "gt", "le") if hasattr(note, name)}
    low = f"{bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}, up" if "gt" in bounds else ""
    return f" ({low} to {bounds['le']})" if low and "le" in bounds else ""
