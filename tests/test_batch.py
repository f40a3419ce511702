"""Whole batches on the tiny model: the same bytes in every way to run them, and nothing lost by kills and full disks.

The processes that are killed are real and are killed with SIGKILL; they are forks of this one, which has the model
loaded, so that hundreds of them take minutes.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from sdlite import batch, images
from sdlite.batch import drawer, local, manifest
from sdlite.batch.drawer import Drawer, Result
from sdlite.batch.plan import Item, groups
from sdlite.batch.store import Store
from sdlite.batch.workers import Answer, Gone, WorkerProcess, carried, hand_out
from sdlite.checkpoints.places import CheckpointError
from sdlite.config import ScheduleConfig
from sdlite.contracts import Conditioning, TextFeatures
from sdlite.diffusion.schedule import Schedule
from sdlite.files import HOST
from sdlite.pipeline import About, Finished, Job, Pipeline, Step
from sdlite.request import Request

pytestmark = pytest.mark.skipif(os.name != "posix", reason="forks and signals")

ROWS = [
    {"prompt": f"a fox, number {i}", "steps": 2 + (i % 5 == 0), "guidance_scale": 1.0 if i % 3 == 0 else 7.5}
    for i in range(20)
]
Content = dict[str, bytes]


@functools.cache
def tiny() -> Pipeline:
    return Pipeline.load("tiny", device="cpu")


def run(output: Path, rows: Any = None, **options: Any) -> batch.BatchReport:
    return batch.run(ROWS if rows is None else rows, output, pipe=tiny(), **options)


def pictures(folder: Path) -> Content:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Bytes of every picture of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("reference")
    report = run(folder)
    assert (report.done, report.skipped, report.failed, report.interrupted) == (20, 0, {}, False)
    return pictures(folder)


def complete(folder: Path, reference: Content) -> None:
    """Nothing lost, doubled, changed or left over."""
    assert pictures(folder) == reference
    kept = {path.name for path in folder.iterdir() if not path.name.startswith(".manifest-")}
    assert kept == {*reference, "run.json", "metadata.jsonl"}
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == sorted(reference)
    assert all(row["sha256"] == manifest.sha256(reference[row["file_name"]]) for row in rows)
    check = batch.verify(folder)
    assert check.good == sorted(reference) and not (check.missing or check.corrupt or check.extra)


def fork(task: Callable[[], object]) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    return process


# ------------------------------------------------------------------------------------------- the same bytes


def test_again_draws_nothing(tmp_path: Path, reference: Content):
    run(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    report = run(tmp_path)
    assert (report.done, report.skipped) == (0, 20)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == times
    complete(tmp_path, reference)


def test_what_is_missing_is_drawn_and_nothing_else(tmp_path: Path, reference: Content):
    run(tmp_path)
    for name in random.Random(1).sample(sorted(reference), 7):
        (tmp_path / name).unlink()
    assert run(tmp_path).done == 7
    complete(tmp_path, reference)


def test_parts_are_the_whole(tmp_path: Path, reference: Content):
    done = [run(tmp_path, part=f"{i}/3").done for i in (2, 3, 1)]
    assert sum(done) == 20 and all(done)
    complete(tmp_path, reference)


def test_a_row_added_changes_no_other(tmp_path: Path, reference: Content):
    run(tmp_path, ROWS[:13])
    assert run(tmp_path, ROWS).done == 7
    complete(tmp_path, reference)


def test_exact_is_the_same_for_every_batch_size(tmp_path: Path):
    for size in (1, 4, 7):
        run(tmp_path / f"exact{size}", batch_size=size, exact=True)
        run(tmp_path / f"free{size}", batch_size=size)
    first = pictures(tmp_path / "exact1")
    assert len(first) == 20 and first == pictures(tmp_path / "exact4") == pictures(tmp_path / "exact7")
    run(tmp_path / "exact1", batch_size=32, exact=True)  # so that another batch size is no other setting
    free = [sorted((tmp_path / f"free{size}").glob("*.png")) for size in (1, 4, 7)]
    for one, *others in zip(*free, strict=True):
        pair = images.open_picture(one)
        assert all(images.largest_difference(pair, images.open_picture(other)) <= 1 for other in others)


def test_workers_and_batch_size_are_no_settings(tmp_path: Path, reference: Content):
    run(tmp_path, ROWS[:8])
    settings = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(settings | {"compute_batch": 4}))  # as earlier versions wrote it
    assert run(tmp_path, ROWS[:10], batch_size=3).done == 2
    assert batch.run(ROWS, tmp_path, model="tiny", device="cpu", workers=2, batch_size=2).done == 10
    there = pictures(tmp_path)
    assert there.keys() == reference.keys() and all(there[name] == reference[name] for name in sorted(there)[:8])
    for name, data in reference.items():
        (tmp_path / "first.png").write_bytes(data)
        pair = images.open_picture(tmp_path / "first.png"), images.open_picture(tmp_path / name)
        assert images.largest_difference(*pair) <= 1


def test_exact_is_the_same_for_every_number_of_workers(tmp_path: Path):
    run(tmp_path / "1", exact=True)
    report = batch.run(ROWS, tmp_path / "2", model="tiny", device="cpu", workers=2, exact=True, batch_size=7)
    assert report.done == 20 and pictures(tmp_path / "1") == pictures(tmp_path / "2")


def test_other_settings_are_refused(tmp_path: Path):
    run(tmp_path, ROWS[:1])
    with pytest.raises(ValueError, match=r"other settings: seed=0 there, 9 now; give"):
        run(tmp_path, ROWS[:1], batch_size=2, seed=9)
    with pytest.raises(ValueError, match="batch_size=0 must be greater"):
        run(tmp_path, ROWS[:1], batch_size=0)


def test_nothing_is_written_when_a_row_is_wrong(tmp_path: Path):
    with pytest.raises(ValueError, match=r"requests:2: width=60 must be a multiple of 8, .*\nrequests:3: clip_skip=9"):
        run(tmp_path / "out", ["a", {"prompt": "b", "width": 60}, {"prompt": "c", "clip_skip": 9}])
    with pytest.raises(ValueError, match=r"requests:1: prompt is too long"):
        run(tmp_path / "out", ["BREAK a " * 70])
    assert not (tmp_path / "out").exists()


def test_pictures_start_from_pictures(tmp_path: Path):
    Image.linear_gradient("L").resize((64, 64)).save(tmp_path / "start.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    requests = tmp_path / "requests.csv"
    requests.write_text("prompt,image,mask,steps\na fox,start.png,,3\nan owl,start.png,mask.png,3\nplain,,,3\n")
    run(tmp_path / "out", requests)
    first, second, third = (images.read_metadata(path).request for path in sorted((tmp_path / "out").glob("*.png")))
    assert first.image == second.image == images.digest(images.open_picture(tmp_path / "start.png"))
    assert first.mask is None and second.mask is not None and third.image is None
    expected = tiny().generate([first], images=[images.open_picture(tmp_path / "start.png")])[0]
    drawn = images.open_picture(sorted((tmp_path / "out").glob("*.png"))[0])
    assert images.largest_difference(expected, drawn) <= 1
    assert str(tmp_path) not in (tmp_path / "out/metadata.jsonl").read_text()
    (next((tmp_path / "out").glob("000000*"))).unlink()
    prepared = batch.prepare(requests, tmp_path / "out", pipe=tiny())
    Image.new("L", (64, 64)).save(tmp_path / "start.png")
    assert "was changed while the batch ran" in prepared.run().failed[0]


def test_a_mask_too_small_is_found_before_anything_is_drawn(tmp_path: Path):
    """A latent cell takes the mask's pixel at its corner, and the corners are 8 pixels apart."""
    for name, box in (("never", (1, 1, 6, 6)), ("at_64", (8, 8, 14, 14))):
        mask = Image.new("L", (64, 64))
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "start.png")
    row = {"prompt": "a", "steps": 2, "image": str(tmp_path / "start.png")}
    masks = [("at_64", 64), ("at_64", 64), ("at_64", 32), ("never", 64)]
    rows = [row | {"mask": str(tmp_path / f"{name}.png"), "width": side, "height": side} for name, side in masks]
    faults = r"^requests:3: the white parts .* too small .* 32x32.*\nrequests:4: the white parts .* 64x64[^\n]*$"
    with pytest.raises(ValueError, match=faults):
        batch.prepare(rows, tmp_path / "out", pipe=tiny())
    assert len(batch.prepare(rows[:2], tmp_path / "out", pipe=tiny()).items) == 2


