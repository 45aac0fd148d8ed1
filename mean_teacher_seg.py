# SPDX-License-Identifier: MIT
"""Mean-teacher semi-supervised segmentation in one file.

The method of C. S. Perone and J. Cohen-Adad, "Deep semi-supervised segmentation with
weight-averaged consistency targets", DLMIA 2018, arXiv:1807.04657. The paper segments the grey
matter of the spinal cord, one foreground class, in slices of MRI. A student network f(theta)
learns from a few slices with masks. The weights of the teacher f(theta') are the exponential
moving average of the student's. On every slice the student is trained to agree with the teacher.
In the following, g(x; phi) is the image x, resampled by the affine transformation phi.

    Algorithm 1, as section 5 of this file implements it
     1  for each mini-batch of slices x, the labelled ones with masks y
     2      draw phi, a small transformation for every slice
     3      z  = f(theta, g(x; phi) + noise)          student: transformed BEFORE its forward pass
     4      z~ = g(f(theta', x + other noise); phi)   teacher: the same phi AFTER it, "delayed"
     5      L  = -Dice(z, g(y; phi))                  labelled slices only            (eq. 3)
     6      C  = BCE(z, z~)                           labelled and unlabelled slices  (eq. 2)
     7      loss = L + w C                            w ramps up
     8      update theta with Adam                    no gradient goes through the teacher
     9      t  = t + 1
    10      theta' = alpha theta' + (1 - alpha) theta (eq. 1)

The method is sections 1 to 5 of this file: 1 U-Net, 2 losses, 3 delayed augmentation, 4 teacher
and ramps, 5 training step. Copied into your own code, they need only copy, math and torch. The
program around it: 6 configuration, 7 data, 8 metrics, 9 training loop, 10 experiment, 11 predict,
12 phantom, 13 command line. "Section 4" means this file, "paper, section 2.1" the paper, and
"authors" the first author's public code (section 6), used where the paper is silent.

    python mean_teacher_seg.py                   demo on a synthetic phantom, minutes on a CPU
    python mean_teacher_seg.py --data DIR        your scans, the paper's settings; needs a GPU
    python mean_teacher_seg.py --data DIR --preset demo --spacing 1 --crop 96    on a CPU, the
                                                 central 96 mm x 96 mm of each slice
    python mean_teacher_seg.py predict SCAN.nii.gz --checkpoint RUN.pt --output MASK.nii.gz
    torchrun --nproc-per-node 8 mean_teacher_seg.py --data DIR --runs 10         many GPUs

The gain is small: with 2 labelled subjects, on real MRI, some two points of Dice (README.md).
"""
import argparse
import copy
import csv
import dataclasses
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib.style
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn


# --- 1. U-Net ------------------------------------------------------------------------------------
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
        c = width                                        # channels of the first block
        self.down = nn.ModuleList([conv_block(1, c, dropout),
                                   conv_block(c, 2 * c, dropout),
                                   conv_block(2 * c, 4 * c, dropout)])
        self.bottom = conv_block(4 * c, 4 * c, dropout)
        self.up = nn.ModuleList([conv_block(4 * c + 4 * c, 4 * c, dropout),
                                 conv_block(4 * c + 2 * c, 2 * c, dropout),
                                 conv_block(2 * c + c, c, dropout)])
        self.out = nn.Conv2d(c, 1, kernel_size=3, padding=1)

    def forward(self, x):
        if x.shape[-2] % 8 or x.shape[-1] % 8:
            raise ValueError(f"height and width must be multiples of 8 (three times halved), "
                             f"got {x.shape[-2]} x {x.shape[-1]}: crop or pad the image")
        skips = []
        for block in self.down:
            skips.append(block(x))                       # (B, c, H, W), (B, 2c, H/2, W/2), ...
            x = F.max_pool2d(skips[-1], 2)
        x = self.bottom(x)                               # (B, 4c, H/8, W/8)
        for block, skip in zip(self.up, reversed(skips)):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        # Logits, not probabilities: the BCE of logits is stable where log(sigmoid) is not.
        return self.out(x)                               # (B, 1, H, W)


# --- 2. Losses -----------------------------------------------------------------------------------

def dice_loss(probabilities, masks):
    """Negative Dice coefficient over the whole mini-batch, in [-1, 0].

    probabilities (B, 1, H, W) in [0, 1], masks of the same shape in {0, 1} -> float32 scalar.
    Raises ValueError for different shapes, which would broadcast to a wrong value.
    Source: paper, eq. 3; the smoothing term is the authors'.
    """
    if probabilities.shape != masks.shape:
        raise ValueError(f"probabilities and masks must have the same shape, got "
                         f"{tuple(probabilities.shape)} and {tuple(masks.shape)}")
    # L(theta) = - 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i), i over all pixels of all slices.
    # One ratio per batch, not the mean of one ratio per slice: in a slice with little grey matter
    # a single pixel would change the ratio a lot. Class weights are not needed: a background pixel
    # (some 99.7 % of all, estimated from Table 1) with p near 0 adds almost nothing to the sums.
    p, y = probabilities.float(), masks.float()
    smooth = 1e-4                                        # no 0 / 0 without any foreground
    return -(2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth)


def consistency_loss(student_logits, teacher_probabilities, valid=None):
    """Mean pixel-wise cross-entropy between the teacher's and the student's prediction.

    student_logits (B, 1, H, W), teacher_probabilities of the same shape in [0, 1], valid: bool
    of the same shape, the pixels that count (None: all) -> float32 scalar >= 0; 0 if none counts.
    Raises ValueError for different shapes. Source: paper, eq. 2, with its sign corrected.
    """
    for other in (teacher_probabilities, valid):
        if other is not None and other.shape != student_logits.shape:
            raise ValueError(f"student_logits, teacher_probabilities and valid must have the same "
                             f"shape, got {tuple(student_logits.shape)} and {tuple(other.shape)}")
    # C(theta) = E[ -y log p - (1-y) log(1-p) ], p the student's and y the teacher's prediction.
    # Eq. 2 prints "-y log p + (1-y) log(1-p)". That has no minimum: at y = 0 it is log(1-p), which
    # falls without bound as p goes to 1, the opposite of what the teacher says.
    # The value has a floor: at p = y it is the teacher's entropy, not 0. Where the teacher says
    # 0.5, a pixel costs at least 0.693 (ln 2), even if the student agrees. The gradient with
    # respect to the logit, p - y, is 0 at p = y.
    y = teacher_probabilities.float()
    distance = F.binary_cross_entropy_with_logits(student_logits.float(), y, reduction="none")
    if valid is None:
        return distance.mean()
    return (distance * valid).sum() / valid.sum().clamp(min=1)


# --- 3. Delayed augmentation ---------------------------------------------------------------------
# If the student's input is rotated, its prediction is rotated too. The teacher predicts from the
# unrotated slice, so pixel by pixel the two predictions do not line up (paper, section 2.1).
# Giving both networks the same rotated slice lines them up, but then they do not have to agree on
# two different views of one cord. So the student's INPUT and the teacher's OUTPUT are warped, by
# the same phi. No gradient flows through the teacher: its output is a constant target, like a
# mask, and can be warped like one.
# Erratum: Algorithm 1 in the paper prints the teacher's prediction as f(theta', g(x; phi')): its
# input would be warped, by another phi'. The text of section 2.1 warps its output, and this file
# follows the text. The teacher is perturbed only by its own noise (and Dropout).

def sample_affine(n, degrees, translation=0.0, scale=0.0, device=None):
    """Draw n random affine transformations phi, uniform in the given ranges.

    degrees: rotation in +- degrees; translation: +- px along both axes; scale: 1 +- scale.
    -> phi (n, 2, 3) float32. It maps coordinates in the result (x to the right, y down, px from
    the image's centre) to coordinates in the input. Source: paper, sections 2.1 and 3.1.
    """
    def uniform(limit):
        return torch.empty(n, device=device).uniform_(-limit, limit)

    angle, zoom = torch.deg2rad(uniform(degrees)), 1 + uniform(scale)
    # phi maps output to input, so the zoom divides: a zoom above 1 enlarges the picture.
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = torch.stack([cos, -sin, uniform(translation), sin, cos, uniform(translation)], dim=1)
    return rows.view(n, 2, 3)


def warp(images, phi):
    """g(.; phi): resample images, masks or probabilities by an affine transformation.

    images (B, C, H, W) float, phi (B, 2, 3) in px as from sample_affine -> (B, C, H, W), float32.
    Bilinear, 0 outside the image. Threshold a warped mask at 0.5. affine_grid refuses volumes
    (B, C, D, H, W) with a ValueError. Source: paper, section 2.1.
    """
    height, width = images.shape[-2:]
    # affine_grid uses coordinates from -1 to 1 along each side, whatever its length. Convert px;
    # without it, a rotation would shear an image that is not square.
    matrix = phi.clone()
    matrix[:, 0, 1] *= height / width
    matrix[:, 1, 0] *= width / height
    matrix[:, 0, 2] *= 2 / width
    matrix[:, 1, 2] *= 2 / height
    # Never in bfloat16: its 8 significant bits are too few for a position among 200 px.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrix, images.shape, align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros",
                             align_corners=False)


def augment(images, phi, noise=0.1):
    """What the student sees: g(x; phi) + noise.

    images (B, C, H, W) float32, phi (B, 2, 3) in px, noise: its std in the unit of the images ->
    augmented (B, C, H, W) float32; inside (B, 1, H, W) bool, False for pixels that phi takes from
    outside the image: they have no target. Source: paper, section 2.1.
    """
    # Warp a channel of ones too: it drops below 1 where phi samples outside the image.
    ones = torch.ones_like(images[:, :1])
    warped = warp(torch.cat([images, ones], dim=1), phi)         # (B, C + 1, H, W)
    inside = warped[:, -1:] > 0.999
    # The noise comes after the warp. Interpolation would average it over neighbouring pixels: a
    # std of 0.1 would shrink to 0.067, on average, and the student would see less noise than the
    # teacher.
    return warped[:, :-1] + noise * torch.randn_like(images), inside


@torch.no_grad()
def delayed_targets(teacher, images, phi, noise=0.1):
    """The student's targets: the teacher's prediction of the unwarped slice, warped afterwards.

    teacher: maps (B, C, H, W) to logits (B, 1, H, W); images, phi, noise: the same as for augment
    -> probabilities (B, 1, H, W) float32 in [0, 1], on the student's grid, without gradient.
    Source: paper, section 2.1.
    """
    probabilities = torch.sigmoid(teacher(images + noise * torch.randn_like(images)).float())
    return warp(probabilities, phi)


