"""`python -m sdlite` is the `sdlite` command."""

from sdlite.cli import main

main()
