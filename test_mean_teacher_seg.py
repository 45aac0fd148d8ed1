# SPDX-License-Identifier: MIT
"""Tests of the real functions, against something independent of them: a value worked out by hand,
a closed form, a NumPy loop, or a property that the mathematics demands.

    python -m pytest

    part of this file        section of mean_teacher_seg.py that it covers
    -----------------------  --------------------------------------------------------------
    U-Net                    2
    Losses                   3, and the losses of 9 that are ablations
    Delayed augmentation     4
    Teacher and ramps        5
    One training step        6, with a second, naive implementation; the ablations of 9
    Data                     7: slices, layouts, masks, split
    Metrics                  8
    Training and report      9, 10, and of 13 the options
    Resume                   9, 10: kills, other settings, a full disk, torchrun
    Predict                  11
    Bad input                13, and what 7, 9, 11 refuse
    The phantom              12
    The file as a whole      1 to 6 as pieces to copy, imports, the README's own loop
    The notebook             tutorial.ipynb
    Real scans               7, on the data of ../shared, where they are
"""
import ast
import base64
import copy
import csv
import dataclasses
import gzip
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mean_teacher_seg as mt

HERE = Path(__file__).resolve().parent
SCRIPT = HERE / "mean_teacher_seg.py"
TINY = [site._replace(mm=0.5, size=48, slices=(2, 2), black=site.black // 4) for site in mt.SITES]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A phantom of full subject count and tiny matrices."""
    folder = tmp_path_factory.mktemp("phantom") / "tiny"
    mt.write_phantom(folder, sites=TINY)
    return folder


def small(folder, out="", **changes):
    settings = dict(data=str(folder), out=str(out), crop=32, width=4, epochs=(2,))
    return dataclasses.replace(mt.DEMO, **{**settings, **changes})


def rotation(degrees):
    """phi that turns the picture anticlockwise, as torch.rot90 does."""
    a = math.radians(degrees)
    return torch.tensor([[[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]])


def entropy(y):
    return -y * math.log(y) - (1 - y) * math.log(1 - y)


# --- U-Net ---------------------------------------------------------------------------------------

def test_unet_has_15_convolutions_and_the_known_number_of_parameters():
    network = mt.UNet(64)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 15
    assert sum(p.numel() for p in network.parameters()) == 4_837_249


def test_unet_keeps_the_size_and_returns_logits():
    torch.manual_seed(0)
    network = mt.UNet(4, 0.0)
    with torch.no_grad():
        assert network(3 * torch.randn(2, 1, 16, 40)).shape == (2, 1, 16, 40)
        network.out.bias.fill_(-7.0)
        assert network(torch.randn(2, 1, 16, 16)).mean() < -1    # no sigmoid inside


@pytest.mark.parametrize("size", [(15, 16), (16, 20)])
def test_unet_refuses_sizes_that_cannot_be_halved_three_times(size):
    with pytest.raises(ValueError, match=f"multiples of 8.*{size[0]} x {size[1]}"):
        mt.UNet(4)(torch.zeros(1, 1, *size))


def test_unet_sees_as_far_as_its_layers_reach():
    # By hand: 2 convs at each of 1, 2, 4, 8 px, reach 2 * (1 + 2 + 4 + 8) = 30 px on the way down;
    # an output pixel must not depend on anything hundreds of px away, but must on its near field.
    network, x = mt.UNet(4, 0.0).eval(), torch.randn(1, 1, 256, 256, requires_grad=True)
    network(x)[0, 0, 128, 128].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert 30 <= 128 - rows.min() <= 100 and 30 <= rows.max() - 128 <= 100


# --- Losses --------------------------------------------------------------------------------------

def test_dice_loss_by_hand():
    p = torch.tensor([0.5, 0.5, 0.0, 1.0]).view(1, 1, 2, 2)
    y = torch.tensor([1.0, 0.0, 0.0, 1.0]).view(1, 1, 2, 2)
    # sum(py) = 1.5, sum(p) = 2, sum(y) = 2: -2 * 1.5 / 4
    assert mt.dice_loss(p, y).item() == pytest.approx(-0.75, abs=1e-4)
    assert mt.dice_loss(y, y).item() == pytest.approx(-1.0)
    assert mt.dice_loss(torch.zeros(4), torch.zeros(4)).item() == pytest.approx(-1.0)


def test_dice_loss_is_one_ratio_over_the_batch():
    p, y = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    p[0] = y[0] = 1.0                                    # slice 0: all four right
    y[1, 0, 0, 0] = 1.0                                  # slice 1: its only pixel missed
    # over the batch 2 * 4 / (4 + 5); the mean of two ratios would be (1 + 0) / 2
    assert mt.dice_loss(p, y).item() == pytest.approx(-8 / 9, abs=1e-4)


def test_losses_are_float32_for_half_precision_input():
    half = torch.full((1, 1, 64, 64), 0.5, dtype=torch.bfloat16)
    assert mt.dice_loss(half, half).dtype == torch.float32
    assert mt.consistency_loss(half, half).dtype == torch.float32


@pytest.mark.parametrize("kind, losses", [
    ("bce", (math.log(2), -math.log(0.75))),             # ln 2 whatever y is; -ln 0.75
    ("mse", (0.2 ** 2, 0.25 ** 2))])
def test_consistency_loss_by_hand(kind, losses):
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 1, 2)         # p = 0.5, 0.75
    teacher = torch.tensor([0.3, 1.0]).view(1, 1, 1, 2)
    valid = torch.tensor([True, True]).view(1, 1, 1, 2)
    second = torch.tensor([False, True]).view(1, 1, 1, 2)

    def found(function, *valid):
        return function(logits, teacher, *valid).item()

    option = mt.step_options(dataclasses.replace(mt.DEMO, consistency=kind), CPU)["consistency"]
    for function in [option] + [mt.consistency_loss] * (kind == "bce"):
        assert found(function, valid) == pytest.approx(sum(losses) / 2, abs=1e-6)
        assert found(function, second) == pytest.approx(losses[1], abs=1e-6)
        assert found(function, second & False) == 0
    if kind == "bce":
        assert found(mt.consistency_loss) == found(mt.consistency_loss, valid)


@pytest.mark.parametrize("y", [0.1, 0.5, 0.9])
def test_consistency_is_least_at_agreement_and_there_the_teachers_entropy(y):
    logit = torch.tensor(math.log(y / (1 - y)), requires_grad=True)
    value = mt.consistency_loss(logit, torch.tensor(y))
    value.backward()
    assert value.item() == pytest.approx(entropy(y), abs=1e-6) and abs(logit.grad) < 1e-6
    for other in (-3.0, 0.2, 4.0):
        assert mt.consistency_loss(torch.tensor(other), torch.tensor(y)) > value.detach()


def test_equation_2_as_printed_rewards_the_wrong_answer():
    def printed(y, p):
        return -y * math.log(p) + (1 - y) * math.log(1 - p)

    p = [0.01, 0.5, 0.99, 0.999999]                      # the teacher says y = 0
    wrong = [printed(0.0, value) for value in p]
    right = [mt.consistency_loss(torch.tensor(math.log(v / (1 - v))), torch.tensor(0.0)).item()
             for v in p]
    assert wrong == sorted(wrong, reverse=True) and wrong[-1] < -13     # ln(1e-6) = -13.8
    assert right == sorted(right) and right == pytest.approx([-w for w in wrong], rel=1e-3)


@pytest.mark.parametrize("confidence, counted", [(0.0, [0, 1, 2, 3]), (0.9, [0, 3]), (0.99, [])])
def test_confidence_leaves_out_what_the_teacher_is_unsure_of(confidence, counted):
    logits = torch.tensor([3.0, 0.1, -0.1, -3.0]).view(1, 1, 2, 2)     # teacher: 0.95, 0.52, ...
    option = mt.step_options(dataclasses.replace(mt.DEMO, confidence=confidence), CPU)
    found = option["consistency"](logits, torch.sigmoid(logits), logits == logits)
    losses = [entropy(1 / (1 + math.exp(-z))) for z in logits.flatten().tolist()]
    expected = [losses[k] for k in counted]
    assert found.item() == pytest.approx(np.mean(expected) if counted else 0, abs=1e-6)


# --- Delayed augmentation ------------------------------------------------------------------------

def smooth_images(n=2, channels=1, size=48):
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    return torch.stack([torch.exp(-((x - 0.2 * k) ** 2 + 2 * (y + 0.1) ** 2) / 0.1)
                        for k in range(n * channels)]).view(n, channels, size, size)


def test_warp_by_the_identity_changes_nothing():
    x = torch.randn(3, 2, 17, 30)
    assert torch.allclose(mt.warp(x, mt.sample_affine(3, 0.0)), x, atol=1e-5)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_warp_by_right_angles_is_rot90(turns):
    x = torch.randn(1, 1, 24, 24)
    warped = mt.warp(x, rotation(90 * turns))
    assert torch.allclose(warped, torch.rot90(x, turns, (2, 3)), atol=1e-4)


def test_warp_turns_without_shearing_when_the_image_is_not_square():
    x = torch.zeros(1, 1, 24, 40)
    x[0, 0, 8:16, 16:24] = torch.randn(8, 8)             # a square patch around the centre
    turned = mt.warp(x, rotation(90))[0, 0, 8:16, 16:24]
    assert torch.allclose(turned, torch.rot90(x[0, 0, 8:16, 16:24]), atol=1e-4)


def test_warp_by_whole_pixels_is_roll():
    x = torch.randn(1, 1, 20, 28)
    phi = torch.tensor([[[1.0, 0, 3], [0, 1.0, -2]]])    # read 3 px further right, 2 px further up
    moved = torch.roll(x, (2, -3), (2, 3))
    assert torch.allclose(mt.warp(x, phi)[..., 2:, :-3], moved[..., 2:, :-3], atol=1e-4)
    assert (mt.warp(x, phi)[..., :2, :] == 0).all()      # outside is 0


def test_warp_there_and_back():
    x, phi = smooth_images(), torch.cat([rotation(4.5), rotation(-3.0)])
    phi[:, :, 2] = torch.tensor([[1.5, -0.5], [0.3, 2.0]])
    square = torch.cat([phi, torch.tensor([[[0.0, 0, 1]]]).expand(2, 1, 3)], 1)
    back = mt.warp(mt.warp(x, phi), torch.linalg.inv(square)[:, :2])
    assert (back - x)[..., 6:-6, 6:-6].abs().max() < 0.03 < (mt.warp(x, phi) - x).abs().max()


def test_warp_moves_image_and_mask_together():
    x, phi = smooth_images(), torch.cat([rotation(20), rotation(-35)])
    mask = mt.warp((x > 0.5).float(), phi) >= 0.5
    assert ((mt.warp(x, phi) > 0.5) ^ mask).float().mean() < 0.01 < mask.float().mean()


def test_sample_affine_stays_in_its_ranges_and_fills_them():
    torch.manual_seed(0)
    phi = mt.sample_affine(4000, 4.5, translation=3.0, scale=0.1)
    assert phi.shape == (4000, 2, 3)
    angle = torch.rad2deg(torch.atan2(phi[:, 1, 0], phi[:, 0, 0]))
    zoom = 1 / torch.linalg.det(phi[:, :, :2]).sqrt()
    for values, low, high in ((angle, -4.5, 4.5), (zoom, 0.9, 1.1), (phi[:, :, 2], -3, 3)):
        assert low <= values.min() and values.max() <= high
        assert values.max() - values.min() > 0.98 * (high - low)
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    only = mt.sample_affine(5, 4.5)
    assert (only[:, :, 2] == 0).all() and torch.allclose(torch.linalg.det(only[:, :, :2]),
                                                         torch.ones(5), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_delayed_targets_lie_on_the_students_grid(channels):
    # A pointwise linear network commutes with a linear resampling, so the student's f(g(x)) and
    # the teacher's g(f(x)) must be the same picture; f(x), without the delayed g, must not be.
    # (The sigmoid comes between: the teacher's logits are small, where it is a line.)
    network = nn.Conv2d(channels, 1, 1, bias=False)
    network.weight.data = torch.linspace(0.02, 0.04, channels).view(1, channels, 1, 1)
    x, phi = smooth_images(2, channels), torch.cat([rotation(15), rotation(-15)])
    augmented, inside = mt.augment(x, phi, 0.0)
    targets = mt.delayed_targets(network, x, phi, 0.0)
    assert augmented.shape == x.shape and inside.shape == targets.shape == (2, 1, 48, 48)
    assert augmented.dtype == targets.dtype == torch.float32 and not targets.requires_grad
    student = torch.sigmoid(network(augmented)).detach()
    undelayed = torch.sigmoid(network(x)).detach()
    assert (student - targets)[inside].abs().max() < 1e-5
    assert (student - undelayed)[inside].abs().max() > 1e-4
    assert inside.dtype == torch.bool and (targets[~inside] < 0.5).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_inside_is_where_phi_reads_from_within_the_image(channels):
    height, width = 20, 28
    phi = torch.tensor([[[1.0, 0, 3], [0, 1.0, -2]], [[1.0, 0, -0.5], [0, 1.0, 0]]])
    phi = torch.cat([phi, rotation(30)])
    inside = mt.augment(torch.randn(3, channels, height, width), phi)[1]
    assert inside.shape == (3, 1, height, width)
    for k, row, column in itertools.product(range(3), range(height), range(width)):
        right, down = column - (width - 1) / 2, row - (height - 1) / 2
        x, y = phi[k] @ torch.tensor([right, down, 1.0])
        margin = min((width - 1) / 2 - abs(x), (height - 1) / 2 - abs(y))
        if abs(margin) > 1e-3:                           # not a matter of rounding
            assert inside[k, 0, row, column] == (margin > 0)


def test_augment_adds_noise_of_the_given_std_to_every_channel_before_the_warp():
    torch.manual_seed(0)
    shift = torch.tensor([[[1.0, 0, 0.5], [0, 1.0, 0.5]]]).repeat(8, 1, 1)
    for phi, std in ((mt.sample_affine(8, 0.0), 0.1), (shift, 0.05)):    # the mean of 4: half
        noise = mt.augment(torch.zeros(8, 3, 64, 64), phi, 0.1)[0][..., 1:-1, 1:-1]
        assert noise.std((0, 2, 3)).tolist() == pytest.approx([std] * 3, rel=0.05)
        assert torch.corrcoef(noise.transpose(0, 1).flatten(1)).triu(1).abs().max() < 0.05


# --- Teacher and ramps ---------------------------------------------------------------------------

def test_update_teacher_matches_its_closed_form():
    torch.manual_seed(0)
    student = nn.Linear(3, 2)
    teacher, alpha, n = mt.make_teacher(student), 0.9, 7
    first = teacher.weight.clone()
    weights = torch.randn(n, 2, 3)
    for weight in weights:
        student.weight.data.copy_(weight)
        mt.update_teacher(student, teacher, alpha)
    # theta'_n = alpha^n theta'_0 + (1 - alpha) sum_k alpha^(n-k) theta_k
    expected = alpha ** n * first + (1 - alpha) * sum(
        alpha ** (n - k) * weights[k - 1] for k in range(1, n + 1))
    assert torch.allclose(teacher.weight, expected, atol=1e-6)
    assert torch.equal(student.weight, weights[-1])


def test_the_teacher_starts_as_a_copy_that_needs_no_gradient():
    student = mt.UNet(4).eval()
    teacher = mt.make_teacher(student)
    pairs = list(zip(student.state_dict().values(), teacher.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_ramps_at_known_epochs():
    assert mt.ramp_up(50, 100) == pytest.approx(math.exp(-1.25))
    assert mt.ramp_up(1, 100) == pytest.approx(math.exp(-5 * 0.99 ** 2))
    assert mt.ramp_up(100, 100) == mt.ramp_up(300, 100) == mt.ramp_up(1, 0) == 1
    assert mt.learning_rate_factor(25, 350, 50) == pytest.approx(math.exp(-1.25))
    assert mt.learning_rate_factor(50, 350, 50) == 1
    assert mt.learning_rate_factor(200, 350, 50) == pytest.approx(0.5)   # half way down
    assert mt.learning_rate_factor(125, 350, 50) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert mt.learning_rate_factor(350, 350, 50) == pytest.approx(0)
    assert mt.learning_rate_factor(3, 3, 50) == mt.ramp_up(3, 50)        # shorter than its ramp


# --- One training step ---------------------------------------------------------------------------

def batch(labelled=2, unlabelled=2, size=16, seed=0):
    """-> images, masks, unlabelled images"""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(labelled + unlabelled, 1, size, size, generator=generator)
    masks = (F.avg_pool2d(images, 5, 1, 2)[:labelled] > 0.1).float()
    return images[:labelled], masks, images[labelled:]


def networks(lr=0.1, student=None):
    torch.manual_seed(0)
    student = student or mt.UNet(4, 0.0)
    return student, mt.make_teacher(student), torch.optim.SGD(student.parameters(), lr=lr)


def test_the_loss_is_dice_plus_weight_times_consistency():
    student, teacher, optimizer = networks(lr=0.0)
    mt.update_teacher(mt.UNet(4, 0.0), teacher, 0.5)     # somewhere else than the student
    images, masks, unlabelled = batch()
    torch.manual_seed(5)
    losses = mt.train_step(student, teacher, optimizer, images, masks, unlabelled, 0, weight=1.7,
                           noise=0.0)
    torch.manual_seed(5)
    pairs = [(x, mt.sample_affine(2, 4.5)) for x in (images, unlabelled)]
    p = np.concatenate([torch.sigmoid(student(mt.warp(*pair))).detach().double().numpy()
                        for pair in pairs])
    y = (mt.warp(masks, pairs[0][1]) >= 0.5).numpy()
    dice = -2 * (p[:2] * y).sum() / (p[:2].sum() + y.sum())
    # The teacher was updated after its pass, alpha = min(1/2, 0.99): undo that to ask it again.
    with torch.no_grad():
        for theta, mean in zip(student.parameters(), teacher.parameters()):
            mean.copy_(2 * mean - theta)
        t = np.concatenate([mt.warp(torch.sigmoid(teacher(x)), phi).double().numpy()
                            for x, phi in pairs])
    inside = np.concatenate([mt.warp(torch.ones_like(x), phi).numpy() > 0.999 for x, phi in pairs])
    bce = -(t * np.log(p) + (1 - t) * np.log(1 - p))[inside].mean()
    assert 0 < inside.sum() < inside.size
    assert losses["dice"].item() == pytest.approx(dice, abs=1e-4)
    assert losses["consistency"].item() == pytest.approx(bce, abs=1e-4)
    assert losses["loss"].item() == pytest.approx(dice + 1.7 * bce, abs=1e-4)


def test_at_weight_zero_unlabelled_slices_change_nothing(monkeypatch):
    noise = torch.randn(9, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    phi = torch.cat([rotation(3.0 * k) for k in range(9)])
    monkeypatch.setattr(mt, "sample_affine", lambda n, *_, **__: phi[:n])
    monkeypatch.setattr(torch, "randn_like", lambda x: noise[:len(x)])
    images, masks, unlabelled = batch(2, 3)
    unlabelled = 5 + 3 * unlabelled                      # of a very different scanner

    def parameters(semi, images, masks, unlabelled):
        student, teacher, optimizer = networks()
        before = nn.utils.parameters_to_vector(student.parameters()).detach()
        mt.train_step(student, teacher if semi else None, optimizer, images, masks, unlabelled, 0,
                      weight=0.0)
        return nn.utils.parameters_to_vector(student.parameters()).detach() - before

    expected = parameters(False, images, masks, unlabelled)
    for extra in (unlabelled, unlabelled[:0]):
        found = parameters(True, images, masks, extra)
        assert (found - expected).norm() <= 1e-6 * expected.norm() > 0
    # And the check can fail: in one pass for both, BatchNorm mixes them.
    dice = mt.dice_loss
    monkeypatch.setattr(mt, "dice_loss", lambda p, y: dice(p[:2], y[:2]))
    joint = parameters(True, torch.cat([images, unlabelled]),
                       torch.cat([masks, torch.zeros_like(unlabelled)]), unlabelled[:0])
    assert F.cosine_similarity(joint, expected, dim=0) < 0.9


@pytest.mark.parametrize("step, alpha", [(0, 1 / 2), (1, 2 / 3), (8, 0.9), (500, 0.95)])
def test_only_the_student_gets_gradients_and_the_teacher_the_average(step, alpha):
    student, teacher, optimizer = networks()             # which warms up as a plain mean
    before = [p.clone() for p in teacher.parameters()]
    mt.train_step(student, teacher, optimizer, *batch(), step=step, alpha=0.95)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    for old, new, theta in zip(before, teacher.parameters(), student.parameters()):
        assert torch.allclose(new, alpha * old + (1 - alpha) * theta, atol=1e-6)


def test_the_teachers_batchnorm_statistics_come_from_its_own_passes_apart():
    student, teacher, optimizer = networks()
    convolution = teacher.down[0][0]
    images, masks, unlabelled = batch()
    with torch.no_grad():                                # what its first BatchNorm will see
        one, other = (F.relu(convolution(x)).mean((0, 2, 3)) for x in (images, unlabelled))
    mt.train_step(student, teacher, optimizer, images, masks, unlabelled, 0, noise=0.0)
    expected = 0.9 * 0.1 * one + 0.1 * other
    assert torch.allclose(teacher.down[0][2].running_mean, expected, atol=1e-5)
    assert not torch.allclose(student.down[0][2].running_mean, expected, atol=1e-5)


@pytest.mark.parametrize("asleep", ["student", "teacher", "both", "supervised"])
def test_a_network_in_eval_mode_is_refused(asleep):
    student, teacher, optimizer = networks()
    before = nn.utils.parameters_to_vector(student.parameters()).clone()
    student.train(asleep == "teacher")
    teacher.train(asleep == "student")
    with pytest.raises(ValueError, match=r"train mode.*\.train\(\)"):
        mt.train_step(student, None if asleep == "supervised" else teacher, optimizer, *batch(), 0)
    assert torch.equal(nn.utils.parameters_to_vector(student.parameters()), before)


# A second implementation of the mean teacher, on purpose a naive one: NumPy in float64, loops over
# samples and pixels, written from the paper's equations: warp, losses and their derivatives, Adam,
# the average. Only the network's own passes are torch's, which differentiates sum(gradient * z).

def naive_warp(picture, matrix):
    """Bilinear look-up, pixel by pixel; 0 outside. picture (H, W), matrix (2, 3) in px."""
    height, width = picture.shape
    result = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            right, down = column - (width - 1) / 2, row - (height - 1) / 2
            x, y = matrix @ [right, down, 1]
            x, y = x + (width - 1) / 2, y + (height - 1) / 2
            for i in (int(np.floor(y)), int(np.floor(y)) + 1):
                for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= i < height and 0 <= j < width:
                        share = (1 - abs(y - i)) * (1 - abs(x - j))
                        result[row, column] += share * picture[i, j]
    return result


def naive_step(student, teacher, moments, images, masks, unlabelled, step, weight, alpha, lr,
               decay, degrees, noise):
    """Algorithm 1 for one batch; the random draws in the order of train_step. -> three losses."""
    parts = [images, unlabelled]
    # Scale and two translations are 0 here, but drawn.
    angles = [[torch.empty(len(part)).uniform_(-limit, limit) for limit in (degrees, 0, 0, 0)][0]
              for part in parts]
    one, other = ([torch.randn_like(part) for part in parts] for _ in range(2))
    angles = np.radians(torch.cat(angles).numpy())
    phi = [np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0]]) for a in angles]
    x, n = torch.cat(parts).numpy().astype(float), len(phi)
    shown = x + noise * torch.cat(one).numpy()
    shown = np.stack([naive_warp(shown[b, 0], phi[b]) for b in range(n)])
    y = [naive_warp(masks[b, 0].numpy(), phi[b]) >= 0.5 for b in range(len(masks))]

    def passes(network, x):                              # labelled and unlabelled apart
        halves = x[:len(masks)], x[len(masks):]
        return torch.cat([network(torch.from_numpy(half).float()) for half in halves])[:, 0]

    with torch.no_grad():
        guess = passes(teacher, x + noise * torch.cat(other).numpy()).double().numpy()
    t = [naive_warp(1 / (1 + np.exp(-guess[b])), phi[b]) for b in range(n)]
    inside = [naive_warp(np.ones(x.shape[2:]), phi[b]) > 0.999 for b in range(n)]
    z = passes(student, shown[:, None])
    p = 1 / (1 + np.exp(-z.detach().double().numpy()))
    # eq. 3 and eq. 2, and by hand their derivatives with respect to the logits z
    overlap = sum((p[b] * y[b]).sum() for b in range(len(masks)))
    total = sum(p[b].sum() + y[b].sum() for b in range(len(masks)))
    count = sum(inside[b].sum() for b in range(n))
    dice, bce, gradient = -2 * overlap / total, 0.0, np.zeros_like(p)
    for b in range(n):
        if b < len(masks):
            gradient[b] += (-2 * y[b] / total + 2 * overlap / total ** 2) * p[b] * (1 - p[b])
        cross_entropy = -t[b] * np.log(p[b]) - (1 - t[b]) * np.log(1 - p[b])
        bce += cross_entropy[inside[b]].sum() / count
        gradient[b] += weight * (p[b] - t[b]) * inside[b] / count
    student.zero_grad()
    (z * torch.from_numpy(gradient).float()).sum().backward()
    remember = min(1 - 1 / (step + 2), alpha)
    for k, (theta, mean) in enumerate(zip(student.parameters(), teacher.parameters())):
        g = theta.grad.double().numpy() + decay * theta.detach().double().numpy()
        m, v = moments.get(k, (0, 0))
        m, v = moments[k] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g ** 2
        up, down = m / (1 - 0.9 ** (step + 1)), np.sqrt(v / (1 - 0.999 ** (step + 1))) + 1e-8
        new = theta.detach().double().numpy() - lr * up / down
        theta.data = torch.from_numpy(new).float()
        mean.data = torch.from_numpy(remember * mean.double().numpy() + (1 - remember) * new).float()
    return dice + weight * bce, dice, bce


def test_twenty_steps_of_a_second_naive_implementation_give_the_same_losses():
    # A smooth network with BatchNorm: at a kink, of a ReLU or a maximum, rounding errors would grow.
    lr, weight, alpha, decay, degrees, noise = 0.01, 2.9, 0.95, 2e-3, 12.0, 0.1
    images, masks, unlabelled = batch(2, 3)
    torch.manual_seed(4)
    student = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.Tanh(),
                            nn.Conv2d(4, 1, 5, padding=2))
    teacher = mt.make_teacher(student)
    naive_student, naive_teacher, moments = copy.deepcopy(student), copy.deepcopy(teacher), {}
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, weight_decay=decay, fused=True)
    curves = [], []
    torch.manual_seed(9)
    for step in range(20):
        losses = mt.train_step(student, teacher, optimizer, images, masks, unlabelled, step,
                               weight, alpha, (degrees, 0.0, 0.0), noise)
        curves[0].append([losses[name].item() for name in ("loss", "dice", "consistency")])
    torch.manual_seed(9)
    for step in range(20):
        curves[1].append(naive_step(naive_student, naive_teacher, moments, images, masks,
                                    unlabelled, step, weight, alpha, lr, decay, degrees, noise))
    ours, naive = np.array(curves)
    assert ours[-1, 1] < ours[0, 1] - 0.05               # it does learn
    assert np.abs(ours - naive).max() < 3e-6


class Recorder(nn.Module):
    """A pointwise network that remembers its inputs."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Conv2d(1, 1, 1), []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.layer(x)


@pytest.mark.parametrize("augmentation", ["delayed", "same"])
def test_what_student_and_teacher_are_shown(augmentation):
    student, teacher, optimizer = networks(0.0, Recorder())
    images, masks = smooth_images(3), torch.zeros(1, 1, 48, 48)
    config = dataclasses.replace(mt.DEMO, augmentation=augmentation, degrees=20.0, noise=0.0)
    torch.manual_seed(3)
    mt.train_step(student, teacher, optimizer, images[:1], masks, images[1:], 0,
                  **mt.step_options(config, CPU))
    torch.manual_seed(3)
    warped = mt.warp(images, torch.cat([mt.sample_affine(1, 20), mt.sample_affine(2, 20)]))
    assert [len(x) for x in student.seen] == [len(x) for x in teacher.seen] == [1, 2]
    assert torch.allclose(torch.cat(student.seen), warped, atol=1e-6)
    assert torch.allclose(torch.cat(teacher.seen),
                          images if augmentation == "delayed" else warped, atol=1e-6)


def test_noise_differs_between_student_and_teacher_and_has_the_given_std():
    student, teacher, optimizer = networks(0.0, Recorder())
    x = torch.zeros(2, 1, 64, 64)
    mt.train_step(student, teacher, optimizer, x, x, x, 0, affine=(0.0, 0.0, 0.0), noise=0.1)
    seen = torch.stack([*student.seen, *teacher.seen])
    assert seen.flatten(1).std(1).tolist() == pytest.approx([0.1] * 4, rel=0.05)
    assert torch.corrcoef(seen.flatten(1)).triu(1).abs().max() < 0.1     # all independent


def test_autocast_does_not_blur_the_warp():
    # In bfloat16 the sampling grid of a 200 px image would be off by most of a pixel.
    student, teacher, optimizer = networks(0.0, nn.Conv2d(1, 1, 1))
    options = mt.step_options(dataclasses.replace(mt.DEMO, noise=0.0, consistency="mse"), CPU)
    x, masks = torch.randn(2, 1, 200, 200), torch.zeros(1, 1, 200, 200)
    found = []
    for amp in (False, True):
        torch.manual_seed(0)
        losses = mt.train_step(student, teacher, optimizer, x[:1], masks, x[1:], 0,
                               **{**options, "amp": amp})
        found.append(losses["consistency"].item())
    assert found[1] == pytest.approx(found[0], rel=0.02) and found[0] > 0


@pytest.mark.parametrize("semi", [False, True])
def test_one_batch_can_be_overfitted(semi):
    torch.manual_seed(0)
    student = mt.UNet(8, 0.0)
    teacher = mt.make_teacher(student) if semi else None
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    images = torch.randn(4, 1, 32, 32)
    images[:, :, 12:20, 12:20] += 2.0
    masks = torch.zeros(2, 1, 32, 32)
    masks[:, :, 12:20, 12:20] = 1.0
    for step in range(60):
        losses = mt.train_step(student, teacher, optimizer, images[:2], masks, images[2:], step,
                               weight=0.5, alpha=0.9)
    assert losses["dice"] < -0.85


# --- Data ----------------------------------------------------------------------------------------

SHAPE, GRID, FAST = (40, 36, 3), np.diag([0.5, 0.5, 5.0, 1.0]), dict(crop=32, spacing=0.5)


def write_nifti(path, volume, mm=(0.5, 0.5, 5.0), axes="RAS"):
    """Write an array that is in RAS order, stored in another orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, np.diag([*mm, 1.0]))
    nib.save(image.as_reoriented(nib.orientations.axcodes2ornt(axes)), path)