# --- 4. Teacher and ramps ------------------------------------------------------------------------

def make_teacher(student):
    """A copy of the student that gets no gradient. Any nn.Module -> the same type.

    Each layer keeps its mode: one that is frozen in eval mode stays frozen. The authors start the
    teacher with random weights of its own; until the average has forgotten these weights, the
    targets are noise. Raises ValueError for parameters in half precision.
    Source: paper, section 2.
    """
    for name, parameter in student.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}, in which (1 - alpha) theta is rounded "
                             "away and the teacher never moves: keep the parameters in float32, "
                             "and use torch.autocast for speed")
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(student, teacher, alpha):
    """theta' <- alpha theta' + (1 - alpha) theta, in place. alpha in [0, 1]. Source: paper, eq. 1.
    """
    # BatchNorm's running mean and variance are buffers, not parameters, and are NOT averaged. They
    # need not be: the teacher runs in train mode on every batch (with Dropout, too) and so keeps
    # running statistics of its own activations. A teacher in eval mode would keep the buffers that
    # it was copied with, at mean 0 and variance 1 in a new network. If you need one, copy the
    # student's buffers here as well, and remove the check in train_step.
    for theta_teacher, theta in zip(teacher.parameters(), student.parameters(), strict=True):
        theta_teacher.lerp_(theta, 1 - alpha)


def ramp_up(epoch, length):
    """Sigmoid-shaped ramp exp(-5 (1 - epoch / length)^2), from about 0 to 1; 1 from then on.

    epoch: counted from 1; length in epochs, 0: no ramp. -> float in (0, 1]. Source: paper, section
    3.1 names the ramps; the shape is that of the first mean teacher (Tarvainen & Valpola 2017).
    """
    return math.exp(-5 * (1 - min(epoch / length, 1)) ** 2) if length else 1.0


def learning_rate_factor(epoch, epochs, ramp):
    """Ramp-up over the first `ramp` epochs, then half a cosine down to 0 in the last one.

    epoch: counted from 1. -> float in [0, 1], multiplies eta. In the last epoch it is 0: the
    student's weights no longer change, the teacher's still do. Source: paper, section 3.1.
    """
    # In a training of one epoch, the last is also the first: no decay.
    if epoch <= ramp or epochs == 1:
        return ramp_up(epoch, ramp)
    return 0.5 * (1 + math.cos(math.pi * (epoch - ramp) / (epochs - ramp)))


# --- 5. One training step = Algorithm 1 ----------------------------------------------------------

def train_step(student, teacher, optimizer, images, masks, unlabelled, step, weight=2.9,
               alpha=0.99, affine=(4.5, 0.0, 0.0), noise=0.1, amp=False,
               targets_of=delayed_targets, consistency=consistency_loss):
    """One step of Algorithm 1. The networks map (B, C, H, W) to logits (B, 1, H, W).

    teacher: None for the supervised baseline, which ignores unlabelled
    images: (B, C, H, W) float32, z-scored; masks: (B, 1, H, W) in [0, 1], foreground from 0.5
    unlabelled: (U, C, H, W); U may be 0
    step: number of steps before this one; weight: w; alpha: the upper limit of line 10's alpha
    affine: degrees, translation in px, scale, for sample_affine; noise: its std
    amp: bfloat16 autocast; targets_of, consistency: to try other targets or another loss
    -> dict of float32 scalars: loss, dice_loss, consistency_loss. ValueError for a network in
    eval mode and for masks outside [0, 1]. The caller counts step, ramps weight, and sets alpha
    and the learning rate. Use alpha 0.95 in trainings of fewer than some 1000 steps.
    """
    if not (student.training and (teacher is None or teacher.training)):
        raise ValueError("student and teacher must be in train mode, see update_teacher: call "
                         ".train() on both after an evaluation, then .eval() on frozen layers")
    if not (masks.min() >= 0 and masks.max() <= 1):
        raise ValueError(f"masks must be in [0, 1], got {masks.min():g} to {masks.max():g}: make "
                         "them binary, for example (masks == 1).float()")
    # Labelled and unlabelled slices go through the networks separately, as in the authors' code.
    # In one pass, BatchNorm would mix both, and unlabelled slices would change the supervised
    # gradient even at w = 0. In two, a step with w = 0 gives the student the same weights as a
    # supervised one with the same random draws. (Only running statistics then see both kinds.)
    parts = [images]
    if teacher is not None and len(unlabelled):
        parts.append(unlabelled)
    phis, logits, targets, inside = [], [], [], []
    for x in parts:
        phi = sample_affine(len(x), *affine, device=x.device)                         # line 2
        view, has_target = augment(x, phi, noise)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            logits.append(student(view))                                              # line 3
            if teacher is not None:
                targets.append(targets_of(teacher, x, phi, noise))                    # line 4
        phis.append(phi)
        inside.append(has_target)
    warped_masks = (warp(masks, phis[0]) >= 0.5).float()
    loss_dice = dice_loss(torch.sigmoid(logits[0].float()), warped_masks)             # line 5
    loss_consistency = torch.zeros_like(loss_dice)
    if teacher is not None:
        # Pixels from outside the image have no target and are ignored. (The Dice loss does not
        # need this: there the mask is 0, and the student soon predicts 0.)
        loss_consistency = consistency(                                               # line 6
            torch.cat(logits), torch.cat(targets), torch.cat(inside))
    loss = loss_dice + weight * loss_consistency                                      # line 7
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()                                                                  # line 8
    t = step + 1                                                                      # line 9
    if teacher is not None:
        # At first the teacher is the plain mean of all students: line 10's alpha is 1/2, 2/3, ...
        # for t = 1, 2, ... (authors), and 0.99 only at t = 99. A constant 0.99 would keep the
        # random first weights in the teacher for some 100 steps. In the paper the limit becomes
        # 0.999 at t = 501, where 1 - 1/(t + 1) is 0.998; the limit is reached at t = 999.
        update_teacher(student, teacher, min(1 - 1 / (t + 1), alpha))                 # line 10
    return {"loss": loss.detach(),
            "dice_loss": loss_dice.detach(),
            "consistency_loss": loss_consistency.detach()}


# --- 6. Configuration ----------------------------------------------------------------------------
# The method ends here. The rest of the file is what it takes to run it.
# Every default is the paper's (its section 3.1), except where the text says "authors" or "here".
# authors: the paper is silent, the value is from the first author's public code for these data
# (github.com/perone/medicaltorch) or for the follow-up study with the same settings
# (github.com/neuropoly/domainadaptation). The paper's own training code was never published.
# here: our choice. Every field is an option of the command line.

METHODS = ("supervised", "no_consistency", "mean_teacher")
# Settings are at least 0, except for these:
MINIMUM = {"runs": 1, "spacing": 0.02, "crop": 16, "label": 1, "split_seed": -1, "width": 1,
           "epochs": 1, "batch": 1, "lr": 1e-9, "validate_every": 1}
MAXIMUM = {"crop": 2048, "width": 1024, "dropout": 1, "alpha": 1, "alpha_late": 1,
           "confidence": 1, "scale": 0.9, "threshold": 1}
CHOICES = {"method": METHODS, "rater": tuple("1234"), "negative_slices": ("drop", "keep"),
           "consistency": ("bce", "mse"), "augmentation": ("delayed", "same")}


class InputError(Exception):
    """Bad input. The text says where, what is wrong, what was expected and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's experiment. dataclasses.replace() makes a variant of it.

    Each comment beside a setting is also the text of its option in --help.
    """
    # What to run

    data: str = ""               # folder of scans, SCGM, BIDS or Decathlon; if not given, the
                                 # phantom
    out: str = ""                # folder for the results; if not given, runs/PRESET-DATA
    method: tuple = METHODS      # supervised: on the masks alone; mean_teacher: the paper's;
                                 # no_consistency: the same with w = 0 (here)
    runs: int = 1                # runs per method, seeds SEED, SEED + 1, ... (here; paper: 10)
    seed: int = 0                # seed of the first run: weights, batches, augmentation
    device: str = "auto"         # cuda, mps, cpu or auto

    # Data: 8 training, 8 validation, 12 test subjects, 40 unlabelled

    spacing: float = 0.25        # in-plane pixel size after resampling, mm
    crop: int = 200              # side of the centre crop, px, a multiple of 8 (authors)
    label: tuple = (1,)          # mask values that are foreground (authors: 1, grey matter)
    rater: str = "4"             # SCGM: rater of the masks (authors)
    contrast: tuple = ("T2star", "T2starw")      # BIDS: images are NAME_ + one of these (here)
    mask_name: tuple = ("gmseg", "label-GM")     # BIDS: masks are named as their image, with or
                                 # without _CONTRAST, + _ + one of these + anything (here)
    visit: str = r"_(ses|run)-[A-Za-z0-9]+|Ses\d+|_frame\d+"      # regular expression: what is
                                 # removed from a subject's name (BIDS: its folder; Decathlon: the
                                 # scan) to get the individual, whose scans are in one set (here)
    negative_slices: str = "drop"                # training slices without foreground; keep: if
                                 # similar tissue continues beyond the structure (here)
    split: tuple = (2, 2, 3)     # subjects per site (BIDS, Decathlon: one site) to train,
                                 # validate and test, drawn at random
    split_seed: int = 0          # seed of the random split; -1: each run's own seed
    train: tuple = ()            # training subjects by name, instead of --split
    val: tuple = ()              # validation subjects by name; may stay empty
    test: tuple = ()             # test subjects by name; may stay empty: then there is no test

    # Network

    width: int = 64              # channels of the first block (authors)
    dropout: float = 0.5         # rate of Dropout2d after every block convolution

    # Optimisation. Pairs are (supervised, both methods with a teacher); one number is for all.

    epochs: tuple = (1600, 350)  # number of epochs: supervised, with a teacher
    steps: int = 0               # steps of the whole training, split evenly over the epochs; 0:
                                 # an epoch is one pass over the labelled slices, in whole batches
    batch: int = 8               # labelled slices in a mini-batch
    unlabelled_batch: int = 8    # unlabelled slices in a mini-batch (authors); 0: none
    lr: float = 6e-4             # eta, Adam's peak learning rate
    lr_ramp: int = 50            # epochs of learning-rate ramp-up, before the cosine
    weight_decay: tuple = (8e-4, 6e-4)           # lambda, L2 penalty inside Adam, as --epochs

    # Mean teacher. The Dice gradient of one pixel is about 1 / (foreground pixels), the
    # consistency gradient w / (all pixels). The second divided by the first is w times the
    # foreground's share of the image, which is about 0.3 % in the paper (estimated from Table 1).
    # Where it is larger, the same w is stronger: tune w on validation subjects.

    consistency_weight: float = 2.9              # w, weight of the consistency loss after its ramp
    consistency_ramp: int = 100  # epochs of the ramp-up of w
    alpha: float = 0.99          # EMA decay at first: a memory of 1/(1-alpha) steps
    alpha_late: float = 0.999    # EMA decay later, when the student changes slowly
    alpha_epochs: int = 50       # epochs with --alpha, before --alpha-late
    consistency: str = "bce"     # loss between student and teacher; mse was worse (paper, section
                                 # 2)
    augmentation: str = "delayed"                # delayed: warp the teacher's output; same: warp
                                 # its input, as the student's (paper, section 2.1)
    confidence: float = 0.0      # ignore pixels where the teacher's max(y, 1-y) is below this (up
                                 # to 0.5: none); did not help (paper, section 2)

    # Augmentation

    degrees: float = 4.5         # rotation, uniform in +- this many degrees
    translation: float = 0.0     # translation, uniform in +- this many px (here)
    scale: float = 0.0           # scale, uniform in 1 +- this (here)
    noise: float = 0.1           # std of the added Gaussian noise; the paper's variance is 0.01

    # Evaluation

    threshold: float = 0.5       # probability above which a pixel is foreground (here)
    validate_every: int = 10     # epochs between two validations and checkpoints (here)

    def __post_init__(self):
        """InputError if a value is out of its range, or if values do not fit each other."""
        for name, values in vars(self).items():
            least = MINIMUM.get(name, 0)
            most = MAXIMUM.get(name, 1e9)
            for value in values if isinstance(values, tuple) else (values,):
                option = f"--{name.replace('_', '-')} {value}"
                choices = CHOICES.get(name, [value])
                # NaN is refused as well: no comparison with it is true.
                require(isinstance(value, str) or least <= value <= most,
                        f"{option}: must be {least:g} to {most:g}")
                require(value in choices, f"{option}: choose from {choices}")
        require(self.crop % 8 == 0, f"--crop {self.crop}: must be a multiple of 8")
        require(len(self.split) == 3, f"--split {self.split}: expected three numbers")
        require(max(len(self.epochs), len(self.weight_decay)) < 3,
                "--epochs and --weight-decay: expected one number, or two (see --help)")
        try:
            re.compile(self.visit)
        except re.error as error:
            raise InputError(f"--visit {self.visit}: not a regular expression ({error})") from None


