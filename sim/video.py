"""Videos of episodes, with what the policy predicted drawn in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from flowsteer.policies.spec import PolicySpec
from flowsteer.sim.errors import SimError
from flowsteer.sim.evaluate import Episode
from flowsteer.sim.files import replacing
from flowsteer.sim.tasks.base import Array, SingleEnv, Task

Frame = NDArray[np.uint8]

MAX_FPS = 30
MIN_SIDE = 384
EXECUTED = (255, 140, 0)
PREDICTED = (40, 110, 255)


def film(task: Task, episode: Episode, prediction: PolicySpec) -> tuple[Iterator[Frame], Fraction]:
    """Execute the episode's actions again from its seed; frames as they are needed, and their rate.

    A frame shows the scene before an action, what remains of the latest chunk (orange: to be executed, blue: beyond),
    the time and the reward so far.

    Raises:
        SimError: (while iterating) nothing can be rendered here, with the remedy.
    """
    stride = max(1, round(task.spec.control_hz / MAX_FPS))
    rate = Fraction(task.spec.control_hz).limit_denominator(1000) / stride
    return _frames(task, episode, prediction, stride), rate


def write_video(path: Path, frames: Iterable[Frame], rate: Fraction) -> None:
    """Write frames [H, W, 3] (all of one size, even sides) as mp4: h264, or mpeg4 where the encoder is missing."""
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(_encoder(), rate=rate)
                stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "yuv420p"
                stream.options = {"preset": "veryfast"}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if stream is None:
            raise SimError(f"{path}: there are no frames to write")
        container.mux(stream.encode(None))


def _encoder() -> str:
    try:
        av.codec.Codec("libx264", "w")
    except ValueError:  # UnknownCodecError; a build of FFmpeg without GPL parts
        return "mpeg4"
    return "libx264"


def _frames(task: Task, episode: Episode, prediction: PolicySpec, stride: int) -> Iterator[Frame]:
    env = task.make()
    low, high = (np.array(limit, dtype=np.float32) for limit in (task.spec.action_low, task.spec.action_high))
    decisions = dict(episode.decisions)
    chunk, decided, best = np.zeros((0, prediction.action_dim), np.float32), 0, 0.0
    try:
        env.reset(episode.seed)
        for t, action in enumerate(episode.actions):
            if t in decisions:
                chunk, decided = decisions[t], t
            if t % stride == 0:
                label = f"seed {episode.seed}   {t / task.spec.control_hz:.1f} s   best reward {best:.2f}"
                yield _frame(env, chunk, prediction.executed.start + t - decided, prediction.executed.stop, label)
            best = max(best, env.step(np.clip(action, low, high)).reward)
        label = f"seed {episode.seed}   {'success' if episode.success else 'no success'}   best reward {best:.2f}"
        yield _frame(env, chunk[:0], 0, 0, label)
    finally:
        env.close()


def _frame(env: SingleEnv, chunk: Array, now: int, executed_stop: int, label: str) -> Frame:
    """The scene, rows `now` and later of the chunk, and a line of text."""
    scene = env.render()
    scale = -(-MIN_SIDE // min(scene.shape[:2]))
    picture = Image.fromarray(scene).resize((scene.shape[1] * scale, scene.shape[0] * scale), Image.Resampling.BILINEAR)
    ahead = chunk[now:]
    pixels = env.project(ahead) if len(ahead) else None
    if pixels is not None:
        _draw_chunk(picture, pixels * scale, executed_stop - now)
    draw = ImageDraw.Draw(picture, "RGBA")
    draw.rectangle((0, 0, picture.width, 20), fill=(0, 0, 0, 140))
    draw.text((6, 4), label, fill=(255, 255, 255))
    return np.asarray(picture)


def _draw_chunk(picture: Image.Image, pixels: NDArray[np.float64], executed: int) -> None:
    """Dots along the chunk, fading with time."""
    draw = ImageDraw.Draw(picture, "RGBA")
    radius = max(2.0, picture.width / 130)
    for i in reversed(range(len(pixels))):
        fade = 1 - 0.75 * i / len(pixels)
        colour = (*(EXECUTED if i < executed else PREDICTED), int(230 * fade))
        x, y = pixels[i]
        if i:
            draw.line((*pixels[i - 1], x, y), fill=colour, width=max(1, int(radius / 2)))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
