# SPDX-License-Identifier: MIT
"""Mean-teacher semi-supervised segmentation, in one file.

The method of C. S. Perone and J. Cohen-Adad, "Deep semi-supervised segmentation with
weight-averaged consistency targets", DLMIA 2018, arXiv:1807.04657: to outline the grey matter in
MRI slices of the spinal cord. A student network f(theta) learns from a few labelled slices. A
teacher f(theta') is the exponential moving average of its weights. On labelled and unlabelled
slices alike, the student is pulled towards the teacher.

    Algorithm 1, as section 6 of this file builds it
     1  for each mini-batch of slices x, the first of them with masks y
     2      draw phi, a small affine transformation for every slice
     3      z  = f(theta, g(x + noise; phi))           student: transformed BEFORE its forward pass
     4      z~ = g(f(theta', x + other noise); phi)    teacher: the same phi AFTER it, "delayed"
     5      L  = -Dice(z, g(y; phi))                   labelled slices only            (eq. 3)
     6      C  = BCE(z, z~)                            labelled and unlabelled slices  (eq. 2)
     7      loss = L + w C                             w ramps up over the first epochs
     8      update theta with Adam                     no gradient goes through the teacher
     9      t  = t + 1
    10      theta' = alpha theta' + (1 - alpha) theta  (eq. 1)
    (The paper prints line 4 as f(theta', g(x; phi')). Its section 2.1 delays the transformation,
    as here; what remains of phi', the teacher's own perturbation, is the noise.)

    python mean_teacher_seg.py                    demo: a phantom, both methods, minutes on a CPU
    python mean_teacher_seg.py --data DIR         your scans (in the layout of the Spinal Cord Grey
        Matter challenge, SCGM, of BIDS or of the Decathlon), the paper's settings
    python mean_teacher_seg.py --data DIR --preset demo         the same, small enough for a CPU
    python mean_teacher_seg.py --help             every number of the paper is an option
    python mean_teacher_seg.py predict SCAN.nii.gz --checkpoint RUN/mean_teacher-seed0.pt \\
                                       --output MASK.nii.gz
    torchrun --nproc-per-node 8 mean_teacher_seg.py --data DIR --runs 10      many GPUs

Measured: ten runs of the demo (two CPU cores, PyTorch 2.13, a minute each), test Dice, mean (std):
supervised 73.96 (1.34), teacher 76.08 (1.54). Real MRI (hippocampus): 74.71 (1.71), 76.99 (1.54).

Sections: 1 configuration, 2 U-Net, 3 losses, 4 delayed augmentation, 5 teacher and ramps,
6 training step. That is the paper; 3 to 6 need copy, math and torch only. Then 7 data, 8 metrics,
9 training, 10 experiment, 11 predict, 12 phantom, 13 command line. A bare "section 4" is this
file's; the paper's are "paper, section 2.1".
"""
import argparse
import collections
import copy
import dataclasses
import gzip
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn


# --- 1. Configuration ----------------------------------------------------------------------------
# Every default is the paper's (its section 3.1), except where the text says "authors" or "here".
# authors: the paper is silent, and the value is that of the first author's public code for these
# data (github.com/perone/medicaltorch) and for the follow-up study with the same settings
# (github.com/neuropoly/domainadaptation); the paper's own training code was never published.
# here: our choice. Every field is an option of the command line; --help prints these texts.

def option(default, text, least=0, most=1e9, choices=None):
    return dataclasses.field(default=default, metadata={
        "help": text, "range": (least, most), "choices": choices})


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's experiment; dataclasses.replace() makes another."""
    # What to run
    data: str = option("", "folder of scans: SCGM, BIDS (T2star) or Decathlon; empty: the phantom")
    out: str = option("", "folder for the results; empty: runs/PRESET-DATA")
    method: str = option("both", "what to train", choices=["supervised", "mean_teacher", "both"])
    runs: int = option(1, "runs per method, seeds SEED, SEED + 1, ... (here: 1; paper: 10)", 1)
    seed: int = option(0, "seed of the first run: weights, batches, augmentation")
    device: str = option("auto", "cuda, mps, cpu or auto")
    # Data: 8 training, 8 validation, 12 test subjects, 40 unlabelled
    spacing: float = option(0.25, "in-plane voxel size after resampling, mm", 0.02)
    crop: int = option(200, "side of the centre crop, px, a multiple of 8 (authors)", 8, 2048)
    label: tuple = option((1,), "mask values that are foreground (authors: 1, grey)", 1, 255)
    rater: str = option("4", "whose masks (authors)", choices=["1", "2", "3", "4", "majority"])
    split: tuple = option((2, 2, 3), "people per site (BIDS: in all) to train, validate, test")
    split_seed: int = option(0, "seed of that draw, the same for every run")
    train: tuple = option((), "training subjects by name, instead of --split")
    val: tuple = option((), "validation subjects by name; may stay empty")
    test: tuple = option((), "test subjects by name")
    unlabelled: tuple = option((), "unlabelled subjects by name; empty: who is left over")
    # Network
    width: int = option(64, "channels of the first block (authors)", 1)
    dropout: float = option(0.5, "rate of Dropout2d after every block convolution", 0, 1)
    # Optimisation; pairs are (supervised, mean teacher), one number is for both
    epochs: tuple = option((1600, 350), "epochs; one is a pass over the labelled slices", 1)
    batch: int = option(8, "labelled slices in a mini-batch", 1)
    unlabelled_batch: int = option(8, "unlabelled slices beside them (authors); 0: none")
    lr: float = option(6e-4, "eta, Adam's learning rate at its highest", 1e-9)
    lr_ramp: int = option(50, "epochs of learning-rate ramp-up, before the cosine")
    weight_decay: tuple = option((8e-4, 6e-4), "lambda, L2 penalty inside Adam")
    # Mean teacher
    # The consistency is a mean over all N pixels, Dice a ratio over the F of foreground: beside
    # Dice, w pulls at a pixel in proportion to F / N. So with another crop or organ begin with
    # 2.9 * 0.4 % / (your F / N): the paper's F / N is 0.4 %. DEMO has 6 % and keeps 2.9 all the
    # same, 15 times the pull: its validation people did no better with 1 or 6.
    consistency_weight: float = option(2.9, "w, weight of the consistency loss after its ramp-up")
    consistency_ramp: int = option(100, "epochs of that ramp-up")
    alpha: float = option(0.99, "EMA decay at first: a memory of 1/(1-alpha) steps", 0, 1)
    alpha_late: float = option(0.999, "EMA decay later, when the student changes slowly", 0, 1)
    alpha_epochs: int = option(50, "epochs with the first of the two")
    consistency: str = option("bce", "or mse, worse (paper, section 2)", choices=["bce", "mse"])
    augmentation: str = option("delayed", "or same: one warped input for both, worse (paper, "
                               "section 2.1)", choices=["delayed", "same"])
    confidence: float = option(0.0, "leave out where the teacher's max(y, 1-y) is less; did "
                               "not help (paper, section 2)", 0, 1)
    # Augmentation
    degrees: float = option(4.5, "rotation, uniform in +- this many degrees")
    translation: float = option(0.0, "translation, uniform in +- this many px (here)")
    scale: float = option(0.0, "scale, uniform in 1 +- this (here)", 0, 0.9)
    noise: float = option(0.1, "std of added noise; the paper's N(0, 0.01) read as variance")
    # Evaluation and machine, all decided here
    threshold: float = option(0.5, "probability above which a pixel is foreground", 0, 1)
    validate_every: int = option(10, "epochs between two validations, progress lines, saves", 1)
    precision: str = option("bfloat16", "of training's passes on CUDA; all else is float32",
                            choices=["bfloat16", "float32"])


# DEMO is the same method for two CPU cores; both arms take the same steps. What is not here is the
# paper's. lr and epochs were tuned for the supervised arm, on validation subjects of phantoms that
# are not the published one and of real scans (README.md), and kept for both arms.
DEMO = dataclasses.replace(
    Config(), crop=64,                                   # 16 mm: all grey matter of the phantom
    width=8, dropout=0.0,                                # not tuned: README.md tells of 0.1
    epochs=(30,), consistency_ramp=30,                   # the ramp takes the whole run
    batch=4, unlabelled_batch=4,                         # more steps in the same time
    lr=3e-3, lr_ramp=3,                                  # a narrow network bears a higher rate
    weight_decay=(2e-3,),                                # a higher rate, a shorter run: stronger
    alpha=0.95, alpha_late=0.99, alpha_epochs=8,         # memory: 20, then 100 of 690 steps
    degrees=12.0, validate_every=5)                      # more rotation: 8 subjects are few


