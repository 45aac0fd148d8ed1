# SPDX-License-Identifier: MIT
"""Tests of the real functions, against something independent of them: a value worked out by hand,
a closed form, a NumPy loop, or a property that the mathematics demands. (python -m pytest)

    part of this file      sections of the script   part of this file     sections of the script
    ---------------------  ----------------------   --------------------  ----------------------
    U-Net                  2                        The training loop     9
    Losses                 3; ablations of 9        Resume                9, 10
    Delayed augmentation   4                        Results               10
    Teacher and ramps      5                        Predict               11
    One training step      6; ablations of 9        Bad input             13; 7, 9, 11
    Data, real scans       7                        The phantom           12
    Metrics                8                        The file as a whole   1 to 6; README.md
    Training and report    9, 10; options of 13     The notebook          tutorial.ipynb
"""
import ast
import base64
import copy
import csv
import dataclasses
import gzip
import inspect
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import mean_teacher_seg as mt

HERE = Path(__file__).resolve().parent
SCRIPT, README, NOTEBOOK, DATA = (HERE / name for name in (
    "mean_teacher_seg.py", "README.md", "tutorial.ipynb", "../shared/data"))
TINY = [site._replace(mm=0.5, size=48, slices=(2, 2), black=site.black // 4) for site in mt.SITES]

@pytest.fixture(autouse=True)
def seeded():
    """No test depends on those before it."""
    torch.manual_seed(0)

@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A phantom of full subject count and tiny matrices."""
    folder = tmp_path_factory.mktemp("phantom") / "tiny"
    mt.write_phantom(folder, sites=TINY)
    return folder

def small(folder, out="", **changes):
    settings = dict(data=str(folder), out=str(out), crop=32, width=4, epochs=(2,), steps=0)
    return dataclasses.replace(mt.DEMO, **{**settings, **changes})

def step_options(**changes):
    return mt.step_options(dataclasses.replace(mt.DEMO, **changes), torch.device("cpu"))

def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])

def correlation(one, other):
    return np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]

def vector(network):
    return flat(network.parameters())

def rotation(degrees):
    """phi that turns the picture anticlockwise, as torch.rot90 does."""
    a = math.radians(degrees)
    return torch.tensor([[[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]]])

# --- U-Net ---------------------------------------------------------------------------------------

def test_unet_has_15_convolutions_the_known_number_of_parameters_and_returns_logits():
    network = mt.UNet(64)
    assert sum(isinstance(m, nn.Conv2d) for m in network.modules()) == 15
    assert sum(p.numel() for p in network.parameters()) == 4_837_249
    torch.manual_seed(0)
    network = mt.UNet(4, 0.0).requires_grad_(False)
    assert network(3 * torch.randn(2, 1, 16, 40)).shape == (2, 1, 16, 40)
    network.out.bias.fill_(-7.0)
    assert network(torch.randn(2, 1, 16, 16)).mean() < -1        # no sigmoid inside
    for size in ((15, 16), (16, 20)):                    # cannot be halved three times
        with pytest.raises(ValueError, match="multiples of 8.*{} x {}".format(*size)):
            network(torch.zeros(1, 1, *size))

def test_unet_sees_as_far_as_its_layers_reach():
    # By hand: 2 convs at each of 1, 2, 4, 8 px, reach 2 * (1 + 2 + 4 + 8) = 30 px on the way down;
    # an output pixel must not depend on anything hundreds of px away, but must on its near field.
    network, x = mt.UNet(4, 0.0).eval(), torch.randn(1, 1, 256, 256, requires_grad=True)
    network(x)[0, 0, 128, 128].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert 30 <= 128 - rows.min() <= 100 and 30 <= rows.max() - 128 <= 100

# --- Losses --------------------------------------------------------------------------------------

def test_dice_loss_by_hand():
    p, y = torch.tensor([0.5, 0.5, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    # sum(py) = 1.5, sum(p) = 2, sum(y) = 2: -2 * 1.5 / 4
    assert mt.dice_loss(p, y).item() == pytest.approx(-0.75, abs=1e-4)
    assert mt.dice_loss(y, y).item() == mt.dice_loss(0 * y, 0 * y).item() == pytest.approx(-1.0)
    # Slice 0: all four right; slice 1: its only pixel missed. Over the batch 2 * 4 / (4 + 5); the
    # mean of two ratios would be (1 + 0) / 2.
    p = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    y = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]]).view(2, 1, 2, 2)
    assert mt.dice_loss(p, y).item() == pytest.approx(-8 / 9, abs=1e-4)
    half = p.bfloat16()
    assert mt.dice_loss(half, half).dtype == mt.consistency_loss(half, half).dtype == torch.float32

BCE, MSE = (math.log(2), -math.log(0.75)), (0.2 ** 2, 0.25 ** 2)     # ln 2 whatever y is

@pytest.mark.parametrize("loss, by_hand, everywhere", [
    (mt.consistency_loss, BCE, np.mean(BCE)), (step_options()["consistency"], BCE, np.mean(BCE)),
    (step_options(consistency="mse")["consistency"], MSE, np.mean(MSE)),
    (step_options(confidence=0.8)["consistency"], BCE, BCE[1])])     # leaves out the teacher's 0.3
def test_consistency_loss_by_hand(loss, by_hand, everywhere):
    logits, teacher = torch.tensor([0.0, math.log(3.0)]), torch.tensor([0.3, 1.0])   # p 0.5, 0.75
    for valid, expected in (([True, True], everywhere), ([False, True], by_hand[1]),
                            ([False, False], 0)):
        found = loss(logits, teacher, torch.tensor(valid)).item()
        assert found == pytest.approx(expected, abs=1e-6)
    assert mt.consistency_loss(logits, teacher).item() == pytest.approx(np.mean(BCE), abs=1e-6)

def test_a_confident_background_pixel_counts_and_an_uncertain_one_does_not():
    logits = torch.tensor([math.log(3.0), 0.0])          # p 0.75, 0.5
    teacher = torch.tensor([0.1, 0.5])                   # sure of the background; unsure
    valid = torch.tensor([True, True])
    by_hand = -0.1 * math.log(0.75) - 0.9 * math.log(0.25)
    found = step_options(confidence=0.8)["consistency"](logits, teacher, valid).item()
    assert found == pytest.approx(by_hand, abs=1e-6)

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
    p = torch.tensor([0.01, 0.5, 0.99, 0.999999])        # y = 0: -y log(p) + (1 - y) log(1 - p)
    printed, right = torch.log(1 - p), [mt.consistency_loss(z, 0 * z).item() for z in p.logit()]
    assert (printed.diff() < 0).all() and printed[-1] < -13          # ln(1e-6) = -13.8
    assert right == sorted(right) and right == pytest.approx((-printed).tolist(), rel=1e-3)

@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 8, 8), (1, 1, 8, 8), (2, 1, 8, 1), ()])
@pytest.mark.parametrize("loss", ["dice", "consistency", "valid"])
def test_a_loss_refuses_different_shapes_instead_of_broadcasting_them(loss, shape):
    right, wrong = torch.rand(2, 1, 8, 8), torch.rand(shape)
    with pytest.raises(ValueError, match="same shape"):
        if loss == "dice":
            mt.dice_loss(right, wrong)
        elif loss == "consistency":
            mt.consistency_loss(right, wrong)
        else:
            mt.consistency_loss(right, right, wrong > 0.5)

def test_a_step_refuses_a_network_with_two_output_channels():
    student, teacher, optimizer = networks(student=nn.Conv2d(1, 2, 3, padding=1))
    before = vector(student)
    with pytest.raises(ValueError, match=r"same shape.*\(2, 2, 16, 16\)"):
        mt.train_step(student, teacher, optimizer, *batch(), 0)
    assert torch.equal(vector(student), before)

# --- Delayed augmentation ------------------------------------------------------------------------

def naive_warp(picture, matrix):
    """Bilinear look-up, pixel by pixel; 0 outside. picture (H, W), matrix (2, 3) in px."""
    height, width = picture.shape
    result = np.zeros((height, width))
    for row, column in np.ndindex(height, width):
        right, down = column - (width - 1) / 2, row - (height - 1) / 2
        x, y = matrix @ [right, down, 1]
        x, y = x + (width - 1) / 2, y + (height - 1) / 2
        for i in (int(np.floor(y)), int(np.floor(y)) + 1):
            for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(y - i)) * (1 - abs(x - j))
                    result[row, column] += share * picture[i, j]
    return result

@pytest.mark.parametrize("turns", range(4))
def test_warp_by_right_angles_is_rot90_without_shearing(turns):
    x = torch.zeros(1, 1, 24, 40)
    x[0, 0, 8:16, 16:24] = torch.randn(8, 8)             # a square patch around the centre
    found = mt.warp(x, rotation(90 * turns))
    assert torch.allclose(found[0, 0, 8:16, 16:24], torch.rot90(x[0, 0, 8:16, 16:24], turns),
                          atol=1e-4)
    assert found.abs().sum().item() == pytest.approx(x.abs().sum().item(), abs=1e-2)

def test_warp_is_a_bilinear_look_up_also_under_autocast():
    x, phi = torch.randn(4, 3, 13, 18), mt.sample_affine(4, 40.0, translation=3.0, scale=0.3)
    # In bfloat16 the sampling grid of a 200 px image would be off by most of a pixel.
    with torch.autocast("cpu", torch.bfloat16):
        found = mt.warp(x, phi)
    for k, c in np.ndindex(4, 3):
        expected = naive_warp(x[k, c].numpy(), phi[k].double().numpy())
        assert np.allclose(found[k, c], expected, atol=1e-4)

def test_sample_affine_stays_in_its_ranges_and_fills_them():
    torch.manual_seed(0)
    phi = mt.sample_affine(4000, 4.5, translation=3.0, scale=0.1)
    angle = torch.rad2deg(torch.atan2(phi[:, 1, 0], phi[:, 0, 0]))
    zoom = 1 / torch.linalg.det(phi[:, :, :2]).sqrt()
    for values, low, high in ((angle, -4.5, 4.5), (zoom, 0.9, 1.1), (phi[:, :, 2], -3, 3)):
        assert len(values) == 4000 and low <= values.min() and values.max() <= high
        assert values.max() - values.min() > 0.98 * (high - low)
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    only = mt.sample_affine(5, 4.5)                      # a rotation and nothing else
    assert (only[:, :, 2] == 0).all() and (torch.linalg.det(only[:, :, :2]) - 1).abs().max() < 1e-6

def smooth_images(n=2, channels=1, size=32):
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    return torch.stack([torch.exp(-((x - 0.2 * k) ** 2 + 2 * (y + 0.1) ** 2) / 0.1)
                        for k in range(n * channels)]).view(n, channels, size, size)

@pytest.mark.parametrize("channels", [1, 3])
def test_delayed_targets_lie_on_the_students_grid_wherever_it_is_inside(channels):
    # A pointwise linear network commutes with a linear resampling, so the student's f(g(x)) and
    # the teacher's g(f(x)) must be the same picture; f(x), without the delayed g, must not be.
    # (The sigmoid comes between; the teacher's logits are small, where it is nearly a line.)
    network = nn.Conv2d(channels, 1, 1, bias=False)
    network.weight.data = torch.linspace(0.02, 0.04, channels).view(1, channels, 1, 1)
    x, phi = smooth_images(2, channels), torch.cat([rotation(15), rotation(-15)])
    phi[:, 0, 2] = 2.0
    augmented, inside = mt.augment(x, phi, 0.0)
    targets = mt.delayed_targets(network, x, phi, 0.0)
    assert augmented.shape == x.shape and inside.shape == targets.shape == (2, 1, 32, 32)
    assert augmented.dtype == targets.dtype == torch.float32 and not targets.requires_grad
    student = torch.sigmoid(network(augmented)).detach()
    assert (student - targets)[inside].abs().max() < 1e-5
    assert (student - torch.sigmoid(network(x)).detach())[inside].abs().max() > 1e-4
    for k in range(2):
        assert np.array_equal(inside[k, 0], naive_warp(np.ones((32, 32)), phi[k].numpy()) > 0.999)

def neighbour_correlation(noise):
    """Correlation of a pixel with the one to its right, and with the one below it."""
    across = correlation(noise[:, :, :, 1:], noise[:, :, :, :-1])
    down = correlation(noise[:, :, 1:], noise[:, :, :-1])
    return across, down

@pytest.mark.parametrize("std", [0.1, 0.2])
def test_the_students_noise_is_added_after_the_warp_and_not_interpolated(std):
    # Interpolated noise would have two thirds of this std, and neighbours would be correlated.
    images = torch.zeros(4, 2, 64, 64)
    phi = mt.sample_affine(4, 20.0, translation=3.0, scale=0.1)
    noise, _ = mt.augment(images, phi, std)
    assert noise.std().item() == pytest.approx(std, rel=0.03)
    assert np.abs(neighbour_correlation(noise)).max() < 0.04
    # The same noise is interpolated if it is in the images already.
    interpolated = mt.warp(std * torch.randn_like(images), phi)[:, :, 16:48, 16:48]
    assert interpolated.std() < 0.8 * std

# --- Teacher and ramps ---------------------------------------------------------------------------

def test_the_teacher_starts_as_a_copy_without_gradient_and_becomes_its_closed_form():
    torch.manual_seed(0)
    student = mt.UNet(4)
    teacher, alpha, mean = mt.make_teacher(student), 0.9, 0
    pairs = list(zip(student.state_dict().values(), teacher.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    assert teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    first, weights = vector(student), torch.randn(7, len(vector(student)))
    for k, weight in enumerate(weights, start=1):
        nn.utils.vector_to_parameters(weight.clone(), student.parameters())
        mt.update_teacher(student, teacher, alpha)
        mean = mean + (1 - alpha) * alpha ** (7 - k) * weight
    # theta'_7 = alpha^7 theta'_0 + (1 - alpha) sum_k alpha^(7-k) theta_k
    assert torch.allclose(vector(teacher), alpha ** 7 * first + mean, atol=1e-6)
    assert torch.equal(vector(student), weights[-1])

def frozen_network():
    """A network in train mode, one BatchNorm layer of which is frozen in eval mode."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                            nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))
    network(3 * torch.randn(4, 1, 16, 16) + 2)           # running statistics of its own
    network[1].eval()
    return network

def modes(network):
    return [module.training for module in network.modules()]

def test_the_teacher_copies_the_mode_of_every_layer_and_so_the_output():
    student, x = frozen_network(), torch.randn(2, 1, 16, 16)
    teacher = mt.make_teacher(student)
    assert modes(teacher) == modes(student) == [True, True, False, True, True, True]
    assert torch.equal(teacher(x), student(x))
    assert modes(mt.make_teacher(student.eval())) == [False] * 6

def test_a_frozen_layer_stays_frozen_in_student_and_teacher_during_training():
    student, teacher, optimizer = networks(student=frozen_network())
    frozen, other = student[1].running_mean.clone(), student[3].running_mean.clone()
    for step in range(2):
        mt.train_step(student, teacher, optimizer, *batch(), step)
    for network in (student, teacher):
        assert torch.equal(network[1].running_mean, frozen)
        assert not torch.equal(network[3].running_mean, other)

def test_ramps_at_known_epochs():
    assert mt.ramp_up(50, 100) == pytest.approx(math.exp(-1.25))
    assert mt.ramp_up(1, 100) == pytest.approx(math.exp(-5 * 0.99 ** 2))
    assert mt.ramp_up(100, 100) == mt.ramp_up(300, 100) == mt.ramp_up(1, 0) == 1
    for epoch, factor in ((25, math.exp(-1.25)), (50, 1), (125, (1 + math.sqrt(0.5)) / 2),
                          (200, 0.5), (350, 0)):         # 200: half way down
        assert mt.learning_rate_factor(epoch, 350, 50) == pytest.approx(factor)
    assert mt.learning_rate_factor(3, 3, 50) == mt.ramp_up(3, 50)        # shorter than its ramp

# --- One training step ---------------------------------------------------------------------------

def batch(labelled=2, unlabelled=2, size=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(labelled + unlabelled, 1, size, size, generator=generator)
    masks = (F.avg_pool2d(images, 5, 1, 2)[:labelled] > 0.1).float()
    return images[:labelled], masks, images[labelled:]

def networks(lr=0.1, student=None):
    torch.manual_seed(0)
    student = student or mt.UNet(4, 0.0)
    return student, mt.make_teacher(student), torch.optim.SGD(student.parameters(), lr=lr)

def test_at_weight_zero_unlabelled_slices_change_nothing(monkeypatch):
    noise = torch.randn(9, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    phi = torch.cat([rotation(3.0 * k) for k in range(9)])
    monkeypatch.setattr(mt, "sample_affine", lambda n, *_, **__: phi[:n])
    monkeypatch.setattr(torch, "randn_like", lambda x: noise[:len(x)])
    images, masks, unlabelled = batch(2, 3)
    unlabelled = 5 + 3 * unlabelled                      # of a very different scanner

    def change(semi, *slices):
        student, teacher, optimizer = networks()
        before = vector(student)
        mt.train_step(student, teacher if semi else None, optimizer, *slices, 0, weight=0.0)
        return vector(student) - before

    expected = change(False, images, masks, unlabelled)
    for extra in (unlabelled, unlabelled[:0]):
        found = change(True, images, masks, extra)
        assert (found - expected).norm() <= 1e-6 * expected.norm() > 0
    # And the check can fail: in one pass for both, BatchNorm mixes them.
    monkeypatch.setattr(mt, "dice_loss", lambda p, y, dice=mt.dice_loss: dice(p[:2], y[:2]))
    joint = change(True, torch.cat([images, unlabelled]), torch.cat([masks, 0 * unlabelled]),
                   unlabelled[:0])
    assert F.cosine_similarity(joint, expected, dim=0) < 0.9

@pytest.mark.parametrize("step, alpha", [(0, 1 / 2), (1, 2 / 3), (8, 0.9), (500, 0.95)])
def test_the_teacher_gets_the_average_no_gradient_and_its_own_statistics(step, alpha):
    student, teacher, optimizer = networks()             # the average warms up as a plain mean
    before, (images, masks, unlabelled) = vector(teacher), batch()
    with torch.no_grad():                                # what its BatchNorm sees, in two passes
        one, other = (F.relu(teacher.down[0][0](x)).mean((0, 2, 3)) for x in (images, unlabelled))
    mt.train_step(student, teacher, optimizer, images, masks, unlabelled, step, 1, 0.95, noise=0)
    assert {p.grad is None for p in teacher.parameters()} == {True}
    assert {p.grad is None for p in student.parameters()} == {False}
    expected = alpha * before + (1 - alpha) * vector(student)
    assert torch.allclose(vector(teacher), expected, atol=1e-6)
    assert torch.allclose(teacher.down[0][2].running_mean, 0.09 * one + 0.1 * other, atol=1e-5)
    assert not torch.allclose(*(x.down[0][2].running_mean for x in (student, teacher)), atol=1e-5)

@pytest.mark.parametrize("asleep", ["student", "teacher", "both", "supervised"])
def test_a_network_in_eval_mode_is_refused(asleep):
    student, teacher, optimizer = networks()
    before = vector(student)
    student.train(asleep == "teacher")
    teacher.train(asleep == "student")
    with pytest.raises(ValueError, match=r"train mode.*\.train\(\)"):
        mt.train_step(student, None if asleep == "supervised" else teacher, optimizer, *batch(), 0)
    assert torch.equal(vector(student), before)

# A second implementation of the mean teacher, on purpose a naive one: NumPy in float64, loops over
# samples and pixels, written from the paper's equations: warp, losses and their derivatives, Adam,
# the average. Only the network's own passes are torch's, which differentiates sum(gradient * z).

def naive_step(student, teacher, moments, images, masks, unlabelled, step, weight, alpha, lr,
               decay, degrees, noise):
    """Algorithm 1 for one batch; the random draws in the order of train_step. -> three losses."""
    parts, angles, one, other = [images, unlabelled], [], [], []
    for part in parts:
        angles.append(torch.empty(len(part)).uniform_(-degrees, degrees))
        for _ in range(3):                               # scale and translations are 0, but drawn
            torch.empty(len(part)).uniform_()
        one.append(torch.randn_like(part))
        other.append(torch.randn_like(part))
    angles = np.radians(torch.cat(angles).numpy())
    one, other = torch.cat(one).numpy(), torch.cat(other).numpy()
    phi = [np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0]]) for a in angles]
    x, n = torch.cat(parts).numpy().astype(float), len(phi)
    shown = np.stack([naive_warp(x[b, 0], phi[b]) + noise * one[b, 0] for b in range(n)])
    y = [naive_warp(masks[b, 0].numpy(), phi[b]) >= 0.5 for b in range(len(masks))]

    def passes(network, x):                              # labelled and unlabelled apart
        halves = x[:len(masks)], x[len(masks):]
        return torch.cat([network(torch.from_numpy(half).float()) for half in halves])[:, 0]

    with torch.no_grad():
        guess = passes(teacher, x + noise * other).double().numpy()
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
        mean.data = mean * remember + (1 - remember) * theta.data
    return dice + weight * bce, dice, bce

def test_twenty_steps_of_a_second_naive_implementation_give_the_same_losses():
    # A smooth network with BatchNorm: at the kink of a ReLU or a maximum, rounding errors grow.
    lr, weight, alpha, decay, degrees, noise = 0.01, 2.9, 0.95, 2e-3, 12.0, 0.1
    slices, curves, moments = batch(2, 3), ([], []), {}
    torch.manual_seed(4)
    student = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.Tanh(),
                            nn.Conv2d(4, 1, 5, padding=2))
    teacher = mt.make_teacher(student)
    twins = copy.deepcopy(student), copy.deepcopy(teacher)
    optimizer = torch.optim.Adam(student.parameters(), lr=lr, weight_decay=decay, fused=True)
    torch.manual_seed(9)
    for step in range(20):
        losses = mt.train_step(student, teacher, optimizer, *slices, step, weight, alpha,
                               (degrees, 0.0, 0.0), noise)
        curves[0].append([losses[name].item() for name in ("loss", "dice_loss",
                                                              "consistency_loss")])
    torch.manual_seed(9)
    for step in range(20):
        curves[1].append(naive_step(*twins, moments, *slices, step, weight, alpha, lr, decay,
                                    degrees, noise))
    ours, naive = np.array(curves)
    assert np.abs(ours - naive).max() < 3e-6 and ours[-1, 1] < ours[0, 1] - 0.05     # it learns

