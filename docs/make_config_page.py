"""Writes docs/config.md from the configuration's own types and docstrings: python docs/make_config_page.py

`tests/test_docs.py` compares the page with what this script would write.
"""

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from spire_dist.config import RunConfig
from spire_dist.training.run import FREE_TO_CHANGE

PAGE = Path(__file__).with_name("config.md")
HEAD = """\
# Configuration

<!-- written by docs/make_config_page.py; change the docstrings in spire_dist/config.py instead -->

A run is configured by one TOML file, checked before anything starts: an unknown key or a value out of range ends in one
line that names it. Every field has a default, so a file holds only what differs:

```toml
[data]
store = "particles.zarr"

[stage1]
epochs = 20
```

    spire-dist train my.toml --run run
    spire-dist train my.toml --run run --preset cryobench --set stage2.batch=32 --set latent.kind=encoder

Later beats earlier: the defaults below, a preset, the file, `--store`, `--set`. The result is kept as `config.toml` in the
run directory. A run that is continued must have the same values, except {free}.
"""
PRESETS = """\
## Presets

`--preset NAME` lays one of these under the file:

```toml
{presets}
```
"""
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page."""
    presets = files("spire_dist").joinpath("presets.toml").read_text().strip()
    free = ", ".join(f"`{name}`" for name in FREE_TO_CHANGE)
    parts = [HEAD.format(free=free), *_sections(RunConfig()), PRESETS.format(presets=presets)]
    return "\n".join(parts)


def _sections(config: RunConfig) -> Iterator[str]:
    yield _table("Top level", "Keys outside any section; in a file they stand first.", config)
    for name, value in config:
        if isinstance(value, BaseModel):
            yield _table(f"[{name}]", value.__doc__ or "", value)
    assert config.stage1.rates == config.stage2.rates, "one table of rates no longer says it all"
    yield _table("[stage1.rates] and [stage2.rates]", config.stage1.rates.__doc__ or "", config.stage1.rates)


def _table(title: str, purpose: str, section: BaseModel) -> str:
    rows = [f"## {title}\n", f"{purpose}\n", "| key | default | valid | meaning and unit |", "|---|---|---|---|"]
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if not isinstance(value, BaseModel):
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            rows.append(f"| `{name}` | {_shown(value)} | {_valid(field)} | {meaning} |")
    return "\n".join(rows) + "\n"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _valid(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(field.annotation))
    bounds = [
        f"{BOUNDS[kind]} {getattr(item, kind)}" for item in field.metadata for kind in BOUNDS if hasattr(item, kind)
    ]
    if get_origin(field.annotation) in (dict, list):
        return "table" if get_origin(field.annotation) is dict else "list of texts"
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    words_too = [f"`{choice}`" for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    [kind] = [kind for kind in kinds if get_origin(kind) is not Literal]
    if get_origin(kind) is Annotated:
        limits = [limit for item in get_args(kind)[1:] for limit in item.metadata]
        bounds += [f"{BOUNDS[name]} {getattr(item, name)}" for item in limits for name in BOUNDS if hasattr(item, name)]
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    words = {int: "whole number", float: "number", Path: "path", str: "text", bool: "`true`, `false`"}
    return ", ".join([f"{words[kind]} {', '.join(bounds)}".strip(), *words_too])


if __name__ == "__main__":
    PAGE.write_text(page())
