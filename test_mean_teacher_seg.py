# SPDX-License-Identifier: MIT
"""Tests of the real functions, against something independent of them: a value worked out by hand,
a closed form, a NumPy loop, or a property that the mathematics demands. (python -m pytest)

The parts follow the sections of the script; then the file as a whole, with the README, the
notebook and, where they are, real scans.
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
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mean_teacher_seg as mt

HERE = Path(__file__).resolve().parent
SCRIPT, README, NOTEBOOK, DATA = (HERE / name for name in (
    "mean_teacher_seg.py", "README.md", "tutorial.ipynb", "../shared/data"))

# --- Helpers -------------------------------------------------------------------------------------
# settings: setting(), arguments()           files: write_nifti, cord, write_scgm, write_bids,
# running: main, refused, process            write_decathlon, the fixtures scan and study
# slices without files: slices, sets         comparing: flat, vector, clone, same, snapshot

# The settings of a training that takes a second. Every test starts from them.
SMALL = {"spacing": 0.5, "crop": 16, "width": 2, "dropout": 0.0, "batch": 2, "unlabelled_batch": 3,
         "epochs": (3,), "steps": 0, "validate_every": 2, "split": (1, 0, 1), "device": "cpu"}


def setting(**changes):
    """SMALL as a Config."""
    return dataclasses.replace(mt.DEMO, **{**SMALL, **changes})


def arguments(**changes):
    """SMALL as options of the command line."""
    options = ["--preset", "demo"]
    for name, value in {**SMALL, **changes}.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        options += ["--" + name.replace("_", "-"), *map(str, values)]
    return options


def main(*options):
    return mt.main([*map(str, options)])


def refused(capsys, *options):
    """A command line that must end in one line of error, and exit status 2. -> the line"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(*options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def process(*command, cwd, code=0, timeout=300, **environment):
    """Python in a process of its own, with one thread and without a GPU."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, text=True,
                          capture_output=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                               "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1",
                               **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return done


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


def moved(angle, *shift):
    """An affine in the world: a rotation about its origin, and a shift in mm."""
    return nib.affines.from_matvec(nib.eulerangles.euler2mat(angle), shift or (0, 0, 0))


def tiny_sites(count):
    """The phantom's first sites, with small matrices."""
    return [site._replace(mm=0.5, size=48, slices=(2, 2), black=site.black // 4)
            for site in mt.SITES[:count]]


def write_scan(seed, image, masks, **how):
    for path, array in zip([image, *masks], [cord(seed)[0], *[cord(seed)[1]] * len(masks)]):
        write_nifti(path, array, **how)


def write_scgm(folder, subjects=(1, 11), ending=".nii.gz", **how):
    for n in subjects:
        stem = f"{'training' if n <= 10 else 'test'}/site1-sc{n:02d}"
        write_scan(100 + n, folder / f"{stem}-image{ending}",
                   [folder / f"{stem}-mask-r{r}{ending}" for r in range(1, 5) if n <= 10], **how)


def write_bids(folder, subjects=("sub-a",), runs=(1,), ending=".nii.gz", **how):
    """The first run of each subject has a mask."""
    for (k, subject), run in itertools.product(enumerate(subjects, 101), runs):
        stem = f"{subject}/anat/{subject}_run-{run}_T2starw"
        write_scan(k, folder / f"{stem}{ending}",
                   [folder / f"derivatives/labels/{stem}_gmseg-hand{ending}"] * (run == 1), **how)


def write_decathlon(folder, cases=("case_1",), unlabelled=(), ending=".nii.gz", **how):
    for k, case in enumerate([*cases, *unlabelled], 101):
        part = "Tr" if case in cases else "Ts"
        write_scan(k, folder / f"images{part}/{case}{ending}",
                   [folder / f"labels{part}/{case}{ending}"], **how)


@pytest.fixture(autouse=True)
def fresh():
    """No test depends on those before it."""
    torch.manual_seed(0)
    mt.noted.clear()


@pytest.fixture
def scan(tmp_path):
    """A scan with one mask, for tests to overwrite."""
    write_bids(tmp_path / "study")
    return mt.find_scans(tmp_path / "study")[0]


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """Two subjects of one site with masks and one without: a study that trains. -> folder"""
    folder = tmp_path_factory.mktemp("study")
    write_scgm(folder, subjects=(1, 2, 11))
    return folder


def slices(count, seed, size=16, labelled=True):
    """Slices as load_data returns them. No two of them are equal."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, size, size, generator=generator)
    masks = (F.avg_pool2d(images, 5, 1, 2) > 0.1).float()
    where = [("", f"scan{seed}", z) for z in range(count)]
    return mt.Slices(images, masks if labelled else images[:0], where, {f"scan{seed}": "abc"})


def sets():
    """Four sets of slices, without files: three steps of two labelled slices make an epoch."""
    return {"train": slices(6, seed=1), "val": slices(3, seed=2), "test": slices(4, seed=3),
            "unlabelled": slices(7, seed=4, labelled=False)}


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def vector(network):
    return flat(network.parameters())


def clone(network):
    return {name: values.clone() for name, values in network.state_dict().items()}


def same(state, other):
    assert state.keys() == other.keys()
    return all(torch.equal(state[name], other[name]) for name in state)


def snapshot(folder):
    return {p: (p.read_bytes() if p.is_file() else None) for p in sorted(folder.rglob("*"))}


# --- U-Net ---------------------------------------------------------------------------------------

def doubling(size):
    """Linear interpolation to twice the size, border repeated: the matrix (2 size, size)."""
    centres = (np.arange(2 * size) - 0.5) / 2
    columns = [np.interp(centres, np.arange(size), unit) for unit in np.eye(size)]
    return torch.from_numpy(np.stack(columns, axis=1))


def naive_unet(network, x):
    """A forward pass in eval mode, from the weights in their order."""
    layers = (m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d)))

    def block(x):
        for _ in range(2):
            convolution, norm = next(layers), next(layers)
            x = F.conv2d(x, convolution.weight, convolution.bias, padding=1).clamp(min=0)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return x

    skips = []
    for _ in range(3):
        skips.append(block(x))
        n, channels, height, width = skips[-1].shape
        x = skips[-1].view(n, channels, height // 2, 2, width // 2, 2).amax((3, 5))
    x = block(x)
    for skip in reversed(skips):
        x = doubling(x.shape[2]) @ x @ doubling(x.shape[3]).T
        x = block(torch.cat([x, skip], dim=1))
    last, = layers
    return F.conv2d(x, last.weight, last.bias, padding=1)


def test_the_unets_logits_are_those_of_a_naive_forward_pass():
    network = mt.UNet(2, 0.5).double().eval().requires_grad_(False)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for values in (layer.weight, layer.bias, layer.running_mean):
                values.normal_()
            layer.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 1, 16, 40, dtype=torch.float64)
    expected = naive_unet(network, x)
    assert expected.std() > 0.05 and expected.min() < 0  # no sigmoid
    assert torch.allclose(network(x), expected, atol=1e-9)
    for size in ((15, 16), (16, 20)):                    # cannot be halved three times
        with pytest.raises(ValueError, match="multiples of 8.* {} x {}:".format(*size)):
            network(torch.zeros(1, 1, *size))


def test_the_unet_has_the_papers_layers():
    network = mt.UNet()
    assert sum(p.numel() for p in network.parameters()) == 4_837_249
    layers = [layer for layer in network.modules() if not list(layer.children())]
    kinds = [nn.Conv2d, nn.ReLU, nn.BatchNorm2d, nn.Dropout2d]
    assert [type(layer) for layer in layers] == kinds * 14 + [nn.Conv2d]
    assert {layer.momentum for layer in layers[2::4]} == {0.1}
    for rate, unet in ((0.5, network), (0.3, mt.UNet(2, 0.3))):
        assert {layer.p for layer in unet.modules() if isinstance(layer, nn.Dropout2d)} == {rate}


# --- Losses --------------------------------------------------------------------------------------

def step_options(**changes):
    return mt.step_options(setting(**changes), torch.device("cpu"))


def test_dice_loss_by_hand():
    p, y = torch.tensor([0.5, 0.5, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    # sum(py) = 1.5, sum(p) = 2, sum(y) = 2: -2 * 1.5 / 4
    assert mt.dice_loss(p, y).item() == pytest.approx(-0.75, abs=1e-4)
    # Slice 0: all four right; slice 1: its only pixel missed. Over the batch 2 * 4 / (4 + 5); the
    # mean of two ratios would be (1 + 0) / 2.
    p = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]).view(2, 1, 2, 2)
    y = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]]).view(2, 1, 2, 2)
    assert mt.dice_loss(p, y).item() == pytest.approx(-8 / 9, abs=1e-4)
    # Without foreground, only the smoothing is left: 1e-4 / (1e-4 + 1e-4), and 1 if all is right.
    p = torch.tensor([1e-4])
    assert mt.dice_loss(p, 0 * p).item() == pytest.approx(-0.5)
    assert mt.dice_loss(0 * p, 0 * p).item() == mt.dice_loss(y, y).item() == pytest.approx(-1)
    # In half precision, the sums would have three digits.
    p, y = torch.rand(2, 2, 1, 64, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, p, y = mt.dice_loss(p, y), p.double(), y.double()
    assert loss.item() == pytest.approx((-2 * (p * y).sum() / (p + y).sum()).item(), abs=1e-6)


Z = torch.tensor([0.0, math.log(3.0), math.log(3.0)])    # p 0.5, 0.75, 0.75
Y = torch.tensor([0.3, 1.0, 0.1])
BCE = np.array([math.log(2), -math.log(0.75), -0.1 * math.log(0.75) - 0.9 * math.log(0.25)])
MSE = np.array([0.2, 0.25, 0.65]) ** 2


@pytest.mark.parametrize("loss, by_hand, certain", [
    (mt.consistency_loss, BCE, [True] * 3), (step_options()["consistency"], BCE, [True] * 3),
    (step_options(consistency="mse")["consistency"], MSE, [True] * 3),
    # Leaves out the teacher's 0.3, and neither foreground nor background that is certain
    (step_options(confidence=0.9)["consistency"], BCE, [False, True, True])])
def test_consistency_loss_by_hand(loss, by_hand, certain):
    for valid in itertools.product([True, False], repeat=3):
        counts = np.array(valid) & certain
        expected = by_hand[counts].mean() if counts.any() else 0
        assert loss(Z, Y, torch.tensor(valid)).item() == pytest.approx(expected, abs=1e-6)
    assert mt.consistency_loss(Z, Y).item() == pytest.approx(BCE.mean(), abs=1e-6)
    # log(1 + e^200) = 200, though the sigmoid is 1. As eq. 2 is printed, it would be -200.
    assert mt.consistency_loss(torch.tensor(200.0), torch.tensor(0.0)).item() == 200


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 8, 8), (1, 1, 8, 8), (2, 1, 8, 1), ()])
def test_a_loss_refuses_different_shapes_instead_of_broadcasting_them(shape):
    right, wrong = torch.rand(2, 1, 8, 8), torch.rand(shape)
    for loss, arguments in ((mt.dice_loss, (right, wrong)), (mt.consistency_loss, (right, wrong)),
                            (mt.consistency_loss, (right, right, wrong > 0.5))):
        with pytest.raises(ValueError, match="same shape") as refusal:
            loss(*arguments)
        assert str((2, 1, 8, 8)) in str(refusal.value) and str(shape) in str(refusal.value)


# --- Delayed augmentation ------------------------------------------------------------------------

def transform(degrees, right=0.0, down=0.0, zoom=1.0):
    """phi (1, 2, 3) that turns a picture anticlockwise, as torch.rot90 does."""
    cos, sin = (f(math.radians(degrees)) / zoom for f in (math.cos, math.sin))
    return torch.tensor([[[cos, -sin, right], [sin, cos, down]]])


def transforms(n):
    return torch.cat([transform(*row) for row in (torch.rand(n, 4) * torch.tensor(
        [40, 6, 6, 0.4]) + torch.tensor([-20, -3, -3, 0.8])).tolist()])


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


class Recorder(nn.Conv2d):
    """A pointwise network that remembers what it was shown, and its logits."""

    def forward(self, x):
        logits = super().forward(x)
        self.seen = [*getattr(self, "seen", []), x.detach().clone()]
        self.logits = [*getattr(self, "logits", []), logits.detach()]
        return logits


def test_warp_is_a_bilinear_look_up_also_under_autocast():
    x, phi = torch.randn(4, 3, 13, 18), transforms(4)
    # In bfloat16 the sampling grid of a 200 px image would be off by most of a pixel.
    with torch.autocast("cpu", torch.bfloat16):
        warped = mt.warp(x, phi)
        assert mt.warp(x.bfloat16(), phi).dtype == warped.dtype == torch.float32
    for k, c in np.ndindex(4, 3):
        expected = naive_warp(x[k, c].numpy(), phi[k].double().numpy())
        assert np.allclose(warped[k, c], expected, atol=1e-4)
    for function in (mt.warp, mt.augment):               # volumes
        with pytest.raises(ValueError, match=r"affine.*\[4, [12], 8, 8, 8\]"):
            function(torch.zeros(4, 1, 8, 8, 8), phi)


def test_sample_affine_draws_angle_zoom_and_both_translations_uniformly_and_independently():
    phi = mt.sample_affine(4000, 9.0, translation=3.0, scale=0.5)
    assert phi.shape == (4000, 2, 3) and phi.dtype == torch.float32
    matrices = phi[:, :, :2]
    zoom = 1 / torch.linalg.det(matrices).sqrt()
    square = (matrices @ matrices.mT) * zoom.view(-1, 1, 1) ** 2     # a rotation: the identity
    assert torch.allclose(square, torch.eye(2).expand_as(square), atol=1e-5)
    angle = torch.rad2deg(torch.atan2(phi[:, 1, 0], phi[:, 0, 0]))
    drawn = torch.stack([angle, zoom, phi[:, 0, 2], phi[:, 1, 2]])
    for values, low, high in zip(drawn, (-9, 0.5, -3, -3), (9, 1.5, 3, 3)):
        assert low - 1e-5 < values.min() and values.max() < high + 1e-5
        # Mean and std of a uniform distribution
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
        assert values.std().item() == pytest.approx((high - low) / 12 ** 0.5, rel=0.04)
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.07
    rotations = mt.sample_affine(5, 4.5)                 # and nothing else
    assert (rotations[:, :, 2] == 0).all()
    assert (torch.linalg.det(rotations[:, :, :2]) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_delayed_targets_are_on_the_students_grid_wherever_it_is_inside(channels):
    # A pointwise linear network commutes with a linear resampling, so the student's f(g(x)) and
    # the teacher's g(f(x)) must be the same picture; f(x), without the delayed g, must not be.
    # (The sigmoid comes between; the teacher's logits are small, where it is nearly a line.)
    network = nn.Conv2d(channels, 1, 1, bias=False)
    network.weight.data = torch.linspace(0.01, 0.02, channels).view(1, channels, 1, 1)
    x, phi = torch.rand(2, channels, 32, 32), torch.cat([transform(15, 2), transform(-15, 0, 3)])
    view, inside = mt.augment(x, phi, 0.0)
    targets = mt.delayed_targets(network, x, phi, 0.0)
    assert view.shape == x.shape and inside.shape == targets.shape == (2, 1, 32, 32)
    assert view.dtype == targets.dtype == torch.float32 and not targets.requires_grad
    student, undelayed = (torch.sigmoid(network(images)).detach() for images in (view, x))
    assert torch.allclose(mt.same_input_targets(network, x, phi, 0.0), student)
    assert (student - targets)[inside].abs().max() < 1e-5
    assert (student - undelayed)[inside].abs().max() > 1e-3
    for k in range(2):
        assert np.array_equal(inside[k, 0], naive_warp(np.ones((32, 32)), phi[k].numpy()) > 0.999)
    # Probabilities are warped, not logits: between pixels and outside these give other values.
    logits = 5 * torch.randn(2, 1, 32, 32)
    targets = mt.delayed_targets(nn.Identity(), logits, phi, 0.0)
    for k in range(2):
        expected = naive_warp(torch.sigmoid(logits[k, 0]).numpy(), phi[k].numpy())
        assert np.abs(targets[k, 0].numpy() - expected).max() < 1e-4


@pytest.mark.parametrize("function, options, std", [
    (mt.augment, (), 0.1), (mt.augment, (0.2,), 0.2), (mt.delayed_targets, (), 0.1),
    (mt.delayed_targets, (0.2,), 0.2), (mt.same_input_targets, (0.2,), 0.2)])
def test_noise_is_of_the_given_std_and_not_interpolated(function, options, std):
    # Noise that is added before the warp has two thirds of the std, and neighbours correlate.
    network, images, phi = Recorder(2, 1, 1), torch.zeros(4, 2, 64, 64), transforms(4)
    if function is mt.augment:
        noise, _ = mt.augment(images, phi, *options)
    else:
        assert not function(network, images, phi, *options).requires_grad
        noise, = network.seen
    assert noise.std().item() == pytest.approx(std, rel=0.03)
    for one, other in ((noise[..., 1:], noise[..., :-1]), (noise[:, :, 1:], noise[:, :, :-1])):
        assert abs(np.corrcoef(one.flatten(), other.flatten())[0, 1]) < 0.04


# --- Teacher and ramps ---------------------------------------------------------------------------

def frozen_network():
    """A network in train mode, one BatchNorm layer of which is frozen in eval mode."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                            nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 1, 1))
    network(3 * torch.randn(4, 1, 16, 16) + 2)           # running statistics of its own
    network[1].eval()
    return network


def modes(network):
    return [module.training for module in network.modules()]


def test_the_teacher_starts_as_a_copy_without_gradient_and_becomes_its_closed_form():
    student, alpha, mean = mt.UNet(2), 0.9, 0
    student(torch.randn(2, 1, 16, 16))
    teacher = mt.make_teacher(student)
    first = clone(teacher)
    assert type(teacher) is mt.UNet and same(first, student.state_dict()) and teacher.training
    assert all(p.requires_grad for p in student.parameters())
    weights = torch.randn(7, len(vector(student)))
    for k, weight in enumerate(weights, start=1):
        nn.utils.vector_to_parameters(weight.clone(), student.parameters())
        student(torch.randn(2, 1, 16, 16))
        mt.update_teacher(student, teacher, alpha)
        mean = mean + (1 - alpha) * alpha ** (7 - k) * weight
    # theta'_7 = alpha^7 theta'_0 + (1 - alpha) sum_k alpha^(7-k) theta_k
    start = flat(first[name] for name, _ in teacher.named_parameters())
    assert torch.allclose(vector(teacher), alpha ** 7 * start + mean, atol=1e-6)
    assert torch.equal(vector(student), weights[-1])
    assert not any(p.requires_grad for p in teacher.parameters())
    # BatchNorm's buffers are not averaged.
    assert all(torch.equal(values, first[name]) for name, values in teacher.named_buffers())


def test_a_teacher_in_half_precision_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=f"0.weight is {dtype}.*autocast"):
            mt.make_teacher(network.to(dtype))
    assert mt.make_teacher(network.double())[0].weight.dtype == torch.float64


