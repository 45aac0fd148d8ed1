# SPDX-License-Identifier: MIT
"""Mean-teacher semi-supervised segmentation, in one file.

The method of C. S. Perone and J. Cohen-Adad, "Deep semi-supervised segmentation with
weight-averaged consistency targets", DLMIA 2018, arXiv:1807.04657. A student network f(theta)
learns from a few labelled slices. A teacher f(theta') is the exponential moving average of its
weights. On labelled and unlabelled slices alike, the student is pulled towards the teacher.

    Algorithm 1, as it is built in section 6 of this file
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

@MEASURED@

Sections: 1 configuration, 2 U-Net, 3 losses, 4 delayed augmentation, 5 teacher and ramps,
6 training step. That is the paper. Then 7 data, 8 metrics, 9 training, 10 experiment,
13 phantom, 14 command line.
"""
import argparse
import copy
import csv
import dataclasses
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


# --- 1. Configuration ----------------------------------------------------------------------------
# Every default is the paper's (its section 3.1) unless the line says "here". Every field is an
# option of the command line, and its text below is what --help prints.

def option(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's experiment; dataclasses.replace() makes another."""
    # What to run
    data: str = option("", "folder of scans, SCGM or BIDS layout; empty: the phantom")
    out: str = option("", "folder for the results; empty: runs/PRESET-DATA")
    method: str = option("both", "supervised, mean_teacher or both")
    runs: int = option(1, "runs per method, with seeds SEED, SEED + 1, ...; the paper: 10")
    seed: int = option(0, "seed of the first run: weights, batches, augmentation")
    device: str = option("auto", "cuda, mps, cpu or auto")
    # Data: 8 training, 8 validation, 12 test subjects, 40 unlabelled
    spacing: float = option(0.25, "in-plane voxel size after resampling, mm")
    crop: int = option(200, "side of the centre crop, px; a multiple of 8 (here: the authors' code)")
    rater: str = option("4", "whose masks: 1, 2, 3, 4 or majority (here: 4, as in the authors' code)")
    split: tuple = option((2, 2, 3), "subjects per site for training, validation, test")
    split_seed: int = option(0, "seed of the split, the same for every run")
    train: tuple = option((), "training subjects by name, instead of --split; every other scan is "
                          "then unlabelled, its mask unread, but for those of --val and --test")
    val: tuple = option((), "validation subjects by name; may stay empty")
    test: tuple = option((), "test subjects by name")
    exclude: tuple = option((), "subjects never used, for example further scans of a test person")
    rescans: bool = option(False, "let further scans of validation and test persons join the "
                           "unlabelled set; sub-XSes1 and sub-XSes2 count as one person X")
    # Network
    width: int = option(64, "channels of the first block (here: the authors' code)")
    dropout: float = option(0.5, "rate of Dropout2d after every block convolution")
    # Optimisation; pairs are (supervised, mean teacher), one number is for both
    epochs: tuple = option((1600, 350), "passes over the labelled slices")
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
    consistency: str = option("bce", "bce, or mse as in the first mean teacher; paper: bce wins")
    augmentation: str = option("delayed", "the teacher's: delayed, or same (both get one input)")
    confidence: float = option(0.0, "drop pixels where the teacher's max(y, 1-y) is below; paper: "
                               "does not help")
    # Augmentation
    degrees: float = option(4.5, "rotation, uniform in +- this many degrees")
    translation: float = option(0.0, "translation, uniform in +- this many px (here)")
    scale: float = option(0.0, "scale, uniform in 1 +- this (here)")
    noise: float = option(0.1, "std of the added noise on z-scored images: N(0, 0.01) read as "
                          "variance; --noise 0.01 is the other reading")
    # Evaluation and machine, all decided here
    threshold: float = option(0.5, "probability above which a pixel is grey matter")
    validate_every: int = option(10, "epochs between two validations and progress lines")
    amp: bool = option(True, "bfloat16 autocast, on CUDA only; the losses stay in float32")
    channels_last: bool = option(True, "channels-last memory, on CUDA only")
    compile: bool = option(False, "torch.compile the networks")


# DEMO is the same method for two CPU cores: coarser, narrower, shorter. Both methods take the same
# steps, and every time constant shrinks with the run (60 / 350 of the paper's epochs): an alpha of
# 0.999 remembers 1000 steps, and would freeze a teacher that only has 600.
DEMO = dataclasses.replace(
    Config(), spacing=0.5, crop=64, width=8, dropout=0.0, lr=6e-3, epochs=(60,), lr_ramp=9,
    consistency_ramp=17, alpha=0.94, alpha_late=0.994, alpha_epochs=9, validate_every=5)


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
        # Logits, not probabilities: their BCE is stable, and autocast refuses the other one.
        return self.out(x)                               # (B, 1, H, W)


# --- 3. Losses -----------------------------------------------------------------------------------

def dice_loss(probabilities, masks):
    """Negative Dice coefficient over the whole mini-batch, in [-1, 0].

    probabilities (B, 1, H, W) in [0, 1], masks of the same shape in {0, 1} -> float32 scalar.
    Source: eq. 3; the smoothing term is the authors' code's.
    """
    # L(theta) = - 2 sum_i p_i y_i / (sum_i p_i + sum_i y_i), i over all pixels of all slices.
    # One ratio per batch, not the mean of one per slice: slices with little grey matter, where a
    # single pixel would swing the ratio, weigh as little as they should. And no class weights:
    # the 99.6 % background pixels that are right as background appear nowhere in it.
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
    # costs 0.693 a pixel however well the student agrees; only the gradient, p - y, vanishes.
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
# same rotated slice lines them up, but then nobody learns that a rotated cord is the same cord.
# So: the student's INPUT and the teacher's OUTPUT are warped, by one and the same phi. That needs
# no trick with gradients: none flows through the teacher, so its output is a target like a mask.

def sample_affine(n, degrees, translation=0.0, scale=0.0, device=None):
    """Draw n random affine transformations phi, uniform in the given ranges.

    degrees: rotation in +- degrees; translation: +- px along both axes; scale: 1 +- scale.
    -> phi (n, 2, 3) float32. It maps where a pixel of the result lies, in px right of and below
    the image's centre, to where its value is taken. Source: sections 2.1 and 3.1.
    """
    def uniform(limit):
        return (2 * torch.rand(n, device=device) - 1) * limit

    # phi inverts the picture's motion: to turn and enlarge it, read along turned, shorter axes.
    angle, zoom = torch.deg2rad(uniform(degrees)), 1 + uniform(scale)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rows = torch.stack([cos, -sin, uniform(translation), sin, cos, uniform(translation)], dim=1)
    return rows.view(n, 2, 3)


def warp(images, phi):
    """g(.; phi): resample by an affine transformation; images, masks and probabilities alike.

    images (B, C, H, W) float, phi (B, 2, 3) in px as from sample_affine -> (B, C, H, W), float32.
    Bilinear, 0 outside the image. Threshold a warped mask at 0.5. Source: section 2.1.
    """
    # affine_grid counts from -1 to 1 across each side, whatever its length. Going there and back
    # in px keeps a rotation a rotation when the image is not square.
    images = images.float()
    height, width = images.shape[-2:]
    half = torch.tensor([width / 2, height / 2, 1.0], device=images.device)
    theta = phi * half / half[:2, None]                  # diag(half)^-1 phi diag(half)
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
    # BatchNorm's running mean and variance are buffers, not parameters, and are NOT averaged here.
    # The teacher runs in train mode on every batch and keeps statistics of its own: they are those
    # of its own activations, which the student's, averaged or not, are not. The one thing that
    # goes wrong, and often has: to skip the buffers AND run the teacher in eval mode. Then they
    # stay at mean 0, variance 1 for ever. If yours must run in eval mode, copy the buffers too.
    for theta_teacher, theta in zip(teacher.parameters(), student.parameters(), strict=True):
        theta_teacher.lerp_(theta, 1 - alpha)            # .data and add_(scalar, x) are history


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
    labelled = len(masks)
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=amp)
    phi = sample_affine(len(images), degrees, translation, scale, images.device)         # line 2
    augmented = warp(images + noise * torch.randn_like(images), phi)
    masks = (warp(masks, phi[:labelled]) >= 0.5).float()
    with autocast:
        logits = student(augmented).float()                                              # line 3
    dice = dice_loss(torch.sigmoid(logits[:labelled]), masks)                            # line 5
    loss, agreement = dice, torch.zeros_like(dice)
    if teacher is not None:
        with torch.no_grad(), autocast:                                                  # line 4
            other = images + noise * torch.randn_like(images)
            if augmentation == "same":                   # what the paper argues against
                targets = torch.sigmoid(teacher(warp(other, phi)).float())
            else:
                targets = warp(torch.sigmoid(teacher(other).float()), phi)
        # Pixels that phi took from outside the image have no target: leave them out.
        valid = warp(torch.ones_like(images), phi) > 0.999
        valid &= torch.maximum(targets, 1 - targets) >= confidence
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


