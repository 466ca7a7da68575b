"""The commands of the lab: ``python -m benchmarks.lab COMMAND``."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any, NoReturn

import click

from benchmarks.lab import Lab, LabError, state
from benchmarks.lab.cluster import MTU, NAME, exits_when_told

_AS_GIVEN = {"ignore_unknown_options": True, "allow_interspersed_args": False}


class _Commands(click.Group):
    """Commands whose `LabError` is one line for the user."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except LabError as error:
            raise click.ClickException(str(error)) from error


_named = click.option(
    "--name", default=NAME, show_default=True, help="Which lab, if there are several."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Several hosts on this machine, with rate-limited links. Needs root.

    \b
    python -m benchmarks.lab up --hosts 8 --rate 1gbit
    python -m benchmarks.lab run -n 8 train.py
    python -m benchmarks.lab down
    """
    click.get_current_context().with_resource(exits_when_told())


@main.command()
@click.option("--hosts", default=8, show_default=True, help="How many.")
@click.option("--rate", default="none", help="What each link carries, such as 1gbit. [none]")
@click.option("--rate-of", multiple=True, metavar="HOST=RATE", help="A link that differs.")
@click.option("--mtu", default=MTU, show_default=True, help="Bytes of the longest packet.")
@click.option("--subnet", metavar="A.B.C", help="Of the addresses; follows from the name.")
@_named
def up(
    hosts: int, rate: str, rate_of: tuple[str, ...], mtu: int, subnet: str | None, name: str
) -> None:
    """Build the lab; after an error nothing of it is left."""
    rates = {}
    for word in (word for words in rate_of for word in words.split(",")):
        host, equals, its = word.partition("=")
        if not host.isdecimal() or not equals:
            raise LabError(f"rate-of {word!r} is not HOST=RATE, such as 3=100mbit")
        rates[int(host)] = _rate(its)
    lab = Lab(hosts, _rate(rate), rates=rates, mtu=mtu, name=name, subnet=subnet)
    lab.up()
    try:
        made = _table(lab)
    except BaseException:
        lab.down()
        raise
    click.echo(made)


def _rate(word: str) -> str | None:
    return None if word == "none" else word


@main.command(context_settings=_AS_GIVEN)
@click.option("-n", "--ranks", type=click.IntRange(min=1), help="How many; one a host by default.")
@click.option("--mpirun-args", default="", metavar="WORDS", help="As for 'hopcoll run'.")
@click.option("--restarts", type=int, default=0, metavar="N", help="As for 'hopcoll run'.")
@_named
@click.argument("program", nargs=-1, type=click.UNPROCESSED, required=True)
def run(
    ranks: int | None, mpirun_args: str, restarts: int, name: str, program: tuple[str, ...]
) -> NoReturn:
    """Run PROGRAM by 'hopcoll run' over all hosts; the exit code is the job's."""
    options = ["--restarts", str(restarts)]
    lab = Lab.opened(name)
    _become(lab.command(_bare(program), ranks, shlex.split(mpirun_args), options))


@main.command()
@_named
def down(name: str) -> None:
    """Kill all processes of the lab and take it down."""
    click.echo(f"lab {name!r} is {'down' if Lab.take_down(name) else 'not up'}")


@main.command()
@_named
def status(name: str) -> None:
    """Show the hosts, their rates, their cables and how many processes run on them."""
    known = state.load(name)
    if known is None:
        others = [other for other in state.names() if other != name]
        click.echo(f"lab {name!r} is not up" + (f"; up: {', '.join(others)}" if others else ""))
        return
    click.echo(_table(Lab.opened(name)))


def _table(lab: Lab) -> str:
    lines = [("host", "name", "address", "rate", "cable", "processes")]
    for host in lab.hosts:
        layout = lab.layout
        cable = "plugged" if lab.has_cable(host) else "pulled"
        facts = (layout.namespace(host), layout.address(host), layout.rates[host - 1] or "none")
        lines.append((str(host), *facts, cable, str(len(lab.pids(host)))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (zip(line, widths, strict=True) for line in lines)
    return "\n".join("  ".join(cell.ljust(width) for cell, width in row).rstrip() for row in rows)


@main.command()
@click.argument("host", type=int)
@click.argument("what", type=click.Choice(["pull", "plug"]))
@_named
def cable(host: int, what: str, name: str) -> None:
    """Pull the cable of HOST, or plug it in again."""
    Lab.opened(name).cable(host, plugged=what == "plug")


@main.command()
@click.argument("host", type=int)
@_named
def lose(host: int, name: str) -> None:
    """Kill every process on HOST at once, the launcher's daemon with them."""
    count = Lab.opened(name).lose(host)
    if not count:
        raise LabError(f"host {host} was not lost: nothing ran on it")
    click.echo(f"host {host} lost: {count} processes killed")


@main.command(context_settings=_AS_GIVEN)
@_named
@click.argument("host", type=int)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def shell(host: int, command: tuple[str, ...], name: str) -> NoReturn:
    """Run COMMAND, or a shell, on HOST; the exit code is its own."""
    _become(
        Lab.opened(name).inside(host, *(_bare(command) or (os.environ.get("SHELL", "/bin/sh"),)))
    )


def _bare(words: tuple[str, ...]) -> tuple[str, ...]:
    return words[1:] if words[:1] == ("--",) else words


def _become(words: list[str]) -> NoReturn:
    """Go on as another program, which then gets every signal itself."""
    sys.stdout.flush()
    try:
        os.execvp(words[0], words)
    except OSError as error:
        raise LabError(f"{words[0]} cannot be executed: {error}") from error


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.lab")
