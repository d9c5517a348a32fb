"""`python -m devinterp`."""

from devinterp.cli import main

main()
