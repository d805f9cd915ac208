"""Blank pictures: drawing a run's takes ten times as long as a small run itself.

    python -m tests.support.pictures diagnose ...

is ``oracle diagnose ...`` with blank ones.
"""

from pathlib import Path

from toolkit.tables import drawing


def save_blank(figure, path_without_suffix):
    """Write an empty .svg and .png in place of `figure`."""
    paths = [Path(f"{path_without_suffix}{suffix}") for suffix in (".svg", ".png")]
    for path in paths:
        path.write_text('<svg width="1" height="1"/>' if path.suffix == ".svg" else "")
    return paths


if __name__ == "__main__":
    from toolkit.cli.main import main

    drawing.save = save_blank
    main()
