"""KL of other tools on the tokens of `quality`: quoted, not run here."""

# Measured elsewhere with these tokens, this model and this grid, and quoted, not run here.
OTHERS = {
    "W4 g64": {"nearest": 0.2962, "HQQ": 0.191, "GPTQ block by block": 0.105},
    "W3 g64": {"nearest": 1.1800, "HQQ": 1.985, "GPTQ natural order": 0.664,
               "GPTQ block by block": 0.429, "llm-compressor 0.14": 0.435, "GPTQModel 7.2": 0.450},
    "W3 channel": {"nearest": 3.245, "HQQ": 7.00, "GPTQ block by block": 0.970},
    "W2 g64": {"nearest": 10.0, "HQQ": 10.7, "GPTQ block by block": 3.85},
}  # fmt: skip
