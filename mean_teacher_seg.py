# SPDX-License-Identifier: MIT
"""Mean-teacher semi-supervised segmentation, in one file.

The method of C. S. Perone and J. Cohen-Adad, "Deep semi-supervised segmentation with
weight-averaged consistency targets", DLMIA 2018, arXiv:1807.04657. A student network f(theta)
learns from a few labelled slices. A teacher f(theta') is the exponential moving average of its
weights. On labelled and unlabelled slices alike, the student is pulled towards the teacher.

    Algorithm 1, as section 6 of this file builds it. (The paper prints g(x; phi') at the teacher's
    input. That is the noise; the paper's section 2.1 delays the transformation, as in line 4.)
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

    python mean_teacher_seg.py                    demo: a phantom, two methods, minutes on a CPU
    python mean_teacher_seg.py --data DIR         your scans (SCGM or BIDS layout), paper preset
    python mean_teacher_seg.py --data DIR --preset demo         the same, small enough for a CPU
    python mean_teacher_seg.py --help             every number of the paper is an option
    python mean_teacher_seg.py benchmark          where the time of a step goes
    python mean_teacher_seg.py predict SCAN.nii.gz --checkpoint RUN/mean_teacher-seed0.pt \\
                                       --output MASK.nii.gz
    torchrun --nproc-per-node 8 mean_teacher_seg.py --data DIR --runs 10      many GPUs

Measured: ten runs of the demo (two CPU cores, PyTorch 2.13, 12 minutes): test Dice of the
supervised network 82.65 (1.09), of the teacher 82.19 (1.40). It does not win there: see README.md.

Sections: 1 configuration, 2 U-Net, 3 losses, 4 delayed augmentation, 5 teacher and ramps,
6 training step. That is the paper. Then 7 data, 8 metrics, 9 training, 10 experiment,
11 predict, 12 benchmark, 13 phantom, 14 command line.
"""
import argparse
import collections
import copy
import dataclasses
import datetime
import gzip
import io
import itertools
import json
import math
import os
import re
import signal
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
from torch.utils.flop_counter import FlopCounterMode


# --- 1. Configuration ----------------------------------------------------------------------------
# Every default is the paper's (its section 3.1) unless the line says "here". Every field is an
# option of the command line, and its text below is what --help prints.

def option(default, text, **more):
    return dataclasses.field(default=default, metadata={"help": text, **more})


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's experiment; dataclasses.replace() makes another."""
    # What to run
    data: str = option("", "folder of scans, SCGM or BIDS layout; empty: the phantom")
    out: str = option("", "folder for the results; empty: runs/PRESET-DATA")
    method: str = option("both", "what to train", choices=["supervised", "mean_teacher", "both"])
    runs: int = option(1, "runs per method, with seeds SEED, SEED + 1, ...; the paper: 10")
    seed: int = option(0, "seed of the first run: weights, batches, augmentation")
    device: str = option("auto", "cuda, mps, cpu or auto")
    # Data: 8 training, 8 validation, 12 test subjects, 40 unlabelled
    spacing: float = option(0.25, "in-plane voxel size after resampling, mm")
    crop: int = option(200, "side of the centre crop, px, a multiple of 8 (here: the authors')")
    rater: str = option("4", "whose masks (here)", choices=["1", "2", "3", "4", "majority"])
    split: tuple = option((2, 2, 3), "subjects per site for training, validation, test")
    split_seed: int = option(0, "seed of the split, the same for every run")
    train: tuple = option((), "training subjects by name, instead of --split; every scan that is "
                          "not of a --val or --test person is then unlabelled, its mask unread")
    val: tuple = option((), "validation subjects by name; may stay empty")
    test: tuple = option((), "test subjects by name")
    exclude: tuple = option((), "subjects never used in any way")
    rescans: bool = option(False, "use further scans of validation and test persons as unlabelled "
                           "ones; sub-XSes1 and sub-XSes2 are taken for one person")
    # Network
    width: int = option(64, "channels of the first block (here: the authors' code)")
    dropout: float = option(0.5, "rate of Dropout2d (2d: here) after every block convolution")
    # Optimisation; pairs are (supervised, mean teacher), one number is for both
    epochs: tuple = option((1600, 350), "epochs; one (here) is a pass over the labelled slices")
    batch: int = option(8, "labelled slices in a mini-batch")
    unlabelled_batch: int = option(8, "unlabelled slices beside them (here: the authors' code)")
    lr: float = option(6e-4, "eta, Adam's learning rate at its highest")
    lr_ramp: int = option(50, "epochs of learning-rate ramp-up, before the cosine")
    weight_decay: tuple = option((8e-4, 6e-4), "lambda, L2 penalty inside Adam")
    # Mean teacher
    consistency_weight: float = option(2.9, "w, weight of the consistency loss after its ramp-up")
    consistency_ramp: int = option(100, "epochs of that ramp-up")
    alpha: float = option(0.99, "EMA decay at first: the teacher remembers 1/(1-alpha) steps")
    alpha_late: float = option(0.999, "EMA decay later, when the student changes slowly")
    alpha_epochs: int = option(50, "epochs with the first of the two")
    consistency: str = option("bce", "loss; bce is better (section 2)", choices=["bce", "mse"])
    augmentation: str = option("delayed", "same: one warped input for both, which section 2.1 "
                               "argues against", choices=["delayed", "same"])
    confidence: float = option(0.0, "leave out pixels where the teacher's max(y, 1-y) is below; "
                               "did not help (section 2)")
    # Augmentation
    degrees: float = option(4.5, "rotation, uniform in +- this many degrees")
    translation: float = option(0.0, "translation, uniform in +- this many px (here)")
    scale: float = option(0.0, "scale, uniform in 1 +- this (here)")
    noise: float = option(0.1, "std of added noise, N(0, 0.01) read as variance; or else 0.01")
    # Evaluation and machine, all decided here
    threshold: float = option(0.5, "probability above which a pixel is grey matter")
    validate_every: int = option(10, "epochs between two validations and progress lines")
    amp: bool = option(True, "bfloat16 autocast on CUDA; the losses stay in float32")
    compile: bool = option(False, "torch.compile the networks")


# DEMO is the same method for two CPU cores: coarser, narrower, shorter; both methods take the same
# steps. A narrow network needs all of its channels (no dropout) and a higher rate. The teacher's
# memory shrinks with the run: with an alpha of 0.999, 1000 steps, it would be the plain mean of
# all 1150. Only the consistency ramp takes the whole of it. Tuned on the phantom's validation
# subjects, for both methods alike.
DEMO = dataclasses.replace(
    Config(), spacing=0.5, crop=64, width=8, dropout=0.0, epochs=(50,), batch=4,
    unlabelled_batch=4, lr=6e-3, lr_ramp=3, weight_decay=(2e-3,), consistency_ramp=50, alpha=0.95,
    alpha_late=0.99, alpha_epochs=8, degrees=12.0, validate_every=5)


