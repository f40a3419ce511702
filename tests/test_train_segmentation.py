"""Folders with masks, the segmentation task in the one loop, and the comparison of networks."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sdlite.cli import main
from sdlite.segmentation import Segmenter
from sdlite.segmentation.segmenter import FCNPlan, SegmenterConfig, UNetPlan
from sdlite.training.datasets import masks
from sdlite.training.datasets.draws import sample_generator
from sdlite.training.datasets.masks import BACKGROUNDS, MORE_BACKGROUNDS, make_foreground, make_nuclei
from sdlite.training.datasets.packages import NUCLEI, PHOTOS
from sdlite.training.datasets.pairs import Pair, channels_of, labels_of
from sdlite.training.loop import train
from sdlite.training.options import SegmentationOptions
from sdlite.training.segmentation import SegmentationTask, parameters, plan_for
from tests import compare_segmentation


def discs(folder, pictures=4, size=40):
    """Bright discs on dark noise; mask 1 inside, 255 at the last column."""
    rng = np.random.default_rng(0)
    (folder / "masks").mkdir(parents=True)
    lines = []
    y, x = np.mgrid[:size, :size]
    for i in range(pictures):
        mask = (np.hypot(*(rng.uniform(12, size - 12, 2)[:, None, None] - np.stack([y, x]))) < 9).astype(np.uint8)
        Image.fromarray((40 + 120 * mask + rng.integers(0, 40, mask.shape)).astype(np.uint8)).save(folder / f"{i}.png")
        mask[:, -1] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "mask_file_name": f"masks/{i}.png"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


FEW = {"train": 5, "test": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("discs")
    discs(folder / "train")
    discs(folder / "test", 2)
    return folder


def small(padding="same"):
    plan = UNetPlan(in_channels=1, depth=2, base_width=4, padding=padding, batch_norm=True)
    return SegmenterConfig(network=plan, tile=32)


@pytest.mark.parametrize("arch", ["unet", "fcn"])
def test_stage_learns_discs_and_exports_a_segmenter(data, tmp_path, monkeypatch, arch):
    monkeypatch.setattr("sdlite.training.segmentation.plan_for", lambda data, arch: chosen)
    fcn = FCNPlan(in_channels=1, base_width=4, batch_norm=True)
    chosen = small() if arch == "unet" else SegmenterConfig(network=fcn, tile=32)
    options = {"samples": 960, "batch_size": 8, "lr": 1e-2, "arch": arch}
    train("segmentation", data, tmp_path / "run", **options)
    figures = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert figures["iou"] > (0.9 if arch == "unet" else 0.6)
    assert 0 < figures["boundary_f1"] <= 1
    assert next((tmp_path / "run").glob("preview-*.png")).stat().st_size
    with Image.open(data / "test" / "0.png") as image, Image.open(data / "test" / "masks" / "0.png") as mask:
        found = np.asarray(Segmenter.load(tmp_path / "run" / "export")(image))
        truth = np.asarray(mask)
    assert (found == truth)[truth != 255].mean() > 0.9


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_samples_come_from_their_number_alone(data, padding):
    tasks = [SegmentationTask(data, small(padding), SegmentationOptions(seed=3)) for _ in range(2)]
    indices, numbers = torch.tensor([0, 3, 1]), torch.tensor([5, 6, 7])
    losses = [task(indices, numbers).item() for task in tasks]
    assert losses[0] == losses[1]
    assert tasks[0](indices, numbers + 1).item() != losses[0]


@pytest.mark.parametrize("side", [16, 40, 64])
def test_picture_and_mask_of_a_sample_belong_together(data, side):
    record = {"file_name": "train/0.png", "mask_file_name": "train/masks/0.png"}
    pair = Pair(data, record, 1)
    for number in range(8):
        values, mask = pair.sample(side, 6, sample_generator(0, number))
        assert values.shape == (1, side + 12, side + 12)
        inner = values[0, 6:-6, 6:-6]
        assert ((inner > 1) == (mask == 1))[mask != 255].all()  # discs are the bright pixels, the darkest of them too


def test_huggingface_datasets_loads_picture_and_mask(data):
    datasets = pytest.importorskip("datasets")
    row = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")[0]
    assert row["image"].size == row["mask"].size == (40, 40)


def test_plan_fits_the_data(data):
    unet = plan_for(data, "unet")
    assert (unet.network.in_channels, unet.network.num_classes) == (1, 2)
    assert parameters(plan_for(data, "fcn").network) == pytest.approx(parameters(unet.network), rel=0.05)


def test_faults_of_masks_are_named(data, tmp_path):
    for name, picture, pattern in (
        ("deep", Image.new("I;16", (40, 40)), "has 8 bits"),
        ("wide", Image.new("L", (41, 40)), "must have one size"),
    ):
        discs(tmp_path / name, 1)
        picture.save(tmp_path / name / "masks" / "0.png")
        with pytest.raises(ValueError, match=pattern):
            SegmentationTask(tmp_path / name, small(), SegmentationOptions())
    discs(tmp_path / "classes", 1)
    Image.new("L", (40, 40), 7).save(tmp_path / "classes" / "masks" / "0.png")
    with pytest.raises(ValueError, match="target has the value 7; must be a class, 0 to 1"):
        SegmentationTask(tmp_path / "classes", small(), SegmentationOptions())(torch.tensor([0]), torch.tensor([0]))
    (tmp_path / "classes" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a disc"}')
    with pytest.raises(ValueError, match='"file_name" and "mask_file_name"'):
        SegmentationTask(tmp_path / "classes", small(), SegmentationOptions())


def test_empty_masks_train_and_measure(tmp_path):
    discs(tmp_path, 1)
    Image.new("L", (40, 40)).save(tmp_path / "masks" / "0.png")
    task = SegmentationTask(tmp_path, small(), SegmentationOptions())
    assert task(torch.tensor([0]), torch.tensor([0])).isfinite()
    assert 0 <= task.evaluate()["mean_iou"] <= 1


def written(folder, masks, suffix="png", split="train", modes=("L",)):
    """A data folder with these masks, and pictures that are black where the mask is and white elsewhere."""
    (folder / split).mkdir(parents=True)
    lines = []
    for i, mask in enumerate(masks):
        names = {"file_name": f"{i}.png", "mask_file_name": f"mask-{i}.{suffix}"}
        Image.fromarray(mask.astype(np.uint8)).save(folder / split / names["mask_file_name"])
        picture = Image.fromarray(np.where(mask, 0, 255).astype(np.uint8))
        picture.convert(modes[i % len(modes)]).save(folder / split / names["file_name"])
        lines.append(json.dumps(names))
    (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def halves(left, right, size=40):
    mask = np.full((size, size), left)
    mask[:, size // 2 :] = right
    return mask


def smooth():
    """A white disc with grey edges, as drawing programs make it."""
    y, x = np.mgrid[:64, :64] - 31.5
    return 255 * np.clip(20.5 - np.hypot(x, y), 0, 1)


@pytest.mark.parametrize(
    ("masks", "suffix", "classes", "white"),
    [
        ([halves(0, 1)], "png", 2, False),
        ([halves(0, 0)], "png", 2, False),
        ([halves(0, 1), halves(255, 5)], "png", 6, False),
        ([np.arange(1600).reshape(40, 40) % 150], "png", 150, False),  # as many as ADE20K
        ([halves(0, 255), halves(0, 0)], "png", 2, True),
        ([smooth()], "png", 2, True),
        ([smooth()], "jpg", 2, True),
        ([halves(0, 255)], "jpg", 2, True),
    ],
)
def test_what_masks_mean_is_told_by_the_values_of_all_of_them(tmp_path, masks, suffix, classes, white):
    written(tmp_path, masks, suffix)
    labels = labels_of(tmp_path)
    assert (labels.classes, labels.white, len(labels.notes)) == (classes, white, white)
    assert plan_for(tmp_path, "unet").network.num_classes == classes
    task = SegmentationTask(
        tmp_path,
        SegmenterConfig(network=UNetPlan(in_channels=1, num_classes=classes, depth=1, base_width=1)),
        SegmentationOptions(),
    )
    for pair, mask in zip(task.pairs, masks, strict=True):
        want = mask >= 128 if white else mask
        assert (pair.mask.numpy() == want).mean() > 0.99
    assert task.evaluate()["mean_iou"] >= 0


@pytest.mark.parametrize(
    ("masks", "suffix", "fault"),
    [
        ([halves(0, 100)], "png", "have the values 0, 100: neither class numbers"),
        ([halves(0, 128), halves(255, 255)], "png", "have the values 0, 128: neither"),
        ([np.arange(1600).reshape(40, 40) % 250], "png", r"have the values 0, 1, 2, 3, 4, 5, 6, 7 \.\.\.: neither"),
        ([halves(0, 2)], "jpg", r"mask-0.jpg is a JPEG, which changes the values of a mask; save class numbers as PNG"),
        ([np.stack([halves(0, 255), *2 * [halves(0, 0)]], -1)], "png", "mask-0.png is RGB; a mask has 8 bits"),
    ],
)
def test_masks_that_mean_nothing_are_refused_in_a_line(tmp_path, masks, suffix, fault):
    (tmp_path / "train").mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "train" / "0.png")
    lines = []
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "train" / f"mask-{i}.{suffix}")
        lines.append(json.dumps({"file_name": "0.png", "mask_file_name": f"mask-{i}.{suffix}"}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=fault):
        plan_for(tmp_path, "unet")


def test_masks_of_one_bit_or_three_equal_colours_are_black_and_white(tmp_path):
    written(tmp_path, [halves(0, 255), halves(0, 255)])
    Image.fromarray(halves(0, 255).astype(np.uint8)).convert("1").save(tmp_path / "train" / "mask-0.png")
    Image.fromarray(halves(0, 255).astype(np.uint8)).convert("RGB").save(tmp_path / "train" / "mask-1.png")
    assert labels_of(tmp_path).white
    for pair in SegmentationTask(tmp_path, small(), SegmentationOptions()).pairs:
        assert pair.mask.tolist() == halves(0, 1).tolist()


def test_a_class_or_colour_in_one_file_of_any_split_counts(tmp_path):
    written(tmp_path, [halves(0, 1), halves(0, 1)], modes=("L", "L"))
    assert channels_of(tmp_path) == 1
    written(tmp_path, [halves(0, 1), halves(0, 3)], split="validation", modes=("L", "RGB"))
    plan = plan_for(tmp_path, "unet").network
    assert (plan.in_channels, plan.num_classes) == (3, 4)
    options = {"samples": 2, "batch_size": 2, "class_weights": [1, 2, 1, 1]}
    train("segmentation", tmp_path, tmp_path / "run", **options)
    assert Segmenter.load(tmp_path / "run").config.network == plan  # a run is as good as its export
    written_names = json.loads((tmp_path / "run" / "config.json").read_text()).keys()
    assert written_names > {"network", "terms", "class_weights", "white_is_class_1"}  # as in older versions
    with pytest.raises(ValueError, match=r"is a run with class_weights=\[1.0, 2.0, 1.0, 1.0\], not None"):
        train("segmentation", tmp_path, tmp_path / "run", **options | {"class_weights": None})
    with pytest.raises(ValueError, match="class_weights=1,2 must be 4 numbers from 0 on"):
        train("segmentation", tmp_path, tmp_path / "run", **options | {"class_weights": [1, 2]})


def test_class_weights_are_those_of_the_loss(data):
    """Of a weight of 0 for one class, the loss is that of the other alone."""
    indices, numbers = torch.tensor([0, 1]), torch.tensor([3, 4])
    task = SegmentationTask(data, small(), SegmentationOptions(terms={"cross_entropy": 1.0}, class_weights=[0, 2]))
    images, target = (
        torch.stack(part)
        for part in zip(
            *(task.pairs[i].sample(32, 0, sample_generator(0, n)) for i, n in ((0, 3), (1, 4))), strict=True
        )
    )
    log_p = task.network(images).log_softmax(1)[:, 1]
    assert task(indices, numbers).item() == pytest.approx(-log_p[target == 1].mean().item(), rel=1e-5)


def wheel(path, folder, pictures):
    with zipfile.ZipFile(path, "w") as archive:
        for name, picture in pictures.items():
            picture.save(path.parent / name)
            archive.write(path.parent / name, f"{folder}/{name}")


def test_nuclei_are_cut_in_two_with_a_gap(tmp_path):
    image = np.tile(np.arange(512, dtype=np.uint16) // 4, (512, 1))
    pictures = {"img2d.tif": Image.fromarray(image), "mask2d.tif": Image.fromarray(image // 64 * 300)}
    wheel(tmp_path / f"stardist-{NUCLEI.version}-py3.whl", "stardist/data/images", pictures)
    assert make_nuclei(tmp_path / "data", sources=tmp_path) == {"train": 1, "test": 1}
    halves = [np.asarray(Image.open(tmp_path / "data" / split / "00000.png")) for split in ("train", "test")]
    assert [half.shape for half in halves] == [(512, 320), (512, 160)]
    assert halves[0].max() < halves[1].min()
    mask = np.asarray(Image.open(tmp_path / "data" / "train" / "masks" / "00000.png"))
    assert np.array_equal(mask, halves[0] >= 64)
    with pytest.raises(FileExistsError, match="is not empty"):
        make_nuclei(tmp_path / "data", sources=tmp_path)


@pytest.fixture
def drawings(tmp_path):
    """Folder with scikit-image's package, all photos blue, and an emoji folder, all yellow squares of half the side."""
    names = {name for names in BACKGROUNDS.values() for name in names} | set(MORE_BACKGROUNDS)
    photos = {name: Image.new("RGB", (120, 110), (0, 0, 255)) for name in names}
    wheel(tmp_path / f"scikit_image-{PHOTOS.version}-py3.whl", "skimage/data", photos)
    for split in ("train", "test"):
        (tmp_path / "emoji" / split).mkdir(parents=True)
        icon = Image.new("RGBA", (32, 32))
        icon.paste((255, 254, 1, 255), (8, 8, 24, 24))
        icon.save(tmp_path / "emoji" / split / "a.png")
        line = json.dumps({"file_name": "a.png", "text": "a square", "licence": "MIT"})
        (tmp_path / "emoji" / split / "metadata.jsonl").write_text("\n".join([line] * 5))
    return tmp_path