class Recorder(nn.Conv2d):
    """A pointwise network that remembers its inputs."""

    def forward(self, x):
        self.seen = [*getattr(self, "seen", []), x.detach().clone()]
        return super().forward(x)

@pytest.mark.parametrize("augmentation, amp", [("delayed", 0), ("delayed", 1), ("same", 1)])
def test_what_student_and_teacher_are_shown(augmentation, amp):
    student, teacher, optimizer = networks(0.0, Recorder(3, 1, 1))
    x, masks = smooth_images(3, 3), torch.zeros(1, 1, 32, 32)
    options = step_options(augmentation=augmentation, degrees=20.0, translation=3.0, scale=0.1,
                           noise=0.0) | {"amp": bool(amp)}
    torch.manual_seed(3)
    mt.train_step(student, teacher, optimizer, x[:1], masks, x[1:], 0, **options)
    torch.manual_seed(3)
    phi = []
    for n in (1, 2):
        phi.append(mt.sample_affine(n, 20.0, translation=3.0, scale=0.1))
        for _ in range(2):                               # the noise of student and teacher
            torch.randn(n, 3, 32, 32)
    warped = mt.warp(x, torch.cat(phi))
    assert [len(x) for x in student.seen] == [len(x) for x in teacher.seen] == [1, 2]
    assert torch.allclose(torch.cat(student.seen), warped, atol=1e-6)
    expected = x if augmentation == "delayed" else warped
    assert torch.allclose(torch.cat(teacher.seen), expected, atol=1e-6)
    # Noise: of the given std, and another one for each network, slice and channel
    student, teacher, optimizer = networks(0.0, Recorder(3, 1, 1))
    zeros, options = torch.zeros(2, 3, 64, 64), {**options, "noise": 0.3, "affine": (0.0, 0, 0)}
    mt.train_step(student, teacher, optimizer, zeros, zeros[:, :1], zeros, 0, **options)
    seen = torch.cat([*student.seen, *teacher.seen]).flatten(0, 1).flatten(1)
    assert len(seen) == 24 and seen.std(1).tolist() == pytest.approx([0.3] * 24, rel=0.1)
    assert (torch.corrcoef(seen) - torch.eye(24)).abs().max() < 0.1

@pytest.mark.parametrize("semi", [False, True])
def test_one_batch_can_be_overfitted(semi):
    student, teacher, _ = networks(student=mt.UNet(8, 0.0))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    images, masks = torch.randn(4, 1, 32, 32), torch.zeros(2, 1, 32, 32)
    images[:, :, 12:20, 12:20] += 2.0
    masks[:, :, 12:20, 12:20] = 1.0
    for step in range(60):
        losses = mt.train_step(student, teacher if semi else None, optimizer, images[:2], masks,
                               images[2:], step, weight=0.5, alpha=0.9)
    assert losses["dice_loss"] < -0.85

# --- Data ----------------------------------------------------------------------------------------

SHAPE, GRID = (40, 36, 3), np.diag([0.5, 0.5, 5.0, 1.0])

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

def write_scan(seed, image, masks, **how):
    for path, array in zip([image, *masks], [cord(seed)[0], *[cord(seed)[1]] * len(masks)]):
        write_nifti(path, array, **how)

def write_scgm(folder, subjects=(1, 11), **how):
    for n in subjects:
        stem = f"{'training' if n <= 10 else 'test'}/site1-sc{n:02d}"
        write_scan(100 + n, folder / f"{stem}-image.nii.gz",
                   [folder / f"{stem}-mask-r{r}.nii.gz" for r in range(1, 5) if n <= 10], **how)

def write_bids(folder, subjects=("sub-a",), runs=(1,), **how):
    """The first run of each subject has a mask."""
    for (k, subject), run in itertools.product(enumerate(subjects, 101), runs):
        stem = f"{subject}/anat/{subject}_run-{run}_T2starw"
        write_scan(k, folder / f"{stem}.nii.gz",
                   [folder / f"derivatives/labels/{stem}_gmseg-manual.nii.gz"] * (run == 1), **how)

def write_decathlon(folder, cases=("case_1",), unlabelled=(), **how):
    for k, case in enumerate([*cases, *unlabelled], 101):
        part = "Tr" if case in cases else "Ts"
        write_scan(k, folder / f"images{part}/{case}.nii.gz",
                   [folder / f"labels{part}/{case}.nii.gz"], **how)

def fast(**changes):
    return dataclasses.replace(mt.Config(), **{"crop": 32, "spacing": 0.5, **changes})

@pytest.fixture
def scan(tmp_path):
    """A scan with one mask, for tests to overwrite."""
    write_bids(tmp_path / "study")
    return mt.find_scans(tmp_path / "study")[0]

def test_every_layout_and_orientation_gives_the_same_slices(tmp_path):
    mm, results = (0.4, 0.6, 3.0), []
    for axes, write in itertools.product(("RAS", "LAS", "LPS", "SRA"),
                                         (write_scgm, write_bids, write_decathlon)):
        folder = tmp_path / f"{axes}-{write.__name__}"
        write(folder, mm=mm, axes=axes)
        one = next(s for s in mt.find_scans(folder) if s.masks)
        results.append(mt.read_scan(one, fast(), True))
    for part in results:
        assert len(part.images) == 3 and torch.equal(part.images, results[0].images)
        assert torch.equal(part.masks, results[0].masks)
    # By hand: 40 x 0.4 mm = 16 mm across, 36 x 0.6 = 21.6 mm in front: 32 x 43 px of 0.5 mm.
    image = mt.load_nifti(one.image, 0.5)
    assert mt.to_slices(*mt.canonical(image), fast(crop=48)).shape == (3, 1, 43, 32)

def test_the_decathlons_layout(tmp_path):
    write_decathlon(tmp_path, ("case_0001", "case_0002"), ("case_0003",))         # labelsTs, too
    for name in ("imagesTr/.case_0004", "imagesTs/._case_0003", "labelsTr/.case_0001"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"another system's file")
    (tmp_path / "labelsTr/case_0002.nii.gz").unlink()
    one, *others = mt.find_scans(tmp_path)
    assert one.masks == {mt.ANY: tmp_path / "labelsTr/case_0001.nii.gz"}
    assert [(s.name, s.individual, s.site, s.masks) for s in others] == [
        (name, name, "", {}) for name in ("case_0002", "case_0003")]
    assert [s.image.parent.name for s in (one, *others)] == ["imagesTr"] * 2 + ["imagesTs"]

@pytest.mark.parametrize("label", [(1,), (2,), (1, 2)])
def test_label_says_which_values_are_foreground(scan, label):
    mask = cord(1)[1]
    mask[0, 0, 0] = 255                                  # any other whole number: background
    write_nifti(scan.masks[mt.ANY], mask)
    found = mt.read_mask(scan, fast(label=label), mt.load_nifti(scan.image, 0.5))
    assert np.array_equal(found.get_fdata(), np.isin(mask, label))
    config = mt.parse(["--label", *map(str, label), "--crop", "40", "--spacing", "0.5"])[0]
    assert mt.read_scan(scan, config, True).masks.sum() == np.isin(mask, label).sum()

def test_slices_run_from_the_front_and_the_left_and_are_resampled_with_their_mean(tmp_path):
    volume = np.zeros((8, 6, 2), np.float32)
    volume[7, 5, 1] = 1.0                                # rightmost, most anterior, upper slice
    write_nifti(tmp_path / "v.nii.gz", volume, mm=(1, 1, 1), axes="LPI")
    array, mm = mt.canonical(mt.load_nifti(tmp_path / "v.nii.gz", 1.0))
    slices = mt.to_slices(array, mm, fast(spacing=1.0))
    assert np.allclose(mm, 1) and slices[1, 0, 0, 7] == 1 == slices.sum()
    ramp = np.linspace(0, 1, 40, dtype=np.float32)[:, None, None].repeat(40, 1)
    half, centres = mt.to_slices(ramp, (0.25, 0.25, 5), fast())[0, 0], (ramp[::2] + ramp[1::2]) / 2
    assert half.shape == (20, 20) and np.allclose(half[0, 1:-1], centres[1:-1, 0, 0], atol=1e-5)
    noise = np.random.default_rng(0).normal(size=(64, 64, 1)).astype(np.float32)
    small_noise = mt.to_slices(noise, (0.25, 0.25, 5.0), fast(spacing=1.0))
    assert small_noise.shape == (1, 1, 16, 16) and small_noise.std() < 0.4       # near 1/4

def test_crop_keeps_the_centre_pads_what_is_small_and_slices_are_z_scored_one_by_one():
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(mt.center_crop(x, 2, 2)[0, 0], x[0, 0, 2:4, 2:4])
    padded = mt.center_crop(x, 8, 8)
    assert torch.equal(padded[0, 0, 1:7, 1:7], x[0, 0]) and padded.sum() == x.sum()
    z = mt.normalise(torch.stack([torch.randn(1, 9, 9) * 5 + 100, torch.randn(1, 9, 9) * 0.1]))
    std = z.std((2, 3), correction=0)                    # of a population, as NumPy's
    assert z.mean((2, 3)).abs().max() < 1e-5 and (std - 1).abs().max() < 1e-5