class Scan(NamedTuple):
    site: str                                            # "" in a BIDS folder
    subject: str                                         # "site1-sc01", "sub-9418"
    name: str                                            # "site1-sc01", "sub-9418_run-1"
    image: Path
    masks: dict                                          # rater -> file; BIDS: {"": file}


class Slices(NamedTuple):
    images: torch.Tensor                                 # (N, 1, H, W) float32, z-scored per slice
    masks: torch.Tensor | None                           # (N, 1, H, W) float32 in {0, 1}
    where: list                                          # N times (site, scan, slice from 0)


def find_scans(folder):
    """List the scans below a folder, in either layout. -> list of Scan; InputError if none.

    SCGM: siteS-scNN-image.nii.gz with siteS-scNN-mask-rR.nii.gz beside it, at any depth.
    BIDS: sub-*/**/anat/*_T2star*.nii.gz with derivatives/labels/(same path)_gmseg*.nii.gz.
    """
    folder, scans = Path(folder), []
    for path in sorted(folder.rglob("site*-sc*-image.nii.gz")):
        name = path.name.removesuffix("-image.nii.gz")
        masks = {rater: path.with_name(f"{name}-mask-r{rater}.nii.gz") for rater in "1234"}
        masks = {rater: mask for rater, mask in masks.items() if mask.exists()}
        scans.append(Scan(name.split("-")[0], name, name, path, masks))
    for path in sorted(folder.glob("sub-*/**/anat/*_T2star*.nii.gz")):
        place, stem = path.parent.relative_to(folder), path.name.removesuffix(".nii.gz")
        masks = sorted((folder / "derivatives" / "labels" / place).glob(f"{stem}_gmseg*.nii.gz"))
        name = re.sub("_T2star.*", "", stem)
        scans.append(Scan("", place.parts[0], name, path, {"": masks[0]} if masks else {}))
    if not scans:
        raise InputError(f"{folder}: no scans found; expected site1-sc01-image.nii.gz ... (SCGM) "
                         "or sub-*/anat/*_T2star*.nii.gz (BIDS); give their folder as --data")
    return scans


def person(scan):
    return re.sub(r"Ses\d+$", "", scan.subject)          # two sessions of one person may not part