def test_interrupted_pictures_with_masks_leave_no_folder(drawings, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "sdlite.training.datasets.masks.pattern", interrupted
    )  # after some pictures with a photo behind
    before = sorted(drawings.iterdir())
    with pytest.raises(KeyboardInterrupt):
        make_foreground(drawings / "data", drawings / "emoji", sources=drawings, size=48, amounts=FEW)
    assert sorted(drawings.iterdir()) == before


@pytest.mark.parametrize("varied", [0, 4])
def test_foreground_is_where_the_drawing_is(drawings, varied):
    folder = drawings / "data"
    counts = make_foreground(folder, drawings / "emoji", sources=drawings, size=48, amounts=FEW, varied=varied)
    assert counts == {"train": 5 * (varied or 1), "test": 3}
    records = [json.loads(x) for x in (folder / "train" / "metadata.jsonl").read_text().splitlines()]
    assert {record["licence"] for record in records} == {"MIT"}
    assert {record["background"] for record in records} == {"photo", "pattern"} | ({"leaves"} if varied else set())
    for record in records:
        pixels, mask = (
            np.asarray(Image.open(folder / "train" / record[name])) for name in ("file_name", "mask_file_name")
        )
        assert pixels.shape == (48, 48, 3)
        assert 0.02 < mask.mean() < 0.4
        inside = np.abs(pixels[mask == 1].astype(int) - [255, 254, 1]).max(1) < 8
        assert inside.mean() > 0.7  # but for its smooth edge


