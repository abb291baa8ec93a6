"""Results of `gpu.py` as lines of text; imports no torch."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def table(results: Sequence[Result]) -> str:
    """All results, one a line, and what was fastest last."""
    return "\n".join([*map(line, results), "", *fastest(results)])


def line(result: Result) -> str:
    """One result as a line of the table."""
    start = f"{result['section']:<11} {result['case']:<62}"
    for problem in ("error", "skipped"):
        if problem in result:
            return f"{start} {problem}: {result[problem]}"[:180]
    parts = [f"{result['way']}"] if "way" in result else []
    if "bytes_per_image" in result:
        parts.append(f"{result['bytes_per_image'] / 1e6:.1f} MB an image")
    if "total_ms" in result:
        parts.append(f"{result['total_ms']:9.3f} ms in {result['calls']} calls")
    if "median_ms" in result:
        first, third = result["quartiles_ms"]
        parts.append(f"{result['median_ms']:9.3f} ms ({first:.3f} .. {third:.3f})")
    if "images_per_s" in result:
        parts.append(f"{result['images_per_s']:,.0f} images/s")
    for name, words in (
        ("of_copy_rate", "of copy"),
        ("of_product_rate", "of a product"),
        ("of_fused_floor", "of the fused floor"),
        ("share", "of the step"),
    ):
        if name in result:
            parts.append(f"{100 * result[name]:.1f} % {words}")
    if "of_all" in result:
        parts.append(f"relative error {result['of_all']:.2e}, median tensor {result['median']:.2e}")
    return f"{start} {'  '.join(parts)}"


def fastest(results: Sequence[Result]) -> list[str]:
    """The table's first lines: each batch's ways, fastest first."""
    lines = []
    steps = [r for r in results if r["section"] in {"step", "compiled"} and "images_per_s" in r]
    for count in sorted({r["batch"] for r in steps}):
        ranked = sorted((r for r in steps if r["batch"] == count), key=lambda r: -r["images_per_s"])
        lines += [f"{r['case']:<48} {r['images_per_s']:10,.0f} images/s" for r in ranked]
    return lines
