"""A quantized weight as an array of a tree, and the choice of what is done to its inputs."""