# DEMO is small enough for two CPU cores. All values that it does not name are Config's. Dropout,
# lr, weight decay and steps were tuned for the supervised network alone, on validation subjects of
# other phantoms; then w for the mean teacher, which stayed 2.9.
DEMO = Config(
    crop=64,                                             # 16 mm: all grey matter of the phantom
    split=(1, 2, 3),                                     # few labels, where the method helps most
    width=8, dropout=0.05,
    epochs=(30,), steps=700,
    batch=4, unlabelled_batch=4,                         # more steps in the same time
    lr=3e-3, lr_ramp=3, weight_decay=(2e-3,),            # a narrow network tolerates a higher lr
    consistency_ramp=30, alpha=0.95, alpha_late=0.99, alpha_epochs=8,    # memory: 20, 100 steps
    degrees=20.0, translation=3.0, scale=0.1, noise=0.2,  # stronger: there are few subjects
    validate_every=5)


# --- 7. Data -------------------------------------------------------------------------------------
# Three layouts of files: SCGM, the Spinal Cord Grey Matter challenge, whose data the paper uses;
# BIDS and the Medical Segmentation Decathlon, two common ones. find_scans() describes them.
# Volumes become axial slices: rows run from anterior to posterior, columns from the subject's left
# to the right (neurological convention). All slices are on the device before the first step.

noted = set()


def note_once(text, example):
    """Print a note for the first of many files that need it."""
    if text not in noted:
        print(f"note: {text}; for example {example}")
        noted.add(text)


class Scan(NamedTuple):
    site: str                                            # SCGM: "site1"; other layouts: ""
    subject: str                                         # "site1-sc01"; BIDS: "sub-9709Ses1"
    name: str                                            # BIDS: "sub-9709Ses1_run-1_T2starw"
    image: Path
    masks: dict                                          # name -> Path; {}: unlabelled


class Slices(NamedTuple):
    images: torch.Tensor                                 # (N, 1, H, W) float32, z-scored per slice
    masks: torch.Tensor                                  # as images, in {0, 1}; unlabelled: none
    where: list                                          # N times (site, scan, slice from below)
    checksums: dict                                      # scan -> SHA-256 of its files' content


def list_nifti(folder):
    """All NIfTI files below a folder. -> dict: folder below it -> name without ending -> Path

    Follows links, skips hidden files. A broken link to a file is listed: reading it reports its
    name. A broken link to a folder is an InputError: its scans would be missed.
    """
    def stop(error):
        raise error

    tree = {}
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files = {}
        for name in sorted(names):
            path = Path(parent, name)
            # os.walk lists a broken link among the files. Without a dot in its name, it probably
            # leads to a folder.
            require("." in name or path.exists(), f"{path}: is a broken link; mend or remove it")
            match = re.fullmatch(r"(?is)([^.].*)\.nii(\.gz)?", name)
            if match:
                require(match[1] not in files, f"{path}: is there as .nii and as .nii.gz")
                files[match[1]] = path
        tree[Path(parent).relative_to(folder).as_posix()] = files
    return tree


def find_masks(tree, folder, patterns, image):
    """The files in one folder of the tree whose names match. -> dict: name -> Path

    patterns: regular expressions, the preferred one first. Prints a note if several files match,
    or if there are files but none matches.
    """
    files = tree.get(folder, {})
    masks = {name: path for pattern in patterns for name, path in files.items()
             if re.fullmatch(pattern, name)}
    if len(masks) > 1:
        note_once("where several masks match --mask-name, the first is used", list(masks))
    if files and not masks:
        note_once("scans count as unlabelled if the folder of masks has no file with a matching "
                  "name (--mask-name, --rater)",
                  f"{image}; looked for {' or '.join(patterns)} in {folder}")
    return masks


def make_scan(tree, place, name, contrasts, mask_names, rater):
    """The Scan of an image, with its masks. See find_scans. None for a file that is not a scan."""
    image = tree[place][name]
    site = ""
    subject = name
    mask_folder = None                                   # unlabelled in any case
    patterns = [re.escape(name)]                         # of the mask's name
    scgm = re.fullmatch(r"((site\d)-sc(\d\d))-image", name)
    # ".*?": of the contrasts T1w and desc-x_T1w, the longer one matches sub-01_desc-x_T1w.
    bids = re.fullmatch(f"(.*?)_({'|'.join(map(re.escape, contrasts))})", name)
    if scgm:
        name, site, number = scgm.groups()
        subject = name
        patterns = [f"{name}-mask-r{rater}"]
        # sc11 to sc20 are the challenge's test half.
        if int(number) <= 10:
            mask_folder = place
    elif place == "imagesTr":
        mask_folder = "labelsTr"
    elif bids and re.fullmatch("sub-[^/]+/(.+/)?anat", place):
        stem, suffix = bids.groups()
        # Only magnitude images, and nothing that was derived from an image
        if re.search("_(part-phase|part-real|part-imag|desc-|label-|space-)", stem):
            note_once("derived and non-magnitude images are left out; name them in --contrast to "
                      "use them, as desc-preproc_T1w", name)
            return None
        subject = place.split("/")[0]
        mask_folder = f"derivatives/labels/{place}"
        # The image's name, with or without its suffix, then the mask's name, then anything
        start = f"{re.escape(stem)}(_{re.escape(suffix)})?_"
        patterns = [f"{start}{re.escape(mask_name)}.*" for mask_name in mask_names]
    elif place != "imagesTs":
        return None
    masks = find_masks(tree, mask_folder, patterns, image)
    return Scan(site, subject, name, image, masks)


def find_scans(folder, contrasts=Config.contrast, mask_names=Config.mask_name, rater=Config.rater):
    """List the scans below a folder. -> list of Scan; InputError if none.

    Three layouts, with .nii.gz or .nii (* stands for anything, ** for any folders):
    SCGM: **/siteS-scNN-image, its mask siteS-scNN-mask-rRATER beside it.
    BIDS: sub-*/**/anat/*_CONTRAST, one of contrasts; the mask in derivatives/labels/ + the same
    folder, named as the image, with or without _CONTRAST, + _ + one of mask_names + anything.
    Decathlon: imagesTr/NAME and imagesTs/NAME, the mask labelsTr/NAME.
    """
    require(Path(folder).is_dir(), f"{folder}: no such folder; give that of your scans to --data")
    tree = list_nifti(folder)
    scans = {}
    for place, files in tree.items():
        for name, path in files.items():
            scan = make_scan(tree, place, name, contrasts, mask_names, rater)
            if scan:
                require(scan.name not in scans,
                        f"{path}: another scan has the name {scan.name}; rename one")
                scans[scan.name] = scan
    require(scans, f"{folder}: no scans found; expected site*-sc*-image.nii.gz, "
                   f"sub-*/**/anat/*_CONTRAST.nii.gz with CONTRAST {' or '.join(contrasts)} (see "
                   "--contrast), or imagesTr/*.nii.gz below it")
    return list(scans.values())


def individual(subject, config):
    """Several scans can be of one person: sub-9709Ses1 and sub-9709Ses2 are sub-9709."""
    return re.sub(config.visit, "", subject)