def cord(seed, shape=SHAPE):
    """A volume and its SCGM-style mask without any symmetry."""
    volume = np.random.default_rng(seed).normal(100, 10, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[16:28, 12:22] = 2
    mask[18:24, 14:18] = mask[22:24, 18:20] = 1
    volume[mask == 1] += 60
    return volume, mask


def write_scgm(folder, people=(1, 11), **how):
    for number in people:
        volume, mask = cord(100 + number)
        half = folder / ("training" if number <= 10 else "test")
        write_nifti(half / f"site1-sc{number:02d}-image.nii.gz", volume, **how)
        for rater in range(1, 5) if number <= 10 else ():
            write_nifti(half / f"site1-sc{number:02d}-mask-r{rater}.nii.gz", mask, **how)


def write_bids(folder, subjects=("sub-a",), runs=(1,), **how):
    """The first run of each subject has a mask."""
    for k, subject in enumerate(subjects):
        for run in runs:
            volume, mask = cord(101 + k)
            place, stem = Path(subject, "anat"), f"{subject}_run-{run}_T2starw"
            write_nifti(folder / place / f"{stem}.nii.gz", volume, **how)
            if run == 1:
                write_nifti(folder / "derivatives/labels" / place / f"{stem}_gmseg-manual.nii.gz",
                            (mask == 1).astype(np.uint8), **how)


def write_decathlon(folder, cases=("case_1",), unlabelled=(), end="", **how):
    for k, case in enumerate([*cases, *unlabelled]):
        volume, mask = cord(101 + k)
        part = "Tr" if case in cases else "Ts"
        write_nifti(folder / f"images{part}/{case}{end}.nii.gz", volume, **how)
        if case in cases:
            write_nifti(folder / f"labelsTr/{case}.nii.gz", mask, **how)


def write_nnunet(folder, **how):
    write_decathlon(folder, end="_0000", **how)


def fast(**changes):
    return dataclasses.replace(mt.Config(), **{**FAST, **changes})


def masked(folder):
    """A scan with a mask in the BIDS layout, the mask's file. To be overwritten."""
    write_bids(folder)
    scan, = mt.find_scans(folder)
    return scan, scan.masks[mt.ANY]


def test_every_layout_and_orientation_gives_the_same_slices(tmp_path):
    mm, results = (0.4, 0.6, 3.0), []
    layouts = write_scgm, write_bids, write_decathlon, write_nnunet
    for axes, write in itertools.product(("RAS", "LAS", "LPS", "SRA"), layouts):
        folder = tmp_path / axes / write.__name__
        write(folder, mm=mm, axes=axes)
        scan = next(s for s in mt.find_scans(folder) if s.masks)
        results.append(mt.read_scan(scan, fast(), True))
    assert len(results[0].images) == 3
    for part in results[1:]:
        assert torch.equal(part.images, results[0].images)
        assert torch.equal(part.masks, results[0].masks)
    # By hand: 40 x 0.4 mm = 16 mm across, 36 x 0.6 = 21.6 mm in front: 32 x 43 px of 0.5 mm.
    assert mt.to_slices(mt.canonical(mt.load_nifti(scan.image))[0], mm, 0.5).shape == (3, 1, 43, 32)


@pytest.mark.parametrize("end", ["", "_0000"])
def test_the_decathlons_layout_and_nnunets_names(tmp_path, end):
    write_decathlon(tmp_path, ("case_0001", "case_0002"), ("case_0003",), end)
    for name in (["case_0001_0001", "case_0003_0001"] if end else []) + [".case_0001", "._x"]:
        for part in ("imagesTr", "imagesTs"):            # further channels; another system's files
            (tmp_path / part / f"{name}.nii.gz").write_bytes(b"not to be opened")
    if end:                                              # a further channel needs its first one
        (tmp_path / "imagesTs/case_0001_0001.nii.gz").unlink()
        (tmp_path / "imagesTr/case_0003_0001.nii.gz").unlink()
    write_nifti(tmp_path / "labelsTs/case_0003.nii.gz", cord(1)[1])      # never to be used
    (tmp_path / "labelsTr/case_0002.nii.gz").unlink()
    one, *others = mt.find_scans(tmp_path)
    assert one.masks == {mt.ANY: tmp_path / "labelsTr/case_0001.nii.gz"}
    assert [(s.name, s.person, s.site, s.masks) for s in others] == [
        (name, name, "", {}) for name in ("case_0002", "case_0003")]
    assert [s.image.parent.name for s in (one, *others)] == ["imagesTr"] * 2 + ["imagesTs"]


@pytest.mark.parametrize("label, values", [((1,), [1]), ((2,), [2]), ((1, 2), [1, 2])])
def test_label_says_which_values_are_foreground(tmp_path, label, values):
    volume, mask = cord(1)
    mask[0, 0, 0] = 255                                  # any other whole number: background
    scan, path = masked(tmp_path)
    write_nifti(path, mask)
    assert np.array_equal(mt.read_mask(scan, "4", SHAPE, GRID, label), np.isin(mask, values))
    config, _ = mt.parse(["--label", *map(str, label)])
    crop = dataclasses.replace(config, crop=40, spacing=0.5)
    assert mt.read_scan(scan, crop, True).masks.sum() == np.isin(mask, values).sum()


def test_rows_run_from_the_front_and_columns_from_the_left(tmp_path):
    volume = np.zeros((8, 6, 2), np.float32)
    volume[7, 5, 1] = 1.0                                # rightmost, most anterior, upper slice
    write_nifti(tmp_path / "v.nii.gz", volume, mm=(1, 1, 1), axes="LPI")
    array, affine = mt.canonical(mt.load_nifti(tmp_path / "v.nii.gz"))
    assert np.allclose(np.diag(affine), 1)
    slices = mt.to_slices(array, (1, 1, 1), 1.0)
    assert slices[1, 0, 0, 7] == 1 and slices.sum() == 1


def test_resampling_keeps_a_linear_ramp_and_the_mean():
    ramp = np.linspace(0, 1, 40, dtype=np.float32)[:, None, None].repeat(40, 1)
    half = mt.to_slices(ramp, (0.25, 0.25, 5.0), 0.5)[0, 0]
    assert half.shape == (20, 20)
    centres = (ramp[0::2, 0, 0] + ramp[1::2, 0, 0]) / 2
    assert np.allclose(half[0, 1:-1], centres[1:-1], atol=1e-5)
    noise = np.random.default_rng(0).normal(size=(64, 64, 1)).astype(np.float32)
    assert mt.to_slices(noise, (0.25, 0.25, 5.0), 1.0).std() < 0.4      # antialiased: near 1/4


def test_crop_keeps_the_centre_or_moves_and_pads_what_is_small():
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(mt.center_crop(x, 2, 2)[0, 0], x[0, 0, 2:4, 2:4])
    assert torch.equal(mt.center_crop(x, 2, 2, (1, -2))[0, 0], x[0, 0, 3:5, 0:2])
    padded = mt.center_crop(x, 8, 8)
    assert torch.equal(padded[0, 0, 1:7, 1:7], x[0, 0]) and padded.sum() == x.sum()


def test_slices_are_z_scored_one_by_one():
    x = torch.stack([torch.randn(1, 9, 9) * 5 + 100, torch.randn(1, 9, 9) * 0.1])
    z = mt.normalise(x)
    assert z.mean((2, 3)).abs().max() < 1e-5 and (z.std((2, 3)) - 1).abs().max() < 1e-5


def test_raters_and_majority(tmp_path):
    write_scgm(tmp_path, people=(1,))
    votes = np.zeros((4, *SHAPE), np.uint8)
    votes[:, 20:24, 16:20] = 1                           # all agree
    votes[:3, 24, 16:20] = 1                             # three of four
    votes[:2, 25, 16:20] = 1                             # two of four: a tie is background
    votes[1:2, 26, 16:20] = 1                            # one of four
    votes[3, 10:15] = 2                                  # white matter is not grey matter
    scan, = mt.find_scans(tmp_path)
    for rater in "1234":
        write_nifti(scan.masks[rater], votes[int(rater) - 1])
        found = mt.read_mask(scan, rater, SHAPE, GRID)
        assert np.array_equal(found, votes[int(rater) - 1] == 1)
    found = mt.read_mask(scan, "majority", SHAPE, GRID)
    assert found[20:25, 16:20].all() and found.sum() == 5 * 4 * 3


def turned(angle):
    affine = np.eye(4)
    affine[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return affine


def moved(axis, voxels):
    affine = np.eye(4)
    affine[axis, 3] = voxels * GRID[axis, axis]
    return affine


@pytest.mark.parametrize("change, fits", [
    *[(moved(axis, sign * voxels), voxels <= 0.25) for axis in range(3) for sign in (1, -1)
      for voxels in (0.2, 0.249, 0.251, 0.3)],
    # About the first voxel's corner of the world, so the last of 300 is off by 300 times the angle
    (turned(0.0004), True), (turned(0.0008), True), (turned(0.0009), False),
    (np.diag([1.0008, 1, 1, 1]), True), (np.diag([1.0009, 1, 1, 1]), False)])
def test_a_mask_may_be_off_by_a_quarter_of_a_voxel_at_the_worst_corner(tmp_path, change, fits):
    scan, path = masked(tmp_path)
    mask = np.ones((300, 300, 2), np.uint8)
    nib.save(nib.Nifti1Image(mask, change @ GRID), path)
    if fits:
        assert mt.read_mask(scan, "4", mask.shape, GRID).sum() == mask.size
    else:
        with pytest.raises(mt.InputError, match="not on the grid"):
            mt.read_mask(scan, "4", mask.shape, GRID)


@pytest.mark.parametrize("value, fits", [(0, 1), (255, 1), (256, 0), (-1, 0), (0.5, 0), (1.001, 0)])
def test_a_masks_values_are_whole_numbers_from_0_to_255(tmp_path, value, fits):
    scan, path = masked(tmp_path)
    mask = np.ones(SHAPE, np.float32)
    mask[0, 0, 0] = value
    write_nifti(path, mask)
    if fits:
        assert mt.read_mask(scan, "4", SHAPE, GRID).sum() == mask.size - 1
    else:
        with pytest.raises(mt.InputError, match="gmseg.*: has values .*whole"):
            mt.read_mask(scan, "4", SHAPE, GRID)


def test_empty_slices_are_dropped_as_the_paper_counts_them(tmp_path):
    scan, path = masked(tmp_path)
    volume, mask = cord(1)
    volume[:, :, 0], mask[:, :, 1] = 0, 0                # no image; no grey matter
    write_nifti(scan.image, volume)
    write_nifti(path, mask)
    assert [w[2] for w in mt.read_scan(scan, fast(), True).where] == [2]
    assert [w[2] for w in mt.read_scan(scan, fast(), False).where] == [1, 2]


def test_foreground_outside_the_crop_is_reported_with_a_crop_that_holds_it(tmp_path, capsys):
    scan, path = masked(tmp_path)
    mask = np.zeros(SHAPE, np.uint8)
    mask[18:22, 16:20], mask[0:2, 16:20] = 1, 1          # 8 of 24 columns of it far on the left
    write_nifti(path, mask)
    mt.read_scan(scan, fast(crop=16), True)
    warning = capsys.readouterr().out
    assert "warning" in warning and "33%" in warning and "sub-a_run-1" in warning
    enough = int(re.search(r"--crop (\d+)", warning)[1])
    assert enough in (40, 48)
    mt.read_scan(scan, fast(crop=enough), True)
    assert capsys.readouterr().out == ""


def split(config):
    return mt.split_scans(mt.find_scans(config.data), config)


def test_the_paper_split_has_no_subject_twice(phantom):
    sets = split(small(phantom))
    names = {key: [scan.subject for scan in part] for key, part in sets.items()}
    assert {key: len(part) for key, part in names.items()} == {
        "train": 8, "val": 8, "test": 12, "unlabelled": 40}
    everyone = sum(names.values(), [])
    assert len(everyone) == len(set(everyone)) == 68     # 12 labelled subjects stay unused
    for key, count in (("train", 2), ("val", 2), ("test", 3), ("unlabelled", 10)):
        assert sorted(n.split("-")[0] for n in names[key]) == sorted(
            [f"site{s}" for s in range(1, 5)] * count)
    assert all(int(name[-2:]) > 10 for name in names["unlabelled"])
    assert sets == split(small(phantom, seed=7)) != split(small(phantom, split_seed=1))
    for train in (1, 4, 5):                              # more or fewer people to train, no more
        other = split(small(phantom, split=(train, 2, 3)))
        assert len(other["train"]) == 4 * train
        assert all(other[key] == sets[key] for key in ("val", "test", "unlabelled"))


SUBJECTS = ("sub-aSes1", "sub-aSes2", "sub-b", "sub-c", "sub-d")


@pytest.mark.parametrize("unlabelled, expected", [
    # The other scans of the training person are unlabelled, those of test and validation unused.
    ((), ["sub-aSes1_run-2", *[f"sub-{x}_run-{k}" for x in ("aSes2", "d") for k in (1, 2)]]),
    (("sub-d",), ["sub-d_run-1", "sub-d_run-2"]),
    (("sub-b", "sub-c"), ["sub-b_run-2", "sub-c_run-2"]),        # rescans, never the test scan
    (("sub-aSes1",), ["sub-aSes1_run-2"])])
def test_subjects_by_name_and_their_further_scans(tmp_path, unlabelled, expected):
    write_bids(tmp_path, SUBJECTS, runs=(1, 2))
    sets = split(small(tmp_path, train=("sub-aSes1",), val=("sub-c",), test=("sub-b",),
                       unlabelled=unlabelled))
    names = {key: [scan.name for scan in part] for key, part in sets.items()}
    assert names == {"train": ["sub-aSes1_run-1"], "val": ["sub-c_run-1"],
                     "test": ["sub-b_run-1"], "unlabelled": expected}


def test_unlabelled_subjects_by_name_beside_a_split(tmp_path):
    write_bids(tmp_path, SUBJECTS, runs=(1, 2))
    config = small(tmp_path, split=(1, 1, 1))
    default, named = split(config), split(dataclasses.replace(config, unlabelled=SUBJECTS))
    for key in ("train", "val", "test"):
        assert default[key] == named[key] and len({scan.person for scan in named[key]}) == 1
    people = {scan.person for key in ("val", "test") for scan in default[key]}
    assert default["unlabelled"] and not any(
        scan.masks or scan.person in people for scan in default["unlabelled"])
    taken = named["train"] + named["val"] + named["test"]
    assert len(named["unlabelled"]) == 10 - len(taken)   # everybody's, but what is used elsewhere
    assert not [scan for scan in named["unlabelled"] if scan in taken]


@pytest.mark.parametrize("changes, message", [
    (dict(train=("sub-aSes1",), test=("sub-aSes2",)), "sub-a is in --train and in --test"),
    (dict(train=("sub-b",), test=("sub-c",), val=("sub-c",)), "sub-c is in --val and in --test"),
    (dict(train=("sub-b",), test=("sub-x",)), "--test: no subject sub-x"),
    (dict(train=("sub-b",)), "--train and --test must both be given"),
    (dict(train=("sub-b",), test=("sub-c",), unlabelled=("sub-z",)), "--unlabelled: no.* sub-z"),
    (dict(split=(1, 0, 1), unlabelled=("sub-z",)), "--unlabelled: no subject sub-z"),
    (dict(), r"4 people with masks in all, too few for --split \(2, 2, 3\)")])
def test_splits_that_cannot_be(tmp_path, changes, message):
    write_bids(tmp_path, SUBJECTS)
    with pytest.raises(mt.InputError, match=message):
        split(small(tmp_path, **changes))


def test_masks_of_unlabelled_subjects_are_never_read(tmp_path):
    write_bids(tmp_path / "bids", SUBJECTS, runs=(1, 2))
    write_scgm(tmp_path / "scgm", people=(1, 2, 11))
    write_decathlon(tmp_path / "decathlon", ("a", "b"), ("c",))
    configs = (small(tmp_path / "bids", train=("sub-b",), test=("sub-c",)),
               small(tmp_path / "bids", split=(1, 0, 1), unlabelled=("sub-d",)),
               small(tmp_path / "scgm", split=(1, 0, 1)),
               small(tmp_path / "decathlon", split=(1, 0, 1)))
    before = [mt.load_data(config) for config in configs]
    poison = np.full(SHAPE, np.nan, np.float32)
    labels, name = tmp_path / "bids/derivatives/labels", "sub-{0}/anat/sub-{0}_run-1_T2starw_gmseg"
    write_nifti(labels / f"{name.format('aSes1')}-manual.nii.gz", poison)
    (labels / f"{name.format('d')}-manual.nii.gz").write_bytes(b"not a NIfTI")
    for rater in range(1, 5):
        write_nifti(tmp_path / f"scgm/test/site1-sc11-mask-r{rater}.nii.gz", poison)
    for folder in ("labelsTr", "labelsTs"):
        write_nifti(tmp_path / f"decathlon/{folder}/c.nii.gz", poison)
    for old, config in [*zip(before, configs)][::2] + [(before[3], configs[3])]:
        new = mt.load_data(config)
        assert len(new["unlabelled"].images) > 0
        for key in old:
            assert old[key].where == new[key].where
            assert torch.equal(old[key].images, new[key].images)
            assert torch.equal(old[key].masks, new[key].masks)


# --- Metrics -------------------------------------------------------------------------------------

def test_metrics_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    p, y = rng.random((6, 1, 5, 7)) < 0.4, rng.random((6, 1, 5, 7)) < 0.3
    p[0], y[1], p[2], y[2], p[3], y[3] = 0, 0, 0, 0, 1, 1   # empty, both empty, all foreground
    found = mt.segmentation_metrics(torch.from_numpy(p), torch.from_numpy(y))
    for n in range(6):
        pairs = list(zip(p[n].flat, y[n].flat))
        tp, fp, fn, tn = map(pairs.count, [(1, 1), (1, 0), (0, 1), (0, 0)])
        ratios = dict(dice=(2 * tp, 2 * tp + fp + fn), miou=(tp, tp + fp + fn),
                      accuracy=(tp + tn, 35), precision=(tp, tp + fp), recall=(tp, tp + fn),
                      specificity=(tn, tn + fp))
        for name, (top, below) in ratios.items():
            expected = 100 * top / below if below else 0.0
            assert found[name][n].item() == pytest.approx(expected, abs=1e-4), (n, name)
    assert tuple(found) == mt.METRICS and found["dice"][2] == 0
    dice, iou = found["dice"] / 100, found["miou"] / 100
    assert torch.allclose(dice, 2 * iou / (1 + iou), atol=1e-6)


def test_evaluation_uses_running_statistics_and_changes_nothing():
    network = mt.UNet(4, 0.5)
    network(torch.randn(8, 1, 16, 16) + 3)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(5, 1, 16, 16)
    one = mt.predict_probabilities(network, x, batch=2)
    assert torch.allclose(one, mt.predict_probabilities(network, x), atol=1e-6)  # no Dropout
    assert network.training and ((0 <= one) & (one <= 1)).all()
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    slices = mt.Slices(x, (one > 0.3).float(), [])
    config = dataclasses.replace(mt.DEMO, threshold=0.3)
    assert np.allclose(mt.evaluate(network, slices, config)["dice"], 100)


# --- Training and report -------------------------------------------------------------------------

def run(*arguments, cwd, code=0, launch=(), **environment):
    """The command line in a process of its own."""
    done = subprocess.run([sys.executable, *launch, SCRIPT, *map(str, arguments)], cwd=cwd,
                          text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done


def table_of(path):
    return list(csv.DictReader(open(path)))


def test_the_command_line_end_to_end(phantom, tmp_path):
    done = run("--data", phantom, "--preset", "demo", "--crop", 32, "--width", 4, "--epochs", 2,
               "--runs", 2, "--out", "out", cwd=tmp_path)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "table.md", "metrics.csv", "curves.png", "examples.png",
        *(f"{method}-seed{seed}.{end}" for method in mt.METHODS for seed in (0, 1)
          for end in ("pt", "csv"))}
    table = (out / "table.md").read_text()
    assert table in done.stdout and "Teacher minus supervised" in table
    for row in (*mt.LABELS.values(), "paper: supervised", "paper: semi-supervised"):
        assert f"| {row} " in table
    rows = table_of(out / "metrics.csv")
    assert list(rows[0]) == ["method", "seed", "model", "site", "subject", "slice", *mt.METRICS]
    assert len(rows) == 2 * 3 * 12 * 2                   # runs, networks, test subjects, slices
    # The table's mean and std, recomputed from the per-slice file
    seeds = [np.mean([float(row["dice"]) for row in rows if row["model"] == "teacher"
                      and row["seed"] == seed]) for seed in "01"]
    expected = f"{np.mean(seeds):.2f} ({np.std(seeds, ddof=1):.2f})"
    line = next(line for line in table.splitlines() if "(teacher)" in line)
    assert line.split("|")[2].strip() == expected
    log = table_of(out / "mean_teacher-seed1.csv")
    assert [row["epoch"] for row in log] == ["1", "2"] and float(log[1]["val_teacher"]) >= 0
    assert json.loads((out / "config.json").read_text())["crop"] == 32
    state = torch.load(out / "mean_teacher-seed0.pt", weights_only=True)
    mt.UNet(4).load_state_dict(state["teacher"])
    for picture in ("curves.png", "examples.png"):
        assert plt.imread(out / picture).std() > 0.05


def test_runs_with_one_seed_are_equal_and_with_another_are_not(phantom, tmp_path):
    data = mt.load_data(small(phantom))
    results = [mt.train(small(phantom, tmp_path / str(k)), "mean_teacher", seed, data)
               for k, seed in enumerate((3, 3, 4))]
    weights = [torch.cat([v.flatten() for v in r["teacher"].values()]) for r in results]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert results[0]["metrics"] == results[1]["metrics"]


@pytest.mark.parametrize("method", mt.METHODS)
def test_a_run_takes_the_steps_that_it_announces_on_its_schedules(phantom, tmp_path, capsys,
                                                                  monkeypatch, method):
    config = small(phantom, tmp_path, batch=5, unlabelled_batch=3, epochs=(3, 4), lr_ramp=2,
                   consistency_ramp=3, alpha=0.5, alpha_late=0.75, alpha_epochs=1, degrees=1.0,
                   translation=2.0, scale=0.3, noise=0.4, weight_decay=(0.1, 0.2))
    data, calls = mt.load_data(config), []

    def fake(student, teacher, optimizer, images, masks, unlabelled, *rest, **options):
        group, = optimizer.param_groups
        calls.append((len(images), len(masks), len(unlabelled), teacher is None, group["lr"],
                      group["weight_decay"], *rest, options["affine"], options["noise"]))
        return {"dice": torch.tensor(-0.5), "consistency": torch.tensor(0.25)}

    monkeypatch.setattr(mt, "train_step", fake)
    history = mt.train(config, method, 0, data)["history"]
    semi = method == "mean_teacher"
    epochs, steps = 4 if semi else 3, 3                  # 16 // 5, the last part dropped
    assert f"{epochs} epochs x 3 steps = {3 * epochs} steps of 5 + {3 * semi} slices" in (
        capsys.readouterr().out)
    expected = [(5, 5, 3 * semi, not semi, config.lr * mt.learning_rate_factor(epoch, epochs, 2),
                 0.2 if semi else 0.1, (epoch - 1) * 3 + k, mt.ramp_up(epoch, 3),
                 0.5 if epoch == 1 else 0.75, (1.0, 2.0, 0.3), 0.4)
                for epoch in range(1, epochs + 1) for k in range(steps)]
    assert [call[:7] + call[8:] for call in calls] == [call[:7] + call[8:] for call in expected]
    weights = [config.consistency_weight * call[7] for call in expected]
    assert [call[7] for call in calls] == pytest.approx(weights)
    assert [row["step"] for row in history] == [3 * k for k in range(1, epochs + 1)]


def test_an_epoch_shows_every_labelled_slice_once_and_unlabelled_ones_in_turn():
    def slices(n):
        images = torch.arange(float(n)).view(n, 1, 1, 1)
        return mt.Slices(images, 10 + images, [()] * n)

    parts = list(mt.batches(slices(7), slices(5), 2, 3))
    images, masks, others = (torch.cat(part).flatten() for part in zip(*parts))
    assert len(parts) == 3 and len(set(images.tolist())) == 6 and len(others) == 9
    assert torch.equal(masks, images + 10)
    assert sorted(others[:5].tolist()) == [0, 1, 2, 3, 4]        # all of them before one again
    (_, _, none), *_ = mt.batches(slices(7), slices(0), 2, 0)
    assert len(none) == 0


def test_training_works_without_unlabelled_and_without_validation_slices(tmp_path):
    write_bids(tmp_path, ["sub-a", "sub-b"])
    config = small(tmp_path, tmp_path / "out", train=("sub-a",), test=("sub-b",))
    results = mt.experiment(config)
    assert set(results["scores"]) == set(mt.LABELS.values())
    assert "paper" not in results["table"]               # its numbers are another data set's


def test_table_and_paired_difference_by_hand():
    def row(*dice):
        return {name: list(dice) for name in mt.METRICS}

    table, difference = mt.make_table({"supervised": row(60.0, 64.0, 62.0),
                                       "mean teacher (student)": row(1.0, 2.0, 3.0),
                                       "mean teacher (teacher)": row(63.0, 65.0, 67.0)})
    # differences 3, 1, 5: mean 3, std 2, standard error 2 / sqrt(3)
    assert difference == pytest.approx((3.0, 2 / math.sqrt(3)))
    assert "| supervised             |  62.00 (2.00) |" in table and "paper" not in table
    assert "+3.00 Dice, standard error 1.15" in table
    assert mt.make_table({"supervised": row(60.0)})[1] is None


def test_every_field_is_an_option_and_help_explains_it():
    config, overwrite = mt.parse(["--data", "d", "--epochs", "7", "--weight-decay", "1e-3", "2e-3",
                                  "--precision", "float32", "--train", "a", "b", "--label", "1",
                                  "2", "--rater", "majority"])
    assert not overwrite and config == dataclasses.replace(
        mt.Config(), data="d", epochs=(7,), weight_decay=(1e-3, 2e-3), precision="float32",
        train=("a", "b"), label=(1, 2), rater="majority", out="runs/paper-d")
    assert mt.parse([])[0] == dataclasses.replace(mt.DEMO, out="runs/demo-phantom")
    assert mt.parse(["--preset", "paper"])[0].width == 64
    assert mt.parse(["--data", "d", "--preset", "demo", "--overwrite"])[1]
    text = run("--help", cwd=HERE).stdout
    for field in dataclasses.fields(mt.Config):
        assert re.search(f"  --{field.name.replace('_', '-')}[ ,]", text), field.name


def test_the_defaults_are_the_papers():
    paper = mt.Config()
    assert (paper.spacing, paper.width, paper.dropout, paper.batch) == (0.25, 64, 0.5, 8)
    assert (paper.epochs, paper.lr, paper.lr_ramp) == ((1600, 350), 6e-4, 50)
    assert paper.weight_decay == (8e-4, 6e-4)
    assert (paper.consistency_weight, paper.consistency_ramp) == (2.9, 100)
    assert (paper.alpha, paper.alpha_late, paper.alpha_epochs) == (0.99, 0.999, 50)
    assert (paper.degrees, paper.noise ** 2) == (4.5, pytest.approx(0.01))
    assert (paper.consistency, paper.augmentation, paper.label) == ("bce", "delayed", (1,))
    assert len(set(mt.DEMO.epochs)) == 1                 # the demo: equal steps for both methods


# --- Resume --------------------------------------------------------------------------------------

LITTLE = ["--preset", "demo", "--split", "1", "0", "1", "--crop", "16", "--width", "2", "--batch",
          "2", "--epochs", "1"]


@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """Two people at one site and one unlabelled: the smallest study that trains. -> arguments."""
    folder = tmp_path_factory.mktemp("little")
    write_scgm(folder, people=(1, 2, 11))
    return ["--data", str(folder), *LITTLE]


def main(*arguments):
    return mt.main([*map(str, arguments)])


def refused(capsys, *arguments):
    """A command line that must end in one line of error, and exit status 2. -> the line"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def snapshot(folder):
    return {p: (p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}


def assert_same_run(one, other):
    """Bit for bit: all of two checkpoints, but for the folder."""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    for state in (one, other):
        del state["config"]["out"]
    tensors = [[v for name in ("student", "teacher") for v in state.get(name, {}).values()]
               + [v for part in state["optimizer"]["state"].values() for v in part.values()]
               for state in (one, other)]
    assert len(tensors[0]) > 100 and all(map(torch.equal, *tensors))
    for name in set(one) - {"student", "teacher", "optimizer"}:
        assert json.dumps(one[name]) == json.dumps(other[name])


def start(arguments, cwd):
    """-> a process that has trained its first epoch, or has ended"""
    process = subprocess.Popen([sys.executable, "-u", SCRIPT, *map(str, arguments)], cwd=cwd,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert any(re.match(r" *epoch \d+ ", line) for line in process.stdout)
    return process


def test_ten_kills_at_random_moments_leave_no_trace(little, tmp_path):
    options = [*little, "--method", "mean_teacher", "--epochs", 300, "--validate-every", 1]
    main(*options, "--out", tmp_path / "whole")
    rng = np.random.default_rng()                        # other moments in every run of the tests
    for _ in range(10):
        process = start([*options, "--out", "killed"], tmp_path)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, "too few epochs for ten kills"
        process.kill()
        process.communicate()
    main(*options, "--out", tmp_path / "killed")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert_same_run(*(folder / "mean_teacher-seed0.pt" for folder in (whole, killed)))
    for file in ("metrics.csv", "table.md", "mean_teacher-seed0.csv"):
        assert (whole / file).read_text() == (killed / file).read_text()
    # no temporary file is left
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}


def test_an_interrupted_run_goes_on_and_is_not_done_twice(little, tmp_path):
    options = [*little, "--method", "supervised", "--epochs", 500, "--validate-every", 40]
    process = start([*options, "--out", "cut"], tmp_path)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text
    assert text.splitlines()[-1].startswith("interrupted")
    path = tmp_path / "cut/supervised-seed0.pt"
    state = torch.load(path, weights_only=True)
    assert len(state["history"]) in [1, *range(40, 500, 40)] and "metrics" not in state
    for out in ("cut", "whole"):
        main(*options, "--out", tmp_path / out)
    assert_same_run(path, tmp_path / "whole/supervised-seed0.pt")
    before = path.stat().st_mtime_ns
    main(*options, "--out", tmp_path / "cut")
    assert path.stat().st_mtime_ns == before


def test_more_runs_join_other_settings_are_refused_and_overwrite_trains_anew(little, tmp_path,
                                                                             capsys):
    options = [*little, "--method", "supervised", "--out", tmp_path / "out"]
    main(*options)
    assert len(main(*options, "--runs", 2)["scores"]["supervised"]["dice"]) == 2
    files = snapshot(tmp_path)
    error = refused(capsys, *options, "--lr", "0.5", "--noise", "0.2")
    assert "seed0.pt: is another run, of other lr noise" in error
    for changes in (["--split-seed", 1], ["--unlabelled", "site1-sc11"], ["--label", 1, 2],
                    ["--method", "mean_teacher", "--lr", 0.5], ["--seed", 5, "--lr", 0.5]):
        assert "seed0.pt: is another run" in refused(capsys, *options, *changes)
    assert snapshot(tmp_path) == files
    main(*options, "--lr", "0.5", "--overwrite")         # the runs of this command, no others
    again, (one, other) = snapshot(tmp_path), sorted((tmp_path / "out").glob("*.pt"))
    assert again[one] != files[one] and again[other] == files[other]
    other.unlink()
    main(*options, "--lr", "0.5")
    state = torch.load(one, weights_only=True)
    missing = {**state, "config": {k: v for k, v in state["config"].items() if k != "scale"}}
    state["where"][2] = state["where"][2][1:]            # a slice came or went: a file has changed
    for change in (state, missing):                      # or it is of another version
        torch.save(change, one)
        assert "seed0.pt: is" in refused(capsys, *options, "--lr", "0.5")


def test_a_full_disk_leaves_the_checkpoint_that_was_there(little, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pt"
    mt.save(path, lambda file: file.write(b"good"))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        mt.save(path, lambda file: file.write(b"bad"))
    assert path.read_bytes() == b"good" and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert "No space left on device" in refused(capsys, *little, "--out", tmp_path / "out")


def torchrun(port):
    return dict(launch=["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                        str(port)], CUDA_VISIBLE_DEVICES="")


def test_torchrun_deals_out_the_runs_and_reports_as_one_process_does(little, tmp_path):
    options = [*little, "--epochs", 2, "--runs", 2]
    run(*options, "--out", "one", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    run(*options, "--out", "two", cwd=tmp_path, **torchrun(29512))
    for name in ("table.md", "metrics.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_a_process_that_fails_fails_all_and_the_same_command_resumes(little, tmp_path):
    options = [*little, "--method", "supervised", "--runs", 3, "--out", "out"]
    (tmp_path / "out/supervised-seed1.csv").mkdir(parents=True)  # its log cannot be written
    done = run(*options, cwd=tmp_path, code=None, **torchrun(29513))
    assert done.returncode != 0 and "error: " in done.stderr and "seed1.csv" in done.stderr
    assert not (tmp_path / "out/table.md").exists()
    (tmp_path / "out/supervised-seed1.csv").rmdir()
    run(*options, cwd=tmp_path, **torchrun(29514))
    assert "runs: 3" in (tmp_path / "out/table.md").read_text()


# --- Predict -------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def checkpoint(little, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    main(*little, "--epochs", 40, "--out", out)
    return out / "mean_teacher-seed0.pt"


def predicted(image, checkpoint, output, *more):
    main("predict", image, "--checkpoint", checkpoint, "--output", output, *more)
    return nib.load(output)


class Bright(nn.Module):
    """Knows a structure by its brightness, in standard deviations above the mean."""

    def __init__(self, level=3.3):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, x):
        return 20 * (x - self.level)


def test_predict_does_not_care_how_a_scan_is_stored(checkpoint, tmp_path):
    found = []
    for axes in ("RAS", "LPS", "SRA", "PIL"):
        write_nifti(tmp_path / f"{axes}.nii.gz", cord(7)[0], mm=(0.4, 0.6, 4.0), axes=axes)
        mask = predicted(tmp_path / f"{axes}.nii.gz", checkpoint, tmp_path / f"m-{axes}.nii.gz")
        image = nib.load(tmp_path / f"{axes}.nii.gz")
        assert mask.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-6)
        found.append(np.asanyarray(nib.as_closest_canonical(mask).dataobj))
    assert 0 < found[0].mean() < 1 and all(np.array_equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("axes", ["RAS", "LPS", "PIL"])
def test_predict_finds_what_lies_off_centre_only_where_it_is_told_to_look(tmp_path, capsys, axes,
                                                                          monkeypatch):
    monkeypatch.setattr(mt, "build_network", lambda config: Bright())
    config = dataclasses.replace(mt.DEMO, spacing=0.35, crop=64)         # 22.4 mm
    torch.save({"config": vars(config), "method": "supervised", "seed": 0, "where": [],
                "history": [], "student": Bright().state_dict()}, tmp_path / "c.pt")
    volume = np.random.default_rng(0).uniform(0, 10, (101, 120, 3)).astype(np.float32)
    # 25 mm behind the centre (voxel 59.5), 10 mm to the right of it (voxel 50)
    volume[62:67, 22:27, 1] = 200.0
    write_nifti(tmp_path / "i.nii.gz", volume, mm=(0.7, 0.7, 4.0), axes=axes)
    arguments = tmp_path / "i.nii.gz", tmp_path / "c.pt", tmp_path / "m.nii.gz"
    assert not np.asanyarray(predicted(*arguments).dataobj).any()
    warning = capsys.readouterr().out
    assert f"warning: {arguments[0]}: no foreground" in warning and "--center" in warning
    mask = predicted(*arguments, "--overwrite", "--center", 25, 10)
    image = nib.load(arguments[0])
    assert mask.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-6)
    assert np.array_equal(np.asanyarray(mask.dataobj), image.get_fdata() > 50)
    assert "warning" not in capsys.readouterr().out


def test_predict_on_voxels_of_0_7_mm_a_tilted_grid_and_its_header(tmp_path, monkeypatch):
    volume = np.zeros((41, 60, 3), np.int16)
    volume[18:25, 30:33, 1] = 100
    image = nib.Nifti1Image(volume, np.array([[-0.7, 0.05, 0, 9], [0.05, 0.7, 0, 5],
                                              [0, 0, 3, 1], [0, 0, 0, 1.0]]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "i.nii.gz")
    config = dataclasses.replace(mt.DEMO, spacing=0.35, crop=64)
    found = mt.predict_volume(mt.load_nifti(tmp_path / "i.nii.gz"), Bright(), config)
    assert found.shape == volume.shape and found.dtype == np.float32
    assert ((found > 0.5) == (volume > 50)).all()        # twice as fine and back: the same voxels
    monkeypatch.setattr(mt, "build_network", lambda config: Bright())
    torch.save({"config": vars(config), "method": "supervised", "seed": 0, "where": [],
                "history": [], "student": Bright().state_dict()}, tmp_path / "c.pt")
    mask = predicted(tmp_path / "i.nii.gz", tmp_path / "c.pt", tmp_path / "m.nii.gz")
    assert np.abs(mask.affine - image.affine).max() < 1e-6
    assert mask.header.get_zooms() == image.header.get_zooms()
    assert (mask.header["sform_code"], mask.header["qform_code"]) == (4, 1)
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    assert mask.get_data_dtype() == np.uint8
    assert np.array_equal(np.asanyarray(mask.dataobj), volume > 50)


def test_predict_takes_a_folder_and_overwrites_only_when_told(checkpoint, tmp_path, capsys):
    for name in ("a", "b"):
        write_nifti(tmp_path / f"in/{name}.nii.gz", cord(1)[0])
    arguments = ["predict", tmp_path / "in", "--checkpoint", checkpoint, "--output"]
    assert main(*arguments, tmp_path / "out") == [tmp_path / f"out/{x}.nii.gz" for x in "ab"]
    files = snapshot(tmp_path)
    assert "--overwrite" in refused(capsys, *arguments, tmp_path / "out")
    assert "image itself" in refused(capsys, *arguments, tmp_path / "in", "--overwrite")
    arguments[1] = tmp_path / "in/a.nii.gz"
    assert "end it in .nii" in refused(capsys, *arguments, tmp_path / "mask.png")
    assert snapshot(tmp_path) == files
    main("predict", tmp_path / "in", *arguments[2:], tmp_path / "out", "--overwrite")
    assert snapshot(tmp_path) == files                   # the same scan, the same bytes


def test_predict_warns_when_the_crop_may_have_cut_something(capsys):
    image = nib.Nifti1Image(cord(1)[0], np.diag([0.5, 0.5, 5, 1]))
    config = dataclasses.replace(mt.DEMO, crop=16, spacing=0.25)
    found = mt.predict_volume(image, Bright(-9.0), config, "scan-x")
    assert "warning: scan-x: foreground at the border" in capsys.readouterr().out
    assert (found[17:23, 15:21] > 0.5).all() and found[:15].max() == 0   # 4 mm in the middle


# --- Bad input -----------------------------------------------------------------------------------

def scan_of(folder, of="image", number=1):
    return folder / f"data/training/site1-sc{number:02d}-{of}.nii.gz"


def changed(change, of="image"):
    """Change the voxels v and the affine a of a scan's file."""
    def damage(folder):
        image = nib.load(scan_of(folder, of))
        nib.save(nib.Nifti1Image(*change(np.asarray(image.dataobj).copy(), image.affine)),
                 scan_of(folder, of))
    return damage


def bytes_of(change):
    """Change the bytes of a scan's image file."""
    return lambda f: scan_of(f).write_bytes(change(scan_of(f).read_bytes()))


def voxel_size(mm):
    """Write one of an image's voxel sizes into its header."""
    def damage(packed):
        raw = bytearray(gzip.decompress(packed))
        raw[80:84] = np.float32(mm).tobytes()            # pixdim[1]
        return gzip.compress(bytes(raw))
    return bytes_of(damage)


def removed(pattern):
    return lambda f: [path.unlink() for path in (f / "data").rglob(pattern)]


def no_grey(folder):
    for path in (folder / "data/training").glob("*mask*"):
        write_nifti(path, np.zeros(SHAPE, np.uint8))


def decathlon(damage):
    """As the other cases, but in the Decathlon's layout."""
    def change(folder):
        shutil.rmtree(folder / "data")
        write_decathlon(folder / "data", ("a", "b"), ("c",))
        damage(folder / "data")
    return change


BAD = {
    "folder missing": (lambda f: (f / "data").rename(f / "gone"), "", "data: no such folder"),
    "folder empty": (removed("*.gz"), "", "data: no scans found"),
    "no layout": (lambda f: [removed("*.gz")(f), (f / "data/x.nii.gz").touch()], "", "no scans"),
    "truncated": (bytes_of(lambda b: b[:len(b) // 2]), "", "sc01-image.nii.gz: cannot be read"),
    "not gzip": (bytes_of(lambda b: b"hello" * 99), "", "sc01-image.nii.gz: cannot be read"),
    "not a NIfTI": (bytes_of(lambda b: gzip.compress(b"hello" * 999)), "", "image.nii.gz: cannot"),
    "4-D": (changed(lambda v, a: (v[..., None].repeat(2, 3), a)), "", "has 4 dimensions"),
    "2-D": (changed(lambda v, a: (v[..., 0], a)), "", "has 2 dimensions"),
    "mask's shape": (changed(lambda v, a: (v[:-1], a), "mask-r4"), "", "not on the grid"),
    "mask's affine": (changed(lambda v, a: (v, a + np.eye(4)[:, [3, 1, 2, 0]]), "mask-r4"), "",
                      "not on the grid"),
    "mask with a half": (changed(lambda v, a: (v / np.float32(2), a), "mask-r4"), "",
                         "mask-r4.nii.gz: has values"),
    "NaN": (changed(lambda v, a: (np.where(v > 120, np.nan, v), a)), "", "image.nii.gz: has NaN"),
    "infinite": (changed(lambda v, a: (np.where(v > 120, np.inf, v), a)), "", "has NaN or"),
    "no grey matter": (no_grey, "", "no foreground in any training"),
    "zero voxel size": (voxel_size(0), "", "sc01-image.nii.gz: cannot be read as NIfTI (pixdim"),
    "negative size": (voxel_size(-0.5), "", "NIfTI (pixdim[1,2,3] should be positive"),
    "singular affine": (changed(lambda v, a: (v, np.where(np.arange(4) == 1, a[:, [0]], a))), "",
                        "sc01-image.nii.gz"),
    "too few subjects": (None, "--split 2 2 3", "too few for --split"),
    "no masks at all": (removed("*mask*"), "", "0 people with masks"),
    "subject in two sets": (None, "--train site1-sc01 --test site1-sc01",
                            "site1-sc01 is in --train and in --test"),
    "unknown subject": (None, "--train site9-sc01 --test site1-sc01", "no subject site9-sc01"),
    "rater not there": (removed("*mask-r4*"), "", "image.nii.gz: no mask of rater 4"),
    "no such rater": (None, "--rater 7", "--rater"),
    "crop": (None, "--crop 20", "--crop 20: is not a multiple of 8"),
    "no epochs": (None, "--epochs 0", "--epochs 0: is not in 1 to 1e+09"),
    "no runs": (None, "--runs 0", "--runs 0: is not in 1 to"),
    "negative weight": (None, "--consistency-weight -1", "--consistency-weight -1.0"),
    "NaN option": (None, "--lr nan", "--lr nan: is not in"),
    "alpha above 1": (None, "--alpha 1.5", "--alpha 1.5: is not in 0 to 1"),
    "background as label": (None, "--label 1 0", "--label 0: is not in 1 to 255"),
    "not a number": (None, "--width wide", "--width"),
    "unknown option": (None, "--colour red", "--colour"),
    "no such precision": (None, "--precision half", "--precision"),
    "device not there": (None, "--device abacus", "--device abacus: not to be had"),
    "device that does not compute": (None, "--device meta", "--device meta: not to be had"),
    "three numbers of epochs": (None, "--epochs 1 2 3", "--epochs and --weight-decay"),
    "absurd spacing": (None, "--spacing 1e-6", "--spacing 1e-06: is not in 0.02 to"),
    "absurd crop": (None, "--crop 8000000", "--crop 8000000: is not in 8 to 2048"),
    "split of two": (None, "--split 2 2", "--split (2, 2): expected three"),
    "output is a file": (lambda f: (f / "out").write_text("x"), "", "out"),
    "foreign checkpoint": (lambda f: (f / "out").mkdir() or torch.save(
        {"a": 1}, f / "out/supervised-seed0.pt"), "", "supervised-seed0.pt: is no checkpoint"),
    "no labelsTr": (decathlon(lambda f: shutil.rmtree(f / "labelsTr")), "", "0 people with masks"),
    "a half in labelsTr": (decathlon(lambda f: write_nifti(
        f / "labelsTr/a.nii.gz", np.full(SHAPE, 0.5, np.float32))), "", "a.nii.gz: has values [0.5]"),
    "4-D in imagesTr": (decathlon(lambda f: write_nifti(
        f / "imagesTr/a.nii.gz", np.ones((*SHAPE, 2), np.float32))), "", "a.nii.gz: has 4 dim"),
    "no mask has the label": (decathlon(lambda f: None), "--label 7 9", "--label"),
    "all faults at once": (lambda f: [scan_of(f, number=k).write_bytes(b"x") for k in (1, 2)], "",
                           "sc01-image.nii.gz: cannot", "sc02-image.nii.gz: cannot"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case, tmp_path, capsys):
    damage, options, *messages = BAD[case]
    write_scgm(tmp_path / "data", people=(1, 2, 11))
    if damage:
        damage(tmp_path)
    before = snapshot(tmp_path)
    error = refused(capsys, "--data", tmp_path / "data", *LITTLE, "--out", tmp_path / "out",
                    *options.split())
    assert all(message in error for message in messages)
    after = snapshot(tmp_path)
    assert {path: after.get(path) for path in before} == before


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))


@pytest.mark.parametrize("case", ["missing", "empty", "truncated", "foreign", "pickle", "width"])
def test_bad_checkpoints_are_one_line_and_run_no_code(case, checkpoint, tmp_path, capsys,
                                                      monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, path = torch.load(checkpoint, weights_only=True), tmp_path / "c.pt"
    if case in ("empty", "truncated"):
        path.write_bytes(checkpoint.read_bytes()[:9999 if case == "truncated" else 0])
    elif case != "missing":
        torch.save({"foreign": {"state_dict": {}}, "pickle": {**state, "history": Evil()},
                    "width": {**state, "config": {**state["config"], "width": 3}}}[case], path)
    write_nifti(tmp_path / "i.nii.gz", cord(1)[0])
    error = refused(capsys, "predict", tmp_path / "i.nii.gz", "--checkpoint", path, "--output",
                    tmp_path / "m.nii.gz")
    assert "c.pt" in error and not (tmp_path / "m.nii.gz").exists()
    assert not Path("evil-was-here").exists()


def test_a_process_ends_without_a_traceback(tmp_path):
    done = run("--data", "nowhere", cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: nowhere: no such folder") and "Trace" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_three_hundred_damaged_files(checkpoint, tmp_path, capsys):
    rng, outcomes, path = np.random.default_rng(0), [], tmp_path / "bad.nii.gz"
    write_nifti(path, cord(1)[0])
    good = gzip.decompress(path.read_bytes())
    arguments = path, "--checkpoint", checkpoint, "--output", tmp_path / "m.nii.gz", "--overwrite"
    for k in range(300):
        raw = bytearray(good)
        end = 352 if k % 3 else len(raw)                 # the header alone, or anything
        for _ in range(rng.integers(1, 6)):
            raw[rng.integers(0, end)] = rng.integers(0, 256)
        packed = gzip.compress(bytes(raw[:rng.integers(300, len(raw))] if k % 7 == 0 else raw))
        if k % 11 == 0:                                  # and the packing too
            packed = bytearray(packed)
            packed[rng.integers(0, len(packed))] ^= 0xFF
        path.write_bytes(packed)
        begin = time.perf_counter()
        try:
            main("predict", *arguments)
            outcomes.append("result")
        except SystemExit:
            refused(capsys, "predict", *arguments)
            outcomes.append("error")
        assert time.perf_counter() - begin < 10 and path.read_bytes() == bytes(packed)
    assert min(outcomes.count("result"), outcomes.count("error")) > 30


# --- The phantom ---------------------------------------------------------------------------------

def test_the_phantom_is_reproducible_and_its_seed_matters(tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        mt.write_phantom(tmp_path / name, seed=seed, sites=TINY[:2], subjects=4)
    one, two, three = ({path.name: np.asanyarray(nib.load(path).dataobj) for path in
                        (tmp_path / name).iterdir()} for name in ("one", "two", "three"))
    assert set(one) == set(two) and all(np.array_equal(one[k], two[k]) for k in one)
    assert not np.array_equal(one["site1-sc01-image.nii.gz"], three["site1-sc01-image.nii.gz"])
    with pytest.raises(mt.InputError, match="there already"):
        mt.write_phantom(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]


def test_the_phantom_has_the_challenges_files_in_its_orientations(phantom):
    names = {path.name for path in phantom.iterdir()}
    assert names == {f"site{s}-sc{n:02d}-{kind}.nii.gz" for s in range(1, 5) for n in range(1, 21)
                     for kind in ("image", "mask-r1", "mask-r2", "mask-r3", "mask-r4")
                     if kind == "image" or n <= 10}
    for s, site in enumerate(TINY, start=1):
        image = nib.load(phantom / f"site{s}-sc11-image.nii.gz")
        assert "".join(nib.aff2axcodes(image.affine)) == site.axes
        assert image.header.get_zooms() == pytest.approx((site.mm, site.mm, site.thick))


@pytest.mark.parametrize("number", range(4))
def test_the_phantom_looks_like_a_cord(number):
    site, brighter, dice = mt.SITES[number], [], []
    for seed in range(4):
        image, masks = mt.phantom_subject(site, torch.Generator().manual_seed(seed))
        inside = slice(site.black, len(image) - site.black)
        assert not image[:inside.start].any() and not image[inside.stop:].any()
        image, masks = image[inside].float(), masks[:, inside]
        assert site.slices[0] <= len(image) <= site.slices[1]
        grey, cord = masks[3] == 1, masks[3] > 0
        inner = -F.max_pool2d(-cord.float(), 5, 1, 2) > 0              # away from the bright CSF
        brighter.append(image[grey & inner].mean() / image[cord & ~grey & inner].mean())
        assert 8 < grey.sum() / len(grey) * site.mm ** 2 < 28          # mm2; real ones: 12 to 17
        assert 50 < cord.sum() / len(grey) * site.mm ** 2 < 130        # mm2, the whole cord
        other = masks[0] == 1
        dice.append(2 * (other & grey).sum() / (other.sum() + grey.sum()))
    # Grey matter brighter than white by 12 to 20 % in real scans; raters at a Dice of 0.8 to 0.88
    assert 1.06 < np.mean(brighter) < 1.26 and min(brighter) > 1.0, brighter
    assert 0.76 < np.mean(dice) < 0.9, dice


# --- The file as a whole -------------------------------------------------------------------------

PIECES = {
    "conv_block": "conv_block(1, 4, 0.1)(torch.randn(2, 1, 8, 8))",
    "UNet": "UNet(4, 0.5)(torch.randn(2, 1, 16, 16))",
    "dice_loss": "dice_loss(torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4))",
    "consistency_loss": "consistency_loss(torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4))",
    "sample_affine": "sample_affine(2, 4.5)",
    "warp": "warp(torch.rand(1, 1, 8, 8), torch.eye(2, 3)[None])",
    "augment": "augment(torch.rand(1, 3, 8, 8), torch.eye(2, 3)[None])",
    "delayed_targets": "delayed_targets(nn.Conv2d(3, 1, 1), torch.rand(1, 3, 8, 8), "
                       "torch.eye(2, 3)[None])",
    "make_teacher": "make_teacher(nn.Conv2d(1, 1, 1))",
    "update_teacher": "update_teacher(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), 0.9)",
    "ramp_up": "ramp_up(1, 10)",
    "learning_rate_factor": "learning_rate_factor(1, 10, 2), learning_rate_factor(5, 10, 2)",
    "train_step": "(lambda s, t: train_step(s, t, torch.optim.Adam(s.parameters()), torch.randn("
                  "2, 3, 8, 8), torch.ones(2, 1, 8, 8), torch.randn(4, 3, 8, 8), 0))("
                  "*[nn.Conv2d(3, 1, 1) for _ in 'st'])",
}


@pytest.mark.parametrize("name", PIECES)
def test_each_piece_works_when_pasted_into_an_empty_file(name):
    source = SCRIPT.read_text()
    paper = source[source.index("# --- 2. U-Net"):source.index("# --- 7. Data")]
    nodes = ast.parse(paper).body
    assert all(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in nodes)   # no globals
    assert {n.name for n in nodes} == set(PIECES)
    wanted, todo = set(), {name}
    while todo:                                          # the pieces that it calls come along
        wanted |= todo
        todo = {m.id for n in nodes if n.name in todo for m in ast.walk(n)
                if isinstance(m, ast.Name) and m.id in PIECES} - wanted
    pasted = ["import copy, math, torch; from torch import nn", "import torch.nn.functional as F"]
    pasted += [ast.unparse(n) for n in nodes if n.name in wanted]
    exec("\n\n".join([*pasted, PIECES[name]]), {})


def python(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE),
                               "PYTHONDONTWRITEBYTECODE": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_the_readmes_own_loop_runs_as_it_stands_in_an_empty_folder(tmp_path):
    blocks = re.findall(r"^```python\n(import torch\b.*?)^```", (HERE / "README.md").read_text(),
                        re.DOTALL | re.MULTILINE)
    block, = [block for block in blocks if "delayed_targets" in block]
    code = [line for line in block.splitlines() if line.strip() and line.strip()[0] != "#"]
    assert len(code) <= 20 and "mean_teacher_seg" in block and "UNet" not in block
    ran = python(block + "\nprint('to the end')", tmp_path)
    assert ran.stdout.endswith("to the end\n") and "Warning" not in ran.stderr


def test_importing_does_nothing(tmp_path):
    done = python("import sys, torch; torch.manual_seed(2026)\nimport mean_teacher_seg\n"
                  "assert 'matplotlib.pyplot' not in sys.modules and torch.initial_seed() == 2026",
                  tmp_path)
    assert (done.stdout, done.stderr) == ("", "") and list(tmp_path.iterdir()) == []


def test_only_the_six_packages():
    six = {"torch", "numpy", "nibabel", "matplotlib", "jupyter", "pytest"}
    lines = (HERE / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == six
    for path in (SCRIPT, Path(__file__)):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import)
                 for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        roots = {name.split(".")[0] for name in names} - {"mean_teacher_seg"}
        assert roots - set(sys.stdlib_module_names) <= six


def test_lines_fit_and_the_licence_is_named():
    for path in (SCRIPT, Path(__file__)):
        source = path.read_text()
        assert max(map(len, source.splitlines())) <= 99
        assert source.startswith("# SPDX-License-Identifier: MIT\n")
    paper, _ = SCRIPT.read_text().split("# --- 7. Data")
    assert paper.count("\n") <= 400                      # the whole paper


# --- The notebook --------------------------------------------------------------------------------

NOTEBOOK = HERE / "tutorial.ipynb"


def code_cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"]
            if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_a_clean_kernel_and_its_exercises_notice_what_is_broken(tmp_path):
    notebook = json.loads(NOTEBOOK.read_text())
    exercises = [cell for cell in code_cells() if "exercise" in cell["metadata"].get("tags", [])]
    assert len(exercises) == 4
    for cell in exercises:                               # once more, with the reader's edit
        right, wrong = cell["metadata"]["edit"]
        source = "".join(cell["source"])
        assert source.count(right) == 1
        lines = source.replace(right, wrong).splitlines()
        source = "\n".join(["try:", *("    " + line for line in lines),
                            "except AssertionError:", "    broken = True",
                            "assert broken, 'nobody noticed'", "broken = False"])
        notebook["cells"].append({**cell, "id": f"{cell['id']}-broken", "source": source})
    (tmp_path / "tutorial.ipynb").write_text(json.dumps(notebook))
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace",
         "tutorial.ipynb"], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env=dict(os.environ, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [cell for cell in json.loads((tmp_path / "tutorial.ipynb").read_text())["cells"]
             if cell["cell_type"] == "code"]
    assert len(cells) == len(code_cells()) + 4
    assert not [output for cell in cells for output in cell["outputs"]
                if output.get("name") == "stderr"]       # not a warning either


def test_the_notebook_defines_nothing_that_the_script_defines():
    ours = {node.name for node in ast.parse(SCRIPT.read_text()).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    ours |= {name.id for node in ast.parse(SCRIPT.read_text()).body
             if isinstance(node, ast.Assign) for name in node.targets}
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code_cells()))
    theirs = {node.name for node in ast.walk(tree)
              if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    theirs |= {node.id for node in ast.walk(tree)
               if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    assert {"train_step", "METRICS"} < ours and "config" in theirs
    assert not ours & theirs


def test_the_notebook_is_committed_with_its_outputs():
    assert NOTEBOOK.stat().st_size < 3e6
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert all(sum(bool(line.strip()) for line in cell["source"]) <= 10 for cell in cells)
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    for picture in pictures:                             # as many grey levels as a picture has
        pixels = plt.imread(io.BytesIO(base64.b64decode(picture)))[..., :3]
        assert pixels.shape[0] > 100 and pixels.std() > 0.05
    sections = [cell["source"][0] for cell in json.loads(NOTEBOOK.read_text())["cells"]
                if cell["cell_type"] == "markdown" and cell["source"][0].startswith("## ")]
    assert [int(line.split()[1].strip(".")) for line in sections] == list(range(1, 13))
    assert len(pictures) >= 18 and "/tmp" not in NOTEBOOK.read_text()


# --- Real scans, where they are ------------------------------------------------------------------

DATA = HERE.parent / "shared" / "data"


def real(name):
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no {name} here")


@real("gm-challenge")
def test_real_cords_of_six_sessions():
    config = dataclasses.replace(mt.DEMO, data=str(DATA / "gm-challenge"), test=(
        "sub-9418", "sub-9584"), train=("sub-10062Ses1", "sub-9709Ses1"), crop=64)
    assert {key: len(part) for key, part in split(config).items()} == {
        "train": 2, "val": 0, "test": 2, "unlabelled": 6}
    data = mt.load_data(config)
    assert len(data["train"].images) == 40 and len(data["test"].images) == 34
    area = data["train"].masks.sum((1, 2, 3)) * config.spacing ** 2
    assert 10 < area.mean() < 20                         # mm2 of grey matter in a slice


@real("hippocampus")
def test_real_hippocampi_in_the_papers_protocol():
    config, _ = mt.parse(["--data", str(DATA / "hippocampus"), "--preset", "demo", "--split", "8",
                          "8", "12", "--spacing", "1", "--crop", "48", "--label", "1", "2"])
    sets, data = split(config), mt.load_data(config)
    assert [len(part) for part in sets.values()] == [8, 8, 12, 40]
    assert len({scan.person for part in sets.values() for scan in part}) == 68
    assert [len({scan for _, scan, _ in part.where}) for part in data.values()] == [8, 8, 12, 40]
    whole, front, back = (sum(mt.read_mask(scan, "4", shape_of(scan), affine_of(scan), label).sum()
                              for scan in sets["train"]) for label in ((1, 2), (1,), (2,)))
    assert whole == front + back == data["train"].masks.sum() and min(front, back) > 0.2 * whole


@real("hippocampus")
def test_a_published_mask_with_a_header_off_in_its_fourth_decimal(tmp_path):
    scan = mt.find_scans(DATA / "hippocampus")[0]
    mask = nib.load(scan.masks[mt.ANY])
    nib.save(nib.Nifti1Image(np.asanyarray(mask.dataobj), turned(0.0004) @ mask.affine),
             tmp_path / "m.nii.gz")
    other = scan._replace(masks={mt.ANY: tmp_path / "m.nii.gz"})
    one, two = (mt.read_scan(s, fast(spacing=1.0, crop=48), True) for s in (scan, other))
    assert len(one.masks) and torch.equal(one.masks, two.masks)
