"""Diffusion mathematics: pure functions and solvers on tensors; knows no network."""