def assign_roles(scans, config):
    """What each individual is used for. -> dict: individual -> train, val or test

    Named by --train, --val and --test; if none is named, drawn at random from those with masks.
    InputError for wrong names or too few subjects.
    """
    site_of = {individual(scan.subject, config): scan.site for scan in scans if scan.masks}
    require(site_of, f"{config.data}: no scan has a mask; looked for NAME-mask-r{config.rater} "
                     "beside SCGM images, in derivatives/labels for the BIDS image's name + _ + "
                     f"{' or '.join(config.mask_name)} (--mask-name), and in labelsTr")
    roles = {}
    for role in ("train", "val", "test"):
        for subject in getattr(config, role):
            name = individual(subject, config)
            require(name in site_of, f"--{role} {subject}: there is no such subject with a mask")
            require(roles.setdefault(name, role) == role,
                    f"--{role} {subject}: is in --{roles[name]} as well; choose one")
    if roles:
        require("train" in roles.values(), "--val and --test need --train")
        return roles
    generator = np.random.default_rng(config.split_seed)
    n_train, n_val, n_test = config.split
    # Test subjects are drawn first, so that they do not depend on the number to train with.
    drawn = ["test"] * n_test + ["val"] * n_val + ["train"] * n_train
    for site in sorted(set(site_of.values())):
        names = sorted(name for name in site_of if site_of[name] == site)
        require(len(names) >= len(drawn),
                f"{len(names)} subjects with masks in {site or config.data}, too few for --split "
                f"{config.split} to train, validate and test; lower it")
        roles |= dict(zip(generator.permutation(names), drawn))
    return roles


def split_scans(scans, config):
    """Divide the scans into sets. -> dict of list of Scan: train, val, test, unlabelled.

    Every individual has one role, so that no other visit of a test subject is ever trained on.
    The unlabelled set: all scans without a mask, but not those of validation and test subjects;
    if there are none, the scans of individuals without a role.
    """
    roles = assign_roles(scans, config)
    sets = {"train": [], "val": [], "test": []}
    left = []
    for scan in scans:
        role = roles.get(individual(scan.subject, config))
        if role and scan.masks:
            sets[role].append(scan)
        elif role in ("train", None):
            left.append(scan)
    sets["unlabelled"] = [scan for scan in left if not scan.masks] or left
    return sets


