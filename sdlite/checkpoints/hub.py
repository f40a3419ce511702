"""Fetches a model folder from the Hugging Face hub: the only place that may use the network."""

import re
from collections.abc import Sequence
from pathlib import Path

from sdlite.checkpoints.weights import CheckpointError

HUB_ID = re.compile(r"\w[\w.\-]{0,95}/\w[\w.\-]{0,95}", re.ASCII)
FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")  # a name that ends so is a file's
PARTS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
WANTED = ["model_index.json", "sha256sums.txt"] + [
    f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt", "safetensors")
]
VAE_WANTED = ["config.json", "diffusion_pytorch_model*.safetensors", "vae/*.json", "vae/*.safetensors"]
# Plain weights if there are any, else those in half precision; never a second copy.
UNWANTED = (["*.fp16*", "*non_ema*"], ["*non_ema*"])


def is_hub_id(name: str) -> bool:
    """Whether a name that is no file can be one of the hub's: org/name, where org is no folder here."""
    if HUB_ID.fullmatch(name) is None or name.lower().endswith(FILES):
        return False
    return Path(name).parts[0] not in (".", "..") and not Path(Path(name).parts[0]).exists()


def cache_folder() -> Path:
    """Where the hub's files lie on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).resolve()


def download(name: str, wanted: Sequence[str] = WANTED, variant: str | None = None) -> Path:
    """The folder of a hub id in the local cache, fetched if it is not there. Raises CheckpointError.

    variant: weights to fetch too, where a part has them.
    """
    from huggingface_hub import snapshot_download

    try:
        for unwanted in UNWANTED if variant is None else ([],):
            folder = Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=unwanted))
            found = {file.parent.name for file in folder.glob("*/*.safetensors")}
            if ("vae" in found and found & {"unet", "transformer"}) or any(folder.glob("*.safetensors")):
                break
    except Exception as error:  # the libraries below raise their own kinds for the network, the hub and the disk
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no such folder or file, and the hub did not give it: {cause:.200}") from error
    return folder
