"""Training: one loop, and one task per network; `datasets` and `evaluation` beside it. Modules load on first use.

These commands train a model from nothing, with budgets of about six hours together (`pip install "sdlite[train]"`
first). `--minutes` is the budget of one call. The same command continues a stopped run. torchrun spreads a run over
processes.

    $ sdlite data emoji -o emoji  # open emoji from npm and PyPI; or use a folder of your own images and captions
    $ sdlite train codec --data emoji -o codec --minutes 60
    $ sdlite train text --data emoji -o text --minutes 45
    $ sdlite train denoiser --data emoji --codec codec --text text -o half --size 128 --minutes 80
    $ sdlite train denoiser --data emoji --codec codec --text text -o run --from half --size 256 --minutes 180
    $ sdlite generate "a red apple" -m run
    $ sdlite evaluate run --data emoji -o report  # trains a classifier, compares images with real held-out ones

The model that ships was trained in these stages by an earlier version, in about six hours of one core without a GPU.
That version had other defaults: 128 pixels, a smaller network, and AdamW instead of Muon. weights/emoji-128/README.md
has its commands and figures, and compares `--prediction`, `--timesteps`, `--min-snr-gamma` and
`--no-zero-terminal-snr`. notebooks/04_train_your_own.ipynb trains a small model with the functions of this package.
"""

from sdlite.package import fetching

__getattr__, __dir__ = fetching(__name__, {})
