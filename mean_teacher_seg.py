# SPDX-License-Identifier: MIT
"""Mean-teacher semi-supervised segmentation in one file.

The method of C. S. Perone and J. Cohen-Adad, "Deep semi-supervised segmentation with
weight-averaged consistency targets", DLMIA 2018, arXiv:1807.04657. A student network f(theta)
learns from a few slices with masks. The weights of the teacher f(theta') are the exponential
moving average of the student's. On every slice the student is trained to agree with the teacher.

    Algorithm 1, as section 6 of this file implements it
     1  for each mini-batch of slices x, the labelled ones with masks y
     2      draw phi, a small affine transformation for every slice
     3      z  = f(theta, g(x; phi) + noise)          student: transformed BEFORE its forward pass
     4      z~ = g(f(theta', x + other noise); phi)   teacher: the same phi AFTER it, "delayed"
     5      L  = -Dice(z, g(y; phi))                  labelled slices only            (eq. 3)
     6      C  = BCE(z, z~)                           labelled and unlabelled slices  (eq. 2)
     7      loss = L + w C                            w ramps up over the first epochs
     8      update theta with Adam                    no gradient goes through the teacher
     9      t  = t + 1
    10      theta' = alpha theta' + (1 - alpha) theta (eq. 1)

New here? Read sections 3 to 6 first: they are the method, and need only copy, math and torch.

    python mean_teacher_seg.py                    demo on a synthetic phantom, minutes on a CPU
    python mean_teacher_seg.py --data DIR         your scans, the paper's settings; needs a GPU
    python mean_teacher_seg.py --data DIR --preset demo         your scans, small enough for a CPU
    python mean_teacher_seg.py predict SCAN.nii.gz --checkpoint RUN/mean_teacher-seed0.pt \\
                                       --output MASK.nii.gz
    torchrun --nproc-per-node 8 mean_teacher_seg.py --data DIR --runs 10      many GPUs

Measured on real MRI (hippocampus, ten random splits), test Dice of the teacher minus that of the
supervised network: +2.0 +- 0.9 with 2 labelled subjects, +0.3 to +0.5 with 4, 8 and 16, which may
be chance. README.md has the table.

The paper: 1 configuration, 2 U-Net, 3 losses, 4 delayed augmentation, 5 teacher and ramps,
6 training step. The rest: 7 data, 8 metrics, 9 training loop, 10 experiment, 11 predict,
12 phantom, 13 command line. "Section 4" means this file, "paper, section 2.1" the paper.
"""
import argparse
import collections
import copy
import csv
import dataclasses
import glob
import gzip
import io
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
# authors: the paper is silent, the value is from the first author's public code for these data
# (github.com/perone/medicaltorch) or for the follow-up study with the same settings
# (github.com/neuropoly/domainadaptation). The paper's own training code was never published.
# here: our choice. Every field is an option of the command line.

