"""`python -m hafrm` is the command line; launchers such as torchrun start it so."""

from hafrm.cli import main

main()