def test_images_go_to_the_items_that_they_were_drawn_for(monkeypatch: pytest.MonkeyPatch):
    """Also if a pipeline finishes them in another order."""
    items = batch.prepare([{"prompt": f"{i}", "steps": 1} for i in range(3)], "unused", pipe=tiny()).items
    whole = tiny().draw
    monkeypatch.setattr(tiny(), "draw", lambda jobs: reversed(list(whole(jobs))))
    drawn = [picture.info["parameters"].splitlines()[0] for picture in drawer.draw(tiny(), items, 4)]
    assert drawn == ["0", "1", "2"]


def test_groups_hold_what_may_share_a_batch():
    items = batch.prepare([{"prompt": "a", "steps": 2 + i % 3} for i in range(600)], "unused", pipe=tiny()).items
    made = list(groups(items, 4))
    assert sorted(item.index for group in made for item in group) == list(range(600))
    assert all(len({item.request.steps for item in group}) == 1 for group in made)
    assert sum(len(group) < 4 for group in made) <= 3


def test_loads_as_an_image_folder(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    run(tmp_path / "out", [row | {"author": f"me {i}"} for i, row in enumerate(ROWS[:3])])
    batch_of = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["prompt"] for row in batch_of] == [row["prompt"] for row in ROWS[:3]]
    assert [row["author"] for row in batch_of] == ["me 0", "me 1", "me 2"]
    assert batch_of[0]["image"].size == (64, 64)


