"""Weights that are learned together on an objective of a stage or of the whole network."""