def turned(angle, *shift):
    """An affine in the world: a rotation about its origin, and a shift in mm."""
    affine = np.eye(4)
    affine[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    affine[:3, 3] = shift or 0
    return affine

ALL, GRID_ERROR, ERROR = np.ones((300, 300, 2), np.float32), "not on the grid", "values .*whole"

@pytest.mark.parametrize("mask, change, error", [
    *[(ALL, turned(0, *np.eye(3)[axis] * GRID[axis, axis] * voxels),
       GRID_ERROR if abs(voxels) > 0.25 else None)
      for voxels in (0.2, -0.249, 0.249, -0.251, 0.251, 0.3) for axis in range(3)],
    # The last of 300 voxels is off by 300 times the angle, or the scale, the first by nothing.
    (ALL, turned(4e-4), None), (ALL, turned(8e-4), None), (ALL, turned(9e-4), GRID_ERROR),
    (ALL, np.diag([1.0008, 1, 1, 1]), None), (ALL, np.diag([1.0009, 1, 1, 1]), GRID_ERROR),
    (ALL[1:], np.eye(4), GRID_ERROR), (ALL[..., :1], np.eye(4), GRID_ERROR),
    *[(np.where(np.arange(2) == 1, ALL, value), np.eye(4), error) for value, error in (
        (0, None), (2, None), (255, None), (256, ERROR), (-1, ERROR), (0.5, ERROR))]])
def test_a_mask_is_off_by_a_quarter_of_a_voxel_at_most_and_of_numbers(scan, mask, change, error):
    nib.save(nib.Nifti1Image(mask, change @ GRID), scan.masks[mt.ANY])
    image = nib.Nifti1Image(ALL, GRID)
    if error:
        with pytest.raises(mt.InputError, match=f"gmseg.*{error}"):
            mt.read_mask(scan, fast(), image)
    else:
        assert mt.read_mask(scan, fast(), image).get_fdata().sum() == (mask == 1).sum()

def test_empty_slices_are_dropped_as_the_paper_counts_them(scan):
    volume, mask = cord(1)
    volume[:, :, 0], mask[:, :, 1] = 0, 0                # no image; no grey matter
    write_nifti(scan.image, volume)
    write_nifti(scan.masks[mt.ANY], mask)
    assert [w[2] for w in mt.read_scan(scan, fast(), True).where] == [2]
    assert [w[2] for w in mt.read_scan(scan, fast(), False).where] == [1, 2]

def test_foreground_outside_the_crop_is_reported_until_the_crop_is_raised(scan, capsys):
    mask = np.zeros(SHAPE, np.uint8)
    mask[18:22, 16:20] = mask[0:2, 16:20] = 1            # 8 of 24 columns of it far on the left
    write_nifti(scan.masks[mt.ANY], mask)
    mt.read_scan(scan, fast(crop=16), True)
    warning = capsys.readouterr().out
    assert "warning" in warning and "33%" in warning and "sub-a_run-1" in warning
    assert "raise --crop" in warning and warning.count("\n") == 1
    mt.read_scan(scan, fast(crop=40), True)
    assert capsys.readouterr().out == ""

def split(config):
    return mt.split_scans(mt.find_scans(config.data), config)

def test_the_paper_split_has_no_subject_twice(phantom):
    sets = split(small(phantom))
    names = {key: [scan.subject for scan in part] for key, part in sets.items()}
    everyone = sum(names.values(), [])
    assert len(everyone) == len(set(everyone)) == 68     # 12 labelled subjects stay unused
    for key, count in (("train", 2), ("val", 2), ("test", 3), ("unlabelled", 10)):
        assert sorted(n.split("-")[0] for n in names[key]) == sorted(
            [f"site{s}" for s in range(1, 5)] * count)
    assert all(int(name[-2:]) > 10 for name in names["unlabelled"])
    assert sets == split(small(phantom, seed=7)) != split(small(phantom, split_seed=1))
    for train in (1, 4, 5):                              # only the training subjects change
        other = split(small(phantom, split=(train, 2, 3)))
        assert len(other["train"]) == 4 * train
        assert all(other[key] == sets[key] for key in ("val", "test", "unlabelled"))

SUBJECTS = ("sub-aSes1", "sub-aSes2", "sub-b", "sub-c", "sub-d")

@pytest.mark.parametrize("unlabelled, expected", [
    # Other scans of the training subject are unlabelled, those of test and validation unused.
    ((), ["sub-aSes1_run-2", *[f"sub-{x}_run-{k}" for x in ("aSes2", "d") for k in (1, 2)]]),
    (("sub-d",), ["sub-d_run-1", "sub-d_run-2"]),
    (("sub-b", "sub-c"), ["sub-b_run-2", "sub-c_run-2"]),        # rescans, never the test scan
    (("sub-aSes1",), ["sub-aSes1_run-2"])])
def test_subjects_by_name_and_their_further_scans(tmp_path, unlabelled, expected):
    write_bids(tmp_path, SUBJECTS, runs=(1, 2))
    sets = split(small(tmp_path, train=("sub-aSes1",), val=("sub-c",), test=("sub-b",),
                       unlabelled=unlabelled))
    assert [[scan.name for scan in part] for part in sets.values()] == [
        ["sub-aSes1_run-1"], ["sub-c_run-1"], ["sub-b_run-1"], expected]

def test_unlabelled_subjects_by_name_beside_a_split(tmp_path):
    write_bids(tmp_path, SUBJECTS, runs=(1, 2))
    *sets, free = split(small(tmp_path, split=(1, 1, 1))).values()
    *again, named = split(small(tmp_path, split=(1, 1, 1), unlabelled=SUBJECTS)).values()
    assert sets == again and all(len({scan.individual for scan in part}) == 1 for part in sets)
    held_out = {scan.individual for part in sets[1:] for scan in part}
    assert free and not [scan for scan in free if scan.masks or scan.individual in held_out]
    everything = mt.find_scans(tmp_path)                 # named: all, but what is used elsewhere
    assert named == [scan for scan in everything if scan not in sum(sets, [])]

@pytest.mark.parametrize("changes, message", [
    (dict(train=("sub-aSes1",), test=("sub-aSes2",)), "sub-a is in --train and in --test"),
    (dict(train=("sub-b",), test=("sub-c",), val=("sub-c",)), "sub-c is in --val and in --test"),
    (dict(train=("sub-b",), test=("sub-x",)), "--test: no subject sub-x with a mask"),
    (dict(train=("sub-b",)), "--train and --test must both be given"),
    (dict(train=("sub-b",), test=("sub-c",), unlabelled=("sub-z",)), "--unlabelled: no.* sub-z"),
    (dict(split=(1, 0, 1), unlabelled=("sub-z",)), "--unlabelled: no subject sub-z"),
    (dict(), r"4 subjects with masks in /.*, too few for --split \(2, 2, 3\)")])
def test_splits_that_cannot_be(tmp_path, changes, message):
    write_bids(tmp_path, SUBJECTS)
    with pytest.raises(mt.InputError, match=message):
        split(small(tmp_path, **changes))

def test_a_site_may_have_unlabelled_scans_only(tmp_path):
    write_scgm(tmp_path, subjects=(1, 2, 11))
    shutil.copy(tmp_path / "test/site1-sc11-image.nii.gz", tmp_path / "site2-sc11-image.nii.gz")
    sets = split(small(tmp_path, split=(1, 0, 1)))
    assert [len(part) for part in sets.values()] == [1, 0, 1, 2]
    assert {scan.site for scan in sets["unlabelled"]} == {"site1", "site2"}

@pytest.mark.parametrize("layout, masks, how", [
    ("bids", "*sub-[ad]*run-1*gmseg*", {}), ("bids", "*sub-d*gmseg*", {"unlabelled": ("sub-d",)}),
    ("scgm", "*sc11-mask*", {}), ("decathlon", "labels*/c.nii.gz", {})])
def test_masks_of_unlabelled_subjects_are_never_read(tmp_path, layout, masks, how):
    config = small(tmp_path, split=(1, 0, 1))
    if layout == "bids":
        write_bids(tmp_path, SUBJECTS, runs=(1, 2))
        config = small(tmp_path, train=("sub-b",), test=("sub-c",), **how)
    elif layout == "scgm":
        write_scgm(tmp_path, subjects=(1, 2, 11))
        write_nifti(tmp_path / "test/site1-sc11-mask-r4.nii.gz", cord(1)[1])
    else:
        write_decathlon(tmp_path, ("a", "b"), ("c",))
        shutil.copy(tmp_path / "labelsTs/c.nii.gz", tmp_path / "labelsTr")
    before, paths = mt.load_data(config), list(tmp_path.rglob(masks))
    for path in paths:
        path.write_bytes(b"not a NIfTI")
    after = mt.load_data(config)
    assert paths and len(after["unlabelled"].images) > 0
    for key, old in before.items():
        assert old.where == after[key].where
        assert all(map(torch.equal, old[:2], after[key][:2]))

# --- Data, from the files to the slices ----------------------------------------------------------

def bids_scan(folder, volume, mask=None, **how):
    """Write one scan in BIDS' layout. -> its Scan"""
    write_nifti(folder / "sub-a/anat/sub-a_T2starw.nii.gz", volume.astype(np.float32), **how)
    if mask is not None:
        path = folder / "derivatives/labels/sub-a/anat/sub-a_T2starw_gmseg.nii.gz"
        write_nifti(path, mask.astype(np.uint8), **how)
    return mt.find_scans(folder)[0]

def test_z_scores_are_of_each_slices_crop_alone(tmp_path):
    volume = np.random.default_rng(0).normal(100, 10, (48, 44, 3))
    other = volume.copy()
    other[:4] = other[-4:] = 5000.0                      # outside the crop
    other[:, :, 1] = 3 * other[:, :, 1] + 700            # a scale of its own for one slice
    slices = [mt.read_scan(bids_scan(tmp_path / name, values), fast(), False).images
              for name, values in (("one", volume), ("two", other))]
    assert torch.allclose(*slices, atol=1e-4)
    assert slices[0].shape == (3, 1, 32, 32)
    assert slices[0].mean((2, 3)).abs().max() < 1e-5
    assert (slices[0].std((2, 3)) - 1).abs().max() < 1e-3

@pytest.mark.parametrize("scale, offset", [
    (1, 0), (1e-7, 0), (1e5, 0), (1, 3000), (1, -30000)])
def test_z_scores_count_the_pixels_that_exist_whatever_the_scale(tmp_path, scale, offset):
    volume = np.random.default_rng(0).normal(100, 10, (20, 48, 2)) * scale + offset
    images = mt.read_scan(bids_scan(tmp_path, volume), fast(), False).images
    inside = images[:, :, :, 6:26]                       # 20 columns; 6 of padding on either side
    assert images.shape == (2, 1, 32, 32)
    assert inside.mean((2, 3)).abs().max() < 1e-4
    assert (inside.std((2, 3), unbiased=False) - 1).abs().max() < 1e-4
    assert images.abs().sum() == inside.abs().sum()      # the padding is 0

@pytest.mark.parametrize("value", [0.0, 7.3, -1000.1])
def test_a_slice_without_contrast_is_dropped(tmp_path, value):
    volume = np.random.default_rng(0).normal(100, 10, (32, 32, 3))
    volume[:, :, 1] = value
    scan = bids_scan(tmp_path, volume, np.ones(volume.shape))
    for labelled in (True, False):
        slices = mt.read_scan(scan, fast(), labelled)
        assert [place[2] for place in slices.where] == [0, 2]
        assert len(slices.images) == 2 and torch.isfinite(slices.images).all()

@pytest.mark.parametrize("axes", ["RAS", "LPI", "ASL"])
def test_a_bright_block_lies_where_it_was_and_has_its_mm2_on_another_grid(tmp_path, axes):
    # 20 mm x 36 mm in voxels of 0.25 x 0.75 mm. In mm from the left and the back corner, the
    # block reaches from 2 to 6 and from 15 to 19.5: 18 mm2. A crop of 48 voxels, before they are
    # resampled, would cut off half of it.
    volume = np.full((80, 48, 2), 20.0)
    mask = np.zeros(volume.shape)
    volume[8:24, 20:26, 1] = 200.0
    mask[8:24, 20:26, 1] = 1
    volume[0, 0, 0] = 21.0                               # some contrast in the other slice
    scan = bids_scan(tmp_path, volume, mask, mm=(0.25, 0.75, 4.0), axes=axes)
    slices = mt.read_scan(scan, fast(crop=48), True)
    # 40 columns of 0.5 mm in a crop of 48, padded by 4 on either side; 72 rows, counted from the
    # front, of which the first 12 are cut.
    columns = slice(4 + 4, 4 + 12)
    rows = slice(33 - 12, 42 - 12)
    expected = torch.zeros(48, 48)
    expected[rows, columns] = 1
    assert slices.where == [("", "sub-a", 1)]
    assert torch.equal(slices.masks[0, 0], expected)
    assert slices.masks.sum() * 0.5 ** 2 == 18
    middle = (slices.images.max() + slices.images.min()) / 2
    assert torch.equal((slices.images[0, 0] > middle).float(), expected)

@pytest.mark.parametrize("spacing", [0.5, 0.25])
def test_image_and_mask_are_aligned_to_the_pixel_with_empty_slices_in_between(tmp_path, spacing):
    volume = np.random.default_rng(0).normal(100, 1, (32, 32, 6))
    mask = np.zeros(volume.shape)
    for z in range(6):
        volume[4 + 3 * z:8 + 3 * z, 20 - 2 * z:23 - 2 * z, z] = 200.0
        mask[4 + 3 * z:8 + 3 * z, 20 - 2 * z:23 - 2 * z, z] = 1
    mask[:, :, 1] = 0                                    # no grey matter here
    volume[:, :, 3] = 0                                  # and here no image
    factor = round(0.5 / spacing)
    scan = bids_scan(tmp_path, volume, mask, axes="LPS")
    slices = mt.read_scan(scan, fast(crop=32 * factor, spacing=spacing), True)
    assert slices.where == [("", "sub-a", z) for z in (0, 2, 4, 5)]
    for image, found, (_, _, z) in zip(*slices, strict=True):
        expected = torch.from_numpy(mask[:, ::-1, z].T.copy()).float()
        expected = expected.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        assert torch.equal(found[0], expected)
        assert torch.equal((image[0] > image.max() / 2).float(), expected)

def test_slices_are_resampled_linearly_between_the_centres_of_voxels(tmp_path):
    # From 0.5 to 0.2 mm: each pixel's centre lies between those of two voxels.
    across, down = np.random.default_rng(0).normal(100, 10, (2, 30))
    volume = (across[:, None] * down[None, ::-1])[:, :, None]            # rows from the front
    image = mt.read_scan(bids_scan(tmp_path, volume), fast(spacing=0.2, crop=48), False).images[0]
    pixels = (np.arange(75) + 0.5) * 0.2                 # mm from the border
    voxels = (np.arange(30) + 0.5) * 0.5
    rows, columns = np.interp(pixels, voxels, down), np.interp(pixels, voxels, across)
    expected = (rows[:, None] * columns[None, :])[13:61, 13:61]          # 27 of 75 are cut
    assert correlation(image[0], expected) > 0.9999

def test_shrinking_averages_over_the_voxels_that_make_a_pixel(tmp_path):
    volume = np.random.default_rng(0).normal(100, 10, (128, 128, 1))
    scan = bids_scan(tmp_path, volume, mm=(0.25, 0.25, 5.0))
    image = mt.read_scan(scan, fast(spacing=1.0), False).images[0]
    means = volume[:, ::-1, 0].T.reshape(32, 4, 32, 4).mean((1, 3))
    assert correlation(image[0], means) > 0.8            # 0.5 for the nearest voxels alone

def test_slices_are_named_by_their_run(tmp_path):
    for k, (subject, number) in enumerate(itertools.product(("sub-a", "sub-b"), (1, 2))):
        stem = f"{subject}/anat/{subject}_run-{number}_T2starw"
        write_scan(k, tmp_path / f"{stem}.nii.gz",
                   [tmp_path / f"derivatives/labels/{stem}_gmseg.nii.gz"])
    config = small(tmp_path, train=("sub-a",), test=("sub-b",))
    data = mt.load_data(config)
    for name, subject in (("train", "sub-a"), ("test", "sub-b")):
        assert data[name].where == [("", f"{subject}_run-{number}", z)
                                    for number in (1, 2) for z in range(3)]

def test_a_folder_that_is_named_like_a_scan_is_none(tmp_path):
    write_bids(tmp_path)
    (tmp_path / "sub-a/anat/sub-a_run-2_T2starw.nii.gz").mkdir()
    assert [scan.name for scan in mt.find_scans(tmp_path)] == ["sub-a_run-1"]

def test_bids_sessions_are_scans_of_one_subject_with_masks_of_their_own(tmp_path):
    for k, (subject, session) in enumerate(itertools.product(("sub-01", "sub-02"), (1, 2))):
        stem = f"{subject}/ses-{session}/anat/{subject}_ses-{session}_T2starw"
        masks = [tmp_path / f"derivatives/labels/{stem}_gmseg.nii.gz"]
        write_scan(k, tmp_path / f"{stem}.nii.gz", masks if (subject, session) != ("sub-02", 1)
                   else [])
    scans = mt.find_scans(tmp_path)
    names = [(scan.subject, scan.name, len(scan.masks)) for scan in scans]
    assert names == [("sub-01", "sub-01_ses-1", 1), ("sub-01", "sub-01_ses-2", 1),
                     ("sub-02", "sub-02_ses-1", 0), ("sub-02", "sub-02_ses-2", 1)]
    for scan in scans:
        for mask in scan.masks.values():                 # of the same session
            assert mask.name == scan.image.name.replace(".nii", "_gmseg.nii")
            assert mask.parent.parent.name == scan.image.parent.parent.name
    sets = split(small(tmp_path, split=(1, 0, 1)))
    assert {len({scan.subject for scan in sets[name]}) for name in ("train", "test")} == {1}
    assert sets["train"][0].subject != sets["test"][0].subject

def test_of_two_masks_the_first_by_name_is_read(tmp_path):
    volume, mask = cord(1)
    scan = bids_scan(tmp_path, volume)
    folder = tmp_path / "derivatives/labels/sub-a/anat"
    other = np.zeros_like(mask)
    other[18:21, 18:20] = 1
    write_nifti(folder / "sub-a_T2starw_gmseg-rater2.nii.gz", other)
    write_nifti(folder / "sub-a_T2starw_gmseg-rater1.nii.gz", mask)
    scan, = mt.find_scans(tmp_path)
    assert [path.name for path in scan.masks.values()] == ["sub-a_T2starw_gmseg-rater1.nii.gz"]
    assert mt.read_scan(scan, fast(), True).masks.sum() == (mask == 1).sum()

def test_each_set_holds_the_slices_of_its_own_scans(tmp_path):
    write_scgm(tmp_path, subjects=(1, 2, 3, 4, 11, 12))
    config = small(tmp_path, split=(1, 1, 2), spacing=0.5)
    data = mt.load_data(config)
    for name, scans in split(config).items():
        parts = [mt.read_scan(scan, config, name != "unlabelled") for scan in scans]
        assert len(parts) == {"train": 1, "val": 1, "test": 2, "unlabelled": 2}[name]
        assert torch.equal(data[name].images, torch.cat([part.images for part in parts]))
        assert data[name].where == sum([part.where for part in parts], [])
        assert {place[0] for place in data[name].where} == {"site1"}
        if name != "unlabelled":
            assert torch.equal(data[name].masks, torch.cat([part.masks for part in parts]))

def test_the_chosen_rater_is_the_one_that_is_read(tmp_path):
    write_scgm(tmp_path, subjects=(1,))
    scan, = mt.find_scans(tmp_path)
    for rater in "1234":
        mask = np.zeros(SHAPE, np.uint8)
        mask[18:22, 14:14 + int(rater)] = 1
        write_nifti(scan.masks[rater], mask)
    for rater in "1234":
        found = mt.read_scan(scan, fast(rater=rater), True).masks
        assert found.sum() == 3 * 4 * int(rater)
    assert torch.equal(mt.read_scan(scan, fast(), True).masks, found)    # 4 is the default

# --- Data, faults of real inputs -----------------------------------------------------------------

LAYOUTS = {"scgm": write_scgm, "bids": write_bids, "decathlon": write_decathlon}

def labelled_scan(folder):
    """The first scan with a mask."""
    return next(scan for scan in mt.find_scans(folder) if scan.masks)

def mask_path(scan):
    """The mask that the default settings read."""
    return scan.masks.get(mt.ANY) or scan.masks["4"]

def same_slices(one, other):
    return (torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
            and one.where == other.where)

@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_files_are_neither_scans_nor_masks(tmp_path, layout):
    LAYOUTS[layout](tmp_path)
    before = mt.find_scans(tmp_path)
    for path in list(tmp_path.rglob("*.nii.gz")):
        (path.parent / f"._{path.name}").write_bytes(b"of another system")
        (path.parent / f".{path.name}").write_bytes(b"unfinished")
    assert len(before) > 0 and mt.find_scans(tmp_path) == before

@pytest.mark.parametrize("name", [
    "sub-a_run-1_T2starw_seg", "sub-a_run-1_T2starw_gmseg", "sub-a_run-1_T2starw_gm_seg",
    "sub-a_run-1_label-GM_T2starw", "sub-a_run-1_desc-denoised_T2starw",
    "sub-a_run-1_space-T1w_T2starw", "sub-a_run-1_part-phase_T2starw",
    "sub-a_run-1_part-real_T2starw", "sub-a_run-1_part-imag_T2starw", "sub-a_T2starw_mean",
    "sub-a_run-1_T1w", "sub-a_T2starwz"])
def test_what_lies_beside_a_bids_image_is_not_a_scan(tmp_path, name):
    write_bids(tmp_path)
    write_nifti(tmp_path / f"sub-a/anat/{name}.nii.gz", cord(2)[0])
    assert [scan.name for scan in mt.find_scans(tmp_path)] == ["sub-a_run-1"]

@pytest.mark.parametrize("name", ["part-mag", "acq-sag", "rec-norm"])
def test_magnitude_images_are_scans_whatever_else_their_name_says(tmp_path, name):
    write_nifti(tmp_path / f"sub-a/anat/sub-a_{name}_T2star.nii.gz", cord(2)[0])
    assert [scan.name for scan in mt.find_scans(tmp_path)] == [f"sub-a_{name}"]

@pytest.mark.parametrize("name", [
    "gmseg", "gmseg-manual", "label-GM_seg", "label-GM_desc-manual_mask1", "label-GM_mask"])
def test_a_bids_mask_is_found_under_old_and_new_names_and_not_that_of_the_cord(tmp_path, name):
    write_nifti(tmp_path / "sub-a/anat/sub-a_T2star.nii.gz", cord(1)[0])
    labels = tmp_path / "derivatives/labels/sub-a/anat"
    write_nifti(labels / "sub-a_T2star_label-SC_seg.nii.gz", cord(1)[1])
    write_nifti(labels / f"sub-a_T2star_{name}.nii.gz", cord(1)[1])
    scan, = mt.find_scans(tmp_path)
    assert [path.name for path in scan.masks.values()] == [f"sub-a_T2star_{name}.nii.gz"]

def test_masks_under_another_name_are_reported_once_with_the_names_looked_for(tmp_path, capsys):
    for subject in ("sub-a", "sub-b"):
        stem = f"{subject}/anat/{subject}_T2star"
        write_nifti(tmp_path / f"{stem}.nii.gz", cord(1)[0])
        write_nifti(tmp_path / f"derivatives/labels/{stem}_greymatter.nii.gz", cord(1)[1])
    assert [scan.masks for scan in mt.find_scans(tmp_path)] == [{}, {}]
    said = capsys.readouterr().out
    assert said.startswith("warning: 2 scans") and said.count("\n") == 1
    for word in ("sub-a", "gmseg", "label-GM", "--mask-name"):
        assert word in said

def test_masks_of_the_decathlon_without_an_image_are_reported(tmp_path, capsys):
    write_decathlon(tmp_path, ("a", "b"))
    (tmp_path / "labelsTr/b.nii.gz").rename(tmp_path / "labelsTr/b_seg.nii.gz")
    assert [len(scan.masks) for scan in mt.find_scans(tmp_path)] == [1, 0]
    said = capsys.readouterr().out
    assert said.startswith("warning: 1 masks") and "b_seg.nii.gz" in said

def test_a_scgm_subject_of_the_training_half_without_a_mask_is_reported(tmp_path, capsys):
    write_scgm(tmp_path, subjects=(1, 2, 11))
    for path in tmp_path.rglob("site1-sc02-mask*"):
        path.unlink()
    assert [len(scan.masks) for scan in mt.find_scans(tmp_path)] == [0, 4, 0]
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "site1-sc02-image" in said and "sc11" not in said

@pytest.mark.parametrize("layout, part", [
    ("scgm", "training"), ("bids", "sub-a"), ("bids", "sub-a/anat"),
    ("bids", "derivatives/labels"), ("decathlon", "imagesTr"), ("decathlon", "labelsTr")])
def test_scans_and_masks_behind_linked_folders_are_found(tmp_path, layout, part):
    LAYOUTS[layout](tmp_path / "study")
    before = [scan.name for scan in mt.find_scans(tmp_path / "study") if scan.masks]
    (tmp_path / "study" / part).rename(tmp_path / "store")
    (tmp_path / "study" / part).symlink_to(tmp_path / "store")
    after = [scan.name for scan in mt.find_scans(tmp_path / "study") if scan.masks]
    assert len(before) == 1 and after == before

@pytest.mark.parametrize("kind", ["image", "mask"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_link_is_reported_by_name_and_not_passed_over(tmp_path, layout, kind):
    LAYOUTS[layout](tmp_path)
    scan = labelled_scan(tmp_path)
    path = scan.image if kind == "image" else mask_path(scan)
    path.unlink()
    path.symlink_to("../.git/annex/objects/x/y.nii.gz")
    with pytest.raises(mt.InputError, match=f"{path.name}: cannot be read"):
        mt.read_scan(labelled_scan(tmp_path), fast(), True)

@pytest.mark.parametrize("contrasts, mask_names, expected", [
    (["T1w"], ["label-hippocampus"], {"sub-a": "sub-a_T1w_label-hippocampus_mask.nii.gz"}),
    (["T1w"], ["dseg"], {"sub-a": "sub-a_T1w_dseg.nii.gz"}),
    (["T1w"], ["label-hippo"], {"sub-a": "sub-a_T1w_label-hippocampus_mask.nii.gz"}),
    (["T1w"], ["gmseg"], {"sub-a": None}),
    (["FLAIR", "T1w"], ["dseg"], {"sub-b": None, "sub-a": "sub-a_T1w_dseg.nii.gz"}),
    (["T1w"], ["dseg", "label-hippo"], {"sub-a": "sub-a_T1w_dseg.nii.gz"})])
def test_contrast_and_mask_name_choose_images_and_masks(
        tmp_path, contrasts, mask_names, expected):
    for stem in ("sub-a/anat/sub-a_T1w", "sub-b/anat/sub-b_FLAIR"):
        write_nifti(tmp_path / f"{stem}.nii.gz", cord(1)[0])
    labels = tmp_path / "derivatives/labels/sub-a/anat"
    for name in ("sub-a_T1w_label-hippocampus_mask", "sub-a_T1w_dseg", "sub-a_T2w_dseg"):
        write_nifti(labels / f"{name}.nii.gz", cord(1)[1])
    found = {}
    for scan in mt.find_scans(tmp_path, contrasts, mask_names):
        found[scan.name] = scan.masks[mt.ANY].name if scan.masks else None
    assert found == expected

def test_two_contrasts_of_one_subject_are_two_scans_with_names_and_masks_of_their_own(tmp_path):
    for contrast in ("T1w", "T2w"):
        stem = f"sub-a/anat/sub-a_{contrast}"
        write_scan(1, tmp_path / f"{stem}.nii.gz",
                   [tmp_path / f"derivatives/labels/{stem}_dseg.nii.gz"])
    one, other = mt.find_scans(tmp_path, ["T1w", "T2w"], ["dseg"])
    assert one.name != other.name and one.subject == other.subject == "sub-a"
    for scan, contrast in ((one, "T1w"), (other, "T2w")):
        assert scan.image.name == f"sub-a_{contrast}.nii.gz"
        assert scan.masks[mt.ANY].name == f"sub-a_{contrast}_dseg.nii.gz"

def test_another_contrast_and_organ_are_read_through_the_options(tmp_path):
    for k, subject in enumerate(("sub-a", "sub-b")):
        stem = f"{subject}/anat/{subject}_T1w"
        mask = tmp_path / f"derivatives/labels/{stem}_label-tumour_mask.nii.gz"
        write_scan(k, tmp_path / f"{stem}.nii.gz", [mask])
    options = ["--data", str(tmp_path), "--preset", "demo", "--split", "1", "0", "1"]
    with pytest.raises(mt.InputError, match=r"no scans found.*T2star or T2starw.*--contrast"):
        mt.load_data(mt.parse(options)[0])
    options += ["--contrast", "T1w", "--mask-name", "label-tumour"]
    data = mt.load_data(mt.parse(options)[0])
    assert [len(data[name].masks) for name in ("train", "val", "test")] == [3, 0, 3]

@pytest.mark.parametrize("of", ["image", "mask"])
@pytest.mark.parametrize("dtype", [
    np.complex64, np.complex128, [("R", "u1"), ("G", "u1"), ("B", "u1")],
    [("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")]])
def test_voxels_that_are_not_real_numbers_are_refused_with_that_reason(scan, dtype, of):
    path = scan.image if of == "image" else scan.masks[mt.ANY]
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, dtype), GRID), path)
    with pytest.raises(mt.InputError, match=rf"{path.name}: .* voxels, expected one real num"):
        mt.read_scan(scan, fast(), True)

@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float64])
def test_real_voxels_of_any_type_give_the_same_slices(scan, dtype):
    volume = np.rint(cord(1)[0])
    slices = []
    for kind in (np.float32, dtype):
        nib.save(nib.Nifti1Image(volume.astype(kind), GRID), scan.image)
        slices.append(mt.read_scan(scan, fast(), True))
    assert same_slices(*slices) and len(slices[0].images) == 3

@pytest.mark.parametrize("dtype, highest", [
    (np.uint8, 2), (np.uint8, 3), (np.uint8, 7), (np.int16, 4), (np.uint16, 7), (np.int16, 255)])
def test_a_mask_moved_off_whole_numbers_by_its_storage_is_rounded(scan, dtype, highest):
    mask = cord(1)[1].astype(dtype)
    mask[:4, 0] = highest                                # the highest value sets the scale
    slices = []
    for stored in (mask, mask.astype(float)):
        header = nib.Nifti1Image(mask, GRID).header
        nib.save(nib.Nifti1Image(stored, GRID, header), scan.masks[mt.ANY])
        slices.append(mt.read_scan(scan, fast(label=(1, 2)), True))
    assert same_slices(*slices)
    values = nib.load(scan.masks[mt.ANY]).get_fdata()
    assert (values != np.rint(values)).any()             # the scale did move them

@pytest.mark.parametrize("value", [0.012, 0.988, 1.012, 1.988, 254.99])
def test_a_mask_within_002_of_whole_numbers_is_read_as_these(scan, value):
    mask = np.where(cord(1)[1] == 1, value, 0).astype(np.float32)
    nib.save(nib.Nifti1Image(mask, GRID), scan.masks[mt.ANY])
    found = mt.read_mask(scan, fast(label=(1, 2, 255)), mt.load_nifti(scan.image, 0.5)).get_fdata()
    assert np.array_equal(found, (cord(1)[1] == 1) & (value > 0.5))

@pytest.mark.parametrize("value", [0.03125, 0.5, 0.96875, 1.5, 254.5, -0.5, 300.0])
def test_a_mask_of_other_values_is_refused_with_its_name_and_values(scan, value):
    mask = np.where(cord(1)[1] == 1, value, 0).astype(np.float32)
    nib.save(nib.Nifti1Image(mask, GRID), scan.masks[mt.ANY])
    with pytest.raises(mt.InputError, match=rf"gmseg.*: has values \[{str(value)[:4]}"):
        mt.read_scan(scan, fast(), True)

def mask_of_255(volume, mask):
    mask[mask == 1] = 255

def mask_that_is_empty(volume, mask):
    mask[:] = 0

def mask_in_a_slice_without_contrast(volume, mask):
    volume[:, :, 1] = 0
    mask[:, :, [0, 2]] = 0

def mask_outside_the_crop(volume, mask):
    mask[:] = 0
    mask[:3, :3] = 1

@pytest.mark.parametrize("change", [
    mask_of_255, mask_that_is_empty, mask_in_a_slice_without_contrast, mask_outside_the_crop])
def test_a_labelled_scan_that_gives_no_slice_is_named(scan, capsys, change):
    volume, mask = cord(1)
    change(volume, mask)
    write_nifti(scan.image, volume)
    write_nifti(scan.masks[mt.ANY], mask)
    slices = mt.read_scan(scan, fast(crop=16), True)
    said = capsys.readouterr().out
    assert len(slices.images) == len(slices.masks) == len(slices.where) == 0
    assert f"warning: {scan.image}: not used: " in said and "--label (1,)" in said

def test_a_scan_without_contrast_is_named_and_one_that_is_used_is_not(scan, capsys):
    assert len(mt.read_scan(scan, fast(), False).images) == 3 and capsys.readouterr().out == ""
    write_nifti(scan.image, np.full(SHAPE, 7.0))
    assert len(mt.read_scan(scan, fast(), False).images) == 0
    said = capsys.readouterr().out
    assert f"warning: {scan.image}: not used: inside the crop, no slice has contrast" in said
    assert "--label" not in said

@pytest.mark.parametrize("degrees", [45, 135, 225, 315])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_image_and_mask_of_an_oblique_scan_stay_aligned(tmp_path, axis, degrees):
    # The image has its affine in the sform, the mask in the qform, where it is rounded.
    one, other = [k for k in range(3) if k != axis]
    angle = math.radians(degrees)
    rotation_matrix = np.eye(4)
    rotation_matrix[one, [one, other]] = math.cos(angle), -math.sin(angle)
    rotation_matrix[other, [one, other]] = math.sin(angle), math.cos(angle)
    affine = rotation_matrix @ np.diag([0.5, 0.5, 0.5, 1])
    affine[:3, 3] = -10, 3, 7
    volume = np.random.default_rng(0).normal(100, 1, (32, 32, 32))
    mask = np.zeros(volume.shape)
    mask[8:14, 12:20, 9:22] = 1                          # without any symmetry
    volume[mask == 1] = 200
    scan = bids_scan(tmp_path, volume, mask)
    for path, voxels, code in ((scan.image, volume, 1), (scan.masks[mt.ANY], mask, 0)):
        image = nib.Nifti1Image(voxels.astype(np.float32), None)
        image.set_sform(affine, code)
        image.set_qform(affine, 1)
        nib.save(image, path)
    slices = mt.read_scan(scan, fast(), True)
    assert slices.masks.sum() == 6 * 8 * 13
    assert torch.equal((slices.images > 1).float(), slices.masks)

@pytest.mark.parametrize("of", ["image", "mask", "both"])
@pytest.mark.parametrize("axes", [(1,), (1, 1)])
def test_trailing_axes_of_length_1_are_dropped(scan, of, axes):
    before = mt.read_scan(scan, fast(), True)
    for kind, path in (("image", scan.image), ("mask", scan.masks[mt.ANY])):
        if of in (kind, "both"):
            image = nib.load(path)
            voxels = image.get_fdata().reshape(*image.shape, *axes)
            nib.save(nib.Nifti1Image(voxels, image.affine), path)
    assert same_slices(mt.read_scan(scan, fast(), True), before)

