"""Batch norm with the 1x1 convolution behind it, by every backend, against autograd in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megabatch.errors import UserError
from megabatch.kernels import tuning
from megabatch.kernels.bottleneck import conv1x1, products, residual
from megabatch.kernels.bottleneck.handover import Handover
from megabatch.kernels.bottleneck.residual import join_conv1x1, norm_conv1x1
from megabatch.kernels.bottleneck.tiles import Tiling
from megabatch.kernels.norm import passes as norm_passes
from megabatch.kernels.norm.batch_norm import norm_act_of
from megabatch.kernels.norm.passes import Moments, Normalisation, moments
from megabatch.kernels.statistics import SpanSums

pytestmark = pytest.mark.usefixtures("interpreter")

EPS = 1e-3
TILING = Tiling(32, 16, 16, 4, 3)
ROUNDING = {torch.float32: 2e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
SHAPE, OUTPUTS, SPAN = (5, 16, 3, 3), 32, 2
CANDIDATES = {"plain passes": "plain", "convolution kernels": TILING.name()}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_passes, "TILE", 512)
    for name in ("FORWARD_TILINGS", "DATA_GRADIENT_TILINGS", "WEIGHT_GRADIENT_TILINGS"):
        monkeypatch.setattr(conv1x1, name, (TILING,))


@pytest.fixture
def candidate(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every task runs this candidate."""
    tuning.use_table(tuning.Table(fixed=dict.fromkeys(residual.TASKS, CANDIDATES[request.param])))
    yield request.param
    tuning.use_table(None)


KINDS = ("norm", "join", "join of two norms")


