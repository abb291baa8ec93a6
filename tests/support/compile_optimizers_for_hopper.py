"""Compiles the optimizers' kernels for an H200, without a GPU; prints the output of `compile_for_hopper.py`.

python tests/support/compile_optimizers_for_hopper.py
"""

import json
import sys
from typing import Any

import torch
from compile_for_hopper import compile_only

from megabatch.optim.kernels.lamb import LambGroup, lamb_step
from megabatch.optim.kernels.lars import LarsGroup, lars_step
from megabatch.optim.kernels.rmsprop import RmspropGroup, rmsprop_step

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lars": (LarsGroup, lars_step, {}),
    "sgd": (LarsGroup, lars_step, {"adapt": False}),
    "sgd corrected": (LarsGroup, lars_step, {"adapt": False, "momentum_form": "inside_corrected"}),
    "lamb": (LambGroup, lamb_step, {}),
    "rmsprop": (RmspropGroup, rmsprop_step, {"rmsprop_lr": 3e-4, "decay": 0.99, "eps": 1e-8}),
}


def group_of(kind: Any, weights: list[torch.Tensor], gradients: list[torch.Tensor], **options: Any) -> Any:
    """A group with bfloat16 copies; its values do not matter, since the kernels are compiled and not run."""
    values = {name: torch.tensor(0.1) for name in (*kind.rates(), kind.carried) if name}
    if "step" in values:
        values["step"] = torch.tensor(1.0, dtype=torch.float64)
    return kind(
        weights=weights,
        gradients=gradients,
        copies=[torch.zeros_like(w, dtype=torch.bfloat16) for w in weights],
        **{name: [torch.zeros_like(w, dtype=torch.float32) for w in weights] for name in kind.state_fields},
        **values,
        **options,
    )


def main() -> None:
    """Compiles for fp32 master weights, 16-bit weights, both gradients, one element, and an unaligned address."""
    torch.set_num_threads(1)
    found = compile_only()
    for name, (kind, step, options) in KINDS.items():
        before = len(found)
        for weight, gradient in ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.half,) * 2):
            weights = [torch.zeros(64, 64, 3, 3, dtype=weight), torch.zeros(64, dtype=weight)]
            gradients = [torch.zeros_like(w, dtype=gradient) for w in weights]
            step([group_of(kind, weights, gradients, **options)], backend="triton")
        step([group_of(kind, [torch.zeros(1)], [torch.zeros(1)], **options)], backend="triton")
        step([group_of(kind, [torch.zeros(5)], [torch.zeros(6)[1:]], **options)], backend="triton")
        for kernel in found[before:]:
            kernel["optimizer"] = name
    for kernel in found:
        sys.stdout.write(json.dumps(kernel) + "\n")


if __name__ == "__main__":
    main()