def option(default, help_text, least=0, most=1e9, choices=None):
    metadata = {"help": help_text, "range": (least, most), "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's experiment. dataclasses.replace() makes a variant of it."""
    # What to run
    data: str = option("", "folder of scans in SCGM, BIDS or Decathlon layout; none: the phantom")
    out: str = option("", "folder for the results; empty: runs/PRESET-DATA")
    method: str = option("both", "what to train", choices=["supervised", "mean_teacher", "both"])
    runs: int = option(1, "runs per method, with seeds SEED, SEED + 1, ... (here; paper: 10)", 1)
    seed: int = option(0, "seed of the first run: weights, batches, augmentation")
    device: str = option("auto", "cuda, mps, cpu or auto")
    # Data: 8 training, 8 validation, 12 test subjects, 40 unlabelled
    spacing: float = option(0.25, "in-plane pixel size after resampling, mm", 0.02)
    crop: int = option(200, "side of the centre crop, px, a multiple of 8 (authors)", 8, 2048)
    label: tuple = option((1,), "mask values that are foreground (authors: 1, grey)", 1, 255)
    rater: str = option("4", "SCGM: rater of the masks (authors)", choices=["1", "2", "3", "4"])
    contrast: tuple = option(("T2star", "T2starw"), "BIDS: images are NAME_ + one of these (here)")
    mask_name: tuple = option(("gmseg", "label-GM"), "BIDS: masks begin with IMAGE_ + one (here)")
    split: tuple = option((2, 2, 3), "subjects per site to train, validate, test, drawn at random")
    split_seed: int = option(0, "seed of the random split; -1: each run's own seed", -1)
    train: tuple = option((), "training subjects by name, instead of --split")
    val: tuple = option((), "validation subjects by name; may stay empty")
    test: tuple = option((), "test subjects by name")
    unlabelled: tuple = option((), "unlabelled subjects by name, instead of all that are left")
    # Network
    width: int = option(64, "channels of the first block (authors)", 1)
    dropout: float = option(0.5, "rate of Dropout2d after every block convolution", 0, 1)
    # Optimisation. Pairs are (supervised, mean teacher); one number is for both.
    epochs: tuple = option((1600, 350), "number of epochs", 1)
    steps: int = option(0, "training steps, split evenly over the epochs; 0: an epoch is a pass")
    batch: int = option(8, "labelled slices in a mini-batch", 1)
    unlabelled_batch: int = option(8, "unlabelled slices in a mini-batch (authors); 0: none")
    lr: float = option(6e-4, "eta, Adam's peak learning rate", 1e-9)
    lr_ramp: int = option(50, "epochs of learning-rate ramp-up, before the cosine")
    weight_decay: tuple = option((8e-4, 6e-4), "lambda, L2 penalty inside Adam")
    # Mean teacher
    # Per pixel, the Dice gradient is about 1 / (foreground pixels), the consistency gradient w /
    # (all pixels). So relative to the Dice loss, w is stronger where the share of foreground is
    # larger. It is 0.4 % in the paper; for other data, tune w on validation subjects.
    consistency_weight: float = option(2.9, "w, weight of the consistency loss after its ramp-up")
    consistency_ramp: int = option(100, "epochs of the ramp-up of w")
    alpha: float = option(0.99, "EMA decay at first: a memory of 1/(1-alpha) steps", 0, 1)
    alpha_late: float = option(0.999, "EMA decay later, when the student changes slowly", 0, 1)
    alpha_epochs: int = option(50, "epochs with --alpha, before --alpha-late")
    consistency: str = option("bce", "mse: worse (paper, section 2)", choices=["bce", "mse"])
    augmentation: str = option("delayed", "same: one warped input for both networks (paper, 2.1)",
                               choices=["delayed", "same"])
    confidence: float = option(0.0, "ignore pixels where the teacher's max(y, 1-y) is lower; did "
                               "not help (paper, section 2)", 0, 1)
    # Augmentation
    degrees: float = option(4.5, "rotation, uniform in +- this many degrees")
    translation: float = option(0.0, "translation, uniform in +- this many px (here)")
    scale: float = option(0.0, "scale, uniform in 1 +- this (here)", 0, 0.9)
    noise: float = option(0.1, "std of added Gaussian noise; the paper's N(0, 0.01) as variance")
    # Evaluation
    threshold: float = option(0.5, "probability above which a pixel is foreground (here)", 0, 1)
    validate_every: int = option(10, "epochs between two validations and checkpoints (here)", 1)


# DEMO is small enough for two CPU cores. It was tuned for the supervised network, on validation
# subjects, and then kept for both methods (README.md). All other values are Config's.
DEMO = dataclasses.replace(
    Config(), crop=64,                                   # 16 mm: all grey matter of the phantom
    width=8, dropout=0.0,
    epochs=(30,), steps=700,
    batch=4, unlabelled_batch=4,                         # more steps in the same time
    lr=3e-3, lr_ramp=3, weight_decay=(2e-3,),            # a narrow network tolerates a higher lr
    consistency_ramp=30, alpha=0.95, alpha_late=0.99, alpha_epochs=8,    # memory: 20, 100 steps
    degrees=20.0, translation=3.0, scale=0.1, noise=0.2,  # stronger: there are few subjects
    validate_every=5)


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
    Raises ValueError for different shapes, which would broadcast to a wrong value.
    Source: paper, eq. 3; the smoothing term is the authors'.
    """
    if probabilities.shape != masks.shape:
        raise ValueError(f"probabilities and masks must have the same shape, got "
                         f"{tuple(probabilities.shape)} and {tuple(masks.shape)}")
    # L(theta) = - 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i), i over all pixels of all slices.
    # One ratio per batch, not the mean of one ratio per slice: in a slice with little grey matter
    # a single pixel would change the ratio a lot. No class weights are needed either: the
    # 99.6 % background pixels add nothing to either sum where they are predicted correctly.
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
    # falls without bound as p goes to 1, and p = 1 is what the teacher calls wrong.
    # The value has a floor: at p = y it is the teacher's entropy, not 0. Where the teacher says
    # 0.5, a pixel costs at least 0.693 (ln 2), even if the student agrees. The gradient with
    # respect to the logit is p - y and does vanish there.
    y = teacher_probabilities.float()
    distance = F.binary_cross_entropy_with_logits(student_logits.float(), y, reduction="none")
    if valid is None:
        return distance.mean()
    return (distance * valid).sum() / valid.sum().clamp(min=1)


# --- 4. Delayed augmentation ---------------------------------------------------------------------
# If the student's input is rotated, its prediction is rotated too. The teacher predicts from the
# unrotated slice, so pixel by pixel the two predictions do not line up (paper, section 2.1).
# Giving both networks the same rotated slice lines them up, but then they do not have to agree on
# two different views of one cord. So the student's INPUT and the teacher's OUTPUT are warped, by
# the same phi. No gradient flows through the teacher: its output is a constant target, like a
# mask, and can be warped like one.
# Erratum: Algorithm 1 in the paper prints the teacher's prediction as f(theta', g(x; phi')). That
# would warp its input. The text of section 2.1 delays the warp, and this file follows the text.
# The teacher is perturbed only by its own noise (and Dropout).

def sample_affine(n, degrees, translation=0.0, scale=0.0, device=None):
    """Draw n random affine transformations phi, uniform in the given ranges.

    degrees: rotation in +- degrees; translation: +- px along both axes; scale: 1 +- scale.
    -> phi (n, 2, 3) float32. It maps coordinates in the result (x to the right, y down, px from
    the image's centre) to coordinates in the input. Source: paper, sections 2.1 and 3.1.
    """
    def uniform(limit):
        return torch.empty(n, device=device).uniform_(-limit, limit)

    # From output to input: the inverse of what happens to the picture.
    angle, zoom = torch.deg2rad(uniform(degrees)), 1 + uniform(scale)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = torch.stack([cos, -sin, uniform(translation), sin, cos, uniform(translation)], dim=1)
    return rows.view(n, 2, 3)


def warp(images, phi):
    """g(.; phi): resample images, masks or probabilities by an affine transformation.

    images (B, C, H, W) float, phi (B, 2, 3) in px as from sample_affine -> (B, C, H, W), float32.
    Bilinear, 0 outside the image. Threshold a warped mask at 0.5. Source: paper, section 2.1.
    """
    height, width = images.shape[-2:]
    # affine_grid uses coordinates from -1 to 1 along each side, whatever its length. Convert px;
    # without it, a rotation would shear an image that is not square.
    matrix = phi.clone()
    matrix[:, 0, 1] *= height / width
    matrix[:, 1, 0] *= width / height
    matrix[:, 0, 2] *= 2 / width
    matrix[:, 1, 2] *= 2 / height
    # Never in bfloat16: its 8 bits are too few for a position among 200 px.
    with torch.autocast(images.device.type, enabled=False):
        grid = F.affine_grid(matrix, images.shape, align_corners=False)
        return F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="zeros",
                             align_corners=False)


def augment(images, phi, noise=0.1):
    """What the student sees: g(x; phi) + noise.

    images (B, C, H, W), phi (B, 2, 3) in px, noise: its std in the unit of the images -> augmented
    (B, C, H, W) float32; inside (B, 1, H, W) bool, False where phi samples from outside the image,
    so that there is no target. Source: paper, section 2.1.
    """
    # Warp a channel of ones too: it drops below 1 where phi samples outside the image.
    ones = torch.ones_like(images[:, :1])
    warped = warp(torch.cat([images, ones], dim=1), phi)         # (B, C + 1, H, W)
    inside = warped[:, -1:] > 0.999
    # The noise comes after the warp. Before it, interpolation would average neighbouring pixels:
    # a std of 0.1 would shrink to 0.067, and the student would see less noise than the teacher.
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


# --- 5. Teacher and ramps ------------------------------------------------------------------------

def make_teacher(student):
    """A copy of the student that gets no gradient. Any nn.Module -> the same type.

    Each layer keeps its mode: one that is frozen in eval mode stays frozen. A teacher with random
    weights of its own (authors) would pull the student towards noise until the average has
    forgotten them. Source: paper, section 2.
    """
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(student, teacher, alpha):
    """theta' <- alpha theta' + (1 - alpha) theta, in place. alpha in [0, 1]. Source: paper, eq. 1.
    """
    # BatchNorm's running mean and variance are buffers, not parameters, and are NOT averaged. They
    # need not be: the teacher runs in train mode on every batch (with Dropout, too) and so keeps
    # running statistics of its own activations. The common bug is to skip the buffers AND run the
    # teacher in eval mode: its buffers then stay as they were copied, at mean 0 and variance 1 in
    # a new network. A teacher that must run in eval mode needs the student's buffers copied here.
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

    epoch: counted from 1. -> float in [0, 1], multiplies eta. In the last epoch it is 0, so of all
    weights only the teacher's change. Source: paper, section 3.1.
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
    W), U may be 0; step: number of steps before this one; weight: w; affine: degrees, translation,
    scale for sample_affine; noise: its std; amp: bfloat16 autocast. teacher None: the supervised
    baseline, which ignores unlabelled. -> dict of float32 scalars: loss, dice_loss,
    consistency_loss. Raises ValueError if a network is in eval mode. The caller counts step, ramps
    weight and sets alpha and the learning rate, as train() in section 9 does.
    """
    if not (student.training and (teacher is None or teacher.training)):
        raise ValueError("student and teacher must be in train mode, see update_teacher: call "
                         ".train() on both, also after every evaluation")
    logits, targets, valid = [], [], []
    # Labelled and unlabelled slices go through the networks separately, as in the authors' code.
    # In one pass, BatchNorm would mix both, and the unlabelled slices would change the supervised
    # gradient even at w = 0. Separately, w = 0 IS the supervised step, given the same random
    # draws. (Only the running statistics, which evaluation uses, see both kinds of slices.)
    for part, x in (("labelled", images), ("unlabelled", unlabelled)):
        if part == "unlabelled" and (teacher is None or len(x) == 0):
            continue
        phi = sample_affine(len(x), *affine, device=x.device)                         # line 2
        view, inside = augment(x, phi, noise)
        valid.append(inside)
        if part == "labelled":
            warped_masks = (warp(masks, phi) >= 0.5).float()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            if teacher is not None:
                targets.append(targets_of(teacher, x, phi, noise))                    # line 4
            logits.append(student(view))                                              # line 3
    loss = segmentation = dice_loss(torch.sigmoid(logits[0].float()), warped_masks)   # line 5
    disagreement = torch.zeros_like(loss)
    if teacher is not None:
        # Pixels from outside the image have no target and are ignored. (The Dice loss does not
        # need this: there the mask is 0, and the student soon predicts 0.)
        disagreement = consistency(torch.cat(logits), torch.cat(targets), torch.cat(valid))
        loss = segmentation + weight * disagreement                                   # lines 6, 7
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()                                                                  # line 8
    step += 1                                                                         # line 9
    if teacher is not None:
        # At first a plain mean of all students: alpha is 1/2, 2/3, 3/4, ... (authors), and 0.99
        # only at step 99. A constant 0.99 would keep the random first weights in the teacher for
        # some 100 steps. The switch to 0.999 at epoch 51 is gradual in the same way: with the
        # paper's 10 steps per epoch, alpha is 0.998 by then and reaches 0.999 only at step 999.
        update_teacher(student, teacher, min(1 - 1 / (step + 1), alpha))              # line 10
    return {"loss": loss.detach(), "dice_loss": segmentation.detach(),
            "consistency_loss": disagreement.detach()}


# --- 7. Data -------------------------------------------------------------------------------------
# The paper ends here. The rest of the file is what it takes to run it.
# Volumes become axial slices: rows run from anterior to posterior, columns from the subject's left
# to the right (neurological convention). All slices are on the device before the first step.

class InputError(Exception):
    """Bad input. The text names the file, what is wrong, what was expected and what to do."""


def require(condition, message):
    if not condition:
        raise InputError(message)


class Scan(NamedTuple):
    site: str                                            # SCGM: "site1"; other layouts: ""
    subject: str                                         # "site1-sc01"; BIDS: "sub-9709Ses1"
    name: str                                            # as subject; BIDS: "sub-9709Ses1_run-1"
    image: Path
    masks: dict                                          # rater or ANY -> file; {}: unlabelled

    @property
    def individual(self):
        # sub-9709Ses1 and sub-9709Ses2 are one individual.
        return re.sub(r"Ses\d+$", "", self.subject)


# The key of a mask whose file name has no rater
ANY = "any"


class Slices(NamedTuple):
    images: torch.Tensor                                 # (N, 1, H, W) float32, z-scored per slice
    masks: torch.Tensor                                  # as images, in {0, 1}; unlabelled: none
    where: list                                          # N times (site, scan, slice from 0)


def find_files(folder, pattern):
    """Files below a folder that match a glob pattern. -> sorted list of Path

    glob.glob follows links to folders and skips hidden files. Broken links stay in the list, so
    that reading them reports their names.
    """
    paths = [Path(folder, name) for name in glob.glob(pattern, root_dir=folder, recursive=True)]
    return sorted(path for path in paths if not path.is_dir())


def find_scgm(folder):
    """siteS-scNN-image.nii.gz at any depth, with siteS-scNN-mask-rR.nii.gz beside it."""
    scans = []
    for image in find_files(folder, "**/site?-sc[0-9][0-9]-image.nii.gz"):
        name = image.name.removesuffix("-image.nii.gz")
        scan = Scan(name[:5], name, name, image, {})
        # sc11 to sc20 are the challenge's test half: unlabelled, even if a mask lies beside them.
        if int(name[-2:]) <= 10:
            for mask in find_files(image.parent, f"{name}-mask-r?.nii.gz"):
                rater = mask.name.removesuffix(".nii.gz")[-1]
                scan.masks[rater] = mask
            if not scan.masks:
                print(f"warning: {image}: no {name}-mask-r* found; it is unlabelled")
        scans.append(scan)
    return scans


def find_bids(folder, contrasts, mask_names):
    """sub-*/**/anat/*_CONTRAST.nii.gz, with masks in derivatives/labels/ + the same folder.

    A mask's name is the image's name + _ + one of mask_names + anything. The first one is used.
    """
    scans, unmatched = [], []
    for contrast in contrasts:
        for image in find_files(folder, f"sub-*/**/anat/*_{glob.escape(contrast)}.nii.gz"):
            stem = image.name.removesuffix(".nii.gz")
            # Only magnitude images, and nothing that was derived from an image
            if re.search("_(part-phase|part-real|part-imag|desc-|label-|space-)", stem):
                continue
            place = image.parent.relative_to(folder)
            labels = folder / "derivatives/labels" / place
            masks = []
            for mask_name in mask_names:
                masks += find_files(labels, f"{glob.escape(f'{stem}_{mask_name}')}*.nii.gz")
            name = stem.removesuffix(f"_{contrast}")
            # Two contrasts of one subject need two names.
            if name in [scan.name for scan in scans]:
                name = stem
            scan = Scan("", place.parts[0], name, image, {})
            if masks:
                scan.masks[ANY] = masks[0]
            elif find_files(labels, "*.nii.gz"):
                unmatched.append(scan.name)
            scans.append(scan)
    # A mask under another name must not go unnoticed. One warning is enough.
    if unmatched:
        print(f"warning: {len(unmatched)} scans count as unlabelled, for example {unmatched[0]}: "
              "their folder in derivatives/labels has files, but none named as the image + _ + "
              f"{' or '.join(mask_names)} + anything; see --mask-name")
    return scans


def find_decathlon(folder):
    """imagesTr/NAME.nii.gz with labelsTr/NAME.nii.gz, and imagesTs without masks."""
    scans = []
    masks = {mask.name: mask for mask in find_files(folder, "labelsTr/*.nii.gz")}
    for image in find_files(folder, "imagesT[rs]/*.nii.gz"):
        name = image.name.removesuffix(".nii.gz")
        scan = Scan("", name, name, image, {})
        if image.parent.name == "imagesTr" and image.name in masks:
            scan.masks[ANY] = masks.pop(image.name)
        scans.append(scan)
    if scans and masks:
        print(f"warning: {len(masks)} masks in labelsTr belong to no image in imagesTr, for "
              f"example {min(masks)}; give a mask the name of its image")
    return scans


def find_scans(folder, contrasts=Config.contrast, mask_names=Config.mask_name):
    """List the scans below a folder, in any of three layouts. -> list of Scan; InputError if none.

    For the layouts see find_scgm, find_bids (contrasts: suffixes of the images; mask_names: what
    follows the image's name in a mask's) and find_decathlon.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"{folder}: no such folder; give the folder of your scans to --data")
    scans = find_scgm(folder) + find_bids(folder, contrasts, mask_names) + find_decathlon(folder)
    require(scans, f"{folder}: no scans found; expected site*-sc*-image.nii.gz, "
                   f"sub-*/**/anat/*_CONTRAST.nii.gz with CONTRAST {' or '.join(contrasts)} (see "
                   "--contrast), or imagesTr/*.nii.gz below it")
    return scans


def draw_subjects(scans, config):
    """The random split. -> dict: test, val, train -> set of subjects. InputError if too few."""
    chosen = {"test": set(), "val": set(), "train": set()}
    generator = np.random.default_rng(config.split_seed)
    # A site may have unlabelled scans only.
    sites = {scan.site for scan in scans if scan.masks}
    for site in sorted(sites) or [""]:
        labelled = [scan for scan in scans if scan.masks and scan.site == site]
        individuals = sorted({scan.individual for scan in labelled})
        require(len(individuals) >= sum(config.split),
                f"{len(individuals)} subjects with masks in {site or config.data}, too few for "
                f"--split {config.split}; lower it")
        order = list(generator.permutation(individuals))
        # Test subjects are drawn first, so that they do not depend on the number to train with.
        for name, count in zip(chosen, reversed(config.split)):
            drawn, order = order[:count], order[count:]
            chosen[name].update(scan.subject for scan in labelled if scan.individual in drawn)
    return chosen


def split_scans(scans, config):
    """Divide the scans into sets. -> dict of list of Scan: train, val, test, unlabelled.

    The first three are those named by --train, --val and --test or, without these options, a
    random --split of the subjects of each site. No individual is in two of them. Unlabelled are
    the remaining scans of the subjects named by --unlabelled, whoever these are. By default they
    are the remaining scans of all individuals that are not in the validation or test set; under a
    random split, only scans without a mask.
    """
    labelled = [scan for scan in scans if scan.masks]
    names = {name: set(getattr(config, name)) for name in ("train", "val", "test", "unlabelled")}
    for name, subjects in names.items():
        known = {scan.subject for scan in (scans if name == "unlabelled" else labelled)}
        require(subjects <= known, f"--{name}: no subject {' '.join(sorted(subjects - known))} "
                                   f"{'found' if name == 'unlabelled' else 'with a mask found'}")
    by_name = bool(names["train"] | names["val"] | names["test"])
    if by_name:
        require(config.train and config.test, "--train and --test must both be given")
    else:
        names.update(draw_subjects(scans, config))

    sets, individuals = {}, {}
    for name in ("train", "val", "test"):
        sets[name] = [scan for scan in labelled if scan.subject in names[name]]
        individuals[name] = {scan.individual for scan in sets[name]}
    for one, other in itertools.combinations(sets, 2):
        both = individuals[one] & individuals[other]
        require(not both, f"{' '.join(sorted(both))} is in --{one} and in --{other}; choose one")
    used = sets["train"] + sets["val"] + sets["test"]
    unused = [scan for scan in scans if scan not in used]
    if config.unlabelled:
        sets["unlabelled"] = [scan for scan in unused if scan.subject in names["unlabelled"]]
    else:
        held_out = individuals["val"] | individuals["test"]
        sets["unlabelled"] = [scan for scan in unused if scan.individual not in held_out
                              and (by_name or not scan.masks)]
    return sets


def load_nifti(path, spacing):
    """Read a 3-D NIfTI and check it. -> nibabel image in memory, float32

    InputError if it cannot be used, also if its slices would be too large at `spacing` mm.
    """
    try:
        # Let nibabel raise for voxel sizes <= 0, instead of repairing them and writing to its log.
        nib.imageglobals.logger.setLevel("CRITICAL")
        with nib.imageglobals.ErrorLevel(30):
            image = nib.load(path)
        require(isinstance(image, nib.Nifti1Image), "not a NIfTI file; convert it")
        # (X, Y, Z, 1) is three-dimensional.
        image = nib.squeeze_image(image)
        shape, unit = image.shape, image.header.get_xyzt_units()[0]
        dtype = image.get_data_dtype()
        require(dtype.kind in "biuf", f"{dtype} voxels, expected one real number each; convert it "
                                      "(complex: take the magnitude)")
        require(len(shape) == 3, f"{len(shape)} dimensions, expected 3; save one volume of it")
        require(0 < math.prod(shape) <= 2 ** 30,
                f"{' x '.join(map(str, shape))} voxels, expected 1 to 2^30; crop it")
        require(unit in ("mm", "unknown"), f"voxel sizes in {unit}, expected mm; convert it")
        zooms = image.header.get_zooms()
        sizes = [*nib.affines.voxel_sizes(image.affine), *zooms]
        require(min(sizes) > 0.01 and max(sizes) < 100
                and np.isfinite(nib.io_orientation(image.affine)).all(),     # NaN: singular
                f"implausible voxel sizes {[round(float(mm), 3) for mm in sizes]} mm, or a "
                "singular affine; correct its header")
        in_plane = nib.io_orientation(image.affine)[:, 0] < 2
        side = np.multiply(shape, zooms)[in_plane].max() / spacing
        require(side <= 2 ** 13, f"{side:.0f} px along a side at --spacing {spacing} mm, expected "
                                 "8192 at most; check --spacing and the voxel sizes")
        volume = image.get_fdata(dtype=np.float32)
        require(np.isfinite(volume).all(), "NaN or infinite voxels; replace them")
        return nib.Nifti1Image(volume, image.affine, image.header)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        # nibabel's readers raise a dozen types.
        raise InputError(f"{path}: cannot be read as NIfTI ({type(error).__name__}: {error}); "
                         "download or convert it again") from error


def canonical(image):
    """Turn a nibabel image to RAS. -> array (X, Y, Z) float32, voxel sizes in mm."""
    image = nib.as_closest_canonical(image)
    return image.get_fdata(dtype=np.float32), nib.affines.voxel_sizes(image.affine)


def read_mask(scan, config, image):
    """The foreground of a scan. -> nibabel image in {0, 1}, on the voxel grid of the scan's image.

    InputError if the mask is on another grid or has values other than whole numbers from 0 to 255.
    A corner may be off by a quarter of a voxel: published masks differ from their images in the
    header's fourth decimal.
    """
    rater = ANY if ANY in scan.masks else config.rater
    require(rater in scan.masks, f"{scan.image}: no mask of rater {rater}; choose another --rater")
    path = scan.masks[rater]
    mask = load_nifti(path, config.spacing)
    # Store the mask along the image's own axes. Turning each to RAS by its own affine would fail
    # near 45 degrees, where a rounding error decides which axis is closest.
    to_image = np.linalg.inv(image.affine)
    mask = mask.as_reoriented(nib.io_orientation(to_image @ mask.affine))
    # The corners in voxels, and where the mask's lie
    corners = np.array(list(itertools.product(*[(-0.5, n - 0.5) for n in image.shape])))
    moved = nib.affines.apply_affine(to_image @ mask.affine, corners)
    require(mask.shape == image.shape and np.abs(moved - corners).max() <= 0.25,
            f"{path}: is not on the grid of its image, {image.shape}; resample it")
    values = mask.get_fdata(dtype=np.float32)
    # Re-saved files can have rounding errors.
    rounded = np.rint(values)
    bad = (np.abs(values - rounded) > 0.02) | (rounded < 0) | (rounded > 255)
    require(not bad.any(), f"{path}: has values {np.unique(values[bad])[:4].round(3)}, expected "
                           "whole numbers from 0 to 255; threshold or convert it")
    foreground = np.isin(rounded, config.label).astype(np.float32)
    return nib.Nifti1Image(foreground, image.affine)


def center_crop(slices, height, width):
    """Crop (N, 1, H, W) around its centre, or pad it with 0, to (N, 1, height, width).

    Cropping back to H x W undoes a padding, and puts a crop back in its place.
    """
    # int(), not //, so that padding and cropping round alike
    top = int((slices.shape[2] - height) / 2)
    left = int((slices.shape[3] - width) / 2)
    bottom = slices.shape[2] - height - top
    right = slices.shape[3] - width - left
    # A negative padding crops.
    return F.pad(slices, (-left, -right, -top, -bottom))


def resampled_size(volume, voxel_mm, spacing):
    """Height and width in px of an axial slice of (X, Y, Z), resampled to `spacing` mm."""
    height = max(1, round(float(volume.shape[1] * voxel_mm[1] / spacing)))
    width = max(1, round(float(volume.shape[0] * voxel_mm[0] / spacing)))
    return height, width


def to_slices(volume, voxel_mm, config):
    """Axial slices of a volume (X, Y, Z), resampled, then cropped. -> (Z, 1, H, W) float32.

    H, W: the crop, or the image where that is smaller. Linear interpolation, antialiased when
    shrinking. Slices are processed one by one, because whole resampled volumes can be larger than
    the memory. Source: "resampled to 0.25 x 0.25 mm", paper, section 3.1.
    """
    height, width = resampled_size(volume, voxel_mm, config.spacing)
    slices = []
    for z in range(volume.shape[2]):
        plane = torch.from_numpy(volume[:, ::-1, z].T.copy())
        plane = plane[None, None]        # (1, 1, Y, X)
        plane = F.interpolate(plane, size=(height, width), mode="bilinear", antialias=True)
        slices.append(center_crop(plane, min(height, config.crop), min(width, config.crop)))
    return torch.cat(slices)


def normalise(slices):
    """Z-score each slice of (N, 1, H, W), since every scanner has its own intensity scale.

    Before the padding: the zeros around a small image must not count in mean and std. A slice
    without contrast becomes 0. -> float32
    """
    # In float32, an offset of 10^4 would cost digits.
    slices = slices.double()
    std, mean = torch.std_mean(slices, (2, 3), correction=0, keepdim=True)
    largest = slices.abs().amax((2, 3), keepdim=True)
    # Contrast is more than rounding errors.
    has_contrast = std > 1e-6 * largest
    return torch.where(has_contrast, (slices - mean) / std, 0).float()


def read_images(image, config):
    """The z-scored slices of a nibabel image. -> (Z, 1, crop, crop) float32"""
    slices = normalise(to_slices(*canonical(image), config))
    # This pads slices that are smaller than the crop.
    return center_crop(slices, config.crop, config.crop)


def read_scan(scan, config, labelled):
    """The slices of one scan -> Slices. The masks of an unlabelled scan are not even opened.

    Slices without contrast are dropped and, in a labelled scan, those without foreground: the
    paper's counts of slices fit that.
    """
    image = load_nifti(scan.image, config.spacing)
    images = read_images(image, config)
    keep = images.flatten(1).any(1)
    masks = images[:0]
    if labelled:
        volume, voxel_mm = canonical(read_mask(scan, config, image))
        masks = (to_slices(volume, voxel_mm, config) >= 0.5).float()
        masks = center_crop(masks, config.crop, config.crop)
        warn_if_cropped(scan.image, volume, voxel_mm, config)
        keep &= masks.flatten(1).any(1)
        masks = masks[keep]
    if not keep.any():
        print(f"warning: {scan.image}: not used: inside the crop, no slice has contrast" +
              (f" and a voxel of --label {config.label} in its mask" if labelled else ""))
    where = [(scan.site, scan.name, int(z)) for z in keep.nonzero()]
    return Slices(images[keep], masks, where)


def warn_if_cropped(path, mask, voxel_mm, config):
    """Print a warning if more than 1 % of a mask (X, Y, Z) is outside the centre crop."""
    positions = np.argwhere(mask)[:, :2]         # (N, 2), X, Y
    centre = (np.array(mask.shape[:2]) - 1) / 2
    millimetres = np.abs(positions - centre) * voxel_mm[:2]
    outside = (millimetres > config.crop * config.spacing / 2).any(1).sum()
    if outside > 0.01 * len(positions):
        print(f"warning: {path}: {outside / len(positions):.0%} of its foreground is outside the "
              f"centre crop of {config.crop} px of {config.spacing} mm; raise --crop")


def load_data(config, device="cpu"):
    """Read all that an experiment needs. -> dict of Slices: train, val, test, unlabelled."""
    folder = Path(config.data or phantom_folder())
    if not config.data and not folder.exists():
        write_phantom(folder)
    scans = find_scans(folder, config.contrast, config.mask_name)
    print(f"{folder}: {len(scans)} scans, {sum(bool(scan.masks) for scan in scans)} with masks")
    nothing = torch.zeros(0, 1, config.crop, config.crop)
    data, faults = {}, []
    for name, members in split_scans(scans, config).items():
        images, masks, where = [nothing], [nothing], []
        for scan in members:
            try:
                slices = read_scan(scan, config, labelled=name != "unlabelled")
            except InputError as error:
                # All faults are reported at once.
                faults.append(str(error))
                continue
            images.append(slices.images)
            masks.append(slices.masks)
            where += slices.where
        data[name] = Slices(torch.cat(images).to(device), torch.cat(masks).to(device), where)
        print(f"{name:>10}: {len(where):4d} slices of {len(members):2d} scans")
    require(not faults, "; ".join(faults))
    require(data["train"].where and data["test"].where,
            f"{folder}: no foreground in the training or test set; check --crop and --label")
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
    metrics = {"dice": 2 * tp / (2 * tp + fp + fn),
               "miou": tp / (tp + fp + fn),
               "accuracy": (tp + tn) / (tp + fp + fn + tn),
               "precision": tp / (tp + fp),
               "recall": tp / (tp + fn),
               "specificity": tn / (tn + fp)}
    # 0 / 0 is NaN here and becomes 0.
    return {name: 100 * ratio.nan_to_num() for name, ratio in metrics.items()}


@torch.no_grad()
def predict_probabilities(model, images, batch=32):
    """Probability of foreground, in eval mode. (N, 1, H, W) z-scored -> the same shape."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    probabilities = []
    for part in images.split(batch):
        probabilities.append(torch.sigmoid(model(part).float()))
    # model.train() would also switch frozen layers.
    for module, mode in modes.items():
        module.training = mode
    return torch.cat(probabilities)


def evaluate(model, slices, config):
    """segmentation_metrics of a network on Slices. -> dict of list of N floats in percent."""
    predictions = predict_probabilities(model, slices.images) > config.threshold
    metrics = segmentation_metrics(predictions, slices.masks)
    return {name: values.tolist() for name, values in metrics.items()}


# --- 9. The training loop ------------------------------------------------------------------------

def build_network(config):
    """The one place where the network is built: put your own here, one channel in and one out."""
    return UNet(config.width, config.dropout)


def build(config, method, device):
    """Build student, teacher (None for the supervised baseline) and optimiser."""
    # Channels-last memory is fastest on tensor cores, and makes a CPU 1.1 to 1.4 times as fast.
    # On MPS, BatchNorm computes wrong values from it (PyTorch issues 175189 and 188371).
    layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
    student = build_network(config).to(device, memory_format=layout)
    teacher = make_teacher(student) if method == "mean_teacher" else None
    # The paper's L2 penalty is Adam's own weight_decay. AdamW's is a different method.
    decay = config.weight_decay[-1 if method == "mean_teacher" else 0]
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr, betas=(0.9, 0.999),
                                 weight_decay=decay, fused=True)
    return student, teacher, optimizer


@torch.no_grad()
def same_input_targets(teacher, images, phi, noise):
    """For --augmentation same: the teacher also sees a warped slice, and nothing is delayed."""
    warped = warp(images, phi)
    return torch.sigmoid(teacher(warped + noise * torch.randn_like(images)).float())


def mse_consistency(student_logits, teacher_probabilities, valid):
    """For --consistency mse: mean squared difference over the valid pixels."""
    squares = (torch.sigmoid(student_logits.float()) - teacher_probabilities) ** 2
    return (squares * valid).sum() / valid.sum().clamp(min=1)


def step_options(config, device):
    """The arguments of train_step that stay the same for a whole run. -> dict"""
    distance = consistency_loss if config.consistency == "bce" else mse_consistency

    def consistency(logits, targets, valid):
        confident = torch.maximum(targets, 1 - targets) >= config.confidence
        return distance(logits, targets, valid & confident)

    # bfloat16 only where the GPU computes in it: older ones (T4, V100) emulate it slowly, or fail.
    amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"affine": (config.degrees, config.translation, config.scale),
            "noise": config.noise,
            "amp": amp,
            "consistency": consistency,
            "targets_of": same_input_targets if config.augmentation == "same" else delayed_targets}


