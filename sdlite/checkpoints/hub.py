"""Downloads a model folder from the Hugging Face hub. Loading a model uses the network nowhere else."""

from collections.abc import Sequence
from pathlib import Path

from sdlite.checkpoints.places import CheckpointError

PARTS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
STEMS = dict.fromkeys(("unet", "transformer", "vae"), "diffusion_pytorch_model") | {"text_encoder": "model"}
WANTED = ["model_index.json", "sha256sums.txt"] + [
    f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt", "safetensors")
]
VAE_WANTED = ["config.json", "diffusion_pytorch_model*.safetensors", "vae/*.json", "vae/*.safetensors"]
# Plain weights if there are any, else those in half precision; never a second copy.
UNWANTED = (["*.fp16*", "*non_ema*"], ["*non_ema*"])


def cache_folder() -> Path:
    """The folder of the hub's cache on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).resolve()


def download(name: str, wanted: Sequence[str] = WANTED) -> Path:
    """The folder of a hub id in the local cache; downloads what is missing. Raises CheckpointError."""
    for unwanted in UNWANTED:
        folder = _snapshot(name, wanted, unwanted)
        found = {file.parent.name for file in folder.glob("*/*.safetensors")}
        if ("vae" in found and found & {"unet", "transformer"}) or any(folder.glob("*.safetensors")):
            break
    return folder


def download_variant(name: str, variant: str) -> Path:
    """As `download`, with the weights of that variant, and plain weights for parts without that variant."""
    small = [pattern for pattern in WANTED if not pattern.endswith(".safetensors")]
    folder = _snapshot(name, [*small, *(f"{part}/*.{variant}*.safetensors" for part in STEMS)], [])
    lacking = [part for part in STEMS if (folder / part).is_dir() and not any((folder / part).glob(f"*.{variant}*"))]
    if not any(folder.glob(f"*/*.{variant}*.safetensors")):
        raise CheckpointError(f"{name} has no weights of variant {variant!r:.80}")
    return _snapshot(name, [f"{part}/*.safetensors" for part in lacking], UNWANTED[0]) if lacking else folder


def _snapshot(name: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(unwanted)))
    except Exception as error:  # the libraries below raise their own kinds for the network, the hub and the disk
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no such folder or file, and the hub did not give it: {cause:.200}") from error
