# SPDX-License-Identifier: MIT
"""Tests of the real functions, against something independent of them: a value worked out by hand,
a closed form, a NumPy loop, or a property that the mathematics demands.

    python -m pytest
"""
import ast
import base64
import copy
import csv
import dataclasses
import gzip
import io
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
REAL = HERE.parent / "shared" / "data" / "gm-challenge"      # CC0 scans, where somebody put them
TINY = [site._replace(mm=0.5, size=48, slices=(2, 2), black=site.black // 4) for site in mt.SITES]


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


# --- 2. U-Net ------------------------------------------------------------------------------------

def test_unet_has_15_convolutions_and_the_known_number_of_parameters():
    network = mt.UNet(64)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 15
    assert sum(p.numel() for p in network.parameters()) == 4_837_249


def test_unet_keeps_the_size_and_returns_logits():
    torch.manual_seed(0)
    out = mt.UNet(4, 0.0)(3 * torch.randn(2, 1, 16, 40))
    assert out.shape == (2, 1, 16, 40)
    with torch.no_grad():
        network = mt.UNet(4, 0.0)
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


# --- 3. Losses -----------------------------------------------------------------------------------

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


def test_consistency_loss_by_hand():
    logits = torch.tensor([0.0, math.log(3.0)]).view(1, 1, 1, 2)         # p = 0.5, 0.75
    teacher = torch.tensor([0.3, 1.0]).view(1, 1, 1, 2)
    # ln 2 whatever y is; -ln 0.75
    bce = (math.log(2), -math.log(0.75))
    assert mt.consistency_loss(logits, teacher).item() == pytest.approx(sum(bce) / 2, abs=1e-6)
    second = torch.tensor([False, True]).view(1, 1, 1, 2)
    assert mt.consistency_loss(logits, teacher, second).item() == pytest.approx(bce[1], abs=1e-6)
    assert mt.consistency_loss(logits, teacher, second & False).item() == 0
    assert mt.consistency_loss(logits, teacher, kind="mse").item() == pytest.approx(
        (0.2 ** 2 + 0.25 ** 2) / 2, abs=1e-6)
    with pytest.raises(ValueError, match="bce"):
        mt.consistency_loss(logits, teacher, kind="kl")


@pytest.mark.parametrize("y", [0.1, 0.5, 0.9])
def test_consistency_is_least_at_agreement_and_there_the_teachers_entropy(y):
    entropy = -y * math.log(y) - (1 - y) * math.log(1 - y)
    logit = torch.tensor(math.log(y / (1 - y)), requires_grad=True)
    value = mt.consistency_loss(logit, torch.tensor(y))
    value.backward()
    assert value.item() == pytest.approx(entropy, abs=1e-6) and abs(logit.grad) < 1e-6
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


# --- 4. Delayed augmentation ---------------------------------------------------------------------

def smooth_images(n=2, height=48, width=48):
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width),
                          indexing="ij")
    return torch.stack([torch.exp(-((x - 0.2 * k) ** 2 + 2 * (y + 0.1) ** 2) / 0.1)
                        for k in range(n)])[:, None]


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


def test_delayed_prediction_lines_up_where_an_undelayed_one_does_not():
    # A pointwise linear network commutes with a linear resampling, so the student's f(g(x)) and
    # the teacher's g(f(x)) must be the same picture; f(x), without the delayed g, must not.
    network = nn.Conv2d(1, 1, 1, bias=False)
    x, phi = smooth_images(), torch.cat([rotation(4.5), rotation(-4.5)])
    student, teacher = network(mt.warp(x, phi)), network(x)
    assert torch.allclose(student, mt.warp(teacher, phi), atol=1e-6)
    assert (student - teacher).abs().max() > 0.01 * student.abs().max()


# --- 5. Teacher and ramps ------------------------------------------------------------------------

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


# --- 6. One training step ------------------------------------------------------------------------

def batch(n=4, labelled=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 1, size, size, generator=generator)
    return images, (F.avg_pool2d(images, 5, 1, 2)[:labelled] > 0.1).float()


def networks(seed=0, lr=0.1):
    torch.manual_seed(seed)
    student = mt.UNet(4, 0.0)
    return student, mt.make_teacher(student), torch.optim.SGD(student.parameters(), lr=lr)


def test_the_loss_is_dice_plus_weight_times_consistency():
    student, teacher, optimizer = networks(lr=0.0)
    mt.update_teacher(mt.UNet(4, 0.0), teacher, 0.5)     # somewhere else than the student
    images, masks = batch()
    torch.manual_seed(5)
    losses = mt.train_step(student, teacher, optimizer, images, masks, 0, weight=1.7, noise=0.0)
    torch.manual_seed(5)
    phi = mt.sample_affine(4, 4.5)
    p = torch.sigmoid(student(mt.warp(images, phi))).detach().double().numpy()
    y = (mt.warp(masks, phi[:2]) >= 0.5).numpy()
    dice = -2 * (p[:2] * y).sum() / (p[:2].sum() + y.sum())
    # The teacher was updated after its pass, alpha = min(1/2, 0.99): undo that to ask it again.
    with torch.no_grad():
        for theta, mean in zip(student.parameters(), teacher.parameters()):
            mean.copy_(2 * mean - theta)
        t = mt.warp(torch.sigmoid(teacher(images)), phi).double().numpy()
    inside = mt.warp(torch.ones_like(images), phi).numpy() > 0.999
    bce = -(t * np.log(p) + (1 - t) * np.log(1 - p))[inside].mean()
    assert 0 < inside.sum() < inside.size
    assert losses["dice"].item() == pytest.approx(dice, abs=1e-4)
    assert losses["consistency"].item() == pytest.approx(bce, abs=1e-4)
    assert losses["loss"].item() == pytest.approx(dice + 1.7 * bce, abs=1e-4)