def load_nifti(path, spacing):
    """Read a whole NIfTI file and check it. -> 3-D nibabel image, float32; SHA-256

    InputError if it cannot be used, also if its slices would be too large at `spacing` mm.
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            # This compares gzip's own checksum, which nibabel does not reach.
            content = gzip.decompress(content)
        # nibabel repairs some headers, and would print that on a line of its own.
        nib.imageglobals.logger.setLevel("CRITICAL")
        nifti2 = nib.Nifti2Header.may_contain_header(content[:540])
        image = (nib.Nifti2Image if nifti2 else nib.Nifti1Image).from_bytes(content)
        # (X, Y, Z, 1) is three-dimensional.
        image = nib.squeeze_image(image)
        shape = image.shape
        unit = image.header.get_xyzt_units()[0]
        require(np.isfinite(image.affine).all(),
                f"{path}: NaN or infinite values in its affine; correct its header")
        zooms = np.array(image.header.get_zooms())
        axes = nib.io_orientation(image.affine)[:, 0]
        # predict() copies the qform: an invalid one is found here.
        image.get_qform()
        dtype = image.get_data_dtype()
        require(dtype.kind in "biuf", f"{path}: {dtype} voxels, expected one real number each; "
                                      "convert it (complex: take the magnitude)")
        volume = image.get_fdata(dtype=np.float32)
        image = nib.Nifti1Image(volume, image.affine, image.header)
    except InputError:
        raise
    except Exception as error:
        # nibabel's readers raise a dozen types.
        raise InputError(f"{path}: cannot be read as NIfTI ({type(error).__name__}: {error}); "
                         "mend or convert it") from error
    require(len(shape) == 3 and volume.size, f"{path}: {shape} voxels, expected three "
                                             "dimensions; save one volume of it")
    require(np.isfinite(volume).all(), f"{path}: NaN or infinite voxels; replace them")
    require(unit in ("mm", "unknown"), f"{path}: voxel sizes in {unit}, expected mm; convert it")
    sizes = nib.affines.voxel_sizes(image.affine)
    require(min(sizes) > 0.01 and max(sizes) < 100 and np.allclose(sizes, zooms, rtol=0.02) and
            np.isfinite(axes).all(),
            f"{path}: implausible voxel sizes, {sizes.round(3)} mm by its affine and "
            f"{zooms.round(3)} mm by pixdim, or a singular affine; correct its header")
    side = (volume.shape * sizes)[axes < 2].max() / spacing
    require(side <= 8192, f"{path}: {side:.0f} px along a side at --spacing {spacing} mm, more "
                          "than 8192; check --spacing and the voxel sizes")
    return image, hashlib.sha256(content).hexdigest()


def read_mask(path, config, image):
    """The foreground of a scan. -> nibabel image in {0, 1} on the image's voxel grid; SHA-256

    InputError if the mask is on another grid or has values other than whole numbers. A corner may
    be off by a quarter of a voxel: published masks differ from their images in the header's fourth
    decimal.
    """
    stored, checksum = load_nifti(path, config.spacing)
    # Reorder the mask's axes to the image's. Turning each to RAS by its own affine would fail near
    # 45 degrees, where a rounding error decides which axis is closest.
    to_image = np.linalg.inv(image.affine)
    mask = stored.as_reoriented(nib.io_orientation(to_image @ stored.affine))
    require(image.shape in (stored.shape, mask.shape),
            f"{path}: is not on the grid of its image: {stored.shape} voxels, expected "
            f"{image.shape}; resample it")
    # The corners in voxels, and where the mask's lie
    corners = np.indices((2, 2, 2)).reshape(3, 8).T * image.shape - 0.5
    moved = nib.affines.apply_affine(to_image @ mask.affine, corners)
    require(mask.shape == image.shape and np.abs(moved - corners).max() <= 0.25,
            f"{path}: is not on the grid of its image: the affines in their headers differ; if "
            "the voxels fit, copy the image's header")
    values = mask.dataobj
    # Re-saved files can have rounding errors.
    rounded = np.rint(values)
    bad = np.abs(values - rounded) > 0.02
    require(not bad.any(), f"{path}: has values {np.unique(values[bad])[:4].round(3)}, expected "
                           "whole numbers; threshold or convert it")
    foreground = np.isin(rounded, config.label)
    if not foreground.any():
        print(f"warning: {path}: no voxel of --label {config.label}, its values are "
              f"{np.unique(rounded)[:8].astype(int)}")
    return nib.Nifti1Image(foreground.astype(np.float32), image.affine), checksum


def canonical(image, spacing):
    """Turn a nibabel image to RAS: axes to the right, to the front (anterior) and up (superior).

    -> its axial slices (Z, 1, Y, X) float32, from the front (anterior) to the back, not resampled;
    (height, width) in px that they have when resampled to `spacing` mm.
    """
    image = nib.as_closest_canonical(image)
    volume = image.get_fdata(dtype=np.float32)           # (X, Y, Z)
    slices = torch.from_numpy(volume[:, ::-1].T.copy())[:, None]
    voxel_mm = nib.affines.voxel_sizes(image.affine)
    if max(voxel_mm[:2]) > 1.5 * voxel_mm[2]:
        note_once("scans that are thickest along x or y are cut into axial slices, too",
                  f"voxels of {voxel_mm.round(2)} mm")
    width, height = np.rint(volume.shape[:2] * voxel_mm[:2] / spacing).astype(int).clip(1)
    return slices, (height, width)


def center_crop(slices, height, width):
    """Crop (N, 1, H, W) around its centre, or pad it with 0, to (N, 1, height, width).

    A second call with the old size removes the padding, or puts a crop back in its place.
    """
    taller = slices.shape[2] - height
    wider = slices.shape[3] - width
    # int(), not //, so that padding and cropping round alike
    top = int(taller / 2)
    left = int(wider / 2)
    # A negative padding crops.
    return F.pad(slices, (-left, left - wider, -top, top - taller))


def to_slices(image, config, z_score=True):
    """Axial slices of a nibabel image, resampled, cropped, z-scored. -> (Z, 1, crop, crop) float32

    Linear interpolation, antialiased when shrinking. Slices are processed one by one, because
    whole resampled volumes can be larger than the memory. z_score: not for masks. Padded with 0.
    Source: "resampled to 0.25 x 0.25 mm", paper, section 3.1.
    """
    stored, (height, width) = canonical(image, config.spacing)
    slices = []
    for plane in stored.split(1):                        # (1, 1, Y, X)
        plane = F.interpolate(plane, size=(height, width), mode="bilinear", antialias=True)
        slices.append(center_crop(plane, min(height, config.crop), min(width, config.crop)))
    slices = torch.cat(slices)
    if z_score:
        slices = normalise(slices)
    # This pads slices that are smaller than the crop.
    return center_crop(slices, config.crop, config.crop)


def normalise(slices):
    """Z-score each slice of (N, 1, H, W), since every scanner has its own intensity scale.

    Call this after the crop and before the padding: the zeros around a small image must not count
    in mean and std. A slice without contrast becomes 0. -> float32
    """
    # In float32, an offset of 10^4 would cost digits.
    slices = slices.double()
    std, mean = torch.std_mean(slices, (2, 3), correction=0, keepdim=True)
    largest = slices.abs().amax((2, 3), keepdim=True)
    # Contrast is more than rounding errors.
    has_contrast = std > 1e-6 * largest
    return torch.where(has_contrast, (slices - mean) / std, 0).float()


def read_scan(scan, config, role):
    """The slices of one scan, for the set `role` -> Slices. See load_data.

    Slices without contrast are dropped and, from a training scan, those without foreground (the
    paper's counts of slices fit that), unless --negative-slices keep. A labelled scan without any
    foreground is left out whole. The masks of an unlabelled scan are not even opened.
    """
    image, checksum = load_nifti(scan.image, config.spacing)
    images = to_slices(image, config)
    keep = images.flatten(1).any(1)
    masks = images[:0]
    if role != "unlabelled":
        path = next(iter(scan.masks.values()))
        mask, mask_checksum = read_mask(path, config, image)
        checksum += mask_checksum
        warn_if_cropped(path, mask, config)
        masks = (to_slices(mask, config, z_score=False) >= 0.5).float()
        positive = keep & masks.flatten(1).any(1)
        drop_negative = role == "train" and config.negative_slices == "drop"
        if drop_negative or not positive.any():
            keep = positive
        masks = masks[keep]
    if not keep.any():
        print(f"warning: {scan.image}: not used: no slice with contrast (and, in labelled scans, "
              "foreground) inside the crop")
    where = [(scan.site, scan.name, int(z)) for z in keep.nonzero()]
    return Slices(images[keep], masks, where, {scan.name: checksum})


def warn_if_cropped(path, mask, config):
    """Print a warning if more than 1 % of a mask's foreground is outside the centre crop."""
    slices, size = canonical(mask, config.spacing)
    # The crop in voxels
    height, width = [min(voxels, round(config.crop * voxels / px))
                     for voxels, px in zip(slices.shape[2:], size)]
    # NaN without any foreground
    outside = 1 - center_crop(slices, height, width).sum() / slices.sum()
    if outside > 0.01:
        print(f"warning: {path}: {outside:.0%} of the foreground is outside the centre crop "
              f"of {config.crop} px of {config.spacing} mm, and left out of all metrics; raise "
              "--crop")


def load_data(config, device="cpu"):
    """Read all that an experiment needs. -> dict of Slices: train, val, test, unlabelled.

    Validation and test sets keep their slices without foreground, for the Dice per scan.
    """
    folder = Path(config.data or phantom_folder())
    if not config.data and not folder.exists():
        write_phantom(folder)
    scans = find_scans(folder, config.contrast, config.mask_name, config.rater)
    print(f"{folder}: {len(scans)} scans, {sum(bool(scan.masks) for scan in scans)} with masks")
    data = {}
    faults = []
    sets = split_scans(scans, config)
    for role, members in sets.items():
        nothing = torch.zeros(0, 1, config.crop, config.crop)
        images = [nothing]
        masks = [nothing]
        where = []
        checksums = {}
        for scan in members:
            try:
                slices = read_scan(scan, config, role)
            except InputError as error:
                # All faults are reported at once.
                faults.append(str(error))
                continue
            images.append(slices.images)
            masks.append(slices.masks)
            where += slices.where
            checksums |= slices.checksums
        data[role] = Slices(
            torch.cat(images).to(device),
            torch.cat(masks).to(device),
            where,
            checksums)
        print(f"{role:>10}: {len(where):4d} slices of {len(members):2d} scans")
    unused = len(scans) - sum(len(members) for members in sets.values())
    if unused:
        print(f"{unused} scans are in no set, see --help on --split, --train, --val and --test")
    require(not faults, "; ".join(faults))
    for role in ("train", "test"):
        # A test set is not needed.
        require(data[role].where or role == "test" and not sets[role],
                f"{folder}: no foreground in the {role} set; check --split, --crop and --label")
    if config.method != ("supervised",) and not data["unlabelled"].where:
        print("warning: no unlabelled slices: the mean teacher trains on the labelled ones alone")
    return data


# --- 8. Metrics and evaluation -------------------------------------------------------------------

METRICS = ("dice", "miou", "accuracy", "precision", "recall", "specificity")
COLUMNS = (*METRICS, "scan_dice")


def segmentation_metrics(predictions, masks):
    """The six metrics of the paper's Table 1, for each slice.

    predictions, masks (N, 1, H, W), bool or {0, 1} -> dict of (N,) float32 in percent; 0 / 0 is 0.
    "mIoU" is the IoU of the foreground, averaged over slices: Table 1's numbers agree with that.
    """
    p, y = predictions.bool().flatten(1), masks.bool().flatten(1)                  # (N, H * W)
    tp, fp = (p & y).sum(1), (p & ~y).sum(1)
    fn, tn = (~p & y).sum(1), (~p & ~y).sum(1)
    metrics = {
        "dice": 2 * tp / (2 * tp + fp + fn),
        "miou": tp / (tp + fp + fn),
        "accuracy": (tp + tn) / p.shape[1],
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
        "specificity": tn / (tn + fp)}
    # 0 / 0 is NaN here and becomes 0.
    return {name: 100 * ratio.nan_to_num() for name, ratio in metrics.items()}


@torch.no_grad()
def predict_probabilities(model, images, batch=32):
    """Probability of foreground, in eval mode. (N, 1, H, W) z-scored -> the same shape."""
    # A copy, so that every layer of the model keeps its mode
    model = copy.deepcopy(model).eval()
    probabilities = [torch.sigmoid(model(part).float()) for part in images.split(batch)]
    return torch.cat(probabilities)


def evaluate(model, slices, config):
    """Metrics of a network on labelled Slices, in percent. -> list of dicts

    One dict for each slice that has foreground, as in the paper, with site, subject (the scan's
    name), slice, and the six of segmentation_metrics. scan_dice is the Dice of all slices of its
    scan together, also those without foreground.
    """
    predictions = predict_probabilities(model, slices.images) > config.threshold
    metrics = segmentation_metrics(predictions, slices.masks)
    rows = []
    for k, (site, scan, z) in enumerate(slices.where):
        if slices.masks[k].any():
            row = {"site": site, "subject": scan, "slice": z}
            for name in METRICS:
                row[name] = metrics[name][k].item()
            its_slices = [other == scan for _, other, _ in slices.where]
            whole = segmentation_metrics(predictions[its_slices][None],
                                         slices.masks[its_slices][None])
            row["scan_dice"] = whole["dice"].item()
            rows.append(row)
    return rows


# --- 9. The training loop ------------------------------------------------------------------------
# A run is one method, trained with one seed. In memory it is a dict, on disk a checkpoint.
# Methods: "supervised" has no teacher. "mean_teacher" is the paper's. "no_consistency" is the same
# with w = 0: it shows what the mean teacher gains without its consistency loss.

def build_network(config):
    """The one place where the network is built: put your own here, one channel in and one out."""
    return UNet(config.width, config.dropout)


def build(config, method, device):
    """Build student, teacher (None for the supervised baseline) and optimiser."""
    # Channels-last memory is fastest on tensor cores, and makes a CPU 1.1 to 1.4 times as fast.
    # On MPS, BatchNorm computes wrong values from it (PyTorch issues 175189 and 188371).
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    student = build_network(config).to(device, memory_format=layout)
    teacher = None if method == "supervised" else make_teacher(student)
    # The paper's L2 penalty is Adam's own weight_decay. AdamW's is a different method.
    optimizer = torch.optim.Adam(
        student.parameters(),
        lr=config.lr,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay[-1 if teacher else 0],
        fused=True)
    return student, teacher, optimizer


@torch.no_grad()
def same_input_targets(teacher, images, phi, noise):
    """For --augmentation same: the teacher also sees a warped slice, and nothing is delayed."""
    view, _ = augment(images, phi, noise)
    return torch.sigmoid(teacher(view).float())


def mse_consistency(student_logits, teacher_probabilities, valid):
    """For --consistency mse: mean squared difference over the valid pixels."""
    squares = (torch.sigmoid(student_logits.float()) - teacher_probabilities) ** 2
    return (squares * valid).sum() / valid.sum().clamp(min=1)


def step_options(config, device):
    """The arguments of train_step that stay the same for a whole run. -> dict"""
    loss = consistency_loss if config.consistency == "bce" else mse_consistency

    def consistency(logits, targets, valid):
        confident = torch.maximum(targets, 1 - targets) >= config.confidence
        return loss(logits, targets, valid & confident)

    # Older GPUs (T4, V100) emulate bfloat16 slowly, or fail.
    amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    delayed = config.augmentation == "delayed"
    return {
        "affine": (config.degrees, config.translation, config.scale),
        "noise": config.noise,
        "amp": amp,
        "consistency": consistency,
        "targets_of": delayed_targets if delayed else same_input_targets}


def batches(data, steps, n_labelled, n_unlabelled):
    """The mini-batches of one epoch. data: as from load_data.

    Yields `steps` times images (n_labelled, 1, H, W), masks of that shape, and unlabelled images
    (n_unlabelled, 1, H, W). Unlike a zip of two loaders, which ends with the shorter one, it goes
    on with a new order when a set is used up.
    """
    def shuffled(images, count):
        order = torch.arange(0, device=images.device)
        while len(order) < steps * count:
            again = torch.randperm(len(images), device=images.device)
            order = torch.cat([order, again])
        return order[:steps * count].view(steps, count)

    labelled = data["train"]
    unlabelled = data["unlabelled"]
    x_order = shuffled(labelled.images, n_labelled)
    u_order = shuffled(unlabelled.images, n_unlabelled)
    for x, u in zip(x_order, u_order):
        yield labelled.images[x], labelled.masks[x], unlabelled.images[u]


def train(config, method, seed, data, after_epoch=None):
    """Train one network (and its teacher), and evaluate the last epoch on the test set.

    method: one of METHODS; data: from load_data, on the device; after_epoch: called with each
    epoch's row of the history and with the networks, student (and teacher), by name. Continues
    from METHOD-seedS.pt in config.out if it exists; on a CPU, an interrupted run ends bit for bit
    like an uninterrupted one. -> dict: history (a dict per epoch), metrics (model -> what evaluate
    returns), state_dicts of student and teacher. InputError if the files are of another run.
    """
    torch.manual_seed(1_000_000 * seed)                  # decides the initial weights
    device = data["train"].images.device
    student, teacher, optimizer = build(config, method, device)
    models = {"student": student, "teacher": teacher} if teacher else {"student": student}
    path = Path(config.out, f"{method}-seed{seed}.pt")
    run = start_run(path, config, method, seed, data, models, optimizer)
    if run["finished"]:
        print(f"{method}, seed {seed}: finished, see {path}")
        return run
    n_slices = len(data["train"].images)
    n_labelled = min(config.batch, n_slices)
    n_unlabelled = config.unlabelled_batch if teacher and data["unlabelled"].where else 0
    epochs = config.epochs[-1 if teacher else 0]
    # Without --steps, an epoch is one pass over the labelled slices, in whole batches.
    steps = config.steps or epochs * (n_slices // n_labelled)
    epochs = min(epochs, steps)
    print(f"{method}, seed {seed}: {steps} steps in {epochs} epochs, {n_labelled} labelled + "
          f"{n_unlabelled} unlabelled slices per step, on {device.type}\n{PROGRESS}")
    options = step_options(config, device)
    final_weight = config.consistency_weight if method == "mean_teacher" else 0
    history = run["history"]
    start = time.perf_counter()
    first_epoch = len(history) + 1
    for epoch in range(first_epoch, epochs + 1):
        # Batches, phi, noise and Dropout. Reseeding at every epoch means that a checkpoint needs
        # no RNG state.
        torch.manual_seed(1_000_000 * seed + epoch)
        lr = config.lr * learning_rate_factor(epoch, epochs, config.lr_ramp)
        optimizer.param_groups[0]["lr"] = lr
        w = final_weight * ramp_up(epoch, config.consistency_ramp)
        alpha = config.alpha if epoch <= config.alpha_epochs else config.alpha_late
        step = steps * (epoch - 1) // epochs
        last_step = steps * epoch // epochs
        losses = []
        for x, y, u in batches(data, last_step - step, n_labelled, n_unlabelled):
            losses.append(train_step(student, teacher, optimizer, x, y, u, step, w, alpha,
                                     **options))
            step += 1
        row = {"epoch": epoch, "step": step, "lr": lr, "weight": w}
        for name in ("dice_loss", "consistency_loss"):
            row[name] = torch.stack([loss[name] for loss in losses]).mean().item()
        if not teacher:
            row["consistency_loss"] = math.nan
        history.append(row | {"val_student": math.nan, "val_teacher": math.nan})
        if epoch in (1, epochs) or epoch % config.validate_every == 0:
            save_epoch(run, path, config, models, optimizer, data, epoch == epochs)
            seconds_per_epoch = (time.perf_counter() - start) / (epoch - first_epoch + 1)
            print_progress(history[-1], seconds_per_epoch * (epochs - epoch))
        if after_epoch:
            after_epoch(history[-1], models)
    return run


def start_run(path, config, method, seed, data, models, optimizer):
    """A new run, or the saved one; models and optimizer continue from it, in place. -> dict"""
    if not path.exists():
        return {
            "config": vars(config),
            "scans": scan_checksums(data),
            "method": method,
            "seed": seed,
            "history": [],
            "finished": False}
    run = load_checkpoint(path)
    check_run(path, run, config, data)
    for name, model in models.items():
        load_weights(model, run, name, path)
    optimizer.load_state_dict(run["optimizer"])
    return run


def save_epoch(run, path, config, models, optimizer, data, finished):
    """Validate (after the last epoch, test as well), and write the checkpoint and the log."""
    run["metrics"] = {}
    for name, model in models.items():
        run[name] = model.state_dict()
        if data["val"].where:
            dice = [row["dice"] for row in evaluate(model, data["val"], config)]
            run["history"][-1][f"val_{name}"] = statistics.fmean(dice)
        if finished and data["test"].where:
            run["metrics"][name] = evaluate(model, data["test"], config)
    run.update(finished=finished, optimizer=optimizer.state_dict())
    save_csv(path.with_suffix(".csv"), run["history"])
    content = io.BytesIO()
    torch.save(run, content)
    save(path, content.getvalue())


PROGRESS = (" epoch    step       lr     w   Dice loss   consistency   val. Dice: student   "
            "teacher   minutes left")


def print_progress(row, seconds):
    """One line about an epoch, under PROGRESS. row: of the history."""
    optional = (f"{row['consistency_loss']:13.4f} {row['val_student']:20.2f} "
                f"{row['val_teacher']:9.2f}")
    # There are none without a teacher, or without validation subjects.
    optional = optional.replace("nan", "  -")
    print(f"{row['epoch']:6d} {row['step']:7d} {row['lr']:8.2g} {row['weight']:5.2f} "
          f"{row['dice_loss']:11.4f} {optional} {seconds / 60:14.1f}", flush=True)


def save(path, content):
    """Write bytes atomically: to a temporary file, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps apart two processes that write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        # It exists only if something failed.
        temporary.unlink(missing_ok=True)


def save_csv(path, rows):
    """Write dicts with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save(path, text.getvalue().encode(errors="surrogateescape"))


def load_checkpoint(path):
    """Read what train() saved; no code in it is run. -> dict; InputError for other files"""
    try:
        run = torch.load(path, map_location="cpu", weights_only=True)
        other = sorted(run["config"].keys() ^ vars(DEMO).keys())
        require(not other, f"its settings differ in {other}")
        Config(**run["config"])
        parts = {"scans", "method", "seed", "history", "finished", "metrics", "student",
                 "optimizer"}
        require(parts <= run.keys(), f"it has no {sorted(parts - run.keys())}")
        return run
    except Exception as error:
        # Unpickling can raise almost anything.
        raise InputError(f"{path}: not a checkpoint of this version ({type(error).__name__}: "
                         f"{error}); give another file") from error


def check_run(path, run, config, data):
    """InputError if a checkpoint has another name, other settings or, with data, other scans."""
    require(path.stem == f"{run['method']}-seed{run['seed']}",
            f"{path}: holds {run['method']}, seed {run['seed']}; rename it")
    # Pairs of name and value that are in one of the two only
    changed = run["config"].items() ^ vars(config).items()
    if data:
        changed |= run["scans"].items() ^ scan_checksums(data).items()
    # Runs, seeds and methods can be added, data can be moved, the device can change.
    names = {name for name, _ in changed} - {"data", "out", "method", "runs", "seed", "device"}
    require(not names, f"{path}: was trained with another {', '.join(sorted(names))}; give "
                       f"another --out, or delete {path.parent} to start again")


def scan_checksums(data):
    """-> dict: set and scan -> SHA-256 of its files. data: from load_data."""
    return {f"{role} {scan}": checksum for role, slices in data.items()
            for scan, checksum in slices.checksums.items()}


def load_weights(network, run, name, path):
    """Load the student or the teacher of a checkpoint into a network."""
    try:
        network.load_state_dict(run[name])
    except Exception:
        raise InputError(f"{path}: holds another network than build_network() makes; restore that "
                         "function, or train with another --out") from None


def load_network(run, path):
    """The network of a checkpoint: the teacher, or the only one of a supervised run."""
    network = build_network(Config(**run["config"]))
    load_weights(network, run, "teacher" if "teacher" in run else "student", path)
    return network


# --- 10. Experiment: methods x runs, table, pictures ---------------------------------------------

# What the gain is made of: differences between rows of the table. The last three add up to it.
# "BatchNorm": with equal epochs and weight decay, as in the demo, w = 0 differs from supervised
# training only by unlabelled slices in BatchNorm's statistics, and by its random draws.
DIFFERENCES = {
    "gain": ("mean_teacher, teacher", "supervised, student"),
    "= BatchNorm": ("no_consistency, student", "supervised, student"),
    "+ averaged weights": ("no_consistency, teacher", "no_consistency, student"),
    "+ consistency loss": ("mean_teacher, teacher", "no_consistency, teacher")}
# The Okabe-Ito palette, which is safe for colour-blind readers
COLORS = {"rater": "#009e73", "supervised": "#d55e00", "no_consistency": "#cc79a7",
          "mean_teacher": "#0072b2"}


def experiment(config):
    """Train every method with every seed, evaluate, report. -> dict: scores, differences, table.

    See report(): it covers all finished runs in config.out, also those of earlier commands.
    InputError if runs in it are of other settings or scans. Under torchrun, each process trains a
    part of the seeds; the one that ends last reports, the others return None.
    """
    device = pick_device(config.device)
    out = Path(config.out)
    seeds = range(config.seed, config.seed + config.runs)
    # All data are read before the first training, so that every fault is found at once.
    data = {}                                            # seed of a run -> its data
    if config.split_seed == -1:
        for seed in seeds:
            data[seed] = load_data(dataclasses.replace(config, split_seed=seed), device)
    else:
        data = dict.fromkeys(seeds, load_data(config, device))
    for path, run in folder_runs(out).items():
        # With a fixed split, every run has the data of the first seed.
        split = run["seed"] if config.split_seed == -1 else config.seed
        check_run(path, run, config, data.get(split))
    scans = {f"run {seed}": scan_checksums(data[seed]) for seed in seeds}
    record = {"config": vars(config), "scans": scans}
    save(out / "config.json", json.dumps(record, indent=1).encode())
    # GPUs train separate runs in parallel: a batch of 16 small slices does not fill even one.
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainings = list(itertools.product(seeds[rank::world], config.method))
    for number, (seed, method) in enumerate(trainings, start=1):
        print(f"\ntraining {number} of {len(trainings)}")
        train(config, method, seed, data[seed])

    runs = [run for run in folder_runs(out).values() if run["finished"]]
    finished = {(run["seed"], run["method"]) for run in runs}
    if not finished >= set(itertools.product(seeds, config.method)):
        print("other processes have not finished yet; the last one reports")
        return None
    return report(config, runs, data[config.seed]["test"])


def pick_device(name):
    """Turn --device into a torch.device. Under torchrun, each process gets a GPU of its own."""
    try:
        if name == "auto":
            found = torch.accelerator.is_available()
            name = torch.accelerator.current_accelerator().type if found else "cpu"
        if name == "cuda":
            # If there are more processes than GPUs, some share one.
            rank = int(os.environ.get("LOCAL_RANK", 0))
            torch.cuda.set_device(rank % max(1, torch.cuda.device_count()))
        # This fails on devices that are not there, or do not compute.
        torch.ones(1, device=name).item()
        return torch.device(name)
    except Exception as error:
        raise InputError(f"--device {name}: not available ({error}); try cpu") from error


def folder_runs(folder):
    """All runs saved in a folder, the supervised ones first. -> dict: path -> run"""
    return {path: load_checkpoint(path)
            for path in sorted(folder.glob("*-seed*.pt"), reverse=True)}


def report(config, runs, test_slices):
    """Write table, per-slice metrics and pictures of finished runs. -> dict

    scores: see mean_scores; differences: see paired_differences; table: text. test_slices: those
    of the first run of the command, for the examples.
    """
    out = Path(config.out)
    scores = mean_scores(runs)
    differences = paired_differences(scores)
    table = "no test subjects"
    rows = []
    for run in runs:
        for model, of_slices in run["metrics"].items():
            first_columns = {"method": run["method"], "seed": run["seed"], "model": model}
            rows += [first_columns | row for row in of_slices]
    # The user's matplotlibrc has no influence.
    with matplotlib.style.context("default"):
        save_figure(out / "curves.png", draw_curves(runs))
        if test_slices.where:
            save_figure(out / "examples.png", draw_examples(config, runs, test_slices))
        if rows:
            save_csv(out / "metrics.csv", rows)
            random_splits = config.split_seed == -1 and not config.train
            table = make_table(scores, differences, random_splits)
            save(out / "table.md", table.encode())
    print(f"\n{table}\nAll results are in {out}")
    return {"scores": scores, "differences": differences, "table": table}


def mean_scores(runs):
    """Means over test slices (scan_dice: over scans), in percent.

    -> dict: method and model -> seed -> metric: scores["mean_teacher, teacher"][0]["dice"]
    """
    scores = {}
    for run in runs:
        for model, rows in run["metrics"].items():
            means = {name: statistics.fmean(row[name] for row in rows) for name in METRICS}
            scan_dice = {row["subject"]: row["scan_dice"] for row in rows}
            means["scan_dice"] = statistics.fmean(scan_dice.values())
            scores.setdefault(f"{run['method']}, {model}", {})[run["seed"]] = means
    return scores


def paired_differences(scores):
    """The DIFFERENCES between rows of scores, for the seeds that both rows have.

    -> dict: name -> seed -> metric -> difference, like scores
    """
    differences = {}
    for name, (ours, others) in DIFFERENCES.items():
        for seed, row in scores.get(ours, {}).items():
            other = scores.get(others, {}).get(seed)
            if other:
                difference = {metric: row[metric] - other[metric] for metric in COLUMNS}
                differences.setdefault(name, {})[seed] = difference
    return differences


def make_table(scores, differences, random_splits):
    """Scores, like the paper's Table 1, and differences, as Markdown."""
    lines = [f"| {'test, %':23} | runs |" + "".join(f" {name:>13} |" for name in COLUMNS),
             "| :--- | ---: |" + " ---: |" * len(COLUMNS)]
    for label, by_seed in (scores | differences).items():
        line = f"| {label:23} | {len(by_seed):4} |"
        for name in COLUMNS:
            values = [row[name] for row in by_seed.values()]
            mean = statistics.fmean(values)
            std = statistics.stdev(values) if len(values) > 1 else math.nan
            cell = f"{mean:.2f} ({std:.2f})"
            if label in differences:
                cell = f"{mean:+.2f} ± {std / len(values) ** 0.5:.2f}"
            # A single run has no spread.
            cell = cell.replace(" (nan)", "").replace(" ± nan", "")
            line += f" {cell:>13} |"
        lines.append(line)
    what = "random splits" if random_splits else "training seeds of one split"
    lines.append(f"\nMean (std) over runs, {what}; differences: mean ± standard error over pairs "
                 "of runs with the same seed. The first six metrics: means over the test slices "
                 "with foreground (paper, Table 1); scan_dice: over all slices of a scan.\n")
    return "\n".join(lines)


def save_figure(path, figure):
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    save(path, content.getvalue())


def draw_curves(runs):
    """Losses and validation Dice against the training step, one line per run. -> Figure"""
    figure = Figure(figsize=(16, 4), layout="constrained")
    panels = {"dice_loss": "Dice loss (paper, eq. 3)",
              "consistency_loss": "Consistency loss per pixel (eq. 2)",
              "val_student": "Validation Dice of the student, %",
              "val_teacher": "Validation Dice of the teacher, %"}
    for axis, (column, title) in zip(figure.subplots(1, 4), panels.items()):
        axis.set(title=title, xlabel="training step")
        for run in runs:
            rows = [row for row in run["history"] if not math.isnan(row[column])]
            if rows:
                axis.plot([row["step"] for row in rows], [row[column] for row in rows],
                          color=COLORS[run["method"]], label=run["method"])
        # One entry for all runs of a method
        axis.legend(handles={line.get_label(): line for line in axis.lines}.values())
    return figure


def draw_examples(config, runs, slices):
    """Test slices with the outlines of the rater's mask and of the runs with --seed. -> Figure"""
    shown = slices.masks.flatten(1).any(1).nonzero().flatten()
    # At most four slices, evenly spaced
    shown = shown[::math.ceil(len(shown) / 4)].tolist()
    images = slices.images[shown].cpu()
    outlines = {"rater": slices.masks[shown].cpu()}
    for run in runs:
        if run["seed"] == config.seed:
            network = load_network(run, config.out)
            probabilities = predict_probabilities(network, images)
            outlines[run["method"]] = probabilities > config.threshold
    size = (3.2 * len(shown), 3.4 * len(outlines))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(outlines), len(shown), squeeze=False)
    for row, (name, masks) in zip(axes, outlines.items()):
        dice = segmentation_metrics(masks, outlines["rater"])["dice"]
        for k, axis in enumerate(row):
            _, scan, z = slices.where[shown[k]]
            title = f"{scan}, slice {z}\n{name}, Dice {dice[k]:.1f}"
            # Names can have a $, which would start a formula, or bytes that are no text.
            title = title.encode(errors="replace").decode()
            axis.set_title(title, fontsize=9, parse_math=False)
            axis.set_axis_off()
            # Grey levels for the structure, not for bright fat around it
            inside = images[k][outlines["rater"][k] > 0]
            low, high = inside.min(), inside.max()
            axis.imshow(images[k, 0].numpy(), cmap="gray", vmin=low - 1, vmax=high + 1)
            if masks[k].any():
                axis.contour(masks[k, 0].numpy(), [0.5], colors=COLORS[name])
    return figure


# --- 11. Predict ---------------------------------------------------------------------------------

def predict_volume(image, network, config, name="image"):
    """Probability of foreground for every voxel of a nibabel image, on the image's own grid.

    network: as trained with config, whose spacing and crop are used -> array of image.shape,
    float32 in [0, 1]; 0 outside the crop. Warns if foreground touches the border of the crop.
    """
    images = to_slices(image, config)  # (Z, 1, crop, crop)
    device = next(network.parameters()).device
    probabilities = predict_probabilities(network, images.to(device)).cpu()
    # Nothing is foreground in an empty slice.
    probabilities *= images.any((1, 2, 3), keepdim=True)
    mask = probabilities > config.threshold
    if mask.sum() > mask[..., 1:-1, 1:-1].sum():
        print(f"warning: {name}: foreground at the border of the centre crop; if the "
              "structure goes on, give a larger --crop")
    stored, size = canonical(image, config.spacing)
    slices = []
    # Undo to_slices, slice by slice.
    for plane in probabilities.split(1):
        plane = center_crop(plane, *size)
        slices.append(F.interpolate(plane, size=stored.shape[2:], mode="bilinear", antialias=True))
    result = torch.cat(slices)[:, 0].flip(1).numpy().T   # (X, Y, Z), RAS
    ras = nib.orientations.axcodes2ornt("RAS")
    own = nib.io_orientation(image.affine)
    return nib.apply_orientation(result, nib.orientations.ornt_transform(ras, own))


def predict(argv):
    """Segment a scan with the network of a run. -> path of the mask

    The mask is on the scan's own grid, whatever its orientation and voxel size. For probabilities
    or another threshold, call predict_volume.
    """
    parser = Parser(prog="mean_teacher_seg.py predict", description="Segment a scan.")
    parser.add_argument("image", type=Path, help="the scan, a NIfTI file")
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="a .pt file of a run; its teacher is used, if it has one")
    parser.add_argument("--output", type=Path, required=True,
                        help="the mask to write, .nii or .nii.gz")
    parser.add_argument("--crop", type=int, help="side of the centre crop, px, a multiple of 8, "
                        "if the structure is far from the centre [as in training]")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu or auto [auto]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing mask")
    given = parser.parse_args(argv)
    path = given.image
    output = given.output
    require(output.name.endswith((".nii", ".nii.gz")), f"{output}: expected .nii or .nii.gz")
    require(output.resolve() != path.resolve(), f"{output}: is the scan; give another --output")
    require(given.overwrite or not output.exists(),
            f"{output}: already exists; use --overwrite to replace it")
    run = load_checkpoint(given.checkpoint)
    if not run["finished"]:
        print(f"warning: {given.checkpoint}: the training is not finished")
    config = Config(**run["config"])
    if given.crop is not None:
        config = dataclasses.replace(config, crop=given.crop)
    network = load_network(run, given.checkpoint).to(pick_device(given.device))
    image, _ = load_nifti(path, config.spacing)
    values = np.unique(image.dataobj)
    is_mask = 2 <= len(values) <= 10 and not (values % 1).any()
    require(not is_mask, f"{path}: is a mask, with the values {values}; give the scan")
    foreground = predict_volume(image, network, config, path) > config.threshold
    save_mask(output, foreground, image)
    print(f"{output}: {foreground.sum()} voxels of foreground inside the centre crop of "
          f"{config.crop} px of {config.spacing} mm")
    return output