def test_varied_backgrounds_leave_the_test_split_as_it_is(drawings):
    options = {"sources": drawings, "size": 48, "amounts": {"train": 2, "test": 5}}
    make_foreground(drawings / "plain", drawings / "emoji", **options)
    make_foreground(drawings / "varied", drawings / "emoji", **options, varied=2)
    for file in sorted((drawings / "plain" / "test").rglob("*.*")):
        assert (drawings / "varied" / file.relative_to(drawings / "plain")).read_bytes() == file.read_bytes()
    pictures = {file.read_bytes() for file in (drawings / "varied" / "train").glob("*.png")}
    assert len(pictures) == 4  # each drawing in front of two backgrounds


def test_command_line_varies_backgrounds(drawings, capsys):
    folders = ["--emoji", str(drawings / "emoji"), "--sources", str(drawings), "-o", str(drawings / "data")]
    with pytest.raises(SystemExit) as ended:
        main(["data", "foreground", *folders, "--varied", "2"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "train 10, test 5\n"


@pytest.mark.parametrize("make", [masks.crop, masks.altered, masks.leaves])
def test_backgrounds_come_from_their_generator_and_cover_everything(make):
    photo = Image.fromarray(np.full((90, 70, 3), 10, np.uint8))
    draw = [make([photo], 40, sample_generator(0, number)) for number in (0, 0, 1, 2, 3)]
    assert all(pixels.shape == (40, 40, 3) and pixels.dtype == np.uint8 for pixels in draw)
    assert np.array_equal(draw[0], draw[1])
    colours = [len(np.unique(pixels.reshape(-1, 3), axis=0)) for pixels in draw[1:]]
    if make is masks.leaves:
        assert min(colours) >= 2
    else:
        assert colours == [1] * 4  # a photo of one colour stays that
        assert (draw[0] == 10).all() == (make is masks.crop)


def test_comparison_writes_a_table_and_resumes(data, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_segmentation, "plan_for", lambda *_: small())
    monkeypatch.setattr(compare_segmentation, "VARIANTS", (("UNet", "both"), ("FCN", "Dice")))
    for _ in range(2):
        compare_segmentation.compare({"discs": data}, tmp_path, samples=16, seeds=(0, 1))
    result = json.loads((tmp_path / "table.json").read_text())
    assert len(result["runs"]) == 4
    unet = result["table"][0]
    assert (unet["net"], unet["loss"], unet["seeds"]) == ("UNet", "both", 2)
    values = [run["iou"] for run in result["runs"] if run["net"] == "UNet"]
    assert unet["iou"] == [pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1))]
