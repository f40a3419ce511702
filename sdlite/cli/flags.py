"""Makes flags of records: a command asks for a record, and each field of it becomes a flag.

    @command("sdlite draw --steps 3")
    def draw(load: LoadOptions, request: Annotated[Request, Flags(only=("steps", "width"))] = Request(prompt="x")): ...

Name, type, default, bounds and help of a flag are those of the field. WORDS adds short names, other names, metavar and
checks, by the name of the field in any record; a flag called --no-NAME there turns the field off. A parameter's default
is a record with the flags' defaults and the values of the fields that are no flags.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import reduce, wraps
from operator import or_
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.models import OptionInfo, ParameterInfo

from sdlite.checkpoints.places import check_model, check_vae
from sdlite.config import Record, check_device

KEYWORD = inspect.Parameter.KEYWORD_ONLY


def checked(check: Callable[[Any], None]) -> Callable[[Any], Any]:
    """A callback for an option: it runs the check before the command and so before PyTorch is loaded."""

    def callback(value: Any) -> Any:
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                check(each)
        return value

    return callback


def check_there(path: str | Path) -> None:
    """Raises FileNotFoundError if the path does not exist."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} does not exist")


WORDS: Mapping[str, ParameterInfo] = {
    "prompt": typer.Argument(),
    "negative_prompt": typer.Option("--negative-prompt", "-n"),
    "seed": typer.Option("--seed", "-s"),
    "height": typer.Option("--height", "-H", show_default="the model's"),
    "width": typer.Option("--width", "-W", show_default="the model's"),
    "guidance_scale": typer.Option("--guidance-scale", "--cfg-scale"),
    "image": typer.Option("--image", "-i", metavar="FILE", callback=checked(check_there)),
    "mask": typer.Option(metavar="FILE", callback=checked(check_there)),
    "paste": typer.Option("--no-paste", help="Let the model also change the rest of --image, as diffusers does."),
    "metadata": typer.Option("--no-metadata", help="Do not write prompt and settings into the image file."),
    "model": typer.Option("--model", "-m", callback=checked(check_model), show_default="the model that ships"),
    "device": typer.Option(callback=checked(check_device)),
    "vae": typer.Option(metavar="FILE|FOLDER|tiny", callback=checked(check_vae), show_default="the model's"),
    "variant": typer.Option(show_default="plain, else fp16"),
    "allow_links": typer.Option(metavar="ROOT"),
    "output": typer.Option("--output", "-o", show_default="000000-SEED.png here, counting up"),
    "quiet": typer.Option("--quiet", "-q"),
    "as_json": typer.Option("--json"),
}


