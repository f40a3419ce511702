"""Networks: text encoder, denoisers, codec. They know no sampling and no files.

UNet: Ronneberger et al. 2015 (arXiv 1505.04597); with cross-attention, and the codec: Rombach et al. 2022 (2112.10752).
CLIP: Radford et al. 2021 (2103.00020).
"""
