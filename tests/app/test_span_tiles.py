"""Batch-norm spans shared by tiles of the grid of workers, and gradients exchanged in cubic groups."""

import inspect

import pytest
import torch
import torch.distributed as dist
from command_line import megabatch_process
from PIL import Image
from ranks import run_processes
from tiny_run import run_tiny, tiny_recipe

from megabatch.app import span_tiles as module
from megabatch.app.span_tiles import SpanTiles, span_tiles
from megabatch.comm.launch import World
from megabatch.errors import SettingsError
from megabatch.nn.batch_norm.groups import span_groups
from megabatch.observe.events import read_events
from megabatch.runtime import Runtime

TILED = Runtime(precision="fp32", micro_batch_size=8, bn_tile_rows=2)


def grid_of(monkeypatch, hosts):
    monkeypatch.setattr(module, "all_gather_objects", lambda *_: hosts)


@pytest.mark.parametrize(
    ("hosts", "span", "tile", "grid"),
    [
        (["a"] * 4, 16, (2, 1), (2, 2)),
        (["a"] * 4 + ["b"] * 4, 32, (2, 2), (2, 4)),
        (["a"] * 16, 64, (2, 4), (4, 4)),
        (list("aabbccdd"), 16, (2, 1), (4, 2)),
    ],
)
def test_tiles_cover_the_grid_and_deal_each_group_consecutive_samples(monkeypatch, hosts, span, tile, grid):
    grid_of(monkeypatch, hosts)
    size = len(hosts)
    worlds = [World(rank=rank, world_size=size) for rank in range(size)]
    tiles = span_tiles(
        tiny_recipe(bn_span=span, global_batch_size=2 * span), TILED, world=worlds[0], micro_batch_size=8
    )
    assert (tiles.tile, tiles.grid) == (tile, grid)
    places = [tiles.stream_rank(world) for world in worlds]
    assert sorted(places) == list(range(size))
    for group in span_groups(size, tiles.size, tiles=tile, grid=grid):
        first = places[group[0]]
        assert [places[rank] for rank in group] == list(range(first, first + tiles.size))
        assert first % tiles.size == 0


@pytest.mark.parametrize(("span", "rows", "hosts"), [(8, 2, "aaaa"), (16, 4, "aaaa"), (16, 2, "aaa")])
def test_tiles_that_do_not_fit_are_refused_with_what_works(monkeypatch, span, rows, hosts):
    grid_of(monkeypatch, list(hosts))
    runtime = Runtime(bn_tile_rows=rows)
    with pytest.raises(SettingsError, match=rf"--bn-tile-rows {rows}: groups of .*; --bn-tile-rows 1 works"):
        span_tiles(tiny_recipe(bn_span=span), runtime, world=World(world_size=len(hosts)), micro_batch_size=8)


def test_without_the_option_groups_are_consecutive_ranks():
    tiles = span_tiles(tiny_recipe(bn_span=16), Runtime(), world=World(rank=3, world_size=4), micro_batch_size=8)
    assert tiles == SpanTiles(2)
    assert tiles.stream_rank(World(rank=3, world_size=4)) == 3
    assert str(tiles) == ""


def train_tiled(folder, recipe, runtime):
    """A run, with the ranks of this rank's span group."""
    groups, original = [], module.new_span_group

    def spy(*args, **options):
        group = original(*args, **options)
        groups.append(dist.get_process_group_ranks(group))
        return group

    module.new_span_group = spy
    try:
        result = run_tiny(folder, recipe, runtime=runtime)
    finally:
        module.new_span_group = original
    return result | {"groups": groups}


@pytest.mark.multiprocess
def test_tiles_train_what_one_worker_trains(tmp_path):
    recipe = tiny_recipe(bn_span=16)
    alone = run_tiny(tmp_path / "alone", recipe, max_steps=None)
    tiled = run_processes(4, train_tiled, tmp_path / "tiled", recipe, TILED)
    assert [rank["groups"] for rank in tiled] == [[[0, 2]], [[1, 3]], [[0, 2]], [[1, 3]]]
    assert tiled[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(tiled[0]["weights"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def write_grey_photos(folder):
    for part in ("train", "val"):
        for number, name in enumerate(("dark", "light")):
            (folder / part / name).mkdir(parents=True)
            for shade in range(8):
                image = Image.new("L", (28, 28), 40 + 120 * number + 5 * shade)
                image.save(folder / part / name / f"{shade}.png")
    return folder


@pytest.mark.multiprocess
@pytest.mark.skipif(
    "bucket_cap_mb_list" not in inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters,
    reason="this torch has one size for all buckets",
)
def test_the_command_line_trains_with_tiles_and_with_cubic_groups(tmp_path):
    arguments = ["--output", tmp_path / "run", "--workers", 4, "--device", "cpu"]
    arguments += ["--set", "global_batch_size=16", "--set", "bn_span=4", "--set", "width=8", "--steps", 1]
    arguments += ["--micro-batch-size", 2, "--bn-tile-rows", 2, "--bucket-plan", "cubic", "--precision", "fp32"]
    photos = write_grey_photos(tmp_path / "photos")
    done = megabatch_process("train", "fashion_mnist", "--data", photos, *arguments)
    assert done.returncode == 0, done.stderr
    # A worker that is lost at the end of the run restarts it, which is then complete: a second start, said on stderr.
    start, *again = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "run_start"]
    assert not again or "restart" in done.stderr
    assert "batch-norm spans shared by tiles of 2 x 1 in the 2 x 2 grid of workers" in start["choices"]
    assert any("buckets in cubic groups" in choice for choice in start["choices"])
    (step,) = [event for event in read_events(tmp_path / "run" / "events.jsonl") if event["event"] == "observation"]
    assert len(step["buckets"]) == 3  # 26 tensors: 3, 21 and 2