@pytest.mark.parametrize("of", ["image", "mask"])
@pytest.mark.parametrize("unit", ["micron", "meter"])
def test_a_spatial_unit_other_than_mm_is_refused_with_its_name(scan, unit, of):
    path = scan.image if of == "image" else scan.masks[mt.ANY]
    image = nib.load(path)
    image.header.set_xyzt_units(unit)
    nib.save(nib.Nifti1Image(image.get_fdata(), image.affine, image.header), path)
    with pytest.raises(mt.InputError, match=f"{path.name}: voxel sizes in {unit}, expected mm"):
        mt.read_scan(scan, fast(), True)

@pytest.mark.parametrize("unit", ["mm", "unknown"])
def test_a_scan_in_mm_or_without_a_unit_is_read(scan, unit):
    before = mt.read_scan(scan, fast(), True)
    for path in (scan.image, scan.masks[mt.ANY]):
        image = nib.load(path)
        image.header.set_xyzt_units(unit, "sec")
        nib.save(nib.Nifti1Image(image.get_fdata(), image.affine, image.header), path)
    assert same_slices(mt.read_scan(scan, fast(), True), before)

def write_header_alone(path, shape, mm):
    """A NIfTI of that shape without its voxels."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header.set_sform(np.diag([*mm, 1]), 1)
    header.set_zooms(mm)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4096)))

@pytest.mark.parametrize("shape", [(512, 512, 5000), (2048, 2048, 257), (30000, 30000, 2)])
def test_a_volume_with_too_many_voxels_is_refused_for_that(scan, shape):
    write_header_alone(scan.image, shape, (0.9, 0.9, 1))
    size = " x ".join(map(str, shape))
    with pytest.raises(mt.InputError, match=f"T2starw.nii.gz: {size} voxels.*crop it") as error:
        mt.read_scan(scan, fast(), False)
    assert "header" not in str(error.value) and "np." not in str(error.value)

@pytest.mark.parametrize("shape, mm, spacing, side", [
    ((200, 20, 2), (50, 50, 5), 0.1, 100000), ((20, 2000, 2), (1, 0.5, 5), 0.1, 10000),
    ((10, 10, 2), (90, 0.5, 5), 0.02, 45000)])
def test_slices_that_get_too_large_are_refused_with_plain_numbers(scan, shape, mm, spacing, side):
    write_nifti(scan.image, np.zeros(shape, np.float32), mm=mm)
    with pytest.raises(mt.InputError, match=f"image: {side} px along a side".replace(
            "image", scan.image.name)) as error:
        mt.read_scan(scan, fast(spacing=spacing), False)
    assert str(error.value).startswith(f"{scan.image}: ") and "np." not in str(error.value)
    assert f"--spacing {spacing}" in str(error.value)

@pytest.mark.parametrize("shape, mm", [
    ((512, 24, 3), (0.29, 0.29, 5)), ((320, 24, 3), (0.5, 0.5, 7.5)), ((2, 24, 700), (9, 0.5, 1)),
    ((9, 9, 600), (1, 1, 4))])                           # 2.4 m, but across the slices
def test_a_matrix_of_many_pixels_and_thick_slices_are_not_too_large(scan, shape, mm):
    # The challenge's sites 4 and 2: 512 px of 0.29 mm, 320 px of 0.5 mm
    write_nifti(scan.image, np.random.default_rng(0).normal(0, 1, shape).astype(np.float32), mm=mm)
    assert len(mt.read_scan(scan, fast(spacing=0.25), False).images) == shape[2]

def test_a_large_volume_is_resampled_slice_by_slice(scan, monkeypatch):
    write_nifti(scan.image, np.random.default_rng(0).normal(0, 1, (40, 36, 12)), mm=(4, 4, 4))
    real, largest = F.interpolate, []

    def recorded(images, *arguments, **options):
        result = real(images, *arguments, **options)
        largest.append(max(images.numel(), result.numel()))
        return result

    monkeypatch.setattr(F, "interpolate", recorded)
    config = fast(spacing=0.1)
    assert mt.read_scan(scan, config, False).images.shape == (12, 1, 32, 32)
    assert mt.predict_volume(nib.load(scan.image), Bright(), config).shape == (40, 36, 12)
    assert max(largest) == 1600 * 1440                   # px of one slice of 0.1 mm

@pytest.mark.parametrize("shape, scale, offset", [
    ((24, 24, 3), 1, -1000), ((24, 24, 3), 1, 1000), ((20, 44, 2), 0.001, 0),
    ((20, 44, 2), 500, -70), ((48, 48, 2), 3, 3000)])
def test_a_prediction_depends_neither_on_offset_nor_on_scale(shape, scale, offset):
    network, config = mt.UNet(4, 0.0).eval(), fast(crop=32)
    volume = np.random.default_rng(0).normal(100, 10, shape)
    one, other = (mt.predict_volume(nib.Nifti1Image(values, GRID), network, config)
                  for values in (volume, volume * scale + offset))
    assert np.abs(one - other).max() < 1e-4 < one.std()

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
    config, slices = dataclasses.replace(mt.DEMO, threshold=0.3), mt.Slices(x, one > 0.3, [])
    assert np.allclose(mt.evaluate(network, slices, config)["dice"], 100)

def test_evaluation_restores_the_mode_of_every_layer():
    network = frozen_network()
    before = modes(network)
    mt.predict_probabilities(network, torch.randn(2, 1, 16, 16))
    assert modes(network) == before and before.count(False) == 1
    mt.predict_probabilities(network.eval(), torch.randn(2, 1, 16, 16))
    assert modes(network) == [False] * len(before)

# --- Training and report -------------------------------------------------------------------------

def run(*arguments, cwd, code=0, processes=None):
    """The command line in a process of its own, or under torchrun; code None: any but 0."""
    launch = ""
    if processes:                                        # standalone: on a free port
        launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}"
    done = subprocess.run([sys.executable, *launch.split(), SCRIPT, *map(str, arguments)],
                          cwd=cwd, text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == code or code is None and done.returncode, done.stdout + done.stderr
    return done

def test_the_command_line_end_to_end(phantom, tmp_path):
    how, out = "--preset demo --crop 32 --width 4 --epochs 2 --runs 2".split(), tmp_path / "out"
    done = run("--data", phantom, *how, "--out", "out", cwd=tmp_path)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "table.md", "metrics.csv", "curves.png", "examples.png",
        *(f"{method}-seed{seed}.{end}" for method in mt.METHODS for seed in (0, 1)
          for end in ("pt", "csv"))}
    table = (out / "table.md").read_text()
    assert table in done.stdout and "Teacher minus supervised" in table
    for row in mt.LABELS.values():
        assert f"| {row} " in table
    rows = list(csv.DictReader(open(out / "metrics.csv")))
    assert list(rows[0]) == ["method", "seed", "model", "site", "subject", "slice", *mt.METRICS]
    assert len(rows) == 2 * 3 * 12 * 2                   # runs, networks, test subjects, slices
    # The table's mean and std, recomputed from the per-slice file
    seeds = [np.mean([float(row["dice"]) for row in rows if row["model"] == "teacher"
                      and row["seed"] == seed]) for seed in "01"]
    assert seeds[0] != seeds[1]
    assert f"(teacher) | {np.mean(seeds):5.2f} ({np.std(seeds, ddof=1):.2f}) |" in re.sub(
        r"\| +", "| ", table)
    log = list(csv.DictReader(open(out / "mean_teacher-seed1.csv")))
    assert [row["epoch"] for row in log] == ["1", "2"] and float(log[1]["val_teacher"]) >= 0
    assert json.loads((out / "config.json").read_text())["config"]["crop"] == 32
    mt.UNet(4).load_state_dict(torch.load(out / "mean_teacher-seed0.pt")["teacher"])

@pytest.mark.parametrize("method", mt.METHODS)
def test_a_run_keeps_to_its_schedules(phantom, tmp_path, capsys, monkeypatch, method):
    config = small(phantom, tmp_path, batch=5, unlabelled_batch=3, epochs=(3, 4), lr_ramp=2,
                   consistency_ramp=3, alpha=0.5, alpha_late=0.75, alpha_epochs=1, degrees=1.0,
                   translation=2.0, scale=0.3, noise=0.4, weight_decay=(0.1, 0.2))
    data, calls = mt.load_data(config), []

    def fake(student, teacher, optimizer, images, masks, unlabelled, step, weight, alpha, **how):
        group, = optimizer.param_groups
        calls.append((len(images), len(masks), len(unlabelled), teacher is None, group["lr"],
                      group["weight_decay"], step, weight, alpha, how["affine"], how["noise"]))
        return {"dice_loss": torch.tensor(-0.5), "consistency_loss": torch.tensor(0.25)}

    monkeypatch.setattr(mt, "train_step", fake)
    history = mt.train(config, method, 0, data)["history"]
    semi = method == "mean_teacher"
    epochs, extra = (4, 3) if semi else (3, 0)           # 16 // 5 steps, the last part dropped
    said = f"{method}, seed 0: {3 * epochs} steps in {epochs} epochs, 5 labelled + {extra} unl"
    assert said in capsys.readouterr().out
    assert calls == [(5, 5, extra, not semi, config.lr * mt.learning_rate_factor(e, epochs, 2),
                      0.2 if semi else 0.1, 3 * (e - 1) + k, config.consistency_weight
                      * mt.ramp_up(e, 3), 0.5 if e == 1 else 0.75, (1.0, 2.0, 0.3), 0.4)
                     for e in range(1, epochs + 1) for k in range(3)]
    assert [row["step"] for row in history] == [3 * e for e in range(1, epochs + 1)]

def test_an_epoch_shows_every_labelled_slice_once_and_unlabelled_ones_in_turn():
    labelled, unlabelled = (mt.Slices(torch.arange(n), 10 + torch.arange(n), []) for n in (7, 5))
    data = {"train": labelled, "unlabelled": unlabelled}
    parts = list(mt.batches(data, 3, 2, 3))
    images, masks, others = (torch.cat(part) for part in zip(*parts))
    assert len(parts) == 3 and len(set(images.tolist())) == 6 and len(others) == 9
    assert torch.equal(masks, images + 10)
    assert sorted(others[:5].tolist()) == [0, 1, 2, 3, 4]        # all of them before one again
    assert [len(others) for _, _, others in mt.batches(data, 3, 2, 0)] == [0, 0, 0]

def test_a_set_that_is_used_up_starts_again_in_another_order():
    slices = mt.Slices(torch.arange(9), torch.arange(9), [])
    parts = list(mt.batches({"train": slices, "unlabelled": slices}, 6, 3, 6))
    labelled = torch.cat([images for images, _, _ in parts]).view(2, 9)
    unlabelled = torch.cat([others for _, _, others in parts]).view(4, 9)
    for order in (*labelled, *unlabelled):
        assert sorted(order.tolist()) == list(range(9))
    assert not torch.equal(*labelled) and len(set(map(tuple, unlabelled.tolist()))) == 4

def test_table_and_paired_difference_by_hand():
    dice = {"supervised": [60.0, 64.0, 62.0], "mean teacher (student)": [1.0, 2.0, 3.0],
            "mean teacher (teacher)": [63.0, 65.0, 67.0]}
    table, difference = mt.make_table({k: dict.fromkeys(mt.METRICS, v) for k, v in dice.items()})
    # differences 3, 1, 5: mean 3, std 2, standard error 2 / sqrt(3)
    assert difference == pytest.approx((3.0, 2 / math.sqrt(3)))
    assert "| supervised             | 62.00 (2.00) |" in table
    assert "+3.00 Dice (standard error 1.15, paired over 3 runs)" in table
    assert mt.make_table({"supervised": dict.fromkeys(mt.METRICS, [60.0])})[1] is None

def test_every_field_is_an_option_and_help_explains_it():
    options = ("--data d --epochs 7 --weight-decay 1e-3 2e-3 --steps 9 --train a b --label 1 2 "
               "--rater 2 --contrast T1w --mask-name dseg --split-seed -1")
    assert mt.parse(options.split()) == (dataclasses.replace(
        mt.Config(), data="d", epochs=(7,), weight_decay=(1e-3, 2e-3), steps=9, train=("a", "b"),
        label=(1, 2), rater="2", contrast=("T1w",), mask_name=("dseg",), split_seed=-1,
        out="runs/paper-d"), False)
    assert mt.parse(["--overwrite"])[1] and mt.parse([])[0] == dataclasses.replace(
        mt.DEMO, out="runs/demo-phantom")
    assert mt.parse(["--preset", "paper"])[0].width == 64
    text = run("--help", cwd=HERE).stdout
    for field in dataclasses.fields(mt.Config):
        assert re.search(f"  --{field.name.replace('_', '-')}[ ,]", text), field.name

def test_the_defaults_are_the_papers():
    assert vars(mt.Config()) == dict(
        data="", out="", method="both", runs=1, seed=0, device="auto", spacing=0.25, crop=200,
        label=(1,), rater="4", contrast=("T2star", "T2starw"), mask_name=("gmseg", "label-GM"),
        split=(2, 2, 3), split_seed=0, train=(), val=(), test=(), unlabelled=(), width=64,
        dropout=0.5, epochs=(1600, 350), steps=0, batch=8, unlabelled_batch=8,
        lr=6e-4, lr_ramp=50, weight_decay=(8e-4, 6e-4), consistency_weight=2.9,
        consistency_ramp=100, alpha=0.99, alpha_late=0.999, alpha_epochs=50, consistency="bce",
        augmentation="delayed", confidence=0.0, degrees=4.5, translation=0.0, scale=0.0, noise=0.1,
        threshold=0.5, validate_every=10)

def test_the_demo_differs_from_the_paper_in_these_values_and_no_others():
    paper = vars(mt.Config())
    changed = {name: value for name, value in vars(mt.DEMO).items() if value != paper[name]}
    assert changed == dict(
        crop=64, width=8, dropout=0.0, epochs=(30,), steps=700, batch=4, unlabelled_batch=4,
        lr=3e-3, lr_ramp=3, weight_decay=(2e-3,), consistency_ramp=30, alpha=0.95, alpha_late=0.99,
        alpha_epochs=8, degrees=20.0, translation=3.0, scale=0.1, noise=0.2, validate_every=5)

@pytest.mark.parametrize("options, steps", [
    ("", 700), ("--epochs 9", 0), ("--epochs 9 --steps 40", 40), ("--steps 40", 40),
    ("--epochs 20 10 --steps 20", 20), ("--steps 0", 0), ("--lr 0.1", 700)])
def test_epochs_without_steps_turn_steps_off(options, steps):
    assert mt.parse(["--preset", "demo", *options.split()])[0].steps == steps

# --- The training loop ---------------------------------------------------------------------------

def some_slices(count, seed, size=16):
    """Slices as load_data returns them. No two of them are equal."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, size, size, generator=generator)
    masks = (F.avg_pool2d(images, 5, 1, 2) > 0.1).float()
    where = [("", f"scan{seed}", z) for z in range(count)]
    return mt.Slices(images, masks, where)

def study():
    """Four sets of slices, without files: three steps of two labelled slices make an epoch."""
    unlabelled = some_slices(7, seed=4)
    unlabelled = unlabelled._replace(masks=unlabelled.images[:0])
    return {"train": some_slices(6, seed=1), "val": some_slices(3, seed=2),
            "test": some_slices(4, seed=3), "unlabelled": unlabelled}

def short(out, **changes):
    """The settings of a training that takes a second."""
    settings = dict(crop=16, width=2, batch=2, unlabelled_batch=3, epochs=(3,), validate_every=2)
    return small("", out, **{**settings, **changes})

def clone(network):
    return {name: values.clone() for name, values in network.state_dict().items()}

def same(state, other):
    assert state.keys() == other.keys()
    return all(torch.equal(state[name], other[name]) for name in state)

def network_of(config, state):
    network = mt.build_network(config)
    network.load_state_dict(state)
    return network

class Call:
    """What a call of train_step was given, and what it did."""

@pytest.fixture
def calls(monkeypatch):
    """All calls of train_step, in order. They do what they always do."""
    real, made = mt.train_step, []
    signature = inspect.signature(real)

    def recorded(*arguments, **options):
        call = Call()
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        vars(call).update(bound.arguments)
        call.group = dict(call.optimizer.param_groups[0])
        call.student_before = clone(call.student)
        call.weights_before = vector(call.student)
        call.losses = real(*arguments, **options)
        call.student_after = clone(call.student)
        call.gradient = flat([theta.grad for theta in call.student.parameters()])
        if call.teacher is not None:
            call.teacher_after = clone(call.teacher)
        made.append(call)
        return call.losses

    monkeypatch.setattr(mt, "train_step", recorded)
    return made

def numbers(images, slices):
    """Which of the slices these are; ValueError if one of them is not among the slices."""
    return [[torch.equal(image, other) for other in slices.images].index(True) for image in images]

def labelled_order(calls, data):
    return [numbers(call.images, data["train"]) for call in calls]

def unlabelled_order(calls, data):
    return [numbers(call.unlabelled, data["unlabelled"]) for call in calls]

def test_student_and_teacher_carry_over_from_step_to_step_and_epoch_to_epoch(
        tmp_path, calls, monkeypatch):
    before = []                                          # the teacher, as each step finds it
    recorded = mt.train_step

    def watched(student, teacher, *others, **options):
        before.append(clone(teacher))
        return recorded(student, teacher, *others, **options)

    monkeypatch.setattr(mt, "train_step", watched)
    run = mt.train(short(tmp_path), "mean_teacher", 0, study())
    assert len(calls) == 9
    assert same(before[0], calls[0].student_before)      # the teacher starts as a copy
    for call, later, teacher in zip(calls, calls[1:], before[1:]):
        assert same(later.student_before, call.student_after)
        assert same(teacher, call.teacher_after)
    assert same(run["student"], calls[-1].student_after)
    assert same(run["teacher"], calls[-1].teacher_after)
    assert not same(run["student"], run["teacher"])

def test_epochs_and_seeds_see_different_orders_and_the_same_seed_the_same(tmp_path, calls):
    data, orders, weights = study(), [], []
    for number, seed in enumerate((0, 1, 0)):
        calls.clear()
        mt.train(short(tmp_path / str(number)), "mean_teacher", seed, data)
        orders.append((labelled_order(calls, data), unlabelled_order(calls, data)))
        weights.append(calls[0].student_before)
    for of_one_seed, of_other_seed in zip(orders[0], orders[1]):
        first, second, third = of_one_seed[:3], of_one_seed[3:6], of_one_seed[6:]
        assert first != second != third != first
        assert of_one_seed != of_other_seed
        assert of_one_seed[3:] != of_other_seed[:6]      # no epoch of one seed is another's
        assert of_one_seed[:6] != of_other_seed[3:]
    assert not same(weights[0], weights[1])
    assert orders[0] == orders[2] and same(weights[0], weights[2])

def test_every_step_has_transformations_and_noise_of_its_own(tmp_path, monkeypatch):
    # With a single labelled slice, only these can differ from step to step.
    networks = []

    def build(config):
        networks.append(Recorder(1, 1, 1))
        return networks[-1]

    monkeypatch.setattr(mt, "build_network", build)
    data = study()
    data["train"] = some_slices(1, seed=1)
    for degrees, noise in ((90.0, 0.0), (0.0, 1.0)):
        networks.clear()
        config = short(tmp_path / str(noise), degrees=degrees, noise=noise, batch=1, epochs=(6,))
        for seed in (0, 1):
            mt.train(config, "supervised", seed, {**data, "val": some_slices(0, 1)})
        shown = [image for network in networks for image in network.seen if len(image) == 1]
        assert len(shown) == 12                          # the four of the test set are no batch
        for one, other in itertools.combinations(shown, 2):
            assert not torch.allclose(one, other, atol=1e-3)

def test_both_methods_start_from_the_same_weights_and_see_the_same_labelled_slices(
        tmp_path, calls):
    data, config = study(), short(tmp_path)
    mt.train(config, "supervised", 5, data)
    order, weights = labelled_order(calls, data), calls[0].student_before
    calls.clear()
    mt.train(config, "mean_teacher", 5, data)
    assert same(weights, calls[0].student_before)
    assert order[:3] == labelled_order(calls, data)[:3]

def test_the_slices_of_a_step_come_from_the_training_and_from_the_unlabelled_set(tmp_path, calls):
    data = study()
    mt.train(short(tmp_path), "mean_teacher", 0, data)
    unlabelled = []
    for call in calls:
        for image, mask in zip(call.images, call.masks, strict=True):
            number, = numbers([image], data["train"])    # with its own mask
            assert torch.equal(mask, data["train"].masks[number])
        unlabelled += numbers(call.unlabelled, data["unlabelled"])
    assert len(unlabelled) == 27 and set(unlabelled) == set(range(7))    # all of them, none else
    assert {len(call.images) for call in calls} == {2}
    for epoch in (calls[:3], calls[3:6], calls[6:]):
        shown = sum(labelled_order(epoch, data), [])
        assert sorted(shown) == [0, 1, 2, 3, 4, 5]

def read_log(path):
    """The rows of a run's log, as numbers."""
    with open(path) as file:
        return [{name: float(value) for name, value in row.items()}
                for row in csv.DictReader(file)]

@pytest.mark.parametrize("method", mt.METHODS)
def test_the_log_holds_what_happened(tmp_path, calls, method):
    data, config = study(), short(tmp_path, epochs=(7,), validate_every=3, threshold=0.45)
    run = mt.train(config, method, 2, data)
    assert len(calls) == 21 and [row["epoch"] for row in run["history"]] == [1, 2, 3, 4, 5, 6, 7]
    for epoch, row in enumerate(run["history"], start=1):
        steps = calls[3 * epoch - 3:3 * epoch]
        assert row["step"] == 3 * epoch == steps[-1].step + 1
        assert [row["lr"]] * 3 == [call.group["lr"] for call in steps]
        dice_losses = [call.losses["dice_loss"].item() for call in steps]
        assert row["dice_loss"] == pytest.approx(np.mean(dice_losses), rel=1e-6)
        if method == "mean_teacher":
            assert [row["weight"]] * 3 == [call.weight for call in steps]
            consistency_losses = [call.losses["consistency_loss"].item() for call in steps]
            assert row["consistency_loss"] == pytest.approx(np.mean(consistency_losses), rel=1e-6)
        else:
            for name in ("weight", "consistency_loss", "val_teacher"):
                assert math.isnan(row[name])             # the columns of both methods are equal
        states = {"val_student": steps[-1].student_after}
        if method == "mean_teacher":
            states["val_teacher"] = steps[-1].teacher_after
        for column, state in states.items():
            if epoch in (1, 3, 6, 7):                    # the first, every third, the last
                dice = mt.evaluate(network_of(config, state), data["val"], config)["dice"]
                assert row[column] == pytest.approx(np.mean(dice), rel=1e-6)
                assert 0 < row[column] < 100
            else:
                assert math.isnan(row[column])
    log = read_log(tmp_path / f"{method}-seed2.csv")
    assert len({row["lr"] for row in log}) > 3
    for found, row in zip(log, run["history"], strict=True):
        assert found == pytest.approx(row, rel=1e-6, nan_ok=True)