def batch_sizes(config, method, data):
    """-> numbers of labelled and unlabelled slices in a mini-batch; InputError if too small."""
    n_labelled = min(config.batch, len(data["train"].images))
    n_unlabelled = 0
    if method == "mean_teacher" and len(data["unlabelled"].images):
        n_unlabelled = config.unlabelled_batch
    require(config.crop > 8 or (n_labelled != 1 and n_unlabelled != 1),
            "--crop 8 and a batch of one slice leave one value per channel at the bottom of the "
            "U-Net, which BatchNorm cannot normalise; raise --crop, --batch or --unlabelled-batch")
    return n_labelled, n_unlabelled


def shuffled(n, count, device):
    """The first `count` indices of consecutive random permutations of range(n)."""
    orders = [torch.randperm(n, device=device) for _ in range(math.ceil(count / n))]
    return torch.cat(orders)[:count]


def batches(data, steps, n_labelled, n_unlabelled):
    """The mini-batches of one epoch. data: as from load_data.

    Yields `steps` times images (n_labelled, 1, H, W), masks of that shape, and unlabelled images
    (n_unlabelled, 1, H, W). Unlike a zip of two loaders, which ends with the shorter one, it goes
    on with a new order when a set is used up.
    """
    labelled, unlabelled = data["train"], data["unlabelled"]
    device = labelled.images.device
    labelled_order = shuffled(len(labelled.images), steps * n_labelled, device)
    unlabelled_order = labelled_order[:0]
    if n_unlabelled:
        unlabelled_order = shuffled(len(unlabelled.images), steps * n_unlabelled, device)
    for i in range(steps):
        x = labelled_order[i * n_labelled:(i + 1) * n_labelled]
        u = unlabelled_order[i * n_unlabelled:(i + 1) * n_unlabelled]
        yield labelled.images[x], labelled.masks[x], unlabelled.images[u]


