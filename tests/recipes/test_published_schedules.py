"""The recipes' schedules have the published values at epochs for which a number is known."""

import math

import pytest

from megabatch import recipes
from megabatch.recipe import override
from megabatch.train.schedule import count_steps, settings_at
from megabatch.train.state import StepSettings

NUM_IMAGES = 1_281_167

# Rows of mlcommons/logging, training_4.0.0: batch, rate, warm-up, momentum, weight decay, decay steps, span, and the
# epochs of the fastest and the slowest run.
MLPERF = [
    (1_632, 7.4, 2, 0.9, 5e-5, 27_476, 204, 33, 37),
    (3_264, 10.5, 2, 0.9, 5e-5, 14_523, 204, 34, 37),
    (4_096, 10.0, 5, 0.9, 2e-4, 13_137, 64, 39, 42),
    (8_192, 17.0, 5, 0.9, 2e-4, 6_095, 64, 41, 44),
    (13_056, 12.8, 9, 0.9, 2.5e-5, 4_710, 204, 44, 46),
    (32_768, 21.2, 16, 0.94, 2.5e-5, 2_267, 128, 55, 57),
    (49_152, 19.405, 24, 0.951807, 1e-4, 1_846, 256, 67, 69),
    (58_880, 23.246, 29, 0.951807, 1e-4, 1_785, 230, 78, 81),
    (65_536, 24.699, 31, 0.951807, 1e-4, 1_133, 128, 83, 86),
    (67_840, 24.699, 31, 0.951807, 1e-4, 1_133, 424, 85, 87),
]


def at(name: str, epoch: float) -> StepSettings:
    recipe = recipes.get(name)
    return settings_at(recipe, step=0, first=round(epoch * recipe.num_train_images))


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("goyal2017_8k", 14_076),
        ("akiba2017_32k", 3_519),
        ("you2017_resnet50_32k", 3_519),
        ("mikami2018_54k", 2_086),
        ("yamazaki2019_81k", 1_408),
        ("ying2018_32k", 3_558),
    ],
)
def test_the_number_of_updates_is_the_published_one(name: str, steps: int) -> None:
    assert count_steps(recipes.get(name)) == steps


def test_the_64_epoch_run_of_you_is_the_90_epoch_recipe_with_fewer_epochs() -> None:
    """0.749 after 64 epochs (You et al. 2017): 64 x 1,281,167 / 32,768 = 2,502.3 batches."""
    shorter = override(recipes.get("you2017_resnet50_32k"), {"total_epochs": "64", "published_top1": "0.749"})
    assert count_steps(shorter) == 2_503
    assert shorter.warmup_epochs == pytest.approx(14 * 64 / 90)
    middle = settings_at(shorter, step=0, first=32 * NUM_IMAGES)
    assert middle.lr == pytest.approx(32 * 0.5**2, rel=1e-5)
    assert settings_at(shorter, step=0, first=64 * NUM_IMAGES - 1).lr < 1e-6


def test_a_growing_batch_takes_fewer_updates() -> None:
    grown = count_steps(recipes.get("mikami2018_34k_68k"))
    assert grown == pytest.approx(30 * NUM_IMAGES / 34_816 + 60 * NUM_IMAGES / 69_632, abs=1)


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 6.4), (39.99, 6.4), (40, 0.96), (69.9, 0.96), (70, 0.128), (84.9, 0.128), (85, 0.0128)]
)
def test_slow_start_of_akiba_has_four_rates(epoch: float, lr: float) -> None:
    assert at("akiba2017_32k", epoch).lr == pytest.approx(lr)


@pytest.mark.parametrize(("epoch", "share"), [(0, 0.00916), (5, 0.0677), (7.5, 0.184), (10, 0.5), (12.5, 1), (60, 1)])
def test_warm_up_of_akiba_blends_from_rmsprop_to_sgd_around_epoch_ten(epoch: float, share: float) -> None:
    assert at("akiba2017_32k", epoch).sgd_share == pytest.approx(share, rel=5e-3)


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.1), (2.5, 1.65), (5, 3.2), (29.9, 3.2), (30, 0.32), (60, 0.032), (80, 0.0032)]
)
def test_rate_of_goyal_warms_up_and_falls_tenfold_three_times(epoch: float, lr: float) -> None:
    assert at("goyal2017_8k", epoch).lr == pytest.approx(lr, rel=1e-4)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.0), (18, 6.5), (36, 13.0), (88, 0.0325), (89.9, 0.0325)])
def test_rate_of_yamazaki_peaks_at_epoch_36_and_ends_at_88(epoch: float, lr: float) -> None:
    assert at("yamazaki2019_81k", epoch).lr == pytest.approx(lr, rel=1e-5, abs=1e-5)


