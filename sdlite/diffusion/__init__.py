"""Diffusion mathematics: pure functions and solvers on tensors. They know no network.

DDPM: Ho et al. 2020 (arXiv 2006.11239). DDIM: Song et al. 2021 (2010.02502). Guidance: Ho and Salimans 2022
(2207.12598). v: Salimans and Ho 2022 (2202.00512). Zero terminal SNR and guidance rescale: Lin et al. 2023
(2305.08891).
"""