@pytest.mark.parametrize("other, error, message", [
    (nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)), ValueError, "zip.* longer"),
    (nn.Sequential(nn.Linear(4, 3, bias=False)), ValueError, "zip.* shorter"),
    (nn.Sequential(nn.Linear(5, 3)), RuntimeError, "size of tensor")])
def test_the_update_refuses_a_student_of_another_architecture(other, error, message):
    with pytest.raises(error, match=message):
        mt.update_teacher(other, nn.Sequential(nn.Linear(4, 3)).requires_grad_(False), 0.9)


def test_ramps_at_known_epochs():
    assert mt.ramp_up(50, 100) == pytest.approx(math.exp(-1.25))
    assert mt.ramp_up(1, 100) == pytest.approx(math.exp(-5 * 0.99 ** 2))
    assert mt.ramp_up(100, 100) == mt.ramp_up(300, 100) == mt.ramp_up(1, 0) == 1
    for epoch, factor in ((25, math.exp(-1.25)), (50, 1), (125, (1 + math.sqrt(0.5)) / 2),
                          (200, 0.5), (350, 0)):         # 200: half way down
        assert mt.learning_rate_factor(epoch, 350, 50) == pytest.approx(factor)
    assert mt.learning_rate_factor(1, 2, 0) == pytest.approx(0.5)        # no ramp
    # Shorter than its ramp; one epoch, which has no decay
    assert mt.learning_rate_factor(3, 3, 50) == mt.ramp_up(3, 50)
    assert mt.learning_rate_factor(1, 1, 0) == 1
    assert mt.learning_rate_factor(1, 1, 2) == mt.ramp_up(1, 2)


# --- One training step ---------------------------------------------------------------------------

def batch():
    """Two labelled and three unlabelled slices. -> images, masks, unlabelled images"""
    labelled = slices(2, seed=1)
    return labelled.images, labelled.masks, slices(3, seed=2).images


def networks(student=None):
    torch.manual_seed(0)
    student = student or mt.UNet(2, 0.0)
    return student, mt.make_teacher(student), torch.optim.SGD(student.parameters(), lr=0.1)


@pytest.fixture
def phi(monkeypatch):
    """What sample_affine returns, by the number of slices: for tests to fill. And its ranges."""
    def stand_in(n, degrees, translation=0.0, scale=0.0, device=None):
        chosen["ranges"] = (degrees, translation, scale)
        return chosen[n]

    chosen = {2: transforms(2), 3: transforms(3)}
    monkeypatch.setattr(mt, "sample_affine", stand_in)
    return chosen


def test_at_weight_zero_a_step_is_the_supervised_one_whatever_the_unlabelled_slices(phi):
    images, masks, unlabelled = batch()
    unlabelled = 5 + 3 * unlabelled                      # of a very different scanner

    def step(semi, unlabelled, weight):
        student, teacher, optimizer = networks()
        before = vector(student)
        losses = mt.train_step(student, teacher if semi else None, optimizer, images, masks,
                               unlabelled, 0, weight, noise=0.0)
        return vector(student) - before, losses, clone(student)

    change, losses, state = step(False, unlabelled, 2.9)
    assert losses["consistency_loss"] == 0 and losses["loss"] == losses["dice_loss"] < 0
    for slices_without_masks in (unlabelled, unlabelled[:0]):
        other, others, _ = step(True, slices_without_masks, 0.0)
        assert (other - change).norm() <= 1e-6 * change.norm() > 0
        assert others["loss"].item() == pytest.approx(losses["loss"].item(), abs=1e-6)
        assert others["consistency_loss"] > 0
    # The supervised student does not see them, not even its BatchNorm.
    assert same(step(False, unlabelled[:0], 2.9)[2], state)


# A second implementation of the mean teacher, on purpose a naive one: NumPy in float64, loops over
# samples and pixels, written from the paper's equations: warp, losses and their derivatives, Adam,
# the average. Only the network's own passes are torch's, which differentiates sum(gradient * z).

def naive_step(student, teacher, moments, images, masks, unlabelled, phi, step, weight, alpha, lr,
               decay):
    """Algorithm 1 for one batch, without noise. phi (B + U, 2, 3) -> three losses."""
    x, n = np.concatenate([images, unlabelled]).astype(float), len(phi)
    shown = np.stack([naive_warp(x[b, 0], phi[b]) for b in range(n)])
    y = [naive_warp(masks[b, 0], phi[b]) >= 0.5 for b in range(len(masks))]

    def passes(network, x):                              # labelled and unlabelled apart
        halves = x[:len(masks)], x[len(masks):]
        return torch.cat([network(torch.from_numpy(half).float()) for half in halves])[:, 0]

    with torch.no_grad():
        guess = passes(teacher, x).double().numpy()
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


def test_twenty_steps_equal_those_of_a_second_naive_implementation(monkeypatch, phi):
    # A smooth network with BatchNorm: at the kink of a ReLU or a maximum, rounding errors grow.
    torch.manual_seed(4)
    network = nn.Sequential(nn.Conv2d(1, 4, 5, padding=2), nn.BatchNorm2d(4), nn.Tanh(),
                            nn.Conv2d(4, 1, 5, padding=2))
    monkeypatch.setattr(mt, "build_network", lambda config: network)
    config = setting(lr=0.01, weight_decay=(0.5, 0.02))
    student, teacher, optimizer = mt.build(config, "mean_teacher", torch.device("cpu"))
    twins, moments, curves = copy.deepcopy((student, teacher)), {}, []
    for step in range(20):
        phi.update({2: transforms(2), 3: transforms(3)})
        losses = mt.train_step(student, teacher, optimizer, *batch(), step, 2.9, 0.7, noise=0.0)
        naive = naive_step(*twins, moments, *(part.numpy() for part in batch()),
                           torch.cat([phi[2], phi[3]]).numpy(), step, 2.9, 0.7, 0.01, 0.02)
        for value in losses.values():
            assert value.dtype == torch.float32 and not value.requires_grad
        curves.append([[losses[name].item() for name in ("loss", "dice_loss",
                                                         "consistency_loss")], naive])
    curves = np.array(curves)
    assert np.abs(curves[:, 0] - curves[:, 1]).max() < 3e-6
    assert curves[10:, 0, 1].mean() < curves[:10, 0, 1].mean()       # it learns
    for ours, theirs in zip((student, teacher), twins):  # weights and BatchNorm's buffers
        for name, values in ours.state_dict().items():
            assert torch.allclose(values, theirs.state_dict()[name], atol=1e-5), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("augmentation, amp", [("delayed", 0), ("delayed", 1), ("same", 1)])
def test_what_student_and_teacher_are_shown(augmentation, amp, phi):
    student, teacher, optimizer = networks(Recorder(3, 1, 1))
    x, masks = torch.randn(5, 3, 32, 32), torch.zeros(2, 1, 32, 32)
    options = step_options(augmentation=augmentation, noise=0.0) | {"amp": bool(amp)}
    mt.train_step(student, teacher, optimizer, x[:2], masks, x[2:], 0, **options)
    assert phi["ranges"] == options["affine"]
    warped = mt.warp(x, torch.cat([phi[2], phi[3]]))
    assert [len(x) for x in student.seen] == [len(x) for x in teacher.seen] == [2, 3]
    assert torch.allclose(torch.cat(student.seen), warped, atol=1e-6)
    expected = x if augmentation == "delayed" else warped
    assert torch.allclose(torch.cat(teacher.seen), expected, atol=1e-6)
    # Noise: of the given std, and another one for each network, slice and channel
    student, teacher, optimizer = networks(Recorder(3, 1, 1))
    zeros, options["noise"] = torch.zeros(5, 3, 64, 64), 0.3
    mt.train_step(student, teacher, optimizer, zeros[:2], zeros[:2, :1], zeros[2:], 0, **options)
    seen = torch.cat([*student.seen, *teacher.seen]).flatten(0, 1).flatten(1)
    assert len(seen) == 30 and seen.std(1).tolist() == pytest.approx([0.3] * 30, rel=0.1)
    assert (torch.corrcoef(seen) - torch.eye(30)).abs().max() < 0.1


@pytest.mark.parametrize("consistency, augmentation", [("bce", "delayed"), ("mse", "same")])
def test_under_autocast_both_losses_are_computed_in_float32(consistency, augmentation):
    student, teacher, optimizer = networks(Recorder(1, 1, 1))
    x, y, u = batch()
    options = step_options(consistency=consistency, augmentation=augmentation, degrees=0.0,
                           translation=0.0, scale=0.0, noise=0.0) | {"amp": True}
    losses = mt.train_step(student, teacher, optimizer, x, y, u, 0, **options)
    assert student.logits[0].dtype == teacher.logits[0].dtype == torch.bfloat16
    p, t = (torch.sigmoid(torch.cat(network.logits).double()) for network in (student, teacher))
    dice = -2 * (p[:2] * y).sum() / (p[:2].sum() + y.sum())
    distance = F.binary_cross_entropy(p, t) if consistency == "bce" else ((p - t) ** 2).mean()
    assert losses["dice_loss"].item() == pytest.approx(dice.item(), abs=1e-6)
    assert losses["consistency_loss"].item() == pytest.approx(distance.item(), abs=1e-6)


def test_all_draws_are_on_the_device_of_the_images():
    x, y, u = batch()
    networks_and_optimizer, data = networks(), sets()
    with torch.device("meta"):                           # stands for a GPU that is the default
        losses = mt.train_step(*networks_and_optimizer, x, y, u, 0, affine=(20.0, 3.0, 0.1))
        shown = [*mt.batches(data, 6, 2, 0)]
    assert all(loss.isfinite() for loss in losses.values())
    assert [(len(x), len(u)) for x, _, u in shown] == [(2, 0)] * 6 and not shown[0][0].is_meta
    assert mt.sample_affine(2, 4.5, 1.0, 0.1, device="meta").device.type == "meta"


def test_a_frozen_layer_stays_frozen_in_student_and_teacher():
    student, teacher, optimizer = networks(frozen_network())
    before, before_modes = clone(student), modes(student)
    for step in range(2):
        mt.train_step(student, teacher, optimizer, *batch(), step)
    for network in (student, teacher):
        assert modes(network) == before_modes == [True, True, False, True, True, True, True]
        assert torch.equal(network[1].running_mean, before["1.running_mean"])
        assert not torch.equal(network[3].running_mean, before["3.running_mean"])
    assert modes(mt.make_teacher(student.eval())) == [False] * 7


@pytest.mark.parametrize("damage, message", [
    (lambda student, teacher, masks: student.eval(), r"train mode.*\.train\(\)"),
    (lambda student, teacher, masks: teacher.eval(), r"train mode.*\.train\(\)"),
    (lambda student, teacher, masks: masks.mul_(255), "masks must be in .0, 1., got 0 to 255"),
    (lambda student, teacher, masks: masks.sub_(1.5), "masks must be in .0, 1., got -1.5 to -0.5"),
    (lambda student, teacher, masks: masks.add_(math.nan), "masks must be in .0, 1., got nan")])
def test_a_step_refuses_eval_mode_and_masks_outside_0_to_1(damage, message):
    student, teacher, optimizer = networks()
    images, masks, unlabelled = batch()
    damage(student, teacher, masks)
    before = clone(student)
    for second in [teacher] + [None] * teacher.training:
        with pytest.raises(ValueError, match=message):
            mt.train_step(student, second, optimizer, images, masks, unlabelled, 0)
    assert same(student.state_dict(), before)


# --- Configuration -------------------------------------------------------------------------------

def test_the_defaults_are_the_papers_and_those_of_the_demo():
    visit = r"_(ses|run)-[A-Za-z0-9]+|Ses\d+|_frame\d+"
    paper = dict(
        data="", out="", method=mt.METHODS, runs=1, seed=0, device="auto", spacing=0.25, crop=200,
        label=(1,), rater="4", contrast=("T2star", "T2starw"), mask_name=("gmseg", "label-GM"),
        visit=visit, negative_slices="drop", split=(2, 2, 3), split_seed=0, train=(), val=(),
        test=(), width=64, dropout=0.5, epochs=(1600, 350), steps=0, batch=8,
        unlabelled_batch=8, lr=6e-4, lr_ramp=50, weight_decay=(8e-4, 6e-4), consistency_weight=2.9,
        consistency_ramp=100, alpha=0.99, alpha_late=0.999, alpha_epochs=50, consistency="bce",
        augmentation="delayed", confidence=0.0, degrees=4.5, translation=0.0, scale=0.0, noise=0.1,
        threshold=0.5, validate_every=10)
    assert vars(mt.Config()) == paper
    assert vars(mt.DEMO) == paper | dict(
        crop=64, split=(1, 2, 3), width=8, dropout=0.05, epochs=(30,), steps=700, batch=4,
        unlabelled_batch=4, lr=3e-3, lr_ramp=3, weight_decay=(2e-3,), consistency_ramp=30,
        alpha=0.95, alpha_late=0.99, alpha_epochs=8, degrees=20.0, translation=3.0, scale=0.1,
        noise=0.2, validate_every=5)
    step = inspect.signature(mt.train_step).parameters
    defaults = {name: step[name].default for name in ("weight", "alpha", "affine", "noise", "amp")}
    assert defaults == dict(weight=2.9, alpha=0.99, affine=(4.5, 0.0, 0.0), noise=0.1, amp=False)


def another(name, value):
    """A value of a setting that is not its default."""
    choices = mt.CHOICES.get(name)
    if isinstance(value, tuple) and choices:
        return value[1:]
    if isinstance(value, tuple):
        return tuple(v + 1 if v != str(v) else "x" + v for v in value) or ("x", "y")
    if isinstance(value, str):
        return next(word for word in choices or ["x"] if word != value)
    return value + 8 if isinstance(value, int) else value / 2 + 0.125


def test_every_field_is_an_option_and_help_explains_it(capsys):
    values = {name: another(name, value) for name, value in vars(mt.Config()).items()}
    for preset in ("paper", "demo"):
        options = ["--preset", preset, *arguments(**values)[2:]]
        assert mt.parse(options) == (mt.Config(**values), preset)
    with pytest.raises(SystemExit) as stop:
        main("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    # The help of a setting is its comment in the file, all lines of it, and no other comment.
    lines = [line.strip() for line in SCRIPT.read_text().splitlines()]
    for name, default in vars(mt.Config()).items():
        first, = [k for k, line in enumerate(lines) if re.match(rf"{name}: \w+ = .*#", line)]
        comment = [lines[first].split("# ", 1)[1]]
        while lines[first + len(comment)].startswith("# "):
            comment.append(lines[first + len(comment)][2:])
        value = default if isinstance(default, tuple) else (default,)
        described = " ".join([*comment, f"[{' '.join(map(str, value))}]"])
        option = re.escape("--" + name.replace("_", "-"))
        assert re.search(f"{option} [^#]{{1,200}}{re.escape(described)} (--|--preset)", text), name
    assert "#" not in text


def test_autocast_is_for_gpus_that_compute_in_bfloat16(monkeypatch):
    # An older GPU can emulate bfloat16, and PyTorch says so unless it is asked to leave it.
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or native)
        for kind in ("cuda", "cpu", "mps"):
            amp = mt.step_options(mt.DEMO, torch.device(kind))["amp"]
            assert amp == (native and kind == "cuda")


# --- Data ----------------------------------------------------------------------------------------

LAYOUTS = {"scgm": write_scgm, "bids": write_bids, "decathlon": write_decathlon}


def touch(folder, *paths):
    """Empty files: looking for scans opens none. -> folder"""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def masks_of(folder, *how):
    """-> dict: name of a scan -> the names of its masks, without folder and ending"""
    return {scan.name: [Path(mask).name for mask in scan.masks]
            for scan in mt.find_scans(folder, *how)}


def mask_path(scan):
    return list(scan.masks.values())[0]


def read(scan, role="train", **changes):
    return mt.read_scan(scan, setting(**{"crop": 32, **changes}), role)


def equal(one, other):
    return (torch.equal(one.images, other.images) and torch.equal(one.masks, other.masks)
            and one.where == other.where)


