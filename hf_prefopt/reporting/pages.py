"""Render HTML pages without scripts and without external resources. Jinja escapes all inserted values."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_prefopt.reporting.preview import visible


def render_page(template: str, **values: Any) -> str:
    """Render a template of this package as HTML. Templates have a filter `visible`, which shows control characters."""
    environment = Environment(
        loader=PackageLoader("hf_prefopt", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = lambda value: visible(str(value))
    return environment.get_template(template).render(**values)


def write_page(page: str, path: Path) -> Path:
    """Write a page to a file, create its folder if needed, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path
