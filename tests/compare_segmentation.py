"""UNet against FCN, loss against loss, valid padding against same: the runs differ only in what is compared.

python -c "from tests.compare_segmentation import compare; ..."   # notebook 05 has the arguments of its table
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sdlite.files import write_file
from sdlite.segmentation.segmenter import Plan, SegmenterConfig, UNetPlan
from sdlite.training.loop import fit
from sdlite.training.options import SegmentationOptions
from sdlite.training.segmentation import SegmentationTask, equal_fcn, parameters, plan_for

TERMS = {"cross-entropy": {"cross_entropy": 1.0}, "Dice": {"dice": 1.0}, "both": {"cross_entropy": 1.0, "dice": 1.0}}
VARIANTS = (
    ("UNet", "both"),
    ("FCN", "both"),
    ("FCN longer", "both"),
    ("UNet", "cross-entropy"),
    ("UNet", "Dice"),
    ("UNet valid", "both"),
)
LONGER = 3  # times the samples, which takes the FCN about as long as the UNet's samples take that
FIGURES = ("mean_iou", "iou", "boundary_f1", "seconds")


def compare(data: Mapping[str, Path], out: Path, *, samples: int = 1_600, seeds: Iterable[int] = (0, 1, 2)) -> None:
    """Trains every variant on every data folder with every seed into `out`, and writes out/table.json after each.

    samples: number per run. Finished runs are not trained again. The rate falls to zero by half a cosine. The averaged
    weights are measured on the held-out split.
    """
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        for name, folder in data.items():
            for net, loss in VARIANTS:
                run = out / f"{name}-{net}-{loss}-{seed}".replace(" ", "-").lower()
                rows.append(_row(run, folder, net, loss, samples, seed) | {"data": name})
                summary = {"samples": samples, "table": table(rows), "runs": rows}
                write_file(out / "table.json", (json.dumps(summary, indent=1) + "\n").encode(), force=True)


def _row(run: Path, folder: Path, net: str, loss: str, samples: int, seed: int) -> dict[str, Any]:
    """Figures of one run, from run/row.json if it is done."""
    done = run / "row.json"
    if done.is_file():
        return dict(json.loads(done.read_text()))
    base = plan_for(folder, "unet")
    assert isinstance(base.network, UNetPlan)
    plans: dict[str, Plan] = {
        "UNet": base.network,
        "FCN": (fcn := equal_fcn(base.network)),
        "FCN longer": fcn,
        "UNet valid": base.network.replace(padding="valid"),
    }
    config = SegmenterConfig(network=plans[net], tile=base.tile)
    options = SegmentationOptions(
        samples=samples * (LONGER if net == "FCN longer" else 1),
        seed=seed,
        decay="cosine",
        report_every=200,
        save_minutes=0,
        terms=TERMS[loss],
    )
    begin, cpu = time.monotonic(), time.process_time()
    fit(SegmentationTask(folder, config, options), options, run)
    row = {"net": net, "loss": loss, "seed": seed, "parameters": parameters(plans[net])}
    row |= {"seconds": time.process_time() - cpu, "wall_seconds": time.monotonic() - begin}
    row |= json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    write_file(done, json.dumps(row).encode(), force=True)
    return row


def table(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread (standard deviation over seeds) of every figure, one row for each data set and variant."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["net"], row["loss"]].append(row)
    result = []
    for (data, net, loss), runs in groups.items():
        line: dict[str, Any] = {"data": data, "net": net, "loss": loss, "parameters": runs[0]["parameters"]}
        for name in FIGURES:
            values = [run[name] for run in runs]
            line[name] = [mean(values), stdev(values) if len(values) > 1 else None]
        result.append(line | {"seeds": len(runs)})
    return result
