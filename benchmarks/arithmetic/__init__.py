"""Low-precision arithmetic: a heat column, attractors, shallow water, an atmosphere; its cost."""