class PlainText:
    """Features are the length of the prompt."""

    def num_chunks(self, prompt: str) -> int:
        return 1

    def words(self, prompt: str) -> list[tuple[str, list[int]]]:
        return [(prompt, [0])]

    def encode(self, prompts: Sequence[str], *, clip_skip: int = 0) -> TextFeatures:
        return TextFeatures(torch.tensor([[[float(len(prompt))]] for prompt in prompts]))


class PlainDenoiser:
    """Predicts that x_0 is the features / 100 everywhere."""

    prediction = "sample"
    in_channels = 4
    patch_size = 1

    def prepare(self, conditioning: Conditioning) -> Tensor:
        return conditioning.context

    def __call__(self, x: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        return memory[:, :, :, None].expand(-1, *x.shape[1:]) / 100


class PlainCodec:
    """A latent cell is eight pixels of the colour of its first three channels."""

    factor = 8
    latent_channels = 4
    deterministic = True

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        return torch.nn.functional.pad(images[:, :, ::8, ::8], (0, 0, 0, 0, 0, 1))

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)

    def decode_bytes(self, width: int, height: int) -> int:
        return 0


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_three_plain_objects_run_a_batch(tmp_path: Path, form: str):
    """Closed form: the last step of DDIM from a predicted x_0 ends there, whatever the noise."""
    about = About(name="plain", hash="ab" * 32, sample_size=2)
    pipe = Pipeline(
        PlainText(), PlainDenoiser(), PlainCodec(), Schedule(ScheduleConfig(final_abar_one=True)), about=about
    )
    rows = [{"prompt": "a" * length, "steps": 3, "guidance_scale": 1} for length in (10, 50, 50, 90)]
    assert batch.run(rows, tmp_path, pipe=pipe, format=form, exact=True).done == 4
    assert batch.run(rows, tmp_path, pipe=pipe, format=form, exact=True).skipped == 4
    assert len(batch.verify(tmp_path).good) == 4
    settings = json.loads((tmp_path / "run.json").read_text())
    assert (settings["model"], settings["model_hash"], settings["device"]) == ("plain", "ab" * 32, "cpu")
    if form == "folder":
        for path, length in zip(sorted(tmp_path.glob("*.png")), (10, 50, 50, 90), strict=True):
            grey = round((length / 100 / 2 + 0.5) * 255)
            assert images.open_picture(path).getextrema() == ((grey, grey),) * 3
    faster = pipe.with_parts(about=dataclasses.replace(about, backend="x"))
    assert batch.run(rows[:1], tmp_path / "backend", pipe=faster).done
    assert json.loads((tmp_path / "backend/run.json").read_text())["backend"] == "x"