def train(config, method, seed, data):
    """Train one network (and its teacher), and evaluate the last epoch on the test set.

    method: supervised or mean_teacher; data: from load_data, on the device. Saves the files
    METHOD-seedS.pt and .csv in config.out and continues from them if they exist; on a CPU, an
    interrupted run ends bit for bit like an uninterrupted one. -> dict: history (a dict per
    epoch), metrics[model][metric] (a list over the test slices), the state_dicts student, teacher.
    """
    semi = method == "mean_teacher"
    epochs = config.epochs[-1 if semi else 0]
    n_labelled, n_unlabelled = batch_sizes(config, method, data)
    steps = config.steps or epochs * (len(data["train"].images) // n_labelled)
    device = data["train"].images.device
    print(f"\n{method}, seed {seed}: {steps} steps in {epochs} epochs, {n_labelled} labelled + "
          f"{n_unlabelled} unlabelled slices per step, on {device.type}")
    warn_of_short_ramps(config, epochs, semi)
    print(" epoch    step   Dice loss   consistency   val. Dice: student   teacher   minutes left")
    # This seed decides the initial weights.
    torch.manual_seed(1_000_000 * seed)
    student, teacher, optimizer = build(config, method, device)
    models = {"student": student, "teacher": teacher} if semi else {"student": student}
    options = step_options(config, device)
    path = Path(config.out, f"{method}-seed{seed}.pt")
    checkpoint = {"config": vars(config), "method": method, "seed": seed, "history": []}
    if path.exists():
        checkpoint = resume(path, method, seed, models, optimizer)
    history = checkpoint["history"]
    start, first_epoch = time.perf_counter(), len(history) + 1

    for epoch in range(first_epoch, epochs + 1):
        # Batches, phi, noise and Dropout. Reseeding at every epoch means that a checkpoint needs
        # no RNG state.
        torch.manual_seed(1_000_000 * seed + epoch)
        lr = config.lr * learning_rate_factor(epoch, epochs, config.lr_ramp)
        optimizer.param_groups[0]["lr"] = lr
        weight = config.consistency_weight * ramp_up(epoch, config.consistency_ramp)
        alpha = config.alpha if epoch <= config.alpha_epochs else config.alpha_late

        # This epoch's share of the steps; without --steps, one pass over the labelled slices
        step, last_step = steps * (epoch - 1) // epochs, steps * epoch // epochs
        dice_losses, consistency_losses = [], []
        for x, y, u in batches(data, last_step - step, n_labelled, n_unlabelled):
            losses = train_step(student, teacher, optimizer, x, y, u, step, weight, alpha,
                                **options)
            dice_losses.append(losses["dice_loss"])
            consistency_losses.append(losses["consistency_loss"])
            step += 1

        row = {"epoch": epoch, "step": step, "lr": lr, "weight": weight,
               "dice_loss": torch.stack(dice_losses).mean().item(),      # waits for the device
               "consistency_loss": torch.stack(consistency_losses).mean().item(),
               "val_student": math.nan, "val_teacher": math.nan}
        if not semi:
            row["weight"] = row["consistency_loss"] = math.nan
        history.append(row)
        if epoch in (1, epochs) or epoch % config.validate_every == 0:
            for name, model in models.items():
                if data["val"].where:
                    val_dice = evaluate(model, data["val"], config)["dice"]
                    row[f"val_{name}"] = float(np.mean(val_dice))
                checkpoint[name] = model.state_dict()
            if epoch == epochs:
                checkpoint["metrics"] = {name: evaluate(model, data["test"], config)
                                         for name, model in models.items()}
            checkpoint["optimizer"] = optimizer.state_dict()
            save_csv(path.with_suffix(".csv"), history)
            save(path, lambda file: torch.save(checkpoint, file))
            seconds_per_epoch = (time.perf_counter() - start) / (epoch - first_epoch + 1)
            print_progress(row, seconds_per_epoch * (epochs - epoch))
    return checkpoint


def resume(path, method, seed, models, optimizer):
    """Give networks and optimiser the state that train() saved. -> checkpoint"""
    checkpoint = load_checkpoint(path)
    require((checkpoint["method"], checkpoint["seed"]) == (method, seed),
            f"{path}: holds {checkpoint['method']}, seed {checkpoint['seed']}; rename it")
    for name, model in models.items():
        model.load_state_dict(checkpoint[name])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint


def warn_of_short_ramps(config, epochs, semi):
    """Warn if the training ends before a ramp-up is complete, with the value that is reached."""
    ramps = [("learning rate", config.lr, config.lr_ramp)]
    if semi:
        ramps.append(("weight w", config.consistency_weight, config.consistency_ramp))
    for name, full, length in ramps:
        if epochs < length:
            print(f"warning: {epochs} epochs end before the ramp-up of {length} epochs: the "
                  f"{name} reaches {full * ramp_up(epochs, length):.2g} instead of {full:g}")


def print_progress(row, seconds):
    """One line about an epoch, under the header that train() prints. row: of the history."""
    line = f"{row['epoch']:6d} {row['step']:7d} {row['dice_loss']:11.4f}"
    # NaN here means that there is no such value.
    optional = f" {row['consistency_loss']:13.4f}"
    optional += f" {row['val_student']:20.2f}"
    optional += f" {row['val_teacher']:9.2f}"
    line += optional.replace("nan", "  -")
    print(f"{line} {seconds / 60:14.1f}", flush=True)


def save(path, write):
    """Write a file atomically: write(file) fills a temporary file, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps apart two processes that write the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            # The content must be on the disk before the file gets its name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # It exists only if something failed.
        temporary.unlink(missing_ok=True)


def save_csv(path, rows):
    """Write dicts with the same keys as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    save(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))


