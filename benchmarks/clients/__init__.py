"""Exports through the engines that they are for, each in an environment of its own.

`./run clients [CLIENT ...]` makes the environments where they are not there, exports a small random
Llama in every flavour, and has each engine say how far its logits are from `jquant.apply`'s.
"""
