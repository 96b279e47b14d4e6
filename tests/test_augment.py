"Heavy numerics of sedm_kit.augment: every operation against an independent one, the drawing's laws, what must stay untouched."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from torch.testing import assert_close

from sedm_kit.augment import SCALE_STD, SHIFT_STD, apply_augmentation, augment, augment_labels, draw_augmentation, lookup_matrices


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=3, side=8, width=None, seed=0):
    return torch.rand(n, 2, side, width or side, generator=source(seed), dtype=torch.float64) * 2 - 1


def only(n=3, **operations):
    done = torch.zeros(n, 8, dtype=torch.float64)
    for name, value in operations.items():
        done[:, int(name[1])] = value
    return done


@pytest.mark.parametrize("done, expected", [
    (dict(a0=1.0), lambda x: x.flip(3)),
    (dict(a1=1.0), lambda x: x.flip(2)),
    (dict(a0=1.0, a1=1.0), lambda x: x.flip(2, 3)),
    (dict(a3=math.pi / 2), lambda x: x.rot90(-1, (2, 3))),
    (dict(a3=math.pi), lambda x: x.rot90(2, (2, 3))),
    (dict(a0=1.0, a3=math.pi / 2), lambda x: x.flip(3).rot90(-1, (2, 3))),  # the mirror comes first
    (dict(a6=2 / (8 * SHIFT_STD)), lambda x: functional.pad(x, (2, 0, 0, 0), mode="reflect")[..., :8].where(torch.arange(8) >= 2, x[..., [1, 0, *range(6)]])),
    (dict(a3=math.pi / 2, a7=1 / (8 * SHIFT_STD)), lambda x: x.rot90(-1, (2, 3))[:, :, [0, 0, 1, 2, 3, 4, 5, 6]].where(torch.arange(8)[:, None] > 0, x.rot90(-1, (2, 3))[:, :, :1])),
])
def test_operations_that_move_pixels_onto_pixels(done, expected):
    "Mirrors, quarter turns and whole-pixel shifts (borders reflected) are index operations."
    x = images()
    assert_close(apply_augmentation(x, only(**done)), expected(x), rtol=0, atol=1e-9)


def reference_matrix(a):
    "The forward map of one image as a product of homogeneous matrices, in units of half widths."
    def rotation(angle):
        return torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], dtype=torch.float64)
    def scale(x, y):
        return torch.diag(torch.tensor([x, y, 1], dtype=torch.float64))
    shift = torch.eye(3, dtype=torch.float64)
    shift[:2, 2] = 2 * SHIFT_STD * torch.tensor([a[6], a[7]], dtype=torch.float64)
    stretch = rotation(a[4]) @ scale(2 ** (SCALE_STD * a[5]), 2 ** (-SCALE_STD * a[5])) @ rotation(-a[4])
    return shift @ stretch @ rotation(a[3]) @ scale(*[2 ** (SCALE_STD * a[2])] * 2) @ scale(1 - 2 * a[0], 1 - 2 * a[1])


@given(flips=st.tuples(st.integers(0, 1), st.integers(0, 1)), rest=st.tuples(*[st.floats(-3, 3)] * 6))
def test_lookup_is_the_inverse_of_the_product_of_all_operations(flips, rest):
    a = [float(flip) for flip in flips] + list(rest)
    found = lookup_matrices(torch.tensor([a], dtype=torch.float64))[0]
    whole = torch.cat([found, torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)])
    assert_close(whole @ reference_matrix(a), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)


def test_images_that_are_not_square_are_turned_in_pixels():
    x = images(1, side=8, width=16)
    turned = apply_augmentation(x, only(1, a3=math.pi / 2))
    assert_close(turned[..., 4:12], x[..., 4:12].rot90(-1, (2, 3)), rtol=0, atol=1e-9)  # the square in the middle


def test_zoom_moves_content_away_from_the_centre():
    x = torch.zeros(1, 1, 33, 33, dtype=torch.float64)
    x[..., 16, 22] = 1.0  # 6 pixels right of the centre
    for zoom in (1.0, -1.5, 2.0):
        column = apply_augmentation(x, only(1, a2=zoom))[0, 0, 16].argmax().item() - 16
        assert abs(column - 6 * 2 ** (SCALE_STD * zoom)) <= 0.6
    wide = apply_augmentation(x, only(1, a5=3.0))[0, 0, 16].argmax().item() - 16
    tall = apply_augmentation(x.mT.contiguous(), only(1, a5=3.0))[0, 0, :, 16].argmax().item() - 16
    assert abs(wide - 6 * 2**0.6) <= 0.6 and abs(tall - 6 * 2**-0.6) <= 0.6


def test_labels_entry_by_entry():
    a = torch.tensor([[1.0, 0.0, 0.7, 0.5, 0.3, -1.2, 0.4, -0.9]])
    expected = [1.0, 0.0, 0.7, math.cos(0.5) - 1, math.sin(0.5), -1.2 * math.cos(0.3), -1.2 * math.sin(0.3), 0.4, -0.9]
    assert_close(augment_labels(a), torch.tensor([expected]))


@pytest.mark.parametrize("entry, share", [(0, 0.5), (1, 0.06), (2, 0.12), (3, 0.12), (4, 0.06), (5, 0.12), (6, 0.12), (7, 0.12)])
def test_how_often_each_operation_happens(entry, share):
    drawn = draw_augmentation(200_000, 0.12, generator=source(1))[:, entry]
    assert_close((drawn != 0).double().mean().item(), share, rtol=0, atol=4 * math.sqrt(share / 200_000))


def test_laws_of_the_sizes():
    drawn = draw_augmentation(200_000, 1.0, generator=source(2))
    assert_close(drawn[:, [2, 5, 6, 7]].std(0), torch.ones(4), rtol=0.01, atol=0)
    assert_close(drawn[:, [2, 5, 6, 7]].mean(0), torch.zeros(4), rtol=0, atol=0.01)
    assert drawn[:, 3].abs().max() <= math.pi and abs(drawn[:, 3].std().item() - math.pi / 3**0.5) < 0.01
    assert_close(drawn.T.corrcoef().fill_diagonal_(0), torch.zeros(8, 8), rtol=0, atol=0.015)


def test_nothing_is_the_identity_and_draws_repeat():
    x = images(50).float()
    plain, labels = augment(x, 0.0, generator=source())
    assert torch.equal(plain, x) and labels.shape == (50, 9) and not labels.any()
    some, labels = augment(x, 0.05, generator=source(3))
    untouched = ~labels.any(1)
    assert 5 < untouched.sum() < 45 and torch.equal(some[untouched], x[untouched]) and not torch.equal(some[~untouched], x[~untouched])
    assert all(torch.equal(a, b) for a, b in zip(augment(x, 0.05, generator=source(3)), (some, labels)))
    assert some.dtype == x.dtype and some.isfinite().all()


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_no_probability(p):
    with pytest.raises(ValueError, match="probability between 0 and 1"):
        augment(images(), p)
