"""Values of the recipe field `model`: a model of `megabatch.nn`, of timm or torchvision, or a function of a file."""

from difflib import get_close_matches

from megabatch.user_code import is_function, short_name

MODELS = ("resnet8", "vgg8", "resnet18", "resnet34", "resnet50", "alexnet", "alexnet_bn")
"""Models of `megabatch.nn`."""

STEMS = dict.fromkeys(("resnet18", "resnet34", "resnet50"), ("auto", "small", "large")) | {
    "resnet8": ("auto", "pooled"),
    "vgg8": ("auto", "whitened"),
}
"""Stems of the models that have a choice."""

LIBRARIES = ("timm", "torchvision")
_FORMS = f"{', '.join(MODELS)}, timm:NAME, torchvision:NAME, or FILE.py:FUNCTION with --model"


def is_own(model: str) -> bool:
    """True for the models of `megabatch.nn`, which the recipe's seed, initialisation and width shape."""
    return model in MODELS


def split_library(model: str) -> tuple[str, str] | None:
    """Returns ("timm", NAME) or ("torchvision", NAME); None for another model."""
    library, colon, name = model.partition(":")
    return (library, name) if colon and library in LIBRARIES else None


def fault(model: str) -> str | None:
    """Returns what is needed in place of an invalid name, and a name that works; None for a valid one.

    Names of timm and torchvision are looked up when the model is made, since that imports torch.
    """
    if is_function(model) and short_name(model) != model:
        return f"a file without its folder; --model {model} works"
    if is_own(model) or is_function(model) or (split_library(model) or ("", ""))[1]:
        return None
    near = get_close_matches(model, MODELS, n=1, cutoff=0.5) or ["resnet50"]
    return f"{_FORMS}; model={near[0]} works"
