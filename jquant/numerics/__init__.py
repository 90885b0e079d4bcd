"""Bits and errors of arrays: float formats, noise, distortion, extremes, what compilers undo."""
