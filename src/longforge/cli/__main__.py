"""`python -m longforge.cli` is the command."""

from longforge.cli import main

main()
