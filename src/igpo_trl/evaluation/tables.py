"""Scores as tables, for the terminal and as Markdown, and as plain values for JSON."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .intervals import Interval


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first column holds names, the others hold values."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""  # below the table

    def to_markdown(self) -> str:
        """The table in Markdown, with its title as a heading and its note."""
        rule = ["---", *["---:"] * (len(self.header) - 1)]
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.header, rule, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in cells]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])]) + "\n"

    @property
    def width(self) -> int:
        """Width in print, in characters."""
        return sum(max(map(len, column)) + 2 for column in zip(self.header, *self.rows, strict=True))

    def render(self, width: int | None = None) -> "RenderableType":
        """A Rich table without empty columns. If it is wider than `width`, it is transposed where that helps."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable

        if width is not None and self.width > width:
            header, *rows = map(list, zip(self.header, *self.rows, strict=True))
            transposed = Table(self.title, header, rows, self.note)
            if transposed.width < self.width:
                return transposed.render()
        table = RichTable(title=self.title, caption=self.note or None, box=box.SIMPLE_HEAD, title_justify="left")
        columns = [i for i in range(len(self.header)) if i == 0 or any(row[i] for row in self.rows)]
        for i in columns:
            table.add_column(escape(self.header[i]), justify="right" if i else "left", no_wrap=not i, overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(row[i]) for i in columns))
        return table


def to_plain(value: Any) -> Any:
    """Dataclasses, named tuples and dictionaries as dictionaries for JSON, at every level; other values unchanged."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "_asdict"):
        value = value._asdict()
    return {str(name): to_plain(each) for name, each in value.items()} if isinstance(value, dict) else value


def format_percent(value: float) -> str:
    """`0.4567` as `45.7`."""
    return f"{100 * value:.1f}"


def format_share(value: float) -> str:
    """As [`format_percent`], but `0` and `100` without decimals."""
    return f"{100 * value:.{0 if value in (0, 1) else 1}f}"


def format_number(value: float) -> str:
    """Two decimals below 100, none from there on."""
    return f"{value:.{2 if abs(value) < 100 else 0}f}"


def format_p(value: float | None) -> str:
    """A p-value with three decimals; empty for `None`."""
    return "" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def format_interval(value: "Interval | None", form: Callable[[float], str], with_bounds: bool = True) -> str:
    """The mean, and the bounds in brackets where there are some: `45.7 [40.1, 50.9]`. Empty for `None`."""
    if value is None:
        return ""
    text = form(value.mean)
    if with_bounds and value.low is not None and value.high is not None:
        text += f" [{form(value.low)}, {form(value.high)}]"
    return text