# ----------------------------------------------------------------------------------------------- failures


def poison(patch: pytest.MonkeyPatch, pipe: Pipeline, is_bad: Callable[[Request], bool], said: str) -> None:
    """The images of some requests come out as nan."""
    whole = pipe.draw

    def draw(jobs: Sequence[Job], *rest: Any) -> Iterator[Step | Finished]:
        for event in whole(jobs, *rest):
            if isinstance(event, Finished) and is_bad(jobs[event.index].request):
                raise FloatingPointError(said)
            yield event

    patch.setattr(pipe, "draw", draw)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, tiny(), lambda request: request.seed == 13, "seed=13: the image is not finite")


def test_a_poison_request_fails_alone(tmp_path: Path, poisoned: None):
    rows = [{"prompt": "a", "steps": 2, "seed": 10 + i} for i in range(6)]
    events: list[batch.Event] = []
    report = run(tmp_path, rows, keep_going=True, progress=events.append)
    assert report.done == 5 and report.failed == {3: "seed=13: the image is not finite"}
    assert [event.index for event in events if event.error] == [3] and events[-1].done == events[-1].total == 6
    assert json.loads((tmp_path / "errors.jsonl").read_text())["index"] == 3
    assert len(pictures(tmp_path)) == 5


def test_without_keep_going_the_batch_in_hand_is_the_last(tmp_path: Path, poisoned: None):
    rows = [{"prompt": "a", "steps": 2, "seed": 10 + i} for i in range(12)]
    report = run(tmp_path, rows)
    assert report.done == 3 and list(report.failed) == [3] and not report.interrupted


@pytest.mark.parametrize("where", ["jobs", "draw", "png_bytes"])
def test_an_error_that_nobody_foresaw_fails_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str):
    """Not a ValueError, and from the check of the file, from drawing, or from writing the PNG."""
    place: Any = drawer if where == "png_bytes" else tiny()
    whole = getattr(place, where)

    def breaks(given: Any, *rest: Any, **named: Any) -> Any:
        if "poison" in (given.info["parameters"] if where == "png_bytes" else str(given)):
            raise IndexError("index 20 is out of bounds\nfor dimension 0")
        return whole(given, *rest, **named)

    monkeypatch.setattr(place, where, breaks)
    rows = [{"prompt": "poison" if i == 1 else "a", "steps": 1 + (i == 1), "seed": i} for i in range(12)]
    report = run(tmp_path / "going", rows, keep_going=True)
    assert report.failed == {1: "IndexError: index 20 is out of bounds for dimension 0"} and report.done == 11
    report = run(tmp_path / "stopping", rows)
    assert list(report.failed) == [1] and report.done < 12
    monkeypatch.undo()
    assert run(tmp_path / "stopping", rows).failed == {} and len(pictures(tmp_path / "stopping")) == 12


def test_a_failure_that_is_gone_leaves_the_list(tmp_path: Path, poisoned: None, monkeypatch: pytest.MonkeyPatch):
    rows = [{"prompt": "a", "steps": 2, "seed": 13}]
    run(tmp_path, rows)
    monkeypatch.undo()
    assert run(tmp_path, rows).done == 1
    assert not (tmp_path / "errors.jsonl").exists()


