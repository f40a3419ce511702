"""The codec task: an autoencoder from scratch, small enough that decoding costs less than denoising.

    image --encode--> mean --noise--> z --decode--> image';  loss = difference of image' and image + KL

Training uses crops at first and whole images later, because group normalization averages over the whole image.
Whole images are decoded from noisy latents. Half of these latents are averaged to half the size and compared with the
image at half the size (after Kouzelis et al. 2025, EQ-VAE, arXiv 2502.09509), so that a denoiser can begin at half
the size. At the end every latent channel gets mean 0 and deviation 1: both are folded into the 1x1 convolutions on
either side of the latents, so the denoiser needs no scaling factor.

A codec for images of twice the size can learn the latents of a smaller one (`--teacher OUT/export`): its encoder
learns to give them, and its decoder learns to draw from them.

The absolute error alone leaves edges soft, because a blurred edge is the safest guess. `--codec OUT/export
--adversarial` therefore trains the decoder further against a discriminator of patches (Isola et al. 2017) and compares
the discriminator's features of output and image (Wang et al. 2018).
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdlite.config import AutoencoderKLConfig
from sdlite.images.files import save_picture
from sdlite.images.pixels import to_pil
from sdlite.images.sheet import contact_sheet
from sdlite.models.codec import LatentCodec
from sdlite.pipeline.about import device_of
from sdlite.training.datasets.draws import Generator, normal, sample_generator
from sdlite.training.datasets.folder import fingerprints, read_records
from sdlite.training.datasets.pixels import composed, fit_notes, load_pixels, on_white
from sdlite.training.exports import identity, load_export, save_export
from sdlite.training.networks import draw_weights
from sdlite.training.options import CodecOptions
from sdlite.training.state import Task

KL_WEIGHT = 1e-5  # of the KL divergence per latent value: keeps latents in reach, costs no sharpness
MIN_DEVIATION = 1e-3  # of a latent channel; below it the channel is dead
COLOUR_WEIGHT = 10.0  # of the squared error in colour, which is small beside that in brightness
NOISE = 0.15  # on latents of whole images, in their deviations: decoding forgives what the denoiser leaves over
WHOLE = 0.25  # part of these that are a whole image at the crop's size
HALVED = 64  # samples at half the size, then as many at the full size, and so on
COLOURED = 0.3  # part of the samples on a random background instead of white
TEACHER_SIZE = 128
LATENT_WEIGHT = 1.0  # of the squared error of the encoder's latents, beside that of the decoder's images
ADVERSARIAL_NOISE = 0.35  # on latents at most, in their deviations, for the decoder alone: drawn latents are no better
ADVERSARIAL_WEIGHT, FEATURE_WEIGHT = 0.1, 1.0  # of the discriminator's word and of its features, beside the L1
DISCRIMINATOR = (3, 32, 64, 128, 128)  # channels; it sees patches of 46 pixels
STRONGEST = 0.05  # part of an image's pixels that count as its edges
HELD_OUT = 256  # images that are measured
SHOWN = 24  # images of the preview


def emoji_codec(size: int = 256) -> AutoencoderKLConfig:
    """The default codec: 16 pixels a latent cell, or 8 for sizes up to TEACHER_SIZE; 8 channels either way."""
    return AutoencoderKLConfig(
        block_out_channels=(16, 16, 48, 96, 128) if size > TEACHER_SIZE else (8, 16, 48, 96),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def initialize(codec: LatentCodec, seed: int) -> None:
    """Residual branches start at zero, the convolutions between them as (near) orthogonal maps or identities.

    So the fresh autoencoder is almost linear and lets the image through; PyTorch's defaults damp the signal in every
    layer.
    """
    draw_weights(codec, seed, lambda name, fan_in: fan_in**-0.5)
    with torch.no_grad():
        for name, weight in codec.named_parameters():
            if name.endswith("conv2.weight"):
                weight.zero_()
            elif "upsamplers" in name and weight.ndim > 1:
                weight.mul_(0.3)
                weight[:, :, 1, 1] += torch.eye(len(weight))


def reconstruction_loss(output: Tensor, images: Tensor) -> Tensor:
    """L1 of pixels, of their gradients at two scales, and of a quarter-size image, there with more weight on colour.

    output, images: (B, 3, H, W) in [-1, 1]. Returns a scalar. Most of an image's error is in its brightness, so colour
    has a term of its own.
    """
    difference = output - images
    small = F.avg_pool2d(difference, 4)
    colour = small - small.mean(1, keepdim=True)  # what is left of it beside grey
    loss = difference.abs().mean() + small.abs().mean() + COLOUR_WEIGHT * colour.square().mean()
    for scale in (1, 2):
        scaled = F.avg_pool2d(difference, scale)
        loss = loss + scaled.diff(dim=-1).abs().mean() + scaled.diff(dim=-2).abs().mean()
    return loss


class Discriminator(nn.Module):
    """Tells patches of images from patches that were decoded (PatchGAN; Isola et al. 2017, appendix 6.1.2)."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 4, stride=2, padding=1) for i, o in pairwise(DISCRIMINATOR))
        self.last = nn.Conv2d(DISCRIMINATOR[-1], 1, 3, padding=1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.normal_(0, weight[0].numel() ** -0.5 if weight.ndim > 1 else 0, generator=generator)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the features of every layer; the last, (B, 1, H/16, W/16), is above 0 for "an image"."""
        features = [images]
        for conv in self.layers:
            features.append(F.leaky_relu(conv(features[-1]), 0.2))
        return [*features[1:], self.last(features[-1])]


def adversarial_loss(discriminator: Discriminator, output: Tensor, images: Tensor) -> Tensor:
    """Sum of the losses of decoder and discriminator; each gets gradients of its own loss only.

    output, images: (B, 3, H, W). The discriminator has the hinge loss (Lim and Ye 2017, eq. 5). The decoder's loss is
    the discriminator's output and the distance of its features.
    """
    fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    judged = torch.func.functional_call(discriminator, fixed, (output,))
    real, decoded = discriminator(images), discriminator(output.detach())
    features = [F.l1_loss(ours, theirs.detach()) for ours, theirs in zip(judged[:-1], real[:-1], strict=True)]
    decoder = FEATURE_WEIGHT * torch.stack(features).mean() - ADVERSARIAL_WEIGHT * judged[-1].mean()
    return decoder + F.relu(1 - real[-1]).mean() + F.relu(1 + decoded[-1]).mean()


def sharpness(images: Tensor) -> Tensor:
    """Mean size of the gradient at the strongest STRONGEST of the pixels of each image. (B, 3, H, W) to (B,)"""
    grey = images.clamp(-1, 1).mean(1)
    across, down = grey[:, :-1].diff(dim=-1), grey[:, :, :-1].diff(dim=-2)  # (B, H-1, W-1) each
    sizes = (across.square() + down.square()).sqrt().flatten(1)
    return sizes.topk(max(1, int(STRONGEST * sizes.shape[1]))).values.mean(1)


def psnr(output: Tensor, images: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, (B,) dB; the range of values is 2."""
    error = (output.clamp(-1, 1) - images).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


class CodecTask(Task):
    """Reconstruction of the images of a data folder.

    The first `options.cropped` samples are squares of half the side. With options.codec, only the decoder of that codec
    is trained, on whole images, so its latents do not change and a denoiser that was trained on them still fits. With
    options.teacher, this codec learns the latents of that one.
    """

    def __init__(self, data: Path, config: AutoencoderKLConfig, options: CodecOptions) -> None:
        super().__init__()
        size, fit = options.size, options.fit
        if options.adversarial and options.codec is None:
            raise ValueError("--adversarial trains the decoder of a codec further; give that with --codec")
        if size % (2 * config.factor):
            raise ValueError(f"size={size} must be a multiple of {2 * config.factor}")
        records = read_records(data)
        held_out = (read_records(data, "validation") or records)[:HELD_OUT]
        self.crop, self.cropped, self.seed = size // 2, options.cropped, options.seed
        self.pixels = load_pixels(data, records, size, fit)
        self.held_out = load_pixels(data, held_out, size, fit)
        self.size, self.notes = len(records), fit_notes(data, records, fit)
        self.settings = {
            **fingerprints(data, records),
            **options.model_dump(include={"size", "fit", "cropped", "adversarial"}),
            **{"start": "", "teacher": ""},
            "network": config.model_dump(mode="json"),
        }
        self.codec = LatentCodec(config)
        self.codec.train()
        initialize(self.codec, options.seed)
        if options.codec is not None:
            self._start_from(options.codec)
        self.teacher: tuple[LatentCodec, ...] = ()  # in a tuple: not a module of this one
        if options.teacher is not None:
            self._learn_from(options.teacher)
        self.keeps_latents = options.codec is not None or options.teacher is not None
        self.discriminator: Discriminator | None = None
        if options.adversarial:
            self.discriminator = Discriminator(torch.Generator().manual_seed(options.seed))

    def _start_from(self, folder: Path) -> None:
        other = load_codec(folder)
        if other.config != self.codec.config:
            raise ValueError(f"{folder} is a codec of another shape than the one to train; leave --codec out")
        self.codec.load_state_dict(other.state_dict())
        self.settings["start"] = codec_identity(other)
        self.codec.model.encoder.requires_grad_(False)
        self.codec.model.quant_conv.requires_grad_(False)
        self.cropped = 0

    def _learn_from(self, folder: Path) -> None:
        teacher = load_codec(folder)
        theirs, ours = teacher.latent_channels, self.codec.latent_channels
        if theirs != ours:
            raise ValueError(f"{folder} has latents of {theirs} channels, not {ours}")
        self.settings["teacher"], self.teacher = codec_identity(teacher), (teacher,)

    def forward(self, indices: Tensor, numbers: Tensor) -> Tensor:
        generators = [sample_generator(self.seed, int(n)) for n in numbers]
        is_whole = int(numbers[0]) >= self.cropped
        crop = self.pixels.shape[-1] if is_whole else self.crop
        samples = [self._sample(i, g, crop) for i, g in zip(indices, generators, strict=True)]
        images = torch.cat(samples).to(device_of(self))
        posterior = self.codec.model.encode(images).latent_dist
        noise = normal(generators, tuple(posterior.mean.shape[1:])).to(device_of(self))
        z, deviation = posterior.mean, posterior.std  # (B, C, h, w)
        latent_error = torch.zeros(())
        if self.teacher:
            with torch.no_grad():
                target = self.teacher[0].to(device_of(self)).encode(F.avg_pool2d(images, 2))
            latent_error, z = F.mse_loss(z.float(), target.float()), target
        if is_whole:
            if self.discriminator is None and int(numbers[0]) // HALVED % 2:
                z, images, noise = (F.avg_pool2d(tensor, 2) for tensor in (z, images, 2 * noise))
            deviation = self._amounts(generators) * z.detach().std((0, 2, 3), keepdim=True)
        output = self.codec.decode(z + deviation * noise).float()  # (B, 3, H, W)
        loss = reconstruction_loss(output, images) + LATENT_WEIGHT * latent_error
        if self.discriminator is not None:
            return loss + adversarial_loss(self.discriminator, output, images)
        return loss + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()

    def _amounts(self, generators: list[Generator]) -> Tensor:
        """(B, 1, 1, 1): noise on the latents of each whole image, in their deviations."""
        if self.discriminator is None:
            return torch.full((len(generators), 1, 1, 1), NOISE, device=device_of(self))
        amounts = torch.tensor([g.random() * ADVERSARIAL_NOISE for g in generators])
        return amounts.float()[:, None, None, None].to(device_of(self))

    def _sample(self, index: Tensor, generator: Generator, crop: int) -> Tensor:
        """(1, 3, crop, crop) in [-1, 1]: a crop, or the whole image at that size, mirrored or not."""
        colour = generator.random((1, 3)) if generator.random() < COLOURED else np.ones((1, 3))
        image = composed(self.pixels[index][None], torch.from_numpy(colour).float())
        image = image.flip(-1) if generator.random() < 0.5 else image
        if generator.random() < WHOLE:
            return F.interpolate(image, size=(crop, crop), mode="area")
        top, left = generator.integers(0, image.shape[-1] - crop + 1, 2)
        return image[:, :, top : top + crop, left : left + crop]

    def _held_out(self, count: int) -> tuple[Tensor, Tensor]:
        images = on_white(self.held_out[:count]).to(device_of(self))
        return images, torch.cat([self.codec.decode(self.codec.encode(part)) for part in torch.split(images, 16)])

    def evaluate(self) -> dict[str, float]:
        images, output = self._held_out(HELD_OUT)
        sharp = sharpness(output).mean() / sharpness(images).mean()
        return {"held_out_psnr": psnr(output, images).mean().item(), "held_out_sharpness": sharp.item()}

    def preview(self, path: Path) -> None:
        images, output = self._held_out(SHOWN)
        save_picture(contact_sheet(to_pil(torch.cat([images, output]))), path, force=True)

    def export(self, folder: Path) -> None:
        codec = self.codec if self.keeps_latents else normalized(self.codec, self.pixels)
        save_export("codec", codec, codec.config, folder)


@torch.no_grad()
def normalized(codec: LatentCodec, pixels: Tensor, count: int = 2048) -> LatentCodec:
    """A copy with latents of mean 0 and deviation 1 in each channel, measured on about `count` images."""
    other = LatentCodec(codec.config)
    other.load_state_dict(codec.state_dict())
    chosen = pixels[:: max(1, len(pixels) // count)]
    z = torch.cat([other.encode(on_white(part)) for part in torch.split(chosen, 32)])  # (N, C, h, w)
    mean, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3)).clamp(min=MIN_DEVIATION)
    channels = len(mean)
    before, after = other.model.quant_conv, other.model.post_quant_conv
    before.weight[:channels] /= deviation[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.bias[channels:] -= 2 * deviation.log()  # log variance
    after.bias += after.weight[:, :, 0, 0] @ mean  # before its weight takes the deviation in
    after.weight *= deviation[None, :, None, None]
    return other


def load_codec(folder: Path) -> LatentCodec:
    """Loads an export of `sdlite train codec`, frozen. folder: the export, or the run that holds it."""
    return load_export("codec", folder, AutoencoderKLConfig, LatentCodec)


def codec_identity(codec: LatentCodec) -> str:
    return identity(codec, codec.config.model_dump(mode="json"))


def make_task(data: Path, out: Path, options: CodecOptions) -> CodecTask:
    """The task of `sdlite train codec`."""
    config = emoji_codec(options.size) if options.codec is None else load_codec(options.codec).config
    assert isinstance(config, AutoencoderKLConfig), "load_codec reads no other"
    return CodecTask(data, config, options)
