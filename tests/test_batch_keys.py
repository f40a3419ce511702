"""The sample key is of everything that decides an image, and keys of old folders stay valid."""

from typing import Any

from sdlite.batch.names import sample_key
from sdlite.request import Request
from tests.test_batch_plan import plan


def test_keys_of_folders_drawn_before_pasting_stay_valid():
    """The keys that the code before it made; a mask that is pasted back makes another picture and has another."""
    request = Request(prompt="a cat", seed=7, width=64, height=64)
    assert sample_key(request, {"model": "ab"}) == "74e181225660f6bdbde00721153d386e0461f9b8436b42aca456c0b0bed45ba6"
    masked = request.replace(image=f"sha256:{'0' * 64}", mask=f"sha256:{'1' * 64}")
    before = "c849168ede795d4a9a02cf98482399257a335222f5f59babd8baaa1f745c3d37"
    assert sample_key(masked.replace(paste=False, mask_blur=9), {"model": "ab"}) == before
    keys = {sample_key(masked.replace(mask_blur=blur), {"model": "ab"}) for blur in (0, 4)}
    assert len(keys) == 2 and before not in keys


def test_the_key_is_of_all_that_decides_the_picture():
    base = {"prompt": "caf\u00e9", "seed": 1}

    def key(row: dict[str, Any], **options: Any) -> str:
        return plan([row], **options)[0].sample_key

    assert key(base) == key({"prompt": "cafe\u0301", "seed": 1}) == key(base | {"note": "kept"})
    others = [{"seed": 2}, {"steps": 2}, {"solver": "euler"}, {"negative_prompt": "x"}, {"guidance_scale": 3}]
    keys = {key(base | change) for change in others} | {key(base), key(base, model={"model": "other"})}
    assert len(keys) == 7
    assert plan([base])[0].file_name == f"000000-{key(base)[:16]}.png"
