"""Augmentation of whole batches on their device. Deterministic: callers pass in all random numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megabatch.kernels.float64 import in_float64

_PIECE_ELEMENTS = 1 << 17  # half a megabyte of float32
_LUMA = (0.299, 0.587, 0.114)  # grey of RGB, ITU-R BT.601


def shift_and_flip(images: Tensor, rows: Tensor, columns: Tensor, flip: Tensor) -> Tensor:
    """Shifts each image by its own (rows, columns), then mirrors it where `flip`: pad-and-crop as one gather.

    A shift by (dy, dx) with reflection at the edges equals "pad by reflection, then crop" without the padded copy:
    output (y, x) is input (y + dy, x + dx). Shapes: images [n, C, H, W], the others [n]; |dy| < H and |dx| < W.
    """
    count, channels, height, width = images.shape
    source_rows = _reflect(torch.arange(height, device=images.device) + rows[:, None], height)
    source_columns = _reflect(torch.arange(width, device=images.device) + columns[:, None], width)
    source_columns = torch.where(flip[:, None], source_columns.flip(1), source_columns)
    pixels = (source_rows[:, :, None] * width + source_columns[:, None, :]).view(count, 1, height * width)
    flat = images.reshape(count, channels, height * width)
    return flat.gather(2, pixels.expand(count, channels, height * width)).view(count, channels, height, width)


def flip_some(images: Tensor, which: Sequence[int] | Tensor) -> Tensor:
    """Mirrors the images at the indices `which` left to right, in place; returns `images`."""
    rows = images.permute(0, 2, 3, 1)
    if images.is_cuda or not rows.is_contiguous():
        images[which] = images[which].flip(3)
        return images
    for i in which:  # in channels-last memory torch flips single images ten times faster than an indexed batch
        rows[i] = rows[i].flip(1)
    return images


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops each image to its box and resizes it to `size` x `size`, antialiased bilinear; float32 in [0, 255].

        out = R(rows) @ image @ R(columns)^T,   R[i, j] = triangle(|j + 1/2 - centre_i| / max(1, scale)) / row sum

    `images` are [n, C, H, W], `boxes` [n, 4] = (top, left, height, width). Meant for small images: two batched matrix
    products, which cost size * H * (W + size) multiplications per channel. Equal to Pillow's BILINEAR on the cropped
    image, but without its rounding to 8 bits.
    """
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size).to(images.device)
    columns = _resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size).to(images.device)
    return rows[:, None] @ images.float() @ columns[:, None].transpose(2, 3)


def resize(images: Tensor, size: int) -> Tensor:
    """Resizes whole images to `size` x `size`, antialiased bilinear, float32; unchanged if they have that size."""
    if images.shape[2:] == (size, size):
        return images
    return functional.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """Scales float images in [0, 255] by `brightness`, then around their mean grey by `contrast`, both [n]; clamps."""
    brighter = (images * brightness.view(-1, 1, 1, 1)).clamp_(0, 255)
    grey = mean_grey(brighter)
    factor = contrast.view(-1, 1, 1, 1)
    return torch.lerp(grey, brighter, factor).clamp_(0, 255)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float], out: Tensor) -> Tensor:
    """Writes (x / 255 - mean) / std per channel to `out`, in its dtype and memory format; returns `out`.

    `mean` and `std` are of pixels in [0, 1]. On a CPU, pieces stay in the cache through all three operations.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    channels_last = out.permute(0, 2, 3, 1).is_contiguous() and out.shape[1] > 1
    images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if channels_last:
        # Rows of width * channels values: broadcasting over an innermost dimension of 3 would be five times slower.
        source, target = (t.permute(0, 2, 3, 1).flatten(2) for t in (images, out))
        scale, shift = (values.repeat(out.shape[3]) for values in (scale, shift))
    else:
        source, target = images, out
        scale, shift = (values.view(-1, 1, 1) for values in (scale, shift))
    per_piece = len(out) if out.is_cuda else max(1, _PIECE_ELEMENTS // max(1, out[:1].numel()))
    for start in range(0, len(out), per_piece):
        piece, result = source[start : start + per_piece], target[start : start + per_piece]
        if out.dtype == torch.float32:
            result.copy_(piece).mul_(scale).add_(shift)
        else:
            result.copy_(piece.float().mul_(scale).add_(shift))
    return out


def erase(images: Tensor, boxes: Tensor) -> Tensor:
    """Sets each image to zero inside its box [n, 4] = (top, left, bottom, right), in place; zero is the mean."""
    return images.masked_fill_(_inside(boxes, images), 0)


def mix(images: Tensor, partners: Tensor, weights: Tensor) -> Tensor:
    """Returns weight * image + (1 - weight) * partner (mixup, Zhang et al. 2017, arXiv:1710.09412); `weights` [n]."""
    return torch.lerp(partners, images, weights.to(images.dtype).view(-1, 1, 1, 1))


def paste(images: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
    """Returns the partner's pixels inside each box [n, 4] = (top, left, bottom, right), the image's elsewhere.

    This is cutmix (Yun et al. 2019, arXiv:1905.04899).
    """
    return torch.where(_inside(boxes, images), partners, images)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflects indices outside 0..size-1 at the edge pixel, without repeating it: -1 is 1, size is size - 2."""
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _resize_weights(start: Tensor, length: Tensor, in_size: int, out_size: int) -> Tensor:
    """[n, out_size, in_size]: weight of each input line in each output line; rows sum to 1."""
    start, length = in_float64(start).view(-1, 1, 1), in_float64(length).view(-1, 1, 1)
    scale = length / out_size
    lines = torch.arange(in_size, device=start.device, dtype=torch.float64) + 0.5
    centres = start + (torch.arange(out_size, device=start.device, dtype=torch.float64)[:, None] + 0.5) * scale
    weights = (1 - (lines - centres).abs() / scale.clamp(min=1)).clamp_(min=0)
    weights = weights * ((lines > start) & (lines < start + length))
    return (weights / weights.sum(2, keepdim=True)).float()


def grey_of(images: Tensor) -> Tensor:
    """[n, 1, H, W]: the grey image, by the weights of `_LUMA` for three channels, else the mean of the channels."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    return (images * images.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def mean_grey(images: Tensor) -> Tensor:
    """[n, 1, 1, 1]: the mean of the grey image."""
    return grey_of(images.mean((2, 3), keepdim=True))


def _inside(boxes: Tensor, images: Tensor) -> Tensor:
    """[n, 1, H, W]: True inside each (top, left, bottom, right)."""
    top, left, bottom, right = (edge.view(-1, 1, 1, 1) for edge in boxes.unbind(1))
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