def test_decay_of_yamazaki_has_power_2_2_over_780_steps_at_15_per_epoch() -> None:
    halfway = 36 + 780 / 15 / 2
    assert at("yamazaki2019_81k", halfway).lr == pytest.approx((13.0 - 0.0325) * 0.5**2.2 + 0.0325, rel=1e-5)


@pytest.mark.parametrize(("name", "peak", "warmup"), [("ying2018_32k", 34, 12), ("ying2018_65k", 35, 34)])
def test_rate_of_ying_decays_from_the_end_of_warm_up(name: str, peak: float, warmup: float) -> None:
    assert at(name, warmup / 2).lr == pytest.approx(peak / 2, rel=1e-5)
    assert at(name, warmup).lr == pytest.approx(peak, rel=1e-5)
    assert at(name, (warmup + 91) / 2).lr == pytest.approx(peak / 4, rel=1e-5)


def test_decay_of_caffe_counts_from_the_first_step() -> None:
    assert at("you2017_alexnet_32k", 0).lr == 1.0
    assert at("you2017_alexnet_32k", 5).lr == pytest.approx(16.5, rel=1e-5)
    assert at("you2017_alexnet_32k", 50).lr == pytest.approx(32 * 0.25, rel=1e-5)
    assert at("you2017_resnet50_32k", 14).lr == pytest.approx(
        22.8, abs=0.05
    )  # 32 (1 - 14 / 90)^2, as its docstring says


@pytest.mark.parametrize(("epoch", "c"), [(5, 29), (15.5, 29), (29.9, 29), (30, 50), (60.5, 50), (80, 50)])
def test_rate_of_mikami_is_quadratic_with_a_higher_factor_after_the_batch_grows(epoch: float, c: float) -> None:
    now = at("mikami2018_34k_68k", epoch)
    assert now.lr == pytest.approx(c * (1 - epoch / 90) ** 2, rel=2e-3)
    assert now.count == (34_816 if epoch < 30 else 69_632)


@pytest.mark.parametrize(
    ("epoch", "lr", "resolution"),
    [(0, 0.00017, 160), (1, 0.850085, 160), (2, 1.7, 160), (9, 0.85, 160), (11, 17 / 28, 160), (13, 5.1 / 14, 192)],
)
def test_ffcv_has_a_triangular_rate_and_a_resolution_ramp(epoch: float, lr: float, resolution: int) -> None:
    now = at("fast_16", epoch)
    assert now.lr == pytest.approx(lr, rel=1e-4)
    assert now.resolution == resolution


@pytest.mark.parametrize("row", MLPERF, ids=lambda row: str(row[0]))
def test_an_mlperf_recipe_has_the_values_of_its_row(row: tuple[float, ...]) -> None:
    batch, lr, warmup, momentum, weight_decay, _, span, _, _ = row
    recipe = recipes.get(f"mlperf_{batch}")
    assert (recipe.global_batch_size, recipe.peak_lr, recipe.warmup_epochs) == (batch, lr, warmup)
    assert (recipe.momentum, recipe.weight_decay, recipe.bn_span) == (momentum, weight_decay, span)
    assert (recipe.label_smoothing, recipe.trust_coefficient, recipe.trust_eps) == (0.1, 0.001, 0.0)
    assert (recipe.poly_power, recipe.end_lr, recipe.target_top1) == (2, 1e-4, 0.759)


@pytest.mark.parametrize("row", MLPERF, ids=lambda row: str(row[0]))
def test_mlperf_decay_steps_count_from_the_first_step_or_the_end_of_warm_up(row: tuple[float, ...]) -> None:
    batch, _, warmup, _, _, decay_steps, _, _, slowest = row
    total = recipes.get(f"mlperf_{batch}").total_epochs
    per_epoch = 21 if batch == 58_880 else NUM_IMAGES / batch  # that submitter drops the last, short batch
    readings = [epochs * per_epoch for epochs in (total, total - warmup)]
    assert any(math.isclose(decay_steps, reading, rel_tol=3e-3) for reading in readings)
    assert total >= slowest


@pytest.mark.parametrize("row", MLPERF, ids=lambda row: str(row[0]))
def test_mlperf_evaluates_at_the_mean_epoch_with_less_than_1_percent_of_the_rate(row: tuple[float, ...]) -> None:
    recipe = recipes.get(f"mlperf_{row[0]}")
    ((mean, top1),) = recipe.published_curve
    assert (round(mean) - recipe.eval_offset_epochs) % recipe.eval_every_epochs == 0
    assert top1 == recipe.target_top1
    assert 0.94 <= mean / recipe.total_epochs <= 0.97
    assert at(recipe.name, mean).lr < 0.01 * recipe.peak_lr
