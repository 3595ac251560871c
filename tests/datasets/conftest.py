from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flowsteer.datasets import ReplayBuffer


@pytest.fixture
def make_buffer() -> Callable[..., ReplayBuffer]:
    """Episodes of given lengths; every value tells its frame: state[n] = (n, -n), action[n] = 10 n, img[n] = n."""

    def make(lengths: tuple[int, ...] = (4, 6, 5), images: bool = False, **meta: object) -> ReplayBuffer:
        frames = np.arange(sum(lengths))
        data = {
            "state": np.stack([frames, -frames], axis=1).astype(np.float32),
            "action": 10.0 * frames[:, None].astype(np.float32),
        }
        if images:
            data["img"] = np.broadcast_to(frames.astype(np.uint8)[:, None, None, None], (len(frames), 12, 10, 3)).copy()
        return ReplayBuffer(data, np.cumsum(lengths), dict(meta))

    return make
