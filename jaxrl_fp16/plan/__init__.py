"""A config's programs, compiled for a machine that is not there: what fits, what crosses the wires, how long."""
