"""Draws the pictures of the documentation from the texts beside it.

``python docs/pictures/draw.py`` writes an SVG for each ``.txt`` here. The language: ``title TEXT``,
``lane NAME TEXT`` (a column), ``A -> B : TEXT`` (an arrow), ``note A : TEXT`` (a box on a column)
and ``band A B : TEXT`` (a bar from column to column). One line is one row of the picture.
"""

from __future__ import annotations

import re
import sys
from html import escape
from pathlib import Path

LANE_WIDTH = 226
ROW = 38
TOP = 84
STYLE = (
    "text{font:13px sans-serif;fill:#1c2733}.t{font-size:16px;font-weight:bold}"
    ".l{font-weight:bold}.b{fill:#eef3f8;stroke:#5b7a99}.n{fill:#fff7dd;stroke:#c9a227}"
    ".p{fill:#dff3e4;stroke:#3c8d5a}.r{stroke:#c3ccd6}.a{stroke:#34495e;stroke-width:1.4}"
)


def draw(text: str) -> str:
    """Return the SVG for one description; ValueError names a line that is not understood."""
    title, lanes, rows = "", {}, []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        if line.startswith("title "):
            title = line[6:]
        elif found := re.fullmatch(r"lane (\w+)\s+(.+)", line):
            lanes[found[1]] = (len(lanes), found[2])
        elif found := re.fullmatch(r"(\w+) -> (\w+) : (.+)", line):
            rows.append(("arrow", *found.groups()))
        elif found := re.fullmatch(r"note (\w+) : (.+)", line):
            rows.append(("note", found[1], found[1], found[2]))
        elif found := re.fullmatch(r"band (\w+) (\w+) : (.+)", line):
            rows.append(("band", *found.groups()))
        else:
            raise ValueError(f"line {number}: not understood: {line}")

    def middle(name: str) -> float:
        return 20 + (lanes[name][0] + 0.5) * LANE_WIDTH

    width = 40 + len(lanes) * LANE_WIDTH
    height = TOP + ROW * len(rows) + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        '<defs><marker id="h" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path d="M0 0L9 4L0 8z" fill="#34495e"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="t" x="20" y="26">{escape(title)}</text>',
    ]
    for name, (_, label) in lanes.items():
        x = middle(name)
        out.append(f'<line class="r" x1="{x}" y1="70" x2="{x}" y2="{height - 10}"/>')
        out.append(f'<rect class="b" x="{x - 82}" y="42" width="164" height="28" rx="5"/>')
        out.append(f'<text class="l" x="{x}" y="61" text-anchor="middle">{escape(label)}</text>')
    for index, (kind, first, second, label) in enumerate(rows):
        y = TOP + ROW * index + 24
        a, b = middle(first), middle(second)
        if kind == "arrow":
            out.append(
                f'<line class="a" x1="{a}" y1="{y}" x2="{b}" y2="{y}" marker-end="url(#h)"/>'
            )
        else:
            half = max(LANE_WIDTH / 2 - 8, 4 * len(label)) if kind == "note" else 60
            left, right = min(a, b) - half, max(a, b) + half
            style = "n" if kind == "note" else "p"
            out.append(
                f'<rect class="{style}" x="{left}" y="{y - 19}" width="{right - left}" '
                'height="25" rx="4"/>'
            )
        lift = -6 if kind == "arrow" else -2
        out.append(
            f'<text x="{(a + b) / 2}" y="{y + lift}" text-anchor="middle">{escape(label)}</text>'
        )
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    """Write the picture of every description in this folder."""
    for source in sorted(Path(__file__).parent.glob("*.txt")):
        source.with_suffix(".svg").write_text(draw(source.read_text()))
        sys.stdout.write(f"{source.with_suffix('.svg').name}\n")


if __name__ == "__main__":
    main()
