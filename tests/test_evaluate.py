"""Evaluation: figures by hand, and the whole report on a toy model."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sdlite.training.evaluation.figures import interval, mmd, named, named_nouns, nearest, ranks
from sdlite.training.evaluation.judge import JudgeTask, load_judge
from sdlite.training.evaluation.probes import (
    NOUNS,
    SPECK,
    Probe,
    count_pieces,
    drawing,
    has_background,
    has_colour,
    has_pieces,
    is_in_corner,
    probes,
    right_and_chance,
)
from sdlite.training.evaluation.report import _check_judge, table
from sdlite.training.loop import TrainConfig, fit
from tests.test_train_tasks import assert_same, folder  # noqa: F401


def test_ranks_count_who_is_at_least_as_likely():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    assert ranks(logits, torch.tensor([0, 0, 0]), 3).tolist() == [0, 1, 2]
    assert ranks(torch.zeros(4, 200), torch.arange(4), 100).tolist() == [99] * 4  # undecided is wrong


def test_a_random_judge_is_right_as_often_as_chance():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3000, 300, generator=generator)
    right = (ranks(logits, torch.randint(0, 300, (3000,), generator=generator), 100) < 1).float()
    mean, low, high = interval(right)
    assert low < 0.01 < high and mean == pytest.approx(right.mean().item())


def test_interval_has_the_textbook_width():
    values = (torch.arange(400) % 2).float()
    mean, low, high = interval(values)
    assert mean == 0.5
    np.testing.assert_allclose([low, high], [0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025], atol=0.005)


def test_mmd_is_about_zero_for_one_distribution_and_positive_for_two():
    x = torch.randn(3, 400, 16, generator=torch.Generator().manual_seed(0)).double()
    assert abs(mmd(x[0], x[1])) < 0.02 < mmd(x[0], x[2] + 1)


def test_a_copy_is_near_and_others_are_not():
    known = torch.rand(5, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distances = nearest(torch.stack([known[2], -known[2]]), known)
    assert distances[0] < 1e-6 < 0.05 < distances[1]


def test_named_sees_both_sides():
    wanted = torch.tensor([[0, 1], [1, 0]])
    right = named((torch.eye(2) * 5, torch.eye(2).flip(0) * 5), wanted)
    wrong = named((torch.eye(2).flip(0) * 5, torch.eye(2) * 5), wanted)
    assert {row[0] for row in right.values()} == {1.0}
    assert wrong["concept_at_1_of_all"][0] == 0 and wrong["style"][0] == 0


def canvas(background="white", boxes=(), colour="red"):
    image = Image.new("RGB", (64, 64), background)
    for box in boxes:
        ImageDraw.Draw(image).ellipse(box, fill=colour)
    return np.asarray(image)


def test_probes_read_colours_backgrounds_places_and_numbers():
    middle, corner = (16, 16, 48, 48), (2, 34, 30, 62)
    assert has_colour("red")(canvas(boxes=[middle])) and not has_colour("blue")(canvas(boxes=[middle]))
    assert not has_colour("red")(canvas()) and not has_colour("red")(canvas(boxes=[middle], colour="grey"))
    assert has_background("blue")(canvas((60, 90, 210), [middle])) and has_background("white")(canvas(boxes=[middle]))
    assert is_in_corner("bottom left")(canvas(boxes=[corner])) and not is_in_corner("top left")(canvas(boxes=[corner]))
    assert not is_in_corner("bottom left")(canvas(boxes=[middle])) and not is_in_corner("top left")(canvas())
    boxes = [(2, 2, 20, 20), (40, 2, 60, 20), (2, 40, 20, 60)]
    assert [count_pieces(drawing(canvas(boxes=boxes[:n]))) for n in range(4)] == [0, 1, 2, 3]
    assert has_pieces(1)(canvas(boxes=[middle, (1, 1, 3, 3)]))  # a speck is no piece
    ring = canvas(boxes=[(8, 8, 56, 56)]).copy()
    ring[24:40, 24:40] = 255
    assert has_pieces(1)(ring)


def flooded(mask, y, x):
    """The pixels of a piece, one after another."""
    found, waiting = set(), [(y, x)]
    while waiting:
        y, x = waiting.pop()
        if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x] and (y, x) not in found:
            found.add((y, x))
            waiting += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
    return found


def test_pieces_are_those_of_a_flood_fill():
    generator = np.random.default_rng(0)
    for _ in range(20):
        height, width = generator.integers(3, 30, 2)
        mask = generator.random((height, width)) < generator.uniform(0.3, 0.8)
        pieces = {frozenset(flooded(mask, y, x)) for y, x in np.argwhere(mask).tolist()}
        assert count_pieces(mask) == sum(len(piece) / mask.size > SPECK for piece in pieces)
    assert count_pieces(np.zeros((4, 4), bool)) == 0


def test_probes_are_held_against_chance():
    asked = [Probe("colour", colour, has_colour(colour)) for colour in ("red", "blue")]
    pictures = [Image.fromarray(canvas(boxes=[(16, 16, 48, 48)], colour=colour)) for colour in ("red", "red")]
    assert right_and_chance(pictures, asked) == {"colour": (0.5, 0.5)}
    assert len(NOUNS) == 50 and {probe.kind for probe in probes()} == {"colour", "background", "place", "number"}


def test_a_noun_is_right_by_any_of_its_concepts():
    logits = torch.tensor([[3.0, 4.0, 1.0], [3.0, 4.0, 1.0], [3.0, 4.0, 5.0]])
    assert named_nouns(logits, [{0, 1}, {0}, {0, 1}]) == 1
    assert named_nouns(logits, [{1}, set(), {2}]) == 2  # a noun the judge does not know is wrong


def test_the_judge_learns_and_is_frozen(folder, tmp_path):  # noqa: F811
    fit(JudgeTask(folder), TrainConfig(batch_size=10, samples=600, lr=2e-3, warmup=10, half_life=50), tmp_path)
    judge, concepts, styles, digest = load_judge(tmp_path / "export")
    assert concepts == ["box", "disc"] and styles == ["cold", "green", "warm"] and len(digest) == 64
    assert not any(p.requires_grad for p in judge.parameters())
    figures = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert figures["trained_concepts"] >= 0.8 and figures["trained_styles"] >= 0.8

    _check_judge(tmp_path, folder)
    other = shutil.copytree(folder, tmp_path / "other")
    Image.new("RGB", (32, 32)).save(next((other / "train").glob("*.png")))
    with pytest.raises(ValueError, match="holds a judge that was trained on other images; give another --output"):
        _check_judge(tmp_path, other)
    weights = tmp_path / "export" / "judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"judge.safetensors is truncated"):
        load_judge(tmp_path / "export")
    (tmp_path / "export" / "judge.json").write_text('{"concepts": 5, "styles": []}')
    with pytest.raises(ValueError, match=r"judge.json: concepts=5 must be"):
        load_judge(tmp_path / "export")


def test_a_seed_gives_one_judge_also_in_a_resumed_run(folder, tmp_path):  # noqa: F811
    """Dropout is on, and PyTorch's own generator is in another state in every run."""
    for seed, lengths in enumerate(((16,), (8, 16))):
        for samples in lengths:
            torch.manual_seed(seed)
            fit(JudgeTask(folder), TrainConfig(batch_size=4, samples=samples), tmp_path / str(seed))
    assert_same(tmp_path / "0", tmp_path / "1")


def test_the_table_shows_means_and_intervals():
    report = {
        "judged": {
            "real": {"concept_at_1_of_100": (0.5, 0.4, 0.6)},
            "drawn": {"concept_at_1_of_100": (0.25, 0.2, 0.3)},
        },
        "measured": {"codec_psnr": 20.0},
        "pictures": 9,
        "judge": "abc",
    }
    text = table(report)
    assert "| real | 50 (40-60) |" in text and "| drawn | 25 (20-30) |" in text and "- codec psnr: 20" in text
