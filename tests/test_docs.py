"""Docs that can be checked against the code are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs/configuration.md").read_text()
    assert written == load(ROOT / "docs/configuration.py").page(), (
        "run python docs/configuration.py"
    )


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *[str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))],
    ],
)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    files = re.findall(
        r"`((?:pipeline|workers|judges|configs|tests|benchmarks|docs)/[\w/.-]+)`", text
    )
    missing = [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert missing == []


def test_the_readme_lists_every_shipped_config() -> None:
    readme = (ROOT / "README.md").read_text()
    shipped = [str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml")]
    assert [name for name in shipped if name not in readme] == []
