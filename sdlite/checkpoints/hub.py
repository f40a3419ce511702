"""Fetches a model folder from the Hugging Face hub: the only place that may use the network."""

import re
from pathlib import Path

from sdlite.checkpoints.weights import CheckpointError

HUB_ID = re.compile(r"\w[\w.\-]{0,95}/\w[\w.\-]{0,95}", re.ASCII)
PARTS = ("unet", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
WANTED = ["model_index.json", "sha256sums.txt"] + [
    f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt", "safetensors")
]
# Plain weights if there are any, else those in half precision; never a second copy.
UNWANTED = (["*.fp16*", "*non_ema*"], ["*non_ema*"])


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".safetensors")


def download(name: str) -> Path:
    """The folder of a hub id in the local cache, fetched if it is not there. Raises CheckpointError."""
    from huggingface_hub import snapshot_download

    try:
        for unwanted in UNWANTED:
            folder = Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=unwanted))
            found = {file.parent.name for file in folder.glob("*/*.safetensors")}
            if "vae" in found and found & {"unet", "transformer"}:
                break
    except Exception as error:  # the libraries below raise their own kinds for the network, the hub and the disk
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no such folder or file, and the hub did not give it: {cause:.200}") from error
    return folder
