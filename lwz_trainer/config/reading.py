"""From a YAML file and command-line flags to a frozen dataclass; every unknown key is refused."""

import dataclasses
import difflib
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import pydantic
import tyro
import yaml

from lwz_trainer.errors import UserError

__all__ = ["dump_config", "load_config", "parse_command_line"]

T = TypeVar("T")


def parse_command_line(config_class: type[T], argv: list[str], *, prog: str) -> T:
    """`[FILE.yaml] --section.field=value …`: the file's values are the flags' defaults."""
    default: T | None = None
    if argv and not argv[0].startswith("-"):
        default = load_config(config_class, Path(argv[0]))
        argv = argv[1:]
    default = default if default is not None else config_class()
    _refuse_new_names(default, argv)
    return tyro.cli(
        config_class,
        default=default,
        args=argv,
        prog=prog,
        config=(tyro.conf.FlagConversionOff,),
    )


def load_config(config_class: type[T], path: Path) -> T:
    """Reads a YAML file; missing fields keep their defaults, unknown ones are named."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        message = f"no config file {path}: pass a YAML file such as configs/cpu_demo.yaml"
        raise UserError(message) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read config file {path}: {error}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise UserError(f"{path}{line}: not valid YAML") from error
    raw = raw if raw is not None else {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    _refuse_unknown_keys(config_class, raw, path, prefix="")
    try:
        return pydantic.TypeAdapter(config_class).validate_python(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        got = first["input"]
        raise UserError(f"{path}: {where}: {first['msg'].lower()}, got {got!r}") from error


def dump_config(config: Any) -> str:
    """YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _refuse_unknown_keys(config_class: Any, raw: dict[str, Any], path: Path, prefix: str) -> None:
    hints = get_type_hints(config_class)
    for key, value in raw.items():
        name = f"{prefix}{key}"
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.5)
            known = f"did you mean '{prefix}{close[0]}'?" if close else f"known: {', '.join(hints)}"
            raise UserError(f"{path}: unknown key '{name}'; {known}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise UserError(f"{path}: '{name}' is a section, expected a mapping, got {value!r}")
            _refuse_unknown_keys(hints[key], value, path, prefix=f"{name}.")
        elif (section := _value_section(hints[key])) is not None and isinstance(value, dict):
            for entry, content in value.items():
                if isinstance(content, dict):
                    _refuse_unknown_keys(section, content, path, prefix=f"{name}.{entry}.")


def _refuse_new_names(config: Any, argv: list[str]) -> None:
    """The sections of a `dict[str, section]` have flags only where the file names them."""
    flags = [flag.partition("=")[0].replace("-", "_") for flag in argv]
    for path in _named_sections(type(config)):
        for flag in flags:
            name = flag.removeprefix(f"__{path}.").partition(".")[0]
            is_meant = flag == f"__{path}" or flag.startswith(f"__{path}.")
            if is_meant and name not in attrgetter(path)(config):
                raise UserError(
                    f"--{flag[2:]}: names under {path} are given in a YAML file, flags change what "
                    "stands there; write it into a file and pass that first"
                )


def _named_sections(config_class: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields that are a `dict[str, section]`."""
    for name, hint in get_type_hints(config_class).items():
        if dataclasses.is_dataclass(hint):
            yield from _named_sections(hint, f"{prefix}{name}.")
        elif _value_section(hint) is not None:
            yield prefix + name


def _value_section(hint: Any) -> Any | None:
    """X of `dict[str, X]` where X is a section."""
    if get_origin(hint) is dict and dataclasses.is_dataclass(section := get_args(hint)[1]):
        return section
    return None
