"""Pictures of a MuJoCo simulation without a window. Imports no graphics library before the first picture."""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Sequence
from typing import Any, final

import mujoco
import numpy as np
from numpy.typing import NDArray

from flowsteer.sim.errors import SimError

_CONTEXTS = {"egl": "mujoco.egl", "osmesa": "mujoco.osmesa", "glfw": "mujoco.glfw", "cgl": "mujoco.cgl"}

REMEDY = "install libegl1, libgl1 and libgl1-mesa-dri (software rendering), or set MUJOCO_GL to egl, osmesa or glfw"


@final
class OffscreenRenderer:
    """Renders what a camera sees; `MUJOCO_GL` chooses the library, EGL by default.

    `mujoco.Renderer` would do, but it chooses its library when MuJoCo is first imported, and so takes a window
    system for granted where nobody set `MUJOCO_GL` in time.

    Args:
        model: the compiled simulation.
        size: side of the largest picture, in pixels.
        hidden_groups: of geoms that are not to be seen.

    Raises:
        SimError: no graphics library, with the remedy.
    """

    def __init__(self, model: mujoco.MjModel, size: int, hidden_groups: Sequence[int] = ()) -> None:
        self._model = model
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        self._gl: Any = _gl_context(size)
        self._gl.make_current()
        self._mujoco: Any = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mujoco)
        self._scene = mujoco.MjvScene(model, maxgeom=2000)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[list(hidden_groups)] = 0
        self._camera = mujoco.MjvCamera()
        mujoco.mjv_defaultFreeCamera(model, self._camera)
        # MuJoCo ends EGL at exit; whoever forgot to close must be closed before that.
        atexit.register(self.close)

    def render(self, data: mujoco.MjData, camera: str | None, size: int) -> NDArray[np.uint8]:
        """The view of the named camera, or of MuJoCo's free one, now, [size, size, 3], the first row on top."""
        self._gl.make_current()
        if camera is not None:
            self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self._camera.fixedcamid = self._model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._options, None, self._camera, everything, self._scene)
        view = mujoco.MjrRect(0, 0, size, size)
        mujoco.mjr_render(view, self._scene, self._mujoco)
        picture = np.empty((size, size, 3), dtype=np.uint8)
        mujoco.mjr_readPixels(picture, None, view, self._mujoco)
        return picture[::-1]

    def close(self) -> None:
        """Free the buffers; safe to call twice."""
        if self._gl is not None:
            self._gl.make_current()
            self._mujoco.free()
            self._gl.free()
            self._gl = None
            atexit.unregister(self.close)


def _gl_context(size: int) -> Any:
    name = os.environ.get("MUJOCO_GL", "").lower() or "egl"
    try:
        return importlib.import_module(_CONTEXTS[name]).GLContext(size, size)
    except Exception as error:  # each library fails in its own way: ImportError, AttributeError, GLError, RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SimError(f"cannot render off screen with MUJOCO_GL={name} ({reason}): {REMEDY}") from error


def project(
    model: mujoco.MjModel, data: mujoco.MjData, camera: str, size: int, points: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Points [N, 3] in world metres as [N, 2] pixels (x right, y down) of `render(data, camera, size)`."""
    index = model.camera(camera).id
    # A MuJoCo camera looks along its -z axis, x to the right and y up.
    right, up, back = ((points - data.cam_xpos[index]) @ data.cam_xmat[index].reshape(3, 3)).T
    focal = 0.5 * size / np.tan(0.5 * np.deg2rad(model.cam_fovy[index]))
    return np.stack([0.5 * size + focal * right / -back, 0.5 * size - focal * up / -back], axis=-1)