def split_scans(scans, config):
    """Deal the scans out. -> dict of list of Scan: train, val, test (with masks), unlabelled.

    By --train, --val, --test if given, else --split random persons per site, drawn with
    --split-seed. No person is on two sides. InputError if that cannot be done.
    """
    chosen = {"train": config.train, "val": config.val, "test": config.test}
    by_name = any(chosen.values())
    scans = [scan for scan in scans if scan.subject not in config.exclude]
    if by_name:
        known = {scan.subject for scan in scans if scan.masks}
        unknown = [name for names in chosen.values() for name in names if name not in known]
        if unknown or not (config.train and config.test):
            raise InputError(f"{config.data}: {' '.join(unknown) or 'an empty --train or --test'}:"
                             f" no such subject with masks; name some of {' '.join(sorted(known))}")
        sets = {key: [scan for scan in scans if scan.masks and scan.subject in names]
                for key, names in chosen.items()}
    else:
        sets = {"train": [], "val": [], "test": []}
        generator = np.random.default_rng(config.split_seed)
        for site in sorted({scan.site for scan in scans}):
            persons = sorted({person(s) for s in scans if s.site == site and s.masks})
            if len(persons) < sum(config.split):
                raise InputError(f"{config.data}: {site or 'the folder'} has {len(persons)} people"
                                 f" with masks, --split {config.split} wants {sum(config.split)}; "
                                 "give a smaller --split, or name subjects: --train A B --test C")
            order = iter(generator.permutation(persons))
            for key, count in zip(sets, config.split):
                mine = {next(order) for _ in range(count)}
                sets[key] += [s for s in scans if s.site == site and s.masks and person(s) in mine]
    people = {key: {person(scan) for scan in members} for key, members in sets.items()}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if people[one] & people[other]:
            raise InputError(f"{config.data}: {' '.join(sorted(people[one] & people[other]))} is "
                             f"in --{one} and in --{other}; keep each person on one side")
    held_out = set() if config.rescans else people["val"] | people["test"]
    used = [scan for members in sets.values() for scan in members]
    sets["unlabelled"] = [scan for scan in scans if scan not in used and person(scan) not in
                          held_out and (by_name or not scan.masks)]
    return sets


def read_volume(path):
    """Read a 3-D NIfTI. -> array (X, Y, Z) float32, axes to the right, anterior, superior; mm."""
    try:
        image = nib.as_closest_canonical(nib.load(path))
        volume = image.get_fdata(dtype=np.float32)
    except Exception as error:                           # nibabel's readers raise a dozen kinds
        raise InputError(f"{path}: cannot be read as NIfTI ({error}); fetch it again") from error
    if volume.ndim != 3:
        raise InputError(f"{path}: has {volume.ndim} dimensions, expected 3; split it first")
    return volume, [float(mm) for mm in image.header.get_zooms()]


def read_mask(scan, rater, shape):
    """Grey matter of one rater or of the majority. -> array (X, Y, Z) float32 in {0, 1}."""
    raters = list(scan.masks) if rater == "majority" or "" in scan.masks else [rater]
    votes = []
    for key in raters:
        if key not in scan.masks:
            raise InputError(f"{scan.image}: no mask of rater {key}; there are "
                             f"{' '.join(scan.masks)}, choose with --rater")
        mask, _ = read_volume(scan.masks[key])
        if mask.shape != shape or not np.isin(mask, (0, 1, 2)[:3 if key else 2]).all():
            raise InputError(f"{scan.masks[key]}: expected the image's shape {shape} and values 0,"
                             f" 1{' or 2' * bool(key)}, found {mask.shape} and "
                             f"{np.unique(mask)[:5]}")
        votes.append(mask == 1)                          # 1 grey matter; 2 is white matter
    return (np.mean(votes, axis=0) > 0.5).astype(np.float32)  # a 2-2 tie is background


def to_slices(volume, voxel_mm, spacing):
    """Cut a volume (X, Y, Z) into axial slices resampled in their plane. -> (Z, 1, H, W) float32.

    voxel_mm: its voxel size; spacing: the wanted one, mm (met to half a pixel in the whole width).
    Linear, antialiased when shrinking. Source: "resampled to 0.25 x 0.25 mm", section 3.1.
    """
    slices = torch.from_numpy(volume).permute(2, 1, 0).flip(1).unsqueeze(1)
    size = [max(1, round(slices.shape[2] * voxel_mm[1] / spacing)),
            max(1, round(slices.shape[3] * voxel_mm[0] / spacing))]
    return F.interpolate(slices, size=size, mode="bilinear", antialias=True)


def center_crop(slices, size):
    """Crop (N, 1, H, W) around its centre to (N, 1, size, size); 0 where the image is smaller."""
    top, left = (slices.shape[2] - size) // 2, (slices.shape[3] - size) // 2
    bottom, right = slices.shape[2] - size - top, slices.shape[3] - size - left
    return F.pad(slices, (-left, -right, -top, -bottom))  # a negative pad crops


def normalise(slices):
    """Give each slice mean 0 and std 1, since every scanner has a scale of its own."""
    mean, std = slices.mean((2, 3), keepdim=True), slices.std((2, 3), keepdim=True)
    return (slices - mean) / std.clamp(min=1e-6)