@pytest.mark.parametrize("method", mt.METHODS)
def test_the_test_metrics_are_those_of_the_saved_networks(tmp_path, method):
    data, config = study(), short(tmp_path, epochs=(6,))
    run = mt.train(config, method, 1, data)
    models = ["student", "teacher"] if method == "mean_teacher" else ["student"]
    assert [*run["metrics"]] == models and ("teacher" in run) == (method == "mean_teacher")
    for model in models:
        expected = mt.evaluate(network_of(config, run[model]), data["test"], config)
        assert run["metrics"][model].keys() == expected.keys() == set(mt.METRICS)
        for name in mt.METRICS:
            assert len(expected[name]) == 4
            assert run["metrics"][model][name] == pytest.approx(expected[name], rel=1e-5)
    if method == "mean_teacher":
        assert run["metrics"]["student"] != run["metrics"]["teacher"]

@pytest.mark.parametrize("method", mt.METHODS)
def test_the_checkpoint_holds_what_train_returns(tmp_path, method):
    config = short(tmp_path, epochs=(5,))
    run = mt.train(config, method, 4, study())
    saved = torch.load(tmp_path / f"{method}-seed4.pt", weights_only=True)
    assert len(saved["history"]) == 5
    for found, row in zip(saved["history"], run["history"], strict=True):
        assert found == pytest.approx(row, nan_ok=True)
    assert saved["metrics"] == run["metrics"]
    assert (saved["method"], saved["seed"], saved["config"]["width"]) == (method, 4, 2)
    for model in run["metrics"]:
        assert same(saved[model], run[model])
    again = mt.train(config, method, 4, study())         # finished: it is only read
    assert same(again["student"], run["student"]) and again["metrics"] == run["metrics"]

@pytest.mark.parametrize("method, decay", [("supervised", 0.3), ("mean_teacher", 0.7)])
def test_the_optimiser_is_adam_with_the_papers_betas_and_an_l2_penalty(
        tmp_path, calls, method, decay):
    mt.train(short(tmp_path, weight_decay=(0.3, 0.7)), method, 0, study())
    theta = calls[0].weights_before.double()
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for step, call in enumerate(calls, start=1):
        # The penalty is part of the gradient, unlike AdamW's.
        gradient = call.gradient.double() + decay * theta
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient ** 2
        m_hat = m / (1 - 0.9 ** step)
        v_hat = v / (1 - 0.999 ** step)
        theta = theta - call.group["lr"] * m_hat / (v_hat.sqrt() + 1e-8)
    assert (vector(calls[-1].student).double() - theta).abs().max() < 2e-6
    assert (calls[0].weights_before.double() - theta).abs().max() > 1e-3

@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_trained_networks_have_the_dropout_and_the_width_of_the_settings(
        tmp_path, calls, rate):
    mt.train(short(tmp_path, dropout=rate, width=3, epochs=(1,)), "mean_teacher", 0, study())
    for network in (calls[0].student, calls[0].teacher):
        rates = [layer.p for layer in network.modules() if isinstance(layer, nn.Dropout2d)]
        assert rates == [rate] * 14                      # after every convolution but the last
        convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        widths = [layer.out_channels for layer in convolutions]
        assert widths[0] == 3 and max(widths) == 12

def test_a_batch_larger_than_the_study_takes_all_slices_in_every_step(tmp_path, calls):
    data = study()
    config = short(tmp_path, batch=50, unlabelled_batch=20, epochs=(4,))
    run = mt.train(config, "mean_teacher", 0, data)
    assert [row["step"] for row in run["history"]] == [1, 2, 3, 4]
    for shown, unlabelled in zip(labelled_order(calls, data), unlabelled_order(calls, data)):
        assert sorted(shown) == [0, 1, 2, 3, 4, 5]
        assert len(unlabelled) == 20 and set(unlabelled) == set(range(7))

@pytest.mark.parametrize("method, changes", [
    ("supervised", {}), ("mean_teacher", {"unlabelled_batch": 0})])
def test_unlabelled_slices_are_left_alone_where_none_are_asked_for(
        tmp_path, calls, method, changes):
    data, trained = study(), []
    for number, unlabelled in enumerate((some_slices(7, 4), some_slices(7, 5))):
        config = short(tmp_path / str(number), **changes)
        run = mt.train(config, method, 0, {**data, "unlabelled": unlabelled})
        trained.append(run["student"])
    assert same(*trained)
    assert {len(call.unlabelled) for call in calls} == {0}
    assert {call.teacher is None for call in calls} == {method == "supervised"}