def draw(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count, inputs, height, width = SHAPE
    return {
        "x": (2 * normal(*SHAPE) + 1).to(dtype),
        "scale": normal(inputs) + 1,
        "shift": normal(inputs),
        "weight": normal(OUTPUTS, inputs, 1, 1) / inputs**0.5,  # in float32, as under autocast
        "residual": normal(*SHAPE).to(dtype),
        "residual scale": normal(inputs) + 1,
        "residual shift": normal(inputs),
        "dy": normal(count, OUTPUTS, height, width).to(dtype),
        "dz": normal(*SHAPE).to(dtype),
    }


def leaves_of(given: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors that have gradients."""
    names = ["x", "scale", "shift", "weight"]
    names += [] if kind == "norm" else ["residual"]
    names += ["residual scale", "residual shift"] if kind == "join of two norms" else []
    return {name: given[name].detach().requires_grad_() for name in names}


def exact(given: dict[str, Tensor], kind: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs and gradients in float64, by autograd through torch's batch norm; the filter is rounded first."""
    wide = {name: t.double() for name, t in given.items()} | {"weight": given["weight"].to(given["x"].dtype).double()}
    leaves = leaves_of(wide, kind)

    def batch_norm(x: str, scale: str, shift: str) -> Tensor:
        parts = torch.split(leaves[x], SPAN)
        vectors = leaves[scale], leaves[shift]
        return torch.cat([functional.batch_norm(part, None, None, *vectors, training=True, eps=EPS) for part in parts])

    total = batch_norm("x", "scale", "shift")
    if kind == "join":
        total = total + leaves["residual"]
    if kind == "join of two norms":
        total = total + batch_norm("residual", "residual scale", "residual shift")
    z = torch.relu(total)
    y = functional.conv2d(z, leaves["weight"])
    loss = (y * wide["dy"]).sum() + (0 if kind == "norm" else (z * wide["dz"]).sum())
    return [z.detach(), y.detach()], torch.autograd.grad(loss, list(leaves.values()))


def ours(given: dict[str, Tensor], kind: str, *, backend: Any) -> tuple[list[Tensor], Moments, tuple[Tensor, ...]]:
    leaves = leaves_of(given, kind)
    options: dict[str, Any] = {"span": SPAN, "eps": EPS, "backend": backend}

    def measured_of(name: str) -> Moments:
        return moments(given[name], span=SPAN, eps=EPS, triton=backend == "triton")

    first = (leaves["x"], measured_of("x"), leaves["scale"], leaves["shift"])
    if kind == "norm":
        y, measured = norm_conv1x1(*first, leaves["weight"], **options)
        pairs: tuple[list[Tensor], list[Tensor]] = ([y], [given["dy"]])
    else:
        if kind == "join of two norms":
            vectors = leaves["residual scale"], leaves["residual shift"]
            options["residual_norm"] = Normalisation.of(measured_of("residual"), *vectors)
        z, y, measured = join_conv1x1(*first, leaves["residual"], leaves["weight"], **options)
        pairs = ([z, y], [given["dz"], given["dy"]])
    gradients = torch.autograd.grad(pairs[0], list(leaves.values()), pairs[1])
    return [t.detach() for t in pairs[0]], measured, gradients


def error(result: Tensor, reference: Tensor) -> float:
    return float((result.double() - reference).norm() / reference.norm().clamp(min=1e-12))


CASES = [
    pytest.param(
        candidate,
        backend,
        dtype,
        id=f"{candidate}, {backend}, {dtype}",
        marks=[] if dtype == torch.float16 else pytest.mark.slow,
    )
    for candidate in CANDIDATES
    for backend in ("triton", "reference")
    for dtype in ROUNDING
    if candidate == "plain passes" or (backend == "triton" and dtype == torch.float16)  # no bf16 in the interpreter
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("candidate", "backend", "dtype"), CASES, indirect=["candidate"])
def test_outputs_moments_and_gradients_are_those_of_float64(
    candidate: str, backend: str, dtype: torch.dtype, kind: str
) -> None:
    given = draw(dtype)
    outputs, expected = exact(given, kind)
    found, measured, gradients = ours(given, kind, backend=backend)
    for mine, reference in zip(found, outputs[-len(found) :], strict=True):
        assert mine.dtype == dtype
        assert error(mine, reference) < 2 * ROUNDING[dtype]
    exact_moments = moments(found[-1].double(), span=SPAN, eps=EPS, triton=False)
    for one, other in zip(measured, exact_moments, strict=True):
        assert error(one, other) < 1e-5
    for name, mine, reference in zip(leaves_of(given, kind), gradients, expected, strict=True):
        assert error(mine, reference) < 4 * ROUNDING[dtype], name
    assert gradients[3].dtype == torch.float32
    again = ours(given, kind, backend=backend)
    assert all(map(torch.equal, gradients, again[2]))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("candidate", CANDIDATES, indirect=True)
def test_the_filters_gradient_has_the_strides_of_the_filter(candidate: str, layout: torch.memory_format) -> None:
    given = draw(torch.float16)
    given["weight"] = given["weight"].contiguous(memory_format=layout)
    _, _, gradients = ours(given, "norm", backend="triton")
    assert gradients[3].stride() == given["weight"].stride()


def chain(given: dict[str, Tensor], *, backend: Any, defers: bool) -> tuple[Tensor, ...]:
    """Gradients through both functions and a batch norm behind them, with or without deferred norm backwards."""
    leaves = chain_leaves(given)
    first, second = (Handover() if defers else None for _ in range(2))
    options: dict[str, Any] = {"span": SPAN, "eps": EPS, "backend": backend}
    found = moments(given["x"], span=SPAN, eps=EPS, triton=backend == "triton")
    y, found = norm_conv1x1(
        leaves["x"], found, leaves["scale"], leaves["shift"], leaves["square"], deferred_from=first, **options
    )
    vectors = leaves["residual scale"], leaves["residual shift"]
    z, y, found = join_conv1x1(
        y, found, *vectors, leaves["residual"], leaves["weight"], defer_to=first, deferred_from=second, **options
    )
    out = norm_act_of(y, found, leaves["last scale"], leaves["last shift"], span=SPAN, defer_to=second, backend=backend)
    return torch.autograd.grad([z, out], list(leaves.values()), [given["dz"], given["dy"]])


def exact_chain(given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The same by autograd in float64, with rounded filters."""
    filters = {name: given[name].to(given["x"].dtype) for name in ("square", "weight")}
    leaves = chain_leaves({name: t.double() for name, t in {**given, **filters}.items()})

    def batch_norm(x: Tensor, name: str) -> Tensor:
        vectors = leaves[f"{name}scale"], leaves[f"{name}shift"]
        parts = torch.split(x, SPAN)
        return torch.cat([functional.batch_norm(part, None, None, *vectors, training=True, eps=EPS) for part in parts])

    y = functional.conv2d(torch.relu(batch_norm(leaves["x"], "")), leaves["square"])
    z = torch.relu(batch_norm(y, "residual ") + leaves["residual"])
    out = torch.relu(batch_norm(functional.conv2d(z, leaves["weight"]), "last "))
    return torch.autograd.grad([z, out], list(leaves.values()), [given["dz"].double(), given["dy"].double()])


def chain_leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    names = ("x", "scale", "shift", "square", "residual", "residual scale", "residual shift", "weight")
    return {name: given[name].detach().requires_grad_() for name in (*names, "last scale", "last shift")}


def draw_chain(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    square = torch.randn(SHAPE[1], SHAPE[1], 1, 1, generator=generator) / SHAPE[1] ** 0.5
    scale, shift = torch.randn(2, OUTPUTS, generator=generator)
    return {**draw(dtype), "square": square, "last scale": scale + 1, "last shift": shift}


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_deferred_norm_backwards_give_the_gradients_of_float64(backend: str) -> None:
    given = draw_chain(torch.float32)
    immediate, deferred = (chain(given, backend=backend, defers=defers) for defers in (False, True))
    for one, other, reference in zip(immediate, deferred, exact_chain(given), strict=True):
        assert torch.equal(one, other)  # torch's convolutions read the same dx in memory
        assert error(other, reference) < 1e-5


@pytest.mark.slow
def test_both_gradient_kernels_apply_a_deferred_norm_backward() -> None:
    given = draw_chain(torch.float16)
    fixed = {**dict.fromkeys(residual.TASKS, TILING.name()), **dict.fromkeys(residual.GRADIENTS, products.TOGETHER)}
    tuning.use_table(tuning.Table(fixed=fixed))
    together, again = (chain(given, backend="triton", defers=True) for _ in range(2))
    tuning.use_table(tuning.Table(fixed=dict.fromkeys(residual.TASKS, TILING.name())))
    apart = chain(given, backend="triton", defers=True)
    tuning.use_table(None)
    for mine, same, other, reference in zip(together, again, apart, exact_chain(given), strict=True):
        assert torch.equal(mine, same)
        assert error(mine, reference) < 1.1 * error(other, reference) + ROUNDING[torch.float16]
        assert error(other, reference) < 0.05


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_are_right_if_one_output_of_a_join_is_unused(used: int) -> None:
    given = draw(torch.float32)
    tuning.use_table(tuning.Table())
    gradients = []
    for backend in ("triton", "reference"):
        leaves = leaves_of(given, "join")
        found = moments(given["x"], span=SPAN, eps=EPS, triton=False)
        first = (leaves["x"], found, leaves["scale"], leaves["shift"])
        options: dict[str, Any] = {"span": SPAN, "eps": EPS, "backend": backend}
        outputs = join_conv1x1(*first, leaves["residual"], leaves["weight"], **options)
        gradients.append(torch.autograd.grad(outputs[used], list(leaves.values()), given["dz" if used == 0 else "dy"]))
    tuning.use_table(None)
    zeroed = {**given, "dy" if used == 0 else "dz": torch.zeros(1)}
    for mine, reference, right in zip(*gradients, exact(zeroed, "join")[1], strict=True):
        for one in (mine, reference):
            torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["norm", "join"])
def test_measuring_candidates_stores_the_moments_once(kind: str) -> None:
    given = draw(torch.float16)
    tuning.use_table(
        tuning.Table(timer=lambda work: float(work() is None))
    )  # every candidate runs; the first is the fastest
    sink = SpanSums(*torch.zeros(2, 2 * OUTPUTS + 1).unbind())
    found = moments(given["x"], span=SPAN, eps=EPS, triton=False)
    more = [given["residual"]] if kind == "join" else []
    function: Any = join_conv1x1 if kind == "join" else norm_conv1x1
    *_, measured = function(
        given["x"],
        found,
        given["scale"],
        given["shift"],
        *more,
        given["weight"],
        span=SPAN,
        eps=EPS,
        sink=sink,
        backend="triton",
    )
    tuning.use_table(None)
    assert sink.total[-1] == len(measured.mean)
    torch.testing.assert_close(sink.total[:-1], torch.cat([measured.mean, measured.var], dim=1).sum(0))


def test_each_task_is_looked_up_once() -> None:
    tasks: list[str] = []

    class Log(tuning.Table):
        def choose(self, *arguments: Any) -> str:
            tasks.append(arguments[0])
            assert list(arguments[3]) == list(CANDIDATES.values())
            return list(arguments[3])[len(tasks) % 2]

    tuning.use_table(Log())
    try:
        given = draw(torch.float16)
        for kind in ("norm", "join"):
            _, _, gradients = ours(given, kind, backend="triton")
            expected = exact(given, kind)[1]
            assert error(gradients[0], expected[0]) < 4 * ROUNDING[torch.float16]
    finally:
        tuning.use_table(None)
    assert sorted(tasks) == sorted(residual.TASKS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(8, 15, 1, 1)}, r"weight is \(8, 15, 1, 1\)"),
        ({"weight": torch.ones(8, 16, 3, 3)}, r"\(64, 16, 1, 1\) works"),
        ({"scale": torch.ones(15)}, r"weight \(15,\)"),
        ({"residual": torch.ones(5, 16, 3, 2)}, "the residual is"),
        ({"residual scale": torch.ones(15)}, r"the normalisation has shapes .*\(15,\)"),
        ({"x": torch.ones(9, 16, 3, 3), "residual": torch.ones(9, 16, 3, 3)}, r"three of \(5, 16\)"),
    ],
)
def test_mismatched_tensors_raise_errors_that_name_them(changes: dict[str, Tensor], message: str) -> None:
    found = moments(draw(torch.float32)["x"], span=SPAN, eps=EPS, triton=False)
    given = {**draw(torch.float32), **changes}
    with pytest.raises(UserError, match=message):
        join_conv1x1(
            given["x"],
            found,
            given["scale"],
            given["shift"],
            given["residual"],
            given["weight"],
            span=SPAN,
            eps=EPS,
            residual_norm=Normalisation.of(found, given["residual scale"], given["residual shift"]),
            backend="triton",
        )
