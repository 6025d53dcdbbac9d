"""`python -m lavender` is the `lavender` command."""

from .cli import main

main()