def read_set(scans, config, labelled):
    """Read scans into Slices. Unlabelled ones' masks are not even opened.

    Labelled sets lose slices without grey matter, and every set those without any contrast.
    """
    images, masks, where = [], [], []
    for scan in scans:
        volume, voxel_mm = read_volume(scan.image)
        image = center_crop(to_slices(volume, voxel_mm, config.spacing), config.crop)
        keep = image.flatten(1).std(1) > 0
        if labelled:
            mask = read_mask(scan, config.rater, volume.shape)
            whole = (to_slices(mask, voxel_mm, config.spacing) >= 0.5).float()
            mask = center_crop(whole, config.crop)
            lost = 100 * (1 - mask.sum() / whole.sum().clamp(min=1)).item()
            if lost > 1:
                print(f"warning: {scan.image}: {lost:.0f} % of the grey matter is outside the "
                      f"centre crop of {config.crop} px at {config.spacing} mm; raise --crop")
            keep &= mask.flatten(1).any(1)
            masks.append(mask[keep])
        images.append(normalise(image)[keep])
        where += [(scan.site, scan.name, int(z)) for z in keep.nonzero()]
    empty = torch.zeros(0, 1, config.crop, config.crop)
    return Slices(torch.cat([empty, *images]), torch.cat([empty, *masks]) if labelled else None,
                  where)


def load_data(config, device="cpu"):
    """Read all that an experiment needs. -> dict of Slices: train, val, test, unlabelled."""
    folder = Path(config.data) if config.data else phantom_folder()
    if not config.data and not folder.exists():
        write_phantom(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the folder of your scans as --data")
    data = {}
    for name, scans in split_scans(find_scans(folder), config).items():
        part = read_set(scans, config, labelled=name != "unlabelled")
        subjects = sorted({scan.subject for scan in scans})
        print(f"{name:>10}: {len(part.images):4d} slices of {len(subjects):2d} subjects"
              + (f": {' '.join(subjects)}" if config.train else ""))
        data[name] = Slices(part.images.to(device),
                            None if part.masks is None else part.masks.to(device), part.where)
    if not len(data["train"].images) or not len(data["test"].images):
        raise InputError(f"{folder}: no grey matter in any training or test slice; check --crop")
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
    return {name: 100 * top / below.clamp(min=1) for name, (top, below) in ratios.items()}


@torch.no_grad()
def predict_probabilities(model, images, batch=32):
    """Probability of grey matter, in eval mode. (N, 1, H, W) z-scored -> the same shape."""
    training = model.training
    model.eval()
    probabilities = [torch.sigmoid(model(part).float()) for part in images.split(batch)]
    model.train(training)
    return torch.cat(probabilities) if probabilities else images


def evaluate(model, slices, threshold=0.5):
    """segmentation_metrics of a network on Slices. -> dict of (N,) tensors in percent."""
    return segmentation_metrics(predict_probabilities(model, slices.images) > threshold,
                                slices.masks)


# --- 9. The training loop ------------------------------------------------------------------------

def for_method(pair, method):
    return pair[-1] if method == "mean_teacher" else pair[0]


def pick_device(name):
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else
                        "mps" if torch.backends.mps.is_available() else "cpu")


def build_student(config, device):
    student = UNet(config.width, config.dropout).to(device)
    if config.channels_last and device.type == "cuda":   # slower on a CPU: see the benchmark
        student = student.to(memory_format=torch.channels_last)
    return student


