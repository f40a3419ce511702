"""Parts of the work."""

import pytest

from sdlite.batch.plan import in_part, parse_part
from tests.test_batch_plan import plan


def test_parts_are_disjoint_and_whole():
    items = plan([f"a fox {i}" for i in range(100)])
    parts = [[item.index for item in items if in_part(item, parse_part(f"{i}/3"))] for i in (1, 2, 3)]
    assert sorted(index for part in parts for index in part) == list(range(100)) and all(parts)
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5", "²/3"):
        with pytest.raises(ValueError, match="part="):
            parse_part(text)
