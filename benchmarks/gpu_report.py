"""Results of `gpu.py` as lines of text, and what they say about call two. Imports no torch."""

from collections.abc import Sequence

from gpu_schedule import Result

AHEAD = 1.10
"""Least ratio of our images/s to the peer's for which single kernels are worth their time on the GPU."""
SHARES = (
    ("of_copy_rate", "of copy"),
    ("of_product_rate", "of a product"),
    ("of_fused_floor", "of the fused floor"),
    ("share", "of the step"),
)
COUNTS = ("passed", "failed", "skipped_tests", "compiled", "peak_gib")


def table(results: Sequence[Result]) -> str:
    """All results, one a line, and the steps of each batch last, fastest first."""
    return "\n".join([*(line(result) for result in results if not result.get("begun")), "", *fastest(results)])


def line(result: Result) -> str:
    """One result as a line of the table."""
    start = f"{result['job']:<18} {result['case']:<58}"
    for problem in ("error", "skipped"):
        if problem in result:
            return f"{start} {problem}: {' '.join(str(result[problem]).split())}"[:240]
    parts = [f"{result[name]:g} {name.removesuffix('_tests')}" for name in COUNTS if name in result]
    if "way" in result:
        parts.append(str(result["way"]))
    if "bytes_per_image" in result:
        parts.append(f"{result['bytes_per_image'] / 1e6:.1f} MB an image")
    if "total_ms" in result:
        parts.append(f"{result['total_ms']:9.3f} ms in {result['calls']} calls")
    if "median_ms" in result:
        first, third = result["quartiles_ms"]
        parts.append(f"{result['median_ms']:9.3f} ms ({first:.3f} .. {third:.3f})")
    if "bytes_per_s" in result:
        parts.append(f"{result['bytes_per_s'] / 1e9:,.0f} GB/s")
    if "images_per_s" in result:
        parts.append(f"{result['images_per_s']:,.0f} images/s")
    parts += [f"{100 * result[name]:.1f} % {words}" for name, words in SHARES if name in result]
    return f"{start} {'  '.join(parts)}".rstrip()


def fastest(results: Sequence[Result]) -> list[str]:
    """Each batch's steps, fastest first, as a ratio to the peer's fastest."""
    lines = []
    steps = [result for result in results if "batch" in result and "images_per_s" in result]
    for count in sorted({result["batch"] for result in steps}):
        base = best(steps, "peer", count)
        for result in sorted((r for r in steps if r["batch"] == count), key=lambda r: -r["images_per_s"]):
            ratio = f"{result['images_per_s'] / base:6.2f} x peer" if base else ""
            lines.append(f"{result['case']:<62} {result['images_per_s']:10,.0f} images/s {ratio}".rstrip())
    return lines


def best(results: Sequence[Result], job: str, count: int) -> float:
    """Most images/s of jobs whose name begins with `job` at this batch; 0 without a result."""
    found = [r for r in results if r.get("batch") == count and r["job"].startswith(job)]
    return max((r["images_per_s"] for r in found if "images_per_s" in r), default=0.0)


def is_behind(results: Sequence[Result]) -> bool:
    """True if our fastest step is below `AHEAD` x the peer's, at the largest batch that has both; False without one."""
    for count in sorted({result["batch"] for result in results if "batch" in result}, reverse=True):
        own, peer = best(results, "ours", count), best(results, "peer", count)
        if own and peer:
            return own < AHEAD * peer
    return False