def test_weight_zero_gives_the_supervised_gradient():
    results = []
    for semi in (False, True):
        student, teacher, optimizer = networks()
        images, masks = batch(n=2)
        torch.manual_seed(1)
        mt.train_step(student, teacher if semi else None, optimizer, images, masks, 0, weight=0.0)
        results.append([p.grad.clone() for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert any(g.abs().max() > 0 for g in results[0])


def test_only_the_student_gets_gradients_and_the_teacher_only_the_average():
    student, teacher, optimizer = networks()
    before = [p.clone() for p in teacher.parameters()]
    mt.train_step(student, teacher, optimizer, *batch(), step=999, alpha=0.9)
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    for old, new, theta in zip(before, teacher.parameters(), student.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * theta, atol=1e-6)


@pytest.mark.parametrize("step, alpha", [(0, 1 / 2), (1, 2 / 3), (8, 0.9), (500, 0.95)])
def test_the_average_warms_up_as_a_plain_mean(step, alpha):
    student, teacher, optimizer = networks()
    old = teacher.out.weight.clone()
    mt.train_step(student, teacher, optimizer, *batch(), step=step, alpha=0.95)
    expected = alpha * old + (1 - alpha) * student.out.weight
    assert torch.allclose(teacher.out.weight, expected, atol=1e-6)


def test_the_teachers_batchnorm_statistics_come_from_its_own_passes():
    student, teacher, optimizer = networks()
    convolution = teacher.down[0][0]
    images, masks = batch()
    with torch.no_grad():                                # what its first BatchNorm will see
        expected = 0.1 * F.relu(convolution(images)).mean((0, 2, 3))
    mt.train_step(student, teacher, optimizer, images, masks, 0, noise=0.0)
    assert torch.allclose(teacher.down[0][2].running_mean, expected, atol=1e-5)
    assert not torch.allclose(student.down[0][2].running_mean, expected, atol=1e-5)


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


def naive_step(student, teacher, moments, images, masks, step, weight, alpha, lr, decay, degrees,
               noise):
    """Algorithm 1 for one batch; the random draws in the order of train_step. -> three losses."""
    # Scale and two translations are 0 here, but drawn.
    angles = [torch.empty(len(images)).uniform_(-limit, limit) for limit in (degrees, 0, 0, 0)][0]
    one, other = torch.randn_like(images), torch.randn_like(images)
    x, n = images.numpy().astype(float), len(images)
    cos, sin = np.cos(np.radians(angles.numpy())), np.sin(np.radians(angles.numpy()))
    phi = [np.array([[cos[b], -sin[b], 0], [sin[b], cos[b], 0]]) for b in range(n)]
    shown = np.stack([naive_warp(x[b, 0] + noise * one[b, 0].numpy(), phi[b]) for b in range(n)])
    y = [naive_warp(masks[b, 0].numpy(), phi[b]) >= 0.5 for b in range(len(masks))]
    with torch.no_grad():
        guess = teacher(torch.from_numpy(x + noise * other.numpy()).float()).double().numpy()
    t = [naive_warp(1 / (1 + np.exp(-guess[b, 0])), phi[b]) for b in range(n)]
    inside = [naive_warp(np.ones(x.shape[2:]), phi[b]) > 0.999 for b in range(n)]
    z = student(torch.from_numpy(shown[:, None]).float())
    p = 1 / (1 + np.exp(-z.detach().double().numpy()[:, 0]))
    # eq. 3 and eq. 2, and by hand their derivatives with respect to the logits z
    overlap = sum((p[b] * y[b]).sum() for b in range(len(masks)))
    total = sum(p[b].sum() + y[b].sum() for b in range(len(masks)))
    count = sum(inside[b].sum() for b in range(n))
    dice, bce, gradient = -2 * overlap / total, 0.0, np.zeros_like(p)
    for b in range(n):
        if b < len(masks):
            gradient[b] += (-2 * y[b] / total + 2 * overlap / total ** 2) * p[b] * (1 - p[b])
        entropy = -t[b] * np.log(p[b]) - (1 - t[b]) * np.log(1 - p[b])
        bce += entropy[inside[b]].sum() / count
        gradient[b] += weight * (p[b] - t[b]) * inside[b] / count
    student.zero_grad()
    (z[:, 0] * torch.from_numpy(gradient).float()).sum().backward()
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
    # The demo's settings in its first epoch, but for a weight that can be felt. (With its highest
    # rate, Adam's division of tiny gradients by themselves blows rounding up to 1e-2 in 20 steps.)
    lr = mt.DEMO.lr * mt.learning_rate_factor(1, *mt.DEMO.epochs, mt.DEMO.lr_ramp)
    weight, alpha, decay, degrees, noise = 2.9, 0.95, 2e-3, 12.0, 0.1
    images, masks = batch(size=24)
    torch.manual_seed(4)
    student = mt.UNet(4, 0.0)
    teacher = mt.make_teacher(student)
    naive_student, naive_teacher, moments = copy.deepcopy(student), copy.deepcopy(teacher), {}
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, weight_decay=decay, fused=True)
    curves = [], []
    torch.manual_seed(9)
    for step in range(20):
        losses = mt.train_step(student, teacher, optimizer, images, masks, step, weight, alpha,
                               degrees=degrees, noise=noise)
        curves[0].append([losses[name].item() for name in ("loss", "dice", "consistency")])
    torch.manual_seed(9)
    for step in range(20):
        curves[1].append(naive_step(naive_student, naive_teacher, moments, images, masks, step,
                                    weight, alpha, lr, decay, degrees, noise))
    ours, naive = np.array(curves)
    assert ours[-1, 1] < ours[0, 1] - 0.03               # it does learn
    assert np.abs(ours - naive).max() < 1e-4


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
    student = Recorder()
    teacher = mt.make_teacher(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    images, masks = smooth_images(3), torch.zeros(1, 1, 48, 48)
    torch.manual_seed(3)
    mt.train_step(student, teacher, optimizer, images, masks, 0, degrees=20, noise=0.0,
                  augmentation=augmentation)
    torch.manual_seed(3)
    warped = mt.warp(images, mt.sample_affine(3, 20))
    assert torch.allclose(student.seen[0], warped, atol=1e-6)
    assert torch.allclose(teacher.seen[0], images if augmentation == "delayed" else warped,
                          atol=1e-6)


def test_noise_differs_between_student_and_teacher_and_has_the_given_std():
    student = Recorder()
    teacher = mt.make_teacher(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    torch.manual_seed(0)
    mt.train_step(student, teacher, optimizer, torch.zeros(4, 1, 64, 64),
                  torch.zeros(2, 1, 64, 64), 0, degrees=0.0, noise=0.1)
    one, other = student.seen[0], teacher.seen[0]
    assert one.std().item() == pytest.approx(0.1, rel=0.05)
    assert other.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs((one * other).mean().item()) < 0.001      # independent


def test_aligned_networks_agree_only_when_the_augmentation_is_delayed():
    # Same weights, pointwise network, no noise: the delayed loss is the teacher's entropy exactly.
    student = nn.Conv2d(1, 1, 1)
    student.weight.data.fill_(4.0)
    student.bias.data.fill_(-2.0)
    images, phi = smooth_images(), rotation(15).repeat(2, 1, 1)
    valid = mt.warp(torch.ones_like(images), phi) > 0.999
    logits, probabilities = student(mt.warp(images, phi)), torch.sigmoid(student(images))
    delayed = mt.consistency_loss(logits, mt.warp(probabilities, phi), valid, "mse")
    undelayed = mt.consistency_loss(logits, probabilities, valid, "mse")
    assert delayed < 0.01 * undelayed


def test_confidence_leaves_out_what_the_teacher_is_unsure_of():
    student = nn.Conv2d(1, 1, 1)
    student.weight.data.fill_(1.0)
    student.bias.data.fill_(0.0)
    teacher = mt.make_teacher(student)
    images = torch.tensor([3.0, 0.1, -0.1, -3.0]).view(1, 1, 2, 2)     # teacher: 0.95, 0.52, ...
    options = dict(degrees=0.0, noise=0.0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    found = [mt.train_step(student, teacher, optimizer, images, torch.zeros(1, 1, 2, 2), 0,
                           confidence=confidence, **options)["consistency"].item()
             for confidence in (0.0, 0.9, 0.99)]
    y = 1 / (1 + math.exp(-3))
    sure = -y * math.log(y) - (1 - y) * math.log(1 - y)
    y = 1 / (1 + math.exp(-0.1))
    unsure = -y * math.log(y) - (1 - y) * math.log(1 - y)
    assert found == pytest.approx([(sure + unsure) / 2, sure, 0.0], abs=1e-6)


def test_autocast_does_not_blur_the_warp():
    # In bfloat16 the sampling grid of a 200 px image would be off by most of a pixel.
    student = nn.Conv2d(1, 1, 1)
    teacher = mt.make_teacher(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
    images, masks = torch.randn(2, 1, 200, 200), torch.zeros(1, 1, 200, 200)
    found = []
    for amp in (False, True):
        torch.manual_seed(0)
        found.append(mt.train_step(student, teacher, optimizer, images, masks, 0, noise=0.0,
                                   consistency="mse", amp=amp)["consistency"].item())
    assert found[1] == pytest.approx(found[0], rel=0.02)


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
        losses = mt.train_step(student, teacher, optimizer, images[:4 if semi else 2], masks,
                               step, weight=0.5, alpha=0.9)
    assert losses["dice"] < -0.85


# --- 7. Data -------------------------------------------------------------------------------------

def write_nifti(path, volume, mm=(0.5, 0.5, 5.0), axes="RAS"):
    """Write an array that is in RAS order, stored in another orientation."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, np.diag([*mm, 1.0]))
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"),
                                           nib.orientations.axcodes2ornt(axes))
    nib.save(image.as_reoriented(turn), path)


def cord(seed, shape=(40, 36, 3)):
    """A volume and its SCGM-style mask without any symmetry."""
    rng = np.random.default_rng(seed)
    volume = rng.normal(100, 10, shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[16:28, 12:22] = 2
    mask[18:24, 14:18] = 1
    mask[22:24, 18:20] = 1
    volume[mask == 1] += 60
    return volume, mask


def write_scgm(folder, people=(1, 11), sites=(1,), **how):
    for site in sites:
        for number in people:
            volume, mask = cord(100 * site + number)
            stem = f"site{site}-sc{number:02d}"
            half = "training" if number <= 10 else "test"
            write_nifti(folder / half / f"{stem}-image.nii.gz", volume, **how)
            for rater in range(1, 5) if number <= 10 else ():
                write_nifti(folder / half / f"{stem}-mask-r{rater}.nii.gz", mask, **how)


def write_bids(folder, subjects, runs=(1, 2), labelled_runs=(1,), **how):
    for k, subject in enumerate(subjects):
        for run in runs:
            volume, mask = cord(101 + k)
            place, stem = Path(subject, "anat"), f"{subject}_run-{run}_T2starw"
            write_nifti(folder / place / f"{stem}.nii.gz", volume, **how)
            if run in labelled_runs:
                write_nifti(folder / "derivatives/labels" / place / f"{stem}_gmseg-manual.nii.gz",
                            (mask == 1).astype(np.uint8), **how)


FAST = dict(crop=32, spacing=0.5)
GRID = np.diag([0.5, 0.5, 5.0, 1.0])


def test_every_layout_and_orientation_gives_the_same_slices(tmp_path):
    mm = (0.4, 0.6, 3.0)
    results = []
    for axes in ("RAS", "LAS", "LPS", "SRA"):
        write_scgm(tmp_path / axes, mm=mm, axes=axes)
        write_bids(tmp_path / f"bids-{axes}", ["sub-a"], runs=(1,), mm=mm, axes=axes)
        for folder in (tmp_path / axes, tmp_path / f"bids-{axes}"):
            scan = next(s for s in mt.find_scans(folder) if s.masks)
            results.append(mt.read_scan(scan, dataclasses.replace(mt.Config(), **FAST), True))
    for part in results[1:]:
        assert torch.equal(part.images, results[0].images)
        assert torch.equal(part.masks, results[0].masks)
    # By hand: 40 x 0.4 mm = 16 mm across, 36 x 0.6 = 21.6 mm in front: 32 x 43 px of 0.5 mm.
    volume, _ = mt.canonical(mt.load_nifti(tmp_path / "LPS/training/site1-sc01-image.nii.gz"))
    assert mt.to_slices(volume, mm, 0.5).shape == (3, 1, 43, 32)


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


def test_crop_keeps_the_centre_and_pads_what_is_small():
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(mt.center_crop(x, 2, 2)[0, 0], x[0, 0, 2:4, 2:4])
    padded = mt.center_crop(x, 8, 8)
    assert torch.equal(padded[0, 0, 1:7, 1:7], x[0, 0]) and padded.sum() == x.sum()


def test_slices_are_z_scored_one_by_one():
    x = torch.stack([torch.randn(1, 9, 9) * 5 + 100, torch.randn(1, 9, 9) * 0.1])
    z = mt.normalise(x)
    assert z.mean((2, 3)).abs().max() < 1e-5 and (z.std((2, 3)) - 1).abs().max() < 1e-5


def test_raters_and_majority(tmp_path):
    write_scgm(tmp_path, people=(1,))
    stem = tmp_path / "training/site1-sc01"
    votes = np.zeros((4, 40, 36, 3), np.uint8)
    votes[:, 20:24, 16:20] = 1                           # all agree
    votes[:3, 24, 16:20] = 1                             # three of four
    votes[:2, 25, 16:20] = 1                             # two of four: a tie is background
    votes[1:2, 26, 16:20] = 1                            # one of four
    votes[3, 10:15] = 2                                  # white matter is not grey matter
    for rater in range(4):
        write_nifti(Path(f"{stem}-mask-r{rater + 1}.nii.gz"), votes[rater])
    scan, = mt.find_scans(tmp_path)
    for rater in range(4):
        found = mt.read_mask(scan, str(rater + 1), (40, 36, 3), GRID)
        assert np.array_equal(found, votes[rater] == 1)
    found = mt.read_mask(scan, "majority", (40, 36, 3), GRID)
    assert found[20:25, 16:20].all() and found.sum() == 5 * 4 * 3
    Path(f"{stem}-mask-r4.nii.gz").unlink()
    scan, = mt.find_scans(tmp_path)
    with pytest.raises(mt.InputError, match="site1-sc01-image.nii.gz: no mask of rater 4"):
        mt.read_mask(scan, "4", (40, 36, 3), GRID)


def test_a_mask_with_other_values_or_another_shape_is_refused(tmp_path):
    write_bids(tmp_path, ["sub-a"], runs=(1,))
    scan, = mt.find_scans(tmp_path)
    write_nifti(scan.masks[mt.ANY], np.full((40, 36, 3), 2, np.uint8))   # fine in SCGM
    with pytest.raises(mt.InputError, match=r"gmseg.*values.*not \(0, 1\)"):
        mt.read_mask(scan, "4", (40, 36, 3), GRID)
    write_nifti(scan.masks[mt.ANY], np.ones((40, 36, 3), np.uint8), mm=(0.5, 0.6, 5.0))
    with pytest.raises(mt.InputError, match="not on the grid"):
        mt.read_mask(scan, "4", (40, 36, 3), GRID)
    write_nifti(scan.masks[mt.ANY], np.ones((40, 36, 2), np.uint8))
    with pytest.raises(mt.InputError, match=r"not on the grid of its image, \(40, 36, 3\)"):
        mt.read_mask(scan, "4", (40, 36, 3), GRID)


def test_empty_slices_are_dropped_as_the_paper_counts_them(tmp_path):
    write_bids(tmp_path, ["sub-a"], runs=(1,))
    volume, mask = cord(1)
    volume[:, :, 0], mask[:, :, 1] = 0, 0                # no image; no grey matter
    scan, = mt.find_scans(tmp_path)
    write_nifti(scan.image, volume)
    write_nifti(scan.masks[mt.ANY], (mask == 1).astype(np.uint8))
    config = dataclasses.replace(mt.Config(), **FAST)
    assert [w[2] for w in mt.read_scan(scan, config, True).where] == [2]
    assert [w[2] for w in mt.read_scan(scan, config, False).where] == [1, 2]


def test_grey_matter_outside_the_crop_is_reported(tmp_path, capsys):
    write_bids(tmp_path, ["sub-a"], runs=(1,))
    scan, = mt.find_scans(tmp_path)
    mask = np.zeros((40, 36, 3), np.uint8)
    mask[18:22, 16:20], mask[0:2, 16:20] = 1, 1          # 8 of 24 columns of it far on the left
    write_nifti(scan.masks[mt.ANY], mask)
    mt.read_scan(scan, dataclasses.replace(mt.Config(), crop=16, spacing=0.5), True)
    warning = capsys.readouterr().out
    assert "warning" in warning and "33%" in warning and "sub-a_run-1" in warning
    mt.read_scan(scan, dataclasses.replace(mt.Config(), crop=40, spacing=0.5), True)
    assert capsys.readouterr().out == ""


def test_the_paper_split_has_no_subject_twice(phantom):
    scans = mt.find_scans(phantom)
    sets = mt.split_scans(scans, small(phantom))
    names = {key: [scan.subject for scan in part] for key, part in sets.items()}
    assert {key: len(part) for key, part in names.items()} == {
        "train": 8, "val": 8, "test": 12, "unlabelled": 40}
    everyone = sum(names.values(), [])
    assert len(everyone) == len(set(everyone)) == 68     # 12 labelled subjects stay unused
    for key, count in (("train", 2), ("val", 2), ("test", 3), ("unlabelled", 10)):
        assert sorted(n.split("-")[0] for n in names[key]) == sorted(
            [f"site{s}" for s in range(1, 5)] * count)
    assert all(int(name[-2:]) > 10 for name in names["unlabelled"])
    again = mt.split_scans(scans, small(phantom, seed=7))
    other = mt.split_scans(scans, small(phantom, split_seed=1))
    assert sets == again and sets != other


def test_subjects_by_name_and_their_further_scans(tmp_path):
    write_bids(tmp_path, ["sub-aSes1", "sub-aSes2", "sub-b", "sub-c", "sub-d"])

    def names(**changes):
        config = small(tmp_path, train=("sub-aSes1",), test=("sub-b",), **changes)
        sets = mt.split_scans(mt.find_scans(tmp_path), config)
        return {key: [scan.name for scan in part] for key, part in sets.items()}

    found = names(val=("sub-c",))
    assert found["train"] == ["sub-aSes1_run-1"] and found["test"] == ["sub-b_run-1"]
    # The other scans of the training person are unlabelled, those of test and validation unused.
    assert found["unlabelled"] == ["sub-aSes1_run-2", "sub-aSes2_run-1", "sub-aSes2_run-2",
                                   "sub-d_run-1", "sub-d_run-2"]
    with pytest.raises(mt.InputError, match="no subject sub-z to --exclude"):
        names(exclude=("sub-z",))
    assert names(exclude=("sub-aSes2", "sub-d"))["unlabelled"] == [
        "sub-aSes1_run-2", "sub-c_run-1", "sub-c_run-2"]
    assert "sub-b_run-2" in names(rescans=True)["unlabelled"]
    assert "sub-b_run-1" not in names(rescans=True)["unlabelled"]


@pytest.mark.parametrize("changes, message", [
    (dict(train=("sub-aSes1",), test=("sub-aSes2",)), "sub-a is in --train and in --test"),
    (dict(train=("sub-b",), test=("sub-x",)), "no subject sub-x with masks"),
    (dict(train=("sub-b",)), "--train and --test must both be given"),
    (dict(), r"3 people with masks in all, too few for --split \(2, 2, 3\)"),
])
def test_splits_that_cannot_be(tmp_path, changes, message):
    write_bids(tmp_path, ["sub-aSes1", "sub-aSes2", "sub-b", "sub-c"])
    with pytest.raises(mt.InputError, match=message):
        mt.split_scans(mt.find_scans(tmp_path), small(tmp_path, **changes))


def test_masks_of_unlabelled_subjects_are_never_read(tmp_path):
    write_bids(tmp_path, ["sub-a", "sub-b", "sub-c"])
    write_scgm(tmp_path / "scgm", people=(1, 2, 11))
    by_name = small(tmp_path, train=("sub-a",), test=("sub-b",))
    per_site = small(tmp_path / "scgm", split=(1, 0, 1))
    before = [mt.load_data(config) for config in (by_name, per_site)]
    poison = np.full((40, 36, 3), np.nan, np.float32)
    labels = tmp_path / "derivatives/labels"
    for name in ("sub-a_run-2", "sub-b_run-2", "sub-c_run-1", "sub-c_run-2"):
        write_nifti(labels / name.split("_")[0] / f"anat/{name}_T2starw_gmseg-x.nii.gz", poison)
    (labels / "sub-c/anat/sub-c_run-1_T2starw_gmseg-manual.nii.gz").write_bytes(b"not a NIfTI")
    (labels / "sub-a/anat/sub-a_run-2_T2starw_gmseg-x.nii.gz").unlink()   # labelled otherwise
    (labels / "sub-b/anat/sub-b_run-2_T2starw_gmseg-x.nii.gz").unlink()
    for rater in range(1, 5):
        write_nifti(tmp_path / f"scgm/test/site1-sc11-mask-r{rater}.nii.gz", poison)
    for old, config in zip(before, (by_name, per_site)):
        new = mt.load_data(config)
        assert len(new["unlabelled"].images) > 0
        for key in old:
            assert old[key].where == new[key].where
            assert torch.equal(old[key].images, new[key].images)
            assert torch.equal(old[key].masks, new[key].masks)


def test_a_folder_without_scans_is_an_error(tmp_path):
    for folder, message in ((tmp_path, "no scans found"), (tmp_path / "x", "no such folder")):
        with pytest.raises(mt.InputError, match=message):
            mt.find_scans(folder)


# --- 8. Metrics ----------------------------------------------------------------------------------

def test_metrics_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    p, y = rng.random((6, 1, 5, 7)) < 0.4, rng.random((6, 1, 5, 7)) < 0.3
    p[0], y[1], p[2], y[2], p[3], y[3] = 0, 0, 0, 0, 1, 1   # empty, both empty, all foreground
    found = mt.segmentation_metrics(torch.from_numpy(p), torch.from_numpy(y))
    for n in range(6):
        tp = fp = fn = tn = 0
        for a, b in zip(p[n].flat, y[n].flat):
            tp, fp, fn, tn = tp + (a and b), fp + (a and not b), fn + (b and not a), tn + (
                not a and not b)
        pairs = dict(dice=(2 * tp, 2 * tp + fp + fn), miou=(tp, tp + fp + fn),
                     accuracy=(tp + tn, 35), precision=(tp, tp + fp), recall=(tp, tp + fn),
                     specificity=(tn, tn + fp))
        for name, (top, below) in pairs.items():
            expected = 100 * top / below if below else 0.0
            assert found[name][n].item() == pytest.approx(expected, abs=1e-4), (n, name)
    assert tuple(found) == mt.METRICS and found["dice"][2] == 0


def test_dice_and_iou_hold_their_identity():
    torch.manual_seed(0)
    found = mt.segmentation_metrics(torch.rand(9, 1, 8, 8) > 0.5, torch.rand(9, 1, 8, 8) > 0.5)
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
    assert np.allclose(mt.evaluate(network, slices, threshold=0.3)["dice"], 100)


# --- 9, 10, 14. Training, report, command line ---------------------------------------------------

def run(*arguments, cwd, code=0):
    """The command line in a process of its own."""
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


TINY_OPTIONS = ("--preset", "demo", "--crop", 32, "--width", 4, "--epochs", 2)


def test_the_command_line_end_to_end(phantom, tmp_path):
    done = run("--data", phantom, *TINY_OPTIONS, "--runs", 2, "--out", "out", cwd=tmp_path)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "config.json", "table.md", "metrics.csv", "curves.png", "examples.png",
        *(f"{method}-seed{seed}.{end}" for method in ("supervised", "mean_teacher")
          for seed in (0, 1) for end in ("pt", "csv"))}
    table = (out / "table.md").read_text()
    assert table in done.stdout and "Teacher minus supervised" in table
    for row in ("supervised", "mean teacher (student)", "mean teacher (teacher)",
                "paper: supervised", "paper: semi-supervised"):
        assert f"| {row} " in table
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert list(rows[0]) == ["method", "seed", "model", "site", "subject", "slice", *mt.METRICS]
    assert len(rows) == 2 * 3 * 12 * 2                   # runs, networks, test subjects, slices
    # The table's mean and std, recomputed from the per-slice file
    seeds = [np.mean([float(row["dice"]) for row in rows if row["model"] == "teacher"
                      and row["seed"] == seed]) for seed in "01"]
    expected = f"{np.mean(seeds):.2f} ({np.std(seeds, ddof=1):.2f})"
    line = next(line for line in table.splitlines() if "(teacher)" in line)
    assert line.split("|")[2].strip() == expected
    log = list(csv.DictReader(open(out / "mean_teacher-seed1.csv")))
    assert [row["epoch"] for row in log] == ["1", "2"] and float(log[1]["val_teacher"]) >= 0
    assert json.loads((out / "config.json").read_text())["crop"] == 32
    state = torch.load(out / "mean_teacher-seed0.pt", weights_only=True)
    network = mt.UNet(4)
    network.load_state_dict(state["teacher"])
    for picture in ("curves.png", "examples.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_runs_with_one_seed_are_equal_and_with_another_are_not(phantom, tmp_path):
    data = mt.load_data(small(phantom))
    results = [mt.train(small(phantom, tmp_path / str(k)), "mean_teacher", seed, data)
               for k, seed in enumerate((3, 3, 4))]
    weights = [torch.cat([v.flatten() for v in r["teacher"].values()]) for r in results]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert results[0]["metrics"] == results[1]["metrics"]


def test_both_methods_take_the_steps_they_announce(phantom, tmp_path, capsys):
    data = mt.load_data(small(phantom))
    assert len(data["train"].images) == 16
    for method, config in (("supervised", small(phantom, tmp_path, batch=5, epochs=(3, 1))),
                           ("mean_teacher", small(phantom, tmp_path, batch=5, epochs=(1, 3)))):
        history = mt.train(config, method, 0, data)["history"]
        assert [row["step"] for row in history] == [3, 6, 9]     # 16 // 5, the last part dropped
        assert "3 epochs x 3 steps = 9 steps of 5" in capsys.readouterr().out
    assert history[0]["weight"] == pytest.approx(2.9 * math.exp(
        -5 * (1 - 1 / config.consistency_ramp) ** 2))


def test_training_works_without_unlabelled_and_without_validation_slices(tmp_path):
    write_bids(tmp_path, ["sub-a", "sub-b"], runs=(1,))
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
    assert "| supervised             | 62.00 (2.00) |" in table and "paper" not in table
    assert "+3.00 Dice, standard error 1.15 over 3 pairs of runs" in table
    assert mt.make_table({"supervised": row(60.0)})[1] is None


def test_benchmark_measures_a_step_and_its_parts(capsys):
    config = dataclasses.replace(mt.DEMO, crop=16, width=4, device="cpu")
    ms = mt.benchmark(config, seconds=0.5)
    parts = "draw a batch", "teacher forward", "student forward, backward", "train_step", "predict"
    assert all(0 < ms[part] < 1000 for part in parts) and "Adam" in capsys.readouterr().out
    assert ms["ratio"] == ms["train_step"] / (ms[parts[1]] + ms[parts[2]]) > 1


def test_every_field_is_an_option_and_help_explains_it():
    config, overwrite = mt.parse(["--data", "d", "--epochs", "7", "--weight-decay", "1e-3", "2e-3",
                       "--no-amp", "--train", "a", "b", "--rater", "majority"])
    assert not overwrite and config == dataclasses.replace(
        mt.Config(), data="d", epochs=(7,), weight_decay=(1e-3, 2e-3), amp=False,
        train=("a", "b"), rater="majority", out="runs/paper-d")
    assert mt.parse([])[0] == dataclasses.replace(mt.DEMO, out="runs/demo-phantom")
    assert mt.parse(["--preset", "paper"])[0].width == 64
    text = run("--help", cwd=HERE).stdout
    for field in dataclasses.fields(mt.Config):
        assert re.search(f"  --{field.name.replace('_', '-')}[ ,]", text), field.name
    assert "sub-XSes1 and sub-XSes2" in " ".join(text.split())


def test_the_defaults_are_the_papers():
    paper = mt.Config()
    assert (paper.spacing, paper.width, paper.dropout, paper.batch) == (0.25, 64, 0.5, 8)
    assert (paper.epochs, paper.lr, paper.lr_ramp) == ((1600, 350), 6e-4, 50)
    assert paper.weight_decay == (8e-4, 6e-4)
    assert (paper.consistency_weight, paper.consistency_ramp) == (2.9, 100)
    assert (paper.alpha, paper.alpha_late, paper.alpha_epochs) == (0.99, 0.999, 50)
    assert (paper.degrees, paper.noise ** 2) == (4.5, pytest.approx(0.01))
    assert len(set(mt.DEMO.epochs)) == 1                 # the demo: equal steps for both methods


# --- Resume --------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """Two people at one site and one unlabelled: the smallest study that trains. -> arguments."""
    folder = tmp_path_factory.mktemp("little")
    write_scgm(folder, people=(1, 2, 11))
    return ["--data", str(folder), "--preset", "demo", "--split", "1", "0", "1", "--crop", "16",
            "--width", "2", "--batch", "2"]


def weights(path):
    state = torch.load(path, weights_only=True)
    return state["metrics"], state["history"], {k: v for name in ("student", "teacher")
                                                for k, v in state.get(name, {}).items()}


def assert_same_run(one, other):
    (metrics, history, parts), (metrics_2, history_2, parts_2) = weights(one), weights(other)
    assert metrics == metrics_2 and json.dumps(history) == json.dumps(history_2)
    assert set(parts) == set(parts_2) and all(torch.equal(parts[k], parts_2[k]) for k in parts)


def start(arguments, cwd):
    return subprocess.Popen([sys.executable, "-u", SCRIPT, *map(str, arguments)], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for_an_epoch(process):
    return any(re.match(r" *\d+/\d+ ", line) for line in process.stdout)


def test_ten_kills_at_random_moments_leave_no_trace(little, tmp_path):
    options = [*little, "--method", "mean_teacher", "--epochs", 300, "--validate-every", 1]
    mt.main([*map(str, options), "--out", str(tmp_path / "whole")])
    rng, kills = np.random.default_rng(), 0              # other moments in every run of the tests
    while kills < 10:
        process = start([*options, "--out", "killed"], tmp_path)
        if wait_for_an_epoch(process):
            time.sleep(rng.uniform(0, 0.1))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        assert not (tmp_path / "killed/metrics.csv").exists(), "too few epochs for ten kills"
    mt.main([*map(str, options), "--out", str(tmp_path / "killed")])
    name = "mean_teacher-seed0.pt"
    assert_same_run(tmp_path / "whole" / name, tmp_path / "killed" / name)
    for file in ("metrics.csv", "table.md", "mean_teacher-seed0.csv"):
        assert (tmp_path / "whole" / file).read_text() == (tmp_path / "killed" / file).read_text()
    assert {p.name for p in (tmp_path / "killed").iterdir()} == {
        p.name for p in (tmp_path / "whole").iterdir()}  # no temporary file is left


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_goes_on_and_is_not_done_twice(little, tmp_path, number,
                                                                  capsys):
    options = [*little, "--method", "supervised", "--epochs", 60, "--validate-every", 50]
    process = start([*options, "--out", "cut"], tmp_path)
    assert wait_for_an_epoch(process)
    process.send_signal(number)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "Traceback" not in text and "goes on" in text
    state = torch.load(tmp_path / "cut/supervised-seed0.pt", weights_only=True)
    assert 0 < len(state["history"]) < 60 and "metrics" not in state
    for out in ("cut", "whole"):
        mt.main([*map(str, options), "--out", str(tmp_path / out)])
    assert_same_run(*(tmp_path / name / "supervised-seed0.pt" for name in ("cut", "whole")))
    before = (tmp_path / "cut/supervised-seed0.pt").stat().st_mtime_ns
    mt.main([*map(str, options), "--out", str(tmp_path / "cut")])
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "cut/supervised-seed0.pt").stat().st_mtime_ns == before


def test_more_runs_join_and_other_settings_are_refused(little, tmp_path, capsys):
    options = [*little, "--epochs", "1", "--method", "supervised", "--out", str(tmp_path / "out")]
    mt.main(options)
    assert len(mt.main([*options, "--runs", "2"])["scores"]["supervised"]["dice"]) == 2
    files = snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        mt.main([*options, "--lr", "0.5", "--noise", "0.2"])
    error = capsys.readouterr().err
    assert "lr 0.006 -> 0.5" in error.replace("0.012", "0.006") and "noise 0.1 -> 0.2" in error
    assert snapshot(tmp_path) == files
    mt.main([*options, "--lr", "0.5", "--overwrite"])
    assert not (tmp_path / "out/supervised-seed1.pt").exists()


def test_a_checkpoint_of_other_settings_or_data_is_never_taken_for_this_one(little, tmp_path,
                                                                            capsys):
    options = [*little, "--epochs", "1", "--method", "supervised", "--out", str(tmp_path)]
    mt.main(options)
    for changes in (["--lr", "0.5"], ["--split-seed", "1"], ["--exclude", "site1-sc11"],
                    ["--method", "mean_teacher", "--lr", "0.5"]):
        with pytest.raises(SystemExit):
            mt.main([*options, *changes])
        assert "supervised-seed0.pt: is of other settings or data: " in capsys.readouterr().err
    state = torch.load(tmp_path / "supervised-seed0.pt", weights_only=True)
    state["where"]["test"] = state["where"]["test"][1:]  # a slice came or went: a file has changed
    torch.save(state, tmp_path / "supervised-seed0.pt")
    with pytest.raises(SystemExit):
        mt.main(options)
    assert "supervised-seed0.pt: is of other settings or data: not these" in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoint_that_was_there(little, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pt"
    mt.save(path, {"good": torch.ones(3)})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        mt.save(path, {"good": torch.zeros(3)})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    with pytest.raises(SystemExit) as stop:
        mt.main([*little, "--epochs", "1", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err


def test_torchrun_deals_out_the_runs_and_reports_as_one_process_does(little, tmp_path):
    options = [*little, "--epochs", "2", "--runs", "2"]
    one = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    for out, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node",
                                              "2", "--master-port", "29512"])):
        done = subprocess.run([sys.executable, *launch, str(SCRIPT), *options, "--out", out],
                              cwd=tmp_path, env=one, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "one/table.md").read_text() == (tmp_path / "two/table.md").read_text()
    assert (tmp_path / "one/metrics.csv").read_text() == (tmp_path / "two/metrics.csv").read_text()


def test_a_failing_rank_names_its_run_and_keeps_the_others(little, tmp_path):
    options = [*little, "--epochs", "1", "--method", "supervised"]
    run(*options, "--out", "out", cwd=tmp_path)
    (tmp_path / "out/supervised-seed1.csv").mkdir()      # so that its log cannot be written
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
         "29513", str(SCRIPT), *options, "--out", "out", "--runs", "3"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "error: supervised, seed 1 on rank 1" in done.stderr
    assert "metrics" in torch.load(tmp_path / "out/supervised-seed2.pt", weights_only=True)


# --- 11. Predict ---------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def checkpoint(little, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    mt.main([*little, "--epochs", "40", "--out", str(out)])
    return out / "mean_teacher-seed0.pt"


def predicted(image, checkpoint, output, *more):
    mt.main(["predict", str(image), "--checkpoint", str(checkpoint), "--output", str(output),
             *more])
    return nib.load(output)


def test_predict_does_not_care_how_a_scan_is_stored(checkpoint, tmp_path):
    found = []
    for axes in ("RAS", "LPS", "SRA", "PIL"):
        write_nifti(tmp_path / f"{axes}.nii.gz", cord(7)[0], mm=(0.4, 0.6, 4.0), axes=axes)
        mask = predicted(tmp_path / f"{axes}.nii.gz", checkpoint, tmp_path / f"m-{axes}.nii.gz")
        image = nib.load(tmp_path / f"{axes}.nii.gz")
        assert mask.shape == image.shape and mask.get_data_dtype() == np.uint8
        assert np.allclose(mask.affine, image.affine, atol=1e-6)
        found.append(np.asanyarray(nib.as_closest_canonical(mask).dataobj))
    assert 0 < found[0].mean() < 1
    for other in found[1:]:
        assert np.array_equal(found[0], other)


def test_predict_keeps_grid_codes_and_units_and_finds_the_place(tmp_path):
    class Bright(nn.Module):                             # knows grey matter by its brightness
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return 20 * (x - 1.5)

    volume = np.zeros((41, 60, 3), np.float32)
    volume[18:25, 30:33, 1] = 100.0
    image = nib.Nifti1Image(volume, np.array([[-0.7, 0.05, 0, 9], [0.05, 0.7, 0, 5],
                                              [0, 0, 3, 1], [0, 0, 0, 1.0]]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    config = dataclasses.replace(mt.DEMO, spacing=0.35, crop=64)
    found = mt.predict_volume(image, Bright(), config)
    assert found.shape == volume.shape and found.dtype == np.float32
    assert ((found > 0.5) == (volume > 50)).all()        # twice as fine and back: the same voxels
    nib.save(image, tmp_path / "i.nii.gz")
    loaded = mt.load_nifti(tmp_path / "i.nii.gz")
    assert loaded.header["sform_code"] == 4 and loaded.header["qform_code"] == 1


def test_predict_on_voxels_of_0_7_mm_and_its_header(checkpoint, tmp_path):
    volume = cord(3)[0]
    image = nib.Nifti1Image((volume * 10).astype(np.int16), np.diag([-0.7, 0.7, 4, 1]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "i.nii.gz")
    mask = predicted(tmp_path / "i.nii.gz", checkpoint, tmp_path / "m.nii.gz")
    assert mask.shape == volume.shape and np.abs(mask.affine - image.affine).max() < 1e-6
    assert mask.header.get_zooms() == image.header.get_zooms()
    assert (mask.header["sform_code"], mask.header["qform_code"]) == (4, 1)
    assert mask.header.get_xyzt_units() == ("mm", "sec")
    assert set(np.unique(mask.dataobj)) <= {0, 1} and mask.get_data_dtype() == np.uint8
    maps = predicted(tmp_path / "i.nii.gz", checkpoint, tmp_path / "p.nii", "--probabilities")
    values = maps.get_fdata()
    assert maps.get_data_dtype() == np.float32 and 0 <= values.min() < values.max() <= 1
    assert np.array_equal(values > 0.5, np.asanyarray(mask.dataobj) > 0)


def test_predict_takes_a_folder_and_overwrites_only_when_told(checkpoint, tmp_path, capsys):
    for name in ("a", "b"):
        write_nifti(tmp_path / f"in/{name}.nii.gz", cord(1)[0])
    arguments = ["predict", str(tmp_path / "in"), "--checkpoint", str(checkpoint),
                 "--output", str(tmp_path / "out")]
    assert mt.main(arguments) == [tmp_path / "out/a.nii.gz", tmp_path / "out/b.nii.gz"]
    files = snapshot(tmp_path)
    with pytest.raises(SystemExit):
        mt.main(arguments)
    assert "--overwrite" in capsys.readouterr().err and snapshot(tmp_path) == files
    mt.main([*arguments, "--overwrite"])
    assert snapshot(tmp_path) == files                   # the same scan, the same bytes


def test_predict_warns_when_the_crop_may_have_cut_something(capsys):
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return 0 * x + 9.0

    image = nib.Nifti1Image(cord(1)[0], np.diag([0.5, 0.5, 5, 1]))
    config = dataclasses.replace(mt.DEMO, crop=16)
    found = mt.predict_volume(image, Everything(), config, "scan-x")
    assert "warning: scan-x" in capsys.readouterr().out
    assert (found[12:28, 10:26] > 0.5).all() and found[:11].max() == 0   # 16 px in the middle


# --- Bad input -----------------------------------------------------------------------------------

def snapshot(folder):
    return {p: (p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}


def stem(folder, number=1):
    return f"{folder}/data/training/site1-sc{number:02d}"


def rewrite(path, change, of="mask-r4"):
    """Read site1-sc01's file, change voxels or affine, write it back."""
    name = f"{stem(path)}-{of}.nii.gz"
    image = nib.load(name)
    nib.save(change(np.asarray(image.dataobj).copy(), image.affine, image.header), name)


def image_with(change):
    return lambda folder: rewrite(folder, change, of="image")


def mask_with(change):
    return lambda folder: rewrite(folder, change)


def zero_voxel(folder):
    raw = bytearray(gzip.decompress(Path(f"{stem(folder)}-image.nii.gz").read_bytes()))
    raw[80:84] = np.float32(0).tobytes()                 # pixdim[1]
    Path(f"{stem(folder)}-image.nii.gz").write_bytes(gzip.compress(bytes(raw)))


def negative_voxel(folder):
    raw = bytearray(gzip.decompress(Path(f"{stem(folder)}-image.nii.gz").read_bytes()))
    raw[84:88] = np.float32(-0.5).tobytes()
    Path(f"{stem(folder)}-image.nii.gz").write_bytes(gzip.compress(bytes(raw)))


def cut_file(folder):
    path = Path(f"{stem(folder)}-image.nii.gz")
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])


def remove_masks(folder):
    for path in (folder / "data").rglob("*mask*"):
        path.unlink()


def no_grey(folder):
    for number in (1, 2):
        for path in (folder / "data/training").glob(f"*sc{number:02d}-mask*"):
            image = nib.load(path)
            nib.save(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), path)


N = nib.Nifti1Image
BAD = {
    "folder missing": (lambda f: (f / "data").rename(f / "gone"), [], "data: no such folder"),
    "folder empty": (lambda f: shutil.rmtree(f / "data") or (f / "data").mkdir(), [],
                     "data: no scans found"),
    "neither layout": (lambda f: shutil.rmtree(f / "data/training") or shutil.rmtree(
        f / "data/test") or (f / "data/x.nii.gz").write_bytes(b"x"), [], "no scans found"),
    "truncated": (cut_file, [], "sc01-image.nii.gz: cannot be read"),
    "not gzip": (lambda f: Path(f"{stem(f)}-image.nii.gz").write_bytes(b"hello" * 99), [],
                 "sc01-image.nii.gz: cannot be read"),
    "not a NIfTI": (lambda f: Path(f"{stem(f)}-image.nii.gz").write_bytes(
        gzip.compress(b"hello" * 999)), [], "sc01-image.nii.gz: cannot be read"),
    "4-D": (image_with(lambda v, a, h: N(v[..., None].repeat(2, 3), a)), [], "has 4 dimensions"),
    "2-D": (image_with(lambda v, a, h: N(v[..., 0], a)), [], "has 2 dimensions"),
    "mask of another shape": (mask_with(lambda v, a, h: N(v[:-1], a)), [], "not on the grid"),
    "mask of another affine": (mask_with(lambda v, a, h: N(v, a + np.eye(4)[:, [3, 1, 2, 0]])),
                               [], "not on the grid"),
    "mask with a 3": (mask_with(lambda v, a, h: N(v + 1, a)), [], "mask-r4.nii.gz: has values"),
    "mask with a half": (mask_with(lambda v, a, h: N(v / np.float32(2), a)), [], "has values"),
    "NaN": (image_with(lambda v, a, h: N(np.where(v > 120, np.nan, v), a)), [],
            "sc01-image.nii.gz: has NaN"),
    "infinite": (image_with(lambda v, a, h: N(np.where(v > 120, np.inf, v), a)), [], "has NaN or"),
    "no grey matter": (no_grey, [], "no grey matter in any training"),
    "zero voxel size": (zero_voxel, [], "sc01-image.nii.gz: cannot be read as NIfTI (pixdim"),
    "negative voxel size": (negative_voxel, [], "NIfTI (pixdim[1,2,3] should be positive"),
    "too few subjects": (None, ["--split", "2", "2", "3"], "too few for --split"),
    "no masks at all": (remove_masks, [], "0 people with masks"),
    "subject in two sets": (None, ["--train", "site1-sc01", "--test", "site1-sc01"],
                            "site1-sc01 is in --train and in --test"),
    "unknown subject": (None, ["--train", "site9-sc01", "--test", "site1-sc01"],
                        "no subject site9-sc01"),
    "rater not there": (lambda f: [Path(f"{stem(f, k)}-mask-r4.nii.gz").unlink() for k in (1, 2)],
                        [], "no mask of rater 4"),
    "no such rater": (None, ["--rater", "7"], "--rater"),
    "crop": (None, ["--crop", "20"], "--crop 20: is not a multiple of 8"),
    "no epochs": (None, ["--epochs", "0"], "--epochs 0: makes no sense"),
    "no runs": (None, ["--runs", "0"], "--runs 0: makes no sense"),
    "negative weight": (None, ["--consistency-weight", "-1"], "--consistency-weight -1.0"),
    "NaN option": (None, ["--lr", "nan"], "--lr nan"),
    "alpha above 1": (None, ["--alpha", "1.5"], "--alpha 1.5"),
    "not a number": (None, ["--width", "wide"], "--width"),
    "unknown option": (None, ["--colour", "red"], "--colour"),
    "device not there": (None, ["--device", "abacus"], "--device abacus: not to be had"),
    "device that does not compute": (None, ["--device", "meta"], "--device meta: not to be had"),
    "three numbers of epochs": (None, ["--epochs", "1", "2", "3"], "--epochs and --weight-decay"),
    "absurd spacing": (None, ["--spacing", "1e-6"], "above 0.01 mm"),
    "absurd crop": (None, ["--crop", "8000000"], "at most 2048 px"),
    "singular affine": (image_with(lambda v, a, h: N(v, np.where(
        np.arange(4) == 1, a[:, [0]], a))), [], "sc01-image.nii.gz"),
    "split of two": (None, ["--split", "2", "2"], "--split (2, 2): expected three"),
    "output is a file": (lambda f: (f / "out").write_text("x"), [], "out"),
    "foreign checkpoint": (lambda f: (f / "out").mkdir() or torch.save(
        {"a": 1}, f / "out/supervised-seed0.pt"), [], "supervised-seed0.pt: is no checkpoint"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case, tmp_path, capsys):
    damage, options, message = BAD[case]
    write_scgm(tmp_path / "data", people=(1, 2, 11))
    if damage:
        damage(tmp_path)
    before = snapshot(tmp_path)
    arguments = ["--data", tmp_path / "data", "--preset", "demo", "--split", "1", "0", "1",
                 "--crop", "16", "--width", "2", "--batch", "2", "--epochs", "1", "--out",
                 tmp_path / "out", *options]
    with pytest.raises(SystemExit) as stop:
        mt.main([str(argument) for argument in arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
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
    if case == "empty":
        path.touch()
    elif case == "truncated":
        path.write_bytes(checkpoint.read_bytes()[:9999])
    elif case == "foreign":
        torch.save({"state_dict": {}}, path)
    elif case == "pickle":
        torch.save({**state, "history": Evil()}, path)
    elif case == "width":
        state["config"]["width"] = 3
        torch.save(state, path)
    write_nifti(tmp_path / "i.nii.gz", cord(1)[0])
    with pytest.raises(SystemExit) as stop:
        predicted(tmp_path / "i.nii.gz", path, tmp_path / "m.nii.gz")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert "c.pt" in error and not (tmp_path / "m.nii.gz").exists()
    assert not Path("evil-was-here").exists()


def test_all_faults_of_a_folder_are_reported_at_once(tmp_path, capsys):
    write_scgm(tmp_path / "data", people=(1, 2, 11))
    for number in (1, 2):
        Path(f"{stem(tmp_path, number)}-image.nii.gz").write_bytes(b"x")
    with pytest.raises(SystemExit):
        mt.main(["--data", str(tmp_path / "data"), "--split", "1", "0", "1", "--crop", "16"])
    error = capsys.readouterr().err
    assert "sc01-image" in error and "sc02-image" in error and error.count("\n") == 1


def test_a_process_ends_without_a_traceback(tmp_path):
    done = run("--data", "nowhere", cwd=tmp_path, code=2)
    assert done.stderr.startswith("error: nowhere: no such folder") and "Trace" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_three_hundred_damaged_files(checkpoint, tmp_path, capsys):
    rng, outcomes = np.random.default_rng(0), []
    write_nifti(tmp_path / "good.nii.gz", cord(1)[0])
    good = gzip.decompress((tmp_path / "good.nii.gz").read_bytes())
    path = tmp_path / "bad.nii.gz"
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
            predicted(path, checkpoint, tmp_path / "m.nii.gz", "--overwrite")
            outcomes.append("result")
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1
            outcomes.append("error")
        assert time.perf_counter() - begin < 10 and path.read_bytes() == bytes(packed)
    assert min(outcomes.count("result"), outcomes.count("error")) > 30


# --- 13. The phantom -----------------------------------------------------------------------------

def voxels(folder):
    return {path.name: np.asanyarray(nib.load(path).dataobj) for path in folder.iterdir()}


def test_the_phantom_is_reproducible_and_its_seed_matters(phantom, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        mt.write_phantom(tmp_path / name, seed=seed, sites=TINY[:2], subjects=4)
    one, two, three = (voxels(tmp_path / name) for name in ("one", "two", "three"))
    assert set(one) == set(two) and all(np.array_equal(one[k], two[k]) for k in one)
    assert not np.array_equal(one["site1-sc01-image.nii.gz"], three["site1-sc01-image.nii.gz"])
    with pytest.raises(mt.InputError, match="there already"):
        mt.write_phantom(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]


def test_the_phantom_has_the_challenges_files(phantom):
    names = {path.name for path in phantom.iterdir()}
    assert names == {f"site{s}-sc{n:02d}-{kind}.nii.gz" for s in range(1, 5) for n in range(1, 21)
                     for kind in ("image", "mask-r1", "mask-r2", "mask-r3", "mask-r4")
                     if kind == "image" or n <= 10}


@pytest.mark.parametrize("number", range(4))
def test_the_phantom_looks_like_a_cord(number):
    site = mt.SITES[number]
    image, masks = mt.phantom_subject(site, torch.Generator().manual_seed(1))
    assert site.slices[0] <= len(image) - 2 * site.black <= site.slices[1]
    inside = slice(site.black, len(image) - site.black)
    image, masks = image[inside].float(), masks[:, inside]
    grey, white = masks[3] == 1, masks[3] == 2
    inner = -F.max_pool2d(-(masks[3] > 0).float(), 5, 1, 2) > 0         # away from the bright CSF
    assert image[grey & inner].mean() > 1.03 * image[white & inner].mean()
    area = grey.sum() / len(grey) * site.mm ** 2
    assert 8 < area < 25                                                # mm2; real ones: 12 to 17
    assert 50 < (masks[3] > 0).sum() / len(grey) * site.mm ** 2 < 120   # mm2, the whole cord
    dice = 2 * ((masks[0] == 1) & grey).sum() / ((masks[0] == 1).sum() + grey.sum())
    assert 0.7 < dice < 1                                               # raters differ


# --- The file as a whole -------------------------------------------------------------------------

PIECES = {
    "conv_block": "conv_block(1, 4, 0.1)(torch.randn(2, 1, 8, 8))",
    "UNet": "UNet(4, 0.5)(torch.randn(2, 1, 16, 16))",
    "dice_loss": "dice_loss(torch.rand(2, 1, 4, 4), torch.ones(2, 1, 4, 4))",
    "consistency_loss": "consistency_loss(torch.randn(2, 1, 4, 4), torch.rand(2, 1, 4, 4))",
    "sample_affine": "sample_affine(2, 4.5)",
    "warp": "warp(torch.rand(1, 1, 8, 8), torch.eye(2, 3)[None])",
    "make_teacher": "make_teacher(nn.Conv2d(1, 1, 1))",
    "update_teacher": "update_teacher(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), 0.9)",
    "ramp_up": "ramp_up(1, 10)",
    "learning_rate_factor": "learning_rate_factor(1, 10, 2), learning_rate_factor(5, 10, 2)",
    "train_step": "(lambda s, t: train_step(s, t, torch.optim.Adam(s.parameters()), torch.randn("
                  "4, 1, 8, 8), torch.ones(2, 1, 8, 8), 0))(*[nn.Conv2d(1, 1, 1)] * 2)",
}


def pieces_of_sections_2_to_6():
    source = SCRIPT.read_text()
    paper = source[source.index("# --- 2. U-Net"):source.index("# --- 7. Data")]
    nodes = [n for n in ast.parse(paper).body]
    assert all(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in nodes)   # no globals
    segments = {}
    for n in nodes:
        first = min([n.lineno, *(d.lineno for d in n.decorator_list)])
        segments[n.name] = "\n".join(paper.splitlines()[first - 1:n.end_lineno])
    return segments


@pytest.mark.parametrize("name", PIECES)
def test_each_piece_works_when_pasted_into_an_empty_file(name):
    segments, wanted, todo = pieces_of_sections_2_to_6(), {}, [name]
    assert set(segments) == set(PIECES)
    while todo:                                          # the pieces that it calls come along
        piece = todo.pop()
        wanted[piece] = segments[piece]
        called = {n.id for n in ast.walk(ast.parse(segments[piece])) if isinstance(n, ast.Name)}
        todo += (called & set(segments)) - set(wanted)
    pasted = ("import copy, math, torch; from torch import nn;\nimport torch.nn.functional as F\n"
              + "\n\n".join(wanted.values()))
    namespace = {}
    exec(pasted, namespace)
    exec(PIECES[name], namespace)


def test_importing_does_nothing(tmp_path):
    code = (f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.dont_write_bytecode = True\n"
            "import mean_teacher_seg, torch\n"
            "assert 'matplotlib.pyplot' not in sys.modules and torch.initial_seed() == 2026")
    done = subprocess.run([sys.executable, "-c", "import torch; torch.manual_seed(2026)\n" + code],
                          cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_only_the_six_packages():
    six = {"torch", "numpy", "nibabel", "matplotlib", "jupyter", "pytest"}
    lines = (HERE / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == six
    for path in (SCRIPT, Path(__file__)):
        names = {alias.name for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(ast.parse(path.read_text()))
                  if isinstance(node, ast.ImportFrom)}
        roots = {name.split(".")[0] for name in names} - {"mean_teacher_seg"}
        assert roots - set(sys.stdlib_module_names) <= six


def test_lines_fit_and_the_licence_is_named():
    source = SCRIPT.read_text()
    assert max(map(len, source.splitlines())) <= 99
    assert source.startswith("# SPDX-License-Identifier: MIT\n")
    assert source[:source.index("# --- 7. Data")].count("\n") <= 400     # the whole paper


# --- Real scans, where they are ------------------------------------------------------------------

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


@pytest.mark.skipif(not REAL.is_dir(), reason="the CC0 scans are not here")
def test_real_scans_of_six_sessions(tmp_path):
    config = dataclasses.replace(mt.DEMO, data=str(REAL), train=("sub-10062Ses1", "sub-9709Ses1"),
                                 test=("sub-9418", "sub-9584"))
    sets = mt.split_scans(mt.find_scans(REAL), config)
    assert {key: len(part) for key, part in sets.items()} == {
        "train": 2, "val": 0, "test": 2, "unlabelled": 6}
    data = mt.load_data(config)
    assert len(data["train"].images) == 40 and len(data["test"].images) == 34
    area = data["train"].masks.sum((1, 2, 3)) * config.spacing ** 2
    assert 10 < area.mean() < 20                          # mm2 of grey matter in a slice
