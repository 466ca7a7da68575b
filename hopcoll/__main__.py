"""``python -m hopcoll``: the command ``hopcoll``."""

from hopcoll.cli import main

main(prog_name="hopcoll")
