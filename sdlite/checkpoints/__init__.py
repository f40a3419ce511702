"""Reads and writes checkpoints: diffusers folders, original single files, hub ids. Every file is untrusted.

- Only safetensors are read. The content decides what a file is, not its name.
- Every weight must be there, have its shape and be finite. Tensors that the model does not need are left out, with a
  note.
- No part of a checkpoint may lie outside its folder. A link may lead into that folder, into the hub's cache, or into a
  folder that `--allow-links ROOT` names.
- Configs may only have known keys, so no file can name code to run.
- A pickle is refused. Only `sdlite convert --trust-pickle OLD NEW` reads one, a .ckpt file or a folder of .bin files,
  with `weights_only=True` and at most as many numbers as the file has bytes for.
- If a file does not say epsilon or v, sdlite guesses and prints why; `--prediction` overrides it.
- `--vae` takes a file, a folder, or `tiny` (TAESD, from the hub). `--variant fp16` chooses among the weights of a
  folder.
"""
