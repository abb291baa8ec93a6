"""When a model is compiled and when it is not; with a stand-in for the compiler."""

import pytest
import torch
from torch import nn

from megabatch.errors import SettingsError
from megabatch.train.compiled import CompiledModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler itself


def counting_model():
    """A compiled model, the shapes that were compiled, and how many forwards ran compiled."""
    torch._dynamo.reset()
    shapes, runs = [], []

    def backend(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if x.ndim == 2 and x.shape != (3, 2)])

        def run(*arguments):
            runs.append(1)
            return graph(*arguments)

        return run

    return CompiledModel(nn.Linear(2, 3), backend=backend), shapes, runs


def test_a_shape_is_compiled_when_it_comes_again_and_one_that_comes_once_never():
    model, shapes, runs = counting_model()
    x = torch.randn(8, 2)
    expected = model.module(x)
    for _ in range(4):
        torch.testing.assert_close(model(x), expected)
    model(torch.randn(5, 2))
    assert shapes == [[(8, 2)]]
    assert len(runs) == 3
    for _ in range(2):
        model(torch.randn(6, 2))
    assert shapes == [[(8, 2)], [(6, 2)]]


def test_evaluation_is_not_compiled():
    model, shapes, _ = counting_model()
    model.eval()
    for _ in range(3):
        model(torch.randn(8, 2))
    assert shapes == []


def test_the_wrapper_shares_the_modules_parameters_and_has_each_once():
    module = nn.Linear(2, 3)
    model = CompiledModel(module, backend="eager")
    assert [id(p) for p in model.parameters()] == [id(p) for p in module.parameters()]
    assert list(module.state_dict()) == ["weight", "bias"]


def test_a_compiler_that_fails_is_a_clear_mistake_of_the_site():
    torch._dynamo.reset()

    def backend(graph, inputs):
        raise RuntimeError("no C++ compiler")

    model = CompiledModel(nn.Linear(2, 3), backend=backend)
    model(torch.randn(8, 2))
    with pytest.raises(SettingsError, match="compile=False works"):
        model(torch.randn(8, 2))
