"""Runs: steps, phases, evaluations and costs by hand; epochs against batch; choices; one change at a time."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabatch import recipes
from megabatch.app import dry_run
from megabatch.errors import SettingsError
from megabatch.plan.convergence import epochs_to_target, num_updates, tree_time_s
from megabatch.plan.exchange import Exchange
from megabatch.plan.hardware import load_hardware
from megabatch.plan.planner import TIE, Choices, best, exchanges, with_global_batch, within
from megabatch.plan.predict import Job, Phase, job_of, predict
from megabatch.plan.what_if import what_if
from megabatch.train.schedule import count_steps

HARDWARE = load_hardware()
POD = HARDWARE.find_cluster("dgx_h100")
JOB = job_of(recipes.get("mlperf_32768"))


def test_a_run_is_its_updates_times_its_step_and_its_evaluations():
    job = Job(phases=(Phase(90, 8192),), num_evaluations=10)
    made = predict(job, 64, POD, HARDWARE)
    assert made.updates == pytest.approx(90 * 1_281_167 / 8192)
    assert made.training_s == pytest.approx(made.updates * made.step.total_s)
    assert made.total_s == pytest.approx(made.training_s + made.evaluation_s)
    assert made.cost(3.6) == pytest.approx(64 * made.total_s / 1000)
    assert made.images_per_s == pytest.approx(8192 / made.step.total_s)


def test_iterations_of_90_epochs_are_those_of_the_papers():
    published = {8192: 14_076, 16_384: 7_038, 32_768: 3_519, 65_536: 1_760, 81_920: 1_408}
    assert {batch: round(num_updates(90, 1_281_167, batch)) for batch in published} == pytest.approx(published, abs=1)


def test_phases_follow_batch_and_resolution_of_the_recipe():
    grown = job_of(recipes.get("mikami2018_34k_68k"))
    assert grown.phases == (Phase(30, 34_816), Phase(60, 69_632))
    ramped = job_of(recipes.get("fast_16"))
    assert ramped.total_epochs == pytest.approx(16)
    assert ramped.phases[0].resolution < ramped.phases[-1].resolution


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_can_be_planned(name):
    made = predict(job_of(recipes.get(name)), 8, POD, HARDWARE)
    assert 0 < made.step.efficiency <= 1
    assert made.total_s > 0


@given(low=st.integers(1, 67_840), high=st.integers(1, 67_840))
def test_a_larger_batch_never_needs_fewer_epochs_but_always_fewer_updates(low, high):
    low, high = sorted((low, high))
    first, second = epochs_to_target(low).mean, epochs_to_target(high).mean
    assert first <= second
    assert num_updates(second, 1_281_167, high) <= num_updates(first, 1_281_167, low) * (1 + 1e-9)
    assert epochs_to_target(high).fewest <= second <= epochs_to_target(high).most


def test_beyond_the_largest_published_batch_there_is_no_prediction():
    with pytest.raises(SettingsError, match=r"70,000.*67,840 works"):
        epochs_to_target(70_000)


def test_more_workers_at_a_fixed_share_show_their_price_in_epochs():
    plans = [best(JOB, count, Choices(local_batch=64), POD, HARDWARE) for count in (64, 512, 1024)]
    assert [made.job.total_epochs for made in plans] == sorted(made.job.total_epochs for made in plans)
    assert [made.cost(1) for made in plans] == sorted(made.cost(1) for made in plans)
    assert [made.total_s for made in plans] == sorted((made.total_s for made in plans), reverse=True)


@pytest.mark.parametrize("workers", [8, 256, 2048, 4096])
def test_the_choice_is_within_a_tie_of_the_fastest_and_simpler_ones_are_not(workers):
    found = [
        predict(dataclasses.replace(JOB, exchange=it), workers, POD, HARDWARE)
        for it in exchanges(workers, Choices(), POD)
    ]
    chosen = best(JOB, workers, Choices(), POD, HARDWARE)
    limit = (1 + TIE) * min(made.total_s for made in found)
    index = [made.job.exchange for made in found].index(chosen.job.exchange)
    assert chosen.total_s <= limit
    assert all(made.total_s > limit for made in found[:index])


def test_given_options_are_kept():
    choices = Choices(algorithm="torus", shape=(16, 16), bucket_mib=7.0, wire="fp32", local_batch=32)
    made = best(JOB, 256, choices, POD, HARDWARE)
    assert made.job.exchange == Exchange(
        algorithm="torus", shape=(16, 16), between_hosts="nccl", wire="fp32", bucket_mib=7.0
    )
    assert made.job.phases[0].global_batch_size == 8192


def test_epochs_against_batch_are_refused_for_other_data():
    with pytest.raises(SettingsError, match="without --local-batch"):
        with_global_batch(job_of(recipes.get("cifar10")), 4096)


def test_budget_and_deadline_filter_plans_and_a_budget_needs_a_price():
    plans = [predict(JOB, count, POD, HARDWARE) for count in (8, 64, 512)]
    costs = [made.cost(2.0) for made in plans]
    assert within(plans, price=2.0, budget=costs[1], deadline_s=None) == plans[:2]
    assert within(plans, price=None, budget=None, deadline_s=plans[1].total_s) == plans[1:]
    with pytest.raises(SettingsError, match=r"--price 2\.5 works"):
        within(plans, price=None, budget=1.0, deadline_s=None)


def test_more_workers_than_images_are_refused():
    with pytest.raises(SettingsError, match="64 workers for a global batch of 32"):
        predict(Job(phases=(Phase(1, 32),)), 64, POD, HARDWARE)


@pytest.mark.parametrize(
    ("change", "sign"),
    [("bandwidth=2", -1), ("latency=2", 1), ("wire=fp32", 1), ("overlap=no", 1), ("batch=0.5", 1), ("shape=16x16", 0)],
)
def test_one_change_moves_the_time_in_its_direction(change, sign):
    before = predict(dataclasses.replace(JOB, exchange=Exchange()), 256, POD, HARDWARE)
    after = what_if(before, change, POD, HARDWARE)
    assert sign == 0 or math.copysign(1, after.total_s - before.total_s) == sign


@pytest.mark.parametrize(
    "change", ["speed=2", "bandwidth=fast", "wire=int8", "all-reduce=star", "shape=8", "overlap=2"]
)
def test_an_unknown_change_is_refused_with_one_that_works(change):
    before = predict(JOB, 256, POD, HARDWARE)
    with pytest.raises(SettingsError, match=r"--what-if .*needed"):
        what_if(before, change, POD, HARDWARE)


def test_half_of_the_batch_doubles_the_updates():
    before = predict(JOB, 256, POD, HARDWARE)
    assert what_if(before, "batch=0.5", POD, HARDWARE).updates == pytest.approx(2 * before.updates)


def test_the_log_p_model_is_that_of_you_et_al():
    seconds = tree_time_s(
        updates=10, compute_s=1.0, num_workers=1024, latency_s=0.1, num_bytes=100.0, bytes_per_s=1000.0
    )
    assert seconds == pytest.approx(10 * (1 + 10 * (0.1 + 0.1)))


@pytest.mark.parametrize("name", sorted(recipes.names()))
def test_a_plan_has_the_updates_evaluations_and_images_of_a_run(name):
    recipe = recipes.get(name)
    job = job_of(recipe)
    updates = sum(num_updates(phase.epochs, job.num_images, phase.global_batch_size) for phase in job.phases)
    assert abs(updates - count_steps(recipe)) <= len(job.phases)  # each phase rounds its last update
    assert job.num_evaluations == recipe.num_evaluations
    if recipe.dataset == "imagenet":
        assert job.num_eval_images == dry_run.NUM_EVAL_IMAGES
