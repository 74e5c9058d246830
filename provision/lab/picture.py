"""The topology with what its nodes say: as text for a terminal, and as SVG."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape

from provision.lab.live import DOWN, STARTING, TROUBLED, UP, Seen
from provision.lab.topology import Link, Node, Topology

_SIGNS = {UP: "●", STARTING: "◌", TROUBLED: "▲", DOWN: "✗"}
# Colours that people who do not tell red from green tell apart, too; the sign says the same.
_COLOURS = {UP: "#2a7f62", STARTING: "#8a8a8a", TROUBLED: "#c77700", DOWN: "#a4262c"}
_UNKNOWN = Seen(STARTING, ("not asked",))
# The order from clients to real servers, in which rows of nodes and the links between them alternate.
_ROWS = ("client",), ("router",), ("director",), ("core",), ("realserver",)


def text(topology: Topology, seen: Mapping[str, Seen]) -> list[str]:
    """Lines for a terminal, from the clients down to the real servers."""
    lines: list[str] = []
    drawn: set[str] = set()
    for kinds in _ROWS:
        nodes = topology.of(*kinds)
        for node in nodes:
            lines += _node_lines(topology, node, seen.get(node.name, _UNKNOWN))
        for link in _below(topology, nodes, drawn):
            drawn.add(link.name)
            lines.append(f"  ║ {_title(link)}")
    return lines


def _node_lines(topology: Topology, node: Node, seen: Seen) -> list[str]:
    plugs = []
    for _, plug in topology.plugs(node.name):
        cut = " CUT" if plug.nic in seen.cut else ""
        plugs.append(f"{plug.nic} {' '.join(address.split('/')[0] for address in plug.addresses)}{cut}")
    head = f"{_SIGNS[seen.state]} {node.name}  {seen.state}   {'; '.join(plugs)}"
    return [head, *(f"      {fact}" for fact in seen.facts)]


def _title(link: Link) -> str:
    return f"{link.name}  {', '.join(map(str, link.networks))}".rstrip()


def _below(topology: Topology, nodes: Sequence[Node], drawn: set[str]) -> list[Link]:
    """The links of a row's nodes that have not been drawn: those that lead on."""
    names = {node.name for node in nodes}
    return [link for link in topology.links if link.name not in drawn and any(p.node in names for p in link.plugs)]


# --- SVG

_WIDTH, _GAP, _LINE, _PAD = 300, 24, 15, 10
_CHARACTERS, _CHARACTER = 42, 6.6
_LINK = 44  # from the row above a link to the one below it


def svg(topology: Topology, seen: Mapping[str, Seen], title: str) -> str:
    """The picture.

    Args:
        topology: what is drawn.
        seen: what the nodes have said.
        title: what stands above.
    """
    rows = [nodes for kinds in _ROWS if (nodes := topology.of(*kinds))]
    width = max(len(nodes) for nodes in rows) * (_WIDTH + _GAP) + _GAP
    boxes: dict[str, tuple[float, float, float]] = {}  # middle, top, bottom
    bars: dict[str, float] = {}
    body: list[str] = []
    y = 40.0
    for nodes in rows:
        heights = []
        for number, node in enumerate(nodes):
            lines = _box_lines(topology, node, seen.get(node.name, _UNKNOWN))
            height = len(lines) * _LINE + 2 * _PAD
            x = (width - len(nodes) * (_WIDTH + _GAP) + _GAP) / 2 + number * (_WIDTH + _GAP)
            boxes[node.name] = (x + _WIDTH / 2, y, y + height)
            body += _box(x, y, height, node, seen.get(node.name, _UNKNOWN), lines)
            heights.append(height)
        y += max(heights)
        for link in _below(topology, nodes, set(bars)):
            y += _LINK
            bars[link.name] = y
        y += _LINK if nodes is not rows[-1] else _GAP
    cables = [
        _cable(boxes[p.node], bars[link.name], seen.get(p.node, _UNKNOWN), p.nic)
        for link in topology.links
        for p in link.plugs
    ]
    bar_lines = [line for link in topology.links for line in _bar(link, bars[link.name], width)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {y:g}" width="{width:g}" height="{y:g}"'
            ' font-family="monospace" font-size="11">',
            f'<rect width="{width:g}" height="{y:g}" fill="#ffffff"/>',
            f'<text x="{_GAP}" y="24" font-size="14" font-weight="bold">{escape(title)}</text>',
            *cables,
            *bar_lines,
            *body,
            "</svg>",
            "",
        ]
    )


def _box_lines(topology: Topology, node: Node, seen: Seen) -> list[str]:
    plugs = [f"{plug.nic}: {address}" for _, plug in topology.plugs(node.name) for address in plug.addresses]
    return [
        part
        for line in (f"{_SIGNS[seen.state]} {node.name}  {seen.state}", *plugs, *seen.facts)
        for part in textwrap.wrap(line, _CHARACTERS, subsequent_indent="    ", break_on_hyphens=False)
    ]


def _box(x: float, y: float, height: float, node: Node, seen: Seen, lines: Sequence[str]) -> list[str]:
    colour = _COLOURS[seen.state]
    out = [
        f'<g id="{escape(node.name)}"><rect x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{height:g}" rx="4"'
        f' fill="#ffffff" stroke="{colour}" stroke-width="2"/>'
    ]
    for number, line in enumerate(lines):
        bold = f' font-weight="bold" fill="{colour}"' if number == 0 else ""
        words = line.lstrip()
        at = x + _PAD + (len(line) - len(words)) * _CHARACTER
        out.append(f'<text x="{at:g}" y="{y + _PAD + (number + 0.8) * _LINE:g}"{bold}>{escape(words)}</text>')
    return [*out, "</g>"]


def _cable(box: tuple[float, float, float], bar: float, seen: Seen, nic: str) -> str:
    middle, top, bottom = box
    end, offset = (bottom, -8) if bar > bottom else (top, 8)
    gone = nic in seen.cut or seen.state == DOWN
    style = f'stroke="{_COLOURS[DOWN]}" stroke-dasharray="4 4"' if gone else 'stroke="#444444"'
    return f'<path d="M{middle + offset:g} {end:g}V{bar:g}" {style} stroke-width="2"/>'


def _bar(link: Link, y: float, width: float) -> list[str]:
    return [
        f'<path d="M{_GAP} {y:g}H{width - _GAP:g}" stroke="#1f4e79" stroke-width="4"/>',
        # With a white edge: cables end beside the words, not in them.
        f'<text x="{_GAP}" y="{y - 6:g}" fill="#1f4e79" stroke="#ffffff" stroke-width="4" paint-order="stroke">'
        f"{escape(_title(link))}</text>",
    ]
