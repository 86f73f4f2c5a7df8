"""The picture of a layer before and after the passes, as SVG: boxes with what they cost, arrows for what they read."""

from __future__ import annotations

from html import escape

from .layer_view import Box, LayerView

WIDTH, GAP_X, GAP_Y, LINE, PAD, TOP = 250, 24, 34, 16, 10, 86
COLOURS = {"pointwise": "#f4f4f5", "product": "#e0f2fe", "product and sum": "#e0f2fe", "top-k": "#f4f4f5"}
OURS, WAITS = "#fef3c7", "#fed7aa"


def draw(before: LayerView, after: LayerView) -> str:
    """One SVG document, ``before`` on the left."""
    left, right = _Panel("without lowering", before), _Panel("with lowering", after)
    width, height = left.width + right.width + GAP_X, max(left.height, right.height)
    body = left.svg(0) + right.svg(left.width + GAP_X)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#52525b"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="white"/>', *body, "</svg>", "",
    ])  # fmt: skip


class _Panel:
    """One layer: rows by depth, boxes of a row side by side."""

    def __init__(self, title: str, view: LayerView):
        self.title, self.view = title, view
        self.rows: dict[int, list[int]] = {}
        for number, box in enumerate(view.boxes):
            self.rows.setdefault(box.depth, []).append(number)
        columns = max((len(row) for row in self.rows.values()), default=1)
        self.width = columns * (WIDTH + GAP_X) + GAP_X
        self.places = self._places()
        self.height = max((y + _height(view.boxes[n]) for n, (_, y) in self.places.items()), default=TOP) + GAP_Y

    def _places(self) -> dict[int, tuple[int, int]]:
        """Upper left corner of every box."""
        places, y = {}, TOP
        for depth in sorted(self.rows):
            row = self.rows[depth]
            x = (self.width - len(row) * (WIDTH + GAP_X) + GAP_X) // 2
            for position, number in enumerate(row):
                places[number] = (x + position * (WIDTH + GAP_X), y)
            y += max(_height(self.view.boxes[number]) for number in row) + GAP_Y
        return places

    def svg(self, shift: int) -> list[str]:
        totals = self.view.totals()
        middle = self.width // 2
        counted = ", ".join(f"{count} {name}" for name, count in totals.items())
        lines = [
            f'<g transform="translate({shift} 0)">',
            f'<text x="{middle}" y="30" text-anchor="middle" font-size="18" font-weight="bold">{self.title}</text>',
            f'<text x="{middle}" y="54" text-anchor="middle">{counted}</text>',
        ]
        for number, box in enumerate(self.view.boxes):
            lines += [self._arrow(need, number) for need in box.needs]
        for number, box in enumerate(self.view.boxes):
            lines += _draw_box(box, *self.places[number])
        return [*lines, "</g>"]

    def _arrow(self, source: int, target: int) -> str:
        (x0, y0), (x1, y1) = self.places[source], self.places[target]
        x0, y0, x1 = x0 + WIDTH // 2, y0 + _height(self.view.boxes[source]), x1 + WIDTH // 2
        bend = 0
        if y1 - y0 > GAP_Y + 2 * LINE:  # passes other rows: around them
            bend = WIDTH // 2 + GAP_X // 2 if x1 >= x0 else -(WIDTH // 2 + GAP_X // 2)
        path = f"M{x0} {y0} C{x0 + bend} {y0 + GAP_Y} {x1 + bend} {y1 - GAP_Y} {x1} {y1 - 2}"
        return f'<path d="{path}" fill="none" stroke="#52525b" marker-end="url(#tip)"/>'


def _height(box: Box) -> int:
    return (2 + len(_text(box))) * LINE + PAD


def _text(box: Box) -> list[str]:
    return [", ".join(box.inside) or "cast"] if box.name == "pointwise" else box.inside


def _cost(box: Box) -> str:
    parts = [(box.launches, "launch"), (box.meetings, "meeting"), (box.copies, "copy")]
    plural = {"launch": "launches", "meeting": "meetings", "copy": "copies"}
    return ", ".join(f"{count} {noun if count == 1 else plural[noun]}" for count, noun in parts if count)


def _draw_box(box: Box, x: int, y: int) -> list[str]:
    colour = COLOURS.get(box.name, WAITS if box.meetings else OURS)
    lines = [
        f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{_height(box)}" rx="6" fill="{colour}" stroke="#71717a"/>',
        f'<text x="{x + PAD}" y="{y + LINE + 2}" font-weight="bold">{escape(box.name)}</text>',
    ]
    for number, text in enumerate([*_text(box), _cost(box)]):
        style = ' fill="#b45309"' if number == len(_text(box)) else ""
        lines.append(f'<text x="{x + PAD}" y="{y + (number + 2) * LINE + 2}"{style}>{escape(text)}</text>')
    return lines