def test_every_layout_ending_and_orientation_gives_the_same_slices(tmp_path):
    results = []
    for (layout, write), ending, axes in itertools.product(
            LAYOUTS.items(), (".nii", ".nii.gz"), ("RAS", "LPS", "SRA")):
        folder = tmp_path / f"{layout}{ending}-{axes}"
        write(folder, mm=(0.4, 0.6, 3.0), axes=axes, ending=ending)
        if layout == "bids":                             # of several masks, the first is read
            touch(folder, "derivatives/labels/sub-a/anat/sub-a_run-1_T2starw_gmseg-other.nii")
        one = next(scan for scan in mt.find_scans(folder) if scan.masks)
        results.append(read(one)._replace(where=[]))
    mask = folder / "labelsTr/case_1.nii.gz"             # a mask may have another ending
    mask.with_suffix("").write_bytes(gzip.decompress(mask.read_bytes()))
    with pytest.raises(mt.InputError, match=r"labelsTr.*case_1.* as \.nii and as \.nii\.gz"):
        mt.find_scans(folder)
    mask.unlink()
    results.append(read(mt.find_scans(folder)[0])._replace(where=[]))
    assert len(results) == 19 and len(results[0].images) == 3 and results[0].masks.sum() == 78
    assert all(equal(one, results[0]) for one in results)


def test_what_each_layout_says_of_a_scan(tmp_path):
    touch(tmp_path / "scgm", *[f"any/where/site2-sc10-mask-r{rater}.nii.gz" for rater in "1234"],
          "any/where/site2-sc10-image.nii.gz", "site1-sc11-image.nii", "site1-sc11-mask-r3.nii",
          ".hidden/site2-sc04-image.nii", "any/.where/site2-sc05-image.nii")
    others = ["T2starw_seg", "T2starw_gmseg", "T1w", "T2starwz", "xT2starw", "mask",
              "label-GM_T2starw", "desc-smooth_T2starw", "space-T1w_T2starw", "part-phase_T2star",
              "part-real_T2starw", "acq-sag_part-imag_T2starw"]
    touch(tmp_path / "bids", *[f"sub-b/anat/sub-b_{name}.nii.gz" for name in others],
          "sub-b/anat/sub-b_T2starw.nii.gz/a-folder", "sub-c/x_desc-y/anat/sub-c_T2starw.nii.gz",
          "sub-c/x_desc-y/anat/sub-c_acq-sag_run-2_part-mag_T2star.nii.gz",
          "sub-a/ses-2/anat/sub-a_ses-2_T2star.nii",
          "derivatives/labels/sub-a/ses-2/anat/sub-a_ses-2_T2star_gmseg.nii.gz",
          "derivatives/labels/sub-a/ses-1/anat/sub-a_ses-2_T2star_gmseg.nii.gz",
          "sub-b/func/sub-b_T2starw.nii.gz",
          "derivatives/x/sub-b/anat/sub-b_T2starw.nii.gz", "sub-b/anat/._sub-b_T2starw.nii.gz")
    touch(tmp_path / "decathlon", "imagesTr/a.nii", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz",
          "labelsTs/b.nii.gz", "labelsTr/b.nii.gz", "labelsTr/c.nii.gz", "x/imagesTr/d.nii.gz",
          "imagesTr/.a.nii", "imagesTs/._b.nii.gz", "labelsTr/.a.nii.gz")
    said = {layout: {(scan.site, scan.subject, scan.name, *[
        str(path.relative_to(tmp_path / layout)) for path in (scan.image, *scan.masks.values())])
        for scan in mt.find_scans(tmp_path / layout, rater="3")} for layout in LAYOUTS}
    assert said == {
        "scgm": {("site2", "site2-sc10", "site2-sc10", "any/where/site2-sc10-image.nii.gz",
                  "any/where/site2-sc10-mask-r3.nii.gz"),
                 ("site1", "site1-sc11", "site1-sc11", "site1-sc11-image.nii")},
        "bids": {("", "sub-a", "sub-a_ses-2_T2star", "sub-a/ses-2/anat/sub-a_ses-2_T2star.nii",
                  "derivatives/labels/sub-a/ses-2/anat/sub-a_ses-2_T2star_gmseg.nii.gz"),
                 ("", "sub-c", "sub-c_T2starw", "sub-c/x_desc-y/anat/sub-c_T2starw.nii.gz"),
                 ("", "sub-c", "sub-c_acq-sag_run-2_part-mag_T2star",
                  "sub-c/x_desc-y/anat/sub-c_acq-sag_run-2_part-mag_T2star.nii.gz")},
        "decathlon": {("", "a", "a", "imagesTr/a.nii", "labelsTr/a.nii.gz"),
                      ("", "b", "b", "imagesTs/b.nii.gz")}}
    assert masks_of(tmp_path / "scgm")["site2-sc10"] == ["site2-sc10-mask-r4"]   # the default


GREY = ["T2star_gmseg", "T2star_gmseg-manual", "T2star_label-GM_seg",
        "T2star_label-GM_desc-manual_mask1", "label-GM_mask"]


@pytest.mark.parametrize("contrasts, mask_names, expected", [
    (["T1w"], ["label-hippo"], {"sub-a_T1w": ["sub-a_T1w_label-hippocampus_mask"]}),
    (["T1w"], ["hippocampus"], {"sub-a_T1w": []}), (["T1w"], ["mask"], {"sub-a_T1w": []}),
    (["FLAIR", "T1w"], ["dseg"], {"sub-a_T1w": ["sub-a_T1w_dseg"], "sub-b_FLAIR": []}),
    (["desc-x_FLAIR"], ["dseg"], {"sub-b_desc-x_FLAIR": []}),
    (["FLAIR", "desc-x_FLAIR"], ["dseg"], {"sub-b_FLAIR": [], "sub-b_desc-x_FLAIR": []}),
    # The first of the names counts, then the order of the alphabet.
    (["T1w"], ["label-hippo", "dseg"],
     {"sub-a_T1w": ["sub-a_T1w_label-hippocampus_mask", "sub-a_T1w_dseg"]}),
    # Each contrast has masks of its own; then those that name none.
    (["T1w", "T2w"], ["dseg"],
     {"sub-a_T1w": ["sub-a_T1w_dseg"], "sub-a_T2w": ["sub-a_T2w_dseg1", "sub-a_T2w_dseg2"]}),
    (["T1w", "T2w"], ["label-cord"],
     {"sub-a_T1w": ["sub-a_label-cord_mask"],
      "sub-a_T2w": ["sub-a_T2w_label-cord", "sub-a_label-cord_mask"]}),
    # Grey matter goes by an old and a new name. The cord is never taken for it.
    (["T2star"], mt.Config().mask_name,
     {f"sub-g{k}_T2star": [f"sub-g{k}_{name}"] for k, name in enumerate(GREY)})])
def test_contrast_and_mask_name_choose_files(tmp_path, contrasts, mask_names, expected):
    masks = ["sub-a_T1w_label-hippocampus_mask", "sub-a_T1w_dseg", "sub-a_T2w_dseg1",
             "sub-a_T2w_dseg2", "sub-a_label-cord_mask", "sub-a_T2w_label-cord"]
    names = ["sub-a_T1w", "sub-a_T2w", "sub-b_FLAIR", "sub-b_desc-x_FLAIR"]
    for k, name in enumerate(GREY):
        names.append(f"sub-g{k}_T2star")
        masks += [f"sub-g{k}_{name}", f"sub-g{k}_T2star_label-SC_seg", f"sub-g{k}_label-SC_seg"]
    for folder, files in (("", names), ("derivatives/labels/", masks)):
        for name in files[::-1]:
            touch(tmp_path, f"{folder}{name.split('_')[0]}/anat/{name}.nii.gz")
    # Scans are in the order of their names, not in that of the disk.
    assert list(masks_of(tmp_path, contrasts, mask_names).items()) == list(expected.items())


MISSING = "scans count as unlabelled .*--mask-name.*--rater.*; for example "


@pytest.mark.parametrize("files, note", [
    ("site1-sc01-image site1-sc01-mask-r4 site1-sc11-image", ""),
    ("sub-a/anat/sub-a_T2star sub-b/anat/sub-b_T2star "
     "derivatives/labels/sub-a/anat/sub-a_T2star_gmseg", ""),
    ("imagesTr/a labelsTr/a imagesTs/b", ""),
    ("site1-sc01-image site1-sc02-image site1-sc01-mask-r1", f"{MISSING}.*site1-sc01-image.nii"),
    ("sub-a/anat/sub-a_T2star derivatives/labels/sub-a/anat/sub-a_T2star_grey "
     "sub-b/anat/sub-b_T2star derivatives/labels/sub-b/anat/sub-b_T2star_grey",
     f"{MISSING}.*a_T2star.nii"),
    ("imagesTr/a imagesTr/b labelsTr/a_seg labelsTr/b", f"{MISSING}.*imagesTr/a.nii"),
    ("sub-a/anat/sub-a_T2star derivatives/labels/sub-a/anat/sub-a_T2star_gmseg-also "
     "derivatives/labels/sub-a/anat/sub-a_T2star_gmseg sub-b/anat/sub-b_T2star "
     "derivatives/labels/sub-b/anat/sub-b_gmseg derivatives/labels/sub-b/anat/sub-b_gmseg_2",
     "where several masks match --mask-name, the first is used.*_T2star_gmseg-also'.*_gmseg'"),
    ("sub-a/anat/sub-a_T2star sub-a/anat/sub-a_desc-x_T2star sub-a/anat/sub-a_part-phase_T2star",
     "derived and non-magnitude images are left out.*--contrast .*; for example sub-a_desc-x_T")])
def test_what_find_scans_notes_is_printed_once(tmp_path, capsys, files, note):
    mt.find_scans(touch(tmp_path, *[f"{name}.nii" for name in files.split()]))
    assert re.fullmatch(f"note: {note}.*\n" if note else "", capsys.readouterr().out)


@pytest.mark.parametrize("layout, part", [
    ("scgm", "training"), ("bids", "sub-a"), ("bids", "derivatives"), ("decathlon", "labelsTr")])
def test_links_to_folders_are_followed_and_broken_ones_named(tmp_path, layout, part):
    folder, store = tmp_path / "study", tmp_path / "store"
    LAYOUTS[layout](folder)
    before = masks_of(folder)
    (folder / part).rename(store)
    (folder / part).symlink_to(store)
    (folder / "participants.tsv").symlink_to("gone")     # other files do not matter
    assert any(before.values()) and masks_of(folder) == before
    store.rename(tmp_path / "elsewhere")
    with pytest.raises(mt.InputError, match=f"^{folder / part}: .*broken link"):
        mt.find_scans(folder)


def test_a_folder_that_may_not_be_read_is_named(study, monkeypatch):
    def denied(path):                                    # chmod would not stop root
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match=f"Permission denied: '{study}'"):
        mt.find_scans(study)


def fake(subject, masked=True, site="", run=""):
    """A Scan without files: a split looks at names alone."""
    masks = {f"{subject}{run}": Path("mask.nii")} if masked else {}
    return mt.Scan(site, subject, subject + run, Path("image.nii"), masks)


def split(scans, options, **changes):
    """-> dict: set -> names of its scans"""
    config, _ = mt.parse(["--data", "DIR", *options.split()])
    sets = mt.split_scans(scans, dataclasses.replace(config, **changes))
    return {name: [scan.name for scan in members] for name, members in sets.items()}


CENTRES = [fake(f"site{s}-sc{n:02d}", n < 11, f"site{s}") for s in "1234" for n in range(1, 21)]


def test_the_papers_split_has_every_subject_once_and_the_same_number_of_each_site():
    sets = split(CENTRES, "--split 2 2 3")
    everyone = sum(sets.values(), [])
    assert len(everyone) == len(set(everyone)) == 68     # 12 labelled subjects are not used
    for name, count in (("train", 2), ("val", 2), ("test", 3), ("unlabelled", 10)):
        assert sorted(member[:5] for member in sets[name]) == sorted(
            [f"site{s}" for s in range(1, 5)] * count)
    assert all(int(name[-2:]) > 10 for name in sets["unlabelled"])
    # Only --split-seed makes it another one. --seed and the order of files do not.
    assert sets != split(CENTRES, "--split 2 2 3 --split-seed 1")
    again = split(CENTRES[::-1], "--split 2 2 3 --seed 7")
    assert sets == {name: members[::-1] for name, members in again.items()}
    for train in (1, 4, 5):                              # only the training subjects change
        other = split(CENTRES, f"--split {train} 2 3")
        assert len(other["train"]) == 4 * train
        assert all(other[name] == sets[name] for name in ("val", "test", "unlabelled"))


def test_over_seeds_every_subject_is_drawn_equally_often_and_sites_independently():
    scans = [scan for scan in CENTRES if scan.site < "site3" and int(scan.name[-2:]) <= 3]
    together = np.zeros((3, 3), int)
    for seed in range(180):
        one, other = split(scans, "--split 1 1 1", split_seed=seed)["test"]
        together[int(one[-2:]) - 1, int(other[-2:]) - 1] += 1
    assert together.min() > 5 and together.max() < 40    # 20 of each pair, +- 4.2 (binomial)


def test_the_split_of_a_seed_is_the_same_in_every_process(tmp_path):
    code = ("import mean_teacher_seg as mt; scans = [mt.Scan('', c, c, c, {c: 1}) for c in "
            "'abcdefghijklmnop']; config = mt.Config(split=(5, 0, 5)); "
            "print([scan.name for scan in mt.split_scans(scans, config)['train']])")
    # The order of a set of names, and so a draw from it, would not be.
    here = split([fake(c) for c in "abcdefghijklmnop"], "--split 5 0 5")["train"]
    there = process("-c", code, cwd=tmp_path, PYTHONHASHSEED="12345").stdout
    assert ast.literal_eval(there) == here and len(here) == 5


@pytest.mark.parametrize("visits, options", [
    ("sub-{}Ses{}", ""), ("sub-{}_ses-{}", ""), ("patient{:03d}_frame{:02d}", ""),
    ("sub-ses{}_ses-pre{}_run-12", ""), ("{}-at{}", "--visit=-at.*")])
def test_no_other_visit_of_a_held_out_individual_is_in_any_other_set(visits, options):
    person, scans = {}, []
    for k, visit in itertools.product(range(1, 8), (1, 2, 10, 11)):
        scans.append(fake(visits.format(k, visit), masked=visit != 10 and (k, visit) != (3, 2)))
        person[scans[-1].name] = k
    for seed in range(20):
        sets = split(scans, f"{options} --split 2 1 2", split_seed=seed)
        people = {name: {person[member] for member in sets[name]} for name in sets}
        assert [len(people[name]) for name in ("train", "val", "test")] == [2, 1, 2]
        assert len(people["train"] | people["val"] | people["test"]) == 5
        for name in ("train", "val", "test"):            # every labelled visit of theirs is in
            assert sets[name] == [scan.name for scan in scans
                                  if scan.masks and person[scan.name] in people[name]]
        held_out = people["val"] | people["test"]
        assert sets["unlabelled"] == [scan.name for scan in scans
                                      if not scan.masks and person[scan.name] not in held_out]


# a has two sessions. All sessions and b, c, d have a run 1 with a mask and a run 2 without.
RUNS = [fake(subject, run == 1, run=f"_{run}")
        for subject in ("aSes1", "aSes2", "b", "c", "d") for run in (1, 2)]
RUNS.append(fake("e", masked=False, run="_1"))


@pytest.mark.parametrize("options, train, val, test, unlabelled", [
    # Scans without masks are unlabelled, but not those of test and validation subjects.
    ("--train b --val c --test d", "b_1", "c_1", "d_1", "aSes1_2 aSes2_2 b_2 e_1"),
    # One session is named, both have its role.
    ("--train b c --test aSes1", "b_1 c_1", "", "aSes1_1 aSes2_1", "b_2 c_2 d_2 e_1"),
    ("--train b c --test d --val aSes2", "b_1 c_1", "aSes1_1 aSes2_1", "d_1", "b_2 c_2 e_1"),
    ("--train aSes1 --test b c d", "aSes1_1 aSes2_1", "", "b_1 c_1 d_1", "aSes1_2 aSes2_2 e_1"),
    # No test, if none is asked for.
    ("--train aSes1 b", "aSes1_1 aSes2_1 b_1", "", "", "aSes1_2 aSes2_2 b_2 c_2 d_2 e_1"),
    ("--train b --val aSes1 c d", "b_1", "aSes1_1 aSes2_1 c_1 d_1", "", "b_2 e_1"),
    ("--split 0 0 4", "", "", "aSes1_1 aSes2_1 b_1 c_1 d_1", "e_1")])
def test_subjects_by_name(options, train, val, test, unlabelled):
    expected = [members.split() for members in (train, val, test, unlabelled)]
    assert list(split(RUNS, options).values()) == expected


@pytest.mark.parametrize("options, message", [
    ("--train aSes1 --test aSes2", "--test aSes2: is in --train as well"),
    ("--train b --val c --test c", "--test c: is in --val as well"),
    ("--train b --test x", "--test x: .*no such subject"),
    ("--train b --test c e", "--test e: .*mask"),
    ("--train e --test c", "--train e: .*mask"),
    ("--train b --val e", "--val e: .*mask"),
    ("--val c", "--val and --test need --train"),
    ("--test c", "--val and --test need --train"),
    ("--split 2 2 3", r"^4 subjects with masks in DIR, too few for --split \(2, 2, 3\)")])
def test_a_split_that_cannot_be_is_an_error(options, message):
    with pytest.raises(mt.InputError, match=message):
        split(RUNS, options)


def test_the_labelled_scans_left_over_are_unlabelled_if_no_others_are():
    scans = [fake(name) for name in "abcdefgh"]
    sets = split(scans, "--split 2 1 1")
    assert [len(members) for members in sets.values()] == [2, 1, 1, 4]
    assert sorted(sum(sets.values(), [])) == list("abcdefgh")
    # A site with unlabelled scans only takes no part in the draw.
    scans.append(fake("i", masked=False, site="site9"))
    assert split(scans, "--split 2 1 1") == {**sets, "unlabelled": ["i"]}
    # The same with named subjects
    assert split(scans[:8], "--train a b --test d")["unlabelled"] == list("cefgh")
    assert split(scans, "--train a b --test d")["unlabelled"] == ["i"]