@pytest.mark.parametrize("exact", [False, True])
def test_out_of_memory_halves_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exact: bool):
    whole = tiny().draw

    def draw(jobs: Sequence[Job]) -> Iterator[Step | Finished]:
        if len(jobs) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return whole(jobs)

    monkeypatch.setattr(tiny(), "draw", draw)
    report = run(tmp_path, [{"prompt": "a", "steps": 2}] * 4, exact=exact, keep_going=True)
    assert (report.done, len(report.failed)) == ((0, 4) if exact else (4, 0))
    if exact:
        assert report.failed[0] == "out of memory at 4 in a batch; draw it smaller"


def test_stop_finishes_the_batch_in_hand(tmp_path: Path, reference: Content):
    asked = iter([False, True])
    report = run(tmp_path, stop=lambda: next(asked, True))
    first = next(groups(batch.prepare(ROWS, tmp_path, pipe=tiny()).items, 4))
    assert report.interrupted and report.done == len(pictures(tmp_path)) == len(first)
    run(tmp_path)
    complete(tmp_path, reference)


# -------------------------------------------------------------------------------------------- kill -9


def half_a_line_then_die(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line[: len(line) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: str, number: int) -> Callable[[str], None]:
    left = iter(range(number, -1, -1))
    return lambda reached: os.kill(os.getpid(), signal.SIGKILL) if reached == point and not next(left) else None


def run_and_die(folder: Path, point: str, number: int) -> None:
    """Draws, and is killed at the number-th passing of a point."""
    if point == "line":
        append, left = manifest.append, iter(range(number, -1, -1))
        manifest.append = lambda path, line: append(path, line) if next(left) else half_a_line_then_die(path, line)
    else:
        local.Store = functools.partial(Store, reached=die_at(point, number))  # type: ignore[misc]
    run(folder)


def kill_often(folder: Path, reference: Content, kills: int, chance: random.Random) -> tuple[int, int]:
    """Runs killed at random times and points, each resumed by the next; (kills that hit, folders that were filled)."""
    points = ["time", "written", "synced", "linked", "line", "metadata.jsonl written"]
    hits = whole = 0
    current = folder / "0"
    before: set[str] = set()
    while hits < kills:
        point, missing = points[hits % len(points)], len(reference) - len(before)
        if point == "time":
            process = fork(functools.partial(run, current))
            process.join(chance.uniform(0.02, 1.0))
            process.kill()
        else:
            number = 0 if "metadata" in point else chance.randrange(max(1, missing // 2))  # the index is written once
            process = fork(functools.partial(run_and_die, current, point, number))
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        hits += process.exitcode != 0
        now = pictures(current)
        assert before <= now.keys() and all(data == reference[name] for name, data in now.items())
        before = set(now)
        if process.exitcode == 0 or len(before) == len(reference):
            run(current)
            complete(current, reference)
            whole += 1
            current, before = folder / str(whole), set()
    run(current)
    complete(current, reference)
    return hits, whole + 1


POINTS = [("written", 6, 6), ("synced", 6, 6), ("linked", 6, 7), ("line", 6, 7)]
POINTS += [("run.json written", 0, 0), ("metadata.jsonl written", 0, 20)]


@pytest.mark.parametrize(("point", "number", "there"), POINTS, ids=[point for point, *_ in POINTS])
def test_killed_at_a_point_of_the_commit(tmp_path: Path, reference: Content, point: str, number: int, there: int):
    process = fork(functools.partial(run_and_die, tmp_path, point, number))
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(pictures(tmp_path)) == there
    run(tmp_path)
    complete(tmp_path, reference)


def test_killed_at_random_times(tmp_path: Path, reference: Content):
    kill_often(tmp_path, reference, 6, random.Random(0))


@pytest.mark.slow
def test_killed_two_hundred_times(tmp_path: Path, reference: Content):
    assert kill_often(tmp_path, reference, 200, random.Random(1))[0] == 200


@pytest.mark.parametrize("count", [2, 8])
def test_processes_on_one_folder(tmp_path: Path, reference: Content, count: int):
    processes = [fork(functools.partial(run, tmp_path)) for _ in range(count)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    complete(tmp_path, reference)


def test_stopped_and_continued_beside_another(tmp_path: Path, reference: Content):
    process = fork(functools.partial(run, tmp_path))
    time.sleep(0.5)
    os.kill(process.pid or 0, signal.SIGSTOP)
    run(tmp_path)
    os.kill(process.pid or 0, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    complete(tmp_path, reference)


def test_a_worker_killed_is_replaced(tmp_path: Path, reference: Content):
    killed = []

    def kill_one(event: batch.Event) -> None:
        if not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    report = batch.run(ROWS, tmp_path, model="tiny", device="cpu", workers=2, exact=False, progress=kill_one)
    assert killed and not report.failed and report.done + report.skipped == 20
    complete(tmp_path, reference)


class DiesOn(Drawer):
    """Draws nothing; the process ends at item 2."""

    def __init__(self) -> None:
        self.done: list[Result] = []

    def submit(self, items: Any) -> None:
        for item in items:
            if item.index == 2:
                os._exit(1)
            self.done.append(Result(item.index))

    def results(self, wait: bool = False) -> list[Result]:
        done, self.done = self.done, []
        return done


def dies_on(number: int) -> Drawer:
    return DiesOn()


def dies_at_start(number: int) -> Drawer:
    os._exit(3)


def refuses(number: int) -> Drawer:
    raise ValueError("no such model")


class Odd(Exception):
    """Cannot be unpickled, like some errors of libraries."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}{text}")


class OddAnswer(OSError):
    """Of the form of huggingface_hub's HfHubHTTPError, which cannot be unpickled either."""

    def __init__(self, text: str, *, response: int) -> None:
        super().__init__(text)
        self.response = response


def test_an_error_reaches_another_process():
    errors = [
        (Odd(3, "x"), RuntimeError("Odd: 3x")),
        (KeyError("layer"), RuntimeError("KeyError: 'layer'")),
        (ValueError("no"), ValueError("no")),
        (OddAnswer("404\nnot there", response=404), OSError("404 not there")),
        (FileNotFoundError(2, "none", "a.png"), FileNotFoundError(2, "none", "a.png")),
        (CheckpointError("a.ckpt: no"), CheckpointError("a.ckpt: no")),
    ]
    for error, expected in errors:
        there = pickle.loads(pickle.dumps(carried(error)))
        assert (type(there), str(there)) == (type(expected), str(expected))
    full = pickle.loads(pickle.dumps(carried(batch.DiskFull(28, "out: full"))))
    assert isinstance(full, batch.DiskFull) and full.errno == 28


class DiesDrawing:
    """A worker that dies on its first group. starts: how many were started."""

    starts = 0

    def __init__(self, number: int) -> None:
        DiesDrawing.starts += 1
        self.ready = True

    def send(self, group: Sequence[Item] | None) -> None: ...

    def receive(self) -> Answer:
        if not self.ready:
            raise Gone("killed")
        self.ready = False
        return []

    def stop(self) -> None: ...

    @staticmethod
    def wait(workers: Sequence[Any]) -> Sequence[Any]:
        return workers


def test_no_worker_is_started_once_a_run_ends():
    items = [Item(i, i, None, {}, "", "") for i in range(4)]  # type: ignore[arg-type]
    asked = iter([False, False])  # when each worker gets its group
    results = list(hand_out(DiesDrawing, [items[:2], items[2:]], 2, lambda: next(asked, True)))
    assert DiesDrawing.starts == 2 and not any(results)


@pytest.mark.parametrize(
    ("rows", "workers", "processes", "seconds"), [(8, 1, 1, 20), (8, 2, 2, 10), (8, 8, 2, 10), (3, 8, 1, 10)]
)
def test_the_estimate_counts_the_processes_that_draw(
    monkeypatch: pytest.MonkeyPatch, rows: int, workers: int, processes: int, seconds: float
):
    """Batches of four take ten seconds each."""
    clock = iter([0.0, 10.0])
    prepared = batch.prepare(
        [{"prompt": "a", "steps": 1}] * rows, "unused", model="tiny", device="cpu", workers=workers
    )
    monkeypatch.setattr(local, "perf_counter", lambda: next(clock))
    estimate = prepared.estimate()
    assert (estimate.images, estimate.processes) == (rows, processes)
    assert estimate.seconds == pytest.approx(seconds)


@pytest.mark.slow
def test_what_kills_its_process_fails_after_three():
    items = [Item(i, i, None, {}, "", "") for i in range(4)]  # type: ignore[arg-type]
    start = functools.partial(WorkerProcess, dies_on)
    results = [r for some in hand_out(start, [items[:2], items[2:]], 1, lambda: False) for r in some]
    assert sorted(result.index for result in results) == [0, 1, 2, 3]
    assert [(result.index, result.error) for result in results if result.error] == [
        (2, "the process that drew it died, 3 times")
    ]
    with pytest.raises(ValueError, match="no such model"):
        list(hand_out(functools.partial(WorkerProcess, refuses), [items], 1, lambda: False))
    with pytest.raises(RuntimeError, match=r"end before they draw \(exit code 3\)"):
        list(hand_out(functools.partial(WorkerProcess, dies_at_start), [items], 1, lambda: False))


# ------------------------------------------------------------------------------------------- full disks


def run_to_a_full_disk(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # of one file; a picture has more
    try:
        run(folder)
    except batch.DiskFull:
        os._exit(33)


def test_files_may_grow_no_more(tmp_path: Path, reference: Content):
    process = fork(functools.partial(run_to_a_full_disk, tmp_path))
    process.join()
    assert process.exitcode == 33
    assert all(not path.name.endswith((".png", ".tmp")) for path in tmp_path.iterdir())
    run(tmp_path)
    complete(tmp_path, reference)


def test_a_disk_of_64_kib(tmp_path: Path, reference: Content):
    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(tmp_path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=64k"):
        pytest.skip("mounting is not permitted")
    try:
        with pytest.raises(batch.DiskFull, match="No space left on device; finished images are kept"):
            run(tmp_path)
        there = pictures(tmp_path)
        assert 0 < len(there) < 20 and there.items() <= reference.items()
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
        assert mount("remount", "ro")
        with pytest.raises(batch.DiskFull, match="Read-only file system"):
            run(tmp_path)
        assert mount("remount", "rw", "size=8m")
        run(tmp_path)
        complete(tmp_path, reference)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_names_of_the_manifests_tell_machines_apart(tmp_path: Path):
    run(tmp_path, ROWS[:1])
    assert [path.name for path in tmp_path.glob(".manifest*")] == [f".manifest-{HOST}-0.jsonl"]


def test_what_rows_are_read_otherwise_is_noted_once(tmp_path: Path):
    Image.new("RGB", (320, 240)).save(tmp_path / "large.png")
    rows = [{"prompt": f"<lora:a:1> {i}", "image": str(tmp_path / "large.png"), "steps": 2} for i in range(3)]
    notes = batch.prepare(rows, tmp_path / "out", pipe=tiny()).notes[-2:]
    assert [note.split(" ", 1)[0] for note in notes] == ["'<lora:a:1>'", "the"] and "is made 72x56" in notes[1]


def test_notes_on_pictures_and_masks_are_said_once_a_batch(tmp_path: Path):
    """However many rows have them, and of whatever sizes."""
    rows = []
    for i in range(3):
        mask = Image.linear_gradient("L").resize((200 + i, 240))
        picture, area = str(tmp_path / f"{i}.png"), str(tmp_path / f"mask{i}.png")
        Image.new("RGB", (320 + 80 * i, 240)).save(picture)
        mask.save(area)
        rows.append({"prompt": "a", "image": picture, "mask": area, "steps": 2})
    notes = batch.prepare(rows, tmp_path / "out", pipe=tiny()).notes
    for said in ("320x240 pixels and is made", "the mask has 200x240 pixels and the image 320x240", "grey parts"):
        assert sum(said in note for note in notes) == 1
    assert sum("is made" in note or "the mask has" in note for note in notes) == 3