# --- 2. U-Net ------------------------------------------------------------------------------------
# "A very simple U-Net architecture with 15 layers, Batch Normalization, Dropout and ReLU" (paper,
# section 3.1). The paper stops there; widths and order are the authors': 3 blocks down, 1 at the
# bottom, 3 up, two 3x3 convolutions each, and one more for the output. Nothing in the method
# depends on it.

def conv_block(channels_in, channels_out, dropout):
    layers = []
    for channels in (channels_in, channels_out):
        layers += [nn.Conv2d(channels, channels_out, kernel_size=3, padding=1),
                   nn.ReLU(),
                   nn.BatchNorm2d(channels_out, momentum=0.1),  # PyTorch's 0.1 is the paper's 0.9
                   nn.Dropout2d(dropout)]                       # drops whole feature maps
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with 15 convolutions; 4,837,249 parameters at width 64.

    forward: images (B, 1, H, W) float, z-scored, H and W multiples of 8 -> logits (B, 1, H, W).
    Raises ValueError for other sizes. Source: paper, section 3.1; details as the authors'.
    """

    def __init__(self, width=64, dropout=0.5):
        super().__init__()
        w = width
        self.down = nn.ModuleList([conv_block(1, w, dropout),
                                   conv_block(w, 2 * w, dropout),
                                   conv_block(2 * w, 4 * w, dropout)])
        self.bottom = conv_block(4 * w, 4 * w, dropout)
        self.up = nn.ModuleList([conv_block(4 * w + 4 * w, 4 * w, dropout),
                                 conv_block(4 * w + 2 * w, 2 * w, dropout),
                                 conv_block(2 * w + w, w, dropout)])
        self.out = nn.Conv2d(w, 1, kernel_size=3, padding=1)

    def forward(self, x):
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f"height and width must be multiples of 8 (three times halved), "
                             f"got {x.shape[-2]} x {x.shape[-1]}: crop or pad the image")
        skips = []
        for block in self.down:
            skips.append(block(x))                       # (B, w, H, W), (B, 2w, H/2, W/2), ...
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)                               # (B, 4w, H/8, W/8)
        for block, skip in zip(self.up, reversed(skips)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        # Logits, not probabilities: the BCE of logits is stable where log(sigmoid) is not.
        return self.out(x)                               # (B, 1, H, W)


# --- 3. Losses -----------------------------------------------------------------------------------

def dice_loss(probabilities, masks):
    """Negative Dice coefficient over the whole mini-batch, in [-1, 0].

    probabilities (B, 1, H, W) in [0, 1], masks of the same shape in {0, 1} -> float32 scalar.
    Source: paper, eq. 3; the smoothing term is the authors'.
    """
    # L(theta) = - 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i), i over all pixels of all slices.
    # One ratio per batch, not the mean of one per slice: slices with little grey matter, where a
    # single pixel would swing the ratio, weigh as little as they should. And no class weights: the
    # 99.6 % background pixels, where rightly called background, add nothing to either sum.
    p, y = probabilities.float(), masks.float()
    smooth = 1e-4                                        # no 0 / 0 without any foreground
    return -(2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth)


def consistency_loss(student_logits, teacher_probabilities, valid=None):
    """Mean pixel-wise cross-entropy between the teacher's and the student's prediction.

    student_logits (B, 1, H, W), teacher_probabilities of the same shape in [0, 1], valid: bool
    of the same shape, the pixels that count (None: all) -> float32 scalar >= 0; 0 if none counts.
    Source: paper, eq. 2, its sign put right.
    """
    # C(theta) = E[ -y log p - (1-y) log(1-p) ],  p the student's answer, y the teacher's (z~)
    # Eq. 2 prints "-y log p + (1-y) log(1-p)". That has no minimum: at y = 0 it is log(1-p), which
    # falls without end as p goes to 1, the very answer that the teacher calls wrong.
    # Mind the floor: at p = y the value is the teacher's entropy, not 0. A teacher that says 0.5
    # costs 0.693 (ln 2) a pixel however well the student agrees; but the gradient with respect to
    # the logit, p - y, does vanish there.
    y = teacher_probabilities.float()
    distance = F.binary_cross_entropy_with_logits(student_logits.float(), y, reduction="none")
    if valid is None:
        return distance.mean()
    return (distance * valid).sum() / valid.sum().clamp(min=1)


# --- 4. Delayed augmentation ---------------------------------------------------------------------
# Rotate what the student sees, and its prediction is rotated. The teacher's, from the unrotated
# slice, is not: pixel by pixel the two speak of different places (paper, section 2.1). Feeding
# both the same rotated slice lines them up, but asks for no agreement between two views of the
# same cord. So: the student's INPUT and the teacher's OUTPUT are warped, by one and the same phi.
# No gradient flows through the teacher: its output is a constant target like a mask, and may be
# warped like one.

def sample_affine(n, degrees, translation=0.0, scale=0.0, device=None):
    """Draw n random affine transformations phi, uniform in the given ranges.

    degrees: rotation in +- degrees; translation: +- px along both axes; scale: 1 +- scale.
    -> phi (n, 2, 3) float32, from a pixel of the result (px right of and below the image's centre)
    to the place that its value is taken from. Source: paper, sections 2.1 and 3.1.
    """
    def uniform(limit):
        return torch.empty(n, device=device).uniform_(-limit, limit)

    # From output to input: the inverse of what happens to the picture.
    angle, zoom = torch.deg2rad(uniform(degrees)), 1 + uniform(scale)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = torch.stack([cos, -sin, uniform(translation), sin, cos, uniform(translation)], dim=1)
    return rows.view(n, 2, 3)


def warp(images, phi):
    """g(.; phi): resample by an affine transformation; images, masks and probabilities alike.

    images (B, C, H, W) float, phi (B, 2, 3) in px as from sample_affine -> (B, C, H, W), float32.
    Bilinear, 0 outside the image. Threshold a warped mask at 0.5. Source: paper, section 2.1.
    """
    height, width = images.shape[-2:]
    # affine_grid counts from -1 to 1 across each side, whatever its length: convert px to that,
    # or a rotation would shear an image that is not square.
    matrix = phi.clone()
    matrix[:, 0, 1] *= height / width
    matrix[:, 1, 0] *= width / height
    matrix[:, 0, 2] *= 2 / width
    matrix[:, 1, 2] *= 2 / height
    # Not in bfloat16, wherever this is called: 8 bits are too few for a place among 200 px.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrix, images.shape, align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros",
                             align_corners=False)


def augment(images, phi, noise=0.1):
    """What the student sees: g(x + noise; phi).

    images (B, C, H, W), phi (B, 2, 3) in px, noise: its std in the images' unit -> augmented
    (B, C, H, W) float32; inside (B, 1, H, W) bool, False where phi reads from outside the image
    and there is nothing to agree on. Source: paper, section 2.1.
    """
    noisy = images + noise * torch.randn_like(images)
    # Ones travel along: where phi reads from outside, less than 1 arrives.
    both = warp(torch.cat([noisy, torch.ones_like(images[:, :1])], dim=1), phi)
    return both[:, :-1].contiguous(), both[:, -1:] > 0.999   # a strided view would be slower


@torch.no_grad()
def delayed_targets(teacher, images, phi, noise=0.1):
    """What the student shall agree with: the teacher's answer to the unwarped slice, then warped.

    teacher: maps (B, C, H, W) to logits (B, 1, H, W); images, noise as for augment; phi: the very
    same -> probabilities (B, 1, H, W) float32 in [0, 1], on the student's grid, without gradient.
    Source: paper, section 2.1.
    """
    probabilities = torch.sigmoid(teacher(images + noise * torch.randn_like(images)).float())
    return warp(probabilities, phi)


# --- 5. Teacher and ramps ------------------------------------------------------------------------

def make_teacher(student):
    """A copy of the student that no gradient reaches. Any nn.Module -> the same type.

    A teacher with random weights of its own (authors) would pull the student towards noise until
    the average has forgotten it. Source: paper, section 2.
    """
    return copy.deepcopy(student).requires_grad_(False).train()


@torch.no_grad()
def update_teacher(student, teacher, alpha):
    """theta' <- alpha theta' + (1 - alpha) theta, in place. alpha in [0, 1]. Source: paper, eq. 1.
    """
    # BatchNorm's running mean and variance are buffers, not parameters, and are NOT averaged. They
    # need not be: the teacher runs in train mode on every batch (Dropout on, too) and so keeps
    # statistics of its own activations. The common bug is to skip the buffers AND run the teacher
    # in eval mode: they stay as they were copied, at mean 0 and variance 1 in a fresh network. A
    # teacher that has to run in eval mode needs the student's buffers copied here.
    for theta_teacher, theta in zip(teacher.parameters(), student.parameters(), strict=True):
        theta_teacher.lerp_(theta, 1 - alpha)


def ramp_up(epoch, length):
    """Sigmoid-shaped ramp exp(-5 (1 - epoch / length)^2), from about 0 to 1; 1 from then on.

    epoch: counted from 1; length in epochs, 0: no ramp. -> float in (0, 1]. Source: paper, section
    3.1 names the ramps; the shape is that of the first mean teacher (Tarvainen & Valpola 2017).
    """
    return math.exp(-5 * (1 - min(epoch / length, 1)) ** 2) if length else 1.0


def learning_rate_factor(epoch, epochs, ramp):
    """Ramp-up over the first `ramp` epochs, then half a cosine down to 0 at the last one.

    epoch: counted from 1. -> float in [0, 1], to multiply eta with. In the last epoch, at 0, the
    student's weights rest and the teacher catches up. Source: paper, section 3.1.
    """
    if epoch <= ramp:
        return ramp_up(epoch, ramp)
    return 0.5 * (1 + math.cos(math.pi * (epoch - ramp) / (epochs - ramp)))


# --- 6. One training step = Algorithm 1 ----------------------------------------------------------

def train_step(student, teacher, optimizer, images, masks, unlabelled, step, weight=2.9,
               alpha=0.99, affine=(4.5, 0.0, 0.0), noise=0.1, amp=False,
               targets_of=delayed_targets, consistency=consistency_loss):
    """One step of Algorithm 1, in place. The networks map (B, C, H, W) to logits (B, 1, H, W).

    images (L, C, H, W) float, z-scored, with masks (L, 1, H, W) in {0, 1}; unlabelled (U, C, H,
    W), U may be 0; step: how many were taken before; weight: w; affine: degrees, translation and
    scale for sample_affine; noise: its std. teacher None: the supervised baseline, which ignores
    unlabelled. -> dict of float32 scalars on the device: loss, dice, consistency. The caller
    counts step, ramps weight, sets alpha and the learning rate, as train() of section 9 does, or
    the 20 lines in README.md. ValueError if a network is in eval mode.
    """
    if not (student.training and (teacher is None or teacher.training)):
        raise ValueError("student and teacher must be in train mode, see update_teacher: call "
                         ".train() on both, also after every evaluation")
    # Labelled and unlabelled slices pass through the networks apart, as in the authors' code. In
    # one pass BatchNorm would normalise each kind by the mean of both, and unlabelled slices would
    # bend the supervised gradient even at w = 0. Apart, w = 0 IS the supervised baseline: with the
    # same draws, the same step. (Only the running statistics, for evaluation, see both: README.md)
    parts = [images] if teacher is None or len(unlabelled) == 0 else [images, unlabelled]
    phis = [sample_affine(len(x), *affine, device=x.device) for x in parts]               # line 2
    views, inside = zip(*[augment(x, phi, noise) for x, phi in zip(parts, phis)])
    y = (warp(masks, phis[0]) >= 0.5).float()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        if teacher is not None:      # first: less memory, while no student's activations wait
            targets = [targets_of(teacher, x, phi, noise) for x, phi in zip(parts, phis)]  # line 4
        logits = [student(view) for view in views]                                        # line 3
    loss = dice = dice_loss(torch.sigmoid(logits[0].float()), y)                          # line 5
    disagreement = torch.zeros_like(dice)
    if teacher is not None:
        # Pixels from outside the image have no target: leave them out. (Dice need not care: there
        # the mask is 0, and so is the prediction soon.)
        disagreement = consistency(*map(torch.cat, (logits, targets, inside)))            # line 6
        loss = dice + weight * disagreement                                               # line 7
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()                                                                      # line 8
    step += 1                                                                             # line 9
    if teacher is not None:
        # A plain mean at first, 1/2, 2/3, 3/4, ... (authors), until alpha takes over at step 99: a
        # constant 0.99 would carry the random first weights along for some 100 steps. At epoch 51
        # the paper goes on to 0.999; with its 10 steps an epoch this min() allows that by and by.
        update_teacher(student, teacher, min(1 - 1 / (step + 1), alpha))                  # line 10
    return {"loss": loss.detach(), "dice": dice.detach(), "consistency": disagreement.detach()}


# The paper ends here. What follows is what it takes to run it.
# --- 7. Data -------------------------------------------------------------------------------------
# Volumes become axial slices: rows run from anterior to posterior, columns from the patient's left
# to the right (neurological). All of them lie on the device as tensors before the first step.

class InputError(Exception):
    """Bad input. Its text names the file, what is wrong, what was expected and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


class Scan(NamedTuple):
    site: str                                            # SCGM: "site1"; else ""
    subject: str                                         # "site1-sc01"; "sub-9709Ses1"
    name: str                                            # as subject; BIDS: "sub-9709Ses1_run-1"
    image: Path
    masks: dict                                          # rater -> file; {ANY: file}; {}

    @property
    def person(self):
        return re.sub(r"Ses\d+$", "", self.subject)      # sub-9709Ses1 and Ses2 are one person


ANY = "any"                                              # the rater, where masks do not name one


class Slices(NamedTuple):
    images: torch.Tensor                                 # (N, 1, H, W) float32, z-scored per slice
    masks: torch.Tensor                                  # as images, in {0, 1}; unlabelled: none
    where: list                                          # N times (site, scan, slice from 0)


def find_scans(folder):
    """List the scans below a folder, in any of three layouts. -> list of Scan; InputError if none.

    SCGM: siteS-scNN-image.nii.gz with siteS-scNN-mask-rR.nii.gz beside it, at any depth.
    BIDS: sub-*/**/anat/*_T2star*.nii.gz with derivatives/labels/(same path)_gmseg*.nii.gz, the
    first of several.
    Decathlon, nnU-Net: imagesTr/NAME.nii.gz or NAME_0000.nii.gz with labelsTr/NAME.nii.gz;
    imagesTs without masks; every volume a person.
    """
    folder, scans = Path(folder), []
    require(folder.is_dir(), f"{folder}: no such folder; name that of your scans with --data")
    for image in sorted(folder.rglob("site?-sc[0-9][0-9]-image.nii.gz")):
        name = image.name.removesuffix("-image.nii.gz")
        # sc11 to sc20 are the challenge's test half: unlabelled, whatever lies beside them.
        masks = image.parent.glob(f"{name}-mask-r?.nii.gz") if int(name[-2:]) <= 10 else []
        scans.append(Scan(name[:5], name, name, image, {mask.name[-8]: mask for mask in masks}))

    for image in sorted(folder.glob("sub-*/**/anat/*_T2star*.nii.gz")):
        place, name = image.parent.relative_to(folder), image.name.removesuffix(".nii.gz")
        masks = sorted((folder / "derivatives/labels" / place).glob(f"{name}_gmseg*.nii.gz"))
        scans.append(Scan("", place.parts[0], name.split("_T2star")[0], image,
                          {ANY: mask for mask in masks[:1]}))

    images, labels = sorted(folder.glob("imagesT[rs]/[!.]*.nii.gz")), folder / "labelsTr"
    # nnU-Net numbers the channels of an image, but not its mask: the first channel is taken.
    plain = any((labels / image.name).exists() for image in images)
    numbered = [image for image in images if image.name.endswith("_0000.nii.gz") and not plain]
    for image in numbered or images:
        name = image.name.removesuffix(".nii.gz").removesuffix("_0000" if numbered else "")
        mask = labels / f"{name}.nii.gz"
        labelled = image.parent.name == "imagesTr" and mask.exists()
        scans.append(Scan("", name, name, image, {ANY: mask} if labelled else {}))
    require(scans, f"{folder}: no scans found; expected site*-sc*-image.nii.gz, sub-*/anat/*_T2s"
                   "tar*.nii.gz or imagesTr/*.nii.gz below it; name their folder with --data")
    return scans


def split_scans(scans, config):
    """Deal the scans out. -> dict of list of Scan: train, val, test (with masks), unlabelled.

    By --train, --val and --test if given, else --split random people per site; no person is in
    two of these. Unlabelled are the subjects of --unlabelled, who may be anybody (further scans of
    test people, too); by default all scans left over that are of no validation or test person and,
    if dealt by lot, have no mask. InputError if that cannot be done.
    """
    labelled = [scan for scan in scans if scan.masks]
    chosen = {key: set(getattr(config, key)) for key in ("train", "val", "test", "unlabelled")}
    for key, subjects in chosen.items():
        known = {scan.subject for scan in (scans if key == "unlabelled" else labelled)}
        unknown = " ".join(sorted(subjects - known))
        require(not unknown, f"--{key}: no subject {unknown} in {config.data}, or without a mask")

    by_name = bool(config.train or config.val or config.test)
    if by_name:
        require(config.train and config.test, "--train and --test must both be given")
    else:
        generator = np.random.default_rng(config.split_seed)
        for site in sorted({scan.site for scan in scans}):
            here = sorted({scan.person for scan in labelled if scan.site == site})
            require(len(here) >= sum(config.split), f"{config.data}: {len(here)} people with "
                    f"masks in {site or 'all'}, too few for --split {config.split}; lower it")
            # The test people are drawn first: they stay as they are with more or fewer to train.
            parts = np.split(generator.permutation(here), np.cumsum(config.split[::-1]))
            for key, part in zip(("test", "val", "train"), parts):
                chosen[key] |= {scan.subject for scan in labelled if scan.person in part}

    sets = {key: [scan for scan in labelled if scan.subject in chosen[key]]
            for key in ("train", "val", "test")}
    people = {key: {scan.person for scan in part} for key, part in sets.items()}
    for one, other in itertools.combinations(people, 2):
        both = " ".join(sorted(people[one] & people[other]))
        require(not both, f"{config.data}: {both} is in --{one} and in --{other}; choose one")
    if config.unlabelled:
        free = [scan for scan in scans if scan.subject in chosen["unlabelled"]]
    else:
        free = [scan for scan in scans if scan.person not in people["val"] | people["test"]
                and (by_name or not scan.masks)]
    taken = sum(sets.values(), [])
    return {**sets, "unlabelled": [scan for scan in free if scan not in taken]}


def load_nifti(path):
    """Read a 3-D NIfTI and check it. -> nibabel image in memory, float32; InputError if unfit."""
    try:
        with nib.imageglobals.ErrorLevel(30):            # no silent repair of voxel sizes <= 0
            image = nib.load(path)
        shape, mm = image.shape, image.header.get_zooms()
        require(isinstance(image, nib.Nifti1Image), "is no NIfTI; convert it")
        require(len(shape) == 3, f"has {len(shape)} dimensions, expected 3; split it")
        require(all(0.01 < size < 100 for size in [*mm, *nib.affines.voxel_sizes(image.affine)])
                and np.isfinite(nib.io_orientation(image.affine)).all()         # not singular
                and 0 < math.prod(shape) * max(1, mm[0] * mm[1]) < 2 ** 28,
                f"{shape} voxels of {mm} mm or their affine make no sense; correct its header")
        volume = image.get_fdata(dtype=np.float32)
        require(np.isfinite(volume).all(), "has NaN or infinite voxels; mend them")
        return nib.Nifti1Image(volume, image.affine, image.header)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:                           # nibabel's readers raise a dozen kinds
        raise InputError(f"{path}: cannot be read as NIfTI ({error}); fetch it again") from error


def canonical(image):
    """Voxels with axes to the right, anterior, superior. -> array (X, Y, Z), affine."""
    image = nib.as_closest_canonical(image)
    return image.get_fdata(dtype=np.float32), image.affine


def read_mask(scan, rater, shape, affine, label=(1,)):
    """Foreground of one rater or of the majority. -> array (X, Y, Z) float32 in {0, 1}.

    InputError if a mask is not on its image's grid (shape, affine) or holds anything but whole
    numbers from 0 to 255. Published masks differ in the header's fourth decimal: a quarter of a
    voxel, at the worst corner, is allowed.
    """
    votes = []
    for key in scan.masks if rater == "majority" or ANY in scan.masks else [rater]:
        require(key in scan.masks, f"{scan.image}: no mask of rater {key}; choose another --rater")
        mask, mask_affine = canonical(load_nifti(scan.masks[key]))
        corners = np.array([*itertools.product(*((-0.5, n - 0.5) for n in shape))])      # voxels
        moved = nib.affines.apply_affine(np.linalg.inv(affine) @ mask_affine, corners)
        require(mask.shape == shape and np.abs(moved - corners).max() <= 0.25,
                f"{scan.masks[key]}: is not on the grid of its image, {shape}; resample it")
        odd = np.setdiff1d(mask, np.arange(256))[:4]
        require(not odd.size, f"{scan.masks[key]}: has values {odd}, not whole ones from 0 to 255")
        votes.append(np.isin(mask, label))
    return (np.mean(votes, axis=0) > 0.5).astype(np.float32)  # a 2-2 tie is background


def to_slices(volume, voxel_mm, spacing):
    """Cut a volume (X, Y, Z) into axial slices resampled in their plane. -> (Z, 1, H, W) float32.

    voxel_mm: its voxel size; spacing: the wanted one, mm (met to half a pixel in the whole width).
    Linear, antialiased when shrinking. Source: "resampled to 0.25 x 0.25 mm", paper, section 3.1.
    """
    slices = torch.from_numpy(volume.transpose(2, 1, 0)[:, None, ::-1].copy())    # (Z, 1, Y, X)
    size = [max(1, round(volume.shape[axis] * voxel_mm[axis] / spacing)) for axis in (1, 0)]
    return F.interpolate(slices, size=size, mode="bilinear", antialias=True)


def center_crop(slices, height, width, shift=(0, 0)):
    """Crop (N, 1, H, W) around its centre, or pad it with 0, to (N, 1, height, width).

    shift: px by which to move the crop down and to the right. Cropping back to H x W with the
    opposite shift undoes a pad, and puts a crop back in its place.
    """
    top = int((slices.shape[2] - height) / 2) + shift[0]  # int, not //: pad and crop round alike
    left = int((slices.shape[3] - width) / 2) + shift[1]
    bottom, right = slices.shape[2] - height - top, slices.shape[3] - width - left
    return F.pad(slices, (-left, -right, -top, -bottom))  # a negative pad crops


def normalise(slices):
    """Give each slice mean 0 and std 1, since every scanner has a scale of its own."""
    mean, std = slices.mean((2, 3), keepdim=True), slices.std((2, 3), keepdim=True)
    return (slices - mean) / std.clamp(min=1e-6)


def read_scan(scan, config, labelled):
    """One scan's slices -> Slices. An unlabelled one's masks are not even opened.

    Slices without any contrast are dropped and, if labelled, those without foreground.
    """
    volume, affine = canonical(load_nifti(scan.image))
    voxel_mm, side = nib.affines.voxel_sizes(affine), config.crop
    images = center_crop(to_slices(volume, voxel_mm, config.spacing), side, side)
    masks, keep = images[:0], images.flatten(1).std(1) > 0
    if labelled:
        mask = read_mask(scan, config.rater, volume.shape, affine, config.label)
        whole = (to_slices(mask, voxel_mm, config.spacing) >= 0.5).float()
        masks = center_crop(whole, side, side)
        if masks.sum() < 0.99 * whole.sum():
            far = (whole.nonzero()[:, 2:] - torch.tensor(whole.shape[2:]) / 2).abs().max().item()
            print(f"warning: {scan.image}: {1 - masks.sum() / whole.sum():.0%} of its foreground "
                  f"is outside the centre crop, {side} px of {config.spacing} mm; "
                  f"--crop {8 * math.ceil((2 * far + 1) / 8)} would hold it")
        keep &= masks.flatten(1).any(1)
        masks = masks[keep]
    return Slices(normalise(images)[keep], masks,
                  [(scan.site, scan.name, int(z)) for z in keep.nonzero()])


def load_data(config, device="cpu"):
    """Read all that an experiment needs. -> dict of Slices: train, val, test, unlabelled."""
    folder = Path(config.data or phantom_folder())
    if not config.data and not folder.exists():
        write_phantom(folder)
    data, faults, nothing = {}, [], torch.zeros(0, 1, config.crop, config.crop)
    for name, scans in split_scans(find_scans(folder), config).items():
        parts = [Slices(nothing, nothing, [])]
        for scan in scans:
            try:
                parts.append(read_scan(scan, config, labelled=name != "unlabelled"))
            except InputError as error:
                faults.append(str(error))                # to report all of them at once
        images, masks, where = zip(*parts)
        data[name] = Slices(torch.cat(images).to(device), torch.cat(masks).to(device),
                            sum(where, []))
        print(f"{name:>10}: {len(data[name].where):4d} slices of {len(scans):2d} scans")
    require(not faults, "; ".join(faults))
    require(data["train"].where and data["test"].where,
            f"{folder}: no foreground in any training or any test slice; check --crop and --label")
    return data


# --- 8. Metrics and evaluation -------------------------------------------------------------------

METRICS = ("dice", "miou", "accuracy", "precision", "recall", "specificity")


def segmentation_metrics(predictions, masks):
    """The six metrics of the paper's Table 1, for each slice.

    predictions, masks (N, 1, H, W), bool or {0, 1} -> dict of (N,) float32 in percent; 0 / 0 is 0.
    "mIoU" is the IoU of the foreground, averaged over slices: Table 1's numbers agree with that.
    """
    p, y = predictions.bool().flatten(1), masks.bool().flatten(1)                  # (N, H * W)
    tp, fp = (p & y).sum(1), (p & ~y).sum(1)
    fn, tn = (~p & y).sum(1), (~p & ~y).sum(1)
    ratios = {"dice": (2 * tp, 2 * tp + fp + fn), "miou": (tp, tp + fp + fn),
              "accuracy": (tp + tn, tp + fp + fn + tn), "precision": (tp, tp + fp),
              "recall": (tp, tp + fn), "specificity": (tn, tn + fp)}
    return {name: 100 * part / whole.clamp(min=1) for name, (part, whole) in ratios.items()}


@torch.no_grad()
def predict_probabilities(model, images, batch=32):
    """Probability of foreground, in eval mode. (N, 1, H, W) z-scored -> the same shape."""
    training = model.training
    model.eval()
    probabilities = [torch.sigmoid(model(part).float()) for part in images.split(batch)]
    model.train(training)
    return torch.cat(probabilities)


def evaluate(model, slices, config):
    """segmentation_metrics of a network on Slices. -> dict of list of N floats in percent."""
    found = predict_probabilities(model, slices.images) > config.threshold
    return {name: x.tolist() for name, x in segmentation_metrics(found, slices.masks).items()}


def mean_dice(model, slices, config):
    return float(np.mean(evaluate(model, slices, config)["dice"])) if slices.where else math.nan


# --- 9. The training loop ------------------------------------------------------------------------

def build_network(config):
    """The one place where the network is built: put your own here, one channel in and one out."""
    return UNet(config.width, config.dropout)


def build(config, method, device):
    """What a run trains. -> dict of networks, student and (but for the baseline) teacher; Adam."""
    # Channels-last memory is what tensor cores want, and 1.1 to 1.4 times as fast on a CPU.
    models = {"student": build_network(config).to(device, memory_format=torch.channels_last)}
    if method == "mean_teacher":
        models["teacher"] = make_teacher(models["student"])
    # Adam's own weight_decay is the paper's L2 penalty; AdamW's is not.
    decay = config.weight_decay[-1 if method == "mean_teacher" else 0]
    optimizer = torch.optim.Adam(models["student"].parameters(), betas=(0.9, 0.999), fused=True,
                                 weight_decay=decay)
    return models, optimizer


@torch.no_grad()
def same_input_targets(teacher, images, phi, noise):
    """For --augmentation same: the teacher too sees a warped slice, and nothing is delayed."""
    return torch.sigmoid(teacher(warp(images + noise * torch.randn_like(images), phi)).float())


def step_options(config, device):
    """The arguments of train_step that stay the same for a whole run, ablations among them."""
    def consistency(logits, targets, valid):
        valid = valid & (torch.maximum(targets, 1 - targets) >= config.confidence)
        if config.consistency == "bce":
            return consistency_loss(logits, targets, valid)
        squares = (torch.sigmoid(logits.float()) - targets) ** 2
        return (squares * valid).sum() / valid.sum().clamp(min=1)

    targets_of = delayed_targets if config.augmentation == "delayed" else same_input_targets
    return {"affine": (config.degrees, config.translation, config.scale), "noise": config.noise,
            "amp": config.precision == "bfloat16" and device.type == "cuda",
            "targets_of": targets_of, "consistency": consistency}


def batches(labelled, unlabelled, count, extra):
    """One epoch: every labelled slice once, in a new order; a part batch at the end is dropped.

    Yields images (count, 1, H, W), masks (count, 1, H, W), unlabelled images (extra, 1, H, W).
    """
    n, m, device = len(labelled.images), len(unlabelled.images), labelled.images.device
    order, rounds = torch.randperm(n, device=device), math.ceil(n // count * extra / max(1, m))
    others = torch.randperm(m, device=device).repeat(rounds)         # as often as it takes
    for i in range(n // count):
        mine, more = order[i * count:(i + 1) * count], others[i * extra:(i + 1) * extra]
        yield labelled.images[mine], labelled.masks[mine], unlabelled.images[more]


def train(config, method, seed, data, overwrite=False):
    """Train one network (and its teacher); evaluate the last epoch on the test set.

    method: supervised or mean_teacher; data: from load_data, on the device. Saves METHOD-seedS.pt
    and .csv into config.out and, unless it overwrites them, goes on from there; on a CPU an
    interrupted run ends bit for bit as any other. -> dict: history (a dict per epoch),
    metrics[model][metric] (a list over the test slices), and the state_dicts student and teacher.
    """
    labelled, unlabelled, semi = data["train"], data["unlabelled"], method == "mean_teacher"
    epochs, device = config.epochs[-1 if semi else 0], labelled.images.device
    count = min(config.batch, len(labelled.images))
    extra = config.unlabelled_batch if semi and unlabelled.where else 0
    steps = len(labelled.images) // count
    print(f"\n{method}, seed {seed}: {epochs} epochs x {steps} steps = {epochs * steps} steps of "
          f"{count} + {extra} slices on {device.type}")
    # Seeded anew for the weights and for every epoch, a resumed run needs no generator's state.
    torch.manual_seed(1_000_000 * seed)
    models, optimizer = build(config, method, device)
    student, teacher = models["student"], models.get("teacher")
    path = Path(config.out, f"{method}-seed{seed}.pt")
    run = {"config": vars(config), "method": method, "seed": seed, "history": [],
           "where": [part.where for part in data.values()]}
    if path.exists() and not overwrite:
        run = load_run(path, config, data, {**models, "optimizer": optimizer})
    history, options, start = run["history"], step_options(config, device), time.perf_counter()
    first = len(history) + 1

    for epoch in range(first, epochs + 1):
        torch.manual_seed(1_000_000 * seed + epoch)      # batches, phi, noise, Dropout
        lr = config.lr * learning_rate_factor(epoch, epochs, config.lr_ramp)
        optimizer.param_groups[0]["lr"] = lr
        weight = config.consistency_weight * ramp_up(epoch, config.consistency_ramp)
        alpha = config.alpha if epoch <= config.alpha_epochs else config.alpha_late
        losses = [train_step(student, teacher, optimizer, *slices, step, weight, alpha, **options)
                  for step, slices in enumerate(batches(labelled, unlabelled, count, extra),
                                                start=(epoch - 1) * steps)]
        dice, consistency = (torch.stack([loss[name] for loss in losses]).mean().item()
                             for name in ("dice", "consistency"))   # here it waits for the device
        row = {"epoch": epoch, "step": epoch * steps, "lr": lr, "dice_loss": dice,
               **({"weight": weight, "consistency_loss": consistency} if semi else {}),
               **{f"val_{name}": math.nan for name in models}}
        history.append(row)
        if epoch in (1, epochs) or epoch % config.validate_every == 0:
            row.update({f"val_{name}": mean_dice(model, data["val"], config)
                        for name, model in models.items()})
            run["optimizer"] = optimizer.state_dict()
            run.update({name: model.state_dict() for name, model in models.items()})
            if epoch == epochs:
                run["metrics"] = {name: evaluate(model, data["test"], config)
                                  for name, model in models.items()}
            save_csv(path.with_suffix(".csv"), history)
            save(path, lambda file: torch.save(run, file))
            print_progress(row, epochs, (time.perf_counter() - start) / (epoch - first + 1))
    return run


def print_progress(row, epochs, seconds):
    """One line on an epoch, a row of the history; seconds: what an epoch took so far."""
    cells = [f"{name} {value:<7.4g}" for name, value in row.items() if not math.isnan(value)]
    print(*cells, f"{seconds * (epochs - row['epoch']) / 60:.1f} min left", sep="  ", flush=True)


def save(path, write):
    """Let write(file) fill a file that takes its name, or replaces another, only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                      # on the disk before it gets its name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                # still there only if something failed


def save_csv(path, rows):
    lines = [",".join(map(str, line)) for line in [rows[0], *(row.values() for row in rows)]]
    save(path, lambda file: file.write("\n".join([*lines, ""]).encode()))


def load_network(run, name):
    """Build the student or the teacher that a checkpoint holds. -> network in eval mode."""
    network = build_network(Config(**run["config"]))
    network.load_state_dict(run[name])
    return network.eval()


def load_checkpoint(path):
    """Read what train() saved; no code in it is run. -> dict; InputError if it is not such."""
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        require({"method", "seed", "where", "history"} <= run.keys(), "parts are missing")
        load_network(run, "student")
        return run
    except Exception as error:                           # unpickling raises almost anything
        raise InputError(f"{path}: is no checkpoint of this program ({type(error).__name__}); "
                         "name another, or delete it to train anew") from error


def load_run(path, config, data, parts=()):
    """Go on with a run. -> its checkpoint; InputError if it is of other settings or data.

    parts: dict of the networks and the optimiser that take up its state.
    """
    run, free = load_checkpoint(path), ("out", "method", "runs", "seed", "device")
    theirs = {**run["config"], "slices": run["where"]}
    ours = {**vars(config), "slices": [part.where for part in data.values()]}
    differs = [key for key in ours if key not in free and theirs.get(key) != ours[key]]
    if path.stem != f"{run['method']}-seed{run['seed']}":
        differs.append("name")
    require(not differs, f"{path}: differs in {', '.join(differs)} from this run; choose another "
                         "--out, or --overwrite")
    for name in parts:
        parts[name].load_state_dict(run[name])
    return run


# --- 10. Experiment: methods x runs, table, pictures ---------------------------------------------

METHODS = ("supervised", "mean_teacher")
LABELS = {("supervised", "student"): "supervised",
          ("mean_teacher", "student"): "mean teacher (student)",
          ("mean_teacher", "teacher"): "mean teacher (teacher)"}
COLORS = {"rater": "#009e73", "supervised": "#d55e00",    # Okabe and Ito's: safe for every eye
          "mean teacher (student)": "#56b4e9", "mean teacher (teacher)": "#0072b2"}
PAPER = {"paper: supervised": ("67.92 (0.31)", "53.68 (0.33)", "99.75 (0.01)",         # Table 1
                               "57.95 (0.79)", "92.50 (0.91)", "99.78 (0.01)"),
         "paper: semi-supervised": ("70.21 (0.23)", "55.51 (0.25)", "99.79 (0.00)",
                                    "64.73 (0.77)", "86.11 (0.94)", "99.85 (0.01)")}


def experiment(config, overwrite=False):
    """Train every method with every seed, evaluate, report. -> dict: scores, difference, table.

    scores[row][metric]: a list over seeds of the mean over test slices, percent; difference: the
    teacher's Dice minus the supervised network's, mean and standard error over seeds, or None.
    Under torchrun the runs are dealt out; the process that ends last reports, the others return
    None. InputError if config.out holds runs of another configuration, unless to be overwritten.
    """
    out, methods = Path(config.out), METHODS if config.method == "both" else (config.method,)
    data = load_data(config, pick_device(config.device))
    for path in [] if overwrite else out.glob("*-seed*.pt"):
        load_run(path, config, data)
    save(out / "config.json", lambda file: file.write(json.dumps(vars(config), indent=1).encode()))
    jobs = list(itertools.product(methods, range(config.seed, config.seed + config.runs)))
    # A batch of 16 small slices does not fill one GPU: many GPUs take many runs, not one in parts.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for method, seed in jobs[rank::world]:
        train(config, method, seed, data, overwrite)
    paths = [out / f"{method}-seed{seed}.pt" for method, seed in jobs]
    runs = [load_checkpoint(path) for path in paths if path.exists()]
    finished = [run for run in runs if "metrics" in run]
    if len(finished) < len(jobs):
        print(f"{out}: {len(finished)} of {len(jobs)} runs are finished")
        return None
    return report(config, finished, data["test"])


def pick_device(name="auto"):
    """Turn --device into a device; under torchrun, each process gets its own GPU."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    try:
        if torch.cuda.is_available() and name in ("auto", "cuda"):
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        one = torch.ones(1, device=best if name == "auto" else name)
        require(one.item() == 1, "does not compute")
        return one.device
    except Exception as error:
        raise InputError(f"--device {name}: not to be had here ({error}); try cpu") from error


def report(config, runs, slices):
    """Write the table, the metrics of every slice and the pictures. -> dict, see experiment()."""
    out, scores, rows = Path(config.out), {}, []
    for run in runs:
        for model, metrics in run["metrics"].items():
            row = scores.setdefault(LABELS[run["method"], model], {name: [] for name in METRICS})
            for name in METRICS:
                row[name].append(float(np.mean(metrics[name])))
            for k, (site, scan, z) in enumerate(slices.where):
                rows.append({"method": run["method"], "seed": run["seed"], "model": model,
                             "site": site, "subject": scan, "slice": z,
                             **{name: metrics[name][k] for name in METRICS}})
    # The paper's rows belong to the challenge's data. The phantom has its layout, but no --data.
    challenge = config.data != "" and slices.where[0][0].startswith("site")
    table, difference = make_table(scores, challenge)
    save_csv(out / "metrics.csv", rows)
    save(out / "table.md", lambda file: file.write(table.encode()))
    draw_curves(runs, out / "curves.png")
    draw_examples(config, runs, slices, out / "examples.png")
    print(f"\n{table}\nTable, per-slice metrics, checkpoints and pictures are in {out}")
    return {"scores": scores, "difference": difference, "table": table}


def make_table(scores, challenge=False):
    """Scores as Markdown in the layout of the paper's Table 1. -> text, difference (experiment()).

    challenge: are these the paper's data? Then its own two rows stand below.
    """
    def cell(values):
        return f"{np.mean(values):.2f}" + (f" ({np.std(values, ddof=1):.2f})" if runs > 1 else "")

    runs = len(next(iter(scores.values()))["dice"])
    rows = {f"test, %; runs: {runs}": [name.title().replace("Miou", "mIoU") for name in METRICS],
            ":" + "-" * 21: ["-" * 11 + ":"] * 6,
            **{label: map(cell, row.values()) for label, row in scores.items()},
            **(PAPER if challenge else {})}
    table = "".join(f"| {label:22} | {' | '.join(f'{text:>12}' for text in row)} |\n"
                    for label, row in rows.items())
    if len(scores) < 3:
        return table, None
    pairs = np.subtract(scores["mean teacher (teacher)"]["dice"], scores["supervised"]["dice"])
    error = float(np.std(pairs, ddof=1)) / math.sqrt(runs) if runs > 1 else math.nan
    table += (f"\nTeacher minus supervised: {pairs.mean():+.2f} Dice, standard error "
              f"{f'{error:.2f}' if runs > 1 else 'unknown'}, pairs of runs: {runs}\n")
    return table, (float(pairs.mean()), error)


def draw_curves(runs, path):
    """Losses and validation Dice against the training step, one line a run, into a PNG."""
    panels = {"Dice loss (paper, eq. 3)": {"dice_loss": "student"},
              "Consistency loss, per pixel": {"consistency_loss": "student"},
              "Validation Dice, %": {"val_student": "student", "val_teacher": "teacher"}}
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, (title, columns) in zip(figure.subplots(1, 3), panels.items()):
        for run, (column, model) in itertools.product(runs, columns.items()):
            points = [(row["step"], row[column]) for row in run["history"]
                      if not math.isnan(row.get(column, math.nan))]
            if points:
                label = LABELS[run["method"], model]
                axis.plot(*zip(*points), "--" if model == "teacher" else "-", color=COLORS[label],
                          label=label if run["seed"] == runs[0]["seed"] else None)
                axis.legend()
        axis.set(title=title, xlabel="training step")
    save(path, lambda file: figure.savefig(file, dpi=110))


def draw_examples(config, runs, slices, path):
    """Outlines of the rater and of each method's first run on four test slices, into a PNG."""
    columns, dice = {"image": None, "rater": slices.masks}, {}
    for run in runs:
        if run["seed"] == config.seed:
            *_, model = run["metrics"]                   # the teacher, if there is one
            label, network = LABELS[run["method"], model], load_network(run, model)
            found = predict_probabilities(network.to(slices.images.device), slices.images)
            columns[label], dice[label] = found > config.threshold, run["metrics"][model]["dice"]
    order = np.argsort(-np.ptp([*dice.values()], axis=0)).tolist()
    picked = list(dict.fromkeys(order[:2] + order[-2:]))
    figure = Figure(figsize=(3 * len(columns), 3.3 * len(picked)), layout="constrained")
    figure.suptitle("Test slices on which the methods differ most (top) and least"
                    if len(dice) > 1 else "Test slices")
    axes = figure.subplots(len(picked), len(columns), squeeze=False)
    for axis, (k, (title, masks)) in zip(axes.flat, itertools.product(picked, columns.items())):
        image, around = slices.images[k, 0].cpu(), F.max_pool2d(slices.masks[k], 9, 1, 4)[0].cpu()
        low, high = image[around > 0].quantile(torch.tensor([0.02, 0.98])).tolist()
        margin = (high - low) / 2                        # the window is the cord's, not the fat's
        axis.imshow(image.numpy(), cmap="gray", vmin=low - margin, vmax=high + margin)
        caption = "{1}, slice {2}".format(*slices.where[k]) if title == "image" else ""
        axis.set(xticks=[], yticks=[], title=title,
                 xlabel=f"Dice {dice[title][k]:.1f} %" if title in dice else caption)
        if masks is not None and masks[k].any():
            axis.contour(masks[k, 0].cpu().numpy(), [0.5], colors=COLORS[title])
    save(path, lambda file: figure.savefig(file, dpi=110))


# --- 11. Predict ---------------------------------------------------------------------------------

def predict_volume(image, network, config, name="image", center=(0.0, 0.0)):
    """Probability of foreground for every voxel of a nibabel image, on the image's own grid.

    network: as trained with config, whose spacing and crop are used; center: of the crop, mm from
    the image's, to posterior and to the right -> array of image.shape, float32 in [0, 1]; 0
    outside the crop. Warns if the mask is empty or meets the crop's border.
    """
    volume, affine = canonical(image)
    sampled = to_slices(volume, nib.affines.voxel_sizes(affine), config.spacing)
    reach = [config.spacing * size / 2 for size in sampled.shape[2:]]        # mm
    require(all(abs(mm) < most for mm, most in zip(center, reach)),
            f"{name}: --center {center} is outside the image, which reaches to {reach} mm")
    shift = [round(mm / config.spacing) for mm in center]
    slices = center_crop(sampled, config.crop, config.crop, shift)
    device = next(network.parameters()).device
    found = predict_probabilities(network, normalise(slices).to(device)).cpu()
    found *= (slices.flatten(1).std(1) > 0).view(-1, 1, 1, 1)           # nothing in empty slices
    mask = found > config.threshold
    if not mask.any() or mask.sum() > mask[..., 1:-1, 1:-1].sum():
        print(f"warning: {name}: {'foreground at the border' if mask.any() else 'no foreground'} "
              f"of the crop that was looked at, {config.crop} px of {config.spacing} mm around "
              f"{center} mm; --center moves it")
    found = center_crop(found, *sampled.shape[2:], [-px for px in shift])   # undoes the crop
    found = F.interpolate(found, size=volume.shape[1::-1], mode="bilinear", antialias=True)
    found = found.squeeze(1).flip(1).permute(2, 1, 0).numpy()           # (X, Y, Z), RAS
    turn = nib.orientations.ornt_transform(*map(nib.io_orientation, (affine, image.affine)))
    return nib.apply_orientation(found, turn).astype(np.float32)


def predict(argv):
    """Segment a volume, or every one in a folder, with a run's teacher. -> list of masks written.

    A mask is on its image's own grid, whatever its orientation and voxel size. A supervised run
    has no teacher: its only network is used.
    """
    parser = Parser(prog="mean_teacher_seg.py predict", description="Segment a scan, or a folder.")
    parser.add_argument("image", type=Path, help="a NIfTI volume, or a folder of them")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .pt file of a run")
    parser.add_argument("--output", type=Path, required=True, help="the mask, or a folder of them")
    parser.add_argument("--center", type=float, nargs=2, default=(0, 0), metavar=("ROW", "COLUMN"),
                        help="where to look: mm from the image's centre, to posterior and right")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    given = parser.parse_args(argv)
    run = load_checkpoint(given.checkpoint)
    network = load_network(run, "teacher" if "teacher" in run else "student").to(pick_device())
    config, outputs = Config(**run["config"]), {given.output: given.image}
    if given.image.is_dir():
        paths = sorted(given.image.glob("[!.]*.nii*"))
        outputs = {given.output / path.name: path for path in paths}
    require(outputs, f"{given.image}: no .nii or .nii.gz file in this folder; name another")
    for output, path in outputs.items():
        require(output.name.endswith((".nii", ".nii.gz")), f"{output}: end it in .nii or .nii.gz")
        require(given.overwrite or not output.exists(), f"{output}: is there; see --overwrite")
        require(not output.exists() or not output.samefile(path), f"{output}: is the image itself")
    for output, path in outputs.items():
        image = load_nifti(path)
        found = predict_volume(image, network, config, path, given.center) > config.threshold
        # With the image's header: its geometry, codes and units.
        mask = nib.Nifti1Image(found.astype(np.uint8), image.affine, image.header, dtype=np.uint8)
        mask.header["cal_min"] = mask.header["cal_max"] = 0
        content = mask.to_bytes()
        content = gzip.compress(content, mtime=0) if output.suffix == ".gz" else content
        save(output, lambda file: file.write(content))
        print(f"{output}: {found.sum()} voxels of foreground")
    return list(outputs)


# --- 12. The phantom -----------------------------------------------------------------------------
# A study that needs no request: 4 sites x 20 subjects of synthetic cervical cords, in the layout
# and file names of the challenge. Nothing of the method is in here. Each draw(low, high) is one
# property of one subject; its range was set until contrast, sizes and the spread between people
# measured as in six real scans. Distances in mm; brightness relative to white matter.
# mm, thick: voxel size in and across the plane; size: matrix, px; slices: fewest and most;
# black: empty ones more at each end; unit: integer stored for white matter; axes: as stored.
Site = collections.namedtuple("Site", "mm thick size slices black unit axes")
SITES = (Site(0.50, 5.0, 100, (3, 3), 0, 200, "LAS"),
         Site(0.50, 7.5, 100, (7, 14), 0, 1000, "RAS"),
         Site(0.25, 2.5, 176, (19, 20), 4, 500, "LPS"),
         Site(0.29, 5.0, 160, (12, 14), 0, 700, "RPS"))


def ellipse(x, y, radius_x, radius_y):
    """About the distance from an ellipse around (0, 0), mm, negative inside."""
    return (torch.hypot(x / radius_x, y / radius_y) - 1) * radius_y


def stroke(x, y, x0, y0, x1, y1, radius):
    """Distance from a thick line from (x0, y0) to (x1, y1), mm, negative inside."""
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx ** 2 + dy ** 2)).clamp(0, 1)
    return torch.hypot(x - x0 - along * dx, y - y0 - along * dy) - radius


def paint_cord(x, y, z, draw, noise):
    """A cord and what is around it. -> image, distances from the cord and its grey matter, mm.

    From the back to the front, like a painter: each shape covers what is there. (Z, Y, X) each.
    """
    def paint(value, distance):                          # a shape, over what is there
        return image + (value - image) * torch.sigmoid(-distance / 0.12)        # edge: 0.5 mm

    # Nobody is symmetric: the grid is bent by 0.25 mm. Sizes vary by some 10 %.
    x, y = x + 0.25 * noise(5) + 0.02 * z * draw(-1, 1), y + 0.25 * noise(5)
    side = x.abs()
    stature = draw(0.90, 1.08) + 0.04 * torch.cos(z / 20 + draw(0, 6))     # thicker at some levels
    wide, deep = stature * draw(6.2, 7.5), stature * draw(3.9, 5.0)          # radii of the cord

    # Muscle with streaks of fat, darker than the cord; the vertebra, nearly black
    muscle, bone, csf = draw(0.3, 1.0), draw(0.05, 0.2), draw(1.6, 2.5)
    image = muscle * torch.exp(0.3 * noise(5) + 0.3 * noise(2))
    image = paint(bone, ellipse(x, y - deep - 11, 12, 8))
    # Canal: the three-cornered meeting of an arched front, two sides and a back like a rounded V,
    # 1 to 3 mm around the cord: bright CSF within a dark wall, crossed by grey nerve roots
    front = y - deep - draw(1.2, 3.2) + draw(0, 0.03) * side ** 2
    back = draw(0.4, 0.8) * (torch.hypot(x, torch.tensor(3.0)) - 3) - y - deep - draw(0.6, 1.4)
    canal = torch.logsumexp(torch.stack([front, back, side - draw(9, 12)]), 0)  # smooth maximum
    image = paint(bone, canal - draw(1, 2.5))
    image = paint(csf * (1 + 0.08 * noise(4)), canal)
    for top in (0.5 * deep, -0.5 * deep):
        root = stroke(side, y, 0.8 * wide, top, 1.4 * wide, 1.5 * top, 0.25)
        image = paint(csf * draw(0.6, 0.9), torch.maximum(root, canal))
    # Cord: white matter, not quite even; the butterfly of grey matter, 8 mm wide, 6 mm high,
    # brighter by 0.12 to 0.2 once blurred; in front of it a fissure, too narrow for pure CSF
    white, cord = 1 + 0.03 * noise(2), ellipse(x, y, wide, deep)
    image = paint(white, cord)
    w, h = stature * draw(3.6, 4.5), stature * draw(2.4, 3.4)
    ventral = stroke(side, y, 0.48 * w, 0.3 * h, 0.5 * w, 0.6 * h, stature * draw(0.6, 1.05))
    dorsal = stroke(side, y, 0.45 * w, 0.3 * h, w - 0.45, 0.45 - h, stature * draw(0.38, 0.52))
    bridge = stroke(x, y, -0.48 * w, 0.3 * h, 0.48 * w, 0.3 * h, draw(0.4, 0.6))
    grey = -torch.logsumexp(torch.stack([-6 * ventral, -6 * dorsal, -6 * bridge]), 0) / 6  # union
    image = paint(white + draw(0.16, 0.28), grey)
    image = paint(draw(1, 1.5), stroke(x, y, 0, 0.5 * deep, 0, 1.2 * deep, 0.1))
    return image, cord, grey


def phantom_subject(site, generator):
    """Paint one subject. -> image (Z, Y, X) int16, four raters' masks (4, Z, Y, X) uint8.

    x to the right, y to the front; masks as in the challenge: 0, 1 grey matter, 2 white matter.
    """
    def draw(low, high):                                 # once for the subject
        return low + (high - low) * torch.rand((), generator=generator).item()

    def noise(length):                                   # (Z, Y, X) std 1, smooth over that length
        cells = max(2, round(site.size * site.mm / length) + 1)
        corners = torch.randn(2, 1, cells, cells, generator=generator) / 0.85
        one, two = F.interpolate(corners, [site.size] * 2, mode="bicubic", align_corners=True)
        return one * torch.cos(z / 60) + two * torch.sin(z / 60)       # another one after 10 cm

    # Everybody lies differently: a few mm off centre (the demo's crop is 16 mm wide), turned
    count = int(torch.randint(site.slices[0], site.slices[1] + 1, (), generator=generator))
    z = (torch.arange(count).view(-1, 1, 1) - count / 2) * site.thick
    axis = (torch.arange(site.size) - (site.size - 1) / 2) * site.mm
    y, x = torch.meshgrid(axis - draw(-2.5, 2.5), axis - draw(-2.5, 2.5), indexing="ij")
    tilt = math.radians(draw(-15, 15))
    x, y = x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)
    image, cord, grey = paint_cord(x, y, z, draw, noise)

    # Scanner: a coil that is brighter nearby; it measures the image's frequencies up to those of
    # voxels of 0.5 to 0.75 mm (that blurs, and rings a little), with noise, in both components
    image = image * torch.exp(0.1 * noise(50) - draw(0, 0.02) * y)
    frequency = torch.fft.fftfreq(site.size, site.mm).abs()                       # 1/mm
    seen = torch.sigmoid((0.5 / draw(0.4, 0.9) - frequency) / 0.08)
    seen = seen[:, None] * seen
    std = draw(0.015, 0.07) / seen.square().mean().sqrt()
    echo = torch.randn(image.shape, generator=generator, dtype=torch.complex64) * 2 ** 0.5 * std
    image = torch.fft.ifft2(torch.fft.fft2(image + echo) * seen).abs()
    masks = torch.zeros(4, *image.shape, dtype=torch.uint8)
    for mask in masks:                                   # raters differ, by one smooth error each
        error = 0.175 * noise(2.5)                       # so two agree to a Dice of about 0.82
        mask[cord + error < 0] = 2
        mask[grey + error < 0] = 1
    black = (0, 0, 0, 0, site.black, site.black)
    return F.pad((image * site.unit).round().short(), black), F.pad(masks, black)


