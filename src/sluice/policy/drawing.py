"""A graph as DOT, SVG and HTML, made here: no other program is needed to look at a policy."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterable
from html import escape as html
from typing import NamedTuple

from sluice.policy.graph import Common, Edge, Graph, Node
from sluice.policy.layout import Box, Layout, Point, arrange

_LINE = 18
_SHOWN = 8
_WIDE = 110  # characters of a line that is told in words
_DENSE = 250  # more lines than that are drawn thin and without their labels
_ALLOW, _ASK = "#b3261e", "#c77700"
_STYLE = """
svg { background: #ffffff; font-family: "DejaVu Sans", Verdana, sans-serif; font-size: 12px; }
.box { fill: #ffffff; stroke-width: 2.5; }
.keyword { stroke-dasharray: 5 4; }
.edge path { fill: none; stroke-width: 1.6; }
.edge text { font-size: 10.5px; paint-order: stroke; stroke: #ffffff; stroke-width: 4px;
  stroke-linejoin: round; text-anchor: middle; }
.allow path { stroke: #b3261e; } .allow text { fill: #8c1d18; }
.ask path { stroke: #c77700; stroke-dasharray: 7 3; } .ask text { fill: #8a5300; }
.dense .edge path { stroke-width: 0.9; opacity: 0.6; } .dense .edge text { display: none; }
.faint { opacity: 0.08; } .gone { display: none; }
"""


def to_dot(graph: Graph) -> str:
    """Return the graph in the language of Graphviz; colours as in section 21.1."""
    lines = ["digraph g {"]
    if graph.common:
        told = "\\l".join(_dot(line) for line in _caption(graph))
        lines.append(f'  label = "{told}\\l";')
    for node in graph.nodes:
        label = "\\n".join(_dot(member.name) for member in node.members)
        style = "style = dotted" if node.name[0] == "@" else "penwidth = 3"
        colour = node.members[0].colour
        lines.append(f'  "{_dot(node.name)}" [label = "{label}", color = "{colour}", {style}];')
    for edge in graph.edges:
        for services, colour in ((edge.allowed, "red"), (edge.asked, "orange")):
            if services:
                label = "\\n".join(map(_dot, services))
                ends = f'"{_dot(edge.source)}" -> "{_dot(edge.target)}"'
                lines.append(f'  {ends} [label="{label}" color={colour}];')
    return "\n".join([*lines, "}", ""])


def _caption(graph: Graph) -> list[str]:
    """Return what is told in words: the services of all domains, a line each."""
    lines: list[str] = []
    for target, group in _by_target(graph):
        lines.append(target)
        for common in group:
            lines += textwrap.wrap(
                str(common),
                _WIDE,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return lines


def _by_target(graph: Graph) -> list[tuple[str, list[Common]]]:
    groups: dict[str | None, list[Common]] = {}
    for common in graph.common:
        groups.setdefault(common.target, []).append(common)
    return [
        ("Between any two domains:" if target is None else f"From any domain to {target}:", group)
        for target, group in groups.items()
    ]


def _dot(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


class _Line(NamedTuple):
    edge: Edge
    kind: str
    services: tuple[str, ...]


def to_svg(graph: Graph, title: str = "Permitted calls") -> str:
    """Return the drawing as a stand-alone SVG document."""
    body, layout = _body(graph)
    caption = _caption(graph)
    below = _LINE * len(caption)
    longest = max(map(len, caption), default=0) * 7.0 + 60
    width, height = round(max(layout.width, longest)), round(layout.height + below + 20)
    words = "".join(
        f'<text x="{30 + 4 * (len(line) - len(line.lstrip()))}" y="{y:.0f}">'
        f"{html(line.lstrip())}</text>\n"
        for y, line in zip(itertools.count(layout.height + _LINE, _LINE), caption, strict=False)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img">\n'
        f"<title>{html(title)}</title>\n<style>{_STYLE}</style>\n{body}{words}</svg>\n"
    )


def _body(graph: Graph) -> tuple[str, Layout]:
    sizes = {node.name: _size(node) for node in graph.nodes}
    lines = [
        _Line(edge, kind, services)
        for edge in graph.edges
        for kind, services in (("allow", edge.allowed), ("ask", edge.asked))
        if services
    ]
    layout = arrange(sizes, [(edge.source, edge.target) for edge in graph.edges])
    parts = [
        f"<defs>{_marker('allow', _ALLOW)}{_marker('ask', _ASK)}</defs>\n",
        f'<g id="lines" class="{"dense" if len(lines) > _DENSE else "few"}">\n',
        *(_draw_line(number, line, layout) for number, line in enumerate(lines)),
        "</g>\n",
        *(_draw_node(node, layout.boxes[node.name]) for node in graph.nodes),
    ]
    return "".join(parts), layout


def _marker(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}-head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        f'markerHeight="8" orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" '
        f'fill="{colour}"/></marker>'
    )


def _shown(node: Node) -> list[tuple[str, str]]:
    """Return text and colour of each line of a box."""
    members = node.members
    lines = [(member.name, member.colour) for member in members[:_SHOWN]]
    if len(members) > _SHOWN:
        lines.append((f"and {len(members) - _SHOWN} more", "none"))
    return lines


def _size(node: Node) -> tuple[float, float]:
    lines = _shown(node)
    return max(len(text) for text, _ in lines) * 7.4 + 40.0, len(lines) * _LINE + 14.0


def _draw_node(node: Node, box: Box) -> str:
    left, top = box.x - box.width / 2, box.y - box.height / 2
    kind = "box keyword" if node.name[0] == "@" else "box"
    colours = {member.colour for member in node.members}
    border = colours.pop() if len(colours) == 1 else "#888888"
    names = " ".join(member.name for member in node.members)
    parts = [
        f'<g class="node" data-names="{html(names)}"><title>{html(names)}</title>'
        f'<rect class="{kind}" x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" '
        f'height="{box.height:.1f}" rx="7" stroke="{border}"/>'
    ]
    for number, (text, colour) in enumerate(_shown(node)):
        y = top + 7 + _LINE * (number + 0.5)
        parts.append(
            f'<circle cx="{left + 14:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
            f'<text x="{left + 25:.1f}" y="{y + 4:.1f}">{html(text)}</text>'
        )
    return "".join([*parts, "</g>\n"])


def _draw_line(number: int, line: _Line, layout: Layout) -> str:
    edge = line.edge
    source, target = layout.boxes[edge.source], layout.boxes[edge.target]
    # An allow and an ask between the same boxes run side by side.
    shift = 0.0 if not (edge.allowed and edge.asked) else (-5.0 if line.kind == "allow" else 5.0)
    path, middle = _route(source, target, layout.lines[edge.source, edge.target], shift, number)
    label = line.services[0] if len(line.services) == 1 else f"{len(line.services)} services"
    if len(line.services) == 2 and sum(map(len, line.services)) < 34:
        label = ", ".join(line.services)
    everything = "\n".join(line.services)
    tooltip = f"{edge.source} to {edge.target}, {line.kind}:\n{everything}"
    return (
        f'<g class="edge {line.kind}" data-services="{html(" ".join(line.services))}" '
        f'data-ends="{html(edge.source)} {html(edge.target)}"><title>{html(tooltip)}</title>'
        f'<path d="{path}" marker-end="url(#{line.kind}-head)"/>'
        f'<text x="{middle[0]:.1f}" y="{middle[1]:.1f}">{html(label)}</text></g>\n'
    )


def _route(
    source: Box, target: Box, bends: list[Point], shift: float, number: int
) -> tuple[str, Point]:
    """Return the path of a line and where its label goes."""
    if source is target:
        x, y = source.x + source.width / 2, source.y + shift
        path = f"M{x:.1f} {y - 8:.1f}C{x + 60:.1f} {y - 34:.1f} {x + 60:.1f} {y + 34:.1f} "
        return f"{path}{x:.1f} {y + 8:.1f}", (x + 78.0, y + 3)
    if abs(source.x - target.x) < 1:  # one column: round by the right
        x1, x2 = source.x + source.width / 2, target.x + target.width / 2
        y1, y2 = source.y + shift, target.y + shift
        out = max(x1, x2) + 40 + abs(y2 - y1) / 8
        path = f"M{x1:.1f} {y1:.1f}C{out:.1f} {y1:.1f} {out:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        return path, (out - 8, (y1 + y2) / 2)
    way = 1.0 if target.x > source.x else -1.0
    # Lines back run a little lower, so that a call and its counterpart do not cover each other.
    back = 0.0 if way > 0 else 7.0
    points = [
        (source.x + way * source.width / 2, source.y + shift + back),
        *((x, y + shift + back) for x, y in bends),
        (target.x - way * target.width / 2, target.y + shift + back),
    ]
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
        reach = (x2 - x1) * 0.45
        path += f"C{x1 + reach:.1f} {y1:.1f} {x2 - reach:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    (x1, y1), (x2, y2) = points[0], points[1]
    # Labels of neighbouring lines at different places along them.
    part = (0.42, 0.5, 0.58)[number % 3]
    ease = part * part * (3 - 2 * part)
    return path, (x1 + (x2 - x1) * part, y1 + (y2 - y1) * ease - 4)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<style>
body {{ font-family: "DejaVu Sans", Verdana, sans-serif; margin: 16px; color: #222; }}
h1 {{ font-size: 18px; }} label {{ margin-right: 14px; }} select {{ font-size: 13px; }}
details {{ margin-top: 12px; }} summary {{ cursor: pointer; }}
.legend span {{ margin-right: 14px; }} .allow-key {{ color: #8c1d18; }}
.ask-key {{ color: #8a5300; }}
#drawing {{ overflow: auto; border: 1px solid #ddd; margin-top: 12px; }}
{style}
</style></head><body>
<h1>{title}</h1>
<p><label>Service <select id="service"><option value="">all</option></select></label>
<label>Domain <select id="domain"><option value="">all</option></select></label>
<label><input type="checkbox" id="ask" checked> questions too</label></p>
<p class="legend"><span class="allow-key">&#8212; allowed</span>
<span class="ask-key">&#8212; asked</span> Rest the pointer on a line to see its services,
on a box to see its lines.</p>
{common}
<div id="drawing"><svg width="{width}" height="{height}"
 viewBox="0 0 {width} {height}">{body}</svg></div>
<script>
"use strict";
const lists = {lists};
const edges = [...document.querySelectorAll(".edge")];
const nodes = [...document.querySelectorAll(".node")];
for (const name of ["service", "domain"]) {{
  const select = document.getElementById(name);
  for (const value of lists[name]) {{
    const option = document.createElement("option");
    option.value = option.textContent = value;
    select.append(option);
  }}
  select.onchange = filter;
}}
document.getElementById("ask").onchange = filter;
const lines = document.getElementById("lines");
const words = (element, key) => element.dataset[key].split(" ");
const boxOf = new Map(nodes.map(node => [words(node, "names")[0], node]));
function filter() {{
  const service = document.getElementById("service").value;
  const domain = document.getElementById("domain").value;
  const ask = document.getElementById("ask").checked;
  const used = new Set();
  let count = 0;
  for (const edge of edges) {{
    const ends = words(edge, "ends");
    const near = !domain || ends.some(end => words(boxOf.get(end), "names").includes(domain));
    const fits = !service || lists.of[edge.dataset.services].includes(service);
    const shown = near && fits && (ask || !edge.classList.contains("ask"));
    edge.classList.toggle("gone", !shown);
    if (shown) {{
      count += 1;
      ends.forEach(end => used.add(boxOf.get(end)));
    }}
  }}
  lines.classList.toggle("dense", count > {dense});
  for (const node of nodes) node.classList.toggle("gone", !used.has(node));
}}
for (const node of nodes) {{
  node.onmouseenter = () => edges.forEach(edge =>
    edge.classList.toggle("faint", !words(edge, "ends").includes(words(node, "names")[0])));
  node.onmouseleave = () => edges.forEach(edge => edge.classList.remove("faint"));
}}
</script></body></html>
"""


def to_html(graph: Graph, title: str = "Permitted calls") -> str:
    """Return one page with the drawing and its filters; it loads nothing from anywhere."""
    body, layout = _body(graph)
    told = "".join(
        f"<p>{html(where)}</p><ul>{''.join(f'<li>{html(str(c))}</li>' for c in group)}</ul>"
        for where, group in _by_target(graph)
    )
    if told:
        opened = " open" if len(graph.common) <= _SHOWN else ""
        summary = "What (nearly) every domain may call, which is not drawn"
        told = f"<details{opened}><summary>{summary}</summary>{told}</details>"
    services = sorted({name for edge in graph.edges for name in (*edge.allowed, *edge.asked)})
    domains = sorted(member.name for node in graph.nodes for member in node.members)
    # The services of a line by the text of its attribute: names may contain spaces.
    of = {" ".join(group): group for edge in graph.edges for group in (edge.allowed, edge.asked)}
    return _PAGE.format(
        title=html(title),
        style=_STYLE,
        width=round(layout.width),
        height=round(layout.height),
        body=body,
        common=told,
        dense=_DENSE,
        lists=_script({"service": services, "domain": domains, "of": of}),
    )


def _script(value: dict[str, Iterable[str] | dict[str, tuple[str, ...]]]) -> str:
    """Return a value as JSON that cannot end the script element that it stands in."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e")