def load_checkpoint(path):
    """Read what train() saved; no code in it is run. -> dict; InputError for other files"""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = Config(**checkpoint["config"]), checkpoint["student"]
        require({"method", "seed", "history"} <= checkpoint.keys(), "parts are missing")
    except FileNotFoundError:
        raise
    except Exception as error:
        # Unpickling can raise almost anything.
        raise InputError(f"{path}: not a checkpoint of this version ({type(error).__name__}: "
                         f"{error}); give another file") from error
    network = build_network(config)
    try:
        network.load_state_dict(weights)
    except Exception as error:
        raise InputError(f"{path}: holds another network than build_network() makes ({error}); "
                         "restore that function, or train with another --out") from error
    return checkpoint


def load_network(checkpoint, name):
    """The student or the teacher of a checkpoint. -> network in eval mode"""
    network = build_network(Config(**checkpoint["config"]))
    network.load_state_dict(checkpoint[name])
    return network.eval()


# --- 10. Experiment: methods x runs, table, pictures ---------------------------------------------

METHODS = ("supervised", "mean_teacher")
LABELS = {("supervised", "student"): "supervised",
          ("mean_teacher", "student"): "mean teacher (student)",
          ("mean_teacher", "teacher"): "mean teacher (teacher)"}
# The Okabe-Ito palette, which is safe for colour-blind readers
COLORS = {"rater": "#009e73", "supervised": "#d55e00",
          "mean teacher (student)": "#56b4e9", "mean teacher (teacher)": "#0072b2"}


