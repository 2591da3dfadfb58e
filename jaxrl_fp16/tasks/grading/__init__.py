"""A pool of worker processes, and the algebra that runs in it. Imports no JAX."""
