"""docs/performance.md shows what the benchmarks have kept."""

import performance_tables


def test_the_page_shows_the_kept_numbers() -> None:
    """Every benchmark that keeps numbers has its table there, and no other number is in it."""
    text = performance_tables.PAGE.read_text(encoding="utf-8")

    assert performance_tables.page() == text
    assert all(f"<!-- {name} -->" in text for name in performance_tables.kept())