def save(path, write):
    """Write a file whole or not at all: to a temporary name, to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    save(path, lambda file: file.write(text.getvalue().encode()))


def train(config, method, seed, data, out):
    """Train one network (and its teacher) from scratch; evaluate the last epoch on the test set.

    method: supervised or mean_teacher; data: from load_data, on the device. Writes METHOD-seedS.pt
    and .csv into out. -> dict: history (a dict per epoch), metrics[model][metric] per test slice.
    """
    device, labelled, unlabelled = data["train"].images.device, data["train"], data["unlabelled"]
    epochs = for_method(config.epochs, method)
    batch = min(config.batch, len(labelled.images))
    steps = len(labelled.images) // batch                # the last part batch is dropped
    torch.manual_seed(seed)                              # weights, batches, phi, noise, Dropout
    student = build_student(config, device)
    teacher = make_teacher(student) if method == "mean_teacher" else None
    models = {"student": student, **({"teacher": teacher} if teacher else {})}
    for model in models.values() if config.compile else ():
        model.compile()
    optimizer = torch.optim.Adam(student.parameters(), betas=(0.9, 0.999),  # L2, not AdamW
                                 weight_decay=for_method(config.weight_decay, method))
    fixed = {name: getattr(config, name) for name in
             "degrees translation scale noise consistency augmentation confidence".split()}
    fixed["amp"] = config.amp and device.type == "cuda"
    extra = config.unlabelled_batch if teacher and len(unlabelled.images) else 0
    print(f"\n{method}, seed {seed}: {epochs} epochs x {steps} steps = {epochs * steps} steps of "
          f"{batch}{f' + {extra}' * bool(extra)} slices on {device.type}")
    history, start = [], time.perf_counter()
    for epoch in range(1, epochs + 1):
        lr = config.lr * learning_rate_factor(epoch, epochs, config.lr_ramp)
        for group in optimizer.param_groups:
            group["lr"] = lr
        weight = config.consistency_weight * ramp_up(epoch, config.consistency_ramp)
        alpha = config.alpha if epoch <= config.alpha_epochs else config.alpha_late
        sums, order = 0, torch.randperm(len(labelled.images), device=device)
        if extra:                                        # round and round, in a new order an epoch
            more = torch.randperm(len(unlabelled.images), device=device)
            more = more.repeat(math.ceil(steps * extra / len(more)))
        for i in range(steps):
            mine = order[i * batch:(i + 1) * batch]
            images = labelled.images[mine]                                # (B, 1, H, W)
            if extra:
                others = unlabelled.images[more[i * extra:(i + 1) * extra]]
                images = torch.cat([images, others])
            losses = train_step(student, teacher, optimizer, images, labelled.masks[mine],
                                (epoch - 1) * steps + i, weight, alpha, **fixed)
            sums = sums + torch.stack([losses["dice"], losses["consistency"]])
            if epoch == 1 and i == 2:
                announce(epochs * steps, (time.perf_counter() - start) / 3, sums, device)
        dice, consistency = (sums / steps).tolist()      # the epoch's one wait for the device
        row = {"epoch": epoch, "step": epoch * steps, "dice_loss": dice, "consistency_loss":
               consistency, "weight": weight if teacher else 0.0, "lr": lr,
               "val_student": "", "val_teacher": ""}
        if epoch % config.validate_every == 0 or epoch == epochs:
            if len(data["val"].images):
                for name, model in models.items():
                    row[f"val_{name}"] = evaluate(model, data["val"], config.threshold
                                                  )["dice"].mean().item()
            progress(row, epochs, steps, time.perf_counter() - start)
        history.append(row)
    metrics = {name: {key: value.tolist() for key, value in
                      evaluate(model, data["test"], config.threshold).items()}
               for name, model in models.items()}
    save_csv(out / f"{method}-seed{seed}.csv", history)
    state = {"config": dataclasses.asdict(config), "method": method, "seed": seed,
             "history": history, "metrics": metrics,
             **{name: model.state_dict() for name, model in models.items()}}
    save(out / f"{method}-seed{seed}.pt", lambda file: torch.save(state, file))
    return state


def announce(steps, seconds_per_step, wait_for, device):
    wait_for.tolist()
    total = steps * seconds_per_step
    print(f"about {duration(total)} for this run" + (
        f" on this {device.type}; --preset demo takes minutes" if total > 3600 else ""))
    print("   epoch  dice loss  consistency  weight       lr  val Dice: student  teacher"
          "  steps/s  time left")


def duration(seconds):
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def progress(row, epochs, steps, seconds):
    student, teacher = (f"{row[key]:.2f}" if row[key] != "" else "-"
                        for key in ("val_student", "val_teacher"))
    left = seconds / row["epoch"] * (epochs - row["epoch"])
    print(f"{row['epoch']:4d}/{epochs:<4d}{row['dice_loss']:10.4f}{row['consistency_loss']:13.4f}"
          f"{row['weight']:8.2f}{row['lr']:10.1e}{student:>18}{teacher:>9}"
          f"{row['epoch'] * steps / seconds:9.1f}{duration(left):>11}", flush=True)


# --- 10. Experiment: methods x runs, table, pictures ---------------------------------------------

PAPER = {"supervised, paper": ("67.92 (0.31)", "53.68 (0.33)", "99.75 (0.01)", "57.95 (0.79)",
                               "92.50 (0.91)", "99.78 (0.01)"),
         "mean teacher, paper": ("70.21 (0.23)", "55.51 (0.25)", "99.79 (0.00)", "64.73 (0.77)",
                                 "86.11 (0.94)", "99.85 (0.01)")}
LABELS = {("supervised", "student"): "supervised",
          ("mean_teacher", "student"): "mean teacher (student)",
          ("mean_teacher", "teacher"): "mean teacher (teacher)"}
COLORS = {"rater": "#009e73", "supervised": "#d55e00",    # Okabe and Ito's, for every reader's eyes
          "mean teacher (student)": "#56b4e9", "mean teacher (teacher)": "#0072b2"}


def experiment(config):
    """Train every method with every seed, evaluate, report. -> dict: scores, difference, table.

    scores[row][metric]: a list over seeds of the mean over test slices, percent. Files: see README.
    """
    out, device = Path(config.out), pick_device(config.device)
    data = load_data(config, device)
    methods = ("supervised", "mean_teacher") if config.method == "both" else (config.method,)
    save(out / "config.json",
         lambda file: file.write(json.dumps(dataclasses.asdict(config), indent=1).encode()))
    runs = [train(config, method, seed, data, out)
            for seed in range(config.seed, config.seed + config.runs) for method in methods]
    save_csv(out / "metrics.csv", [
        dict(method=run["method"], seed=run["seed"], model=model, site=site, subject=subject,
             slice=z, **{metric: round(values[metric][i], 4) for metric in METRICS})
        for run in runs for model, values in run["metrics"].items()
        for i, (site, subject, z) in enumerate(data["test"].where)])
    scores = {}
    for run in runs:
        for model, values in run["metrics"].items():
            row = scores.setdefault(LABELS[run["method"], model], {m: [] for m in METRICS})
            for metric in METRICS:
                row[metric].append(float(np.mean(values[metric])))
    table, difference = make_table(scores, paper=data["test"].where[0][0] and config.data)
    save(out / "table.md", lambda file: file.write(table.encode()))
    draw_curves(runs, out / "curves.png")
    draw_examples(config, runs, data["test"], out / "examples.png")
    print(f"\n{table}\nResults, curves.png and examples.png are in {out}")
    return {"scores": scores, "difference": difference, "table": table}


def make_table(scores, paper=False):
    """Table 1's layout in Markdown, and the paired Dice difference (mean, standard error)."""
    def cell(values):
        return f"{np.mean(values):.2f}" + (f" ({np.std(values, ddof=1):.2f})" if values[1:] else "")

    rows = {label: [cell(row[metric]) for metric in METRICS] for label, row in scores.items()}
    rows |= PAPER if paper else {}
    lines = [("percent", *("Dice mIoU Accuracy Precision Recall Specificity".split()))]
    lines += [(label, *cells) for label, cells in rows.items()]
    width = [max(len(line[i]) for line in lines) for i in range(7)]
    lines.insert(1, ["-" * width[0]] + ["-" * (w - 1) + ":" for w in width[1:]])
    text = "".join("| " + " | ".join([line[0].ljust(width[0]), *(
        value.rjust(w) for value, w in zip(line[1:], width[1:]))]) + " |\n" for line in lines)
    runs = len(next(iter(scores.values()))["dice"])
    text += f"\nTest Dice etc. per slice, averaged; mean{' (std)' * (runs > 1)} of {runs} run(s).\n"
    if "supervised" not in scores or len(scores) < 3:
        return text, None
    pairs = np.subtract(scores["mean teacher (teacher)"]["dice"], scores["supervised"]["dice"])
    error = float(np.std(pairs, ddof=1) / math.sqrt(runs)) if runs > 1 else math.nan
    text += f"Teacher minus supervised: {pairs.mean():+.2f} Dice"
    text += f", standard error {error:.2f}, {runs} pairs\n" if runs > 1 else " (one pair)\n"
    return text, (float(pairs.mean()), error)