@pytest.mark.parametrize("changes", [
    {"train": ("a",)},                                   # is enough, and no test is needed
    {"train": ("a",), "test": ("b",)}, {"split": (1, 0, 1)}])            # some are left over
def test_masks_of_unlabelled_scans_are_not_opened(tmp_path, changes):
    write_decathlon(tmp_path, "abcd")
    before = mt.load_data(setting(data=str(tmp_path), **changes))
    for name in {scan for _, scan, _ in before["unlabelled"].where}:
        (tmp_path / f"labelsTr/{name}.nii.gz").write_bytes(b"not a NIfTI")
    after = mt.load_data(setting(data=str(tmp_path), **changes))
    assert len(after["unlabelled"].images) > 0 == len(after["unlabelled"].masks)
    for name, old in before.items():
        assert equal(old, after[name]) and old.checksums == after[name].checksums


def raw(voxels, affine=GRID, **fields):
    """A NIfTI file without compression, with fields of its header overwritten. -> bytes"""
    content = nib.Nifti1Image(voxels, affine).to_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + content[348:]


@pytest.mark.parametrize("write", [
    *[lambda v, dtype=dtype: raw(v.astype(dtype)) for dtype in "u1 i2 u2 i4 f8".split()],
    *[lambda v, axes=axes: nib.Nifti1Image(v, GRID).as_reoriented(
        nib.orientations.axcodes2ornt(axes)).to_bytes() for axes in ("LPS", "SRA", "PIL", "ASR")],
    lambda v: nib.Nifti1Image(v, GRID, nib.Nifti1Header(endianness=">")).to_bytes(),
    lambda v: nib.Nifti2Image(v, GRID).to_bytes(), lambda v: gzip.compress(raw(v)),
    lambda v: raw(v, vox_offset=376)[:352] + bytes(24) + raw(v)[352:],
    lambda v: raw(v[..., None]), lambda v: raw(v[..., None, None]),
    lambda v: raw((2 * v - 6).astype("i2"), scl_slope=0.5, scl_inter=3),
    lambda v: raw(v, qform_code=6), lambda v: raw(v, xyzt_units=0),
    lambda v: raw(v, xyzt_units=2 + 8),                  # mm and seconds
    lambda v: raw(v, pixdim=[1, 0.5095, 0.4905, 5.095, 0, 0, 0, 0])])    # off by 1.9 %
def test_what_nibabel_reads_gives_the_same_slices(scan, write):
    results = []
    for of_image, of_mask in ((raw, raw), (write, raw), (raw, write), (write, write)):
        for path, voxels, how in ((scan.image, np.rint(cord(1)[0]), of_image),
                                  (mask_path(scan), cord(1)[1], of_mask)):
            path.write_bytes(how(voxels.astype(np.float32)))
        results.append(read(scan))
    assert all(equal(results[0], other) for other in results) and len(results[0].images) == 3


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1:]


V = cord(1)[1].astype(np.float32)                        # serves as image and as mask
UNREADABLE = "cannot be read as NIfTI"
BAD_FILES = {
    "complex": (raw(V.astype(np.complex64)), "complex64 voxels, expected one real number"),
    "2-D": (raw(V[..., 0]), r"\(40, 36\) voxels, expected three dimensions"),
    "4-D": (raw(V[..., None].repeat(2, 3)), r"\(40, 36, 3, 2\) voxels, expected three dim"),
    "zero extent": (raw(V, dim=[3, 40, 0, 3, 1, 1, 1, 1]), r"\(40, 0, 3\) voxels, expected three"),
    "NaN": (raw(np.where(V == 1, np.nan, V)), "NaN or infinite voxels"),
    "infinite": (raw(np.where(V == 1, np.inf, V)), "NaN or infinite voxels"),
    "infinite sform": (raw(V, srow_y=[0, np.inf, 0, 0]), "infinite values in its affine"),
    "infinite translation": (raw(V, srow_y=[0, 0.5, 0, np.inf]), "infinite values in its affine"),
    "NaN translation": (raw(V, sform_code=0, qform_code=1, qoffset_z=np.nan), "in its affine"),
    "40000 slices": (nib.Nifti2Image(np.zeros((2, 2, 40000), np.uint8), GRID).to_bytes(),
                     UNREADABLE),
    "micron": (raw(V, xyzt_units=3), "voxel sizes in micron, expected mm"),
    "tiny": (raw(V, np.diag([0.005, 0.5, 5, 1])), r"implausible voxel sizes, \[0.005 0.5 "),
    "giant": (raw(V, np.diag([0.5, 0.5, 150, 1])), "implausible voxel sizes, .*150"),
    "singular": (raw(V, GRID[:, [0, 0, 2, 3]]), "singular affine"),
    # Affine and pixdim differ by 2.2 %, or by a factor of two.
    **{f"pixdim {sizes}": (raw(V, pixdim=[1, *sizes, 0, 0, 0, 0]),
                           rf"sizes, \[0.5 0.5 5. \] mm by .*{found}.* mm by pixdim")
       for sizes, found in (((0, 0.5, 5), 0), ((0.489, 0.5, 5), 0.489), ((0.5, 0.511, 5), 0.511),
                            ((0.5, 0.5, 10), 10))},
    "wide": (raw(np.zeros((90, 9, 2)), np.diag([50, 1, 1, 1])), "9000 px along a side at --spac"),
    "long": (raw(np.zeros((9, 9000, 2)), np.diag([1, 1, 5, 1])), "18000 px along a side at --sp"),
    "broken link": (None, f"{UNREADABLE} .*FileNotFound"),
    "empty": (b"", UNREADABLE), "text": (gzip.compress(b"hello " * 99), UNREADABLE),
    "half": (raw(V)[:9000], UNREADABLE), "packed": (gzip.compress(raw(V))[:-300], UNREADABLE),
    # Only gzip's own checksum sees these. At level 0, most bits are a voxel's.
    "flipped bit": (flipped(gzip.compress(raw(V), 0), 9999), f"{UNREADABLE} .*CRC"),
    "flipped bit near the end": (flipped(gzip.compress(raw(V), 0), -9), f"{UNREADABLE} .*CRC")}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(scan, tmp_path, caplog, case):
    content, message = BAD_FILES[case]
    nib.imageglobals.logger.setLevel("WARNING")
    for path in (mask_path(scan), scan.image):
        path.unlink()
        if content is None:
            path.symlink_to("../.git/annex/objects/x/y.nii.gz")
        else:
            path.write_bytes(content)
        same_scan, = mt.find_scans(tmp_path / "study")
        with pytest.raises(mt.InputError, match=f"^{path}: .*{message}"):
            read(same_scan)
    assert not caplog.records                            # nibabel adds no line of its own


def test_a_checksum_is_that_of_the_content_of_the_files_that_were_read(scan, tmp_path):
    def checksums(scan):
        (name, both), = read(scan).checksums.items()
        assert name == scan.name
        return both, read(scan, "unlabelled").checksums[name]

    before = checksums(scan)
    write_bids(tmp_path / "elsewhere", ending=".nii")    # neither folder nor packing counts
    other, = mt.find_scans(tmp_path / "elsewhere")
    assert before[0] != before[1] and checksums(other) == before
    for path, place, same_image in ((mask_path(other), -1, True),        # one voxel of the mask
                                    (other.image, -1, False),            # or of the image
                                    (other.image, 280, False)):          # or the affine
        content = path.read_bytes()
        path.write_bytes(flipped(content, place))
        changed = checksums(other)
        assert changed[0] != before[0] and (changed[1] == before[1]) == same_image
        path.write_bytes(content)


@pytest.mark.parametrize("value, whole", [
    (0.012, 0), (-0.012, 0), (0.988, 1), (1.012, 1), (1.988, 2), (254.99, 255), (70000, 70000),
    *[(value, None) for value in (0.031, 0.5, 0.969, 1.5, 254.5, -0.5)]])
def test_label_names_values_which_are_whole_numbers_but_for_002(scan, capsys, value, whole):
    mask = np.where(cord(1)[1] == 1, np.float32(value), cord(1)[1] * 4)       # and 8
    mask[0, 0] = -1
    write_nifti(mask_path(scan), mask)
    if whole is None:
        with pytest.raises(mt.InputError, match=rf"gmseg.*: has values \[{value}.*whole numbers"):
            read(scan)
        return
    for label in ((8,), (whole or 8,), (8, whole or 7)):
        found = read(scan, "val", label=label, crop=40).masks[:, 0, 2:-2]
        assert np.array_equal(found, np.isin(np.rint(mask), label)[:, ::-1].T)
    assert capsys.readouterr().out == ""
    assert not len(read(scan, label=(7, 9)).masks)
    values = np.unique([-1, 0, whole, 8])
    assert f"{mask_path(scan)}: no voxel of --label (7, 9), its values are {values}\n" in (
        capsys.readouterr().out)


ALL = np.ones((300, 300, 2), np.float32)


@pytest.mark.parametrize("mask, change, error", [
    *[(ALL, moved(0, *np.eye(3)[axis] * GRID[axis, axis] * voxels),
       "affines" if abs(voxels) > 0.25 else None)
      for voxels in (-0.249, 0.249, -0.251, 0.251) for axis in range(3)],
    # The last of 300 voxels is off by 300 times the angle, or the scale, the first by nothing.
    (ALL, moved(8e-4), None), (ALL, moved(9e-4), "affines"), (ALL, moved(math.pi), "affines"),
    (ALL, np.diag([1.0008, 1, 1, 1]), None), (ALL, np.diag([1.0009, 1, 1, 1]), "affines"),
    (ALL[1:], np.eye(4), r"\(299, 300, 2\) voxels, expected \(300, 300, 2\); resample"),
    (ALL[..., :1], np.eye(4), r"\(300, 300, 1\) voxels, expected .*; resample"),
    (ALL.transpose(2, 0, 1), np.eye(4), r"\(2, 300, 300\) voxels, expected .*; resample")])
def test_a_mask_is_off_its_image_by_a_quarter_of_a_voxel_at_most(tmp_path, mask, change, error):
    nib.save(nib.Nifti1Image(mask, change @ GRID), tmp_path / "m.nii")
    image = nib.Nifti1Image(ALL, GRID)
    if error:
        with pytest.raises(mt.InputError, match=f"m.nii: is not on the grid.*: .*{error}") as stop:
            mt.read_mask(tmp_path / "m.nii", setting(), image)
        assert ("resample" in str(stop.value)) == ("resample" in error)
    else:
        found, _ = mt.read_mask(tmp_path / "m.nii", setting(), image)
        assert found.get_fdata().all() and np.array_equal(found.affine, GRID)


@pytest.mark.parametrize("degrees", [45, 135, 225, 315])
@pytest.mark.parametrize("axis", range(3))
def test_image_and_mask_of_an_oblique_scan_stay_aligned(scan, axis, degrees):
    # The image has its affine in the sform, the mask in the qform, where it is rounded. At these
    # angles the rounding decides which axis of the world is closest.
    rotation = nib.eulerangles.euler2mat(*math.radians(degrees) * np.eye(3)[axis])
    affine = nib.affines.from_matvec(0.5 * rotation, [-10, 3, 7])
    volume = np.random.default_rng(0).normal(100, 1, (32, 32, 32))
    mask = np.zeros(volume.shape)
    mask[8:14, 12:20, 9:22] = 1                          # without any symmetry
    volume[mask == 1] = 200
    for path, voxels, code in ((scan.image, volume, 1), (mask_path(scan), mask, 0)):
        image = nib.Nifti1Image(voxels.astype(np.float32), None)
        image.set_sform(affine, code)
        image.set_qform(affine, 1)
        nib.save(image, path)
    slices = read(scan)
    assert slices.masks.sum() == 6 * 8 * 13
    assert torch.equal((slices.images > 1).float(), slices.masks)


def test_foreground_outside_the_crop_is_reported(scan, capsys):
    mask = np.zeros(SHAPE, np.uint8)
    mask[12:28, 10:26] = 1                               # fills the crop to its border
    mask[28, 10:17, 0] = 1                               # 7 of 775 voxels: less than 1 %
    for crop, outside in ((16, False), (24, False), (16, True)):
        mask[28:30, 10:26] |= outside or crop == 24      # 96 of 864
        write_nifti(mask_path(scan), mask)
        read(scan, crop=crop)
        assert capsys.readouterr().out == outside * (
            f"warning: {mask_path(scan)}: 11% of the foreground is outside the centre crop of "
            "16 px of 0.5 mm, and left out of all metrics; raise --crop\n")


def triangle(n, pixels):
    """Weights of n voxels in each of some pixels: linear interpolation, or, when shrinking, a
    triangle of twice a pixel's width. -> (pixels, n)"""
    width, weights = n / pixels, np.zeros((pixels, n))
    for pixel, voxel in np.ndindex(pixels, n):
        distance = abs(voxel + 0.5 - (pixel + 0.5) * width)
        weights[pixel, voxel] = max(0, 1 - distance / max(1, width))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("mm, size", [                   # in 40 x 36 voxels; rows, columns
    ((0.5, 0.5), (36, 40)), ((1.25, 1.5), (108, 100)), ((0.2, 0.125), (9, 16)),
    ((0.31, 1.1), (79, 25)), ((0.011, 0.5), (36, 1)), ((0.005, 0.006), (1, 1))])
def test_slices_are_resampled_linearly_and_antialiased_from_the_front_and_the_left(mm, size):
    volume = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32)
    image = nib.Nifti1Image(volume, np.diag([*mm, 5, 1]))
    found = mt.to_slices(image, setting(crop=128), z_score=False)
    assert found.shape == (3, 1, 128, 128) and found[0, 0].any(1).sum() == size[0]
    found = mt.center_crop(found, *size)                 # without the padding
    for z in range(3):
        expected = triangle(36, size[0]) @ volume[:, ::-1, z].T @ triangle(40, size[1]).T
        assert np.abs(found[z, 0].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-9, 0), (1e5, 0), (1, 3000), (1, -30000)])
def test_z_scores_are_of_the_pixels_of_each_slice_that_exist_inside_the_crop(scan, scale, offset):
    volume = np.random.default_rng(0).normal(100, 10, (20, 48, 3)) * scale + offset
    volume[:, :, 1] = 3 * volume[:, :, 1] + 700 * scale  # slices have scales of their own
    volume[:, :8] += 99 * scale                          # outside the crop
    volume = volume.astype(np.float32).astype(float)     # as it is stored
    write_nifti(scan.image, volume)
    images = read(scan, "unlabelled").images
    expected = np.zeros((3, 1, 32, 32))
    for z in range(3):
        inside = volume[:, 8:40, z]                      # 20 columns, 6 of padding on either side
        expected[z, 0, :, 6:26] = ((inside - inside.mean()) / inside.std())[:, ::-1].T
    assert np.abs(images.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("value", [0.0, 7.3, -1000.1])
def test_scans_without_contrast_or_foreground_are_not_used_and_named(scan, capsys, value):
    volume, mask = cord(1)
    volume[:, :, 1] = value
    without, outside = mask.copy(), np.zeros_like(mask)
    without[:, :, [0, 2]] = 0                            # foreground only where there is no image
    outside[:3, :3] = 1                                  # the crop
    for other, role in ((without, "train"), (without, "val"), (outside, "test"),
                        (mask, "unlabelled")):
        write_nifti(scan.image, np.full(SHAPE, value) if role == "unlabelled" else volume)
        write_nifti(mask_path(scan), other)
        slices = read(scan, role, spacing=0.7, crop=16)      # with rounding errors
        assert len(slices.images) == len(slices.masks) == len(slices.where) == 0
        warning = f"warning: {scan.image}: not used: no slice with contrast (and, in labelled "
        assert warning in capsys.readouterr().out


def test_a_pixel_of_a_mask_is_foreground_from_one_half_on(scan):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 2, (48, 48, 1), np.uint8)
    write_nifti(scan.image, rng.normal(0, 1, mask.shape), mm=(0.25, 0.25, 5))
    write_nifti(mask_path(scan), mask, mm=(0.25, 0.25, 5))
    # Shrunk by two, away from the border, shares of foreground are multiples of 1/64.
    shares = triangle(48, 24) @ mask[:, ::-1, 0].T @ triangle(48, 24).T
    assert np.sum(shares == 0.5) > 9
    found = read(scan, crop=24).masks[0, 0].numpy()
    assert np.array_equal(found[1:-1, 1:-1], shares[1:-1, 1:-1] >= 0.5)


@pytest.mark.parametrize("value", [0.0, 7.3, -1000.1])
def test_images_masks_and_numbers_stay_together_when_slices_are_dropped(scan, value):
    volume = np.random.default_rng(0).normal(100, 1, (32, 32, 6))
    mask = np.zeros(volume.shape, np.uint8)
    for z in range(6):
        volume[4 + 3 * z:8 + 3 * z, 20 - 2 * z:23 - 2 * z, z] = 200.0
        mask[4 + 3 * z:8 + 3 * z, 20 - 2 * z:23 - 2 * z, z] = 1
    blocks = torch.from_numpy(mask[:, ::-1].T.copy()).float()            # (z, front to back, x)
    mask[:, :, 1] = 0                                    # no grey matter here
    volume[:, :, 3] = value                              # and here no contrast
    for path, voxels in ((scan.image, volume), (mask_path(scan), mask)):
        write_nifti(path, voxels, axes="LPS")
    others = [(role, "drop", [0, 1, 2, 4, 5]) for role in ("val", "test", "unlabelled")]
    for role, negative, kept in (("train", "drop", [0, 2, 4, 5]),
                                 ("train", "keep", [0, 1, 2, 4, 5]), *others):
        slices = read(scan, role, negative_slices=negative)
        assert slices.where == [("", "sub-a_run-1_T2starw", z) for z in kept]
        halves = slices.images.amax((1, 2, 3), keepdim=True) / 2
        assert torch.equal((slices.images > halves).float()[:, 0], blocks[kept])
        assert len(slices.masks) == (role != "unlabelled") * len(kept)
        for found, z in zip(slices.masks, kept):
            assert torch.equal(found[0], blocks[z] * (z != 1))


