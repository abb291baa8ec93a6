"""Bucket plans: which gradients are reduced together.

DDP fills buckets with gradients in the order in which backward computes them, last layer first. A small first bucket
starts the exchange early (DDP's own default is 1 MiB). Fujitsu's plan (Yamazaki et al. 2019, arXiv:1903.12650, and
their MLPerf v0.6 code) groups by number of tensors instead: groups end after 3, 24, 81, 161 ... tensors.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor

from megabatch.errors import SettingsError

FIRST_BUCKET_MIB = 1.0


def cubic_groups(num_tensors: int) -> list[int]:
    """Returns the number of tensors in each group, from the last layer backwards.

    Group k = 0, 1, ... ends after 3 (k + 1)^3 tensors (Fujitsu, MLPerf v0.6); 161 tensors give 3, 21, 57, 80.
    """
    ends, k = [0], 1
    while ends[-1] < num_tensors:
        ends.append(min(3 * k**3, num_tensors))
        k += 1
    return [end - start for start, end in itertools.pairwise(ends)]


def bucket_caps_mib(
    parameters: Sequence[Tensor],
    *,
    plan: str = "size",
    bucket_mib: float = 25.0,
    first_bucket_mib: float = FIRST_BUCKET_MIB,
) -> list[float]:
    """Returns bucket sizes in MiB, in the order of backward, as DDP's `bucket_cap_mb_list` takes them.

    "size": a first bucket of `first_bucket_mib`, then buckets of `bucket_mib`. "cubic": the bytes of each group of
    `cubic_groups`. DDP closes a bucket once it has reached its size, so the buckets are these groups if backward
    computes the gradients in the reverse order of `parameters`; otherwise boundaries shift by a few tensors. The last
    size holds for all later buckets.

    Raises SettingsError if `bucket_mib` is not positive or `plan` is unknown.
    """
    if bucket_mib <= 0:
        raise SettingsError(f"bucket_mib {bucket_mib} must be positive; for example 25")
    if plan == "size":
        return [min(first_bucket_mib, bucket_mib), bucket_mib]
    if plan != "cubic":
        raise SettingsError(f"bucket plan {plan!r} is unknown, needed 'size' or 'cubic'; for example 'size'")
    sizes = [p.numel() * p.element_size() for p in reversed(parameters) if p.requires_grad]
    ends = itertools.accumulate(cubic_groups(len(sizes)), initial=0)
    return [sum(sizes[start:end]) / 2**20 for start, end in itertools.pairwise(ends)]