def draw_curves(runs, path):
    """Losses and validation Dice against the step, one line a run."""
    from matplotlib.figure import Figure                  # needs no screen; slow to import
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = (("Dice loss (training)", "-Dice", {"student": "dice_loss"}),
              ("Consistency loss (training)", "BCE or MSE", {"teacher": "consistency_loss"}),
              ("Consistency weight", "w", {"teacher": "weight"}),
              ("Validation Dice", "%", {"student": "val_student", "teacher": "val_teacher"}))
    for axis, (title, unit, columns) in zip(axes.flat, panels):
        for run in runs:
            for model, column in columns.items():
                label = LABELS.get((run["method"], model))
                rows = [row for row in run["history"] if row[column] != ""]
                if label and rows:
                    axis.plot([row["step"] for row in rows], [row[column] for row in rows],
                              color=COLORS[label], lw=1.5,
                              ls="--" if model == "teacher" else "-",
                              label=label if run["seed"] == runs[0]["seed"] else None)
        axis.set(title=title, xlabel="training step", ylabel=unit)
        if axis.lines:
            axis.legend(fontsize=8)
    save(path, lambda file: figure.savefig(file, format="png", dpi=110))


def draw_examples(config, runs, slices, path):
    """Up to four test slices, of different scans: image, rater, and each first run's outline."""
    from matplotlib.figure import Figure
    by_scan = {}
    for i, (_, scan, _) in enumerate(slices.where):
        by_scan.setdefault(scan, []).append(i)
    middles = [members[len(members) // 2] for members in by_scan.values()]
    picked = middles[::max(1, len(middles) // 4)][:4]
    part = Slices(slices.images[picked], slices.masks[picked], [slices.where[i] for i in picked])
    columns = {"image": None, "rater": part.masks}
    for run in runs:
        model = "teacher" if run["method"] == "mean_teacher" else "student"
        if LABELS[run["method"], model] not in columns:
            network = UNet(config.width, config.dropout).to(part.images.device)
            network.load_state_dict(run[model])
            columns[LABELS[run["method"], model]] = predict_probabilities(network, part.images)
    side = min(config.crop, round(24 / config.spacing))   # the middle 24 mm
    figure = Figure(figsize=(3 * len(columns), 3.2 * len(picked)), layout="constrained")
    axes = figure.subplots(len(picked), len(columns), squeeze=False)
    for column, (title, values) in enumerate(columns.items()):
        for row, (_, scan, z) in enumerate(part.where):
            axis = axes[row, column]
            axis.imshow(center_crop(part.images, side)[row, 0].cpu(), cmap="gray")
            axis.set(xticks=[], yticks=[], title=f"{scan}, slice {z}" if values is None else title)
            if values is None:
                continue
            level = 0.5 if title == "rater" else config.threshold
            axis.contour(center_crop(values, side)[row, 0].cpu(), [level], colors=COLORS[title])
            if title != "rater":
                dice = segmentation_metrics(values > level, part.masks)["dice"][row].item()
                axis.set_xlabel(f"Dice {dice:.1f} %")
    save(path, lambda file: figure.savefig(file, format="png", dpi=110))


# --- 13. The phantom -----------------------------------------------------------------------------
# A study that needs no request: 4 sites x 20 subjects of synthetic cervical cords in the layout and
# file names of the challenge. Painted in mm from front to back, then scanned: blur, bias, noise.

# A site's row: voxel in the plane and its thickness, mm; matrix, px; slices; black slices at each
# end; brightness of CSF, white and grey matter, muscle, bone; noise std; blur, mm; coil bias.
SITES = (dict(mm=0.50, thick=5.0, size=100, slices=(3, 3), black=0, csf=1.00, white=0.50, grey=0.60,
              muscle=0.38, bone=0.10, noise=0.040, blur=0.28, bias=0.10, unit=400, axes="LAS"),
         dict(mm=0.50, thick=7.5, size=120, slices=(7, 14), black=0, csf=0.95, white=0.55, grey=0.63,
              muscle=0.48, bone=0.07, noise=0.025, blur=0.22, bias=0.20, unit=9000, axes="RAS"),
         dict(mm=0.25, thick=2.5, size=208, slices=(19, 20), black=4, csf=1.00, white=0.58, grey=0.69,
              muscle=0.55, bone=0.15, noise=0.050, blur=0.25, bias=0.15, unit=900, axes="LPS"),
         dict(mm=0.29, thick=5.0, size=184, slices=(12, 14), black=0, csf=0.85, white=0.45, grey=0.52,
              muscle=0.33, bone=0.06, noise=0.035, blur=0.20, bias=0.30, unit=1500, axes="RPS"))


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
    """Paint one subject. -> image (Z, Y, X) int16, four raters' masks (4, Z, Y, X) uint8 as SCGM's.

    Y to the front, X to the right; site: a row of SITES. Masks: 0, 1 grey matter, 2 white matter.
    """
    def draw(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    def noise(cells):                                    # (Z, Y, X) std 1, smooth, changes along z
        corners = torch.randn(2, 1, cells, cells, generator=generator)
        one, two = F.interpolate(corners, size=(site["size"],) * 2, mode="bicubic",
                                 align_corners=True)
        return one * torch.cos(z / 25) + two * torch.sin(z / 25)

    def paint(image, value, distance, soft):             # a shape whose edge is `soft` voxels wide
        return torch.lerp(image, torch.as_tensor(value).expand_as(image),
                          torch.sigmoid(-distance / (soft * (0.3 * site["mm"] + 0.1))))

    count = int(torch.randint(site["slices"][0], site["slices"][1] + 1, (), generator=generator))
    z = torch.arange(count).view(-1, 1, 1) * site["thick"]                           # mm
    level = draw(0.0, 0.4) + z / 100                     # 0 at C2, 1 at C7
    swelling = torch.exp(-((level - 0.6) / 0.25) ** 2)   # the cervical enlargement
    disc = 0.5 + 0.5 * torch.cos(2 * math.pi * (z + draw(0, 18)) / 18)               # every 18 mm
    build, front, tilt = draw(0.9, 1.1), draw(6.0, 7.5), math.radians(draw(-6, 6))
    csf, white, muscle = site["csf"], site["white"], site["muscle"]
    axis = (torch.arange(site["size"]) - (site["size"] - 1) / 2) * site["mm"]
    y, x = torch.meshgrid(axis - draw(-2.5, 2.5), axis - draw(-2.5, 2.5), indexing="ij")
    x, y = x * math.cos(tilt) - y * math.sin(tilt), x * math.sin(tilt) + y * math.cos(tilt)
    x, y = x + 0.45 * noise(6), y + 0.45 * noise(6)      # nobody is symmetric
    side = x.abs()

    # Muscle: bundles that run obliquely outwards, parted by planes of fat (bright), fascia (dark)
    fibre = noise(30) + noise(60)
    image = muscle * (1 + 0.22 * noise(7) + 0.12 * fibre)
    for brightness in (1.2, 1.0, -0.7, -0.7):
        phase = draw(0.4, 0.8) * (draw(0.5, 1.0) * side + draw(0.3, 1.0) * y)
        plane = torch.cos(phase + 1.3 * noise(5) + 0.6 * noise(12)) - draw(0.90, 0.97)
        strength = (noise(9) + 0.5 * noise(20)).clamp(0, 1.2)
        image = image + brightness * muscle * torch.sigmoid(30 * plane) * strength
    # Bone and ligament: lamina, spinous process, facets, vertebra with its marrow; then arteries
    bone = site["bone"] * (1 + 0.3 * fibre.abs() + 0.5 * noise(14).abs())
    for value, distance, soft in (
            (bone, stroke(side, y, 13.0, -1.0, 0.0, -draw(11, 14), draw(2.5, 4.0)), 4),
            (bone, stroke(x, y, 0.0, -11.0, draw(-1, 1), -30.0, draw(1.0, 3.0)), 6),
            (bone, ellipse(side, y, draw(14, 16), draw(-1, 3), draw(4.5, 6.5), draw(4, 6)), 4),
            (bone, ellipse(x, y, 0.0, front + 9, draw(12, 15), draw(9, 11)), 2),
            (bone + disc * muscle * draw(0.4, 1.0),
             ellipse(x, y, 0.0, front + 9.5, draw(7, 9), draw(4, 5.5)), 8),
            (csf * draw(0.9, 1.2),
             ellipse(side, y, draw(11.5, 14), front + draw(1, 4), *[draw(1.4, 2.2)] * 2), 1.5)):
        image = paint(image, value, distance, soft)
    # Spinal canal: an ellipse behind a flat, slightly hollow front; a dark wall; bright CSF
    flat = y - (front - 0.3 + draw(0.004, 0.016) * side ** 2 - 0.6 * disc)
    back = ellipse(x, y, 0.0, draw(0.5, 1.2), draw(10.5, 12.5) * build, draw(7.3, 8.5) * build)
    canal = torch.logaddexp(1.5 * flat, 1.5 * back) / 1.5                   # a rounded maximum
    csf = csf * (1 + 0.07 * noise(7) + 0.008 * y)
    image = paint(image, site["bone"] * draw(0.6, 1.2), canal - draw(0.8, 1.6), 1.5)
    image = paint(image, csf, canal, 1.5)
    # Cord: nerve roots, an ellipse of white matter with a notch in front, the grey butterfly
    y = y - draw(-1.0, 0.8)
    wide, deep = build * (6.1 + 0.9 * swelling) * draw(0.95, 1.05), build * draw(3.7, 4.4)
    for top in (0.35 * deep, -0.35 * deep):
        root = stroke(side, y, 0.8 * wide, top, 1.5 * wide, top * draw(0.6, 2.5), 0.25)
        image = paint(image, csf * draw(0.7, 0.9), root, 1.5)
    cord = ellipse(x, y + 0.06 * deep * (x / wide) ** 2, 0.0, 0.0, wide, torch.tensor(deep))
    cord = cord + 0.5 * torch.exp(-(x / 0.7) ** 2) * torch.sigmoid((y - 0.6 * deep) / 0.3)
    horn = 0.8 + 0.35 * swelling
    ventral = ellipse(side, y, wide * draw(0.19, 0.23), deep * draw(0.20, 0.30),
                      0.125 * wide * horn, 0.27 * deep * horn)
    dorsal = stroke(side, y, 0.16 * wide, 0.0, wide * draw(0.36, 0.48), -deep * draw(0.58, 0.72),
                    draw(0.38, 0.55) * build)
    bridge = stroke(side, y, 0.0, 0.02 * deep, 0.2 * wide, 0.06 * deep, draw(0.3, 0.5))
    grey = -torch.logsumexp(torch.stack([-5 * ventral, -5 * dorsal, -5 * bridge]), 0) / 5  # union
    white = white * (1 + 0.03 * noise(20))
    image = paint(image, white, cord, 1.2)
    image = paint(image, white + (site["grey"] - site["white"]) * draw(0.8, 1.2), grey, 1.2)
    fissure = stroke(x, y, 0.0, 0.45 * deep, 0.0, 1.2 * deep, 0.12)
    image = (image + paint(image, csf, fissure, 1.0)) / 2
    # Scanner: coil bias, point spread, Rician noise
    image = image * torch.exp(site["bias"] * (noise(2) - 0.03 * y))
    reach = math.ceil(2 * site["blur"] / site["mm"]) + 1
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) * site["mm"] / site["blur"]) ** 2)
    image = F.pad(image.unsqueeze(1), (reach,) * 4, mode="replicate")
    image = F.conv2d(image, taps.outer(taps)[None, None] / taps.sum() ** 2).squeeze(1)
    one, two = site["noise"] * torch.randn(2, *image.shape, generator=generator)
    image = torch.hypot(image + one, two)
    masks = torch.zeros(4, *image.shape, dtype=torch.uint8)
    for mask in masks:                                   # raters differ by some 0.1 mm, smoothly
        opinion = draw(-0.1, 0.1) + 0.07 * noise(12)
        mask[cord + opinion < 0] = 2
        mask[grey + opinion < 0] = 1
    black = (0, 0, 0, 0, site["black"], site["black"])
    return F.pad((image * site["unit"]).round().short(), black), F.pad(masks, black)


def phantom_folder():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mean_teacher_seg" / "phantom-1"


def write_phantom(folder, seed=0, sites=SITES, subjects=20):
    """Write the phantom as NIfTI below `folder`, which appears only when it is complete.

    sites: rows like SITES; subjects: per site, the first half of them with masks (at most 10).
    The same seed writes the same voxels. InputError if the folder is there or cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder}: is there already; delete it or name another")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".phantom", dir=folder.parent))
    halves = [temporary / "training-data-gm-sc-challenge-ismrm16-v20160302b",
              temporary / "test-data-gm-sc-challenge-ismrm16-v20160401"]
    try:
        for half in halves:
            half.mkdir()
        for s, site in enumerate(sites, start=1):
            print(f"writing the phantom, once: site {s} of {len(sites)}, {folder}", flush=True)
            affine = np.diag([site["mm"], site["mm"], site["thick"], 1.0])
            stored = nib.orientations.axcodes2ornt(site["axes"])
            for subject in range(1, subjects + 1):
                generator = torch.Generator().manual_seed(10000 * seed + 100 * s + subject)
                image, masks = phantom_subject(site, generator)
                labelled = subject <= min(10, subjects // 2)
                files = {"image": image, **{f"mask-r{r}": m for r, m in enumerate(masks, start=1)}}
                for name, voxels in files.items() if labelled else [("image", image)]:
                    nifti = nib.Nifti1Image(voxels.permute(2, 1, 0).numpy(), affine)
                    nifti.header.set_xyzt_units("mm")
                    nib.save(nifti.as_reoriented(stored), halves[not labelled] /
                             f"site{s}-sc{subject:02d}-{name}.nii.gz")
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- 14. Command line ----------------------------------------------------------------------------

def parse(argv):
    """Turn the command line into a Config, every field of which is an option."""
    parser = argparse.ArgumentParser(
        description="Mean-teacher semi-supervised segmentation (Perone & Cohen-Adad 2018).",
        epilog="Defaults are those of the paper preset; the demo preset differs in: " + ", ".join(
            f"{key} {value}" for key, value in dataclasses.asdict(DEMO).items()
            if value != getattr(Config(), key)))
    parser.add_argument("--preset", choices=["paper", "demo"],
                        help="paper (with --data) or demo, for a CPU (without)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    for field in dataclasses.fields(Config):
        default, flag = field.default, "--" + field.name.replace("_", "-")
        text = field.metadata["help"].replace("%", "%%")
        kind = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif isinstance(default, tuple):
            kind = {"nargs": "+", "type": type(default[0]) if default else str}
            default = " ".join(map(str, default))
        parser.add_argument(flag, default=argparse.SUPPRESS, help=f"{text} [{default}]",
                            metavar=None if "action" in kind else "X", **kind)
    given = vars(parser.parse_args(argv))
    preset, overwrite = given.pop("preset"), given.pop("overwrite")
    preset = preset or ("paper" if given.get("data") else "demo")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    config = dataclasses.replace(DEMO if preset == "demo" else Config(), **given)
    name = Path(config.data).resolve().name if config.data else "phantom"
    config = dataclasses.replace(config, out=config.out or f"runs/{preset}-{name}")
    for field, choices in (("method", "both supervised mean_teacher"), ("consistency", "bce mse"),
                           ("augmentation", "delayed same"), ("rater", "1 2 3 4 majority")):
        if getattr(config, field) not in choices.split():
            raise InputError(f"--{field} {getattr(config, field)}: expected one of {choices}")
    return config, overwrite


def main(argv=None):
    """Run a command line (default: the program's own). -> the results of experiment()."""
    try:
        config, overwrite = parse(argv)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        return experiment(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