@pytest.mark.parametrize("shape, mm, noted", [
    (SHAPE, (0.5, 0.5, 5), False), (SHAPE, (1.2, 1, 0.9), False), (SHAPE, (3, 0.5, 0.5), True),
    (SHAPE, (0.5, 3, 0.5), True), ((9, 9, 1100), (1, 1, 4), False)])     # 4.4 m along z
def test_slices_that_are_thick_along_x_or_y_are_mentioned_once(scan, capsys, shape, mm, noted):
    write_nifti(scan.image, cord(1, shape)[0] if shape == SHAPE else np.zeros(shape), mm=mm)
    read(scan, "unlabelled")
    read(scan, "unlabelled")
    assert capsys.readouterr().out.count("thickest along x or y") == noted


@pytest.mark.parametrize("negative, rater", [("drop", "4"), ("keep", "2")])
def test_each_set_holds_the_slices_of_its_own_scans(tmp_path, capsys, negative, rater):
    write_scgm(tmp_path, subjects=(1, 2, 3, 4, 11, 12))
    for k, path in enumerate(sorted(tmp_path.rglob(f"*mask-r{rater}*")), start=1):
        mask = cord(100 + k)[1]
        mask[:, :, 1] = 0                                # no foreground in the middle
        write_nifti(path, mask)
    config = setting(data=str(tmp_path), split=(1, 1, 2), negative_slices=negative, rater=rater)
    data, said = mt.load_data(config), capsys.readouterr().out
    assert f"{tmp_path}: 6 scans, 4 with masks" in said and "warning" not in said
    for name, scans in mt.split_scans(mt.find_scans(tmp_path, rater=rater), config).items():
        keep = name != "train" or negative == "keep"
        parts = [read(scan, name, crop=16, negative_slices=negative) for scan in scans]
        assert len(parts) == {"train": 1, "val": 1, "test": 2, "unlabelled": 2}[name]
        kept = [0, 1, 2] if keep else [0, 2]
        assert parts[0].where == [("site1", scans[0].name, z) for z in kept]
        expected = [torch.cat([part[k] for part in parts]) for k in (0, 1)]
        assert equal(data[name], mt.Slices(*expected, sum([part.where for part in parts], []), {}))
        assert data[name].checksums == {k: v for part in parts for k, v in part.checksums.items()}
        assert f"{name}: {len(data[name].where):4d} slices of {len(scans):2d} scans\n" in said
    for part in mt.load_data(config, "meta").values():   # any other device
        assert part.images.is_meta and part.masks.is_meta


@pytest.mark.parametrize("method, subjects, warned", [
    (("mean_teacher",), (1, 2), True), (mt.METHODS, (1, 2), True),
    (("supervised",), (1, 2), False),
    (mt.METHODS, (1, 2, 3), False), (mt.METHODS, (1, 2, 11), False)])
def test_no_unlabelled_slices_are_a_warning(tmp_path, capsys, method, subjects, warned):
    write_scgm(tmp_path, subjects)
    mt.load_data(setting(data=str(tmp_path), method=method))
    assert ("warning: no unlabelled slices" in capsys.readouterr().out) == warned


def test_a_crop_undoes_a_padding_and_a_padding_puts_a_crop_back():
    x = 1 + torch.rand(2, 1, 5, 8)
    for height, width in itertools.product((2, 3, 5, 6, 8), (5, 6, 8, 9, 11)):
        back = mt.center_crop(mt.center_crop(x, height, width), 5, 8)
        kept = back > 0
        assert torch.equal(back[kept], x[kept])
        assert kept.sum() == 2 * min(height, 5) * min(width, 8)


# --- Metrics -------------------------------------------------------------------------------------

def test_metrics_against_a_loop_over_pixels():
    rng = np.random.default_rng(0)
    p, y = rng.random((6, 1, 5, 7)) < 0.4, rng.random((6, 1, 5, 7)) < 0.3
    p[0], y[1], p[2], y[2], p[3], y[3] = 0, 0, 0, 0, 1, 1   # empty, both empty, all foreground
    metrics = mt.segmentation_metrics(torch.from_numpy(p), torch.from_numpy(y))
    assert tuple(metrics) == mt.METRICS and mt.COLUMNS == (*mt.METRICS, "scan_dice")
    for n in range(6):
        pairs = list(zip(p[n].flat, y[n].flat))
        tp, fp, fn, tn = map(pairs.count, [(1, 1), (1, 0), (0, 1), (0, 0)])
        ratios = dict(dice=(2 * tp, 2 * tp + fp + fn), miou=(tp, tp + fp + fn),
                      accuracy=(tp + tn, 35), precision=(tp, tp + fp), recall=(tp, tp + fn),
                      specificity=(tn, tn + fp))
        for name, (top, below) in ratios.items():
            expected = 100 * top / below if below else 0.0
            assert metrics[name][n].item() == pytest.approx(expected, abs=1e-4), (n, name)


def test_probabilities_are_those_in_eval_mode_and_the_network_stays_as_it_was():
    network, x = frozen_network(), torch.randn(5, 1, 16, 16)
    before, before_modes = clone(network), modes(network)
    expected = torch.sigmoid(copy.deepcopy(network).eval()(x))
    for size in (2, 32):
        probabilities = mt.predict_probabilities(network, x, batch=size)
        assert torch.allclose(probabilities, expected, atol=1e-6)
        assert not probabilities.requires_grad
    assert modes(network) == before_modes and before_modes.count(False) == 1
    assert same(network.state_dict(), before)


def test_slices_with_foreground_and_whole_scans_are_evaluated_by_hand():
    # Logits of four pixels, and masks; p > threshold is foreground, 0.5 (a logit of 0) is not.
    rows = [("a", [9, 9, -9, 0], [0, 0, 0, 0]),          # no foreground: two FP for the scan
            ("a", [9, 9, 9, 0], [1, 1, 0, 1]),           # TP 2, FP 1, FN 1: Dice 4 / 6
            ("b", [9, -9, -9, -9], [1, 0, 0, 0]),        # right
            ("c", [-9, -9, -9, 0], [0, 0, 0, 0])]        # nothing to find, nothing found
    images, masks = (torch.tensor([row[k] for row in rows]).float().view(4, 1, 2, 2)
                     for k in (1, 2))
    where = [("site", row[0], z) for z, row in enumerate(rows)]
    found = mt.evaluate(nn.Identity(), mt.Slices(images, masks, where, {}), setting())
    assert [(row["site"], row["subject"], row["slice"]) for row in found] == where[1:3]
    assert all([*row] == ["site", "subject", "slice", *mt.COLUMNS] for row in found)
    assert [row["dice"] for row in found] == pytest.approx([100 * 4 / 6, 100])
    assert [row["specificity"] for row in found] == pytest.approx([0, 100])
    # a: TP 2, FP 3, FN 1
    assert [row["scan_dice"] for row in found] == pytest.approx([100 * 4 / 8, 100])
    lower = mt.evaluate(nn.Identity(), mt.Slices(images, masks, where, {}), setting(threshold=0.4))
    assert [row["dice"] for row in lower] == pytest.approx([100 * 6 / 7, 100])    # TP 3, FP 1


# --- The training loop ---------------------------------------------------------------------------

@pytest.fixture
def calls(monkeypatch):
    """What the calls of train_step were given, and what they did; in order."""
    real, made = mt.train_step, []

    def recorded(*values, **options):
        bound = inspect.signature(real).bind(*values, **options)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        call.group = dict(call.optimizer.param_groups[0])
        networks = {"student": call.student, "teacher": call.teacher or call.student}
        call.before = {name: clone(network) for name, network in networks.items()}
        call.losses = real(*values, **options)
        call.after = {name: clone(network) for name, network in networks.items()}
        made.append(call)
        return call.losses

    monkeypatch.setattr(mt, "train_step", recorded)
    return made


def train(out, method="mean_teacher", seed=0, changed={}, **changes):
    """Train on sets(), or other ones in their place."""
    return mt.train(setting(out=str(out), **changes), method, seed, sets() | changed)


def network_of(config, state):
    network = mt.build_network(config)
    network.load_state_dict(state)
    return network


def read_csv(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method, steps, sizes, changed, changes", [
    ("supervised", [3, 6, 9], (2, 0), {}, {}), ("mean_teacher", [3, 6, 9, 12], (2, 3), {}, {}),
    ("no_consistency", [3, 6, 9, 12], (2, 3), {}, {}),
    ("mean_teacher", [3, 6, 9, 12], (2, 3), {}, {"steps": 12}),
    ("mean_teacher", [2, 5, 8, 11], (2, 3), {}, {"steps": 11}),
    ("mean_teacher", [1, 2], (2, 3), {}, {"steps": 2}),
    ("mean_teacher", [1, 2, 3, 4], (7, 20), {}, {"batch": 50, "unlabelled_batch": 20}),
    ("mean_teacher", [3, 6, 9, 12], (2, 0), {}, {"unlabelled_batch": 0}),
    ("mean_teacher", [3, 6, 9, 12], (2, 0), {"unlabelled": slices(0, 4, labelled=False)}, {})])
def test_a_run_keeps_to_its_schedules(tmp_path, calls, method, steps, sizes, changed, changes):
    run = train(tmp_path, method, changed={"train": slices(7, seed=1), **changed},
                epochs=(3, 4), lr=0.1, lr_ramp=2, weight_decay=(0.1, 0.2), consistency_weight=2.0,
                consistency_ramp=4, alpha=0.5, alpha_late=0.75, alpha_epochs=2, degrees=1.0,
                translation=2.0, scale=0.3, noise=0.4, **changes)
    assert [row["step"] for row in run["history"]] == steps and run["finished"]
    assert [call.step for call in calls] == [*range(steps[-1])]
    teacher = method != "supervised"
    for call in calls:
        epoch = sum(call.step >= step for step in steps) + 1
        row, n = run["history"][epoch - 1], len(steps)   # a ramp, then a cosine that ends at 0
        lr = math.exp(-5 / 4) if epoch == 1 else (1 + math.cos(
            math.pi * (epoch - 2) / max(n - 2, 1))) / 2
        weight = math.exp(-5 * (1 - epoch / 4) ** 2) * (method == "mean_teacher")
        assert (row["lr"], row["weight"]) == (call.group["lr"], call.weight)
        assert [call.group["lr"], call.weight, call.alpha] == pytest.approx(
            [0.1 * lr, 2 * weight, 0.5 if epoch <= 2 else 0.75])
        assert (len(call.images), len(call.masks), len(call.unlabelled)) == (sizes[0], *sizes)
        assert sizes[1] < 7 or len(call.unlabelled.unique(dim=0)) == 7
        assert (call.affine, call.noise, call.amp) == ((1.0, 2.0, 0.3), 0.4, False)
        assert call.group["weight_decay"] == (0.2 if teacher else 0.1)
        assert (call.losses["consistency_loss"] > 0) == teacher


def test_slices_come_once_before_any_again_in_orders_of_seed_and_epoch(tmp_path, calls):
    def numbers(images, slices):
        return [[torch.equal(image, one) for one in slices.images].index(True) for image in images]

    def passes(shown, length):                           # the complete ones
        shown = sum(shown, [])
        return [tuple(shown[k:k + length]) for k in range(0, len(shown) - length + 1, length)]

    data, orders, weights = sets(), [], []
    for method, seed in (("mean_teacher", 0), ("mean_teacher", 1), ("supervised", 0)):
        calls.clear()
        train(tmp_path, method, seed, epochs=(2,), steps=12)
        labelled = [numbers(call.images, data["train"]) for call in calls]
        others = [numbers(call.unlabelled, data["unlabelled"]) for call in calls]
        for call, shown in zip(calls, labelled):
            assert torch.equal(call.masks, data["train"].masks[shown])
        orders.append(passes(labelled, 6))               # two in each of two epochs
        if method == "mean_teacher":
            orders.append(passes(others[:6], 7) + passes(others[6:], 7))
        weights.append(calls[0].before["student"])
    for order in orders:
        assert {tuple(sorted(shown)) for shown in order} == {tuple(range(len(order[0])))}
    assert [*map(len, orders)] == [4] * 5 and len({*orders[0], *orders[2]}) == 8
    assert len({*orders[1], *orders[3]}) == 8
    assert orders[0] == orders[4]                        # of both methods
    assert same(weights[0], weights[2]) and not same(weights[0], weights[1])


def test_every_step_has_transformations_and_noise_of_its_own(tmp_path, calls):
    # One slice and weights that rest: only what is drawn can change the loss.
    for how in ({"degrees": 90.0, "noise": 0.0}, {"degrees": 0.0, "noise": 1.0}):
        calls.clear()
        train(tmp_path / f"{how['noise']}", "supervised", 0, {"train": slices(1, seed=1)},
              epochs=(6,), lr=1e-9, translation=0.0, scale=0.0, **how)
        assert len({call.losses["dice_loss"].item() for call in calls}) == 6


@pytest.mark.parametrize("method, models", [
    ("supervised", ["student"]), ("mean_teacher", ["student", "teacher"])])
def test_log_progress_and_checkpoint_hold_what_happened(tmp_path, calls, capsys, method, models):
    config = setting(out=str(tmp_path), epochs=(7,), validate_every=3, threshold=0.45)
    data, given = sets(), []
    run = mt.train(config, method, 2, data, lambda row, networks: given.append(
        (row, {name: clone(network) for name, network in networks.items()})))
    assert same(*calls[0].before.values())               # the teacher starts as a copy
    for call, later in zip(calls, calls[1:]):
        assert all(same(later.before[model], call.after[model]) for model in models)
    for epoch, row in enumerate(run["history"], start=1):
        steps = calls[3 * epoch - 3:3 * epoch]
        for name in ("dice_loss", "consistency_loss")[:len(models)]:
            mean = np.mean([call.losses[name].item() for call in steps])
            assert row[name] == pytest.approx(mean)
        assert given[epoch - 1][0] == row and [*given[epoch - 1][1]] == models
        for model in models:
            state = steps[-1].after[model]
            assert same(given[epoch - 1][1][model], state)
            rows = mt.evaluate(network_of(config, state), data["val"], config)
            dice = [each["dice"] for each in rows]
            validated = epoch in (1, 3, 6, 7)            # the first, every third, the last
            assert row[f"val_{model}"] == pytest.approx(
                np.mean(dice) if validated else math.nan, nan_ok=True) and 0 < np.mean(dice) < 100
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title == (f"{method}, seed 2: 21 steps in 7 epochs, 2 labelled + {3 * len(models) - 3} "
                     "unlabelled slices per step, on cpu")
    for line, row in zip(lines, [run["history"][k] for k in (0, 2, 5, 6)], strict=True):
        cells = ("{epoch} {step} {lr:.2g} {weight:.2f} {dice_loss:.4f} {consistency_loss:.4f} "
                 "{val_student:.2f} {val_teacher:.2f}").format(**row).replace("nan", "-")
        assert line.split()[:-1] == cells.split() and len(line) == len(header)
    log = read_csv(tmp_path / f"{method}-seed2.csv")
    for logged, row in zip(log, run["history"], strict=True):
        values = {key: float(value) for key, value in logged.items()}
        assert values == pytest.approx(row, nan_ok=True)
    saved = torch.load(tmp_path / f"{method}-seed2.pt", weights_only=True)
    assert (saved["method"], saved["seed"], saved["finished"]) == (method, 2, True)
    assert [*saved["metrics"]] == models and saved["metrics"] == run["metrics"]
    for model in models:                                 # of the last epoch
        assert same(saved[model], run[model]) and same(saved[model], calls[-1].after[model])


@pytest.mark.parametrize("kind", ["mps", "cuda", "cpu"])
def test_networks_are_as_set_and_channels_last_but_contiguous_on_mps(monkeypatch, kind):
    real, devices = mt.UNet.to, []

    def to(network, device, **how):
        devices.append(device.type)
        return real(network, "cpu", **how)

    monkeypatch.setattr(mt.UNet, "to", to)
    config = setting(width=3, dropout=0.3)
    for network in mt.build(config, "mean_teacher", torch.device(kind))[:2]:
        weight = network.down[0][4].weight
        assert weight.shape == (3, 3, 3, 3) and weight.is_contiguous() == (kind == "mps")
        assert network.down[0][3].p == 0.3 and devices == [kind]
        assert weight.is_contiguous(memory_format=torch.channels_last) == (kind != "mps")


def assert_equal_results(folder, other):
    """All files of two folders are equal, but for temporary files that a kill has left."""
    def content(path):
        if path.suffix != ".pt":
            return path.read_bytes()
        state = torch.load(path, weights_only=True)
        state["config"]["out"] = ""
        return json.dumps(state, default=torch.Tensor.tolist)            # to the last bit

    names = {path.name for path in folder.iterdir() if path.suffix != ".part"}
    assert names == {path.name for path in other.iterdir()}
    for name in names - {"config.json"}:
        assert content(folder / name) == content(other / name), name