def experiment(config, overwrite=False):
    """Train every method with every seed, evaluate, report. -> dict: scores, difference, table.

    scores[row][metric]: a list over seeds of the mean over test slices, percent; difference: the
    teacher's Dice minus the supervised network's, mean and standard error over seeds, or None.
    Under torchrun the processes share the seeds; the one that ends last reports, the others return
    None. InputError if config.out holds runs of other settings or slices.
    """
    device = pick_device(config.device)
    methods = METHODS if config.method == "both" else (config.method,)
    seeds = range(config.seed, config.seed + config.runs)
    # All data are read before the first training, so that every fault is found at once.
    # data: seed of a run -> its data; slices: name of a split -> set -> where
    data, slices = {}, {}
    for seed in seeds:
        if config.split_seed == -1:
            data[seed] = load_data(dataclasses.replace(config, split_seed=seed), device)
        else:
            data[seed] = data[config.seed] if data else load_data(config, device)
        split_name = f"split {seed if config.split_seed == -1 else config.split_seed}"
        slices[split_name] = {name: part.where for name, part in data[seed].items()}
        for method in methods:
            batch_sizes(config, method, data[seed])
    # GPUs train separate runs in parallel: a batch of 16 small slices does not fill even one.
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    out = Path(config.out)
    if overwrite:
        require(world == 1, "--overwrite: not under torchrun; delete the old folder yourself")
        remove_runs(out)
    save_config(out, config, slices)
    for seed in seeds[rank::world]:
        for method in methods:
            train(config, method, seed, data[seed])

    checkpoints = []
    for method, seed in itertools.product(methods, seeds):
        path = out / f"{method}-seed{seed}.pt"
        checkpoint = load_checkpoint(path) if path.exists() else {}
        if "metrics" not in checkpoint:
            print(f"{path}: not finished yet; the last process reports")
            return None
        checkpoints.append(checkpoint)
    return report(config, checkpoints, data)


def remove_runs(out):
    """Delete the runs and results in a folder, for --overwrite."""
    for pattern in ("*-seed*.pt", "*-seed*.csv", "config.json", "metrics.csv", "table.md",
                    "curves.png", "examples.png"):
        for path in out.glob(pattern):
            path.unlink()


