"""The configuration page is that of the settings."""

from pathlib import Path

from allocator.run.config.reference import render_reference
from allocator.run.config.run import RunConfig
from allocator.searchers.registry import find_sections

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_written_from_the_settings() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_reference(), "write it again with 'make docs'"


def test_every_key_has_a_line() -> None:
    text = render_reference()
    data = RunConfig().model_dump()
    for name, value in data.items():
        for key in value if isinstance(value, dict) and name != "domains" else [None]:
            if key not in find_sections():
                assert f"| `{name}`" in text if key is None else f"| `{name}.{key}`" in text