def phantom_folder():
    """Where the phantom is kept between runs: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mean_teacher_seg" / "phantom-2"


def write_phantom(folder, seed=0, sites=SITES, subjects=20):
    """Write the phantom as NIfTI below a new folder, which appears only when it is complete.

    subjects: per site, the first half of them with masks. The same seed writes the same voxels.
    InputError if the folder is there already.
    """
    folder = Path(folder)
    require(not folder.exists(), f"{folder}: is there already; delete it or name another folder")
    print(f"writing the phantom, once, to {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
        for (s, site), subject in itertools.product(enumerate(sites, 1), range(1, subjects + 1)):
            generator = torch.Generator().manual_seed(10000 * seed + 100 * s + subject)
            image, masks = phantom_subject(site, generator)
            raters = range(1, 5) if subject <= subjects // 2 else []
            files = {"image": image, **{f"mask-r{r}": masks[r - 1] for r in raters}}
            for name, voxels in files.items():
                affine = np.diag([site.mm, site.mm, site.thick, 1])
                nifti = nib.Nifti1Image(voxels.permute(2, 1, 0).numpy(), affine)
                nifti = nifti.as_reoriented(nib.orientations.axcodes2ornt(site.axes))
                nib.save(nifti, f"{unfinished}/site{s}-sc{subject:02d}-{name}.nii.gz")
        os.chmod(unfinished, 0o755)
        if not folder.exists():                          # another process may have been faster
            os.rename(unfinished, folder)


# --- 13. Command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for any other bad input."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv):
    """Turn the command line into a Config, every field of which is an option. -> it, overwrite."""
    demo = {key: value for key, value in vars(DEMO).items() if value != getattr(Config, key)}
    parser = Parser(
        usage="%(prog)s [options]\n       %(prog)s predict --help", description="The paper's "
        "experiment: 1600 epochs x 10 steps supervised, 350 x 10 of the mean teacher, with its 86 "
        "training slices. [Defaults] are the paper's, (authors) and (here) where it is silent.",
        epilog=f"--preset demo, 30 epochs x 23 steps of both on the phantom: {demo}.")
    parser.add_argument("--preset", choices=["paper", "demo"], help="[--data: paper; else demo]")
    parser.add_argument("--overwrite", action="store_true", help="train anew what is in --out")
    for field in dataclasses.fields(Config):
        several = isinstance(field.default, tuple)
        default = field.default if several else (field.default,)
        parser.add_argument(
            "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
            nargs="+" if several else None, type=type(default[0]) if default else str,
            choices=field.metadata["choices"],
            help=f"{field.metadata['help']} [{' '.join(map(str, default))}]")
    given = {key: tuple(value) if isinstance(value, list) else value
             for key, value in vars(parser.parse_args(argv)).items()}
    overwrite = given.pop("overwrite")
    preset = given.pop("preset") or ("paper" if given.get("data") else "demo")
    config = dataclasses.replace(DEMO if preset == "demo" else Config(), **given)
    for field in dataclasses.fields(Config):
        values, (least, most) = getattr(config, field.name), field.metadata["range"]
        for value in values if isinstance(values, tuple) else (values,):
            require(isinstance(value, str) or least <= value <= most,            # nor is NaN
                    f"--{field.name.replace('_', '-')} {value}: is not in {least:g} to {most:g}")
    require(config.crop % 8 == 0, f"--crop {config.crop}: is not a multiple of 8")
    require(len(config.split) == 3, f"--split {config.split}: expected three numbers, as 2 2 3")
    require(max(len(config.epochs), len(config.weight_decay)) < 3,
            "--epochs and --weight-decay: expected one number, or two for the two methods")
    name = Path(config.data).resolve().name if config.data else "phantom"
    return dataclasses.replace(config, out=config.out or f"runs/{preset}-{name}"), overwrite


def main(argv=None):
    """Run a command line (default: the program's own). -> as experiment or predict.

    SystemExit 2 with one line `error: ...` for bad input, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["predict"]:
            return predict(argv[1:])
        return experiment(*parse(argv))
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; training goes on with the same command, without --overwrite")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