def save_config(out, config, slices):
    """Write config.json. InputError if the folder has runs of other settings or slices.

    slices: dict: split -> set -> list of (site, scan, slice)
    """
    path, advice = out / "config.json", "choose another --out, or use --overwrite to replace them"
    require(path.exists() or not list(out.glob("*-seed*.pt")),
            f"{out}: has runs but no config.json; {advice}")
    # As it comes back from the file: tuples become lists.
    record = json.loads(json.dumps({"config": vars(config), "slices": slices}))
    differs = []
    try:
        old = json.loads(path.read_text()) if path.exists() else record
        for name, value in record["config"].items():
            # Runs, seeds and methods can be added, data can be moved, the device can change.
            free = name in ("data", "out", "method", "runs", "seed", "device")
            if old["config"].get(name) != value and not free:
                differs.append(name)
        for split_name in old["slices"].keys() & slices.keys():
            if old["slices"][split_name] != record["slices"][split_name]:
                differs.append(f"the slices of {split_name}")
        record["slices"] = old["slices"] | record["slices"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error!r}); {advice}") from error
    require(not differs, f"{out}: has runs with other {', '.join(differs)}; {advice}")
    save(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    # Temporary files that killed processes have left
    for part in out.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime > 3600:
                part.unlink()
        except FileNotFoundError:
            # Another process has deleted it.
            pass


def pick_device(name="auto"):
    """Turn --device into a torch.device. Under torchrun, each process gets a GPU of its own."""
    try:
        if name == "auto":
            name = "cpu"
            if torch.accelerator.is_available():
                name = torch.accelerator.current_accelerator().type
        # If there are more processes than GPUs, some share one.
        if name == "cuda":
            rank = int(os.environ.get("LOCAL_RANK", 0))
            torch.cuda.set_device(rank % max(1, torch.cuda.device_count()))
        one = torch.ones(1, device=name)
        # This fails on devices that do not compute.
        one.item()
        return one.device
    except Exception as error:
        raise InputError(f"--device {name}: not available ({error}); try cpu") from error


def report(config, checkpoints, data):
    """Write table, per-slice metrics and pictures. data: seed of a run -> its data. -> dict

    The dict is that of experiment().
    """
    out, scores, rows = Path(config.out), {}, []
    for checkpoint in checkpoints:
        method, seed = checkpoint["method"], checkpoint["seed"]
        for model, metrics in checkpoint["metrics"].items():
            row_scores = scores.setdefault(LABELS[method, model], {name: [] for name in METRICS})
            for name in METRICS:
                row_scores[name].append(float(np.mean(metrics[name])))
            for k, (site, scan, z) in enumerate(data[seed]["test"].where):
                row = {"method": method, "seed": seed, "model": model,
                       "site": site, "subject": scan, "slice": z}
                row.update((name, metrics[name][k]) for name in METRICS)
                rows.append(row)
    table, difference = make_table(scores)
    save_csv(out / "metrics.csv", rows)
    save(out / "table.md", lambda file: file.write(table.encode()))
    test_slices = data[config.seed]["test"]
    pictures = {"curves.png": draw_curves(checkpoints),
                "examples.png": draw_examples(config, checkpoints, test_slices)}
    for name, figure in pictures.items():
        save(out / name, lambda file: figure.savefig(file, dpi=110))
    print(f"\n{table}\nTable, per-slice metrics, checkpoints and pictures are in {out}")
    return {"scores": scores, "difference": difference, "table": table}


def make_table(scores):
    """Mean (std) over runs as Markdown, like the paper's Table 1. -> text, difference

    For scores and difference see experiment().
    """
    runs = len(next(iter(scores.values()))["dice"])
    table = (f"| {f'test, %; runs: {runs}':22} |         Dice |         mIoU |     Accuracy "
             "|    Precision |       Recall |  Specificity |\n|:-----------------------"
             + "|-------------:" * 6 + "|\n")
    for label, metrics in scores.items():
        table += f"| {label:22} |"
        for values in metrics.values():
            std = f" ({np.std(values, ddof=1):.2f})" if runs > 1 else ""
            table += f" {f'{np.mean(values):.2f}{std}':>12} |"
        table += "\n"
    # With one method there is no difference.
    if len(scores) < 3:
        return table, None
    pairs = np.subtract(scores["mean teacher (teacher)"]["dice"], scores["supervised"]["dice"])
    error, text = math.nan, "one run: no standard error"
    if runs > 1:
        error = float(np.std(pairs, ddof=1)) / math.sqrt(runs)
        text = f"standard error {error:.2f}, paired over {runs} runs"
    table += f"\nTeacher minus supervised: {pairs.mean():+.2f} Dice ({text})\n"
    return table, (float(pairs.mean()), error)


def draw_curves(checkpoints):
    """Losses and validation Dice against the training step, one line per run. -> Figure"""
    panels = [("dice_loss", "student", "Dice loss (paper, eq. 3)"),
              ("consistency_loss", "student", "Consistency loss per pixel (eq. 2)"),
              ("val_student", "student", "Validation Dice, %"),
              ("val_teacher", "teacher", "Validation Dice, %")]
    figure = Figure(figsize=(13, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for (column, model, title), axis in zip(panels, [*axes, axes[2]]):
        axis.set(title=title, xlabel="training step")
        for checkpoint in checkpoints:
            rows = [row for row in checkpoint["history"] if not math.isnan(row[column])]
            if rows:
                label = LABELS[checkpoint["method"], model]
                first_run = checkpoint["seed"] == checkpoints[0]["seed"]
                axis.plot([row["step"] for row in rows], [row[column] for row in rows],
                          "--" if model == "teacher" else "-", color=COLORS[label],
                          label=label if first_run else None)
    axes[0].legend()
    # Without validation subjects there are no lines.
    if axes[2].lines:
        axes[2].legend()
    return figure


def draw_examples(config, checkpoints, slices):
    """Outlines of the rater's mask and of each method's first run on test slices. -> Figure"""
    columns = {"image": torch.zeros_like(slices.masks), "rater": slices.masks}
    for checkpoint in checkpoints:
        if checkpoint["seed"] == config.seed:
            model = "teacher" if "teacher" in checkpoint else "student"
            network = load_network(checkpoint, model).to(slices.images.device)
            probabilities = predict_probabilities(network, slices.images)
            columns[LABELS[checkpoint["method"], model]] = probabilities > config.threshold
    # At most four slices, evenly spaced
    picked = range(0, len(slices.where), math.ceil(len(slices.where) / 4))
    figure = Figure(figsize=(3 * len(columns), 3.3 * len(picked)), layout="constrained")
    for row, k in zip(figure.subplots(len(picked), len(columns), squeeze=False), picked):
        # Grey levels for the structure, not for bright fat around it
        image = slices.images[k, 0].cpu()
        around = F.max_pool2d(slices.masks[k], 9, stride=1, padding=4)[0].cpu() > 0
        low, high = image[around].quantile(torch.tensor([0.02, 0.98])).tolist()
        margin = (high - low) / 2
        for axis, (label, masks) in zip(row, columns.items()):
            axis.imshow(image.numpy(), cmap="gray", vmin=low - margin, vmax=high + margin)
            dice = segmentation_metrics(masks[k:k + 1], slices.masks[k:k + 1])["dice"].item()
            axis.set(xticks=[], yticks=[], title=label, xlabel=f"Dice {dice:.1f} %")
            if masks[k].any():
                axis.contour(masks[k, 0].cpu().numpy(), [0.5], colors=COLORS[label])
        _, scan, z = slices.where[k]
        # Names can have a $, which would start a formula.
        row[0].set_xlabel(f"{scan}, slice {z}", parse_math=False)
    return figure


# --- 11. Predict ---------------------------------------------------------------------------------

def predict_volume(image, network, config, name="image"):
    """Probability of foreground for every voxel of a nibabel image, on the image's own grid.

    network: as trained with config, whose spacing and crop are used -> array of image.shape,
    float32 in [0, 1]; 0 outside the crop. Warns if the mask is empty or touches the crop's border.
    """
    images = read_images(image, config)  # (Z, 1, crop, crop)
    device = next(network.parameters()).device
    probabilities = predict_probabilities(network, images.to(device)).cpu()
    # Nothing is foreground in an empty slice.
    probabilities *= images.flatten(1).any(1).view(-1, 1, 1, 1)
    mask = probabilities > config.threshold
    if not mask.any() or mask.sum() > mask[..., 1:-1, 1:-1].sum():
        what = "foreground at the border of" if mask.any() else "no foreground in"
        print(f"warning: {name}: {what} the centre crop of {config.crop} px of "
              f"{config.spacing} mm")
    volume, voxel_mm = canonical(image)
    size = resampled_size(volume, voxel_mm, config.spacing)
    result = np.zeros_like(volume)       # (X, Y, Z), RAS
    # Undo to_slices, slice by slice.
    for z in range(volume.shape[2]):
        plane = center_crop(probabilities[z:z + 1], *size)
        plane = F.interpolate(plane, size=volume.shape[1::-1], mode="bilinear", antialias=True)
        result[:, :, z] = plane[0, 0].flip(0).T.numpy()
    ras, stored = nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(image.affine)
    return nib.apply_orientation(result, nib.orientations.ornt_transform(ras, stored))


def predict(argv):
    """Segment one scan with the teacher of a run. -> path of the mask

    The mask is on the scan's own grid, whatever its orientation and voxel size. A supervised run
    has no teacher: its only network is used.
    """
    parser = Parser(prog="mean_teacher_seg.py predict", description="Segment one scan.")
    parser.add_argument("image", type=Path, help="the scan, a NIfTI file")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .pt file of a run")
    parser.add_argument("--output", type=Path, required=True, help="the mask to write, .nii[.gz]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing mask")
    given = parser.parse_args(argv)
    output = given.output
    require(output.name.endswith((".nii", ".nii.gz")),
            f"{output}: expected a name that ends in .nii or .nii.gz")
    require(not output.exists() or not output.samefile(given.image),
            f"{output}: is the scan itself; give another --output")
    require(given.overwrite or not output.exists(),
            f"{output}: already exists; use --overwrite to replace it")
    checkpoint = load_checkpoint(given.checkpoint)
    config = Config(**checkpoint["config"])
    model = "teacher" if "teacher" in checkpoint else "student"
    network = load_network(checkpoint, model).to(pick_device())
    image = load_nifti(given.image, config.spacing)
    foreground = predict_volume(image, network, config, given.image) > config.threshold
    # The header of the scan keeps its geometry, codes and units.
    mask = nib.Nifti1Image(foreground.astype(np.uint8), image.affine, image.header, dtype=np.uint8)
    # These hold the scan's display window, which does not fit a mask.
    mask.header["cal_min"] = mask.header["cal_max"] = 0
    content = mask.to_bytes()
    if output.suffix == ".gz":
        # Without a time stamp, equal masks are equal files.
        content = gzip.compress(content, mtime=0)
    save(output, lambda file: file.write(content))
    print(f"{output}: {foreground.sum()} voxels of foreground")
    return output


# --- 12. The phantom -----------------------------------------------------------------------------
# You can skip this section: nothing of the method is in it. It paints a synthetic study, 4 sites x
# 20 subjects of cervical spinal cord, in the layout and file names of the challenge. Each
# draw(low, high) is one property of one subject. Its range was adjusted until contrast, sizes and
# spread between subjects measured like those of six real scans. Distances are in mm, brightness
# is relative to white matter.
# mm, thick: voxel size in and across the plane; size: matrix, px; slices: fewest and most;
# black: additional empty slices at each end; unit: integer stored for white matter; axes: as
# stored.
Site = collections.namedtuple("Site", "mm thick size slices black unit axes")
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
    grey = -torch.logsumexp(torch.stack([-6 * ventral, -6 * dorsal, -6 * bridge]), 0) / 6
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
        one, two = F.interpolate(corners, [site.size] * 2, mode="bicubic", align_corners=True)
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
    # Each simulated rater has one smooth error, so that two agree to a Dice of 0.82.
    for mask in masks:
        error = 0.175 * noise(2.5)
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
                    for rater in range(1, 5):
                        files[f"mask-r{rater}"] = masks[rater - 1]
                affine = np.diag([site.mm, site.mm, site.thick, 1])
                for name, voxels in files.items():
                    nifti = nib.Nifti1Image(voxels.permute(2, 1, 0).numpy(), affine)
                    nifti = nifti.as_reoriented(nib.orientations.axcodes2ornt(site.axes))
                    nib.save(nifti, f"{unfinished}/site{s}-sc{subject:02d}-{name}.nii.gz")
        os.chmod(unfinished, 0o755)
        try:
            os.rename(unfinished, folder)
        except OSError:
            # If the folder exists, another process has written it first.
            if not folder.is_dir():
                raise


# --- 13. Command line ----------------------------------------------------------------------------

# The groups of --help: the first field of each, and its title.
GROUPS = {"data": "what to run", "spacing": "data", "width": "network", "epochs": "optimisation",
          "consistency_weight": "mean teacher", "degrees": "augmentation",
          "threshold": "evaluation"}


class Parser(argparse.ArgumentParser):
    """Reports a wrong option in one line, like any other bad input."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv):
    """Turn the command line, which has an option for every field, into Config and overwrite."""
    parser = Parser(
        usage="%(prog)s [options]\n       %(prog)s predict --help",
        description="The paper's experiment: 1600 epochs x 10 steps supervised, 350 x 10 steps of "
        "the mean teacher, with 86 training slices. [Brackets]: the defaults of --preset paper; "
        "(authors): the paper is silent, from the first author's code; (here): our choice.",
        epilog="--preset demo: a smaller network and crop, 700 steps; see DEMO in section 1 of "
        "the file. --epochs without --steps turns --steps off. The same command again resumes an "
        "interrupted run.")
    parser.add_argument("--preset", choices=["paper", "demo"],
                        help="[with --data: paper; without: demo, small enough for a CPU]")
    parser.add_argument("--overwrite", action="store_true", help="first delete the runs in --out")
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        values = field.default if isinstance(field.default, tuple) else (field.default,)
        text = f"{field.metadata['help']} [{' '.join(map(str, values))}]"
        group.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                           nargs="+" if values is field.default else None,
                           type=type(values[0]) if values else str,
                           choices=field.metadata["choices"], help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    overwrite, preset = given.pop("overwrite"), given.pop("preset")
    for name, value in given.items():
        given[name] = tuple(value) if isinstance(value, list) else value
    if "epochs" in given:
        given.setdefault("steps", 0)
    preset = preset or ("paper" if given.get("data") else "demo")
    config = dataclasses.replace(DEMO if preset == "demo" else Config(), **given)
    if not config.out:
        name = Path(config.data).resolve().name if config.data else "phantom"
        config = dataclasses.replace(config, out=f"runs/{preset}-{name}")
    check(config)
    return config, overwrite


def check(config):
    """InputError if a value is out of its range, or if values do not fit each other."""
    for field in dataclasses.fields(Config):
        values, (least, most) = getattr(config, field.name), field.metadata["range"]
        for value in values if isinstance(values, tuple) else (values,):
            # NaN fails too
            require(isinstance(value, str) or least <= value <= most,
                    f"--{field.name.replace('_', '-')} {value}: must be {least:g} to {most:g}")
    require(config.crop % 8 == 0, f"--crop {config.crop}: must be a multiple of 8")
    require(len(config.split) == 3, f"--split {config.split}: expected three numbers")
    require(max(len(config.epochs), len(config.weight_decay)) < 3,
            "--epochs and --weight-decay: expected one number, or two for the two methods")
    epochs = {"supervised": config.epochs[0], "mean_teacher": config.epochs[-1],
              "both": max(config.epochs)}[config.method]
    require(not config.steps or config.steps >= epochs,
            f"--steps {config.steps}: must be at least --epochs {epochs}")


def main(argv=None):
    """Run a command line (default: the program's own). -> as experiment or predict.

    SystemExit 2 with one line `error: ...` for bad input, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    predicting = argv[:1] == ["predict"]
    try:
        if predicting:
            return predict(argv[1:])
        config, overwrite = parse(argv)
        return experiment(config, overwrite)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; no mask was written" if predicting else
              "interrupted; the same command without --overwrite continues the training")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
