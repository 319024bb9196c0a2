"""``sluice policy graph``: a picture of the permitted calls, made without any other program."""

from __future__ import annotations

import click

from sluice.cli.policy_common import Place, check_domain, place_options, tell_policy_errors
from sluice.policy.drawing import to_dot, to_html, to_svg
from sluice.policy.graph import build

_WRITERS = {"svg": to_svg, "html": to_html, "dot": to_dot}


@click.command(short_help="Draw who may call whom: SVG, HTML, DOT.")
@click.option(
    "--format",
    "form",
    type=click.Choice(sorted(_WRITERS)),
    help="By default what the name of FILE ends in, else svg.",
)
@click.option("-o", "--output", metavar="FILE", help="Write to FILE instead of standard output.")
@click.option("--service", "services", multiple=True, metavar="SERVICE[+ARG]")
@click.option("--domain", "domains", multiple=True, metavar="NAME")
@click.option("--no-ask", is_flag=True, help="Leave out what a person would have to allow.")
@click.option("--expand", is_flag=True, help="Fold and leave out nothing.")
@place_options
@tell_policy_errors
def command(
    form: str | None,
    output: str | None,
    services: tuple[str, ...],
    domains: tuple[str, ...],
    no_ask: bool,
    expand: bool,
    place: Place,
) -> None:
    """Draw who may call whom, as SVG, as a page with filters (HTML), or in DOT."""
    info = place.info()
    for name in domains:
        check_domain(info, name)
    graph = build(
        place.load(),
        info,
        services=services,
        domains=domains,
        include_ask=not no_ask,
        fold=not expand,
    )
    if form is None:
        ending = (output or "").rpartition(".")[2]
        form = ending if ending in _WRITERS else "svg"
    text = _WRITERS[form](graph)
    if output is None:
        click.echo(text, nl=False)
        return
    with open(output, "w", encoding="utf-8") as stream:
        stream.write(text)