def save_mask(path, foreground, image):
    """Write a mask with geometry, codes and unit of its scan, and nothing else of the header.

    The rest can hold data of the patient.
    """
    mask = nib.Nifti1Image(foreground.astype(np.uint8), image.affine)
    mask.header.set_zooms(image.header.get_zooms())
    mask.header.set_xyzt_units(image.header.get_xyzt_units()[0])
    mask.set_qform(*image.get_qform(coded=True))
    mask.set_sform(*image.get_sform(coded=True))
    content = mask.to_bytes()
    if path.suffix == ".gz":
        # Without a time stamp, equal masks are equal files.
        content = gzip.compress(content, mtime=0)
    save(path, content)


# --- 12. The phantom -----------------------------------------------------------------------------
# You can skip this section: nothing of the method is in it. It paints a synthetic study, 4 sites x
# 20 subjects of cervical spinal cord, in the layout and file names of the challenge. Each
# draw(low, high) is one property of one subject. Its range was adjusted until contrast, sizes and
# spread between subjects measured like those of six real scans. Distances are in mm, brightness
# is relative to white matter.

class Site(NamedTuple):
    mm: float                                            # voxel size in the plane
    thick: float                                         # voxel size across it, mm
    size: int                                            # matrix, px
    slices: tuple                                        # fewest and most
    black: int                                           # additional empty slices at each end
    unit: int                                            # integer stored for white matter
    axes: str                                            # as stored


