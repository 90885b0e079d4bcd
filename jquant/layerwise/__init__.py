"""One weight at a time: what is checked before, how it is solved, and what comes out."""
