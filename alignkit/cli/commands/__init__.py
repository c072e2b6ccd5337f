"""One module for each command of the command line; they contain typer functions only."""