# --- 2. U-Net ------------------------------------------------------------------------------------
# "A very simple U-Net architecture with 15 layers, Batch Normalization, Dropout and ReLU"
# (section 3.1). The paper stops there; widths and order are those of the authors' public code:
# 3 blocks down, 1 at the bottom, 3 up, two 3x3 convolutions each, and one more for the output.

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
    Raises ValueError for other sizes. Source: section 3.1; details as in the authors' code.
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
    Source: eq. 3; the smoothing term is the authors' code's.
    """
    # L(theta) = - 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i), i over all pixels of all slices.
    # One ratio per batch, not the mean of one per slice: slices with little grey matter, where a
    # single pixel would swing the ratio, weigh as little as they should. And no class weights: the
    # 99.6 % background pixels, where rightly called background, add nothing to either sum.
    p, y = probabilities.float(), masks.float()
    smooth = 1e-4                                        # an empty batch, empty prediction: -1
    return -(2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth)


def consistency_loss(student_logits, teacher_probabilities, valid=None, kind="bce"):
    """Mean pixel-wise distance of the student's prediction from the teacher's.

    student_logits (B, 1, H, W), teacher_probabilities of the same shape in [0, 1], valid: bool
    of the same shape, the pixels that count (None: all) -> float32 scalar >= 0; 0 if none counts.
    kind: "bce" (the paper) or "mse" (the first mean teacher). Source: eq. 2, its sign put right.
    """
    # C(theta) = E[ -y log p - (1-y) log(1-p) ]
    # Eq. 2 prints "-y log p + (1-y) log(1-p)". That has no minimum: at y = 0 it is log(1-p), which
    # falls without end as p goes to 1, the very answer that the teacher calls wrong.
    # Mind the floor: at p = y the value is the teacher's entropy, not 0. A teacher that says 0.5
    # costs 0.693 a pixel however well the student agrees; but the gradient with respect to the
    # logit, p - y, does vanish there.
    y = teacher_probabilities.float()
    if kind == "bce":
        distance = F.binary_cross_entropy_with_logits(student_logits.float(), y, reduction="none")
    elif kind == "mse":
        distance = (torch.sigmoid(student_logits.float()) - y) ** 2
    else:
        raise ValueError(f"kind must be 'bce' or 'mse', got {kind!r}")
    if valid is None:
        return distance.mean()
    return (distance * valid).sum() / valid.sum().clamp(min=1)


# --- 4. Delayed augmentation ---------------------------------------------------------------------
# Rotate what the student sees, and its prediction is rotated. The teacher's, from the unrotated
# slice, is not: pixel by pixel the two speak of different places (section 2.1). Feeding both the
# same rotated slice lines them up, but asks for no agreement between two views of the same cord.
# So: the student's INPUT and the teacher's OUTPUT are warped, by one and the same phi. That needs
# no trick with gradients: none flows through the teacher, so its output is a target like a mask.

def sample_affine(n, degrees, translation=0.0, scale=0.0, device=None):
    """Draw n random affine transformations phi, uniform in the given ranges.

    degrees: rotation in +- degrees; translation: +- px along both axes; scale: 1 +- scale.
    -> phi (n, 2, 3) float32. It maps where a pixel of the result lies, in px right of and below
    the image's centre, to where its value is taken. Source: sections 2.1 and 3.1.
    """
    def uniform(limit):
        return torch.empty(n, device=device).uniform_(-limit, limit)

    # phi maps output to input, so it is the inverse of what happens to the picture.
    angle, zoom = torch.deg2rad(uniform(degrees)), 1 + uniform(scale)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = torch.stack([cos, -sin, uniform(translation), sin, cos, uniform(translation)], dim=1)
    return rows.view(n, 2, 3)


def warp(images, phi):
    """g(.; phi): resample by an affine transformation; images, masks and probabilities alike.

    images (B, C, H, W) float, phi (B, 2, 3) in px as from sample_affine -> (B, C, H, W), float32.
    Bilinear, 0 outside the image. Threshold a warped mask at 0.5. Source: section 2.1.
    """
    images, (height, width) = images.float(), images.shape[-2:]
    # affine_grid counts from -1 to 1 across each side, whatever its length: convert px to that,
    # or a rotation would shear an image that is not square.
    theta = phi.clone()
    theta[:, 0, 1] *= height / width
    theta[:, 1, 0] *= width / height
    theta[:, 0, 2] *= 2 / width
    theta[:, 1, 2] *= 2 / height
    grid = F.affine_grid(theta, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- 5. Teacher and ramps ------------------------------------------------------------------------

def make_teacher(student):
    """A copy of the student that no gradient reaches. Any nn.Module -> the same type.

    A teacher with random weights of its own (as in some public code) would pull the student
    towards noise until the average has forgotten it. Source: section 2.
    """
    return copy.deepcopy(student).requires_grad_(False).train()


@torch.no_grad()
def update_teacher(student, teacher, alpha):
    """theta' <- alpha theta' + (1 - alpha) theta, in place. alpha in [0, 1]. Source: eq. 1."""
    # BatchNorm's running mean and variance are buffers, not parameters, and are NOT averaged. They
    # need not be: the teacher runs in train mode on every batch (Dropout on, too) and so keeps
    # statistics of its own activations. What must not happen, and often has: to skip the buffers
    # and run the teacher in eval mode. They would stay at mean 0 and variance 1 for ever. A
    # teacher that has to run in eval mode needs the student's buffers copied here.
    for theta_teacher, theta in zip(teacher.parameters(), student.parameters(), strict=True):
        theta_teacher.lerp_(theta, 1 - alpha)


def ramp_up(epoch, length):
    """Sigmoid-shaped ramp exp(-5 (1 - epoch / length)^2), from about 0 to 1; 1 from then on.

    epoch: counted from 1; length in epochs, 0: no ramp. -> float in (0, 1]. Source: section 3.1
    names the ramps; their shape is the one of the cited mean teacher (its reference 12).
    """
    return math.exp(-5 * (1 - min(epoch / length, 1)) ** 2) if length else 1.0


def learning_rate_factor(epoch, epochs, ramp):
    """Ramp-up over the first `ramp` epochs, then half a cosine down to 0 at the last one.

    epoch: counted from 1. -> float in [0, 1], to multiply eta with. Source: section 3.1.
    """
    if epoch <= ramp:
        return ramp_up(epoch, ramp)
    return 0.5 * (1 + math.cos(math.pi * (epoch - ramp) / (epochs - ramp)))


# --- 6. One training step = Algorithm 1 ----------------------------------------------------------

def train_step(student, teacher, optimizer, images, masks, step, weight=2.9, alpha=0.99,
               degrees=4.5, translation=0.0, scale=0.0, noise=0.1, consistency="bce",
               augmentation="delayed", confidence=0.0, amp=False):
    """One step of Algorithm 1, in place. The networks map (B, 1, H, W) to logits of that shape.

    images (B, 1, H, W) float, z-scored, the labelled slices first; masks (L, 1, H, W) in {0, 1}
    of those L <= B; step: number of this step, from 0. teacher None: the supervised baseline.
    Other arguments: see Config. -> dict of float32 scalars on the device: loss, dice, consistency.
    """
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=amp)
    phi = sample_affine(len(images), degrees, translation, scale, images.device)         # line 2
    noisy = images + noise * torch.randn_like(images)
    # Ones travel along: where phi reads from outside the image, less than 1 arrives.
    augmented, inside = warp(torch.cat([noisy, torch.ones_like(noisy)], 1), phi).split(1, dim=1)
    masks = (warp(masks, phi[:len(masks)]) >= 0.5).float()
    if teacher is not None:
        # Before the student: so its activations are gone when the student's must be kept.
        other = images + noise * torch.randn_like(images)
        other = warp(other, phi) if augmentation == "same" else other
        with torch.no_grad(), autocast:
            targets = torch.sigmoid(teacher(other).float())                              # line 4
        if augmentation == "delayed":                    # outside autocast: bfloat16 has 8 bits,
            targets = warp(targets, phi)                 # too few for a place among 200 px
        # Pixels from outside the image have no target: leave them out. (Dice need not care: there
        # the mask is 0, and so is the prediction soon.)
        valid = (inside > 0.999) & (torch.maximum(targets, 1 - targets) >= confidence)
    with autocast:                                       # contiguous: a strided view is slower
        logits = student(augmented.contiguous()).float()                                 # line 3
    loss = dice = dice_loss(torch.sigmoid(logits[:len(masks)]), masks)                   # line 5
    agreement = torch.zeros_like(dice)
    if teacher is not None:
        agreement = consistency_loss(logits, targets, valid, consistency)                # line 6
        loss = dice + weight * agreement                                                 # line 7
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()                                                                     # line 8
    step += 1                                                                            # line 9
    if teacher is not None:
        # A plain mean at first: 1/2, 2/3, 3/4, ... until alpha takes over (the authors' code).
        update_teacher(student, teacher, min(1 - 1 / (step + 1), alpha))                 # line 10
    return {"loss": loss.detach(), "dice": dice.detach(), "consistency": agreement.detach()}


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
    site: str                                            # "site1"; "" in a BIDS folder
    subject: str                                         # "site1-sc01"; "sub-9709Ses1"
    person: str                                          # as subject, without a final Ses1, Ses2
    name: str                                            # "site1-sc01"; "sub-9709Ses1_run-1"
    image: Path
    masks: dict                                          # rater -> file; BIDS: {ANY: file}


ANY = "any"                                              # BIDS masks do not name their rater


class Slices(NamedTuple):
    images: torch.Tensor                                 # (N, 1, H, W) float32, z-scored per slice
    masks: torch.Tensor                                  # as images, in {0, 1}; unlabelled: none
    where: list                                          # N times (site, scan, slice from 0)


def find_scans(folder):
    """List the scans below a folder, in either layout. -> list of Scan; InputError if none.

    SCGM: siteS-scNN-image.nii.gz with siteS-scNN-mask-rR.nii.gz beside it, at any depth.
    BIDS: sub-*/**/anat/*_T2star*.nii.gz with derivatives/labels/(same path)_gmseg*.nii.gz.
    """
    folder, scans = Path(folder), []
    require(folder.is_dir(), f"{folder}: no such folder; name that of your scans with --data")
    for path in sorted(folder.rglob("site?-sc??-image.nii.gz")):
        name = path.name.removesuffix("-image.nii.gz")
        # sc11 to sc20 are the challenge's test half: unlabelled, whatever lies beside them.
        masks = sorted(path.parent.glob(f"{name}-mask-r?.nii.gz")) if name[-2:] <= "10" else []
        scans.append(Scan(name[:5], name, name, name, path, {m.name[-8]: m for m in masks}))
    for path in sorted(folder.glob("sub-*/**/anat/*_T2star*.nii.gz")):
        stem, place = path.name.removesuffix(".nii.gz"), path.parent.relative_to(folder)
        masks = sorted((folder / "derivatives/labels" / place).glob(f"{stem}_gmseg*.nii.gz"))
        person = re.sub(r"Ses\d+$", "", place.parts[0])
        scans.append(Scan("", place.parts[0], person, stem.split("_T2star")[0], path,
                          {ANY: mask for mask in masks[:1]}))
    require(scans, f"{folder}: no scans found; expected site*-sc*-image.nii.gz (SCGM) or "
                   "sub-*/anat/*_T2star*.nii.gz (BIDS) below it; name their folder with --data")
    return scans


def split_scans(scans, config):
    """Deal the scans out. -> dict of list of Scan: train, val, test (with masks), unlabelled.

    By --train, --val, --test if given, else --split random persons per site, drawn with
    --split-seed. No person is on two sides. InputError if that cannot be done.
    """
    unknown = " ".join(set(config.exclude) - {scan.subject for scan in scans})
    require(not unknown, f"{config.data}: no subject {unknown} to --exclude; check the spelling")
    scans = [scan for scan in scans if scan.subject not in config.exclude]
    labelled = [scan for scan in scans if scan.masks]
    chosen = {"train": set(config.train), "val": set(config.val), "test": set(config.test)}
    by_name = any(chosen.values())
    if by_name:
        known = {scan.subject for scan in labelled}
        unknown = " ".join(sorted(set.union(*chosen.values()) - known))
        require(not unknown, f"{config.data}: no subject {unknown} with masks; "
                             f"there are {' '.join(sorted(known))}")
        require(chosen["train"] and chosen["test"], "--train and --test must both be given")
    sites = [] if by_name else sorted({scan.site for scan in scans})
    generator = np.random.default_rng(config.split_seed)
    for site in sites:                                   # of SCGM's 10, 3 are left over and unused
        people = sorted({scan.person for scan in labelled if scan.site == site})
        require(len(people) >= sum(config.split),
                f"{config.data}: {len(people)} people with masks in {site or 'all'}, too few for "
                f"--split {config.split}; lower it, or name subjects: --train A B --test C")
        parts = np.split(generator.permutation(people), np.cumsum(config.split))
        for key, part in zip(chosen, parts):
            chosen[key] |= {scan.subject for scan in labelled if scan.person in part}
    sets = {key: [scan for scan in labelled if scan.subject in chosen[key]] for key in chosen}
    people = {key: {scan.person for scan in sets[key]} for key in sets}
    for one, other in itertools.combinations(sets, 2):
        both = " ".join(sorted(people[one] & people[other]))
        require(not both, f"{config.data}: {both} is in --{one} and in --{other}; choose one")
    taken = sum(sets.values(), [])
    held_out = set() if config.rescans else people["val"] | people["test"]
    sets["unlabelled"] = [scan for scan in scans if scan not in taken and
                          scan.person not in held_out and (by_name or not scan.masks)]
    return sets


def load_nifti(path):
    """Read a 3-D NIfTI and check it. -> nibabel image in memory, float32; InputError if unfit."""
    try:
        with nib.imageglobals.ErrorLevel(30):            # no silent repair of voxel sizes <= 0
            image = nib.load(path)
        shape, mm = image.shape, image.header.get_zooms()
        require(isinstance(image, nib.Nifti1Image), f"{path}: is no NIfTI; convert it")
        require(len(shape) == 3, f"{path}: has {len(shape)} dimensions, expected 3; split it")
        require(all(0.01 < size < 100 for size in [*mm, *nib.affines.voxel_sizes(image.affine)]),
                f"{path}: has voxels of {mm} mm, expected 0.01 to 100; correct its header")
        require(0 < math.prod(shape) < 2 ** 28 and math.prod(shape) * mm[0] * mm[1] < 2 ** 25,
                f"{path}: {shape} voxels of {mm} mm make no sense here; correct its header")
        require(np.isfinite(nib.io_orientation(image.affine)).all(),
                f"{path}: its affine is singular; correct its header")
        volume = image.get_fdata(dtype=np.float32)
        require(np.isfinite(volume).all(), f"{path}: has NaN or infinite voxels; mend them")
        return nib.Nifti1Image(volume, image.affine, image.header)
    except InputError:
        raise
    except Exception as error:                           # nibabel's readers raise a dozen kinds
        raise InputError(f"{path}: cannot be read as NIfTI ({error}); fetch it again") from error


def canonical(image):
    """Voxels with axes to the right, anterior, superior. -> array (X, Y, Z), affine."""
    image = nib.as_closest_canonical(image)
    return image.get_fdata(dtype=np.float32), image.affine


def read_mask(scan, rater, shape, affine):
    """Grey matter of one rater or of the majority. -> array (X, Y, Z) float32 in {0, 1}.

    InputError if the mask is not on the grid of its image or holds values that mean nothing.
    """
    raters = scan.masks if rater == "majority" or ANY in scan.masks else [rater]
    votes = []
    for key in raters:
        require(key in scan.masks, f"{scan.image}: no mask of rater {key}; choose another --rater")
        mask, mask_affine = canonical(load_nifti(scan.masks[key]))
        require(mask.shape == shape and np.allclose(mask_affine, affine, atol=1e-3),
                f"{scan.masks[key]}: is not on the grid of its image, {shape}; resample it")
        values = (0, 1) if key == ANY else (0, 1, 2)     # 1 is grey matter, 2 white matter
        require(np.isin(mask, values).all(),
                f"{scan.masks[key]}: has values {np.unique(mask)[:5]}, not {values}; correct it")
        votes.append(mask == 1)
    return (np.mean(votes, axis=0) > 0.5).astype(np.float32)  # a 2-2 tie is background


def to_slices(volume, voxel_mm, spacing):
    """Cut a volume (X, Y, Z) into axial slices resampled in their plane. -> (Z, 1, H, W) float32.

    voxel_mm: its voxel size; spacing: the wanted one, mm (met to half a pixel in the whole width).
    Linear, antialiased when shrinking. Source: "resampled to 0.25 x 0.25 mm", section 3.1.
    """
    slices = torch.from_numpy(volume.transpose(2, 1, 0)[:, None, ::-1].copy())    # (Z, 1, Y, X)
    size = [max(1, round(volume.shape[axis] * voxel_mm[axis] / spacing)) for axis in (1, 0)]
    return F.interpolate(slices, size=size, mode="bilinear", antialias=True)


def center_crop(slices, height, width):
    """Crop (N, 1, H, W) around its centre, or pad it with 0, to (N, 1, height, width).

    Cropping back to H x W undoes a pad, and puts a crop back in its place.
    """
    top, left = int((slices.shape[2] - height) / 2), int((slices.shape[3] - width) / 2)
    bottom, right = slices.shape[2] - height - top, slices.shape[3] - width - left
    return F.pad(slices, (-left, -right, -top, -bottom))  # a negative pad crops


def normalise(slices):
    """Give each slice mean 0 and std 1, since every scanner has a scale of its own."""
    mean, std = slices.mean((2, 3), keepdim=True), slices.std((2, 3), keepdim=True)
    return (slices - mean) / std.clamp(min=1e-6)


def read_scan(scan, config, labelled):
    """One scan's slices -> Slices. An unlabelled one's masks are not even opened.

    Slices without any contrast are dropped and, if labelled, those without grey matter.
    """
    volume, affine = canonical(load_nifti(scan.image))
    voxel_mm = nib.affines.voxel_sizes(affine)
    images = center_crop(to_slices(volume, voxel_mm, config.spacing), config.crop, config.crop)
    masks = images[:0]
    keep = images.flatten(1).std(1) > 0
    if labelled:
        mask = read_mask(scan, config.rater, volume.shape, affine)
        whole = (to_slices(mask, voxel_mm, config.spacing) >= 0.5).float()
        masks = center_crop(whole, config.crop, config.crop)
        lost = 1 - (masks.sum() / whole.sum()).item()    # NaN, thus no warning, if there is none
        if lost > 0.01:
            print(f"warning: {scan.image}: {lost:.0%} of its grey matter is outside the centre "
                  f"crop of {config.crop} px at {config.spacing} mm; raise --crop")
        keep &= masks.flatten(1).any(1)
        masks = masks[keep]
    return Slices(normalise(images)[keep], masks,
                  [(scan.site, scan.name, int(z)) for z in keep.nonzero()])


def load_data(config, device="cpu"):
    """Read all that an experiment needs. -> dict of Slices: train, val, test, unlabelled."""
    folder = Path(config.data or phantom_folder())
    if not config.data and not folder.exists():
        write_phantom(folder)
    data, faults = {}, []
    for name, scans in split_scans(find_scans(folder), config).items():
        parts = [Slices(*torch.zeros(2, 0, 1, config.crop, config.crop), [])]
        for scan in scans:
            try:
                parts.append(read_scan(scan, config, name != "unlabelled"))
            except InputError as error:
                faults.append(str(error))                # to report all of them at once
        images, masks, where = zip(*parts)
        data[name] = Slices(torch.cat(images).to(device), torch.cat(masks).to(device),
                            sum(where, []))
        print(f"{name:>10}: {len(data[name].images):4d} slices of {len(scans):2d} scans"
              + (f": {' '.join(scan.name for scan in scans)}" if config.train else ""))
    require(not faults, "; ".join(faults))
    require(len(data["train"].images) and len(data["test"].images),
            f"{folder}: no grey matter in any training or any test slice; check --crop")
    return data


# --- 8. Metrics and evaluation -------------------------------------------------------------------

METRICS = ("dice", "miou", "accuracy", "precision", "recall", "specificity")


def segmentation_metrics(predictions, masks):
    """The six metrics of Table 1, for each slice.

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
    """Probability of grey matter, in eval mode. (N, 1, H, W) z-scored -> the same shape."""
    training = model.training
    model.eval()
    probabilities = [torch.sigmoid(model(part).float()) for part in images.split(batch)]
    model.train(training)
    return torch.cat(probabilities)


def evaluate(model, slices, threshold=0.5):
    """segmentation_metrics of a network on Slices. -> dict of list of N floats in percent."""
    predictions = predict_probabilities(model, slices.images) > threshold
    return {name: values.tolist() for name, values in
            segmentation_metrics(predictions, slices.masks).items()}


# --- 9. The training loop ------------------------------------------------------------------------

def save(path, content):
    """Write a text, bytes, a figure or, as a checkpoint, a dict: whole or not at all."""
    buffer, temporary = io.BytesIO(), path.with_name(f".{path.name}.part")
    if isinstance(content, dict):
        torch.save(content, buffer)
    elif isinstance(content, Figure):
        content.savefig(buffer, format="png", dpi=110)
    else:
        buffer.write(content.encode() if isinstance(content, str) else content)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())                      # on the disk before it gets its name
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)                # still there only if something failed


def save_csv(path, rows):
    lines = [rows[0], *(row.values() for row in rows)]
    save(path, "".join(",".join(map(str, line)) + "\n" for line in lines))


def load_checkpoint(path):
    """Read what train() saved; no code in it is run. -> dict; InputError if it is not such."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        load_network(state, "student"), [state[key] for key in ("method", "where", "history")]
        return state
    except Exception as error:                           # unpickling raises almost anything
        raise InputError(f"{path}: is no checkpoint of this program ({type(error).__name__}); "
                         "name another, or delete it to train anew") from error


def load_network(state, name):
    """Build the student or the teacher that a checkpoint holds. -> UNet in eval mode."""
    config = Config(**state["config"])
    network = UNet(config.width, config.dropout)
    network.load_state_dict(state[name])
    return network.eval()


def load_run(path, config, where):
    """The checkpoint of a run to go on with. InputError if it is of other settings or data."""
    state = load_checkpoint(path)
    ignored = ("out", "method", "runs", "seed", "device")                # which runs, and where
    theirs, ours = vars(Config(**state["config"])), vars(config)
    differs = [f"{key} {theirs[key]} -> {ours[key]}" for key in ours
               if key not in ignored and theirs[key] != ours[key]]
    if state["where"] != where or path.stem != f"{state['method']}-seed{state['seed']}":
        differs += ["not these slices, or another run's name"]
    require(not differs, f"{path}: is of other settings or data: {', '.join(differs)}; "
                         "choose another --out, or --overwrite")
    return state


def batches(labelled, unlabelled, count, extra):
    """One epoch: every labelled slice once, in a new order, less the last part batch.

    Yields images (count + extra, 1, H, W), the labelled slices first, and masks (count, 1, H, W).
    """
    n, m, device = len(labelled.images), len(unlabelled.images), labelled.images.device
    order = torch.randperm(n, device=device)
    others = torch.randperm(m, device=device) if extra else order
    others = others.repeat(math.ceil(n * extra / len(others)))             # round and round
    for i in range(n // count):
        mine, more = order[i * count:(i + 1) * count], others[i * extra:(i + 1) * extra]
        yield torch.cat([labelled.images[mine], unlabelled.images[more]]), labelled.masks[mine]


def build(config, method, device):
    """Make what a training works on: networks with random weights, their optimiser, the settings.

    -> models: {"student": UNet} and, for mean_teacher, "teacher"; Adam; options of train_step.
    """
    # Channels-last memory is what tensor cores want, and 1.1 to 1.4 times as fast on a CPU.
    student = UNet(config.width, config.dropout).to(device, memory_format=torch.channels_last)
    models, semi = {"student": student}, method == "mean_teacher"
    if semi:
        models["teacher"] = make_teacher(student)
    for model in models.values() if config.compile else ():
        model.compile()
    # Adam's own weight_decay is the paper's L2 penalty; AdamW's is not. Fused: one pass over all
    # parameters, 3 % of a step.
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.999), fused=True,
                                 weight_decay=config.weight_decay[-1 if semi else 0])
    options = {name: getattr(config, name) for name in
               "degrees translation scale noise consistency augmentation confidence".split()}
    return models, optimizer, {**options, "amp": config.amp and device.type == "cuda"}


INTERRUPTED = []                                         # see main()


def train(config, method, seed, data):
    """Train one network (and its teacher); evaluate the last epoch on the test set.

    method: supervised or mean_teacher; data: from load_data, on the device. Saves METHOD-seedS.pt
    and .csv into config.out, and goes on from there if they exist; on a CPU an interrupted run
    ends bit for bit as any other. -> dict: history (a dict per epoch), metrics[model][metric] (a
    list over the test slices), and the state_dicts student and teacher.
    """
    path = Path(config.out, f"{method}-seed{seed}.pt")
    where = {name: part.where for name, part in data.items()}
    state = load_run(path, config, where) if path.exists() else {}
    if "metrics" in state:
        print(f"\n{method}, seed {seed}: finished before, see {path}")
        return state
    labelled, unlabelled, device = data["train"], data["unlabelled"], data["train"].images.device
    semi = method == "mean_teacher"
    epochs = config.epochs[-1 if semi else 0]
    batch = min(config.batch, len(labelled.images))
    extra = config.unlabelled_batch if semi and len(unlabelled.images) else 0
    steps = len(labelled.images) // batch
    torch.manual_seed(seed)                              # weights, batches, phi, noise, Dropout
    models, optimizer, options = build(config, method, device)
    student, teacher = models["student"], models.get("teacher")
    print(f"\n{method}, seed {seed}: {epochs} epochs x {steps} steps = {epochs * steps} steps of "
          f"{batch} + {extra} slices on {device.type}")
    if device.type == "cpu" and config.width > 32:
        print("the paper preset takes days on a CPU; --preset demo takes minutes")
    print("   epoch  dice loss  consistency  weight       lr  val Dice: student  teacher  steps/s"
          "  time left")
    history, parts = state.get("history", []), {**models, "optimizer": optimizer}
    generators = [torch, getattr(torch, device.type)] if device.type != "cpu" else [torch]
    if state:                                            # go on where it was interrupted
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for generator, value in zip(generators, state["random"]):
            generator.set_rng_state(value)
    start, first = time.perf_counter(), len(history) + 1
    for epoch in range(first, epochs + 1):
        lr = config.lr * learning_rate_factor(epoch, epochs, config.lr_ramp)
        optimizer.param_groups[0]["lr"] = lr
        weight = config.consistency_weight * ramp_up(epoch, config.consistency_ramp) * semi
        alpha = config.alpha if epoch <= config.alpha_epochs else config.alpha_late
        sums = 0
        for i, (images, masks) in enumerate(batches(labelled, unlabelled, batch, extra)):
            losses = train_step(student, teacher, optimizer, images, masks,
                                (epoch - 1) * steps + i, weight, alpha, **options)
            sums += torch.stack([losses["dice"], losses["consistency"]])
        dice, consistency = (sums / steps).tolist()      # the one wait for the device in an epoch
        row = {"epoch": epoch, "step": epoch * steps, "dice_loss": dice,
               "consistency_loss": consistency, "weight": weight, "lr": lr,
               "val_student": math.nan, "val_teacher": math.nan}
        if epoch % config.validate_every == 0 or epoch in (1, epochs):
            for name, model in models.items() if len(data["val"].images) else ():
                dices = evaluate(model, data["val"], config.threshold)["dice"]
                row[f"val_{name}"] = sum(dices) / len(dices)
            speed = (epoch - first + 1) * steps / (time.perf_counter() - start)
            left = datetime.timedelta(seconds=round((epochs - epoch) * steps / speed))
            print(f"{epoch:4d}/{epochs:<4d}{dice:10.4f}{consistency:13.4f}{weight:8.2f}{lr:10.1e}"
                  f"{row['val_student']:18.2f}{row['val_teacher']:9.2f}{speed:9.1f}{left!s:>11}"
                  .replace("nan", "  -"), flush=True)
        history.append(row)
        if epoch % config.validate_every == 0 or epoch == epochs or INTERRUPTED:
            state = {"config": vars(config), "method": method, "seed": seed, "where": where,
                     "history": history, "random": [g.get_rng_state() for g in generators],
                     **{name: part.state_dict() for name, part in parts.items()}}
            if epoch == epochs:
                state["metrics"] = {name: evaluate(model, data["test"], config.threshold)
                                    for name, model in models.items()}
            save_csv(path.with_suffix(".csv"), history)
            save(path, state)
        if INTERRUPTED:
            raise KeyboardInterrupt
    return state


# --- 10. Experiment: methods x runs, table, pictures ---------------------------------------------

METHODS = ("supervised", "mean_teacher")
LABELS = {("supervised", "student"): "supervised",
          ("mean_teacher", "student"): "mean teacher (student)",
          ("mean_teacher", "teacher"): "mean teacher (teacher)"}
COLORS = {"rater": "#009e73", "supervised": "#d55e00",    # Okabe and Ito's: safe for every eye
          "mean teacher (student)": "#56b4e9", "mean teacher (teacher)": "#0072b2"}
PAPER = {"paper: supervised": [(67.915, 0.313), (53.679, 0.327), (99.745, 0.005),      # Table 1
                               (57.948, 0.788), (92.495, 0.907), (99.775, 0.010)],
         "paper: semi-supervised": [(70.209, 0.229), (55.509, 0.253), (99.792, 0.003),
                                    (64.732, 0.773), (86.112, 0.936), (99.846, 0.006)]}


def experiment(config, overwrite=False):
    """Train every method with every seed, evaluate, report. -> dict: scores, difference, table.

    scores[row][metric]: a list over seeds of the mean over test slices, percent; difference: the
    teacher's Dice minus the supervised network's, mean and standard error over seeds, or None.
    Under torchrun the runs are dealt out, and the first process reports; the others return None.
    InputError if config.out holds runs of another configuration, unless to be overwritten.
    """
    out, rank = Path(config.out), int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    methods = METHODS if config.method == "both" else (config.method,)
    jobs = list(itertools.product(range(config.seed, config.seed + config.runs), methods))
    data = load_data(config, pick_device(config.device))
    before = [path for method in METHODS for path in out.glob(f"{method}-seed*.pt")]
    for path in () if overwrite else before:
        load_run(path, config, {name: part.where for name, part in data.items()})
    if rank == 0:
        for path in before if overwrite else ():
            path.unlink()
            path.with_suffix(".csv").unlink(missing_ok=True)
        save(out / "config.json", json.dumps(vars(config), indent=1))
    # A batch of 16 small slices does not fill one GPU: many GPUs take many runs, not one in parts.
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        torch.distributed.barrier()                      # the folder is claimed
    for seed, method in jobs[rank::world]:
        try:
            train(config, method, seed, data)
        except Exception as error:                       # keep the other runs
            if world == 1:
                raise
            print(f"error: {method}, seed {seed} on rank {rank}: {error}", file=sys.stderr)
    if world > 1:
        torch.distributed.barrier()                      # all runs have ended
        torch.distributed.destroy_process_group()
    if rank > 0:
        return None
    paths = [out / f"{method}-seed{seed}.pt" for seed, method in jobs]
    runs = [load_checkpoint(path) for path in paths if path.exists()]
    done = sum("metrics" in run for run in runs)
    require(done == len(jobs), f"{out}: {done} of {len(jobs)} runs are finished; the same command "
                               "again goes on with the others")
    return report(config, runs, data["test"])


def report(config, runs, slices):
    """Write the table, the metrics of every slice and the pictures. -> dict, see experiment()."""
    out, scores, rows = Path(config.out), {}, []
    for run in runs:
        for model, metrics in run["metrics"].items():
            row = scores.setdefault(LABELS[run["method"], model], {name: [] for name in METRICS})
            for name, values in metrics.items():
                row[name].append(float(np.mean(values)))
            rows += [dict(method=run["method"], seed=run["seed"], model=model, site=site,
                          subject=scan, slice=z, **{name: metrics[name][i] for name in METRICS})
                     for i, (site, scan, z) in enumerate(slices.where)]
    table, difference = make_table(scores, config.data and slices.where[0][0])
    save_csv(out / "metrics.csv", rows)
    save(out / "table.md", table)
    draw_curves(runs, out / "curves.png")
    draw_examples(config, runs, slices, out / "examples.png")
    print(f"\n{table}\nTable, per-slice metrics, checkpoints and pictures are in {out}")
    return {"scores": scores, "difference": difference, "table": table}


def pick_device(name="auto"):
    """Turn --device into a device; under torchrun, each process gets its own GPU."""
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        best = "mps" if torch.backends.mps.is_available() else "cpu"
        best = "cuda" if torch.cuda.is_available() else best
        require(name.split(":")[0] in ("auto", "cuda", "mps", "cpu"), "no such kind")
        return torch.zeros(1, device=best if name == "auto" else name).device
    except Exception as error:
        raise InputError(f"--device {name}: not to be had here ({error}); try cpu") from error


def make_table(scores, paper=False):
    """Scores as Markdown in the layout of Table 1. -> text, difference; see experiment()."""
    def line(first, cells):
        return f"| {first:22} | {' | '.join(f'{cell:>12}' for cell in cells)} |\n"

    runs = len(next(iter(scores.values()))["dice"])
    rows = {label: [(np.mean(values), np.std(values, ddof=1) if runs > 1 else math.nan)
                    for values in row.values()] for label, row in scores.items()}
    table = line(f"test, %; runs: {runs}", [n.title().replace("Miou", "mIoU") for n in METRICS])
    table += line(":" + "-" * 21, ["-" * 11 + ":"] * 6)
    for label, row in {**rows, **(PAPER if paper else {})}.items():
        cells = [f"{mean:.2f} ({std:.2f})".replace(" (nan)", "") for mean, std in row]
        table += line(label, cells)
    if len(scores) < 3:
        return table, None
    pairs = np.subtract(scores["mean teacher (teacher)"]["dice"], scores["supervised"]["dice"])
    error = float(np.std(pairs, ddof=1)) / math.sqrt(runs) if runs > 1 else math.nan
    table += (f"\nTeacher minus supervised: {pairs.mean():+.2f} Dice, standard error {error:.2f} "
              f"over {runs} pairs of runs\n").replace("nan over 1 pairs", "unknown from 1 pair")
    return table, (float(pairs.mean()), error)


def draw_curves(runs, path):
    """Losses and validation Dice against the training step, one line a run, into a PNG."""
    panels = {"Dice loss (eq. 3)": {("supervised", "student"): "dice_loss",
                                    ("mean_teacher", "student"): "dice_loss"},
              "Consistency loss, per pixel": {("mean_teacher", "student"): "consistency_loss"},
              "Validation Dice, %": {("supervised", "student"): "val_student",
                                     ("mean_teacher", "student"): "val_student",
                                     ("mean_teacher", "teacher"): "val_teacher"}}
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axis, (title, columns) in zip(figure.subplots(1, 3), panels.items()):
        for run, ((method, model), column) in itertools.product(runs, columns.items()):
            points = [(row["step"], row[column]) for row in run["history"]
                      if run["method"] == method and not math.isnan(row[column])]
            if points:
                label = LABELS[method, model]
                axis.plot(*zip(*points), "--" if model == "teacher" else "-", color=COLORS[label],
                          label=label if run["seed"] == runs[0]["seed"] else None)
                axis.legend()
        axis.set(title=title, xlabel="training step")
    save(path, figure)


def draw_examples(config, runs, slices, path):
    """Four test slices with the rater's and each method's outline (its first run), into a PNG."""
    picked = sorted({(2 * k + 1) * len(slices.where) // 8 for k in range(4)})
    images, masks = slices.images[picked], slices.masks[picked]
    side = min(config.crop, round(24 / config.spacing))  # the middle 24 mm

    def near(slices):
        return center_crop(slices, side, side)[:, 0].cpu().numpy()

    names = ["{1}, slice {2}".format(*slices.where[k]) for k in picked]
    columns = [("image", None, names), ("rater", masks, [""] * len(picked))]
    for run in [run for run in runs if run["seed"] == config.seed]:
        model = "teacher" if "teacher" in run else "student"
        found = predict_probabilities(load_network(run, model).to(images.device), images)
        dice = segmentation_metrics(found > config.threshold, masks)["dice"]
        columns.append((LABELS[run["method"], model], found, [f"Dice {d:.1f} %" for d in dice]))
    figure = Figure(figsize=(3 * len(columns), 3.3 * len(picked)), layout="constrained")
    axes = figure.subplots(len(picked), len(columns), squeeze=False)
    for (row, column), axis in np.ndenumerate(axes):
        title, values, captions = columns[column]
        axis.imshow(near(images)[row], cmap="gray")
        axis.set(xticks=[], yticks=[], title=title if row == 0 else "", xlabel=captions[row])
        if values is not None:
            level = 0.5 if title == "rater" else config.threshold
            axis.contour(near(values)[row], [level], colors=COLORS[title])
    save(path, figure)


# --- 11. Predict ---------------------------------------------------------------------------------

def predict_volume(image, network, config, name="image"):
    """Probability of grey matter for every voxel of a nibabel image, on the image's own grid.

    network: as trained with config, whose spacing and crop are used -> array of image.shape,
    float32 in [0, 1]; 0 outside the crop. Warns if grey matter meets the crop's border.
    """
    volume, affine = canonical(image)
    sampled = to_slices(volume, nib.affines.voxel_sizes(affine), config.spacing)
    slices = center_crop(sampled, config.crop, config.crop)
    device = next(network.parameters()).device
    found = predict_probabilities(network, normalise(slices).to(device)).cpu()
    found *= (slices.flatten(1).std(1) > 0).view(-1, 1, 1, 1)           # nothing in empty slices
    grey = found > config.threshold
    if grey.sum() > grey[..., 1:-1, 1:-1].sum():
        print(f"warning: {name}: grey matter meets the border of the crop, {config.crop} px at "
              f"{config.spacing} mm, and may go on outside; crop the image around the cord")
    found = center_crop(found, *sampled.shape[2:])                      # undoes the crop
    found = F.interpolate(found, size=volume.shape[1::-1], mode="bilinear", antialias=True)
    found = found.squeeze(1).flip(1).permute(2, 1, 0).numpy()           # (X, Y, Z), RAS
    stored = nib.orientations.io_orientation(image.affine)
    turn = nib.orientations.ornt_transform(nib.orientations.io_orientation(affine), stored)
    return nib.orientations.apply_orientation(found, turn).astype(np.float32)


def predict(argv):
    """The command line of `predict`: one volume, or every one in a folder. -> list of outputs."""
    parser = Parser(prog="mean_teacher_seg.py predict", description="Segment grey matter: a mask "
                    "on the image's own grid, whatever its orientation and voxel size.")
    parser.add_argument("image", type=Path, help="a NIfTI volume, or a folder of them")
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="a .pt file of a run; the teacher in it, if there is one, is used")
    parser.add_argument("--output", type=Path, required=True,
                        help="the mask to write, .nii or .nii.gz, or a folder of them")
    parser.add_argument("--probabilities", action="store_true", help="float32, not a mask")
    parser.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    given = parser.parse_args(argv)
    state = load_checkpoint(given.checkpoint)
    config = Config(**state["config"])
    network = load_network(state, "teacher" if "teacher" in state else "student").to(pick_device())
    jobs = {given.image: given.output}
    if given.image.is_dir():
        jobs = {path: given.output / path.name for path in sorted(given.image.glob("*.nii*"))}
        require(jobs, f"{given.image}: no .nii or .nii.gz file in this folder; name another")
    for path, output in jobs.items():
        require(output.name.endswith((".nii", ".nii.gz")), f"{output}: end it in .nii or .nii.gz")
        require(given.overwrite or not output.exists(), f"{output}: is there; see --overwrite")
        require(not output.exists() or not output.samefile(path), f"{output}: is the image itself")
    for path, output in jobs.items():
        image = load_nifti(path)
        found = predict_volume(image, network, config, path)
        if not given.probabilities:
            found = (found > config.threshold).astype(np.uint8)
        # With the image's header: its geometry, codes and units.
        mask = nib.Nifti1Image(found, image.affine, image.header, dtype=found.dtype)
        mask.header["cal_min"] = mask.header["cal_max"] = 0
        content = mask.to_bytes()
        save(output, gzip.compress(content, mtime=0) if output.suffix == ".gz" else content)
        print(f"{output}: {(found > config.threshold).sum()} voxels of grey matter")
    return list(jobs.values())


# --- 12. Benchmark -------------------------------------------------------------------------------

def benchmark(config, seconds=20):
    """Where the time of a training step goes, on random slices of config's size.

    Prints medians and the headline, a ratio: train_step over the bare network passes that it
    contains (teacher forward, student forward and backward; same slices, same precision).
    seconds: how long to measure, after the warm-up. -> dict of ms.
    """
    device, labelled, extra = pick_device(config.device), config.batch, config.unlabelled_batch
    models, optimizer, options = build(config, "mean_teacher", device)
    student, teacher = models.values()
    optimizer.param_groups[0]["lr"] = 0.0                # the same work, and the networks stay
    x = torch.randn(labelled + extra, 1, config.crop, config.crop, device=device)
    slices, targets = Slices(x, (x > 2).float(), []), torch.rand_like(x)
    y, logits = slices.masks[:labelled], torch.randn_like(x, requires_grad=True)
    volume = nib.Nifti1Image(x[:, 0].cpu().numpy().T, np.diag([config.spacing] * 2 + [5, 1]))
    quiet = dataclasses.replace(config, threshold=1.0)   # predict_volume shall not warn

    def bare(network):
        with torch.autocast(device.type, torch.bfloat16, enabled=options["amp"]):
            return network(x).float().mean()

    def augment():                                       # as often as train_step does each
        phi = sample_affine(len(x), config.degrees, device=device)
        warp(torch.cat([x + torch.randn_like(x), torch.ones_like(x)], 1), phi)
        return warp(y, phi[:labelled]), warp(targets, phi), x + torch.randn_like(x)

    parts = {
        "draw a batch": lambda: next(batches(slices, slices, labelled, extra)),
        "augmentation": augment,
        "teacher forward": torch.no_grad()(lambda: bare(teacher)),
        "student forward, backward": lambda: (optimizer.zero_grad(), bare(student).backward()),
        "losses": lambda: (dice_loss(logits[:labelled].sigmoid(), y) +
                           consistency_loss(logits, targets, targets > 0)).backward(),
        "Adam": optimizer.step,
        "teacher's average": lambda: update_teacher(student, teacher, 0.99),
        "train_step": lambda: train_step(student, teacher, optimizer, x, y, 500, **options),
        "evaluation": lambda: predict_probabilities(teacher, x),
        "predict": lambda: predict_volume(volume, teacher, quiet)}
    if device.type == "cuda":                            # what could this GPU do at best?
        dtype = torch.bfloat16 if options["amp"] else torch.float32
        matrix = torch.randn(8192, 8192, device=device, dtype=dtype)
        parts["matrix product"] = lambda: matrix @ matrix
    repeat = 10 if device.type == "cuda" else 1          # calls between two waits for the device
    times, end = {name: [] for name in parts}, math.inf
    while time.perf_counter() < end:                     # in turns: a machine's speed drifts, and
        for name, part in parts.items():                 # a part in a loop of its own is too fast
            start = time.perf_counter()
            for _ in range(repeat):
                part()
            torch.zeros(1, device=device).item()         # waits for the device
            times[name].append((time.perf_counter() - start) * 1000 / repeat)
        if len(times["train_step"]) == 3:                # the warm-up is over
            end = time.perf_counter() + seconds
    ms = {name: float(np.median(values[3:])) for name, values in times.items()}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = UNet(config.width)                     # of shapes only: nothing is computed
        network(torch.empty(x.shape)).mean().backward()
        network(torch.empty(x.shape))
    rate = counter.get_total_flops() / ms["train_step"] / 1e9
    ratio = ms["train_step"] / (ms["teacher forward"] + ms["student forward, backward"])
    print(f"{labelled} + {extra} slices of {config.crop} x {config.crop} px, "
          f"width {config.width}, {'bfloat16' if options['amp'] else 'float32'}, {device.type}, "
          f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; median ms")
    for name, value in ms.items():
        print(f"{name:26}{value:9.2f}")
    print(f"train_step over the network passes in it: {ratio:.3f}; "
          f"{1000 * len(x) / ms['train_step']:.0f} slices/s, {rate:.3g} TFLOP/s")
    if device.type == "cuda":
        best = 2 * 8192 ** 3 / ms["matrix product"] / 1e9
        print(f"{rate / best:.0%} of a matrix product's {best:.0f} TFLOP/s; peak memory "
              f"{torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    return {**ms, "ratio": ratio}


# --- 13. The phantom -----------------------------------------------------------------------------
# A study that needs no request: 4 sites x 20 subjects of synthetic cervical cords, in the layout
# and file names of the challenge. Painted in mm from back to front, then scanned: bias, noise.
# mm, thick: voxel size in and across the plane, mm; size: matrix, px; slices: fewest and most;
# black: empty ones more at each end; csf ... bone: brightness; noise: its std in that unit; blur:
# of the edges, mm; bias: towards the coil; unit: integer stored for brightness 1; axes: as stored.
Site = collections.namedtuple("Site", "mm thick size slices black csf white grey muscle bone "
                              "noise blur bias unit axes")
SITES = (
    Site(0.50, 5.0, 100, (3, 3), 0, 1.00, 0.50, 0.60, 0.38, 0.10, 0.040, 0.20, 0.1, 400, "LAS"),
    Site(0.50, 7.5, 120, (7, 14), 0, 0.95, 0.55, 0.63, 0.48, 0.07, 0.025, 0.15, 0.2, 9000, "RAS"),
    Site(0.25, 2.5, 208, (19, 20), 4, 1.00, 0.58, 0.69, 0.55, 0.15, 0.050, 0.18, 0.15, 900, "LPS"),
    Site(0.29, 5.0, 184, (12, 14), 0, 0.85, 0.45, 0.52, 0.33, 0.06, 0.035, 0.13, 0.3, 1500, "RPS"))


def ellipse(x, y, center_x, center_y, radius_x, radius_y):
    """About the distance from an ellipse's edge, mm, negative inside."""
    distance = torch.hypot((x - center_x) / radius_x, (y - center_y) / radius_y) - 1
    return distance * torch.minimum(torch.as_tensor(radius_x), torch.as_tensor(radius_y))


def stroke(x, y, x0, y0, x1, y1, radius):
    """Distance from a thick line from (x0, y0) to (x1, y1), mm, negative inside."""
    dx, dy = x1 - x0, y1 - y0
    along = (((x - x0) * dx + (y - y0) * dy) / (dx ** 2 + dy ** 2)).clamp(0, 1)
    return torch.hypot(x - x0 - along * dx, y - y0 - along * dy) - radius


def phantom_subject(site, generator):
    """Paint one subject. -> image (Z, Y, X) int16, four raters' masks (4, Z, Y, X) uint8.

    x to the right, y to the front; masks as in the challenge: 0, 1 grey matter, 2 white matter.
    """
    def draw(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    def noise(cells):                                    # (Z, Y, X) std 1, smooth, changes along z
        corners = torch.randn(2, 1, cells, cells, generator=generator)
        one, two = F.interpolate(corners, [site.size] * 2, mode="bicubic", align_corners=True)
        return one * torch.cos(z / 25) + two * torch.sin(z / 25)

    def paint(value, distance, soft):                    # a shape, over what is there
        edge = soft * (0.2 * site.mm + site.blur)
        return image + (value - image) * torch.sigmoid(-distance / edge)

    count = int(torch.randint(site.slices[0], site.slices[1] + 1, (), generator=generator))
    z = torch.arange(count).view(-1, 1, 1) * site.thick                              # mm
    level = draw(0.0, 0.4) + z / 100                     # 0 at C2, 1 at C7
    swelling = torch.exp(-((level - 0.6) / 0.25) ** 2)   # the cervical enlargement
    disc = 0.5 + 0.5 * torch.cos(2 * math.pi * (z + draw(0, 18)) / 18)               # every 18 mm
    build, front, tilt = draw(0.9, 1.1), draw(6.0, 7.5), math.radians(draw(-6, 6))
    axis = (torch.arange(site.size) - (site.size - 1) / 2) * site.mm
    y, x = torch.meshgrid(axis - draw(-2.5, 2.5), axis - draw(-2.5, 2.5), indexing="ij")
    x, y = x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)
    x, y = x + 0.45 * noise(6), y + 0.45 * noise(6)      # nobody is symmetric
    side = x.abs()

    # Muscle: bundles that run obliquely outwards, parted by planes of fat (bright), fascia (dark)
    fibre = noise(30) + noise(60)
    image = site.muscle * (1 + 0.22 * noise(7) + 0.12 * fibre)
    for brightness in (1.2, 1.0, -0.7, -0.7):
        phase = draw(0.4, 0.8) * (draw(0.5, 1.0) * side + draw(0.3, 1.0) * y)
        plane = torch.cos(phase + 1.3 * noise(5) + 0.6 * noise(12)) - draw(0.90, 0.97)
        strength = (noise(9) + 0.5 * noise(20)).clamp(0, 1.2)
        image = image + brightness * site.muscle * torch.sigmoid(30 * plane) * strength
    # Bone and ligament: lamina, spinous process, facets, vertebra with its marrow; then arteries
    bone = site.bone * (1 + 0.3 * fibre.abs() + 0.5 * noise(14).abs())
    image = paint(bone, stroke(side, y, 13.0, -1.0, 0.0, -draw(11, 14), draw(2.5, 4)), 4)
    image = paint(bone, stroke(x, y, 0.0, -11.0, draw(-1, 1), -30.0, draw(1, 3)), 6)
    image = paint(bone, ellipse(side, y, draw(14, 16), draw(-1, 3), draw(4.5, 6.5), draw(4, 6)), 4)
    image = paint(bone, ellipse(x, y, 0.0, front + 9, draw(12, 15), draw(9, 11)), 2)
    marrow = bone + disc * site.muscle * draw(0.4, 1.0)
    image = paint(marrow, ellipse(x, y, 0.0, front + 9.5, draw(7, 9), draw(4, 5.5)), 8)
    blood, place, radius = draw(0.9, 1.2), (draw(11.5, 14), front + draw(1, 4)), draw(1.4, 2.2)
    image = paint(site.csf * blood, ellipse(side, y, *place, radius, radius), 1.5)
    # Spinal canal: an ellipse behind a flat, slightly hollow front; a dark wall; bright CSF
    flat = y - (front - 0.3 + draw(0.004, 0.016) * side ** 2 - 0.6 * disc)
    back = ellipse(x, y, 0.0, draw(0.5, 1.2), draw(10.5, 12.5) * build, draw(7.3, 8.5) * build)
    canal = torch.logaddexp(1.5 * flat, 1.5 * back) / 1.5                   # a rounded maximum
    csf = site.csf * (1 + 0.07 * noise(7) + 0.008 * y)
    image = paint(site.bone * draw(0.6, 1.2), canal - draw(0.8, 1.6), 1.5)
    image = paint(csf, canal, 1.5)
    # Cord: nerve roots, an ellipse of white matter with a notch in front, the grey butterfly
    y = y - draw(-1.0, 0.8)
    wide, deep = build * (6.1 + 0.9 * swelling) * draw(0.95, 1.05), build * draw(3.7, 4.4)
    for top in (0.35 * deep, -0.35 * deep):
        root = stroke(side, y, 0.8 * wide, top, 1.5 * wide, top * draw(0.6, 2.5), 0.25)
        image = paint(csf * draw(0.7, 0.9), root, 1.5)
    cord = ellipse(x, y + 0.06 * deep * (x / wide) ** 2, 0.0, 0.0, wide, deep)
    cord = cord + 0.5 * torch.exp(-(x / 0.7) ** 2) * torch.sigmoid((y - 0.6 * deep) / 0.3)
    horn = 0.8 + 0.35 * swelling
    ventral = ellipse(side, y, wide * draw(0.19, 0.23), deep * draw(0.20, 0.30),
                      0.125 * wide * horn, 0.27 * deep * horn)
    dorsal = stroke(side, y, 0.16 * wide, 0.0, wide * draw(0.36, 0.48), -deep * draw(0.58, 0.72),
                    draw(0.38, 0.55) * build)
    bridge = stroke(side, y, 0.0, 0.02 * deep, 0.2 * wide, 0.06 * deep, draw(0.3, 0.5))
    grey = -torch.logsumexp(torch.stack([-5 * ventral, -5 * dorsal, -5 * bridge]), 0) / 5  # union
    white = site.white * (1 + 0.03 * noise(20))
    image = paint(white, cord, 1.2)
    image = paint(white + (site.grey - site.white) * draw(0.8, 1.2), grey, 1.2)
    fissure = stroke(x, y, 0.0, 0.45 * deep, 0.0, 1.2 * deep, 0.12)
    image = (image + paint(csf, fissure, 1)) / 2
    # Scanner: coil bias, Rician noise
    image = image * torch.exp(site.bias * (noise(2) - 0.03 * y))
    one, two = site.noise * torch.randn(2, *image.shape, generator=generator)
    image = torch.hypot(image + one, two)
    masks = torch.zeros(4, *image.shape, dtype=torch.uint8)
    for mask in masks:                                   # raters differ by some 0.1 mm, smoothly
        opinion = draw(-0.1, 0.1) + 0.07 * noise(12)
        mask[cord + opinion < 0] = 2
        mask[grey + opinion < 0] = 1
    black = (0, 0, 0, 0, site.black, site.black)
    return F.pad((image * site.unit).round().short(), black), F.pad(masks, black)


def phantom_folder():
    """Where the phantom is kept between runs: the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mean_teacher_seg" / "phantom-1"


def write_phantom(folder, seed=0, sites=SITES, subjects=20):
    """Write the phantom as NIfTI below a new folder, which appears only when it is complete.

    subjects: per site, the first half of them with masks. The same seed writes the same voxels.
    InputError if the folder is there already.
    """
    folder = Path(folder)
    require(not folder.exists(), f"{folder}: is there already; delete it or name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        for s, site in enumerate(sites, start=1):
            print(f"writing the phantom, once, to {folder}: site {s} of {len(sites)}", flush=True)
            for subject in range(1, subjects + 1):
                generator = torch.Generator().manual_seed(10000 * seed + 100 * s + subject)
                image, masks = phantom_subject(site, generator)
                files = {"image": image}
                if subject <= subjects // 2:
                    files |= {f"mask-r{r}": mask for r, mask in enumerate(masks, start=1)}
                for name, voxels in files.items():
                    nifti = nib.Nifti1Image(voxels.permute(2, 1, 0).numpy(),
                                            np.diag([site.mm, site.mm, site.thick, 1]))
                    nifti = nifti.as_reoriented(nib.orientations.axcodes2ornt(site.axes))
                    nib.save(nifti, f"{temporary}/site{s}-sc{subject:02d}-{name}.nii.gz")
        os.chmod(temporary, 0o755)
        if not folder.exists():                          # another process may have been faster
            os.rename(temporary, folder)


# --- 14. Command line ----------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """One line for a wrong option, as for any other bad input."""

    def error(self, message):
        raise InputError(f"{message}; see --help")


def parse(argv):
    """Turn the command line into a Config, every field of which is an option."""
    differs = {key: value for key, value in vars(DEMO).items() if value != getattr(Config, key)}
    parser = Parser(
        usage="%(prog)s [benchmark] [options]\n       %(prog)s predict --help",
        description="Mean-teacher semi-supervised segmentation (Perone & Cohen-Adad 2018).",
        epilog="[Defaults] are those of --preset paper; (here) marks a choice that the paper "
               f"leaves open. --preset demo differs in {differs}.")
    parser.add_argument("--preset", choices=["paper", "demo"],
                        help="paper, or demo for a CPU [demo without --data, paper with it]")
    for field in dataclasses.fields(Config):
        value, kind = field.default, dict(field.metadata)
        if isinstance(value, bool):
            kind["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, tuple):
            kind |= {"nargs": "+", "type": type(value[0]) if value else str, "metavar": "X"}
            value = " ".join(map(str, value))
        else:
            kind["type"] = type(value)
        kind["help"] += f" [{value}]" if value != "" else ""
        parser.add_argument("--" + field.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    parser.add_argument("--overwrite", action="store_true", help="delete other runs in --out")
    given = {key: tuple(value) if isinstance(value, list) else value
             for key, value in vars(parser.parse_args(argv)).items()}
    overwrite = given.pop("overwrite")
    preset = given.pop("preset") or ("paper" if given.get("data") else "demo")
    config = dataclasses.replace(DEMO if preset == "demo" else Config(), **given)
    name = Path(config.data).resolve().name if config.data else "phantom"
    require(len(config.split) == 3, f"--split {config.split}: expected three numbers, as 2 2 3")
    require(len(config.epochs) < 3 and len(config.weight_decay) < 3,
            "--epochs and --weight-decay: expected one number, or two for the two methods")
    require(config.crop % 8 == 0, f"--crop {config.crop}: is not a multiple of 8")
    require(config.crop <= 2048 and config.spacing > 0.01,
            f"--crop {config.crop} --spacing {config.spacing}: at most 2048 px, above 0.01 mm")
    positive = "runs spacing crop width epochs batch lr validate_every".split()
    fractions = "dropout alpha alpha_late confidence threshold scale".split()
    for key, value in vars(config).items():
        for number in value if isinstance(value, tuple) else [value]:
            fine = isinstance(number, str) or 0 <= number <= (1 if key in fractions else 1e9)
            require(fine and (number or key not in positive),                # NaN is not fine
                    f"--{key.replace('_', '-')} {number}: makes no sense; see --help")
    return dataclasses.replace(config, out=config.out or f"runs/{preset}-{name}"), overwrite


def interrupt(*_):
    """On Ctrl-C or SIGTERM: stop when the epoch has ended; the second time, at once."""
    print("interrupted: stops after the epoch; once more to stop at once", flush=True)
    if INTERRUPTED:
        raise KeyboardInterrupt
    INTERRUPTED.append(True)


def main(argv=None):
    """Run a command line (default: the program's own). -> as experiment, predict or benchmark.

    SystemExit 2 with one line `error: ...` for bad input, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv[:1] in (["predict"], ["benchmark"]) else "train"
    signals = (signal.SIGINT, signal.SIGTERM) if command == "train" else ()
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        if command == "predict":
            return predict(argv[1:])
        if command == "benchmark":
            return benchmark(parse(argv[1:])[0])
        return experiment(*parse(argv))
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted; a training goes on when the same command is given again")
        raise SystemExit(130) from None
    finally:
        INTERRUPTED.clear()
        for number, handler in zip(signals, before):
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
