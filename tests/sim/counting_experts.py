"""Experts for the counting task, which workers import by name."""

import os
import time

import numpy as np

from flowsteer.sim.experts import Expert


class CountUp(Expert):
    """Wants the step's number; above 500, that is success, in the second step of odd episodes."""

    def reset(self):
        pass

    def act(self, observation):
        seed, t, _ = observation["count"]
        return np.array([501.0 if seed % 2 and t == 1 else t])


class DiesInEpisode5(CountUp):
    """With two workers its death is known before the episodes in front of it have been waited for."""

    def act(self, observation):
        seed = observation["count"][0]
        if seed == 2:
            time.sleep(0.5)
        if seed == 5:
            os._exit(7)
        return super().act(observation)
