"""Show what runs did on one HTML page: metrics, curves, what was trained, gain per move, analyses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .parsing import VerbParser, instantiate

__all__ = ["ReportSettings", "parser", "run"]

_EXAMPLES = ("slicefine report runs/mrpc --output mrpc.html",)


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


def parser() -> VerbParser:
    """Options of `slicefine report`."""
    usage = "slicefine report RUN [RUN ...] [--output report.html] [--analysis DIR] [--model DIR] [--overwrite]"
    result = VerbParser(usage, "Show what runs did on one page that needs no network.", _EXAMPLES)
    about = "Output folders of train (or their adapter folders), or folders of analyze."
    result.add_argument("runs", type=str, nargs="+", help=about)
    result.add_class_arguments(ReportSettings)
    return result


def run(chosen: Any) -> Any:
    """Read the runs, write the page, and say where it is."""
    plain = instantiate(parser(), chosen)
    folders = plain.pop("runs")
    settings = ReportSettings(**plain)
    from ..reports.content import Study, read_runs, read_study
    from ..reports.page import make_page
    from ..reports.writing import check_file, write_page
    from ..units import size

    target = check_file(settings.output, settings.overwrite)
    runs = read_runs(folders, settings.model)
    named = [settings.analysis] if isinstance(settings.analysis, str) else settings.analysis or []
    studies = [read_study(folder) for folder in named]
    both = Study([chart for s in studies for chart in s.charts], [note for s in studies for note in s.notes])
    content = make_page(runs, both)
    write_page(target, content)
    figures, length = content.count("<figure>"), len(content.encode())
    noun = "run" if len(runs) == 1 else "runs"
    print(f"{len(runs)} {noun}, {figures} figures; written to {target} ({size(length)})")
    return {"output": str(target), "runs": len(runs), "figures": figures, "file_bytes": length}
