"""Division of a step's positions among ranks and micro-batches: pure arithmetic, equal on every rank."""

from megabatch.errors import SettingsError


def micro_batches(
    first: int, count: int, *, rank: int, world_size: int, micro_batch_size: int, bn_span: int
) -> list[range]:
    """Returns the stream positions of `rank` in the global batch [first, first + count), one range per micro-batch.

    The batch is divided into spans of `bn_span` consecutive positions; only the last span may be shorter. Batch-norm
    statistics are computed over each span.

    - `micro_batch_size` a multiple of `bn_span`: each rank gets contiguous whole spans, as evenly as whole spans
      allow (8 spans on 3 ranks: 3, 3, 2), split into micro-batches of at most `micro_batch_size`.
    - `micro_batch_size` a divisor of `bn_span`: groups of `bn_span // micro_batch_size` neighbouring ranks share
      each span; each group gets contiguous spans. A short span is shared as evenly as possible; a rank's range may
      then be empty, so that all ranks of a group run the same number of micro-batches.

    If a batch has fewer spans than there are groups, some ranks get an empty list. This may happen in a run's last
    batch; for full batches `check_split` refuses it before the run.

    Raises:
        SettingsError: sizes that do not divide each other; states a number that works.
    """
    group_size = _group_size(micro_batch_size=micro_batch_size, bn_span=bn_span, world_size=world_size)
    group, member = divmod(rank, group_size)
    num_spans = -(-count // bn_span)
    first_span, end_span = _share(num_spans, world_size // group_size, group)
    start, end = first + first_span * bn_span, min(first + end_span * bn_span, first + count)
    if group_size == 1:
        return [range(p, min(p + micro_batch_size, end)) for p in range(start, end, micro_batch_size)]
    return [_part(p, min(p + bn_span, end), group_size, member) for p in range(start, end, bn_span)]


def check_split(*, global_batch_size: int, world_size: int, micro_batch_size: int, bn_span: int) -> None:
    """Refuses a split in which some ranks have no work in a full batch.

    Raises:
        SettingsError: states the largest number of workers that works.
    """
    group_size = _group_size(micro_batch_size=micro_batch_size, bn_span=bn_span, world_size=world_size)
    num_spans = -(-global_batch_size // bn_span)
    if num_spans * group_size < world_size:
        raise SettingsError(
            f"a global batch of {global_batch_size} holds {num_spans} batch-norm spans of bn_span={bn_span} samples, "
            f"too few for {world_size} workers with micro_batch_size={micro_batch_size}; "
            f"{num_spans * group_size} workers have work"
        )


def _group_size(*, micro_batch_size: int, bn_span: int, world_size: int) -> int:
    """Number of ranks that share one span; 1 if a micro-batch holds whole spans."""
    if micro_batch_size < 1:
        raise SettingsError(f"micro_batch_size={micro_batch_size} must be at least 1; {bn_span} works")
    if micro_batch_size >= bn_span:
        if micro_batch_size % bn_span:
            good = micro_batch_size - micro_batch_size % bn_span
            raise SettingsError(
                f"micro_batch_size={micro_batch_size} is not a multiple of bn_span={bn_span}; {good} works"
            )
        return 1
    if bn_span % micro_batch_size:
        good = next(size for size in range(micro_batch_size, 0, -1) if bn_span % size == 0)
        raise SettingsError(f"micro_batch_size={micro_batch_size} does not divide bn_span={bn_span}; {good} does")
    group_size = bn_span // micro_batch_size
    if world_size % group_size:
        raise SettingsError(
            f"bn_span={bn_span} with micro_batch_size={micro_batch_size} needs groups of {group_size} workers, and "
            f"{world_size} workers do not form such groups; micro_batch_size={bn_span} works with any number"
        )
    return group_size


def _share(total: int, num_parts: int, part: int) -> tuple[int, int]:
    """Start and end of part `part` of `total` items; the first `total % num_parts` parts have one more item."""
    size, larger = divmod(total, num_parts)
    start = part * size + min(part, larger)
    return start, start + size + (part < larger)


def _part(start: int, end: int, num_parts: int, part: int) -> range:
    share_start, share_end = _share(end - start, num_parts, part)
    return range(start + share_start, start + share_end)