def test_an_interrupted_command_goes_on_bit_for_bit(study, tmp_path, monkeypatch, capsys):
    # Four trainings of 24 steps, of one or two minutes a step. A checkpoint
    # after every second epoch of three steps. In the second training, the first stop is in the
    # second step of epoch 5, the second one between the log and the checkpoint of epoch 6.
    options = arguments(data=study, epochs=8, steps=24, validate_every=2, runs=2, dropout=0.1,
                        batch=1, unlabelled_batch=1, method=("supervised", "mean_teacher"))
    whole, cut, name = tmp_path / "whole", tmp_path / "cut", "mean_teacher-seed0"
    main(*options, "--out", whole)
    capsys.readouterr()
    real, clock, steps = mt.train_step, [0], []

    def slow(*values, **others):
        given = inspect.signature(real).bind(*values, **others).arguments
        clock.append(clock[-1] + (60 if given["teacher"] is None else 120))
        steps.append(given["step"])
        return 1 / 0 if len(clock) == 24 + 15 else real(*values, **others)

    monkeypatch.setattr(mt, "train_step", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    for taken, logged in (([*range(24), *range(14)], 4), ([*range(12, 18)], 6)):
        with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
            if logged == 6:
                patch.setattr(torch, "save", lambda *_: 1 / 0)
            main(*options, "--out", cut)
        log = read_csv(cut / f"{name}.csv")
        assert [int(row["epoch"]) for row in log] == [*range(1, logged + 1)] and steps == taken
        run = torch.load(cut / f"{name}.pt", weights_only=True)
        assert (len(run["history"]), run["finished"], run["metrics"]) == (4, False, {})
        steps.clear()
    (cut / f".{name}.pt.1.part").write_bytes(b"x")       # of a process that was killed
    main(*options, "--out", cut)
    assert steps == [*range(12, 24), *range(24), *range(24)]
    assert_equal_results(cut, whole)
    printed = capsys.readouterr().out
    minutes = [float(number) for number in re.findall(r"(?m)^ +\d.* ([\d.]+)$", printed)]
    # After epochs 1, 2, 4, 6 and 8 of every training. The second try printed nothing.
    assert minutes == [21, 18, 12, 6, 0, 42, 36, 24, 12, 0, 21, 18, 12, 6, 0, 42, 36, 24, 12, 0]
    assert printed.count(f"supervised, seed 0: finished, see {cut}/supervised-seed0.pt") == 2


def test_a_kill_leaves_no_trace(study, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = arguments(data=study, method="mean_teacher", epochs=40, validate_every=1)
    main(*options, "--out", whole)
    killed = subprocess.Popen([sys.executable, SCRIPT, *map(str, options), "--out", cut],
                              stdout=subprocess.DEVNULL)
    checkpoint, end = cut / "mean_teacher-seed0.pt", time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(np.random.default_rng().uniform(0, 0.1))  # during any of the epochs after it
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL and not (cut / "table.md").exists()
    main(*options, "--out", cut)
    assert_equal_results(cut, whole)


def test_a_run_is_continued_with_the_same_settings_alone(tmp_path):
    run = train(tmp_path)
    for name, value in vars(mt.Config()).items():
        change = {name: another(name, value)}
        if name in ("data", "runs", "device"):
            assert train(tmp_path, **change)["history"] == run["history"]
        elif name not in ("out", "method", "seed"):
            with pytest.raises(mt.InputError, match=f"another {name}; .*{tmp_path} to st"):
                train(tmp_path, **change)


def test_two_processes_that_write_the_same_file_do_not_disturb_each_other(tmp_path):
    path, contents, children = tmp_path / "a/b/file", [b"1" * 300_000, b"2" * 300_000], []
    for content in contents:
        children.append(os.fork())
        if children[-1] == 0:
            try:
                for _ in range(40):
                    mt.save(path, content)
                    assert path.read_bytes() in contents
                os._exit(0)
            finally:
                os._exit(1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert [path.name for path in path.parent.iterdir()] == ["file"]


def test_a_full_disk_is_one_line_of_error_and_leaves_the_file_that_was_there(study, tmp_path):
    (tmp_path / "file").write_bytes(b"good")
    before, limits = snapshot(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))       # and of new processes
    try:
        with pytest.raises(OSError):
            mt.save(tmp_path / "file", bytes(30_000))
        assert snapshot(tmp_path) == before
        done = process(SCRIPT, *arguments(data=study, out="out", width=4), cwd=tmp_path, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".csv"}


# --- Experiment ----------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """All methods with the seeds 3 and 4. -> options, folder, what main returned"""
    folder = tmp_path_factory.mktemp("finished")
    write_scgm(folder / "data", subjects=(1, 2, 3, 11))
    for path in folder.rglob("*mask-r4*"):               # a slice without foreground in each
        mask = nib.load(path).get_fdata().astype(np.uint8)
        mask[:, :, 1] = 2
        write_nifti(path, mask)
    options = arguments(data=folder / "data", epochs=10, batch=1, threshold=0.4, lr=0.02,
                        alpha=0.8, alpha_late=0.8, consistency_weight=1, split=(1, 1, 1))
    result = main(*options, "--seed", 3, "--runs", 2, "--out", folder / "out")
    return options, folder / "out", result


def dice_of(found, mask):
    return 200 * (found & mask).sum() / (found.sum() + mask.sum())


def test_metrics_and_scores_are_those_of_the_saved_networks_on_the_test_slices(finished):
    (options, folder, result), seen = finished, set()
    config, rows = mt.parse(options)[0], read_csv(folder / "metrics.csv")
    test = mt.load_data(config)["test"]
    masks = test.masks.bool().numpy()
    assert len(rows) == 2 * 5 * 2                        # seeds, networks, slices
    for label, seed in itertools.product(result["scores"], (3, 4)):
        method, model = label.split(", ")
        run = torch.load(folder / f"{method}-seed{seed}.pt", weights_only=True)
        with torch.no_grad():
            logits = network_of(config, run[model]).eval()(test.images)
        found, scores = (torch.sigmoid(logits) > 0.4).numpy(), result["scores"][label][seed]
        of_run = [row for row in rows
                  if (row["method"], row["model"], row["seed"]) == (method, model, str(seed))]
        assert [(row["site"], row["subject"], int(row["slice"])) for row in of_run] == [
            test.where[0], test.where[2]]
        dice = [dice_of(found[k], masks[k]) for k in (0, 2)]
        assert [float(row["dice"]) for row in of_run] == pytest.approx(dice)
        assert scores["scan_dice"] == pytest.approx(dice_of(found, masks))
        assert {float(row["scan_dice"]) for row in of_run} == {scores["scan_dice"]}
        for name in mt.METRICS:
            assert scores[name] == pytest.approx(np.mean([float(row[name]) for row in of_run]))
        seen.add(tuple(dice))
    assert len(seen) == 10                               # no two networks are alike


def test_the_table_is_mean_and_std_over_runs_and_paired_differences_that_add_up(finished):
    _, folder, result = finished
    scores = result["scores"]
    assert [*scores] == ["supervised, student", "no_consistency, student",
                         "no_consistency, teacher", "mean_teacher, student",
                         "mean_teacher, teacher"]
    expected = [["test, %", "runs", *mt.COLUMNS]]
    for label, by_seed in scores.items():
        pairs = [[by_seed[seed][name] for seed in (3, 4)] for name in mt.COLUMNS]
        expected.append([label, "2", *[f"{np.mean(pair):.2f} ({np.std(pair, ddof=1):.2f})"
                                       for pair in pairs]])
    parts = {"gain": (4, 0), "= BatchNorm": (1, 0), "+ averaged weights": (2, 1),
             "+ consistency loss": (4, 2)}
    rows = [*scores.values()]
    for name, (ours, others) in parts.items():
        cells = []
        for metric in mt.COLUMNS:
            one, other = pair = [rows[ours][seed][metric] - rows[others][seed][metric]
                                 for seed in (3, 4)]
            assert [result["differences"][name][seed][metric] for seed in (3, 4)] == pair
            # The standard error of two is half their range.
            cells.append(f"{(one + other) / 2:+.2f} ± {abs(one - other) / 2:.2f}")
        expected.append([name, "2", *cells])
    gain, *others = (result["differences"][name][3]["dice"] for name in parts)
    assert gain == pytest.approx(sum(others)) and abs(gain) > 0.05
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("|")]
    assert [rows[0], *rows[2:]] == expected
    assert len(rows[1]) == 9 and all(re.fullmatch(":?-+:?", cell) for cell in rows[1])
    assert lines[-1].startswith("Mean (std) over runs, training seeds of one split; differences: ")
    assert "\n".join([*lines, ""]) == result["table"]


def test_differences_are_of_the_runs_with_the_same_seed():
    def row(values):                                     # seven metrics, all alike
        return {seed: dict.fromkeys(mt.COLUMNS, dice) for seed, dice in values.items()}

    found = mt.paired_differences({
        "mean_teacher, teacher": row({0: 63.0, 1: 65.0, 2: 67.0, 7: 99.0}),
        "supervised, student": row({10: 1.0, 2: 62.0, 1: 64.0, 0: 60.0}),
        "no_consistency, teacher": row({7: 98.0}), "no_consistency, student": row({5: 3.0})})
    # Seeds 7 and 10 have no partner; no run of BatchNorm's has one.
    assert found == {"gain": row({0: 3.0, 1: 1.0, 2: 5.0}), "+ consistency loss": row({7: 1.0})}
    # The Dice of a scan counts once, however many slices it has.
    slices = [dict.fromkeys(mt.COLUMNS, 60.0) | {"subject": name, "scan_dice": dice}
              for name, dice in (("a", 90.0), ("a", 90.0), ("a", 90.0), ("b", 50.0))]
    runs = [{"method": "supervised", "seed": 3, "metrics": {"student": slices}}]
    assert mt.mean_scores(runs) == {
        "supervised, student": {3: dict.fromkeys(mt.METRICS, 60.0) | {"scan_dice": 70.0}}}
    table = mt.make_table({}, found, random_splits=True)
    # 3, 1, 5: mean 3, std 2, standard error 2 / sqrt(3)
    assert table.count("  +3.00 ± 1.15 |") == 7 == table.count("         +1.00 |")
    assert "| gain                    |    3 |" in table and "random splits" in table


def test_more_runs_join_the_folder_and_its_report(finished, tmp_path, monkeypatch, calls):
    options, folder, result = finished
    out = shutil.copytree(folder, tmp_path / "out")
    data = shutil.copytree(folder.parent / "data", tmp_path / "data")    # the same, elsewhere
    subprocess.run(["gunzip", "-r", data], check=True)
    monkeypatch.chdir(data)
    for name, value in (("text.usetex", True), ("lines.linewidth", 9), ("savefig.format", "pdf")):
        monkeypatch.setitem(mt.matplotlib.rcParams, name, value)         # a user's matplotlibrc
    again = main(*options, "--seed", 3, "--data", "../data", "--device", "auto", "--out", out)
    assert again == result and not calls
    assert_equal_results(out, folder)
    more = main(*options, "--seed", 10, "--method", "supervised", "--out", out)
    assert [*map(sorted, more["scores"].values())] == [[3, 4, 10], *[[3, 4]] * 4]
    assert more["differences"] == result["differences"] and len(calls) == 2 * 10
    assert "| supervised, student     |    3 |" in more["table"]
    assert (more["scores"]["supervised, student"].items() >=
            result["scores"]["supervised, student"].items())


def test_named_subjects_are_one_split_whatever_the_split_seed(study, tmp_path):
    result = main(*arguments(data=study, out=tmp_path, split_seed=-1, method="supervised", runs=2),
                  "--train", "site1-sc01", "--test", "site1-sc02")
    assert "runs, training seeds of one split;" in result["table"]


def test_training_subjects_alone_give_no_test(study, tmp_path):
    result = main(*arguments(data=study, out=tmp_path), "--train", "site1-sc01", "site1-sc02")
    assert result == {"scores": {}, "differences": {}, "table": "no test subjects"}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "curves.png"} | {
        f"{method}-seed0.{end}" for method in mt.METHODS for end in ("pt", "csv")}
    rows = read_csv(tmp_path / "mean_teacher-seed0.csv")         # nor a validation
    assert {row[f"val_{model}"] for row in rows for model in ("student", "teacher")} == {"nan"}