def test_without_an_unlabelled_subject_the_mean_teacher_trains_on_labelled_slices(
        tmp_path, calls):
    data = {**study(), "unlabelled": some_slices(0, 4)}
    run = mt.train(short(tmp_path), "mean_teacher", 0, data)
    assert {len(call.unlabelled) for call in calls} == {0} and len(calls) == 9
    assert all(row["consistency_loss"] > 0 for row in run["history"])

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_is_in_bfloat16_on_cuda_alone(tmp_path, calls, monkeypatch, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    types = []

    class Typed(nn.Conv2d):
        def forward(self, x):
            result = super().forward(x)
            if self.training:
                types.append(result.dtype)
            return result

    monkeypatch.setattr(mt, "build_network", lambda config: Typed(1, 1, 1))
    data = {name: part._replace(images=part.images.to(device)) for name, part in study().items()}
    for name in ("train", "val", "test"):
        data[name] = data[name]._replace(masks=data[name].masks.to(device))
    mt.train(short(tmp_path), "mean_teacher", 0, data)
    native = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    assert len(types) == 9 * 4                           # student and teacher, two parts each
    assert set(types) == {torch.bfloat16 if native else torch.float32}
    assert {bool(call.amp) for call in calls} == {native}

def test_no_validation_set_means_no_validation_score(tmp_path):
    run = mt.train(short(tmp_path), "mean_teacher", 0, {**study(), "val": some_slices(0, 2)})
    for row in run["history"]:
        assert math.isnan(row["val_student"]) and math.isnan(row["val_teacher"])
    assert len(run["metrics"]["teacher"]["dice"]) == 4

@pytest.mark.parametrize("method, refused_steps, steps", [
    ("supervised", 8, 9), ("mean_teacher", 2, 3), ("both", 8, 9)])
def test_steps_must_be_as_many_as_the_epochs_of_the_methods_that_are_trained(
        method, refused_steps, steps):
    options = ["--epochs", "9", "3", "--method", method, "--steps"]
    with pytest.raises(mt.InputError, match=f"--steps {refused_steps}: must be at least"):
        mt.parse([*options, str(refused_steps)])
    assert mt.parse([*options, str(steps)])[0].steps == steps

def schedule_of(calls):
    """Steps, learning rates, w and alpha of a training, step by step."""
    steps = [call.step for call in calls]
    lr = [call.group["lr"] for call in calls]
    return steps, lr, [call.weight for call in calls], [call.alpha for call in calls]

@pytest.mark.parametrize("method", mt.METHODS)
@pytest.mark.parametrize("steps", [5, 11, 23])
@pytest.mark.parametrize("count", [2, 6, 40])
def test_steps_says_how_many_steps_whatever_the_size_of_the_data(
        tmp_path, monkeypatch, count, steps, method):
    taken = []

    def fake(student, teacher, optimizer, images, masks, unlabelled, step, *others, **options):
        taken.append((step, len(images)))
        return {"dice_loss": torch.tensor(-0.5), "consistency_loss": torch.tensor(0.25)}

    monkeypatch.setattr(mt, "train_step", fake)
    data = {**study(), "train": some_slices(count, 1)}
    run = mt.train(short(tmp_path, steps=steps, epochs=(5,)), method, 0, data)
    assert taken == [(step, 2) for step in range(steps)]
    assert [row["step"] for row in run["history"]] == [steps * e // 5 for e in range(1, 6)]

def test_steps_leave_ramps_and_the_alpha_switch_at_their_share_of_the_training(tmp_path, calls):
    how = dict(epochs=(8,), lr_ramp=4, consistency_ramp=6, alpha=0.5, alpha_late=0.7,
               alpha_epochs=3)
    schedules = []
    for number, steps in enumerate((8, 24, 0)):          # 0: three steps an epoch, by the data
        calls.clear()
        mt.train(short(tmp_path / str(number), steps=steps, **how), "mean_teacher", 0, study())
        schedules.append(schedule_of(calls))
    (few, *once), many, by_data = schedules
    assert few == list(range(8)) and many == by_data
    assert many[1:] == tuple(np.repeat(values, 3).tolist() for values in once)
    assert once[2] == [0.5] * 3 + [0.7] * 5 and len(set(once[0])) == 8

@pytest.mark.parametrize("method", mt.METHODS)
def test_a_training_by_steps_uses_every_slice_equally_often(tmp_path, calls, method):
    data = study()
    mt.train(short(tmp_path, steps=12, epochs=(1,)), method, 0, data)
    shown = sum(labelled_order(calls, data), [])
    assert sorted(shown) == sorted(4 * [0, 1, 2, 3, 4, 5])
    for k in range(0, 24, 6):                            # each of them before one again
        assert sorted(shown[k:k + 6]) == [0, 1, 2, 3, 4, 5]

def warnings_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "warning" in line]

@pytest.mark.parametrize("method", mt.METHODS)
def test_a_training_shorter_than_the_ramp_says_which_learning_rate_it_reaches(
        tmp_path, capsys, calls, method):
    config = short(tmp_path, epochs=(3,), lr_ramp=6, consistency_ramp=3, lr=0.02)
    mt.train(config, method, 0, study())
    line, = warnings_of(capsys)
    reached = 0.02 * math.exp(-1.25)                     # half way up
    assert calls[-1].group["lr"] == pytest.approx(reached)
    assert "3 epochs" in line and "6 epochs" in line
    assert f"learning rate reaches {reached:.2g} instead of 0.02" in line

def test_a_training_shorter_than_the_ramp_says_which_weight_it_reaches(tmp_path, capsys, calls):
    config = short(tmp_path, epochs=(3,), lr_ramp=3, consistency_ramp=6, consistency_weight=5.0)
    mt.train(config, "mean_teacher", 0, study())
    line, = warnings_of(capsys)
    reached = 5 * math.exp(-1.25)
    assert calls[-1].weight == pytest.approx(reached)
    assert f"w reaches {reached:.2g} instead of 5" in line

@pytest.mark.parametrize("method, changes", [
    ("mean_teacher", dict(lr_ramp=3, consistency_ramp=3)),
    ("supervised", dict(lr_ramp=3, consistency_ramp=9))])
def test_a_training_that_completes_its_ramps_gives_no_warning(tmp_path, capsys, method, changes):
    mt.train(short(tmp_path, **changes), method, 0, study())
    assert warnings_of(capsys) == []

@pytest.mark.parametrize("method", mt.METHODS)
def test_the_progress_has_a_header_and_a_line_for_every_validation(tmp_path, capsys, method):
    run = mt.train(short(tmp_path, epochs=(5,), lr_ramp=0, consistency_ramp=0), method, 0, study())
    _, title, header, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{method}, seed 0: 15 steps in 5 epochs")
    titles = re.split("  +", header.strip())
    assert titles == ["epoch", "step", "Dice loss", "consistency", "val. Dice: student",
                      "teacher", "minutes left"]
    assert [line.split()[0] for line in lines] == ["1", "2", "4", "5"]
    assert {len(line) for line in lines} == {len(header)}
    for line in lines:
        epoch, step, dice_loss, consistency, student, teacher, left = line.split()
        row = run["history"][int(epoch) - 1]
        assert int(step) == row["step"] and float(left) >= 0
        assert (dice_loss, student) == (f"{row['dice_loss']:.4f}", f"{row['val_student']:.2f}")
        if method == "supervised":
            assert consistency == teacher == "-"
        else:
            assert consistency == f"{row['consistency_loss']:.4f}"
            assert teacher == f"{row['val_teacher']:.2f}"

class OnDevice(nn.Module):
    """A network that pretends to go to a device, and keeps what it was asked for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)

    def to(self, device, **options):
        self.device = device
        return super().to("cpu", **options)

@pytest.mark.parametrize("kind", ["mps", "cuda", "cpu"])
def test_networks_are_channels_last_but_contiguous_on_mps(monkeypatch, kind):
    monkeypatch.setattr(mt, "build_network", lambda config: OnDevice())
    student, teacher, _ = mt.build(mt.DEMO, "mean_teacher", torch.device(kind))
    assert student.device.type == kind
    for network in (student, teacher):
        assert network.conv.weight.is_contiguous() == (kind == "mps")
        assert network.conv.weight.is_contiguous(memory_format=torch.channels_last) == (
            kind != "mps")

@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_on_a_gpu_that_computes_in_it_without_emulation(monkeypatch, native):
    # An older GPU: it can emulate bfloat16, and PyTorch says so unless it is asked to leave it.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or native)
    assert mt.step_options(mt.DEMO, torch.device("cuda"))["amp"] == native
    for kind in ("cpu", "mps"):
        assert not mt.step_options(mt.DEMO, torch.device(kind))["amp"]

@pytest.mark.parametrize("local_rank, count, gpu", [
    ("0", 2, 0), ("1", 2, 1), ("2", 2, 0), ("5", 2, 1), ("3", 1, 0), (None, 4, 0)])
def test_more_processes_than_gpus_share_them(monkeypatch, local_rank, count, gpu):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: real(*size))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    mt.pick_device("cuda")
    assert chosen == [gpu]

@pytest.mark.parametrize("changes", [
    dict(batch=1, unlabelled_batch=2), dict(batch=2, unlabelled_batch=1)])
def test_a_batch_of_one_slice_of_8_px_is_refused_before_it_trains(tmp_path, changes):
    data = {name: some_slices(6, 1, size=8) for name in ("train", "val", "test", "unlabelled")}
    with pytest.raises(mt.InputError, match="^--crop 8 and a batch of one slice.*BatchNorm"):
        mt.train(short(tmp_path, crop=8, **changes), "mean_teacher", 0, data)
    assert list(tmp_path.iterdir()) == []

@pytest.mark.parametrize("crop, method, changes", [
    (8, "supervised", dict(batch=2, unlabelled_batch=1)),
    (8, "mean_teacher", dict(batch=2, unlabelled_batch=0)),
    (16, "mean_teacher", dict(batch=1, unlabelled_batch=1))])
def test_batches_that_batchnorm_can_normalise_are_trained(tmp_path, crop, method, changes):
    data = {name: some_slices(6, 1, size=crop) for name in ("train", "val", "test", "unlabelled")}
    run = mt.train(short(tmp_path, crop=crop, **changes), method, 0, data)
    assert len(run["history"]) == 3 and -1 < run["history"][-1]["dice_loss"] < 0

# --- Resume --------------------------------------------------------------------------------------

LITTLE = "--preset demo --split 1 0 1 --crop 16 --width 2 --batch 2 --epochs 1".split()

@pytest.fixture(scope="session")
def little(tmp_path_factory):
    """Two subjects of one site and one unlabelled: a study that trains. -> arguments"""
    folder = tmp_path_factory.mktemp("little")
    write_scgm(folder, subjects=(1, 2, 11))
    return ["--data", folder, *LITTLE]

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

def bits(path):
    """All that a checkpoint holds, but for its folder, to the last bit."""
    state = torch.load(path, weights_only=True)
    state["config"]["out"] = ""
    return json.dumps(state, default=torch.Tensor.tolist)

@pytest.mark.parametrize("method", mt.METHODS)
def test_training_goes_on_after_an_exception_in_a_step_bit_for_bit(
        little, tmp_path, monkeypatch, method):
    # Three labelled slices, one a step; a checkpoint after every second epoch. The first stop is
    # in the second step of epoch 5, the next in the second step of epoch 7.
    options = [*little, "--method", method, "--batch", 1, "--epochs", 8, "--validate-every", 2]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(*options, "--out", whole)
    real, taken, last = mt.train_step, [], [13]
    signature = inspect.signature(real)

    def failing(*arguments, **others):
        step = signature.bind(*arguments, **others).arguments["step"]
        taken.append(step)
        if step in last:
            raise RuntimeError("no power")
        return real(*arguments, **others)

    monkeypatch.setattr(mt, "train_step", failing)
    name = f"{method}-seed0"
    for first, stop, epochs in ((0, 13, 4), (12, 19, 6)):
        taken.clear()
        last[:] = [stop]
        with pytest.raises(RuntimeError, match="no power"):
            main(*options, "--out", cut)
        assert taken == [*range(first, stop + 1)]
        history = torch.load(cut / f"{name}.pt", weights_only=True)["history"]
        assert [row["epoch"] for row in history] == [*range(1, epochs + 1)]
        assert not (cut / "table.md").exists()
    taken.clear()
    last.clear()
    main(*options, "--out", cut)
    assert taken == [*range(18, 24)]                     # epochs 7 and 8, and no other
    assert bits(whole / f"{name}.pt") == bits(cut / f"{name}.pt")
    for file in ("metrics.csv", "table.md", f"{name}.csv"):
        assert (whole / file).read_text() == (cut / file).read_text()
    taken.clear()
    main(*options, "--out", cut)
    assert taken == []                                   # nothing is done twice

def stop_in_training(options, number, cwd):
    """Start a training, and stop it by a signal some time after an epoch. -> status, output"""
    process = subprocess.Popen(
        [sys.executable, "-u", SCRIPT, *map(str, options)], text=True, cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,                # a job in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))         # may ignore it
    watchdog = threading.Timer(120, process.kill)        # whatever happens, the reading ends
    watchdog.start()
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(r" +\d+ +\d+ +-0\.\d", line):  # the line of an epoch
                break
        time.sleep(np.random.default_rng().uniform(0, 0.05))     # another moment in every run
        assert process.poll() is None, "ended before the signal: " + "".join(lines)
        process.send_signal(number)
        rest, _ = process.communicate(timeout=60)
        return process.returncode, "".join(lines) + rest
    finally:
        watchdog.cancel()
        process.kill()
        process.wait(timeout=60)

def test_stops_at_random_moments_leave_no_trace(little, tmp_path):
    options = [*little, "--method", "mean_teacher", "--epochs", 40, "--validate-every", 1]
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    main(*options, "--out", whole)
    for _ in range(2):
        status, _ = stop_in_training([*options, "--out", cut], signal.SIGKILL, tmp_path)
        assert status == -signal.SIGKILL
    status, said = stop_in_training([*options, "--out", cut], signal.SIGINT, tmp_path)
    assert status == 130 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("interrupted") and not (cut / "table.md").exists()
    main(*options, "--out", cut)
    name = "mean_teacher-seed0"
    assert bits(whole / f"{name}.pt") == bits(cut / f"{name}.pt")
    for file in ("metrics.csv", "table.md", f"{name}.csv"):
        assert (whole / file).read_text() == (cut / file).read_text()
    # A kill can leave a temporary file, but nothing else.
    left = {path.name for path in cut.iterdir() if not path.name.endswith(".part")}
    assert left == {path.name for path in whole.iterdir()}

@pytest.mark.parametrize("hours, stays", [(0.1, True), (2, False)])
def test_a_temporary_file_is_deleted_only_when_no_process_can_be_writing_it(
        little, tmp_path, hours, stays):
    part = tmp_path / ".supervised-seed0.pt.12345.part"
    part.write_bytes(b"half a checkpoint")
    before = time.time() - 3600 * hours
    os.utime(part, (before, before))
    main(*little, "--method", "supervised", "--out", tmp_path)
    assert part.exists() == stays
    assert [path.name for path in tmp_path.glob(".*") if path != part] == []

def test_two_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path, pids = tmp_path / "config.json", iter([11, 22, 33])

    def process():
        pid = next(pids)
        monkeypatch.setattr(os, "getpid", lambda: pid)

        def write(file):
            file.write(b"of process %d" % pid)
            if pid != 33:                                # another one writes meanwhile
                process()
                monkeypatch.setattr(os, "getpid", lambda: pid)

        mt.save(path, write)
        assert path.read_bytes() == b"of process %d" % pid

    process()
    assert snapshot(tmp_path) == {path: b"of process 11"}

def test_more_runs_and_another_method_join_those_of_the_folder(little, tmp_path):
    options = [*little, "--out", tmp_path]
    main(*options, "--method", "supervised")
    before = snapshot(tmp_path)
    scores = main(*options, "--method", "supervised", "--runs", 2)["scores"]
    assert len(scores["supervised"]["dice"]) == 2
    scores = main(*options, "--method", "both", "--runs", 2, "--device", "cpu")["scores"]
    assert {len(values["dice"]) for values in scores.values()} == {2} and len(scores) == 3
    main(*options, "--method", "supervised", "--seed", 5)
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "supervised-seed0.pt", "supervised-seed1.pt", "supervised-seed5.pt",
        "mean_teacher-seed0.pt", "mean_teacher-seed1.pt"}
    first = tmp_path / "supervised-seed0.pt"
    assert first.read_bytes() == before[first]           # nothing is trained twice

@pytest.fixture(scope="session")
def short_run(little, tmp_path_factory):
    """One short training of one method. -> folder, to be copied"""
    folder = tmp_path_factory.mktemp("short_run") / "out"
    main(*little, "--method", "supervised", "--out", folder)
    return folder

@pytest.mark.parametrize("changes, names", [
    ("--lr 0.5", "lr"), ("--lr 0.5 --noise 1", "lr, noise"), ("--epochs 2", "epochs"),
    ("--split-seed 1", "split_seed"), ("--label 1 2", "label"), ("--seed 5 --lr 1", "lr"),
    ("--method mean_teacher --width 3", "width"), ("--unlabelled site1-sc11", "unlabelled"),
    ("--steps 3", "steps"), ("--runs 2 --threshold 0.4", "threshold")])
def test_other_settings_are_refused_with_the_names_of_the_fields(
        little, short_run, tmp_path, capsys, changes, names):
    out = shutil.copytree(short_run, tmp_path / "out")
    before = snapshot(out)
    options = [*little, "--method", "supervised", "--out", out, *changes.split()]
    error = refused(capsys, *options)
    assert f"{out}: has runs with other {names}; choose another --out" in error
    assert snapshot(out) == before

def test_moved_and_differently_spelt_data_are_the_same_data(little, short_run, tmp_path,
                                                            monkeypatch):
    out = shutil.copytree(short_run, tmp_path / "out")
    data = shutil.copytree(little[1], tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for spelling in (f"{data}/", f"../{tmp_path.name}/data"):
        main("--data", spelling, *LITTLE, "--method", "supervised", "--runs", 2, "--out", out)
    data.rename(tmp_path / "moved")
    main("--data", "moved", *LITTLE, "--method", "supervised", "--runs", 2, "--out", out)
    first = "supervised-seed0.pt"
    assert (out / first).read_bytes() == (short_run / first).read_bytes()

def one_more_subject(data):
    write_scan(7, data / "test/site1-sc12-image.nii.gz", [])

def another_mask(data):
    path = next(data.rglob("site1-sc01-mask-r4.nii.gz"))
    mask = cord(1)[1]
    mask[:, :, 1] = 0                                    # one labelled slice less
    write_nifti(path, mask)

@pytest.mark.parametrize("change", [one_more_subject, another_mask])
def test_a_folder_is_not_continued_with_other_slices(little, short_run, tmp_path, capsys, change):
    out = shutil.copytree(short_run, tmp_path / "out")
    data = shutil.copytree(little[1], tmp_path / "data")
    change(data)
    before = snapshot(out)
    options = ["--data", data, *LITTLE, "--method", "supervised", "--out", out]
    assert "has runs with other the slices of split 0" in refused(capsys, *options)
    assert snapshot(out) == before

@pytest.mark.parametrize("content, message", [
    (None, "no config.json"), (b"", "config.json: cannot be read"), (b"{", "cannot be read"),
    (b"[1]", "cannot be read"), (b"7", "cannot be read"), (b"{}", "cannot be read"),
    (b'{"config": 3, "slices": {}}', "cannot be read"), (b"\xff\xfe", "cannot be read"),
    (b'{"config": {}, "slices": {}}', "has runs with other spacing, crop")])
def test_a_folder_with_runs_and_without_a_sound_config_is_refused(
        little, short_run, tmp_path, capsys, content, message):
    out = shutil.copytree(short_run, tmp_path / "out")
    (out / "config.json").unlink()
    if content is not None:
        (out / "config.json").write_bytes(content)
    before = snapshot(out)
    error = refused(capsys, *little, "--method", "supervised", "--out", out)
    assert message in error and "--overwrite" in error
    assert snapshot(out) == before

def test_overwrite_deletes_all_old_runs_of_the_folder_and_keeps_other_files(little, tmp_path):
    main(*little, "--method", "supervised", "--runs", 2, "--out", tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    old = (tmp_path / "supervised-seed0.pt").read_bytes()
    main(*little, "--method", "mean_teacher", "--lr", 0.5, "--out", tmp_path, "--overwrite")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "mean_teacher-seed0.pt", "mean_teacher-seed0.csv", "table.md",
                     "metrics.csv", "curves.png", "examples.png", "notes.txt"}
    main(*little, "--method", "supervised", "--lr", 0.5, "--out", tmp_path)
    assert (tmp_path / "supervised-seed0.pt").read_bytes() != old

def test_an_interrupted_overwrite_goes_on_without_overwrite(little, tmp_path, monkeypatch):
    options = [*little, "--runs", 2, "--method", "supervised", "--out", tmp_path]
    main(*options)
    real = mt.train

    def stop(config, method, seed, data):
        if seed == 1:
            raise KeyboardInterrupt
        return real(config, method, seed, data)

    with monkeypatch.context() as patch:
        patch.setattr(mt, "train", stop)
        with pytest.raises(SystemExit) as end:
            main(*options, "--lr", 0.5, "--overwrite")
    assert end.value.code == 130
    left = {path.name for path in tmp_path.glob("*-seed*")} | {
        path.name for path in tmp_path.glob("*.[mp][dn]*")}
    assert left == {"supervised-seed0.pt", "supervised-seed0.csv"}       # nothing of the old runs
    mixed = main(*options, "--lr", 0.5)
    whole = main(*options[:-1], tmp_path / "whole", "--lr", 0.5)
    assert mixed["scores"] == whole["scores"]

def test_overwrite_is_refused_under_torchrun_and_for_bad_data_before_it_deletes(
        little, short_run, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(short_run, tmp_path / "out")
    before = snapshot(out)
    assert "no such folder" in refused(capsys, "--data", tmp_path / "none", *LITTLE, "--out", out,
                                       "--overwrite")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "--overwrite: not under torchrun" in refused(capsys, *little, "--out", out,
                                                        "--overwrite")
    assert snapshot(out) == before

@pytest.mark.parametrize("command", ["train", "predict"])
def test_a_checkpoint_of_another_network_is_refused_as_such(
        little, short_run, tmp_path, capsys, monkeypatch, command):
    out = shutil.copytree(short_run, tmp_path / "out")
    before = snapshot(out)
    monkeypatch.setattr(mt, "build_network", lambda config: nn.Conv2d(1, 1, 3, padding=1))
    options = [*little, "--method", "supervised", "--out", out]
    if command == "predict":
        write_nifti(tmp_path / "i.nii.gz", cord(1)[0])
        options = ["predict", tmp_path / "i.nii.gz", "--checkpoint", out / "supervised-seed0.pt",
                   "--output", tmp_path / "m.nii.gz"]
    error = refused(capsys, *options)
    assert "supervised-seed0.pt: holds another network than build_network() makes" in error
    assert "delete" not in error
    for path in out.glob("*.pt"):
        assert path.read_bytes() == before[path]

def test_a_checkpoint_that_does_not_exist_is_called_that(tmp_path, capsys):
    write_nifti(tmp_path / "i.nii.gz", cord(1)[0])
    error = refused(capsys, "predict", tmp_path / "i.nii.gz", "--checkpoint", tmp_path / "no.pt",
                    "--output", tmp_path / "m.nii.gz")
    assert "no.pt" in error and "No such file" in error and "version" not in error

def test_the_progress_line_shows_a_diverged_loss_and_a_dash_for_what_does_not_exist(capsys):
    nan = math.nan
    mt.print_progress({"epoch": 3, "step": 40, "dice_loss": nan, "consistency_loss": nan,
                       "val_student": 71.25, "val_teacher": nan}, 90)
    assert capsys.readouterr().out.split() == ["3", "40", "nan", "-", "71.25", "-", "1.5"]

@pytest.mark.parametrize("content, message", [
    ({"a": 1}, "not a checkpoint"), ("renamed", "holds mean_teacher, seed 0")])
def test_a_foreign_checkpoint_in_the_folder_is_refused_and_kept(
        little, short_run, checkpoint, tmp_path, capsys, content, message):
    out = shutil.copytree(short_run, tmp_path / "out")
    if content == "renamed":
        shutil.copy(checkpoint, out / "supervised-seed0.pt")
    else:
        torch.save(content, out / "supervised-seed0.pt")
    before = snapshot(out)
    error = refused(capsys, *little, "--method", "supervised", "--out", out)
    assert f"supervised-seed0.pt: {message}" in error
    for path in out.glob("*.pt"):
        assert path.read_bytes() == before[path]

def test_a_full_disk_leaves_the_checkpoint_that_was_there(little, tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.pt"
    mt.save(path, lambda file: file.write(b"good"))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        mt.save(path, lambda file: file.write(b"bad"))
    assert snapshot(tmp_path) == {path: b"good"}
    assert "No space left on device" in refused(capsys, *little, "--out", tmp_path / "out")

def test_torchrun_deals_out_the_runs_and_the_same_command_resumes_a_failure(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_bids(tmp_path / "study", ["sub-a", "sub-b"])   # no validation, nobody unlabelled
    options = ["--data", "study", *LITTLE, "--train", "sub-a", "--test", "sub-b", "--runs", 3]
    main(*options, "--out", "one")
    one, two = tmp_path / "one", tmp_path / "two"
    (two / "supervised-seed1.csv").mkdir(parents=True)   # so that it cannot be written
    done = run(*options, "--out", "two", cwd=tmp_path, code=None, processes=2)
    assert "error: " in done.stderr and "supervised-seed1.csv" in done.stderr
    assert not (two / "table.md").exists()
    (two / "supervised-seed1.csv").rmdir()
    run(*options, "--out", "two", cwd=tmp_path, processes=2)
    for name in ("table.md", "metrics.csv"):
        assert (one / name).read_text() == (two / name).read_text()
    table = (one / "table.md").read_text()
    assert all(f"| {row} " in table for row in mt.LABELS.values())

# --- Results -------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def finished(little, tmp_path_factory):
    """Both methods with the seeds 3 and 4. -> arguments, folder, what main returned"""
    folder = tmp_path_factory.mktemp("finished") / "out"
    arguments = [*little, "--spacing", 0.5, "--epochs", 10, "--batch", 1, "--threshold", 0.4,
                 "--lr", 0.02, "--alpha", 0.8, "--alpha-late", 0.8]
    result = main(*arguments, "--seed", 3, "--runs", 2, "--out", folder)
    return arguments, folder, result

def read_metrics(folder):
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))

def test_seed_and_runs_say_which_runs_are_trained_and_which_are_reported(finished, tmp_path):
    arguments, folder, result = finished
    names = {f"{method}-seed{seed}.{end}" for method in mt.METHODS for seed in (3, 4)
             for end in ("pt", "csv")}
    assert {path.name for path in folder.glob("*-seed*")} == names
    assert {row["seed"] for row in read_metrics(folder)} == {"3", "4"}
    assert {len(values["dice"]) for values in result["scores"].values()} == {2}
    shutil.copytree(folder, tmp_path / "out")
    for seed, place in ((3, 0), (4, 1)):
        less = main(*arguments, "--seed", seed, "--runs", 1, "--out", tmp_path / "out")
        for model, values in less["scores"].items():
            assert values["dice"] == [result["scores"][model]["dice"][place]]
        assert {row["seed"] for row in read_metrics(tmp_path / "out")} == {str(seed)}
    assert {path.name for path in (tmp_path / "out").glob("*-seed*")} == names
    assert bits(folder / "mean_teacher-seed3.pt") != bits(folder / "mean_teacher-seed4.pt")

def test_a_row_of_the_metrics_is_that_slices_metric(finished):
    arguments, folder, _ = finished
    config, _ = mt.parse([*map(str, arguments)])
    slices = mt.load_data(config)["test"]
    rows = read_metrics(folder)
    found = {}
    for row in rows:
        found[row["method"], row["seed"], row["model"], row["slice"]] = row
    networks = [("supervised", "student"), ("mean_teacher", "student"),
                ("mean_teacher", "teacher")]
    assert len(found) == len(rows) == 2 * 3 * 3          # seeds, networks, slices
    values = set()
    for (method, model), seed in itertools.product(networks, ("3", "4")):
        run = torch.load(folder / f"{method}-seed{seed}.pt", weights_only=True)
        network = network_of(config, run[model])
        expected = mt.evaluate(network, slices, config)
        for k, (site, name, z) in enumerate(slices.where):
            row = found[method, seed, model, str(z)]
            assert (row["site"], row["subject"]) == (site, name)
            for metric in mt.METRICS:
                assert float(row[metric]) == pytest.approx(expected[metric][k], rel=1e-5)
        values.add(tuple(expected["dice"]))
    assert len(values) == 6                              # no two networks have the same metrics

def table_of(text):
    """A Markdown table. -> {row: {column: text}}"""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")]
             for line in text.splitlines() if line.startswith("|")]
    return {line[0]: dict(zip(lines[0][1:], line[1:], strict=True)) for line in lines[2:]}

def test_the_table_holds_the_mean_and_std_over_runs_of_all_six_metrics(finished):
    _, folder, result = finished
    table = table_of((folder / "table.md").read_text())
    networks = {"supervised": ("supervised", "student"),
                "mean teacher (student)": ("mean_teacher", "student"),
                "mean teacher (teacher)": ("mean_teacher", "teacher")}
    assert result["scores"].keys() == networks.keys() <= table.keys()
    dice = {}
    for label, (method, model) in networks.items():
        columns = {name.lower(): text for name, text in table[label].items()}
        assert columns.keys() == {"dice", "miou", "accuracy", "precision", "recall",
                                  "specificity"}
        for metric, text in columns.items():
            means = [np.mean([float(row[metric]) for row in read_metrics(folder)
                              if (row["method"], row["model"]) == (method, model)
                              and row["seed"] == seed]) for seed in ("3", "4")]
            assert result["scores"][label][metric] == pytest.approx(means)
            assert text == f"{np.mean(means):.2f} ({np.std(means, ddof=1):.2f})"
            if metric == "dice":
                dice[label] = means
    lead = np.subtract(dice["mean teacher (teacher)"], dice["supervised"])
    error = np.std(lead, ddof=1) / math.sqrt(2)
    assert result["difference"] == pytest.approx((lead.mean(), error))
    assert abs(lead.mean()) > 0.1 and error > 0.1
    text = (folder / "table.md").read_text()
    assert result["table"] == text
    assert f"{lead.mean():+.2f} Dice" in text and f"standard error {error:.2f}" in text

@pytest.mark.parametrize("world", [2, 3])
def test_the_processes_of_torchrun_share_the_seeds_and_train_both_methods_of_each(
        little, tmp_path, monkeypatch, world):
    real, shares, results = mt.train, [], []

    def recorded(config, method, seed, *others, **options):
        shares[-1].append((method, seed))
        return real(config, method, seed, *others, **options)

    monkeypatch.setattr(mt, "train", recorded)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        shares.append([])
        results.append(main(*little, "--runs", 3, "--seed", 5, "--out", tmp_path))
    seeds = []
    for share in shares:
        of_one = {seed for _, seed in share}
        assert sorted(share) == sorted(itertools.product(mt.METHODS, of_one))
        seeds += of_one
    assert sorted(seeds) == [5, 6, 7]                    # every one of them once
    assert {len(share) for share in shares} == ({2, 4} if world == 2 else {2})
    assert results[:-1] == [None] * (world - 1)          # the last one reports
    assert {len(values["dice"]) for values in results[-1]["scores"].values()} == {3}

@pytest.mark.filterwarnings("error")
def test_one_method_alone_is_trained_and_reported(little, tmp_path):
    for method, labels in (("supervised", {"supervised"}), ("mean_teacher", {
            "mean teacher (student)", "mean teacher (teacher)"})):
        result = main(*little, "--method", method, "--out", tmp_path / method)
        assert result["scores"].keys() == labels and result["difference"] is None
        assert [path.name for path in (tmp_path / method).glob("*.pt")] == [f"{method}-seed0.pt"]

def test_the_folder_says_which_settings_and_slices_its_runs_have(finished):
    arguments, folder, _ = finished
    record = json.loads((folder / "config.json").read_text())
    config, _ = mt.parse([*map(str, arguments)])
    data = mt.load_data(config)
    assert record.keys() == {"config", "slices"}
    expected = {**vars(config), "seed": 3, "runs": 2, "out": str(folder)}
    assert mt.Config(**{name: tuple(value) if isinstance(value, list) else value
                        for name, value in record["config"].items()}) == mt.Config(**expected)
    slices, = record["slices"].values()
    for name, part in data.items():
        assert [tuple(place) for place in slices[name]] == part.where

# --- Results: a split for every run --------------------------------------------------------------

@pytest.fixture(scope="session")
def splits(tmp_path_factory):
    """Six subjects of one site, of which every run trains with one and tests one. -> arguments"""
    folder = tmp_path_factory.mktemp("splits")
    write_scgm(folder, subjects=(1, 2, 3, 4, 5, 6, 11))
    return ["--data", folder, *LITTLE, "--spacing", 0.5, "--epochs", 2, "--lr", 0.02]

@pytest.fixture(scope="session")
def own_splits(splits, tmp_path_factory):
    """The runs with the seeds 3 and 4, each on its own split. -> folder, what main returned"""
    folder = tmp_path_factory.mktemp("own_splits") / "out"
    result = main(*splits, "--split-seed", -1, "--seed", 3, "--runs", 2, "--out", folder)
    return folder, result

def test_split_seed_minus_1_gives_each_run_the_split_of_its_seed(splits, own_splits):
    folder, _ = own_splits
    rows = read_metrics(folder)
    tested = {}
    for seed in (3, 4):
        data = mt.load_data(mt.parse([*map(str, splits), "--split-seed", str(seed)])[0])
        found = {(row["subject"], int(row["slice"])) for row in rows if row["seed"] == str(seed)}
        assert found == {(scan, z) for _, scan, z in data["test"].where}
        tested[seed] = {scan for scan, _ in found}
    assert tested[3] != tested[4]

@pytest.mark.parametrize("seed, place", [(3, 0), (4, 1)])
def test_a_run_on_its_own_split_equals_running_that_split_alone(
        splits, own_splits, tmp_path, seed, place):
    folder, result = own_splits
    alone = main(*splits, "--split-seed", seed, "--seed", seed, "--out", tmp_path)
    for label, values in alone["scores"].items():
        assert values["dice"] == [result["scores"][label]["dice"][place]]
    for method in mt.METHODS:
        one, other = (torch.load(path / f"{method}-seed{seed}.pt", weights_only=True)
                      for path in (folder, tmp_path))
        assert same(one["student"], other["student"])
        assert one["metrics"] == other["metrics"]

def test_runs_on_their_own_splits_are_continued_by_a_command_with_more_runs(
        splits, own_splits, tmp_path, monkeypatch):
    folder, result = own_splits
    shutil.copytree(folder, tmp_path / "out")
    trained, real = [], mt.train_step

    def counted(*arguments, **options):
        trained.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(mt, "train_step", counted)
    options = [*splits, "--split-seed", -1, "--out", tmp_path / "out"]
    again = main(*options, "--seed", 3, "--runs", 2)
    assert again["scores"] == result["scores"] and trained == []
    more = main(*options, "--seed", 3, "--runs", 3)
    assert len(trained) == 2 * 2 * 1                     # one run of two methods, two epochs
    for label, values in more["scores"].items():
        assert values["dice"][:2] == result["scores"][label]["dice"]
    fewer = main(*options, "--seed", 4)                  # and a part of them can be reported
    for label, values in fewer["scores"].items():
        assert values["dice"] == result["scores"][label]["dice"][1:]

def test_one_split_for_all_and_a_split_for_each_are_not_mixed(splits, own_splits, capsys):
    folder, _ = own_splits
    before = snapshot(folder)
    error = refused(capsys, *splits, "--split-seed", 3, "--seed", 3, "--out", folder)
    assert "other split_seed" in error and snapshot(folder) == before

# --- Results: names and pictures -----------------------------------------------------------------

@pytest.mark.parametrize("name", [
    "Scan 1, left", 'the "second"', "$\\frac$ of $x$", "M\u00fcller \u0416", "a;b'c", "50 % #4"])
def test_names_are_text_in_all_results_whatever_is_in_them(tmp_path, figures, name):
    write_decathlon(tmp_path / "data", (name, "plain"))
    out = tmp_path / "out"
    main("--data", tmp_path / "data", *LITTLE, "--spacing", 0.5, "--train", "plain", "--test",
         name, "--method", "supervised", "--out", out)
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and {len(row) for row in rows} == {6 + len(mt.METRICS)}
    assert {row["subject"] for row in rows} == {name}
    labels = [axis.xaxis.label for axis in figures[-1].axes[::3]]
    assert [label.get_text() for label in labels] == [f"{name}, slice {z}" for z in range(3)]
    assert [label.get_parse_math() for label in labels] == [False] * 3
    assert json.loads((out / "config.json").read_text())["config"]["test"] == [name]

@pytest.mark.parametrize("count, shown", [(1, 3), (2, 3), (3, 3), (4, 4)])
def test_the_examples_are_evenly_spaced_test_slices(tmp_path, figures, count, shown):
    write_scgm(tmp_path / "data", subjects=range(1, count + 2))
    config, _ = mt.parse(["--data", str(tmp_path / "data"), *LITTLE, "--spacing", "0.5",
                          "--split", "1", "0", str(count)])
    slices = mt.load_data(config)["test"]
    main("--data", tmp_path / "data", *LITTLE, "--spacing", 0.5, "--split", 1, 0, count,
         "--method", "supervised", "--out", tmp_path / "out")
    picked = []
    for axis in figures[-1].axes[::3]:                   # image, rater, supervised
        image = axis.images[0].get_array()
        picked.append([np.array_equal(image, other[0]) for other in slices.images].index(True))
    distances = {after - before for before, after in zip(picked, picked[1:])}
    assert len(slices.where) == 3 * count and len(picked) == shown
    assert picked[0] == 0 and len(distances) == 1 and picked[-1] >= len(slices.where) * 2 // 3

@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved, by the order in which they are."""
    real, saved = Figure.savefig, []

    def recorded(figure, *arguments, **options):
        saved.append(figure)
        return real(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", recorded)
    return saved

def edges_of(mask):
    """The places (x, y) half way between two neighbouring pixels of which one is in the mask."""
    rows, columns = np.nonzero(mask[:, :-1] != mask[:, 1:])
    places = {(column + 0.5, float(row)) for row, column in zip(rows, columns)}
    rows, columns = np.nonzero(mask[:-1] != mask[1:])
    return places | {(float(column), row + 0.5) for row, column in zip(rows, columns)}

def outline_in(axis):
    """The places (x, y) that the contours in a panel go through."""
    paths = [path for contours in axis.collections for path in contours.get_paths()]
    return {(x, y) for path in paths for x, y in path.vertices.tolist()}

def test_the_pictures_show_the_log_and_the_outlines_on_test_slices(
        finished, tmp_path, figures):
    arguments, folder, _ = finished
    shutil.copytree(folder, tmp_path / "out")
    main(*arguments, "--seed", 3, "--runs", 2, "--out", tmp_path / "out")
    curves, examples = figures
    # Every column of every log is a line over the training step; without validation subjects
    # there is no validation score.
    lines = [line for axis in curves.axes for line in axis.lines]
    found = sorted(line.get_xydata().tolist() for line in lines)
    expected = []
    for path in folder.glob("*-seed*.csv"):
        rows = read_log(path)
        for column in ("dice_loss", "consistency_loss"):
            if not math.isnan(rows[0][column]):
                expected.append([[row["step"], row[column]] for row in rows])
    assert len(found) == 6
    assert np.allclose(found, sorted(expected))
    # Of the examples, each row is a test slice: image, rater, and the networks' outlines
    config, _ = mt.parse([*map(str, arguments)])
    slices = mt.load_data(config)["test"]
    dice, masks = {}, {"rater": slices.masks}
    for method, model in (("supervised", "student"), ("mean_teacher", "teacher")):
        run = torch.load(folder / f"{method}-seed3.pt", weights_only=True)
        dice[method] = run["metrics"][model]["dice"]
        probabilities = mt.predict_probabilities(network_of(config, run[model]), slices.images)
        masks[method] = probabilities > 0.4
    assert len(examples.axes) == 3 * 4
    shown = []
    for row in range(3):
        image, rater, supervised, teacher = examples.axes[4 * row:4 * row + 4]
        pictures = [axis.images[0].get_array() for axis in (image, rater, supervised, teacher)]
        k, = [k for k in range(3) if np.array_equal(pictures[0], slices.images[k, 0])]
        assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
        assert image.get_xlabel() == f"{slices.where[k][1]}, slice {slices.where[k][2]}"
        assert f"{dice['supervised'][k]:.1f}" in supervised.get_xlabel()
        assert f"{dice['mean_teacher'][k]:.1f}" in teacher.get_xlabel()
        assert not outline_in(image)
        for axis, name in ((rater, "rater"), (supervised, "supervised"),
                           (teacher, "mean_teacher")):
            outline = edges_of(masks[name][k, 0].numpy())
            assert outline and outline_in(axis) == outline
        shown.append(k)
    assert shown == [0, 1, 2]

def test_the_curves_show_the_validation_scores_of_the_epochs_that_have_one(
        tmp_path, figures):
    write_scgm(tmp_path / "data", subjects=(1, 2, 3, 11))
    options = [*LITTLE, "--split", 1, 1, 1, "--epochs", 5, "--validate-every", 2]
    main("--data", tmp_path / "data", *options, "--spacing", 0.5, "--out", tmp_path / "out")
    lines = [line.get_xydata().tolist() for axis in figures[0].axes for line in axis.lines]
    expected = []
    for method in mt.METHODS:
        rows = read_log(tmp_path / f"out/{method}-seed0.csv")
        for column in ("val_student", "val_teacher"):
            if not math.isnan(rows[0][column]):
                expected.append([[row["step"], row[column]] for row in rows if row[column] >= 0])
    found = sorted(line for line in lines if len(line) == 4)             # the other have 5 points
    assert [[x for x, _ in points] for points in expected] == [
        [row["step"] for row in rows if row["epoch"] in (1, 2, 4, 5)]] * 3
    assert len(found) == 3 and np.allclose(found, sorted(expected))

# --- Predict -------------------------------------------------------------------------------------

class Bright(nn.Module):
    """Knows a structure by its brightness, in standard deviations above the mean."""

    def __init__(self, level=3.3):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, x):
        return 20 * (x - self.level)

@pytest.mark.parametrize("axes", ["RAS", "LPS", "SRA", "PIL"])
@pytest.mark.parametrize("place", ["centre", "border", "outside"])
def test_predict_on_a_scans_own_grid_and_warns_at_the_border_of_the_crop(
        tmp_path, capsys, axes, place, monkeypatch):
    monkeypatch.setattr(mt, "build_network", lambda config: Bright())
    config = dataclasses.replace(mt.DEMO, spacing=0.35, crop=64)         # 22.4 mm
    scan, checkpoint, output = (tmp_path / name for name in ("i.nii.gz", "c.pt", "m.nii.gz"))
    torch.save({"config": vars(config), "method": "supervised", "seed": 0, "where": [],
                "history": [], "student": Bright().state_dict()}, checkpoint)
    volume = np.random.default_rng(0).uniform(0, 10, (101, 120, 3)).astype(np.float32)
    # To the right and behind of the centre, voxel (50, 59.5): by 4 and 7 mm, by 10 and by 25 mm.
    # The crop ends at 11.2 mm. The scan is slightly tilted.
    left, back = {"centre": (54, 47), "border": (54, 42), "outside": (62, 22)}[place]
    volume[left:left + 5, back:back + 5, 1] = 200.0
    image = nib.Nifti1Image(volume, turned(0.07, 9, 5, 1) @ np.diag([0.7, 0.7, 4, 1]))
    image = image.as_reoriented(nib.orientations.axcodes2ornt(axes))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, scan)
    main("predict", scan, "--checkpoint", checkpoint, "--output", output)
    said, mask = capsys.readouterr().out, nib.load(output)
    found, expected = mask.get_fdata(), image.get_fdata() > 50
    if place == "centre":
        assert "warning" not in said and np.array_equal(found, expected)     # on the same grid
    elif place == "border":
        assert f"warning: {scan}: foreground at the border of the centre crop of 64 px" in said
        assert 0 < found.sum() < expected.sum() and not (found > expected).any()
    else:
        assert f"warning: {scan}: no foreground in the centre crop of 64 px" in said
        assert not found.any()
    assert mask.get_data_dtype() == np.uint8
    for key in ("sform_code", "qform_code", "xyzt_units", "pixdim", "srow_x", "srow_y", "srow_z"):
        assert np.allclose(mask.header[key], image.header[key], atol=1e-6), key

