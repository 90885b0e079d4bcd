"""What is installed for each package, and its recipes: data, for Python without any of them.

Versions are pinned, so that a result can be had again. `bare` is installed without dependencies:
packages that ask for more than their models need (data sets, servers, CUDA).
"""

from __future__ import annotations

from dataclasses import dataclass

BASE = ("jax==0.10.2", "flax==0.12.8")  # of all environments, beside jquant and its command line
GROUP = 32  # inputs that share a scale


@dataclass(frozen=True)
class Recipe:
    """A network of a package.

    Attributes:
        name: what it is, in a few words.
        maker: `module:function` that returns `(fn, params, batches)`.
        ignore: what `find_weights` has to be told to leave out, or None.
        arguments: what `jquant quantize` has to be told besides.
    """

    name: str
    maker: str
    ignore: str | None = None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Package:
    """An environment.

    Attributes:
        name: of the file with its recipes.
        recipes: its networks.
        requirements: what pip installs beside `BASE`, pinned.
        bare: what is installed after them, without dependencies.
        python: the version of Python.
    """

    name: str
    recipes: tuple[Recipe, ...]
    requirements: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    python: str = "3.12"


def _recipe(package: str, function: str, name: str, **options: object) -> Recipe:
    return Recipe(name, f"benchmarks.zoo.{package}:{function}", **options)  # type: ignore[arg-type]


# Three colours are no group of 32.
STEM = ("--rule", ".*stem.*=keep")
LAYERS = ("--rule", ".*layers/[03]/.*=keep")
FIRST = ("--rule", ".*initial_conv.*=keep")

PACKAGES = (
    Package(
        "tunix",
        (
            _recipe("tunix", "qwen3", "Qwen3"),
            _recipe("tunix", "llama3", "Llama 3"),
            _recipe("tunix", "gemma3", "Gemma 3"),
            _recipe("tunix", "experts", "Qwen3, mixture of experts"),
        ),
        ("einops==0.8.2",),
        ("google-tunix==0.1.7", "qwix==0.1.8"),
    ),
    Package(
        "gemma",
        (_recipe("gemma", "make", "Gemma 3"),),
        (
            "einops==0.8.2",
            "etils==1.15.0",
            "lark==1.3.1",
            "ml-collections==1.1.0",
            "immutabledict==4.3.1",
            "typeguard==4.6.1",
            "sentencepiece==0.2.1",
            "protobuf==7.36.2",
            "chex==0.1.92",
        ),
        ("gemma==3.3.0", "kauldron==1.4.2", "clu==0.0.12"),
    ),
    Package(
        "maxtext",
        (
            _recipe("maxtext", "make", "Llama 2, layers on axis 1"),
            _recipe("maxtext", "qwen3", "Qwen3, layers on axis 1"),
        ),
        (  # what its wheel imports and does not ask for
            "jax==0.12.0.1",
            "flax==0.12.12",
            "einops==0.8.2",
            "etils==1.15.0",
            "ml-collections==1.1.0",
            "omegaconf==2.4.0",
            "pydantic==2.14.4",
            "sentencepiece==0.2.3",
            "chex==0.1.92",
            "immutabledict==4.3.1",
            "typeguard==4.6.1",
            "fire==0.7.1",
            "requests==2.34.2",
            "jinja2==3.1.6",
            "uvicorn==0.54.0",
            "fastapi==0.165.0",
            "opentelemetry-api==1.45.2",
            "toolz==1.2.0",
            "tensorboardX==2.6.5",
            "transformers==5.24.0",
            "tiktoken==0.14.0",
            "sympy==1.14.0",
            "pillow==13.0.0",
            "orbax-checkpoint==0.12.8",
            "six==1.17.0",
        ),
        (
            "maxtext==0.2.5",
            "aqtp==0.9.0",
            "qwix==0.1.8",
            "google-tunix==0.1.7",
            "tokamax==0.0.17",
            "xprof==2.24.2",
            "pathwaysutils==0.1.13",
            "einshape==1.0",
            "drjax==0.2.1",
            "grain==0.2.18",
            "array_record==0.8.6",
            "portpicker==1.6.0",
        ),
    ),
    Package(
        "penzai",
        (
            _recipe("penzai", "make", "Llama"),
            _recipe("penzai", "gemma2", "Gemma 2, `LayerStack`"),
        ),
        ("penzai==0.2.5",),
    ),
    Package(
        "haiku",
        (
            _recipe("haiku", "make", "transformer"),
            _recipe("haiku", "stack", "transformer, `layer_stack`"),
            _recipe("haiku", "resnet", "`hk.nets.ResNet`", arguments=FIRST),
        ),
        ("dm-haiku==0.0.17",),
    ),
    Package(
        "equinox",
        (
            _recipe("equinox", "make", "transformer"),
            _recipe("equinox", "convolutions", "convolutions", arguments=LAYERS),
        ),
        ("equinox==0.13.8",),
    ),
    Package(
        "flax",
        (
            _recipe("flax", "make", "NNX transformer"),
            _recipe("flax", "scanned", "NNX transformer, `nnx.scan`"),
            _recipe("flax", "linen", "Linen, convolutions and attention", arguments=STEM),
            _recipe("flax", "recurrent", "Linen, LSTM and bidirectional GRU"),
        ),
    ),
)


def recipe_named(maker: str) -> tuple[Package, Recipe]:
    """The recipe with this maker, and its package."""
    return next((p, r) for p in PACKAGES for r in p.recipes if r.maker == maker)
