"""Defenses that change the image: against SciPy and Pillow, and attacked by who knows them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from evading import protect, successes
from PIL import Image
from pydantic import ValidationError
from scipy import ndimage
from torch import Tensor, nn

from benchbox.api import ContractError
from benchbox_defenses import benchbox_defenses
from benchbox_defenses.input_transform import InputTransform
from benchbox_defenses.pixel_deflection import Deflected, PixelDeflection
from benchbox_defenses.transforms import blur, fewer_bits, jpeg, median
from conftest import TrainedDigits

TRANSFORMS = {
    "jpeg": lambda x: jpeg(x, 60),
    "blur": lambda x: blur(x, 0.8),
    "median": lambda x: median(x, 3),
    "bit-depth": lambda x: fewer_bits(x, 2),
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_purifiers_are_offered() -> None:
    kinds = {kind.name: kind for kind in benchbox_defenses()}

    assert not kinds["input-transform"].detects
    assert not kinds["pixel-deflection"].detects
    assert kinds["pixel-deflection"].stochastic


# ------------------------------------------------------------------------------------------------ transforms


def test_fewer_bits_are_evenly_spaced_levels() -> None:
    x = torch.tensor([0.0, 0.1, 0.49, 0.51, 0.9, 1.0]).view(1, 1, 1, 6)

    assert fewer_bits(x, 1).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(fewer_bits(x, 2).flatten() * 3, torch.tensor([0.0, 0, 1, 2, 3, 3]))
    eight = torch.arange(256).view(1, 1, 16, 16) / 255
    torch.testing.assert_close(fewer_bits(eight, 8), eight)


@pytest.mark.parametrize("window", [2, 3, 4, 5])
def test_the_median_filter_is_scipys(window: int) -> None:
    x = noise(3, 2, 9, 7)

    truth = ndimage.median_filter(x.numpy(), size=(1, 1, window, window), mode="nearest")

    assert median(x, window).numpy().tolist() == truth.tolist()
    if window <= 3:  # where the edge is repeated once, this is the authors' border, too
        assert truth.tolist() == ndimage.median_filter(x.numpy(), size=(1, 1, window, window)).tolist()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.3])
def test_the_blur_is_scipys(sigma: float) -> None:
    x = noise(2, 3, 9, 7, dtype=torch.float64)

    truth = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=3.0)

    np.testing.assert_allclose(blur(x, sigma).numpy(), truth, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [10, 90])
def test_jpeg_is_what_pillow_reads_of_what_it_wrote(channels: int, quality: int) -> None:
    x = noise(2, channels, 17, 12)
    file = io.BytesIO()
    pixels = np.round(x[1].numpy() * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
    picture.save(file, format="JPEG", quality=quality)
    truth = np.asarray(Image.open(file)).reshape(17, 12, channels).transpose(2, 0, 1) / np.float32(255)

    np.testing.assert_array_equal(jpeg(x, quality)[1].numpy(), truth)


def test_jpeg_keeps_more_at_a_higher_quality_and_needs_one_or_three_channels() -> None:
    x = blur(noise(4, 3, 32, 32), 2.0)

    errors = [float((jpeg(x, quality) - x).abs().mean()) for quality in (5, 50, 95)]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    assert jpeg(x[:0], 50).shape == (0, 3, 32, 32)
    with pytest.raises(ContractError, match="JPEG knows images of 1 or 3 channels, not of 2: choose another transform"):
        jpeg(x[:, :2], 50)


@pytest.mark.parametrize("name", ["jpeg", "bit-depth"])
def test_steps_have_the_identitys_gradient_and_their_own_values(name: str) -> None:
    x, weight = noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1)
    leaf = x.clone().requires_grad_()

    changed = TRANSFORMS[name](leaf)

    assert torch.equal(changed.detach(), TRANSFORMS[name](x))
    assert torch.equal(torch.autograd.grad((weight * changed).sum(), leaf)[0], weight)


@pytest.mark.parametrize("name", ["blur", "median"])
def test_filters_have_their_exact_gradient(name: str) -> None:
    x = noise(2, 2, 5, 4, dtype=torch.float64).requires_grad_()

    assert torch.autograd.gradcheck(TRANSFORMS[name], x)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_image_depends_on_its_neighbours_and_none_is_changed_in_place(name: str) -> None:
    x = noise(7, 1, 8, 8, dtype=torch.float64)
    before = x.clone()

    together = TRANSFORMS[name](x)

    assert torch.equal(torch.cat([TRANSFORMS[name](image) for image in x.split(1)]), together)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("options", "which"),
    [
        ({"transform": "jpeg", "quality": 60}, "jpeg"),
        ({"transform": "blur", "sigma": 0.8}, "blur"),
        ({"transform": "median"}, "median"),
        ({"transform": "bit-depth", "bits": 2}, "bit-depth"),
    ],
)
def test_the_model_sees_the_transformed_image(trained_digits: TrainedDigits, options: Any, which: str) -> None:
    x = trained_digits.test.images[:20]

    protected = protect(InputTransform, trained_digits.model, trained_digits.calibration, **options)

    torch.testing.assert_close(protected(x), trained_digits.model(TRANSFORMS[which](x)))
    assert protected.evidence(x) == {}


def test_an_option_that_would_change_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="sigma is only for transform 'blur', not 'jpeg'"):
        InputTransform.Options(sigma=2.0)
    complete = InputTransform.Options(transform="blur", sigma=2.0).model_dump()
    assert InputTransform.Options(**complete).sigma == 2.0  # with all defaults filled in, it is still valid


# ------------------------------------------------------------------------------------------------ deflection


def deflecting(share: float, radius: int, seed: int = 0) -> Deflected:
    return Deflected(nn.Identity(), share, radius, torch.Generator().manual_seed(seed))


def numbered(count: int, height: int, width: int, channels: int = 2) -> Tensor:
    """Images whose every pixel is its own place, in all channels."""
    return torch.arange(height * width).view(1, 1, height, width).repeat(count, channels, 1, 1).float()


@pytest.mark.parametrize("radius", [1, 3])
def test_pixels_come_from_their_neighbourhood_all_channels_together(radius: int) -> None:
    x = numbered(50, 7, 9)

    found = deflecting(share=1.0, radius=radius).deflect(x)

    assert torch.equal(found[:, 0], found[:, 1])
    rows, columns = found // 9 - x // 9, found % 9 - x % 9
    assert (rows.abs().max(), columns.abs().max()) == (radius, radius)
    assert not torch.equal(found[0], found[1])


def test_the_share_counts_distinct_pixels_and_all_others_stay() -> None:
    x = numbered(200, 10, 10)

    moved = (deflecting(share=0.2, radius=2).deflect(x) != x).any(1).flatten(1).sum(1).double()

    assert moved.max() <= 20
    assert float(moved.mean()) == pytest.approx(20 * (1 - 1 / 25), abs=0.7)  # edges keep themselves more often


def test_a_replacement_is_uniform_over_the_neighbours_inside_the_image() -> None:
    x = numbered(6000, 3, 3, channels=1)

    corner = deflecting(share=1.0, radius=1).deflect(x)[:, 0, 0, 0].long().bincount(minlength=9) / 6000

    expected = torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 0, 0]) / 4
    torch.testing.assert_close(corner, expected, atol=0.03, rtol=0)


def test_every_call_draws_anew_from_the_generator_that_was_given(trained_digits: TrainedDigits) -> None:
    x = trained_digits.test.images[:10]

    first, second = (protect(PixelDeflection, trained_digits.model, trained_digits.calibration) for _ in range(2))

    answers = first(x), first(x)
    assert not torch.equal(*answers)
    assert torch.equal(second(x), answers[0])


def test_a_share_of_no_pixel_is_an_error() -> None:
    with pytest.raises(ContractError, match=r"share 0.01 of 9 pixels rounds to none; choose at least 0.111"):
        deflecting(share=0.01, radius=1).deflect(numbered(1, 3, 3))


# ------------------------------------------------------------------------------------------------ under attack


@pytest.mark.parametrize(
    "options",
    [
        {"quality": 30},
        {"transform": "blur", "sigma": 0.6},
        {"transform": "median", "window": 2},
        {"transform": "bit-depth", "bits": 1},
    ],
)
def test_an_attack_through_the_defense_beats_one_on_the_undefended_model(
    trained_digits: TrainedDigits, options: dict[str, Any]
) -> None:
    protected = protect(InputTransform, trained_digits.model, trained_digits.calibration, **options)

    oblivious, adaptive = successes(protected, trained_digits.model, trained_digits.test.head(150), eps=0.1)

    assert adaptive > oblivious + 0.05, (oblivious, adaptive)


def test_expectation_over_deflections_beats_an_attack_on_the_undefended_model(trained_digits: TrainedDigits) -> None:
    """One that does not average, and stops at the first draw on which it wins, is worse than either: it was lucky."""
    model, test, eps = trained_digits.model, trained_digits.test.head(100), 0.12
    protected = protect(PixelDeflection, model, trained_digits.calibration, share=0.3)

    def attacked(target: nn.Module, draws: int) -> Tensor:
        x = test.images
        for _ in range(20):
            leaf = x.detach().requires_grad_()
            loss = nn.functional.cross_entropy(target(leaf.repeat(draws, 1, 1, 1)), test.labels.repeat(draws))
            moved = leaf.detach() + eps / 4 * torch.autograd.grad(loss, leaf)[0].sign()
            x = moved.clamp(test.images - eps, test.images + eps).clamp(0, 1)
        return x

    def share(images: Tensor) -> float:
        wrong = protected(images.repeat(10, 1, 1, 1)).argmax(1) != test.labels.repeat(10)
        return wrong.float().mean().item()

    oblivious, adaptive = share(attacked(model, 1)), share(attacked(protected.surrogate(), 8))
    _, lucky = successes(protected, model, test, eps)

    assert adaptive > oblivious + 0.02, (oblivious, adaptive)
    assert lucky < oblivious - 0.1, (oblivious, lucky)