SITES = (Site(0.50, 5.0, 100, (3, 3), 0, 200, "LAS"),
         Site(0.50, 7.5, 100, (7, 14), 0, 1000, "RAS"),
         Site(0.25, 2.5, 176, (19, 20), 4, 500, "LPS"),
         Site(0.29, 5.0, 160, (12, 14), 0, 700, "RPS"))


def ellipse(x, y, radius_x, radius_y):
    """Approximate distance from an ellipse around (0, 0), mm, negative inside."""
    return (torch.hypot(x / radius_x, y / radius_y) - 1) * radius_y


def stroke(x, y, x0, y0, x1, y1, radius):
    """Distance from a thick line from (x0, y0) to (x1, y1), mm, negative inside."""
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx ** 2 + dy ** 2)).clamp(0, 1)
    return torch.hypot(x - x0 - along * dx, y - y0 - along * dy) - radius


def paint_cord(x, y, z, draw, noise):
    """The cord and its surroundings. -> image, distances from the cord and its grey matter, mm.

    Shapes are painted one over the other. All arrays are (Z, Y, X).
    """
    def paint(value, distance):
        # The edge is 0.5 mm wide.
        return image + (value - image) * torch.sigmoid(-distance / 0.12)

    # No subject is symmetric: the grid is bent by 0.25 mm. Sizes vary by some 10 %.
    x = x + 0.25 * noise(5) + 0.02 * z * draw(-1, 1)
    y = y + 0.25 * noise(5)
    side = x.abs()
    # Thicker at some levels
    stature = draw(0.90, 1.08) + 0.04 * torch.cos(z / 20 + draw(0, 6))
    # Radii of the cord
    wide, deep = stature * draw(6.2, 7.5), stature * draw(3.9, 5.0)

    # Muscle with streaks of fat, darker than the cord; the vertebra, nearly black
    muscle, bone, csf = draw(0.3, 1.0), draw(0.05, 0.2), draw(1.6, 2.5)
    image = muscle * torch.exp(0.3 * noise(5) + 0.3 * noise(2))
    image = paint(bone, ellipse(x, y - deep - 11, 12, 8))
    # Canal, 1 to 3 mm around the cord: an arched front, two sides and a V-shaped back. Bright CSF
    # within a dark wall, crossed by grey nerve roots
    front = y - deep - draw(1.2, 3.2) + draw(0, 0.03) * side ** 2
    back = draw(0.4, 0.8) * (torch.hypot(x, torch.tensor(3.0)) - 3) - y - deep - draw(0.6, 1.4)
    # logsumexp is a smooth maximum: the intersection of the shapes.
    canal = torch.logsumexp(torch.stack([front, back, side - draw(9, 12)]), 0)
    image = paint(bone, canal - draw(1, 2.5))
    image = paint(csf * (1 + 0.08 * noise(4)), canal)
    for top in (0.5 * deep, -0.5 * deep):
        root = stroke(side, y, 0.8 * wide, top, 1.4 * wide, 1.5 * top, 0.25)
        image = paint(csf * draw(0.6, 0.9), torch.maximum(root, canal))
    # Cord: slightly uneven white matter; the butterfly of grey matter, 8 mm wide and 6 mm high,
    # after blurring 0.12 to 0.2 brighter; in front of it a fissure, too narrow for pure CSF
    white, cord = 1 + 0.03 * noise(2), ellipse(x, y, wide, deep)
    image = paint(white, cord)
    w, h = stature * draw(3.6, 4.5), stature * draw(2.4, 3.4)
    ventral = stroke(side, y, 0.48 * w, 0.3 * h, 0.5 * w, 0.6 * h, stature * draw(0.6, 1.05))
    dorsal = stroke(side, y, 0.45 * w, 0.3 * h, w - 0.45, 0.45 - h, stature * draw(0.38, 0.52))
    bridge = stroke(x, y, -0.48 * w, 0.3 * h, 0.48 * w, 0.3 * h, draw(0.4, 0.6))
    # With both signs changed it is a smooth minimum: their union.
    grey = -torch.logsumexp(-6 * torch.stack([ventral, dorsal, bridge]), 0) / 6
    image = paint(white + draw(0.16, 0.28), grey)
    image = paint(draw(1, 1.5), stroke(x, y, 0, 0.5 * deep, 0, 1.2 * deep, 0.1))
    return image, cord, grey


