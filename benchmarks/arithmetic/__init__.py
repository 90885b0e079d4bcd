"""Low-precision arithmetic: a heat column, Lorenz's attractors, shallow water; what it costs."""