def test_each_run_may_have_its_own_split_and_config_json_holds_the_checksums_of_all(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_scgm(data, subjects=(1, 2, 3, 4, 5, 6, 11))
    options = arguments(data=data, method="mean_teacher", lr=0.02, split_seed=-1)
    both = main(*options, "--seed", 3, "--runs", 2, "--out", tmp_path / "both")
    first, result = (main(*options, "--seed", seed, "--out", out) for seed in (3, 4))
    record, rows = json.loads((out / "config.json").read_text()), read_csv(out / "metrics.csv")
    assert record["config"].items() >= {"split_seed": -1, "seed": 4, "epochs": [3]}.items()
    tested = {}
    scans = json.loads((tmp_path / "both/config.json").read_text())["scans"]
    assert scans.keys() == {"run 3", "run 4"} and record["scans"] == {"run 4": scans["run 4"]}
    for seed in (3, 4):
        members = mt.load_data(setting(data=str(data), split_seed=seed))
        tested[seed], = members["test"].checksums
        assert scans[f"run {seed}"] == {
            f"{name} {scan}": checksum for name, part in members.items()
            for scan, checksum in part.checksums.items()}
        assert {row["subject"] for row in rows if row["seed"] == str(seed)} == {tested[seed]}
    assert result == both and tested[3] != tested[4]
    # One run has no std: seven metrics of two networks. One method has no difference.
    assert [len(re.findall(r"\d \(\d", each["table"])) for each in (first, result)] == [0, 14]
    assert "nan" not in first["table"] and "over runs, random splits;" in result["table"]
    assert [*result["scores"]] == ["mean_teacher, student", "mean_teacher, teacher"]
    assert result["differences"] == {} and "gain" not in result["table"]


def replaced(of):
    return lambda data, out: write_nifti(next(data.rglob(f"site1-{of}.nii.gz")),
                                         cord(5)["mask" in of])


OTHER = "seed[34].pt: was trained with another "


@pytest.mark.parametrize("change, options, message", [
    (replaced("sc01-mask-r4"), "", f"{OTHER}.* site1-sc01"),
    (replaced("sc02-image"), "", f"{OTHER}.* site1-sc02"),
    (replaced("sc11-image"), "", f"{OTHER}unlabelled site1-sc11; give"),
    (lambda data, out: write_scgm(data, (12,)), "", f"{OTHER}unlabelled site1-sc12; give"),
    (lambda data, out: shutil.rmtree(data / "test"), "", f"{OTHER}unlabelled site1-sc11; give"),
    (lambda data, out: None, "--noise 1 --lr 0.5", f"{OTHER}lr, noise; .*"
     "give another --out, or delete .*out to start again"),
    *[(lambda data, out, name=name: shutil.copy(out / "mean_teacher-seed4.pt", out / name), "",
       f"{name}: holds mean_teacher, seed 4; rename it")
      for name in ("supervised-seed4.pt", "mean_teacher-seed7.pt")]])
def test_other_runs_do_not_join(finished, tmp_path, capsys, monkeypatch, change, options, message):
    out = shutil.copytree(finished[1], tmp_path / "out")
    data = shutil.copytree(finished[1].parent / "data", tmp_path / "data")
    change(data, out)
    before = snapshot(out)
    monkeypatch.setattr(mt, "train_step", None)          # nothing may be trained
    for seeds in ("--seed 3", "--seed 2 --runs 3"):
        error = refused(capsys, *finished[0], "--data", data, *seeds.split(), *options.split(),
                        "--out", out)
        assert re.search(f"{out}/.*{message}", error) and snapshot(out) == before


def test_processes_share_the_seeds_and_the_last_one_to_end_reports(study, tmp_path, monkeypatch):
    # RANK counts the processes of all machines, LOCAL_RANK those of one: here the only one.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    options = arguments(data=study, runs=3, seed=5, out=tmp_path)
    config = mt.parse(options)[0]
    with pytest.raises(ZeroDivisionError):               # rank 1 has begun when rank 0 ends
        mt.train(config, "mean_teacher", 6, mt.load_data(config), lambda *_: 1 / 0)
    for rank, seeds in ((0, {5, 7}), (1, {5, 6, 7})):
        monkeypatch.setenv("RANK", str(rank))
        result = main(*options)
        runs = [run for run in mt.folder_runs(tmp_path).values() if run["finished"]]
        assert {(run["method"], run["seed"]) for run in runs} == {
            *itertools.product(mt.METHODS, seeds)}
        assert (result is not None) == (tmp_path / "table.md").exists() == (rank == 1)
    assert all(by_seed.keys() == {5, 6, 7} for by_seed in result["scores"].values())


def test_more_processes_than_gpus_share_them(monkeypatch):
    chosen, real = [], torch.ones
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", lambda *size, device: real(*size))
    monkeypatch.setenv("RANK", "6")
    for local_rank, count in ((0, 2), (1, 2), (5, 2), (3, 1)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        mt.pick_device("cuda")
    assert chosen == [0, 1, 1, 0]


def test_the_curves_are_those_of_the_logs_with_one_legend_entry_a_method(finished):
    runs, panels = mt.folder_runs(finished[1]), {
        "dice_loss": "Dice loss", "consistency_loss": "Consistency loss",
        "val_student": "Validation Dice of the student",
        "val_teacher": "Validation Dice of the teacher"}
    figure = mt.draw_curves(runs.values())
    for axis, (column, title) in zip(figure.axes, panels.items(), strict=True):
        methods = mt.METHODS if column in ("dice_loss", "val_student") else mt.METHODS[1:]
        paths = [path for path, run in runs.items() if run["method"] in methods]
        for path, line in zip(paths, axis.lines, strict=True):
            points = [(float(row["step"]), float(row[column]))
                      for row in read_csv(path.with_suffix(".csv")) if row[column] != "nan"]
            assert np.allclose(line.get_xydata(), points)
            assert len(points) == (6 if "val" in column else 10)
            assert line.get_label() == runs[path]["method"]
        colors = {line.get_label(): line.get_color() for line in axis.lines}
        assert axis.get_title().startswith(title) and len({*colors.values()}) == len(methods)
        legend = axis.get_legend()
        assert len(legend.get_texts()) == len(methods)
        assert colors == {text.get_text(): handle.get_color() for text, handle in zip(
            legend.get_texts(), legend.legend_handles, strict=True)}


def outline_of(mask):
    """The places (x, y) half way between two neighbouring pixels of which one is in the mask."""
    y, x = np.nonzero(mask[:, :-1] != mask[:, 1:])
    down, right = np.nonzero(mask[:-1] != mask[1:])
    return {*zip(x + 0.5, y.astype(float)), *zip(right.astype(float), down + 0.5)}


def test_the_examples_are_test_slices_with_the_outlines_of_rater_and_methods(finished):
    config = dataclasses.replace(mt.parse(finished[0])[0], seed=4)
    test, runs = mt.load_data(config)["test"], [*mt.folder_runs(finished[1]).values()]
    images, truth = test.images[::2], test.masks[::2, 0].bool().numpy()
    rows = {"rater": truth}                              # of the slices with foreground, 0 and 2
    for run in runs:
        if run["seed"] == 3:
            continue
        network = network_of(config, run["teacher" if "teacher" in run else "student"])
        rows[run["method"]] = (mt.predict_probabilities(network, images) > 0.4)[:, 0].numpy()
    assert rows.keys() == {"rater", *mt.METHODS}
    panels = iter(mt.draw_examples(config, runs, test).axes)
    for (name, masks), k in itertools.product(rows.items(), (0, 1)):
        axis, mask, image = next(panels), masks[k], images[k, 0].numpy()
        assert axis.get_title() == (f"{test.where[0][1]}, slice {2 * k}\n"
                                    f"{name}, Dice {dice_of(mask, truth[k]):.1f}")
        assert np.array_equal(axis.images[0].get_array(), image)
        # The window is that of the structure, plus and minus one standard deviation.
        inside = image[truth[k]]
        assert axis.images[0].get_clim() == pytest.approx((inside.min() - 1, inside.max() + 1))
        paths = [path for contours in axis.collections for path in contours.get_paths()]
        assert outline_of(mask) == {
            (x, y) for path in paths for x, y in path.vertices.tolist()}
    assert not [*panels]


def test_at_most_four_evenly_spaced_slices_are_shown():
    for count, shown in {1: [0], 4: [0, 1, 2, 3], 5: [0, 2, 4], 16: [0, 4, 8, 12]}.items():
        figure = mt.draw_examples(setting(), [], slices(count, seed=0))
        assert [axis.get_title() for axis in figure.axes] == [
            f"scan0, slice {z}\nrater, Dice 100.0" for z in shown]


# --- Predict -------------------------------------------------------------------------------------

def bright(config=None):
    """A network for structures that are brighter than 3.3 standard deviations above the mean."""
    network = nn.Conv2d(1, 1, 1)
    nn.init.constant_(network.weight, 20.0)
    nn.init.constant_(network.bias, -66.0)
    return network


def bright_run(folder, monkeypatch, after_epoch=None, **changes):
    """Train this network, at a rate that changes nothing. -> the checkpoint"""
    monkeypatch.setattr(mt, "build_network", bright)
    config = setting(out=str(folder / "out"), lr=1e-9, epochs=(2,), **changes)
    mt.train(config, "supervised", 0, sets(), after_epoch)
    return folder / "out/supervised-seed0.pt"


@pytest.mark.parametrize("axes, spacing, size", [
    ("RAS", 0.35, (101, 120)), ("LPS", 0.7, (101, 120)), ("SRA", 0.7, (100, 121)),
    ("PIL", 0.35, (101, 120))])
def test_predict_is_on_the_scans_own_grid(tmp_path, capsys, monkeypatch, axes, spacing, size):
    crop = round(22.4 / spacing)                         # of an even or odd number of pixels
    checkpoint = bright_run(tmp_path, monkeypatch, spacing=spacing, crop=crop)
    scan, output = tmp_path / "i.nii.gz", tmp_path / "m.nii.gz"
    command = ["predict", scan, "--checkpoint", checkpoint, "--output", output, "--overwrite"]
    # Right of and behind the centre (50, 60): inside, at the back border, outside, at the right
    for left, back, border in ((54, 47, False), (54, 42, True), (62, 22, False), (63, 58, True)):
        volume = np.random.default_rng(0).uniform(0, 10, (*size, 3)).astype(np.float32)
        volume[left:left + 5, back:back + 5, 1] = 200.0
        image = nib.Nifti1Image(volume, moved(0.07, 9, 5, 1) @ np.diag([0.7, 0.7, 4, 1]))
        image = image.as_reoriented(nib.orientations.axcodes2ornt(axes))
        nib.save(image, scan)
        assert main(*command) == output
        printed, mask = capsys.readouterr().out, nib.load(output)
        found, expected = mask.get_fdata(), image.get_fdata() > 50
        assert np.allclose(mask.affine, image.affine, atol=1e-5) and not (found > expected).any()
        assert (found == expected).all() == (back == 47) and found.any() == (back != 22)
        warning = f"warning: {scan}: foreground at the border of the centre crop; if the structure"
        assert (warning in printed) == ("warning" in printed) == border
        assert printed.endswith(f"{output}: {found.sum():.0f} voxels of foreground inside the "
                                f"centre crop of {crop} px of {spacing} mm\n")
    main(*command, "--crop", 160)                        # beyond the image, or not
    assert np.array_equal(nib.load(output).get_fdata(), expected)
    assert "warning" not in capsys.readouterr().out


def test_probabilities_are_averaged_in_voxels_larger_than_pixels_and_0_without_contrast(capsys):
    class Stripes(nn.Conv2d):
        def forward(self, x):
            column = torch.arange(x.shape[-1]).expand(x.shape)
            return torch.where(column % 4 == 0, 20.0, -20.0)

    volume = np.random.default_rng(0).normal(5, 1, (16, 16, 3)).astype(np.float32)
    volume[:, :, 1] = 7
    image = nib.Nifti1Image(volume, np.diag([2.0, 2.0, 5.0, 1]))         # four pixels a voxel
    found = mt.predict_volume(image, Stripes(1, 1, 1), setting(spacing=0.5, crop=64), "a.nii")
    assert np.abs(found[1:-1, :, ::2] - 0.25).max() < 0.01 and not found[:, :, 1].any()
    assert "warning: a.nii: foreground at the border of" in capsys.readouterr().out


def test_predict_is_the_teacher_on_the_slices_of_training(finished, tmp_path):
    config, scan = mt.parse(finished[0])[0], tmp_path / "imagesTs/a.nii.gz"
    write_nifti(scan, cord(9)[0])
    images = mt.read_scan(mt.find_scans(tmp_path)[0], config, "unlabelled").images
    masks = []
    for method, model in (("mean_teacher", "teacher"), ("supervised", "student")):
        checkpoint = finished[1] / f"{method}-seed3.pt"
        run = torch.load(checkpoint, weights_only=True)
        expected, mask = np.zeros(SHAPE), tmp_path / f"{model}.nii"
        found = mt.predict_probabilities(network_of(config, run[model]), images) > 0.4
        for z in range(3):                               # the centre 16 x 16 of 40 x 36 px
            expected[12:28, 10:26, z] = found[z, 0].flip(0).T
        main("predict", scan, "--checkpoint", checkpoint, "--output", mask)
        masks.append(nib.load(mask).get_fdata())
        assert np.array_equal(masks[-1], expected)
    student = mt.predict_probabilities(network_of(config, torch.load(
        finished[1] / "mean_teacher-seed3.pt", weights_only=True)["student"]), images) > 0.4
    assert not np.array_equal(masks[0][12:28, 10:26, 0], student[0, 0].flip(0).T)


def test_predict_writes_one_mask_and_only_where_it_may(finished, tmp_path, capsys, monkeypatch):
    scan, new = tmp_path / "a.nii.gz", tmp_path / "new/masks/a.nii.gz"
    write_nifti(scan, cord(0)[0])
    rest = ["--checkpoint", finished[1] / "supervised-seed3.pt", "--output"]
    command = ["predict", scan, *rest]
    assert main(*command, new) == new
    count = int(nib.load(new).get_fdata().sum())
    assert f"{new}: {count} voxels of foreground" in capsys.readouterr().out and count > 0
    files, now = snapshot(tmp_path), time.time()
    other = tmp_path / "c.nii"
    for options, message in (
            ([*command, new], f"{new}: already exists; use --overwrite"),
            ([*command, scan, "--overwrite"], f"{scan}: is the scan"),
            ([*command, os.path.relpath(scan), "--overwrite"], "a.nii.gz: is the scan"),
            ([*command, tmp_path], f"{tmp_path}: expected .nii or .nii.gz"),
            ([*command, "a.mha"], "a.mha: expected .nii or .nii.gz"),
            (["predict", "x.png", *rest, other], "x.png: cannot be read as NIfTI (FileNot"),
            (["predict", tmp_path, *rest, other], f"{tmp_path}: cannot be read as NIfTI (Is"),
            ([*command, other, "--crop", 0], "--crop 0: must be 16 to 2048"),
            ([*command, other, "--checkpoint", "no.pt"], "No such file or directory: 'no.")):
        assert message in refused(capsys, *options)
    assert snapshot(tmp_path) == files
    monkeypatch.setattr(time, "time", lambda: now + 12345)
    main(*command, new, "--overwrite")
    assert snapshot(tmp_path) == files                   # equal masks are equal bytes
    main(*command, other)
    assert other.read_bytes() == gzip.decompress(files[new])


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_mask_has_its_scans_geometry_and_no_data_of_the_patient(tmp_path, monkeypatch, kind):
    image = kind(cord(1)[0][..., None], moved(0.1, 3, 4, 5) @ np.diag([0.5, 0.5, 5, 1]))
    image.set_qform(moved(0.2, 1, 2, 3) @ np.diag([0.5, 0.5, 5, 1]), 1)
    image.set_sform(image.affine, 4)
    image.header.set_xyzt_units("mm", "sec")
    for name in ("descrip", "aux_file", "intent_name"):
        image.header[name] = b"Jane Doe"
    image.header["cal_max"] = 500                        # a display window
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Jane Doe"))
    nib.save(image, tmp_path / "i.nii")
    checkpoint = bright_run(tmp_path, monkeypatch)
    main("predict", tmp_path / "i.nii", "--checkpoint", checkpoint, "--output", tmp_path / "m.nii")
    mask = nib.load(tmp_path / "m.nii")
    assert b"Doe" in (tmp_path / "i.nii").read_bytes()
    assert b"Doe" not in (tmp_path / "m.nii").read_bytes() and mask.header["cal_max"] == 0
    assert mask.get_data_dtype() == np.uint8 and mask.shape == SHAPE
    assert mask.header.get_zooms() == pytest.approx((0.5, 0.5, 5))
    assert mask.header.get_xyzt_units()[0] == "mm"
    for found, expected in zip((*mask.get_qform(True), *mask.get_sform(True)),
                               (*image.get_qform(True), *image.get_sform(True)), strict=True):
        assert np.allclose(found, expected, atol=1e-5)


def test_predict_refuses_a_mask_given_as_a_scan(finished, tmp_path, capsys):
    scan, mask = tmp_path / "i.nii", tmp_path / "m.nii"
    command = ["predict", scan, "--checkpoint", finished[1] / "supervised-seed3.pt", "--output",
               mask, "--overwrite"]
    for values, is_mask in (((0, 1), 1), (range(10), 1), ((0, 0.5), 0), (range(11), 0), ((7,), 0)):
        write_nifti(scan, np.resize(np.float32(values), (20, 20, 2)))
        if is_mask:
            assert f"{scan}: is a mask, with the values [0. 1." in refused(capsys, *command)
            assert not mask.exists()
        else:
            assert main(*command) == mask


def test_predict_reads_a_gpus_checkpoint_and_uses_its_own_device(tmp_path, capsys, monkeypatch):
    checkpoint, devices = tmp_path / "out/supervised-seed0.pt", []
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        bright_run(tmp_path, monkeypatch, lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(checkpoint, weights_only=True)
    write_nifti(tmp_path / "i.nii", cord(1)[0])
    command = ["predict", tmp_path / "i.nii", "--checkpoint", checkpoint, "--output",
               tmp_path / "m.nii", "--overwrite"]
    assert "--device meta: not available" in refused(capsys, *command, "--device", "meta")
    monkeypatch.setattr(nn.Conv2d, "to",
                        lambda network, device: devices.append(device) or network)
    for name in ("cpu", "auto"):
        main(*command, "--device", name)
        warning = f"warning: {checkpoint}: the training is not finished"
        assert capsys.readouterr().out.startswith(warning)
    assert devices == [torch.device("cpu"), mt.pick_device("auto")]


@pytest.mark.parametrize("damage, message", [
    (lambda path, run: path.write_bytes(b""), ""),
    (lambda path, run: path.write_bytes(path.read_bytes()[:5000]), ""),
    (lambda path, run: torch.save({"state_dict": {}}, path), ""),
    (lambda path, run: torch.save(run | {"history": path}, path), "Unpickl"),    # runs code
    (lambda path, run: torch.save(run | {"config": {"colour": "red"}}, path), "colour"),
    *[(part, f"'{part}'") for part in ("config", "scans", "method", "seed", "history", "finished",
                                       "metrics", "student", "optimizer", "visit")],
    (None, "another network than build_network() m")])
def test_bad_checkpoints_are_refused(finished, tmp_path, capsys, monkeypatch, damage, message):
    path, mask = tmp_path / "out/supervised-seed3.pt", tmp_path / "m.nii"
    path.parent.mkdir()
    shutil.copy(finished[1] / path.name, path)
    write_nifti(tmp_path / "i.nii", cord(1)[0])
    run = torch.load(path, weights_only=True)
    if damage is None:
        monkeypatch.setattr(mt, "build_network", bright)
    elif isinstance(damage, str):
        del (run if damage in run else run["config"])[damage]
        torch.save(run, path)
    else:
        damage(path, run)
    before = snapshot(tmp_path)
    for command in (["predict", tmp_path / "i.nii", "--checkpoint", path, "--output", mask],
                    [*finished[0], "--seed", 3, "--out", path.parent]):
        error = refused(capsys, *command)
        assert f"{path}: {'not a checkpoint' if damage else 'holds'}" in error and message in error
    assert before.items() <= snapshot(tmp_path).items() and not mask.exists()


def test_sixty_damaged_files_give_a_mask_or_one_line_of_error(finished, tmp_path, capsys):
    rng, masks, path = np.random.default_rng(0), 0, tmp_path / "bad.nii.gz"
    write_nifti(path, cord(1)[0])
    good = gzip.decompress(path.read_bytes())
    command = ["predict", path, "--checkpoint", finished[1] / "supervised-seed3.pt", "--output",
               tmp_path / "m.nii.gz", "--overwrite"]
    for k in range(60):
        content = bytearray(good)
        for _ in range(rng.integers(1, 6)):              # in the header alone, or anywhere
            content[rng.integers(352 if k % 3 else len(good))] = rng.integers(256)
        path.write_bytes(gzip.compress(content[:None if k % 7 else rng.integers(300, len(good))]))
        begin = time.process_time()
        try:
            masks += main(*command).is_file()
        except SystemExit as stop:
            error = capsys.readouterr().err
            assert stop.code == 2 and re.fullmatch(f"error: {path}: .*\n", error)
        assert time.process_time() - begin < 10          # whatever size its header names
    assert 6 < masks < 54


# --- The phantom ---------------------------------------------------------------------------------

PUBLISHED = [
    # Measured on the phantom of the published results, in RAS order. Of two images: shape, mean,
    # mean difference of neighbours along x, centre in px. Of the masks of raters 1 to 4: voxels of
    # grey and of white matter, centre along x.
    (1, (0.5, 0.5, 5.0), "LAS", [(100, 100, 3, 116.28, 16.008, 48.539, 44.635, 0.9974),
                                 (100, 100, 3, 156.51, 17.242, 52.078, 44.865, 1.0017)],
     [(135, 838, 45.87), (217, 790, 46.04), (165, 823, 45.64), (138, 851, 45.57)]),
    (2, (0.5, 0.5, 7.5), "RAS", [(100, 100, 7, 891.10, 116.34, 52.887, 48.504, 2.9803),
                                 (100, 100, 10, 1027.8, 125.28, 46.479, 41.335, 4.3456)],
     [(535, 2654, 49.47), (440, 2738, 49.63), (472, 2772, 49.22), (499, 2687, 49.18)]),
    (3, (0.25, 0.25, 2.5), "LPS", [(176, 176, 28, 260.36, 26.000, 82.268, 77.003, 13.554),
                                   (176, 176, 27, 305.87, 20.321, 92.041, 70.567, 13.004)],
     [(5038, 23445, 97.80), (5762, 23909, 98.26), (5317, 23045, 97.14), (5507, 23411, 97.54)]),
    (4, (0.29, 0.29, 5.0), "RPS", [(160, 160, 12, 738.61, 52.096, 80.902, 65.340, 5.4702),
                                   (160, 160, 14, 656.92, 55.147, 79.523, 66.171, 6.3977)],
     [(1442, 10468, 81.63), (1630, 9867, 82.39), (1786, 9439, 83.04), (1594, 10760, 81.51)])]


def test_the_phantom_is_the_published_one(tmp_path):
    def read(name, dtype):
        image = nib.load(tmp_path / f"phantom/site{site}-{name}.nii.gz")
        assert image.get_data_dtype() == dtype
        assert image.header.get_zooms() == pytest.approx(mm)
        assert "".join(nib.aff2axcodes(image.affine)) == axes
        voxels = nib.as_closest_canonical(image).get_fdata()
        indices = np.indices(voxels.shape).reshape(3, -1)
        return voxels, np.average(indices, axis=1, weights=voxels.ravel())

    mt.write_phantom(tmp_path / "phantom", subjects=2)   # one of them with masks
    for site, mm, axes, images, masks in PUBLISHED:
        for subject, expected in enumerate(images, start=1):
            voxels, centre = read(f"sc{subject:02d}-image", np.int16)
            step = np.abs(np.diff(voxels, axis=0)).mean()
            assert [*voxels.shape, voxels.mean(), step, *centre] == pytest.approx(expected, 1e-3)
            black = 4 * (site == 3)                      # empty slices at each end
            painted = np.flatnonzero(voxels.any((0, 1))).tolist()
            assert painted == [*range(black, voxels.shape[2] - black)]
        for rater, (grey, white, x) in enumerate(masks, start=1):
            mask, centre = read(f"sc01-mask-r{rater}", np.uint8)
            assert set(np.unique(mask)) == {0, 1, 2} and mask.shape == images[0][:3]
            assert [(mask == 1).sum(), (mask == 2).sum()] == pytest.approx([grey, white], abs=3)
            assert centre[0] == pytest.approx(x, abs=0.03)


def test_the_phantom_has_the_challenges_files_and_a_seed_gives_the_same_voxels(tmp_path):
    voxels = []
    for name, seed, subjects in (("whole", 0, 20), ("two", 0, 2), ("other", 1, 2)):
        folder = tmp_path / "new level" / name
        mt.write_phantom(folder, seed, tiny_sites(4), subjects)
        assert folder.stat().st_mode & 0o777 == 0o755    # others may read it
        image = nib.load(folder / "site2-sc01-image.nii.gz")
        voxels.append(np.asanyarray(image.dataobj))
    assert np.array_equal(voxels[0], voxels[1])
    assert [voxels[1].mean(), voxels[2].mean()] == pytest.approx([877.79, 696.06], rel=1e-3)
    assert {path.name for path in (tmp_path / "new level/whole").iterdir()} == {
        f"site{s}-sc{n:02d}-{name}.nii.gz" for s in range(1, 5) for n in range(1, 21)
        for name in ("image", "mask-r1", "mask-r2", "mask-r3", "mask-r4")
        if name == "image" or n <= 10}


def test_the_phantom_is_written_once_into_the_users_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write = mt.write_phantom                             # a small one; the whole takes ten seconds
    monkeypatch.setattr(mt, "write_phantom",
                        lambda folder: write(folder, sites=tiny_sites(4), subjects=4))
    config = setting(split=(1, 0, 1))
    data, written = mt.load_data(config), snapshot(tmp_path)
    assert equal(data["train"], mt.load_data(config)["train"]) and snapshot(tmp_path) == written
    assert {path.parent for path in written if path.is_file()} == {mt.phantom_folder()}
    assert mt.phantom_folder() == tmp_path / "torch/hub/mean_teacher_seg/phantom-2"
    assert capsys.readouterr().out.count("writing the phantom") == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")    # cannot be used
    assert "/dev/null/torch" in refused(capsys, "--out", tmp_path / "out")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)        # no home folder
    assert mt.phantom_folder().is_absolute() and "~" not in str(mt.phantom_folder())


def test_a_phantom_whose_name_is_taken_meanwhile_is_used_if_it_is_a_folder(tmp_path):
    folder, file = tmp_path / "phantom", tmp_path / "file"

    def sites(take, *arguments, **options):              # another process is faster by a moment
        yield from tiny_sites(1)
        take(*arguments, **options)
        states.append(snapshot(folder))

    states = []
    other = sites(mt.write_phantom, folder, seed=1, sites=tiny_sites(1), subjects=2)
    mt.write_phantom(folder, sites=other, subjects=2)
    with pytest.raises(NotADirectoryError, match="file"):
        mt.write_phantom(file, sites=sites(file.write_text, "no folder"), subjects=1)
    with pytest.raises(mt.InputError, match=f"{folder}: already exists"):
        mt.write_phantom(folder, sites=tiny_sites(1), subjects=1)
    assert states == [snapshot(folder)] * 2 and len(states[0]) == 6
    assert file.read_text() == "no folder" and {*tmp_path.iterdir()} == {folder, file}


# --- Command line --------------------------------------------------------------------------------

def test_presets_and_the_defaults_that_depend_on_other_options(monkeypatch, tmp_path):
    assert mt.parse([]) == (dataclasses.replace(mt.DEMO, out="runs/demo-phantom"), "demo")
    assert mt.parse(["--preset", "paper"])[0] == mt.Config(out="runs/paper-phantom")
    (tmp_path / "my study").mkdir()
    monkeypatch.chdir(tmp_path / "my study")
    assert mt.parse(["--data", "."]) == (mt.Config(data=".", out="runs/paper-my study"), "paper")
    assert mt.parse(["--data", "a/b/", "--preset", "demo"])[0].out == "runs/demo-b"
    for options, steps in (("", 700), ("--epochs 9", 0), ("--epochs 9 --steps 40", 40)):
        assert mt.parse(options.split())[0].steps == steps


def test_the_papers_settings_on_a_cpu_are_called_slow_once(monkeypatch, capsys):
    monkeypatch.setattr(mt, "pick_device", torch.device)
    monkeypatch.setattr(mt, "experiment", lambda config: config.runs)
    for preset, device, times in (("paper", "cpu", 1), ("demo", "cpu", 0), ("paper", "cuda", 0)):
        assert main("--preset", preset, "--device", device, "--runs", 2) == 2
        assert capsys.readouterr().out.count("days on a CPU; --preset demo") == times


def test_names_are_text_in_all_results_whatever_terminal_and_home_folder(tmp_path):
    names = ["Scan 1, left", 'the "second"', "$\\frac$ of $x$", "M\u00fcller \u0416", "caf\udce9",
             "[x]*? #100%", "two\nlines", "a.nii"]
    write_decathlon(tmp_path / "R\u00fccken", (*names, "plain"))
    options = arguments(data="R\u00fccken", train="plain", test=names, runs=2, epochs=1)
    out = tmp_path / "two/new levels"
    done = process("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT,
                   *options, "--out", out, cwd=tmp_path, PYTHONIOENCODING="ascii",
                   HOME="/dev/null")
    rows = read_csv(out / "metrics.csv")
    assert [row["subject"] for row in rows[::3]] == 10 * sorted(names)
    assert {len(row) for row in rows} == {6 + len(mt.COLUMNS)}
    assert json.loads((out / "config.json").read_text())["config"]["test"] == names
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in done.stdout.replace("\\xb1", "±") and "R\\xfccken: 9 scans" in done.stdout
    assert len([*out.iterdir()]) == 5 + 2 * 3 * 2        # reports; and runs by torchrun


BAD = [
    # All faults are reported at once.
    (lambda data, out: [path.write_bytes(b"x") for path in data.rglob("site1-*")], "",
     "sc01-image.nii.gz: cannot...sc02-image.nii.gz: cannot...sc11-image.nii.gz: cannot"),
    (lambda data, out: data.rename(data.parent / "gone"), "", "data: no such folder...--data"),
    (lambda data, out: shutil.rmtree(data) or data.mkdir(), "--contrast T1w T2w", "data: no scans "
     "found...site*-sc*-image...CONTRAST T1w or T2w (see --contrast)...imagesTr"),
    (lambda data, out: [path.unlink() for path in data.rglob("*mask*")], "--rater 2 --mask-name x",
     "data: no scan has a mask...NAME-mask-r2...derivatives/labels...x (--mask-name)...labelsTr"),
    (lambda data, out: shutil.copytree(data / "training", data / "x"), "",
     "x/site1-sc01-image.nii.gz: another...site1-sc01; rename one"),
    (lambda data, out: write_nifti(data / "training/site1-sc02-mask-r4.nii.gz", np.zeros(SHAPE)),
     "--train site1-sc01 --test site1-sc02", "data: no foreground in the test set...--label"),
    (lambda data, out: out.write_text("x"), "", "out'"),
    (lambda data, out: out.symlink_to("gone"), "", "out'"),
    (lambda data, out: (out / "supervised-seed0.csv").mkdir(parents=True), "", "seed0.csv'"),
    *[(None, option, f"{option}: must be") for option in (
        "--crop 8", "--runs 0", "--epochs 0", "--batch 0", "--validate-every 0", "--lr nan",
        "--alpha 1.5", "--steps -1", "--consistency-weight -1.0", "--spacing 1e-06",
        "--split-seed -2")],
    *[(None, options, message) for options, message in {
        "--colour red": "--colour red", "--width wide": "--width: invalid int value: 'wide'",
        "--crop 20": "--crop 20: must be a multiple of 8",
        "--crop 8000000": "--crop 8000000: must be 16 to 2048",
        "--width 1000000": "--width 1000000: must be 1 to 1024",
        "--visit (": "--visit (: not a reg", "--split 2 2": "--split (2, 2): expected three",
        "--epochs 1 2 3": "--epochs and --weight-decay: expected one number, or two",
        "--weight-decay 1 2 3": "--epochs and --weight-decay: expected one number, or two",
        "--label 7 9": "no foreground in the train set; check --split, --crop and --label",
        "--split 0 0 1": "no foreground in the train set; check --split, --crop and --label",
        "--device abacus": "--device abacus: not available"}.items()]]


@pytest.mark.parametrize("damage, options, message", BAD)
def test_bad_input_is_one_line_and_changes_nothing(tmp_path, capsys, damage, options, message):
    data, out = tmp_path / "data", tmp_path / "out"
    write_scgm(data, subjects=(1, 2, 11))
    if damage:
        damage(data, out)
    before = snapshot(tmp_path)
    error = refused(capsys, *arguments(data=data, out=out), *options.split())
    after = snapshot(tmp_path)
    assert all(part in error for part in message.split("..."))
    assert before.items() <= after.items() and (damage or after == before)


def test_each_option_with_choices_refuses_another_word_and_names_the_choices(capsys):
    for option, words in (
            ("--preset", "paper demo"), ("--method", "supervised no_consistency mean_teacher"),
            ("--rater", "1 2 3 4"), ("--negative-slices", "drop keep"),
            ("--consistency", "bce mse"), ("--augmentation", "delayed same")):
        error = refused(capsys, option, "neither")
        for word in words.split():
            assert re.search(rf"{option}: .*'neither'.*\b{word}\b", error)


def test_ctrl_c_is_one_line_and_exit_status_130(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(mt, "load_checkpoint", interrupted)
    monkeypatch.setattr(mt, "experiment", interrupted)
    for options in (["predict", "a.nii", "--checkpoint", "b", "--output", "c.nii"], []):
        with pytest.raises(SystemExit, match="130"):
            main(*options)
        assert capsys.readouterr() == ("interrupted; the same command continues a training\n", "")


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
         "train_step(net, twin, torch.optim.Adam(net.parameters()), rgb, (x > 0).float(), rgb, 0)"]


@pytest.mark.parametrize("call", CALLS)
def test_the_method_works_when_pasted_into_an_empty_file(call):
    source = SCRIPT.read_text()
    method = source[source.index("# --- 1. "):source.index("# --- 6. ")]
    pieces = ast.parse(method).body                      # no globals
    assert all(isinstance(piece, (ast.FunctionDef, ast.ClassDef)) for piece in pieces)
    assert all(any(re.search(rf"\b{piece.name}\(", call) for call in CALLS) for piece in pieces)
    results = []
    for code, names in ((method, {}), ("", dict(vars(mt)))):     # pasted, and the script's own
        torch.manual_seed(0)
        exec(GIVEN + code, names)
        results.append(eval(call, names))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_readmes_loop_runs_as_it_stands_in_an_empty_folder(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.S | re.M)
    block, = [block for block in blocks if re.search(r"(update_teacher|train_step)\(", block)]
    end = re.split(r"(?:update_teacher|train_step)\(", block)[-1]
    assert re.search(r"\.eval\(\)|predict_probabilities\(|evaluate\(", end)
    done = process("-c", block + "\nassert any((p != q).any() for p, q in zip("
                   "student.parameters(), teacher.parameters()))", cwd=tmp_path)
    assert "Warning" not in done.stderr and not [*tmp_path.iterdir()]


def test_importing_does_nothing(tmp_path):
    code = ("import sys, torch; torch.manual_seed(2026); threads = torch.get_num_threads()\n"
            "import mean_teacher_seg\nassert 'matplotlib.pyplot' not in sys.modules\n"
            "assert torch.initial_seed() == 2026 and torch.get_num_threads() == threads")
    done = process("-c", code, cwd=tmp_path)
    assert done.stdout + done.stderr == "" and not [*tmp_path.iterdir()]


def test_only_the_six_packages_are_needed_and_the_licence_is_named():
    six = {"torch", "numpy", "nibabel", "matplotlib", "jupyter", "pytest"}
    lines = (HERE / "requirements.txt").read_text().split()
    assert {re.split("[<>=]", line)[0] for line in lines} == six
    texts = [SCRIPT.read_text(), Path(__file__).read_text()]
    assert all(text.startswith("# SPDX-License-Identifier: MIT\n") for text in texts)
    for text in [*texts, "\n".join(source_of(cell) for cell in code_cells())]:
        names = {alias.name if isinstance(node, ast.Import) else node.module
                 for node in ast.walk(ast.parse(text))
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        packages = {name.split(".")[0] for name in names} - {*sys.stdlib_module_names}
        assert packages <= six | {"mean_teacher_seg", "IPython"}         # which is of jupyter


# --- The notebook --------------------------------------------------------------------------------

def code_cells(path=NOTEBOOK):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def source_of(cell):
    """A cell's Python, without magic lines."""
    return re.sub(r"^[%!].*", "", "".join(cell["source"]), flags=re.M)


def test_the_notebook_runs_from_a_clean_kernel_and_knows_right_answers_from_wrong_ones(tmp_path):
    notebook, expected = json.loads(NOTEBOOK.read_text()), []
    exercises, checks = ([cell for cell in code_cells() if tag in cell["metadata"].get("tags", [])]
                         for tag in ("exercise", "check"))
    assert len(exercises) == len(checks) >= 3
    assert all("still blank" in json.dumps(cell["outputs"]) for cell in checks)
    for exercise, check in zip(exercises, checks):       # once more, with a reader's answers
        (blank, answer), source = exercise["metadata"]["edit"], source_of(exercise)
        assert source.count(blank) == 1
        wrong = answer.replace("no_grad", "enable_grad")
        for number, reply in enumerate({answer: "", wrong: ""}):
            for cell, text in ((exercise, source.replace(blank, reply)), (check, check["source"])):
                copied = {**cell, "id": f"{cell['id']}-{number}", "source": text, "outputs": []}
                notebook["cells"].append(copied)
            expected.append(reply == answer)
    (tmp_path / "tutorial.ipynb").write_text(json.dumps(notebook))
    shutil.copy(SCRIPT, tmp_path)
    process("-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", "tutorial.ipynb",
            cwd=tmp_path, timeout=2400, XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=str(tmp_path))
    cells = code_cells(tmp_path / "tutorial.ipynb")
    answers = [json.dumps(cell["outputs"]) for cell in cells[-2 * len(expected) + 1::2]]
    assert [": right" in text for text in answers] == expected and False in expected
    assert not [o for cell in cells for o in cell["outputs"] if o.get("name") == "stderr"]


def test_the_notebook_is_committed_with_its_outputs_and_defines_nothing_of_the_scripts():
    text, cells = NOTEBOOK.read_text(), code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    for picture in pictures:                             # none of them is empty
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
        assert pixels.shape[0] > 100 and pixels[..., :3].std() > 0.05
    assert len(pictures) >= 8
    assert "/tmp" not in re.sub(r"[\w+/=]{200,}", "", text)      # pictures in base64 apart
    defined, script = (ast.FunctionDef, ast.ClassDef), ast.parse(SCRIPT.read_text()).body
    ours = {node.name for node in script if isinstance(node, defined)}
    ours |= {name.id for node in script if isinstance(node, ast.Assign) for name in node.targets}
    tree = list(ast.walk(ast.parse("\n".join(map(source_of, cells)))))
    theirs = {node.name for node in tree if isinstance(node, defined)}
    theirs |= {n.id for n in tree if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    assert {"train_step", "METRICS"} < ours and len(theirs) > 20 and not ours & theirs


# --- Real scans, where they are ------------------------------------------------------------------

def real(name):
    return pytest.mark.skipif(not (DATA / name).is_dir(), reason=f"no {name} here")


@real("gm-challenge")
def test_real_cords_of_six_sessions():
    config = setting(data=str(DATA / "gm-challenge"), train=("sub-10062Ses1", "sub-9709Ses1"),
                     test=("sub-9418", "sub-9584"), crop=96)
    data = mt.load_data(config)
    assert [len(part.checksums) for part in data.values()] == [4, 0, 2, 4]
    assert [len(data[name].masks) for name in ("train", "test")] == [80, 34]
    area = data["train"].masks.sum((1, 2, 3)) * config.spacing ** 2
    assert 10 < area.mean() < 20                         # mm2 of grey matter in a slice


@real("hippocampus")
def test_real_hippocampi_in_the_papers_protocol():
    config = setting(data=str(DATA / "hippocampus"), split=(8, 8, 12), spacing=1.0, crop=48)
    whole, front, back = (mt.load_data(dataclasses.replace(config, label=label))
                          for label in ((1, 2), (1,), (2,)))
    assert [len(part.checksums) for part in whole.values()] == [8, 8, 12, 40]
    assert len({scan for part in whole.values() for scan in part.checksums}) == 68
    total, *parts = (data["test"].masks.sum().item() for data in (whole, front, back))
    assert total == sum(parts) and min(parts) > 99