@pytest.fixture(scope="session")
def checkpoint(little, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    main(*little, "--epochs", 40, "--out", out)
    return out / "mean_teacher-seed0.pt"

def test_predict_returns_the_masks_path_and_overwrites_only_when_told(
        checkpoint, tmp_path, capsys):
    scan, output = tmp_path / "a.nii.gz", tmp_path / "new/m.nii.gz"
    write_nifti(scan, cord(1)[0])
    command = ["predict", scan, "--checkpoint", checkpoint, "--output"]
    assert main(*command, output) == output
    foreground = int(nib.load(output).get_fdata().sum())
    assert 0 < foreground < math.prod(SHAPE)
    assert f"{output}: {foreground} voxels of foreground" in capsys.readouterr().out
    files = snapshot(tmp_path)
    assert f"{output}: already exists; use --overwrite" in refused(capsys, *command, output)
    assert f"{scan}: is the scan" in refused(capsys, *command, scan, "--overwrite")
    assert "ends in .nii or .nii.gz" in refused(capsys, *command, tmp_path / "mask.png")
    assert snapshot(tmp_path) == files
    main(*command, output, "--overwrite")
    assert snapshot(tmp_path) == files                   # the same scan, the same bytes

def test_a_mask_is_written_without_compression_if_its_name_says_so(checkpoint, tmp_path):
    write_nifti(tmp_path / "a.nii.gz", cord(1)[0])
    command = ["predict", tmp_path / "a.nii.gz", "--checkpoint", checkpoint, "--output"]
    for name in ("m.nii", "m.nii.gz"):
        main(*command, tmp_path / name)
    content = (tmp_path / "m.nii").read_bytes()
    assert content == gzip.decompress((tmp_path / "m.nii.gz").read_bytes())
    assert np.array_equal(nib.load(tmp_path / "m.nii").get_fdata(),
                          nib.load(tmp_path / "m.nii.gz").get_fdata())

def test_predict_reads_a_scan_with_a_trailing_axis_like_one_without(checkpoint, tmp_path):
    volume, masks = cord(1)[0], []
    for name, shape in (("a", SHAPE), ("b", (*SHAPE, 1))):
        nib.save(nib.Nifti1Image(volume.reshape(shape), GRID), tmp_path / f"{name}.nii.gz")
        output = tmp_path / f"m{name}.nii.gz"
        main("predict", tmp_path / f"{name}.nii.gz", "--checkpoint", checkpoint, "--output",
             output)
        masks.append(nib.load(output).get_fdata())
    assert masks[0].any() and np.array_equal(masks[0], masks[1].reshape(SHAPE))

@pytest.mark.parametrize("command, said", [
    ("predict", "interrupted; no mask was written"),
    ("train", "interrupted; the same command without --overwrite continues the training")])
def test_ctrl_c_says_what_it_means_for_the_command(
        checkpoint, little, tmp_path, capsys, monkeypatch, command, said):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(mt, "train_step", interrupted)
    monkeypatch.setattr(mt, "predict_volume", interrupted)
    write_nifti(tmp_path / "a.nii.gz", cord(1)[0])
    options = [*little, "--out", tmp_path / "out"]
    if command == "predict":
        options = ["predict", tmp_path / "a.nii.gz", "--checkpoint", checkpoint, "--output",
                   tmp_path / "m.nii.gz"]
    with pytest.raises(SystemExit) as stop:
        main(*options)
    printed = capsys.readouterr()
    assert stop.value.code == 130 and "Traceback" not in printed.err
    assert printed.out.splitlines()[-1] == said
    assert not (tmp_path / "m.nii.gz").exists()

def on_the_grid(probabilities, slices, config, shape):
    """Probabilities (N, 1, H, W) of a scan's slices in a volume of that shape, 0 elsewhere.

    The volume is in RAS order, its voxels are of the config's spacing, and the crop lies within.
    """
    volume = np.zeros(shape)
    left, back = (shape[0] - config.crop) // 2, (shape[1] - config.crop) // 2
    for image, (_, _, z) in zip(probabilities, slices.where, strict=True):
        part = image[0].flip(0).T                        # rows from the front: (X, Y)
        volume[left:left + config.crop, back:back + config.crop, z] = part
    return volume

@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_predict_is_the_teacher_on_the_slices_of_read_scan(little, tmp_path, threshold):
    options = ["--method", "mean_teacher", "--spacing", 0.5, "--batch", 1, "--epochs", 6,
               "--lr", 0.02, "--alpha", 0.6, "--alpha-late", 0.6, "--threshold", threshold]
    main(*little, *options, "--out", tmp_path / "out")
    checkpoint = tmp_path / "out/mean_teacher-seed0.pt"
    run = torch.load(checkpoint, weights_only=True)
    config = mt.Config(**run["config"])
    masks = []
    for seed in (1, 2):
        volume, _ = cord(seed, (40, 36, 5))
        volume[:, :, 3] = 0                              # an empty slice, not in the middle
        scan = bids_scan(tmp_path / f"study{seed}", volume)
        slices = mt.read_scan(scan, config, False)
        assert [place[2] for place in slices.where] == [0, 1, 2, 4]
        expected = {}
        for model in ("student", "teacher"):
            network = network_of(config, run[model])
            probabilities = mt.predict_probabilities(network, slices.images)
            expected[model] = on_the_grid(probabilities, slices, config, volume.shape)
        output = tmp_path / f"mask{seed}.nii.gz"
        main("predict", scan.image, "--checkpoint", checkpoint, "--output", output)
        found = nib.load(output).get_fdata()
        assert np.array_equal(found, expected["teacher"] > threshold)
        assert 0 < found.sum() < 4 * config.crop ** 2 and not found[:, :, 3].any()
        # Not so the student, another threshold, or the slices from above.
        assert not np.array_equal(found, expected["student"] > threshold)
        assert not np.array_equal(found, expected["teacher"] > 0.8 - threshold)
        assert not np.array_equal(found, found[:, :, ::-1])
        masks.append(found)
    assert not np.array_equal(*masks)

def bright_checkpoint(folder, monkeypatch, level=3.3, **changes):
    """The checkpoint of a run whose network knows structures by their brightness. -> its path"""
    monkeypatch.setattr(mt, "build_network", lambda config: Bright(level))
    config = short(folder, epochs=(1,), lr=1e-9, **changes)
    mt.train(config, "supervised", 0, study())
    return folder / "supervised-seed0.pt"

@pytest.mark.parametrize("axes", ["RAS", "LPI"])
@pytest.mark.parametrize("shape", [
    (37, 41, 3), (45, 35, 2), (29, 27, 3), (31, 44, 1), (16, 33, 2)])
def test_a_structure_stays_in_place_whether_the_crop_cuts_or_pads_by_odd_numbers(
        tmp_path, monkeypatch, shape, axes):
    checkpoint = bright_checkpoint(tmp_path / "out", monkeypatch, crop=32, spacing=0.5)
    volume = np.random.default_rng(0).normal(5, 1, shape)
    x, y = shape[0] // 2 + 3, shape[1] // 2 - 5
    volume[x:x + 4, y:y + 2, -1] = 200.0
    scan = bids_scan(tmp_path / "study", volume, axes=axes)
    main("predict", scan.image, "--checkpoint", checkpoint, "--output", tmp_path / "m.nii.gz")
    mask = nib.load(tmp_path / "m.nii.gz")
    assert np.array_equal(mask.affine, nib.load(scan.image).affine)
    assert np.array_equal(nib.as_closest_canonical(mask).get_fdata(), volume > 150)

@pytest.mark.parametrize("size", [41, 40, 27])
def test_the_crop_of_read_scan_and_that_of_predict_are_the_same(tmp_path, size):
    config = fast(crop=32)
    mask = np.random.default_rng(1).random((size, size, 2)) < 0.2
    volume = 100.0 + 100 * mask
    scan = bids_scan(tmp_path, volume, mask)
    slices = mt.read_scan(scan, config, True)
    assert torch.equal(slices.images > 1, slices.masks > 0)
    found = mt.predict_volume(nib.load(scan.image), Bright(1.0), config)
    assert found.shape == volume.shape and found.dtype == np.float32
    assert (found > 0.5).sum() == slices.masks.sum()
    assert not ((found > 0.5) & ~mask).any()             # all of it is in its place

def test_predict_finds_nothing_in_a_slice_without_an_image(tmp_path, monkeypatch, capsys):
    # This network calls everything foreground, also the 0 that an empty slice is normalised to.
    checkpoint = bright_checkpoint(tmp_path / "out", monkeypatch, level=-9.0, spacing=0.5)
    volume = np.random.default_rng(0).normal(100, 1, (20, 20, 4))
    volume[:, :, 0] = volume[:, :, 2] = 0
    scan = bids_scan(tmp_path / "study", volume)
    capsys.readouterr()
    main("predict", scan.image, "--checkpoint", checkpoint, "--output", tmp_path / "m.nii.gz")
    found = nib.load(tmp_path / "m.nii.gz").get_fdata()
    assert found.sum((0, 1)).tolist() == [0, 256, 0, 256]            # the crop of 16 x 16
    assert "foreground at the border" in capsys.readouterr().out

# --- Bad input -----------------------------------------------------------------------------------

def file(folder, number=1, of="image"):
    return folder / f"data/training/site1-sc{number:02d}-{of}.nii.gz"

def content(change, of="image"):
    """Damage to the voxels v and the affine a of a scan's file; packed: to its bytes."""
    def damage(folder):
        image = nib.load(file(folder, of=of))
        voxels, affine = change(image.get_fdata(dtype=np.float32), image.affine)
        nib.save(nib.Nifti1Image(voxels, affine), file(folder, of=of))
    return damage

def packed(change):
    return lambda folder: file(folder).write_bytes(change(file(folder).read_bytes()))

def pixdim(mm):
    return packed(lambda b: gzip.compress(gzip.decompress(b)[:80] + np.float32(mm).tobytes()
                                          + gzip.decompress(b)[84:]))

def removed(pattern):
    return lambda folder: [path.unlink() for path in (folder / "data").rglob(pattern)]

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
    "truncated": (packed(lambda b: b[:len(b) // 2]), "", "sc01-image.nii.gz: cannot be read"),
    "not gzip": (packed(lambda b: b"hello" * 99), "", "sc01-image.nii.gz: cannot be read"),
    "not a NIfTI": (packed(lambda b: gzip.compress(b"hello" * 999)), "", "image.nii.gz: cannot"),
    "4-D": (content(lambda v, a: (v[..., None].repeat(2, 3), a)), "", "image.nii.gz: 4 dim"),
    "2-D": (content(lambda v, a: (v[..., 0], a)), "", "image.nii.gz: 2 dimensions"),
    "mask's shape": (content(lambda v, a: (v[:-1], a), "mask-r4"), "", "not on the grid"),
    "mask's affine": (content(lambda v, a: (v, a @ turned(1)), "mask-r4"), "", "not on the grid"),
    "NaN": (content(lambda v, a: (np.where(v > 120, np.nan, v), a)), "", "image.nii.gz: NaN or"),
    "infinite": (content(lambda v, a: (np.where(v > 120, np.inf, v), a)), "", "gz: NaN or inf"),
    "no grey matter": (content(lambda v, a: (0 * v, a), "mask-r4"), "",
                       "no foreground in the training or test set"),
    "zero voxel size": (pixdim(0), "", "sc01-image.nii.gz: cannot be read as NIfTI (He"),
    "negative size": (pixdim(-0.5), "", "pixdim[1,2,3] should be positive"),
    "singular affine": (content(lambda v, a: (v, a[:, [0, 0, 2, 3]])), "", "sc01-image.nii.gz"),
    "in two sets": (None, "--train site1-sc01 --test site1-sc01", "in --train and in --test"),
    "rater not there": (removed("*mask-r4*"), "", "image.nii.gz: no mask of rater 4"),
    "no such rater": (None, "--rater 7", "--rater"),
    "crop": (None, "--crop 20", "--crop 20: must be a multiple of 8"),
    "no epochs": (None, "--epochs 0", "--epochs 0: must be 1 to 1e+09"),
    "no runs": (None, "--runs 0", "--runs 0: must be 1 to"),
    "negative weight": (None, "--consistency-weight -1", "--consistency-weight -1.0: must be 0"),
    "NaN option": (None, "--lr nan", "--lr nan: must be"),
    "alpha above 1": (None, "--alpha 1.5", "--alpha 1.5: must be 0 to 1"),
    "background as label": (None, "--label 1 0", "--label 0: must be 1 to 255"),
    "not a number": (None, "--width wide", "--width"),
    "unknown option": (None, "--colour red", "--colour"),
    "device not there": (None, "--device abacus", "--device abacus: not available"),
    "device that does not compute": (None, "--device meta", "--device meta: not available"),
    "three numbers of epochs": (None, "--epochs 1 2 3", "--epochs and --weight-decay"),
    "absurd spacing": (None, "--spacing 1e-6", "--spacing 1e-06: must be 0.02 to"),
    "absurd crop": (None, "--crop 8000000", "--crop 8000000: must be 8 to 2048"),
    "split of two": (None, "--split 2 2", "--split (2, 2): expected three"),
    "output is a file": (lambda f: (f / "out").write_text("x"), "", "out"),
    "foreign checkpoint": (lambda f: (f / "out").mkdir() or torch.save(
        {"a": 1}, f / "out/supervised-seed0.pt"), "", "out: has runs but no config.json"),
    "steps fewer than epochs": (None, "--steps 3 --epochs 5", "--steps 3: must be at least --epo"),
    "negative steps": (None, "--steps -1", "--steps -1: must be 0 to"),
    "split seed below -1": (None, "--split-seed -2", "--split-seed -2: must be -1 to"),
    "one value per channel": (None, "--crop 8 --batch 1", "--crop 8 and a batch of one slice"),
    "one unlabelled value": (None, "--crop 8 --unlabelled-batch 1", "--crop 8 and a batch of one"),
    "no such contrast": (lambda f: [shutil.rmtree(f / "data"), write_bids(f / "data")],
                         "--contrast T1w", "CONTRAST T1w (see --contrast)"),
    "complex voxels": (content(lambda v, a: (v.astype(np.complex64), a)), "", "complex64 voxels"),
    "one voxel too far": (content(lambda v, a: (v, a @ np.diag([190, 1, 1, 1]))), "--spacing 0.1",
                          "38000 px along a side at --spacing 0.1"),
    "no labelsTr": (decathlon(lambda f: shutil.rmtree(f / "labelsTr")), "", "0 subjects with"),
    "half in labelsTr": (decathlon(lambda f: write_nifti(
        f / "labelsTr/a.nii.gz", np.full(SHAPE, 0.5))), "", "a.nii.gz: has values [0.5]"),
    "4-D in imagesTr": (decathlon(lambda f: nib.save(nib.Nifti1Image(
        np.ones((*SHAPE, 2)), GRID), f / "imagesTr/a.nii.gz")), "", "a.nii.gz: 4 dim"),
    "no mask has the label": (decathlon(lambda f: None), "--label 7 9", "--label"),
    "all faults at once": (lambda f: [file(f, k).write_bytes(b"x") for k in (1, 2)], "",
                           "sc01-image.nii.gz: cannot", "sc02-image.nii.gz: cannot"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_changes_nothing(case, tmp_path, capsys):
    damage, options, *messages = BAD[case]
    write_scgm(tmp_path / "data", subjects=(1, 2, 11))
    if damage:
        damage(tmp_path)
    before = snapshot(tmp_path)
    error = refused(capsys, "--data", tmp_path / "data", *LITTLE, "--out", tmp_path / "out",
                    *options.split())
    assert all(message in error for message in messages), error
    assert before.items() <= snapshot(tmp_path).items()

@pytest.mark.parametrize("mm", [0, -0.5])
def test_nibabel_prints_no_line_of_its_own_beside_the_error(tmp_path, capsys, mm):
    write_scgm(tmp_path / "data", subjects=(1, 2, 11))
    pixdim(mm)(tmp_path)
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    nib.imageglobals.logger.addHandler(handler)
    try:
        error = refused(capsys, "--data", tmp_path / "data", *LITTLE, "--out", tmp_path / "out")
    finally:
        nib.imageglobals.logger.removeHandler(handler)
    assert "pixdim" in error and printed.getvalue() == ""

class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil-was-here"),))

@pytest.mark.parametrize("case", ["missing", "empty", "truncated", "foreign", "pickle", "width"])
def test_bad_checkpoints_run_no_code(case, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, path = torch.load(checkpoint, weights_only=True), tmp_path / "c.pt"
    if case in ("empty", "truncated"):
        path.write_bytes(checkpoint.read_bytes()[:9999 if case == "truncated" else 0])
    elif case != "missing":
        torch.save({"foreign": {"state_dict": {}}, "pickle": {**state, "history": Evil()},
                    "width": {**state, "config": {**state["config"], "width": 3}}}[case], path)
    write_nifti(tmp_path / "i.nii.gz", cord(1)[0])
    assert "c.pt" in refused(capsys, "predict", "i.nii.gz", "--checkpoint", path, "--output",
                             tmp_path / "m.nii.gz")
    assert {p.name for p in tmp_path.iterdir()} <= {"c.pt", "i.nii.gz"}  # no mask, no evil

def test_a_process_ends_without_a_traceback(tmp_path):
    error = run("--data", "nowhere", cwd=tmp_path, code=2).stderr
    assert error.startswith("error: nowhere: no such folder") and error.count("\n") == 1
    assert not [*tmp_path.iterdir()]

def test_three_hundred_damaged_files(checkpoint, tmp_path, capsys):
    rng, outcomes, path = np.random.default_rng(0), [], tmp_path / "bad.nii.gz"
    write_nifti(path, cord(1)[0])
    good = gzip.decompress(path.read_bytes())
    command = ["predict", path, "--checkpoint", checkpoint, "--output", tmp_path / "m.nii.gz",
               "--overwrite"]
    for k in range(300):
        raw = bytearray(good)
        for _ in range(rng.integers(1, 6)):              # in the header alone, or anywhere
            raw[rng.integers(0, 352 if k % 3 else len(raw))] = rng.integers(0, 256)
        damaged = bytearray(gzip.compress(raw[:None if k % 7 else rng.integers(300, len(raw))]))
        if k % 11 == 0:                                  # and in the packing, too
            damaged[rng.integers(0, len(damaged))] ^= 0xFF
        path.write_bytes(damaged)
        begin = time.process_time()
        try:
            main(*command)
            outcomes.append(1)
        except SystemExit as stop:
            outcomes.append(0)
            error = capsys.readouterr().err
            assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        assert time.process_time() - begin < 10 and path.read_bytes() == damaged
    assert 30 < sum(outcomes) < 270

# --- The phantom ---------------------------------------------------------------------------------

def test_the_phantom_has_the_challenges_files_in_its_orientations_and_is_reproducible(tmp_path):
    studies = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        mt.write_phantom(tmp_path / name, seed=seed, sites=TINY, subjects=2)
        studies.append({path.name.removesuffix(".nii.gz"): nib.load(path)
                        for path in sorted((tmp_path / name).iterdir())})
    one, two, three = ({name: np.asanyarray(image.dataobj) for name, image in study.items()}
                       for study in studies)
    assert one.keys() == two.keys() and all(map(np.array_equal, one.values(), two.values()))
    assert not np.array_equal(one["site1-sc01-image"], three["site1-sc01-image"])
    assert one.keys() == {f"site{s}-sc{n:02d}-{kind}" for s in range(1, 5) for n in (1, 2)
                          for kind in ("image", "mask-r1", "mask-r2", "mask-r3", "mask-r4")
                          if kind == "image" or n == 1}
    for s, site in enumerate(TINY, start=1):
        image = studies[0][f"site{s}-sc01-image"]
        assert "".join(nib.aff2axcodes(image.affine)) == site.axes
        assert image.header.get_zooms() == pytest.approx((site.mm, site.mm, site.thick))
    with pytest.raises(mt.InputError, match="already exists"):
        mt.write_phantom(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "three", "two"]

@pytest.mark.parametrize("number", range(4))
def test_the_phantom_looks_like_a_cord(number):
    site, found = mt.SITES[number], []
    for seed in range(4):
        image, masks = mt.phantom_subject(site, torch.Generator().manual_seed(seed))
        inside = slice(site.black, len(image) - site.black)
        assert not image[:site.black].any() and not image[inside.stop:].any()
        raters, image, mask = masks[:, inside] == 1, image[inside].float(), masks[3, inside]
        assert site.slices[0] <= len(image) <= site.slices[1]
        grey, inner = mask == 1, -F.max_pool2d(-(mask > 0).float(), 5, 1, 2) > 0    # without CSF
        found.append([image[grey & inner].mean() / image[(mask == 2) & inner].mean(),
                      np.mean([2 * (a & b).sum() / (a.sum() + b.sum())
                               for a, b in itertools.combinations(raters, 2)]),
                      grey.sum() / len(grey) * site.mm ** 2,           # mm2; real ones: 12 to 17
                      (mask > 0).sum() / len(grey) * site.mm ** 2])    # the whole cord
    # Grey matter brighter than white, in real scans by 12 to 20 %; raters at a Dice of 0.8 to 0.88
    for (low, high), values in zip(((1.0, 1.35), (0.6, 0.95), (6, 28), (50, 130)), zip(*found)):
        assert low < min(values) and max(values) < high, values
    assert 1.06 < np.mean(found, 0)[0] < 1.24 and 0.74 < np.mean(found, 0)[1] < 0.9

@pytest.fixture(scope="session")
def whole_phantom(tmp_path_factory):
    """Two subjects of every site in full size, one of them with masks. -> their folder"""
    folder = tmp_path_factory.mktemp("phantom") / "whole"
    mt.write_phantom(folder, subjects=2)
    return folder

def read_phantom(folder, site, subject, name):
    """A file of the phantom. -> nibabel image in RAS order, voxels (X, Y, Z) in float"""
    image = nib.load(folder / f"site{site}-sc{subject:02d}-{name}.nii.gz")
    return image, nib.as_closest_canonical(image).get_fdata()

def grey_and_white(image, mask):
    """Brightness of the grey and of the white voxels (X, Y) inside of the cord, 2 px off its edge.
    """
    cord_mask = torch.from_numpy(mask > 0).float()
    core = (-F.max_pool2d(-cord_mask[None], 5, 1, 2))[0].numpy() > 0
    return image[core & (mask == 1)], image[core & (mask == 2)]

def brightness_agrees(image, mask):
    """Correlation of brightness with being grey matter, over the inside of the cord."""
    grey, white = grey_and_white(image, mask)
    is_grey = [1] * len(grey) + [0] * len(white)
    return np.corrcoef(np.concatenate([grey, white]), is_grey)[0, 1]

@pytest.mark.parametrize("site", [1, 2, 3, 4])
def test_the_phantoms_masks_lie_on_its_bright_grey_matter(whole_phantom, site):
    image, voxels = read_phantom(whole_phantom, site, 1, "image")
    assert image.get_data_dtype() == np.int16
    slices = [z for z in range(voxels.shape[2]) if voxels[:, :, z].any()]
    # Black slices are at both ends of site 3's volumes.
    black = mt.SITES[site - 1].black
    assert slices == [*range(black, voxels.shape[2] - black)]
    pixels = round(1 / mt.SITES[site - 1].mm)            # 1 mm
    for rater in (1, 2, 3, 4):
        mask_image, mask = read_phantom(whole_phantom, site, 1, f"mask-r{rater}")
        assert mask_image.get_data_dtype() == np.uint8 and set(np.unique(mask)) == {0, 1, 2}
        assert np.array_equal(mask_image.affine, image.affine)
        assert [z for z in range(mask.shape[2]) if mask[:, :, z].any()] == slices
        ratios = []
        for z in slices:
            grey, white = grey_and_white(voxels[:, :, z], mask[:, :, z])
            ratios.append(grey.mean() / white.mean())
        assert 1.06 < np.mean(ratios) < 1.35
        # Any shift by 1 mm makes it worse: so would a mask that is mirrored or turned.
        agreement = {}
        for shift in ((0, 0), (pixels, 0), (-pixels, 0), (0, pixels), (0, -pixels)):
            moved = np.roll(mask, shift, (0, 1))
            agreement[shift] = np.mean([brightness_agrees(voxels[:, :, z], moved[:, :, z])
                                        for z in slices])
        assert max(agreement, key=agreement.get) == (0, 0) and agreement[0, 0] > 0.4, agreement

@pytest.mark.parametrize("site", [1, 2, 3, 4])
def test_the_phantoms_subjects_lie_as_the_header_says(whole_phantom, site):
    _, voxels = read_phantom(whole_phantom, site, 1, "image")
    _, mask = read_phantom(whole_phantom, site, 1, "mask-r4")
    mm, z = mt.SITES[site - 1].mm, voxels.shape[2] // 2
    columns, rows = np.nonzero(mask[:, :, z])
    assert columns.max() - columns.min() > 1.15 * (rows.max() - rows.min())      # a cord is wide
    left, right = round(columns.mean() - 4 / mm), round(columns.mean() + 4 / mm)
    front = voxels[left:right, rows.max() + round(5 / mm):rows.max() + round(11 / mm), z]
    back = voxels[left:right, rows.min() - round(11 / mm):rows.min() - round(5 / mm), z]
    assert front.mean() < 0.6 * back.mean()              # the vertebra is dark, and in front

@pytest.mark.parametrize("site, unit", [(1, 200), (2, 1000), (3, 500), (4, 700)])
def test_the_phantoms_sites_have_scales_of_their_own(whole_phantom, site, unit):
    _, voxels = read_phantom(whole_phantom, site, 1, "image")
    _, mask = read_phantom(whole_phantom, site, 1, "mask-r4")
    assert voxels[mask == 2].mean() == pytest.approx(unit, rel=0.35)

@pytest.mark.parametrize("site", [1, 2, 3, 4])
def test_no_two_subjects_sites_or_raters_of_the_phantom_are_alike(whole_phantom, site):
    masks = [read_phantom(whole_phantom, site, 1, f"mask-r{rater}")[1] for rater in (1, 2, 3, 4)]
    for one, other in itertools.combinations(masks, 2):
        assert 0.6 < 2 * ((one == 1) & (other == 1)).sum() / ((one == 1).sum()
                                                              + (other == 1).sum()) < 0.97
    one, other = (read_phantom(whole_phantom, site, subject, "image")[1] for subject in (1, 2))
    middles = [volume[:, :, volume.shape[2] // 2] for volume in (one, other)]
    assert np.corrcoef(*[middle.ravel() for middle in middles])[0, 1] < 0.95
    assert not (whole_phantom / f"site{site}-sc02-mask-r4.nii.gz").exists()

@pytest.mark.parametrize("seed", [1, 2])
def test_the_phantom_has_noise_of_its_own_in_every_slice(seed):
    site = mt.SITES[0]._replace(size=64, slices=(4, 4))
    image, masks = mt.phantom_subject(site, torch.Generator().manual_seed(seed))
    slices = image.float() / site.unit
    # What is not smooth over 3 px, in the white matter: without noise, neighbouring slices agree
    # in it to a correlation of 0.9 and more.
    rough = slices - F.avg_pool2d(slices[:, None], 3, 1, 1)[:, 0]
    white = -F.max_pool2d(-(masks[3] == 2).float(), 3, 1, 1) > 0
    rough = rough[:, white.all(0)]
    assert rough.shape[1] > 100
    for one, other in itertools.combinations(rough, 2):
        assert correlation(one, other) < 0.8
        assert 0.01 < (one - other).std() / 2 ** 0.5 < 0.1

@pytest.mark.parametrize("site, expected", [
    # Shape, mean brightness, voxels of grey and of white matter of the fourth rater; brightness
    # of its grey matter, and its voxels in the lowest slice that is not black: those of the
    # phantom that the published results were measured on
    (1, ((100, 100, 3), 116.28, 138, 851, 239.1, 46)),
    (2, ((100, 100, 7), 891.10, 499, 2687, 1186.5, 68)),
    (3, ((176, 176, 28), 260.36, 5507, 23411, 620.6, 287)),
    (4, ((160, 160, 12), 738.61, 1594, 10760, 958.2, 150))])
def test_the_phantom_is_the_published_one(whole_phantom, site, expected):
    _, voxels = read_phantom(whole_phantom, site, 1, "image")
    _, mask = read_phantom(whole_phantom, site, 1, "mask-r4")
    shape, mean, grey, white, brightness, grey_below = expected
    assert voxels.shape == shape
    assert voxels.mean() == pytest.approx(mean, rel=1e-3)
    assert (mask == 1).sum() == pytest.approx(grey, abs=3)
    assert (mask == 2).sum() == pytest.approx(white, abs=3)
    assert voxels[mask == 1].mean() == pytest.approx(brightness, rel=1e-3)
    lowest = mt.SITES[site - 1].black
    assert (mask[:, :, lowest] == 1).sum() == pytest.approx(grey_below, abs=2)

def test_the_phantom_is_written_once_into_the_users_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    real, written = mt.write_phantom, []

    def tiny(folder, *arguments, **options):
        written.append(folder)
        real(folder, *arguments, **{**options, "sites": TINY, "subjects": 14})

    monkeypatch.setattr(mt, "write_phantom", tiny)
    config = small("", crop=32, spacing=0.5)
    first = mt.load_data(config)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    second = mt.load_data(config)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")} == files
    assert len(written) == 1 and {path.parent for path in files} == {Path(written[0])}
    assert capsys.readouterr().out.count("writing the phantom") == 1
    for name in ("train", "val", "test", "unlabelled"):
        assert torch.equal(first[name].images, second[name].images)
        assert len(first[name].where) > 0

def test_a_phantom_that_another_process_finished_meanwhile_is_used(tmp_path, monkeypatch):
    folder, real = tmp_path / "phantom", os.rename

    def late(source, target):                            # the other process is faster by a moment
        shutil.copytree(source, target)
        (folder / "other").touch()
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", late)
        mt.write_phantom(folder, sites=TINY[:1], subjects=2)
    assert (folder / "other").exists() and len(mt.find_scans(folder)) == 2
    assert list(tmp_path.iterdir()) == [folder]          # nothing unfinished is left

def test_a_phantom_that_cannot_get_its_name_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    def failing(source, target):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="Read-only"):
        mt.write_phantom(tmp_path / "phantom", sites=TINY[:1], subjects=2)
    assert list(tmp_path.iterdir()) == []

# --- The file as a whole -------------------------------------------------------------------------

GIVEN = """import copy, math, torch; from torch import nn
import torch.nn.functional as F
x, rgb, phi = torch.randn(2, 1, 8, 8), torch.randn(2, 3, 8, 8), torch.eye(2, 3).repeat(2, 1, 1)
net, twin = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)
"""
CALLS = ["conv_block(1, 4, 0.1)(x)", "UNet(4, 0.5)(x)", "dice_loss(x.sigmoid(), x)",
         "warp(x, phi)", "consistency_loss(x, x.sigmoid())", "sample_affine(2, 4.5)",
         "augment(rgb, phi)", "delayed_targets(net, rgb, phi)", "make_teacher(net)(rgb)",
         "update_teacher(net, twin, 0.9) or twin(rgb)", "ramp_up(1, 10)",
         "[learning_rate_factor(k, 10, 2) for k in (1, 5)]",
         "train_step(net, twin, torch.optim.Adam(net.parameters()), rgb, x, rgb, 0)"]

@pytest.mark.parametrize("call", CALLS)
def test_each_piece_works_when_pasted_into_an_empty_file(call):
    source = SCRIPT.read_text()
    nodes = ast.parse(source[source.index("# --- 2. U-Net"):source.index("# --- 7. Data")]).body
    assert all(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in nodes)   # no globals
    pieces, wanted = {n.name: n for n in nodes}, set()
    assert all(any(re.search(rf"\b{name}\(", call) for call in CALLS) for name in pieces)
    todo = {ast.parse(call)}
    while todo:                                          # the pieces that it calls come along
        called = {m.id for n in todo for m in ast.walk(n) if isinstance(m, ast.Name)}
        todo = {pieces[name] for name in (called & set(pieces)) - wanted}
        wanted |= {n.name for n in todo}
    pasted = "\n".join(ast.unparse(n) for n in nodes if n.name in wanted)
    results = []
    for names in ({}, dict(vars(mt))):                   # the pasted pieces, then the script's own
        torch.manual_seed(0)
        exec(GIVEN, names)
        if not results:
            exec(pasted, names)
        results.append(eval(call, names))
    torch.testing.assert_close(*results, rtol=0, atol=0)

def python(code, cwd):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(HERE),
                                            "PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 0 and list(cwd.iterdir()) == [], done.stderr
    return done.stdout + done.stderr

def test_the_readmes_own_loop_runs_as_it_stands_in_an_empty_folder(tmp_path):
    blocks = re.findall(r"^```python\n(import torch\b.*?)^```", README.read_text(), re.S | re.M)
    block, = [block for block in blocks if "delayed_targets" in block]
    code = [line for line in block[block.index("# Yours"):].splitlines() if line.strip()]
    assert len(code) <= 20 and "mean_teacher_seg" in block and "UNet" not in block
    assert "Warning" not in python(block, tmp_path)

def test_importing_does_nothing(tmp_path):
    assert python("import sys, torch; torch.manual_seed(2026)\nimport mean_teacher_seg\nassert "
                  "'matplotlib.pyplot' not in sys.modules and torch.initial_seed() == 2026",
                  tmp_path) == ""

def test_only_the_six_packages_lines_fit_and_the_licence_is_named():
    six = {"torch", "numpy", "nibabel", "matplotlib", "jupyter", "pytest"}
    lines = (HERE / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == six
    for text in (SCRIPT.read_text(), Path(__file__).read_text()):
        names = re.findall(r"^ *(?:import|from) (\w+)", text, re.M)
        assert {*names} - {"mean_teacher_seg"} - {*sys.stdlib_module_names} <= six
        assert max(map(len, text.splitlines())) <= 99
        assert text.startswith("# SPDX-License-Identifier: MIT\n")
    assert SCRIPT.read_text().split("# --- 7. Data")[0].count("\n") <= 420       # the whole paper

# --- The notebook --------------------------------------------------------------------------------

def code_cells(path=NOTEBOOK):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]

def test_the_notebook_runs_from_a_clean_kernel_and_knows_a_right_answer(tmp_path):
    notebook, tagged = json.loads(NOTEBOOK.read_text()), {"exercise": [], "check": []}
    for cell in code_cells():
        for tag in tagged.keys() & set(cell["metadata"].get("tags", [])):
            tagged[tag].append(cell)
    assert [len(cells) for cells in tagged.values()] == [3, 3]
    assert all("still blank" in json.dumps(cell["outputs"]) for cell in tagged["check"])
    for exercise, check in zip(*tagged.values()):        # once more, with the reader's answer
        (blank, answer), source = exercise["metadata"]["edit"], "".join(exercise["source"])
        assert source.count(blank) == 1
        notebook["cells"] += [{**exercise, "id": f"{exercise['id']}-answered",
                               "source": source.replace(blank, answer)},
                              {**check, "id": f"{check['id']}-answered"}]
    (tmp_path / "tutorial.ipynb").write_text(json.dumps(notebook))
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace",
         "tutorial.ipynb"], cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env=dict(os.environ, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    cells = code_cells(tmp_path / "tutorial.ipynb")
    assert all("**right**" in json.dumps(cell["outputs"]) for cell in cells[-1:-6:-2])
    assert not [o for cell in cells for o in cell["outputs"] if o.get("name") == "stderr"]

def test_the_notebook_is_committed_with_its_outputs_and_defines_nothing_of_the_scripts():
    text, cells = NOTEBOOK.read_text(), code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    lines = [sum(bool(line.strip()) for line in cell["source"]) for cell in cells]
    assert sum(lines) <= 450 and len(json.loads(text)["cells"]) <= 100
    assert sorted(lines)[-2] <= 25                       # all but the setup fit on a screen
    assert sum(count > 10 for count in lines) <= 8
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    attached = [cell.get("attachments", {}) for cell in json.loads(text)["cells"]]
    pictures += [kinds["image/png"] for files in attached for kinds in files.values()]
    for picture in pictures:                             # as many grey levels as a picture has
        pixels = plt.imread(io.BytesIO(base64.b64decode(picture)))[..., :3]
        assert pixels.shape[0] > 100 and pixels.std() > 0.05
    prose = ["".join(cell["source"]) for cell in json.loads(text)["cells"]
             if cell["cell_type"] == "markdown"]
    sections = re.findall(r"^## (\d+)\.", "\n".join(prose), re.M)
    assert [*map(int, sections)] == list(range(1, 17))
    assert len(pictures) >= 18 and len(text) < 2.5e6
    assert "/tmp" not in re.sub(r"[\w+/=]{200,}", "", text)      # pictures in base64 apart
    defined, script = (ast.FunctionDef, ast.ClassDef), ast.parse(SCRIPT.read_text()).body
    ours = {node.name for node in script if isinstance(node, defined)}
    ours |= {name.id for node in script if isinstance(node, ast.Assign) for name in node.targets}
    tree = list(ast.walk(ast.parse("\n".join("".join(cell["source"]) for cell in cells))))
    theirs = {node.name for node in tree if isinstance(node, defined)}
    theirs |= {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert {"train_step", "METRICS"} < ours and "config" in theirs and not ours & theirs

# --- Real scans, where they are ------------------------------------------------------------------

def real(name):
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no {name} here")

@real("gm-challenge")
def test_real_cords_of_six_sessions():
    config = dataclasses.replace(
        mt.DEMO, data=str(DATA / "gm-challenge"), train=("sub-10062Ses1", "sub-9709Ses1"),
        test=("sub-9418", "sub-9584"), spacing=0.5, crop=96)
    assert [len(part) for part in split(config).values()] == [2, 0, 2, 6]
    data = mt.load_data(config)
    assert len(data["train"].images) == 40 and len(data["test"].images) == 34
    area = data["train"].masks.sum((1, 2, 3)) * config.spacing ** 2
    assert 10 < area.mean() < 20                         # mm2 of grey matter in a slice

@real("hippocampus")
def test_real_hippocampi_in_the_papers_protocol_and_a_mask_as_published(tmp_path):
    options = "--preset demo --split 8 8 12 --spacing 1 --crop 48".split()
    config = mt.parse(["--data", str(DATA / "hippocampus"), "--label", "1", "2", *options])[0]
    sets, data = split(config), mt.load_data(config)
    assert [len(part) for part in sets.values()] == [8, 8, 12, 40]
    assert len({scan.individual for part in sets.values() for scan in part}) == 68
    assert [len({scan for _, scan, _ in part.where}) for part in data.values()] == [8, 8, 12, 40]
    one, label = sets["train"][0], dataclasses.replace
    whole, front, back = (mt.read_scan(one, label(config, label=values), True).masks
                          for values in ((1, 2), (1,), (2,)))
    assert whole.sum() == front.sum() + back.sum() and min(front.sum(), back.sum()) > 99
    # Its header off in the fourth decimal, by 0.02 voxels at the far corner
    mask = nib.load(one.masks[mt.ANY])
    off = nib.Nifti1Image(np.asanyarray(mask.dataobj), turned(0.0004) @ mask.affine)
    nib.save(off, tmp_path / "m.nii.gz")
    other = one._replace(masks={mt.ANY: tmp_path / "m.nii.gz"})
    assert torch.equal(mt.read_scan(other, config, True).masks, whole)
