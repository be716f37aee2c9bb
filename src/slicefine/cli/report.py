"""Show what runs did on one HTML page: metrics, curves, what was trained, gain per move, analyses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from .parsing import instantiate

__all__ = ["ReportSettings", "parser", "run"]


@dataclass
class ReportSettings:
    """How `slicefine report` writes its page.

    Args:
        output: the HTML file.
        analysis: a folder of `slicefine analyze`, or a list of them, shown at the end of the page; a folder named
            analysis inside a run is found by itself.
        model: the base, if it is elsewhere than in training: a folder. The page never downloads one.
        overwrite: replace the file if it exists.
    """

    output: str = "report.html"
    analysis: str | list[str] | None = None
    model: str | None = None
    overwrite: bool = False


def parser() -> ArgumentParser:
    """Options of `slicefine report`."""
    usage = "slicefine report RUN [RUN ...] [--output report.html] [--analysis DIR] [--model DIR] [--overwrite]"
    result = ArgumentParser(usage=usage, description="Show what runs did on one page that needs no network.")
    about = "Output folders of train (or their adapter folders), or folders of analyze."
    result.add_argument("runs", type=str, nargs="+", help=about)
    result.add_class_arguments(ReportSettings)
    return result


def run(chosen: Any) -> int:
    """Read the runs, write the page, and say where it is."""
    plain = instantiate(parser(), chosen)
    folders = plain.pop("runs")
    settings = ReportSettings(**plain)
    from ..reports.content import Study, read_runs, read_study
    from ..reports.page import make_page
    from ..reports.writing import check_file, write_page

    target = check_file(settings.output, settings.overwrite)
    runs = read_runs(folders, settings.model)
    named = [settings.analysis] if isinstance(settings.analysis, str) else settings.analysis or []
    studies = [read_study(folder) for folder in named]
    both = Study([chart for s in studies for chart in s.charts], [note for s in studies for note in s.notes])
    content = make_page(runs, both)
    write_page(target, content)
    figures, size = content.count("<figure>"), len(content.encode()) / 2**10
    noun = "run" if len(runs) == 1 else "runs"
    print(f"{len(runs)} {noun}, {figures} figures; written to {target} ({size:,.0f} KiB)")
    return 0
