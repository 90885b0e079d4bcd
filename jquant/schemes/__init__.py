"""What is chosen for a weight: grid, rounding, and parts beside it; plans, presets, papers."""
