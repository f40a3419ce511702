"""Diffusion mathematics: pure functions and solvers on tensors. They know no network.

DDPM: Ho et al. 2020 (arXiv 2006.11239). DDIM: Song et al. 2021 (2010.02502). Guidance: Ho and Salimans 2022
(2207.12598). v: Salimans and Ho 2022 (2202.00512). Zero terminal SNR and guidance rescale: Lin et al. 2023
(2305.08891).

| solver | in Automatic1111 | source |
|---|---|---|
| `ddim` | DDIM | Song et al. 2021 |
| `ddpm` | DDPM | Ho et al. 2020 |
| `euler` | Euler, Uniform | Karras et al. 2022 |
| `euler_a` | Euler a, Uniform | Karras et al. 2022 |
| `dpmpp_2m` | DPM++ 2M, Uniform | Lu et al. 2022 |
| `dpmpp_2m_karras` | DPM++ 2M, Karras | Lu et al. 2022 |
| `unipc` | UniPC | Zhao et al. 2023 |
| `pndm` | PLMS | Liu et al. 2022 |
| `lcm` | LCM | Luo et al. 2023 |
"""