@dataclass(frozen=True)
class Flags:
    """How a parameter becomes flags: Annotated[SomeRecord, Flags(...)].

    only: names of the fields that become flags, in this order; without: those that do not. words: entries like those
    of WORDS, which go before them. records: for a parameter of type dict[str, Any], which holds just what the user
    gave; the flags are the fields of all these records. Their names appear in the help where a field, its help or its
    default is not the same for all.
    """

    only: Sequence[str] = ()
    without: Collection[str] = ()
    words: Mapping[str, ParameterInfo] = field(default_factory=dict)
    records: Mapping[str, type[Record]] = field(default_factory=dict)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces each parameter of a command that is a record by flags, and calls the command with the record.

    Raises the record's one-line ValueError for values that do not fit, before the command runs.
    """
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, _Group] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        kind, *notes = _unpacked(parameter.annotation)
        rule = next((note for note in notes if isinstance(note, Flags)), Flags())
        if rule.records or (isinstance(kind, type) and issubclass(kind, Record)):
            groups[name] = _Group(rule, kind, parameter.default)
            parameters += [groups[name].parameter(field) for field in groups[name].fields]
        else:
            parameters.append(parameter.replace(kind=KEYWORD))

    @wraps(command)
    def run(**values: Any) -> None:
        given = {name: {field: values.pop(field) for field in group.fields} for name, group in groups.items()}
        command(**values, **{name: groups[name].build(fields) for name, fields in given.items()})

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


class _Group:
    """The flags that stand for one parameter. make: of the record, or dict. fields: by name and record."""

    def __init__(self, rule: Flags, kind: Any, default: Any) -> None:
        self.words = {**WORDS, **rule.words}
        self.start: Record | None = default if isinstance(default, Record) else None
        self.make = dict if rule.records else kind if self.start is None else self.start.replace
        self.records = rule.records or {"": kind}
        names = rule.only or dict.fromkeys(name for record in self.records.values() for name in record.model_fields)
        known = {owner: record.model_fields for owner, record in self.records.items()}
        self.fields: dict[str, dict[str, FieldInfo]] = {
            name: {owner: fields[name] for owner, fields in known.items() if name in fields}
            for name in names
            if name not in rule.without
        }
        self.turned_off = {
            name for name in self.fields if getattr(self.words.get(name), "default", None) == f"--no-{name}"
        }

    def build(self, values: Mapping[str, Any]) -> Any:
        """The record, or what the user gave as a dict."""
        given = {name: value for name, value in values.items() if value is not None and value != []}
        return self.make(**{name: not value if name in self.turned_off else value for name, value in given.items()})

    def parameter(self, name: str) -> inspect.Parameter:
        fields = self.fields[name]
        info = copy(self.words.get(name) or typer.Option())
        info.help = self._help(fields, info.help)
        kind, default = _joined([_type(each.annotation) for each in fields.values()]), self._default(name)
        if isinstance(info, OptionInfo) and info.default is ...:  # the place of the first name, in Annotated
            flag = name.replace("_", "-")
            is_switch = kind is bool and {each.default for each in fields.values()} != {False}
            info.default = f"--{flag}/--no-{flag}" if is_switch else f"--{flag}"
        if self.make is dict and info.show_default is True:
            info.show_default = _defaults(fields) or True
        return inspect.Parameter(name, KEYWORD, default=default, annotation=Annotated[kind | None, info])

    def _default(self, name: str) -> Any:
        each = next(iter(self.fields[name].values()))
        if self.make is dict:
            return None
        if self.start is None and each.is_required():
            return inspect.Parameter.empty
        default = each.get_default() if self.start is None else getattr(self.start, name)
        return not default if name in self.turned_off else None if isinstance(default, tuple) else default

    def _help(self, fields: Mapping[str, FieldInfo], words: str | None) -> str:
        """The help of the table or else of the fields, with the names of the records where they do not agree."""
        texts: dict[str, list[str]] = {}
        for owner, each in fields.items():
            text = (words or each.description or "").removesuffix(".") + f"{_limits(each)}."
            texts.setdefault(text, []).append(owner)
        if len(texts) == 1 and len(fields) == len(self.records):
            return next(iter(texts))
        return " ".join(f"{' and '.join(owners).capitalize()}: {text}" for text, owners in texts.items())


def _defaults(fields: Mapping[str, FieldInfo]) -> str:
    """The default of each record, in words; those of most are "others"."""

    def shown(default: Any) -> str:
        if isinstance(default, bool):
            return "on" if default else "off"
        return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)

    texts = {owner: shown(each.default) for owner, each in fields.items()}
    most, count = Counter(texts.values()).most_common(1)[0]
    if count == len(texts):
        return most
    parts = [f"{owner} {text}" for owner, text in texts.items() if count == 1 or text != most]
    return ", ".join(parts if count == 1 else [*parts, f"others {most}"])


def _joined(kinds: Sequence[Any]) -> Any:
    """One type for the same field of several records: all their choices, or the type of the first."""
    choices = dict.fromkeys(choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind))
    return Literal[tuple(choices)] if choices else kinds[0]


def _unpacked(annotation: Any) -> tuple[Any, ...]:
    """A type and its notes."""
    return get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)


def _type(annotation: Any) -> Any:
    """The field's type as typer knows it: no None, no bounds, a list for a tuple, text for text or path."""
    annotation = _unpacked(annotation)[0]
    if get_origin(annotation) in (Union, UnionType):
        kinds = [_type(each) for each in get_args(annotation) if each is not NoneType]
        return str if str in kinds else reduce(or_, kinds)
    return list[_type(get_args(annotation)[0])] if get_origin(annotation) is tuple else annotation  # type: ignore[misc]


def _limits(field: FieldInfo) -> str:
    """The bounds of a number that has both, as " (0 to 1)"."""
    parts = [note for part in get_args(field.annotation) for note in _unpacked(part)[1:]]  # such as Size | None
    notes = [*field.metadata, *(note for part in parts for note in getattr(part, "metadata", ()))]
    bounds = {name: getattr(note, name) for note in notes for name in ("ge", "gt", "le") if hasattr(note, name)}
    low = f"{bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}, up" if "gt" in bounds else ""
    return f" ({low} to {bounds['le']})" if low and "le" in bounds else ""