def phantom_subject(site, generator):
    """Paint one subject. -> image (Z, Y, X) int16, four raters' masks (4, Z, Y, X) uint8.

    x to the right, y to the front; masks as in the challenge: 0, 1 grey matter, 2 white matter.
    """
    def draw(low, high):
        # One number for the subject
        return low + (high - low) * torch.rand((), generator=generator).item()

    def noise(length):
        # (Z, Y, X) of std 1, smooth over that length in mm
        cells = max(2, round(site.size * site.mm / length) + 1)
        corners = torch.randn(2, 1, cells, cells, generator=generator) / 0.85
        one, two = F.interpolate(corners, site.size, mode="bicubic", align_corners=True)
        # The field changes along the cord.
        return one * torch.cos(z / 60) + two * torch.sin(z / 60)

    # Position: a few mm off centre (the demo's crop is 16 mm wide) and turned
    count = int(torch.randint(site.slices[0], site.slices[1] + 1, (), generator=generator))
    z = (torch.arange(count).view(-1, 1, 1) - count / 2) * site.thick
    axis = (torch.arange(site.size) - (site.size - 1) / 2) * site.mm
    y, x = torch.meshgrid(axis - draw(-2.5, 2.5), axis - draw(-2.5, 2.5), indexing="ij")
    tilt = math.radians(draw(-15, 15))
    x, y = x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)
    image, cord, grey = paint_cord(x, y, z, draw, noise)

    # Scanner: a coil that is more sensitive nearby; frequencies only up to those of voxels of 0.4
    # to 0.9 mm, which blurs and rings a little; noise in the real and the imaginary part
    image = image * torch.exp(0.1 * noise(50) - draw(0, 0.02) * y)
    # Frequencies in 1/mm
    frequency = torch.fft.fftfreq(site.size, site.mm).abs()
    seen = torch.sigmoid((0.5 / draw(0.4, 0.9) - frequency) / 0.08)
    seen = seen[:, None] * seen
    std = draw(0.015, 0.07) / seen.square().mean().sqrt()
    echo = torch.randn(image.shape, generator=generator, dtype=torch.complex64) * 2 ** 0.5 * std
    image = torch.fft.ifft2(torch.fft.fft2(image + echo) * seen).abs()
    masks = torch.zeros(4, *image.shape, dtype=torch.uint8)
    # Each simulated rater has one smooth error, so that two agree to a Dice of 0.81.
    for mask in masks:
        error = 0.175 * noise(2.5)
        mask[cord + error < 0] = 2
        mask[grey + error < 0] = 1
    black = (0, 0, 0, 0, site.black, site.black)
    return F.pad((image * site.unit).round().short(), black), F.pad(masks, black)


def phantom_folder():
    """Where the phantom is kept between runs: beside the models that PyTorch downloads."""
    folder = torch.hub.get_dir()
    # Some containers have no home folder, and "~" stays.
    if folder.startswith("~"):
        folder = tempfile.gettempdir()
    return Path(folder, "mean_teacher_seg", "phantom-2")


def write_phantom(folder, seed=0, sites=SITES, subjects=20):
    """Write the phantom as NIfTI below a new folder, which appears only when it is complete.

    subjects: per site, the first half of them with masks. The same seed writes the same voxels.
    InputError if the folder exists already.
    """
    folder = Path(folder)
    require(not folder.exists(), f"{folder}: already exists; delete it or give another folder")
    print(f"writing the phantom to {folder}; later runs use it again", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as unfinished:
        for s, site in enumerate(sites, start=1):
            for subject in range(1, subjects + 1):
                generator = torch.Generator().manual_seed(10000 * seed + 100 * s + subject)
                image, masks = phantom_subject(site, generator)
                files = {"image": image}
                if subject <= subjects // 2:
                    files |= {f"mask-r{rater}": masks[rater - 1] for rater in range(1, 5)}
                affine = np.diag([site.mm, site.mm, site.thick, 1])
                for name, voxels in files.items():
                    nifti = nib.Nifti1Image(voxels.numpy().T, affine)
                    nifti = nifti.as_reoriented(nib.orientations.axcodes2ornt(site.axes))
                    nib.save(nifti, f"{unfinished}/site{s}-sc{subject:02d}-{name}.nii.gz")
        os.chmod(unfinished, 0o755)
        # Another process can have written the same in the meantime.
        if not folder.is_dir():
            os.rename(unfinished, folder)


# --- 13. Command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, like any other bad input."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv):
    """Turn the command line, which has an option for every field, into Config and preset."""
    parser = Parser(
        usage="%(prog)s [options]\n       %(prog)s predict --help",
        description="The paper's experiment: 1600 epochs x 10 steps supervised, 350 x 10 steps of "
        "the mean teacher, with 86 training slices. [Brackets]: the defaults of --preset paper; "
        "(authors): the paper is silent, from the first author's code; (here): our choice.",
        epilog="--preset demo: a smaller network and crop, 700 steps; see DEMO in section 6 of "
        "the file. --epochs without --steps turns --steps off. The same command again resumes an "
        "interrupted run; to start again, delete the folder. Results: six metrics, means over the "
        "test slices with foreground, as in the paper; and the Dice per scan, over all slices of "
        "a scan.")
    parser.add_argument("--preset", choices=["paper", "demo"],
                        help="[with --data: paper; without: demo, small enough for a CPU]")
    # A setting, and the comments beside and below it, up to an empty line
    pattern = r"(?m)^    (\w+): .*?((?: *# .*\n)+)"
    texts = dict(re.findall(pattern, inspect.getsource(Config)))
    for name, default in vars(Config()).items():
        several = isinstance(default, tuple)
        values = default if several else (default,)
        text = texts[name].replace("#", "") + f"[{' '.join(map(str, values))}]"
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                            nargs="+" if several else None,
                            type=type(values[0]) if values else str,
                            choices=CHOICES.get(name), help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset") or ("paper" if given.get("data") else "demo")
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    if "epochs" in given:
        given.setdefault("steps", 0)
    name = os.path.basename(os.path.abspath(given["data"])) if given.get("data") else "phantom"
    given.setdefault("out", f"runs/{preset}-{name}")
    return dataclasses.replace(DEMO if preset == "demo" else Config(), **given), preset


def main(argv=None):
    """Run a command line (default: the program's own). -> as experiment or predict.

    SystemExit 2 with one line `error: ...` for bad input, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] == "predict":
            return predict(argv[1:])
        config, preset = parse(argv)
        if preset == "paper" and pick_device(config.device).type == "cpu":
            print("note: the paper's settings take days on a CPU; --preset demo takes minutes")
        return experiment(config)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; the same command continues a training")
        raise SystemExit(130) from None


if __name__ == "__main__":
    # A name that the terminal cannot show is no reason to stop.
    sys.stdout.reconfigure(errors="backslashreplace")
    main()
