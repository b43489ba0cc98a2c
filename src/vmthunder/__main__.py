"""`python -m vmthunder` is the command line."""

from vmthunder.cli.main import main

main()
