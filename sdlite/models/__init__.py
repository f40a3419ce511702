"""Networks: denoiser, text encoder, codec; knows no sampling and no files."""
