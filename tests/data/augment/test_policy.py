import numpy as np
import pytest
import torch

from megabatch.data.augment.hashing import Stream, symmetric_beta
from megabatch.data.augment.policy import Policy, Samples
from megabatch.errors import DataError


def samples_of(count: int, epoch: int = 0, augmented: bool = True) -> Samples:
    return Samples(np.full(count, epoch), np.arange(count), np.full(count, augmented))


def ramp(count: int, size: int = 12) -> torch.Tensor:
    """Images whose neighbouring pixels all differ, so that any shift is visible."""
    return torch.arange(count * size * size).view(count, 1, size, size).remainder(251).to(torch.uint8)


def test_half_of_the_images_are_mirrored_independently_in_each_epoch():
    policy = Policy(seed=1)
    first, second = policy.flips(samples_of(10_000)), policy.flips(samples_of(10_000, epoch=1))
    assert first.mean() == pytest.approx(0.5, abs=0.025)
    assert (first == second).mean() == pytest.approx(0.5, abs=0.025)
    assert not Policy(seed=1, flip=False).flips(samples_of(50)).any()


def test_alternate_flip_shows_every_image_from_both_sides_in_two_epochs():
    policy = Policy(seed=1, alternate_flip=True)
    flips = [policy.flips(samples_of(1000, epoch=epoch)) for epoch in range(4)]
    assert (flips[0] ^ flips[1]).all()
    assert (flips[0] == flips[2]).all()
    assert (flips[1] == flips[3]).all()
    assert (flips[0] == Policy(seed=1).flips(samples_of(1000))).all()  # epoch 0 is drawn as ever
    assert not Policy(seed=1, flip=False, alternate_flip=True).flips(samples_of(50, epoch=1)).any()


def test_after_augmentation_ended_only_flips_remain():
    everything = Policy(
        seed=0,
        augmentation="pad_crop",
        cutout_size=4,
        mixup_alpha=0.4,
        cutmix_alpha=1.0,
        color_jitter=0.4,
    )
    images, ended = ramp(40), samples_of(40, augmented=False)
    flipped = Policy(seed=0, augmentation="none").move_and_flip(images.clone(), ended)
    assert torch.equal(everything.move_and_flip(images, ended), flipped)
    floats = images.float()
    assert torch.equal(everything.recolor(floats, ended), floats)
    assert torch.equal(everything.cut_out(floats.clone(), ended), floats)
    mixed, weights = everything.mix(floats, floats.flip(0), ended)
    assert torch.equal(mixed, floats)
    assert torch.equal(weights, torch.ones(40))


def test_augmentation_ends_per_sample():
    policy = Policy(seed=0, augmentation="pad_crop", flip=False)
    images = ramp(30)
    half = samples_of(30)._replace(augmented=np.arange(30) < 15)
    moved = policy.move_and_flip(images, half)
    assert torch.equal(moved[15:], images[15:])
    assert torch.equal(moved[:15], policy.move_and_flip(images, samples_of(30))[:15])
    assert not torch.equal(moved[:15], images[:15])


def test_random_resized_crops_are_central_after_augmentation_ended():
    policy = Policy(seed=0, augmentation="random_resized_crop", center_crop_ratio=0.5)
    sides = np.full(6, 100)
    boxes = policy.boxes(samples_of(6)._replace(augmented=np.arange(6) < 3), sides, sides)
    assert boxes[3:].tolist() == [[25, 25, 50, 50]] * 3
    assert len({tuple(box) for box in boxes[:3].tolist()}) == 3


def test_mixup_weights_are_beta_and_apply_to_pixels_as_they_do_to_labels():
    policy = Policy(seed=0, mixup_alpha=0.3)
    ones, zeros = torch.ones(5000, 1, 4, 4), torch.zeros(5000, 1, 4, 4)
    mixed, weights = policy.mix(ones, zeros, samples_of(5000))
    torch.testing.assert_close(mixed[:, 0, 0, 0], weights)
    assert float(weights.var()) == pytest.approx(1 / (4 * (2 * 0.3 + 1)), rel=0.05)


def test_cutmix_weight_is_the_share_of_own_pixels_in_the_image():
    policy = Policy(seed=0, cutmix_alpha=1.0)
    ones, zeros = torch.ones(2000, 1, 20, 20), torch.zeros(2000, 1, 20, 20)
    mixed, weights = policy.mix(ones, zeros, samples_of(2000))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), weights)
    assert mixed.unique().tolist() == [0, 1]
    assert 0.5 < float(weights.mean()) < 0.8  # 1/2 before boxes are clipped at the border


def test_the_side_of_a_cutmix_box_is_the_root_of_the_partner_s_share():
    weights = symmetric_beta(1.0, 0, 0, np.arange(500), Stream.MIX_WEIGHT, Stream.MIX_ANGLE)
    ones, zeros = torch.ones(500, 1, 20, 20), torch.zeros(500, 1, 20, 20)
    mixed, _ = Policy(seed=0, cutmix_alpha=1.0).mix(ones, zeros, samples_of(500))
    pasted = (mixed == 0)[:, 0]
    heights, widths = pasted.any(2).sum(1).numpy(), pasted.any(1).sum(1).numpy()
    whole = ~(pasted[:, 0].any(1) | pasted[:, -1].any(1) | pasted[:, :, 0].any(1) | pasted[:, :, -1].any(1)).numpy()
    assert whole.sum() > 50
    np.testing.assert_array_equal(heights[whole], np.rint(20 * np.sqrt(1 - weights[whole])))
    np.testing.assert_array_equal(heights[whole], widths[whole])


def test_with_both_alphas_a_fair_coin_chooses_mixup_or_cutmix_for_each_sample():
    policy = Policy(seed=0, mixup_alpha=1.0, cutmix_alpha=1.0)
    ones, zeros = torch.ones(4000, 1, 16, 16), torch.zeros(4000, 1, 16, 16)
    mixed, weights = policy.mix(ones, zeros, samples_of(4000))
    torch.testing.assert_close(mixed.mean((1, 2, 3)), weights, atol=1e-5, rtol=0)
    blended = ((mixed > 0) & (mixed < 1)).any(dim=(1, 2, 3))
    assert float(blended.float().mean()) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(4000))


def test_cutout_covers_a_square_that_is_clipped_at_the_border():
    policy = Policy(seed=0, cutout_size=6)
    erased = policy.cut_out(torch.ones(3000, 1, 12, 12), samples_of(3000))
    holes = (erased == 0).sum((1, 2, 3))
    assert holes.max() == 36
    assert holes.min() == 9  # centred on a corner
    rows = (erased == 0).any(3).sum((1, 2))
    columns = (erased == 0).any(2).sum((1, 2))
    assert torch.equal(rows * columns, holes)


def test_color_jitter_stays_within_its_bounds():
    policy = Policy(seed=0, color_jitter=0.25)
    images = torch.full((3000, 1, 2, 2), 100.0)
    factors = policy.recolor(images, samples_of(3000))[:, 0, 0, 0] / 100
    assert float(factors.min()) == pytest.approx(0.75, abs=0.01)
    assert float(factors.max()) == pytest.approx(1.25, abs=0.01)


def test_padding_as_large_as_the_image_is_refused():
    with pytest.raises(DataError, match="crop_padding=12 must be less than the image's size 12; 4 works"):
        Policy(seed=0, augmentation="pad_crop", crop_padding=12).move_and_flip(ramp(2), samples_of(2))
