"""How fast sdlite is, alone or against a peer on the same weights: the numbers of the README come from here.

The sides run in turn in one process (A B, B A, A B, ...). What counts is the ratio within a pair: its median, least and
most. Memory and cold start are those of a process of its own that loads the model and writes one PNG. Prompts differ
from run to run, so that no side finds its text encoded already. A peer is one file with a `speed.Side` and one line in
speed.PEERS.
"""

from sdlite.bench.batches import measure_batch as measure_batch, measure_exact as measure_exact
from sdlite.bench.machine import machine_load as machine_load
from sdlite.bench.speed import measure as measure
from sdlite.bench.timing import table as table
