"""Networks of other people's packages, quantized in environments of their own.

    python -m benchmarks.zoo                  # every package: makes the environments, half an hour
    python -m benchmarks.zoo tunix penzai     # some; results of the others stay

Each file that is named after a package holds recipes: callables that return `(fn, params, batches)`
of a small random network made of the package's own classes. So they are for the command line too:

    jquant quantize benchmarks.zoo.tunix:qwen3 -o out --recipe int4-gptq --group 32

`packages.py` says what is installed and which recipes there are, `measure.py` what is measured.
"""
